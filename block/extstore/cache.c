/*
 * Decompressed clusters in memory, for small reads and read-ahead.
 *
 * Invariants:
 *  1. An entry belongs to a cluster and to the index value, a record's address,
 *     that some layer had for it when the entry was made, and is only served
 *     to who found that value.
 *  2. Nothing is put in for a value that the image does not show, and whoever
 *     has taken a value out of a layer drops its entry before its page can
 *     be freed and the value come back.  So no superseded cluster is ever
 *     served.
 *  3. A shard's entries are in the table and in exactly one of the lists
 *     window and main, or in neither and free.
 *
 * Because the key is the record's place, all images that share a layer share
 * what is cached of it, also when layers are merged.
 *
 * Which clusters are kept (the idea is that of W-TinyLFU): new ones come into
 * the window, an eighth of the whole, which a scan or read-ahead goes through.
 * What leaves the window goes on to the main list while that has room, and
 * after that only if it was asked for more often lately than the main list's
 * least recently used entry, which it replaces.  How often is counted by a
 * sketch, four rows of counters chosen by hash, which are halved from time to
 * time.  A cluster counts when it is loaded and when it is hit, but not for
 * hits soon after one that counted: these belong to one pass over it.
 *
 * Memory: the buffers are made as needed, at most as many as fit into the size
 * given and one for each thread that has taken one to decompress into; a
 * failed allocation only means that nothing is kept.
 *
 * Threads: any.  A shard has a lock; clusters are spread over up to 16 shards,
 * neighbours over different ones.  Only bale_cache_set_size() takes more than
 * one, in order.  buffer_lock is taken under a shard's.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "store-internal.h"

#include <string.h>

#include "util/memory.h"

#define CACHE_SHARDS_MAX 16u
/* A shard has at least this many entries, or else there are fewer shards. */
#define CACHE_SHARD_ENTRIES_MIN 64u
/* The part of a shard that is the window. */
#define CACHE_WINDOW_PART 8u
#define CACHE_WINDOW_MIN 4u
/* Entries of all shards; bounds the tables. */
#define CACHE_ENTRIES_MAX (64u << 20)
#define SKETCH_ROWS 4u
#define SKETCH_COUNT_MAX 15u
/* Counters are halved after so many counts per entry. */
#define SKETCH_SAMPLE 10u
#define CACHE_NIL UINT32_MAX
/* Lists of loads under way in a shard. */
#define CACHE_LOADS 32u

typedef struct CacheList {
    uint32_t first, last; /* most recent first */
    uint32_t len;
} CacheList;

typedef struct CacheEntry {
    uint64_t cluster;
    uint64_t value;
    uint64_t counted;      /* the shard's clock when it last counted */
    uint8_t *data;
    uint32_t chain;        /* next with the same hash, or next free */
    uint32_t prev, next;   /* in its list */
    bool in_main;
    bool ahead;            /* read ahead, and not asked for yet */
    bool scan;             /* read ahead, and still in the window */
} CacheEntry;

typedef struct CacheShard {
    pthread_mutex_t lock;
    CacheEntry *entries;
    uint32_t entries_max;
    uint32_t entries_made; /* those from here on were never used */
    uint32_t free;         /* a list through chain */
    uint32_t *table;
    uint32_t table_mask;
    CacheList window, main;
    uint32_t window_max;
    uint8_t *sketch;       /* SKETCH_ROWS rows */
    uint32_t sketch_mask;
    uint64_t sketch_adds, sketch_limit;
    uint64_t clock;        /* hits and puts */
    BaleCacheLoad *loads[CACHE_LOADS]; /* by hash */
} __attribute__((aligned(64))) CacheShard;

struct BaleCache {
    BaleStoreStats *stats; /* where hits and so on are counted */
    uint32_t cluster_size;
    uint64_t max_bytes;    /* atomic */
    uint32_t shard_mask;   /* atomic; changes under all locks */
    CacheShard shards[CACHE_SHARDS_MAX];

    pthread_mutex_t buffer_lock;
    GPtrArray *buffers;    /* unused ones, the newest last */
    /* What became of clusters that were read ahead; atomic. */
    uint64_t ahead_used, ahead_wasted;
};

/* --- buffers --- */

uint8_t *bale_cache_buffer_get(BaleCache *cache)
{
    uint8_t *buf = NULL;

    pthread_mutex_lock(&cache->buffer_lock);
    if (cache->buffers->len) {
        buf = g_ptr_array_steal_index_fast(cache->buffers,
                                           cache->buffers->len - 1);
    }
    pthread_mutex_unlock(&cache->buffer_lock);
    return buf ? buf : bale_memory_try_alloc(64, cache->cluster_size);
}

