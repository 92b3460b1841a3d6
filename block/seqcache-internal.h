/*
 * What the monitor's side of the module may ask of a seqcache node.
 *
 * All functions are called with the node's AioContext held.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef BALE_BLOCK_SEQCACHE_INTERNAL_H
#define BALE_BLOCK_SEQCACHE_INTERNAL_H

#include "qemu/osdep.h"
#include "block/block_int.h"

#include "util/histogram.h"
#include "util/seqcache.h"

/* The driver's format_name; bs->drv->format_name of a seqcache node. */
#define BALE_SEQCACHE_FORMAT_NAME "seqcache"

typedef struct BaleSeqcacheNodeStats {
    BaleSeqcacheStats cache;
    size_t cluster_bytes;
    unsigned max_streams;
    uint64_t flush_interval_ms; /* 0: no background flush by age */
    bool compress;

    uint64_t child_reads;       /* of gaps, for reads of the node */
    uint64_t child_writes;      /* requests made by write-outs */
    uint64_t child_write_bytes;
    uint64_t compressed_writes; /* … of which the child took compressed */
    uint64_t fallback_writes;   /* … of which it refused to compress */
    uint64_t read_modify_writes; /* write-outs that had to read first */
    uint64_t flushes;
    uint64_t waits;             /* requests that waited for room or order */
    uint64_t errors;            /* write-outs that failed */
    int error;                  /* 0, or the errno that writes fail with */
    char *error_message;        /* owned by the caller; NULL if no error */
    BaleHistogram size_bytes;   /* of write-outs */
    BaleHistogram latency_ns;
} BaleSeqcacheNodeStats;

/* Is @bs a seqcache node with a cache? */
bool bale_seqcache_is_node(BlockDriverState *bs);

void bale_seqcache_node_stats(BlockDriverState *bs,
                              BaleSeqcacheNodeStats *stats);
void bale_seqcache_node_reset_stats(BlockDriverState *bs);

/*
 * Why the last flush of @bs failed to write out, with node and offset; NULL if
 * it did not. Newly allocated.
 */
char *bale_seqcache_node_flush_error(BlockDriverState *bs);

#endif
