/*
 * What opening a store takes: memory and work stay below the limits of
 * extstore/store.h, whatever the store claims.
 *
 * Every allocation of the process is counted: the functions below stand before
 * those of the C library.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "forge.h"

#include <glib.h>
#include <errno.h>
#include <malloc.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "extstore/store.h"

#define MIB (1ull << 20)
#define CLUSTERS_MAX (BALE_IMAGE_CLUSTERS_MAX - 1)

/* Write buffers, epochs, loading threads, malloc's rounding. */
#define FIXED_BYTES (64 * MIB)
#define LISTS_FACTOR 8u
/* An index, and the larger one that replaces it. */
#define INDEX_FACTOR 3u

/* --- counting --- */

void *__libc_malloc(size_t size);
void *__libc_calloc(size_t n, size_t size);
void *__libc_realloc(void *p, size_t size);
void *__libc_memalign(size_t align, size_t size);
void __libc_free(void *p);

static int64_t bytes_now, bytes_peak; /* atomic */

static void count(int64_t bytes)
{
    int64_t now = __atomic_add_fetch(&bytes_now, bytes, __ATOMIC_RELAXED);
    int64_t peak = __atomic_load_n(&bytes_peak, __ATOMIC_RELAXED);

    while (now > peak &&
           !__atomic_compare_exchange_n(&bytes_peak, &peak, now, true,
                                        __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
        /* @peak has been read again. */
    }
}

static void *counted(void *p)
{
    if (p) {
        count(malloc_usable_size(p));
    }
    return p;
}

void *malloc(size_t size)
{
    return counted(__libc_malloc(size));
}

void *calloc(size_t n, size_t size)
{
    return counted(__libc_calloc(n, size));
}

void *realloc(void *p, size_t size)
{
    size_t old = p ? malloc_usable_size(p) : 0;
    void *q = __libc_realloc(p, size);

    if (q || !size) {
        count(-(int64_t)old);
    }
    return counted(q);
}

int posix_memalign(void **p, size_t align, size_t size)
{
    *p = counted(__libc_memalign(align, size));
    return *p ? 0 : ENOMEM;
}

void *aligned_alloc(size_t align, size_t size)
{
    return counted(__libc_memalign(align, size));
}

void free(void *p)
{
    if (p) {
        count(-(int64_t)malloc_usable_size(p));
    }
    __libc_free(p);
}

/* The index takes large tables from here.  Threads' stacks do not pass. */
void *mmap(void *addr, size_t len, int prot, int flags, int fd, off_t offset)
{
    void *p = (void *)syscall(SYS_mmap, addr, len, prot, flags, fd, offset);

    if (p != MAP_FAILED) {
        count(len);
    }
    return p;
}

int munmap(void *p, size_t len)
{
    int ret = syscall(SYS_munmap, p, len);

    if (ret == 0) {
        count(-(int64_t)len);
    }
    return ret;
}

/* --- opening --- */

typedef struct Cost {
    uint64_t size;       /* of the device */
    uint64_t bytes;      /* at the peak */
    uint64_t gets;       /* calls of the device */
    bool opened;
    char *message;       /* if it was not */
} Cost;

/* Open @dev, which is closed, and see what that takes. */
static Cost open_it(BaleDevice *dev, const BaleOpenOptions *more)
{
    BaleOpenOptions o = more ? *more : (BaleOpenOptions){ .read_only = true };
    g_autoptr(GError) err = NULL;
    BaleDeviceInfo info;
    BaleStore *s;
    Cost cost = { 0 };
    int64_t before;

    o.workers = 1;
    dev->ops->get_info(dev, &info);
    cost.size = info.size;
    cost.gets = bale_sim_calls(dev, BALE_SIM_GET);
    before = __atomic_load_n(&bytes_now, __ATOMIC_RELAXED);
    __atomic_store_n(&bytes_peak, before, __ATOMIC_RELAXED);
    s = bale_store_open(dev, &o, &err);
    cost.bytes = __atomic_load_n(&bytes_peak, __ATOMIC_RELAXED) - before;
    cost.gets = bale_sim_calls(dev, BALE_SIM_GET) - cost.gets;
    cost.opened = s;
    if (s) {
        bale_store_close(s, NULL);
    } else {
        cost.message = g_strdup(err->message);
        bale_device_close(dev);
    }
    g_test_message("%" G_GUINT64_FORMAT " bytes of store: %" G_GUINT64_FORMAT
                   " bytes of memory, %" G_GUINT64_FORMAT " reads, %s",
                   cost.size, cost.bytes, cost.gets,
                   cost.opened ? "opened" : cost.message);
    return cost;
}

static uint64_t limit_bytes(uint64_t size)
{
    return INDEX_FACTOR * (BALE_OPEN_MEMORY_BASE +
                           BALE_OPEN_MEMORY_FACTOR * size) +
           LISTS_FACTOR * size + FIXED_BYTES;
}

static void check_cost(const Cost *cost)
{
    g_assert_cmpuint(cost->bytes, <=, limit_bytes(cost->size));
    g_assert_cmpuint(cost->gets * BALE_BLOCK_SIZE, <=,
                     BALE_OPEN_READ_BASE +
                         BALE_OPEN_READ_FACTOR * cost->size);
}

/* It opens, and within the limits. */
static void expect_open(BaleDevice *dev)
{
    Cost cost = open_it(dev, NULL);

    check_cost(&cost);
    g_assert_true(cost.opened);
}

/* It does not, because of what it would take; a message says what to do. */
static void expect_refused(BaleDevice *dev)
{
    Cost cost = open_it(dev, NULL);

    check_cost(&cost);
    g_assert_false(cost.opened);
    g_assert_nonnull(strstr(cost.message, "check -r all"));
    g_free(cost.message);
}

static void expect_within(BaleDevice *dev)
{
    Cost cost = open_it(dev, NULL);

    check_cost(&cost);
    g_free(cost.message);
}

static BaleDevice *new_device(uint64_t pages)
{
    BaleSimOptions o = { .no_history = true,
                         .size = BALE_SUPER_SIZE +
                                 pages * BALE_PAGE_SIZE_UNIT };

    return bale_sim_new(&o);
}

/* --- stores of ours --- */

static void test_honest(void)
{
    static const uint64_t sizes[] = { 0, 1, 1 * MIB, 1ull << 40,
                                      CLUSTERS_MAX * 4096 };

    for (guint i = 0; i < G_N_ELEMENTS(sizes); i++) {
        BaleCreateOptions c = { .size = sizes[i], .cluster_size = 4096,
                                .page_size = BALE_PAGE_SIZE_UNIT };
        BaleDevice *dev = new_device(0);
        Cost cost;

        g_assert_true(bale_store_create(dev, &c, NULL));
        cost = open_it(dev, NULL);
        g_assert_true(cost.opened);
        /* Nothing in it: it is small, whatever size it claims. */
        g_assert_cmpuint(cost.bytes, <=, 24 * MIB);
    }
}

/* Snapshots of the largest image that there is. */
static void test_honest_snapshots(void)
{
    BaleCreateOptions c = { .size = CLUSTERS_MAX * 4096, .cluster_size = 4096,
                            .page_size = BALE_PAGE_SIZE_UNIT };
    BaleOpenOptions o = { .workers = 1 };
    BaleDevice *dev = new_device(0);
    g_autoptr(BaleSimImage) image = NULL;
    BaleStore *s;

    g_assert_true(bale_store_create(dev, &c, NULL));
    s = bale_store_open(dev, &o, NULL);
    for (int i = 0; i < 40; i++) {
        g_autofree char *name = g_strdup_printf("s%d", i);
        BaleSnapshotInfo info = { .name = name };

        g_assert_true(bale_snapshot_create(s, NULL, &info, NULL));
    }
    image = bale_sim_image(dev);
    expect_open(bale_sim_new_from_image(image, NULL));
    g_assert_true(bale_store_close(s, NULL));
}

/*
 * Ranges of zeroes take no space: the clusters of one session alone may come to
 * more than the limit, but never so many since the newest checkpoint.
 */
static void test_honest_zeroes(void)
{
    BaleCreateOptions c = { .size = 1ull << 46, .cluster_size = 4096,
                            .page_size = 4 * BALE_PAGE_SIZE_UNIT,
                            .backing_file = "under" };
    BaleOpenOptions o = { .workers = 1 };
    BaleDevice *dev = new_device(0);
    g_autoptr(BaleSimImage) image = NULL;
    BaleStoreStats stats;
    BaleStore *s;
    BaleImage *disk;

    g_assert_true(bale_store_create(dev, &c, NULL));
    s = bale_store_open(dev, &o, NULL);
    disk = bale_image_open(s, NULL, NULL);
    /* 2^22 clusters, in steps of a GiB, as QEMU asks for them. */
    for (uint64_t at = 0; at < 1ull << 34; at += 1ull << 30) {
        g_assert_cmpint(bale_image_zero_sync(disk, at, 1ull << 30, 0), ==, 0);
    }
    g_assert_true(bale_store_checkpoint_running(s, NULL));
    bale_store_get_stats(s, &stats);
    g_assert_cmpuint(stats.checkpoints, >=, 1);
    image = bale_sim_image(dev);
    expect_open(bale_sim_new_from_image(image, NULL));
    bale_image_close(disk);
    g_assert_true(bale_store_close(s, NULL));
}

/* --- stores of others --- */

/* A record that says what the unnamed image is. */
static uint32_t image_payload(uint64_t size, uint8_t *payload)
{
    BaleImageRecord i = { .id = 1, .layer = 1, .size = size };

    return bale_image_encode(&i, payload);
}

static ForgeRecord image_record(uint64_t size, uint64_t seq, uint8_t *payload)
{
    return (ForgeRecord){
        .r = { .type = BALE_RECORD_IMAGE, .layer = 1, .seq = seq,
               .payload_len = image_payload(size, payload) },
        .payload = payload,
    };
}

/* Ranges of zeroes over more clusters than memory holds. */
static void test_zero_ranges(void)
{
    uint8_t payload[BALE_IMAGE_PAYLOAD_MAX];
    BaleSuper super = { .uuid = { 1 } };
    BaleDevice *dev = new_device(2);
    ForgeRecord meta = image_record(CLUSTERS_MAX * 4096, 1, payload);
    ForgeRecord zero[16];

    for (guint i = 0; i < G_N_ELEMENTS(zero); i++) {
        zero[i] = (ForgeRecord){
            .r = { .type = BALE_RECORD_ZERO, .layer = 1, .seq = 2 + i,
                   .cluster = (uint64_t)i << 32, .count = UINT32_MAX },
        };
    }
    forge_supers(dev, &super);
    forge_page(dev, &super, 0, 1, BALE_BUCKET_META, &meta, 1, NULL, 0);
    forge_page(dev, &super, 1, 2, BALE_BUCKET_FRESH, zero,
               G_N_ELEMENTS(zero), NULL, 0);
    expect_refused(dev);
}

/* A few clusters, but each far from the others. */
static void test_scattered_clusters(void)
{
    uint8_t payload[BALE_IMAGE_PAYLOAD_MAX], data[64] = { 0 };
    BaleSuper super = { .uuid = { 2 } };
    BaleDevice *dev = new_device(2);
    ForgeRecord meta = image_record(CLUSTERS_MAX * 4096, 1, payload);
    g_autofree ForgeRecord *r = g_new0(ForgeRecord, 15000);

    for (guint i = 0; i < 15000; i++) {
        r[i] = (ForgeRecord){
            .r = { .type = BALE_RECORD_DATA, .codec = BALE_CODEC_ZSTD,
                   .layer = 1, .seq = 2 + i, .count = 1, .payload_len = 1,
                   .cluster = (uint64_t)i << 22 },
            .payload = data,
        };
    }
    forge_supers(dev, &super);
    forge_page(dev, &super, 0, 1, BALE_BUCKET_META, &meta, 1, NULL, 0);
    forge_page(dev, &super, 1, 2, BALE_BUCKET_FRESH, r, 15000, NULL, 0);
    expect_within(dev);
}

/* As many layers as a catalogue may have, each as large as may be. */
static void test_layers(void)
{
    g_autoptr(BaleCatalogue) cat = bale_catalogue_new();
    g_autofree uint8_t *payload = NULL;
    BaleSuper super = { .uuid = { 3 } };
    BaleDevice *dev = new_device(2);
    ForgeRecord r = { .r = { .seq = 1 } };

    for (uint32_t i = 1; i <= 13000; i++) {
        BaleLayerEntry layer = { .id = i, .generation = 1,
                                 .size = CLUSTERS_MAX * 4096 };
        BaleImageEntry image = { .id = i, .layer = i,
                                 .name = g_strdup_printf("%u", i),
                                 .backing_file = g_strdup(""),
                                 .backing_format = g_strdup("") };

        g_array_append_val(cat->layers, layer);
        g_array_append_val(cat->images, image);
    }
    cat->next_layer = cat->next_image = 13001;
    payload = bale_catalogue_encode(cat, &r.r.type, &r.r.payload_len);
    g_assert_nonnull(payload);
    r.payload = payload;
    forge_supers(dev, &super);
    forge_page(dev, &super, 0, 1, BALE_BUCKET_META, &r, 1, NULL, 0);
    expect_refused(dev);
}

/* Many images, each with patches in many clusters of the largest size. */
static void test_patches(void)
{
    g_autoptr(BaleCatalogue) cat = bale_catalogue_new();
    g_autofree uint8_t *payload = NULL;
    BaleSuper super = { .uuid = { 4 }, .cluster_size = BALE_CLUSTER_SIZE_MAX,
                        .page_size = 4 * BALE_PAGE_SIZE_UNIT };
    BaleDevice *dev = new_device(12);
    ForgeRecord r = { .r = { .seq = 1 } };
    g_autofree ForgeRecord *patches = g_new0(ForgeRecord, 800 * 16);
    guint n = 0;

    for (uint32_t i = 1; i <= 800; i++) {
        BaleLayerEntry layer = { .id = i, .generation = 1,
                                 .size = 1ull << 30 };
        BaleImageEntry image = { .id = i, .layer = i,
                                 .name = g_strdup_printf("%u", i),
                                 .backing_file = g_strdup(""),
                                 .backing_format = g_strdup("") };

        g_array_append_val(cat->layers, layer);
        g_array_append_val(cat->images, image);
        for (uint32_t c = 0; c < 16; c++) {
            patches[n] = (ForgeRecord){
                .r = { .type = BALE_RECORD_PATCH, .flags = BALE_PATCH_BARE,
                       .layer = i, .seq = 2 + n, .cluster = c,
                       .count = 5, .payload_len = 1 },
                .payload = "x",
            };
            n++;
        }
    }
    cat->next_layer = cat->next_image = 801;
    payload = bale_catalogue_encode(cat, &r.r.type, &r.r.payload_len);
    r.payload = payload;
    forge_supers(dev, &super);
    forge_page(dev, &super, 0, 1, BALE_BUCKET_META, &r, 1, NULL, 0);
    forge_page(dev, &super, 1, 2, BALE_BUCKET_FRESH, patches, n, NULL, 0);
    expect_refused(dev);
}

/* A directory that names one catalogue over and over. */
static void test_repeated_entries(void)
{
    g_autoptr(BaleCatalogue) cat = bale_catalogue_new();
    g_autofree uint8_t *payload = NULL;
    uint8_t plain[BALE_IMAGE_PAYLOAD_MAX];
    BaleSuper super = { .uuid = { 5 }, .page_size = 2 * BALE_PAGE_SIZE_UNIT };
    BaleDevice *dev = new_device(4);
    ForgeRecord meta = image_record(MIB, 1, plain);
    ForgeRecord r = { .r = { .seq = 2 }, .entries = 40000 };

    for (uint32_t i = 1; i <= 32000; i++) {
        BaleLayerEntry layer = { .id = i, .generation = 1, .size = 4096 };

        g_array_append_val(cat->layers, layer);
    }
    cat->next_layer = 32001;
    payload = bale_catalogue_encode(cat, &r.r.type, &r.r.payload_len);
    g_assert_nonnull(payload);
    r.payload = payload;
    forge_supers(dev, &super);
    forge_page(dev, &super, 0, 1, BALE_BUCKET_META, &meta, 1, NULL, 0);
    forge_page(dev, &super, 1, 2, BALE_BUCKET_META, &r, 1, NULL, 0);
    expect_within(dev);
}

/* Each segment says that the page had a newer version than it has. */
static void test_barriers(void)
{
    uint8_t payload[BALE_IMAGE_PAYLOAD_MAX];
    BaleSuper super = { .uuid = { 6 }, .page_size = 4 * BALE_PAGE_SIZE_UNIT };
    BaleDevice *dev = new_device(12);
    ForgeRecord meta = image_record(MIB, 1, payload);
    BaleBarrier b[BALE_BARRIERS_MAX];
    uint64_t at, version = 100;

    forge_supers(dev, &super);
    forge_page(dev, &super, 0, 1, BALE_BUCKET_META, &meta, 1, NULL, 0);
    at = forge_page(dev, &super, 1, 2, BALE_BUCKET_FRESH, NULL, 0, NULL, 0);
    while (at < super.page_size) {
        for (guint i = 0; i < BALE_BARRIERS_MAX; i++) {
            b[i] = (BaleBarrier){ 2, version++, 8192 };
        }
        at = forge_segment(dev, &super, 1, 2, at, NULL, 0, b,
                           BALE_BARRIERS_MAX);
    }
    forge_page(dev, &super, 2, 3, BALE_BUCKET_FRESH, NULL, 0, NULL, 0);
    expect_refused(dev);
}

/* A checkpoint whose parts are all the same record. */
static void test_checkpoint_parts(void)
{
    uint8_t payload[BALE_IMAGE_PAYLOAD_MAX];
    g_autofree uint8_t *table = g_malloc0(16384 * BALE_PAGE_ENTRY_LEN);
    g_autofree uint8_t *root = NULL;
    BaleSuper super = { .uuid = { 7 }, .page_size = 4 * BALE_PAGE_SIZE_UNIT };
    BaleDevice *dev = new_device(8);
    BaleRoot header = { .next_seq = 10, .pages = 1u << 26, .parts = 100000 };
    ForgeRecord r[3] = { image_record(MIB, 1, payload) };
    BalePart part = { .kind = BALE_PART_PAGES, .version = 1, .b = 16384,
                      .payload_len = 16384 * BALE_PAGE_ENTRY_LEN };
    uint64_t end;

    root = g_malloc0(BALE_ROOT_FIXED_LEN + header.parts * BALE_PART_LEN);
    r[1] = (ForgeRecord){ .r = { .type = BALE_RECORD_CHECKPOINT_PART,
                                 .seq = 2, .payload_len = part.payload_len },
                          .payload = table };
    r[2] = (ForgeRecord){ .r = { .type = BALE_RECORD_CHECKPOINT_ROOT,
                                 .seq = 3,
                                 .payload_len = BALE_ROOT_FIXED_LEN +
                                                header.parts *
                                                    BALE_PART_LEN },
                          .payload = root };
    forge_supers(dev, &super);
    forge_page(dev, &super, 0, 1, BALE_BUCKET_META, r, 3, NULL, 0);
    bale_root_encode(&header, root);
    part.address = r[1].address;
    for (uint32_t i = 0; i < header.parts; i++) {
        part.a = i * 16384ull % header.pages;
        bale_part_encode(&part, root + BALE_ROOT_FIXED_LEN +
                                    i * BALE_PART_LEN);
    }
    end = forge_page(dev, &super, 0, 1, BALE_BUCKET_META, r, 3, NULL, 0);
    super.state = BALE_STATE_CLEAN;
    super.checkpoint = (BaleCheckpointRef){
        r[2].address, 1, BALE_RECORD_HEADER_LEN + r[2].r.payload_len,
        end / BALE_BLOCK_SIZE };
    forge_supers(dev, &super);
    expect_within(dev);
}

/* A file of many terabytes in which there is nothing but a hole. */
static void test_sparse(void)
{
    uint8_t payload[BALE_IMAGE_PAYLOAD_MAX];
    BaleSuper super = { .uuid = { 8 } };
    BaleDevice *dev = new_device(1u << 16);
    ForgeRecord meta = image_record(MIB, 1, payload);

    super.page_size = BALE_PAGE_SIZE_UNIT;
    forge_supers(dev, &super);
    forge_page(dev, &super, 0, 1, BALE_BUCKET_META, &meta, 1, NULL, 0);
    expect_open(dev);
}

/* Options come from outside, too. */
static void test_options(void)
{
    static const BaleOpenOptions options[] = {
        { .read_only = true, .cache_size = UINT64_MAX },
        { .read_only = true, .cache_size = BALE_CACHE_SIZE_MAX + 1 },
        { .read_only = true, .cache_size = 1 },
        { .read_only = true, .cache_size = MIB },
        { .checkpoint_bytes = UINT64_MAX },
        { .checkpoint_bytes = 1, .cache_size = 1ull << 60 },
    };
    BaleCreateOptions c = { .size = MIB, .cluster_size = 4096,
                            .page_size = BALE_PAGE_SIZE_UNIT };

    for (guint i = 0; i < G_N_ELEMENTS(options); i++) {
        BaleDevice *dev = new_device(0);
        Cost cost;

        g_assert_true(bale_store_create(dev, &c, NULL));
        cost = open_it(dev, &options[i]);
        check_cost(&cost);
        g_assert_true(cost.opened ==
                      (options[i].cache_size <= BALE_CACHE_SIZE_MAX));
        g_assert_true(cost.opened || strstr(cost.message, "cache"));
        g_free(cost.message);
    }
}

/* What a limit keeps from opening, a repair opens. */
static void test_repair_has_no_limits(void)
{
    uint8_t payload[BALE_IMAGE_PAYLOAD_MAX];
    BaleOpenOptions o = { .repair = true };
    BaleSuper super = { .uuid = { 9 } };
    BaleDevice *dev = new_device(2);
    ForgeRecord meta = image_record(1ull << 40, 1, payload);
    ForgeRecord zero = { .r = { .type = BALE_RECORD_ZERO, .layer = 1,
                                .seq = 2, .count = 26u << 20 } };
    g_autoptr(BaleSimImage) image = NULL;
    Cost cost;

    forge_supers(dev, &super);
    forge_page(dev, &super, 0, 1, BALE_BUCKET_META, &meta, 1, NULL, 0);
    forge_page(dev, &super, 1, 2, BALE_BUCKET_FRESH, &zero, 1, NULL, 0);
    image = bale_sim_image(dev);
    expect_refused(dev);
    cost = open_it(bale_sim_new_from_image(image, NULL), &o);
    g_assert_true(cost.opened);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/limits/honest", test_honest);
    g_test_add_func("/limits/honest-snapshots", test_honest_snapshots);
    g_test_add_func("/limits/honest-zeroes", test_honest_zeroes);
    g_test_add_func("/limits/zero-ranges", test_zero_ranges);
    g_test_add_func("/limits/scattered-clusters", test_scattered_clusters);
    g_test_add_func("/limits/layers", test_layers);
    g_test_add_func("/limits/patches", test_patches);
    g_test_add_func("/limits/repeated-entries", test_repeated_entries);
    g_test_add_func("/limits/barriers", test_barriers);
    g_test_add_func("/limits/checkpoint-parts", test_checkpoint_parts);
    g_test_add_func("/limits/sparse", test_sparse);
    g_test_add_func("/limits/options", test_options);
    g_test_add_func("/limits/repair", test_repair_has_no_limits);
    return g_test_run();
}
