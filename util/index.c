/*
 * Hash index: plain first implementation, one lock over a GHashTable
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "util/index.h"

#include <assert.h>
#include <errno.h>
#include <string.h>

struct BaleIndex {
    GMutex lock;
    GHashTable *map;
    unsigned key_bits;
};

typedef struct Pair {
    uint64_t key;
    uint64_t value;
} Pair;

BaleIndex *bale_index_new(unsigned key_bits, uint64_t expected_keys,
                          BaleEpoch *epoch)
{
    BaleIndex *index = g_new0(BaleIndex, 1);

    g_mutex_init(&index->lock);
    index->map = g_hash_table_new(NULL, NULL);
    index->key_bits = key_bits;
    return index;
}

void bale_index_free(BaleIndex *index)
{
    if (index) {
        g_hash_table_unref(index->map);
        g_mutex_clear(&index->lock);
        g_free(index);
    }
}

static uint64_t get_locked(BaleIndex *index, uint64_t key)
{
    assert(key >> index->key_bits == 0);
    return (uintptr_t)g_hash_table_lookup(index->map, (gpointer)key);
}

static void put_locked(BaleIndex *index, uint64_t key, uint64_t value)
{
    assert(value <= BALE_INDEX_VALUE_MAX);
    if (value) {
        g_hash_table_insert(index->map, (gpointer)key, (gpointer)value);
    } else {
        g_hash_table_remove(index->map, (gpointer)key);
    }
}

uint64_t bale_index_find(BaleIndex *index, uint64_t key)
{
    g_autoptr(GMutexLocker) locker = g_mutex_locker_new(&index->lock);

    (void)locker;
    return get_locked(index, key);
}

int bale_index_update(BaleIndex *index, uint64_t key, uint64_t expected,
                      uint64_t desired, uint64_t *current)
{
    g_autoptr(GMutexLocker) locker = g_mutex_locker_new(&index->lock);
    uint64_t value = get_locked(index, key);

    (void)locker;
    if (current) {
        *current = value;
    }
    if (value != expected) {
        return -EAGAIN;
    }
    put_locked(index, key, desired);
    return 0;
}

int bale_index_set(BaleIndex *index, uint64_t key, uint64_t value,
                   uint64_t *old)
{
    g_autoptr(GMutexLocker) locker = g_mutex_locker_new(&index->lock);

    (void)locker;
    if (old) {
        *old = get_locked(index, key);
    }
    put_locked(index, key, value);
    return 0;
}

bool bale_index_foreach_range(BaleIndex *index, uint64_t first_key,
                              uint64_t last_key, BaleIndexVisit *visit,
                              void *opaque)
{
    g_autoptr(GArray) pairs = g_array_new(FALSE, FALSE, sizeof(Pair));
    GHashTableIter iter;
    gpointer k, v;

    g_mutex_lock(&index->lock);
    g_hash_table_iter_init(&iter, index->map);
    while (g_hash_table_iter_next(&iter, &k, &v)) {
        Pair pair = { (uintptr_t)k, (uintptr_t)v };

        if (pair.key >= first_key && pair.key <= last_key) {
            g_array_append_val(pairs, pair);
        }
    }
    g_mutex_unlock(&index->lock);
    for (guint i = 0; i < pairs->len; i++) {
        Pair *pair = &g_array_index(pairs, Pair, i);

        if (!visit(pair->key, pair->value, opaque)) {
            return false;
        }
    }
    return true;
}

bool bale_index_foreach(BaleIndex *index, BaleIndexVisit *visit, void *opaque)
{
    return bale_index_foreach_range(index, 0, UINT64_MAX, visit, opaque);
}

typedef struct RemoveFrom {
    BaleIndex *index;
    BaleIndexVisit *removed;
    void *opaque;
    uint64_t count;
} RemoveFrom;

static bool remove_one(uint64_t key, uint64_t value, void *opaque)
{
    RemoveFrom *r = opaque;
    uint64_t old;

    bale_index_set(r->index, key, 0, &old);
    if (old) {
        r->count++;
        if (r->removed) {
            r->removed(key, old, r->opaque);
        }
    }
    return true;
}

uint64_t bale_index_remove_from(BaleIndex *index, uint64_t first_key,
                                BaleIndexVisit *removed, void *opaque)
{
    RemoveFrom r = { index, removed, opaque, 0 };

    bale_index_foreach_range(index, first_key, UINT64_MAX, remove_one, &r);
    return r.count;
}

bool bale_index_grow_step(BaleIndex *index)
{
    return false;
}

void bale_index_get_stats(BaleIndex *index, BaleIndexStats *stats)
{
    g_mutex_lock(&index->lock);
    memset(stats, 0, sizeof(*stats));
    stats->keys = g_hash_table_size(index->map);
    g_mutex_unlock(&index->lock);
}

void bale_index_get_histogram(BaleIndex *index,
                              uint64_t histogram[BALE_INDEX_HISTOGRAM_SIZE])
{
    memset(histogram, 0, BALE_INDEX_HISTOGRAM_SIZE * sizeof(*histogram));
}

bool bale_index_check(BaleIndex *index)
{
    return true;
}
