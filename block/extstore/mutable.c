/*
 * The mutable region of the log: clusters that were written in part.
 *
 * Partial writes wait in a seqcache (util/seqcache.h) until their cluster is
 * complete, or until others push it out; then the cluster is merged with what
 * is stored of it, and goes the way of a whole write.  A flush does not wait
 * for that: it appends what is dirty as patches (patch-internal.h), if that is
 * little, and the cluster stays here.  Those that patches have saved leave the
 * region many at a time, when nobody waits for room (mutable-batch.c).
 *
 * Invariants:
 *  1. What is in the region is newer than what the index points at.
 *  2. A cluster leaves the region only after the index points at a record that
 *     holds its bytes, or newer ones; so who looks here first and in the index
 *     second misses nothing.
 *  3. Of each cluster at most one write-out or appending of patches is under
 *     way, and nobody else appends a record of a cluster while one is: see
 *     bale_mutable_claim().
 *  4. The gaps of a cluster are what is stored of it, or zero: nothing is put
 *     here while what lies under the image shows through (the caller sees to
 *     that), for that may change before the write-out.
 *  5. An error of a write-out reaches the next flush, unless patches have
 *     saved its bytes.  The bytes stay, and a later flush tries again.
 *  6. Each cached byte is unsaved in the table of patches, or taken by what
 *     saves it now, or in the log as a patch.
 *
 * Threads: any; one mutex, which is held while bytes are copied.  Patches are
 * appended by one thread at a time: a worker or, if they are few and nothing is
 * waited for, whoever finds them due.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "mutable-internal.h"

#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "util/memory.h"
#include "util/planted.h"

/* What may be in write-out at one time, bytes, and in clusters. */
#define MUTABLE_OUT_BYTES (8u << 20)
#define MUTABLE_OUTS_MIN  8u
#define MUTABLE_OUTS_MAX  128u
/* So many patches of one cluster, of so many bytes, need no worker. */
#define JOURNAL_NOW_PATCHES 4u
#define JOURNAL_NOW_BYTES   (16u << 10)
/* Clusters that there is room for, if the options say less than this. */
#define MUTABLE_CLUSTERS_MIN 4u
/* Of these, so many may be open; the others are on their way out. */
#define MUTABLE_OPEN_FRACTION 2
/* As many as this part of what may be open leave the region together ... */
#define MUTABLE_BATCH_FRACTION 3
/* ... or fewer, if they have so many bytes. */
#define MUTABLE_BATCH_BYTES (512u << 10)

static bool mutable_journal_start(BaleMutable *m);

BaleMutable *bale_mutable_new(BaleImage *image)
{
    BaleStore *s = image->store;
    uint32_t clusters = bale_patched_clusters_max(s->cluster_size);
    BaleSeqcacheOptions o = {
        .cluster_bytes = s->cluster_size,
        .align_bytes = BALE_BLOCK_SIZE,
    };
    BaleMutable *m = g_new0(BaleMutable, 1);

    if (s->options.mutable_clusters) {
        clusters = CLAMP(s->options.mutable_clusters, MUTABLE_CLUSTERS_MIN,
                         clusters);
    }
    o.max_bytes = (uint64_t)clusters * s->cluster_size;
    o.max_streams = clusters / MUTABLE_OPEN_FRACTION;
    m->image = image;
    m->outs_max = CLAMP(MUTABLE_OUT_BYTES / s->cluster_size,
                        MUTABLE_OUTS_MIN, MUTABLE_OUTS_MAX);
    m->batch = MAX(o.max_streams / MUTABLE_BATCH_FRACTION, 1);
    m->journal_cluster = UINT64_MAX;
    m->journal_taken.seq = UINT64_MAX;
    bale_patch_table_init(&m->patched, s);
    m->patched.max = clusters;
    pthread_mutex_init(&m->lock, NULL);
    pthread_cond_init(&m->idle, NULL);
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
        bale_patch_table_destroy(&m->patched);
        bale_memory_free(m->zeroes);
        bale_memory_free(m->journal_data);
        bale_patch_packer_destroy(&m->packer);
        pthread_mutex_destroy(&m->lock);
        pthread_cond_destroy(&m->idle);
        g_free(m);
    }
}

