/*
 * The device "bdrv": a store on a QEMU block node, usually the `file` child of
 * bale nodes, so that every protocol that QEMU knows can hold a store.
 *
 * The device is a parent of that node in its own right: it has a child (in the
 * graph's sense) with permissions, which is drained and moved to other
 * AioContexts like any other.  The bale nodes whose images are in the store,
 * its owners, may come and go meanwhile.
 *
 * The engine calls from its own threads; block nodes are used from coroutines
 * in their AioContext.  Each call is queued, and one bottom half in that
 * AioContext starts a coroutine for each queued call.  (A call that comes from
 * a coroutine there needs neither queue nor bottom half.)  Functions that may
 * block go the same way and wait for their completion.
 *
 * Invariants
 * 1. A call is on the queue, or has a coroutine, until its completion runs.
 * 2. A coroutine is only started in the AioContext of the device, with that
 *    context acquired; a bottom half that finds itself elsewhere does nothing,
 *    since a change of the context schedules another.
 * 3. A drained section of the child begins only after the coroutines that run
 *    (drained_poll).
 * 4. In a drained section calls stay on the queue, unless an owner itself has
 *    requests under way or is in a blocking function of the engine.  (The first
 *    is true while QEMU waits for a drain, so nothing waits for itself: owners
 *    are parents of the same node, and drained with it.)
 * 5. Nothing of the device is touched after a completion was called: it may be
 *    what the engine waited for before it destroyed the device.
 *
 * Locks: the AioContext's, then d->lock.  No completion runs under d->lock.
 *
 * Errors: negative errno.  Short transfers, EINTR and EAGAIN are answered by
 * QEMU's protocol drivers.  A write without permission to write is -EROFS.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "qemu/osdep.h"
#include "block/aio-wait.h"
#include "block/block_int.h"
#include "qapi/error.h"
#include "qemu/coroutine.h"
#include "qemu/queue.h"
#include "qemu/thread.h"
#include "qemu/timer.h"
#include "qemu/transactions.h"

#include "bdrv-device-internal.h"

/* With a page cache below there is no alignment; sectors are what we read. */
#define DEVICE_BLOCK_SIZE_MIN 512u
#define DEVICE_BLOCK_SIZE_MAX 65536u

typedef enum DeviceOpKind {
    DEVICE_STORE,
    DEVICE_GET,
    DEVICE_FLUSH,
    DEVICE_ALLOCATE,
    DEVICE_RELEASE,
    DEVICE_TRUNCATE,
} DeviceOpKind;

/* Lives in the priv field of a BaleDeviceIo. */
typedef struct DeviceOp {
    QSIMPLEQ_ENTRY(DeviceOp) next;
    BaleBdrvDevice *dev;
    int64_t start_ns;
    DeviceOpKind kind;
} DeviceOp;

QEMU_BUILD_BUG_ON(sizeof(DeviceOp) >
                  sizeof_field(BaleDeviceIo, priv));

struct BaleBdrvDevice {
    BaleDevice base;

    /* Never changed after creation. */
    BdrvChild *child;        /* its node may change */
    uint32_t block_size;
    bool fixed_size;

    /* Of the main thread. */
    BaleBdrvAccess access;
    BaleBdrvActivated *activated; /* NULL: nobody wants to know */
    void *activated_opaque;

    int refs; /* atomic */

    QemuMutex lock;
    /* Under the lock. */
    AioContext *ctx; /* NULL: the driver has no use for it any more */
    GPtrArray *owners; /* BlockDriverState; empty while a store is created */
    QSIMPLEQ_HEAD(, DeviceOp) queue;
    bool scheduled;  /* a bottom half is on its way in ctx */
    bool read_only;
    bool looped;     /* the store lies on a node that shows what is in it */
    unsigned drained;
    unsigned busy;
    unsigned in_flight; /* coroutines that run */
    uint64_t queued;    /* calls on the queue */
    uint64_t size;
    BaleDeviceStats stats;
};

static BaleBdrvDevice *from_base(BaleDevice *base)
{
    return container_of(base, BaleBdrvDevice, base);
}

