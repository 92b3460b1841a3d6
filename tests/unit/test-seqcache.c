/*
 * Tests of the sequential cache: one behaviour each, then random operations
 * against a model that keeps every byte.
 *
 * BALE_SEED=<number> replays the random tests; BALE_OPS=<number> sets how many
 * operations they make.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "util/seqcache.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define CLUSTER 4096
#define DEFAULT_RANDOM_OPS 2000000

/* ---------------------------------------- allocations that fail on demand */

/* Allocations left until every one fails; negative: none fails. */
static int allocations_left = -1;

static bool allocation_fails(void)
{
    if (allocations_left < 0) {
        return false;
    }
    if (allocations_left == 0) {
        return true;
    }
    allocations_left--;
    return false;
}

/* These replace the library's own in this program. */
int posix_memalign(void **memptr, size_t alignment, size_t size)
{
    if (allocation_fails()) {
        return ENOMEM;
    }
    *memptr = aligned_alloc(alignment, (size + alignment - 1) & -alignment);
    return *memptr ? 0 : ENOMEM;
}

gpointer(g_try_malloc)(gsize n)
{
    return allocation_fails() ? NULL : malloc(n);
}

gpointer(g_try_malloc0)(gsize n)
{
    return allocation_fails() ? NULL : calloc(1, n);
}

gpointer(g_try_malloc_n)(gsize n, gsize size)
{
    return allocation_fails() ? NULL : calloc(n, size);
}

gpointer(g_try_malloc0_n)(gsize n, gsize size)
{
    return allocation_fails() ? NULL : calloc(n, size);
}

/* ----------------------------------------------------------- small things */

static BaleSeqcache *cache_new(unsigned clusters, unsigned streams)
{
    BaleSeqcacheOptions o = {
        .cluster_bytes = CLUSTER,
        .align_bytes = 4096,
        .max_bytes = (uint64_t)clusters * CLUSTER,
        .max_streams = streams,
    };
    GError *error = NULL;
    BaleSeqcache *sc = bale_seqcache_new(&o, &error);

    g_assert_no_error(error);
    return sc;
}

static void check(BaleSeqcache *sc)
{
    const char *wrong = bale_seqcache_check(sc);

    if (wrong) {
        g_error("invariant %s", wrong);
    }
}

static void put(BaleSeqcache *sc, uint64_t offset, size_t len, uint8_t byte)
{
    g_autofree uint8_t *buf = g_malloc(len);
    size_t accepted;

    memset(buf, byte, len);
    g_assert_cmpint(
        bale_seqcache_write_buf(sc, offset, buf, len, 0, &accepted), ==, 0);
    g_assert_cmpuint(accepted, ==, len);
    check(sc);
}

/* Exactly [@offset, @offset + @len) of the @ask bytes is cached, all @byte. */
static void expect(BaleSeqcache *sc, uint64_t offset, size_t ask, size_t len,
                   uint8_t byte)
{
    g_autofree uint8_t *buf = g_malloc(ask);
    size_t run;

    g_assert_true(bale_seqcache_read_buf(sc, offset, ask, buf, &run));
    g_assert_cmpuint(run, ==, len);
    for (size_t i = 0; i < len; i++) {
        g_assert_cmpint(buf[i], ==, byte);
    }
}

static void expect_gap(BaleSeqcache *sc, uint64_t offset, uint64_t ask,
                       uint64_t len)
{
    uint64_t run;

    g_assert_false(bale_seqcache_lookup(sc, offset, ask, &run));
    g_assert_cmpuint(run, ==, len);
}

/* The next finished cluster starts at @offset; with UINT64_MAX, there is
 * none. */
static BaleSeqcacheOut *next_finished(BaleSeqcache *sc, uint64_t offset)
{
    int err;
    BaleSeqcacheOut *out = bale_seqcache_begin_finished(sc, &err);

    g_assert_cmpint(err, ==, 0);
    check(sc);
    if (offset == UINT64_MAX) {
        g_assert_null(out);
    } else {
        g_assert_nonnull(out);
        g_assert_cmpuint(bale_seqcache_out_offset(out), ==, offset);
    }
    return out;
}

static void done(BaleSeqcache *sc, BaleSeqcacheOut *out, bool success)
{
    bale_seqcache_out_done(sc, out, success);
    check(sc);
}

static BaleSeqcacheStats stats_of(BaleSeqcache *sc)
{
    BaleSeqcacheStats st;

    bale_seqcache_get_stats(sc, &st);
    return st;
}

/* -------------------------------------------------------------- behaviours */

static void test_whole_cluster_is_finished_at_once(void)
{
    g_autoptr(BaleSeqcache) sc = cache_new(4, 2);
    size_t start = 0, len;
    BaleSeqcacheOut *out;

    put(sc, 3 * CLUSTER, CLUSTER, 7);
    g_assert_cmpuint(stats_of(sc).finished_clusters, ==, 1);
    out = next_finished(sc, 3 * CLUSTER);
    g_assert_true(bale_seqcache_out_range(out, &start, &len));
    g_assert_cmpuint(start, ==, 0);
    g_assert_cmpuint(len, ==, CLUSTER);
    start += len;
    g_assert_false(bale_seqcache_out_range(out, &start, &len));
    done(sc, out, true);
    expect_gap(sc, 0, 8 * CLUSTER, 8 * CLUSTER);
}

