/*
 * What can be read of a store: its image, its snapshots and its clone, every
 * sector.
 *
 * Besides the image there are at most OTHERS things to read.  The name of each
 * is a letter, which says what it is, and a number, which nothing else has in
 * the same workload.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "sim.h"

#include <stdio.h>
#include <string.h>

static const char *const other_names[OTHERS] = {
    "the first snapshot", "the second snapshot", "the clone",
};

void observed_clear(Observed *o)
{
    g_free(o->value);
    g_free(o->error);
    memset(o, 0, sizeof(*o));
}

void observed_copy(Observed *to, const Observed *from, const World *w)
{
    size_t n = oracle_size(w->oracle);

    *to = *from;
    to->value = g_memdup2(from->value, n * sizeof(*from->value));
    to->error = g_memdup2(from->error, n * sizeof(*from->error));
}

char *world_other_name(unsigned other, uint32_t number)
{
    return g_strdup_printf("%s%c%" PRIu32, other == CLONE ? "" : "@",
                           'a' + other, number);
}

/* The other one that is called @name. */
static void others_add(World *w, const char *name, uint32_t number[OTHERS])
{
    uint32_t n = 0;
    char letter = 0;

    sscanf(name, "%c%" SCNu32, &letter, &n);
    if (letter < 'a' || letter >= 'a' + OTHERS || n == 0) {
        world_broken(w, "nothing was ever called '%s'", name);
    } else if (number[letter - 'a']) {
        world_broken(w, "both %c%" PRIu32 " and %s are there", letter,
                     number[letter - 'a'], name);
    } else {
        number[letter - 'a'] = n;
    }
}

void world_others(World *w, uint32_t number[OTHERS])
{
    g_autoptr(GArray) snapshots = bale_snapshot_list(w->store, NULL, NULL);
    g_autoptr(GArray) images = bale_image_list(w->store);

    memset(number, 0, OTHERS * sizeof(*number));
    for (guint i = 0; snapshots && i < snapshots->len; i++) {
        others_add(w, g_array_index(snapshots, BaleSnapshotListEntry, i).name,
                   number);
    }
    for (guint i = 0; i < images->len; i++) {
        const char *name = g_array_index(images, BaleImageListEntry, i).name;

        if (*name) {
            others_add(w, name, number);
        }
    }
}

BaleImage *world_open_other(World *w, unsigned other, uint32_t number,
                            GError **errp)
{
    g_autofree char *name = world_other_name(other, number);
    BaleImage *image = bale_image_open(w->store, name, errp);

    if (image && w->geo->backing) {
        bale_image_set_backing_read(image, world_backing_read, w);
    }
    return image;
}

/* @out's tracks from @first on are the sectors of @image. */
static void look_at(World *w, BaleImage *image, unsigned first, unsigned size,
                    Observed *out)
{
    unsigned c = w->cluster_sectors;

    for (unsigned at = 0; at < size; at += c) {
        unsigned n = MIN(c, size - at);
        int before = g_atomic_int_get(&w->complaints);
        int ret = bale_image_read_sync(image, (uint64_t)at * SECTOR, w->buf,
                                       n * SECTOR);

        if (ret < 0 && out->ret == 0) {
            out->ret = ret;
            out->ret_track = first + at;
        }
        if (ret < 0 && g_atomic_int_get(&w->complaints) == before &&
            !out->silent) {
            out->silent = true;
            out->silent_track = first + at;
        }
        for (unsigned i = 0; i < n; i++) {
            out->error[first + at + i] = ret < 0;
            if (ret == 0) {
                out->value[first + at + i] =
                    world_value(w, w->buf + i * SECTOR, at + i);
            }
        }
    }
}

static void look_at_other(World *w, unsigned other, Observed *out)
{
    unsigned first = oracle_sectors(w->oracle, other);
    g_autoptr(GError) err = NULL;
    BaleImage *image = world_open_other(w, other, out->other[other], &err);

    if (!image) {
        /* No memory, or damage, which was reported. */
        out->ret = out->ret ? out->ret : bale_error_to_errno(err);
        out->ret_track = first;
        out->other_size[other] = OTHER_UNREADABLE;
        return;
    }
    out->other_size[other] = bale_image_size(image) / SECTOR;
    if (out->other_size[other] <= w->max_sectors) {
        look_at(w, image, first, out->other_size[other], out);
    } else {
        world_broken(w, "%s has %u sectors", other_names[other],
                     out->other_size[other]);
    }
    bale_image_close(image);
}

void world_look(World *w, Observed *out)
{
    BaleImageInfo info;

    memset(out, 0, sizeof(*out));
    bale_image_get_info(w->image, &info);
    out->size = info.size / SECTOR;
    out->name = backing_number(info.backing_file);
    world_others(w, out->other);
    out->value = g_new0(uint32_t, oracle_size(w->oracle));
    out->error = g_new0(bool, oracle_size(w->oracle));
    if (out->size > w->max_sectors) {
        world_broken(w, "the image has %u sectors", out->size);
        return;
    }
    look_at(w, w->image, 0, out->size, out);
    for (unsigned i = 0; i < OTHERS; i++) {
        if (out->other[i]) {
            look_at_other(w, i, out);
        }
    }
}

/* --- comparing with the oracle --- */

typedef struct Question {
    World *w;
    uint64_t event, moment;
    bool unproven;
} Question;

static unsigned refuses(const Question *q, unsigned first, unsigned n,
                        const uint32_t *value)
{
    return q->unproven
               ? oracle_refuses_unproven(q->w->oracle, first, n, value,
                                         q->w->proven_event)
               : oracle_refuses(q->w->oracle, first, n, value, q->event,
                                q->moment);
}

