/*
 * The store as a whole: create, open, close, what it tells about itself.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "store-internal.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "util/memory.h"
#include "util/planted.h"

/* How often a checkpoint begins anew because there are patches. */
#define CHECKPOINT_TRIES_MAX 4
/* A new store has room for at least so many pages, if small ones do it. */
#define CREATE_PAGES_MIN 16u

G_DEFINE_QUARK(bale-store-error-quark, bale_store_error)

int bale_error_to_errno(const GError *err)
{
    if (!err || err->domain != BALE_STORE_ERROR) {
        return -EIO;
    }
    switch (err->code) {
    case BALE_STORE_ERROR_NOT_A_STORE:
    case BALE_STORE_ERROR_INVALID:
        return -EINVAL;
    case BALE_STORE_ERROR_UNSUPPORTED:
        return -ENOTSUP;
    case BALE_STORE_ERROR_NO_SPACE:
        return -ENOSPC;
    case BALE_STORE_ERROR_NO_MEMORY:
        return -ENOMEM;
    case BALE_STORE_ERROR_READ_ONLY:
        return -EROFS;
    default:
        return -EIO;
    }
}

static bool store_error(GError **errp, BaleStoreErrorCode code,
                        const char *fmt, ...) G_GNUC_PRINTF(3, 4);

static bool store_error(GError **errp, BaleStoreErrorCode code,
                        const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    if (errp) {
        *errp = g_error_new_valist(BALE_STORE_ERROR, code, fmt, ap);
    }
    va_end(ap);
    return false;
}

bool bale_error_set(GError **errp, int ret, const char *what)
{
    return store_error(errp,
                       ret == -ENOSPC   ? BALE_STORE_ERROR_NO_SPACE
                       : ret == -ENOMEM ? BALE_STORE_ERROR_NO_MEMORY
                       : ret == -EROFS  ? BALE_STORE_ERROR_READ_ONLY
                                        : BALE_STORE_ERROR_IO,
                       "%s: %s", what, g_strerror(-ret));
}

void bale_sync_done(void *opaque, int ret)
{
    BaleSync *sync = opaque;

    pthread_mutex_lock(&sync->lock);
    sync->done = true;
    sync->ret = ret;
    pthread_cond_signal(&sync->cond);
    pthread_mutex_unlock(&sync->lock);
}

int bale_sync_wait(BaleSync *sync)
{
    pthread_mutex_lock(&sync->lock);
    while (!sync->done) {
        pthread_cond_wait(&sync->cond, &sync->lock);
    }
    pthread_mutex_unlock(&sync->lock);
    return sync->ret;
}

/* --- workers --- */

static void worker_context_free(void *context)
{
    BaleWorkerContext *wc = context;

    if (wc) {
        bale_codec_context_free(wc->codec);
        for (unsigned i = 0; i < WORKER_CODECS_MAX; i++) {
            bale_codec_context_free(wc->codecs[i].context);
        }
        bale_memory_free(wc->cluster);
        bale_memory_free(wc->packed);
        g_free(wc);
    }
}

BaleCodecContext *bale_worker_codec(BaleWorkerContext *wc, BaleImage *image)
{
    BaleWorkerCodec *c;

    for (unsigned i = 0; i < WORKER_CODECS_MAX; i++) {
        c = &wc->codecs[i];
        if (c->context && c->codec == image->codec &&
            c->level == image->level) {
            return c->context;
        }
    }
    c = &wc->codecs[wc->next_codec++ % WORKER_CODECS_MAX];
    bale_codec_context_free(c->context);
    c->codec = image->codec;
    c->level = image->level;
    c->context = bale_codec_context_new(c->codec, c->level, wc->cluster_size,
                                        NULL);
    return c->context ? c->context : wc->codec;
}

