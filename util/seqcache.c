/*
 * Sequential cache: small writes become whole aligned clusters.
 *
 * An Entry stands for one cluster of which any byte is cached.  It has up to
 * two buffers: @cur takes writes, @out is in write-out.  A begin function moves
 * the buffer from @cur to @out, so that nothing is copied and nothing written
 * meanwhile can be lost; only a failed write-out with newer bytes over it
 * copies, to merge the two.
 *
 * Invariants (bale_seqcache_check() checks each):
 *
 *  1. An entry has at least one buffer; it is on the list of all entries, and
 *     is found through the hash table under its cluster number, once.
 *  2. @cur holds at least one byte.  @out may hold none (all discarded).
 *  3. A buffer's number of bytes equals the bits set in its map.
 *  4. An entry with @cur is on exactly one of the lists open, finished and
 *     failed, the one that its state names; an entry without is on none.
 *  5. A complete cluster is never open.
 *  6. At most max_streams clusters are open.
 *  7. The dirty list has every @cur, the out list every @out, nothing else.
 *  8. The dirty list is sorted by the number of a buffer's first write, times
 *     do not decrease along it, and no number exceeds the newest one.
 *  9. In one entry, @out is older than @cur.
 * 10. Buffers in use are counted; there are never more than the bound, unless
 *     the bound was lowered.
 * 11. The byte counts are the sums over the buffers.
 *
 * Threads: none of its own; callers serialise (see the header).  Errors: an
 * allocation whose size the caller chose may fail; nothing has changed then.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "util/seqcache.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "util/bytemap.h"

/* Buffers kept for reuse, so that a steady stream does not go to malloc. */
#define MAX_SPARE_BUFFERS 8

/* Hash buckets: one for each buffer there can be, within these bounds. */
#define MIN_BUCKETS ((size_t)16)
#define MAX_BUCKETS ((size_t)1 << 20)

typedef struct Entry Entry;

/* A buffer; what a user knows as BaleSeqcacheOut while it is in write-out. */
typedef struct BaleSeqcacheOut {
    Entry *entry;       /* NULL: spare */
    uint8_t *data;      /* cluster_bytes, aligned */
    GList link;         /* in dirty or outs, or in spare */
    uint64_t first_seq; /* number of the first write into it */
    int64_t first_time_ns;
    size_t n_valid;     /* bits set in valid */

    /* Set by begin, for the ranges; discards do not change them. */
    uint64_t *pinned;   /* NULL: one range, pinned_start … + pinned_bytes */
    size_t pinned_start;
    size_t pinned_bytes;
    size_t cluster_bytes;

    uint64_t valid[];   /* one bit for each byte */
} Buffer;

typedef enum State {
    STATE_NONE, /* no cur */
    STATE_OPEN,
    STATE_FINISHED,
    STATE_FAILED,
} State;

struct Entry {
    uint64_t index;     /* cluster number */
    Entry *hash_next;
    GList all_link;     /* in all */
    GList state_link;   /* in the list of its state */
    Buffer *cur;
    Buffer *out;
    State state;
    unsigned held;
};

struct BaleSeqcache {
    /* Never changed. */
    size_t cluster_bytes;
    unsigned cluster_bits;
    size_t align_bytes;
    size_t map_words;

    size_t max_buffers;
    unsigned max_streams;

    Entry **buckets;
    size_t n_buckets;   /* power of two */

    GQueue all;         /* Entry by all_link */
    GQueue open;        /* Entry by state_link, least recently written first */
    GQueue finished;    /* … finished first */
    GQueue failed;      /* … failed first */
    GQueue dirty;       /* Buffer by link, by first_seq */
    GQueue outs;        /* Buffer by link, begun first */
    GQueue spare;       /* Buffer by link */

    size_t n_buffers;   /* in use, not counting spare */
    uint64_t dirty_bytes;
    uint64_t out_bytes;
    uint64_t seq;
    int64_t last_time_ns;

    BaleSeqcacheStats stats; /* only the part that counts */
};

/* ------------------------------------------------- buffers and entries */

static void buffer_destroy(Buffer *b)
{
    g_free(b->pinned);
    free(b->data);
    g_free(b);
}

/* A clean buffer, or NULL if memory is short. */
static Buffer *buffer_new(BaleSeqcache *sc)
{
    GList *link = g_queue_pop_head_link(&sc->spare);
    void *data = NULL;
    Buffer *b;

    if (link) {
        b = link->data;
        memset(b->valid, 0, sc->map_words * sizeof(b->valid[0]));
        sc->n_buffers++;
        return b;
    }
    b = g_try_malloc0(sizeof(*b) + sc->map_words * sizeof(b->valid[0]));
    if (!b) {
        return NULL;
    }
    if (posix_memalign(&data, MAX(sc->align_bytes, sizeof(void *)),
                       sc->cluster_bytes) != 0) {
        g_free(b);
        return NULL;
    }
    b->data = data;
    b->cluster_bytes = sc->cluster_bytes;
    b->link.data = b;
    sc->n_buffers++;
    return b;
}

