/*
 * Zeroes ahead of the log, for small flushes.
 *
 * The room of a page was reserved, but most file systems must note at the next
 * flush which blocks of it have been written for the first time: a commit of
 * their own log, which takes longer than the write and the flush.  So when one
 * small flush follows the other, zeroes are written into the room that the next
 * ones will take, many blocks at a time, beside them.
 *
 * Only what small flushes have saved is spent on that: each may cost
 * AHEAD_FLUSH_BLOCKS with its share.  Where segments are large, there is none.
 *
 * Invariants:
 *  1. Zeroes are written behind everything that was given out, and nothing is
 *     given out there before they are written: bale_ahead_bound().
 *  2. After an error nobody knows whether the zeroes will not come yet: nothing
 *     is ever given out there, and no more zeroes are written.
 *  3. Nothing relies on the zeroes: they are what the room reads as anyhow, or
 *     stale bytes that no checksum lets pass.
 *
 * Threads: any; everything under log_lock but the device call.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "store-internal.h"

#include "util/memory.h"
#include "util/planted.h"

/* Bytes written at a time, if the options do not say; at first this part. */
#define AHEAD_BYTES (256u << 10)
#define AHEAD_FIRST 8u
/* Before those in another place, so much room for who comes next. */
#define AHEAD_GAP   16u
/* Blocks that a small flush may take, with what it pays for. */
#define AHEAD_FLUSH_BLOCKS 3u

uint64_t bale_ahead_bound(BaleStore *s, uint64_t page)
{
    BaleAhead *a = &s->ahead;

    return a->busy && a->page == page &&
                   a->version == bale_page(s, page)->version &&
                   !BALE_PLANTED(ahead_unbounded)
               ? a->from
               : UINT64_MAX;
}

bool bale_ahead_spoilt(BaleStore *s, uint64_t page)
{
    return s->ahead.failed && bale_ahead_bound(s, page) != UINT64_MAX;
}

/* Under log_lock. */
static void ahead_earn(BaleAhead *a, int64_t bytes)
{
    a->credit = CLAMP(a->credit + bytes, -(int64_t)a->bytes,
                      2 * (int64_t)a->bytes);
}

void bale_ahead_spend(BaleStore *s, uint64_t bytes)
{
    ahead_earn(&s->ahead, -(int64_t)bytes);
}

void bale_ahead_sealed(BaleStore *s, const BaleWriteBuffer *wb, bool flush)
{
    BaleAhead *a = &s->ahead;
    int64_t saved = -(int64_t)wb->len;

    if (wb->bucket == BALE_BUCKET_FRESH) {
        saved += flush ? AHEAD_FLUSH_BLOCKS * BALE_BLOCK_SIZE : 0;
        ahead_earn(a, saved);
        a->step = flush ? a->step : 0;
    }
}

void bale_ahead_settle(BaleStore *s)
{
    BaleAhead *a = &s->ahead;

    while (a->busy && !a->failed) {
        pthread_cond_wait(&s->log_cond, &s->log_lock);
    }
    if (!a->failed) {
        a->page = PAGE_NONE;
    }
    a->credit = 0;
}

static void ahead_stored(BaleDeviceIo *io, int ret)
{
    BaleStore *s = (BaleStore *)((char *)io - offsetof(BaleStore, ahead.io));
    BaleAhead *a = &s->ahead;

    pthread_mutex_lock(&s->log_lock);
    bale_page(s, a->page)->in_flight--;
    bale_page_consider(s, a->page);
    if (ret < 0) {
        a->failed = true;
    } else {
        a->busy = false;
        a->end = a->from + a->len;
    }
    pthread_mutex_unlock(&s->log_lock);
    bale_background_end(s);
}

/* Is it time, and for what?  Under log_lock. */
static bool ahead_due(BaleStore *s)
{
    BaleAhead *a = &s->ahead;
    uint64_t page = s->active[BALE_BUCKET_FRESH];
    uint64_t gap = bale_align_up(a->bytes / AHEAD_GAP, BALE_BLOCK_SIZE), end;
    uint32_t step = bale_align_up(MAX(a->bytes / AHEAD_FIRST, 2 * a->step),
                                  BALE_BLOCK_SIZE);
    BalePage *p;

    step = MIN(step, a->bytes);
    if (a->busy || a->bytes == 0 || a->credit < step || !s->session ||
        store_failed(s) || page == PAGE_NONE || s->open[BALE_BUCKET_FRESH]) {
        return false;
    }
    p = bale_page(s, page);
    if (a->page != page || a->version != p->version) {
        a->page = page;
        a->version = p->version;
        a->end = 0;
    }
    if (a->end > p->end + a->bytes / 2) {
        return false;
    }
    a->from = MAX(a->end, p->end + gap);
    end = MIN(a->from + step,
              bale_align_down(p->allocated, BALE_BLOCK_SIZE));
    if (end <= a->from) {
        return false;
    }
    a->len = end - a->from;
    a->step = step;
    if (!a->zeroes) {
        a->zeroes = bale_memory_try_alloc0(BALE_BLOCK_SIZE, a->bytes);
    }
    return a->zeroes;
}

void bale_ahead_write(BaleStore *s)
{
    BaleAhead *a = &s->ahead;
    bool due;

    pthread_mutex_lock(&s->log_lock);
    due = ahead_due(s);
    if (due) {
        a->busy = true;
        a->credit -= a->step;
        bale_page(s, a->page)->in_flight++;
        s->background++;
        s->stats.ahead_bytes += a->len;
        a->io.offset = page_address(s, a->page) + a->from;
        a->io.buf = a->zeroes;
        a->io.len = a->len;
        a->io.done = ahead_stored;
    }
    pthread_mutex_unlock(&s->log_lock);
    if (due) {
        s->dev->ops->store(s->dev, &a->io);
    }
}

void bale_ahead_init(BaleStore *s)
{
    uint32_t bytes = s->options.ahead_bytes;

    s->ahead.page = PAGE_NONE;
    /* The blocks of a device were not reserved, they are there. */
    if (bytes != BALE_AHEAD_NONE && !s->dev_info.fixed_size) {
        s->ahead.bytes =
            bytes ? bale_align_up(bytes, BALE_BLOCK_SIZE) : AHEAD_BYTES;
    }
}

void bale_ahead_destroy(BaleStore *s)
{
    bale_memory_free(s->ahead.zeroes);
}