void bale_cache_buffer_put(BaleCache *cache, uint8_t *buf)
{
    pthread_mutex_lock(&cache->buffer_lock);
    /* More than a few only come together when the cache shrinks. */
    if (buf && cache->buffers->len < BALE_WORKERS_MAX) {
        g_ptr_array_add(cache->buffers, buf);
        buf = NULL;
    }
    pthread_mutex_unlock(&cache->buffer_lock);
    bale_memory_free(buf);
}

/* --- hashing --- */

static uint64_t cache_hash(uint64_t cluster)
{
    uint64_t h = cluster * UINT64_C(0x9e3779b97f4a7c15);

    h = (h ^ (h >> 32)) * UINT64_C(0xd6e8feb86659fd93);
    return h ^ (h >> 29);
}

static CacheShard *cache_lock(BaleCache *cache, uint64_t cluster)
{
    for (;;) {
        uint32_t mask = __atomic_load_n(&cache->shard_mask, __ATOMIC_ACQUIRE);
        /* Sixteen neighbours in turn, and no stride meets one shard only. */
        uint32_t n = cluster + cache_hash(cluster / CACHE_SHARDS_MAX);
        CacheShard *shard = &cache->shards[n & mask];

        pthread_mutex_lock(&shard->lock);
        if (mask == __atomic_load_n(&cache->shard_mask, __ATOMIC_RELAXED)) {
            return shard;
        }
        pthread_mutex_unlock(&shard->lock);
    }
}

/* --- how often a cluster was asked for --- */

static uint8_t *sketch_counter(CacheShard *shard, uint64_t hash, unsigned row)
{
    uint32_t n = (uint32_t)hash + row * ((uint32_t)(hash >> 32) | 1);

    return &shard->sketch[row * (shard->sketch_mask + 1) +
                          (n & shard->sketch_mask)];
}

static unsigned sketch_count(CacheShard *shard, uint64_t hash)
{
    unsigned count = SKETCH_COUNT_MAX;

    for (unsigned row = 0; row < SKETCH_ROWS; row++) {
        count = MIN(count, *sketch_counter(shard, hash, row));
    }
    return count;
}

/*
 * What was read ahead is part of a scan, it seems: it counts once at most, and
 * makes nothing else older, so that no scan is too long for what is hot.
 */
static void sketch_add(CacheShard *shard, uint64_t hash, bool scan)
{
    unsigned count = sketch_count(shard, hash);

    if (scan && count) {
        return;
    }
    /* Only the lowest ones can be right. */
    for (unsigned row = 0; row < SKETCH_ROWS && count < SKETCH_COUNT_MAX;
         row++) {
        uint8_t *counter = sketch_counter(shard, hash, row);

        *counter += *counter == count;
    }
    if (!scan && ++shard->sketch_adds >= shard->sketch_limit) {
        uint32_t n = SKETCH_ROWS * (shard->sketch_mask + 1);

        for (uint32_t i = 0; i < n; i++) {
            shard->sketch[i] /= 2;
        }
        shard->sketch_adds = 0;
    }
}

/* --- lists and table of a shard; under its lock --- */

static void list_remove(CacheShard *shard, CacheList *list, uint32_t i)
{
    CacheEntry *e = &shard->entries[i];

    *(e->prev == CACHE_NIL ? &list->first : &shard->entries[e->prev].next) =
        e->next;
    *(e->next == CACHE_NIL ? &list->last : &shard->entries[e->next].prev) =
        e->prev;
    list->len--;
}

static void list_push(CacheShard *shard, CacheList *list, uint32_t i)
{
    CacheEntry *e = &shard->entries[i];

    e->prev = CACHE_NIL;
    e->next = list->first;
    *(e->next == CACHE_NIL ? &list->last : &shard->entries[e->next].prev) = i;
    list->first = i;
    list->len++;
}

static CacheList *entry_list(CacheShard *shard, const CacheEntry *e)
{
    return e->in_main ? &shard->main : &shard->window;
}

static uint32_t *shard_slot(CacheShard *shard, uint64_t hash)
{
    return &shard->table[hash & shard->table_mask];
}

static uint32_t shard_find(CacheShard *shard, uint64_t hash, uint64_t cluster,
                           uint64_t value)
{
    uint32_t i;

    if (!shard->entries_max) {
        return CACHE_NIL;
    }
    for (i = *shard_slot(shard, hash); i != CACHE_NIL;
         i = shard->entries[i].chain) {
        if (shard->entries[i].cluster == cluster &&
            shard->entries[i].value == value) {
            break;
        }
    }
    return i;
}

