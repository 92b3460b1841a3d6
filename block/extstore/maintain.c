/*
 * The maintenance thread of an open store: gives dead pages back to the device,
 * compacts fragmented ones, makes room for writers, and writes checkpoints
 * while the store is in use.
 *
 * It starts with the first session and ends when the store is closed.  It may
 * block on the device and on flushes; nobody who holds log_lock waits for it.
 * A worker may wait for it (when the store is full): it never needs a worker.
 *
 * Steps: all of this is done in steps, one at a time: some pages released, a
 * window of a page compacted, a checkpoint.  A compaction on command, which
 * runs on a thread of its own, takes its steps between those of the maintenance
 * thread, which come first.  So checkpoints and writers who need space do not
 * wait for its end.
 *
 * Pausing: bale_maintain_pause() returns once nobody is in a step or in the
 * middle of a page, and keeps it so.  A compaction lets go of its page then,
 * and a checkpoint is given up and begun anew.
 *
 * Space: whoever finds no page asks for room (bale_maintain_try_again()), and
 * tries again when something came of it.  Each time the thread flushes until
 * pages that have died are free; if there are none it compacts one.
 *
 * Invariants:
 *  1. A request fails for want of space only when no page is dying, no page is
 *     worth compacting (or there is no page for the copies), and no command has
 *     a page in hand.
 *  2. While the thread is paused nobody is told that there is no room: they
 *     wait for the end of the pause.  So whoever waits for room does not hold
 *     session_lock, nor is in an append; and whoever pauses waits for nobody.
 *  3. Reads do not wait for it: while the workers wait for room the thread
 *     does their part of reads (bale_reads_help()), which is never to append.
 *  4. Waiting ends.  One who has asked SPACE_ROUNDS_MAX times while there were
 *     never fewer pages in use, and nobody got one for fresh data, is told no.
 *
 * A checkpoint is due by what was appended since the newest one began: so much
 * that recovery would take long, but always many times what that had to write,
 * so that it costs next to nothing; less if the store is idle or much time has
 * passed; and by command.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "store-internal.h"

#include <errno.h>
#include <string.h>
#include <time.h>

#include "util/memory.h"
#include "util/planted.h"

/* Bytes appended after which a checkpoint is due ... */
#define CHECKPOINT_BYTES (1ull << 30)
/* ... but at least so many times what the last one had to write. */
#define CHECKPOINT_SIZES 32u
/*
 * What a cluster of a range of zeroes counts for: it costs an open as much
 * memory as one of data, but nothing on the device before there is a
 * checkpoint (see BALE_OPEN_MEMORY_BASE).
 */
#define CHECKPOINT_ZERO_BYTES 1024u
/* When so much time has passed, or the store is idle, less is enough. */
#define CHECKPOINT_TIME_US (300ull * G_USEC_PER_SEC)
#define CHECKPOINT_TIME_BYTES (16ull << 20)
#define CHECKPOINT_TIME_SIZES 2u
/* How often the thread looks at the time while there is something new. */
#define LOOK_TIME_S 30
/* So many dying pages do not wait for somebody's flush ... */
#define DYING_PAGES_MAX 8u
/* ... nor does this part of the pages in use. */
#define DYING_PAGES_PART 8u
/* Flushes that pages which have died are given to become free. */
#define DYING_FLUSHES_MAX 4
/*
 * How often one asks for room while it looks no better.  Pages of which 5 % are
 * garbage are the least that is compacted: 20 of them make one, and each takes
 * a round to be copied and one to become free.
 */
#define SPACE_ROUNDS_MAX 64u
/* How long a round waits for readers to leave a page. */
#define READERS_WAIT_NS 10000000

/* --- steps; under log_lock --- */

void bale_maintain_step_begin(BaleStore *s)
{
    s->step_wanted = true;
    while (s->stepping) {
        pthread_cond_wait(&s->log_cond, &s->log_lock);
    }
    s->step_wanted = false;
    s->stepping = true;
}

bool bale_maintain_step_join(BaleStore *s)
{
    while ((s->stepping || s->step_wanted) && !s->maintain_pauses &&
           !store_failed(s)) {
        pthread_cond_wait(&s->log_cond, &s->log_lock);
    }
    if (s->maintain_pauses || store_failed(s)) {
        return false;
    }
    s->stepping = true;
    return true;
}

