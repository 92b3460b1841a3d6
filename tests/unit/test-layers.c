/*
 * Images, snapshots and layers of one store against flat models: what each one
 * shows is what was written to it, whatever happens to the others, after
 * closing, after a kill and after compaction; and what a catalogue may say.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "../../block/extstore/store-internal.h"
#include "stores.h"

#define IMAGE_SIZE (2u << 20)
#define CLUSTER    16384u
#define MODELS_MAX 12

/* An image or a snapshot, and what it must show. */
typedef struct Model {
    char *name;     /* of the image */
    char *snapshot; /* NULL: the image itself */
    uint8_t *data;
    uint64_t size;
    BaleImage *image; /* images are kept open */
} Model;

typedef struct Fixture {
    BaleSimOptions sim;
    BaleOpenOptions open;
    BaleDevice *dev;
    BaleStore *store;
    GPtrArray *models;
    unsigned names;
} Fixture;

static void model_free(void *opaque)
{
    Model *m = opaque;

    g_free(m->name);
    g_free(m->snapshot);
    g_free(m->data);
    g_free(m);
}

static Model *model_add(Fixture *f, const char *name, const char *snapshot,
                        const Model *like)
{
    Model *m = g_new0(Model, 1);

    m->name = g_strdup(name);
    m->snapshot = g_strdup(snapshot);
    m->data = g_malloc0(IMAGE_SIZE);
    m->size = like ? like->size : IMAGE_SIZE;
    if (like) {
        memcpy(m->data, like->data, IMAGE_SIZE);
    }
    g_ptr_array_add(f->models, m);
    return m;
}

static void fixture_open(Fixture *f)
{
    g_autoptr(GError) err = NULL;

    f->open.damage = test_complain;
    f->open.failed = test_complain;
    f->store = test_store_open(f->dev, &f->open, NULL, NULL);
    for (guint i = 0; i < f->models->len; i++) {
        Model *m = g_ptr_array_index(f->models, i);

        if (!m->snapshot) {
            m->image = bale_image_open(f->store, m->name, &err);
            g_assert_no_error(err);
        }
    }
}

static void fixture_init(Fixture *f, const char *name)
{
    BaleCreateOptions o = {
        .image = name,
        .size = IMAGE_SIZE,
        .page_size = 2u << 20,
        .cluster_size = CLUSTER,
        .codec = BALE_CODEC_ZSTD,
    };

    memset(f, 0, sizeof(*f));
    f->models = g_ptr_array_new_with_free_func(model_free);
    f->open.workers = 2;
    f->open.cache_size = 1u << 20;
    f->sim.no_history = true;
    f->dev = test_store_new(&f->sim, &o);
    model_add(f, name ? name : "", NULL, NULL);
    fixture_open(f);
}

static void fixture_close(Fixture *f)
{
    for (guint i = 0; i < f->models->len; i++) {
        Model *m = g_ptr_array_index(f->models, i);

        if (m->image) {
            bale_image_close(m->image);
            m->image = NULL;
        }
    }
    test_store_close(f->store, NULL);
    f->store = NULL;
}

static void fixture_clear(Fixture *f)
{
    fixture_close(f);
    g_ptr_array_free(f->models, TRUE);
}

/* Open again what is on the device now: @clean, or as after a kill. */
static void fixture_reopen(Fixture *f, bool clean)
{
    g_autoptr(BaleSimImage) image = NULL;

    if (clean) {
        test_store_checkpoint(f->store);
    } else {
        g_assert_cmpint(bale_store_flush_sync(f->store), ==, 0);
    }
    image = bale_sim_image(f->dev);
    if (g_getenv("BALE_SIM_SAVE")) {
        bale_sim_image_save(image, g_getenv("BALE_SIM_SAVE"), NULL);
    }
    fixture_close(f);
    f->dev = bale_sim_new_from_image(image, &f->sim);
    fixture_open(f);
}

