/*
 * The format driver "bale": a compressed store as an image format, over its
 * `file` child like qcow2 or qed.
 *
 * The engine (extstore/store.h) does the work.  This file translates: requests
 * of coroutines into the engine's, the engine's reads under the image into
 * reads of the backing node, runtime options, errors.  bale-create.c creates,
 * bridge.c has the waiting, bdrv-device.c the transfers to the `file` child.
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
#include "bdrv-device-internal.h"

#define BALE_OPT_CACHE_SIZE          "cache-size"
#define BALE_OPT_COMPRESSION_THREADS "compression-threads"
#define BALE_OPT_IMAGE               "image"

/* Reports of damage that one open node makes before it falls silent. */
#define DAMAGE_REPORTS_MAX 16

/* Pieces of one read that are under way together; more wait for these. */
#define READ_PIECES_MAX 32

typedef struct BDRVBaleState {
    BaleStore *store;
    BaleImage *image;
    BaleBdrvDevice *dev;
    uint32_t cluster_size;
    bool read_only; /* as the engine was told */
    bool corrupt;   /* the store was marked so when it was opened */

    /* Runtime options, from bdrv_open() on. */
    uint64_t cache_size;
    unsigned workers;
    char *image_name; /* IMAGE[@SNAPSHOT]; NULL: the unnamed one */

    /* For notices, which may be told when the node is gone. */
    char *node_name;
    char *filename; /* of the file that the store is in */
    int damage_reports; /* atomic */

    CoMutex revive_lock; /* one attempt at a time */

    BaleControl control;
} BDRVBaleState;

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
 * --- Reads of the backing node for the engine
 */

typedef struct BaleBackingRequest {
    BlockDriverState *bs;
    uint64_t offset;
    void *buf;
    size_t len;
    BaleDone *done;
    void *done_opaque;
} BaleBackingRequest;

static void coroutine_fn backing_read_entry(void *opaque)
{
    BaleBackingRequest *r = opaque;
    BlockDriverState *bs = r->bs;
    QEMUIOVector qiov;
    int ret = 0;

    if (bs->backing) {
        /* The block layer fills what lies past the end with zeroes. */
        qemu_iovec_init_buf(&qiov, r->buf, r->len);
        ret = bdrv_co_preadv(bs->backing, r->offset, r->len, &qiov, 0);
    } else {
        memset(r->buf, 0, r->len);
    }
    bdrv_dec_in_flight(bs);
    r->done(r->done_opaque, MIN(ret, 0));
    g_free(r);
}

static void backing_read_bh(void *opaque)
{
    BaleBackingRequest *r = opaque;
    AioContext *ctx = qemu_get_current_aio_context();

    aio_context_acquire(ctx);
    qemu_coroutine_enter(qemu_coroutine_create(backing_read_entry, r));
    aio_context_release(ctx);
}

/* From any thread; the graph stays as it is while a request is under way. */
static bool backing_present(void *opaque)
{
    BlockDriverState *bs = opaque;

    return qatomic_read(&bs->backing) != NULL;
}

/*
 * Called from any thread, but always for a request of this node that is still
 * under way: so neither the node nor its place in the graph changes meanwhile.
 */
static void backing_read(void *opaque, uint64_t offset, void *buf, size_t len,
                         BaleDone *done, void *done_opaque)
{
    BlockDriverState *bs = opaque;
    BaleBackingRequest *r;

    if (!qatomic_read(&bs->backing)) {
        memset(buf, 0, len);
        done(done_opaque, 0);
        return;
    }

    r = g_new(BaleBackingRequest, 1);
    *r = (BaleBackingRequest) {
        .bs = bs,
        .offset = offset,
        .buf = buf,
        .len = len,
        .done = done,
        .done_opaque = done_opaque,
    };
    bdrv_inc_in_flight(bs);
    aio_bh_schedule_oneshot(bdrv_get_aio_context(bs), backing_read_bh, r);
}

