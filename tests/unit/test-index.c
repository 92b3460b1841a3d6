/*
 * Hash index, one thread: it behaves like a plain map, whatever it does inside
 *
 * BALE_SEED=<number> repeats a random run.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "util/index.h"

#include <errno.h>
#include <stdlib.h>

#include "../../util/index-internal.h"

static GRand *random_new(void)
{
    const char *env = g_getenv("BALE_SEED");
    uint32_t seed = env ? strtoul(env, NULL, 0) : g_random_int();

    g_test_message("BALE_SEED=%u", seed);
    return g_rand_new_with_seed(seed);
}

static uint64_t random_below(GRand *rand, uint64_t end)
{
    uint64_t n = (uint64_t)g_rand_int(rand) << 32 | g_rand_int(rand);

    return n % end;
}

static void grow_completely(BaleIndex *index)
{
    while (bale_index_grow_step(index)) {
        /* The next chunk. */
    }
}

/* The model: a GHashTable of the same pairs. */
typedef struct Model {
    GHashTable *map;
    uint64_t visited;
} Model;

static uint64_t model_get(GHashTable *map, uint64_t key)
{
    return (uintptr_t)g_hash_table_lookup(map, (gpointer)(uintptr_t)key);
}

static void model_put(GHashTable *map, uint64_t key, uint64_t value)
{
    if (value) {
        g_hash_table_insert(map, (gpointer)(uintptr_t)key,
                            (gpointer)(uintptr_t)value);
    } else {
        g_hash_table_remove(map, (gpointer)(uintptr_t)key);
    }
}

static bool model_visit(uint64_t key, uint64_t value, void *opaque)
{
    Model *model = opaque;

    g_assert_cmpuint(model_get(model->map, key), ==, value);
    model->visited++;
    return true;
}

static void add_value(uint64_t value, void *opaque)
{
    *(uint64_t *)opaque += value;
}

static void assert_same(BaleIndex *index, GHashTable *map)
{
    Model model = { .map = map };
    uint64_t sum = 0, visited_sum = 0;
    BaleIndexStats stats;
    GHashTableIter iter;
    gpointer k, v;

    g_assert_true(bale_index_check(index));
    bale_index_get_stats(index, &stats);
    g_assert_cmpuint(stats.keys, ==, g_hash_table_size(map));
    /* Every visit is right, and there are as many as keys, ... */
    g_assert_true(bale_index_foreach(index, model_visit, &model));
    g_assert_cmpuint(model.visited, ==, g_hash_table_size(map));
    /* ... and every key is found: so each one was visited once. */
    g_hash_table_iter_init(&iter, map);
    while (g_hash_table_iter_next(&iter, &k, &v)) {
        g_assert_cmpuint(bale_index_find(index, (uintptr_t)k), ==,
                         (uintptr_t)v);
        sum += (uintptr_t)v;
    }
    bale_index_foreach_value(index, add_value, &visited_sum);
    g_assert_cmpuint(visited_sum, ==, sum);
}

static void test_update_semantics(void)
{
    g_autoptr(BaleEpoch) e = bale_epoch_new();
    g_autoptr(BaleIndex) index = bale_index_new(24, 0, e);
    uint64_t current = 99;

    g_assert_cmpuint(bale_index_find(index, 5), ==, 0);
    g_assert_cmpint(bale_index_update(index, 5, 1, 2, &current), ==, -EAGAIN);
    g_assert_cmpuint(current, ==, 0);
    g_assert_cmpint(bale_index_update(index, 5, 0, 0, &current), ==, 0);
    g_assert_cmpint(bale_index_update(index, 5, 1, 0, &current), ==, -EAGAIN);
    g_assert_cmpint(bale_index_update(index, 5, 0, 7, &current), ==, 0);
    g_assert_cmpuint(current, ==, 0);
    g_assert_cmpint(bale_index_update(index, 5, 0, 8, &current), ==, -EAGAIN);
    g_assert_cmpuint(current, ==, 7);
    g_assert_cmpint(bale_index_update(index, 5, 0, 0, &current), ==, -EAGAIN);
    g_assert_cmpint(bale_index_update(index, 5, 7, BALE_INDEX_VALUE_MAX,
                                      NULL), ==, 0);
    g_assert_cmpuint(bale_index_find(index, 5), ==, BALE_INDEX_VALUE_MAX);
    g_assert_cmpuint(bale_index_find(index, 4), ==, 0);
    g_assert_cmpint(bale_index_update(index, 5, BALE_INDEX_VALUE_MAX, 0,
                                      &current), ==, 0);
    g_assert_cmpuint(current, ==, BALE_INDEX_VALUE_MAX);
    g_assert_cmpuint(bale_index_find(index, 5), ==, 0);
    g_assert_true(bale_index_check(index));
}

