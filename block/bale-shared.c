/*
 * The stores that are open in this process.
 *
 * Invariants
 * 1. A node is in the list of one store, that which s->shared, s->store, s->dev
 *    and s->image are of; they are all set or all NULL.
 * 2. No two nodes of a list show the same image or snapshot.  (A second node
 *    that only reads what another one reads has a store of its own.)
 * 3. The nodes of a list have the same `file` node, and so the same AioContext;
 *    the store's device is on that as well.  (Until one of them is reopened
 *    with another `file`, which is allowed to the only one.)
 * 4. The engine is open for writing if and only if a node writes.
 *
 * Permissions.  The device has those that the store needs (BaleBdrvAccess),
 * and lets nobody else write.  So the nodes' own `file` children only read,
 * whatever the nodes do.  There is one exception: while a node is reopened for
 * writing, and the store is not written to yet, its child asks for permission
 * to write, so that QEMU can refuse; the device lets it, and then takes that
 * over.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "qemu/osdep.h"
#include "block/block_int.h"
#include "qapi/error.h"
#include "qapi/qmp/qdict.h"
#include "qemu/error-report.h"
#include "qemu/main-loop.h"

#include "extstore/store.h"

#include "bale-bridge-internal.h"
#include "bale-internal.h"
#include "bale-shared-internal.h"

/* Reports of damage that one open store makes before it falls silent. */
#define DAMAGE_REPORTS_MAX 16

static QLIST_HEAD(, BaleShared) stores = QLIST_HEAD_INITIALIZER(stores);

/*
 * --- Notices of the engine, from any thread
 */

/* The names of the nodes, for an event each. */
static char **shared_node_names(BaleShared *shared)
{
    GPtrArray *names = g_ptr_array_new();
    BDRVBaleState *s;

    QEMU_LOCK_GUARD(&shared->lock);
    QLIST_FOREACH(s, &shared->nodes, next) {
        g_ptr_array_add(names, g_strdup(s->node_name));
    }
    g_ptr_array_add(names, NULL);
    return (char **)g_ptr_array_free(names, false);
}

static void notice_failed(void *opaque, const char *reason)
{
    BaleShared *shared = opaque;

    bale_notice_failed(shared_node_names(shared), shared->filename, reason);
}

static void notice_revived(void *opaque)
{
    BaleShared *shared = opaque;

    bale_notice_recovered(shared_node_names(shared), shared->filename);
}

static void notice_damage(void *opaque, const char *what)
{
    BaleShared *shared = opaque;
    int nr = qatomic_fetch_inc(&shared->damage_reports);

    if (nr < DAMAGE_REPORTS_MAX) {
        bale_notice_damage(shared_node_names(shared), shared->filename, what,
                           nr == DAMAGE_REPORTS_MAX - 1);
    } else {
        qatomic_dec(&shared->damage_reports);
    }
}

/*
 * --- Reading and writing
 */

static bool shared_writes(BaleShared *shared)
{
    BDRVBaleState *s;

    QLIST_FOREACH(s, &shared->nodes, next) {
        if (s->writes) {
            return true;
        }
    }
    return false;
}

static bool shared_reopens(BaleShared *shared)
{
    BDRVBaleState *s;

    QLIST_FOREACH(s, &shared->nodes, next) {
        if (s->reopen_writes) {
            return true;
        }
    }
    return false;
}

/* The access while no node writes. */
static BaleBdrvAccess shared_access_to_read(BaleShared *shared)
{
    return shared->stale || shared_reopens(shared) ? BALE_BDRV_NONE
                                                   : BALE_BDRV_READ;
}

typedef struct EngineReadOnly {
    BaleStore *store;
    GError *err;
    bool read_only;
    bool ok;
} EngineReadOnly;

static void read_only_blocking(void *opaque)
{
    EngineReadOnly *r = opaque;

    r->ok = bale_store_set_read_only(r->store, r->read_only, &r->err);
}

