/*
 * An image: its record, what a cluster is replaced with, and what is asked
 * about it.  Its clusters are in layers (layer.c); requests are in request.c.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "store-internal.h"

#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "util/memory.h"
#include "util/planted.h"

/* Clusters that one zero record covers at most. */
#define ZERO_COUNT_MAX (1u << 30)
/* A discard leaves clusters out that were never written, if so many follow. */
#define DISCARD_GAP_MIN 16u
/* One planted bug needs a checkpoint between an append and the index. */
#define MARK_WINDOW_US 20000

bool bale_image_has_backing(BaleImage *image)
{
    return image->backing_read &&
           (!image->backing_present ||
            image->backing_present(image->backing_opaque));
}

bool bale_image_contains(BaleImage *image, uint64_t offset, uint64_t len)
{
    uint64_t size = bale_image_size(image);

    return offset <= size && len <= size - offset;
}

/* --- replacing clusters --- */

int bale_store_write_begin(BaleStore *s)
{
    int ret;

    for (;;) {
        pthread_rwlock_rdlock(&s->session_lock);
        if (store_failed(s)) {
            pthread_rwlock_unlock(&s->session_lock);
            return -EIO;
        }
        if (s->session) {
            bale_log_enter(s);
            return 0;
        }
        pthread_rwlock_unlock(&s->session_lock);
        pthread_rwlock_wrlock(&s->session_lock);
        ret = bale_session_begin(s);
        pthread_rwlock_unlock(&s->session_lock);
        if (ret < 0) {
            return ret;
        }
    }
}

bool bale_store_write_begin_now(BaleStore *s)
{
    if (bale_log_inside() || pthread_rwlock_tryrdlock(&s->session_lock)) {
        return false;
    }
    if (store_failed(s) || !s->session) {
        pthread_rwlock_unlock(&s->session_lock);
        return false;
    }
    bale_log_enter(s);
    return true;
}

void bale_store_write_end(BaleStore *s)
{
    bale_log_leave(s);
    pthread_rwlock_unlock(&s->session_lock);
}

/* Append @r to @bucket and point the index at it; one attempt. */
static int image_put_once(BaleImage *image, BaleBucket bucket, BaleRecord *r,
                          const void *payload)
{
    BaleStore *s = image->store;
    uint64_t end = r->cluster + r->count;
    uint64_t address, value, live, old, c = r->cluster;
    unsigned size_class = 0;
    BaleLayer *layer;
    int ret = bale_store_write_begin(s);

    if (ret < 0) {
        return ret;
    }
    if (r->type == BALE_RECORD_DATA) {
        size_class = bale_size_class(r->payload_len, s->cluster_size);
    }
    /* Each cluster that points at a zero record keeps it alive. */
    live = bale_value_live(bale_value(0, size_class), s->cluster_size);
    /* Which layer is on top can change only without us. */
    layer = image->top;
    r->layer = layer->id;
    if (r->type == BALE_RECORD_ZERO && BALE_PLANTED(zero_resurrected)) {
        r->layer++; /* a record that recovery takes for another layer's */
    }
    ret = bale_log_append(s, bucket, r, payload, live * r->count, &address);
    if (BALE_PLANTED(mark_not_awaited)) {
        g_usleep(MARK_WINDOW_US);
    }
    if (ret == 0) {
        value = bale_value(address, size_class);
        while (c < end &&
               (ret = bale_layer_index_set(layer, c, value, &old)) == 0) {
            bale_layer_account_old(layer, c, old);
            c++;
        }
        if (ret < 0) {
            /* No memory; these do not point at it. */
            pthread_mutex_lock(&s->log_lock);
            bale_page_live_sub(s, address, live * (end - c));
            pthread_mutex_unlock(&s->log_lock);
        }
    }
    bale_store_write_end(s);
    return ret;
}

/*
 * The same, and if there is no room wait for some.  What frees space may use
 * the reserve then.
 */
static int image_put(BaleImage *image, BaleRecord *r, const void *payload)
{
    BaleStore *s = image->store;
    BaleSpaceWait wait = { 0 };
    int ret;

    do {
        ret = image_put_once(image, BALE_BUCKET_FRESH, r, payload);
    } while (bale_maintain_try_again(s, &wait, &ret));
    if (ret == -ENOSPC && r->type == BALE_RECORD_ZERO) {
        wait = (BaleSpaceWait){ 0 };
        do {
            ret = image_put_once(image, BALE_BUCKET_COMPACTED, r, payload);
        } while (bale_maintain_try_again(s, &wait, &ret));
    }
    return ret;
}

