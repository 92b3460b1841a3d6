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
    uint64_t now_ns;
    uint64_t entered, got, held; /* reads, so far */
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
    f->load.decoders = DECODERS;
    f->now_ns = 1;
    bale_read_gate_init(&f->gate, &f->dev);
}

static void enter(Fixture *f, Read *read)
{
    read->number = f->entered++;
    f->load.asked = READS;
    f->held += bale_read_gate_enter(&f->gate, &read->item, &read->io,
                                    &f->load);
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
    f->now_ns += ns;
    for (unsigned i = 0; i < n; i++) {
        bale_read_gate_leave(&f->gate, &f->load, f->now_ns);
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
            bale_read_gate_leave(&f->gate, &f->load, f->now_ns);
        }
    }
    g_assert_cmpuint(f->got, ==, f->entered);
    bale_read_gate_destroy(&f->gate);
}

static void enter_some(Fixture *f, unsigned n)
{
    fixture_init(f);
    for (unsigned i = 0; i < n; i++) {
        enter(f, &f->reads[i]);
    }
}

/* One that needs the same time however many reads it has. */
static uint64_t parallel_ns(unsigned reads)
{
    return 1000000;
}

/* One that becomes slower with each, beyond some. */
static uint64_t crowded_ns(unsigned reads)
{
    return (reads > READS / 2 ? 40000 : 30000) * reads;
}

/* Rounds on such a device; in how many there was a limit. */
static unsigned rounds_on(Fixture *f, uint64_t device_ns(unsigned reads))
{
    unsigned limited = 0;

    for (unsigned i = 0; i < ROUNDS; i++) {
        uint64_t held = f->held, width;

        limited += f->inside < READS;
        round_of_all(f, device_ns(f->inside));
        /* What it tells: some have waited just now if there is a limit. */
        width = bale_read_gate_width(&f->gate, &f->load);
        g_assert_cmpuint(f->inside, ==, width ? width : READS);
        g_assert_cmpint(f->held > held, ==, width > 0);
    }
    return limited;
}

/* It is tried to limit the reads, but not for long. */
static void test_parallel_device(void)
{
    Fixture f;
    unsigned limited;

    enter_some(&f, READS);
    limited = rounds_on(&f, parallel_ns);
    g_assert_cmpuint(limited, >, 0);
    g_assert_cmpuint(limited, <, ROUNDS / 8);
    drain(&f);
}

static void test_crowded_device(void)
{
    Fixture f;

    enter_some(&f, READS);
    g_assert_cmpuint(rounds_on(&f, crowded_ns), >, ROUNDS - ROUNDS / 8);
    drain(&f);
}

/* The device changes: so does the gate. */
static void test_changing_device(void)
{
    Fixture f;

    enter_some(&f, READS);
    rounds_on(&f, crowded_ns);
    g_assert_cmpuint(rounds_on(&f, parallel_ns), <, ROUNDS / 4);
    g_assert_cmpuint(rounds_on(&f, crowded_ns), >, ROUNDS / 2);
    drain(&f);
}

/* Few reads never wait. */
static void test_few_reads(void)
{
    Fixture f;

    enter_some(&f, 8);
    for (unsigned i = 0; i < ROUNDS; i++) {
        g_assert_cmpuint(f.inside, ==, 8);
        round_of_all(&f, 40000);
    }
    g_assert_cmpuint(f.held, ==, 0);
    drain(&f);
}

/* A device that completes each read at once, whether others wait or not. */
static void at_once_get(BaleDevice *dev, BaleDeviceIo *io)
{
    Fixture *f = (Fixture *)dev;

    f->got++;
    f->now_ns += 1000;
    bale_read_gate_leave(&f->gate, &f->load, f->now_ns);
}

static void test_completes_at_once(void)
{
    static const BaleDeviceOps ops = { .get = at_once_get };
    Fixture f;

    enter_some(&f, READS);
    f.gate.closed = true;
    for (unsigned i = 0; i < ROUNDS && f.inside == READS; i++) {
        round_of_all(&f, 1000000);
    }
    g_assert_true(f.gate.first); /* some wait */
    f.dev.ops = &ops;
    for (unsigned n = f.inside; n > 0; n--) {
        bale_read_gate_leave(&f.gate, &f.load, f.now_ns);
    }
    g_assert_cmpuint(f.got, ==, f.entered);
    bale_read_gate_destroy(&f.gate);
}

