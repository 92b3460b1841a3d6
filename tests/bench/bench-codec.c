/*
 * Measure the codec alone: compress, and decompress again, every nonzero
 * cluster of a raw image, from memory to memory, on some threads.
 *
 * The clusters are read into memory first.  Each pass hands them out in order;
 * the best and the median pass are printed, with the length of everything
 * compressed as it is and as a store keeps it (a 64-byte header for each
 * record, aligned to 16 bytes).
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <errno.h>
#include <fcntl.h>
#include <glib.h>
#include <inttypes.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "extstore/codec.h"
#include "util/memory.h"
#include "util/workers.h"

#define RECORD_HEADER_LEN 64
#define RECORD_ALIGN 16
#define PASSES_MAX 100

typedef struct Bench {
    /* Never change while threads run. */
    BaleCodec codec;
    int level;
    size_t cluster_len;
    size_t clusters;
    size_t clusters_max;
    uint8_t *data;
    /* Per cluster: compressed length, 0 for stored as it is. */
    uint32_t *lens;
    uint8_t *packed;
    bool decompress;

    atomic_size_t next;
    atomic_int failed;
} Bench;

typedef struct Scratch {
    BaleCodecContext *ctx;
    uint8_t *buf;
} Scratch;

typedef struct Job {
    BaleWork work;
    Bench *bench;
} Job;

typedef struct Pass {
    double wall_s;
    double cpu_s;
} Pass;

static bool read_image(Bench *b, const char *path, uint64_t max_len,
                       GError **errp)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    off_t end;

    if (fd < 0) {
        g_set_error(errp, G_FILE_ERROR, g_file_error_from_errno(errno),
                    "%s: %s", path, g_strerror(errno));
        return false;
    }
    end = lseek(fd, 0, SEEK_END);
    b->clusters_max = max_len / b->cluster_len;
    b->data = bale_memory_try_alloc(BALE_MEMORY_ALIGN,
                                    b->clusters_max * b->cluster_len);
    g_assert(b->data != NULL);
    for (off_t pos = 0; pos < end && b->clusters < b->clusters_max; ) {
        uint8_t *p = b->data + b->clusters * b->cluster_len;
        off_t found = lseek(fd, pos, SEEK_DATA);
        ssize_t len;

        if (found < 0) {
            break;
        }
        pos = bale_align_down(found, b->cluster_len);
        len = pread(fd, p, b->cluster_len, pos);
        if (len < 0) {
            g_set_error(errp, G_FILE_ERROR, g_file_error_from_errno(errno),
                        "%s: %s", path, g_strerror(errno));
            close(fd);
            return false;
        }
        memset(p + len, 0, b->cluster_len - len);
        if (!bale_memory_is_zero(p, b->cluster_len)) {
            b->clusters++;
        }
        pos += b->cluster_len;
    }
    close(fd);
    return true;
}

static void *scratch_new(void *opaque, unsigned worker, GError **errp)
{
    Bench *b = opaque;
    g_autofree Scratch *s = g_new0(Scratch, 1);

    s->ctx = bale_codec_context_new(b->codec, b->level, b->cluster_len, errp);
    if (s->ctx == NULL) {
        return NULL;
    }
    s->buf = bale_memory_try_alloc(BALE_MEMORY_ALIGN, b->cluster_len);
    g_assert(s->buf != NULL);
    return g_steal_pointer(&s);
}

static void scratch_free(void *context)
{
    Scratch *s = context;

    bale_codec_context_free(s->ctx);
    bale_memory_free(s->buf);
    g_free(s);
}

static void do_cluster(Bench *b, Scratch *s, size_t i)
{
    uint8_t *plain = b->data + i * b->cluster_len;
    uint8_t *packed = b->packed + i * b->cluster_len;

    if (!b->decompress) {
        ssize_t len = bale_codec_compress(s->ctx, packed, b->cluster_len - 1,
                                          plain, b->cluster_len);

        if (len < 0) {
            b->failed = -len;
        } else {
            b->lens[i] = len;
        }
        return;
    }
    if (b->lens[i] == 0) {
        memcpy(s->buf, plain, b->cluster_len);
    } else if (bale_codec_decompress(s->ctx, b->codec, s->buf,
                                     b->cluster_len, packed, b->lens[i]) != 0) {
        b->failed = EIO;
    }
}

static void work_run(BaleWork *work, void *context, unsigned worker)
{
    Job *job = (Job *)((char *)work - offsetof(Job, work));
    Bench *b = job->bench;
    size_t i;

    while ((i = atomic_fetch_add(&b->next, 1)) < b->clusters) {
        do_cluster(b, context, i);
    }
}

static double cpu_seconds(void)
{
    struct rusage usage;

    getrusage(RUSAGE_SELF, &usage);
    return usage.ru_utime.tv_sec + usage.ru_utime.tv_usec / 1e6 +
        usage.ru_stime.tv_sec + usage.ru_stime.tv_usec / 1e6;
}

static Pass run_pass(Bench *b, BaleWorkers *pool, Job *jobs)
{
    gint64 start = g_get_monotonic_time();
    double cpu = cpu_seconds();

    b->next = 0;
    for (unsigned i = 0; i < bale_workers_threads(pool); i++) {
        jobs[i] = (Job) { .work.fn = work_run, .bench = b };
        bale_workers_push(pool, &jobs[i].work, BALE_WORK_NORMAL);
    }
    bale_workers_drain(pool);
    return (Pass) {
        .wall_s = (g_get_monotonic_time() - start) / 1e6,
        .cpu_s = cpu_seconds() - cpu,
    };
}

