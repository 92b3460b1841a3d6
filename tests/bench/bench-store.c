/*
 * What a store of many clusters costs: one step of the benchmark "scale" a run.
 *
 *     bench-store fill FILE CLUSTERS SIZE [RANDOM]
 *                                           create it, write all clusters
 *     bench-store open FILE [1]             open and close; 1: only open it
 *     bench-store scan FILE                 damage both checkpoints; open by a
 *                                           scan of all pages, and close
 *     bench-store random FILE OPS           random writes, then random reads
 *     bench-store kill FILE OPS             random writes, flush, SIGKILL
 *     bench-store grow FILE CLUSTERS SIZE   each write's time, while the index
 *                                           grows, and again when it does not
 *     bench-store compact FILE [1]          drop every second cluster, compact;
 *                                           1: and read meanwhile
 *
 * SIZE is that of a cluster, bytes, of which RANDOM (else a few) do not
 * compress: so it is the number of clusters that costs, not their bytes.
 * Prints one object
 * of JSON; seconds are wall-clock, cpu is that of the whole process.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include "../../block/extstore/store-internal.h"

#define IN_FLIGHT 64u
#define REQUEST_LEN (1u << 20)
/* Random writes, then random reads, of "random" are measured in rounds. */
#define ROUNDS 5u

typedef struct Bench {
    const char *path;
    BaleStore *store;
    BaleImage *image;
    BaleStoreInfo info;
    uint64_t clusters;
    double open_s;
    uint64_t rand;
    uint64_t noise; /* RANDOM */
} Bench;

typedef struct Slot {
    struct Bench *bench;
    struct iovec iov;
    uint64_t start_ns;
    struct Queue *queue;
    struct Slot *next;
} Slot;

/* Requests under way; the caller waits when there are IN_FLIGHT. */
typedef struct Queue {
    pthread_mutex_t lock;
    pthread_cond_t cond;
    Slot slots[IN_FLIGHT];
    Slot *free;
    unsigned busy;
    uint64_t longest_ns;
} Queue;

static uint64_t now_ns(clockid_t clock)
{
    struct timespec ts;

    clock_gettime(clock, &ts);
    return ts.tv_sec * UINT64_C(1000000000) + ts.tv_nsec;
}

static double seconds_since(uint64_t start, clockid_t clock)
{
    return (now_ns(clock) - start) / 1e9;
}

static uint64_t bench_rand(Bench *b)
{
    b->rand = b->rand * UINT64_C(6364136223846793005) +
              UINT64_C(1442695040888963407);
    return b->rand >> 20;
}

G_GNUC_NORETURN static void die(const char *what, GError *err)
{
    fprintf(stderr, "bench-store: %s%s%s\n", what, err ? ": " : "",
            err ? err->message : "");
    exit(1);
}

/* --- requests --- */

static Queue *queue_new(Bench *b, size_t len)
{
    Queue *q = g_new0(Queue, 1);

    pthread_mutex_init(&q->lock, NULL);
    pthread_cond_init(&q->cond, NULL);
    for (unsigned i = 0; i < IN_FLIGHT; i++) {
        q->slots[i] = (Slot){ b, { g_malloc(len), len }, 0, q, q->free };
        q->free = &q->slots[i];
    }
    return q;
}

static void slot_done(void *opaque, int ret)
{
    Slot *slot = opaque;
    Queue *q = slot->queue;
    uint64_t ns = now_ns(CLOCK_MONOTONIC) - slot->start_ns;

    if (ret < 0) {
        die(strerror(-ret), NULL);
    }
    pthread_mutex_lock(&q->lock);
    q->longest_ns = MAX(q->longest_ns, ns);
    slot->next = q->free;
    q->free = slot;
    q->busy--;
    pthread_cond_signal(&q->cond);
    pthread_mutex_unlock(&q->lock);
}

static Slot *queue_get(Queue *q, unsigned depth)
{
    Slot *slot;

    pthread_mutex_lock(&q->lock);
    while (q->busy >= depth) {
        pthread_cond_wait(&q->cond, &q->lock);
    }
    slot = q->free;
    q->free = slot->next;
    q->busy++;
    pthread_mutex_unlock(&q->lock);
    slot->start_ns = now_ns(CLOCK_MONOTONIC);
    return slot;
}

