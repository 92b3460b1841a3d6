/*
 * The aio device, on files and loop devices; test-device-faults.c has the
 * faults of the kernel.
 *
 * Tests on loop devices and on a file system without O_DIRECT need root and are
 * skipped without.  BALE_SEED=<number> repeats a random run.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "devices.h"

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

#include "util/memory.h"

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

static bool is_root(const char *for_what)
{
    if (geteuid() != 0) {
        g_autofree char *why = g_strdup_printf("needs root for %s", for_what);

        g_test_skip(why);
        return false;
    }
    return true;
}

static void test_round_trip(void)
{
    dev_each_backend(dev_round_trip);
}

static void body_read_past_end(BaleDevice *dev)
{
    BALE_AUTO_MEMORY uint8_t *buf = dev_block(0xee, 4 * BLOCK);

    g_assert_cmpint(dev_get(dev, 0, 0, BLOCK), ==, 0);
    g_assert_cmpint(dev_get(dev, (uint64_t)1 << 40, 0, BLOCK), ==, 0);
    g_assert_cmpint(dev_store(dev, 0, 5, BLOCK), ==, 0);
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
    g_assert_cmpint(dev_get(dev, BLOCK, 0, BLOCK), ==, 0);
}

static void test_reads_past_the_end_are_zeroes(void)
{
    dev_each_backend(body_read_past_end);
}

static void body_release(BaleDevice *dev)
{
    const uint64_t page = 1 << 20;

    g_assert_cmpint(dev->ops->allocate(dev, 0, 4 * page), ==, 0);
    for (unsigned i = 0; i < 4; i++) {
        g_assert_cmpint(dev_store(dev, i * page, 9, page), ==, 0);
    }
    g_assert_cmpint(dev->ops->release(dev, page, page), ==, 0);
    g_assert_cmpint(dev_info(dev).size, ==, 4 * page);
    g_assert_cmpint(dev_get(dev, 0, 9, page), ==, 0);
    g_assert_cmpint(dev_get(dev, page, 0, page), ==, 0);
    g_assert_cmpint(dev_get(dev, 2 * page, 9, page), ==, 0);
    /* Also at the end, where a file could be cut; and past it. */
    g_assert_cmpint(dev->ops->release(dev, 3 * page, page), ==, 0);
    g_assert_cmpint(dev->ops->release(dev, 8 * page, page), ==, 0);
    g_assert_cmpint(dev_info(dev).size, ==, 4 * page);
    g_assert_cmpint(dev_get(dev, 3 * page, 0, page), ==, 0);
}

static void test_release_punches_and_keeps_the_size(void)
{
    dev_each_backend(body_release);
}

static void test_release_gives_space_back(void)
{
    g_autofree char *path = dev_path("space");
    g_autoptr(BaleDevice) dev = dev_open(path, RW_NEW);
    struct stat before, after;

    g_assert_cmpint(dev_store(dev, 0, 1, 4 << 20), ==, 0);
    g_assert_cmpint(bale_device_flush_sync(dev), ==, 0);
    g_assert_cmpint(stat(path, &before), ==, 0);
    g_assert_cmpint(dev->ops->release(dev, 1 << 20, 2 << 20), ==, 0);
    g_assert_cmpint(stat(path, &after), ==, 0);
    g_assert_cmpint(after.st_size, ==, before.st_size);
    g_assert_cmpint(after.st_blocks + (2 << 20) / 512, <=, before.st_blocks);
}

static void test_allocate_reserves(void)
{
    g_autofree char *path = dev_path("reserve");
    g_autoptr(BaleDevice) dev = dev_open(path, RW_NEW);
    struct stat st;

    g_assert_cmpint(dev->ops->allocate(dev, 0, 8 << 20), ==, 0);
    g_assert_cmpint(stat(path, &st), ==, 0);
    g_assert_cmpint(st.st_size, ==, 8 << 20);
    g_assert_cmpint(st.st_blocks, >=, (8 << 20) / 512);
    /* Never shorter. */
    g_assert_cmpint(dev->ops->allocate(dev, 0, 1 << 20), ==, 0);
    g_assert_cmpint(dev_info(dev).size, ==, 8 << 20);
    g_assert_cmpint(dev->ops->allocate(dev, UINT64_MAX - 4095, 4096), ==,
                    -EFBIG);
    g_assert_cmpint(dev->ops->allocate(dev, 1, INT64_MAX), ==, -EFBIG);
}

