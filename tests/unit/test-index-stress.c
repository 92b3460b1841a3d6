/*
 * Hash index, many threads: every operation is linearizable while tables grow
 * and shrink, nothing is lost and nothing comes twice
 *
 * Meant to be run under ThreadSanitizer as well.  BALE_SEED=<number> repeats
 * the choices (not the schedule), BALE_STRESS=<factor> runs longer.
 *
 * Keys with one writer ("own" keys) go through states 0, 1, 2, ...; in every
 * fourth one the key is absent, else the value tells key and state.  The
 * writer announces a state before and after the operation.  So whoever reads
 * the value knows between which states it must lie, however the threads are
 * scheduled: this is a complete check of one register's linearizability.
 *
 * Keys with many writers ("shared" keys) count modulo a small number, by
 * conditional updates, insertions and removals.  Every success is counted, so
 * that a lost, a doubled or a wrongly successful update shows in the sum.
 *
 * Keys that nobody changes ("still" keys) have to be seen by every walk.
 *
 * The windows that matter are a few instructions long.  Therefore this program
 * compiles the index itself, with pauses at random in all of them.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

static void index_pause(void);
#define BALE_INDEX_PAUSE() index_pause()

#include "index-table.c"
#include "index-grow.c"
#include "index-walk.c"
#include "index.c"

#define OWNERS 2
#define READERS 2
#define SHARERS 2

#define OWN_KEYS 12000          /* of all owners */
#define SHARED_KEYS 24
#define STILL_KEYS 500
#define KEYS (OWN_KEYS + SHARED_KEYS + STILL_KEYS)

#define OWNER_ROUNDS 4
#define SHARED_MODULUS 3

#define KEY_BITS_IN_VALUE 20
#define STATE_MASK ((1u << 28) - 1)

/* One pause in so many; 0: none. */
static atomic_uint pause_every;

static void index_pause(void)
{
    static _Thread_local uint32_t random;
    unsigned every = atomic_load_explicit(&pause_every, memory_order_relaxed);

    if (every == 0) {
        return;
    }
    if (random == 0) {
        random = (uint32_t)((uintptr_t)&random >> 4) | 1;
    }
    random = random * 1664525 + 1013904223;
    if ((random >> 8) % every == 0) {
        if ((random >> 28) == 0) {
            g_usleep(20);
        } else {
            sched_yield();
        }
    }
}

typedef struct Stress {
    BaleIndex *index;
    BaleEpoch *epoch;
    uint64_t stride;            /* key = number * stride */
    bool starve;                /* memory runs out now and then */
    unsigned factor;
    uint32_t seed;

    _Atomic(uint32_t) *started;         /* state, per own key */
    _Atomic(uint32_t) *completed;
    _Atomic(uint64_t) shared_steps[SHARED_KEYS];

    atomic_int busy;            /* owners and sharers at work */
    atomic_ullong no_memory;
    atomic_ullong walks;
} Stress;

typedef struct Worker {
    Stress *stress;
    unsigned number;
    uint32_t random;
    pthread_t thread;
} Worker;

static uint32_t worker_random(Worker *w)
{
    w->random ^= w->random << 13;
    w->random ^= w->random >> 17;
    w->random ^= w->random << 5;
    return w->random;
}

static uint64_t state_value(uint64_t number, uint32_t state)
{
    if (state % 4 == 0) {
        return 0;
    }
    return (uint64_t)(state & STATE_MASK) << KEY_BITS_IN_VALUE | number;
}

/* Was this value that of @number in a state from @low to @high? */
static void assert_own_value(uint64_t number, uint64_t value, uint32_t low,
                             uint32_t high)
{
    if (value == 0) {
        g_assert_cmpuint((low + 3) / 4 * 4, <=, high);
    } else {
        uint32_t state = value >> KEY_BITS_IN_VALUE;

        g_assert_cmpuint(value & ((1u << KEY_BITS_IN_VALUE) - 1), ==, number);
        g_assert_cmpuint(state % 4, !=, 0);
        g_assert_cmpuint(state, >=, low);
        g_assert_cmpuint(state, <=, high);
    }
}