static void test_set_semantics(void)
{
    g_autoptr(BaleEpoch) e = bale_epoch_new();
    g_autoptr(BaleIndex) index = bale_index_new(24, 0, e);
    uint64_t old = 99;

    g_assert_cmpint(bale_index_set(index, 5, 0, &old), ==, 0);
    g_assert_cmpuint(old, ==, 0);
    g_assert_cmpint(bale_index_set(index, 5, 3, &old), ==, 0);
    g_assert_cmpuint(old, ==, 0);
    g_assert_cmpint(bale_index_set(index, 5, 4, &old), ==, 0);
    g_assert_cmpuint(old, ==, 3);
    g_assert_cmpint(bale_index_set(index, 5, 4, &old), ==, 0);
    g_assert_cmpuint(old, ==, 4);
    g_assert_cmpint(bale_index_set(index, 5, 0, NULL), ==, 0);
    g_assert_cmpuint(bale_index_find(index, 5), ==, 0);
    g_assert_true(bale_index_check(index));
}

/* Every key space up to a million keys: each key has an entry of its own. */
static void test_full_key_spaces(void)
{
    for (unsigned key_bits = 1; key_bits <= 17; key_bits++) {
        g_autoptr(BaleEpoch) e = bale_epoch_new();
        g_autoptr(BaleIndex) index = bale_index_new(key_bits, 0, e);
        uint64_t keys = UINT64_C(1) << key_bits;
        BaleIndexStats stats;

        for (uint64_t k = 0; k < keys; k++) {
            g_assert_cmpint(bale_index_update(index, k, 0, k + 1, NULL), ==,
                            0);
        }
        g_assert_true(bale_index_check(index));
        for (uint64_t k = 0; k < keys; k++) {
            g_assert_cmpuint(bale_index_find(index, k), ==, k + 1);
        }
        grow_completely(index);
        g_assert_true(bale_index_check(index));
        bale_index_get_stats(index, &stats);
        g_assert_cmpuint(stats.keys, ==, keys);
        bale_epoch_drain(e);
    }
}

/* The widest key spaces: first, last and scattered keys. */
static void test_wide_key_spaces(void)
{
    for (unsigned key_bits = 18; key_bits <= BALE_INDEX_KEY_BITS_MAX;
         key_bits += 2) {
        g_autoptr(BaleEpoch) e = bale_epoch_new();
        g_autoptr(BaleIndex) index = bale_index_new(key_bits, 0, e);
        g_autoptr(GHashTable) map = g_hash_table_new(NULL, NULL);
        uint64_t end = UINT64_C(1) << key_bits;

        for (uint64_t k = 1; k != 0 && k < end; k <<= 1) {
            for (uint64_t d = 0; d < 2; d++) {
                bale_index_set(index, k - d, k, NULL);
                model_put(map, k - d, k);
            }
        }
        bale_index_set(index, end - 1, 3, NULL);
        model_put(map, end - 1, 3);
        assert_same(index, map);
        g_assert_cmpuint(bale_index_remove_from(index, 0, NULL, NULL), ==,
                         g_hash_table_size(map));
        g_hash_table_remove_all(map);
        assert_same(index, map);
    }
}

/*
 * Random operations against the model.  Phases with more insertions than
 * removals, and the other way round, make it grow and shrink.
 */
