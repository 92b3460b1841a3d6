/*
 * The statistics of a store belong together: regions in order and never going
 * back, pages that add up, counters of what was done and nothing else.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <string.h>

#include "stores.h"

#define CLUSTER 16384u
#define IMAGE_SIZE (16u << 20)

typedef struct Fixture {
    BaleSimOptions sim;
    BaleStore *store;
    BaleImage *image;
    BaleStoreStats last;
} Fixture;

static void fixture_init(Fixture *f, uint64_t cache_size)
{
    BaleCreateOptions create = {
        .size = IMAGE_SIZE,
        .page_size = 2u << 20,
        .cluster_size = CLUSTER,
        .codec = BALE_CODEC_ZSTD,
    };
    BaleOpenOptions open = { .workers = 2, .cache_size = cache_size };

    memset(f, 0, sizeof(*f));
    f->sim.no_history = true;
    f->store = test_store_open(test_store_new(&f->sim, &create), &open, NULL,
                               &f->image);
}

static void fixture_close(Fixture *f)
{
    test_store_close(f->store, f->image);
}

static uint64_t sum(const uint64_t *buckets)
{
    uint64_t n = 0;

    for (int i = 0; i < BALE_HIST_BUCKETS; i++) {
        n += buckets[i];
    }
    return n;
}

static void check_latency(const BaleLatency *l, const uint64_t *buckets)
{
    g_assert_cmpuint(l->count, ==, sum(buckets));
    g_assert_cmpuint(l->p50, <=, l->p95);
    g_assert_cmpuint(l->p95, <=, l->p99);
    g_assert_cmpuint(l->p99, <=, l->max);
    g_assert_cmpuint(l->mean, <=, l->max);
}

/* What holds at every moment. */
static const BaleStoreStats *check(Fixture *f)
{
    BaleStoreStats before = f->last;
    BaleStoreStats *s = &f->last;
    BaleBucketStats all = { 0 };

    bale_store_get_stats(f->store, s);
    g_assert_cmpuint(s->durable_bytes, <=, s->stable_bytes);
    g_assert_cmpuint(s->stable_bytes, <=, s->sealed_bytes);
    g_assert_cmpuint(s->sealed_bytes, <=, s->tail_bytes);
    g_assert_cmpuint(before.durable_bytes, <=, s->durable_bytes);
    g_assert_cmpuint(before.stable_bytes, <=, s->stable_bytes);
    g_assert_cmpuint(before.sealed_bytes, <=, s->sealed_bytes);
    g_assert_cmpuint(before.tail_bytes, <=, s->tail_bytes);

    for (int i = 0; i < BALE_STATS_BUCKETS; i++) {
        all.pages += s->buckets[i].pages;
        all.live_bytes += s->buckets[i].live_bytes;
        all.dead_bytes += s->buckets[i].dead_bytes;
    }
    g_assert_cmpuint(all.pages, ==,
                     s->pages_active + s->pages_sealed + s->pages_freeing);
    g_assert_cmpuint(all.live_bytes, ==, s->live_bytes);
    g_assert_cmpuint(all.dead_bytes, ==, s->dead_bytes);
    g_assert_cmpuint(s->overhead_bytes, <=, s->dead_bytes);
    g_assert_cmpuint(s->padding_bytes, <=, s->segment_bytes);
    g_assert_cmpuint(s->cache_bytes, <=, s->cache_max_bytes);
    g_assert_cmpuint(s->index_bytes, <=, s->index_peak_bytes);
    g_assert_cmpuint(s->workers, ==, 2);
    check_latency(&s->read_latency, s->read_ns);
    check_latency(&s->write_latency, s->write_ns);
    check_latency(&s->flush_latency, s->flush_ns);
    return s;
}

static void fill(uint8_t *buf, uint32_t n)
{
    for (uint32_t i = 0; i < CLUSTER; i++) {
        buf[i] = (uint8_t)((i * n) >> 7);
    }
}

