/*
 * Sessions, checkpoints and superblocks.
 *
 * A session begins with the first write after an open and ends with a
 * checkpoint.  While it lasts the superblocks say "not clean".  A checkpoint
 * says what recovery would find: the index, the page table, the image.  The
 * superblocks name the newest two; whoever opens a store that is not clean
 * takes the newest one that is intact and applies what was appended since, the
 * tail (recover-tail.c).
 *
 * Order (durability.md, rule 1):
 *   begin:       flush -> superblocks "not clean" (each round flushed) -> pages
 *   checkpoint:  data -> flush -> index, page table, root -> flush ->
 *                superblocks (each round flushed)
 *
 * The last checkpoint of a session is written when nobody appends, and makes
 * the store clean.  A running one is written while writes go on:
 *
 *   mark    under log_lock: end the open segments, note where each page ends
 *           and the next sequence number S.  What comes later is the tail
 *   wait    for those who have appended before the mark, but have not set the
 *           index yet
 *   copy    the index, chunk by chunk, as it is by now; a chunk that did not
 *           change since the newest checkpoint copied it is not copied again:
 *           the new one names that copy, too
 *   table   the pages as at the mark; metadata pages as they are now, so that
 *           the checkpoint itself is not part of the tail
 *   flush, superblocks
 *
 * Invariants:
 *  1. No record is appended while the superblocks say "clean".
 *  2. The superblocks never point at a checkpoint that was not flushed.
 *  3. The records of a checkpoint stay live until the superblocks point at the
 *     second one after it.  Those that several name count once for each.  One
 *     that could not be read has none that we know of; it stays named, as a
 *     later recovery must know that the one before it is not the newest.
 *  4. What was appended before the mark and still counts at the end of the
 *     copy is in the copy; what was appended later is in the tail.  (A value
 *     of the copy may point into the tail, or into a page that is given up
 *     before recovery: the tail tells what became of that cluster.)
 *  5. A chunk that is not marked as changed has in the index what its copy
 *     has, which the newest checkpoint names, but for what was appended after
 *     the mark.
 *  6. While a checkpoint runs nobody changes the catalogue: that takes
 *     session_lock for writing, and it is held for reading.
 *
 * Threads: everything here runs with session_lock held for writing, and the
 * maintenance thread, if there is one, paused; but bale_checkpoint_running(),
 * which runs on that thread.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "store-internal.h"

#include <errno.h>
#include <string.h>

#include "util/memory.h"
#include "util/planted.h"

/* Marks tried while pages are opened at the same time. */
#define MARK_ATTEMPTS_MAX 8
/*
 * Of a page that is not appended to any more something is kept only if that is
 * at least this part of a page.
 */
#define KEEP_PAGE_PART 2u

/* One round: the new generation to copies @first and @first + 2, flushed. */
static int super_write_round(BaleStore *s, unsigned first, uint8_t *block)
{
    bool session = s->session;
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
    /* Not beside a flush of the log: only one of them may see the error. */
    ret = session ? bale_log_flush_forced(s) : bale_device_flush_sync(s->dev);
    if (ret < 0 && !session) {
        bale_store_poison(s, ret, "flushing the superblocks");
    }
    return ret;
}

static int supers_try_write(BaleStore *s)
{
    BALE_AUTO_MEMORY uint8_t *block =
        bale_memory_try_alloc(BALE_BLOCK_SIZE, BALE_BLOCK_SIZE);
    int ret = block ? 0 : -ENOMEM;

    for (unsigned first = 0; ret == 0 && first < 2; first++) {
        ret = super_write_round(s, first, block);
    }
    return ret;
}

