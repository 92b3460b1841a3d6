/*
 * The store against a flat model: what is read is what was written, after any
 * mixture of requests, after closing and after a kill.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "stores.h"

#define IMAGE_SIZE (8u << 20)
#define SECTOR 512u

typedef struct Fixture {
    BaleSimOptions sim;
    BaleCreateOptions create;
    BaleOpenOptions open;
    BaleDevice *dev; /* owned by store while that is open */
    BaleStore *store;
    BaleImage *image;
} Fixture;

static void fixture_open(Fixture *f, bool read_only)
{
    f->open.read_only = read_only;
    f->open.damage = test_complain;
    if (!f->open.failed) {
        f->open.failed = test_complain;
    }
    f->store = test_store_open(f->dev, &f->open, NULL, &f->image);
}

static void fixture_init(Fixture *f, BaleCodec codec)
{
    memset(f, 0, sizeof(*f));
    f->create.size = IMAGE_SIZE;
    f->create.page_size = 2u << 20;
    f->create.cluster_size = 16384;
    f->create.codec = codec;
    f->open.workers = 2;
    f->open.cache_size = 1u << 20;
    f->sim.no_history = true;
    f->dev = test_store_new(&f->sim, &f->create);
    fixture_open(f, false);
}

/* The contents of the device now, as a new device. */
static BaleDevice *fixture_copy_device(Fixture *f)
{
    return test_device_copy(f->dev, &f->sim);
}

static void fixture_close(Fixture *f)
{
    test_store_close(f->store, f->image);
    f->dev = NULL;
}

static void fixture_reopen(Fixture *f)
{
    BaleDevice *dev;

    test_store_checkpoint(f->store);
    dev = fixture_copy_device(f);
    fixture_close(f);
    f->dev = dev;
    fixture_open(f, false);
}

/* As if the process had been killed here: what was flushed is there. */
static void fixture_kill(Fixture *f)
{
    BaleDevice *dev = fixture_copy_device(f);

    fixture_close(f);
    f->dev = dev;
    fixture_open(f, false);
}

static void check_equal(Fixture *f, const uint8_t *model, uint64_t len)
{
    g_autofree uint8_t *buf = g_malloc(1u << 20);

    for (uint64_t pos = 0; pos < len; pos += 1u << 20) {
        uint64_t n = MIN(1u << 20, len - pos);

        g_assert_cmpint(bale_image_read_sync(f->image, pos, buf, n), ==, 0);
        for (uint64_t i = 0; i < n; i += SECTOR) {
            if (memcmp(buf + i, model + pos + i, MIN(SECTOR, n - i))) {
                g_error("sector at %" G_GUINT64_FORMAT " differs", pos + i);
            }
        }
    }
}

static void check_clean(Fixture *f)
{
    g_autoptr(GError) err = NULL;
    BaleCheckResult result;

    g_assert_true(bale_store_check(f->store, BALE_CHECK_DATA, NULL, NULL,
                                   &result, &err));
    g_assert_no_error(err);
    g_assert_cmpuint(result.damaged, ==, 0);
    g_assert_cmpuint(result.wrong_counters, ==, 0);
    g_assert_cmpuint(result.bad_superblocks, ==, 0);
}

/* Text, noise or zeroes. */
static void fill_random(GRand *rand, uint8_t *buf, size_t len)
{
    int kind = g_rand_int_range(rand, 0, 10);
    uint8_t base = g_rand_int_range(rand, 1, 250);

    for (size_t i = 0; i < len; i++) {
        buf[i] = kind == 0  ? 0
                 : kind < 3 ? g_rand_int_range(rand, 0, 256)
                            : (int)(base + (i * i / 97) % 5);
    }
}

static void test_empty_reads_zeroes(void)
{
    g_autofree uint8_t *model = g_malloc0(IMAGE_SIZE);
    Fixture f;

    fixture_init(&f, BALE_CODEC_ZSTD);
    check_equal(&f, model, IMAGE_SIZE);
    fixture_close(&f);
}