static BaleDeviceIo *op_io(DeviceOp *op)
{
    return container_of((void *)op, BaleDeviceIo, priv);
}

static void device_ref(BaleBdrvDevice *d)
{
    qatomic_inc(&d->refs);
}

static void device_unref(BaleBdrvDevice *d)
{
    if (qatomic_fetch_dec(&d->refs) == 1) {
        assert(QSIMPLEQ_EMPTY(&d->queue));
        g_ptr_array_unref(d->owners);
        qemu_mutex_destroy(&d->lock);
        g_free(d);
    }
}

/* --- one call, in a coroutine --- */

static int device_check_writable(BdrvChild *child)
{
    /* What the block layer would assert, the engine is told. */
    if (!(child->perm & BLK_PERM_WRITE) || bdrv_is_read_only(child->bs) ||
        (child->bs->open_flags & BDRV_O_INACTIVE)) {
        return -EROFS;
    }
    return 0;
}

static int coroutine_fn device_co_grow(BaleBdrvDevice *d, BdrvChild *child,
                                       uint64_t end)
{
    int64_t size = bdrv_getlength(child->bs);
    int ret;

    if (size < 0) {
        return size;
    }
    if (end <= (uint64_t)size) {
        return 0;
    }
    if (end > INT64_MAX) {
        return -EFBIG;
    }
    if (d->fixed_size || !(child->perm & BLK_PERM_RESIZE)) {
        return -ENOSPC;
    }
    ret = bdrv_co_truncate(child, end, false, PREALLOC_MODE_FALLOC, 0, NULL);
    if (ret < 0 && ret != -ENOSPC && ret != -EFBIG && ret != -EDQUOT) {
        /* Not every protocol can preallocate. */
        ret = bdrv_co_truncate(child, end, false, PREALLOC_MODE_OFF, 0, NULL);
    }
    /* A node that cannot grow is a node without room. */
    return ret == -ENOTSUP ? -ENOSPC : MIN(ret, 0);
}

static int coroutine_fn device_co_discard(BdrvChild *child, uint64_t offset,
                                          uint64_t len)
{
    int64_t size = bdrv_getlength(child->bs);

    if (size < 0) {
        return size;
    }
    if (offset >= (uint64_t)size) {
        return 0;
    }
    return bdrv_co_pdiscard(child, offset, MIN(len, (uint64_t)size - offset));
}

static int coroutine_fn device_co_run(BaleBdrvDevice *d, DeviceOpKind kind,
                                      BaleDeviceIo *io)
{
    BdrvChild *child = d->child;
    QEMUIOVector qiov;
    int ret;

    if (!child->bs->drv) {
        return -ENOMEDIUM;
    }
    if (d->looped) {
        return -ELOOP;
    }
    if (kind != DEVICE_GET) {
        ret = kind == DEVICE_FLUSH ? 0 : device_check_writable(child);
        if (ret < 0) {
            return ret;
        }
    }
    if (kind == DEVICE_GET || kind == DEVICE_STORE) {
        if (io->offset > INT64_MAX || io->len > BDRV_REQUEST_MAX_BYTES) {
            return -EINVAL;
        }
        qemu_iovec_init_buf(&qiov, io->buf, io->len);
    }

    /*
     * The events let blkdebug below the store fail what a test wants failed.
     * That of a flush is raised by the block layer, before the driver's flush.
     */
    switch (kind) {
    case DEVICE_GET:
        BLKDBG_EVENT(child, BLKDBG_READ_AIO);
        return bdrv_co_preadv(child, io->offset, io->len, &qiov, 0);
    case DEVICE_STORE:
        BLKDBG_EVENT(child, BLKDBG_WRITE_AIO);
        return bdrv_co_pwritev(child, io->offset, io->len, &qiov, 0);
    case DEVICE_FLUSH:
        return bdrv_co_flush(child->bs);
    case DEVICE_ALLOCATE:
        return device_co_grow(d, child, io->offset + io->len);
    case DEVICE_RELEASE:
        return device_co_discard(child, io->offset, io->len);
    case DEVICE_TRUNCATE:
        if (d->fixed_size || !(child->perm & BLK_PERM_RESIZE)) {
            return -ENOTSUP;
        }
        return bdrv_co_truncate(child, io->offset, true, PREALLOC_MODE_OFF, 0,
                                NULL);
    default:
        g_assert_not_reached();
    }
}

