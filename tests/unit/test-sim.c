/*
 * The simulated device: it does what its header promises, so that what the
 * engine's tests find with it is true.
 *
 * BALE_SEED=<number> repeats a random run.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "extstore/device-sim.h"

#include <errno.h>
#include <glib/gstdio.h>
#include <stdlib.h>
#include <string.h>

#include "util/memory.h"

#define BLOCK 4096

static uint32_t random_seed(void)
{
    const char *env = g_getenv("BALE_SEED");
    uint32_t seed = env ? strtoul(env, NULL, 0) : g_random_int();

    g_test_message("BALE_SEED=%u", seed);
    return seed;
}

static void *block_of(uint8_t fill, size_t len)
{
    void *buf = bale_memory_try_alloc(BLOCK, len);

    g_assert_nonnull(buf);
    memset(buf, fill, len);
    return buf;
}

static int store(BaleDevice *dev, uint64_t offset, uint8_t fill, size_t len)
{
    BALE_AUTO_MEMORY void *buf = block_of(fill, len);

    return bale_device_store_sync(dev, offset, buf, len);
}

static void store_ok(BaleDevice *dev, uint64_t block, uint8_t fill)
{
    g_assert_cmpint(store(dev, block * BLOCK, fill, BLOCK), ==, 0);
}

/* The byte that fills @block as a reader sees it; fails if it is mixed. */
static uint8_t fill_of(BaleDevice *dev, uint64_t block)
{
    BALE_AUTO_MEMORY uint8_t *buf = block_of(0xee, BLOCK);

    g_assert_cmpint(bale_device_get_sync(dev, block * BLOCK, buf, BLOCK), ==,
                    0);
    for (size_t i = 1; i < BLOCK; i++) {
        g_assert_cmpint(buf[i], ==, buf[0]);
    }
    return buf[0];
}

static uint8_t image_byte(const BaleSimImage *image, uint64_t offset)
{
    uint8_t byte;

    bale_sim_image_read(image, offset, &byte, 1);
    return byte;
}

/* ---- reading and writing ---------------------------------------------- */

static void test_stores_are_read_back(void)
{
    g_autoptr(BaleDevice) dev = bale_sim_new(NULL);

    store_ok(dev, 3, 7);
    g_assert_cmpint(fill_of(dev, 3), ==, 7);
    g_assert_cmpint(fill_of(dev, 2), ==, 0);
    g_assert_cmpint(fill_of(dev, 1000), ==, 0);
}

static void test_size_follows_allocate_and_truncate(void)
{
    g_autoptr(BaleDevice) dev = bale_sim_new(NULL);
    BaleDeviceInfo info;

    g_assert_cmpint(dev->ops->allocate(dev, BLOCK, 9 * BLOCK), ==, 0);
    dev->ops->get_info(dev, &info);
    g_assert_cmpint(info.size, ==, 10 * BLOCK);
    store_ok(dev, 4, 1);
    store_ok(dev, 9, 2);
    g_assert_cmpint(dev->ops->release(dev, 4 * BLOCK, BLOCK), ==, 0);
    g_assert_cmpint(fill_of(dev, 4), ==, 0);
    g_assert_cmpint(dev->ops->release(dev, 9 * BLOCK, BLOCK), ==, 0);
    dev->ops->get_info(dev, &info);
    g_assert_cmpint(info.size, ==, 10 * BLOCK);
    g_assert_cmpint(dev->ops->truncate(dev, BLOCK), ==, 0);
    dev->ops->get_info(dev, &info);
    g_assert_cmpint(info.size, ==, BLOCK);
}

static void test_fixed_size_answers_enospc(void)
{
    BaleSimOptions options = { .size = 4 * BLOCK, .fixed_size = true };
    g_autoptr(BaleDevice) dev = bale_sim_new(&options);

    store_ok(dev, 3, 1);
    g_assert_cmpint(store(dev, 4 * BLOCK, 1, BLOCK), ==, -ENOSPC);
    g_assert_cmpint(dev->ops->allocate(dev, 0, 5 * BLOCK), ==, -ENOSPC);
    g_assert_cmpint(dev->ops->allocate(dev, 0, 4 * BLOCK), ==, 0);
}

static void test_max_size_answers_enospc(void)
{
    BaleSimOptions options = { .max_size = 4 * BLOCK };
    g_autoptr(BaleDevice) dev = bale_sim_new(&options);

    store_ok(dev, 3, 1);
    g_assert_cmpint(store(dev, 4 * BLOCK, 1, BLOCK), ==, -ENOSPC);
    g_assert_cmpint(dev->ops->allocate(dev, 0, 5 * BLOCK), ==, -ENOSPC);
}

static void test_read_only_refuses_changes(void)
{
    BaleSimOptions options = { .size = BLOCK, .read_only = true };
    g_autoptr(BaleDevice) dev = bale_sim_new(&options);

    g_assert_cmpint(store(dev, 0, 1, BLOCK), ==, -EROFS);
    g_assert_cmpint(dev->ops->allocate(dev, 0, 2 * BLOCK), ==, -EROFS);
    g_assert_cmpint(dev->ops->release(dev, 0, BLOCK), ==, -EROFS);
    g_assert_cmpint(dev->ops->truncate(dev, 0), ==, -EROFS);
}