static void test_write_read_reopen(void)
{
    g_autofree uint8_t *model = g_malloc0(IMAGE_SIZE);
    g_autoptr(GRand) rand = g_rand_new_with_seed(1);
    Fixture f;

    fixture_init(&f, BALE_CODEC_DEFLATE);
    for (uint64_t pos = 0; pos < IMAGE_SIZE; pos += 65536) {
        fill_random(rand, model + pos, 65536);
    }
    g_assert_cmpint(bale_image_write_sync(f.image, 0, model, IMAGE_SIZE, 0),
                    ==, 0);
    check_equal(&f, model, IMAGE_SIZE);
    fixture_reopen(&f);
    check_equal(&f, model, IMAGE_SIZE);
    check_clean(&f);
    fixture_close(&f);
}

static void test_kill_after_flush(void)
{
    g_autofree uint8_t *model = g_malloc0(IMAGE_SIZE);
    g_autoptr(GRand) rand = g_rand_new_with_seed(2);
    BaleStoreInfo info;
    Fixture f;

    fixture_init(&f, BALE_CODEC_ZSTD);
    fill_random(rand, model + 100, 300000);
    g_assert_cmpint(bale_image_write_sync(f.image, 0, model, 400000, 0), ==,
                    0);
    g_assert_cmpint(bale_store_flush_sync(f.store), ==, 0);
    fixture_kill(&f);
    bale_store_get_info(f.store, &info);
    g_assert_false(info.clean);
    g_assert_cmpuint(info.recovered_records, >, 0);
    g_assert_cmpuint(info.damaged_records, ==, 0);
    check_equal(&f, model, IMAGE_SIZE);
    check_clean(&f);
    fixture_close(&f);
}

static void count_failure(void *opaque, const char *what)
{
    ++*(int *)opaque;
}

/* After a failed write and a failed flush a store can be well again, and what
 * it then flushes survives a power cut. */
static void test_revive(void)
{
    g_autofree uint8_t *model = g_malloc0(IMAGE_SIZE);
    g_autoptr(GRand) rand = g_rand_new_with_seed(4);
    static const BaleSimCall calls[] = { BALE_SIM_STORE, BALE_SIM_FLUSH };
    g_autoptr(GError) err = NULL;
    BaleStoreInfo info;
    int failures = 0;
    Fixture f;

    fixture_init(&f, BALE_CODEC_ZSTD);
    fixture_close(&f);
    f.sim.no_history = false;
    f.open.failed = count_failure;
    f.open.notify_opaque = &failures;
    f.dev = test_store_new(&f.sim, &f.create);
    fixture_open(&f, false);
    for (unsigned i = 0; i < G_N_ELEMENTS(calls); i++) {
        uint64_t pos = (1 + 2 * i) << 20;
        BaleSimFault fault = { .call = calls[i], .error = -EIO,
                               .sticky = true };

        fill_random(rand, model + pos, 300000);
        g_assert_cmpint(bale_image_write_sync(f.image, pos, model + pos,
                                              300000, 0), ==, 0);
        bale_sim_fault(f.dev, &fault);
        g_assert_cmpint(bale_store_flush_sync(f.store), ==, -EIO);
        g_assert_true(bale_store_poisoned(f.store));
        g_assert_cmpint(bale_image_write_sync(f.image, 0, model, 65536, 0),
                        ==, -EIO);
        g_assert_false(bale_store_revive(f.store, &err));
        g_clear_error(&err);
        g_assert_true(bale_store_poisoned(f.store));
        check_equal(&f, model, IMAGE_SIZE);

        bale_sim_faults_clear(f.dev);
        g_assert_true(bale_store_revive(f.store, &err));
        g_assert_no_error(err);
        g_assert_false(bale_store_poisoned(f.store));
        g_assert_cmpint(bale_store_flush_sync(f.store), ==, 0);
        check_equal(&f, model, IMAGE_SIZE);
    }
    g_assert_cmpint(failures, ==, 2);
    {
        g_autoptr(BaleSimImage) cut = bale_sim_durable_image(f.dev);

        fixture_close(&f);
        f.dev = bale_sim_new_from_image(cut, &f.sim);
    }
    fixture_open(&f, false);
    bale_store_get_info(f.store, &info);
    g_assert_cmpuint(info.damaged_records, ==, 0);
    check_equal(&f, model, IMAGE_SIZE);
    check_clean(&f);
    fixture_close(&f);
}

