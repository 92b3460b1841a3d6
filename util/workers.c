/*
 * A pool of worker threads with three first-in-first-out queues.
 *
 * One mutex covers the queues: an item is a whole cluster to compress, so a
 * worker takes it a few thousand times a second at most.  What would cost is
 * waking threads, and therefore each worker sleeps on a condition of its own.
 * A push wakes one sleeper at most, the one that fell asleep last (its caches
 * are the warmest), and nobody when all are busy.
 *
 * Invariants, under the mutex:
 *  1. A worker in the idle stack waits for its semaphore; whoever takes it off
 *     the stack posts that, once, or is the worker itself.
 *  2. While anything is queued, the stack is empty or somebody is woken for
 *     it: a woken worker looks at the queues before it may sleep again, and one
 *     that leaves wakes another.  While bulk work is all that is queued, and
 *     held back, a worker in the stack wakes by itself when that is over; and
 *     who takes some of it wakes another for the rest.
 *  3. `running` counts the workers inside a function, and those who help.
 *  4. The workers that run and do not leave are those with an index below
 *     `threads`; a thread that has left is joined before its place is used
 *     again, or by _free.
 *
 * The mutexes are pthread's and not GLib's, because ThreadSanitizer knows
 * those.  Semaphores are posted after the mutex was given up, lest the one who
 * wakes runs into it.  That is safe although whoever learns from the work that
 * it is done may free the pool meanwhile: _free joins the woken worker, too,
 * which cannot end before the post.  `drained` is signalled under the mutex.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "util/workers.h"

#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>

/* The kernel keeps 15 bytes of a thread's name and a terminator. */
#define THREAD_NAME_LEN 16

/* What "-255" needs: see BALE_WORKERS_MAX. */
#define THREAD_SUFFIX_LEN 4

G_STATIC_ASSERT(BALE_WORKERS_MAX <= 1000);

typedef struct Worker {
    /* Never change while the thread runs. */
    BaleWorkers *pool;
    unsigned index;
    void *context;
    pthread_t thread;
    sem_t wake;

    /* Under resize_lock: the thread was made and not joined. */
    bool started;

    /* Under the pool's mutex. */
    struct Worker *next_idle;
    bool leave; /* is to end */
    bool left;  /* looks at nothing of the pool any more */
} Worker;

typedef struct Queue {
    BaleWork *head;
    BaleWork **tail;
    uint64_t len;
} Queue;

struct BaleWorkers {
    /* Never change after bale_workers_new(). */
    char name[THREAD_NAME_LEN - THREAD_SUFFIX_LEN];
    BaleWorkerContextNew *context_new;
    BaleWorkerContextFree *context_free;
    void *opaque;

    /* Held by who changes the number of threads; taken before the mutex. */
    pthread_mutex_t resize_lock;
    pthread_mutex_t mutex;

    /* Under the mutex. */
    Queue queues[BALE_WORK__PRIORITIES];
    unsigned threads;
    Worker *idle;
    unsigned running;
    unsigned drainers;
    uint64_t executed;
    uint64_t wakeups;
    int64_t hold_end_us; /* until when bulk work waits */
    /* Signalled when nothing is queued and nothing runs. */
    pthread_cond_t drained;

    /* By index; the places that were ever used, under resize_lock. */
    Worker *workers[BALE_WORKERS_MAX];
};

static void queue_init(Queue *queue)
{
    queue->head = NULL;
    queue->tail = &queue->head;
    queue->len = 0;
}

static void queue_push(Queue *queue, BaleWork *work)
{
    work->next = NULL;
    *queue->tail = work;
    queue->tail = &work->next;
    queue->len++;
}

static BaleWork *queue_pop(Queue *queue)
{
    BaleWork *work = queue->head;

    if (work == NULL) {
        return NULL;
    }
    queue->head = work->next;
    if (queue->head == NULL) {
        queue->tail = &queue->head;
    }
    assert(queue->len > 0);
    queue->len--;
    work->next = NULL;
    return work;
}

/* The first item with @fn, or NULL. */
static BaleWork *queue_take(Queue *queue, BaleWorkFunc *fn)
{
    BaleWork **p = &queue->head, *work;

    while (*p != NULL && (*p)->fn != fn) {
        p = &(*p)->next;
    }
    work = *p;
    if (work == NULL) {
        return NULL;
    }
    *p = work->next;
    if (work->next == NULL) {
        queue->tail = p;
    }
    assert(queue->len > 0);
    queue->len--;
    work->next = NULL;
    return work;
}