static void test_random_contents_equal_flat_array(void)
{
    const size_t size = 300 * 512;
    BaleSimOptions options = { .block_size = 512 };
    g_autoptr(BaleDevice) dev = bale_sim_new(&options);
    g_autoptr(GRand) rand = g_rand_new_with_seed(random_seed());
    BALE_AUTO_MEMORY uint8_t *flat = bale_memory_try_alloc0(512, size);
    BALE_AUTO_MEMORY uint8_t *buf = bale_memory_try_alloc(512, size);

    for (unsigned i = 0; i < 3000; i++) {
        size_t from = g_rand_int_range(rand, 0, 300);
        size_t n = g_rand_int_range(rand, 1, MIN(40, 300 - from) + 1);

        switch (g_rand_int_range(rand, 0, 4)) {
        case 0:
            g_assert_cmpint(dev->ops->release(dev, from * 512, n * 512), ==,
                            0);
            memset(flat + from * 512, 0, n * 512);
            break;
        case 1:
            g_assert_cmpint(bale_device_get_sync(dev, from * 512, buf,
                                                 n * 512), ==, 0);
            g_assert_cmpmem(buf, n * 512, flat + from * 512, n * 512);
            break;
        default:
            for (size_t j = 0; j < n * 512; j++) {
                buf[j] = (uint8_t)g_rand_int(rand);
            }
            g_assert_cmpint(bale_device_store_sync(dev, from * 512, buf,
                                                   n * 512), ==, 0);
            memcpy(flat + from * 512, buf, n * 512);
            break;
        }
    }
    g_assert_cmpint(bale_device_get_sync(dev, 0, buf, size), ==, 0);
    g_assert_cmpmem(buf, size, flat, size);
}

static void test_huge_offsets_are_sparse(void)
{
    g_autoptr(BaleDevice) dev = bale_sim_new(NULL);
    const uint64_t far = (uint64_t)1 << 50;

    store_ok(dev, far / BLOCK, 5);
    store_ok(dev, 0, 6);
    g_assert_cmpint(fill_of(dev, far / BLOCK), ==, 5);
    g_assert_cmpint(dev->ops->release(dev, BLOCK, far - BLOCK), ==, 0);
    g_assert_cmpint(fill_of(dev, far / BLOCK), ==, 5);
    g_assert_cmpint(dev->ops->truncate(dev, BLOCK), ==, 0);
    g_assert_cmpint(fill_of(dev, far / BLOCK), ==, 0);
    g_assert_cmpint(fill_of(dev, 0), ==, 6);
}

/* ---- order of completion ---------------------------------------------- */

typedef struct Counted {
    BaleDeviceIo io; /* first */
    gint *left;
    GArray *order;
    unsigned number;
} Counted;

static void counted_done(BaleDeviceIo *io, int ret)
{
    Counted *counted = (Counted *)io;

    g_assert_cmpint(ret, ==, 0);
    if (counted->order) {
        g_array_append_val(counted->order, counted->number);
    }
    g_atomic_int_add(counted->left, -1);
}

/* Completes 20 stores by hand; returns the order. */
static GArray *manual_order(uint64_t seed)
{
    BaleSimOptions options = { .mode = BALE_SIM_MANUAL, .seed = seed };
    g_autoptr(BaleDevice) dev = bale_sim_new(&options);
    BALE_AUTO_MEMORY void *buf = block_of(1, BLOCK);
    Counted ios[20];
    GArray *order = g_array_new(FALSE, FALSE, sizeof(unsigned));
    gint left = 20;

    for (unsigned i = 0; i < 20; i++) {
        ios[i] = (Counted) {
            .io = { i * BLOCK, buf, BLOCK, counted_done },
            .left = &left,
            .order = order,
            .number = i,
        };
        dev->ops->store(dev, &ios[i].io);
    }
    g_assert_cmpint(left, ==, 20);
    g_assert_cmpint(bale_sim_pending(dev), ==, 20);
    g_assert_true(bale_sim_step(dev));
    g_assert_cmpint(left, ==, 19);
    g_assert_cmpint(bale_sim_run(dev), ==, 19);
    g_assert_false(bale_sim_step(dev));
    return order;
}

static void test_manual_order_comes_from_the_seed(void)
{
    g_autoptr(GArray) a = manual_order(1);
    g_autoptr(GArray) b = manual_order(1);
    g_autoptr(GArray) c = manual_order(2);
    gsize size = 20 * sizeof(unsigned);

    g_assert_cmpmem(a->data, size, b->data, size);
    g_assert_cmpint(memcmp(a->data, c->data, size), !=, 0);
}

static void test_deferred_completes_everything(void)
{
    BaleSimOptions options = { .mode = BALE_SIM_DEFERRED, .seed = 3 };
    g_autoptr(BaleDevice) dev = bale_sim_new(&options);
    BALE_AUTO_MEMORY void *buf = block_of(1, BLOCK);
    Counted ios[200];
    gint left = 200;

    for (unsigned i = 0; i < 200; i++) {
        ios[i] = (Counted) {
            .io = { i * BLOCK, buf, BLOCK, counted_done },
            .left = &left,
        };
        dev->ops->store(dev, &ios[i].io);
    }
    while (g_atomic_int_get(&left) > 0) {
        g_usleep(100);
    }
    for (unsigned i = 0; i < 200; i++) {
        g_assert_cmpint(fill_of(dev, i), ==, 1);
    }
}

