// SPDX-License-Identifier: Apache-2.0
/**
 * XML that people write: read strictly, with the place of every mistake.
 *
 * Each document goes through three readers that must agree. A tokenizer accepts the
 * lexical forms that we use and nothing else, so that what other XML readers
 * disagree about (document types, processing instructions, stray markup) never gets
 * further, and knows where each attribute stands. fast-xml-parser's validator checks
 * the nesting. Its parser builds the tree and says where each element begins.
 * References are decoded here, since the parser knows no numeric ones of XML alone.
 */

import { type X2jOptions, XMLParser, XMLValidator } from 'fast-xml-parser';
import { EXIT, StillblockError } from './errors.ts';

/** A place in a text, both from 1. The column counts characters. */
export interface Position {
  readonly line: number;
  readonly column: number;
}

export interface XmlAttribute {
  readonly name: string;
  readonly value: string;
  /** Where its name begins; see {@link XmlDocument.fail}. */
  readonly at: number;
}

export interface XmlElement {
  readonly name: string;
  readonly attributes: readonly XmlAttribute[];
  readonly children: readonly XmlElement[];
  /** All text directly in it, without white space around. */
  readonly text: string;
  /** Where its tag begins. */
  readonly at: number;
}

/** What a document is to its reader: errors are made of it. */
export interface XmlKind {
  /** Of its errors, such as `BAD_CONFIGURATION`. */
  readonly code: string;
  /** Where it came from: a file's path, or words. */
  readonly source: string;
  readonly advice: string;
}

/** A mistake in a document. Its message begins with `SOURCE:LINE:COLUMN: `. */
export class XmlError extends StillblockError {
  readonly position: Position;

  constructor(kind: XmlKind, position: Position, problem: string) {
    const { line, column } = position;
    super(kind.code, `${kind.source}:${line}:${column}: ${problem}`, kind.advice, {
      exitCode: EXIT.usage,
    });
    this.position = position;
  }
}

/** A request for 64 disks with every attribute takes 30 KiB, UTF-16 code units. */
export const MAX_XML_LENGTH: number = 1024 * 1024;
/** What is nested deepest in our documents takes 6. */
const MAX_DEPTH = 32;

const SPACE = '[ \\t\\n]';
const NAME = '[A-Za-z_][A-Za-z0-9_.-]*(?::[A-Za-z_][A-Za-z0-9_.-]*)?';
const ATTRIBUTE = `(${NAME})${SPACE}*=${SPACE}*("[^<"]*"|'[^<']*')`;
/** What is read is text already, so that it cannot be declared to be anything but UTF-8. */
const DECLARATION = new RegExp(
  `^<\\?xml${SPACE}+version${SPACE}*=${SPACE}*(?:"1\\.[0-9]"|'1\\.[0-9]')` +
    `(?:${SPACE}+encoding${SPACE}*=${SPACE}*(?:"utf-?8"|'utf-?8'))?` +
    `(?:${SPACE}+standalone${SPACE}*=${SPACE}*(?:"yes"|"no"|'yes'|'no'))?${SPACE}*\\?>`,
  'i',
);
const TOKEN = new RegExp(
  [
    '(?<comment><!--(?:[^-]|-(?!-))*-->)',
    '(?<cdata><!\\[CDATA\\[(?:[^\\]]|\\](?!\\]>))*\\]\\]>)',
    `(?<close></${NAME}${SPACE}*>)`,
    `<(?<name>${NAME})(?<attributes>(?:${SPACE}+${ATTRIBUTE})*)${SPACE}*(?<empty>/?)>`,
    '(?<text>[^<]+)',
  ].join('|'),
  'y',
);
const ATTRIBUTES = new RegExp(ATTRIBUTE, 'g');
const REFERENCE = /&([^;&<\s]{1,32};)?/g;
/** What XML 1.0 (2.2) does not let a document contain. */
const FORBIDDEN = /[^\t\n\u{20}-\u{d7ff}\u{e000}-\u{fffd}\u{10000}-\u{10ffff}]/u;
const NAMED: Readonly<Record<string, string>> = {
  lt: '<',
  gt: '>',
  amp: '&',
  quot: '"',
  apos: "'",
};

