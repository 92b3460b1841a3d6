/*
 * Compaction: which page, when, and how fast.
 *
 * In the background the maintenance thread compacts one page after the other
 * while enough of the store is garbage; for a writer who finds no space it
 * takes whatever page has some; and on command the caller's thread does it.
 *
 * In the background the best page is the one with most garbage for what has to
 * be copied, and of several the older: what was written lately is likely to
 * become garbage without our help.  (That is the cost and benefit of
 * log-structured file systems.)
 *
 * Speed: a run keeps to its rate by a token bucket, and makes way for requests:
 * after a step it rests in proportion to what the step took, less the more of
 * the store is garbage.  While a writer waits for space nothing of that counts.
 *
 * Where writers are faster, so that there is more garbage than what is live,
 * the background makes them wait in turn: for a part of the time that each step
 * took, the more the more there is, the workers begin no writes.  That ends by
 * itself, and reads, flushes and discards go on: nobody waits in a circle.
 *
 * Steps: a page is compacted window by window (compact.c).  Each window is a
 * step of maintenance (maintain.c): a checkpoint, or the release of a page, may
 * come between two of them, and who pauses maintenance makes us let go of the
 * page.
 *
 * Threads: see above; everything here takes log_lock itself.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "store-internal.h"

#include <errno.h>
#include <string.h>
#include <time.h>

/* In the background a page is worth it when so many percent are garbage ... */
#define COMPACT_PAGE_GARBAGE 25
/* ... and when so many percent of the store are. */
#define COMPACT_STORE_GARBAGE 15
/* When so many percent of the store are it does not make way any more. */
#define COMPACT_URGENT_GARBAGE 30
/* On command, or when space is needed, a page is worth it with so many. */
#define COMPACT_COMMAND_GARBAGE 5
/* A step is followed by a rest of at most so many times its length ... */
#define REST_TIMES_BACKGROUND 3
#define REST_TIMES_COMMAND 1
/* ... and of at most so many microseconds. */
#define REST_MAX_US 50000
/*
 * Writers wait for at most so many hundredths of a step's time: that many when
 * there is twice as much garbage as what is live ...
 */
#define HOLD_MAX 90
/* ... or as so many pages if that is more. */
#define HOLD_PAGES_MIN 2
/* The token bucket holds what its rate brings in so many microseconds. */
#define PACE_BURST_US 100000
/* A rate may change: look again after so many microseconds. */
#define PACE_LOOK_US 100000
/* Flushes that pages which a command has emptied are given to become free. */
#define COMMAND_FLUSHES_MAX 4

/* How fast one run is, and how fast it may be. */
typedef struct Pace {
    BalePaceDebt *debt;  /* to the rate; under log_lock */
    int64_t step_us;     /* when the step began; 0: in none */
    uint64_t examined;   /* stats.compact_examined_bytes by then */
    int64_t rest_us;     /* when the rest is over */
    uint64_t requests;   /* of callers, when last looked */
    uint64_t reads;      /* ... those that read */
} Pace;

/* --- choosing --- */

static uint64_t page_garbage(const BalePage *p)
{
    /* Live bytes are rounded up, and may exceed what is there. */
    return p->end - MIN(p->end, p->live_bytes + p->overhead);
}

static bool page_compactable(const BalePage *p)
{
    return p->state == BALE_PAGE_SEALED && p->bucket != BALE_BUCKET_META &&
           p->end > 0;
}

/* At least @percent of garbage, and opened up to @order; under log_lock. */
static bool page_wanted(const BalePage *p, unsigned percent, uint64_t order)
{
    return page_compactable(p) && p->order <= order && !p->compact_stuck &&
           page_garbage(p) * 100 >= p->end * percent;
}

/* Somebody compacts @p, or some of it is not on the device yet. */
static bool page_busy(const BalePage *p)
{
    return p->compacting || p->in_flight;
}

