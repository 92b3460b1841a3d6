/*
 * The aio device through faults of the kernel, on files.
 *
 * This program links the devices compiled with -DBALE_FAULT_HOOKS.
 * BALE_SEED=<number> repeats a random run.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "devices.h"

#include <errno.h>

#include "../../block/extstore/device-file-internal.h"

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
        int ret = dev_store(dev, i * 8 * BLOCK, (uint8_t)(i + 1), 8 * BLOCK);

        if (ret == 0) {
            ret = dev_get(dev, i * 8 * BLOCK, (uint8_t)(i + 1), 8 * BLOCK);
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
                uint64_t before = dev_stats(dev).retries;

                g_assert_cmpint(failures_through(dev, &fault, 0), ==, 0);
                if (nth <= 8) {
                    g_assert_cmpint(fault.hits, ==, 1);
                    g_assert_cmpint(dev_stats(dev).retries, ==, before + 1);
                }
            }
        }
    }
}

static void test_interruptions_are_hidden(void)
{
    dev_each_backend(body_interruptions);
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
    dev_each_backend(body_errors);
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
    dev_each_backend(body_halves);
}

static void body_stall(BaleDevice *dev)
{
    Fault fault = { BALE_FAULT_WRITE, 1, true, -EAGAIN };

    bale_fault_hook_set(inject, &fault);
    g_assert_cmpint(dev_store(dev, 0, 1, BLOCK), ==, -EIO);
    fault.res = 0;
    g_assert_cmpint(dev_store(dev, 0, 1, BLOCK), ==, -EIO);
    bale_fault_hook_set(NULL, NULL);
    g_assert_cmpint(dev_store(dev, 0, 1, BLOCK), ==, 0);
}

static void test_endless_interruption_ends_in_eio(void)
{
    dev_each_backend(body_stall);
}

static void body_failed_flush(BaleDevice *dev)
{
    Fault fault = { BALE_FAULT_SYNC, 2, false, -EIO };

    bale_fault_hook_set(inject, &fault);
    g_assert_cmpint(dev_flush(dev), ==, 0);
    g_assert_cmpint(dev_store(dev, 0, 1, BLOCK), ==, 0);
    g_assert_cmpint(dev_flush(dev), ==, -EIO);
    bale_fault_hook_set(NULL, NULL);
    /* The kernel would say yes now; we know better. */
    g_assert_cmpint(dev_flush(dev), ==, -EIO);
    g_assert_cmpint(fault.nth, ==, 0);
    g_assert_cmpint(dev_get(dev, 0, 1, BLOCK), ==, 0);
}

static void test_failed_flush_is_never_retried(void)
{
    dev_each_backend(body_failed_flush);
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

    dev_in_place = f->number % 2;
    for (unsigned i = 0; i < FLUSHES; i++) {
        int ret;

        g_assert_cmpint(dev_store(f->dev, f->number * BLOCK, i, BLOCK), ==, 0);
        ret = dev_flush(f->dev);
        g_assert_true(ret == -EIO || (ret == 0 && !f->failed));
        f->failed = ret < 0;
    }
    return NULL;
}

/* Those that flush themselves and those that let flush, beside each other. */
static void flushers(bool fail)
{
    g_autofree char *path = dev_path("flushers");
    g_autoptr(BaleDevice) dev = dev_open(path, RW_NEW);
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
        g_assert_cmpint(dev_get(dev, i * BLOCK, FLUSHES - 1, BLOCK), ==, 0);
    }
    bale_fault_hook_set(NULL, NULL);
    g_assert_cmpint(dev_flush(dev), ==, fail ? -EIO : 0);
}

static void test_flushes_in_place_and_not(void)
{
    flushers(false);
    flushers(true);
}

static void test_interrupted_flush_is_a_failed_flush(void)
{
    g_autofree char *path = dev_path("flush-eintr");
    g_autoptr(BaleDevice) dev = dev_open(path, RW_NEW);
    Fault fault = { BALE_FAULT_SYNC, 1, false, -EINTR };

    bale_fault_hook_set(inject, &fault);
    g_assert_cmpint(dev_flush(dev), ==, -EIO);
    bale_fault_hook_set(NULL, NULL);
    g_assert_cmpint(fault.nth, ==, 0);
}

