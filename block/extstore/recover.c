/*
 * Recovery: the state of a store from its checkpoint or, without a usable one,
 * from a scan of its pages.
 *
 * Nothing is written here.  The same bytes always give the same state, so that
 * a crash after recovery, or inside it, changes nothing.
 *
 * The scan collects what the directories of all segments say, and the barriers
 * of all segments, then decides page by page what is a torn tail and what is
 * damage, and at last applies the records in order of their sequence numbers:
 *
 *   walk     follow the segments of a page to its end, also past places where
 *            no segment verifies: the barrier that tells what such a place is
 *            may lie behind it
 *   judge    a bad place above the page's proven end is a torn tail: the page
 *            ends there.  Below it is damage: salvage what headers and
 *            directories still tell.  Segments above the proven end count only
 *            if each of their records verifies
 *   apply    sort by sequence, set the index
 *
 * Memory: 40 bytes for each record and 48 for each segment, which is bounded
 * by the size of the device: a record takes at least 64 bytes of it.
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

/* Bytes read at once while damage is searched for the next good record. */
#define SEARCH_WINDOW (256u << 10)

/* What one record says, wherever that was read. */
typedef struct ScanEntry {
    uint64_t seq;
    uint64_t address;
    uint64_t cluster;
    uint32_t layer;
    uint32_t count;
    uint32_t payload_len;
    uint32_t page;
    uint8_t type;
    bool dropped; /* part of a torn tail */
} ScanEntry;

typedef struct ScanSegment {
    uint64_t offset; /* in the page */
    uint64_t len;
    size_t first_entry;
    uint32_t entries;
    uint8_t kind;
} ScanSegment;

enum {
    SEGMENT_GOOD,     /* segment record and directory verify */
    SEGMENT_HEADLESS, /* a bad place: no segment record verifies */
    SEGMENT_NO_DIRECTORY,
};

typedef struct ScanPage {
    BalePageHeader header;
    bool used;
    bool header_damaged;
    bool blank;        /* the first two blocks are zeroes */
    uint64_t freed;    /* the version that its mark says is freed, or 0 */
    uint64_t end;      /* of what is accepted */
    uint64_t proven;   /* highest barrier for this version */
    GArray *segments;  /* ScanSegment */
} ScanPage;

/* A barrier, or what the checkpoint says of a page, which is as good. */
typedef struct ScanBarrier {
    BaleBarrier barrier;
    bool recent; /* not older than the checkpoint, after which no page is cut
                  * off from the device before the next one */
} ScanBarrier;

typedef struct Scan {
    BaleStore *s;
    uint64_t pages;
    ScanPage *page;
    GArray *entries;   /* ScanEntry */
    GArray *barriers;  /* ScanBarrier */
    uint8_t *buf;      /* buffer_size bytes */
    size_t buf_len;
    uint64_t window_page, window_begin, window_end; /* what buf holds */
    BaleImageRecord image_record; /* the newest one applied */
    bool searching;    /* in small steps: read more at once */
    bool lost;         /* clusters were lost that cannot be named */
    int ret;
} Scan;

static void recover_report(BaleStore *s, const char *fmt, ...)
    G_GNUC_PRINTF(2, 3);

static void recover_report(BaleStore *s, const char *fmt, ...)
{
    g_autofree char *what = NULL;
    va_list ap;

    va_start(ap, fmt);
    what = g_strdup_vprintf(fmt, ap);
    va_end(ap);
    s->damaged_records++;
    if (s->options.damage && !BALE_PLANTED(damage_unreported)) {
        s->options.damage(s->options.notify_opaque, what);
    }
}

/* --- reading --- */

/* Read [@offset, @offset + @len) of @page, widened to blocks, to @scan->buf. */
static const uint8_t *scan_read(Scan *scan, uint64_t page, uint64_t offset,
                                uint64_t len)
{
    uint64_t begin = bale_align_down(offset, BALE_BLOCK_SIZE);
    uint64_t end = bale_align_up(offset + len, BALE_BLOCK_SIZE);

    if (end - begin > scan->buf_len) {
        scan->ret = -EIO; /* longer than anything we write */
        return NULL;
    }
    /* The window keeps a search in small steps from reading over and over. */
    if (page != scan->window_page || begin < scan->window_begin ||
        end > scan->window_end) {
        if (scan->searching) {
            end = MAX(end, MIN(begin + SEARCH_WINDOW, scan->s->page_size));
        }
        scan->window_end = 0;
        scan->ret = bale_device_get_sync(scan->s->dev,
                                         page_address(scan->s, page) + begin,
                                         scan->buf, end - begin);
        if (scan->ret < 0) {
            return NULL;
        }
        scan->window_page = page;
        scan->window_begin = begin;
        scan->window_end = end;
    }
    return scan->buf + (offset - scan->window_begin);
}

static uint64_t scan_seed(Scan *scan, uint64_t page, uint64_t offset)
{
    return bale_place(scan->s->identity, page,
                      scan->page[page].header.version, offset);
}

/*
 * Read, verify the record at @offset of @page.  *@payload points into
 * scan->buf.  0, -ENOENT, -EIO; a device error is also left in scan->ret.
 */
