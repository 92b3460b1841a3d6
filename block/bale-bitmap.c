/*
 * Persistent dirty bitmaps of a bale node: from the store when the node is
 * opened, back when it is closed, inactivated or becomes read-only.
 *
 * As with qcow2, a bitmap that is persistent lives in QEMU's memory while the
 * node can be written to, and is in use in the store for so long; what is still
 * in use when the node is opened was left so by a crash, and is inconsistent.
 *
 * Invariants
 * 1. A bitmap that records changes, or that QMP can change, is in use in the
 *    store, durably, or was never stored: bitmaps of a node that cannot be
 *    written to are read-only.
 * 2. The bits are read and written while no request of the node is under way,
 *    so that the thread that hands them to the engine has them alone.
 *
 * Threads: a driver's callbacks, in the main thread, under QEMU's rules.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "qemu/osdep.h"
#include "block/block_int.h"
#include "block/dirty-bitmap.h"
#include "qapi/error.h"
#include "qemu/cutils.h"
#include "qemu/error-report.h"

#include "extstore/bitmap.h"

#include "bale-bridge-internal.h"
#include "bale-driver-internal.h"
#include "bale-internal.h"

/* A call of the engine, made in a thread of its own. */
typedef struct EngineBitmaps {
    BaleStore *store;
    BaleImage *image;
    const char *name;
    BaleBitmapSource *sources;
    BaleBitmapInfo *infos;
    unsigned n;
    BdrvDirtyBitmap *bitmap;
    GArray *list; /* BaleBitmapInfo */
    GError *err;
    bool opening;
    bool ok;
} EngineBitmaps;

static bool bitmaps_run(BlockDriverState *bs, BaleBlockingFunc *fn,
                        EngineBitmaps *c, Error **errp)
{
    c->store = bale_bs_store(bs);
    c->image = bale_bs_image(bs);
    if (c->opening) {
        /* The caller has not taken the context that the node may be in. */
        bale_bs_busy_begin(bs);
        bale_bridge_run(NULL, fn, c);
        bale_bs_busy_end(bs);
    } else {
        bale_bs_run(bs, fn, c);
    }
    if (!c->ok) {
        bale_bridge_error(c->err, errp);
    }
    return c->ok;
}

/* The part of the node that @len bytes of bits from @pos on stand for. */
static void bits_range(const BdrvDirtyBitmap *bitmap, uint64_t pos, size_t len,
                       uint64_t *offset, uint64_t *bytes)
{
    uint64_t size = bdrv_dirty_bitmap_size(bitmap);
    uint64_t covers = 8ull * bdrv_dirty_bitmap_granularity(bitmap);

    *offset = pos * covers;
    assert(*offset < size);
    *bytes = MIN(len * covers, size - *offset);
}

static void bits_give(void *opaque, uint64_t pos, void *buf, size_t len)
{
    uint64_t offset, bytes;

    bits_range(opaque, pos, len, &offset, &bytes);
    bdrv_dirty_bitmap_serialize_part(opaque, buf, offset, bytes);
}

static void bits_take(void *opaque, uint64_t pos, void *buf, size_t len)
{
    uint64_t offset, bytes, bits;

    if (buffer_is_zero(buf, len)) {
        return; /* as it is made; what a store claims takes no memory */
    }
    bits_range(opaque, pos, len, &offset, &bytes);
    /* Nothing may be dirty behind the end, whatever the store says. */
    bits = DIV_ROUND_UP(bytes, bdrv_dirty_bitmap_granularity(opaque));
    for (uint64_t bit = bits; bit < len * 8ull; bit++) {
        ((uint8_t *)buf)[bit / 8] &= ~(1u << bit % 8);
    }
    bdrv_dirty_bitmap_deserialize_part(opaque, buf, offset, bytes, false);
}

/* --- from the store --- */

static void list_blocking(void *opaque)
{
    EngineBitmaps *c = opaque;

    c->list = bale_bitmap_list(c->store, c->name, &c->err);
    c->ok = c->list;
}

static void begin_use_blocking(void *opaque)
{
    EngineBitmaps *c = opaque;

    c->ok = bale_bitmaps_begin_use(c->image, &c->err);
}

static void load_blocking(void *opaque)
{
    EngineBitmaps *c = opaque;

    c->ok = bale_bitmap_load(c->image, c->name, bits_take, c->bitmap,
                             &c->err);
}

