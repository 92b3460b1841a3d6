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

/* --- what was seen before --- */

/* What a state without damage, told by its hash, was found to hold. */
typedef struct Memo {
    Observed seen;
    bool went_on;
} Memo;

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
        observed_copy(&memo->seen, seen, w);
        g_hash_table_insert(w->memo, g_memdup2(&hash, sizeof(hash)), memo);
    }
    if (memo) {
        memo->went_on |= went_on;
    }
}

/* --- comparing --- */

/* May @seen be after a crash at @event?  What is wrong. */
static char *compare(World *w, uint64_t event, unsigned flags,
                     const Observed *seen)
{
    return world_compare(w, seen, event, 0, flags & VERIFY_UNPROVEN);
}

/* Everything that can be read, into @out; what is wrong with that. */
static char *observe(World *v, unsigned flags, Observed *out)
{
    world_look(v, out);
    if (v->error) {
        return g_strdup(v->error);
    }
    if (out->ret && !(flags & VERIFY_DAMAGE)) {
        return g_strdup_printf("reading sector %u: %s", out->ret_track,
                               g_strerror(-out->ret));
    }
    if (out->ret && out->ret != -EIO) {
        return g_strdup_printf("reading damage at sector %u: %s and not EIO",
                               out->ret_track, g_strerror(-out->ret));
    }
    return out->silent ? g_strdup_printf("damage at sector %u was not "
                                         "reported", out->silent_track)
                       : NULL;
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
    oracle_expect(v->oracle, was, w->max_sectors);
    v->next_value = w->next_value + 100;
    if (!world_step(v, 'p') || !world_step(v, 'f') || !world_step(v, 'q') ||
        !world_step(v, 'r')) {
        return g_strdup("the recovered store does not go on");
    }
    world_read(v, false);
    return v->error ? g_strdup_printf("after going on: %s", v->error)
                    : check(v, 0);
}

/* The same of a damaged one, which is killed in between: it gets no worse. */
static char *go_on_damaged(World *w, World *v, const Observed *was)
{
    g_autoptr(BaleSimImage) image = NULL;
    uint64_t corrupt = corrupt_states;
    char *error;

    oracle_expect(v->oracle, was, w->max_sectors);
    v->next_value = w->next_value + 100;
    if (!world_step(v, 'p') || !world_step(v, 'f')) {
        return g_strdup("the damaged store does not go on");
    }
    image = bale_sim_image(v->sim);
    error = verify_image(v, image, bale_sim_events(v->sim),
                         VERIFY_DAMAGE | VERIFY_OPENS, NULL);
    if (!error && corrupt_states != corrupt) {
        error = g_strdup("it is corrupt");
    }
    if (error) {
        g_autofree char *what = error;

        error = g_strdup_printf("used and killed: %s", what);
    }
    return error;
}

static char *verify_open(World *w, World *v, uint64_t event, unsigned flags,
                         Observed *out)
{
    g_autofree char *error = NULL;
    BaleStoreInfo info;

    bale_store_get_info(v->store, &info);
    if (info.corrupt && (flags & VERIFY_DAMAGE) && v->complaints) {
        /*
         * Something is lost that has no name any more.  The user was told,
         * nothing can be written, and reads fail unless old data is asked for.
         */
        uint8_t sector[512];

        corrupt_states++;
        if (bale_image_size(v->image) > 0 &&
            bale_image_read_sync(v->image, 0, sector, sizeof(sector)) !=
                -EIO) {
            return g_strdup("a corrupt store is read");
        }
        return world_step(v, 'p') ? g_strdup("a corrupt store is written")
                                  : NULL;
    }
    error = observe(v, flags, out);
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
    if (!error && (flags & VERIFY_GO_ON_DAMAGED) && v->complaints &&
        !out->ret) {
        error = go_on_damaged(w, v, out);
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
            observed_copy(out, &memo->seen, w);
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
