// SPDX-License-Identifier: Apache-2.0
// Makes the command `stillblock` as it is shipped and tested, in dist/bundle: cli.cjs, which
// runs main.cjs, which has all that is ours, and a file for each npm package that not every
// command needs. A command then opens a handful of files where it would open a hundred.
//
//   node scripts/bundle.mjs
//
// The files are CommonJS: Node's loader of ES modules takes a millisecond and more for each
// file and each of Node's own modules, and has no way to load one at its first use. Nothing is
// minified, which saves next to nothing and would make stack traces unreadable.
import { chmodSync, mkdirSync, readdirSync, readFileSync, renameSync, rmSync, utimesSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { basename, dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { build } from 'esbuild';

const checkout = join(dirname(fileURLToPath(import.meta.url)), '..');
const folder = join(checkout, 'dist/bundle');
const require = createRequire(import.meta.url);

/** Loaded when something of them is first used. Their default exports are not to be had. */
const LAZY = ['ajv', 'cli-progress', 'fast-xml-parser', 'fastify', 'pino', 'pino-pretty', 'prom-client'];

/** So are those of Node's own modules that take long. */
const LAZY_BUILTINS = ['child_process', 'crypto', 'http', 'https', 'net', 'tls'].map((name) => `node:${name}`);

/** What a module exports, each of which loads it when it is asked for. */
function stub(name, file) {
  const getters = Object.keys(require(name))
    .filter((key) => /^\w+$/.test(key) && key !== 'default' && key !== '__esModule')
    .map((key) => `get ${key}() { return load().${key}; }`);
  return `let found;
const load = () => found ??= require('${file}');
module.exports = {
${getters.join(',\n')}
};
`;
}

const filesOf = (names) => new RegExp(`^(?:${names.join('|')})$`);

/** For what is ours. */
const lazily = {
  name: 'lazily',
  setup(making) {
    making.onResolve({ filter: filesOf([...LAZY, ...LAZY_BUILTINS]) }, ({ path, namespace }) =>
      namespace === 'stub' ? { path, external: true } : { path, namespace: 'stub' },
    );
    making.onResolve({ filter: /^\.\/.*\.cjs$/ }, ({ path }) => ({ path, external: true }));
    making.onLoad({ filter: /./, namespace: 'stub' }, ({ path }) => ({
      contents: stub(path, LAZY.includes(path) ? `./${path}.cjs` : path),
      resolveDir: checkout,
    }));
  },
};

/** A file that others are in stands beside them. */
const beside = (names, fileOf) => ({
  name: 'beside',
  setup(making) {
    making.onResolve({ filter: filesOf(names) }, ({ path, kind }) =>
      kind === 'entry-point' ? undefined : { path: fileOf(path), external: true },
    );
  },
});

const common = {
  absWorkingDir: checkout,
  bundle: true,
  format: 'cjs',
  platform: 'node',
  target: 'node20.17',
  logLevel: 'warning',
  write: false,
  outdir: folder,
  outExtension: { '.js': '.cjs' },
};
const made = await Promise.all([
  build({
    ...common,
    entryPoints: ['src/cli.ts'],
    plugins: [beside(['./main\\.ts'], () => './main.cjs')],
  }),
  build({
    ...common,
    entryPoints: ['src/main.ts'],
    plugins: [lazily],
    // CommonJS has none: src/installation.ts alone asks for it.
    define: { 'import.meta.url': '__url' },
    banner: { js: "const __url = require('node:url').pathToFileURL(__filename).href;" },
  }),
  ...LAZY.map((name) =>
    build({
      ...common,
      entryPoints: [{ in: name, out: name }],
      plugins: [beside(LAZY, (path) => `./${path}.cjs`)],
    }),
  ),
]);

mkdirSync(folder, { recursive: true });
const files = made.flatMap(({ outputFiles }) => outputFiles);
for (const { path, text } of files) {
  if (!isSame(path, text)) {
    // At once, for who runs it meanwhile.
    writeFileSync(`${path}.new`, text);
    renameSync(`${path}.new`, path);
  }
}
const names = files.map(({ path }) => basename(path));
for (const name of readdirSync(folder)) {
  if (!names.includes(name)) rmSync(join(folder, name));
}
const command = join(folder, 'cli.cjs');
chmodSync(command, 0o755);
// It says when all of them were made.
utimesSync(command, new Date(), new Date());

function isSame(path, text) {
  try {
    return readFileSync(path, 'utf8') === text;
  } catch {
    return false;
  }
}