static int compare_passes(const void *a, const void *b)
{
    const Pass *x = a;
    const Pass *y = b;

    return (x->wall_s > y->wall_s) - (x->wall_s < y->wall_s);
}

static void report(Bench *b, BaleWorkers *pool, Pass *passes, int count)
{
    double bytes = (double)b->clusters * b->cluster_len;
    uint64_t packed = 0;
    uint64_t stored = 0;
    size_t raw = 0;

    for (size_t i = 0; i < b->clusters; i++) {
        uint64_t len = b->lens[i] == 0 ? b->cluster_len : b->lens[i];

        raw += b->lens[i] == 0;
        packed += len;
        stored += bale_align_up(RECORD_HEADER_LEN + len, RECORD_ALIGN);
    }
    qsort(passes, count, sizeof(passes[0]), compare_passes);
    printf("%-10s %-7s level %3d  threads %u  best %7.1f MB/s  median %7.1f "
           "MB/s  per core %6.1f MB/s  %.2f MB -> %.2f MB, records %.2f MB, "
           "%zu of %zu clusters stored raw\n",
           b->decompress ? "decompress" : "compress",
           bale_codec_name(b->codec), b->level, bale_workers_threads(pool),
           bytes / passes[0].wall_s / 1e6,
           bytes / passes[count / 2].wall_s / 1e6,
           bytes / passes[0].cpu_s / 1e6, bytes / 1e6, packed / 1e6,
           stored / 1e6, raw, b->clusters);
    fflush(stdout);
}

static bool run(Bench *b, int threads, int count, GError **errp)
{
    g_autoptr(BaleWorkers) pool =
        bale_workers_new("bench", threads, scratch_new, scratch_free, b, errp);
    g_autofree Job *jobs = NULL;
    Pass passes[PASSES_MAX];

    if (pool == NULL) {
        return false;
    }
    jobs = g_new0(Job, bale_workers_threads(pool));
    for (int mode = 0; mode < 2; mode++) {
        b->decompress = mode == 1;
        for (int i = 0; i < count; i++) {
            passes[i] = run_pass(b, pool, jobs);
        }
        if (b->failed != 0) {
            g_set_error(errp, G_FILE_ERROR, g_file_error_from_errno(b->failed),
                        "the codec failed: %s", g_strerror(b->failed));
            return false;
        }
        report(b, pool, passes, count);
    }
    return true;
}

int main(int argc, char **argv)
{
    g_autofree char *image = NULL;
    g_auto(GStrv) codecs = NULL;
    g_auto(GStrv) levels = NULL;
    int threads = 0;
    int count = 5;
    int cluster_kib = 64;
    int max_mib = 2048;
    const GOptionEntry entries[] = {
        { "image", 'i', 0, G_OPTION_ARG_FILENAME, &image,
          "Raw image to take clusters from", "FILE" },
        { "codec", 'c', 0, G_OPTION_ARG_STRING_ARRAY, &codecs,
          "deflate or zstd; may be repeated; both by default", "NAME" },
        { "level", 'l', 0, G_OPTION_ARG_STRING_ARRAY, &levels,
          "Level; may be repeated; the codec's default by default", "N" },
        { "threads", 't', 0, G_OPTION_ARG_INT, &threads,
          "Threads; 0 for all cores", "N" },
        { "passes", 'p', 0, G_OPTION_ARG_INT, &count, "Passes", "N" },
        { "cluster-size", 's', 0, G_OPTION_ARG_INT, &cluster_kib,
          "Cluster length in KiB", "KIB" },
        { "max-data", 'm', 0, G_OPTION_ARG_INT, &max_mib,
          "Read at most that much data", "MIB" },
        { NULL }
    };
    g_autoptr(GOptionContext) options = g_option_context_new(NULL);
    g_autoptr(GError) err = NULL;
    Bench b = { 0 };
    char *both[] = { (char *)"deflate", (char *)"zstd", NULL };
    char *usual[] = { (char *)"0", NULL };
    int ret = EXIT_FAILURE;

    g_option_context_add_main_entries(options, entries, NULL);
    if (!g_option_context_parse(options, &argc, &argv, &err)) {
        goto out;
    }
    if (image == NULL || count < 1 || count > PASSES_MAX || cluster_kib < 1 ||
        max_mib < 1 || threads < 0) {
        g_set_error(&err, G_OPTION_ERROR, G_OPTION_ERROR_BAD_VALUE,
                    "usage: bench-codec --image FILE (see --help)");
        goto out;
    }
    b.cluster_len = (size_t)cluster_kib << 10;
    if (!read_image(&b, image, (uint64_t)max_mib << 20, &err)) {
        goto out;
    }
    b.lens = g_new0(uint32_t, b.clusters);
    b.packed = bale_memory_try_alloc0(BALE_MEMORY_ALIGN,
                                      MAX(b.clusters, 1) * b.cluster_len);
    g_assert(b.packed != NULL);
    for (char **c = codecs != NULL ? codecs : both; *c != NULL; c++) {
        if (!bale_codec_from_name(*c, &b.codec, &err)) {
            goto out;
        }
        for (char **l = levels != NULL ? levels : usual; *l != NULL; l++) {
            b.level = atoi(*l);
            if (!run(&b, threads, count, &err)) {
                goto out;
            }
        }
    }
    ret = EXIT_SUCCESS;

out:
    if (err != NULL) {
        fprintf(stderr, "bench-codec: %s\n", err->message);
    }
    bale_memory_free(b.data);
    bale_memory_free(b.packed);
    g_free(b.lens);
    return ret;
}
