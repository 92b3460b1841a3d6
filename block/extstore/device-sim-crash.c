/*
 * What a crash may leave of the simulated device: see extstore/device-sim.h.
 *
 * At a point p, an operation is
 *   - certain, if a flush has made it durable by p;
 *   - uncertain, if it was submitted by p and is not certain;
 *   - absent otherwise.
 * A crash state is the origin with all certain operations and some of the
 * uncertain ones, done in the order of completion (those under way at p last,
 * in the order of submission).  The order matters where ranges overlap: an
 * uncertain store must not come back over a later certain one.
 *
 * All certain operations older than the oldest uncertain one are done once, in
 * `base`, which only ever moves forward with p.  The rest, the `sequence`, is
 * walked as a binary tree, so that states which agree on their first
 * operations share the work.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "device-sim-crash-internal.h"

#include <string.h>

typedef struct SimStep {
    const SimHistoryOp *op;
    bool certain;
} SimStep;

typedef struct SimWalk {
    const SimHistory *history;
    const BaleSimCrashOptions *options;
    BaleSimCrashFunc *func;
    void *opaque;
    unsigned max_exhaustive;
    uint64_t samples;

    /* Indexes of history->ops, flushes left out, by completion. */
    size_t *order;
    size_t n_order;
    /* The least submission among order[i …]. */
    uint64_t *earliest;

    SimTree base;
    size_t n_base; /* order[0 .. n_base - 1] are done in base */

    /* Of the current point. */
    uint64_t point;
    GArray *steps; /* SimStep */
    unsigned uncertain;

    uint64_t calls;
    bool stop;
} SimWalk;

/* ---- applying --------------------------------------------------------- */

static void store_apply_whole(const SimHistoryOp *op, SimTree *tree)
{
    uint64_t first = op->pub.offset / SIM_BLOCK;
    uint64_t end = op->pub.offset + op->pub.len;

    for (size_t i = 0; i < op->n_blocks; i++) {
        uint64_t base = (first + i) * SIM_BLOCK;
        uint64_t from = MAX(base, op->pub.offset);
        uint64_t to = MIN(base + SIM_BLOCK, end);

        if (to - from == SIM_BLOCK) {
            sim_tree_put(tree, first + i, op->blocks[i]);
        } else if (op->blocks[i]) {
            sim_tree_write(tree, from, op->blocks[i]->data + (from - base),
                           to - from);
        } else {
            sim_tree_zero(tree, from, to - from);
        }
    }
    tree->size = MAX(tree->size, end);
}

static void store_apply_sector(const SimHistoryOp *op, SimTree *tree,
                               size_t sector)
{
    uint64_t at = op->pub.offset + sector * BALE_SIM_SECTOR;
    size_t index = at / SIM_BLOCK - op->pub.offset / SIM_BLOCK;

    if (op->blocks[index]) {
        sim_tree_write(tree, at, op->blocks[index]->data + at % SIM_BLOCK,
                       BALE_SIM_SECTOR);
    } else {
        sim_tree_zero(tree, at, BALE_SIM_SECTOR);
        tree->size = MAX(tree->size, at + BALE_SIM_SECTOR);
    }
}

void sim_op_apply(const SimHistoryOp *op, SimTree *tree, size_t len,
                  const uint8_t *survive)
{
    switch (op->pub.kind) {
    case BALE_SIM_OP_STORE:
        if (len == op->pub.len && !survive && !op->skip) {
            store_apply_whole(op, tree);
            break;
        }
        for (size_t i = 0; i < len / BALE_SIM_SECTOR; i++) {
            if ((!survive || survive[i]) && !(op->skip && op->skip[i])) {
                store_apply_sector(op, tree, i);
            }
        }
        break;
    case BALE_SIM_OP_RELEASE:
        sim_tree_zero(tree, op->pub.offset, op->pub.len);
        break;
    case BALE_SIM_OP_GROW:
        tree->size = MAX(tree->size, op->pub.len);
        break;
    case BALE_SIM_OP_TRUNCATE:
        sim_tree_resize(tree, op->pub.len);
        break;
    case BALE_SIM_OP_FLUSH:
        break;
    }
}

/* A certain operation is what readers saw; an uncertain one is all of it. */
static void step_apply(const SimStep *step, SimTree *tree)
{
    sim_op_apply(step->op, tree,
                 step->certain ? step->op->applied : step->op->pub.len, NULL);
}

/* Some sectors of a store survive: the first, the last, or any. */
static void step_apply_torn(const SimStep *step, SimTree *tree,
                            uint64_t *random)
{
    size_t n = step->op->pub.len / BALE_SIM_SECTOR;
    g_autofree uint8_t *survive = g_new(uint8_t, n);
    size_t cut = (size_t)(sim_random(random) % (n + 1));
    unsigned how = sim_random(random) % 4;

    for (size_t i = 0; i < n; i++) {
        survive[i] = how == 0 ? i < cut
                     : how == 1 ? i >= cut
                                : sim_random(random) & 1;
    }
    sim_op_apply(step->op, tree, step->op->pub.len, survive);
}

