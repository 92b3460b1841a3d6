/*
 * The format driver "bale": a compressed store as an image format, over its
 * `file` child like qcow2 or qed.
 *
 * The engine (extstore/store.h) does the work, the driver translates.  This
 * file has the life of a node: options, open, close, reopen.  bale-shared.c has
 * the stores, each with its nodes, bale-io.c the requests, bale-change.c what
 * is done to an image as a whole, bale-create.c creates, bridge.c has the
 * waiting, bdrv-device.c the transfers to the `file` node.
 *
 * Invariants
 * 1. An image's length in QEMU is its size rounded up to a sector; the engine
 *    is never asked for bytes past its size.
 * Those about the store are in bale-shared.c.
 *
 * Threads: a driver's callbacks, under QEMU's rules.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "qemu/osdep.h"
#include "block/block_int.h"
#include "block/qdict.h"
#include "qapi/error.h"
#include "qapi/qmp/qdict.h"
#include "qemu/cutils.h"
#include "qemu/error-report.h"
#include "qemu/module.h"
#include "qemu/option.h"

#include "extstore/store.h"

#include "bale-bridge-internal.h"
#include "bale-control-internal.h"
#include "bale-driver-internal.h"
#include "bale-internal.h"
#include "bale-node-internal.h"
#include "bale-shared-internal.h"
#include "bdrv-device-internal.h"

#define BALE_OPT_CACHE_SIZE          "cache-size"
#define BALE_OPT_COMPRESSION_THREADS "compression-threads"
#define BALE_OPT_IMAGE               "image"
#define BALE_OPT_SALVAGE             "salvage"
#define BALE_OPT_SKIP_UNCHANGED      "skip-unchanged"

BaleStore *bale_bs_store(BlockDriverState *bs)
{
    BDRVBaleState *s = bs->opaque;

    if (!bs->drv || strcmp(bs->drv->format_name, BALE_FORMAT_NAME)) {
        return NULL;
    }
    return s->store;
}

BaleImage *bale_bs_image(BlockDriverState *bs)
{
    BDRVBaleState *s = bs->opaque;

    return bale_bs_store(bs) ? s->image : NULL;
}

BaleControl *bale_bs_control(BlockDriverState *bs)
{
    BDRVBaleState *s = bs->opaque;

    return &s->control;
}

void bale_bs_busy_begin(BlockDriverState *bs)
{
    BDRVBaleState *s = bs->opaque;

    bale_bdrv_device_busy_begin(s->dev);
}

void bale_bs_busy_end(BlockDriverState *bs)
{
    BDRVBaleState *s = bs->opaque;

    if (s->dev) {
        bale_bdrv_device_busy_end(s->dev);
    }
}

/*
 * --- Blocking functions of the engine
 */

void bale_bs_run(BlockDriverState *bs, BaleBlockingFunc *fn, void *opaque)
{
    BDRVBaleState *s = bs->opaque;
    BaleBdrvDevice *dev = s->dev;

    bale_bdrv_device_busy_begin(dev);
    bale_bridge_run(bdrv_get_aio_context(bs), fn, opaque);
    bale_bdrv_device_busy_end(dev);
}

/*
 * --- Open, close, reopen
 */

/* Those of the runtime options that can change while the store is open. */
#define BALE_MUTABLE_OPT_DESCS                                       \
    {                                                                \
        .name = BALE_OPT_CACHE_SIZE,                                 \
        .type = QEMU_OPT_SIZE,                                       \
        .help = "Memory for decompressed clusters (default: 16M)",   \
    },                                                               \
    {                                                                \
        .name = BALE_OPT_COMPRESSION_THREADS,                        \
        .type = QEMU_OPT_NUMBER,                                     \
        .help = "Threads that compress and decompress "              \
                "(default: one for each core)",                      \
    },                                                               \
    {                                                                \
        .name = BALE_OPT_SKIP_UNCHANGED,                             \
        .type = QEMU_OPT_BOOL,                                       \
        .help = "Store no cluster again that is written with what "  \
                "it holds (default: off)",                           \
    }

