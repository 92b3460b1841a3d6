/*
 * Checkpoints of a store in use: what an open after a kill takes from them, and
 * what it falls back to.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include <errno.h>
#include <string.h>

#include "../../block/extstore/store-internal.h"
#include "stores.h"

#define CLUSTER 4096u
#define CLUSTERS 64u

typedef struct Fixture {
    BaleDevice *dev;
    BaleStore *store;
    BaleImage *image;
    unsigned complaints;
    uint8_t model[CLUSTERS * CLUSTER];
} Fixture;

static const BaleSimOptions sim_options = { .no_history = true };

static void fixture_complain(void *opaque, const char *what)
{
    Fixture *f = opaque;

    g_test_message("the store says: %s", what);
    f->complaints++;
}

static void fixture_open(Fixture *f)
{
    BaleOpenOptions o = { .workers = 2,
                          .damage = fixture_complain,
                          .notify_opaque = f };

    f->store = test_store_open(f->dev, &o, NULL, &f->image);
}

static void fixture_init(Fixture *f, uint64_t size)
{
    BaleCreateOptions o = { .size = size, .page_size = 2u << 20,
                            .cluster_size = CLUSTER,
                            .codec = BALE_CODEC_ZSTD };

    memset(f, 0, sizeof(*f));
    f->dev = test_store_new(&sim_options, &o);
    fixture_open(f);
}

static void fixture_close(Fixture *f)
{
    test_store_close(f->store, f->image);
}

/* What the device holds now, as a device; the store is closed behind it. */
static void fixture_kill_to(Fixture *f, const BaleSimOptions *options)
{
    BaleDevice *dev = test_device_copy(f->dev, options);

    fixture_close(f);
    f->dev = dev;
}

static void fixture_kill(Fixture *f)
{
    fixture_kill_to(f, &sim_options);
}

static void fixture_write(Fixture *f, unsigned first, unsigned n, uint8_t byte)
{
    for (unsigned i = 0; i < n * CLUSTER; i++) {
        f->model[first * CLUSTER + i] = byte + i / 512;
    }
    g_assert_cmpint(bale_image_write_sync(f->image, first * CLUSTER,
                                          f->model + first * CLUSTER,
                                          n * CLUSTER, 0),
                    ==, 0);
}

static void fixture_flush(Fixture *f)
{
    g_assert_cmpint(bale_store_flush_sync(f->store), ==, 0);
}

static void fixture_checkpoint(Fixture *f)
{
    g_autoptr(GError) err = NULL;

    g_assert_true(bale_store_checkpoint_running(f->store, &err));
    g_assert_no_error(err);
}

static uint64_t fixture_recovered(Fixture *f)
{
    BaleStoreInfo info;

    bale_store_get_info(f->store, &info);
    g_assert_false(info.clean);
    g_assert_false(info.corrupt);
    return info.recovered_records;
}

static void check_same(Fixture *f)
{
    g_autofree uint8_t *buf = g_malloc(sizeof(f->model));
    g_autoptr(GError) err = NULL;
    BaleCheckResult result;

    g_assert_cmpint(bale_image_read_sync(f->image, 0, buf, sizeof(f->model)),
                    ==, 0);
    g_assert_cmpmem(buf, sizeof(f->model), f->model, sizeof(f->model));
    g_assert_true(bale_store_check(f->store, BALE_CHECK_DATA, NULL, NULL,
                                   &result, &err));
    g_assert_no_error(err);
    g_assert_cmpuint(result.wrong_counters, ==, 0);
}

static void read_device(Fixture *f, uint64_t offset, void *buf, size_t len)
{
    g_autoptr(BaleSimImage) image = bale_sim_image(f->dev);

    bale_sim_image_read(image, offset, buf, len);
}

/* Let pages die until @page has been given back. */
static void wait_freed(Fixture *f, uint64_t page)
{
    BaleCompactOptions o = { .rate = 0 };
    g_autoptr(GError) err = NULL;
    int state;

    do {
        g_assert_true(bale_store_compact(f->store, &o, &err));
        g_assert_no_error(err);
        pthread_mutex_lock(&f->store->log_lock);
        state = bale_page(f->store, page)->state;
        pthread_mutex_unlock(&f->store->log_lock);
    } while (state != BALE_PAGE_FREE);
}

