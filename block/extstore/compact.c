/*
 * Compaction: copy what is live out of a fragmented page, so that the page
 * dies and its space comes back.
 *
 * Any page may be compacted, the one with most garbage first.  Compressed bytes
 * are copied as they are, after their checksum was verified.
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
 * Memory: one segment, at most twice a write buffer, besides the log's own.
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

/* In the background a page is worth it when so many percent are garbage ... */
#define COMPACT_PAGE_GARBAGE 25
/* ... and when so many percent of the store are; on command anything goes. */
#define COMPACT_STORE_GARBAGE 15
#define COMPACT_COMMAND_GARBAGE 5

typedef struct Compact {
    BaleStore *s;
    uint64_t page;
    uint64_t version;
    uint64_t end;
    uint8_t *buf;
    size_t buf_len;
    bool stuck; /* something in the page could not be moved */
} Compact;

/* --- choosing --- */

static uint64_t page_garbage(const BalePage *p)
{
    /* Live bytes are rounded up, and may exceed what is there. */
    return p->end - MIN(p->end, p->live_bytes + p->overhead);
}

/*
 * The page with the largest part of garbage, if that is at least @percent; it
 * is held by counting as its reader.  Only pages opened up to @order count, so
 * that a run ends: it does not compact its own copies.  False: none is worth
 * it.
 */
static bool compact_choose(BaleStore *s, unsigned percent, uint64_t order,
                           uint64_t *page)
{
    uint64_t best = PAGE_NONE, used = 0, garbage = 0;
    double best_part = percent / 100.0;

    pthread_mutex_lock(&s->log_lock);
    for (uint64_t i = 0; i < s->pages->len; i++) {
        BalePage *p = bale_page(s, i);
        double part;

        if (p->state != BALE_PAGE_SEALED || p->bucket == BALE_BUCKET_META ||
            p->end == 0 || p->order > order) {
            continue;
        }
        used += p->end;
        garbage += page_garbage(p);
        part = (double)page_garbage(p) / p->end;
        if (!p->compact_stuck && !p->in_flight && part >= best_part) {
            best = i;
            best_part = part;
        }
    }
    if (percent == COMPACT_PAGE_GARBAGE && !s->space_wanted &&
        garbage * 100 < used * COMPACT_STORE_GARBAGE) {
        best = PAGE_NONE;
    }
    if (best != PAGE_NONE) {
        bale_page(s, best)->readers++;
    }
    pthread_mutex_unlock(&s->log_lock);
    *page = best;
    return best != PAGE_NONE;
}

/* The pages opened so far. */
static uint64_t compact_order(BaleStore *s)
{
    uint64_t order;

    pthread_mutex_lock(&s->log_lock);
    order = s->page_order;
    pthread_mutex_unlock(&s->log_lock);
    return order;
}

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

/* Decode and verify the record at @offset of the segment that is in buf. */
static int compact_record(Compact *c, uint64_t segment, uint64_t offset,
                          uint64_t segment_end, BaleRecord *r,
                          const uint8_t **payload)
{
    uint64_t seed = bale_place(c->s->identity, c->page, c->version, offset);

    return bale_record_verify(r, seed, c->s->cluster_size,
                              c->buf + (offset - segment),
                              segment_end - offset, payload);
}

static int compact_read(Compact *c, uint64_t offset, uint64_t len)
{
    return bale_device_get_sync(c->s->dev,
                                page_address(c->s, c->page) + offset, c->buf,
                                len);
}

/*
 * Move what is live in the segment at @offset; *@next is where the next one
 * begins.  -EIO: the segment cannot be read.
 */
