/*
 * The catalogue: which images, layers, snapshots and bitmaps a store holds, and
 * its record.  docs/format.md, "Catalogue record", is the specification.
 *
 * A catalogue is one record, so that each change of it is atomic.  What is
 * decoded is hostile: every rule that the engine relies on, above all that a
 * walk from a layer to its parents ends, is checked here and nowhere else.
 *
 * Threads: pure functions.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "format.h"

#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "extstore/bitmap.h"
#include "util/planted.h"

/* Byte offsets of the fields. */
enum {
    CATALOGUE_LAYERS = 0,
    CATALOGUE_ALIASES = 4,
    CATALOGUE_SNAPSHOTS = 8,
    CATALOGUE_IMAGES = 12,
    CATALOGUE_NEXT_LAYER = 16,
    CATALOGUE_NEXT_IMAGE = 20,
    CATALOGUE_NEXT_SNAPSHOT = 24,
    CATALOGUE_BITMAPS = 28,

    LAYER_ID = 0,
    LAYER_PARENT = 4,
    LAYER_GENERATION = 8,
    LAYER_SIZE = 16,
    LAYER_PARENT_CLUSTERS = 24,

    ALIAS_ID = 0,
    ALIAS_LAYER = 4,
    ALIAS_CLUSTERS = 8,

    SNAPSHOT_IMAGE = 0,
    SNAPSHOT_ID = 4,
    SNAPSHOT_LAYER = 8,
    SNAPSHOT_NAME_LEN = 12,
    SNAPSHOT_DATE_S = 16,
    SNAPSHOT_DATE_NS = 24,
    SNAPSHOT_VM_CLOCK = 32,

    IMAGE_ID = 0,
    IMAGE_LAYER = 4,
    IMAGE_FLAGS = 8,
    IMAGE_CODEC = 12,
    IMAGE_LEVEL = 13,
    IMAGE_NAME_LEN = 14,
    IMAGE_BACKING_LEN = 16,
    IMAGE_FORMAT_LEN = 18,
    IMAGE_DATE_S = 24,

    BITMAP_LAYER = 0,
    BITMAP_IMAGE = 4,
    BITMAP_FLAGS = 8,
    BITMAP_GRANULARITY_BITS = 12,
    BITMAP_NAME_LEN = 14,
    BITMAP_SIZE = 16,
};

#define IMAGE_FLAG_READ_ONLY 1u

#define BITMAP_FLAG_IN_USE  1u
#define BITMAP_FLAG_ENABLED 2u

G_STATIC_ASSERT(LAYER_PARENT_CLUSTERS + 8 == BALE_CATALOGUE_LAYER_LEN);
G_STATIC_ASSERT(ALIAS_CLUSTERS + 8 == BALE_CATALOGUE_ALIAS_LEN);
G_STATIC_ASSERT(SNAPSHOT_VM_CLOCK + 8 == BALE_CATALOGUE_SNAPSHOT_LEN);
G_STATIC_ASSERT(IMAGE_DATE_S + 8 == BALE_CATALOGUE_IMAGE_LEN);
G_STATIC_ASSERT(BITMAP_SIZE + 16 == BALE_CATALOGUE_BITMAP_LEN);

static uint16_t get16(const uint8_t *p)
{
    return p[0] | p[1] << 8;
}

static uint32_t get32(const uint8_t *p)
{
    return get16(p) | (uint32_t)get16(p + 2) << 16;
}

static void put16(uint8_t *p, uint16_t v)
{
    p[0] = v;
    p[1] = v >> 8;
}

static void put32(uint8_t *p, uint32_t v)
{
    put16(p, v);
    put16(p + 2, v >> 16);
}

/* --- making, copying, freeing --- */

static void snapshot_clear(void *entry)
{
    g_free(((BaleSnapshotEntry *)entry)->name);
}

static void image_clear(void *entry)
{
    BaleImageEntry *image = entry;

    g_free(image->name);
    g_free(image->backing_file);
    g_free(image->backing_format);
}

static void bitmap_clear(void *entry)
{
    g_free(((BaleBitmapEntry *)entry)->name);
}