void bale_mutable_count(BaleMutable *m, BaleStoreStats *stats)
{
    BaleSeqcacheStats cached;

    pthread_mutex_lock(&m->lock);
    bale_seqcache_get_stats(m->cache, &cached);
    stats->patches_live += m->patched.patches;
    stats->patches_live_bytes += m->patched.bytes;
    pthread_mutex_unlock(&m->lock);
    stats->mutable_clusters += cached.open_clusters +
                               cached.finished_clusters +
                               cached.failed_clusters + cached.out_clusters;
    stats->mutable_bytes += cached.dirty_bytes + cached.out_bytes;
}

/* --- write-out --- */

/* Wake who waits for room or for a cluster.  Under the lock. */
static void mutable_wake(BaleMutable *m)
{
    pthread_cond_broadcast(&m->idle);
    while (m->waiting) {
        BaleWork *work = m->waiting;

        m->waiting = work->next;
        bale_workers_push(m->image->store->workers, work, BALE_WORK_NORMAL);
    }
}

/* The number of the oldest byte that the log does not have. */
static uint64_t mutable_oldest_unsaved(BaleMutable *m)
{
    uint64_t seq = MIN(bale_patch_oldest(&m->patched), m->journal_taken.seq);

    for (GList *l = m->outs.head; l; l = l->next) {
        seq = MIN(seq, ((BaleMutableOut *)l->data)->taken.seq);
    }
    return seq;
}

/*
 * Take the flushes that are done or, with @ret an error, that wait for byte
 * @seq, which could not be saved.  UINT64_MAX: it has patches, and only who
 * wants more than that must know.  Under the lock.
 */
static BaleMutableFlush *mutable_take_flushes(BaleMutable *m, int ret,
                                              uint64_t seq)
{
    BaleMutableFlush **p = &m->flushes, *list = NULL, **tail = &list;
    uint64_t unsaved, oldest;

    if (!m->flushes) {
        return NULL;
    }
    unsaved = mutable_oldest_unsaved(m);
    oldest = bale_seqcache_oldest_seq(m->cache);
    while (*p) {
        BaleMutableFlush *f = *p;

        if (ret < 0 ? f->write_out || f->seq >= seq
                    : f->seq < (f->write_out ? MIN(unsaved, oldest)
                                             : unsaved)) {
            *p = f->next;
            f->next = NULL;
            *tail = f;
            tail = &f->next;
        } else {
            p = &f->next;
        }
    }
    return list;
}

static void mutable_finish_flushes(BaleMutable *m, BaleMutableFlush *list,
                                   int ret)
{
    while (list) {
        BaleMutableFlush *f = list;

        list = f->next;
        if (ret < 0) {
            f->done(f->opaque, ret);
        } else {
            bale_log_flush(m->image->store, f->done, f->opaque);
        }
        g_free(f);
    }
}

/* @out has begun: note it.  Under the lock. */
BaleMutableOut *bale_mutable_out_new(BaleMutable *m, BaleSeqcacheOut *out)
{
    BaleMutableOut *o = g_new0(BaleMutableOut, 1);
    BalePatched *p;

    o->m = m;
    o->out = out;
    o->cluster = bale_seqcache_out_offset(out) >>
                 m->image->store->cluster_bits;
    o->taken.seq = UINT64_MAX;
    o->link.data = o;
    g_queue_push_tail_link(&m->outs, &o->link);
    p = bale_patch_find(&m->patched, o->cluster);
    if (p) {
        o->taken = bale_patch_take(&m->patched, p);
    }
    return o;
}

