/*
 * libFuzzer target: the sequential cache driven by the input, with a flat
 * array as oracle and every invariant checked after every operation.
 *
 * The input's first three bytes are the options; each operation takes one
 * byte of kind and up to four bytes of parameters.  Build with
 * clang -fsanitize=fuzzer,address,undefined (see run-fuzz).
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "util/seqcache.h"

#include <stdlib.h>
#include <string.h>

#define SPACE_BYTES 16384
#define MAX_OUTS    4

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

typedef struct Fuzz {
    const uint8_t *data;
    size_t left;
    BaleSeqcache *sc;
    size_t cluster;
    uint8_t newest[SPACE_BYTES];
    uint8_t below[SPACE_BYTES];
    bool cur[SPACE_BYTES];
    bool out[SPACE_BYTES];
    BaleSeqcacheOut *outs[MAX_OUTS];
    uint8_t byte;
} Fuzz;

static void require(bool condition)
{
    if (!condition) {
        abort();
    }
}

static unsigned take(Fuzz *f)
{
    if (f->left == 0) {
        return 0;
    }
    f->left--;
    return *f->data++;
}

static void take_range(Fuzz *f, size_t *offset, size_t *len)
{
    *offset = (take(f) << 8 | take(f)) % SPACE_BYTES;
    *len = (take(f) << 8 | take(f)) % 4096 + 1;
    *len = MIN(*len, SPACE_BYTES - *offset);
}

static void do_write(Fuzz *f)
{
    uint8_t buf[4096];
    size_t offset, len, accepted;

    take_range(f, &offset, &len);
    memset(buf, ++f->byte, len);
    bale_seqcache_write_buf(f->sc, offset, buf, len, take(f), &accepted);
    require(accepted <= len);
    memset(f->newest + offset, f->byte, accepted);
    memset(f->cur + offset, true, accepted);
}

static void do_read(Fuzz *f)
{
    uint8_t buf[4096];
    size_t offset, len, run, i;
    bool cached;

    take_range(f, &offset, &len);
    cached = bale_seqcache_read_buf(f->sc, offset, len, buf, &run);
    for (i = 0; i < len; i++) {
        size_t at = offset + i;

        if ((f->cur[at] || f->out[at]) != cached) {
            break;
        }
        require((cached ? buf[i] : f->below[at]) == f->newest[at]);
    }
    require(run == i);
}

static void do_begin(Fuzz *f, unsigned how)
{
    BaleSeqcacheOut *out;
    size_t start = 0, len, at;
    unsigned slot = take(f) % MAX_OUTS;
    int err;

    if (f->outs[slot]) {
        return;
    }
    out = how == 0   ? bale_seqcache_begin_finished(f->sc, &err)
          : how == 1 ? bale_seqcache_begin_upto(f->sc, take(f), &err)
          : how == 2 ? bale_seqcache_begin_older(f->sc, take(f), &err)
                     : bale_seqcache_begin_at(f->sc, take(f) << 6, &err);
    require(err == 0);
    f->outs[slot] = out;
    if (!out) {
        return;
    }
    at = bale_seqcache_out_offset(out);
    while (bale_seqcache_out_range(out, &start, &len)) {
        require(memcmp(bale_seqcache_out_data(out) + start,
                       f->newest + at + start, len) == 0);
        for (size_t i = at + start; i < at + start + len; i++) {
            require(f->cur[i] && !f->out[i]);
            f->cur[i] = false;
            f->out[i] = true;
        }
        start += len;
    }
    require(!memchr(f->cur + at, true, f->cluster));
}

static void do_done(Fuzz *f, unsigned slot, bool success)
{
    BaleSeqcacheOut *out = f->outs[slot];
    size_t start = 0, len, at;

    if (!out) {
        return;
    }
    f->outs[slot] = NULL;
    at = bale_seqcache_out_offset(out);
    while (success && bale_seqcache_out_range(out, &start, &len)) {
        memcpy(f->below + at + start, bale_seqcache_out_data(out) + start, len);
        start += len;
    }
    bale_seqcache_out_done(f->sc, out, success);
    for (size_t i = at; i < at + f->cluster; i++) {
        f->cur[i] |= f->out[i] && !success;
        f->out[i] = false;
        if (!f->cur[i]) {
            f->newest[i] = f->below[i];
        }
    }
}

static void do_discard(Fuzz *f)
{
    size_t offset, len;

    take_range(f, &offset, &len);
    bale_seqcache_discard(f->sc, offset, len);
    for (size_t i = offset; i < offset + len; i++) {
        f->cur[i] = f->out[i] = false;
        f->newest[i] = f->below[i];
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    Fuzz *f = g_new0(Fuzz, 1);
    BaleSeqcacheOptions o = { 0 };

    f->data = data;
    f->left = size;
    o.cluster_bytes = f->cluster = (size_t)512 << take(f) % 4;
    o.align_bytes = (size_t)1 << take(f) % 13;
    o.max_bytes = o.cluster_bytes * (take(f) % 16);
    o.max_streams = 1 + take(f) % 8;
    f->sc = bale_seqcache_new(&o, NULL);
    require(f->sc != NULL);

    while (f->left > 0) {
        unsigned kind = take(f) % 16;

        switch (kind) {
        case 0:
        case 1:
            do_read(f);
            break;
        case 2:
        case 3:
        case 4:
        case 5:
            do_begin(f, kind - 2);
            break;
        case 6:
            do_done(f, take(f) % MAX_OUTS, false);
            break;
        case 7:
        case 8:
            do_done(f, take(f) % MAX_OUTS, true);
            break;
        case 9:
            do_discard(f);
            break;
        case 10:
            bale_seqcache_retry(f->sc);
            break;
        case 11:
            bale_seqcache_set_limits(f->sc, o.cluster_bytes * (take(f) % 16),
                                     1 + take(f) % 8);
            break;
        default:
            do_write(f);
            break;
        }
        require(bale_seqcache_check(f->sc) == NULL);
    }
    for (unsigned i = 0; i < MAX_OUTS; i++) {
        do_done(f, i, true);
    }
    bale_seqcache_free(f->sc);
    g_free(f);
    return 0;
}