static int scan_record(Scan *scan, uint64_t page, uint64_t offset,
                       uint32_t len_max, BaleRecord *r,
                       const uint8_t **payload)
{
    BaleStore *s = scan->s;
    uint64_t seed = scan_seed(scan, page, offset);
    const uint8_t *p;
    uint64_t avail;
    int ret;

    if (offset + BALE_RECORD_HEADER_LEN > s->page_size) {
        return -ENOENT;
    }
    avail = MIN(len_max, s->page_size - offset);
    p = scan_read(scan, page, offset, avail);
    if (!p) {
        return scan->ret;
    }
    ret = bale_record_decode(r, seed, s->cluster_size, p, avail);
    if (ret < 0) {
        return ret;
    }
    if (bale_record_size(r) > avail) {
        if (bale_record_size(r) > s->page_size - offset) {
            return -EIO;
        }
        p = scan_read(scan, page, offset, bale_record_size(r));
        if (!p) {
            return scan->ret;
        }
    }
    *payload = p + r->header_len;
    return bale_checksum(*payload, r->payload_len, seed) == r->payload_sum
               ? 0
               : -EIO;
}

static void scan_add_entry(Scan *scan, uint64_t page, const BaleRecord *r,
                           uint64_t offset)
{
    ScanEntry e = {
        .seq = r->seq,
        .address = page_address(scan->s, page) + offset,
        .cluster = r->cluster,
        .layer = r->layer,
        .count = r->count,
        .payload_len = r->payload_len,
        .page = page,
        .type = r->type,
    };

    g_array_append_val(scan->entries, e);
}

/* Take over the entries of a directory payload; -EIO if one is bad. */
static int scan_directory(Scan *scan, uint64_t page, uint64_t begin,
                          uint64_t end, const uint8_t *p, uint32_t len,
                          ScanSegment *segment)
{
    segment->first_entry = scan->entries->len;
    if (len % BALE_DIRECTORY_ENTRY_LEN) {
        return -EIO;
    }
    for (uint32_t i = 0; i < len / BALE_DIRECTORY_ENTRY_LEN; i++) {
        BaleDirectoryEntry e;

        if (bale_directory_entry_decode(&e, begin, end,
                                        scan->s->cluster_size,
                                        p + i * BALE_DIRECTORY_ENTRY_LEN) <
            0) {
            g_array_set_size(scan->entries, segment->first_entry);
            return -EIO;
        }
        scan_add_entry(scan, page, &e.record, e.offset);
    }
    segment->entries = scan->entries->len - segment->first_entry;
    return 0;
}

/* --- walk --- */

static void scan_add_barrier(Scan *scan, const BaleBarrier *barrier,
                             bool recent)
{
    ScanBarrier b = { *barrier, recent };

    g_array_append_val(scan->barriers, b);
    /* Between two checkpoints a device only grows. */
    if (barrier->page >= scan->pages && recent && !scan->lost) {
        recover_report(scan->s, "page %" PRIu64 " lies behind the end of the "
                       "device", barrier->page);
        scan->lost = true;
    }
}

/*
 * Read the segment at @offset: its record, barriers and directory.  0: there
 * is one, @out->kind tells about the directory.  -EIO, -ENOENT: there is none.
 */
static int scan_segment(Scan *scan, uint64_t page, uint64_t offset,
                        ScanSegment *out, BaleSegment *segment)
{
    const uint8_t *payload;
    BaleRecord r;
    int ret;

    ret = scan_record(scan, page, offset, BALE_BLOCK_SIZE, &r, &payload);
    if (ret < 0) {
        return ret;
    }
    if (r.type != BALE_RECORD_SEGMENT ||
        bale_segment_decode(segment, offset, scan->s->page_size, payload,
                            r.payload_len) < 0) {
        return -EIO;
    }
    out->offset = offset;
    out->len = segment->segment_len;
    out->entries = 0;
    out->kind = SEGMENT_GOOD;
    for (uint32_t i = 0; i < segment->barriers; i++) {
        scan_add_barrier(scan, &segment->barrier[i],
                         r.seq >= scan->s->super.next_seq);
    }
    ret = scan_record(scan, page, segment->directory_offset,
                      offset + segment->segment_len -
                          segment->directory_offset,
                      &r, &payload);
    if (ret < 0 && scan->ret < 0) {
        return ret;
    }
    if (ret < 0 || r.type != BALE_RECORD_DIRECTORY ||
        r.payload_len / BALE_DIRECTORY_ENTRY_LEN != segment->records ||
        scan_directory(scan, page, offset, segment->directory_offset, payload,
                       r.payload_len, out) < 0) {
        out->kind = SEGMENT_NO_DIRECTORY;
        return scan->ret;
    }
    return 0;
}

/* Where the next segment record that verifies lies at or behind @offset. */
static uint64_t scan_search(Scan *scan, uint64_t page, uint64_t offset)
{
    const uint8_t *payload;
    BaleRecord r;

    scan->searching = true;
    while (offset < scan->s->page_size && scan->ret == 0 &&
           (scan_record(scan, page, offset, BALE_BLOCK_SIZE, &r,
                        &payload) < 0 ||
            r.type != BALE_RECORD_SEGMENT)) {
        offset += BALE_BLOCK_SIZE;
    }
    scan->searching = false;
    return offset;
}

