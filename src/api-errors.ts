// SPDX-License-Identifier: Apache-2.0
/** Errors as the control API carries them. */
import { EXIT, type ExitCode, StillblockError } from './errors.ts';

/** The body of every answer that is an error. */
export interface ErrorAnswer {
  readonly error: {
    readonly code: string;
    readonly message: string;
    readonly advice: string;
    /** What a command that meets it exits with. */
    readonly exitCode: number;
  };
}

/** HTTP status of each code that is not 422, which says: understood, and impossible. */
const STATUS: Readonly<Record<string, number>> = {
  USAGE: 400,
  NOT_FOUND: 404,
  NO_BACKUP: 404,
  NO_CHECKPOINT: 404,
  NOT_ATTACHED: 404,
  ENOENT: 404,
  BACKUP_RUNNING: 409,
  CHECKPOINT_EXISTS: 409,
  ALREADY_ATTACHED: 409,
  IN_SNAPSHOT: 409,
  NAME_TAKEN: 409,
  FULL_REQUIRED: 409,
  EADDRINUSE: 409,
  BUG: 500,
  MODULE_NOT_LOADED: 503,
  MODULE_VERSION: 503,
  TOO_MANY: 503,
  ENOSPC: 507,
};

export function statusOf({ code, exitCode }: StillblockError): number {
  return STATUS[code] ?? (exitCode === EXIT.usage ? 400 : 422);
}

export function answerOf({ code, message, advice, exitCode }: StillblockError): ErrorAnswer {
  return { error: { code, message, advice, exitCode } };
}

/** @returns the error in an answer, or undefined if it is none of ours */
export function errorIn(body: unknown): StillblockError | undefined {
  const { error } = (body ?? {}) as Partial<ErrorAnswer>;
  if (typeof error?.code !== 'string' || typeof error.message !== 'string') {
    return undefined;
  }
  const known = Object.values(EXIT).find((code) => code === error.exitCode);
  const exitCode: ExitCode = known ?? EXIT.failed;
  return new StillblockError(error.code, error.message, error.advice ?? '', { exitCode });
}