int bale_image_pack_cluster(BaleImage *image, BaleWorkerContext *wc,
                            uint64_t cluster, const uint8_t *data,
                            uint8_t *packed, BaleRecord *r,
                            const uint8_t **payload)
{
    BaleStore *s = image->store;
    uint8_t codec = image->codec;
    ssize_t n;

    *r = (BaleRecord){ .count = 1, .cluster = cluster };
    *payload = NULL;
    if (bale_memory_is_zero(data, s->cluster_size)) {
        r->type = BALE_RECORD_ZERO;
        stat_add(&s->stats.zero_records, 1);
        return 0;
    }
    r->type = BALE_RECORD_DATA;
    /* What saves next to nothing is not worth decompressing. */
    n = bale_codec_compress(bale_worker_codec(wc, image), packed,
                            s->cluster_size - s->cluster_size / 64, data,
                            s->cluster_size);
    if (n < 0) {
        return n;
    }
    r->codec = n ? codec : BALE_CODEC_NONE;
    r->payload_len = n ? n : s->cluster_size;
    *payload = n ? packed : data;
    if (!n) {
        stat_add(&s->stats.incompressible, 1);
    }
    return 0;
}

int bale_image_put_packed(BaleImage *image, BaleRecord *r,
                          const uint8_t *payload, bool aside)
{
    BaleStore *s = image->store;
    int ret = -ENOSPC;

    if (aside) {
        ret = image_put_once(image, BALE_BUCKET_COMPACTED, r, payload);
    }
    if (ret == -ENOSPC) {
        ret = image_put(image, r, payload);
    }
    if (ret == 0) {
        stat_add(&s->stats.logical_bytes, s->cluster_size);
        stat_add(&s->stats.stored_bytes, bale_record_size(r));
    }
    bale_epoch_poll(s->epoch); /* one load, unless the index has grown */
    return ret;
}

int bale_image_put_cluster(BaleImage *image, BaleWorkerContext *wc,
                           uint64_t cluster, const uint8_t *data)
{
    const uint8_t *payload;
    BaleRecord r;
    int ret = bale_image_pack_cluster(image, wc, cluster, data, wc->packed,
                                      &r, &payload);

    return ret < 0 ? ret : bale_image_put_packed(image, &r, payload, false);
}

/*
 * The first cluster in [@first, @end) that a layer has, or @end.  One of which
 * the log has only patches counts: a recovery would find them.
 */
static uint64_t image_next_cluster(BaleImage *image, uint64_t first,
                                   uint64_t end)
{
    uint64_t c = first;

    end = bale_mutable_next_patched(image->mutable_region, first, end);
    while (c < end) {
        if (!bale_image_chunk_used(image, c)) {
            c = (c | (BALE_CHUNK_CLUSTERS - 1)) + 1;
        } else if (bale_image_find(image, c)) {
            return c;
        } else {
            c++;
        }
    }
    return end;
}

/*
 * Where a stretch that begins with a cluster of our own ends: the next gap of
 * DISCARD_GAP_MIN clusters, or @end.
 */
static uint64_t image_run_end(BaleImage *image, uint64_t first, uint64_t end)
{
    uint64_t c = first + 1, next;

    while ((next = image_next_cluster(image, c, end)) < end &&
           next - c < DISCARD_GAP_MIN) {
        c = next + 1;
    }
    return c;
}

/* Append one zero record and point the index at it. */
static int image_put_zeroes(BaleImage *image, uint64_t first, uint32_t count)
{
    BaleRecord r = {
        .type = BALE_RECORD_ZERO,
        .cluster = first,
        .count = count,
    };

    stat_add(&image->store->stats.zero_records, 1);
    return image_put(image, &r, NULL);
}

/*
 * The first cluster in [@first, @end) that does not read as zeroes already, or
 * of which the log has patches; or @end.
 */
static uint64_t image_next_nonzero(BaleImage *image, uint64_t first,
                                   uint64_t end)
{
    bool backing = bale_image_has_backing(image);

    for (uint64_t c = first;; c++) {
        uint64_t value;

        c = backing ? c : image_next_cluster(image, c, end);
        if (c >= end) {
            return end;
        }
        value = bale_image_find(image, c);
        if (!value || bale_value_class(value) ||
            bale_mutable_next_patched(image->mutable_region, c, c + 1) == c) {
            return c;
        }
    }
}

int bale_image_zero_clusters(BaleImage *image, uint64_t first, uint64_t count,
                             bool discard)
{
    uint64_t end = first + count;
    int ret = 0;

    while (ret == 0 && first < end) {
        uint64_t run = end;

        if (__atomic_load_n(&image->skip_unchanged, __ATOMIC_RELAXED)) {
            first = image_next_nonzero(image, first, end);
            if (first == end) {
                break;
            }
            run = first + 1;
            while (run < end && image_next_nonzero(image, run, run + 1) ==
                                    run) {
                run++;
            }
        } else if (discard && !bale_image_has_backing(image)) {
            /* What was never written reads as zeroes without our help. */
            first = image_next_cluster(image, first, end);
            if (first == end) {
                break;
            }
            run = image_run_end(image, first, end);
        }
        run = MIN(run, first + ZERO_COUNT_MAX);
        ret = image_put_zeroes(image, first, run - first);
        first = run;
    }
    return ret;
}

