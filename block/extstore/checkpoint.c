/*
 * Sessions, checkpoints and superblocks.
 *
 * A session begins with the first write after an open and ends with a
 * checkpoint.  While it lasts the superblocks say "not clean", and whoever
 * opens the store scans it.  A checkpoint writes what a scan would find, so
 * that the next open reads only that.
 *
 * Order (durability.md, rule 1):
 *   begin:       flush -> superblocks "not clean" (each round flushed) -> pages
 *   checkpoint:  data -> flush -> index, page table, root -> flush ->
 *                superblocks "clean" (each round flushed)
 *
 * Invariants:
 *  1. No record is appended while the superblocks say "clean".
 *  2. The superblocks never point at a checkpoint that was not flushed.
 *  3. The records of a checkpoint stay live until the superblocks point at the
 *     next one.
 *
 * Threads: everything here runs with session_lock held for writing, and the
 * maintenance thread, if there is one, paused.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "store-internal.h"

#include <errno.h>
#include <string.h>

#include "util/memory.h"
#include "util/planted.h"

/* Dying pages are given so many flushes to become free before a checkpoint. */
#define DYING_FLUSHES_MAX 4

static bool super_error(GError **errp, int ret, const char *what)
{
    g_set_error(errp, BALE_STORE_ERROR,
                ret == -ENOSPC   ? BALE_STORE_ERROR_NO_SPACE
                : ret == -ENOMEM ? BALE_STORE_ERROR_NO_MEMORY
                                 : BALE_STORE_ERROR_IO,
                "%s: %s", what, g_strerror(-ret));
    return false;
}

/* One round: the new generation to copies @first and @first + 2, flushed. */
static int super_write_round(BaleStore *s, unsigned first, uint8_t *block)
{
    int ret;

    if (s->super.generation == UINT32_MAX) {
        return -EOVERFLOW;
    }
    __atomic_store_n(&s->super.generation, s->super.generation + 1,
                     __ATOMIC_RELAXED);
    for (unsigned copy = first; copy < BALE_SUPER_COPIES; copy += 2) {
        if (BALE_PLANTED(super_one_copy) && copy > 0) {
            continue;
        }
        bale_super_encode(&s->super, copy, block);
        ret = bale_device_store_sync(s->dev, bale_super_address(copy), block,
                                     BALE_BLOCK_SIZE);
        if (ret < 0) {
            return ret;
        }
    }
    return bale_device_flush_sync(s->dev);
}

int bale_supers_write(BaleStore *s)
{
    BALE_AUTO_MEMORY uint8_t *block =
        bale_memory_try_alloc(BALE_BLOCK_SIZE, BALE_BLOCK_SIZE);
    int ret = block ? 0 : -ENOMEM;

    for (unsigned first = 0; ret == 0 && first < 2; first++) {
        ret = super_write_round(s, first, block);
    }
    /* A full device has written nothing; whatever else happened is unknown. */
    if (ret < 0 && ret != -ENOSPC && ret != -ENOMEM) {
        bale_store_poison(s, ret, "writing the superblocks");
    }
    return ret;
}

int bale_session_begin(BaleStore *s)
{
    int ret;

    if (s->read_only) {
        return -EROFS;
    }
    if (store_failed(s)) {
        return -EIO;
    }
    if (s->corrupt) {
        /* Say it to whoever opens the store next, and write nothing else. */
        if (!(s->super.incompatible & BALE_INCOMPAT_CORRUPT)) {
            s->super.incompatible |= BALE_INCOMPAT_CORRUPT;
            bale_supers_write(s);
        }
        return -EIO;
    }
    if (s->session) {
        return 0;
    }
    /* What recovery found must not be lost behind what we write now. */
    ret = BALE_PLANTED(tail_not_proven) ? 0 : bale_log_prove_again(s);
    if (ret < 0) {
        return ret;
    }
    ret = bale_device_flush_sync(s->dev);
    if (ret < 0) {
        bale_store_poison(s, ret, "flushing the device");
        return -EIO;
    }
    if (!BALE_PLANTED(session_not_marked)) {
        s->super.state &= ~(uint32_t)BALE_STATE_CLEAN;
    }
    ret = bale_supers_write(s);
    if (ret < 0) {
        return ret;
    }

    pthread_mutex_lock(&s->log_lock);
    s->page_count = 0;
    for (uint64_t i = 0; i < s->pages->len; i++) {
        BalePage *p = bale_page(s, i);

        if (p->version && p->proven < p->end) {
            p->proven = p->end;
            if (!p->barrier_pending) {
                p->barrier_pending = true;
                g_array_append_val(s->barrier_pages, i);
            }
        }
    }
    s->session = true;
    bale_page_consider_all(s);
    pthread_mutex_unlock(&s->log_lock);

    ret = bale_maintain_start(s);
    if (ret < 0) {
        return ret;
    }
    /* Room for metadata first: a full store must still close cleanly. */
    return bale_page_prepare(s, BALE_BUCKET_META, s->buffer_size / 2);
}

