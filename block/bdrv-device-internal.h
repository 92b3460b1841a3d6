/*
 * The device over a QEMU block node: what a driver that owns one needs beside
 * the vtable of extstore/device.h.
 *
 * The engine owns the BaleDevice; the driver holds a reference of its own,
 * which it gives up with bale_bdrv_device_unref() after the store is closed.
 * Unless said otherwise the functions are called where QEMU calls a driver's
 * callbacks of the like name, with the node's AioContext acquired as there.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef BALE_BLOCK_BDRV_DEVICE_INTERNAL_H
#define BALE_BLOCK_BDRV_DEVICE_INTERNAL_H

#include "qemu/osdep.h"
#include "block/block_int.h"

#include "extstore/device.h"

typedef struct BaleBdrvDevice BaleBdrvDevice;

/*
 * Make a device over the `file` child of @owner (which may be exchanged later)
 * or, with @owner NULL, over @child, whose node stays in @ctx.  Borrowed for
 * the life of the driver's reference.  NULL with @errp set if the child cannot
 * serve.  The engine's own reference is the BaleDevice, given up by
 * bale_device_close() or bale_store_close().
 */
BaleBdrvDevice *bale_bdrv_device_new(BlockDriverState *owner, BdrvChild *child,
                                     AioContext *ctx, bool read_only,
                                     Error **errp);

/* The device for the engine; the same pointer always. */
BaleDevice *bale_bdrv_device_get(BaleBdrvDevice *d);

/* Give up the driver's reference.  No transfer is under way or will be. */
void bale_bdrv_device_unref(BaleBdrvDevice *d);

/* Whether the engine may write is told to it through get_info. */
void bale_bdrv_device_set_read_only(BaleBdrvDevice *d, bool read_only);

/* The AioContext of the owner changes.  Drained. */
void bale_bdrv_device_detach(BaleBdrvDevice *d);
void bale_bdrv_device_attach(BaleBdrvDevice *d, AioContext *ctx);

/*
 * While drained, transfers wait unless a request of the owner is under way
 * that may need them.
 */
void bale_bdrv_device_drain_begin(BaleBdrvDevice *d);
void bale_bdrv_device_drain_end(BaleBdrvDevice *d);

/* A request of the owner begins: look again at transfers that wait. */
void bale_bdrv_device_kick(BaleBdrvDevice *d);

/*
 * Bracket a blocking function of the engine that QEMU does not count as a
 * request: transfers pass meanwhile, drained or not.
 */
void bale_bdrv_device_busy_begin(BaleBdrvDevice *d);
void bale_bdrv_device_busy_end(BaleBdrvDevice *d);

#endif