static gpointer deferred_thread(gpointer opaque)
{
    BaleDevice *dev = opaque;
    static gint next;
    uint64_t base = 100 * (uint64_t)g_atomic_int_add(&next, 1);

    for (unsigned i = 0; i < 300; i++) {
        store_ok(dev, base + i % 7, (uint8_t)i);
        g_assert_cmpint(fill_of(dev, base + i % 7), ==, (uint8_t)i);
        if (i % 10 == 0) {
            g_assert_cmpint(bale_device_flush_sync(dev), ==, 0);
        }
    }
    return NULL;
}

static void test_threads_share_a_deferred_device(void)
{
    BaleSimOptions options = { .mode = BALE_SIM_DEFERRED };
    g_autoptr(BaleDevice) dev = bale_sim_new(&options);
    GThread *threads[4];

    for (unsigned i = 0; i < 4; i++) {
        threads[i] = g_thread_new("store", deferred_thread, dev);
    }
    for (unsigned i = 0; i < 4; i++) {
        g_thread_join(threads[i]);
    }
}

/* ---- crashes ---------------------------------------------------------- */

typedef struct Seen {
    GHashTable *states; /* "point:image bytes" -> 1 */
    unsigned calls, torn;
    unsigned blocks;
    uint64_t only_point; /* UINT64_MAX: any */
} Seen;

/* The first byte of each of the first blocks, as a string of digits. */
static bool see(BaleSimImage *image, const BaleSimCrash *crash, void *opaque)
{
    Seen *seen = opaque;
    g_autoptr(GString) key = g_string_new(NULL);

    seen->calls++;
    seen->torn += crash->torn;
    if (seen->only_point != UINT64_MAX && crash->point != seen->only_point) {
        return true;
    }
    for (unsigned i = 0; i < seen->blocks; i++) {
        g_string_append_printf(key, "%u", image_byte(image, i * BLOCK));
    }
    g_hash_table_add(seen->states, g_strdup(key->str));
    return true;
}

static void seen_init(Seen *seen, unsigned blocks, uint64_t only_point)
{
    *seen = (Seen) {
        .states = g_hash_table_new_full(g_str_hash, g_str_equal, g_free,
                                        NULL),
        .blocks = blocks,
        .only_point = only_point,
    };
}

static bool saw(const Seen *seen, const char *key)
{
    return g_hash_table_contains(seen->states, key);
}

static void test_every_subset_of_unflushed_stores(void)
{
    g_autoptr(BaleDevice) dev = bale_sim_new(NULL);
    Seen seen;

    store_ok(dev, 0, 1);
    g_assert_cmpint(bale_device_flush_sync(dev), ==, 0);
    store_ok(dev, 1, 2);
    store_ok(dev, 2, 3);
    seen_init(&seen, 3, bale_sim_events(dev));
    bale_sim_crash_states(dev, NULL, see, &seen);
    g_assert_cmpint(g_hash_table_size(seen.states), ==, 4);
    g_assert_true(saw(&seen, "100") && saw(&seen, "120") &&
                  saw(&seen, "103") && saw(&seen, "123"));
    /* Points: nothing 1, store 2, flushed 1, store 2, store 4. */
    g_assert_cmpint(seen.calls, ==, 10);
    g_hash_table_unref(seen.states);
}

static void test_flushed_stores_always_survive(void)
{
    g_autoptr(BaleDevice) dev = bale_sim_new(NULL);
    g_autoptr(BaleSimImage) durable = NULL, live = NULL;

    for (unsigned i = 0; i < 30; i++) {
        store_ok(dev, i % 10, (uint8_t)(i + 1));
    }
    g_assert_cmpint(bale_device_flush_sync(dev), ==, 0);
    durable = bale_sim_durable_image(dev);
    live = bale_sim_image(dev);
    g_assert_true(bale_sim_image_equal(durable, live));
    store_ok(dev, 0, 99);
    bale_sim_image_unref(live);
    live = bale_sim_image(dev);
    g_assert_false(bale_sim_image_equal(durable, live));
    bale_sim_image_unref(durable);
    durable = bale_sim_durable_image(dev);
    g_assert_cmpint(image_byte(durable, 0), ==, 21);
}

/* A flush issued before a store completed promises nothing about it. */
static void test_flush_covers_only_what_completed_before(void)
{
    BaleSimOptions options = { .mode = BALE_SIM_MANUAL };
    g_autoptr(BaleDevice) dev = bale_sim_new(&options);
    g_autoptr(BaleSimImage) durable = NULL;
    BALE_AUTO_MEMORY void *buf = block_of(1, BLOCK);
    gint left = 2;
    Counted one = { { 0, buf, BLOCK, counted_done }, &left };
    Counted flush = { { .done = counted_done }, &left };

    dev->ops->store(dev, &one.io);
    dev->ops->flush(dev, &flush.io);
    bale_sim_run(dev);
    g_assert_cmpint(left, ==, 0);
    durable = bale_sim_durable_image(dev);
    g_assert_cmpint(image_byte(durable, 0), ==, 0);
}

