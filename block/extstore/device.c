/*
 * What is common to all devices: blocking forms, counters, and the handling of
 * transfers that end early.
 *
 * Threads: everything here may be called from any thread.  The blocking forms
 * wait for a completion, so they must not be called from the thread that
 * delivers it.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "extstore/device.h"

#include <errno.h>
#include <string.h>
#include <time.h>

#include "device-internal.h"

#include "util/planted.h"

/* ---- blocking forms --------------------------------------------------- */

/*
 * One blocking call.  It lives on the heap with two owners, the caller and the
 * completion: were it on the caller's stack, the caller could return and leave
 * while the completing thread is still inside pthread_mutex_unlock().
 */
typedef struct SyncCall {
    BaleDeviceIo io; /* first, so that a completion finds the call */
    pthread_mutex_t lock;
    pthread_cond_t cond;
    bool over;
    int ret;
    gint owners;
} SyncCall;

static void sync_call_release(SyncCall *call)
{
    if (g_atomic_int_dec_and_test(&call->owners)) {
        pthread_mutex_destroy(&call->lock);
        pthread_cond_destroy(&call->cond);
        g_free(call);
    }
}

static void sync_call_done(BaleDeviceIo *io, int ret)
{
    SyncCall *call = (SyncCall *)io;

    pthread_mutex_lock(&call->lock);
    g_assert(!call->over);
    call->over = true;
    call->ret = ret;
    pthread_cond_signal(&call->cond);
    pthread_mutex_unlock(&call->lock);
    sync_call_release(call);
}

static int sync_call(BaleDevice *dev,
                     void (*submit)(BaleDevice *dev, BaleDeviceIo *io),
                     uint64_t offset, void *buf, size_t len)
{
    SyncCall *call = g_try_new0(SyncCall, 1);
    int ret;

    if (!call) {
        return -ENOMEM;
    }
    pthread_mutex_init(&call->lock, NULL);
    pthread_cond_init(&call->cond, NULL);
    call->owners = 2;
    call->io.offset = offset;
    call->io.buf = buf;
    call->io.len = len;
    call->io.done = sync_call_done;
    submit(dev, &call->io);

    pthread_mutex_lock(&call->lock);
    while (!call->over) {
        pthread_cond_wait(&call->cond, &call->lock);
    }
    ret = call->ret;
    pthread_mutex_unlock(&call->lock);
    sync_call_release(call);
    return ret;
}

int bale_device_get_sync(BaleDevice *dev, uint64_t offset, void *buf,
                         size_t len)
{
    return sync_call(dev, dev->ops->get, offset, buf, len);
}

int bale_device_store_sync(BaleDevice *dev, uint64_t offset, const void *buf,
                           size_t len)
{
    /* A store only reads the buffer; the transfer type serves both ways. */
    return sync_call(dev, dev->ops->store, offset, (void *)buf, len);
}

int bale_device_flush_sync(BaleDevice *dev)
{
    return sync_call(dev, dev->ops->flush, 0, NULL, 0);
}

void bale_device_close(BaleDevice *dev)
{
    if (dev) {
        dev->ops->destroy(dev);
    }
}

/* ---- counters --------------------------------------------------------- */

static void count_add(uint64_t *counter, uint64_t n)
{
    __atomic_fetch_add(counter, n, __ATOMIC_RELAXED);
}

static uint64_t count_read(const uint64_t *counter)
{
    return __atomic_load_n(counter, __ATOMIC_RELAXED);
}

static uint64_t now_ns(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000 + (uint64_t)ts.tv_nsec;
}

uint64_t bale_device_count_begin(BaleDeviceCounters *counters)
{
    count_add(&counters->queue_depth, 1);
    return now_ns();
}

void bale_device_count_end(BaleDeviceCounters *counters, BaleDeviceCall call,
                           size_t len, uint64_t start_ns, int ret)
{
    uint64_t ns = now_ns() - start_ns;

    switch (call) {
    case BALE_DEVICE_GET:
        count_add(&counters->get_bytes, ret < 0 ? 0 : len);
        bale_histogram_add(&counters->get_ns, ns);
        break;
    case BALE_DEVICE_STORE:
        count_add(&counters->store_bytes, ret < 0 ? 0 : len);
        bale_histogram_add(&counters->store_ns, ns);
        break;
    case BALE_DEVICE_FLUSH:
        bale_histogram_add(&counters->flush_ns, ns);
        break;
    default:
        g_assert_not_reached();
    }
    count_add(&counters->queue_depth, (uint64_t)-1);
    bale_device_count_call(counters, call, ret);
}

int bale_device_count_call(BaleDeviceCounters *counters, BaleDeviceCall call,
                           int ret)
{
    count_add(&counters->calls[call], 1);
    if (ret < 0 && ret != -ENOTSUP) {
        count_add(&counters->errors, 1);
    }
    return ret;
}