/* Take entry @i out; its buffer is the caller's. */
static uint8_t *shard_remove(BaleCache *cache, CacheShard *shard, uint32_t i)
{
    CacheEntry *e = &shard->entries[i];
    uint32_t *p = shard_slot(shard, cache_hash(e->cluster));

    while (*p != i) {
        p = &shard->entries[*p].chain;
    }
    *p = e->chain;
    list_remove(shard, entry_list(shard, e), i);
    if (e->ahead) {
        stat_add(&cache->ahead_wasted, 1);
    }
    e->chain = shard->free;
    shard->free = i;
    return e->data;
}

/* The window is full: its oldest entry goes on, or somebody goes. */
static uint8_t *shard_evict(BaleCache *cache, CacheShard *shard)
{
    uint32_t i = shard->window.last;
    uint32_t victim = shard->main.last;
    CacheEntry *e = &shard->entries[i], *v;

    if (shard->main.len >= shard->entries_max - shard->window_max) {
        v = victim == CACHE_NIL ? NULL : &shard->entries[victim];
        if (!v || sketch_count(shard, cache_hash(e->cluster)) <=
                      sketch_count(shard, cache_hash(v->cluster))) {
            stat_add(&cache->stats->cache_rejections, 1);
            return shard_remove(cache, shard, i);
        }
    } else {
        victim = CACHE_NIL;
    }
    stat_add(&cache->stats->cache_admissions, 1);
    list_remove(shard, &shard->window, i);
    e->in_main = true;
    e->scan = false;
    list_push(shard, &shard->main, i);
    return victim == CACHE_NIL ? NULL : shard_remove(cache, shard, victim);
}

static uint32_t shard_take_free(CacheShard *shard)
{
    uint32_t i = shard->free;

    if (i != CACHE_NIL) {
        shard->free = shard->entries[i].chain;
    } else if (shard->entries_made < shard->entries_max) {
        i = shard->entries_made++;
    }
    return i;
}

static void list_free_buffers(CacheShard *shard, CacheList *list)
{
    for (uint32_t i = list->first; i != CACHE_NIL;
         i = shard->entries[i].next) {
        bale_memory_free(shard->entries[i].data);
    }
}

static void shard_clear(CacheShard *shard)
{
    if (shard->entries) {
        list_free_buffers(shard, &shard->window);
        list_free_buffers(shard, &shard->main);
    }
    g_free(shard->entries);
    g_free(shard->table);
    g_free(shard->sketch);
    shard->entries = NULL;
    shard->table = NULL;
    shard->sketch = NULL;
    shard->entries_max = shard->entries_made = 0;
    shard->free = CACHE_NIL;
    shard->window = shard->main = (CacheList){ CACHE_NIL, CACHE_NIL, 0 };
}

/* Without memory the shard stays one of no entries. */
static void shard_set_size(CacheShard *shard, uint32_t entries)
{
    uint32_t buckets = 1;

    if (!entries) {
        return;
    }
    while (buckets < entries) {
        buckets *= 2;
    }
    shard->entries = g_try_new0(CacheEntry, entries);
    shard->table = g_try_new(uint32_t, buckets);
    /* Four times the entries: counts of strangers seldom meet. */
    shard->sketch = g_try_malloc0_n(buckets, 4 * SKETCH_ROWS);
    if (!shard->entries || !shard->table || !shard->sketch) {
        g_clear_pointer(&shard->entries, g_free);
        g_clear_pointer(&shard->table, g_free);
        g_clear_pointer(&shard->sketch, g_free);
        return;
    }
    memset(shard->table, 0xff, buckets * sizeof(shard->table[0]));
    shard->table_mask = buckets - 1;
    shard->sketch_mask = 4 * buckets - 1;
    shard->sketch_adds = 0;
    shard->sketch_limit = (uint64_t)SKETCH_SAMPLE * entries;
    shard->entries_max = entries;
    shard->window_max = MAX(entries / CACHE_WINDOW_PART,
                            MIN(entries / 2, CACHE_WINDOW_MIN));
    shard->window_max = MAX(shard->window_max, 1);
}

/* --- the interface --- */