/* The next state of an own key, by one of the calls. */
static void own_step(Worker *w, uint64_t number)
{
    Stress *s = w->stress;
    uint32_t state = atomic_load(&s->completed[number]);
    uint64_t before = state_value(number, state);
    uint64_t after = state_value(number, state + 1);
    uint64_t key = number * s->stride;
    uint64_t seen;
    int ret;

    if (s->starve && worker_random(w) % 32 == 0) {
        /* Nothing; a table but no overflow buckets; something of both. */
        static const long allowed[] = { 0, 2, 2, 3, 4, 50 };

        atomic_store(&bale_index_test_allocations,
                     allowed[worker_random(w) % G_N_ELEMENTS(allowed)]);
    }
    atomic_store(&s->started[number], state + 1);
    do {
        seen = 1;
        if (worker_random(w) & 1) {
            ret = bale_index_update(s->index, key, before, after, &seen);
        } else {
            ret = bale_index_set(s->index, key, after, &seen);
        }
        if (ret == -ENOMEM) {
            g_assert_true(s->starve && before == 0);
            g_assert_cmpuint(seen, ==, 1);
            atomic_fetch_add(&s->no_memory, 1);
            atomic_fetch_add(&bale_index_test_allocations, 1);
            sched_yield();
        }
    } while (ret == -ENOMEM);
    g_assert_cmpint(ret, ==, 0);
    g_assert_cmpuint(seen, ==, before);
    atomic_store(&s->completed[number], state + 1);
}

/* A wrong expectation must be refused, and told the truth. */
static void own_refused(Worker *w, uint64_t number)
{
    Stress *s = w->stress;
    uint32_t state = atomic_load(&s->completed[number]);
    uint64_t seen = 1;

    g_assert_cmpint(bale_index_update(s->index, number * s->stride,
                                      BALE_INDEX_VALUE_MAX, 5, &seen), ==,
                    -EAGAIN);
    g_assert_cmpuint(seen, ==, state_value(number, state));
}

/* Fill, churn, empty: the number of keys goes up and down by a large factor. */
static void *owner_run(void *opaque)
{
    Worker *w = opaque;
    Stress *s = w->stress;

    for (unsigned round = 0; round < OWNER_ROUNDS * s->factor; round++) {
        for (uint64_t n = w->number; n < OWN_KEYS; n += OWNERS) {
            own_step(w, n);
            if (n % 16 == w->number) {
                bale_epoch_poll(s->epoch);
            }
        }
        for (unsigned i = 0; i < OWN_KEYS / 2; i++) {
            uint64_t n = worker_random(w) % (OWN_KEYS / OWNERS) * OWNERS +
                         w->number;

            if (i % 16 == 0) {
                own_refused(w, n);
            }
            own_step(w, n);
        }
        for (uint64_t n = w->number; n < OWN_KEYS; n += OWNERS) {
            while (atomic_load(&s->completed[n]) % 4 != 0) {
                own_step(w, n);
            }
        }
        /* Leave the last fill in place for the final walk. */
        if (round + 1 == OWNER_ROUNDS * s->factor) {
            for (uint64_t n = w->number; n < OWN_KEYS; n += OWNERS) {
                own_step(w, n);
            }
        }
    }
    atomic_fetch_sub(&s->busy, 1);
    return NULL;
}