/*
 * --- Blocking functions of the engine
 */

static void engine_run(BlockDriverState *bs, BaleBlockingFunc *fn,
                       void *opaque)
{
    BDRVBaleState *s = bs->opaque;
    BaleBdrvDevice *dev = s->dev;

    bale_bdrv_device_busy_begin(dev);
    bale_bridge_run(bdrv_get_aio_context(bs), fn, opaque);
    bale_bdrv_device_busy_end(dev);
}

void bale_bs_run(BlockDriverState *bs, BaleBlockingFunc *fn, void *opaque)
{
    engine_run(bs, fn, opaque);
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

    engine_run(bs, engine_open_blocking, &o);
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
    bale_image_set_backing_read(s->image, backing_read, bs);
    bale_image_set_backing_present(s->image, backing_present);
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
    engine_run(bs, engine_close_blocking, &c);
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
    engine_run(bs, engine_read_only_blocking, &r);
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

static int bale_read_options(BDRVBaleState *s, QDict *options, Error **errp)
{
    QemuOpts *opts = qemu_opts_create(&bale_runtime_opts, NULL, 0,
                                      &error_abort);
    uint64_t workers;
    int ret = -EINVAL;

    if (!qemu_opts_absorb_qdict(opts, options, errp)) {
        goto out;
    }
    workers = qemu_opt_get_number(opts, BALE_OPT_COMPRESSION_THREADS, 0);
    if (workers > BALE_WORKERS_MAX) {
        error_setg(errp, "'%s' must be between 1 and %u, or 0 for one for "
                   "each core", BALE_OPT_COMPRESSION_THREADS,
                   BALE_WORKERS_MAX);
        goto out;
    }
    s->workers = workers;
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
        { /* end of list */ }
    },
};

/* ... and be left out again, which stands for the default. */
static const char *const bale_mutable_opts[] = { BALE_OPT_CACHE_SIZE, NULL };

typedef struct BaleReopen {
    uint64_t cache_size;
} BaleReopen;

static int bale_reopen_prepare(BDRVReopenState *state,
                               BlockReopenQueue *queue, Error **errp)
{
    BlockDriverState *bs = state->bs;
    BaleJob *job = bale_bs_control(bs)->job;
    QemuOpts *opts = qemu_opts_create(&bale_reopen_opts, NULL, 0,
                                      &error_abort);
    BaleReopen *r = NULL;
    int ret = 0;

    if (!qemu_opts_absorb_qdict(opts, state->options, errp)) {
        ret = -EINVAL;
        goto out;
    }
    r = g_new(BaleReopen, 1);
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
    g_clear_pointer(&state->opaque, g_free);
    bale_reopen_sync(state->bs, state->flags);
}

static void bale_reopen_abort(BDRVReopenState *state)
{
    g_clear_pointer(&state->opaque, g_free);
    bale_reopen_sync(state->bs, state->bs->open_flags);
}

/*
 * --- Requests
 */

/* Before each request: what waits because of a drain may be needed by it. */
static void request_begin(BlockDriverState *bs)
{
    BDRVBaleState *s = bs->opaque;

    bale_bdrv_device_kick(s->dev);
}

static void revive_thread(void *opaque)
{
    BDRVBaleState *s = opaque;
    g_autoptr(GError) err = NULL;

    /* What it says is as good as the error of the request that follows. */
    bale_store_revive(s->store, &err);
}

/*
 * Before each request that changes something.  A VM that was stopped by an
 * error goes on when somebody has mended the disk, and repeats the request:
 * that must be able to succeed without opening the image again.
 */
static void coroutine_fn change_begin(BlockDriverState *bs)
{
    BDRVBaleState *s = bs->opaque;

    request_begin(bs);
    if (bale_store_poisoned(s->store)) {
        qemu_co_mutex_lock(&s->revive_lock);
        if (bale_store_poisoned(s->store)) {
            bale_bridge_run(NULL, revive_thread, s);
        }
        qemu_co_mutex_unlock(&s->revive_lock);
    }
}