/* @b is on no list. */
static void buffer_release(BaleSeqcache *sc, Buffer *b)
{
    assert(sc->n_buffers > 0);
    sc->n_buffers--;
    g_clear_pointer(&b->pinned, g_free);
    b->entry = NULL;
    b->n_valid = 0;
    if (sc->spare.length < MAX_SPARE_BUFFERS &&
        sc->n_buffers + sc->spare.length < sc->max_buffers) {
        g_queue_push_head_link(&sc->spare, &b->link);
    } else {
        buffer_destroy(b);
    }
}

static size_t bucket_of(const BaleSeqcache *sc, uint64_t index)
{
    /* Fibonacci hashing: consecutive and strided numbers both spread. */
    return (index * UINT64_C(0x9e3779b97f4a7c15) >> 32) & (sc->n_buckets - 1);
}

static Entry *entry_find(const BaleSeqcache *sc, uint64_t index)
{
    Entry *e = sc->buckets[bucket_of(sc, index)];

    while (e && e->index != index) {
        e = e->hash_next;
    }
    return e;
}

static Entry *entry_new(BaleSeqcache *sc, uint64_t index)
{
    Entry *e = g_try_new0(Entry, 1);
    size_t bucket = bucket_of(sc, index);

    if (!e) {
        return NULL;
    }
    e->index = index;
    e->all_link.data = e;
    e->state_link.data = e;
    e->hash_next = sc->buckets[bucket];
    sc->buckets[bucket] = e;
    g_queue_push_tail_link(&sc->all, &e->all_link);
    return e;
}

/* Forget the entry if nothing of it is left. */
static void entry_drop_if_empty(BaleSeqcache *sc, Entry *e)
{
    Entry **p = &sc->buckets[bucket_of(sc, e->index)];

    if (e->cur || e->out) {
        return;
    }
    while (*p != e) {
        p = &(*p)->hash_next;
    }
    *p = e->hash_next;
    g_queue_unlink(&sc->all, &e->all_link);
    g_free(e);
}

static GQueue *state_queue(BaleSeqcache *sc, State state)
{
    switch (state) {
    case STATE_OPEN:
        return &sc->open;
    case STATE_FINISHED:
        return &sc->finished;
    case STATE_FAILED:
        return &sc->failed;
    case STATE_NONE:
        break;
    }
    return NULL;
}

/* Move the entry to the end of the list of @state. */
static void entry_set_state(BaleSeqcache *sc, Entry *e, State state)
{
    GQueue *from = state_queue(sc, e->state);
    GQueue *to = state_queue(sc, state);

    if (from) {
        g_queue_unlink(from, &e->state_link);
    }
    if (to) {
        g_queue_push_tail_link(to, &e->state_link);
    }
    e->state = state;
}

/* Finish the least recently written clusters beyond max_streams. */
static void displace_streams(BaleSeqcache *sc)
{
    while (sc->open.length > sc->max_streams) {
        entry_set_state(sc, sc->open.head->data, STATE_FINISHED);
        sc->stats.displaced++;
    }
}

/* Take @e's cur away from every list; the caller has the buffer. */
static Buffer *entry_steal_cur(BaleSeqcache *sc, Entry *e)
{
    Buffer *b = e->cur;

    g_queue_unlink(&sc->dirty, &b->link);
    sc->dirty_bytes -= b->n_valid;
    entry_set_state(sc, e, STATE_NONE);
    e->cur = NULL;
    return b;
}

/* ---------------------------------------------------------- life */

static bool is_power_of_two(size_t n)
{
    return n != 0 && (n & (n - 1)) == 0;
}

static size_t buffers_for(const BaleSeqcache *sc, uint64_t max_bytes)
{
    return MAX(max_bytes >> sc->cluster_bits, 2);
}

