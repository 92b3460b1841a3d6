/*
 * Errors of the device, at each call that a workload makes, once or from there
 * on; failed flushes; and allocations that fail.
 *
 * A workload is run without faults first, which tells how many calls of each
 * kind it makes.  Then it is run again for each call and each error.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "sim.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* --- allocations, interposed by the linker (--wrap) --- */

static gint64 alloc_count;
static gint64 alloc_fail;   /* fail when the count reaches this; 0: never */
static gint alloc_sticky;

static bool alloc_fails(size_t size)
{
    int64_t n = __atomic_add_fetch(&alloc_count, 1, __ATOMIC_RELAXED);
    int64_t at = __atomic_load_n(&alloc_fail, __ATOMIC_RELAXED);

    return at && (n == at || (n > at && alloc_sticky));
}

gpointer __real_g_try_malloc(gsize n);
gpointer __real_g_try_malloc0(gsize n);
gpointer __real_g_try_malloc_n(gsize n, gsize size);
gpointer __real_g_try_malloc0_n(gsize n, gsize size);
gpointer __real_g_try_realloc(gpointer mem, gsize n);
gpointer __real_g_try_realloc_n(gpointer mem, gsize n, gsize size);
int __real_posix_memalign(void **mem, size_t align, size_t size);

gpointer __wrap_g_try_malloc(gsize n);
gpointer __wrap_g_try_malloc0(gsize n);
gpointer __wrap_g_try_malloc_n(gsize n, gsize size);
gpointer __wrap_g_try_malloc0_n(gsize n, gsize size);
gpointer __wrap_g_try_realloc(gpointer mem, gsize n);
gpointer __wrap_g_try_realloc_n(gpointer mem, gsize n, gsize size);
int __wrap_posix_memalign(void **mem, size_t align, size_t size);

gpointer __wrap_g_try_malloc(gsize n)
{
    return alloc_fails(n) ? NULL : __real_g_try_malloc(n);
}

gpointer __wrap_g_try_malloc0(gsize n)
{
    return alloc_fails(n) ? NULL : __real_g_try_malloc0(n);
}

gpointer __wrap_g_try_malloc_n(gsize n, gsize size)
{
    return alloc_fails(n) ? NULL : __real_g_try_malloc_n(n, size);
}

gpointer __wrap_g_try_malloc0_n(gsize n, gsize size)
{
    return alloc_fails(n) ? NULL : __real_g_try_malloc0_n(n, size);
}

gpointer __wrap_g_try_realloc(gpointer mem, gsize n)
{
    return alloc_fails(n) ? NULL : __real_g_try_realloc(mem, n);
}

gpointer __wrap_g_try_realloc_n(gpointer mem, gsize n, gsize size)
{
    return alloc_fails(n) ? NULL : __real_g_try_realloc_n(mem, n, size);
}

int __wrap_posix_memalign(void **mem, size_t align, size_t size)
{
    return alloc_fails(size) ? ENOMEM
                             : __real_posix_memalign(mem, align, size);
}

static int64_t alloc_arm(int64_t nth, bool sticky)
{
    int64_t n = __atomic_load_n(&alloc_count, __ATOMIC_RELAXED);

    alloc_sticky = sticky;
    __atomic_store_n(&alloc_fail, nth ? n + nth : 0, __ATOMIC_RELAXED);
    return n;
}

/* --- one run --- */

typedef enum Trouble {
    TROUBLE_NONE,
    TROUBLE_DEVICE,
    TROUBLE_MEMORY,
} Trouble;

typedef struct FaultRun {
    Trouble trouble;
    BaleSimFault fault;
    uint64_t nth;      /* memory */
    bool sticky;
} FaultRun;

static const struct {
    const char *name;
    int error;
} errors[] = {
    { "EIO", -EIO },       { "ENOSPC", -ENOSPC }, { "EAGAIN", -EAGAIN },
    { "EINTR", -EINTR },   { "short", 0 },
};

static const char *calls[BALE_SIM_CALLS] = {
    "get", "store", "flush", "allocate", "release", "truncate",
};