/* ---- states ----------------------------------------------------------- */

static void walk_emit(SimWalk *walk, const SimTree *tree,
                      const BaleSimCrash *crash)
{
    BaleSimImage *image = sim_image_new(tree);

    walk->calls++;
    if (!walk->func(image, crash, walk->opaque)) {
        walk->stop = true;
    }
    bale_sim_image_unref(image);
}

static bool is_wanted(const SimWalk *walk, uint64_t state)
{
    return !walk->options->only_state || walk->options->state == state;
}

/* All subsets of steps[i …]; @bit is the number of the next uncertain one. */
static void walk_subsets(SimWalk *walk, const SimTree *tree, guint i,
                         unsigned bit, BaleSimCrash *crash)
{
    const SimStep *step;
    SimTree with;

    if (walk->stop) {
        return;
    }
    if (i == walk->steps->len) {
        crash->state = crash->mask;
        if (is_wanted(walk, crash->state)) {
            walk_emit(walk, tree, crash);
        }
        return;
    }
    step = &g_array_index(walk->steps, SimStep, i);
    if (!step->certain) {
        walk_subsets(walk, tree, i + 1, bit + 1, crash);
    }
    sim_tree_copy(&with, tree);
    step_apply(step, &with);
    if (step->certain) {
        walk_subsets(walk, &with, i + 1, bit, crash);
    } else if (!walk->options->only_state ||
               walk->options->state >> bit & 1) {
        crash->mask |= (uint64_t)1 << bit;
        walk_subsets(walk, &with, i + 1, bit + 1, crash);
        crash->mask &= ~((uint64_t)1 << bit);
    }
    sim_tree_clear(&with);
}

/*
 * How a sampled state chooses: each operation with a probability of its own
 * state, or all but one, or one alone, or all up to one.
 */
typedef struct SimDraw {
    unsigned how;
    unsigned eighths;
    unsigned one;
} SimDraw;

static bool draw(const SimDraw *d, unsigned bit, uint64_t *random)
{
    switch (d->how) {
    case 0:
        return bit != d->one;
    case 1:
        return bit == d->one;
    case 2:
        return bit <= d->one;
    default:
        return sim_random(random) % 8 < d->eighths;
    }
}

/* One sampled state: state 0 of a point keeps nothing, state 1 everything. */
static void walk_sample(SimWalk *walk, uint64_t state, bool torn)
{
    BaleSimCrash crash = {
        .point = walk->point,
        .state = state,
        .uncertain = walk->uncertain,
        .sampled = true,
        .torn = torn,
    };
    uint64_t random = walk->options->seed + walk->point * 0x10001;
    SimDraw d;
    SimTree tree;
    unsigned bit = 0;

    random = sim_random(&random) + state;
    d.how = sim_random(&random) % 6;
    d.eighths = 1 + sim_random(&random) % 7;
    d.one = sim_random(&random) % walk->uncertain;
    if (!torn && state < 2) {
        d.how = 3;
        d.eighths = state == 0 ? 0 : 8;
    }

    sim_tree_copy(&tree, &walk->base);
    for (guint i = 0; i < walk->steps->len; i++) {
        const SimStep *step = &g_array_index(walk->steps, SimStep, i);

        if (step->certain) {
            step_apply(step, &tree);
            continue;
        }
        if (torn && step->op->pub.kind == BALE_SIM_OP_STORE &&
            sim_random(&random) & 1) {
            step_apply_torn(step, &tree, &random);
        } else if (draw(&d, bit, &random)) {
            step_apply(step, &tree);
            crash.mask |= bit < 64 ? (uint64_t)1 << bit : 0;
        }
        bit++;
    }
    walk_emit(walk, &tree, &crash);
    sim_tree_clear(&tree);
}

static void walk_samples(SimWalk *walk, uint64_t first, uint64_t n, bool torn)
{
    for (uint64_t state = first; state < first + n && !walk->stop; state++) {
        if (is_wanted(walk, state)) {
            walk_sample(walk, state, torn);
        }
    }
}

/* ---- points ----------------------------------------------------------- */

