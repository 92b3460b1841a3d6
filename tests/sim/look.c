/*
 * What can be read of a store: its image and its snapshot, every sector.
 *
 * There is at most one snapshot at a time.  Its name tells its number, which
 * no other one has in the same workload.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "sim.h"

#include <stdio.h>
#include <string.h>

void observed_clear(Observed *o)
{
    g_free(o->value);
    g_free(o->error);
    memset(o, 0, sizeof(*o));
}

void observed_copy(Observed *to, const Observed *from, const World *w)
{
    size_t n = 2 * (size_t)w->max_sectors;

    *to = *from;
    to->value = g_memdup2(from->value, n * sizeof(*from->value));
    to->error = g_memdup2(from->error, n * sizeof(*from->error));
}

/* The number of the snapshot; 0: there is none. */
uint32_t world_snapshot(World *w)
{
    g_autoptr(GArray) list = bale_snapshot_list(w->store, NULL, NULL);
    uint32_t number = 0;

    if (!list || list->len == 0) {
        return 0;
    }
    if (list->len > 1) {
        world_broken(w, "there are %u snapshots", list->len);
    }
    sscanf(g_array_index(list, BaleSnapshotListEntry, 0).name, "s%" SCNu32,
           &number);
    return number;
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

void world_look(World *w, Observed *out)
{
    g_autofree char *name = NULL;
    g_autoptr(GError) err = NULL;
    BaleImageInfo info;
    BaleImage *snap;

    memset(out, 0, sizeof(*out));
    bale_image_get_info(w->image, &info);
    out->size = info.size / SECTOR;
    out->name = backing_number(info.backing_file);
    out->snap = world_snapshot(w);
    out->value = g_new0(uint32_t, 2 * w->max_sectors);
    out->error = g_new0(bool, 2 * w->max_sectors);
    if (out->size > w->max_sectors) {
        world_broken(w, "the image has %u sectors", out->size);
        return;
    }
    look_at(w, w->image, 0, out->size, out);
    if (!out->snap) {
        return;
    }
    name = g_strdup_printf("@s%" PRIu32, out->snap);
    snap = bale_image_open(w->store, name, &err);
    if (!snap) {
        /* No memory, or damage, which was reported. */
        out->ret = out->ret ? out->ret : bale_error_to_errno(err);
        out->ret_track = w->max_sectors;
        out->snap_size = SNAP_UNREADABLE;
        return;
    }
    if (w->geo->backing) {
        bale_image_set_backing_read(snap, world_backing_read, w);
    }
    out->snap_size = bale_image_size(snap) / SECTOR;
    if (out->snap_size <= w->max_sectors) {
        look_at(w, snap, w->max_sectors, out->snap_size, out);
    } else {
        world_broken(w, "the snapshot has %u sectors", out->snap_size);
    }
    bale_image_close(snap);
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
        error = compare_one(&q, "number of the snapshot", oracle_snap(o),
                            seen->snap);
    }
    if (!error) {
        error = compare_sectors(&q, "sector", 0, seen->size, seen);
    }
    if (!error && seen->snap && seen->snap_size != SNAP_UNREADABLE) {
        error = compare_one(&q, "sectors of the snapshot",
                            oracle_snap_size(o), seen->snap_size);
        if (!error) {
            error = compare_sectors(&q, "the snapshot's sector",
                                    w->max_sectors, seen->snap_size, seen);
        }
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
        oracle_reset(o, max_sectors + i,
                     i < seen->snap_size ? seen->value[max_sectors + i]
                                         : VALUE_ZERO);
    }
    oracle_reset(o, oracle_size(o), seen->size);
    oracle_reset(o, oracle_name(o), seen->name);
    oracle_reset(o, oracle_snap(o), seen->snap);
    oracle_reset(o, oracle_snap_size(o), seen->snap_size);
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
    for (unsigned i = 0; i < 2 * w->max_sectors; i++) {
        if (!seen.error[i]) {
            /* A fault otherwise; a later read tells. */
            pin(w, i, seen.value[i]);
        }
    }
    pin(w, oracle_size(o), seen.size);
    pin(w, oracle_name(o), seen.name);
    pin(w, oracle_snap(o), seen.snap);
    if (seen.snap_size != SNAP_UNREADABLE) {
        pin(w, oracle_snap_size(o), seen.snap_size);
    }
    observed_clear(&seen);
}