/* --- status --- */

/* @dirty_end: nothing at or behind it is in the mutable region. */
static BaleClusterStatus cluster_status(BaleImage *image, uint64_t cluster,
                                        uint64_t dirty_end)
{
    BaleStore *s = image->store;
    uint64_t begin = cluster << s->cluster_bits;
    uint64_t value;

    if (begin < dirty_end && bale_mutable_cached(image->mutable_region, begin,
                                                 s->cluster_size)) {
        return BALE_CLUSTER_DATA;
    }
    value = bale_image_find(image, cluster);
    return value == 0                ? BALE_CLUSTER_UNALLOCATED
           : bale_value_class(value) ? BALE_CLUSTER_DATA
                                     : BALE_CLUSTER_ZERO;
}

int bale_image_status(BaleImage *image, uint64_t offset, uint64_t len,
                      BaleClusterStatus *status, uint64_t *run)
{
    BaleStore *s = image->store;
    uint64_t c = offset >> s->cluster_bits;
    uint64_t end, dirty_end;

    if (len == 0 || !bale_image_contains(image, offset, len)) {
        return -EINVAL;
    }
    if (bale_image_is_doubtful(image)) {
        /* A hole may be one only by loss: who asks is to read, and fail. */
        *status = BALE_CLUSTER_DATA;
        *run = len;
        return 0;
    }
    dirty_end = bale_mutable_end(image->mutable_region);
    *status = cluster_status(image, c, dirty_end);
    end = (offset + len + s->cluster_size - 1) >> s->cluster_bits;
    for (c++; c < end; c++) {
        if (*status == BALE_CLUSTER_UNALLOCATED &&
            c << s->cluster_bits >= dirty_end &&
            !bale_image_chunk_used(image, c)) {
            c |= BALE_CHUNK_CLUSTERS - 1;
        } else if (cluster_status(image, c, dirty_end) != *status) {
            break;
        }
    }
    *run = MIN(MIN(c, end) << s->cluster_bits, offset + len) - offset;
    return 0;
}

/* --- the image itself --- */

/* Fill @record in with what @cat says of an image. */
static void image_fill_record(BaleImageRecord *record,
                              const BaleCatalogue *cat,
                              const BaleImageEntry *e, uint32_t layer)
{
    record->id = e->id;
    record->layer = layer;
    record->size = bale_catalogue_layer(cat, layer)->size;
    record->codec = e->codec;
    record->level = e->level;
    g_strlcpy(record->name, e->name, sizeof(record->name));
    g_strlcpy(record->backing_file, e->backing_file,
              sizeof(record->backing_file));
    g_strlcpy(record->backing_format, e->backing_format,
              sizeof(record->backing_format));
}

void bale_image_follow(BaleImage *image, const BaleCatalogue *cat)
{
    BaleStore *s = image->store;
    BaleImageEntry *e = bale_catalogue_image(cat, image->id);
    uint32_t layer = e ? e->layer : 0;

    for (guint i = 0; e && image->snapshot && i < cat->snapshots->len; i++) {
        BaleSnapshotEntry *snapshot =
            &g_array_index(cat->snapshots, BaleSnapshotEntry, i);

        if (snapshot->id == image->snapshot) {
            layer = snapshot->layer;
        }
    }
    if (!e) {
        return; /* being deleted */
    }
    image_fill_record(&image->record, cat, e, layer);
    /* They do not change after the first time; write-outs look at them. */
    if (image->codec != e->codec || image->level != e->level) {
        image->codec = e->codec;
        image->level = e->level;
    }
    __atomic_store_n(&image->read_only, e->read_only || image->snapshot,
                     __ATOMIC_RELEASE);
    __atomic_store_n(&image->top, bale_layer_get(s, layer),
                     __ATOMIC_RELEASE);
    __atomic_store_n(&image->size, image->record.size, __ATOMIC_RELEASE);
}

BaleImage *bale_image_new(BaleStore *s, BaleLayer *top, GError **errp)
{
    BaleImage *image = g_new0(BaleImage, 1);

    image->store = s;
    image->top = top;
    image->record.size = image->size = top->size;
    pthread_mutex_init(&image->range_lock, NULL);
    pthread_mutex_init(&image->stream_lock, NULL);
    image->ranges_waiting_tail = &image->ranges_waiting;
    image->mutable_region = bale_mutable_new(image);
    if (!image->mutable_region) {
        g_set_error(errp, BALE_STORE_ERROR, BALE_STORE_ERROR_NO_MEMORY,
                    "no memory for an image");
        bale_image_free(image);
        return NULL;
    }
    return image;
}