static void queue_free(Queue *q)
{
    pthread_mutex_lock(&q->lock);
    while (q->busy) {
        pthread_cond_wait(&q->cond, &q->lock);
    }
    pthread_mutex_unlock(&q->lock);
    for (unsigned i = 0; i < IN_FLIGHT; i++) {
        g_free(q->slots[i].iov.iov_base);
    }
    g_free(q);
}

/* No cluster is like another, none is zero, all are small when packed. */
static void fill(uint8_t *buf, uint64_t cluster, size_t len, size_t size)
{
    for (size_t at = 0; at < len; at += size, cluster++) {
        memset(buf + at, (int)(cluster % 255) + 1, size);
        memcpy(buf + at, &cluster, sizeof(cluster));
    }
}

static void write_cluster(Bench *b, Queue *q, uint64_t cluster,
                          unsigned depth)
{
    uint32_t size = b->info.cluster_size;
    Slot *slot = queue_get(q, depth);

    fill(slot->iov.iov_base, cluster, slot->iov.iov_len, size);
    bale_image_write(b->image, cluster * size, &slot->iov, 1, 0, slot_done,
                     slot);
}

static void bench_flush(Bench *b)
{
    int ret = bale_store_flush_sync(b->store);

    if (ret < 0) {
        die(strerror(-ret), NULL);
    }
}

/* --- opening and closing --- */

static BaleDevice *bench_device(const char *path, unsigned flags)
{
    GError *err = NULL;
    BaleDevice *dev = bale_device_aio_open(path, flags, &err);

    if (!dev) {
        die(path, err);
    }
    return dev;
}

static void bench_create(const char *path, uint64_t clusters, uint32_t size)
{
    GError *err = NULL;
    BaleCreateOptions o = {
        .size = clusters * size,
        .cluster_size = size,
        .codec = BALE_CODEC_ZSTD,
    };
    BaleDevice *dev = bench_device(path, BALE_DEVICE_CREATE |
                                             BALE_DEVICE_TRUNCATE);

    if (!bale_store_create(dev, &o, &err)) {
        die("create", err);
    }
    bale_device_close(dev);
}

static void bench_open(Bench *b, uint64_t cache_size)
{
    GError *err = NULL;
    BaleOpenOptions o = { .cache_size = cache_size };
    BaleDevice *dev = bench_device(b->path, 0);
    uint64_t start = now_ns(CLOCK_MONOTONIC);

    b->store = bale_store_open(dev, &o, &err);
    if (!b->store) {
        die("open", err);
    }
    b->image = bale_image_open(b->store, NULL, &err);
    if (!b->image) {
        die("image", err);
    }
    b->open_s = seconds_since(start, CLOCK_MONOTONIC);
    bale_store_get_info(b->store, &b->info);
    b->clusters = bale_image_size(b->image) / b->info.cluster_size;
    b->rand = 42;
}

static double bench_close(Bench *b)
{
    GError *err = NULL;
    uint64_t start = now_ns(CLOCK_MONOTONIC);

    bale_image_close(b->image);
    if (!bale_store_close(b->store, &err)) {
        die("close", err);
    }
    return seconds_since(start, CLOCK_MONOTONIC);
}

static void print_stats(Bench *b)
{
    BaleStoreStats s;
    struct rusage usage;

    bale_store_get_stats(b->store, &s);
    getrusage(RUSAGE_SELF, &usage);
    printf(", \"clusters\": %" G_GUINT64_FORMAT
           ", \"cluster_size\": %u, \"index_bytes\": %" G_GUINT64_FORMAT
           ", \"index_peak_bytes\": %" G_GUINT64_FORMAT
           ", \"index_growths\": %" G_GUINT64_FORMAT
           ", \"used_bytes\": %" G_GUINT64_FORMAT ", \"rss_mib\": %ld"
           ", \"open_s\": %.4f, \"clean\": %s, \"recovered\": %"
           G_GUINT64_FORMAT,
           s.index_entries, b->info.cluster_size, s.index_bytes,
           s.index_peak_bytes, s.index_growths, s.used_bytes,
           usage.ru_maxrss / 1024, b->open_s,
           b->info.clean ? "true" : "false", b->info.recovered_records);
}

/* --- the steps --- */

