/*
 * Requests on the clusters of an image.
 *
 * A write takes its range of clusters (in order of arrival; requests that
 * share a cluster run one after the other), then goes cluster by cluster to
 * the workers: copy, compress, append to the log, set the index.  Partial
 * clusters go to the mutable region, and to the workers when they leave it.  A
 * read looks clusters up, fetches neighbours on the device with one transfer,
 * and verifies and decompresses on the workers.
 *
 * Invariants:
 *  1. While a write, zero or resize holds a cluster's range nobody else changes
 *     the index there: the order of the sequence numbers of a cluster's
 *     records is the order in which the index saw them.
 *  2. The index is set after the record can be read at its address, and before
 *     the request completes.
 *  3. A page is not reused under a device read: the reader is counted, under
 *     log_lock, while the index still points into the page.
 *  4. Nothing that was read reaches the caller before its checksums verified.
 *
 * The data of a write is copied before it is compressed: it may be a guest's
 * memory, which can change while the codec looks at it.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "store-internal.h"

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
/* How far read-ahead goes, bytes, or as many clusters if they are large. */
#define READAHEAD_MAX (1u << 20)
#define READAHEAD_CLUSTERS_MAX 4u
/* ... and at most this part of the cache. */
#define READAHEAD_CACHE_PART 16u
/* After so many clusters were used or wasted the length is looked at. */
#define READAHEAD_SAMPLE 32u
/* A stream that was not continued for so many reads may be replaced. */
#define STREAM_AGE_MAX 64u
/* Longer clusters are always decompressed by workers. */
#define INLINE_CLUSTER_MAX (128u << 10)

typedef struct BaleRequest BaleRequest;
typedef struct ClusterOp ClusterOp;

typedef enum RequestKind {
    REQUEST_READ,
    REQUEST_READ_STORED, /* one whole cluster, for a write-out */
    REQUEST_READAHEAD,
    REQUEST_WRITE,
    REQUEST_ZERO,
    REQUEST_COPY_UP, /* whole clusters, from the layers under the top */
} RequestKind;

/* Records that are fetched with one device transfer. */
typedef struct ReadRun {
    BaleDeviceIo io;
    BaleStore *store;
    uint64_t page;
    uint64_t version;
    uint64_t begin, end; /* on the device */
    ClusterOp *ops, **ops_tail;
    unsigned refs;       /* atomic: ops that still use buf */
    struct ReadRun *next;
} ReadRun;

/* What one request does to one cluster, or (zero) to a range of them. */
struct ClusterOp {
    BaleWork work;
    BaleRequest *req;
    uint64_t cluster;
    uint64_t count;      /* > 1 or 0 < : zero only */
    bool claimed;        /* of the mutable region */
    uint32_t offset;     /* in the cluster */
    uint32_t len;        /* 0: the whole range of a zero request */
    uint64_t at;         /* in the request's data */
    /* reading */
    uint64_t value;
    uint64_t version;
    ReadRun *run;
    BaleWriteBuffer *pinned;
    const uint8_t *src;
    size_t avail;
    unsigned retries;
    ClusterOp *run_next;
    BaleCacheLoad load;
    BaleCacheWaiter waiter;
    /* bounce buffer for backing reads; base of a partial write */
    uint8_t *buf;
    /* reading: what the mutable region held, laid over at the end */
    uint8_t *over;
    GArray *runs;
    /* writing: how much the mutable region has taken */
    size_t taken;
};

struct BaleRequest {
    BaleImage *image;
    RequestKind kind;
    unsigned flags;
    bool scan;             /* a small read that continues a stream */
    uint64_t offset, len;
    const struct iovec *iov;
    int iovcnt;
    struct iovec own_iov;
    BaleDone *done;
    void *opaque;
    uint64_t start_ns;
    int ret;               /* atomic; the first error */
    unsigned pending;      /* atomic; ops not finished, and the submitter */
    /* range lock */
    uint64_t first, last;  /* clusters */
    BaleRequest *next;
    unsigned n;
    ClusterOp ops[];
};