void bale_mutable_out_end(BaleMutableOut *o, int ret)
{
    BaleMutable *m = o->m;
    BaleStore *s = m->image->store;
    BaleMutableFlush *flushes;
    BalePatched *p;

    pthread_mutex_lock(&m->lock);
    bale_seqcache_out_done(m->cache, o->out, ret == 0);
    g_queue_unlink(&m->outs, &o->link);
    p = bale_patch_find(&m->patched, o->cluster);
    if (p && ret == 0) {
        /* The index knows a newer record of all that they hold. */
        p->busy = false;
        bale_patch_drop(&m->patched, p, true);
    } else if (p) {
        bale_patch_put_back(&m->patched, p, &o->taken);
    }
    if (p) {
        bale_patch_tidy(&m->patched, p);
    }
    mutable_wake(m);
    flushes = mutable_take_flushes(m, ret, o->taken.seq);
    pthread_mutex_unlock(&m->lock);
    bale_memory_free(o->base);
    g_free(o);

    mutable_finish_flushes(m, flushes, ret);
    bale_mutable_kick(m);

    bale_background_end(s);
}

/* On a worker: everything that the gaps need is there. */
static void mutable_out_work(BaleWork *work, void *context, unsigned worker)
{
    BaleMutableOut *o = (BaleMutableOut *)((char *)work -
                                           offsetof(BaleMutableOut, work));
    BaleStore *s = o->m->image->store;
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
    bale_mutable_out_end(o, bale_image_put_cluster(o->m->image, context,
                                                   o->cluster, data));
}

static void mutable_base_read(void *opaque, int ret)
{
    BaleMutableOut *o = opaque;

    if (ret < 0) {
        bale_mutable_out_end(o, ret);
        return;
    }
    o->work.fn = mutable_out_work;
    bale_workers_push(o->m->image->store->workers, &o->work,
                      BALE_WORK_BULK);
}

static void mutable_out_start(BaleMutableOut *o)
{
    BaleMutable *m = o->m;
    BaleStore *s = m->image->store;

    bale_background_begin(s);
    if (bale_seqcache_out_bytes(o->out) == s->cluster_size) {
        mutable_base_read(o, 0);
        return;
    }
    o->base = bale_memory_try_alloc(BALE_BLOCK_SIZE, s->cluster_size);
    if (!o->base) {
        bale_mutable_out_end(o, -ENOMEM);
        return;
    }
    bale_image_read_stored(m->image, o->cluster, o->base, false,
                           mutable_base_read, o);
}

/* --- what a flush wants --- */

bool bale_mutable_complete(BaleMutable *m, uint64_t cluster)
{
    BaleStore *s = m->image->store;
    uint64_t run;

    return bale_seqcache_lookup(m->cache, cluster << s->cluster_bits,
                                s->cluster_size, &run) &&
           run == s->cluster_size;
}

/* The newest number that a flush waits for, or 0.  Under the lock. */
static uint64_t mutable_wanted(BaleMutable *m, bool write_out)
{
    uint64_t seq = 0;

    for (BaleMutableFlush *f = m->flushes; f; f = f->next) {
        if (f->write_out || !write_out) {
            seq = MAX(seq, f->seq);
        }
    }
    return seq;
}

/*
 * The next cluster that a flush waits for, and that nobody saves now: one that
 * is worth patches, or one that is not.  Under the lock.
 */
static BalePatched *mutable_due(BaleMutable *m, bool patches)
{
    BaleStore *s = m->image->store;
    uint64_t wanted = mutable_wanted(m, false);
    bool paused = __atomic_load_n(&s->patch_pauses, __ATOMIC_ACQUIRE);

    if (m->frozen || (paused && patches)) {
        return NULL;
    }
    for (GList *l = m->patched.unsaved.head; l; l = l->next) {
        BalePatched *p = l->data;
        uint64_t begin = p->cluster << s->cluster_bits;
        bool worth;

        if (p->unsaved.seq > wanted) {
            break;
        }
        if (p->busy || bale_seqcache_is_held(m->cache, begin)) {
            continue;
        }
        /* A complete cluster goes the way of a whole one anyhow. */
        worth = !paused &&
                (bale_mutable_complete(m, p->cluster)
                     ? bale_patch_worth_last(&m->patched, p)
                     : bale_patch_worth(&m->patched, p));
        if (worth == patches) {
            return p;
        }
    }
    return NULL;
}

