/*
 * What a store tells about itself in numbers.
 *
 * Counters live in BaleStore.stats and are added to where things happen;
 * everything that has a value "now" is asked of its owner here.
 *
 * Threads: any.  Takes the mutable region's lock, the cache's, log_lock, the
 * workers' mutex and the read gate's lock, one after the other, and no
 * session_lock.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "store-internal.h"

G_STATIC_ASSERT(sizeof(BaleStoreStats) % sizeof(uint64_t) == 0);
G_STATIC_ASSERT(BALE_STATS_BUCKETS == BALE_BUCKETS);
/* Slots of a primary bucket of the index: see util/index.c. */
#define INDEX_BUCKET_SLOTS 7u

static void stats_histogram(const BaleHistogram *hist, uint64_t *out,
                            BaleLatency *latency)
{
    BaleHistogramSummary sum;

    for (unsigned i = 0; i < BALE_HIST_BUCKETS; i++) {
        /* Bucket i + 1 of the histogram counts [2^i, 2^(i+1)). */
        out[i] = bale_histogram_bucket(hist, i + 1);
    }
    out[0] += bale_histogram_bucket(hist, 0);
    bale_histogram_summarise(hist, &sum);
    *latency = (BaleLatency){ sum.count, sum.sum, sum.mean, sum.p50,
                              sum.p95,   sum.p99, sum.max };
}

/* Under log_lock. */
static void stats_log(BaleStore *s, BaleStoreStats *stats)
{
    bale_log_assert_regions(s);
    stats->tail_bytes = bale_log_tail(s);
    stats->sealed_bytes = s->sealed_end;
    stats->stable_bytes = s->stable_end;
    stats->durable_bytes = s->durable_end;
    stats->write_buffers = s->buffers->len;
    stats->write_buffers_in_flight = s->in_flight.length;
}

/* Under log_lock. */
static void stats_pages(BaleStore *s, BaleStoreStats *stats)
{
    bale_log_fold(s);
    for (uint64_t i = 0; i < s->pages->len; i++) {
        BalePage *p = bale_page(s, i);
        BaleBucketStats *bucket = &stats->buckets[p->bucket];
        /* Live bytes are counted in size classes, rounded up. */
        uint64_t dead = p->end > p->live_bytes ? p->end - p->live_bytes : 0;

        switch ((BalePageState)p->state) {
        case BALE_PAGE_FREE:
            stats->pages_free++;
            continue;
        case BALE_PAGE_ACTIVE:
            stats->pages_active++;
            break;
        case BALE_PAGE_SEALED:
            stats->pages_sealed++;
            break;
        default:
            stats->pages_freeing++;
            break;
        }
        stats->live_bytes += p->live_bytes;
        stats->used_bytes += p->end;
        stats->dead_bytes += dead;
        stats->overhead_bytes += MIN(p->overhead, dead);
        bucket->pages++;
        bucket->live_bytes += p->live_bytes;
        bucket->dead_bytes += dead;
    }
}

static void stats_index(BaleStore *s, BaleStoreStats *stats)
{
    BaleIndexStats index = { .keys = 0 };
    BaleEpochStats epoch;
    GHashTableIter iter;
    void *layer;

    pthread_mutex_lock(&s->log_lock);
    g_hash_table_iter_init(&iter, s->layers);
    while (g_hash_table_iter_next(&iter, NULL, &layer)) {
        BaleIndexStats one;

        bale_index_get_stats(((BaleLayer *)layer)->index, &one);
        index.keys += one.keys;
        index.bytes += one.bytes;
        index.peak_bytes += one.peak_bytes;
        index.buckets += one.buckets;
        index.overflow_buckets += one.overflow_buckets;
        index.growing |= one.growing;
        index.growths += one.growths;
        index.rebuilds += one.rebuilds;
        index.shrinks += one.shrinks;
        index.waits += one.waits;
    }
    pthread_mutex_unlock(&s->log_lock);
    stats->index_entries = index.keys;
    stats->index_bytes = index.bytes;
    stats->index_peak_bytes = index.peak_bytes;
    stats->index_buckets = index.buckets;
    stats->index_overflow_buckets = index.overflow_buckets;
    stats->index_load_permille =
        index.buckets ? index.keys * 1000 /
                            (index.buckets * INDEX_BUCKET_SLOTS)
                      : 0;
    stats->index_growing = index.growing;
    stats->index_growths = index.growths;
    stats->index_rebuilds = index.rebuilds;
    stats->index_shrinks = index.shrinks;
    stats->index_waits = index.waits;

    bale_epoch_get_stats(s->epoch, &epoch);
    stats->epoch = epoch.epoch;
    stats->epoch_pending = epoch.pending;
    stats->epoch_readers = epoch.readers;
    stats->epoch_executed = epoch.executed;
}

static void stats_queues(BaleStore *s, BaleStoreStats *stats)
{
    BaleWorkersStats workers;

    stats->reads_in_flight = __atomic_load_n(&s->reads_in_flight,
                                             __ATOMIC_RELAXED);
    stats->writes_in_flight = __atomic_load_n(&s->writes_in_flight,
                                              __ATOMIC_RELAXED);
    bale_workers_get_stats(s->workers, &workers);
    stats->workers = workers.threads;
    stats->workers_running = workers.running;
    for (unsigned i = 0; i < BALE_WORK__PRIORITIES; i++) {
        stats->workers_queued += workers.queued[i];
    }
    stats->reads_at_once = bale_read_gate_width(
        &s->read_gate,
        &(BaleGateLoad){ workers.threads, stats->reads_in_flight });
}

void bale_store_get_stats(BaleStore *s, BaleStoreStats *stats)
{
    g_autofree BaleImage **images = NULL;
    guint n;
    const uint64_t *from = (const uint64_t *)&s->stats;
    uint64_t *to = (uint64_t *)stats;

    pthread_mutex_lock(&s->log_lock);
    for (size_t i = 0; i < sizeof(*stats) / sizeof(uint64_t); i++) {
        to[i] = __atomic_load_n(&from[i], __ATOMIC_RELAXED);
    }
    stats_log(s, stats);
    stats_pages(s, stats);
    stats->compact_running = __atomic_load_n(&s->compact_running,
                                             __ATOMIC_RELAXED);
    stats->compact_pending_bytes = bale_compact_pending(s);
    pthread_mutex_unlock(&s->log_lock);

    if (stats->stored_bytes) {
        stats->write_amplification_permille =
            stats->segment_bytes * 1000 / stats->stored_bytes;
    }
    images = bale_store_images(s, &n);
    for (guint i = 0; i < n; i++) {
        bale_mutable_count(images[i]->mutable_region, stats);
    }
    stats_index(s, stats);
    stats_queues(s, stats);
    bale_cache_get_stats(s->cache, stats);
    stats_histogram(&s->read_hist, stats->read_ns, &stats->read_latency);
    stats_histogram(&s->write_hist, stats->write_ns, &stats->write_latency);
    stats_histogram(&s->flush_hist, stats->flush_ns, &stats->flush_latency);
}

void bale_store_reset_stats(BaleStore *s)
{
    uint64_t *counters = (uint64_t *)&s->stats;

    pthread_mutex_lock(&s->log_lock);
    for (size_t i = 0; i < sizeof(s->stats) / sizeof(uint64_t); i++) {
        __atomic_store_n(&counters[i], 0, __ATOMIC_RELAXED);
    }
    pthread_mutex_unlock(&s->log_lock);
    bale_histogram_reset(&s->read_hist);
    bale_histogram_reset(&s->write_hist);
    bale_histogram_reset(&s->flush_hist);
}
