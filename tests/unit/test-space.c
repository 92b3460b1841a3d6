/*
 * Space: the maximum size of a store, what waits when it is full, compaction in
 * the background and on command beside writers and checkpoints.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <errno.h>
#include <string.h>

#include "../../block/extstore/store-internal.h"
#include "stores.h"

#define CLUSTER 65536u
#define PAGE (2u << 20)
#define SUPER (2u << 20)
#define MAX_SIZE (SUPER + 12ull * PAGE)
#define IMAGE_SIZE (64u << 20)

typedef struct Fixture {
    BaleDevice *dev;
    BaleStore *store;
    BaleImage *image;
    BaleOpenOptions open;
    uint8_t *model;   /* IMAGE_SIZE bytes */
    GRand *rand;
} Fixture;

static const BaleSimOptions sim_options = { .no_history = true };

static void fixture_open(Fixture *f)
{
    f->open.workers = 2;
    f->store = test_store_open(f->dev, &f->open, NULL, &f->image);
}

static void fixture_init(Fixture *f, uint64_t max_size)
{
    BaleCreateOptions create = {
        .size = IMAGE_SIZE,
        .cluster_size = CLUSTER,
        .page_size = PAGE,
        .codec = BALE_CODEC_NONE,
        .max_size = max_size,
    };

    memset(f, 0, sizeof(*f));
    f->rand = g_rand_new_with_seed(7);
    f->model = g_malloc0(IMAGE_SIZE);
    f->dev = test_store_new(&sim_options, &create);
    fixture_open(f);
}

static void fixture_close(Fixture *f)
{
    test_store_close(f->store, f->image);
}

static void fixture_free(Fixture *f)
{
    fixture_close(f);
    g_rand_free(f->rand);
    g_free(f->model);
}

static void fixture_reopen(Fixture *f)
{
    BaleDevice *dev;

    test_store_checkpoint(f->store);
    dev = test_device_copy(f->dev, &sim_options);
    fixture_close(f);
    f->dev = dev;
    fixture_open(f);
}

static uint64_t device_size(Fixture *f)
{
    BaleDeviceInfo info;

    f->dev->ops->get_info(f->dev, &info);
    return info.size;
}

static BaleStoreStats *stats(Fixture *f)
{
    static BaleStoreStats s;

    bale_store_get_stats(f->store, &s);
    return &s;
}

/* Overwrite one cluster with something new; 0 or a negative errno. */
static int write_cluster(Fixture *f, uint64_t cluster)
{
    g_autofree uint8_t *buf = g_malloc(CLUSTER);
    int ret;

    for (unsigned i = 0; i < CLUSTER; i += 4) {
        guint32 word = g_rand_int(f->rand);

        memcpy(buf + i, &word, 4);
    }
    ret = bale_image_write_sync(f->image, cluster * CLUSTER, buf, CLUSTER, 0);
    if (ret == 0) {
        memcpy(f->model + cluster * CLUSTER, buf, CLUSTER);
    }
    return ret;
}

/* Write clusters one after the other, until there is no space: how many. */
static uint64_t fill(Fixture *f, uint64_t first)
{
    uint64_t c = first;
    int ret = 0;

    while (ret == 0 && c < IMAGE_SIZE / CLUSTER) {
        ret = write_cluster(f, c);
        c += ret == 0;
    }
    g_assert_cmpint(ret, ==, -ENOSPC);
    return c;
}

static void discard(Fixture *f, uint64_t cluster)
{
    g_assert_cmpint(bale_image_zero_sync(f->image, cluster * CLUSTER, CLUSTER,
                                         BALE_DISCARD), ==, 0);
    memset(f->model + cluster * CLUSTER, 0, CLUSTER);
}

