/*
 * Encoding and decoding of the on-disk format; see format.h.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "format.h"

#include <errno.h>
#include <string.h>

#include "util/checksum.h"
#include "util/memory.h"
#include "util/planted.h"

static const char super_magic[8] = "BALESTOR";
static const char page_magic[8] = "BALEPAGE";
static const char freed_magic[8] = "BALEFREE";
#define RECORD_MAGIC 0xB41EC0DEu

/*
 * Byte offsets of the fields.  They are written once, here, and the static
 * assertions below hold them to the document.
 */
enum {
    SUPER_MAGIC = 0,
    SUPER_VERSION = 8,
    SUPER_LENGTH = 12,
    SUPER_INCOMPATIBLE = 16,
    SUPER_RO_COMPATIBLE = 24,
    SUPER_COMPATIBLE = 32,
    SUPER_UUID = 40,
    SUPER_GENERATION = 56,
    SUPER_STATE = 64,
    SUPER_CLUSTER_SIZE = 68,
    SUPER_PAGE_SIZE = 72,
    SUPER_SUPER_SIZE = 80,
    SUPER_BLOCK_SIZE = 88,
    SUPER_COPY = 92,
    SUPER_CHECKPOINT = 96,
    SUPER_NEXT_SEQ = 120,
    SUPER_DEVICE_END = 128,
    SUPER_PREVIOUS = 136,
    SUPER_MAX_SIZE = 160,
    SUPER_CHECKSUM = 504,

    PAGE_MAGIC = 0,
    PAGE_BUCKET = 8,
    PAGE_LENGTH = 12,
    PAGE_NUMBER = 16,
    PAGE_VERSION = 24,
    PAGE_FIRST_SEQ = 32,
    PAGE_CHECKSUM = 56,

    RECORD_MAGIC_AT = 0,
    RECORD_TYPE = 4,
    RECORD_CODEC = 5,
    RECORD_FLAGS = 6,
    RECORD_PAYLOAD_LEN = 8,
    RECORD_HEADER_LEN = 12,
    RECORD_RESERVED = 14,
    RECORD_SEQ = 16,
    RECORD_VERSION = 24,
    RECORD_LAYER = 32,
    RECORD_COUNT = 36,
    RECORD_CLUSTER = 40,
    RECORD_PAYLOAD_SUM = 48,
    RECORD_HEADER_SUM = 56,
};

G_STATIC_ASSERT(SUPER_CHECKSUM + 8 == BALE_SUPER_LEN);
G_STATIC_ASSERT(PAGE_CHECKSUM + 8 == BALE_PAGE_HEADER_LEN);
G_STATIC_ASSERT(RECORD_HEADER_SUM + 8 == BALE_RECORD_HEADER_LEN);
G_STATIC_ASSERT(BALE_SUPER_COPIES * BALE_SUPER_STRIDE <= BALE_SUPER_SIZE);
G_STATIC_ASSERT(BALE_RECORD_HEADER_LEN % BALE_RECORD_ALIGN == 0);
G_STATIC_ASSERT(BALE_BLOCK_SIZE % BALE_RECORD_ALIGN == 0);
/* An address in units of the alignment, with its class, fills a value. */
G_STATIC_ASSERT(BALE_DEVICE_SIZE_MAX / BALE_RECORD_ALIGN * 16 ==
                1ull << BALE_VALUE_BITS);
G_STATIC_ASSERT(BALE_ROOT_FIXED_LEN + BALE_ROOT_PARTS_MAX * BALE_PART_LEN <=
                BALE_META_PAYLOAD_MAX);
G_STATIC_ASSERT(BALE_PAGE_ENTRIES_PER_PART * BALE_PAGE_ENTRY_LEN <=
                BALE_META_PAYLOAD_MAX);

/* --- accessors --- */

static uint16_t get16(const uint8_t *p)
{
    uint16_t v;

    memcpy(&v, p, sizeof(v));
    return GUINT16_FROM_LE(v);
}

static uint32_t get32(const uint8_t *p)
{
    uint32_t v;

    memcpy(&v, p, sizeof(v));
    return GUINT32_FROM_LE(v);
}

#define get64 bale_get_le64

static void put16(uint8_t *p, uint16_t v)
{
    v = GUINT16_TO_LE(v);
    memcpy(p, &v, sizeof(v));
}