BaleCatalogue *bale_catalogue_new(void)
{
    BaleCatalogue *cat = g_new0(BaleCatalogue, 1);

    cat->next_layer = cat->next_image = cat->next_snapshot = 1;
    cat->layers = g_array_new(FALSE, TRUE, sizeof(BaleLayerEntry));
    cat->aliases = g_array_new(FALSE, TRUE, sizeof(BaleAliasEntry));
    cat->snapshots = g_array_new(FALSE, TRUE, sizeof(BaleSnapshotEntry));
    cat->images = g_array_new(FALSE, TRUE, sizeof(BaleImageEntry));
    g_array_set_clear_func(cat->snapshots, snapshot_clear);
    cat->bitmaps = g_array_new(FALSE, TRUE, sizeof(BaleBitmapEntry));
    g_array_set_clear_func(cat->images, image_clear);
    g_array_set_clear_func(cat->bitmaps, bitmap_clear);
    return cat;
}

void bale_catalogue_free(BaleCatalogue *cat)
{
    if (cat) {
        g_array_free(cat->layers, TRUE);
        g_array_free(cat->aliases, TRUE);
        g_array_free(cat->snapshots, TRUE);
        g_array_free(cat->images, TRUE);
        g_array_free(cat->bitmaps, TRUE);
        g_free(cat);
    }
}

BaleCatalogue *bale_catalogue_copy(const BaleCatalogue *cat)
{
    BaleCatalogue *copy = bale_catalogue_new();

    copy->next_layer = cat->next_layer;
    copy->next_image = cat->next_image;
    copy->next_snapshot = cat->next_snapshot;
    g_array_append_vals(copy->layers, cat->layers->data, cat->layers->len);
    g_array_append_vals(copy->aliases, cat->aliases->data,
                        cat->aliases->len);
    for (guint i = 0; i < cat->snapshots->len; i++) {
        BaleSnapshotEntry e =
            g_array_index(cat->snapshots, BaleSnapshotEntry, i);

        e.name = g_strdup(e.name);
        g_array_append_val(copy->snapshots, e);
    }
    for (guint i = 0; i < cat->images->len; i++) {
        BaleImageEntry e = g_array_index(cat->images, BaleImageEntry, i);

        e.name = g_strdup(e.name);
        e.backing_file = g_strdup(e.backing_file);
        e.backing_format = g_strdup(e.backing_format);
        g_array_append_val(copy->images, e);
    }
    for (guint i = 0; i < cat->bitmaps->len; i++) {
        BaleBitmapEntry e = g_array_index(cat->bitmaps, BaleBitmapEntry, i);

        e.name = g_strdup(e.name);
        g_array_append_val(copy->bitmaps, e);
    }
    return copy;
}

/* --- finding --- */

