/*
 * Recovery from a checkpoint: page table, image, index.
 *
 * A part that does not verify, or that contradicts another, fails the load as
 * a whole; the caller forgets what was loaded and scans.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "recover-internal.h"

#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "util/checksum.h"
#include "util/memory.h"

/*
 * Read and verify the record at @address of the page version @version.  On
 * success *@out is its payload, newly allocated.
 */
int bale_recover_record(BaleStore *s, uint64_t address, uint64_t version,
                        uint32_t len, BaleRecord *r, uint8_t **out)
{
    BALE_AUTO_MEMORY uint8_t *buf = NULL;
    uint64_t begin = bale_align_down(address, BALE_BLOCK_SIZE);
    uint64_t end = bale_align_up(address + len, BALE_BLOCK_SIZE);
    uint64_t page = (address - BALE_SUPER_SIZE) / s->page_size;
    uint64_t offset = (address - BALE_SUPER_SIZE) % s->page_size;
    uint64_t seed = bale_place(s->identity, page, version, offset);
    const uint8_t *p;
    int ret;

    if (address < BALE_SUPER_SIZE || len < BALE_RECORD_HEADER_LEN ||
        offset + len > s->page_size || address + len > s->dev_info.size) {
        return -EIO;
    }
    buf = bale_memory_try_alloc(BALE_BLOCK_SIZE, end - begin);
    if (!buf) {
        return -ENOMEM;
    }
    ret = bale_device_get_sync(s->dev, begin, buf, end - begin);
    if (ret < 0) {
        return ret;
    }
    p = buf + (address - begin);
    if (bale_record_decode(r, seed, s->cluster_size, p, len) < 0 ||
        r->header_len + r->payload_len > len || r->version != version ||
        bale_checksum(p + r->header_len, r->payload_len, seed) !=
            r->payload_sum) {
        return -EIO;
    }
    *out = g_try_malloc(r->payload_len + 1);
    if (!*out) {
        return -ENOMEM;
    }
    memcpy(*out, p + r->header_len, r->payload_len);
    return 0;
}

static int load_pages(BaleStore *s, const BalePart *part,
                      const uint8_t *payload)
{
    if (part->a + part->b > s->pages->len) {
        return -EIO;
    }
    for (uint64_t i = 0; i < part->b; i++) {
        BalePage *p = bale_page(s, part->a + i);
        BalePageEntry e;

        if (bale_page_entry_decode(&e, s->page_size,
                                   payload + i * BALE_PAGE_ENTRY_LEN) < 0) {
            return -EIO;
        }
        if (e.version == 0) {
            continue;
        }
        p->version = e.version;
        p->bucket = e.bucket;
        p->state = BALE_PAGE_SEALED;
        p->end = p->proven = p->allocated = e.end;
        /* Counted anew with the index: what the entry says is not trusted. */
        p->live_bytes = 0;
        p->first_seq = e.first_seq;
        p->tombstone_seq = e.tombstone_seq;
        if (e.open) {
            if (s->active[e.bucket] != PAGE_NONE) {
                return -EIO;
            }
            p->state = BALE_PAGE_ACTIVE;
            s->active[e.bucket] = part->a + i;
        }
    }
    return 0;
}

static int load_index(BaleStore *s, const BalePart *part,
                      const uint8_t *payload)
{
    BaleLayer *layer =
        part->a <= UINT32_MAX ? bale_layer_get(s, part->a) : NULL;

    if (!layer ||
        part->b + part->payload_len / 8 > bale_layer_clusters(layer)) {
        return -EIO;
    }
    for (uint32_t i = 0; i < part->payload_len / 8; i++) {
        uint64_t value = bale_get_le64(payload + i * 8);
        uint64_t page, offset;

        if (value == 0) {
            continue;
        }
        if (value >> BALE_VALUE_BITS ||
            !bale_address_split(s, bale_value_address(value), &page,
                                &offset) ||
            offset + BALE_RECORD_HEADER_LEN > bale_page(s, page)->end) {
            return -EIO;
        }
        if (bale_layer_index_set(layer, part->b + i, value, NULL) < 0) {
            return -ENOMEM;
        }
        bale_recover_count_live(part->b + i, value, s);
    }
    return 0;
}

static int load_catalogue(BaleStore *s, const BalePart *part)
{
    g_autofree uint8_t *payload = NULL;
    BaleCatalogue *cat;
    BaleRecord r;
    uint64_t page = (part->address - BALE_SUPER_SIZE) / s->page_size;
    uint64_t offset = (part->address - BALE_SUPER_SIZE) % s->page_size;
    uint32_t len = MIN(s->page_size - offset,
                       BALE_RECORD_HEADER_MAX + BALE_CATALOGUE_PAYLOAD_MAX);
    int ret;

    if (page >= s->pages->len || s->catalogue_address ||
        part->address >= s->dev_info.size) {
        return -EIO;
    }
    len = MIN(len, s->dev_info.size - part->address);
    ret =
        bale_recover_record(s, part->address, part->version, len, &r, &payload);
    if (ret < 0) {
        return ret;
    }
    ret = bale_catalogue_decode(&cat, r.type, s->cluster_size, payload,
                                r.payload_len);
    if (ret == 0) {
        ret = bale_catalogue_install(s, cat);
    }
    if (ret < 0) {
        return ret;
    }
    s->catalogue_address = part->address;
    bale_page_live_add(s, part->address, BALE_RECORD_HEADER_LEN);
    return 0;
}

