/*
 * Recovery by a scan: what lies in the pages of a store.
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
 *   apply    sort by sequence, set the index (recover-apply.c)
 *
 * Memory: 40 bytes for each record and 48 for each segment, and while records
 * are sorted and applied 32 and 16 more; which is bounded by the size of the
 * device: a record takes at least 64 bytes of it.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "recover-internal.h"

#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "util/memory.h"
#include "util/planted.h"

/* --- reading --- */

static uint64_t scan_seed(Scan *scan, uint64_t page, uint64_t offset)
{
    return bale_place(scan->s->identity, page,
                      scan->page[page].header.version, offset);
}

/*
 * Read, verify the record at @offset of @page.  *@payload points into
 * scan->buf.  0, -ENOENT, -EIO; a device error is also left in scan->ret.
 */
int bale_scan_record(Scan *scan, uint64_t page, uint64_t offset,
                     uint32_t len_max, BaleRecord *r, const uint8_t **payload)
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
    p = bale_scan_read(scan, page, offset, avail);
    if (!p) {
        return scan->ret;
    }
    ret = bale_record_decode(r, seed, s->cluster_size, p, avail);
    if (ret == 0 && bale_record_size(r) > avail) {
        avail = bale_record_size(r);
        if (avail > s->page_size - offset) {
            return -EIO;
        }
        p = bale_scan_read(scan, page, offset, avail);
        if (!p) {
            return scan->ret;
        }
    }
    if (ret == 0 && bale_limit_read(s, r->payload_len) < 0) {
        ret = scan->ret = -EFBIG;
    }
    return ret < 0 ? ret
                   : bale_record_verify(r, seed, s->cluster_size, p, avail,
                                        payload);
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
        .type = r->type,
        .bare = r->flags & BALE_PATCH_BARE,
    };

    g_array_append_val(scan->entries, e);
}

/* Take over the entries of a directory payload; -EIO if one is bad. */
static int scan_directory(Scan *scan, uint64_t page, uint64_t begin,
                          uint64_t end, const uint8_t *p, uint32_t len,
                          ScanSegment *segment)
{
    uint64_t from = begin;

    segment->first_entry = scan->entries->len;
    if (len % BALE_DIRECTORY_ENTRY_LEN) {
        return -EIO;
    }
    for (uint32_t i = 0; i < len / BALE_DIRECTORY_ENTRY_LEN; i++) {
        BaleDirectoryEntry e;

        /* In order, and no two in one place: so they are not too many. */
        if (bale_directory_entry_decode(&e, from, end,
                                        scan->s->cluster_size,
                                        p + i * BALE_DIRECTORY_ENTRY_LEN) <
            0) {
            g_array_set_size(scan->entries, segment->first_entry);
            return -EIO;
        }
        scan_add_entry(scan, page, &e.record, e.offset);
        from = e.offset + bale_record_size(&e.record);
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
        bale_recover_report(scan->s,
                            "page %" PRIu64 " lies behind the end of the "
                            "device",
                            barrier->page);
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

    ret = bale_scan_record(scan, page, offset, BALE_BLOCK_SIZE, &r, &payload);
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
                         scan->recent || r.seq >= scan->s->super.next_seq);
    }
    ret = bale_scan_record(scan, page, segment->directory_offset,
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

    while (offset < scan->s->page_size && scan->ret == 0 &&
           (bale_scan_record(scan, page, offset, BALE_BLOCK_SIZE, &r,
                             &payload) < 0 ||
            r.type != BALE_RECORD_SEGMENT)) {
        offset += BALE_BLOCK_SIZE;
    }
    return offset;
}

