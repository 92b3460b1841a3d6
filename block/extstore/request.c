/*
 * Requests on the clusters of an image.
 *
 * A write takes its range of clusters (in order of arrival; requests that
 * share a cluster run one after the other), then goes cluster by cluster to
 * the workers: copy, compress, append to the log, set the index.  Partial
 * clusters go to the mutable region, and to the workers when they leave it.
 * Reads are in request-read.c.
 *
 * Invariants:
 *  1. While a write, zero or resize holds a cluster's range nobody else changes
 *     the index there: the order of the sequence numbers of a cluster's
 *     records is the order in which the index saw them.
 *  2. The index is set after the record can be read at its address, and before
 *     the request completes.
 *
 * The data of a write is copied before it is compressed: it may be a guest's
 * memory, which can change while the codec looks at it.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "request-internal.h"

#include <errno.h>
#include <string.h>

#include "util/memory.h"
#include "util/planted.h"

/* A zero request: a part of a cluster, whole ones, a part of another. */
#define ZERO_OPS_MAX 3u

/* --- helpers --- */

uint64_t bale_iov_len(const struct iovec *iov, int iovcnt)
{
    uint64_t len = 0;

    for (int i = 0; i < iovcnt; i++) {
        len += iov[i].iov_len;
    }
    return len;
}

void bale_iov_copy(const struct iovec *iov, int iovcnt, uint64_t at,
                   void *buf, uint64_t len, bool to_iov)
{
    uint8_t *b = buf;

    for (int i = 0; i < iovcnt && len > 0; i++) {
        uint8_t *p = iov[i].iov_base;
        uint64_t n;

        if (at >= iov[i].iov_len) {
            at -= iov[i].iov_len;
            continue;
        }
        n = MIN(iov[i].iov_len - at, len);
        if (!to_iov) {
            memcpy(b, p + at, n);
        } else if (b) {
            memcpy(p + at, b, n);
        } else {
            memset(p + at, 0, n);
        }
        b = b ? b + n : NULL;
        len -= n;
        at = 0;
    }
    g_assert(len == 0);
}

uint8_t *bale_iov_piece(const struct iovec *iov, int iovcnt, uint64_t at,
                        uint64_t len)
{
    for (int i = 0; i < iovcnt; i++) {
        if (at < iov[i].iov_len) {
            return len <= iov[i].iov_len - at
                       ? (uint8_t *)iov[i].iov_base + at
                       : NULL;
        }
        at -= iov[i].iov_len;
    }
    return NULL;
}

/* Bytes of @cluster that lie inside the image. */
static uint32_t cluster_len(BaleImage *image, uint64_t cluster)
{
    BaleStore *s = image->store;
    uint64_t begin = cluster << s->cluster_bits;
    uint64_t size = bale_image_size(image);

    return begin >= size ? 0 : MIN(size - begin, s->cluster_size);
}

/* --- range lock: writes that share clusters run in order of arrival --- */

static bool ranges_overlap(const BaleRequest *a, const BaleRequest *b)
{
    return a->first <= b->last && b->first <= a->last;
}

static bool range_conflicts(const BaleRequest *list, const BaleRequest *end,
                            const BaleRequest *req)
{
    for (; list && list != end; list = list->next) {
        if (ranges_overlap(list, req)) {
            return true;
        }
    }
    return false;
}

/* True: go on.  False: @req waits, and is started when its turn comes. */
static bool range_acquire(BaleRequest *req)
{
    BaleImage *image = req->image;
    bool granted;

    pthread_mutex_lock(&image->range_lock);
    granted = !range_conflicts(image->ranges_active, NULL, req) &&
              !range_conflicts(image->ranges_waiting, NULL, req);
    if (granted) {
        req->next = image->ranges_active;
        image->ranges_active = req;
    } else {
        req->next = NULL;
        *image->ranges_waiting_tail = req;
        image->ranges_waiting_tail = &req->next;
    }
    pthread_mutex_unlock(&image->range_lock);
    return granted;
}

