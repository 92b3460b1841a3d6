/*
 * Dirty bitmaps: their entries in the catalogue, and their bits, which are the
 * clusters of a layer that nothing else shows.  So they are compressed,
 * checksummed, compacted and recovered like all clusters.
 *
 * Invariants:
 *  1. The bits of a bitmap change only while its entry in the newest catalogue
 *     is durably in use; it stops being so after they were flushed.
 *  2. The layer is written in whole clusters only, so that there are never
 *     patches of it.
 *  3. No BaleImage shows the layer but for as long as one of these functions
 *     takes.
 *
 * Threads: admin_lock is held from the first look at the catalogue to the last
 * change of it, as in admin.c.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "store-internal.h"

#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "extstore/bitmap.h"
#include "util/memory.h"
#include "util/planted.h"

/* Bytes of bits that are moved at once; or a cluster, if that is more. */
#define BITMAP_STEP (1u << 20)

static bool bitmap_error(GError **errp, int ret, const char *what)
{
    return bale_admin_error(errp, ret, what,
                            "this store has no room for the names of so many "
                            "bitmaps");
}

static bool bitmap_invalid(GError **errp, const char *name, const char *why)
{
    g_set_error(errp, BALE_STORE_ERROR, BALE_STORE_ERROR_INVALID,
                "bitmap '%s': %s", name, why);
    return false;
}

void bale_bitmap_describe(const BaleCatalogue *cat, const BaleBitmapEntry *e,
                          char *name, size_t len)
{
    const BaleImageEntry *image = bale_catalogue_image(cat, e->image);

    g_snprintf(name, len, "%s bitmap %s", image ? image->name : "", e->name);
}

/* --- the catalogue --- */

void bale_bitmaps_spoil(BaleCatalogue *cat, uint32_t id)
{
    for (guint i = 0; i < cat->bitmaps->len; i++) {
        BaleBitmapEntry *e = &g_array_index(cat->bitmaps, BaleBitmapEntry,
                                            i);

        if (e->image == id) {
            e->in_use = true;
        }
    }
}

void bale_bitmaps_forget(BaleCatalogue *cat, uint32_t id)
{
    for (guint i = cat->bitmaps->len; i-- > 0;) {
        if (g_array_index(cat->bitmaps, BaleBitmapEntry, i).image == id) {
            g_array_remove_index(cat->bitmaps, i);
        }
    }
}

static void bitmap_drop(BaleCatalogue *cat, const BaleBitmapEntry *e)
{
    g_array_remove_index(cat->bitmaps,
                         e - (BaleBitmapEntry *)cat->bitmaps->data);
}

static bool bitmap_check_info(const BaleBitmapInfo *info, GError **errp)
{
    uint32_t bits = g_bit_nth_lsf(info->granularity, -1);

    if (!bale_bitmap_name_valid(info->name)) {
        return bitmap_invalid(errp, info->name, "a name has 1 to 1023 bytes "
                                                "of UTF-8");
    }
    if (info->granularity != UINT32_C(1) << (bits & 31) ||
        bits < BALE_BITMAP_GRANULARITY_MIN_BITS ||
        bits > BALE_BITMAP_GRANULARITY_MAX_BITS) {
        return bitmap_invalid(errp, info->name, "the granularity must be a "
                              "power of two from 512 bytes to 2 GiB");
    }
    if (info->size > BALE_IMAGE_SIZE_MAX ||
        bale_bitmap_data_len(info->size, info->granularity) >
            BALE_BITMAP_DATA_MAX) {
        return bitmap_invalid(errp, info->name, "it would be larger than "
                              "512 MiB; a larger granularity is needed");
    }
    return true;
}

/*
 * Put @info into @cat, in use and with a layer for its bits: the one that a
 * bitmap of that name has, if that is as long.
 */
