/*
 * What the linker puts before the engine's own: see inline.c, and `wraps` for
 * the list that the link wants.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef TESTS_SIM_INLINE_H
#define TESTS_SIM_INLINE_H

#include <glib.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "util/workers.h"

/* Does the next store's only worker run in the thread that waits for it? */
extern bool inline_enabled;

int __real_pthread_cond_wait(pthread_cond_t *cond, pthread_mutex_t *mutex);
int __wrap_pthread_cond_wait(pthread_cond_t *cond, pthread_mutex_t *mutex);
int __real_pthread_rwlock_rdlock(pthread_rwlock_t *rwlock);
int __wrap_pthread_rwlock_rdlock(pthread_rwlock_t *rwlock);
int __real_pthread_rwlock_tryrdlock(pthread_rwlock_t *rwlock);
int __wrap_pthread_rwlock_tryrdlock(pthread_rwlock_t *rwlock);
int __real_pthread_rwlock_wrlock(pthread_rwlock_t *rwlock);
int __wrap_pthread_rwlock_wrlock(pthread_rwlock_t *rwlock);
int __real_pthread_rwlock_unlock(pthread_rwlock_t *rwlock);
int __wrap_pthread_rwlock_unlock(pthread_rwlock_t *rwlock);

BaleWorkers *__real_bale_workers_new(const char *name, unsigned threads,
                                     BaleWorkerContextNew *context_new,
                                     BaleWorkerContextFree *context_free,
                                     void *opaque, GError **errp);
BaleWorkers *__wrap_bale_workers_new(const char *name, unsigned threads,
                                     BaleWorkerContextNew *context_new,
                                     BaleWorkerContextFree *context_free,
                                     void *opaque, GError **errp);
void __real_bale_workers_push(BaleWorkers *workers, BaleWork *work,
                              BaleWorkPriority priority);
void __wrap_bale_workers_push(BaleWorkers *workers, BaleWork *work,
                              BaleWorkPriority priority);
void __real_bale_workers_drain(BaleWorkers *workers);
void __wrap_bale_workers_drain(BaleWorkers *workers);
void __real_bale_workers_free(BaleWorkers *workers);
void __wrap_bale_workers_free(BaleWorkers *workers);
void __real_bale_workers_get_stats(BaleWorkers *workers,
                                   BaleWorkersStats *stats);
void __wrap_bale_workers_get_stats(BaleWorkers *workers,
                                   BaleWorkersStats *stats);
bool __real_bale_workers_help(BaleWorkers *workers, BaleWorkPriority priority,
                              BaleWorkFunc *fn, void *context);
bool __wrap_bale_workers_help(BaleWorkers *workers, BaleWorkPriority priority,
                              BaleWorkFunc *fn, void *context);
void __real_bale_workers_hold(BaleWorkers *workers, int64_t us);
unsigned __real_bale_workers_threads(BaleWorkers *workers);
void __wrap_bale_workers_hold(BaleWorkers *workers, int64_t us);
unsigned __wrap_bale_workers_threads(BaleWorkers *workers);

#endif
