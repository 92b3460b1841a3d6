/*
 * Jobs on the store of a bale node: compacting and verifying it, and flattening
 * an image in it.
 *
 * They are QEMU jobs of types of their own (monitor.c adds those to the
 * enumeration), so that query-jobs, job-pause, job-cancel and the rest work on
 * them.  They are no block jobs: they have no block device, and work on the
 * store behind the node.
 *
 * The engine's function runs on a thread of its own and tells its progress to a
 * callback there, which is where it is slowed down, held and stopped.  The
 * job's coroutine, in the main loop, looks at it a few times a second.
 *
 * Invariants
 * 1. At most one thread of a job runs; while it does, the node has a reference
 *    and its store stays open: the job is stopped before that is closed or
 *    handed over (bale_control_stop()).
 * 2. A compaction that is paused has no thread: it would hold a page, and the
 *    engine keeps back its own compaction while one on command runs.  It begins
 *    anew when the job goes on, and finds the pages that it has already emptied
 *    gone.  The same goes for flattening, which finds less to copy.
 * 3. A verification that is paused waits in its callback, in which the engine
 *    holds no lock.
 * 4. When a job is told to end, its device calls pass even if the node is
 *    drained: QEMU cancels jobs in a drained section when it quits.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "qemu/osdep.h"
#include "block/aio-wait.h"
#include "block/block_int.h"
#include "qapi/error.h"
#include "qemu/job.h"
#include "qemu/main-loop.h"
#include "qemu/thread.h"
#include "qemu/timer.h"

#include "extstore/store.h"

#include "bale-bridge-internal.h"
#include "bale-control-internal.h"
#include "bale-internal.h"
#include "bale-qapi-events-bale.h"

/* How often a job's coroutine looks at its thread. */
#define JOB_LOOK_NS (50 * SCALE_MS)

/* How long a thread that is slowed down sleeps at most at a time. */
#define JOB_NAP_MS 200

/* Findings that the event of a verification tells. */
#define JOB_FINDINGS_MAX 16

#define SPACE_LOOK_MS 1000

struct BaleJob {
    Job common;

    /* Never changed after creation. */
    BlockDriverState *bs; /* referenced */
    BaleControl *control;
    BaleStore *store;
    BaleJobKind kind;
    char *image; /* to flatten */
    BaleStoreStats before;

    /* Of the main thread. */
    bool busy; /* invariant 4 */
    uint64_t told; /* progress that the job was told */

    /* Atomic. */
    bool running; /* the thread; it touches nothing after clearing this */
    bool stop;    /* the thread shall end, */
    bool end;     /* and not begin again, */
    bool hold;    /* or wait in its callback, */
    bool held;    /* as it does */
    uint64_t done, total;

    /* Of the thread, and of others while it does not run. */
    uint64_t base; /* done in runs before this one */
    uint64_t last; /* done in this run */
    bool complete;
    bool ok;
    GError *err;
    BaleCheckResult result;
    strList *findings, **findings_tail;
    unsigned findings_count;
    uint64_t slice_speed, slice_bytes;
    int64_t slice_start_ms;

    QemuMutex lock; /* for cond alone */
    QemuCond cond;  /* stop or hold have changed */
};

/* --- on the job's thread --- */

static bool job_should_stop(BaleJob *j)
{
    return qatomic_read(&j->stop) || qatomic_read(&j->end);
}

static void job_nap(BaleJob *j, int ms)
{
    qemu_mutex_lock(&j->lock);
    if (!job_should_stop(j)) {
        qemu_cond_timedwait(&j->cond, &j->lock, ms);
    }
    qemu_mutex_unlock(&j->lock);
}

/*
 * Wait until @bytes read in this run are no more than the speed allows.  (A
 * compaction the engine itself slows down, so that it can hurry for writers.)
 */
static void job_slow_down(BaleJob *j, uint64_t bytes)
{
    for (;;) {
        uint64_t speed = qatomic_read(&j->control->speed);
        int64_t now = qemu_clock_get_ms(QEMU_CLOCK_REALTIME);
        uint64_t due;

        if (speed != j->slice_speed) {
            j->slice_speed = speed;
            j->slice_bytes = bytes;
            j->slice_start_ms = now;
        }
        if (!speed || job_should_stop(j) || qatomic_read(&j->hold)) {
            return;
        }
        due = muldiv64(bytes - j->slice_bytes, 1000, MIN(speed, UINT32_MAX));
        if (due <= (uint64_t)(now - j->slice_start_ms)) {
            return;
        }
        job_nap(j, MIN(due - (now - j->slice_start_ms), JOB_NAP_MS));
    }
}