static uint64_t device_size(Fixture *f)
{
    g_autoptr(BaleSimImage) image = bale_sim_image(f->dev);

    return bale_sim_image_size(image);
}

/* Damage the root that a superblock names @at bytes from its beginning. */
static void damage_root(Fixture *f, unsigned at)
{
    g_autoptr(BaleSimImage) image = bale_sim_image(f->dev);
    uint64_t address[2] = { 0 }, generation[2];

    /* Copies 0 and 1: the newer one counts. */
    for (int i = 0; i < 2; i++) {
        bale_sim_image_read(image, i * (512u << 10) + 56, &generation[i], 8);
        bale_sim_image_read(image, i * (512u << 10) + at, &address[i], 8);
    }
    address[0] = address[generation[1] > generation[0]];
    g_assert_cmpuint(address[0], !=, 0);
    bale_sim_flip_bit(f->dev, address[0] + 70, 3);
}

static void test_only_the_tail(void)
{
    Fixture f;

    fixture_init(&f, sizeof(f.model));
    fixture_write(&f, 0, 32, 1);
    fixture_checkpoint(&f);
    fixture_write(&f, 30, 4, 101);
    fixture_flush(&f);
    fixture_kill(&f);
    fixture_open(&f);
    g_assert_cmpuint(fixture_recovered(&f), ==, 4);
    g_assert_cmpuint(f.complaints, ==, 0);
    check_same(&f);
    fixture_close(&f);
}

static void test_nothing_after_it(void)
{
    Fixture f;

    fixture_init(&f, sizeof(f.model));
    fixture_write(&f, 0, 32, 1);
    fixture_checkpoint(&f);
    fixture_kill(&f);
    fixture_open(&f);
    g_assert_cmpuint(fixture_recovered(&f), ==, 0);
    check_same(&f);
    /* Going on, and once more. */
    fixture_write(&f, 5, 9, 77);
    fixture_checkpoint(&f);
    fixture_write(&f, 50, 1, 7);
    fixture_flush(&f);
    fixture_kill(&f);
    fixture_open(&f);
    g_assert_cmpuint(fixture_recovered(&f), ==, 1);
    check_same(&f);
    fixture_close(&f);
}

/* A device with a block that cannot be read. */
static BaleDeviceOps bad_ops;
static const BaleDeviceOps *good_ops;
static uint64_t bad_block;

static void bad_get(BaleDevice *dev, BaleDeviceIo *io)
{
    if (io->offset <= bad_block && bad_block < io->offset + io->len) {
        io->done(io, -EIO);
    } else {
        good_ops->get(dev, io);
    }
}

/* What is only read ahead need not be readable. */
static void test_unreadable_block(void)
{
    uint8_t buf[CLUSTER];
    uint64_t address;
    Fixture f;

    fixture_init(&f, sizeof(f.model));
    fixture_checkpoint(&f);
    for (unsigned i = 0; i < CLUSTERS; i += 8) {
        uint8_t *p = f.model + i * CLUSTER;

        for (unsigned n = 0; n < 8 * CLUSTER; n++) {
            p[n] = g_test_rand_int(); /* does not compress */
        }
        g_assert_cmpint(bale_image_write_sync(f.image, i * CLUSTER, p,
                                              8 * CLUSTER, 0), ==, 0);
        fixture_flush(&f);
    }
    address = bale_value_address(bale_layer_find(f.image->top, 27));
    fixture_kill(&f);
    good_ops = f.dev->ops;
    bad_ops = *good_ops;
    bad_ops.get = bad_get;
    bad_block = address - address % BALE_BLOCK_SIZE;
    f.dev->ops = &bad_ops;
    fixture_open(&f);
    g_assert_cmpuint(fixture_recovered(&f), ==, CLUSTERS);
    g_assert_cmpint(bale_image_read_sync(f.image, 27 * CLUSTER, buf, CLUSTER),
                    ==, -EIO);
    f.dev->ops = good_ops;
    g_assert_cmpint(bale_image_read_sync(f.image, 27 * CLUSTER, buf, CLUSTER),
                    ==, 0);
    check_same(&f);
    fixture_close(&f);
}

