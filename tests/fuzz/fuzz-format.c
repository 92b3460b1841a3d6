/*
 * libFuzzer target: every decoder of the on-disk format, on one block of
 * hostile bytes whose checksums are right.
 *
 * The first byte chooses the decoder.  What a decoder accepts must lie inside
 * the caps of docs/format.md.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "../../block/extstore/store-internal.h"

#include <stdlib.h>
#include <string.h>

#include "util/checksum.h"

#define IDENTITY 42u
#define CLUSTER_SIZE 4096u
#define BLOCK BALE_BLOCK_SIZE

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void require(bool condition)
{
    if (!condition) {
        abort();
    }
}

static void fuzz_super(uint8_t *block)
{
    const char *reason = NULL;
    BaleSuper s;

    memcpy(block, "BALESTOR", 8);
    bale_put_le64(block + 504, bale_checksum(block, 504, 0));
    if (bale_super_decode(&s, 0, block, &reason) == 0) {
        require(s.cluster_size >= BALE_CLUSTER_SIZE_MIN &&
                s.cluster_size <= BALE_CLUSTER_SIZE_MAX &&
                s.page_size <= BALE_PAGE_SIZE_MAX &&
                s.page_size / BALE_PAGE_CLUSTERS_MIN >= s.cluster_size);
    }
}

static void fuzz_page(uint8_t *block)
{
    BalePageHeader h;

    memcpy(block, block[63] % 2 ? "BALEPAGE" : "BALEFREE", 8);
    bale_put_le64(block + 16, 7);
    bale_put_le64(block + 56,
                  bale_checksum(block, 56, bale_place(IDENTITY, 7, 0, 0)));
    if (bale_page_header_decode(&h, IDENTITY, 7, block) == 0) {
        require(h.page == 7 && h.bucket < BALE_BUCKETS && h.version != 0);
    }
}

static void fuzz_record(uint8_t *block)
{
    static const uint8_t magic[4] = { 0xde, 0xc0, 0x1e, 0xb4 };
    uint64_t seed = bale_place(IDENTITY, 1, 1, 4096);
    uint16_t len;
    BaleRecord r;

    memcpy(block, magic, sizeof(magic));
    memcpy(&len, block + 12, 2);
    len = GUINT16_FROM_LE(len);
    if (len < 64 || len > BALE_RECORD_HEADER_MAX) {
        len = 64;
    }
    memset(block + 56, 0, 8);
    bale_put_le64(block + 56, bale_checksum(block, len, seed));
    if (bale_record_decode(&r, seed, CLUSTER_SIZE, block, BLOCK) == 0) {
        require(r.header_len <= BALE_RECORD_HEADER_MAX &&
                r.payload_len <= BALE_META_PAYLOAD_MAX);
    }
}

static void fuzz_segment(uint8_t *block, size_t len)
{
    BaleSegment s;

    if (bale_segment_decode(&s, 4096, 2u << 20, block, len) == 0) {
        require(s.barriers <= BALE_BARRIERS_MAX &&
                s.segment_len <= (2u << 20) - 4096 &&
                s.directory_offset < 4096 + s.segment_len);
        for (uint32_t i = 0; i < s.barriers; i++) {
            require(s.barrier[i].durable_end % BLOCK == 0);
        }
    }
}

static void fuzz_directory(uint8_t *block)
{
    BaleDirectoryEntry e;

    if (bale_directory_entry_decode(&e, 4096, 65536, CLUSTER_SIZE, block) ==
        0) {
        require(e.offset >= 4096 && e.offset < 65536);
    }
}

static void fuzz_checkpoint(uint8_t *block, size_t len)
{
    BaleRoot root;
    BalePart part;
    BalePageEntry entry;

    if (bale_root_decode(&root, block, len) == 0) {
        require(root.parts <= BALE_ROOT_PARTS_MAX &&
                BALE_ROOT_FIXED_LEN + (uint64_t)root.parts * BALE_PART_LEN <=
                    len);
    }
    if (bale_part_decode(&part, block) == 0) {
        require(part.payload_len <= BALE_META_PAYLOAD_MAX);
    }
    if (bale_page_entry_decode(&entry, 2u << 20, block) == 0 &&
        entry.version) {
        require(entry.end <= 2u << 20 && entry.bucket < BALE_BUCKETS);
    }
}

static void fuzz_image(uint8_t *block, size_t len)
{
    BaleImageRecord i;

    if (bale_image_decode(&i, CLUSTER_SIZE, block, len) == 0) {
        require(i.size <= BALE_IMAGE_SIZE_MAX && strlen(i.name) <= 255 &&
                strlen(i.backing_file) <= BALE_BACKING_NAME_MAX);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    uint8_t block[BLOCK] = { 0 };

    if (size < 1) {
        return 0;
    }
    memcpy(block, data + 1, MIN(size - 1, BLOCK));
    switch (data[0] % 7) {
    case 0:
        fuzz_super(block);
        break;
    case 1:
        fuzz_page(block);
        break;
    case 2:
        fuzz_record(block);
        break;
    case 3:
        fuzz_segment(block, MIN(size - 1, BLOCK));
        break;
    case 4:
        fuzz_directory(block);
        break;
    case 5:
        fuzz_checkpoint(block, MIN(size - 1, BLOCK));
        break;
    default:
        fuzz_image(block, MIN(size - 1, BLOCK));
        break;
    }
    return 0;
}
