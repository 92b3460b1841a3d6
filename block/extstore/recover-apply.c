/*
 * Recovery: apply the records that were found, in order of their sequence
 * numbers, to empty indexes or to those of a checkpoint.
 *
 * A scan makes the layers of the newest catalogue first, and takes records of
 * what was merged since for records of what that was merged into.  With a
 * checkpoint the layers are those of its catalogue, and each later one is put
 * into force in its turn, as it was then.
 *
 * In the tail of a checkpoint there are also copies of older records, whose
 * originals compaction has moved away.  What the checkpoint says of a cluster
 * is newer or the same, unless its page is gone; then the newest copy counts.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "patch-internal.h"
#include "recover-internal.h"

#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "util/planted.h"

/* What a byte of a catalogue takes, in bytes that are verified. */
#define CATALOGUE_EFFORT 16ull

/* So many records before one is applied its place in the index is fetched. */
#define FETCH_AHEAD 16u

/* Is it in a checkpoint's tail, but older than that?  Then it is a copy. */
static bool apply_is_old(Scan *scan, const ScanEntry *e)
{
    return scan->from && e->seq < scan->from->root.next_seq;
}

/*
 * Copies count only if what the checkpoint says of the cluster is stale.  Of
 * several the last one does; a value that an older one has set points into the
 * tail, and so is stale.
 */
static bool apply_wanted(Scan *scan, BaleLayer *layer, const ScanEntry *e,
                         uint64_t cluster)
{
    BaleStore *s = scan->s;
    uint64_t value, page, offset;

    if (!apply_is_old(scan, e)) {
        return true;
    }
    value = bale_index_find(layer->index, cluster);
    return value == VALUE_STALE ||
           (value && bale_address_split(s, bale_value_address(value), &page,
                                        &offset) &&
            offset >= scan->from->limit[page]);
}

static uint64_t apply_page(BaleStore *s, const ScanEntry *e)
{
    return (e->address - BALE_SUPER_SIZE) / s->page_size;
}