static void put32(uint8_t *p, uint32_t v)
{
    v = GUINT32_TO_LE(v);
    memcpy(p, &v, sizeof(v));
}

#define put64 bale_put_le64

/* --- superblock --- */

static bool super_geometry_valid(uint32_t cluster_size, uint64_t page_size)
{
    return bale_is_power_of_2(cluster_size) &&
           cluster_size >= BALE_CLUSTER_SIZE_MIN &&
           cluster_size <= BALE_CLUSTER_SIZE_MAX && page_size > 0 &&
           page_size % BALE_PAGE_SIZE_UNIT == 0 &&
           page_size <= BALE_PAGE_SIZE_MAX &&
           page_size / BALE_PAGE_CLUSTERS_MIN >= cluster_size;
}

static void super_put_checkpoint(const BaleCheckpointRef *c, uint8_t *p)
{
    put64(p, c->address);
    put64(p + 8, c->version);
    put32(p + 16, c->length);
    put32(p + 20, c->end);
}

static void super_get_checkpoint(BaleCheckpointRef *c, const uint8_t *p)
{
    c->address = get64(p);
    c->version = get64(p + 8);
    c->length = get32(p + 16);
    c->end = get32(p + 20);
}

static bool super_checkpoint_valid(const BaleCheckpointRef *c,
                                   uint64_t page_size)
{
    return c->address < BALE_DEVICE_SIZE_MAX &&
           c->address % BALE_RECORD_ALIGN == 0 &&
           c->end <= page_size / BALE_BLOCK_SIZE &&
           c->length <= BALE_META_PAYLOAD_MAX + BALE_RECORD_HEADER_MAX;
}

void bale_super_encode(const BaleSuper *s, unsigned copy, uint8_t *buf)
{
    g_assert(copy < BALE_SUPER_COPIES);
    g_assert(super_geometry_valid(s->cluster_size, s->page_size));

    memset(buf, 0, BALE_BLOCK_SIZE);
    memcpy(buf + SUPER_MAGIC, super_magic, sizeof(super_magic));
    put32(buf + SUPER_VERSION, BALE_FORMAT_VERSION);
    put32(buf + SUPER_LENGTH, BALE_SUPER_LEN);
    put64(buf + SUPER_INCOMPATIBLE, s->incompatible);
    put64(buf + SUPER_RO_COMPATIBLE, s->ro_compatible);
    put64(buf + SUPER_COMPATIBLE, s->compatible);
    memcpy(buf + SUPER_UUID, s->uuid, sizeof(s->uuid));
    put64(buf + SUPER_GENERATION, s->generation);
    put32(buf + SUPER_STATE, s->state);
    put32(buf + SUPER_CLUSTER_SIZE, s->cluster_size);
    put64(buf + SUPER_PAGE_SIZE, s->page_size);
    put64(buf + SUPER_SUPER_SIZE, BALE_SUPER_SIZE);
    put32(buf + SUPER_BLOCK_SIZE, BALE_BLOCK_SIZE);
    put32(buf + SUPER_COPY, copy);
    super_put_checkpoint(&s->checkpoint, buf + SUPER_CHECKPOINT);
    put64(buf + SUPER_NEXT_SEQ, s->next_seq);
    put64(buf + SUPER_DEVICE_END, s->device_end);
    super_put_checkpoint(&s->previous, buf + SUPER_PREVIOUS);
    put64(buf + SUPER_MAX_SIZE, s->max_size);
    put64(buf + SUPER_CHECKSUM, bale_checksum(buf, SUPER_CHECKSUM,
                                              bale_super_address(copy)));
}

