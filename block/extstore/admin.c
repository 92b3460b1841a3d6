/*
 * What is done to images and snapshots as a whole.
 *
 * Each change edits a copy of the catalogue and commits that (catalogue.c),
 * under admin_lock, so that one happens after the other.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "store-internal.h"

#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "util/memory.h"

/* Bytes that flattening copies with one request. */
#define FLATTEN_STEP (4u << 20)
/* How often flattening looks again because the image changed under it. */
#define FLATTEN_ROUNDS_MAX 8

/*
 * Until the end of the block no patch is appended: after a write-out nothing of
 * the layers is in patches, so that one can be frozen, cut or replaced.
 */
static BaleStore *patches_paused(BaleStore *s)
{
    bale_patches_pause(s);
    return s;
}

static void patches_resumed(BaleStore **s)
{
    bale_patches_resume(*s);
}

#define PATCHES_PAUSED(s)                                                    \
    __attribute__((cleanup(patches_resumed), unused)) BaleStore *paused_ =   \
        patches_paused(s)

bool bale_admin_error(GError **errp, int ret, const char *what,
                      const char *too_many)
{
    if (ret != -EFBIG) {
        return bale_error_set(errp, ret, what);
    }
    g_set_error(errp, BALE_STORE_ERROR, BALE_STORE_ERROR_INVALID, "%s: %s",
                what, too_many);
    return false;
}

static bool admin_error(GError **errp, int ret, const char *what)
{
    return bale_admin_error(errp, ret, what,
                            "there are too many images, snapshots or layers "
                            "in this store");
}

static bool admin_invalid(GError **errp, const char *fmt, ...)
    G_GNUC_PRINTF(2, 3);

static bool admin_invalid(GError **errp, const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    if (errp) {
        *errp = g_error_new_valist(BALE_STORE_ERROR, BALE_STORE_ERROR_INVALID,
                                   fmt, ap);
    }
    va_end(ap);
    return false;
}

/* --- a change of the catalogue --- */

/* A copy of the catalogue to edit; takes admin_lock. */
static BaleCatalogue *edit_begin(BaleStore *s)
{
    pthread_mutex_lock(&s->admin_lock);
    return bale_catalogue_copy(s->catalogue);
}

/* Make @cat, which is taken over, the store's; gives admin_lock back. */
static bool edit_commit(BaleStore *s, BaleCatalogue *cat, const char *what,
                        GError **errp)
{
    int ret = bale_catalogue_commit(s, cat);

    pthread_mutex_unlock(&s->admin_lock);
    return ret == 0 || admin_error(errp, ret, what);
}

/* Nothing was changed; gives admin_lock back. */
static bool edit_drop(BaleStore *s, BaleCatalogue *cat)
{
    pthread_mutex_unlock(&s->admin_lock);
    bale_catalogue_free(cat);
    return false;
}

static BaleImageEntry *edit_image(BaleCatalogue *cat, const char *name,
                                  GError **errp)
{
    BaleImageEntry *e = bale_catalogue_image_named(cat, name ? name : "");

    if (!e && name && *name) {
        admin_invalid(errp, "no image '%s' in this store", name);
    } else if (!e) {
        admin_invalid(errp, "there is no unnamed image in this store: an "
                      "image must be named");
    }
    return e;
}

/*
 * Begin to edit image @name of *@cat when all that it was given is in records:
 * its layer is about to be frozen, or left.  NULL: nothing has begun.
 */
static BaleImageEntry *edit_begin_written(BaleStore *s, BaleCatalogue **cat,
                                          const char *name, GError **errp)
{
    int ret = s->read_only ? 0 : bale_store_write_out_sync(s);
    BaleImageEntry *e;

    if (ret < 0) {
        admin_error(errp, ret, "flushing the store");
        return NULL;
    }
    *cat = edit_begin(s);
    e = edit_image(*cat, name, errp);
    if (!e) {
        edit_drop(s, *cat);
    }
    return e;
}