/* List the segments of @page, to its end. */
static void scan_walk(Scan *scan, uint64_t page)
{
    ScanPage *sp = &scan->page[page];
    uint64_t offset = BALE_BLOCK_SIZE;
    BaleSegment segment;
    ScanSegment out;

    sp->end = offset;
    while (offset < scan->s->page_size && scan->ret == 0) {
        if (scan_segment(scan, page, offset, &out, &segment) < 0) {
            out = (ScanSegment){ .offset = offset,
                                 .kind = SEGMENT_HEADLESS };
            out.len = scan_search(scan, page, offset + BALE_BLOCK_SIZE) -
                      offset;
        }
        g_array_append_val(sp->segments, out);
        offset += out.len;
    }
}

/* --- judge --- */

/* A segment whose directory is damaged: its record headers tell the same. */
static void scan_salvage_chain(Scan *scan, uint64_t page, ScanSegment *out)
{
    BaleSegment segment;
    uint64_t offset;
    uint32_t n = 0;

    if (scan_segment(scan, page, out->offset, out, &segment) < 0) {
        return; /* only if the device fails now; scan->ret tells */
    }
    offset = out->offset + BALE_RECORD_HEADER_LEN +
             bale_segment_payload_len(segment.barriers);
    offset = bale_align_up(offset, BALE_RECORD_ALIGN);
    out->first_entry = scan->entries->len;
    while (offset < segment.directory_offset && scan->ret == 0) {
        const uint8_t *p = scan_read(scan, page, offset,
                                     BALE_RECORD_HEADER_LEN);
        BaleRecord r;

        /* With a good header a bad payload still has a name. */
        if (p && bale_record_decode(&r, scan_seed(scan, page, offset),
                                    scan->s->cluster_size, p,
                                    BALE_RECORD_HEADER_LEN) == 0 &&
            bale_record_size(&r) <= segment.directory_offset - offset) {
            scan_add_entry(scan, page, &r, offset);
            n++;
            offset += bale_record_size(&r);
        } else {
            offset += BALE_RECORD_ALIGN;
        }
    }
    out->entries = n;
    if (n != segment.records) {
        scan->lost = true;
    }
}

/*
 * A place where no segment record verifies.  It may be one segment or several;
 * each directory that is found tells of its segment.
 */
static void scan_salvage_area(Scan *scan, uint64_t page, ScanSegment *out)
{
    uint64_t limit = out->offset + out->len;
    uint64_t begin = out->offset, offset = begin;

    out->first_entry = scan->entries->len;
    while (offset < limit && scan->ret == 0) {
        const uint8_t *payload;
        ScanSegment found;
        BaleRecord r;

        if (scan_record(scan, page, offset, BALE_BLOCK_SIZE, &r,
                        &payload) == 0 &&
            r.type == BALE_RECORD_DIRECTORY &&
            scan_directory(scan, page, begin, offset, payload,
                           r.payload_len, &found) == 0) {
            offset = bale_align_up(offset + bale_record_size(&r),
                                   BALE_BLOCK_SIZE);
            begin = offset;
        } else {
            offset += BALE_RECORD_ALIGN;
        }
    }
    out->entries = scan->entries->len - out->first_entry;
    if (begin < limit) {
        scan->lost = true;
    }
}

/*
 * The header of @page is damaged, or from before @version: there was a page of
 * that version, and it was not freed.
 */
static void scan_walk_again(Scan *scan, uint64_t page, uint64_t version)
{
    ScanPage *sp = &scan->page[page];

    for (guint i = 0; sp->segments && i < sp->segments->len; i++) {
        ScanSegment *segment = &g_array_index(sp->segments, ScanSegment, i);

        for (uint32_t n = 0; n < segment->entries; n++) {
            g_array_index(scan->entries, ScanEntry,
                          segment->first_entry + n).dropped = true;
        }
    }
    if (!sp->segments) {
        sp->segments = g_array_new(FALSE, FALSE, sizeof(ScanSegment));
    }
    g_array_set_size(sp->segments, 0);
    sp->used = true;
    sp->header_damaged = true;
    sp->proven = 0;
    sp->header = (BalePageHeader){ .page = page, .version = version };
    scan_walk(scan, page);
}

/* Raise the proven ends by all barriers. */
static void scan_apply_barriers(Scan *scan)
{
    /* Walking a page that a barrier names may add barriers. */
    for (guint i = 0; i < scan->barriers->len && scan->ret == 0; i++) {
        ScanBarrier known = g_array_index(scan->barriers, ScanBarrier, i);
        BaleBarrier b = known.barrier;
        ScanPage *sp;

        if (b.page >= scan->pages ||
            (!known.recent && page_address(scan->s, b.page) >=
                                  scan->s->super.device_end)) {
            /*
             * It was freed, and cut off at a checkpoint, mark and all.  What
             * is there now was opened later.
             */
            continue;
        }
        sp = &scan->page[b.page];
        if (b.version > sp->freed && b.version > sp->header.version &&
            (!sp->blank || known.recent)) {
            scan_walk_again(scan, b.page, b.version);
        }
        if (sp->used && sp->header.version == b.version) {
            sp->proven = MAX(sp->proven, b.durable_end);
        }
    }
}