static void model_check(Fixture *f, Model *m)
{
    g_autofree uint8_t *buf = g_malloc(IMAGE_SIZE);
    g_autofree char *name = g_strdup_printf(
        "%s%s%s", m->name, m->snapshot ? "@" : "",
        m->snapshot ? m->snapshot : "");
    g_autoptr(GError) err = NULL;
    BaleImage *image = bale_image_open(f->store, name, &err);

    g_assert_no_error(err);
    g_assert_cmpuint(bale_image_size(image), ==, m->size);
    g_assert_cmpint(bale_image_read_sync(image, 0, buf, m->size), ==, 0);
    for (uint64_t i = 0; i < m->size; i += 512) {
        if (memcmp(buf + i, m->data + i, 512)) {
            g_error("'%s' differs at %" G_GUINT64_FORMAT, name, i);
        }
    }
    if (m->snapshot) {
        g_assert_cmpint(bale_image_write_sync(image, 0, buf, 512, 0), ==,
                        -EROFS);
    }
    bale_image_close(image);
}

static void check_all(Fixture *f)
{
    g_autoptr(GError) err = NULL;
    BaleCheckResult result;

    for (guint i = 0; i < f->models->len; i++) {
        model_check(f, g_ptr_array_index(f->models, i));
    }
    g_assert_true(bale_store_check(f->store, BALE_CHECK_DATA, NULL, NULL,
                                   &result, &err));
    g_assert_no_error(err);
    g_assert_cmpuint(result.damaged, ==, 0);
    g_assert_cmpuint(result.wrong_counters, ==, 0);
}

static void model_write(Model *m, uint64_t pos, uint64_t len, uint8_t value)
{
    memset(m->data + pos, value, len);
    for (uint64_t i = pos; i < pos + len; i += 7) {
        m->data[i] = i / 7 + value;
    }
    g_assert_cmpint(bale_image_write_sync(m->image, pos, m->data + pos, len,
                                          0), ==, 0);
}

static Model *snapshot(Fixture *f, Model *m, const char *name)
{
    BaleSnapshotInfo info = { .name = name };
    g_autoptr(GError) err = NULL;

    g_assert_true(bale_snapshot_create(f->store, m->name, &info, &err));
    g_assert_no_error(err);
    return model_add(f, m->name, name, m);
}

static void snapshot_delete(Fixture *f, Model *m)
{
    g_autoptr(GError) err = NULL;

    g_assert_true(bale_snapshot_delete(f->store, m->name, m->snapshot,
                                       &err));
    g_assert_no_error(err);
    g_ptr_array_remove(f->models, m);
}

static Model *clone_image(Fixture *f, Model *m, const char *name)
{
    g_autoptr(GError) err = NULL;
    Model *made;

    g_assert_true(bale_image_clone(f->store, m->name, m->snapshot, name,
                                   &err));
    g_assert_no_error(err);
    made = model_add(f, name, NULL, m);
    made->image = bale_image_open(f->store, name, &err);
    g_assert_no_error(err);
    return made;
}

static void compact(Fixture *f)
{
    BaleCompactOptions o = { .rate = 0 };
    g_autoptr(GError) err = NULL;

    g_assert_true(bale_store_compact(f->store, &o, &err));
    g_assert_no_error(err);
}

static unsigned layers_of(Model *m)
{
    BaleImageInfo info;

    bale_image_get_info(m->image, &info);
    return info.layers;
}

/* A snapshot keeps what the image was; a rollback brings it back. */
static void test_snapshot_rollback(void)
{
    g_autoptr(GError) err = NULL;
    Fixture f;
    Model *m, *s;

    fixture_init(&f, NULL);
    m = g_ptr_array_index(f.models, 0);
    model_write(m, 0, 100 * 1024, 3);
    s = snapshot(&f, m, "one");
    model_write(m, 50 * 1024, 1000, 9);
    model_write(m, 300 * 1024, 100 * 1024, 9);
    check_all(&f);
    fixture_reopen(&f, false);
    check_all(&f);
    fixture_reopen(&f, true);
    check_all(&f);
    model_write(m, 70 * 1024, 1000, 11);
    g_assert_true(bale_snapshot_rollback(f.store, NULL, "one", &err));
    g_assert_no_error(err);
    memcpy(m->data, s->data, IMAGE_SIZE);
    check_all(&f);
    fixture_reopen(&f, false);
    check_all(&f);
    g_assert_false(bale_snapshot_rollback(f.store, NULL, "two", &err));
    g_assert_error(err, BALE_STORE_ERROR, BALE_STORE_ERROR_INVALID);
    fixture_clear(&f);
}

