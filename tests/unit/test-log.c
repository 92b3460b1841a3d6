/*
 * Appending from several threads at once, without a store's requests around it:
 * each record has a place of its own, sequence numbers grow with the places and
 * are given out once, and the pages count what they hold.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <string.h>

#include "../../block/extstore/log-internal.h"
#include "stores.h"
#include "util/memory.h"

#define THREADS 4u
#define RECORDS 8000u /* of each thread */
#define PAYLOAD_MAX 2000u
#define CLUSTER 65536u

typedef struct Appended {
    uint64_t address;
    uint64_t seq;
    uint32_t size;
    BaleBucket bucket;
} Appended;

typedef struct Fixture {
    BaleDevice *dev;
    BaleStore *store;
    BaleImage *image;
    Appended done[THREADS + 1][RECORDS];
    unsigned running; /* atomic */
} Fixture;

typedef struct Appender {
    Fixture *f;
    unsigned number;
} Appender;

static uint64_t live_of(const Appended *a)
{
    return a->size;
}

static void append(Fixture *f, unsigned thread, unsigned n, BaleBucket bucket)
{
    uint8_t payload[PAYLOAD_MAX];
    uint64_t x = (n * 2654435761u + thread) * 0x9e3779b97f4a7c15ull;
    Appended *a = &f->done[thread][n];
    BaleRecord r = {
        .type = BALE_RECORD_DATA,
        .codec = BALE_CODEC_ZSTD,
        .layer = 1,
        .cluster = thread * RECORDS + n,
        .count = 1,
        .payload_len = 1 + (x >> 40) % PAYLOAD_MAX,
    };

    memset(payload, thread * 16 + n % 16, sizeof(payload));
    a->bucket = bucket;
    r.header_len = BALE_RECORD_HEADER_LEN;
    a->size = bale_record_size(&r);
    g_assert_cmpint(bale_store_write_begin(f->store), ==, 0);
    g_assert_cmpint(bale_log_append(f->store, bucket, &r, payload, live_of(a),
                                    &a->address),
                    ==, 0);
    bale_store_write_end(f->store);
    a->seq = r.seq;
}

static void *append_thread(void *opaque)
{
    Appender *a = opaque;

    for (unsigned n = 0; n < RECORDS; n++) {
        append(a->f, a->number, n, BALE_BUCKET_FRESH);
    }
    __atomic_sub_fetch(&a->f->running, 1, __ATOMIC_SEQ_CST);
    return NULL;
}

static int by_address(const void *a, const void *b)
{
    const Appended *x = a, *y = b;

    return x->address < y->address ? -1 : x->address > y->address;
}

static int by_seq(const void *a, const void *b)
{
    const Appended *x = a, *y = b;

    return x->seq < y->seq ? -1 : x->seq > y->seq;
}

static uint64_t live_bytes(BaleStore *s)
{
    uint64_t sum = 0;

    pthread_mutex_lock(&s->log_lock);
    bale_log_fold(s);
    for (uint64_t i = 0; i < s->pages->len; i++) {
        BalePage *p = bale_page(s, i);

        sum += p->bucket == BALE_BUCKET_META ? 0 : p->live_bytes;
    }
    pthread_mutex_unlock(&s->log_lock);
    return sum;
}

/* The record is on the device, where it was said to be. */
static void check_record(Fixture *f, const Appended *a)
{
    BaleStore *s = f->store;
    uint64_t begin = bale_align_down(a->address, BALE_BLOCK_SIZE);
    uint64_t end = bale_align_up(a->address + a->size, BALE_BLOCK_SIZE);
    BALE_AUTO_MEMORY uint8_t *buf = bale_memory_try_alloc(BALE_BLOCK_SIZE,
                                                          end - begin);
    uint64_t page, offset;
    BaleRecord r;

    g_assert_cmpint(bale_device_get_sync(f->dev, begin, buf, end - begin), ==,
                    0);
    g_assert_true(bale_address_split(s, a->address, &page, &offset));
    g_assert_cmpint(bale_record_decode(
                        &r, bale_place(s->identity, page,
                                       bale_page(s, page)->version, offset),
                        CLUSTER, buf + (a->address - begin), a->size),
                    ==, 0);
    g_assert_cmpuint(r.seq, ==, a->seq);
    g_assert_cmpuint(bale_record_size(&r), ==, a->size);
}

static Fixture *fixture_new(void)
{
    BaleSimOptions sim = { .no_history = true };
    BaleCreateOptions create = { .size = 1u << 30, .page_size = 2u << 20,
                                 .cluster_size = CLUSTER,
                                 .codec = BALE_CODEC_ZSTD };
    BaleOpenOptions open = { .workers = 1 };
    Fixture *f = g_new0(Fixture, 1);

    f->dev = test_store_new(&sim, &create);
    f->store = test_store_open(f->dev, &open, NULL, &f->image);
    bale_maintain_pause(f->store);
    return f;
}

/* No index points to them: they go as they came. */
static void fixture_free_records(Fixture *f, const Appended *done, unsigned n)
{
    pthread_mutex_lock(&f->store->log_lock);
    for (unsigned i = 0; i < n; i++) {
        bale_page_live_sub(f->store, done[i].address, live_of(&done[i]));
    }
    pthread_mutex_unlock(&f->store->log_lock);
}

