/*
 * The simulated device: see extstore/device-sim.h.
 *
 * A store is captured when it is submitted (blocks of its own, shared with the
 * contents once it completes) and applied when it completes; the history keeps
 * every operation with the contents from before it.  What a crash may leave is
 * computed from the history alone, in device-sim-crash.c.
 *
 * Attempts run through bale_transfer_step(), as those of the aio device do, so
 * a fault that is short, EINTR or EAGAIN tests the very code that answers the
 * kernel's.
 *
 * Threads: `lock` guards everything; it is a leaf and is never held across a
 * completion.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "device-sim-crash-internal.h"

#include <errno.h>
#include <string.h>

#include "device-internal.h"
#include "util/memory.h"

/* A get, store or flush that has not completed. */
typedef struct SimPending {
    BaleDeviceIo *io;
    BaleDeviceCall call;
    SimHistoryOp *op; /* NULL for a get */
    BaleTransfer transfer;
} SimPending;

typedef struct SimArmed {
    BaleSimFault fault;
    uint64_t left; /* attempts until it fires */
} SimArmed;

typedef struct SimRange {
    uint64_t offset, len;
} SimRange;

typedef struct SimDevice {
    BaleDevice dev; /* first */

    /* Never changed. */
    BaleSimOptions options; /* but for the mode, which is under lock */

    /* Under lock. */
    pthread_mutex_t lock;
    pthread_cond_t cond; /* pending, mode or stop have changed */
    SimTree live;
    SimTree origin;      /* contents when the history began */
    GPtrArray *ops;      /* SimHistoryOp, owned */
    uint64_t events;
    GPtrArray *uncertain; /* SimHistoryOp, not durable and not doomed */
    GPtrArray *pending;  /* SimPending, owned */
    unsigned completing; /* taken from pending, not yet called back */
    uint64_t random;
    GArray *faults;      /* SimArmed */
    GArray *lost;        /* SimRange */
    uint64_t attempts[BALE_SIM_CALLS];
    uint64_t faults_hit;
    bool stop;
    GThread *thread;

    BaleDeviceCounters counters;
} SimDevice;

static void sim_lock(SimDevice *sim)
{
    pthread_mutex_lock(&sim->lock);
}

static void sim_unlock(SimDevice *sim)
{
    pthread_mutex_unlock(&sim->lock);
}

/* ---- history ---------------------------------------------------------- */

static void op_free(gpointer opaque)
{
    SimHistoryOp *op = opaque;

    for (size_t i = 0; op->blocks && i < op->n_blocks; i++) {
        sim_block_unref(op->blocks[i]);
    }
    g_free(op->blocks);
    g_free(op->skip);
    sim_tree_clear(&op->before);
    g_free(op);
}

/* Copy what a store is to write. */
static void op_capture(SimHistoryOp *op, const uint8_t *buf)
{
    uint64_t first = op->pub.offset / SIM_BLOCK;
    uint64_t end = op->pub.offset + op->pub.len;

    op->n_blocks = (end - 1) / SIM_BLOCK - first + 1;
    op->blocks = g_new0(SimBlock *, op->n_blocks);
    for (size_t i = 0; i < op->n_blocks; i++) {
        uint64_t base = (first + i) * SIM_BLOCK;
        uint64_t from = MAX(base, op->pub.offset);
        uint64_t to = MIN(base + SIM_BLOCK, end);
        const uint8_t *data = buf + (from - op->pub.offset);
        SimBlock *block;

        if (bale_memory_is_zero(data, to - from)) {
            continue;
        }
        block = sim_block_new(data, to - from);
        if (from > base) {
            memmove(block->data + (from - base), block->data, to - from);
            memset(block->data, 0, from - base);
        }
        op->blocks[i] = block;
    }
}

/* Mark the sectors of a store that will be lost. */
static void op_mark_lost_locked(SimDevice *sim, SimHistoryOp *op)
{
    size_t sectors = op->pub.len / BALE_SIM_SECTOR;

    for (guint i = 0; i < sim->lost->len; i++) {
        const SimRange *range = &g_array_index(sim->lost, SimRange, i);

        for (size_t s = 0; s < sectors; s++) {
            uint64_t at = op->pub.offset + s * BALE_SIM_SECTOR;

            if (at >= range->offset && at - range->offset < range->len) {
                if (!op->skip) {
                    op->skip = g_new0(uint8_t, sectors);
                }
                op->skip[s] = 1;
            }
        }
    }
}