static BaleSnapshotEntry *edit_snapshot(BaleCatalogue *cat,
                                        const BaleImageEntry *image,
                                        const char *name, GError **errp)
{
    BaleSnapshotEntry *e = bale_catalogue_snapshot(cat, image->id, name);

    if (!e) {
        admin_invalid(errp, "image '%s' has no snapshot '%s'", image->name,
                      name);
    }
    return e;
}

static bool edit_check_new_name(BaleCatalogue *cat, const char *name,
                                GError **errp)
{
    if (*name && !bale_name_valid(name)) {
        return admin_invalid(errp, "an image cannot be called '%s': at most "
                             "%u bytes of UTF-8 without '@' and control "
                             "characters", name, BALE_IMAGE_NAME_MAX);
    }
    if (bale_catalogue_image_named(cat, name)) {
        return admin_invalid(errp, *name ? "image '%s' exists already"
                                         : "the unnamed image%s exists already",
                             name);
    }
    return true;
}

/* A new layer over @parent (0: over nothing). */
static bool edit_add_layer(BaleCatalogue *cat, uint32_t parent, uint64_t size,
                           uint32_t cluster_size, uint32_t *id, GError **errp)
{
    BaleLayerEntry layer = { .id = cat->next_layer, .parent = parent,
                             .generation = 1, .size = size };
    BaleLayerEntry *under;
    unsigned depth = 1;

    if (cat->next_layer == UINT32_MAX) {
        return admin_invalid(errp, "this store has used up its layers");
    }
    if (parent) {
        under = bale_catalogue_layer(cat, parent);
        if (under->generation == UINT32_MAX) {
            return admin_invalid(errp, "the image has used up its layers");
        }
        layer.generation = under->generation + 1;
        layer.parent_clusters =
            bale_size_clusters(MIN(size, under->size), cluster_size);
        for (; under; under = under->parent
                                  ? bale_catalogue_layer(cat, under->parent)
                                  : NULL) {
            depth++;
        }
    }
    if (depth > BALE_LAYER_DEPTH_MAX) {
        return admin_invalid(errp, "the image has %u layers already; delete "
                             "snapshots, or flatten it",
                             BALE_LAYER_DEPTH_MAX);
    }
    g_array_append_val(cat->layers, layer);
    cat->next_layer++;
    *id = layer.id;
    return true;
}

static bool edit_add_image(BaleCatalogue *cat, const BaleImageEntry *like,
                           const char *name, uint32_t layer, GError **errp)
{
    BaleImageEntry image = *like;

    if (cat->next_image == UINT32_MAX) {
        return admin_invalid(errp, "this store has used up its images");
    }
    image.id = cat->next_image++;
    image.layer = layer;
    image.read_only = false;
    image.date_s = g_get_real_time() / G_USEC_PER_SEC;
    image.name = g_strdup(name);
    image.backing_file = g_strdup(like->backing_file);
    image.backing_format = g_strdup(like->backing_format);
    g_array_append_val(cat->images, image);
    return true;
}

/* The image with @id as far as it was opened.  Under admin_lock. */
static BaleImage *admin_opened(BaleStore *s, uint32_t id, uint32_t snapshot)
{
    for (guint i = 0; i < s->images->len; i++) {
        BaleImage *image = g_ptr_array_index(s->images, i);

        if (image->id == id && image->snapshot == snapshot) {
            return image;
        }
    }
    return NULL;
}

static bool admin_check_closed(BaleStore *s, uint32_t id, uint32_t snapshot,
                               const char *name, GError **errp)
{
    BaleImage *image = admin_opened(s, id, snapshot);

    return !image || image->openers == 0 ||
           admin_invalid(errp, "'%s' is in use", name);
}

/* --- opening --- */

/* Under admin_lock. */
static BaleImage *open_image(BaleStore *s, uint32_t id, uint32_t snapshot,
                             uint32_t layer, GError **errp)
{
    BaleImage *image = admin_opened(s, id, snapshot);

    if (!image) {
        image = bale_image_new(s, bale_layer_get(s, layer), errp);
        if (!image) {
            return NULL;
        }
        image->id = id;
        image->snapshot = snapshot;
        pthread_mutex_lock(&s->log_lock);
        bale_image_follow(image, s->catalogue);
        g_ptr_array_add(s->images, image);
        pthread_mutex_unlock(&s->log_lock);
    }
    image->openers++;
    return image;
}

