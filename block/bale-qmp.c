/*
 * The QMP commands of the format driver "bale" (qapi/bale.json).
 *
 * They run in the main loop's thread and take a node's AioContext while they
 * touch it.  What blocks runs in a coroutine, which counts as a request of the
 * node, so that it stays.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "qemu/osdep.h"
#include "block/block_int.h"
#include "qapi/error.h"
#include "qemu/job.h"
#include "qemu/uuid.h"

#include "extstore/store.h"

#include "bale-bridge-internal.h"
#include "bale-control-internal.h"
#include "bale-internal.h"
#include "bale-qapi-commands-bale.h"
#include "qmp-node-internal.h"

static bool is_bale(BlockDriverState *bs)
{
    return bale_bs_store(bs);
}

static const BaleQmpDriver bale_driver = { BALE_FORMAT_NAME, is_bale };

BlockDriverState *bale_find_node(const char *node_name, Error **errp)
{
    return bale_qmp_find_node(node_name, &bale_driver, errp);
}

/* --- query-bale --- */

static BaleNodeHistogramBucketList *list_buckets(const uint64_t *counts)
{
    BaleNodeHistogramBucketList *list = NULL;

    for (unsigned i = BALE_HIST_BUCKETS; i-- > 0;) {
        if (counts[i] > 0) {
            BaleNodeHistogramBucket *b = g_new0(BaleNodeHistogramBucket, 1);

            b->limit = (2ull << i) - 1;
            b->count = counts[i];
            QAPI_LIST_PREPEND(list, b);
        }
    }
    return list;
}

static BaleNodeLatency *get_latency(const BaleLatency *in)
{
    BaleNodeLatency *out = g_new0(BaleNodeLatency, 1);

    out->count = in->count;
    out->sum = in->sum;
    out->mean = in->mean;
    out->p50 = in->p50;
    out->p95 = in->p95;
    out->p99 = in->p99;
    out->max = in->max;
    return out;
}

/*
 * A member of BaleStoreStats and of BaleNodeStats with the same name.  A test
 * compares the lists: what is added to the one belongs into the other.
 */
#define COPY(member) out->member = in->member

static BaleNodeStats *get_stats(BaleStore *store)
{
    g_autofree BaleStoreStats *in = g_new0(BaleStoreStats, 1);
    BaleNodeStats *out = g_new0(BaleNodeStats, 1);

    bale_store_get_stats(store, in);
    COPY(tail_bytes);
    COPY(sealed_bytes);
    COPY(stable_bytes);
    COPY(durable_bytes);
    COPY(mutable_clusters);
    COPY(mutable_bytes);
    COPY(pages_free);
    COPY(pages_active);
    COPY(pages_sealed);
    COPY(pages_freeing);
    COPY(live_bytes);
    COPY(used_bytes);
    COPY(dead_bytes);
    COPY(overhead_bytes);
    COPY(records_appended);
    COPY(zero_records);
    COPY(patches);
    COPY(patch_bytes);
    COPY(patches_live);
    COPY(patches_live_bytes);
    COPY(logical_bytes);
    COPY(stored_bytes);
    COPY(segments);
    COPY(segment_bytes);
    COPY(padding_bytes);
    COPY(ahead_bytes);
    COPY(flushes);
    COPY(device_flushes);
    COPY(revivals);
    COPY(write_amplification_permille);
    COPY(reads);
    COPY(read_bytes);
    COPY(writes);
    COPY(write_bytes);
    COPY(zeroes);
    COPY(zero_bytes);
    COPY(reads_held);
    COPY(reads_at_once);
    COPY(read_modify_writes);
    COPY(memory_hits);
    COPY(incompressible);
    COPY(unchanged_clusters);
    COPY(checksum_errors);
    COPY(cache_hits);
    COPY(cache_misses);
    COPY(cache_admissions);
    COPY(cache_rejections);
    COPY(cache_entries);
    COPY(cache_bytes);
    COPY(cache_max_bytes);
    COPY(readahead);
    COPY(readahead_bytes);
    COPY(readahead_hits);
    COPY(checkpoints);
    COPY(checkpoint_bytes);
    COPY(checkpoint_kept_bytes);
    COPY(checkpoint_ns);
    COPY(checkpoints_failed);
    COPY(compacted_pages);
    COPY(compacted_records);
    COPY(compacted_bytes);
    COPY(compact_examined_bytes);
    COPY(compact_running);
    COPY(compact_pending_bytes);
    COPY(compact_paced_ns);
    COPY(writes_held_ns);
    COPY(space_waits);
    COPY(index_entries);
    COPY(index_bytes);
    COPY(index_peak_bytes);
    COPY(index_buckets);
    COPY(index_overflow_buckets);
    COPY(index_load_permille);
    COPY(index_growing);
    COPY(index_growths);
    COPY(index_rebuilds);
    COPY(index_shrinks);
    COPY(index_waits);
    COPY(epoch);
    COPY(epoch_pending);
    COPY(epoch_readers);
    COPY(epoch_executed);
    COPY(reads_in_flight);
    COPY(writes_in_flight);
    COPY(workers);
    COPY(workers_running);
    COPY(workers_queued);
    COPY(write_buffers);
    COPY(write_buffers_in_flight);
    COPY(write_buffers_waits);
    for (unsigned i = BALE_STATS_BUCKETS; i-- > 0;) {
        BaleNodeBucket *b = g_new0(BaleNodeBucket, 1);

        b->pages = in->buckets[i].pages;
        b->live_bytes = in->buckets[i].live_bytes;
        b->dead_bytes = in->buckets[i].dead_bytes;
        QAPI_LIST_PREPEND(out->buckets, b);
    }
    out->read_latency = get_latency(&in->read_latency);
    out->write_latency = get_latency(&in->write_latency);
    out->flush_latency = get_latency(&in->flush_latency);
    out->read_ns = list_buckets(in->read_ns);
    out->write_ns = list_buckets(in->write_ns);
    out->flush_ns = list_buckets(in->flush_ns);
    return out;
}