static void test_pieces_make_one_cluster(void)
{
    g_autoptr(BaleSeqcache) sc = cache_new(4, 2);

    for (size_t i = 0; i < CLUSTER; i += 100) {
        next_finished(sc, UINT64_MAX);
        put(sc, i, MIN(100, CLUSTER - i), 9);
    }
    done(sc, next_finished(sc, 0), true);
    g_assert_cmpuint(stats_of(sc).outs_whole, ==, 1);
    g_assert_cmpuint(stats_of(sc).merges, ==, CLUSTER / 100);
}

static void test_rewrite_is_legal(void)
{
    g_autoptr(BaleSeqcache) sc = cache_new(4, 2);

    put(sc, 100, 200, 1);
    put(sc, 100, 200, 2);
    expect(sc, 100, 1000, 200, 2);
    put(sc, 0, CLUSTER, 3);
    put(sc, 0, CLUSTER, 4);
    expect(sc, 0, CLUSTER, CLUSTER, 4);
    done(sc, next_finished(sc, 0), true);
    next_finished(sc, UINT64_MAX);
}

static void test_newest_bytes_are_read(void)
{
    g_autoptr(BaleSeqcache) sc = cache_new(4, 2);
    uint8_t buf[300];
    size_t run;

    put(sc, 100, 200, 1);
    put(sc, 250, 100, 3);
    put(sc, 50, 60, 4);
    g_assert_true(bale_seqcache_read_buf(sc, 50, sizeof(buf), buf, &run));
    g_assert_cmpuint(run, ==, 300);
    for (size_t i = 0; i < run; i++) {
        g_assert_cmpint(buf[i], ==, i < 60 ? 4 : i < 200 ? 1 : 3);
    }
}

static void test_gap_is_a_second_range(void)
{
    g_autoptr(BaleSeqcache) sc = cache_new(4, 2);
    size_t start = 0, len;
    BaleSeqcacheOut *out;
    int err;

    put(sc, 10, 20, 1);
    put(sc, 100, 30, 2);
    expect(sc, 10, 500, 20, 1);
    expect_gap(sc, 30, 500, 70);
    expect(sc, 100, 500, 30, 2);
    out = bale_seqcache_begin_at(sc, 0, &err);
    g_assert_nonnull(out);
    g_assert_cmpuint(bale_seqcache_out_bytes(out), ==, 50);
    g_assert_true(bale_seqcache_out_range(out, &start, &len));
    g_assert_cmpuint(start, ==, 10);
    g_assert_cmpuint(len, ==, 20);
    start += len;
    g_assert_true(bale_seqcache_out_range(out, &start, &len));
    g_assert_cmpuint(start, ==, 100);
    g_assert_cmpuint(len, ==, 30);
    start += len;
    g_assert_false(bale_seqcache_out_range(out, &start, &len));
    done(sc, out, true);
}

static void test_write_across_clusters(void)
{
    g_autoptr(BaleSeqcache) sc = cache_new(4, 2);

    put(sc, CLUSTER - 10, CLUSTER + 20, 5);
    expect(sc, CLUSTER - 10, 3 * CLUSTER, CLUSTER + 20, 5);
    done(sc, next_finished(sc, CLUSTER), true);
    next_finished(sc, UINT64_MAX);
    expect(sc, CLUSTER - 10, 3 * CLUSTER, 10, 5);
    expect_gap(sc, CLUSTER, 3 * CLUSTER, CLUSTER);
}

static void test_streams_stay_open_side_by_side(void)
{
    g_autoptr(BaleSeqcache) sc = cache_new(16, 8);

    for (size_t i = 0; i < CLUSTER; i += 512) {
        for (size_t s = 0; s < 8; s++) {
            put(sc, s * 10 * CLUSTER + i, 512, s);
        }
    }
    g_assert_cmpuint(stats_of(sc).displaced, ==, 0);
    for (size_t s = 0; s < 8; s++) {
        done(sc, next_finished(sc, s * 10 * CLUSTER), true);
    }
}

static void test_least_recent_stream_is_displaced(void)
{
    g_autoptr(BaleSeqcache) sc = cache_new(16, 2);

    put(sc, 0 * CLUSTER, 10, 1);
    put(sc, 1 * CLUSTER, 10, 1);
    put(sc, 0 * CLUSTER + 10, 10, 1);
    put(sc, 2 * CLUSTER, 10, 1);
    g_assert_cmpuint(stats_of(sc).displaced, ==, 1);
    done(sc, next_finished(sc, 1 * CLUSTER), true);
    next_finished(sc, UINT64_MAX);
}

static void test_displaced_cluster_opens_again(void)
{
    g_autoptr(BaleSeqcache) sc = cache_new(16, 1);

    put(sc, 0 * CLUSTER, 10, 1);
    put(sc, 1 * CLUSTER, 10, 1);
    put(sc, 0 * CLUSTER + 10, 10, 1);
    g_assert_cmpuint(stats_of(sc).open_clusters, ==, 1);
    done(sc, next_finished(sc, 1 * CLUSTER), true);
    next_finished(sc, UINT64_MAX);
    expect(sc, 0, CLUSTER, 20, 1);
}

