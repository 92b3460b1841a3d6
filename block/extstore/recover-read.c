/*
 * Recovery: reading pages.
 *
 * A store may have many pages of which next to nothing is to be read, or few
 * with many small segments.  So the first blocks of pages are read for several
 * pages at once; and where reads follow each other, more is read with each of
 * them: as much again each time, up to SCAN_AHEAD_MAX.
 *
 * Errors: what is read ahead may be where the device cannot be read, and
 * nobody has to know it.  Then only what was asked for is read.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "recover-internal.h"

#include <errno.h>

#include "util/memory.h"

/* Bytes read at once where reads follow each other. */
#define SCAN_AHEAD_MAX (1u << 20)
/* Reads that are no farther apart follow each other. */
#define SCAN_GAP_MAX (64u << 10)

/* Of so many pages the first SCAN_HEAD_LEN bytes are read at once. */
#define SCAN_HEADS_MAX 64u
#define SCAN_HEAD_LEN (2 * BALE_BLOCK_SIZE)

/* What @scan needs to read several heads at once. */
struct ScanHeads {
    uint8_t *buf;    /* SCAN_HEADS_MAX heads */
    uint64_t first;  /* page of the first one */
    unsigned n;      /* that have been asked for */
    pthread_mutex_t lock;
    pthread_cond_t cond;
    unsigned under_way; /* under lock */
    struct ScanHead {
        BaleDeviceIo io; /* first, so that a completion finds the head */
        struct ScanHeads *heads;
        bool ok;
    } head[SCAN_HEADS_MAX];
};

static void head_read(BaleDeviceIo *io, int ret)
{
    struct ScanHead *head = (struct ScanHead *)io;
    ScanHeads *heads = head->heads;

    pthread_mutex_lock(&heads->lock);
    head->ok = ret == 0;
    if (--heads->under_way == 0) {
        pthread_cond_signal(&heads->cond);
    }
    pthread_mutex_unlock(&heads->lock);
}

ScanHeads *bale_scan_heads_new(void)
{
    ScanHeads *heads = g_try_new0(ScanHeads, 1);

    if (!heads) {
        return NULL;
    }
    pthread_mutex_init(&heads->lock, NULL);
    pthread_cond_init(&heads->cond, NULL);
    heads->buf = bale_memory_try_alloc(BALE_BLOCK_SIZE,
                                       SCAN_HEADS_MAX * SCAN_HEAD_LEN);
    if (!heads->buf) {
        bale_scan_heads_free(heads);
        return NULL;
    }
    return heads;
}

void bale_scan_heads_free(ScanHeads *heads)
{
    if (heads) {
        pthread_mutex_destroy(&heads->lock);
        pthread_cond_destroy(&heads->cond);
        bale_memory_free(heads->buf);
        g_free(heads);
    }
}

void bale_scan_heads(Scan *scan, uint64_t page)
{
    BaleStore *s = scan->s;
    BaleDevice *dev = s->dev;
    ScanHeads *heads = scan->heads;

    if (page >= heads->first && page < heads->first + heads->n) {
        return;
    }
    heads->first = page;
    heads->n = MIN(scan->pages - page, SCAN_HEADS_MAX);
    scan->ret = bale_limit_read(s, heads->n * (uint64_t)SCAN_HEAD_LEN);
    if (scan->ret < 0) {
        heads->n = 0;
        return;
    }
    heads->under_way = heads->n;
    if (dev->ops->plug) {
        dev->ops->plug(dev);
    }
    for (unsigned i = 0; i < heads->n; i++) {
        struct ScanHead *head = &heads->head[i];

        *head = (struct ScanHead){ .heads = heads };
        head->io.offset = page_address(s, page + i);
        head->io.buf = heads->buf + i * SCAN_HEAD_LEN;
        head->io.len = SCAN_HEAD_LEN;
        head->io.done = head_read;
        dev->ops->get(dev, &head->io);
    }
    if (dev->ops->unplug) {
        dev->ops->unplug(dev);
    }
    pthread_mutex_lock(&heads->lock);
    while (heads->under_way) {
        pthread_cond_wait(&heads->cond, &heads->lock);
    }
    pthread_mutex_unlock(&heads->lock);
}

/* Where [@begin, @end) of @page lies in memory, if it is a head; or NULL. */
static const uint8_t *scan_head(Scan *scan, uint64_t page, uint64_t begin,
                                uint64_t end)
{
    ScanHeads *heads = scan->heads;
    uint64_t i = page - heads->first;

    return page >= heads->first && i < heads->n && end <= SCAN_HEAD_LEN &&
                   heads->head[i].ok
               ? heads->buf + i * SCAN_HEAD_LEN + begin
               : NULL;
}

/* Read [@begin, @end) of @page to scan->buf.  0, -EFBIG, a device's error. */
static int scan_fetch(Scan *scan, uint64_t page, uint64_t begin, uint64_t end)
{
    BaleStore *s = scan->s;
    int ret = bale_limit_read(s, end - begin);

    scan->window_end = 0;
    if (ret == 0) {
        ret = bale_device_get_sync(s->dev, page_address(s, page) + begin,
                                   scan->buf, end - begin);
    }
    if (ret == 0) {
        scan->window_page = page;
        scan->window_begin = begin;
        scan->window_end = end;
    }
    return ret;
}

const uint8_t *bale_scan_read(Scan *scan, uint64_t page, uint64_t offset,
                              uint64_t len)
{
    uint64_t begin = bale_align_down(offset, BALE_BLOCK_SIZE);
    uint64_t end = bale_align_up(offset + len, BALE_BLOCK_SIZE);
    const uint8_t *head = scan_head(scan, page, offset, end);
    uint64_t ahead;

    if (head) {
        return head;
    }
    if (end - begin > scan->buf_len) {
        scan->ret = -EIO; /* longer than anything we write */
        return NULL;
    }
    if (page == scan->window_page && begin >= scan->window_begin &&
        end <= scan->window_end) {
        return scan->buf + (offset - scan->window_begin);
    }
    if (page == scan->window_page && begin >= scan->window_begin &&
        begin <= scan->window_end + SCAN_GAP_MAX) {
        scan->ahead = CLAMP(2 * scan->ahead, BALE_BLOCK_SIZE, SCAN_AHEAD_MAX);
    } else {
        scan->ahead = 0;
    }
    ahead = MIN(end + scan->ahead, scan->s->page_size);
    ahead = MAX(end, MIN(ahead, begin + scan->buf_len));
    scan->ret = scan_fetch(scan, page, begin, ahead);
    if (scan->ret < 0 && ahead > end) {
        scan->ret = scan_fetch(scan, page, begin, end);
    }
    return scan->ret < 0 ? NULL : scan->buf + (offset - begin);
}