/* What it is worth to compact @p in the background; under log_lock. */
static double page_worth(BaleStore *s, const BalePage *p)
{
    double garbage = (double)page_garbage(p) / p->end;
    uint64_t age = MIN(s->page_order - p->order, s->pages->len);

    return garbage / (2 - garbage) * (1 + (double)age / s->pages->len);
}

/*
 * The page that is worth most, of those with at least @percent of garbage that
 * were opened up to @order (so that a run ends: it does not compact its own
 * copies); it is held by counting as its reader.  False: none.  Under log_lock.
 */
static bool compact_choose(BaleStore *s, unsigned percent, uint64_t order,
                           uint64_t *page)
{
    bool background = percent == COMPACT_PAGE_GARBAGE;
    uint64_t best = PAGE_NONE;
    double best_worth = 0;

    for (uint64_t i = 0; i < s->pages->len; i++) {
        BalePage *p = bale_page(s, i);
        double worth;

        if (page_busy(p) || !page_wanted(p, percent, order) ||
            /* ... which dies when the last of its readers leaves */
            (!p->live_bytes && !p->tombstone_seq)) {
            continue;
        }
        worth = background ? page_worth(s, p)
                           : (double)page_garbage(p) / p->end;
        if (best == PAGE_NONE || worth > best_worth) {
            best = i;
            best_worth = worth;
        }
    }
    if (best != PAGE_NONE) {
        bale_page(s, best)->readers++;
        bale_page(s, best)->compacting = true;
    }
    *page = best;
    return best != PAGE_NONE;
}

/* Is there a page that could be chosen later?  Under log_lock. */
static bool compact_busy(BaleStore *s, unsigned percent, uint64_t order)
{
    bool busy = false;

    for (uint64_t i = 0; i < s->pages->len && !busy; i++) {
        BalePage *p = bale_page(s, i);

        busy = page_busy(p) && page_wanted(p, percent, order);
    }
    return busy;
}

/* Percent of the store that are garbage.  Under log_lock. */
static unsigned store_garbage(BaleStore *s)
{
    uint64_t used = 0, garbage = 0;

    for (uint64_t i = 0; i < s->pages->len; i++) {
        BalePage *p = bale_page(s, i);

        if (page_compactable(p)) {
            used += p->end;
            garbage += page_garbage(p);
        }
    }
    return used ? garbage * 100 / used : 0;
}

/* Bytes of pages with at least @percent of garbage.  Under log_lock. */
static uint64_t compact_total(BaleStore *s, unsigned percent)
{
    uint64_t total = 0;

    for (uint64_t i = 0; i < s->pages->len; i++) {
        BalePage *p = bale_page(s, i);

        if (page_wanted(p, percent, UINT64_MAX)) {
            total += p->end;
        }
    }
    return total;
}

uint64_t bale_compact_pending(BaleStore *s)
{
    return store_garbage(s) < COMPACT_STORE_GARBAGE
               ? 0
               : compact_total(s, COMPACT_PAGE_GARBAGE);
}

/* --- pace --- */

static uint64_t examined_bytes(BaleStore *s)
{
    return __atomic_load_n(&s->stats.compact_examined_bytes,
                           __ATOMIC_RELAXED);
}

/* What is owed after the time that has passed; at @rate, which is not 0. */
static void debt_pay(BalePaceDebt *debt, uint64_t rate)
{
    int64_t now_us = g_get_monotonic_time();
    double burst = (double)rate * PACE_BURST_US / G_USEC_PER_SEC;

    debt->bytes -= (double)(now_us - debt->then_us) * rate / G_USEC_PER_SEC;
    debt->bytes = MAX(debt->bytes, -burst);
    debt->then_us = now_us;
}

static uint64_t pace_requests(BaleStore *s, uint64_t *reads)
{
    *reads = __atomic_load_n(&s->stats.reads, __ATOMIC_RELAXED);
    return *reads + __atomic_load_n(&s->stats.writes, __ATOMIC_RELAXED) +
           __atomic_load_n(&s->stats.zeroes, __ATOMIC_RELAXED);
}

