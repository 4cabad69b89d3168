// SPDX-License-Identifier: Apache-2.0
/**
 * The handshake (sections "Newstyle negotiation" and "Fixed newstyle
 * negotiation") as a pure step function: state and bytes in, new state and
 * effects out. `connection.ts` performs the effects.
 *
 * ```
 *  clientFlags ──known flags──▶ options ──EXPORT_NAME, GO──▶ over (transmission)
 *       │                       │ │  ▲
 *       │                       │ │  ├── any other option, answered in one write
 *       │                       │ └─STARTTLS─▶ startingTls ──afterTls()──▶ options
 *       └────── violation ──────┴──ABORT, violation──▶ over (closed)
 * ```
 */
import {
  NBD_FLAG_BLOCK_STATUS_PAYLOAD,
  NBD_FLAG_C_FIXED_NEWSTYLE,
  NBD_FLAG_C_NO_ZEROES,
  NBD_FLAG_CAN_MULTI_CONN,
  NBD_FLAG_HAS_FLAGS,
  NBD_FLAG_READ_ONLY,
  NBD_FLAG_SEND_DF,
  NBD_FLAG_SEND_FLUSH,
  NBD_FLAG_SEND_FUA,
  NBD_INFO_BLOCK_SIZE,
  NBD_INFO_DESCRIPTION,
  NBD_INFO_NAME,
  NBD_OPT_ABORT,
  NBD_OPT_EXPORT_NAME,
  NBD_OPT_EXTENDED_HEADERS,
  NBD_OPT_GO,
  NBD_OPT_INFO,
  NBD_OPT_LIST,
  NBD_OPT_LIST_META_CONTEXT,
  NBD_OPT_SET_META_CONTEXT,
  NBD_OPT_STARTTLS,
  NBD_OPT_STRUCTURED_REPLY,
  NBD_REP_ACK,
  NBD_REP_ERR_EXT_HEADER_REQD,
  NBD_REP_ERR_INVALID,
  NBD_REP_ERR_POLICY,
  NBD_REP_ERR_TLS_REQD,
  NBD_REP_ERR_TOO_BIG,
  NBD_REP_ERR_UNKNOWN,
  NBD_REP_ERR_UNSUP,
} from './constants.ts';
import type { Export } from './export.ts';
import type { Limits } from './limits.ts';
import { listContexts, type SelectedContext, selectContexts } from './meta-context.ts';
import {
  decodeClientFlags,
  decodeInfoRequest,
  decodeMetaContextRequest,
  decodeOption,
  decodeString,
  encodeExportNameAnswer,
  encodeInfoBlockSize,
  encodeInfoExport,
  encodeInfoText,
  encodeMetaContext,
  encodeReply,
  encodeServer,
  type Option,
} from './options.ts';
import type { TlsMode } from './tls.ts';
import type { Decoded, HeaderStyle } from './wire.ts';

/**
 * What the server offers at the moment of a step, to this client: what it may not know of is
 * not in it.
 */
export interface Offer {
  readonly limits: Limits;
  /** Whether TLS can be had on this connection, or must be. */
  readonly tls: TlsMode;
  /** Exports that LIST names. */
  readonly exports: Iterable<Export>;
  /** The export that a name means; the empty name may stand for one that has another. */
  find(name: string): Export | undefined;
  /** Whether a name that is not found would be for any client within TLS (SELECTIVETLS). */
  needsTls(name: string): boolean;
  /** Whether one more connection may enter transmission. */
  readonly admits: boolean;
}

/** The contexts that SET_META_CONTEXT chose, and for which export. */
interface Selection {
  readonly exportName: string;
  readonly export: Export;
  readonly contexts: readonly SelectedContext[];
}

/** Where a handshake stands. */
export interface HandshakeState {
  readonly phase: 'clientFlags' | 'options' | 'startingTls' | 'over';
  /** TLS is on. */
  readonly secure: boolean;
  readonly fixedNewstyle: boolean;
  readonly noZeroes: boolean;
  readonly headers: HeaderStyle;
  readonly selection: Selection | undefined;
  readonly options: number;
}

/** What the handshake agreed on. */
export interface Agreement {
  readonly export: Export;
  readonly headers: HeaderStyle;
  readonly contexts: readonly SelectedContext[];
}

/** Something to be done, in order. */
export type HandshakeEffect =
  | { readonly kind: 'send'; readonly bytes: Buffer }
  /**
   * Send the acknowledgement, then throw away all that has been received: nobody but an
   * attacker sends more before the acknowledgement. Then TLS begins.
   */
  | { readonly kind: 'startTls'; readonly acknowledgement: Buffer }
  | { readonly kind: 'transmit'; readonly agreement: Agreement }
  | { readonly kind: 'close'; readonly reason: string; readonly violation: boolean };