static void check(Fixture *f)
{
    g_autofree uint8_t *buf = g_malloc(1u << 20);
    g_autoptr(GError) err = NULL;
    BaleCheckResult result;

    for (uint64_t at = 0; at < IMAGE_SIZE; at += 1u << 20) {
        g_assert_cmpint(bale_image_read_sync(f->image, at, buf, 1u << 20), ==,
                        0);
        g_assert_true(!memcmp(buf, f->model + at, 1u << 20));
    }
    g_assert_true(bale_store_check(f->store, BALE_CHECK_DATA, NULL, NULL,
                                   &result, &err));
    g_assert_cmpuint(result.damaged + result.wrong_counters +
                         result.leaked_pages + result.bad_superblocks, ==, 0);
}

static void test_limit_holds(void)
{
    BaleStoreInfo info;
    Fixture f;
    uint64_t n;

    fixture_init(&f, MAX_SIZE);
    bale_store_get_info(f.store, &info);
    g_assert_cmpuint(info.max_size, ==, MAX_SIZE);
    n = fill(&f, 0);
    /* All but the reserve, metadata and headers. */
    g_assert_cmpuint(n * CLUSTER, >=, 8 * PAGE);
    g_assert_cmpuint(device_size(&f), <=, MAX_SIZE);
    check(&f);
    fixture_reopen(&f);
    bale_store_get_info(f.store, &info);
    g_assert_cmpuint(info.max_size, ==, MAX_SIZE);
    g_assert_true(info.clean);
    check(&f);
    g_assert_cmpint(write_cluster(&f, n), ==, -ENOSPC);
    g_assert_cmpuint(device_size(&f), <=, MAX_SIZE);
    fixture_free(&f);
}

/* However often what is there is written anew, compaction finds the space. */
static void test_overwriting_goes_on(void)
{
    Fixture f;

    fixture_init(&f, MAX_SIZE);
    for (unsigned i = 0; i < 800; i++) {
        g_assert_cmpint(write_cluster(&f, g_rand_int_range(f.rand, 0, 160)),
                        ==, 0);
    }
    g_assert_cmpuint(device_size(&f), <=, MAX_SIZE);
    check(&f);
    fixture_reopen(&f);
    check(&f);
    fixture_free(&f);
}

static void test_full_store_can_free(void)
{
    g_autoptr(GError) err = NULL;
    Fixture f;
    uint64_t n;

    fixture_init(&f, MAX_SIZE);
    n = fill(&f, 0);
    for (uint64_t c = 0; c < n; c += 2) {
        discard(&f, c);
    }
    g_assert_cmpuint(fill(&f, n), >, n + n / 4);
    g_assert_cmpuint(stats(&f)->space_waits, >, 0);
    check(&f);
    /* Full again: what is emptied as a whole is no different. */
    g_assert_true(bale_image_clear(f.image, &err));
    g_assert_no_error(err);
    memset(f.model, 0, IMAGE_SIZE);
    g_assert_cmpuint(fill(&f, 0), >, n - n / 8);
    check(&f);
    fixture_free(&f);
}

/* Changes of images on a store in which there is space only in fragments. */
static void test_changes_wait_for_space(void)
{
    BaleSnapshotInfo snapshot = { .name = "s" };
    g_autoptr(GError) err = NULL;
    Fixture f;
    uint64_t n;

    fixture_init(&f, MAX_SIZE);
    n = fill(&f, 0);
    for (unsigned i = 0; i < 24; i++) {
        char name[] = { 'a' + i, '\0' };
        BaleImageOptions o = { .name = name, .size = CLUSTER };

        for (uint64_t c = i; c < n; c += 24) {
            discard(&f, c);
        }
        g_assert_true(bale_image_create(f.store, &o, &err));
        g_assert_no_error(err);
        g_assert_true(bale_snapshot_create(f.store, NULL, &snapshot, &err));
        g_assert_no_error(err);
        g_assert_true(bale_snapshot_rollback(f.store, NULL, "s", &err));
        g_assert_no_error(err);
        g_assert_true(bale_image_clone(f.store, NULL, "s", "clone", &err));
        g_assert_no_error(err);
        g_assert_true(bale_snapshot_delete(f.store, NULL, "s", &err));
        g_assert_no_error(err);
        g_assert_true(bale_image_delete(f.store, "clone", &err));
        g_assert_no_error(err);
        g_assert_true(bale_image_delete(f.store, name, &err));
        g_assert_no_error(err);
        g_assert_true(bale_image_resize(f.image, IMAGE_SIZE - i * 512,
                                        &err));
        g_assert_no_error(err);
        g_assert_true(bale_image_resize(f.image, IMAGE_SIZE, &err));
        g_assert_no_error(err);
        g_assert_true(bale_store_checkpoint_running(f.store, &err));
        g_assert_no_error(err);
        fill(&f, n);
    }
    check(&f);
    fixture_reopen(&f);
    check(&f);
    fixture_free(&f);
}

