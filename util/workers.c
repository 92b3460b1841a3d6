/*
 * A pool of worker threads with two first-in-first-out queues.
 *
 * One mutex covers both queues: an item is a whole cluster to compress, so a
 * worker takes it a few thousand times a second at most.  What would cost is
 * waking threads, and therefore each worker sleeps on a condition of its own.
 * A push wakes one sleeper at most, the one that fell asleep last (its caches
 * are the warmest), and nobody when all are busy.
 *
 * Invariants, under the mutex:
 *  1. A worker is in the idle stack if and only if it waits for its `woken`.
 *  2. While anything is queued, the stack is empty or somebody is woken for
 *     it: a woken worker looks at the queues before it may sleep again.
 *  3. `running` counts the workers inside a function.
 *
 * The mutexes are pthread's and not GLib's, because ThreadSanitizer knows
 * those.  Conditions are signalled under the mutex: whoever learns from the
 * work that it is done may free the pool before the push has returned.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "util/workers.h"

#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>

/* The kernel keeps 15 bytes of a thread's name and a terminator. */
#define THREAD_NAME_LEN 16

/* What "-255" needs: see BALE_WORKERS_MAX. */
#define THREAD_SUFFIX_LEN 4

G_STATIC_ASSERT(BALE_WORKERS_MAX <= 1000);

typedef struct Worker {
    /* Never change once the thread runs. */
    BaleWorkers *pool;
    unsigned index;
    void *context;
    pthread_t thread;

    /* Under the pool's mutex. */
    bool woken;
    struct Worker *next_idle;
    pthread_cond_t wake;
} Worker;

typedef struct Queue {
    BaleWork *head;
    BaleWork **tail;
    uint64_t len;
} Queue;

struct BaleWorkers {
    /* Never change after bale_workers_new(). */
    char name[THREAD_NAME_LEN - THREAD_SUFFIX_LEN];
    unsigned threads;
    BaleWorkerContextFree *context_free;

    pthread_mutex_t mutex;

    /* Under the mutex. */
    Queue queues[BALE_WORK__PRIORITIES];
    Worker *idle;
    unsigned running;
    unsigned drainers;
    bool stop;
    uint64_t executed;
    uint64_t wakeups;
    /* Signalled when nothing is queued and nothing runs. */
    pthread_cond_t drained;