static void test_info_of_a_file(void)
{
    g_autofree char *path = dev_path("info");
    g_autoptr(BaleDevice) dev = dev_open(path, RW_NEW);
    BaleDeviceInfo info = dev_info(dev);

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
    g_autofree char *path = dev_path("stats");
    g_autoptr(BaleDevice) dev = dev_open(path, RW_NEW);
    BaleDeviceStats stats;
    uint64_t n = 0;

    g_assert_cmpint(dev->ops->allocate(dev, 0, 1 << 20), ==, 0);
    for (unsigned i = 0; i < 10; i++) {
        g_assert_cmpint(dev_store(dev, i * BLOCK, 1, BLOCK), ==, 0);
        g_assert_cmpint(dev_get(dev, 0, 1, BLOCK), ==, 0);
    }
    g_assert_cmpint(bale_device_flush_sync(dev), ==, 0);
    g_assert_cmpint(dev->ops->release(dev, 0, BLOCK), ==, 0);
    stats = dev_stats(dev);
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
    g_assert_cmpint(dev_stats(dev).stores, ==, 0);
}

/* ---- opening ---------------------------------------------------------- */

static void test_new_file_is_private(void)
{
    g_autofree char *path = dev_path("private");
    g_autoptr(BaleDevice) dev = dev_open(path, BALE_DEVICE_CREATE);
    struct stat st;

    g_assert_nonnull(dev);
    g_assert_cmpint(stat(path, &st), ==, 0);
    g_assert_cmpint(st.st_mode & 0777, ==, 0600);
}

static void test_create_never_replaces(void)
{
    g_autofree char *path = dev_path("exists");
    g_autofree char *content = NULL;

    g_assert_true(g_file_set_contents(path, "precious", -1, NULL));
    open_fails(path, BALE_DEVICE_CREATE, "File exists");
    g_assert_true(g_file_get_contents(path, &content, NULL, NULL));
    g_assert_cmpstr(content, ==, "precious");
    bale_device_close(dev_open(path, RW_NEW));
    g_free(g_steal_pointer(&content));
    g_assert_true(g_file_get_contents(path, &content, NULL, NULL));
    g_assert_cmpstr(content, ==, "");
}

static void test_open_errors_say_what_and_where(void)
{
    g_autofree char *missing = dev_path("missing");
    g_autofree char *nowhere = dev_path("no/where");
    g_autofree char *fifo = dev_path("fifo");
    g_autofree char *dangling = dev_path("dangling");

    open_fails(missing, 0, "No such file");
    g_assert_false(g_file_test(missing, G_FILE_TEST_EXISTS));
    open_fails(nowhere, RW_NEW, "No such file");
    open_fails(dev_directory, 0, "Is a directory");
    open_fails(dev_directory, BALE_DEVICE_READ_ONLY, "neither a regular file");
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
    g_autofree char *path = dev_path("target");
    g_autofree char *link = dev_path("link");

    bale_device_close(dev_open(path, RW_NEW));
    g_assert_cmpint(symlink("target", link), ==, 0);
    bale_device_close(dev_open(link, 0));
}

static void test_descriptor_is_closed_on_exec(void)
{
    g_autofree char *path = dev_path("cloexec");
    g_autoptr(BaleDevice) dev = dev_open(path, RW_NEW);
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
    g_autofree char *path = dev_path("read-only");

    bale_device_close(dev_open(path, RW_NEW));
    g_autoptr(BaleDevice) dev = dev_open(path, BALE_DEVICE_READ_ONLY);

    g_assert_true(dev_info(dev).read_only);
    g_assert_cmpint(dev_store(dev, 0, 1, BLOCK), ==, -EROFS);
    g_assert_cmpint(dev->ops->allocate(dev, 0, BLOCK), ==, -EROFS);
    g_assert_cmpint(dev->ops->release(dev, 0, BLOCK), ==, -EROFS);
    g_assert_cmpint(dev->ops->truncate(dev, 0), ==, -EROFS);
    g_assert_cmpint(bale_device_flush_sync(dev), ==, 0);
    g_assert_cmpint(dev_get(dev, 0, 0, BLOCK), ==, 0);
}

/* ---- locking ---------------------------------------------------------- */