static void *sharer_run(void *opaque)
{
    Worker *w = opaque;
    Stress *s = w->stress;

    for (unsigned i = 0; i < 60000 * s->factor; i++) {
        unsigned n = worker_random(w) % SHARED_KEYS;
        uint64_t key = (OWN_KEYS + n) * s->stride;
        uint64_t value = bale_index_find(s->index, key);
        uint64_t seen;
        int ret;

        g_assert_cmpuint(value, <, SHARED_MODULUS);
        do {
            ret = bale_index_update(s->index, key, value,
                                    (value + 1) % SHARED_MODULUS, &seen);
            if (ret == -EAGAIN) {
                g_assert_cmpuint(seen, <, SHARED_MODULUS);
                g_assert_cmpuint(seen, !=, value);
                value = seen;
            } else if (ret == -ENOMEM) {
                atomic_fetch_add(&s->no_memory, 1);
                sched_yield();
            }
        } while (ret != 0);
        atomic_fetch_add(&s->shared_steps[n], 1);
    }
    atomic_fetch_sub(&s->busy, 1);
    return NULL;
}

static void *reader_run(void *opaque)
{
    Worker *w = opaque;
    Stress *s = w->stress;

    while (atomic_load(&s->busy) > 0) {
        uint64_t n = worker_random(w) % KEYS;
        uint64_t key = n * s->stride;

        if (n < OWN_KEYS) {
            uint32_t low = atomic_load(&s->completed[n]);
            uint64_t value = bale_index_find(s->index, key);

            assert_own_value(n, value, low, atomic_load(&s->started[n]));
        } else if (n < OWN_KEYS + SHARED_KEYS) {
            g_assert_cmpuint(bale_index_find(s->index, key), <,
                             SHARED_MODULUS);
        } else {
            g_assert_cmpuint(bale_index_find(s->index, key), ==, n);
        }
        if (s->stride > 1) {
            /* Between the keys there is nothing. */
            g_assert_cmpuint(bale_index_find(s->index, key + 1), ==, 0);
        }
    }
    return NULL;
}

typedef struct Walk {
    Stress *s;
    uint32_t *low;              /* completed states before the walk */
    bool *visited;
    unsigned still;
    unsigned own;
} Walk;

static bool walk_visit(uint64_t key, uint64_t value, void *opaque)
{
    Walk *walk = opaque;
    uint64_t n = key / walk->s->stride;

    g_assert_cmpuint(key % walk->s->stride, ==, 0);
    g_assert_cmpuint(n, <, KEYS);
    g_assert_cmpuint(value, !=, 0);
    g_assert_false(walk->visited[n]);
    walk->visited[n] = true;
    if (n < OWN_KEYS) {
        assert_own_value(n, value, walk->low[n],
                         atomic_load(&walk->s->started[n]));
        walk->own++;
    } else if (n < OWN_KEYS + SHARED_KEYS) {
        g_assert_cmpuint(value, <, SHARED_MODULUS);
    } else {
        g_assert_cmpuint(value, ==, n);
        walk->still++;
    }
    return true;
}

static unsigned walk_once(Stress *s)
{
    g_autofree uint32_t *low = g_new(uint32_t, OWN_KEYS);
    g_autofree bool *visited = g_new0(bool, KEYS);
    Walk walk = { .s = s, .low = low, .visited = visited };

    for (uint64_t n = 0; n < OWN_KEYS; n++) {
        low[n] = atomic_load(&s->completed[n]);
    }
    g_assert_true(bale_index_foreach(s->index, walk_visit, &walk));
    g_assert_cmpuint(walk.still, ==, STILL_KEYS);
    return walk.own;
}

static void *walker_run(void *opaque)
{
    Worker *w = opaque;
    Stress *s = w->stress;

    while (atomic_load(&s->busy) > 0) {
        BaleIndexStats stats;

        walk_once(s);
        atomic_fetch_add(&s->walks, 1);
        bale_index_get_stats(s->index, &stats);
        g_assert_cmpuint(stats.growing_done, <=, stats.growing_total);
        bale_index_grow_step(s->index);
        bale_epoch_poll(s->epoch);
    }
    return NULL;
}