/*
 * Submit the read of a part of @qiov.  @slice holds the vector until the
 * request is complete and is then the caller's to destroy.
 */
static void coroutine_fn submit_read(BDRVBaleState *s, BaleCoRequest *req,
                                     uint64_t offset, size_t bytes,
                                     QEMUIOVector *qiov, size_t qiov_offset,
                                     QEMUIOVector *slice)
{
    qemu_iovec_init_slice(slice, qiov, qiov_offset, bytes);
    bale_co_request_add(req);
    bale_image_read(s->image, offset, slice->iov, slice->niov,
                    bale_co_request_done, req);
}

/*
 * Read with a backing node: what the image holds comes from the engine, the
 * rest straight from below, without a detour through the engine's threads.
 * Reads from the engine go on while the coroutine reads from below.  Returns
 * how many bytes it did, at least 1, or a negative errno.
 */
static int64_t coroutine_fn read_layered(BlockDriverState *bs, uint64_t offset,
                                         uint64_t bytes, QEMUIOVector *qiov,
                                         size_t qiov_offset)
{
    BDRVBaleState *s = bs->opaque;
    QEMUIOVector slices[READ_PIECES_MAX];
    BaleCoRequest req;
    uint64_t done = 0;
    int pieces = 0;
    int ret = 0, ret2;
    int i;

    bale_co_request_init(&req);
    while (done < bytes && pieces < READ_PIECES_MAX) {
        BaleClusterStatus status;
        uint64_t run;

        ret = bale_image_status(s->image, offset + done, bytes - done,
                                &status, &run);
        if (ret < 0) {
            break;
        }
        run = MIN(run, bytes - done);
        if (status == BALE_CLUSTER_ZERO ||
            (status == BALE_CLUSTER_UNALLOCATED && !bs->backing)) {
            qemu_iovec_memset(qiov, qiov_offset + done, 0, run);
        } else if (status == BALE_CLUSTER_DATA) {
            submit_read(s, &req, offset + done, run, qiov, qiov_offset + done,
                        &slices[pieces++]);
        } else {
            ret = bdrv_co_preadv_part(bs->backing, offset + done, run, qiov,
                                      qiov_offset + done, 0);
            if (ret < 0) {
                break;
            }
        }
        done += run;
    }
    ret2 = bale_co_request_wait(&req);
    for (i = 0; i < pieces; i++) {
        qemu_iovec_destroy(&slices[i]);
    }
    ret = MIN(ret, ret2);
    return ret < 0 ? ret : (int64_t)done;
}

static int coroutine_fn bale_co_preadv_part(BlockDriverState *bs,
                                            int64_t offset, int64_t bytes,
                                            QEMUIOVector *qiov,
                                            size_t qiov_offset,
                                            BdrvRequestFlags flags)
{
    BDRVBaleState *s = bs->opaque;
    uint64_t size = bale_image_size(s->image);
    QEMUIOVector slice;
    BaleCoRequest req;
    int ret;

    request_begin(bs);
    if ((uint64_t)offset + bytes > size) {
        /* The rest of the last sector, which the image does not have. */
        uint64_t have = (uint64_t)offset < size ? size - offset : 0;

        qemu_iovec_memset(qiov, qiov_offset + have, 0, bytes - have);
        bytes = have;
    }
    if (bytes == 0) {
        return 0;
    }

    if (!bs->backing) {
        bale_co_request_init(&req);
        submit_read(s, &req, offset, bytes, qiov, qiov_offset, &slice);
        ret = bale_co_request_wait(&req);
        qemu_iovec_destroy(&slice);
        return ret;
    }

    while (bytes > 0) {
        int64_t done = read_layered(bs, offset, bytes, qiov, qiov_offset);

        if (done < 0) {
            return done;
        }
        offset += done;
        qiov_offset += done;
        bytes -= done;
    }
    return 0;
}