/** The outcome of one step. */
export interface HandshakeStep {
  readonly state: HandshakeState;
  readonly effects: readonly HandshakeEffect[];
  /** Bytes of the input that are done with. */
  readonly consumedBytes: number;
  /** Zero if something was consumed; else the length of input with which to try again. */
  readonly neededBytes: number;
}

export const HANDSHAKE_START: HandshakeState = {
  phase: 'clientFlags',
  secure: false,
  fixedNewstyle: false,
  noZeroes: false,
  headers: 'simple',
  selection: undefined,
  options: 0,
};

/** The block size that reads are best aligned to: a page. Unaligned reads are served, too. */
const PREFERRED_BLOCK_BYTES = 4096;

/**
 * The flags of an export, which are the same for all but for what was negotiated.
 *
 * @param asksStatus whether the client has chosen contexts, or may still do so
 */
export function transmissionFlags(headers: HeaderStyle, asksStatus: boolean): number {
  return (
    NBD_FLAG_HAS_FLAGS |
    NBD_FLAG_READ_ONLY |
    NBD_FLAG_SEND_FLUSH |
    NBD_FLAG_SEND_FUA |
    NBD_FLAG_CAN_MULTI_CONN |
    (headers === 'simple' ? 0 : NBD_FLAG_SEND_DF) |
    (headers === 'extended' && asksStatus ? NBD_FLAG_BLOCK_STATUS_PAYLOAD : 0)
  );
}

/**
 * The state once TLS is on. Of what was said in plain text only the client's flags and the
 * number of its options are left: whoever sat between has no say in the rest.
 */
export function afterTls(before: HandshakeState): HandshakeState {
  const { fixedNewstyle, noZeroes, options } = before;
  return {
    ...HANDSHAKE_START,
    phase: 'options',
    secure: true,
    fixedNewstyle,
    noZeroes,
    options,
  };
}

/** State and effects of one option; the step adds what was consumed. */
interface Outcome {
  readonly state: HandshakeState;
  readonly effects: readonly HandshakeEffect[];
}

function answer(state: HandshakeState, ...replies: Buffer[]): Outcome {
  return { state, effects: [{ kind: 'send', bytes: Buffer.concat(replies) }] };
}

function reject(state: HandshakeState, option: number, type: number, message: string): Outcome {
  return answer(state, encodeReply(option, type, Buffer.from(message, 'utf8')));
}

/** The answer where there is no export of a name, for this client. */
function rejectExport(state: HandshakeState, option: number, name: string, offer: Offer): Outcome {
  return !state.secure && offer.tls !== 'off' && offer.needsTls(name)
    ? reject(state, option, NBD_REP_ERR_TLS_REQD, 'this export is served within TLS only')
    : reject(state, option, NBD_REP_ERR_UNKNOWN, 'no such export');
}

function end(state: HandshakeState, reason: string, violation: boolean, last?: Buffer): Outcome {
  const close: HandshakeEffect = { kind: 'close', reason, violation };
  return {
    state: { ...state, phase: 'over' },
    effects: last === undefined ? [close] : [{ kind: 'send', bytes: last }, close],
  };
}

/**
 * The contexts that hold for the very export and name that they were selected for. An export
 * that was replaced by another of its name in between is not the one whose contexts were chosen.
 */
function contextsFor(
  { selection }: HandshakeState,
  agreed: Export,
  name: string,
): readonly SelectedContext[] {
  const valid = selection?.exportName === name && selection.export === agreed;
  return valid ? selection.contexts : [];
}

function transmit(state: HandshakeState, agreed: Export, name: string, last: Buffer): Outcome {
  const agreement: Agreement = {
    export: agreed,
    headers: state.headers,
    contexts: contextsFor(state, agreed, name),
  };
  return {
    state: { ...state, phase: 'over' },
    effects: [
      { kind: 'send', bytes: last },
      { kind: 'transmit', agreement },
    ],
  };
}

function onClientFlags(state: HandshakeState, flags: number): Outcome {
  if ((flags & ~(NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES)) !== 0) {
    return end(state, 'unknown client flag', true);
  }
  return {
    state: {
      ...state,
      phase: 'options',
      fixedNewstyle: (flags & NBD_FLAG_C_FIXED_NEWSTYLE) !== 0,
      noZeroes: (flags & NBD_FLAG_C_NO_ZEROES) !== 0,
    },
    effects: [],
  };
}