/* Follow what the nodes do, as their flags say; @bs is one to wait with. */
static int shared_update(BaleShared *shared, BlockDriverState *bs,
                         Error **errp)
{
    EngineReadOnly r = {
        .store = shared->store,
        .read_only = !shared_writes(shared),
    };
    int ret;

    if (r.read_only == shared->read_only) {
        return r.read_only ? bale_bdrv_device_set_access(
                                 shared->dev, shared_access_to_read(shared),
                                 errp)
                           : 0;
    }
    if (!r.read_only) {
        ret = bale_bdrv_device_set_access(shared->dev, BALE_BDRV_WRITE, errp);
        if (ret < 0) {
            return ret;
        }
        bale_bdrv_device_set_read_only(shared->dev, false);
    }
    bale_bs_run(bs, read_only_blocking, &r);
    if (r.ok) {
        shared->read_only = r.read_only;
    }
    if (shared->read_only) {
        bale_bdrv_device_set_read_only(shared->dev, true);
        /* Less than before, so nobody objects. */
        bale_bdrv_device_set_access(shared->dev,
                                    shared_access_to_read(shared), NULL);
    }
    return r.ok ? 0 : bale_bridge_error(r.err, errp);
}

int bale_shared_set_writes(BlockDriverState *bs, bool writes, Error **errp)
{
    BDRVBaleState *s = bs->opaque;
    bool old = s->writes;
    int ret;

    s->writes = writes;
    ret = shared_update(s->shared, bs, errp);
    if (ret < 0) {
        s->writes = old;
    }
    return ret;
}

void bale_child_perm(BlockDriverState *bs, BdrvChild *c, BdrvChildRole role,
                     BlockReopenQueue *queue, uint64_t perm, uint64_t shared,
                     uint64_t *nperm, uint64_t *nshared)
{
    BDRVBaleState *s = bs->opaque;

    if (!(role & BDRV_CHILD_IMAGE)) {
        bdrv_default_perms(bs, c, role, queue, perm, shared, nperm, nshared);
        return;
    }
    *nperm = bs->open_flags & BDRV_O_NO_IO ? 0 : BLK_PERM_CONSISTENT_READ;
    *nshared = BLK_PERM_ALL;
    if (s->reopen_writes &&
        bale_bdrv_device_access(s->dev) <= BALE_BDRV_READ) {
        *nperm |= BLK_PERM_WRITE | BLK_PERM_RESIZE;
    }
}

/* The node below is activated, or about to be inactivated. */
static int shared_activated(void *opaque, bool active, Error **errp)
{
    BaleShared *shared = opaque;
    BaleBdrvAccess access = BALE_BDRV_NONE;
    BDRVBaleState *s;

    if (active) {
        access = BALE_BDRV_READ;
        QLIST_FOREACH(s, &shared->nodes, next) {
            if (!bdrv_is_read_only(s->bs)) {
                access = BALE_BDRV_WRITE;
            }
        }
    } else if (!shared->read_only) {
        error_setg(errp, "A node still writes to the store");
        return -EPERM;
    } else {
        shared->stale = true;
    }
    return bale_bdrv_device_set_access(shared->dev, access, errp);
}

/*
 * --- The engine: open and close
 */

typedef struct EngineOpen {
    BaleShared *shared;
    BaleDevice *device;
    BaleOpenOptions options;
    GPtrArray *nodes; /* BDRVBaleState whose images are opened */
    BaleStoreInfo info;
    GError *err;
    bool ok;
} EngineOpen;

static void close_images(GPtrArray *nodes)
{
    for (guint i = 0; i < nodes->len; i++) {
        BDRVBaleState *s = g_ptr_array_index(nodes, i);

        if (s->image) {
            bale_image_close(s->image);
            s->image = NULL;
        }
        s->store = NULL;
    }
}

static void open_blocking(void *opaque)
{
    EngineOpen *o = opaque;
    BaleStore *store = bale_store_open(o->device, &o->options, &o->err);

    if (!store) {
        bale_device_close(o->device);
        return;
    }
    for (guint i = 0; i < o->nodes->len; i++) {
        BDRVBaleState *s = g_ptr_array_index(o->nodes, i);

        s->image = bale_image_open(store, s->image_name, &o->err);
        if (!s->image) {
            close_images(o->nodes);
            bale_store_close(store, NULL);
            return;
        }
        s->store = store;
    }
    bale_store_get_info(store, &o->info);
    o->shared->store = store;
    o->ok = true;
}

static GPtrArray *shared_list_nodes(BaleShared *shared)
{
    GPtrArray *nodes = g_ptr_array_new();
    BDRVBaleState *s;

    QLIST_FOREACH(s, &shared->nodes, next) {
        g_ptr_array_add(nodes, s);
    }
    return nodes;
}