static void test_stores_under_way_may_survive(void)
{
    BaleSimOptions options = { .mode = BALE_SIM_MANUAL };
    g_autoptr(BaleDevice) dev = bale_sim_new(&options);
    BALE_AUTO_MEMORY void *buf = block_of(1, BLOCK);
    gint left = 1;
    Counted one = { { 0, buf, BLOCK, counted_done }, &left };
    Seen seen;

    dev->ops->store(dev, &one.io);
    seen_init(&seen, 1, 1);
    bale_sim_crash_states(dev, NULL, see, &seen);
    g_assert_true(saw(&seen, "0") && saw(&seen, "1"));
    g_hash_table_unref(seen.states);
    bale_sim_run(dev);
}

static void test_failed_flush_dooms_what_it_covered(void)
{
    g_autoptr(BaleDevice) dev = bale_sim_new(NULL);
    g_autoptr(BaleSimImage) durable = NULL;
    BaleSimFault fault = { .call = BALE_SIM_FLUSH, .error = -EIO };

    store_ok(dev, 0, 1);
    bale_sim_fault(dev, &fault);
    g_assert_cmpint(bale_device_flush_sync(dev), ==, -EIO);
    g_assert_cmpint(bale_device_flush_sync(dev), ==, 0);
    store_ok(dev, 1, 2);
    g_assert_cmpint(bale_device_flush_sync(dev), ==, 0);
    durable = bale_sim_durable_image(dev);
    g_assert_cmpint(image_byte(durable, 0), ==, 0);
    g_assert_cmpint(image_byte(durable, BLOCK), ==, 2);
}

/* What is doomed must not come back over what was made certain later. */
static void test_doomed_store_never_hides_a_later_certain_one(void)
{
    g_autoptr(BaleDevice) dev = bale_sim_new(NULL);
    BaleSimFault fault = { .call = BALE_SIM_FLUSH, .error = -EIO };
    Seen seen;

    store_ok(dev, 0, 1);
    bale_sim_fault(dev, &fault);
    bale_device_flush_sync(dev);
    store_ok(dev, 0, 2);
    g_assert_cmpint(bale_device_flush_sync(dev), ==, 0);
    seen_init(&seen, 1, bale_sim_events(dev));
    bale_sim_crash_states(dev, NULL, see, &seen);
    g_assert_cmpint(g_hash_table_size(seen.states), ==, 1);
    g_assert_true(saw(&seen, "2"));
    g_hash_table_unref(seen.states);
}

static void test_failed_store_may_survive(void)
{
    g_autoptr(BaleDevice) dev = bale_sim_new(NULL);
    BaleSimFault fault = { .call = BALE_SIM_STORE, .error = -EIO };
    Seen seen;

    bale_sim_fault(dev, &fault);
    g_assert_cmpint(store(dev, 0, 1, BLOCK), ==, -EIO);
    g_assert_cmpint(fill_of(dev, 0), ==, 0);
    seen_init(&seen, 1, bale_sim_events(dev));
    bale_sim_crash_states(dev, NULL, see, &seen);
    g_assert_true(saw(&seen, "0") && saw(&seen, "1"));
    g_hash_table_unref(seen.states);
}

static void test_release_and_size_are_uncertain_too(void)
{
    BaleSimOptions options = { .size = 0 };
    g_autoptr(BaleDevice) dev = bale_sim_new(&options);
    Seen seen;

    store_ok(dev, 0, 1);
    store_ok(dev, 1, 2);
    g_assert_cmpint(bale_device_flush_sync(dev), ==, 0);
    g_assert_cmpint(dev->ops->release(dev, 0, BLOCK), ==, 0);
    g_assert_cmpint(dev->ops->truncate(dev, BLOCK), ==, 0);
    seen_init(&seen, 2, bale_sim_events(dev));
    bale_sim_crash_states(dev, NULL, see, &seen);
    g_assert_cmpint(g_hash_table_size(seen.states), ==, 4);
    g_assert_true(saw(&seen, "12") && saw(&seen, "02") && saw(&seen, "10") &&
                  saw(&seen, "00"));
    g_hash_table_unref(seen.states);
}

/* In a torn store, each sector of 512 bytes is either old or new. */
static bool sectors_whole(BaleSimImage *image, const BaleSimCrash *crash,
                          void *opaque)
{
    unsigned *mixed = opaque;
    uint8_t buf[BLOCK];
    unsigned fresh = 0;

    bale_sim_image_read(image, 0, buf, BLOCK);
    for (unsigned i = 0; i < BLOCK / BALE_SIM_SECTOR; i++) {
        uint8_t first = buf[i * BALE_SIM_SECTOR];

        g_assert_true(first == 1 || first == 2);
        fresh += first == 2;
        for (unsigned j = 1; j < BALE_SIM_SECTOR; j++) {
            g_assert_cmpint(buf[i * BALE_SIM_SECTOR + j], ==, first);
        }
    }
    if (fresh > 0 && fresh < BLOCK / BALE_SIM_SECTOR) {
        g_assert_true(crash->torn);
        (*mixed)++;
    }
    return true;
}

