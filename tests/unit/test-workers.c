/*
 * The worker pool: order, priorities, contexts, drain, failures.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <errno.h>
#include <glib.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/resource.h>

#include "util/workers.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define HAVE_SANITIZER 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define HAVE_SANITIZER 1
#endif
#endif

#define container_of(ptr, type, member) \
    ((type *)((char *)(ptr) - offsetof(type, member)))

#define MANY 20000

/* Holds the only worker of a pool until the test lets it go. */
typedef struct Gate {
    BaleWork work;
    atomic_bool entered;
    atomic_bool open;
} Gate;

static void gate_run(BaleWork *work, void *context, unsigned worker)
{
    Gate *gate = container_of(work, Gate, work);

    gate->entered = true;
    while (!gate->open) {
        g_usleep(100);
    }
}

static void gate_close(Gate *gate, BaleWorkers *pool)
{
    *gate = (Gate) { .work.fn = gate_run };
    bale_workers_push(pool, &gate->work, BALE_WORK_NORMAL);
    while (!gate->entered) {
        g_usleep(100);
    }
}

typedef struct Item {
    BaleWork work;
    int number;
    atomic_int *next;
    int *order;
    atomic_int runs;
} Item;

static void item_run(BaleWork *work, void *context, unsigned worker)
{
    Item *item = container_of(work, Item, work);

    item->runs++;
    if (item->order != NULL) {
        item->order[atomic_fetch_add(item->next, 1)] = item->number;
    }
}

static void test_runs_each_item_once(void)
{
    g_autoptr(BaleWorkers) pool =
        bale_workers_new("once", 4, NULL, NULL, NULL, NULL);
    g_autofree Item *items = g_new0(Item, MANY);
    BaleWorkersStats stats;

    g_assert_nonnull(pool);
    for (int i = 0; i < MANY; i++) {
        items[i].work.fn = item_run;
        bale_workers_push(pool, &items[i].work, i & 1);
    }
    bale_workers_drain(pool);
    for (int i = 0; i < MANY; i++) {
        g_assert_cmpint(items[i].runs, ==, 1);
    }
    bale_workers_get_stats(pool, &stats);
    g_assert_cmpuint(stats.executed, ==, MANY);
    g_assert_cmpuint(stats.queued[BALE_WORK_URGENT], ==, 0);
    g_assert_cmpuint(stats.queued[BALE_WORK_NORMAL], ==, 0);
    g_assert_cmpuint(stats.running, ==, 0);
    g_assert_cmpuint(stats.wakeups, <=, MANY);
}

/* One worker, so that the order of starts is the order of runs. */
static void test_first_in_first_out_and_urgent_first(void)
{
    g_autoptr(BaleWorkers) pool =
        bale_workers_new("order", 1, NULL, NULL, NULL, NULL);
    Item items[200];
    int order[G_N_ELEMENTS(items)];
    atomic_int next = 0;
    BaleWorkersStats stats;
    Gate gate;

    gate_close(&gate, pool);
    for (int i = 0; i < 200; i++) {
        items[i] = (Item) {
            .work.fn = item_run, .number = i, .next = &next, .order = order,
        };
        bale_workers_push(pool, &items[i].work,
                          i % 2 ? BALE_WORK_URGENT : BALE_WORK_NORMAL);
    }
    bale_workers_get_stats(pool, &stats);
    g_assert_cmpuint(stats.threads, ==, 1);
    g_assert_cmpuint(stats.queued[BALE_WORK_URGENT], ==, 100);
    g_assert_cmpuint(stats.queued[BALE_WORK_NORMAL], ==, 100);
    g_assert_cmpuint(stats.running, ==, 1);
    gate.open = true;
    bale_workers_drain(pool);
    for (int i = 0; i < 100; i++) {
        g_assert_cmpint(order[i], ==, 2 * i + 1);
        g_assert_cmpint(order[100 + i], ==, 2 * i);
    }
}