BaleImage *bale_image_open(BaleStore *s, const char *name, GError **errp)
{
    const char *at = name ? strrchr(name, '@') : NULL;
    g_autofree char *base = at ? g_strndup(name, at - name) : g_strdup(name);
    BaleSnapshotEntry *snapshot = NULL;
    BaleImage *image = NULL;
    BaleImageEntry *e;

    pthread_mutex_lock(&s->admin_lock);
    e = edit_image(s->catalogue, base, errp);
    if (e && at) {
        snapshot = edit_snapshot(s->catalogue, e, at + 1, errp);
    }
    if (e && (snapshot || !at)) {
        image = open_image(s, e->id, snapshot ? snapshot->id : 0,
                           snapshot ? snapshot->layer : e->layer, errp);
    }
    pthread_mutex_unlock(&s->admin_lock);
    return image;
}

void bale_image_close(BaleImage *image)
{
    pthread_mutex_lock(&image->store->admin_lock);
    g_assert(image->openers > 0);
    image->openers--;
    pthread_mutex_unlock(&image->store->admin_lock);
}

/* --- images --- */

bool bale_image_create(BaleStore *s, const BaleImageOptions *o, GError **errp)
{
    BaleImageEntry like = { .codec = o->codec, .level = o->level };
    const char *name = o->name ? o->name : "";
    BaleCreateOptions check = {
        .size = o->size,
        .cluster_size = s->cluster_size,
        .page_size = s->page_size,
        .codec = o->codec,
        .level = o->level,
        .backing_file = o->backing_file,
        .backing_format = o->backing_format,
    };
    BaleCatalogue *cat;
    uint32_t layer = 0;

    if (!bale_create_options_check(&check, errp)) {
        return false;
    }
    like.backing_file = (char *)(o->backing_file ? o->backing_file : "");
    like.backing_format = (char *)(o->backing_format ? o->backing_format
                                                     : "");
    cat = edit_begin(s);
    if (!edit_check_new_name(cat, name, errp) ||
        !edit_add_layer(cat, 0, o->size, s->cluster_size, &layer, errp) ||
        !edit_add_image(cat, &like, name, layer, errp)) {
        return edit_drop(s, cat);
    }
    return edit_commit(s, cat, "creating an image", errp);
}

/* Forget an open image's object; it has no openers.  Under admin_lock. */
static void admin_forget(BaleStore *s, BaleImage *image)
{
    bale_mutable_discard(image->mutable_region, 0,
                         bale_align_up(image->size, s->cluster_size));
    bale_store_quiesce(s);
    pthread_mutex_lock(&s->log_lock);
    for (guint i = 0; i < s->images->len; i++) {
        if (g_ptr_array_index(s->images, i) == image) {
            g_ptr_array_steal_index(s->images, i);
        }
    }
    g_ptr_array_add(s->old_images, image);
    pthread_mutex_unlock(&s->log_lock);
}

/*
 * Delete image @id by making @cat the store's.  What waits in the mutable
 * region goes with the image, or stays with it if the change fails.  Under
 * admin_lock.
 */
static int admin_commit_deletion(BaleStore *s, BaleCatalogue *cat, uint32_t id)
{
    g_autoptr(GPtrArray) held = g_ptr_array_new();
    int ret;

    for (guint i = 0; i < s->images->len; i++) {
        BaleImage *image = g_ptr_array_index(s->images, i);

        if (image->id == id) {
            bale_mutable_freeze(image->mutable_region);
            __atomic_add_fetch(&image->top->refs, 1, __ATOMIC_RELAXED);
            g_ptr_array_add(held, image);
        }
    }
    ret = bale_catalogue_commit(s, cat);
    for (guint i = 0; i < held->len; i++) {
        BaleImage *image = g_ptr_array_index(held, i);

        /* Also if only the flush has failed: the layer is gone. */
        if (!bale_catalogue_image(s->catalogue, id)) {
            admin_forget(s, image);
        }
        bale_mutable_thaw(image->mutable_region);
        bale_layer_unref_later(image->top);
    }
    return ret;
}

