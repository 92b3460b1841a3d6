/*
 * The log: records are appended to pages through write buffers.
 *
 * Each bucket has an active page and at most one open write buffer, which
 * becomes one segment: one device write that begins and ends on a block.  A
 * buffer is sealed when the next record does not fit or a flush wants it on
 * the device; the next one goes on in the block after it.
 *
 *     open --seal--> sealed --last writer leaves--> submitted
 *          --device store--> stable --device flush--> durable
 *
 * Invariants:
 *
 *  1. durable_id <= stable id <= sealed_id, and none of them ever shrinks;
 *     so the regions of the log end in this order: durable_end <= stable_end
 *     <= sealed_end <= tail (bale_log_assert_regions).
 *  2. A buffer is written to the device exactly once, after it was sealed and
 *     when nobody copies into it any more; a block that was submitted is never
 *     written again.  Whoever brings `copying` to 0, sealing the buffer or by
 *     the last append to it, submits it.
 *  3. A flush request completes after every buffer that was sealed when it was
 *     submitted is stable and a device flush, issued after that, succeeded.
 *  4. A barrier is only written for what a completed device flush covers.
 *  5. Sequence numbers grow in the order of the records in a page, but for
 *     copies; and nobody gets one that is lower than what somebody had before.
 *     While a buffer of fresh data is open they come from its room.
 *
 * A failed device write or flush poisons the store.  Its buffer is kept, so
 * that reads still find what was acknowledged.
 *
 * Threads: any.  Fresh data is appended without a lock as long as the open
 * buffer has room (log-internal.h); appends copy and checksum in parallel.
 * log_lock guards everything else: opening and sealing buffers, the other
 * buckets, the pages.
 *
 * The names and the shape of pages and write buffers follow memcached's
 * extstore, regions and their boundaries follow FASTER's hybrid log.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "store-internal.h"

#include <errno.h>
#include <string.h>

#include "log-internal.h"
#include "util/memory.h"
#include "util/planted.h"

/* Everything in a segment but its records and their directory entries. */
#define SEGMENT_OVERHEAD                                                     \
    (2 * BALE_RECORD_HEADER_LEN + BALE_SEGMENT_PAYLOAD_LEN +                 \
     BALE_BARRIERS_MAX * BALE_BARRIER_LEN)

/* Copies are written in pieces of so many bytes while callers read. */
#define COPY_PIECE (64u << 10)

G_STATIC_ASSERT(WRITE_BUFFERS_MAX <= BALE_ROOM_BUFFERS_MAX);
/* A buffer is twice as long if clusters need it. */
G_STATIC_ASSERT(2 * WRITE_BUFFER_SIZE / BALE_RECORD_ALIGN <
                1u << BALE_ROOM_UNITS_BITS);
G_STATIC_ASSERT(2 * WRITE_BUFFER_SIZE / BALE_RECORD_HEADER_LEN <
                1u << BALE_ROOM_RECORDS_BITS);

/* A segment that is on the device but not yet proven by a flush. */
typedef struct UnprovenEnd {
    uint64_t id;
    uint64_t page;
    uint64_t version;
    uint64_t end;
    uint64_t log_end; /* stable_end with this segment */
} UnprovenEnd;

/* Longer segments are left to the device's own threads, bytes. */
#define IN_PLACE_MAX (64u << 10)

/* This thread is going to wait for a flush that it asks for. */
static _Thread_local bool log_waits;

struct BaleFlushWaiter {
    BaleFlushWaiter *next;
    uint64_t request;
    uint64_t target; /* id that must be stable before the device flush */
    BaleDone *done;
    void *opaque;
};

static void log_stored(BaleDeviceIo *io, int ret);
static void log_flushed(BaleDeviceIo *io, int ret);

/* --- write buffers --- */

/* Of the open buffer of a bucket; it may have less already. */
static BaleRoom open_room(BaleStore *s, int bucket)
{
    return bale_room_decode(__atomic_load_n(&s->room[bucket],
                                            __ATOMIC_ACQUIRE));
}

/* Bytes of @wb that were given out to records. */
static uint32_t buffer_used(BaleStore *s, BaleWriteBuffer *wb)
{
    return s->open[wb->bucket] == wb
               ? wb->limit - open_room(s, wb->bucket).bytes
               : wb->used;
}

/* --- under log_lock: opening, sealing, recycling --- */

static BaleWriteBuffer *buffer_get(BaleStore *s)
{
    BaleWriteBuffer *wb = s->free_buffers;

    if (wb) {
        s->free_buffers = wb->next;
        return wb;
    }
    if (s->buffers->len == WRITE_BUFFERS_MAX) {
        return NULL;
    }
    wb = g_new0(BaleWriteBuffer, 1);
    wb->buf = bale_memory_try_alloc(BALE_BLOCK_SIZE, s->buffer_size);
    if (!wb->buf) {
        g_free(wb);
        return NULL;
    }
    wb->store = s;
    wb->page = PAGE_NONE;
    wb->number = s->buffers->len;
    g_ptr_array_add(s->buffers, wb);
    return wb;
}