static unsigned hist_bucket(int64_t ns)
{
    unsigned bits = ns > 0 ? 63 - clz64(ns) : 0;

    return MIN(bits, BALE_DEVICE_HIST_BUCKETS - 1);
}

static void device_account_locked(BaleBdrvDevice *d, DeviceOpKind kind,
                                  uint64_t len, int ret, int64_t ns)
{
    BaleDeviceStats *s = &d->stats;
    unsigned bucket = hist_bucket(ns);

    if (ret < 0) {
        s->errors++;
    }
    switch (kind) {
    case DEVICE_GET:
        s->gets++;
        s->get_bytes += len;
        s->get_ns[bucket]++;
        break;
    case DEVICE_STORE:
        s->stores++;
        s->store_bytes += len;
        s->store_ns[bucket]++;
        break;
    case DEVICE_FLUSH:
        s->flushes++;
        s->flush_ns[bucket]++;
        break;
    case DEVICE_ALLOCATE:
        s->allocates++;
        break;
    case DEVICE_RELEASE:
        s->releases++;
        break;
    case DEVICE_TRUNCATE:
        break;
    }
}

static void coroutine_fn device_co_entry(void *opaque)
{
    DeviceOp *op = opaque;
    BaleBdrvDevice *d = op->dev;
    BaleDeviceIo *io = op_io(op);
    int64_t end, now;
    int ret = device_co_run(d, op->kind, io);

    ret = MIN(ret, 0);
    end = op->kind == DEVICE_STORE || op->kind == DEVICE_ALLOCATE ?
        io->offset + io->len : 0;
    now = qemu_clock_get_ns(QEMU_CLOCK_REALTIME);

    qemu_mutex_lock(&d->lock);
    if (ret == 0) {
        if (op->kind == DEVICE_TRUNCATE) {
            d->size = io->offset;
        } else {
            d->size = MAX(d->size, (uint64_t)end);
        }
    }
    device_account_locked(d, op->kind, io->len, ret, now - op->start_ns);
    d->in_flight--;
    qemu_mutex_unlock(&d->lock);
    /* Somebody may wait in a drain for us. */
    aio_wait_kick();
    io->done(io, ret);
}

/* --- the queue --- */

/* True while the calls on the queue are to wait (invariant 4). */
static bool device_held_locked(BaleBdrvDevice *d)
{
    if (!d->drained || d->busy) {
        return false;
    }
    for (guint i = 0; i < d->owners->len; i++) {
        BlockDriverState *owner = g_ptr_array_index(d->owners, i);

        if (qatomic_read(&owner->in_flight) > 0) {
            return false;
        }
    }
    return d->owners->len > 0;
}

/* Is the caller a coroutine of the AioContext that calls run in? */
static bool device_at_home_locked(BaleBdrvDevice *d)
{
    return d->ctx && qemu_in_coroutine() &&
        qemu_get_current_aio_context() == d->ctx &&
        qemu_coroutine_get_aio_context(qemu_coroutine_self()) == d->ctx;
}

static void device_bh(void *opaque)
{
    BaleBdrvDevice *d = opaque;
    AioContext *ctx = qemu_get_current_aio_context();
    DeviceOp *op;

    aio_context_acquire(ctx);
    qemu_mutex_lock(&d->lock);
    if (d->ctx == ctx) {
        d->scheduled = false;
        while ((op = QSIMPLEQ_FIRST(&d->queue)) && !device_held_locked(d)) {
            QSIMPLEQ_REMOVE_HEAD(&d->queue, next);
            d->queued--;
            d->in_flight++;
            qemu_mutex_unlock(&d->lock);
            qemu_coroutine_enter(qemu_coroutine_create(device_co_entry, op));
            qemu_mutex_lock(&d->lock);
        }
    }
    qemu_mutex_unlock(&d->lock);
    aio_context_release(ctx);
    device_unref(d);
}