void bale_maintain_step_end(BaleStore *s)
{
    g_assert(s->stepping);
    s->stepping = false;
    pthread_cond_broadcast(&s->log_cond);
}

/* --- releasing; the states are told in page.c --- */

/* One step on @page; called and returns with log_lock. */
static int maintain_release_page(BaleStore *s, uint64_t page, uint8_t *block)
{
    uint64_t address = page_address(s, page);
    BalePage *p = bale_page(s, page);
    BalePageHeader mark = { p->bucket, page, p->version, p->first_seq, true };
    bool marking = p->state == BALE_PAGE_MARKING;
    int ret = 0;

    pthread_mutex_unlock(&s->log_lock);
    if (!BALE_PLANTED(mark_skipped) &&
        !(BALE_PLANTED(mark_once) && !marking)) {
        /*
         * The header is in one sector: it is the old one or the mark.  When
         * that is there, the same again behind it: neither counts alone if the
         * other one is damaged, or goes back to what it was.
         */
        bale_page_header_encode(&mark, s->identity, block);
        ret = bale_device_store_sync(s->dev,
                                     address + (marking ? 0 : BALE_BLOCK_SIZE),
                                     block, BALE_BLOCK_SIZE);
    }
    if (ret == 0 && !marking) {
        /*
         * All but the marks, which tell this page from one that was lost.
         * Space that stays allocated is a pity, not an error.
         */
        s->dev->ops->release(s->dev, address + 2 * BALE_BLOCK_SIZE,
                             s->page_size - 2 * BALE_BLOCK_SIZE);
    }
    pthread_mutex_lock(&s->log_lock);
    if (ret == 0 && marking) {
        bale_page(s, page)->state = BALE_PAGE_MARKED;
        bale_page(s, page)->free_flush = s->flush_request + 1;
    } else if (ret == 0) {
        memset(bale_page(s, page), 0, sizeof(BalePage));
        g_array_append_val(s->free_pages, page);
        s->pages_freed++;
    }
    return ret;
}

/* Append the barriers that dying pages wait for; as the next one. */
static void maintain_barriers(BaleStore *s)
{
    int ret;

    pthread_mutex_unlock(&s->log_lock);
    ret = bale_log_append_barriers(s);
    pthread_mutex_lock(&s->log_lock);
    if (ret == -ENOSPC) {
        /* What makes room must not want room. */
        bale_page_barriers_appended(s);
    }
}

/* Take all steps that are possible now.  Called and returns with log_lock. */
static void maintain_release(BaleStore *s)
{
    BALE_AUTO_MEMORY uint8_t *block =
        bale_memory_try_alloc(BALE_BLOCK_SIZE, BALE_BLOCK_SIZE);
    bool freed = false;
    int ret = 0;

    if (bale_page_wants_barriers(s)) {
        maintain_barriers(s);
    }
    for (guint i = 0; block && ret == 0 && i < s->dying_pages->len;) {
        uint64_t page = g_array_index(s->dying_pages, uint64_t, i);
        BalePageState state = bale_page(s, page)->state;

        if (state == BALE_PAGE_MARKING || state == BALE_PAGE_RELEASING) {
            ret = maintain_release_page(s, page, block);
        }
        if (ret == 0 && state == BALE_PAGE_RELEASING) {
            g_array_remove_index(s->dying_pages, i);
            freed = true;
        } else {
            i++;
        }
    }
    if (freed) {
        /* What is gone may have been all that a tombstone was kept for. */
        bale_page_consider_all(s);
    }
    pthread_cond_broadcast(&s->log_cond);
    if (ret < 0) {
        pthread_mutex_unlock(&s->log_lock);
        bale_store_poison(s, ret, "marking a dead page as freed");
        pthread_mutex_lock(&s->log_lock);
    }
}

/*
 * Do pages wait for a flush that nobody may ask for soon?  One that dies has
 * taken a page's worth of writes: a flush for it costs next to nothing.  Under
 * log_lock.
 */
static bool maintain_flush_due(BaleStore *s)
{
    uint64_t waiting = 0, used = s->pages->len - s->free_pages->len;

    for (guint i = 0; i < s->dying_pages->len; i++) {
        BalePage *p = bale_page(s, g_array_index(s->dying_pages, uint64_t,
                                                 i));

        waiting += p->state == BALE_PAGE_DEAD ||
                   p->state == BALE_PAGE_MARKED;
    }
    return waiting && (s->dying_flush || waiting >= DYING_PAGES_MAX ||
                       waiting * DYING_PAGES_PART >= used);
}

