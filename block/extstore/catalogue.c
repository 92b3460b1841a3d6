/*
 * The store's catalogue: which images, snapshots and layers there are, and how
 * that changes.
 *
 * A change is made on a copy of the catalogue, which is appended to the log as
 * one record, so that it is atomic; then the layers in memory follow.
 *
 * Invariants:
 *  1. A layer that is not the top of an image never changes what it shows.
 *  2. Ids of layers are never used twice, so a record of a layer that is gone
 *     is garbage, whatever survives of it.
 *  3. A layer is merged only into its only child.  All records of a child are
 *     younger than all of its parent's, as the parent was frozen before the
 *     child was made and copies keep their sequence; so recovery, which applies
 *     records in that order, needs no more than the alias to do the same.
 *  4. Readers walk from layer to layer without a lock.  layers_seq is odd while
 *     pointers between layers change; a walk that meets a change begins anew.
 *
 * Threads: the catalogue changes under admin_lock, session_lock (for writing)
 * and log_lock; who holds one of them may read it.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "store-internal.h"

#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "util/planted.h"

/* --- the record --- */

int bale_catalogue_append(BaleStore *s, const BaleCatalogue *cat,
                          bool shrinks)
{
    BaleRecord r = { .layer = 0 };
    g_autofree uint8_t *payload =
        bale_catalogue_encode(cat, &r.type, &r.payload_len);
    uint64_t address, page, offset;
    int ret;

    if (!payload) {
        return -EFBIG;
    }
    {
        g_autoptr(BaleCatalogue) read = NULL;

        /* What could not be read again must never get to the device.  It may
         * come of a catalogue that somebody forged to be at some limit. */
        ret = bale_catalogue_decode(&read, r.type, s->cluster_size, payload,
                                    r.payload_len);
        if (ret < 0) {
            return ret;
        }
    }
    r.layer = r.type == BALE_RECORD_IMAGE ? 1 : 0;
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
    if (s->catalogue_address) {
        bale_page_live_sub(s, s->catalogue_address, BALE_RECORD_HEADER_LEN);
    }
    s->catalogue_address = address;
    pthread_mutex_unlock(&s->log_lock);
    return 0;
}

/* --- what nobody needs any more --- */

/* Merge @layer, which has one child and nothing that names it, into that. */
static void collect_merge(BaleCatalogue *cat, const BaleLayerEntry *layer,
                          BaleLayerEntry *child)
{
    BaleAliasEntry alias = { layer->id, child->id, child->parent_clusters };
    guint at = 0;

    for (guint i = 0; i < cat->aliases->len; i++) {
        BaleAliasEntry *e = &g_array_index(cat->aliases, BaleAliasEntry, i);

        if (e->layer == layer->id) {
            e->layer = child->id;
            e->clusters = MIN(e->clusters, alias.clusters);
        }
        at += e->id < alias.id;
    }
    if (!BALE_PLANTED(alias_forgotten)) {
        g_array_insert_val(cat->aliases, at, alias);
    }
    child->parent = layer->parent;
    child->parent_clusters = MIN(child->parent_clusters,
                                 layer->parent_clusters);
}

static void collect_remove(BaleCatalogue *cat, guint at)
{
    uint32_t id = g_array_index(cat->layers, BaleLayerEntry, at).id;

    for (guint i = cat->aliases->len; i-- > 0;) {
        if (g_array_index(cat->aliases, BaleAliasEntry, i).layer == id) {
            g_array_remove_index(cat->aliases, i);
        }
    }
    if (BALE_PLANTED(deleted_layer_resurrected) && id + 1 == cat->next_layer) {
        cat->next_layer--;
    }
    g_array_remove_index(cat->layers, at);
}

/* Is @layer the top of an image, or a snapshot's, or a bitmap's? */
static bool layer_named(const BaleCatalogue *cat, uint32_t id)
{
    for (guint i = 0; i < cat->images->len; i++) {
        if (g_array_index(cat->images, BaleImageEntry, i).layer == id) {
            return true;
        }
    }
    for (guint i = 0; i < cat->snapshots->len; i++) {
        if (g_array_index(cat->snapshots, BaleSnapshotEntry, i).layer == id) {
            return true;
        }
    }
    for (guint i = 0; i < cat->bitmaps->len; i++) {
        if (g_array_index(cat->bitmaps, BaleBitmapEntry, i).layer == id) {
            return true;
        }
    }
    return false;
}