static void test_finished_come_out_in_order(void)
{
    g_autoptr(BaleSeqcache) sc = cache_new(16, 8);
    const unsigned order[] = { 5, 1, 9, 0 };

    for (size_t i = 0; i < G_N_ELEMENTS(order); i++) {
        put(sc, (9 - order[i]) * CLUSTER, 10, 1);
    }
    for (size_t i = 0; i < G_N_ELEMENTS(order); i++) {
        put(sc, order[i] * CLUSTER, CLUSTER, 1);
    }
    for (size_t i = 0; i < G_N_ELEMENTS(order); i++) {
        done(sc, next_finished(sc, order[i] * CLUSTER), true);
    }
}

static void test_full_is_an_answer(void)
{
    g_autoptr(BaleSeqcache) sc = cache_new(2, 2);
    uint8_t buf[3 * CLUSTER];
    size_t accepted;

    memset(buf, 6, sizeof(buf));
    g_assert_cmpint(
        bale_seqcache_write_buf(sc, 100, buf, sizeof(buf), 0, &accepted), ==,
        -EAGAIN);
    g_assert_cmpuint(accepted, ==, 2 * CLUSTER - 100);
    check(sc);
    /* What is cached still takes writes. */
    put(sc, 0, 100, 6);
    g_assert_cmpint(
        bale_seqcache_write_buf(sc, 2 * CLUSTER, buf, 1, 0, &accepted), ==,
        -EAGAIN);
    g_assert_cmpuint(accepted, ==, 0);
    /* There is room as soon as a write-out has ended, not before. */
    BaleSeqcacheOut *out = next_finished(sc, CLUSTER);
    g_assert_cmpint(
        bale_seqcache_write_buf(sc, 2 * CLUSTER, buf, 1, 0, &accepted), ==,
        -EAGAIN);
    done(sc, out, true);
    put(sc, 2 * CLUSTER, 1, 6);
    g_assert_cmpuint(stats_of(sc).full, ==, 3);
}

static void test_bytes_written_during_write_out_survive(void)
{
    g_autoptr(BaleSeqcache) sc = cache_new(4, 2);
    BaleSeqcacheOut *out;
    int err;

    put(sc, 0, 1000, 1);
    out = bale_seqcache_begin_upto(sc, UINT64_MAX, &err);
    put(sc, 1000, 100, 2);
    put(sc, 500, 10, 3);
    expect(sc, 0, 500, 500, 1);
    expect(sc, 500, 10, 10, 3);
    expect(sc, 510, 490, 490, 1);
    expect(sc, 1000, CLUSTER, 100, 2);
    g_assert_cmpint(bale_seqcache_out_data(out)[505], ==, 1);
    /* One write-out of a cluster at a time. */
    g_assert_null(bale_seqcache_begin_at(sc, 0, &err));
    done(sc, out, true);
    expect_gap(sc, 0, CLUSTER, 500);
    expect(sc, 500, CLUSTER, 10, 3);
    expect(sc, 1000, CLUSTER, 100, 2);
}

static void test_failed_write_out_keeps_all_bytes(void)
{
    g_autoptr(BaleSeqcache) sc = cache_new(4, 2);
    BaleSeqcacheOut *out;
    int err;

    put(sc, 0, CLUSTER, 1);
    out = next_finished(sc, 0);
    put(sc, 500, 10, 3);
    done(sc, out, false);
    expect(sc, 0, 500, 500, 1);
    expect(sc, 500, 10, 10, 3);
    expect(sc, 510, CLUSTER - 510, CLUSTER - 510, 1);
    g_assert_cmpuint(stats_of(sc).failed_clusters, ==, 1);
    next_finished(sc, UINT64_MAX);
    g_assert_null(bale_seqcache_begin_upto(sc, UINT64_MAX, &err));
    bale_seqcache_retry(sc);
    out = next_finished(sc, 0);
    g_assert_cmpuint(bale_seqcache_out_bytes(out), ==, CLUSTER);
    g_assert_cmpint(bale_seqcache_out_data(out)[505], ==, 3);
    g_assert_cmpint(bale_seqcache_out_data(out)[510], ==, 1);
    done(sc, out, true);
}

static void test_discard_drops_bytes(void)
{
    g_autoptr(BaleSeqcache) sc = cache_new(8, 8);

    put(sc, 0, 3 * CLUSTER, 1);
    bale_seqcache_discard(sc, 100, 2 * CLUSTER);
    check(sc);
    expect(sc, 0, CLUSTER, 100, 1);
    expect_gap(sc, 100, 3 * CLUSTER, 2 * CLUSTER);
    expect(sc, 2 * CLUSTER + 100, CLUSTER, CLUSTER - 100, 1);
    bale_seqcache_discard_all(sc);
    check(sc);
    expect_gap(sc, 0, CLUSTER, CLUSTER);
    g_assert_cmpuint(stats_of(sc).memory_bytes, ==, 0);
}