static void test_torn_stores_by_sector(void)
{
    g_autoptr(BaleDevice) dev = bale_sim_new(NULL);
    BaleSimCrashOptions options = { .torn_samples = 100 };
    unsigned mixed = 0;

    store_ok(dev, 0, 1);
    bale_sim_forget(dev);
    store_ok(dev, 0, 2);
    options.first_point = bale_sim_events(dev);
    bale_sim_crash_states(dev, &options, sectors_whole, &mixed);
    g_assert_cmpint(mixed, >, 20);
}

static void test_many_unflushed_stores_are_sampled(void)
{
    g_autoptr(BaleDevice) dev = bale_sim_new(NULL);
    BaleSimCrashOptions options = { .samples = 50, .seed = 9 };
    Seen seen;

    for (unsigned i = 0; i < 100; i++) {
        store_ok(dev, i, 1);
    }
    options.first_point = 100;
    seen_init(&seen, 100, 100);
    g_assert_cmpint(bale_sim_crash_states(dev, &options, see, &seen), ==, 50);
    g_assert_cmpint(g_hash_table_size(seen.states), >, 30);
    g_hash_table_unref(seen.states);
}

typedef struct Kept {
    GPtrArray *images;
    GArray *crashes;
} Kept;

static bool keep(BaleSimImage *image, const BaleSimCrash *crash, void *opaque)
{
    Kept *kept = opaque;

    g_ptr_array_add(kept->images, bale_sim_image_ref(image));
    g_array_append_val(kept->crashes, *crash);
    return true;
}

static void kept_init(Kept *kept)
{
    kept->images = g_ptr_array_new_with_free_func(
        (GDestroyNotify)bale_sim_image_unref);
    kept->crashes = g_array_new(FALSE, FALSE, sizeof(BaleSimCrash));
}

static void kept_clear(Kept *kept)
{
    g_ptr_array_unref(kept->images);
    g_array_unref(kept->crashes);
}

/* Every state is the same when it is asked for alone. */
static void test_a_state_replays_alone(void)
{
    g_autoptr(BaleDevice) dev = bale_sim_new(NULL);
    BaleSimCrashOptions options = {
        .max_exhaustive = 3, .samples = 20, .torn_samples = 5, .seed = 77,
    };
    Kept all;

    for (unsigned i = 0; i < 14; i++) {
        store_ok(dev, i % 5, (uint8_t)(i + 1));
        if (i == 6) {
            bale_device_flush_sync(dev);
        }
    }
    kept_init(&all);
    bale_sim_crash_states(dev, &options, keep, &all);
    for (guint i = 0; i < all.crashes->len; i++) {
        const BaleSimCrash *crash = &g_array_index(all.crashes, BaleSimCrash,
                                                   i);
        BaleSimCrashOptions one = options;
        Kept alone;

        one.first_point = one.last_point = crash->point;
        if (crash->point == 0) {
            continue; /* last_point 0 means the last of all */
        }
        one.only_state = true;
        one.state = crash->state;
        kept_init(&alone);
        g_assert_cmpint(bale_sim_crash_states(dev, &one, keep, &alone), ==, 1);
        g_assert_true(bale_sim_image_equal(alone.images->pdata[0],
                                           all.images->pdata[i]));
        kept_clear(&alone);
    }
    kept_clear(&all);
}

static gboolean image_known(GPtrArray *images, BaleSimImage *image)
{
    for (guint i = 0; i < images->len; i++) {
        if (bale_sim_image_equal(images->pdata[i], image)) {
            return TRUE;
        }
    }
    return FALSE;
}

/* The shorter enumeration leaves out points, not images. */
static void test_barriers_only_has_every_image(void)
{
    g_autoptr(BaleDevice) dev = bale_sim_new(NULL);
    BaleSimCrashOptions options = { .barriers_only = true };
    Kept all, few;

    for (unsigned i = 0; i < 12; i++) {
        store_ok(dev, i % 5, (uint8_t)(i + 1));
        if (i % 4 == 3) {
            bale_device_flush_sync(dev);
        }
    }
    store_ok(dev, 0, 100);
    kept_init(&all);
    kept_init(&few);
    bale_sim_crash_states(dev, NULL, keep, &all);
    bale_sim_crash_states(dev, &options, keep, &few);
    g_assert_cmpint(few.images->len, <, all.images->len);
    for (guint i = 0; i < all.images->len; i++) {
        BaleSimImage *image = all.images->pdata[i];

        /* Size grows with the store here, so sizes agree as well. */
        g_assert_true(image_known(few.images, image));
    }
    kept_clear(&all);
    kept_clear(&few);
}

/*
 * An independent statement of the rule, in the simplest way: with single
 * threaded immediate operations, a state is legal if for each block its
 * content is the last flushed one or a later one.
 */
typedef struct Oracle {
    unsigned blocks;
    GArray *values[8];  /* of each block, in order; first is 0 */
    GArray *stamps[8];  /* event of each */
    uint64_t *barriers; /* barriers[p]: last flush event <= p */
} Oracle;