static void *worker_context_new(void *opaque, unsigned worker, GError **errp)
{
    BaleStore *s = opaque;
    BaleWorkerContext *wc = g_new0(BaleWorkerContext, 1);

    wc->cluster_size = s->cluster_size;
    wc->codec = bale_codec_context_new(BALE_CODEC_NONE, 0, s->cluster_size,
                                       errp);
    wc->cluster = bale_memory_try_alloc(BALE_BLOCK_SIZE, s->cluster_size);
    wc->packed = bale_memory_try_alloc(BALE_BLOCK_SIZE, s->cluster_size);
    if (wc->codec && (!wc->cluster || !wc->packed)) {
        store_error(errp, BALE_STORE_ERROR_NO_MEMORY,
                    "no memory for a compression thread");
    }
    if (!wc->codec || !wc->cluster || !wc->packed) {
        worker_context_free(wc);
        return NULL;
    }
    return wc;
}

/* --- making and freeing a BaleStore --- */

/* End what goes on in the background; the device has nothing to do then. */
static void store_stop(BaleStore *s)
{
    bale_maintain_stop(s);
    bale_store_quiesce(s);
    bale_workers_free(s->workers);
    s->workers = NULL;
    bale_log_settle(s);
}

static void store_free(BaleStore *s)
{
    if (!s) {
        return;
    }
    store_stop(s);
    g_ptr_array_free(s->images, TRUE);
    g_ptr_array_free(s->old_images, TRUE);
    bale_epoch_drain(s->epoch);
    g_hash_table_destroy(s->layers);
    bale_catalogue_free(s->catalogue);
    pthread_mutex_destroy(&s->admin_lock);
    bale_cache_free(s->cache);
    bale_codec_context_free(s->inline_context.codec);
    bale_memory_free(s->inline_context.cluster);
    bale_epoch_free(s->epoch);
    bale_log_destroy(s);
    bale_read_gate_destroy(&s->read_gate);
    g_array_free(s->checkpoint, TRUE);
    g_array_free(s->previous, TRUE);
    pthread_rwlock_destroy(&s->session_lock);
    g_free(s);
}

static void store_free_image(void *image)
{
    bale_image_free(image);
}

static void store_free_layer(void *layer)
{
    bale_layer_unref(layer);
}

static BaleStore *store_new(BaleDevice *dev, const BaleSuper *super,
                            const BaleOpenOptions *o)
{
    BaleStore *s = g_new0(BaleStore, 1);

    s->dev = dev;
    dev->ops->get_info(dev, &s->dev_info);
    s->options = *o;
    s->super = *super;
    s->identity = bale_identity(super->uuid);
    s->cluster_size = super->cluster_size;
    s->cluster_bits = __builtin_ctz(super->cluster_size);
    s->page_size = super->page_size;
    s->read_only = o->read_only;
    s->epoch = bale_epoch_new();
    pthread_mutex_init(&s->admin_lock, NULL);
    s->catalogue = bale_catalogue_new();
    s->images = g_ptr_array_new_with_free_func(store_free_image);
    s->old_images = g_ptr_array_new_with_free_func(store_free_image);
    s->layers = g_hash_table_new_full(NULL, NULL, NULL, store_free_layer);
    s->checkpoint = g_array_new(FALSE, FALSE, sizeof(BaleCheckpointRecord));
    s->previous = g_array_new(FALSE, FALSE, sizeof(BaleCheckpointRecord));
    s->session_generation = super->generation;
    s->checkpoint_time_us = g_get_monotonic_time();
    pthread_rwlock_init(&s->session_lock, NULL);
    bale_log_init(s);
    bale_read_gate_init(&s->read_gate, dev);
    bale_page_set_max_size(s, super->max_size);
    return s;
}