static Pace pace_init(BaleStore *s, BalePaceDebt *debt)
{
    Pace pace = { .debt = debt };

    pace.requests = pace_requests(s, &pace.reads);
    return pace;
}

static void pace_step_begins(Pace *pace, BaleStore *s)
{
    pace->step_us = g_get_monotonic_time();
    pace->examined = examined_bytes(s);
}

/*
 * A step has ended, which @rate (0: none) has to pay for; and if there were
 * requests meanwhile it is followed by a rest of @times (hundredths) its time.
 * Under log_lock.
 */
static void pace_step_ended(Pace *pace, BaleStore *s, uint64_t rate,
                            unsigned times)
{
    int64_t now_us = g_get_monotonic_time();
    uint64_t reads, requests = pace_requests(s, &reads);
    bool reading = reads != pace->reads ||
                   __atomic_load_n(&s->reads_in_flight, __ATOMIC_RELAXED);
    bool busy = reading || requests != pace->requests ||
                __atomic_load_n(&s->writes_in_flight, __ATOMIC_RELAXED);

    if (!pace->step_us) {
        return;
    }
    __atomic_store_n(&s->compact_gently, reading && !s->space_waiters,
                     __ATOMIC_RELAXED);
    if (rate) {
        debt_pay(pace->debt, rate);
        pace->debt->bytes += examined_bytes(s) - pace->examined;
    }
    pace->rest_us = 0;
    if (busy) {
        int64_t rest_us = (now_us - pace->step_us) * times / 100;

        pace->rest_us = now_us + MIN(rest_us, REST_MAX_US);
    }
    pace->requests = requests;
    pace->reads = reads;
    pace->step_us = 0;
}

/* Microseconds until the next step may begin.  Under log_lock. */
static int64_t pace_due(Pace *pace, uint64_t rate)
{
    int64_t due_us = pace->rest_us - g_get_monotonic_time();

    if (rate) {
        double owed_us;

        debt_pay(pace->debt, rate);
        owed_us = pace->debt->bytes * G_USEC_PER_SEC / rate;
        due_us = MAX(due_us, (int64_t)MIN(owed_us, PACE_LOOK_US));
    }
    return MIN(due_us, PACE_LOOK_US);
}

/* Wait on @cond for at most @us.  Called and returns with log_lock. */
static void wait_us(BaleStore *s, pthread_cond_t *cond, int64_t us)
{
    struct timespec until;

    /* When the clock is set, the wait is too short or repeated. */
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_nsec += us * 1000;
    until.tv_sec += until.tv_nsec / 1000000000;
    until.tv_nsec %= 1000000000;
    pthread_cond_timedwait(cond, &s->log_lock, &until);
}

/* The same, for the sake of a pace. */
static void pace_wait(BaleStore *s, pthread_cond_t *cond, int64_t us)
{
    int64_t before_us = g_get_monotonic_time();

    wait_us(s, cond, us);
    s->stats.compact_paced_ns += (g_get_monotonic_time() - before_us) * 1000;
}

bool bale_compact_gently(BaleStore *s)
{
    return __atomic_load_n(&s->compact_gently, __ATOMIC_RELAXED);
}

/* --- in the background, on the maintenance thread, in a step --- */

typedef struct Background {
    BaleStore *s;
    Pace pace;
    bool for_space;
} Background;

/* Under log_lock. */
static bool background_wanted(Background *b)
{
    BaleStore *s = b->s;

    return !s->maintain_stop && !s->maintain_pauses && !store_failed(s) &&
           (b->for_space || s->space_waiters ||
            (!s->compact_off && !s->compact_commands));
}

/* Hundredths of a step's time to rest: less, the more is garbage. */
static unsigned background_rest(BaleStore *s)
{
    unsigned garbage = CLAMP(store_garbage(s), COMPACT_STORE_GARBAGE,
                             COMPACT_URGENT_GARBAGE);

    return 100 * REST_TIMES_BACKGROUND * (COMPACT_URGENT_GARBAGE - garbage) /
           (COMPACT_URGENT_GARBAGE - COMPACT_STORE_GARBAGE);
}

