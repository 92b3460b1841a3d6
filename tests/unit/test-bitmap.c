/*
 * Dirty bitmaps in a store: what was stored is there again, after closing,
 * compaction, and a kill at every moment either whole or inconsistent; what
 * happens to them with their image; and what a catalogue may say of them.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <errno.h>
#include <string.h>

#include "../../block/extstore/store-internal.h"
#include "extstore/bitmap.h"
#include "stores.h"

#define IMAGE_SIZE  (64ull << 20)
#define GRANULARITY 512u
#define CLUSTER     4096u
#define BITS_LEN    (IMAGE_SIZE / GRANULARITY / 8)

typedef struct Fixture {
    BaleSimOptions sim;
    BaleOpenOptions open;
    BaleDevice *dev;
    BaleStore *store;
    BaleImage *image;
    uint8_t bits[BITS_LEN]; /* what was stored last */
} Fixture;

static void fixture_open(Fixture *f)
{
    f->store = test_store_open(f->dev, &f->open, "n", &f->image);
}

static void fixture_init(Fixture *f)
{
    BaleCreateOptions o = {
        .image = "n",
        .size = IMAGE_SIZE,
        .page_size = 2u << 20,
        .cluster_size = CLUSTER,
        .codec = BALE_CODEC_ZSTD,
    };

    memset(f, 0, sizeof(*f));
    f->open.workers = 2;
    f->open.cache_size = 1u << 20;
    f->sim.no_history = true;
    f->dev = test_store_new(&f->sim, &o);
    fixture_open(f);
}

static void fixture_close(Fixture *f)
{
    test_store_close(f->store, f->image);
}

static void fixture_reopen(Fixture *f, bool clean)
{
    BaleDevice *dev;

    if (clean) {
        test_store_checkpoint(f->store);
    }
    dev = test_device_copy(f->dev, &f->sim);
    fixture_close(f);
    f->dev = dev;
    fixture_open(f);
}

/* From now on the device notes what happens. */
static void fixture_history(Fixture *f)
{
    f->sim.no_history = false;
    fixture_reopen(f, true);
}

static void give(void *opaque, uint64_t offset, void *buf, size_t len)
{
    Fixture *f = opaque;

    g_assert_cmpuint(offset + len, <=, BITS_LEN);
    memcpy(buf, f->bits + offset, len);
}

static void take(void *opaque, uint64_t offset, void *buf, size_t len)
{
    Fixture *f = opaque;

    g_assert_cmpuint(offset + len, <=, BITS_LEN);
    g_assert_cmpmem(buf, len, f->bits + offset, len);
}

static BaleBitmapInfo info_of(const char *name)
{
    return (BaleBitmapInfo){ .name = (char *)name, .size = IMAGE_SIZE,
                             .granularity = GRANULARITY, .enabled = true };
}

/* Store random bits as @name. */
static bool store(Fixture *f, const char *name, GError **errp)
{
    BaleBitmapSource source = { info_of(name), give, f };

    memset(f->bits, 0, BITS_LEN);
    for (int i = 0; i < 40; i++) {
        f->bits[g_random_int_range(0, BITS_LEN)] = g_random_int();
    }
    return bale_bitmaps_store(f->image, &source, 1, errp);
}

static void store_ok(Fixture *f, const char *name)
{
    g_autoptr(GError) err = NULL;

    g_assert_true(store(f, name, &err));
    g_assert_no_error(err);
}

/* The bitmap of that name must be there and, if it is not in use, right. */
static bool look(Fixture *f, const char *name)
{
    g_autoptr(GError) err = NULL;
    g_autoptr(GArray) list = bale_bitmap_list(f->store, "n", &err);
    bool in_use = true, found = false;

    g_assert_no_error(err);
    for (guint i = 0; i < list->len; i++) {
        BaleBitmapInfo *info = &g_array_index(list, BaleBitmapInfo, i);

        if (!strcmp(info->name, name)) {
            g_assert_cmpuint(info->granularity, ==, GRANULARITY);
            g_assert_true(info->enabled);
            in_use = info->in_use;
            found = true;
        }
    }
    g_assert_true(found);
    if (!in_use) {
        g_assert_true(bale_bitmap_load(f->image, name, take, f, &err));
        g_assert_no_error(err);
    }
    return in_use;
}

