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

typedef struct Entry {
    uint32_t value;
    bool ok;
    uint64_t begun, ended;  /* moments; ended: EVENT_NEVER, still under way */
    uint64_t event;         /* no crash before this one can show it */
    uint64_t durable;       /* survives from this event on, for itself */
} Entry;

typedef struct Barrier {
    uint64_t moment, event;
} Barrier;

struct Oracle {
    pthread_mutex_t lock;
    GArray **track;  /* of Entry */
    unsigned tracks;
    GArray *barriers;
    uint64_t moment;
};

Oracle *oracle_new(unsigned sectors)
{
    Oracle *o = g_new0(Oracle, 1);

    pthread_mutex_init(&o->lock, NULL);
    o->tracks = sectors + 2;
    o->track = g_new0(GArray *, o->tracks);
    o->barriers = g_array_new(FALSE, FALSE, sizeof(Barrier));
    for (unsigned i = 0; i < o->tracks; i++) {
        o->track[i] = g_array_new(FALSE, FALSE, sizeof(Entry));
        oracle_reset(o, i, VALUE_ZERO);
    }
    return o;
}

void oracle_free(Oracle *o)
{
    for (unsigned i = 0; i < o->tracks; i++) {
        g_array_free(o->track[i], TRUE);
    }
    g_free(o->track);
    g_array_free(o->barriers, TRUE);
    pthread_mutex_destroy(&o->lock);
    g_free(o);
}

unsigned oracle_size(Oracle *o)
{
    return o->tracks - 2;
}

unsigned oracle_name(Oracle *o)
{
    return o->tracks - 1;
}

void oracle_reset(Oracle *o, unsigned track, uint32_t value)
{
    Entry e = { .value = value, .ok = true };

    pthread_mutex_lock(&o->lock);
    g_array_set_size(o->track[track], 0);
    g_array_append_val(o->track[track], e);
    pthread_mutex_unlock(&o->lock);
}

uint64_t oracle_begin(Oracle *o, unsigned first, unsigned n, uint32_t value,
                      uint64_t event)
{
    Entry e = { .value = value, .ended = EVENT_NEVER, .event = event,
                .durable = EVENT_NEVER };

    pthread_mutex_lock(&o->lock);
    e.begun = ++o->moment;
    for (unsigned i = first; i < first + n; i++) {
        g_array_append_val(o->track[i], e);
    }
    pthread_mutex_unlock(&o->lock);
    return e.begun;
}

void oracle_end(Oracle *o, unsigned first, unsigned n, uint64_t begun,
                bool ok, uint64_t durable)
{
    uint64_t moment;

    pthread_mutex_lock(&o->lock);
    moment = ++o->moment;
    for (unsigned i = first; i < first + n; i++) {
        for (unsigned k = o->track[i]->len; k-- > 0;) {
            Entry *e = &g_array_index(o->track[i], Entry, k);

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
static bool ruled_out(GArray *track, const Entry *e, uint64_t moment,
                      uint64_t event)
{
    for (unsigned i = 0; i < track->len; i++) {
        Entry *f = &g_array_index(track, Entry, i);

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
    for (unsigned i = 0; i < o->track[track]->len; i++) {
        Entry *e = &g_array_index(o->track[track], Entry, i);

        if (e->value == value && e->event <= event &&
            !ruled_out(o->track[track], e, moment, durable)) {
            return true;
        }
    }
    return false;
}

bool oracle_allows(Oracle *o, unsigned track, uint32_t value, uint64_t event,
                   uint64_t moment)
{
    bool yes;

    pthread_mutex_lock(&o->lock);
    yes = event == NOW
              ? allows(o, track, value, NOW, moment, 0)
              : allows(o, track, value, event, barrier_at(o, event), event);
    pthread_mutex_unlock(&o->lock);
    return yes;
}

bool oracle_allows_unproven(Oracle *o, unsigned track, uint32_t value,
                            uint64_t proven)
{
    bool yes;

    pthread_mutex_lock(&o->lock);
    yes = allows(o, track, value, NOW, barrier_at(o, proven), proven);
    pthread_mutex_unlock(&o->lock);
    return yes;
}

char *oracle_describe(Oracle *o, unsigned track, uint64_t event)
{
    GString *s = g_string_new(NULL);
    uint64_t moment;

    pthread_mutex_lock(&o->lock);
    moment = event == NOW ? o->moment : barrier_at(o, event);
    for (unsigned i = 0; i < o->track[track]->len; i++) {
        Entry *e = &g_array_index(o->track[track], Entry, i);

        if (e->event <= event &&
            !ruled_out(o->track[track], e, moment,
                       event == NOW ? 0 : event)) {
            g_string_append_printf(s, "%s%" PRIu32, s->len ? " or " : "",
                                   e->value);
        }
    }
    pthread_mutex_unlock(&o->lock);
    return g_string_free(s, FALSE);
}
