/*
 * The gate before the device: how many small reads it is given at once.
 *
 * A small read is little work for a fast device, and much for who decompresses
 * a whole cluster for it.  Many of them on few cores tend to be at the device
 * all together and to come back all together: the decoders wait for the
 * device, then the device for the decoders.  So a closed gate gives the device
 * half of them, and the rest when these have come back and are decompressed.
 *
 * A device that takes long and many at once would only be slowed down by that.
 * Nobody tells us what the device is like, so both ways are tried, and the
 * gate stays closed only as long as that is seen to be the faster way, by some
 * percent.  Reads are counted in windows, and a window counts if the limit
 * matters in it.  Where a closed gate is found to be no better it is tried more
 * and more seldom, three windows in a thousand in the end.
 *
 * Invariants:
 *  1. If reads wait, then the device has some; each that leaves lets others in.
 *  2. Reads are let in in the order in which they came.
 *
 * Threads: any.  `lock` is a leaf, and not held when the device is called.  A
 * device that completes a read before it returns makes enter or leave call
 * themselves again, once for each read that waited at most.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "read-gate-internal.h"

/* Reads for each decoder that the device may always have. */
#define GATE_PER_DECODER 4u
/* Reads of a window, and those that must have met the limit. */
#define GATE_WINDOW 256u
#define GATE_PRESSED_MIN (GATE_WINDOW / 8)
/* Windows for which a closed gate is tried, at least. */
#define GATE_TRY_WINDOWS 3u
/* ... and after which an open one is looked at again, if it is the better. */
#define GATE_CLOSED_WINDOWS 64u
/* Windows until the next try; twice as many each time that it was no better. */
#define GATE_PAUSE_MIN 16u
#define GATE_PAUSE_MAX 1024u

void bale_read_gate_init(BaleReadGate *gate, BaleDevice *dev)
{
    *gate = (BaleReadGate){
        .dev = dev,
        .left = 1,
        .pause = GATE_PAUSE_MIN,
    };
    gate->last = &gate->first;
    pthread_mutex_init(&gate->lock, NULL);
}

void bale_read_gate_destroy(BaleReadGate *gate)
{
    g_assert(!gate->first && !gate->inside);
    pthread_mutex_destroy(&gate->lock);
}

/* How many reads a closed gate lets to the device; at least one. */
static uint64_t gate_limit(const BaleGateLoad *load)
{
    return MAX(GATE_PER_DECODER * MAX((uint64_t)load->decoders, 1),
               load->asked / 2);
}

/*
 * A window is over in which @rate reads a second were done.  Of each way the
 * highest rate seen lately counts: when callers or other programs get in
 * between, rates become lower.
 */
static void gate_judge_locked(BaleReadGate *gate, uint64_t rate)
{
    uint64_t *mine = gate->closed ? &gate->closed_rate : &gate->open_rate;

    *mine = MAX(rate, *mine - *mine / 8);
    if (--gate->left > 0) {
        return;
    }
    if (!gate->closed) {
        gate->closed = true;
        gate->closed_windows = 0;
        gate->left = GATE_TRY_WINDOWS;
    } else if (gate->closed_rate <= gate->open_rate + gate->open_rate / 16) {
        gate->closed = false;
        gate->left = gate->pause;
        gate->pause = MIN(gate->pause * 2, GATE_PAUSE_MAX);
    } else if (++gate->closed_windows == GATE_CLOSED_WINDOWS) {
        gate->closed = false;
        gate->left = 1;
        gate->pause = GATE_PAUSE_MIN;
    } else {
        gate->left = 1;
    }
}

static void gate_count_locked(BaleReadGate *gate, uint64_t now_ns)
{
    uint64_t ns = now_ns - gate->window_start_ns;

    if (++gate->window_reads < GATE_WINDOW) {
        return;
    }
    if (gate->window_pressed >= GATE_PRESSED_MIN && gate->window_start_ns) {
        gate_judge_locked(gate, GATE_WINDOW * 1000000000ull / MAX(ns, 1));
    }
    gate->window_start_ns = now_ns;
    gate->window_reads = gate->window_pressed = 0;
}

/* Let in who may.  Called with the lock, which is dropped. */
static void gate_admit_unlock(BaleReadGate *gate, const BaleGateLoad *load)
{
    uint64_t limit = gate_limit(load);
    BaleGateItem *item;

    while ((item = gate->first) && (!gate->closed || gate->inside < limit)) {
        gate->first = item->next;
        if (!gate->first) {
            gate->last = &gate->first;
        }
        gate->inside++;
        pthread_mutex_unlock(&gate->lock);
        gate->dev->ops->get(gate->dev, item->io);
        pthread_mutex_lock(&gate->lock);
    }
    g_assert(!gate->first || gate->inside);
    pthread_mutex_unlock(&gate->lock);
}

bool bale_read_gate_enter(BaleReadGate *gate, BaleGateItem *item,
                          BaleDeviceIo *io, const BaleGateLoad *load)
{
    bool pressed, held;

    *item = (BaleGateItem){ .io = io };
    pthread_mutex_lock(&gate->lock);
    pressed = gate->inside >= gate_limit(load);
    gate->window_pressed += pressed;
    held = pressed && gate->closed;
    *gate->last = item;
    gate->last = &item->next;
    gate_admit_unlock(gate, load);
    return held;
}

void bale_read_gate_leave(BaleReadGate *gate, const BaleGateLoad *load,
                          uint64_t now_ns)
{
    pthread_mutex_lock(&gate->lock);
    g_assert(gate->inside);
    gate->inside--;
    gate_count_locked(gate, now_ns);
    gate_admit_unlock(gate, load);
}

uint64_t bale_read_gate_width(BaleReadGate *gate, const BaleGateLoad *load)
{
    uint64_t width;

    pthread_mutex_lock(&gate->lock);
    width = gate->closed ? gate_limit(load) : 0;
    pthread_mutex_unlock(&gate->lock);
    return width;
}
