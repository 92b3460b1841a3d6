/*
 * The filter driver "seqcache": small unaligned writes reach the node below
 * as whole aligned clusters.
 *
 * The cache itself is util/seqcache. This file decides when clusters are
 * written out, and orders that against everything else:
 *
 *  1. A write ends when its bytes are in the cache. While the cache is full it
 *     waits for a write-out to end.
 *  2. Finished clusters are written out in the order in which they were
 *     finished, neighbours together up to BATCH_BYTES; they wait for neighbours
 *     for BATCH_DELAY_NS at most. Up to MAX_WRITE_OUTS are under way at a time,
 *     each in a coroutine of its own that counts as a request in flight of
 *     this node: so a drained section waits for them. Open clusters follow when
 *     the cache is full, when they get older than flush-interval, and on a
 *     flush.
 *  3. A flush writes out every write that ended before it, then the block layer
 *     flushes the child. FUA is emulated by the block layer with a flush.
 *  4. At the start of a drained section everything is written out, so that
 *     whoever changes the graph finds a complete node below.
 *  5. Requests that go straight to the child (write-zeroes and discard of whole
 *     clusters, truncate, compressed writes) are exclusive in their clusters:
 *     they wait until no write-out is under way there, keep new ones from
 *     starting and writes from entering, and drop cached bytes only after the
 *     child has succeeded. Reads see the cached bytes until then.
 *  6. Reads take cached bytes from the cache and gaps from the child. What was
 *     a gap when the read began has its newest bytes in the child.
 *  7. A write-out that fails leaves its bytes in the cache. Every write fails
 *     with its error from then on, and the next flush tries again: with success
 *     the node is well again. An error that no request has returned yet
 *     is returned by that flush all the same.
 *
 * A write-out that begins or ends inside a block of the child would make the
 * child read that block, merge and write it. So the blocks at such ends are
 * remembered ("edges"): the next write-out that continues there writes whole
 * blocks, of its own bytes and of those remembered. All that changes the child
 * goes through edges_forget().
 *
 * Threads: everything runs in the node's AioContext.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "seqcache-internal.h"

#include "block/qdict.h"
#include "qapi/error.h"
#include "qapi/qmp/qdict.h"
#include "qemu/coroutine.h"
#include "qemu/error-report.h"
#include "qemu/main-loop.h"
#include "qemu/memalign.h"
#include "qemu/module.h"
#include "qemu/option.h"
#include "qemu/timer.h"
#include "qemu/units.h"

#define OPT_CLUSTER_SIZE   "cluster-size"
#define OPT_CACHE_SIZE     "cache-size"
#define OPT_MAX_STREAMS    "max-streams"
#define OPT_FLUSH_INTERVAL "flush-interval"
#define OPT_COMPRESS       "compress"

#define DEFAULT_CLUSTER_BYTES     (64 * KiB)
#define DEFAULT_CACHE_BYTES       (16 * MiB)
#define DEFAULT_CACHE_CLUSTERS    16 /* at least, with large clusters */
#define DEFAULT_MAX_STREAMS       64
#define DEFAULT_FLUSH_INTERVAL_MS 5000
#define MAX_CACHE_BYTES           (64 * GiB)
#define MAX_FLUSH_INTERVAL_MS     (24 * 3600 * 1000ULL)

/* Write-outs under way at a time. */
#define MAX_WRITE_OUTS 16
/* … of them, begun with unfinished clusters because the cache is full. */
#define MAX_EVICTIONS 8

/* Neighbouring clusters are written in one request up to these. */
#define BATCH_BYTES        (1 * MiB)
#define MAX_BATCH_CLUSTERS 64
/* How long a finished cluster waits for a whole batch. */
#define BATCH_DELAY_NS (50 * SCALE_MS)

/*
 * Blocks of the child that are remembered. They may be larger than the child's
 * own: file systems allocate 4 KiB, and what lies around a byte that was
 * written is no hole any more.
 */
#define MAX_EDGES  256
#define EDGE_BYTES 4096

/* Gaps that one read looks up at a time, and the bounce buffer for them. */
#define MAX_READ_GAPS         64
#define MAX_READ_BOUNCE_BYTES (1 * MiB)

/* The background flusher never runs more often. */
#define MIN_TIMER_NS (10 * SCALE_MS)

typedef struct SeqcacheOptions {
    uint64_t cluster_bytes;
    uint64_t cache_bytes;
    uint64_t max_streams;
    uint64_t flush_interval_ms;
    bool compress;
} SeqcacheOptions;

/* A request that has its clusters for itself. */
typedef struct Exclusive {
    uint64_t start; /* of the first cluster */
    uint64_t end;   /* of the last; UINT64_MAX: no end */
    QLIST_ENTRY(Exclusive) next;
} Exclusive;

/* One block of the child, as it is there. */
typedef struct Edge {
    int64_t offset; /* -1: none */
    uint64_t used;  /* for choosing the one to replace */
} Edge;

typedef struct BDRVSeqcacheState {
    SeqcacheOptions opts;
    BaleSeqcache *cache;

    /* The end of the data that was written; the child may still be shorter. */
    uint64_t data_end;

    unsigned write_outs;  /* under way */
    CoQueue progress;     /* woken when a write-out or an Exclusive ends */
    QLIST_HEAD(, Exclusive) exclusives;
    unsigned drains;      /* drained sections that we are in */
    QEMUTimer *timer;
    int64_t batch_due_ns; /* when finished clusters stop waiting; 0: none do */

    Edge edges[MAX_EDGES];
    uint8_t *edge_data;   /* MAX_EDGES blocks; NULL: not in use */
    size_t edge_bytes;    /* of a block */
    uint64_t edge_clock;
    uint64_t edge_changes; /* counts what may have changed the child */

    int error;            /* errno that writes fail with, negative; 0: well */
    bool error_told;      /* some request has returned it */
    unsigned error_count; /* write-outs that failed, ever */
    char *last_error;     /* message; kept when the node is well again */
    char *flush_error;    /* message, if the last flush failed in here */

    /* Counted here, see BaleSeqcacheNodeStats. */
    BaleSeqcacheNodeStats stats;
} BDRVSeqcacheState;

typedef struct WriteOut {
    BlockDriverState *bs;
    unsigned n;
    BaleSeqcacheOut *outs[]; /* neighbours; if several, complete ones */
} WriteOut;

static void seqcache_kick(BlockDriverState *bs, bool need_room);
static void seqcache_arm_timer(BlockDriverState *bs);

static int64_t now_ns(void)
{
    return qemu_clock_get_ns(QEMU_CLOCK_REALTIME);
}

/* Where the child ends at present; cached data may lie beyond. */
static int64_t child_end(BlockDriverState *bs)
{
    return bs->file->bs->total_sectors << BDRV_SECTOR_BITS;
}

/*
 * The block size below: filters in between pass any request on, and say so, but
 * the node under them may not.
 */
static size_t child_align(BlockDriverState *child)
{
    size_t align = 1;

    for (; child; child = bdrv_filter_bs(child)) {
        align = MAX(align, child->bl.request_alignment);
    }
    return align;
}

/* ------------------------------------------------------------------ errors */

