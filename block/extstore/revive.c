/*
 * Write again what no flush has proven.
 *
 * After a failed write or flush nobody knows what of the bytes behind the last
 * good flush is on the device: the system may have dropped them, and a later
 * flush that succeeds says nothing about them.  So a flush is never tried
 * again; what it should have made durable is written again first, as a new
 * write that a new flush covers.  That happens when a session begins, for what
 * recovery found behind the barriers, and in bale_store_revive(), for an open
 * store that has failed.
 *
 * Invariants:
 *  1. What is written again is in the place where it was, and the same bytes:
 *     a torn write changes nothing, and no durable block is touched.
 *  2. The bytes come from a write buffer, or from the device if every checksum
 *     of the segment verifies; after an error the device may hold older ones.
 *  3. A store is poisoned until a flush that was issued after all of this has
 *     succeeded.
 *
 * Threads: with session_lock held for writing, so that nobody appends, and the
 * maintenance thread, if there is one, paused.  Memory: one segment.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "store-internal.h"

#include <errno.h>
#include <string.h>

#include "util/memory.h"
#include "util/planted.h"

typedef struct Prover {
    BaleStore *s;
    uint64_t page;
    uint64_t version;
    uint8_t *buf; /* the longest segment */
    size_t buf_len;
} Prover;

/* Verify the record at @at of the @len bytes in buf, which begin at @offset. */
static int prover_record(Prover *v, uint64_t offset, uint64_t at, uint64_t len,
                         BaleRecord *r, const uint8_t **payload)
{
    uint64_t seed = bale_place(v->s->identity, v->page, v->version,
                               offset + at);

    return bale_record_verify(r, seed, v->s->cluster_size, v->buf + at,
                              len - at, payload) < 0
               ? -EIO
               : 0;
}

/* Read the segment at @offset to buf; *@len is its length.  -EIO if any of it
 * does not verify. */
static int prover_read(Prover *v, uint64_t offset, uint64_t end, uint64_t *len)
{
    BaleStore *s = v->s;
    uint64_t address = page_address(s, v->page) + offset;
    const uint8_t *payload;
    BaleSegment segment;
    BaleRecord r;
    uint64_t at;
    int ret;

    ret = bale_device_get_sync(s->dev, address, v->buf, BALE_BLOCK_SIZE);
    if (ret == 0) {
        ret = prover_record(v, offset, 0, BALE_BLOCK_SIZE, &r, &payload);
    }
    if (ret < 0) {
        return ret;
    }
    if (r.type != BALE_RECORD_SEGMENT ||
        bale_segment_decode(&segment, offset, s->page_size, payload,
                            r.payload_len) < 0 ||
        segment.segment_len > MIN(end - offset, v->buf_len)) {
        return -EIO;
    }
    *len = segment.segment_len;
    at = bale_record_size(&r);
    ret = bale_device_get_sync(s->dev, address, v->buf, *len);
    for (uint32_t n = 0; ret == 0 && n < segment.records; n++) {
        ret = at < *len ? prover_record(v, offset, at, *len, &r, &payload)
                        : -EIO;
        at += ret == 0 ? bale_record_size(&r) : 0;
    }
    if (ret == 0) {
        ret = prover_record(v, offset, segment.directory_offset - offset,
                            *len, &r, &payload);
    }
    return ret;
}

static int prover_page(Prover *v, uint64_t proven, uint64_t end)
{
    BaleStore *s = v->s;
    BalePage *p = bale_page(s, v->page);
    BalePageHeader header = { p->bucket, v->page, p->version, p->first_seq,
                              false };
    uint64_t at = proven;
    int ret = 0;

    if (at == 0) {
        /* It may be missing: the page's first write was torn, or failed. */
        bale_page_header_encode(&header, s->identity, v->buf);
        ret = bale_device_store_sync(s->dev, page_address(s, v->page), v->buf,
                                     BALE_BLOCK_SIZE);
        at = BALE_BLOCK_SIZE;
    }
    while (ret == 0 && at < end) {
        const uint8_t *from = v->buf;
        uint64_t len;
        BaleWriteBuffer *wb = bale_log_sealed(s, v->page, at);

        if (wb) {
            from = wb->buf + wb->segment;
            len = wb->len - wb->segment;
        } else {
            ret = prover_read(v, at, end, &len);
        }
        if (ret == 0) {
            ret = bale_device_store_sync(s->dev,
                                         page_address(s, v->page) + at, from,
                                         len);
            at += len;
        }
    }
    return ret;
}

int bale_log_prove_again(BaleStore *s)
{
    BALE_AUTO_MEMORY uint8_t *buf = NULL;
    Prover v = { .s = s, .buf_len = s->buffer_size };
    int ret = 0;

    for (v.page = 0; ret == 0 && v.page < s->pages->len; v.page++) {
        BalePage *p = bale_page(s, v.page);

        /* A page whose header is being marked as freed is proven. */
        if (!p->version || p->proven >= p->end) {
            continue;
        }
        if (!buf) {
            buf = bale_memory_try_alloc(BALE_BLOCK_SIZE, v.buf_len);
            v.buf = buf;
        }
        v.version = p->version;
        ret = buf ? prover_page(&v, p->proven, p->end) : -ENOMEM;
    }
    return ret;
}

static int store_revive_locked(BaleStore *s)
{
    int ret = 0;

    if (!store_failed(s)) {
        return 0;
    }
    bale_log_settle(s);
    if (!BALE_PLANTED(revive_unwritten)) {
        ret = bale_log_prove_again(s);
    }
    if (ret == 0) {
        ret = bale_device_flush_sync(s->dev);
    }
    if (ret == 0) {
        bale_log_revived(s);
    }
    return ret;
}

bool bale_store_revive(BaleStore *s, GError **errp)
{
    bool failed = store_failed(s);
    int ret;

    bale_maintain_pause(s);
    pthread_rwlock_wrlock(&s->session_lock);
    ret = store_revive_locked(s);
    pthread_rwlock_unlock(&s->session_lock);
    bale_maintain_resume(s);
    if (ret < 0) {
        bale_error_set(errp, ret, "writing again what the failed store had "
                                  "not made durable");
        return false;
    }
    if (failed && s->options.revived) {
        s->options.revived(s->options.notify_opaque);
    }
    return true;
}