static bool oracle_check(BaleSimImage *image, const BaleSimCrash *crash,
                         void *opaque)
{
    Oracle *oracle = opaque;

    for (unsigned b = 0; b < oracle->blocks; b++) {
        uint8_t is = image_byte(image, b * BLOCK);
        bool legal = false;

        for (guint i = 0; i < oracle->values[b]->len; i++) {
            uint64_t stamp = g_array_index(oracle->stamps[b], uint64_t, i);
            bool last_flushed =
                stamp < oracle->barriers[crash->point] &&
                (i + 1 == oracle->values[b]->len ||
                 g_array_index(oracle->stamps[b], uint64_t, i + 1) >
                     oracle->barriers[crash->point]);
            bool later = stamp > oracle->barriers[crash->point] &&
                         stamp <= crash->point;

            if (i == 0) {
                last_flushed =
                    oracle->values[b]->len == 1 ||
                    g_array_index(oracle->stamps[b], uint64_t, 1) >
                        oracle->barriers[crash->point];
            }
            legal |= (last_flushed || later) &&
                     g_array_index(oracle->values[b], uint8_t, i) == is;
        }
        g_assert_true(legal);
    }
    return true;
}

static void test_random_histories_against_an_oracle(void)
{
    g_autoptr(GRand) rand = g_rand_new_with_seed(random_seed());
    uint64_t states = 0;

    for (unsigned round = 0; round < 40; round++) {
        g_autoptr(BaleDevice) dev = bale_sim_new(NULL);
        Oracle oracle = { .blocks = 6 };
        uint64_t zero = 0, barrier = 0;
        uint8_t nothing = 0;
        BaleSimCrashOptions options = { .max_exhaustive = 8, .samples = 64 };

        oracle.barriers = g_new0(uint64_t, 42);
        for (unsigned b = 0; b < oracle.blocks; b++) {
            oracle.values[b] = g_array_new(FALSE, FALSE, 1);
            oracle.stamps[b] = g_array_new(FALSE, FALSE, sizeof(uint64_t));
            g_array_append_val(oracle.values[b], nothing);
            g_array_append_val(oracle.stamps[b], zero);
        }
        for (uint64_t event = 1; event <= 40; event++) {
            if (g_rand_int_range(rand, 0, 6) == 0) {
                g_assert_cmpint(bale_device_flush_sync(dev), ==, 0);
                barrier = event;
            } else {
                unsigned b = (unsigned)g_rand_int_range(rand, 0, 6);
                uint8_t fill = (uint8_t)(event + 100);

                store_ok(dev, b, fill);
                g_array_append_val(oracle.values[b], fill);
                g_array_append_val(oracle.stamps[b], event);
            }
            oracle.barriers[event] = barrier;
            g_assert_cmpint(bale_sim_events(dev), ==, event);
        }
        states += bale_sim_crash_states(dev, &options, oracle_check, &oracle);
        for (unsigned b = 0; b < oracle.blocks; b++) {
            g_array_unref(oracle.values[b]);
            g_array_unref(oracle.stamps[b]);
        }
        g_free(oracle.barriers);
    }
    g_test_message("%" G_GUINT64_FORMAT " crash states", states);
}

/* A device made from a crash image crashes in its turn. */
static bool crash_again(BaleSimImage *image, const BaleSimCrash *crash,
                        void *opaque)
{
    g_autoptr(BaleDevice) dev = bale_sim_new_from_image(image, NULL);
    g_autoptr(BaleSimImage) durable = NULL;

    store_ok(dev, 5, 9);
    durable = bale_sim_durable_image(dev);
    g_assert_true(bale_sim_image_equal(durable, image));
    *(unsigned *)opaque += bale_sim_crash_states(dev, NULL, see, &(Seen) {
        .blocks = 0, .only_point = 1000,
    }) == 3;
    return true;
}

static void test_a_crash_image_makes_a_device(void)
{
    g_autoptr(BaleDevice) dev = bale_sim_new(NULL);
    unsigned n = 0;

    for (unsigned i = 0; i < 8; i++) {
        store_ok(dev, i, 1);
    }
    g_assert_cmpint(bale_sim_crash_states(dev, NULL, crash_again, &n), ==, 511);
    g_assert_cmpint(n, ==, 511);
}

static void test_image_survives_a_file(void)
{
    g_autoptr(BaleDevice) dev = bale_sim_new(NULL);
    g_autofree char *name = NULL;
    g_autoptr(BaleSimImage) image = NULL, again = NULL;
    int fd = g_file_open_tmp("bale-sim-XXXXXX", &name, NULL);

    g_assert_cmpint(fd, >=, 0);
    store_ok(dev, 0, 1);
    store_ok(dev, 70, 2);
    g_assert_cmpint(dev->ops->allocate(dev, 0, 99 * BLOCK + 512), ==, 0);
    image = bale_sim_image(dev);
    g_assert_true(bale_sim_image_save(image, name, NULL));
    again = bale_sim_image_load(name, NULL);
    g_assert_true(bale_sim_image_equal(image, again));
    g_close(fd, NULL);
    g_unlink(name);
}

/* ---- faults ----------------------------------------------------------- */

static void test_nth_call_fails_once(void)
{
    static const int errors[] = { -EIO, -ENOSPC };

    for (unsigned e = 0; e < G_N_ELEMENTS(errors); e++) {
        g_autoptr(BaleDevice) dev = bale_sim_new(NULL);
        BaleSimFault fault = {
            .call = BALE_SIM_STORE, .nth = 3, .error = errors[e],
        };

        bale_sim_fault(dev, &fault);
        for (unsigned i = 1; i < 6; i++) {
            g_assert_cmpint(store(dev, 0, 1, BLOCK), ==,
                            i == 3 ? errors[e] : 0);
        }
        g_assert_cmpint(bale_sim_faults_hit(dev), ==, 1);
    }
}

