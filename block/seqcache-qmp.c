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

/* The seqcache node @node_name; NULL with @errp set if there is none. */
static BlockDriverState *find_seqcache(const char *node_name, Error **errp)
{
    BlockDriverState *bs = bdrv_find_node(node_name);

    if (!bs) {
        error_setg(errp, "Failed to find node with node-name='%s'", node_name);
        return NULL;
    }
    if (!bale_seqcache_is_node(bs)) {
        error_setg(errp, "Node '%s' is a %s node, not a seqcache node",
                   node_name, bdrv_get_format_name(bs) ?: "closed");
        return NULL;
    }
    return bs;
}

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

SeqcacheInfoList *qmp_query_seqcache(bool has_node_name, const char *node_name,
                                     Error **errp)
{
    SeqcacheInfoList *list = NULL, **tail = &list;
    BlockDriverState *bs = NULL;

    if (has_node_name) {
        bs = find_seqcache(node_name, errp);
        if (!bs) {
            return NULL;
        }
    } else {
        bs = bdrv_next_node(NULL);
    }
    for (; bs; bs = has_node_name ? NULL : bdrv_next_node(bs)) {
        AioContext *ctx = bdrv_get_aio_context(bs);

        aio_context_acquire(ctx);
        if (bale_seqcache_is_node(bs)) {
            QAPI_LIST_APPEND(tail, get_info(bs));
        }
        aio_context_release(ctx);
    }
    return list;
}

void coroutine_fn qmp_seqcache_flush(const char *node_name, Error **errp)
{
    BlockDriverState *bs = find_seqcache(node_name, errp);
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

void qmp_seqcache_reset_stats(const char *node_name, Error **errp)
{
    BlockDriverState *bs = find_seqcache(node_name, errp);
    AioContext *ctx;

    if (!bs) {
        return;
    }
    ctx = bdrv_get_aio_context(bs);
    aio_context_acquire(ctx);
    bale_seqcache_node_reset_stats(bs);
    aio_context_release(ctx);
}
