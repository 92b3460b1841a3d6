/*
 * Epochs: run an action once nobody can still see what it destroys
 *
 * Readers are counted, not registered.  There is a fixed number of slots, each
 * a cache line with three counters, one per epoch modulo three; a thread always
 * uses "its" slot, many threads may share one.  Hence no limit on threads and
 * nothing to clean up when one ends.
 *
 * Invariants:
 *   1. The epoch only grows, by one at a time.
 *   2. A reader is counted in phase E % 3 of its slot only if the epoch was E
 *      at some moment after it was counted.  (A reader that finds the epoch
 *      changed after counting itself takes the count back and tries again.)
 *   3. The epoch goes from E to E + 1 only after phase (E - 1) % 3 of every
 *      slot was seen to be zero, so readers inside have epoch E or E - 1 and
 *      three phases are enough.
 *   4. An action deferred at epoch E runs at epoch E + 2 or later.  By 3, all
 *      readers that entered at E or before are gone then; readers that entered
 *      later cannot see the object, because it was unlinked before the epoch
 *      was read.
 *   5. Pending actions are queued in the order of their epochs, and an action
 *      leaves the queue under the lock: it runs exactly once.
 *
 * Why 3 holds although the slots are read one after the other: a reader counts
 * itself and then reads the epoch, the advancing thread writes the epoch and
 * (one step later) reads the counts, all sequentially consistent.  If the
 * reader still saw E - 1, then its count came before the step to E, and the
 * scan that is made at E sees it.
 *
 * Threads: everything may be called by any thread.  The lock protects the
 * queue only and is never held while an action runs.  It is pthread's and not
 * GLib's, because ThreadSanitizer knows that one.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "util/epoch.h"

#include <assert.h>
#include <pthread.h>
#include <stdatomic.h>

#define EPOCH_SLOTS 64          /* a power of two */
#define EPOCH_PHASES 3
#define EPOCH_GRACE 2           /* epochs from deferring to running */

typedef struct EpochSlot {
    _Alignas(64) atomic_uint_fast64_t count[EPOCH_PHASES];
} EpochSlot;

_Static_assert(sizeof(EpochSlot) == 64, "a slot is one cache line");

typedef struct EpochAction EpochAction;

struct EpochAction {
    EpochAction *next;
    uint64_t epoch;
    BaleEpochFunc *fn;
    void *opaque;
};

struct BaleEpoch {
    /* Atomic. */
    atomic_uint_fast64_t epoch;
    atomic_uint_fast64_t pending;       /* in the queue */
    atomic_uint_fast64_t unfinished;    /* in the queue or running */
    atomic_uint_fast64_t executed;

    /* Under the lock. */
    pthread_mutex_t lock;
    EpochAction *head;
    EpochAction **tail;

    /* Never changed. */
    EpochSlot *slots;
    void *slots_memory;
};

/* The number of a thread, given out round robin so that slots fill evenly. */
static uint32_t thread_slot(void)
{
    static atomic_uint_fast32_t next_thread;
    static _Thread_local uint32_t slot = UINT32_MAX;

    if (G_UNLIKELY(slot == UINT32_MAX)) {
        slot = atomic_fetch_add_explicit(&next_thread, 1,
                                         memory_order_relaxed) % EPOCH_SLOTS;
    }
    return slot;
}

BaleEpoch *bale_epoch_new(void)
{
    BaleEpoch *e = g_new0(BaleEpoch, 1);
    uintptr_t aligned;

    e->slots_memory = g_malloc0((EPOCH_SLOTS + 1) * sizeof(EpochSlot));
    aligned = ((uintptr_t)e->slots_memory + 63) & ~(uintptr_t)63;
    e->slots = (EpochSlot *)aligned;
    /* Start above the grace period, so that "epoch - 1" is always a number. */
    atomic_init(&e->epoch, EPOCH_GRACE);
    e->tail = &e->head;
    pthread_mutex_init(&e->lock, NULL);
    return e;
}

void bale_epoch_free(BaleEpoch *e)
{
    if (!e) {
        return;
    }
    bale_epoch_drain(e);
    for (unsigned i = 0; i < EPOCH_SLOTS; i++) {
        for (unsigned p = 0; p < EPOCH_PHASES; p++) {
            assert(atomic_load(&e->slots[i].count[p]) == 0);
        }
    }
    pthread_mutex_destroy(&e->lock);
    g_free(e->slots_memory);
    g_free(e);
}