/* Does every record of @segment verify? */
static bool scan_segment_verifies(Scan *scan, uint64_t page,
                                  const ScanSegment *segment)
{
    for (uint32_t i = 0; i < segment->entries; i++) {
        ScanEntry *e = &g_array_index(scan->entries, ScanEntry,
                                      segment->first_entry + i);
        const uint8_t *payload;
        BaleRecord r;

        if (scan_record(scan, page,
                        e->address - page_address(scan->s, page),
                        e->payload_len + BALE_RECORD_HEADER_LEN, &r,
                        &payload) < 0 ||
            r.seq != e->seq || r.cluster != e->cluster ||
            r.layer != e->layer || r.type != e->type) {
            return false;
        }
    }
    return true;
}

/* Is @segment acceptable?  If it is damage, salvage and report it. */
static bool scan_judge_segment(Scan *scan, uint64_t page,
                               ScanSegment *segment)
{
    uint64_t proven = scan->page[page].proven;

    if (segment->kind == SEGMENT_GOOD) {
        return segment->offset + segment->len <= proven ||
               BALE_PLANTED(tail_unverified) ||
               scan_segment_verifies(scan, page, segment);
    }
    if (segment->offset >= proven || BALE_PLANTED(tail_over_damage)) {
        return false;
    }
    recover_report(scan->s,
                   "page %" PRIu64 ": damaged segment at offset %" PRIu64
                   " below the flush barrier at %" PRIu64,
                   page, segment->offset, proven);
    scan->searching = true;
    if (segment->kind == SEGMENT_NO_DIRECTORY) {
        scan_salvage_chain(scan, page, segment);
    } else {
        /* What lies above the barrier was never there. */
        segment->len = MIN(segment->len, proven - segment->offset);
        scan_salvage_area(scan, page, segment);
    }
    scan->searching = false;
    return true;
}

/* Find where @page really ends; drop what lies behind. */
static void scan_judge(Scan *scan, uint64_t page)
{
    ScanPage *sp = &scan->page[page];
    bool torn = false;

    for (guint i = 0; i < sp->segments->len && scan->ret == 0; i++) {
        ScanSegment *segment = &g_array_index(sp->segments, ScanSegment, i);

        torn = torn || !scan_judge_segment(scan, page, segment);
        if (!torn) {
            sp->end = segment->offset + segment->len;
            continue;
        }
        if (segment->kind == SEGMENT_GOOD) {
            scan->s->torn_bytes += segment->len;
        }
        for (uint32_t n = 0; n < segment->entries; n++) {
            g_array_index(scan->entries, ScanEntry,
                          segment->first_entry + n).dropped = true;
        }
    }
}

/* --- apply --- */

static int entry_compare(const void *a, const void *b)
{
    const ScanEntry *x = a, *y = b;

    if (BALE_PLANTED(sequence_ignored)) {
        return x->address > y->address ? -1 : x->address < y->address;
    }
    return x->seq < y->seq ? -1 : x->seq > y->seq;
}

/* Read an image record.  -ENOENT: it is damaged, which has been reported. */
static int scan_image_record(Scan *scan, const ScanEntry *e,
                             BaleImageRecord *record)
{
    BaleStore *s = scan->s;
    const uint8_t *payload;
    BaleRecord r;

    if (scan_record(scan, e->page, e->address - page_address(s, e->page),
                    e->payload_len + BALE_RECORD_HEADER_LEN, &r,
                    &payload) == 0 &&
        bale_image_decode(record, s->cluster_size, payload,
                          r.payload_len) == 0) {
        return 0;
    }
    if (scan->ret == 0 && !scan->lost) {
        recover_report(s, "damaged image record at address %" PRIu64,
                       e->address);
        scan->lost = true;
    }
    return scan->ret < 0 ? scan->ret : -ENOENT;
}

/*
 * Make the image, as large as it ever was according to the image records that
 * are left: what older records say is applied before the first of them.
 */
static int apply_make_image(Scan *scan)
{
    BaleImageRecord largest, record;
    bool found = false;

    for (guint i = 0; i < scan->entries->len; i++) {
        ScanEntry *e = &g_array_index(scan->entries, ScanEntry, i);
        int ret;

        if (e->dropped || e->type != BALE_RECORD_IMAGE) {
            continue;
        }
        ret = scan_image_record(scan, e, &record);
        if (ret == 0 && (!found || record.size > largest.size)) {
            largest = record;
            found = true;
        } else if (ret < 0 && ret != -ENOENT) {
            return ret;
        }
    }
    if (!found) {
        return 0;
    }
    scan->s->image = bale_image_new(scan->s, &largest, NULL);
    return scan->s->image ? 0 : -ENOMEM;
}

static int apply_image(Scan *scan, const ScanEntry *e)
{
    BaleStore *s = scan->s;
    BaleImageRecord record;
    int ret = scan_image_record(scan, e, &record);

    if (ret < 0) {
        return ret == -ENOENT ? 0 : ret;
    }
    if (record.size < scan->image_record.size) {
        BalePage *p = bale_page(s, e->page);

        p->tombstone_seq = MAX(p->tombstone_seq, e->seq);
    }
    bale_image_index_clear_from(
        s->image, bale_image_clusters(&record, s->cluster_size));
    scan->image_record = record;
    s->image->record_address = e->address;
    return 0;
}