static bool bitmap_put(BaleStore *s, BaleCatalogue *cat, uint32_t image,
                       const BaleBitmapInfo *info, GError **errp)
{
    BaleBitmapEntry *old = bale_catalogue_bitmap(cat, image, info->name);
    BaleLayerEntry layer = { .id = cat->next_layer, .generation = 1 };
    BaleBitmapEntry new = {
        .layer = layer.id,
        .image = image,
    };

    if (!bitmap_check_info(info, errp)) {
        return false;
    }
    layer.size = bale_align_up(
        bale_bitmap_data_len(info->size, info->granularity),
        s->cluster_size);
    if (old && bale_catalogue_layer(cat, old->layer)->size != layer.size) {
        bitmap_drop(cat, old);
        old = NULL;
    }
    if (!old) {
        if (cat->next_layer == UINT32_MAX) {
            return bitmap_invalid(errp, info->name, "this store has used up "
                                                    "its layers");
        }
        cat->next_layer++;
        g_array_append_val(cat->layers, layer);
        new.name = g_strdup(info->name);
        g_array_append_val(cat->bitmaps, new);
        old = &g_array_index(cat->bitmaps, BaleBitmapEntry,
                             cat->bitmaps->len - 1);
    }
    old->size = info->size;
    old->granularity = info->granularity;
    old->enabled = info->enabled;
    old->in_use = true;
    return true;
}

/* Do the bitmaps of @image stay below the maxima? */
static bool bitmaps_check_sum(const BaleCatalogue *cat, uint32_t image,
                              GError **errp)
{
    uint64_t n = 0, len = 0;

    for (guint i = 0; i < cat->bitmaps->len; i++) {
        BaleBitmapEntry *e = &g_array_index(cat->bitmaps, BaleBitmapEntry,
                                            i);

        if (e->image == image) {
            len += bale_bitmap_data_len(e->size, e->granularity);
            n++;
        }
    }
    if (n > BALE_BITMAPS_MAX || len > BALE_BITMAPS_DATA_MAX) {
        g_set_error(errp, BALE_STORE_ERROR, BALE_STORE_ERROR_INVALID,
                    "an image can have %u bitmaps of 1 GiB in all",
                    BALE_BITMAPS_MAX);
        return false;
    }
    return true;
}

/* A copy of the catalogue with these bitmaps in it.  Under admin_lock. */
static BaleCatalogue *bitmaps_edit(BaleImage *image,
                                   const BaleBitmapSource *list, unsigned n,
                                   GError **errp)
{
    g_autoptr(BaleCatalogue) cat =
        bale_catalogue_copy(image->store->catalogue);
    bool ok = !image->snapshot;

    if (!ok) {
        g_set_error(errp, BALE_STORE_ERROR, BALE_STORE_ERROR_INVALID,
                    "a snapshot has no bitmaps");
    }
    for (unsigned i = 0; ok && i < n; i++) {
        ok = bitmap_put(image->store, cat, image->id, &list[i].info, errp);
    }
    if (!ok || !bitmaps_check_sum(cat, image->id, errp)) {
        return NULL;
    }
    bale_catalogue_collect(cat);
    return g_steal_pointer(&cat);
}

GArray *bale_bitmap_list(BaleStore *s, const char *name, GError **errp)
{
    bool snapshot = name && strchr(name, '@');
    BaleImageEntry *image;
    GArray *list = NULL;

    pthread_mutex_lock(&s->admin_lock);
    image = bale_catalogue_image_named(s->catalogue, name ? name : "");
    if (image || snapshot) {
        list = g_array_new(FALSE, TRUE, sizeof(BaleBitmapInfo));
        g_array_set_clear_func(list, bale_bitmap_info_clear);
    } else {
        g_set_error(errp, BALE_STORE_ERROR, BALE_STORE_ERROR_INVALID,
                    "no image '%s' in this store", name ? name : "");
    }
    for (guint i = 0; image && i < s->catalogue->bitmaps->len; i++) {
        BaleBitmapEntry *e = &g_array_index(s->catalogue->bitmaps,
                                            BaleBitmapEntry, i);
        BaleBitmapInfo info = {
            .size = e->size,
            .granularity = e->granularity,
            .enabled = e->enabled,
            .in_use = e->in_use,
        };

        if (e->image == image->id) {
            info.name = g_strdup(e->name);
            g_array_append_val(list, info);
        }
    }
    pthread_mutex_unlock(&s->admin_lock);
    return list;
}

void bale_bitmap_info_clear(void *info)
{
    g_free(((BaleBitmapInfo *)info)->name);
}