void bale_catalogue_collect(BaleCatalogue *cat)
{
    /* Children have higher ids: each layer is looked at after them. */
    for (guint i = cat->layers->len; i-- > 0;) {
        BaleLayerEntry *layer =
            &g_array_index(cat->layers, BaleLayerEntry, i);
        BaleLayerEntry *child = NULL;
        unsigned children = 0;

        if (layer_named(cat, layer->id)) {
            continue;
        }
        for (guint n = i + 1; n < cat->layers->len; n++) {
            BaleLayerEntry *e = &g_array_index(cat->layers, BaleLayerEntry,
                                               n);

            if (e->parent == layer->id) {
                children++;
                child = e;
            }
        }
        if (children == 1 ||
            (children && BALE_PLANTED(shared_layer_merged))) {
            collect_merge(cat, layer, child);
            g_array_remove_index(cat->layers, i);
        } else if (children == 0) {
            collect_remove(cat, i);
        }
    }
}

/* --- making the layers in memory follow --- */

typedef struct Change {
    BaleStore *s;
    const BaleCatalogue *next;
    GPtrArray *made;   /* BaleLayer, not yet the store's */
    GPtrArray *merged; /* BaleLayer; into ->target, below ->target_clusters */
    BaleLayer *merging;
    bool undo;
} Change;

static BaleLayer *change_layer(Change *c, uint32_t id)
{
    BaleLayer *layer = bale_layer_get(c->s, id);

    for (guint i = 0; !layer && i < c->made->len; i++) {
        BaleLayer *made = g_ptr_array_index(c->made, i);

        layer = made->id == id ? made : NULL;
    }
    return layer;
}

/* A younger record of the child hides this one. */
static bool change_merge_entry(uint64_t cluster, uint64_t value, void *opaque)
{
    Change *c = opaque;
    BaleLayer *target = c->merging->target;

    if (cluster >= c->merging->target_clusters) {
        return true;
    }
    return bale_layer_index_adopt(target, cluster, value, c->undo) == 0;
}

static int change_merge(Change *c, BaleLayer *layer, bool undo)
{
    c->merging = layer;
    c->undo = undo;
    return bale_index_foreach(layer->index, change_merge_entry, c) ? 0
                                                                   : -ENOMEM;
}

static void change_undo(Change *c)
{
    for (guint i = 0; i < c->merged->len; i++) {
        change_merge(c, g_ptr_array_index(c->merged, i), true);
    }
    for (guint i = 0; i < c->made->len; i++) {
        bale_layer_free(g_ptr_array_index(c->made, i));
    }
}

static void change_free(Change *c)
{
    g_ptr_array_free(c->made, TRUE);
    g_ptr_array_free(c->merged, TRUE);
}

/* A request may still ask for what a smaller layer does not have. */
static int change_reserve_images(Change *c, BaleLayer *layer)
{
    int ret = 0;

    for (guint i = 0; ret == 0 && i < c->s->images->len; i++) {
        BaleImage *image = g_ptr_array_index(c->s->images, i);
        BaleImageEntry *e = bale_catalogue_image(c->next, image->id);

        if (e && e->layer == layer->id) {
            ret = bale_layer_reserve(layer, MAX(layer->size, image->size));
        }
    }
    return ret;
}

/*
 * Everything that may fail.  What images show stays the same: a layer that is
 * merged gives its child what that showed already.
 */
static int change_prepare(Change *c)
{
    int ret = 0;

    for (guint i = 0; ret == 0 && i < c->next->layers->len; i++) {
        BaleLayerEntry *e = &g_array_index(c->next->layers, BaleLayerEntry,
                                           i);
        BaleLayer *layer = bale_layer_get(c->s, e->id);

        if (layer) {
            ret = bale_layer_reserve(layer, e->size);
            continue;
        }
        layer = bale_layer_new(c->s, e->id, e->size);
        if (layer) {
            g_ptr_array_add(c->made, layer);
            ret = change_reserve_images(c, layer);
        } else {
            ret = -ENOMEM;
        }
    }
    /* The youngest first: what is there already stays. */
    for (guint i = c->next->aliases->len; ret == 0 && i-- > 0;) {
        BaleAliasEntry *e = &g_array_index(c->next->aliases, BaleAliasEntry,
                                           i);
        BaleLayer *layer = bale_layer_get(c->s, e->id);

        if (layer) {
            layer->target = change_layer(c, e->layer);
            layer->target_clusters = e->clusters;
            g_ptr_array_add(c->merged, layer);
            ret = change_merge(c, layer, false);
        }
    }
    if (ret < 0) {
        change_undo(c);
    }
    return ret;
}

/* Point images and layers at each other as the catalogue says. */
static void change_link(Change *c)
{
    BaleStore *s = c->s;

    __atomic_add_fetch(&s->layers_seq, 1, __ATOMIC_SEQ_CST);
    for (guint i = 0; i < c->next->layers->len; i++) {
        BaleLayerEntry *e = &g_array_index(c->next->layers, BaleLayerEntry,
                                           i);
        BaleLayer *layer = bale_layer_get(s, e->id);
        BaleLayer *parent = e->parent ? bale_layer_get(s, e->parent) : NULL;

        __atomic_store_n(&layer->parent, parent, __ATOMIC_RELEASE);
        __atomic_store_n(&layer->parent_clusters, e->parent_clusters,
                         __ATOMIC_RELEASE);
        layer->generation = e->generation;
    }
    for (guint i = 0; i < s->images->len; i++) {
        bale_image_follow(g_ptr_array_index(s->images, i), c->next);
    }
    __atomic_add_fetch(&s->layers_seq, 1, __ATOMIC_SEQ_CST);
}

