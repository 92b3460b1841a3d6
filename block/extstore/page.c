/*
 * The page table: which page holds what, and when it can be reused.
 *
 * A page goes FREE -> ACTIVE -> SEALED -> DEAD -> REPLACED -> BARRED ->
 * MARKING -> MARKED -> RELEASING -> FREE, and never another way.  Invariants:
 *
 *  1. A page leaves SEALED only when nothing live is in it, no device read and
 *     no write buffer is on it, and no drop or shrinking image record in it
 *     hides a record that exists elsewhere.  (A data or zero record that no
 *     cluster points at hides nothing: what took its place is newer still.)
 *  2. DEAD ends with a flush that was requested after the page died: what
 *     replaced its records is durable then.
 *  3. REPLACED ends when the barriers of what that flush has proven are in a
 *     segment, BARRED with a flush that was requested after that.  Otherwise
 *     damage to what replaced the records would look like a torn tail, with
 *     nothing left but what is older still.
 *  4. MARKED ends with a flush that was requested after the header was marked
 *     as freed: the old header cannot come back after a crash, neither to make
 *     stale records valid again nor to make released space look like damage.
 *     RELEASING writes the mark again, behind the first one: should that be
 *     lost or damaged, the page is not taken for one that is in use.
 *  5. Each time a page becomes ACTIVE it gets a version that no page ever had.
 *
 * There is no eviction: when no page is free the answer is -ENOSPC.  Pages,
 * buckets by lifetime and live bytes per page follow memcached's extstore.
 *
 * Threads: everything under log_lock, but bale_page_prepare(), which takes it
 * and calls the device without it.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "store-internal.h"

#include <errno.h>
#include <string.h>

#include "util/memory.h"
#include "util/planted.h"

/* Pages that fresh data may not take, if the device has a few at all. */
#define RESERVE_PAGES 2u
#define RESERVE_FROM_PAGES BALE_MAX_SIZE_PAGES_MIN
/* ... and for a checkpoint at most this part of them. */
#define RESERVE_PART_MAX 4u

BalePage *bale_page(BaleStore *s, uint64_t page)
{
    g_assert(page < s->pages->len);
    return &g_array_index(s->pages, BalePage, page);
}

bool bale_address_split(BaleStore *s, uint64_t address, uint64_t *page,
                        uint64_t *offset)
{
    if (address < BALE_SUPER_SIZE || address >= BALE_DEVICE_SIZE_MAX) {
        return false;
    }
    address -= BALE_SUPER_SIZE;
    /* Pages are whole units, and a short division is quick. */
    *page = (uint32_t)(address / BALE_PAGE_SIZE_UNIT) /
            (uint32_t)(s->page_size / BALE_PAGE_SIZE_UNIT);
    *offset = address - *page * s->page_size;
    return *page < s->pages->len;
}

/* How many whole pages the device holds or, if it grows, could hold. */
static uint64_t page_device_pages(BaleStore *s)
{
    uint64_t size = s->dev_info.fixed_size ? s->dev_info.size
                                           : s->dev_info.max_size;

    size = MIN(size, BALE_DEVICE_SIZE_MAX);
    return size < BALE_SUPER_SIZE ? 0
                                  : (size - BALE_SUPER_SIZE) / s->page_size;
}

int bale_page_table_grow(BaleStore *s, uint64_t pages)
{
    if (pages <= s->pages->len) {
        return 0;
    }
    /* At most 2^27 pages fit the address space; see the format's caps. */
    if (pages > BALE_DEVICE_SIZE_MAX / s->page_size) {
        return -ENOSPC;
    }
    g_array_set_size(s->pages, pages);
    return 0;
}

void bale_page_free_list_rebuild(BaleStore *s)
{
    g_array_set_size(s->free_pages, 0);
    for (uint64_t i = s->pages->len; i-- > 0;) {
        if (bale_page(s, i)->state == BALE_PAGE_FREE) {
            g_array_append_val(s->free_pages, i);
        }
    }
}

void bale_page_live_add(BaleStore *s, uint64_t address, uint64_t bytes)
{
    uint64_t page, offset;

    if (bale_address_split(s, address, &page, &offset)) {
        bale_page(s, page)->live_bytes += bytes;
    }
}

