/*
 * What the files of the filter driver "seqcache" share: the state of a node,
 * and what seqcache-write.c does for requests. For the rules see seqcache.c.
 *
 * Threads: everything runs in the node's AioContext.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef BALE_BLOCK_SEQCACHE_NODE_INTERNAL_H
#define BALE_BLOCK_SEQCACHE_NODE_INTERNAL_H

#include "seqcache-internal.h"

#include "qemu/coroutine.h"
#include "qemu/timer.h"
#include "qemu/units.h"

/* Write-outs under way at a time. */
#define MAX_WRITE_OUTS 16

/*
 * Blocks of the child that are remembered. They may be larger than the child's
 * own: file systems allocate 4 KiB, and what lies around a byte that was
 * written is no hole any more.
 */
#define MAX_EDGES 256

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

static inline int64_t seqcache_now_ns(void)
{
    return qemu_clock_get_ns(QEMU_CLOCK_REALTIME);
}

/* Where the child ends at present; cached data may lie beyond. */
static inline int64_t seqcache_child_end(BlockDriverState *bs)
{
    return bs->file->bs->total_sectors << BDRV_SECTOR_BITS;
}

/*
 * The block size below: filters in between pass any request on, and say so, but
 * the node under them may not.
 */
static inline size_t seqcache_child_align(BlockDriverState *child)
{
    size_t align = 1;

    for (; child; child = bdrv_filter_bs(child)) {
        align = MAX(align, child->bl.request_alignment);
    }
    return align;
}

/* Edges: none yet; the child may change in the range, or has; its block at
 * @offset has these bytes now. */
void seqcache_edges_init(BlockDriverState *bs);
void seqcache_edges_forget(BDRVSeqcacheState *s, int64_t offset, int64_t bytes);
void seqcache_edges_remember(BDRVSeqcacheState *s, int64_t offset,
                             const uint8_t *block);

/* The error that writes fail with until a flush has succeeded, or 0. */
int seqcache_tell_error(BDRVSeqcacheState *s);

/* Start the write-outs that are due, and others if a write needs room. */
void seqcache_kick(BlockDriverState *bs, bool need_room);

/* The background flusher. */
void seqcache_arm_timer(BlockDriverState *bs);
void seqcache_timer_cb(void *opaque);

/* Will a write-out or an Exclusive end?  Wait until one has. */
bool seqcache_progress_is_coming(BDRVSeqcacheState *s);
void coroutine_fn seqcache_wait_for_progress(BDRVSeqcacheState *s);

/* Write out everything that ended before. */
int coroutine_fn seqcache_co_flush_to_os(BlockDriverState *bs);

#endif