bool bale_bitmaps_check(BaleImage *image, const BaleBitmapInfo *list,
                        unsigned n, GError **errp)
{
    g_autofree BaleBitmapSource *sources = g_new0(BaleBitmapSource, n + 1);
    g_autoptr(BaleCatalogue) cat = NULL;
    g_autofree uint8_t *payload = NULL;
    uint8_t type;
    uint32_t len;

    for (unsigned i = 0; i < n; i++) {
        sources[i].info = list[i];
    }
    pthread_mutex_lock(&image->store->admin_lock);
    cat = bitmaps_edit(image, sources, n, errp);
    pthread_mutex_unlock(&image->store->admin_lock);
    if (!cat) {
        return false;
    }
    payload = bale_catalogue_encode(cat, &type, &len);
    return payload || bitmap_error(errp, -EFBIG, "storing bitmaps");
}

bool bale_bitmaps_begin_use(BaleImage *image, GError **errp)
{
    BaleStore *s = image->store;
    BaleCatalogue *cat;
    bool change = false;
    int ret = 0;

    pthread_mutex_lock(&s->admin_lock);
    for (guint i = 0; !image->snapshot && i < s->catalogue->bitmaps->len;
         i++) {
        BaleBitmapEntry *e = &g_array_index(s->catalogue->bitmaps,
                                            BaleBitmapEntry, i);

        change = change || (e->image == image->id && !e->in_use);
    }
    if (change && !BALE_PLANTED(bitmap_not_marked)) {
        cat = bale_catalogue_copy(s->catalogue);
        bale_bitmaps_spoil(cat, image->id);
        ret = bale_catalogue_commit(s, cat);
    }
    pthread_mutex_unlock(&s->admin_lock);
    return ret == 0 || bitmap_error(errp, ret, "marking the bitmaps as in "
                                               "use");
}

/* --- the bits --- */

/* An image that shows the layer of @e.  Under admin_lock. */
static BaleImage *bits_open(BaleStore *s, const BaleBitmapEntry *e,
                            GError **errp)
{
    BaleLayer *layer = bale_layer_get(s, e->layer);
    BaleImageEntry *owner = bale_catalogue_image(s->catalogue, e->image);
    BaleImage *bits = bale_image_new(s, layer, errp);

    if (bits) {
        bits->own_only = true;
        bits->codec = owner->codec;
        bits->level = owner->level;
        __atomic_add_fetch(&layer->refs, 1, __ATOMIC_RELAXED);
        bale_bitmap_describe(s->catalogue, e, bits->record.name,
                             sizeof(bits->record.name));
    }
    return bits;
}

static void bits_close(BaleImage *bits)
{
    /* Its requests have ended, and so has read-ahead. */
    bale_store_quiesce(bits->store);
    bale_layer_unref_later(bits->top);
    bale_image_free(bits);
}

/* Write one bitmap's bits; zeroes take no space. */
static int bits_write(BaleImage *bits, const BaleBitmapSource *source,
                      uint8_t *buf, uint32_t step)
{
    uint64_t end = bale_image_size(bits);
    uint64_t len = bale_bitmap_data_len(source->info.size,
                                        source->info.granularity);
    int ret = 0;

    for (uint64_t pos = 0; ret == 0 && pos < end; pos += step) {
        uint32_t n = MIN(step, end - pos);
        uint32_t given = MIN(n, len - pos);

        memset(buf + given, 0, n - given);
        source->give(source->opaque, pos, buf, given);
        if (bale_memory_is_zero(buf, n)) {
            ret = bale_image_zero_sync(bits, pos, n, BALE_DISCARD);
        } else {
            ret = bale_image_write_sync(bits, pos, buf, n, 0);
        }
    }
    return ret;
}