static void device_schedule_locked(BaleBdrvDevice *d)
{
    if (d->ctx && !d->scheduled && !QSIMPLEQ_EMPTY(&d->queue)) {
        d->scheduled = true;
        device_ref(d);
        aio_bh_schedule_oneshot(d->ctx, device_bh, d);
    }
}

static void device_submit(BaleBdrvDevice *d, BaleDeviceIo *io,
                          DeviceOpKind kind)
{
    DeviceOp *op = (DeviceOp *)&io->priv;

    op->dev = d;
    op->kind = kind;
    op->start_ns = qemu_clock_get_ns(QEMU_CLOCK_REALTIME);
    qemu_mutex_lock(&d->lock);
    if (device_at_home_locked(d) && QSIMPLEQ_EMPTY(&d->queue) &&
        !device_held_locked(d)) {
        AioContext *ctx = d->ctx;

        d->in_flight++;
        qemu_mutex_unlock(&d->lock);
        /* Runs when the coroutine that we are in yields or ends. */
        aio_co_enter(ctx, qemu_coroutine_create(device_co_entry, op));
        return;
    }
    QSIMPLEQ_INSERT_TAIL(&d->queue, op, next);
    d->queued++;
    device_schedule_locked(d);
    qemu_mutex_unlock(&d->lock);
}

static void device_store(BaleDevice *base, BaleDeviceIo *io)
{
    device_submit(from_base(base), io, DEVICE_STORE);
}

static void device_get(BaleDevice *base, BaleDeviceIo *io)
{
    device_submit(from_base(base), io, DEVICE_GET);
}

static void device_flush(BaleDevice *base, BaleDeviceIo *io)
{
    device_submit(from_base(base), io, DEVICE_FLUSH);
}

typedef struct BlockingIo {
    BaleDeviceIo io;
    QemuSemaphore sem;
    int ret;
} BlockingIo;

static void blocking_io_done(BaleDeviceIo *io, int ret)
{
    BlockingIo *b = container_of(io, BlockingIo, io);

    b->ret = ret;
    qemu_sem_post(&b->sem);
}

static int device_run_blocking(BaleDevice *base, DeviceOpKind kind,
                               uint64_t offset, uint64_t len)
{
    BlockingIo b = {
        .io = { .offset = offset, .len = len, .done = blocking_io_done },
    };

    qemu_sem_init(&b.sem, 0);
    device_submit(from_base(base), &b.io, kind);
    qemu_sem_wait(&b.sem);
    qemu_sem_destroy(&b.sem);
    return b.ret;
}

static int device_allocate(BaleDevice *base, uint64_t offset, uint64_t len)
{
    BaleBdrvDevice *d = from_base(base);
    bool exists;

    if (len > UINT64_MAX - offset) {
        return -EINVAL;
    }
    qemu_mutex_lock(&d->lock);
    exists = offset + len <= d->size;
    qemu_mutex_unlock(&d->lock);
    if (exists) {
        return 0;
    }
    return device_run_blocking(base, DEVICE_ALLOCATE, offset, len);
}

static int device_release(BaleDevice *base, uint64_t offset, uint64_t len)
{
    if (len > UINT64_MAX - offset || offset + len > INT64_MAX) {
        return -EINVAL;
    }
    return device_run_blocking(base, DEVICE_RELEASE, offset, len);
}

static int device_truncate(BaleDevice *base, uint64_t size)
{
    if (size > INT64_MAX) {
        return -EFBIG;
    }
    return device_run_blocking(base, DEVICE_TRUNCATE, size, 0);
}

/* --- information --- */