/** @returns what a reference stands for; undefined if it is none of XML's own */
function decodeReference(reference: string): string | undefined {
  const name = reference.slice(1, -1);
  const [, hex, digits] = /^#(?:x([0-9a-fA-F]+)|([0-9]+))$/.exec(name) ?? [];
  if (hex === undefined && digits === undefined) {
    return Object.hasOwn(NAMED, name) ? NAMED[name] : undefined;
  }
  const code = hex === undefined ? Number(digits) : Number.parseInt(hex, 16);
  const text = code > 0x10ffff ? '\0' : String.fromCodePoint(code);
  return text !== '\r' && FORBIDDEN.test(text) ? undefined : text;
}

/** Replaces references that {@link tokenize} has seen. */
function decode(raw: string): string {
  return raw.replaceAll(REFERENCE, (reference) => decodeReference(reference) ?? reference);
}

/** A text of the peer's for a message: bounded, on one line. */
function quote(text: string): string {
  return JSON.stringify(text.length > 60 ? `${text.slice(0, 60)}…` : text);
}

/** Says what is wrong where no token is. */
function failToken(document: XmlDocument, at: number): never {
  const rest = document.text.slice(at, at + 64);
  if (/^<!(DOCTYPE|ENTITY)/i.test(rest)) {
    document.fail(at, 'document types are not accepted');
  }
  if (rest.startsWith('<?')) {
    const problem = /^<\?xml\s/i.test(rest)
      ? 'this XML declaration is not that of a UTF-8 text, or not at its start'
      : 'processing instructions are not accepted';
    document.fail(at, problem);
  }
  if (rest.startsWith('<!--')) {
    document.fail(at, 'this comment does not end, or contains "--"');
  }
  document.fail(at, `${quote(rest.split('\n')[0] ?? '')} is no tag`);
}

function checkReferences(document: XmlDocument, raw: string, at: number): void {
  for (const { 0: reference, index } of raw.matchAll(REFERENCE)) {
    if (decodeReference(reference) === undefined) {
      document.fail(at + index, `${quote(reference)} stands for nothing`);
    }
  }
}

/** Refuses text where only markup may be, and `]]>` anywhere. */
function checkText(document: XmlDocument, text: string, at: number, inside: boolean): void {
  const stray = inside ? text.indexOf(']]>') : text.search(/[^ \t\n]/);
  if (stray >= 0) {
    document.fail(at + stray, inside ? '"]]>" ends nothing here' : 'text outside of the document');
  }
  checkReferences(document, text, at);
}

/** An attribute as it is written. */
interface RawAttribute {
  readonly name: string;
  readonly raw: string;
  readonly at: number;
}

/** An opening tag, by the tokenizer. */
interface Tag {
  readonly name: string;
  readonly attributes: readonly RawAttribute[];
}

function readAttributes(document: XmlDocument, text: string, at: number): RawAttribute[] {
  const names = new Set<string>();
  return [...text.matchAll(ATTRIBUTES)].map(({ 0: whole, 1: name = '', 2: quoted = '', index }) => {
    checkName(document, name, at + index);
    if (names.has(name)) {
      document.fail(at + index, `the attribute ${name} is there twice`);
    }
    names.add(name);
    const raw = quoted.slice(1, -1);
    checkReferences(document, raw, at + index + whole.length - raw.length - 1);
    return { name, raw, at: at + index };
  });
}

/** Names that every JavaScript object has are none of our vocabulary, and the parser throws. */
function checkName(document: XmlDocument, name: string, at: number): void {
  if (name in Object.prototype || name === 'prototype') {
    document.fail(at, `${name} is unknown`);
  }
}