void bale_scan_walk(Scan *scan, uint64_t page, uint64_t offset)
{
    ScanPage *sp = &scan->page[page];
    BaleSegment segment;
    ScanSegment out;

    if (!sp->segments) {
        sp->segments = g_array_new(FALSE, FALSE, sizeof(ScanSegment));
    }
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
        const uint8_t *p = bale_scan_read(scan, page, offset,
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

        if (bale_scan_record(scan, page, offset, BALE_BLOCK_SIZE, &r,
                             &payload) == 0 &&
            r.type == BALE_RECORD_DIRECTORY &&
            scan_directory(scan, page, begin, offset, payload, r.payload_len,
                           &found) == 0) {
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
    if (sp->segments) {
        g_array_set_size(sp->segments, 0);
    }
    sp->used = true;
    sp->kept = false;
    sp->header_damaged = true;
    sp->proven = 0;
    sp->header = (BalePageHeader){ .page = page, .version = version };
    bale_scan_walk(scan, page, BALE_BLOCK_SIZE);
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

        if (bale_scan_record(
                scan, page, e->address - page_address(scan->s, page),
                e->payload_len + BALE_RECORD_HEADER_LEN, &r, &payload) < 0 ||
            r.seq != e->seq || r.cluster != e->cluster || r.layer != e->layer ||
            r.type != e->type) {
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
    bale_recover_report(scan->s,
                        "page %" PRIu64 ": damaged segment at offset %" PRIu64
                        " below the flush barrier at %" PRIu64,
                        page, segment->offset, proven);
    if (segment->kind == SEGMENT_NO_DIRECTORY) {
        scan_salvage_chain(scan, page, segment);
    } else {
        /* What lies above the barrier was never there. */
        segment->len = MIN(segment->len, proven - segment->offset);
        scan_salvage_area(scan, page, segment);
    }
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

/* --- the scan --- */

/* One part of the page table of the newest checkpoint. */
static void scan_checkpoint_pages(Scan *scan, const BalePart *part)
{
    BaleStore *s = scan->s;
    g_autofree uint8_t *payload = NULL;
    BaleRecord r;

    if (bale_recover_record(s, part->address, part->version,
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

/* What the superblock says of the page with a checkpoint's root. */
static bool scan_checkpoint_end(Scan *scan, const BaleCheckpointRef *ref)
{
    BaleStore *s = scan->s;
    BaleBarrier b;

    if (ref->address < BALE_SUPER_SIZE) {
        return false;
    }
    b.page = (ref->address - BALE_SUPER_SIZE) / s->page_size;
    b.version = ref->version;
    b.durable_end = MIN((uint64_t)ref->end * BALE_BLOCK_SIZE, s->page_size);
    scan_add_barrier(scan, &b, true);
    return true;
}

void bale_scan_checkpoint(Scan *scan)
{
    const BaleCheckpointRef *ref = &scan->s->super.checkpoint;
    g_autofree uint8_t *payload = NULL;
    uint64_t parts_len = 0;
    BaleRecord r;
    BaleRoot root;

    /* Both are where they were for as long as the superblock names them. */
    scan_checkpoint_end(scan, &scan->s->super.previous);
    if (!scan_checkpoint_end(scan, ref) ||
        bale_recover_record(scan->s, ref->address, ref->version, ref->length,
                            &r, &payload) < 0 ||
        r.type != BALE_RECORD_CHECKPOINT_ROOT ||
        bale_root_decode(&root, payload, r.payload_len) < 0) {
        return;
    }
    for (uint32_t i = 0; i < root.parts && scan->ret == 0; i++) {
        BalePart part;

        if (bale_part_decode(&part, payload + BALE_ROOT_FIXED_LEN +
                                        i * BALE_PART_LEN) == 0 &&
            part.kind == BALE_PART_PAGES &&
            bale_checkpoint_part_fits(scan->s, &part, &parts_len)) {
            scan_checkpoint_pages(scan, &part);
        }
    }
}

uint64_t bale_scan_newer_version(Scan *scan, uint64_t page, uint64_t version,
                                 const uint8_t *block)
{
    ScanPage *sp = &scan->page[page];
    BalePageHeader header = sp->header;
    uint64_t claimed = bale_record_claimed_version(block);
    const uint8_t *payload;
    BaleRecord r;
    bool newer;

    if (claimed <= version) {
        return 0;
    }
    sp->header.version = claimed;
    newer = bale_scan_record(scan, page, BALE_BLOCK_SIZE, BALE_BLOCK_SIZE, &r,
                             &payload) == 0 &&
            r.type == BALE_RECORD_SEGMENT;
    sp->header = header;
    return newer ? claimed : 0;
}

uint64_t bale_scan_second_mark(Scan *scan, uint64_t page, const uint8_t *block)
{
    BalePageHeader mark;

    return bale_page_header_decode(&mark, scan->s->identity, page, block) ==
                       0 && mark.freed
               ? mark.version
               : 0;
}

void bale_scan_page(Scan *scan, uint64_t page)
{
    BaleStore *s = scan->s;
    ScanPage *sp = &scan->page[page];
    const uint8_t *p = bale_scan_read(scan, page, 0, 2 * BALE_BLOCK_SIZE);
    uint64_t newer, freed;
    int ret;

    if (!p) {
        return;
    }
    if (bale_memory_is_zero(p, 2 * BALE_BLOCK_SIZE)) {
        sp->blank = true;
        return;
    }
    ret = bale_page_header_decode(&sp->header, s->identity, page, p);
    if (ret < 0) {
        sp->header_damaged = true;
        sp->header = (BalePageHeader){ .page = page };
    }
    freed = bale_scan_second_mark(scan, page, p + BALE_BLOCK_SIZE);
    if (freed && freed >= sp->header.version) {
        sp->freed = freed; /* whatever has become of the first mark */
        sp->header.version = 0;
        return;
    }
    /*
     * The first segment says which version this page has, if its header is
     * damaged or stale, or was torn off.  The page's barriers may lie in the
     * page itself, so it is walked.
     */
    newer = BALE_PLANTED(stale_header_believed) && ret == 0
                ? 0
                : bale_scan_newer_version(scan, page, sp->header.version,
                                          p + BALE_BLOCK_SIZE);
    if (newer) {
        sp->header_damaged = true;
        sp->header = (BalePageHeader){ .page = page, .version = newer };
    } else if (ret < 0) {
        return; /* what the device held before, unless a barrier names it */
    } else if (sp->header.freed) {
        sp->freed = sp->header.version;
        sp->header.version = 0;
        return;
    }
    sp->used = true;
    bale_scan_walk(scan, page, BALE_BLOCK_SIZE);
}

void bale_scan_judge(Scan *scan)
{
    scan_apply_barriers(scan);
    for (uint64_t i = 0; i < scan->pages && scan->ret == 0; i++) {
        ScanPage *sp = &scan->page[i];

        if (sp->used && sp->header_damaged && sp->proven) {
            bale_recover_report(scan->s, "page %" PRIu64 ": damaged header",
                                i);
        }
        if (sp->used && sp->segments) {
            scan_judge(scan, i);
        }
    }
}

int bale_scan_init(Scan *scan, BaleStore *s)
{
    *scan = (Scan){ .s = s };
    if (s->dev_info.size > BALE_SUPER_SIZE) {
        scan->pages = (s->dev_info.size - BALE_SUPER_SIZE + s->page_size - 1) /
                      s->page_size;
    }
    scan->page = g_try_new0(ScanPage, MAX(scan->pages, 1));
    scan->buf_len = 2 * s->buffer_size;
    scan->buf = bale_memory_try_alloc(BALE_BLOCK_SIZE, scan->buf_len);
    scan->heads = bale_scan_heads_new();
    scan->entries = g_array_new(FALSE, FALSE, sizeof(ScanEntry));
    scan->barriers = g_array_new(FALSE, FALSE, sizeof(ScanBarrier));
    return scan->page && scan->buf && scan->heads ? 0 : -ENOMEM;
}

void bale_scan_destroy(Scan *scan)
{
    for (uint64_t i = 0; scan->page && i < scan->pages; i++) {
        if (scan->page[i].segments) {
            g_array_free(scan->page[i].segments, TRUE);
        }
    }
    g_free(scan->page);
    bale_memory_free(scan->buf);
    bale_scan_heads_free(scan->heads);
    g_array_free(scan->entries, TRUE);
    g_array_free(scan->barriers, TRUE);
}

bool bale_recover_scan(BaleStore *s, GError **errp)
{
    Scan scan;
    bool ok = false;
    int ret = bale_scan_init(&scan, s);

    for (uint64_t i = 0; ret == 0 && i < scan.pages; i++) {
        bale_scan_heads(&scan, i);
        if (scan.ret == 0) {
            bale_scan_page(&scan, i);
        }
        ret = scan.ret;
    }
    if (ret == 0) {
        bale_scan_checkpoint(&scan);
        bale_scan_judge(&scan);
        ret = scan.ret < 0 ? scan.ret : bale_scan_apply(&scan);
    }
    if (ret < 0) {
        bale_error_set(errp, ret, "scanning the store");
    } else if (!s->catalogue_address) {
        g_set_error(errp, BALE_STORE_ERROR, BALE_STORE_ERROR_CORRUPT,
                    "no image record can be read in this store");
    } else {
        /* Clusters that cannot be named: no read can be trusted to fail. */
        s->corrupt |= scan.lost;
        ok = true;
    }
    bale_scan_destroy(&scan);
    return ok;
}
