/*
 * The on-disk format, version 1: offsets, sizes and the only code that reads
 * or writes on-disk fields.  docs/format.md is the specification.
 *
 * Everything that is decoded here is hostile, also after its checksum has
 * passed: decoders check every length and range against the caps of the
 * document, so that callers can use a decoded structure without a further
 * thought about overflow.
 *
 * Threads: pure functions.  Errors: 0 or -errno: -ENOENT where there is nothing
 * (no magic), -EIO for damage, -ENOTSUP for what a newer version wrote.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef BALE_EXTSTORE_FORMAT_H
#define BALE_EXTSTORE_FORMAT_H

#include <glib.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "extstore/store.h"
#include "util/planted.h"

#define BALE_FORMAT_VERSION   1u
#define BALE_BLOCK_SIZE       4096u
#define BALE_SUPER_SIZE       (2ull << 20)
#define BALE_SUPER_COPIES     4u
#define BALE_SUPER_STRIDE     (512ull << 10) /* between two copies, bytes */
#define BALE_DEVICE_SIZE_MAX  (1ull << 48)
#define BALE_META_PAYLOAD_MAX (4u << 20)

/* --- superblock --- */

#define BALE_SUPER_LEN 512u

enum {
    BALE_INCOMPAT_CORRUPT = 1u << 0,
    BALE_INCOMPAT_KNOWN   = BALE_INCOMPAT_CORRUPT,
};

enum {
    BALE_STATE_CLEAN = 1u << 0,
};

/* Where a checkpoint's root record is; address 0: there is none. */
typedef struct BaleCheckpointRef {
    uint64_t address, version;
    uint32_t length;
    uint32_t end; /* of the root's segment in its page, blocks */
} BaleCheckpointRef;

typedef struct BaleSuper {
    uint32_t version;    /* set by decode, also when that is -ENOTSUP */
    uint64_t incompatible, ro_compatible, compatible;
    uint8_t uuid[16];
    uint64_t generation;
    uint32_t state;
    uint32_t cluster_size;
    uint64_t page_size;
    BaleCheckpointRef checkpoint, previous;
    uint64_t next_seq;
    uint64_t device_end;
    uint64_t max_size;   /* bytes; 0: no limit but the device's */
} BaleSuper;

static inline uint64_t bale_super_address(unsigned copy)
{
    return copy * BALE_SUPER_STRIDE;
}

/* @buf: BALE_BLOCK_SIZE bytes. */
void bale_super_encode(const BaleSuper *s, unsigned copy, uint8_t *buf);
/*
 * -ENOENT: no superblock; -EIO: damaged; -ENOTSUP: another version or unknown
 * incompatible features, which *@reason (static, may be NULL) names.
 */
int bale_super_decode(BaleSuper *s, unsigned copy, const uint8_t *buf,
                      const char **reason);

/* --- places --- */

/* The seed of everything in the store with @uuid. */
uint64_t bale_identity(const uint8_t uuid[16]);
/* The seed of what lies at @offset in @page while that has @version. */
uint64_t bale_place(uint64_t identity, uint64_t page, uint64_t version,
                    uint64_t offset);

/* --- page header --- */

typedef enum BaleBucket {
    BALE_BUCKET_FRESH = 0,
    BALE_BUCKET_META = 1,
    BALE_BUCKET_COMPACTED = 2,
    BALE_BUCKETS
} BaleBucket;

#define BALE_PAGE_HEADER_LEN 64u

typedef struct BalePageHeader {
    uint32_t bucket;
    uint64_t page, version, first_seq;
    bool freed;   /* a mark: this version of the page was given up */
} BalePageHeader;

/* @buf: BALE_BLOCK_SIZE bytes. */
void bale_page_header_encode(const BalePageHeader *h, uint64_t identity,
                             uint8_t *buf);
/* -ENOENT: the block is all zeroes; -EIO: damaged. */
int bale_page_header_decode(BalePageHeader *h, uint64_t identity,
                            uint64_t page, const uint8_t *buf);

/* --- records --- */

#define BALE_RECORD_ALIGN      16u
#define BALE_RECORD_HEADER_LEN 64u
#define BALE_RECORD_HEADER_MAX 256u

typedef enum BaleRecordType {
    BALE_RECORD_DATA = 1,
    BALE_RECORD_ZERO = 2,
    BALE_RECORD_IMAGE = 3,
    BALE_RECORD_SEGMENT = 4,
    BALE_RECORD_DIRECTORY = 5,
    BALE_RECORD_CHECKPOINT_PART = 6,
    BALE_RECORD_CHECKPOINT_ROOT = 7,
    BALE_RECORD_DROP = 8,
    BALE_RECORD_CATALOGUE = 9,
    BALE_RECORD_PATCH = 10,   /* count: the offset in the cluster */
    BALE_RECORD_SKIPPABLE = 128, /* unknown types from here on may be skipped */
} BaleRecordType;