static int coroutine_fn bale_co_pwritev_part(BlockDriverState *bs,
                                             int64_t offset, int64_t bytes,
                                             QEMUIOVector *qiov,
                                             size_t qiov_offset,
                                             BdrvRequestFlags flags)
{
    BDRVBaleState *s = bs->opaque;
    QEMUIOVector slice;
    BaleCoRequest req;
    int ret;

    if (bytes == 0) {
        return 0;
    }
    change_begin(bs);
    qemu_iovec_init_slice(&slice, qiov, qiov_offset, bytes);
    bale_co_request_init(&req);
    bale_co_request_add(&req);
    bale_image_write(s->image, offset, slice.iov, slice.niov,
                     flags & BDRV_REQ_FUA ? BALE_FUA : 0,
                     bale_co_request_done, &req);
    ret = bale_co_request_wait(&req);
    qemu_iovec_destroy(&slice);
    return ret;
}

/*
 * Every write is stored compressed, so this one is a write like any other; but
 * the block layer does not split it by bl.max_transfer.
 */
static int coroutine_fn
bale_co_pwritev_compressed_part(BlockDriverState *bs, int64_t offset,
                                int64_t bytes, QEMUIOVector *qiov,
                                size_t qiov_offset)
{
    while (bytes > 0) {
        int64_t part = MIN(bytes, (int64_t)BALE_REQUEST_MAX);
        int ret = bale_co_pwritev_part(bs, offset, part, qiov, qiov_offset, 0);

        if (ret < 0) {
            return ret;
        }
        offset += part;
        qiov_offset += part;
        bytes -= part;
    }
    return 0;
}

static int coroutine_fn zero_range(BlockDriverState *bs, uint64_t offset,
                                   uint64_t bytes, unsigned flags)
{
    BDRVBaleState *s = bs->opaque;
    BaleCoRequest req;

    bale_co_request_init(&req);
    bale_co_request_add(&req);
    bale_image_zero(s->image, offset, bytes, flags, bale_co_request_done,
                    &req);
    return bale_co_request_wait(&req);
}

/* Flags that drop clusters, if nothing can show through where they were. */
static unsigned discard_flags(BlockDriverState *bs)
{
    return bs->backing ? 0 : BALE_DISCARD;
}

static int coroutine_fn bale_co_pwrite_zeroes(BlockDriverState *bs,
                                              int64_t offset, int64_t bytes,
                                              BdrvRequestFlags flags)
{
    BDRVBaleState *s = bs->opaque;
    uint64_t size = bale_image_size(s->image);
    unsigned zero_flags = flags & BDRV_REQ_FUA ? BALE_FUA : 0;

    change_begin(bs);
    if (flags & BDRV_REQ_MAY_UNMAP) {
        zero_flags |= discard_flags(bs);
    }
    /* The rest of the last sector, which the image does not have, is zero. */
    if ((uint64_t)offset + bytes > size) {
        bytes = (uint64_t)offset < size ? size - offset : 0;
    }
    return bytes ? zero_range(bs, offset, bytes, zero_flags) : 0;
}

static int coroutine_fn bale_co_pdiscard(BlockDriverState *bs, int64_t offset,
                                         int64_t bytes)
{
    BDRVBaleState *s = bs->opaque;
    uint64_t size = bale_image_size(s->image);
    uint64_t end = MIN((uint64_t)offset + bytes, size);

    change_begin(bs);
    if ((uint64_t)offset >= end) {
        return 0;
    }
    /* A part of a cluster would have to be written, for no gain. */
    if (!QEMU_IS_ALIGNED(offset, s->cluster_size) ||
        (!QEMU_IS_ALIGNED(end, s->cluster_size) && end != size)) {
        return -ENOTSUP;
    }
    return zero_range(bs, offset, end - offset, discard_flags(bs));
}