/* A write-out failed: remember it and tell the log. */
static void set_error(BlockDriverState *bs, uint64_t offset, uint64_t bytes,
                      int ret)
{
    BDRVSeqcacheState *s = bs->opaque;

    g_free(s->last_error);
    s->last_error = g_strdup_printf(
        "seqcache node '%s': could not write back %" PRIu64 " bytes at offset "
        "%" PRIu64 " to node '%s': %s",
        bdrv_get_node_name(bs), bytes, offset,
        bdrv_get_node_name(bs->file->bs), strerror(-ret));
    if (!s->error) {
        error_report("%s; the data stays cached until a flush succeeds",
                     s->last_error);
        s->error_told = false;
    }
    s->error = ret;
    s->error_count++;
    s->stats.errors++;
}

/* The error that writes fail with until a flush has succeeded, or 0. */
static int tell_error(BDRVSeqcacheState *s)
{
    s->error_told |= s->error != 0;
    return s->error;
}

/* -------------------------------------------------------------------- edges */

static void edges_init(BlockDriverState *bs)
{
    BDRVSeqcacheState *s = bs->opaque;
    size_t align = child_align(bs->file->bs);

    for (unsigned i = 0; i < MAX_EDGES; i++) {
        s->edges[i].offset = -1;
    }
    s->edge_bytes = MIN(EDGE_BYTES, s->opts.cluster_bytes);
    if (align > 1 && align <= s->edge_bytes) {
        s->edge_data = g_try_malloc(MAX_EDGES * s->edge_bytes);
    }
    if (!s->edge_data) {
        s->edge_bytes = align;
    }
}

/* The child may change in the range, or has. */
static void edges_forget(BDRVSeqcacheState *s, int64_t offset, int64_t bytes)
{
    s->edge_changes++;
    for (unsigned i = 0; i < MAX_EDGES && s->edge_data; i++) {
        Edge *e = &s->edges[i];

        if (e->offset >= 0 && e->offset - offset < bytes &&
            e->offset + (int64_t)s->edge_bytes > offset) {
            e->offset = -1;
        }
    }
}

/* The child's block at @offset now has these bytes. */
static void edges_remember(BDRVSeqcacheState *s, int64_t offset,
                           const uint8_t *block)
{
    unsigned victim = 0;

    if (!s->edge_data) {
        return;
    }
    for (unsigned i = 0; i < MAX_EDGES; i++) {
        if (s->edges[i].offset == offset || s->edges[i].offset < 0) {
            victim = i;
            break;
        }
        if (s->edges[i].used < s->edges[victim].used) {
            victim = i;
        }
    }
    s->edges[victim].offset = offset;
    s->edges[victim].used = ++s->edge_clock;
    memcpy(s->edge_data + victim * s->edge_bytes, block, s->edge_bytes);
}

/* The remembered block at @offset, or NULL. */
static const uint8_t *edges_find(BDRVSeqcacheState *s, int64_t offset)
{
    for (unsigned i = 0; i < MAX_EDGES && s->edge_data; i++) {
        if (s->edges[i].offset == offset) {
            s->edges[i].used = ++s->edge_clock;
            return s->edge_data + i * s->edge_bytes;
        }
    }
    return NULL;
}

/*
 * Fill @data with what the child has in [@from, @to), which lies in one block,
 * if that is known without reading: false if it is not.
 */
static bool coroutine_fn fill_known(BlockDriverState *bs, int64_t from,
                                    int64_t to, uint8_t *data)
{
    BDRVSeqcacheState *s = bs->opaque;
    int64_t block = QEMU_ALIGN_DOWN(from, s->edge_bytes);
    int64_t end = child_end(bs);
    const uint8_t *edge;

    if (to > end && !(bs->file->perm & BLK_PERM_RESIZE)) {
        return false;
    }
    edge = edges_find(s, block);
    if (edge) {
        memcpy(data, edge + (from - block), to - from);
        return true;
    }
    if (from < end) {
        int64_t bytes = MIN(to, end) - from, pnum;
        int ret = bdrv_block_status_above(bs->file->bs, NULL, from, bytes,
                                          &pnum, NULL, NULL);

        if (ret < 0 || !(ret & BDRV_BLOCK_ZERO) || pnum < bytes) {
            return false;
        }
    }
    memset(data, 0, to - from);
    return true;
}

/* --------------------------------------------------------------- write-out */

static int coroutine_fn child_pwritev(BlockDriverState *bs, int64_t offset,
                                      int64_t bytes, QEMUIOVector *qiov,
                                      BdrvRequestFlags flags)
{
    BDRVSeqcacheState *s = bs->opaque;
    int ret;

    s->stats.child_writes++;
    s->stats.child_write_bytes += bytes;
    edges_forget(s, offset, bytes);
    ret = bdrv_co_pwritev(bs->file, offset, bytes, qiov, flags);
    s->edge_changes++;
    return ret;
}

static int coroutine_fn child_pwrite(BlockDriverState *bs, int64_t offset,
                                     int64_t bytes, uint8_t *buf,
                                     BdrvRequestFlags flags)
{
    QEMUIOVector qiov = QEMU_IOVEC_INIT_BUF(qiov, buf, bytes);

    return child_pwritev(bs, offset, bytes, &qiov, flags);
}

/*
 * Does the node below let us write [@offset, @offset + @bytes)? The block layer
 * asserts that it does. A node whose parents are gone keeps what its cached
 * data needs (see seqcache_child_perm()), so this is the last line of defence.
 */
static bool may_write(BlockDriverState *bs, int64_t offset, int64_t bytes)
{
    BdrvChild *child = bs->file;

    return child->perm & BLK_PERM_WRITE &&
           (child->perm & BLK_PERM_RESIZE ||
            offset + bytes <= child_end(bs));
}

/*
 * Move @start, in a cluster, down to a block's start if what the child has in
 * between is known and nothing written before lies there.
 */
static size_t coroutine_fn extend_down(BlockDriverState *bs, int64_t offset,
                                       uint8_t *data, size_t start,
                                       size_t written)
{
    BDRVSeqcacheState *s = bs->opaque;
    const size_t sizes[] = { s->edge_bytes, child_align(bs->file->bs) };

    for (unsigned i = 0; i < ARRAY_SIZE(sizes); i++) {
        size_t head = QEMU_ALIGN_DOWN(start, sizes[i]);

        if (head == start || (head >= written &&
                              fill_known(bs, offset + head, offset + start,
                                         data + head))) {
            return head;
        }
    }
    return start;
}

/*
 * The same upwards, to @limit at most. Past the child's end no further than
 * the child itself would go: its length is seen above.
 */
static size_t coroutine_fn extend_up(BlockDriverState *bs, int64_t offset,
                                     uint8_t *data, size_t end, size_t limit)
{
    BDRVSeqcacheState *s = bs->opaque;
    const size_t sizes[] = { s->edge_bytes, child_align(bs->file->bs) };

    for (unsigned i = 0; i < ARRAY_SIZE(sizes); i++) {
        size_t tail = MIN(QEMU_ALIGN_UP(end, sizes[i]), limit);

        if (i == 0 && offset + (int64_t)tail > child_end(bs)) {
            continue;
        }
        if (tail == end || fill_known(bs, offset + end, offset + tail,
                                      data + end)) {
            return tail;
        }
    }
    return end;
}

/*
 * [@start, @end) of a cluster was written: remember the first and the last
 * block of it that are known whole. With @at_end the child ended before @end,
 * so what follows in the last block is zero.
 */
