/*
 * Batches: clusters that leave the mutable region together.
 *
 * Clusters that patches have saved can wait for company.  Then a worker reads
 * what is stored of them, merges and compresses one after the other, as far as
 * memory for the results goes.  Only now their write-outs begin: the records of
 * all that nobody has written to meanwhile are appended at one go, next to what
 * compaction copies.  So flushes that go on meanwhile have their segments to
 * themselves, none waits for a codec, and what stays lies apart from patches,
 * which soon are garbage.
 *
 * Invariants:
 *  1. A record that was made ahead is appended only if the cluster's newest
 *     patch is still the one that it holds, and nothing of it is unsaved: who
 *     writes to a cluster, or replaces it, changes that.
 *  2. It gets its number when it is appended, with the cluster in write-out: it
 *     is newer than all patches of the cluster.
 *  3. Pages that are kept from fresh data are not taken for these.
 *
 * Threads: workers, one at a time, and one batch of an image.  An error of one
 * cluster is its own.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "mutable-internal.h"

#include <errno.h>
#include <sched.h>
#include <string.h>

#include "util/memory.h"
#include "util/planted.h"

/* So many bytes of compressed clusters are appended at one go. */
#define BATCH_PACKED_BYTES (512u << 10)

/* Then the worker looks whether there is something more urgent. */
#define BATCH_PARTS_MAX 16u

#define SEQ_NONE UINT64_MAX

typedef struct BatchPart {
    uint64_t cluster;
    uint64_t seq; /* of its newest patch; SEQ_NONE: it is not for us any more */
    BaleRecord record;
    const uint8_t *payload;
    BaleMutableOut *out;
    int ret;
} BatchPart;

/* What is stored of a part is being read. */
typedef enum BatchReading {
    READ_NONE,
    READ_BEGUN,
    READ_DONE,
    READ_LEFT, /* and the worker has gone; who is done calls one */
} BatchReading;

struct BaleMutableBatch {
    BaleWork work;
    BaleMutable *m;
    BatchReading reading; /* atomic */
    unsigned n;
    unsigned first, next; /* packed but not appended: [first, next) */
    uint8_t *data;        /* one cluster */
    uint8_t *packed;
    size_t size, used;    /* of that */
    BatchPart parts[];
};

static void batch_free(BaleMutableBatch *b)
{
    bale_memory_free(b->data);
    bale_memory_free(b->packed);
    g_free(b);
}

/* The newest patch of @p, of which nothing is unsaved; else SEQ_NONE. */
static uint64_t patched_seq(const BalePatched *p)
{
    return p && !p->busy && p->unsaved.seq == UINT64_MAX && p->patches
               ? g_array_index(p->patches, BalePatch, p->patches->len - 1).seq
               : SEQ_NONE;
}

/* Under the lock: is what we have of @part still all? */
static bool part_current(BaleMutableBatch *b, const BatchPart *part)
{
    BaleMutable *m = b->m;

    return !m->frozen && part->seq != SEQ_NONE &&
           (patched_seq(bale_patch_find(&m->patched, part->cluster)) ==
                part->seq || BALE_PLANTED(batch_stale));
}

BaleMutableBatch *bale_mutable_batch_new(BaleMutable *m, unsigned max)
{
    uint32_t cluster_size = m->image->store->cluster_size;
    g_autofree uint64_t *offsets = g_new(uint64_t, max);
    BaleMutableBatch *b;
    unsigned n;

    n = bale_seqcache_list_finished(m->cache, offsets, max);
    b = g_malloc0(sizeof(*b) + n * sizeof(b->parts[0]));
    b->m = m;
    b->size = MAX(BATCH_PACKED_BYTES, cluster_size);
    b->packed = bale_memory_try_alloc(BALE_BLOCK_SIZE, b->size);
    b->data = bale_memory_try_alloc(BALE_BLOCK_SIZE, cluster_size);
    for (unsigned i = 0; i < n; i++) {
        uint64_t cluster = offsets[i] / cluster_size;
        uint64_t seq = patched_seq(bale_patch_find(&m->patched, cluster));

        if (seq != SEQ_NONE) {
            b->parts[b->n++] = (BatchPart){ .cluster = cluster, .seq = seq };
        }
    }
    if (!b->packed || !b->data || b->n == 0) {
        batch_free(b);
        return NULL;
    }
    m->batching = true;
    return b;
}

/* May these records lie where copies do? */
static bool batch_aside(BaleStore *s)
{
    bool aside;

    if (bale_store_write_begin(s) < 0) {
        return false;
    }
    pthread_mutex_lock(&s->log_lock);
    aside = bale_page_has_fresh(s);
    pthread_mutex_unlock(&s->log_lock);
    bale_store_write_end(s);
    return aside;
}

/* Begin the write-outs of the parts that are packed. */
static void batch_begin_outs(BaleMutableBatch *b)
{
    BaleMutable *m = b->m;
    BaleStore *s = m->image->store;

    pthread_mutex_lock(&m->lock);
    for (unsigned i = b->first; i < b->next; i++) {
        BatchPart *part = &b->parts[i];
        BaleSeqcacheOut *out = NULL;
        int err;

        if (part_current(b, part)) {
            out = bale_seqcache_begin_at(
                m->cache, part->cluster << s->cluster_bits, &err);
        }
        if (out) {
            part->out = bale_mutable_out_new(m, out);
            bale_background_begin(s);
        }
    }
    pthread_mutex_unlock(&m->lock);
}

