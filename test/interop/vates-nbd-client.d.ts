// SPDX-License-Identifier: Apache-2.0
// What the tests use of Xen Orchestra's client, which brings no types.

declare module '@vates/nbd-client' {
  export class NbdTcpClient {
    constructor(
      settings: { address: string; port: number; exportname: string },
      options?: {
        messageTimeout?: number;
        readBlockRetries?: number;
        waitBeforeReconnect?: number;
      },
    );
    readonly exportSize: bigint;
    connect(): Promise<void>;
    disconnect(): Promise<void>;
    /** Reads block `index` of blocks of `size` bytes; the last may be shorter. */
    readBlock(index: number, size?: number): Promise<Buffer>;
    getMap(): Promise<{ offset: number; length: number; type: number }[]>;
  }
}

declare module '@vates/nbd-client/multi.mjs' {
  interface Settings {
    address: string;
    port: number;
    exportname: string;
  }
  // biome-ignore lint/style/noDefaultExport: it is what the package exports
  export default class MultiNbdClient {
    constructor(settings: Settings[], options: { nbdConcurrency: number; readAhead?: number });
    readonly exportSize: bigint;
    connect(): Promise<void>;
    disconnect(): Promise<void>;
    readBlocks(
      indexes: () => Generator<{ index: number; size: number }>,
    ): AsyncGenerator<Buffer, void>;
  }
}
