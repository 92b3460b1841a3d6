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

/* The driver's format_name; bs->drv->format_name of a bale node. */
#define BALE_FORMAT_NAME "bale"

/*
 * The store of @bs, borrowed while the caller holds the node's AioContext and
 * does not yield; NULL if @bs is no bale node or has no store open.
 */
BaleStore *bale_bs_store(BlockDriverState *bs);

/* The image of @bs, likewise. */
BaleImage *bale_bs_image(BlockDriverState *bs);

#endif
