/*
 * The aio device, on files, loop devices and through faults of the kernel.
 *
 * This program links the devices compiled with -DBALE_FAULT_HOOKS.  Tests on
 * loop devices and on a file system without O_DIRECT need root and are skipped
 * without.  BALE_SEED=<number> repeats a random run.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "extstore/device.h"

#include <errno.h>
#include <fcntl.h>
#include <glib/gstdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../../block/extstore/device-file-internal.h"
#include "util/memory.h"

#define BLOCK 4096
#define RW_NEW (BALE_DEVICE_CREATE | BALE_DEVICE_TRUNCATE)

static char *directory;

static char *path_of(const char *name)
{
    return g_build_filename(directory, name, NULL);
}

static uint32_t random_seed(void)
{
    const char *env = g_getenv("BALE_SEED");
    uint32_t seed = env ? strtoul(env, NULL, 0) : g_random_int();

    g_test_message("BALE_SEED=%u", seed);
    return seed;
}

static BaleDevice *open_ok(const char *path, unsigned flags)
{
    g_autoptr(GError) err = NULL;
    BaleDevice *dev = bale_device_aio_open(path, flags, &err);

    g_assert_no_error(err);
    g_assert_nonnull(dev);
    return dev;
}

static void open_fails(const char *path, unsigned flags, const char *why)
{
    g_autoptr(GError) err = NULL;

    g_assert_null(bale_device_aio_open(path, flags, &err));
    g_assert_nonnull(err);
    g_test_message("%s", err->message);
    g_assert_nonnull(strstr(err->message, path));
    g_assert_nonnull(strstr(err->message, why));
    g_assert_null(strchr(err->message, '\n'));
}

static BaleDeviceInfo info_of(BaleDevice *dev)
{
    BaleDeviceInfo info;

    dev->ops->get_info(dev, &info);
    return info;
}

static BaleDeviceStats stats_of(BaleDevice *dev)
{
    BaleDeviceStats stats;

    dev->ops->get_stats(dev, &stats);
    return stats;
}

static char *backend_of(BaleDevice *dev)
{
    char *reply = NULL;

    g_assert_cmpint(dev->ops->command(dev, "backend", &reply), ==, 0);
    return reply;
}

static void *block_of(uint8_t fill, size_t len)
{
    void *buf = bale_memory_try_alloc(65536, len);

    g_assert_nonnull(buf);
    memset(buf, fill, len);
    return buf;
}

typedef struct Counted {
    BaleDeviceIo io; /* first */
    gint *left;
    int ret;
} Counted;

static void counted_done(BaleDeviceIo *io, int ret)
{
    Counted *counted = (Counted *)io;

    counted->ret = ret;
    g_atomic_int_add(counted->left, -1);
}

static void wait_for(gint *left)
{
    while (g_atomic_int_get(left) > 0) {
        g_usleep(100);
    }
}

/* Stores and flushes are done on the thread that asks for them. */
static _Thread_local bool in_place;

static int waited_for(BaleDevice *dev,
                      void (*submit)(BaleDevice *dev, BaleDeviceIo *io),
                      uint64_t offset, void *buf, size_t len)
{
    gint left = 1;
    Counted counted = {
        .io = { offset, buf, len, counted_done, .may_block = in_place },
        .left = &left,
    };

    submit(dev, &counted.io);
    wait_for(&left);
    return counted.ret;
}

static int store(BaleDevice *dev, uint64_t offset, uint8_t fill, size_t len)
{
    BALE_AUTO_MEMORY void *buf = block_of(fill, len);

    return waited_for(dev, dev->ops->store, offset, buf, len);
}

static int flush(BaleDevice *dev)
{
    return waited_for(dev, dev->ops->flush, 0, NULL, 0);
}

static int get(BaleDevice *dev, uint64_t offset, uint8_t fill, size_t len)
{
    BALE_AUTO_MEMORY uint8_t *buf = block_of(0xee, len);
    int ret = bale_device_get_sync(dev, offset, buf, len);

    for (size_t i = 0; ret == 0 && i < len; i++) {
        g_assert_cmpint(buf[i], ==, fill);
    }
    return ret;
}

static bool is_root(const char *for_what)
{
    if (geteuid() != 0) {
        g_autofree char *why = g_strdup_printf("needs root for %s", for_what);

        g_test_skip(why);
        return false;
    }
    return true;
}

/* ---- the ways a device is opened -------------------------------------- */

/* Run a test body on each kind of backend that a file can have. */
typedef void Body(BaleDevice *dev);

static void on_each_backend(Body *body)
{
    static const unsigned ways[] = { 0, BALE_DEVICE_BUFFERED };

    for (unsigned i = 0; i < 2 * G_N_ELEMENTS(ways); i++) {
        g_autofree char *path = path_of("each");
        g_autoptr(BaleDevice) dev = open_ok(path, RW_NEW | ways[i / 2]);
        g_autofree char *backend = backend_of(dev);

        in_place = i % 2;
        g_test_message("%s%s", backend, in_place ? ", in place" : "");
        body(dev);
        in_place = false;
        g_unlink(path);
    }
}

static void body_round_trip(BaleDevice *dev)
{
    g_assert_cmpint(dev->ops->allocate(dev, 0, 16 * BLOCK), ==, 0);
    g_assert_cmpint(info_of(dev).size, ==, 16 * BLOCK);
    g_assert_cmpint(get(dev, 0, 0, 16 * BLOCK), ==, 0);
    g_assert_cmpint(store(dev, 3 * BLOCK, 7, 2 * BLOCK), ==, 0);
    g_assert_cmpint(get(dev, 3 * BLOCK, 7, 2 * BLOCK), ==, 0);
    g_assert_cmpint(get(dev, 2 * BLOCK, 0, BLOCK), ==, 0);
    g_assert_cmpint(bale_device_flush_sync(dev), ==, 0);
}

static void test_round_trip(void)
{
    on_each_backend(body_round_trip);
}