/* Begin an operation; its submission is an event. */
static SimHistoryOp *op_begin_locked(SimDevice *sim, BaleSimOpKind kind,
                                     uint64_t offset, uint64_t len)
{
    SimHistoryOp *op = g_new0(SimHistoryOp, 1);

    op->pub = (BaleSimOp) {
        .kind = kind,
        .offset = offset,
        .len = len,
        .submitted = ++sim->events,
        .completed = UINT64_MAX,
        .durable = UINT64_MAX,
    };
    if (!sim->options.no_history) {
        g_ptr_array_add(sim->ops, op);
    }
    return op;
}

/* A flush completed: what does it make certain, or doom? */
static void flush_settles_locked(SimDevice *sim, const SimHistoryOp *flush)
{
    guint kept = 0;

    for (guint i = 0; i < sim->uncertain->len; i++) {
        SimHistoryOp *op = g_ptr_array_index(sim->uncertain, i);

        if (op->pub.completed >= flush->pub.submitted) {
            sim->uncertain->pdata[kept++] = op;
        } else if (flush->pub.ret == 0) {
            op->pub.durable = flush->pub.completed;
        }
        /* Else doomed: it leaves the list and never becomes durable. */
    }
    g_ptr_array_set_size(sim->uncertain, (gint)kept);
}

/*
 * Complete an operation of which @applied bytes were written.  If it is not at
 * once within its submission, its completion is an event of its own.
 */
static void op_end_locked(SimDevice *sim, SimHistoryOp *op, bool at_once,
                          size_t applied, int ret)
{
    op->pub.completed = at_once ? op->pub.submitted : ++sim->events;
    op->pub.ret = ret;
    op->applied = applied;
    if (sim->options.no_history) {
        op_free(op);
    } else if (op->pub.kind == BALE_SIM_OP_FLUSH) {
        flush_settles_locked(sim, op);
    } else {
        g_ptr_array_add(sim->uncertain, op);
    }
}

/* ---- faults ----------------------------------------------------------- */

/* Count an attempt.  True if a fault is to be served, which is in *@fault. */
static bool fault_fires_locked(SimDevice *sim, BaleSimCall call,
                               BaleSimFault *fault)
{
    bool fires = false;

    sim->attempts[call]++;
    for (guint i = 0; i < sim->faults->len;) {
        SimArmed *armed = &g_array_index(sim->faults, SimArmed, i);

        if (armed->fault.call != call || --armed->left > 0) {
            i++;
            continue;
        }
        if (!fires) {
            *fault = armed->fault;
            fires = true;
            sim->faults_hit++;
        }
        if (armed->fault.sticky) {
            armed->left = 1;
            i++;
        } else {
            g_array_remove_index(sim->faults, i);
        }
    }
    return fires;
}

/*
 * A call that is not a transfer.  Interruptions are hidden, except from a
 * flush: nobody knows what an interrupted flush has done.
 */
static int fault_of_call_locked(SimDevice *sim, BaleSimCall call)
{
    BaleSimFault fault;

    for (unsigned i = 0; i < BALE_TRANSFER_STALLS_MAX; i++) {
        if (!fault_fires_locked(sim, call, &fault)) {
            return 0;
        }
        if (fault.error != -EINTR && fault.error != -EAGAIN) {
            return fault.error;
        }
        if (call == BALE_SIM_FLUSH) {
            break;
        }
        bale_device_count_retry(&sim->counters);
    }
    return -EIO;
}

/* ---- transfers -------------------------------------------------------- */

/* How much of the rest does this attempt transfer, or with which error? */
static ssize_t attempt_length_locked(SimDevice *sim, SimPending *p)
{
    bool is_store = p->call == BALE_DEVICE_STORE;
    size_t len = p->io->len - p->transfer.done;
    uint64_t end = p->io->offset + p->io->len;
    BaleSimFault fault;

    if (fault_fires_locked(sim, is_store ? BALE_SIM_STORE : BALE_SIM_GET,
                           &fault)) {
        if (fault.error) {
            return fault.error;
        }
        /* At least a block: a read of nothing would be the end of the file. */
        fault.short_len -= fault.short_len % sim->options.block_size;
        return (ssize_t)MIN(len, MAX(fault.short_len,
                                     sim->options.block_size));
    }
    if (is_store && ((sim->options.max_size && end > sim->options.max_size) ||
                     (sim->options.fixed_size && end > sim->live.size))) {
        return -ENOSPC;
    }
    return (ssize_t)len;
}