/* Open the store, and in it the images of all nodes in the list. */
static int shared_engine_open(BaleShared *shared, Error **errp)
{
    g_autoptr(GPtrArray) nodes = shared_list_nodes(shared);
    EngineOpen o = {
        .shared = shared,
        .device = bale_bdrv_device_open(shared->dev),
        .options = {
            .read_only = shared->read_only,
            .repair = shared->repair,
            .workers = shared->workers,
            .cache_size = shared->cache_size,
            .max_size = shared->space.max_size,
            .failed = notice_failed,
            .revived = notice_revived,
            .damage = notice_damage,
            .notify_opaque = shared,
        },
        .nodes = nodes,
    };

    bale_bdrv_device_set_read_only(shared->dev, shared->read_only);
    bale_bdrv_device_busy_begin(shared->dev);
    /* A node that is being opened has no context that the caller has taken. */
    bale_bridge_run(NULL, open_blocking, &o);
    bale_bdrv_device_busy_end(shared->dev);
    if (!o.ok) {
        return bale_bridge_error(o.err, errp);
    }
    bale_store_set_compact(shared->store, !shared->space.compact_off,
                           shared->space.compact_rate);
    shared->corrupt = o.info.corrupt;
    qatomic_set(&shared->damage_reports, 0);
    for (guint i = 0; i < nodes->len; i++) {
        BDRVBaleState *s = g_ptr_array_index(nodes, i);

        bale_bs_set_backing(s->bs);
    }
    return 0;
}

typedef struct EngineClose {
    BaleStore *store; /* NULL: only the images are closed */
    GPtrArray *nodes;
    GError *err;
    bool ok;
} EngineClose;

static void close_blocking(void *opaque)
{
    EngineClose *c = opaque;

    close_images(c->nodes);
    c->ok = !c->store || bale_store_close(c->store, &c->err);
}

/* --- the list --- */

static void shared_add(BaleShared *shared, BlockDriverState *bs)
{
    BDRVBaleState *s = bs->opaque;

    s->bs = bs;
    s->shared = shared;
    s->store = shared->store;
    s->dev = shared->dev;
    qemu_mutex_lock(&shared->lock);
    QLIST_INSERT_HEAD(&shared->nodes, s, next);
    qemu_mutex_unlock(&shared->lock);
    bale_bdrv_device_add_owner(shared->dev, bs);
}

static void shared_remove(BlockDriverState *bs)
{
    BDRVBaleState *s = bs->opaque;
    BaleShared *shared = s->shared;

    bale_bdrv_device_remove_owner(shared->dev, bs);
    qemu_mutex_lock(&shared->lock);
    QLIST_REMOVE(s, next);
    qemu_mutex_unlock(&shared->lock);
    s->shared = NULL;
    s->store = NULL;
    s->dev = NULL;
    s->writes = s->reopen_writes = false;
}

/* The store has no nodes any more, and is closed. */
static void shared_free(BaleShared *shared)
{
    assert(QLIST_EMPTY(&shared->nodes) && !shared->store);
    QLIST_REMOVE(shared, next);
    bale_bdrv_device_unref(shared->dev);
    qemu_mutex_destroy(&shared->lock);
    g_free(shared->filename);
    g_free(shared);
}

static void shared_free_bh(void *opaque)
{
    shared_free(opaque);
}

/*
 * --- Open and close
 */

/* A file or block device of this host. */
static bool stat_node(BlockDriverState *bs, struct stat *st)
{
    return bs->drv && bs->drv->protocol_name && bs->exact_filename[0] &&
           (!strcmp(bs->drv->protocol_name, "file") ||
            !strcmp(bs->drv->protocol_name, "host_device")) &&
           stat(bs->exact_filename, st) == 0;
}

static bool same_file(BlockDriverState *a, BlockDriverState *b)
{
    struct stat sa, sb;

    if (a == b) {
        return true;
    }
    if (!stat_node(a, &sa) || !stat_node(b, &sb)) {
        return false;
    }
    if (S_ISBLK(sa.st_mode) && S_ISBLK(sb.st_mode)) {
        return sa.st_rdev == sb.st_rdev;
    }
    return sa.st_dev == sb.st_dev && sa.st_ino == sb.st_ino;
}

static BaleShared *shared_find(BlockDriverState *file)
{
    BaleShared *shared;

    QLIST_FOREACH(shared, &stores, next) {
        if (shared->store &&
            same_file(bale_bdrv_device_file(shared->dev), file)) {
            return shared;
        }
    }
    return NULL;
}

