/*
 * What 4 KiB and a flush cost at queue depth 1: a store against a raw file with
 * O_DIRECT and fdatasync, interleaved, on the same file system.
 *
 *     bench-flush DIRECTORY [ROUNDS [OPERATIONS]]
 *
 * Prints JSON: for each way of going through the image, microseconds an
 * operation (one number a round) and device blocks of 4 KiB written each.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "extstore/store.h"

#define BLOCK      4096u
#define CLUSTER    65536u
#define IMAGE_SIZE (1ull << 30)

typedef enum Way { SEQUENTIAL, REWRITE, HOT, RANDOM, WAYS } Way;

static const char *way_names[WAYS] = {
    "sequential", "one block over and over", "random in 16 MiB",
    "random in 1 GiB",
};

static uint64_t place(Way way, uint64_t n)
{
    uint64_t x = (n + 1) * 0x9e3779b97f4a7c15ull;

    x ^= x >> 29;
    switch (way) {
    case SEQUENTIAL:
        return n * BLOCK % IMAGE_SIZE;
    case REWRITE:
        return 5 * BLOCK;
    case HOT:
        return x % ((16u << 20) / BLOCK) * BLOCK;
    default:
        return x % (IMAGE_SIZE / BLOCK) * BLOCK;
    }
}

/* Half of it compresses. */
static void fill(uint8_t *buf, uint64_t n)
{
    uint64_t *words = (uint64_t *)buf;

    for (unsigned i = 0; i < BLOCK / 8; i++) {
        n = n * 6364136223846793005ull + 1442695040888963407ull;
        words[i] = i % 2 ? n : i;
    }
}

static void die(const char *what, int err)
{
    fprintf(stderr, "bench-flush: %s: %s\n", what, strerror(err));
    exit(1);
}

static int raw_open(const char *dir, bool written)
{
    g_autofree char *name = g_build_filename(dir, "bench-flush.raw", NULL);
    int fd = open(name, O_RDWR | O_CREAT | O_TRUNC | O_DIRECT | O_CLOEXEC,
                  0600);

    if (fd < 0 || ftruncate(fd, IMAGE_SIZE) < 0) {
        die(name, errno);
    }
    unlink(name);
    if (written) {
        void *buf = aligned_alloc(BLOCK, 1 << 20);

        memset(buf, 1, 1 << 20);
        for (uint64_t at = 0; at < IMAGE_SIZE; at += 1 << 20) {
            if (pwrite(fd, buf, 1 << 20, at) != 1 << 20) {
                die(name, errno);
            }
        }
        fsync(fd);
        free(buf);
    }
    return fd;
}

static BaleStore *store_open(const char *dir, BaleImage **image)
{
    g_autofree char *name = g_build_filename(dir, "bench-flush.bale", NULL);
    BaleCreateOptions c = { .size = IMAGE_SIZE, .codec = BALE_CODEC_ZSTD };
    BaleOpenOptions o = { .workers = 0 };
    g_autoptr(GError) err = NULL;
    BaleDevice *dev;
    BaleStore *s;

    unlink(name);
    dev = bale_device_aio_open(name, BALE_DEVICE_CREATE, &err);
    if (!dev || !bale_store_create(dev, &c, &err) ||
        !(s = bale_store_open(dev, &o, &err))) {
        fprintf(stderr, "bench-flush: %s\n", err->message);
        exit(1);
    }
    *image = bale_image_open(s, NULL, NULL);
    unlink(name);
    return s;
}

static uint64_t device_bytes(BaleStore *s)
{
    BaleDevice *dev = bale_store_device(s);
    BaleDeviceStats stats;

    dev->ops->get_stats(dev, &stats);
    return stats.store_bytes;
}

int main(int argc, char **argv)
{
    const char *dir = argc > 1 ? argv[1] : ".";
    int rounds = argc > 2 ? atoi(argv[2]) : 5;
    int operations = argc > 3 ? atoi(argv[3]) : 500;
    uint8_t *buf = aligned_alloc(BLOCK, BLOCK);
    int raw[2] = { raw_open(dir, true), raw_open(dir, false) };

    printf("{\"rounds\": %d, \"operations\": %d, \"ways\": [", rounds,
           operations);
    for (Way way = 0; way < WAYS; way++) {
        GString *us[3] = { g_string_new(NULL), g_string_new(NULL),
                           g_string_new(NULL) };
        BaleImage *image;
        BaleStore *s = store_open(dir, &image);
        uint64_t before = device_bytes(s);

        for (int round = 0; round < rounds; round++) {
            for (int target = 0; target < 3; target++) {
                int64_t start = g_get_monotonic_time();

                for (int i = 0; i < operations; i++) {
                    uint64_t n = (uint64_t)round * operations + i;
                    uint64_t at = place(way, n);
                    int ret;

                    fill(buf, n);
                    if (target == 2) {
                        ret = bale_image_write_sync(image, at, buf, BLOCK, 0);
                        ret = ret ? ret : bale_store_flush_sync(s);
                    } else {
                        ret = pwrite(raw[target], buf, BLOCK, at) == BLOCK &&
                                      fdatasync(raw[target]) == 0
                                  ? 0
                                  : -errno;
                    }
                    if (ret < 0) {
                        die("writing", -ret);
                    }
                }
                g_string_append_printf(
                    us[target], "%s%.1f", round ? ", " : "",
                    (double)(g_get_monotonic_time() - start) / operations);
            }
        }
        printf("%s\n {\"way\": \"%s\", \"raw_written_us\": [%s], "
               "\"raw_sparse_us\": [%s], \"bale_us\": [%s], "
               "\"bale_blocks\": %.2f}", way ? "," : "", way_names[way],
               us[0]->str, us[1]->str, us[2]->str,
               (double)(device_bytes(s) - before) / BLOCK / rounds /
                   operations);
        fflush(stdout);
        bale_image_close(image);
        bale_store_close(s, NULL);
        for (int i = 0; i < 3; i++) {
            g_string_free(us[i], TRUE);
        }
    }
    printf("\n]}\n");
    free(buf);
    return 0;
}