BaleEpochToken bale_epoch_enter(BaleEpoch *e)
{
    BaleEpochToken token = { .slot = thread_slot() };
    EpochSlot *slot = &e->slots[token.slot];
    uint64_t epoch = atomic_load(&e->epoch);

    for (;;) {
        uint64_t now;

        token.phase = epoch % EPOCH_PHASES;
        atomic_fetch_add(&slot->count[token.phase], 1);
        now = atomic_load(&e->epoch);
        if (G_LIKELY(now == epoch)) {
            return token;
        }
        atomic_fetch_sub(&slot->count[token.phase], 1);
        epoch = now;
    }
}

void bale_epoch_exit(BaleEpoch *e, BaleEpochToken token)
{
    uint64_t before;

    assert(token.slot < EPOCH_SLOTS && token.phase < EPOCH_PHASES);
    before = atomic_fetch_sub_explicit(&e->slots[token.slot]
                                           .count[token.phase],
                                       1, memory_order_release);
    assert(before > 0);
    (void)before;
}

void bale_epoch_defer(BaleEpoch *e, BaleEpochFunc *fn, void *opaque)
{
    EpochAction *action = g_new(EpochAction, 1);

    assert(fn);
    action->next = NULL;
    action->fn = fn;
    action->opaque = opaque;

    pthread_mutex_lock(&e->lock);
    /*
     * A read-modify-write rather than a load: the thread that advances the
     * epoch next reads this very write, so whoever enters after that also sees
     * that the object was unlinked, whatever memory order the caller used.
     */
    action->epoch = atomic_fetch_add(&e->epoch, 0);
    *e->tail = action;
    e->tail = &action->next;
    atomic_fetch_add(&e->unfinished, 1);
    atomic_fetch_add(&e->pending, 1);
    pthread_mutex_unlock(&e->lock);
}

/* One step of the epoch if nobody is left in the one before the current. */
static bool epoch_advance(BaleEpoch *e)
{
    uint64_t epoch = atomic_load(&e->epoch);
    unsigned phase = (epoch - 1) % EPOCH_PHASES;

    for (unsigned i = 0; i < EPOCH_SLOTS; i++) {
        if (atomic_load(&e->slots[i].count[phase]) != 0) {
            return false;
        }
    }
    return atomic_compare_exchange_strong(&e->epoch, &epoch, epoch + 1);
}

unsigned bale_epoch_poll(BaleEpoch *e)
{
    EpochAction *ready = NULL;
    EpochAction **last = &ready;
    uint64_t epoch;
    unsigned count = 0;

    if (atomic_load(&e->pending) == 0) {
        return 0;
    }
    for (unsigned i = 0; i < EPOCH_GRACE && epoch_advance(e); i++) {
        /* Two steps free what was deferred just now if nobody is inside. */
    }
    epoch = atomic_load(&e->epoch);

    pthread_mutex_lock(&e->lock);
    while (e->head && e->head->epoch + EPOCH_GRACE <= epoch) {
        EpochAction *action = e->head;

        assert(!action->next || action->next->epoch >= action->epoch);
        e->head = action->next;
        if (!e->head) {
            e->tail = &e->head;
        }
        action->next = NULL;
        *last = action;
        last = &action->next;
        count++;
    }
    atomic_fetch_sub(&e->pending, count);
    pthread_mutex_unlock(&e->lock);

    while (ready) {
        EpochAction *action = ready;

        ready = action->next;
        action->fn(action->opaque);
        g_free(action);
        atomic_fetch_add(&e->executed, 1);
        atomic_fetch_sub(&e->unfinished, 1);
    }
    return count;
}

void bale_epoch_drain(BaleEpoch *e)
{
    /*
     * What a running action defers is counted before that action counts as
     * finished, so this one number cannot miss anything.
     */
    while (atomic_load(&e->unfinished) != 0) {
        if (bale_epoch_poll(e) == 0) {
            g_thread_yield();
        }
    }
}

void bale_epoch_get_stats(BaleEpoch *e, BaleEpochStats *stats)
{
    uint64_t readers = 0, pending, unfinished;

    for (unsigned i = 0; i < EPOCH_SLOTS; i++) {
        for (unsigned p = 0; p < EPOCH_PHASES; p++) {
            readers += atomic_load(&e->slots[i].count[p]);
        }
    }
    pthread_mutex_lock(&e->lock);
    /* Under the lock nothing moves into or out of the queue. */
    unfinished = atomic_load(&e->unfinished);
    pending = atomic_load(&e->pending);
    *stats = (BaleEpochStats) {
        .epoch = atomic_load(&e->epoch),
        .readers = readers,
        .pending = pending,
        .running = unfinished - pending,
        .executed = atomic_load(&e->executed),
    };
    if (e->head) {
        stats->oldest_age = stats->epoch - e->head->epoch;
    }
    pthread_mutex_unlock(&e->lock);
}
