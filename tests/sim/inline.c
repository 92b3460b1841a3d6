/*
 * The engine's work, done by whoever waits for it.
 *
 * A store of the simulator has one worker and one caller, who waits for each
 * request.  Handing an item to a thread and back costs more than the item, and
 * a state needs dozens of them.  So the linker puts these functions before
 * those of util/workers.c (see `wraps`): a pool of one thread has no thread,
 * and a thread that waits for a condition works through the queue first, then
 * looks again, as after any spurious wakeup.
 *
 * Invariants:
 *  1. An item runs while no other one does, as with one worker: it is never
 *     taken by a thread that is in an item already.
 *  2. Only the thread that made a pool runs its items: the maintenance thread
 *     may not wait for one.
 *  3. No item is run by a thread that holds a read-write lock (session_lock),
 *     which items want, too.  Nobody waits for an item with that lock held.
 *
 * Pools of more threads are real ones.  inline_enabled is off under
 * ThreadSanitizer, whose business is threads, and for some cases everywhere.
 *
 * Threads: any.  Errors: none.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "inline.h"

#include <time.h>

#include "util/workers.h"

/* How long to wait before the queue is looked at again. */
#define WAIT_NS 500000
#define POOLS_MAX 8

typedef struct Pool {
    bool busy;
    pthread_t owner;
    BaleWork *head[BALE_WORK__PRIORITIES], **tail[BALE_WORK__PRIORITIES];
    uint64_t executed;
    void *context;
    BaleWorkerContextFree *context_free;
} Pool;

#if defined(__SANITIZE_THREAD__)
bool inline_enabled;
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
bool inline_enabled;
#else
bool inline_enabled = true;
#endif
#else
bool inline_enabled = true;
#endif

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Pool *pools[POOLS_MAX];       /* under lock */
static gint pool_count;              /* atomic */
static __thread unsigned items;      /* this thread is in so many */
static __thread unsigned rwlocks;    /* and holds so many */

/* An inline pool's address is odd, so that it is told from a real one. */
static Pool *pool_of(BaleWorkers *workers)
{
    uintptr_t address = (uintptr_t)workers;

    return address & 1 ? (Pool *)(address - 1) : NULL;
}

/* Run one item of @pool, which is not busy; called and returns with lock. */
static bool pool_run(Pool *pool)
{
    BaleWork *work = NULL;

    for (int i = 0; i < BALE_WORK__PRIORITIES && !work; i++) {
        work = pool->head[i];
        if (work) {
            pool->head[i] = work->next;
            if (!work->next) {
                pool->tail[i] = &pool->head[i];
            }
            work->next = NULL;
        }
    }
    if (!work) {
        return false;
    }
    pool->busy = true;
    pthread_mutex_unlock(&lock);
    items++;
    work->fn(work, pool->context, 0);
    items--;
    pthread_mutex_lock(&lock);
    pool->busy = false;
    pool->executed++;
    return true;
}

/* All there is in this thread's pools; was there anything? */
static bool work_through(void)
{
    bool any = false, again = true;

    pthread_mutex_lock(&lock);
    while (again) {
        again = false;
        for (int i = 0; i < POOLS_MAX; i++) {
            while (pools[i] && !pools[i]->busy &&
                   pthread_equal(pools[i]->owner, pthread_self()) &&
                   pool_run(pools[i])) {
                any = again = true;
            }
        }
    }
    pthread_mutex_unlock(&lock);
    return any;
}

/* Threads without a pool, such as the maintenance thread, wait as ever. */
static bool has_pool(void)
{
    bool any = false;

    pthread_mutex_lock(&lock);
    for (int i = 0; i < POOLS_MAX; i++) {
        any |= pools[i] && pthread_equal(pools[i]->owner, pthread_self());
    }
    pthread_mutex_unlock(&lock);
    return any;
}

/* --- waiting --- */

int __wrap_pthread_cond_wait(pthread_cond_t *cond, pthread_mutex_t *mutex)
{
    struct timespec until;

    if (!g_atomic_int_get(&pool_count) || items || rwlocks || !has_pool()) {
        return __real_pthread_cond_wait(cond, mutex);
    }
    pthread_mutex_unlock(mutex);
    if (work_through()) {
        pthread_mutex_lock(mutex);
        return 0;
    }
    /* Another thread's turn, which may push work without waking us. */
    pthread_mutex_lock(mutex);
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += WAIT_NS;
    if (until.tv_nsec >= 1000000000) {
        until.tv_nsec -= 1000000000;
        until.tv_sec++;
    }
    /* Whatever clock the condition was made for. */
    pthread_cond_clockwait(cond, mutex, CLOCK_MONOTONIC, &until);
    return 0;
}

int __wrap_pthread_rwlock_rdlock(pthread_rwlock_t *rwlock)
{
    int ret = __real_pthread_rwlock_rdlock(rwlock);

    rwlocks += ret == 0;
    return ret;
}

