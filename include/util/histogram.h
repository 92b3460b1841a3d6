/*
 * A histogram of latencies (or of any 64-bit numbers) in powers of two.
 *
 * Bucket 0 counts zeroes; bucket i counts values in [2^(i-1), 2^i).  Adding is
 * a few relaxed atomic additions: cheap enough for every request, and never a
 * lock.
 *
 * Threads: any number may add while any number read.  A reader sees each
 * counter exactly, but the counters together only about right while somebody
 * adds.  Errors: none.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef BALE_UTIL_HISTOGRAM_H
#define BALE_UTIL_HISTOGRAM_H

#include <stdint.h>

#define BALE_HISTOGRAM_BUCKETS 65

/*
 * Zero-initialise; there is nothing to free.  Only the functions below touch
 * the fields.
 */
typedef struct BaleHistogram {
    uint64_t buckets[BALE_HISTOGRAM_BUCKETS];
    uint64_t sum;
    uint64_t max;
} BaleHistogram;

typedef struct BaleHistogramSummary {
    uint64_t count;
    /* Wraps modulo 2^64 when the values added are that large. */
    uint64_t sum;
    uint64_t mean;
    uint64_t p50;
    uint64_t p95;
    uint64_t p99;
    uint64_t max;
} BaleHistogramSummary;

/* The unit of @value is the caller's affair, for example nanoseconds. */
void bale_histogram_add(BaleHistogram *hist, uint64_t value);

/* Forget everything; a value added at the same time may survive in part. */
void bale_histogram_reset(BaleHistogram *hist);

uint64_t bale_histogram_count(const BaleHistogram *hist);

/*
 * Estimate the value below or at which @percent (0 to 100) of the values lie.
 * Interpolated linearly in the bucket, so at most a factor of two off, and
 * never above the largest value.  0 for an empty histogram.
 */
uint64_t bale_histogram_percentile(const BaleHistogram *hist, double percent);

/* Everything at once, as a statistics command wants it. */
void bale_histogram_summarise(const BaleHistogram *hist,
                              BaleHistogramSummary *summary);

/* The number of values counted in @bucket, below BALE_HISTOGRAM_BUCKETS. */
uint64_t bale_histogram_bucket(const BaleHistogram *hist, unsigned bucket);

/* The largest value that @bucket counts. */
uint64_t bale_histogram_bucket_limit(unsigned bucket);

#endif
