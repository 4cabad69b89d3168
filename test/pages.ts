// SPDX-License-Identifier: Apache-2.0
/**
 * The commands that README.md, CONTRIBUTING.md and docs/ tell people to type, for the tests
 * that run them. A comment in the page says which test does, from there to the next comment:
 *
 *     <!-- run by test/vm/readme.test.ts -->
 *     <!-- run by test/native/sanitizers.test.ts, with fewer messages -->
 *     <!-- run by .ci/run -->
 *     <!-- not run: it needs a console -->
 *
 * That test opens the page, and has to take every block that is its own. `test/src/pages.test.ts`
 * looks that no block is without, and that `.ci/run`, which is no test, has such commands among
 * its own.
 */
import { readdir, readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { type Finished, tryRun } from './interop/clients.ts';
import { checkout } from './vm/checkout.ts';

/** A fenced block. */
export interface Block {
  readonly page: string;
  /** Where its text begins, from 1. */
  readonly line: number;
  /** What stands behind the fence. */
  readonly language: string;
  readonly text: string;
  /** Who runs it, as a path from the checkout; or why nobody does. */
  readonly runBy: string | undefined;
  readonly notRun: string | undefined;
}

/** What only shows something, in contrast to commands and programs. */
const SHOWS: ReadonlySet<string> = new Set(['text', 'json']);

/** All pages, as paths from the checkout. */
export async function pageNames(): Promise<string[]> {
  const names = await readdir(join(checkout, 'docs'));
  const docs = names.filter((name) => name.endsWith('.md')).map((name) => `docs/${name}`);
  return ['README.md', 'CONTRIBUTING.md', ...docs.toSorted()];
}

export function readPage(page: string): Promise<string> {
  return readFile(join(checkout, page), 'utf8');
}

/** The blocks of a page that are meant to be typed or run. */
export function blocksOf(page: string, document: string): Block[] {
  const blocks: Block[] = [];
  let claim: Pick<Block, 'runBy' | 'notRun'> = { runBy: undefined, notRun: undefined };
  const pieces =
    /^ *<!-- (?:run by (?<runBy>[\w./-]+)[^>]*|not run: (?<notRun>[^>]+)) -->$|^(?<indent> *)```(?<language>\w*)\n(?<text>[\s\S]*?)^ *```$/gm;
  for (const { index, groups = {} } of document.matchAll(pieces)) {
    const { runBy, notRun, indent = '', language = '', text } = groups;
    if (text === undefined) {
      claim = { runBy, notRun };
    } else if (!SHOWS.has(language)) {
      const line = document.slice(0, index).split('\n').length + 1;
      const flush = text.replaceAll(new RegExp(`^${indent}`, 'gm'), '');
      blocks.push({ page, line, language, text: flush, ...claim });
    }
  }
  return blocks;
}

/** The commands of a block, one per line: continued lines are joined, prompts left out. */
export function commandsOf({ text }: Pick<Block, 'text'>): string[] {
  return text
    .replaceAll(/\\\n\s*/g, '')
    .split('\n')
    .map((line) => line.replace(/^[#$] /, ''))
    .filter((line) => line.trim() !== '');
}

/** The commands of CONTRIBUTING.md's table, as they stand in it: `|` is `\\|` there. */
export async function contributingCommands(): Promise<string[]> {
  const [, table = ''] =
    /^\| what \| command \|\n([\s\S]*?)\n\n/m.exec(await readPage('CONTRIBUTING.md')) ?? [];
  return [...table.matchAll(/^\| .* \| `(.+?)`(?: \(.*\))? \|$/gm)].map(
    ([, command = '']) => command,
  );
}

/** The commands of a block without the remarks behind them. */
export function bareCommandsOf(block: Pick<Block, 'text'>): string[] {
  return commandsOf(block).map((command) => command.replace(/\s+#.*/, ''));
}

/** Of a command that is typed, whose test has a limit of its own, milliseconds. */
const TYPED_MS = 2 * 60 * 60_000;

/** Types a command in the checkout, as whoever reads the page does, and waits for its end. */
export function type(command: string): Promise<Finished> {
  return tryRun('sh', ['-c', command], checkout, TYPED_MS);
}

/** A page in the hands of the test that runs it. */
export class Page {
  readonly #name: string;
  readonly #left: Block[];

  private constructor(name: string, left: Block[]) {
    this.#name = name;
    this.#left = left;
  }

  /** @param url `import.meta.url` of the test: it gets the blocks that are its own */
  static async open(name: string, url: string): Promise<Page> {
    const [, file = ''] = /\/dist\/(.+)\.js$/.exec(url) ?? [];
    const blocks = blocksOf(name, await readPage(name));
    return new Page(
      name,
      blocks.filter(({ runBy }) => runBy === `${file}.ts`),
    );
  }

  /** The first block that contains a text and was not taken yet. */
  take(containing: string): Block {
    const index = this.#left.findIndex(({ text }) => text.includes(containing));
    const [block] = index < 0 ? [] : this.#left.splice(index, 1);
    if (block === undefined) {
      throw new Error(`${this.#name} has no block of this test with ${containing}`);
    }
    return block;
  }

  /** All that were not taken yet, in their order. */
  takeAll(): Block[] {
    return this.#left.splice(0);
  }

  /** What nobody has taken: it would go unnoticed if it were wrong. */
  get left(): readonly Block[] {
    return this.#left;
  }
}
