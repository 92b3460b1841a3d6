/*
 * The format driver "bale": a compressed store as an image format, over its
 * `file` child like qcow2 or qed.
 *
 * The engine (extstore/store.h) does the work, the driver translates.  This
 * file has the life of a node: options, open, close, reopen, and notices.
 * bale-io.c has the requests, bale-change.c what is done to an image as a
 * whole, bale-create.c creates, bridge.c has the waiting, bdrv-device.c the
 * transfers to the `file` child.
 *
 * Invariants
 * 1. s->store, s->image and s->dev are all set or all NULL; they change only in
 *    open, close, inactivate and invalidate, when no request is under way.
 * 2. While the node is inactive or read-only the engine is read-only.
 * 3. An image's length in QEMU is its size rounded up to a sector; the engine
 *    is never asked for bytes past its size.
 *
 * Threads: a driver's callbacks, under QEMU's rules.  The engine's callbacks
 * (backing reads, completions, notices) come from any thread and go through a
 * bottom half before they touch anything of QEMU's.
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
#include "bdrv-device-internal.h"

#define BALE_OPT_CACHE_SIZE          "cache-size"
#define BALE_OPT_COMPRESSION_THREADS "compression-threads"
#define BALE_OPT_IMAGE               "image"

/* Reports of damage that one open node makes before it falls silent. */
#define DAMAGE_REPORTS_MAX 16

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

void bale_bs_set_cache_size(BlockDriverState *bs, uint64_t bytes)
{
    BDRVBaleState *s = bs->opaque;

    s->cache_size = bytes;
    bale_store_set_cache_size(s->store, bytes);
}