bool bale_image_delete(BaleStore *s, const char *name, GError **errp)
{
    BaleCatalogue *cat = edit_begin(s);
    BaleImageEntry *e = edit_image(cat, name, errp);
    uint32_t id;
    int ret;

    if (!e || !admin_check_closed(s, e->id, 0, e->name, errp)) {
        return edit_drop(s, cat);
    }
    if (e->read_only) {
        admin_invalid(errp, "image '%s' is read-only", e->name);
        return edit_drop(s, cat);
    }
    id = e->id;
    for (guint i = cat->snapshots->len; i-- > 0;) {
        BaleSnapshotEntry *snapshot =
            &g_array_index(cat->snapshots, BaleSnapshotEntry, i);

        if (snapshot->image == id) {
            if (!admin_check_closed(s, id, snapshot->id, snapshot->name,
                                    errp)) {
                return edit_drop(s, cat);
            }
            g_array_remove_index(cat->snapshots, i);
        }
    }
    g_array_remove_index(cat->images,
                         e - (BaleImageEntry *)cat->images->data);
    bale_bitmaps_forget(cat, id);
    bale_catalogue_collect(cat);
    ret = admin_commit_deletion(s, cat, id);
    pthread_mutex_unlock(&s->admin_lock);
    return ret == 0 || admin_error(errp, ret, "deleting an image");
}

bool bale_image_rename(BaleStore *s, const char *name, const char *new_name,
                       GError **errp)
{
    BaleCatalogue *cat = edit_begin(s);
    BaleImageEntry *e = edit_image(cat, name, errp);

    new_name = new_name ? new_name : "";
    if (!e || !edit_check_new_name(cat, new_name, errp)) {
        return edit_drop(s, cat);
    }
    g_free(e->name);
    e->name = g_strdup(new_name);
    return edit_commit(s, cat, "renaming an image", errp);
}

bool bale_image_set_read_only(BaleStore *s, const char *name, bool read_only,
                              GError **errp)
{
    PATCHES_PAUSED(s);
    BaleCatalogue *cat;
    BaleImageEntry *e = edit_begin_written(s, &cat, name, errp);

    if (!e) {
        return false;
    }
    e->read_only = read_only;
    return edit_commit(s, cat, "changing an image", errp);
}

/* Make @e's image begin a new layer over what it shows now. */
static bool edit_freeze(BaleStore *s, BaleCatalogue *cat, uint32_t image,
                        GError **errp)
{
    BaleImageEntry *e = bale_catalogue_image(cat, image);
    uint64_t size = bale_catalogue_layer(cat, e->layer)->size;
    uint32_t layer = 0;

    if (!edit_add_layer(cat, e->layer, size, s->cluster_size, &layer, errp)) {
        return false;
    }
    bale_catalogue_image(cat, image)->layer = layer;
    return true;
}

bool bale_image_clone(BaleStore *s, const char *name, const char *snapshot,
                      const char *new_name, GError **errp)
{
    PATCHES_PAUSED(s);
    BaleCatalogue *cat;
    BaleImageEntry *e = edit_begin_written(s, &cat, name, errp);
    BaleSnapshotEntry *from = NULL;
    uint32_t id, under, layer = 0;

    if (!e) {
        return false;
    }
    if (snapshot) {
        from = edit_snapshot(cat, e, snapshot, errp);
    }
    if ((snapshot && !from) ||
        !edit_check_new_name(cat, new_name ? new_name : "", errp)) {
        return edit_drop(s, cat);
    }
    id = e->id;
    under = from ? from->layer : e->layer;
    if ((!from && !edit_freeze(s, cat, id, errp)) ||
        !edit_add_layer(cat, under, bale_catalogue_layer(cat, under)->size,
                        s->cluster_size, &layer, errp) ||
        !edit_add_image(cat, bale_catalogue_image(cat, id),
                        new_name ? new_name : "", layer, errp)) {
        return edit_drop(s, cat);
    }
    return edit_commit(s, cat, "cloning an image", errp);
}