static int apply_range(BaleImage *image, const ScanEntry *e)
{
    uint64_t clusters =
        bale_image_clusters(&image->record, image->store->cluster_size);
    uint64_t value = e->type == BALE_RECORD_ZERO ? bale_value(e->address, 0)
                                                 : 0;
    uint64_t end = e->cluster + e->count;

    if (e->cluster >= clusters) {
        return 0;
    }
    if (e->type == BALE_RECORD_DROP && e->count == 0) {
        bale_image_index_clear_from(image, e->cluster);
        return 0;
    }
    for (uint64_t c = e->cluster; c < MIN(end, clusters); c++) {
        if (bale_image_index_set(image, c, value, NULL) < 0) {
            return -ENOMEM;
        }
    }
    return 0;
}

static int apply_entry(Scan *scan, const ScanEntry *e)
{
    BaleStore *s = scan->s;
    BaleImage *image = s->image;
    BalePage *p = bale_page(s, e->page);

    s->next_seq = MAX(s->next_seq, e->seq + 1);
    p->first_seq = MIN(p->first_seq, e->seq);
    switch (e->type) {
    case BALE_RECORD_CHECKPOINT_PART:
    case BALE_RECORD_CHECKPOINT_ROOT:
        p->bucket = BALE_BUCKET_META; /* its header may be damaged */
        return 0;
    case BALE_RECORD_IMAGE:
        p->bucket = BALE_BUCKET_META;
        return apply_image(scan, e);
    case BALE_RECORD_DATA:
        if (e->layer != image->record.layer ||
            e->cluster >= bale_image_clusters(&image->record,
                                              s->cluster_size)) {
            return 0;
        }
        s->recovered_records++;
        return bale_image_index_set(
            image, e->cluster,
            bale_value(e->address,
                       bale_size_class(e->payload_len, s->cluster_size)),
            NULL);
    case BALE_RECORD_ZERO:
    case BALE_RECORD_DROP:
        if (e->type == BALE_RECORD_DROP) {
            p->tombstone_seq = MAX(p->tombstone_seq, e->seq);
        }
        if (e->layer != image->record.layer) {
            return 0;
        }
        s->recovered_records++;
        return apply_range(image, e);
    default:
        return 0;
    }
}

static bool count_live(uint64_t cluster, uint64_t value, void *opaque)
{
    BaleStore *s = opaque;

    bale_page_live_add(s, bale_value_address(value),
                       bale_value_live(value, s->cluster_size));
    return true;
}

static int scan_apply(Scan *scan)
{
    BaleStore *s = scan->s;
    int ret = bale_page_table_grow(s, scan->pages);

    for (uint64_t i = 0; ret == 0 && i < scan->pages; i++) {
        ScanPage *sp = &scan->page[i];
        BalePage *p = bale_page(s, i);

        if (!sp->used) {
            continue;
        }
        p->version = sp->header.version;
        p->bucket = sp->header.bucket;
        p->state = BALE_PAGE_SEALED;
        p->end = sp->end;
        p->proven = sp->proven;
        p->first_seq = sp->header.first_seq;
        p->allocated = s->page_size;
    }
    g_array_sort(scan->entries, entry_compare);
    ret = ret == 0 ? apply_make_image(scan) : ret;
    if (ret < 0 || !s->image) {
        return ret;
    }
    for (guint i = 0; ret == 0 && i < scan->entries->len; i++) {
        ScanEntry *e = &g_array_index(scan->entries, ScanEntry, i);

        if (!e->dropped) {
            ret = apply_entry(scan, e);
        }
    }
    if (ret == 0) {
        ret = bale_image_set_record(s->image, &scan->image_record);
    }
    if (ret == 0) {
        bale_index_foreach(s->image->index, count_live, s);
        bale_page_live_add(s, s->image->record_address,
                           BALE_RECORD_HEADER_LEN);
    }
    return ret;
}

/* --- the scan --- */

static int load_record(BaleStore *s, uint64_t address, uint64_t version,
                       uint32_t len, BaleRecord *r, uint8_t **out);

/* One part of the page table of the newest checkpoint. */
static void scan_checkpoint_pages(Scan *scan, const BalePart *part)
{
    BaleStore *s = scan->s;
    g_autofree uint8_t *payload = NULL;
    BaleRecord r;

    if (load_record(s, part->address, part->version,
                    BALE_RECORD_HEADER_LEN + part->payload_len, &r,
                    &payload) < 0 ||
        r.type != BALE_RECORD_CHECKPOINT_PART ||
        r.payload_len != part->payload_len) {
        return;
    }
    for (uint64_t i = 0; i < part->b; i++) {
        BalePageEntry e;
        BaleBarrier b;

        if (bale_page_entry_decode(&e, s->page_size,
                                   payload + i * BALE_PAGE_ENTRY_LEN) == 0 &&
            e.version) {
            b = (BaleBarrier){ part->a + i, e.version, e.end };
            scan_add_barrier(scan, &b, true);
        }
    }
}

/*
 * The newest checkpoint is out of date, but what it says of pages was flushed:
 * a page that it names is there, or marked as freed, or used anew.  Best
 * effort: if it is damaged, barriers are all that is known.
 */