/* --- checkpoint --- */

typedef struct CheckpointWriter {
    BaleStore *s;
    GArray *parts;   /* BalePart */
    GArray *records; /* BaleCheckpointRecord */
    uint64_t bytes;
} CheckpointWriter;

/* Append one record of the checkpoint and remember it. */
static int writer_append(CheckpointWriter *w, BaleRecordType type,
                         const void *payload, uint32_t len, BalePart *part)
{
    BaleRecord r = { .type = type, .payload_len = len };
    BaleCheckpointRecord c;
    uint64_t page, offset;
    int ret;

    ret = bale_log_append(w->s, BALE_BUCKET_META, &r, payload,
                          BALE_RECORD_HEADER_LEN + len, &c.address);
    if (ret < 0) {
        return ret;
    }
    c.len = BALE_RECORD_HEADER_LEN + len;
    w->bytes += c.len;
    g_array_append_val(w->records, c);
    part->address = c.address;
    part->version = r.version;
    part->payload_len = len;
    bale_address_split(w->s, c.address, &page, &offset);
    return 0;
}

/* The index of @layer, chunk by chunk; chunks without entries are left out. */
static int writer_index(CheckpointWriter *w, BaleLayer *layer)
{
    g_autofree uint8_t *chunk = g_try_malloc(BALE_CHUNK_CLUSTERS * 8);
    uint64_t clusters = bale_layer_clusters(layer);

    if (!chunk) {
        return -ENOMEM;
    }
    for (uint64_t c = 0; c < layer->chunks; c++) {
        uint64_t first = c * BALE_CHUNK_CLUSTERS;
        uint32_t n = MIN(clusters - first, BALE_CHUNK_CLUSTERS);
        BalePart part = { .kind = BALE_PART_INDEX,
                          .a = layer->id, .b = first };
        int ret;

        if (!__atomic_load_n(&layer->chunk_entries[c], __ATOMIC_RELAXED)) {
            continue;
        }
        for (uint32_t i = 0; i < n; i++) {
            bale_put_le64(chunk + i * 8,
                          bale_index_find(layer->index, first + i));
        }
        while (n > 0 && bale_get_le64(chunk + (n - 1) * 8) == 0) {
            n--;
        }
        ret = writer_append(w, BALE_RECORD_CHECKPOINT_PART, chunk, n * 8,
                            &part);
        if (ret < 0) {
            return ret;
        }
        g_array_append_val(w->parts, part);
        if (w->parts->len >= BALE_ROOT_PARTS_MAX) {
            return -EFBIG;
        }
    }
    return 0;
}

static int writer_layers(CheckpointWriter *w)
{
    GHashTableIter iter;
    void *layer;
    int ret = 0;

    g_hash_table_iter_init(&iter, w->s->layers);
    while (ret == 0 && g_hash_table_iter_next(&iter, NULL, &layer)) {
        ret = writer_index(w, layer);
    }
    return ret;
}

/* A page whose header is marked already is as good as free. */
static bool checkpoint_page_used(const BalePage *p)
{
    return p->state != BALE_PAGE_FREE && p->state != BALE_PAGE_MARKED &&
           p->state != BALE_PAGE_RELEASING;
}

/* One more than the last page in use: the device is cut behind that. */
static uint64_t checkpoint_pages(BaleStore *s)
{
    uint64_t n;

    pthread_mutex_lock(&s->log_lock);
    n = s->pages->len;
    while (n > 0 && !checkpoint_page_used(bale_page(s, n - 1))) {
        n--;
    }
    pthread_mutex_unlock(&s->log_lock);
    return n;
}

/*
 * Page table and root, into one page, whose end the superblock tells: it is
 * not known yet when the table is written.
 */