function onExportName(state: HandshakeState, data: Buffer, offer: Offer): Outcome {
  if (state.headers === 'extended') {
    return end(state, 'EXPORT_NAME after EXTENDED_HEADERS', true);
  }
  const name = decodeString(data);
  const found = name.ok ? offer.find(name.value) : undefined;
  if (!name.ok || found === undefined) {
    // This option has no error reply (section "NBD_OPT_EXPORT_NAME").
    return end(state, 'EXPORT_NAME of an unknown export', true);
  }
  if (!offer.admits) {
    return end(state, 'too many connections', false);
  }
  const flags = transmissionFlags(state.headers, false);
  const last = encodeExportNameAnswer(found.source.sizeBytes, flags, !state.noZeroes);
  return transmit(state, found, name.value, last);
}

function onList(state: HandshakeState, { option, data }: Option, offer: Offer): Outcome {
  if (data.length > 0) {
    return reject(state, option, NBD_REP_ERR_INVALID, 'LIST takes no data');
  }
  const servers = [...offer.exports].map(({ name, description }) =>
    encodeServer(option, name, description),
  );
  return answer(state, ...servers, encodeReply(option, NBD_REP_ACK));
}

function onInfo(state: HandshakeState, { option, data }: Option, offer: Offer): Outcome {
  const request = decodeInfoRequest(data);
  if (!request.ok) {
    return reject(state, option, NBD_REP_ERR_INVALID, request.reason);
  }
  const { exportName, information } = request.value;
  const found = offer.find(exportName);
  if (found === undefined) {
    return rejectExport(state, option, exportName, offer);
  }
  if (option === NBD_OPT_GO && !offer.admits) {
    return reject(state, option, NBD_REP_ERR_POLICY, 'too many connections');
  }
  // GO says it only to a client that has contexts to choose from, INFO to any.
  const asksStatus = option === NBD_OPT_INFO || contextsFor(state, found, exportName).length > 0;
  const flags = transmissionFlags(state.headers, asksStatus);
  const replies = [encodeInfoExport(option, found.source.sizeBytes, flags)];
  if (information.has(NBD_INFO_NAME)) {
    replies.push(encodeInfoText(option, NBD_INFO_NAME, found.name));
  }
  if (information.has(NBD_INFO_DESCRIPTION) && found.description !== '') {
    replies.push(encodeInfoText(option, NBD_INFO_DESCRIPTION, found.description));
  }
  if (information.has(NBD_INFO_BLOCK_SIZE)) {
    const sizes = {
      minimum: 1,
      preferred: PREFERRED_BLOCK_BYTES,
      maximum: Math.max(PREFERRED_BLOCK_BYTES, offer.limits.readBytes),
    };
    replies.push(encodeInfoBlockSize(option, sizes));
  }
  replies.push(encodeReply(option, NBD_REP_ACK));
  return option === NBD_OPT_GO
    ? transmit(state, found, exportName, Buffer.concat(replies))
    : answer(state, ...replies);
}

function onStructuredReply(state: HandshakeState, { option, data }: Option): Outcome {
  if (data.length > 0) {
    return reject(state, option, NBD_REP_ERR_INVALID, 'STRUCTURED_REPLY takes no data');
  }
  if (state.headers === 'extended') {
    return reject(state, option, NBD_REP_ERR_EXT_HEADER_REQD, 'extended headers were negotiated');
  }
  return answer({ ...state, headers: 'structured' }, encodeReply(option, NBD_REP_ACK));
}

function onExtendedHeaders(state: HandshakeState, { option, data }: Option): Outcome {
  if (data.length > 0) {
    return reject(state, option, NBD_REP_ERR_INVALID, 'EXTENDED_HEADERS takes no data');
  }
  return answer({ ...state, headers: 'extended' }, encodeReply(option, NBD_REP_ACK));
}

function onMetaContext(state: HandshakeState, { option, data }: Option, offer: Offer): Outcome {
  const setting = option === NBD_OPT_SET_META_CONTEXT;
  // A SET that fails in any way leaves nothing selected, and a LIST changes nothing.
  const next: HandshakeState = setting ? { ...state, selection: undefined } : state;
  if (setting && state.headers === 'simple') {
    return reject(next, option, NBD_REP_ERR_INVALID, 'structured replies were not negotiated');
  }
  const request = decodeMetaContextRequest(data, offer.limits.queries);
  if (!request.ok) {
    return reject(next, option, NBD_REP_ERR_INVALID, request.reason);
  }
  const { exportName, queryCount, queries } = request.value;
  if (queryCount > offer.limits.queries) {
    return reject(next, option, NBD_REP_ERR_TOO_BIG, 'too many queries');
  }
  const found = offer.find(exportName);
  if (found === undefined) {
    return rejectExport(next, option, exportName, offer);
  }
  if (!setting) {
    // The id has no meaning in a LIST and is zero.
    const names = listContexts(found.contexts, queries);
    const replies = names.map((name) => encodeMetaContext(option, 0, name));
    return answer(next, ...replies, encodeReply(option, NBD_REP_ACK));
  }
  const contexts = selectContexts(found.contexts, queries);
  if (contexts.length > offer.limits.contexts) {
    return reject(next, option, NBD_REP_ERR_TOO_BIG, 'too many contexts');
  }
  const replies = contexts.map(({ id, name }) => encodeMetaContext(option, id, name));
  return answer(
    { ...next, selection: { exportName, export: found, contexts } },
    ...replies,
    encodeReply(option, NBD_REP_ACK),
  );
}