static void scan_checkpoint(Scan *scan)
{
    const BaleSuper *super = &scan->s->super;
    g_autofree uint8_t *payload = NULL;
    BaleBarrier b;
    BaleRecord r;
    BaleRoot root;

    if (super->checkpoint_address < BALE_SUPER_SIZE ||
        load_record(scan->s, super->checkpoint_address,
                    super->checkpoint_version, super->checkpoint_length, &r,
                    &payload) < 0 ||
        r.type != BALE_RECORD_CHECKPOINT_ROOT ||
        bale_root_decode(&root, payload, r.payload_len) < 0) {
        return;
    }
    b.page = (super->checkpoint_address - BALE_SUPER_SIZE) /
             scan->s->page_size;
    b.version = super->checkpoint_version;
    b.durable_end = MIN((uint64_t)super->checkpoint_end * BALE_BLOCK_SIZE,
                        scan->s->page_size);
    scan_add_barrier(scan, &b, true);
    for (uint32_t i = 0; i < root.parts && scan->ret == 0; i++) {
        BalePart part;

        if (bale_part_decode(&part, payload + BALE_ROOT_FIXED_LEN +
                                        i * BALE_PART_LEN) == 0 &&
            part.kind == BALE_PART_PAGES) {
            scan_checkpoint_pages(scan, &part);
        }
    }
}

/* Read the header of @page and walk it. */
static void scan_page(Scan *scan, uint64_t page)
{
    BaleStore *s = scan->s;
    ScanPage *sp = &scan->page[page];
    const uint8_t *p = scan_read(scan, page, 0, 2 * BALE_BLOCK_SIZE);
    const uint8_t *payload;
    BaleRecord r;
    int ret;

    if (!p) {
        return;
    }
    if (bale_memory_is_zero(p, 2 * BALE_BLOCK_SIZE)) {
        sp->blank = true;
        return;
    }
    sp->segments = g_array_new(FALSE, FALSE, sizeof(ScanSegment));
    ret = bale_page_header_decode(&sp->header, s->identity, page, p);
    if (ret == 0 && sp->header.freed) {
        sp->freed = sp->header.version;
        sp->header.version = 0;
        return;
    }
    if (ret < 0) {
        /* The first segment may still say which version this page has. */
        sp->header_damaged = true;
        sp->header = (BalePageHeader){
            .page = page,
            .version = bale_record_claimed_version(p + BALE_BLOCK_SIZE),
        };
        if (scan_record(scan, page, BALE_BLOCK_SIZE, BALE_BLOCK_SIZE, &r,
                        &payload) < 0 ||
            r.type != BALE_RECORD_SEGMENT) {
            /* Old contents of the device, unless a barrier names the page. */
            sp->header.version = 0;
            return;
        }
    }
    sp->used = true;
    scan_walk(scan, page);
}

static bool scan_run(Scan *scan)
{
    for (uint64_t i = 0; i < scan->pages && scan->ret == 0; i++) {
        scan_page(scan, i);
    }
    if (scan->ret == 0) {
        scan_checkpoint(scan);
    }
    scan_apply_barriers(scan);
    for (uint64_t i = 0; i < scan->pages && scan->ret == 0; i++) {
        ScanPage *sp = &scan->page[i];

        if (sp->used && sp->header_damaged && sp->proven) {
            recover_report(scan->s, "page %" PRIu64 ": damaged header", i);
        }
        if (sp->used) {
            scan_judge(scan, i);
        }
    }
    return scan->ret == 0;
}

static void recover_set_error(GError **errp, int ret, const char *what)
{
    g_set_error(errp, BALE_STORE_ERROR,
                ret == -ENOMEM ? BALE_STORE_ERROR_NO_MEMORY
                               : BALE_STORE_ERROR_IO,
                "%s: %s", what, g_strerror(-ret));
}

static bool recover_scan(BaleStore *s, GError **errp)
{
    Scan scan = { .s = s };
    bool ok = false;

    if (s->dev_info.size > BALE_SUPER_SIZE) {
        scan.pages = (s->dev_info.size - BALE_SUPER_SIZE + s->page_size - 1) /
                     s->page_size;
    }
    scan.page = g_try_new0(ScanPage, MAX(scan.pages, 1));
    scan.buf_len = 2 * s->buffer_size;
    scan.buf = bale_memory_try_alloc(BALE_BLOCK_SIZE, scan.buf_len);
    scan.entries = g_array_new(FALSE, FALSE, sizeof(ScanEntry));
    scan.barriers = g_array_new(FALSE, FALSE, sizeof(ScanBarrier));
    if (!scan.page || !scan.buf) {
        recover_set_error(errp, -ENOMEM, "scanning the store");
        goto out;
    }
    if (!scan_run(&scan)) {
        recover_set_error(errp, scan.ret, "scanning the store");
        goto out;
    }
    scan.ret = scan_apply(&scan);
    if (scan.ret < 0) {
        recover_set_error(errp, scan.ret, "scanning the store");
        goto out;
    }
    if (!s->image) {
        g_set_error(errp, BALE_STORE_ERROR, BALE_STORE_ERROR_CORRUPT,
                    "no image record can be read in this store");
        goto out;
    }
    if (scan.lost) {
        /* Clusters that cannot be named: no read can be trusted to fail. */
        s->corrupt = true;
    }
    ok = true;
out:
    for (uint64_t i = 0; scan.page && i < scan.pages; i++) {
        if (scan.page[i].segments) {
            g_array_free(scan.page[i].segments, TRUE);
        }
    }
    g_free(scan.page);
    bale_memory_free(scan.buf);
    g_array_free(scan.entries, TRUE);
    g_array_free(scan.barriers, TRUE);
    return ok;
}

/* --- checkpoint --- */