/* --- size, backing file, contents --- */

static bool image_name_changes(BaleImage *image, GError **errp)
{
    return !image->snapshot ||
           admin_invalid(errp, "a snapshot cannot be changed");
}

bool bale_image_resize(BaleImage *image, uint64_t size, GError **errp)
{
    BaleStore *s = image->store;
    PATCHES_PAUSED(s);
    uint64_t old = bale_image_size(image);
    uint64_t tail = bale_align_up(size, s->cluster_size);
    uint64_t clusters;
    BaleCatalogue *cat;
    BaleLayerEntry *layer;
    int ret = 0;

    if (size > BALE_IMAGE_SIZE_MAX ||
        size / s->cluster_size >= BALE_IMAGE_CLUSTERS_MAX) {
        return admin_invalid(errp, "an image of %" PRIu64 " bytes is too "
                             "large", size);
    }
    if (!image_name_changes(image, errp)) {
        return false;
    }
    if (size < old && tail > size) {
        /* Bytes behind the end of the last cluster must be zero. */
        ret = bale_image_zero_sync(image, size, MIN(tail, old) - size, 0);
    }
    if (ret == 0) {
        ret = bale_store_write_out_sync(s);
    }
    if (ret < 0) {
        return admin_error(errp, ret, "clearing the image's new end");
    }
    if (size < old) {
        bale_mutable_discard(image->mutable_region, size, old - size);
    }
    cat = edit_begin(s);
    layer = bale_catalogue_layer(cat,
                                 bale_catalogue_image(cat, image->id)->layer);
    layer->size = size;
    bale_bitmaps_spoil(cat, image->id);
    clusters = bale_size_clusters(size, s->cluster_size);
    layer->parent_clusters = MIN(layer->parent_clusters, clusters);
    for (guint i = 0; i < cat->aliases->len; i++) {
        BaleAliasEntry *e = &g_array_index(cat->aliases, BaleAliasEntry, i);

        if (e->layer == layer->id) {
            e->clusters = MIN(e->clusters, clusters);
        }
    }
    return edit_commit(s, cat, "resizing the image", errp);
}

bool bale_image_set_backing(BaleImage *image, const char *backing_file,
                            const char *backing_format, GError **errp)
{
    BaleStore *s = image->store;
    PATCHES_PAUSED(s);
    BaleCatalogue *cat;
    BaleImageEntry *e;
    int ret;

    backing_file = backing_file ? backing_file : "";
    backing_format = backing_format ? backing_format : "";
    if (strlen(backing_file) > BALE_BACKING_NAME_MAX ||
        strlen(backing_format) > 63 ||
        !g_utf8_validate(backing_file, -1, NULL) ||
        !g_utf8_validate(backing_format, -1, NULL)) {
        return admin_invalid(errp, "the backing file's name or format is too "
                             "long");
    }
    if (!image_name_changes(image, errp)) {
        return false;
    }
    ret = bale_store_write_out_sync(s);
    if (ret < 0) {
        return admin_error(errp, ret, "changing the backing file");
    }
    cat = edit_begin(s);
    e = bale_catalogue_image(cat, image->id);
    g_free(e->backing_file);
    g_free(e->backing_format);
    e->backing_file = g_strdup(backing_file);
    e->backing_format = g_strdup(backing_format);
    return edit_commit(s, cat, "changing the backing file", errp);
}

/* Drop all clusters of the only layer; one attempt. */
static int image_drop_once(BaleImage *image)
{
    BaleStore *s = image->store;
    BaleRecord r = { .type = BALE_RECORD_DROP };
    uint64_t address;
    int ret;

    pthread_rwlock_wrlock(&s->session_lock);
    ret = bale_session_begin(s);
    if (ret == 0) {
        r.layer = image->top->id;
        ret = bale_log_append(s, BALE_BUCKET_FRESH, &r, NULL, 0, &address);
        if (ret == -ENOSPC) {
            /* It frees space: it may use the reserve. */
            ret = bale_log_append(s, BALE_BUCKET_COMPACTED, &r, NULL, 0,
                                  &address);
        }
    }
    if (ret == 0) {
        bale_layer_clear_from(image->top, 0);
    }
    pthread_rwlock_unlock(&s->session_lock);
    return ret;
}