static void random_operations(unsigned key_bits, uint64_t expected,
                              unsigned operations)
{
    g_autoptr(GRand) rand = random_new();
    g_autoptr(BaleEpoch) e = bale_epoch_new();
    g_autoptr(BaleIndex) index = bale_index_new(key_bits, expected, e);
    g_autoptr(GHashTable) map = g_hash_table_new(NULL, NULL);
    uint64_t end = UINT64_C(1) << key_bits;

    for (unsigned i = 0; i < operations; i++) {
        bool filling = i % (operations / 2) < operations / 4;
        uint64_t key = random_below(rand, end);
        uint64_t have = model_get(map, key);
        uint64_t value = random_below(rand, BALE_INDEX_VALUE_MAX) + 1;
        uint64_t seen = 0;

        switch (random_below(rand, 8)) {
        case 0:
            g_assert_cmpuint(bale_index_find(index, key), ==, have);
            break;
        case 1:
            value = filling ? value : 0;
            g_assert_cmpint(bale_index_update(index, key, have, value, &seen),
                            ==, 0);
            g_assert_cmpuint(seen, ==, have);
            model_put(map, key, value);
            break;
        case 2:
            if (value != have) {
                g_assert_cmpint(bale_index_update(index, key, value, 1,
                                                  &seen), ==, -EAGAIN);
                g_assert_cmpuint(seen, ==, have);
            }
            break;
        case 3:
            if (i % 64 == 0) {
                bale_index_grow_step(index);
            }
            if (i % 1024 == 0) {
                bale_epoch_poll(e);
            }
            break;
        default:
            value = filling ? value : 0;
            g_assert_cmpint(bale_index_set(index, key, value, &seen), ==, 0);
            g_assert_cmpuint(seen, ==, have);
            model_put(map, key, value);
            break;
        }
        if (i % (operations / 16) == 0) {
            assert_same(index, map);
        }
    }
    assert_same(index, map);
    grow_completely(index);
    assert_same(index, map);
}

static void test_random_tiny(void)
{
    random_operations(6, 0, 20000);
}

static void test_random_dense(void)
{
    random_operations(14, 0, 400000);
}

static void test_random_segments(void)
{
    random_operations(23, 0, 400000);
}

static void test_random_wide(void)
{
    random_operations(34, 0, 20000);
}

static void test_random_sized_in_advance(void)
{
    random_operations(16, 60000, 200000);
}

static void test_grows_and_shrinks(void)
{
    g_autoptr(BaleEpoch) e = bale_epoch_new();
    g_autoptr(BaleIndex) index = bale_index_new(20, 0, e);
    BaleIndexStats small, large, again;

    bale_index_set(index, 0, 1, NULL);
    bale_index_get_stats(index, &small);
    for (uint64_t k = 0; k < 200000; k++) {
        bale_index_set(index, k * 5, k + 1, NULL);
    }
    grow_completely(index);
    bale_epoch_drain(e);
    g_assert_true(bale_index_check(index));
    bale_index_get_stats(index, &large);
    g_assert_cmpuint(large.growths, >=, 8);
    g_assert_false(large.growing);
    g_assert_cmpuint(large.retired_bytes, ==, 0);
    g_assert_cmpuint(large.keys, ==, 200000);
    for (uint64_t k = 0; k < 200000; k++) {
        g_assert_cmpuint(bale_index_find(index, k * 5), ==, k + 1);
    }

    g_assert_cmpuint(bale_index_remove_from(index, 5, NULL, NULL), ==, 199999);
    grow_completely(index);
    bale_epoch_drain(e);
    g_assert_true(bale_index_check(index));
    bale_index_get_stats(index, &again);
    g_assert_cmpuint(again.keys, ==, 1);
    g_assert_cmpuint(again.shrinks, >=, 8);
    /* The same table; a slab of overflow buckets may have been begun. */
    g_assert_cmpuint(again.buckets, ==, small.buckets);
    g_assert_cmpuint(again.bytes, <, small.bytes + 8192);
    g_assert_cmpuint(bale_index_find(index, 0), ==, 1);
}

/* Entries of 14 bytes and less, whatever the pattern of the keys. */
static void test_memory_per_key(void)
{
    static const struct {
        unsigned key_bits;
        uint64_t step;
        uint64_t expected;
    } cases[] = {
        { 20, 1, 0 }, { 20, 1, 500000 }, { 21, 3, 0 }, { 22, 8, 500000 },
        { 24, 16, 0 }, { 24, 33, 500000 }, { 26, 127, 0 },
    };

    for (unsigned c = 0; c < G_N_ELEMENTS(cases); c++) {
        g_autoptr(BaleEpoch) e = bale_epoch_new();
        g_autoptr(BaleIndex) index = bale_index_new(cases[c].key_bits,
                                                    cases[c].expected, e);
        BaleIndexStats stats;

        for (uint64_t k = 0; k < 500000; k++) {
            bale_index_set(index, k * cases[c].step, 1, NULL);
        }
        grow_completely(index);
        bale_epoch_drain(e);
        bale_index_get_stats(index, &stats);
        g_test_message("%u bits, step %" G_GUINT64_FORMAT ", expected %"
                       G_GUINT64_FORMAT ": %.2f bytes per key, load %.2f, "
                       "peak %.2f", cases[c].key_bits, cases[c].step,
                       cases[c].expected, stats.bytes / 5e5,
                       5e5 / stats.buckets, stats.peak_bytes / 5e5);
        g_assert_cmpuint(stats.keys, ==, 500000);
        g_assert_cmpuint(stats.bytes, <=, UINT64_C(16) * 500000);
    }
}

