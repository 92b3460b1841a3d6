/*
 * Real devices on files, for unit tests.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "devices.h"

#include <glib/gstdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>

#include "util/memory.h"

char *dev_directory;
unsigned dev_warnings;
_Thread_local bool dev_in_place;

static GLogWriterOutput count_warnings(GLogLevelFlags level,
                                       const GLogField *fields, gsize n,
                                       gpointer opaque)
{
    dev_warnings += (level & G_LOG_LEVEL_WARNING) != 0;
    return G_LOG_WRITER_HANDLED;
}

int dev_shell(const char *command)
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

void dev_tests_init(int *argc, char ***argv)
{
    g_test_init(argc, argv, NULL);
    g_log_set_always_fatal(G_LOG_FATAL_MASK);
    g_log_set_writer_func(count_warnings, NULL, NULL);
    dev_directory = g_dir_make_tmp("bale-device-XXXXXX", NULL);
    g_assert_nonnull(dev_directory);
}

int dev_tests_run(void)
{
    int ret = g_test_run();

    if (ret == 0) {
        g_autofree char *remove = g_strdup_printf("rm -rf %s", dev_directory);

        ret = dev_shell(remove);
    }
    g_free(dev_directory);
    return ret;
}

char *dev_path(const char *name)
{
    return g_build_filename(dev_directory, name, NULL);
}

uint32_t dev_seed(void)
{
    const char *env = g_getenv("BALE_SEED");
    uint32_t seed = env ? strtoul(env, NULL, 0) : g_random_int();

    g_test_message("BALE_SEED=%u", seed);
    return seed;
}

BaleDevice *dev_open(const char *path, unsigned flags)
{
    g_autoptr(GError) err = NULL;
    BaleDevice *dev = bale_device_aio_open(path, flags, &err);

    g_assert_no_error(err);
    g_assert_nonnull(dev);
    return dev;
}

BaleDeviceInfo dev_info(BaleDevice *dev)
{
    BaleDeviceInfo info;

    dev->ops->get_info(dev, &info);
    return info;
}

BaleDeviceStats dev_stats(BaleDevice *dev)
{
    BaleDeviceStats stats;

    dev->ops->get_stats(dev, &stats);
    return stats;
}

char *dev_backend(BaleDevice *dev)
{
    char *reply = NULL;

    g_assert_cmpint(dev->ops->command(dev, "backend", &reply), ==, 0);
    return reply;
}

void *dev_block(uint8_t fill, size_t len)
{
    void *buf = bale_memory_try_alloc(65536, len);

    g_assert_nonnull(buf);
    memset(buf, fill, len);
    return buf;
}

void dev_io_done(BaleDeviceIo *io, int ret)
{
    DevIo *counted = (DevIo *)io;

    counted->ret = ret;
    g_atomic_int_add(counted->left, -1);
}

void dev_wait(gint *left)
{
    while (g_atomic_int_get(left) > 0) {
        g_usleep(100);
    }
}

static int waited_for(BaleDevice *dev,
                      void (*submit)(BaleDevice *dev, BaleDeviceIo *io),
                      uint64_t offset, void *buf, size_t len)
{
    gint left = 1;
    DevIo counted = {
        .io = { offset, buf, len, dev_io_done, .may_block = dev_in_place },
        .left = &left,
    };

    submit(dev, &counted.io);
    dev_wait(&left);
    return counted.ret;
}

int dev_store(BaleDevice *dev, uint64_t offset, uint8_t fill, size_t len)
{
    BALE_AUTO_MEMORY void *buf = dev_block(fill, len);

    return waited_for(dev, dev->ops->store, offset, buf, len);
}

int dev_flush(BaleDevice *dev)
{
    return waited_for(dev, dev->ops->flush, 0, NULL, 0);
}

int dev_get(BaleDevice *dev, uint64_t offset, uint8_t fill, size_t len)
{
    BALE_AUTO_MEMORY uint8_t *buf = dev_block(0xee, len);
    int ret = bale_device_get_sync(dev, offset, buf, len);

    for (size_t i = 0; ret == 0 && i < len; i++) {
        g_assert_cmpint(buf[i], ==, fill);
    }
    return ret;
}

void dev_each_backend(DevBody *body)
{
    static const unsigned ways[] = { 0, BALE_DEVICE_BUFFERED };

    for (unsigned i = 0; i < 2 * G_N_ELEMENTS(ways); i++) {
        g_autofree char *path = dev_path("each");
        g_autoptr(BaleDevice) dev = dev_open(path, RW_NEW | ways[i / 2]);
        g_autofree char *backend = dev_backend(dev);

        dev_in_place = i % 2;
        g_test_message("%s%s", backend, dev_in_place ? ", in place" : "");
        body(dev);
        dev_in_place = false;
        g_unlink(path);
    }
}

void dev_round_trip(BaleDevice *dev)
{
    g_assert_cmpint(dev->ops->allocate(dev, 0, 16 * BLOCK), ==, 0);
    g_assert_cmpint(dev_info(dev).size, ==, 16 * BLOCK);
    g_assert_cmpint(dev_get(dev, 0, 0, 16 * BLOCK), ==, 0);
    g_assert_cmpint(dev_store(dev, 3 * BLOCK, 7, 2 * BLOCK), ==, 0);
    g_assert_cmpint(dev_get(dev, 3 * BLOCK, 7, 2 * BLOCK), ==, 0);
    g_assert_cmpint(dev_get(dev, 2 * BLOCK, 0, BLOCK), ==, 0);
    g_assert_cmpint(bale_device_flush_sync(dev), ==, 0);
}

void dev_work_in(const char *path, const char *backend_expected)
{
    g_autoptr(BaleDevice) dev = dev_open(path, RW_NEW);
    g_autofree char *backend = dev_backend(dev);

    g_assert_cmpstr(backend, ==, backend_expected);
    dev_round_trip(dev);
    g_assert_cmpint(dev_store(dev, 1 << 20, 1, 1 << 20), ==, 0);
    g_assert_cmpint(dev_get(dev, 1 << 20, 1, 1 << 20), ==, 0);
}

typedef struct Stress {
    BaleDevice *dev;
    uint64_t base;
    uint32_t seed;
    unsigned rounds;
} Stress;

enum { STRIPE = 256, STRESS_IOS = 12 };

typedef struct StressIo {
    DevIo counted; /* first */
    bool is_store;
    unsigned from, n;
} StressIo;