/*
 * Hundredths of a step's time for which writers wait: none while the garbage is
 * less than what is live.  What waits to be given back counts.  Under log_lock.
 */
static unsigned background_hold(BaleStore *s)
{
    uint64_t used = 0, garbage = 0, enough;

    for (uint64_t i = 0; i < s->pages->len; i++) {
        BalePage *p = bale_page(s, i);

        if (p->bucket != BALE_BUCKET_META && p->state >= BALE_PAGE_SEALED) {
            used += p->end;
            garbage += page_garbage(p);
        }
    }
    enough = MAX(used - garbage, HOLD_PAGES_MIN * s->page_size);
    return garbage <= enough
               ? 0
               : MIN((garbage - enough) * HOLD_MAX / enough, HOLD_MAX);
}

/* A step has ended, if we were in one.  Under log_lock. */
static void background_step_ended(Background *b)
{
    BaleStore *s = b->s;
    int64_t us = 0;

    if (b->pace.step_us && !b->for_space) {
        us = (g_get_monotonic_time() - b->pace.step_us) *
             background_hold(s) / 100;
    }
    us = MIN(us, REST_MAX_US);
    bale_workers_hold(s->workers, us);
    s->stats.writes_held_ns += us * 1000;
    pace_step_ended(&b->pace, s, s->compact_rate, background_rest(s));
    if (us) {
        /* Who writes waits for us: be quick. */
        __atomic_store_n(&s->compact_gently, false, __ATOMIC_RELAXED);
    }
}

static bool background_go(void *opaque)
{
    Background *b = opaque;
    BaleStore *s = b->s;
    bool go, full;

    pthread_mutex_lock(&s->log_lock);
    background_step_ended(b);
    while ((go = background_wanted(b)) && !b->for_space) {
        int64_t due_us = pace_due(&b->pace, s->compact_rate);

        if (bale_maintain_errand(s)) {
            continue;
        }
        if (due_us <= 0 || s->space_waiters) {
            break;
        }
        bale_maintain_step_end(s);
        pace_wait(s, &s->maintain_cond, due_us);
        bale_maintain_step_begin(s);
    }
    full = s->space_waiters > 0;
    pthread_mutex_unlock(&s->log_lock);
    if (full) {
        bale_reads_help(s); /* maintain.c, invariant 3 */
    }
    pace_step_begins(&b->pace, s);
    return go;
}

/* One page, which is held.  Its error is only what stops others, too. */
static int background_page(BaleStore *s, uint64_t page, bool for_space)
{
    Background b = {
        .s = s,
        .pace = pace_init(s, &s->compact_debt),
        .for_space = for_space,
    };
    int ret;

    __atomic_fetch_add(&s->compact_running, 1, __ATOMIC_RELAXED);
    ret = bale_compact_page(s, page, background_go, &b);
    pthread_mutex_lock(&s->log_lock);
    background_step_ended(&b);
    pthread_mutex_unlock(&s->log_lock);
    __atomic_fetch_sub(&s->compact_running, 1, __ATOMIC_RELAXED);
    /* That page is stuck; there are others. */
    return ret == -EIO && !store_failed(s) ? 0 : ret;
}

bool bale_compact_background(BaleStore *s)
{
    uint64_t page;
    bool chosen;

    pthread_mutex_lock(&s->log_lock);
    /* A store that was made clean stays so until somebody writes. */
    chosen = s->session && !s->compact_off && !s->compact_commands &&
             store_garbage(s) >= COMPACT_STORE_GARBAGE &&
             compact_choose(s, COMPACT_PAGE_GARBAGE, UINT64_MAX, &page);
    pthread_mutex_unlock(&s->log_lock);
    return chosen && background_page(s, page, false) == 0;
}

