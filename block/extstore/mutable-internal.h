/*
 * The mutable region's insides, for mutable*.c; see mutable.c.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef BALE_EXTSTORE_MUTABLE_INTERNAL_H
#define BALE_EXTSTORE_MUTABLE_INTERNAL_H

#include "patch-internal.h"
#include "util/seqcache.h"

typedef struct BaleMutableFlush {
    struct BaleMutableFlush *next;
    uint64_t seq;
    bool write_out; /* patches are not enough */
    BaleDone *done;
    void *opaque;
} BaleMutableFlush;

struct BaleMutable {
    BaleImage *image;
    pthread_mutex_t lock;
    BaleSeqcache *cache;
    BalePatchTable patched;
    BaleWork *waiting;     /* until a write-out ends; chained by next */
    struct BaleMutableFlush *flushes; /* in order of seq */
    GQueue outs;           /* BaleMutableOut by link */
    unsigned outs_max;
    unsigned batch;        /* clusters that are worth one */
    bool batching;         /* one is being made */
    unsigned claims;       /* not yet settled */
    bool frozen;           /* nothing leaves the region */
    pthread_cond_t idle;   /* something that was under way has ended */
    uint8_t *zeroes;       /* one cluster of them */
    /* The one who appends patches. */
    BaleWork journal;
    uint8_t *journal_data; /* a cluster for who does it now, made as needed */
    BalePatchPacker packer;
    bool journaling;
    uint64_t journal_cluster; /* whose patches; UINT64_MAX: none just now */
    BaleUnsaved journal_taken;
};

/* One write-out. */
typedef struct BaleMutableOut {
    BaleWork work;
    BaleMutable *m;
    BaleSeqcacheOut *out;
    uint64_t cluster;
    BaleUnsaved taken; /* what of it no patch has saved */
    GList link;
    uint8_t *base; /* what is stored, if the cluster has gaps */
} BaleMutableOut;

/* mutable.c: @out has begun; note it.  Under the lock. */
BaleMutableOut *bale_mutable_out_new(BaleMutable *m, BaleSeqcacheOut *out);
/* The cluster is in the index, or failed to be.  @o's store may go then. */
void bale_mutable_out_end(BaleMutableOut *o, int ret);

/* Is all of @cluster in the region?  Under the lock. */
bool bale_mutable_complete(BaleMutable *m, uint64_t cluster);

/* Begin what is due.  Not under the lock. */
void bale_mutable_kick(BaleMutable *m);

/* mutable-batch.c */
typedef struct BaleMutableBatch BaleMutableBatch;

/*
 * Of at most @max clusters that have waited for longest; NULL: no memory.
 * Under the lock.
 */
BaleMutableBatch *bale_mutable_batch_new(BaleMutable *m, unsigned max);
/* Not under the lock. */
void bale_mutable_batch_start(BaleMutableBatch *b);

#endif
