/*
 * Internal snapshots of a bale node: the callbacks behind qemu-img snapshot and
 * its kin in the monitor.  The engine does the work, in a thread of its own.
 *
 * An id is the number that the engine gives, a name is unique in an image.
 *
 * Threads: a driver's callbacks, in the main thread, under QEMU's rules.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "qemu/osdep.h"
#include "block/block_int.h"
#include "qapi/error.h"
#include "qemu/cutils.h"

#include "extstore/store.h"

#include "bale-bridge-internal.h"
#include "bale-driver-internal.h"
#include "bale-internal.h"

typedef struct EngineSnapshot {
    BaleStore *store;
    char *image;
    const char *name;
    BaleSnapshotInfo info;
    GArray *list;       /* BaleSnapshotListEntry; NULL: none could be made */
    GError *err;
    bool ok;
} EngineSnapshot;

/* The name of the node's image; owned by the caller. */
static char *image_name(BlockDriverState *bs)
{
    g_autofree BaleImageInfo *info = g_new0(BaleImageInfo, 1);

    bale_image_get_info(bale_bs_image(bs), info);
    return g_strdup(info->name);
}

static int snapshot_run(BlockDriverState *bs, BaleBlockingFunc *fn,
                        EngineSnapshot *c, Error **errp)
{
    int ret = 0;

    c->store = bale_bs_store(bs);
    c->image = image_name(bs);
    bale_bs_run(bs, fn, c);
    if (!c->ok) {
        ret = bale_bridge_error(c->err, errp);
    }
    g_free(c->image);
    return ret;
}

static void create_blocking(void *opaque)
{
    EngineSnapshot *c = opaque;

    c->ok = bale_snapshot_create(c->store, c->image, &c->info, &c->err);
    if (c->ok) {
        c->list = bale_snapshot_list(c->store, c->image, NULL);
    }
}

static void rollback_blocking(void *opaque)
{
    EngineSnapshot *c = opaque;

    c->ok = bale_snapshot_rollback(c->store, c->image, c->name, &c->err);
}

static void delete_blocking(void *opaque)
{
    EngineSnapshot *c = opaque;

    c->ok = bale_snapshot_delete(c->store, c->image, c->name, &c->err);
}

static void list_blocking(void *opaque)
{
    EngineSnapshot *c = opaque;

    c->list = bale_snapshot_list(c->store, c->image, &c->err);
    c->ok = c->list;
}

int bale_snapshot_bs_create(BlockDriverState *bs, QEMUSnapshotInfo *sn)
{
    EngineSnapshot c = {
        .info = {
            .name = sn->name,
            .date_s = sn->date_sec,
            .date_ns = sn->date_nsec,
            .vm_clock_ns = sn->vm_clock_nsec,
        },
    };
    Error *err = NULL;
    int ret;

    if (sn->vm_state_size) {
        return -ENOTSUP;
    }
    ret = snapshot_run(bs, create_blocking, &c, &err);
    if (ret < 0) {
        error_report_err(err);
        return ret;
    }
    for (guint i = 0; c.list && i < c.list->len; i++) {
        BaleSnapshotListEntry *e =
            &g_array_index(c.list, BaleSnapshotListEntry, i);

        if (!strcmp(e->name, sn->name)) {
            snprintf(sn->id_str, sizeof(sn->id_str), "%" PRIu32, e->id);
        }
    }
    if (c.list) {
        g_array_unref(c.list);
    }
    return 0;
}

int bale_snapshot_bs_goto(BlockDriverState *bs, const char *snapshot_id)
{
    EngineSnapshot c = { .name = snapshot_id };
    Error *err = NULL;
    int ret = snapshot_run(bs, rollback_blocking, &c, &err);

    if (ret < 0) {
        error_report_err(err);
        return ret;
    }
    bs->total_sectors = DIV_ROUND_UP(bale_image_size(bale_bs_image(bs)),
                                     BDRV_SECTOR_SIZE);
    return 0;
}

int bale_snapshot_bs_delete(BlockDriverState *bs, const char *snapshot_id,
                            const char *name, Error **errp)
{
    EngineSnapshot c = { .name = snapshot_id ? snapshot_id : name };

    return snapshot_run(bs, delete_blocking, &c, errp);
}

int bale_snapshot_bs_list(BlockDriverState *bs, QEMUSnapshotInfo **out)
{
    EngineSnapshot c = { .name = NULL };
    Error *err = NULL;
    int ret = snapshot_run(bs, list_blocking, &c, &err);
    QEMUSnapshotInfo *list;

    if (ret < 0) {
        error_free(err);
        return ret;
    }
    list = g_new0(QEMUSnapshotInfo, c.list->len);
    for (guint i = 0; i < c.list->len; i++) {
        BaleSnapshotListEntry *e =
            &g_array_index(c.list, BaleSnapshotListEntry, i);

        snprintf(list[i].id_str, sizeof(list[i].id_str), "%" PRIu32, e->id);
        pstrcpy(list[i].name, sizeof(list[i].name), e->name);
        list[i].date_sec = e->date_s;
        list[i].date_nsec = e->date_ns;
        list[i].vm_clock_nsec = e->vm_clock_ns;
        list[i].icount = -1ULL;
    }
    ret = c.list->len;
    *out = list;
    g_array_unref(c.list);
    return ret;
}