static bool store_start(BaleStore *s, GError **errp)
{
    s->cache = bale_cache_new(s->options.cache_size, s->cluster_size,
                              &s->stats);
    s->inline_context.codec =
        bale_codec_context_new(BALE_CODEC_NONE, 0, s->cluster_size, errp);
    if (!s->inline_context.codec) {
        return false;
    }
    s->inline_context.cluster =
        bale_memory_try_alloc(BALE_BLOCK_SIZE, s->cluster_size);
    if (!s->cache || !s->inline_context.cluster) {
        return store_error(errp, BALE_STORE_ERROR_NO_MEMORY,
                           "no memory for the cluster cache");
    }
    s->workers = bale_workers_new("bale", s->options.workers,
                                  worker_context_new, worker_context_free, s,
                                  errp);
    return s->workers;
}

/* --- create --- */

uint64_t bale_create_page_size(const BaleCreateOptions *o, uint64_t room)
{
    uint64_t least = (uint64_t)BALE_PAGE_CLUSTERS_MIN *
                     (o->cluster_size ? o->cluster_size
                                      : BALE_CLUSTER_SIZE_DEFAULT);
    uint64_t page_size = BALE_PAGE_SIZE_DEFAULT;

    if (o->page_size) {
        return o->page_size;
    }
    if (o->max_size) {
        room = room ? MIN(room, o->max_size) : o->max_size;
    }
    while (room && page_size / 2 >= MAX(least, BALE_PAGE_SIZE_UNIT) &&
           page_size > room / CREATE_PAGES_MIN) {
        page_size /= 2;
    }
    return page_size;
}

/* A limit that leaves room for little more than the reserve is a mistake. */
static bool check_max_size(uint64_t bytes, uint64_t page_size, GError **errp)
{
    uint64_t least = BALE_SUPER_SIZE + BALE_MAX_SIZE_PAGES_MIN * page_size;

    return bytes == 0 || bytes >= least ||
           store_error(errp, BALE_STORE_ERROR_INVALID,
                       "a maximum size of %" PRIu64 " bytes is less than the "
                       "%" PRIu64 " that pages of %" PRIu64 " bytes need",
                       bytes, least, page_size);
}

bool bale_create_options_check(const BaleCreateOptions *o, GError **errp)
{
    uint32_t cluster_size =
        o->cluster_size ? o->cluster_size : BALE_CLUSTER_SIZE_DEFAULT;
    uint64_t page_size = bale_create_page_size(o, 0);

    if (!bale_is_power_of_2(cluster_size) ||
        cluster_size < BALE_CLUSTER_SIZE_MIN ||
        cluster_size > BALE_CLUSTER_SIZE_MAX) {
        return store_error(errp, BALE_STORE_ERROR_INVALID,
                           "cluster size %" PRIu32 " is not a power of two "
                           "between %u and %u", cluster_size,
                           BALE_CLUSTER_SIZE_MIN, BALE_CLUSTER_SIZE_MAX);
    }
    if (page_size % BALE_PAGE_SIZE_UNIT || page_size > BALE_PAGE_SIZE_MAX) {
        return store_error(errp, BALE_STORE_ERROR_INVALID,
                           "page size %" PRIu64 " is not a multiple of %llu "
                           "up to %llu", page_size, BALE_PAGE_SIZE_UNIT,
                           BALE_PAGE_SIZE_MAX);
    }
    if (page_size / BALE_PAGE_CLUSTERS_MIN < cluster_size) {
        return store_error(errp, BALE_STORE_ERROR_INVALID,
                           "page size %" PRIu64 " is less than %u clusters "
                           "of %" PRIu32, page_size, BALE_PAGE_CLUSTERS_MIN,
                           cluster_size);
    }
    if (o->size > BALE_IMAGE_SIZE_MAX ||
        o->size / cluster_size >= BALE_IMAGE_CLUSTERS_MAX) {
        return store_error(errp, BALE_STORE_ERROR_INVALID,
                           "image size %" PRIu64 " is more than %llu "
                           "clusters of %" PRIu32, o->size,
                           BALE_IMAGE_CLUSTERS_MAX - 1, cluster_size);
    }
    if (o->image && *o->image && !bale_name_valid(o->image)) {
        return store_error(errp, BALE_STORE_ERROR_INVALID,
                           "an image cannot be called '%s'", o->image);
    }
    if (!bale_codec_valid(o->codec)) {
        return store_error(errp, BALE_STORE_ERROR_INVALID,
                           "unknown compression type %d", o->codec);
    }
    if ((o->backing_file &&
         (strlen(o->backing_file) > BALE_BACKING_NAME_MAX ||
          !g_utf8_validate(o->backing_file, -1, NULL))) ||
        (o->backing_format && strlen(o->backing_format) > 63)) {
        return store_error(errp, BALE_STORE_ERROR_INVALID,
                           "the backing file's name or format is longer than "
                           "%u bytes or not UTF-8", BALE_BACKING_NAME_MAX);
    }
    return check_max_size(o->max_size, page_size, errp) &&
           bale_codec_check_level(o->codec, o->level, errp);
}