/* Back to the free list, if nobody needs the bytes any more. */
static void buffer_recycle(BaleWriteBuffer *wb)
{
    BaleStore *s = wb->store;

    if (wb->pins || wb->id > 0 || wb->failed || wb->len == 0) {
        return;
    }
    g_assert(wb->copying == 0 && wb->live == 0);
    wb->page = PAGE_NONE;
    wb->len = 0;
    wb->next = s->free_buffers;
    s->free_buffers = wb;
    pthread_cond_broadcast(&s->log_cond);
}

/* Where the room in @page ends that may be given out now. */
static uint64_t page_room_end(BaleStore *s, uint64_t page)
{
    return MIN(bale_page(s, page)->allocated, bale_ahead_bound(s, page));
}

/* Begin a segment in @wb at the end of @bucket's active page. */
static void buffer_open(BaleStore *s, BaleWriteBuffer *wb, BaleBucket bucket)
{
    uint64_t page = s->active[bucket];
    BalePage *p = bale_page(s, page);
    BaleRoom room = { .records = 0 };

    wb->page = page;
    wb->version = p->version;
    wb->bucket = bucket;
    wb->offset = p->end;
    wb->segment = p->end == 0 ? BALE_BLOCK_SIZE : 0;
    wb->limit = MIN(s->buffer_size, bale_align_down(page_room_end(s, page),
                                                    BALE_BLOCK_SIZE) - p->end);
    wb->len = 0;
    wb->id = 0;
    wb->pins = 0;
    wb->stable = false;
    wb->seq = s->next_seq;

    wb->barriers = 0;
    while (s->barrier_pages->len && wb->barriers < BALE_BARRIERS_MAX &&
           !BALE_PLANTED(barrier_not_written)) {
        uint64_t n = g_array_index(s->barrier_pages, uint64_t,
                                   s->barrier_pages->len - 1);
        BalePage *q = bale_page(s, n);

        g_array_set_size(s->barrier_pages, s->barrier_pages->len - 1);
        /* The page may have been freed, even used anew, since. */
        if (q->barrier_pending) {
            q->barrier_pending = false;
            q->barrier_page = page + 1;
            wb->barrier[wb->barriers++] =
                (BaleBarrier){ n, q->version, q->proven };
        }
    }
    if (s->barrier_pages->len == 0) {
        bale_page_barriers_appended(s);
    }
    wb->first = wb->segment + bale_align_up(
        BALE_RECORD_HEADER_LEN + bale_segment_payload_len(wb->barriers),
        BALE_RECORD_ALIGN);
    p->in_flight++;
    if (p->end == 0) {
        BalePageHeader h = { bucket, page, p->version, p->first_seq };

        bale_page_header_encode(&h, s->identity, wb->buf);
    }
    s->open[bucket] = wb;
    room.buffer = wb->number;
    room.bytes = wb->limit - wb->first;
    /* From here on others append to it. */
    __atomic_store_n(&s->room[bucket], bale_room_encode(room),
                     __ATOMIC_RELEASE);
}

/* Let the page count what its records in @wb hold of it.  Under log_lock. */
static void buffer_fold(BaleWriteBuffer *wb)
{
    bale_page(wb->store, wb->page)->live_bytes +=
        __atomic_exchange_n(&wb->live, 0, __ATOMIC_RELAXED);
}

void bale_log_fold(BaleStore *s)
{
    for (guint i = 0; i < s->buffers->len; i++) {
        BaleWriteBuffer *wb = g_ptr_array_index(s->buffers, i);

        if (wb->page != PAGE_NONE) {
            buffer_fold(wb);
        }
    }
}

uint64_t bale_log_next_seq(BaleStore *s)
{
    BaleWriteBuffer *wb = s->open[BALE_BUCKET_FRESH];

    return wb ? wb->seq + open_room(s, BALE_BUCKET_FRESH).numbers
              : s->next_seq;
}

static void submit_push(BaleWriteBuffer **list, BaleWriteBuffer *wb)
{
    wb->next = *list;
    *list = wb;
}

static void buffer_seal(BaleStore *s, BaleBucket bucket, bool flush,
                        BaleWriteBuffer **submit);

/* The next sequence number, for who appends under log_lock. */
static uint64_t log_number(BaleStore *s, BaleWriteBuffer **submit)
{
    BaleRoom before;

    if (s->open[BALE_BUCKET_FRESH] && !BALE_PLANTED(numbers_not_shared)) {
        if (bale_room_take(&s->room[BALE_BUCKET_FRESH], 0, 0, 1, &before)) {
            return s->open[BALE_BUCKET_FRESH]->seq + before.numbers;
        }
        buffer_seal(s, BALE_BUCKET_FRESH, false, submit);
    }
    return s->next_seq++;
}

/*
 * Seal @bucket's open buffer, for a @flush or because more does not fit; onto
 * *@submit if it can go to the device.
 */