/* For how many microseconds yet the bulk work that is queued has to wait. */
static int64_t hold_us_locked(const BaleWorkers *pool)
{
    int64_t us = 0;

    if (pool->hold_end_us != 0 && pool->drainers == 0 &&
        pool->queues[BALE_WORK_BULK].len != 0) {
        us = pool->hold_end_us - g_get_monotonic_time();
    }
    return MAX(us, 0);
}

/* *@wait_us is set if there is only what must wait for so long. */
static BaleWork *next_work_locked(BaleWorkers *pool, int64_t *wait_us)
{
    *wait_us = 0;
    for (unsigned i = 0; i < BALE_WORK__PRIORITIES; i++) {
        BaleWork *work;

        if (i == BALE_WORK_BULK) {
            *wait_us = hold_us_locked(pool);
        }
        work = *wait_us > 0 ? NULL : queue_pop(&pool->queues[i]);
        if (work != NULL) {
            return work;
        }
    }
    return NULL;
}

static bool is_queue_empty_locked(const BaleWorkers *pool)
{
    for (unsigned i = 0; i < BALE_WORK__PRIORITIES; i++) {
        if (pool->queues[i].len != 0) {
            return false;
        }
    }
    return true;
}

static bool is_drained_locked(const BaleWorkers *pool)
{
    return is_queue_empty_locked(pool) && pool->running == 0;
}

/* A sleeper, or NULL; the caller wakes it when it has given up the mutex. */
static Worker *take_idle_locked(BaleWorkers *pool)
{
    Worker *worker = pool->idle;

    if (worker != NULL) {
        pool->idle = worker->next_idle;
        pool->wakeups++;
    }
    return worker;
}

/* Nothing of the pool may be touched after this, but by its owner. */
static void wake(Worker *worker)
{
    if (worker != NULL) {
        sem_post(&worker->wake);
    }
}

/* Called and returns with the mutex. */
static void sleep_locked(BaleWorkers *pool, Worker *worker)
{
    worker->next_idle = pool->idle;
    pool->idle = worker;
    pthread_mutex_unlock(&pool->mutex);
    while (sem_wait(&worker->wake) != 0) {
        assert(errno == EINTR);
    }
    pthread_mutex_lock(&pool->mutex);
}

/* The same, for @us microseconds at most. */
static void nap_locked(BaleWorkers *pool, Worker *worker, int64_t us)
{
    int64_t end_us = g_get_monotonic_time() + us;
    struct timespec end = {
        .tv_sec = end_us / G_USEC_PER_SEC,
        .tv_nsec = end_us % G_USEC_PER_SEC * 1000,
    };
    Worker **p = &pool->idle;
    bool woken;

    worker->next_idle = pool->idle;
    pool->idle = worker;
    pthread_mutex_unlock(&pool->mutex);
    do {
        woken = sem_clockwait(&worker->wake, CLOCK_MONOTONIC, &end) == 0;
    } while (!woken && errno == EINTR);
    pthread_mutex_lock(&pool->mutex);
    while (!woken && *p != NULL && *p != worker) {
        p = &(*p)->next_idle;
    }
    if (!woken && *p != NULL) {
        *p = worker->next_idle;
    } else if (!woken) {
        /* Taken off the stack just now: the post is on its way. */
        pthread_mutex_unlock(&pool->mutex);
        while (sem_wait(&worker->wake) != 0) {
            assert(errno == EINTR);
        }
        pthread_mutex_lock(&pool->mutex);
    }
}

/* Run @work; called and returns with the mutex. */
static void run_locked(BaleWorkers *pool, BaleWork *work, void *context,
                       unsigned index, Worker *other)
{
    pool->running++;
    pthread_mutex_unlock(&pool->mutex);
    wake(other);
    work->fn(work, context, index);
    pthread_mutex_lock(&pool->mutex);
    pool->running--;
    pool->executed++;
    if (pool->drainers > 0 && is_drained_locked(pool)) {
        pthread_cond_broadcast(&pool->drained);
    }
}