/* What is to be done with the cluster that has been finished for longest. */
typedef enum Finished {
    FINISHED_NONE,
    FINISHED_OUT,   /* write it out */
    FINISHED_WAITS, /* the next flush saves the rest of it */
    FINISHED_SAVED, /* patches have saved it: it waits for others */
    FINISHED_BATCH, /* and there are enough */
} Finished;

/* Under the lock. */
static Finished mutable_finished(BaleMutable *m)
{
    size_t n = bale_seqcache_finished_clusters(m->cache), bytes;
    uint64_t offset;
    BalePatched *p;

    if (!bale_seqcache_peek_finished(m->cache, &offset, &bytes)) {
        return FINISHED_NONE;
    }
    p = bale_patch_find(&m->patched, offset >> m->image->store->cluster_bits);
    /* Who waits for room gets it soonest one by one. */
    if (m->waiting || !p || !p->patches) {
        return FINISHED_OUT;
    }
    if (p->unsaved.seq != UINT64_MAX) {
        return n < m->batch && bale_patch_worth_last(&m->patched, p)
                   ? FINISHED_WAITS
                   : FINISHED_OUT;
    }
    return !m->batching &&
                   (n >= m->batch || n * bytes >= MUTABLE_BATCH_BYTES)
               ? FINISHED_BATCH
               : FINISHED_SAVED;
}

/* Begin the write-outs that are due, and the appending of patches. */
void bale_mutable_kick(BaleMutable *m)
{
    BaleStore *s = m->image->store;
    unsigned held = 0; /* of the store's background */
    bool more = true;

    while (more) {
        BaleSeqcacheOut *out = NULL;
        BaleMutableFlush *failed = NULL;
        BaleMutableBatch *batch = NULL;
        Finished finished;
        BaleMutableOut *o = NULL;
        bool journal = false;
        int err = 0;

        pthread_mutex_lock(&m->lock);
        if (m->frozen) {
            pthread_mutex_unlock(&m->lock);
            break;
        }
        if (m->flushes && !m->journaling && mutable_due(m, true)) {
            m->journaling = journal = true;
        }
        finished = m->outs.length < m->outs_max ? mutable_finished(m)
                                                : FINISHED_NONE;
        if (finished == FINISHED_BATCH) {
            batch = bale_mutable_batch_new(m, m->batch);
        }
        if (finished == FINISHED_OUT ||
            (finished == FINISHED_BATCH && !batch)) {
            out = bale_seqcache_begin_finished(m->cache, &err);
        }
        if (!out && m->flushes && m->outs.length < m->outs_max) {
            BalePatched *p = mutable_due(m, false);

            if (p) {
                out = bale_seqcache_begin_at(
                    m->cache, p->cluster << m->image->store->cluster_bits,
                    &err);
            } else {
                out = bale_seqcache_begin_upto(m->cache,
                                               mutable_wanted(m, true), &err);
            }
        }
        if (out) {
            o = bale_mutable_out_new(m, out);
        } else if (err < 0 && m->outs.length == 0) {
            failed = mutable_take_flushes(m, err, 0);
        }
        pthread_mutex_unlock(&m->lock);
        mutable_finish_flushes(m, failed, err);
        more = o || batch;
        if (batch) {
            bale_mutable_batch_start(batch);
        }
        if (journal && mutable_journal_start(m)) {
            held++;
            more = true;
        }
        if (o) {
            mutable_out_start(o);
        }
    }
    while (held-- > 0) {
        /* Whoever was served may close the store after this. */
        bale_background_end(s);
    }
}

/* --- patches --- */

/*
 * Append the @len bytes at @data, which belong at @offset of @cluster; one
 * attempt.
 */