static void test_sticky_fault_stays(void)
{
    g_autoptr(BaleDevice) dev = bale_sim_new(NULL);
    BaleSimFault fault = {
        .call = BALE_SIM_GET, .nth = 2, .error = -EIO, .sticky = true,
    };
    BALE_AUTO_MEMORY void *buf = block_of(0, BLOCK);

    bale_sim_fault(dev, &fault);
    g_assert_cmpint(bale_device_get_sync(dev, 0, buf, BLOCK), ==, 0);
    for (unsigned i = 0; i < 5; i++) {
        g_assert_cmpint(bale_device_get_sync(dev, 0, buf, BLOCK), ==, -EIO);
    }
    bale_sim_faults_clear(dev);
    g_assert_cmpint(bale_device_get_sync(dev, 0, buf, BLOCK), ==, 0);
}

/* EINTR, EAGAIN and short transfers, once each, are not seen by the caller. */
static void test_interruptions_are_hidden(void)
{
    static const int errors[] = { -EINTR, -EAGAIN, 0 };

    for (unsigned e = 0; e < G_N_ELEMENTS(errors); e++) {
        for (uint64_t nth = 1; nth <= 2; nth++) {
            g_autoptr(BaleDevice) dev = bale_sim_new(NULL);
            BALE_AUTO_MEMORY uint8_t *buf = block_of(0, 8 * BLOCK);
            BALE_AUTO_MEMORY uint8_t *back = block_of(0, 8 * BLOCK);
            BaleSimFault fault = {
                .nth = nth, .error = errors[e], .short_len = 3 * BLOCK,
            };
            BaleDeviceStats stats;

            for (unsigned i = 0; i < 8; i++) {
                memset(buf + i * BLOCK, (int)i + 1, BLOCK);
            }
            fault.call = BALE_SIM_STORE;
            bale_sim_fault(dev, &fault);
            fault.call = BALE_SIM_GET;
            bale_sim_fault(dev, &fault);
            for (unsigned i = 0; i < 2; i++) {
                g_assert_cmpint(bale_device_store_sync(dev, 0, buf, 8 * BLOCK),
                                ==, 0);
                g_assert_cmpint(bale_device_get_sync(dev, 0, back, 8 * BLOCK),
                                ==, 0);
                g_assert_cmpmem(buf, 8 * BLOCK, back, 8 * BLOCK);
            }
            dev->ops->get_stats(dev, &stats);
            g_assert_cmpint(stats.retries, ==, 2);
        }
    }
}

static void test_endless_interruption_ends_in_eio(void)
{
    static const BaleSimCall calls[] = {
        BALE_SIM_GET, BALE_SIM_STORE, BALE_SIM_FLUSH, BALE_SIM_ALLOCATE,
        BALE_SIM_RELEASE, BALE_SIM_TRUNCATE,
    };

    for (unsigned i = 0; i < G_N_ELEMENTS(calls); i++) {
        BaleSimOptions options = { .size = 10 * BLOCK };
        g_autoptr(BaleDevice) dev = bale_sim_new(&options);
        BALE_AUTO_MEMORY void *buf = block_of(0, BLOCK);
        BaleSimFault fault = {
            .call = calls[i], .error = -EAGAIN, .sticky = true,
        };
        int ret[BALE_SIM_CALLS];

        bale_sim_fault(dev, &fault);
        ret[BALE_SIM_GET] = bale_device_get_sync(dev, 0, buf, BLOCK);
        ret[BALE_SIM_STORE] = bale_device_store_sync(dev, 0, buf, BLOCK);
        ret[BALE_SIM_FLUSH] = bale_device_flush_sync(dev);
        ret[BALE_SIM_ALLOCATE] = dev->ops->allocate(dev, 0, 11 * BLOCK);
        ret[BALE_SIM_RELEASE] = dev->ops->release(dev, 0, BLOCK);
        ret[BALE_SIM_TRUNCATE] = dev->ops->truncate(dev, BLOCK);
        for (unsigned j = 0; j < BALE_SIM_CALLS; j++) {
            g_assert_cmpint(ret[j], ==, j == calls[i] ? -EIO : 0);
        }
    }
}

static void test_error_after_short_store_is_partial(void)
{
    g_autoptr(BaleDevice) dev = bale_sim_new(NULL);
    BaleSimFault half = { .call = BALE_SIM_STORE, .short_len = BLOCK };
    BaleSimFault fail = { .call = BALE_SIM_STORE, .nth = 2, .error = -EIO };

    bale_sim_fault(dev, &half);
    bale_sim_fault(dev, &fail);
    g_assert_cmpint(store(dev, 0, 5, 2 * BLOCK), ==, -EIO);
    g_assert_cmpint(fill_of(dev, 0), ==, 5);
    g_assert_cmpint(fill_of(dev, 1), ==, 0);
}

/* ---- damage ----------------------------------------------------------- */