typedef struct BaleRecord {
    uint8_t type;
    uint8_t codec;
    uint16_t flags;
    uint16_t header_len;
    uint32_t payload_len;
    uint64_t seq;
    uint64_t version;
    uint32_t layer;
    uint32_t count;
    uint64_t cluster;
    uint64_t payload_sum;
} BaleRecord;

/* Bytes that a record takes in its segment. */
static inline uint32_t bale_record_size(const BaleRecord *r)
{
    return (r->header_len + r->payload_len + BALE_RECORD_ALIGN - 1) &
           ~(BALE_RECORD_ALIGN - 1);
}

/* Flag of a patch: no record held the cluster, what it leaves out is zero. */
#define BALE_PATCH_BARE 1u

/* A patch with a codec: before what is compressed, how many bytes that is. */
#define BALE_PATCH_PACKED_LEN 4u

/* @buf: BALE_PATCH_PACKED_LEN bytes. */
void bale_patch_packed_encode(uint32_t bytes, uint8_t *buf);
/*
 * How many bytes of its cluster a patch has, whose header was decoded and whose
 * @payload verified; 0: more than there are from its offset on, or none.
 */
uint32_t bale_patch_bytes(const BaleRecord *r, uint32_t cluster_size,
                          const uint8_t *payload);

/* The patches that count are bounded: memory holds what they say. */
#define BALE_PATCHED_BYTES           (32u << 20)
#define BALE_PATCHED_CLUSTERS_MIN    8u
#define BALE_PATCHES_PER_CLUSTER_MAX 256u

/* Of a layer, clusters with patches that count. */
static inline uint32_t bale_patched_clusters_max(uint32_t cluster_size)
{
    return MAX(BALE_PATCHED_BYTES / cluster_size, BALE_PATCHED_CLUSTERS_MIN);
}

/* @buf: BALE_RECORD_HEADER_LEN bytes; @r->header_len is ignored. */
void bale_record_encode(const BaleRecord *r, uint64_t seed, uint8_t *buf);

/*
 * Decode the header at @buf of which @avail bytes may be read, and check it
 * against the caps for @cluster_size.  The payload is not looked at.
 * -ENOENT: no record begins here.  -EIO: damaged, or out of range.
 */
int bale_record_decode(BaleRecord *r, uint64_t seed, uint32_t cluster_size,
                       const uint8_t *buf, size_t avail);

/*
 * The same for a record that lies in @buf as a whole, with its payload, to
 * which *@payload points on success.  -EIO also if it does not fit or its
 * payload does not verify.
 */
int bale_record_verify(BaleRecord *r, uint64_t seed, uint32_t cluster_size,
                       const uint8_t *buf, size_t avail,
                       const uint8_t **payload);

/* Only the version that a header claims, checked against nothing. */
uint64_t bale_record_claimed_version(const uint8_t *buf);

/* --- segment record --- */

#define BALE_BARRIERS_MAX 64u
#define BALE_BARRIER_LEN  24u
#define BALE_SEGMENT_PAYLOAD_LEN 24u /* without barriers */

typedef struct BaleBarrier {
    uint64_t page, version, durable_end;
} BaleBarrier;

typedef struct BaleSegment {
    uint64_t segment_len;
    uint64_t directory_offset;
    uint32_t records;
    uint32_t barriers;
    BaleBarrier barrier[BALE_BARRIERS_MAX];
} BaleSegment;

static inline uint32_t bale_segment_payload_len(uint32_t barriers)
{
    return BALE_SEGMENT_PAYLOAD_LEN + barriers * BALE_BARRIER_LEN;
}

void bale_segment_encode(const BaleSegment *s, uint8_t *buf);
/* @offset: of the segment in its page of @page_size bytes. */
int bale_segment_decode(BaleSegment *s, uint64_t offset, uint64_t page_size,
                        const uint8_t *buf, size_t len);

/* --- directory --- */

#define BALE_DIRECTORY_ENTRY_LEN 40u

typedef struct BaleDirectoryEntry {
    BaleRecord record;  /* without version and payload_sum */
    uint64_t offset;    /* in the page, bytes */
} BaleDirectoryEntry;

void bale_directory_entry_encode(const BaleDirectoryEntry *e, uint8_t *buf);
/* @begin, @end: where in the page records of this segment may lie. */
int bale_directory_entry_decode(BaleDirectoryEntry *e, uint64_t begin,
                                uint64_t end, uint32_t cluster_size,
                                const uint8_t *buf);

/* --- image --- */

