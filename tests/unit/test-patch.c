/*
 * Patches: what a flush of small writes costs, and what is left of it after a
 * kill, a discard, a compaction, damage and a clean close.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <errno.h>
#include <string.h>

#include "../../block/extstore/patch-internal.h"
#include "stores.h"

#define CLUSTER 65536u
#define BLOCK   4096u
#define CLUSTERS 64u

typedef struct Fixture {
    BaleSimOptions sim;
    BaleCreateOptions create;
    BaleOpenOptions open;
    BaleDevice *dev; /* owned by store while that is open */
    BaleStore *store;
    BaleImage *image;
    unsigned complaints;
} Fixture;

static void complain(void *opaque, const char *what)
{
    g_test_message("the store says: %s", what);
    g_atomic_int_inc(&((Fixture *)opaque)->complaints);
}

static void fixture_open(Fixture *f, bool read_only)
{
    f->open.read_only = read_only;
    f->open.workers = 2;
    f->open.damage = complain;
    f->open.notify_opaque = f;
    f->store = test_store_open(f->dev, &f->open, NULL, &f->image);
}

static void fixture_start(Fixture *f, BaleCodec codec)
{
    f->create.size = CLUSTERS * CLUSTER;
    f->create.page_size = 2u << 20;
    f->create.cluster_size = CLUSTER;
    f->create.codec = codec;
    f->sim.no_history = true;
    f->dev = test_store_new(&f->sim, &f->create);
    fixture_open(f, false);
}

static void fixture_init(Fixture *f)
{
    memset(f, 0, sizeof(*f));
    fixture_start(f, BALE_CODEC_ZSTD);
}

static void fixture_close(Fixture *f)
{
    test_store_close(f->store, f->image);
    f->dev = NULL;
}

/* The device as it is now, without and with a close before. */
static void fixture_kill(Fixture *f, bool read_only)
{
    BaleDevice *dev = test_device_copy(f->dev, &f->sim);

    fixture_close(f);
    f->dev = dev;
    fixture_open(f, read_only);
}

static void fixture_reopen(Fixture *f)
{
    test_store_checkpoint(f->store);
    fixture_kill(f, false);
}

static BaleStoreStats fixture_stats(Fixture *f)
{
    BaleStoreStats stats;

    bale_store_get_stats(f->store, &stats);
    return stats;
}

static void put(Fixture *f, uint64_t offset, uint32_t len, uint8_t value)
{
    g_autofree uint8_t *buf = g_malloc(len);

    memset(buf, value, len);
    for (uint32_t i = 0; i + 8 <= len && value; i += 8) {
        memcpy(buf + i, &i, 4); /* no run of one byte */
    }
    g_assert_cmpint(bale_image_write_sync(f->image, offset, buf, len, 0), ==,
                    0);
}

/* The same with what does not compress, but for the byte that check() sees. */
static void put_noise(Fixture *f, uint64_t offset, uint32_t len, uint8_t value)
{
    g_autofree uint8_t *buf = g_malloc(len);
    g_autoptr(GRand) rand = g_rand_new_with_seed(len + value);

    for (uint32_t i = 0; i < len; i++) {
        buf[i] = i % 512 == 4 ? value : g_rand_int(rand);
    }
    g_assert_cmpint(bale_image_write_sync(f->image, offset, buf, len, 0), ==,
                    0);
}

static void flush(Fixture *f)
{
    g_assert_cmpint(bale_store_flush_sync(f->store), ==, 0);
}

/* Does the byte 4 behind @offset have @value?  (See put().) */
static void check(Fixture *f, uint64_t offset, uint8_t value)
{
    uint8_t buf[8];

    g_assert_cmpint(bale_image_read_sync(f->image, offset, buf, 8), ==, 0);
    g_assert_cmpint(buf[4], ==, value);
}