static int writer_pages_and_root(CheckpointWriter *w, BalePart *root_part)
{
    BaleStore *s = w->s;
    uint64_t pages = s->pages->len;
    uint64_t tables = pages / BALE_PAGE_ENTRIES_PER_PART + 1;
    uint64_t root_len = BALE_ROOT_FIXED_LEN +
                        (w->parts->len + tables) * BALE_PART_LEN;
    uint64_t room = root_len + pages * BALE_PAGE_ENTRY_LEN +
                    (tables + 1) * (BALE_RECORD_HEADER_LEN +
                                    2 * BALE_BLOCK_SIZE);
    g_autofree uint8_t *buf = NULL;
    uint64_t page;
    BaleRoot root;
    int ret;

    if (w->parts->len + tables > BALE_ROOT_PARTS_MAX) {
        return -EFBIG;
    }
    bale_log_seal(s, BALE_BUCKET_META);
    pthread_mutex_lock(&s->log_lock);
    page = s->active[BALE_BUCKET_META];
    if (page != PAGE_NONE && s->page_size - bale_page(s, page)->end < room) {
        pthread_mutex_unlock(&s->log_lock);
        bale_log_seal_page(s, BALE_BUCKET_META);
        pthread_mutex_lock(&s->log_lock);
        page = PAGE_NONE;
    }
    pthread_mutex_unlock(&s->log_lock);
    if (room > s->page_size - BALE_BLOCK_SIZE) {
        return -EFBIG;
    }
    if (page == PAGE_NONE) {
        ret = bale_page_prepare(s, BALE_BUCKET_META, BALE_BLOCK_SIZE);
        if (ret < 0) {
            return ret;
        }
    }
    pages = checkpoint_pages(s);

    buf = g_try_malloc(MAX(root_len + BALE_PART_LEN,
                           BALE_PAGE_ENTRIES_PER_PART * BALE_PAGE_ENTRY_LEN));
    if (!buf) {
        return -ENOMEM;
    }
    for (uint64_t first = 0; first < pages;
         first += BALE_PAGE_ENTRIES_PER_PART) {
        uint32_t n = MIN(pages - first, BALE_PAGE_ENTRIES_PER_PART);
        BalePart part = { .kind = BALE_PART_PAGES, .a = first, .b = n };

        pthread_mutex_lock(&s->log_lock);
        for (uint32_t i = 0; i < n; i++) {
            BalePage *p = bale_page(s, first + i);
            BalePageEntry e = { .bucket = p->bucket };

            if (checkpoint_page_used(p)) {
                e.version = p->version;
                e.open = p->state == BALE_PAGE_ACTIVE;
                e.end = p->end;
                e.live_bytes =
                    p->bucket == BALE_BUCKET_META ? 0 : p->live_bytes;
                e.first_seq = p->first_seq;
                e.tombstone_seq = p->tombstone_seq;
            }
            bale_page_entry_encode(&e, buf + i * BALE_PAGE_ENTRY_LEN);
        }
        pthread_mutex_unlock(&s->log_lock);
        ret = writer_append(w, BALE_RECORD_CHECKPOINT_PART, buf,
                            n * BALE_PAGE_ENTRY_LEN, &part);
        if (ret < 0) {
            return ret;
        }
        g_array_append_val(w->parts, part);
    }

    root.next_seq = s->next_seq;
    root.pages = pages;
    root.parts = w->parts->len;
    bale_root_encode(&root, buf);
    for (uint32_t i = 0; i < root.parts; i++) {
        bale_part_encode(&g_array_index(w->parts, BalePart, i),
                         buf + BALE_ROOT_FIXED_LEN + i * BALE_PART_LEN);
    }
    return writer_append(w, BALE_RECORD_CHECKPOINT_ROOT, buf,
                         BALE_ROOT_FIXED_LEN + root.parts * BALE_PART_LEN,
                         root_part);
}

/* Let pages that died finish dying, as far as a few flushes do it. */
static int checkpoint_settle(BaleStore *s)
{
    int ret = bale_log_flush_sync(s);

    for (int i = 0; ret == 0 && i < DYING_FLUSHES_MAX; i++) {
        bool dying;

        bale_maintain_settle(s);
        pthread_mutex_lock(&s->log_lock);
        dying = s->dying_pages->len > 0;
        pthread_mutex_unlock(&s->log_lock);
        if (!dying) {
            break;
        }
        ret = bale_log_flush_sync(s);
    }
    bale_maintain_settle(s);
    return ret;
}

/*
 * Give back what was reserved and not used; returns the device's end.  Some
 * devices can only reserve by growing, and so reserve all of a page as soon as
 * one behind it is used.
 */