static int image_drop_all(BaleImage *image)
{
    BaleStore *s = image->store;
    BaleSpaceWait wait = { 0 };
    int ret;

    do {
        ret = image_drop_once(image);
    } while (bale_maintain_try_again(s, &wait, &ret));
    return ret == 0 ? bale_log_flush_sync(s) : ret;
}

/* Give the image a new layer over @under (0: nothing) in place of its top. */
static bool edit_replace_top(BaleStore *s, BaleCatalogue *cat, uint32_t image,
                             uint32_t under, uint64_t size, GError **errp)
{
    uint32_t layer = 0;

    if (!edit_add_layer(cat, under, size, s->cluster_size, &layer, errp)) {
        return false;
    }
    bale_catalogue_image(cat, image)->layer = layer;
    bale_bitmaps_spoil(cat, image);
    bale_catalogue_collect(cat);
    return true;
}

bool bale_image_clear(BaleImage *image, GError **errp)
{
    BaleStore *s = image->store;
    PATCHES_PAUSED(s);
    BaleCatalogue *cat;
    BaleLayerEntry *top;
    int ret;

    if (!image_name_changes(image, errp)) {
        return false;
    }
    ret = bale_store_write_out_sync(s);
    if (ret < 0) {
        return admin_error(errp, ret, "emptying the image");
    }
    cat = edit_begin(s);
    top = bale_catalogue_layer(cat,
                               bale_catalogue_image(cat, image->id)->layer);
    if (!top->parent) {
        edit_drop(s, cat);
        ret = image_drop_all(image);
        return ret == 0 || admin_error(errp, ret, "emptying the image");
    }
    if (!edit_replace_top(s, cat, image->id, 0, top->size, errp)) {
        return edit_drop(s, cat);
    }
    return edit_commit(s, cat, "emptying the image", errp);
}

/* --- snapshots --- */

bool bale_snapshot_create(BaleStore *s, const char *name,
                          const BaleSnapshotInfo *info, GError **errp)
{
    PATCHES_PAUSED(s);
    BaleSnapshotEntry snapshot = { .vm_clock_ns = info->vm_clock_ns };
    uint64_t now_us = g_get_real_time();
    BaleCatalogue *cat;
    BaleImageEntry *e;

    if (!bale_name_valid(info->name)) {
        return admin_invalid(errp, "a snapshot cannot be called '%s'",
                             info->name);
    }
    e = edit_begin_written(s, &cat, name, errp);
    if (!e) {
        return false;
    }
    for (guint i = 0; i < cat->snapshots->len; i++) {
        BaleSnapshotEntry *other =
            &g_array_index(cat->snapshots, BaleSnapshotEntry, i);

        if (other->image == e->id && !strcmp(other->name, info->name)) {
            admin_invalid(errp, "snapshot '%s' exists already", info->name);
            return edit_drop(s, cat);
        }
    }
    snapshot.image = e->id;
    if (cat->next_snapshot == UINT32_MAX) {
        admin_invalid(errp, "this store has used up its snapshots");
        return edit_drop(s, cat);
    }
    snapshot.id = cat->next_snapshot++;
    snapshot.layer = e->layer;
    snapshot.date_s = info->date_s ? info->date_s : now_us / G_USEC_PER_SEC;
    snapshot.date_ns = info->date_s ? info->date_ns
                                    : now_us % G_USEC_PER_SEC * 1000;
    snapshot.name = g_strdup(info->name);
    g_array_append_val(cat->snapshots, snapshot);
    if (!edit_freeze(s, cat, snapshot.image, errp)) {
        return edit_drop(s, cat);
    }
    return edit_commit(s, cat, "making a snapshot", errp);
}

