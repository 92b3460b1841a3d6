/*
 * The cluster cache: what is hot stays through a scan, what was superseded is
 * never served, and what is read ahead is used.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <pthread.h>
#include <string.h>

#include "stores.h"

#define CLUSTER 16384u
#define CLUSTERS 2048u
#define CACHED 128u /* clusters */

typedef struct Fixture {
    BaleSimOptions sim;
    BaleStore *store;
    BaleImage *image;
    uint32_t generation[CLUSTERS]; /* atomic; of what was written last */
} Fixture;

/* Every sector tells its cluster and generation. */
static void content(uint8_t *buf, uint32_t cluster, uint32_t generation)
{
    for (uint32_t i = 0; i < CLUSTER; i += 4) {
        uint32_t word = i % 512 == 0 ? cluster
                        : i % 512 == 4 ? generation
                                       : (i * cluster) >> 9;

        memcpy(buf + i, &word, 4);
    }
}

static void put(Fixture *f, uint32_t cluster, uint32_t generation)
{
    uint8_t buf[CLUSTER];

    content(buf, cluster, generation);
    g_assert_cmpint(bale_image_write_sync(f->image,
                                          (uint64_t)cluster * CLUSTER, buf,
                                          CLUSTER, 0), ==, 0);
    __atomic_store_n(&f->generation[cluster], generation, __ATOMIC_RELEASE);
}

/* Read one sector; its generation. */
static uint32_t get(Fixture *f, uint32_t cluster, uint32_t sector)
{
    uint32_t words[128];

    g_assert_cmpint(bale_image_read_sync(f->image,
                                         (uint64_t)cluster * CLUSTER +
                                             sector * 512u,
                                         words, sizeof(words)), ==, 0);
    g_assert_cmpuint(words[0], ==, cluster);
    return words[1];
}

static void fixture_init(Fixture *f, uint32_t cached)
{
    BaleCreateOptions create = {
        .size = (uint64_t)CLUSTERS * CLUSTER,
        .page_size = 2u << 20,
        .cluster_size = CLUSTER,
        .codec = BALE_CODEC_ZSTD,
    };
    BaleOpenOptions open = {
        .workers = 2,
        .cache_size = (uint64_t)cached * CLUSTER,
    };

    memset(f, 0, sizeof(*f));
    f->sim.no_history = true;
    f->store = test_store_open(test_store_new(&f->sim, &create), &open, NULL,
                               &f->image);
    for (uint32_t i = 0; i < CLUSTERS; i++) {
        put(f, i, 1);
    }
    g_assert_cmpint(bale_store_flush_sync(f->store), ==, 0);
}

static void fixture_close(Fixture *f)
{
    test_store_close(f->store, f->image);
}

static uint64_t hits(Fixture *f)
{
    BaleStoreStats stats;

    bale_store_get_stats(f->store, &stats);
    g_assert_cmpuint(stats.cache_bytes, <=, stats.cache_max_bytes);
    return stats.cache_hits;
}

static void scan(Fixture *f)
{
    uint32_t words[1024];

    for (uint64_t pos = 0; pos < (uint64_t)CLUSTERS * CLUSTER;
         pos += sizeof(words)) {
        g_assert_cmpint(bale_image_read_sync(f->image, pos, words,
                                             sizeof(words)), ==, 0);
        g_assert_cmpuint(words[0], ==, pos / CLUSTER);
        g_assert_cmpuint(words[1], ==, 1);
    }
}

/* Hot clusters that fit the cache are still there after a scan of it all. */
static void test_scan_resistance(void)
{
    enum { HOT = 80 };
    g_autoptr(GRand) rand = g_rand_new_with_seed(test_seed());
    uint32_t hot[HOT];
    uint64_t before;
    Fixture f;

    fixture_init(&f, CACHED);
    for (uint32_t i = 0; i < HOT; i++) {
        hot[i] = i * (CLUSTERS / HOT) + 3;
    }
    for (uint32_t i = 0; i < HOT * 20; i++) {
        get(&f, hot[g_rand_int_range(rand, 0, HOT)],
            g_rand_int_range(rand, 0, CLUSTER / 512));
    }
    for (int round = 0; round < 5; round++) {
        scan(&f);
        before = hits(&f);
        for (uint32_t i = 0; i < HOT; i++) {
            g_assert_cmpuint(get(&f, hot[i], 5), ==, 1);
        }
        g_assert_cmpuint(hits(&f) - before, >=, HOT * 8 / 10);
    }
    fixture_close(&f);
}

/* What became hot replaces what was. */
static void test_hot_set_moves(void)
{
    enum { HOT = 80 };
    g_autoptr(GRand) rand = g_rand_new_with_seed(test_seed());
    uint64_t before;
    Fixture f;

    fixture_init(&f, CACHED);
    for (uint32_t set = 0; set < 4; set++) {
        for (uint32_t i = 0; i < HOT * 60; i++) {
            get(&f, set * 500 + 5 * g_rand_int_range(rand, 0, HOT), 0);
        }
        before = hits(&f);
        for (uint32_t i = 0; i < HOT; i++) {
            get(&f, set * 500 + 5 * i, 1);
        }
        g_assert_cmpuint(hits(&f) - before, >=, HOT * 8 / 10);
    }
    fixture_close(&f);
}

