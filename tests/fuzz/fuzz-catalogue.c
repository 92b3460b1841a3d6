/*
 * libFuzzer target: catalogues.
 *
 * An input whose first byte is odd is the payload of a catalogue or image
 * record: what the decoder accepts must keep the rules of docs/format.md, and
 * be the same after it was encoded and decoded again.  Other inputs edit the
 * catalogues of whole stores (see stores.c).
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <glib.h>
#include <stdlib.h>
#include <string.h>

#include "../../block/extstore/store-internal.h"
#include "extstore/bitmap.h"
#include "stores.h"

#define CLUSTER_SIZE 4096u

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerInitialize(int *argc, char ***argv);

static void require(bool condition)
{
    if (!condition) {
        abort();
    }
}

static void check_layers(const BaleCatalogue *cat)
{
    for (guint i = 0; i < cat->layers->len; i++) {
        BaleLayerEntry *e = &g_array_index(cat->layers, BaleLayerEntry, i);
        unsigned depth = 1;

        require(e->id && e->size <= BALE_IMAGE_SIZE_MAX);
        for (BaleLayerEntry *p = e; p->parent; depth++) {
            BaleLayerEntry *parent = bale_catalogue_layer(cat, p->parent);

            require(parent && parent->id < p->id &&
                    parent->generation < p->generation);
            p = parent;
        }
        require(depth == e->depth && depth <= BALE_LAYER_DEPTH_MAX);
    }
    for (guint i = 0; i < cat->aliases->len; i++) {
        BaleAliasEntry *e = &g_array_index(cat->aliases, BaleAliasEntry, i);
        uint64_t clusters;

        require(bale_catalogue_resolve(cat, e->id, &clusters) == e->layer &&
                clusters == e->clusters);
    }
}

static void check_names(const BaleCatalogue *cat)
{
    for (guint i = 0; i < cat->images->len; i++) {
        BaleImageEntry *e = &g_array_index(cat->images, BaleImageEntry, i);

        require(bale_catalogue_layer(cat, e->layer));
        require(bale_catalogue_image_named(cat, e->name) == e);
        require(!e->name[0] || bale_name_valid(e->name));
        require(strlen(e->backing_file) <= BALE_BACKING_NAME_MAX);
    }
    for (guint i = 0; i < cat->snapshots->len; i++) {
        BaleSnapshotEntry *e = &g_array_index(cat->snapshots,
                                              BaleSnapshotEntry, i);

        require(bale_catalogue_layer(cat, e->layer) &&
                bale_catalogue_image(cat, e->image));
        require(bale_catalogue_snapshot(cat, e->image, e->name) == e);
    }
    for (guint i = 0; i < cat->bitmaps->len; i++) {
        BaleBitmapEntry *e = &g_array_index(cat->bitmaps, BaleBitmapEntry,
                                            i);
        BaleLayerEntry *layer = bale_catalogue_layer(cat, e->layer);

        require(layer && !layer->parent &&
                layer->size >= bale_bitmap_data_len(e->size,
                                                    e->granularity) &&
                layer->size < BALE_BITMAP_DATA_MAX + CLUSTER_SIZE);
        require(bale_catalogue_image(cat, e->image) &&
                bale_catalogue_bitmap(cat, e->image, e->name) == e);
    }
}

static void fuzz_payload(const uint8_t *data, size_t size)
{
    g_autoptr(BaleCatalogue) cat = NULL, again = NULL, copy = NULL;
    g_autofree uint8_t *payload = NULL;
    uint8_t type = data[0] & 2 ? BALE_RECORD_CATALOGUE : BALE_RECORD_IMAGE;
    uint32_t len;

    if (bale_catalogue_decode(&cat, type, CLUSTER_SIZE, data + 1,
                              size - 1) < 0) {
        return;
    }
    check_layers(cat);
    check_names(cat);
    copy = bale_catalogue_copy(cat);
    payload = bale_catalogue_encode(copy, &type, &len);
    require(payload && bale_catalogue_decode(&again, type, CLUSTER_SIZE,
                                             payload, len) == 0);
    require(again->layers->len == cat->layers->len &&
            again->aliases->len == cat->aliases->len &&
            again->snapshots->len == cat->snapshots->len &&
            again->images->len == cat->images->len);
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    stores_init();
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size > 0 && data[0] % 2) {
        fuzz_payload(data, size);
    } else if (size > 0) {
        stores_fuzz(data + 1, size - 1, AIM_CATALOGUE);
    }
    return 0;
}
