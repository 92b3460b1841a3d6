/*
 * Epochs: an action runs exactly once, and only after the readers have left
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "util/epoch.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

static void add_one(void *opaque)
{
    atomic_fetch_add((atomic_int *)opaque, 1);
}

static void test_action_waits_for_poll(void)
{
    g_autoptr(BaleEpoch) e = bale_epoch_new();
    atomic_int ran = 0;

    bale_epoch_defer(e, add_one, &ran);
    g_assert_cmpint(ran, ==, 0);
    g_assert_cmpuint(bale_epoch_poll(e), ==, 1);
    g_assert_cmpint(ran, ==, 1);
    g_assert_cmpuint(bale_epoch_poll(e), ==, 0);
    g_assert_cmpint(ran, ==, 1);
}

static void test_action_waits_for_reader(void)
{
    g_autoptr(BaleEpoch) e = bale_epoch_new();
    BaleEpochToken token = bale_epoch_enter(e);
    atomic_int ran = 0;

    bale_epoch_defer(e, add_one, &ran);
    for (int i = 0; i < 10; i++) {
        g_assert_cmpuint(bale_epoch_poll(e), ==, 0);
    }
    bale_epoch_exit(e, token);
    bale_epoch_poll(e);
    g_assert_cmpint(ran, ==, 1);
}

static void test_later_readers_do_not_delay(void)
{
    g_autoptr(BaleEpoch) e = bale_epoch_new();
    BaleEpochToken first = bale_epoch_enter(e);
    BaleEpochToken later;
    atomic_int ran = 0;

    bale_epoch_defer(e, add_one, &ran);
    bale_epoch_poll(e);             /* one step is possible */
    later = bale_epoch_enter(e);
    bale_epoch_exit(e, first);
    bale_epoch_poll(e);
    g_assert_cmpint(ran, ==, 1);
    bale_epoch_exit(e, later);
}

static void test_entries_nest(void)
{
    g_autoptr(BaleEpoch) e = bale_epoch_new();
    BaleEpochToken outer = bale_epoch_enter(e);
    BaleEpochToken inner = bale_epoch_enter(e);
    BaleEpochStats stats;
    atomic_int ran = 0;

    bale_epoch_defer(e, add_one, &ran);
    bale_epoch_get_stats(e, &stats);
    g_assert_cmpuint(stats.readers, ==, 2);
    g_assert_cmpuint(stats.pending, ==, 1);
    bale_epoch_exit(e, inner);
    bale_epoch_poll(e);
    bale_epoch_poll(e);
    g_assert_cmpint(ran, ==, 0);
    bale_epoch_get_stats(e, &stats);
    g_assert_cmpuint(stats.oldest_age, ==, 1);
    bale_epoch_exit(e, outer);
    bale_epoch_drain(e);
    g_assert_cmpint(ran, ==, 1);
    bale_epoch_get_stats(e, &stats);
    g_assert_cmpuint(stats.readers, ==, 0);
    g_assert_cmpuint(stats.pending, ==, 0);
    g_assert_cmpuint(stats.executed, ==, 1);
}

typedef struct Chain {
    BaleEpoch *e;
    int left;
    int ran;
} Chain;

static void chain_action(void *opaque)
{
    Chain *chain = opaque;

    chain->ran++;
    if (--chain->left > 0) {
        bale_epoch_defer(chain->e, chain_action, chain);
    }
}

static void test_drain_runs_what_actions_defer(void)
{
    g_autoptr(BaleEpoch) e = bale_epoch_new();
    Chain chain = { .e = e, .left = 5 };

    bale_epoch_defer(e, chain_action, &chain);
    bale_epoch_drain(e);
    g_assert_cmpint(chain.ran, ==, 5);
}

static void test_free_runs_what_is_pending(void)
{
    BaleEpoch *e = bale_epoch_new();
    atomic_int ran = 0;

    for (int i = 0; i < 100; i++) {
        bale_epoch_defer(e, add_one, &ran);
    }
    bale_epoch_free(e);
    g_assert_cmpint(ran, ==, 100);
}

typedef struct Handover {
    BaleEpoch *e;
    BaleEpochToken token;
} Handover;

static void *enter_and_end(void *opaque)
{
    Handover *h = opaque;

    h->token = bale_epoch_enter(h->e);
    return NULL;
}

/* The thread that entered has ended; its entry counts, and leaks nothing. */
static void test_entry_outlives_its_thread(void)
{
    g_autoptr(BaleEpoch) e = bale_epoch_new();
    Handover h = { .e = e };
    atomic_int ran = 0;
    pthread_t thread;

    pthread_create(&thread, NULL, enter_and_end, &h);
    pthread_join(thread, NULL);
    bale_epoch_defer(e, add_one, &ran);
    bale_epoch_poll(e);
    bale_epoch_poll(e);
    g_assert_cmpint(ran, ==, 0);
    bale_epoch_exit(e, h.token);
    bale_epoch_drain(e);
    g_assert_cmpint(ran, ==, 1);
}

/* More threads than slots, all inside at once. */
#define MANY_THREADS 200