/* A superblock that cannot be written at the beginning of a session costs the
 * request that began it, not the store; one that cannot be flushed does. */
static void test_session_begins_again(void)
{
    g_autofree uint8_t *model = g_malloc0(IMAGE_SIZE);
    int failures = 0;
    Fixture f;

    memset(model, 9, 65536);
    for (uint64_t nth = 1; nth <= 4; nth++) {
        BaleSimFault fault = { .call = BALE_SIM_STORE, .error = -EIO,
                               .nth = nth };

        fixture_init(&f, BALE_CODEC_ZSTD);
        bale_sim_fault(f.dev, &fault);
        g_assert_cmpint(bale_image_write_sync(f.image, 0, model, 65536, 0),
                        ==, -EIO);
        g_assert_false(bale_store_poisoned(f.store));
        g_assert_cmpint(bale_image_write_sync(f.image, 0, model, 65536, 0),
                        ==, 0);
        g_assert_cmpint(bale_store_flush_sync(f.store), ==, 0);
        fixture_kill(&f);
        check_equal(&f, model, IMAGE_SIZE);
        fixture_reopen(&f);
        check_clean(&f);
        fixture_close(&f);
    }
    for (uint64_t nth = 2; nth <= 3; nth++) {
        BaleSimFault fault = { .call = BALE_SIM_FLUSH, .error = -EIO,
                               .nth = nth };

        fixture_init(&f, BALE_CODEC_ZSTD);
        fixture_close(&f);
        f.open.failed = count_failure;
        f.open.notify_opaque = &failures;
        f.dev = test_store_new(&f.sim, &f.create);
        fixture_open(&f, false);
        bale_sim_fault(f.dev, &fault);
        g_assert_cmpint(bale_image_write_sync(f.image, 0, model, 65536, 0),
                        ==, -EIO);
        g_assert_true(bale_store_poisoned(f.store));
        g_assert_cmpint(bale_image_write_sync(f.image, 0, model, 65536, 0),
                        ==, -EIO);
        bale_image_close(f.image);
        bale_store_close(f.store, NULL);
    }
    g_assert_cmpint(failures, ==, 2);
}

/* A superblock copy that cannot be read is as good as a damaged one. */
static void test_superblock_unreadable(void)
{
    Fixture f;

    for (uint64_t nth = 1; nth <= 4; nth++) {
        BaleSimFault fault = { .call = BALE_SIM_GET, .error = -EIO,
                               .nth = nth };
        BaleDevice *dev;

        fixture_init(&f, BALE_CODEC_ZSTD);
        dev = fixture_copy_device(&f);
        fixture_close(&f);
        f.dev = dev;
        bale_sim_fault(f.dev, &fault);
        fixture_open(&f, false);
        g_assert_cmpuint(bale_sim_faults_hit(f.dev), ==, 1);
        check_clean(&f);
        fixture_close(&f);
    }
}