static void *worker_main(void *opaque)
{
    Worker *worker = opaque;
    BaleWorkers *pool = worker->pool;
    char name[THREAD_NAME_LEN + 8];
    Worker *other = NULL;

    snprintf(name, sizeof(name), "%s-%u", pool->name, worker->index);
    pthread_setname_np(pthread_self(), name);

    pthread_mutex_lock(&pool->mutex);
    while (!worker->leave) {
        int64_t wait_us;
        BaleWork *work = next_work_locked(pool, &wait_us);

        if (work != NULL) {
            /* Nobody was woken for what was held back. */
            other = NULL;
            if (pool->hold_end_us != 0 && hold_us_locked(pool) == 0 &&
                pool->queues[BALE_WORK_BULK].len != 0) {
                other = take_idle_locked(pool);
            }
            run_locked(pool, work, worker->context, worker->index, other);
        } else if (wait_us > 0) {
            nap_locked(pool, worker, wait_us);
        } else {
            sleep_locked(pool, worker);
        }
    }
    other = NULL;
    if (!is_queue_empty_locked(pool)) {
        other = take_idle_locked(pool);
    }
    worker->left = true;
    pthread_mutex_unlock(&pool->mutex);
    wake(other);
    return NULL;
}

unsigned bale_workers_online_cores(void)
{
    return MAX(g_get_num_processors(), 1);
}

/* The threads inherit the mask, so that no signal can slip in between. */
static int create_thread(Worker *worker)
{
    sigset_t all;
    sigset_t old;
    int ret;

    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    ret = pthread_create(&worker->thread, NULL, worker_main, worker);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    return ret;
}

/* Join a thread that has left, or is going to.  Under resize_lock. */
static void join_worker(BaleWorkers *pool, Worker *worker)
{
    pthread_join(worker->thread, NULL);
    worker->started = false;
    if (pool->context_free != NULL) {
        pool->context_free(worker->context);
    }
    worker->context = NULL;
}

/* Let the workers from @first on leave.  Under resize_lock. */
static void dismiss(BaleWorkers *pool, unsigned first)
{
    Worker *idle = NULL, **p;

    pthread_mutex_lock(&pool->mutex);
    for (unsigned i = first; i < BALE_WORKERS_MAX; i++) {
        if (pool->workers[i] != NULL) {
            pool->workers[i]->leave = true;
        }
    }
    for (p = &pool->idle; *p != NULL;) {
        Worker *worker = *p;

        if (worker->leave) {
            *p = worker->next_idle;
            worker->next_idle = idle;
            idle = worker;
        } else {
            p = &worker->next_idle;
        }
    }
    pthread_mutex_unlock(&pool->mutex);
    while (idle != NULL) {
        Worker *worker = idle;

        idle = worker->next_idle;
        wake(worker);
    }
}

/* A worker that was to leave and has not left stays.  Under resize_lock. */
static bool keep_worker(Worker *worker)
{
    bool kept;

    pthread_mutex_lock(&worker->pool->mutex);
    kept = worker->started && !worker->left;
    if (kept) {
        worker->leave = false;
    }
    pthread_mutex_unlock(&worker->pool->mutex);
    return kept;
}

/* Make worker @index run, if it does not.  Under resize_lock. */
static bool start_worker(BaleWorkers *pool, unsigned index, GError **errp)
{
    Worker *worker = pool->workers[index];
    GError *err = NULL;
    int ret;

    if (worker == NULL) {
        worker = g_new0(Worker, 1);
        worker->pool = pool;
        worker->index = index;
        sem_init(&worker->wake, 0, 0);
        pool->workers[index] = worker;
    } else if (keep_worker(worker)) {
        return true;
    } else if (worker->started) {
        join_worker(pool, worker);
    }
    if (pool->context_new != NULL) {
        worker->context = pool->context_new(pool->opaque, index, &err);
        if (err != NULL) {
            g_propagate_error(errp, err);
            return false;
        }
    }
    worker->leave = worker->left = false;
    ret = create_thread(worker);
    if (ret != 0) {
        g_set_error(errp, G_FILE_ERROR, g_file_error_from_errno(ret),
                    "cannot start worker thread %u: %s", index + 1,
                    g_strerror(ret));
        if (pool->context_free != NULL) {
            pool->context_free(worker->context);
        }
        worker->context = NULL;
        return false;
    }
    worker->started = true;
    return true;
}

/* Join all that leave, and free everything. */
static void pool_free(BaleWorkers *pool)
{
    for (unsigned i = 0; i < BALE_WORKERS_MAX; i++) {
        Worker *worker = pool->workers[i];

        if (worker != NULL) {
            if (worker->started) {
                join_worker(pool, worker);
            }
            sem_destroy(&worker->wake);
            g_free(worker);
        }
    }
    pthread_cond_destroy(&pool->drained);
    pthread_mutex_destroy(&pool->mutex);
    pthread_mutex_destroy(&pool->resize_lock);
    g_free(pool);
}

static unsigned threads_now(BaleWorkers *pool)
{
    unsigned threads;

    pthread_mutex_lock(&pool->mutex);
    threads = pool->threads;
    pthread_mutex_unlock(&pool->mutex);
    return threads;
}