static bool create_check_device(BaleDevice *dev, uint64_t page_size,
                                GError **errp)
{
    BaleDeviceInfo info;

    dev->ops->get_info(dev, &info);
    if (info.read_only) {
        return store_error(errp, BALE_STORE_ERROR_READ_ONLY,
                           "the device is read-only");
    }
    if (info.block_size > BALE_BLOCK_SIZE) {
        return store_error(errp, BALE_STORE_ERROR_INVALID,
                           "the device's blocks of %" PRIu32 " bytes are "
                           "larger than %u", info.block_size,
                           BALE_BLOCK_SIZE);
    }
    /* Data and metadata need a page each. */
    if (info.fixed_size &&
        info.size < BALE_SUPER_SIZE + BALE_BUCKET_COMPACTED * page_size) {
        return store_error(errp, BALE_STORE_ERROR_NO_SPACE,
                           "a device of %" PRIu64 " bytes is too small for "
                           "two pages of %" PRIu64, info.size, page_size);
    }
    return true;
}

/* Make room for the super area; of a new file it takes only the copies. */
static int create_allocate(BaleDevice *dev)
{
    BaleDeviceInfo info;

    dev->ops->get_info(dev, &info);
    if (!info.fixed_size && info.size < BALE_SUPER_SIZE &&
        dev->ops->truncate &&
        dev->ops->truncate(dev, BALE_SUPER_SIZE) == 0) {
        return 0;
    }
    return dev->ops->allocate(dev, 0, BALE_SUPER_SIZE);
}

static bool device_set_geometry(BaleDevice *dev, uint64_t page_size,
                                GError **errp)
{
    int ret = 0;

    if (dev->ops->set_geometry) {
        ret = dev->ops->set_geometry(dev, BALE_SUPER_SIZE, page_size);
    }
    return ret == 0 ||
           store_error(errp, BALE_STORE_ERROR_IO,
                       "the device refuses pages of %" PRIu64 " bytes: %s",
                       page_size, g_strerror(-ret));
}

/* An older store's superblocks must not win over the new one's. */
static int create_wipe(BaleDevice *dev)
{
    BALE_AUTO_MEMORY uint8_t *zeroes =
        bale_memory_try_alloc0(BALE_BLOCK_SIZE, BALE_BLOCK_SIZE);
    int ret = zeroes ? create_allocate(dev) : -ENOMEM;

    for (unsigned i = 0; ret == 0 && i < BALE_SUPER_COPIES; i++) {
        ret = bale_device_store_sync(dev, bale_super_address(i), zeroes,
                                     BALE_BLOCK_SIZE);
    }
    return ret < 0 ? ret : bale_device_flush_sync(dev);
}