/* One bitmap; what cannot be used is there too, to be seen and removed. */
static int load_one(BlockDriverState *bs, const BaleBitmapInfo *info,
                    Error **errp)
{
    int64_t size = bdrv_getlength(bs);
    BdrvDirtyBitmap *bitmap = bdrv_find_dirty_bitmap(bs, info->name);
    EngineBitmaps c = { .name = info->name, .opening = true };
    bool usable = !info->in_use && info->size == (uint64_t)size;
    uint32_t granularity = info->granularity;

    if (size < 0) {
        error_setg_errno(errp, -size, "Could not get the node's length");
        return size;
    }
    if (bitmap) {
        if (info->in_use) {
            return 0; /* ours, or it came by migration */
        }
        error_setg(errp, "Bitmap '%s' exists already", info->name);
        return -EEXIST;
    }
    while (!usable && bale_bitmap_data_len(size, granularity) >
                          BALE_BITMAP_DATA_MAX) {
        granularity *= 2; /* nobody looks at its bits */
    }
    bitmap = bdrv_create_dirty_bitmap(bs, granularity, info->name, errp);
    if (!bitmap) {
        return -EINVAL;
    }
    bdrv_dirty_bitmap_set_persistence(bitmap, true);
    c.bitmap = bitmap;
    if (usable) {
        Error *err = NULL;

        usable = bitmaps_run(bs, load_blocking, &c, &err);
        if (usable && size > 0) {
            bdrv_dirty_bitmap_deserialize_finish(bitmap); /* asserts a bit */
        } else if (!usable) {
            error_reportf_err(err, "bale: node '%s': bitmap '%s' cannot be "
                              "used: ", bdrv_get_node_name(bs), info->name);
        }
    }
    if (!usable) {
        bdrv_dirty_bitmap_set_inconsistent(bitmap);
    }
    if (!info->enabled) {
        bdrv_disable_dirty_bitmap(bitmap);
    }
    return 0;
}

static void set_all_read_only(BlockDriverState *bs, bool read_only)
{
    BdrvDirtyBitmap *bitmap;

    FOR_EACH_DIRTY_BITMAP(bs, bitmap) {
        if (bdrv_dirty_bitmap_get_persistence(bitmap)) {
            bdrv_dirty_bitmap_set_readonly(bitmap, read_only);
        }
    }
}

static void release_persistent(BlockDriverState *bs)
{
    BdrvDirtyBitmap *bitmap = bdrv_dirty_bitmap_first(bs);

    while (bitmap) {
        BdrvDirtyBitmap *next = bdrv_dirty_bitmap_next(bitmap);

        if (bdrv_dirty_bitmap_get_persistence(bitmap)) {
            bdrv_release_dirty_bitmap(bitmap);
        }
        bitmap = next;
    }
}

int bale_bitmaps_load(BlockDriverState *bs, const char *image_name,
                      bool writable, Error **errp)
{
    EngineBitmaps c = { .name = image_name, .opening = true };
    int ret = 0;

    if (!bitmaps_run(bs, list_blocking, &c, errp)) {
        return -EIO;
    }
    for (guint i = 0; ret == 0 && i < c.list->len; i++) {
        ret = load_one(bs, &g_array_index(c.list, BaleBitmapInfo, i), errp);
    }
    if (ret == 0 && c.list->len && writable &&
        !bitmaps_run(bs, begin_use_blocking, &c, errp)) {
        ret = -EIO;
    }
    if (ret < 0) {
        release_persistent(bs);
    } else if (!writable) {
        set_all_read_only(bs, true);
    }
    g_array_unref(c.list);
    return ret;
}

int bale_bitmaps_reopen_rw(BlockDriverState *bs, Error **errp)
{
    EngineBitmaps c = { .n = 0 };

    if (!bdrv_has_readonly_bitmaps(bs)) {
        return 0;
    }
    if (!bitmaps_run(bs, begin_use_blocking, &c, errp)) {
        return -EIO; /* they stay read-only, and so no write succeeds */
    }
    set_all_read_only(bs, false);
    return 0;
}

/* --- to the store --- */

static void store_blocking(void *opaque)
{
    EngineBitmaps *c = opaque;

    c->ok = bale_bitmaps_store(c->image, c->sources, c->n, &c->err);
}

static BaleBitmapInfo bitmap_info(BdrvDirtyBitmap *bitmap)
{
    return (BaleBitmapInfo) {
        .name = (char *)bdrv_dirty_bitmap_name(bitmap),
        .size = bdrv_dirty_bitmap_size(bitmap),
        .granularity = bdrv_dirty_bitmap_granularity(bitmap),
        .enabled = bdrv_dirty_bitmap_enabled(bitmap),
    };
}

int bale_bitmaps_store_all(BlockDriverState *bs, bool release, Error **errp)
{
    g_autoptr(GArray) sources = g_array_new(FALSE, TRUE,
                                            sizeof(BaleBitmapSource));
    EngineBitmaps c = { .ok = true };
    BdrvDirtyBitmap *bitmap;

    FOR_EACH_DIRTY_BITMAP(bs, bitmap) {
        BaleBitmapSource source = {
            .give = bits_give,
            .opaque = bitmap,
        };

        if (bdrv_dirty_bitmap_get_persistence(bitmap) &&
            !bdrv_dirty_bitmap_inconsistent(bitmap) &&
            !bdrv_dirty_bitmap_readonly(bitmap)) {
            source.info = bitmap_info(bitmap);
            /* QEMU's list has the newest first. */
            g_array_prepend_val(sources, source);
        }
    }
    if (sources->len) {
        c.sources = (BaleBitmapSource *)sources->data;
        c.n = sources->len;
        bitmaps_run(bs, store_blocking, &c, errp);
    }
    if (release) {
        release_persistent(bs);
    } else if (c.ok) {
        set_all_read_only(bs, true);
    }
    return c.ok ? 0 : -EIO;
}