BaleCache *bale_cache_new(uint64_t bytes, uint32_t cluster_size,
                          BaleStoreStats *stats)
{
    /* g_new does not know of the alignment that the shards want. */
    BaleCache *cache = bale_memory_try_alloc0(64, sizeof(*cache));

    if (!cache) {
        return NULL;
    }
    cache->stats = stats;
    cache->cluster_size = cluster_size;
    cache->buffers = g_ptr_array_new();
    pthread_mutex_init(&cache->buffer_lock, NULL);
    for (unsigned i = 0; i < CACHE_SHARDS_MAX; i++) {
        pthread_mutex_init(&cache->shards[i].lock, NULL);
        shard_clear(&cache->shards[i]);
    }
    bale_cache_set_size(cache, bytes);
    return cache;
}

void bale_cache_free(BaleCache *cache)
{
    if (!cache) {
        return;
    }
    for (unsigned i = 0; i < CACHE_SHARDS_MAX; i++) {
        shard_clear(&cache->shards[i]);
        pthread_mutex_destroy(&cache->shards[i].lock);
    }
    for (guint i = 0; i < cache->buffers->len; i++) {
        bale_memory_free(g_ptr_array_index(cache->buffers, i));
    }
    g_ptr_array_free(cache->buffers, TRUE);
    pthread_mutex_destroy(&cache->buffer_lock);
    bale_memory_free(cache);
}

void bale_cache_set_size(BaleCache *cache, uint64_t bytes)
{
    uint64_t entries = MIN(bytes / cache->cluster_size, CACHE_ENTRIES_MAX);
    uint32_t shards = 1;

    while (shards < CACHE_SHARDS_MAX &&
           entries / (2 * shards) >= CACHE_SHARD_ENTRIES_MIN) {
        shards *= 2;
    }
    for (unsigned i = 0; i < CACHE_SHARDS_MAX; i++) {
        pthread_mutex_lock(&cache->shards[i].lock);
    }
    for (unsigned i = 0; i < CACHE_SHARDS_MAX; i++) {
        shard_clear(&cache->shards[i]);
        shard_set_size(&cache->shards[i],
                       i < shards ? (entries + i) / shards : 0);
    }
    __atomic_store_n(&cache->shard_mask, shards - 1, __ATOMIC_RELEASE);
    __atomic_store_n(&cache->max_bytes, entries * cache->cluster_size,
                     __ATOMIC_RELAXED);
    for (unsigned i = CACHE_SHARDS_MAX; i-- > 0;) {
        pthread_mutex_unlock(&cache->shards[i].lock);
    }
}

uint64_t bale_cache_max_bytes(BaleCache *cache)
{
    return __atomic_load_n(&cache->max_bytes, __ATOMIC_RELAXED);
}

bool bale_cache_get(BaleCache *cache, uint64_t cluster, uint64_t value,
                    uint32_t offset, void *dst, uint32_t len)
{
    uint64_t hash = cache_hash(cluster);
    CacheShard *shard = cache_lock(cache, cluster);
    uint32_t i = shard_find(shard, hash, cluster, value);
    bool hit = i != CACHE_NIL;

    if (hit) {
        CacheEntry *e = &shard->entries[i];

        memcpy(dst, e->data + offset, len);
        if (e->scan ? e->ahead
                    : ++shard->clock - e->counted > shard->entries_max / 2) {
            e->counted = shard->clock;
            sketch_add(shard, hash, e->scan);
        }
        if (e->ahead) {
            e->ahead = false;
            stat_add(&cache->ahead_used, 1);
            stat_add(&cache->stats->readahead_hits, 1);
        }
        if (e->in_main) {
            list_remove(shard, &shard->main, i);
            list_push(shard, &shard->main, i);
        }
    }
    pthread_mutex_unlock(&shard->lock);
    return hit;
}

bool bale_cache_has(BaleCache *cache, uint64_t cluster, uint64_t value)
{
    CacheShard *shard = cache_lock(cache, cluster);
    uint32_t i = shard_find(shard, cache_hash(cluster), cluster, value);
    bool has = i != CACHE_NIL;

    pthread_mutex_unlock(&shard->lock);
    return has;
}