/* The catalogue of a store with one empty image. */
static bool create_catalogue(BaleStore *s, const BaleCreateOptions *o,
                             GError **errp)
{
    BaleCatalogue *cat = bale_catalogue_new();
    BaleLayerEntry layer = { .id = 1, .generation = 1, .size = o->size };
    BaleImageEntry image = {
        .id = 1,
        .layer = 1,
        .codec = o->codec,
        .level = o->level,
        .name = g_strdup(o->image ? o->image : ""),
        .backing_file = g_strdup(o->backing_file ? o->backing_file : ""),
        .backing_format = g_strdup(o->backing_format ? o->backing_format
                                                     : ""),
    };

    if (image.name[0]) {
        image.date_s = g_get_real_time() / G_USEC_PER_SEC;
    }
    g_array_append_val(cat->layers, layer);
    g_array_append_val(cat->images, image);
    cat->next_layer = cat->next_image = 2;
    return bale_catalogue_install(s, cat) == 0 ||
           store_error(errp, BALE_STORE_ERROR_NO_MEMORY,
                       "no memory for an index of %" PRIu64 " bytes of image",
                       o->size);
}

bool bale_store_create(BaleDevice *dev, const BaleCreateOptions *o,
                       GError **errp)
{
    BaleOpenOptions open = { .workers = 1 };
    BaleSuper super = { .generation = 1 };
    BaleDeviceInfo info;
    BaleStore *s;
    bool ok = false;
    int ret;

    if (!bale_create_options_check(o, errp)) {
        return false;
    }
    super.cluster_size =
        o->cluster_size ? o->cluster_size : BALE_CLUSTER_SIZE_DEFAULT;
    dev->ops->get_info(dev, &info);
    super.page_size = bale_create_page_size(o, info.fixed_size ? info.size
                                                               : 0);
    super.max_size = o->max_size;
    if (!create_check_device(dev, super.page_size, errp)) {
        return false;
    }
    if (getrandom(super.uuid, sizeof(super.uuid), 0) != sizeof(super.uuid)) {
        return store_error(errp, BALE_STORE_ERROR_IO,
                           "no random numbers: %s", g_strerror(errno));
    }
    super.uuid[6] = (super.uuid[6] & 0x0f) | 0x40; /* RFC 4122, version 4 */
    super.uuid[8] = (super.uuid[8] & 0x3f) | 0x80;
    ret = create_wipe(dev);
    if (ret < 0) {
        return bale_error_set(errp, ret, "writing the super area");
    }
    if (!device_set_geometry(dev, super.page_size, errp)) {
        return false;
    }
    s = store_new(dev, &super, &open);
    if (create_catalogue(s, o, errp) && store_start(s, errp)) {
        /*
         * The superblocks are zero until the checkpoint is complete: a crash
         * before that leaves no store at all, not half of one.
         */
        s->session = true;
        pthread_rwlock_wrlock(&s->session_lock);
        ok = bale_checkpoint_write(s, errp);
        pthread_rwlock_unlock(&s->session_lock);
    }
    store_free(s);
    return ok;
}

/* --- open --- */

