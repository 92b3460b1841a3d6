/*
 * Nodes that QMP commands name.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "qemu/osdep.h"
#include "block/block_int.h"
#include "qapi/error.h"

#include "qmp-node-internal.h"

BlockDriverState *bale_qmp_find_node(const char *node_name,
                                     const BaleQmpDriver *driver,
                                     Error **errp)
{
    BlockDriverState *bs = bdrv_find_node(node_name);

    if (!bs) {
        error_setg(errp, "Failed to find node with node-name='%s'", node_name);
        return NULL;
    }
    if (!driver->is_node(bs)) {
        error_setg(errp, "Node '%s' is a %s node, not a %s node", node_name,
                   bdrv_get_format_name(bs) ?: "closed", driver->name);
        return NULL;
    }
    return bs;
}

void bale_qmp_for_nodes(const char *node_name, const BaleQmpDriver *driver,
                        BaleQmpNodeFunc *fn, void *opaque, Error **errp)
{
    BlockDriverState *bs = node_name
                               ? bale_qmp_find_node(node_name, driver, errp)
                               : bdrv_next_node(NULL);

    for (; bs; bs = node_name ? NULL : bdrv_next_node(bs)) {
        AioContext *ctx = bdrv_get_aio_context(bs);

        aio_context_acquire(ctx);
        if (driver->is_node(bs)) {
            fn(bs, opaque);
        }
        aio_context_release(ctx);
    }
}