static int mutable_patch_once(BaleMutable *m, uint64_t cluster,
                              const uint8_t *data, uint32_t offset,
                              uint32_t len, bool may_wait)
{
    BaleStore *s = m->image->store;
    BaleRecord r = {
        .type = BALE_RECORD_PATCH,
        .cluster = cluster,
        .count = offset,
        .payload_len = len,
    };
    BalePatch patch = { .offset = offset };
    const uint8_t *payload = data + offset;
    int ret;

    bale_patch_pack(&m->packer, m->image->codec, &r, &payload);
    patch.len = r.payload_len;
    ret = may_wait                        ? bale_store_write_begin(s)
          : bale_store_write_begin_now(s) ? 0
                                          : -EAGAIN;
    if (ret < 0) {
        return ret;
    }
    r.layer = m->image->top->id;
    if (bale_image_find(m->image, cluster) == 0) {
        r.flags = BALE_PATCH_BARE;
    }
    patch.bare = r.flags;
    ret = (may_wait ? bale_log_append : bale_log_append_now)(
        s, BALE_BUCKET_FRESH, &r, payload, bale_patch_live(patch.len),
        &patch.address);
    if (ret == 0) {
        patch.seq = r.seq;
        pthread_mutex_lock(&m->lock);
        bale_patch_add(&m->patched, bale_patch_find(&m->patched, cluster),
                       &patch);
        pthread_mutex_unlock(&m->lock);
        stat_add(&s->stats.patches, 1);
        stat_add(&s->stats.patch_bytes, bale_record_size(&r));
        stat_add(&s->stats.stored_bytes, bale_record_size(&r));
    }
    bale_store_write_end(s);
    return ret;
}

/* The same, and if there is no room and the caller may wait, wait for some. */
static int mutable_append_patch(BaleMutable *m, uint64_t cluster,
                                const uint8_t *data, uint32_t offset,
                                uint32_t len, bool may_wait)
{
    BaleSpaceWait wait = { 0 };
    int ret;

    do {
        ret = mutable_patch_once(m, cluster, data, offset, len, may_wait);
    } while (may_wait &&
             bale_maintain_try_again(m->image->store, &wait, &ret));
    return ret;
}

/*
 * Copy what is unsaved of @p to the same places of @data, and keep write-outs
 * away from it.  Under the lock.
 */
static void mutable_journal_take(BaleMutable *m, BalePatched *p,
                                 uint8_t *data)
{
    BaleStore *s = m->image->store;
    uint64_t begin = p->cluster << s->cluster_bits;

    m->journal_cluster = p->cluster;
    m->journal_taken = bale_patch_take(&m->patched, p);
    bale_seqcache_hold(m->cache, begin, s->cluster_size);
    for (unsigned i = 0; i < m->journal_taken.n; i++) {
        BalePatchRange r = m->journal_taken.range[i];
        size_t run;

        while (r.start < r.end) {
            bool cached =
                bale_seqcache_read_buf(m->cache, begin + r.start,
                                       r.end - r.start, data + r.start, &run);

            g_assert(cached); /* invariant 6 */
            r.start += run;
        }
    }
}

/* The appending of one cluster's patches has ended.  Under the lock. */
static void mutable_journal_done(BaleMutable *m, int ret)
{
    BaleStore *s = m->image->store;
    BaleUnsaved saved = { .seq = UINT64_MAX };
    BalePatched *p = bale_patch_find(&m->patched, m->journal_cluster);

    bale_patch_put_back(&m->patched, p, ret < 0 ? &m->journal_taken : &saved);
    bale_seqcache_release(m->cache, m->journal_cluster << s->cluster_bits,
                          s->cluster_size);
    m->journal_cluster = UINT64_MAX;
    m->journal_taken.seq = UINT64_MAX;
    mutable_wake(m);
}

/*
 * Append the patches of @p, through @data, which holds a cluster.  Called and
 * returns with the lock.
 */
