/*
 * Many requests at once, on a device that reorders, against the oracle; with
 * flushes, checkpoints and crashes between them.
 *
 * The seed makes the requests; how they interleave is the machine's business.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "sim.h"

#include <string.h>

#define IN_FLIGHT_MAX 16
#define ROUND_REQUESTS 200
#define ROUNDS 6

typedef struct Model {
    World *w;
    pthread_mutex_t lock;
    pthread_cond_t cond;
    unsigned in_flight;
} Model;

typedef struct Request {
    Model *m;
    enum { REQUEST_WRITE, REQUEST_ZERO, REQUEST_READ, REQUEST_FLUSH } kind;
    unsigned first, n;
    bool fua;
    uint64_t begun;
    struct iovec iov;
} Request;

static void request_done(void *opaque, int ret)
{
    Request *r = opaque;
    Model *m = r->m;
    World *w = m->w;
    uint64_t event = bale_sim_events(w->sim);

    pthread_mutex_lock(&m->lock);
    if (ret < 0) {
        world_broken(w, "%s of %u sectors from %u failed: %s",
                     (const char *[]){ "write", "zero", "read",
                                       "flush" }[r->kind],
                     r->n, r->first, g_strerror(-ret));
    }
    switch (r->kind) {
    case REQUEST_WRITE:
    case REQUEST_ZERO:
        oracle_end(w->oracle, r->first, r->n, r->begun, ret == 0,
                   r->fua ? event : EVENT_NEVER);
        if (r->fua) {
            oracle_flushed(w->oracle, r->begun - 1, event);
        }
        break;
    case REQUEST_FLUSH:
        oracle_flushed(w->oracle, r->begun, event);
        break;
    case REQUEST_READ:
        for (unsigned i = 0; i < r->n; i++) {
            uint8_t *at = (uint8_t *)r->iov.iov_base + i * SECTOR;
            uint32_t value = world_value(w, at, r->first + i);

            if (!oracle_allows(w->oracle, r->first + i, value, NOW,
                               r->begun)) {
                g_autofree char *may =
                    oracle_describe(w->oracle, r->first + i, NOW);

                world_broken(w, "sector %u reads as %" PRIu32
                             " and should be %s", r->first + i, value, may);
            }
        }
        break;
    }
    g_free(r->iov.iov_base);
    g_free(r);
    m->in_flight--;
    pthread_cond_broadcast(&m->cond);
    pthread_mutex_unlock(&m->lock);
}

static void model_wait(Model *m, unsigned most)
{
    pthread_mutex_lock(&m->lock);
    while (m->in_flight > most) {
        pthread_cond_wait(&m->cond, &m->lock);
    }
    pthread_mutex_unlock(&m->lock);
}

static void model_request(Model *m, GRand *rand)
{
    World *w = m->w;
    unsigned size = bale_image_size(w->image) / SECTOR;
    unsigned op = g_rand_int_range(rand, 0, 100);
    Request *r = g_new0(Request, 1);
    uint64_t offset;
    uint32_t value = VALUE_ZERO;

    r->m = m;
    r->first = g_rand_int_range(rand, 0, size);
    r->n = g_rand_int_range(rand, 1, 2 * w->cluster_sectors);
    if (g_rand_int_range(rand, 0, 3) == 0) {
        r->first -= r->first % w->cluster_sectors;
        r->n = w->cluster_sectors * g_rand_int_range(rand, 1, 4);
    }
    r->n = MIN(r->n, size - r->first);
    r->kind = op < 50   ? REQUEST_WRITE
              : op < 65 ? REQUEST_ZERO
              : op < 95 ? REQUEST_READ
                        : REQUEST_FLUSH;
    r->fua = r->kind == REQUEST_WRITE && op < 3;
    offset = (uint64_t)r->first * SECTOR;
    model_wait(m, IN_FLIGHT_MAX - 1);
    pthread_mutex_lock(&m->lock);
    m->in_flight++;
    if (r->kind == REQUEST_WRITE) {
        value = w->next_value++;
    }
    pthread_mutex_unlock(&m->lock);
    if (r->kind == REQUEST_WRITE || r->kind == REQUEST_READ) {
        r->iov.iov_len = r->n * SECTOR;
        r->iov.iov_base = g_malloc(r->iov.iov_len);
    }
    switch (r->kind) {
    case REQUEST_WRITE:
        world_fill(w, r->iov.iov_base, r->first, r->n, value);
        r->begun = oracle_begin(w->oracle, r->first, r->n, value,
                                bale_sim_events(w->sim));
        bale_image_write(w->image, offset, &r->iov, 1,
                         r->fua ? BALE_FUA : 0, request_done, r);
        break;
    case REQUEST_ZERO:
        r->begun = oracle_begin(w->oracle, r->first, r->n, VALUE_ZERO,
                                bale_sim_events(w->sim));
        bale_image_zero(w->image, offset, (uint64_t)r->n * SECTOR,
                        op < 58 ? BALE_DISCARD : 0, request_done, r);
        break;
    case REQUEST_READ:
        r->begun = oracle_moment(w->oracle);
        bale_image_read(w->image, offset, &r->iov, 1, request_done, r);
        break;
    case REQUEST_FLUSH:
        r->begun = oracle_moment(w->oracle);
        bale_store_flush(w->store, request_done, r);
        break;
    }
}

/* Requests are under way, of which it can promise nothing. */
static void model_checkpoint(Model *m)
{
    uint64_t moment = oracle_moment(m->w->oracle);
    g_autoptr(GError) err = NULL;

    if (bale_store_checkpoint_running(m->w->store, &err)) {
        oracle_flushed(m->w->oracle, moment, bale_sim_events(m->w->sim));
    } else {
        world_broken(m->w, "checkpoint in use: %s", err->message);
    }
}

