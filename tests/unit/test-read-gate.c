/*
 * The gate before the device, over devices and clocks of our own: reads go in
 * order, none is lost, and the gate closes where that is faster only.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <glib.h>
#include <string.h>

#include "../../block/extstore/read-gate-internal.h"

#define READS 32u
#define DECODERS 2u
#define ROUNDS 4000u

typedef struct Read {
    BaleDeviceIo io;
    BaleGateItem item;
    uint64_t number; /* in the order of entering */
} Read;

typedef struct Fixture {
    BaleDevice dev;
    BaleReadGate gate;
    BaleGateLoad load;
    uint64_t entered, got; /* reads, so far */
    Read reads[READS];
    unsigned inside;       /* reads that the device has */
    Read *has[READS];      /* these, in order */
} Fixture;

static void device_get(BaleDevice *dev, BaleDeviceIo *io)
{
    Fixture *f = (Fixture *)dev;
    Read *read = (Read *)io;

    g_assert_cmpuint(read->number, ==, f->got++);
    g_assert_cmpuint(f->inside, <, READS);
    f->has[f->inside++] = read;
}

static const BaleDeviceOps device_ops = { .get = device_get };

static void fixture_init(Fixture *f)
{
    memset(f, 0, sizeof(*f));
    f->dev.ops = &device_ops;
    f->load = (BaleGateLoad){ .now_ns = 1, .decoders = DECODERS };
    bale_read_gate_init(&f->gate, &f->dev);
}

static void enter(Fixture *f, Read *read)
{
    read->number = f->entered++;
    f->load.asked = READS;
    bale_read_gate_enter(&f->gate, &read->item, &read->io, &f->load);
}

/*
 * The device completes all that it has, in @ns nanoseconds, and each is asked
 * for again.
 */
static void round_of_all(Fixture *f, uint64_t ns)
{
    Read *done[READS];
    unsigned n = f->inside;

    g_assert_cmpuint(n, >, 0);
    memcpy(done, f->has, sizeof(done));
    f->inside = 0;
    f->load.now_ns += ns;
    for (unsigned i = 0; i < n; i++) {
        bale_read_gate_leave(&f->gate, &f->load);
    }
    for (unsigned i = 0; i < n; i++) {
        enter(f, done[i]);
    }
}

/* All reads that are under way end. */
static void drain(Fixture *f)
{
    while (f->inside > 0) {
        unsigned n = f->inside;

        f->inside = 0;
        for (unsigned i = 0; i < n; i++) {
            bale_read_gate_leave(&f->gate, &f->load);
        }
    }
    g_assert_cmpuint(f->got, ==, f->entered);
    bale_read_gate_destroy(&f->gate);
}

/* What takes a millisecond, however many there are, is not to be limited. */
static void test_parallel_device(void)
{
    Fixture f;
    unsigned limited = 0;

    fixture_init(&f);
    for (unsigned i = 0; i < READS; i++) {
        enter(&f, &f.reads[i]);
    }
    for (unsigned i = 0; i < ROUNDS; i++) {
        limited += f.inside < READS;
        round_of_all(&f, 1000000);
    }
    g_assert_cmpuint(limited, >, 0); /* it was tried */
    g_assert_cmpuint(limited, <, ROUNDS / 8);
    drain(&f);
}

/* What is the slower the more there are is given half of them. */
static void test_crowded_device(void)
{
    Fixture f;
    unsigned limited = 0;

    fixture_init(&f);
    for (unsigned i = 0; i < READS; i++) {
        enter(&f, &f.reads[i]);
    }
    for (unsigned i = 0; i < ROUNDS; i++) {
        limited += f.inside <= READS / 2;
        round_of_all(&f, f.inside > READS / 2 ? 40000 * f.inside
                                              : 30000 * f.inside);
    }
    g_assert_cmpuint(limited, >, ROUNDS - ROUNDS / 8);
    drain(&f);
}

/* The device changes: so does the gate. */
static void test_changing_device(void)
{
    Fixture f;
    unsigned limited = 0;

    fixture_init(&f);
    for (unsigned i = 0; i < READS; i++) {
        enter(&f, &f.reads[i]);
    }
    for (unsigned i = 0; i < ROUNDS; i++) {
        round_of_all(&f, f.inside > READS / 2 ? 40000 * f.inside
                                              : 30000 * f.inside);
    }
    for (unsigned i = 0; i < ROUNDS; i++) {
        limited += f.inside < READS;
        round_of_all(&f, 1000000);
    }
    g_assert_cmpuint(limited, <, ROUNDS / 4);
    drain(&f);
}

/* Few reads never wait. */
static void test_few_reads(void)
{
    Fixture f;

    fixture_init(&f);
    for (unsigned i = 0; i < 8; i++) {
        enter(&f, &f.reads[i]);
    }
    for (unsigned i = 0; i < ROUNDS; i++) {
        g_assert_cmpuint(f.inside, ==, 8);
        round_of_all(&f, 40000);
    }
    drain(&f);
}