bool bale_compact_for_space(BaleStore *s)
{
    uint64_t page;
    bool chosen;
    int ret = 0;

    pthread_mutex_lock(&s->log_lock);
    chosen = compact_choose(s, COMPACT_COMMAND_GARBAGE, UINT64_MAX, &page);
    pthread_mutex_unlock(&s->log_lock);
    if (chosen) {
        ret = background_page(s, page, true);
    }
    if (ret == -ENOSPC || !chosen) {
        /* A command may have what we need, and does not rest meanwhile. */
        pthread_mutex_lock(&s->log_lock);
        chosen = bale_maintain_await_command(s);
        pthread_mutex_unlock(&s->log_lock);
        return chosen;
    }
    return ret == 0;
}

/* --- on command --- */

typedef struct CompactCommand {
    BaleStore *s;
    const BaleCompactOptions *o;
    BalePaceDebt debt;
    Pace pace;
    uint64_t order;        /* pages opened up to this one */
    uint64_t before, total;
    bool stepping;
    bool cancelled;
} CompactCommand;

static uint64_t command_rate(CompactCommand *cmd)
{
    return cmd->o->get_rate ? cmd->o->get_rate(cmd->o->opaque)
                            : cmd->o->rate;
}

static bool command_progress(CompactCommand *cmd)
{
    uint64_t done = MIN(examined_bytes(cmd->s) - cmd->before, cmd->total);

    if (cmd->o->progress &&
        !cmd->o->progress(cmd->o->opaque, done, cmd->total)) {
        cmd->cancelled = true;
    }
    return !cmd->cancelled;
}

/* End the step, if we are in one; called and returns with log_lock. */
static void command_step_end(CompactCommand *cmd)
{
    if (cmd->stepping) {
        cmd->stepping = false;
        bale_maintain_step_end(cmd->s);
    }
}

/* Between two windows: let others go on, and keep to the rate. */
static bool command_go(void *opaque)
{
    CompactCommand *cmd = opaque;
    BaleStore *s = cmd->s;
    uint64_t rate = command_rate(cmd);
    bool go = true;

    pthread_mutex_lock(&s->log_lock);
    command_step_end(cmd);
    pace_step_ended(&cmd->pace, s, rate, 100 * REST_TIMES_COMMAND);
    pthread_mutex_unlock(&s->log_lock);
    while (go) {
        int64_t due_us;

        go = command_progress(cmd);
        rate = command_rate(cmd);
        pthread_mutex_lock(&s->log_lock);
        due_us = pace_due(&cmd->pace, rate);
        /* Paused: let go of the page, and begin it anew after that. */
        go = go && !s->maintain_pauses && !store_failed(s);
        if (go && due_us > 0 && !s->space_waiters) {
            pace_wait(s, &s->log_cond, due_us);
            pthread_mutex_unlock(&s->log_lock);
            continue;
        }
        if (go) {
            go = bale_maintain_step_join(s);
            cmd->stepping = go;
        }
        pthread_mutex_unlock(&s->log_lock);
        break;
    }
    pace_step_begins(&cmd->pace, s);
    return go;
}

/*
 * The next page, held, or PAGE_NONE.  One that the background is about to let
 * go of for us, or to finish, is waited for: nobody would come back to it.
 */
static uint64_t command_choose(CompactCommand *cmd)
{
    BaleStore *s = cmd->s;
    uint64_t page = PAGE_NONE;
    bool busy;

    do {
        pthread_mutex_lock(&s->log_lock);
        while (s->maintain_pauses && !store_failed(s)) {
            pthread_cond_wait(&s->log_cond, &s->log_lock);
        }
        busy = false;
        if (compact_choose(s, COMPACT_COMMAND_GARBAGE, cmd->order, &page)) {
            s->compact_held++;
        } else if (!store_failed(s) &&
                   compact_busy(s, COMPACT_COMMAND_GARBAGE, cmd->order)) {
            busy = true;
            wait_us(s, &s->log_cond, PACE_LOOK_US);
        }
        pthread_mutex_unlock(&s->log_lock);
    } while (busy && command_progress(cmd));
    return page;
}

