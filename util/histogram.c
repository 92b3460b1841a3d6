/*
 * A histogram of latencies in powers of two.
 *
 * Invariants: the count is the sum of the buckets, so that no reader can see
 * a count that the buckets do not hold.
 * Threads: every access to a field is a relaxed atomic; nothing is ordered
 * against anything, for these are statistics.
 * Errors: none.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "util/histogram.h"

#include <assert.h>
#include <stdbool.h>

static inline uint64_t load(const uint64_t *p)
{
    return __atomic_load_n(p, __ATOMIC_RELAXED);
}

static unsigned bucket_of(uint64_t value)
{
    return value == 0 ? 0 : 64 - __builtin_clzll(value);
}

uint64_t bale_histogram_bucket_limit(unsigned bucket)
{
    assert(bucket < BALE_HISTOGRAM_BUCKETS);
    if (bucket == 0) {
        return 0;
    }
    return UINT64_MAX >> (64 - bucket);
}

uint64_t bale_histogram_bucket(const BaleHistogram *hist, unsigned bucket)
{
    assert(bucket < BALE_HISTOGRAM_BUCKETS);
    return load(&hist->buckets[bucket]);
}

void bale_histogram_add(BaleHistogram *hist, uint64_t value)
{
    uint64_t max = load(&hist->max);

    __atomic_fetch_add(&hist->buckets[bucket_of(value)], 1, __ATOMIC_RELAXED);
    __atomic_fetch_add(&hist->sum, value, __ATOMIC_RELAXED);
    /* A failed exchange reloads max, which only ever grows. */
    while (value > max &&
           !__atomic_compare_exchange_n(&hist->max, &max, value, true,
                                        __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
}

void bale_histogram_reset(BaleHistogram *hist)
{
    for (unsigned i = 0; i < BALE_HISTOGRAM_BUCKETS; i++) {
        __atomic_store_n(&hist->buckets[i], 0, __ATOMIC_RELAXED);
    }
    __atomic_store_n(&hist->sum, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&hist->max, 0, __ATOMIC_RELAXED);
}

/* Copies the buckets, so that what is computed from them is consistent. */
static uint64_t snapshot(const BaleHistogram *hist,
                         uint64_t buckets[BALE_HISTOGRAM_BUCKETS])
{
    uint64_t count = 0;

    for (unsigned i = 0; i < BALE_HISTOGRAM_BUCKETS; i++) {
        buckets[i] = load(&hist->buckets[i]);
        count += buckets[i];
    }
    return count;
}

uint64_t bale_histogram_count(const BaleHistogram *hist)
{
    uint64_t buckets[BALE_HISTOGRAM_BUCKETS];

    return snapshot(hist, buckets);
}

static uint64_t percentile(const uint64_t *buckets, uint64_t count,
                           uint64_t max, double percent)
{
    double rank;
    double before = 0;

    if (count == 0) {
        return 0;
    }
    if (!(percent > 0)) {
        percent = 0;
    } else if (percent > 100) {
        percent = 100;
    }
    rank = percent / 100 * count;
    for (unsigned i = 0; i < BALE_HISTOGRAM_BUCKETS; i++) {
        if (buckets[i] != 0 && before + buckets[i] >= rank) {
            uint64_t high = bale_histogram_bucket_limit(i);
            uint64_t low = i == 0 ? 0 : high / 2 + 1;
            double step;

            /* The top bucket rarely reaches as far as its limit. */
            if (high > max && max >= low) {
                high = max;
            }
            step = (double)(high - low) * ((rank - before) / buckets[i]);
            /* A double can round up beyond the integers' difference. */
            return step >= (double)(high - low) ? high : low + (uint64_t)step;
        }
        before += buckets[i];
    }
    return max;
}

uint64_t bale_histogram_percentile(const BaleHistogram *hist, double percent)
{
    uint64_t buckets[BALE_HISTOGRAM_BUCKETS];
    uint64_t count = snapshot(hist, buckets);

    return percentile(buckets, count, load(&hist->max), percent);
}

void bale_histogram_summarise(const BaleHistogram *hist,
                              BaleHistogramSummary *summary)
{
    uint64_t buckets[BALE_HISTOGRAM_BUCKETS];
    uint64_t count = snapshot(hist, buckets);
    uint64_t max = load(&hist->max);

    *summary = (BaleHistogramSummary) {
        .count = count,
        .sum = load(&hist->sum),
        .p50 = percentile(buckets, count, max, 50),
        .p95 = percentile(buckets, count, max, 95),
        .p99 = percentile(buckets, count, max, 99),
        .max = max,
    };
    summary->mean = count == 0 ? 0 : summary->sum / count;
}