static int run_transfer_locked(SimDevice *sim, SimPending *p)
{
    bool is_store = p->call == BALE_DEVICE_STORE;
    BaleDeviceIo *io = p->io;
    size_t start;
    ssize_t res;
    int ret;

    do {
        start = p->transfer.done;
        res = attempt_length_locked(sim, p);
        if (res > 0 && !is_store) {
            sim_tree_read(&sim->live, io->offset + start,
                          (uint8_t *)io->buf + start, (size_t)res);
        }
    } while (!bale_transfer_step(&p->transfer, io, is_store,
                                 sim->options.block_size, res, &sim->counters,
                                 &ret));
    return ret;
}

/* The engine promised not to touch the buffer: hold it to that. */
static void assert_unchanged(const SimHistoryOp *op, const uint8_t *buf)
{
    uint64_t first = op->pub.offset / SIM_BLOCK;
    uint64_t end = op->pub.offset + op->pub.len;

    for (size_t i = 0; i < op->n_blocks; i++) {
        uint64_t base = (first + i) * SIM_BLOCK;
        uint64_t from = MAX(base, op->pub.offset);
        uint64_t n = MIN(base + SIM_BLOCK, end) - from;
        const uint8_t *data = buf + (from - op->pub.offset);

        if (op->blocks[i]) {
            g_assert(memcmp(op->blocks[i]->data + (from - base), data, n) == 0);
        } else {
            g_assert(bale_memory_is_zero(data, n));
        }
    }
}

static int run_store_locked(SimDevice *sim, SimPending *p, bool at_once)
{
    SimHistoryOp *op = p->op;
    int ret = run_transfer_locked(sim, p);
    size_t applied = p->transfer.done;

    assert_unchanged(op, p->io->buf);
    if (!sim->options.no_history) {
        sim_tree_copy(&op->before, &sim->live);
    }
    op->applied = applied;
    sim_op_apply(op, &sim->live, applied, NULL);
    op_end_locked(sim, op, at_once, applied, ret);
    return ret;
}

/* Carry @p out, call its owner back without the lock, and free @p. */
static void complete_locked(SimDevice *sim, SimPending *p, bool at_once)
{
    int ret;

    switch (p->call) {
    case BALE_DEVICE_GET:
        ret = run_transfer_locked(sim, p);
        if (!at_once) {
            sim->events++;
        }
        break;
    case BALE_DEVICE_STORE:
        ret = run_store_locked(sim, p, at_once);
        break;
    default:
        ret = fault_of_call_locked(sim, BALE_SIM_FLUSH);
        op_end_locked(sim, p->op, at_once, 0, ret);
        break;
    }
    bale_device_count_end(&sim->counters, p->call, p->io->len,
                          p->transfer.start_ns, ret);
    sim->completing++;
    sim_unlock(sim);
    p->io->done(p->io, ret);
    sim_lock(sim);
    sim->completing--;
    pthread_cond_broadcast(&sim->cond);
    g_free(p);
}

/* Complete one pending transfer, chosen by the seed. */
static bool step_locked(SimDevice *sim)
{
    SimPending *p;

    if (sim->pending->len == 0) {
        return false;
    }
    p = g_ptr_array_steal_index(sim->pending,
                                (guint)(sim_random(&sim->random) %
                                        sim->pending->len));
    complete_locked(sim, p, false);
    return true;
}

static gpointer sim_thread(gpointer opaque)
{
    SimDevice *sim = opaque;

    sim_lock(sim);
    while (!sim->stop) {
        if (sim->options.mode != BALE_SIM_DEFERRED || !sim->pending->len) {
            pthread_cond_wait(&sim->cond, &sim->lock);
            continue;
        }
        if (sim_random(&sim->random) % 4 == 0) {
            /* Let some more come, so that there is something to reorder. */
            sim_unlock(sim);
            g_usleep(20);
            sim_lock(sim);
        }
        step_locked(sim);
    }
    sim_unlock(sim);
    return NULL;
}