static void test_discarded_bytes_in_write_out_do_not_come_back(void)
{
    g_autoptr(BaleSeqcache) sc = cache_new(8, 8);
    size_t start = 0, len;
    BaleSeqcacheOut *out;

    put(sc, 0, CLUSTER, 1);
    out = next_finished(sc, 0);
    bale_seqcache_discard(sc, 0, 100);
    check(sc);
    expect_gap(sc, 0, CLUSTER, 100);
    /* The owner of the write-out still has the whole of it. */
    g_assert_true(bale_seqcache_out_range(out, &start, &len));
    g_assert_cmpuint(len, ==, CLUSTER);
    done(sc, out, false);
    expect_gap(sc, 0, CLUSTER, 100);
    expect(sc, 100, CLUSTER, CLUSTER - 100, 1);

    bale_seqcache_retry(sc);
    out = next_finished(sc, 0);
    bale_seqcache_discard_all(sc);
    check(sc);
    done(sc, out, false);
    g_assert_cmpuint(stats_of(sc).memory_bytes, ==, 0);
}

static void test_held_clusters_are_not_offered(void)
{
    g_autoptr(BaleSeqcache) sc = cache_new(8, 8);
    int err;

    put(sc, 0, 2 * CLUSTER, 1);
    bale_seqcache_hold(sc, 10, 10);
    done(sc, next_finished(sc, CLUSTER), true);
    next_finished(sc, UINT64_MAX);
    g_assert_null(bale_seqcache_begin_upto(sc, UINT64_MAX, &err));
    g_assert_null(bale_seqcache_begin_at(sc, 0, &err));
    bale_seqcache_release(sc, 10, 10);
    done(sc, next_finished(sc, 0), true);
}

static void test_finished_can_be_listed(void)
{
    g_autoptr(BaleSeqcache) sc = cache_new(8, 1);
    uint64_t offset, offsets[4];
    size_t bytes;

    g_assert_false(bale_seqcache_peek_finished(sc, &offset, &bytes));
    g_assert_cmpuint(bale_seqcache_list_finished(sc, offsets, 4), ==, 0);
    put(sc, 3 * CLUSTER, 10, 1);
    put(sc, 0, CLUSTER, 1);
    put(sc, 1 * CLUSTER, 20, 1);
    put(sc, 2 * CLUSTER, 10, 1);
    /* The last one is open. */
    g_assert_true(bale_seqcache_peek_finished(sc, &offset, &bytes));
    g_assert_cmpuint(bale_seqcache_list_finished(sc, offsets, 4), ==, 3);
    g_assert_cmpuint(offset, ==, offsets[0]);
    g_assert_cmpuint(bytes, ==, offset ? 10 : CLUSTER);
    bale_seqcache_hold(sc, offset, 1);
    g_assert_true(bale_seqcache_peek_finished(sc, &offset, &bytes));
    g_assert_cmpuint(offset, ==, offsets[1]);
    g_assert_cmpuint(bale_seqcache_list_finished(sc, offsets, 1), ==, 1);
    g_assert_cmpuint(offset, ==, offsets[0]);
    done(sc, next_finished(sc, offset), true);
}

static void test_complete_neighbours_can_be_had(void)
{
    g_autoptr(BaleSeqcache) sc = cache_new(8, 1);
    BaleSeqcacheOut *out;
    int err;

    put(sc, 0, 2 * CLUSTER, 1);
    put(sc, 2 * CLUSTER, 10, 1);
    put(sc, 3 * CLUSTER, 10, 1);
    g_assert_cmpuint(bale_seqcache_finished_clusters(sc), ==, 3);
    out = bale_seqcache_begin_complete_at(sc, CLUSTER, &err);
    g_assert_nonnull(out);
    g_assert_cmpuint(bale_seqcache_finished_clusters(sc), ==, 2);
    /* In write-out, incomplete, open, not there. */
    for (unsigned i = 1; i < 5; i++) {
        g_assert_null(bale_seqcache_begin_complete_at(sc, i * CLUSTER, &err));
        g_assert_cmpint(err, ==, 0);
    }
    done(sc, out, true);
}

static void test_flush_covers_what_came_before(void)
{
    g_autoptr(BaleSeqcache) sc = cache_new(8, 8);
    BaleSeqcacheOut *out, *second;
    uint64_t seq;
    int err;

    g_assert_cmpuint(bale_seqcache_oldest_seq(sc), ==, UINT64_MAX);
    put(sc, 3 * CLUSTER, 10, 1);
    put(sc, 1 * CLUSTER, CLUSTER, 1);
    put(sc, 3 * CLUSTER + 10, 10, 1);
    seq = bale_seqcache_seq(sc);
    put(sc, 0, CLUSTER, 1);

    out = bale_seqcache_begin_upto(sc, seq, &err);
    g_assert_cmpuint(bale_seqcache_out_offset(out), ==, 3 * CLUSTER);
    second = bale_seqcache_begin_upto(sc, seq, &err);
    g_assert_cmpuint(bale_seqcache_out_offset(second), ==, CLUSTER);
    g_assert_null(bale_seqcache_begin_upto(sc, seq, &err));
    done(sc, second, true);
    g_assert_cmpuint(bale_seqcache_oldest_seq(sc), <=, seq);
    done(sc, out, true);
    g_assert_cmpuint(bale_seqcache_oldest_seq(sc), >, seq);
}