/* Open the store in @bs->file for @bs alone. */
static int shared_begin(BlockDriverState *bs, bool writes, Error **errp)
{
    BDRVBaleState *s = bs->opaque;
    BlockDriverState *file = bs->file->bs;
    bool inactive = bs->open_flags & BDRV_O_INACTIVE;
    BaleBdrvDevice *dev = bale_bdrv_device_new(
        file, inactive ? BALE_BDRV_NONE
              : writes ? BALE_BDRV_WRITE
                       : BALE_BDRV_READ, errp);
    BaleShared *shared;
    int ret;

    if (!dev) {
        return -EINVAL;
    }
    shared = g_new0(BaleShared, 1);
    shared->dev = dev;
    shared->read_only = !writes;
    shared->stale = inactive;
    shared->repair = bs->open_flags & BDRV_O_CHECK;
    shared->workers = s->workers;
    shared->cache_size = s->cache_size;
    shared->space = s->space;
    shared->filename = g_strdup(file->filename[0] ? file->filename
                                                  : s->node_name);
    qemu_mutex_init(&shared->lock);
    qemu_co_mutex_init(&shared->revive_lock);
    QLIST_INSERT_HEAD(&stores, shared, next);
    shared_add(shared, bs);
    s->writes = writes;

    ret = shared_engine_open(shared, errp);
    if (ret < 0) {
        shared_remove(bs);
        shared_free(shared);
        return ret;
    }
    bale_bdrv_device_set_activated(dev, shared_activated, shared);
    return 0;
}

static bool shared_check_options(BaleShared *shared, BDRVBaleState *s,
                                 Error **errp)
{
    if (s->has_workers && s->workers != shared->workers) {
        error_setg(errp, "'compression-threads' is of the store, which is "
                   "open with %u", shared->workers);
        return false;
    }
    if (s->has_cache_size && s->cache_size != shared->cache_size) {
        error_setg(errp, "'cache-size' is of the store, which is open with %"
                   PRIu64, shared->cache_size);
        return false;
    }
    if (s->space.given &&
        (s->space.max_size != shared->space.max_size ||
         s->space.compact_off != shared->space.compact_off ||
         s->space.compact_rate != shared->space.compact_rate)) {
        error_setg(errp, "'max-size', 'compact' and 'compact-rate' are of the "
                   "store, which is open with others");
        return false;
    }
    return true;
}

/* Make @bs use the same node as the store. */
static int shared_take_file(BaleShared *shared, BlockDriverState *bs,
                            bool writes, Error **errp)
{
    BlockDriverState *own = bs->file->bs;
    BlockDriverState *file = bale_bdrv_device_file(shared->dev);
    AioContext *ctx = bdrv_get_aio_context(file);
    bool locked = ctx != qemu_get_current_aio_context();
    int ret = 0;

    if (own == file) {
        return 0;
    }
    if (writes && bdrv_is_read_only(file) && !bdrv_is_read_only(own) &&
        !QTAILQ_IN_USE(file, monitor_list) &&
        ctx == bdrv_get_aio_context(own)) {
        /* A node that was made for a reader: all take the new one. */
        return bdrv_replace_node(file, own, errp);
    }

    if (locked) {
        aio_context_acquire(ctx);
    }
    bdrv_ref(file);
    bdrv_unref_child(bs, bs->file);
    if (!bdrv_attach_child(bs, file, "file", &child_of_bds, BDRV_CHILD_IMAGE,
                           errp)) {
        ret = -EINVAL;
    }
    if (locked) {
        aio_context_release(ctx);
    }
    return ret;
}

typedef struct EngineJoin {
    BaleStore *store;
    const char *name;
    BaleImage *image; /* the other way round: to be closed */
    GError *err;
} EngineJoin;

static void join_blocking(void *opaque)
{
    EngineJoin *j = opaque;

    j->image = bale_image_open(j->store, j->name, &j->err);
}

static void unjoin_blocking(void *opaque)
{
    EngineJoin *j = opaque;

    bale_image_close(j->image);
}

static void shared_run(BaleShared *shared, BaleBlockingFunc *fn, void *opaque)
{
    bale_bdrv_device_busy_begin(shared->dev);
    bale_bridge_run(NULL, fn, opaque);
    bale_bdrv_device_busy_end(shared->dev);
}