/* A device that completes each read at once, whether others wait or not. */
static void at_once_get(BaleDevice *dev, BaleDeviceIo *io)
{
    Fixture *f = (Fixture *)dev;

    f->got++;
    f->load.now_ns += 1000;
    bale_read_gate_leave(&f->gate, &f->load);
}

static void test_completes_at_once(void)
{
    static const BaleDeviceOps ops = { .get = at_once_get };
    Fixture f;

    fixture_init(&f);
    for (unsigned i = 0; i < READS; i++) {
        enter(&f, &f.reads[i]);
    }
    f.gate.closed = true;
    for (unsigned i = 0; i < ROUNDS && f.inside == READS; i++) {
        round_of_all(&f, 1000000);
    }
    g_assert_true(f.gate.first); /* some wait */
    f.dev.ops = &ops;
    for (unsigned n = f.inside; n > 0; n--) {
        bale_read_gate_leave(&f.gate, &f.load);
    }
    g_assert_cmpuint(f.got, ==, f.entered);
    bale_read_gate_destroy(&f.gate);
}

/* --- threads --- */

#define THREADS 4
#define THREAD_READS 3000

typedef struct Threaded {
    BaleDevice dev;
    BaleReadGate gate;
    GAsyncQueue *queue;
    unsigned under_way; /* atomic */
} Threaded;

typedef struct ThreadedRead {
    BaleDeviceIo io;
    BaleGateItem item;
    GAsyncQueue *done;
} ThreadedRead;

static BaleGateLoad threaded_load(Threaded *t)
{
    return (BaleGateLoad){
        .now_ns = g_get_monotonic_time() * 1000,
        .decoders = 1,
        .asked = __atomic_load_n(&t->under_way, __ATOMIC_RELAXED),
    };
}

static void threaded_get(BaleDevice *dev, BaleDeviceIo *io)
{
    g_async_queue_push(((Threaded *)dev)->queue, io);
}

/* Ends with a read without a queue for its completion. */
static gpointer threaded_device(gpointer opaque)
{
    Threaded *t = opaque;
    ThreadedRead *read;

    while ((read = g_async_queue_pop(t->queue))->done) {
        BaleGateLoad load = threaded_load(t);

        bale_read_gate_leave(&t->gate, &load);
        g_async_queue_push(read->done, read);
    }
    return NULL;
}

static gpointer threaded_caller(gpointer opaque)
{
    Threaded *t = opaque;
    ThreadedRead reads[4];
    g_autoptr(GAsyncQueue) done = g_async_queue_new();

    for (unsigned i = 0; i < G_N_ELEMENTS(reads); i++) {
        reads[i].done = done;
        g_async_queue_push(done, &reads[i]);
    }
    for (unsigned i = 0; i < THREAD_READS; i++) {
        ThreadedRead *read = g_async_queue_pop(done);
        BaleGateLoad load = threaded_load(t);

        __atomic_fetch_add(&t->under_way, 1, __ATOMIC_RELAXED);
        bale_read_gate_enter(&t->gate, &read->item, &read->io, &load);
        __atomic_fetch_sub(&t->under_way, 1, __ATOMIC_RELAXED);
    }
    for (unsigned i = 0; i < G_N_ELEMENTS(reads); i++) {
        g_async_queue_pop(done);
    }
    return NULL;
}

static void test_threads(void)
{
    static const BaleDeviceOps ops = { .get = threaded_get };
    Threaded t = { .dev.ops = &ops, .queue = g_async_queue_new() };
    ThreadedRead last = { .done = NULL };
    GThread *device, *callers[THREADS];

    bale_read_gate_init(&t.gate, &t.dev);
    t.gate.closed = true; /* so that reads wait */
    t.gate.left = 1000;
    device = g_thread_new("device", threaded_device, &t);
    for (unsigned i = 0; i < THREADS; i++) {
        callers[i] = g_thread_new("caller", threaded_caller, &t);
    }
    for (unsigned i = 0; i < THREADS; i++) {
        g_thread_join(callers[i]);
    }
    g_async_queue_push(t.queue, &last);
    g_thread_join(device);
    bale_read_gate_destroy(&t.gate);
    g_async_queue_unref(t.queue);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/read-gate/parallel-device", test_parallel_device);
    g_test_add_func("/read-gate/crowded-device", test_crowded_device);
    g_test_add_func("/read-gate/changing-device", test_changing_device);
    g_test_add_func("/read-gate/few-reads", test_few_reads);
    g_test_add_func("/read-gate/completes-at-once", test_completes_at_once);
    g_test_add_func("/read-gate/threads", test_threads);
    return g_test_run();
}
