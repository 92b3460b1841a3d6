/*
 * Layers: sets of clusters, each with an index from cluster to record.
 *
 * An image shows its top layer and, where that has nothing, the layer's
 * parent, and so on.  Only the top layer of an image changes; its parents are
 * frozen, and may lie under several images.
 *
 * Invariants:
 *  1. The index of a top layer is set only by whoever holds the cluster's
 *     range (request.c) or session_lock for writing; a compaction moves an
 *     entry of any layer, but only if that has not changed.
 *  2. Each entry of an index counts as live in the page that it points at.
 *  3. An index is exchanged as a whole when a layer outgrows it; whoever looks
 *     into one, or goes from a layer to its parent, does so inside the epoch or
 *     with session_lock.
 *  4. A parent's generation is lower than its child's, so that no walk ends
 *     where it began.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "patch-internal.h"

#include <errno.h>
#include <string.h>

#include "util/memory.h"
#include "util/planted.h"

BaleLayer *bale_layer_get(BaleStore *s, uint32_t id)
{
    return g_hash_table_lookup(s->layers, GUINT_TO_POINTER(id));
}

BaleLayer *bale_layer_of_record(BaleStore *s, uint32_t id, uint64_t *clusters)
{
    uint32_t now = bale_catalogue_resolve(s->catalogue, id, clusters);
    BaleLayer *layer = now ? bale_layer_get(s, now) : NULL;

    if (layer) {
        *clusters = MIN(*clusters, bale_layer_clusters(layer));
    }
    return layer;
}

/* --- looking up --- */

/* In the epoch. */
static uint64_t layer_find(BaleLayer *layer, uint64_t cluster)
{
    BaleIndex *index = __atomic_load_n(&layer->index, __ATOMIC_ACQUIRE);

    return bale_index_find(index, cluster);
}

uint64_t bale_layer_find(BaleLayer *layer, uint64_t cluster)
{
    BaleEpochToken token = bale_epoch_enter(layer->store->epoch);
    uint64_t value = layer_find(layer, cluster);

    bale_epoch_exit(layer->store->epoch, token);
    return value;
}

/* Where the group that has chunk @n is, or will be. */
static BaleChunk **layer_group(BaleLayer *layer, uint64_t n)
{
    BaleChunk **groups =
        __atomic_load_n(&layer->chunk_groups, __ATOMIC_ACQUIRE);

    return &groups[n / BALE_CHUNK_GROUP];
}

BaleChunk *bale_layer_chunk(BaleLayer *layer, uint64_t n)
{
    BaleChunk *group = __atomic_load_n(layer_group(layer, n),
                                       __ATOMIC_ACQUIRE);

    return group ? &group[n % BALE_CHUNK_GROUP] : NULL;
}