static int command_page(CompactCommand *cmd, uint64_t page)
{
    BaleStore *s = cmd->s;
    int ret = bale_compact_page(s, page, command_go, cmd);

    pthread_mutex_lock(&s->log_lock);
    command_step_end(cmd);
    s->compact_held--;
    s->compact_turns++;
    pthread_cond_broadcast(&s->log_cond);
    pthread_mutex_unlock(&s->log_lock);
    return ret;
}

/* Give back what has died: the next page may need the room. */
static int command_settle(CompactCommand *cmd)
{
    BaleStore *s = cmd->s;
    bool dying = true;
    int ret = 0;

    for (unsigned i = 0; i < COMMAND_FLUSHES_MAX && ret == 0 && dying; i++) {
        ret = bale_log_flush_sync(s);
        dying = bale_maintain_drain(s);
    }
    return ret;
}

static int command_run(CompactCommand *cmd)
{
    BaleStore *s = cmd->s;
    BaleSpaceWait wait = { 0 };
    uint64_t page;
    int ret = 0;

    while (ret == 0 && !cmd->cancelled &&
           (page = command_choose(cmd)) != PAGE_NONE) {
        ret = command_page(cmd, page);
        if (ret == -EIO && !store_failed(s)) {
            ret = 0; /* that page is stuck; there are others */
        } else if (ret == -ECANCELED && !cmd->cancelled &&
                   !store_failed(s)) {
            ret = 0; /* for a pause */
        } else if (bale_maintain_try_again(s, &wait, &ret)) {
            ret = 0;
        }
        if (ret == 0) {
            ret = command_settle(cmd);
        }
    }
    if (ret == -ECANCELED && store_failed(s)) {
        ret = -EIO;
    }
    return ret == 0 ? command_settle(cmd) : ret;
}

bool bale_store_compact(BaleStore *s, const BaleCompactOptions *o,
                        GError **errp)
{
    CompactCommand cmd = { .s = s, .o = o };
    int ret;

    ret = s->read_only ? -EROFS : bale_store_flush_sync(s);
    if (ret == 0) {
        /* A session gives dead pages back, also those of earlier ones. */
        ret = bale_store_write_begin(s);
        if (ret == 0) {
            bale_store_write_end(s);
        }
    }
    if (ret == 0) {
        bale_log_seal_page(s, BALE_BUCKET_FRESH);
        pthread_mutex_lock(&s->log_lock);
        s->compact_commands++;
        __atomic_fetch_add(&s->compact_running, 1, __ATOMIC_RELAXED);
        cmd.total = compact_total(s, COMPACT_COMMAND_GARBAGE);
        cmd.order = s->page_order;
        /* The background may rest in the middle of a page. */
        bale_maintain_signal(s, false, false);
        pthread_mutex_unlock(&s->log_lock);
        cmd.before = examined_bytes(s);
        cmd.pace = pace_init(s, &cmd.debt);
        ret = command_run(&cmd);
        pthread_mutex_lock(&s->log_lock);
        s->compact_commands--;
        __atomic_fetch_sub(&s->compact_running, 1, __ATOMIC_RELAXED);
        bale_maintain_signal(s, false, true);
        pthread_cond_broadcast(&s->log_cond);
        pthread_mutex_unlock(&s->log_lock);
    }
    if (ret < 0 && !cmd.cancelled) {
        bale_error_set(errp, ret, "compacting the store");
    }
    return ret == 0 || cmd.cancelled;
}

void bale_store_set_compact(BaleStore *s, bool on, uint64_t rate)
{
    pthread_mutex_lock(&s->log_lock);
    s->compact_off = !on;
    s->compact_rate = rate;
    bale_maintain_signal(s, false, true);
    pthread_mutex_unlock(&s->log_lock);
}