static gpointer stress_thread(gpointer opaque)
{
    Stress *stress = opaque;
    BaleDevice *dev = stress->dev;
    g_autoptr(GRand) rand = g_rand_new_with_seed(stress->seed);
    g_autofree uint8_t *flat = g_malloc0(STRIPE * BLOCK);
    BALE_AUTO_MEMORY uint8_t *bufs = dev_block(0, STRIPE * BLOCK);

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
            io->counted = (DevIo) {
                .io = { stress->base + io->from * BLOCK,
                        bufs + io->from * BLOCK, io->n * BLOCK,
                        dev_io_done },
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
        dev_wait(&left);
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

void dev_stress(BaleDevice *dev, uint32_t seed, unsigned rounds)
{
    Stress stresses[4];
    GThread *threads[4];

    g_assert_cmpint(dev->ops->allocate(dev, 0, 4 * STRIPE * BLOCK), ==, 0);
    g_assert_cmpint(dev_store(dev, 0, 0, 4 * STRIPE * BLOCK), ==, 0);
    for (unsigned i = 0; i < 4; i++) {
        stresses[i] = (Stress) {
            dev, (uint64_t)i * STRIPE * BLOCK, seed + i, rounds,
        };
        threads[i] = g_thread_new("stress", stress_thread, &stresses[i]);
    }
    for (unsigned i = 0; i < 4; i++) {
        g_thread_join(threads[i]);
    }
    g_assert_cmpint(dev_stats(dev).queue_depth, ==, 0);
}