/* The entry with @id of an array by rising ids, which begin each entry. */
static void *find_id(const GArray *array, size_t id_at, uint32_t id)
{
    size_t size = g_array_get_element_size((GArray *)array);
    guint low = 0, high = array->len;

    while (low < high) {
        guint middle = low + (high - low) / 2;
        char *entry = array->data + middle * size;
        uint32_t found;

        memcpy(&found, entry + id_at, sizeof(found));
        if (found == id) {
            return entry;
        }
        if (found < id) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return NULL;
}

BaleLayerEntry *bale_catalogue_layer(const BaleCatalogue *cat, uint32_t id)
{
    return find_id(cat->layers, offsetof(BaleLayerEntry, id), id);
}

BaleImageEntry *bale_catalogue_image(const BaleCatalogue *cat, uint32_t id)
{
    return find_id(cat->images, offsetof(BaleImageEntry, id), id);
}

BaleImageEntry *bale_catalogue_image_named(const BaleCatalogue *cat,
                                           const char *name)
{
    for (guint i = 0; i < cat->images->len; i++) {
        BaleImageEntry *e = &g_array_index(cat->images, BaleImageEntry, i);

        if (!strcmp(e->name, name)) {
            return e;
        }
    }
    return NULL;
}

BaleSnapshotEntry *bale_catalogue_snapshot(const BaleCatalogue *cat,
                                           uint32_t image, const char *name)
{
    guint64 id;

    for (guint i = 0; i < cat->snapshots->len; i++) {
        BaleSnapshotEntry *e =
            &g_array_index(cat->snapshots, BaleSnapshotEntry, i);

        if (e->image == image && !strcmp(e->name, name)) {
            return e;
        }
    }
    if (g_ascii_string_to_unsigned(name, 10, 1, UINT32_MAX, &id, NULL)) {
        BaleSnapshotEntry *e = find_id(
            cat->snapshots, offsetof(BaleSnapshotEntry, id), id);

        return e && e->image == image ? e : NULL;
    }
    return NULL;
}

BaleBitmapEntry *bale_catalogue_bitmap(const BaleCatalogue *cat,
                                       uint32_t image, const char *name)
{
    for (guint i = 0; i < cat->bitmaps->len; i++) {
        BaleBitmapEntry *e = &g_array_index(cat->bitmaps, BaleBitmapEntry,
                                            i);

        if (e->image == image && !strcmp(e->name, name)) {
            return e;
        }
    }
    return NULL;
}

uint32_t bale_catalogue_resolve(const BaleCatalogue *cat, uint32_t id,
                                uint64_t *clusters)
{
    BaleAliasEntry *alias;

    *clusters = UINT64_MAX;
    if (bale_catalogue_layer(cat, id)) {
        return id;
    }
    alias = find_id(cat->aliases, offsetof(BaleAliasEntry, id), id);
    if (!alias) {
        return 0;
    }
    *clusters = alias->clusters;
    return alias->layer;
}

bool bale_name_valid(const char *name)
{
    size_t len = strlen(name);

    for (const char *p = name; *p; p++) {
        if ((unsigned char)*p < ' ' || *p == 0x7f || *p == '@') {
            return false;
        }
    }
    return len > 0 && len <= BALE_IMAGE_NAME_MAX &&
           g_utf8_validate(name, len, NULL);
}

bool bale_bitmap_name_valid(const char *name)
{
    size_t len = strlen(name);

    return len > 0 && len <= BALE_BITMAP_NAME_MAX &&
           g_utf8_validate(name, len, NULL);
}

/* --- encoding --- */

/* Was there ever anything but the unnamed image? */
static bool catalogue_plain(const BaleCatalogue *cat)
{
    BaleImageEntry *image = bale_catalogue_image(cat, 1);
    BaleLayerEntry *layer = bale_catalogue_layer(cat, 1);

    return cat->next_layer == 2 && cat->next_image == 2 &&
           cat->next_snapshot == 1 && image && layer && !image->name[0] &&
           !image->read_only && !image->date_s;
}

static uint8_t *encode_plain(const BaleCatalogue *cat, uint32_t *len)
{
    BaleImageEntry *image = bale_catalogue_image(cat, 1);
    uint8_t *buf = g_malloc(BALE_IMAGE_PAYLOAD_MAX);
    BaleImageRecord record = {
        .id = 1,
        .layer = 1,
        .size = bale_catalogue_layer(cat, 1)->size,
        .codec = image->codec,
        .level = image->level,
    };

    g_strlcpy(record.backing_file, image->backing_file,
              sizeof(record.backing_file));
    g_strlcpy(record.backing_format, image->backing_format,
              sizeof(record.backing_format));
    *len = bale_image_encode(&record, buf);
    return buf;
}

static size_t put_string(uint8_t *p, const char *s)
{
    size_t len = strlen(s);

    memcpy(p, s, len);
    return len;
}

static size_t encoded_len(const BaleCatalogue *cat)
{
    size_t len = BALE_CATALOGUE_FIXED_LEN +
                 (size_t)cat->layers->len * BALE_CATALOGUE_LAYER_LEN +
                 (size_t)cat->aliases->len * BALE_CATALOGUE_ALIAS_LEN;

    for (guint i = 0; i < cat->snapshots->len; i++) {
        len += BALE_CATALOGUE_SNAPSHOT_LEN +
               strlen(g_array_index(cat->snapshots, BaleSnapshotEntry, i)
                          .name);
    }
    for (guint i = 0; i < cat->images->len; i++) {
        BaleImageEntry *e = &g_array_index(cat->images, BaleImageEntry, i);

        len += BALE_CATALOGUE_IMAGE_LEN + strlen(e->name) +
               strlen(e->backing_file) + strlen(e->backing_format);
    }
    for (guint i = 0; i < cat->bitmaps->len; i++) {
        len += BALE_CATALOGUE_BITMAP_LEN +
               strlen(g_array_index(cat->bitmaps, BaleBitmapEntry, i).name);
    }
    return len;
}

static uint8_t *encode_snapshot(const BaleSnapshotEntry *e, uint8_t *p)
{
    put32(p + SNAPSHOT_IMAGE, e->image);
    put32(p + SNAPSHOT_ID, e->id);
    put32(p + SNAPSHOT_LAYER, e->layer);
    put16(p + SNAPSHOT_NAME_LEN, strlen(e->name));
    bale_put_le64(p + SNAPSHOT_DATE_S, e->date_s);
    put32(p + SNAPSHOT_DATE_NS, e->date_ns);
    bale_put_le64(p + SNAPSHOT_VM_CLOCK, e->vm_clock_ns);
    p += BALE_CATALOGUE_SNAPSHOT_LEN;
    return p + put_string(p, e->name);
}

static uint8_t *encode_image(const BaleImageEntry *e, uint8_t *p)
{
    put32(p + IMAGE_ID, e->id);
    put32(p + IMAGE_LAYER, e->layer);
    put32(p + IMAGE_FLAGS, e->read_only ? IMAGE_FLAG_READ_ONLY : 0);
    p[IMAGE_CODEC] = e->codec;
    p[IMAGE_LEVEL] = (uint8_t)e->level;
    put16(p + IMAGE_NAME_LEN, strlen(e->name));
    put16(p + IMAGE_BACKING_LEN, strlen(e->backing_file));
    put16(p + IMAGE_FORMAT_LEN, strlen(e->backing_format));
    bale_put_le64(p + IMAGE_DATE_S, e->date_s);
    p += BALE_CATALOGUE_IMAGE_LEN;
    p += put_string(p, e->name);
    p += put_string(p, e->backing_file);
    return p + put_string(p, e->backing_format);
}

static uint8_t *encode_bitmap(const BaleBitmapEntry *e, uint8_t *p)
{
    put32(p + BITMAP_LAYER, e->layer);
    put32(p + BITMAP_IMAGE, e->image);
    put32(p + BITMAP_FLAGS, (e->in_use ? BITMAP_FLAG_IN_USE : 0) |
                                (e->enabled ? BITMAP_FLAG_ENABLED : 0));
    p[BITMAP_GRANULARITY_BITS] = g_bit_nth_lsf(e->granularity, -1);
    put16(p + BITMAP_NAME_LEN, strlen(e->name));
    bale_put_le64(p + BITMAP_SIZE, e->size);
    p += BALE_CATALOGUE_BITMAP_LEN;
    return p + put_string(p, e->name);
}

uint8_t *bale_catalogue_encode(const BaleCatalogue *cat, uint8_t *type,
                               uint32_t *len)
{
    size_t size = encoded_len(cat);
    uint8_t *buf, *p;

    if (catalogue_plain(cat)) {
        *type = BALE_RECORD_IMAGE;
        return encode_plain(cat, len);
    }
    if (size > BALE_CATALOGUE_PAYLOAD_MAX) {
        return NULL;
    }
    buf = g_malloc0(size);
    put32(buf + CATALOGUE_LAYERS, cat->layers->len);
    put32(buf + CATALOGUE_ALIASES, cat->aliases->len);
    put32(buf + CATALOGUE_SNAPSHOTS, cat->snapshots->len);
    put32(buf + CATALOGUE_IMAGES, cat->images->len);
    put32(buf + CATALOGUE_NEXT_LAYER, cat->next_layer);
    put32(buf + CATALOGUE_NEXT_IMAGE, cat->next_image);
    put32(buf + CATALOGUE_NEXT_SNAPSHOT, cat->next_snapshot);
    put32(buf + CATALOGUE_BITMAPS, cat->bitmaps->len);
    p = buf + BALE_CATALOGUE_FIXED_LEN;
    for (guint i = 0; i < cat->layers->len; i++) {
        BaleLayerEntry *e = &g_array_index(cat->layers, BaleLayerEntry, i);

        put32(p + LAYER_ID, e->id);
        put32(p + LAYER_PARENT, e->parent);
        put32(p + LAYER_GENERATION, e->generation);
        bale_put_le64(p + LAYER_SIZE, e->size);
        bale_put_le64(p + LAYER_PARENT_CLUSTERS, e->parent_clusters);
        p += BALE_CATALOGUE_LAYER_LEN;
    }
    for (guint i = 0; i < cat->aliases->len; i++) {
        BaleAliasEntry *e = &g_array_index(cat->aliases, BaleAliasEntry, i);

        put32(p + ALIAS_ID, e->id);
        put32(p + ALIAS_LAYER, e->layer);
        bale_put_le64(p + ALIAS_CLUSTERS, e->clusters);
        p += BALE_CATALOGUE_ALIAS_LEN;
    }
    for (guint i = 0; i < cat->snapshots->len; i++) {
        p = encode_snapshot(
            &g_array_index(cat->snapshots, BaleSnapshotEntry, i), p);
    }
    for (guint i = 0; i < cat->images->len; i++) {
        p = encode_image(&g_array_index(cat->images, BaleImageEntry, i), p);
    }
    for (guint i = 0; i < cat->bitmaps->len; i++) {
        p = encode_bitmap(&g_array_index(cat->bitmaps, BaleBitmapEntry, i),
                          p);
    }
    g_assert(p == buf + size);
    *type = BALE_RECORD_CATALOGUE;
    *len = size;
    return buf;
}

/* --- decoding --- */

typedef struct Decoder {
    const uint8_t *p, *end;
    uint32_t cluster_size;
    BaleCatalogue *cat;
} Decoder;

static const uint8_t *take(Decoder *d, size_t len)
{
    const uint8_t *p = d->p;

    if (len > (size_t)(d->end - d->p)) {
        return NULL;
    }
    d->p += len;
    return p;
}

/* A string of @len bytes at most @max long; NULL: not one. */
static char *take_string(Decoder *d, size_t len, size_t max)
{
    const char *p = (const char *)take(d, len);

    if (!p || len > max || memchr(p, 0, len) ||
        !g_utf8_validate(p, len, NULL)) {
        return NULL;
    }
    return g_strndup(p, len);
}

static uint64_t decoder_clusters(Decoder *d, uint64_t size)
{
    return size / d->cluster_size + !!(size % d->cluster_size);
}

/*
 * Is the parent of layer @e as it must be?  Parents come first, so their depth
 * is known: a walk to the parents ends, and after how many steps.
 */
static bool layer_parent_valid(Decoder *d, BaleLayerEntry *e)
{
    const BaleLayerEntry *parent;

    e->depth = 1;
    if (!e->parent) {
        return e->parent_clusters == 0;
    }
    parent = e->parent < e->id ? bale_catalogue_layer(d->cat, e->parent)
                               : NULL;
    if (!parent || (parent->generation >= e->generation &&
                    !BALE_PLANTED(generation_unchecked))) {
        return false;
    }
    e->depth += parent->depth;
    return e->depth <= BALE_LAYER_DEPTH_MAX &&
           e->parent_clusters <= decoder_clusters(d, parent->size) &&
           e->parent_clusters <= decoder_clusters(d, e->size);
}

static bool decode_layers(Decoder *d, uint32_t n)
{
    uint32_t last = 0;

    for (uint32_t i = 0; i < n; i++) {
        const uint8_t *p = take(d, BALE_CATALOGUE_LAYER_LEN);
        BaleLayerEntry e;

        if (!p) {
            return false;
        }
        e = (BaleLayerEntry){
            .id = get32(p + LAYER_ID),
            .parent = get32(p + LAYER_PARENT),
            .generation = get32(p + LAYER_GENERATION),
            .size = bale_get_le64(p + LAYER_SIZE),
            .parent_clusters = bale_get_le64(p + LAYER_PARENT_CLUSTERS),
        };
        if (e.id <= last || e.id >= d->cat->next_layer ||
            e.generation == 0 || e.size > BALE_IMAGE_SIZE_MAX ||
            e.size / d->cluster_size >= BALE_IMAGE_CLUSTERS_MAX) {
            return false;
        }
        last = e.id;
        g_array_append_val(d->cat->layers, e);
    }
    for (guint i = 0; i < d->cat->layers->len; i++) {
        if (!layer_parent_valid(d, &g_array_index(d->cat->layers,
                                                  BaleLayerEntry, i))) {
            return false;
        }
    }
    return true;
}

static bool decode_aliases(Decoder *d, uint32_t n)
{
    uint32_t last = 0;

    for (uint32_t i = 0; i < n; i++) {
        const uint8_t *p = take(d, BALE_CATALOGUE_ALIAS_LEN);
        BaleLayerEntry *layer;
        BaleAliasEntry e;

        if (!p) {
            return false;
        }
        e = (BaleAliasEntry){
            .id = get32(p + ALIAS_ID),
            .layer = get32(p + ALIAS_LAYER),
            .clusters = bale_get_le64(p + ALIAS_CLUSTERS),
        };
        layer = bale_catalogue_layer(d->cat, e.layer);
        if (e.id <= last || !layer || e.id >= e.layer ||
            bale_catalogue_layer(d->cat, e.id) ||
            e.clusters > decoder_clusters(d, layer->size)) {
            return false;
        }
        last = e.id;
        g_array_append_val(d->cat->aliases, e);
    }
    return true;
}

static bool decode_snapshots(Decoder *d, uint32_t n)
{
    uint32_t last = 0;

    for (uint32_t i = 0; i < n; i++) {
        const uint8_t *p = take(d, BALE_CATALOGUE_SNAPSHOT_LEN);
        BaleSnapshotEntry e;

        if (!p) {
            return false;
        }
        e = (BaleSnapshotEntry){
            .image = get32(p + SNAPSHOT_IMAGE),
            .id = get32(p + SNAPSHOT_ID),
            .layer = get32(p + SNAPSHOT_LAYER),
            .date_s = bale_get_le64(p + SNAPSHOT_DATE_S),
            .date_ns = get32(p + SNAPSHOT_DATE_NS),
            .vm_clock_ns = bale_get_le64(p + SNAPSHOT_VM_CLOCK),
            .name = take_string(d, get16(p + SNAPSHOT_NAME_LEN),
                                BALE_IMAGE_NAME_MAX),
        };
        if (!e.name) {
            return false;
        }
        g_array_append_val(d->cat->snapshots, e);
        if (e.id <= last || e.id >= d->cat->next_snapshot ||
            !bale_name_valid(e.name) ||
            !bale_catalogue_layer(d->cat, e.layer)) {
            return false;
        }
        last = e.id;
    }
    return true;
}

static bool decode_images(Decoder *d, uint32_t n)
{
    uint32_t last = 0;

    for (uint32_t i = 0; i < n; i++) {
        const uint8_t *p = take(d, BALE_CATALOGUE_IMAGE_LEN);
        BaleImageEntry e;

        if (!p) {
            return false;
        }
        e = (BaleImageEntry){
            .id = get32(p + IMAGE_ID),
            .layer = get32(p + IMAGE_LAYER),
            .read_only = get32(p + IMAGE_FLAGS) & IMAGE_FLAG_READ_ONLY,
            .codec = p[IMAGE_CODEC],
            .level = (int8_t)p[IMAGE_LEVEL],
            .date_s = bale_get_le64(p + IMAGE_DATE_S),
            .name = take_string(d, get16(p + IMAGE_NAME_LEN),
                                BALE_IMAGE_NAME_MAX),
            .backing_file = take_string(d, get16(p + IMAGE_BACKING_LEN),
                                        BALE_BACKING_NAME_MAX),
            .backing_format = take_string(d, get16(p + IMAGE_FORMAT_LEN),
                                          63),
        };
        g_array_append_val(d->cat->images, e);
        if (!e.name || !e.backing_file || !e.backing_format || e.id <= last ||
            e.id >= d->cat->next_image ||
            (e.name[0] && !bale_name_valid(e.name)) ||
            !bale_catalogue_layer(d->cat, e.layer) ||
            !bale_codec_valid(e.codec) ||
            !bale_codec_check_level(e.codec, e.level, NULL)) {
            return false;
        }
        last = e.id;
    }
    return true;
}

/* Is there a layer for the bits of @e, which is that long and alone? */
static bool bitmap_layer_valid(Decoder *d, const BaleBitmapEntry *e)
{
    const BaleLayerEntry *layer = bale_catalogue_layer(d->cat, e->layer);
    uint64_t len = bale_bitmap_data_len(e->size, e->granularity);

    return layer && !layer->parent && len <= BALE_BITMAP_DATA_MAX &&
           layer->size == decoder_clusters(d, len) * d->cluster_size;
}

static bool decode_bitmaps(Decoder *d, uint32_t n)
{
    uint32_t last = 0;

    for (uint32_t i = 0; i < n; i++) {
        const uint8_t *p = take(d, BALE_CATALOGUE_BITMAP_LEN);
        BaleBitmapEntry e;

        if (!p || p[BITMAP_GRANULARITY_BITS] < BALE_BITMAP_GRANULARITY_MIN_BITS
            || p[BITMAP_GRANULARITY_BITS] > BALE_BITMAP_GRANULARITY_MAX_BITS) {
            return false;
        }
        e = (BaleBitmapEntry){
            .layer = get32(p + BITMAP_LAYER),
            .image = get32(p + BITMAP_IMAGE),
            .in_use = get32(p + BITMAP_FLAGS) & BITMAP_FLAG_IN_USE,
            .enabled = get32(p + BITMAP_FLAGS) & BITMAP_FLAG_ENABLED,
            .granularity = UINT32_C(1) << p[BITMAP_GRANULARITY_BITS],
            .size = bale_get_le64(p + BITMAP_SIZE),
            .name = take_string(d, get16(p + BITMAP_NAME_LEN),
                                BALE_BITMAP_NAME_MAX),
        };
        if (!e.name) {
            return false;
        }
        g_array_append_val(d->cat->bitmaps, e);
        if (e.layer <= last || !bale_bitmap_name_valid(e.name) ||
            e.size > BALE_IMAGE_SIZE_MAX || !bitmap_layer_valid(d, &e)) {
            return false;
        }
        last = e.layer;
    }
    return true;
}

/* Not too many of one image, of one name each, with a layer for each. */
static bool bitmaps_consistent(const BaleCatalogue *cat, GHashTable *names,
                               GHashTable *used)
{
    typedef struct Sum {
        uint64_t n, len;
    } Sum;
    g_autoptr(GHashTable) sums = g_hash_table_new_full(NULL, NULL, NULL,
                                                       g_free);

    for (guint i = 0; i < cat->bitmaps->len; i++) {
        BaleBitmapEntry *e = &g_array_index(cat->bitmaps, BaleBitmapEntry,
                                            i);
        Sum *sum = g_hash_table_lookup(sums, GUINT_TO_POINTER(e->image));

        if (!sum) {
            sum = g_new0(Sum, 1);
            g_hash_table_insert(sums, GUINT_TO_POINTER(e->image), sum);
        }
        sum->n++;
        sum->len += bale_bitmap_data_len(e->size, e->granularity);
        /* No image's name has an @. */
        if (sum->n > BALE_BITMAPS_MAX || sum->len > BALE_BITMAPS_DATA_MAX ||
            !bale_catalogue_image(cat, e->image) ||
            !g_hash_table_add(names, g_strdup_printf("@%" PRIu32 "@%s",
                                                     e->image, e->name)) ||
            !g_hash_table_add(used, GUINT_TO_POINTER(e->layer))) {
            return false;
        }
    }
    return true;
}

/*
 * What concerns several entries: names are unique, and the top layer of an
 * image, which changes, is nobody else's.
 */
static bool catalogue_consistent(const BaleCatalogue *cat)
{
    g_autoptr(GHashTable) names = g_hash_table_new_full(
        g_str_hash, g_str_equal, g_free, NULL);
    g_autoptr(GHashTable) used = g_hash_table_new(NULL, NULL);

    for (guint i = 0; i < cat->layers->len; i++) {
        BaleLayerEntry *e = &g_array_index(cat->layers, BaleLayerEntry, i);

        g_hash_table_add(used, GUINT_TO_POINTER(e->parent));
    }
    for (guint i = 0; i < cat->snapshots->len; i++) {
        BaleSnapshotEntry *e =
            &g_array_index(cat->snapshots, BaleSnapshotEntry, i);

        if (!bale_catalogue_image(cat, e->image) ||
            !g_hash_table_add(names, g_strdup_printf("%" PRIu32 "@%s",
                                                     e->image, e->name))) {
            return false;
        }
        g_hash_table_add(used, GUINT_TO_POINTER(e->layer));
    }
    for (guint i = 0; i < cat->images->len; i++) {
        BaleImageEntry *e = &g_array_index(cat->images, BaleImageEntry, i);

        if (!g_hash_table_add(names, g_strdup(e->name)) ||
            !g_hash_table_add(used, GUINT_TO_POINTER(e->layer))) {
            return false;
        }
    }
    return bitmaps_consistent(cat, names, used);
}

/* What an image record says, as a catalogue. */
static int decode_plain(Decoder *d, size_t len)
{
    g_autofree BaleImageRecord *record = g_new0(BaleImageRecord, 1);
    BaleLayerEntry layer = { .generation = 1 };
    BaleImageEntry image = { .date_s = 0 };
    int ret = bale_image_decode(record, d->cluster_size, d->p, len);

    if (ret < 0) {
        return ret;
    }
    if (record->id != 1 || record->layer != 1 || record->name[0]) {
        return -EIO;
    }
    layer.id = record->layer;
    layer.size = record->size;
    g_array_append_val(d->cat->layers, layer);
    image.id = record->id;
    image.layer = record->layer;
    image.codec = record->codec;
    image.level = record->level;
    image.name = g_strdup("");
    image.backing_file = g_strdup(record->backing_file);
    image.backing_format = g_strdup(record->backing_format);
    g_array_append_val(d->cat->images, image);
    d->cat->next_layer = d->cat->next_image = 2;
    return 0;
}

int bale_catalogue_decode(BaleCatalogue **out, uint8_t type,
                          uint32_t cluster_size, const uint8_t *buf,
                          size_t len)
{
    g_autoptr(BaleCatalogue) cat = bale_catalogue_new();
    Decoder d = { buf, buf + len, cluster_size, cat };
    uint32_t layers, aliases, snapshots, images, bitmaps;
    int ret;

    if (type == BALE_RECORD_IMAGE) {
        ret = decode_plain(&d, len);
        *out = ret == 0 ? g_steal_pointer(&cat) : NULL;
        return ret;
    }
    if (type != BALE_RECORD_CATALOGUE || len > BALE_CATALOGUE_PAYLOAD_MAX ||
        !take(&d, BALE_CATALOGUE_FIXED_LEN)) {
        return -EIO;
    }
    /* Each of these is at least as long in @buf as in memory, nearly. */
    layers = get32(buf + CATALOGUE_LAYERS);
    aliases = get32(buf + CATALOGUE_ALIASES);
    snapshots = get32(buf + CATALOGUE_SNAPSHOTS);
    images = get32(buf + CATALOGUE_IMAGES);
    bitmaps = get32(buf + CATALOGUE_BITMAPS);
    cat->next_layer = get32(buf + CATALOGUE_NEXT_LAYER);
    cat->next_image = get32(buf + CATALOGUE_NEXT_IMAGE);
    cat->next_snapshot = get32(buf + CATALOGUE_NEXT_SNAPSHOT);
    if (!cat->next_layer || !cat->next_image || !cat->next_snapshot ||
        !decode_layers(&d, layers) || !decode_aliases(&d, aliases) ||
        !decode_snapshots(&d, snapshots) || !decode_images(&d, images) ||
        !decode_bitmaps(&d, bitmaps) || d.p != d.end ||
        !catalogue_consistent(cat)) {
        return -EIO;
    }
    *out = g_steal_pointer(&cat);
    return 0;
}
