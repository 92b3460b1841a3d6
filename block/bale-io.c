/*
 * The format driver "bale": requests.
 *
 * Those of coroutines become the engine's, and what the engine reads under the
 * image comes from the backing node.
 *
 * Threads: requests run in the node's AioContext, under QEMU's rules.  The
 * engine calls for backing reads, and completes, on any thread; both go through
 * a bottom half before they touch anything of QEMU's.
 *
 * Errors: negative errno.  A store that has failed is revived by the first
 * request that changes something.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "qemu/osdep.h"
#include "block/block_int.h"

#include "extstore/store.h"

#include "bale-bridge-internal.h"
#include "bale-internal.h"
#include "bale-node-internal.h"
#include "bale-shared-internal.h"

/* Pieces of one read that are under way together; more wait for these. */
#define READ_PIECES_MAX 32

/*
 * --- Reads of the backing node for the engine
 */

typedef struct BaleBackingRequest {
    BlockDriverState *bs;
    uint64_t offset;
    void *buf;
    size_t len;
    BaleDone *done;
    void *done_opaque;
} BaleBackingRequest;

static void coroutine_fn backing_read_entry(void *opaque)
{
    BaleBackingRequest *r = opaque;
    BlockDriverState *bs = r->bs;
    QEMUIOVector qiov;
    int ret = 0;

    if (bs->backing) {
        /* The block layer fills what lies past the end with zeroes. */
        qemu_iovec_init_buf(&qiov, r->buf, r->len);
        ret = bdrv_co_preadv(bs->backing, r->offset, r->len, &qiov, 0);
    } else {
        memset(r->buf, 0, r->len);
    }
    bdrv_dec_in_flight(bs);
    r->done(r->done_opaque, MIN(ret, 0));
    g_free(r);
}

static void backing_read_bh(void *opaque)
{
    BaleBackingRequest *r = opaque;
    AioContext *ctx = qemu_get_current_aio_context();

    aio_context_acquire(ctx);
    qemu_coroutine_enter(qemu_coroutine_create(backing_read_entry, r));
    aio_context_release(ctx);
}

/* From any thread; the graph stays as it is while a request is under way. */
static bool backing_present(void *opaque)
{
    BlockDriverState *bs = opaque;

    return qatomic_read(&bs->backing) != NULL;
}

/*
 * Called from any thread, but always for a request of this node that is still
 * under way: so neither the node nor its place in the graph changes meanwhile.
 */
static void backing_read(void *opaque, uint64_t offset, void *buf, size_t len,
                         BaleDone *done, void *done_opaque)
{
    BlockDriverState *bs = opaque;
    BaleBackingRequest *r;

    if (!qatomic_read(&bs->backing)) {
        memset(buf, 0, len);
        done(done_opaque, 0);
        return;
    }

    r = g_new(BaleBackingRequest, 1);
    *r = (BaleBackingRequest) {
        .bs = bs,
        .offset = offset,
        .buf = buf,
        .len = len,
        .done = done,
        .done_opaque = done_opaque,
    };
    bdrv_inc_in_flight(bs);
    aio_bh_schedule_oneshot(bdrv_get_aio_context(bs), backing_read_bh, r);
}

void bale_bs_set_backing(BlockDriverState *bs)
{
    BDRVBaleState *s = bs->opaque;

    bale_image_set_backing_read(s->image, backing_read, bs);
    bale_image_set_backing_present(s->image, backing_present);
    bale_image_set_skip_unchanged(s->image, s->skip_unchanged);
    bale_image_set_salvage(s->image, s->salvage);
}

/*
 * --- Requests
 */

/* Before each request: what waits because of a drain may be needed by it. */
static void request_begin(BlockDriverState *bs)
{
    BDRVBaleState *s = bs->opaque;

    bale_bdrv_device_kick(s->dev);
}

static void revive_thread(void *opaque)
{
    BDRVBaleState *s = opaque;
    g_autoptr(GError) err = NULL;

    /* What it says is as good as the error of the request that follows. */
    bale_store_revive(s->store, &err);
}

