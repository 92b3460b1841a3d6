/*
 * Codecs: compress and decompress one cluster.
 *
 * A BaleCodecContext holds everything that a codec wants to keep between
 * clusters, so that the data path allocates nothing.  Make one per worker
 * thread.  A context decompresses every codec and compresses with the one
 * codec and level that it was made for.
 *
 * Threads: a context belongs to one thread at a time; different contexts are
 * independent.  The functions without a context are pure.
 *
 * Input is hostile in bale_codec_decompress(): whatever the bytes are, nothing
 * outside src[0, src_len) is read, nothing outside dst[0, dst_len) is written,
 * memory is bounded by the context and time by src_len and dst_len.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef BALE_EXTSTORE_CODEC_H
#define BALE_EXTSTORE_CODEC_H

#include <glib.h>
#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

/* These values are on disk: never change one, never reuse one. */
typedef enum BaleCodec {
    /* The payload is the data. */
    BALE_CODEC_NONE = 0,
    /* One raw deflate stream (RFC 1951) without zlib or gzip framing. */
    BALE_CODEC_DEFLATE = 1,
    /* One zstd frame (RFC 8878) without checksum or dictionary. */
    BALE_CODEC_ZSTD = 2,

    BALE_CODEC__MAX
} BaleCodec;

/* Stands for the default level of whatever codec it is used with. */
#define BALE_CODEC_LEVEL_DEFAULT 0

/* The longest cluster, in bytes, that a context can be made for. */
#define BALE_CODEC_MAX_LEN ((size_t)16 << 20)

typedef struct BaleCodecLevels {
    int min;
    int def;
    int max;
} BaleCodecLevels;

typedef struct BaleCodecContext BaleCodecContext;

/* True when @codec, a number that may come from disk, is one of the enum. */
bool bale_codec_valid(unsigned codec);

/* "none", "deflate" or "zstd"; NULL for a number that is no codec. */
const char *bale_codec_name(BaleCodec codec);

/*
 * Find a codec by name.  "zlib" is accepted for deflate, because qcow2 calls
 * it so.  On error false is returned, *codec is untouched and @errp (may be
 * NULL) names what would have been accepted.
 */
bool bale_codec_from_name(const char *name, BaleCodec *codec, GError **errp);

/* The levels that @codec accepts; all three are 0 for BALE_CODEC_NONE. */
BaleCodecLevels bale_codec_levels(BaleCodec codec);

/*
 * True when @level is BALE_CODEC_LEVEL_DEFAULT or in the range of @codec;
 * else false, and @errp names the range.
 */
bool bale_codec_check_level(BaleCodec codec, int level, GError **errp);

/*
 * Make a context that compresses with @codec at @level.  @max_len is the
 * length in bytes of the longest input to bale_codec_compress() and of the
 * longest output of bale_codec_decompress(), at most BALE_CODEC_MAX_LEN.
 *
 * Memory, allocated here: with clusters of 64 KiB about 1 MiB at the default
 * levels and 10 MiB at the highest; it grows with @max_len from there.
 * Returns NULL with @errp set for a bad argument or when memory is short.
 */
BaleCodecContext *bale_codec_context_new(BaleCodec codec, int level,
                                         size_t max_len, GError **errp);

/* NULL is allowed. */
void bale_codec_context_free(BaleCodecContext *ctx);

G_DEFINE_AUTOPTR_CLEANUP_FUNC(BaleCodecContext, bale_codec_context_free)

/*
 * Compress @src_len bytes (1 to max_len) at @src into at most @dst_len bytes
 * at @dst.  The two may not overlap; no alignment is needed.
 *
 * Returns how many bytes of @dst were used, or 0 when the result does not fit
 * into @dst_len: store the data uncompressed then.  Codec none always returns
 * 0.  -EINVAL for a length out of range, -EIO when the library fails for
 * another reason.  What @dst holds beyond the returned length is undefined.
 *
 * A @dst_len smaller than @src_len is a promise that the caller has no use
 * for a longer result; the smaller it is, the earlier the codec gives up on
 * data that does not compress.
 */
ssize_t bale_codec_compress(BaleCodecContext *ctx, void *dst, size_t dst_len,
                            const void *src, size_t src_len);

/*
 * Decompress @src_len bytes at @src, written by any version of any conforming
 * compressor of @codec, into exactly @dst_len bytes (1 to max_len) at @dst.
 *
 * Returns 0 only when exactly @dst_len bytes came out and all of @src was
 * consumed.  -EIO otherwise, and @dst then holds undefined bytes.  -EINVAL for
 * a @dst_len out of range or a @codec that is none of the enum.
 */
int bale_codec_decompress(BaleCodecContext *ctx, BaleCodec codec, void *dst,
                          size_t dst_len, const void *src, size_t src_len);

#endif
