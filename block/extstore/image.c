/*
 * Requests on the clusters of an image.
 *
 * A write takes its range of clusters (in order of arrival; requests that
 * share a cluster run one after the other), then goes cluster by cluster to
 * the workers: copy, compress, append to the log, set the index.  Partial
 * clusters go to the mutable region, and to the workers when they leave it.  A read looks clusters up, fetches
 * neighbours on the device with one transfer, and verifies and decompresses
 * on the workers.
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
/* Clusters that one zero record covers at most. */
#define ZERO_COUNT_MAX (1u << 30)
/* A discard leaves clusters out that were never written, if so many follow. */
#define DISCARD_GAP_MIN 16u
/* How far read-ahead goes, bytes. */
#define READAHEAD_LEN (1u << 20)

typedef struct BaleRequest BaleRequest;
typedef struct ClusterOp ClusterOp;

typedef enum RequestKind {
    REQUEST_READ,
    REQUEST_READ_STORED, /* one whole cluster, for a write-out */
    REQUEST_READAHEAD,
    REQUEST_WRITE,
    REQUEST_ZERO,
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

uint64_t bale_image_find(BaleImage *image, uint64_t cluster)
{
    /* The index is exchanged when an image outgrows it. */
    BaleEpochToken token = bale_epoch_enter(image->store->epoch);
    BaleIndex *index = __atomic_load_n(&image->index, __ATOMIC_ACQUIRE);
    uint64_t value = bale_index_find(index, cluster);

    bale_epoch_exit(image->store->epoch, token);
    return value;
}

/* May there be clusters of our own in the chunk with @cluster? */
static bool image_chunk_used(BaleImage *image, uint64_t cluster)
{
    BaleEpochToken token = bale_epoch_enter(image->store->epoch);
    uint32_t *entries =
        __atomic_load_n(&image->chunk_entries, __ATOMIC_ACQUIRE);
    bool used = __atomic_load_n(&entries[cluster / BALE_CHUNK_CLUSTERS],
                                __ATOMIC_RELAXED);

    bale_epoch_exit(image->store->epoch, token);
    return used;
}

/* Does anything lie under the image? */
static bool image_has_backing(BaleImage *image)
{
    return image->backing_read &&
           (!image->backing_present ||
            image->backing_present(image->backing_opaque));
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
    } else if (req->kind == REQUEST_WRITE || req->kind == REQUEST_ZERO) {
        bale_histogram_add(&s->write_hist, ns);
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

static void request_flushed(void *opaque, int ret)
{
    request_complete(opaque, ret);
}

static void request_unref(BaleRequest *req)
{
    int ret;

    if (__atomic_sub_fetch(&req->pending, 1, __ATOMIC_ACQ_REL) > 0) {
        return;
    }
    ret = __atomic_load_n(&req->ret, __ATOMIC_ACQUIRE);
    if (req->kind == REQUEST_WRITE || req->kind == REQUEST_ZERO) {
        BaleRequest *list = range_release(req);

        while (list) {
            BaleRequest *w = list;

            list = w->own_iov.iov_base;
            write_start(w);
        }
        if (ret == 0 && (req->flags & BALE_FUA) &&
            !BALE_PLANTED(fua_ignored)) {
            bale_mutable_flush(req->image->mutable_region, request_flushed,
                               req);
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

static bool request_valid(BaleImage *image, uint64_t offset, uint64_t len)
{
    uint64_t size = bale_image_size(image);

    return offset <= size && len <= size - offset;
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

static void op_read_release(ClusterOp *op)
{
    if (op->pinned) {
        bale_log_unpin(op->req->image->store, op->pinned);
        op->pinned = NULL;
    }
    if (op->run) {
        run_release(op->run);
        op->run = NULL;
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
        r.layer != image->record.layer || r.cluster != cluster ||
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

/* On a worker: the record is in memory. */
static void op_read_work(BaleWork *work, void *context, unsigned worker)
{
    ClusterOp *op = (ClusterOp *)((char *)work - offsetof(ClusterOp, work));
    BaleWorkerContext *wc = context;
    BaleRequest *req = op->req;
    BaleImage *image = req->image;
    BaleStore *s = image->store;
    uint8_t *dst = NULL;
    int ret;

    if (req->kind != REQUEST_READAHEAD && op->len == s->cluster_size) {
        dst = iov_piece(req->iov, req->iovcnt, op->at, op->len);
    }
    dst = dst ? dst : wc->cluster;
    ret = bale_image_unpack(image, wc, bale_value_address(op->value),
                            op->version, op->cluster, op->src, op->avail,
                            dst);
    if (ret == -EIO) {
        ReadRun *runs = NULL;

        op_read_release(op);
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
    if (ret < 0) {
        op_read_release(op);
        op_done(op, ret);
        return;
    }
    if (dst == wc->cluster) {
        if (s->cache && (req->kind == REQUEST_READAHEAD ||
                         req->len < READ_LARGE)) {
            /* Still a reader of the page: the value cannot come back. */
            bale_cache_put(s->cache, image->index, op->cluster, op->value,
                           dst);
        }
        if (req->kind != REQUEST_READAHEAD) {
            iov_copy(req->iov, req->iovcnt, op->at, dst + op->offset,
                     op->len, true);
        }
    }
    op_read_release(op);
    op_done(op, ret);
}

static void run_done(BaleDeviceIo *io, int ret)
{
    ReadRun *run = (ReadRun *)((char *)io - offsetof(ReadRun, io));
    BaleStore *s = run->store;
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
            op->work.fn = op_read_work;
            bale_workers_push(s->workers, &op->work, BALE_WORK_URGENT);
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

    if (!image_has_backing(image) || req->kind == REQUEST_READ_STORED) {
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
        image_has_backing(image)) {
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
    if (s->cache && req->kind != REQUEST_READAHEAD &&
        req->len < READ_LARGE) {
        uint8_t *dst = iov_piece(req->iov, req->iovcnt, op->at, op->len);

        if (dst && bale_cache_get(s->cache, op->cluster, op->value,
                                  op->offset, dst, op->len)) {
            stat_add(&s->stats.cache_hits, 1);
            op_done(op, 0);
            return;
        }
        stat_add(&s->stats.cache_misses, 1);
    }

    pthread_mutex_lock(&s->log_lock);
    /* While the index points into a page that page is not freed. */
    op->value = bale_image_find(image, op->cluster);
    if (!bale_value_class(op->value) ||
        !bale_address_split(s, bale_value_address(op->value), &page,
                            &offset)) {
        pthread_mutex_unlock(&s->log_lock);
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
        op->work.fn = op_read_work;
        bale_workers_push(s->workers, &op->work, BALE_WORK_URGENT);
    } else if (!joined) {
        op_done(op, -ENOMEM);
    }
}

static void op_read_start(ClusterOp *op, ReadRun **runs)
{
    op_read_lookup(op, runs);
    runs_submit(op->req->image->store, *runs);
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

/* Fetch what a sequential reader will want next. */
static void image_readahead(BaleImage *image, uint64_t offset, uint64_t len)
{
    BaleStore *s = image->store;
    uint64_t size = bale_image_size(image);
    uint64_t end = offset + len, from, to;
    BaleRequest *req;
    unsigned slot;

    for (slot = 0; slot < G_N_ELEMENTS(image->readahead_next); slot++) {
        if (__atomic_load_n(&image->readahead_next[slot], __ATOMIC_RELAXED) ==
            offset) {
            break;
        }
    }
    if (slot == G_N_ELEMENTS(image->readahead_next)) {
        slot = __atomic_fetch_add(&image->readahead_slot, 1,
                                  __ATOMIC_RELAXED) %
               G_N_ELEMENTS(image->readahead_next);
        __atomic_store_n(&image->readahead_next[slot], end,
                         __ATOMIC_RELAXED);
        return;
    }
    __atomic_store_n(&image->readahead_next[slot], end, __ATOMIC_RELAXED);

    /* Each stretch of READAHEAD_LEN once, when its reader comes near it. */
    from = bale_align_up(end, READAHEAD_LEN / 2);
    if (from - end >= len && from != end) {
        return;
    }
    to = MIN(from + READAHEAD_LEN / 2, size);
    if (from >= to) {
        return;
    }
    req = request_new(image, REQUEST_READAHEAD, from, to - from,
                      (to - from) / s->cluster_size + 2, NULL, NULL);
    if (!req) {
        return;
    }
    stat_add(&s->stats.readahead, 1);
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

    if (!request_valid(image, offset, len) || len > BALE_REQUEST_MAX) {
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
    if (s->cache && len > 0 && len < READ_LARGE &&
        s->options.cache_size >= 2 * READAHEAD_LEN) {
        image_readahead(image, offset, len);
    }
    read_start(req);
}

/* --- the index --- */

static void image_retire_index(void *opaque)
{
    bale_index_free(opaque);
}

int bale_image_index_set(BaleImage *image, uint64_t cluster, uint64_t value,
                         uint64_t *old)
{
    uint64_t was = 0;
    uint32_t *entries =
        &image->chunk_entries[cluster / BALE_CHUNK_CLUSTERS];
    int ret = bale_index_set(image->index, cluster, value, &was);

    if (ret < 0) {
        return ret;
    }
    if (!was && value) {
        __atomic_fetch_add(entries, 1, __ATOMIC_RELAXED);
    } else if (was && !value) {
        __atomic_fetch_sub(entries, 1, __ATOMIC_RELAXED);
    }
    if (old) {
        *old = was;
    }
    return 0;
}

static void image_account_old(BaleImage *image, uint64_t cluster,
                              uint64_t old)
{
    BaleStore *s = image->store;

    if (s->cache) {
        bale_cache_drop(s->cache, cluster);
    }
    if (old) {
        pthread_mutex_lock(&s->log_lock);
        bale_page_live_sub(s, bale_value_address(old),
                           bale_value_live(old, s->cluster_size));
        pthread_mutex_unlock(&s->log_lock);
    }
}

void bale_image_index_move(BaleImage *image, uint64_t cluster, uint64_t value,
                           uint64_t copy)
{
    uint64_t gone = value;

    if (bale_index_update(image->index, cluster, value, copy, NULL) < 0) {
        gone = copy; /* somebody was faster: the copy is garbage */
    }
    image_account_old(image, cluster, gone);
}

static bool image_removed(uint64_t cluster, uint64_t value, void *opaque)
{
    BaleImage *image = opaque;

    __atomic_fetch_sub(&image->chunk_entries[cluster / BALE_CHUNK_CLUSTERS],
                       1, __ATOMIC_RELAXED);
    /* During recovery live bytes are not counted yet. */
    if (image->store->session) {
        image_account_old(image, cluster, value);
    }
    return true;
}

void bale_image_index_clear_from(BaleImage *image, uint64_t cluster)
{
    bale_index_remove_from(image->index, cluster, image_removed, image);
}

/* --- writing --- */

int bale_image_write_begin(BaleImage *image)
{
    BaleStore *s = image->store;
    int ret;

    for (;;) {
        pthread_rwlock_rdlock(&s->session_lock);
        if (store_failed(s)) {
            pthread_rwlock_unlock(&s->session_lock);
            return -EIO;
        }
        if (s->session) {
            return 0;
        }
        pthread_rwlock_unlock(&s->session_lock);
        pthread_rwlock_wrlock(&s->session_lock);
        ret = bale_session_begin(s);
        pthread_rwlock_unlock(&s->session_lock);
        if (ret < 0) {
            return ret;
        }
    }
}

void bale_image_write_end(BaleImage *image)
{
    pthread_rwlock_unlock(&image->store->session_lock);
}

/* Append to the fresh data; what frees space may use the reserve. */
static int image_append(BaleStore *s, BaleRecord *r, const void *payload,
                        uint64_t live, uint64_t *address)
{
    int ret = bale_log_append(s, BALE_BUCKET_FRESH, r, payload, live,
                              address);

    if (ret == -ENOSPC && r->type != BALE_RECORD_DATA) {
        ret = bale_log_append(s, BALE_BUCKET_COMPACTED, r, payload, live,
                              address);
    }
    return ret;
}

/* Append what @data, one cluster, compresses to, and point the index at it. */
int bale_image_put_cluster(BaleImage *image, BaleWorkerContext *wc,
                           uint64_t cluster, const uint8_t *data)
{
    BaleStore *s = image->store;
    BaleRecord r = {
        .layer = image->record.layer,
        .count = 1,
        .cluster = cluster,
    };
    const void *payload = NULL;
    uint64_t address, value, live, old;
    unsigned size_class = 0;
    ssize_t n;
    int ret;

    if (bale_memory_is_zero(data, s->cluster_size)) {
        r.type = BALE_RECORD_ZERO;
        stat_add(&s->stats.zero_records, 1);
    } else {
        r.type = BALE_RECORD_DATA;
        /* What saves next to nothing is not worth decompressing. */
        n = bale_codec_compress(wc->codec, wc->packed,
                                s->cluster_size - s->cluster_size / 64, data,
                                s->cluster_size);
        if (n < 0) {
            return n;
        }
        r.codec = n ? image->record.codec : BALE_CODEC_NONE;
        r.payload_len = n ? n : s->cluster_size;
        payload = n ? wc->packed : data;
        size_class = bale_size_class(r.payload_len, s->cluster_size);
        if (!n) {
            stat_add(&s->stats.incompressible, 1);
        }
    }
    live = bale_value_live(bale_value(0, size_class), s->cluster_size);

    ret = bale_image_write_begin(image);
    if (ret < 0) {
        return ret;
    }
    ret = image_append(s, &r, payload, live, &address);
    if (ret == 0) {
        value = bale_value(address, size_class);
        ret = bale_image_index_set(image, cluster, value, &old);
        if (ret == 0) {
            image_account_old(image, cluster, old);
        } else {
            image_account_old(image, cluster, value);
        }
        stat_add(&s->stats.logical_bytes, s->cluster_size);
        stat_add(&s->stats.stored_bytes, bale_record_size(&r));
    }
    bale_image_write_end(image);
    bale_epoch_poll(s->epoch); /* one load, unless the index has grown */
    return ret;
}

/* What a whole cluster is written with is in the index, or failed to be. */
static void op_written(ClusterOp *op, int ret)
{
    BaleImage *image = op->req->image;
    unsigned bits = image->store->cluster_bits;

    if (BALE_PLANTED(errno_dropped)) {
        ret = 0;
    }
    if (op->claimed) {
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
    } else {
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

/* The first cluster of our own in [@first, @end), or @end. */
static uint64_t image_next_cluster(BaleImage *image, uint64_t first,
                                   uint64_t end)
{
    uint64_t c = first;

    while (c < end) {
        if (!image_chunk_used(image, c)) {
            c = (c | (BALE_CHUNK_CLUSTERS - 1)) + 1;
        } else if (bale_image_find(image, c)) {
            return c;
        } else {
            c++;
        }
    }
    return end;
}

/*
 * Where a stretch that begins with a cluster of our own ends: the next gap of
 * DISCARD_GAP_MIN clusters, or @end.
 */
static uint64_t image_run_end(BaleImage *image, uint64_t first, uint64_t end)
{
    uint64_t c = first + 1, next;

    while ((next = image_next_cluster(image, c, end)) < end &&
           next - c < DISCARD_GAP_MIN) {
        c = next + 1;
    }
    return c;
}

/* Append one zero record and point the index at it. */
static int image_put_zeroes(BaleImage *image, uint64_t first, uint32_t count)
{
    BaleStore *s = image->store;
    BaleRecord r = {
        .type = BALE_RECORD_ZERO,
        .layer = image->record.layer,
        .cluster = first,
        .count = count,
    };
    uint64_t address, value, old, live, c;
    bool appended;
    int ret = bale_image_write_begin(image);

    if (ret < 0) {
        return ret;
    }
    /* Each cluster that points at a zero record keeps it alive. */
    live = bale_value_live(bale_value(0, 0), s->cluster_size);
    if (BALE_PLANTED(zero_resurrected)) {
        r.layer++; /* a record that recovery takes for another layer's */
    }
    ret = image_append(s, &r, NULL, live * count, &address);
    appended = ret == 0;
    value = bale_value(address, 0);
    for (c = first; ret == 0 && c < first + count; c++) {
        ret = bale_image_index_set(image, c, value, &old);
        if (ret == 0 && old) {
            image_account_old(image, c, old);
        } else if (ret < 0) {
            c--; /* this one does not point at it */
        }
    }
    if (ret < 0 && appended) {
        pthread_mutex_lock(&s->log_lock);
        bale_page_live_sub(s, address, live * (first + count - c));
        pthread_mutex_unlock(&s->log_lock);
    }
    stat_add(&s->stats.zero_records, 1);
    bale_image_write_end(image);
    return ret;
}

/* On a worker: the whole clusters of a zero request. */
static void op_zero_work(BaleWork *work, void *context, unsigned worker)
{
    ClusterOp *op = (ClusterOp *)((char *)work - offsetof(ClusterOp, work));
    BaleImage *image = op->req->image;
    bool discard = op->req->flags & BALE_DISCARD;
    uint64_t first = op->cluster, end = first + op->count;
    int ret = 0;

    while (ret == 0 && first < end) {
        uint64_t run = end;

        if (discard && !image_has_backing(image)) {
            /* What was never written reads as zeroes without our help. */
            first = image_next_cluster(image, first, end);
            if (first == end) {
                break;
            }
            run = image_run_end(image, first, end);
        }
        run = MIN(run, first + ZERO_COUNT_MAX);
        ret = image_put_zeroes(image, first, run - first);
        first = run;
    }
    op_written(op, ret);
}

/* The range is ours. */
static void write_start(BaleRequest *req)
{
    BaleImage *image = req->image;
    BaleStore *s = image->store;

    if (store_failed(s) || s->read_only ||
        __atomic_load_n(&s->corrupt, __ATOMIC_RELAXED)) {
        req->ret = s->read_only ? -EROFS : -EIO;
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
        !(absent && image_has_backing(image)) &&
        !bale_value_class(bale_image_find(image, op->cluster))) {
        op_done(op, 0); /* zero already */
    } else if (absent && image_has_backing(image)) {
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

    if (!request_valid(image, offset, len) || len > BALE_REQUEST_MAX) {
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

    if (!request_valid(image, offset, len)) {
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

/* A flush under way, for the latency histogram. */
typedef struct TimedFlush {
    BaleStore *store;
    uint64_t start_ns;
    BaleDone *done;
    void *opaque;
} TimedFlush;

static void timed_flush_done(void *opaque, int ret)
{
    TimedFlush *f = opaque;

    bale_histogram_add(&f->store->flush_hist, bale_now_ns() - f->start_ns);
    f->done(f->opaque, ret);
    g_free(f);
}

void bale_store_flush(BaleStore *store, BaleDone *done, void *opaque)
{
    TimedFlush *f;

    if (store_failed(store)) {
        done(opaque, -EIO);
        return;
    }
    f = g_new(TimedFlush, 1);
    *f = (TimedFlush){ store, bale_now_ns(), done, opaque };
    if (BALE_PLANTED(flush_misses_mutable)) {
        bale_log_flush(store, timed_flush_done, f);
    } else {
        bale_mutable_flush(store->image->mutable_region, timed_flush_done, f);
    }
}

/* --- status --- */

/* @dirty_end: nothing at or behind it is in the mutable region. */
static BaleClusterStatus cluster_status(BaleImage *image, uint64_t cluster,
                                        uint64_t dirty_end)
{
    BaleStore *s = image->store;
    uint64_t begin = cluster << s->cluster_bits;
    uint64_t value;

    if (begin < dirty_end && bale_mutable_cached(image->mutable_region, begin,
                                                 s->cluster_size)) {
        return BALE_CLUSTER_DATA;
    }
    value = bale_image_find(image, cluster);
    return value == 0                ? BALE_CLUSTER_UNALLOCATED
           : bale_value_class(value) ? BALE_CLUSTER_DATA
                                     : BALE_CLUSTER_ZERO;
}

int bale_image_status(BaleImage *image, uint64_t offset, uint64_t len,
                      BaleClusterStatus *status, uint64_t *run)
{
    BaleStore *s = image->store;
    uint64_t c = offset >> s->cluster_bits;
    uint64_t end, dirty_end;

    if (len == 0 || !request_valid(image, offset, len)) {
        return -EINVAL;
    }
    dirty_end = bale_mutable_end(image->mutable_region);
    *status = cluster_status(image, c, dirty_end);
    end = (offset + len + s->cluster_size - 1) >> s->cluster_bits;
    for (c++; c < end; c++) {
        if (*status == BALE_CLUSTER_UNALLOCATED &&
            c << s->cluster_bits >= dirty_end &&
            !image_chunk_used(image, c)) {
            c |= BALE_CHUNK_CLUSTERS - 1;
        } else if (cluster_status(image, c, dirty_end) != *status) {
            break;
        }
    }
    *run = MIN(MIN(c, end) << s->cluster_bits, offset + len) - offset;
    return 0;
}

/* --- the image itself --- */

uint64_t bale_image_clusters(const BaleImageRecord *record,
                             uint32_t cluster_size)
{
    return record->size / cluster_size + !!(record->size % cluster_size);
}

/* Key bits of an index for @clusters, with room to grow a little. */
static unsigned image_key_bits(uint64_t clusters)
{
    unsigned bits = 1;

    while (bits < BALE_INDEX_KEY_BITS_MAX && clusters >> bits) {
        bits++;
    }
    return MIN(bits + 2, BALE_INDEX_KEY_BITS_MAX);
}

static bool image_copy_entry(uint64_t cluster, uint64_t value, void *opaque)
{
    return bale_index_set(opaque, cluster, value, NULL) == 0;
}

int bale_image_set_record(BaleImage *image, const BaleImageRecord *record)
{
    BaleStore *s = image->store;
    uint64_t clusters = bale_image_clusters(record, s->cluster_size);
    uint64_t chunks = clusters / BALE_CHUNK_CLUSTERS + 1;
    unsigned key_bits = image_key_bits(chunks * BALE_CHUNK_CLUSTERS);

    if (!image->index || chunks > image->chunks) {
        uint32_t *entries = g_try_new0(uint32_t, chunks);
        BaleIndex *index = bale_index_new(key_bits, 0, s->epoch);
        BaleIndex *old = image->index;

        if (!entries || !index ||
            (old && !bale_index_foreach(old, image_copy_entry, index))) {
            g_free(entries);
            bale_index_free(index);
            return -ENOMEM;
        }
        if (old) {
            uint32_t *old_entries = image->chunk_entries;

            memcpy(entries, old_entries, image->chunks * sizeof(*entries));
            __atomic_store_n(&image->chunk_entries, entries,
                             __ATOMIC_RELEASE);
            __atomic_store_n(&image->index, index, __ATOMIC_RELEASE);
            bale_epoch_defer(s->epoch, image_retire_index, old);
            bale_epoch_defer(s->epoch, g_free, old_entries);
            bale_epoch_poll(s->epoch);
        } else {
            image->chunk_entries = entries;
            image->index = index;
        }
        image->chunks = chunks;
    }
    pthread_mutex_lock(&s->log_lock);
    image->record = *record;
    pthread_mutex_unlock(&s->log_lock);
    __atomic_store_n(&image->size, record->size, __ATOMIC_RELEASE);
    return 0;
}

BaleImage *bale_image_new(BaleStore *s, const BaleImageRecord *record,
                          GError **errp)
{
    BaleImage *image = g_new0(BaleImage, 1);

    image->store = s;
    pthread_mutex_init(&image->range_lock, NULL);
    image->ranges_waiting_tail = &image->ranges_waiting;
    image->mutable_region = bale_mutable_new(image);
    if (!image->mutable_region || bale_image_set_record(image, record) < 0) {
        g_set_error(errp, BALE_STORE_ERROR, BALE_STORE_ERROR_NO_MEMORY,
                    "no memory for an index of %" PRIu64 " bytes of image",
                    record->size);
        bale_image_free(image);
        return NULL;
    }
    return image;
}

void bale_image_free(BaleImage *image)
{
    if (image) {
        bale_mutable_free(image->mutable_region);
        bale_index_free(image->index);
        g_free(image->chunk_entries);
        pthread_mutex_destroy(&image->range_lock);
        g_free(image);
    }
}

uint64_t bale_image_size(BaleImage *image)
{
    return __atomic_load_n(&image->size, __ATOMIC_ACQUIRE);
}

void bale_image_get_info(BaleImage *image, BaleImageInfo *info)
{
    BaleStore *s = image->store;
    BaleIndexStats stats;

    bale_index_get_stats(image->index, &stats);
    memset(info, 0, sizeof(*info));
    pthread_mutex_lock(&s->log_lock);
    info->size = image->record.size;
    info->cluster_size = s->cluster_size;
    info->codec = image->record.codec;
    info->level = image->record.level;
    info->layer = image->record.layer;
    info->has_backing_file = image->record.backing_file[0];
    memcpy(info->name, image->record.name, sizeof(info->name));
    memcpy(info->backing_file, image->record.backing_file,
           sizeof(info->backing_file));
    memcpy(info->backing_format, image->record.backing_format,
           sizeof(info->backing_format));
    info->allocated_clusters = stats.keys;
    pthread_mutex_unlock(&s->log_lock);
}

void bale_image_set_backing_read(BaleImage *image, BaleBackingRead *read,
                                 void *opaque)
{
    image->backing_opaque = opaque;
    image->backing_read = read;
}

void bale_image_set_backing_present(BaleImage *image,
                                    BaleBackingPresent *present)
{
    image->backing_present = present;
}

BaleImage *bale_image_open(BaleStore *store, const char *name, GError **errp)
{
    if (name && strcmp(name, store->image->record.name)) {
        g_set_error(errp, BALE_STORE_ERROR, BALE_STORE_ERROR_INVALID,
                    "no image '%s' in this store", name);
        return NULL;
    }
    pthread_mutex_lock(&store->log_lock);
    store->image->openers++;
    pthread_mutex_unlock(&store->log_lock);
    return store->image;
}

void bale_image_close(BaleImage *image)
{
    pthread_mutex_lock(&image->store->log_lock);
    g_assert(image->openers > 0);
    image->openers--;
    pthread_mutex_unlock(&image->store->log_lock);
}

/* Append @record; session_lock is held. */
int bale_image_record_append(BaleImage *image, const BaleImageRecord *record,
                             bool shrinks)
{
    BaleStore *s = image->store;
    g_autofree uint8_t *payload = g_malloc(BALE_IMAGE_PAYLOAD_MAX);
    BaleRecord r = {
        .type = BALE_RECORD_IMAGE,
        .layer = record->layer,
        .payload_len = bale_image_encode(record, payload),
    };
    uint64_t address, page, offset;
    int ret;

    ret = bale_log_append(s, BALE_BUCKET_META, &r, payload,
                          BALE_RECORD_HEADER_LEN, &address);
    if (ret < 0) {
        return ret;
    }
    pthread_mutex_lock(&s->log_lock);
    if (shrinks && bale_address_split(s, address, &page, &offset)) {
        BalePage *p = bale_page(s, page);

        p->tombstone_seq = MAX(p->tombstone_seq, r.seq);
    }
    if (image->record_address) {
        bale_page_live_sub(s, image->record_address, BALE_RECORD_HEADER_LEN);
    }
    image->record_address = address;
    pthread_mutex_unlock(&s->log_lock);
    return 0;
}

static bool image_error(GError **errp, int ret, const char *what)
{
    g_set_error(errp, BALE_STORE_ERROR,
                ret == -ENOSPC   ? BALE_STORE_ERROR_NO_SPACE
                : ret == -ENOMEM ? BALE_STORE_ERROR_NO_MEMORY
                : ret == -EROFS  ? BALE_STORE_ERROR_READ_ONLY
                                 : BALE_STORE_ERROR_IO,
                "%s: %s", what, g_strerror(-ret));
    return false;
}

/* Make @record the image's, durably. */
static bool image_change(BaleImage *image, const BaleImageRecord *record,
                         const char *what, GError **errp)
{
    BaleStore *s = image->store;
    bool shrinks = record->size < image->record.size;
    int ret = bale_store_flush_sync(s);

    if (ret < 0) {
        return image_error(errp, ret, what);
    }
    if (shrinks) {
        bale_mutable_discard(image->mutable_region, record->size,
                             image->record.size - record->size);
    }

    pthread_rwlock_wrlock(&s->session_lock);
    ret = bale_session_begin(s);
    if (ret == 0) {
        ret = bale_image_record_append(image, record, shrinks);
    }
    if (ret == 0 && shrinks) {
        bale_image_index_clear_from(
            image, bale_image_clusters(record, s->cluster_size));
    }
    if (ret == 0) {
        ret = bale_image_set_record(image, record);
    }
    pthread_rwlock_unlock(&s->session_lock);
    if (ret == 0 && !BALE_PLANTED(resize_not_durable)) {
        ret = bale_log_flush_sync(s);
    }
    return ret == 0 || image_error(errp, ret, what);
}

bool bale_image_resize(BaleImage *image, uint64_t size, GError **errp)
{
    BaleStore *s = image->store;
    BaleImageRecord record = image->record;
    uint64_t old = record.size;
    uint64_t tail = bale_align_up(size, s->cluster_size);

    if (size > BALE_IMAGE_SIZE_MAX ||
        size / s->cluster_size >= BALE_IMAGE_CLUSTERS_MAX) {
        g_set_error(errp, BALE_STORE_ERROR, BALE_STORE_ERROR_INVALID,
                    "an image of %" PRIu64 " bytes is too large", size);
        return false;
    }
    if (size < old && tail > size) {
        /* Bytes behind the end of the last cluster must be zero. */
        int ret = bale_image_zero_sync(image, size, MIN(tail, old) - size, 0);

        if (ret < 0) {
            return image_error(errp, ret, "clearing the image's new end");
        }
    }
    record.size = size;
    return image_change(image, &record, "resizing the image", errp);
}

bool bale_image_set_backing(BaleImage *image, const char *backing_file,
                            const char *backing_format, GError **errp)
{
    BaleImageRecord record = image->record;

    backing_file = backing_file ? backing_file : "";
    backing_format = backing_format ? backing_format : "";
    if (strlen(backing_file) > BALE_BACKING_NAME_MAX ||
        strlen(backing_format) >= sizeof(record.backing_format)) {
        g_set_error(errp, BALE_STORE_ERROR, BALE_STORE_ERROR_INVALID,
                    "the backing file's name or format is too long");
        return false;
    }
    g_strlcpy(record.backing_file, backing_file, sizeof(record.backing_file));
    g_strlcpy(record.backing_format, backing_format,
              sizeof(record.backing_format));
    return image_change(image, &record, "changing the backing file", errp);
}

bool bale_image_clear(BaleImage *image, GError **errp)
{
    BaleStore *s = image->store;
    BaleRecord r = { .type = BALE_RECORD_DROP, .layer = image->record.layer };
    uint64_t address;
    int ret = bale_store_flush_sync(s);

    if (ret < 0) {
        return image_error(errp, ret, "emptying the image");
    }
    pthread_rwlock_wrlock(&s->session_lock);
    ret = bale_session_begin(s);
    if (ret == 0) {
        ret = image_append(s, &r, NULL, 0, &address);
    }
    if (ret == 0) {
        bale_image_index_clear_from(image, 0);
    }
    pthread_rwlock_unlock(&s->session_lock);
    if (ret == 0) {
        ret = bale_log_flush_sync(s);
    }
    return ret == 0 || image_error(errp, ret, "emptying the image");
}

/* --- blocking forms --- */

int bale_image_read_sync(BaleImage *image, uint64_t offset, void *buf,
                         size_t len)
{
    struct iovec iov = { buf, len };
    BaleSync sync = BALE_SYNC_INIT;

    bale_image_read(image, offset, &iov, 1, bale_sync_done, &sync);
    return bale_sync_wait(&sync);
}

int bale_image_write_sync(BaleImage *image, uint64_t offset, const void *buf,
                          size_t len, unsigned flags)
{
    struct iovec iov = { (void *)buf, len };
    BaleSync sync = BALE_SYNC_INIT;

    bale_image_write(image, offset, &iov, 1, flags, bale_sync_done, &sync);
    return bale_sync_wait(&sync);
}

int bale_image_zero_sync(BaleImage *image, uint64_t offset, uint64_t len,
                         unsigned flags)
{
    BaleSync sync = BALE_SYNC_INIT;

    bale_image_zero(image, offset, len, flags, bale_sync_done, &sync);
    return bale_sync_wait(&sync);
}

int bale_store_flush_sync(BaleStore *store)
{
    BaleSync sync = BALE_SYNC_INIT;

    bale_store_flush(store, bale_sync_done, &sync);
    return bale_sync_wait(&sync);
}