static void body_read_past_end(BaleDevice *dev)
{
    BALE_AUTO_MEMORY uint8_t *buf = block_of(0xee, 4 * BLOCK);

    g_assert_cmpint(get(dev, 0, 0, BLOCK), ==, 0);
    g_assert_cmpint(get(dev, (uint64_t)1 << 40, 0, BLOCK), ==, 0);
    g_assert_cmpint(store(dev, 0, 5, BLOCK), ==, 0);
    /* The end in the middle of a block. */
    g_assert_cmpint(dev->ops->truncate(dev, 700), ==, 0);
    g_assert_cmpint(bale_device_get_sync(dev, 0, buf, 4 * BLOCK), ==, 0);
    g_assert_cmpint(buf[0], ==, 5);
    g_assert_cmpint(buf[699], ==, 5);
    g_assert_true(bale_memory_is_zero(buf + 700, 4 * BLOCK - 700));
    g_assert_cmpint(dev->ops->truncate(dev, BLOCK + 512), ==, 0);
    memset(buf, 0xee, 4 * BLOCK);
    g_assert_cmpint(bale_device_get_sync(dev, 0, buf, 4 * BLOCK), ==, 0);
    g_assert_true(bale_memory_is_zero(buf + 700, 4 * BLOCK - 700));
    g_assert_cmpint(get(dev, BLOCK, 0, BLOCK), ==, 0);
}

static void test_reads_past_the_end_are_zeroes(void)
{
    on_each_backend(body_read_past_end);
}

static void body_release(BaleDevice *dev)
{
    const uint64_t page = 1 << 20;

    g_assert_cmpint(dev->ops->allocate(dev, 0, 4 * page), ==, 0);
    for (unsigned i = 0; i < 4; i++) {
        g_assert_cmpint(store(dev, i * page, 9, page), ==, 0);
    }
    g_assert_cmpint(dev->ops->release(dev, page, page), ==, 0);
    g_assert_cmpint(info_of(dev).size, ==, 4 * page);
    g_assert_cmpint(get(dev, 0, 9, page), ==, 0);
    g_assert_cmpint(get(dev, page, 0, page), ==, 0);
    g_assert_cmpint(get(dev, 2 * page, 9, page), ==, 0);
    /* Also at the end, where a file could be cut; and past it. */
    g_assert_cmpint(dev->ops->release(dev, 3 * page, page), ==, 0);
    g_assert_cmpint(dev->ops->release(dev, 8 * page, page), ==, 0);
    g_assert_cmpint(info_of(dev).size, ==, 4 * page);
    g_assert_cmpint(get(dev, 3 * page, 0, page), ==, 0);
}

static void test_release_punches_and_keeps_the_size(void)
{
    on_each_backend(body_release);
}

static void test_release_gives_space_back(void)
{
    g_autofree char *path = path_of("space");
    g_autoptr(BaleDevice) dev = open_ok(path, RW_NEW);
    struct stat before, after;

    g_assert_cmpint(store(dev, 0, 1, 4 << 20), ==, 0);
    g_assert_cmpint(bale_device_flush_sync(dev), ==, 0);
    g_assert_cmpint(stat(path, &before), ==, 0);
    g_assert_cmpint(dev->ops->release(dev, 1 << 20, 2 << 20), ==, 0);
    g_assert_cmpint(stat(path, &after), ==, 0);
    g_assert_cmpint(after.st_size, ==, before.st_size);
    g_assert_cmpint(after.st_blocks + (2 << 20) / 512, <=, before.st_blocks);
}

static void test_allocate_reserves(void)
{
    g_autofree char *path = path_of("reserve");
    g_autoptr(BaleDevice) dev = open_ok(path, RW_NEW);
    struct stat st;

    g_assert_cmpint(dev->ops->allocate(dev, 0, 8 << 20), ==, 0);
    g_assert_cmpint(stat(path, &st), ==, 0);
    g_assert_cmpint(st.st_size, ==, 8 << 20);
    g_assert_cmpint(st.st_blocks, >=, (8 << 20) / 512);
    /* Never shorter. */
    g_assert_cmpint(dev->ops->allocate(dev, 0, 1 << 20), ==, 0);
    g_assert_cmpint(info_of(dev).size, ==, 8 << 20);
    g_assert_cmpint(dev->ops->allocate(dev, UINT64_MAX - 4095, 4096), ==,
                    -EFBIG);
    g_assert_cmpint(dev->ops->allocate(dev, 1, INT64_MAX), ==, -EFBIG);
}

static void test_info_of_a_file(void)
{
    g_autofree char *path = path_of("info");
    g_autoptr(BaleDevice) dev = open_ok(path, RW_NEW);
    BaleDeviceInfo info = info_of(dev);

    g_assert_cmpstr(info.name, ==, "aio");
    g_assert_cmpint(info.block_size, ==, 4096);
    g_assert_cmpint(info.size, ==, 0);
    g_assert_cmpuint(info.max_size, ==, UINT64_MAX);
    g_assert_false(info.read_only);
    g_assert_false(info.fixed_size);
    g_assert_true(info.release_zeroes);
}

static void test_statistics_count(void)
{
    g_autofree char *path = path_of("stats");
    g_autoptr(BaleDevice) dev = open_ok(path, RW_NEW);
    BaleDeviceStats stats;
    uint64_t n = 0;

    g_assert_cmpint(dev->ops->allocate(dev, 0, 1 << 20), ==, 0);
    for (unsigned i = 0; i < 10; i++) {
        g_assert_cmpint(store(dev, i * BLOCK, 1, BLOCK), ==, 0);
        g_assert_cmpint(get(dev, 0, 1, BLOCK), ==, 0);
    }
    g_assert_cmpint(bale_device_flush_sync(dev), ==, 0);
    g_assert_cmpint(dev->ops->release(dev, 0, BLOCK), ==, 0);
    stats = stats_of(dev);
    g_assert_cmpint(stats.gets, ==, 10);
    g_assert_cmpint(stats.stores, ==, 10);
    g_assert_cmpint(stats.flushes, ==, 1);
    g_assert_cmpint(stats.allocates, ==, 1);
    g_assert_cmpint(stats.releases, ==, 1);
    g_assert_cmpint(stats.get_bytes, ==, 10 * BLOCK);
    g_assert_cmpint(stats.store_bytes, ==, 10 * BLOCK);
    g_assert_cmpint(stats.errors, ==, 0);
    g_assert_cmpint(stats.queue_depth, ==, 0);
    for (unsigned i = 0; i < BALE_DEVICE_HIST_BUCKETS; i++) {
        n += stats.store_ns[i];
    }
    g_assert_cmpint(n, ==, 10);
    dev->ops->reset_stats(dev);
    g_assert_cmpint(stats_of(dev).stores, ==, 0);
}

/* ---- opening ---------------------------------------------------------- */

static void test_new_file_is_private(void)
{
    g_autofree char *path = path_of("private");
    g_autoptr(BaleDevice) dev = open_ok(path, BALE_DEVICE_CREATE);
    struct stat st;

    g_assert_nonnull(dev);
    g_assert_cmpint(stat(path, &st), ==, 0);
    g_assert_cmpint(st.st_mode & 0777, ==, 0600);
}