static void op_read_start(ClusterOp *op, ReadRun **runs);
static void op_write_ready(ClusterOp *op);

/* --- helpers --- */

static uint64_t iov_len(const struct iovec *iov, int iovcnt)
{
    uint64_t len = 0;

    for (int i = 0; i < iovcnt; i++) {
        len += iov[i].iov_len;
    }
    return len;
}

/* Copy between a vector, from @at on, and a buffer; @buf NULL: zeroes. */
static void iov_copy(const struct iovec *iov, int iovcnt, uint64_t at,
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

/* Where [@at, @at + @len) of the vector is one piece of memory, or NULL. */
static uint8_t *iov_piece(const struct iovec *iov, int iovcnt, uint64_t at,
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
        pthread_mutex_lock(&s->log_lock);
        s->background--;
        pthread_cond_broadcast(&s->log_cond);
        pthread_mutex_unlock(&s->log_lock);
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

static void request_unref(BaleRequest *req)
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

static void op_done(ClusterOp *op, int ret)
{
    BaleRequest *req = op->req;
    int zero = 0;

    if (ret < 0) {
        __atomic_compare_exchange_n(&req->ret, &zero, ret, false,
                                    __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
    } else if (op->runs) {
        for (guint i = 0; i < op->runs->len; i++) {
            BaleMutableRun *r = &g_array_index(op->runs, BaleMutableRun, i);

            iov_copy(req->iov, req->iovcnt, op->at + r->start,
                     op->over + r->start, r->len, true);
        }
    }
    request_unref(req);
}

/* A request with room for @n ops; NULL: no memory. */
static BaleRequest *request_new(BaleImage *image, RequestKind kind,
                                uint64_t offset, uint64_t len, uint64_t n,
                                BaleDone *done, void *opaque)
{
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
            stat_add(&image->store->reads_in_flight, 1);
        } else if (kind == REQUEST_WRITE || kind == REQUEST_ZERO) {
            stat_add(&image->store->writes_in_flight, 1);
        }
        req->first = offset >> image->store->cluster_bits;
        req->last = len ? (offset + len - 1) >> image->store->cluster_bits
                        : req->first;
    }
    return req;
}

static ClusterOp *request_add_op(BaleRequest *req, uint64_t cluster,
                                 uint32_t offset, uint32_t len, uint64_t at)
{
    ClusterOp *op = &req->ops[req->n++];

    op->req = req;
    op->cluster = cluster;
    op->count = 1;
    op->offset = offset;
    op->len = len;
    op->at = at;
    return op;
}

/* One op for each cluster that the request touches. */
static void request_add_clusters(BaleRequest *req)
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

/* --- reading --- */

static void run_release(ReadRun *run)
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
static void op_read_release(ClusterOp *op)
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
        ClusterOp *next = (ClusterOp *)((char *)waiter -
                                        offsetof(ClusterOp, waiter));
        ReadRun *runs = NULL;

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

static void op_report_damage(ClusterOp *op)
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
static bool op_is_kept(const ClusterOp *op)
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
static int op_unpack(ClusterOp *op, BaleWorkerContext *wc)
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
        dst = iov_piece(req->iov, req->iovcnt, op->at, op->len);
    }
    dst = dst ? dst : wc->cluster;
    ret = bale_image_unpack(image, wc, bale_value_address(op->value),
                            op->version, op->cluster, op->src, op->avail,
                            dst);
    if (ret == 0 && !ahead && (buf || dst == wc->cluster)) {
        iov_copy(req->iov, req->iovcnt, op->at, dst + op->offset, op->len,
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
    ClusterOp *op = (ClusterOp *)((char *)work - offsetof(ClusterOp, work));
    BaleImage *image = op->req->image;
    int ret = op_unpack(op, context);

    op_read_release(op);
    if (ret == -EIO) {
        ReadRun *runs = NULL;

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
    op_done(op, ret);
}

/*
 * The record is in memory.  When nobody else reads, then the way to a worker
 * and back takes longer than what could be done meanwhile is worth: this
 * thread, the device's or the caller's, decompresses one small cluster itself.
 */
static void op_read_fetched(ClusterOp *op)
{
    BaleRequest *req = op->req;
    BaleStore *s = req->image->store;

    if (req->kind == REQUEST_READ && req->n == 1 &&
        s->cluster_size <= INLINE_CLUSTER_MAX &&
        __atomic_load_n(&s->reads_in_flight, __ATOMIC_RELAXED) == 1 &&
        !__atomic_exchange_n(&s->inline_busy, 1, __ATOMIC_ACQUIRE)) {
        int ret = op_unpack(op, &s->inline_context);

        __atomic_store_n(&s->inline_busy, 0, __ATOMIC_RELEASE);
        if (ret != -EIO) {
            op_read_release(op);
            op_done(op, ret);
            return;
        }
        /* A worker looks at it again, and may wait for the device. */
    }
    op->work.fn = op_read_work;
    bale_workers_push(s->workers, &op->work, BALE_WORK_URGENT);
}

static void run_done(BaleDeviceIo *io, int ret)
{
    ReadRun *run = (ReadRun *)((char *)io - offsetof(ReadRun, io));
    ClusterOp *op = run->ops;

    while (op) {
        ClusterOp *next = op->run_next;

        if (ret < 0) {
            op_read_release(op);
            op_done(op, ret);
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
static void runs_submit(BaleStore *s, ReadRun *runs)
{
    if (runs && s->dev->ops->plug) {
        s->dev->ops->plug(s->dev);
    }
    for (ReadRun *run = runs, *next; run; run = next) {
        next = run->next;
        run->io.offset = run->begin;
        run->io.len = run->end - run->begin;
        run->io.done = run_done;
        run->io.buf = bale_memory_try_alloc(BALE_BLOCK_SIZE, run->io.len);
        if (run->io.buf) {
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
static bool op_join_run(ClusterOp *op, uint64_t page, ReadRun **runs)
{
    BaleStore *s = op->req->image->store;
    BalePage *p = bale_page(s, page);
    uint64_t address = bale_value_address(op->value);
    uint64_t begin = bale_align_down(address, BALE_BLOCK_SIZE);
    uint64_t end = address + BALE_RECORD_HEADER_LEN +
                   bale_class_len(bale_value_class(op->value),
                                  s->cluster_size);
    ReadRun *run = *runs;

    end = MIN(bale_align_up(end, BALE_BLOCK_SIZE),
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
        run = g_try_new0(ReadRun, 1);
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
    ClusterOp *op = opaque;

    if (ret == 0 && op->buf) {
        iov_copy(op->req->iov, op->req->iovcnt, op->at, op->buf, op->len,
                 true);
    }
    op_done(op, ret);
}

/* Nothing of our own is there. */
static void op_read_backing(ClusterOp *op)
{
    BaleRequest *req = op->req;
    BaleImage *image = req->image;
    uint8_t *dst;

    if (!bale_image_has_backing(image) || req->kind == REQUEST_READ_STORED) {
        iov_copy(req->iov, req->iovcnt, op->at, NULL, op->len, true);
        op_done(op, 0);
        return;
    }
    dst = iov_piece(req->iov, req->iovcnt, op->at, op->len);
    if (!dst) {
        op->buf = dst = bale_memory_try_alloc(BALE_BLOCK_SIZE, op->len);
    }
    if (!dst) {
        op_done(op, -ENOMEM);
        return;
    }
    image->backing_read(image->backing_opaque,
                        req->offset + op->at, dst, op->len, op_backing_done,
                        op);
}

static bool op_read_cached(ClusterOp *op)
{
    BaleRequest *req = op->req;
    BaleImage *image = req->image;
    uint8_t *dst = iov_piece(req->iov, req->iovcnt, op->at, op->len);
    BALE_AUTO_MEMORY uint8_t *copy = NULL;

    if (!dst) {
        dst = copy = bale_memory_try_alloc(64, op->len);
    }
    if (!dst || !bale_cache_get(image->store->cache, op->cluster,
                                op->value, op->offset, dst, op->len)) {
        return false;
    }
    if (copy) {
        iov_copy(req->iov, req->iovcnt, op->at, copy, op->len, true);
    }
    return true;
}

/*
 * Look the cluster up and answer from where it is.  Runs are collected in
 * @runs if the caller submits them (@runs points at a list that may be
 * non-empty or at NULL; they are submitted here if @op is a retry).
 */
static void op_read_lookup(ClusterOp *op, ReadRun **runs)
{
    BaleRequest *req = op->req;
    BaleImage *image = req->image;
    BaleStore *s = image->store;
    const uint8_t *src;
    uint64_t page, offset;
    bool joined = true;

    /* The mutable region first, the index second: see mutable.c. */
    if (req->kind == REQUEST_READ && !op->runs) {
        size_t n = bale_mutable_read(image->mutable_region,
                                     req->offset + op->at, op->len, &op->over,
                                     &op->runs);

        if (n == SIZE_MAX || n == op->len) {
            op_done(op, n == SIZE_MAX ? -ENOMEM : 0);
            return;
        }
    }
    op->value = bale_image_find(image, op->cluster);
    if (req->kind == REQUEST_READAHEAD &&
        (!bale_value_class(op->value) ||
         bale_cache_has(s->cache, op->cluster, op->value))) {
        op_done(op, 0);
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
            iov_copy(req->iov, req->iovcnt, op->at, NULL, op->len, true);
            op_done(op, 0);
            return;
        }
        op->value = bale_image_find(image, op->cluster);
    }
    if (op->value == 0) {
        op_read_backing(op);
        return;
    }
    if (!bale_value_class(op->value)) {
        iov_copy(req->iov, req->iovcnt, op->at, NULL, op->len, true);
        op_done(op, 0);
        return;
    }
    if (req->kind != REQUEST_READAHEAD && req->len < READ_LARGE &&
        bale_cache_max_bytes(s->cache) > 0) {
        bool hit = op_read_cached(op);

        stat_add(hit ? &s->stats.cache_hits : &s->stats.cache_misses, 1);
        if (hit) {
            op_done(op, 0);
            return;
        }
    }

    if (op_is_kept(op) &&
        !bale_cache_load_begin(s->cache, &op->load, op->cluster, op->value,
                               req->kind == REQUEST_READ ? &op->waiter
                                                         : NULL)) {
        if (req->kind == REQUEST_READAHEAD) {
            op_done(op, 0);
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
            op_done(op, -EIO);
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
        op_done(op, -ENOMEM);
    }
}

static void op_read_start(ClusterOp *op, ReadRun **runs)
{
    BaleStore *s = op->req->image->store;

    op_read_lookup(op, runs); /* may complete the request */
    runs_submit(s, *runs);
    *runs = NULL;
}

static void read_start(BaleRequest *req)
{
    BaleStore *s = req->image->store;
    ReadRun *runs = NULL;

    req->pending += req->n;
    for (unsigned i = 0; i < req->n; i++) {
        op_read_lookup(&req->ops[i], &runs);
    }
    runs_submit(s, runs);
    request_unref(req);
}

/*
 * How far to be ahead at most: less while more of what is read ahead is
 * dropped unread than used.  Under stream_lock.
 */
static uint32_t streams_ahead_max(BaleImage *image)
{
    BaleStore *s = image->store;
    uint64_t limit = MAX(READAHEAD_MAX,
                         (uint64_t)READAHEAD_CLUSTERS_MAX * s->cluster_size);
    uint64_t used, wasted;

    limit = MIN(limit, bale_cache_max_bytes(s->cache) / READAHEAD_CACHE_PART);
    if (limit < s->cluster_size) {
        return 0;
    }
    bale_cache_ahead(s->cache, &used, &wasted);
    used -= image->ahead_used;
    wasted -= image->ahead_wasted;
    if (used + wasted >= READAHEAD_SAMPLE) {
        image->ahead_used += used;
        image->ahead_wasted += wasted;
        image->ahead_max = wasted > used ? image->ahead_max / 2
                                         : image->ahead_max * 2;
    }
    image->ahead_max = MIN(MAX(image->ahead_max, s->cluster_size), limit);
    return image->ahead_max;
}

/* The stream that this read continues, or NULL.  Under stream_lock. */
static BaleReadStream *stream_find(BaleImage *image, uint64_t offset,
                                   uint64_t end)
{
    BaleReadStream *oldest = &image->streams[0];
    uint64_t clock = ++image->stream_clock;

    for (unsigned i = 0; i < READ_STREAMS; i++) {
        BaleReadStream *stream = &image->streams[i];

        if (stream->next == offset && stream->used) {
            stream->next = end;
            stream->used = clock;
            stream->hits++;
            return stream;
        }
        /* What has proven to be a stream is not replaced at once. */
        if (stream->used + (stream->hits ? STREAM_AGE_MAX : 0) <
            oldest->used + (oldest->hits ? STREAM_AGE_MAX : 0)) {
            oldest = stream;
        }
    }
    *oldest = (BaleReadStream){ .next = end, .ahead = end, .used = clock };
    return NULL;
}

/*
 * A small read: what to fetch for the reader to find there next.  The window
 * doubles each time that the reader has come half-way through it.
 */
static bool image_want_ahead(BaleImage *image, uint64_t offset, uint64_t len,
                             bool *scan, uint64_t *from, uint64_t *to)
{
    BaleStore *s = image->store;
    uint64_t end = offset + len;
    BaleReadStream *stream;
    bool want = false;
    uint32_t max;

    pthread_mutex_lock(&image->stream_lock);
    stream = stream_find(image, offset, end);
    *scan = stream;
    if (stream) {
        stream->ahead = MAX(stream->ahead, end);
        if (!stream->window || stream->ahead - end <= stream->window / 2) {
            max = streams_ahead_max(image);
            stream->window =
                stream->window ? stream->window * 2
                               : MAX(2 * (uint32_t)len, s->cluster_size);
            stream->window = MIN(stream->window, max);
            *from = bale_align_up(stream->ahead, s->cluster_size);
            *to = MIN(bale_align_up(end + stream->window, s->cluster_size),
                      bale_image_size(image));
            want = max && *from < *to;
            if (want) {
                stream->ahead = *to;
            }
        }
    }
    pthread_mutex_unlock(&image->stream_lock);
    return want;
}

static void image_readahead(BaleImage *image, uint64_t offset, uint64_t len,
                            bool *scan)
{
    BaleStore *s = image->store;
    uint64_t from, to;
    BaleRequest *req;

    if (!image_want_ahead(image, offset, len, scan, &from, &to)) {
        return;
    }
    req = request_new(image, REQUEST_READAHEAD, from, to - from,
                      (to - from) / s->cluster_size + 2, NULL, NULL);
    if (!req) {
        return;
    }
    stat_add(&s->stats.readahead, 1);
    stat_add(&s->stats.readahead_bytes, to - from);
    pthread_mutex_lock(&s->log_lock);
    s->background++;
    pthread_mutex_unlock(&s->log_lock);
    request_add_clusters(req);
    read_start(req);
}

void bale_image_read(BaleImage *image, uint64_t offset,
                     const struct iovec *iov, int iovcnt, BaleDone *done,
                     void *opaque)
{
    BaleStore *s = image->store;
    uint64_t len = iov_len(iov, iovcnt);
    BaleRequest *req;

    if (!bale_image_contains(image, offset, len) || len > BALE_REQUEST_MAX) {
        done(opaque, -EINVAL);
        return;
    }
    stat_add(&s->stats.reads, 1);
    stat_add(&s->stats.read_bytes, len);
    req = request_new(image, REQUEST_READ, offset, len,
                      len / s->cluster_size + 2, done, opaque);
    if (!req) {
        done(opaque, -ENOMEM);
        return;
    }
    req->iov = iov;
    req->iovcnt = iovcnt;
    request_add_clusters(req);
    if (len > 0 && len < READ_LARGE && bale_cache_max_bytes(s->cache) > 0) {
        image_readahead(image, offset, len, &req->scan);
    }
    read_start(req);
}

/* --- writing --- */

/* What a whole cluster is written with is in the index, or failed to be. */
static void op_written(ClusterOp *op, int ret)
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
    op_done(op, ret);
}

/* On a worker: everything that the cluster will hold is in memory. */
static void op_write_work(BaleWork *work, void *context, unsigned worker)
{
    ClusterOp *op = (ClusterOp *)((char *)work - offsetof(ClusterOp, work));
    BaleWorkerContext *wc = context;
    BaleRequest *req = op->req;
    uint8_t *data = op->buf ? op->buf : wc->cluster;
    uint32_t end = op->offset + op->len;

    if (req->kind == REQUEST_ZERO) {
        memset(data + op->offset, 0, op->len);
    } else if (req->kind == REQUEST_WRITE) {
        iov_copy(req->iov, req->iovcnt, op->at, data + op->offset, op->len,
                 false);
    }
    if (!op->buf) {
        /* The last cluster of an image may reach past its size. */
        memset(data + end, 0, req->image->store->cluster_size - end);
    }
    op_written(op, bale_image_put_cluster(req->image, wc, op->cluster, data));
}

static void op_write_ready(ClusterOp *op)
{
    op->work.fn = op_write_work;
    bale_workers_push(op->req->image->store->workers, &op->work,
                      BALE_WORK_NORMAL);
}

static void op_base_read(void *opaque, int ret)
{
    ClusterOp *op = opaque;

    if (ret < 0) {
        op_done(op, ret);
    } else {
        op_write_ready(op);
    }
}

/* Read one cluster to @buf, zeroes behind the image's end. */
static void image_read_cluster(BaleImage *image, RequestKind kind,
                               uint64_t cluster, uint8_t *buf, BaleDone *done,
                               void *opaque)
{
    BaleStore *s = image->store;
    uint32_t len = cluster_len(image, cluster);
    BaleRequest *req = request_new(image, kind, cluster << s->cluster_bits,
                                   len, 1, done, opaque);

    if (!req) {
        done(opaque, -ENOMEM);
        return;
    }
    stat_add(&s->stats.read_modify_writes, 1);
    memset(buf + len, 0, s->cluster_size - len);
    req->own_iov.iov_base = buf;
    req->own_iov.iov_len = len;
    req->iov = &req->own_iov;
    req->iovcnt = 1;
    request_add_clusters(req);
    read_start(req);
}

void bale_image_read_stored(BaleImage *image, uint64_t cluster, uint8_t *buf,
                            BaleDone *done, void *opaque)
{
    image_read_cluster(image, REQUEST_READ_STORED, cluster, buf, done,
                       opaque);
}

/* Read what is in the cluster now; then the op is ready. */
static void op_read_base(ClusterOp *op)
{
    BaleImage *image = op->req->image;

    op->buf = bale_memory_try_alloc(BALE_BLOCK_SIZE,
                                    image->store->cluster_size);
    if (!op->buf) {
        op_done(op, -ENOMEM);
        return;
    }
    image_read_cluster(image, REQUEST_READ, op->cluster, op->buf,
                       op_base_read, op);
}

static void op_write_start(ClusterOp *op);

static void op_write_again(BaleWork *work, void *context, unsigned worker)
{
    op_write_start((ClusterOp *)((char *)work - offsetof(ClusterOp, work)));
}

/* Put a partial write or zero into the mutable region. */
static void op_write_mutable(ClusterOp *op)
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
        op_done(op, ret);
    }
}

/* On a worker: the whole clusters of a zero request. */
static void op_zero_work(BaleWork *work, void *context, unsigned worker)
{
    ClusterOp *op = (ClusterOp *)((char *)work - offsetof(ClusterOp, work));

    op_written(op, bale_image_zero_clusters(op->req->image, op->cluster,
                                            op->count,
                                            op->req->flags & BALE_DISCARD));
}

static void op_copied_read(void *opaque, int ret)
{
    ClusterOp *op = opaque;

    if (ret < 0) {
        op_written(op, ret);
    } else {
        op_write_ready(op);
    }
}

/* What the layers under the top show becomes the top's own. */
static void op_copy_up_start(ClusterOp *op)
{
    BaleImage *image = op->req->image;
    BaleStore *s = image->store;

    if (bale_image_find_top(image, op->cluster) ||
        !bale_image_find(image, op->cluster)) {
        op_done(op, 0);
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
        image_read_cluster(image, REQUEST_READ, op->cluster, op->buf,
                           op_copied_read, op);
    } else {
        op_written(op, -ENOMEM);
    }
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
        request_unref(req);
        return;
    }
    req->pending += req->n;
    for (unsigned i = 0; i < req->n; i++) {
        op_write_start(&req->ops[i]);
    }
    request_unref(req);
}

/* Also called again after waiting for the mutable region. */
static void op_write_start(ClusterOp *op)
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
        op->work.fn = op_write_again;
        if (!bale_mutable_claim(image->mutable_region, begin,
                                op->count << s->cluster_bits, &op->work)) {
            return;
        }
        op->claimed = true;
        op->work.fn = op->len == 0 ? op_zero_work : op_write_work;
        bale_workers_push(s->workers, &op->work, BALE_WORK_NORMAL);
        return;
    }
    cached = op->taken || bale_mutable_cached(image->mutable_region, begin,
                                              s->cluster_size);
    absent = !cached && bale_image_find(image, op->cluster) == 0;
    if (req->kind == REQUEST_ZERO && !cached &&
        !(absent && bale_image_has_backing(image)) &&
        !bale_value_class(bale_image_find(image, op->cluster))) {
        op_done(op, 0); /* zero already */
    } else if (absent && bale_image_has_backing(image)) {
        /* What lies under the image may be another thing tomorrow. */
        op_read_base(op);
    } else {
        op_write_mutable(op);
    }
}

void bale_image_write(BaleImage *image, uint64_t offset,
                      const struct iovec *iov, int iovcnt, unsigned flags,
                      BaleDone *done, void *opaque)
{
    BaleStore *s = image->store;
    uint64_t len = iov_len(iov, iovcnt);
    BaleRequest *req;

    if (!bale_image_contains(image, offset, len) || len > BALE_REQUEST_MAX) {
        done(opaque, -EINVAL);
        return;
    }
    stat_add(&s->stats.writes, 1);
    stat_add(&s->stats.write_bytes, len);
    req = request_new(image, REQUEST_WRITE, offset, len,
                      len / s->cluster_size + 2, done, opaque);
    if (!req) {
        done(opaque, -ENOMEM);
        return;
    }
    req->flags = flags;
    req->iov = iov;
    req->iovcnt = iovcnt;
    request_add_clusters(req);
    if (range_acquire(req)) {
        write_start(req);
    }
}

void bale_image_zero(BaleImage *image, uint64_t offset, uint64_t len,
                     unsigned flags, BaleDone *done, void *opaque)
{
    BaleStore *s = image->store;
    uint32_t cluster_size = s->cluster_size;
    uint64_t end = offset + len, first, last;
    BaleRequest *req;

    if (!bale_image_contains(image, offset, len)) {
        done(opaque, -EINVAL);
        return;
    }
    if (len == 0) {
        done(opaque, 0);
        return;
    }
    stat_add(&s->stats.zeroes, 1);
    stat_add(&s->stats.zero_bytes, len);
    req = request_new(image, REQUEST_ZERO, offset, len, 3, done, opaque);
    if (!req) {
        done(opaque, -ENOMEM);
        return;
    }
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
    if (range_acquire(req)) {
        write_start(req);
    }
}

void bale_image_copy_up(BaleImage *image, uint64_t offset, uint64_t len,
                        BaleDone *done, void *opaque)
{
    BaleRequest *req;

    if (!bale_image_contains(image, offset, len) || len > BALE_REQUEST_MAX) {
        done(opaque, -EINVAL);
        return;
    }
    req = request_new(image, REQUEST_COPY_UP, offset, len,
                      len / image->store->cluster_size + 2, done, opaque);
    if (!req) {
        done(opaque, -ENOMEM);
        return;
    }
    request_add_clusters(req);
    if (range_acquire(req)) {
        write_start(req);
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
