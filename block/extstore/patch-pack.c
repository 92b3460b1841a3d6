/*
 * The payloads of patches: a small write that compresses is one block of the
 * device when it is flushed, with all that goes around it, and not two.
 *
 * Whoever flushes waits for it, so a fast level does, whatever the image's is.
 *
 * Threads: one at a time for each packer.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "patch-internal.h"

#include <errno.h>

#include "util/memory.h"

/* Bytes.  Longer ones take the codec too long, shorter ones cost little. */
#define PACK_MAX (16u << 10)
#define PACK_MIN 1024u
/* It must save so many bytes: what a segment adds to a single patch. */
#define PACK_SAVED_MIN 288u

/*
 * On 4 KiB of which half compresses zstd takes 8 us at this level, 12 us at
 * level 1, and igzip 18 us; what only shorter codes would make shorter stays as
 * it is then.
 */
static const int pack_levels[BALE_CODEC__MAX] = {
    [BALE_CODEC_DEFLATE] = 1,
    [BALE_CODEC_ZSTD] = -1,
};

void bale_patch_packer_destroy(BalePatchPacker *k)
{
    bale_codec_context_free(k->context);
    bale_memory_free(k->buf);
    *k = (BalePatchPacker){ 0 };
}

/* A context of @codec and a buffer, for @len bytes; false: no memory. */
static bool packer_prepare(BalePatchPacker *k, BaleCodec codec, uint32_t len)
{
    if (k->context && k->buf && k->codec == codec &&
        k->buf_len >= len) {
        return true;
    }
    bale_patch_packer_destroy(k);
    k->codec = codec;
    k->context = bale_codec_context_new(codec, pack_levels[codec], len, NULL);
    k->buf = bale_memory_try_alloc(BALE_BLOCK_SIZE, len);
    k->buf_len = len;
    return k->context && k->buf;
}

void bale_patch_pack(BalePatchPacker *k, BaleCodec codec, BaleRecord *r,
                     const uint8_t **payload)
{
    uint32_t len = r->payload_len;
    ssize_t n;

    if (codec == BALE_CODEC_NONE || len < PACK_MIN || len > PACK_MAX ||
        !packer_prepare(k, codec, PACK_MAX)) {
        return;
    }
    n = bale_codec_compress(k->context, k->buf + BALE_PATCH_PACKED_LEN,
                            len - PACK_SAVED_MIN - BALE_PATCH_PACKED_LEN,
                            *payload, len);
    if (n <= 0) {
        return;
    }
    bale_patch_packed_encode(len, k->buf);
    r->codec = codec;
    r->payload_len = BALE_PATCH_PACKED_LEN + n;
    *payload = k->buf;
}

int bale_patch_unpack(BalePatchPacker *k, uint32_t cluster_size,
                      const BaleRecord *r, const uint8_t *payload,
                      const uint8_t **bytes, uint32_t *len)
{
    *len = bale_patch_bytes(r, cluster_size, payload);
    if (*len == 0) {
        return -EIO;
    }
    if (r->codec == BALE_CODEC_NONE) {
        *bytes = payload;
        return 0;
    }
    if (!packer_prepare(k, BALE_CODEC_NONE, cluster_size)) {
        return -ENOMEM;
    }
    *bytes = k->buf;
    return bale_codec_decompress(k->context, r->codec, k->buf, *len,
                                 payload + BALE_PATCH_PACKED_LEN,
                                 r->payload_len - BALE_PATCH_PACKED_LEN);
}
