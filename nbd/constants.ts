// SPDX-License-Identifier: Apache-2.0
/**
 * The numbers of the NBD protocol, under the specification's own names
 * (`doc/proto.md` of NetworkBlockDevice/nbd, section "Values", with its extension
 * EXTENDED_HEADERS). What this server never sends nor compares with is left out.
 */

/** Opens the greeting: "NBDMAGIC". */
export const NBDMAGIC = 0x4e42444d41474943n;
/** Follows NBDMAGIC in the newstyle greeting and starts every option: "IHAVEOPT". */
export const IHAVEOPT = 0x49484156454f5054n;
/** Starts every option reply. */
export const NBD_OPTION_REPLY_MAGIC = 0x0003e889045565a9n;

export const NBD_FLAG_FIXED_NEWSTYLE = 0x0001;
export const NBD_FLAG_NO_ZEROES = 0x0002;
export const NBD_FLAG_C_FIXED_NEWSTYLE = 0x0001;
export const NBD_FLAG_C_NO_ZEROES = 0x0002;

export const NBD_OPT_EXPORT_NAME = 1;
export const NBD_OPT_ABORT = 2;
export const NBD_OPT_LIST = 3;
export const NBD_OPT_STARTTLS = 5;
export const NBD_OPT_INFO = 6;
export const NBD_OPT_GO = 7;
export const NBD_OPT_STRUCTURED_REPLY = 8;
export const NBD_OPT_LIST_META_CONTEXT = 9;
export const NBD_OPT_SET_META_CONTEXT = 10;
export const NBD_OPT_EXTENDED_HEADERS = 11;

export const NBD_REP_ACK = 1;
export const NBD_REP_SERVER = 2;
export const NBD_REP_INFO = 3;
export const NBD_REP_META_CONTEXT = 4;
export const NBD_REP_ERR_UNSUP = 0x80000001;
export const NBD_REP_ERR_POLICY = 0x80000002;
export const NBD_REP_ERR_INVALID = 0x80000003;
export const NBD_REP_ERR_TLS_REQD = 0x80000005;
export const NBD_REP_ERR_UNKNOWN = 0x80000006;
export const NBD_REP_ERR_TOO_BIG = 0x80000009;
export const NBD_REP_ERR_EXT_HEADER_REQD = 0x8000000a;

export const NBD_INFO_EXPORT = 0;
export const NBD_INFO_NAME = 1;
export const NBD_INFO_DESCRIPTION = 2;
export const NBD_INFO_BLOCK_SIZE = 3;

export const NBD_FLAG_HAS_FLAGS = 0x0001;
export const NBD_FLAG_READ_ONLY = 0x0002;
export const NBD_FLAG_SEND_FLUSH = 0x0004;
export const NBD_FLAG_SEND_FUA = 0x0008;
export const NBD_FLAG_SEND_DF = 0x0080;
export const NBD_FLAG_CAN_MULTI_CONN = 0x0100;
export const NBD_FLAG_BLOCK_STATUS_PAYLOAD = 0x1000;

export const NBD_REQUEST_MAGIC = 0x25609513;
export const NBD_EXTENDED_REQUEST_MAGIC = 0x21e41c71;
export const NBD_SIMPLE_REPLY_MAGIC = 0x67446698;
export const NBD_STRUCTURED_REPLY_MAGIC = 0x668e33ef;
export const NBD_EXTENDED_REPLY_MAGIC = 0x6e8a278c;

export const NBD_CMD_READ = 0;
export const NBD_CMD_WRITE = 1;
export const NBD_CMD_DISC = 2;
export const NBD_CMD_FLUSH = 3;
export const NBD_CMD_TRIM = 4;
export const NBD_CMD_CACHE = 5;
export const NBD_CMD_WRITE_ZEROES = 6;
export const NBD_CMD_BLOCK_STATUS = 7;

export const NBD_CMD_FLAG_FUA = 0x0001;
export const NBD_CMD_FLAG_DF = 0x0004;
export const NBD_CMD_FLAG_REQ_ONE = 0x0008;
export const NBD_CMD_FLAG_PAYLOAD_LEN = 0x0020;

export const NBD_REPLY_FLAG_DONE = 0x0001;
export const NBD_REPLY_TYPE_NONE = 0;
export const NBD_REPLY_TYPE_OFFSET_DATA = 1;
export const NBD_REPLY_TYPE_OFFSET_HOLE = 2;
export const NBD_REPLY_TYPE_BLOCK_STATUS = 5;
export const NBD_REPLY_TYPE_BLOCK_STATUS_EXT = 6;
export const NBD_REPLY_TYPE_ERROR = 0x8001;
export const NBD_REPLY_TYPE_ERROR_OFFSET = 0x8002;

/** Flags of a `base:allocation` extent. */
export const NBD_STATE_HOLE = 0x0001;
export const NBD_STATE_ZERO = 0x0002;
/** The flag of a `qemu:dirty-bitmap:` extent (QEMU, docs/interop/nbd.txt). */
export const NBD_STATE_DIRTY = 0x0001;

/** Longest name, description, query or message, in bytes of UTF-8 (section "Terminology"). */
export const NBD_MAX_STRING_BYTES = 4096;
/** Zero bytes that end the answer to EXPORT_NAME unless both sides agreed on NO_ZEROES. */
export const EXPORT_NAME_ZEROES_BYTES = 124;
/** A DF read up to this length always succeeds (NBD_CMD_READ, NBD_CMD_FLAG_DF). */
export const DF_ALWAYS_BYTES = 65_536;
/**
 * The least unit in which clients take an answer about a range, whatever the minimum
 * block size says: qemu-img copies in sectors and believes the start of each.
 */
export const SECTOR_BYTES = 512;
/** The port that IANA assigned, which a URI need not name. */
export const NBD_DEFAULT_PORT = 10809;

/** The context of holes and zeroes (section "The base:allocation metadata context"). */
export const BASE_ALLOCATION = 'base:allocation';
/** What precedes a checkpoint's name in the context of what changed since. */
export const DIRTY_BITMAP_PREFIX = 'qemu:dirty-bitmap:';