static char *compare_one(const Question *q, const char *what, unsigned track,
                         uint32_t value)
{
    g_autofree char *may = NULL;

    if (refuses(q, track, 1, &value) == 1) {
        return NULL;
    }
    may = oracle_describe(q->w->oracle, track, q->event);
    return g_strdup_printf("%s: %" PRIu32 ", should be %s", what, value, may);
}

static char *compare_sectors(const Question *q, const char *what,
                             unsigned from, unsigned size,
                             const Observed *seen)
{
    for (unsigned at = 0; at < size;) {
        const uint32_t *value = seen->value + from + at;
        unsigned n = 0, bad;

        while (at + n < size && !seen->error[from + at + n]) {
            n++;
        }
        bad = refuses(q, from + at, n, value);
        if (bad < n) {
            g_autofree char *text = g_strdup_printf("%s %u", what, at + bad);

            return compare_one(q, text, from + at + bad, value[bad]);
        }
        at += n + 1;
    }
    return NULL;
}

static char *compare_other(const Question *q, unsigned other,
                           const Observed *seen)
{
    Oracle *o = q->w->oracle;
    g_autofree char *number =
        g_strdup_printf("number of %s", other_names[other]);
    g_autofree char *size = g_strdup_printf("size of %s", other_names[other]);
    g_autofree char *sector =
        g_strdup_printf("sector of %s", other_names[other]);
    char *error = compare_one(q, number, oracle_other(o, other),
                              seen->other[other]);

    if (error || !seen->other[other] ||
        seen->other_size[other] == OTHER_UNREADABLE) {
        return error;
    }
    error = compare_one(q, size, oracle_other_size(o, other),
                        seen->other_size[other]);
    return error ? error
                 : compare_sectors(q, sector, oracle_sectors(o, other),
                                   seen->other_size[other], seen);
}

char *world_compare(World *w, const Observed *seen, uint64_t event,
                    uint64_t moment, bool unproven)
{
    Question q = { w, event, moment, unproven };
    Oracle *o = w->oracle;
    char *error = compare_one(&q, "sectors of the image", oracle_size(o),
                              seen->size);

    if (!error) {
        error = compare_one(&q, "name of the backing file", oracle_name(o),
                            seen->name);
    }
    if (!error) {
        error = compare_sectors(&q, "sector", 0, seen->size, seen);
    }
    for (unsigned i = 0; i < OTHERS && !error; i++) {
        error = compare_other(&q, i, seen);
    }
    return error;
}

void world_read(World *w, bool errors_allowed)
{
    uint64_t moment = oracle_moment(w->oracle);
    g_autofree char *error = NULL;
    Observed seen;

    world_look(w, &seen);
    if (seen.ret && !errors_allowed) {
        world_broken(w, "reading sector %u: %s", seen.ret_track,
                     g_strerror(-seen.ret));
    }
    error = world_compare(w, &seen, NOW, moment, false);
    if (error) {
        world_broken(w, "%s", error);
    }
    observed_clear(&seen);
}

/* --- setting the oracle --- */

void oracle_expect(Oracle *o, const Observed *seen, unsigned max_sectors)
{
    for (unsigned i = 0; i < max_sectors; i++) {
        oracle_reset(o, i, i < seen->size ? seen->value[i] : VALUE_ZERO);
    }
    oracle_reset(o, oracle_size(o), seen->size);
    oracle_reset(o, oracle_name(o), seen->name);
    for (unsigned n = 0; n < OTHERS; n++) {
        unsigned first = oracle_sectors(o, n);

        for (unsigned i = first; i < first + max_sectors; i++) {
            oracle_reset(o, i, i - first < seen->other_size[n]
                                   ? seen->value[i]
                                   : VALUE_ZERO);
        }
        oracle_reset(o, oracle_other(o, n), seen->other[n]);
        oracle_reset(o, oracle_other_size(o, n), seen->other_size[n]);
    }
}

void world_settle(World *w)
{
    Observed seen;

    world_look(w, &seen);
    if (seen.ret) {
        world_broken(w, "what was written cannot be read");
    }
    oracle_expect(w->oracle, &seen, w->max_sectors);
    observed_clear(&seen);
}

/* From now on it is @value, but nothing makes that durable. */
static void pin(World *w, unsigned track, uint32_t value)
{
    uint64_t begun = oracle_begin(w->oracle, track, 1, value,
                                  bale_sim_events(w->sim));

    oracle_end(w->oracle, track, 1, begun, true, EVENT_NEVER);
}

void world_recovered(World *w)
{
    uint64_t event = bale_sim_events(w->sim);
    g_autofree char *error = NULL;
    Oracle *o = w->oracle;
    Observed seen;

    w->doubtful = true;
    world_look(w, &seen);
    error = world_compare(w, &seen, event, 0, false);
    if (error) {
        world_broken(w, "after a failed close: %s", error);
    }
    for (unsigned i = 0; i < oracle_size(o); i++) {
        if (!seen.error[i]) {
            /* A fault otherwise; a later read tells. */
            pin(w, i, seen.value[i]);
        }
    }
    pin(w, oracle_size(o), seen.size);
    pin(w, oracle_name(o), seen.name);
    for (unsigned i = 0; i < OTHERS; i++) {
        pin(w, oracle_other(o, i), seen.other[i]);
        if (seen.other_size[i] != OTHER_UNREADABLE) {
            pin(w, oracle_other_size(o, i), seen.other_size[i]);
        }
    }
    observed_clear(&seen);
}