/* Keys that come and go for long leave overflow buckets; they are tidied. */
static void test_churn_keeps_memory(void)
{
    g_autoptr(GRand) rand = random_new();
    g_autoptr(BaleEpoch) e = bale_epoch_new();
    g_autoptr(BaleIndex) index = bale_index_new(18, 0, e);
    g_autofree uint64_t *keys = g_new0(uint64_t, 20000);
    BaleIndexStats stats;

    for (unsigned i = 0; i < 1000000; i++) {
        unsigned n = random_below(rand, 20000);

        if (keys[n]) {
            g_assert_cmpint(bale_index_set(index, keys[n] - 1, 0, NULL), ==,
                            0);
        }
        do {
            keys[n] = random_below(rand, 1 << 18) + 1;
        } while (bale_index_update(index, keys[n] - 1, 0, n + 1, NULL) != 0);
        bale_epoch_poll(e);
    }
    grow_completely(index);
    bale_epoch_drain(e);
    g_assert_true(bale_index_check(index));
    bale_index_get_stats(index, &stats);
    g_test_message("%.2f bytes per key, %" G_GUINT64_FORMAT " rebuilds",
                   (double)stats.bytes / stats.keys, stats.rebuilds);
    g_assert_cmpuint(stats.rebuilds, >, 0);
    /* The fixed part (scratch, segments) does not count. */
    g_assert_cmpuint((stats.buckets + stats.overflow_buckets) * 64, <=,
                     stats.keys * 17);
}

static bool stop_at_tenth(uint64_t key, uint64_t value, void *opaque)
{
    return ++*(unsigned *)opaque < 10;
}

static void test_walk_stops(void)
{
    g_autoptr(BaleEpoch) e = bale_epoch_new();
    g_autoptr(BaleIndex) index = bale_index_new(24, 0, e);
    unsigned visits = 0;

    for (uint64_t k = 0; k < 100; k++) {
        bale_index_set(index, k * 100000, 1, NULL);
    }
    g_assert_false(bale_index_foreach(index, stop_at_tenth, &visits));
    g_assert_cmpuint(visits, ==, 10);
}

typedef struct Range {
    uint64_t first;
    uint64_t last;
    uint64_t keys;
} Range;

static bool visit_in_range(uint64_t key, uint64_t value, void *opaque)
{
    Range *range = opaque;

    g_assert_cmpuint(key, >=, range->first);
    g_assert_cmpuint(key, <=, range->last);
    g_assert_cmpuint(value, ==, key + 1);
    range->keys++;
    return true;
}

static void test_walk_range(void)
{
    g_autoptr(BaleEpoch) e = bale_epoch_new();
    g_autoptr(BaleIndex) index = bale_index_new(22, 0, e);
    static const uint64_t edges[] = {
        0, 1, 1048575, 1048576, 1048577, 2500000, 4194303,
    };

    for (uint64_t k = 0; k < 4194304; k += 16) {
        bale_index_set(index, k, k + 1, NULL);
    }
    for (unsigned a = 0; a < G_N_ELEMENTS(edges); a++) {
        for (unsigned b = a; b < G_N_ELEMENTS(edges); b++) {
            Range range = { edges[a], edges[b], 0 };

            bale_index_foreach_range(index, edges[a], edges[b],
                                     visit_in_range, &range);
            g_assert_cmpuint(range.keys, ==,
                             edges[b] / 16 - (edges[a] + 15) / 16 + 1);
        }
    }
    g_assert_true(bale_index_foreach_range(index, 5, 4, stop_at_tenth, NULL));
}