/* What is gone is garbage, but for what a child has adopted. */
static bool change_gone_entry(uint64_t cluster, uint64_t value, void *opaque)
{
    BaleLayer *layer = opaque;

    if (!layer->target || cluster >= layer->target_clusters ||
        bale_layer_find(layer->target, cluster) != value) {
        bale_layer_account_old(layer, cluster, value);
    }
    return true;
}

static void change_publish(Change *c, BaleCatalogue *next)
{
    BaleStore *s = c->s;
    g_autoptr(GPtrArray) gone = g_ptr_array_new();
    BaleCatalogue *old = s->catalogue;
    GHashTableIter iter;
    void *value;

    pthread_mutex_lock(&s->log_lock);
    for (guint i = 0; i < c->made->len; i++) {
        BaleLayer *layer = g_ptr_array_index(c->made, i);

        g_hash_table_insert(s->layers, GUINT_TO_POINTER(layer->id), layer);
    }
    s->catalogue = next;
    change_link(c);
    g_hash_table_iter_init(&iter, s->layers);
    while (g_hash_table_iter_next(&iter, NULL, &value)) {
        if (!bale_catalogue_layer(next, ((BaleLayer *)value)->id)) {
            g_ptr_array_add(gone, value);
            g_hash_table_iter_steal(&iter);
        }
    }
    pthread_mutex_unlock(&s->log_lock);

    for (guint i = 0; i < gone->len; i++) {
        BaleLayer *layer = g_ptr_array_index(gone, i);

        __atomic_store_n(&layer->gone, true, __ATOMIC_RELEASE);
        if (s->session) {
            bale_index_foreach(layer->index, change_gone_entry, layer);
        }
        bale_layer_unref_later(layer);
    }
    for (guint i = 0; i < next->layers->len; i++) {
        BaleLayerEntry *e = &g_array_index(next->layers, BaleLayerEntry, i);
        BaleLayer *layer = bale_layer_get(s, e->id);

        if (e->size < layer->size) {
            bale_layer_clear_from(layer, bale_size_clusters(
                                             e->size, s->cluster_size));
        }
        layer->size = e->size;
    }
    bale_catalogue_free(old);
    bale_epoch_poll(s->epoch);
}

static void change_init(Change *c, BaleStore *s, const BaleCatalogue *next)
{
    *c = (Change){ .s = s, .next = next };
    c->made = g_ptr_array_new();
    c->merged = g_ptr_array_new();
}

int bale_catalogue_install(BaleStore *s, BaleCatalogue *next)
{
    Change c;
    int ret;

    change_init(&c, s, next);
    ret = change_prepare(&c);
    if (ret == 0) {
        change_publish(&c, next);
    } else {
        bale_catalogue_free(next);
    }
    change_free(&c);
    return ret;
}

static bool change_shrinks(BaleStore *s, const BaleCatalogue *next)
{
    for (guint i = 0; i < next->layers->len; i++) {
        BaleLayerEntry *e = &g_array_index(next->layers, BaleLayerEntry, i);
        BaleLayer *layer = bale_layer_get(s, e->id);

        if (layer && e->size < layer->size) {
            return true;
        }
    }
    return false;
}

/* One attempt; *@next is NULL if it is the store's now. */
static int commit_once(BaleStore *s, BaleCatalogue **next)
{
    Change c;
    int ret;

    change_init(&c, s, *next);
    pthread_rwlock_wrlock(&s->session_lock);
    ret = bale_session_begin(s);
    if (ret == 0) {
        ret = change_prepare(&c);
        if (ret == 0) {
            ret = bale_catalogue_append(s, *next, change_shrinks(s, *next));
            if (ret < 0) {
                change_undo(&c);
            }
        }
    }
    if (ret == 0) {
        change_publish(&c, g_steal_pointer(next));
    }
    pthread_rwlock_unlock(&s->session_lock);
    change_free(&c);
    return ret;
}

int bale_catalogue_commit(BaleStore *s, BaleCatalogue *next)
{
    bool flush = !BALE_PLANTED(resize_not_durable) &&
                 !(BALE_PLANTED(snapshot_not_durable) &&
                   next->next_snapshot != s->catalogue->next_snapshot);
    BaleSpaceWait wait = { 0 };
    int ret;

    do {
        ret = commit_once(s, &next);
    } while (bale_maintain_try_again(s, &wait, &ret));
    bale_catalogue_free(next);
    if (ret == 0 && flush) {
        ret = bale_log_flush_sync(s);
    }
    return ret;
}