/* Called and returns with log_lock. */
static void maintain_flush(BaleStore *s)
{
    s->dying_flush = false;
    pthread_mutex_unlock(&s->log_lock);
    bale_log_flush_sync(s); /* a failure has poisoned the store */
    pthread_mutex_lock(&s->log_lock);
}

/* --- checkpoints --- */

/* What was appended since the newest checkpoint began. */
static uint64_t maintain_since(BaleStore *s)
{
    /*
     * In this order, as both grow.  Whoever adds looks at the base afterwards,
     * and the thread at the sum after it has set the base: so one of them sees
     * that there is something new.
     */
    uint64_t base = __atomic_load_n(&s->checkpoint_base, __ATOMIC_SEQ_CST);

    return __atomic_load_n(&s->appended, __ATOMIC_SEQ_CST) - base;
}

void bale_maintain_appended(BaleStore *s, uint32_t bytes,
                            const BaleRecord *r)
{
    uint64_t limit = s->options.checkpoint_bytes;
    uint64_t added = bytes, since;

    if (r->type == BALE_RECORD_ZERO) {
        added += (uint64_t)r->count * CHECKPOINT_ZERO_BYTES;
    }
    if (!limit) {
        limit = MAX(CHECKPOINT_BYTES,
                    CHECKPOINT_SIZES * __atomic_load_n(&s->checkpoint_cost,
                                                       __ATOMIC_RELAXED));
    }
    since = __atomic_add_fetch(&s->appended, added, __ATOMIC_SEQ_CST) -
            __atomic_load_n(&s->checkpoint_base, __ATOMIC_SEQ_CST);
    if (since > added &&
        (since < limit ||
         __atomic_load_n(&s->checkpoint_due, __ATOMIC_RELAXED))) {
        return;
    }
    /* The first since the newest checkpoint, or one too many. */
    pthread_mutex_lock(&s->log_lock);
    if (maintain_since(s) >= limit) {
        __atomic_store_n(&s->checkpoint_due, true, __ATOMIC_RELAXED);
    }
    pthread_cond_signal(&s->maintain_cond);
    pthread_mutex_unlock(&s->log_lock);
}

void bale_maintain_checkpointed(BaleStore *s, const BaleLogMark *mark)
{
    uint64_t base = mark ? mark->appended
                         : __atomic_load_n(&s->appended, __ATOMIC_SEQ_CST);

    __atomic_store_n(&s->checkpoint_base, base, __ATOMIC_SEQ_CST);
}

/* What follows is under log_lock. */

/* LOOK_TIME_S have passed. */
static void maintain_look_at_time(BaleStore *s)
{
    uint64_t now_us = g_get_monotonic_time();
    uint64_t appended = __atomic_load_n(&s->appended, __ATOMIC_SEQ_CST);
    bool idle = appended == s->checkpoint_seen;
    uint64_t enough = MAX(CHECKPOINT_TIME_BYTES,
                          CHECKPOINT_TIME_SIZES * s->checkpoint_cost);

    s->checkpoint_seen = appended;
    if (appended - s->checkpoint_base >= enough &&
        (idle || now_us - s->checkpoint_time_us >= CHECKPOINT_TIME_US)) {
        __atomic_store_n(&s->checkpoint_due, true, __ATOMIC_RELAXED);
    }
    s->dying_flush = idle;
}

static bool maintain_checkpoint_due(BaleStore *s)
{
    return (s->checkpoint_due ||
            s->checkpoint_answered < s->checkpoint_asked) &&
           !s->space_waiters;
}

/* Called and returns with log_lock. */
static void maintain_checkpoint(BaleStore *s)
{
    uint64_t asked = s->checkpoint_asked;
    bool by_command = s->checkpoint_answered < asked;
    int ret = -ENOSPC;

    /* What is kept for discarding and closing is not for this. */
    if (by_command || bale_page_has_room(s, 2 * s->checkpoint_size)) {
        pthread_mutex_unlock(&s->log_lock);
        ret = bale_checkpoint_running(s);
        pthread_mutex_lock(&s->log_lock);
    }
    if (ret == -EAGAIN) {
        return;
    }
    __atomic_store_n(&s->checkpoint_due, false, __ATOMIC_RELAXED);
    if (ret < 0) {
        bale_maintain_checkpointed(s, NULL); /* not again at once */
        s->stats.checkpoints_failed++;
    }
    s->checkpoint_answered = asked;
    s->checkpoint_ret = ret;
    pthread_cond_broadcast(&s->log_cond);
}