#define BALE_IMAGE_FIXED_LEN 32u
#define BALE_IMAGE_PAYLOAD_MAX                                               \
    (BALE_IMAGE_FIXED_LEN + BALE_IMAGE_NAME_MAX + BALE_BACKING_NAME_MAX + 63)

typedef struct BaleImageRecord {
    uint32_t id;
    uint32_t layer;
    uint64_t size;
    uint8_t codec;
    int8_t level;
    char name[BALE_IMAGE_NAME_MAX + 1];
    char backing_file[BALE_BACKING_NAME_MAX + 1];
    char backing_format[64];
} BaleImageRecord;

/* @buf: BALE_IMAGE_PAYLOAD_MAX bytes.  The length of the payload. */
uint32_t bale_image_encode(const BaleImageRecord *i, uint8_t *buf);
int bale_image_decode(BaleImageRecord *i, uint32_t cluster_size,
                      const uint8_t *buf, size_t len);

/* --- catalogue (format-catalogue.c) --- */

#define BALE_CATALOGUE_FIXED_LEN    32u
#define BALE_CATALOGUE_LAYER_LEN    32u
#define BALE_CATALOGUE_ALIAS_LEN    16u
#define BALE_CATALOGUE_SNAPSHOT_LEN 40u /* without its name */
#define BALE_CATALOGUE_IMAGE_LEN    32u /* without its strings */
#define BALE_CATALOGUE_BITMAP_LEN   32u /* without its name */
#define BALE_CATALOGUE_PAYLOAD_MAX  (1u << 20)

typedef struct BaleLayerEntry {
    uint32_t id;
    uint32_t parent;         /* 0: none */
    uint32_t generation;     /* higher than the parent's */
    uint64_t size;           /* bytes */
    uint64_t parent_clusters; /* of the parent only those below are seen */
    uint32_t depth;          /* layers from this one down; set by decode only */
} BaleLayerEntry;

/* A layer that was merged into another, which has its clusters now. */
typedef struct BaleAliasEntry {
    uint32_t id;
    uint32_t layer;
    uint64_t clusters;       /* only those below count */
} BaleAliasEntry;

typedef struct BaleSnapshotEntry {
    uint32_t image;
    uint32_t id;
    uint32_t layer;
    uint64_t date_s;         /* since 1970 */
    uint32_t date_ns;
    uint64_t vm_clock_ns;
    char *name;              /* owned */
} BaleSnapshotEntry;

typedef struct BaleImageEntry {
    uint32_t id;
    uint32_t layer;          /* on top */
    bool read_only;
    uint8_t codec;
    int8_t level;
    uint64_t date_s;         /* of its making, since 1970; 0: not known */
    char *name;              /* owned, as are these; "": not given */
    char *backing_file;
    char *backing_format;
} BaleImageEntry;

/* A dirty bitmap of an image; a layer of its own has the bits. */
typedef struct BaleBitmapEntry {
    uint32_t layer;          /* nobody else's, without a parent */
    uint32_t image;
    bool in_use;             /* the bits are not to be trusted */
    bool enabled;
    uint32_t granularity;    /* bytes that a bit stands for */
    uint64_t size;           /* bytes of the image that it covers */
    char *name;              /* owned */
} BaleBitmapEntry;

/* All images, layers, snapshots and bitmaps of a store. */
typedef struct BaleCatalogue {
    uint32_t next_layer;     /* higher than any that was ever in use */
    uint32_t next_image;
    uint32_t next_snapshot;
    GArray *layers;          /* BaleLayerEntry, by rising id */
    GArray *aliases;         /* BaleAliasEntry, by rising id */
    GArray *snapshots;       /* BaleSnapshotEntry, by rising id */
    GArray *images;          /* BaleImageEntry, by rising id */
    GArray *bitmaps;         /* BaleBitmapEntry, by rising layer */
} BaleCatalogue;

BaleCatalogue *bale_catalogue_new(void);
BaleCatalogue *bale_catalogue_copy(const BaleCatalogue *cat);
void bale_catalogue_free(BaleCatalogue *cat);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(BaleCatalogue, bale_catalogue_free)

BaleLayerEntry *bale_catalogue_layer(const BaleCatalogue *cat, uint32_t id);
BaleImageEntry *bale_catalogue_image(const BaleCatalogue *cat, uint32_t id);
BaleImageEntry *bale_catalogue_image_named(const BaleCatalogue *cat,
                                           const char *name);
/* The one of @image with that name or, in digits, that id. */
BaleSnapshotEntry *bale_catalogue_snapshot(const BaleCatalogue *cat,
                                           uint32_t image, const char *name);
/* The layer that has the clusters of layer @id now: @id or another; 0: none. */
uint32_t bale_catalogue_resolve(const BaleCatalogue *cat, uint32_t id,
                                uint64_t *clusters);
