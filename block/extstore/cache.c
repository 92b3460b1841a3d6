/*
 * Decompressed clusters in memory, for small reads and read-ahead.
 *
 * Invariants:
 *  1. An entry belongs to the index value that its cluster had when it was
 *     made, and is only served while the index still has that value.
 *  2. A value can come back only after its page was freed and used anew; a
 *     writer drops the cluster's entry after it has changed the index, and
 *     nothing is put in for a value that the index does not have.  So no
 *     superseded cluster is ever served.
 *
 * Least recently used goes first.  Memory: the buffers are made as needed, at
 * most as many as fit into the size given; a failed allocation only means that
 * nothing is kept.
 *
 * Threads: any; one mutex.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "store-internal.h"

#include <string.h>

#include "util/memory.h"

typedef struct CacheEntry {
    uint64_t cluster;
    uint64_t value;
    uint8_t *data;
    GList link; /* in lru; data points back */
} CacheEntry;

struct BaleCache {
    pthread_mutex_t lock;
    uint32_t cluster_size;
    uint64_t entries_max;
    GHashTable *entries; /* &cluster -> CacheEntry */
    GQueue lru;          /* most recent first */
};

static void cache_entry_free(void *opaque)
{
    CacheEntry *e = opaque;

    bale_memory_free(e->data);
    g_free(e);
}

BaleCache *bale_cache_new(uint64_t bytes, uint32_t cluster_size)
{
    BaleCache *cache = g_new0(BaleCache, 1);

    pthread_mutex_init(&cache->lock, NULL);
    cache->cluster_size = cluster_size;
    cache->entries_max = bytes / cluster_size;
    cache->entries = g_hash_table_new_full(g_int64_hash, g_int64_equal, NULL,
                                           cache_entry_free);
    g_queue_init(&cache->lru);
    return cache;
}

void bale_cache_free(BaleCache *cache)
{
    if (cache) {
        g_hash_table_destroy(cache->entries);
        pthread_mutex_destroy(&cache->lock);
        g_free(cache);
    }
}

static CacheEntry *cache_find(BaleCache *cache, uint64_t cluster,
                              uint64_t value)
{
    CacheEntry *e = g_hash_table_lookup(cache->entries, &cluster);

    return e && e->value == value ? e : NULL;
}

static void cache_remove(BaleCache *cache, CacheEntry *e)
{
    g_queue_unlink(&cache->lru, &e->link);
    g_hash_table_remove(cache->entries, &e->cluster);
}

bool bale_cache_get(BaleCache *cache, uint64_t cluster, uint64_t value,
                    uint32_t offset, void *dst, uint32_t len)
{
    CacheEntry *e;

    pthread_mutex_lock(&cache->lock);
    e = cache_find(cache, cluster, value);
    if (e) {
        memcpy(dst, e->data + offset, len);
        g_queue_unlink(&cache->lru, &e->link);
        g_queue_push_head_link(&cache->lru, &e->link);
    }
    pthread_mutex_unlock(&cache->lock);
    return e;
}

bool bale_cache_has(BaleCache *cache, uint64_t cluster, uint64_t value)
{
    bool has;

    pthread_mutex_lock(&cache->lock);
    has = cache_find(cache, cluster, value);
    pthread_mutex_unlock(&cache->lock);
    return has;
}

/* A fresh entry, or the oldest one's memory; NULL if there is none. */
static CacheEntry *cache_take_entry(BaleCache *cache)
{
    CacheEntry *e = NULL;

    if (cache->lru.length >= cache->entries_max) {
        GList *last = g_queue_peek_tail_link(&cache->lru);

        if (last) {
            e = last->data;
            g_queue_unlink(&cache->lru, &e->link);
            g_hash_table_steal(cache->entries, &e->cluster);
        }
        return e;
    }
    e = g_new0(CacheEntry, 1);
    e->link.data = e;
    e->data = bale_memory_try_alloc(64, cache->cluster_size);
    if (!e->data) {
        g_free(e);
        return NULL;
    }
    return e;
}

void bale_cache_put(BaleCache *cache, BaleImage *image, uint64_t cluster,
                    uint64_t value, const void *data)
{
    CacheEntry *e;

    pthread_mutex_lock(&cache->lock);
    e = g_hash_table_lookup(cache->entries, &cluster);
    if (e) {
        cache_remove(cache, e);
    }
    /* A writer that comes later drops it again: see invariant 2. */
    if (bale_image_find(image, cluster) == value) {
        e = cache_take_entry(cache);
        if (e) {
            e->cluster = cluster;
            e->value = value;
            memcpy(e->data, data, cache->cluster_size);
            g_hash_table_insert(cache->entries, &e->cluster, e);
            g_queue_push_head_link(&cache->lru, &e->link);
        }
    }
    pthread_mutex_unlock(&cache->lock);
}

void bale_cache_drop(BaleCache *cache, uint64_t cluster)
{
    CacheEntry *e;

    pthread_mutex_lock(&cache->lock);
    e = g_hash_table_lookup(cache->entries, &cluster);
    if (e) {
        cache_remove(cache, e);
    }
    pthread_mutex_unlock(&cache->lock);
}

void bale_cache_drop_all(BaleCache *cache)
{
    pthread_mutex_lock(&cache->lock);
    g_hash_table_remove_all(cache->entries);
    g_queue_init(&cache->lru);
    pthread_mutex_unlock(&cache->lock);
}
