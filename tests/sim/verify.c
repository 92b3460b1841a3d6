/*
 * Recover what a device holds, and compare it with the oracle.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "sim.h"

#include <errno.h>
#include <string.h>

uint64_t corrupt_states, recovered_states;

/* States of one workload that are remembered. */
#define MEMO_MAX 65536

/* Superblock copies that a crash may have torn: one round writes two. */
#define TORN_SUPERS_MAX 2

void observed_clear(Observed *o)
{
    g_free(o->value);
    g_free(o->error);
    memset(o, 0, sizeof(*o));
}

/* --- what was seen before --- */

/* What a state without damage, told by its hash, was found to hold. */
typedef struct Memo {
    Observed seen;
    bool went_on;
} Memo;

static void observed_copy(Observed *to, const Observed *from, unsigned n)
{
    *to = *from;
    to->value = g_memdup2(from->value, n * sizeof(*from->value));
    to->error = g_memdup2(from->error, n * sizeof(*from->error));
}

static void memo_free(gpointer opaque)
{
    Memo *memo = opaque;

    observed_clear(&memo->seen);
    g_free(memo);
}

static Memo *memo_find(World *w, uint64_t hash)
{
    return w->memo ? g_hash_table_lookup(w->memo, &hash) : NULL;
}

static void memo_put(World *w, uint64_t hash, const Observed *seen,
                     bool went_on)
{
    Memo *memo = memo_find(w, hash);

    if (!w->memo) {
        w->memo = g_hash_table_new_full(g_int64_hash, g_int64_equal, g_free,
                                        memo_free);
    }
    if (!memo && g_hash_table_size(w->memo) < MEMO_MAX) {
        memo = g_new0(Memo, 1);
        observed_copy(&memo->seen, seen, w->max_sectors);
        g_hash_table_insert(w->memo, g_memdup2(&hash, sizeof(hash)), memo);
    }
    if (memo) {
        memo->went_on |= went_on;
    }
}

/* --- comparing --- */

static char *refused(World *w, unsigned track, const char *what,
                     uint32_t value, uint64_t event)
{
    g_autofree char *may = oracle_describe(w->oracle, track, event);

    return g_strdup_printf("%s: %" PRIu32 ", should be %s", what, value, may);
}

/* The first of @n tracks that may not be what it is; or @n. */
static unsigned refuses(World *w, unsigned first, unsigned n,
                        const uint32_t *value, uint64_t event, unsigned flags)
{
    return (flags & VERIFY_UNPROVEN)
               ? oracle_refuses_unproven(w->oracle, first, n, value,
                                         w->proven_event)
               : oracle_refuses(w->oracle, first, n, value, event, 0);
}

/* May @seen be after a crash at @event?  What is wrong. */
static char *compare(World *w, uint64_t event, unsigned flags,
                     const Observed *seen)
{
    unsigned size = oracle_size(w->oracle), name = oracle_name(w->oracle);

    if (refuses(w, size, 1, &seen->size, event, flags) < 1) {
        return refused(w, size, "sectors of the image", seen->size, event);
    }
    if (refuses(w, name, 1, &seen->name, event, flags) < 1) {
        return refused(w, name, "name of the backing file", seen->name,
                       event);
    }
    for (unsigned first = 0; first < seen->size;) {
        unsigned n = 0, bad;

        while (first + n < seen->size && !seen->error[first + n]) {
            n++;
        }
        bad = refuses(w, first, n, seen->value + first, event, flags);
        if (bad < n) {
            g_autofree char *what = g_strdup_printf("sector %u", first + bad);

            return refused(w, first + bad, what, seen->value[first + bad],
                           event);
        }
        first += n + 1;
    }
    return NULL;
}

/* Everything that can be read, into @out; what is wrong with that. */
static char *observe(World *w, World *v, unsigned flags, Observed *out)
{
    unsigned c = w->cluster_sectors;
    BaleImageInfo info;

    bale_image_get_info(v->image, &info);
    out->size = info.size / SECTOR;
    out->name = backing_number(info.backing_file);
    out->value = g_new0(uint32_t, w->max_sectors);
    out->error = g_new0(bool, w->max_sectors);
    if (out->size > w->max_sectors) {
        return g_strdup_printf("the image has %u sectors", out->size);
    }
    for (unsigned first = 0; first < out->size; first += c) {
        unsigned n = MIN(c, out->size - first);
        int before = g_atomic_int_get(&v->complaints);
        int ret = bale_image_read_sync(v->image, (uint64_t)first * SECTOR,
                                       v->buf, n * SECTOR);

        if (ret < 0 && !(flags & VERIFY_DAMAGE)) {
            return g_strdup_printf("reading sector %u: %s", first,
                                   g_strerror(-ret));
        }
        if (ret < 0 && ret != -EIO) {
            return g_strdup_printf("reading damage at sector %u: %s and not "
                                   "EIO", first, g_strerror(-ret));
        }
        if (ret < 0 && g_atomic_int_get(&v->complaints) == before) {
            return g_strdup_printf("damage at sector %u was not reported",
                                   first);
        }
        for (unsigned i = first; i < first + n; i++) {
            out->error[i] = ret < 0;
            if (ret == 0) {
                out->value[i] = world_value(w, v->buf + (i - first) * SECTOR,
                                            i);
            }
        }
    }
    return NULL;
}

