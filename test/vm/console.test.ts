// SPDX-License-Identifier: Apache-2.0
import test from 'ava';
import { arrayOnOneDisk, findComplaints, findLeaks, findLeftAreas } from './console.ts';

// One line of each kind of complaint, as kernels print them.
const complaining = [
  '[   12.1] WARNING: CPU: 1 PID: 371 at block/blk-core.c:646 submit_bio_noacct+0x1f/0x4e0',
  '[   12.1] BUG: kernel NULL pointer dereference, address: 0000000000000008',
  '[   12.1] BUG: unable to handle page fault for address: ffffc90000400000',
  '[   12.1] kernel BUG at mm/slub.c:440!',
  '[   12.1] Oops: 0002 [#1] PREEMPT SMP NOPTI',
  '[   12.1] Kernel panic - not syncing: Fatal exception',
  '[   12.1] Unable to handle kernel paging request at virtual address dead000000000108',
  '[   12.1] general protection fault, probably for non-canonical address 0xdead000000000100: 0000 [#1]',
  '[  121.4] INFO: task fio:412 blocked for more than 60 seconds.',
  '[   99.0] watchdog: BUG: soft lockup - CPU#0 stuck for 67s! [kworker/0:1:9]',
  '[   99.0] rcu: INFO: rcu_preempt self-detected stall on CPU',
  '[   99.0] rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:',
  '[   12.1] refcount_t: underflow; use-after-free.',
  '[   12.1] INFO: possible recursive locking detected',
  '[   12.1] WARNING: possible circular locking dependency detected',
  '[   12.1] WARNING: suspicious RCU usage',
  '[   12.1] INFO: inconsistent lock state',
  '[   12.1] BUG: scheduling while atomic: fio/412/0x00000002',
  '[   12.1] BUG: sleeping function called from invalid context at mm/mempool.c:382',
  '[   12.1] BUG: KASAN: use-after-free in hook_callback+0x22/0x90 [stillblock]',
  '[   12.1] BUG: KFENCE: out-of-bounds read in hook_callback+0x22/0x90 [stillblock]',
  '[   12.1] UBSAN: shift-out-of-bounds in module/store.c:12:3',
  '[   12.1] BUG stillblock_chunk (Tainted: G           OE): Objects remaining in stillblock_chunk on __kmem_cache_shutdown()',
  '[   12.1] list_del corruption. prev->next should be ffff888, but was dead000000000122',
  '[   12.1] Buffer I/O error on dev vdb1, logical block 0, async page read',
  '[   12.1] I/O error, dev vdb, sector 2048 op 0x1:(WRITE) flags 0x800 phys_seg 1 prio class 2',
  '[   12.1] critical medium error, dev vdb, sector 2048 op 0x1:(WRITE)',
  '[   12.1] EXT4-fs error (device vdb1): ext4_lookup:1855: inode #2: comm ls: iget: checksum invalid',
  '[   12.1] XFS (dm-0): Metadata corruption detected at xfs_agf_read_verify+0xd7/0x110 [xfs]',
  '[   12.1] Out of memory: Killed process 412 (node) total-vm:1068400kB',
  '[   12.1] stillblock: leak: 3 chunks of disk vdb1',
  '[   12.1] kmemleak: Kernel memory leak detector disabled',
  '[   12.1] kmemleak: Memory pool empty, consider increasing CONFIG_DEBUG_KMEMLEAK_MEM_POOL_SIZE',
];

const ordinary = [
  '[    0.0] Linux version 6.1.0-56-amd64 (debian-kernel@lists.debian.org) (gcc-12 (Debian 12.2.0))',
  '[    0.0] Command line: console=ttyS0 oops=panic panic=-1',
  '[    1.1] mtrr: your CPUs had inconsistent variable MTRR settings',
  '[    1.4] acpi PNP0A03:00: fail to add MMCONFIG information',
  '[    2.7] Unstable clock detected, switching default tracing clock to "global"',
  '[    3.0] kfence: initialized - using 2097152 bytes for 255 objects',
  '[    5.0] EXT4-fs (vdb1): mounted filesystem with ordered data mode. Opts: errors=remount-ro. Quota mode: none.',
  '[    5.0] XFS (dm-0): Ending clean mount',
  '[    5.0] XFS (dm-0): Starting recovery (logdev: internal)',
  '[    6.0] stillblock: loading out-of-tree module taints kernel.',
  '[    6.0] stillblock: module verification failed: signature and/or required key missing - tainting kernel',
  '[   20.4] sysrq: Power Off',
  '[   20.4] reboot: Power down',
  'stillblock-agent: ready',
  'debugging and warnings: 0',
];

