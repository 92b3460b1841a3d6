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

bool bale_recover_extent_ok(BaleStore *s, uint64_t address, uint64_t len)
{
    return address >= BALE_SUPER_SIZE && len >= BALE_RECORD_HEADER_LEN &&
           len <= s->page_size && address <= s->dev_info.size &&
           len <= s->dev_info.size - address &&
           (address - BALE_SUPER_SIZE) % s->page_size + len <= s->page_size;
}

int bale_recover_verify(BaleStore *s, uint64_t address, uint64_t version,
                        uint32_t len, BaleRecord *r, const uint8_t *p,
                        const uint8_t **payload)
{
    uint64_t page = (address - BALE_SUPER_SIZE) / s->page_size;
    uint64_t offset = (address - BALE_SUPER_SIZE) % s->page_size;
    uint64_t seed = bale_place(s->identity, page, version, offset);

    /* Up to the next record; that does not leave the block. */
    len = bale_align_up(len, BALE_RECORD_ALIGN);
    return bale_record_verify(r, seed, s->cluster_size, p, len,
                              payload) < 0 || r->version != version
               ? -EIO
               : 0;
}

static int recover_read(BaleStore *s, uint64_t address, uint64_t version,
                        uint32_t len, BaleRecord *r, uint8_t *buf,
                        const uint8_t **payload)
{
    uint64_t begin = bale_align_down(address, BALE_BLOCK_SIZE);
    uint64_t end = bale_align_up(address + len, BALE_BLOCK_SIZE);
    int ret = -EIO;

    if (bale_recover_extent_ok(s, address, len)) {
        ret = bale_device_get_sync(s->dev, begin, buf, end - begin);
    }
    return ret < 0 ? ret
                   : bale_recover_verify(s, address, version, len, r,
                                         buf + (address - begin), payload);
}

/* Bytes of the blocks in which a record of @len bytes lies. */
static uint64_t recover_room(uint64_t address, uint32_t len)
{
    return bale_align_up(address + len, BALE_BLOCK_SIZE) -
           bale_align_down(address, BALE_BLOCK_SIZE);
}

int bale_recover_record(BaleStore *s, uint64_t address, uint64_t version,
                        uint32_t len, BaleRecord *r, uint8_t **out)
{
    BALE_AUTO_MEMORY uint8_t *buf = NULL;
    const uint8_t *payload;
    int ret;

    buf = len <= s->page_size
              ? bale_memory_try_alloc(BALE_BLOCK_SIZE,
                                      recover_room(address, len))
              : NULL;
    if (!buf) {
        return len <= s->page_size ? -ENOMEM : -EIO;
    }
    ret = recover_read(s, address, version, len, r, buf, &payload);
    if (ret < 0) {
        return ret;
    }
    *out = g_try_malloc(r->payload_len + 1);
    if (!*out) {
        return -ENOMEM;
    }
    memcpy(*out, payload, r->payload_len);
    return 0;
}

bool bale_checkpoint_part_fits(BaleStore *s, const BalePart *part,
                               uint64_t *total)
{
    *total += BALE_RECORD_HEADER_LEN + (uint64_t)part->payload_len;
    return *total <= s->dev_info.size;
}

/* --- the page table --- */

static int load_page(Checkpoint *c, uint64_t page, const BalePageEntry *e)
{
    BaleStore *s = c->s;
    BalePage *p;

    if (e->version == 0 || (e->end == 0 && page_address(s, page) >= c->cut)) {
        return 0;
    }
    if (page >= s->pages->len) {
        if (c->exact) {
            return -EIO;
        }
        if (page_address(s, page) < c->cut && !c->lost) {
            bale_recover_report(s, "page %" PRIu64 " lies behind the end of "
                                "the device", page);
            c->lost = true;
        }
        return 0;
    }
    p = bale_page(s, page);
    p->version = e->version;
    p->bucket = e->bucket;
    p->state = BALE_PAGE_SEALED;
    p->end = p->proven = p->allocated = e->end;
    /* Counted anew with the index: what the entry says is not trusted. */
    p->live_bytes = 0;
    p->first_seq = e->first_seq;
    p->tombstone_seq = e->tombstone_seq;
    if (e->open) {
        if (s->active[e->bucket] != PAGE_NONE) {
            return -EIO;
        }
        p->state = BALE_PAGE_ACTIVE;
        s->active[e->bucket] = page;
    }
    return 0;
}

static int load_pages(Checkpoint *c, const BalePart *part,
                      const uint8_t *payload)
{
    int ret = part->b > c->root.pages ||
                      part->a > c->root.pages - part->b
                  ? -EIO
                  : 0;

    for (uint64_t i = 0; ret == 0 && i < part->b; i++) {
        BalePageEntry e;

        ret = bale_page_entry_decode(&e, c->s->page_size,
                                     payload + i * BALE_PAGE_ENTRY_LEN);
        if (ret == 0) {
            ret = load_page(c, part->a + i, &e);
        }
    }
    return ret;
}