/* What both callbacks do; false: stop. */
static bool job_step(BaleJob *j, uint64_t done, uint64_t total, uint64_t bytes)
{
    if (done < j->last) {
        j->base += j->last; /* the next image */
    }
    j->last = done;
    qatomic_set(&j->done, j->base + done);
    qatomic_set(&j->total, j->base + MAX(done, total));
    job_slow_down(j, bytes);
    while (qatomic_read(&j->hold) && !job_should_stop(j)) {
        qatomic_set(&j->held, true);
        job_nap(j, JOB_NAP_MS);
    }
    qatomic_set(&j->held, false);
    return !job_should_stop(j);
}

static bool job_progress(void *opaque, uint64_t done, uint64_t total)
{
    return job_step(opaque, done, total, 0);
}

static uint64_t job_compact_rate(void *opaque)
{
    BaleJob *j = opaque;

    return qatomic_read(&j->control->speed);
}

static bool job_verify_report(void *opaque, const char *what, uint64_t done,
                              uint64_t total)
{
    BaleJob *j = opaque;

    if (what) {
        if (j->findings_count < JOB_FINDINGS_MAX) {
            QAPI_LIST_APPEND(j->findings_tail, g_strdup(what));
        }
        j->findings_count++;
        return !job_should_stop(j);
    }
    return job_step(j, done, total, j->result.checked_bytes);
}

static void *job_thread(void *opaque)
{
    BaleJob *j = opaque;

    j->base = qatomic_read(&j->done);
    j->last = 0;
    j->slice_bytes = 0;
    j->slice_start_ms = qemu_clock_get_ms(QEMU_CLOCK_REALTIME);
    j->slice_speed = qatomic_read(&j->control->speed);
    if (j->kind == BALE_JOB_COMPACT) {
        BaleCompactOptions o = {
            .get_rate = job_compact_rate,
            .progress = job_progress,
            .opaque = j,
        };

        j->ok = bale_store_compact(j->store, &o, &j->err);
    } else if (j->kind == BALE_JOB_FLATTEN) {
        BaleFlattenOptions o = {
            .progress = job_progress,
            .opaque = j,
        };

        j->ok = bale_image_flatten(j->store, j->image, &o, &j->err);
    } else {
        j->ok = bale_store_check(j->store, BALE_CHECK_DATA, job_verify_report,
                                 j, &j->result, &j->err);
    }
    j->complete = !job_should_stop(j);

    qatomic_store_release(&j->running, false);
    aio_wait_kick();
    return NULL;
}

/* --- in the main thread --- */

static bool job_runs(BaleJob *j)
{
    return qatomic_load_acquire(&j->running);
}

static void job_begin_thread(BaleJob *j)
{
    QemuThread thread;

    qatomic_set(&j->running, true);
    /* Signals of the program are blocked in it. */
    qemu_thread_create(&thread, "bale-job", job_thread, j,
                       QEMU_THREAD_DETACHED);
}

static void job_wake(BaleJob *j)
{
    qemu_mutex_lock(&j->lock);
    qemu_cond_signal(&j->cond);
    qemu_mutex_unlock(&j->lock);
}

/* Make the thread end soon, whatever the node's state is. */
static void job_end(BaleJob *j)
{
    if (!j->busy) {
        j->busy = true;
        bale_bs_busy_begin(j->bs);
    }
    qatomic_set(&j->end, true);
    job_wake(j);
}

static void job_tell_progress(BaleJob *j)
{
    uint64_t done = qatomic_read(&j->done);
    uint64_t total = qatomic_read(&j->total);

    if (done > j->told) {
        job_progress_update(&j->common, done - j->told);
        j->told = done;
    }
    job_progress_set_remaining(&j->common, total > j->told ? total - j->told
                                                           : 0);
}

static void coroutine_fn job_wait_thread(BaleJob *j)
{
    while (job_runs(j)) {
        qemu_co_sleep_ns(QEMU_CLOCK_REALTIME, JOB_LOOK_NS);
    }
}

