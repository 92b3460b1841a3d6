/*
 * The QMP commands for the images and snapshots of a store (qapi/bale.json).
 *
 * Each runs one blocking function of the engine, in a coroutine that counts as
 * a request of the node, so that node and store stay.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "qemu/osdep.h"
#include "block/block_int.h"
#include "qapi/error.h"

#include "extstore/bitmap.h"

#include "bale-bridge-internal.h"
#include "bale-internal.h"
#include "bale-qapi-commands-bale.h"

/* One command; what each member means, its function below says. */
typedef struct ImageRun {
    bool (*fn)(struct ImageRun *run);
    BaleStore *store;
    const char *image;
    const char *snapshot;
    const char *new_name;
    BaleImageOptions options;
    bool read_only;
    BaleStoreImageList *list;
    GError *err;
    bool ok;
} ImageRun;

static void image_blocking(void *opaque)
{
    ImageRun *run = opaque;

    run->ok = run->fn(run);
}

/* Run @run->fn on the store of @node_name. */
static bool coroutine_fn image_run(const char *node_name, ImageRun *run,
                                   bool writes, Error **errp)
{
    BlockDriverState *bs = bale_find_node(node_name, errp);
    AioContext *old_ctx;

    if (!bs) {
        return false;
    }
    if (writes && !bale_bs_store_writable(bs)) {
        error_setg(errp, "Node '%s' is %s", node_name,
                   bdrv_is_read_only(bs) ? "read-only" : "inactive");
        return false;
    }
    old_ctx = bdrv_co_enter(bs);
    run->store = bale_bs_store(bs);
    bale_bs_run(bs, image_blocking, run);
    bdrv_co_leave(bs, old_ctx);
    if (!run->ok) {
        bale_bridge_error(run->err, errp);
        error_prepend(errp, "Node '%s': ", node_name);
    }
    return run->ok;
}

/* --- the list --- */

static BaleStoreSnapshotList *list_snapshots(BaleStore *store,
                                             const char *image)
{
    BaleStoreSnapshotList *list = NULL;
    g_autoptr(GArray) array = bale_snapshot_list(store, image, NULL);

    /* It may be gone since the images were listed. */
    for (guint i = array ? array->len : 0; i-- > 0;) {
        BaleSnapshotListEntry *in =
            &g_array_index(array, BaleSnapshotListEntry, i);
        BaleStoreSnapshot *out = g_new0(BaleStoreSnapshot, 1);

        out->id = in->id;
        out->name = g_strdup(in->name ?: "");
        out->size = in->size;
        out->own_bytes = in->own_bytes;
        out->date_sec = in->date_s;
        out->date_nsec = in->date_ns;
        out->vm_clock_nsec = in->vm_clock_ns;
        QAPI_LIST_PREPEND(list, out);
    }
    return list;
}

static BaleStoreBitmapList *list_bitmaps(BaleStore *store, const char *image)
{
    BaleStoreBitmapList *list = NULL;
    g_autoptr(GArray) array = bale_bitmap_list(store, image, NULL);

    for (guint i = array ? array->len : 0; i-- > 0;) {
        BaleBitmapInfo *in = &g_array_index(array, BaleBitmapInfo, i);
        BaleStoreBitmap *out = g_new0(BaleStoreBitmap, 1);

        out->name = g_strdup(in->name);
        out->granularity = in->granularity;
        out->enabled = in->enabled;
        out->in_use = in->in_use;
        QAPI_LIST_PREPEND(list, out);
    }
    return list;
}

static bool run_list(ImageRun *run)
{
    g_autoptr(GArray) array = bale_image_list(run->store);

    for (guint i = array->len; i-- > 0;) {
        BaleImageListEntry *in = &g_array_index(array, BaleImageListEntry, i);
        BaleStoreImage *out = g_new0(BaleStoreImage, 1);

        out->id = in->id;
        out->name = g_strdup(in->name ?: "");
        out->size = in->size;
        out->own_bytes = in->own_bytes;
        out->layers = in->layers;
        out->read_only = in->read_only;
        out->compression_type = g_strdup(bale_codec_name(in->codec));
        out->compression_level = in->level;
        out->date_sec = in->date_s;
        out->snapshots = list_snapshots(run->store, in->name);
        out->bitmaps = list_bitmaps(run->store, in->name);
        QAPI_LIST_PREPEND(run->list, out);
    }
    return true;
}

BaleStoreImageList *coroutine_fn qmp_bale_image_list(const char *node_name,
                                                     Error **errp)
{
    ImageRun run = { .fn = run_list };

    image_run(node_name, &run, false, errp);
    return run.list;
}

/* --- the others --- */

static bool run_create(ImageRun *run)
{
    return bale_image_create(run->store, &run->options, &run->err);
}