static void buffer_seal(BaleStore *s, BaleBucket bucket, bool flush,
                        BaleWriteBuffer **submit)
{
    BaleWriteBuffer *wb = s->open[bucket];
    BaleRoom room;
    BalePage *p;

    if (!wb) {
        return;
    }
    /* From here on nobody else reserves anything in it. */
    room = bale_room_decode(__atomic_exchange_n(&s->room[bucket], 0,
                                                __ATOMIC_ACQ_REL));
    s->open[bucket] = NULL;
    if (bucket == BALE_BUCKET_FRESH) {
        s->next_seq = wb->seq + room.numbers;
    }
    wb->records = room.records;
    wb->used = wb->limit - room.bytes;
    wb->len = bale_log_segment_len(wb->used, wb->records);
    wb->last_seq = wb->records ? 0 : log_number(s, submit);
    g_assert(wb->len <= wb->limit);
    wb->id = ++s->sealed_id;
    g_queue_push_tail(&s->in_flight, wb);

    buffer_fold(wb);
    p = bale_page(s, wb->page);
    p->end = wb->offset + wb->len;
    g_assert(p->end <= s->page_size);
    p->overhead += wb->len - wb->used;
    s->stats.segments++;
    s->stats.segment_bytes += wb->len;
    s->stats.padding_bytes += bale_log_segment_padding(wb);
    s->sealed_end += wb->len;
    bale_log_assert_regions(s);
    bale_ahead_sealed(s, wb, flush);
    if (__atomic_add_fetch(&wb->copying, (int32_t)wb->records,
                           __ATOMIC_ACQ_REL) == 0) {
        submit_push(submit, wb);
    }
}

static void page_seal(BaleStore *s, BaleBucket bucket)
{
    uint64_t page = s->active[bucket];

    g_assert(!s->open[bucket]);
    if (page != PAGE_NONE) {
        bale_page(s, page)->state = BALE_PAGE_SEALED;
        s->active[bucket] = PAGE_NONE;
        bale_page_consider(s, page);
        bale_maintain_signal(s, false, true);
    }
}

static uint64_t log_stable_id(BaleStore *s)
{
    BaleWriteBuffer *oldest = g_queue_peek_head(&s->in_flight);

    return oldest ? oldest->id - 1 : s->sealed_id;
}

uint64_t bale_log_tail(BaleStore *s)
{
    uint64_t tail = s->sealed_end;

    for (int b = 0; b < BALE_BUCKETS; b++) {
        if (s->open[b]) {
            tail += buffer_used(s, s->open[b]);
        }
    }
    return tail;
}

void bale_log_assert_regions(BaleStore *s)
{
    g_assert(s->durable_id <= log_stable_id(s));
    g_assert(log_stable_id(s) <= s->sealed_id);
    g_assert(s->durable_end <= s->stable_end);
    g_assert(s->stable_end <= s->sealed_end);
    g_assert(s->sealed_end <= bale_log_tail(s));
}

/* Is it time for a device flush?  Then the caller must issue it. */
static bool flush_due(BaleStore *s)
{
    uint64_t stable = log_stable_id(s);

    if (s->flushing || store_failed(s)) {
        return false;
    }
    for (BaleFlushWaiter *w = s->flush_waiters; w; w = w->next) {
        if (w->target > stable && !BALE_PLANTED(flush_before_write)) {
            break;
        }
        s->flushing = true;
        s->flushing_id = stable;
        s->flushing_request = w->request;
    }
    return s->flushing;
}

/* --- not under log_lock: device calls --- */

/*
 * Bytes to write next of @wb: copies make way for callers that read, unless
 * somebody waits for a flush.  Under log_lock, or before anything was written.
 */
static uint32_t log_piece(BaleStore *s, const BaleWriteBuffer *wb)
{
    uint32_t len = wb->len - wb->asked;

    return wb->bucket == BALE_BUCKET_COMPACTED && bale_compact_gently(s) &&
                   !(wb->asked && s->flush_waiters)
               ? MIN(len, COPY_PIECE)
               : len;
}

static void log_submit(BaleStore *s, BaleWriteBuffer *list)
{
    while (list) {
        BaleWriteBuffer *wb = list;

        list = wb->next;
        bale_log_finish_segment(wb);
        wb->asked = 0;
        wb->io.offset = page_address(s, wb->page) + wb->offset;
        wb->io.buf = wb->buf;
        wb->io.len = wb->asked = log_piece(s, wb);
        wb->io.done = log_stored;
        wb->io.may_block = log_waits && !list && wb->len <= IN_PLACE_MAX;
        s->dev->ops->store(s->dev, &wb->io);
    }
}

static void log_flush_device(BaleStore *s)
{
    stat_add(&s->stats.device_flushes, 1);
    s->flush_io.done = log_flushed;
    /* Only one: those that follow are for others. */
    s->flush_io.may_block = log_waits;
    log_waits = false;
    if (BALE_PLANTED(flush_skipped)) {
        log_flushed(&s->flush_io, 0);
        return;
    }
    s->dev->ops->flush(s->dev, &s->flush_io);
}

/*
 * The store has failed: from here on, and not from a moment later, nothing is
 * acknowledged.  Returns whom to tell, with *@first whether it is news.  Under
 * log_lock.
 */