static void remember_ends(BDRVSeqcacheState *s, int64_t offset,
                          const uint8_t *data, size_t start, size_t end,
                          bool at_end)
{
    size_t head = QEMU_ALIGN_UP(start, s->edge_bytes);
    size_t tail = QEMU_ALIGN_DOWN(end, s->edge_bytes);

    if (head < tail) {
        edges_remember(s, offset + head, data + head);
    }
    if (tail < end && tail >= start && at_end && s->edge_data) {
        uint8_t block[EDGE_BYTES] = { 0 };

        memcpy(block, data + tail, end - tail);
        edges_remember(s, offset + tail, block);
    } else if (tail == end && head + s->edge_bytes < tail) {
        edges_remember(s, offset + tail - s->edge_bytes,
                       data + tail - s->edge_bytes);
    }
}

/*
 * Write the cached ranges and nothing else, but for the rest of the blocks that
 * they begin and end in, where it is known what the child has there. Nobody
 * else writes to this cluster meanwhile.
 */
static int coroutine_fn write_out_ranges(BlockDriverState *bs,
                                         BaleSeqcacheOut *out)
{
    BDRVSeqcacheState *s = bs->opaque;
    int64_t offset = bale_seqcache_out_offset(out);
    uint8_t *data = bale_seqcache_out_data(out);
    size_t align = child_align(bs->file->bs);
    size_t start = 0, len, written = 0;
    bool more = bale_seqcache_out_range(out, &start, &len);
    int ret;

    while (more) {
        size_t end = start + len, next = end, next_len;
        bool at_end;

        start = extend_down(bs, offset, data, start, written);
        more = bale_seqcache_out_range(out, &next, &next_len);
        end = extend_up(bs, offset, data, end,
                        more ? next : s->opts.cluster_bytes);
        while (more && end == next) {
            /* The next range begins in the same block. */
            end = next + next_len;
            next = end;
            more = bale_seqcache_out_range(out, &next, &next_len);
            end = extend_up(bs, offset, data, end,
                            more ? next : s->opts.cluster_bytes);
        }
        if (!QEMU_IS_ALIGNED(start | end, align)) {
            s->stats.read_modify_writes++;
        }
        if (!may_write(bs, offset + start, end - start)) {
            return -EPERM;
        }
        at_end = offset + (int64_t)end >= child_end(bs) &&
                 (!more || next >= QEMU_ALIGN_UP(end, s->edge_bytes));
        ret = child_pwrite(bs, offset + start, end - start, data + start, 0);
        if (ret < 0) {
            return ret;
        }
        if (start > 0 || end < s->opts.cluster_bytes) {
            remember_ends(s, offset, data, start, end, at_end);
        }
        written = end;
        start = next;
        len = next_len;
    }
    return 0;
}

/* Write complete neighbours in one request. */
static int coroutine_fn write_out_batch(BlockDriverState *bs, WriteOut *w)
{
    BDRVSeqcacheState *s = bs->opaque;
    int64_t offset = bale_seqcache_out_offset(w->outs[0]);
    int64_t bytes = (int64_t)w->n * s->opts.cluster_bytes;
    QEMUIOVector qiov;
    int ret;

    if (!may_write(bs, offset, bytes)) {
        return -EPERM;
    }
    qemu_iovec_init(&qiov, w->n);
    for (unsigned i = 0; i < w->n; i++) {
        qemu_iovec_add(&qiov, bale_seqcache_out_data(w->outs[i]),
                       s->opts.cluster_bytes);
    }
    ret = child_pwritev(bs, offset, bytes, &qiov, 0);
    qemu_iovec_destroy(&qiov);
    return ret;
}

/* Read what is not cached of the cluster's first @bytes bytes. */
static int coroutine_fn fill_gaps(BlockDriverState *bs, BaleSeqcacheOut *out,
                                  size_t bytes)
{
    BDRVSeqcacheState *s = bs->opaque;
    int64_t offset = bale_seqcache_out_offset(out);
    uint8_t *data = bale_seqcache_out_data(out);
    size_t gap = 0, start = 0, len;
    bool read = false;

    while (gap < bytes) {
        if (!bale_seqcache_out_range(out, &start, &len)) {
            start = bytes;
            len = 0;
        }
        start = MIN(start, bytes);
        if (start > gap) {
            int ret = bdrv_co_pread(bs->file, offset + gap, start - gap,
                                    data + gap, 0);

            if (ret < 0) {
                return ret;
            }
            read = true;
        }
        start += len;
        gap = start;
    }
    s->stats.read_modify_writes += read;
    return 0;
}

/*
 * Write the whole cluster with the compressed flag. Children may refuse, for
 * example qcow2 where the cluster is allocated already; then the cached ranges
 * are written as they are. Not so on ENOSPC: that would need even more room.
 */
static int coroutine_fn write_out_compressed(BlockDriverState *bs,
                                             BaleSeqcacheOut *out)
{
    BDRVSeqcacheState *s = bs->opaque;
    int64_t offset = bale_seqcache_out_offset(out);
    int64_t end = bdrv_getlength(bs->file->bs);
    int64_t bytes;
    int ret;

    if (end < 0) {
        return end;
    }
    bytes = MIN((int64_t)s->opts.cluster_bytes,
                MAX(end, (int64_t)s->data_end) - offset);
    if (bytes <= 0) {
        return write_out_ranges(bs, out);
    }
    if ((int64_t)bale_seqcache_out_bytes(out) < bytes) {
        ret = fill_gaps(bs, out, bytes);
        if (ret < 0) {
            return ret;
        }
    }
    if (!may_write(bs, offset, bytes)) {
        return -EPERM;
    }
    ret = child_pwrite(bs, offset, bytes, bale_seqcache_out_data(out),
                       BDRV_REQ_WRITE_COMPRESSED);
    if (ret == 0) {
        s->stats.compressed_writes++;
    } else if (ret != -ENOSPC) {
        s->stats.fallback_writes++;
        ret = write_out_ranges(bs, out);
    }
    return ret;
}

static void coroutine_fn write_out_entry(void *opaque)
{
    WriteOut *w = opaque;
    BlockDriverState *bs = w->bs;
    BDRVSeqcacheState *s = bs->opaque;
    uint64_t offset = bale_seqcache_out_offset(w->outs[0]);
    size_t bytes = 0, start = 0, len;
    int64_t begun_ns = now_ns();
    int ret;

    bale_seqcache_out_range(w->outs[0], &start, &len);
    offset += start;
    for (unsigned i = 0; i < w->n; i++) {
        bytes += bale_seqcache_out_bytes(w->outs[i]);
    }
    ret = s->opts.compress ? write_out_compressed(bs, w->outs[0])
          : w->n > 1       ? write_out_batch(bs, w)
                           : write_out_ranges(bs, w->outs[0]);

    bale_histogram_add(&s->stats.size_bytes, bytes);
    bale_histogram_add(&s->stats.latency_ns, now_ns() - begun_ns);
    for (unsigned i = 0; i < w->n; i++) {
        bale_seqcache_out_done(s->cache, w->outs[i], ret == 0);
    }
    s->write_outs--;
    if (ret < 0) {
        set_error(bs, offset, bytes, ret);
    }
    g_free(w);

    seqcache_kick(bs, false);
    qemu_co_queue_restart_all(&s->progress);
    seqcache_arm_timer(bs);
    bdrv_dec_in_flight(bs);
}

/* Clusters that make a batch; 1: none are made. */
static unsigned batch_clusters(BDRVSeqcacheState *s)
{
    return s->opts.compress ? 1
                            : MIN(MAX(BATCH_BYTES / s->opts.cluster_bytes, 1),
                                  MAX_BATCH_CLUSTERS);
}