static void test_counters(void)
{
    g_autofree uint8_t *buf = g_malloc(CLUSTER);
    const BaleStoreStats *s;
    Fixture f;

    fixture_init(&f, 1u << 20);
    check(&f);
    for (uint32_t i = 0; i < 100; i++) {
        fill(buf, i + 1);
        g_assert_cmpint(bale_image_write_sync(f.image, (uint64_t)i * CLUSTER,
                                              buf, CLUSTER, 0), ==, 0);
        check(&f);
    }
    g_assert_cmpint(bale_image_write_sync(f.image, 200 * CLUSTER, buf, 512,
                                          0), ==, 0);
    s = check(&f);
    g_assert_cmpuint(s->writes, ==, 101);
    g_assert_cmpuint(s->write_latency.count, ==, 101);
    g_assert_cmpuint(s->write_bytes, ==, 100 * CLUSTER + 512);
    g_assert_cmpuint(s->logical_bytes, ==, 100 * CLUSTER);
    g_assert_cmpuint(s->mutable_clusters, ==, 1);
    g_assert_cmpuint(s->mutable_bytes, ==, 512);
    g_assert_cmpuint(s->index_entries, ==, 100);

    g_assert_cmpint(bale_store_flush_sync(f.store), ==, 0);
    s = check(&f);
    /* Saved as a patch, the cluster stays. */
    g_assert_cmpuint(s->mutable_bytes, ==, 512);
    g_assert_cmpuint(s->patches, ==, 1);
    g_assert_cmpuint(s->patches_live, ==, 1);
    g_assert_cmpuint(s->patches_live_bytes, ==, 64 + 512);
    g_assert_cmpuint(s->durable_bytes, ==, s->sealed_bytes);
    g_assert_cmpuint(s->durable_bytes, >, 0);
    g_assert_cmpuint(s->segment_bytes, >=, s->stored_bytes);
    g_assert_cmpuint(s->write_amplification_permille, >=, 1000);
    g_assert_cmpuint(s->flush_latency.count, ==, 1);
    test_store_checkpoint(f.store);
    s = check(&f);
    g_assert_cmpuint(s->mutable_bytes, ==, 0);
    g_assert_cmpuint(s->patches_live, ==, 0);
    g_assert_cmpuint(s->logical_bytes, ==, 101 * CLUSTER);
    g_assert_cmpuint(s->index_entries, ==, 101);
    g_assert_cmpuint(s->writes_in_flight, ==, 0);
    g_assert_cmpuint(s->write_buffers_in_flight, ==, 0);

    /* Reading does not move the log. */
    for (uint32_t i = 0; i < 100; i++) {
        g_assert_cmpint(bale_image_read_sync(f.image, (uint64_t)i * CLUSTER,
                                             buf, 512), ==, 0);
    }
    s = check(&f);
    g_assert_cmpuint(s->reads, ==, 100);
    g_assert_cmpuint(s->read_latency.count, ==, 100);
    g_assert_cmpuint(s->reads_in_flight, ==, 0);
    g_assert_cmpuint(s->cache_hits + s->cache_misses, ==, 100);

    /* Garbage is seen as such. */
    for (uint32_t i = 0; i < 100; i++) {
        fill(buf, i + 7);
        g_assert_cmpint(bale_image_write_sync(f.image, (uint64_t)i * CLUSTER,
                                              buf, CLUSTER, 0), ==, 0);
    }
    g_assert_cmpuint(check(&f)->index_entries, ==, 101);
    fixture_close(&f);
}

/* A reset forgets what happened, not what is. */
static void test_reset(void)
{
    g_autofree uint8_t *buf = g_malloc(CLUSTER);
    BaleStoreStats before;
    const BaleStoreStats *s;
    Fixture f;

    fixture_init(&f, 1u << 20);
    for (uint32_t i = 0; i < 20; i++) {
        fill(buf, i + 1);
        g_assert_cmpint(bale_image_write_sync(f.image, (uint64_t)i * CLUSTER,
                                              buf, CLUSTER, 0), ==, 0);
    }
    g_assert_cmpint(bale_store_flush_sync(f.store), ==, 0);
    before = *check(&f);
    bale_store_reset_stats(f.store);
    s = check(&f);
    g_assert_cmpuint(s->writes, ==, 0);
    g_assert_cmpuint(s->segment_bytes, ==, 0);
    g_assert_cmpuint(s->write_latency.count, ==, 0);
    g_assert_cmpuint(s->durable_bytes, ==, before.durable_bytes);
    g_assert_cmpuint(s->live_bytes, ==, before.live_bytes);
    g_assert_cmpuint(s->index_entries, ==, 20);

    g_assert_cmpint(bale_image_write_sync(f.image, 0, buf, CLUSTER, 0), ==,
                    0);
    g_assert_cmpint(bale_store_flush_sync(f.store), ==, 0);
    g_assert_cmpuint(check(&f)->writes, ==, 1);
    fixture_close(&f);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/stats/counters", test_counters);
    g_test_add_func("/stats/reset", test_reset);
    return g_test_run();
}