int bale_super_decode(BaleSuper *s, unsigned copy, const uint8_t *buf,
                      const char **reason)
{
    const char *ignored;

    reason = reason ? reason : &ignored;
    *reason = NULL;
    if (memcmp(buf + SUPER_MAGIC, super_magic, sizeof(super_magic))) {
        *reason = "no superblock";
        return -ENOENT;
    }
    s->version = get32(buf + SUPER_VERSION);
    if (s->version != BALE_FORMAT_VERSION) {
        *reason = "the format version is newer than this program knows";
        return -ENOTSUP;
    }
    if (get64(buf + SUPER_CHECKSUM) !=
            bale_checksum(buf, SUPER_CHECKSUM, bale_super_address(copy)) ||
        get32(buf + SUPER_COPY) != copy) {
        *reason = "the checksum of the superblock does not match";
        return -EIO;
    }

    s->incompatible = get64(buf + SUPER_INCOMPATIBLE);
    s->ro_compatible = get64(buf + SUPER_RO_COMPATIBLE);
    s->compatible = get64(buf + SUPER_COMPATIBLE);
    memcpy(s->uuid, buf + SUPER_UUID, sizeof(s->uuid));
    s->generation = get64(buf + SUPER_GENERATION);
    s->state = get32(buf + SUPER_STATE);
    s->cluster_size = get32(buf + SUPER_CLUSTER_SIZE);
    s->page_size = get64(buf + SUPER_PAGE_SIZE);
    super_get_checkpoint(&s->checkpoint, buf + SUPER_CHECKPOINT);
    s->next_seq = get64(buf + SUPER_NEXT_SEQ);
    s->device_end = get64(buf + SUPER_DEVICE_END);
    super_get_checkpoint(&s->previous, buf + SUPER_PREVIOUS);
    s->max_size = get64(buf + SUPER_MAX_SIZE);

    if (s->incompatible & ~(uint64_t)BALE_INCOMPAT_KNOWN) {
        *reason = "an incompatible feature that this program does not know";
        return -ENOTSUP;
    }
    if (get32(buf + SUPER_LENGTH) != BALE_SUPER_LEN ||
        get64(buf + SUPER_SUPER_SIZE) != BALE_SUPER_SIZE ||
        get32(buf + SUPER_BLOCK_SIZE) != BALE_BLOCK_SIZE ||
        !super_geometry_valid(s->cluster_size, s->page_size) ||
        s->generation == 0 || s->generation > UINT32_MAX ||
        (s->state & ~(uint32_t)BALE_STATE_CLEAN) ||
        s->device_end > BALE_DEVICE_SIZE_MAX ||
        !super_checkpoint_valid(&s->checkpoint, s->page_size) ||
        !super_checkpoint_valid(&s->previous, s->page_size)) {
        *reason = "a field of the superblock is out of range";
        return -EIO;
    }
    return 0;
}

bool bale_store_probe(const void *buf, size_t len)
{
    return len >= SUPER_LENGTH &&
           !memcmp(buf, super_magic, sizeof(super_magic));
}

/* --- places --- */

uint64_t bale_identity(const uint8_t uuid[16])
{
    return bale_checksum(uuid, 16, 0);
}

uint64_t bale_place(uint64_t identity, uint64_t page, uint64_t version,
                    uint64_t offset)
{
    uint8_t b[24];

    if (BALE_PLANTED(checksum_unseeded)) {
        page = version = offset = 0;
    }
    put64(b, page);
    put64(b + 8, version);
    put64(b + 16, offset);
    return bale_checksum(b, sizeof(b), identity);
}

/* --- page header --- */

void bale_page_header_encode(const BalePageHeader *h, uint64_t identity,
                             uint8_t *buf)
{
    g_assert(h->bucket < BALE_BUCKETS && h->version != 0);

    memset(buf, 0, BALE_BLOCK_SIZE);
    memcpy(buf + PAGE_MAGIC, h->freed ? freed_magic : page_magic,
           sizeof(page_magic));
    put32(buf + PAGE_BUCKET, h->bucket);
    put32(buf + PAGE_LENGTH, BALE_PAGE_HEADER_LEN);
    put64(buf + PAGE_NUMBER, h->page);
    put64(buf + PAGE_VERSION, h->version);
    put64(buf + PAGE_FIRST_SEQ, h->first_seq);
    put64(buf + PAGE_CHECKSUM,
          bale_checksum(buf, PAGE_CHECKSUM,
                        bale_place(identity, h->page, 0, 0)));
}

int bale_page_header_decode(BalePageHeader *h, uint64_t identity,
                            uint64_t page, const uint8_t *buf)
{
    h->freed = !memcmp(buf + PAGE_MAGIC, freed_magic, sizeof(freed_magic));
    if (!h->freed &&
        memcmp(buf + PAGE_MAGIC, page_magic, sizeof(page_magic))) {
        return bale_memory_is_zero(buf, BALE_BLOCK_SIZE) ? -ENOENT : -EIO;
    }
    if (get64(buf + PAGE_CHECKSUM) !=
        bale_checksum(buf, PAGE_CHECKSUM,
                      bale_place(identity, page, 0, 0))) {
        return -EIO;
    }
    h->bucket = get32(buf + PAGE_BUCKET);
    h->page = get64(buf + PAGE_NUMBER);
    h->version = get64(buf + PAGE_VERSION);
    h->first_seq = get64(buf + PAGE_FIRST_SEQ);
    if (h->page != page || h->bucket >= BALE_BUCKETS || h->version == 0 ||
        get32(buf + PAGE_LENGTH) != BALE_PAGE_HEADER_LEN) {
        return -EIO;
    }
    return 0;
}

