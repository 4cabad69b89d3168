// SPDX-License-Identifier: Apache-2.0
/**
 * Which client may see which exports: a file of rules, one per line, of which each gives
 * something and none takes anything away.
 *
 * ```
 * # WHO                          EXPORTS
 * cn:proxy1.example              sda sda@*
 * dns:*.backup.example           *
 * psk:alice                      sdb "with space"
 * tls                            public
 * ```
 */
import { BlockList, isIP } from 'node:net';
import type { Access, AlternativeName, Identity } from '../nbd/access.ts';

/** What is wrong with a file of rules, and in which line. */
export class AccessRulesError extends Error {}

type Test = (text: string) => boolean;

/** Matches text against a pattern in which `*` stands for anything, in linear time. */
export function glob(pattern: string): Test {
  const [first = '', ...rest] = pattern.split('*');
  const last = rest.pop();
  if (last === undefined) {
    return (text) => text === pattern;
  }
  return (text) => {
    if (!text.startsWith(first)) {
      return false;
    }
    let at = first.length;
    for (const part of rest) {
      const found = text.indexOf(part, at);
      if (found < 0) {
        return false;
      }
      at = found + part.length;
    }
    return text.length - last.length >= at && text.endsWith(last);
  };
}

/** As {@link glob}, but of host names: `*` stays within a label, and case does not matter. */
function hostGlob(pattern: string): Test {
  const labels = pattern.toLowerCase().split('.').map(glob);
  return (text) => {
    const found = text.toLowerCase().split('.');
    return (
      found.length === labels.length &&
      labels.every((matches, index) => matches(found[index] ?? ''))
    );
  };
}

/** An address, or those of a prefix: `192.0.2.7`, `2001:db8::/32`. */
function addressTest(pattern: string): Test {
  const [, address = '', prefix] = /^([^/]*)(?:\/(\d+))?$/.exec(pattern) ?? [];
  const family = { 4: 'ipv4', 6: 'ipv6' }[isIP(address)] as 'ipv4' | 'ipv6' | undefined;
  const most = family === 'ipv4' ? 32 : 128;
  const bits = prefix === undefined ? most : Number(prefix);
  if (family === undefined || bits > most) {
    throw new AccessRulesError(`${pattern} is no IP address`);
  }
  const list = new BlockList();
  list.addSubnet(address, bits, family);
  return (text) => isIP(text) !== 0 && list.check(text, isIP(text) === 4 ? 'ipv4' : 'ipv6');
}

type Who = (client: Identity) => boolean;

function alternative(type: AlternativeName['type'], matches: Test): Who {
  return (client) =>
    client.kind === 'certificate' &&
    client.alternativeNames.some((name) => name.type === type && matches(name.value));
}

function parseWho(word: string): Who {
  if (word === 'anyone') {
    return () => true;
  }
  if (word === 'tls') {
    return (client) => client.kind !== 'plain';
  }
  const colon = word.indexOf(':');
  const pattern = word.slice(colon + 1);
  if (colon < 0 || pattern === '') {
    throw new AccessRulesError(
      `${JSON.stringify(word)} is neither anyone nor tls nor KIND:PATTERN`,
    );
  }
  const kind = word.slice(0, colon);
  switch (kind) {
    case 'dns':
      return alternative('dns', hostGlob(pattern));
    case 'ip':
      return alternative('ip', addressTest(pattern));
    case 'uri':
    case 'email':
      return alternative(kind, glob(pattern));
    case 'cn': {
      const matches = glob(pattern);
      return (client) => client.kind === 'certificate' && client.commonNames.some(matches);
    }
    case 'subject': {
      const matches = glob(pattern);
      return (client) => client.kind === 'certificate' && matches(client.subject);
    }
    case 'psk': {
      const matches = glob(pattern);
      return (client) => client.kind === 'psk' && matches(client.user);
    }
    default:
      throw new AccessRulesError(`${JSON.stringify(kind)} is no kind of name`);
  }
}

/** The words of a line; one that begins with a quotation mark is a JSON string. */
function wordsOf(line: string): string[] {
  const words: string[] = [];
  const word = /\s*(?:("(?:[^"\\]|\\.)*")|([^\s"#][^\s]*))(?=\s|$)/y;
  while (line.slice(word.lastIndex).trim() !== '' && !/^\s*#/.test(line.slice(word.lastIndex))) {
    const at = word.lastIndex;
    const [, quoted, plain] = word.exec(line) ?? [];
    if (quoted === undefined && plain === undefined) {
      throw new AccessRulesError(`${line.slice(at).trim()} is no word`);
    }
    try {
      words.push(plain ?? (JSON.parse(quoted ?? '') as string));
    } catch {
      throw new AccessRulesError(`${quoted} is not written as JSON writes strings`);
    }
  }
  return words;
}

/**
 * Reads rules. A client may see what any of them gives it, and nothing else.
 *
 * @throws AccessRulesError that names the line
 */
export function parseAccessRules(text: string): Access {
  const rules = text.split('\n').flatMap((line, index) => {
    try {
      const [who, ...exports] = wordsOf(line);
      if (who === undefined) {
        return [];
      }
      if (exports.length === 0) {
        throw new AccessRulesError('it names no export');
      }
      return [{ applies: parseWho(who), exports: exports.map(glob) }];
    } catch (error) {
      if (error instanceof AccessRulesError) {
        throw new AccessRulesError(`line ${index + 1}: ${error.message}`);
      }
      throw error;
    }
  });
  return (client, exportName) =>
    rules.some(
      ({ applies, exports }) => applies(client) && exports.some((matches) => matches(exportName)),
    );
}