/* Read a catalogue.  -ENOENT: it is damaged, which has been reported. */
static int scan_catalogue(Scan *scan, const ScanEntry *e, BaleCatalogue **cat)
{
    BaleStore *s = scan->s;
    uint64_t page = apply_page(s, e);
    const uint8_t *payload;
    BaleRecord r;
    int ret = bale_limit_read(s, CATALOGUE_EFFORT * e->payload_len);

    if (ret < 0) {
        return ret;
    }
    if (bale_scan_record(scan, page, e->address - page_address(s, page),
                         e->payload_len + BALE_RECORD_HEADER_LEN, &r,
                         &payload) == 0 &&
        bale_catalogue_decode(cat, r.type, s->cluster_size, payload,
                              r.payload_len) == 0) {
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
 * Make the layers of the newest catalogue (or of what a checkpoint has loaded
 * those), each as large as it ever was, by itself or by what was merged into
 * it: what older records say is applied before the image became smaller.  Not
 * catalogue by catalogue: those between the first and the newest may be gone,
 * and records count that only they would have had a place for.
 *
 * What is stale in a child still hides its parent, when they are merged here:
 * something of the child was there, and what became of it is in the tail.
 */
static int apply_make_layers(Scan *scan, const ScanOrder *order, guint n)
{
    BaleStore *s = scan->s;
    g_autoptr(GArray) seen = g_array_new(FALSE, FALSE,
                                         sizeof(BaleLayerEntry));
    BaleCatalogue *newest = NULL;
    int ret = 0;

    for (guint i = 0; i < n; i++) {
        const ScanEntry *e = order[i].entry;
        BaleCatalogue *cat;

        if (apply_is_old(scan, e) ||
            (e->type != BALE_RECORD_IMAGE &&
             e->type != BALE_RECORD_CATALOGUE)) {
            continue;
        }
        ret = scan_catalogue(scan, e, &cat);
        if (ret == 0) {
            g_array_append_vals(seen, cat->layers->data, cat->layers->len);
            bale_catalogue_free(newest);
            newest = cat;
            s->catalogue_address = e->address;
        } else if (ret != -ENOENT) {
            bale_catalogue_free(newest);
            return ret;
        }
    }
    if (!newest) {
        return 0;
    }
    if (scan->from) {
        scan->catalogue = bale_catalogue_copy(s->catalogue);
        g_array_append_vals(seen, s->catalogue->layers->data,
                            s->catalogue->layers->len);
    }
    ret = bale_limit_layers(s, newest);
    if (ret < 0) {
        bale_catalogue_free(newest);
        return ret;
    }
    ret = bale_catalogue_install(s, newest);
    for (guint i = 0; ret == 0 && i < seen->len; i++) {
        BaleLayerEntry *e = &g_array_index(seen, BaleLayerEntry, i);
        uint64_t clusters;
        uint32_t id = bale_catalogue_resolve(s->catalogue, e->id, &clusters);
        BaleLayer *layer = id ? bale_layer_get(s, id) : NULL;

        if (layer && e->size > layer->size) {
            ret = bale_limit_layer(s, e->size);
            ret = ret == 0 ? bale_layer_reserve(layer, e->size) : ret;
            layer->size = e->size;
        }
    }
    return ret;
}

/* What a newer record says of clusters hides their patches. */
static void apply_hide_patches(BaleLayer *layer, uint64_t first,
                               uint64_t count)
{
    if (layer->patches && !BALE_PLANTED(patch_unhidden)) {
        bale_patch_forget(layer->patches, first, count, false);
    }
}

/* A catalogue with a smaller size hides what older records say past that. */
static void apply_tombstone(Scan *scan, const ScanEntry *e)
{
    BalePage *p = bale_page(scan->s, apply_page(scan->s, e));

    p->tombstone_seq = MAX(p->tombstone_seq, e->seq);
}

/*
 * Drop what lies behind the sizes that @cat gives.  Of layers that are one now
 * the youngest that it lists counts: the others did not change any more.
 */
static void apply_sizes(Scan *scan, const BaleCatalogue *cat)
{
    BaleStore *s = scan->s;
    g_autoptr(GHashTable) done = g_hash_table_new(NULL, NULL);

    for (guint i = cat->layers->len; i-- > 0;) {
        BaleLayerEntry *e = &g_array_index(cat->layers, BaleLayerEntry, i);
        uint64_t clusters;
        uint32_t id = bale_catalogue_resolve(s->catalogue, e->id, &clusters);

        if (id && g_hash_table_add(done, GUINT_TO_POINTER(id))) {
            BaleLayer *layer = bale_layer_get(s, id);
            uint64_t end = bale_size_clusters(e->size, s->cluster_size);

            bale_layer_clear_from(layer, end);
            apply_hide_patches(layer, end, UINT64_MAX - end);
        }
    }
}

static int apply_catalogue(Scan *scan, const ScanEntry *e)
{
    BaleCatalogue *cat, *last = scan->catalogue;
    int ret = scan_catalogue(scan, e, &cat);

    if (ret < 0) {
        return ret == -ENOENT ? 0 : ret;
    }
    for (guint i = 0; last && i < cat->layers->len; i++) {
        BaleLayerEntry *now = &g_array_index(cat->layers, BaleLayerEntry, i);
        BaleLayerEntry *then = bale_catalogue_layer(last, now->id);

        if (then && now->size < then->size) {
            apply_tombstone(scan, e);
        } else if (then && now->size > then->size && scan->catalogue_entry) {
            /* What was larger before that may be gone by now. */
            apply_tombstone(scan, scan->catalogue_entry);
        }
    }
    apply_sizes(scan, cat);
    bale_catalogue_free(last);
    scan->catalogue = cat;
    scan->catalogue_entry = e;
    return 0;
}

/*
 * Clusters of which neither checkpoint nor tail says anything that is still
 * there: a page is given up only when nothing in it counts any more.
 */
static int apply_drop_stale(Scan *scan)
{
    GArray *stale = scan->from ? scan->from->stale : NULL;
    int ret = 0;

    for (guint i = 0; stale && ret == 0 && i < stale->len; i++) {
        StaleCluster *c = &g_array_index(stale, StaleCluster, i);
        uint64_t clusters;
        BaleLayer *layer = bale_layer_of_record(scan->s, c->layer, &clusters);

        if (layer && c->cluster < clusters &&
            bale_layer_find(layer, c->cluster) == VALUE_STALE) {
            ret = bale_layer_index_set(layer, c->cluster, 0, NULL);
        }
    }
    if (stale && ret == 0) {
        g_array_set_size(stale, 0);
    }
    return ret;
}

static int apply_range(Scan *scan, BaleLayer *layer, uint64_t clusters,
                       const ScanEntry *e)
{
    BaleStore *s = scan->s;
    uint64_t value = e->type == BALE_RECORD_ZERO ? bale_value(e->address, 0)
                                                 : 0;
    uint64_t end = e->cluster + e->count;
    int ret = 0;

    if (e->cluster >= clusters) {
        return 0;
    }
    if (e->type == BALE_RECORD_DROP && apply_is_old(scan, e)) {
        return 0; /* the checkpoint knows */
    }
    if (e->type == BALE_RECORD_DROP && e->count == 0) {
        bale_layer_clear_from(layer, e->cluster);
        return 0;
    }
    for (uint64_t c = e->cluster; ret == 0 && c < MIN(end, clusters); c++) {
        ret = bale_limit_cluster(s);
        if (ret == 0 && apply_wanted(scan, layer, e, c)) {
            ret = bale_layer_index_set(layer, c, value, NULL);
        }
    }
    return ret;
}

static void apply_patch(BaleStore *s, BaleLayer *layer, const ScanEntry *e)
{
    BalePatch patch = { e->address, e->seq, e->count, e->payload_len,
                        e->bare };

    if (BALE_PLANTED(patch_dropped)) {
        return;
    }
    if (!layer->patches) {
        layer->patches = bale_patch_table_new(s);
    }
    bale_patch_recover(layer->patches, e->cluster, &patch);
}

/* Records of one layer mostly follow each other. */
static BaleLayer *apply_layer(Scan *scan, const ScanEntry *e,
                              uint64_t *clusters)
{
    if (!scan->layer_known || scan->layer_id != e->layer) {
        scan->layer = bale_layer_of_record(scan->s, e->layer,
                                           &scan->layer_clusters);
        scan->layer_id = e->layer;
        scan->layer_known = true;
    }
    *clusters = scan->layer_clusters;
    return scan->layer;
}

static int apply_entry(Scan *scan, const ScanEntry *e)
{
    BaleStore *s = scan->s;
    uint64_t clusters;
    BaleLayer *layer = apply_layer(scan, e, &clusters);
    BalePage *p = bale_page(s, apply_page(s, e));
    int ret;

    s->next_seq = MAX(s->next_seq, e->seq + 1);
    p->first_seq = MIN(p->first_seq, e->seq);
    switch (e->type) {
    case BALE_RECORD_CHECKPOINT_PART:
    case BALE_RECORD_CHECKPOINT_ROOT:
        p->bucket = BALE_BUCKET_META; /* its header may be damaged */
        return 0;
    case BALE_RECORD_IMAGE:
    case BALE_RECORD_CATALOGUE:
        p->bucket = BALE_BUCKET_META;
        return apply_is_old(scan, e) ? 0 : apply_catalogue(scan, e);
    case BALE_RECORD_DATA:
        if (!layer || e->cluster >= clusters) {
            return 0;
        }
        s->recovered_records++;
        ret = bale_limit_cluster(s);
        if (ret < 0 || !apply_wanted(scan, layer, e, e->cluster)) {
            return ret;
        }
        apply_hide_patches(layer, e->cluster, 1);
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
        apply_hide_patches(layer, e->cluster,
                           e->type == BALE_RECORD_DROP && e->count == 0
                               ? UINT64_MAX
                               : e->count);
        return apply_range(scan, layer, clusters, e);
    case BALE_RECORD_PATCH:
        if (!layer || e->cluster >= clusters || apply_is_old(scan, e)) {
            return 0; /* or hidden by what the checkpoint knows */
        }
        s->recovered_records++;
        apply_patch(s, layer, e);
        return 0;
    default:
        return 0;
    }
}

/* @e is applied soon. */
static void apply_fetch(Scan *scan, const ScanEntry *e)
{
    if (e->type == BALE_RECORD_DATA && scan->layer &&
        scan->layer_id == e->layer && e->cluster < scan->layer_clusters) {
        bale_index_prefetch(scan->layer->index, e->cluster);
    }
}

static int apply_entries(Scan *scan, const ScanOrder *order, guint n)
{
    int ret = 0;

    for (guint i = 0; ret == 0 && i < n; i++) {
        if (n - i > 2 * FETCH_AHEAD) {
            __builtin_prefetch(order[i + 2 * FETCH_AHEAD].entry);
            apply_fetch(scan, order[i + FETCH_AHEAD].entry);
        }
        ret = apply_entry(scan, order[i].entry);
    }
    return ret;
}

static void apply_count_live(uint64_t value, void *opaque)
{
    BaleStore *s = opaque;

    bale_page_live_add(s, bale_value_address(value),
                       bale_value_live(value, s->cluster_size));
}

/* The patches of @layer that are left go to the mutable region of its image. */
static int apply_patches_left(BaleStore *s, BaleLayer *layer)
{
    uint64_t end = bale_size_clusters(layer->size, s->cluster_size);
    BaleImageEntry *top = NULL;
    BaleImage *image;
    int ret = 0;

    if (!layer->patches) {
        return 0;
    }
    apply_hide_patches(layer, end, UINT64_MAX - end);
    for (guint i = 0; i < s->catalogue->images->len && !top; i++) {
        BaleImageEntry *e = &g_array_index(s->catalogue->images,
                                           BaleImageEntry, i);

        top = e->layer == layer->id ? e : NULL;
    }
    if (top) {
        ret = bale_limit_patched(s,
                                 g_hash_table_size(layer->patches->clusters));
        image = ret == 0 ? bale_image_new(s, layer, NULL) : NULL;
        if (!image) {
            return -ENOMEM;
        }
        image->id = top->id;
        bale_image_follow(image, s->catalogue);
        g_ptr_array_add(s->images, image);
        ret = bale_mutable_recover_load(image->mutable_region,
                                        layer->patches);
        if (ret == -EFBIG) {
            bale_recover_report(s, "more patches than a store may have");
        }
    } else {
        /* Nobody may have written to this layer: that reads as an error. */
        ret = bale_patch_table_spoil(layer->patches, layer);
    }
    bale_patch_table_free(layer->patches);
    layer->patches = NULL;
    return ret;
}

/* What was found in the pages becomes the page table. */
static int apply_pages(Scan *scan)
{
    BaleStore *s = scan->s;
    int ret = bale_page_table_grow(s, scan->pages);

    for (uint64_t i = 0; ret == 0 && i < scan->pages; i++) {
        ScanPage *sp = &scan->page[i];
        BalePage *p = bale_page(s, i);

        if (!sp->kept) {
            memset(p, 0, sizeof(*p));
        }
        if (!sp->used) {
            continue;
        }
        p->state = BALE_PAGE_SEALED;
        p->version = sp->header.version;
        p->end = sp->end;
        p->proven = sp->proven;
        p->allocated = s->page_size;
        if (!sp->kept) {
            p->bucket = sp->header.bucket;
            p->first_seq = sp->header.first_seq;
        }
    }
    return ret;
}

int bale_scan_apply(Scan *scan)
{
    BaleStore *s = scan->s;
    g_autofree ScanOrder *order = NULL;
    GHashTableIter iter;
    void *value;
    int ret = apply_pages(scan);
    guint n;

    if (ret == 0) {
        order = bale_scan_order(scan, &n);
        ret = order ? apply_make_layers(scan, order, n) : -ENOMEM;
    }
    if (ret < 0 || !s->catalogue_address) {
        return ret;
    }
    ret = apply_entries(scan, order, n);
    if (ret == 0) {
        ret = apply_drop_stale(scan);
    }
    bale_catalogue_free(scan->catalogue);
    scan->catalogue = NULL;
    if (ret < 0) {
        return ret;
    }
    g_hash_table_iter_init(&iter, s->layers);
    while (g_hash_table_iter_next(&iter, NULL, &value)) {
        BaleLayer *layer = value;

        layer->size = bale_catalogue_layer(s->catalogue, layer->id)->size;
        ret = apply_patches_left(s, layer);
        if (ret < 0) {
            return ret;
        }
        bale_index_foreach_value(layer->index, apply_count_live, s);
    }
    bale_page_live_add(s, s->catalogue_address, BALE_RECORD_HEADER_LEN);
    return 0;
}