/*
 * Read and verify the record at @address of the page version @version.  On
 * success *@out is its payload, newly allocated.
 */
static int load_record(BaleStore *s, uint64_t address, uint64_t version,
                       uint32_t len, BaleRecord *r, uint8_t **out)
{
    BALE_AUTO_MEMORY uint8_t *buf = NULL;
    uint64_t begin = bale_align_down(address, BALE_BLOCK_SIZE);
    uint64_t end = bale_align_up(address + len, BALE_BLOCK_SIZE);
    uint64_t page = (address - BALE_SUPER_SIZE) / s->page_size;
    uint64_t offset = (address - BALE_SUPER_SIZE) % s->page_size;
    uint64_t seed = bale_place(s->identity, page, version, offset);
    const uint8_t *p;
    int ret;

    if (address < BALE_SUPER_SIZE || len < BALE_RECORD_HEADER_LEN ||
        offset + len > s->page_size || address + len > s->dev_info.size) {
        return -EIO;
    }
    buf = bale_memory_try_alloc(BALE_BLOCK_SIZE, end - begin);
    if (!buf) {
        return -ENOMEM;
    }
    ret = bale_device_get_sync(s->dev, begin, buf, end - begin);
    if (ret < 0) {
        return ret;
    }
    p = buf + (address - begin);
    if (bale_record_decode(r, seed, s->cluster_size, p, len) < 0 ||
        r->header_len + r->payload_len > len || r->version != version ||
        bale_checksum(p + r->header_len, r->payload_len, seed) !=
            r->payload_sum) {
        return -EIO;
    }
    *out = g_try_malloc(r->payload_len + 1);
    if (!*out) {
        return -ENOMEM;
    }
    memcpy(*out, p + r->header_len, r->payload_len);
    return 0;
}

static int load_pages(BaleStore *s, const BalePart *part,
                      const uint8_t *payload)
{
    if (part->a + part->b > s->pages->len) {
        return -EIO;
    }
    for (uint64_t i = 0; i < part->b; i++) {
        BalePage *p = bale_page(s, part->a + i);
        BalePageEntry e;

        if (bale_page_entry_decode(&e, s->page_size,
                                   payload + i * BALE_PAGE_ENTRY_LEN) < 0) {
            return -EIO;
        }
        if (e.version == 0) {
            continue;
        }
        p->version = e.version;
        p->bucket = e.bucket;
        p->state = BALE_PAGE_SEALED;
        p->end = p->proven = p->allocated = e.end;
        /* Counted anew with the index: what the entry says is not trusted. */
        p->live_bytes = 0;
        p->first_seq = e.first_seq;
        p->tombstone_seq = e.tombstone_seq;
        if (e.open) {
            if (s->active[e.bucket] != PAGE_NONE) {
                return -EIO;
            }
            p->state = BALE_PAGE_ACTIVE;
            s->active[e.bucket] = part->a + i;
        }
    }
    return 0;
}

static int load_index(BaleStore *s, const BalePart *part,
                      const uint8_t *payload)
{
    BaleImage *image = s->image;
    uint64_t clusters;

    if (!image || part->a != image->record.layer) {
        return -EIO;
    }
    clusters = bale_image_clusters(&image->record, s->cluster_size);
    if (part->b + part->payload_len / 8 > clusters) {
        return -EIO;
    }
    for (uint32_t i = 0; i < part->payload_len / 8; i++) {
        uint64_t value = bale_get_le64(payload + i * 8);
        uint64_t page, offset;

        if (value == 0) {
            continue;
        }
        if (value >> BALE_VALUE_BITS ||
            !bale_address_split(s, bale_value_address(value), &page,
                                &offset) ||
            offset + BALE_RECORD_HEADER_LEN > bale_page(s, page)->end) {
            return -EIO;
        }
        if (bale_image_index_set(image, part->b + i, value, NULL) < 0) {
            return -ENOMEM;
        }
        count_live(part->b + i, value, s);
    }
    return 0;
}

static int load_image(BaleStore *s, const BalePart *part)
{
    g_autofree uint8_t *payload = NULL;
    BaleImageRecord record;
    BaleRecord r;
    uint64_t page = (part->address - BALE_SUPER_SIZE) / s->page_size;
    uint64_t offset = (part->address - BALE_SUPER_SIZE) % s->page_size;
    uint32_t len = MIN(s->page_size - offset,
                       BALE_RECORD_HEADER_MAX + BALE_IMAGE_PAYLOAD_MAX);
    int ret;

    if (page >= s->pages->len || s->image) {
        return -EIO;
    }
    len = MIN(len, s->dev_info.size - part->address);
    ret = load_record(s, part->address, part->version, len, &r, &payload);
    if (ret < 0) {
        return ret;
    }
    if (r.type != BALE_RECORD_IMAGE ||
        bale_image_decode(&record, s->cluster_size, payload,
                          r.payload_len) < 0) {
        return -EIO;
    }
    s->image = bale_image_new(s, &record, NULL);
    if (!s->image) {
        return -ENOMEM;
    }
    s->image->record_address = part->address;
    bale_page_live_add(s, part->address, BALE_RECORD_HEADER_LEN);
    return 0;
}

static void load_note_record(BaleStore *s, uint64_t address, uint32_t len)
{
    BaleCheckpointRecord c = { address, len };

    g_array_append_val(s->checkpoint, c);
    bale_page_live_add(s, address, len);
}