BaleSeqcache *bale_seqcache_new(const BaleSeqcacheOptions *options,
                                GError **error)
{
    BaleSeqcache *sc;

    if (!is_power_of_two(options->cluster_bytes) ||
        options->cluster_bytes < BALE_SEQCACHE_MIN_CLUSTER_BYTES ||
        options->cluster_bytes > BALE_SEQCACHE_MAX_CLUSTER_BYTES) {
        g_set_error(error, G_FILE_ERROR, G_FILE_ERROR_INVAL,
                    "The cluster size must be a power of two from %zu to %zu",
                    BALE_SEQCACHE_MIN_CLUSTER_BYTES,
                    BALE_SEQCACHE_MAX_CLUSTER_BYTES);
        return NULL;
    }
    if (!is_power_of_two(options->align_bytes) ||
        options->align_bytes > BALE_SEQCACHE_MAX_ALIGN_BYTES) {
        g_set_error(error, G_FILE_ERROR, G_FILE_ERROR_INVAL,
                    "The alignment must be a power of two up to %zu",
                    BALE_SEQCACHE_MAX_ALIGN_BYTES);
        return NULL;
    }
    if (options->max_bytes > BALE_SEQCACHE_MAX_BYTES) {
        g_set_error(error, G_FILE_ERROR, G_FILE_ERROR_INVAL,
                    "The cache size must be at most %" G_GUINT64_FORMAT,
                    BALE_SEQCACHE_MAX_BYTES);
        return NULL;
    }
    if (options->max_streams < 1 ||
        options->max_streams > BALE_SEQCACHE_MAX_STREAMS) {
        g_set_error(error, G_FILE_ERROR, G_FILE_ERROR_INVAL,
                    "The number of streams must be from 1 to %u",
                    BALE_SEQCACHE_MAX_STREAMS);
        return NULL;
    }

    sc = g_new0(BaleSeqcache, 1);
    sc->cluster_bytes = options->cluster_bytes;
    sc->cluster_bits = __builtin_ctzll(options->cluster_bytes);
    sc->align_bytes = options->align_bytes;
    sc->map_words = sc->cluster_bytes / 64;
    sc->max_buffers = buffers_for(sc, options->max_bytes);
    sc->max_streams = options->max_streams;
    sc->last_time_ns = INT64_MIN;
    sc->n_buckets = MIN_BUCKETS;
    while (sc->n_buckets < sc->max_buffers && sc->n_buckets < MAX_BUCKETS) {
        sc->n_buckets *= 2;
    }
    sc->buckets = g_try_new0(Entry *, sc->n_buckets);
    if (!sc->buckets) {
        g_set_error(error, G_FILE_ERROR, G_FILE_ERROR_NOMEM,
                    "Not enough memory for a cache of %zu clusters",
                    sc->max_buffers);
        g_free(sc);
        return NULL;
    }
    return sc;
}

void bale_seqcache_free(BaleSeqcache *sc)
{
    GList *link;

    if (!sc) {
        return;
    }
    assert(sc->outs.length == 0);
    bale_seqcache_discard_all(sc);
    assert(sc->all.length == 0 && sc->n_buffers == 0);
    while ((link = g_queue_pop_head_link(&sc->spare))) {
        buffer_destroy(link->data);
    }
    g_free(sc->buckets);
    g_free(sc);
}

void bale_seqcache_set_limits(BaleSeqcache *sc, uint64_t max_bytes,
                              unsigned max_streams)
{
    GList *link;

    assert(max_streams >= 1 && max_streams <= BALE_SEQCACHE_MAX_STREAMS);
    assert(max_bytes <= BALE_SEQCACHE_MAX_BYTES);
    sc->max_buffers = buffers_for(sc, max_bytes);
    sc->max_streams = max_streams;
    displace_streams(sc);
    while (sc->spare.length > 0 &&
           sc->n_buffers + sc->spare.length > sc->max_buffers) {
        link = g_queue_pop_head_link(&sc->spare);
        buffer_destroy(link->data);
    }
}

size_t bale_seqcache_cluster_bytes(const BaleSeqcache *sc)
{
    return sc->cluster_bytes;
}

/* -------------------------------------------------------- data in, out */

/* A place in a vector.  Once past the end it must not be advanced. */
typedef struct Cursor {
    const struct iovec *iov;
    int niov;
    size_t pos; /* in iov[0] */
} Cursor;

static void cursor_skip(Cursor *c, size_t n)
{
    while (c->niov > 0 && n >= c->iov->iov_len - c->pos) {
        n -= c->iov->iov_len - c->pos;
        c->iov++;
        c->niov--;
        c->pos = 0;
    }
    assert(n == 0 || c->niov > 0);
    c->pos += n;
}

/* Copy @n bytes between @buf and the vector, and advance. */
static void cursor_copy(Cursor *c, uint8_t *buf, size_t n, bool to_vector)
{
    while (n > 0) {
        size_t part;

        assert(c->niov > 0);
        part = MIN(n, c->iov->iov_len - c->pos);
        /* An empty element may have no address, which memcpy must not see. */
        if (part > 0) {
            uint8_t *at = (uint8_t *)c->iov->iov_base + c->pos;

            if (to_vector) {
                memcpy(at, buf, part);
            } else {
                memcpy(buf, at, part);
            }
        }
        buf += part;
        n -= part;
        cursor_skip(c, part);
    }
}

/* Give @e, or a new entry for @index, an empty cur. */
static int entry_start_cur(BaleSeqcache *sc, Entry **pe, uint64_t index)
{
    Buffer *b;

    if (sc->n_buffers >= sc->max_buffers) {
        return -EAGAIN;
    }
    b = buffer_new(sc);
    if (!b) {
        return -ENOMEM;
    }
    if (!*pe) {
        *pe = entry_new(sc, index);
        if (!*pe) {
            buffer_release(sc, b);
            return -ENOMEM;
        }
    }
    b->entry = *pe;
    b->first_seq = sc->seq;
    b->first_time_ns = sc->last_time_ns;
    g_queue_push_tail_link(&sc->dirty, &b->link);
    (*pe)->cur = b;
    return 0;
}