/* Does a later answer contradict a poisoned store? */
static bool step_changes(char step)
{
    return strchr("wopqhufjni", step) != NULL;
}

/*
 * The steps, whatever happens to them.  After the store said that it had
 * failed nothing may succeed that makes something durable, before the store was
 * opened again or (with odd seeds) could be revived.
 */
static void fault_steps(World *w, const Case *c, const FaultRun *run)
{
    for (const char *p = c->steps; *p && !w->error; p++) {
        bool poisoned = w->store && world_poisoned(w);
        bool ok;

        if (!w->store) {
            /* Opening failed; try once more, as a user would. */
            if (!world_open(w)) {
                continue;
            }
        }
        if (poisoned && c->seed % 2) {
            poisoned = !world_revive(w);
        }
        ok = world_step(w, *p);
        if (!w->store) {
            continue;
        }
        if (poisoned && ok && *p != 'r' && step_changes(*p)) {
            world_broken(w, "step %c succeeded after the store had failed",
                         *p);
        }
        if (!ok && *p != 'r' && run->trouble == TROUBLE_NONE) {
            world_broken(w, "step %c was refused", *p);
        }
        world_read(w, true);
    }
}

/* What the device holds, if the process dies now and if the power fails. */
static void fault_verify(World *w, uint64_t *count, const char *when)
{
    uint64_t now = bale_sim_events(w->sim);
    g_autoptr(BaleSimImage) killed = bale_sim_image(w->sim);
    g_autoptr(BaleSimImage) cut = bale_sim_durable_image(w->sim);
    g_autofree char *error = verify_image(w, killed, now, VERIFY_GO_ON, NULL);

    if (error) {
        world_broken(w, "killed %s: %s", when, error);
    }
    g_free(error);
    error = verify_image(w, cut, now, 0, NULL);
    if (error) {
        world_broken(w, "power cut %s: %s", when, error);
        if (g_getenv("BALE_SIM_SAVE")) {
            bale_sim_image_save(cut, g_getenv("BALE_SIM_SAVE"), NULL);
        }
    }
    ++*count;
}

/* *@calls_made: how many of each kind the steps and the close make. */
static char *fault_run_once(const Case *c, const FaultRun *run,
                            uint64_t *count, uint64_t *calls_made)
{
    World *w = world_new(c->geo, bale_sim_new(NULL));
    g_autofree char *error = NULL;
    uint64_t before[BALE_SIM_CALLS];
    int64_t allocs = 0;

    w->story = g_string_new(NULL);
    if (world_start(w, c)) {
        for (int i = 0; i < BALE_SIM_CALLS; i++) {
            before[i] = bale_sim_calls(w->sim, i);
        }
        if (run->trouble == TROUBLE_DEVICE) {
            bale_sim_fault(w->sim, &run->fault);
        } else {
            allocs = alloc_arm(run->nth, run->sticky);
        }
        fault_steps(w, c, run);
        if (w->store && !w->error) {
            bool poisoned = world_poisoned(w);

            if (world_close(w) && poisoned) {
                world_broken(w, "a failed store closed as if nothing were");
            }
        }
        allocs = alloc_arm(0, false) - allocs;
        bale_sim_faults_clear(w->sim);
        for (int i = 0; calls_made && i < BALE_SIM_CALLS; i++) {
            calls_made[i] = bale_sim_calls(w->sim, i) - before[i];
        }
        if (calls_made) {
            calls_made[BALE_SIM_CALLS] = allocs;
        }
        if (!w->error) {
            fault_verify(w, count, "after all");
        }
    }
    if (w->error) {
        error = broken_story(w, w->error);
    }
    world_free(w);
    return g_steal_pointer(&error);
}

/* --- classes --- */