static void test_read_only_writes_nothing(void)
{
    g_autoptr(BaleSimImage) before = NULL, after = NULL;
    g_autofree uint8_t *buf = g_malloc0(IMAGE_SIZE);
    Fixture f;
    BaleDevice *dev;

    fixture_init(&f, BALE_CODEC_ZSTD);
    memset(buf, 7, 100000);
    g_assert_cmpint(bale_image_write_sync(f.image, 0, buf, 100000, 0), ==, 0);
    g_assert_cmpint(bale_store_flush_sync(f.store), ==, 0);
    dev = fixture_copy_device(&f);
    fixture_close(&f);
    f.dev = dev;
    before = bale_sim_image(dev);
    fixture_open(&f, true);
    check_equal(&f, buf, IMAGE_SIZE);
    check_clean(&f);
    g_assert_cmpint(bale_image_write_sync(f.image, 0, buf, 512, 0), ==,
                    -EROFS);
    after = bale_sim_image(f.dev);
    g_assert_true(bale_sim_image_equal(before, after));
    fixture_close(&f);
}

static void test_overwrites_give_space_back(void)
{
    g_autofree uint8_t *model = g_malloc0(IMAGE_SIZE);
    g_autoptr(GRand) rand = g_rand_new_with_seed(3);
    BaleStoreStats stats;
    Fixture f;

    fixture_init(&f, BALE_CODEC_NONE);
    for (int round = 0; round < 10; round++) {
        for (uint64_t i = 0; i < IMAGE_SIZE; i++) {
            model[i] = g_rand_int(rand);
        }
        g_assert_cmpint(
            bale_image_write_sync(f.image, 0, model, IMAGE_SIZE, 0), ==, 0);
        g_assert_cmpint(bale_store_flush_sync(f.store), ==, 0);
    }
    fixture_reopen(&f);
    check_equal(&f, model, IMAGE_SIZE);
    check_clean(&f);
    bale_store_get_stats(f.store, &stats);
    /* Ten times 8 MiB went in; 8 MiB live, and a few pages on their way. */
    g_assert_cmpuint(stats.used_bytes, <, 4 * IMAGE_SIZE);
    fixture_close(&f);
}

/* Every second cluster overwritten: no page dies by itself. */
static void test_compaction_gives_space_back(void)
{
    g_autofree uint8_t *model = g_malloc0(IMAGE_SIZE);
    g_autoptr(GRand) rand = g_rand_new_with_seed(5);
    g_autoptr(GError) err = NULL;
    BaleCompactOptions o = { .rate = 0 };
    BaleStoreStats before, after;
    Fixture f;

    fixture_init(&f, BALE_CODEC_NONE);
    for (uint64_t i = 0; i < IMAGE_SIZE; i++) {
        model[i] = g_rand_int(rand);
    }
    g_assert_cmpint(bale_image_write_sync(f.image, 0, model, IMAGE_SIZE, 0),
                    ==, 0);
    for (uint64_t pos = 0; pos < IMAGE_SIZE; pos += 2 * 16384) {
        model[pos] ^= 1;
        g_assert_cmpint(
            bale_image_write_sync(f.image, pos, model + pos, 16384, 0), ==,
            0);
    }
    g_assert_cmpint(bale_image_zero_sync(f.image, 0, 4 * 16384, 0), ==, 0);
    memset(model, 0, 4 * 16384);
    g_assert_cmpint(bale_store_flush_sync(f.store), ==, 0);
    bale_store_get_stats(f.store, &before);
    g_assert_true(bale_store_compact(f.store, &o, &err));
    g_assert_no_error(err);
    bale_store_get_stats(f.store, &after);
    g_assert_cmpuint(after.used_bytes, <, IMAGE_SIZE * 5 / 4);
    check_equal(&f, model, IMAGE_SIZE);
    check_clean(&f);
    fixture_kill(&f);
    check_equal(&f, model, IMAGE_SIZE);
    check_clean(&f);
    fixture_close(&f);
}

