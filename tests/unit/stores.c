/*
 * Stores in memory, for unit tests; see stores.h.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "stores.h"

uint64_t test_seed(void)
{
    const char *env = g_getenv("BALE_SEED");
    uint64_t seed = env ? g_ascii_strtoull(env, NULL, 0)
                        : (uint64_t)g_get_real_time();

    g_test_message("BALE_SEED=%" G_GUINT64_FORMAT, seed);
    return seed;
}

void test_complain(void *opaque, const char *what)
{
    g_error("the store says: %s", what);
}

BaleDevice *test_store_new(const BaleSimOptions *sim,
                           const BaleCreateOptions *create)
{
    g_autoptr(GError) err = NULL;
    BaleDevice *dev = bale_sim_new(sim);

    g_assert_true(bale_store_create(dev, create, &err));
    g_assert_no_error(err);
    return dev;
}

BaleStore *test_store_open(BaleDevice *dev, const BaleOpenOptions *open,
                           const char *name, BaleImage **image)
{
    g_autoptr(GError) err = NULL;
    BaleStore *store = bale_store_open(dev, open, &err);

    g_assert_no_error(err);
    g_assert_nonnull(store);
    if (image) {
        *image = bale_image_open(store, name, &err);
        g_assert_no_error(err);
        g_assert_nonnull(*image);
    }
    return store;
}

void test_store_close(BaleStore *store, BaleImage *image)
{
    g_autoptr(GError) err = NULL;

    if (image) {
        bale_image_close(image);
    }
    g_assert_true(bale_store_close(store, &err));
    g_assert_no_error(err);
}

void test_store_checkpoint(BaleStore *store)
{
    g_autoptr(GError) err = NULL;

    g_assert_true(bale_store_checkpoint(store, &err));
    g_assert_no_error(err);
}

BaleDevice *test_device_copy(BaleDevice *dev, const BaleSimOptions *sim)
{
    g_autoptr(BaleSimImage) image = bale_sim_image(dev);

    return bale_sim_new_from_image(image, sim);
}