static QemuOptsList bale_runtime_opts = {
    .name = "bale",
    .head = QTAILQ_HEAD_INITIALIZER(bale_runtime_opts.head),
    .desc = {
        BALE_MUTABLE_OPT_DESCS,
        {
            .name = BALE_OPT_IMAGE,
            .type = QEMU_OPT_STRING,
            .help = "IMAGE or IMAGE@SNAPSHOT in the store "
                    "(default: the unnamed image)",
        },
        {
            .name = BALE_OPT_SALVAGE,
            .type = QEMU_OPT_BOOL,
            .help = "Read what is left of a store that is marked corrupt, "
                    "which may be old (default: off)",
        },
        { /* end of list */ }
    },
};

bool bale_workers_check(uint64_t workers, Error **errp)
{
    if (workers > BALE_WORKERS_MAX) {
        error_setg(errp, "'%s' must be between 1 and %u, or 0 for one for "
                   "each core", BALE_OPT_COMPRESSION_THREADS,
                   BALE_WORKERS_MAX);
        return false;
    }
    return true;
}

bool bale_cache_size_check(uint64_t bytes, Error **errp)
{
    if (bytes > BALE_CACHE_SIZE_MAX) {
        error_setg(errp, "'%s' must be at most %llu bytes",
                   BALE_OPT_CACHE_SIZE, BALE_CACHE_SIZE_MAX);
        return false;
    }
    return true;
}

/* Takes compression-threads and cache-size from @opts. */
static bool read_resources(QemuOpts *opts, unsigned *workers,
                           uint64_t *cache_size, Error **errp)
{
    uint64_t n = qemu_opt_get_number(opts, BALE_OPT_COMPRESSION_THREADS, 0);

    if (!bale_workers_check(n, errp)) {
        return false;
    }
    *workers = n;
    *cache_size = qemu_opt_get_size(opts, BALE_OPT_CACHE_SIZE,
                                    BALE_CACHE_SIZE_DEFAULT);
    return bale_cache_size_check(*cache_size, errp);
}

static int bale_read_options(BDRVBaleState *s, QDict *options, Error **errp)
{
    QemuOpts *opts = qemu_opts_create(&bale_runtime_opts, NULL, 0,
                                      &error_abort);
    int ret = -EINVAL;

    if (!qemu_opts_absorb_qdict(opts, options, errp) ||
        !read_resources(opts, &s->workers, &s->cache_size, errp)) {
        goto out;
    }
    s->has_workers = qemu_opt_find(opts, BALE_OPT_COMPRESSION_THREADS);
    s->has_cache_size = qemu_opt_find(opts, BALE_OPT_CACHE_SIZE);
    s->skip_unchanged = qemu_opt_get_bool(opts, BALE_OPT_SKIP_UNCHANGED,
                                          false);
    s->salvage = qemu_opt_get_bool(opts, BALE_OPT_SALVAGE, false);
    if (!bale_space_read_options(&s->space, options, errp)) {
        goto out;
    }
    s->image_name = g_strdup(qemu_opt_get(opts, BALE_OPT_IMAGE));
    ret = 0;

out:
    qemu_opts_del(opts);
    return ret;
}

static int bale_probe(const uint8_t *buf, int buf_size, const char *filename)
{
    return bale_store_probe(buf, buf_size) ? 100 : 0;
}

static void bale_use_backing_names(BlockDriverState *bs,
                                   const BaleImageInfo *info)
{
    if (info->has_backing_file) {
        pstrcpy(bs->auto_backing_file, sizeof(bs->auto_backing_file),
                info->backing_file);
        pstrcpy(bs->backing_file, sizeof(bs->backing_file),
                info->backing_file);
        pstrcpy(bs->backing_format, sizeof(bs->backing_format),
                info->backing_format);
    }
}

/* Does an open node with these flags write to its store? */
static bool writes_with(int flags)
{
    return (flags & BDRV_O_RDWR) && !(flags & BDRV_O_INACTIVE);
}

/* Of a damaged store nothing can be changed, so it has no bitmaps. */
static int load_bitmaps(BlockDriverState *bs, Error **errp)
{
    BDRVBaleState *s = bs->opaque;

    return s->shared->corrupt ? 0
                              : bale_bitmaps_load(bs, s->image_name,
                                                  s->writes, errp);
}

