/*
 * Reading clusters of an image.
 *
 * A read looks into the mutable region, the index and the cache; what it must
 * fetch it fetches with one transfer for neighbours, and verifies and
 * decompresses it on the workers, or in the completing thread when it is alone.
 *
 * Invariants:
 *  1. A page is not reused under a read, of the device or of a write buffer:
 *     the reader is counted, under log_lock, while the index still points into
 *     the page.
 *  2. Nothing that was read reaches the caller before its checksums verified.
 *
 * Threads: any; completions run on the device's, a worker's or the caller's.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "request-internal.h"

#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "util/checksum.h"
#include "util/memory.h"
#include "util/planted.h"

/* One device transfer joins records that are at most this far apart. */
#define READ_GAP_MAX (32u << 10)
/* ... and is at most this long, unless one record is longer; bytes. */
#define READ_RUN_MAX (2u << 20)
/* How many of a request's transfers are looked at to join a record; number. */
#define READ_RUNS_LOOK_MAX 8u
/* How often a read looks again when the index moved on under it. */
#define READ_RETRIES_MAX 100
/* Requests of this many bytes and more need no read-ahead and no cache. */
#define READ_LARGE (512u << 10)
/* Clusters that one call decompresses in the workers' place. */
#define READS_HELP_MAX 64u
/* Longer clusters are always decompressed by workers. */
#define INLINE_CLUSTER_MAX (128u << 10)

/* Records that are fetched with one device transfer. */
struct BaleReadRun {
    BaleDeviceIo io;
    BaleStore *store;
    uint64_t page;
    uint64_t version;
    uint64_t begin, end; /* on the device */
    BaleClusterOp *ops, **ops_tail;
    unsigned refs;       /* atomic: ops that still use buf */
    BaleReadRun *next;
    bool gated;          /* a small read */
    BaleGateItem gate;
};

static void op_read_start(BaleClusterOp *op, BaleReadRun **runs);

static void run_release(BaleReadRun *run)
{
    BaleStore *s = run->store;

    if (__atomic_sub_fetch(&run->refs, 1, __ATOMIC_ACQ_REL) > 0) {
        return;
    }
    pthread_mutex_lock(&s->log_lock);
    bale_page(s, run->page)->readers--;
    bale_page_consider(s, run->page);
    pthread_mutex_unlock(&s->log_lock);
    bale_memory_free(run->io.buf);
    g_free(run);
}

/* The record is not needed any more; others who wait for it look again. */
static void op_read_release(BaleClusterOp *op)
{
    BaleCacheWaiter *waiter = bale_cache_load_end(&op->load);

    if (op->pinned) {
        bale_log_unpin(op->req->image->store, op->pinned);
        op->pinned = NULL;
    }
    if (op->run) {
        run_release(op->run);
        op->run = NULL;
    }
    while (waiter) {
        BaleClusterOp *next = (BaleClusterOp *)((char *)waiter -
                                        offsetof(BaleClusterOp, waiter));
        BaleReadRun *runs = NULL;

        waiter = waiter->next;
        op_read_start(next, &runs);
    }
}

int bale_image_unpack(BaleImage *image, BaleWorkerContext *wc,
                      uint64_t address, uint64_t version, uint64_t cluster,
                      const uint8_t *buf, size_t avail, uint8_t *dst)
{
    BaleStore *s = image->store;
    uint64_t page = (address - BALE_SUPER_SIZE) / s->page_size;
    uint64_t offset = (address - BALE_SUPER_SIZE) % s->page_size;
    uint64_t seed = bale_place(s->identity, page, version, offset);
    const uint8_t *payload;
    BaleRecord r;

    if (bale_record_decode(&r, seed, s->cluster_size, buf, avail) < 0 ||
        r.type != BALE_RECORD_DATA || r.version != version ||
        !bale_image_shows_layer(image, r.layer) || r.cluster != cluster ||
        (size_t)r.header_len + r.payload_len > avail) {
        return -EIO;
    }
    payload = buf + r.header_len;
    if (bale_checksum(payload, r.payload_len, seed) != r.payload_sum &&
        !BALE_PLANTED(payload_unchecked)) {
        return -EIO;
    }
    if (r.codec == BALE_CODEC_NONE) {
        memcpy(dst, payload, s->cluster_size);
        return 0;
    }
    return bale_codec_decompress(wc->codec, r.codec, dst, s->cluster_size,
                                 payload, r.payload_len);
}