bool bale_maintain_wanted(BaleStore *s)
{
    bool wanted;

    pthread_mutex_lock(&s->log_lock);
    wanted = s->maintain_stop || s->maintain_pauses || s->space_waiters ||
             store_failed(s);
    pthread_mutex_unlock(&s->log_lock);
    return wanted;
}

bool bale_store_checkpoint_running(BaleStore *s, GError **errp)
{
    int ret = s->read_only ? 0 : bale_store_flush_sync(s);
    uint64_t asked;

    pthread_mutex_lock(&s->log_lock);
    if (ret == 0 && s->session && s->maintain_started) {
        asked = ++s->checkpoint_asked;
        pthread_cond_signal(&s->maintain_cond);
        while (s->checkpoint_answered < asked && s->maintain_started &&
               !store_failed(s)) {
            pthread_cond_wait(&s->log_cond, &s->log_lock);
        }
        ret = s->checkpoint_answered < asked ? -EIO : s->checkpoint_ret;
    }
    pthread_mutex_unlock(&s->log_lock);
    if (ret < 0) {
        bale_error_set(errp, ret, "writing a checkpoint");
    }
    return ret == 0;
}

/* Wait for something to do.  Called and returns with log_lock. */
static void maintain_wait(BaleStore *s)
{
    struct timespec until;

    s->maintain_idle = true;
    pthread_cond_broadcast(&s->log_cond);
    if ((maintain_since(s) == 0 && !s->dying_pages->len) ||
        s->maintain_pauses || store_failed(s)) {
        pthread_cond_wait(&s->maintain_cond, &s->log_lock);
    } else {
        /* When the clock is set, the thread only looks once too often. */
        clock_gettime(CLOCK_REALTIME, &until);
        until.tv_sec += LOOK_TIME_S;
        if (pthread_cond_timedwait(&s->maintain_cond, &s->log_lock, &until) ==
            ETIMEDOUT) {
            maintain_look_at_time(s);
        }
    }
    s->maintain_idle = false;
}

/* --- room for writers --- */

/*
 * Is there a page that dies as soon as its readers have left?  Then wait a
 * little, if we cannot help them.  Called and returns with log_lock.
 */
static bool maintain_await_readers(BaleStore *s)
{
    struct timespec until;
    bool read = false, helped = false;

    for (guint i = 0; i < s->pages->len && !read; i++) {
        BalePage *p = bale_page(s, i);

        read = p->state == BALE_PAGE_SEALED && !p->live_bytes &&
               p->readers && !p->compacting;
    }
    if (read) {
        pthread_mutex_unlock(&s->log_lock);
        helped = bale_reads_help(s);
        pthread_mutex_lock(&s->log_lock);
    }
    if (read && !helped) {
        clock_gettime(CLOCK_REALTIME, &until);
        until.tv_nsec += READERS_WAIT_NS;
        until.tv_sec += until.tv_nsec / 1000000000;
        until.tv_nsec %= 1000000000;
        pthread_cond_timedwait(&s->maintain_cond, &s->log_lock, &until);
    }
    return read;
}

/*
 * Give pages that have died back, or compact one.  False: nothing came of it,
 * and nothing will.  Called and returns with log_lock, in a step.
 */
static bool maintain_make_space(BaleStore *s)
{
    uint64_t freed = s->pages_freed;
    bool made = false;
    int ret = 0;

    if (!s->session) {
        return true; /* who asks begins one, and looks again */
    }
    /* A page that somebody reads from does not die. */
    pthread_mutex_unlock(&s->log_lock);
    bale_reads_help(s);
    pthread_mutex_lock(&s->log_lock);
    /* A page with a segment on its way to the device is not compacted. */
    for (int i = 0; i < DYING_FLUSHES_MAX && ret == 0 &&
                    (s->dying_pages->len || s->in_flight.length) &&
                    s->pages_freed == freed;
         i++) {
        pthread_mutex_unlock(&s->log_lock);
        ret = bale_log_flush_sync(s);
        pthread_mutex_lock(&s->log_lock);
        s->maintain_release = false;
        maintain_release(s);
    }
    if (s->pages_freed == freed && ret == 0) {
        pthread_mutex_unlock(&s->log_lock);
        made = bale_compact_for_space(s);
        pthread_mutex_lock(&s->log_lock);
    }
    return made || s->pages_freed > freed || s->dying_pages->len ||
           maintain_await_readers(s);
}