static void test_create_never_replaces(void)
{
    g_autofree char *path = path_of("exists");
    g_autofree char *content = NULL;

    g_assert_true(g_file_set_contents(path, "precious", -1, NULL));
    open_fails(path, BALE_DEVICE_CREATE, "File exists");
    g_assert_true(g_file_get_contents(path, &content, NULL, NULL));
    g_assert_cmpstr(content, ==, "precious");
    bale_device_close(open_ok(path, RW_NEW));
    g_free(g_steal_pointer(&content));
    g_assert_true(g_file_get_contents(path, &content, NULL, NULL));
    g_assert_cmpstr(content, ==, "");
}

static void test_open_errors_say_what_and_where(void)
{
    g_autofree char *missing = path_of("missing");
    g_autofree char *nowhere = path_of("no/where");
    g_autofree char *fifo = path_of("fifo");
    g_autofree char *dangling = path_of("dangling");

    open_fails(missing, 0, "No such file");
    g_assert_false(g_file_test(missing, G_FILE_TEST_EXISTS));
    open_fails(nowhere, RW_NEW, "No such file");
    open_fails(directory, 0, "Is a directory");
    open_fails(directory, BALE_DEVICE_READ_ONLY, "neither a regular file");
    g_assert_cmpint(mkfifo(fifo, 0600), ==, 0);
    open_fails(fifo, 0, "neither a regular file");
    open_fails(fifo, BALE_DEVICE_READ_ONLY, "neither a regular file");
    open_fails("/dev/zero", 0, "neither a regular file");
    open_fails(missing, RW_NEW | BALE_DEVICE_READ_ONLY, "read-only");
    g_assert_cmpint(symlink("nothing", dangling), ==, 0);
    open_fails(dangling, BALE_DEVICE_CREATE, "File exists");
}

static void test_symbolic_link_to_a_file_is_followed(void)
{
    g_autofree char *path = path_of("target");
    g_autofree char *link = path_of("link");

    bale_device_close(open_ok(path, RW_NEW));
    g_assert_cmpint(symlink("target", link), ==, 0);
    bale_device_close(open_ok(link, 0));
}

static void test_descriptor_is_closed_on_exec(void)
{
    g_autofree char *path = path_of("cloexec");
    g_autoptr(BaleDevice) dev = open_ok(path, RW_NEW);
    g_autoptr(GDir) fds = g_dir_open("/proc/self/fd", 0, NULL);
    const char *name;
    unsigned found = 0;

    g_assert_nonnull(dev);
    while ((name = g_dir_read_name(fds))) {
        g_autofree char *link = g_build_filename("/proc/self/fd", name, NULL);
        g_autofree char *to = g_file_read_link(link, NULL);

        if (to && strcmp(to, path) == 0) {
            found++;
            g_assert_cmpint(fcntl(atoi(name), F_GETFD) & FD_CLOEXEC, !=, 0);
        }
    }
    g_assert_cmpint(found, ==, 1);
}

static void test_read_only_refuses_changes(void)
{
    g_autofree char *path = path_of("read-only");

    bale_device_close(open_ok(path, RW_NEW));
    g_autoptr(BaleDevice) dev = open_ok(path, BALE_DEVICE_READ_ONLY);

    g_assert_true(info_of(dev).read_only);
    g_assert_cmpint(store(dev, 0, 1, BLOCK), ==, -EROFS);
    g_assert_cmpint(dev->ops->allocate(dev, 0, BLOCK), ==, -EROFS);
    g_assert_cmpint(dev->ops->release(dev, 0, BLOCK), ==, -EROFS);
    g_assert_cmpint(dev->ops->truncate(dev, 0), ==, -EROFS);
    g_assert_cmpint(bale_device_flush_sync(dev), ==, 0);
    g_assert_cmpint(get(dev, 0, 0, BLOCK), ==, 0);
}

/* ---- locking ---------------------------------------------------------- */

static void test_second_writer_is_refused(void)
{
    g_autofree char *path = path_of("lock-write");
    g_autoptr(BaleDevice) dev = open_ok(path, RW_NEW);

    open_fails(path, 0, "another process");
    open_fails(path, BALE_DEVICE_READ_ONLY, "another process");
    bale_device_close(open_ok(path, BALE_DEVICE_NO_LOCK));
    g_assert_cmpint(store(dev, 0, 3, BLOCK), ==, 0);
    /* The refused one has emptied nothing. */
    open_fails(path, RW_NEW, "another process");
    g_assert_cmpint(get(dev, 0, 3, BLOCK), ==, 0);
}

static void test_readers_share_and_refuse_writers(void)
{
    g_autofree char *path = path_of("lock-read");

    bale_device_close(open_ok(path, RW_NEW));
    g_autoptr(BaleDevice) one = open_ok(path, BALE_DEVICE_READ_ONLY);
    BaleDevice *two = open_ok(path, BALE_DEVICE_READ_ONLY);

    open_fails(path, 0, "another process");
    bale_device_close(two);
    open_fails(path, 0, "another process");
    bale_device_close(g_steal_pointer(&one));
    bale_device_close(open_ok(path, 0));
}

