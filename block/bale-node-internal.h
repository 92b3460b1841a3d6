/*
 * The state of a bale node, and what the files of its driver (bale.c,
 * bale-io.c, bale-change.c) share.  Other files of the module ask through
 * bale-internal.h.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef BALE_BLOCK_BALE_NODE_INTERNAL_H
#define BALE_BLOCK_BALE_NODE_INTERNAL_H

#include "qemu/osdep.h"
#include "block/block_int.h"
#include "qemu/queue.h"

#include "extstore/store.h"

#include "bale-control-internal.h"
#include "bdrv-device-internal.h"

typedef struct BaleShared BaleShared;

typedef struct BDRVBaleState {
    BlockDriverState *bs;

    /* What it has of an open store (bale-shared.c). */
    BaleShared *shared;
    QLIST_ENTRY(BDRVBaleState) next; /* another node of that store */
    BaleStore *store;
    BaleImage *image;
    BaleBdrvDevice *dev;
    bool writes;        /* the node is active and not read-only */
    bool reopen_writes; /* it is being reopened, and shall be so */

    /* Never changed while it is open. */
    uint32_t cluster_size;
    char *node_name;
    char *image_name; /* IMAGE[@SNAPSHOT]; NULL: the unnamed one */

    /* Options of the store, as given when this node was opened. */
    uint64_t cache_size;
    unsigned workers;
    bool has_cache_size, has_workers;
    BaleSpace space;

    bool skip_unchanged;
    bool salvage;

    BaleControl control;
} BDRVBaleState;

/* bale-io.c: requests, and the engine's reads of the backing node. */

/*
 * Let @s->image, which was just opened, read what lies under @bs; and tell it
 * @s->skip_unchanged and @s->salvage.
 */
void bale_bs_set_backing(BlockDriverState *bs);

int coroutine_fn bale_co_preadv_part(BlockDriverState *bs, int64_t offset,
                                     int64_t bytes, QEMUIOVector *qiov,
                                     size_t qiov_offset,
                                     BdrvRequestFlags flags);
int coroutine_fn bale_co_pwritev_part(BlockDriverState *bs, int64_t offset,
                                      int64_t bytes, QEMUIOVector *qiov,
                                      size_t qiov_offset,
                                      BdrvRequestFlags flags);
int coroutine_fn bale_co_pwritev_compressed_part(BlockDriverState *bs,
                                                 int64_t offset, int64_t bytes,
                                                 QEMUIOVector *qiov,
                                                 size_t qiov_offset);
int coroutine_fn bale_co_pwrite_zeroes(BlockDriverState *bs, int64_t offset,
                                       int64_t bytes, BdrvRequestFlags flags);
int coroutine_fn bale_co_pdiscard(BlockDriverState *bs, int64_t offset,
                                  int64_t bytes);
int coroutine_fn bale_co_flush_to_disk(BlockDriverState *bs);
int coroutine_fn bale_co_flush_to_os(BlockDriverState *bs);
int coroutine_fn bale_co_block_status(BlockDriverState *bs, bool want_zero,
                                      int64_t offset, int64_t bytes,
                                      int64_t *pnum, int64_t *map,
                                      BlockDriverState **file);
/* Make [@offset, @offset + @bytes) zero; @flags are the engine's. */
int coroutine_fn bale_co_zero_range(BlockDriverState *bs, uint64_t offset,
                                    uint64_t bytes, unsigned flags);

/* bale-change.c: changes of the image as a whole, and its check. */

int coroutine_fn bale_co_truncate(BlockDriverState *bs, int64_t offset,
                                  bool exact, PreallocMode prealloc,
                                  BdrvRequestFlags flags, Error **errp);
int bale_change_backing_file(BlockDriverState *bs, const char *backing_file,
                             const char *backing_fmt);
int bale_make_empty(BlockDriverState *bs);
int bale_snapshot_load_tmp(BlockDriverState *bs, const char *snapshot_id,
                           const char *name, Error **errp);
int coroutine_fn bale_co_check(BlockDriverState *bs, BdrvCheckResult *result,
                               BdrvCheckMode fix);

#endif
