/*
 * The oracle: what may be read, now and after a crash, sector by sector.
 *
 * Each track (a sector, the image's size, the backing file's name) is the list
 * of what it was told to become.  An entry is ruled out once a later one is
 * certain: one that began after this one had ended, and ended with success
 * before the newest flush was asked for.  What is not ruled out is allowed;
 * this holds for requests one after the other and for parallel ones.
 *
 * Threads: any; one lock.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "sim.h"

#include <string.h>

typedef struct Entry {
    uint32_t value;
    bool ok;
    uint64_t begun, ended;  /* moments; ended: EVENT_NEVER, still under way */
    uint64_t event;         /* no crash before this one can show it */
    uint64_t durable;       /* survives from this event on, for itself */
} Entry;

/* Most have an entry or two, and there are thousands of tracks. */
#define TRACK_OWN 2

typedef struct Track {
    unsigned len, room;  /* room 0: in own */
    Entry own[TRACK_OWN];
    Entry *more;
} Track;

typedef struct Barrier {
    uint64_t moment, event;
} Barrier;

struct Oracle {
    pthread_mutex_t lock;
    Track *track;
    unsigned sectors, tracks;
    GArray *barriers;
    uint64_t moment;
};

static Entry *track_entries(const Track *t)
{
    return t->room ? t->more : (Entry *)t->own;
}

static void track_push(Track *t, const Entry *e)
{
    if (!t->room && t->len == TRACK_OWN) {
        t->room = 4 * TRACK_OWN;
        t->more = g_new(Entry, t->room);
        memcpy(t->more, t->own, sizeof(t->own));
    } else if (t->room && t->len == t->room) {
        t->room *= 2;
        t->more = g_renew(Entry, t->more, t->room);
    }
    track_entries(t)[t->len++] = *e;
}

static void track_reset(Track *t, uint32_t value)
{
    Entry e = { .value = value, .ok = true };

    g_free(t->more);
    t->more = NULL;
    t->room = 0;
    t->len = 0;
    track_push(t, &e);
}

Oracle *oracle_new(unsigned sectors)
{
    Oracle *o = g_new0(Oracle, 1);

    pthread_mutex_init(&o->lock, NULL);
    o->sectors = sectors;
    o->tracks = (1 + OTHERS) * sectors + 2 + 2 * OTHERS;
    o->track = g_new0(Track, o->tracks);
    o->barriers = g_array_new(FALSE, FALSE, sizeof(Barrier));
    for (unsigned i = 0; i < o->tracks; i++) {
        track_reset(&o->track[i], VALUE_ZERO);
    }
    return o;
}

void oracle_free(Oracle *o)
{
    for (unsigned i = 0; i < o->tracks; i++) {
        g_free(o->track[i].more);
    }
    g_free(o->track);
    g_array_free(o->barriers, TRUE);
    pthread_mutex_destroy(&o->lock);
    g_free(o);
}

unsigned oracle_size(Oracle *o)
{
    return (1 + OTHERS) * o->sectors;
}

unsigned oracle_name(Oracle *o)
{
    return oracle_size(o) + 1;
}

unsigned oracle_other(Oracle *o, unsigned other)
{
    return oracle_name(o) + 1 + other;
}

unsigned oracle_other_size(Oracle *o, unsigned other)
{
    return oracle_other(o, OTHERS) + other;
}

unsigned oracle_sectors(Oracle *o, unsigned other)
{
    return (1 + other) * o->sectors;
}

void oracle_reset(Oracle *o, unsigned track, uint32_t value)
{
    pthread_mutex_lock(&o->lock);
    track_reset(&o->track[track], value);
    pthread_mutex_unlock(&o->lock);
}

static uint64_t begin(Oracle *o, unsigned first, unsigned n,
                      const uint32_t *value, bool each, uint64_t event)
{
    Entry e = { .ended = EVENT_NEVER, .event = event,
                .durable = EVENT_NEVER };

    pthread_mutex_lock(&o->lock);
    e.begun = ++o->moment;
    for (unsigned i = 0; i < n; i++) {
        e.value = value[each ? i : 0];
        track_push(&o->track[first + i], &e);
    }
    pthread_mutex_unlock(&o->lock);
    return e.begun;
}

uint64_t oracle_begin(Oracle *o, unsigned first, unsigned n, uint32_t value,
                      uint64_t event)
{
    return begin(o, first, n, &value, false, event);
}

uint64_t oracle_begin_each(Oracle *o, unsigned first, unsigned n,
                           const uint32_t *value, uint64_t event)
{
    return begin(o, first, n, value, true, event);
}

void oracle_end(Oracle *o, unsigned first, unsigned n, uint64_t begun,
                bool ok, uint64_t durable)
{
    uint64_t moment;

    pthread_mutex_lock(&o->lock);
    moment = ++o->moment;
    for (unsigned i = first; i < first + n; i++) {
        for (unsigned k = o->track[i].len; k-- > 0;) {
            Entry *e = &track_entries(&o->track[i])[k];

            if (e->begun == begun) {
                e->ended = moment;
                e->ok = ok;
                e->durable = ok ? durable : EVENT_NEVER;
                break;
            }
        }
    }
    pthread_mutex_unlock(&o->lock);
}

