/*
 * Compaction: copy what is live out of a fragmented page, so that the page
 * dies and its space comes back.
 *
 * Any page may be compacted; compact-run.c says which one, when, and how fast.
 * Compressed bytes are copied as they are, after their checksum was verified.
 *
 * Invariants:
 *  1. A copy keeps the sequence number of its original, so it never hides a
 *     write that came after the original.
 *  2. The index moves to the copy only if it still points at the original.
 *  3. The original's page dies only after the index has left it, and its header
 *     is marked only when the copies are durable, and barriers for them, too
 *     (page.c, invariants 2 and 3).
 *  4. A drop record is copied as long as a record older than it exists
 *     anywhere; a zero record only if a cluster points at it.
 *  5. A record that does not verify stays where it is, and so does its page.
 *  6. A patch is copied if it counts: the mutable region knows where it is.
 *
 * A page is read in windows, the next one while the records of this one are
 * moved.  Memory: two windows as long as a write buffer, which hold a segment
 * each, 4 MiB, or 8 MiB if clusters need large buffers, besides the log's own;
 * at most two pages are compacted at a time.
 *
 * The idea is memcached extstore's (the page with most garbage first) and
 * FASTER's compaction with lookup (ask the index whether a record is live).
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "store-internal.h"

#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "util/memory.h"
#include "util/planted.h"

/* A window is read in pieces of so many bytes, for others to come between. */
#define WINDOW_PIECE (256u << 10)
/* ... and of so many while callers read. */
#define WINDOW_PIECE_GENTLE (64u << 10)
#define WINDOWS 2

/* Part of a page that was read, or is being read. */
typedef struct Window {
    BaleStore *s;
    uint8_t *buf;
    uint64_t begin, len; /* in the page; len 0: nothing */
    uint64_t got;        /* bytes of it that have been asked for */
    BaleDeviceIo io;
    BaleSync sync;
    bool reading;        /* sync is to be waited for */
} Window;

typedef struct Compact {
    BaleStore *s;
    uint64_t page;
    uint64_t version;
    uint64_t end;
    size_t window_len;
    Window window[WINDOWS];
    bool stuck; /* something in the page could not be moved */
} Compact;

/* --- copying --- */

/* Copy a live data record.  In a session, as the next one. */
static int compact_data(Compact *c, BaleLayer *layer, const BaleRecord *old,
                        uint64_t address, const uint8_t *payload)
{
    BaleStore *s = c->s;
    unsigned size_class = bale_size_class(old->payload_len, s->cluster_size);
    uint64_t value = bale_value(address, size_class), copy;
    BaleRecord r = *old;
    int ret;

    if (bale_layer_find(layer, old->cluster) != value) {
        return 0;
    }
    if (BALE_PLANTED(copy_renumbered)) {
        r.seq = 0; /* the log numbers it */
    }
    ret = bale_log_append(s, BALE_BUCKET_COMPACTED, &r, payload,
                          bale_value_live(value, s->cluster_size), &copy);
    if (ret == 0) {
        bale_layer_index_move(layer, old->cluster, value,
                              bale_value(copy, size_class));
        stat_add(&s->stats.compacted_records, 1);
        stat_add(&s->stats.compacted_bytes, bale_record_size(old));
    }
    return ret;
}

/* Copy a zero or drop record as far as it is still needed. */
static int compact_tombstone(Compact *c, BaleLayer *layer, uint64_t clusters,
                             const BaleRecord *old, uint64_t address)
{
    BaleStore *s = c->s;
    uint64_t value = bale_value(address, 0), copy, pointing = 0;
    uint64_t end = old->cluster + old->count;
    uint64_t live = bale_value_live(value, s->cluster_size);
    BaleRecord r = *old;
    bool older = false;
    int ret = 0;

    end = MIN(end, clusters);
    if (old->type == BALE_RECORD_ZERO) {
        for (uint64_t n = old->cluster; n < end; n++) {
            pointing += bale_layer_find(layer, n) == value;
        }
    }
    if (old->type == BALE_RECORD_DROP) {
        pthread_mutex_lock(&s->log_lock);
        older = bale_page_older_exists(s, c->page, old->seq);
        pthread_mutex_unlock(&s->log_lock);
    }
    if (pointing || older) {
        ret = bale_log_append(s, BALE_BUCKET_COMPACTED, &r, NULL,
                              pointing * live, &copy);
        for (uint64_t n = old->cluster; ret == 0 && pointing && n < end;
             n++) {
            if (bale_layer_find(layer, n) == value) {
                bale_layer_index_move(layer, n, value, bale_value(copy, 0));
                pointing--;
            }
        }
        if (ret == 0 && pointing) {
            /* Overwritten while we looked; nobody points at these. */
            pthread_mutex_lock(&s->log_lock);
            bale_page_live_sub(s, copy, pointing * live);
            pthread_mutex_unlock(&s->log_lock);
        }
    }
    return ret;
}