static void submit_fault(ssize_t res, bool sticky, int expected)
{
    g_autofree char *path = dev_path("submit");
    g_autoptr(BaleDevice) dev = dev_open(path, RW_NEW);
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
    g_autofree char *path = dev_path("dead");
    g_autoptr(BaleDevice) dev = dev_open(path, RW_NEW);
    Fault fault = { BALE_FAULT_SUBMIT, 1, true, -EAGAIN };

    bale_fault_hook_set(inject, &fault);
    g_assert_cmpint(dev_store(dev, 0, 1, BLOCK), ==, -EIO);
    bale_fault_hook_set(NULL, NULL);
    g_assert_cmpint(dev_store(dev, 0, 1, BLOCK), ==, 0);
}

static void test_without_libaio_threads_do_it(void)
{
    g_autofree char *path = dev_path("no-libaio");
    Fault fault = { BALE_FAULT_SETUP, 1, false, -EAGAIN };

    bale_fault_hook_set(inject, &fault);
    dev_work_in(path, "threads, O_DIRECT");
    bale_fault_hook_set(NULL, NULL);
}

static void test_direct_io_refused_only_in_transfers(void)
{
    g_autofree char *path = dev_path("no-direct");
    Fault fault = { BALE_FAULT_DIRECT, 1, true, -EINVAL };

    dev_warnings = 0;
    bale_fault_hook_set(inject, &fault);
    dev_work_in(path, "threads, page cache");
    bale_fault_hook_set(NULL, NULL);
    g_assert_cmpint(dev_warnings, ==, 1);
}

/* A file system that wants larger blocks than 4096 gets them. */
static void test_larger_direct_io_unit_is_found(void)
{
    g_autofree char *path = dev_path("large-unit");
    Fault fault = { BALE_FAULT_DIRECT, 1, false, -EINVAL };

    bale_fault_hook_set(inject, &fault);
    g_autoptr(BaleDevice) dev = dev_open(path, RW_NEW);
    bale_fault_hook_set(NULL, NULL);
    g_assert_cmpint(dev_info(dev).block_size, ==, 8192);
    g_assert_cmpint(dev_store(dev, 8192, 1, 8192), ==, 0);
    g_assert_cmpint(dev_get(dev, 8192, 1, 8192), ==, 0);
}

static void test_failed_space_calls_change_nothing(void)
{
    g_autofree char *path = dev_path("space-faults");
    g_autoptr(BaleDevice) dev = dev_open(path, RW_NEW);
    Fault fault = { BALE_FAULT_ALLOCATE, 1, false, -ENOSPC };

    g_assert_cmpint(dev_store(dev, 0, 1, 4 * BLOCK), ==, 0);
    bale_fault_hook_set(inject, &fault);
    g_assert_cmpint(dev->ops->allocate(dev, 0, 1 << 20), ==, -ENOSPC);
    g_assert_cmpint(dev_info(dev).size, ==, 4 * BLOCK);

    /* Without fallocate the file becomes sparse. */
    fault = (Fault) { BALE_FAULT_ALLOCATE, 1, false, -EOPNOTSUPP };
    g_assert_cmpint(dev->ops->allocate(dev, 0, 1 << 20), ==, 0);
    g_assert_cmpint(dev_info(dev).size, ==, 1 << 20);

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
    uint32_t seed = dev_seed();

    bale_fault_hook_set(inject_randomly, &dice);
    dev_stress(dev, seed, 30);
    bale_fault_hook_set(NULL, NULL);
    g_assert_cmpint(dev_stats(dev).retries, >, 50);
}

static void test_random_stress_with_interruptions(void)
{
    dev_each_backend(body_stress_with_interruptions);
}

int main(int argc, char **argv)
{
    dev_tests_init(&argc, &argv);
#define TEST(name) g_test_add_func("/device-faults/" #name, test_##name)
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
    return dev_tests_run();
}