static void sim_submit(BaleDevice *dev, BaleDeviceIo *io, BaleDeviceCall call)
{
    SimDevice *sim = (SimDevice *)dev;
    uint64_t start_ns = bale_device_count_begin(&sim->counters);
    SimPending *p;

    if (call != BALE_DEVICE_FLUSH) {
        uint32_t align = sim->options.block_size;

        g_assert(io->len > 0 && io->len % align == 0);
        g_assert(io->offset % align == 0);
        g_assert((uintptr_t)io->buf % align == 0);
        g_assert(io->offset <= INT64_MAX - io->len);
    }
    if (call == BALE_DEVICE_STORE && sim->options.read_only) {
        bale_device_count_end(&sim->counters, call, 0, start_ns, -EROFS);
        io->done(io, -EROFS);
        return;
    }

    p = g_new0(SimPending, 1);
    p->io = io;
    p->call = call;
    p->transfer.start_ns = start_ns;
    sim_lock(sim);
    if (call == BALE_DEVICE_STORE) {
        p->op = op_begin_locked(sim, BALE_SIM_OP_STORE, io->offset, io->len);
        op_capture(p->op, io->buf);
        op_mark_lost_locked(sim, p->op);
    } else if (call == BALE_DEVICE_FLUSH) {
        p->op = op_begin_locked(sim, BALE_SIM_OP_FLUSH, 0, 0);
    } else {
        sim->events++;
    }
    if (sim->options.mode == BALE_SIM_IMMEDIATE) {
        complete_locked(sim, p, true);
    } else {
        g_ptr_array_add(sim->pending, p);
        pthread_cond_broadcast(&sim->cond);
    }
    sim_unlock(sim);
}

/* ---- the vtable ------------------------------------------------------- */

static void sim_store(BaleDevice *dev, BaleDeviceIo *io)
{
    sim_submit(dev, io, BALE_DEVICE_STORE);
}

static void sim_get(BaleDevice *dev, BaleDeviceIo *io)
{
    sim_submit(dev, io, BALE_DEVICE_GET);
}

static void sim_flush(BaleDevice *dev, BaleDeviceIo *io)
{
    sim_submit(dev, io, BALE_DEVICE_FLUSH);
}

static void sim_get_info(BaleDevice *dev, BaleDeviceInfo *info)
{
    SimDevice *sim = (SimDevice *)dev;
    const BaleSimOptions *o = &sim->options;

    sim_lock(sim);
    *info = (BaleDeviceInfo) {
        .name = "sim",
        .block_size = o->block_size,
        .size = sim->live.size,
        .max_size = o->fixed_size ? sim->live.size
                    : o->max_size ? o->max_size : UINT64_MAX,
        .read_only = o->read_only,
        .fixed_size = o->fixed_size,
        .release_zeroes = !o->no_release,
    };
    sim_unlock(sim);
}

/* An operation that completes at once and is not a transfer. */
static void change_locked(SimDevice *sim, BaleSimOpKind kind, uint64_t offset,
                          uint64_t len)
{
    SimHistoryOp *op = op_begin_locked(sim, kind, offset, len);

    if (!sim->options.no_history) {
        sim_tree_copy(&op->before, &sim->live);
    }
    sim_op_apply(op, &sim->live, 0, NULL);
    op_end_locked(sim, op, true, 0, 0);
}

static int allocate_locked(SimDevice *sim, uint64_t offset, uint64_t len)
{
    const BaleSimOptions *o = &sim->options;
    uint64_t end = offset + len;
    int ret;

    if (o->read_only) {
        return -EROFS;
    }
    if (len > INT64_MAX || offset > INT64_MAX - len) {
        return -EFBIG;
    }
    ret = fault_of_call_locked(sim, BALE_SIM_ALLOCATE);
    if (ret < 0 || end <= sim->live.size) {
        return ret;
    }
    if (o->fixed_size || (o->max_size && end > o->max_size)) {
        return -ENOSPC;
    }
    change_locked(sim, BALE_SIM_OP_GROW, 0, end);
    return 0;
}

static int sim_allocate(BaleDevice *dev, uint64_t offset, uint64_t len)
{
    SimDevice *sim = (SimDevice *)dev;
    int ret;

    sim_lock(sim);
    ret = allocate_locked(sim, offset, len);
    sim_unlock(sim);
    return bale_device_count_call(&sim->counters, BALE_DEVICE_ALLOCATE, ret);
}