static void run_fill(Bench *b, uint64_t clusters, uint32_t size)
{
    uint64_t start, cpu;
    double fill_s, cpu_s;
    Queue *q;

    bench_create(b->path, clusters, size);
    bench_open(b, 0);
    q = queue_new(b, MAX(REQUEST_LEN, size));
    start = now_ns(CLOCK_MONOTONIC);
    cpu = now_ns(CLOCK_PROCESS_CPUTIME_ID);
    for (uint64_t at = 0; at < clusters;) {
        Slot *slot = queue_get(q, 8);
        uint64_t n = MIN(clusters - at, MAX(REQUEST_LEN / size, 1));

        slot->iov.iov_len = n * size;
        fill(slot->iov.iov_base, at, slot->iov.iov_len, size);
        for (uint64_t i = 0; i < n; i++) {
            uint64_t *words = (uint64_t *)((uint8_t *)slot->iov.iov_base +
                                           i * size);

            for (uint64_t w = 1; w < MIN(b->noise, size) / 8; w++) {
                words[w] = bench_rand(b) ^ bench_rand(b) << 40;
            }
        }
        bale_image_write(b->image, at * size, &slot->iov, 1, 0, slot_done,
                         slot);
        at += n;
    }
    queue_free(q);
    bench_flush(b);
    fill_s = seconds_since(start, CLOCK_MONOTONIC);
    cpu_s = seconds_since(cpu, CLOCK_PROCESS_CPUTIME_ID);
    printf("{\"fill_s\": %.3f, \"fill_cpu_s\": %.3f", fill_s, cpu_s);
    print_stats(b);
    printf(", \"close_s\": %.3f}\n", bench_close(b));
}

static void run_open(Bench *b, bool leave)
{
    uint8_t *buf;
    uint64_t start;
    double first_s;

    bench_open(b, 0);
    buf = g_malloc(b->info.cluster_size);
    start = now_ns(CLOCK_MONOTONIC);
    if (bale_image_read_sync(b->image, 0, buf, b->info.cluster_size) < 0) {
        die("the first read", NULL);
    }
    first_s = seconds_since(start, CLOCK_MONOTONIC);
    printf("{\"first_read_s\": %.4f", first_s);
    print_stats(b);
    if (leave) {
        printf("}\n");
        fflush(stdout);
        _exit(0);
    }
    printf(", \"close_s\": %.3f}\n", bench_close(b));
    g_free(buf);
}

/* The roots of the checkpoints that any copy of the superblock names. */
static void damage_checkpoints(const char *path)
{
    g_autofree uint8_t *block = g_malloc(BALE_BLOCK_SIZE);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    BaleSuper super;

    if (fd < 0) {
        die(path, NULL);
    }
    for (unsigned copy = 0; copy < BALE_SUPER_COPIES; copy++) {
        ssize_t n = pread(fd, block, BALE_BLOCK_SIZE,
                          bale_super_address(copy));

        if (n != BALE_BLOCK_SIZE ||
            bale_super_decode(&super, copy, block, NULL) < 0) {
            die("a superblock", NULL);
        }
        for (unsigned i = 0; i < 2; i++) {
            uint64_t at = i ? super.previous.address
                            : super.checkpoint.address;

            if (at && pwrite(fd, "damage", 6, at) != 6) {
                die("damaging a checkpoint", NULL);
            }
        }
    }
    close(fd);
}