static void test_age(void)
{
    g_autoptr(BaleSeqcache) sc = cache_new(8, 8);
    BaleSeqcacheOut *out;
    size_t accepted;
    int err;

    g_assert_cmpint(bale_seqcache_oldest_time(sc), ==, INT64_MAX);
    bale_seqcache_write_buf(sc, 0, "a", 1, 100, &accepted);
    bale_seqcache_write_buf(sc, CLUSTER, "a", 1, 200, &accepted);
    /* A clock that goes backwards stands still. */
    bale_seqcache_write_buf(sc, 2 * CLUSTER, "a", 1, 50, &accepted);
    check(sc);
    g_assert_cmpint(bale_seqcache_oldest_time(sc), ==, 100);
    g_assert_null(bale_seqcache_begin_older(sc, 99, &err));
    out = bale_seqcache_begin_older(sc, 100, &err);
    g_assert_cmpuint(bale_seqcache_out_offset(out), ==, 0);
    g_assert_null(bale_seqcache_begin_older(sc, 199, &err));
    done(sc, out, true);
    g_assert_cmpint(bale_seqcache_oldest_time(sc), ==, 200);
}

static void test_vectors_with_skip_and_empty_elements(void)
{
    g_autoptr(BaleSeqcache) sc = cache_new(8, 8);
    uint8_t a[10], b[20], ra[7], rb[30];
    struct iovec in[] = { { a, 10 }, { NULL, 0 }, { b, 20 }, { NULL, 0 } };
    struct iovec res[] = { { NULL, 0 }, { ra, 7 }, { rb, 30 } };
    size_t accepted, run;

    memset(a, 1, sizeof(a));
    memset(b, 2, sizeof(b));
    g_assert_cmpint(bale_seqcache_write(sc, CLUSTER - 5, in, 4, 4, 26, 0,
                                        &accepted), ==, 0);
    check(sc);
    g_assert_true(
        bale_seqcache_read(sc, CLUSTER - 5, 30, res, 3, 2, &run));
    g_assert_cmpuint(run, ==, 26);
    for (size_t i = 0; i < 26; i++) {
        g_assert_cmpint(i < 5 ? ra[i + 2] : rb[i - 5], ==, i < 6 ? 1 : 2);
    }
}

static void test_lookup_of_a_huge_range(void)
{
    g_autoptr(BaleSeqcache) sc = cache_new(8, 8);
    uint64_t far = (uint64_t)1 << 50;

    expect_gap(sc, 0, UINT64_MAX, UINT64_MAX);
    put(sc, far + 3, 10, 1);
    put(sc, far + 100 * CLUSTER, 10, 1);
    expect_gap(sc, 5, UINT64_MAX, far + 3 - 5);
    expect_gap(sc, far + 13, far, 100 * CLUSTER - 13);
}

static void test_end_of_what_is_cached(void)
{
    g_autoptr(BaleSeqcache) sc = cache_new(8, 8);
    BaleSeqcacheOut *out;
    int err;

    g_assert_cmpuint(bale_seqcache_end(sc), ==, 0);
    put(sc, 5 * CLUSTER + 7, 13, 1);
    put(sc, 2 * CLUSTER, CLUSTER, 1);
    g_assert_cmpuint(bale_seqcache_end(sc), ==, 5 * CLUSTER + 20);
    out = bale_seqcache_begin_at(sc, 5 * CLUSTER, &err);
    put(sc, 5 * CLUSTER, 1, 1);
    g_assert_cmpuint(bale_seqcache_end(sc), ==, 5 * CLUSTER + 20);
    bale_seqcache_discard(sc, 5 * CLUSTER, CLUSTER);
    g_assert_cmpuint(bale_seqcache_end(sc), ==, 3 * CLUSTER);
    done(sc, out, true);
    g_assert_cmpuint(bale_seqcache_end(sc), ==, 3 * CLUSTER);
}

static void test_buffers_are_aligned(void)
{
    for (size_t align = 1; align <= BALE_SEQCACHE_MAX_ALIGN_BYTES; align *= 4) {
        BaleSeqcacheOptions o = { 512, align, 1 << 20, 4 };
        g_autoptr(BaleSeqcache) sc = bale_seqcache_new(&o, NULL);
        uint8_t buf[512] = { 0 };
        size_t accepted;
        int err;

        g_assert_nonnull(sc);
        bale_seqcache_write_buf(sc, 0, buf, 512, 0, &accepted);
        BaleSeqcacheOut *out = bale_seqcache_begin_finished(sc, &err);
        g_assert_cmpuint((uintptr_t)bale_seqcache_out_data(out) % align, ==, 0);
        done(sc, out, true);
    }
}

static void test_bad_options_are_refused(void)
{
    const BaleSeqcacheOptions bad[] = {
        { 0, 1, 1 << 20, 1 },
        { 256, 1, 1 << 20, 1 },
        { 3000, 1, 1 << 20, 1 },
        { 8 << 20, 1, 1 << 20, 1 },
        { 4096, 0, 1 << 20, 1 },
        { 4096, 3, 1 << 20, 1 },
        { 4096, 2 << 20, 1 << 20, 1 },
        { 4096, 1, BALE_SEQCACHE_MAX_BYTES + 1, 1 },
        { 4096, 1, 1 << 20, 0 },
        { 4096, 1, 1 << 20, BALE_SEQCACHE_MAX_STREAMS + 1 },
    };

    for (size_t i = 0; i < G_N_ELEMENTS(bad); i++) {
        g_autoptr(GError) error = NULL;

        g_assert_null(bale_seqcache_new(&bad[i], &error));
        g_assert_nonnull(error);
    }
}

