/*
 * The frame of the module: guards, the stamp, and what the module says of
 * itself.
 *
 * The drivers register themselves with block_init(), as built-in ones do; those
 * constructors run when the shim loads the module. The guard below is a
 * constructor of a higher priority: it runs before any of them and ends the
 * process when the program's tables do not have the sizes that the headers
 * promised. The shim has compared build-ids already, so a guard that fails
 * means that the headers were not those of the build.
 *
 * No thread is started here: QEMU programs fork between loading the module and
 * opening a store.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "qemu/osdep.h"
#include "block/block_int.h"
#include "qapi/qapi-types-block-core.h"
#include "bale-qapi-commands-module.h"
#include "loader-internal.h"

/* Constructors up to priority 100 belong to the compiler */
#define GUARD_PRIORITY 101

/* qemu-img and qemu-io lack what only a monitor needs */
#pragma weak BlockdevDriver_lookup
#pragma weak BlkdebugEvent_lookup
#pragma weak ImageInfoSpecificKind_lookup
#pragma weak JobType_lookup

static void guard_table(const char *name, const QEnumLookup *lookup, int size)
{
    if (lookup && lookup->size != size) {
        fprintf(stderr,
                "bale: %s has %d names in this program and %d in the headers "
                "of %s, which the module was made for: not loaded\n",
                name, lookup->size, size, BALE_QEMU_VERSION);
        exit(1);
    }
}

static void __attribute__((constructor(GUARD_PRIORITY))) guard_abi(void)
{
    guard_table("BlockdevDriver", &BlockdevDriver_lookup,
                BLOCKDEV_DRIVER__MAX);
    guard_table("BlkdebugEvent", &BlkdebugEvent_lookup, BLKDBG__MAX);
    guard_table("ImageInfoSpecificKind", &ImageInfoSpecificKind_lookup,
                IMAGE_INFO_SPECIFIC_KIND__MAX);
    guard_table("JobType", &JobType_lookup, JOB_TYPE__MAX);
}

const char *bale_module_stamp(void)
{
    return BALE_QEMU_STAMP;
}

BaleModuleInfo *qmp_query_bale_module(Error **errp)
{
    BaleModuleInfo *info = g_new0(BaleModuleInfo, 1);

    info->version = g_strdup(BALE_VERSION);
    info->qemu_version = g_strdup(BALE_QEMU_VERSION);
    info->qemu_stamp = g_strdup(BALE_QEMU_STAMP);
    return info;
}