function onStartTls(state: HandshakeState, { option, data }: Option, offer: Offer): Outcome {
  if (data.length > 0) {
    return reject(state, option, NBD_REP_ERR_INVALID, 'STARTTLS takes no data');
  }
  if (state.secure) {
    return reject(state, option, NBD_REP_ERR_INVALID, 'TLS is on already');
  }
  if (offer.tls === 'off') {
    return reject(state, option, NBD_REP_ERR_POLICY, 'TLS is not set up here');
  }
  return {
    state: { ...state, phase: 'startingTls' },
    effects: [{ kind: 'startTls', acknowledgement: encodeReply(option, NBD_REP_ACK) }],
  };
}

function onOption(before: HandshakeState, option: Option, offer: Offer): Outcome {
  const state = { ...before, options: before.options + 1 };
  if (state.options > offer.limits.options) {
    return end(state, 'too many options', true);
  }
  const needsTls = offer.tls === 'require' && !state.secure;
  if (option.option === NBD_OPT_EXPORT_NAME) {
    if (needsTls) {
      return end(state, 'EXPORT_NAME without TLS', true);
    }
    return onExportName(state, option.data, offer);
  }
  if (!state.fixedNewstyle) {
    // Such a client knows no option replies (section "Newstyle negotiation").
    return end(state, 'option without fixed newstyle', true);
  }
  switch (option.option) {
    case NBD_OPT_ABORT:
      return end(state, 'client aborted', false, encodeReply(option.option, NBD_REP_ACK));
    case NBD_OPT_STARTTLS:
      return onStartTls(state, option, offer);
    default:
      return needsTls
        ? reject(state, option.option, NBD_REP_ERR_TLS_REQD, 'TLS is required here')
        : onHaggling(state, option, offer);
  }
}

/** Any option that does not end the haggling, where TLS is on or need not be. */
function onHaggling(state: HandshakeState, option: Option, offer: Offer): Outcome {
  switch (option.option) {
    case NBD_OPT_LIST:
      return onList(state, option, offer);
    case NBD_OPT_INFO:
    case NBD_OPT_GO:
      return onInfo(state, option, offer);
    case NBD_OPT_STRUCTURED_REPLY:
      return onStructuredReply(state, option);
    case NBD_OPT_EXTENDED_HEADERS:
      return onExtendedHeaders(state, option);
    case NBD_OPT_LIST_META_CONTEXT:
    case NBD_OPT_SET_META_CONTEXT:
      return onMetaContext(state, option, offer);
    default:
      return reject(state, option.option, NBD_REP_ERR_UNSUP, 'option is not supported');
  }
}

function stepWith<T>(
  state: HandshakeState,
  decoded: Decoded<T>,
  take: (value: T) => Outcome,
): HandshakeStep {
  switch (decoded.kind) {
    case 'need':
      return { state, effects: [], consumedBytes: 0, neededBytes: decoded.bytes };
    case 'violation':
      return { ...end(state, decoded.reason, true), consumedBytes: 0, neededBytes: 0 };
    case 'value':
      return { ...take(decoded.value), consumedBytes: decoded.bytes, neededBytes: 0 };
    default:
      return decoded satisfies never;
  }
}

/**
 * Takes the next message from the input, if it is complete. It takes one at a
 * time so that the caller can wait until its answer has been sent.
 *
 * @param input bytes received and not consumed by an earlier step
 */
export function stepHandshake(state: HandshakeState, input: Buffer, offer: Offer): HandshakeStep {
  switch (state.phase) {
    case 'clientFlags':
      return stepWith(state, decodeClientFlags(input), (flags) => onClientFlags(state, flags));
    case 'options':
      return stepWith(state, decodeOption(input, offer.limits.optionBytes), (option) =>
        onOption(state, option, offer),
      );
    case 'startingTls':
    case 'over':
      return { state, effects: [], consumedBytes: 0, neededBytes: 0 };
    default:
      return state.phase satisfies never;
  }
}