/* Find the newest valid superblock. */
static bool store_read_supers(BaleDevice *dev, BaleSuper *super,
                              GError **errp)
{
    BALE_AUTO_MEMORY uint8_t *block =
        bale_memory_try_alloc(BALE_BLOCK_SIZE, BALE_BLOCK_SIZE);
    const char *unsupported = NULL, *damaged = NULL;
    bool found = false, refused = false;
    uint64_t refused_generation = 0;
    unsigned unread = BALE_SUPER_COPIES;
    uint32_t version = 0;
    int err = 0;

    if (!block) {
        return store_error(errp, BALE_STORE_ERROR_NO_MEMORY,
                           "no memory for a superblock");
    }
    for (unsigned copy = 0; copy < BALE_SUPER_COPIES; copy++) {
        const char *reason;
        BaleSuper next = { .generation = 0 };
        int ret;

        ret = bale_device_get_sync(dev, bale_super_address(copy), block,
                                   BALE_BLOCK_SIZE);
        if (ret < 0) {
            /* As good as a damaged one: that is what the others are for. */
            unread = copy;
            err = ret;
            continue;
        }
        ret = bale_super_decode(&next, copy, block, &reason);
        if (ret == 0 && BALE_PLANTED(super_oldest) && found) {
            continue;
        }
        if (ret == 0 && next.generation > super->generation) {
            *super = next;
            found = true;
        } else if (ret == -ENOTSUP) {
            /* A feature that is not known counts if its copy is newest. */
            refused |= next.generation > 0;
            refused_generation = MAX(refused_generation, next.generation);
            unsupported = reason;
            version = next.version;
        } else if (ret == -EIO) {
            damaged = reason;
        }
    }
    if (refused && refused_generation > super->generation) {
        found = false;
    }
    if (found) {
        return true;
    }
    if (unsupported) {
        return store_error(errp, BALE_STORE_ERROR_UNSUPPORTED,
                           "not supported: %s (version %" PRIu32 ")",
                           unsupported, version);
    }
    if (err < 0) {
        return store_error(errp, BALE_STORE_ERROR_IO,
                           "reading superblock copy %u: %s", unread,
                           g_strerror(-err));
    }
    if (damaged) {
        return store_error(errp, BALE_STORE_ERROR_CORRUPT,
                           "no superblock copy is valid: %s", damaged);
    }
    return store_error(errp, BALE_STORE_ERROR_NOT_A_STORE,
                       "not a Bale store: no superblock found");
}

BaleStore *bale_store_open(BaleDevice *dev, const BaleOpenOptions *o,
                           GError **errp)
{
    BaleSuper super = { .generation = 0 };
    BaleStore *s;

    if (o->workers > BALE_WORKERS_MAX) {
        store_error(errp, BALE_STORE_ERROR_INVALID,
                    "%u compression threads are more than %u", o->workers,
                    BALE_WORKERS_MAX);
        return NULL;
    }
    if (o->cache_size > BALE_CACHE_SIZE_MAX) {
        store_error(errp, BALE_STORE_ERROR_INVALID,
                    "a cache of %" PRIu64 " bytes is larger than %llu",
                    o->cache_size, BALE_CACHE_SIZE_MAX);
        return NULL;
    }
    if (!store_read_supers(dev, &super, errp)) {
        return NULL;
    }
    if (super.ro_compatible && !o->read_only) {
        store_error(errp, BALE_STORE_ERROR_UNSUPPORTED,
                    "a newer feature allows only reading this store");
        return NULL;
    }
    if ((super.incompatible & BALE_INCOMPAT_CORRUPT) && !o->read_only &&
        !o->repair) {
        store_error(errp, BALE_STORE_ERROR_CORRUPT,
                    "the store is marked corrupt; open it read-only, or "
                    "repair it");
        return NULL;
    }
    if (!device_set_geometry(dev, super.page_size, errp)) {
        return NULL;
    }
    s = store_new(dev, &super, o);
    if (s->dev_info.block_size > BALE_BLOCK_SIZE) {
        store_error(errp, BALE_STORE_ERROR_INVALID,
                    "the device's blocks of %" PRIu32 " bytes are larger "
                    "than %u", s->dev_info.block_size, BALE_BLOCK_SIZE);
        store_free(s);
        return NULL;
    }
    if (super.incompatible & BALE_INCOMPAT_CORRUPT) {
        s->corrupt = true;
    }
    if (!bale_recover(s, errp) || !store_start(s, errp)) {
        store_free(s);
        return NULL;
    }
    bale_page_set_max_size(s, o->max_size ? o->max_size : super.max_size);
    return s;
}

/* --- close --- */

void bale_background_begin(BaleStore *s)
{
    pthread_mutex_lock(&s->log_lock);
    s->background++;
    pthread_mutex_unlock(&s->log_lock);
}

void bale_background_end(BaleStore *s)
{
    pthread_mutex_lock(&s->log_lock);
    s->background--;
    pthread_cond_broadcast(&s->log_cond);
    pthread_mutex_unlock(&s->log_lock);
}