/* The node that shows @image already. */
static BDRVBaleState *shared_find_image(BaleShared *shared, BaleImage *image)
{
    BDRVBaleState *s;

    QLIST_FOREACH(s, &shared->nodes, next) {
        if (s->image == image) {
            return s;
        }
    }
    return NULL;
}

/* 0: @bs shows an image of @shared now; 1: it must have a store of its own. */
static int shared_join(BaleShared *shared, BlockDriverState *bs, bool writes,
                       Error **errp)
{
    BDRVBaleState *s = bs->opaque, *other;
    EngineJoin j = { .store = shared->store, .name = s->image_name };
    int ret;

    shared_run(shared, join_blocking, &j);
    if (!j.image) {
        return bale_bridge_error(j.err, errp);
    }
    other = shared_find_image(shared, j.image);
    if (other) {
        ret = 1;
        if (writes || !shared->read_only) {
            error_setg(errp, "Image '%s' is in use by node '%s'",
                       s->image_name ?: "", other->node_name);
            ret = -EBUSY;
        }
        goto fail;
    }
    ret = shared_check_options(shared, s, errp)
              ? shared_take_file(shared, bs, writes, errp)
              : -EINVAL;
    if (ret < 0) {
        goto fail;
    }
    shared_add(shared, bs);
    s->image = j.image;
    bale_bs_set_backing(bs);
    s->writes = writes;
    ret = shared_update(shared, bs, errp);
    if (ret < 0) {
        bale_image_set_backing_read(s->image, NULL, NULL);
        s->image = NULL;
        shared_remove(bs);
        goto fail;
    }
    return 0;

fail:
    shared_run(shared, unjoin_blocking, &j);
    return ret;
}

int bale_shared_open(BlockDriverState *bs, bool writes, BaleImageInfo *info,
                     Error **errp)
{
    BDRVBaleState *s = bs->opaque;
    BaleShared *shared = shared_find(bs->file->bs);
    int ret = shared ? shared_join(shared, bs, writes, errp) : 1;

    if (ret > 0) {
        ret = shared_begin(bs, writes, errp);
    }
    if (ret == 0) {
        bale_image_get_info(s->image, info);
        s->cluster_size = info->cluster_size;
    }
    return ret;
}

int bale_shared_close(BlockDriverState *bs, Error **errp)
{
    BDRVBaleState *s = bs->opaque;
    BaleShared *shared = s->shared;
    g_autoptr(GPtrArray) nodes = g_ptr_array_new();
    EngineClose c = { .nodes = nodes };
    bool last;
    int ret = 0;

    if (!shared) {
        return 0;
    }
    last = QLIST_FIRST(&shared->nodes) == s && !QLIST_NEXT(s, next);
    if (!last) {
        ret = bale_shared_set_writes(bs, false, errp);
    }
    if (s->image) {
        bale_image_set_backing_read(s->image, NULL, NULL);
    }
    g_ptr_array_add(nodes, s);
    c.store = last ? g_steal_pointer(&shared->store) : NULL;
    bale_bs_run(bs, close_blocking, &c);
    shared_remove(bs);
    if (last) {
        shared_free(shared);
    }
    return c.ok ? ret : bale_bridge_error(c.err, errp);
}

/*
 * --- Reopen, invalidate
 */

int bale_shared_reopen_prepare(BlockDriverState *bs, QDict *options,
                               bool writes, Error **errp)
{
    BDRVBaleState *s = bs->opaque;
    const char *file = qdict_get_try_str(options, "file");

    if (file && QLIST_NEXT(QLIST_FIRST(&s->shared->nodes), next) &&
        bdrv_find_node(file) != bs->file->bs) {
        error_setg(errp, "'file' of node '%s' cannot be changed while other "
                   "nodes use the store", s->node_name);
        return -EBUSY;
    }
    s->reopen_writes = writes && !s->writes;
    /* To read only: make it durable and clean while that is possible. */
    return bale_shared_set_writes(bs, writes && s->writes, errp);
}

/* Take over the permissions that reopened nodes were given. */
static int shared_take_perms(BaleShared *shared, Error **errp)
{
    BDRVBaleState *s;
    int ret = 0;

    if (bale_bdrv_device_access(shared->dev) == BALE_BDRV_NONE) {
        ret = bale_bdrv_device_set_access(shared->dev, BALE_BDRV_WRITE_SHARED,
                                          errp);
    }
    QLIST_FOREACH(s, &shared->nodes, next) {
        if (ret == 0 && s->reopen_writes) {
            ret = bdrv_child_refresh_perms(s->bs, s->bs->file, errp);
        }
    }
    return ret;
}