/* --- records --- */

static uint64_t record_header_sum(const uint8_t *buf, size_t len,
                                  uint64_t seed)
{
    uint8_t copy[BALE_RECORD_HEADER_MAX];

    g_assert(len >= BALE_RECORD_HEADER_LEN && len <= sizeof(copy));
    memcpy(copy, buf, len);
    memset(copy + RECORD_HEADER_SUM, 0, 8);
    return bale_checksum(copy, len, seed);
}

void bale_record_encode(const BaleRecord *r, uint64_t seed, uint8_t *buf)
{
    put32(buf + RECORD_MAGIC_AT, RECORD_MAGIC);
    buf[RECORD_TYPE] = r->type;
    buf[RECORD_CODEC] = r->codec;
    put16(buf + RECORD_FLAGS, r->flags);
    put32(buf + RECORD_PAYLOAD_LEN, r->payload_len);
    put16(buf + RECORD_HEADER_LEN, BALE_RECORD_HEADER_LEN);
    put16(buf + RECORD_RESERVED, 0);
    put64(buf + RECORD_SEQ, r->seq);
    put64(buf + RECORD_VERSION, r->version);
    put32(buf + RECORD_LAYER, r->layer);
    put32(buf + RECORD_COUNT, r->count);
    put64(buf + RECORD_CLUSTER, r->cluster);
    put64(buf + RECORD_PAYLOAD_SUM, r->payload_sum);
    put64(buf + RECORD_HEADER_SUM,
          record_header_sum(buf, BALE_RECORD_HEADER_LEN, seed));
}

/*
 * The caps that hold for a record wherever its description was read.  Types
 * are checked by whoever uses the record.
 */
static bool record_in_range(const BaleRecord *r, uint32_t cluster_size)
{
    uint32_t payload_max = BALE_META_PAYLOAD_MAX;
    uint32_t payload_min = 0;

    if (r->header_len < BALE_RECORD_HEADER_LEN ||
        r->header_len > BALE_RECORD_HEADER_MAX ||
        r->header_len % BALE_RECORD_ALIGN) {
        return false;
    }
    switch (r->type) {
    case BALE_RECORD_DATA:
        payload_min = r->codec == BALE_CODEC_NONE ? cluster_size : 1;
        payload_max = cluster_size;
        if (r->count != 1 || !bale_codec_valid(r->codec)) {
            return false;
        }
        break;
    case BALE_RECORD_ZERO:
        if (r->count == 0) {
            return false;
        }
        /* fall through */
    case BALE_RECORD_DROP:
        payload_max = 0;
        break;
    case BALE_RECORD_PATCH:
        payload_min = r->codec == BALE_CODEC_NONE
                          ? 1
                          : BALE_PATCH_PACKED_LEN + 1;
        payload_max = cluster_size;
        if (r->count >= cluster_size || !bale_codec_valid(r->codec) ||
            (r->codec == BALE_CODEC_NONE &&
             r->payload_len > cluster_size - r->count)) {
            return false;
        }
        break;
    case BALE_RECORD_IMAGE:
        payload_min = BALE_IMAGE_FIXED_LEN;
        payload_max = BALE_IMAGE_PAYLOAD_MAX;
        break;
    case BALE_RECORD_CATALOGUE:
        payload_min = BALE_CATALOGUE_FIXED_LEN;
        payload_max = BALE_CATALOGUE_PAYLOAD_MAX;
        break;
    case BALE_RECORD_SEGMENT:
        payload_min = BALE_SEGMENT_PAYLOAD_LEN;
        payload_max = bale_segment_payload_len(BALE_BARRIERS_MAX);
        break;
    default:
        break;
    }
    if (r->type != BALE_RECORD_DATA && r->type != BALE_RECORD_PATCH &&
        r->codec != BALE_CODEC_NONE) {
        return false;
    }
    return r->payload_len >= payload_min && r->payload_len <= payload_max &&
           r->cluster <= BALE_IMAGE_CLUSTERS_MAX;
}