static void check_store(Fixture *f)
{
    BaleCheckResult r;

    g_assert_true(bale_store_check(f->store, BALE_CHECK_DATA, NULL, NULL, &r,
                                   NULL));
    g_assert_cmpuint(r.damaged, ==, 0);
    g_assert_cmpuint(r.wrong_counters, ==, 0);
}

static uint64_t device_bytes(Fixture *f)
{
    BaleDeviceStats stats;

    f->dev->ops->get_stats(f->dev, &stats);
    return stats.store_bytes;
}

/*
 * 4 KiB and a flush cost at most three blocks: on average, and each without the
 * zeroes written ahead.
 */
static void cost(uint32_t ahead_bytes)
{
    uint64_t first, all;
    Fixture f;

    memset(&f, 0, sizeof(f));
    f.open.ahead_bytes = ahead_bytes;
    fixture_start(&f, BALE_CODEC_ZSTD);
    put(&f, 0, CLUSTER, 1);
    flush(&f);
    all = device_bytes(&f);
    for (unsigned i = 0; i < 256; i++) {
        first = device_bytes(&f);
        put(&f, (uint64_t)(i * 7 % CLUSTERS) * CLUSTER + i % 15 * BLOCK,
            BLOCK, i);
        flush(&f);
        if (i < 64 && ahead_bytes == BALE_AHEAD_NONE) {
            g_assert_cmpuint(device_bytes(&f) - first, <=, 3 * BLOCK);
        }
    }
    g_assert_cmpuint(device_bytes(&f) - all, <=, 256 * 3 * BLOCK);
    g_assert_cmpuint(fixture_stats(&f).ahead_bytes > 0, ==,
                     ahead_bytes != BALE_AHEAD_NONE);
    check_store(&f);
    fixture_close(&f);
}

static void test_cost(void)
{
    cost(BALE_AHEAD_NONE);
    cost(0);
    cost(3 * BLOCK);
}

/* The patches of a cluster that is written over and over are bounded. */
static void test_rewrite(void)
{
    Fixture f;

    fixture_init(&f);
    for (unsigned i = 1; i <= 200; i++) {
        put_noise(&f, 8192, BLOCK, i);
        flush(&f);
        g_assert_cmpuint(fixture_stats(&f).patches_live_bytes, <=,
                         2 * CLUSTER);
    }
    g_assert_cmpuint(fixture_stats(&f).logical_bytes, >, 0);
    fixture_kill(&f, false);
    check(&f, 8192, 200);
    check(&f, 0, 0);
    check_store(&f);
    fixture_close(&f);
}

/* 4 KiB that compress fit one block; others stay as they are. */
static void packed(BaleCodec codec, unsigned blocks)
{
    uint64_t before, after[2];
    Fixture f;

    memset(&f, 0, sizeof(f));
    fixture_start(&f, codec);
    put(&f, 0, 512, 1); /* the first segment of a page has its header, too */
    flush(&f);

    for (unsigned i = 0; i < 2; i++) {
        before = device_bytes(&f);
        (i ? put_noise : put)(&f, (1 + i) * CLUSTER + 8192, BLOCK, 2 + i);
        flush(&f);
        after[i] = (device_bytes(&f) - before) / BLOCK;
    }
    g_assert_cmpuint(after[0], ==, blocks);
    g_assert_cmpuint(after[1], ==, 2);
    put(&f, 3 * CLUSTER + 100, 15000, 4);
    put(&f, 4 * CLUSTER + 100, 30000, 5);
    flush(&f);
    fixture_kill(&f, false);
    for (unsigned i = 0; i < 2; i++) {
        check(&f, CLUSTER + 8192, 2);
        check(&f, CLUSTER + 8192 + BLOCK - 8, 2);
        check(&f, CLUSTER + 8192 + BLOCK, 0);
        check(&f, 2 * CLUSTER + 8192, 3);
        check(&f, 2 * CLUSTER + 8192 + 512 * 7, 3);
        check(&f, 3 * CLUSTER + 100, 4);
        check(&f, 4 * CLUSTER + 100, 5);
        check_store(&f);
        fixture_reopen(&f);
    }
    g_assert_cmpuint(f.complaints, ==, 0);
    fixture_close(&f);
}

