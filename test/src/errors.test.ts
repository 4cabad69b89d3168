// SPDX-License-Identifier: Apache-2.0
/** Every failure has its words, on one line. */
import test from 'ava';
import {
  EXIT,
  exitCodeOf,
  explain,
  explainControl,
  HISTORY_WORDS,
  historyWords,
  REASON_WORDS,
  REFUSAL_WORDS,
  reasonWords,
  refusalWords,
} from '../../src/errors.ts';
import { isNativeError, type NativeError, nativeConstants } from '../../src/native.ts';
import { errorLine } from '../../src/output.ts';

function nativeError(fields: Partial<NativeError>): NativeError {
  return Object.assign(new Error('EIO: Input/output error, take'), {
    code: 'EIO',
    errno: -5,
    syscall: 'take',
    reason: 'NONE',
    culprit: 0,
    ...fields,
  });
}

test("each of the module's reasons has words, and no words are left over", (t) => {
  t.deepEqual(Object.keys(REASON_WORDS).sort(), [...nativeConstants().reasons].sort());
});

test('so has each beginning of a history', (t) => {
  t.deepEqual(Object.keys(HISTORY_WORDS).sort(), [...nativeConstants().histories].sort());
  t.not(historyWords('NEWER').message, '');
});

test('words are one line, name the thing, and give advice', (t) => {
  const all = [
    ...Object.keys(REASON_WORDS).map((reason) => reasonWords(reason, '/dev/x')),
    ...Object.keys(REFUSAL_WORDS).map((refusal) => refusalWords(refusal, '/dev/x')),
    ...Object.keys(HISTORY_WORDS).map(historyWords),
  ];
  for (const { message, advice } of all) {
    t.regex(message, /^[^\n{}]+$/);
    t.regex(advice, /^[^\n{}]+$/);
    t.true(message.length + advice.length < 200, message);
  }
});

test('a reason says more than errno, and a refusal more than both', (t) => {
  t.like(explain(nativeError({ reason: 'ZONED' }), '/dev/x'), {
    code: 'ZONED',
    exitCode: EXIT.failed,
  });
  t.is(explain(nativeError({ reason: 'STORE_FULL' }), 'x').exitCode, EXIT.overflow);
  t.is(explain(nativeError({ refusal: 'SHARED' }), 'x').code, 'STORE_SHARED');
  t.like(explain(nativeError({ code: 'EACCES' }), '/x'), { code: 'EACCES' });
  t.regex(explain(nativeError({}), '/x').advice, /dmesg/);
  t.regex(explain(nativeError({ reason: 'UNKNOWN' }), '/x').message, /does not know/);
  const known = explain(nativeError({ reason: 'ZONED' }), '/dev/x');
  t.is(explain(known, 'other'), known, 'what is explained stays as it is');
  t.is(explain('text', '/x').message, '/x: text');
});

test('overflow alone has an exit code of its own', (t) => {
  for (const reason of nativeConstants().reasons) {
    t.is(exitCodeOf(reason), reason === 'STORE_FULL' ? 4 : 1);
  }
});

test('a control device that cannot be opened says why', (t) => {
  const open = (code: string) => explainControl(nativeError({ code }), '/dev/stillblock');
  t.is(
    errorLine(open('ENOENT')),
    'stillblock: the kernel module is not loaded: run modprobe stillblock\n',
  );
  t.is(open('EACCES').code, 'NOT_ROOT');
  t.is(open('EPERM').code, 'NOT_ROOT');
  t.is(open('EIO').code, 'EIO');
});

test("the addon's errors are known by their shape", (t) => {
  t.true(isNativeError(nativeError({})));
  t.false(isNativeError(new Error('x')));
  t.false(isNativeError(Object.assign(new Error('x'), { code: 'EIO', errno: -5 })));
});