/* Write @n bytes at @pos of cluster @index; the cursor advances. */
static int write_piece(BaleSeqcache *sc, uint64_t index, size_t pos, size_t n,
                       Cursor *c)
{
    Entry *e = entry_find(sc, index);
    size_t added;
    int ret;

    if (e && e->cur) {
        sc->stats.merges++;
    } else {
        ret = entry_start_cur(sc, &e, index);
        if (ret < 0) {
            return ret;
        }
    }
    cursor_copy(c, e->cur->data + pos, n, false);
    added = bale_bytemap_set(e->cur->valid, pos, pos + n);
    e->cur->n_valid += added;
    sc->dirty_bytes += added;
    sc->stats.overwritten_bytes += n - added;

    if (e->cur->n_valid == sc->cluster_bytes) {
        if (e->state != STATE_FINISHED && e->state != STATE_FAILED) {
            entry_set_state(sc, e, STATE_FINISHED);
        }
    } else if (e->state != STATE_FAILED) {
        entry_set_state(sc, e, STATE_OPEN);
        displace_streams(sc);
    }
    return 0;
}

int bale_seqcache_write(BaleSeqcache *sc, uint64_t offset,
                        const struct iovec *iov, int niov, size_t skip,
                        size_t len, int64_t now_ns, size_t *accepted)
{
    Cursor c = { .iov = iov, .niov = niov };
    uint64_t old_seq = sc->seq;
    size_t done = 0;
    int ret = 0;

    *accepted = 0;
    if (offset > BALE_SEQCACHE_MAX_OFFSET ||
        len > BALE_SEQCACHE_MAX_OFFSET - offset) {
        return -EINVAL;
    }
    if (len == 0) {
        return 0;
    }
    cursor_skip(&c, skip);
    sc->last_time_ns = MAX(sc->last_time_ns, now_ns);
    sc->seq++;
    while (done < len) {
        uint64_t at = offset + done;
        size_t pos = at & (sc->cluster_bytes - 1);
        size_t n = MIN(len - done, sc->cluster_bytes - pos);

        ret = write_piece(sc, at >> sc->cluster_bits, pos, n, &c);
        if (ret < 0) {
            break;
        }
        done += n;
    }
    if (done > 0) {
        sc->stats.writes++;
        sc->stats.write_bytes += done;
    } else {
        sc->seq = old_seq;
    }
    sc->stats.full += ret == -EAGAIN;
    sc->stats.no_memory += ret == -ENOMEM;
    *accepted = done;
    return ret;
}

int bale_seqcache_write_buf(BaleSeqcache *sc, uint64_t offset, const void *buf,
                            size_t len, int64_t now_ns, size_t *accepted)
{
    struct iovec iov = { .iov_base = (void *)buf, .iov_len = len };

    return bale_seqcache_write(sc, offset, &iov, 1, 0, len, now_ns, accepted);
}

/*
 * The run at @pos of an entry, up to @to: where it ends, and the buffer that
 * it is in, or NULL if it is a gap.
 */
static size_t entry_run(const Entry *e, size_t pos, size_t to, Buffer **from)
{
    Buffer *cur = e->cur, *out = e->out;
    size_t cluster_bytes = (cur ?: out)->cluster_bytes;
    size_t end = to;

    *from = NULL;
    if (cur) {
        if (cur->n_valid == cluster_bytes) {
            *from = cur;
            return to;
        }
        if (bale_bytemap_test(cur->valid, pos)) {
            *from = cur;
            return bale_bytemap_find(cur->valid, pos, to, false);
        }
        end = bale_bytemap_find(cur->valid, pos, to, true);
    }
    if (out) {
        if (bale_bytemap_test(out->valid, pos)) {
            *from = out;
            return bale_bytemap_find(out->valid, pos, end, false);
        }
        end = bale_bytemap_find(out->valid, pos, end, true);
    }
    return end;
}

/* The number of the first entry in [@from, @to), or @to. */
static uint64_t next_entry_index(const BaleSeqcache *sc, uint64_t from,
                                 uint64_t to)
{
    if (to - from <= sc->all.length) {
        for (uint64_t i = from; i < to; i++) {
            if (entry_find(sc, i)) {
                return i;
            }
        }
        return to;
    }
    for (GList *l = sc->all.head; l; l = l->next) {
        uint64_t index = ((Entry *)l->data)->index;

        if (index >= from && index < to) {
            to = index;
        }
    }
    return to;
}