void bale_store_quiesce(BaleStore *s)
{
    pthread_mutex_lock(&s->log_lock);
    while (s->background) {
        pthread_cond_wait(&s->log_cond, &s->log_lock);
    }
    pthread_mutex_unlock(&s->log_lock);
}

/*
 * What recovery found in patches stays as it is until somebody writes: a store
 * that is opened and closed is not changed.
 */
static bool store_wants_write_out(BaleStore *s)
{
    g_autofree BaleImage **images = NULL;
    bool wants;
    guint n;

    pthread_rwlock_rdlock(&s->session_lock);
    wants = s->session;
    pthread_rwlock_unlock(&s->session_lock);
    images = bale_store_images(s, &n);
    for (guint i = 0; i < n && !wants; i++) {
        wants = bale_mutable_waiting(images[i]->mutable_region, false);
    }
    return wants;
}

static bool store_has_patches(BaleStore *s)
{
    g_autofree BaleImage **images = NULL;
    bool has = false;
    guint n;

    images = bale_store_images(s, &n);
    for (guint i = 0; i < n && !has; i++) {
        has = bale_mutable_any_patched(images[i]->mutable_region);
    }
    return has;
}

/* What becomes of the store when its checkpoint is written. */
typedef enum CheckpointThen {
    THEN_GO_ON,
    THEN_READ_ONLY,
    THEN_CLOSE,
} CheckpointThen;

/*
 * One attempt: no patches are appended meanwhile.  *@again: somebody began a
 * session before we had the lock, and recovery had left patches.  Returns with
 * the maintenance thread paused: it may begin the next session.
 */
static bool store_checkpoint(BaleStore *s, CheckpointThen then, bool *again,
                             GError **errp)
{
    bool ok = true;
    int ret = 0;

    *again = false;
    if (!s->read_only && !store_failed(s)) {
        ret = store_wants_write_out(s) ? bale_store_write_out_sync(s)
                                       : bale_store_flush_sync(s);
    }
    /* Before the pause: a write-out may wait for room, and so for its end. */
    bale_store_quiesce(s);
    bale_maintain_pause(s);
    if (ret < 0) {
        return bale_error_set(errp, ret, "flushing the store");
    }
    pthread_rwlock_wrlock(&s->session_lock);
    if (store_failed(s)) {
        ok = store_error(errp, BALE_STORE_ERROR_IO,
                         "the store has failed before: %s",
                         g_strerror(-store_failed(s)));
    } else if (s->session && store_has_patches(s)) {
        *again = true;
        ok = store_error(errp, BALE_STORE_ERROR_IO,
                         "the store is busy: small writes are left");
    } else if (s->session) {
        ok = bale_checkpoint_write(s, errp);
    }
    if (ok && then == THEN_READ_ONLY) {
        s->read_only = true;
    }
    pthread_rwlock_unlock(&s->session_lock);
    return ok;
}

static bool store_checkpoint_then(BaleStore *s, CheckpointThen then,
                                  GError **errp)
{
    bool ok = false, again = true;

    bale_patches_pause(s);
    for (int i = 0; i < CHECKPOINT_TRIES_MAX && again; i++) {
        g_clear_error(errp);
        ok = store_checkpoint(s, then, &again, errp);
        if (ok && then == THEN_CLOSE) {
            bale_maintain_stop(s);
        }
        bale_maintain_resume(s);
    }
    bale_patches_resume(s);
    if (then == THEN_READ_ONLY) {
        /* What the maintenance thread had begun and was paused in. */
        bale_store_quiesce(s);
    }
    return ok;
}

bool bale_store_checkpoint(BaleStore *s, GError **errp)
{
    return store_checkpoint_then(s, THEN_GO_ON, errp);
}