for (const line of complaining) {
  test(`sees: ${line}`, (t) => {
    const found = findComplaints(['before', line, 'after'].join('\r\n'));
    t.deepEqual(
      found.map(({ line: number, text }) => ({ number, text })),
      [{ number: 2, text: line }],
    );
    t.regex(found[0]?.context ?? '', /before.*after/s);
  });
}

test('leaves ordinary lines alone', (t) => {
  t.deepEqual(findComplaints(ordinary.join('\n')), []);
});

test('a complaint among ordinary lines is found, with its trace', (t) => {
  const trace = ['[  7.0] Call Trace:', '[  7.0]  hook_callback+0x22/0x90 [stillblock]'];
  const warning = '[  7.0] WARNING: CPU: 0 PID: 1 at fs/buffer.c:1189 mark_buffer_dirty+0x1/0x2';
  const [found, ...others] = findComplaints([...ordinary, warning, ...trace].join('\n'));
  t.deepEqual(others, []);
  t.is(found?.line, ordinary.length + 1);
  t.true(found?.context.endsWith(trace.join('\n')));
});

test('what a test provokes itself is allowed, and nothing beside it', (t) => {
  const provoked = '[  9.0] I/O error, dev vdc, sector 0 op 0x0:(READ)';
  const other = '[  9.0] I/O error, dev vdb, sector 0 op 0x0:(READ)';
  const found = findComplaints(`${provoked}\n${other}`, [/I\/O error, dev vdc,/]);
  t.deepEqual(
    found.map(({ text }) => text),
    [other],
  );
});

// As kmemleak prints them (mm/kmemleak.c): of the kernel's own, of ours, and of ours after
// its unloading, when addresses have no names.
const leaked = (...trace: string[]): string =>
  [
    'unreferenced object 0xffff88800b5a2e00 (size 512):',
    '  comm "stillblock", pid 211, jiffies 4294941234 (age 61.230s)',
    '  hex dump (first 32 bytes):',
    '    00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00  ................',
    '  backtrace:',
    ...trace.map((frame) => `    [<00000000a1b2c3d4>] ${frame}`),
    '',
  ].join('\n');
const ofKernel = leaked('kmalloc_trace+0x22/0x60', 'ext4_mb_init+0x41c/0x9d0');
const ofOurs = leaked('kmalloc_trace+0x22/0x60', 'stb_take+0x1a3/0x680 [stillblock]');
const ofOursUnloaded = leaked('kmalloc_trace+0x22/0x60', '0xffffffffa0003d51');

test('leaks of the module are told from those of the kernel', (t) => {
  t.deepEqual(findLeaks(''), []);
  t.deepEqual(findLeaks(ofKernel), []);
  t.deepEqual(findLeaks(ofKernel + ofOurs + ofKernel + ofOursUnloaded), [ofOurs, ofOursUnloaded]);
});

// As the kernel prints them (mm/vmalloc.c); a module's own code is an area, too.
test('areas that an unloaded module has left are told from all others', (t) => {
  const left =
    '0xffffc90000a41000-0xffffc90000a44000   12288 0xffffffffa0003d51 pages=2 vmalloc N0=2';
  const others = [
    '0xffffc90000000000-0xffffc90000005000   20480 irq_init_percpu_irqstack+0x1c0/0x270 vmap',
    '0xffffc90000a51000-0xffffc90000a54000   12288 stb_cow_init+0x1a1/0x3c0 [stillblock] pages=2 vmalloc N0=2',
    '0xffffffffa0000000-0xffffffffa0009000   36864 load_module+0x1c5b/0x2b40 pages=8 vmalloc N0=8',
    '0xffffe8ffffc00000-0xffffe8ffffe00000 2097152 pcpu_get_vm_areas+0x0/0x17a0 vmalloc',
  ];
  t.deepEqual(findLeftAreas([...others, left, ''].join('\n')), [left]);
});

test("md's advice about an array on one disk is allowed by who provokes it", (t) => {
  const advice =
    '[   31.584118] md1: WARNING: vdh4 appears to be on the same physical disk as vdh3.';
  t.is(findComplaints(advice).length, 1);
  t.deepEqual(findComplaints(advice, [arrayOnOneDisk]), []);
});