/* --- the catalogue --- */

static int load_catalogue(Checkpoint *c, const BalePart *part)
{
    BaleStore *s = c->s;
    g_autofree uint8_t *payload = NULL;
    BaleCatalogue *cat;
    BaleRecord r;
    uint64_t page = (part->address - BALE_SUPER_SIZE) / s->page_size;
    uint64_t offset = (part->address - BALE_SUPER_SIZE) % s->page_size;
    uint32_t len = MIN(s->page_size - offset,
                       BALE_RECORD_HEADER_MAX + BALE_CATALOGUE_PAYLOAD_MAX);
    int ret;

    /* It must be where the checkpoint knows what there is. */
    if (page >= s->pages->len || s->catalogue_address ||
        offset + BALE_RECORD_HEADER_LEN > c->limit[page] ||
        bale_page(s, page)->bucket != BALE_BUCKET_META ||
        part->address >= s->dev_info.size) {
        return -EIO;
    }
    len = MIN(len, s->dev_info.size - part->address);
    ret = bale_recover_record(s, part->address, part->version, len, &r,
                              &payload);
    if (ret < 0) {
        return ret;
    }
    ret = bale_catalogue_decode(&cat, r.type, s->cluster_size, payload,
                                r.payload_len);
    if (ret < 0) {
        return ret;
    }
    ret = bale_limit_layers(s, cat);
    if (ret < 0) {
        bale_catalogue_free(cat);
        return ret;
    }
    ret = bale_catalogue_install(s, cat);
    if (ret < 0) {
        return ret;
    }
    s->catalogue_address = part->address;
    return 0;
}

/* Load all parts of @kind. */
static int load_parts(Checkpoint *c, uint32_t kind)
{
    for (uint32_t i = 0; i < c->root.parts; i++) {
        g_autofree uint8_t *payload = NULL;
        BalePart part;
        BaleRecord r;
        int ret;

        if (bale_part_decode(&part, c->payload + BALE_ROOT_FIXED_LEN +
                                        i * BALE_PART_LEN) < 0) {
            return -EIO;
        }
        if (part.kind != kind) {
            continue;
        }
        if (kind == BALE_PART_IMAGE) {
            ret = load_catalogue(c, &part);
        } else {
            uint32_t len = BALE_RECORD_HEADER_LEN + part.payload_len;

            ret = bale_recover_record(c->s, part.address, part.version, len,
                                      &r, &payload);
            if (ret == 0 && (r.type != BALE_RECORD_CHECKPOINT_PART ||
                             r.payload_len != part.payload_len)) {
                ret = -EIO;
            }
            if (ret == 0) {
                ret = load_pages(c, &part, payload);
            }
        }
        if (ret < 0) {
            return ret;
        }
    }
    return 0;
}

/* --- the checkpoint --- */

/* The root is the last record of a checkpoint; *@seq is its sequence. */
static int load_root(BaleStore *s, const BaleCheckpointRef *ref,
                     BaleRoot *root, uint64_t *seq, uint8_t **payload)
{
    BaleRecord r = { .seq = 0 };
    int ret;

    if (ref->address < BALE_SUPER_SIZE) {
        return -EIO;
    }
    ret = bale_recover_record(s, ref->address, ref->version, ref->length, &r,
                              payload);
    if (ret == 0 && (r.type != BALE_RECORD_CHECKPOINT_ROOT ||
                     bale_root_decode(root, *payload, r.payload_len) < 0)) {
        ret = -EIO;
    }
    *seq = r.seq;
    return ret;
}

/* Are all parts well formed, and can all of them be there? */
static int check_parts(Checkpoint *c)
{
    uint64_t total = 0;

    for (uint32_t i = 0; i < c->root.parts; i++) {
        BalePart part;

        if (bale_part_decode(&part, c->payload + BALE_ROOT_FIXED_LEN +
                                        i * BALE_PART_LEN) < 0 ||
            !bale_checkpoint_part_fits(c->s, &part, &total)) {
            return -EIO;
        }
    }
    return 0;
}