static void test_second_writer_is_refused(void)
{
    g_autofree char *path = dev_path("lock-write");
    g_autoptr(BaleDevice) dev = dev_open(path, RW_NEW);

    open_fails(path, 0, "another process");
    open_fails(path, BALE_DEVICE_READ_ONLY, "another process");
    bale_device_close(dev_open(path, BALE_DEVICE_NO_LOCK));
    g_assert_cmpint(dev_store(dev, 0, 3, BLOCK), ==, 0);
    /* The refused one has emptied nothing. */
    open_fails(path, RW_NEW, "another process");
    g_assert_cmpint(dev_get(dev, 0, 3, BLOCK), ==, 0);
}

static void test_readers_share_and_refuse_writers(void)
{
    g_autofree char *path = dev_path("lock-read");

    bale_device_close(dev_open(path, RW_NEW));
    g_autoptr(BaleDevice) one = dev_open(path, BALE_DEVICE_READ_ONLY);
    BaleDevice *two = dev_open(path, BALE_DEVICE_READ_ONLY);

    open_fails(path, 0, "another process");
    bale_device_close(two);
    open_fails(path, 0, "another process");
    bale_device_close(g_steal_pointer(&one));
    bale_device_close(dev_open(path, 0));
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
    g_autofree char *path = dev_path("lock-qemu");
    g_autofree char *read = g_strdup_printf(
        "qemu-io -r -f raw -c 'read 0 4k' %s", path);
    g_autofree char *write = g_strdup_printf(
        "qemu-io -f raw -c 'write 0 4k' %s", path);

    if (!have_program("qemu-io")) {
        return;
    }
    BaleDevice *dev = dev_open(path, RW_NEW);
    g_assert_cmpint(dev->ops->allocate(dev, 0, 1 << 20), ==, 0);
    g_assert_cmpint(dev_shell(write), !=, 0);
    g_assert_cmpint(dev_shell(read), !=, 0);
    bale_device_close(dev);
    g_assert_cmpint(dev_shell(write), ==, 0);

    /* Beside our readers, QEMU may read. */
    dev = dev_open(path, BALE_DEVICE_READ_ONLY);
    g_assert_cmpint(dev_shell(write), !=, 0);
    g_assert_cmpint(dev_shell(read), ==, 0);
    bale_device_close(dev);
}

static void test_we_cannot_open_what_qemu_writes(void)
{
    g_autofree char *path = dev_path("lock-by-qemu");
    const char *argv[] = { "qemu-io", "-f", "raw", path, NULL };
    GPid pid;
    int in, out;
    char byte;

    if (!have_program("qemu-io")) {
        return;
    }
    BaleDevice *dev = dev_open(path, RW_NEW);
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
    bale_device_close(dev_open(path, 0));
}

/* ---- many at once ----------------------------------------------------- */