static int bale_open(BlockDriverState *bs, QDict *options, int flags,
                     Error **errp)
{
    BDRVBaleState *s = bs->opaque;
    BaleImageInfo info;
    int ret;

    ret = bdrv_open_file_child(NULL, options, "file", bs, errp);
    if (ret < 0) {
        return ret;
    }
    ret = bale_read_options(s, options, errp);
    if (ret < 0) {
        return ret;
    }

    s->node_name = g_strdup(bdrv_get_node_name(bs));
    ret = bale_shared_open(bs, writes_with(flags), &info, errp);
    if (ret == 0 && info.read_only && (flags & BDRV_O_RDWR)) {
        ret = bdrv_apply_auto_read_only(bs, "The image can only be read",
                                        errp);
        if (ret == 0) {
            ret = bale_shared_set_writes(bs, false, errp);
        }
        if (ret < 0) {
            bale_shared_close(bs, NULL);
        }
    }
    if (ret == 0) {
        bs->total_sectors = DIV_ROUND_UP(info.size, BDRV_SECTOR_SIZE);
        ret = flags & BDRV_O_INACTIVE ? 0 : load_bitmaps(bs, errp);
        if (ret < 0) {
            bale_shared_close(bs, NULL);
        }
    }
    if (ret < 0) {
        g_free(s->node_name);
        g_free(s->image_name);
        return ret;
    }

    if (s->shared->corrupt && !s->salvage &&
        !(flags & (BDRV_O_NO_IO | BDRV_O_CHECK))) {
        warn_report("bale: '%s': the store is marked corrupt: something was "
                    "lost that has no name any more. Reads fail, unless "
                    "'salvage' is on; then they may show older data",
                    s->node_name);
    }
    bale_use_backing_names(bs, &info);
    bs->supported_write_flags = BDRV_REQ_FUA;
    bs->supported_zero_flags = BDRV_REQ_FUA | BDRV_REQ_MAY_UNMAP |
                               BDRV_REQ_NO_FALLBACK;
    bs->supported_truncate_flags = BDRV_REQ_ZERO_WRITE;
    return 0;
}

static void bale_close(BlockDriverState *bs)
{
    BDRVBaleState *s = bs->opaque;
    Error *err = NULL;

    bale_control_close(&s->control);
    if (s->store && bale_bitmaps_store_all(bs, true, &err) < 0) {
        error_reportf_err(err, "bale: '%s': storing bitmaps: ", s->node_name);
        err = NULL;
    }
    if (bale_shared_close(bs, &err) < 0) {
        error_reportf_err(err, "bale: '%s': closing: ", s->node_name);
    }
    g_free(s->image_name);
    g_free(s->node_name);
}

static int bale_inactivate(BlockDriverState *bs)
{
    Error *err = NULL;
    int ret;

    bale_control_stop(bs);
    if (bale_bitmaps_store_all(bs, true, &err) < 0) {
        /* Who takes the image over finds them inconsistent. */
        error_reportf_err(err, "bale: '%s': storing bitmaps: ",
                          bdrv_get_node_name(bs));
        err = NULL;
    }
    ret = bale_shared_set_writes(bs, false, &err);
    if (ret < 0) {
        error_reportf_err(err, "bale: '%s': handing it over: ",
                          bdrv_get_node_name(bs));
    }
    return ret;
}

/* Somebody else may have written to the store: look at it anew. */
static void coroutine_fn bale_co_invalidate_cache(BlockDriverState *bs,
                                                  Error **errp)
{
    BDRVBaleState *s = bs->opaque;

    if (bale_shared_co_invalidate(bs, writes_with(bs->open_flags), errp) == 0) {
        bs->total_sectors = DIV_ROUND_UP(bale_image_size(s->image),
                                         BDRV_SECTOR_SIZE);
        load_bitmaps(bs, errp);
    }
}

static QemuOptsList bale_reopen_opts = {
    .name = "bale-reopen",
    .head = QTAILQ_HEAD_INITIALIZER(bale_reopen_opts.head),
    .desc = {
        BALE_MUTABLE_OPT_DESCS,
        { /* end of list */ }
    },
};