static void device_get_info(BaleDevice *base, BaleDeviceInfo *info)
{
    BaleBdrvDevice *d = from_base(base);

    qemu_mutex_lock(&d->lock);
    *info = (BaleDeviceInfo) {
        .name = "bdrv",
        .block_size = d->block_size,
        .size = d->size,
        .max_size = d->fixed_size ? d->size : UINT64_MAX,
        .read_only = d->read_only,
        .fixed_size = d->fixed_size,
        /* Nodes do not promise what a discarded range reads as. */
        .release_zeroes = false,
    };
    qemu_mutex_unlock(&d->lock);
}

static void device_get_stats(BaleDevice *base, BaleDeviceStats *stats)
{
    BaleBdrvDevice *d = from_base(base);

    qemu_mutex_lock(&d->lock);
    *stats = d->stats;
    stats->queue_depth = d->queued + d->in_flight;
    qemu_mutex_unlock(&d->lock);
}

static void device_reset_stats(BaleDevice *base)
{
    BaleBdrvDevice *d = from_base(base);

    qemu_mutex_lock(&d->lock);
    memset(&d->stats, 0, sizeof(d->stats));
    qemu_mutex_unlock(&d->lock);
}

static int device_command(BaleDevice *base, const char *command, char **reply)
{
    *reply = NULL;
    return -ENOTSUP;
}

static void device_destroy(BaleDevice *base)
{
    device_unref(from_base(base));
}

static const BaleDeviceOps device_ops = {
    .interface_version = BALE_DEVICE_INTERFACE,
    .destroy = device_destroy,
    .get_info = device_get_info,
    .allocate = device_allocate,
    .release = device_release,
    .truncate = device_truncate,
    .store = device_store,
    .get = device_get,
    .flush = device_flush,
    .get_stats = device_get_stats,
    .reset_stats = device_reset_stats,
    .command = device_command,
};

/* --- as a parent of the node --- */

static char *child_get_parent_desc(BdrvChild *child)
{
    BaleBdrvDevice *d = child->opaque;
    BlockDriverState *owner =
        d->owners->len ? g_ptr_array_index(d->owners, 0) : NULL;

    return owner ? g_strdup_printf("node '%s'", bdrv_get_node_name(owner))
                 : g_strdup("a bale store");
}

static void child_drained_begin(BdrvChild *child)
{
    BaleBdrvDevice *d = child->opaque;

    QEMU_LOCK_GUARD(&d->lock);
    d->drained++;
}

static bool child_drained_poll(BdrvChild *child)
{
    BaleBdrvDevice *d = child->opaque;

    QEMU_LOCK_GUARD(&d->lock);
    return d->in_flight > 0;
}

static void child_drained_end(BdrvChild *child, int *drained_end_counter)
{
    BaleBdrvDevice *d = child->opaque;

    QEMU_LOCK_GUARD(&d->lock);
    assert(d->drained > 0);
    d->drained--;
    device_schedule_locked(d);
}

static bool node_reaches(BlockDriverState *from, GPtrArray *nodes)
{
    BdrvChild *c;

    if (g_ptr_array_find(nodes, from, NULL)) {
        return true;
    }
    QLIST_FOREACH(c, &from->children, next) {
        if (node_reaches(c->bs, nodes)) {
            return true;
        }
    }
    return false;
}

/* Go back to where the owners' own children are. */
static void leave_loop_bh(void *opaque)
{
    BaleBdrvDevice *d = opaque;
    Error *err = NULL;

    if (d->child && d->looped && d->owners->len) {
        BlockDriverState *owner = g_ptr_array_index(d->owners, 0);

        if (bdrv_replace_child_bs(d->child, owner->file->bs, &err) < 0) {
            error_report_err(err);
        }
    }
    device_unref(d);
}

/*
 * QEMU moves the parents of a node that it replaces, unless that made a loop;
 * but it cannot see that we belong to our owners.  (A snapshot or a mirror of
 * the node with the store into one of the store's own images.)  Requests would
 * wait for themselves; until we are back they fail.
 */
static void child_attach(BdrvChild *child)
{
    BaleBdrvDevice *d = child->opaque;

    QEMU_LOCK_GUARD(&d->lock);
    d->looped = node_reaches(child->bs, d->owners);
    if (d->looped) {
        device_ref(d);
        aio_bh_schedule_oneshot(qemu_get_aio_context(), leave_loop_bh, d);
    }
}

