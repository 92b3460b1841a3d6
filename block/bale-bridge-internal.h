/*
 * The bridge: QEMU's coroutines and main loop on one side, the engine's
 * threads and callbacks on the other.
 *
 * Two tools.  A BaleCoRequest lets a coroutine wait for requests to the engine
 * that complete on any thread.  bale_bridge_run() runs one of the engine's
 * blocking functions on a thread of its own, because the device that such a
 * function waits for needs the very AioContext that called it.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef BALE_BLOCK_BALE_BRIDGE_INTERNAL_H
#define BALE_BLOCK_BALE_BRIDGE_INTERNAL_H

#include "qemu/osdep.h"
#include "block/aio.h"
#include "block/block_int.h"
#include "qapi/error.h"
#include "qemu/coroutine.h"

/*
 * Requests to the engine that one coroutine waits for together.  Lives on the
 * coroutine's stack from init to wait; the fields are the bridge's own.
 */
typedef struct BaleCoRequest {
    Coroutine *co;
    AioContext *ctx;
    int pending; /* atomic: completions awaited, and one for the coroutine */
    int ret;     /* atomic: 0, or the first error */
} BaleCoRequest;

/* Begin, in the coroutine that will wait. */
void coroutine_fn bale_co_request_init(BaleCoRequest *req);

/*
 * Announce one more completion; call it right before the request is submitted
 * with bale_co_request_done() and @req as its callback.
 */
void bale_co_request_add(BaleCoRequest *req);

/* The BaleDone to submit with; @opaque is the BaleCoRequest.  Any thread. */
void bale_co_request_done(void *opaque, int ret);

/*
 * Wait for everything announced.  Returns 0, or the first negative errno that
 * came.  No lock of the engine or of a driver may be held.
 */
int coroutine_fn bale_co_request_wait(BaleCoRequest *req);

typedef void BaleBlockingFunc(void *opaque);

/*
 * Run @fn(@opaque) on a new thread whose signals are blocked, and return when
 * it has returned.  In a coroutine it yields; elsewhere (main loop thread only)
 * it polls @ctx meanwhile, with the locking rules of AIO_WAIT_WHILE().
 */
void bale_bridge_run(AioContext *ctx, BaleBlockingFunc *fn, void *opaque);

/*
 * Turn an engine's error into QEMU's and return its negative errno.  @err is
 * taken and freed; NULL counts as an unknown I/O error.
 */
int bale_bridge_error(GError *err, Error **errp);

#endif