/* --- callbacks --- */

bool bale_supports_persistent_dirty_bitmap(BlockDriverState *bs)
{
    return true;
}

static void check_blocking(void *opaque)
{
    EngineBitmaps *c = opaque;

    c->ok = bale_bitmaps_check(c->image, c->infos, c->n, &c->err);
}

bool coroutine_fn bale_co_can_store_new_dirty_bitmap(BlockDriverState *bs,
                                                     const char *name,
                                                     uint32_t granularity,
                                                     Error **errp)
{
    ERRP_GUARD();
    g_autoptr(GArray) infos = g_array_new(FALSE, TRUE,
                                          sizeof(BaleBitmapInfo));
    EngineBitmaps c = { .n = 0 };
    int64_t size = bdrv_getlength(bs);
    BdrvDirtyBitmap *bitmap;
    BaleBitmapInfo new = {
        .name = (char *)name,
        .size = size,
        .granularity = granularity,
        .enabled = true,
    };

    if (bdrv_find_dirty_bitmap(bs, name)) {
        error_setg(errp, "Bitmap already exists: %s", name);
        return false;
    }
    if (size < 0 || bdrv_is_read_only(bs)) {
        error_setg(errp, "Bitmap '%s' cannot be made persistent: node '%s' "
                   "cannot be written to", name, bdrv_get_node_name(bs));
        return false;
    }
    /* Those that were not stored yet want their place as well. */
    FOR_EACH_DIRTY_BITMAP(bs, bitmap) {
        if (bdrv_dirty_bitmap_get_persistence(bitmap) &&
            !bdrv_dirty_bitmap_inconsistent(bitmap)) {
            BaleBitmapInfo info = bitmap_info(bitmap);

            g_array_append_val(infos, info);
        }
    }
    g_array_append_val(infos, new);
    c.infos = (BaleBitmapInfo *)infos->data;
    c.n = infos->len;
    if (!bitmaps_run(bs, check_blocking, &c, errp)) {
        error_prepend(errp, "Bitmap '%s' cannot be made persistent in '%s': ",
                      name, bdrv_get_device_or_node_name(bs));
        return false;
    }
    return true;
}

static void remove_blocking(void *opaque)
{
    EngineBitmaps *c = opaque;

    c->list = bale_bitmap_list(c->store, c->name, NULL);
    c->ok = true;
    for (guint i = 0; c->list && i < c->list->len; i++) {
        if (!strcmp(g_array_index(c->list, BaleBitmapInfo, i).name,
                    c->infos->name)) {
            c->ok = bale_bitmap_remove(c->image, c->infos->name, &c->err);
        }
    }
    if (c->list) {
        g_array_unref(c->list);
    }
}

int coroutine_fn bale_co_remove_persistent_dirty_bitmap(BlockDriverState *bs,
                                                        const char *name,
                                                        Error **errp)
{
    g_autofree BaleImageInfo *image = g_new0(BaleImageInfo, 1);
    BaleBitmapInfo info = { .name = (char *)name };
    EngineBitmaps c = { .name = image->name, .infos = &info };

    /* One that was never stored is nowhere else than in QEMU. */
    bale_image_get_info(bale_bs_image(bs), image);
    return bitmaps_run(bs, remove_blocking, &c, errp) ? 0 : -EIO;
}

int bale_bitmaps_truncate_check(BlockDriverState *bs, Error **errp)
{
    BdrvDirtyBitmap *bitmap;

    FOR_EACH_DIRTY_BITMAP(bs, bitmap) {
        if (bdrv_dirty_bitmap_get_persistence(bitmap) &&
            bdrv_dirty_bitmap_check(bitmap, BDRV_BITMAP_DEFAULT, errp)) {
            return -ENOTSUP;
        }
    }
    return 0;
}

uint64_t bale_bitmaps_measure(BlockDriverState *bs, uint32_t cluster_size)
{
    BdrvDirtyBitmap *bitmap;
    uint64_t bytes = 0;

    FOR_EACH_DIRTY_BITMAP(bs, bitmap) {
        if (bdrv_dirty_bitmap_get_persistence(bitmap)) {
            bytes += QEMU_ALIGN_UP(bale_bitmap_data_len(
                                       bdrv_dirty_bitmap_size(bitmap),
                                       bdrv_dirty_bitmap_granularity(bitmap)),
                                   cluster_size);
        }
    }
    return bytes;
}
