/*
 * The format driver "bale": what is done to an image as a whole, and checking
 * the store.
 *
 * The engine's functions for it block and run on threads of their own
 * (bale_bs_run()); the caller waits.
 *
 * Threads: a driver's callbacks, under QEMU's rules.  Errors: negative errno,
 * with @errp set where there is one.
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
#include "bale-node-internal.h"

typedef struct EngineChange {
    BaleImage *image;
    uint64_t size;
    const char *backing_file;
    const char *backing_format;
    GError *err;
    bool ok;
} EngineChange;

static void engine_resize_blocking(void *opaque)
{
    EngineChange *c = opaque;

    c->ok = bale_image_resize(c->image, c->size, &c->err);
}

static void engine_set_backing_blocking(void *opaque)
{
    EngineChange *c = opaque;

    c->ok = bale_image_set_backing(c->image, c->backing_file,
                                   c->backing_format, &c->err);
}

static void engine_clear_blocking(void *opaque)
{
    EngineChange *c = opaque;

    c->ok = bale_image_clear(c->image, &c->err);
}

static int engine_change(BlockDriverState *bs, BaleBlockingFunc *fn,
                         EngineChange *c, Error **errp)
{
    BDRVBaleState *s = bs->opaque;

    c->image = s->image;
    bale_bs_run(bs, fn, c);
    return c->ok ? 0 : bale_bridge_error(c->err, errp);
}

int coroutine_fn bale_co_truncate(BlockDriverState *bs, int64_t offset,
                                         bool exact, PreallocMode prealloc,
                                         BdrvRequestFlags flags, Error **errp)
{
    BDRVBaleState *s = bs->opaque;
    uint64_t old_size = bale_image_size(s->image);
    EngineChange c = { .size = offset };
    int ret;

    if (prealloc != PREALLOC_MODE_OFF) {
        error_setg(errp, "Unsupported preallocation mode '%s'",
                   PreallocMode_str(prealloc));
        return -ENOTSUP;
    }
    if (!QEMU_IS_ALIGNED(offset, BDRV_SECTOR_SIZE)) {
        error_setg(errp, "The new size must be a multiple of %u",
                   (unsigned)BDRV_SECTOR_SIZE);
        return -EINVAL;
    }

    ret = bale_bitmaps_truncate_check(bs, errp);
    if (ret < 0) {
        return ret;
    }
    ret = engine_change(bs, engine_resize_blocking, &c, errp);
    if (ret < 0) {
        return ret;
    }
    if ((flags & BDRV_REQ_ZERO_WRITE) && (uint64_t)offset > old_size) {
        /* Before anybody can see what the backing node has there. */
        ret = bale_co_zero_range(bs, old_size, offset - old_size, 0);
        if (ret < 0) {
            Error *err = NULL;

            error_setg_errno(errp, -ret, "Could not zero the new area");
            c.size = old_size;
            if (engine_change(bs, engine_resize_blocking, &c, &err) < 0) {
                error_free(err);
            }
            return ret;
        }
    }
    return 0;
}

int bale_change_backing_file(BlockDriverState *bs,
                                    const char *backing_file,
                                    const char *backing_fmt)
{
    EngineChange c = {
        .backing_file = backing_file,
        .backing_format = backing_fmt,
    };
    Error *err = NULL;
    int ret;

    if (backing_file && strlen(backing_file) > BALE_BACKING_NAME_MAX) {
        return -EINVAL;
    }
    ret = engine_change(bs, engine_set_backing_blocking, &c, &err);
    if (ret < 0) {
        error_free(err);
        return ret;
    }
    pstrcpy(bs->auto_backing_file, sizeof(bs->auto_backing_file),
            backing_file ?: "");
    pstrcpy(bs->backing_file, sizeof(bs->backing_file), backing_file ?: "");
    pstrcpy(bs->backing_format, sizeof(bs->backing_format), backing_fmt ?: "");
    return 0;
}