static char *check(World *v, unsigned flags)
{
    g_autoptr(GError) err = NULL;
    BaleCheckResult result;

    if (!bale_store_check(v->store, BALE_CHECK_DATA, NULL, NULL, &result,
                          &err)) {
        return g_strdup_printf("check: %s", err->message);
    }
    if (result.wrong_counters) {
        return g_strdup_printf("check: %" PRIu64 " wrong counters",
                               result.wrong_counters);
    }
    if (!(flags & VERIFY_DAMAGE) &&
        (result.damaged || result.bad_superblocks > TORN_SUPERS_MAX)) {
        return g_strdup_printf("check: %" PRIu64 " damaged, %" PRIu64
                               " bad superblocks", result.damaged,
                               result.bad_superblocks);
    }
    return NULL;
}

/* The recovered store is a store like any other. */
static char *go_on(World *w, World *v, const Observed *was)
{
    for (unsigned i = 0; i < w->max_sectors; i++) {
        oracle_reset(v->oracle, i, i < was->size ? was->value[i]
                                                 : VALUE_ZERO);
    }
    oracle_reset(v->oracle, oracle_size(v->oracle), was->size);
    oracle_reset(v->oracle, oracle_name(v->oracle), was->name);
    v->next_value = w->next_value + 100;
    if (!world_step(v, 'p') || !world_step(v, 'f') || !world_step(v, 'q') ||
        !world_step(v, 'r')) {
        return g_strdup("the recovered store does not go on");
    }
    world_read(v, false);
    return v->error ? g_strdup_printf("after going on: %s", v->error)
                    : check(v, 0);
}

static char *verify_open(World *w, World *v, uint64_t event, unsigned flags,
                         Observed *out)
{
    g_autofree char *error = NULL;
    BaleStoreInfo info;

    bale_store_get_info(v->store, &info);
    if (info.corrupt && (flags & VERIFY_DAMAGE) && v->complaints) {
        /*
         * Something is lost that has no name any more.  The user was told, and
         * nothing can be written; what is read may be old.
         */
        corrupt_states++;
        return world_step(v, 'p') ? g_strdup("a corrupt store is written")
                                  : NULL;
    }
    error = observe(w, v, flags, out);
    if (!error) {
        error = compare(w, event, flags, out);
    }
    if (!error) {
        error = check(v, flags);
    }
    if (!error && v->complaints && !(flags & VERIFY_DAMAGE)) {
        error = g_strdup("recovery reports damage");
    }
    if (!error && v->failures) {
        error = g_strdup("the store was poisoned by reading");
    }
    if (!error && (flags & VERIFY_GO_ON)) {
        error = go_on(w, v, out);
    }
    return g_steal_pointer(&error);
}

char *verify_image(World *w, BaleSimImage *image, uint64_t event,
                   unsigned flags, Observed *out)
{
    BaleSimOptions options = { .no_history = true };
    bool memorable = !(flags & VERIFY_DAMAGE);
    uint64_t hash = memorable ? bale_sim_image_hash(image) : 0;
    Memo *memo = memorable ? memo_find(w, hash) : NULL;
    Observed own = { .size = 0 };
    char *error = NULL;
    World *v;

    out = out ? out : &own;
    memset(out, 0, sizeof(*out));
    if (memo && (memo->went_on || !(flags & VERIFY_GO_ON))) {
        /* The same bytes: only what they may be has changed. */
        if (out != &own) {
            observed_copy(out, &memo->seen, w->max_sectors);
        }
        return compare(w, event, flags, &memo->seen);
    }
    recovered_states++;
    v = world_new(w->geo, bale_sim_new_from_image(image, &options));
    if (verbose) {
        v->story = g_string_new(NULL);
    }
    if (world_open(v)) {
        error = verify_open(w, v, event, flags, out);
    } else if (!(flags & VERIFY_DAMAGE) || (flags & VERIFY_OPENS)) {
        error = g_strdup_printf("the store does not open%s%s",
                                v->story ? ": " : "",
                                v->story ? v->story->str : "");
    }
    if (!error && memorable) {
        memo_put(w, hash, out, flags & VERIFY_GO_ON);
    }
    observed_clear(&own);
    world_free(v);
    return error;
}
