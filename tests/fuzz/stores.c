/*
 * Whole stores with right checksums and wrong contents, for libFuzzer.
 *
 * When a target starts, a few small stores are made: left open and closed, with
 * a backing file, snapshots and clones, merged layers, patches, freed pages,
 * and checkpoints written in use, with a tail.  The input chooses one, what is
 * done with it, and edits: each takes a record (by kind), a page header, a
 * superblock or any block, a place in it, and what to put there: bytes, a
 * number that is often wrong, or a small step up or down.  Then every checksum
 * that was right before is made right again (forge.c).  So the mutator
 * needs to know nothing of checksums, and inputs stay short.
 *
 * Anything but a crash, a hang, a leak or much memory is fine.
 *
 * Threads: the engine's work is done by the caller (tests/sim/inline.c); only
 * the maintenance thread is one.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "stores.h"

#include <glib.h>
#include <stdlib.h>
#include <string.h>

#include "forge.h"
#include "extstore/store.h"

#define EDITS_MAX 16
#define EDIT_LEN_MAX 16
#define IMAGE_SIZE (64u << 10)
#define READ_MAX (256u << 10)
#define AIMS 8

/* What is done with the store: bits of the input's second byte. */
enum {
    USE_CHECK = 1 << 0,
    USE_WRITE = 1 << 1,
    USE_ZERO = 1 << 2,
    USE_SNAPSHOT = 1 << 3,
    USE_COMPACT = 1 << 4,
    USE_CHECKPOINT = 1 << 5,
    USE_DELETE = 1 << 6,
    USE_AGAIN = 1 << 7,   /* open what it was just before it was closed */
};

typedef struct Base {
    Forge *forge;
    GArray *places[AIMS]; /* ForgePlace, for each bit */
} Base;

#define BASES 10

static Base bases[BASES];
static const BaleSimOptions quick = { .no_history = true };

static void log_nothing(const char *domain, GLogLevelFlags level,
                        const char *message, gpointer opaque)
{
    if (level & (G_LOG_FLAG_FATAL | G_LOG_LEVEL_ERROR)) {
        abort();
    }
}

/* --- the stores to begin with --- */

static unsigned aim_of(uint8_t type)
{
    switch (type) {
    case BALE_RECORD_CHECKPOINT_PART:
    case BALE_RECORD_CHECKPOINT_ROOT:
        return AIM_CHECKPOINT;
    case BALE_RECORD_IMAGE:
    case BALE_RECORD_CATALOGUE:
        return AIM_CATALOGUE;
    case BALE_RECORD_PATCH:
        return AIM_PATCH;
    case BALE_RECORD_SEGMENT:
    case BALE_RECORD_DIRECTORY:
        return AIM_SEGMENT;
    default:
        return AIM_DATA;
    }
}

static void base_add(Base *b, unsigned aim, ForgePlace place)
{
    g_array_append_val(b->places[__builtin_ctz(aim)], place);
}

static void base_list(Base *b, BaleSimImage *image)
{
    b->forge = forge_list(image);
    for (unsigned i = 0; i < AIMS; i++) {
        b->places[i] = g_array_new(FALSE, FALSE, sizeof(ForgePlace));
    }
    for (guint i = 0; i < b->forge->records->len; i++) {
        ForgePlace place = g_array_index(b->forge->records, ForgePlace, i);

        base_add(b, aim_of(place.type), place);
    }
    for (guint i = 0; i < b->forge->blocks->len; i++) {
        uint64_t at = g_array_index(b->forge->blocks, uint64_t, i);
        ForgePlace place = { .address = at, .payload_len = BALE_BLOCK_SIZE };

        base_add(b, AIM_BLOCK, place);
        if (at >= BALE_SUPER_SIZE &&
            (at - BALE_SUPER_SIZE) % BALE_PAGE_SIZE_UNIT == 0) {
            place.payload_len = BALE_PAGE_HEADER_LEN;
            base_add(b, AIM_PAGE, place);
        } else if (at < BALE_SUPER_SIZE) {
            place.payload_len = BALE_SUPER_LEN;
            base_add(b, AIM_SUPER, place);
        }
    }
}

static void base_snapshot(BaleStore *s, const char *name)
{
    BaleSnapshotInfo info = { .name = name, .date_s = 1 };

    bale_snapshot_create(s, NULL, &info, NULL);
}

/* Snapshots, a clone, a merged layer. */
static void base_layers(BaleStore *s, BaleImage *image, const uint8_t *buf)
{
    base_snapshot(s, "one");
    bale_image_write_sync(image, 8192, buf, 9000, 0);
    base_snapshot(s, "two");
    bale_image_clone(s, NULL, "two", "clone", NULL);
    bale_image_write_sync(image, 20000, buf, 4096, BALE_FUA);
    base_snapshot(s, "three");
    bale_snapshot_delete(s, NULL, "one", NULL);
    bale_image_write_sync(image, 0, buf, 100, 0);
}