int __wrap_pthread_rwlock_tryrdlock(pthread_rwlock_t *rwlock)
{
    int ret = __real_pthread_rwlock_tryrdlock(rwlock);

    rwlocks += ret == 0;
    return ret;
}

int __wrap_pthread_rwlock_wrlock(pthread_rwlock_t *rwlock)
{
    int ret = __real_pthread_rwlock_wrlock(rwlock);

    rwlocks += ret == 0;
    return ret;
}

int __wrap_pthread_rwlock_unlock(pthread_rwlock_t *rwlock)
{
    rwlocks--;
    return __real_pthread_rwlock_unlock(rwlock);
}

/* --- util/workers.h --- */

BaleWorkers *__wrap_bale_workers_new(const char *name, unsigned threads,
                                     BaleWorkerContextNew *context_new,
                                     BaleWorkerContextFree *context_free,
                                     void *opaque, GError **errp)
{
    GError *err = NULL;
    Pool *pool;
    int i = 0;

    if (threads != 1 || !inline_enabled) {
        return __real_bale_workers_new(name, threads, context_new,
                                       context_free, opaque, errp);
    }
    pool = g_new0(Pool, 1);
    pool->owner = pthread_self();
    for (int p = 0; p < BALE_WORK__PRIORITIES; p++) {
        pool->tail[p] = &pool->head[p];
    }
    pool->context = context_new ? context_new(opaque, 0, &err) : NULL;
    pool->context_free = context_free;
    if (err) {
        g_propagate_error(errp, err);
        g_free(pool);
        return NULL;
    }
    pthread_mutex_lock(&lock);
    while (pools[i]) {
        g_assert(++i < POOLS_MAX);
    }
    pools[i] = pool;
    g_atomic_int_inc(&pool_count);
    pthread_mutex_unlock(&lock);
    return (BaleWorkers *)((uintptr_t)pool + 1);
}

void __wrap_bale_workers_push(BaleWorkers *workers, BaleWork *work,
                              BaleWorkPriority priority)
{
    Pool *pool = pool_of(workers);

    if (!pool) {
        __real_bale_workers_push(workers, work, priority);
        return;
    }
    pthread_mutex_lock(&lock);
    work->next = NULL;
    *pool->tail[priority] = work;
    pool->tail[priority] = &work->next;
    pthread_mutex_unlock(&lock);
}

void __wrap_bale_workers_drain(BaleWorkers *workers)
{
    Pool *pool = pool_of(workers);

    if (!pool) {
        __real_bale_workers_drain(workers);
        return;
    }
    pthread_mutex_lock(&lock);
    for (;;) {
        bool busy = pool->busy;

        if (!busy && !pool_run(pool)) {
            break;
        }
        if (busy) {
            pthread_mutex_unlock(&lock);
            g_usleep(WAIT_NS / 1000);
            pthread_mutex_lock(&lock);
        }
    }
    pthread_mutex_unlock(&lock);
}

void __wrap_bale_workers_free(BaleWorkers *workers)
{
    Pool *pool = pool_of(workers);

    if (!pool) {
        __real_bale_workers_free(workers);
        return;
    }
    __wrap_bale_workers_drain(workers);
    pthread_mutex_lock(&lock);
    for (int i = 0; i < POOLS_MAX; i++) {
        if (pools[i] == pool) {
            pools[i] = NULL;
            g_atomic_int_dec_and_test(&pool_count);
        }
    }
    pthread_mutex_unlock(&lock);
    if (pool->context_free) {
        pool->context_free(pool->context);
    }
    g_free(pool);
}

void __wrap_bale_workers_get_stats(BaleWorkers *workers,
                                   BaleWorkersStats *stats)
{
    Pool *pool = pool_of(workers);

    if (!pool) {
        __real_bale_workers_get_stats(workers, stats);
        return;
    }
    pthread_mutex_lock(&lock);
    *stats = (BaleWorkersStats) {
        .threads = 1,
        .running = pool->busy,
        .executed = pool->executed,
    };
    for (int i = 0; i < BALE_WORK__PRIORITIES; i++) {
        for (BaleWork *work = pool->head[i]; work; work = work->next) {
            stats->queued[i]++;
        }
    }
    pthread_mutex_unlock(&lock);
}

/* Who made the pool runs its items. */
bool __wrap_bale_workers_help(BaleWorkers *workers, BaleWorkPriority priority,
                              BaleWorkFunc *fn, void *context)
{
    return !pool_of(workers) &&
           __real_bale_workers_help(workers, priority, fn, context);
}

/* Time stands still here: nothing is held back. */
void __wrap_bale_workers_hold(BaleWorkers *workers, int64_t us)
{
    if (!pool_of(workers)) {
        __real_bale_workers_hold(workers, us);
    }
}

unsigned __wrap_bale_workers_threads(BaleWorkers *workers)
{
    return pool_of(workers)
               ? 1
               : __real_bale_workers_threads(workers);
}
