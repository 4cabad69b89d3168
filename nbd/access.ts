// SPDX-License-Identifier: Apache-2.0
/** Who a client has proved to be, and which exports it may know of. */

/** A name that a certificate is for, besides its subject (RFC 5280, section 4.2.1.6). */
export interface AlternativeName {
  readonly type: 'dns' | 'ip' | 'uri' | 'email';
  readonly value: string;
}

/** Who a client has proved to be. */
export type Identity =
  /** Nobody: what it says and hears is not encrypted. */
  | { readonly kind: 'plain' }
  /** Nobody, within TLS. */
  | { readonly kind: 'anonymous' }
  /** The owner of a certificate that an authority of ours has signed. */
  | {
      readonly kind: 'certificate';
      /** As RFC 4514 writes it: `CN=proxy,O=Example`. */
      readonly subject: string;
      readonly commonNames: readonly string[];
      readonly alternativeNames: readonly AlternativeName[];
    }
  /** A user who knows its pre-shared key. */
  | { readonly kind: 'psk'; readonly user: string };

export const PLAIN: Identity = { kind: 'plain' };
export const ANONYMOUS: Identity = { kind: 'anonymous' };

/** Whether a client may know of an export. What it may not is answered as if it were not there. */
export type Access = (client: Identity, exportName: string) => boolean;

/** A client's name for the log; undefined if it has none. */
export function nameOf(client: Identity): string | undefined {
  switch (client.kind) {
    case 'plain':
    case 'anonymous':
      return undefined;
    case 'certificate':
      return client.subject;
    case 'psk':
      return client.user;
    default:
      return client satisfies never;
  }
}