/* Both of read (with a cursor) and lookup (without). */
static bool run_at(const BaleSeqcache *sc, uint64_t offset, uint64_t len,
                   Cursor *c, uint64_t *run)
{
    uint64_t mask = sc->cluster_bytes - 1;
    uint64_t at = offset, end;
    bool cached = false;

    assert(len > 0);
    end = len > UINT64_MAX - offset ? UINT64_MAX : offset + len;
    while (at < end) {
        Entry *e = entry_find(sc, at >> sc->cluster_bits);
        size_t pos = at & mask, stop;
        Buffer *b = NULL;

        if (e) {
            stop = MIN(end - (at - pos), sc->cluster_bytes);
            stop = entry_run(e, pos, stop, &b);
        } else if (at != offset && cached) {
            break;
        } else {
            /* Skip whole clusters of nothing at once. */
            uint64_t last = (end - 1) >> sc->cluster_bits;
            uint64_t next = next_entry_index(sc, (at >> sc->cluster_bits) + 1,
                                             last + 1);

            at = next > last ? end : next << sc->cluster_bits;
            continue;
        }
        if (at == offset) {
            cached = b != NULL;
        } else if (cached != (b != NULL)) {
            break;
        }
        if (b && c) {
            cursor_copy(c, b->data + pos, stop - pos, true);
        }
        at += stop - pos;
    }
    *run = at - offset;
    return cached;
}

bool bale_seqcache_read(BaleSeqcache *sc, uint64_t offset, size_t len,
                        const struct iovec *iov, int niov, size_t skip,
                        size_t *run)
{
    Cursor c = { .iov = iov, .niov = niov };
    uint64_t run64;
    bool cached;

    if (sc->all.length == 0) {
        *run = len;
        return false;
    }
    cursor_skip(&c, skip);
    cached = run_at(sc, offset, len, &c, &run64);
    *run = run64;
    if (cached) {
        sc->stats.read_hits++;
        sc->stats.read_hit_bytes += run64;
    }
    return cached;
}

bool bale_seqcache_read_buf(BaleSeqcache *sc, uint64_t offset, size_t len,
                            void *buf, size_t *run)
{
    struct iovec iov = { .iov_base = buf, .iov_len = len };

    return bale_seqcache_read(sc, offset, len, &iov, 1, 0, run);
}

bool bale_seqcache_lookup(const BaleSeqcache *sc, uint64_t offset, uint64_t len,
                          uint64_t *run)
{
    return run_at(sc, offset, len, NULL, run);
}

/* ------------------------------------------------------------ write-out */

/* Can @e's cur be handed out? */
static bool entry_is_ready(const Entry *e)
{
    return e->cur && !e->out && !e->held;
}

/* Remember which bytes are handed out; they stay so if some are discarded. */
static int buffer_pin(BaleSeqcache *sc, Buffer *b)
{
    size_t end;

    b->pinned_bytes = b->n_valid;
    b->pinned_start = bale_bytemap_find(b->valid, 0, sc->cluster_bytes, true);
    end = bale_bytemap_find(b->valid, b->pinned_start, sc->cluster_bytes,
                            false);
    if (end - b->pinned_start == b->n_valid) {
        return 0;
    }
    b->pinned = g_try_new(uint64_t, sc->map_words);
    if (!b->pinned) {
        sc->stats.no_memory++;
        return -ENOMEM;
    }
    memcpy(b->pinned, b->valid, sc->map_words * sizeof(b->valid[0]));
    return 0;
}

static BaleSeqcacheOut *entry_begin(BaleSeqcache *sc, Entry *e, int *err)
{
    Buffer *b = e->cur;

    *err = buffer_pin(sc, b);
    if (*err < 0) {
        return NULL;
    }
    entry_steal_cur(sc, e);
    e->out = b;
    g_queue_push_tail_link(&sc->outs, &b->link);
    sc->out_bytes += b->n_valid;
    sc->stats.outs++;
    sc->stats.outs_whole += b->n_valid == sc->cluster_bytes;
    return b;
}

/* The ready cluster that has been finished for longest, or NULL. */
static Entry *first_finished(const BaleSeqcache *sc)
{
    for (GList *l = sc->finished.head; l; l = l->next) {
        if (entry_is_ready(l->data)) {
            return l->data;
        }
    }
    return NULL;
}

BaleSeqcacheOut *bale_seqcache_begin_finished(BaleSeqcache *sc, int *err)
{
    Entry *e = first_finished(sc);

    *err = 0;
    return e ? entry_begin(sc, e, err) : NULL;
}

unsigned bale_seqcache_list_finished(const BaleSeqcache *sc,
                                     uint64_t *offsets, unsigned max)
{
    unsigned n = 0;

    for (GList *l = sc->finished.head; l && n < max; l = l->next) {
        Entry *e = l->data;

        if (entry_is_ready(e)) {
            offsets[n++] = e->index << sc->cluster_bits;
        }
    }
    return n;
}

bool bale_seqcache_peek_finished(const BaleSeqcache *sc, uint64_t *offset,
                                 size_t *bytes)
{
    Entry *e = first_finished(sc);

    *offset = e ? e->index << sc->cluster_bits : 0;
    *bytes = e ? e->cur->n_valid : 0;
    return e;
}

/* The oldest ready buffer that has not failed, or NULL. */
static Buffer *oldest_ready(const BaleSeqcache *sc)
{
    for (GList *l = sc->dirty.head; l; l = l->next) {
        Buffer *b = l->data;

        if (entry_is_ready(b->entry) && b->entry->state != STATE_FAILED) {
            return b;
        }
    }
    return NULL;
}