static uint64_t checkpoint_trim(BaleStore *s)
{
    uint64_t end = BALE_SUPER_SIZE;

    for (uint64_t i = 0; i < s->pages->len; i++) {
        BalePage *p = bale_page(s, i);

        if (p->version) {
            end = MAX(end, page_address(s, i) + p->end);
        }
    }
    for (uint64_t i = 0; i < s->pages->len; i++) {
        BalePage *p = bale_page(s, i);
        uint64_t from = page_address(s, i) + p->end;
        uint64_t to = MIN(page_address(s, i) + s->page_size, end);

        if (p->version && p->allocated > p->end && from < to) {
            s->dev->ops->release(s->dev, from, to - from);
        }
        p->allocated = MIN(p->allocated, p->end);
    }
    return end;
}

/* The old checkpoint is not needed any more. */
static void checkpoint_forget(BaleStore *s, GArray *records)
{
    pthread_mutex_lock(&s->log_lock);
    for (guint i = 0; i < records->len; i++) {
        BaleCheckpointRecord *c =
            &g_array_index(records, BaleCheckpointRecord, i);

        bale_page_live_sub(s, c->address, c->len);
    }
    pthread_mutex_unlock(&s->log_lock);
}

bool bale_checkpoint_write(BaleStore *s, GError **errp)
{
    CheckpointWriter w = { .s = s };
    BalePart part = { .kind = BALE_PART_IMAGE }, root = { .kind = 0 };
    uint64_t page, offset;
    int ret;

    g_assert(s->session);
    w.parts = g_array_new(FALSE, FALSE, sizeof(BalePart));
    w.records = g_array_new(FALSE, FALSE, sizeof(BaleCheckpointRecord));

    ret = checkpoint_settle(s);
    if (ret == 0) {
        ret = writer_layers(&w);
    }
    if (ret == 0) {
        /* Written anew each time, so that it pins no page for ever. */
        ret = bale_catalogue_append(s, s->catalogue, false);
    }
    if (ret == 0) {
        /* And twice, in two blocks: without it nothing can be opened. */
        bale_log_seal(s, BALE_BUCKET_META);
        ret = bale_catalogue_append(s, s->catalogue, false);
    }
    if (ret == 0) {
        bale_log_seal(s, BALE_BUCKET_META);
        part.address = s->catalogue_address;
        part.a = 1;
        pthread_mutex_lock(&s->log_lock);
        bale_address_split(s, part.address, &page, &offset);
        part.version = bale_page(s, page)->version;
        pthread_mutex_unlock(&s->log_lock);
        part.payload_len = 0;
        g_array_append_val(w.parts, part);
        ret = writer_pages_and_root(&w, &root);
    }
    if (ret == 0 && !BALE_PLANTED(order_swapped)) {
        ret = bale_log_flush_sync(s);
    }
    if (ret < 0) {
        /* Nothing points at what was written: it is garbage. */
        checkpoint_forget(s, w.records);
        g_array_free(w.records, TRUE);
        g_array_free(w.parts, TRUE);
        return super_error(errp, ret, "writing a checkpoint");
    }

    pthread_mutex_lock(&s->log_lock);
    bale_address_split(s, root.address, &page, &offset);
    s->super.checkpoint_end = bale_page(s, page)->end / BALE_BLOCK_SIZE;
    s->super.next_seq = s->next_seq;
    s->stats.checkpoints++;
    s->stats.checkpoint_bytes += w.bytes;
    pthread_mutex_unlock(&s->log_lock);
    s->super.checkpoint_address = root.address;
    s->super.checkpoint_version = root.version;
    s->super.checkpoint_length = BALE_RECORD_HEADER_LEN + root.payload_len;
    s->super.device_end = checkpoint_trim(s);
    s->super.state |= BALE_STATE_CLEAN;
    if (BALE_PLANTED(cut_early) && s->dev->ops->truncate) {
        s->dev->ops->truncate(s->dev, s->super.device_end);
    }

    /* From here on no page may change: the checkpoint describes them. */
    pthread_mutex_lock(&s->log_lock);
    s->session = false;
    pthread_mutex_unlock(&s->log_lock);
    ret = bale_supers_write(s);
    if (ret == 0) {
        /*
         * Not before: the old checkpoint and its session may name the pages
         * that are cut off.  That the device stays longer is no error.
         */
        if (!s->dev_info.fixed_size && s->dev->ops->truncate) {
            s->dev->ops->truncate(s->dev, s->super.device_end);
        }
        checkpoint_forget(s, s->checkpoint);
        g_array_free(s->checkpoint, TRUE);
        s->checkpoint = w.records;
        w.records = NULL;
    }
    if (w.records) {
        g_array_free(w.records, TRUE);
    }
    g_array_free(w.parts, TRUE);
    return ret == 0 || super_error(errp, ret, "writing the superblocks");
}