void coroutine_fn qmp_bale_image_create(
    const char *node_name, const char *image, uint64_t size,
    bool has_compression_type, const char *compression_type,
    bool has_compression_level, int64_t compression_level,
    bool has_backing_file, const char *backing_file, bool has_backing_format,
    const char *backing_format, Error **errp)
{
    ImageRun run = {
        .fn = run_create,
        .options = {
            .name = image,
            .size = size,
            .backing_file = has_backing_file ? backing_file : NULL,
            .backing_format = has_backing_format ? backing_format : NULL,
        },
    };
    GError *err = NULL;

    if (has_compression_level && (compression_level < 0 ||
                                  compression_level > INT_MAX)) {
        error_setg(errp, "Compression level is out of range");
        return;
    }
    run.options.level = has_compression_level ? compression_level
                                              : BALE_CODEC_LEVEL_DEFAULT;
    if (!bale_codec_from_name(has_compression_type ? compression_type
                                                   : "zstd",
                              &run.options.codec, &err) ||
        !bale_codec_check_level(run.options.codec, run.options.level, &err)) {
        bale_bridge_error(err, errp);
        return;
    }
    image_run(node_name, &run, true, errp);
}

static bool run_delete(ImageRun *run)
{
    return bale_image_delete(run->store, run->image, &run->err);
}

void coroutine_fn qmp_bale_image_delete(const char *node_name,
                                        const char *image, Error **errp)
{
    ImageRun run = { .fn = run_delete, .image = image };

    image_run(node_name, &run, true, errp);
}

static bool run_rename(ImageRun *run)
{
    return bale_image_rename(run->store, run->image, run->new_name,
                             &run->err);
}

void coroutine_fn qmp_bale_image_rename(const char *node_name,
                                        const char *image,
                                        const char *new_name, Error **errp)
{
    ImageRun run = { .fn = run_rename, .image = image, .new_name = new_name };

    image_run(node_name, &run, true, errp);
}

static bool run_set_read_only(ImageRun *run)
{
    return bale_image_set_read_only(run->store, run->image, run->read_only,
                                    &run->err);
}

void coroutine_fn qmp_bale_image_set_read_only(const char *node_name,
                                               const char *image,
                                               bool read_only, Error **errp)
{
    ImageRun run = {
        .fn = run_set_read_only, .image = image, .read_only = read_only,
    };

    image_run(node_name, &run, true, errp);
}

static bool run_clone(ImageRun *run)
{
    return bale_image_clone(run->store, run->image, run->snapshot,
                            run->new_name, &run->err);
}

void coroutine_fn qmp_bale_image_clone(const char *node_name,
                                       const char *image, bool has_snapshot,
                                       const char *snapshot,
                                       const char *new_name, Error **errp)
{
    ImageRun run = {
        .fn = run_clone,
        .image = image,
        .snapshot = has_snapshot ? snapshot : NULL,
        .new_name = new_name,
    };

    image_run(node_name, &run, true, errp);
}

static bool run_snapshot(ImageRun *run)
{
    BaleSnapshotInfo info = { .name = run->snapshot };

    return bale_snapshot_create(run->store, run->image, &info, &run->err);
}

void coroutine_fn qmp_bale_image_snapshot(const char *node_name,
                                          const char *image,
                                          const char *snapshot, Error **errp)
{
    ImageRun run = { .fn = run_snapshot, .image = image,
                     .snapshot = snapshot };

    image_run(node_name, &run, true, errp);
}

static bool run_snapshot_delete(ImageRun *run)
{
    return bale_snapshot_delete(run->store, run->image, run->snapshot,
                                &run->err);
}

void coroutine_fn qmp_bale_image_snapshot_delete(const char *node_name,
                                                 const char *image,
                                                 const char *snapshot,
                                                 Error **errp)
{
    ImageRun run = { .fn = run_snapshot_delete, .image = image,
                     .snapshot = snapshot };

    image_run(node_name, &run, true, errp);
}

static bool run_rollback(ImageRun *run)
{
    return bale_snapshot_rollback(run->store, run->image, run->snapshot,
                                  &run->err);
}

void coroutine_fn qmp_bale_image_rollback(const char *node_name,
                                          const char *image,
                                          const char *snapshot, Error **errp)
{
    BlockDriverState *bs = bale_find_node(node_name, errp);
    ImageRun run = { .fn = run_rollback, .image = image,
                     .snapshot = snapshot };
    BlockDriverState *other;

    if (!bs) {
        return;
    }
    /* Requests may be under way, and the block layer knows its size. */
    other = bale_bs_of_image(bs, image);
    if (other) {
        error_setg(errp, "Image '%s' is open in node '%s'", image,
                   bdrv_get_node_name(other));
        return;
    }
    image_run(node_name, &run, true, errp);
}