/* More pages than are looked at together, with a record in each. */
static void test_tail_of_many_pages(void)
{
    enum { PAGES = 150 };
    uint8_t buf[CLUSTER], got[CLUSTER];
    Fixture f;

    fixture_init(&f, PAGES * CLUSTER);
    fixture_checkpoint(&f);
    for (unsigned i = 0; i < PAGES; i++) {
        memset(buf, i + 1, CLUSTER);
        g_assert_cmpint(bale_image_write_sync(f.image, i * CLUSTER, buf,
                                              CLUSTER, 0), ==, 0);
        bale_log_seal_page(f.store, BALE_BUCKET_FRESH);
    }
    fixture_flush(&f);
    fixture_kill(&f);
    fixture_open(&f);
    g_assert_cmpuint(fixture_recovered(&f), ==, PAGES);
    for (unsigned i = 0; i < PAGES; i++) {
        memset(buf, i + 1, CLUSTER);
        g_assert_cmpint(bale_image_read_sync(f.image, i * CLUSTER, got,
                                             CLUSTER), ==, 0);
        g_assert_cmpmem(buf, CLUSTER, got, CLUSTER);
    }
    fixture_close(&f);
}

/* Falls back to the checkpoint before, and then to a scan of all. */
static void test_damaged(void)
{
    Fixture f;

    fixture_init(&f, sizeof(f.model));
    fixture_write(&f, 0, 32, 1);
    fixture_checkpoint(&f);
    fixture_write(&f, 8, 4, 60);
    fixture_checkpoint(&f);
    fixture_write(&f, 40, 2, 101);
    fixture_flush(&f);
    fixture_kill(&f);
    damage_root(&f, 96);
    fixture_open(&f);
    g_assert_cmpuint(fixture_recovered(&f), ==, 6);
    g_assert_cmpuint(f.complaints, ==, 1);
    check_same(&f);
    /* The next one stands before the one that it was opened from. */
    fixture_write(&f, 41, 1, 7);
    fixture_checkpoint(&f);
    fixture_kill(&f);
    damage_root(&f, 96);
    fixture_open(&f);
    g_assert_cmpuint(f.complaints, ==, 2);
    check_same(&f);
    fixture_kill(&f);
    damage_root(&f, 136);
    fixture_open(&f);
    g_assert_cmpuint(f.complaints, >=, 3);
    g_assert_cmpuint(fixture_recovered(&f), >=, 39);
    check_same(&f);
    fixture_close(&f);
}

/*
 * What a store that was killed changes after its newest checkpoint is newer
 * than that: also for who has only the checkpoint before, or none.
 */
static void test_change_survives_damage(void)
{
    for (unsigned damaged = 1; damaged <= 2; damaged++) {
        BaleSnapshotInfo info = { .name = "s" };
        g_autoptr(GArray) list = NULL;
        g_autoptr(GError) err = NULL;
        Fixture f;

        fixture_init(&f, sizeof(f.model));
        fixture_write(&f, 0, 32, 1);
        fixture_checkpoint(&f);
        fixture_write(&f, 8, 4, 60);
        fixture_checkpoint(&f);
        fixture_kill(&f);
        fixture_open(&f);
        g_assert_true(bale_snapshot_create(f.store, NULL, &info, &err));
        g_assert_no_error(err);
        fixture_kill(&f);
        damage_root(&f, 96);
        if (damaged == 2) {
            damage_root(&f, 136);
        }
        fixture_open(&f);
        g_assert_cmpuint(f.complaints, ==, 1);
        list = bale_snapshot_list(f.store, NULL, &err);
        g_assert_no_error(err);
        g_assert_cmpuint(list->len, ==, 1);
        check_same(&f);
        fixture_close(&f);
    }
}

/* A clean store, too, has one to fall back to. */
static void test_damaged_clean(void)
{
    Fixture f;

    fixture_init(&f, sizeof(f.model));
    fixture_write(&f, 0, 8, 1);
    fixture_checkpoint(&f);
    fixture_write(&f, 8, 4, 60);
    test_store_checkpoint(f.store);
    fixture_kill(&f);
    damage_root(&f, 96);
    fixture_open(&f);
    g_assert_cmpuint(fixture_recovered(&f), ==, 4);
    g_assert_cmpuint(f.complaints, ==, 1);
    check_same(&f);
    fixture_close(&f);
}