static void item_run_too(BaleWork *work, void *context, unsigned worker)
{
    g_assert_cmpuint(worker, ==, BALE_WORKERS_MAX);
    g_assert_true(context == work);
    item_run(work, context, worker);
}

/* While the only worker is busy: those of one function, in their order. */
static void test_others_can_help(void)
{
    enum { N = 9 };
    g_autoptr(BaleWorkers) pool =
        bale_workers_new("help", 1, NULL, NULL, NULL, NULL);
    Item items[N];
    int order[N + 1];
    atomic_int next = 0;
    Gate gate;

    gate_close(&gate, pool);
    for (int i = 0; i < N; i++) {
        items[i] = (Item) {
            .work.fn = i % 2 ? item_run : item_run_too,
            .number = i, .next = &next, .order = order,
        };
        bale_workers_push(pool, &items[i].work, BALE_WORK_URGENT);
    }
    g_assert_false(bale_workers_help(pool, BALE_WORK_BULK, item_run, NULL));
    for (int i = 0; i < N; i += 2) {
        g_assert_true(bale_workers_help(pool, BALE_WORK_URGENT, item_run_too,
                                        &items[i].work));
    }
    g_assert_false(bale_workers_help(pool, BALE_WORK_URGENT, item_run_too,
                                     NULL));
    /* The queue is whole, also at its end. */
    items[0].work.fn = item_run;
    bale_workers_push(pool, &items[0].work, BALE_WORK_URGENT);
    gate.open = true;
    bale_workers_drain(pool);
    for (int i = 0; i < N; i++) {
        g_assert_cmpint(items[i].runs, ==, i ? 1 : 2);
        g_assert_cmpint(order[i], ==, i <= N / 2 ? 2 * i : 2 * (i - N / 2) - 1);
    }
}

/* Time may pass: what is held back may begin late, but not early. */
static void test_bulk_work_can_be_held_back(void)
{
    g_autoptr(BaleWorkers) pool =
        bale_workers_new("hold", 2, NULL, NULL, NULL, NULL);
    Item bulk[20], normal = { .work.fn = item_run };
    int64_t begin_us = g_get_monotonic_time();

    bale_workers_hold(pool, 20000);
    for (unsigned i = 0; i < G_N_ELEMENTS(bulk); i++) {
        bulk[i] = (Item) { .work.fn = item_run };
        bale_workers_push(pool, &bulk[i].work, BALE_WORK_BULK);
    }
    bale_workers_push(pool, &normal.work, BALE_WORK_NORMAL);
    while (!normal.runs) {
        g_usleep(100);
    }
    for (unsigned i = 0; i < G_N_ELEMENTS(bulk); i++) {
        while (!bulk[i].runs) {
            g_usleep(100);
        }
    }
    g_assert_cmpint(g_get_monotonic_time() - begin_us, >=, 20000);
    bale_workers_drain(pool);
}

static void test_drain_and_letting_go_end_a_hold(void)
{
    g_autoptr(BaleWorkers) pool =
        bale_workers_new("let-go", 2, NULL, NULL, NULL, NULL);
    Item items[MANY / 100];

    for (unsigned i = 0; i < G_N_ELEMENTS(items); i++) {
        items[i] = (Item) { .work.fn = item_run };
        bale_workers_hold(pool, i % 3 ? BALE_WORK_HOLD_MAX_US : 0);
        bale_workers_push(pool, &items[i].work, i % BALE_WORK__PRIORITIES);
        if (i % 32 == 0) {
            bale_workers_drain(pool);
            g_assert_cmpint(items[i].runs, ==, 1);
        }
    }
    bale_workers_drain(pool);
    for (unsigned i = 0; i < G_N_ELEMENTS(items); i++) {
        g_assert_cmpint(items[i].runs, ==, 1);
    }
}