static int run(const char *command)
{
    int status = 0;
    g_autofree char *out = NULL;
    g_autofree char *err = NULL;
    const char *argv[] = { "/bin/sh", "-c", command, NULL };

    g_assert_true(g_spawn_sync(NULL, (char **)argv, NULL, 0, NULL, NULL, &out,
                               &err, &status, NULL));
    g_test_message("%s -> %d %s%s", command, WEXITSTATUS(status), out, err);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static bool have_program(const char *name)
{
    g_autofree char *path = g_find_program_in_path(name);

    if (!path) {
        g_autofree char *why = g_strdup_printf("no %s here", name);

        g_test_skip(why);
    }
    return path != NULL;
}

static void test_qemu_cannot_open_what_we_write(void)
{
    g_autofree char *path = path_of("lock-qemu");
    g_autofree char *read = g_strdup_printf(
        "qemu-io -r -f raw -c 'read 0 4k' %s", path);
    g_autofree char *write = g_strdup_printf(
        "qemu-io -f raw -c 'write 0 4k' %s", path);

    if (!have_program("qemu-io")) {
        return;
    }
    BaleDevice *dev = open_ok(path, RW_NEW);
    g_assert_cmpint(dev->ops->allocate(dev, 0, 1 << 20), ==, 0);
    g_assert_cmpint(run(write), !=, 0);
    g_assert_cmpint(run(read), !=, 0);
    bale_device_close(dev);
    g_assert_cmpint(run(write), ==, 0);

    /* Beside our readers, QEMU may read. */
    dev = open_ok(path, BALE_DEVICE_READ_ONLY);
    g_assert_cmpint(run(write), !=, 0);
    g_assert_cmpint(run(read), ==, 0);
    bale_device_close(dev);
}

static void test_we_cannot_open_what_qemu_writes(void)
{
    g_autofree char *path = path_of("lock-by-qemu");
    const char *argv[] = { "qemu-io", "-f", "raw", path, NULL };
    GPid pid;
    int in, out;
    char byte;

    if (!have_program("qemu-io")) {
        return;
    }
    BaleDevice *dev = open_ok(path, RW_NEW);
    g_assert_cmpint(dev->ops->allocate(dev, 0, 1 << 20), ==, 0);
    bale_device_close(dev);

    g_assert_true(g_spawn_async_with_pipes(
        NULL, (char **)argv, NULL,
        G_SPAWN_SEARCH_PATH | G_SPAWN_DO_NOT_REAP_CHILD, NULL, NULL, &pid,
        &in, &out, NULL, NULL));
    /* Its prompt says that it has the file. */
    g_assert_cmpint(write(in, "write 0 4k\n", 11), ==, 11);
    do {
        g_assert_cmpint(read(out, &byte, 1), ==, 1);
    } while (byte != '\n');
    open_fails(path, 0, "another process");
    open_fails(path, BALE_DEVICE_READ_ONLY, "another process");
    close(in);
    g_assert_cmpint(waitpid(pid, NULL, 0), ==, pid);
    close(out);
    bale_device_close(open_ok(path, 0));
}

/* ---- many at once ----------------------------------------------------- */

static void body_deep_queue(BaleDevice *dev)
{
    enum { N = 1000 };
    g_autofree Counted *ios = g_new0(Counted, N);
    BALE_AUTO_MEMORY uint8_t *buf = block_of(0, N * BLOCK);
    gint left = N;

    for (unsigned i = 0; i < N; i++) {
        memset(buf + i * BLOCK, (int)(i % 251), BLOCK);
        ios[i] = (Counted) {
            .io = { i * BLOCK, buf + i * BLOCK, BLOCK, counted_done },
            .left = &left,
        };
        if (i % 50 == 0 && dev->ops->plug) {
            dev->ops->plug(dev);
        }
        dev->ops->store(dev, &ios[i].io);
        if (i % 50 == 49 && dev->ops->unplug) {
            dev->ops->unplug(dev);
        }
    }
    wait_for(&left);
    for (unsigned i = 0; i < N; i++) {
        g_assert_cmpint(ios[i].ret, ==, 0);
    }
    for (unsigned i = 0; i < N; i += 37) {
        g_assert_cmpint(get(dev, i * BLOCK, (uint8_t)(i % 251), BLOCK), ==, 0);
    }
    g_assert_cmpint(stats_of(dev).queue_depth, ==, 0);
}

static void test_deep_queue_waits_inside(void)
{
    on_each_backend(body_deep_queue);
}

/* Another store from inside each completion, as a log's write-back does. */
typedef struct Chain {
    Counted counted; /* first */
    BaleDevice *dev;
    unsigned left;
} Chain;

static void chain_done(BaleDeviceIo *io, int ret)
{
    Chain *chain = (Chain *)io;

    g_assert_cmpint(ret, ==, 0);
    if (--chain->left > 0) {
        io->offset += BLOCK;
        chain->dev->ops->store(chain->dev, io);
    } else {
        counted_done(io, ret);
    }
}

static void body_chain(BaleDevice *dev)
{
    BALE_AUTO_MEMORY void *buf = block_of(4, BLOCK);
    gint left = 1;
    Chain chain = {
        .counted = { { 0, buf, BLOCK, chain_done }, &left },
        .dev = dev,
        .left = 500,
    };

    dev->ops->store(dev, &chain.counted.io);
    wait_for(&left);
    g_assert_cmpint(get(dev, 0, 4, 500 * BLOCK), ==, 0);
}

static void test_completion_may_submit(void)
{
    on_each_backend(body_chain);
}

/*
 * Four threads, each with its own stripe of the device and a flat model of it,
 * and several transfers of any size under way that do not overlap.
 */
typedef struct Stress {
    BaleDevice *dev;
    uint64_t base;
    uint32_t seed;
    unsigned rounds;
} Stress;

enum { STRIPE = 256, STRESS_IOS = 12 };

typedef struct StressIo {
    Counted counted; /* first */
    bool is_store;
    unsigned from, n;
} StressIo;

static gpointer stress_thread(gpointer opaque)
{
    Stress *stress = opaque;
    BaleDevice *dev = stress->dev;
    g_autoptr(GRand) rand = g_rand_new_with_seed(stress->seed);
    g_autofree uint8_t *flat = g_malloc0(STRIPE * BLOCK);
    BALE_AUTO_MEMORY uint8_t *bufs = block_of(0, STRIPE * BLOCK);

    for (unsigned round = 0; round < stress->rounds; round++) {
        StressIo ios[STRESS_IOS] = { 0 };
        gint left = 0;
        unsigned at = 0, n_ios = 0;
        bool plugged = g_rand_boolean(rand);

        if (plugged) {
            dev->ops->plug(dev);
        }
        while (n_ios < STRESS_IOS && at < STRIPE - 40) {
            StressIo *io = &ios[n_ios++];

            io->from = at + (unsigned)g_rand_int_range(rand, 0, 20);
            io->n = (unsigned)g_rand_int_range(rand, 1, 20);
            io->is_store = g_rand_boolean(rand);
            at = io->from + io->n;
            io->counted = (Counted) {
                .io = { stress->base + io->from * BLOCK,
                        bufs + io->from * BLOCK, io->n * BLOCK,
                        counted_done },
                .left = &left,
            };
            g_atomic_int_inc(&left);
            if (io->is_store) {
                uint32_t word = g_rand_int(rand);

                for (size_t i = 0; i < io->n * BLOCK; i += 4) {
                    memcpy(bufs + io->from * BLOCK + i, &word, 4);
                    word = word * 1664525 + 1013904223;
                }
                dev->ops->store(dev, &io->counted.io);
            } else {
                dev->ops->get(dev, &io->counted.io);
            }
        }
        if (plugged) {
            dev->ops->unplug(dev);
        }
        if (g_rand_int_range(rand, 0, 8) == 0) {
            g_assert_cmpint(bale_device_flush_sync(dev), ==, 0);
        }
        wait_for(&left);
        for (unsigned i = 0; i < n_ios; i++) {
            StressIo *io = &ios[i];
            size_t len = io->n * BLOCK;

            g_assert_cmpint(io->counted.ret, ==, 0);
            if (io->is_store) {
                memcpy(flat + io->from * BLOCK, bufs + io->from * BLOCK, len);
            } else {
                g_assert_cmpmem(bufs + io->from * BLOCK, len,
                                flat + io->from * BLOCK, len);
            }
        }
        if (g_rand_int_range(rand, 0, 10) == 0) {
            unsigned from = (unsigned)g_rand_int_range(rand, 0, STRIPE - 20);

            g_assert_cmpint(dev->ops->release(dev,
                                              stress->base + from * BLOCK,
                                              9 * BLOCK), ==, 0);
            memset(flat + from * BLOCK, 0, 9 * BLOCK);
        }
    }
    g_assert_cmpint(bale_device_get_sync(dev, stress->base, bufs,
                                         STRIPE * BLOCK), ==, 0);
    g_assert_cmpmem(bufs, STRIPE * BLOCK, flat, STRIPE * BLOCK);
    return NULL;
}

static void stress(BaleDevice *dev, uint32_t seed, unsigned rounds)
{
    Stress stresses[4];
    GThread *threads[4];

    g_assert_cmpint(dev->ops->allocate(dev, 0, 4 * STRIPE * BLOCK), ==, 0);
    g_assert_cmpint(store(dev, 0, 0, 4 * STRIPE * BLOCK), ==, 0);
    for (unsigned i = 0; i < 4; i++) {
        stresses[i] = (Stress) {
            dev, (uint64_t)i * STRIPE * BLOCK, seed + i, rounds,
        };
        threads[i] = g_thread_new("stress", stress_thread, &stresses[i]);
    }
    for (unsigned i = 0; i < 4; i++) {
        g_thread_join(threads[i]);
    }
    g_assert_cmpint(stats_of(dev).queue_depth, ==, 0);
}

static void body_stress(BaleDevice *dev)
{
    stress(dev, random_seed(), 60);
}

static void test_random_stress_equals_flat_model(void)
{
    on_each_backend(body_stress);
}

/* Close right after the last completion, many times over. */
static void test_close_right_after_the_last_completion(void)
{
    g_autofree char *path = path_of("close");
    BALE_AUTO_MEMORY void *buf = block_of(4, BLOCK);

    for (unsigned i = 0; i < 100; i++) {
        BaleDevice *dev = open_ok(path, RW_NEW |
                                        (i % 2 ? BALE_DEVICE_BUFFERED : 0));
        gint left = 4;
        Counted ios[4];

        for (unsigned j = 0; j < 4; j++) {
            ios[j] = (Counted) {
                { j * BLOCK, buf, BLOCK, counted_done }, &left,
            };
            dev->ops->store(dev, &ios[j].io);
        }
        while (g_atomic_int_get(&left) > 0) {
            /* At once. */
        }
        bale_device_close(dev);
    }
}

/* ---- file systems and block devices ----------------------------------- */

static unsigned warnings;

static GLogWriterOutput count_warnings(GLogLevelFlags level,
                                       const GLogField *fields, gsize n,
                                       gpointer opaque)
{
    warnings += (level & G_LOG_LEVEL_WARNING) != 0;
    return G_LOG_WRITER_HANDLED;
}

static void work_in(const char *path, const char *backend_expected)
{
    g_autoptr(BaleDevice) dev = open_ok(path, RW_NEW);
    g_autofree char *backend = backend_of(dev);

    g_assert_cmpstr(backend, ==, backend_expected);
    body_round_trip(dev);
    g_assert_cmpint(store(dev, 1 << 20, 1, 1 << 20), ==, 0);
    g_assert_cmpint(get(dev, 1 << 20, 1, 1 << 20), ==, 0);
}

/* ramfs is the one file system that never takes O_DIRECT. */
static void test_file_system_without_direct_io_gets_a_warning(void)
{
    g_autofree char *mount_point = path_of("ramfs");
    g_autofree char *path = g_build_filename(mount_point, "store", NULL);

    if (!is_root("a mount")) {
        return;
    }
    g_assert_cmpint(g_mkdir(mount_point, 0700), ==, 0);
    if (mount("none", mount_point, "ramfs", 0, NULL) < 0) {
        g_rmdir(mount_point);
        g_test_skip("no ramfs here");
        return;
    }
    warnings = 0;
    work_in(path, "threads, page cache");
    g_assert_cmpint(warnings, ==, 1);
    g_unlink(path);
    g_assert_cmpint(umount(mount_point), ==, 0);
    g_rmdir(mount_point);
}

/* Whether tmpfs takes O_DIRECT depends on the kernel: both ways must work. */
static void test_tmpfs(void)
{
    g_autofree char *path = g_strdup_printf("/dev/shm/bale-test-%d", getpid());
    struct statfs fs;

    if (statfs("/dev/shm", &fs) < 0 || fs.f_type != 0x01021994) {
        g_test_skip("no tmpfs in /dev/shm");
        return;
    }
    g_autoptr(BaleDevice) dev = open_ok(path, BALE_DEVICE_CREATE);

    g_unlink(path);
    body_round_trip(dev);
    body_release(dev);
}

/* A loop device with sectors of @sector bytes over @file; NULL: skipped. */
static char *loop_new(const char *file, unsigned sector)
{
    g_autofree char *command = g_strdup_printf(
        "truncate -s 16M %s && losetup -f --show -b %u %s", file, sector,
        file);
    const char *argv[] = { "/bin/sh", "-c", command, NULL };
    g_autofree char *out = NULL;
    int status = 1;

    if (!is_root("loop devices")) {
        return NULL;
    }
    if (!g_spawn_sync(NULL, (char **)argv, NULL, G_SPAWN_STDERR_TO_DEV_NULL,
                      NULL, NULL, &out, NULL, &status, NULL) || status != 0) {
        g_test_skip("no loop devices here");
        return NULL;
    }
    return g_strdup(g_strchomp(out));
}

static void loop_free(char *loop)
{
    g_autofree char *command = g_strdup_printf("losetup -d %s", loop);

    g_assert_cmpint(run(command), ==, 0);
    g_free(loop);
}

static void on_loop(unsigned sector)
{
    g_autofree char *file = path_of("loop.img");
    char *loop = loop_new(file, sector);
    BaleDevice *dev;
    BaleDeviceInfo info;
    int ret;

    if (!loop) {
        return;
    }
    dev = open_ok(loop, RW_NEW);
    info = info_of(dev);
    g_assert_cmpint(info.block_size, ==, sector);
    g_assert_cmpint(info.size, ==, 16 << 20);
    g_assert_cmpint(info.max_size, ==, 16 << 20);
    g_assert_true(info.fixed_size);
    open_fails(loop, 0, "Could not claim");
    open_fails(loop, BALE_DEVICE_READ_ONLY, "another process");
    g_assert_cmpint(store(dev, sector, 3, sector), ==, 0);
    g_assert_cmpint(get(dev, 0, 0, sector), ==, 0);
    g_assert_cmpint(get(dev, sector, 3, sector), ==, 0);
    g_assert_cmpint(bale_device_flush_sync(dev), ==, 0);
    g_assert_cmpint(dev->ops->allocate(dev, 0, 16 << 20), ==, 0);
    g_assert_cmpint(dev->ops->allocate(dev, 0, (16 << 20) + 512), ==, -ENOSPC);
    g_assert_cmpint(get(dev, 16 << 20, 0, 65536), ==, 0);
    g_assert_cmpint(store(dev, 16 << 20, 1, 65536), <, 0);
    g_assert_cmpint(dev->ops->truncate(dev, 1 << 20), ==, -ENOTSUP);
    ret = dev->ops->release(dev, 1 << 20, 1 << 20);
    g_assert_true(ret == 0 || ret == -ENOTSUP);
    stress(dev, random_seed(), 10);
    bale_device_close(dev);
    bale_device_close(open_ok(loop, 0));
    loop_free(loop);
    g_unlink(file);
}

static void test_loop_device_with_512_byte_sectors(void)
{
    on_loop(512);
}

static void test_loop_device_with_4096_byte_sectors(void)
{
    on_loop(4096);
}

static void test_full_file_system_answers_enospc(void)
{
    g_autofree char *mount_point = path_of("small");
    g_autofree char *path = g_build_filename(mount_point, "store", NULL);
    BaleDevice *dev;

    if (!is_root("a mount")) {
        return;
    }
    g_assert_cmpint(g_mkdir(mount_point, 0700), ==, 0);
    if (mount("none", mount_point, "tmpfs", 0, "size=1m") < 0) {
        g_rmdir(mount_point);
        g_test_skip("no tmpfs here");
        return;
    }
    dev = open_ok(path, BALE_DEVICE_CREATE);
    g_assert_cmpint(dev->ops->allocate(dev, 0, 512 << 10), ==, 0);
    g_assert_cmpint(dev->ops->allocate(dev, 0, 4 << 20), ==, -ENOSPC);
    /* What was there is there, and nothing more was taken. */
    g_assert_cmpint(info_of(dev).size, ==, 512 << 10);
    g_assert_cmpint(store(dev, 0, 1, 512 << 10), ==, 0);
    g_assert_cmpint(store(dev, 0, 1, 4 << 20), ==, -ENOSPC);
    bale_device_close(dev);
    g_unlink(path);
    g_assert_cmpint(umount(mount_point), ==, 0);
    g_rmdir(mount_point);
}

/* ---- faults of the kernel --------------------------------------------- */

typedef struct Fault {
    BaleFaultSite site;
    gint nth;      /* from 1; counted down */
    bool sticky;
    ssize_t res;   /* answered instead; INT_MIN: half of what was asked */
    gint hits;
} Fault;

#define HALF G_MININT

static ssize_t inject(BaleFaultSite site, uint64_t offset, size_t len,
                      ssize_t res, void *opaque)
{
    Fault *fault = opaque;
    gint left;

    if (site != fault->site || res < 0) {
        return res;
    }
    left = g_atomic_int_add(&fault->nth, -1);
    if (left > 1 || (left < 1 && !fault->sticky)) {
        return res;
    }
    g_atomic_int_inc(&fault->hits);
    if (fault->res == HALF) {
        return len > BLOCK ? (ssize_t)(len / 2 / BLOCK * BLOCK) : res;
    }
    return fault->res;
}

/* Eight transfers of eight blocks through @fault, one after the other. */
static unsigned failures_through(BaleDevice *dev, Fault *fault, int expected)
{
    unsigned failures = 0;

    bale_fault_hook_set(inject, fault);
    for (unsigned i = 0; i < 8; i++) {
        int ret = store(dev, i * 8 * BLOCK, (uint8_t)(i + 1), 8 * BLOCK);

        if (ret == 0) {
            ret = get(dev, i * 8 * BLOCK, (uint8_t)(i + 1), 8 * BLOCK);
        }
        if (ret < 0) {
            g_assert_cmpint(ret, ==, expected);
            failures++;
        }
    }
    bale_fault_hook_set(NULL, NULL);
    return failures;
}

static const BaleFaultSite transfers[] = { BALE_FAULT_READ, BALE_FAULT_WRITE };

static void body_interruptions(BaleDevice *dev)
{
    static const ssize_t results[] = { -EINTR, -EAGAIN, HALF };

    for (unsigned t = 0; t < G_N_ELEMENTS(transfers); t++) {
        for (unsigned r = 0; r < G_N_ELEMENTS(results); r++) {
            for (int nth = 1; nth <= 9; nth++) {
                Fault fault = { transfers[t], nth, false, results[r] };
                uint64_t before = stats_of(dev).retries;

                g_assert_cmpint(failures_through(dev, &fault, 0), ==, 0);
                if (nth <= 8) {
                    g_assert_cmpint(fault.hits, ==, 1);
                    g_assert_cmpint(stats_of(dev).retries, ==, before + 1);
                }
            }
        }
    }
}

static void test_interruptions_are_hidden(void)
{
    on_each_backend(body_interruptions);
}

static void body_errors(BaleDevice *dev)
{
    static const int errors[] = { -EIO, -ENOSPC };

    for (unsigned t = 0; t < G_N_ELEMENTS(transfers); t++) {
        for (unsigned e = 0; e < G_N_ELEMENTS(errors); e++) {
            for (int nth = 1; nth <= 8; nth++) {
                Fault once = { transfers[t], nth, false, errors[e] };
                Fault sticky = { transfers[t], nth, true, errors[e] };

                g_assert_cmpint(failures_through(dev, &once, errors[e]), ==,
                                1);
                g_assert_cmpint(failures_through(dev, &sticky, errors[e]), ==,
                                9 - nth);
            }
        }
    }
}

static void test_errors_are_reported_once_each(void)
{
    on_each_backend(body_errors);
}

static void body_halves(BaleDevice *dev)
{
    for (unsigned t = 0; t < G_N_ELEMENTS(transfers); t++) {
        Fault fault = { transfers[t], 1, true, HALF };

        g_assert_cmpint(failures_through(dev, &fault, 0), ==, 0);
        g_assert_cmpint(fault.hits, >, 8);
    }
}

static void test_always_short_transfers_end(void)
{
    on_each_backend(body_halves);
}

static void body_stall(BaleDevice *dev)
{
    Fault fault = { BALE_FAULT_WRITE, 1, true, -EAGAIN };

    bale_fault_hook_set(inject, &fault);
    g_assert_cmpint(store(dev, 0, 1, BLOCK), ==, -EIO);
    fault.res = 0;
    g_assert_cmpint(store(dev, 0, 1, BLOCK), ==, -EIO);
    bale_fault_hook_set(NULL, NULL);
    g_assert_cmpint(store(dev, 0, 1, BLOCK), ==, 0);
}

static void test_endless_interruption_ends_in_eio(void)
{
    on_each_backend(body_stall);
}

static void body_failed_flush(BaleDevice *dev)
{
    Fault fault = { BALE_FAULT_SYNC, 2, false, -EIO };

    bale_fault_hook_set(inject, &fault);
    g_assert_cmpint(flush(dev), ==, 0);
    g_assert_cmpint(store(dev, 0, 1, BLOCK), ==, 0);
    g_assert_cmpint(flush(dev), ==, -EIO);
    bale_fault_hook_set(NULL, NULL);
    /* The kernel would say yes now; we know better. */
    g_assert_cmpint(flush(dev), ==, -EIO);
    g_assert_cmpint(fault.nth, ==, 0);
    g_assert_cmpint(get(dev, 0, 1, BLOCK), ==, 0);
}

static void test_failed_flush_is_never_retried(void)
{
    on_each_backend(body_failed_flush);
}

enum { FLUSHERS = 4, FLUSHES = 100 };

typedef struct Flusher {
    BaleDevice *dev;
    unsigned number;
    bool failed;
} Flusher;

static gpointer flusher_run(gpointer opaque)
{
    Flusher *f = opaque;

    in_place = f->number % 2;
    for (unsigned i = 0; i < FLUSHES; i++) {
        int ret;

        g_assert_cmpint(store(f->dev, f->number * BLOCK, i, BLOCK), ==, 0);
        ret = flush(f->dev);
        g_assert_true(ret == -EIO || (ret == 0 && !f->failed));
        f->failed = ret < 0;
    }
    return NULL;
}

/* Those that flush themselves and those that let flush, beside each other. */
static void flushers(bool fail)
{
    g_autofree char *path = path_of("flushers");
    g_autoptr(BaleDevice) dev = open_ok(path, RW_NEW);
    Fault fault = { BALE_FAULT_SYNC, FLUSHES / 2, false, -EIO };
    GThread *threads[FLUSHERS];
    Flusher f[FLUSHERS];

    bale_fault_hook_set(fail ? inject : NULL, &fault);
    for (unsigned i = 0; i < FLUSHERS; i++) {
        f[i] = (Flusher){ dev, i, false };
        threads[i] = g_thread_new("flusher", flusher_run, &f[i]);
    }
    for (unsigned i = 0; i < FLUSHERS; i++) {
        g_thread_join(threads[i]);
        g_assert_cmpint(f[i].failed, ==, fail);
        g_assert_cmpint(get(dev, i * BLOCK, FLUSHES - 1, BLOCK), ==, 0);
    }
    bale_fault_hook_set(NULL, NULL);
    g_assert_cmpint(flush(dev), ==, fail ? -EIO : 0);
}

static void test_flushes_in_place_and_not(void)
{
    flushers(false);
    flushers(true);
}

static void test_interrupted_flush_is_a_failed_flush(void)
{
    g_autofree char *path = path_of("flush-eintr");
    g_autoptr(BaleDevice) dev = open_ok(path, RW_NEW);
    Fault fault = { BALE_FAULT_SYNC, 1, false, -EINTR };

    bale_fault_hook_set(inject, &fault);
    g_assert_cmpint(flush(dev), ==, -EIO);
    bale_fault_hook_set(NULL, NULL);
    g_assert_cmpint(fault.nth, ==, 0);
}

static void submit_fault(ssize_t res, bool sticky, int expected)
{
    g_autofree char *path = path_of("submit");
    g_autoptr(BaleDevice) dev = open_ok(path, RW_NEW);
    Fault fault = { BALE_FAULT_SUBMIT, 3, sticky, res };
    unsigned failures = failures_through(dev, &fault, expected);

    if (expected == 0) {
        g_assert_cmpint(failures, ==, 0);
    } else {
        g_assert_cmpint(failures, >=, 1);
    }
    g_assert_cmpint(fault.hits, >=, 1);
}

static void test_full_kernel_queue_is_waited_for(void)
{
    submit_fault(-EAGAIN, false, 0);
    submit_fault(-EINTR, false, 0);
}

static void test_refused_submission_is_reported(void)
{
    submit_fault(-EIO, false, -EIO);
    submit_fault(-EINVAL, true, -EINVAL);
}

/* A kernel that never accepts anything is given up on, in the end. */
static void test_dead_kernel_queue_ends_in_eio(void)
{
    g_autofree char *path = path_of("dead");
    g_autoptr(BaleDevice) dev = open_ok(path, RW_NEW);
    Fault fault = { BALE_FAULT_SUBMIT, 1, true, -EAGAIN };

    bale_fault_hook_set(inject, &fault);
    g_assert_cmpint(store(dev, 0, 1, BLOCK), ==, -EIO);
    bale_fault_hook_set(NULL, NULL);
    g_assert_cmpint(store(dev, 0, 1, BLOCK), ==, 0);
}

static void test_without_libaio_threads_do_it(void)
{
    g_autofree char *path = path_of("no-libaio");
    Fault fault = { BALE_FAULT_SETUP, 1, false, -EAGAIN };

    bale_fault_hook_set(inject, &fault);
    work_in(path, "threads, O_DIRECT");
    bale_fault_hook_set(NULL, NULL);
}

static void test_direct_io_refused_only_in_transfers(void)
{
    g_autofree char *path = path_of("no-direct");
    Fault fault = { BALE_FAULT_DIRECT, 1, true, -EINVAL };

    warnings = 0;
    bale_fault_hook_set(inject, &fault);
    work_in(path, "threads, page cache");
    bale_fault_hook_set(NULL, NULL);
    g_assert_cmpint(warnings, ==, 1);
}

/* A file system that wants larger blocks than 4096 gets them. */
static void test_larger_direct_io_unit_is_found(void)
{
    g_autofree char *path = path_of("large-unit");
    Fault fault = { BALE_FAULT_DIRECT, 1, false, -EINVAL };

    bale_fault_hook_set(inject, &fault);
    g_autoptr(BaleDevice) dev = open_ok(path, RW_NEW);
    bale_fault_hook_set(NULL, NULL);
    g_assert_cmpint(info_of(dev).block_size, ==, 8192);
    g_assert_cmpint(store(dev, 8192, 1, 8192), ==, 0);
    g_assert_cmpint(get(dev, 8192, 1, 8192), ==, 0);
}

static void test_failed_space_calls_change_nothing(void)
{
    g_autofree char *path = path_of("space-faults");
    g_autoptr(BaleDevice) dev = open_ok(path, RW_NEW);
    Fault fault = { BALE_FAULT_ALLOCATE, 1, false, -ENOSPC };

    g_assert_cmpint(store(dev, 0, 1, 4 * BLOCK), ==, 0);
    bale_fault_hook_set(inject, &fault);
    g_assert_cmpint(dev->ops->allocate(dev, 0, 1 << 20), ==, -ENOSPC);
    g_assert_cmpint(info_of(dev).size, ==, 4 * BLOCK);

    /* Without fallocate the file becomes sparse. */
    fault = (Fault) { BALE_FAULT_ALLOCATE, 1, false, -EOPNOTSUPP };
    g_assert_cmpint(dev->ops->allocate(dev, 0, 1 << 20), ==, 0);
    g_assert_cmpint(info_of(dev).size, ==, 1 << 20);

    fault = (Fault) { BALE_FAULT_RELEASE, 1, true, -EOPNOTSUPP };
    g_assert_cmpint(dev->ops->release(dev, 1 << 19, BLOCK), ==, -ENOTSUP);
    fault = (Fault) { BALE_FAULT_RELEASE, 1, true, -EIO };
    g_assert_cmpint(dev->ops->release(dev, 1 << 19, BLOCK), ==, -EIO);
    fault = (Fault) { BALE_FAULT_TRUNCATE, 1, true, -EIO };
    g_assert_cmpint(dev->ops->truncate(dev, 0), ==, -EIO);
    bale_fault_hook_set(NULL, NULL);
}

/* Random answers while four threads work: every error is a clean one. */
static ssize_t inject_randomly(BaleFaultSite site, uint64_t offset, size_t len,
                               ssize_t res, void *opaque)
{
    unsigned dice = (unsigned)g_atomic_int_add((gint *)opaque, 1) % 13;

    if (res < 0) {
        return res;
    }
    switch (site) {
    case BALE_FAULT_READ:
    case BALE_FAULT_WRITE:
        return dice == 0 ? -EINTR
               : dice == 5 ? -EAGAIN
               : dice == 9 && len > BLOCK ? (ssize_t)(len / 2 / BLOCK * BLOCK)
                                          : res;
    case BALE_FAULT_SUBMIT:
        return dice == 3 ? -EAGAIN : res;
    default:
        return res;
    }
}

static void body_stress_with_interruptions(BaleDevice *dev)
{
    gint dice = 0;
    uint32_t seed = random_seed();

    bale_fault_hook_set(inject_randomly, &dice);
    stress(dev, seed, 30);
    bale_fault_hook_set(NULL, NULL);
    g_assert_cmpint(stats_of(dev).retries, >, 50);
}

static void test_random_stress_with_interruptions(void)
{
    on_each_backend(body_stress_with_interruptions);
}

/* ---- plug-ins that are none ------------------------------------------- */

static void plugin_fails(const char *plugin, const char *why)
{
    g_autoptr(GError) err = NULL;

    g_assert_null(bale_device_plugin_open(plugin, "target", 0, &err));
    g_assert_nonnull(err);
    g_test_message("%s", err->message);
    g_assert_nonnull(strstr(err->message, plugin));
    g_assert_nonnull(strstr(err->message, why));
}

static void test_plugin_errors_say_what_and_where(void)
{
    g_autofree char *text = path_of("text.so");
    g_autofree char *missing = path_of("missing.so");

    plugin_fails(missing, "No such file");
    g_assert_true(g_file_set_contents(text, "no object", -1, NULL));
    plugin_fails(text, "");
}

int main(int argc, char **argv)
{
    g_autofree char *remove = NULL;
    int ret;

    g_test_init(&argc, &argv, NULL);
    /* Warnings are counted and not fatal here. */
    g_log_set_always_fatal(G_LOG_FATAL_MASK);
    g_log_set_writer_func(count_warnings, NULL, NULL);
    directory = g_dir_make_tmp("bale-device-XXXXXX", NULL);
    g_assert_nonnull(directory);
#define TEST(name) g_test_add_func("/device/" #name, test_##name)
    TEST(round_trip);
    TEST(reads_past_the_end_are_zeroes);
    TEST(release_punches_and_keeps_the_size);
    TEST(release_gives_space_back);
    TEST(allocate_reserves);
    TEST(info_of_a_file);
    TEST(statistics_count);
    TEST(new_file_is_private);
    TEST(create_never_replaces);
    TEST(open_errors_say_what_and_where);
    TEST(symbolic_link_to_a_file_is_followed);
    TEST(descriptor_is_closed_on_exec);
    TEST(read_only_refuses_changes);
    TEST(second_writer_is_refused);
    TEST(readers_share_and_refuse_writers);
    TEST(qemu_cannot_open_what_we_write);
    TEST(we_cannot_open_what_qemu_writes);
    TEST(deep_queue_waits_inside);
    TEST(completion_may_submit);
    TEST(random_stress_equals_flat_model);
    TEST(close_right_after_the_last_completion);
    TEST(file_system_without_direct_io_gets_a_warning);
    TEST(tmpfs);
    TEST(loop_device_with_512_byte_sectors);
    TEST(loop_device_with_4096_byte_sectors);
    TEST(full_file_system_answers_enospc);
    TEST(interruptions_are_hidden);
    TEST(errors_are_reported_once_each);
    TEST(always_short_transfers_end);
    TEST(endless_interruption_ends_in_eio);
    TEST(failed_flush_is_never_retried);
    TEST(flushes_in_place_and_not);
    TEST(interrupted_flush_is_a_failed_flush);
    TEST(full_kernel_queue_is_waited_for);
    TEST(refused_submission_is_reported);
    TEST(dead_kernel_queue_ends_in_eio);
    TEST(without_libaio_threads_do_it);
    TEST(direct_io_refused_only_in_transfers);
    TEST(larger_direct_io_unit_is_found);
    TEST(failed_space_calls_change_nothing);
    TEST(random_stress_with_interruptions);
    TEST(plugin_errors_say_what_and_where);
    ret = g_test_run();
    if (ret == 0) {
        /* A failing test leaves its directory. */
        remove = g_strdup_printf("rm -rf %s", directory);
        ret = run(remove);
    }
    g_free(directory);
    return ret;
}