int bale_record_decode(BaleRecord *r, uint64_t seed, uint32_t cluster_size,
                       const uint8_t *buf, size_t avail)
{
    if (avail < BALE_RECORD_HEADER_LEN ||
        get32(buf + RECORD_MAGIC_AT) != RECORD_MAGIC) {
        return -ENOENT;
    }
    r->header_len = get16(buf + RECORD_HEADER_LEN);
    if (r->header_len < BALE_RECORD_HEADER_LEN ||
        r->header_len > BALE_RECORD_HEADER_MAX || r->header_len > avail ||
        get64(buf + RECORD_HEADER_SUM) !=
            record_header_sum(buf, r->header_len, seed)) {
        return -EIO;
    }
    r->type = buf[RECORD_TYPE];
    r->codec = buf[RECORD_CODEC];
    r->flags = get16(buf + RECORD_FLAGS);
    r->payload_len = get32(buf + RECORD_PAYLOAD_LEN);
    r->seq = get64(buf + RECORD_SEQ);
    r->version = get64(buf + RECORD_VERSION);
    r->layer = get32(buf + RECORD_LAYER);
    r->count = get32(buf + RECORD_COUNT);
    r->cluster = get64(buf + RECORD_CLUSTER);
    r->payload_sum = get64(buf + RECORD_PAYLOAD_SUM);
    /* The low flags must be understood. */
    if (!record_in_range(r, cluster_size) ||
        (r->flags & 0xff &
         ~(r->type == BALE_RECORD_PATCH ? BALE_PATCH_BARE : 0))) {
        return -EIO;
    }
    return 0;
}

int bale_record_verify(BaleRecord *r, uint64_t seed, uint32_t cluster_size,
                       const uint8_t *buf, size_t avail,
                       const uint8_t **payload)
{
    int ret = bale_record_decode(r, seed, cluster_size, buf, avail);

    if (ret < 0) {
        return ret;
    }
    if (bale_record_size(r) > avail) {
        return -EIO;
    }
    *payload = buf + r->header_len;
    return bale_checksum(*payload, r->payload_len, seed) == r->payload_sum
               ? 0
               : -EIO;
}

uint64_t bale_record_claimed_version(const uint8_t *buf)
{
    return get64(buf + RECORD_VERSION);
}

/* --- patches --- */

void bale_patch_packed_encode(uint32_t bytes, uint8_t *buf)
{
    put32(buf, bytes);
}

uint32_t bale_patch_bytes(const BaleRecord *r, uint32_t cluster_size,
                          const uint8_t *payload)
{
    uint32_t bytes;

    if (r->codec == BALE_CODEC_NONE) {
        return r->payload_len; /* the header says that it fits */
    }
    bytes = get32(payload);
    return bytes <= cluster_size - r->count ? bytes : 0;
}

/* --- segment --- */

void bale_segment_encode(const BaleSegment *s, uint8_t *buf)
{
    g_assert(s->barriers <= BALE_BARRIERS_MAX);
    put64(buf, s->segment_len);
    put64(buf + 8, s->directory_offset);
    put32(buf + 16, s->records);
    put32(buf + 20, s->barriers);
    for (uint32_t i = 0; i < s->barriers; i++) {
        uint8_t *p = buf + bale_segment_payload_len(i);

        put64(p, s->barrier[i].page);
        put64(p + 8, s->barrier[i].version);
        put64(p + 16, s->barrier[i].durable_end);
    }
}

int bale_segment_decode(BaleSegment *s, uint64_t offset, uint64_t page_size,
                        const uint8_t *buf, size_t len)
{
    uint64_t first;

    if (len < BALE_SEGMENT_PAYLOAD_LEN) {
        return -EIO;
    }
    s->segment_len = get64(buf);
    s->directory_offset = get64(buf + 8);
    s->records = get32(buf + 16);
    s->barriers = get32(buf + 20);
    if (s->barriers > BALE_BARRIERS_MAX ||
        len != bale_segment_payload_len(s->barriers)) {
        return -EIO;
    }
    first = offset + BALE_RECORD_HEADER_LEN + len;
    if (offset >= page_size || s->segment_len == 0 ||
        s->segment_len % BALE_BLOCK_SIZE ||
        s->segment_len > page_size - offset ||
        s->directory_offset % BALE_RECORD_ALIGN ||
        s->directory_offset < first ||
        s->directory_offset > offset + s->segment_len -
                                  BALE_RECORD_HEADER_LEN ||
        s->records > s->segment_len / BALE_RECORD_HEADER_LEN) {
        return -EIO;
    }
    for (uint32_t i = 0; i < s->barriers; i++) {
        const uint8_t *p = buf + bale_segment_payload_len(i);

        s->barrier[i].page = get64(p);
        s->barrier[i].version = get64(p + 8);
        s->barrier[i].durable_end = get64(p + 16);
        if (s->barrier[i].durable_end > page_size ||
            s->barrier[i].durable_end % BALE_BLOCK_SIZE) {
            return -EIO;
        }
    }
    return 0;
}