/* Load all parts of @kind. */
static int load_parts(BaleStore *s, uint32_t parts, const uint8_t *p,
                      uint32_t kind)
{
    for (uint32_t i = 0; i < parts; i++) {
        g_autofree uint8_t *payload = NULL;
        BalePart part;
        BaleRecord r;
        int ret;

        if (bale_part_decode(&part, p + i * BALE_PART_LEN) < 0) {
            return -EIO;
        }
        if (part.kind != kind) {
            continue;
        }
        if (kind == BALE_PART_IMAGE) {
            ret = load_image(s, &part);
        } else {
            uint32_t len = BALE_RECORD_HEADER_LEN + part.payload_len;

            ret = load_record(s, part.address, part.version, len, &r,
                              &payload);
            if (ret == 0 && (r.type != BALE_RECORD_CHECKPOINT_PART ||
                             r.payload_len != part.payload_len)) {
                ret = -EIO;
            }
            if (ret == 0) {
                ret = kind == BALE_PART_PAGES ? load_pages(s, &part, payload)
                                              : load_index(s, &part, payload);
            }
        }
        if (ret < 0) {
            return ret;
        }
    }
    return 0;
}

static int load_checkpoint(BaleStore *s)
{
    g_autofree uint8_t *payload = NULL;
    const BaleSuper *super = &s->super;
    uint64_t page, offset;
    BaleRecord r;
    BaleRoot root;
    int ret;

    ret = load_record(s, super->checkpoint_address, super->checkpoint_version,
                      super->checkpoint_length, &r, &payload);
    if (ret < 0) {
        return ret;
    }
    if (r.type != BALE_RECORD_CHECKPOINT_ROOT ||
        bale_root_decode(&root, payload, r.payload_len) < 0 ||
        root.pages > (s->dev_info.size - BALE_SUPER_SIZE) / s->page_size + 1) {
        return -EIO;
    }
    ret = bale_page_table_grow(s, root.pages);
    if (ret == 0) {
        ret = load_parts(s, root.parts, payload + BALE_ROOT_FIXED_LEN,
                         BALE_PART_PAGES);
    }
    if (ret < 0) {
        return ret;
    }
    if (!bale_address_split(s, super->checkpoint_address, &page, &offset) ||
        (uint64_t)super->checkpoint_end * BALE_BLOCK_SIZE <
            offset + super->checkpoint_length ||
        bale_page(s, page)->version != super->checkpoint_version) {
        return -EIO;
    }
    bale_page(s, page)->end = bale_page(s, page)->proven =
        bale_page(s, page)->allocated =
            (uint64_t)super->checkpoint_end * BALE_BLOCK_SIZE;

    ret = load_parts(s, root.parts, payload + BALE_ROOT_FIXED_LEN,
                     BALE_PART_IMAGE);
    if (ret == 0) {
        ret = load_parts(s, root.parts, payload + BALE_ROOT_FIXED_LEN,
                         BALE_PART_INDEX);
    }
    if (ret < 0 || !s->image) {
        return ret < 0 ? ret : -EIO;
    }

    load_note_record(s, super->checkpoint_address, super->checkpoint_length);
    for (uint32_t i = 0; i < root.parts; i++) {
        BalePart part;

        bale_part_decode(&part, payload + BALE_ROOT_FIXED_LEN +
                                    i * BALE_PART_LEN);
        if (part.kind != BALE_PART_IMAGE) {
            load_note_record(s, part.address,
                             BALE_RECORD_HEADER_LEN + part.payload_len);
        }
    }
    s->next_seq = MAX(root.next_seq, super->next_seq);
    return 0;
}

/* Forget what a checkpoint that turned out damaged has loaded. */
static void recover_reset(BaleStore *s)
{
    bale_image_free(s->image);
    s->image = NULL;
    g_array_set_size(s->pages, 0);
    g_array_set_size(s->checkpoint, 0);
    for (int b = 0; b < BALE_BUCKETS; b++) {
        s->active[b] = PAGE_NONE;
    }
    s->next_seq = 1;
}

bool bale_recover(BaleStore *s, GError **errp)
{
    bool clean = s->super.state & BALE_STATE_CLEAN;
    int ret;

    /* Also when not clean: between checkpoints a device only grows. */
    if (s->dev_info.size < s->super.device_end) {
        g_set_error(errp, BALE_STORE_ERROR, BALE_STORE_ERROR_CORRUPT,
                    "the store was truncated: it ends at %" PRIu64
                    ", but its data reaches to %" PRIu64,
                    s->dev_info.size, s->super.device_end);
        return false;
    }
    if (clean) {
        ret = load_checkpoint(s);
        if (ret == -ENOMEM) {
            recover_set_error(errp, ret, "reading the checkpoint");
            return false;
        }
        if (ret < 0) {
            recover_report(s, "the checkpoint cannot be read: %s; the store "
                           "is scanned", g_strerror(-ret));
            s->checkpoint_damaged = true;
            recover_reset(s);
            clean = false;
        }
    }
    if (!clean && !recover_scan(s, errp)) {
        return false;
    }
    s->was_clean = clean;
    s->next_seq = MAX(s->next_seq, s->super.next_seq);
    bale_page_free_list_rebuild(s);
    return true;
}
