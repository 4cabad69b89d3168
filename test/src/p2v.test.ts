// SPDX-License-Identifier: Apache-2.0
/** The domain XML for virt-v2v, as its `-i libvirtxml` wants it. */
import test from 'ava';
import { diskLetters, formatDomain, libvirtArchitecture } from '../../src/p2v.ts';

test('one disk per port on localhost, nothing but what virt-v2v reads', (t) => {
  const xml = formatDomain({
    ...{ name: 'web1', memoryBytes: 3 * 1024 ** 3, processors: 4, architecture: 'x86_64' },
    ...{ firmware: 'uefi', ports: [40_001, 40_002], macs: ['52:54:00:12:34:56'] },
  });
  t.is(
    xml.trim(),
    `<domain type="physical">
  <name>web1</name>
  <memory unit="KiB">3145728</memory>
  <vcpu>4</vcpu>
  <os firmware="efi">
    <type arch="x86_64">hvm</type>
  </os>
  <features>
    <acpi/>
    <apic/>
  </features>
  <devices>
    <disk type="network" device="disk">
      <driver name="qemu" type="raw"/>
      <source protocol="nbd">
        <host name="localhost" port="40001"/>
      </source>
      <target dev="sda"/>
    </disk>
    <disk type="network" device="disk">
      <driver name="qemu" type="raw"/>
      <source protocol="nbd">
        <host name="localhost" port="40002"/>
      </source>
      <target dev="sdb"/>
    </disk>
    <interface type="network">
      <mac address="52:54:00:12:34:56"/>
      <source network="default"/>
    </interface>
  </devices>
</domain>`,
  );
});

test('a machine with BIOS names no firmware, and text is escaped', (t) => {
  const xml = formatDomain({
    ...{ name: 'a<b&c', memoryBytes: 1, processors: 1, architecture: 'x86_64' },
    ...{ firmware: 'bios', ports: [1], macs: [] },
  });
  t.regex(xml, /<name>a&lt;b&amp;c<\/name>/);
  t.regex(xml, /<os>/);
  t.notRegex(xml, /interface/);
  t.regex(xml, /<memory unit="KiB">1</);
});

test('disks beyond the alphabet, architectures', (t) => {
  t.deepEqual([0, 25, 26, 51, 52, 701, 702].map(diskLetters), [
    ...['a', 'z', 'aa', 'az', 'ba', 'zz', 'aaa'],
  ]);
  t.is(libvirtArchitecture('x64'), 'x86_64');
  t.is(libvirtArchitecture('riscv64'), 'riscv64');
});
