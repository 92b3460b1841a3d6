/*
 * A load on a store that may be killed at any moment, and the proof afterwards
 * that nothing acknowledged is lost.
 *
 *   stress create STORE STATE    make a store, and the file that remembers
 *   stress run STORE STATE       write, flush, close, reopen until killed
 *   stress verify STORE STATE    compare, and remember what is there now
 *
 * STATE is mapped by the load and says what was asked for and what was
 * acknowledged.  Memory that is mapped from a file outlives SIGKILL, so what
 * it says is exact to the last instruction.
 *
 * The image is divided among lanes, a thread each, at boundaries inside of
 * clusters.  A lane does one request at a time: each gets the next number of
 * the lane and is noted before it is submitted.  Every sector that is written
 * carries its place and the number of its write.  A flush proves all requests
 * of all lanes that had completed when it was submitted.
 *
 * Invariants
 * - ops[lane][0 .. issued) were submitted, in this order.
 * - ops[lane][0 .. durable) were proven by a flush or a close.
 * - A sector may hold its base (what was found there last), or any request to
 *   it from the newest proven one on; never what is older than that.
 *
 * Failed requests are noted as such and prove nothing.  Without --errors the
 * first one ends the program with status 1; with it a store that is poisoned is
 * revived again and again.
 *
 * Threads: a lane's fields have one writer, but for `durable`, which only
 * grows.  SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "extstore/store.h"

#define SECTOR 512u
#define LANES 8u
#define LANE_SECTORS 4099u      /* odd, so that lanes share clusters */
#define SECTORS (LANES * LANE_SECTORS)
#define OPS_MAX 16384u          /* of a lane in a session */
#define PHASE_OPS_MAX 400u      /* of a lane from open to close */
#define WRITE_SECTORS_MAX 512u
#define ERRORS_MAX 20000u       /* of a lane, before it gives up */
#define ERROR_PAUSE_US 1000     /* before a lane's next request */
#define STATE_MAGIC 0x73736572747342ull
#define ZERO_BASE UINT64_MAX    /* base of a sector that reads as zeroes */

typedef enum OpKind {
    OP_WRITE,
    OP_ZERO,
} OpKind;

typedef enum OpState {
    OP_ISSUED,
    OP_DONE,
    OP_DURABLE, /* written with FUA, and completed */
    OP_FAILED,
} OpState;

typedef struct Op {
    uint32_t sector;       /* of the lane */
    uint16_t count;        /* sectors */
    uint8_t kind;
    _Atomic uint8_t state;
} Op;

typedef struct Lane {
    uint64_t number_base;  /* the number of ops[0], less 1 */
    _Atomic uint32_t issued;
    _Atomic uint32_t completed;
    _Atomic uint32_t durable;
} Lane;

typedef struct State {
    uint64_t magic;
    uint64_t sessions;
    uint64_t flushes;      /* acknowledged in all sessions */
    Lane lanes[LANES];
    uint64_t base[SECTORS];  /* number of the write, or ZERO_BASE */
    Op ops[LANES][OPS_MAX];
} State;

typedef struct Load Load;

typedef struct LaneRun {
    Load *load;
    unsigned number;
    uint64_t random;
    uint64_t now[LANE_SECTORS]; /* what a read must find; 0: not known */
    unsigned errors;
    pthread_t thread;
} LaneRun;

struct Load {
    State *state;
    const char *path;
    unsigned flags;        /* BaleDeviceFlags */
    bool errors_allowed;
    BaleStore *store;
    BaleImage *image;
    uint64_t random;
    atomic_bool phase_over;
    atomic_bool failed;
    LaneRun lanes[LANES];
};

static gboolean opt_buffered, opt_compact, opt_errors, opt_quiet;
static char *opt_before;
static gint64 opt_seed = 1;
static int opt_phase_ops = PHASE_OPS_MAX;

