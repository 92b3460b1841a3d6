/*
 * The stores that are open in this process, each with the bale nodes that show
 * its images.
 *
 * A node that is opened over the `file` node of an open store, or over another
 * one for the same file of the host, joins that store: one engine, one device,
 * one lock on the file.  The store is open for writing while a node writes.
 *
 * Unless said otherwise the functions are called in the main thread, where QEMU
 * calls a driver's callbacks of the like name.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef BALE_BLOCK_BALE_SHARED_INTERNAL_H
#define BALE_BLOCK_BALE_SHARED_INTERNAL_H

#include "qemu/osdep.h"
#include "block/block_int.h"
#include "qemu/coroutine.h"
#include "qemu/queue.h"

#include "extstore/store.h"

#include "bale-node-internal.h"
#include "bdrv-device-internal.h"

/* An open store. */
struct BaleShared {
    QLIST_ENTRY(BaleShared) next;

    /* Of the main thread; they change while no request is under way. */
    BaleStore *store; /* NULL: it could not be opened again */
    BaleBdrvDevice *dev;
    bool read_only;   /* as the engine was told */
    bool stale;       /* all nodes were inactive: others may have written */
    bool corrupt;     /* the store was marked so when it was opened */
    bool repair;
    unsigned workers; /* as asked for */
    uint64_t cache_size;
    BaleSpace space;
    char *filename;   /* of the file that it is in, for messages */

    QemuMutex lock; /* a leaf: for what reads the list on other threads */
    QLIST_HEAD(, BDRVBaleState) nodes;

    int damage_reports; /* atomic */

    CoMutex revive_lock; /* one attempt at a time */
};

/*
 * Open the image s->image_name of the store in bs->file, for writing if
 * @writes.  On success what @bs has of the store is set, and *@info describes
 * the image.  On failure @bs may have lost its file.
 */
int bale_shared_open(BlockDriverState *bs, bool writes, BaleImageInfo *info,
                     Error **errp);

/*
 * Give the image up, and close the store if it was the last.  An error is told
 * when not everything could be made durable.
 */
int bale_shared_close(BlockDriverState *bs, Error **errp);

/* @bs writes from now on, or does so no more. */
int bale_shared_set_writes(BlockDriverState *bs, bool writes, Error **errp);

/*
 * @bs was inactive and is about to be used: looks at the store anew, if others
 * can have written to it.  On failure no node of the store can be used.
 */
int coroutine_fn bale_shared_co_invalidate(BlockDriverState *bs, bool writes,
                                           Error **errp);

/*
 * Reopening @bs: before the permissions are looked at, and when it has been
 * done or given up.
 */
int bale_shared_reopen_prepare(BlockDriverState *bs, QDict *options,
                               bool writes, Error **errp);
void bale_shared_reopen_end(BlockDriverState *bs, bool writes);

/* For the driver's table. */
void bale_child_perm(BlockDriverState *bs, BdrvChild *c, BdrvChildRole role,
                     BlockReopenQueue *queue, uint64_t perm, uint64_t shared,
                     uint64_t *nperm, uint64_t *nshared);

#endif