/* A command comes back to the page at which the background rests. */
static void test_compaction_awaits_background(void)
{
    g_autofree uint8_t *model = g_malloc0(IMAGE_SIZE);
    g_autoptr(GRand) rand = g_rand_new_with_seed(6);
    g_autoptr(GError) err = NULL;
    BaleCompactOptions o = { .rate = 0 };
    BaleStoreStats stats;
    Fixture f;

    fixture_init(&f, BALE_CODEC_NONE);
    bale_store_set_compact(f.store, false, 0);
    for (uint64_t i = 0; i < IMAGE_SIZE / 2; i++) {
        model[i] = g_rand_int(rand);
    }
    g_assert_cmpint(bale_image_write_sync(f.image, 0, model, IMAGE_SIZE / 2,
                                          0), ==, 0);
    /* Half of two pages, which are sealed, and all that are. */
    for (uint64_t pos = 0; pos < IMAGE_SIZE / 2; pos += 2 * 16384) {
        model[pos] ^= 1;
        g_assert_cmpint(
            bale_image_write_sync(f.image, pos, model + pos, 16384, 0), ==,
            0);
    }
    g_assert_cmpint(bale_store_flush_sync(f.store), ==, 0);
    /* After the first page it waits, for ever, with the second in hand. */
    bale_store_set_compact(f.store, true, 1);
    do {
        g_usleep(1000);
        bale_store_get_stats(f.store, &stats);
    } while (stats.compact_paced_ns == 0);
    g_assert_true(bale_store_compact(f.store, &o, &err));
    g_assert_no_error(err);
    bale_store_get_stats(f.store, &stats);
    g_assert_cmpuint(stats.compacted_pages, >=, 2);
    g_assert_cmpuint(stats.pages_freeing, ==, 0);
    g_assert_cmpuint(stats.used_bytes, <, IMAGE_SIZE / 2 * 5 / 4);
    check_equal(&f, model, IMAGE_SIZE);
    check_clean(&f);
    fixture_close(&f);
}

static void test_resize(void)
{
    g_autofree uint8_t *model = g_malloc0(2 * IMAGE_SIZE);
    g_autoptr(GError) err = NULL;
    Fixture f;

    fixture_init(&f, BALE_CODEC_ZSTD);
    memset(model, 5, IMAGE_SIZE);
    g_assert_cmpint(bale_image_write_sync(f.image, 0, model, IMAGE_SIZE, 0),
                    ==, 0);
    g_assert_true(bale_image_resize(f.image, 1000 * SECTOR, &err));
    g_assert_cmpuint(bale_image_size(f.image), ==, 1000 * SECTOR);
    fixture_kill(&f);
    g_assert_cmpuint(bale_image_size(f.image), ==, 1000 * SECTOR);
    g_assert_true(bale_image_resize(f.image, 2 * IMAGE_SIZE, &err));
    memset(model + 1000 * SECTOR, 0, 2 * IMAGE_SIZE - 1000 * SECTOR);
    check_equal(&f, model, 2 * IMAGE_SIZE);
    fixture_kill(&f);
    check_equal(&f, model, 2 * IMAGE_SIZE);
    fixture_reopen(&f);
    check_equal(&f, model, 2 * IMAGE_SIZE);
    check_clean(&f);
    g_assert_true(bale_image_clear(f.image, &err));
    memset(model, 0, IMAGE_SIZE);
    fixture_kill(&f);
    check_equal(&f, model, 2 * IMAGE_SIZE);
    fixture_close(&f);
}

static void test_out_of_range(void)
{
    uint8_t buf[512] = { 0 };
    Fixture f;

    fixture_init(&f, BALE_CODEC_ZSTD);
    g_assert_cmpint(bale_image_write_sync(f.image, IMAGE_SIZE, buf, 1, 0), ==,
                    -EINVAL);
    g_assert_cmpint(bale_image_read_sync(f.image, IMAGE_SIZE - 511, buf, 512),
                    ==, -EINVAL);
    g_assert_cmpint(bale_image_read_sync(f.image, UINT64_MAX, buf, 2), ==,
                    -EINVAL);
    g_assert_cmpint(bale_image_zero_sync(f.image, 1, IMAGE_SIZE, 0), ==,
                    -EINVAL);
    fixture_close(&f);
}