bool bale_store_set_read_only(BaleStore *s, bool read_only, GError **errp)
{
    if (read_only && !store_checkpoint_then(s, THEN_READ_ONLY, errp)) {
        return false;
    }
    if (!read_only && s->corrupt) {
        return store_error(errp, BALE_STORE_ERROR_CORRUPT,
                           "the store is marked corrupt");
    }
    pthread_rwlock_wrlock(&s->session_lock);
    s->read_only = read_only;
    s->dev->ops->get_info(s->dev, &s->dev_info);
    pthread_rwlock_unlock(&s->session_lock);
    return true;
}

bool bale_store_close(BaleStore *s, GError **errp)
{
    g_autoptr(GError) err = NULL;
    bool ok;

    for (guint i = 0; i < s->images->len; i++) {
        BaleImage *image = g_ptr_array_index(s->images, i);

        g_assert(image->openers == 0);
    }
    ok = store_checkpoint_then(s, THEN_CLOSE, &err);
    bale_store_quiesce(s);
    if (!ok && !store_failed(s) && bale_store_flush_sync(s) == 0) {
        /* Not quick to open next time, but nothing is lost. */
        g_warning("bale: %s; the next open will scan the store",
                  err->message);
        ok = true;
    }
    if (!ok) {
        g_propagate_error(errp, g_steal_pointer(&err));
    }
    store_stop(s);
    bale_device_close(s->dev);
    store_free(s);
    return ok;
}

static void store_limit(BaleStore *s, uint64_t bytes)
{
    pthread_mutex_lock(&s->log_lock);
    bale_page_set_max_size(s, bytes);
    pthread_mutex_unlock(&s->log_lock);
}

bool bale_store_set_max_size(BaleStore *s, uint64_t bytes, GError **errp)
{
    uint64_t before = s->max_size, stored;
    int ret;

    if (!check_max_size(bytes, s->page_size, errp)) {
        return false;
    }
    pthread_rwlock_wrlock(&s->session_lock);
    /* First: a store that is full may need it in order to be written to. */
    store_limit(s, bytes);
    ret = bale_session_begin(s);
    if (ret == 0 || (ret == -ENOSPC && s->session)) {
        stored = s->super.max_size;
        s->super.max_size = bytes;
        ret = bale_supers_write(s);
        if (ret < 0) {
            s->super.max_size = stored;
        }
    }
    if (ret < 0) {
        store_limit(s, before);
    }
    pthread_rwlock_unlock(&s->session_lock);
    return ret == 0 || bale_error_set(errp, ret, "setting the maximum size");
}

void bale_store_set_cache_size(BaleStore *s, uint64_t bytes)
{
    bale_cache_set_size(s->cache, MIN(bytes, BALE_CACHE_SIZE_MAX));
}

bool bale_store_set_workers(BaleStore *s, unsigned workers, GError **errp)
{
    return bale_workers_set_threads(s->workers, workers, errp);
}

/* --- information --- */

BaleDevice *bale_store_device(BaleStore *s)
{
    return s->dev;
}

bool bale_store_poisoned(BaleStore *s)
{
    return store_failed(s);
}

void bale_store_get_info(BaleStore *s, BaleStoreInfo *info)
{
    /* No lock: who holds session_lock may wait for the caller's thread. */
    memcpy(info->uuid, s->super.uuid, sizeof(info->uuid));
    info->version = BALE_FORMAT_VERSION;
    info->cluster_size = s->cluster_size;
    info->page_size = s->page_size;
    info->max_size = __atomic_load_n(&s->max_size, __ATOMIC_RELAXED);
    info->generation = __atomic_load_n(&s->super.generation,
                                       __ATOMIC_RELAXED);
    info->clean = s->was_clean;
    info->corrupt = __atomic_load_n(&s->corrupt, __ATOMIC_RELAXED);
    info->read_only = s->read_only;
    info->poisoned = store_failed(s);
    info->recovered_records = s->recovered_records;
    info->torn_bytes = s->torn_bytes;
    info->damaged_records = s->damaged_records;
}
