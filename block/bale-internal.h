/*
 * What other files of the module may ask of a bale node.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef BALE_BLOCK_BALE_INTERNAL_H
#define BALE_BLOCK_BALE_INTERNAL_H

#include "qemu/osdep.h"
#include "block/block_int.h"

#include "extstore/store.h"

#include "bale-bridge-internal.h"
#include "bale-control-internal.h"

/* The driver's format_name; bs->drv->format_name of a bale node. */
#define BALE_FORMAT_NAME "bale"

/*
 * The store of @bs, borrowed while the caller holds the node's AioContext and
 * does not yield; NULL if @bs is no bale node or has no store open.
 */
BaleStore *bale_bs_store(BlockDriverState *bs);

/* The image of @bs, likewise. */
BaleImage *bale_bs_image(BlockDriverState *bs);

/* The bale node @node_name; NULL with @errp set if there is none. */
BlockDriverState *bale_find_node(const char *node_name, Error **errp);

/* What @bs, a bale node, keeps for the monitor. */
BaleControl *bale_bs_control(BlockDriverState *bs);

/* Is the store of @bs open for writing, by this node or another one? */
bool bale_bs_store_writable(BlockDriverState *bs);

/* The job on the store of @bs, whichever node it was started on; NULL: none. */
BaleJob *bale_bs_job(BlockDriverState *bs);

/* The node that shows image @name of the store of @bs; NULL: none. */
BlockDriverState *bale_bs_of_image(BlockDriverState *bs, const char *name);

/* Is a cache-size of @bytes one that a store takes? */
bool bale_cache_size_check(uint64_t bytes, Error **errp);
/* As reopening @bs, a bale node, with another cache-size does. */
void bale_bs_set_cache_size(BlockDriverState *bs, uint64_t bytes);
/* What the store keeps to as long as it is open. */
BaleSpace *bale_bs_space(BlockDriverState *bs);
/* Is it a number of compression threads?  False with @errp set if not. */
bool bale_workers_check(uint64_t workers, Error **errp);
/* Compression threads; 0: one for each core. */
int bale_bs_set_workers(BlockDriverState *bs, unsigned workers, Error **errp);

/*
 * Run a blocking function of the engine as bale_bridge_run() does; transfers of
 * the store pass meanwhile even if the node is drained.
 */
void bale_bs_run(BlockDriverState *bs, BaleBlockingFunc *fn, void *opaque);

/* Bracket one that runs elsewhere in the same manner. */
void bale_bs_busy_begin(BlockDriverState *bs);
void bale_bs_busy_end(BlockDriverState *bs);

#endif
