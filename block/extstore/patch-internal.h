/*
 * Patches: which bytes of the mutable region are in the log already, as patch
 * records, and which are not.
 *
 * A flush does not write out a cluster of which a few bytes are dirty.  It
 * appends these as patch records, and the cluster stays in the mutable region.
 * A later record of the whole cluster supersedes its patches; until then they
 * are live in their pages, and a recovery lays them over what older records
 * say.  The index never points at a patch that verifies.
 *
 * Invariants:
 *  1. While a cluster has patches it is in the mutable region, with at least
 *     the bytes of these.
 *  2. Nobody appends a patch of a cluster whose write-out, or whole write, is
 *     under way: a record of a whole cluster is newer than every patch of
 *     bytes that it holds, and older than every other.
 *  3. The patches of a cluster are freed after a newer record of the whole
 *     cluster is in the index.
 *  4. A clean store has no patches that count.
 *  5. What a crash can bring back is within the format's caps: besides clusters
 *     with patches those count whose patches a record has superseded that is
 *     not durable yet, for it may lie in another page than what is appended
 *     after it, and only that may survive.
 *
 * Threads: none of its own; the mutable region's lock guards a table.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef BALE_EXTSTORE_PATCH_INTERNAL_H
#define BALE_EXTSTORE_PATCH_INTERNAL_H

#include "extstore/codec.h"
#include "store-internal.h"

/* Separate stretches of one cluster that are worth patches. */
#define PATCH_RANGES_MAX 8u
/* The patches of a cluster may take so many clusters in the log. */
#define PATCH_COST_CLUSTERS 2u
/* Of a complete cluster, so little may be saved as patches. */
#define PATCH_LAST_FRACTION 8u

typedef struct BalePatchRange {
    uint32_t start, end;
} BalePatchRange;

/* A patch in the log. */
typedef struct BalePatch {
    uint64_t address;
    uint64_t seq;
    uint32_t offset; /* in the cluster */
    uint32_t len;    /* of its payload */
    bool bare;            /* no record held the cluster */
} BalePatch;

/* Bytes of a cluster that the log does not have yet. */
typedef struct BaleUnsaved {
    uint64_t seq; /* of the region, of the oldest; UINT64_MAX: there are none */
    unsigned n;
    bool many;    /* too many stretches: range[] is empty */
    BalePatchRange range[PATCH_RANGES_MAX]; /* in order, apart */
} BaleUnsaved;

typedef struct BalePatched {
    uint64_t cluster;
    BaleUnsaved unsaved;
    GList link;      /* in unsaved, if there is something */
    bool busy;       /* its write-out is under way, or patches are appended */
    GArray *patches; /* BalePatch, in order of seq; NULL: none */
    uint64_t cost;   /* bytes of patches in the log */
} BalePatched;

struct BalePatchTable {
    BaleStore *store;
    GHashTable *clusters; /* uint64_t -> BalePatched, owned */
    GQueue unsaved;       /* by link, in order of unsaved.seq */
    uint64_t patches;     /* that are live */
    uint64_t bytes;       /* live bytes of these */
    uint32_t patched;     /* clusters that have some */
    uint32_t max;         /* of these and ghosts; UINT32_MAX: no limit */
    /* Superseded by records that a flush shall make durable. */
    uint64_t ghost_flush;   /* number of its request */
    uint32_t ghosts;        /* clusters; as many as there are at most */
    uint32_t ghost_patches; /* of the one that had most */
};

/* For a recovery: a table that is not part of a mutable region. */
BalePatchTable *bale_patch_table_new(BaleStore *s);
void bale_patch_table_free(BalePatchTable *t);
/* A patch that counts so far; they come in order of sequence. */
void bale_patch_recover(BalePatchTable *t, uint64_t cluster,
                        const BalePatch *patch);
/*
 * A patch that cannot be applied: the cluster reads as an error, for the index
 * points at the patch, now and after a checkpoint.  -ENOMEM.
 */
int bale_patch_spoil(BaleLayer *layer, uint64_t cluster,
                     const BalePatch *patch);
/* The same for all of a table. */
int bale_patch_table_spoil(BalePatchTable *t, BaleLayer *layer);

/* --- payloads (patch-pack.c) --- */

/* Compresses and decompresses patches; begin with zeroes. */
typedef struct BalePatchPacker {
    BaleCodec codec;
    BaleCodecContext *context; /* made as needed, as is buf */
    uint8_t *buf;              /* as long as the longest that was asked for */
    uint32_t buf_len;
} BalePatchPacker;

void bale_patch_packer_destroy(BalePatchPacker *k);
/*
 * Compress the payload of @r, at *@payload, by @codec, if that can save a block
 * when it is flushed: then @r says so, and *@payload belongs to @k until that
 * is used again.
 */
void bale_patch_pack(BalePatchPacker *k, BaleCodec codec, BaleRecord *r,
                     const uint8_t **payload);
/*
 * The @*len bytes that the verified @payload of @r puts into its cluster, at
 * *@bytes: in @payload itself or, until that is used again, in @k.  -EIO: it is
 * damaged.
 */
int bale_patch_unpack(BalePatchPacker *k, uint32_t cluster_size,
                      const BaleRecord *r, const uint8_t *payload,
                      const uint8_t **bytes, uint32_t *len);

void bale_patch_table_init(BalePatchTable *t, BaleStore *s);
void bale_patch_table_destroy(BalePatchTable *t);

BalePatched *bale_patch_find(BalePatchTable *t, uint64_t cluster);
/* Bytes [@start, @end) of @cluster were written, as number @seq. */
void bale_patch_note(BalePatchTable *t, uint64_t cluster, uint32_t start,
                     uint32_t end, uint64_t seq);
/* Take what is unsaved: somebody saves it now, and the cluster is busy. */
BaleUnsaved bale_patch_take(BalePatchTable *t, BalePatched *p);
/* That ended; give back what could not be saved. */
void bale_patch_put_back(BalePatchTable *t, BalePatched *p,
                         const BaleUnsaved *unsaved);
/* The number of the oldest byte that is unsaved and not taken. */
uint64_t bale_patch_oldest(const BalePatchTable *t);
/* Is it worth a few patches?  Else the whole cluster shall be written. */
bool bale_patch_worth(BalePatchTable *t, const BalePatched *p);
/* The same for a complete cluster, of which patches have saved the rest. */
bool bale_patch_worth_last(BalePatchTable *t, const BalePatched *p);
/* A patch of @p is in the log. */
void bale_patch_add(BalePatchTable *t, BalePatched *p, const BalePatch *patch);
/* Patches are superseded.  The page counters follow if @live. */
void bale_patch_drop(BalePatchTable *t, BalePatched *p, bool live);
/* Forget @p altogether, if it is saved and has no patches. */
void bale_patch_tidy(BalePatchTable *t, BalePatched *p);
/* Forget everything about clusters [@first, @first + @count). */
void bale_patch_forget(BalePatchTable *t, uint64_t first, uint64_t count,
                       bool live);

#endif