static BaleNodeStore *get_store(BaleStore *store)
{
    BaleNodeStore *out = g_new0(BaleNodeStore, 1);
    BaleStoreInfo in;
    QemuUUID uuid;

    bale_store_get_info(store, &in);
    memcpy(uuid.data, in.uuid, sizeof(uuid.data));
    out->uuid = qemu_uuid_unparse_strdup(&uuid);
    out->version = in.version;
    out->cluster_size = in.cluster_size;
    out->page_size = in.page_size;
    out->max_size = in.max_size;
    out->generation = in.generation;
    out->clean = in.clean;
    out->corrupt = in.corrupt;
    out->read_only = in.read_only;
    out->failed = in.poisoned;
    out->recovered_records = in.recovered_records;
    out->torn_bytes = in.torn_bytes;
    out->damaged_records = in.damaged_records;
    return out;
}

static BaleNodeImage *get_image(BaleImage *image)
{
    g_autofree BaleImageInfo *in = g_new0(BaleImageInfo, 1);
    BaleNodeImage *out = g_new0(BaleNodeImage, 1);

    bale_image_get_info(image, in);
    out->has_name = in->name[0];
    out->name = out->has_name ? g_strdup(in->name) : NULL;
    out->size = in->size;
    out->compression_type = g_strdup(bale_codec_name(in->codec));
    out->compression_level = in->level;
    out->has_backing_file = in->has_backing_file;
    out->backing_file = in->has_backing_file ? g_strdup(in->backing_file)
                                             : NULL;
    out->has_backing_format = in->has_backing_file && in->backing_format[0];
    out->backing_format = out->has_backing_format
                              ? g_strdup(in->backing_format)
                              : NULL;
    out->allocated_clusters = in->allocated_clusters;
    return out;
}

static BaleNodeInfo *get_info(BlockDriverState *bs)
{
    BaleNodeInfo *info = g_new0(BaleNodeInfo, 1);
    BaleControl *control = bale_bs_control(bs);
    BaleStore *store = bale_bs_store(bs);
    BaleJob *job = bale_bs_job(bs);

    info->node_name = g_strdup(bdrv_get_node_name(bs));
    info->file_node_name = g_strdup(bdrv_get_node_name(bs->file->bs));
    info->store = get_store(store);
    info->image = get_image(bale_bs_image(bs));
    info->stats = get_stats(store);
    info->has_job = job != NULL;
    info->job = job ? g_strdup(bale_job_id(job)) : NULL;
    info->speed = qatomic_read(&control->speed);
    info->space_threshold = control->space_threshold;
    info->compact = !bale_bs_space(bs)->compact_off;
    info->compact_rate = bale_bs_space(bs)->compact_rate;
    return info;
}

static void add_info(BlockDriverState *bs, void *opaque)
{
    BaleNodeInfoList ***tail = opaque;

    QAPI_LIST_APPEND(*tail, get_info(bs));
}

BaleNodeInfoList *qmp_query_bale(bool has_node_name, const char *node_name,
                                 Error **errp)
{
    BaleNodeInfoList *list = NULL, **tail = &list;

    bale_qmp_for_nodes(has_node_name ? node_name : NULL, &bale_driver,
                       add_info, &tail, errp);
    return list;
}