/* --- directory --- */

void bale_directory_entry_encode(const BaleDirectoryEntry *e, uint8_t *buf)
{
    const BaleRecord *r = &e->record;

    put64(buf, r->seq);
    put64(buf + 8, r->cluster);
    put32(buf + 16, r->layer);
    put32(buf + 20, r->count);
    put32(buf + 24, e->offset / BALE_RECORD_ALIGN);
    put32(buf + 28, r->payload_len);
    buf[32] = r->type;
    buf[33] = r->codec;
    put16(buf + 34, r->flags);
    put16(buf + 36, BALE_RECORD_HEADER_LEN);
    put16(buf + 38, 0);
}

int bale_directory_entry_decode(BaleDirectoryEntry *e, uint64_t begin,
                                uint64_t end, uint32_t cluster_size,
                                const uint8_t *buf)
{
    BaleRecord *r = &e->record;

    memset(r, 0, sizeof(*r));
    r->seq = get64(buf);
    r->cluster = get64(buf + 8);
    r->layer = get32(buf + 16);
    r->count = get32(buf + 20);
    e->offset = (uint64_t)get32(buf + 24) * BALE_RECORD_ALIGN;
    r->payload_len = get32(buf + 28);
    r->type = buf[32];
    r->codec = buf[33];
    r->flags = get16(buf + 34);
    r->header_len = get16(buf + 36);
    if (!record_in_range(r, cluster_size) || e->offset < begin ||
        e->offset > end || bale_record_size(r) > end - e->offset) {
        return -EIO;
    }
    return 0;
}

/* --- image --- */

uint32_t bale_image_encode(const BaleImageRecord *i, uint8_t *buf)
{
    size_t name_len = strlen(i->name);
    size_t backing_len = strlen(i->backing_file);
    size_t format_len = strlen(i->backing_format);
    uint8_t *p = buf + BALE_IMAGE_FIXED_LEN;

    memset(buf, 0, BALE_IMAGE_FIXED_LEN);
    put32(buf, i->id);
    put32(buf + 4, i->layer);
    put64(buf + 8, i->size);
    buf[16] = i->codec;
    buf[17] = (uint8_t)i->level;
    put16(buf + 18, name_len);
    put16(buf + 20, backing_len);
    put16(buf + 22, format_len);
    memcpy(p, i->name, name_len);
    p += name_len;
    memcpy(p, i->backing_file, backing_len);
    p += backing_len;
    memcpy(p, i->backing_format, format_len);
    p += format_len;
    return p - buf;
}

/* Copy a string of @len bytes out of a record; it may not hold a NUL. */
static bool image_get_string(char *dst, size_t dst_len, const uint8_t **p,
                             size_t len)
{
    if (len >= dst_len || memchr(*p, 0, len)) {
        return false;
    }
    memcpy(dst, *p, len);
    dst[len] = 0;
    *p += len;
    return g_utf8_validate(dst, len, NULL);
}