static void fixture_close(Fixture *f)
{
    bale_maintain_resume(f->store);
    test_store_close(f->store, f->image);
}

static void test_parallel(void)
{
    g_autofree Fixture *f = fixture_new();
    g_autofree Appended *all = NULL;
    Appender appenders[THREADS];
    GThread *threads[THREADS];
    unsigned others = 0, n = 0;
    uint64_t live = 0, before;

    before = live_bytes(f->store);
    f->running = THREADS;
    for (unsigned i = 0; i < THREADS; i++) {
        appenders[i] = (Appender){ f, i };
        threads[i] = g_thread_new("append", append_thread, &appenders[i]);
    }
    /* Meanwhile segments end, and another bucket takes numbers, too. */
    while (__atomic_load_n(&f->running, __ATOMIC_SEQ_CST) > 0) {
        if (others < RECORDS) {
            append(f, THREADS, others++, BALE_BUCKET_COMPACTED);
        }
        if (others % 3 == 0) {
            g_assert_cmpint(bale_log_flush_sync(f->store), ==, 0);
        }
    }
    for (unsigned i = 0; i < THREADS; i++) {
        g_thread_join(threads[i]);
    }
    g_assert_cmpint(bale_log_flush_sync(f->store), ==, 0);

    all = g_new(Appended, (THREADS + 1) * RECORDS);
    for (unsigned i = 0; i <= THREADS; i++) {
        for (unsigned j = 0; j < (i < THREADS ? RECORDS : others); j++) {
            all[n] = f->done[i][j];
            live += live_of(&all[n]);
            check_record(f, &all[n]);
            n++;
        }
    }
    g_assert_cmpuint(live_bytes(f->store) - before, ==, live);
    qsort(all, n, sizeof(*all), by_address);
    for (unsigned i = 1; i < n; i++) {
        Appended *a = &all[i - 1], *b = &all[i];
        uint64_t page_a, page_b, offset;

        g_assert_cmpuint(a->address + a->size, <=, b->address);
        bale_address_split(f->store, a->address, &page_a, &offset);
        bale_address_split(f->store, b->address, &page_b, &offset);
        if (page_a == page_b) {
            g_assert_cmpuint(a->seq, <, b->seq);
        }
    }
    qsort(all, n, sizeof(*all), by_seq);
    for (unsigned i = 1; i < n; i++) {
        g_assert_cmpuint(all[i - 1].seq, <, all[i].seq);
    }
    pthread_mutex_lock(&f->store->log_lock);
    g_assert_cmpuint(bale_log_next_seq(f->store), >, all[n - 1].seq);
    pthread_mutex_unlock(&f->store->log_lock);
    fixture_free_records(f, all, n);
    g_assert_cmpuint(live_bytes(f->store), ==, before);
    fixture_close(f);
}

/* Whoever appends, wherever, has a higher number than who did before. */
static void test_numbers(void)
{
    static const BaleBucket buckets[] = {
        BALE_BUCKET_FRESH, BALE_BUCKET_COMPACTED, BALE_BUCKET_FRESH,
        BALE_BUCKET_FRESH, BALE_BUCKET_COMPACTED, BALE_BUCKET_COMPACTED,
    };
    g_autofree Fixture *f = fixture_new();
    uint64_t last = 0;

    for (unsigned n = 0; n < 1000; n++) {
        append(f, 0, n, buckets[n % G_N_ELEMENTS(buckets)]);
        g_assert_cmpuint(f->done[0][n].seq, >, last);
        last = f->done[0][n].seq;
        if (n % 50 == 49) {
            g_assert_cmpint(bale_log_flush_sync(f->store), ==, 0);
        }
    }
    fixture_free_records(f, f->done[0], 1000);
    fixture_close(f);
}

/* What a word can say, and when there is no room. */
static void test_room(void)
{
    BaleRoom r = { .buffer = BALE_ROOM_BUFFERS_MAX - 1, .bytes = 8176 }, got;
    uint64_t word = 0;

    g_assert_false(bale_room_take(&word, 1, 64, 1, &got));
    word = bale_room_encode(r);
    for (unsigned i = 0; bale_room_take(&word, 1, 64, i % 2, &got); i++) {
        g_assert_cmpuint(got.buffer, ==, r.buffer);
        g_assert_cmpuint(got.bytes, ==, r.bytes - i * 64);
        g_assert_cmpuint(got.records, ==, i);
        g_assert_cmpuint(got.numbers, ==, i / 2);
    }
    /* 78 of 64 bytes, 78 entries of 40 and a header of 64: 8176. */
    g_assert_cmpuint(bale_room_decode(word).records, ==, 78);
    g_assert_true(bale_room_take(&word, 0, 0, 1, &got));

    r = (BaleRoom){ .bytes = 4096, .numbers = BALE_ROOM_NUMBERS_MAX - 1 };
    word = bale_room_encode(r);
    g_assert_true(bale_room_take(&word, 1, 64, 1, &got));
    g_assert_false(bale_room_take(&word, 1, 64, 1, &got));
    g_assert_false(bale_room_take(&word, 0, 0, 1, &got));
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/log/room", test_room);
    g_test_add_func("/log/numbers", test_numbers);
    g_test_add_func("/log/parallel", test_parallel);
    return g_test_run();
}