/** @returns all opening tags, by where they begin */
function tokenize(document: XmlDocument): ReadonlyMap<number, Tag> {
  const { text } = document;
  const tags = new Map<number, Tag>();
  let depth = 0;
  let end: number;
  for (let at = DECLARATION.exec(text)?.[0].length ?? 0; at < text.length; at = end) {
    TOKEN.lastIndex = at;
    const { groups = {} } = TOKEN.exec(text) ?? failToken(document, at);
    end = TOKEN.lastIndex;
    if (groups['cdata'] !== undefined && depth === 0) {
      document.fail(at, 'text outside of the document');
    } else if (groups['text'] !== undefined) {
      checkText(document, groups['text'], at, depth > 0);
    } else if (groups['close'] !== undefined) {
      depth -= 1;
    } else if (groups['name'] !== undefined) {
      const { name, attributes = '', empty } = groups;
      if (depth < 0 || (depth === 0 && tags.size > 0)) {
        document.fail(at, `<${name}> stands beside the document's element`);
      }
      checkName(document, name, at);
      tags.set(at, {
        name,
        attributes: readAttributes(document, attributes, at + 1 + name.length),
      });
      depth += empty === '' ? 1 : 0;
      if (depth > MAX_DEPTH) {
        document.fail(at, 'elements are nested too deeply');
      }
    }
  }
  return tags;
}

const TEXT = '#text';
const CDATA = '#cdata';
// The type says Symbol, the object; it is a symbol.
const meta = (): symbol => XMLParser.getMetaDataSymbol() as unknown as symbol;

const PARSING: X2jOptions = {
  preserveOrder: true,
  captureMetaData: true,
  ignoreAttributes: false,
  attributeNamePrefix: '',
  parseTagValue: false,
  parseAttributeValue: false,
  processEntities: false,
  trimValues: false,
  ignoreDeclaration: true,
  textNodeName: TEXT,
  cdataPropName: CDATA,
  maxNestedTags: MAX_DEPTH + 1,
};

/** A node as the parser gives it with `preserveOrder`: one key, and perhaps `:@` and {@link meta}. */
type Node = Readonly<Record<string | symbol, unknown>>;

const isElement = (node: Node): boolean => node[meta()] !== undefined;

function textOf(node: Node): string {
  const cdata = node[CDATA] as readonly Node[] | undefined;
  return cdata === undefined ? decode(String(node[TEXT] ?? '')) : String(cdata[0]?.[TEXT] ?? '');
}

/** Turns the parser's tree into ours, with the tokenizer's places. */
function toElement(document: XmlDocument, node: Node, tags: ReadonlyMap<number, Tag>): XmlElement {
  const name = Object.keys(node).find((key) => key !== ':@') ?? '';
  const { startIndex = 0 } = (node[meta()] ?? {}) as { readonly startIndex?: number };
  const tag = tags.get(startIndex);
  const values = Object.values(node[':@'] ?? {});
  if (
    tag?.name !== name ||
    tag.attributes.length !== values.length ||
    tag.attributes.some(({ raw }, index) => raw !== values[index])
  ) {
    document.fail(startIndex, `<${name}> cannot be read without doubt`);
  }
  const children = node[name] as readonly Node[];
  return {
    name,
    attributes: tag.attributes.map(({ name: each, raw, at }) => ({
      name: each,
      // White space in an attribute is spaces (XML 1.0, 3.3.3).
      value: decode(raw.replaceAll(/[\t\n]/g, ' ')),
      at,
    })),
    children: children.filter(isElement).map((child) => toElement(document, child, tags)),
    text: children
      .filter((child) => !isElement(child))
      .map(textOf)
      .join('')
      .trim(),
    at: startIndex,
  };
}

/** A document that is well-formed. */
export class XmlDocument {
  readonly #kind: XmlKind;
  readonly text: string;
  readonly root: XmlElement;

  /** @throws XmlError if it is too large, not well-formed, or uses what we refuse */
  constructor(input: string, kind: XmlKind) {
    this.#kind = kind;
    // A byte order mark and carriage returns belong to files, not to documents (XML 1.0, 2.11).
    this.text = input.replace(/^\ufeff/, '').replaceAll(/\r\n?/g, '\n');
    if (input.length > MAX_XML_LENGTH) {
      this.fail(0, 'the document is too large');
    }
    const forbidden = FORBIDDEN.exec(this.text);
    if (forbidden !== null) {
      this.fail(forbidden.index, 'this character is not allowed in XML');
    }
    const tags = tokenize(this);
    const valid = XMLValidator.validate(this.text);
    if (valid !== true) {
      const { line, col: column = 1, msg } = valid.err;
      throw new XmlError(kind, { line, column }, msg.replace(/\.$/, ''));
    }
    const root = (new XMLParser(PARSING).parse(this.text) as readonly Node[]).find(isElement);
    this.root = root === undefined ? this.fail(0, 'no element') : toElement(this, root, tags);
  }

