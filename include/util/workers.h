/*
 * A pool of worker threads with three first-in-first-out queues.
 *
 * The caller embeds a BaleWork in its own structure and pushes it; a worker
 * calls its function once.  Nothing is allocated on the way.  Urgent work is
 * taken before normal work, and that before bulk work, which can be held back
 * for a while; in each queue work starts in the order in which it was pushed
 * (it may of course finish in another one).
 *
 * The pool does not bound its queues: whoever pushes owns the items, and so
 * the bound (of clusters in flight, say) lies with the pusher.
 *
 * Threads: every function may be called from any thread, except that _drain,
 * _set_threads and _free must not be called from a worker of the same pool, and
 * that nothing else may run in parallel with _free.  What the pusher wrote
 * before the push is visible to the function.  Workers block all signals.
 *
 * fork(2): the threads start in bale_workers_new() and _set_threads, and do not
 * survive a fork, so make a pool after a program has forked.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef BALE_UTIL_WORKERS_H
#define BALE_UTIL_WORKERS_H

#include <glib.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* The most threads that a pool can have. */
#define BALE_WORKERS_MAX 256
/* The longest that bulk work is held back by one call, in microseconds. */
#define BALE_WORK_HOLD_MAX_US 100000

typedef struct BaleWorkers BaleWorkers;
typedef struct BaleWork BaleWork;

/*
 * @context is what the pool's constructor made for the calling worker, or
 * NULL when there is none.  @worker is the worker's index, from 0.  When the
 * function is called the pool has forgotten @work: the function may free it,
 * or push it again.
 */
typedef void BaleWorkFunc(BaleWork *work, void *context, unsigned worker);

/* Set @fn before the push; @next belongs to the pool until @fn is called. */
struct BaleWork {
    BaleWorkFunc *fn;
    BaleWork *next;
};

typedef enum BaleWorkPriority {
    /* Somebody waits for it: a read. */
    BALE_WORK_URGENT = 0,
    BALE_WORK_NORMAL = 1,
    /* bale_workers_hold() may make it wait. */
    BALE_WORK_BULK = 2,

    BALE_WORK__PRIORITIES
} BaleWorkPriority;

/*
 * Makes the context of worker @worker.  Called in the thread that calls
 * bale_workers_new() or _set_threads, before that worker's thread exists.  On
 * error return NULL and set
 * @errp; NULL without an error is a context like any other.
 */
typedef void *BaleWorkerContextNew(void *opaque, unsigned worker,
                                   GError **errp);

/* Called once for each context, from _free or _set_threads, after the worker's
 * thread has ended. */
typedef void BaleWorkerContextFree(void *context);

typedef struct BaleWorkersStats {
    unsigned threads;
    /* Pushed and not yet taken by a worker, per priority. */
    uint64_t queued[BALE_WORK__PRIORITIES];
    /* Functions that a worker is in at this moment. */
    uint64_t running;
    /* Functions that returned, since the pool was made. */
    uint64_t executed;
    /* How often a push had to wake a sleeping worker. */
    uint64_t wakeups;
} BaleWorkersStats;

/* How many cores this process may run on, at least 1. */
unsigned bale_workers_online_cores(void);

/*
 * Make a pool of @threads threads, at most BALE_WORKERS_MAX; 0 stands for
 * bale_workers_online_cores().  The threads are called "@name-0" and so on;
 * @name is copied and cut so that this fits the kernel's 15 bytes.
 *
 * @context_new and @context_free may both be NULL.  @opaque is borrowed until
 * the last _set_threads.
 *
 * Returns NULL with @errp set when a thread cannot be made or a constructor
 * fails; nothing is left behind then.
 */
BaleWorkers *bale_workers_new(const char *name, unsigned threads,
                              BaleWorkerContextNew *context_new,
                              BaleWorkerContextFree *context_free,
                              void *opaque, GError **errp);

/*
 * Change the number of threads; as in bale_workers_new().  More of them run at
 * once; those that are too many end when they have finished what they do now,
 * and nobody waits for that.  On error the number stays what it was.
 */
bool bale_workers_set_threads(BaleWorkers *pool, unsigned threads,
                              GError **errp);

/*
 * Queue @work, which must not be in a queue already.  Never blocks on
 * anything but a short mutex, never fails.
 */
void bale_workers_push(BaleWorkers *pool, BaleWork *work,
                       BaleWorkPriority priority);

/*
 * For a thread that workers may be waiting for: run the first item queued with
 * @priority whose function is @fn, with @context, here.  Its index of a worker
 * is BALE_WORKERS_MAX.  False: there is none.
 */
bool bale_workers_help(BaleWorkers *pool, BaleWorkPriority priority,
                       BaleWorkFunc *fn, void *context);

/*
 * Begin no bulk work in the next @us microseconds, at most
 * BALE_WORK_HOLD_MAX_US, unless somebody drains; 0: let go.  Each call replaces
 * the one before.  It ends by itself, so nobody can be kept back for ever.
 */
void bale_workers_hold(BaleWorkers *pool, int64_t us);

/*
 * Wait until no work is queued and no function is running.  Work that other
 * threads, or the functions themselves, push meanwhile is waited for too.
 */
void bale_workers_drain(BaleWorkers *pool);

/* Drain, end and join the threads, free the contexts.  NULL is allowed. */
void bale_workers_free(BaleWorkers *pool);

G_DEFINE_AUTOPTR_CLEANUP_FUNC(BaleWorkers, bale_workers_free)

/* A snapshot; the numbers belong together. */
void bale_workers_get_stats(BaleWorkers *pool, BaleWorkersStats *stats);

/* The number of threads, without those that are leaving. */
unsigned bale_workers_threads(BaleWorkers *pool);

#endif