/* Snapshots go in any order, and what they were needed for stays. */
static void test_delete_middle(void)
{
    Fixture f;
    Model *m, *one, *two, *three;

    fixture_init(&f, "vm/disk");
    m = g_ptr_array_index(f.models, 0);
    model_write(m, 0, 256 * 1024, 3);
    one = snapshot(&f, m, "one");
    model_write(m, 64 * 1024, 64 * 1024, 5);
    two = snapshot(&f, m, "two");
    model_write(m, 96 * 1024, 64 * 1024, 7);
    three = snapshot(&f, m, "three");
    model_write(m, 0, 16 * 1024, 13);
    g_assert_cmpuint(layers_of(m), ==, 4);
    snapshot_delete(&f, two);
    g_assert_cmpuint(layers_of(m), ==, 3);
    check_all(&f);
    fixture_reopen(&f, false);
    check_all(&f);
    compact(&f);
    check_all(&f);
    fixture_reopen(&f, false);
    snapshot_delete(&f, one);
    check_all(&f);
    fixture_reopen(&f, false);
    check_all(&f);
    fixture_reopen(&f, true);
    snapshot_delete(&f, three);
    g_assert_cmpuint(layers_of(m), ==, 1);
    check_all(&f);
    compact(&f);
    fixture_reopen(&f, false);
    check_all(&f);
    fixture_clear(&f);
}

/* What is cut off by a smaller size does not come back from below. */
static void test_shrink_over_parent(void)
{
    g_autoptr(GError) err = NULL;
    Fixture f;
    Model *m;

    fixture_init(&f, NULL);
    m = g_ptr_array_index(f.models, 0);
    model_write(m, 0, IMAGE_SIZE, 3);
    snapshot(&f, m, "full");
    g_assert_true(bale_image_resize(m->image, 500 * 1024, &err));
    g_assert_true(bale_image_resize(m->image, IMAGE_SIZE, &err));
    g_assert_no_error(err);
    memset(m->data + 500 * 1024, 0, IMAGE_SIZE - 500 * 1024);
    check_all(&f);
    fixture_reopen(&f, false);
    check_all(&f);
    snapshot_delete(&f, g_ptr_array_index(f.models, 1));
    check_all(&f);
    fixture_reopen(&f, false);
    check_all(&f);
    compact(&f);
    fixture_reopen(&f, false);
    check_all(&f);
    fixture_clear(&f);
}

/* Clones share, and do not see each other; deleting gives space back. */
static void test_clone_delete(void)
{
    g_autoptr(GError) err = NULL;
    BaleStoreStats before, after;
    Fixture f;
    Model *m, *a, *b;

    fixture_init(&f, "base");
    m = g_ptr_array_index(f.models, 0);
    model_write(m, 0, 512 * 1024, 3);
    a = clone_image(&f, m, "a");
    b = clone_image(&f, a, "b");
    model_write(a, 0, 64 * 1024, 5);
    model_write(b, 32 * 1024, 64 * 1024, 7);
    model_write(m, 100 * 1024, 10 * 1024, 9);
    check_all(&f);
    fixture_reopen(&f, false);
    check_all(&f);
    g_assert_false(bale_image_delete(f.store, "a", &err));
    g_clear_error(&err);
    bale_store_get_stats(f.store, &before);
    bale_image_close(a->image);
    g_assert_true(bale_image_delete(f.store, "a", &err));
    g_assert_no_error(err);
    g_ptr_array_remove(f.models, a);
    bale_store_get_stats(f.store, &after);
    g_assert_cmpuint(after.live_bytes, <, before.live_bytes);
    check_all(&f);
    fixture_reopen(&f, false);
    check_all(&f);
    g_assert_null(bale_image_open(f.store, "a", &err));
    g_clear_error(&err);
    bale_image_close(b->image);
    g_assert_true(bale_image_delete(f.store, "b", &err));
    g_ptr_array_remove(f.models, b);
    bale_image_close(m->image);
    g_assert_true(bale_image_delete(f.store, "base", &err));
    g_assert_no_error(err);
    g_ptr_array_remove(f.models, m);
    compact(&f);
    bale_store_get_stats(f.store, &after);
    g_assert_cmpuint(after.index_entries, ==, 0);
    fixture_reopen(&f, false);
    fixture_clear(&f);
}