/* What a verification found, as the job's result. */
static int job_verify_result(BaleJob *j, Error **errp)
{
    uint64_t bad = j->result.damaged + j->result.bad_superblocks +
                   j->result.wrong_counters;

    qapi_event_send_bale_verify_completed(
        j->common.id, bdrv_get_node_name(j->bs), j->result.checked_records,
        j->result.checked_bytes, j->result.corrupt, j->result.damaged,
        j->result.bad_superblocks, j->result.wrong_counters,
        j->result.leaked_pages, j->findings);
    if (j->result.corrupt && !bad) {
        error_setg(errp, "The store is marked corrupt");
        return -EIO;
    }
    if (bad) {
        error_setg(errp, "The store has %" PRIu64 " damaged records, %" PRIu64
                   " damaged superblocks and %" PRIu64 " wrong counters",
                   j->result.damaged, j->result.bad_superblocks,
                   j->result.wrong_counters);
        return -EIO;
    }
    return 0;
}

static int job_compact_result(BaleJob *j)
{
    g_autofree BaleStoreStats *now = g_new0(BaleStoreStats, 1);

    /* A counter that was reset meanwhile tells what it has. */
#define SINCE(member)                                                        \
    (now->member - (now->member < j->before.member ? 0 : j->before.member))
    bale_store_get_stats(j->store, now);
    qapi_event_send_bale_compact_completed(
        j->common.id, bdrv_get_node_name(j->bs), SINCE(compact_examined_bytes),
        SINCE(compacted_bytes), SINCE(compacted_pages), now->used_bytes);
#undef SINCE
    return 0;
}

static int coroutine_fn job_run(Job *job, Error **errp)
{
    BaleJob *j = container_of(job, BaleJob, common);

    while (!job_is_cancelled(job) && !qatomic_read(&j->end)) {
        job_begin_thread(j);
        while (job_runs(j) && !job_is_cancelled(job)) {
            job_sleep_ns(job, JOB_LOOK_NS);
            job_tell_progress(j);
        }
        job_wait_thread(j);
        if (j->complete || j->err) {
            break;
        }
        /* It was stopped for a pause, which may be over by now. */
        job_pause_point(job);
        qatomic_set(&j->stop, false);
    }
    job_tell_progress(j);
    if (job_is_cancelled(job)) {
        return -ECANCELED;
    }
    if (j->err) {
        return bale_bridge_error(g_steal_pointer(&j->err), errp);
    }
    if (!j->complete) {
        error_setg(errp, "Node '%s' was handed over",
                   bdrv_get_node_name(j->bs));
        return -ECANCELED;
    }
    job_progress_set_remaining(job, 0);
    switch (j->kind) {
    case BALE_JOB_VERIFY:
        return job_verify_result(j, errp);
    case BALE_JOB_COMPACT:
        return job_compact_result(j);
    case BALE_JOB_FLATTEN:
        return 0;
    }
    g_assert_not_reached();
}

static void coroutine_fn job_pause_cb(Job *job)
{
    BaleJob *j = container_of(job, BaleJob, common);

    if (j->kind != BALE_JOB_VERIFY) {
        qatomic_set(&j->stop, true);
        job_wake(j);
        job_wait_thread(j);
        return;
    }
    qatomic_set(&j->hold, true);
    while (job_runs(j) && !qatomic_read(&j->held) &&
           !job_is_cancelled(job)) {
        qemu_co_sleep_ns(QEMU_CLOCK_REALTIME, JOB_LOOK_NS);
    }
}

static void coroutine_fn job_resume_cb(Job *job)
{
    BaleJob *j = container_of(job, BaleJob, common);

    /* Only a verification still has its thread; job_run() begins others. */
    qatomic_set(&j->hold, false);
    job_wake(j);
}

static bool job_cancel_cb(Job *job, bool force)
{
    job_end(container_of(job, BaleJob, common));
    return true;
}

static void job_clean(Job *job)
{
    BaleJob *j = container_of(job, BaleJob, common);
    AioContext *ctx = bdrv_get_aio_context(j->bs);

    assert(!job_runs(j));
    aio_context_acquire(ctx);
    if (j->busy) {
        bale_bs_busy_end(j->bs);
        j->busy = false;
    }
    assert(j->control->job == j);
    j->control->job = NULL;
    bdrv_unref(j->bs);
    aio_context_release(ctx);
    j->bs = NULL;
}

static void job_free(Job *job)
{
    BaleJob *j = container_of(job, BaleJob, common);

    g_clear_error(&j->err);
    g_free(j->image);
    qapi_free_strList(j->findings);
    qemu_cond_destroy(&j->cond);
    qemu_mutex_destroy(&j->lock);
}