static char *fault_detail(const FaultRun *run)
{
    if (run->trouble == TROUBLE_MEMORY) {
        return g_strdup_printf("alloc.%" PRIu64 "%s", run->nth,
                               run->sticky ? ".sticky" : "");
    }
    for (unsigned i = 0; i < G_N_ELEMENTS(errors); i++) {
        if (errors[i].error == run->fault.error) {
            return g_strdup_printf("%s.%" PRIu64 ".%s%s",
                                   calls[run->fault.call], run->fault.nth,
                                   errors[i].name,
                                   run->fault.sticky ? ".sticky" : "");
        }
    }
    return g_strdup("");
}

/* One fault, unless the case is restricted to another one. */
static char *fault_try(Case *c, const FaultRun *run, uint64_t *count)
{
    g_autofree char *detail = fault_detail(run);
    char *error;

    if (*c->detail && strcmp(detail, c->detail)) {
        return NULL;
    }
    error = fault_run_once(c, run, count, NULL);
    if (error) {
        g_strlcpy(c->detail, detail, sizeof(c->detail));
    }
    return error;
}

static char *fault_run_device(Case *c, uint64_t *count, bool flush_only)
{
    uint64_t made[BALE_SIM_CALLS + 1] = { 0 };
    FaultRun run = { .trouble = TROUBLE_NONE };
    uint64_t ignored = 0;
    char *error = fault_run_once(c, &run, &ignored, made);

    run.trouble = TROUBLE_DEVICE;
    for (int call = 0; !error && call < BALE_SIM_CALLS; call++) {
        if (flush_only && call != BALE_SIM_FLUSH) {
            continue;
        }
        for (uint64_t n = 1; !error && n <= made[call]; n++) {
            for (unsigned e = 0; !error && e < G_N_ELEMENTS(errors); e++) {
                bool transfer = call == BALE_SIM_GET ||
                                call == BALE_SIM_STORE;

                if ((errors[e].error == 0 && !transfer) ||
                    (flush_only && errors[e].error != -EIO)) {
                    continue;
                }
                run.fault = (BaleSimFault){ .call = call, .nth = n,
                                            .error = errors[e].error,
                                            .short_len = 4096 };
                error = fault_try(c, &run, count);
                run.fault.sticky = true;
                if (!error) {
                    error = fault_try(c, &run, count);
                }
            }
        }
    }
    return error;
}

static char *fault_run(Case *c, uint64_t *count)
{
    return fault_run_device(c, count, false);
}

static bool small_next(Case *c, const char *name, uint64_t n, GRand *rand)
{
    sequence_sample(c, name, rand, 2, 5);
    if (n % 4 && c->geo->cluster_size > 16384) {
        c->geo = &geometries[n % 3];
    }
    return true;
}

static bool fault_next(Case *c, uint64_t n, GRand *rand, bool all)
{
    return small_next(c, "fault", n, rand);
}

const Class class_fault = {
    "fault", 3, "an error at any call of the device", fault_run, fault_next,
    50000,
};

static char *flush_run(Case *c, uint64_t *count)
{
    return fault_run_device(c, count, true);
}

static bool flush_next(Case *c, uint64_t n, GRand *rand, bool all)
{
    sequence_sample(c, "flush", rand, 3, 9);
    return true;
}

const Class class_flush = {
    "flush", 4, "each flush fails", flush_run, flush_next,
    20000,
};

static char *memory_run(Case *c, uint64_t *count)
{
    uint64_t made[BALE_SIM_CALLS + 1] = { 0 };
    FaultRun run = { .trouble = TROUBLE_NONE };
    uint64_t ignored = 0;
    char *error = fault_run_once(c, &run, &ignored, made);

    run.trouble = TROUBLE_MEMORY;
    for (run.nth = 1; !error && run.nth <= made[BALE_SIM_CALLS]; run.nth++) {
        run.sticky = false;
        error = fault_try(c, &run, count);
        run.sticky = true;
        if (!error) {
            error = fault_try(c, &run, count);
        }
    }
    return error;
}

static bool memory_next(Case *c, uint64_t n, GRand *rand, bool all)
{
    return small_next(c, "memory", n, rand);
}

const Class class_memory = {
    "memory", 5, "any allocation fails", memory_run, memory_next,
    20000,
};