static void test_busy_workers_are_not_woken(void)
{
    g_autoptr(BaleWorkers) pool =
        bale_workers_new("busy", 1, NULL, NULL, NULL, NULL);
    Item items[100];
    BaleWorkersStats before;
    BaleWorkersStats after;
    Gate gate;

    gate_close(&gate, pool);
    bale_workers_get_stats(pool, &before);
    for (int i = 0; i < 100; i++) {
        items[i] = (Item) { .work.fn = item_run };
        bale_workers_push(pool, &items[i].work, BALE_WORK_NORMAL);
    }
    bale_workers_get_stats(pool, &after);
    gate.open = true;
    bale_workers_drain(pool);
    g_assert_cmpuint(after.wakeups, ==, before.wakeups);
}

/* Two workers held at once prove that the second one was woken. */
static void test_a_push_wakes_a_sleeper_while_another_is_busy(void)
{
    g_autoptr(BaleWorkers) pool =
        bale_workers_new("second", 2, NULL, NULL, NULL, NULL);
    Gate one;
    Gate two;

    gate_close(&one, pool);
    gate_close(&two, pool);
    one.open = true;
    two.open = true;
    bale_workers_drain(pool);
}

typedef struct Again {
    BaleWork work;
    BaleWorkers *pool;
    int left;
} Again;

static void again_run(BaleWork *work, void *context, unsigned worker)
{
    Again *again = container_of(work, Again, work);

    if (--again->left > 0) {
        bale_workers_push(again->pool, work, BALE_WORK_URGENT);
    }
}

static void test_drain_waits_for_what_functions_push(void)
{
    g_autoptr(BaleWorkers) pool =
        bale_workers_new("again", 3, NULL, NULL, NULL, NULL);
    Again again[8];

    for (int i = 0; i < 8; i++) {
        again[i] = (Again) { { .fn = again_run }, pool, 500 };
        bale_workers_push(pool, &again[i].work, BALE_WORK_NORMAL);
    }
    bale_workers_drain(pool);
    for (int i = 0; i < 8; i++) {
        g_assert_cmpint(again[i].left, ==, 0);
    }
}

static void test_free_finishes_what_is_queued(void)
{
    BaleWorkers *pool = bale_workers_new("free", 2, NULL, NULL, NULL, NULL);
    g_autofree Item *items = g_new0(Item, 1000);

    for (int i = 0; i < 1000; i++) {
        items[i].work.fn = item_run;
        bale_workers_push(pool, &items[i].work, BALE_WORK_NORMAL);
    }
    bale_workers_free(pool);
    for (int i = 0; i < 1000; i++) {
        g_assert_cmpint(items[i].runs, ==, 1);
    }
    bale_workers_free(NULL);
}

/* The function frees its own item: the pool must not touch it afterwards. */
static void self_free_run(BaleWork *work, void *context, unsigned worker)
{
    memset(work, 0xff, sizeof(*work));
    g_free(work);
}

static void test_a_function_may_free_its_item(void)
{
    g_autoptr(BaleWorkers) pool =
        bale_workers_new("self", 3, NULL, NULL, NULL, NULL);

    for (int i = 0; i < 5000; i++) {
        BaleWork *work = g_new0(BaleWork, 1);

        work->fn = self_free_run;
        bale_workers_push(pool, work, BALE_WORK_NORMAL);
    }
    bale_workers_drain(pool);
}

typedef struct Pusher {
    BaleWorkers *pool;
    Item items[2000];
} Pusher;

static void *pusher_main(void *opaque)
{
    Pusher *p = opaque;

    for (unsigned i = 0; i < G_N_ELEMENTS(p->items); i++) {
        p->items[i].work.fn = item_run;
        bale_workers_push(p->pool, &p->items[i].work, i % 3 == 0);
        if (i % 100 == 0) {
            bale_workers_drain(p->pool);
        }
    }
    return NULL;
}

static void test_many_pushers_and_drainers(void)
{
    g_autoptr(BaleWorkers) pool =
        bale_workers_new("many", 4, NULL, NULL, NULL, NULL);
    g_autofree Pusher *pushers = g_new0(Pusher, 4);
    pthread_t threads[4];

    for (int i = 0; i < 4; i++) {
        pushers[i].pool = pool;
        g_assert_cmpint(pthread_create(&threads[i], NULL, pusher_main,
                                       &pushers[i]), ==, 0);
    }
    for (int i = 0; i < 4; i++) {
        pthread_join(threads[i], NULL);
    }
    bale_workers_drain(pool);
    for (int i = 0; i < 4; i++) {
        for (unsigned j = 0; j < G_N_ELEMENTS(pushers[i].items); j++) {
            g_assert_cmpint(pushers[i].items[j].runs, ==, 1);
        }
    }
}