/* --- what comes between --- */

typedef struct Writer {
    Fixture *f;
    GThread *thread;
    unsigned first, clusters; /* which ones */
    unsigned writes;
    int ret;
    int done;                 /* atomic */
} Writer;

static void *writer_main(void *opaque)
{
    Writer *w = opaque;

    for (unsigned i = 0; i < w->writes && w->ret == 0; i++) {
        uint64_t cluster = w->first + i % w->clusters;
        g_autofree uint8_t *buf = g_malloc(CLUSTER);

        for (unsigned at = 0; at < CLUSTER; at += 4) {
            guint32 word = cluster * 2654435761u ^ i << 20 ^ at;

            memcpy(buf + at, &word, 4);
        }
        w->ret = bale_image_write_sync(w->f->image, cluster * CLUSTER, buf,
                                       CLUSTER, 0);
        if (w->ret == 0) {
            memcpy(w->f->model + cluster * CLUSTER, buf, CLUSTER);
        }
    }
    __atomic_store_n(&w->done, 1, __ATOMIC_RELEASE);
    return NULL;
}

static void writer_start(Writer *w, Fixture *f)
{
    w->f = f;
    w->thread = g_thread_new("writer", writer_main, w);
}

static int writer_join(Writer *w)
{
    g_thread_join(w->thread);
    return w->ret;
}

/* Until a writer waits for room, or has ended. */
static void await_waiting(Fixture *f, Writer *w, uint64_t before)
{
    while (!__atomic_load_n(&w->done, __ATOMIC_ACQUIRE) &&
           stats(f)->space_waits == before) {
        g_usleep(1000);
    }
}

/*
 * While the maintenance thread is paused nobody can say that there is no room:
 * a writer waits, and holds no lock that the pausing one needs.
 */
static void test_pause_is_no_answer(void)
{
    Writer full = { .first = 200, .clusters = 200, .writes = 200 };
    Writer w = { .clusters = 160, .writes = 400 };
    uint64_t before;
    Fixture f;

    fixture_init(&f, MAX_SIZE);
    g_assert_cmpint(write_cluster(&f, 0), ==, 0);
    bale_maintain_pause(f.store);
    before = stats(&f)->space_waits;
    writer_start(&w, &f);
    await_waiting(&f, &w, before);
    g_assert_false(__atomic_load_n(&w.done, __ATOMIC_ACQUIRE));
    pthread_rwlock_wrlock(&f.store->session_lock);
    pthread_rwlock_unlock(&f.store->session_lock);
    bale_maintain_resume(f.store);
    g_assert_cmpint(writer_join(&w), ==, 0);
    check(&f);

    /* And what is really full says so after the pause. */
    bale_maintain_pause(f.store);
    before = stats(&f)->space_waits;
    writer_start(&full, &f);
    await_waiting(&f, &full, before);
    bale_maintain_resume(f.store);
    g_assert_cmpint(writer_join(&full), ==, -ENOSPC);
    check(&f);
    fixture_free(&f);
}

static void read_done(void *opaque, int ret)
{
    g_assert_cmpint(ret, ==, 0);
    g_atomic_int_inc((int *)opaque);
}