static int compact_segment(Compact *c, uint64_t offset, uint64_t *next)
{
    BaleStore *s = c->s;
    uint64_t end = MIN(offset + BALE_BLOCK_SIZE, c->end);
    const uint8_t *payload;
    BaleSegment segment;
    BaleRecord r;
    int ret;

    ret = compact_read(c, offset, end - offset);
    if (ret == 0) {
        ret = compact_record(c, offset, offset, end, &r, &payload);
    }
    if (ret < 0 || r.type != BALE_RECORD_SEGMENT ||
        bale_segment_decode(&segment, offset, s->page_size, payload,
                            r.payload_len) < 0 ||
        offset + segment.segment_len > c->end ||
        segment.segment_len > c->buf_len) {
        return -EIO;
    }
    *next = offset + segment.segment_len;
    ret = compact_read(c, offset, segment.segment_len);
    stat_add(&s->stats.compact_examined_bytes, segment.segment_len);

    /* Records follow each other: no need for the directory. */
    end = offset + bale_align_up(BALE_RECORD_HEADER_LEN + r.payload_len,
                                 BALE_RECORD_ALIGN);
    for (uint32_t n = 0; ret == 0 && n < segment.records; n++) {
        uint64_t address = page_address(s, c->page) + end;

        if (end >= segment.directory_offset ||
            compact_record(c, offset, end, *next, &r, &payload) < 0) {
            c->stuck = true;
            return -EIO;
        }
        if (r.type == BALE_RECORD_DATA || r.type == BALE_RECORD_ZERO ||
            r.type == BALE_RECORD_DROP || r.type == BALE_RECORD_PATCH) {
            ret = compact_live(c, &r, address, payload);
        }
        end += bale_record_size(&r);
    }
    return ret;
}

/* Let go of the page; without anything live in it, it dies. */
static void compact_release(Compact *c, int ret)
{
    BaleStore *s = c->s;
    BalePage *p;

    pthread_mutex_lock(&s->log_lock);
    p = bale_page(s, c->page);
    p->readers--;
    if (ret == 0 && p->live_bytes == 0) {
        /* What its drop records hid is hidden by their copies. */
        p->tombstone_seq = 0;
        s->stats.compacted_pages++;
    } else if (c->stuck || ret == 0) {
        p->compact_stuck = true;
    }
    bale_page_consider(s, c->page);
    pthread_mutex_unlock(&s->log_lock);
}

/*
 * Compact @page, which the caller has counted itself a reader of.  @go is asked
 * before each segment.
 */
static int compact_page(BaleStore *s, uint64_t page, bool (*go)(void *),
                        void *opaque)
{
    Compact c = { .s = s, .page = page, .buf_len = 2 * s->buffer_size };
    uint64_t offset = BALE_BLOCK_SIZE;
    int ret = 0;

    c.buf = bale_memory_try_alloc(BALE_BLOCK_SIZE, c.buf_len);
    pthread_mutex_lock(&s->log_lock);
    c.version = bale_page(s, page)->version;
    c.end = bale_page(s, page)->end;
    pthread_mutex_unlock(&s->log_lock);
    if (!c.buf) {
        ret = -ENOMEM;
    }
    while (ret == 0 && offset < c.end) {
        if (!go(opaque)) {
            ret = -ECANCELED;
            break;
        }
        ret = compact_segment(&c, offset, &offset);
        if (ret == -EIO && !store_failed(s)) {
            c.stuck = true;
        }
    }
    compact_release(&c, ret);
    bale_memory_free(c.buf);
    return ret;
}

/* --- in the background --- */

static bool background_go(void *opaque)
{
    BaleStore *s = opaque;
    bool go;

    pthread_mutex_lock(&s->log_lock);
    go = !s->maintain_stop && !s->maintain_pauses && !store_failed(s);
    pthread_mutex_unlock(&s->log_lock);
    return go;
}