static void test_many_threads_inside(void)
{
    g_autoptr(BaleEpoch) e = bale_epoch_new();
    g_autofree Handover *h = g_new0(Handover, MANY_THREADS);
    BaleEpochStats stats;
    atomic_int ran = 0;

    for (int i = 0; i < MANY_THREADS; i++) {
        pthread_t thread;

        h[i].e = e;
        pthread_create(&thread, NULL, enter_and_end, &h[i]);
        pthread_join(thread, NULL);
    }
    bale_epoch_defer(e, add_one, &ran);
    for (int i = 0; i < MANY_THREADS; i++) {
        bale_epoch_get_stats(e, &stats);
        g_assert_cmpuint(stats.readers, ==, MANY_THREADS - i);
        g_assert_cmpuint(bale_epoch_poll(e), ==, 0);
        bale_epoch_exit(e, h[i].token);
    }
    g_assert_cmpuint(bale_epoch_poll(e), ==, 1);
    g_assert_cmpint(ran, ==, 1);
}

/*
 * Stress: writers replace a shared object and retire the old one, readers look
 * at it.  A retired object is poisoned and freed: readers would see the poison,
 * or ThreadSanitizer the race.
 */
#define STRESS_READERS 3
#define STRESS_WRITERS 2
#define STRESS_REPLACEMENTS 20000
#define STRESS_CELLS 4

typedef struct Object {
    uint64_t a;
    uint64_t not_a;
} Object;

typedef struct Stress {
    BaleEpoch *e;
    _Atomic(Object *) cells[STRESS_CELLS];
    atomic_int writers_left;
    atomic_int freed;
    atomic_int wrong;
} Stress;

typedef struct Retired {
    Stress *stress;
    Object *object;
} Retired;

static void stress_free(void *opaque)
{
    Retired *r = opaque;

    r->object->a = r->object->not_a = 0;
    g_free(r->object);
    atomic_fetch_add(&r->stress->freed, 1);
    g_free(r);
}

static Object *object_new(uint64_t a)
{
    Object *object = g_new(Object, 1);

    object->a = a;
    object->not_a = ~a;
    return object;
}

static void *stress_reader(void *opaque)
{
    Stress *stress = opaque;
    unsigned n = 0;

    while (atomic_load(&stress->writers_left) > 0) {
        BaleEpochToken token = bale_epoch_enter(stress->e);
        Object *object = atomic_load(&stress->cells[n++ % STRESS_CELLS]);
        BaleEpochToken nested = bale_epoch_enter(stress->e);

        if (object->a != ~object->not_a) {
            atomic_fetch_add(&stress->wrong, 1);
        }
        bale_epoch_exit(stress->e, nested);
        if (object->a != ~object->not_a) {
            atomic_fetch_add(&stress->wrong, 1);
        }
        bale_epoch_exit(stress->e, token);
    }
    return NULL;
}

static void *stress_writer(void *opaque)
{
    Stress *stress = opaque;

    for (unsigned i = 0; i < STRESS_REPLACEMENTS; i++) {
        Retired *r = g_new(Retired, 1);

        r->stress = stress;
        r->object = atomic_exchange(&stress->cells[i % STRESS_CELLS],
                                    object_new(i));
        bale_epoch_defer(stress->e, stress_free, r);
        if (i % 16 == 0) {
            bale_epoch_poll(stress->e);
        }
    }
    atomic_fetch_sub(&stress->writers_left, 1);
    return NULL;
}

static void test_stress(void)
{
    Stress stress = { .e = bale_epoch_new() };
    pthread_t threads[STRESS_READERS + STRESS_WRITERS];

    atomic_init(&stress.writers_left, STRESS_WRITERS);
    for (unsigned i = 0; i < STRESS_CELLS; i++) {
        atomic_init(&stress.cells[i], object_new(i));
    }
    for (unsigned i = 0; i < G_N_ELEMENTS(threads); i++) {
        pthread_create(&threads[i], NULL,
                       i < STRESS_READERS ? stress_reader : stress_writer,
                       &stress);
    }
    for (unsigned i = 0; i < G_N_ELEMENTS(threads); i++) {
        pthread_join(threads[i], NULL);
    }
    bale_epoch_drain(stress.e);
    g_assert_cmpint(stress.wrong, ==, 0);
    g_assert_cmpint(stress.freed, ==, STRESS_WRITERS * STRESS_REPLACEMENTS);
    bale_epoch_free(stress.e);
    for (unsigned i = 0; i < STRESS_CELLS; i++) {
        g_free(atomic_load(&stress.cells[i]));
    }
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/epoch/action-waits-for-poll",
                    test_action_waits_for_poll);
    g_test_add_func("/epoch/action-waits-for-reader",
                    test_action_waits_for_reader);
    g_test_add_func("/epoch/later-readers-do-not-delay",
                    test_later_readers_do_not_delay);
    g_test_add_func("/epoch/entries-nest", test_entries_nest);
    g_test_add_func("/epoch/drain-runs-what-actions-defer",
                    test_drain_runs_what_actions_defer);
    g_test_add_func("/epoch/free-runs-what-is-pending",
                    test_free_runs_what_is_pending);
    g_test_add_func("/epoch/entry-outlives-its-thread",
                    test_entry_outlives_its_thread);
    g_test_add_func("/epoch/many-threads-inside", test_many_threads_inside);
    g_test_add_func("/epoch/stress", test_stress);
    return g_test_run();
}