static void test_packed(void)
{
    packed(BALE_CODEC_ZSTD, 1);
    packed(BALE_CODEC_DEFLATE, 1);
    packed(BALE_CODEC_NONE, 2);
}

/* Only patches, patches over a cluster, patches over patches. */
static void test_kill(void)
{
    Fixture f;

    fixture_init(&f);
    put(&f, CLUSTER, CLUSTER, 1);
    flush(&f);
    put(&f, CLUSTER + 4096, 4096, 2);
    put(&f, 512, 512, 3);
    flush(&f);
    put(&f, CLUSTER + 6144, 4096, 4);
    flush(&f);
    put(&f, CLUSTER + 32768, 512, 5); /* not flushed, so nowhere */
    fixture_kill(&f, false);
    g_assert_cmpuint(fixture_stats(&f).patches_live, ==, 3);
    for (unsigned i = 0; i < 3; i++) {
        check(&f, 0, 0);
        check(&f, 512, 3);
        check(&f, CLUSTER, 1);
        check(&f, CLUSTER + 4096, 2);
        check(&f, CLUSTER + 6144, 4);
        check(&f, CLUSTER + 32768, 1);
        check_store(&f);
        if (i == 0) {
            fixture_kill(&f, false);
        } else {
            /* A write, so that a checkpoint follows. */
            put(&f, 9 * CLUSTER, 512, 1);
            fixture_reopen(&f);
            g_assert_cmpuint(fixture_stats(&f).patches_live, ==, 0);
        }
    }
    g_assert_cmpuint(f.complaints, ==, 0);
    fixture_close(&f);
}

/* A reader of a store that was left open sees patches, and writes nothing. */
static void test_read_only(void)
{
    uint64_t before;
    Fixture f;

    fixture_init(&f);
    put(&f, CLUSTER, CLUSTER, 1);
    put(&f, CLUSTER + 4096, 4096, 2);
    flush(&f);
    put(&f, CLUSTER + 4096, 512, 3);
    flush(&f);
    fixture_kill(&f, true);
    before = device_bytes(&f);
    check(&f, CLUSTER, 1);
    check(&f, CLUSTER + 4096, 3);
    check(&f, CLUSTER + 4608, 2);
    flush(&f);
    check_store(&f);
    g_assert_cmpuint(device_bytes(&f), ==, before);

    /* Then it may be written, and closes cleanly. */
    g_assert_true(bale_store_set_read_only(f.store, false, NULL));
    put(&f, CLUSTER + 4096 + 1024, 512, 4);
    fixture_reopen(&f);
    check(&f, CLUSTER + 4096, 3);
    check(&f, CLUSTER + 4096 + 1024, 4);
    fixture_close(&f);
}

/* What comes after a patch hides it: a write, zeroes, a discard, a cut. */
static void test_hidden(void)
{
    Fixture f;

    fixture_init(&f);
    for (unsigned i = 0; i < 8; i++) {
        put(&f, i * CLUSTER + 4096, 512, 1);
    }
    put(&f, 40 * CLUSTER, 512, 1);
    flush(&f);
    g_assert_cmpuint(fixture_stats(&f).patches_live, ==, 9);
    put(&f, 0, CLUSTER, 2);
    g_assert_cmpint(bale_image_zero_sync(f.image, CLUSTER, CLUSTER, 0), ==,
                    0);
    g_assert_cmpint(bale_image_zero_sync(f.image, 2 * CLUSTER, CLUSTER,
                                         BALE_DISCARD), ==, 0);
    g_assert_cmpint(bale_image_zero_sync(f.image, 3 * CLUSTER + 4096, 512,
                                         BALE_DISCARD), ==, 0);
    g_assert_true(bale_image_resize(f.image, 30 * CLUSTER + 512, NULL));
    g_assert_true(bale_image_resize(f.image, CLUSTERS * CLUSTER, NULL));
    fixture_kill(&f, false);
    check(&f, 4096, 2);
    check(&f, CLUSTER + 4096, 0);
    check(&f, 2 * CLUSTER + 4096, 0);
    check(&f, 3 * CLUSTER + 4096, 0);
    check(&f, 4 * CLUSTER + 4096, 1);
    check(&f, 40 * CLUSTER, 0);
    put(&f, 4 * CLUSTER + 4096, 512, 3);
    flush(&f);
    g_assert_true(bale_image_clear(f.image, NULL));
    fixture_kill(&f, false);
    check(&f, 4 * CLUSTER + 4096, 0);
    check_store(&f);
    fixture_close(&f);
}