static void test_offsets_beyond_the_end_are_refused(void)
{
    g_autoptr(BaleSeqcache) sc = cache_new(8, 8);
    size_t accepted;

    g_assert_cmpint(bale_seqcache_write_buf(sc, BALE_SEQCACHE_MAX_OFFSET, "a",
                                            1, 0, &accepted), ==, -EINVAL);
    g_assert_cmpint(bale_seqcache_write_buf(sc, UINT64_MAX, "a", 1, 0,
                                            &accepted), ==, -EINVAL);
    put(sc, BALE_SEQCACHE_MAX_OFFSET - 1, 1, 1);
    expect(sc, BALE_SEQCACHE_MAX_OFFSET - 1, 1, 1, 1);
    bale_seqcache_discard_all(sc);
    g_assert_cmpuint(stats_of(sc).memory_bytes, ==, 0);
}

static void test_limits_can_change(void)
{
    g_autoptr(BaleSeqcache) sc = cache_new(8, 8);
    size_t accepted;

    for (unsigned i = 0; i < 8; i++) {
        put(sc, i * CLUSTER, 10, i);
    }
    bale_seqcache_set_limits(sc, 4 * CLUSTER, 2);
    check(sc);
    g_assert_cmpuint(stats_of(sc).finished_clusters, ==, 6);
    for (unsigned i = 0; i < 4; i++) {
        done(sc, next_finished(sc, i * CLUSTER), true);
        g_assert_cmpint(bale_seqcache_write_buf(sc, 99 * CLUSTER, "a", 1, 0,
                                                &accepted), ==, -EAGAIN);
    }
    done(sc, next_finished(sc, 4 * CLUSTER), true);
    put(sc, 99 * CLUSTER, 1, 1);
}

static void test_short_memory_changes_nothing(void)
{
    g_autoptr(BaleSeqcache) sc = cache_new(64, 64);
    unsigned writes = 0;
    size_t accepted;
    int err;

    put(sc, 0, 10, 1);
    put(sc, 20, 10, 1);
    for (int n = 0; n < 40; n++) {
        int ret;

        allocations_left = n % 4;
        ret = bale_seqcache_write_buf(sc, (1 + writes) * CLUSTER, "a", 1, 0,
                                      &accepted);
        allocations_left = -1;
        check(sc);
        g_assert_cmpint(ret, ==, accepted ? 0 : -ENOMEM);
        writes += accepted;
    }
    g_assert_cmpuint(writes, >, 0);
    g_assert_cmpuint(stats_of(sc).no_memory, >, 0);

    allocations_left = 0;
    g_assert_null(bale_seqcache_begin_at(sc, 0, &err));
    g_assert_cmpint(err, ==, -ENOMEM);
    allocations_left = -1;
    check(sc);
    expect(sc, 0, 20, 10, 1);
    done(sc, bale_seqcache_begin_at(sc, 0, &err), true);
}

/* -------------------------------------------------------------- the model */

/*
 * Below the cache lies an array of bytes.  For each byte the model knows what
 * it reads as, whether it is cached above and whether it is in write-out, and
 * the number of its newest write.
 */
#define MODEL_BYTES (1 << 16)
#define MODEL_MAX_OUTS 8

typedef struct ModelOut {
    BaleSeqcacheOut *out;
    uint8_t *had; /* cluster_bytes: which bytes it has */
    uint8_t *data;
} ModelOut;

typedef struct Model {
    GRand *rand;
    BaleSeqcache *sc;
    size_t cluster;
    uint8_t newest[MODEL_BYTES];
    uint8_t below[MODEL_BYTES];
    bool cur[MODEL_BYTES];
    bool out[MODEL_BYTES];
    uint64_t seq[MODEL_BYTES];
    uint64_t accepted_writes;
    ModelOut outs[MODEL_MAX_OUTS];
    unsigned n_outs;
    int64_t now;
    size_t last_end; /* of the last range */
} Model;

static bool model_cached(const Model *m, size_t i)
{
    return m->cur[i] || m->out[i];
}

/* Mostly small, sometimes several clusters; often where the last one ended. */
static void model_range(Model *m, size_t *offset, size_t *len)
{
    size_t max = g_rand_boolean(m->rand) ? m->cluster / 4
                                         : m->cluster * 5 / 2;

    *offset = g_rand_int_range(m->rand, 0, 3)
                  ? (size_t)g_rand_int_range(m->rand, 0, MODEL_BYTES)
                  : m->last_end;
    if (g_rand_int_range(m->rand, 0, 8) == 0) {
        *offset &= ~(m->cluster - 1);
        *len = m->cluster * g_rand_int_range(m->rand, 1, 3);
    } else {
        *len = g_rand_int_range(m->rand, 1, MAX(max, 2));
    }
    *offset = MIN(*offset, (size_t)MODEL_BYTES - 1);
    *len = MIN(*len, MODEL_BYTES - *offset);
    m->last_end = *offset + *len;
}