static void child_activate(BdrvChild *child, Error **errp)
{
    BaleBdrvDevice *d = child->opaque;

    if (d->activated) {
        d->activated(d->activated_opaque, true, errp);
    }
}

static int child_inactivate(BdrvChild *child)
{
    BaleBdrvDevice *d = child->opaque;

    return d->activated ? d->activated(d->activated_opaque, false, NULL) : 0;
}

static AioContext *child_get_parent_aio_context(BdrvChild *child)
{
    BaleBdrvDevice *d = child->opaque;

    return d->ctx; /* changes in the main thread only */
}

typedef struct ChangeContext {
    BaleBdrvDevice *dev;
    AioContext *ctx;
} ChangeContext;

static void change_context_commit(void *opaque)
{
    ChangeContext *c = opaque;
    BaleBdrvDevice *d = c->dev;

    QEMU_LOCK_GUARD(&d->lock);
    assert(d->in_flight == 0);
    d->ctx = c->ctx;
    d->scheduled = false;
    device_schedule_locked(d);
}

static TransactionActionDrv change_context_drv = {
    .commit = change_context_commit,
    .clean = g_free,
};

static bool child_change_aio_ctx(BdrvChild *child, AioContext *ctx,
                                 GHashTable *visited, Transaction *tran,
                                 Error **errp)
{
    ChangeContext *c = g_new(ChangeContext, 1);

    *c = (ChangeContext){ .dev = child->opaque, .ctx = ctx };
    tran_add(tran, &change_context_drv, c);
    return true;
}

static const BdrvChildClass child_of_store = {
    .get_parent_desc = child_get_parent_desc,
    .drained_begin = child_drained_begin,
    .drained_poll = child_drained_poll,
    .drained_end = child_drained_end,
    .attach = child_attach,
    .activate = child_activate,
    .inactivate = child_inactivate,
    .get_parent_aio_context = child_get_parent_aio_context,
    .change_aio_ctx = child_change_aio_ctx,
};

/* --- for the driver --- */

/* The node under filters that decides whether a child can grow. */
static bool file_has_fixed_size(BlockDriverState *file)
{
    BlockDriverState *bs = bdrv_skip_filters(file);

    return bs->drv && bs->drv->protocol_name &&
        !strcmp(bs->drv->protocol_name, "host_device");
}

static void access_perms(BaleBdrvAccess access, BlockDriverState *file,
                         uint64_t *perm, uint64_t *shared)
{
    *perm = *shared = 0;
    if (!(file->open_flags & BDRV_O_NO_IO)) {
        *perm = BLK_PERM_CONSISTENT_READ;
    }
    if (access == BALE_BDRV_WRITE || access == BALE_BDRV_WRITE_SHARED) {
        *perm |= BLK_PERM_WRITE | BLK_PERM_RESIZE;
    }
    *shared = BLK_PERM_ALL;
    if ((access == BALE_BDRV_WRITE || access == BALE_BDRV_READ) &&
        !file->force_share) {
        *shared &= ~(BLK_PERM_WRITE | BLK_PERM_RESIZE);
    }
}

BaleBdrvDevice *bale_bdrv_device_new(BlockDriverState *file,
                                     BaleBdrvAccess access, Error **errp)
{
    uint32_t align = file->bl.request_alignment;
    int64_t size = bdrv_getlength(file);
    uint64_t perm, shared;
    BaleBdrvDevice *d;

    if (size < 0) {
        error_setg_errno(errp, -size, "Could not get the size of '%s'",
                         bdrv_get_device_or_node_name(file));
        return NULL;
    }
    if (align > DEVICE_BLOCK_SIZE_MAX) {
        error_setg(errp, "Node '%s' has blocks of %" PRIu32 " bytes, more than "
                   "the %u that a store can be on",
                   bdrv_get_device_or_node_name(file), align,
                   DEVICE_BLOCK_SIZE_MAX);
        return NULL;
    }

    d = g_new0(BaleBdrvDevice, 1);
    d->base.ops = &device_ops;
    d->owners = g_ptr_array_new();
    d->block_size = MAX(align, DEVICE_BLOCK_SIZE_MIN);
    d->fixed_size = file_has_fixed_size(file);
    d->access = access;
    d->refs = 1;
    qemu_mutex_init(&d->lock);
    d->ctx = bdrv_get_aio_context(file);
    QSIMPLEQ_INIT(&d->queue);
    d->read_only = access != BALE_BDRV_WRITE;
    d->size = size;

    access_perms(access, file, &perm, &shared);
    bdrv_ref(file);
    d->child = bdrv_root_attach_child(file, "file", &child_of_store,
                                      BDRV_CHILD_IMAGE, perm, shared, d, errp);
    if (!d->child) {
        device_unref(d);
        return NULL;
    }
    return d;
}