#define JOB_DRIVER(type)                                                     \
    {                                                                        \
        .instance_size = sizeof(BaleJob),                                    \
        .job_type = (JobType)(type),                                         \
        .run = job_run,                                                      \
        .pause = job_pause_cb,                                               \
        .resume = job_resume_cb,                                             \
        .cancel = job_cancel_cb,                                             \
        .clean = job_clean,                                                  \
        .free = job_free,                                                    \
    }

static const JobDriver job_drivers[] = {
    [BALE_JOB_COMPACT] = JOB_DRIVER(BALE_JOB_TYPE_COMPACT),
    [BALE_JOB_VERIFY] = JOB_DRIVER(BALE_JOB_TYPE_VERIFY),
    [BALE_JOB_FLATTEN] = JOB_DRIVER(BALE_JOB_TYPE_FLATTEN),
};

bool bale_job_start(const char *job_id, BlockDriverState *bs, BaleJobKind kind,
                    const char *image, int flags, uint64_t speed,
                    Error **errp)
{
    BaleControl *control = bale_bs_control(bs);
    const char *node = bdrv_get_node_name(bs);
    BaleJob *j;

    if (!bale_job_types_known()) {
        error_setg(errp, "This program cannot be taught the type of the job");
        return false;
    }
    if (bale_bs_job(bs)) {
        error_setg(errp, "The store of node '%s' has a job already: '%s'",
                   node, bale_bs_job(bs)->common.id);
        return false;
    }
    if (bs->open_flags & BDRV_O_INACTIVE) {
        error_setg(errp, "Node '%s' is inactive", node);
        return false;
    }
    if (kind != BALE_JOB_VERIFY && bdrv_is_read_only(bs)) {
        error_setg(errp, "Node '%s' is read-only", node);
        return false;
    }
    /* In the main context: nothing of the job touches the node's requests. */
    j = job_create(job_id, &job_drivers[kind], NULL, qemu_get_aio_context(),
                   flags, NULL, NULL, errp);
    if (!j) {
        return false;
    }
    bdrv_ref(bs);
    j->bs = bs;
    j->control = control;
    j->store = bale_bs_store(bs);
    j->kind = kind;
    j->image = g_strdup(image);
    j->findings_tail = &j->findings;
    qemu_mutex_init(&j->lock);
    qemu_cond_init(&j->cond);
    bale_store_get_stats(j->store, &j->before);
    control->job = j;
    qatomic_set(&control->speed, speed);
    job_start(&j->common);
    return true;
}

const char *bale_job_id(BaleJob *job)
{
    return job->common.id;
}

bool bale_job_writes(BaleJob *job)
{
    return job->kind != BALE_JOB_VERIFY;
}

/* --- the node's side --- */

void bale_control_stop(BlockDriverState *bs)
{
    BaleJob *j = bale_bs_control(bs)->job;

    if (j) {
        job_end(j);
        AIO_WAIT_WHILE(bdrv_get_aio_context(bs), job_runs(j));
    }
}

static void space_look(void *opaque)
{
    BlockDriverState *bs = opaque;
    AioContext *ctx = bdrv_get_aio_context(bs);
    g_autofree BaleStoreStats *stats = g_new0(BaleStoreStats, 1);
    BaleControl *control;
    BaleStore *store;

    aio_context_acquire(ctx);
    control = bale_bs_control(bs);
    store = bale_bs_store(bs);
    if (store && control->space_threshold) {
        bool over;

        bale_store_get_stats(store, stats);
        over = stats->used_bytes >= control->space_threshold;
        if (over && !control->space_over) {
            qapi_event_send_bale_space_threshold(bdrv_get_node_name(bs),
                                                 stats->used_bytes,
                                                 control->space_threshold);
        }
        control->space_over = over;
        timer_mod(control->space_timer,
                  qemu_clock_get_ms(QEMU_CLOCK_REALTIME) + SPACE_LOOK_MS);
    }
    aio_context_release(ctx);
}

void bale_control_set_space_threshold(BlockDriverState *bs, uint64_t bytes)
{
    BaleControl *control = bale_bs_control(bs);

    control->space_threshold = bytes;
    control->space_over = false;
    if (!control->space_timer) {
        control->space_timer = timer_new_ms(QEMU_CLOCK_REALTIME, space_look,
                                            bs);
    }
    timer_mod(control->space_timer, qemu_clock_get_ms(QEMU_CLOCK_REALTIME));
}

void bale_control_close(BaleControl *control)
{
    assert(!control->job);
    timer_free(control->space_timer);
    control->space_timer = NULL;
}