/* Compaction takes patches that count along. */
static void test_compaction(void)
{
    const BaleCompactOptions all = { .rate = 0 };
    g_autoptr(GError) err = NULL;
    Fixture f;

    fixture_init(&f);
    for (unsigned round = 0; round < 40; round++) {
        for (unsigned i = 0; i < 8; i++) {
            put(&f, i * CLUSTER, CLUSTER, round);
        }
        if (round % 8 == 0) {
            put(&f, (20 + round) * CLUSTER, 512, 1 + round);
        }
        flush(&f);
    }
    g_assert_cmpuint(fixture_stats(&f).patches_live, ==, 5);
    g_assert_true(bale_store_compact(f.store, &all, &err));
    g_assert_no_error(err);
    g_assert_cmpuint(fixture_stats(&f).patches_live, ==, 5);
    check_store(&f);
    flush(&f);
    fixture_kill(&f, false);
    g_assert_cmpuint(fixture_stats(&f).patches_live, ==, 5);
    for (unsigned round = 0; round < 40; round += 8) {
        check(&f, (20 + round) * CLUSTER, 1 + round);
    }
    check(&f, 7 * CLUSTER, 39);
    check_store(&f);
    fixture_close(&f);
}

/* A damaged patch: its cluster reads as an error, also after a checkpoint. */
static void test_damage(void)
{
    static const char mark[] = "here it is, the text to be damaged";
    g_autoptr(BaleSimImage) image = NULL;
    g_autofree uint8_t *block = g_malloc(BLOCK);
    uint64_t at, size;
    uint8_t buf[512];
    Fixture f;

    fixture_init(&f);
    put(&f, CLUSTER, CLUSTER, 1);
    flush(&f);
    for (unsigned i = 0; i < BLOCK; i++) {
        block[i] = g_random_int(); /* or it would be compressed */
    }
    memcpy(block, mark, sizeof(mark));
    g_assert_cmpint(bale_image_write_sync(f.image, CLUSTER + 4096, block,
                                          BLOCK, 0), ==, 0);
    flush(&f);
    put(&f, 0, CLUSTER, 2);
    flush(&f);
    put(&f, 2 * CLUSTER, CLUSTER, 2); /* with a barrier over all that */
    flush(&f);
    image = bale_sim_image(f.dev);
    size = bale_sim_image_size(image);
    for (at = 2u << 20; at < size; at += 16) {
        bale_sim_image_read(image, at, buf, sizeof(buf));
        if (!memcmp(buf, mark, sizeof(mark))) {
            break;
        }
    }
    g_assert_cmpuint(at, <, size);
    bale_sim_flip_bit(f.dev, at + 3, 5);

    fixture_kill(&f, false);
    for (unsigned i = 0; i < 2; i++) {
        g_assert_cmpuint(f.complaints, >, i);
        g_assert_cmpint(bale_image_read_sync(f.image, CLUSTER, buf, 512), ==,
                        -EIO);
        g_assert_cmpint(bale_image_read_sync(f.image, CLUSTER + 4096, buf,
                                             512), ==, -EIO);
        check(&f, 0, 2);
        check(&f, 2 * CLUSTER, 2);
        put(&f, 3 * CLUSTER, CLUSTER, 3);
        fixture_reopen(&f);
    }
    put(&f, CLUSTER, CLUSTER, 4);
    check(&f, CLUSTER + 4096, 4);
    fixture_kill(&f, false);
    fixture_close(&f);
}