uint64_t oracle_moment(Oracle *o)
{
    uint64_t moment;

    pthread_mutex_lock(&o->lock);
    moment = ++o->moment;
    pthread_mutex_unlock(&o->lock);
    return moment;
}

void oracle_flushed(Oracle *o, uint64_t moment, uint64_t event)
{
    Barrier b = { moment, event };

    pthread_mutex_lock(&o->lock);
    g_array_append_val(o->barriers, b);
    pthread_mutex_unlock(&o->lock);
}

/* The newest moment whose flush was acknowledged at @event; under the lock. */
static uint64_t barrier_at(Oracle *o, uint64_t event)
{
    uint64_t moment = 0;

    for (unsigned i = 0; i < o->barriers->len; i++) {
        Barrier *b = &g_array_index(o->barriers, Barrier, i);

        if (b->event <= event) {
            moment = MAX(moment, b->moment);
        }
    }
    return moment;
}

/* Is @e ruled out by what ended by @moment, or is durable at @event? */
static bool ruled_out(const Track *track, const Entry *e, uint64_t moment,
                      uint64_t event)
{
    for (unsigned i = 0; i < track->len; i++) {
        const Entry *f = &track_entries(track)[i];

        if (f->ok && f->begun >= e->ended && f->begun > e->begun &&
            f->ended != EVENT_NEVER &&
            (f->ended <= moment || f->durable <= event)) {
            return true;
        }
    }
    return false;
}

static bool allows(Oracle *o, unsigned track, uint32_t value, uint64_t event,
                   uint64_t moment, uint64_t durable)
{
    const Track *t = &o->track[track];

    for (unsigned i = 0; i < t->len; i++) {
        const Entry *e = &track_entries(t)[i];

        if (e->value == value && e->event <= event &&
            !ruled_out(t, e, moment, durable)) {
            return true;
        }
    }
    return false;
}

static bool same_history(const Track *a, const Track *b)
{
    return a->len == b->len && !memcmp(track_entries(a), track_entries(b),
                                       a->len * sizeof(Entry));
}

unsigned oracle_refuses(Oracle *o, unsigned first, unsigned n,
                        const uint32_t *value, uint64_t event,
                        uint64_t moment)
{
    uint64_t durable = event == NOW ? 0 : event;
    unsigned i;

    pthread_mutex_lock(&o->lock);
    if (event != NOW) {
        moment = barrier_at(o, event);
    }
    for (i = 0; i < n; i++) {
        /* Neighbours were mostly written together. */
        if (i > 0 && value[i] == value[i - 1] &&
            same_history(&o->track[first + i], &o->track[first + i - 1])) {
            continue;
        }
        if (!allows(o, first + i, value[i], event, moment, durable)) {
            break;
        }
    }
    pthread_mutex_unlock(&o->lock);
    return i;
}

unsigned oracle_refuses_unproven(Oracle *o, unsigned first, unsigned n,
                                 const uint32_t *value, uint64_t proven)
{
    unsigned i;

    pthread_mutex_lock(&o->lock);
    for (i = 0; i < n; i++) {
        if (!allows(o, first + i, value[i], NOW, barrier_at(o, proven),
                    proven)) {
            break;
        }
    }
    pthread_mutex_unlock(&o->lock);
    return i;
}

void oracle_prune(Oracle *o, uint64_t event)
{
    uint64_t moment;

    pthread_mutex_lock(&o->lock);
    moment = barrier_at(o, event);
    for (unsigned i = 0; i < o->tracks; i++) {
        Track *t = &o->track[i];
        unsigned kept = 0;

        /* What rules an entry out came later, and is there still. */
        for (unsigned k = t->len; k-- > 0;) {
            Entry e = track_entries(t)[k];

            if (!ruled_out(t, &e, moment, event)) {
                track_entries(t)[t->len - ++kept] = e;
            }
        }
        memmove(track_entries(t), track_entries(t) + t->len - kept,
                kept * sizeof(Entry));
        t->len = kept;
    }
    pthread_mutex_unlock(&o->lock);
}

bool oracle_allows(Oracle *o, unsigned track, uint32_t value, uint64_t event,
                   uint64_t moment)
{
    return oracle_refuses(o, track, 1, &value, event, moment) == 1;
}

char *oracle_describe(Oracle *o, unsigned track, uint64_t event)
{
    const Track *t = &o->track[track];
    GString *s = g_string_new(NULL);
    uint64_t moment;

    pthread_mutex_lock(&o->lock);
    moment = event == NOW ? o->moment : barrier_at(o, event);
    for (unsigned i = 0; i < t->len; i++) {
        const Entry *e = &track_entries(t)[i];

        if (e->event <= event &&
            !ruled_out(t, e, moment, event == NOW ? 0 : event)) {
            g_string_append_printf(s, "%s%" PRIu32, s->len ? " or " : "",
                                   e->value);
        }
    }
    pthread_mutex_unlock(&o->lock);
    return g_string_free(s, FALSE);
}