    Worker workers[];
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

static BaleWork *next_work_locked(BaleWorkers *pool)
{
    for (unsigned i = 0; i < BALE_WORK__PRIORITIES; i++) {
        BaleWork *work = queue_pop(&pool->queues[i]);

        if (work != NULL) {
            return work;
        }
    }
    return NULL;
}

static bool is_drained_locked(const BaleWorkers *pool)
{
    for (unsigned i = 0; i < BALE_WORK__PRIORITIES; i++) {
        if (pool->queues[i].len != 0) {
            return false;
        }
    }
    return pool->running == 0;
}

static void wake_one_locked(BaleWorkers *pool)
{
    Worker *worker = pool->idle;

    if (worker != NULL) {
        pool->idle = worker->next_idle;
        worker->woken = true;
        pool->wakeups++;
        pthread_cond_signal(&worker->wake);
    }
}

static void sleep_locked(BaleWorkers *pool, Worker *worker)
{
    worker->woken = false;
    worker->next_idle = pool->idle;
    pool->idle = worker;
    while (!worker->woken) {
        pthread_cond_wait(&worker->wake, &pool->mutex);
    }
}

static void *worker_main(void *opaque)
{
    Worker *worker = opaque;
    BaleWorkers *pool = worker->pool;
    char name[THREAD_NAME_LEN + 8];

    snprintf(name, sizeof(name), "%s-%u", pool->name, worker->index);
    pthread_setname_np(pthread_self(), name);

    pthread_mutex_lock(&pool->mutex);
    for (;;) {
        BaleWork *work = next_work_locked(pool);

        if (work != NULL) {
            pool->running++;
            pthread_mutex_unlock(&pool->mutex);
            work->fn(work, worker->context, worker->index);
            pthread_mutex_lock(&pool->mutex);
            pool->running--;
            pool->executed++;
            if (pool->drainers > 0 && is_drained_locked(pool)) {
                pthread_cond_broadcast(&pool->drained);
            }
        } else if (pool->stop) {
            break;
        } else {
            sleep_locked(pool, worker);
        }
    }
    pthread_mutex_unlock(&pool->mutex);
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

/* End and join the first @started threads; nothing may be queued any more. */
static void stop_threads(BaleWorkers *pool, unsigned started)
{
    pthread_mutex_lock(&pool->mutex);
    pool->stop = true;
    while (pool->idle != NULL) {
        wake_one_locked(pool);
    }
    pthread_mutex_unlock(&pool->mutex);

    for (unsigned i = 0; i < started; i++) {
        pthread_join(pool->workers[i].thread, NULL);
    }
}

/* Frees everything; @contexts of the workers have one. */
static void pool_free(BaleWorkers *pool, unsigned contexts)
{
    for (unsigned i = 0; i < contexts; i++) {
        if (pool->context_free != NULL) {
            pool->context_free(pool->workers[i].context);
        }
    }
    for (unsigned i = 0; i < pool->threads; i++) {
        pthread_cond_destroy(&pool->workers[i].wake);
    }
    pthread_cond_destroy(&pool->drained);
    pthread_mutex_destroy(&pool->mutex);
    g_free(pool);
}

static bool make_contexts(BaleWorkers *pool, BaleWorkerContextNew *context_new,
                          void *opaque, unsigned *contexts, GError **errp)
{
    for (*contexts = 0; *contexts < pool->threads; (*contexts)++) {
        GError *err = NULL;

        if (context_new != NULL) {
            pool->workers[*contexts].context =
                context_new(opaque, *contexts, &err);
            if (err != NULL) {
                g_propagate_error(errp, err);
                return false;
            }
        }
    }
    return true;
}

static bool start_threads(BaleWorkers *pool, GError **errp)
{
    for (unsigned i = 0; i < pool->threads; i++) {
        int ret = create_thread(&pool->workers[i]);

        if (ret != 0) {
            g_set_error(errp, G_FILE_ERROR, g_file_error_from_errno(ret),
                        "cannot start worker thread %u of %u: %s", i + 1,
                        pool->threads, g_strerror(ret));
            stop_threads(pool, i);
            return false;
        }
    }
    return true;
}

BaleWorkers *bale_workers_new(const char *name, unsigned threads,
                              BaleWorkerContextNew *context_new,
                              BaleWorkerContextFree *context_free,
                              void *opaque, GError **errp)
{
    BaleWorkers *pool;
    unsigned contexts;

    assert(name != NULL);
    if (threads == 0) {
        threads = MIN(bale_workers_online_cores(), BALE_WORKERS_MAX);
    }
    if (threads > BALE_WORKERS_MAX) {
        g_set_error(errp, G_FILE_ERROR, G_FILE_ERROR_INVAL,
                    "%u worker threads are too many, the limit is %u",
                    threads, BALE_WORKERS_MAX);
        return NULL;
    }

    pool = g_malloc0(sizeof(*pool) + threads * sizeof(pool->workers[0]));
    g_strlcpy(pool->name, name, sizeof(pool->name));
    pool->threads = threads;
    pool->context_free = context_free;
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->drained, NULL);
    for (unsigned i = 0; i < BALE_WORK__PRIORITIES; i++) {
        queue_init(&pool->queues[i]);
    }
    for (unsigned i = 0; i < threads; i++) {
        pool->workers[i].pool = pool;
        pool->workers[i].index = i;
        pthread_cond_init(&pool->workers[i].wake, NULL);
    }

    if (!make_contexts(pool, context_new, opaque, &contexts, errp) ||
        !start_threads(pool, errp)) {
        pool_free(pool, contexts);
        return NULL;
    }
    return pool;
}

void bale_workers_push(BaleWorkers *pool, BaleWork *work,
                       BaleWorkPriority priority)
{
    assert(work->fn != NULL);
    assert((unsigned)priority < BALE_WORK__PRIORITIES);

    pthread_mutex_lock(&pool->mutex);
    assert(!pool->stop);
    queue_push(&pool->queues[priority], work);
    wake_one_locked(pool);
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
    stop_threads(pool, pool->threads);
    pool_free(pool, pool->threads);
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

unsigned bale_workers_threads(const BaleWorkers *pool)
{
    return pool->threads;
}