/* A device that deletes image "a" beside its next store when it is told to. */
static struct {
    const BaleDeviceOps *ops;
    BaleStore *store;
    bool armed;
    GThread *thread;
} beside;

static void *beside_delete(void *opaque)
{
    g_autoptr(GError) err = NULL;

    g_assert_true(bale_image_delete(beside.store, "a", &err));
    g_assert_no_error(err);
    return NULL;
}

static void beside_store(BaleDevice *dev, BaleDeviceIo *io)
{
    if (__atomic_exchange_n(&beside.armed, false, __ATOMIC_ACQ_REL)) {
        beside.thread = g_thread_new("delete", beside_delete, NULL);
        /* Time to come as far as it can. */
        g_usleep(100000);
    }
    beside.ops->store(dev, io);
}

/* Both end, and the store can be closed, wherever the deletion meets it. */
static void test_delete_beside_flush(void)
{
    BaleDeviceOps ops;
    Fixture f;
    Model *a;

    fixture_init(&f, "base");
    a = clone_image(&f, g_ptr_array_index(f.models, 0), "a");
    model_write(a, 0, IMAGE_SIZE, 3);
    g_assert_cmpint(bale_store_flush_sync(f.store), ==, 0);
    model_write(a, 4096, 4096, 5);
    bale_image_close(a->image);
    ops = *f.dev->ops;
    ops.store = beside_store;
    beside.ops = f.dev->ops;
    beside.store = f.store;
    beside.armed = true;
    f.dev->ops = &ops;
    g_assert_cmpint(bale_store_flush_sync(f.store), ==, 0);
    g_assert_nonnull(beside.thread);
    g_thread_join(beside.thread);
    f.dev->ops = beside.ops;
    g_ptr_array_remove(f.models, a);
    check_all(&f);
    fixture_clear(&f);
}

/*
 * A full device refuses to begin a session, so that nothing can be written out
 * and the image cannot be deleted: it keeps what was written to it.
 */
static void test_delete_full(void)
{
    BaleSimFault full = { .call = BALE_SIM_STORE, .sticky = true,
                          .error = -ENOSPC };
    Fixture f;
    Model *m;
    g_autoptr(GError) err = NULL;

    fixture_init(&f, "disk");
    m = g_ptr_array_index(f.models, 0);
    memset(m->data + 512, 7, 1024);
    g_assert_cmpint(bale_image_write_sync(m->image, 512, m->data + 512, 1024,
                                          0), ==, 0);
    bale_image_close(m->image);
    bale_sim_fault(f.dev, &full);
    g_assert_false(bale_image_delete(f.store, "disk", &err));
    g_assert_error(err, BALE_STORE_ERROR, BALE_STORE_ERROR_NO_SPACE);
    g_clear_error(&err);
    bale_sim_faults_clear(f.dev);
    m->image = bale_image_open(f.store, "disk", &err);
    g_assert_no_error(err);
    model_check(&f, m);
    fixture_reopen(&f, false);
    model_check(&f, m);

    /* And what waits does not keep it from being deleted. */
    memset(m->data, 8, 512);
    g_assert_cmpint(bale_image_write_sync(m->image, 0, m->data, 512, 0), ==,
                    0);
    bale_image_close(m->image);
    g_assert_true(bale_image_delete(f.store, "disk", &err));
    g_assert_no_error(err);
    g_ptr_array_set_size(f.models, 0);
    fixture_reopen(&f, true);
    fixture_clear(&f);
}

/* After flattening nothing lies under the image; it shows the same. */
static void test_flatten(void)
{
    g_autoptr(GError) err = NULL;
    Fixture f;
    Model *m, *c;

    fixture_init(&f, NULL);
    m = g_ptr_array_index(f.models, 0);
    model_write(m, 5000, 512 * 1024, 3);
    c = clone_image(&f, m, "copy");
    model_write(c, 100 * 1024, 3000, 5);
    g_assert_cmpuint(layers_of(c), ==, 2);
    g_assert_true(bale_image_flatten(f.store, "copy", NULL, &err));
    g_assert_no_error(err);
    g_assert_cmpuint(layers_of(c), ==, 1);
    g_assert_cmpuint(layers_of(m), ==, 1);
    check_all(&f);
    fixture_reopen(&f, false);
    check_all(&f);
    fixture_clear(&f);
}