/*
 * Before each request that changes something.  A VM that was stopped by an
 * error goes on when somebody has mended the disk, and repeats the request:
 * that must be able to succeed without opening the image again.
 */
static void coroutine_fn change_begin(BlockDriverState *bs)
{
    BDRVBaleState *s = bs->opaque;

    request_begin(bs);
    if (bale_store_poisoned(s->store)) {
        qemu_co_mutex_lock(&s->shared->revive_lock);
        if (bale_store_poisoned(s->store)) {
            bale_bridge_run(NULL, revive_thread, s);
        }
        qemu_co_mutex_unlock(&s->shared->revive_lock);
    }
}

/*
 * Submit the read of a part of @qiov.  @slice holds the vector until the
 * request is complete and is then the caller's to destroy.
 */
static void coroutine_fn submit_read(BDRVBaleState *s, BaleCoRequest *req,
                                     uint64_t offset, size_t bytes,
                                     QEMUIOVector *qiov, size_t qiov_offset,
                                     QEMUIOVector *slice)
{
    qemu_iovec_init_slice(slice, qiov, qiov_offset, bytes);
    bale_co_request_add(req);
    bale_image_read(s->image, offset, slice->iov, slice->niov,
                    bale_co_request_done, req);
}

/*
 * Read with a backing node: what the image holds comes from the engine, the
 * rest straight from below, without a detour through the engine's threads.
 * Reads from the engine go on while the coroutine reads from below.  Returns
 * how many bytes it did, at least 1, or a negative errno.
 */
static int64_t coroutine_fn read_layered(BlockDriverState *bs, uint64_t offset,
                                         uint64_t bytes, QEMUIOVector *qiov,
                                         size_t qiov_offset)
{
    BDRVBaleState *s = bs->opaque;
    QEMUIOVector slices[READ_PIECES_MAX];
    BaleCoRequest req;
    uint64_t done = 0;
    int pieces = 0;
    int ret = 0, ret2;
    int i;

    bale_co_request_init(&req);
    while (done < bytes && pieces < READ_PIECES_MAX) {
        BaleClusterStatus status;
        uint64_t run;

        ret = bale_image_status(s->image, offset + done, bytes - done,
                                &status, &run);
        if (ret < 0) {
            break;
        }
        run = MIN(run, bytes - done);
        if (status == BALE_CLUSTER_ZERO ||
            (status == BALE_CLUSTER_UNALLOCATED && !bs->backing)) {
            qemu_iovec_memset(qiov, qiov_offset + done, 0, run);
        } else if (status == BALE_CLUSTER_DATA) {
            submit_read(s, &req, offset + done, run, qiov, qiov_offset + done,
                        &slices[pieces++]);
        } else {
            ret = bdrv_co_preadv_part(bs->backing, offset + done, run, qiov,
                                      qiov_offset + done, 0);
            if (ret < 0) {
                break;
            }
        }
        done += run;
    }
    ret2 = bale_co_request_wait(&req);
    for (i = 0; i < pieces; i++) {
        qemu_iovec_destroy(&slices[i]);
    }
    ret = MIN(ret, ret2);
    return ret < 0 ? ret : (int64_t)done;
}

int coroutine_fn bale_co_preadv_part(BlockDriverState *bs,
                                            int64_t offset, int64_t bytes,
                                            QEMUIOVector *qiov,
                                            size_t qiov_offset,
                                            BdrvRequestFlags flags)
{
    BDRVBaleState *s = bs->opaque;
    uint64_t size = bale_image_size(s->image);
    QEMUIOVector slice;
    BaleCoRequest req;
    int ret;

    request_begin(bs);
    if ((uint64_t)offset + bytes > size) {
        /* The rest of the last sector, which the image does not have. */
        uint64_t have = (uint64_t)offset < size ? size - offset : 0;

        qemu_iovec_memset(qiov, qiov_offset + have, 0, bytes - have);
        bytes = have;
    }
    if (bytes == 0) {
        return 0;
    }

    if (!bs->backing) {
        bale_co_request_init(&req);
        submit_read(s, &req, offset, bytes, qiov, qiov_offset, &slice);
        ret = bale_co_request_wait(&req);
        qemu_iovec_destroy(&slice);
        return ret;
    }

    while (bytes > 0) {
        int64_t done = read_layered(bs, offset, bytes, qiov, qiov_offset);

        if (done < 0) {
            return done;
        }
        offset += done;
        qiov_offset += done;
        bytes -= done;
    }
    return 0;
}

