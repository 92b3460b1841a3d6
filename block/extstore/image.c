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

void bale_store_write_end(BaleStore *s)
{
    pthread_rwlock_unlock(&s->session_lock);
}

/* Append to the fresh data; what frees space may use the reserve. */
static int image_append(BaleStore *s, BaleRecord *r, const void *payload,
                        uint64_t live, uint64_t *address)
{
    int ret = bale_log_append(s, BALE_BUCKET_FRESH, r, payload, live,
                              address);

    if (ret == -ENOSPC && r->type != BALE_RECORD_DATA) {
        ret = bale_log_append(s, BALE_BUCKET_COMPACTED, r, payload, live,
                              address);
    }
    return ret;
}

/* Append what @data, one cluster, compresses to, and point the index at it. */
int bale_image_put_cluster(BaleImage *image, BaleWorkerContext *wc,
                           uint64_t cluster, const uint8_t *data)
{
    BaleStore *s = image->store;
    BaleLayer *layer = image->top;
    BaleRecord r = {
        .layer = layer->id,
        .count = 1,
        .cluster = cluster,
    };
    const void *payload = NULL;
    uint64_t address, value, live, old;
    unsigned size_class = 0;
    ssize_t n;
    int ret;

    if (bale_memory_is_zero(data, s->cluster_size)) {
        r.type = BALE_RECORD_ZERO;
        stat_add(&s->stats.zero_records, 1);
    } else {
        r.type = BALE_RECORD_DATA;
        /* What saves next to nothing is not worth decompressing. */
        n = bale_codec_compress(wc->codec, wc->packed,
                                s->cluster_size - s->cluster_size / 64, data,
                                s->cluster_size);
        if (n < 0) {
            return n;
        }
        r.codec = n ? image->codec : BALE_CODEC_NONE;
        r.payload_len = n ? n : s->cluster_size;
        payload = n ? wc->packed : data;
        size_class = bale_size_class(r.payload_len, s->cluster_size);
        if (!n) {
            stat_add(&s->stats.incompressible, 1);
        }
    }
    live = bale_value_live(bale_value(0, size_class), s->cluster_size);

    ret = bale_store_write_begin(s);
    if (ret < 0) {
        return ret;
    }
    ret = image_append(s, &r, payload, live, &address);
    if (ret == 0) {
        value = bale_value(address, size_class);
        ret = bale_layer_index_set(layer, cluster, value, &old);
        if (ret == 0) {
            bale_layer_account_old(layer, cluster, old);
        } else {
            bale_layer_account_old(layer, cluster, value);
        }
        stat_add(&s->stats.logical_bytes, s->cluster_size);
        stat_add(&s->stats.stored_bytes, bale_record_size(&r));
    }
    bale_store_write_end(s);
    bale_epoch_poll(s->epoch); /* one load, unless the index has grown */
    return ret;
}

/* The first cluster of our own in [@first, @end), or @end. */
static uint64_t image_next_cluster(BaleImage *image, uint64_t first,
                                   uint64_t end)
{
    uint64_t c = first;

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
    BaleStore *s = image->store;
    BaleLayer *layer = image->top;
    BaleRecord r = {
        .type = BALE_RECORD_ZERO,
        .layer = layer->id,
        .cluster = first,
        .count = count,
    };
    uint64_t address, value, old, live, c;
    bool appended;
    int ret = bale_store_write_begin(s);

    if (ret < 0) {
        return ret;
    }
    /* Each cluster that points at a zero record keeps it alive. */
    live = bale_value_live(bale_value(0, 0), s->cluster_size);
    if (BALE_PLANTED(zero_resurrected)) {
        r.layer++; /* a record that recovery takes for another layer's */
    }
    ret = image_append(s, &r, NULL, live * count, &address);
    appended = ret == 0;
    value = bale_value(address, 0);
    for (c = first; ret == 0 && c < first + count; c++) {
        ret = bale_layer_index_set(layer, c, value, &old);
        if (ret == 0 && old) {
            bale_layer_account_old(layer, c, old);
        } else if (ret < 0) {
            c--; /* this one does not point at it */
        }
    }
    if (ret < 0 && appended) {
        pthread_mutex_lock(&s->log_lock);
        bale_page_live_sub(s, address, live * (first + count - c));
        pthread_mutex_unlock(&s->log_lock);
    }
    stat_add(&s->stats.zero_records, 1);
    bale_store_write_end(s);
    return ret;
}