/*
 * Both workers wait for room, and reads, which keep all pages from dying, wait
 * for a worker.
 */
static void test_reads_beside_full_workers(void)
{
    enum { LEN = 1 << 20 };
    Writer w[2] = { 0 };
    g_autofree uint8_t *buf = NULL;
    BaleWorkersStats workers;
    struct iovec *iov;
    uint64_t n, before, chunks;
    int done = 0;
    Fixture f;

    fixture_init(&f, MAX_SIZE);
    bale_store_set_compact(f.store, false, 0);
    n = fill(&f, 0);
    for (uint64_t c = 0; c < n; c += 2) {
        discard(&f, c);
    }
    g_assert_cmpint(bale_store_flush_sync(f.store), ==, 0);
    bale_maintain_pause(f.store);
    before = stats(&f)->space_waits;
    for (unsigned i = 0; i < G_N_ELEMENTS(w); i++) {
        w[i].first = n + i * 32;
        w[i].clusters = w[i].writes = 32;
        writer_start(&w[i], &f);
    }
    while (stats(&f)->space_waits < before + G_N_ELEMENTS(w)) {
        g_usleep(1000);
    }
    chunks = n * CLUSTER / LEN;
    buf = g_malloc(chunks * LEN);
    iov = g_new0(struct iovec, chunks);
    for (uint64_t i = 0; i < chunks; i++) {
        iov[i] = (struct iovec){ buf + i * LEN, LEN };
        bale_image_read(f.image, i * LEN, &iov[i], 1, read_done, &done);
    }
    do {
        bale_workers_get_stats(f.store->workers, &workers);
        g_usleep(1000);
    } while (workers.queued[BALE_WORK_URGENT] < chunks * LEN / CLUSTER / 2);
    bale_maintain_resume(f.store);
    for (unsigned i = 0; i < G_N_ELEMENTS(w); i++) {
        g_assert_cmpint(writer_join(&w[i]), ==, 0);
    }
    while ((uint64_t)g_atomic_int_get(&done) < chunks) {
        g_usleep(1000);
    }
    g_assert_true(!memcmp(buf, f.model, chunks * LEN));
    g_free(iov);
    check(&f);
    fixture_free(&f);
}

typedef struct Checkpoints {
    BaleStore *store;
    int stop; /* atomic */
} Checkpoints;

static void *checkpoints_main(void *opaque)
{
    Checkpoints *c = opaque;

    for (unsigned i = 0; !__atomic_load_n(&c->stop, __ATOMIC_RELAXED); i++) {
        g_autoptr(GError) err = NULL;

        if (i % 2) {
            g_assert_true(bale_store_checkpoint(c->store, &err));
            g_assert_no_error(err);
        } else {
            /* There may be no room for this one. */
            bale_store_checkpoint_running(c->store, NULL);
        }
    }
    return NULL;
}

/* Checkpoints pause the thread, and take and free pages, all the time. */
static void test_writers_beside_checkpoints(void)
{
    Writer w[4] = { 0 };
    Checkpoints c = { 0 };
    GThread *thread;
    Fixture f;
    uint64_t n;

    fixture_init(&f, MAX_SIZE);
    c.store = f.store;
    thread = g_thread_new("checkpoints", checkpoints_main, &c);
    for (unsigned i = 0; i < G_N_ELEMENTS(w); i++) {
        w[i].first = i * 40;
        w[i].clusters = 40;
        w[i].writes = 300;
        writer_start(&w[i], &f);
    }
    for (unsigned i = 0; i < G_N_ELEMENTS(w); i++) {
        g_assert_cmpint(writer_join(&w[i]), ==, 0);
    }
    /* A full store is full, whatever becomes free in between. */
    n = fill(&f, 160);
    for (unsigned i = 0; i < 4; i++) {
        n = fill(&f, n);
    }
    __atomic_store_n(&c.stop, 1, __ATOMIC_RELAXED);
    g_thread_join(thread);
    check(&f);
    fixture_free(&f);
}