static BaleFlushWaiter *poison_locked(BaleStore *s, int err, bool *first)
{
    BaleFlushWaiter *waiters = s->flush_waiters;
    int zero = 0;

    if (BALE_PLANTED(poison_forgotten)) {
        zero = -1; /* not equal: nothing is set */
    }
    *first = __atomic_compare_exchange_n(&s->failed, &zero, err, false,
                                         __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
    s->flush_waiters = NULL;
    s->flush_waiters_tail = &s->flush_waiters;
    pthread_cond_broadcast(&s->log_cond);
    return waiters;
}

static void poison_tell(BaleStore *s, BaleFlushWaiter *waiters, bool first,
                        int err, const char *what)
{
    if (first && s->options.failed) {
        g_autofree char *reason = g_strdup_printf("%s failed: %s", what,
                                                  g_strerror(-err));

        s->options.failed(s->options.notify_opaque, reason);
    }
    while (waiters) {
        BaleFlushWaiter *w = waiters;

        waiters = w->next;
        w->done(w->opaque, -EIO);
        g_free(w);
    }
}

void bale_store_poison(BaleStore *s, int err, const char *what)
{
    BaleFlushWaiter *waiters;
    bool first;

    pthread_mutex_lock(&s->log_lock);
    waiters = poison_locked(s, err, &first);
    pthread_mutex_unlock(&s->log_lock);
    poison_tell(s, waiters, first, err, what);
}

/* In order of sealing: stable means everything before, too. */
static void log_retire(BaleStore *s)
{
    BaleWriteBuffer *wb;

    while ((wb = g_queue_peek_head(&s->in_flight)) && wb->stable) {
        UnprovenEnd *u = g_new(UnprovenEnd, 1);

        s->stable_end += wb->len;
        *u = (UnprovenEnd){ wb->id, wb->page, wb->version,
                            wb->offset + wb->len, s->stable_end };
        g_queue_push_tail(&s->unproven, u);
        g_queue_pop_head(&s->in_flight);
        wb->id = 0;
        buffer_recycle(wb);
    }
}

static void log_stored(BaleDeviceIo *io, int ret)
{
    BaleWriteBuffer *wb = (BaleWriteBuffer *)((char *)io -
                                              offsetof(BaleWriteBuffer, io));
    BaleStore *s = wb->store;
    BalePage *p;
    bool flush;

    pthread_mutex_lock(&s->log_lock);
    buffer_fold(wb);
    if (ret < 0 && !BALE_PLANTED(write_error_ignored)) {
        BaleFlushWaiter *waiters;
        bool first;

        waiters = poison_locked(s, ret, &first);
        pthread_mutex_unlock(&s->log_lock);
        poison_tell(s, waiters, first, ret, "writing a segment");
        /* Last: whoever closes or revives the store waits for it. */
        pthread_mutex_lock(&s->log_lock);
        wb->failed = true;
        pthread_cond_broadcast(&s->log_cond);
        pthread_mutex_unlock(&s->log_lock);
        return;
    }
    if (wb->asked < wb->len && !BALE_PLANTED(piece_forgotten)) {
        wb->io.offset += wb->io.len;
        wb->io.buf = wb->buf + wb->asked;
        wb->io.len = log_piece(s, wb);
        wb->asked += wb->io.len;
        pthread_mutex_unlock(&s->log_lock);
        s->dev->ops->store(s->dev, &wb->io);
        return;
    }
    p = bale_page(s, wb->page);
    p->in_flight--;
    bale_page_consider(s, wb->page);

    wb->stable = true;
    log_retire(s);
    flush = flush_due(s);
    pthread_cond_broadcast(&s->log_cond);
    pthread_mutex_unlock(&s->log_lock);
    if (flush) {
        log_flush_device(s);
    }
}

/* Everything up to durable_id is proven: note it for the next segments. */
static void log_prove(BaleStore *s)
{
    UnprovenEnd *u;

    while ((u = g_queue_peek_head(&s->unproven)) && u->id <= s->durable_id) {
        BalePage *p = bale_page(s, u->page);

        s->durable_end = u->log_end;
        if (p->version == u->version && u->end > p->proven) {
            p->proven = u->end;
            if (!p->barrier_pending) {
                p->barrier_pending = true;
                g_array_append_val(s->barrier_pages, u->page);
            }
        }
        g_free(g_queue_pop_head(&s->unproven));
    }
}

static void log_flushed(BaleDeviceIo *io, int ret)
{
    BaleStore *s = (BaleStore *)((char *)io - offsetof(BaleStore, flush_io));
    BaleFlushWaiter *waiters = NULL, **tail = &waiters;
    bool again;

    if (ret < 0 && BALE_PLANTED(flush_retried)) {
        log_flush_device(s);
        return;
    }
    pthread_mutex_lock(&s->log_lock);
    if (ret < 0 && !BALE_PLANTED(flush_error_ignored)) {
        bool first;

        waiters = poison_locked(s, ret, &first);
        pthread_mutex_unlock(&s->log_lock);
        poison_tell(s, waiters, first, ret, "flushing the device");
        /* Not before: another flush in between would seem to succeed. */
        pthread_mutex_lock(&s->log_lock);
        s->flushing = false;
        pthread_cond_broadcast(&s->log_cond);
        pthread_mutex_unlock(&s->log_lock);
        return;
    }
    if (store_failed(s)) {
        /*
         * The store has failed since this one was issued: revive writes again
         * what it seems to prove, and nobody waits for it any more.
         */
        s->flushing = false;
        pthread_cond_broadcast(&s->log_cond);
        pthread_mutex_unlock(&s->log_lock);
        return;
    }
    g_assert(s->flushing && s->flushing_id >= s->durable_id);
    s->flushing = false;
    s->durable_id = s->flushing_id;
    s->flushed_request = s->flushing_request;
    log_prove(s);
    bale_log_assert_regions(s);
    bale_page_flushed(s);
    while (s->flush_waiters && s->flush_waiters->request <=
                                   s->flushed_request) {
        *tail = s->flush_waiters;
        tail = &(*tail)->next;
        s->flush_waiters = s->flush_waiters->next;
    }
    *tail = NULL;
    if (!s->flush_waiters) {
        s->flush_waiters_tail = &s->flush_waiters;
    }
    again = flush_due(s);
    /* Whoever revives the store waits for this, too. */
    pthread_cond_broadcast(&s->log_cond);
    pthread_mutex_unlock(&s->log_lock);

    if (again) {
        log_flush_device(s);
    }
    while (waiters) {
        BaleFlushWaiter *w = waiters;

        waiters = w->next;
        w->done(w->opaque, 0);
        g_free(w);
    }
}

/* --- after a failure; revive.c tells the whole --- */

static bool log_settled(BaleStore *s)
{
    for (GList *l = s->in_flight.head; l; l = l->next) {
        BaleWriteBuffer *wb = l->data;

        if (!wb->stable && !wb->failed) {
            return false;
        }
    }
    return !s->flushing;
}

void bale_log_settle(BaleStore *s)
{
    pthread_mutex_lock(&s->log_lock);
    while (!log_settled(s)) {
        pthread_cond_wait(&s->log_cond, &s->log_lock);
    }
    pthread_mutex_unlock(&s->log_lock);
}

BaleWriteBuffer *bale_log_sealed(BaleStore *s, uint64_t page, uint64_t offset)
{
    BaleWriteBuffer *found = NULL;

    pthread_mutex_lock(&s->log_lock);
    for (GList *l = s->in_flight.head; l && !found; l = l->next) {
        BaleWriteBuffer *wb = l->data;

        if (wb->page == page && wb->offset + wb->segment == offset) {
            found = wb;
        }
    }
    pthread_mutex_unlock(&s->log_lock);
    return found;
}

void bale_log_revived(BaleStore *s)
{
    pthread_mutex_lock(&s->log_lock);
    for (GList *l = s->in_flight.head; l; l = l->next) {
        BaleWriteBuffer *wb = l->data;

        if (wb->failed) {
            wb->failed = false;
            bale_page(s, wb->page)->in_flight--;
        }
        wb->stable = true;
    }
    log_retire(s);
    s->durable_id = s->sealed_id;
    s->flushed_request = s->flush_request;
    s->stats.device_flushes++;
    s->stats.revivals++;
    log_prove(s);
    /* No lock orders this: who sees the store well again may go on. */
    __atomic_store_n(&s->failed, 0, __ATOMIC_RELEASE);
    bale_page_revived(s);
    pthread_cond_broadcast(&s->log_cond);
    pthread_mutex_unlock(&s->log_lock);
}

/* --- the interface --- */

/*
 * Find or make an open buffer of @bucket with room for @size bytes.  Called
 * and returns with log_lock, which is dropped on the way.
 */
static int log_open_buffer(BaleStore *s, BaleBucket bucket, uint32_t size,
                           bool may_wait, BaleWriteBuffer **submit)
{
    uint32_t need = bale_log_segment_len(SEGMENT_OVERHEAD + size, 1);

    for (;;) {
        uint64_t page = s->active[bucket];
        BaleWriteBuffer *wb = s->open[bucket];
        BalePage *p = page == PAGE_NONE ? NULL : bale_page(s, page);
        uint64_t begin = p ? MAX(p->end, BALE_BLOCK_SIZE) : 0;
        int ret;

        if (store_failed(s)) {
            return -EIO;
        }
        if (wb && bale_room_fits(open_room(s, bucket), size)) {
            return 0;
        }
        if (wb) {
            buffer_seal(s, bucket, false, submit);
            continue;
        }
        if (s->preparing[bucket] && may_wait) {
            pthread_cond_wait(&s->log_cond, &s->log_lock);
            continue;
        }
        if (p && (bale_ahead_spoilt(s, page) ? page_room_end(s, page)
                                             : s->page_size) - begin < need) {
            page_seal(s, bucket);
            continue;
        }
        if (p && page_room_end(s, page) >= begin + need) {
            wb = buffer_get(s);
            if (wb) {
                buffer_open(s, wb, bucket);
                continue;
            }
            if (s->buffers->len < WRITE_BUFFERS_MAX &&
                g_queue_is_empty(&s->in_flight)) {
                return -ENOMEM; /* and none will come back */
            }
        }

        /* What follows blocks; what is sealed must not wait for us. */
        if (!may_wait) {
            return -EAGAIN;
        }
        if (*submit) {
            BaleWriteBuffer *list = *submit;

            *submit = NULL;
            pthread_mutex_unlock(&s->log_lock);
            log_submit(s, list);
            pthread_mutex_lock(&s->log_lock);
            continue;
        }
        if (p && p->allocated >= begin + need) {
            s->stats.write_buffers_waits++;
            pthread_cond_wait(&s->log_cond, &s->log_lock);
            continue;
        }
        s->preparing[bucket] = true;
        pthread_mutex_unlock(&s->log_lock);
        ret = bale_page_prepare(s, bucket, need);
        pthread_mutex_lock(&s->log_lock);
        s->preparing[bucket] = false;
        pthread_cond_broadcast(&s->log_cond);
        if (ret < 0) {
            return ret;
        }
    }
}

/*
 * Reserve room for @r, of @size bytes, at *@at of the buffer that is returned,
 * if there is an open one and it has that much.
 */
static BaleWriteBuffer *log_reserve(BaleStore *s, BaleBucket bucket,
                                    BaleRecord *r, uint32_t size, uint32_t *at)
{
    bool number = bucket == BALE_BUCKET_FRESH && r->seq == 0;
    BaleWriteBuffer *wb;
    BaleRoom before;

    if (!bale_room_take(&s->room[bucket], 1, size, number, &before)) {
        return NULL;
    }
    wb = g_ptr_array_index(s->buffers, before.buffer);
    *at = wb->limit - before.bytes;
    if (number) {
        r->seq = wb->seq + before.numbers;
    }
    return wb;
}

/* The same, after a buffer was opened if need be. */
static int log_reserve_locked(BaleStore *s, BaleBucket bucket, BaleRecord *r,
                              uint32_t size, bool may_wait,
                              BaleWriteBuffer **submit, BaleWriteBuffer **wb,
                              uint32_t *at)
{
    BalePage *p;
    int ret;

    do {
        ret = log_open_buffer(s, bucket, size, may_wait, submit);
        if (ret < 0) {
            return ret;
        }
        /* Somebody may have been quicker. */
        *wb = log_reserve(s, bucket, r, size, at);
    } while (!*wb);

    if (r->seq == 0) {
        r->seq = log_number(s, submit);
    }
    p = bale_page(s, (*wb)->page);
    if (r->type == BALE_RECORD_DROP) {
        p->tombstone_seq = MAX(p->tombstone_seq, r->seq);
        p->overhead += size;
    }
    p->first_seq = MIN(p->first_seq, r->seq);
    return 0;
}

static int log_append(BaleStore *s, BaleBucket bucket, BaleRecord *r,
                      const void *payload, uint64_t live, bool may_wait,
                      uint64_t *address)
{
    BaleWriteBuffer *submit = NULL, *wb = NULL;
    uint32_t at, size;
    int ret = 0;

    r->header_len = BALE_RECORD_HEADER_LEN;
    size = bale_record_size(r);
    if (bale_log_segment_len(SEGMENT_OVERHEAD + BALE_BLOCK_SIZE + size, 1) >
        MIN(s->buffer_size, s->page_size)) {
        return -EFBIG;
    }

    /* What only adds to the page needs no lock. */
    if (bucket == BALE_BUCKET_FRESH && r->seq == 0 &&
        r->type != BALE_RECORD_DROP && !store_failed(s)) {
        wb = log_reserve(s, bucket, r, size, &at);
    }
    if (!wb) {
        pthread_mutex_lock(&s->log_lock);
        ret = log_reserve_locked(s, bucket, r, size, may_wait, &submit, &wb,
                                 &at);
        pthread_mutex_unlock(&s->log_lock);
    }
    if (ret < 0) {
        log_submit(s, submit);
        return ret;
    }

    *address = page_address(s, wb->page) + wb->offset + at;
    __atomic_fetch_add(&wb->live, live, __ATOMIC_RELAXED);
    if (r->payload_len) {
        memcpy(wb->buf + at + BALE_RECORD_HEADER_LEN, payload,
               r->payload_len);
    }
    bale_log_put_record(wb, r, at);
    stat_add(&s->stats.records_appended, 1);
    if (__atomic_sub_fetch(&wb->copying, 1, __ATOMIC_ACQ_REL) == 0) {
        submit_push(&submit, wb);
    }
    log_submit(s, submit);
    if (bucket != BALE_BUCKET_META) {
        bale_maintain_appended(s, size, r);
    }
    return 0;
}

int bale_log_append(BaleStore *s, BaleBucket bucket, BaleRecord *r,
                    const void *payload, uint64_t live, uint64_t *address)
{
    return log_append(s, bucket, r, payload, live, true, address);
}

int bale_log_append_now(BaleStore *s, BaleBucket bucket, BaleRecord *r,
                        const void *payload, uint64_t live,
                        uint64_t *address)
{
    return log_append(s, bucket, r, payload, live, false, address);
}

void bale_log_wait_here(bool wait)
{
    log_waits = wait;
}

void bale_log_flush(BaleStore *s, BaleDone *done, void *opaque)
{
    BaleWriteBuffer *submit = NULL;
    BaleFlushWaiter *w;
    bool flush, nothing;

    stat_add(&s->stats.flushes, 1);
    pthread_mutex_lock(&s->log_lock);
    if (store_failed(s)) {
        pthread_mutex_unlock(&s->log_lock);
        done(opaque, -EIO);
        return;
    }
    for (int b = 0; b < BALE_BUCKETS; b++) {
        buffer_seal(s, b, true, &submit);
    }
    nothing = s->sealed_id == s->durable_id && !s->flush_waiters &&
              !s->flushing && !s->dying_pages->len && !s->flush_forced;
    s->flush_request++;
    if (nothing) {
        s->flushed_request = s->flush_request;
        pthread_mutex_unlock(&s->log_lock);
        done(opaque, 0);
        return;
    }
    w = g_new0(BaleFlushWaiter, 1);
    w->request = s->flush_request;
    w->target = s->sealed_id;
    w->done = done;
    w->opaque = opaque;
    *s->flush_waiters_tail = w;
    s->flush_waiters_tail = &w->next;
    flush = flush_due(s);
    pthread_mutex_unlock(&s->log_lock);

    log_submit(s, submit);
    if (flush) {
        log_flush_device(s);
    }
    bale_ahead_write(s);
}

int bale_log_flush_sync(BaleStore *s)
{
    BaleSync sync = BALE_SYNC_INIT;

    bale_log_flush(s, bale_sync_done, &sync);
    return bale_sync_wait(&sync);
}

int bale_log_flush_forced(BaleStore *s)
{
    int ret;

    pthread_mutex_lock(&s->log_lock);
    s->flush_forced++;
    pthread_mutex_unlock(&s->log_lock);
    ret = bale_log_flush_sync(s);
    pthread_mutex_lock(&s->log_lock);
    s->flush_forced--;
    pthread_mutex_unlock(&s->log_lock);
    return ret;
}

/* Would another segment fit into @bucket's page at once?  Under log_lock. */
static bool log_has_room(BaleStore *s, BaleBucket bucket, uint64_t need)
{
    BaleWriteBuffer *wb = s->open[bucket];
    uint64_t page = s->active[bucket], end;

    if (page == PAGE_NONE || s->preparing[bucket]) {
        return false;
    }
    if (wb) {
        end = wb->offset + bale_log_segment_len(buffer_used(s, wb),
                                                open_room(s, bucket).records);
    } else {
        end = MAX(bale_page(s, page)->end, BALE_BLOCK_SIZE);
    }
    return page_room_end(s, page) >= end + need;
}

int bale_log_append_barriers(BaleStore *s)
{
    uint32_t need = bale_log_segment_len(SEGMENT_OVERHEAD, 1);
    BaleWriteBuffer *submit = NULL, *wb;
    guint segments;
    int ret = 0;

    pthread_mutex_lock(&s->log_lock);
    segments = s->barrier_pages->len / BALE_BARRIERS_MAX + 1;
    while (ret == 0 && s->barrier_pages->len && segments-- > 0) {
        /*
         * A page for fresh data may be waited for, by somebody who waits for
         * us; for the others nobody waits.
         */
        wb = NULL;
        if (log_has_room(s, BALE_BUCKET_FRESH, need)) {
            buffer_seal(s, BALE_BUCKET_FRESH, false, &submit);
            /* Others append until it is sealed, so look again. */
            wb = log_has_room(s, BALE_BUCKET_FRESH, need) ? buffer_get(s)
                                                          : NULL;
        }
        if (wb) {
            buffer_open(s, wb, BALE_BUCKET_FRESH);
        } else {
            buffer_seal(s, BALE_BUCKET_COMPACTED, false, &submit);
            ret = log_open_buffer(s, BALE_BUCKET_COMPACTED, 0, true,
                                  &submit);
        }
    }
    if (s->barrier_pages->len == 0) {
        bale_page_barriers_appended(s);
    }
    pthread_mutex_unlock(&s->log_lock);
    log_submit(s, submit);
    return ret;
}

void bale_log_seal(BaleStore *s, BaleBucket bucket)
{
    BaleWriteBuffer *submit = NULL;

    pthread_mutex_lock(&s->log_lock);
    buffer_seal(s, bucket, false, &submit);
    pthread_mutex_unlock(&s->log_lock);
    log_submit(s, submit);
}

void bale_log_seal_page(BaleStore *s, BaleBucket bucket)
{
    BaleWriteBuffer *submit = NULL;

    /*
     * In one step, or a writer opens the next buffer in between; and not
     * while somebody asks the device for more of this page.
     */
    pthread_mutex_lock(&s->log_lock);
    while (s->preparing[bucket]) {
        pthread_cond_wait(&s->log_cond, &s->log_lock);
    }
    buffer_seal(s, bucket, false, &submit);
    page_seal(s, bucket);
    pthread_mutex_unlock(&s->log_lock);
    log_submit(s, submit);
}

/* --- what a checkpoint of a store in use needs --- */

/* Sections do not nest, and end on the thread where they began. */
static _Thread_local unsigned log_phase;
static _Thread_local bool log_inside;

/* One less in @phase; whoever waits for an old one to be empty looks again. */
static void phase_leave(BaleStore *s, unsigned phase)
{
    unsigned left = __atomic_sub_fetch(&s->appending[phase], 1,
                                       __ATOMIC_SEQ_CST);

    if (left == 0 &&
        phase != __atomic_load_n(&s->append_phase, __ATOMIC_SEQ_CST)) {
        pthread_mutex_lock(&s->log_lock);
        pthread_cond_broadcast(&s->log_cond);
        pthread_mutex_unlock(&s->log_lock);
    }
}

void bale_log_enter(BaleStore *s)
{
    unsigned phase = __atomic_load_n(&s->append_phase, __ATOMIC_SEQ_CST);

    for (;;) {
        unsigned now;

        __atomic_add_fetch(&s->appending[phase], 1, __ATOMIC_SEQ_CST);
        /* If a mark was set before we were counted, it is not our phase. */
        now = __atomic_load_n(&s->append_phase, __ATOMIC_SEQ_CST);
        if (now == phase) {
            break;
        }
        phase_leave(s, phase);
        phase = now;
    }
    log_phase = phase;
    log_inside = true;
}

bool bale_log_inside(void)
{
    return log_inside;
}

void bale_log_leave(BaleStore *s)
{
    log_inside = false;
    phase_leave(s, log_phase);
}

bool bale_log_old_phase(BaleStore *s)
{
    return __atomic_load_n(&s->appending[!s->append_phase],
                           __ATOMIC_SEQ_CST) > 0;
}

bool bale_log_mark(BaleStore *s, BalePageEntry *table, uint64_t pages,
                   BaleLogMark *mark)
{
    BaleWriteBuffer *submit = NULL;
    bool ok;

    pthread_mutex_lock(&s->log_lock);
    ok = !bale_log_old_phase(s) && s->pages->len <= pages;
    if (ok) {
        for (int b = 0; b < BALE_BUCKETS; b++) {
            buffer_seal(s, b, false, &submit);
        }
        __atomic_store_n(&s->append_phase, !s->append_phase,
                         __ATOMIC_SEQ_CST);
        mark->next_seq = s->next_seq;
        mark->pages = s->pages->len;
        mark->appended = __atomic_load_n(&s->appended, __ATOMIC_RELAXED);
        for (uint64_t i = 0; i < mark->pages; i++) {
            bale_page_entry(s, i, &table[i]);
        }
    }
    pthread_mutex_unlock(&s->log_lock);
    log_submit(s, submit);
    return ok;
}

const uint8_t *bale_log_pin(BaleStore *s, uint64_t address,
                            BaleWriteBuffer **pinned, size_t *avail)
{
    uint64_t page, offset;

    if (!bale_address_split(s, address, &page, &offset)) {
        return NULL;
    }
    for (guint i = 0; i < s->buffers->len; i++) {
        BaleWriteBuffer *wb = g_ptr_array_index(s->buffers, i);

        uint64_t end = wb->page == page ? wb->offset + buffer_used(s, wb) : 0;

        if (wb->page == page && offset >= wb->offset && offset < end) {
            /* The page must not begin another life while this is read. */
            bale_page(s, page)->readers++;
            wb->pins++;
            *pinned = wb;
            *avail = end - offset;
            return wb->buf + (offset - wb->offset);
        }
    }
    return NULL;
}

void bale_log_unpin(BaleStore *s, BaleWriteBuffer *wb)
{
    pthread_mutex_lock(&s->log_lock);
    g_assert(wb->pins > 0);
    wb->pins--;
    bale_page(s, wb->page)->readers--;
    bale_page_consider(s, wb->page);
    buffer_recycle(wb);
    pthread_mutex_unlock(&s->log_lock);
}

void bale_log_init(BaleStore *s)
{
    pthread_mutex_init(&s->log_lock, NULL);
    pthread_cond_init(&s->log_cond, NULL);
    s->pages = g_array_new(FALSE, TRUE, sizeof(BalePage));
    s->free_pages = g_array_new(FALSE, FALSE, sizeof(uint64_t));
    s->barrier_pages = g_array_new(FALSE, FALSE, sizeof(uint64_t));
    s->dying_pages = g_array_new(FALSE, FALSE, sizeof(uint64_t));
    s->buffers = g_ptr_array_sized_new(WRITE_BUFFERS_MAX);
    g_queue_init(&s->in_flight);
    g_queue_init(&s->unproven);
    s->flush_waiters_tail = &s->flush_waiters;
    pthread_cond_init(&s->maintain_cond, NULL);
    for (int b = 0; b < BALE_BUCKETS; b++) {
        s->active[b] = PAGE_NONE;
    }
    /* The longest record, a cluster or a checkpoint's, must fit. */
    s->buffer_size = s->cluster_size > WRITE_BUFFER_SIZE / 2
                         ? 2 * WRITE_BUFFER_SIZE
                         : WRITE_BUFFER_SIZE;
    s->next_seq = 1;
    bale_ahead_init(s);
}

void bale_log_destroy(BaleStore *s)
{
    bale_ahead_destroy(s);
    for (guint i = 0; i < s->buffers->len; i++) {
        BaleWriteBuffer *wb = g_ptr_array_index(s->buffers, i);

        bale_memory_free(wb->buf);
        g_free(wb);
    }
    g_ptr_array_free(s->buffers, TRUE);
    g_array_free(s->pages, TRUE);
    g_array_free(s->free_pages, TRUE);
    g_array_free(s->barrier_pages, TRUE);
    g_array_free(s->dying_pages, TRUE);
    g_queue_clear(&s->in_flight);
    g_queue_clear_full(&s->unproven, g_free);
    pthread_mutex_destroy(&s->log_lock);
    pthread_cond_destroy(&s->log_cond);
    pthread_cond_destroy(&s->maintain_cond);
}