/* ... and be left out again, which stands for the default. */
static const char *const bale_mutable_opts[] = {
    BALE_OPT_CACHE_SIZE, BALE_OPT_COMPRESSION_THREADS,
    BALE_OPT_SKIP_UNCHANGED, NULL
};

typedef struct BaleReopen {
    uint64_t cache_size;
    unsigned workers;
    bool has_cache_size, has_workers;
    bool skip_unchanged;
} BaleReopen;

/* After a reopen: what was read-only can change again. */
static void reopen_bitmaps(BlockDriverState *bs)
{
    BDRVBaleState *s = bs->opaque;
    Error *err = NULL;

    if (s->writes && bale_bitmaps_reopen_rw(bs, &err) < 0) {
        error_reportf_err(err, "bale: '%s': reopening: ", s->node_name);
    }
}

static int bale_reopen_prepare(BDRVReopenState *state,
                               BlockReopenQueue *queue, Error **errp)
{
    BlockDriverState *bs = state->bs;
    BDRVBaleState *s = bs->opaque;
    BaleJob *job = bale_bs_control(bs)->job;
    QemuOpts *opts = qemu_opts_create(&bale_reopen_opts, NULL, 0,
                                      &error_abort);
    BaleReopen *r = g_new0(BaleReopen, 1);
    int ret = 0;

    if (!qemu_opts_absorb_qdict(opts, state->options, errp) ||
        !read_resources(opts, &r->workers, &r->cache_size, errp)) {
        ret = -EINVAL;
        goto out;
    }
    r->has_workers = qemu_opt_find(opts, BALE_OPT_COMPRESSION_THREADS);
    r->has_cache_size = qemu_opt_find(opts, BALE_OPT_CACHE_SIZE);
    r->skip_unchanged = qemu_opt_get_bool(opts, BALE_OPT_SKIP_UNCHANGED,
                                          false);
    if (!(state->flags & (BDRV_O_RDWR | BDRV_O_INACTIVE)) && job &&
        bale_job_writes(job)) {
        error_setg(errp, "Node '%s' has a job that writes: '%s'",
                   bdrv_get_node_name(bs), bale_job_id(job));
        ret = -EBUSY;
        goto out;
    }
    if (s->writes && !writes_with(state->flags)) {
        ret = bale_bitmaps_store_all(bs, false, errp);
    }
    if (ret == 0) {
        ret = bale_shared_reopen_prepare(bs, state->options,
                                         writes_with(state->flags), errp);
    }
    if (ret < 0) {
        reopen_bitmaps(bs);
    }

out:
    qemu_opts_del(opts);
    if (ret < 0) {
        g_clear_pointer(&r, g_free);
    }
    state->opaque = r;
    return ret;
}

static void bale_reopen_commit(BDRVReopenState *state)
{
    BDRVBaleState *s = state->bs->opaque;
    BaleReopen *r = state->opaque;
    bool alone = QLIST_FIRST(&s->shared->nodes) == s && !QLIST_NEXT(s, next);

    s->skip_unchanged = r->skip_unchanged;
    bale_image_set_skip_unchanged(s->image, s->skip_unchanged);
    /* What is left out means the default, but not to other nodes. */
    if (r->cache_size != s->shared->cache_size &&
        (r->has_cache_size || alone)) {
        bale_bs_set_cache_size(state->bs, r->cache_size);
    }
    if (r->workers != s->shared->workers && (r->has_workers || alone)) {
        Error *err = NULL;

        if (bale_bs_set_workers(state->bs, r->workers, &err) < 0) {
            error_reportf_err(err, "bale: '%s': ", s->node_name);
        }
    }
    g_clear_pointer(&state->opaque, g_free);
}

/* Permissions can be changed only now. */
static void bale_reopen_commit_post(BDRVReopenState *state)
{
    bale_shared_reopen_end(state->bs, writes_with(state->flags));
    reopen_bitmaps(state->bs);
}

static void bale_reopen_abort(BDRVReopenState *state)
{
    g_clear_pointer(&state->opaque, g_free);
    bale_shared_reopen_end(state->bs, writes_with(state->bs->open_flags));
    reopen_bitmaps(state->bs);
}

/*
 * --- Size, information, changes of the image
 */

