/*
 * Stores by hand: see forge.h.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "forge.h"

#include <string.h>

#include "util/checksum.h"
#include "util/memory.h"

#define BLOCK BALE_BLOCK_SIZE

static uint64_t page_at(const BaleSuper *super, uint64_t page)
{
    return BALE_SUPER_SIZE + page * super->page_size;
}

static uint64_t align_up(uint64_t n, uint64_t to)
{
    return (n + to - 1) / to * to;
}

/* --- pages from records --- */

static void put_record(uint8_t *to, BaleRecord *r, const void *payload,
                       const BaleSuper *super, uint64_t page,
                       uint64_t version, uint64_t offset)
{
    uint64_t seed = bale_place(bale_identity(super->uuid), page, version,
                               offset);

    r->header_len = BALE_RECORD_HEADER_LEN;
    r->version = version;
    if (r->payload_len) {
        memcpy(to + BALE_RECORD_HEADER_LEN, payload, r->payload_len);
    }
    r->payload_sum = bale_checksum(to + BALE_RECORD_HEADER_LEN,
                                   r->payload_len, seed);
    bale_record_encode(r, seed, to);
}

uint64_t forge_segment(BaleDevice *dev, const BaleSuper *super, uint64_t page,
                       uint64_t version, uint64_t offset,
                       ForgeRecord *records, guint n,
                       const BaleBarrier *barriers, guint barriers_n)
{
    uint32_t head = bale_segment_payload_len(barriers_n);
    uint64_t used = align_up(BALE_RECORD_HEADER_LEN + head, 16), len;
    uint64_t seq = n ? records[n - 1].r.seq : 1;
    BaleSegment segment = { .barriers = barriers_n };
    BaleRecord first = { .type = BALE_RECORD_SEGMENT, .seq = seq,
                         .payload_len = head };
    BaleRecord last = { .type = BALE_RECORD_DIRECTORY, .seq = seq };
    g_autoptr(GByteArray) directory = g_byte_array_new();
    g_autofree uint8_t *buf = NULL;
    uint8_t payload[BALE_SEGMENT_PAYLOAD_LEN +
                    BALE_BARRIERS_MAX * BALE_BARRIER_LEN];

    for (guint i = 0; i < n; i++) {
        records[i].r.header_len = BALE_RECORD_HEADER_LEN;
        used += bale_record_size(&records[i].r);
        segment.records += !records[i].no_entry + records[i].entries;
    }
    last.payload_len = segment.records * BALE_DIRECTORY_ENTRY_LEN;
    last.header_len = BALE_RECORD_HEADER_LEN;
    len = align_up(used + bale_record_size(&last), BLOCK);
    g_assert(offset + len <= super->page_size);
    segment.segment_len = len;
    segment.directory_offset = offset + len - bale_record_size(&last);
    memcpy(segment.barrier, barriers, barriers_n * sizeof(*barriers));
    buf = g_malloc0(len);

    bale_segment_encode(&segment, payload);
    put_record(buf, &first, payload, super, page, version, offset);
    used = bale_record_size(&first);
    for (guint i = 0; i < n; i++) {
        ForgeRecord *f = &records[i];
        BaleDirectoryEntry e = { f->r, offset + used };
        uint8_t entry[BALE_DIRECTORY_ENTRY_LEN];

        put_record(buf + used, &f->r, f->payload, super, page, version,
                   offset + used);
        f->address = page_at(super, page) + offset + used;
        bale_directory_entry_encode(&e, entry);
        for (uint32_t k = f->no_entry; k <= f->entries; k++) {
            g_byte_array_append(directory, entry, sizeof(entry));
        }
        used += bale_record_size(&f->r);
    }
    put_record(buf + (segment.directory_offset - offset), &last,
               directory->data, super, page, version,
               segment.directory_offset);
    bale_sim_poke(dev, page_at(super, page) + offset, buf, len);
    return offset + len;
}

uint64_t forge_page(BaleDevice *dev, const BaleSuper *super, uint64_t page,
                    uint64_t version, BaleBucket bucket, ForgeRecord *records,
                    guint n, const BaleBarrier *barriers, guint barriers_n)
{
    BalePageHeader h = { .bucket = bucket, .page = page, .version = version,
                         .first_seq = n ? records[0].r.seq : 1 };
    uint8_t block[BLOCK];

    bale_page_header_encode(&h, bale_identity(super->uuid), block);
    bale_sim_poke(dev, page_at(super, page), block, BLOCK);
    return forge_segment(dev, super, page, version, BLOCK, records, n,
                         barriers, barriers_n);
}

void forge_supers(BaleDevice *dev, BaleSuper *super)
{
    super->generation = MAX(super->generation, 1);
    super->cluster_size = super->cluster_size ? super->cluster_size : 4096;
    super->page_size = super->page_size ? super->page_size
                                        : BALE_PAGE_SIZE_UNIT;
    super->next_seq = MAX(super->next_seq, 1);
    for (unsigned copy = 0; copy < BALE_SUPER_COPIES; copy++) {
        uint8_t block[BLOCK];

        bale_super_encode(super, copy, block);
        bale_sim_poke(dev, bale_super_address(copy), block, BLOCK);
    }
}

/* --- changing what the engine wrote --- */

static uint64_t seed_of(const Forge *f, uint64_t address,
                        const uint8_t *header)
{
    uint64_t at = address - BALE_SUPER_SIZE;

    return bale_place(f->identity, at / f->super.page_size,
                      bale_record_claimed_version(header),
                      at % f->super.page_size);
}