static bool sum_removed(uint64_t key, uint64_t value, void *opaque)
{
    Range *range = opaque;

    g_assert_cmpuint(key, >=, range->first);
    g_assert_cmpuint(value, ==, key + 1);
    range->keys++;
    return false;           /* is ignored */
}

static void test_remove_from(void)
{
    g_autoptr(BaleEpoch) e = bale_epoch_new();
    g_autoptr(BaleIndex) index = bale_index_new(22, 0, e);
    Range range = { .first = 1500000 };

    for (uint64_t k = 0; k < 30000; k++) {
        bale_index_set(index, k * 100, k * 100 + 1, NULL);
    }
    g_assert_cmpuint(bale_index_remove_from(index, 1500000, sum_removed,
                                            &range), ==, 15000);
    g_assert_cmpuint(range.keys, ==, 15000);
    for (uint64_t k = 0; k < 30000; k++) {
        g_assert_cmpuint(bale_index_find(index, k * 100), ==,
                         k < 15000 ? k * 100 + 1 : 0);
    }
    g_assert_true(bale_index_check(index));
    g_assert_cmpuint(bale_index_remove_from(index, UINT64_MAX, NULL, NULL),
                     ==, 0);
}

static void test_histogram_counts_all(void)
{
    g_autoptr(BaleEpoch) e = bale_epoch_new();
    g_autoptr(BaleIndex) index = bale_index_new(20, 0, e);
    uint64_t histogram[BALE_INDEX_HISTOGRAM_SIZE];
    uint64_t buckets = 0, keys = 0;
    BaleIndexStats stats;

    for (uint64_t k = 0; k < 50000; k++) {
        bale_index_set(index, k, 1, NULL);
    }
    grow_completely(index);
    bale_index_get_stats(index, &stats);
    bale_index_get_histogram(index, histogram);
    for (unsigned i = 0; i < BALE_INDEX_HISTOGRAM_SIZE; i++) {
        g_test_message("%u: %" G_GUINT64_FORMAT, i, histogram[i]);
        buckets += histogram[i];
        keys += histogram[i] * i;
    }
    g_assert_cmpuint(buckets, ==, stats.buckets);
    g_assert_cmpuint(keys + histogram[BALE_INDEX_HISTOGRAM_SIZE - 1] * 16, >=,
                     50000);
}

/* One key in @density of @n from @first on, all others absent. */
static void check_load(unsigned key_bits, uint64_t first, uint64_t n,
                       unsigned density)
{
    g_autoptr(BaleEpoch) e = bale_epoch_new();
    g_autoptr(BaleIndex) index = bale_index_new(key_bits, 0, e);
    g_autofree uint64_t *values = g_new0(uint64_t, n);
    g_autoptr(GRand) rand = random_new();
    uint64_t group = bale_index_load_keys(index), keys = 0;
    uint64_t begin = first / group * group;
    BaleIndexStats stats;

    for (uint64_t i = 0; i < n; i++) {
        if (random_below(rand, density) == 0) {
            values[i] = BALE_INDEX_VALUE_MAX - i;
            keys++;
        }
    }
    g_assert_cmpint(bale_index_load(index, first, values, n), ==, 0);
    g_assert_true(bale_index_check(index));
    bale_index_get_stats(index, &stats);
    g_assert_cmpuint(stats.keys, ==, keys);
    for (uint64_t key = begin; key < begin + group; key++) {
        uint64_t value = key >= first && key - first < n ? values[key - first]
                                                         : 0;

        g_assert_cmpuint(bale_index_find(index, key), ==, value);
    }
    /* It can be used like any other. */
    for (uint64_t i = 0; i < n; i += 3) {
        uint64_t old;

        g_assert_cmpint(bale_index_set(index, first + i, i + 1, &old), ==, 0);
        g_assert_cmpuint(old, ==, values[i]);
    }
    grow_completely(index);
    g_assert_true(bale_index_check(index));
}

static void test_load(void)
{
    static const unsigned densities[] = { 1, 2, 5, 9, 100 };

    for (unsigned i = 0; i < G_N_ELEMENTS(densities); i++) {
        check_load(10, 0, 1024, densities[i]);
        check_load(13, 100, 7000, densities[i]);
        check_load(22, (3u << 20) + 5, 16384 * 5 + 1, densities[i]);
    }
    check_load(1, 0, 2, 1);
    check_load(21, 1 << 20, 1 << 20, 1);
    check_load(21, 0, 1 << 20, 3);
}