static void test_names(void)
{
    BaleImageOptions o = { .size = 1 << 20 };
    g_autoptr(GError) err = NULL;
    g_autofree char *longest = g_strnfill(BALE_IMAGE_NAME_MAX, 'x');
    g_autofree char *too_long = g_strnfill(BALE_IMAGE_NAME_MAX + 1, 'x');
    const char *bad[] = { "a@b", "a\nb", "\xff", too_long };
    Fixture f;

    fixture_init(&f, NULL);
    for (unsigned i = 0; i < G_N_ELEMENTS(bad); i++) {
        o.name = bad[i];
        g_assert_false(bale_image_create(f.store, &o, &err));
        g_assert_error(err, BALE_STORE_ERROR, BALE_STORE_ERROR_INVALID);
        g_clear_error(&err);
    }
    o.name = longest;
    g_assert_true(bale_image_create(f.store, &o, &err));
    g_assert_false(bale_image_create(f.store, &o, &err));
    g_clear_error(&err);
    g_assert_false(bale_image_rename(f.store, NULL, longest, &err));
    g_clear_error(&err);
    g_assert_true(bale_image_rename(f.store, longest, "web01/2026-11-20",
                                    &err));
    g_assert_true(bale_image_rename(f.store, NULL, "was unnamed", &err));
    g_assert_no_error(err);
    g_free(((Model *)g_ptr_array_index(f.models, 0))->name);
    ((Model *)g_ptr_array_index(f.models, 0))->name =
        g_strdup("was unnamed");
    fixture_reopen(&f, false);
    g_assert_null(bale_image_open(f.store, NULL, &err));
    g_clear_error(&err);
    g_assert_true(bale_image_set_read_only(f.store, "web01/2026-11-20", true,
                                           &err));
    g_assert_false(bale_image_delete(f.store, "web01/2026-11-20", &err));
    fixture_clear(&f);
}

static void test_depth_capped(void)
{
    g_autoptr(GError) err = NULL;
    Fixture f;
    Model *m;
    unsigned i;

    fixture_init(&f, NULL);
    m = g_ptr_array_index(f.models, 0);
    for (i = 0; i < BALE_LAYER_DEPTH_MAX + 1; i++) {
        g_autofree char *name = g_strdup_printf("s%u", i);
        BaleSnapshotInfo info = { .name = name };

        model_write(m, i * 512, 512, i);
        if (!bale_snapshot_create(f.store, NULL, &info, &err)) {
            break;
        }
    }
    g_assert_cmpuint(i, ==, BALE_LAYER_DEPTH_MAX - 1);
    g_assert_error(err, BALE_STORE_ERROR, BALE_STORE_ERROR_INVALID);
    check_all(&f);
    fixture_reopen(&f, true);
    check_all(&f);
    fixture_clear(&f);
}

/* --- random --- */

static Model *pick(Fixture *f, GRand *rand, int want_snapshot)
{
    for (int i = 0; i < 50; i++) {
        Model *m = g_ptr_array_index(
            f->models, g_rand_int_range(rand, 0, f->models->len));

        if (want_snapshot < 0 || want_snapshot == !!m->snapshot) {
            return m;
        }
    }
    return NULL;
}

/* Forget a model and its snapshots. */
static void models_remove(Fixture *f, const char *name)
{
    g_autofree char *copy = g_strdup(name);

    for (guint i = f->models->len; i-- > 0;) {
        Model *m = g_ptr_array_index(f->models, i);

        if (!strcmp(m->name, copy)) {
            g_ptr_array_remove_index(f->models, i);
        }
    }
}