/* Give the range back; a list of requests that can go on now. */
static BaleRequest *range_release(BaleRequest *req)
{
    BaleImage *image = req->image;
    BaleRequest **p, *granted[16], *list = NULL;
    unsigned n = 0;

    pthread_mutex_lock(&image->range_lock);
    for (p = &image->ranges_active; *p != req; p = &(*p)->next) {
        continue;
    }
    *p = req->next;
    p = &image->ranges_waiting;
    while (*p && n < G_N_ELEMENTS(granted)) {
        BaleRequest *w = *p;

        if (range_conflicts(image->ranges_active, NULL, w) ||
            range_conflicts(image->ranges_waiting, w, w)) {
            p = &w->next;
            continue;
        }
        *p = w->next;
        if (!*p) {
            image->ranges_waiting_tail = p;
        }
        w->next = image->ranges_active;
        image->ranges_active = w;
        granted[n++] = w;
    }
    pthread_mutex_unlock(&image->range_lock);
    while (n > 0) {
        BaleRequest *w = granted[--n];

        /* "next" belongs to the active list: chain through own_iov. */
        w->own_iov.iov_base = list;
        list = w;
    }
    return list;
}

static void write_start(BaleRequest *req);

/* --- requests --- */

static void request_free(BaleRequest *req)
{
    for (unsigned i = 0; i < req->n; i++) {
        bale_memory_free(req->ops[i].buf);
        bale_memory_free(req->ops[i].over);
        if (req->ops[i].runs) {
            g_array_free(req->ops[i].runs, TRUE);
        }
    }
    g_free(req);
}

static void request_complete(BaleRequest *req, int ret)
{
    BaleStore *s = req->image->store;
    uint64_t ns = bale_now_ns() - req->start_ns;

    if (req->kind == REQUEST_READ) {
        bale_histogram_add(&s->read_hist, ns);
        __atomic_fetch_sub(&s->reads_in_flight, 1, __ATOMIC_RELAXED);
    } else if (req->kind == REQUEST_WRITE || req->kind == REQUEST_ZERO) {
        bale_histogram_add(&s->write_hist, ns);
        __atomic_fetch_sub(&s->writes_in_flight, 1, __ATOMIC_RELAXED);
    }
    if (req->done) {
        req->done(req->opaque, ret);
    }
    if (req->kind == REQUEST_READAHEAD) {
        bale_background_end(s);
    }
    request_free(req);
}

/* Does @req hold the range of its clusters? */
static bool request_writes(const BaleRequest *req)
{
    return req->kind == REQUEST_WRITE || req->kind == REQUEST_ZERO ||
           req->kind == REQUEST_COPY_UP;
}

static void request_flushed(void *opaque, int ret)
{
    request_complete(opaque, ret);
}

static void store_flush(BaleStore *store, bool write_out, bool counted,
                        BaleDone *done, void *opaque);

/* FUA: what completed before is promised, too, in whichever image. */
static void request_flush(BaleRequest *req)
{
    if (BALE_PLANTED(fua_one_image)) {
        bale_mutable_flush(req->image->mutable_region, false, request_flushed,
                           req);
        return;
    }
    store_flush(req->image->store, false, false, request_flushed, req);
}

void bale_request_unref(BaleRequest *req)
{
    int ret;

    if (__atomic_sub_fetch(&req->pending, 1, __ATOMIC_ACQ_REL) > 0) {
        return;
    }
    ret = __atomic_load_n(&req->ret, __ATOMIC_ACQUIRE);
    if (request_writes(req)) {
        BaleRequest *list = range_release(req);

        while (list) {
            BaleRequest *w = list;

            list = w->own_iov.iov_base;
            write_start(w);
        }
        if (ret == 0 && (req->flags & BALE_FUA) &&
            !BALE_PLANTED(fua_ignored)) {
            request_flush(req);
            return;
        }
    }
    request_complete(req, ret);
}

