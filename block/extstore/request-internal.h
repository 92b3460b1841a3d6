/*
 * Requests on clusters: what their parts share.  request.c makes and ends
 * requests, and writes; request-read.c reads; readahead.c tells what to read
 * before it is asked for.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef BALE_EXTSTORE_REQUEST_INTERNAL_H
#define BALE_EXTSTORE_REQUEST_INTERNAL_H

#include "store-internal.h"

typedef struct BaleRequest BaleRequest;
typedef struct BaleClusterOp BaleClusterOp;
typedef struct BaleReadRun BaleReadRun;

typedef enum BaleRequestKind {
    REQUEST_READ,
    REQUEST_READ_STORED, /* one whole cluster, for a write-out */
    REQUEST_READAHEAD,
    REQUEST_WRITE,
    REQUEST_ZERO,
    REQUEST_COPY_UP, /* whole clusters, from the layers under the top */
} BaleRequestKind;

/* What one request does to one cluster, or (zero) to a range of them. */
struct BaleClusterOp {
    BaleWork work;
    BaleRequest *req;
    uint64_t cluster;
    uint64_t count;      /* > 1 or 0 < : zero only */
    bool claimed;        /* of the mutable region */
    bool compared;       /* with what is there */
    uint32_t offset;     /* in the cluster */
    uint32_t len;        /* 0: the whole range of a zero request */
    uint64_t at;         /* in the request's data */
    /* reading */
    uint64_t value;
    uint64_t version;
    BaleReadRun *run;
    BaleWriteBuffer *pinned;
    const uint8_t *src;
    size_t avail;
    unsigned retries;
    BaleClusterOp *run_next;
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
    BaleRequestKind kind;
    unsigned flags;
    bool scan;             /* a small read that continues a stream */
    bool in_place;         /* whoever asks would only wait */
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
    BaleClusterOp ops[];
};

static inline BaleClusterOp *bale_op_of_work(BaleWork *work)
{
    return (BaleClusterOp *)((char *)work - offsetof(BaleClusterOp, work));
}

uint64_t bale_iov_len(const struct iovec *iov, int iovcnt);
/* Copy between a vector, from @at on, and a buffer; @buf NULL: zeroes. */
void bale_iov_copy(const struct iovec *iov, int iovcnt, uint64_t at,
                   void *buf, uint64_t len, bool to_iov);
/* Where [@at, @at + @len) of the vector is one piece of memory, or NULL. */
uint8_t *bale_iov_piece(const struct iovec *iov, int iovcnt, uint64_t at,
                        uint64_t len);

/*
 * A request with room for as many ops as @kind needs for @len bytes; NULL: no
 * memory.  The caller holds one reference (pending).
 */
BaleRequest *bale_request_new(BaleImage *image, BaleRequestKind kind,
                              uint64_t offset, uint64_t len, BaleDone *done,
                              void *opaque);
/*
 * The same with one op for each cluster, for a caller of the engine.  NULL: it
 * cannot be, and @done was told so.
 */
BaleRequest *bale_request_begin(BaleImage *image, BaleRequestKind kind,
                                uint64_t offset, uint64_t len, BaleDone *done,
                                void *opaque);
/* One op for each cluster that the request touches. */
void bale_request_add_clusters(BaleRequest *req);
void bale_request_unref(BaleRequest *req);
/* @op is over: 0 or a negative errno.  May end and free its request. */
void bale_op_done(BaleClusterOp *op, int ret);

/* request-read.c: start all ops, and drop the caller's reference. */
void bale_request_read(BaleRequest *req);

/*
 * readahead.c: @len bytes from @offset on are read.  True: read what lies from
 * *@from to *@to ahead.  *@scan: the read continues others.
 */
bool bale_readahead_want(BaleImage *image, uint64_t offset, uint64_t len,
                         bool *scan, uint64_t *from, uint64_t *to);

#endif