bool bale_workers_set_threads(BaleWorkers *pool, unsigned threads,
                              GError **errp)
{
    unsigned before;
    bool ok = true;

    if (threads == 0) {
        threads = MIN(bale_workers_online_cores(), BALE_WORKERS_MAX);
    }
    if (threads > BALE_WORKERS_MAX) {
        g_set_error(errp, G_FILE_ERROR, G_FILE_ERROR_INVAL,
                    "%u worker threads are too many, the limit is %u",
                    threads, BALE_WORKERS_MAX);
        return false;
    }
    pthread_mutex_lock(&pool->resize_lock);
    before = threads_now(pool);
    for (unsigned i = before; ok && i < threads; i++) {
        ok = start_worker(pool, i, errp);
    }
    if (!ok) {
        threads = before;
    }
    dismiss(pool, threads);
    pthread_mutex_lock(&pool->mutex);
    pool->threads = threads;
    pthread_mutex_unlock(&pool->mutex);
    pthread_mutex_unlock(&pool->resize_lock);
    return ok;
}

BaleWorkers *bale_workers_new(const char *name, unsigned threads,
                              BaleWorkerContextNew *context_new,
                              BaleWorkerContextFree *context_free,
                              void *opaque, GError **errp)
{
    BaleWorkers *pool;

    assert(name != NULL);
    pool = g_new0(BaleWorkers, 1);
    g_strlcpy(pool->name, name, sizeof(pool->name));
    pool->context_new = context_new;
    pool->context_free = context_free;
    pool->opaque = opaque;
    pthread_mutex_init(&pool->resize_lock, NULL);
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->drained, NULL);
    for (unsigned i = 0; i < BALE_WORK__PRIORITIES; i++) {
        queue_init(&pool->queues[i]);
    }
    if (!bale_workers_set_threads(pool, threads, errp)) {
        pool_free(pool);
        return NULL;
    }
    return pool;
}

void bale_workers_push(BaleWorkers *pool, BaleWork *work,
                       BaleWorkPriority priority)
{
    Worker *worker;

    assert(work->fn != NULL);
    assert((unsigned)priority < BALE_WORK__PRIORITIES);

    pthread_mutex_lock(&pool->mutex);
    queue_push(&pool->queues[priority], work);
    worker = take_idle_locked(pool);
    pthread_mutex_unlock(&pool->mutex);
    wake(worker);
}

bool bale_workers_help(BaleWorkers *pool, BaleWorkPriority priority,
                       BaleWorkFunc *fn, void *context)
{
    BaleWork *work;

    assert((unsigned)priority < BALE_WORK__PRIORITIES);
    pthread_mutex_lock(&pool->mutex);
    work = queue_take(&pool->queues[priority], fn);
    if (work != NULL) {
        run_locked(pool, work, context, BALE_WORKERS_MAX, NULL);
    }
    pthread_mutex_unlock(&pool->mutex);
    return work != NULL;
}

void bale_workers_hold(BaleWorkers *pool, int64_t us)
{
    us = CLAMP(us, 0, BALE_WORK_HOLD_MAX_US);
    pthread_mutex_lock(&pool->mutex);
    pool->hold_end_us = us ? g_get_monotonic_time() + us : 0;
    pthread_mutex_unlock(&pool->mutex);
}

void bale_workers_drain(BaleWorkers *pool)
{
    pthread_mutex_lock(&pool->mutex);
    pool->drainers++;
    while (!is_drained_locked(pool)) {
        pthread_cond_wait(&pool->drained, &pool->mutex);
    }
    pool->drainers--;
    pthread_mutex_unlock(&pool->mutex);
}

void bale_workers_free(BaleWorkers *pool)
{
    if (pool == NULL) {
        return;
    }
    bale_workers_drain(pool);
    dismiss(pool, 0);
    pool_free(pool);
}

void bale_workers_get_stats(BaleWorkers *pool, BaleWorkersStats *stats)
{
    pthread_mutex_lock(&pool->mutex);
    *stats = (BaleWorkersStats) {
        .threads = pool->threads,
        .running = pool->running,
        .executed = pool->executed,
        .wakeups = pool->wakeups,
    };
    for (unsigned i = 0; i < BALE_WORK__PRIORITIES; i++) {
        stats->queued[i] = pool->queues[i].len;
    }
    pthread_mutex_unlock(&pool->mutex);
}

unsigned bale_workers_threads(BaleWorkers *pool)
{
    return threads_now(pool);
}