static void load_note_record(BaleStore *s, uint64_t address, uint32_t len)
{
    BaleCheckpointRecord c = { address, len };

    g_array_append_val(s->checkpoint, c);
    bale_page_live_add(s, address, len);
}

/* Load all parts of @kind. */
static int load_parts(BaleStore *s, uint32_t parts, const uint8_t *p,
                      uint32_t kind)
{
    for (uint32_t i = 0; i < parts; i++) {
        g_autofree uint8_t *payload = NULL;
        BalePart part;
        BaleRecord r;
        int ret;

        if (bale_part_decode(&part, p + i * BALE_PART_LEN) < 0) {
            return -EIO;
        }
        if (part.kind != kind) {
            continue;
        }
        if (kind == BALE_PART_IMAGE) {
            ret = load_catalogue(s, &part);
        } else {
            uint32_t len = BALE_RECORD_HEADER_LEN + part.payload_len;

            ret = bale_recover_record(s, part.address, part.version, len, &r,
                                      &payload);
            if (ret == 0 && (r.type != BALE_RECORD_CHECKPOINT_PART ||
                             r.payload_len != part.payload_len)) {
                ret = -EIO;
            }
            if (ret == 0) {
                ret = kind == BALE_PART_PAGES ? load_pages(s, &part, payload)
                                              : load_index(s, &part, payload);
            }
        }
        if (ret < 0) {
            return ret;
        }
    }
    return 0;
}

int bale_recover_checkpoint(BaleStore *s)
{
    g_autofree uint8_t *payload = NULL;
    const BaleSuper *super = &s->super;
    uint64_t page, offset;
    BaleRecord r;
    BaleRoot root;
    int ret;

    ret = bale_recover_record(s, super->checkpoint_address,
                              super->checkpoint_version,
                              super->checkpoint_length, &r, &payload);
    if (ret < 0) {
        return ret;
    }
    if (r.type != BALE_RECORD_CHECKPOINT_ROOT ||
        bale_root_decode(&root, payload, r.payload_len) < 0 ||
        root.pages > (s->dev_info.size - BALE_SUPER_SIZE) / s->page_size + 1) {
        return -EIO;
    }
    ret = bale_page_table_grow(s, root.pages);
    if (ret == 0) {
        ret = load_parts(s, root.parts, payload + BALE_ROOT_FIXED_LEN,
                         BALE_PART_PAGES);
    }
    if (ret < 0) {
        return ret;
    }
    if (!bale_address_split(s, super->checkpoint_address, &page, &offset) ||
        (uint64_t)super->checkpoint_end * BALE_BLOCK_SIZE <
            offset + super->checkpoint_length ||
        bale_page(s, page)->version != super->checkpoint_version) {
        return -EIO;
    }
    bale_page(s, page)->end = bale_page(s, page)->proven =
        bale_page(s, page)->allocated =
            (uint64_t)super->checkpoint_end * BALE_BLOCK_SIZE;

    ret = load_parts(s, root.parts, payload + BALE_ROOT_FIXED_LEN,
                     BALE_PART_IMAGE);
    if (ret == 0) {
        ret = load_parts(s, root.parts, payload + BALE_ROOT_FIXED_LEN,
                         BALE_PART_INDEX);
    }
    if (ret < 0 || !s->catalogue_address) {
        return ret < 0 ? ret : -EIO;
    }

    load_note_record(s, super->checkpoint_address, super->checkpoint_length);
    for (uint32_t i = 0; i < root.parts; i++) {
        BalePart part;

        bale_part_decode(&part, payload + BALE_ROOT_FIXED_LEN +
                                    i * BALE_PART_LEN);
        if (part.kind != BALE_PART_IMAGE) {
            load_note_record(s, part.address,
                             BALE_RECORD_HEADER_LEN + part.payload_len);
        }
    }
    s->next_seq = MAX(root.next_seq, super->next_seq);
    return 0;
}

/* Forget what a checkpoint that turned out damaged has loaded. */
void bale_recover_reset(BaleStore *s)
{
    g_hash_table_remove_all(s->layers);
    bale_catalogue_free(s->catalogue);
    s->catalogue = bale_catalogue_new();
    s->catalogue_address = 0;
    g_array_set_size(s->pages, 0);
    g_array_set_size(s->checkpoint, 0);
    for (int b = 0; b < BALE_BUCKETS; b++) {
        s->active[b] = PAGE_NONE;
    }
    s->next_seq = 1;
}