void bale_page_live_sub(BaleStore *s, uint64_t address, uint64_t bytes)
{
    uint64_t page, offset;
    BalePage *p;

    if (!bale_address_split(s, address, &page, &offset)) {
        return;
    }
    p = bale_page(s, page);
    if (p->live_bytes < bytes) {
        bale_log_fold(s);
    }
    g_assert(p->live_bytes >= bytes);
    p->live_bytes -= bytes;
    if (p->live_bytes == 0) {
        bale_page_consider(s, page);
    }
    s->garbage_bytes += bytes;
    if (s->garbage_bytes >= s->page_size) {
        s->garbage_bytes = 0;
        bale_maintain_signal(s, false, true);
    }
}

void bale_page_entry(BaleStore *s, uint64_t page, BalePageEntry *e)
{
    BalePage *p = bale_page(s, page);

    memset(e, 0, sizeof(*e));
    e->bucket = p->bucket;
    /* A page whose header is marked already is as good as free. */
    if (p->state == BALE_PAGE_FREE || p->state == BALE_PAGE_MARKED ||
        p->state == BALE_PAGE_RELEASING) {
        return;
    }
    e->version = p->version;
    e->open = p->state == BALE_PAGE_ACTIVE;
    e->end = p->end;
    e->live_bytes = p->bucket == BALE_BUCKET_META ? 0 : p->live_bytes;
    e->first_seq = p->first_seq;
    e->tombstone_seq = p->tombstone_seq;
}

bool bale_page_has_metadata(BaleStore *s, uint64_t address, uint32_t len,
                            uint64_t *page)
{
    uint64_t offset;

    return bale_address_split(s, address, page, &offset) &&
           bale_page(s, *page)->state != BALE_PAGE_FREE &&
           bale_page(s, *page)->bucket == BALE_BUCKET_META &&
           offset + len <= bale_page(s, *page)->end;
}

/* Does a page other than @page hold records older than @seq? */
bool bale_page_older_exists(BaleStore *s, uint64_t page, uint64_t seq)
{
    for (uint64_t i = 0; i < s->pages->len; i++) {
        BalePage *p = bale_page(s, i);

        /* A dying page still counts: a crash may bring it back. */
        if (i != page && p->state != BALE_PAGE_FREE &&
            p->bucket != BALE_BUCKET_META && p->first_seq < seq) {
            return true;
        }
    }
    return false;
}

/*
 * @page is going away, and with it the barriers in its segments: say again what
 * they say, or damage below them would look like a torn tail.
 */
static void page_barriers_again(BaleStore *s, uint64_t page)
{
    for (uint64_t i = 0; i < s->pages->len; i++) {
        BalePage *q = bale_page(s, i);

        if (i != page && q->version && q->proven && !q->barrier_pending &&
            (q->barrier_page == page + 1 ||
             q->barrier_page == BARRIER_PAGE_UNKNOWN)) {
            q->barrier_pending = true;
            g_array_append_val(s->barrier_pages, i);
        }
    }
}

void bale_page_consider(BaleStore *s, uint64_t page)
{
    BalePage *p = bale_page(s, page);

    if (p->state != BALE_PAGE_SEALED || p->live_bytes || p->readers ||
        p->in_flight || !s->session || store_failed(s) ||
        (p->tombstone_seq && !BALE_PLANTED(tombstone_forgotten) &&
         bale_page_older_exists(s, page, p->tombstone_seq))) {
        return;
    }
    p->state = BALE_PAGE_DEAD;
    p->free_flush = s->flush_request + 1;
    g_array_append_val(s->dying_pages, page);
    bale_maintain_signal(s, false, false); /* it may want to flush */
    page_barriers_again(s, page);
    if (BALE_PLANTED(page_reused_early)) {
        p->state = BALE_PAGE_MARKING;
        bale_maintain_signal(s, true, false);
    }
}

void bale_page_consider_all(BaleStore *s)
{
    for (uint64_t i = 0; i < s->pages->len; i++) {
        bale_page_consider(s, i);
    }
}