void bale_cache_put(BaleCache *cache, BaleImage *image, uint64_t cluster,
                    uint64_t value, uint8_t *buf, BaleCacheUse use)
{
    bool ahead = use == BALE_CACHE_AHEAD;
    uint64_t hash = cache_hash(cluster);
    CacheShard *shard = cache_lock(cache, cluster);
    uint32_t i = shard_find(shard, hash, cluster, value);
    uint8_t *spare = NULL;
    CacheEntry *e;

    if (i != CACHE_NIL) {
        shard->entries[i].ahead &= ahead;
        goto out; /* somebody else was as fast */
    }
    /* A writer that comes later drops it again: see invariant 2. */
    if (bale_image_find(image, cluster) != value || !shard->entries_max) {
        goto out;
    }
    if (shard->window.len >= shard->window_max) {
        spare = shard_evict(cache, shard);
    }
    i = shard_take_free(shard);
    g_assert(i != CACHE_NIL);
    e = &shard->entries[i];
    *e = (CacheEntry){
        .cluster = cluster,
        .value = value,
        .counted = ++shard->clock,
        .data = g_steal_pointer(&buf),
        .chain = *shard_slot(shard, hash),
        .ahead = ahead,
        .scan = use != BALE_CACHE_RANDOM,
    };
    *shard_slot(shard, hash) = i;
    list_push(shard, &shard->window, i);
    if (!ahead) {
        sketch_add(shard, hash, use == BALE_CACHE_SCAN);
    }
out:
    pthread_mutex_unlock(&shard->lock);
    if (spare) {
        bale_cache_buffer_put(cache, spare);
    }
    if (buf) {
        bale_cache_buffer_put(cache, buf);
    }
}

bool bale_cache_load_begin(BaleCache *cache, BaleCacheLoad *load,
                           uint64_t cluster, uint64_t value,
                           BaleCacheWaiter *waiter)
{
    uint64_t hash = cache_hash(cluster);
    CacheShard *shard = cache_lock(cache, cluster);
    BaleCacheLoad **list = &shard->loads[hash % CACHE_LOADS], *l;

    g_assert(!load->shard);
    for (l = *list; l; l = l->next) {
        if (l->cluster == cluster && l->value == value) {
            break;
        }
    }
    if (!l) {
        *load = (BaleCacheLoad){ shard, list, cluster, value, NULL, *list };
        *list = load;
    } else if (waiter) {
        waiter->next = l->waiters;
        l->waiters = waiter;
    }
    pthread_mutex_unlock(&shard->lock);
    return !l;
}

BaleCacheWaiter *bale_cache_load_end(BaleCacheLoad *load)
{
    CacheShard *shard = load->shard;
    BaleCacheLoad **p = load->list;
    BaleCacheWaiter *waiters;

    if (!shard) {
        return NULL;
    }
    pthread_mutex_lock(&shard->lock);
    while (*p != load) {
        p = &(*p)->next;
    }
    *p = load->next;
    waiters = load->waiters;
    pthread_mutex_unlock(&shard->lock);
    load->shard = NULL;
    return waiters;
}

void bale_cache_move(BaleCache *cache, BaleLayer *layer, uint64_t cluster,
                     uint64_t from, uint64_t to)
{
    uint64_t hash = cache_hash(cluster);
    CacheShard *shard = cache_lock(cache, cluster);
    uint32_t i = shard_find(shard, hash, cluster, from);
    uint8_t *buf = NULL;

    if (i != CACHE_NIL) {
        /* As in a put: a writer that comes later drops it. */
        if (bale_layer_find(layer, cluster) == to &&
            shard_find(shard, hash, cluster, to) == CACHE_NIL) {
            shard->entries[i].value = to;
        } else {
            buf = shard_remove(cache, shard, i);
        }
    }
    pthread_mutex_unlock(&shard->lock);
    if (buf) {
        bale_cache_buffer_put(cache, buf);
    }
}

void bale_cache_drop(BaleCache *cache, uint64_t cluster, uint64_t value)
{
    CacheShard *shard = cache_lock(cache, cluster);
    uint32_t i = shard_find(shard, cache_hash(cluster), cluster, value);
    uint8_t *buf = NULL;

    if (i != CACHE_NIL) {
        buf = shard_remove(cache, shard, i);
    }
    pthread_mutex_unlock(&shard->lock);
    if (buf) {
        bale_cache_buffer_put(cache, buf);
    }
}

void bale_cache_get_stats(BaleCache *cache, BaleStoreStats *stats)
{
    for (unsigned i = 0; i < CACHE_SHARDS_MAX; i++) {
        CacheShard *shard = &cache->shards[i];

        pthread_mutex_lock(&shard->lock);
        stats->cache_entries += shard->window.len + shard->main.len;
        pthread_mutex_unlock(&shard->lock);
    }
    stats->cache_bytes = stats->cache_entries * cache->cluster_size;
    stats->cache_max_bytes = bale_cache_max_bytes(cache);
}

void bale_cache_ahead(BaleCache *cache, uint64_t *used, uint64_t *wasted)
{
    *used = __atomic_load_n(&cache->ahead_used, __ATOMIC_RELAXED);
    *wasted = __atomic_load_n(&cache->ahead_wasted, __ATOMIC_RELAXED);
}