  /** @throws XmlError about a place in the text */
  fail(at: number, problem: string): never {
    const before = this.text.slice(0, at);
    const line = before.split('\n').length;
    const column = [...before.slice(before.lastIndexOf('\n') + 1)].length + 1;
    throw new XmlError(this.#kind, { line, column }, problem);
  }
}

/** What an element may contain. */
export interface Shape<Attribute extends string, Once extends string, Many extends string> {
  readonly attributes?: readonly Attribute[];
  /** Elements that may be there once. */
  readonly once?: readonly Once[];
  /** Elements that may be there any number of times. */
  readonly many?: readonly Many[];
  /** Whether it holds text. */
  readonly text?: boolean;
}

/** An element whose parts are all known. */
export class Checked<Attribute extends string, Once extends string, Many extends string> {
  readonly #document: XmlDocument;
  readonly #element: XmlElement;

  /** Made by {@link check} alone. */
  constructor(document: XmlDocument, element: XmlElement) {
    this.#document = document;
    this.#element = element;
  }

  attribute(name: Attribute): string | undefined {
    return this.#element.attributes.find((attribute) => attribute.name === name)?.value;
  }

  /** The value of an attribute that has to be there. */
  required(name: Attribute): string {
    return this.attribute(name) ?? this.fail(`<${this.#element.name}> needs the attribute ${name}`);
  }

  once(name: Once): XmlElement | undefined {
    return this.#element.children.find((child) => child.name === name);
  }

  many(name: Many): readonly XmlElement[] {
    return this.#element.children.filter((child) => child.name === name);
  }

  get text(): string {
    return this.#element.text;
  }

  /**
   * Reads an attribute's value by a function that knows it.
   *
   * @param read gives undefined for a value that is none
   * @param wanted what a value is, for the message
   */
  read<T>(name: Attribute, read: (value: string) => T | undefined, wanted: string): T | undefined {
    const value = this.attribute(name);
    return value === undefined
      ? undefined
      : (read(value) ?? this.fail(`${name}=${quote(value)} is not ${wanted}`, name));
  }

  /** Reads an attribute whose value is one of a few words. */
  word<Word extends string>(name: Attribute, words: readonly Word[]): Word | undefined {
    const list = words.map((word) => JSON.stringify(word)).join(', ');
    return this.read(name, (value) => words.find((word) => word === value), `one of ${list}`);
  }

  /** @param name of the attribute that it is about; of the element as a whole without */
  fail(problem: string, name?: Attribute): never {
    const at = this.#element.attributes.find((attribute) => attribute.name === name);
    return this.#document.fail((at ?? this.#element).at, problem);
  }
}

function known(names: readonly string[]): string {
  return names.length === 0 ? 'none is known here' : `known here: ${names.join(', ')}`;
}

/**
 * Checks that an element contains nothing that is not known, and nothing twice.
 *
 * @throws XmlError at what is unknown
 */
export function check<
  Attribute extends string = never,
  Once extends string = never,
  Many extends string = never,
>(
  document: XmlDocument,
  element: XmlElement,
  shape: Shape<Attribute, Once, Many>,
): Checked<Attribute, Once, Many> {
  const attributes: readonly string[] = shape.attributes ?? [];
  const once: readonly string[] = shape.once ?? [];
  const children: readonly string[] = [...once, ...(shape.many ?? [])];
  const { name } = element;
  for (const attribute of element.attributes) {
    if (!attributes.includes(attribute.name)) {
      const problem = `<${name}> has an unknown attribute ${attribute.name}, ${known(attributes)}`;
      document.fail(attribute.at, problem);
    }
  }
  const seen = new Set<string>();
  for (const child of element.children) {
    if (!children.includes(child.name)) {
      document.fail(child.at, `<${child.name}> is unknown in <${name}>, ${known(children)}`);
    }
    if (seen.has(child.name) && once.includes(child.name)) {
      document.fail(child.at, `<${child.name}> is there twice in <${name}>`);
    }
    seen.add(child.name);
  }
  if (element.text !== '' && shape.text !== true) {
    document.fail(element.at, `<${name}> contains text, ${quote(element.text)}`);
  }
  return new Checked(document, element);
}
