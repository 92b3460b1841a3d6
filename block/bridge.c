/*
 * The bridge between coroutines and engine threads.
 *
 * Why waking is right.  A BaleCoRequest counts the completions under way, and
 * one more for the coroutine itself, which it gives up when it begins to wait.
 * Whoever brings the counter to zero is last: if that is the coroutine, then
 * everything is complete and it does not yield; if it is a completion, then
 * the coroutine has yielded or is about to, and is scheduled in its AioContext.
 * That cannot run it before it has yielded: an AioContext runs what is
 * scheduled in it only in its home thread (the main one under the BQL), and
 * that thread, or the holder of the BQL, is just then running the coroutine.
 * Nothing of the request is touched after the counter was decremented, other
 * than by the one that brought it to zero, so the request may live on the
 * coroutine's stack.
 *
 * aio_co_schedule() is used rather than aio_co_wake(), which may enter the
 * coroutine directly and so would run guest-visible code on a thread that the
 * engine wants back.  Only a completion that runs inside of a coroutine of the
 * same AioContext (one of the bdrv device's) saves the way round the event
 * loop: what it wakes is queued behind that coroutine.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "qemu/osdep.h"
#include "block/aio-wait.h"
#include "qemu/thread.h"

#include "extstore/store.h"

#include "bale-bridge-internal.h"

void coroutine_fn bale_co_request_init(BaleCoRequest *req)
{
    req->co = qemu_coroutine_self();
    req->ctx = qemu_coroutine_get_aio_context(req->co);
    req->pending = 1;
    req->ret = 0;
}

void bale_co_request_add(BaleCoRequest *req)
{
    qatomic_inc(&req->pending);
}

void bale_co_request_done(void *opaque, int ret)
{
    BaleCoRequest *req = opaque;
    Coroutine *co = req->co;
    AioContext *ctx = req->ctx;

    assert(ret <= 0);
    if (ret < 0) {
        qatomic_cmpxchg(&req->ret, 0, ret);
    }
    if (qatomic_fetch_dec(&req->pending) != 1) {
        return;
    }
    if (qemu_in_coroutine() && qemu_get_current_aio_context() == ctx &&
        qemu_coroutine_get_aio_context(qemu_coroutine_self()) == ctx) {
        /* Runs when the coroutine that we are in yields or ends. */
        aio_co_enter(ctx, co);
    } else {
        aio_co_schedule(ctx, co);
    }
}

int coroutine_fn bale_co_request_wait(BaleCoRequest *req)
{
    assert(req->co == qemu_coroutine_self());
    if (qatomic_fetch_dec(&req->pending) != 1) {
        qemu_coroutine_yield();
        assert(qatomic_read(&req->pending) == 0);
    }
    return qatomic_read(&req->ret);
}

/* --- blocking functions --- */

typedef struct BlockingRun {
    BaleBlockingFunc *fn;
    void *opaque;
    BaleCoRequest *req; /* NULL: not in a coroutine */
    bool done;          /* atomic */
} BlockingRun;

static void *blocking_thread(void *opaque)
{
    BlockingRun *run = opaque;
    BaleCoRequest *req = run->req;

    run->fn(run->opaque);

    /* @run is gone once the waiter knows. */
    if (req) {
        bale_co_request_done(req, 0);
    } else {
        qatomic_store_release(&run->done, true);
        aio_wait_kick();
    }
    return NULL;
}

void bale_bridge_run(AioContext *ctx, BaleBlockingFunc *fn, void *opaque)
{
    BlockingRun run = { .fn = fn, .opaque = opaque };
    BaleCoRequest req;
    QemuThread thread;

    if (qemu_in_coroutine()) {
        bale_co_request_init(&req);
        bale_co_request_add(&req);
        run.req = &req;
    }

    /*
     * qemu_thread_create() blocks all signals in the new thread, and so in
     * every thread that the engine starts from it: signals of a QEMU program
     * are for the threads that expect them.
     */
    qemu_thread_create(&thread, "bale-blocking", blocking_thread, &run,
                       QEMU_THREAD_DETACHED);

    if (run.req) {
        bale_co_request_wait(&req);
    } else {
        AIO_WAIT_WHILE(ctx, !qatomic_load_acquire(&run.done));
    }
}

int bale_bridge_error(GError *err, Error **errp)
{
    int ret = -EIO;

    if (err) {
        ret = bale_error_to_errno(err);
        error_setg(errp, "%s", err->message);
        g_error_free(err);
    } else {
        error_setg(errp, "Input/output error");
    }
    return ret < 0 ? ret : -EIO;
}