/*
 * The one before is older than a close that cut pages off: their loss is none,
 * also when the store is killed before there is a newer checkpoint.
 */
static void test_damaged_after_cut(void)
{
    enum { BYTES = 6u << 20, FIRST = CLUSTERS * CLUSTER };
    g_autofree uint8_t *noise = g_malloc(BYTES);
    g_autoptr(GError) err = NULL;
    uint64_t size = 0;
    Fixture f;

    for (unsigned i = 0; i < BYTES; i++) {
        noise[i] = g_test_rand_int(); /* does not compress */
    }
    fixture_init(&f, FIRST);
    bale_store_set_compact(f.store, false, 0);
    fixture_write(&f, 0, 8, 1);
    /* The barriers of the first round stay below what the second one cuts. */
    for (unsigned round = 1; round <= 2; round++) {
        unsigned len = round * BYTES / 2;

        g_assert_true(bale_image_resize(f.image, FIRST + len, &err));
        g_assert_no_error(err);
        g_assert_cmpint(bale_image_write_sync(f.image, FIRST, noise, len, 0),
                        ==, 0);
        test_store_checkpoint(f.store);
        size = device_size(&f);
        bale_log_seal_page(f.store, BALE_BUCKET_FRESH);
        g_assert_true(bale_image_resize(f.image, FIRST, &err));
        g_assert_no_error(err);
        test_store_checkpoint(f.store);
    }
    g_assert_cmpuint(device_size(&f) + (4u << 20), <, size);
    fixture_kill(&f);
    damage_root(&f, 96);
    for (unsigned i = 1; i <= 3; i++) {
        fixture_open(&f);
        fixture_recovered(&f);
        g_assert_cmpuint(f.complaints, ==, i);
        check_same(&f);
        fixture_write(&f, 10 * i, 2, 50 + i);
        fixture_flush(&f);
        fixture_kill(&f);
    }
    /* The next one stands before the one that it was opened from. */
    fixture_open(&f);
    fixture_write(&f, 40, 2, 70);
    fixture_checkpoint(&f);
    fixture_kill(&f);
    damage_root(&f, 96);
    fixture_open(&f);
    g_assert_cmpuint(fixture_recovered(&f), <, 32);
    g_assert_cmpuint(f.complaints, ==, 5);
    check_same(&f);
    fixture_close(&f);
}

/*
 * A page was freed, and so was the one with the records that dropped what it
 * had held; then its mark is lost: the header goes back to what it was, or is
 * damaged.  The device keeps what is given back to it.  From a checkpoint that
 * is older than all that, and from none.
 */
static void test_mark_lost(void)
{
    static const BaleSimOptions keeps = { .no_history = true,
                                          .no_release = true };
    enum { BACK = 1, SCANNED = 2, KINDS = 4 };

    for (unsigned kind = 0; kind < KINDS; kind++) {
        uint8_t header[BALE_BLOCK_SIZE];
        uint64_t address, page, offset, held;
        g_autoptr(GError) err = NULL;
        Fixture f;

        fixture_init(&f, sizeof(f.model));
        fixture_kill_to(&f, &keeps);
        fixture_open(&f);
        bale_store_set_compact(f.store, false, 0);
        fixture_write(&f, 0, 8, 1);
        fixture_checkpoint(&f);
        address = bale_value_address(bale_layer_find(f.image->top, 3));
        bale_address_split(f.store, address, &held, &offset);
        read_device(&f, page_address(f.store, held), header, sizeof(header));
        bale_log_seal_page(f.store, BALE_BUCKET_FRESH);
        bale_maintain_pause(f.store);
        g_assert_true(bale_image_clear(f.image, &err));
        g_assert_no_error(err);
        memset(f.model, 0, sizeof(f.model));
        fixture_flush(&f);
        page = f.store->active[BALE_BUCKET_FRESH];
        g_assert_cmpuint(page, !=, PAGE_NONE);
        bale_log_seal_page(f.store, BALE_BUCKET_FRESH);
        /* For barriers, which would take one of these when it is free. */
        g_assert_cmpint(bale_page_prepare(f.store, BALE_BUCKET_COMPACTED,
                                          BALE_BLOCK_SIZE), ==, 0);
        bale_maintain_resume(f.store);
        wait_freed(&f, held);
        wait_freed(&f, page);
        address = page_address(f.store, held);
        fixture_kill_to(&f, &keeps);
        if (kind & SCANNED) {
            damage_root(&f, 96);
            damage_root(&f, 136);
        }
        if (kind & BACK) {
            bale_sim_poke(f.dev, address, header, sizeof(header));
        } else {
            bale_sim_flip_bit(f.dev, address + 30, 3);
        }
        fixture_open(&f);
        fixture_recovered(&f);
        g_assert_cmpuint(f.complaints, ==, kind & SCANNED ? 1 : 0);
        check_same(&f);
        fixture_close(&f);
    }
}

