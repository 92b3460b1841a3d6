/*
 * What the devices of this directory share: counters, and the one place that
 * decides what a short transfer, EINTR or EAGAIN means.
 *
 * Threads: counters may be touched by any thread.  A BaleTransfer belongs to
 * whoever works on its request at the moment.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef BALE_BLOCK_EXTSTORE_DEVICE_INTERNAL_H
#define BALE_BLOCK_EXTSTORE_DEVICE_INTERNAL_H

#include <pthread.h>
#include <sys/types.h>

#include "extstore/device.h"
#include "util/histogram.h"

/* ---- counters --------------------------------------------------------- */

typedef enum BaleDeviceCall {
    BALE_DEVICE_GET,
    BALE_DEVICE_STORE,
    BALE_DEVICE_FLUSH,
    BALE_DEVICE_ALLOCATE,
    BALE_DEVICE_RELEASE,
    BALE_DEVICE_CALLS,
} BaleDeviceCall;

/* Zero-initialise; nothing to free. */
typedef struct BaleDeviceCounters {
    uint64_t calls[BALE_DEVICE_CALLS]; /* finished */
    uint64_t get_bytes, store_bytes;
    uint64_t errors, retries;
    uint64_t queue_depth;
    BaleHistogram get_ns, store_ns, flush_ns;
} BaleDeviceCounters;

/* A transfer or flush begins; returns the time for bale_device_count_end(). */
uint64_t bale_device_count_begin(BaleDeviceCounters *counters);

/* It ends: @len bytes of a get or store, with @ret. */
void bale_device_count_end(BaleDeviceCounters *counters, BaleDeviceCall call,
                           size_t len, uint64_t start_ns, int ret);

/* A blocking call (allocate, release) ended with @ret, which is returned. */
int bale_device_count_call(BaleDeviceCounters *counters, BaleDeviceCall call,
                           int ret);

void bale_device_count_retry(BaleDeviceCounters *counters);

/* The two vtable functions of a device that counts with the above. */
void bale_device_counters_get(const BaleDeviceCounters *counters,
                              BaleDeviceStats *stats);
void bale_device_counters_reset(BaleDeviceCounters *counters);

/* ---- transfers -------------------------------------------------------- */

/*
 * Attempts in a row that make no progress (EINTR, EAGAIN, nothing written)
 * before a transfer is given up with -EIO.
 */
#define BALE_TRANSFER_STALLS_MAX 64

/* How far a get or store has come.  Zero-initialise except @start_ns. */
typedef struct BaleTransfer {
    uint64_t start_ns;
    size_t done;      /* bytes */
    uint32_t stalls;  /* attempts in a row without progress */
    uint32_t tail;    /* bytes that the last read got of less than a block */
} BaleTransfer;

/*
 * An attempt to transfer the rest of @io, which starts at @transfer->done,
 * has ended with @res: bytes, or a negative errno.  @align is the unit in which
 * the next attempt may begin (1 where any will do).
 *
 * Returns true when the transfer is over; *@ret is then 0 or a negative errno,
 * and a read that met the end of the device is filled up with zeroes.  Returns
 * false if the rest, from @transfer->done, must be attempted again.
 */
bool bale_transfer_step(BaleTransfer *transfer, BaleDeviceIo *io, bool is_store,
                        uint32_t align, ssize_t res,
                        BaleDeviceCounters *counters, int *ret);

/*
 * Wait a little before the next attempt if several in a row have made no
 * progress: at most about 60 ms altogether before the transfer is given up.
 */
void bale_transfer_backoff(const BaleTransfer *transfer);

#endif