BaleChunk *bale_layer_chunk_make(BaleLayer *layer, uint64_t n)
{
    BaleChunk **where = layer_group(layer, n);
    BaleChunk *group = __atomic_load_n(where, __ATOMIC_ACQUIRE);

    if (!group) {
        BaleChunk *made = g_try_new0(BaleChunk, BALE_CHUNK_GROUP);

        if (!made) {
            return NULL;
        }
        if (__atomic_compare_exchange_n(where, &group, made, false,
                                        __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
            group = made;
        } else {
            g_free(made); /* somebody was faster */
        }
    }
    return &group[n % BALE_CHUNK_GROUP];
}

static bool chunk_used(const BaleChunk *chunk)
{
    return chunk && __atomic_load_n(&chunk->entries, __ATOMIC_RELAXED);
}

uint64_t bale_layer_next_chunk(BaleLayer *layer, uint64_t n)
{
    while (n < layer->chunks) {
        BaleChunk *chunk = bale_layer_chunk(layer, n);

        if (chunk_used(chunk)) {
            return n;
        }
        n = chunk ? n + 1 : (n | (BALE_CHUNK_GROUP - 1)) + 1;
    }
    return layer->chunks;
}

static bool layer_chunk_used(BaleLayer *layer, uint64_t cluster)
{
    return chunk_used(bale_layer_chunk(layer, cluster / BALE_CHUNK_CLUSTERS));
}

/*
 * The first layer of @image, from the top, that knows @cluster.  What was found
 * at the top is right in any case; below, pointers between layers may have
 * changed while we walked.  In the epoch.
 */
static uint64_t image_find(BaleImage *image, uint64_t cluster)
{
    BaleStore *s = image->store;
    BaleLayer *layer;
    uint64_t seq, value;

    do {
        seq = __atomic_load_n(&s->layers_seq, __ATOMIC_ACQUIRE);
        layer = __atomic_load_n(&image->top, __ATOMIC_ACQUIRE);
        value = layer_find(layer, cluster);
        if (value || image->own_only) {
            return value;
        }
        while (!value && cluster < __atomic_load_n(&layer->parent_clusters,
                                                   __ATOMIC_ACQUIRE)) {
            layer = __atomic_load_n(&layer->parent, __ATOMIC_ACQUIRE);
            if (!layer) {
                break; /* the limit is older than the pointer */
            }
            value = layer_find(layer, cluster);
        }
        __atomic_thread_fence(__ATOMIC_ACQUIRE);
    } while (seq % 2 ||
             seq != __atomic_load_n(&s->layers_seq, __ATOMIC_ACQUIRE));
    return value;
}

uint64_t bale_image_find(BaleImage *image, uint64_t cluster)
{
    BaleEpochToken token = bale_epoch_enter(image->store->epoch);
    uint64_t value = image_find(image, cluster);

    bale_epoch_exit(image->store->epoch, token);
    return value;
}

bool bale_image_find_top(BaleImage *image, uint64_t cluster)
{
    BaleEpochToken token = bale_epoch_enter(image->store->epoch);
    BaleLayer *top = __atomic_load_n(&image->top, __ATOMIC_ACQUIRE);
    bool found = layer_find(top, cluster);

    bale_epoch_exit(image->store->epoch, token);
    return found;
}

bool bale_image_chunk_used(BaleImage *image, uint64_t cluster)
{
    BaleStore *s = image->store;
    BaleEpochToken token = bale_epoch_enter(s->epoch);
    uint64_t first = bale_align_down(cluster, BALE_CHUNK_CLUSTERS);
    uint64_t seq;
    bool used;

    do {
        BaleLayer *layer = __atomic_load_n(&image->top, __ATOMIC_ACQUIRE);

        seq = __atomic_load_n(&s->layers_seq, __ATOMIC_ACQUIRE);
        used = layer_chunk_used(layer, cluster);
        while (!used && !image->own_only &&
               first < __atomic_load_n(&layer->parent_clusters,
                                       __ATOMIC_ACQUIRE)) {
            layer = __atomic_load_n(&layer->parent, __ATOMIC_ACQUIRE);
            if (!layer) {
                break;
            }
            used = layer_chunk_used(layer, cluster);
        }
        __atomic_thread_fence(__ATOMIC_ACQUIRE);
    } while (seq % 2 ||
             seq != __atomic_load_n(&s->layers_seq, __ATOMIC_ACQUIRE));
    bale_epoch_exit(s->epoch, token);
    return used;
}

bool bale_image_shows_layer(BaleImage *image, uint32_t id)
{
    BaleStore *s = image->store;
    BaleEpochToken token = bale_epoch_enter(s->epoch);
    BaleLayer *top = __atomic_load_n(&image->top, __ATOMIC_ACQUIRE);
    bool shows = top->id == id;

    bale_epoch_exit(s->epoch, token);
    if (!shows) {
        uint64_t clusters;
        uint32_t now;

        pthread_mutex_lock(&s->log_lock);
        now = bale_catalogue_resolve(s->catalogue, id, &clusters);
        for (BaleLayer *layer = image->top; layer && !shows;
             layer = layer->parent) {
            shows = layer->id == now;
        }
        pthread_mutex_unlock(&s->log_lock);
    }
    return shows;
}

/* --- changing --- */

/*
 * The index has changed in @chunk, which has @entries more of it.  Not before
 * it did: a checkpoint takes the mark away before it looks at the index, so
 * what it does not see is marked anew.  (All of these are sequentially
 * consistent, also in util/index.)
 */
static void chunk_changed(BaleChunk *chunk, int entries)
{
    if (entries) {
        __atomic_fetch_add(&chunk->entries, entries, __ATOMIC_RELAXED);
    }
    if (!__atomic_load_n(&chunk->changed, __ATOMIC_SEQ_CST) &&
        !BALE_PLANTED(chunk_unmarked)) {
        __atomic_store_n(&chunk->changed, true, __ATOMIC_SEQ_CST);
    }
}

int bale_layer_index_set(BaleLayer *layer, uint64_t cluster, uint64_t value,
                         uint64_t *old)
{
    uint64_t was = 0, n = cluster / BALE_CHUNK_CLUSTERS;
    BaleChunk *chunk = value ? bale_layer_chunk_make(layer, n)
                             : bale_layer_chunk(layer, n);
    int ret = value && !chunk
                  ? -ENOMEM
                  : bale_index_set(layer->index, cluster, value, &was);

    if (ret < 0) {
        return ret;
    }
    if (chunk) {
        chunk_changed(chunk, (value != 0) - (was != 0));
    }
    if (old) {
        *old = was;
    }
    return 0;
}

int bale_layer_index_adopt(BaleLayer *layer, uint64_t cluster, uint64_t value,
                           bool undo)
{
    uint64_t n = cluster / BALE_CHUNK_CLUSTERS;
    BaleChunk *chunk = undo ? bale_layer_chunk(layer, n)
                            : bale_layer_chunk_make(layer, n);
    int ret;

    if (!chunk) {
        return undo ? 0 : -ENOMEM; /* nothing was adopted there */
    }
    ret = undo ? bale_index_update(layer->index, cluster, value, 0, NULL)
               : bale_index_update(layer->index, cluster, 0, value, NULL);
    if (ret == 0) {
        chunk_changed(chunk, undo ? -1 : 1);
    }
    return ret == -EAGAIN ? 0 : ret;
}

/* Nothing points at the record of @old any more. */
static void layer_account(BaleStore *s, uint64_t old)
{
    pthread_mutex_lock(&s->log_lock);
    bale_page_live_sub(s, bale_value_address(old),
                       bale_value_live(old, s->cluster_size));
    pthread_mutex_unlock(&s->log_lock);
}

void bale_layer_account_old(BaleLayer *layer, uint64_t cluster, uint64_t old)
{
    BaleStore *s = layer->store;

    if (old) {
        if (s->cache) {
            bale_cache_drop(s->cache, cluster, old);
        }
        layer_account(s, old);
    }
}

void bale_layer_index_move(BaleLayer *layer, uint64_t cluster, uint64_t value,
                           uint64_t copy)
{
    BaleStore *s = layer->store;
    uint64_t gone = value;

    if (BALE_PLANTED(copy_unconditional)) {
        bale_layer_index_set(layer, cluster, copy, &gone);
    } else if (bale_index_update(layer->index, cluster, value, copy,
                                 NULL) < 0) {
        gone = copy; /* somebody was faster: the copy is garbage */
    } else {
        chunk_changed(bale_layer_chunk(layer, cluster / BALE_CHUNK_CLUSTERS),
                      0);
        if (s->cache) {
            bale_cache_move(s->cache, layer, cluster, value, copy);
        }
    }
    layer_account(s, gone);
}

static bool layer_removed(uint64_t cluster, uint64_t value, void *opaque)
{
    BaleLayer *layer = opaque;

    chunk_changed(bale_layer_chunk(layer, cluster / BALE_CHUNK_CLUSTERS), -1);
    /* During recovery live bytes are not counted yet. */
    if (layer->store->session) {
        bale_layer_account_old(layer, cluster, value);
    }
    return true;
}

void bale_layer_clear_from(BaleLayer *layer, uint64_t cluster)
{
    bale_index_remove_from(layer->index, cluster, layer_removed, layer);
}

/* --- making, resizing, freeing --- */

static void layer_retire_index(void *opaque)
{
    bale_index_free(opaque);
}

/* Key bits of an index for @clusters, with room to grow a little. */
static unsigned layer_key_bits(uint64_t clusters)
{
    unsigned bits = 1;

    while (bits < BALE_INDEX_KEY_BITS_MAX && clusters >> bits) {
        bits++;
    }
    return MIN(bits + 2, BALE_INDEX_KEY_BITS_MAX);
}

static bool layer_copy_entry(uint64_t cluster, uint64_t value, void *opaque)
{
    return bale_index_set(opaque, cluster, value, NULL) == 0;
}

uint64_t bale_layer_clusters(const BaleLayer *layer)
{
    return bale_size_clusters(layer->size, layer->store->cluster_size);
}

int bale_layer_reserve(BaleLayer *layer, uint64_t size)
{
    BaleStore *s = layer->store;
    uint64_t clusters = bale_size_clusters(size, s->cluster_size);
    uint64_t chunks = clusters / BALE_CHUNK_CLUSTERS + 1;
    unsigned key_bits = layer_key_bits(chunks * BALE_CHUNK_CLUSTERS);

    if (!layer->index || chunks > layer->chunks) {
        BaleChunk **groups = g_try_new0(BaleChunk *,
                                        chunks / BALE_CHUNK_GROUP + 1);
        BaleIndex *index = bale_index_new(key_bits, 0, s->epoch);
        BaleIndex *old = layer->index;

        if (!groups || !index ||
            (old && !bale_index_foreach(old, layer_copy_entry, index))) {
            g_free(groups);
            bale_index_free(index);
            return -ENOMEM;
        }
        if (old) {
            BaleChunk **old_groups = layer->chunk_groups;

            memcpy(groups, old_groups,
                   ((layer->chunks - 1) / BALE_CHUNK_GROUP + 1) *
                       sizeof(*groups));
            __atomic_store_n(&layer->chunk_groups, groups, __ATOMIC_RELEASE);
            __atomic_store_n(&layer->index, index, __ATOMIC_RELEASE);
            bale_epoch_defer(s->epoch, layer_retire_index, old);
            bale_epoch_defer(s->epoch, g_free, old_groups);
            bale_epoch_poll(s->epoch);
        } else {
            layer->chunk_groups = groups;
            layer->index = index;
        }
        layer->chunks = chunks;
    }
    return 0;
}

BaleLayer *bale_layer_new(BaleStore *s, uint32_t id, uint64_t size)
{
    BaleLayer *layer = g_new0(BaleLayer, 1);

    layer->store = s;
    layer->id = id;
    layer->size = size;
    layer->refs = 1;
    if (bale_layer_reserve(layer, size) < 0) {
        bale_layer_free(layer);
        return NULL;
    }
    return layer;
}

void bale_layer_unref(BaleLayer *layer)
{
    if (__atomic_sub_fetch(&layer->refs, 1, __ATOMIC_ACQ_REL) == 0) {
        bale_layer_free(layer);
    }
}

static void layer_unref(void *layer)
{
    bale_layer_unref(layer);
}

void bale_layer_unref_later(BaleLayer *layer)
{
    bale_epoch_defer(layer->store->epoch, layer_unref, layer);
}

void bale_layer_free(BaleLayer *layer)
{
    if (layer) {
        bale_index_free(layer->index);
        bale_patch_table_free(layer->patches);
        for (uint64_t i = 0; i < layer->chunks; i += BALE_CHUNK_GROUP) {
            g_free(layer->chunk_groups[i / BALE_CHUNK_GROUP]);
        }
        g_free(layer->chunk_groups);
        g_free(layer);
    }
}