static void test_limit_changes(void)
{
    g_autoptr(GError) err = NULL;
    BaleStoreInfo info;
    Fixture f;
    uint64_t n, all;

    fixture_init(&f, MAX_SIZE);
    n = fill(&f, 0);
    g_assert_false(bale_store_set_max_size(f.store, SUPER, &err));
    g_assert_error(err, BALE_STORE_ERROR, BALE_STORE_ERROR_INVALID);
    g_clear_error(&err);
    g_assert_true(bale_store_set_max_size(f.store, MAX_SIZE + 4 * PAGE,
                                          &err));
    g_assert_no_error(err);
    all = fill(&f, n);
    g_assert_cmpuint(all, >=, n + 3 * PAGE / CLUSTER);
    g_assert_cmpuint(device_size(&f), <=, MAX_SIZE + 4 * PAGE);

    /* Below what is in use: nothing is lost, and freeing and closing work. */
    g_assert_true(bale_store_set_max_size(f.store, SUPER + 8 * PAGE, &err));
    g_assert_no_error(err);
    g_assert_cmpint(write_cluster(&f, n), ==, -ENOSPC);
    fixture_reopen(&f);
    bale_store_get_info(f.store, &info);
    g_assert_cmpuint(info.max_size, ==, SUPER + 8 * PAGE);
    check(&f);
    g_assert_cmpint(write_cluster(&f, n), ==, -ENOSPC);
    for (uint64_t c = 0; c < all; c++) {
        discard(&f, c);
    }
    g_assert_cmpint(write_cluster(&f, 0), ==, 0);
    check(&f);

    g_assert_true(bale_store_set_max_size(f.store, 0, &err));
    for (uint64_t c = 0; c < IMAGE_SIZE / CLUSTER; c++) {
        g_assert_cmpint(write_cluster(&f, c), ==, 0);
    }
    fixture_free(&f);
}

static void test_limit_at_open(void)
{
    BaleStoreInfo info;
    Fixture f;
    uint64_t n;

    fixture_init(&f, MAX_SIZE);
    n = fill(&f, 0);
    f.open.max_size = BALE_MAX_SIZE_NONE;
    fixture_reopen(&f);
    bale_store_get_info(f.store, &info);
    g_assert_cmpuint(info.max_size, ==, 0);
    g_assert_cmpint(write_cluster(&f, n), ==, 0);
    f.open.max_size = SUPER + 8 * PAGE;
    fixture_reopen(&f);
    bale_store_get_info(f.store, &info);
    g_assert_cmpuint(info.max_size, ==, SUPER + 8 * PAGE);
    /* What is left of the page that was begun, and no more. */
    g_assert_cmpuint(fill(&f, n), <=, n + PAGE / CLUSTER);
    f.open.max_size = 0;
    fixture_reopen(&f);
    bale_store_get_info(f.store, &info);
    g_assert_cmpuint(info.max_size, ==, MAX_SIZE);
    check(&f);
    fixture_free(&f);
}

static void test_page_size_by_default(void)
{
    BaleCreateOptions o = { .size = 1 << 30 };

    g_assert_cmpuint(bale_create_page_size(&o, 0), ==,
                     BALE_PAGE_SIZE_DEFAULT);
    g_assert_cmpuint(bale_create_page_size(&o, 2ull << 30), ==,
                     BALE_PAGE_SIZE_DEFAULT);
    g_assert_cmpuint(bale_create_page_size(&o, 1ull << 30), ==,
                     BALE_PAGE_SIZE_DEFAULT);
    g_assert_cmpuint(bale_create_page_size(&o, 512ull << 20), ==, 32u << 20);
    o.max_size = SUPER + BALE_MAX_SIZE_PAGES_MIN * PAGE;
    g_assert_cmpuint(bale_create_page_size(&o, 0), ==, 2u << 20);
    g_assert_true(bale_create_options_check(&o, NULL));
    o.max_size--;
    g_assert_false(bale_create_options_check(&o, NULL));
    o.max_size = 1u << 30;
    o.page_size = 256u << 20;
    g_assert_false(bale_create_options_check(&o, NULL));
    o.page_size = 0;
    o.cluster_size = 2u << 20;
    o.max_size = 128u << 20;
    g_assert_cmpuint(bale_create_page_size(&o, 0), ==, 8u << 20);
}