/* Pages are compacted, freed and used anew between checkpoint and kill. */
static void test_pages_reused(void)
{
    BaleCompactOptions o = { .rate = 0 };
    g_autoptr(GError) err = NULL;
    Fixture f;

    fixture_init(&f, sizeof(f.model));
    for (unsigned round = 0; round < 40; round++) {
        fixture_write(&f, 0, CLUSTERS, round * 5);
        if (round % 9 == 4) {
            fixture_checkpoint(&f);
        }
        fixture_write(&f, round, 8, round * 3 + 1);
        fixture_flush(&f);
        if (round % 3 == 0) {
            g_assert_true(bale_store_compact(f.store, &o, &err));
            g_assert_no_error(err);
        }
        if (round % 5 == 0) {
            fixture_kill(&f);
            fixture_open(&f);
            g_assert_cmpuint(f.complaints, ==, 0);
            check_same(&f);
        }
    }
    fixture_close(&f);
}

/*
 * While a slow reader holds a write buffer its page is not used again: what lay
 * at the same place then would not be what the buffer holds.
 */
static void test_slow_reader(void)
{
    BaleCompactOptions o = { .rate = 0 };
    g_autoptr(GError) err = NULL;
    BaleWriteBuffer *pinned = NULL;
    uint64_t address, page, offset, version;
    size_t avail;
    Fixture f;

    fixture_init(&f, sizeof(f.model));
    fixture_write(&f, 0, 1, 1);
    address = bale_value_address(bale_image_find(f.image, 0));
    g_assert_true(bale_address_split(f.store, address, &page, &offset));
    pthread_mutex_lock(&f.store->log_lock);
    g_assert_nonnull(bale_log_pin(f.store, address, &pinned, &avail));
    pthread_mutex_unlock(&f.store->log_lock);
    version = pinned->version;
    for (unsigned i = 0; i < 40; i++) {
        if (i == 20) {
            g_assert_cmpuint(bale_page(f.store, page)->version, ==, version);
            bale_log_unpin(f.store, pinned);
        }
        fixture_write(&f, 0, CLUSTERS, i);
        fixture_flush(&f);
        g_assert_true(bale_store_compact(f.store, &o, &err));
        g_assert_no_error(err);
    }
    g_assert_cmpuint(bale_page(f.store, page)->version, !=, version);
    check_same(&f);
    fixture_close(&f);
}

/* An index of several groups is loaded by several threads. */
static void test_large_index(void)
{
    uint64_t clusters = (5ull << 20) + 12345;
    uint64_t run;
    BaleClusterStatus status;
    BaleImageInfo info;
    Fixture f;

    fixture_init(&f, clusters * CLUSTER);
    g_assert_cmpint(bale_image_zero_sync(f.image, 4096ull * CLUSTER,
                                         (clusters - 8192) * CLUSTER, 0),
                    ==, 0);
    fixture_write(&f, 0, 3, 9);
    for (int i = 0; i < 2; i++) {
        if (i == 0) {
            fixture_checkpoint(&f);
        } else {
            test_store_checkpoint(f.store);
        }
        fixture_kill(&f);
        fixture_open(&f);
        g_assert_cmpint(bale_image_status(f.image, 4096ull * CLUSTER,
                                          clusters * CLUSTER -
                                              4096ull * CLUSTER,
                                          &status, &run),
                        ==, 0);
        g_assert_cmpint(status, ==, BALE_CLUSTER_ZERO);
        g_assert_cmpuint(run, ==, (clusters - 8192) * CLUSTER);
        bale_image_get_info(f.image, &info);
        g_assert_cmpuint(info.allocated_clusters, ==, clusters - 8192 + 3);
        check_same(&f);
        fixture_write(&f, 1, 1, 33);
    }
    fixture_close(&f);
}