static guint count(Fixture *f)
{
    g_autoptr(GArray) list = bale_bitmap_list(f->store, "n", NULL);

    return list ? list->len : 0;
}

static bool complain(void *opaque, const char *what, uint64_t done,
                     uint64_t total)
{
    if (what) {
        g_error("the check says: %s", what);
    }
    return true;
}

static void check_store(Fixture *f)
{
    g_autoptr(GError) err = NULL;
    BaleCheckResult result;

    g_assert_true(bale_store_check(f->store, BALE_CHECK_DATA, complain,
                                   NULL, &result, &err));
    g_assert_no_error(err);
    g_assert_cmpuint(result.damaged + result.wrong_counters, ==, 0);
}

static void test_store_load(void)
{
    g_autofree Fixture *f = g_new(Fixture, 1);
    BaleCompactOptions o = { .rate = 0 };

    fixture_init(f);
    g_assert_cmpuint(count(f), ==, 0);
    for (int i = 0; i < 4; i++) {
        store_ok(f, "b");
        g_assert_false(look(f, "b"));
        fixture_reopen(f, i % 2 == 0);
        g_assert_false(look(f, "b"));
    }
    g_assert_true(bale_store_compact(f->store, &o, NULL));
    g_assert_false(look(f, "b"));
    check_store(f);
    g_assert_cmpuint(count(f), ==, 1);
    g_assert_true(bale_bitmap_remove(f->image, "b", NULL));
    g_assert_false(bale_bitmap_remove(f->image, "b", NULL));
    fixture_reopen(f, false);
    g_assert_cmpuint(count(f), ==, 0);
    check_store(f);
    fixture_close(f);
}

static void test_in_use_after_kill(void)
{
    g_autofree Fixture *f = g_new(Fixture, 1);

    fixture_init(f);
    store_ok(f, "b");
    g_assert_true(bale_bitmaps_begin_use(f->image, NULL));
    fixture_reopen(f, false);
    g_assert_true(look(f, "b"));
    /* Nobody has stored it: a clean close changes nothing. */
    fixture_reopen(f, true);
    g_assert_true(look(f, "b"));
    store_ok(f, "b");
    fixture_reopen(f, true);
    g_assert_false(look(f, "b"));
    fixture_close(f);
}

/* --- a power cut at any moment --- */

typedef struct Cut {
    Fixture f;
    uint8_t before[BITS_LEN], after[BITS_LEN];
    uint64_t used, stored; /* events, when that was acknowledged */
} Cut;

static bool cut_look(BaleSimImage *image, const BaleSimCrash *crash,
                     void *opaque)
{
    Cut *cut = opaque;
    g_autofree Fixture *f = g_new(Fixture, 1);
    bool in_use;

    *f = cut->f;
    f->dev = bale_sim_new_from_image(image, &f->sim);
    fixture_open(f);
    memcpy(f->bits, crash->point < cut->used ? cut->before : cut->after,
           BITS_LEN);
    in_use = look(f, "b");
    if (crash->point >= cut->stored) {
        g_assert_false(in_use);
    }
    fixture_close(f);
    return true;
}

/*
 * Until the bitmap was marked as in use the old bits are there, and from then
 * on they never are; at last the new ones are.
 */
static void test_power_cut(void)
{
    g_autofree Cut *cut = g_new0(Cut, 1);
    BaleSimCrashOptions o = { .samples = 64, .torn_samples = 48 };
    char data[CLUSTER];
    uint64_t states;

    memset(data, 'd', sizeof(data));
    fixture_init(&cut->f);
    store_ok(&cut->f, "b");
    memcpy(cut->before, cut->f.bits, BITS_LEN);
    fixture_history(&cut->f);
    g_assert_true(bale_bitmaps_begin_use(cut->f.image, NULL));
    cut->used = bale_sim_events(cut->f.dev);
    g_assert_cmpint(bale_image_write_sync(cut->f.image, 0, data, sizeof(data),
                                          0), ==, 0);
    store_ok(&cut->f, "b");
    memcpy(cut->after, cut->f.bits, BITS_LEN);
    cut->stored = bale_sim_events(cut->f.dev);
    test_store_checkpoint(cut->f.store);
    cut->f.sim.no_history = true;
    states = bale_sim_crash_states(cut->f.dev, &o, cut_look, cut);
    g_test_message("%" G_GUINT64_FORMAT " states", states);
    g_assert_cmpuint(states, >, 100);
    fixture_close(&cut->f);
}