static void model_write(Model *m)
{
    g_autofree uint8_t *buf = NULL;
    size_t offset, len, accepted, cut;
    struct iovec iov[3];
    int ret;

    model_range(m, &offset, &len);
    buf = g_malloc(len + 8);
    for (size_t i = 0; i < len + 8; i++) {
        buf[i] = g_rand_int(m->rand);
    }
    /* From the 8th byte of three uneven elements. */
    cut = g_rand_int_range(m->rand, 0, len + 9);
    iov[0] = (struct iovec){ buf, cut };
    iov[1] = (struct iovec){ buf + cut, (len + 8 - cut) / 2 };
    iov[2] = (struct iovec){ buf + cut + iov[1].iov_len,
                             len + 8 - cut - iov[1].iov_len };
    m->now += g_rand_int_range(m->rand, -1, 3);
    ret = bale_seqcache_write(m->sc, offset, iov, 3, 8, len, m->now, &accepted);
    g_assert_true(ret == 0 ? accepted == len
                           : ret == -EAGAIN && accepted < len);
    m->accepted_writes += accepted > 0;
    g_assert_cmpuint(bale_seqcache_seq(m->sc), ==, m->accepted_writes);
    for (size_t i = 0; i < accepted; i++) {
        m->newest[offset + i] = buf[8 + i];
        m->cur[offset + i] = true;
        m->seq[offset + i] = m->accepted_writes;
    }
}

static void model_read(Model *m)
{
    g_autofree uint8_t *buf = NULL;
    size_t offset, len, run, i;
    bool cached;

    model_range(m, &offset, &len);
    buf = g_malloc(len);
    cached = bale_seqcache_read_buf(m->sc, offset, len, buf, &run);
    g_assert_cmpuint(run, >, 0);
    for (i = 0; i < len && model_cached(m, offset + i) == cached; i++) {
        g_assert_true(!cached || buf[i] == m->newest[offset + i]);
        g_assert_true(cached ||
                      m->newest[offset + i] == m->below[offset + i]);
    }
    g_assert_cmpuint(run, ==, i);
}

static void model_begin(Model *m)
{
    ModelOut *mo = &m->outs[m->n_outs];
    uint64_t seq = UINT64_MAX;
    size_t start = 0, len, total = 0;
    int err;

    if (m->n_outs == MODEL_MAX_OUTS) {
        return;
    }
    switch (g_rand_int_range(m->rand, 0, 5)) {
    case 0:
        seq = m->accepted_writes - MIN(m->accepted_writes, 10);
        mo->out = bale_seqcache_begin_upto(m->sc, seq, &err);
        break;
    case 1:
        mo->out = bale_seqcache_begin_older(m->sc, m->now - 20, &err);
        break;
    case 2:
        mo->out = bale_seqcache_begin_at(
            m->sc, g_rand_int_range(m->rand, 0, MODEL_BYTES), &err);
        break;
    default:
        mo->out = bale_seqcache_begin_finished(m->sc, &err);
        break;
    }
    g_assert_cmpint(err, ==, 0);
    if (!mo->out) {
        return;
    }
    size_t offset = bale_seqcache_out_offset(mo->out);

    mo->had = g_malloc0(m->cluster);
    while (bale_seqcache_out_range(mo->out, &start, &len)) {
        memset(mo->had + start, 1, len);
        total += len;
        start += len;
    }
    g_assert_cmpuint(total, ==, bale_seqcache_out_bytes(mo->out));
    for (size_t i = 0; i < m->cluster; i++) {
        g_assert_false(m->out[offset + i]);
        g_assert_cmpint(mo->had[i], ==, m->cur[offset + i]);
        g_assert_true(!mo->had[i] || bale_seqcache_out_data(mo->out)[i] ==
                                         m->newest[offset + i]);
        m->out[offset + i] = m->cur[offset + i];
        m->cur[offset + i] = false;
    }
    mo->data = g_memdup2(bale_seqcache_out_data(mo->out), m->cluster);
    /* The gaps belong to the owner. */
    for (size_t i = 0; i < m->cluster; i++) {
        if (!mo->had[i]) {
            bale_seqcache_out_data(mo->out)[i] = 0xee;
        }
    }
    m->n_outs++;
}

static void model_done(Model *m, bool success)
{
    unsigned k;
    ModelOut mo;
    size_t offset;

    if (m->n_outs == 0) {
        return;
    }
    k = g_rand_int_range(m->rand, 0, m->n_outs);
    mo = m->outs[k];
    m->outs[k] = m->outs[--m->n_outs];
    offset = bale_seqcache_out_offset(mo.out);
    for (size_t i = 0; i < m->cluster; i++) {
        if (!mo.had[i]) {
            continue;
        }
        /* It was a snapshot all the time. */
        g_assert_cmpint(bale_seqcache_out_data(mo.out)[i], ==, mo.data[i]);
        /* A failing write-out may have written any part. */
        if (success || g_rand_int_range(m->rand, 0, 2)) {
            m->below[offset + i] = mo.data[i];
        }
    }
    bale_seqcache_out_done(m->sc, mo.out, success);
    for (size_t i = 0; i < m->cluster; i++) {
        if (m->out[offset + i] && !success) {
            m->cur[offset + i] = true;
        }
        m->out[offset + i] = false;
        /* What was discarded reads as whatever is below. */
        if (!model_cached(m, offset + i)) {
            m->newest[offset + i] = m->below[offset + i];
        }
    }
    g_free(mo.had);
    g_free(mo.data);
}