bool bale_snapshot_delete(BaleStore *s, const char *name,
                          const char *snapshot, GError **errp)
{
    BaleCatalogue *cat = edit_begin(s);
    BaleImageEntry *e = edit_image(cat, name, errp);
    BaleSnapshotEntry *found =
        e ? edit_snapshot(cat, e, snapshot, errp) : NULL;
    BaleImage *image;

    if (!found ||
        !admin_check_closed(s, e->id, found->id, found->name, errp)) {
        return edit_drop(s, cat);
    }
    image = admin_opened(s, e->id, found->id);
    if (image) {
        admin_forget(s, image);
    }
    g_array_remove_index(cat->snapshots,
                         found - (BaleSnapshotEntry *)cat->snapshots->data);
    bale_catalogue_collect(cat);
    return edit_commit(s, cat, "deleting a snapshot", errp);
}

bool bale_snapshot_rollback(BaleStore *s, const char *name,
                            const char *snapshot, GError **errp)
{
    PATCHES_PAUSED(s);
    BaleCatalogue *cat;
    BaleImageEntry *e = edit_begin_written(s, &cat, name, errp);
    BaleSnapshotEntry *found;
    BaleImage *image;

    if (!e) {
        return false;
    }
    found = edit_snapshot(cat, e, snapshot, errp);
    if (found && e->read_only) {
        admin_invalid(errp, "image '%s' is read-only", e->name);
        found = NULL;
    }
    if (!found ||
        !edit_replace_top(s, cat, e->id, found->layer,
                          bale_catalogue_layer(cat, found->layer)->size,
                          errp)) {
        return edit_drop(s, cat);
    }
    image = admin_opened(s, e->id, 0);
    if (image) {
        bale_mutable_discard(image->mutable_region, 0,
                             bale_align_up(image->size, s->cluster_size));
    }
    return edit_commit(s, cat, "rolling an image back", errp);
}

/* --- flattening --- */

/* Copy what the top does not have; *@more: there was something to copy. */
static int flatten_copy(BaleImage *image, const BaleFlattenOptions *o,
                        bool *more, bool *stopped)
{
    BaleStore *s = image->store;
    uint64_t size = bale_image_size(image), pos = 0;
    int ret = 0;

    *more = false;
    while (ret == 0 && pos < size && !*stopped) {
        uint64_t end = MIN(size, pos + FLATTEN_STEP);
        uint64_t c = pos >> s->cluster_bits;
        bool copy = false;

        for (; c << s->cluster_bits < end && !copy; c++) {
            copy = bale_image_chunk_used(image, c) &&
                   !bale_image_find_top(image, c) &&
                   bale_image_find(image, c);
        }
        if (copy) {
            BaleSync sync = BALE_SYNC_INIT;

            *more = true;
            bale_image_copy_up(image, pos, end - pos, bale_sync_done, &sync);
            ret = bale_sync_wait(&sync);
        }
        pos = end;
        if (o && o->progress && !o->progress(o->opaque, pos, size)) {
            *stopped = true;
        }
    }
    return ret;
}

bool bale_image_flatten(BaleStore *s, const char *name,
                        const BaleFlattenOptions *o, GError **errp)
{
    PATCHES_PAUSED(s);
    BaleImage *image = bale_image_open(s, name, errp);
    bool more = true, stopped = false, ok = false, done = false;
    int ret = 0;

    if (!image) {
        return false;
    }
    if (image->snapshot) {
        admin_invalid(errp, "a snapshot cannot be changed");
        goto out;
    }
    for (int i = 0; i < FLATTEN_ROUNDS_MAX && !done && !stopped; i++) {
        uint32_t top = image->top->id;
        BaleCatalogue *cat;
        BaleLayerEntry *layer;

        ret = flatten_copy(image, o, &more, &stopped);
        if (ret == 0) {
            ret = bale_store_write_out_sync(s);
        }
        if (ret < 0) {
            admin_error(errp, ret, "flattening an image");
            goto out;
        }
        if (more || stopped) {
            continue;
        }
        cat = edit_begin(s);
        layer = bale_catalogue_layer(
            cat, bale_catalogue_image(cat, image->id)->layer);
        if (layer->id != top) {
            edit_drop(s, cat);
            continue;
        }
        layer->parent = 0;
        layer->parent_clusters = 0;
        bale_catalogue_collect(cat);
        done = true;
        ok = edit_commit(s, cat, "flattening an image", errp);
    }
    if (stopped) {
        ok = true;
    } else if (!done) {
        admin_invalid(errp, "the image changes faster than it can be "
                      "flattened");
    }
out:
    bale_image_close(image);
    return ok;
}