int coroutine_fn bale_co_pwritev_part(BlockDriverState *bs,
                                             int64_t offset, int64_t bytes,
                                             QEMUIOVector *qiov,
                                             size_t qiov_offset,
                                             BdrvRequestFlags flags)
{
    BDRVBaleState *s = bs->opaque;
    QEMUIOVector slice;
    BaleCoRequest req;
    int ret;

    if (bytes == 0) {
        return 0;
    }
    change_begin(bs);
    qemu_iovec_init_slice(&slice, qiov, qiov_offset, bytes);
    bale_co_request_init(&req);
    bale_co_request_add(&req);
    bale_image_write(s->image, offset, slice.iov, slice.niov,
                     flags & BDRV_REQ_FUA ? BALE_FUA : 0,
                     bale_co_request_done, &req);
    ret = bale_co_request_wait(&req);
    qemu_iovec_destroy(&slice);
    return ret;
}

/*
 * Every write is stored compressed, so this one is a write like any other; but
 * the block layer does not split it by bl.max_transfer.
 */
int coroutine_fn
bale_co_pwritev_compressed_part(BlockDriverState *bs, int64_t offset,
                                int64_t bytes, QEMUIOVector *qiov,
                                size_t qiov_offset)
{
    while (bytes > 0) {
        int64_t part = MIN(bytes, (int64_t)BALE_REQUEST_MAX);
        int ret = bale_co_pwritev_part(bs, offset, part, qiov, qiov_offset, 0);

        if (ret < 0) {
            return ret;
        }
        offset += part;
        qiov_offset += part;
        bytes -= part;
    }
    return 0;
}

int coroutine_fn bale_co_zero_range(BlockDriverState *bs, uint64_t offset,
                                   uint64_t bytes, unsigned flags)
{
    BDRVBaleState *s = bs->opaque;
    BaleCoRequest req;

    bale_co_request_init(&req);
    bale_co_request_add(&req);
    bale_image_zero(s->image, offset, bytes, flags, bale_co_request_done,
                    &req);
    return bale_co_request_wait(&req);
}

/* Flags that drop clusters, if nothing can show through where they were. */
static unsigned discard_flags(BlockDriverState *bs)
{
    return bs->backing ? 0 : BALE_DISCARD;
}

/*
 * The same, but for whole clusters that read as zeroes already, as the engine
 * cannot know what lies under the image.
 */
static int coroutine_fn zero_nonzero(BlockDriverState *bs, int64_t offset,
                                     int64_t bytes, unsigned flags)
{
    BDRVBaleState *s = bs->opaque;
    int64_t end = offset + bytes, pos = offset, pnum;
    int ret = 0;

    while (ret == 0 && offset < end) {
        int64_t skip_from = end, skip_to = end;

        for (; pos < end && skip_from == end; pos += pnum) {
            ret = bdrv_block_status_above(bs, NULL, pos, end - pos, &pnum,
                                          NULL, NULL);
            if (ret < 0 || pnum == 0) {
                pnum = end - pos;
            } else if (ret & BDRV_BLOCK_ZERO) {
                int64_t from = QEMU_ALIGN_UP(pos, s->cluster_size);
                int64_t to = QEMU_ALIGN_DOWN(pos + pnum, s->cluster_size);

                if (from < to) {
                    skip_from = from;
                    skip_to = to;
                }
            }
        }
        ret = offset < skip_from ? bale_co_zero_range(bs, offset,
                                                      skip_from - offset,
                                                      flags)
                                 : 0;
        offset = skip_to;
    }
    return ret;
}