static void model_discard(Model *m)
{
    size_t offset, len;

    model_range(m, &offset, &len);
    bale_seqcache_discard(m->sc, offset, len);
    for (size_t i = offset; i < offset + len; i++) {
        m->cur[i] = m->out[i] = false;
        m->newest[i] = m->below[i];
    }
}

/* Write out what came before now; later writes may come between. */
static void model_flush(Model *m)
{
    uint64_t seq = bale_seqcache_seq(m->sc);

    bale_seqcache_retry(m->sc);
    while (bale_seqcache_oldest_seq(m->sc) <= seq) {
        if (g_rand_boolean(m->rand)) {
            model_begin(m);
        }
        model_done(m, true);
        if (g_rand_int_range(m->rand, 0, 16) == 0) {
            model_write(m);
        }
    }
    for (size_t i = 0; i < MODEL_BYTES; i++) {
        g_assert_true(!model_cached(m, i) || m->seq[i] > seq);
    }
}

static void model_run(guint32 seed, unsigned ops)
{
    g_autoptr(GRand) rand = g_rand_new_with_seed(seed);
    g_autofree Model *m = g_new0(Model, 1);
    BaleSeqcacheOptions o = {
        .cluster_bytes = (size_t)512 << g_rand_int_range(rand, 0, 4),
        .align_bytes = (size_t)1 << g_rand_int_range(rand, 0, 13),
        .max_streams = g_rand_int_range(rand, 1, 12),
    };

    o.max_bytes = o.cluster_bytes * g_rand_int_range(rand, 2, 24);
    m->rand = rand;
    m->cluster = o.cluster_bytes;
    m->sc = bale_seqcache_new(&o, NULL);
    for (unsigned i = 0; i < ops; i++) {
        int what = g_rand_int_range(rand, 0, 1000);

        if (what < 400) {
            model_write(m);
        } else if (what < 650) {
            model_read(m);
        } else if (what < 800) {
            model_begin(m);
        } else if (what < 930) {
            model_done(m, true);
        } else if (what < 955) {
            model_done(m, false);
        } else if (what < 980) {
            bale_seqcache_retry(m->sc);
        } else if (what < 996) {
            model_discard(m);
        } else if (what < 999) {
            model_flush(m);
        } else {
            bale_seqcache_set_limits(
                m->sc, o.cluster_bytes * g_rand_int_range(rand, 2, 24),
                g_rand_int_range(rand, 1, 12));
        }
        if (i % 32 == 0) {
            check(m->sc);
        }
    }
    while (m->n_outs > 0) {
        model_done(m, true);
    }
    check(m->sc);
    bale_seqcache_free(m->sc);
}

static void test_random_operations_equal_the_model(void)
{
    const char *seed_env = g_getenv("BALE_SEED");
    const char *ops_env = g_getenv("BALE_OPS");
    guint32 seed = seed_env ? strtoul(seed_env, NULL, 0) : g_random_int();
    unsigned ops = ops_env ? strtoul(ops_env, NULL, 0) : DEFAULT_RANDOM_OPS;

    g_test_message("BALE_SEED=%u", seed);
    g_printerr("# BALE_SEED=%u\n", seed);
    for (unsigned n = 0; n < ops; n += 10000) {
        model_run(seed + n / 10000, 10000);
    }
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
#define ADD(name) g_test_add_func("/seqcache/" #name, test_##name)
    ADD(whole_cluster_is_finished_at_once);
    ADD(pieces_make_one_cluster);
    ADD(rewrite_is_legal);
    ADD(newest_bytes_are_read);
    ADD(gap_is_a_second_range);
    ADD(write_across_clusters);
    ADD(streams_stay_open_side_by_side);
    ADD(least_recent_stream_is_displaced);
    ADD(displaced_cluster_opens_again);
    ADD(finished_come_out_in_order);
    ADD(full_is_an_answer);
    ADD(bytes_written_during_write_out_survive);
    ADD(failed_write_out_keeps_all_bytes);
    ADD(discard_drops_bytes);
    ADD(discarded_bytes_in_write_out_do_not_come_back);
    ADD(held_clusters_are_not_offered);
    ADD(finished_can_be_listed);
    ADD(complete_neighbours_can_be_had);
    ADD(flush_covers_what_came_before);
    ADD(age);
    ADD(vectors_with_skip_and_empty_elements);
    ADD(lookup_of_a_huge_range);
    ADD(end_of_what_is_cached);
    ADD(buffers_are_aligned);
    ADD(bad_options_are_refused);
    ADD(offsets_beyond_the_end_are_refused);
    ADD(limits_can_change);
    ADD(short_memory_changes_nothing);
    ADD(random_operations_equal_the_model);
#undef ADD
    return g_test_run();
}