typedef struct Contexts {
    int made;
    int fail_at;
} Contexts;

static int contexts_alive;

typedef struct Context {
    unsigned worker;
    pthread_t thread;
    bool used;
} Context;

static void *context_new(void *opaque, unsigned worker, GError **errp)
{
    Contexts *c = opaque;
    Context *context;

    g_assert_cmpint(c->made, ==, worker);
    if (c->made == c->fail_at) {
        g_set_error(errp, G_FILE_ERROR, G_FILE_ERROR_NOMEM, "no context");
        return NULL;
    }
    c->made++;
    contexts_alive++;
    context = g_new0(Context, 1);
    context->worker = worker;
    return context;
}

static void context_free(void *opaque)
{
    contexts_alive--;
    g_free(opaque);
}

/* Not atomic on purpose: only ever touched by its own worker. */
static void context_run(BaleWork *work, void *opaque, unsigned worker)
{
    Context *context = opaque;

    g_assert_cmpuint(context->worker, ==, worker);
    if (context->used) {
        g_assert_true(pthread_equal(context->thread, pthread_self()));
    }
    context->used = true;
    context->thread = pthread_self();
}

static void test_each_worker_has_its_context(void)
{
    Contexts c = { .fail_at = -1 };
    BaleWorkers *pool =
        bale_workers_new("ctx", 3, context_new, context_free, &c, NULL);
    g_autofree BaleWork *works = g_new0(BaleWork, 5000);

    g_assert_cmpint(contexts_alive, ==, 3);
    for (int i = 0; i < 5000; i++) {
        works[i].fn = context_run;
        bale_workers_push(pool, &works[i], BALE_WORK_NORMAL);
    }
    bale_workers_free(pool);
    g_assert_cmpint(contexts_alive, ==, 0);
}

static void test_a_failing_constructor_leaves_nothing(void)
{
    Contexts c = { .fail_at = 2 };
    g_autoptr(GError) err = NULL;

    g_assert_null(bale_workers_new("ctx", 4, context_new, context_free, &c,
                                   &err));
    g_assert_error(err, G_FILE_ERROR, G_FILE_ERROR_NOMEM);
    g_assert_cmpint(contexts_alive, ==, 0);
}

static void test_too_many_threads_are_refused(void)
{
    g_autoptr(GError) err = NULL;

    g_assert_null(bale_workers_new("x", BALE_WORKERS_MAX + 1, NULL, NULL,
                                   NULL, &err));
    g_assert_error(err, G_FILE_ERROR, G_FILE_ERROR_INVAL);
}

/* Address space for a few stacks only, so that a later thread fails. */
static void test_failing_thread_creation_leaves_nothing(void)
{
#ifdef HAVE_SANITIZER
    g_test_skip("sanitizers need unlimited address space");
#else
    if (g_test_subprocess()) {
        struct rlimit limit = { (rlim_t)512 << 20, (rlim_t)512 << 20 };
        Contexts c = { .fail_at = -1 };
        g_autoptr(GError) err = NULL;

        g_assert_cmpint(setrlimit(RLIMIT_AS, &limit), ==, 0);
        g_assert_null(bale_workers_new("x", BALE_WORKERS_MAX, context_new,
                                       context_free, &c, &err));
        g_assert_nonnull(err);
        g_assert_nonnull(strstr(err->message, "cannot start worker thread"));
        g_assert_cmpint(contexts_alive, ==, 0);
        return;
    }
    g_test_trap_subprocess(NULL, 0, 0);
    g_test_trap_assert_passed();
#endif
}

typedef struct Look {
    BaleWork work;
    char name[16];
    sigset_t mask;
} Look;