BaleSeqcacheOut *bale_seqcache_begin_upto(BaleSeqcache *sc, uint64_t seq,
                                          int *err)
{
    Buffer *b = oldest_ready(sc);

    *err = 0;
    return b && b->first_seq <= seq ? entry_begin(sc, b->entry, err) : NULL;
}

BaleSeqcacheOut *bale_seqcache_begin_older(BaleSeqcache *sc, int64_t time_ns,
                                           int *err)
{
    Buffer *b = oldest_ready(sc);

    *err = 0;
    return b && b->first_time_ns <= time_ns ? entry_begin(sc, b->entry, err)
                                            : NULL;
}

BaleSeqcacheOut *bale_seqcache_begin_at(BaleSeqcache *sc, uint64_t offset,
                                        int *err)
{
    Entry *e = entry_find(sc, offset >> sc->cluster_bits);

    *err = 0;
    return e && entry_is_ready(e) ? entry_begin(sc, e, err) : NULL;
}

BaleSeqcacheOut *bale_seqcache_begin_complete_at(BaleSeqcache *sc,
                                                 uint64_t offset, int *err)
{
    Entry *e = entry_find(sc, offset >> sc->cluster_bits);

    *err = 0;
    return e && entry_is_ready(e) && e->state == STATE_FINISHED &&
                   e->cur->n_valid == sc->cluster_bytes
               ? entry_begin(sc, e, err)
               : NULL;
}

uint64_t bale_seqcache_out_offset(const BaleSeqcacheOut *out)
{
    return out->entry->index * out->cluster_bytes;
}

uint8_t *bale_seqcache_out_data(BaleSeqcacheOut *out)
{
    return out->data;
}

size_t bale_seqcache_out_bytes(const BaleSeqcacheOut *out)
{
    return out->pinned_bytes;
}

bool bale_seqcache_out_range(const BaleSeqcacheOut *out, size_t *start,
                             size_t *len)
{
    size_t end;

    if (*start >= out->cluster_bytes) {
        return false;
    }
    if (out->pinned) {
        *start = bale_bytemap_find(out->pinned, *start, out->cluster_bytes,
                                   true);
        end = bale_bytemap_find(out->pinned, *start, out->cluster_bytes, false);
    } else {
        end = out->pinned_start + out->pinned_bytes;
        *start = MIN(MAX(*start, out->pinned_start), end);
    }
    *len = end - *start;
    return *len > 0;
}

/* Put @b, which is on no list, into dirty where its number belongs. */
static void dirty_insert(BaleSeqcache *sc, Buffer *b)
{
    GList *l = sc->dirty.head;

    while (l && ((Buffer *)l->data)->first_seq <= b->first_seq) {
        l = l->next;
    }
    g_queue_insert_before_link(&sc->dirty, l, &b->link);
}

/* Lay what was written meanwhile over the bytes that come back. */
static void merge_newer(BaleSeqcache *sc, Buffer *older, const Buffer *newer)
{
    size_t at = 0, end;

    for (;;) {
        at = bale_bytemap_find(newer->valid, at, sc->cluster_bytes, true);
        if (at == sc->cluster_bytes) {
            break;
        }
        end = bale_bytemap_find(newer->valid, at, sc->cluster_bytes, false);
        memcpy(older->data + at, newer->data + at, end - at);
        older->n_valid += bale_bytemap_set(older->valid, at, end);
        at = end;
    }
}

void bale_seqcache_out_done(BaleSeqcache *sc, BaleSeqcacheOut *out,
                            bool success)
{
    Entry *e = out->entry;

    assert(e && e->out == out);
    g_queue_unlink(&sc->outs, &out->link);
    sc->out_bytes -= out->n_valid;
    e->out = NULL;
    if (success) {
        sc->stats.outs_done++;
        sc->stats.outs_done_bytes += out->pinned_bytes;
    } else {
        sc->stats.outs_failed++;
    }

    if (success || out->n_valid == 0) {
        buffer_release(sc, out);
        entry_drop_if_empty(sc, e);
        return;
    }
    g_clear_pointer(&out->pinned, g_free);
    if (e->cur) {
        Buffer *newer = entry_steal_cur(sc, e);

        merge_newer(sc, out, newer);
        buffer_release(sc, newer);
    }
    e->cur = out;
    dirty_insert(sc, out);
    sc->dirty_bytes += out->n_valid;
    entry_set_state(sc, e, STATE_FAILED);
}

void bale_seqcache_retry(BaleSeqcache *sc)
{
    while (sc->failed.head) {
        entry_set_state(sc, sc->failed.head->data, STATE_FINISHED);
    }
}

/* ------------------------------------------------- discard, hold, queries */

typedef void EntryFunc(BaleSeqcache *sc, Entry *e, size_t from, size_t to);

/*
 * Call @func for each entry that intersects the range, with the part of its
 * cluster that does.  @func may drop the entry that it is given.
 */