static int mutable_journal_cluster(BaleMutable *m, BalePatched *p,
                                   uint8_t *data, bool may_wait)
{
    uint64_t cluster = p->cluster;
    BaleMutableFlush *flushes;
    BaleUnsaved taken;
    int ret = 0;

    mutable_journal_take(m, p, data);
    taken = m->journal_taken;
    pthread_mutex_unlock(&m->lock);
    for (unsigned i = 0; ret == 0 && i < taken.n; i++) {
        BalePatchRange *r = &taken.range[i];

        ret = mutable_append_patch(m, cluster, data, r->start,
                                   r->end - r->start, may_wait);
    }
    pthread_mutex_lock(&m->lock);
    mutable_journal_done(m, ret);
    if (ret == 0) {
        /* Others follow, maybe many: who is served may go. */
        flushes = mutable_take_flushes(m, 0, 0);
        if (flushes) {
            pthread_mutex_unlock(&m->lock);
            mutable_finish_flushes(m, flushes, 0);
            pthread_mutex_lock(&m->lock);
        }
    }
    return ret;
}

/* On a worker: append the patches that flushes wait for. */
static void mutable_journal_work(BaleWork *work, void *context,
                                 unsigned worker)
{
    BaleMutable *m = (BaleMutable *)((char *)work -
                                     offsetof(BaleMutable, journal));
    BaleStore *s = m->image->store;
    BaleWorkerContext *wc = context;
    BaleMutableFlush *flushes;
    BalePatched *p;
    int ret = 0;

    pthread_mutex_lock(&m->lock);
    while (ret == 0 && m->flushes && (p = mutable_due(m, true))) {
        ret = mutable_journal_cluster(m, p, wc->cluster, true);
    }
    m->journaling = false;
    pthread_cond_broadcast(&m->idle);
    flushes = ret < 0 ? mutable_take_flushes(m, ret, 0) : NULL;
    pthread_mutex_unlock(&m->lock);
    mutable_finish_flushes(m, flushes, ret);
    bale_mutable_kick(m);

    bale_background_end(s);
}

/*
 * Save one cluster without a worker if that is little and nothing is waited
 * for: waking one would take longer.  False: what is due is left.
 */
static bool mutable_journal_now(BaleMutable *m)
{
    BalePatched *p;
    uint64_t bytes = 0;
    bool due;

    pthread_mutex_lock(&m->lock);
    if (!m->journal_data) {
        m->journal_data = bale_memory_try_alloc(
            BALE_BLOCK_SIZE, m->image->store->cluster_size);
    }
    p = m->flushes ? mutable_due(m, true) : NULL;
    due = p;
    for (unsigned i = 0; p && i < p->unsaved.n; i++) {
        bytes += p->unsaved.range[i].end - p->unsaved.range[i].start;
    }
    if (p && m->journal_data && p->unsaved.n <= JOURNAL_NOW_PATCHES &&
        bytes <= JOURNAL_NOW_BYTES &&
        mutable_journal_cluster(m, p, m->journal_data, false) == 0) {
        due = m->flushes && mutable_due(m, true);
    }
    m->journaling = due;
    pthread_cond_broadcast(&m->idle);
    pthread_mutex_unlock(&m->lock);
    return !due;
}

/*
 * True: what was due is saved, and the caller takes this from the store's
 * background when it is done with us.  False: a worker does all.
 */