static bool model_crash_state(BaleSimImage *image, const BaleSimCrash *crash,
                              void *opaque)
{
    World *w = opaque;
    g_autofree char *error =
        verify_image(w, image, crash->point,
                     crash->state % 8 == 0 ? VERIFY_GO_ON : 0, NULL);

    if (error) {
        world_broken(w, "power cut at event %" PRIu64 ", state %" PRIu64
                     ": %s", crash->point, crash->state, error);
        if (g_getenv("BALE_SIM_SAVE")) {
            bale_sim_image_save(image, g_getenv("BALE_SIM_SAVE"), NULL);
        }
    }
    return !w->error;
}

/* Crash states of the history from event @from on. */
static void model_crash(Model *m, GRand *rand, uint64_t from, uint64_t *count)
{
    World *w = m->w;
    uint64_t events = bale_sim_events(w->sim);

    for (int i = 0; i < 6 && !w->error && events > from; i++) {
        uint64_t at = i == 0 ? events
                             : from + g_rand_double(rand) * (events - from);
        BaleSimCrashOptions o = { .first_point = at, .last_point = at,
                                  .max_exhaustive = 2, .samples = 3,
                                  .torn_samples = 1,
                                  .seed = g_rand_int(rand) };

        *count += bale_sim_crash_states(w->sim, &o, model_crash_state, w);
    }
}

static char *model_run(Case *c, uint64_t *count)
{
    g_autoptr(GRand) rand = g_rand_new_with_seed(c->seed);
    World *w = world_new(c->geo, bale_sim_new(NULL));
    Model m = { .w = w };
    g_autofree char *error = NULL;
    uint64_t from = 1;

    pthread_mutex_init(&m.lock, NULL);
    pthread_cond_init(&m.cond, NULL);
    w->sim_options = (BaleSimOptions){ .mode = BALE_SIM_DEFERRED,
                                       .seed = c->seed };
    w->workers = 2;
    w->story = g_string_new(NULL);
    world_start(w, c);
    for (int round = 0; round < ROUNDS && !w->error; round++) {
        int kind = g_rand_int_range(rand, 0, 10);

        for (int i = 0; i < ROUND_REQUESTS && !w->error; i++) {
            model_request(&m, rand);
            ++*count;
            if (i == ROUND_REQUESTS / 2 && kind % 2) {
                model_checkpoint(&m);
            }
        }
        model_wait(&m, 0);
        if (!w->error && kind < 8 && !world_step(w, "krsgnevm"[kind])) {
            world_broken(w, "step was refused");
        }
        if (!w->error) {
            world_read(w, false);
        }
        if (!w->error) {
            model_crash(&m, rand, from, count);
        }
        from = bale_sim_events(w->sim);
        oracle_prune(w->oracle, from);
    }
    if (w->error) {
        error = g_strdup_printf("%s\n%s", w->error, w->story->str);
    }
    world_free(w);
    pthread_mutex_destroy(&m.lock);
    pthread_cond_destroy(&m.cond);
    return g_steal_pointer(&error);
}

static bool model_next(Case *c, uint64_t n, GRand *rand, bool all)
{
    sequence_sample(c, "model", rand, 0, 0);
    g_strlcpy(c->steps, "", sizeof(c->steps));
    return true;
}

const Class class_model = {
    "model", 11, "parallel requests, checkpoints and crashes", model_run,
    model_next,
    1000000,
};