static void list_block(Forge *f, uint64_t at)
{
    static const uint8_t magic[4] = { 0xde, 0xc0, 0x1e, 0xb4 };
    uint8_t block[BLOCK + BALE_RECORD_HEADER_MAX];

    bale_sim_image_read(f->image, at, block, sizeof(block));
    if (bale_memory_is_zero(block, BLOCK)) {
        return;
    }
    g_array_append_val(f->blocks, at);
    for (uint32_t i = 0; at >= BALE_SUPER_SIZE && i < BLOCK;
         i += BALE_RECORD_ALIGN) {
        BaleRecord r;

        if (!memcmp(block + i, magic, sizeof(magic)) &&
            bale_record_decode(&r, seed_of(f, at + i, block + i),
                               f->super.cluster_size, block + i,
                               BALE_RECORD_HEADER_MAX) == 0) {
            ForgePlace place = { at + i, r.type, r.header_len,
                                 r.payload_len };

            g_array_append_val(f->records, place);
        }
    }
}

Forge *forge_list(BaleSimImage *image)
{
    Forge *f = g_new0(Forge, 1);
    uint64_t size = bale_sim_image_size(image);
    uint8_t block[BLOCK];

    f->image = image;
    f->blocks = g_array_new(FALSE, FALSE, sizeof(uint64_t));
    f->records = g_array_new(FALSE, FALSE, sizeof(ForgePlace));
    for (unsigned copy = 0; copy < BALE_SUPER_COPIES; copy++) {
        BaleSuper super;

        bale_sim_image_read(image, bale_super_address(copy), block, BLOCK);
        if (bale_super_decode(&super, copy, block, NULL) == 0 &&
            super.generation > f->super.generation) {
            f->super = super;
        }
    }
    g_assert(f->super.generation);
    f->identity = bale_identity(f->super.uuid);
    for (uint64_t at = 0; at < size; at += BLOCK) {
        list_block(f, at);
    }
    return f;
}

void forge_free(Forge *f)
{
    bale_sim_image_unref(f->image);
    g_array_free(f->blocks, TRUE);
    g_array_free(f->records, TRUE);
    g_free(f);
}

/* Payloads that grow in the edits are sealed as far as this. */
#define SEAL_PAYLOAD_MAX (64u << 10)

static void seal_record(const Forge *f, BaleDevice *dev, BaleSimImage *now,
                        uint64_t address)
{
    uint8_t buf[BALE_RECORD_HEADER_MAX + SEAL_PAYLOAD_MAX];
    uint32_t payload_len;
    uint16_t header_len;
    uint64_t seed;

    bale_sim_image_read(now, address, buf, BALE_RECORD_HEADER_MAX);
    memcpy(&payload_len, buf + 8, 4);
    memcpy(&header_len, buf + 12, 2);
    payload_len = MIN(GUINT32_FROM_LE(payload_len), SEAL_PAYLOAD_MAX);
    header_len = GUINT16_FROM_LE(header_len);
    if (header_len < BALE_RECORD_HEADER_LEN ||
        header_len > BALE_RECORD_HEADER_MAX) {
        header_len = BALE_RECORD_HEADER_LEN;
    }
    seed = seed_of(f, address, buf);
    bale_sim_image_read(now, address + header_len, buf + header_len,
                        payload_len);
    bale_put_le64(buf + 48, bale_checksum(buf + header_len, payload_len,
                                          seed));
    bale_put_le64(buf + 56, 0);
    bale_put_le64(buf + 56, bale_checksum(buf, header_len, seed));
    bale_sim_poke(dev, address, buf, header_len);
}

static void seal_pages(const Forge *f, BaleDevice *dev, BaleSimImage *now)
{
    for (guint i = 0; i < f->blocks->len; i++) {
        uint64_t at = g_array_index(f->blocks, uint64_t, i);
        uint64_t page = (at - BALE_SUPER_SIZE) / f->super.page_size;
        uint8_t header[BALE_PAGE_HEADER_LEN];

        if (at < BALE_SUPER_SIZE ||
            (at - BALE_SUPER_SIZE) % f->super.page_size) {
            continue;
        }
        bale_sim_image_read(now, at, header, sizeof(header));
        bale_put_le64(header + 56,
                      bale_checksum(header, 56,
                                    bale_place(f->identity, page, 0, 0)));
        bale_sim_poke(dev, at, header, sizeof(header));
    }
}

void forge_seal(const Forge *f, BaleDevice *dev)
{
    g_autoptr(BaleSimImage) now = bale_sim_image(dev);

    for (guint i = 0; i < f->records->len; i++) {
        ForgePlace *place = &g_array_index(f->records, ForgePlace, i);
        uint8_t was[BALE_RECORD_HEADER_MAX + 4096];
        uint8_t is[sizeof(was)];
        size_t len = MIN(place->header_len + place->payload_len,
                         sizeof(was));

        /* Most are what they were. */
        bale_sim_image_read(f->image, place->address, was, len);
        bale_sim_image_read(now, place->address, is, len);
        if (memcmp(was, is, len) ||
            place->header_len + place->payload_len > len) {
            seal_record(f, dev, now, place->address);
        }
    }
    seal_pages(f, dev, now);
    for (unsigned copy = 0; copy < BALE_SUPER_COPIES; copy++) {
        uint8_t super[BALE_SUPER_LEN];

        bale_sim_image_read(now, bale_super_address(copy), super,
                            sizeof(super));
        bale_put_le64(super + 504,
                      bale_checksum(super, 504, bale_super_address(copy)));
        bale_sim_poke(dev, bale_super_address(copy), super, sizeof(super));
    }
}