/* Nothing is lost when the device is full, and discarding makes room. */
static void test_full(void)
{
    g_autofree uint8_t *model = g_malloc0(IMAGE_SIZE);
    g_autoptr(GRand) rand = g_rand_new_with_seed(4);
    uint64_t written = 0;
    int ret = 0;
    Fixture f;

    memset(&f, 0, sizeof(f));
    f.sim.no_history = true;
    f.sim.max_size = 8u << 20;
    f.create = (BaleCreateOptions){ .size = IMAGE_SIZE,
                                    .page_size = 2u << 20,
                                    .cluster_size = 16384 };
    f.open.workers = 2;
    f.dev = test_store_new(&f.sim, &f.create);
    fixture_open(&f, false);
    for (uint64_t i = 0; i < IMAGE_SIZE; i++) {
        model[i] = g_rand_int(rand);
    }
    while (written < IMAGE_SIZE && ret == 0) {
        ret = bale_image_write_sync(f.image, written, model + written, 65536,
                                    0);
        written += ret == 0 ? 65536 : 0;
    }
    g_assert_cmpint(ret, ==, -ENOSPC);
    g_assert_cmpuint(written, >, 1u << 20);
    g_assert_cmpint(bale_store_flush_sync(f.store), ==, 0);
    check_equal(&f, model, written);
    fixture_reopen(&f);
    check_equal(&f, model, written);
    fixture_close(&f);
}

static void model_step(Fixture *f, GRand *rand, uint8_t *model, uint8_t *buf)
{
    uint64_t size = bale_image_size(f->image);
    uint64_t len = g_rand_int_range(rand, 0, 4)
                       ? g_rand_int_range(rand, 1, 20000)
                       : g_rand_int_range(rand, 1, 600000);
    uint64_t pos = g_rand_double(rand) * size;
    int op = g_rand_int_range(rand, 0, 100);
    int ret = 0;

    if (g_rand_boolean(rand)) {
        pos &= ~511ull;
        len = (len + 511) & ~511ull;
    }
    len = MIN(len, size - pos);
    if (op < 45) {
        fill_random(rand, buf, len);
        ret = bale_image_write_sync(f->image, pos, buf, len,
                                    op < 5 ? BALE_FUA : 0);
        memcpy(model + pos, buf, len);
    } else if (op < 55) {
        ret = bale_image_zero_sync(f->image, pos, len,
                                   op < 50 ? BALE_DISCARD : 0);
        memset(model + pos, 0, len);
    } else if (op < 95) {
        ret = bale_image_read_sync(f->image, pos, buf, len);
        if (memcmp(buf, model + pos, len)) {
            g_error("read of %" G_GUINT64_FORMAT " bytes at %"
                    G_GUINT64_FORMAT " differs", len, pos);
        }
    } else if (op < 97) {
        ret = bale_store_flush_sync(f->store);
    } else if (op == 97) {
        BaleCompactOptions o = { .rate = 0 };

        g_assert_true(bale_store_compact(f->store, &o, NULL));
    } else if (op == 98) {
        g_assert_cmpint(bale_store_flush_sync(f->store), ==, 0);
        fixture_kill(f);
    } else {
        fixture_reopen(f);
    }
    g_assert_cmpint(ret, ==, 0);
}

static void test_model(gconstpointer opaque)
{
    g_autofree uint8_t *model = g_malloc0(IMAGE_SIZE);
    g_autofree uint8_t *buf = g_malloc(IMAGE_SIZE);
    g_autoptr(GRand) rand = g_rand_new_with_seed(test_seed());
    int steps = g_test_slow() ? 20000 : 1500;
    Fixture f;

    fixture_init(&f, GPOINTER_TO_INT(opaque));
    for (int i = 0; i < steps; i++) {
        model_step(&f, rand, model, buf);
    }
    check_equal(&f, model, IMAGE_SIZE);
    check_clean(&f);
    g_assert_cmpint(bale_store_flush_sync(f.store), ==, 0);
    fixture_kill(&f);
    check_equal(&f, model, IMAGE_SIZE);
    check_clean(&f);
    fixture_close(&f);
}