static void test_damage_shows_in_reads(void)
{
    g_autoptr(BaleDevice) dev = bale_sim_new(NULL);
    BALE_AUTO_MEMORY uint8_t *buf = block_of(0, BLOCK);

    for (unsigned i = 0; i < 5; i++) {
        store_ok(dev, i, (uint8_t)(i + 1));
    }
    bale_sim_flip_bit(dev, 100, 3);
    g_assert_cmpint(bale_device_get_sync(dev, 0, buf, BLOCK), ==, 0);
    g_assert_cmpint(buf[100], ==, 1 ^ 8);
    g_assert_cmpint(buf[101], ==, 1);
    bale_sim_flip_bit(dev, 100, 3);
    bale_sim_zero(dev, BLOCK, BLOCK);
    g_assert_cmpint(fill_of(dev, 1), ==, 0);
    bale_sim_swap(dev, 0, 2 * BLOCK, BLOCK);
    g_assert_cmpint(fill_of(dev, 0), ==, 3);
    g_assert_cmpint(fill_of(dev, 2), ==, 1);
    bale_sim_duplicate(dev, 4 * BLOCK, 3 * BLOCK, BLOCK);
    g_assert_cmpint(fill_of(dev, 3), ==, 5);
}

static void test_stale_serves_previous_contents(void)
{
    g_autoptr(BaleDevice) dev = bale_sim_new(NULL);

    store_ok(dev, 0, 1);
    store_ok(dev, 1, 2);
    store_ok(dev, 0, 3);
    g_assert_cmpint(bale_sim_stale(dev, 0, 3 * BLOCK), ==, 2);
    g_assert_cmpint(fill_of(dev, 0), ==, 1);
    g_assert_cmpint(fill_of(dev, 1), ==, 0);
}

static void test_lost_stores_are_acknowledged(void)
{
    g_autoptr(BaleDevice) dev = bale_sim_new(NULL);
    g_autoptr(BaleSimImage) durable = NULL;
    BALE_AUTO_MEMORY uint8_t *buf = block_of(0, 2 * BLOCK);

    g_assert_cmpint(store(dev, 0, 1, 2 * BLOCK), ==, 0);
    bale_sim_lose(dev, BLOCK - 512, 512);
    g_assert_cmpint(store(dev, 0, 2, 2 * BLOCK), ==, 0);
    g_assert_cmpint(bale_device_flush_sync(dev), ==, 0);
    g_assert_cmpint(bale_device_get_sync(dev, 0, buf, 2 * BLOCK), ==, 0);
    g_assert_cmpint(buf[BLOCK - 513], ==, 2);
    g_assert_cmpint(buf[BLOCK - 512], ==, 1);
    g_assert_cmpint(buf[BLOCK], ==, 2);
    durable = bale_sim_durable_image(dev);
    g_assert_cmpint(image_byte(durable, BLOCK - 1), ==, 1);
    bale_sim_lose(dev, 0, 0);
    store_ok(dev, 0, 4);
    g_assert_cmpint(fill_of(dev, 0), ==, 4);
}

static void test_story_tells_the_history(void)
{
    g_autoptr(BaleDevice) dev = bale_sim_new(NULL);
    g_autofree char *story = NULL;

    store_ok(dev, 1, 1);
    bale_device_flush_sync(dev);
    store_ok(dev, 2, 1);
    story = bale_sim_story(dev);
    g_assert_nonnull(strstr(story, "1..1 store 4096+4096 durable 2\n"));
    g_assert_nonnull(strstr(story, "2..2 flush\n"));
    g_assert_nonnull(strstr(story, "3..3 store 8192+4096 durable -\n"));
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
#define TEST(name) g_test_add_func("/sim/" #name, test_##name)
    TEST(stores_are_read_back);
    TEST(size_follows_allocate_and_truncate);
    TEST(fixed_size_answers_enospc);
    TEST(max_size_answers_enospc);
    TEST(read_only_refuses_changes);
    TEST(random_contents_equal_flat_array);
    TEST(huge_offsets_are_sparse);
    TEST(manual_order_comes_from_the_seed);
    TEST(deferred_completes_everything);
    TEST(threads_share_a_deferred_device);
    TEST(every_subset_of_unflushed_stores);
    TEST(flushed_stores_always_survive);
    TEST(flush_covers_only_what_completed_before);
    TEST(stores_under_way_may_survive);
    TEST(failed_flush_dooms_what_it_covered);
    TEST(doomed_store_never_hides_a_later_certain_one);
    TEST(failed_store_may_survive);
    TEST(release_and_size_are_uncertain_too);
    TEST(torn_stores_by_sector);
    TEST(many_unflushed_stores_are_sampled);
    TEST(a_state_replays_alone);
    TEST(barriers_only_has_every_image);
    TEST(random_histories_against_an_oracle);
    TEST(a_crash_image_makes_a_device);
    TEST(image_survives_a_file);
    TEST(nth_call_fails_once);
    TEST(sticky_fault_stays);
    TEST(interruptions_are_hidden);
    TEST(endless_interruption_ends_in_eio);
    TEST(error_after_short_store_is_partial);
    TEST(damage_shows_in_reads);
    TEST(stale_serves_previous_contents);
    TEST(lost_stores_are_acknowledged);
    TEST(story_tells_the_history);
    return g_test_run();
}