void bale_page_flushed(BaleStore *s)
{
    bool work = false;

    for (guint i = 0; i < s->dying_pages->len; i++) {
        BalePage *p = bale_page(s, g_array_index(s->dying_pages, uint64_t,
                                                 i));

        if (p->free_flush <= s->flushed_request) {
            switch (p->state) {
            case BALE_PAGE_DEAD:
                p->state = BALE_PLANTED(barrier_not_awaited)
                               ? BALE_PAGE_MARKING
                               : BALE_PAGE_REPLACED;
                break;
            case BALE_PAGE_BARRED:
                p->state = BALE_PAGE_MARKING;
                break;
            case BALE_PAGE_MARKED:
                p->state = BALE_PAGE_RELEASING;
                break;
            }
        }
        work |= p->state == BALE_PAGE_REPLACED ||
                p->state == BALE_PAGE_MARKING ||
                p->state == BALE_PAGE_RELEASING;
    }
    if (work) {
        bale_maintain_signal(s, true, false);
    }
}

void bale_page_barriers_appended(BaleStore *s)
{
    for (guint i = 0; i < s->dying_pages->len; i++) {
        BalePage *p = bale_page(s, g_array_index(s->dying_pages, uint64_t,
                                                 i));

        if (p->state == BALE_PAGE_REPLACED) {
            p->state = BALE_PAGE_BARRED;
            p->free_flush = s->flush_request + 1;
        }
    }
}

bool bale_page_wants_barriers(BaleStore *s)
{
    for (guint i = 0; i < s->dying_pages->len; i++) {
        uint64_t page = g_array_index(s->dying_pages, uint64_t, i);

        if (bale_page(s, page)->state == BALE_PAGE_REPLACED) {
            return true;
        }
    }
    return false;
}

/* --- how many pages there may be --- */

uint64_t bale_pages_in_use(BaleStore *s)
{
    return s->pages->len - s->free_pages->len;
}

void bale_page_set_max_size(BaleStore *s, uint64_t bytes)
{
    bytes = bytes == BALE_MAX_SIZE_NONE ? 0 : bytes;
    __atomic_store_n(&s->max_size, bytes, __ATOMIC_RELAXED);
    if (s->max_size == 0) {
        s->max_pages = s->over_pages = UINT64_MAX;
        return;
    }
    s->max_pages = s->max_size < BALE_SUPER_SIZE
                       ? 0
                       : (s->max_size - BALE_SUPER_SIZE) / s->page_size;
    s->over_pages = MAX(s->max_pages, bale_pages_in_use(s) + RESERVE_PAGES + 1);
}

/*
 * Pages that are kept from fresh data: for what frees space, for copies, and
 * for a checkpoint, which takes eight bytes for each cluster of the parts of
 * the layers in which there are any.  With session_lock.
 */
static uint64_t pages_reserve(BaleStore *s, uint64_t total)
{
    uint64_t chunks = 0, pages;
    BaleEpochToken token;
    GHashTableIter iter;
    void *value;

    if (total < RESERVE_FROM_PAGES) {
        return 0;
    }
    token = bale_epoch_enter(s->epoch);
    g_hash_table_iter_init(&iter, s->layers);
    while (g_hash_table_iter_next(&iter, NULL, &value)) {
        BaleLayer *layer = value;

        for (uint64_t c = bale_layer_next_chunk(layer, 0); c < layer->chunks;
             c = bale_layer_next_chunk(layer, c + 1)) {
            chunks++;
        }
    }
    bale_epoch_exit(s->epoch, token);
    pages = chunks * BALE_CHUNK_CLUSTERS * 8 / s->page_size;
    return RESERVE_PAGES + MIN(pages, total / RESERVE_PART_MAX);
}

/* How many more pages may be taken into use. */
static uint64_t pages_room(BaleStore *s, BaleBucket bucket)
{
    bool fresh = bucket == BALE_BUCKET_FRESH;
    uint64_t total = MIN(page_device_pages(s),
                         fresh ? s->max_pages : s->over_pages);
    uint64_t used = bale_pages_in_use(s);

    if (BALE_PLANTED(limit_ignored)) {
        total = page_device_pages(s);
    }
    if (fresh && !BALE_PLANTED(reserve_forgotten)) {
        used += pages_reserve(s, total);
    }
    return total > used ? total - used : 0;
}

bool bale_page_has_room(BaleStore *s, uint64_t bytes)
{
    return pages_room(s, BALE_BUCKET_META) >
           RESERVE_PAGES + bytes / s->page_size;
}