static void random_requests(Fixture *f, GRand *rand)
{
    for (int i = 0; i < 12; i++) {
        Model *m = pick(f, rand, 0);
        uint64_t pos, len;

        if (!m || !m->size) {
            continue;
        }
        pos = g_rand_int_range(rand, 0, m->size / 512) * 512ull;
        len = g_rand_int_range(rand, 1, 200) * 512ull;
        len = MIN(len, m->size - pos);
        bale_image_set_skip_unchanged(m->image, g_rand_boolean(rand));
        switch (g_rand_int_range(rand, 0, 6)) {
        case 0: /* what is there already, whole clusters of it at least */
            len = MIN(len + 2 * CLUSTER, m->size - pos);
            g_assert_cmpint(bale_image_write_sync(m->image, pos,
                                                  m->data + pos, len, 0), ==,
                            0);
            break;
        case 1:
        case 2:
        case 3:
        case 4:
            model_write(m, pos, len, g_rand_int(rand));
            break;
        default:
            memset(m->data + pos, 0, len);
            g_assert_cmpint(
                bale_image_zero_sync(m->image, pos, len,
                                     g_rand_boolean(rand) ? BALE_DISCARD
                                                          : 0), ==, 0);
            break;
        }
    }
}

static uint64_t unchanged(Fixture *f)
{
    g_autofree BaleStoreStats *stats = g_new(BaleStoreStats, 1);

    bale_store_get_stats(f->store, stats);
    return stats->unchanged_clusters;
}

static uint64_t top_clusters(Model *m)
{
    BaleIndexStats stats;

    bale_index_get_stats(m->image->top->index, &stats);
    return stats.keys;
}

/* A full copy over a snapshot of an older one stores what has changed. */
static void test_skip_unchanged(void)
{
    const unsigned all = IMAGE_SIZE / CLUSTER;
    g_autofree uint8_t *copy = g_malloc0(IMAGE_SIZE);
    Fixture f;
    Model *m;

    fixture_init(&f, "n");
    m = g_ptr_array_index(f.models, 0);
    model_write(m, 0, IMAGE_SIZE / 2, 1);
    model_write(m, IMAGE_SIZE / 2 + 100, 700, 2); /* in a patch */
    snapshot(&f, m, "old");
    g_assert_cmpuint(top_clusters(m), ==, 0);
    memcpy(copy, m->data, IMAGE_SIZE);
    copy[3 * CLUSTER + 5] ^= 1;
    memset(copy + 7 * CLUSTER, 0, CLUSTER);
    copy[(all - 1) * CLUSTER] = 9;
    bale_image_set_skip_unchanged(m->image, true);
    g_assert_cmpint(bale_image_write_sync(m->image, 0, copy, IMAGE_SIZE, 0),
                    ==, 0);
    memcpy(m->data, copy, IMAGE_SIZE);
    g_assert_cmpuint(top_clusters(m), ==, 3);
    g_assert_cmpuint(unchanged(&f), ==, all - 3);
    /* Zeroes where there are zeroes, of a record or of none. */
    g_assert_cmpint(bale_image_zero_sync(m->image, 7 * CLUSTER, CLUSTER, 0),
                    ==, 0);
    g_assert_cmpint(bale_image_zero_sync(m->image, (all - 5) * CLUSTER,
                                         4 * CLUSTER, 0), ==, 0);
    g_assert_cmpuint(top_clusters(m), ==, 3);
    check_all(&f);
    fixture_reopen(&f, false);
    check_all(&f);
    bale_image_set_skip_unchanged(m->image, false);
    g_assert_cmpint(bale_image_write_sync(m->image, 0, copy, IMAGE_SIZE, 0),
                    ==, 0);
    g_assert_cmpuint(top_clusters(m), ==, all);
    fixture_clear(&f);
}


static void random_resize(Fixture *f, GRand *rand, Model *m)
{
    uint64_t size = g_rand_int_range(rand, 100, IMAGE_SIZE / 512) * 512ull;
    g_autoptr(GError) err = NULL;

    g_assert_true(bale_image_resize(m->image, size, &err));
    g_assert_no_error(err);
    if (size < m->size) {
        memset(m->data + size, 0, m->size - size);
    }
    m->size = size;
}

