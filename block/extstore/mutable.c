/*
 * The mutable region of the log: clusters that were written in part.
 *
 * Partial writes wait in a seqcache (util/seqcache.h) until their cluster is
 * complete, until others push it out, or until a flush; then the cluster is
 * merged with what is stored of it, and goes the way of a whole write.
 *
 * Invariants:
 *  1. What is in the region is newer than what the index points at.
 *  2. A cluster leaves the region only after the index points at a record that
 *     holds its bytes, or newer ones; so who looks here first and in the index
 *     second misses nothing.
 *  3. Of each cluster at most one write-out is under way, and nobody else
 *     appends a record of a cluster while one is: see bale_mutable_claim().
 *  4. The gaps of a cluster are what is stored of it, or zero: nothing is put
 *     here while what lies under the image shows through (the caller sees to
 *     that), for that may change before the write-out.
 *  5. An error of a write-out reaches the next flush.  The bytes stay, and a
 *     later flush tries again.
 *
 * Threads: any; one mutex, which is held while bytes are copied.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "store-internal.h"

#include <errno.h>
#include <string.h>

#include "util/memory.h"
#include "util/planted.h"
#include "util/seqcache.h"

/* Memory of the region: this much, or so many clusters if that is more. */
#define MUTABLE_BYTES (8u << 20)
#define MUTABLE_CLUSTERS_MIN 8u
/* Of these, so many may be open; the others are on their way out. */
#define MUTABLE_OPEN_FRACTION 2

typedef struct MutableFlush {
    struct MutableFlush *next;
    uint64_t seq;
    BaleDone *done;
    void *opaque;
} MutableFlush;

struct BaleMutable {
    BaleImage *image;
    pthread_mutex_t lock;
    BaleSeqcache *cache;
    BaleWork *waiting;     /* until a write-out ends; chained by next */
    MutableFlush *flushes; /* in order of seq */
    unsigned claims;       /* not yet settled */
    uint8_t *zeroes;       /* one cluster of them */
};

/* One write-out. */
typedef struct MutableOut {
    BaleWork work;
    BaleMutable *m;
    BaleSeqcacheOut *out;
    uint8_t *base; /* what is stored, if the cluster has gaps */
} MutableOut;

static void mutable_kick(BaleMutable *m);

BaleMutable *bale_mutable_new(BaleImage *image)
{
    BaleStore *s = image->store;
    BaleSeqcacheOptions o = {
        .cluster_bytes = s->cluster_size,
        .align_bytes = BALE_BLOCK_SIZE,
        .max_bytes = MAX(MUTABLE_BYTES,
                         (uint64_t)MUTABLE_CLUSTERS_MIN * s->cluster_size),
    };
    BaleMutable *m = g_new0(BaleMutable, 1);

    o.max_streams = o.max_bytes / s->cluster_size / MUTABLE_OPEN_FRACTION;
    m->image = image;
    pthread_mutex_init(&m->lock, NULL);
    m->cache = bale_seqcache_new(&o, NULL);
    m->zeroes = bale_memory_try_alloc0(BALE_BLOCK_SIZE, s->cluster_size);
    if (!m->cache || !m->zeroes) {
        bale_mutable_free(m);
        return NULL;
    }
    return m;
}

void bale_mutable_free(BaleMutable *m)
{
    if (m) {
        bale_seqcache_free(m->cache);
        bale_memory_free(m->zeroes);
        pthread_mutex_destroy(&m->lock);
        g_free(m);
    }
}

void bale_mutable_count(BaleMutable *m, uint64_t *clusters, uint64_t *bytes)
{
    BaleSeqcacheStats stats;

    pthread_mutex_lock(&m->lock);
    bale_seqcache_get_stats(m->cache, &stats);
    pthread_mutex_unlock(&m->lock);
    *clusters += stats.open_clusters + stats.finished_clusters +
                 stats.failed_clusters + stats.out_clusters;
    *bytes += stats.dirty_bytes + stats.out_bytes;
}

/* --- write-out --- */

/* Wake who waits for room or for a cluster.  Under the lock. */
static void mutable_wake(BaleMutable *m)
{
    while (m->waiting) {
        BaleWork *work = m->waiting;

        m->waiting = work->next;
        bale_workers_push(m->image->store->workers, work, BALE_WORK_NORMAL);
    }
}

/* Take the flushes that are done, or that @ret has failed.  Under the lock. */
static MutableFlush *mutable_take_flushes(BaleMutable *m, int ret)
{
    uint64_t oldest = bale_seqcache_oldest_seq(m->cache);
    MutableFlush *list = m->flushes, **p = &list;

    while (*p && (ret < 0 || (*p)->seq < oldest)) {
        p = &(*p)->next;
    }
    m->flushes = *p;
    *p = NULL;
    return list;
}

static void mutable_finish_flushes(BaleMutable *m, MutableFlush *list,
                                   int ret)
{
    while (list) {
        MutableFlush *f = list;

        list = f->next;
        if (ret < 0) {
            f->done(f->opaque, ret);
        } else {
            bale_log_flush(m->image->store, f->done, f->opaque);
        }
        g_free(f);
    }
}

