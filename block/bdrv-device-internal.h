/*
 * The device over a QEMU block node: what a driver that uses one needs beside
 * the vtable of extstore/device.h.
 *
 * Unless said otherwise the functions are called in the main thread, with the
 * AioContext of the node acquired as for a driver's callbacks.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef BALE_BLOCK_BDRV_DEVICE_INTERNAL_H
#define BALE_BLOCK_BDRV_DEVICE_INTERNAL_H

#include "qemu/osdep.h"
#include "block/block_int.h"

#include "extstore/device.h"

typedef struct BaleBdrvDevice BaleBdrvDevice;

/* What a device does to its node, and lets others do, as permissions. */
typedef enum BaleBdrvAccess {
    BALE_BDRV_NONE,         /* reads; others may write: inactive, or about to
                             * change */
    BALE_BDRV_READ,         /* reads, nobody writes */
    BALE_BDRV_WRITE,        /* writes, nobody else does */
    BALE_BDRV_WRITE_SHARED, /* between two of the others only */
} BaleBdrvAccess;

/*
 * Make a device over @file, which it keeps a reference to.  NULL with @errp
 * set if the node cannot serve or the access conflicts with that of others.
 * Give it up with bale_bdrv_device_unref(), once no transfer is under way or
 * will be.
 */
BaleBdrvDevice *bale_bdrv_device_new(BlockDriverState *file,
                                     BaleBdrvAccess access, Error **errp);
void bale_bdrv_device_unref(BaleBdrvDevice *d);

/*
 * The device for the engine, which gets a reference of its own, given up by
 * bale_device_close() or bale_store_close().
 */
BaleDevice *bale_bdrv_device_open(BaleBdrvDevice *d);

/* The node that it is on; that can be exchanged, also by QEMU. */
BlockDriverState *bale_bdrv_device_file(BaleBdrvDevice *d);
int bale_bdrv_device_set_file(BaleBdrvDevice *d, BlockDriverState *file,
                              Error **errp);

/* 0, or a negative errno with @errp set: then nothing has changed. */
int bale_bdrv_device_set_access(BaleBdrvDevice *d, BaleBdrvAccess access,
                                Error **errp);
BaleBdrvAccess bale_bdrv_device_access(BaleBdrvDevice *d);

/*
 * Have @activated called when the node was activated, or is about to be
 * inactivated; in either case the access should change.  Negative errno with
 * @errp (may be NULL) set: it cannot.
 */
typedef int BaleBdrvActivated(void *opaque, bool active, Error **errp);
void bale_bdrv_device_set_activated(BaleBdrvDevice *d,
                                    BaleBdrvActivated *activated,
                                    void *opaque);

/*
 * The nodes whose requests need the device.  While it is drained, transfers
 * wait unless a request of an owner is under way that may need them.
 */
void bale_bdrv_device_add_owner(BaleBdrvDevice *d, BlockDriverState *owner);
void bale_bdrv_device_remove_owner(BaleBdrvDevice *d, BlockDriverState *owner);

/* Whether the engine may write is told to it through get_info. */
void bale_bdrv_device_set_read_only(BaleBdrvDevice *d, bool read_only);

/*
 * A request of an owner begins: look again at transfers that wait.  In the
 * owner's AioContext.
 */
void bale_bdrv_device_kick(BaleBdrvDevice *d);

/*
 * Bracket a blocking function of the engine that QEMU does not count as a
 * request: transfers pass meanwhile, drained or not.  Any thread.
 */
void bale_bdrv_device_busy_begin(BaleBdrvDevice *d);
void bale_bdrv_device_busy_end(BaleBdrvDevice *d);

#endif