int bale_image_zero_clusters(BaleImage *image, uint64_t first, uint64_t count,
                             bool discard)
{
    uint64_t end = first + count;
    int ret = 0;

    while (ret == 0 && first < end) {
        uint64_t run = end;

        if (discard && !bale_image_has_backing(image)) {
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

void bale_image_set_record(BaleImage *image, const BaleImageRecord *record)
{
    BaleStore *s = image->store;

    pthread_mutex_lock(&s->log_lock);
    image->record = *record;
    pthread_mutex_unlock(&s->log_lock);
    __atomic_store_n(&image->size, record->size, __ATOMIC_RELEASE);
}

BaleImage *bale_image_new(BaleStore *s, const BaleImageRecord *record,
                          GError **errp)
{
    BaleImage *image = g_new0(BaleImage, 1);

    image->store = s;
    image->codec = record->codec;
    pthread_mutex_init(&image->range_lock, NULL);
    image->ranges_waiting_tail = &image->ranges_waiting;
    image->mutable_region = bale_mutable_new(image);
    image->top = bale_layer_new(s, record->layer, record->size);
    if (!image->mutable_region || !image->top) {
        g_set_error(errp, BALE_STORE_ERROR, BALE_STORE_ERROR_NO_MEMORY,
                    "no memory for an index of %" PRIu64 " bytes of image",
                    record->size);
        bale_image_free(image);
        return NULL;
    }
    bale_image_set_record(image, record);
    g_ptr_array_add(s->images, image);
    return image;
}

void bale_image_free(BaleImage *image)
{
    if (image) {
        bale_mutable_free(image->mutable_region);
        pthread_mutex_destroy(&image->range_lock);
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
    BaleIndexStats stats;

    bale_index_get_stats(image->top->index, &stats);
    memset(info, 0, sizeof(*info));
    pthread_mutex_lock(&s->log_lock);
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
    info->allocated_clusters = stats.keys;
    pthread_mutex_unlock(&s->log_lock);
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

BaleImage *bale_image_open(BaleStore *store, const char *name, GError **errp)
{
    BaleImage *found = NULL;

    name = name ? name : "";
    pthread_mutex_lock(&store->log_lock);
    for (guint i = 0; i < store->images->len && !found; i++) {
        BaleImage *image = g_ptr_array_index(store->images, i);

        if (!strcmp(name, image->record.name)) {
            found = image;
            found->openers++;
        }
    }
    pthread_mutex_unlock(&store->log_lock);
    if (!found) {
        g_set_error(errp, BALE_STORE_ERROR, BALE_STORE_ERROR_INVALID,
                    "no image '%s' in this store", name);
    }
    return found;
}

void bale_image_close(BaleImage *image)
{
    pthread_mutex_lock(&image->store->log_lock);
    g_assert(image->openers > 0);
    image->openers--;
    pthread_mutex_unlock(&image->store->log_lock);
}

/* Append @record; session_lock is held. */
int bale_image_record_append(BaleImage *image, const BaleImageRecord *record,
                             bool shrinks)
{
    BaleStore *s = image->store;
    g_autofree uint8_t *payload = g_malloc(BALE_IMAGE_PAYLOAD_MAX);
    BaleRecord r = {
        .type = BALE_RECORD_IMAGE,
        .layer = record->layer,
        .payload_len = bale_image_encode(record, payload),
    };
    uint64_t address, page, offset;
    int ret;

    ret = bale_log_append(s, BALE_BUCKET_META, &r, payload,
                          BALE_RECORD_HEADER_LEN, &address);
    if (ret < 0) {
        return ret;
    }
    pthread_mutex_lock(&s->log_lock);
    if (shrinks && bale_address_split(s, address, &page, &offset)) {
        BalePage *p = bale_page(s, page);

        p->tombstone_seq = MAX(p->tombstone_seq, r.seq);
    }
    if (image->record_address) {
        bale_page_live_sub(s, image->record_address, BALE_RECORD_HEADER_LEN);
    }
    image->record_address = address;
    pthread_mutex_unlock(&s->log_lock);
    return 0;
}

static bool image_error(GError **errp, int ret, const char *what)
{
    g_set_error(errp, BALE_STORE_ERROR,
                ret == -ENOSPC   ? BALE_STORE_ERROR_NO_SPACE
                : ret == -ENOMEM ? BALE_STORE_ERROR_NO_MEMORY
                : ret == -EROFS  ? BALE_STORE_ERROR_READ_ONLY
                                 : BALE_STORE_ERROR_IO,
                "%s: %s", what, g_strerror(-ret));
    return false;
}

/* Make @record the image's, durably. */
static bool image_change(BaleImage *image, const BaleImageRecord *record,
                         const char *what, GError **errp)
{
    BaleStore *s = image->store;
    bool shrinks = record->size < image->record.size;
    int ret = bale_store_flush_sync(s);

    if (ret < 0) {
        return image_error(errp, ret, what);
    }
    if (shrinks) {
        bale_mutable_discard(image->mutable_region, record->size,
                             image->record.size - record->size);
    }

    pthread_rwlock_wrlock(&s->session_lock);
    ret = bale_session_begin(s);
    if (ret == 0) {
        ret = bale_image_record_append(image, record, shrinks);
    }
    if (ret == 0 && shrinks) {
        bale_layer_clear_from(
            image->top, bale_size_clusters(record->size, s->cluster_size));
    }
    if (ret == 0) {
        ret = bale_layer_set_size(image->top, record->size);
    }
    if (ret == 0) {
        bale_image_set_record(image, record);
    }
    pthread_rwlock_unlock(&s->session_lock);
    if (ret == 0 && !BALE_PLANTED(resize_not_durable)) {
        ret = bale_log_flush_sync(s);
    }
    return ret == 0 || image_error(errp, ret, what);
}

bool bale_image_resize(BaleImage *image, uint64_t size, GError **errp)
{
    BaleStore *s = image->store;
    BaleImageRecord record = image->record;
    uint64_t old = record.size;
    uint64_t tail = bale_align_up(size, s->cluster_size);

    if (size > BALE_IMAGE_SIZE_MAX ||
        size / s->cluster_size >= BALE_IMAGE_CLUSTERS_MAX) {
        g_set_error(errp, BALE_STORE_ERROR, BALE_STORE_ERROR_INVALID,
                    "an image of %" PRIu64 " bytes is too large", size);
        return false;
    }
    if (size < old && tail > size) {
        /* Bytes behind the end of the last cluster must be zero. */
        int ret = bale_image_zero_sync(image, size, MIN(tail, old) - size, 0);

        if (ret < 0) {
            return image_error(errp, ret, "clearing the image's new end");
        }
    }
    record.size = size;
    return image_change(image, &record, "resizing the image", errp);
}

bool bale_image_set_backing(BaleImage *image, const char *backing_file,
                            const char *backing_format, GError **errp)
{
    BaleImageRecord record = image->record;

    backing_file = backing_file ? backing_file : "";
    backing_format = backing_format ? backing_format : "";
    if (strlen(backing_file) > BALE_BACKING_NAME_MAX ||
        strlen(backing_format) >= sizeof(record.backing_format)) {
        g_set_error(errp, BALE_STORE_ERROR, BALE_STORE_ERROR_INVALID,
                    "the backing file's name or format is too long");
        return false;
    }
    g_strlcpy(record.backing_file, backing_file, sizeof(record.backing_file));
    g_strlcpy(record.backing_format, backing_format,
              sizeof(record.backing_format));
    return image_change(image, &record, "changing the backing file", errp);
}

bool bale_image_clear(BaleImage *image, GError **errp)
{
    BaleStore *s = image->store;
    BaleRecord r = { .type = BALE_RECORD_DROP, .layer = image->top->id };
    uint64_t address;
    int ret = bale_store_flush_sync(s);

    if (ret < 0) {
        return image_error(errp, ret, "emptying the image");
    }
    pthread_rwlock_wrlock(&s->session_lock);
    ret = bale_session_begin(s);
    if (ret == 0) {
        ret = image_append(s, &r, NULL, 0, &address);
    }
    if (ret == 0) {
        bale_layer_clear_from(image->top, 0);
    }
    pthread_rwlock_unlock(&s->session_lock);
    if (ret == 0) {
        ret = bale_log_flush_sync(s);
    }
    return ret == 0 || image_error(errp, ret, "emptying the image");
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

    bale_image_write(image, offset, &iov, 1, flags, bale_sync_done, &sync);
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

    bale_store_flush(store, bale_sync_done, &sync);
    return bale_sync_wait(&sync);
}