/* More patched clusters than fit: some are written out, nothing is lost. */
static void test_many(void)
{
    Fixture f;

    fixture_init(&f);
    g_assert_true(bale_image_resize(f.image, 2048ull * CLUSTER, NULL));
    for (uint64_t i = 0; i < 1500; i++) {
        put(&f, i * CLUSTER + 4096, 512, i % 255 + 1);
        if (i % 16 == 0) {
            flush(&f);
        }
    }
    flush(&f);
    g_assert_cmpuint(fixture_stats(&f).mutable_clusters, <=,
                     (32u << 20) / CLUSTER);
    fixture_kill(&f, false);
    g_assert_cmpuint(fixture_stats(&f).patches_live, >, 0);
    for (uint64_t i = 0; i < 1500; i++) {
        check(&f, i * CLUSTER + 4096, i % 255 + 1);
    }
    check_store(&f);
    fixture_close(&f);
}

/*
 * A cluster that is complete after many small flushes is not waited for: its
 * last piece is a patch like the others, and it leaves with its neighbours.
 */
static void test_last_piece(void)
{
    const unsigned clusters = (512u << 10) / CLUSTER, blocks = CLUSTER / BLOCK;
    BaleStoreStats stats;
    Fixture f;

    fixture_init(&f);
    for (unsigned i = 0; i < clusters * blocks; i++) {
        stats = fixture_stats(&f);
        g_assert_cmpuint(stats.patches, ==, i);
        g_assert_cmpuint(stats.logical_bytes, ==, 0);
        g_assert_cmpuint(stats.mutable_clusters, ==,
                         (i + blocks - 1) / blocks);
        put(&f, i * BLOCK, BLOCK, i + 1);
        flush(&f);
    }
    g_assert_cmpuint(fixture_stats(&f).patches, ==, clusters * blocks);
    /* When the last one became complete the others had been saved. */
    while (fixture_stats(&f).mutable_clusters > 1) {
        g_usleep(1000);
    }
    stats = fixture_stats(&f);
    g_assert_cmpuint(stats.logical_bytes, ==, (clusters - 1) * CLUSTER);
    g_assert_cmpuint(stats.patches_live, ==, blocks);
    /* Large pieces are not written twice. */
    put(&f, clusters * CLUSTER, CLUSTER / 2, 1);
    flush(&f);
    put(&f, clusters * CLUSTER + CLUSTER / 2, CLUSTER / 2, 2);
    flush(&f);
    g_assert_cmpuint(fixture_stats(&f).logical_bytes, ==, clusters * CLUSTER);
    g_assert_cmpuint(fixture_stats(&f).patches, ==, clusters * blocks + 1);
    fixture_kill(&f, false);
    for (unsigned i = 0; i < clusters * blocks; i++) {
        check(&f, i * BLOCK, i + 1);
    }
    check_store(&f);
    fixture_close(&f);
}

