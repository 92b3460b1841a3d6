/*
 * Recovery from a checkpoint and what was appended after it, the tail.
 *
 * The checkpoint says of each page which version it had and where it ended at
 * the mark (checkpoint.c).  One block of each page tells whether that is still
 * so.  Then the tail is
 *
 *   - in a page that was open at the mark, what lies behind its end;
 *   - a page with another version than the checkpoint knows, all of it.
 *
 * It is walked and judged as in a scan (recover-scan.c): each barrier about it
 * is in it, too, because a barrier is written after what it proves.  So damage
 * and torn ends are told apart as well as by a scan.  Pages that the checkpoint
 * knows and that are gone without having been given up are found, too; but
 * damage in what it knows is found only when that is read.
 *
 * Invariants:
 *  1. What the checkpoint says of a cluster counts only where it points below
 *     the end of a page that still has its version; elsewhere it is stale.
 *     What is newer is in the tail: the page was given up after that had become
 *     durable, and as the index was copied after the mark, what does not lie
 *     below the end was appended after it.
 *  2. Records of the tail with the mark's sequence number or a higher one
 *     replace what is there; others are copies, and count only where the
 *     checkpoint is stale (recover-apply.c).
 *  3. What stays stale is not allocated: a page is given up when no cluster
 *     points at it, and the record that dropped the last of them may be gone
 *     when nothing older is left anywhere.
 *
 * The result is what a scan of all pages would give.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "recover-internal.h"

#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "util/memory.h"
#include "util/planted.h"

/* The page is what the checkpoint says, whatever its header looks like. */
static void tail_keep(Scan *scan, uint64_t page, bool damaged)
{
    BalePage *p = bale_page(scan->s, page);
    ScanPage *sp = &scan->page[page];
    uint64_t end = MAX(p->end, BALE_BLOCK_SIZE);

    sp->used = true;
    sp->kept = true;
    sp->header_damaged = damaged;
    sp->freed = 0;
    sp->header = (BalePageHeader){ p->bucket, page, p->version, p->first_seq,
                                   false };
    sp->proven = p->end;
    sp->end = p->end;
    if (p->state == BALE_PAGE_ACTIVE) {
        if (BALE_PLANTED(tail_too_short)) {
            end += BALE_BLOCK_SIZE;
        }
        bale_scan_walk(scan, page, end);
    }
}

/* Is a page that the checkpoint knows still what it was? */
static void tail_page(Scan *scan, uint64_t page)
{
    BaleStore *s = scan->s;
    BalePage *p = bale_page(s, page);
    bool cut = p->end == 0 || page_address(s, page) >= scan->from->cut;
    const uint8_t *b = bale_scan_read(scan, page, 0, 2 * BALE_BLOCK_SIZE);
    BalePageHeader header = { .page = page };
    uint64_t freed;
    bool newer, same;
    int ret;

    if (!b) {
        return;
    }
    ret = bale_page_header_decode(&header, s->identity, page, b);
    freed = bale_scan_second_mark(scan, page, b + BALE_BLOCK_SIZE);
    newer = bale_scan_newer_version(scan, page, p->version,
                                    b + BALE_BLOCK_SIZE);
    same = ret == 0 && header.version == p->version && !header.freed;
    if (newer || freed >= p->version ||
        (!same && (cut || (ret == 0 && header.version >= p->version)))) {
        bale_scan_page(scan, page); /* given up, and perhaps used anew */
    } else if (scan->ret == 0) {
        tail_keep(scan, page, !same);
    }
}

static int tail_scan(Scan *scan)
{
    BaleStore *s = scan->s;

    for (uint64_t i = 0; i < scan->pages && scan->ret == 0; i++) {
        bale_scan_heads(scan, i);
        if (scan->ret < 0) {
            break;
        }
        if (i < s->pages->len && bale_page(s, i)->version) {
            tail_page(scan, i);
        } else {
            bale_scan_page(scan, i);
        }
    }
    if (scan->ret == 0 &&
        scan->from->ref.address != s->super.checkpoint.address) {
        bale_scan_checkpoint(scan);
    }
    if (scan->ret == 0) {
        bale_scan_judge(scan);
    }
    for (uint64_t i = 0; i < s->pages->len; i++) {
        if (i >= scan->pages || !scan->page[i].kept) {
            scan->from->limit[i] = 0;
        }
    }
    g_array_set_size(s->pages, MIN(s->pages->len, scan->pages));
    /* After a crash no page is appended to again. */
    for (int b = 0; b < BALE_BUCKETS; b++) {
        s->active[b] = PAGE_NONE;
    }
    return scan->ret;
}

/* Bytes that the next recovery would have to walk again. */
static uint64_t tail_bytes(Scan *scan)
{
    uint64_t bytes = 0;

    for (uint64_t i = 0; i < scan->pages; i++) {
        GArray *segments = scan->page[i].segments;

        for (guint n = 0; segments && n < segments->len; n++) {
            bytes += g_array_index(segments, ScanSegment, n).len;
        }
    }
    return bytes;
}

RecoverResult bale_recover_tail(BaleStore *s, const BaleCheckpointRef *ref,
                                GError **errp)
{
    bool newest = ref->address == s->super.checkpoint.address;
    BaleCheckpointRef none = { .address = 0 };
    RecoverResult result = RECOVER_OK;
    Checkpoint c;
    Scan scan;
    int ret;

    ret = bale_checkpoint_open(&c, s, ref, false);
    if (bale_scan_init(&scan, s) < 0) {
        ret = -ENOMEM;
    }
    scan.from = &c;
    scan.recent = c.cut == UINT64_MAX;
    if (ret == 0) {
        ret = tail_scan(&scan);
        if (ret < 0 && ret != -ENOMEM) {
            bale_error_set(errp, ret, "reading the store");
            result = RECOVER_FAILED;
            goto out;
        }
    }
    if (ret == 0) {
        ret = bale_checkpoint_load(&c);
    }
    if (ret == 0) {
        ret = bale_scan_apply(&scan);
    }
    if (ret == 0) {
        bale_checkpoint_note(&c, newest ? &s->super.previous : &none);
        /* Records of the checkpoint itself are younger than its mark. */
        s->next_seq = MAX(s->next_seq, c.root.next_seq);
        s->next_seq = MAX(s->next_seq, c.end_seq);
        s->appended = tail_bytes(&scan);
        s->corrupt |= scan.lost || c.lost;
    } else if (ret == -ENOMEM) {
        bale_error_set(errp, ret, "reading the checkpoint");
        result = RECOVER_FAILED;
    } else {
        result = RECOVER_DAMAGED;
    }
out:
    bale_scan_destroy(&scan);
    bale_checkpoint_close(&c);
    return result;
}