static void op_report_damage(BaleClusterOp *op)
{
    BaleStore *s = op->req->image->store;
    g_autofree char *what = NULL;

    stat_add(&s->stats.checksum_errors, 1);
    if (s->options.damage) {
        uint64_t address = bale_value_address(op->value) - BALE_SUPER_SIZE;

        what = g_strdup_printf("damaged record of image '%s', cluster %"
                               PRIu64 ", page %" PRIu64 ", offset %" PRIu64,
                               op->req->image->record.name, op->cluster,
                               address / s->page_size,
                               address % s->page_size);
        s->options.damage(s->options.notify_opaque, what);
    }
}

/* What is read in small pieces, or ahead, is kept in the cache. */
static bool op_is_kept(const BaleClusterOp *op)
{
    const BaleRequest *req = op->req;

    return bale_cache_max_bytes(req->image->store->cache) > 0 &&
           (req->kind == REQUEST_READAHEAD ||
            (req->kind == REQUEST_READ && req->len < READ_LARGE));
}

/*
 * The record is in memory: decompress it to where it belongs.  Not into the
 * caller's memory what goes to the cache, as that may be a guest's.
 */
static int op_unpack(BaleClusterOp *op, BaleWorkerContext *wc)
{
    BaleRequest *req = op->req;
    BaleImage *image = req->image;
    BaleStore *s = image->store;
    bool ahead = req->kind == REQUEST_READAHEAD;
    uint8_t *buf = NULL, *dst = NULL;
    int ret;

    if (op_is_kept(op)) {
        dst = buf = bale_cache_buffer_get(s->cache);
    } else if (!ahead && op->len == s->cluster_size) {
        dst = bale_iov_piece(req->iov, req->iovcnt, op->at, op->len);
    }
    dst = dst ? dst : wc->cluster;
    ret = bale_image_unpack(image, wc, bale_value_address(op->value),
                            op->version, op->cluster, op->src, op->avail,
                            dst);
    if (ret == 0 && !ahead && (buf || dst == wc->cluster)) {
        bale_iov_copy(req->iov, req->iovcnt, op->at, dst + op->offset, op->len,
                 true);
    }
    if (buf && ret == 0) {
        /* Still a reader of the page: the value cannot come back. */
        bale_cache_put(s->cache, image, op->cluster, op->value, buf,
                       ahead       ? BALE_CACHE_AHEAD
                       : req->scan ? BALE_CACHE_SCAN
                                   : BALE_CACHE_RANDOM);
    } else if (buf) {
        bale_cache_buffer_put(s->cache, buf);
    }
    return ret;
}

/* On a worker: the record is in memory. */
static void op_read_work(BaleWork *work, void *context, unsigned worker)
{
    BaleClusterOp *op = bale_op_of_work(work);
    BaleImage *image = op->req->image;
    int ret = op_unpack(op, context);

    op_read_release(op);
    if (ret == -EIO) {
        BaleReadRun *runs = NULL;

        /*
         * A record that was superseded, and whose page was reused, before we
         * could count as its reader is no damage: look again.
         */
        if (bale_image_find(image, op->cluster) != op->value &&
            op->retries++ < READ_RETRIES_MAX) {
            op_read_start(op, &runs);
            return;
        }
        op_report_damage(op);
    }
    bale_op_done(op, ret);
}

/*
 * The record is in memory.  When nobody else reads, then the way to a worker
 * and back takes longer than what could be done meanwhile is worth: this
 * thread, the device's or the caller's, decompresses one small cluster itself.
 */
static void op_read_fetched(BaleClusterOp *op)
{
    BaleRequest *req = op->req;
    BaleStore *s = req->image->store;
    uint64_t own = req->kind == REQUEST_READ; /* only these are counted */

    if ((own || req->in_place) && req->n == 1 &&
        s->cluster_size <= INLINE_CLUSTER_MAX &&
        __atomic_load_n(&s->reads_in_flight, __ATOMIC_RELAXED) == own &&
        !__atomic_exchange_n(&s->inline_busy, 1, __ATOMIC_ACQUIRE)) {
        int ret = op_unpack(op, &s->inline_context);

        __atomic_store_n(&s->inline_busy, 0, __ATOMIC_RELEASE);
        if (ret != -EIO) {
            op_read_release(op);
            bale_op_done(op, ret);
            return;
        }
        /* A worker looks at it again, and may wait for the device. */
    }
    op->work.fn = op_read_work;
    bale_workers_push(s->workers, &op->work, BALE_WORK_URGENT);
}