/* --- many requests at once --- */

typedef struct Flight {
    Fixture *f;
    pthread_mutex_t lock;
    pthread_cond_t cond;
    unsigned under_way;
} Flight;

typedef struct FlightRequest {
    Flight *flight;
    struct iovec iov;
    uint8_t *expect;
    uint64_t pos;
} FlightRequest;

static void flight_done(void *opaque, int ret)
{
    FlightRequest *r = opaque;
    Flight *flight = r->flight;

    g_assert_cmpint(ret, ==, 0);
    g_free(r->iov.iov_base);
    g_free(r);
    pthread_mutex_lock(&flight->lock);
    flight->under_way--;
    pthread_cond_signal(&flight->cond);
    pthread_mutex_unlock(&flight->lock);
}

/*
 * Each sector carries its number and a round; writers race, but every sector
 * must end as one of the values written to it, and disjoint writers must all
 * be seen.
 */
static void test_parallel_partial_writes(void)
{
    g_autofree uint8_t *model = g_malloc0(IMAGE_SIZE);
    g_autoptr(GRand) rand = g_rand_new_with_seed(test_seed());
    unsigned n = IMAGE_SIZE / 3072;
    g_autofree unsigned *order = g_new(unsigned, n);
    Flight flight = { .lock = PTHREAD_MUTEX_INITIALIZER,
                      .cond = PTHREAD_COND_INITIALIZER };
    Fixture f;

    fixture_init(&f, BALE_CODEC_DEFLATE);
    flight.f = &f;
    for (unsigned i = 0; i < n; i++) {
        order[i] = i;
    }
    for (unsigned i = n - 1; i > 0; i--) {
        unsigned j = g_rand_int_range(rand, 0, i + 1), t = order[i];

        order[i] = order[j];
        order[j] = t;
    }
    for (unsigned i = 0; i < n; i++) {
        FlightRequest *r = g_new0(FlightRequest, 1);

        r->flight = &flight;
        r->pos = order[i] * 3072u;
        r->iov.iov_len = 3072;
        r->iov.iov_base = g_malloc(3072);
        for (unsigned k = 0; k < 3072; k++) {
            ((uint8_t *)r->iov.iov_base)[k] = order[i] * 7 + k / 100;
        }
        memcpy(model + r->pos, r->iov.iov_base, 3072);
        pthread_mutex_lock(&flight.lock);
        while (flight.under_way >= 64) {
            pthread_cond_wait(&flight.cond, &flight.lock);
        }
        flight.under_way++;
        pthread_mutex_unlock(&flight.lock);
        bale_image_write(f.image, r->pos, &r->iov, 1, 0, flight_done, r);
        if (i % 500 == 0) {
            g_assert_cmpint(bale_store_flush_sync(f.store), ==, 0);
        }
    }
    pthread_mutex_lock(&flight.lock);
    while (flight.under_way) {
        pthread_cond_wait(&flight.cond, &flight.lock);
    }
    pthread_mutex_unlock(&flight.lock);
    check_equal(&f, model, IMAGE_SIZE);
    check_clean(&f);
    fixture_close(&f);
}

/*
 * A partial write of a new cluster waits for the rest of it if nothing lies
 * under the image, and is completed at once if something does.  What waited
 * keeps its zeroes when something comes to lie under it later.
 */
static bool backing_there;

static bool backing_present(void *opaque)
{
    return backing_there;
}

static void backing_read(void *opaque, uint64_t offset, void *buf, size_t len,
                         BaleDone *done, void *done_opaque)
{
    memset(buf, 'b', len);
    done(done_opaque, 0);
}

static uint64_t records_appended(Fixture *f)
{
    BaleStoreStats stats;

    bale_store_get_stats(f->store, &stats);
    return stats.records_appended;
}