static void look_run(BaleWork *work, void *context, unsigned worker)
{
    Look *look = container_of(work, Look, work);

    pthread_getname_np(pthread_self(), look->name, sizeof(look->name));
    pthread_sigmask(SIG_BLOCK, NULL, &look->mask);
}

static void test_workers_are_named_and_block_signals(void)
{
    g_autoptr(BaleWorkers) pool =
        bale_workers_new("a-very-long-name", 1, NULL, NULL, NULL, NULL);
    Look look = { .work.fn = look_run };
    sigset_t mine;

    bale_workers_push(pool, &look.work, BALE_WORK_NORMAL);
    bale_workers_drain(pool);
    g_assert_cmpstr(look.name, ==, "a-very-long-0");
    g_assert_true(sigismember(&look.mask, SIGINT));
    g_assert_true(sigismember(&look.mask, SIGUSR1));
    g_assert_true(sigismember(&look.mask, SIGALRM));
    pthread_sigmask(SIG_BLOCK, NULL, &mine);
    g_assert_false(sigismember(&mine, SIGUSR1));
}

static void test_no_number_means_all_cores(void)
{
    g_autoptr(BaleWorkers) pool =
        bale_workers_new("all", 0, NULL, NULL, NULL, NULL);

    g_assert_cmpuint(bale_workers_threads(pool), ==,
                     MIN(bale_workers_online_cores(), BALE_WORKERS_MAX));
    bale_workers_drain(pool);
}

typedef struct Resizer {
    BaleWorkers *pool;
    atomic_bool stop;
    int rounds;
} Resizer;

static void *resizer_main(void *opaque)
{
    static const unsigned sizes[] = { 3, 1, 6, 2, 2, 5 };
    Resizer *r = opaque;

    while (!r->stop || r->rounds < 20) {
        unsigned n = sizes[r->rounds++ % G_N_ELEMENTS(sizes)];

        g_assert_true(bale_workers_set_threads(r->pool, n, NULL));
        g_assert_cmpuint(bale_workers_threads(r->pool), ==, n);
    }
    return NULL;
}

static void *counted_context_new(void *opaque, unsigned worker, GError **errp)
{
    Context *context = g_new0(Context, 1);

    context->worker = worker;
    atomic_fetch_add((atomic_int *)opaque, 1);
    return context;
}

static void test_the_number_changes_while_work_runs(void)
{
    atomic_int made = 0;
    Resizer r = {
        .pool = bale_workers_new("resize", 1, counted_context_new, g_free,
                                 &made, NULL),
    };
    g_autofree Item *items = g_new0(Item, MANY);
    pthread_t thread;

    g_assert_cmpint(pthread_create(&thread, NULL, resizer_main, &r), ==, 0);
    for (int i = 0; i < MANY; i++) {
        items[i].work.fn = item_run;
        bale_workers_push(r.pool, &items[i].work, i & 1);
        if (i % 500 == 0) {
            bale_workers_drain(r.pool);
        }
    }
    r.stop = true;
    pthread_join(thread, NULL);
    bale_workers_free(r.pool);
    for (int i = 0; i < MANY; i++) {
        g_assert_cmpint(items[i].runs, ==, 1);
    }
    g_assert_cmpint(made, >=, 6);
}

/* Nobody waits for the worker that leaves, and what is queued is done. */
static void test_a_busy_worker_leaves_when_it_is_done(void)
{
    g_autoptr(BaleWorkers) pool =
        bale_workers_new("leave", 2, NULL, NULL, NULL, NULL);
    Gate gates[2];
    Item item = { .work.fn = item_run };

    gate_close(&gates[0], pool);
    gate_close(&gates[1], pool);
    g_assert_true(bale_workers_set_threads(pool, 1, NULL));
    g_assert_cmpuint(bale_workers_threads(pool), ==, 1);
    bale_workers_push(pool, &item.work, BALE_WORK_NORMAL);
    gates[0].open = gates[1].open = true;
    bale_workers_drain(pool);
    g_assert_cmpint(item.runs, ==, 1);
    g_assert_true(bale_workers_set_threads(pool, 2, NULL));
}