BaleDevice *bale_bdrv_device_open(BaleBdrvDevice *d)
{
    int64_t size = bdrv_getlength(d->child->bs);

    device_ref(d);
    QEMU_LOCK_GUARD(&d->lock);
    d->size = MAX(size, 0);
    return &d->base;
}

void bale_bdrv_device_unref(BaleBdrvDevice *d)
{
    if (!d) {
        return;
    }
    bdrv_root_unref_child(d->child);
    d->child = NULL;
    /* A late bottom half must find nothing to do. */
    WITH_QEMU_LOCK_GUARD(&d->lock) {
        assert(d->in_flight == 0);
        d->ctx = NULL;
    }
    device_unref(d);
}

BlockDriverState *bale_bdrv_device_file(BaleBdrvDevice *d)
{
    return d->child->bs;
}

int bale_bdrv_device_set_file(BaleBdrvDevice *d, BlockDriverState *file,
                              Error **errp)
{
    return d->child->bs == file
               ? 0
               : bdrv_replace_child_bs(d->child, file, errp);
}

int bale_bdrv_device_set_access(BaleBdrvDevice *d, BaleBdrvAccess access,
                                Error **errp)
{
    uint64_t perm, shared;
    int ret;

    if (d->access == access) {
        return 0;
    }
    access_perms(access, d->child->bs, &perm, &shared);
    ret = bdrv_child_try_set_perm(d->child, perm, shared, errp);
    if (ret == 0) {
        d->access = access;
    }
    return ret;
}

BaleBdrvAccess bale_bdrv_device_access(BaleBdrvDevice *d)
{
    return d->access;
}

void bale_bdrv_device_set_activated(BaleBdrvDevice *d,
                                    BaleBdrvActivated *activated, void *opaque)
{
    d->activated_opaque = opaque;
    d->activated = activated;
}

void bale_bdrv_device_add_owner(BaleBdrvDevice *d, BlockDriverState *owner)
{
    QEMU_LOCK_GUARD(&d->lock);
    g_ptr_array_add(d->owners, owner);
}

void bale_bdrv_device_remove_owner(BaleBdrvDevice *d, BlockDriverState *owner)
{
    QEMU_LOCK_GUARD(&d->lock);
    g_ptr_array_remove(d->owners, owner);
    device_schedule_locked(d);
}

void bale_bdrv_device_set_read_only(BaleBdrvDevice *d, bool read_only)
{
    QEMU_LOCK_GUARD(&d->lock);
    d->read_only = read_only;
}

void bale_bdrv_device_kick(BaleBdrvDevice *d)
{
    /* Racing with a drain that begins is fine: this request is counted. */
    if (qatomic_read(&d->drained)) {
        QEMU_LOCK_GUARD(&d->lock);
        device_schedule_locked(d);
    }
}

void bale_bdrv_device_busy_begin(BaleBdrvDevice *d)
{
    QEMU_LOCK_GUARD(&d->lock);
    d->busy++;
    device_schedule_locked(d);
}

void bale_bdrv_device_busy_end(BaleBdrvDevice *d)
{
    QEMU_LOCK_GUARD(&d->lock);
    assert(d->busy > 0);
    d->busy--;
}