bool bale_reads_help(BaleStore *s)
{
    bool any = false, more = true;

    for (unsigned i = 0; i < READS_HELP_MAX && more; i++) {
        more = !__atomic_exchange_n(&s->inline_busy, 1, __ATOMIC_ACQUIRE);
        if (more) {
            more = !BALE_PLANTED(reads_wait_for_room) &&
                   bale_workers_help(s->workers, BALE_WORK_URGENT,
                                     op_read_work, &s->inline_context);
            __atomic_store_n(&s->inline_busy, 0, __ATOMIC_RELEASE);
        }
        any |= more;
    }
    return any;
}

static BaleGateLoad gate_load(BaleStore *s)
{
    return (BaleGateLoad){
        .decoders = bale_workers_threads(s->workers),
        .asked = __atomic_load_n(&s->reads_in_flight, __ATOMIC_RELAXED),
    };
}

static void run_done(BaleDeviceIo *io, int ret)
{
    BaleReadRun *run = (BaleReadRun *)((char *)io - offsetof(BaleReadRun, io));
    BaleStore *s = run->store;
    BaleClusterOp *op = run->ops;

    if (run->gated) {
        BaleGateLoad load = gate_load(s);

        /* The device first: it is to be busy while we decompress. */
        bale_read_gate_leave(&s->read_gate, &load, bale_now_ns());
    }
    while (op) {
        BaleClusterOp *next = op->run_next;

        if (ret < 0) {
            op_read_release(op);
            bale_op_done(op, ret);
        } else {
            uint64_t address = bale_value_address(op->value);

            op->src = (uint8_t *)io->buf + (address - run->begin);
            op->avail = run->end - address;
            op_read_fetched(op);
        }
        op = next;
    }
}

/* Submit a list of runs. */
static void runs_submit(BaleStore *s, BaleReadRun *runs)
{
    if (runs && s->dev->ops->plug) {
        s->dev->ops->plug(s->dev);
    }
    for (BaleReadRun *run = runs, *next; run; run = next) {
        const BaleRequest *req = run->ops->req;

        next = run->next;
        run->io.offset = run->begin;
        run->io.len = run->end - run->begin;
        run->io.done = run_done;
        run->io.may_block = req->in_place;
        run->io.buf = bale_memory_try_alloc(BALE_BLOCK_SIZE, run->io.len);
        run->gated = run->io.buf && req->kind == REQUEST_READ && req->n == 1;
        if (run->gated) {
            BaleGateLoad load = gate_load(s);

            if (bale_read_gate_enter(&s->read_gate, &run->gate, &run->io,
                                     &load)) {
                stat_add(&s->stats.reads_held, 1);
            }
        } else if (run->io.buf) {
            s->dev->ops->get(s->dev, &run->io);
        } else {
            run_done(&run->io, -ENOMEM);
        }
    }
    if (runs && s->dev->ops->unplug) {
        s->dev->ops->unplug(s->dev);
    }
}

/*
 * Put @op's record, at @address in @page, on one of @runs or on a new one.
 * Under log_lock.
 */
static bool op_join_run(BaleClusterOp *op, uint64_t page, BaleReadRun **runs)
{
    BaleStore *s = op->req->image->store;
    BalePage *p = bale_page(s, page);
    uint64_t address = bale_value_address(op->value);
    uint32_t align = s->dev_info.block_size; /* often less than a block */
    uint64_t begin = bale_align_down(address, align);
    uint64_t end = address + BALE_RECORD_HEADER_LEN +
                   bale_class_len(bale_value_class(op->value),
                                  s->cluster_size);
    BaleReadRun *run = *runs;

    end = MIN(bale_align_up(end, align),
              page_address(s, page) + s->page_size);
    /* Parallel writers leave neighbours in any order. */
    for (unsigned i = 0; run && i < READ_RUNS_LOOK_MAX; i++) {
        if (run->page == page && begin <= run->end + READ_GAP_MAX &&
            run->begin <= end + READ_GAP_MAX &&
            MAX(end, run->end) - MIN(begin, run->begin) <= READ_RUN_MAX) {
            break;
        }
        run = i + 1 < READ_RUNS_LOOK_MAX ? run->next : NULL;
    }
    if (!run) {
        run = g_try_new0(BaleReadRun, 1);
        if (!run) {
            return false;
        }
        run->store = s;
        run->page = page;
        run->version = p->version;
        run->begin = begin;
        run->end = end;
        run->ops_tail = &run->ops;
        run->next = *runs;
        *runs = run;
        p->readers++;
    }
    run->begin = MIN(run->begin, begin);
    run->end = MAX(run->end, end);
    run->refs++;
    op->run = run;
    op->version = run->version;
    op->run_next = NULL;
    *run->ops_tail = op;
    run->ops_tail = &op->run_next;
    return true;
}