/* --- a device that fails --- */

/* The n-th write or flush fails: an error, and what is there is not trusted. */
static void test_device_fails(void)
{
    static const BaleSimCall calls[] = { BALE_SIM_STORE, BALE_SIM_FLUSH };

    /* The store says so when it is closed. */
    g_log_set_always_fatal(G_LOG_FATAL_MASK);
    for (unsigned n = 1; n <= 8; n++) {
        for (unsigned i = 0; i < G_N_ELEMENTS(calls); i++) {
            g_autofree Fixture *f = g_new(Fixture, 1);
            BaleSimFault fault = { .call = calls[i], .nth = n,
                                   .error = n % 2 ? -EIO : -ENOSPC };
            g_autoptr(BaleSimImage) image = NULL;
            bool ok;

            fixture_init(f);
            store_ok(f, "b");
            g_assert_true(bale_bitmaps_begin_use(f->image, NULL));
            bale_sim_fault(f->dev, &fault);
            ok = store(f, "b", NULL);
            g_assert_true(ok || bale_sim_faults_hit(f->dev));
            image = bale_sim_image(f->dev);
            bale_image_close(f->image);
            bale_store_close(f->store, NULL);
            f->dev = bale_sim_new_from_image(image, &f->sim);
            fixture_open(f);
            g_assert_false(look(f, "b") && ok);
            fixture_close(f);
        }
    }
}

static void test_follows_image(void)
{
    g_autofree Fixture *f = g_new(Fixture, 1);
    BaleSnapshotInfo snapshot = { .name = "s" };
    g_autoptr(GArray) list = NULL;

    fixture_init(f);
    store_ok(f, "b");
    g_assert_true(bale_snapshot_create(f->store, "n", &snapshot, NULL));
    g_assert_false(look(f, "b"));
    g_assert_true(bale_image_clone(f->store, "n", NULL, "clone", NULL));
    list = bale_bitmap_list(f->store, "clone", NULL);
    g_assert_cmpuint(list->len, ==, 0);
    g_assert_true(bale_image_rename(f->store, "n", "m", NULL));
    g_assert_true(bale_image_rename(f->store, "m", "n", NULL));
    g_assert_false(look(f, "b"));
    g_assert_true(bale_snapshot_rollback(f->store, "n", "s", NULL));
    g_assert_true(look(f, "b"));
    store_ok(f, "b");
    g_assert_true(bale_image_resize(f->image, IMAGE_SIZE / 2, NULL));
    g_assert_true(look(f, "b"));
    bale_image_close(f->image);
    g_assert_true(bale_image_delete(f->store, "n", NULL));
    g_assert_cmpuint(f->store->catalogue->bitmaps->len, ==, 0);
    check_store(f);
    f->image = bale_image_open(f->store, "clone", NULL);
    fixture_close(f);
}

static void test_limits(void)
{
    g_autofree Fixture *f = g_new(Fixture, 1);
    g_autofree char *long_name = g_strnfill(BALE_BITMAP_NAME_MAX, 'x');
    g_autofree char *longer = g_strnfill(BALE_BITMAP_NAME_MAX + 1, 'x');
    BaleBitmapInfo info = info_of(long_name), many[BALE_BITMAPS_MAX + 1];

    fixture_init(f);
    g_assert_true(bale_bitmaps_check(f->image, &info, 1, NULL));
    store_ok(f, long_name);
    g_assert_false(look(f, long_name));
    fixture_reopen(f, false);
    g_assert_false(look(f, long_name));
    info.name = longer;
    g_assert_false(bale_bitmaps_check(f->image, &info, 1, NULL));
    g_assert_false(store(f, longer, NULL));
    info = info_of("");
    g_assert_false(bale_bitmaps_check(f->image, &info, 1, NULL));
    info = info_of("g");
    info.granularity = 256;
    g_assert_false(bale_bitmaps_check(f->image, &info, 1, NULL));
    info.granularity = 1536;
    g_assert_false(bale_bitmaps_check(f->image, &info, 1, NULL));
    info.granularity = 0;
    g_assert_false(bale_bitmaps_check(f->image, &info, 1, NULL));
    info.granularity = UINT32_C(1) << 31;
    g_assert_true(bale_bitmaps_check(f->image, &info, 1, NULL));
    info.granularity = 512;
    info.size = BALE_BITMAP_DATA_MAX * 8 * 512 + 1;
    g_assert_false(bale_bitmaps_check(f->image, &info, 1, NULL));
    for (guint i = 0; i < G_N_ELEMENTS(many); i++) {
        many[i] = info_of(NULL);
        many[i].name = g_strdup_printf("%u", i);
    }
    g_assert_true(bale_bitmaps_check(f->image, many, BALE_BITMAPS_MAX - 1,
                                     NULL));
    g_assert_false(bale_bitmaps_check(f->image, many, BALE_BITMAPS_MAX,
                                      NULL));
    for (guint i = 0; i < G_N_ELEMENTS(many); i++) {
        g_free(many[i].name);
    }
    fixture_close(f);
}