void bale_op_done(BaleClusterOp *op, int ret)
{
    BaleRequest *req = op->req;
    int zero = 0;

    if (ret < 0) {
        __atomic_compare_exchange_n(&req->ret, &zero, ret, false,
                                    __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
    } else if (op->runs) {
        for (guint i = 0; i < op->runs->len; i++) {
            BaleMutableRun *r = &g_array_index(op->runs, BaleMutableRun, i);

            bale_iov_copy(req->iov, req->iovcnt, op->at + r->start,
                     op->over + r->start, r->len, true);
        }
    }
    bale_request_unref(req);
}

BaleRequest *bale_request_new(BaleImage *image, BaleRequestKind kind,
                              uint64_t offset, uint64_t len, BaleDone *done,
                              void *opaque)
{
    BaleStore *s = image->store;
    uint64_t n = kind == REQUEST_ZERO ? ZERO_OPS_MAX
                                      : len / s->cluster_size + 2;
    BaleRequest *req =
        g_try_malloc0(sizeof(*req) + n * sizeof(req->ops[0]));

    if (req) {
        req->image = image;
        req->kind = kind;
        req->offset = offset;
        req->len = len;
        req->done = done;
        req->opaque = opaque;
        req->pending = 1;
        req->start_ns = bale_now_ns();
        if (kind == REQUEST_READ) {
            stat_add(&s->reads_in_flight, 1);
        } else if (kind == REQUEST_WRITE || kind == REQUEST_ZERO) {
            stat_add(&s->writes_in_flight, 1);
        }
        req->first = offset >> s->cluster_bits;
        req->last = len ? (offset + len - 1) >> s->cluster_bits : req->first;
    }
    return req;
}

static BaleClusterOp *request_add_op(BaleRequest *req, uint64_t cluster,
                                 uint32_t offset, uint32_t len, uint64_t at)
{
    BaleClusterOp *op = &req->ops[req->n++];

    op->req = req;
    op->cluster = cluster;
    op->count = 1;
    op->offset = offset;
    op->len = len;
    op->at = at;
    return op;
}

void bale_request_add_clusters(BaleRequest *req)
{
    uint32_t cluster_size = req->image->store->cluster_size;

    for (uint64_t at = 0; at < req->len;) {
        uint64_t pos = req->offset + at;
        uint32_t offset = pos & (cluster_size - 1);
        uint32_t len = MIN(req->len - at, cluster_size - offset);

        request_add_op(req, pos / cluster_size, offset, len, at);
        at += len;
    }
}

BaleRequest *bale_request_begin(BaleImage *image, BaleRequestKind kind,
                                uint64_t offset, uint64_t len, BaleDone *done,
                                void *opaque)
{
    BaleRequest *req;

    /* Zeroes are a few ops, however many clusters they cover. */
    if (!bale_image_contains(image, offset, len) ||
        (kind != REQUEST_ZERO && len > BALE_REQUEST_MAX)) {
        done(opaque, -EINVAL);
        return NULL;
    }
    req = bale_request_new(image, kind, offset, len, done, opaque);
    if (!req) {
        done(opaque, -ENOMEM);
    } else if (kind != REQUEST_ZERO) {
        bale_request_add_clusters(req);
    }
    return req;
}

/* --- writing --- */

/* What a whole cluster is written with is in the index, or failed to be. */
static void op_written(BaleClusterOp *op, int ret)
{
    BaleImage *image = op->req->image;
    unsigned bits = image->store->cluster_bits;

    if (BALE_PLANTED(errno_dropped)) {
        ret = 0;
    }
    if (op->claimed) {
        /* What is copied up is older than what waits there. */
        bale_mutable_settle(image->mutable_region, op->cluster << bits,
                            op->count << bits, ret == 0);
    }
    bale_op_done(op, ret);
}

/* On a worker: everything that the cluster will hold is in memory. */
static void op_write_work(BaleWork *work, void *context, unsigned worker)
{
    BaleClusterOp *op = bale_op_of_work(work);
    BaleWorkerContext *wc = context;
    BaleRequest *req = op->req;
    uint8_t *data = op->buf ? op->buf : wc->cluster;
    uint32_t end = op->offset + op->len;

    if (req->kind == REQUEST_ZERO) {
        memset(data + op->offset, 0, op->len);
    } else if (req->kind == REQUEST_WRITE) {
        bale_iov_copy(req->iov, req->iovcnt, op->at, data + op->offset, op->len,
                 false);
    }
    if (!op->buf) {
        /* The last cluster of an image may reach past its size. */
        memset(data + end, 0, req->image->store->cluster_size - end);
    }
    op_written(op, bale_image_put_cluster(req->image, wc, op->cluster, data));
}

static void op_write_ready(BaleClusterOp *op)
{
    op->work.fn = op_write_work;
    bale_workers_push(op->req->image->store->workers, &op->work,
                      BALE_WORK_BULK);
}

static void op_base_read(void *opaque, int ret)
{
    BaleClusterOp *op = opaque;

    if (ret < 0) {
        bale_op_done(op, ret);
    } else {
        op_write_ready(op);
    }
}

/* Read one cluster to @buf, zeroes behind the image's end. */
static void image_read_cluster(BaleImage *image, BaleRequestKind kind,
                               uint64_t cluster, uint8_t *buf, bool in_place,
                               BaleDone *done, void *opaque)
{
    BaleStore *s = image->store;
    uint32_t len = cluster_len(image, cluster);
    BaleRequest *req = bale_request_new(
        image, kind, cluster << s->cluster_bits, len, done, opaque);

    if (!req) {
        done(opaque, -ENOMEM);
        return;
    }
    stat_add(&s->stats.read_modify_writes, 1);
    memset(buf + len, 0, s->cluster_size - len);
    req->in_place = in_place;
    req->own_iov.iov_base = buf;
    req->own_iov.iov_len = len;
    req->iov = &req->own_iov;
    req->iovcnt = 1;
    bale_request_add_clusters(req);
    bale_request_read(req);
}

void bale_image_read_stored(BaleImage *image, uint64_t cluster, uint8_t *buf,
                            bool in_place, BaleDone *done, void *opaque)
{
    image_read_cluster(image, REQUEST_READ_STORED, cluster, buf, in_place,
                       done, opaque);
}

/* Read what is in the cluster now; then the op is ready. */
static void op_read_base(BaleClusterOp *op)
{
    BaleImage *image = op->req->image;

    op->buf = bale_memory_try_alloc(BALE_BLOCK_SIZE,
                                    image->store->cluster_size);
    if (!op->buf) {
        bale_op_done(op, -ENOMEM);
        return;
    }
    image_read_cluster(image, REQUEST_READ, op->cluster, op->buf, false,
                       op_base_read, op);
}

static void op_write_start(BaleClusterOp *op);

static void op_write_again(BaleWork *work, void *context, unsigned worker)
{
    op_write_start(bale_op_of_work(work));
}

/* Put a partial write or zero into the mutable region. */
static void op_write_mutable(BaleClusterOp *op)
{
    BaleRequest *req = op->req;
    bool zero = req->kind == REQUEST_ZERO;
    int ret;

    op->work.fn = op_write_again;
    ret = bale_mutable_put(req->image->mutable_region,
                           (op->cluster << req->image->store->cluster_bits) +
                               op->offset,
                           zero ? NULL : req->iov, zero ? 0 : req->iovcnt,
                           op->at, op->len, &op->taken, &op->work);
    if (ret != -EAGAIN) {
        bale_op_done(op, ret);
    }
}

/* On a worker: the whole clusters of a zero request. */
static void op_zero_work(BaleWork *work, void *context, unsigned worker)
{
    BaleClusterOp *op = bale_op_of_work(work);

    op_written(op, bale_image_zero_clusters(op->req->image, op->cluster,
                                            op->count,
                                            op->req->flags & BALE_DISCARD));
}

static void op_copied_read(void *opaque, int ret)
{
    BaleClusterOp *op = opaque;

    if (ret < 0) {
        op_written(op, ret);
    } else {
        op_write_ready(op);
    }
}

/* What the layers under the top show becomes the top's own. */
static void op_copy_up_start(BaleClusterOp *op)
{
    BaleImage *image = op->req->image;
    BaleStore *s = image->store;

    if (bale_image_find_top(image, op->cluster) ||
        !bale_image_find(image, op->cluster)) {
        bale_op_done(op, 0);
        return;
    }
    op->work.fn = op_write_again;
    if (!bale_mutable_claim(image->mutable_region,
                            op->cluster << s->cluster_bits, s->cluster_size,
                            &op->work)) {
        return;
    }
    op->claimed = true;
    op->buf = bale_memory_try_alloc(BALE_BLOCK_SIZE, s->cluster_size);
    if (op->buf) {
        /*
         * With what waits in the mutable region: the record that follows hides
         * the patches of that.
         */
        image_read_cluster(image, REQUEST_READ, op->cluster, op->buf, false,
                           op_copied_read, op);
    } else {
        op_written(op, -ENOMEM);
    }
}

/* --- writes that change nothing --- */

/* On a worker: what was there is in memory. */
static void op_compare_work(BaleWork *work, void *context, unsigned worker)
{
    BaleClusterOp *op = bale_op_of_work(work);
    BaleWorkerContext *wc = context;
    BaleRequest *req = op->req;

    bale_iov_copy(req->iov, req->iovcnt, op->at, wc->cluster, op->len, false);
    if (memcmp(wc->cluster, op->buf, op->len) == 0) {
        stat_add(&req->image->store->stats.unchanged_clusters, 1);
        bale_op_done(op, 0);
    } else {
        op_write_start(op);
    }
}

static void op_compare_read(void *opaque, int ret)
{
    BaleClusterOp *op = opaque;

    if (ret < 0) {
        /* What cannot be read is better written anew. */
        bale_memory_free(op->buf);
        op->buf = NULL;
        op_write_start(op);
        return;
    }
    op->work.fn = op_compare_work;
    bale_workers_push(op->req->image->store->workers, &op->work,
                      BALE_WORK_NORMAL);
}

/*
 * Read what a whole cluster shows, to see whether the write changes it.  There
 * is no digest of the contents to look at first; but decompressing takes less
 * than compressing would, to which only what has changed comes.
 */
static bool op_compare_start(BaleClusterOp *op)
{
    BaleImage *image = op->req->image;

    if (op->compared || op->req->kind != REQUEST_WRITE ||
        !__atomic_load_n(&image->skip_unchanged, __ATOMIC_RELAXED)) {
        return false;
    }
    op->compared = true;
    op->buf = bale_memory_try_alloc(BALE_BLOCK_SIZE,
                                    image->store->cluster_size);
    if (!op->buf) {
        return false;
    }
    image_read_cluster(image, REQUEST_READ, op->cluster, op->buf, false,
                       op_compare_read, op);
    return true;
}

/* The range is ours. */
static void write_start(BaleRequest *req)
{
    BaleImage *image = req->image;
    BaleStore *s = image->store;

    if (store_failed(s) || s->read_only ||
        __atomic_load_n(&image->read_only, __ATOMIC_ACQUIRE) ||
        __atomic_load_n(&s->corrupt, __ATOMIC_RELAXED)) {
        req->ret = s->read_only || image->read_only ? -EROFS : -EIO;
        bale_request_unref(req);
        return;
    }
    req->pending += req->n;
    for (unsigned i = 0; i < req->n; i++) {
        op_write_start(&req->ops[i]);
    }
    bale_request_unref(req);
}

/* Also called again after waiting for the mutable region. */
static void op_write_start(BaleClusterOp *op)
{
    BaleRequest *req = op->req;
    BaleImage *image = req->image;
    BaleStore *s = image->store;
    uint64_t begin = op->cluster << s->cluster_bits;
    bool whole = op->len == 0 || (op->offset == 0 &&
                                  op->len >= cluster_len(image, op->cluster));
    bool cached, absent;

    if (req->kind == REQUEST_COPY_UP) {
        op_copy_up_start(op);
        return;
    }
    if (whole) {
        if (op_compare_start(op)) {
            return;
        }
        op->work.fn = op_write_again;
        if (!bale_mutable_claim(image->mutable_region, begin,
                                op->count << s->cluster_bits, &op->work)) {
            return;
        }
        op->claimed = true;
        op->work.fn = op->len == 0 ? op_zero_work : op_write_work;
        bale_workers_push(s->workers, &op->work,
                          op->len == 0 ? BALE_WORK_NORMAL : BALE_WORK_BULK);
        return;
    }
    cached = op->taken || bale_mutable_cached(image->mutable_region, begin,
                                              s->cluster_size);
    absent = !cached && bale_image_find(image, op->cluster) == 0;
    if (req->kind == REQUEST_ZERO && !cached &&
        !(absent && bale_image_has_backing(image)) &&
        !bale_value_class(bale_image_find(image, op->cluster))) {
        bale_op_done(op, 0); /* zero already */
    } else if (absent && bale_image_has_backing(image)) {
        /* What lies under the image may be another thing tomorrow. */
        op_read_base(op);
    } else {
        op_write_mutable(op);
    }
}

/* Run @req now, or when those before it on its clusters have run. */
static void request_write(BaleRequest *req)
{
    if (range_acquire(req)) {
        write_start(req);
    }
}

void bale_image_write(BaleImage *image, uint64_t offset,
                      const struct iovec *iov, int iovcnt, unsigned flags,
                      BaleDone *done, void *opaque)
{
    BaleStore *s = image->store;
    uint64_t len = bale_iov_len(iov, iovcnt);
    BaleRequest *req =
        bale_request_begin(image, REQUEST_WRITE, offset, len, done, opaque);

    if (req) {
        stat_add(&s->stats.writes, 1);
        stat_add(&s->stats.write_bytes, len);
        req->flags = flags;
        req->iov = iov;
        req->iovcnt = iovcnt;
        request_write(req);
    }
}

void bale_image_zero(BaleImage *image, uint64_t offset, uint64_t len,
                     unsigned flags, BaleDone *done, void *opaque)
{
    BaleStore *s = image->store;
    uint32_t cluster_size = s->cluster_size;
    uint64_t end = offset + len, first, last;
    BaleRequest *req;

    if (len == 0) {
        done(opaque, bale_image_contains(image, offset, 0) ? 0 : -EINVAL);
        return;
    }
    req = bale_request_begin(image, REQUEST_ZERO, offset, len, done, opaque);
    if (!req) {
        return;
    }
    stat_add(&s->stats.zeroes, 1);
    stat_add(&s->stats.zero_bytes, len);
    req->flags = flags;
    /* Whole clusters [first, last); what the image ends in counts as whole. */
    first = (offset + cluster_size - 1) >> s->cluster_bits;
    last = end == bale_image_size(image)
               ? (end + cluster_size - 1) >> s->cluster_bits
               : end >> s->cluster_bits;
    if (first > last) {
        request_add_op(req, offset >> s->cluster_bits,
                       offset & (cluster_size - 1), len, 0);
    } else {
        if (offset & (cluster_size - 1)) {
            uint64_t head = MIN((first << s->cluster_bits) - offset, len);

            request_add_op(req, first - 1, offset & (cluster_size - 1), head,
                           0);
        }
        if (first < last) {
            request_add_op(req, first, 0, 0, 0)->count = last - first;
        }
        if (end > last << s->cluster_bits) {
            request_add_op(req, last, 0, end & (cluster_size - 1), 0);
        }
    }
    request_write(req);
}

void bale_image_copy_up(BaleImage *image, uint64_t offset, uint64_t len,
                        BaleDone *done, void *opaque)
{
    BaleRequest *req =
        bale_request_begin(image, REQUEST_COPY_UP, offset, len, done, opaque);

    if (req) {
        request_write(req);
    }
}

/* A flush under way, of the regions of all images, and for the histogram. */
typedef struct TimedFlush {
    BaleStore *store;
    uint64_t start_ns;
    bool counted;     /* somebody asked for a flush */
    BaleDone *done;
    void *opaque;
    int ret;          /* atomic; the first error */
    unsigned pending; /* atomic */
} TimedFlush;

static void timed_flush_done(void *opaque, int ret)
{
    TimedFlush *f = opaque;
    int zero = 0;

    if (ret < 0) {
        __atomic_compare_exchange_n(&f->ret, &zero, ret, false,
                                    __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
    }
    if (__atomic_sub_fetch(&f->pending, 1, __ATOMIC_ACQ_REL) > 0) {
        return;
    }
    if (f->counted) {
        bale_histogram_add(&f->store->flush_hist,
                           bale_now_ns() - f->start_ns);
    }
    f->done(f->opaque, __atomic_load_n(&f->ret, __ATOMIC_ACQUIRE));
    g_free(f);
}

static void store_flush(BaleStore *store, bool write_out, bool counted,
                        BaleDone *done, void *opaque)
{
    TimedFlush *f;
    g_autofree BaleImage **images = NULL;
    bool logged = false;
    guint n;

    if (store_failed(store)) {
        done(opaque, -EIO);
        return;
    }
    f = g_new(TimedFlush, 1);
    *f = (TimedFlush){ store, bale_now_ns(), counted, done, opaque, 0, 1 };
    images = bale_store_images(store, &n);
    n = BALE_PLANTED(flush_one_image) ? MIN(n, 1) : n;
    /* Each of these ends with a flush of the log. */
    for (guint i = 0; i < n; i++) {
        BaleImage *image = images[i];

        if (bale_mutable_waiting(image->mutable_region, write_out) &&
            !BALE_PLANTED(flush_misses_mutable)) {
            __atomic_fetch_add(&f->pending, 1, __ATOMIC_RELAXED);
            logged = true;
            bale_mutable_flush(image->mutable_region, write_out,
                               timed_flush_done, f);
        }
    }
    if (logged) {
        timed_flush_done(f, 0);
    } else {
        bale_log_flush(store, timed_flush_done, f);
    }
}

void bale_store_flush(BaleStore *store, BaleDone *done, void *opaque)
{
    store_flush(store, false, true, done, opaque);
}

void bale_store_write_out(BaleStore *s, BaleDone *done, void *opaque)
{
    store_flush(s, true, true, done, opaque);
}

int bale_store_write_out_sync(BaleStore *s)
{
    BaleSync sync = BALE_SYNC_INIT;

    store_flush(s, true, true, bale_sync_done, &sync);
    return bale_sync_wait(&sync);
}

void bale_patches_pause(BaleStore *s)
{
    __atomic_fetch_add(&s->patch_pauses, 1, __ATOMIC_ACQ_REL);
}

void bale_patches_resume(BaleStore *s)
{
    __atomic_fetch_sub(&s->patch_pauses, 1, __ATOMIC_ACQ_REL);
}