/* Copy a patch that counts. */
static int compact_patch(Compact *c, const BaleRecord *old, uint64_t address,
                         const uint8_t *payload)
{
    BaleImage *image = bale_image_of_layer(c->s, old->layer);
    BaleRecord r = *old;
    uint64_t copy;
    int ret;

    if (!image || !bale_mutable_patch_live(image->mutable_region,
                                           old->cluster, address)) {
        return 0;
    }
    ret = bale_log_append(c->s, BALE_BUCKET_COMPACTED, &r, payload,
                          bale_patch_live(old->payload_len), &copy);
    if (ret == 0) {
        bale_mutable_patch_move(image->mutable_region, old->cluster, address,
                                old->payload_len, copy);
        stat_add(&c->s->stats.compacted_records, 1);
        stat_add(&c->s->stats.compacted_bytes, bale_record_size(old));
    }
    return ret;
}

/* Copy a record of a layer, if that is still there. */
static int compact_live(Compact *c, const BaleRecord *old, uint64_t address,
                        const uint8_t *payload)
{
    BaleStore *s = c->s;
    BaleLayer *layer;
    uint64_t clusters;
    int ret = bale_store_write_begin(s);

    if (ret < 0) {
        return ret;
    }
    layer = bale_layer_of_record(s, old->layer, &clusters);
    if (layer && old->type == BALE_RECORD_DATA) {
        if (old->cluster < clusters) {
            ret = compact_data(c, layer, old, address, payload);
        }
    } else if (layer && old->type == BALE_RECORD_PATCH) {
        ret = compact_patch(c, old, address, payload);
    } else if (layer) {
        ret = compact_tombstone(c, layer, clusters, old, address);
    }
    bale_store_write_end(s);
    return ret;
}

/* --- reading --- */

static void window_read_piece(Window *w);

static void window_piece_read(BaleDeviceIo *io, int ret)
{
    Window *w = (Window *)((char *)io - offsetof(Window, io));

    if (ret == 0 && w->got < w->len) {
        window_read_piece(w);
    } else {
        bale_sync_done(&w->sync, ret);
    }
}

static void window_read_piece(Window *w)
{
    uint64_t at = w->got;
    uint64_t piece = bale_compact_gently(w->s) ? WINDOW_PIECE_GENTLE
                                               : WINDOW_PIECE;

    w->io.offset += w->io.len;
    w->io.buf = w->buf + at;
    w->io.len = MIN(w->len - at, piece);
    w->io.done = window_piece_read;
    w->got += w->io.len;
    w->s->dev->ops->get(w->s->dev, &w->io);
}

/* Begin to read the page from @offset on. */
static void window_begin(Compact *c, Window *w, uint64_t offset)
{
    w->begin = offset;
    w->len = MIN(c->end - offset, c->window_len);
    w->got = 0;
    if (w->len == 0) {
        return;
    }
    w->sync = (BaleSync)BALE_SYNC_INIT;
    w->reading = true;
    w->io.offset = page_address(c->s, c->page) + offset;
    w->io.len = 0;
    window_read_piece(w);
}

static int window_wait(Window *w)
{
    int ret = w->reading ? bale_sync_wait(&w->sync) : 0;

    w->reading = false;
    return ret;
}

/* Decode and verify the record at @offset of the page, before @limit. */
static int compact_record(Compact *c, const Window *w, uint64_t offset,
                          uint64_t limit, BaleRecord *r,
                          const uint8_t **payload)
{
    uint64_t seed = bale_place(c->s->identity, c->page, c->version, offset);

    return bale_record_verify(r, seed, c->s->cluster_size,
                              w->buf + (offset - w->begin), limit - offset,
                              payload);
}

/*
 * The segment at @offset, with *@first the offset of its first record.
 * -EAGAIN: it does not end in the window; -EIO: it is damaged.
 */
static int compact_find_segment(Compact *c, const Window *w, uint64_t offset,
                                BaleSegment *segment, uint64_t *first)
{
    uint64_t end = w->begin + w->len;
    const uint8_t *payload;
    BaleRecord r;

    if (compact_record(c, w, offset, MIN(offset + BALE_BLOCK_SIZE, end), &r,
                       &payload) < 0 ||
        r.type != BALE_RECORD_SEGMENT ||
        bale_segment_decode(segment, offset, c->s->page_size, payload,
                            r.payload_len) < 0 ||
        offset + segment->segment_len > c->end) {
        return -EIO;
    }
    *first = offset + bale_align_up(BALE_RECORD_HEADER_LEN + r.payload_len,
                                    BALE_RECORD_ALIGN);
    return offset + segment->segment_len > end ? -EAGAIN : 0;
}