/* --- listing --- */

static void list_image_clear(void *entry)
{
    g_free(((BaleImageListEntry *)entry)->name);
}

static void list_snapshot_clear(void *entry)
{
    g_free(((BaleSnapshotListEntry *)entry)->name);
}

static bool list_count(uint64_t cluster, uint64_t value, void *opaque)
{
    BaleLayer *layer = opaque;

    layer->counted += bale_value_live(value, layer->store->cluster_size);
    return true;
}

/* Live bytes of a layer.  Under admin_lock. */
static uint64_t list_layer_bytes(BaleStore *s, uint32_t id)
{
    BaleLayer *layer = bale_layer_get(s, id);

    layer->counted = 0;
    bale_index_foreach(layer->index, list_count, layer);
    return layer->counted;
}

GArray *bale_image_list(BaleStore *s)
{
    GArray *list = g_array_new(FALSE, TRUE, sizeof(BaleImageListEntry));

    g_array_set_clear_func(list, list_image_clear);
    pthread_mutex_lock(&s->admin_lock);
    for (guint i = 0; i < s->catalogue->images->len; i++) {
        BaleImageEntry *e = &g_array_index(s->catalogue->images,
                                           BaleImageEntry, i);
        BaleLayerEntry *layer = bale_catalogue_layer(s->catalogue, e->layer);
        BaleImageListEntry entry = {
            .name = g_strdup(e->name),
            .id = e->id,
            .size = layer->size,
            .own_bytes = list_layer_bytes(s, e->layer),
            .read_only = e->read_only,
            .codec = e->codec,
            .level = e->level,
            .date_s = e->date_s,
        };

        for (; layer; layer = layer->parent
                                  ? bale_catalogue_layer(s->catalogue,
                                                         layer->parent)
                                  : NULL) {
            entry.layers++;
        }
        for (guint n = 0; n < s->catalogue->snapshots->len; n++) {
            entry.snapshots += g_array_index(s->catalogue->snapshots,
                                             BaleSnapshotEntry, n)
                                   .image == e->id;
        }
        g_array_append_val(list, entry);
    }
    pthread_mutex_unlock(&s->admin_lock);
    return list;
}

GArray *bale_snapshot_list(BaleStore *s, const char *name, GError **errp)
{
    GArray *list = NULL;
    BaleImageEntry *image;

    pthread_mutex_lock(&s->admin_lock);
    image = edit_image(s->catalogue, name, errp);
    if (image) {
        list = g_array_new(FALSE, TRUE, sizeof(BaleSnapshotListEntry));
        g_array_set_clear_func(list, list_snapshot_clear);
    }
    for (guint i = 0; image && i < s->catalogue->snapshots->len; i++) {
        BaleSnapshotEntry *e = &g_array_index(s->catalogue->snapshots,
                                              BaleSnapshotEntry, i);
        BaleSnapshotListEntry entry;

        if (e->image != image->id) {
            continue;
        }
        entry = (BaleSnapshotListEntry){
            .name = g_strdup(e->name),
            .id = e->id,
            .size = bale_catalogue_layer(s->catalogue, e->layer)->size,
            .own_bytes = list_layer_bytes(s, e->layer),
            .date_s = e->date_s,
            .date_ns = e->date_ns,
            .vm_clock_ns = e->vm_clock_ns,
        };
        g_array_append_val(list, entry);
    }
    pthread_mutex_unlock(&s->admin_lock);
    return list;
}
