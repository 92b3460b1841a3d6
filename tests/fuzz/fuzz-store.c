/*
 * libFuzzer target: whole stores with right checksums and wrong contents.
 *
 * The target makes a few small stores when it starts.  The input chooses one
 * and edits it: each edit takes a place among the used blocks and the bytes to
 * put there.  Then every checksum that was right before is made right again,
 * and the store is opened, checked, read, written, compacted and closed.
 *
 * Anything but a crash, a hang or much memory is fine.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "../../block/extstore/store-internal.h"
#include "extstore/device-sim.h"

#include <stdlib.h>
#include <string.h>

#include "util/checksum.h"

#define BASES 4
#define EDITS_MAX 16
#define EDIT_LEN_MAX 16
#define IMAGE_SIZE (64u << 10)
#define READ_MAX (256u << 10)
#define BLOCK BALE_BLOCK_SIZE
#define PAGE_SIZE BALE_PAGE_SIZE_UNIT

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerInitialize(int *argc, char ***argv);

typedef struct Base {
    BaleSimImage *image;
    uint64_t identity;
    GArray *blocks;   /* uint64_t: addresses of blocks that hold something */
    GArray *records;  /* uint64_t: addresses of records that verify */
} Base;

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

static void base_list(Base *b)
{
    uint64_t size = bale_sim_image_size(b->image);
    uint8_t block[BLOCK], super[BLOCK];

    b->blocks = g_array_new(FALSE, FALSE, sizeof(uint64_t));
    b->records = g_array_new(FALSE, FALSE, sizeof(uint64_t));
    bale_sim_image_read(b->image, 0, super, BLOCK);
    b->identity = bale_identity(super + 40);
    for (uint64_t at = 0; at < size; at += BLOCK) {
        static const uint8_t zeroes[BLOCK];

        bale_sim_image_read(b->image, at, block, BLOCK);
        if (!memcmp(block, zeroes, BLOCK)) {
            continue;
        }
        g_array_append_val(b->blocks, at);
        for (uint32_t i = 0; at >= BALE_SUPER_SIZE && i < BLOCK;
             i += BALE_RECORD_ALIGN) {
            uint64_t address = at + i;
            uint8_t header[BALE_RECORD_HEADER_MAX];
            uint64_t page = (address - BALE_SUPER_SIZE) / PAGE_SIZE;
            uint64_t offset = (address - BALE_SUPER_SIZE) % PAGE_SIZE;
            BaleRecord r;

            bale_sim_image_read(b->image, address, header, sizeof(header));
            if (bale_record_decode(
                    &r,
                    bale_place(b->identity, page,
                               bale_record_claimed_version(header), offset),
                    4096, header, sizeof(header)) == 0) {
                g_array_append_val(b->records, address);
            }
        }
    }
}

static void base_make(Base *b, unsigned kind)
{
    BaleCreateOptions c = { .size = IMAGE_SIZE, .cluster_size = 4096,
                            .page_size = PAGE_SIZE,
                            .codec = kind % 2 ? BALE_CODEC_DEFLATE
                                              : BALE_CODEC_ZSTD,
                            .backing_file = kind == 1 ? "base.img" : NULL };
    BaleOpenOptions o = { .workers = 1 };
    BaleDevice *dev = bale_sim_new(&quick);
    g_autofree uint8_t *buf = g_malloc0(IMAGE_SIZE);
    BaleStore *s;
    BaleImage *image;

    for (unsigned i = 0; i < IMAGE_SIZE; i++) {
        buf[i] = i / 7 + i % 5;
    }
    if (!bale_store_create(dev, &c, NULL)) {
        abort();
    }
    s = bale_store_open(dev, &o, NULL);
    image = bale_image_open(s, NULL, NULL);
    bale_image_write_sync(image, 0, buf, 5 * 4096, 0);
    bale_image_zero_sync(image, 4096, 4096, 0);
    bale_store_flush_sync(s);
    bale_image_write_sync(image, 700, buf, 9000, 0);
    bale_image_zero_sync(image, 8192, 8192, BALE_DISCARD);
    bale_store_flush_sync(s);
    if (kind >= 2) {
        bale_store_checkpoint(s, NULL);
        if (kind == 3) {
            bale_image_write_sync(image, 0, buf, 3 * 4096, BALE_FUA);
            bale_image_write_sync(image, 8192, buf, 4096, BALE_FUA);
        }
    }
    b->image = bale_sim_image(dev);
    bale_image_close(image);
    bale_store_close(s, NULL);
    base_list(b);
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    g_log_set_default_handler(log_nothing, NULL);
    for (unsigned i = 0; i < BASES; i++) {
        base_make(&bases[i], i);
    }
    return 0;
}

/* --- sealing --- */