/* --- what a catalogue may say --- */

static BaleCatalogue *catalogue_with_bitmaps(void)
{
    BaleCatalogue *cat = bale_catalogue_new();
    BaleImageEntry image = {
        .id = 1,
        .layer = 1,
        .codec = BALE_CODEC_ZSTD,
        .name = g_strdup("x"),
        .backing_file = g_strdup(""),
        .backing_format = g_strdup(""),
    };

    for (unsigned i = 1; i <= 3; i++) {
        BaleLayerEntry e = { .id = i, .generation = 1, .size = 65536 };

        g_array_append_val(cat->layers, e);
    }
    g_array_append_val(cat->images, image);
    for (unsigned i = 2; i <= 3; i++) {
        BaleBitmapEntry e = { .layer = i, .image = 1, .granularity = 65536,
                              .size = 1 << 20,
                              .name = g_strdup_printf("b%u", i) };

        g_array_append_val(cat->bitmaps, e);
    }
    cat->next_layer = 4;
    cat->next_image = 2;
    return cat;
}

static int catalogue_accepted(const BaleCatalogue *cat)
{
    uint32_t len;
    uint8_t type;
    g_autofree uint8_t *buf = bale_catalogue_encode(cat, &type, &len);
    g_autoptr(BaleCatalogue) out = NULL;

    return bale_catalogue_decode(&out, type, 65536, buf, len);
}

static void test_hostile_catalogue(void)
{
    g_autoptr(BaleCatalogue) good = catalogue_with_bitmaps();

    g_assert_cmpint(catalogue_accepted(good), ==, 0);
    for (unsigned n = 0; n < 11; n++) {
        g_autoptr(BaleCatalogue) cat = bale_catalogue_copy(good);
        BaleBitmapEntry *e = &g_array_index(cat->bitmaps, BaleBitmapEntry,
                                            1);
        BaleLayerEntry *layer = &g_array_index(cat->layers, BaleLayerEntry,
                                               2);

        switch (n) {
        case 0: /* the layer of the image */
            e->layer = 1;
            break;
        case 1: /* another bitmap's */
            e->layer = 2;
            break;
        case 2: /* no layer */
            e->layer = 9;
            break;
        case 3: /* no image */
            e->image = 2;
            break;
        case 4: /* the same name twice */
            strcpy(e->name, "b2");
            break;
        case 5: /* no name */
            e->name[0] = 0;
            break;
        case 6: /* more bits than the layer takes */
            e->size = 64ull << 30;
            break;
        case 7: /* fewer */
            e->size = 0;
            break;
        case 8: /* too small a granularity */
            e->granularity = 256;
            break;
        case 9: /* too many bits */
            e->size = BALE_IMAGE_SIZE_MAX;
            layer->size = bale_bitmap_data_len(e->size, e->granularity);
            break;
        default: /* a layer over another */
            layer->parent = 1;
            layer->generation = 2;
            break;
        }
        g_test_message("catalogue %u", n);
        g_assert_cmpint(catalogue_accepted(cat), ==, -EIO);
    }
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/bitmap/store-load", test_store_load);
    g_test_add_func("/bitmap/in-use-after-kill", test_in_use_after_kill);
    g_test_add_func("/bitmap/power-cut", test_power_cut);
    g_test_add_func("/bitmap/device-fails", test_device_fails);
    g_test_add_func("/bitmap/follows-image", test_follows_image);
    g_test_add_func("/bitmap/limits", test_limits);
    g_test_add_func("/bitmap/hostile-catalogue", test_hostile_catalogue);
    return g_test_run();
}
