// SPDX-License-Identifier: Apache-2.0
/**
 * Completion for shells, made of the commands themselves, so that it knows what they
 * know.
 */
import type { Argument, Command, Option } from 'commander';

/** What can stand after a command. */
interface Level {
  /** The words that lead to it, such as `stillblock backup begin`. */
  readonly words: readonly string[];
  readonly summary: string;
  readonly options: readonly Option[];
  readonly arguments: readonly Argument[];
  readonly commands: readonly Level[];
}

/** The tree of a program's commands. Help is an option of each. */
function levelOf(command: Command, above: readonly string[] = []): Level {
  const words = [...above, command.name()];
  const help = command.createHelp();
  return {
    words,
    summary: command.summary() || command.description().replaceAll('\n', ' '),
    options: help.visibleOptions(command),
    arguments: command.registeredArguments,
    commands: command.commands.map((child) => levelOf(child, words)),
  };
}

/** A level and all below it. */
function all(level: Level): Level[] {
  return [level, ...level.commands.flatMap(all)];
}

const flagsOf = ({ short, long }: Option): string[] =>
  [short, long].filter((flag) => flag !== undefined);
const takesValue = (option: Option): boolean => option.required || option.optional;
/** A text within single quotes. */
const quote = (text: string): string => `'${text.replaceAll("'", "'\\''")}'`;
/** The name of a shell function for a level. */
const functionOf = ({ words }: Level): string => `_${words.join('_').replaceAll('-', '_')}`;

/** @returns a script for bash, which completes what is not an option or a command as a file */
export function bashCompletion(program: Command): string {
  const root = levelOf(program);
  const levels = all(root);
  const below = levels.flatMap(({ words, commands }) =>
    commands.map((child) => quote(`${words.join(' ')} ${child.words.at(-1)}`)),
  );
  const values = levels.flatMap(({ words, options }) =>
    options
      .filter(takesValue)
      .flatMap((option) =>
        flagsOf(option).map((flag) => ({ key: quote(`${words.join(' ')} ${flag}`), option })),
      ),
  );
  const choices = values
    .filter(({ option }) => option.argChoices !== undefined)
    .map(
      ({ key, option }) => `        ${key}) words=${quote(option.argChoices?.join(' ') ?? '')} ;;`,
    );
  const files = values
    .filter(({ option }) => option.argChoices === undefined)
    .map(({ key }) => key);
  const words = levels.map(({ words: path, options, commands, arguments: [argument] }) => {
    const list = [
      ...commands.map((child) => child.words.at(-1)),
      ...(argument?.argChoices ?? []),
      ...options.flatMap(flagsOf),
    ];
    return `        ${quote(path.join(' '))}) words=${quote(list.join(' '))} ;;`;
  });
  return `# Completion of stillblock for bash, made by: stillblock completion bash
_stillblock() {
    local cur=\${COMP_WORDS[COMP_CWORD]} prev=\${COMP_WORDS[COMP_CWORD-1]} path=${root.words[0]} words= i
    for ((i = 1; i < COMP_CWORD; i++)); do
        case "$path \${COMP_WORDS[i]}" in
        ${below.join('|')}) path+=" \${COMP_WORDS[i]}" ;;
        esac
    done
    COMPREPLY=()
    case "$path $prev" in
${choices.length === 0 ? '' : `${choices.join('\n')}\n`}        ${files.join('|')}) return ;;
        *) case "$path" in
${words.join('\n')}
        esac ;;
    esac
    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$cur")
}
complete -o default -F _stillblock stillblock
`;
}

/** A text that `_arguments` takes within brackets, and `_describe` after a colon. */
const describe = (text: string): string =>
  text.replaceAll(/[[\]:\\]/g, '\\$&').replaceAll('\n', ' ');

function zshOption(option: Option): string {
  const flags = flagsOf(option);
  const value = !takesValue(option)
    ? ''
    : option.argChoices === undefined
      ? `:${describe(option.attributeName())}:_files`
      : `:${describe(option.attributeName())}:(${option.argChoices.join(' ')})`;
  const text = `[${describe(option.description)}]${value}`;
  const repeated = /repeatable|twice/.test(option.description) ? '*' : '';
  const [only = '', ...others] = flags;
  return others.length === 0
    ? quote(`${repeated}${only}${text}`)
    : `${repeated === '' ? quote(`(${flags.join(' ')})`) : quote('*')}{${flags.join(',')}}${quote(text)}`;
}

function zshLevel(level: Level): string {
  const { options, commands } = level;
  const specs = options.map((option) => `        ${zshOption(option)}`);
  if (commands.length === 0) {
    const [argument] = level.arguments;
    const files =
      argument?.argChoices === undefined ? '_files' : `(${argument.argChoices.join(' ')})`;
    const rest = argument === undefined ? [] : [`        '*:${argument.name()}:${files}'`];
    return `${functionOf(level)}() {\n    _arguments \\\n${[...specs, ...rest].join(' \\\n')}\n}`;
  }
  const list = commands.map(
    (child) => `            ${quote(`${child.words.at(-1)}:${describe(child.summary)}`)}`,
  );
  const cases = commands.map(
    (child) => `            ${child.words.at(-1)}) ${functionOf(child)} ;;`,
  );
  return `${functionOf(level)}() {
    local context state line
    typeset -A opt_args
    _arguments -C \\
${specs.join(' \\\n')} \\
        '1: :->command' \\
        '*:: :->argument'
    case $state in
    command)
        local -a commands=(
${list.join('\n')}
        )
        _describe -t commands command commands
        ;;
    argument)
        case $words[1] in
${cases.join('\n')}
        esac
        ;;
    esac
}`;
}

/** @returns a script for zsh, to be found as `_stillblock` in its `fpath` */
export function zshCompletion(program: Command): string {
  const root = levelOf(program);
  const functions = all(root).map(zshLevel);
  return `#compdef stillblock
# Completion of stillblock for zsh, made by: stillblock completion zsh
${functions.join('\n\n')}

_stillblock "$@"
`;
}