int bale_image_decode(BaleImageRecord *i, uint32_t cluster_size,
                      const uint8_t *buf, size_t len)
{
    const uint8_t *p = buf + BALE_IMAGE_FIXED_LEN;
    size_t name_len, backing_len, format_len;

    if (len < BALE_IMAGE_FIXED_LEN || len > BALE_IMAGE_PAYLOAD_MAX) {
        return -EIO;
    }
    i->id = get32(buf);
    i->layer = get32(buf + 4);
    i->size = get64(buf + 8);
    i->codec = buf[16];
    i->level = (int8_t)buf[17];
    name_len = get16(buf + 18);
    backing_len = get16(buf + 20);
    format_len = get16(buf + 22);
    if (i->id == 0 || i->layer == 0 || i->size > BALE_IMAGE_SIZE_MAX ||
        i->size / cluster_size >= BALE_IMAGE_CLUSTERS_MAX ||
        !bale_codec_valid(i->codec) ||
        !bale_codec_check_level(i->codec, i->level, NULL) ||
        name_len + backing_len + format_len != len - BALE_IMAGE_FIXED_LEN ||
        !image_get_string(i->name, sizeof(i->name), &p, name_len) ||
        !image_get_string(i->backing_file, sizeof(i->backing_file), &p,
                          backing_len) ||
        !image_get_string(i->backing_format, sizeof(i->backing_format), &p,
                          format_len)) {
        return -EIO;
    }
    return 0;
}

/* --- checkpoint --- */

void bale_root_encode(const BaleRoot *r, uint8_t *buf)
{
    memset(buf, 0, BALE_ROOT_FIXED_LEN);
    put64(buf, r->next_seq);
    put64(buf + 8, r->pages);
    put32(buf + 16, r->parts);
}

int bale_root_decode(BaleRoot *r, const uint8_t *buf, size_t len)
{
    if (len < BALE_ROOT_FIXED_LEN) {
        return -EIO;
    }
    r->next_seq = get64(buf);
    r->pages = get64(buf + 8);
    r->parts = get32(buf + 16);
    if (r->parts > BALE_ROOT_PARTS_MAX ||
        len != BALE_ROOT_FIXED_LEN + (size_t)r->parts * BALE_PART_LEN ||
        r->pages > BALE_DEVICE_SIZE_MAX / BALE_PAGE_SIZE_UNIT) {
        return -EIO;
    }
    return 0;
}

void bale_part_encode(const BalePart *p, uint8_t *buf)
{
    put32(buf, p->kind);
    put32(buf + 4, p->payload_len);
    put64(buf + 8, p->address);
    put64(buf + 16, p->version);
    put64(buf + 24, p->a);
    put64(buf + 32, p->b);
}

int bale_part_decode(BalePart *p, const uint8_t *buf)
{
    p->kind = get32(buf);
    p->payload_len = get32(buf + 4);
    p->address = get64(buf + 8);
    p->version = get64(buf + 16);
    p->a = get64(buf + 24);
    p->b = get64(buf + 32);
    if (p->payload_len > BALE_META_PAYLOAD_MAX ||
        p->address < BALE_SUPER_SIZE || p->address >= BALE_DEVICE_SIZE_MAX ||
        p->address % BALE_RECORD_ALIGN) {
        return -EIO;
    }
    switch (p->kind) {
    case BALE_PART_PAGES:
        return p->b <= BALE_PAGE_ENTRIES_PER_PART &&
                       p->payload_len == p->b * BALE_PAGE_ENTRY_LEN
                   ? 0
                   : -EIO;
    case BALE_PART_INDEX:
        return p->b % BALE_CHUNK_CLUSTERS == 0 &&
                       p->b < BALE_IMAGE_CLUSTERS_MAX &&
                       p->payload_len % 8 == 0 &&
                       p->payload_len / 8 <= BALE_CHUNK_CLUSTERS
                   ? 0
                   : -EIO;
    case BALE_PART_IMAGE:
        return 0;
    default:
        return -EIO;
    }
}

void bale_page_entry_encode(const BalePageEntry *e, uint8_t *buf)
{
    put64(buf, e->version);
    put32(buf + 8, e->bucket);
    put32(buf + 12, e->open);
    put64(buf + 16, e->end);
    put64(buf + 24, e->live_bytes);
    put64(buf + 32, e->first_seq);
    put64(buf + 40, e->tombstone_seq);
}

int bale_page_entry_decode(BalePageEntry *e, uint64_t page_size,
                           const uint8_t *buf)
{
    e->version = get64(buf);
    e->bucket = get32(buf + 8);
    e->open = get32(buf + 12) & 1;
    e->end = get64(buf + 16);
    e->live_bytes = get64(buf + 24);
    e->first_seq = get64(buf + 32);
    e->tombstone_seq = get64(buf + 40);
    return e->bucket < BALE_BUCKETS && e->end <= page_size &&
                   e->end % BALE_BLOCK_SIZE == 0 &&
                   e->live_bytes <= BALE_DEVICE_SIZE_MAX
               ? 0
               : -EIO;
}