/* Which operations are certain, which uncertain, at walk->point? */
static void walk_set_point(SimWalk *walk, uint64_t point)
{
    const SimHistoryOp *ops = walk->history->ops;

    walk->point = point;
    while (walk->n_base < walk->n_order) {
        const SimHistoryOp *op = &ops[walk->order[walk->n_base]];
        SimStep step = { op, true };

        if (op->pub.durable > point) {
            break;
        }
        step_apply(&step, &walk->base);
        walk->n_base++;
    }

    g_array_set_size(walk->steps, 0);
    walk->uncertain = 0;
    /* Completed by now, in this order; then under way, by submission. */
    for (unsigned under_way = 0; under_way < 2; under_way++) {
        guint from = walk->steps->len;

        for (size_t i = walk->n_base;
             i < walk->n_order && walk->earliest[i] <= point; i++) {
            const SimHistoryOp *op = &ops[walk->order[i]];
            SimStep step = { op, op->pub.durable <= point };
            guint at;

            if (op->pub.submitted > point ||
                (op->pub.completed > point) != under_way) {
                continue;
            }
            walk->uncertain += !step.certain;
            at = walk->steps->len;
            while (under_way && at > from &&
                   g_array_index(walk->steps, SimStep, at - 1)
                           .op->pub.submitted > op->pub.submitted) {
                at--;
            }
            g_array_insert_val(walk->steps, at, step);
        }
    }
}

static void walk_point(SimWalk *walk)
{
    BaleSimCrash crash = {
        .point = walk->point,
        .uncertain = walk->uncertain,
    };
    uint64_t states;

    if (walk->uncertain <= walk->max_exhaustive) {
        states = (uint64_t)1 << walk->uncertain;
        if (!walk->options->only_state || walk->options->state < states) {
            walk_subsets(walk, &walk->base, 0, 0, &crash);
        }
    } else {
        states = walk->samples;
        walk_samples(walk, 0, states, false);
    }
    if (walk->uncertain > 0) {
        walk_samples(walk, states, walk->options->torn_samples, true);
    }
}

static gint by_completion(gconstpointer a, gconstpointer b, gpointer opaque)
{
    const SimHistoryOp *ops = opaque;
    const BaleSimOp *x = &ops[*(const size_t *)a].pub;
    const BaleSimOp *y = &ops[*(const size_t *)b].pub;

    if (x->completed != y->completed) {
        return x->completed < y->completed ? -1 : 1;
    }
    return x->submitted < y->submitted ? -1 : x->submitted > y->submitted;
}

static void walk_set_order(SimWalk *walk)
{
    const SimHistory *history = walk->history;
    uint64_t earliest = UINT64_MAX;

    walk->order = g_new(size_t, history->n_ops + 1);
    walk->earliest = g_new(uint64_t, history->n_ops + 1);
    for (size_t i = 0; i < history->n_ops; i++) {
        if (history->ops[i].pub.kind != BALE_SIM_OP_FLUSH) {
            walk->order[walk->n_order++] = i;
        }
    }
    g_qsort_with_data(walk->order, (gint)walk->n_order, sizeof(size_t),
                      by_completion, history->ops);
    for (size_t i = walk->n_order; i > 0; i--) {
        earliest = MIN(earliest,
                       history->ops[walk->order[i - 1]].pub.submitted);
        walk->earliest[i - 1] = earliest;
    }
}

/* With barriers_only: is @point next to the completion of a flush? */
static bool *find_barriers(const SimHistory *history)
{
    bool *barriers = g_new0(bool, history->events + 2);

    for (size_t i = 0; i < history->n_ops; i++) {
        const BaleSimOp *op = &history->ops[i].pub;

        if (op->kind == BALE_SIM_OP_FLUSH && op->completed != UINT64_MAX) {
            barriers[op->completed] = true;
            barriers[op->completed - 1] = true;
        }
    }
    barriers[history->events] = true;
    return barriers;
}

uint64_t sim_history_crash_states(const SimHistory *history,
                                  const BaleSimCrashOptions *options,
                                  BaleSimCrashFunc *func, void *opaque)
{
    g_autofree bool *barriers = find_barriers(history);
    uint64_t first = MIN(options->first_point, history->events);
    uint64_t last = options->last_point ? MIN(options->last_point,
                                              history->events)
                                        : history->events;
    SimWalk walk = {
        .history = history,
        .options = options,
        .func = func,
        .opaque = opaque,
        .max_exhaustive = options->max_exhaustive,
        .samples = options->samples ? options->samples
                                    : BALE_SIM_SAMPLES_DEFAULT,
    };

    if (walk.max_exhaustive == 0) {
        walk.max_exhaustive = BALE_SIM_EXHAUSTIVE_DEFAULT;
    }
    g_assert(walk.max_exhaustive <= BALE_SIM_EXHAUSTIVE_MAX);
    walk.steps = g_array_new(FALSE, FALSE, sizeof(SimStep));
    walk_set_order(&walk);
    sim_tree_copy(&walk.base, &history->origin);

    for (uint64_t point = first; point <= last && !walk.stop; point++) {
        if (options->barriers_only && !barriers[point]) {
            continue;
        }
        walk_set_point(&walk, point);
        walk_point(&walk);
    }

    sim_tree_clear(&walk.base);
    g_array_free(walk.steps, TRUE);
    g_free(walk.order);
    g_free(walk.earliest);
    return walk.calls;
}