static void op_backing_done(void *opaque, int ret)
{
    BaleClusterOp *op = opaque;

    if (ret == 0 && op->buf) {
        bale_iov_copy(op->req->iov, op->req->iovcnt, op->at, op->buf, op->len,
                 true);
    }
    bale_op_done(op, ret);
}

/* Nothing of our own is there. */
static void op_read_backing(BaleClusterOp *op)
{
    BaleRequest *req = op->req;
    BaleImage *image = req->image;
    uint8_t *dst;

    if (!bale_image_has_backing(image) || req->kind == REQUEST_READ_STORED) {
        bale_iov_copy(req->iov, req->iovcnt, op->at, NULL, op->len, true);
        bale_op_done(op, 0);
        return;
    }
    dst = bale_iov_piece(req->iov, req->iovcnt, op->at, op->len);
    if (!dst) {
        op->buf = dst = bale_memory_try_alloc(BALE_BLOCK_SIZE, op->len);
    }
    if (!dst) {
        bale_op_done(op, -ENOMEM);
        return;
    }
    image->backing_read(image->backing_opaque,
                        req->offset + op->at, dst, op->len, op_backing_done,
                        op);
}

static bool op_read_cached(BaleClusterOp *op)
{
    BaleRequest *req = op->req;
    BaleImage *image = req->image;
    uint8_t *dst = bale_iov_piece(req->iov, req->iovcnt, op->at, op->len);
    BALE_AUTO_MEMORY uint8_t *copy = NULL;

    if (!dst) {
        dst = copy = bale_memory_try_alloc(64, op->len);
    }
    if (!dst || !bale_cache_get(image->store->cache, op->cluster,
                                op->value, op->offset, dst, op->len)) {
        return false;
    }
    if (copy) {
        bale_iov_copy(req->iov, req->iovcnt, op->at, copy, op->len, true);
    }
    return true;
}

/*
 * Look the cluster up and answer from where it is.  Runs are collected in
 * @runs if the caller submits them (@runs points at a list that may be
 * non-empty or at NULL; they are submitted here if @op is a retry).
 */
