// SPDX-License-Identifier: Apache-2.0
/**
 * The manual page stillblock(8), in mdoc(7): what is general is written here, what
 * concerns each command is that command's own help.
 */
import type { Command, Help } from 'commander';
import { CONFIGURATION_FILE } from './configuration.ts';

const HEAD = `.\\" SPDX-License-Identifier: Apache-2.0
.\\" Made by scripts/manual.sh; the source is src/manual.ts and the commands' help.
.Dd November 25, 2026
.Dt STILLBLOCK 8
.Os
.Sh NAME
.Nm stillblock
.Nd consistent images of block devices, and what changed since, over NBD
.Sh SYNOPSIS
.Nm stillblock
.Ar command
.Op Ar options
.Sh DESCRIPTION
.Nm
takes consistent, read-only images of the block devices of a running server, knows
which of their blocks changed since any earlier checkpoint, and serves both over NBD to
whoever backs up, migrates or inspects that server.
.Pp
A kernel module tracks the devices.
A snapshot of several of them is of one instant: their file systems are frozen for some
milliseconds, and from then on the old data of whatever is overwritten goes to a store,
until the backup is ended.
The server itself goes on at all times; if a snapshot cannot be kept, it is the snapshot
that fails.
.Pp
With a daemon
.Pq Cm serve
backups outlive the command that begins them.
Without one,
.Cm backup begin
serves its backup itself, until it is ended.
.Sh COMMANDS
`;

const TAIL = `.Sh REQUESTS IN XML
.Cm backup begin
takes the XML of libvirt.
.Pp
.Li <domainbackup mode='pull'>
may contain
.Li <incremental> ,
.Li <server>
with
.Li transport
.Pq tcp or unix ,
.Li name , port
.Pq default: 10809 ,
.Li socket
and
.Li tls ,
and
.Li <disks> .
Without
.Li <disks>
all tracked devices are backed up, else those that are listed without
.Li backup='no' .
A
.Li <disk>
has
.Li name , backup , type , backupmode , incremental , exportname
.Pq default: the name ,
.Li exportbitmap
.Pq default: backup- and the name ,
and
.Li <scratch file>
or
.Li <scratch dev> ,
which is its store.
.Li <driver>
and
.Li <seclabel>
are ignored, with a warning.
A missing mode, push backups, encryption and whatever is unknown are errors, with line and
column.
.Pp
.Li <domaincheckpoint>
may contain
.Li <name> , <description>
and
.Li <disks> .
.Sh ENVIRONMENT
.Bl -tag -width Ds
.It Ev STILLBLOCK_CONFIGURATION
another configuration file
.It Ev STILLBLOCK_STATE_DIR , STILLBLOCK_RUN_DIR
other folders than
.Pa /var/lib/stillblock
and
.Pa /run/stillblock
.El
.Sh FILES
.Bl -tag -width Ds
.It Pa ${CONFIGURATION_FILE}
the configuration, see
.Xr stillblock.xml 5
.It Pa /var/lib/stillblock/checkpoints
checkpoints, one file each
.It Pa /run/stillblock/control.sock
the control API: HTTP with JSON
.El
.Sh EXIT STATUS
.Bl -tag -width Ds -compact
.It 0
done
.It 1
failed
.It 2
it was called in a wrong way, or a file that it was given is wrong
.It 3
a full backup is required
.It 4
the store of a snapshot was full
.El
.Sh SEE ALSO
.Xr nbdcopy 1 ,
.Xr nbdinfo 1 ,
.Xr qemu-img 1 ,
.Xr stillblock.xml 5 ,
.Xr nbd-client 8
`;

/** A line of text, so that nothing in it is taken for a request or an escape. */
function escapeLine(text: string): string {
  return text.replaceAll('\\', '\\e').replaceAll(/^([.'])/gm, '\\&$1');
}

/** Prose: each sentence begins a line. */
function escapeProse(text: string): string {
  return escapeLine(text.replaceAll(/([.!?]\)?) (?=[A-Z])/g, '$1\n'));
}

/** Arguments of a macro: none is taken for a macro itself, or for several. */
function escapeArgument(text: string): string {
  return `"${text.replaceAll('\\', '\\e').replaceAll('"', '""')}"`;
}

/** Notes after a help text: paragraphs, and indented lines as they are. */
function formatNotes(text: string): string {
  const blocks: string[] = [];
  let literal = false;
  for (const line of text.trim().split('\n')) {
    const indented = line.startsWith('  ');
    if (indented !== literal) {
      blocks.push(indented ? '.Bd -literal -offset indent' : '.Ed');
      literal = indented;
    }
    const shown = indented ? escapeLine(line.slice(2)) : escapeProse(line);
    blocks.push(line === '' ? '.Pp' : shown);
  }
  const ended = literal ? [...blocks, '.Ed'] : blocks;
  // A display brings its own space, and one after a section's end is none.
  return ended
    .filter((line, index) => line !== '.Pp' || !/^\.(Bd|Pp)/.test(ended[index + 1] ?? '.Pp'))
    .join('\n');
}

/** What a command's help says after its options. */
function notesOf(command: Command): string {
  let text = '';
  command.configureOutput({
    writeOut: (part) => {
      text += part;
    },
  });
  command.outputHelp();
  return text.slice(command.helpInformation().length);
}

function formatCommand(command: Command, words: readonly string[], help: Help): string {
  const names = command.registeredArguments.map((argument) => {
    const name = argument.variadic ? `${argument.name()}...` : argument.name();
    return argument.required ? `Ar ${escapeArgument(name)}` : `Op Ar ${escapeArgument(name)}`;
  });
  const items = help
    .visibleOptions(command)
    .filter(({ long }) => long !== '--help')
    .flatMap((option) => {
      const value = /[<[](.*)[>\]]$/.exec(option.flags)?.[1];
      const ending = value === undefined ? '' : ` Ar ${escapeArgument(value)}`;
      const flags = [option.short, option.long]
        .filter((flag) => flag !== undefined)
        .map((flag) => `Fl ${flag.slice(1)}`);
      return [`.It ${flags.join(' , ')}${ending}`, escapeProse(help.optionDescription(option))];
    });
  const notes = formatNotes(notesOf(command));
  return [
    `.Ss ${words.join(' ')}`,
    `.Nm stillblock Cm ${words.join(' ')}`,
    '.Op Ar options',
    ...names.map((name) => `.${name}`),
    '.Pp',
    escapeProse(command.description().replaceAll('\n', ' ')),
    ...help
      .visibleArguments(command)
      .map(
        (argument) =>
          `.Pp\n.Ar ${escapeArgument(argument.name())} :\n${escapeProse(argument.description)}`,
      ),
    ...(items.length === 0 ? [] : ['.Bl -tag -width Ds', ...items, '.El']),
    ...(notes === '' ? [] : ['.Pp', notes]),
  ].join('\n');
}

/** All commands that do something themselves. */
function formatCommands(command: Command, words: readonly string[]): string[] {
  const help = command.createHelp();
  return command.commands.flatMap((child) => {
    const path = [...words, child.name()];
    return child.commands.length === 0
      ? [formatCommand(child, path, help)]
      : formatCommands(child, path);
  });
}

/** @returns the page */
export function manual(program: Command): string {
  const commands = formatCommands(program, []).join('\n');
  // A paragraph before a display or a section is none.
  const tidy = commands.replaceAll(/\.Pp\n(?=\.(?:Bd|Ss|Sh|Pp))/g, '');
  return `${HEAD}${tidy}\n${TAIL}`;
}
