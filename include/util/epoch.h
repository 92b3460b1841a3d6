/*
 * Epochs: run an action once nobody can still see what it destroys
 *
 * A reader enters the epoch, follows pointers that another thread may be
 * replacing, and exits.  Whoever replaces an object first unlinks it (so that
 * nobody who enters later finds it) and then defers its destruction.  The
 * deferred action runs when every reader that was inside at that moment has
 * left.
 *
 * There is nothing to register: any thread may enter, threads may come and go,
 * there is no limit on their number, and an entry may be exited by another
 * thread than the one that made it.
 *
 * An entry must be short.  Never hold one across I/O, a coroutine yield or a
 * wait for something that needs an action to run: all actions of this epoch
 * wait for the slowest reader.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef BALE_UTIL_EPOCH_H
#define BALE_UTIL_EPOCH_H

#include <glib.h>
#include <stdbool.h>
#include <stdint.h>

typedef struct BaleEpoch BaleEpoch;

/* Proof of one entry; pass it unchanged to bale_epoch_exit(). */
typedef struct BaleEpochToken {
    uint32_t slot;
    uint32_t phase;
} BaleEpochToken;

/* A deferred action.  It may defer further actions, and enter the epoch. */
typedef void BaleEpochFunc(void *opaque);

typedef struct BaleEpochStats {
    uint64_t epoch;         /* the current epoch; it only grows */
    uint64_t readers;       /* entries not exited yet (fuzzy while running) */
    uint64_t pending;       /* actions deferred and not begun */
    uint64_t running;       /* actions begun and not finished */
    uint64_t executed;      /* actions finished since the creation */
    uint64_t oldest_age;    /* epochs since the oldest pending action came */
} BaleEpochStats;

/* Never NULL: like all small GLib allocations, no memory is fatal. */
BaleEpoch *bale_epoch_new(void);

/*
 * Runs what is pending, then frees @e, which may be NULL.  No reader may be
 * inside and no other thread may use @e any more.
 */
void bale_epoch_free(BaleEpoch *e);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(BaleEpoch, bale_epoch_free)

/*
 * Enter: what is reachable now and retired through @e stays valid until the
 * matching bale_epoch_exit().  Entries nest freely; each costs two atomic
 * additions.  Never blocks.
 */
BaleEpochToken bale_epoch_enter(BaleEpoch *e);
void bale_epoch_exit(BaleEpoch *e, BaleEpochToken token);

/*
 * Have @fn(@opaque) run exactly once, in some thread that calls
 * bale_epoch_poll() or bale_epoch_drain(), after every entry made before this
 * call has been exited.  The object must be unlinked already.  May be called
 * inside an entry.  Never runs anything itself, so it is safe under any lock.
 */
void bale_epoch_defer(BaleEpoch *e, BaleEpochFunc *fn, void *opaque);

/*
 * Advance the epoch if the readers allow it and run what has become safe, in
 * this thread.  Returns the number of actions run.  Never blocks on readers.
 * The owner of @e has to call this now and then, outside of its locks; nobody
 * else does.  Costs one load when nothing is pending.
 */
unsigned bale_epoch_poll(BaleEpoch *e);

/*
 * Poll until nothing is pending or running, for shutdown.  Blocks while
 * readers are inside: never call it inside an entry or from an action.
 */
void bale_epoch_drain(BaleEpoch *e);

void bale_epoch_get_stats(BaleEpoch *e, BaleEpochStats *stats);

#endif