int bale_supers_write(BaleStore *s)
{
    int ret = supers_try_write(s);

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
    if (s->previous_loaded && BALE_PLANTED(fallback_named)) {
        s->super.checkpoint = s->super.previous;
    }
    /*
     * A write that fails here costs nothing that anybody was promised: nothing
     * was appended yet, and any mixture of the copies leads to the same state.
     * The next request tries again, with higher generations.
     */
    ret = supers_try_write(s);
    if (ret < 0) {
        return ret;
    }

    pthread_mutex_lock(&s->log_lock);
    s->session_generation = s->super.generation;
    s->page_count = 0;
    for (uint64_t i = 0; i < s->pages->len; i++) {
        BalePage *p = bale_page(s, i);

        p->barrier_page = s->was_clean ? 0 : BARRIER_PAGE_UNKNOWN;
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

/* A chunk that was copied. */
typedef struct WriterCopy {
    BaleChunk *chunk;
    BalePart part;
} WriterCopy;

typedef struct CheckpointWriter {
    BaleStore *s;
    GArray *parts;        /* BalePart */
    GArray *records;      /* BaleCheckpointRecord */
    GArray *copies;       /* WriterCopy */
    uint64_t bytes;       /* written, ... */
    uint64_t kept_bytes;  /* ... and what others have written */
    uint64_t *keepable;   /* bytes, by page; NULL: nothing is kept */
    uint64_t keepable_pages;
    BalePageEntry *table; /* as at the mark; NULL: nobody appends */
    BaleLogMark mark;
    int64_t start_us;
} CheckpointWriter;

static void writer_init(CheckpointWriter *w, BaleStore *s)
{
    *w = (CheckpointWriter){ .s = s, .start_us = g_get_monotonic_time() };
    w->parts = g_array_new(FALSE, FALSE, sizeof(BalePart));
    w->records = g_array_new(FALSE, FALSE, sizeof(BaleCheckpointRecord));
    w->copies = g_array_new(FALSE, FALSE, sizeof(WriterCopy));
}

static void writer_destroy(CheckpointWriter *w)
{
    g_array_free(w->parts, TRUE);
    g_array_free(w->copies, TRUE);
    g_free(w->keepable);
    if (w->records) {
        g_array_free(w->records, TRUE);
    }
    g_free(w->table);
}

/* Append one record of the checkpoint and remember it. */
static int writer_append(CheckpointWriter *w, BaleRecordType type,
                         const void *payload, uint32_t len, BalePart *part)
{
    BaleRecord r = { .type = type, .payload_len = len };
    BaleCheckpointRecord c;
    int ret;

    if (w->table && bale_maintain_wanted(w->s)) {
        return -EAGAIN;
    }
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
    return 0;
}

/* Has the newest checkpoint a copy of @chunk that is right?  In which page? */
static bool chunk_copied(BaleStore *s, const BaleChunk *chunk, uint64_t *page)
{
    uint32_t len = BALE_RECORD_HEADER_LEN + chunk->payload_len;
    bool copied;

    if (!chunk->address ||
        __atomic_load_n(&chunk->changed, __ATOMIC_SEQ_CST)) {
        return false;
    }
    pthread_mutex_lock(&s->log_lock);
    copied = bale_page_has_metadata(s, chunk->address, len, page) &&
             bale_page(s, *page)->state <= BALE_PAGE_SEALED &&
             bale_page(s, *page)->version == chunk->version;
    pthread_mutex_unlock(&s->log_lock);
    return copied;
}

/* What could be kept of @layer, in which pages. */
static int writer_weigh(CheckpointWriter *w, BaleLayer *layer)
{
    uint64_t page;

    for (uint64_t n = bale_layer_next_chunk(layer, 0); n < layer->chunks;
         n = bale_layer_next_chunk(layer, n + 1)) {
        BaleChunk *chunk = bale_layer_chunk(layer, n);

        if (chunk_copied(w->s, chunk, &page) && page < w->keepable_pages) {
            w->keepable[page] += chunk->payload_len;
        }
    }
    return 0;
}

/*
 * Name the copy that the newest checkpoint has of @chunk, if it is right, and
 * does not hold a page for the sake of a little.
 */
static bool writer_keep(CheckpointWriter *w, const BaleChunk *chunk,
                        BalePart *part)
{
    BaleStore *s = w->s;
    BaleCheckpointRecord c = { chunk->address,
                               BALE_RECORD_HEADER_LEN + chunk->payload_len };
    uint64_t page;

    if (!w->keepable || !chunk_copied(s, chunk, &page) ||
        page >= w->keepable_pages) {
        return false;
    }
    pthread_mutex_lock(&s->log_lock);
    if (bale_page(s, page)->state != BALE_PAGE_ACTIVE &&
        w->keepable[page] < s->page_size / KEEP_PAGE_PART) {
        pthread_mutex_unlock(&s->log_lock);
        return false;
    }
    if (!BALE_PLANTED(kept_part_freed)) {
        bale_page_live_add(s, c.address, c.len);
        g_array_append_val(w->records, c);
    }
    pthread_mutex_unlock(&s->log_lock);
    part->address = chunk->address;
    part->version = chunk->version;
    part->payload_len = chunk->payload_len;
    w->kept_bytes += c.len;
    return true;
}

/* Copy @chunk, with the @n clusters from @part->b on, by way of @buf. */
static int writer_copy(CheckpointWriter *w, BaleLayer *layer,
                       BaleChunk *chunk, uint32_t n, uint8_t *buf,
                       BalePart *part)
{
    WriterCopy copy = { .chunk = chunk };
    int ret;

    __atomic_store_n(&chunk->changed, false, __ATOMIC_SEQ_CST);
    for (uint32_t i = 0; i < n; i++) {
        bale_put_le64(buf + i * 8, bale_index_find(layer->index,
                                                   part->b + i));
    }
    while (n > 0 && bale_get_le64(buf + (n - 1) * 8) == 0) {
        n--;
    }
    ret = writer_append(w, BALE_RECORD_CHECKPOINT_PART, buf, n * 8, part);
    copy.part = *part;
    g_array_append_val(w->copies, copy);
    return ret;
}

/* The index of @layer, chunk by chunk; chunks without entries are left out. */
static int writer_index(CheckpointWriter *w, BaleLayer *layer)
{
    g_autofree uint8_t *buf = g_try_malloc(BALE_CHUNK_CLUSTERS * 8);
    uint64_t clusters = bale_layer_clusters(layer);

    if (!buf) {
        return -ENOMEM;
    }
    for (uint64_t n = bale_layer_next_chunk(layer, 0); n < layer->chunks;
         n = bale_layer_next_chunk(layer, n + 1)) {
        BaleChunk *chunk = bale_layer_chunk(layer, n);
        BalePart part = { .kind = BALE_PART_INDEX, .a = layer->id,
                          .b = n * BALE_CHUNK_CLUSTERS };
        int ret = 0;

        if (!writer_keep(w, chunk, &part)) {
            ret = writer_copy(w, layer, chunk,
                              MIN(clusters - part.b, BALE_CHUNK_CLUSTERS),
                              buf, &part);
        }
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

static int writer_visit_layers(CheckpointWriter *w,
                               int (*visit)(CheckpointWriter *, BaleLayer *))
{
    GHashTableIter iter;
    void *layer;
    int ret = 0;

    g_hash_table_iter_init(&iter, w->s->layers);
    while (ret == 0 && g_hash_table_iter_next(&iter, NULL, &layer)) {
        ret = visit(w, layer);
    }
    return ret;
}

static int writer_layers(CheckpointWriter *w)
{
    BaleStore *s = w->s;
    bool keep;

    pthread_mutex_lock(&s->log_lock);
    /* When space is short a page that dies soon is better than less to write:
     * what is kept for this checkpoint is as much as the index takes. */
    keep = bale_page_has_room(s, 2 * s->checkpoint_size);
    w->keepable_pages = s->pages->len;
    pthread_mutex_unlock(&s->log_lock);
    if (keep) {
        w->keepable = g_try_new0(uint64_t, w->keepable_pages + 1);
    }
    if (w->keepable) {
        writer_visit_layers(w, writer_weigh);
    }
    return writer_visit_layers(w, writer_index);
}

/*
 * The catalogue, written anew each time, so that it pins no page for ever.
 * And twice, in two blocks: without it nothing can be opened.
 */
static int writer_catalogue(CheckpointWriter *w)
{
    BaleStore *s = w->s;
    BalePart part = { .kind = BALE_PART_IMAGE, .a = 1 };
    BaleCheckpointRecord c = { .len = BALE_RECORD_HEADER_LEN };
    uint64_t page, offset;
    int ret;

    ret = bale_catalogue_append(s, s->catalogue, false);
    if (ret == 0) {
        bale_log_seal(s, BALE_BUCKET_META);
        ret = bale_catalogue_append(s, s->catalogue, false);
    }
    if (ret < 0) {
        return ret;
    }
    bale_log_seal(s, BALE_BUCKET_META);
    part.address = c.address = s->catalogue_address;
    pthread_mutex_lock(&s->log_lock);
    /* It stays while the checkpoint does, also when there is a newer one. */
    bale_page_live_add(s, c.address, c.len);
    bale_address_split(s, part.address, &page, &offset);
    part.version = bale_page(s, page)->version;
    pthread_mutex_unlock(&s->log_lock);
    g_array_append_val(w->records, c);
    g_array_append_val(w->parts, part);
    return 0;
}

/* Entry @page of the page table; under log_lock. */
static void writer_page_entry(CheckpointWriter *w, uint64_t page,
                              BalePageEntry *e)
{
    bale_page_entry(w->s, page, e);
    if (!w->table || (e->version && e->bucket == BALE_BUCKET_META)) {
        return;
    }
    memset(e, 0, sizeof(*e));
    if (page < w->mark.pages &&
        w->table[page].bucket != BALE_BUCKET_META) {
        *e = w->table[page];
    }
}

/* One more than the last page in use: the device is cut behind that. */
static uint64_t writer_pages(CheckpointWriter *w)
{
    BaleStore *s = w->s;
    BalePageEntry e = { .version = 0 };
    uint64_t n;

    pthread_mutex_lock(&s->log_lock);
    n = s->pages->len;
    while (n > 0) {
        writer_page_entry(w, n - 1, &e);
        if (e.version) {
            break;
        }
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
    /* More may be in use by now; they are not needed. */
    pages = MIN(pages, writer_pages(w));

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
            BalePageEntry e;

            writer_page_entry(w, first + i, &e);
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

    pthread_mutex_lock(&s->log_lock);
    root.next_seq = w->table ? w->mark.next_seq : bale_log_next_seq(s);
    pthread_mutex_unlock(&s->log_lock);
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

/* Everything that a checkpoint consists of; @root: its last record. */
static int writer_run(CheckpointWriter *w, BalePart *root)
{
    int ret = writer_layers(w);

    if (ret == 0) {
        ret = writer_catalogue(w);
    }
    return ret < 0 ? ret : writer_pages_and_root(w, root);
}

/* The newest checkpoint does not name the copies, or not for certain. */
static void writer_forget_copies(CheckpointWriter *w)
{
    for (guint i = 0; i < w->copies->len; i++) {
        __atomic_store_n(&g_array_index(w->copies, WriterCopy, i)
                              .chunk->changed,
                         true, __ATOMIC_SEQ_CST);
    }
}

/* Nothing points at what was written: it is garbage. */
static void writer_give_up(CheckpointWriter *w)
{
    checkpoint_forget(w->s, w->records);
    writer_forget_copies(w);
}

/* The superblocks shall name the checkpoint with @root. */
static void writer_name(CheckpointWriter *w, const BalePart *root)
{
    BaleStore *s = w->s;
    uint64_t page, offset;

    /* A damaged one is no help when this one is damaged, too. */
    if (!s->checkpoint->len) {
        s->super.previous = (BaleCheckpointRef){ .address = 0 };
    } else if (!s->previous_loaded || BALE_PLANTED(damaged_named)) {
        s->super.previous = s->super.checkpoint;
    }
    s->previous_loaded = false;
    pthread_mutex_lock(&s->log_lock);
    bale_address_split(s, root->address, &page, &offset);
    s->super.checkpoint = (BaleCheckpointRef){
        .address = root->address,
        .version = root->version,
        .length = BALE_RECORD_HEADER_LEN + root->payload_len,
        .end = bale_page(s, page)->end / BALE_BLOCK_SIZE,
    };
    pthread_mutex_unlock(&s->log_lock);
}

/* The superblocks name this checkpoint and the one before. */
static void writer_settle(CheckpointWriter *w)
{
    BaleStore *s = w->s;
    int64_t now_us = g_get_monotonic_time();

    checkpoint_forget(s, s->previous);
    g_array_free(s->previous, TRUE);
    s->previous = s->checkpoint;
    s->checkpoint = g_steal_pointer(&w->records);
    for (guint i = 0; i < w->copies->len; i++) {
        WriterCopy *copy = &g_array_index(w->copies, WriterCopy, i);

        copy->chunk->address = copy->part.address;
        copy->chunk->version = copy->part.version;
        copy->chunk->payload_len = copy->part.payload_len;
    }

    pthread_mutex_lock(&s->log_lock);
    s->stats.checkpoints++;
    s->stats.checkpoint_bytes += w->bytes;
    s->stats.checkpoint_kept_bytes += w->kept_bytes;
    s->stats.checkpoint_ns += (now_us - w->start_us) * 1000;
    bale_maintain_checkpointed(s, w->table ? &w->mark : NULL);
    s->checkpoint_size = w->bytes + w->kept_bytes;
    __atomic_store_n(&s->checkpoint_cost, w->bytes, __ATOMIC_RELAXED);
    s->checkpoint_time_us = now_us;
    pthread_mutex_unlock(&s->log_lock);
}

/*
 * Some of the superblocks may name it, so it must stay; but so must all that
 * the others may name.
 */
static void writer_doubt(CheckpointWriter *w)
{
    g_array_append_vals(w->s->checkpoint, w->records->data, w->records->len);
    writer_forget_copies(w);
}

/* Do without a checkpoint to fall back to, for the room that it takes. */
static int checkpoint_drop_previous(BaleStore *s)
{
    int ret;

    s->super.previous = (BaleCheckpointRef){ .address = 0 };
    ret = bale_supers_write(s);
    if (ret == 0) {
        checkpoint_forget(s, s->previous);
        g_array_set_size(s->previous, 0);
        ret = bale_maintain_free(s);
    }
    return ret;
}

bool bale_checkpoint_write(BaleStore *s, GError **errp)
{
    BalePart root = { .kind = 0 };
    CheckpointWriter w;
    int ret;

    g_assert(s->session);
    writer_init(&w, s);
    ret = bale_maintain_free(s);
    if (ret == 0) {
        ret = writer_run(&w, &root);
    }
    if (ret == -ENOSPC && s->previous->len) {
        /* Better one checkpoint than a store that is not clean. */
        writer_give_up(&w);
        writer_destroy(&w);
        writer_init(&w, s);
        ret = checkpoint_drop_previous(s);
        if (ret == 0) {
            ret = writer_run(&w, &root);
        }
    }
    if (ret == 0 && !BALE_PLANTED(order_swapped)) {
        ret = bale_log_flush_sync(s);
    }
    if (ret < 0) {
        writer_give_up(&w);
        writer_destroy(&w);
        return bale_error_set(errp, ret, "writing a checkpoint");
    }

    writer_name(&w, &root);
    pthread_mutex_lock(&s->log_lock);
    s->super.next_seq = bale_log_next_seq(s);
    pthread_mutex_unlock(&s->log_lock);
    s->super.device_end = checkpoint_trim(s);
    s->super.state |= BALE_STATE_CLEAN;
    if (BALE_PLANTED(cut_early) && s->dev->ops->truncate) {
        s->dev->ops->truncate(s->dev, s->super.device_end);
    }

    /* From here on no page may change: the checkpoint describes them. */
    pthread_mutex_lock(&s->log_lock);
    s->session = false;
    bale_ahead_settle(s);
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
        writer_settle(&w);
    } else {
        writer_doubt(&w);
    }
    writer_destroy(&w);
    return ret == 0 ||
           bale_error_set(errp, ret, "writing the superblocks");
}

/* --- while the store is in use --- */

/* Wait until everybody who appended before the mark has set the index. */
static int running_wait(BaleStore *s)
{
    int ret = 0;

    pthread_mutex_lock(&s->log_lock);
    while (bale_log_old_phase(s) && ret == 0) {
        if (store_failed(s)) {
            ret = -EIO;
        } else if (s->maintain_stop || s->maintain_pauses ||
                   s->space_waiters) {
            ret = -EAGAIN; /* they may wait for us */
        } else {
            pthread_cond_wait(&s->log_cond, &s->log_lock);
        }
    }
    pthread_mutex_unlock(&s->log_lock);
    return ret;
}

/* A write-out that the maintenance thread waits for, or gives up to. */
typedef struct RunningOut {
    BaleStore *store;
    /* Under log_lock. */
    bool done;
    bool abandoned; /* whoever completes it frees it */
    int ret;
} RunningOut;

static void running_written_out(void *opaque, int ret)
{
    RunningOut *o = opaque;
    BaleStore *s = o->store;
    bool abandoned;

    pthread_mutex_lock(&s->log_lock);
    o->done = true;
    o->ret = ret;
    abandoned = o->abandoned;
    pthread_mutex_unlock(&s->log_lock);
    if (abandoned) {
        g_free(o);
    }
    bale_background_end(s);
}

/*
 * No patch older than the mark may count: write their clusters out.  That needs
 * workers, who may wait for the space that this thread makes.
 */
static int running_write_out(BaleStore *s)
{
    RunningOut *o = g_new0(RunningOut, 1);
    bool done;
    int ret = 0;

    o->store = s;
    /* If it is abandoned, whoever closes waits for it. */
    bale_background_begin(s);
    bale_store_write_out(s, running_written_out, o);
    pthread_mutex_lock(&s->log_lock);
    while (!o->done && ret == 0) {
        if (s->maintain_stop || s->maintain_pauses || s->space_waiters) {
            ret = -EAGAIN;
        } else {
            pthread_cond_wait(&s->log_cond, &s->log_lock);
        }
    }
    done = o->done;
    o->abandoned = !done;
    ret = done ? o->ret : ret;
    pthread_mutex_unlock(&s->log_lock);
    if (done) {
        g_free(o);
    }
    return ret;
}

static int running_mark(CheckpointWriter *w)
{
    BaleStore *s = w->s;

    for (int i = 0; i < MARK_ATTEMPTS_MAX; i++) {
        uint64_t room;
        int ret = running_wait(s);

        if (ret < 0) {
            return ret;
        }
        pthread_mutex_lock(&s->log_lock);
        room = s->pages->len + WRITE_BUFFERS_MAX;
        pthread_mutex_unlock(&s->log_lock);
        g_free(w->table);
        w->table = g_try_new0(BalePageEntry, room);
        if (!w->table) {
            return -ENOMEM;
        }
        if (bale_log_mark(s, w->table, room, &w->mark)) {
            return BALE_PLANTED(mark_not_awaited) ? 0 : running_wait(s);
        }
    }
    return -EAGAIN;
}

int bale_checkpoint_running(BaleStore *s)
{
    BalePart root = { .kind = 0 };
    CheckpointWriter w;
    bool paused = true;
    int ret = 0;

    writer_init(&w, s);
    bale_patches_pause(s);
    ret = BALE_PLANTED(patches_not_written) ? 0 : running_write_out(s);
    pthread_rwlock_rdlock(&s->session_lock);
    if (ret < 0) {
        goto out;
    }
    if (store_failed(s)) {
        ret = -EIO;
        goto out;
    }
    if (!s->session) {
        goto out; /* the store is clean */
    }
    ret = running_mark(&w);
    bale_patches_resume(s);
    paused = false;
    if (ret == 0) {
        ret = writer_run(&w, &root);
    }
    if (ret == 0 && !BALE_PLANTED(checkpoint_not_flushed)) {
        ret = bale_log_flush_sync(s);
    }
    if (ret < 0) {
        writer_give_up(&w);
        goto out;
    }
    writer_name(&w, &root);
    ret = bale_supers_write(s);
    if (ret == 0) {
        writer_settle(&w);
    } else {
        writer_doubt(&w);
    }
out:
    pthread_rwlock_unlock(&s->session_lock);
    if (paused) {
        bale_patches_resume(s);
    }
    writer_destroy(&w);
    return ret;
}