/* --- compaction --- */

/* A store of which half is garbage, evenly, and all pages are sealed. */
static void make_garbage(Fixture *f)
{
    for (uint64_t c = 0; c < 320; c++) {
        g_assert_cmpint(write_cluster(f, c), ==, 0);
    }
    for (uint64_t c = 0; c < 320; c += 2) {
        discard(f, c);
    }
    g_assert_cmpint(bale_store_flush_sync(f->store), ==, 0);
}

static void test_background_can_be_off(void)
{
    Fixture f;

    fixture_init(&f, 0);
    bale_store_set_compact(f.store, false, 0);
    make_garbage(&f);
    g_usleep(20000); /* in which it does not begin, if it is off */
    g_assert_cmpuint(stats(&f)->compact_examined_bytes, ==, 0);
    g_assert_cmpuint(stats(&f)->compact_pending_bytes, >, 0);
    bale_store_set_compact(f.store, true, 0);
    while (stats(&f)->compact_pending_bytes || stats(&f)->compact_running) {
        g_usleep(1000);
    }
    g_assert_cmpuint(stats(&f)->compacted_pages, >, 0);
    check(&f);
    fixture_free(&f);
}

static void test_background_keeps_to_its_rate(void)
{
    Fixture f;

    fixture_init(&f, 0);
    bale_store_set_compact(f.store, true, 1);
    make_garbage(&f);
    while (!stats(&f)->compact_paced_ns) {
        g_usleep(1000);
    }
    /* Much less than there is; the rest would take years. */
    g_assert_cmpuint(stats(&f)->compact_examined_bytes, <, 8u << 20);
    bale_store_set_compact(f.store, true, 0);
    while (stats(&f)->compact_pending_bytes || stats(&f)->compact_running) {
        g_usleep(1000);
    }
    check(&f);
    fixture_free(&f);
}

/* They are slower then, and nothing else. */
static void test_writers_wait_for_the_background(void)
{
    Fixture f;

    fixture_init(&f, 0);
    bale_store_set_compact(f.store, false, 0);
    make_garbage(&f);
    for (uint64_t c = 1; c < 320; c += 4) {
        discard(&f, c);
    }
    g_assert_cmpuint(stats(&f)->writes_held_ns, ==, 0);
    bale_store_set_compact(f.store, true, 0);
    while (!stats(&f)->writes_held_ns) {
        g_assert_cmpint(write_cluster(&f, 3), ==, 0);
    }
    while (stats(&f)->compact_pending_bytes || stats(&f)->compact_running) {
        g_assert_cmpint(write_cluster(&f, 7), ==, 0);
    }
    check(&f);
    fixture_free(&f);
}

typedef struct Command {
    BaleStore *store;
    int stop;     /* atomic */
    int steps;    /* atomic */
    uint64_t rate; /* atomic */
} Command;

static bool command_progress(void *opaque, uint64_t done, uint64_t total)
{
    Command *c = opaque;

    g_assert_cmpuint(done, <=, total);
    __atomic_fetch_add(&c->steps, 1, __ATOMIC_RELAXED);
    return !__atomic_load_n(&c->stop, __ATOMIC_RELAXED);
}

static uint64_t command_rate(void *opaque)
{
    return __atomic_load_n(&((Command *)opaque)->rate, __ATOMIC_RELAXED);
}

static void *command_main(void *opaque)
{
    Command *c = opaque;
    BaleCompactOptions o = { .get_rate = command_rate,
                             .progress = command_progress, .opaque = c };
    g_autoptr(GError) err = NULL;

    g_assert_true(bale_store_compact(c->store, &o, &err));
    g_assert_no_error(err);
    return NULL;
}