void bale_compact_background(BaleStore *s)
{
    uint64_t page, order = compact_order(s);
    int ret = 0;

    while (ret == 0 && background_go(s) &&
           compact_choose(s, COMPACT_PAGE_GARBAGE, order, &page)) {
        ret = compact_page(s, page, background_go, s);
        if (ret == -EIO && !store_failed(s)) {
            ret = 0; /* that page is stuck; there are others */
        }
        /* The next flushes, ours or the user's, give the page back. */
        pthread_mutex_lock(&s->log_lock);
        if (s->maintain_release) {
            pthread_mutex_unlock(&s->log_lock);
            bale_maintain_settle(s);
            pthread_mutex_lock(&s->log_lock);
        }
        if (s->space_waiters) {
            ret = -EAGAIN; /* one is enough for now */
        }
        pthread_mutex_unlock(&s->log_lock);
    }
    pthread_mutex_lock(&s->log_lock);
    s->space_wanted = false;
    pthread_mutex_unlock(&s->log_lock);
}

/* --- on command --- */

typedef struct CompactCommand {
    BaleStore *s;
    const BaleCompactOptions *o;
    uint64_t done, total;
    int64_t start_us;
    bool cancelled;
} CompactCommand;

static bool command_go(void *opaque)
{
    CompactCommand *cmd = opaque;
    BaleStore *s = cmd->s;
    uint64_t examined = __atomic_load_n(&s->stats.compact_examined_bytes,
                                        __ATOMIC_RELAXED) - cmd->done;

    if (cmd->o->rate) {
        int64_t due_us = examined * G_USEC_PER_SEC / cmd->o->rate;
        int64_t now_us = g_get_monotonic_time() - cmd->start_us;

        if (due_us > now_us) {
            g_usleep(MIN(due_us - now_us, G_USEC_PER_SEC));
        }
    }
    if (cmd->o->progress &&
        !cmd->o->progress(cmd->o->opaque, MIN(examined, cmd->total),
                          cmd->total)) {
        cmd->cancelled = true;
    }
    return !cmd->cancelled && !store_failed(s);
}

/* Bytes in pages that a command would compact. */
static uint64_t compact_total(BaleStore *s)
{
    uint64_t total = 0;

    pthread_mutex_lock(&s->log_lock);
    for (uint64_t i = 0; i < s->pages->len; i++) {
        BalePage *p = bale_page(s, i);

        if (p->state == BALE_PAGE_SEALED && p->bucket != BALE_BUCKET_META &&
            page_garbage(p) * 100 >= p->end * COMPACT_COMMAND_GARBAGE) {
            total += p->end;
        }
    }
    pthread_mutex_unlock(&s->log_lock);
    return total;
}

bool bale_store_compact(BaleStore *s, const BaleCompactOptions *o,
                        GError **errp)
{
    CompactCommand cmd = { .s = s, .o = o };
    uint64_t page, order;
    int ret;

    ret = s->read_only ? -EROFS : bale_store_flush_sync(s);
    if (ret == 0) {
        /* A session gives dead pages back, also those of earlier ones. */
        ret = bale_store_write_begin(s);
        if (ret == 0) {
            bale_store_write_end(s);
        }
    }
    bale_maintain_pause(s);
    bale_log_seal_page(s, BALE_BUCKET_FRESH);
    cmd.total = compact_total(s);
    cmd.done = s->stats.compact_examined_bytes;
    cmd.start_us = g_get_monotonic_time();
    order = compact_order(s);
    while (ret == 0 &&
           compact_choose(s, COMPACT_COMMAND_GARBAGE, order, &page)) {
        ret = compact_page(s, page, command_go, &cmd);
        if (ret == -EIO && !store_failed(s)) {
            ret = 0;
        }
        if (ret == 0) {
            /* The next page may need the room that this one took. */
            ret = bale_maintain_free(s);
        }
    }
    bale_maintain_resume(s);
    if (ret < 0 && !cmd.cancelled) {
        g_set_error(errp, BALE_STORE_ERROR,
                    ret == -ENOSPC  ? BALE_STORE_ERROR_NO_SPACE
                    : ret == -EROFS ? BALE_STORE_ERROR_READ_ONLY
                                    : BALE_STORE_ERROR_IO,
                    "compacting the store: %s", g_strerror(-ret));
    }
    return ret == 0 || cmd.cancelled;
}