int bale_checkpoint_open(Checkpoint *c, BaleStore *s,
                         const BaleCheckpointRef *ref, bool exact)
{
    uint64_t page, offset, seq;
    int ret;

    *c = (Checkpoint){ .s = s, .ref = *ref, .exact = exact };
    c->pages = s->dev_info.size < BALE_SUPER_SIZE
                   ? 0
                   : (s->dev_info.size - BALE_SUPER_SIZE) / s->page_size + 1;
    c->stale = g_array_new(FALSE, FALSE, sizeof(StaleCluster));
    ret = load_root(s, ref, &c->root, &seq, &c->payload);
    if (ret == 0) {
        ret = check_parts(c);
    }
    if (ret < 0) {
        return ret;
    }
    c->end_seq = seq + 1;
    if (exact && c->root.pages > c->pages) {
        return -EIO;
    }
    /* Between two clean checkpoints a device only grows. */
    c->cut = c->root.next_seq < s->super.next_seq &&
                     ref->address != s->super.checkpoint.address
                 ? s->super.device_end
                 : UINT64_MAX;
    ret = bale_page_table_grow(s, c->pages);
    if (ret == 0) {
        ret = load_parts(c, BALE_PART_PAGES);
    }
    if (ret < 0) {
        return ret;
    }
    if (!bale_address_split(s, ref->address, &page, &offset) ||
        (uint64_t)ref->end * BALE_BLOCK_SIZE < offset + ref->length ||
        bale_page(s, page)->version != ref->version) {
        return -EIO;
    }
    bale_page(s, page)->end = bale_page(s, page)->proven =
        bale_page(s, page)->allocated = (uint64_t)ref->end * BALE_BLOCK_SIZE;

    c->limit = g_try_new0(uint64_t, s->pages->len + 1);
    for (uint64_t i = 0; c->limit && i < s->pages->len; i++) {
        c->limit[i] = bale_page(s, i)->end;
    }
    return c->limit ? 0 : -ENOMEM;
}

void bale_checkpoint_close(Checkpoint *c)
{
    g_free(c->payload);
    g_free(c->limit);
    g_array_free(c->stale, TRUE);
}

int bale_checkpoint_load(Checkpoint *c)
{
    int ret = load_parts(c, BALE_PART_IMAGE);

    if (ret == 0) {
        ret = bale_checkpoint_load_index(c);
    }
    return ret == 0 && !c->s->catalogue_address ? -EIO : ret;
}

static void note_record(BaleStore *s, GArray *records, uint64_t address,
                        uint32_t len)
{
    BaleCheckpointRecord c = { address, len };
    uint64_t page;

    /* A page that is free will be used for something else. */
    if (bale_page_has_metadata(s, address, len, &page)) {
        g_array_append_val(records, c);
        bale_page_live_add(s, address, len);
    }
}

static void note_records(BaleStore *s, GArray *records,
                         const BaleCheckpointRef *ref, const BaleRoot *root,
                         const uint8_t *payload)
{
    note_record(s, records, ref->address, ref->length);
    for (uint32_t i = 0; i < root->parts; i++) {
        BalePart part;

        if (bale_part_decode(&part, payload + BALE_ROOT_FIXED_LEN +
                                        i * BALE_PART_LEN) == 0) {
            note_record(s, records, part.address,
                        BALE_RECORD_HEADER_LEN + part.payload_len);
        }
    }
}

void bale_checkpoint_note(Checkpoint *c, const BaleCheckpointRef *previous)
{
    BaleStore *s = c->s;
    g_autofree uint8_t *payload = NULL;
    BaleRoot root;
    uint64_t seq;

    note_records(s, s->checkpoint, &c->ref, &c->root, c->payload);
    if (load_root(s, previous, &root, &seq, &payload) == 0) {
        note_records(s, s->previous, previous, &root, payload);
    }
    for (guint i = 0; i < s->checkpoint->len; i++) {
        s->checkpoint_size +=
            g_array_index(s->checkpoint, BaleCheckpointRecord, i).len;
    }
    s->checkpoint_cost = s->checkpoint_size;
}

RecoverResult bale_recover_exact(BaleStore *s, GError **errp)
{
    Checkpoint c;
    int ret = bale_checkpoint_open(&c, s, &s->super.checkpoint, true);

    if (ret == 0) {
        ret = bale_checkpoint_load(&c);
    }
    if (ret == 0) {
        bale_page_live_add(s, s->catalogue_address, BALE_RECORD_HEADER_LEN);
        bale_checkpoint_note(&c, &s->super.previous);
        s->next_seq = MAX(c.root.next_seq, s->super.next_seq);
        g_array_set_size(s->pages, c.root.pages);
    }
    bale_checkpoint_close(&c);
    if (ret == -ENOMEM) {
        bale_error_set(errp, ret, "reading the checkpoint");
        return RECOVER_FAILED;
    }
    return ret == 0 ? RECOVER_OK : RECOVER_DAMAGED;
}

void bale_recover_reset(BaleStore *s)
{
    g_hash_table_remove_all(s->layers);
    bale_catalogue_free(s->catalogue);
    s->catalogue = bale_catalogue_new();
    s->catalogue_address = 0;
    g_array_set_size(s->pages, 0);
    g_array_set_size(s->checkpoint, 0);
    g_array_set_size(s->previous, 0);
    s->checkpoint_size = s->checkpoint_cost = 0;
    s->recovered_records = 0;
    s->torn_bytes = 0;
    for (int b = 0; b < BALE_BUCKETS; b++) {
        s->active[b] = PAGE_NONE;
    }
    s->next_seq = 1;
}