/* Beside a compaction that takes for ever. */
static void test_others_go_on_beside_a_command(void)
{
    g_autoptr(GError) err = NULL;
    Command c = { .rate = 1 };
    uint64_t before;
    GThread *thread;
    Fixture f;

    fixture_init(&f, MAX_SIZE);
    bale_store_set_compact(f.store, false, 0);
    for (uint64_t i = 0; i < 130; i++) {
        g_assert_cmpint(write_cluster(&f, i), ==, 0);
    }
    for (uint64_t i = 0; i < 130; i += 2) {
        discard(&f, i);
    }
    c.store = f.store;
    thread = g_thread_new("compact", command_main, &c);
    while (__atomic_load_n(&c.steps, __ATOMIC_RELAXED) < 2) {
        g_usleep(1000);
    }
    before = stats(&f)->checkpoints;
    g_assert_true(bale_store_checkpoint_running(f.store, &err));
    g_assert_no_error(err);
    g_assert_cmpuint(stats(&f)->checkpoints, >, before);
    g_assert_true(stats(&f)->compact_running);
    /*
     * More than there is room for if nothing is given back; whether somebody
     * has to wait for that depends on the order of threads.
     */
    for (unsigned i = 0; i < 400; i++) {
        g_assert_cmpint(write_cluster(&f, 1 + 2 * (i % 65)), ==, 0);
    }
    /* One that must have the store for itself goes on as well. */
    test_store_checkpoint(f.store);
    g_assert_cmpint(write_cluster(&f, 1), ==, 0);
    __atomic_store_n(&c.rate, 0, __ATOMIC_RELAXED);
    g_thread_join(thread);
    check(&f);
    fixture_reopen(&f);
    check(&f);
    fixture_free(&f);
}

static void test_command_stops(void)
{
    Command c = { .rate = 1 };
    GThread *thread;
    Fixture f;

    fixture_init(&f, 0);
    bale_store_set_compact(f.store, false, 0);
    make_garbage(&f);
    c.store = f.store;
    thread = g_thread_new("compact", command_main, &c);
    while (__atomic_load_n(&c.steps, __ATOMIC_RELAXED) < 2) {
        g_usleep(1000);
    }
    __atomic_store_n(&c.stop, 1, __ATOMIC_RELAXED);
    g_thread_join(thread);
    g_assert_cmpuint(stats(&f)->compact_pending_bytes, >, 0);
    g_assert_cmpuint(stats(&f)->compact_running, ==, 0);
    check(&f);
    fixture_free(&f);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/space/limit-holds", test_limit_holds);
    g_test_add_func("/space/overwriting-goes-on", test_overwriting_goes_on);
    g_test_add_func("/space/full-store-can-free", test_full_store_can_free);
    g_test_add_func("/space/changes-wait-for-space",
                    test_changes_wait_for_space);
    g_test_add_func("/space/pause-is-no-answer", test_pause_is_no_answer);
    g_test_add_func("/space/reads-beside-full-workers",
                    test_reads_beside_full_workers);
    g_test_add_func("/space/writers-beside-checkpoints",
                    test_writers_beside_checkpoints);
    g_test_add_func("/space/limit-changes", test_limit_changes);
    g_test_add_func("/space/limit-at-open", test_limit_at_open);
    g_test_add_func("/space/page-size-by-default", test_page_size_by_default);
    g_test_add_func("/space/background-can-be-off",
                    test_background_can_be_off);
    g_test_add_func("/space/background-keeps-to-its-rate",
                    test_background_keeps_to_its_rate);
    g_test_add_func("/space/writers-wait-for-the-background",
                    test_writers_wait_for_the_background);
    g_test_add_func("/space/others-go-on-beside-a-command",
                    test_others_go_on_beside_a_command);
    g_test_add_func("/space/command-stops", test_command_stops);
    return g_test_run();
}
