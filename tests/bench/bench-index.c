/*
 * Measure the hash index alone: time per operation, memory, and the longest
 * stall of any operation while it grows.
 *
 *   bench-index [KEYS]             (default 16777216: 1 TiB of 64 KiB clusters)
 *
 * Times are wall times of one thread over many operations on random keys, so
 * nearly all of them miss the caches when the index is large.  Stalls are the
 * longest single operations of threads that write and read while the number
 * of keys goes up eightfold; the same threads over an index that does not grow
 * show what of that is the noise of this machine, and the longest time that a
 * thread itself worked on one operation is free of most of it.  Prints one
 * JSON object.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "util/index.h"

#define DEFAULT_KEYS (UINT64_C(1) << 24)
#define SMALL_KEYS 100000
#define PASSES 3
#define LOOKUPS 4000000
#define STALL_WRITERS 2
#define STALL_READERS 1
#define STALL_BEGIN_KEYS (UINT64_C(1) << 21)
#define STALL_DOUBLINGS 3

static uint64_t now_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static uint64_t random_next(uint64_t *state)
{
    uint64_t x = *state;

    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    return *state = x;
}

static unsigned bits_for(uint64_t keys)
{
    unsigned bits = 1;

    while (UINT64_C(1) << bits < keys) {
        bits++;
    }
    return bits;
}

/* What this thread has worked: time in which another one ran does not count. */
static uint64_t cpu_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (uint64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static double mib(uint64_t bytes)
{
    return bytes / 1048576.0;
}

/* @stride keys of the key space lie between two that are used. */
static void fill(BaleIndex *index, BaleEpoch *e, uint64_t keys,
                 uint64_t stride)
{
    for (uint64_t k = 0; k < keys; k++) {
        if (bale_index_update(index, k * stride, 0, k + 1, NULL) != 0) {
            fprintf(stderr, "bench-index: no memory\n");
            exit(1);
        }
        if (k % 1024 == 0) {
            bale_epoch_poll(e);
        }
    }
}

static bool visit_count(uint64_t key, uint64_t value, void *opaque)
{
    ++*(uint64_t *)opaque;
    return true;
}

typedef struct Times {
    double fill_ns;
    double find_ns;
    double absent_ns;
    double update_ns;
    double walk_ns;
} Times;

static double smaller(double best, double now)
{
    return best == 0 || now < best ? now : best;
}

/* Print memory and times of one way to fill an index. */
static Times measure(const char *name, uint64_t keys, uint64_t stride,
                     bool in_advance)
{
    g_autoptr(BaleEpoch) e = bale_epoch_new();
    unsigned key_bits = bits_for(keys * stride);
    g_autoptr(BaleIndex) index = bale_index_new(key_bits,
                                                in_advance ? keys : 0, e);
    uint64_t histogram[BALE_INDEX_HISTOGRAM_SIZE];
    uint64_t random = 88172645463325252, begin = now_ns(), visited, sum = 0;
    Times times = { 0 };
    BaleIndexStats stats;

    fill(index, e, keys, stride);
    times.fill_ns = (double)(now_ns() - begin) / keys;
    for (unsigned pass = 0; pass < PASSES; pass++) {
        begin = now_ns();
        for (unsigned i = 0; i < LOOKUPS; i++) {
            sum += bale_index_find(index, random_next(&random) % keys *
                                          stride);
        }
        times.find_ns = smaller(times.find_ns,
                                (double)(now_ns() - begin) / LOOKUPS);
        begin = now_ns();
        for (unsigned i = 0; i < LOOKUPS && stride > 1; i++) {
            sum += bale_index_find(index, random_next(&random) % keys *
                                          stride + 1);
        }
        times.absent_ns = smaller(times.absent_ns,
                                  (double)(now_ns() - begin) / LOOKUPS);
        begin = now_ns();
        for (unsigned i = 0; i < LOOKUPS; i++) {
            uint64_t old;

            bale_index_set(index, random_next(&random) % keys * stride, i + 1,
                           &old);
            sum += old;
        }
        times.update_ns = smaller(times.update_ns,
                                  (double)(now_ns() - begin) / LOOKUPS);
        visited = 0;
        begin = now_ns();
        bale_index_foreach(index, visit_count, &visited);
        times.walk_ns = smaller(times.walk_ns,
                                (double)(now_ns() - begin) / visited);
    }
    bale_epoch_drain(e);
    bale_index_get_stats(index, &stats);
    bale_index_get_histogram(index, histogram);
    printf("  \"%s\": {\"keys\": %" PRIu64 ", \"key_bits\": %u,\n"
           "    \"mib\": %.1f, \"peak_mib\": %.1f, \"bytes_per_key\": %.2f,\n"
           "    \"buckets\": %" PRIu64 ", \"overflow_buckets\": %" PRIu64 ",\n"
           "    \"growths\": %" PRIu64 ", \"rebuilds\": %" PRIu64 ",\n"
           "    \"fill_ns\": %.1f, \"find_ns\": %.1f, \"find_absent_ns\": "
           "%.1f,\n    \"set_ns\": %.1f, \"walk_ns\": %.1f, \"checksum\": %"
           PRIu64 ",\n    \"histogram\": [",
           name, keys, key_bits, mib(stats.bytes), mib(stats.peak_bytes),
           (double)stats.bytes / keys, stats.buckets, stats.overflow_buckets,
           stats.growths, stats.rebuilds, times.fill_ns, times.find_ns,
           times.absent_ns, times.update_ns, times.walk_ns, sum);
    for (unsigned i = 0; i < BALE_INDEX_HISTOGRAM_SIZE; i++) {
        printf("%s%" PRIu64, i ? ", " : "", histogram[i]);
    }
    printf("]},\n");
    fflush(stdout);
    return times;
}

/* Stalls */

typedef struct Stall {
    BaleIndex *index;
    BaleEpoch *epoch;
    bool insert;                /* else: change what is there */
    atomic_uint_fast64_t next;
    atomic_bool done;
} Stall;

typedef struct Longest {
    Stall *stall;
    uint64_t begin_ns;
    uint64_t begin_cpu_ns;
    uint64_t longest_ns;
    uint64_t longest_cpu_ns;
    uint64_t operations;
    uint64_t over_1ms;
    uint64_t total_cpu_ns;
} Longest;

static void operation_begin(Longest *l)
{
    l->begin_ns = now_ns();
    l->begin_cpu_ns = cpu_ns();
}

static void operation_end(Longest *l)
{
    uint64_t cpu = cpu_ns() - l->begin_cpu_ns;
    uint64_t ns = now_ns() - l->begin_ns;

    l->longest_ns = MAX(l->longest_ns, ns);
    l->longest_cpu_ns = MAX(l->longest_cpu_ns, cpu);
    l->over_1ms += ns > 1000000;
    l->operations++;
    l->total_cpu_ns += cpu;
}

/*
 * Key @i of the @round-th set: each set is spread over all segments, as random
 * writes would be, so that all of them grow at the same time.
 */
static uint64_t stall_key(uint64_t i, uint64_t round)
{
    uint64_t scattered = i * 0x9e3779b1 % STALL_BEGIN_KEYS;

    return (scattered << STALL_DOUBLINGS | round) * 2;
}

static void *stall_writer(void *opaque)
{
    Longest *l = opaque;
    Stall *s = l->stall;

    for (;;) {
        uint64_t i = atomic_fetch_add(&s->next, 1);
        uint64_t round = i / STALL_BEGIN_KEYS + 1;

        if (round >= 1 << STALL_DOUBLINGS) {
            break;
        }
        operation_begin(l);
        bale_index_set(s->index, stall_key(i, s->insert ? round : 0), i + 1,
                       NULL);
        operation_end(l);
        if (i % 1024 == 0) {
            /* This is a maintenance thread's work, and not counted. */
            bale_epoch_poll(s->epoch);
        }
    }
    atomic_store(&s->done, true);
    return NULL;
}

static void *stall_reader(void *opaque)
{
    Longest *l = opaque;
    Stall *s = l->stall;
    uint64_t random = 88172645463325252;

    while (!atomic_load(&s->done)) {
        uint64_t i = random_next(&random) >> STALL_DOUBLINGS;

        operation_begin(l);
        bale_index_find(s->index, stall_key(i, random & 7));
        operation_end(l);
    }
    return NULL;
}

static void measure_stalls(const char *name, bool insert, const char *end)
{
    g_autoptr(BaleEpoch) e = bale_epoch_new();
    g_autoptr(BaleIndex) index =
        bale_index_new(bits_for(STALL_BEGIN_KEYS << STALL_DOUBLINGS) + 1, 0,
                       e);
    Stall s = { .index = index, .epoch = e, .insert = insert };
    Longest l[STALL_WRITERS + STALL_READERS] = { 0 };
    pthread_t threads[STALL_WRITERS + STALL_READERS];
    BaleIndexStats before, after;

    for (uint64_t i = 0; i < STALL_BEGIN_KEYS; i++) {
        bale_index_set(index, stall_key(i, 0), 1, NULL);
    }
    while (bale_index_grow_step(index)) {
        bale_epoch_poll(e);
    }
    bale_epoch_drain(e);
    bale_index_get_stats(index, &before);
    for (unsigned i = 0; i < G_N_ELEMENTS(l); i++) {
        l[i].stall = &s;
        pthread_create(&threads[i], NULL,
                       i < STALL_WRITERS ? stall_writer : stall_reader, &l[i]);
    }
    for (unsigned i = 0; i < G_N_ELEMENTS(l); i++) {
        pthread_join(threads[i], NULL);
    }
    bale_epoch_drain(e);
    bale_index_get_stats(index, &after);
    printf("  \"%s\": {\"growths\": %" PRIu64 ", \"chunks\": %" PRIu64
           ", \"waits\": %" PRIu64 ", \"peak_mib\": %.1f, \"mib\": %.1f,\n",
           name, after.growths - before.growths,
           after.chunks_moved - before.chunks_moved,
           after.waits - before.waits, mib(after.peak_bytes),
           mib(after.bytes));
    for (unsigned i = 0; i < G_N_ELEMENTS(l); i++) {
        printf("    \"%s%u\": {\"operations\": %" PRIu64
               ", \"mean_cpu_ns\": %.1f, "
               "\"longest_us\": %.1f, \"longest_cpu_us\": %.1f, "
               "\"over_1ms\": %" PRIu64 "}%s\n",
               i < STALL_WRITERS ? "write" : "read", i, l[i].operations,
               (double)l[i].total_cpu_ns / MAX(l[i].operations, 1),
               l[i].longest_ns / 1e3, l[i].longest_cpu_ns / 1e3, l[i].over_1ms,
               i + 1 < G_N_ELEMENTS(l) ? "," : "}");
    }
    printf("%s", end);
    fflush(stdout);
}

int main(int argc, char **argv)
{
    uint64_t keys = argc > 1 ? strtoull(argv[1], NULL, 0) : DEFAULT_KEYS;
    Times small, large;

    if (keys < SMALL_KEYS || bits_for(keys * 4) > BALE_INDEX_KEY_BITS_MAX) {
        fprintf(stderr, "bench-index: KEYS is at least %d\n", SMALL_KEYS);
        return 1;
    }
    printf("{\n");
    small = measure("small", SMALL_KEYS, 2, true);
    large = measure("in_advance", keys, 1, true);
    measure("in_advance_half_full", keys, 2, true);
    measure("grown", keys, 1, false);
    measure("grown_sparse", keys, 3, false);
    printf("  \"large_to_small\": {\"fill\": %.2f, \"find\": %.2f, \"set\": "
           "%.2f},\n", large.fill_ns / small.fill_ns,
           large.find_ns / small.find_ns, large.update_ns / small.update_ns);
    measure_stalls("stalls_without_growth", false, ",\n");
    measure_stalls("stalls_while_growing", true, "}\n");
    return 0;
}