/* The durable catalogue says that they are in use.  Under admin_lock. */
static bool bits_write_all(BaleImage *image, const BaleBitmapSource *list,
                           unsigned n, GError **errp)
{
    BaleStore *s = image->store;
    uint32_t step = MAX(BITMAP_STEP, s->cluster_size);
    uint8_t *buf = bale_memory_try_alloc(BALE_BLOCK_SIZE, step);
    bool ok = true;
    int ret = buf ? 0 : -ENOMEM;

    for (unsigned i = 0; ret == 0 && i < n; i++) {
        BaleBitmapEntry *e = bale_catalogue_bitmap(s->catalogue, image->id,
                                                   list[i].info.name);
        BaleImage *bits = bits_open(s, e, errp);

        if (!bits) {
            ok = false;
            break;
        }
        ret = bits_write(bits, &list[i], buf, step);
        bits_close(bits);
    }
    bale_memory_free(buf);
    if (ok && ret == 0 && !BALE_PLANTED(bitmap_not_flushed)) {
        ret = bale_log_flush_sync(s);
    }
    return ok && (ret == 0 || bitmap_error(errp, ret, "storing bitmaps"));
}

bool bale_bitmaps_store(BaleImage *image, const BaleBitmapSource *list,
                        unsigned n, GError **errp)
{
    BaleStore *s = image->store;
    BaleCatalogue *cat;
    bool ok = false;
    int ret;

    if (n == 0) {
        return true;
    }
    pthread_mutex_lock(&s->admin_lock);
    cat = bitmaps_edit(image, list, n, errp);
    if (!cat) {
        goto out;
    }
    ret = bale_catalogue_commit(s, cat);
    if (ret < 0) {
        bitmap_error(errp, ret, "storing bitmaps");
        goto out;
    }
    if (!bits_write_all(image, list, n, errp)) {
        goto out;
    }
    cat = bale_catalogue_copy(s->catalogue);
    for (unsigned i = 0; i < n; i++) {
        bale_catalogue_bitmap(cat, image->id, list[i].info.name)->in_use =
            false;
    }
    ret = bale_catalogue_commit(s, cat);
    ok = ret == 0 || bitmap_error(errp, ret, "storing bitmaps");
out:
    pthread_mutex_unlock(&s->admin_lock);
    return ok;
}

bool bale_bitmap_load(BaleImage *image, const char *name,
                      BaleBitmapBits *take, void *opaque, GError **errp)
{
    BaleStore *s = image->store;
    uint32_t step = MAX(BITMAP_STEP, s->cluster_size);
    uint8_t *buf = bale_memory_try_alloc(BALE_BLOCK_SIZE, step);
    BaleImage *bits = NULL;
    BaleBitmapEntry *e;
    uint64_t len = 0;
    int ret = buf ? 0 : -ENOMEM;

    pthread_mutex_lock(&s->admin_lock);
    e = bale_catalogue_bitmap(s->catalogue, image->id, name);
    if (!e) {
        bitmap_invalid(errp, name, "there is none");
        goto out;
    }
    len = bale_bitmap_data_len(e->size, e->granularity);
    bits = bits_open(s, e, errp);
    if (!bits) {
        goto out;
    }
    for (uint64_t pos = 0; ret == 0 && pos < len; pos += step) {
        uint32_t n = MIN(step, len - pos);

        ret = bale_image_read_sync(bits, pos, buf, n);
        if (ret == 0) {
            take(opaque, pos, buf, n);
        }
    }
    bits_close(bits);
    if (ret < 0) {
        bitmap_error(errp, ret, "reading a bitmap");
    }
out:
    pthread_mutex_unlock(&s->admin_lock);
    bale_memory_free(buf);
    return bits && ret == 0;
}

bool bale_bitmap_remove(BaleImage *image, const char *name, GError **errp)
{
    BaleStore *s = image->store;
    BaleCatalogue *cat;
    BaleBitmapEntry *e;
    int ret;

    pthread_mutex_lock(&s->admin_lock);
    cat = bale_catalogue_copy(s->catalogue);
    e = bale_catalogue_bitmap(cat, image->id, name);
    if (!e || image->snapshot) {
        pthread_mutex_unlock(&s->admin_lock);
        bale_catalogue_free(cat);
        return bitmap_invalid(errp, name, "there is none");
    }
    bitmap_drop(cat, e);
    bale_catalogue_collect(cat);
    ret = bale_catalogue_commit(s, cat);
    pthread_mutex_unlock(&s->admin_lock);
    return ret == 0 || bitmap_error(errp, ret, "removing a bitmap");
}