static int coroutine_fn bale_co_flush_to_disk(BlockDriverState *bs)
{
    BDRVBaleState *s = bs->opaque;
    BaleCoRequest req;

    if (s->read_only) {
        return 0;
    }
    change_begin(bs);
    bale_co_request_init(&req);
    bale_co_request_add(&req);
    bale_store_flush(s->store, bale_co_request_done, &req);
    return bale_co_request_wait(&req);
}

/*
 * With cache=unsafe the block layer stops after this one: what was flushed then
 * survives the end of this process, but not that of the host.
 */
static int coroutine_fn bale_co_flush_to_os(BlockDriverState *bs)
{
    return bs->open_flags & BDRV_O_NO_FLUSH ? bale_co_flush_to_disk(bs) : 0;
}

static int coroutine_fn bale_co_block_status(BlockDriverState *bs,
                                             bool want_zero, int64_t offset,
                                             int64_t bytes, int64_t *pnum,
                                             int64_t *map,
                                             BlockDriverState **file)
{
    BDRVBaleState *s = bs->opaque;
    uint64_t size = bale_image_size(s->image);
    BaleClusterStatus status;
    uint64_t run;
    int ret;

    request_begin(bs);
    if ((uint64_t)offset >= size) {
        *pnum = bytes;
        return BDRV_BLOCK_ZERO;
    }
    ret = bale_image_status(s->image, offset, MIN((uint64_t)bytes,
                            size - offset), &status, &run);
    if (ret < 0) {
        return ret;
    }
    *pnum = MIN(run, (uint64_t)bytes);
    if ((uint64_t)offset + *pnum == size) {
        *pnum = QEMU_ALIGN_UP(*pnum, BDRV_SECTOR_SIZE);
    }

    switch (status) {
    case BALE_CLUSTER_DATA:
        return BDRV_BLOCK_DATA;
    case BALE_CLUSTER_ZERO:
        return BDRV_BLOCK_ZERO;
    case BALE_CLUSTER_UNALLOCATED:
        return 0;
    }
    g_assert_not_reached();
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
    engine_run(bs, fn, c);
    return c->ok ? 0 : bale_bridge_error(c->err, errp);
}

static int coroutine_fn bale_co_truncate(BlockDriverState *bs, int64_t offset,
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

    ret = engine_change(bs, engine_resize_blocking, &c, errp);
    if (ret < 0) {
        return ret;
    }
    if ((flags & BDRV_REQ_ZERO_WRITE) && (uint64_t)offset > old_size) {
        /* Before anybody can see what the backing node has there. */
        ret = zero_range(bs, old_size, offset - old_size, 0);
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

static int bale_change_backing_file(BlockDriverState *bs,
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

static int bale_make_empty(BlockDriverState *bs)
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
static int bale_snapshot_load_tmp(BlockDriverState *bs,
                                  const char *snapshot_id, const char *name,
                                  Error **errp)
{
    BDRVBaleState *s = bs->opaque;
    g_autofree char *full =
        g_strdup_printf("%s@%s", s->image_name ?: "", snapshot_id ?: name);
    EngineSwitch c = { s->store, s->image, full, NULL, NULL };

    engine_run(bs, engine_switch_blocking, &c);
    if (!c.opened) {
        return bale_bridge_error(c.err, errp);
    }
    s->image = c.opened;
    bale_image_set_backing_read(s->image, backing_read, bs);
    bale_image_set_backing_present(s->image, backing_present);
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

static int coroutine_fn bale_co_check(BlockDriverState *bs,
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
    engine_run(bs, engine_check_blocking, &c);
    if (!c.ok) {
        Error *err = NULL;
        int ret = bale_bridge_error(c.err, &err);

        error_report_err(err);
        result->check_errors++;
        return ret;
    }

    leaks = c.result.leaked_pages;
    corruptions = c.result.damaged + c.result.wrong_counters +
                  c.result.bad_superblocks;
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