int coroutine_fn bale_co_pwrite_zeroes(BlockDriverState *bs,
                                              int64_t offset, int64_t bytes,
                                              BdrvRequestFlags flags)
{
    BDRVBaleState *s = bs->opaque;
    uint64_t size = bale_image_size(s->image);
    unsigned zero_flags = flags & BDRV_REQ_FUA ? BALE_FUA : 0;

    change_begin(bs);
    if (flags & BDRV_REQ_MAY_UNMAP) {
        zero_flags |= discard_flags(bs);
    }
    /* The rest of the last sector, which the image does not have, is zero. */
    if ((uint64_t)offset + bytes > size) {
        bytes = (uint64_t)offset < size ? size - offset : 0;
    }
    if (s->skip_unchanged && bs->backing) {
        return zero_nonzero(bs, offset, bytes, zero_flags);
    }
    return bytes ? bale_co_zero_range(bs, offset, bytes, zero_flags) : 0;
}

int coroutine_fn bale_co_pdiscard(BlockDriverState *bs, int64_t offset,
                                         int64_t bytes)
{
    BDRVBaleState *s = bs->opaque;
    uint64_t size = bale_image_size(s->image);
    uint64_t end = MIN((uint64_t)offset + bytes, size);

    change_begin(bs);
    if ((uint64_t)offset >= end) {
        return 0;
    }
    /* A part of a cluster would have to be written, for no gain. */
    if (!QEMU_IS_ALIGNED(offset, s->cluster_size) ||
        (!QEMU_IS_ALIGNED(end, s->cluster_size) && end != size)) {
        return -ENOTSUP;
    }
    return bale_co_zero_range(bs, offset, end - offset, discard_flags(bs));
}

int coroutine_fn bale_co_flush_to_disk(BlockDriverState *bs)
{
    BDRVBaleState *s = bs->opaque;
    BaleCoRequest req;

    if (!s->writes) {
        return 0;
    }
    change_begin(bs);
    bale_co_request_init(&req);
    bale_co_request_add(&req);
    bale_store_flush(s->store, bale_co_request_done, &req);
    return bale_co_request_wait(&req);
}

/*
 * With cache=unsafe the block layer stops after this one: what was flushed then
 * survives the end of this process, but not that of the host.
 */
int coroutine_fn bale_co_flush_to_os(BlockDriverState *bs)
{
    return bs->open_flags & BDRV_O_NO_FLUSH ? bale_co_flush_to_disk(bs) : 0;
}

int coroutine_fn bale_co_block_status(BlockDriverState *bs,
                                             bool want_zero, int64_t offset,
                                             int64_t bytes, int64_t *pnum,
                                             int64_t *map,
                                             BlockDriverState **file)
{
    BDRVBaleState *s = bs->opaque;
    uint64_t size = bale_image_size(s->image);
    BaleClusterStatus status;
    uint64_t run;
    int ret;

    request_begin(bs);
    if ((uint64_t)offset >= size) {
        *pnum = bytes;
        return BDRV_BLOCK_ZERO;
    }
    ret = bale_image_status(s->image, offset, MIN((uint64_t)bytes,
                            size - offset), &status, &run);
    if (ret < 0) {
        return ret;
    }
    *pnum = MIN(run, (uint64_t)bytes);
    if ((uint64_t)offset + *pnum == size) {
        *pnum = QEMU_ALIGN_UP(*pnum, BDRV_SECTOR_SIZE);
    }

    switch (status) {
    case BALE_CLUSTER_DATA:
        return BDRV_BLOCK_DATA;
    case BALE_CLUSTER_ZERO:
        return BDRV_BLOCK_ZERO;
    case BALE_CLUSTER_UNALLOCATED:
        return 0;
    }
    g_assert_not_reached();
}