/* Write @out out, and complete neighbours after it with it. */
static void start_write_out(BlockDriverState *bs, BaleSeqcacheOut *out)
{
    BDRVSeqcacheState *s = bs->opaque;
    unsigned max = batch_clusters(s);
    WriteOut *w = g_malloc(sizeof(*w) + max * sizeof(w->outs[0]));
    uint64_t next = bale_seqcache_out_offset(out);
    int err;

    *w = (WriteOut){ .bs = bs };
    do {
        bool whole = bale_seqcache_out_bytes(out) == s->opts.cluster_bytes;

        w->outs[w->n++] = out;
        next += s->opts.cluster_bytes;
        out = whole && w->n < max
                  ? bale_seqcache_begin_complete_at(s->cache, next, &err)
                  : NULL;
    } while (out);
    s->write_outs++;
    bdrv_inc_in_flight(bs);
    bdrv_coroutine_enter(bs, qemu_coroutine_create(write_out_entry, w));
}

/* Are there so many finished clusters that they need not wait for more? */
static bool batch_is_ready(BDRVSeqcacheState *s)
{
    size_t n = bale_seqcache_finished_clusters(s->cache);

    return n > 0 &&
           (n >= batch_clusters(s) ||
            n * s->opts.cluster_bytes >= s->opts.cache_bytes / 4 ||
            (s->batch_due_ns && now_ns() >= s->batch_due_ns));
}

/*
 * Start write-outs that are due. With @need_room also of unfinished clusters.
 * Does nothing after an error: then only a flush writes.
 */
static void seqcache_kick(BlockDriverState *bs, bool need_room)
{
    BDRVSeqcacheState *s = bs->opaque;
    bool all = s->drains > 0;
    BaleSeqcacheOut *out;
    int err = 0;

    while (!s->error && s->write_outs < MAX_WRITE_OUTS &&
           (all || need_room || batch_is_ready(s))) {
        out = bale_seqcache_begin_finished(s->cache, &err);
        if (!out && !err &&
            (all || (need_room && s->write_outs < MAX_EVICTIONS))) {
            out = bale_seqcache_begin_upto(s->cache, UINT64_MAX, &err);
        }
        if (!out) {
            break;
        }
        start_write_out(bs, out);
    }
    if (bale_seqcache_finished_clusters(s->cache) == 0) {
        s->batch_due_ns = 0;
    } else if (!s->batch_due_ns) {
        s->batch_due_ns = now_ns() + BATCH_DELAY_NS;
        seqcache_arm_timer(bs);
    }
}

/* Something is under way that will wake the progress queue when it ends. */
static bool progress_is_coming(BDRVSeqcacheState *s)
{
    return s->write_outs > 0 || !QLIST_EMPTY(&s->exclusives);
}

static void coroutine_fn wait_for_progress(BDRVSeqcacheState *s)
{
    assert(progress_is_coming(s));
    qemu_co_queue_wait(&s->progress, NULL);
}

/* Write out every write that has ended by now. */
static int coroutine_fn write_out_all(BlockDriverState *bs)
{
    BDRVSeqcacheState *s = bs->opaque;
    uint64_t target = bale_seqcache_seq(s->cache);
    unsigned error_count = s->error_count;
    BaleSeqcacheOut *out;
    BaleSeqcacheStats st;
    int err = 0, ret;

    bale_seqcache_retry(s->cache);
    for (;;) {
        while (s->error_count == error_count &&
               s->write_outs < MAX_WRITE_OUTS &&
               (out = bale_seqcache_begin_upto(s->cache, target, &err))) {
            start_write_out(bs, out);
        }
        if (bale_seqcache_oldest_seq(s->cache) > target ||
            s->error_count != error_count || !progress_is_coming(s)) {
            break;
        }
        wait_for_progress(s);
    }
    if (s->error_count != error_count) {
        return tell_error(s);
    }
    if (bale_seqcache_oldest_seq(s->cache) <= target) {
        return err ?: -EIO;
    }

    bale_seqcache_get_stats(s->cache, &st);
    if (!s->error || st.failed_clusters > 0) {
        return tell_error(s);
    }
    /* Well again. Say so once if nobody has heard of the error. */
    ret = s->error_told ? 0 : s->error;
    s->error = 0;
    s->error_told = false;
    seqcache_kick(bs, false);
    seqcache_arm_timer(bs);
    return ret;
}

static int coroutine_fn seqcache_co_flush_to_os(BlockDriverState *bs)
{
    BDRVSeqcacheState *s = bs->opaque;

    int ret;

    s->stats.flushes++;
    ret = write_out_all(bs);
    g_free(s->flush_error);
    s->flush_error = ret < 0 ? g_strdup(s->last_error) : NULL;
    return ret;
}

/* ------------------------------------------------------- background flusher */

static void seqcache_arm_timer(BlockDriverState *bs)
{
    BDRVSeqcacheState *s = bs->opaque;
    int64_t due_ns = INT64_MAX, oldest_ns;

    if (!s->timer) {
        return;
    }
    if (s->opts.flush_interval_ms > 0) {
        oldest_ns = bale_seqcache_oldest_time(s->cache);
        if (oldest_ns != INT64_MAX) {
            due_ns = oldest_ns +
                     (int64_t)s->opts.flush_interval_ms * SCALE_MS;
        }
    }
    if (s->batch_due_ns) {
        due_ns = MIN(due_ns, s->batch_due_ns);
    }
    if (due_ns == INT64_MAX || s->error || s->drains > 0) {
        timer_del(s->timer);
    } else {
        timer_mod_ns(s->timer, MAX(due_ns, now_ns() + MIN_TIMER_NS));
    }
}

static void timer_cb(void *opaque)
{
    BlockDriverState *bs = opaque;
    BDRVSeqcacheState *s = bs->opaque;
    AioContext *ctx = bdrv_get_aio_context(bs);
    BaleSeqcacheOut *out;
    int64_t limit_ns;
    int err;

    aio_context_acquire(ctx);
    seqcache_kick(bs, false);
    limit_ns = now_ns() - (int64_t)s->opts.flush_interval_ms * SCALE_MS;
    while (s->opts.flush_interval_ms > 0 && !s->error &&
           s->write_outs < MAX_WRITE_OUTS &&
           (out = bale_seqcache_begin_older(s->cache, limit_ns, &err))) {
        start_write_out(bs, out);
    }
    seqcache_arm_timer(bs);
    aio_context_release(ctx);
}

/* --------------------------------------------------------- exclusive access */

static bool exclusive_overlaps(BDRVSeqcacheState *s, uint64_t start,
                               uint64_t end)
{
    Exclusive *x;

    QLIST_FOREACH(x, &s->exclusives, next) {
        if (start < x->end && end > x->start) {
            return true;
        }
    }
    return false;
}

static void coroutine_fn exclusive_begin(BlockDriverState *bs, Exclusive *x,
                                         uint64_t offset, uint64_t bytes)
{
    BDRVSeqcacheState *s = bs->opaque;
    uint64_t mask = s->opts.cluster_bytes - 1;

    x->start = offset & ~mask;
    x->end = bytes > INT64_MAX - offset ? UINT64_MAX
                                        : ROUND_UP(offset + bytes, mask + 1);
    while (exclusive_overlaps(s, x->start, x->end)) {
        s->stats.waits++;
        wait_for_progress(s);
    }
    QLIST_INSERT_HEAD(&s->exclusives, x, next);
    bale_seqcache_hold(s->cache, x->start, x->end - x->start);
    while (bale_seqcache_in_out(s->cache, x->start, x->end - x->start)) {
        s->stats.waits++;
        wait_for_progress(s);
    }
    edges_forget(s, x->start, MIN(x->end, INT64_MAX) - x->start);
}