static int release_locked(SimDevice *sim, uint64_t offset, uint64_t len)
{
    int ret;

    if (sim->options.read_only) {
        return -EROFS;
    }
    if (sim->options.no_release) {
        return -ENOTSUP;
    }
    ret = fault_of_call_locked(sim, BALE_SIM_RELEASE);
    if (ret < 0 || len == 0 || offset >= sim->live.size) {
        return ret;
    }
    change_locked(sim, BALE_SIM_OP_RELEASE, offset,
                  MIN(len, sim->live.size - offset));
    return 0;
}

static int sim_release(BaleDevice *dev, uint64_t offset, uint64_t len)
{
    SimDevice *sim = (SimDevice *)dev;
    int ret;

    sim_lock(sim);
    ret = release_locked(sim, offset, len);
    sim_unlock(sim);
    return bale_device_count_call(&sim->counters, BALE_DEVICE_RELEASE, ret);
}

static int truncate_locked(SimDevice *sim, uint64_t size)
{
    int ret;

    if (sim->options.read_only) {
        return -EROFS;
    }
    if (sim->options.fixed_size) {
        return -ENOTSUP;
    }
    if (size > INT64_MAX) {
        return -EFBIG;
    }
    ret = fault_of_call_locked(sim, BALE_SIM_TRUNCATE);
    if (ret < 0) {
        return ret;
    }
    if (sim->options.max_size && size > sim->options.max_size) {
        return -ENOSPC;
    }
    if (size != sim->live.size) {
        change_locked(sim, BALE_SIM_OP_TRUNCATE, 0, size);
    }
    return 0;
}

static int sim_truncate(BaleDevice *dev, uint64_t size)
{
    SimDevice *sim = (SimDevice *)dev;
    int ret;

    sim_lock(sim);
    ret = truncate_locked(sim, size);
    sim_unlock(sim);
    return ret;
}

static void sim_get_stats(BaleDevice *dev, BaleDeviceStats *stats)
{
    bale_device_counters_get(&((SimDevice *)dev)->counters, stats);
}

static void sim_reset_stats(BaleDevice *dev)
{
    bale_device_counters_reset(&((SimDevice *)dev)->counters);
}

static int sim_command(BaleDevice *dev, const char *command, char **reply)
{
    *reply = NULL;
    if (strcmp(command, "story") != 0) {
        return -ENOTSUP;
    }
    *reply = bale_sim_story(dev);
    return 0;
}

static void sim_destroy(BaleDevice *dev)
{
    SimDevice *sim = (SimDevice *)dev;

    sim_lock(sim);
    g_assert(sim->pending->len == 0);
    sim->stop = true;
    pthread_cond_broadcast(&sim->cond);
    /* The thread of the last completion may still be on its way back. */
    while (sim->completing > 0) {
        pthread_cond_wait(&sim->cond, &sim->lock);
    }
    sim_unlock(sim);
    if (sim->thread) {
        g_thread_join(sim->thread);
    }
    sim_tree_clear(&sim->live);
    sim_tree_clear(&sim->origin);
    g_ptr_array_free(sim->uncertain, TRUE);
    g_ptr_array_free(sim->ops, TRUE);
    g_ptr_array_free(sim->pending, TRUE);
    g_array_free(sim->faults, TRUE);
    g_array_free(sim->lost, TRUE);
    pthread_mutex_destroy(&sim->lock);
    pthread_cond_destroy(&sim->cond);
    g_free(sim);
}

static const BaleDeviceOps sim_ops = {
    .interface_version = BALE_DEVICE_INTERFACE,
    .destroy = sim_destroy,
    .get_info = sim_get_info,
    .allocate = sim_allocate,
    .release = sim_release,
    .truncate = sim_truncate,
    .store = sim_store,
    .get = sim_get,
    .flush = sim_flush,
    .get_stats = sim_get_stats,
    .reset_stats = sim_reset_stats,
    .command = sim_command,
};

static SimDevice *sim_of(BaleDevice *dev)
{
    g_assert(dev->ops == &sim_ops);
    return (SimDevice *)dev;
}

/* ---- creation --------------------------------------------------------- */