static void op_read_lookup(BaleClusterOp *op, BaleReadRun **runs)
{
    BaleRequest *req = op->req;
    BaleImage *image = req->image;
    BaleStore *s = image->store;
    BaleCacheWaiter *waiter;
    const uint8_t *src;
    uint64_t page, offset;
    bool joined = true;

    /* The mutable region first, the index second: see mutable.c. */
    if (req->kind == REQUEST_READ && !op->runs) {
        size_t n = bale_mutable_read(image->mutable_region,
                                     req->offset + op->at, op->len, &op->over,
                                     &op->runs);

        if (n == SIZE_MAX || n == op->len) {
            bale_op_done(op, n == SIZE_MAX ? -ENOMEM : 0);
            return;
        }
    }
    op->value = bale_image_find(image, op->cluster);
    if (req->kind == REQUEST_READAHEAD &&
        (!bale_value_class(op->value) ||
         bale_cache_has(s->cache, op->cluster, op->value))) {
        bale_op_done(op, 0);
        return;
    }
    if (op->value == 0 && req->kind == REQUEST_READ &&
        bale_image_has_backing(image)) {
        /*
         * What waits in the mutable region, of a cluster that is not stored,
         * was written when nothing lay under the image: its gaps are zero.  If
         * it has left the region by now, then the index knows it.
         */
        if (bale_mutable_cached(image->mutable_region,
                                op->cluster << s->cluster_bits,
                                s->cluster_size)) {
            bale_iov_copy(req->iov, req->iovcnt, op->at, NULL, op->len, true);
            bale_op_done(op, 0);
            return;
        }
        op->value = bale_image_find(image, op->cluster);
    }
    if (op->value == 0) {
        op_read_backing(op);
        return;
    }
    if (!bale_value_class(op->value)) {
        bale_iov_copy(req->iov, req->iovcnt, op->at, NULL, op->len, true);
        bale_op_done(op, 0);
        return;
    }
    if (req->kind != REQUEST_READAHEAD && req->len < READ_LARGE &&
        bale_cache_max_bytes(s->cache) > 0) {
        bool hit = op_read_cached(op);

        stat_add(hit ? &s->stats.cache_hits : &s->stats.cache_misses, 1);
        if (hit) {
            bale_op_done(op, 0);
            return;
        }
    }

    waiter = req->kind == REQUEST_READ ? &op->waiter : NULL;
    if (op_is_kept(op) &&
        !bale_cache_load_begin(s->cache, &op->load, op->cluster, op->value,
                               waiter)) {
        /* One who waits may have ended by now, and @op with it. */
        if (!waiter) {
            bale_op_done(op, 0);
        }
        return;
    }
    pthread_mutex_lock(&s->log_lock);
    /* While the index points into a page that page is not freed. */
    op->value = bale_image_find(image, op->cluster);
    if (!bale_value_class(op->value) ||
        !bale_address_split(s, bale_value_address(op->value), &page,
                            &offset)) {
        pthread_mutex_unlock(&s->log_lock);
        op_read_release(op);
        if (bale_value_class(op->value)) {
            op_report_damage(op);
            bale_op_done(op, -EIO);
        } else {
            op_read_lookup(op, runs); /* it became zero just now */
        }
        return;
    }
    src = bale_log_pin(s, bale_value_address(op->value), &op->pinned,
                       &op->avail);
    if (src) {
        op->src = src;
        op->version = op->pinned->version;
    } else {
        joined = op_join_run(op, page, runs);
    }
    pthread_mutex_unlock(&s->log_lock);

    if (src) {
        stat_add(&s->stats.memory_hits, 1);
        op_read_fetched(op);
    } else if (!joined) {
        op_read_release(op);
        bale_op_done(op, -ENOMEM);
    }
}

static void op_read_start(BaleClusterOp *op, BaleReadRun **runs)
{
    BaleStore *s = op->req->image->store;

    op_read_lookup(op, runs); /* may complete the request */
    runs_submit(s, *runs);
    *runs = NULL;
}

void bale_request_read(BaleRequest *req)
{
    BaleStore *s = req->image->store;
    BaleReadRun *runs = NULL;

    req->pending += req->n;
    for (unsigned i = 0; i < req->n; i++) {
        op_read_lookup(&req->ops[i], &runs);
    }
    runs_submit(s, runs);
    bale_request_unref(req);
}

static void image_readahead(BaleImage *image, uint64_t offset, uint64_t len,
                            bool *scan)
{
    BaleStore *s = image->store;
    uint64_t from, to;
    BaleRequest *req;

    if (!bale_readahead_want(image, offset, len, scan, &from, &to)) {
        return;
    }
    req = bale_request_new(image, REQUEST_READAHEAD, from, to - from, NULL,
                           NULL);
    if (!req) {
        return;
    }
    stat_add(&s->stats.readahead, 1);
    stat_add(&s->stats.readahead_bytes, to - from);
    bale_background_begin(s);
    bale_request_add_clusters(req);
    bale_request_read(req);
}

void bale_image_read(BaleImage *image, uint64_t offset,
                     const struct iovec *iov, int iovcnt, BaleDone *done,
                     void *opaque)
{
    BaleStore *s = image->store;
    uint64_t len = bale_iov_len(iov, iovcnt);
    BaleRequest *req;

    if (bale_image_is_doubtful(image)) {
        done(opaque, -EIO);
        return;
    }
    req = bale_request_begin(image, REQUEST_READ, offset, len, done, opaque);
    if (!req) {
        return;
    }
    stat_add(&s->stats.reads, 1);
    stat_add(&s->stats.read_bytes, len);
    req->iov = iov;
    req->iovcnt = iovcnt;
    if (len > 0 && len < READ_LARGE && bale_cache_max_bytes(s->cache) > 0) {
        image_readahead(image, offset, len, &req->scan);
    }
    bale_request_read(req);
}