static void coroutine_fn exclusive_end(BlockDriverState *bs, Exclusive *x)
{
    BDRVSeqcacheState *s = bs->opaque;

    s->edge_changes++;
    bale_seqcache_release(s->cache, x->start, x->end - x->start);
    QLIST_REMOVE(x, next);
    seqcache_kick(bs, false);
    qemu_co_queue_restart_all(&s->progress);
    seqcache_arm_timer(bs);
}

/* ---------------------------------------------------------------- requests */

static int coroutine_fn write_cached(BlockDriverState *bs, int64_t offset,
                                     int64_t bytes, QEMUIOVector *qiov,
                                     size_t qiov_offset)
{
    BDRVSeqcacheState *s = bs->opaque;
    bool waited = false;

    while (bytes > 0) {
        size_t accepted;
        int ret;

        if (s->error) {
            return tell_error(s);
        }
        if (exclusive_overlaps(s, offset, offset + bytes)) {
            s->stats.waits += !waited;
            waited = true;
            wait_for_progress(s);
            continue;
        }
        ret = bale_seqcache_write(s->cache, offset, qiov->iov, qiov->niov,
                                  qiov_offset, bytes, now_ns(), &accepted);
        offset += accepted;
        bytes -= accepted;
        qiov_offset += accepted;
        if (accepted > 0) {
            s->data_end = MAX(s->data_end, (uint64_t)offset);
        }
        seqcache_kick(bs, bytes > 0);
        if (bytes > 0) {
            if (s->error) {
                continue;
            }
            if ((ret != -EAGAIN && ret != -ENOMEM) || !progress_is_coming(s)) {
                return ret == -EAGAIN ? -ENOMEM : ret;
            }
            s->stats.waits += !waited;
            waited = true;
            wait_for_progress(s);
        }
    }
    if (!timer_pending(s->timer)) {
        seqcache_arm_timer(bs);
    }
    return 0;
}

/* The data is what the node reads as already: for the child, not for us. */
static int coroutine_fn write_unchanged(BlockDriverState *bs, int64_t offset,
                                        int64_t bytes, QEMUIOVector *qiov,
                                        size_t qiov_offset)
{
    Exclusive x;
    int ret;

    exclusive_begin(bs, &x, offset, bytes);
    ret = bdrv_co_pwritev_part(bs->file, offset, bytes, qiov, qiov_offset,
                               BDRV_REQ_WRITE_UNCHANGED);
    exclusive_end(bs, &x);
    return ret;
}

static int coroutine_fn seqcache_co_pwritev_part(BlockDriverState *bs,
                                                 int64_t offset, int64_t bytes,
                                                 QEMUIOVector *qiov,
                                                 size_t qiov_offset,
                                                 BdrvRequestFlags flags)
{
    if (flags & BDRV_REQ_WRITE_UNCHANGED) {
        return write_unchanged(bs, offset, bytes, qiov, qiov_offset);
    }
    return write_cached(bs, offset, bytes, qiov, qiov_offset);
}

static int coroutine_fn
seqcache_co_pwritev_compressed_part(BlockDriverState *bs, int64_t offset,
                                    int64_t bytes, QEMUIOVector *qiov,
                                    size_t qiov_offset)
{
    BDRVSeqcacheState *s = bs->opaque;
    Exclusive x;
    int ret;

    if (s->opts.compress && bytes > 0) {
        return write_cached(bs, offset, bytes, qiov, qiov_offset);
    }
    if (s->error) {
        return tell_error(s);
    }
    if (bytes == 0) {
        /* Some formats take this as the end of a stream. */
        return bdrv_co_pwritev_part(bs->file, offset, 0, qiov, qiov_offset,
                                    BDRV_REQ_WRITE_COMPRESSED);
    }
    exclusive_begin(bs, &x, offset, bytes);
    ret = bdrv_co_pwritev_part(bs->file, offset, bytes, qiov, qiov_offset,
                               BDRV_REQ_WRITE_COMPRESSED);
    if (ret >= 0) {
        bale_seqcache_discard(s->cache, offset, bytes);
        s->data_end = MAX(s->data_end, (uint64_t)(offset + bytes));
    }
    exclusive_end(bs, &x);
    return ret;
}

typedef struct Gap {
    size_t pos; /* from the start of the request */
    size_t len;
} Gap;

/*
 * Read less than a block. The child reads the whole block for it anyway; so do
 * we, and remember it if nothing can have changed it meanwhile.
 */
static int coroutine_fn read_small(BlockDriverState *bs, int64_t offset,
                                   size_t bytes, QEMUIOVector *qiov,
                                   size_t qiov_offset)
{
    BDRVSeqcacheState *s = bs->opaque;
    int64_t block = QEMU_ALIGN_DOWN(offset, s->edge_bytes);
    size_t span = ROUND_UP(offset + bytes, s->edge_bytes) - block;
    uint64_t changes = s->edge_changes;
    uint8_t *bounce = qemu_try_blockalign(bs->file->bs, span);
    int ret;

    if (!bounce) {
        return bdrv_co_preadv_part(bs->file, offset, bytes, qiov, qiov_offset,
                                   0);
    }
    ret = bdrv_co_pread(bs->file, block, span, bounce, 0);
    if (ret >= 0) {
        qemu_iovec_from_buf(qiov, qiov_offset, bounce + (offset - block),
                            bytes);
        for (size_t at = 0; at < span && changes == s->edge_changes;
             at += s->edge_bytes) {
            edges_remember(s, block + at, bounce + at);
        }
    }
    qemu_vfree(bounce);
    return ret;
}

/* Read @n gaps from the child, in one go if they are close together. */
static int coroutine_fn read_gaps(BlockDriverState *bs, int64_t offset,
                                  QEMUIOVector *qiov, size_t qiov_offset,
                                  const Gap *gaps, unsigned n,
                                  BdrvRequestFlags flags)
{
    BDRVSeqcacheState *s = bs->opaque;
    uint8_t *bounce = NULL;
    size_t span;
    int ret = 0;

    if (n == 0) {
        return 0;
    }
    span = gaps[n - 1].pos + gaps[n - 1].len - gaps[0].pos;
    if (n > 1 && span <= MAX_READ_BOUNCE_BYTES) {
        bounce = qemu_try_blockalign(bs->file->bs, span);
    }
    if (bounce) {
        s->stats.child_reads++;
        ret = bdrv_co_pread(bs->file, offset + gaps[0].pos, span, bounce, 0);
        for (unsigned i = 0; i < n && ret >= 0; i++) {
            qemu_iovec_from_buf(qiov, qiov_offset + gaps[i].pos,
                                bounce + gaps[i].pos - gaps[0].pos,
                                gaps[i].len);
        }
        qemu_vfree(bounce);
        return ret;
    }
    if (n == 1 && gaps[0].len < s->edge_bytes && s->edge_data) {
        s->stats.child_reads++;
        return read_small(bs, offset + gaps[0].pos, gaps[0].len, qiov,
                          qiov_offset + gaps[0].pos);
    }
    for (unsigned i = 0; i < n && ret >= 0; i++) {
        s->stats.child_reads++;
        ret = bdrv_co_preadv_part(bs->file, offset + gaps[i].pos, gaps[i].len,
                                  qiov, qiov_offset + gaps[i].pos, flags);
    }
    return ret;
}

