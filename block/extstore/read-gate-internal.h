/*
 * The gate before the device: how many small reads it is given at once.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef BALE_EXTSTORE_READ_GATE_INTERNAL_H
#define BALE_EXTSTORE_READ_GATE_INTERNAL_H

#include <pthread.h>

#include "extstore/device.h"

/* One read, from _enter() to _leave(). */
typedef struct BaleGateItem {
    BaleDeviceIo *io;
    struct BaleGateItem *next; /* of those that wait */
} BaleGateItem;

typedef struct BaleReadGate {
    BaleDevice *dev; /* never changed after _init() */

    pthread_mutex_t lock;
    /* Under the lock. */
    BaleGateItem *first, **last; /* those that wait, in order */
    uint64_t inside;             /* reads that the device has */
    bool closed;                 /* there is a limit */
    /* How it came to be so, and for how long. */
    uint64_t open_rate, closed_rate; /* reads a second */
    unsigned left;               /* windows until the next decision */
    unsigned pause;              /* windows to be open for, next time */
    unsigned closed_windows;     /* since it was closed and proved better */
    /* Of the window that is being counted. */
    uint64_t window_start_ns;
    unsigned window_reads, window_pressed;
} BaleReadGate;

/* What the limit depends on, as it is now. */
typedef struct BaleGateLoad {
    unsigned decoders; /* threads */
    uint64_t asked;    /* reads that callers wait for, wherever they are */
} BaleGateLoad;

void bale_read_gate_init(BaleReadGate *gate, BaleDevice *dev);
void bale_read_gate_destroy(BaleReadGate *gate);

/*
 * Give @io, which is complete but for the device's own part, to the device,
 * now or when others have left.  Both are the gate's until @io is done.  The
 * gate is used after that: so the caller of this and of _leave() is a worker,
 * or has a request under way that keeps the store.  True: it had to wait.
 */
bool bale_read_gate_enter(BaleReadGate *gate, BaleGateItem *item,
                          BaleDeviceIo *io, const BaleGateLoad *load);

/* The io of a read that had entered is done; called by its completion. */
void bale_read_gate_leave(BaleReadGate *gate, const BaleGateLoad *load,
                          uint64_t now_ns);

/* How many reads the device may have at once, now; 0: there is no limit. */
uint64_t bale_read_gate_width(BaleReadGate *gate, const BaleGateLoad *load);

#endif
