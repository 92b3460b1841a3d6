/*
 * Power cuts at any moment of a workload, and a second one in the session that
 * follows the recovery from the first.
 *
 * Crash states are looked at right before and after each flush completes,
 * which has the states of all points between among them.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "inline.h"
#include "sim.h"

#include <string.h>

/* Every n-th state goes on writing after recovery. */
#define GO_ON_EVERY 16
#define TORN_PER_POINT 4
/* States of the second crash for each first one. */
#define SECOND_SAMPLES 6

typedef struct CrashRun {
    World *w;
    Case *c;
    uint64_t *count;
    uint64_t states;
    uint64_t every;  /* recovery: only each so many-th state */
    char *error;
    bool recovery;
} CrashRun;

/* --- sequences --- */

const char *sequence_letters;

void sequence_sample(Case *c, const char *class_name, GRand *rand,
                     unsigned min, unsigned max)
{
    static const char *starts[] = { "fresh", "closed", "active" };
    const char *steps = STEPS_SAMPLED;
    unsigned n = g_rand_int_range(rand, min, max + 1);

    memset(c, 0, sizeof(*c));
    g_strlcpy(c->class_name, class_name, sizeof(c->class_name));
    c->geo = &geometries[g_rand_int_range(rand, 0, geometry_count)];
    g_strlcpy(c->start, starts[g_rand_int_range(rand, 0, 3)],
              sizeof(c->start));
    if (c->geo->cluster_size > 16384 && g_rand_boolean(rand)) {
        steps = STEPS_SPACE;
        n += 2;
    }
    steps = sequence_letters ? sequence_letters : steps;
    for (unsigned i = 0; i < n; i++) {
        c->steps[i] = steps[g_rand_int_range(rand, 0, strlen(steps))];
    }
    c->seed = g_rand_int(rand);
}

/* The @n-th sequence of up to three steps, of all of them; false: none. */
static bool sequence_enumerated(char *steps, uint64_t n)
{
    const unsigned letters = strlen(STEPS_ENUMERATED);
    uint64_t of_len = letters;
    unsigned len = 1;

    while (len <= 3 && n >= of_len) {
        n -= of_len;
        of_len *= letters;
        len++;
    }
    if (len > 3) {
        return false;
    }
    memset(steps, 0, STEPS_MAX + 1);
    for (unsigned i = 0; i < len; i++) {
        steps[i] = STEPS_ENUMERATED[n % letters];
        n /= letters;
    }
    return true;
}

bool sequence_next(Case *c, const char *class_name, uint64_t n, GRand *rand,
                   bool all)
{
    const unsigned letters = strlen(STEPS_ENUMERATED);
    const uint64_t total = letters + letters * letters +
                           (uint64_t)letters * letters * letters;

    sequence_sample(c, class_name, rand, 4, 9);
    /* Without the time for all: enumerated ones and samples in turn. */
    if (all ? n < total : n % 2 == 0) {
        uint64_t which = all ? n : g_rand_double(rand) * total;

        sequence_enumerated(c->steps, which);
        if (c->geo->cluster_size > 16384) {
            c->geo = &geometries[g_rand_int_range(rand, 0, 3)];
        }
    }
    return true;
}

/* --- one case --- */

char *broken_story(World *w, const char *what)
{
    g_autofree char *device = bale_sim_story(w->sim);

    return g_strdup_printf("%s\n%sdevice:\n%s", what,
                           w->story ? w->story->str : "", device);
}

static char *second_crash(CrashRun *run, BaleSimImage *image,
                          const Observed *seen);

static bool crash_state(BaleSimImage *image, const BaleSimCrash *crash,
                        void *opaque)
{
    CrashRun *run = opaque;
    uint64_t n = run->states++;
    Observed seen = { .size = 0 };
    unsigned flags = n % GO_ON_EVERY == 0 ? VERIFY_GO_ON : 0;
    g_autofree char *error = NULL;

    if (run->recovery && n % run->every) {
        return true;
    }
    ++*run->count;
    error = verify_image(run->w, image, crash->point, flags, &seen);
    if (!error && run->recovery) {
        error = second_crash(run, image, &seen);
    }
    observed_clear(&seen);
    if (error) {
        run->error = g_strdup_printf(
            "power cut at event %" PRIu64 ", state %" PRIu64 " (%u uncertain, "
            "survivors %#" PRIx64 "%s%s): %s", crash->point, crash->state,
            crash->uncertain, crash->mask, crash->sampled ? ", sampled" : "",
            crash->torn ? ", torn" : "", error);
        g_snprintf(run->c->detail, sizeof(run->c->detail),
                   "%" PRIu64 ".%" PRIu64, crash->point, crash->state);
        if (g_getenv("BALE_SIM_SAVE")) {
            bale_sim_image_save(image, g_getenv("BALE_SIM_SAVE"), NULL);
        }
    }
    return !run->error;
}