static void body_deep_queue(BaleDevice *dev)
{
    enum { N = 1000 };
    g_autofree DevIo *ios = g_new0(DevIo, N);
    BALE_AUTO_MEMORY uint8_t *buf = dev_block(0, N * BLOCK);
    gint left = N;

    for (unsigned i = 0; i < N; i++) {
        memset(buf + i * BLOCK, (int)(i % 251), BLOCK);
        ios[i] = (DevIo) {
            .io = { i * BLOCK, buf + i * BLOCK, BLOCK, dev_io_done },
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
    dev_wait(&left);
    for (unsigned i = 0; i < N; i++) {
        g_assert_cmpint(ios[i].ret, ==, 0);
    }
    for (unsigned i = 0; i < N; i += 37) {
        g_assert_cmpint(dev_get(dev, i * BLOCK, (uint8_t)(i % 251), BLOCK), ==,
                        0);
    }
    g_assert_cmpint(dev_stats(dev).queue_depth, ==, 0);
}

static void test_deep_queue_waits_inside(void)
{
    dev_each_backend(body_deep_queue);
}

/* Another store from inside each completion, as a log's write-back does. */
typedef struct Chain {
    DevIo counted; /* first */
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
        dev_io_done(io, ret);
    }
}

static void body_chain(BaleDevice *dev)
{
    BALE_AUTO_MEMORY void *buf = dev_block(4, BLOCK);
    gint left = 1;
    Chain chain = {
        .counted = { { 0, buf, BLOCK, chain_done }, &left },
        .dev = dev,
        .left = 500,
    };

    dev->ops->store(dev, &chain.counted.io);
    dev_wait(&left);
    g_assert_cmpint(dev_get(dev, 0, 4, 500 * BLOCK), ==, 0);
}

static void test_completion_may_submit(void)
{
    dev_each_backend(body_chain);
}

static void body_stress(BaleDevice *dev)
{
    dev_stress(dev, dev_seed(), 60);
}

static void test_random_stress_equals_flat_model(void)
{
    dev_each_backend(body_stress);
}

/* Close right after the last completion, many times over. */
static void test_close_right_after_the_last_completion(void)
{
    g_autofree char *path = dev_path("close");
    BALE_AUTO_MEMORY void *buf = dev_block(4, BLOCK);

    for (unsigned i = 0; i < 100; i++) {
        BaleDevice *dev = dev_open(path, RW_NEW |
                                        (i % 2 ? BALE_DEVICE_BUFFERED : 0));
        gint left = 4;
        DevIo ios[4];

        for (unsigned j = 0; j < 4; j++) {
            ios[j] = (DevIo) {
                { j * BLOCK, buf, BLOCK, dev_io_done }, &left,
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

/* ramfs is the one file system that never takes O_DIRECT. */
static void test_file_system_without_direct_io_gets_a_warning(void)
{
    g_autofree char *mount_point = dev_path("ramfs");
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
    dev_warnings = 0;
    dev_work_in(path, "threads, page cache");
    g_assert_cmpint(dev_warnings, ==, 1);
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
    g_autoptr(BaleDevice) dev = dev_open(path, BALE_DEVICE_CREATE);

    g_unlink(path);
    dev_round_trip(dev);
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

    g_assert_cmpint(dev_shell(command), ==, 0);
    g_free(loop);
}

static void on_loop(unsigned sector)
{
    g_autofree char *file = dev_path("loop.img");
    char *loop = loop_new(file, sector);
    BaleDevice *dev;
    BaleDeviceInfo info;
    int ret;

    if (!loop) {
        return;
    }
    dev = dev_open(loop, RW_NEW);
    info = dev_info(dev);
    g_assert_cmpint(info.block_size, ==, sector);
    g_assert_cmpint(info.size, ==, 16 << 20);
    g_assert_cmpint(info.max_size, ==, 16 << 20);
    g_assert_true(info.fixed_size);
    open_fails(loop, 0, "Could not claim");
    open_fails(loop, BALE_DEVICE_READ_ONLY, "another process");
    g_assert_cmpint(dev_store(dev, sector, 3, sector), ==, 0);
    g_assert_cmpint(dev_get(dev, 0, 0, sector), ==, 0);
    g_assert_cmpint(dev_get(dev, sector, 3, sector), ==, 0);
    g_assert_cmpint(bale_device_flush_sync(dev), ==, 0);
    g_assert_cmpint(dev->ops->allocate(dev, 0, 16 << 20), ==, 0);
    g_assert_cmpint(dev->ops->allocate(dev, 0, (16 << 20) + 512), ==, -ENOSPC);
    g_assert_cmpint(dev_get(dev, 16 << 20, 0, 65536), ==, 0);
    g_assert_cmpint(dev_store(dev, 16 << 20, 1, 65536), <, 0);
    g_assert_cmpint(dev->ops->truncate(dev, 1 << 20), ==, -ENOTSUP);
    ret = dev->ops->release(dev, 1 << 20, 1 << 20);
    g_assert_true(ret == 0 || ret == -ENOTSUP);
    dev_stress(dev, dev_seed(), 10);
    bale_device_close(dev);
    bale_device_close(dev_open(loop, 0));
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
    g_autofree char *mount_point = dev_path("small");
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
    dev = dev_open(path, BALE_DEVICE_CREATE);
    g_assert_cmpint(dev->ops->allocate(dev, 0, 512 << 10), ==, 0);
    g_assert_cmpint(dev->ops->allocate(dev, 0, 4 << 20), ==, -ENOSPC);
    /* What was there is there, and nothing more was taken. */
    g_assert_cmpint(dev_info(dev).size, ==, 512 << 10);
    g_assert_cmpint(dev_store(dev, 0, 1, 512 << 10), ==, 0);
    g_assert_cmpint(dev_store(dev, 0, 1, 4 << 20), ==, -ENOSPC);
    bale_device_close(dev);
    g_unlink(path);
    g_assert_cmpint(umount(mount_point), ==, 0);
    g_rmdir(mount_point);
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
    g_autofree char *text = dev_path("text.so");
    g_autofree char *missing = dev_path("missing.so");

    plugin_fails(missing, "No such file");
    g_assert_true(g_file_set_contents(text, "no object", -1, NULL));
    plugin_fails(text, "");
}

int main(int argc, char **argv)
{
    dev_tests_init(&argc, &argv);
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
    TEST(plugin_errors_say_what_and_where);
    return dev_tests_run();
}