static BaleDevice *sim_create(const BaleSimOptions *options,
                              const SimTree *tree)
{
    SimDevice *sim = g_new0(SimDevice, 1);

    sim->dev.ops = &sim_ops;
    if (options) {
        sim->options = *options;
    }
    if (sim->options.block_size == 0) {
        sim->options.block_size = 4096;
    }
    g_assert(bale_is_power_of_2(sim->options.block_size) &&
             sim->options.block_size >= BALE_SIM_SECTOR);
    pthread_mutex_init(&sim->lock, NULL);
    pthread_cond_init(&sim->cond, NULL);
    if (tree) {
        sim_tree_copy(&sim->live, tree);
    } else {
        sim->live.size = sim->options.size;
    }
    sim_tree_copy(&sim->origin, &sim->live);
    sim->ops = g_ptr_array_new_with_free_func(op_free);
    sim->uncertain = g_ptr_array_new();
    sim->pending = g_ptr_array_new_with_free_func(g_free);
    sim->faults = g_array_new(FALSE, FALSE, sizeof(SimArmed));
    sim->lost = g_array_new(FALSE, FALSE, sizeof(SimRange));
    sim->random = sim->options.seed;
    if (sim->options.mode == BALE_SIM_DEFERRED) {
        sim->thread = g_thread_new("bale-sim", sim_thread, sim);
    }
    return &sim->dev;
}

BaleDevice *bale_sim_new(const BaleSimOptions *options)
{
    return sim_create(options, NULL);
}

BaleDevice *bale_sim_new_from_image(BaleSimImage *image,
                                    const BaleSimOptions *options)
{
    return sim_create(options, &image->tree);
}

BaleSimImage *bale_sim_image(BaleDevice *dev)
{
    SimDevice *sim = sim_of(dev);
    BaleSimImage *image;

    sim_lock(sim);
    image = sim_image_new(&sim->live);
    sim_unlock(sim);
    return image;
}

void bale_sim_set_mode(BaleDevice *dev, BaleSimMode mode)
{
    SimDevice *sim = sim_of(dev);

    sim_lock(sim);
    sim->options.mode = mode;
    if (mode == BALE_SIM_DEFERRED && !sim->thread) {
        sim->thread = g_thread_new("bale-sim", sim_thread, sim);
    }
    while (sim->options.mode == BALE_SIM_IMMEDIATE && step_locked(sim)) {
        /* All that is pending completes now. */
    }
    pthread_cond_broadcast(&sim->cond);
    sim_unlock(sim);
}

bool bale_sim_step(BaleDevice *dev)
{
    SimDevice *sim = sim_of(dev);
    bool stepped;

    sim_lock(sim);
    stepped = step_locked(sim);
    sim_unlock(sim);
    return stepped;
}

unsigned bale_sim_run(BaleDevice *dev)
{
    unsigned steps = 0;

    while (bale_sim_step(dev)) {
        steps++;
    }
    return steps;
}

unsigned bale_sim_pending(BaleDevice *dev)
{
    SimDevice *sim = sim_of(dev);
    unsigned n;

    sim_lock(sim);
    n = sim->pending->len;
    sim_unlock(sim);
    return n;
}

/* ---- history, for tests ----------------------------------------------- */

uint64_t bale_sim_events(BaleDevice *dev)
{
    SimDevice *sim = sim_of(dev);
    uint64_t events;

    sim_lock(sim);
    events = sim->events;
    sim_unlock(sim);
    return events;
}

uint64_t bale_sim_ops(BaleDevice *dev)
{
    SimDevice *sim = sim_of(dev);
    uint64_t n;

    sim_lock(sim);
    n = sim->ops->len;
    sim_unlock(sim);
    return n;
}

void bale_sim_op(BaleDevice *dev, uint64_t index, BaleSimOp *op)
{
    SimDevice *sim = sim_of(dev);

    sim_lock(sim);
    g_assert(index < sim->ops->len);
    *op = ((SimHistoryOp *)g_ptr_array_index(sim->ops, index))->pub;
    sim_unlock(sim);
}

void bale_sim_forget(BaleDevice *dev)
{
    SimDevice *sim = sim_of(dev);

    sim_lock(sim);
    g_assert(sim->pending->len == 0);
    g_ptr_array_set_size(sim->uncertain, 0);
    g_ptr_array_set_size(sim->ops, 0);
    sim_tree_clear(&sim->origin);
    sim_tree_copy(&sim->origin, &sim->live);
    sim->events = 0;
    sim_unlock(sim);
}

static void story_event(GString *story, const char *before, uint64_t event)
{
    if (event == UINT64_MAX) {
        g_string_append_printf(story, "%s-", before);
    } else {
        g_string_append_printf(story, "%s%" G_GUINT64_FORMAT, before, event);
    }
}