/* A sequential reader finds nearly everything in memory already. */
static void test_readahead(void)
{
    BaleStoreStats stats;
    Fixture f;

    fixture_init(&f, 4 * CACHED);
    bale_store_reset_stats(f.store);
    scan(&f);
    bale_store_get_stats(f.store, &stats);
    g_assert_cmpuint(stats.readahead, >, 0);
    g_assert_cmpuint(stats.readahead_hits, >=, CLUSTERS / 2);

    /* And a random one reads nothing ahead. */
    bale_store_reset_stats(f.store);
    for (uint32_t i = 0; i < CLUSTERS; i++) {
        get(&f, i * 1021 % CLUSTERS, 0);
    }
    bale_store_get_stats(f.store, &stats);
    g_assert_cmpuint(stats.readahead, <=, 16);
    fixture_close(&f);
}

static void test_resize(void)
{
    static const uint32_t sizes[] = { 0, 1, 2, 7, 63, 128, 1024, 5, 0, 300 };
    Fixture f;

    fixture_init(&f, 0);
    for (unsigned i = 0; i < G_N_ELEMENTS(sizes); i++) {
        uint64_t before;

        bale_store_set_cache_size(f.store, (uint64_t)sizes[i] * CLUSTER);
        for (uint32_t n = 0; n < 200; n++) {
            g_assert_cmpuint(get(&f, n * 7, 0), ==, 1);
        }
        before = hits(&f);
        g_assert_cmpuint(get(&f, 199 * 7, 1), ==, 1);
        g_assert_cmpuint(hits(&f) - before, ==, sizes[i] > 0);
    }
    fixture_close(&f);
}

typedef struct Reader {
    Fixture *f;
    uint32_t first, count;
    int *stop;
    uint64_t reads;
} Reader;

/* Nothing older than what was written when the read began. */
static void *reader_main(void *opaque)
{
    Reader *r = opaque;
    uint32_t n = 0;

    while (!__atomic_load_n(r->stop, __ATOMIC_RELAXED)) {
        uint32_t cluster = r->first + n++ % r->count;
        uint32_t least = __atomic_load_n(&r->f->generation[cluster],
                                         __ATOMIC_ACQUIRE);

        g_assert_cmpuint(get(r->f, cluster, n % 32), >=, least);
        r->reads++;
    }
    return NULL;
}

/* Readers of cached clusters, against writes, compaction and new sizes. */
static void test_superseded(void)
{
    enum { HOT = 64, READERS = 2, ROUNDS = 60 };
    g_autoptr(GError) err = NULL;
    BaleCompactOptions compact = { 0 };
    pthread_t threads[READERS];
    Reader readers[READERS];
    int stop = 0;
    Fixture f;

    fixture_init(&f, CACHED);
    for (int i = 0; i < READERS; i++) {
        readers[i] = (Reader){ &f, 100, HOT, &stop, 0 };
        pthread_create(&threads[i], NULL, reader_main, &readers[i]);
    }
    for (uint32_t round = 2; round < ROUNDS; round++) {
        for (uint32_t i = 0; i < HOT; i++) {
            put(&f, 100 + i, round);
        }
        if (round % 10 == 0) {
            /* Pages are freed and used anew: addresses come back. */
            g_assert_cmpint(bale_store_flush_sync(f.store), ==, 0);
            g_assert_true(bale_store_compact(f.store, &compact, &err));
            g_assert_no_error(err);
        }
        if (round % 15 == 0) {
            bale_store_set_cache_size(f.store,
                                      (CACHED + round % 2) * CLUSTER);
        }
    }
    __atomic_store_n(&stop, 1, __ATOMIC_RELAXED);
    for (int i = 0; i < READERS; i++) {
        pthread_join(threads[i], NULL);
    }
    for (uint32_t i = 0; i < HOT; i++) {
        g_assert_cmpuint(get(&f, 100 + i, 7), ==, ROUNDS - 1);
    }
    fixture_close(&f);
}

/* Compaction does not cost what is cached. */
static void test_compaction_keeps(void)
{
    g_autoptr(GError) err = NULL;
    BaleCompactOptions compact = { 0 };
    BaleStoreStats stats;
    uint64_t before;
    Fixture f;

    fixture_init(&f, CACHED);
    for (uint32_t i = 0; i < CLUSTERS; i++) {
        if (i % 40) {
            put(&f, i, 2);
        }
    }
    g_assert_cmpint(bale_store_flush_sync(f.store), ==, 0);
    for (uint32_t i = 0; i < CLUSTERS; i += 40) {
        g_assert_cmpuint(get(&f, i, 0), ==, 1);
    }
    g_assert_true(bale_store_compact(f.store, &compact, &err));
    g_assert_no_error(err);
    bale_store_get_stats(f.store, &stats);
    g_assert_cmpuint(stats.compacted_records, >, 0);
    before = hits(&f);
    for (uint32_t i = 0; i < CLUSTERS; i += 40) {
        g_assert_cmpuint(get(&f, i, 9), ==, 1);
    }
    g_assert_cmpuint(hits(&f) - before, ==, (CLUSTERS + 39) / 40);
    fixture_close(&f);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/cache/scan-resistance", test_scan_resistance);
    g_test_add_func("/cache/hot-set-moves", test_hot_set_moves);
    g_test_add_func("/cache/readahead", test_readahead);
    g_test_add_func("/cache/resize", test_resize);
    g_test_add_func("/cache/superseded-is-never-served", test_superseded);
    g_test_add_func("/cache/compaction-keeps", test_compaction_keeps);
    return g_test_run();
}