static void mutable_out_end(MutableOut *o, int ret)
{
    BaleMutable *m = o->m;
    BaleStore *s = m->image->store;
    MutableFlush *flushes;

    pthread_mutex_lock(&m->lock);
    bale_seqcache_out_done(m->cache, o->out, ret == 0);
    mutable_wake(m);
    flushes = mutable_take_flushes(m, ret);
    pthread_mutex_unlock(&m->lock);
    bale_memory_free(o->base);
    g_free(o);

    mutable_finish_flushes(m, flushes, ret);
    mutable_kick(m);

    pthread_mutex_lock(&s->log_lock);
    s->background--;
    pthread_cond_broadcast(&s->log_cond);
    pthread_mutex_unlock(&s->log_lock);
}

/* On a worker: everything that the gaps need is there. */
static void mutable_out_work(BaleWork *work, void *context, unsigned worker)
{
    MutableOut *o = (MutableOut *)((char *)work - offsetof(MutableOut, work));
    BaleStore *s = o->m->image->store;
    uint64_t offset = bale_seqcache_out_offset(o->out);
    uint8_t *data = bale_seqcache_out_data(o->out);
    size_t start = 0, len, gap = 0;

    while (o->base && gap < s->cluster_size &&
           !BALE_PLANTED(merge_forgotten)) {
        if (!bale_seqcache_out_range(o->out, &start, &len)) {
            start = s->cluster_size;
            len = 0;
        }
        memcpy(data + gap, o->base + gap, start - gap);
        start += len;
        gap = start;
    }
    mutable_out_end(o, bale_image_put_cluster(o->m->image, context,
                                              offset >> s->cluster_bits,
                                              data));
}

static void mutable_base_read(void *opaque, int ret)
{
    MutableOut *o = opaque;

    if (ret < 0) {
        mutable_out_end(o, ret);
        return;
    }
    o->work.fn = mutable_out_work;
    bale_workers_push(o->m->image->store->workers, &o->work,
                      BALE_WORK_NORMAL);
}

static void mutable_out_start(BaleMutable *m, BaleSeqcacheOut *out)
{
    BaleStore *s = m->image->store;
    MutableOut *o = g_new0(MutableOut, 1);

    o->m = m;
    o->out = out;
    pthread_mutex_lock(&s->log_lock);
    s->background++;
    pthread_mutex_unlock(&s->log_lock);
    if (bale_seqcache_out_bytes(out) == s->cluster_size) {
        mutable_base_read(o, 0);
        return;
    }
    o->base = bale_memory_try_alloc(BALE_BLOCK_SIZE, s->cluster_size);
    if (!o->base) {
        mutable_out_end(o, -ENOMEM);
        return;
    }
    bale_image_read_stored(m->image,
                           bale_seqcache_out_offset(out) >> s->cluster_bits,
                           o->base, mutable_base_read, o);
}

/* Begin the write-outs that are due. */
static void mutable_kick(BaleMutable *m)
{
    for (;;) {
        BaleSeqcacheOut *out;
        int err;

        pthread_mutex_lock(&m->lock);
        out = bale_seqcache_begin_finished(m->cache, &err);
        if (!out && m->flushes) {
            MutableFlush *last = m->flushes;

            while (last->next) {
                last = last->next;
            }
            out = bale_seqcache_begin_upto(m->cache, last->seq, &err);
        }
        pthread_mutex_unlock(&m->lock);
        if (!out) {
            return;
        }
        mutable_out_start(m, out);
    }
}

/* --- the interface --- */

static int64_t mutable_now_ns(void)
{
    return bale_now_ns();
}

int bale_mutable_put(BaleMutable *m, uint64_t offset, const struct iovec *iov,
                     int iovcnt, uint64_t at, size_t len, size_t *done,
                     BaleWork *retry)
{
    struct iovec zeroes = { m->zeroes, len };
    size_t accepted;
    bool stuck = false;
    int ret;

    pthread_mutex_lock(&m->lock);
    if (iov) {
        ret = bale_seqcache_write(m->cache, offset + *done, iov, iovcnt,
                                  at + *done, len - *done, mutable_now_ns(),
                                  &accepted);
    } else {
        ret = bale_seqcache_write(m->cache, offset + *done, &zeroes, 1, *done,
                                  len - *done, mutable_now_ns(), &accepted);
    }
    *done += accepted;
    if (ret == -EAGAIN || ret == -ENOMEM) {
        BaleSeqcacheStats stats;

        bale_seqcache_get_stats(m->cache, &stats);
        /* Room comes from a write-out; is there one, or can there be? */
        if (stats.out_clusters || stats.finished_clusters || m->claims) {
            retry->next = m->waiting;
            m->waiting = retry;
        } else if (stats.open_clusters) {
            int err;
            BaleSeqcacheOut *out =
                bale_seqcache_begin_upto(m->cache, UINT64_MAX, &err);

            if (out) {
                retry->next = m->waiting;
                m->waiting = retry;
                pthread_mutex_unlock(&m->lock);
                mutable_out_start(m, out);
                return -EAGAIN;
            }
            stuck = true;
        } else {
            stuck = true;
        }
    }
    pthread_mutex_unlock(&m->lock);
    if (stuck) {
        /* All there is has failed to be written: the store is full. */
        return ret == -ENOMEM ? -ENOMEM : -ENOSPC;
    }
    mutable_kick(m);
    return ret == -ENOMEM ? -EAGAIN : ret;
}

