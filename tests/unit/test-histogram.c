/*
 * The histogram: buckets, estimates, many threads.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <glib.h>
#include <pthread.h>
#include <stdint.h>

#include "util/histogram.h"

static void test_values_fall_into_their_power_of_two(void)
{
    BaleHistogram hist = { 0 };

    bale_histogram_add(&hist, 0);
    bale_histogram_add(&hist, 1);
    bale_histogram_add(&hist, 2);
    bale_histogram_add(&hist, 3);
    bale_histogram_add(&hist, UINT64_MAX);
    g_assert_cmpuint(bale_histogram_bucket(&hist, 0), ==, 1);
    g_assert_cmpuint(bale_histogram_bucket(&hist, 1), ==, 1);
    g_assert_cmpuint(bale_histogram_bucket(&hist, 2), ==, 2);
    g_assert_cmpuint(bale_histogram_bucket(&hist, 64), ==, 1);
    g_assert_cmpuint(bale_histogram_bucket_limit(0), ==, 0);
    g_assert_cmpuint(bale_histogram_bucket_limit(1), ==, 1);
    g_assert_cmpuint(bale_histogram_bucket_limit(2), ==, 3);
    g_assert_cmpuint(bale_histogram_bucket_limit(64), ==, UINT64_MAX);
    g_assert_cmpuint(bale_histogram_percentile(&hist, 100), ==, UINT64_MAX);
}

static void test_an_empty_histogram_is_all_zero(void)
{
    BaleHistogram hist = { 0 };
    BaleHistogramSummary s;

    bale_histogram_summarise(&hist, &s);
    g_assert_cmpuint(s.count, ==, 0);
    g_assert_cmpuint(s.mean, ==, 0);
    g_assert_cmpuint(s.p99, ==, 0);
    g_assert_cmpuint(bale_histogram_percentile(&hist, 50), ==, 0);
}

static void test_percentiles_are_within_a_factor_of_two(void)
{
    BaleHistogram hist = { 0 };
    BaleHistogramSummary s;
    uint64_t previous = 0;

    for (uint64_t i = 1; i <= 100000; i++) {
        bale_histogram_add(&hist, i);
    }
    for (int percent = 1; percent <= 100; percent++) {
        uint64_t exact = percent * 1000;
        uint64_t got = bale_histogram_percentile(&hist, percent);

        g_assert_cmpuint(got, >=, exact / 2);
        g_assert_cmpuint(got, <=, exact * 2);
        g_assert_cmpuint(got, >=, previous);
        previous = got;
    }
    bale_histogram_summarise(&hist, &s);
    g_assert_cmpuint(s.count, ==, 100000);
    g_assert_cmpuint(s.mean, ==, 50000);
    g_assert_cmpuint(s.max, ==, 100000);
    g_assert_cmpuint(s.p99, <=, s.max);
    g_assert_cmpuint(s.p50, <=, s.p95);
    g_assert_cmpuint(s.p95, <=, s.p99);
}

static void test_a_percent_out_of_range_is_clamped(void)
{
    BaleHistogram hist = { 0 };

    bale_histogram_add(&hist, 1000);
    g_assert_cmpuint(bale_histogram_percentile(&hist, 200), ==, 1000);
    g_assert_cmpuint(bale_histogram_percentile(&hist, -5), <=, 1000);
}

static void test_reset_forgets(void)
{
    BaleHistogram hist = { 0 };

    bale_histogram_add(&hist, 7);
    bale_histogram_reset(&hist);
    g_assert_cmpuint(bale_histogram_count(&hist), ==, 0);
    g_assert_cmpuint(hist.sum, ==, 0);
    g_assert_cmpuint(hist.max, ==, 0);
}

static void *add_main(void *opaque)
{
    for (uint64_t i = 0; i < 50000; i++) {
        bale_histogram_add(opaque, i);
    }
    return NULL;
}

static void test_threads_lose_nothing(void)
{
    BaleHistogram hist = { 0 };
    BaleHistogramSummary s;
    pthread_t threads[4];

    for (int i = 0; i < 4; i++) {
        g_assert_cmpint(pthread_create(&threads[i], NULL, add_main, &hist),
                        ==, 0);
    }
    for (int i = 0; i < 4; i++) {
        pthread_join(threads[i], NULL);
    }
    bale_histogram_summarise(&hist, &s);
    g_assert_cmpuint(s.count, ==, 200000);
    g_assert_cmpuint(s.sum, ==, 4 * (49999ULL * 50000 / 2));
    g_assert_cmpuint(s.max, ==, 49999);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/histogram/values-fall-into-their-power-of-two",
                    test_values_fall_into_their_power_of_two);
    g_test_add_func("/histogram/an-empty-histogram-is-all-zero",
                    test_an_empty_histogram_is_all_zero);
    g_test_add_func("/histogram/percentiles-are-within-a-factor-of-two",
                    test_percentiles_are_within_a_factor_of_two);
    g_test_add_func("/histogram/a-percent-out-of-range-is-clamped",
                    test_a_percent_out_of_range_is_clamped);
    g_test_add_func("/histogram/reset-forgets", test_reset_forgets);
    g_test_add_func("/histogram/threads-lose-nothing",
                    test_threads_lose_nothing);
    return g_test_run();
}