static bool mutable_journal_start(BaleMutable *m)
{
    BaleStore *s = m->image->store;

    bale_background_begin(s);
    if (mutable_journal_now(m)) {
        return true;
    }
    m->journal.fn = mutable_journal_work;
    bale_workers_push(s->workers, &m->journal, BALE_WORK_URGENT);
    return false;
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
    BaleStore *s = m->image->store;
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
    if (accepted) {
        uint32_t start = (offset + *done) & (s->cluster_size - 1);

        bale_patch_note(&m->patched, offset >> s->cluster_bits, start,
                        start + accepted, bale_seqcache_seq(m->cache));
    }
    *done += accepted;
    if (ret == -EAGAIN || ret == -ENOMEM) {
        BaleSeqcacheStats stats;

        bale_seqcache_get_stats(m->cache, &stats);
        /* Room comes from a write-out; is there one, or can there be? */
        if (stats.out_clusters || stats.finished_clusters || m->claims ||
            m->journal_cluster != UINT64_MAX) {
            retry->next = m->waiting;
            m->waiting = retry;
        } else if (stats.open_clusters) {
            int err;
            BaleSeqcacheOut *out =
                bale_seqcache_begin_upto(m->cache, UINT64_MAX, &err);

            if (out) {
                BaleMutableOut *o = bale_mutable_out_new(m, out);

                retry->next = m->waiting;
                m->waiting = retry;
                pthread_mutex_unlock(&m->lock);
                mutable_out_start(o);
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
    bale_mutable_kick(m);
    return ret == -ENOMEM ? -EAGAIN : ret;
}

bool bale_mutable_claim(BaleMutable *m, uint64_t offset, uint64_t len,
                        BaleWork *retry)
{
    unsigned bits = m->image->store->cluster_bits;
    bool claimed;

    pthread_mutex_lock(&m->lock);
    claimed = !bale_seqcache_in_out(m->cache, offset, len) &&
              !(m->journal_cluster >= offset >> bits &&
                m->journal_cluster - (offset >> bits) < len >> bits);
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
    BaleMutableFlush *flushes;

    pthread_mutex_lock(&m->lock);
    bale_seqcache_release(m->cache, offset, len);
    if (written) {
        unsigned bits = m->image->store->cluster_bits;

        bale_seqcache_discard(m->cache, offset, len);
        bale_patch_forget(&m->patched, offset >> bits, len >> bits, true);
    }
    m->claims--;
    mutable_wake(m);
    /* What a flush waited for may have been what was discarded. */
    flushes = mutable_take_flushes(m, 0, 0);
    pthread_mutex_unlock(&m->lock);
    mutable_finish_flushes(m, flushes, 0);
    bale_mutable_kick(m);
}

bool bale_mutable_cached(BaleMutable *m, uint64_t offset, uint64_t len)
{
    uint64_t run;
    bool cached;

    pthread_mutex_lock(&m->lock);
    cached = bale_seqcache_lookup(m->cache, offset, len, &run) || run < len;
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
    while (pos < len) {
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
static bool mutable_waiting(BaleMutable *m, bool write_out)
{
    uint64_t newest = bale_seqcache_seq(m->cache);

    bale_seqcache_retry(m->cache);
    return mutable_oldest_unsaved(m) <= newest ||
           (write_out && bale_seqcache_oldest_seq(m->cache) <= newest);
}

bool bale_mutable_waiting(BaleMutable *m, bool write_out)
{
    bool waiting;

    pthread_mutex_lock(&m->lock);
    waiting = mutable_waiting(m, write_out);
    pthread_mutex_unlock(&m->lock);
    return waiting;
}

void bale_mutable_flush(BaleMutable *m, bool write_out, BaleDone *done,
                        void *opaque)
{
    BaleMutableFlush *f, **p;

    pthread_mutex_lock(&m->lock);
    if (!mutable_waiting(m, write_out)) {
        pthread_mutex_unlock(&m->lock);
        bale_log_flush(m->image->store, done, opaque);
        return;
    }
    f = g_new0(BaleMutableFlush, 1);
    f->seq = bale_seqcache_seq(m->cache);
    f->write_out = write_out;
    f->done = done;
    f->opaque = opaque;
    for (p = &m->flushes; *p; p = &(*p)->next) {
        continue;
    }
    *p = f;
    pthread_mutex_unlock(&m->lock);
    bale_mutable_kick(m);
}

void bale_mutable_freeze(BaleMutable *m)
{
    pthread_mutex_lock(&m->lock);
    m->frozen = true;
    while (m->outs.length || m->journaling || m->batching) {
        pthread_cond_wait(&m->idle, &m->lock);
    }
    pthread_mutex_unlock(&m->lock);
}

void bale_mutable_thaw(BaleMutable *m)
{
    pthread_mutex_lock(&m->lock);
    m->frozen = false;
    pthread_mutex_unlock(&m->lock);
    bale_mutable_kick(m);
}

void bale_mutable_discard(BaleMutable *m, uint64_t offset, uint64_t len)
{
    unsigned bits = m->image->store->cluster_bits;
    uint64_t first = bale_align_up(offset, 1ull << bits) >> bits;
    BaleMutableFlush *flushes;

    pthread_mutex_lock(&m->lock);
    while (m->outs.length || m->journal_cluster != UINT64_MAX) {
        pthread_cond_wait(&m->idle, &m->lock);
    }
    bale_seqcache_discard(m->cache, offset, len);
    bale_patch_forget(&m->patched, first, UINT64_MAX - first, true);
    flushes = mutable_take_flushes(m, 0, 0);
    pthread_mutex_unlock(&m->lock);
    mutable_finish_flushes(m, flushes, 0);
}

/* --- patches that others ask about --- */

uint64_t bale_mutable_next_patched(BaleMutable *m, uint64_t first,
                                   uint64_t end)
{
    GHashTableIter iter;
    void *value;

    pthread_mutex_lock(&m->lock);
    g_hash_table_iter_init(&iter, m->patched.clusters);
    while (m->patched.patches && g_hash_table_iter_next(&iter, NULL, &value)) {
        BalePatched *p = value;

        if (p->patches && p->cluster >= first && p->cluster < end) {
            end = p->cluster;
        }
    }
    pthread_mutex_unlock(&m->lock);
    return end;
}

bool bale_mutable_any_patched(BaleMutable *m)
{
    bool any;

    pthread_mutex_lock(&m->lock);
    any = m->patched.patches > 0;
    pthread_mutex_unlock(&m->lock);
    return any;
}

/* The patch of @cluster at @address, or NULL.  Under the lock. */
static BalePatch *mutable_find_patch(BaleMutable *m, uint64_t cluster,
                                     uint64_t address)
{
    BalePatched *p = bale_patch_find(&m->patched, cluster);

    for (guint i = 0; p && p->patches && i < p->patches->len; i++) {
        BalePatch *patch = &g_array_index(p->patches, BalePatch, i);

        if (patch->address == address) {
            return patch;
        }
    }
    return NULL;
}

bool bale_mutable_patch_live(BaleMutable *m, uint64_t cluster,
                             uint64_t address)
{
    bool live;

    pthread_mutex_lock(&m->lock);
    live = mutable_find_patch(m, cluster, address) != NULL;
    pthread_mutex_unlock(&m->lock);
    return live;
}

void bale_mutable_patch_move(BaleMutable *m, uint64_t cluster,
                             uint64_t address, uint32_t len, uint64_t copy)
{
    BaleStore *s = m->image->store;
    BalePatch *patch;

    pthread_mutex_lock(&m->lock);
    patch = mutable_find_patch(m, cluster, address);
    if (patch) {
        patch->address = copy;
    } else {
        address = copy; /* superseded meanwhile: the copy is garbage */
    }
    pthread_mutex_lock(&s->log_lock);
    bale_page_live_sub(s, address, bale_patch_live(len));
    pthread_mutex_unlock(&s->log_lock);
    pthread_mutex_unlock(&m->lock);
}

void bale_mutable_lock(BaleMutable *m)
{
    pthread_mutex_lock(&m->lock);
}

void bale_mutable_unlock(BaleMutable *m)
{
    pthread_mutex_unlock(&m->lock);
}

void bale_mutable_foreach_patch(BaleMutable *m, BalePatchVisit *visit,
                                void *opaque)
{
    GHashTableIter iter;
    void *value;

    g_hash_table_iter_init(&iter, m->patched.clusters);
    while (g_hash_table_iter_next(&iter, NULL, &value)) {
        BalePatched *p = value;

        for (guint i = 0; p->patches && i < p->patches->len; i++) {
            BalePatch *patch = &g_array_index(p->patches, BalePatch, i);

            visit(opaque, patch->address, bale_patch_live(patch->len));
        }
    }
}