/*
 * Cached bytes are copied before the child is asked for the rest: a byte that
 * is no gap at that moment may be on its way down, and the child's answer for
 * it older.
 */
static int coroutine_fn seqcache_co_preadv_part(BlockDriverState *bs,
                                                int64_t offset, int64_t bytes,
                                                QEMUIOVector *qiov,
                                                size_t qiov_offset,
                                                BdrvRequestFlags flags)
{
    BDRVSeqcacheState *s = bs->opaque;

    while (bytes > 0) {
        Gap gaps[MAX_READ_GAPS];
        unsigned n = 0;
        size_t pos = 0, run;
        int ret;

        while ((int64_t)pos < bytes && n < MAX_READ_GAPS) {
            if (!bale_seqcache_read(s->cache, offset + pos, bytes - pos,
                                    qiov->iov, qiov->niov, qiov_offset + pos,
                                    &run)) {
                gaps[n++] = (Gap){ .pos = pos, .len = run };
            }
            pos += run;
        }
        ret = read_gaps(bs, offset, qiov, qiov_offset, gaps, n, flags);
        if (ret < 0) {
            return ret;
        }
        offset += pos;
        bytes -= pos;
        qiov_offset += pos;
    }
    return 0;
}

static int coroutine_fn seqcache_co_pwrite_zeroes(BlockDriverState *bs,
                                                  int64_t offset,
                                                  int64_t bytes,
                                                  BdrvRequestFlags flags)
{
    BDRVSeqcacheState *s = bs->opaque;
    bool whole = QEMU_IS_ALIGNED(offset | bytes, s->opts.cluster_bytes);
    Exclusive x;
    int ret;

    if (s->error) {
        return tell_error(s);
    }
    if (!whole &&
        !(flags & (BDRV_REQ_NO_FALLBACK | BDRV_REQ_WRITE_UNCHANGED))) {
        /* The block layer then writes zeroes, which merge in the cache. */
        return -ENOTSUP;
    }
    exclusive_begin(bs, &x, offset, bytes);
    ret = bdrv_co_pwrite_zeroes(bs->file, offset, bytes, flags);
    if (ret >= 0) {
        bale_seqcache_discard(s->cache, offset, bytes);
        s->data_end = MAX(s->data_end, (uint64_t)(offset + bytes));
    }
    exclusive_end(bs, &x);
    return ret;
}

/*
 * A discard may do nothing, so bytes stay cached unless the child really
 * discarded the whole cluster: otherwise older ones would show.
 */
static int coroutine_fn seqcache_co_pdiscard(BlockDriverState *bs,
                                             int64_t offset, int64_t bytes)
{
    BDRVSeqcacheState *s = bs->opaque;
    BlockDriverState *child = bs->file->bs;
    int64_t start = ROUND_UP(offset, s->opts.cluster_bytes);
    int64_t end = QEMU_ALIGN_DOWN(offset + bytes, s->opts.cluster_bytes);
    Exclusive x;
    int ret;

    if (!(child->open_flags & BDRV_O_UNMAP)) {
        return 0;
    }
    exclusive_begin(bs, &x, offset, bytes);
    /* Discarding what does not exist yet would leave the child too short. */
    end = MIN(end, QEMU_ALIGN_DOWN(child_end(bs), s->opts.cluster_bytes));
    ret = bdrv_co_pdiscard(bs->file, offset, bytes);
    if (ret == 0 && start < end && child->drv->bdrv_co_pdiscard) {
        bale_seqcache_discard(s->cache, start, end - start);
    }
    exclusive_end(bs, &x);
    return ret;
}

static int coroutine_fn seqcache_co_truncate(BlockDriverState *bs,
                                             int64_t offset, bool exact,
                                             PreallocMode prealloc,
                                             BdrvRequestFlags flags,
                                             Error **errp)
{
    BDRVSeqcacheState *s = bs->opaque;
    int64_t first = MIN(offset, child_end(bs));
    Exclusive x;
    int ret;

    exclusive_begin(bs, &x, first, UINT64_MAX);
    ret = bdrv_co_truncate(bs->file, offset, exact, prealloc, flags, errp);
    if (ret >= 0) {
        bale_seqcache_discard(s->cache, offset, UINT64_MAX - offset);
        s->data_end = MIN(s->data_end, (uint64_t)offset);
    }
    exclusive_end(bs, &x);
    return ret;
}

static int64_t seqcache_getlength(BlockDriverState *bs)
{
    BDRVSeqcacheState *s = bs->opaque;
    int64_t len = bdrv_getlength(bs->file->bs);

    return len < 0 ? len : MAX(len, (int64_t)s->data_end);
}

/*
 * The status of @bytes bytes that are not cached: the child's, which must not
 * say that this is the end where it is not ours.
 */
static int gap_status(BlockDriverState *bs, int64_t offset, int64_t bytes,
                      int64_t *pnum, int64_t *map, BlockDriverState **file)
{
    BDRVSeqcacheState *s = bs->opaque;
    int64_t end = child_end(bs);

    *pnum = bytes;
    if (offset >= end) {
        /* Nothing was ever written between the child's end and ours. */
        return BDRV_BLOCK_ZERO;
    }
    if ((int64_t)s->data_end > end && offset + bytes >= end) {
        if (end - offset <= (int64_t)BDRV_SECTOR_SIZE) {
            *pnum = end - offset;
            return BDRV_BLOCK_DATA;
        }
        *pnum = end - BDRV_SECTOR_SIZE - offset;
    }
    *map = offset;
    *file = bs->file->bs;
    return BDRV_BLOCK_RAW | BDRV_BLOCK_OFFSET_VALID;
}

/*
 * Cached bytes are data. Answers are in whole sectors, as everything above
 * expects; a sector with any cached byte counts as cached.
 */
static int coroutine_fn seqcache_co_block_status(
    BlockDriverState *bs, bool want_zero, int64_t offset, int64_t bytes,
    int64_t *pnum, int64_t *map, BlockDriverState **file)
{
    BDRVSeqcacheState *s = bs->opaque;
    int64_t start = QEMU_ALIGN_DOWN(offset, BDRV_SECTOR_SIZE);
    int64_t end = offset + bytes, pos = start;
    uint64_t run;

    if (!bale_seqcache_lookup(s->cache, start, end - start, &run)) {
        pos = start + run;
        if (pos < end) {
            pos = QEMU_ALIGN_DOWN(pos, BDRV_SECTOR_SIZE);
        }
        if (pos > offset) {
            return gap_status(bs, offset, pos - offset, pnum, map, file);
        }
    }
    /* The sector at pos has cached bytes. */
    while (pos < end) {
        bool cached = bale_seqcache_lookup(s->cache, pos, end - pos, &run);

        if (!cached && run >= BDRV_SECTOR_SIZE) {
            break;
        }
        pos = ROUND_UP(pos + run + (cached ? 0 : 1), BDRV_SECTOR_SIZE);
    }
    *pnum = MIN(pos, end) - offset;
    return BDRV_BLOCK_DATA;
}

/* ---------------------------------------------------- drain and AioContext */

static void coroutine_fn seqcache_co_drain_begin(BlockDriverState *bs)
{
    BDRVSeqcacheState *s = bs->opaque;

    s->drains++;
    timer_del(s->timer);
    /* Each write-out that ends starts the next, and all are in flight. */
    seqcache_kick(bs, false);
}

