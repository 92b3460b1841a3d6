/*
 * What the QMP commands of our drivers have in common: they name nodes.
 *
 * In the main thread, without an AioContext held.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef BALE_BLOCK_QMP_NODE_INTERNAL_H
#define BALE_BLOCK_QMP_NODE_INTERNAL_H

#include "qemu/osdep.h"
#include "block/block_int.h"

/* A driver whose nodes commands are about. */
typedef struct BaleQmpDriver {
    const char *name;
    bool (*is_node)(BlockDriverState *bs); /* one that is open */
} BaleQmpDriver;

/* The node @node_name of @driver; NULL with @errp set if there is none. */
BlockDriverState *bale_qmp_find_node(const char *node_name,
                                     const BaleQmpDriver *driver,
                                     Error **errp);

typedef void BaleQmpNodeFunc(BlockDriverState *bs, void *opaque);

/*
 * Call @fn, with the node's AioContext held, for the node @node_name or, if
 * that is NULL, for every node of @driver.  @errp as above.
 */
void bale_qmp_for_nodes(const char *node_name, const BaleQmpDriver *driver,
                        BaleQmpNodeFunc *fn, void *opaque, Error **errp);

#endif