static void crash_options(const Case *c, BaleSimCrashOptions *o)
{
    memset(o, 0, sizeof(*o));
    o->barriers_only = true;
    o->samples = 64;
    o->torn_samples = TORN_PER_POINT;
    o->seed = c->seed;
    if (*c->detail) {
        char *end;

        o->first_point = o->last_point =
            g_ascii_strtoull(c->detail, &end, 10);
        o->only_state = *end == '.';
        o->state = *end ? g_ascii_strtoull(end + 1, NULL, 10) : 0;
        o->barriers_only = false;
    }
}

/*
 * Work on what was recovered in a session of its own, and cut the power in it.
 * What had been read after the first recovery is there for good.
 */
static char *second_crash(CrashRun *run, BaleSimImage *image,
                          const Observed *seen)
{
    static const char steps[] = "pwdzfusnevim";
    g_autoptr(GRand) rand = g_rand_new_with_seed(run->c->seed + run->states);
    World *w = world_new(run->w->geo, bale_sim_new_from_image(image, NULL));
    BaleSimCrashOptions o = { .barriers_only = true,
                              .max_exhaustive = 3,
                              .samples = SECOND_SAMPLES,
                              .torn_samples = 1,
                              .seed = run->c->seed };
    CrashRun second = { .w = w, .c = run->c, .count = run->count };
    g_autofree char *error = NULL;
    Case keep = *run->c;

    w->next_value = run->w->next_value + 1000;
    w->story = g_string_new("second session:\n");
    oracle_expect(w->oracle, seen, w->max_sectors);
    if (!world_open(w)) {
        world_broken(w, "the recovered store does not open again");
    }
    for (int i = 0; i < 4 && !w->error; i++) {
        world_step(w, i == 2 ? 'f'
                             : steps[g_rand_int_range(rand, 0,
                                                      strlen(steps))]);
    }
    if (!w->error) {
        world_read(w, false);
    }
    if (!w->error) {
        bale_sim_crash_states(w->sim, &o, crash_state, &second);
    }
    if (w->error || second.error) {
        error = broken_story(w, w->error ? w->error : second.error);
    }
    g_free(second.error);
    *run->c = keep;
    world_free(w);
    return g_steal_pointer(&error);
}

static char *crash_run_case(Case *c, uint64_t *count, bool recovery)
{
    World *w = world_new(c->geo, bale_sim_new(NULL));
    CrashRun run = { .w = w, .c = c, .count = count, .recovery = recovery,
                     .every = 1 };
    g_autofree char *error = NULL;
    BaleSimCrashOptions o;

    w->story = g_string_new(NULL);
    /* The bits of the seed above those that main.c looks at. */
    w->quiet = inline_enabled && c->seed / 8 % 2 == 0;
    if (world_start(w, c)) {
        for (const char *p = c->steps; *p && !w->error; p++) {
            if (!world_step(w, *p)) {
                world_broken(w, "step %c was refused", *p);
            }
        }
        if (!w->error) {
            world_read(w, false);
        }
    }
    if (!w->error) {
        crash_options(c, &o);
        if (recovery) {
            o.max_exhaustive = 4;
            o.samples = 8;
            run.every = *c->detail ? 1 : 3;
        }
        bale_sim_crash_states(w->sim, &o, crash_state, &run);
    }
    if (w->error || run.error) {
        error = broken_story(w, w->error ? w->error : run.error);
    }
    g_free(run.error);
    world_free(w);
    return g_steal_pointer(&error);
}

static char *crash_run(Case *c, uint64_t *count)
{
    return crash_run_case(c, count, false);
}

static bool crash_next(Case *c, uint64_t n, GRand *rand, bool all)
{
    return sequence_next(c, "crash", n, rand, all);
}

const Class class_crash = {
    "crash", 1, "power cut at any moment", crash_run, crash_next,
    200000,
};

static char *recovery_run(Case *c, uint64_t *count)
{
    return crash_run_case(c, count, true);
}

static bool recovery_next(Case *c, uint64_t n, GRand *rand, bool all)
{
    sequence_sample(c, "recovery", rand, 1, 5);
    return true;
}

const Class class_recovery = {
    "recovery", 2, "power cut in the session after recovery", recovery_run,
    recovery_next,
    50000,
};