#define KEPT_CHUNKS 40u
#define KEPT_ROUNDS 16u

static uint64_t kept_cluster(unsigned round)
{
    return round * 7 % KEPT_CHUNKS * 16384ull + round + 100;
}

/*
 * What has not changed is not written again, across kills and closes, too; and
 * does not keep pages that are garbage otherwise.
 */
static void test_kept_parts(void)
{
    uint64_t clusters = KEPT_CHUNKS * 16384ull;
    uint8_t buf[CLUSTER];
    BaleStoreStats stats;
    BaleImageInfo info;
    Fixture f;

    fixture_init(&f, clusters * CLUSTER);
    g_assert_cmpint(bale_image_zero_sync(f.image, 0, clusters * CLUSTER, 0),
                    ==, 0);
    fixture_checkpoint(&f);
    for (unsigned round = 0; round < KEPT_ROUNDS; round++) {
        memset(buf, round + 1, CLUSTER);
        g_assert_cmpint(bale_image_write_sync(f.image,
                                              kept_cluster(round) * CLUSTER,
                                              buf, CLUSTER, 0),
                        ==, 0);
        fixture_flush(&f);
        if (round % 4 == 2) {
            test_store_checkpoint(f.store);
        } else if (round % 4 > 0) {
            fixture_checkpoint(&f);
        }
        bale_store_get_stats(f.store, &stats);
        if (round > 0 && round % 4 == 3) {
            /* One chunk, or two, have changed since the last one. */
            g_assert_cmpuint(stats.checkpoint_kept_bytes, >,
                             KEPT_CHUNKS / 2 * 131072);
        }
        g_assert_cmpuint(stats.used_bytes, <, 32u << 20);
        if (round % 3 == 0) {
            fixture_kill(&f);
            fixture_open(&f);
            g_assert_cmpuint(f.complaints, ==, 0);
        }
        bale_image_get_info(f.image, &info);
        g_assert_cmpuint(info.allocated_clusters, ==, clusters);
        for (unsigned i = 0; i <= round; i++) {
            g_assert_cmpint(bale_image_read_sync(f.image,
                                                 kept_cluster(i) * CLUSTER,
                                                 buf, CLUSTER),
                            ==, 0);
            g_assert_cmpuint(buf[0], ==, i + 1);
            g_assert_cmpuint(buf[CLUSTER - 1], ==, i + 1);
        }
        check_same(&f);
    }
    fixture_close(&f);
}

/*
 * With a damaged root the checkpoint before serves, which names the same
 * copies; with one of those damaged, neither does.
 */
static void test_kept_damaged(void)
{
    uint64_t clusters = 4 * 16384ull;
    BaleImageInfo info;
    uint64_t address;
    Fixture f;

    fixture_init(&f, clusters * CLUSTER);
    g_assert_cmpint(bale_image_zero_sync(f.image, 0, clusters * CLUSTER, 0),
                    ==, 0);
    fixture_checkpoint(&f);
    fixture_write(&f, 8, 4, 60);
    fixture_checkpoint(&f);
    fixture_kill(&f);
    damage_root(&f, 96);
    for (unsigned complaints = 1; complaints <= 2; complaints++) {
        fixture_open(&f);
        g_assert_cmpuint(f.complaints, ==, complaints);
        bale_image_get_info(f.image, &info);
        g_assert_cmpuint(info.allocated_clusters, ==, clusters);
        check_same(&f);
        for (unsigned i = 0; i < 4; i++) {
            fixture_write(&f, 20 + i, 1, 7 * i);
            fixture_checkpoint(&f);
        }
        address = bale_layer_chunk(f.image->top, 3)->address;
        fixture_kill(&f);
        g_assert_cmpuint(address, !=, 0);
        bale_sim_flip_bit(f.dev, address + 1000, 3);
    }
    fixture_open(&f);
    check_same(&f);
    fixture_close(&f);
}

/* --- closing --- */

static void keep_device(BaleDevice *dev)
{
}

/*
 * There is something to compact when the store closes, and the checkpoint
 * itself says so: nothing may begin behind its back.
 */