void bale_image_free(BaleImage *image)
{
    if (image) {
        bale_mutable_free(image->mutable_region);
        pthread_mutex_destroy(&image->range_lock);
    pthread_mutex_destroy(&image->stream_lock);
        g_free(image);
    }
}

uint64_t bale_image_size(BaleImage *image)
{
    return __atomic_load_n(&image->size, __ATOMIC_ACQUIRE);
}

void bale_image_get_info(BaleImage *image, BaleImageInfo *info)
{
    BaleStore *s = image->store;

    memset(info, 0, sizeof(*info));
    pthread_mutex_lock(&s->log_lock);
    for (BaleLayer *layer = image->top; layer; layer = layer->parent) {
        BaleIndexStats stats;

        bale_index_get_stats(layer->index, &stats);
        info->allocated_clusters += stats.keys;
        info->layers++;
    }
    info->allocated_clusters =
        MIN(info->allocated_clusters,
            bale_size_clusters(image->record.size, s->cluster_size));
    info->read_only = image->read_only;
    info->size = image->record.size;
    info->cluster_size = s->cluster_size;
    info->codec = image->record.codec;
    info->level = image->record.level;
    info->layer = image->record.layer;
    info->has_backing_file = image->record.backing_file[0];
    memcpy(info->name, image->record.name, sizeof(info->name));
    memcpy(info->backing_file, image->record.backing_file,
           sizeof(info->backing_file));
    memcpy(info->backing_format, image->record.backing_format,
           sizeof(info->backing_format));
    pthread_mutex_unlock(&s->log_lock);
}

void bale_image_set_skip_unchanged(BaleImage *image, bool skip)
{
    __atomic_store_n(&image->skip_unchanged, skip, __ATOMIC_RELAXED);
}

void bale_image_set_salvage(BaleImage *image, bool salvage)
{
    image->salvage = salvage;
}

bool bale_image_is_doubtful(BaleImage *image)
{
    return __atomic_load_n(&image->store->corrupt, __ATOMIC_RELAXED) &&
           !image->salvage;
}

void bale_image_set_backing_read(BaleImage *image, BaleBackingRead *read,
                                 void *opaque)
{
    image->backing_opaque = opaque;
    image->backing_read = read;
}

void bale_image_set_backing_present(BaleImage *image,
                                    BaleBackingPresent *present)
{
    image->backing_present = present;
}

BaleImage **bale_store_images(BaleStore *s, guint *n)
{
    BaleImage **images;

    pthread_mutex_lock(&s->log_lock);
    *n = s->images->len;
    images = g_new(BaleImage *, *n + 1);
    if (*n) {
        memcpy(images, s->images->pdata, *n * sizeof(*images));
    }
    pthread_mutex_unlock(&s->log_lock);
    return images;
}

BaleImage *bale_image_of_layer(BaleStore *s, uint32_t layer)
{
    BaleImage *found = NULL;

    pthread_mutex_lock(&s->log_lock);
    for (guint i = 0; i < s->images->len && !found; i++) {
        BaleImage *image = g_ptr_array_index(s->images, i);

        if (!image->snapshot && image->top->id == layer) {
            found = image;
        }
    }
    pthread_mutex_unlock(&s->log_lock);
    return found;
}

/* --- blocking forms --- */

int bale_image_read_sync(BaleImage *image, uint64_t offset, void *buf,
                         size_t len)
{
    struct iovec iov = { buf, len };
    BaleSync sync = BALE_SYNC_INIT;

    bale_image_read(image, offset, &iov, 1, bale_sync_done, &sync);
    return bale_sync_wait(&sync);
}

int bale_image_write_sync(BaleImage *image, uint64_t offset, const void *buf,
                          size_t len, unsigned flags)
{
    struct iovec iov = { (void *)buf, len };
    BaleSync sync = BALE_SYNC_INIT;

    bale_log_wait_here(flags & BALE_FUA);
    bale_image_write(image, offset, &iov, 1, flags, bale_sync_done, &sync);
    bale_log_wait_here(false);
    return bale_sync_wait(&sync);
}

int bale_image_zero_sync(BaleImage *image, uint64_t offset, uint64_t len,
                         unsigned flags)
{
    BaleSync sync = BALE_SYNC_INIT;

    bale_image_zero(image, offset, len, flags, bale_sync_done, &sync);
    return bale_sync_wait(&sync);
}

int bale_store_flush_sync(BaleStore *store)
{
    BaleSync sync = BALE_SYNC_INIT;

    bale_log_wait_here(true);
    bale_store_flush(store, bale_sync_done, &sync);
    bale_log_wait_here(false);
    return bale_sync_wait(&sync);
}