static int64_t bale_getlength(BlockDriverState *bs)
{
    BDRVBaleState *s = bs->opaque;

    return QEMU_ALIGN_UP(bale_image_size(s->image), BDRV_SECTOR_SIZE);
}

static void bale_refresh_limits(BlockDriverState *bs, Error **errp)
{
    BDRVBaleState *s = bs->opaque;

    bs->bl.max_transfer = BALE_REQUEST_MAX;
    bs->bl.pwrite_zeroes_alignment = s->cluster_size;
    bs->bl.pdiscard_alignment = s->cluster_size;
}

static int bale_get_info(BlockDriverState *bs, BlockDriverInfo *bdi)
{
    BDRVBaleState *s = bs->opaque;

    bdi->cluster_size = s->cluster_size;
    bdi->is_dirty = s->shared->corrupt;
    return 0;
}

static int bale_has_zero_init(BlockDriverState *bs)
{
    return 1;
}

/*
 * --- The driver
 */

static BlockDriver bdrv_bale = {
    .format_name                     = BALE_FORMAT_NAME,
    .instance_size                   = sizeof(BDRVBaleState),
    .is_format                       = true,
    .supports_backing                = true,
    .create_opts                     = &bale_create_opts,

    .bdrv_probe                      = bale_probe,
    .bdrv_open                       = bale_open,
    .bdrv_close                      = bale_close,
    .bdrv_child_perm                 = bale_child_perm,
    .bdrv_inactivate                 = bale_inactivate,
    .bdrv_co_invalidate_cache        = bale_co_invalidate_cache,
    .mutable_opts                    = bale_mutable_opts,
    .bdrv_reopen_prepare             = bale_reopen_prepare,
    .bdrv_reopen_commit              = bale_reopen_commit,
    .bdrv_reopen_commit_post         = bale_reopen_commit_post,
    .bdrv_reopen_abort               = bale_reopen_abort,

    .bdrv_co_preadv_part             = bale_co_preadv_part,
    .bdrv_co_pwritev_part            = bale_co_pwritev_part,
    .bdrv_co_pwritev_compressed_part = bale_co_pwritev_compressed_part,
    .bdrv_co_pwrite_zeroes           = bale_co_pwrite_zeroes,
    .bdrv_co_pdiscard                = bale_co_pdiscard,
    .bdrv_co_flush_to_os             = bale_co_flush_to_os,
#ifdef BALE_BUILT_IN
    .bdrv_get_specific_info          = bale_get_specific_info,
    .bdrv_get_specific_stats         = bale_get_specific_stats,
#endif
    .bdrv_co_flush_to_disk           = bale_co_flush_to_disk,
    .bdrv_co_block_status            = bale_co_block_status,

    .bdrv_getlength                  = bale_getlength,
    .bdrv_refresh_limits             = bale_refresh_limits,
    .bdrv_get_info                   = bale_get_info,
    .bdrv_co_truncate                = bale_co_truncate,
    .bdrv_change_backing_file        = bale_change_backing_file,
    .bdrv_make_empty                 = bale_make_empty,
    .bdrv_has_zero_init              = bale_has_zero_init,
    .bdrv_co_check                   = bale_co_check,

    .bdrv_snapshot_create            = bale_snapshot_bs_create,
    .bdrv_snapshot_goto              = bale_snapshot_bs_goto,
    .bdrv_snapshot_delete            = bale_snapshot_bs_delete,
    .bdrv_snapshot_list              = bale_snapshot_bs_list,
    .bdrv_snapshot_load_tmp          = bale_snapshot_load_tmp,

    .bdrv_supports_persistent_dirty_bitmap =
        bale_supports_persistent_dirty_bitmap,
    .bdrv_co_can_store_new_dirty_bitmap =
        bale_co_can_store_new_dirty_bitmap,
    .bdrv_co_remove_persistent_dirty_bitmap =
        bale_co_remove_persistent_dirty_bitmap,

    .bdrv_co_create_opts             = bale_co_create_opts,
    .bdrv_measure                    = bale_measure,
};

static void bale_block_init(void)
{
    bdrv_register(&bdrv_bale);
}

block_init(bale_block_init);