static void run_random(Bench *b, uint64_t ops)
{
    Queue *q;
    uint8_t *buf;

    bench_open(b, 0);
    q = queue_new(b, b->info.cluster_size);
    buf = g_malloc(b->info.cluster_size);
    printf("{\"rounds\": [");
    for (unsigned round = 0; round < ROUNDS; round++) {
        uint64_t start = now_ns(CLOCK_MONOTONIC);
        uint64_t cpu = now_ns(CLOCK_PROCESS_CPUTIME_ID);
        double write_s, write_cpu_s, read_s, read_cpu_s;

        for (uint64_t i = 0; i < ops; i++) {
            write_cluster(b, q, bench_rand(b) % b->clusters, IN_FLIGHT);
        }
        bench_flush(b);
        write_s = seconds_since(start, CLOCK_MONOTONIC);
        write_cpu_s = seconds_since(cpu, CLOCK_PROCESS_CPUTIME_ID);

        start = now_ns(CLOCK_MONOTONIC);
        cpu = now_ns(CLOCK_PROCESS_CPUTIME_ID);
        for (uint64_t i = 0; i < ops; i++) {
            Slot *slot = queue_get(q, IN_FLIGHT);

            bale_image_read(b->image, (bench_rand(b) % b->clusters) *
                                          b->info.cluster_size,
                            &slot->iov, 1, slot_done, slot);
        }
        while (true) {
            bool idle;

            pthread_mutex_lock(&q->lock);
            idle = q->busy == 0;
            pthread_mutex_unlock(&q->lock);
            if (idle) {
                break;
            }
            usleep(100);
        }
        read_s = seconds_since(start, CLOCK_MONOTONIC);
        read_cpu_s = seconds_since(cpu, CLOCK_PROCESS_CPUTIME_ID);
        printf("%s{\"write_us\": %.3f, \"write_cpu_us\": %.3f, "
               "\"read_us\": %.3f, \"read_cpu_us\": %.3f}", round ? ", " : "",
               write_s / ops * 1e6, write_cpu_s / ops * 1e6,
               read_s / ops * 1e6, read_cpu_s / ops * 1e6);
    }
    printf("]");
    queue_free(q);
    print_stats(b);
    printf(", \"close_s\": %.3f}\n", bench_close(b));
    g_free(buf);
}

static void run_kill(Bench *b, uint64_t ops)
{
    Queue *q;

    bench_open(b, 0);
    q = queue_new(b, b->info.cluster_size);
    for (uint64_t i = 0; i < ops; i++) {
        write_cluster(b, q, bench_rand(b) % b->clusters, IN_FLIGHT);
    }
    queue_free(q);
    bench_flush(b);
    printf("{\"tail\": %" G_GUINT64_FORMAT "}\n", ops);
    fflush(stdout);
    kill(getpid(), SIGKILL);
}

static int compare_ns(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

    return (x > y) - (x < y);
}

/* One write at a time; the longest, and the 99.99th percentile, of @n. */
static void grow_pass(Bench *b, uint64_t n, const char *name)
{
    uint32_t size = b->info.cluster_size;
    uint64_t *ns = g_new(uint64_t, n);
    uint8_t *buf = g_malloc(size);

    for (uint64_t i = 0; i < n; i++) {
        uint64_t start;

        fill(buf, i, size, size);
        start = now_ns(CLOCK_MONOTONIC);
        if (bale_image_write_sync(b->image, i * size, buf, size, 0) < 0) {
            die("write", NULL);
        }
        ns[i] = now_ns(CLOCK_MONOTONIC) - start;
    }
    bench_flush(b);
    qsort(ns, n, sizeof(ns[0]), compare_ns);
    printf("\"%s\": {\"median_us\": %.1f, \"p99_us\": %.1f, "
           "\"p9999_us\": %.1f, \"longest_us\": %.1f}, ", name,
           ns[n / 2] / 1e3, ns[n - n / 100 - 1] / 1e3,
           ns[n - n / 10000 - 1] / 1e3, ns[n - 1] / 1e3);
    g_free(ns);
    g_free(buf);
}

static void run_grow(Bench *b, uint64_t clusters, uint32_t size)
{
    bench_create(b->path, clusters, size);
    bench_open(b, 0);
    printf("{");
    grow_pass(b, clusters, "growing");
    grow_pass(b, clusters, "grown");
    printf("\"n\": 1");
    print_stats(b);
    printf(", \"close_s\": %.3f}\n", bench_close(b));
}

/* --- compaction --- */

typedef struct Foreground {
    Bench *bench;
    int stop;       /* atomic */
    uint64_t *ns;
    uint64_t n, max;
} Foreground;

static void *foreground_main(void *opaque)
{
    Foreground *f = opaque;
    Bench *b = f->bench;
    uint32_t size = b->info.cluster_size;
    uint8_t *buf = g_malloc(size);

    while (!__atomic_load_n(&f->stop, __ATOMIC_RELAXED) && f->n < f->max) {
        uint64_t start = now_ns(CLOCK_MONOTONIC);

        if (bale_image_read_sync(b->image,
                                 (bench_rand(b) % b->clusters) * size, buf,
                                 MIN(size, 4096)) < 0) {
            die("read", NULL);
        }
        f->ns[f->n++] = now_ns(CLOCK_MONOTONIC) - start;
    }
    g_free(buf);
    return NULL;
}