static void for_each_entry(BaleSeqcache *sc, uint64_t offset, uint64_t len,
                           EntryFunc *func)
{
    uint64_t first, last, end;

    if (len == 0 || sc->all.length == 0) {
        return;
    }
    end = len > UINT64_MAX - offset ? UINT64_MAX : offset + len;
    first = offset >> sc->cluster_bits;
    last = (end - 1) >> sc->cluster_bits;
    if (last - first < sc->all.length) {
        for (uint64_t i = first; i <= last; i++) {
            Entry *e = entry_find(sc, i);
            uint64_t start = i << sc->cluster_bits;

            if (e) {
                func(sc, e, MAX(offset, start) - start,
                     MIN(end - start, sc->cluster_bytes));
            }
        }
    } else {
        GList *next;

        for (GList *l = sc->all.head; l; l = next) {
            Entry *e = l->data;
            uint64_t start = e->index << sc->cluster_bits;

            next = l->next;
            if (e->index >= first && e->index <= last) {
                func(sc, e, MAX(offset, start) - start,
                     MIN(end - start, sc->cluster_bytes));
            }
        }
    }
}

static void discard_entry(BaleSeqcache *sc, Entry *e, size_t from, size_t to)
{
    size_t n;

    if (e->out) {
        n = bale_bytemap_clear(e->out->valid, from, to);
        e->out->n_valid -= n;
        sc->out_bytes -= n;
        sc->stats.discarded_bytes += n;
    }
    if (e->cur) {
        n = bale_bytemap_clear(e->cur->valid, from, to);
        e->cur->n_valid -= n;
        sc->dirty_bytes -= n;
        sc->stats.discarded_bytes += n;
        if (e->cur->n_valid == 0) {
            buffer_release(sc, entry_steal_cur(sc, e));
        }
    }
    entry_drop_if_empty(sc, e);
}

void bale_seqcache_discard(BaleSeqcache *sc, uint64_t offset, uint64_t len)
{
    for_each_entry(sc, offset, len, discard_entry);
}

void bale_seqcache_discard_all(BaleSeqcache *sc)
{
    bale_seqcache_discard(sc, 0, UINT64_MAX);
}

static void hold_entry(BaleSeqcache *sc, Entry *e, size_t from, size_t to)
{
    e->held++;
}

static void release_entry(BaleSeqcache *sc, Entry *e, size_t from, size_t to)
{
    if (e->held > 0) {
        e->held--;
    }
}

void bale_seqcache_hold(BaleSeqcache *sc, uint64_t offset, uint64_t len)
{
    for_each_entry(sc, offset, len, hold_entry);
}

void bale_seqcache_release(BaleSeqcache *sc, uint64_t offset, uint64_t len)
{
    for_each_entry(sc, offset, len, release_entry);
}

bool bale_seqcache_is_held(const BaleSeqcache *sc, uint64_t offset)
{
    Entry *e = entry_find(sc, offset >> sc->cluster_bits);

    return e && e->held > 0;
}

bool bale_seqcache_in_out(const BaleSeqcache *sc, uint64_t offset, uint64_t len)
{
    uint64_t first, last;

    if (len == 0) {
        return false;
    }
    first = offset >> sc->cluster_bits;
    last = (len > UINT64_MAX - offset ? UINT64_MAX : offset + len - 1) >>
           sc->cluster_bits;
    for (GList *l = sc->outs.head; l; l = l->next) {
        Buffer *b = l->data;

        if (b->entry->index >= first && b->entry->index <= last) {
            return true;
        }
    }
    return false;
}

uint64_t bale_seqcache_seq(const BaleSeqcache *sc)
{
    return sc->seq;
}

uint64_t bale_seqcache_oldest_seq(const BaleSeqcache *sc)
{
    uint64_t seq = UINT64_MAX;

    if (sc->dirty.head) {
        seq = ((Buffer *)sc->dirty.head->data)->first_seq;
    }
    for (GList *l = sc->outs.head; l; l = l->next) {
        seq = MIN(seq, ((Buffer *)l->data)->first_seq);
    }
    return seq;
}

int64_t bale_seqcache_oldest_time(const BaleSeqcache *sc)
{
    for (GList *l = sc->dirty.head; l; l = l->next) {
        Buffer *b = l->data;

        if (b->entry->state != STATE_FAILED) {
            return b->first_time_ns;
        }
    }
    return INT64_MAX;
}

uint64_t bale_seqcache_end(const BaleSeqcache *sc)
{
    const Entry *last = NULL;
    size_t end = 0;

    /* An entry whose bytes in write-out were all discarded has no end. */
    for (GList *l = sc->all.head; l; l = l->next) {
        Entry *e = l->data;

        if ((!last || e->index > last->index) &&
            (e->cur || e->out->n_valid > 0)) {
            last = e;
        }
    }
    if (!last) {
        return 0;
    }
    if (last->cur) {
        end = bale_bytemap_end(last->cur->valid, sc->map_words);
    }
    if (last->out) {
        end = MAX(end, bale_bytemap_end(last->out->valid, sc->map_words));
    }
    return (last->index << sc->cluster_bits) + end;
}

