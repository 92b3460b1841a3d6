/*
 * Options of a bale node that have to do with space: the store's maximum size,
 * and compaction in the background; and the command that changes these and
 * others while the node is in use.
 *
 * The maximum size is the store's own and kept in it.  As an option of a node
 * it stands in for that as long as the store is open.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "qemu/osdep.h"
#include "block/block_int.h"
#include "qapi/error.h"
#include "qemu/option.h"

#include "extstore/store.h"

#include "bale-bridge-internal.h"
#include "bale-control-internal.h"
#include "bale-internal.h"
#include "bale-qapi-commands-bale.h"

#define BALE_OPT_MAX_SIZE     "max-size"
#define BALE_OPT_COMPACT      "compact"
#define BALE_OPT_COMPACT_RATE "compact-rate"

static QemuOptsList space_opts = {
    .name = "bale-space",
    .head = QTAILQ_HEAD_INITIALIZER(space_opts.head),
    .desc = {
        {
            .name = BALE_OPT_MAX_SIZE,
            .type = QEMU_OPT_SIZE,
            .help = "What the store may take; 0: no limit "
                    "(default: what was set when it was created)",
        },
        {
            .name = BALE_OPT_COMPACT,
            .type = QEMU_OPT_BOOL,
            .help = "Compact in the background (default: on)",
        },
        {
            .name = BALE_OPT_COMPACT_RATE,
            .type = QEMU_OPT_SIZE,
            .help = "Bytes that this looks at in a second at most; "
                    "0: no bound (default)",
        },
        { /* end of list */ }
    },
};

bool bale_space_read_options(BaleSpace *space, QDict *options, Error **errp)
{
    QemuOpts *opts = qemu_opts_create(&space_opts, NULL, 0, &error_abort);
    bool ok = qemu_opts_absorb_qdict(opts, options, errp);

    if (ok) {
        uint64_t max_size = qemu_opt_get_size(opts, BALE_OPT_MAX_SIZE, 0);

        space->max_size = qemu_opt_find(opts, BALE_OPT_MAX_SIZE) && !max_size
                              ? BALE_MAX_SIZE_NONE
                              : max_size;
        space->given = qemu_opt_find(opts, BALE_OPT_MAX_SIZE) ||
                       qemu_opt_find(opts, BALE_OPT_COMPACT) ||
                       qemu_opt_find(opts, BALE_OPT_COMPACT_RATE);
        space->compact_off = !qemu_opt_get_bool(opts, BALE_OPT_COMPACT, true);
        space->compact_rate = qemu_opt_get_size(opts, BALE_OPT_COMPACT_RATE,
                                                0);
    }
    qemu_opts_del(opts);
    return ok;
}

typedef struct MaxSizeRun {
    BaleStore *store;
    uint64_t bytes;
    GError *err;
    bool ok;
} MaxSizeRun;

static void max_size_blocking(void *opaque)
{
    MaxSizeRun *run = opaque;

    run->ok = bale_store_set_max_size(run->store, run->bytes, &run->err);
}

static bool coroutine_fn set_max_size(BlockDriverState *bs, uint64_t bytes,
                                      Error **errp)
{
    MaxSizeRun run = { .bytes = bytes };
    const char *node_name = bdrv_get_node_name(bs);
    AioContext *old_ctx;

    if (bdrv_is_read_only(bs) || (bs->open_flags & BDRV_O_INACTIVE)) {
        error_setg(errp, "Node '%s' is %s", node_name,
                   bdrv_is_read_only(bs) ? "read-only" : "inactive");
        return false;
    }
    old_ctx = bdrv_co_enter(bs);
    run.store = bale_bs_store(bs);
    bale_bs_run(bs, max_size_blocking, &run);
    bdrv_co_leave(bs, old_ctx);
    if (!run.ok) {
        bale_bridge_error(run.err, errp);
        error_prepend(errp, "Node '%s': ", node_name);
        return false;
    }
    /* From now on what is stored counts. */
    bale_bs_space(bs)->max_size = 0;
    return true;
}

void coroutine_fn qmp_bale_set(const char *node_name, bool has_cache_size,
                               uint64_t cache_size, bool has_compact,
                               bool compact, bool has_compact_rate,
                               uint64_t compact_rate,
                               bool has_compression_threads,
                               uint32_t compression_threads,
                               bool has_max_size, uint64_t max_size,
                               bool has_space_threshold,
                               uint64_t space_threshold, bool has_speed,
                               uint64_t speed, Error **errp)
{
    BlockDriverState *bs = bale_find_node(node_name, errp);
    BaleSpace *space;
    AioContext *ctx;

    if (!bs) {
        return;
    }
    if ((has_compression_threads &&
         !bale_workers_check(compression_threads, errp)) ||
        (has_cache_size && !bale_cache_size_check(cache_size, errp))) {
        return;
    }
    if (has_max_size && !set_max_size(bs, max_size, errp)) {
        return;
    }
    if (has_max_size) {
        bs = bale_find_node(node_name, errp); /* that took a while */
        if (!bs) {
            return;
        }
    }
    ctx = bdrv_get_aio_context(bs);
    aio_context_acquire(ctx);
    space = bale_bs_space(bs);
    if (has_cache_size) {
        bale_bs_set_cache_size(bs, cache_size);
    }
    if (has_speed) {
        qatomic_set(&bale_bs_control(bs)->speed, speed);
    }
    if (has_compact || has_compact_rate) {
        space->compact_off = has_compact ? !compact : space->compact_off;
        space->compact_rate = has_compact_rate ? compact_rate
                                               : space->compact_rate;
        bale_store_set_compact(bale_bs_store(bs), !space->compact_off,
                               space->compact_rate);
    }
    if (has_space_threshold) {
        bale_control_set_space_threshold(bs, space_threshold);
    }
    if (has_compression_threads) {
        bale_bs_set_workers(bs, compression_threads, errp);
    }
    aio_context_release(ctx);
}