static void foreground_print(Foreground *f, const char *name)
{
    qsort(f->ns, f->n, sizeof(f->ns[0]), compare_ns);
    printf("\"%s\": {\"reads\": %" G_GUINT64_FORMAT
           ", \"median_us\": %.1f, \"p99_us\": %.1f}, ", name, f->n,
           f->n ? f->ns[f->n / 2] / 1e3 : 0.0,
           f->n ? f->ns[f->n - f->n / 100 - 1] / 1e3 : 0.0);
}

/*
 * Every second cluster of a filled store is dropped, then what is left is
 * compacted while somebody reads.
 */
static void run_compact(Bench *b, bool busy)
{
    GError *err = NULL;
    BaleCompactOptions o = { 0 };
    BaleStoreStats before, after;
    Foreground f = { .bench = b, .max = 10000000 };
    struct rusage usage;
    pthread_t thread;
    uint64_t start;
    long rss;
    double s;

    bench_open(b, 0);
    f.ns = g_new(uint64_t, f.max);
    printf("{");
    if (busy) {
        pthread_create(&thread, NULL, foreground_main, &f);
        usleep(2000000);
        __atomic_store_n(&f.stop, 1, __ATOMIC_RELAXED);
        pthread_join(thread, NULL);
        foreground_print(&f, "reads_alone");
        f.n = 0;
        f.stop = 0;
    }
    getrusage(RUSAGE_SELF, &usage);
    rss = usage.ru_maxrss;
    bale_store_get_stats(b->store, &before);
    if (busy) {
        pthread_create(&thread, NULL, foreground_main, &f);
    }
    for (uint64_t i = 0; i < b->clusters; i += 2) {
        if (bale_image_zero_sync(b->image, i * b->info.cluster_size,
                                 b->info.cluster_size, BALE_DISCARD) < 0) {
            die("discard", NULL);
        }
    }
    bench_flush(b);
    start = now_ns(CLOCK_MONOTONIC);
    if (!bale_store_compact(b->store, &o, &err)) {
        die("compact", err);
    }
    s = seconds_since(start, CLOCK_MONOTONIC);
    if (busy) {
        __atomic_store_n(&f.stop, 1, __ATOMIC_RELAXED);
        pthread_join(thread, NULL);
        foreground_print(&f, "reads_meanwhile");
    }
    bale_store_get_stats(b->store, &after);
    getrusage(RUSAGE_SELF, &usage);
    printf("\"compact_s\": %.3f, \"examined_bytes\": %" G_GUINT64_FORMAT
           ", \"copied_bytes\": %" G_GUINT64_FORMAT
           ", \"added_mib\": %.1f, \"used_before\": %" G_GUINT64_FORMAT, s,
           after.compact_examined_bytes - before.compact_examined_bytes,
           after.compacted_bytes - before.compacted_bytes,
           (usage.ru_maxrss - rss) / 1024.0, before.used_bytes);
    print_stats(b);
    printf(", \"close_s\": %.3f}\n", bench_close(b));
}

int main(int argc, char **argv)
{
    const char *step = argc > 2 ? argv[1] : "";
    uint64_t n = argc > 3 ? g_ascii_strtoull(argv[3], NULL, 0) : 0;
    uint64_t size = argc > 4 ? g_ascii_strtoull(argv[4], NULL, 0) : 0;
    Bench b = {
        .path = argc > 2 ? argv[2] : NULL,
        .noise = argc > 5 ? g_ascii_strtoull(argv[5], NULL, 0) : 0,
    };

    if (!strcmp(step, "fill") && n && size) {
        run_fill(&b, n, size);
    } else if (!strcmp(step, "open")) {
        run_open(&b, n);
    } else if (!strcmp(step, "scan")) {
        damage_checkpoints(b.path);
        run_open(&b, n);
    } else if (!strcmp(step, "random") && n) {
        run_random(&b, n);
    } else if (!strcmp(step, "kill")) {
        run_kill(&b, n);
    } else if (!strcmp(step, "grow") && n && size) {
        run_grow(&b, n, size);
    } else if (!strcmp(step, "compact")) {
        run_compact(&b, n);
    } else {
        fprintf(stderr,
                "Usage: bench-store STEP FILE [NUMBER [SIZE [RANDOM]]]\n");
        return 1;
    }
    return 0;
}