static void close_once(void)
{
    BaleSimOptions sim = { .no_history = true, .mode = BALE_SIM_DEFERRED };
    BaleCreateOptions o = { .size = 4u << 20, .page_size = 2u << 20,
                            .cluster_size = 64u << 10,
                            .codec = BALE_CODEC_NONE };
    BaleDevice *dev = test_store_new(&sim, &o);
    g_autofree uint8_t *data = g_malloc0(o.size);
    BaleDeviceOps ops = *dev->ops;
    const BaleDeviceOps *own = dev->ops;
    Fixture f = { .dev = dev };
    BaleStoreInfo info;

    ops.destroy = keep_device;
    dev->ops = &ops;
    fixture_open(&f);
    memset(data, 1, o.size);
    g_assert_cmpint(bale_image_write_sync(f.image, 0, data, o.size, 0), ==,
                    0);
    bale_maintain_pause(f.store);
    for (uint64_t at = 0; at < o.size; at += 2 * o.cluster_size) {
        g_assert_cmpint(bale_image_write_sync(f.image, at, data,
                                              o.cluster_size, 0), ==, 0);
    }
    fixture_flush(&f);
    pthread_mutex_lock(&f.store->log_lock);
    f.store->maintain_look = false;
    f.store->garbage_bytes = o.page_size - 1;
    pthread_mutex_unlock(&f.store->log_lock);
    bale_maintain_resume(f.store);
    fixture_close(&f);
    dev->ops = own;

    fixture_open(&f);
    bale_store_get_info(f.store, &info);
    g_assert_true(info.clean);
    fixture_close(&f);
}

/* A checkpoint while writes are between the log and the index. */
static void test_beside_writers(void)
{
    BaleSync sync[CLUSTERS];
    struct iovec iov[CLUSTERS];
    Fixture f;

    fixture_init(&f, sizeof(f.model));
    for (unsigned round = 0; round < 3; round++) {
        for (unsigned i = 0; i < CLUSTERS; i++) {
            iov[i].iov_base = f.model + i * CLUSTER;
            iov[i].iov_len = CLUSTER;
            memset(iov[i].iov_base, 1 + round + i, CLUSTER);
            sync[i] = (BaleSync)BALE_SYNC_INIT;
            bale_image_write(f.image, i * CLUSTER, &iov[i], 1, 0,
                             bale_sync_done, &sync[i]);
        }
        bale_sync_wait(&sync[0]); /* there is a session now */
        fixture_checkpoint(&f);
        for (unsigned i = 0; i < CLUSTERS; i++) {
            g_assert_cmpint(bale_sync_wait(&sync[i]), ==, 0);
        }
        fixture_flush(&f);
        fixture_kill(&f);
        fixture_open(&f);
        check_same(&f);
    }
    fixture_close(&f);
}

static void test_close_is_the_end(void)
{
    for (int i = 0; i < 20; i++) {
        close_once();
    }
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/checkpoint/only-the-tail", test_only_the_tail);
    g_test_add_func("/checkpoint/nothing-after-it", test_nothing_after_it);
    g_test_add_func("/checkpoint/unreadable-block", test_unreadable_block);
    g_test_add_func("/checkpoint/tail-of-many-pages", test_tail_of_many_pages);
    g_test_add_func("/checkpoint/damaged", test_damaged);
    g_test_add_func("/checkpoint/change-survives-damage",
                    test_change_survives_damage);
    g_test_add_func("/checkpoint/damaged-clean", test_damaged_clean);
    g_test_add_func("/checkpoint/damaged-after-cut", test_damaged_after_cut);
    g_test_add_func("/checkpoint/mark-lost", test_mark_lost);
    g_test_add_func("/checkpoint/pages-reused", test_pages_reused);
    g_test_add_func("/checkpoint/slow-reader", test_slow_reader);
    g_test_add_func("/checkpoint/large-index", test_large_index);
    g_test_add_func("/checkpoint/beside-writers", test_beside_writers);
    g_test_add_func("/checkpoint/kept-parts", test_kept_parts);
    g_test_add_func("/checkpoint/kept-damaged", test_kept_damaged);
    g_test_add_func("/checkpoint/close-is-the-end", test_close_is_the_end);
    return g_test_run();
}