BaleBitmapEntry *bale_catalogue_bitmap(const BaleCatalogue *cat,
                                       uint32_t image, const char *name);
/* May an image (not the unnamed one) or a snapshot be called @name? */
bool bale_name_valid(const char *name);
/* May a bitmap be called @name? */
bool bale_bitmap_name_valid(const char *name);

/*
 * The payload of @cat's record, newly allocated, and its type: an image record
 * if nothing was ever in the store but the unnamed image, else a catalogue.
 * NULL: it would be too long.
 */
uint8_t *bale_catalogue_encode(const BaleCatalogue *cat, uint8_t *type,
                               uint32_t *len);
/* -EIO: damaged, or breaks a rule of the document. */
int bale_catalogue_decode(BaleCatalogue **cat, uint8_t type,
                          uint32_t cluster_size, const uint8_t *buf,
                          size_t len);

/* --- checkpoint --- */

#define BALE_ROOT_FIXED_LEN   32u
#define BALE_ROOT_PARTS_MAX   100000u
#define BALE_PART_LEN         40u
#define BALE_PAGE_ENTRY_LEN   48u
#define BALE_PAGE_ENTRIES_PER_PART 16384u
#define BALE_CHUNK_CLUSTERS   16384u

enum {
    BALE_PART_PAGES = 1,
    BALE_PART_INDEX = 2,
    BALE_PART_IMAGE = 3,
};

typedef struct BaleRoot {
    uint64_t next_seq;
    uint64_t pages;
    uint32_t parts;
} BaleRoot;

typedef struct BalePart {
    uint32_t kind;
    uint32_t payload_len;
    uint64_t address;
    uint64_t version;
    uint64_t a, b;
} BalePart;

typedef struct BalePageEntry {
    uint64_t version;
    uint32_t bucket;
    bool open;
    uint64_t end;
    uint64_t live_bytes;
    uint64_t first_seq;
    uint64_t tombstone_seq;
} BalePageEntry;

void bale_root_encode(const BaleRoot *r, uint8_t *buf);
int bale_root_decode(BaleRoot *r, const uint8_t *buf, size_t len);
void bale_part_encode(const BalePart *p, uint8_t *buf);
int bale_part_decode(BalePart *p, const uint8_t *buf);
void bale_page_entry_encode(const BalePageEntry *e, uint8_t *buf);
int bale_page_entry_decode(BalePageEntry *e, uint64_t page_size,
                           const uint8_t *buf);

/* --- index values --- */

#define BALE_VALUE_BITS  48
#define BALE_VALUE_CLASS 15u

static inline uint64_t bale_value(uint64_t address, unsigned size_class)
{
    return (address / BALE_RECORD_ALIGN) << 4 | size_class;
}

static inline uint64_t bale_value_address(uint64_t value)
{
    return (value >> 4) * BALE_RECORD_ALIGN;
}

static inline unsigned bale_value_class(uint64_t value)
{
    return value & BALE_VALUE_CLASS;
}

/*
 * The longest payload of each size class, in 256ths of a cluster: fine where
 * compressed clusters are, so that a read fetches hardly a block too many.
 */
static const uint16_t bale_class_limits[BALE_VALUE_CLASS + 1] = {
    0, 1, 2, 4, 8, 16, 32, 48, 64, 80, 96, 112, 128, 160, 208, 256,
};

/* The longest payload of @size_class; 0 for class 0. */
static inline uint32_t bale_class_len(unsigned size_class,
                                      uint32_t cluster_size)
{
    return (uint64_t)bale_class_limits[size_class] * cluster_size / 256;
}

/* The size class of a payload of @len bytes, 1 to 15. */
static inline unsigned bale_size_class(uint32_t len, uint32_t cluster_size)
{
    unsigned c = 1;

    while (c < BALE_VALUE_CLASS && bale_class_len(c, cluster_size) < len) {
        c++;
    }
    return c;
}

/* What @value counts for in a page's live bytes. */
static inline uint32_t bale_value_live(uint64_t value, uint32_t cluster_size)
{
    return BALE_RECORD_HEADER_LEN +
           bale_class_len(bale_value_class(value), cluster_size);
}

/* What a patch of @len bytes counts for in a page's live bytes. */
static inline uint32_t bale_patch_live(uint32_t len)
{
    return BALE_PLANTED(patch_freed_early) ? 0 : BALE_RECORD_HEADER_LEN + len;
}

static inline uint64_t bale_get_le64(const uint8_t *p)
{
    uint64_t v;

    memcpy(&v, p, 8);
    return GUINT64_FROM_LE(v);
}

static inline void bale_put_le64(uint8_t *p, uint64_t v)
{
    v = GUINT64_TO_LE(v);
    memcpy(p, &v, 8);
}

#endif