static void random_step(Fixture *f, GRand *rand)
{
    g_autofree char *name = g_strdup_printf("n%u", f->names++);
    g_autoptr(GError) err = NULL;
    int op = g_rand_int_range(rand, 0, 13);
    Model *m = pick(f, rand, op == 4 || op == 5 || op == 6);

    random_requests(f, rand);
    g_test_message("step %d of '%s@%s', new name %s", op, m ? m->name : "",
                   m && m->snapshot ? m->snapshot : "", name);
    if (!m) {
        return;
    }
    switch (op) {
    case 0:
    case 1:
    case 2:
        if (f->models->len < MODELS_MAX) {
            snapshot(f, m, name);
        }
        break;
    case 3:
    case 4:
        if (f->models->len < MODELS_MAX) {
            clone_image(f, m, name);
        }
        break;
    case 5: {
        Model *image = NULL;

        for (guint i = 0; i < f->models->len; i++) {
            Model *other = g_ptr_array_index(f->models, i);

            if (!other->snapshot && !strcmp(other->name, m->name)) {
                image = other;
            }
        }
        g_assert_true(bale_snapshot_rollback(f->store, m->name, m->snapshot,
                                             &err));
        memcpy(image->data, m->data, IMAGE_SIZE);
        image->size = m->size;
        break;
    }
    case 6:
        snapshot_delete(f, m);
        break;
    case 7:
        bale_image_close(m->image);
        m->image = NULL;
        g_assert_true(bale_image_delete(f->store, m->name, &err));
        models_remove(f, m->name);
        if (f->models->len == 0) {
            BaleImageOptions o = { .name = name, .size = IMAGE_SIZE,
                                   .codec = BALE_CODEC_DEFLATE };

            g_assert_true(bale_image_create(f->store, &o, &err));
            m = model_add(f, name, NULL, NULL);
            m->image = bale_image_open(f->store, name, &err);
        }
        break;
    case 8:
        g_assert_true(bale_image_flatten(f->store, m->name, NULL, &err));
        break;
    case 9:
        random_resize(f, rand, m);
        break;
    case 10:
        g_assert_true(bale_image_clear(m->image, &err));
        memset(m->data, 0, IMAGE_SIZE);
        break;
    case 11:
        compact(f);
        break;
    default:
        g_assert_cmpint(bale_store_flush_sync(f->store), ==, 0);
        op = g_rand_boolean(rand);
        g_test_message("reopen, %s", op ? "clean" : "killed");
        fixture_reopen(f, op);
        check_all(f);
        break;
    }
    g_assert_no_error(err);
}

static void test_random(void)
{
    const char *env = g_getenv("BALE_SEED");
    uint32_t seed = env ? strtoul(env, NULL, 0) : g_random_int();
    int rounds = g_getenv("BALE_LONG") ? 3000 : 250;
    g_autoptr(GRand) rand = g_rand_new_with_seed(seed);
    Fixture f;

    g_test_message("BALE_SEED=%u", seed);
    g_print("# BALE_SEED=%u\n", seed);
    fixture_init(&f, "n");
    for (int i = 0; i < rounds; i++) {
        random_step(&f, rand);
        if (i % 8 == 0) {
            check_all(&f);
        }
    }
    fixture_clear(&f);
}

/* --- what a catalogue may say --- */