/* Called and returns with log_lock, in a step. */
static void maintain_answer(BaleStore *s)
{
    uint64_t asked = s->space_asked;
    bool made = maintain_make_space(s);

    if (!made && s->maintain_pauses &&
        !BALE_PLANTED(full_while_paused)) {
        return; /* it was cut short: again after that */
    }
    s->space_made = made;
    s->space_answered = asked;
    pthread_cond_broadcast(&s->log_cond);
}

bool bale_maintain_await_command(BaleStore *s)
{
    uint64_t turn = s->compact_turns;
    bool held = s->compact_held > 0;

    bale_maintain_step_end(s);
    while (s->compact_held && s->compact_turns == turn &&
           !s->maintain_stop && !s->maintain_pauses && !store_failed(s)) {
        pthread_cond_wait(&s->log_cond, &s->log_lock);
    }
    bale_maintain_step_begin(s);
    return held && !store_failed(s);
}

/* --- the thread --- */

bool bale_maintain_errand(BaleStore *s)
{
    if (s->maintain_release) {
        s->maintain_release = false;
        maintain_release(s);
        return true;
    }
    if (maintain_flush_due(s)) {
        maintain_flush(s);
        return true;
    }
    if (maintain_checkpoint_due(s)) {
        maintain_checkpoint(s);
        return true;
    }
    return false;
}

bool bale_maintain_has_work(BaleStore *s)
{
    return s->maintain_release || s->maintain_look || maintain_flush_due(s) ||
           s->space_answered < s->space_asked || maintain_checkpoint_due(s);
}

static void *maintain_main(void *opaque)
{
    BaleStore *s = opaque;

    pthread_mutex_lock(&s->log_lock);
    while (!s->maintain_stop) {
        if (s->maintain_pauses || store_failed(s) ||
            !bale_maintain_has_work(s)) {
            maintain_wait(s);
            continue;
        }
        bale_maintain_step_begin(s);
        if (s->maintain_stop || s->maintain_pauses || store_failed(s)) {
            /* It took a while to get here. */
        } else if (s->space_answered < s->space_asked) {
            maintain_answer(s);
        } else if (!bale_maintain_errand(s) && s->maintain_look) {
            s->maintain_look = false;
            pthread_mutex_unlock(&s->log_lock);
            if (bale_compact_background(s)) {
                pthread_mutex_lock(&s->log_lock);
                s->maintain_look = true; /* there may be more */
            } else {
                pthread_mutex_lock(&s->log_lock);
            }
        }
        bale_maintain_step_end(s);
    }
    s->maintain_idle = true;
    pthread_cond_broadcast(&s->log_cond);
    pthread_mutex_unlock(&s->log_lock);
    return NULL;
}

int bale_maintain_start(BaleStore *s)
{
    int ret = 0;

    /* Somebody may look whether there is a thread to pause. */
    pthread_mutex_lock(&s->log_lock);
    if (!s->maintain_started) {
        ret = -pthread_create(&s->maintain_thread, NULL, maintain_main, s);
        s->maintain_started = ret == 0;
    }
    pthread_mutex_unlock(&s->log_lock);
    return ret;
}

void bale_maintain_stop(BaleStore *s)
{
    if (s->maintain_started) {
        pthread_mutex_lock(&s->log_lock);
        s->maintain_stop = true;
        pthread_cond_signal(&s->maintain_cond);
        pthread_cond_broadcast(&s->log_cond);
        pthread_mutex_unlock(&s->log_lock);
        pthread_join(s->maintain_thread, NULL);
        /* Who waits for space must not wait for a thread that is gone. */
        pthread_mutex_lock(&s->log_lock);
        s->maintain_started = false;
        s->maintain_stop = false;
        pthread_cond_broadcast(&s->log_cond);
        pthread_mutex_unlock(&s->log_lock);
    }
}

void bale_maintain_pause(BaleStore *s)
{
    pthread_mutex_lock(&s->log_lock);
    s->maintain_pauses++;
    pthread_cond_broadcast(&s->log_cond);
    pthread_cond_signal(&s->maintain_cond);
    while ((s->maintain_started && !s->maintain_idle) || s->compact_held) {
        pthread_cond_wait(&s->log_cond, &s->log_lock);
    }
    pthread_mutex_unlock(&s->log_lock);
}