static void coroutine_fn seqcache_co_drain_end(BlockDriverState *bs)
{
    BDRVSeqcacheState *s = bs->opaque;

    assert(s->drains > 0);
    s->drains--;
    seqcache_arm_timer(bs);
}

static void seqcache_detach_aio_context(BlockDriverState *bs)
{
    BDRVSeqcacheState *s = bs->opaque;

    assert(s->write_outs == 0);
    timer_free(s->timer);
    s->timer = NULL;
}

static void seqcache_attach_aio_context(BlockDriverState *bs,
                                        AioContext *new_context)
{
    BDRVSeqcacheState *s = bs->opaque;

    s->timer = aio_timer_new(new_context, QEMU_CLOCK_REALTIME, SCALE_NS,
                             timer_cb, bs);
    seqcache_arm_timer(bs);
}

/* ------------------------------------------------------- open, close, perms */

static QemuOptsList runtime_opts = {
    .name = "seqcache",
    .head = QTAILQ_HEAD_INITIALIZER(runtime_opts.head),
    .desc = {
        {
            .name = OPT_CLUSTER_SIZE,
            .type = QEMU_OPT_SIZE,
            .help = "unit of caching and writing out (default: the cluster "
                    "size of the node below, or 64k)",
        },
        {
            .name = OPT_CACHE_SIZE,
            .type = QEMU_OPT_SIZE,
            .help = "memory for cached data (default: 16M, at least 16 "
                    "clusters)",
        },
        {
            .name = OPT_MAX_STREAMS,
            .type = QEMU_OPT_NUMBER,
            .help = "incomplete clusters that wait for more (default: 64)",
        },
        {
            .name = OPT_FLUSH_INTERVAL,
            .type = QEMU_OPT_NUMBER,
            .help = "milliseconds after which cached data is written out; 0: "
                    "no limit (default: 5000)",
        },
        {
            .name = OPT_COMPRESS,
            .type = QEMU_OPT_BOOL,
            .help = "write whole clusters down compressed (default: off)",
        },
        { /* end of list */ }
    },
};

static uint64_t default_cluster_bytes(BlockDriverState *child)
{
    BlockDriverInfo bdi;
    uint64_t bytes = DEFAULT_CLUSTER_BYTES;

    if (bdrv_get_info(child, &bdi) >= 0 && bdi.cluster_size > 0 &&
        is_power_of_2(bdi.cluster_size)) {
        bytes = bdi.cluster_size;
    }
    return MIN(MAX(bytes, child_align(child)),
               BALE_SEQCACHE_MAX_CLUSTER_BYTES);
}

static bool check_range(const char *name, uint64_t value, uint64_t min,
                        uint64_t max, Error **errp)
{
    if (value < min || value > max) {
        error_setg(errp, "'%s' must be between %" PRIu64 " and %" PRIu64, name,
                   min, max);
        return false;
    }
    return true;
}

/* Take our options out of @options and check them against the child. */
static bool absorb_options(SeqcacheOptions *o, QDict *options,
                           BlockDriverState *child, Error **errp)
{
    QemuOpts *opts = qemu_opts_create(&runtime_opts, NULL, 0, &error_abort);
    uint64_t min_cluster = MAX(BALE_SEQCACHE_MIN_CLUSTER_BYTES,
                               child_align(child));
    BlockDriverInfo bdi;
    bool ok = false;

    if (!qemu_opts_absorb_qdict(opts, options, errp)) {
        goto out;
    }
    o->cluster_bytes = qemu_opt_get_size(opts, OPT_CLUSTER_SIZE,
                                         default_cluster_bytes(child));
    o->cache_bytes =
        qemu_opt_get_size(opts, OPT_CACHE_SIZE,
                          MAX(DEFAULT_CACHE_BYTES,
                              DEFAULT_CACHE_CLUSTERS * o->cluster_bytes));
    o->max_streams = qemu_opt_get_number(opts, OPT_MAX_STREAMS,
                                         DEFAULT_MAX_STREAMS);
    o->flush_interval_ms = qemu_opt_get_number(opts, OPT_FLUSH_INTERVAL,
                                               DEFAULT_FLUSH_INTERVAL_MS);
    o->compress = qemu_opt_get_bool(opts, OPT_COMPRESS, false);

    if (!is_power_of_2(o->cluster_bytes) || o->cluster_bytes < min_cluster ||
        o->cluster_bytes > BALE_SEQCACHE_MAX_CLUSTER_BYTES) {
        error_setg(errp,
                   "'" OPT_CLUSTER_SIZE "' must be a power of two between "
                   "%" PRIu64 " and %zu",
                   min_cluster, BALE_SEQCACHE_MAX_CLUSTER_BYTES);
        goto out;
    }
    if (!check_range(OPT_CACHE_SIZE, o->cache_bytes, 2 * o->cluster_bytes,
                     MAX_CACHE_BYTES, errp) ||
        !check_range(OPT_MAX_STREAMS, o->max_streams, 1,
                     BALE_SEQCACHE_MAX_STREAMS, errp) ||
        !check_range(OPT_FLUSH_INTERVAL, o->flush_interval_ms, 0,
                     MAX_FLUSH_INTERVAL_MS, errp)) {
        goto out;
    }
    if (o->compress) {
        if (!bdrv_supports_compressed_writes(child)) {
            error_setg(errp, "Node '%s' cannot write compressed clusters, "
                       "which '" OPT_COMPRESS "' needs",
                       bdrv_get_device_or_node_name(child));
            goto out;
        }
        if (bdrv_get_info(child, &bdi) >= 0 && bdi.cluster_size > 0 &&
            o->cluster_bytes % bdi.cluster_size != 0) {
            error_setg(errp, "With '" OPT_COMPRESS "', '" OPT_CLUSTER_SIZE
                       "' must be a multiple of the cluster size of node '%s', "
                       "which is %d",
                       bdrv_get_device_or_node_name(child), bdi.cluster_size);
            goto out;
        }
    }
    ok = true;

out:
    qemu_opts_del(opts);
    return ok;
}

static int seqcache_open(BlockDriverState *bs, QDict *options, int flags,
                         Error **errp)
{
    BDRVSeqcacheState *s = bs->opaque;
    BaleSeqcacheOptions o;
    GError *error = NULL;
    int ret;

    ret = bdrv_open_file_child(NULL, options, "file", bs, errp);
    if (ret < 0) {
        return ret;
    }
    if (!absorb_options(&s->opts, options, bs->file->bs, errp)) {
        return -EINVAL;
    }
    o = (BaleSeqcacheOptions){
        .cluster_bytes = s->opts.cluster_bytes,
        .align_bytes = MIN(MAX(bdrv_opt_mem_align(bs->file->bs),
                               child_align(bs->file->bs)),
                           BALE_SEQCACHE_MAX_ALIGN_BYTES),
        .max_bytes = s->opts.cache_bytes,
        .max_streams = s->opts.max_streams,
    };
    s->cache = bale_seqcache_new(&o, &error);
    if (!s->cache) {
        error_setg(errp, "%s", error->message);
        g_error_free(error);
        return -EINVAL;
    }
    qemu_co_queue_init(&s->progress);
    QLIST_INIT(&s->exclusives);
    edges_init(bs);
    seqcache_attach_aio_context(bs, bdrv_get_aio_context(bs));

    bs->supported_write_flags = BDRV_REQ_WRITE_UNCHANGED;
    bs->supported_zero_flags =
        BDRV_REQ_WRITE_UNCHANGED |
        ((BDRV_REQ_MAY_UNMAP | BDRV_REQ_NO_FALLBACK) &
         bs->file->bs->supported_zero_flags);
    bs->supported_truncate_flags = bs->file->bs->supported_truncate_flags &
                                   BDRV_REQ_ZERO_WRITE;
    return 0;
}