/* The first segment that is not all in the window; where it would begin. */
static uint64_t compact_window_end(Compact *c, const Window *w)
{
    uint64_t offset = w->begin, first;
    BaleSegment segment;

    while (offset < w->begin + w->len &&
           compact_find_segment(c, w, offset, &segment, &first) == 0) {
        offset += segment.segment_len;
    }
    return offset;
}

/* Move what is live in the segment at @offset; @first is its first record. */
static int compact_segment(Compact *c, const Window *w, uint64_t offset,
                           const BaleSegment *segment, uint64_t first)
{
    uint64_t limit = offset + segment->segment_len;
    const uint8_t *payload;
    BaleRecord r;
    int ret = 0;

    stat_add(&c->s->stats.compact_examined_bytes, segment->segment_len);
    /* Records follow each other: no need for the directory. */
    for (uint32_t n = 0; ret == 0 && n < segment->records; n++) {
        uint64_t address = page_address(c->s, c->page) + first;

        if (first >= segment->directory_offset ||
            compact_record(c, w, first, limit, &r, &payload) < 0) {
            return -EIO;
        }
        if (r.type == BALE_RECORD_DATA || r.type == BALE_RECORD_ZERO ||
            r.type == BALE_RECORD_DROP || r.type == BALE_RECORD_PATCH) {
            ret = compact_live(c, &r, address, payload);
        }
        first += bale_record_size(&r);
    }
    return ret;
}

/* Move what is live in the segments from the window's begin up to @end. */
static int compact_window(Compact *c, const Window *w, uint64_t end)
{
    uint64_t offset = w->begin, first;
    BaleSegment segment;
    int ret = 0;

    while (ret == 0 && offset < end) {
        ret = compact_find_segment(c, w, offset, &segment, &first);
        if (ret == 0) {
            ret = compact_segment(c, w, offset, &segment, first);
            offset += segment.segment_len;
        }
    }
    return ret;
}

/* --- a page --- */

/* Let go of the page; without anything live in it, it dies. */
static void compact_release(Compact *c, int ret)
{
    BaleStore *s = c->s;
    BalePage *p;

    pthread_mutex_lock(&s->log_lock);
    p = bale_page(s, c->page);
    p->readers--;
    p->compacting = false;
    if (ret == 0 && p->live_bytes == 0) {
        /* What its drop records hid is hidden by their copies. */
        p->tombstone_seq = 0;
        s->stats.compacted_pages++;
    } else if (c->stuck || ret == 0) {
        p->compact_stuck = true;
    }
    bale_page_consider(s, c->page);
    pthread_cond_broadcast(&s->log_cond);
    pthread_mutex_unlock(&s->log_lock);
}

/* All windows, one after the other. */
static int compact_windows(Compact *c, BaleCompactGo *go, void *opaque)
{
    int ret = 0;

    window_begin(c, &c->window[0], BALE_BLOCK_SIZE);
    for (unsigned i = 0; ret == 0; i++) {
        Window *w = &c->window[i % WINDOWS];
        uint64_t next;

        if (w->len == 0) {
            break;
        }
        if (!go(opaque)) {
            return -ECANCELED;
        }
        ret = window_wait(w);
        if (ret == 0) {
            next = compact_window_end(c, w);
            if (next == w->begin) {
                return -EIO; /* not even one segment: damaged */
            }
            window_begin(c, &c->window[(i + 1) % WINDOWS], next);
            ret = compact_window(c, w, next);
        }
    }
    return ret;
}

int bale_compact_page(BaleStore *s, uint64_t page, BaleCompactGo *go,
                      void *opaque)
{
    Compact c = { .s = s, .page = page, .window_len = s->buffer_size };
    int ret = 0;

    for (int i = 0; i < WINDOWS; i++) {
        c.window[i].s = s;
        c.window[i].buf = bale_memory_try_alloc(BALE_BLOCK_SIZE,
                                                c.window_len);
        ret = c.window[i].buf ? ret : -ENOMEM;
    }
    pthread_mutex_lock(&s->log_lock);
    c.version = bale_page(s, page)->version;
    c.end = bale_page(s, page)->end;
    pthread_mutex_unlock(&s->log_lock);
    if (ret == 0) {
        ret = compact_windows(&c, go, opaque);
    }
    for (int i = 0; i < WINDOWS; i++) {
        window_wait(&c.window[i]);
        bale_memory_free(c.window[i].buf);
    }
    c.stuck = ret == -EIO && !store_failed(s);
    compact_release(&c, ret);
    return ret;
}