static void test_more_threads_that_cannot_be_leave_the_number(void)
{
    Contexts c = { .fail_at = 3 };
    BaleWorkers *pool =
        bale_workers_new("ctx", 2, context_new, context_free, &c, NULL);
    g_autoptr(GError) err = NULL;
    Item item = { .work.fn = item_run };

    g_assert_false(bale_workers_set_threads(pool, 5, &err));
    g_assert_error(err, G_FILE_ERROR, G_FILE_ERROR_NOMEM);
    g_assert_false(bale_workers_set_threads(pool, BALE_WORKERS_MAX + 1,
                                            NULL));
    g_assert_cmpuint(bale_workers_threads(pool), ==, 2);
    bale_workers_push(pool, &item.work, BALE_WORK_NORMAL);
    bale_workers_free(pool);
    g_assert_cmpint(item.runs, ==, 1);
    g_assert_cmpint(contexts_alive, ==, 0);
}

static void test_pools_come_and_go(void)
{
    for (int i = 0; i < 200; i++) {
        g_autoptr(BaleWorkers) pool =
            bale_workers_new("brief", 3, NULL, NULL, NULL, NULL);
        Item items[4] = { 0 };

        for (int j = 0; j < i % 5; j++) {
            items[j].work.fn = item_run;
            bale_workers_push(pool, &items[j].work, BALE_WORK_NORMAL);
        }
        bale_workers_drain(pool);
    }
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/workers/runs-each-item-once", test_runs_each_item_once);
    g_test_add_func("/workers/first-in-first-out-and-urgent-first",
                    test_first_in_first_out_and_urgent_first);
    g_test_add_func("/workers/busy-workers-are-not-woken",
                    test_busy_workers_are_not_woken);
    g_test_add_func("/workers/others-can-help", test_others_can_help);
    g_test_add_func("/workers/bulk-work-can-be-held-back",
                    test_bulk_work_can_be_held_back);
    g_test_add_func("/workers/drain-and-letting-go-end-a-hold",
                    test_drain_and_letting_go_end_a_hold);
    g_test_add_func("/workers/a-push-wakes-a-sleeper-while-another-is-busy",
                    test_a_push_wakes_a_sleeper_while_another_is_busy);
    g_test_add_func("/workers/drain-waits-for-what-functions-push",
                    test_drain_waits_for_what_functions_push);
    g_test_add_func("/workers/free-finishes-what-is-queued",
                    test_free_finishes_what_is_queued);
    g_test_add_func("/workers/a-function-may-free-its-item",
                    test_a_function_may_free_its_item);
    g_test_add_func("/workers/many-pushers-and-drainers",
                    test_many_pushers_and_drainers);
    g_test_add_func("/workers/each-worker-has-its-context",
                    test_each_worker_has_its_context);
    g_test_add_func("/workers/a-failing-constructor-leaves-nothing",
                    test_a_failing_constructor_leaves_nothing);
    g_test_add_func("/workers/too-many-threads-are-refused",
                    test_too_many_threads_are_refused);
    g_test_add_func("/workers/failing-thread-creation-leaves-nothing",
                    test_failing_thread_creation_leaves_nothing);
    g_test_add_func("/workers/workers-are-named-and-block-signals",
                    test_workers_are_named_and_block_signals);
    g_test_add_func("/workers/no-number-means-all-cores",
                    test_no_number_means_all_cores);
    g_test_add_func("/workers/the-number-changes-while-work-runs",
                    test_the_number_changes_while_work_runs);
    g_test_add_func("/workers/a-busy-worker-leaves-when-it-is-done",
                    test_a_busy_worker_leaves_when_it_is_done);
    g_test_add_func("/workers/more-threads-that-cannot-be-leave-the-number",
                    test_more_threads_that_cannot_be_leave_the_number);
    g_test_add_func("/workers/pools-come-and-go", test_pools_come_and_go);
    return g_test_run();
}