/* A catalogue of an image over @layers layers, each over the one before. */
static BaleCatalogue *catalogue_chain(unsigned layers)
{
    BaleCatalogue *cat = bale_catalogue_new();
    BaleImageEntry image = {
        .id = 1,
        .layer = layers,
        .codec = BALE_CODEC_ZSTD,
        .name = g_strdup("x"),
        .backing_file = g_strdup(""),
        .backing_format = g_strdup(""),
    };

    for (unsigned i = 1; i <= layers; i++) {
        BaleLayerEntry e = { .id = i, .parent = i - 1, .generation = i,
                             .size = 1 << 20,
                             .parent_clusters = i > 1 ? 16 : 0 };

        g_array_append_val(cat->layers, e);
    }
    g_array_append_val(cat->images, image);
    cat->next_layer = layers + 1;
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

#define LAYER(cat, i) g_array_index((cat)->layers, BaleLayerEntry, i)

static void test_hostile_catalogue(void)
{
    g_autoptr(BaleCatalogue) good = catalogue_chain(5);
    g_autoptr(BaleCatalogue) deepest = catalogue_chain(BALE_LAYER_DEPTH_MAX);
    g_autoptr(BaleCatalogue) deeper =
        catalogue_chain(BALE_LAYER_DEPTH_MAX + 1);

    g_assert_cmpint(catalogue_accepted(good), ==, 0);
    g_assert_cmpint(catalogue_accepted(deepest), ==, 0);
    g_assert_cmpint(catalogue_accepted(deeper), ==, -EIO);
    for (unsigned n = 0; n < 16; n++) {
        g_autoptr(BaleCatalogue) cat = bale_catalogue_copy(good);
        BaleAliasEntry alias = { 6, 5, 16 };

        cat->next_layer = 20;
        switch (n) {
        case 0: /* a cycle */
            LAYER(cat, 1).parent = 4;
            break;
        case 1: /* itself */
            LAYER(cat, 2).parent = 3;
            break;
        case 2: /* no such parent */
            LAYER(cat, 2).parent = 9;
            break;
        case 3: /* a generation that does not rise */
            LAYER(cat, 2).generation = 2;
            break;
        case 4: /* or falls */
            LAYER(cat, 3).generation = 1;
            break;
        case 5: /* the top is not the image's alone */
            g_array_index(cat->images, BaleImageEntry, 0).layer = 4;
            break;
        case 6: /* more of the parent than there is */
            LAYER(cat, 4).parent_clusters = 17;
            break;
        case 7: /* the same id twice */
            LAYER(cat, 4).id = 4;
            break;
        case 8: /* an id that is still to come */
            cat->next_layer = 5;
            break;
        case 9: /* too large */
            LAYER(cat, 0).size = BALE_IMAGE_SIZE_MAX + 1;
            break;
        case 10: /* merged into what is older */
            g_array_append_val(cat->aliases, alias);
            break;
        case 11: /* merged, and still there */
            alias.id = 3;
            g_array_append_val(cat->aliases, alias);
            break;
        case 12: /* the next id is none */
            cat->next_snapshot = 0;
            break;
        case 13:
            cat->layers = g_array_set_size(cat->layers, 0);
            cat->images = g_array_set_size(cat->images, 0);
            cat->next_layer = 0;
            break;
        case 14:
            cat->images = g_array_set_size(cat->images, 0);
            cat->next_image = 0;
            break;
        default: /* no generation */
            LAYER(cat, 0).generation = 0;
            break;
        }
        g_test_message("catalogue %u", n);
        g_assert_cmpint(catalogue_accepted(cat), ==, -EIO);
    }
}

/* A store whose ids are used up refuses, and is as it was. */
static void test_used_up(void)
{
    BaleSnapshotInfo info = { .name = "s" };
    Fixture f;

    fixture_init(&f, "n");
    for (unsigned n = 0; n < 3; n++) {
        g_autoptr(GError) err = NULL;
        BaleCatalogue *cat = f.store->catalogue;
        uint32_t *field = n == 0   ? &cat->next_snapshot
                          : n == 1 ? &cat->next_layer
                                   : &LAYER(cat, 0).generation;
        uint32_t was = *field;

        *field = UINT32_MAX;
        g_assert_false(bale_snapshot_create(f.store, "n", &info, &err));
        g_assert_nonnull(strstr(err->message, "used up"));
        g_assert_true(f.store->catalogue == cat);
        *field = was;
    }
    g_assert_true(bale_snapshot_create(f.store, "n", &info, NULL));
    fixture_clear(&f);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/layers/snapshot-rollback", test_snapshot_rollback);
    g_test_add_func("/layers/delete-middle", test_delete_middle);
    g_test_add_func("/layers/shrink-over-parent", test_shrink_over_parent);
    g_test_add_func("/layers/clone-delete", test_clone_delete);
    g_test_add_func("/layers/delete-full", test_delete_full);
    g_test_add_func("/layers/delete-beside-flush", test_delete_beside_flush);
    g_test_add_func("/layers/flatten", test_flatten);
    g_test_add_func("/layers/skip-unchanged", test_skip_unchanged);
    g_test_add_func("/layers/names", test_names);
    g_test_add_func("/layers/depth-capped", test_depth_capped);
    g_test_add_func("/layers/hostile-catalogue", test_hostile_catalogue);
    g_test_add_func("/layers/used-up", test_used_up);
    g_test_add_func("/layers/random", test_random);
    return g_test_run();
}