bool bale_mutable_claim(BaleMutable *m, uint64_t offset, uint64_t len,
                        BaleWork *retry)
{
    bool claimed;

    pthread_mutex_lock(&m->lock);
    claimed = !bale_seqcache_in_out(m->cache, offset, len);
    if (BALE_PLANTED(claim_forgets)) {
        bale_seqcache_discard(m->cache, offset, len);
    }
    if (claimed) {
        bale_seqcache_hold(m->cache, offset, len);
        m->claims++;
    } else {
        retry->next = m->waiting;
        m->waiting = retry;
    }
    pthread_mutex_unlock(&m->lock);
    return claimed;
}

void bale_mutable_settle(BaleMutable *m, uint64_t offset, uint64_t len,
                         bool written)
{
    MutableFlush *flushes;

    pthread_mutex_lock(&m->lock);
    bale_seqcache_release(m->cache, offset, len);
    if (written) {
        bale_seqcache_discard(m->cache, offset, len);
    }
    m->claims--;
    mutable_wake(m);
    /* What a flush waited for may have been what was discarded. */
    flushes = mutable_take_flushes(m, 0);
    pthread_mutex_unlock(&m->lock);
    mutable_finish_flushes(m, flushes, 0);
    mutable_kick(m);
}

bool bale_mutable_cached(BaleMutable *m, uint64_t offset, uint64_t len)
{
    uint64_t run;
    bool cached;

    pthread_mutex_lock(&m->lock);
    cached = bale_seqcache_end(m->cache) > offset &&
             (bale_seqcache_lookup(m->cache, offset, len, &run) || run < len);
    pthread_mutex_unlock(&m->lock);
    return cached;
}

uint64_t bale_mutable_end(BaleMutable *m)
{
    uint64_t end;

    pthread_mutex_lock(&m->lock);
    end = bale_seqcache_end(m->cache);
    pthread_mutex_unlock(&m->lock);
    return end;
}

size_t bale_mutable_read(BaleMutable *m, uint64_t offset, uint32_t len,
                         uint8_t **buf, GArray **runs)
{
    BaleStore *s = m->image->store;
    size_t pos = 0, total = 0, run;

    pthread_mutex_lock(&m->lock);
    while (bale_seqcache_end(m->cache) > offset && pos < len) {
        uint64_t n;
        BaleMutableRun r;

        if (!bale_seqcache_lookup(m->cache, offset + pos, len - pos, &n)) {
            pos += n;
            continue;
        }
        if (!*buf) {
            *buf = bale_memory_try_alloc(BALE_BLOCK_SIZE, s->cluster_size);
        }
        if (!*buf) {
            total = SIZE_MAX;
            break;
        }
        if (!*runs) {
            *runs = g_array_new(FALSE, FALSE, sizeof(BaleMutableRun));
        }
        bale_seqcache_read_buf(m->cache, offset + pos, n, *buf + pos, &run);
        r = (BaleMutableRun){ pos, run };
        g_array_append_val(*runs, r);
        total += run;
        pos += run;
    }
    pthread_mutex_unlock(&m->lock);
    return total;
}

/* Under the lock.  What failed before is tried again. */
static bool mutable_waiting(BaleMutable *m)
{
    bale_seqcache_retry(m->cache);
    return bale_seqcache_oldest_seq(m->cache) <= bale_seqcache_seq(m->cache);
}

bool bale_mutable_waiting(BaleMutable *m)
{
    bool waiting;

    pthread_mutex_lock(&m->lock);
    waiting = mutable_waiting(m);
    pthread_mutex_unlock(&m->lock);
    return waiting;
}

void bale_mutable_flush(BaleMutable *m, BaleDone *done, void *opaque)
{
    MutableFlush *f, **p;

    pthread_mutex_lock(&m->lock);
    if (!mutable_waiting(m)) {
        pthread_mutex_unlock(&m->lock);
        bale_log_flush(m->image->store, done, opaque);
        return;
    }
    f = g_new0(MutableFlush, 1);
    f->seq = bale_seqcache_seq(m->cache);
    f->done = done;
    f->opaque = opaque;
    for (p = &m->flushes; *p; p = &(*p)->next) {
        continue;
    }
    *p = f;
    pthread_mutex_unlock(&m->lock);
    mutable_kick(m);
}

void bale_mutable_discard(BaleMutable *m, uint64_t offset, uint64_t len)
{
    pthread_mutex_lock(&m->lock);
    bale_seqcache_discard(m->cache, offset, len);
    pthread_mutex_unlock(&m->lock);
}