/* Append the parts that are packed. */
static void batch_append(BaleMutableBatch *b)
{
    BaleImage *image = b->m->image;
    BaleStore *s = image->store;
    bool aside = batch_aside(s);
    uint64_t bytes = 0;

    batch_begin_outs(b);
    for (unsigned i = b->first; i < b->next; i++) {
        BatchPart *part = &b->parts[i];

        if (part->out && part->ret == 0) {
            part->ret = bale_image_put_packed(image, &part->record,
                                              part->payload, aside);
            bytes += part->ret == 0 ? bale_record_size(&part->record) : 0;
        }
    }
    if (aside) {
        pthread_mutex_lock(&s->log_lock);
        bale_ahead_spend(s, bytes);
        pthread_mutex_unlock(&s->log_lock);
    }
    for (; b->first < b->next; b->first++) {
        BatchPart *part = &b->parts[b->first];

        if (part->out) {
            bale_mutable_out_end(part->out, part->ret);
        }
    }
    b->used = 0;
}

/*
 * Nobody waits for us, but the thread that takes a flush's completion from the
 * device may wait for this processor.
 */
static void batch_make_way(void)
{
    sched_yield();
}

/* Lay what is cached over what is stored.  False: it has changed. */
static bool batch_merge(BaleMutableBatch *b, const BatchPart *part)
{
    BaleMutable *m = b->m;
    uint32_t cluster_size = m->image->store->cluster_size;
    uint64_t begin = part->cluster << m->image->store->cluster_bits;
    size_t run;
    bool current;

    pthread_mutex_lock(&m->lock);
    current = part_current(b, part);
    for (uint32_t at = 0; current && at < cluster_size; at += run) {
        bale_seqcache_read_buf(m->cache, begin + at, cluster_size - at,
                               b->data + at, &run);
    }
    pthread_mutex_unlock(&m->lock);
    return current;
}

/* Compress the next part; what is stored of it is in memory. */
static void batch_pack(BaleMutableBatch *b, BaleWorkerContext *wc)
{
    BatchPart *part = &b->parts[b->next++];
    uint8_t *packed = b->packed + b->used;

    if (part->ret < 0) {
        return;
    }
    if (!batch_merge(b, part)) {
        part->seq = SEQ_NONE;
        return;
    }
    batch_make_way();
    part->ret = bale_image_pack_cluster(b->m->image, wc, part->cluster,
                                        b->data, packed, &part->record,
                                        &part->payload);
    if (part->ret == 0 && part->payload) {
        if (part->payload == b->data) {
            memcpy(packed, b->data, part->record.payload_len);
            part->payload = packed;
        }
        b->used += part->record.payload_len;
    }
}

static void batch_end(BaleMutableBatch *b)
{
    BaleMutable *m = b->m;
    BaleStore *s = m->image->store;

    batch_free(b);
    pthread_mutex_lock(&m->lock);
    m->batching = false;
    pthread_cond_broadcast(&m->idle);
    pthread_mutex_unlock(&m->lock);
    bale_mutable_kick(m);
    bale_background_end(s);
}

/* Is the next part, of those that are still ours, complete in memory? */
static bool batch_look(BaleMutableBatch *b)
{
    BaleMutable *m = b->m;
    bool complete;

    pthread_mutex_lock(&m->lock);
    while (b->next < b->n && !part_current(b, &b->parts[b->next])) {
        b->parts[b->next++].seq = SEQ_NONE;
    }
    complete = b->next < b->n &&
               bale_mutable_complete(m, b->parts[b->next].cluster);
    pthread_mutex_unlock(&m->lock);
    return complete;
}

/* What is stored of the next part is there, or cannot be had. */
static void batch_read(void *opaque, int ret)
{
    BaleMutableBatch *b = opaque;

    b->parts[b->next].ret = ret;
    if (__atomic_exchange_n(&b->reading, READ_DONE, __ATOMIC_ACQ_REL) ==
        READ_LEFT) {
        bale_workers_push(b->m->image->store->workers, &b->work,
                          BALE_WORK_BULK);
    }
}

/* Read what is stored of the next part.  False: batch_read() goes on. */
static bool batch_get(BaleMutableBatch *b)
{
    __atomic_store_n(&b->reading, READ_BEGUN, __ATOMIC_RELEASE);
    bale_image_read_stored(b->m->image, b->parts[b->next].cluster, b->data,
                           true, batch_read, b);
    /* If it was not done by now, then @b may be gone when we look again. */
    return __atomic_exchange_n(&b->reading, READ_LEFT, __ATOMIC_ACQ_REL) ==
           READ_DONE;
}

/* On a worker: go on until there is something to be waited for. */
static void batch_work(BaleWork *work, void *context, unsigned worker)
{
    BaleMutableBatch *b = (BaleMutableBatch *)((char *)work -
                                               offsetof(BaleMutableBatch,
                                                        work));
    BaleWorkers *workers = b->m->image->store->workers;
    uint32_t cluster_size = b->m->image->store->cluster_size;

    if (__atomic_load_n(&b->reading, __ATOMIC_ACQUIRE) == READ_DONE) {
        batch_pack(b, context);
    }
    for (unsigned i = 0; i < BATCH_PARTS_MAX; i++) {
        bool complete;

        batch_make_way();
        if (b->size - b->used < cluster_size) {
            batch_append(b);
        }
        complete = batch_look(b);
        if (b->next == b->n) {
            batch_append(b);
            batch_end(b);
            return;
        }
        if (!complete && !batch_get(b)) {
            return;
        }
        batch_pack(b, context);
    }
    __atomic_store_n(&b->reading, READ_NONE, __ATOMIC_RELEASE);
    bale_workers_push(workers, &b->work, BALE_WORK_BULK);
}

void bale_mutable_batch_start(BaleMutableBatch *b)
{
    BaleStore *s = b->m->image->store;

    bale_background_begin(s);
    b->work.fn = batch_work;
    bale_workers_push(s->workers, &b->work, BALE_WORK_BULK);
}