static void base_make(Base *b, unsigned kind)
{
    BaleCreateOptions c = { .size = kind == 9 ? 1ull << 36 : IMAGE_SIZE,
                            .cluster_size = 4096,
                            .page_size = BALE_PAGE_SIZE_UNIT,
                            .image = kind == 8 ? "disk" : NULL,
                            .codec = kind % 2 ? BALE_CODEC_DEFLATE
                                              : BALE_CODEC_ZSTD,
                            .backing_file = kind == 1 ? "base.img" : NULL };
    BaleOpenOptions o = { .workers = 1 };
    BaleDevice *dev = bale_sim_new(&quick);
    g_autofree uint8_t *buf = g_malloc0(IMAGE_SIZE);
    BaleSimImage *crashed;
    BaleStore *s;
    BaleImage *image;

    for (unsigned i = 0; i < IMAGE_SIZE; i++) {
        buf[i] = i / 7 + i % 5;
    }
    if (!bale_store_create(dev, &c, NULL)) {
        abort();
    }
    s = bale_store_open(dev, &o, NULL);
    image = bale_image_open(s, c.image, NULL);
    bale_image_write_sync(image, 0, buf, 5 * 4096, 0);
    bale_image_zero_sync(image, 4096, 4096, 0);
    bale_store_flush_sync(s);
    bale_image_write_sync(image, 700, buf, 9000, 0);
    bale_image_zero_sync(image, 8192, 8192, BALE_DISCARD);
    bale_store_flush_sync(s);
    if (kind == 2 || kind == 3) {
        bale_store_checkpoint(s, NULL);
    }
    if (kind == 3) {
        bale_image_write_sync(image, 0, buf, 3 * 4096, BALE_FUA);
        bale_image_write_sync(image, 8192, buf, 4096, BALE_FUA);
    }
    if (kind >= 4 && kind <= 6) {
        base_layers(s, image, buf);
    }
    if (kind >= 5 && kind <= 9) {
        bale_store_checkpoint_running(s, NULL);
        bale_image_write_sync(image, 12288, buf, 8192, 0);
        bale_store_flush_sync(s);
        bale_store_checkpoint_running(s, NULL);
        bale_image_write_sync(image, 300, buf, 200, BALE_FUA);
        bale_image_write_sync(image, 5000, buf, 9, BALE_FUA);
        bale_image_write_sync(image, 5100, buf, 20, BALE_FUA);
        bale_image_write_sync(image, 4096 * 9, buf, 4096, BALE_FUA);
    }
    if (kind == 6 || kind == 7) {
        for (int i = 0; i < 6; i++) {
            bale_image_write_sync(image, 0, buf + i, IMAGE_SIZE - 4096,
                                  BALE_FUA);
        }
        bale_store_compact(s, &(BaleCompactOptions){ 0 }, NULL);
        bale_store_flush_sync(s);
        bale_image_write_sync(image, 1, buf, 30, BALE_FUA);
    }
    if (kind == 4) {
        bale_image_close(image);
        bale_store_checkpoint(s, NULL);
        image = bale_image_open(s, NULL, NULL);
    }
    crashed = bale_sim_image(dev);
    bale_image_close(image);
    bale_store_close(s, NULL);
    base_list(b, crashed);
}

void stores_init(void)
{
    g_log_set_default_handler(log_nothing, NULL);
    for (unsigned i = 0; i < BASES; i++) {
        base_make(&bases[i], i);
    }
}

/* --- editing --- */

static uint64_t odd_number(unsigned which)
{
    static const uint64_t numbers[] = {
        0, 1, 2, 63, 64, 4095, 4096, 65535, 65536, 1 << 20, 2 << 20,
        (2 << 20) - 1, INT32_MAX, 1ull << 31, UINT32_MAX, 1ull << 32,
        1ull << 36, (1ull << 36) - 1, 1ull << 48, (1ull << 48) - 16,
        1ull << 60, (1ull << 60) + 1, 1ull << 62, INT64_MAX, 1ull << 63,
        UINT64_MAX, UINT64_MAX - 1, UINT64_MAX - 4095, 100000, 16384, 256,
        255,
    };

    return numbers[which % G_N_ELEMENTS(numbers)];
}

/* One edit; returns what it took of @data, at most @size. */
static size_t edit(const Base *b, BaleDevice *dev, const uint8_t *data,
                   size_t size, unsigned aims)
{
    unsigned bit = data[0] % AIMS, how = data[4] / 64, arg = data[4] % 64;
    uint8_t value[8], *p = value;
    size_t len = 8, taken = 5;
    g_autoptr(BaleSimImage) now = NULL;
    ForgePlace *place;
    uint64_t n, at;

    while (!(aims & 1u << bit) || !b->places[bit]->len) {
        bit = (bit + 1) % AIMS;
        if (bit == data[0] % AIMS) {
            return size;
        }
    }
    place = &g_array_index(b->places[bit], ForgePlace,
                           data[1] % b->places[bit]->len);
    at = (data[2] | data[3] << 8) % (place->header_len + place->payload_len);
    if (how == 0) {
        len = MIN(MIN(1 + arg % EDIT_LEN_MAX, size - 5), EDIT_LEN_MAX);
        p = (uint8_t *)data + 5;
        taken += len;
    } else if (how == 1) {
        at = at / 4 * 4;
        len = arg & 32 ? 8 : 4;
        bale_put_le64(value, odd_number(arg));
    } else {
        /* A step, of a field of 2, 4 or 8 bytes, up or down. */
        len = 2u << arg % 3;
        at = at / len * len;
        now = bale_sim_image(dev);
        bale_sim_image_read(now, place->address + at, value, 8);
        n = bale_get_le64(value);
        n = how == 2 ? n + arg / 3 : n - arg / 3;
        bale_put_le64(value, n);
    }
    bale_sim_poke(dev, place->address + at, p, len);
    return taken;
}