/* Batches beside writes, flushes, whole clusters and discards. */
static void test_batches(void)
{
    const unsigned blocks = CLUSTER / BLOCK;
    g_autoptr(GRand) rand = g_rand_new_with_seed(7);
    g_autofree uint8_t *is = g_malloc0(CLUSTERS * blocks);
    Fixture f;

    memset(&f, 0, sizeof(f));
    f.open.mutable_clusters = 16;
    fixture_start(&f, BALE_CODEC_ZSTD);
    for (unsigned round = 0; round < 3; round++) {
        for (unsigned i = 0; i < 1000; i++) {
            unsigned n = g_rand_int_range(rand, 0, CLUSTERS * blocks);
            unsigned c = n / blocks;
            uint8_t value = i % 255 + 1;

            if (i % 50 == 10) {
                put(&f, c * CLUSTER, CLUSTER, value);
                memset(is + c * blocks, value, blocks);
                continue;
            }
            if (i % 50 == 20) {
                g_assert_cmpint(bale_image_zero_sync(f.image, c * CLUSTER,
                                                     CLUSTER, 0), ==, 0);
                memset(is + c * blocks, 0, blocks);
                continue;
            }
            put(&f, (uint64_t)n * BLOCK, BLOCK, value);
            is[n] = value;
            if (i % 4 == 3) {
                flush(&f);
            }
        }
        flush(&f);
        g_assert_cmpuint(fixture_stats(&f).mutable_clusters, <=, 16);
        if (round) {
            fixture_kill(&f, false);
        } else {
            fixture_reopen(&f);
        }
        for (unsigned n = 0; n < CLUSTERS * blocks; n++) {
            uint8_t buf[8];

            g_assert_cmpint(bale_image_read_sync(f.image,
                                                 (uint64_t)n * BLOCK, buf, 8),
                            ==, 0);
            g_assert_cmpint(buf[4], ==, is[n]);
        }
        check_store(&f);
    }
    g_assert_cmpuint(f.complaints, ==, 0);
    fixture_close(&f);
}

static void note_and_add(BalePatchTable *t, uint64_t cluster)
{
    BalePatch patch = { .len = 512 };

    bale_patch_note(t, cluster, 0, 512, 1);
    bale_patch_add(t, bale_patch_find(t, cluster), &patch);
}

/*
 * What supersedes patches may be lost in a crash, and patches that are newer
 * be there: until a flush, both count.
 */
static void test_caps(void)
{
    BaleStore s = { .cluster_size = CLUSTER };
    BalePatchTable t = { .store = NULL };
    BalePatched *p;

    pthread_mutex_init(&s.log_lock, NULL);
    bale_patch_table_init(&t, &s);
    t.max = 8;
    for (unsigned i = 0; i < 8; i++) {
        note_and_add(&t, i);
    }
    bale_patch_note(&t, 8, 0, 512, 2);
    p = bale_patch_find(&t, 8);
    g_assert_false(bale_patch_worth(&t, p));
    g_assert_true(bale_patch_worth(&t, bale_patch_find(&t, 7)));
    bale_patch_drop(&t, bale_patch_find(&t, 0), true);
    g_assert_false(bale_patch_worth(&t, p));
    /* One that was asked for before proves nothing. */
    s.flushed_request = s.flush_request;
    g_assert_false(bale_patch_worth(&t, p));
    s.flushed_request = ++s.flush_request;
    g_assert_true(bale_patch_worth(&t, p));

    /* So with the patches of one cluster. */
    for (unsigned i = 1; i < BALE_PATCHES_PER_CLUSTER_MAX - 1; i++) {
        note_and_add(&t, 1);
    }
    bale_patch_drop(&t, bale_patch_find(&t, 1), true);
    g_assert_true(bale_patch_worth(&t, bale_patch_find(&t, 1)));
    note_and_add(&t, 1);
    g_assert_false(bale_patch_worth(&t, bale_patch_find(&t, 1)));
    s.flushed_request = ++s.flush_request;
    g_assert_true(bale_patch_worth(&t, bale_patch_find(&t, 1)));
    bale_patch_table_destroy(&t);
    pthread_mutex_destroy(&s.log_lock);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/patch/cost", test_cost);
    g_test_add_func("/patch/rewrite", test_rewrite);
    g_test_add_func("/patch/packed", test_packed);
    g_test_add_func("/patch/kill", test_kill);
    g_test_add_func("/patch/read-only", test_read_only);
    g_test_add_func("/patch/hidden", test_hidden);
    g_test_add_func("/patch/compaction", test_compaction);
    g_test_add_func("/patch/damage", test_damage);
    g_test_add_func("/patch/many", test_many);
    g_test_add_func("/patch/last-piece", test_last_piece);
    g_test_add_func("/patch/batches", test_batches);
    g_test_add_func("/patch/caps", test_caps);
    return g_test_run();
}