static void seal_record(const Base *b, BaleDevice *dev, BaleSimImage *now,
                        uint64_t address)
{
    uint64_t page = (address - BALE_SUPER_SIZE) / PAGE_SIZE;
    uint64_t offset = (address - BALE_SUPER_SIZE) % PAGE_SIZE;
    uint8_t header[BALE_RECORD_HEADER_MAX];
    g_autofree uint8_t *payload = NULL;
    uint32_t payload_len;
    uint16_t header_len;
    uint64_t seed;

    bale_sim_image_read(now, address, header, sizeof(header));
    memcpy(&payload_len, header + 8, 4);
    memcpy(&header_len, header + 12, 2);
    payload_len = GUINT32_FROM_LE(payload_len);
    header_len = GUINT16_FROM_LE(header_len);
    if (header_len < BALE_RECORD_HEADER_LEN ||
        header_len > BALE_RECORD_HEADER_MAX) {
        header_len = BALE_RECORD_HEADER_LEN;
    }
    seed = bale_place(b->identity, page, bale_record_claimed_version(header),
                      offset);
    if (payload_len <= 1u << 20) {
        payload = g_malloc(payload_len + 1);
        bale_sim_image_read(now, address + header_len, payload, payload_len);
        bale_put_le64(header + 48, bale_checksum(payload, payload_len, seed));
    }
    memset(header + 56, 0, 8);
    bale_put_le64(header + 56, bale_checksum(header, header_len, seed));
    bale_sim_poke(dev, address, header, header_len);
}

static void seal(const Base *b, BaleDevice *dev)
{
    g_autoptr(BaleSimImage) now = bale_sim_image(dev);
    uint64_t pages = (bale_sim_image_size(now) - BALE_SUPER_SIZE +
                      PAGE_SIZE - 1) / PAGE_SIZE;

    for (guint i = 0; i < b->records->len; i++) {
        seal_record(b, dev, now, g_array_index(b->records, uint64_t, i));
    }
    for (uint64_t page = 0; page < pages; page++) {
        uint64_t at = BALE_SUPER_SIZE + page * PAGE_SIZE;
        uint8_t header[64];

        bale_sim_image_read(now, at, header, sizeof(header));
        bale_put_le64(header + 56,
                      bale_checksum(header, 56,
                                    bale_place(b->identity, page, 0, 0)));
        bale_sim_poke(dev, at, header, sizeof(header));
    }
    for (unsigned copy = 0; copy < BALE_SUPER_COPIES; copy++) {
        uint8_t super[BALE_SUPER_LEN];

        bale_sim_image_read(now, bale_super_address(copy), super,
                            sizeof(super));
        bale_put_le64(super + 504,
                      bale_checksum(super, 504, bale_super_address(copy)));
        bale_sim_poke(dev, bale_super_address(copy), super, sizeof(super));
    }
}

/* --- using the store --- */

static void use(BaleStore *s)
{
    BaleImage *image = bale_image_open(s, NULL, NULL);
    uint64_t size = MIN(bale_image_size(image), READ_MAX);
    g_autofree uint8_t *buf = g_malloc0(READ_MAX);
    BaleCheckResult result;
    BaleClusterStatus status;
    uint64_t run;

    if (bale_image_size(image) <= READ_MAX) {
        bale_store_check(s, BALE_CHECK_DATA, NULL, NULL, &result, NULL);
    }
    if (size) {
        bale_image_read_sync(image, 0, buf, size);
        bale_image_status(image, 0, size, &status, &run);
    }
    if (size >= 8192) {
        bale_image_write_sync(image, 100, buf, 5000, 0);
        bale_image_zero_sync(image, 0, 4096, 0);
    }
    bale_store_flush_sync(s);
    bale_image_close(image);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    BaleOpenOptions o = { .workers = 1 };
    const Base *b;
    BaleDevice *dev;
    BaleStore *s;

    if (size < 1) {
        return 0;
    }
    b = &bases[data[0] % BASES];
    dev = bale_sim_new_from_image(b->image, &quick);
    o.read_only = data[0] & 0x40;
    data++;
    size--;
    for (int i = 0; i < EDITS_MAX && size > 4; i++) {
        uint64_t block = g_array_index(
            b->blocks, uint64_t, (data[0] | data[1] << 8) % b->blocks->len);
        unsigned offset = (data[2] | data[3] << 8) % BLOCK;
        size_t len = MIN(MIN(1 + data[4] % EDIT_LEN_MAX, size - 5),
                         BLOCK - offset);

        bale_sim_poke(dev, block + offset, data + 5, len);
        data += 5 + len;
        size -= 5 + len;
    }
    seal(b, dev);
    s = bale_store_open(dev, &o, NULL);
    if (s) {
        use(s);
        bale_store_close(s, NULL);
    } else {
        bale_device_close(dev);
    }
    return 0;
}