bool bale_page_has_fresh(BaleStore *s)
{
    return pages_room(s, BALE_BUCKET_FRESH) > 0;
}

/*
 * A failed store is well again; everything behind the last flush is durable.
 * But a mark that was written since may be lost: it is written again.
 */
void bale_page_revived(BaleStore *s)
{
    for (guint i = 0; i < s->dying_pages->len; i++) {
        BalePage *p = bale_page(s, g_array_index(s->dying_pages, uint64_t,
                                                 i));

        if (p->state == BALE_PAGE_MARKED) {
            p->state = BALE_PAGE_MARKING;
        }
    }
    bale_page_flushed(s);
    bale_page_consider_all(s);
    bale_maintain_signal(s, s->dying_pages->len > 0, true);
}

/*
 * Take a free page, or a new one at the end of the device.  The last ones are
 * kept for discarding, compacting and closing.
 */
static int page_take(BaleStore *s, BaleBucket bucket, uint64_t *page)
{
    uint64_t n = s->pages->len;
    int ret;

    if (pages_room(s, bucket) == 0) {
        return -ENOSPC;
    }
    if (s->free_pages->len) {
        *page = g_array_index(s->free_pages, uint64_t,
                              s->free_pages->len - 1);
        g_array_set_size(s->free_pages, s->free_pages->len - 1);
        return 0;
    }
    if (n >= page_device_pages(s)) {
        return -ENOSPC;
    }
    ret = bale_page_table_grow(s, n + 1);
    *page = n;
    return ret;
}

/* Ask the device for more of @page; not under log_lock. */
static int page_allocate(BaleStore *s, uint64_t page, uint64_t from,
                         uint64_t need, uint64_t *allocated)
{
    uint64_t step = MIN((uint64_t)ALLOCATE_BUFFERS * s->buffer_size,
                        s->page_size - from);
    uint64_t address = page_address(s, page) + from;
    int ret;

    step = MAX(step, need);
    ret = s->dev->ops->allocate(s->dev, address, step);
    if (ret == -ENOSPC && need < step) {
        step = need;
        ret = s->dev->ops->allocate(s->dev, address, step);
    }
    *allocated = from + step;
    return ret;
}

int bale_page_prepare(BaleStore *s, BaleBucket bucket, uint32_t need)
{
    uint64_t page, from, want, allocated;
    bool fresh;
    BalePage *p;
    int ret;

    pthread_mutex_lock(&s->log_lock);
    page = s->active[bucket];
    fresh = page == PAGE_NONE;
    if (fresh) {
        ret = page_take(s, bucket, &page);
        if (ret < 0) {
            pthread_mutex_unlock(&s->log_lock);
            return ret;
        }
        from = 0;
        want = BALE_BLOCK_SIZE + need;
    } else {
        uint64_t begin;

        p = bale_page(s, page);
        begin = MAX(p->end, BALE_BLOCK_SIZE);
        from = MAX(p->allocated, p->end);
        if (MIN(begin + need, s->page_size) <= from) {
            pthread_mutex_unlock(&s->log_lock);
            return 0;
        }
        want = MIN(begin + need, s->page_size) - from;
    }
    pthread_mutex_unlock(&s->log_lock);

    ret = page_allocate(s, page, from, want, &allocated);

    pthread_mutex_lock(&s->log_lock);
    if (fresh && (ret < 0 || s->page_count == UINT32_MAX)) {
        g_array_append_val(s->free_pages, page);
        ret = ret < 0 ? ret : -ENOSPC;
    } else if (ret == 0) {
        p = bale_page(s, page);
        if (fresh) {
            memset(p, 0, sizeof(*p));
            p->state = BALE_PAGE_ACTIVE;
            p->bucket = bucket;
            p->version = s->session_generation << 32 | ++s->page_count;
            p->order = ++s->page_order;
            s->fresh_pages += bucket == BALE_BUCKET_FRESH;
            p->overhead = BALE_BLOCK_SIZE;
            p->first_seq = bale_log_next_seq(s);
            s->active[bucket] = page;
        }
        p->allocated = allocated;
    }
    pthread_mutex_unlock(&s->log_lock);
    return ret;
}
