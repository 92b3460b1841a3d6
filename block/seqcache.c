/*
 * The filter driver "seqcache": small unaligned writes reach the node below
 * as whole aligned clusters.
 *
 * The cache itself is util/seqcache; seqcache-write.c writes out. This file has
 * the requests, and orders them and what is written out against each other:
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
 * Threads: everything runs in the node's AioContext.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "seqcache-node-internal.h"

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

/* Gaps that one read looks up at a time, and the bounce buffer for them. */
#define MAX_READ_GAPS         64
#define MAX_READ_BOUNCE_BYTES (1 * MiB)

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
        seqcache_wait_for_progress(s);
    }
    QLIST_INSERT_HEAD(&s->exclusives, x, next);
    bale_seqcache_hold(s->cache, x->start, x->end - x->start);
    while (bale_seqcache_in_out(s->cache, x->start, x->end - x->start)) {
        s->stats.waits++;
        seqcache_wait_for_progress(s);
    }
    seqcache_edges_forget(s, x->start, MIN(x->end, INT64_MAX) - x->start);
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
            return seqcache_tell_error(s);
        }
        if (exclusive_overlaps(s, offset, offset + bytes)) {
            s->stats.waits += !waited;
            waited = true;
            seqcache_wait_for_progress(s);
            continue;
        }
        ret = bale_seqcache_write(s->cache, offset, qiov->iov, qiov->niov,
                                  qiov_offset, bytes, seqcache_now_ns(),
                                  &accepted);
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
            if ((ret != -EAGAIN && ret != -ENOMEM) ||
                !seqcache_progress_is_coming(s)) {
                return ret == -EAGAIN ? -ENOMEM : ret;
            }
            s->stats.waits += !waited;
            waited = true;
            seqcache_wait_for_progress(s);
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
        return seqcache_tell_error(s);
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
            seqcache_edges_remember(s, block + at, bounce + at);
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
        return seqcache_tell_error(s);
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
    end = MIN(end, QEMU_ALIGN_DOWN(seqcache_child_end(bs),
                                   s->opts.cluster_bytes));
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
    int64_t first = MIN(offset, seqcache_child_end(bs));
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
    int64_t end = seqcache_child_end(bs);

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
    if (!s->cache) {
        return; /* still opening: the child was drained when it was attached */
    }
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
                             seqcache_timer_cb, bs);
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
    return MIN(MAX(bytes, seqcache_child_align(child)),
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
                               seqcache_child_align(child));
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
                               seqcache_child_align(bs->file->bs)),
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
    seqcache_edges_init(bs);
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
        if (c && (int64_t)s->data_end > seqcache_child_end(bs)) {
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