/* --- flush, checkpoint --- */

void coroutine_fn qmp_bale_flush(const char *node_name, Error **errp)
{
    BlockDriverState *bs = bale_find_node(node_name, errp);
    AioContext *old_ctx;
    int ret;

    if (!bs) {
        return;
    }
    /* Between enter and leave the node has a request in flight, and stays. */
    old_ctx = bdrv_co_enter(bs);
    ret = bdrv_co_flush(bs);
    if (ret == 0 && bale_store_poisoned(bale_bs_store(bs))) {
        /* The block layer knows of nothing to flush, the engine does. */
        ret = bs->drv->bdrv_co_flush_to_disk(bs);
    }
    bdrv_co_leave(bs, old_ctx);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Could not flush node '%s'", node_name);
    }
}

typedef struct CheckpointRun {
    BaleStore *store;
    GError *err;
    bool ok;
} CheckpointRun;

static void checkpoint_blocking(void *opaque)
{
    CheckpointRun *run = opaque;

    run->ok = bale_store_checkpoint_running(run->store, &run->err);
}

void coroutine_fn qmp_bale_checkpoint(const char *node_name, Error **errp)
{
    BlockDriverState *bs = bale_find_node(node_name, errp);
    CheckpointRun run = { 0 };
    AioContext *old_ctx;

    if (!bs) {
        return;
    }
    if (bdrv_is_read_only(bs) || (bs->open_flags & BDRV_O_INACTIVE)) {
        error_setg(errp, "Node '%s' is %s", node_name,
                   bdrv_is_read_only(bs) ? "read-only" : "inactive");
        return;
    }
    old_ctx = bdrv_co_enter(bs);
    run.store = bale_bs_store(bs);
    bale_bs_run(bs, checkpoint_blocking, &run);
    bdrv_co_leave(bs, old_ctx);
    if (!run.ok) {
        bale_bridge_error(run.err, errp);
        error_prepend(errp, "Node '%s': ", node_name);
    }
}

/* --- the others --- */

static void reset_stats(BlockDriverState *bs, void *opaque)
{
    bale_store_reset_stats(bale_bs_store(bs));
}

void qmp_bale_reset_stats(const char *node_name, Error **errp)
{
    bale_qmp_for_nodes(node_name, &bale_driver, reset_stats, NULL, errp);
}

static void start_job(const char *job_id, const char *node_name,
                      BaleJobKind kind, const char *image, bool has_speed,
                      uint64_t speed, bool auto_finalize, bool auto_dismiss,
                      Error **errp)
{
    BlockDriverState *bs = bale_find_node(node_name, errp);
    int flags = (auto_finalize ? 0 : JOB_MANUAL_FINALIZE) |
                (auto_dismiss ? 0 : JOB_MANUAL_DISMISS);
    AioContext *ctx;

    if (!bs) {
        return;
    }
    ctx = bdrv_get_aio_context(bs);
    aio_context_acquire(ctx);
    bale_job_start(job_id, bs, kind, image, flags,
                   has_speed ? speed
                             : qatomic_read(&bale_bs_control(bs)->speed),
                   errp);
    aio_context_release(ctx);
}

void qmp_bale_compact(const char *job_id, const char *node_name,
                      bool has_speed, uint64_t speed, bool has_auto_finalize,
                      bool auto_finalize, bool has_auto_dismiss,
                      bool auto_dismiss, Error **errp)
{
    start_job(job_id, node_name, BALE_JOB_COMPACT, NULL, has_speed, speed,
              !has_auto_finalize || auto_finalize,
              !has_auto_dismiss || auto_dismiss, errp);
}

void qmp_bale_verify(const char *job_id, const char *node_name,
                     bool has_speed, uint64_t speed, bool has_auto_finalize,
                     bool auto_finalize, bool has_auto_dismiss,
                     bool auto_dismiss, Error **errp)
{
    start_job(job_id, node_name, BALE_JOB_VERIFY, NULL, has_speed, speed,
              !has_auto_finalize || auto_finalize,
              !has_auto_dismiss || auto_dismiss, errp);
}

void qmp_bale_image_flatten(const char *job_id, const char *node_name,
                            const char *image, bool has_auto_finalize,
                            bool auto_finalize, bool has_auto_dismiss,
                            bool auto_dismiss, Error **errp)
{
    start_job(job_id, node_name, BALE_JOB_FLATTEN, image, false, 0,
              !has_auto_finalize || auto_finalize,
              !has_auto_dismiss || auto_dismiss, errp);
}
