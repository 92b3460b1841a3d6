/*
 * Callbacks of the format driver that lie in bale-bitmap.c, bale-create.c and
 * bale-snapshot.c, for its table in bale.c.  QEMU's block_int-common.h says how
 * each is called.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef BALE_BLOCK_BALE_DRIVER_INTERNAL_H
#define BALE_BLOCK_BALE_DRIVER_INTERNAL_H

#include "qemu/osdep.h"
#include "block/block_int.h"
#include "qemu/option.h"

/* What `qemu-img create -f bale -o help` lists. */
extern QemuOptsList bale_create_opts;

int coroutine_fn bale_co_create_opts(BlockDriver *drv, const char *filename,
                                     QemuOpts *opts, Error **errp);
/* bale-specific.c: only in a QEMU that the driver is built into. */
ImageInfoSpecific *bale_get_specific_info(BlockDriverState *bs, Error **errp);
BlockStatsSpecific *bale_get_specific_stats(BlockDriverState *bs);

/* bale-snapshot.c */
int bale_snapshot_bs_create(BlockDriverState *bs, QEMUSnapshotInfo *sn);
int bale_snapshot_bs_goto(BlockDriverState *bs, const char *snapshot_id);
int bale_snapshot_bs_delete(BlockDriverState *bs, const char *snapshot_id,
                            const char *name, Error **errp);
int bale_snapshot_bs_list(BlockDriverState *bs, QEMUSnapshotInfo **out);

/* bale-bitmap.c */
bool bale_supports_persistent_dirty_bitmap(BlockDriverState *bs);
bool coroutine_fn bale_co_can_store_new_dirty_bitmap(BlockDriverState *bs,
                                                     const char *name,
                                                     uint32_t granularity,
                                                     Error **errp);
int coroutine_fn bale_co_remove_persistent_dirty_bitmap(BlockDriverState *bs,
                                                        const char *name,
                                                        Error **errp);
/*
 * Make what the store has of bitmaps of the node's image, @image_name, the
 * node's; and mark it as in use there if the node is @writable.
 */
int bale_bitmaps_load(BlockDriverState *bs, const char *image_name,
                      bool writable, Error **errp);
/* Store them; then @release them, or else make them read-only. */
int bale_bitmaps_store_all(BlockDriverState *bs, bool release, Error **errp);
/* The node can be written to again. */
int bale_bitmaps_reopen_rw(BlockDriverState *bs, Error **errp);
/* Bytes that those of @bs, of any format, would take, all ones and zeroes. */
uint64_t bale_bitmaps_measure(BlockDriverState *bs, uint32_t cluster_size);
/* Can each follow a change of the node's size? */
int bale_bitmaps_truncate_check(BlockDriverState *bs, Error **errp);

BlockMeasureInfo *bale_measure(QemuOpts *opts, BlockDriverState *in_bs,
                               Error **errp);

#endif