/* --- using the store --- */

static void use_image(BaleStore *s, const char *name, unsigned how,
                      uint8_t *buf)
{
    BaleImage *image = bale_image_open(s, name, NULL);
    BaleClusterStatus status;
    uint64_t size, run;

    if (!image) {
        return;
    }
    bale_image_set_salvage(image, true);
    size = MIN(bale_image_size(image), READ_MAX);
    if (size) {
        bale_image_read_sync(image, 0, buf, size);
        bale_image_status(image, 0, bale_image_size(image), &status, &run);
    }
    if (how & USE_WRITE && size >= 8192) {
        bale_image_write_sync(image, 100, buf, 5000, 0);
        bale_image_write_sync(image, 4096 + 7, buf, 3, BALE_FUA);
    }
    if (how & USE_ZERO && size >= 8192) {
        bale_image_zero_sync(image, 0, 4096, 0);
        bale_image_zero_sync(image, 4096, size - 4096, BALE_DISCARD);
    }
    bale_image_close(image);
}

static void use_images(BaleStore *s, unsigned how)
{
    static uint8_t buf[READ_MAX];
    GArray *images = bale_image_list(s);

    for (guint i = 0; i < images->len; i++) {
        BaleImageListEntry *e = &g_array_index(images, BaleImageListEntry, i);
        GArray *snapshots = bale_snapshot_list(s, e->name, NULL);

        use_image(s, e->name, how, buf);
        for (guint k = 0; snapshots && k < snapshots->len; k++) {
            BaleSnapshotListEntry *shot =
                &g_array_index(snapshots, BaleSnapshotListEntry, k);
            g_autofree char *name = g_strdup_printf("%s@%s", e->name,
                                                    shot->name);

            use_image(s, name, 0, buf);
            if (how & USE_DELETE && (k + how) % 2) {
                bale_snapshot_delete(s, e->name, shot->name, NULL);
            } else if (how & USE_DELETE) {
                bale_snapshot_rollback(s, e->name, shot->name, NULL);
            }
        }
        if (how & USE_SNAPSHOT) {
            BaleSnapshotInfo info = { .name = "new" };

            bale_snapshot_create(s, e->name, &info, NULL);
            bale_image_clone(s, e->name, NULL, "copy", NULL);
        }
        if (how & USE_DELETE && i % 2) {
            bale_image_delete(s, e->name, NULL);
        }
        if (snapshots) {
            g_array_unref(snapshots);
        }
    }
    g_array_unref(images);
}

static void use(BaleDevice *dev, const BaleOpenOptions *o, unsigned how)
{
    BaleStore *s = bale_store_open(dev, o, NULL);
    g_autoptr(BaleSimImage) crashed = NULL;
    BaleCompactOptions all = { 0 };
    BaleCheckResult result;

    if (!s) {
        bale_device_close(dev);
        return;
    }
    if (how & USE_CHECK) {
        bale_store_check(s, o->repair ? BALE_CHECK_DATA | BALE_CHECK_FIX_ALL
                                      : BALE_CHECK_DATA,
                         NULL, NULL, &result, NULL);
    }
    use_images(s, how);
    bale_store_flush_sync(s);
    if (how & USE_CHECKPOINT) {
        bale_store_checkpoint_running(s, NULL);
    }
    if (how & USE_COMPACT) {
        bale_store_compact(s, &all, NULL);
    }
    if (how & USE_AGAIN) {
        crashed = bale_sim_image(dev);
    }
    bale_store_close(s, NULL);
    if (crashed) {
        use(bale_sim_new_from_image(crashed, &quick), o, 0);
    }
}

void stores_fuzz(const uint8_t *data, size_t size, unsigned aims)
{
    BaleOpenOptions o = { .workers = 1 };
    BaleDevice *dev;
    unsigned how;
    const Base *b;

    if (size < 2) {
        return;
    }
    b = &bases[(data[0] & 15) % BASES];
    dev = bale_sim_new_from_image(b->forge->image, &quick);
    o.read_only = data[0] & 0x40;
    o.repair = (data[0] & 0x30) == 0x30;
    how = data[1];
    data += 2;
    size -= 2;
    for (int i = 0; i < EDITS_MAX && size > 5; i++) {
        size_t taken = edit(b, dev, data, size, aims);

        data += taken;
        size -= taken;
    }
    forge_seal(b->forge, dev);
    use(dev, &o, how);
}