static uint64_t next_random(uint64_t *random)
{
    uint64_t z = *random += 0x9e3779b97f4a7c15ull;

    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

static unsigned below(uint64_t *random, unsigned limit)
{
    return (unsigned)(next_random(random) % limit);
}

/* What write @number puts into sector @sector of the image. */
static void sector_fill(uint8_t *buf, uint64_t sector, uint64_t number)
{
    uint64_t seed = sector << 40 ^ number;
    uint64_t words[SECTOR / 8];

    words[0] = sector;
    words[1] = number;
    for (unsigned i = 2; i < SECTOR / 8; i++) {
        /* Every fourth write cannot be compressed. */
        words[i] = number % 4 ? seed + i / 16 : next_random(&seed);
    }
    memcpy(buf, words, SECTOR);
}

/* The number that a sector carries, or ZERO_BASE; false: it is neither. */
static bool sector_number(const uint8_t *buf, uint64_t sector,
                          uint64_t *number)
{
    static const uint8_t zeroes[SECTOR];
    uint8_t want[SECTOR];

    if (memcmp(buf, zeroes, SECTOR) == 0) {
        *number = ZERO_BASE;
        return true;
    }
    memcpy(number, buf + 8, sizeof(*number));
    sector_fill(want, sector, *number);
    return memcmp(buf, want, SECTOR) == 0;
}

static State *state_map(const char *path, bool create)
{
    int fd = open(path, O_RDWR | O_CLOEXEC | (create ? O_CREAT : 0), 0600);
    State *state;

    if (fd < 0 || (create && ftruncate(fd, sizeof(State)) < 0)) {
        fprintf(stderr, "stress: %s: %s\n", path, strerror(errno));
        exit(2);
    }
    state = mmap(NULL, sizeof(State), PROT_READ | PROT_WRITE, MAP_SHARED, fd,
                 0);
    if (state == MAP_FAILED) {
        fprintf(stderr, "stress: %s: %s\n", path, strerror(errno));
        exit(2);
    }
    close(fd);
    if (create) {
        state->magic = STATE_MAGIC;
        for (unsigned i = 0; i < SECTORS; i++) {
            state->base[i] = ZERO_BASE;
        }
    }
    g_assert_cmphex(state->magic, ==, STATE_MAGIC);
    return state;
}

/* --- the load --- */

static void lane_error(LaneRun *lane, const char *what, int ret)
{
    Load *load = lane->load;

    lane->errors++;
    if (!load->errors_allowed || !opt_quiet) {
        printf("error: lane %u: %s: %s\n", lane->number, what, strerror(-ret));
        fflush(stdout);
    }
    if (!load->errors_allowed) {
        load->failed = true;
        load->phase_over = true;
    }
    g_usleep(ERROR_PAUSE_US);
}

static void durable_raise(Lane *lane, uint32_t count)
{
    uint32_t old = lane->durable;

    while (old < count &&
           !atomic_compare_exchange_weak(&lane->durable, &old, count)) {
    }
}

static void lane_flush(LaneRun *lane)
{
    State *state = lane->load->state;
    uint32_t completed[LANES];
    int ret;

    for (unsigned i = 0; i < LANES; i++) {
        completed[i] = state->lanes[i].completed;
    }
    ret = bale_store_flush_sync(lane->load->store);
    if (ret < 0) {
        lane_error(lane, "flush", ret);
        return;
    }
    for (unsigned i = 0; i < LANES; i++) {
        durable_raise(&state->lanes[i], completed[i]);
    }
    __atomic_fetch_add(&state->flushes, 1, __ATOMIC_RELAXED);
}

/* A range of the lane: small ones mostly, sometimes clusters. */
static void lane_range(LaneRun *lane, uint32_t *sector, uint16_t *count)
{
    uint64_t *random = &lane->random;
    unsigned max = 16;

    if (below(random, 8) == 0) {
        max = WRITE_SECTORS_MAX;
    }
    *count = (uint16_t)(1 + below(random, max));
    *sector = below(random, LANE_SECTORS - *count + 1);
    if (below(random, 2)) {
        *sector = *sector / 8 * 8;
    }
}

static void lane_change(LaneRun *lane, uint8_t *buf)
{
    Load *load = lane->load;
    Lane *shared = &load->state->lanes[lane->number];
    uint32_t at = shared->issued;
    Op *op = &load->state->ops[lane->number][at];
    uint64_t number = shared->number_base + at + 1;
    uint64_t first = (uint64_t)lane->number * LANE_SECTORS;
    unsigned kind = below(&lane->random, 10);
    bool fua = kind == 9;
    uint64_t offset;
    int ret;

    lane_range(lane, &op->sector, &op->count);
    op->kind = kind < 2 ? OP_ZERO : OP_WRITE;
    op->state = OP_ISSUED;
    shared->issued = at + 1;

    offset = (first + op->sector) * SECTOR;
    if (op->kind == OP_ZERO) {
        ret = bale_image_zero_sync(load->image, offset, op->count * SECTOR,
                                   kind == 1 ? BALE_DISCARD : 0);
    } else {
        for (unsigned i = 0; i < op->count; i++) {
            sector_fill(buf + (size_t)i * SECTOR, first + op->sector + i,
                        number);
        }
        ret = bale_image_write_sync(load->image, offset, buf,
                                    op->count * SECTOR, fua ? BALE_FUA : 0);
    }
    for (unsigned i = 0; i < op->count; i++) {
        lane->now[op->sector + i] = ret < 0 ? 0 :
            op->kind == OP_ZERO ? ZERO_BASE : number;
    }
    op->state = ret < 0 ? OP_FAILED : fua ? OP_DURABLE : OP_DONE;
    shared->completed = at + 1;
    if (ret < 0) {
        lane_error(lane, "write", ret);
    }
}

/* What has been written is seen, before it is flushed, too. */
static void lane_look(LaneRun *lane, uint8_t *buf)
{
    Load *load = lane->load;
    uint64_t first = (uint64_t)lane->number * LANE_SECTORS;
    uint32_t sector;
    uint16_t count;
    int ret;

    lane_range(lane, &sector, &count);
    ret = bale_image_read_sync(load->image, (first + sector) * SECTOR, buf,
                               count * SECTOR);
    if (ret < 0) {
        lane_error(lane, "read", ret);
        return;
    }
    for (unsigned i = 0; i < count; i++) {
        uint64_t want = lane->now[sector + i];
        uint64_t number;

        if (want && (!sector_number(buf + (size_t)i * SECTOR,
                                    first + sector + i, &number) ||
                     number != want)) {
            printf("WRONG: lane %u reads something else at sector %u than it "
                   "wrote\n", lane->number, sector + i);
            fflush(stdout);
            load->failed = true;
            load->phase_over = true;
            return;
        }
    }
}

static void *lane_main(void *opaque)
{
    LaneRun *lane = opaque;
    Load *load = lane->load;
    Lane *shared = &load->state->lanes[lane->number];
    uint8_t *buf = g_malloc(WRITE_SECTORS_MAX * SECTOR);

    for (int i = 0; i < opt_phase_ops && !load->phase_over &&
         shared->issued < OPS_MAX && lane->errors < ERRORS_MAX; i++) {
        unsigned dice = below(&lane->random, 20);

        if (dice == 0) {
            lane_flush(lane);
        } else if (dice < 4) {
            lane_look(lane, buf);
        } else {
            lane_change(lane, buf);
        }
    }
    g_free(buf);
    return NULL;
}

static void *maintain_main(void *opaque)
{
    Load *load = opaque;
    uint64_t random = load->random ^ 0x5555;

    while (!load->phase_over) {
        BaleCompactOptions compact = { 0 };
        GError *err = NULL;
        bool good;

        g_usleep(1000 + below(&random, 20000));
        if (bale_store_poisoned(load->store)) {
            /* Only with --errors does anybody get here more than once. */
            bale_store_revive(load->store, NULL);
            continue;
        }
        good = opt_compact && below(&random, 2)
                   ? bale_store_compact(load->store, &compact, &err)
                   : bale_store_checkpoint(load->store, &err);
        if (!good) {
            if (!load->errors_allowed) {
                printf("error: maintenance: %s\n", err->message);
                fflush(stdout);
                load->failed = true;
                load->phase_over = true;
            }
            g_clear_error(&err);
        }
    }
    return NULL;
}

static BaleStore *store_open(const char *path, unsigned flags, bool read_only,
                             BaleImage **image)
{
    BaleOpenOptions options = {
        .read_only = read_only,
        .cache_size = 1 << 20,
        .workers = 2,
    };
    GError *err = NULL;
    BaleDevice *dev = bale_device_aio_open(
        path, flags | (read_only ? BALE_DEVICE_READ_ONLY : 0), &err);
    BaleStore *store = dev ? bale_store_open(dev, &options, &err) : NULL;

    *image = store ? bale_image_open(store, NULL, &err) : NULL;
    if (!*image) {
        printf("error: %s: %s\n", path, err->message);
        exit(1);
    }
    return store;
}

/* One session, from open to close.  False: the program ends. */
static bool load_phase(Load *load)
{
    State *state = load->state;
    pthread_t maintain;
    GError *err = NULL;
    bool good;

    load->phase_over = false;
    load->store = store_open(load->path, load->flags, false, &load->image);
    g_assert_cmpint(pthread_create(&maintain, NULL, maintain_main, load), ==,
                    0);
    for (unsigned i = 0; i < LANES; i++) {
        g_assert_cmpint(pthread_create(&load->lanes[i].thread, NULL, lane_main,
                                       &load->lanes[i]), ==, 0);
    }
    for (unsigned i = 0; i < LANES; i++) {
        pthread_join(load->lanes[i].thread, NULL);
    }
    load->phase_over = true;
    pthread_join(maintain, NULL);

    bale_image_close(load->image);
    good = bale_store_close(load->store, &err);
    if (!good) {
        printf("error: close: %s\n", err->message);
        fflush(stdout);
        g_clear_error(&err);
        return false;
    }
    for (unsigned i = 0; i < LANES; i++) {
        durable_raise(&state->lanes[i], state->lanes[i].completed);
        if (state->lanes[i].issued == OPS_MAX) {
            good = false;
        }
    }
    return good && !load->failed;
}

static int stress_run(const char *path, State *state)
{
    Load *load = g_new0(Load, 1);
    int status;

    for (unsigned i = 0; i < LANES; i++) {
        /* A session that was not verified has no end that is known. */
        g_assert_cmpuint(state->lanes[i].issued, ==, 0);
    }
    load->state = state;
    load->path = path;
    load->flags = opt_buffered ? BALE_DEVICE_BUFFERED : 0;
    load->errors_allowed = opt_errors;
    load->random = (uint64_t)opt_seed;
    for (unsigned i = 0; i < LANES; i++) {
        LaneRun *lane = &load->lanes[i];

        lane->load = load;
        lane->number = i;
        lane->random = (uint64_t)opt_seed * LANES + i;
        memcpy(lane->now, state->base + (size_t)i * LANE_SECTORS,
               sizeof(lane->now));
    }
    printf("running\n");
    fflush(stdout);
    while (load_phase(load)) {
    }
    status = load->failed ? 1 : 0;
    g_free(load);
    return status;
}

/* --- verifying --- */

typedef struct Verdict {
    uint64_t checked, newer, wrong;
} Verdict;

/* May @sector of @lane hold what was found?  Notes it as the new base. */
static bool sector_allowed(const State *state, unsigned lane, uint32_t sector,
                           uint64_t found, uint64_t base, bool *newer)
{
    const Lane *shared = &state->lanes[lane];
    uint32_t issued = MIN(shared->issued, OPS_MAX);
    int64_t floor = -1, zero = -1, match = found == base ? -1 : -2;

    for (uint32_t i = 0; i < issued; i++) {
        const Op *op = &state->ops[lane][i];

        if (sector < op->sector || sector >= op->sector + op->count) {
            continue;
        }
        if ((i < shared->durable && op->state != OP_FAILED) ||
            op->state == OP_DURABLE) {
            floor = i;
        }
        if (op->kind == OP_ZERO) {
            zero = i;
        } else if (found == shared->number_base + i + 1) {
            match = i;
        }
    }
    if (found == ZERO_BASE && zero >= 0) {
        match = zero;
    }
    *newer = match > floor;
    return match >= floor;
}

/* Forget what was acknowledged later than @before was copied of @state. */
static void state_forget_later(State *state, const State *before)
{
    for (unsigned lane = 0; lane < LANES; lane++) {
        state->lanes[lane].durable = before->lanes[lane].durable;
        for (unsigned i = 0; i < OPS_MAX; i++) {
            if (i >= before->lanes[lane].issued ||
                before->ops[lane][i].state != OP_DURABLE) {
                uint8_t durable = OP_DURABLE;

                atomic_compare_exchange_strong(&state->ops[lane][i].state,
                                               &durable, OP_DONE);
            }
        }
    }
}

static int stress_verify(const char *path, State *state)
{
    BaleImage *image;
    BaleStore *store = store_open(path, opt_buffered ? BALE_DEVICE_BUFFERED : 0,
                                  true, &image);
    uint8_t *buf = g_malloc(LANE_SECTORS * SECTOR);
    Verdict verdict = { 0 };
    uint64_t issued = 0, durable = 0;
    BaleStoreInfo info;
    GError *err = NULL;

    if (opt_before) {
        state_forget_later(state, state_map(opt_before, false));
    }
    for (unsigned lane = 0; lane < LANES; lane++) {
        uint64_t first = (uint64_t)lane * LANE_SECTORS;
        int ret = bale_image_read_sync(image, first * SECTOR, buf,
                                       LANE_SECTORS * SECTOR);

        if (ret < 0) {
            printf("WRONG: lane %u cannot be read: %s\n", lane,
                   strerror(-ret));
            return 1;
        }
        for (uint32_t i = 0; i < LANE_SECTORS; i++) {
            uint64_t base = state->base[first + i];
            uint64_t found = 0;
            bool newer = false;

            if (!sector_number(buf + (size_t)i * SECTOR, first + i, &found) ||
                !sector_allowed(state, lane, i, found, base, &newer)) {
                if (verdict.wrong++ < 10) {
                    printf("WRONG: lane %u sector %u holds %" PRIu64
                           ", was %" PRIu64 "; the lane's requests begin with "
                           "%" PRIu64 ", %u proven, %u submitted\n", lane, i,
                           found, base, state->lanes[lane].number_base + 1,
                           (unsigned)state->lanes[lane].durable,
                           (unsigned)state->lanes[lane].issued);
                }
                continue;
            }
            verdict.checked++;
            verdict.newer += newer;
            state->base[first + i] = found;
        }
        issued += state->lanes[lane].issued;
        durable += state->lanes[lane].durable;
    }
    g_free(buf);
    bale_store_get_info(store, &info);
    bale_image_close(image);
    if (!bale_store_close(store, &err)) {
        printf("error: close: %s\n", err->message);
        return 1;
    }
    printf("verified: %" PRIu64 " requests, %" PRIu64 " proven, %" PRIu64
           " flushes so far, %" PRIu64 " sectors right, %" PRIu64
           " of them newer than proven, %s\n", issued, durable, state->flushes,
           verdict.checked, verdict.newer,
           info.clean ? "was closed" : "was open");
    if (verdict.wrong || info.corrupt || info.damaged_records) {
        printf("WRONG: %" PRIu64 " sectors, %" PRIu64 " damaged records%s\n",
               verdict.wrong, info.damaged_records,
               info.corrupt ? ", marked corrupt" : "");
        return 1;
    }
    for (unsigned lane = 0; lane < LANES; lane++) {
        Lane *shared = &state->lanes[lane];

        shared->number_base += shared->issued;
        shared->issued = shared->completed = shared->durable = 0;
    }
    state->sessions++;
    return 0;
}

static int stress_create(const char *path)
{
    static const BaleCodec codecs[] = { BALE_CODEC_ZSTD, BALE_CODEC_DEFLATE,
                                        BALE_CODEC_NONE };
    uint64_t random = (uint64_t)opt_seed;
    BaleCreateOptions options = {
        .size = (uint64_t)SECTORS * SECTOR,
        .cluster_size = 4096u << below(&random, 5),
        .page_size = BALE_PAGE_SIZE_UNIT,
        .codec = codecs[below(&random, G_N_ELEMENTS(codecs))],
    };
    GError *err = NULL;
    BaleDevice *dev = bale_device_aio_open(
        path, BALE_DEVICE_CREATE | BALE_DEVICE_TRUNCATE |
        (opt_buffered ? BALE_DEVICE_BUFFERED : 0), &err);

    if (!dev || !bale_store_create(dev, &options, &err)) {
        printf("error: %s: %s\n", path, err->message);
        return 1;
    }
    bale_device_close(dev);
    return 0;
}

int main(int argc, char **argv)
{
    const GOptionEntry entries[] = {
        { "seed", 0, 0, G_OPTION_ARG_INT64, &opt_seed,
          "Of geometry and of requests", "N" },
        { "phase-ops", 0, 0, G_OPTION_ARG_INT, &opt_phase_ops,
          "Requests of a lane until the store is closed and reopened", "N" },
        { "buffered", 0, 0, G_OPTION_ARG_NONE, &opt_buffered,
          "Page cache instead of O_DIRECT", NULL },
        { "compact", 0, 0, G_OPTION_ARG_NONE, &opt_compact,
          "Compact beside the load", NULL },
        { "errors", 0, 0, G_OPTION_ARG_NONE, &opt_errors,
          "Go on after a request that fails", NULL },
        { "before", 0, 0, G_OPTION_ARG_FILENAME, &opt_before,
          "verify: only what STATE says was acknowledged in this copy of it",
          "COPY" },
        { "quiet", 0, 0, G_OPTION_ARG_NONE, &opt_quiet,
          "Do not print errors that are allowed", NULL },
        G_OPTION_ENTRY_NULL
    };
    g_autoptr(GOptionContext) context =
        g_option_context_new("create|run|verify STORE STATE");
    GError *err = NULL;

    g_option_context_add_main_entries(context, entries, NULL);
    if (!g_option_context_parse(context, &argc, &argv, &err) || argc != 4) {
        fprintf(stderr, "stress: %s\n", err ? err->message : "see --help");
        return 2;
    }
    if (strcmp(argv[1], "create") == 0) {
        State *state = state_map(argv[3], true);

        munmap(state, sizeof(*state));
        return stress_create(argv[2]);
    }
    if (strcmp(argv[1], "run") == 0) {
        return stress_run(argv[2], state_map(argv[3], false));
    }
    if (strcmp(argv[1], "verify") == 0) {
        return stress_verify(argv[2], state_map(argv[3], false));
    }
    fprintf(stderr, "stress: see --help\n");
    return 2;
}