size_t bale_seqcache_finished_clusters(const BaleSeqcache *sc)
{
    return sc->finished.length;
}

void bale_seqcache_get_stats(const BaleSeqcache *sc, BaleSeqcacheStats *stats)
{
    *stats = sc->stats;
    stats->open_clusters = sc->open.length;
    stats->finished_clusters = sc->finished.length;
    stats->failed_clusters = sc->failed.length;
    stats->out_clusters = sc->outs.length;
    stats->dirty_bytes = sc->dirty_bytes;
    stats->out_bytes = sc->out_bytes;
    stats->memory_bytes = (uint64_t)sc->n_buffers << sc->cluster_bits;
    stats->max_memory_bytes = (uint64_t)sc->max_buffers << sc->cluster_bits;
}

void bale_seqcache_reset_stats(BaleSeqcache *sc)
{
    memset(&sc->stats, 0, sizeof(sc->stats));
}

/* -------------------------------------------------------------- checking */

static const char *check_entry(const BaleSeqcache *sc, const Entry *e)
{
    if (entry_find(sc, e->index) != e) {
        return "1: an entry is not found under its number";
    }
    if (!e->cur && !e->out) {
        return "1: an entry has no buffer";
    }
    if (e->cur && e->cur->n_valid == 0) {
        return "2: an empty buffer takes writes";
    }
    if ((e->cur && bale_bytemap_count(e->cur->valid, sc->map_words) !=
                       e->cur->n_valid) ||
        (e->out && bale_bytemap_count(e->out->valid, sc->map_words) !=
                       e->out->n_valid)) {
        return "3: a byte count differs from its map";
    }
    if ((e->cur && (e->cur->entry != e || e->state == STATE_NONE)) ||
        (!e->cur && e->state != STATE_NONE) ||
        (e->out && e->out->entry != e)) {
        return "4: a state contradicts the buffers";
    }
    if (e->state == STATE_OPEN && e->cur->n_valid == sc->cluster_bytes) {
        return "5: a complete cluster is open";
    }
    if (e->cur && e->out && e->cur->first_seq < e->out->first_seq) {
        return "9: bytes in write-out are newer than those that follow";
    }
    return NULL;
}

const char *bale_seqcache_check(const BaleSeqcache *sc)
{
    const struct {
        const GQueue *queue;
        State state;
    } states[] = {
        { &sc->open, STATE_OPEN },
        { &sc->finished, STATE_FINISHED },
        { &sc->failed, STATE_FAILED },
    };
    size_t n_hash = 0, n_cur = 0, n_out = 0, n_state = 0;
    uint64_t dirty_bytes = 0, out_bytes = 0, seq = 0;
    int64_t time_ns = INT64_MIN;

    for (size_t i = 0; i < sc->n_buckets; i++) {
        for (Entry *e = sc->buckets[i]; e; e = e->hash_next) {
            n_hash++;
        }
    }
    if (n_hash != sc->all.length) {
        return "1: the hash table and the list of entries differ";
    }
    for (GList *l = sc->all.head; l; l = l->next) {
        const Entry *e = l->data;
        const char *wrong = check_entry(sc, e);

        if (wrong) {
            return wrong;
        }
        n_cur += e->cur != NULL;
        n_out += e->out != NULL;
    }
    for (size_t i = 0; i < G_N_ELEMENTS(states); i++) {
        for (GList *l = states[i].queue->head; l; l = l->next) {
            if (((Entry *)l->data)->state != states[i].state) {
                return "4: an entry is on the list of another state";
            }
            n_state++;
        }
    }
    if (n_state != n_cur) {
        return "4: the lists of states do not have every entry once";
    }
    if (sc->open.length > sc->max_streams) {
        return "6: too many open clusters";
    }
    if (sc->dirty.length != n_cur || sc->outs.length != n_out) {
        return "7: the lists of buffers do not have every buffer once";
    }
    for (GList *l = sc->dirty.head; l; l = l->next) {
        const Buffer *b = l->data;

        if (b->entry->cur != b) {
            return "7: a foreign buffer is on the dirty list";
        }
        if (b->first_seq < seq || b->first_seq > sc->seq ||
            b->first_time_ns < time_ns) {
            return "8: the dirty list is out of order";
        }
        seq = b->first_seq;
        time_ns = b->first_time_ns;
        dirty_bytes += b->n_valid;
    }
    for (GList *l = sc->outs.head; l; l = l->next) {
        const Buffer *b = l->data;

        if (b->entry->out != b) {
            return "7: a foreign buffer is on the list of write-outs";
        }
        out_bytes += b->n_valid;
    }
    if (sc->n_buffers != n_cur + n_out) {
        return "10: buffers in use are miscounted";
    }
    if (dirty_bytes != sc->dirty_bytes || out_bytes != sc->out_bytes) {
        return "11: the byte counts are not the sums over the buffers";
    }
    return NULL;
}