static void assert_final(Stress *s)
{
    BaleIndexStats stats;
    uint64_t present = STILL_KEYS;
    unsigned own = 0;

    g_assert_true(bale_index_check(s->index));
    for (uint64_t n = 0; n < OWN_KEYS; n++) {
        uint32_t state = atomic_load(&s->completed[n]);

        g_assert_cmpuint(bale_index_find(s->index, n * s->stride), ==,
                         state_value(n, state));
        own += state % 4 != 0;
    }
    for (unsigned n = 0; n < SHARED_KEYS; n++) {
        uint64_t value = atomic_load(&s->shared_steps[n]) % SHARED_MODULUS;

        g_assert_cmpuint(bale_index_find(s->index, (OWN_KEYS + n) * s->stride),
                         ==, value);
        present += value != 0;
    }
    g_assert_cmpuint(walk_once(s), ==, own);
    bale_index_get_stats(s->index, &stats);
    g_assert_cmpuint(stats.keys, ==, present + own);
}

static void stress_run(unsigned key_bits, uint64_t stride, bool starve)
{
    static void *(*const roles[])(void *) = {
        owner_run, owner_run, sharer_run, sharer_run, reader_run, reader_run,
        walker_run,
    };
    const char *env = g_getenv("BALE_SEED");
    g_autoptr(BaleEpoch) epoch = bale_epoch_new();
    g_autoptr(BaleIndex) index = bale_index_new(key_bits, 0, epoch);
    g_autofree Worker *workers = g_new0(Worker, G_N_ELEMENTS(roles));
    BaleIndexStats stats;
    Stress s = {
        .index = index, .epoch = epoch, .stride = stride, .starve = starve,
        .factor = 1,
    };

    G_STATIC_ASSERT(OWNERS + SHARERS + READERS + 1 == G_N_ELEMENTS(roles));
    s.seed = env ? strtoul(env, NULL, 0) : g_random_int();
    g_test_message("BALE_SEED=%u", s.seed);
    if (g_getenv("BALE_STRESS")) {
        s.factor = MAX(1, atoi(g_getenv("BALE_STRESS")));
    }
    s.started = calloc(OWN_KEYS, sizeof(*s.started));
    s.completed = calloc(OWN_KEYS, sizeof(*s.completed));
    for (uint64_t n = OWN_KEYS + SHARED_KEYS; n < KEYS; n++) {
        g_assert_cmpint(bale_index_set(index, n * stride, n, NULL), ==, 0);
    }
    atomic_init(&s.busy, OWNERS + SHARERS);
    for (unsigned i = 0; i < G_N_ELEMENTS(roles); i++) {
        workers[i].stress = &s;
        workers[i].number = i;          /* the owners are 0 and 1 */
        workers[i].random = (s.seed + i * 2654435761u) | 1;
        pthread_create(&workers[i].thread, NULL, roles[i], &workers[i]);
    }
    for (unsigned i = 0; i < G_N_ELEMENTS(roles); i++) {
        pthread_join(workers[i].thread, NULL);
    }

    atomic_store(&bale_index_test_allocations, -1);
    assert_final(&s);
    while (bale_index_grow_step(index)) {
        /* The next chunk. */
    }
    assert_final(&s);
    bale_epoch_drain(epoch);
    bale_index_get_stats(index, &stats);
    g_test_message("%" G_GUINT64_FORMAT " growths, %" G_GUINT64_FORMAT
                   " shrinks, %" G_GUINT64_FORMAT " rebuilds, %"
                   G_GUINT64_FORMAT " waits, %" G_GUINT64_FORMAT
                   " conflicts, %llu walks, %llu insertions and %"
                   G_GUINT64_FORMAT " allocations without memory",
                   stats.growths, stats.shrinks, stats.rebuilds, stats.waits,
                   stats.insert_conflicts, atomic_load(&s.walks),
                   atomic_load(&s.no_memory), stats.allocation_failures);
    g_assert_cmpuint(stats.growths, >, 0);
    g_assert_cmpuint(stats.retired_bytes, ==, 0);
    free(s.started);
    free(s.completed);
}

static void test_one_segment(void)
{
    stress_run(14, 1, false);
}

static void test_many_segments(void)
{
    stress_run(22, 333, false);
}

static void test_memory_runs_out(void)
{
    stress_run(15, 2, true);
}