int bale_make_empty(BlockDriverState *bs)
{
    EngineChange c = { 0 };
    Error *err = NULL;
    int ret = engine_change(bs, engine_clear_blocking, &c, &err);

    if (ret < 0) {
        error_free(err);
    }
    return ret;
}

/*
 * --- Another image of the store
 */

typedef struct EngineSwitch {
    BaleStore *store;
    BaleImage *image;
    char *name;
    BaleImage *opened;
    GError *err;
} EngineSwitch;

static void engine_switch_blocking(void *opaque)
{
    EngineSwitch *c = opaque;

    c->opened = bale_image_open(c->store, c->name, &c->err);
    if (c->opened) {
        bale_image_close(c->image);
    }
}

/* Show a snapshot from now on; the node is read-only. */
int bale_snapshot_load_tmp(BlockDriverState *bs,
                                  const char *snapshot_id, const char *name,
                                  Error **errp)
{
    BDRVBaleState *s = bs->opaque;
    g_autofree char *full =
        g_strdup_printf("%s@%s", s->image_name ?: "", snapshot_id ?: name);
    EngineSwitch c = { s->store, s->image, full, NULL, NULL };

    bale_bs_run(bs, engine_switch_blocking, &c);
    if (!c.opened) {
        return bale_bridge_error(c.err, errp);
    }
    s->image = c.opened;
    bale_bs_set_backing(bs);
    bs->total_sectors = DIV_ROUND_UP(bale_image_size(s->image),
                                     BDRV_SECTOR_SIZE);
    return 0;
}

/*
 * --- Check
 */

typedef struct EngineCheck {
    BaleStore *store;
    unsigned flags;
    BaleCheckResult result;
    GError *err;
    bool ok;
} EngineCheck;

static bool check_report(void *opaque, const char *what, uint64_t done,
                         uint64_t total)
{
    if (what) {
        /* As for other formats, the result goes to stdout, possibly as JSON,
         * and the findings to stderr. */
        fprintf(stderr, "%s\n", what);
    }
    return true;
}

static void engine_check_blocking(void *opaque)
{
    EngineCheck *c = opaque;

    c->ok = bale_store_check(c->store, c->flags, check_report, c, &c->result,
                             &c->err);
}

static int to_count(uint64_t n)
{
    return MIN(n, INT_MAX);
}

int coroutine_fn bale_co_check(BlockDriverState *bs,
                                      BdrvCheckResult *result,
                                      BdrvCheckMode fix)
{
    BDRVBaleState *s = bs->opaque;
    EngineCheck c = { .store = s->store, .flags = BALE_CHECK_DATA };
    uint64_t leaks, corruptions;

    if (fix & BDRV_FIX_LEAKS) {
        c.flags |= BALE_CHECK_FIX_LEAKS;
    }
    if (fix & BDRV_FIX_ERRORS) {
        c.flags |= BALE_CHECK_FIX_ALL;
    }
    bale_bs_run(bs, engine_check_blocking, &c);
    if (!c.ok) {
        Error *err = NULL;
        int ret = bale_bridge_error(c.err, &err);

        error_report_err(err);
        result->check_errors++;
        return ret;
    }

    leaks = c.result.leaked_pages;
    corruptions = c.result.damaged + c.result.wrong_counters +
                  c.result.bad_superblocks + c.result.corrupt;
    if (fix) {
        uint64_t fixed = MIN(c.result.fixed, leaks + corruptions);
        uint64_t leaks_fixed = MIN(fixed, leaks);

        result->leaks_fixed = to_count(leaks_fixed);
        result->corruptions_fixed = to_count(fixed - leaks_fixed);
        leaks -= leaks_fixed;
        corruptions -= fixed - leaks_fixed;
    }
    result->leaks = to_count(leaks);
    result->corruptions = to_count(corruptions);
    result->image_end_offset = c.result.end_offset;
    result->bfi.total_clusters = c.result.clusters_total;
    result->bfi.allocated_clusters = c.result.clusters_allocated;
    result->bfi.compressed_clusters = c.result.clusters_compressed;
    return 0;
}