/* --- threads --- */

#define THREADS 4u
#define THREAD_DEPTH 4u
#define THREAD_READS 3000u

/* GLib's queues will not do: ThreadSanitizer does not know their locks. */
typedef struct Channel {
    pthread_mutex_t lock;
    pthread_cond_t filled;
    GQueue items; /* under the lock */
} Channel;

typedef struct Threaded {
    BaleDevice dev;
    BaleReadGate gate;
    Channel queue; /* what the device has */
} Threaded;

typedef struct ThreadedRead {
    BaleDeviceIo io;
    BaleGateItem item;
    Channel *done;
} ThreadedRead;

static void channel_init(Channel *c)
{
    pthread_mutex_init(&c->lock, NULL);
    pthread_cond_init(&c->filled, NULL);
    g_queue_init(&c->items);
}

static void channel_destroy(Channel *c)
{
    g_assert_cmpuint(c->items.length, ==, 0);
    pthread_mutex_destroy(&c->lock);
    pthread_cond_destroy(&c->filled);
}

static void channel_put(Channel *c, void *item)
{
    pthread_mutex_lock(&c->lock);
    g_queue_push_tail(&c->items, item);
    pthread_cond_signal(&c->filled);
    pthread_mutex_unlock(&c->lock);
}

static void *channel_take(Channel *c)
{
    void *item;

    pthread_mutex_lock(&c->lock);
    while (!(item = g_queue_pop_head(&c->items))) {
        pthread_cond_wait(&c->filled, &c->lock);
    }
    pthread_mutex_unlock(&c->lock);
    return item;
}

static BaleGateLoad threaded_load(void)
{
    return (BaleGateLoad){
        .decoders = 1,
        .asked = THREADS * THREAD_DEPTH,
    };
}

static void threaded_get(BaleDevice *dev, BaleDeviceIo *io)
{
    channel_put(&((Threaded *)dev)->queue, io);
}

/* Ends with a read without a channel for its completion. */
static void *threaded_device(void *opaque)
{
    Threaded *t = opaque;
    ThreadedRead *read;

    while ((read = channel_take(&t->queue))->done) {
        BaleGateLoad load = threaded_load();

        bale_read_gate_leave(&t->gate, &load, g_get_monotonic_time() * 1000);
        channel_put(read->done, read);
    }
    return NULL;
}

static void *threaded_caller(void *opaque)
{
    Threaded *t = opaque;
    ThreadedRead reads[THREAD_DEPTH];
    Channel done;

    channel_init(&done);
    for (unsigned i = 0; i < THREAD_DEPTH; i++) {
        reads[i].done = &done;
        channel_put(&done, &reads[i]);
    }
    for (unsigned i = 0; i < THREAD_READS; i++) {
        ThreadedRead *read = channel_take(&done);
        BaleGateLoad load = threaded_load();

        bale_read_gate_enter(&t->gate, &read->item, &read->io, &load);
    }
    for (unsigned i = 0; i < THREAD_DEPTH; i++) {
        channel_take(&done);
    }
    channel_destroy(&done);
    return NULL;
}

static void test_threads(void)
{
    static const BaleDeviceOps ops = { .get = threaded_get };
    Threaded t = { .dev.ops = &ops };
    ThreadedRead last = { .done = NULL };
    pthread_t device, callers[THREADS];

    channel_init(&t.queue);
    bale_read_gate_init(&t.gate, &t.dev);
    t.gate.closed = true; /* so that reads wait */
    t.gate.left = 1000;
    pthread_create(&device, NULL, threaded_device, &t);
    for (unsigned i = 0; i < THREADS; i++) {
        pthread_create(&callers[i], NULL, threaded_caller, &t);
    }
    for (unsigned i = 0; i < THREADS; i++) {
        pthread_join(callers[i], NULL);
    }
    channel_put(&t.queue, &last);
    pthread_join(device, NULL);
    bale_read_gate_destroy(&t.gate);
    channel_destroy(&t.queue);
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