int bale_bs_set_workers(BlockDriverState *bs, unsigned workers, Error **errp)
{
    BDRVBaleState *s = bs->opaque;
    GError *err = NULL;

    if (!bale_store_set_workers(s->store, workers, &err)) {
        return bale_bridge_error(err, errp);
    }
    s->workers = workers;
    return 0;
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
 * --- Notices of the engine
 */

static void notice_failed(void *opaque, const char *reason)
{
    BDRVBaleState *s = opaque;

    bale_notice_failed(s->node_name, s->filename, reason);
}

static void notice_revived(void *opaque)
{
    BDRVBaleState *s = opaque;

    bale_notice_recovered(s->node_name, s->filename);
}

static void notice_damage(void *opaque, const char *what)
{
    BDRVBaleState *s = opaque;
    int nr = qatomic_fetch_inc(&s->damage_reports);

    if (nr < DAMAGE_REPORTS_MAX) {
        bale_notice_damage(s->node_name, s->filename, what,
                           nr == DAMAGE_REPORTS_MAX - 1);
    } else {
        qatomic_dec(&s->damage_reports);
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

typedef struct EngineOpen {
    BaleDevice *device;
    const char *image_name;
    BaleOpenOptions options;
    BaleStore *store;
    BaleImage *image;
    BaleStoreInfo info;
    BaleImageInfo image_info;
    GError *err;
} EngineOpen;

static void engine_open_blocking(void *opaque)
{
    EngineOpen *o = opaque;

    o->store = bale_store_open(o->device, &o->options, &o->err);
    if (!o->store) {
        bale_device_close(o->device);
        return;
    }
    o->image = bale_image_open(o->store, o->image_name, &o->err);
    if (!o->image) {
        bale_store_close(o->store, NULL);
        o->store = NULL;
        return;
    }
    bale_store_get_info(o->store, &o->info);
    bale_image_get_info(o->image, &o->image_info);
}

/*
 * Open the store in bs->file.  On success s->store, s->image and s->dev are
 * set and *@info, if not NULL, describes the image.
 */
static int engine_open(BlockDriverState *bs, bool read_only,
                       BaleImageInfo *info, Error **errp)
{
    BDRVBaleState *s = bs->opaque;
    EngineOpen o = {
        .options = {
            .read_only = read_only,
            .repair = bs->open_flags & BDRV_O_CHECK,
            .workers = s->workers,
            .cache_size = s->cache_size,
            .failed = notice_failed,
            .revived = notice_revived,
            .damage = notice_damage,
            .notify_opaque = s,
        },
    };

    assert(!s->store);
    s->dev = bale_bdrv_device_new(bs, NULL, bdrv_get_aio_context(bs),
                                  read_only, errp);
    if (!s->dev) {
        return -EINVAL;
    }
    o.device = bale_bdrv_device_get(s->dev);
    o.image_name = s->image_name;

    bale_bs_run(bs, engine_open_blocking, &o);
    if (!o.store) {
        bale_bdrv_device_unref(s->dev);
        s->dev = NULL;
        return bale_bridge_error(o.err, errp);
    }

    s->store = o.store;
    s->image = o.image;
    s->cluster_size = o.image_info.cluster_size;
    s->read_only = read_only;
    s->corrupt = o.info.corrupt;
    qatomic_set(&s->damage_reports, 0);
    qemu_co_mutex_init(&s->revive_lock);
    bale_bs_set_backing(bs);
    if (info) {
        *info = o.image_info;
    }
    return 0;
}

typedef struct EngineClose {
    BaleStore *store;
    BaleImage *image;
    GError *err;
    bool ok;
} EngineClose;

static void engine_close_blocking(void *opaque)
{
    EngineClose *c = opaque;

    bale_image_close(c->image);
    c->ok = bale_store_close(c->store, &c->err);
}

static int engine_close(BlockDriverState *bs, Error **errp)
{
    BDRVBaleState *s = bs->opaque;
    EngineClose c = { .store = s->store, .image = s->image };

    if (!s->store) {
        return 0;
    }
    bale_bs_run(bs, engine_close_blocking, &c);
    s->store = NULL;
    s->image = NULL;
    bale_bdrv_device_unref(s->dev);
    s->dev = NULL;
    return c.ok ? 0 : bale_bridge_error(c.err, errp);
}

typedef struct EngineReadOnly {
    BaleStore *store;
    GError *err;
    bool read_only;
    bool ok;
} EngineReadOnly;

static void engine_read_only_blocking(void *opaque)
{
    EngineReadOnly *r = opaque;

    r->ok = bale_store_set_read_only(r->store, r->read_only, &r->err);
}

static int engine_set_read_only(BlockDriverState *bs, bool read_only,
                                Error **errp)
{
    BDRVBaleState *s = bs->opaque;
    EngineReadOnly r = { .store = s->store, .read_only = read_only };

    if (s->read_only == read_only) {
        return 0;
    }
    if (!read_only) {
        bale_bdrv_device_set_read_only(s->dev, false);
    }
    bale_bs_run(bs, engine_read_only_blocking, &r);
    if (!r.ok) {
        bale_bdrv_device_set_read_only(s->dev, s->read_only);
        return bale_bridge_error(r.err, errp);
    }
    s->read_only = read_only;
    bale_bdrv_device_set_read_only(s->dev, read_only);
    return 0;
}

/*
 * --- Open, close, reopen
 */

static QemuOptsList bale_runtime_opts = {
    .name = "bale",
    .head = QTAILQ_HEAD_INITIALIZER(bale_runtime_opts.head),
    .desc = {
        {
            .name = BALE_OPT_CACHE_SIZE,
            .type = QEMU_OPT_SIZE,
            .help = "Memory for decompressed clusters (default: 16M)",
        },
        {
            .name = BALE_OPT_COMPRESSION_THREADS,
            .type = QEMU_OPT_NUMBER,
            .help = "Threads that compress and decompress "
                    "(default: one for each core)",
        },
        {
            .name = BALE_OPT_IMAGE,
            .type = QEMU_OPT_STRING,
            .help = "IMAGE or IMAGE@SNAPSHOT in the store "
                    "(default: the unnamed image)",
        },
        { /* end of list */ }
    },
};

/* Takes compression-threads from @opts. */
static bool read_workers(QemuOpts *opts, unsigned *workers, Error **errp)
{
    uint64_t n = qemu_opt_get_number(opts, BALE_OPT_COMPRESSION_THREADS, 0);

    if (n > BALE_WORKERS_MAX) {
        error_setg(errp, "'%s' must be between 1 and %u, or 0 for one for "
                   "each core", BALE_OPT_COMPRESSION_THREADS,
                   BALE_WORKERS_MAX);
        return false;
    }
    *workers = n;
    return true;
}

static int bale_read_options(BDRVBaleState *s, QDict *options, Error **errp)
{
    QemuOpts *opts = qemu_opts_create(&bale_runtime_opts, NULL, 0,
                                      &error_abort);
    int ret = -EINVAL;

    if (!qemu_opts_absorb_qdict(opts, options, errp) ||
        !read_workers(opts, &s->workers, errp)) {
        goto out;
    }
    s->cache_size = qemu_opt_get_size(opts, BALE_OPT_CACHE_SIZE,
                                      BALE_CACHE_SIZE_DEFAULT);
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
    s->filename = g_strdup(bs->file->bs->filename[0] ?
                           bs->file->bs->filename : s->node_name);
    ret = engine_open(bs, !(flags & BDRV_O_RDWR) || (flags & BDRV_O_INACTIVE),
                      &info, errp);
    if (ret == 0 && info.read_only && (flags & BDRV_O_RDWR)) {
        ret = bdrv_apply_auto_read_only(bs, "The image can only be read",
                                        errp);
        if (ret < 0) {
            engine_close(bs, NULL);
        }
    }
    if (ret < 0) {
        g_free(s->node_name);
        g_free(s->filename);
        g_free(s->image_name);
        return ret;
    }

    bs->total_sectors = DIV_ROUND_UP(info.size, BDRV_SECTOR_SIZE);
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
    if (engine_close(bs, &err) < 0) {
        error_reportf_err(err, "bale: '%s': closing: ", s->filename);
    }
    g_free(s->image_name);
    g_free(s->node_name);
    g_free(s->filename);
}

static int bale_inactivate(BlockDriverState *bs)
{
    Error *err = NULL;
    int ret;

    bale_control_stop(bs);
    ret = engine_set_read_only(bs, true, &err);
    if (ret < 0) {
        BDRVBaleState *s = bs->opaque;

        error_reportf_err(err, "bale: '%s': handing it over: ", s->filename);
    }
    return ret;
}

/* Somebody else may have written to the store: look at it anew. */
static void coroutine_fn bale_co_invalidate_cache(BlockDriverState *bs,
                                                  Error **errp)
{
    BaleImageInfo info;
    int ret = engine_close(bs, errp);

    if (ret < 0) {
        return;
    }
    ret = engine_open(bs, !(bs->open_flags & BDRV_O_RDWR), &info, errp);
    if (ret < 0) {
        error_prepend(errp, "Could not reopen the store: ");
        /* Like qcow2: a node that cannot be used answers no more requests. */
        bale_control_close(bale_bs_control(bs));
        bs->drv = NULL;
        return;
    }
    bs->total_sectors = DIV_ROUND_UP(info.size, BDRV_SECTOR_SIZE);
}

/* Those of the runtime options that can change while the store is open. */
static QemuOptsList bale_reopen_opts = {
    .name = "bale-reopen",
    .head = QTAILQ_HEAD_INITIALIZER(bale_reopen_opts.head),
    .desc = {
        {
            .name = BALE_OPT_CACHE_SIZE,
            .type = QEMU_OPT_SIZE,
            .help = "Memory for decompressed clusters (default: 16M)",
        },
        {
            .name = BALE_OPT_COMPRESSION_THREADS,
            .type = QEMU_OPT_NUMBER,
            .help = "Threads that compress and decompress "
                    "(default: one for each core)",
        },
        { /* end of list */ }
    },
};

/* ... and be left out again, which stands for the default. */
static const char *const bale_mutable_opts[] = {
    BALE_OPT_CACHE_SIZE, BALE_OPT_COMPRESSION_THREADS, NULL
};

typedef struct BaleReopen {
    uint64_t cache_size;
    unsigned workers;
} BaleReopen;

static int bale_reopen_prepare(BDRVReopenState *state,
                               BlockReopenQueue *queue, Error **errp)
{
    BlockDriverState *bs = state->bs;
    BaleJob *job = bale_bs_control(bs)->job;
    QemuOpts *opts = qemu_opts_create(&bale_reopen_opts, NULL, 0,
                                      &error_abort);
    BaleReopen *r = g_new0(BaleReopen, 1);
    int ret = 0;

    if (!qemu_opts_absorb_qdict(opts, state->options, errp) ||
        !read_workers(opts, &r->workers, errp)) {
        ret = -EINVAL;
        goto out;
    }
    r->cache_size = qemu_opt_get_size(opts, BALE_OPT_CACHE_SIZE,
                                      BALE_CACHE_SIZE_DEFAULT);
    if (!(state->flags & (BDRV_O_RDWR | BDRV_O_INACTIVE))) {
        if (job && bale_job_writes(job)) {
            error_setg(errp, "Node '%s' has a job that writes: '%s'",
                       bdrv_get_node_name(bs), bale_job_id(job));
            ret = -EBUSY;
            goto out;
        }
        /* Make it durable and clean while the child may be written to. */
        ret = engine_set_read_only(bs, true, errp);
    }

out:
    qemu_opts_del(opts);
    if (ret < 0) {
        g_clear_pointer(&r, g_free);
    }
    state->opaque = r;
    return ret;
}

static void bale_reopen_sync(BlockDriverState *bs, int flags)
{
    Error *err = NULL;
    bool read_only = !(flags & BDRV_O_RDWR) || (flags & BDRV_O_INACTIVE);

    if (engine_set_read_only(bs, read_only, &err) < 0) {
        BDRVBaleState *s = bs->opaque;

        error_reportf_err(err, "bale: '%s': reopening: ", s->filename);
    }
}

static void bale_reopen_commit(BDRVReopenState *state)
{
    BDRVBaleState *s = state->bs->opaque;
    BaleReopen *r = state->opaque;

    if (r->cache_size != s->cache_size) {
        s->cache_size = r->cache_size;
        bale_store_set_cache_size(s->store, r->cache_size);
    }
    if (r->workers != s->workers) {
        Error *err = NULL;

        if (bale_bs_set_workers(state->bs, r->workers, &err) < 0) {
            error_reportf_err(err, "bale: '%s': ", s->filename);
        }
    }
    g_clear_pointer(&state->opaque, g_free);
    bale_reopen_sync(state->bs, state->flags);
}

static void bale_reopen_abort(BDRVReopenState *state)
{
    g_clear_pointer(&state->opaque, g_free);
    bale_reopen_sync(state->bs, state->bs->open_flags);
}

/*
 * --- Drain and AioContext
 */

static void coroutine_fn bale_co_drain_begin(BlockDriverState *bs)
{
    BDRVBaleState *s = bs->opaque;

    if (s->dev) {
        bale_bdrv_device_drain_begin(s->dev);
    }
}

static void coroutine_fn bale_co_drain_end(BlockDriverState *bs)
{
    BDRVBaleState *s = bs->opaque;

    if (s->dev) {
        bale_bdrv_device_drain_end(s->dev);
    }
}

static void bale_detach_aio_context(BlockDriverState *bs)
{
    BDRVBaleState *s = bs->opaque;

    bale_bdrv_device_detach(s->dev);
}

static void bale_attach_aio_context(BlockDriverState *bs,
                                    AioContext *new_context)
{
    BDRVBaleState *s = bs->opaque;

    bale_bdrv_device_attach(s->dev, new_context);
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
    bdi->is_dirty = s->corrupt;
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
    .bdrv_child_perm                 = bdrv_default_perms,
    .bdrv_inactivate                 = bale_inactivate,
    .bdrv_co_invalidate_cache        = bale_co_invalidate_cache,
    .mutable_opts                    = bale_mutable_opts,
    .bdrv_reopen_prepare             = bale_reopen_prepare,
    .bdrv_reopen_commit              = bale_reopen_commit,
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

    .bdrv_co_drain_begin             = bale_co_drain_begin,
    .bdrv_co_drain_end               = bale_co_drain_end,
    .bdrv_detach_aio_context         = bale_detach_aio_context,
    .bdrv_attach_aio_context         = bale_attach_aio_context,

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

    .bdrv_co_create_opts             = bale_co_create_opts,
    .bdrv_measure                    = bale_measure,
};

static void bale_block_init(void)
{
    bdrv_register(&bdrv_bale);
}

block_init(bale_block_init);