/* The block layer has flushed. What is cached now could not be written. */
static void seqcache_close(BlockDriverState *bs)
{
    BDRVSeqcacheState *s = bs->opaque;
    BaleSeqcacheStats st;

    bale_seqcache_get_stats(s->cache, &st);
    if (st.dirty_bytes > 0) {
        error_report("seqcache node '%s' is closed with %" PRIu64 " bytes that "
                     "could not be written back: they are lost%s%s",
                     bdrv_get_node_name(bs), st.dirty_bytes,
                     s->last_error ? "; " : "", s->last_error ?: "");
    }
    seqcache_detach_aio_context(bs);
    g_clear_pointer(&s->cache, bale_seqcache_free);
    g_clear_pointer(&s->last_error, g_free);
    g_clear_pointer(&s->flush_error, g_free);
    g_clear_pointer(&s->edge_data, g_free);
}

static int seqcache_inactivate(BlockDriverState *bs)
{
    BDRVSeqcacheState *s = bs->opaque;
    BaleSeqcacheStats st;
    int ret = bdrv_flush(bs);

    bale_seqcache_get_stats(s->cache, &st);
    return ret < 0 ? ret : st.dirty_bytes > 0 ? -EBUSY : 0;
}

static int seqcache_reopen_prepare(BDRVReopenState *state,
                                   BlockReopenQueue *queue, Error **errp)
{
    BDRVSeqcacheState *s = state->bs->opaque;
    g_autofree SeqcacheOptions *o = g_new0(SeqcacheOptions, 1);

    if (!absorb_options(o, state->options, state->bs->file->bs, errp)) {
        return -EINVAL;
    }
    if (o->cluster_bytes != s->opts.cluster_bytes) {
        error_setg(errp, "Cannot change the option '" OPT_CLUSTER_SIZE "'");
        return -EINVAL;
    }
    state->opaque = g_steal_pointer(&o);
    return 0;
}

static void seqcache_reopen_commit(BDRVReopenState *state)
{
    BDRVSeqcacheState *s = state->bs->opaque;
    SeqcacheOptions *o = state->opaque;

    s->opts = *o;
    bale_seqcache_set_limits(s->cache, o->cache_bytes, o->max_streams);
    seqcache_arm_timer(state->bs);
    g_free(o);
    state->opaque = NULL;
}

static void seqcache_reopen_abort(BDRVReopenState *state)
{
    g_free(state->opaque);
    state->opaque = NULL;
}

/*
 * As long as anything is cached we write to the child, even if no parent does
 * any more, and nobody else may.
 */
static void seqcache_child_perm(BlockDriverState *bs, BdrvChild *c,
                                BdrvChildRole role,
                                BlockReopenQueue *reopen_queue, uint64_t perm,
                                uint64_t shared, uint64_t *nperm,
                                uint64_t *nshared)
{
    BDRVSeqcacheState *s = bs->opaque;

    bdrv_default_perms(bs, c, role, reopen_queue, perm, shared, nperm, nshared);
    if (s->cache && bale_seqcache_oldest_seq(s->cache) != UINT64_MAX) {
        *nperm |= BLK_PERM_WRITE;
        if (c && (int64_t)s->data_end > child_end(bs)) {
            *nperm |= BLK_PERM_RESIZE;
        }
    }
    if (*nperm & BLK_PERM_WRITE) {
        *nshared &= ~(BLK_PERM_WRITE | BLK_PERM_RESIZE);
    }
}

static void seqcache_refresh_limits(BlockDriverState *bs, Error **errp)
{
    BDRVSeqcacheState *s = bs->opaque;

    bs->bl.request_alignment = 1;
    /* Whole clusters of zeroes go down; see seqcache_co_pwrite_zeroes(). */
    bs->bl.pwrite_zeroes_alignment = s->opts.cluster_bytes;
}

/* -------------------------------------------------------------- statistics */

static BlockDriver bdrv_seqcache;

bool bale_seqcache_is_node(BlockDriverState *bs)
{
    return bs->drv == &bdrv_seqcache &&
           ((BDRVSeqcacheState *)bs->opaque)->cache;
}

void bale_seqcache_node_stats(BlockDriverState *bs,
                              BaleSeqcacheNodeStats *stats)
{
    BDRVSeqcacheState *s = bs->opaque;

    *stats = s->stats;
    bale_seqcache_get_stats(s->cache, &stats->cache);
    stats->cluster_bytes = s->opts.cluster_bytes;
    stats->max_streams = s->opts.max_streams;
    stats->flush_interval_ms = s->opts.flush_interval_ms;
    stats->compress = s->opts.compress;
    stats->error = -s->error;
    stats->error_message = s->error ? g_strdup(s->last_error) : NULL;
}

void bale_seqcache_node_reset_stats(BlockDriverState *bs)
{
    BDRVSeqcacheState *s = bs->opaque;

    memset(&s->stats, 0, sizeof(s->stats));
    bale_seqcache_reset_stats(s->cache);
}

char *bale_seqcache_node_flush_error(BlockDriverState *bs)
{
    BDRVSeqcacheState *s = bs->opaque;

    return g_strdup(s->flush_error);
}

/* -------------------------------------------------------------- the driver */

static const char *const seqcache_strong_runtime_opts[] = {
    OPT_CLUSTER_SIZE,
    OPT_COMPRESS,
    NULL
};

static BlockDriver bdrv_seqcache = {
    .format_name                     = BALE_SEQCACHE_FORMAT_NAME,
    .instance_size                   = sizeof(BDRVSeqcacheState),
    .is_filter                       = true,
    .has_variable_length             = true,
    .strong_runtime_opts             = seqcache_strong_runtime_opts,

    .bdrv_open                       = seqcache_open,
    .bdrv_close                      = seqcache_close,
    .bdrv_inactivate                 = seqcache_inactivate,
    .bdrv_reopen_prepare             = seqcache_reopen_prepare,
    .bdrv_reopen_commit              = seqcache_reopen_commit,
    .bdrv_reopen_abort               = seqcache_reopen_abort,
    .bdrv_child_perm                 = seqcache_child_perm,
    .bdrv_refresh_limits             = seqcache_refresh_limits,
    .bdrv_getlength                  = seqcache_getlength,

    .bdrv_co_preadv_part             = seqcache_co_preadv_part,
    .bdrv_co_pwritev_part            = seqcache_co_pwritev_part,
    .bdrv_co_pwritev_compressed_part = seqcache_co_pwritev_compressed_part,
    .bdrv_co_pwrite_zeroes           = seqcache_co_pwrite_zeroes,
    .bdrv_co_pdiscard                = seqcache_co_pdiscard,
    .bdrv_co_truncate                = seqcache_co_truncate,
    .bdrv_co_flush_to_os             = seqcache_co_flush_to_os,
    .bdrv_co_block_status            = seqcache_co_block_status,

    .bdrv_co_drain_begin             = seqcache_co_drain_begin,
    .bdrv_co_drain_end               = seqcache_co_drain_end,
    .bdrv_detach_aio_context         = seqcache_detach_aio_context,
    .bdrv_attach_aio_context         = seqcache_attach_aio_context,
};

static void seqcache_register(void)
{
    bdrv_register(&bdrv_seqcache);
}

block_init(seqcache_register);