void bale_device_count_retry(BaleDeviceCounters *counters)
{
    count_add(&counters->retries, 1);
}

static void histogram_copy(const BaleHistogram *hist, uint64_t *buckets)
{
    memset(buckets, 0, BALE_DEVICE_HIST_BUCKETS * sizeof(buckets[0]));
    for (unsigned i = 0; i < BALE_HISTOGRAM_BUCKETS; i++) {
        unsigned to = MIN(i, BALE_DEVICE_HIST_BUCKETS - 1);

        buckets[to] += bale_histogram_bucket(hist, i);
    }
}

void bale_device_counters_get(const BaleDeviceCounters *counters,
                              BaleDeviceStats *stats)
{
    *stats = (BaleDeviceStats) {
        .gets = count_read(&counters->calls[BALE_DEVICE_GET]),
        .stores = count_read(&counters->calls[BALE_DEVICE_STORE]),
        .flushes = count_read(&counters->calls[BALE_DEVICE_FLUSH]),
        .allocates = count_read(&counters->calls[BALE_DEVICE_ALLOCATE]),
        .releases = count_read(&counters->calls[BALE_DEVICE_RELEASE]),
        .get_bytes = count_read(&counters->get_bytes),
        .store_bytes = count_read(&counters->store_bytes),
        .errors = count_read(&counters->errors),
        .retries = count_read(&counters->retries),
        .queue_depth = count_read(&counters->queue_depth),
    };
    histogram_copy(&counters->get_ns, stats->get_ns);
    histogram_copy(&counters->store_ns, stats->store_ns);
    histogram_copy(&counters->flush_ns, stats->flush_ns);
}

void bale_device_counters_reset(BaleDeviceCounters *counters)
{
    /* The queue depth is a state, not a count: it stays. */
    for (unsigned i = 0; i < BALE_DEVICE_CALLS; i++) {
        __atomic_store_n(&counters->calls[i], 0, __ATOMIC_RELAXED);
    }
    __atomic_store_n(&counters->get_bytes, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&counters->store_bytes, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&counters->errors, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&counters->retries, 0, __ATOMIC_RELAXED);
    bale_histogram_reset(&counters->get_ns);
    bale_histogram_reset(&counters->store_ns);
    bale_histogram_reset(&counters->flush_ns);
}

/* ---- transfers -------------------------------------------------------- */

static bool transfer_stalled(BaleTransfer *transfer,
                             BaleDeviceCounters *counters, int *ret)
{
    transfer->stalls++;
    if (transfer->stalls >= BALE_TRANSFER_STALLS_MAX) {
        *ret = -EIO;
        return true;
    }
    bale_device_count_retry(counters);
    return false;
}

static bool transfer_ends_in_zeroes(BaleTransfer *transfer, BaleDeviceIo *io,
                                    size_t valid, int *ret)
{
    memset((uint8_t *)io->buf + valid, 0, io->len - valid);
    transfer->done = io->len;
    *ret = 0;
    return true;
}

bool bale_transfer_step(BaleTransfer *transfer, BaleDeviceIo *io, bool is_store,
                        uint32_t align, ssize_t res,
                        BaleDeviceCounters *counters, int *ret)
{
    size_t got, whole;

    if (res == -EINTR || res == -EAGAIN) {
        return transfer_stalled(transfer, counters, ret);
    }
    if (res < 0) {
        *ret = (int)res;
        return true;
    }

    got = (size_t)res;
    g_assert(got <= io->len - transfer->done);
    if (BALE_PLANTED(short_write_ignored) && is_store) {
        transfer->done += got;
        *ret = 0;
        return true;
    }
    if (transfer->done + got == io->len) {
        transfer->done = io->len;
        *ret = 0;
        return true;
    }
    if (got == 0 && !is_store) {
        return transfer_ends_in_zeroes(transfer, io, transfer->done, ret);
    }

    /*
     * Go on at a boundary where another attempt is legal.  A direct read that
     * ends inside a block has most likely met the end of the file, but only
     * one that ends at the same place again has certainly done so.
     */
    whole = got - got % align;
    if (whole == 0) {
        if (!is_store && transfer->tail == got) {
            return transfer_ends_in_zeroes(transfer, io, transfer->done + got,
                                           ret);
        }
        transfer->tail = (uint32_t)got;
        return transfer_stalled(transfer, counters, ret);
    }
    transfer->done += whole;
    transfer->stalls = 0;
    transfer->tail = 0;
    bale_device_count_retry(counters);
    return false;
}

void bale_transfer_backoff(const BaleTransfer *transfer)
{
    /* The first few attempts cost nothing: EINTR is gone at once. */
    if (transfer->stalls > 4) {
        g_usleep(1000);
    }
}