void bale_maintain_resume(BaleStore *s)
{
    pthread_mutex_lock(&s->log_lock);
    g_assert(s->maintain_pauses > 0);
    s->maintain_pauses--;
    /* A compaction may have been given up for us. */
    bale_maintain_signal(s, false, true);
    pthread_cond_broadcast(&s->log_cond);
    pthread_mutex_unlock(&s->log_lock);
}

void bale_maintain_signal(BaleStore *s, bool release, bool look)
{
    s->maintain_release |= release;
    s->maintain_look |= look;
    pthread_cond_signal(&s->maintain_cond);
}

void bale_maintain_settle(BaleStore *s)
{
    pthread_mutex_lock(&s->log_lock);
    if (s->maintain_release) {
        s->maintain_release = false;
        maintain_release(s);
    }
    pthread_mutex_unlock(&s->log_lock);
}

int bale_maintain_free(BaleStore *s)
{
    int ret = bale_log_flush_sync(s);

    for (int i = 0; ret == 0 && i < DYING_FLUSHES_MAX; i++) {
        bool dying;

        bale_maintain_settle(s);
        pthread_mutex_lock(&s->log_lock);
        dying = s->dying_pages->len > 0;
        pthread_mutex_unlock(&s->log_lock);
        if (!dying) {
            break;
        }
        ret = bale_log_flush_sync(s);
    }
    bale_maintain_settle(s);
    return ret;
}

/* Pages that only need the thread.  Under log_lock. */
static bool maintain_releasing(BaleStore *s)
{
    for (guint i = 0; i < s->dying_pages->len; i++) {
        BalePageState state =
            bale_page(s, g_array_index(s->dying_pages, uint64_t, i))->state;

        if (state == BALE_PAGE_REPLACED || state == BALE_PAGE_MARKING ||
            state == BALE_PAGE_RELEASING) {
            return true;
        }
    }
    return false;
}

bool bale_maintain_drain(BaleStore *s)
{
    bool dying;

    pthread_mutex_lock(&s->log_lock);
    /* A thread that is idle has done what it can: there may be no memory. */
    while (s->maintain_started && !s->maintain_pauses && !store_failed(s) &&
           maintain_releasing(s) &&
           (s->maintain_release || !s->maintain_idle)) {
        pthread_cond_wait(&s->log_cond, &s->log_lock);
    }
    dying = s->dying_pages->len > 0;
    pthread_mutex_unlock(&s->log_lock);
    return dying;
}

/* Can anybody make room, now or after a pause?  Under log_lock. */
static bool maintain_makes_space(BaleStore *s)
{
    return s->maintain_started && !s->maintain_stop && !store_failed(s) &&
           !(s->maintain_pauses && BALE_PLANTED(full_while_paused));
}

/* May one ask once more?  Under log_lock. */
static bool space_wait_goes_on(BaleStore *s, BaleSpaceWait *wait)
{
    uint64_t used = bale_pages_in_use(s);

    if (!wait->rounds || used < wait->used ||
        s->fresh_pages > wait->fresh_pages) {
        wait->used = wait->rounds ? MIN(used, wait->used) : used;
        wait->fresh_pages = s->fresh_pages;
        wait->rounds = 0;
    }
    return wait->rounds++ < SPACE_ROUNDS_MAX;
}

bool bale_maintain_try_again(BaleStore *s, BaleSpaceWait *wait, int *ret)
{
    bool made = false;
    uint64_t asked;

    if (*ret != -ENOSPC) {
        return false;
    }
    pthread_mutex_lock(&s->log_lock);
    if (maintain_makes_space(s) && space_wait_goes_on(s, wait)) {
        s->space_waiters++;
        s->stats.space_waits++;
        asked = ++s->space_asked;
        pthread_cond_signal(&s->maintain_cond);
        pthread_cond_broadcast(&s->log_cond);
        while (s->space_answered < asked && maintain_makes_space(s)) {
            pthread_cond_wait(&s->log_cond, &s->log_lock);
        }
        made = s->space_answered >= asked && s->space_made;
        s->space_waiters--;
        if (maintain_checkpoint_due(s)) {
            /* It was put off for us. */
            pthread_cond_signal(&s->maintain_cond);
        }
    }
    pthread_mutex_unlock(&s->log_lock);
    if (store_failed(s)) {
        *ret = -EIO;
        made = false;
    }
    return made;
}
