// SPDX-License-Identifier: Apache-2.0
/** `stillblock doctor`: what works on this machine, and what to do about what does not. */
import process from 'node:process';
import type { Command } from 'commander';
import { CONFIGURATION_FILE, configurationInForce } from '../configuration.ts';
import { examine, type Finding } from '../doctor.ts';
import { EXIT } from '../errors.ts';
import { printJson, printLine, printTable } from '../output.ts';
import { type CommonOptions, example, newCommand } from './common.ts';

interface DoctorOptions extends CommonOptions {
  readonly config?: string;
}

function print(findings: readonly Finding[]): void {
  printTable(
    ['CHECK', 'VERDICT', 'FOUND'],
    findings.map(({ check, verdict, found }) => [check, verdict, found]),
    'nothing was looked at',
  );
  for (const { check, advice } of findings) {
    if (advice !== undefined) {
      printLine(`${check}: ${advice}`);
    }
  }
}

async function doctor(options: DoctorOptions): Promise<void> {
  const findings = await examine(await configurationInForce(options.config));
  if (options.json === true) {
    printJson({ findings });
  } else {
    print(findings);
  }
  if (findings.some(({ verdict }) => verdict === 'fail')) {
    process.exitCode = EXIT.failed;
  }
}

/** `stillblock doctor` */
export function doctorCommand(): Command {
  return newCommand('doctor', 'say what works on this machine, and what to do')
    .option('--config <FILE>', `what to examine it for (default: ${CONFIGURATION_FILE})`)
    .addHelpText(
      'after',
      `
Looks at the kernel, Secure Boot, the module, other filters, and whether what the
configuration says can be done. Changes nothing. Exit code: 1 if anything fails.
${example('stillblock doctor')}`,
    )
    .action(doctor);
}