/*
 * All keys in a few chains, inserted and removed all the time: free slots
 * appear between two insertions of a key, which is what needs the two phases.
 * A key serves as a lock: who inserts it holds it, until he removes it.  What
 * it protects is not atomic, so that ThreadSanitizer sees whether changes to
 * the index order what comes before and after them.
 */
#define LOCKERS 4
#define LOCK_KEYS 20
#define LOCK_ROUNDS 30000

typedef struct Locks {
    BaleIndex *index;
    atomic_uint holders[LOCK_KEYS];
    uint64_t taken[LOCK_KEYS];      /* under the lock of that number */
} Locks;

typedef struct Locker {
    Locks *locks;
    uint64_t number;
    uint64_t taken;
    pthread_t thread;
} Locker;

static void *locker_run(void *opaque)
{
    Locker *l = opaque;
    Locks *locks = l->locks;

    for (unsigned i = 0; i < LOCK_ROUNDS; i++) {
        unsigned n = (i * 7 + i / 64) % LOCK_KEYS;
        uint64_t seen = 0;

        if (bale_index_update(locks->index, n, 0, l->number, &seen) != 0) {
            g_assert_cmpuint(seen, !=, l->number);
            continue;
        }
        g_assert_cmpuint(atomic_fetch_add(&locks->holders[n], 1), ==, 0);
        locks->taken[n]++;
        l->taken++;
        index_pause();
        g_assert_cmpuint(bale_index_find(locks->index, n), ==, l->number);
        atomic_fetch_sub(&locks->holders[n], 1);
        g_assert_cmpint(bale_index_update(locks->index, n, l->number, 0,
                                          &seen), ==, 0);
    }
    return NULL;
}

static void test_keys_as_locks(void)
{
    g_autoptr(BaleEpoch) epoch = bale_epoch_new();
    g_autoptr(BaleIndex) index = bale_index_new(5, 0, epoch);
    Locks locks = { .index = index };
    Locker lockers[LOCKERS] = { 0 };
    uint64_t taken = 0, counted_taken = 0;
    BaleIndexStats stats;

    atomic_store(&pause_every, 50);
    for (unsigned i = 0; i < LOCKERS; i++) {
        lockers[i].locks = &locks;
        lockers[i].number = i + 1;
        pthread_create(&lockers[i].thread, NULL, locker_run, &lockers[i]);
    }
    for (unsigned i = 0; i < LOCKERS; i++) {
        pthread_join(lockers[i].thread, NULL);
        taken += lockers[i].taken;
    }
    atomic_store(&pause_every, 0);
    for (unsigned n = 0; n < LOCK_KEYS; n++) {
        counted_taken += locks.taken[n];
    }
    g_assert_cmpuint(counted_taken, ==, taken);
    g_assert_true(bale_index_check(index));
    bale_index_get_stats(index, &stats);
    g_assert_cmpuint(stats.keys, ==, 0);
    g_test_message("%" G_GUINT64_FORMAT " times taken, %" G_GUINT64_FORMAT
                   " conflicts", taken, stats.insert_conflicts);
}

static void test_with_pauses(void)
{
    atomic_store(&pause_every, 200);
    stress_run(14, 1, false);
    stress_run(22, 333, false);
    atomic_store(&pause_every, 0);
}

static void test_with_pauses_without_memory(void)
{
    atomic_store(&pause_every, 200);
    stress_run(14, 1, true);
    atomic_store(&pause_every, 0);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/index-stress/one-segment", test_one_segment);
    g_test_add_func("/index-stress/many-segments", test_many_segments);
    g_test_add_func("/index-stress/memory-runs-out", test_memory_runs_out);
    g_test_add_func("/index-stress/keys-as-locks", test_keys_as_locks);
    g_test_add_func("/index-stress/with-pauses", test_with_pauses);
    g_test_add_func("/index-stress/with-pauses-without-memory",
                    test_with_pauses_without_memory);
    return g_test_run();
}
