/*
 * The QMP commands of the filter driver "seqcache" (qapi/seqcache.json).
 *
 * They run in the main loop's thread and take a node's AioContext while they
 * touch it.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "seqcache-internal.h"

#include "qapi/error.h"
#include "bale-qapi-commands-seqcache.h"
#include "qmp-node-internal.h"

static const BaleQmpDriver seqcache_driver = {
    BALE_SEQCACHE_FORMAT_NAME, bale_seqcache_is_node,
};

static SeqcacheHistogramBucketList *list_buckets(const BaleHistogram *hist)
{
    SeqcacheHistogramBucketList *list = NULL;

    for (unsigned i = BALE_HISTOGRAM_BUCKETS; i-- > 0;) {
        uint64_t count = bale_histogram_bucket(hist, i);

        if (count > 0) {
            SeqcacheHistogramBucket *b = g_new0(SeqcacheHistogramBucket, 1);

            b->limit = bale_histogram_bucket_limit(i);
            b->count = count;
            QAPI_LIST_PREPEND(list, b);
        }
    }
    return list;
}

static SeqcacheInfo *get_info(BlockDriverState *bs)
{
    SeqcacheInfo *info = g_new0(SeqcacheInfo, 1);
    g_autofree BaleSeqcacheNodeStats *st = g_new0(BaleSeqcacheNodeStats, 1);

    bale_seqcache_node_stats(bs, st);
    info->node_name = g_strdup(bdrv_get_node_name(bs));
    info->child_node_name = g_strdup(bdrv_get_node_name(bs->file->bs));
    info->cluster_size = st->cluster_bytes;
    info->cache_size = st->cache.max_memory_bytes;
    info->max_streams = st->max_streams;
    info->flush_interval = st->flush_interval_ms;
    info->compress = st->compress;
    info->clusters_open = st->cache.open_clusters;
    info->clusters_finished = st->cache.finished_clusters;
    info->clusters_writing = st->cache.out_clusters;
    info->clusters_failed = st->cache.failed_clusters;
    info->bytes_cached = st->cache.memory_bytes;
    info->bytes_dirty = st->cache.dirty_bytes;
    info->bytes_writing = st->cache.out_bytes;
    info->writes_in = st->cache.writes;
    info->bytes_in = st->cache.write_bytes;
    info->writes_out = st->child_writes;
    info->bytes_out = st->child_write_bytes;
    info->write_outs = st->cache.outs;
    info->write_outs_whole = st->cache.outs_whole;
    info->write_outs_compressed = st->compressed_writes;
    info->write_outs_fallback = st->fallback_writes;
    info->merges = st->cache.merges;
    info->overwritten_bytes = st->cache.overwritten_bytes;
    info->read_hits = st->cache.read_hits;
    info->read_hit_bytes = st->cache.read_hit_bytes;
    info->reads_out = st->child_reads;
    info->read_modify_writes = st->read_modify_writes;
    info->displaced = st->cache.displaced;
    info->flushes = st->flushes;
    info->waits = st->waits;
    info->errors = st->errors;
    info->error = st->error_message;
    info->has_error = info->error != NULL;
    info->write_out_bytes = list_buckets(&st->size_bytes);
    info->write_out_ns = list_buckets(&st->latency_ns);
    return info;
}

static void add_info(BlockDriverState *bs, void *opaque)
{
    SeqcacheInfoList ***tail = opaque;

    QAPI_LIST_APPEND(*tail, get_info(bs));
}

SeqcacheInfoList *qmp_query_seqcache(bool has_node_name, const char *node_name,
                                     Error **errp)
{
    SeqcacheInfoList *list = NULL, **tail = &list;

    bale_qmp_for_nodes(has_node_name ? node_name : NULL, &seqcache_driver,
                       add_info, &tail, errp);
    return list;
}

void coroutine_fn qmp_seqcache_flush(const char *node_name, Error **errp)
{
    BlockDriverState *bs = bale_qmp_find_node(node_name, &seqcache_driver,
                                              errp);
    g_autofree char *message = NULL;
    AioContext *old_ctx;
    int ret;

    if (!bs) {
        return;
    }
    /* Between enter and leave the node has a request in flight, and stays. */
    old_ctx = bdrv_co_enter(bs);
    ret = bdrv_co_flush(bs);
    if (ret < 0) {
        message = bale_seqcache_node_flush_error(bs);
    }
    bdrv_co_leave(bs, old_ctx);
    if (ret < 0 && message) {
        error_setg(errp, "%s", message);
    } else if (ret < 0) {
        error_setg_errno(errp, -ret, "Could not flush node '%s'", node_name);
    }
}

static void reset_stats(BlockDriverState *bs, void *opaque)
{
    bale_seqcache_node_reset_stats(bs);
}

void qmp_seqcache_reset_stats(const char *node_name, Error **errp)
{
    bale_qmp_for_nodes(node_name, &seqcache_driver, reset_stats, NULL, errp);
}