void bale_shared_reopen_end(BlockDriverState *bs, bool writes)
{
    BDRVBaleState *s = bs->opaque;
    BaleShared *shared = s->shared;
    Error *err = NULL;
    int ret = bale_bdrv_device_set_file(shared->dev, bs->file->bs, &err);

    if (ret == 0 && s->reopen_writes && writes) {
        ret = shared_take_perms(shared, &err);
    }
    s->reopen_writes = false;
    if (ret == 0) {
        ret = bale_shared_set_writes(bs, writes, &err);
    }
    if (ret < 0) {
        error_reportf_err(err, "bale: '%s': reopening: ", shared->filename);
    }
}

/* The store could not be opened again: no node answers requests any more. */
static void shared_lose(BaleShared *shared)
{
    BDRVBaleState *s;

    while ((s = QLIST_FIRST(&shared->nodes))) {
        BlockDriverState *bs = s->bs;

        bale_control_close(&s->control);
        shared_remove(bs);
        bs->drv = NULL;
    }
    /* Here may be a coroutine of another context. */
    aio_bh_schedule_oneshot(qemu_get_aio_context(), shared_free_bh, shared);
}

/* Close the store and open it again. */
static int coroutine_fn shared_co_reopen(BaleShared *shared,
                                         BlockDriverState *bs, Error **errp)
{
    g_autoptr(GPtrArray) nodes = shared_list_nodes(shared);
    EngineClose c = { .store = shared->store, .nodes = nodes };
    int ret;

    for (guint i = 0; i < nodes->len; i++) {
        BDRVBaleState *s = g_ptr_array_index(nodes, i);

        if (s->bs != bs && qatomic_read(&s->bs->in_flight)) {
            error_setg(errp, "Node '%s' has requests under way",
                       s->node_name);
            return -EBUSY;
        }
    }
    bale_bs_run(bs, close_blocking, &c);
    shared->store = NULL;
    g_clear_error(&c.err); /* it was not written to */
    ret = shared_engine_open(shared, errp);
    if (ret < 0) {
        error_prepend(errp, "Could not reopen the store: ");
        shared_lose(shared);
    }
    return ret;
}

int coroutine_fn bale_shared_co_invalidate(BlockDriverState *bs, bool writes,
                                           Error **errp)
{
    BDRVBaleState *s = bs->opaque;
    BaleShared *shared = s->shared;
    int ret = 0;

    if (shared->stale) {
        ret = shared_co_reopen(shared, bs, errp);
        if (ret < 0) {
            return ret;
        }
        shared->stale = false;
    }
    return bale_shared_set_writes(bs, writes, errp);
}

/*
 * --- For other files of the module
 */

void bale_bs_set_cache_size(BlockDriverState *bs, uint64_t bytes)
{
    BDRVBaleState *s = bs->opaque;

    s->shared->cache_size = bytes;
    bale_store_set_cache_size(s->store, bytes);
}

BaleSpace *bale_bs_space(BlockDriverState *bs)
{
    BDRVBaleState *s = bs->opaque;

    return &s->shared->space;
}

int bale_bs_set_workers(BlockDriverState *bs, unsigned workers, Error **errp)
{
    BDRVBaleState *s = bs->opaque;
    GError *err = NULL;

    if (!bale_store_set_workers(s->store, workers, &err)) {
        return bale_bridge_error(err, errp);
    }
    s->shared->workers = workers;
    return 0;
}

bool bale_bs_store_writable(BlockDriverState *bs)
{
    BDRVBaleState *s = bs->opaque;

    return !s->shared->read_only;
}

BaleJob *bale_bs_job(BlockDriverState *bs)
{
    BDRVBaleState *s = bs->opaque, *other;

    QLIST_FOREACH(other, &s->shared->nodes, next) {
        if (other->control.job) {
            return other->control.job;
        }
    }
    return NULL;
}

BlockDriverState *bale_bs_of_image(BlockDriverState *bs, const char *name)
{
    BDRVBaleState *s = bs->opaque, *other;
    g_autofree BaleImageInfo *info = g_new0(BaleImageInfo, 1);

    QLIST_FOREACH(other, &s->shared->nodes, next) {
        bale_image_get_info(other->image, info);
        if (!strcmp(info->name, name)) {
            return other->bs;
        }
    }
    return NULL;
}
