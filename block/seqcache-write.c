/*
 * How a seqcache node writes out: which clusters, together with which, in what
 * order, and when. The rules are at the top of seqcache.c.
 *
 * A write-out that begins or ends inside a block of the child would make the
 * child read that block, merge and write it. So the blocks at such ends are
 * remembered ("edges"): the next write-out that continues there writes whole
 * blocks, of its own bytes and of those remembered. All that changes the child
 * goes through seqcache_edges_forget().
 *
 * Threads: everything runs in the node's AioContext.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "seqcache-node-internal.h"

#include "qapi/error.h"
#include "qemu/error-report.h"
#include "qemu/main-loop.h"
#include "qemu/memalign.h"

/* Of MAX_WRITE_OUTS, begun with open clusters because the cache is full. */
#define MAX_EVICTIONS 8

/* Neighbouring clusters are written in one request up to these. */
#define BATCH_BYTES        (1 * MiB)
#define MAX_BATCH_CLUSTERS 64
/* How long a finished cluster waits for a whole batch. */
#define BATCH_DELAY_NS (50 * SCALE_MS)

/* A remembered block, at most. */
#define EDGE_BYTES 4096

/* The background flusher never runs more often. */
#define MIN_TIMER_NS (10 * SCALE_MS)

typedef struct WriteOut {
    BlockDriverState *bs;
    unsigned n;
    BaleSeqcacheOut *outs[]; /* neighbours; if several, complete ones */
} WriteOut;

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
int seqcache_tell_error(BDRVSeqcacheState *s)
{
    s->error_told |= s->error != 0;
    return s->error;
}

/* -------------------------------------------------------------------- edges */

void seqcache_edges_init(BlockDriverState *bs)
{
    BDRVSeqcacheState *s = bs->opaque;
    size_t align = seqcache_child_align(bs->file->bs);

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
void seqcache_edges_forget(BDRVSeqcacheState *s, int64_t offset, int64_t bytes)
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
void seqcache_edges_remember(BDRVSeqcacheState *s, int64_t offset,
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
    int64_t end = seqcache_child_end(bs);
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
    seqcache_edges_forget(s, offset, bytes);
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
            offset + bytes <= seqcache_child_end(bs));
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
    const size_t sizes[] = {
        s->edge_bytes,
        seqcache_child_align(bs->file->bs),
    };

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
    const size_t sizes[] = {
        s->edge_bytes,
        seqcache_child_align(bs->file->bs),
    };

    for (unsigned i = 0; i < ARRAY_SIZE(sizes); i++) {
        size_t tail = MIN(QEMU_ALIGN_UP(end, sizes[i]), limit);

        if (i == 0 && offset + (int64_t)tail > seqcache_child_end(bs)) {
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
        seqcache_edges_remember(s, offset + head, data + head);
    }
    if (tail < end && tail >= start && at_end && s->edge_data) {
        uint8_t block[EDGE_BYTES] = { 0 };

        memcpy(block, data + tail, end - tail);
        seqcache_edges_remember(s, offset + tail, block);
    } else if (tail == end && head + s->edge_bytes < tail) {
        seqcache_edges_remember(s, offset + tail - s->edge_bytes,
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
    size_t align = seqcache_child_align(bs->file->bs);
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
        at_end = offset + (int64_t)end >= seqcache_child_end(bs) &&
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
    int64_t begun_ns = seqcache_now_ns();
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
    bale_histogram_add(&s->stats.latency_ns, seqcache_now_ns() - begun_ns);
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
            (s->batch_due_ns && seqcache_now_ns() >= s->batch_due_ns));
}

/*
 * Start write-outs that are due. With @need_room also of unfinished clusters.
 * Does nothing after an error: then only a flush writes.
 */
void seqcache_kick(BlockDriverState *bs, bool need_room)
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
        s->batch_due_ns = seqcache_now_ns() + BATCH_DELAY_NS;
        seqcache_arm_timer(bs);
    }
}

/* Something is under way that will wake the progress queue when it ends. */
bool seqcache_progress_is_coming(BDRVSeqcacheState *s)
{
    return s->write_outs > 0 || !QLIST_EMPTY(&s->exclusives);
}

void coroutine_fn seqcache_wait_for_progress(BDRVSeqcacheState *s)
{
    assert(seqcache_progress_is_coming(s));
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
            s->error_count != error_count || !seqcache_progress_is_coming(s)) {
            break;
        }
        seqcache_wait_for_progress(s);
    }
    if (s->error_count != error_count) {
        return seqcache_tell_error(s);
    }
    if (bale_seqcache_oldest_seq(s->cache) <= target) {
        return err ?: -EIO;
    }

    bale_seqcache_get_stats(s->cache, &st);
    if (!s->error || st.failed_clusters > 0) {
        return seqcache_tell_error(s);
    }
    /* Well again. Say so once if nobody has heard of the error. */
    ret = s->error_told ? 0 : s->error;
    s->error = 0;
    s->error_told = false;
    seqcache_kick(bs, false);
    seqcache_arm_timer(bs);
    return ret;
}

int coroutine_fn seqcache_co_flush_to_os(BlockDriverState *bs)
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

void seqcache_arm_timer(BlockDriverState *bs)
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
        timer_mod_ns(s->timer, MAX(due_ns, seqcache_now_ns() + MIN_TIMER_NS));
    }
}

void seqcache_timer_cb(void *opaque)
{
    BlockDriverState *bs = opaque;
    BDRVSeqcacheState *s = bs->opaque;
    AioContext *ctx = bdrv_get_aio_context(bs);
    BaleSeqcacheOut *out;
    int64_t limit_ns;
    int err;

    aio_context_acquire(ctx);
    seqcache_kick(bs, false);
    limit_ns = seqcache_now_ns() -
               (int64_t)s->opts.flush_interval_ms * SCALE_MS;
    while (s->opts.flush_interval_ms > 0 && !s->error &&
           s->write_outs < MAX_WRITE_OUTS &&
           (out = bale_seqcache_begin_older(s->cache, limit_ns, &err))) {
        start_write_out(bs, out);
    }
    seqcache_arm_timer(bs);
    aio_context_release(ctx);
}