static void test_partial_writes_over_backing(void)
{
    enum { CLUSTER = 16384, HALF = CLUSTER / 2 };
    g_autofree uint8_t *data = g_malloc(CLUSTER);
    g_autofree uint8_t *seen = g_malloc(CLUSTER);
    uint64_t records;
    Fixture f;

    fixture_init(&f, BALE_CODEC_ZSTD);
    memset(data, 'w', CLUSTER);
    bale_image_set_backing_read(f.image, backing_read, NULL);
    bale_image_set_backing_present(f.image, backing_present);

    backing_there = false;
    records = records_appended(&f);
    for (unsigned i = 0; i < 2; i++) {
        g_assert_cmpint(bale_image_write_sync(f.image, i * HALF, data, HALF,
                                              0), ==, 0);
    }
    /* Half of cluster 1. */
    g_assert_cmpint(bale_image_write_sync(f.image, CLUSTER, data, HALF, 0), ==,
                    0);
    backing_there = true;
    for (unsigned flushed = 0; flushed < 2; flushed++) {
        g_assert_cmpint(bale_image_read_sync(f.image, CLUSTER, seen, CLUSTER),
                        ==, 0);
        g_assert_true(memcmp(seen, data, HALF) == 0);
        g_assert_true(seen[HALF] == 0 && seen[CLUSTER - 1] == 0);
        g_assert_cmpint(bale_image_read_sync(f.image, CLUSTER + HALF, seen,
                                             HALF), ==, 0);
        g_assert_true(seen[0] == 0);
        g_assert_cmpint(bale_store_flush_sync(f.store), ==, 0);
    }
    g_assert_cmpuint(records_appended(&f) - records, ==, 2);

    /* Half of cluster 2, with something under it. */
    g_assert_cmpint(bale_image_write_sync(f.image, 2 * CLUSTER, data, HALF, 0),
                    ==, 0);
    g_assert_cmpuint(records_appended(&f) - records, ==, 3);
    g_assert_cmpint(bale_image_read_sync(f.image, 2 * CLUSTER, seen, CLUSTER),
                    ==, 0);
    g_assert_true(memcmp(seen, data, HALF) == 0);
    g_assert_true(seen[HALF] == 'b' && seen[CLUSTER - 1] == 'b');
    check_clean(&f);
    fixture_close(&f);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/store/empty-reads-zeroes", test_empty_reads_zeroes);
    g_test_add_func("/store/write-read-reopen", test_write_read_reopen);
    g_test_add_func("/store/kill-after-flush", test_kill_after_flush);
    g_test_add_func("/store/revive", test_revive);
    g_test_add_func("/store/session-begins-again", test_session_begins_again);
    g_test_add_func("/store/superblock-unreadable",
                    test_superblock_unreadable);
    g_test_add_func("/store/read-only-writes-nothing",
                    test_read_only_writes_nothing);
    g_test_add_func("/store/overwrites-give-space-back",
                    test_overwrites_give_space_back);
    g_test_add_func("/store/compaction-gives-space-back",
                    test_compaction_gives_space_back);
    g_test_add_func("/store/compaction-awaits-background",
                    test_compaction_awaits_background);
    g_test_add_func("/store/resize", test_resize);
    g_test_add_func("/store/out-of-range", test_out_of_range);
    g_test_add_func("/store/full", test_full);
    g_test_add_func("/store/partial-writes-over-backing",
                    test_partial_writes_over_backing);
    g_test_add_func("/store/parallel-partial-writes",
                    test_parallel_partial_writes);
    g_test_add_data_func("/store/model/none",
                         GINT_TO_POINTER(BALE_CODEC_NONE), test_model);
    g_test_add_data_func("/store/model/deflate",
                         GINT_TO_POINTER(BALE_CODEC_DEFLATE), test_model);
    g_test_add_data_func("/store/model/zstd",
                         GINT_TO_POINTER(BALE_CODEC_ZSTD), test_model);
    return g_test_run();
}