char *bale_sim_story(BaleDevice *dev)
{
    static const char *const kinds[] = {
        [BALE_SIM_OP_STORE] = "store",
        [BALE_SIM_OP_RELEASE] = "release",
        [BALE_SIM_OP_GROW] = "grow",
        [BALE_SIM_OP_TRUNCATE] = "truncate",
        [BALE_SIM_OP_FLUSH] = "flush",
    };
    SimDevice *sim = sim_of(dev);
    GString *story = g_string_new("submitted..completed what durable\n");

    sim_lock(sim);
    for (guint i = 0; i < sim->ops->len; i++) {
        const SimHistoryOp *op = g_ptr_array_index(sim->ops, i);
        const BaleSimOp *pub = &op->pub;

        story_event(story, "", pub->submitted);
        story_event(story, "..", pub->completed);
        g_string_append_printf(story, " %s", kinds[pub->kind]);
        if (pub->kind != BALE_SIM_OP_FLUSH) {
            g_string_append_printf(story, " %" G_GUINT64_FORMAT
                                   "+%" G_GUINT64_FORMAT,
                                   pub->offset, pub->len);
            story_event(story, " durable ", pub->durable);
        }
        if (pub->ret < 0) {
            g_string_append_printf(story, " failed: %s",
                                   g_strerror(-pub->ret));
        }
        g_string_append_c(story, '\n');
    }
    sim_unlock(sim);
    return g_string_free(story, FALSE);
}

/* Copy what the crash states are computed from. */
static SimHistory *history_snapshot(SimDevice *sim)
{
    SimHistory *history = g_new0(SimHistory, 1);

    sim_lock(sim);
    sim_tree_copy(&history->origin, &sim->origin);
    history->events = sim->events;
    history->n_ops = sim->ops->len;
    history->ops = g_new(SimHistoryOp, history->n_ops);
    for (guint i = 0; i < sim->ops->len; i++) {
        /* The blocks stay the device's: they are there until it forgets. */
        history->ops[i] = *(SimHistoryOp *)g_ptr_array_index(sim->ops, i);
    }
    sim_unlock(sim);
    return history;
}

static void history_free(SimHistory *history)
{
    sim_tree_clear(&history->origin);
    g_free(history->ops);
    g_free(history);
}

uint64_t bale_sim_crash_states(BaleDevice *dev,
                               const BaleSimCrashOptions *options,
                               BaleSimCrashFunc *func, void *opaque)
{
    static const BaleSimCrashOptions defaults;
    SimDevice *sim = sim_of(dev);
    SimHistory *history = history_snapshot(sim);
    uint64_t n;

    g_assert(!sim->options.no_history);
    n = sim_history_crash_states(history, options ? options : &defaults, func,
                                 opaque);
    history_free(history);
    return n;
}

static bool keep_image(BaleSimImage *image, const BaleSimCrash *crash,
                       void *opaque)
{
    *(BaleSimImage **)opaque = bale_sim_image_ref(image);
    return false;
}

BaleSimImage *bale_sim_durable_image(BaleDevice *dev)
{
    /* State 0 of a point is always: nothing uncertain has survived. */
    BaleSimCrashOptions options = {
        .first_point = UINT64_MAX,
        .max_exhaustive = 1,
        .samples = 1,
        .only_state = true,
    };
    BaleSimImage *image = NULL;

    bale_sim_crash_states(dev, &options, keep_image, &image);
    return image;
}

/* ---- faults and damage ------------------------------------------------ */

void bale_sim_fault(BaleDevice *dev, const BaleSimFault *fault)
{
    SimDevice *sim = sim_of(dev);
    SimArmed armed = { *fault, MAX(fault->nth, 1) };

    g_assert(fault->call < BALE_SIM_CALLS && fault->error <= 0);
    g_assert(fault->error < 0 || fault->call == BALE_SIM_GET ||
             fault->call == BALE_SIM_STORE);
    sim_lock(sim);
    g_array_append_val(sim->faults, armed);
    sim_unlock(sim);
}

void bale_sim_faults_clear(BaleDevice *dev)
{
    SimDevice *sim = sim_of(dev);

    sim_lock(sim);
    g_array_set_size(sim->faults, 0);
    sim_unlock(sim);
}

uint64_t bale_sim_calls(BaleDevice *dev, BaleSimCall call)
{
    SimDevice *sim = sim_of(dev);
    uint64_t n;

    sim_lock(sim);
    n = sim->attempts[call];
    sim_unlock(sim);
    return n;
}

