/*
 * Recovery by a scan: apply the records that were found, in order of their
 * sequence numbers, to an empty index.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "recover-internal.h"

#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "util/planted.h"

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

    if (bale_scan_record(scan, e->page, e->address - page_address(s, e->page),
                         e->payload_len + BALE_RECORD_HEADER_LEN, &r,
                         &payload) == 0 &&
        bale_image_decode(record, s->cluster_size, payload, r.payload_len) ==
            0) {
        return 0;
    }
    if (scan->ret == 0 && !scan->lost) {
        bale_recover_report(s, "damaged image record at address %" PRIu64,
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
    return bale_image_new(scan->s, &largest, NULL) ? 0 : -ENOMEM;
}

static int apply_image(Scan *scan, const ScanEntry *e)
{
    BaleStore *s = scan->s;
    BaleImage *image = g_ptr_array_index(s->images, 0);
    BaleImageRecord record;
    int ret = scan_image_record(scan, e, &record);

    if (ret < 0) {
        return ret == -ENOENT ? 0 : ret;
    }
    if (record.size < scan->image_record.size) {
        BalePage *p = bale_page(s, e->page);

        p->tombstone_seq = MAX(p->tombstone_seq, e->seq);
    }
    bale_layer_clear_from(image->top,
                          bale_size_clusters(record.size, s->cluster_size));
    scan->image_record = record;
    image->record_address = e->address;
    return 0;
}

static int apply_range(BaleLayer *layer, const ScanEntry *e)
{
    uint64_t clusters = bale_layer_clusters(layer);
    uint64_t value = e->type == BALE_RECORD_ZERO ? bale_value(e->address, 0)
                                                 : 0;
    uint64_t end = e->cluster + e->count;

    if (e->cluster >= clusters) {
        return 0;
    }
    if (e->type == BALE_RECORD_DROP && e->count == 0) {
        bale_layer_clear_from(layer, e->cluster);
        return 0;
    }
    for (uint64_t c = e->cluster; c < MIN(end, clusters); c++) {
        if (bale_layer_index_set(layer, c, value, NULL) < 0) {
            return -ENOMEM;
        }
    }
    return 0;
}

static int apply_entry(Scan *scan, const ScanEntry *e)
{
    BaleStore *s = scan->s;
    BaleLayer *layer = bale_layer_get(s, e->layer);
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
        if (!layer || e->cluster >= bale_layer_clusters(layer)) {
            return 0;
        }
        s->recovered_records++;
        return bale_layer_index_set(
            layer, e->cluster,
            bale_value(e->address,
                       bale_size_class(e->payload_len, s->cluster_size)),
            NULL);
    case BALE_RECORD_ZERO:
    case BALE_RECORD_DROP:
        if (e->type == BALE_RECORD_DROP) {
            p->tombstone_seq = MAX(p->tombstone_seq, e->seq);
        }
        if (!layer) {
            return 0;
        }
        s->recovered_records++;
        return apply_range(layer, e);
    default:
        return 0;
    }
}

bool bale_recover_count_live(uint64_t cluster, uint64_t value, void *opaque)
{
    BaleStore *s = opaque;

    bale_page_live_add(s, bale_value_address(value),
                       bale_value_live(value, s->cluster_size));
    return true;
}

int bale_scan_apply(Scan *scan)
{
    BaleStore *s = scan->s;
    BaleImage *image;
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
    if (ret < 0 || !s->images->len) {
        return ret;
    }
    image = g_ptr_array_index(s->images, 0);
    for (guint i = 0; ret == 0 && i < scan->entries->len; i++) {
        ScanEntry *e = &g_array_index(scan->entries, ScanEntry, i);

        if (!e->dropped) {
            ret = apply_entry(scan, e);
        }
    }
    if (ret == 0) {
        ret = bale_layer_set_size(image->top, scan->image_record.size);
    }
    if (ret == 0) {
        bale_image_set_record(image, &scan->image_record);
        bale_index_foreach(image->top->index, bale_recover_count_live, s);
        bale_page_live_add(s, image->record_address,
                           BALE_RECORD_HEADER_LEN);
    }
    return ret;
}