/*
 * At every possible point, memory runs out for a while: an insertion fails
 * cleanly or works, nothing is lost, and all is well afterwards.
 */
static void test_no_memory(void)
{
    unsigned failed = 0, failures = 0;

    for (long allowed = 0; allowed < 60; allowed++) {
        g_autoptr(BaleEpoch) e = bale_epoch_new();
        g_autoptr(GHashTable) map = g_hash_table_new(NULL, NULL);
        BaleIndexStats stats;
        BaleIndex *index;

        atomic_store(&bale_index_test_allocations, allowed);
        index = bale_index_new(16, 0, e);
        if (!index) {
            g_assert_cmpint(allowed, <, 3);
            atomic_store(&bale_index_test_allocations, -1);
            continue;
        }
        for (uint64_t k = 0; k < 40000; k++) {
            uint64_t old = 77;
            int ret = bale_index_set(index, k, k + 1, &old);

            g_assert_true(ret == 0 || ret == -ENOMEM);
            g_assert_cmpuint(old, ==, ret == 0 ? 0 : 77);
            if (ret == 0) {
                model_put(map, k, k + 1);
            } else {
                failed++;
            }
            if (k % 5000 == 4999) {
                /* A little more, to fail somewhere else. */
                assert_same(index, map);
                atomic_fetch_add(&bale_index_test_allocations, 1);
            }
            if (k % 7 == 3) {
                /* Removing works without memory. */
                g_assert_cmpint(bale_index_set(index, k - 3, 0, NULL), ==, 0);
                model_put(map, k - 3, 0);
            }
        }
        bale_index_get_stats(index, &stats);
        failures += stats.allocation_failures;
        assert_same(index, map);
        atomic_store(&bale_index_test_allocations, -1);
        grow_completely(index);
        for (uint64_t k = 0; k < 40000; k++) {
            g_assert_cmpint(bale_index_set(index, k, k + 1, NULL), ==, 0);
            model_put(map, k, k + 1);
        }
        grow_completely(index);
        assert_same(index, map);
        bale_index_free(index);
    }
    g_test_message("%u insertions failed, %u allocations", failed, failures);
    g_assert_cmpuint(failed, >, 0);
}

/* An index may be freed in the middle of a growth, or with tables retired. */
static void test_free_while_growing(void)
{
    g_autoptr(BaleEpoch) e = bale_epoch_new();
    BaleIndex *index = bale_index_new(20, 0, e);
    BaleIndexStats stats;
    uint64_t k = 0;

    do {
        bale_index_set(index, k++, 1, NULL);
        bale_index_get_stats(index, &stats);
    } while (!stats.growing || stats.growing_done == 0);
    g_assert_true(bale_index_check(index));
    bale_index_free(index);
    bale_epoch_drain(e);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/index/update-semantics", test_update_semantics);
    g_test_add_func("/index/set-semantics", test_set_semantics);
    g_test_add_func("/index/full-key-spaces", test_full_key_spaces);
    g_test_add_func("/index/wide-key-spaces", test_wide_key_spaces);
    g_test_add_func("/index/random-tiny", test_random_tiny);
    g_test_add_func("/index/random-dense", test_random_dense);
    g_test_add_func("/index/random-segments", test_random_segments);
    g_test_add_func("/index/random-wide", test_random_wide);
    g_test_add_func("/index/random-sized-in-advance",
                    test_random_sized_in_advance);
    g_test_add_func("/index/grows-and-shrinks", test_grows_and_shrinks);
    g_test_add_func("/index/memory-per-key", test_memory_per_key);
    g_test_add_func("/index/churn-keeps-memory", test_churn_keeps_memory);
    g_test_add_func("/index/walk-stops", test_walk_stops);
    g_test_add_func("/index/walk-range", test_walk_range);
    g_test_add_func("/index/remove-from", test_remove_from);
    g_test_add_func("/index/histogram-counts-all", test_histogram_counts_all);
    g_test_add_func("/index/load", test_load);
    g_test_add_func("/index/no-memory", test_no_memory);
    g_test_add_func("/index/free-while-growing", test_free_while_growing);
    return g_test_run();
}