uint64_t bale_sim_faults_hit(BaleDevice *dev)
{
    SimDevice *sim = sim_of(dev);
    uint64_t n;

    sim_lock(sim);
    n = sim->faults_hit;
    sim_unlock(sim);
    return n;
}

void bale_sim_poke(BaleDevice *dev, uint64_t offset, const void *buf,
                   size_t len)
{
    SimDevice *sim = sim_of(dev);

    sim_lock(sim);
    sim_tree_write(&sim->live, offset, buf, len);
    sim_unlock(sim);
}

void bale_sim_flip_bit(BaleDevice *dev, uint64_t offset, unsigned bit)
{
    SimDevice *sim = sim_of(dev);
    uint8_t byte;

    g_assert(bit < 8);
    sim_lock(sim);
    sim_tree_read(&sim->live, offset, &byte, 1);
    byte ^= (uint8_t)(1u << bit);
    sim_tree_write(&sim->live, offset, &byte, 1);
    sim_unlock(sim);
}

void bale_sim_zero(BaleDevice *dev, uint64_t offset, uint64_t len)
{
    SimDevice *sim = sim_of(dev);

    sim_lock(sim);
    sim_tree_zero(&sim->live, offset, len);
    sim_unlock(sim);
}

void bale_sim_swap(BaleDevice *dev, uint64_t a, uint64_t b, uint64_t len)
{
    SimDevice *sim = sim_of(dev);
    g_autofree void *at_a = g_malloc(len);
    g_autofree void *at_b = g_malloc(len);

    sim_lock(sim);
    sim_tree_read(&sim->live, a, at_a, len);
    sim_tree_read(&sim->live, b, at_b, len);
    sim_tree_write(&sim->live, a, at_b, len);
    sim_tree_write(&sim->live, b, at_a, len);
    sim_unlock(sim);
}

void bale_sim_duplicate(BaleDevice *dev, uint64_t from, uint64_t to,
                        uint64_t len)
{
    SimDevice *sim = sim_of(dev);
    g_autofree void *buf = g_malloc(len);

    sim_lock(sim);
    sim_tree_read(&sim->live, from, buf, len);
    sim_tree_write(&sim->live, to, buf, len);
    sim_unlock(sim);
}

/* The last completed store that touched this block; NULL: none. */
static const SimHistoryOp *last_store_locked(SimDevice *sim, uint64_t offset)
{
    const SimHistoryOp *last = NULL;

    for (guint i = 0; i < sim->ops->len; i++) {
        const SimHistoryOp *op = g_ptr_array_index(sim->ops, i);

        if (op->pub.kind == BALE_SIM_OP_STORE && op->pub.offset <= offset &&
            offset - op->pub.offset < op->pub.len &&
            op->pub.completed != UINT64_MAX && op->pub.ret == 0 &&
            (!last || op->pub.completed > last->pub.completed)) {
            last = op;
        }
    }
    return last;
}

uint64_t bale_sim_stale(BaleDevice *dev, uint64_t offset, uint64_t len)
{
    SimDevice *sim = sim_of(dev);
    uint32_t block_size = sim->options.block_size;
    g_autofree uint8_t *was = g_malloc(block_size);
    g_autofree uint8_t *is = g_malloc(block_size);
    uint64_t changed = 0;

    g_assert(offset % block_size == 0 && len % block_size == 0);
    sim_lock(sim);
    for (uint64_t at = offset; at < offset + len; at += block_size) {
        const SimHistoryOp *op = last_store_locked(sim, at);

        if (!op) {
            continue;
        }
        sim_tree_read(&op->before, at, was, block_size);
        sim_tree_read(&sim->live, at, is, block_size);
        if (memcmp(was, is, block_size) != 0) {
            sim_tree_write(&sim->live, at, was, block_size);
            changed++;
        }
    }
    sim_unlock(sim);
    return changed;
}

void bale_sim_resize(BaleDevice *dev, uint64_t size)
{
    SimDevice *sim = sim_of(dev);

    sim_lock(sim);
    sim_tree_resize(&sim->live, size);
    sim_unlock(sim);
}

void bale_sim_lose(BaleDevice *dev, uint64_t offset, uint64_t len)
{
    SimDevice *sim = sim_of(dev);
    SimRange range = { offset, len };

    sim_lock(sim);
    if (len == 0) {
        g_array_set_size(sim->lost, 0);
    } else {
        g_array_append_val(sim->lost, range);
    }
    sim_unlock(sim);
}
