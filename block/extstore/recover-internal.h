/*
 * The inside of recovery: what its files share.
 *
 *     recover.c             opens: a checkpoint, with the tail, or a scan
 *     recover-checkpoint.c  loads a checkpoint
 *     recover-index.c       loads its index
 *     recover-tail.c        finds what was appended after a checkpoint
 *     recover-read.c        reads pages
 *     recover-scan.c        walks pages; tells torn tails from damage
 *     recover-order.c       puts what was found in order of sequence
 *     recover-apply.c       applies it
 *     recover-limit.c       how much memory and work all that may take
 *
 * Threads: the one that opens the store.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef BALE_EXTSTORE_RECOVER_INTERNAL_H
#define BALE_EXTSTORE_RECOVER_INTERNAL_H

#include "store-internal.h"

/* What one record says, wherever that was read. */
typedef struct ScanEntry {
    uint64_t seq;
    uint64_t address;
    uint64_t cluster;
    uint32_t layer;
    uint32_t count;
    uint32_t payload_len;
    uint8_t type;
    bool dropped; /* part of a torn tail */
    bool bare;    /* a patch of a cluster that no record held */
} ScanEntry;

_Static_assert(sizeof(ScanEntry) == 40, "there may be tens of millions");

typedef struct ScanSegment {
    uint64_t offset; /* in the page */
    uint64_t len;
    size_t first_entry;
    uint32_t entries;
    uint8_t kind;
} ScanSegment;

enum {
    SEGMENT_GOOD,     /* segment record and directory verify */
    SEGMENT_HEADLESS, /* a bad place: no segment record verifies */
    SEGMENT_NO_DIRECTORY,
};

typedef struct ScanPage {
    BalePageHeader header;
    bool used;
    bool kept;         /* has the version that the checkpoint says */
    bool header_damaged;
    bool blank;        /* the first two blocks are zeroes */
    uint64_t freed;    /* the version that its mark says is freed, or 0 */
    uint64_t end;      /* of what is accepted */
    uint64_t proven;   /* highest barrier for this version */
    GArray *segments;  /* ScanSegment */
} ScanPage;

/*
 * In the index while a tail is applied: what the checkpoint says of the cluster
 * points into the tail, or into a page that is gone.  No record has address 0.
 */
#define VALUE_STALE 1u

typedef struct StaleCluster {
    uint32_t layer;
    uint64_t cluster;
} StaleCluster;

/* A checkpoint that is being loaded. */
typedef struct Checkpoint {
    BaleStore *s;
    BaleCheckpointRef ref;
    bool exact;        /* there is no tail */
    BaleRoot root;
    uint64_t end_seq;  /* nothing of the checkpoint has this or a higher one */
    uint8_t *payload;  /* of the root */
    uint64_t pages;    /* that the device has */
    uint64_t cut;      /* pages from this address on may have been cut off */
    uint64_t *limit;   /* of each page: where what the checkpoint knows ends */
    GArray *stale;     /* StaleCluster */
    bool lost;         /* pages lie behind the end of the device */
} Checkpoint;

/* A barrier, or what the checkpoint says of a page, which is as good. */
typedef struct ScanBarrier {
    BaleBarrier barrier;
    bool recent; /* not older than the checkpoint, after which no page is cut
                  * off from the device before the next one */
} ScanBarrier;

typedef struct ScanHeads ScanHeads;

typedef struct Scan {
    BaleStore *s;
    Checkpoint *from;  /* only what came after this; NULL: everything */
    bool recent;       /* no page was cut off since that */
    uint64_t pages;
    ScanPage *page;
    GArray *entries;   /* ScanEntry */
    GArray *barriers;  /* ScanBarrier */
    uint8_t *buf;      /* buffer_size bytes */
    size_t buf_len;
    uint64_t window_page, window_begin, window_end; /* what buf holds */
    uint64_t ahead;    /* bytes that were read with the last of reads that
                        * follow each other */
    ScanHeads *heads;
    BaleCatalogue *catalogue; /* the newest one applied */
    const struct ScanEntry *catalogue_entry; /* its record */
    /* While records are applied: what the last one's layer was found to be. */
    BaleLayer *layer;
    uint64_t layer_clusters;
    uint32_t layer_id;
    bool layer_known;
    bool lost;         /* clusters were lost that cannot be named */
    int ret;
} Scan;

/* recover.c */
void bale_recover_report(BaleStore *s, const char *fmt, ...)
    G_GNUC_PRINTF(2, 3);

typedef enum RecoverResult {
    RECOVER_OK,
    RECOVER_DAMAGED, /* try another way; what was loaded is to be forgotten */
    RECOVER_FAILED,  /* errp is set */
} RecoverResult;

/* recover-limit.c; what returns an int: 0, or a negative errno above it */
void bale_limit_init(BaleStore *s);
/* A layer is made, or made larger, for @size; all of those in @cat are. */
int bale_limit_layer(BaleStore *s, uint64_t size);
int bale_limit_layers(BaleStore *s, const BaleCatalogue *cat);
/* What the indexes have come to. */
int bale_limit_memory(BaleStore *s);
/* An image is about to load patches of so many clusters. */
int bale_limit_patched(BaleStore *s, uint64_t clusters);
/* So many bytes are read or verified. */
int bale_limit_read(BaleStore *s, uint64_t bytes);
/* A record is applied to a cluster. */
int bale_limit_cluster(BaleStore *s);
/* If s->limit_exceeded is set: say so, instead of what @errp says. */
void bale_limit_set_error(BaleStore *s, GError **errp);

/* recover-read.c */
ScanHeads *bale_scan_heads_new(void);
void bale_scan_heads_free(ScanHeads *heads);
/*
 * All pages are gone through, and @page is next: read the first two blocks of
 * it and of some that follow, for bale_scan_read().  Where that fails they are
 * read again when they are asked for.  scan->ret may be -EFBIG after it.
 */
void bale_scan_heads(Scan *scan, uint64_t page);
/*
 * Read [@offset, @offset + @len) of @page, widened to blocks; valid until the
 * next call.  NULL: scan->ret is -EIO, -EFBIG or another error.
 */
const uint8_t *bale_scan_read(Scan *scan, uint64_t page, uint64_t offset,
                              uint64_t len);

/* recover-scan.c */
bool bale_recover_scan(BaleStore *s, GError **errp);
int bale_scan_init(Scan *scan, BaleStore *s);
void bale_scan_destroy(Scan *scan);
/* List the segments of @page from @offset to its end. */
void bale_scan_walk(Scan *scan, uint64_t page, uint64_t offset);
/* Look at the first blocks of @page, which the checkpoint does not know. */
void bale_scan_page(Scan *scan, uint64_t page);
/*
 * The version of the first segment of @page, which begins with @block, if its
 * record verifies and that is higher than @version; else 0.
 */
uint64_t bale_scan_newer_version(Scan *scan, uint64_t page, uint64_t version,
                                 const uint8_t *block);
/*
 * The version of @page that is freed, if @block, its second one, is a mark that
 * says so; else 0.
 */
uint64_t bale_scan_second_mark(Scan *scan, uint64_t page,
                               const uint8_t *block);
/*
 * The newest checkpoint may be out of date or damaged, but what it says of
 * pages was flushed: a page that it names is there, or marked as freed, or
 * used anew.  As far as it can be read, take it for barriers.
 */
void bale_scan_checkpoint(Scan *scan);
/* Decide what of that is there. */
void bale_scan_judge(Scan *scan);
/*
 * Read, verify the record at @offset of @page.  *@payload points into
 * scan->buf.  0, -ENOENT, -EIO; a device error is also left in scan->ret.
 */
int bale_scan_record(Scan *scan, uint64_t page, uint64_t offset,
                     uint32_t len_max, BaleRecord *r,
                     const uint8_t **payload);

/* recover-order.c */
typedef struct ScanOrder {
    uint64_t key;
    const ScanEntry *entry; /* in scan->entries: valid until that grows */
} ScanOrder;
/* The *@n entries that are not dropped, to be freed; NULL: no memory. */
ScanOrder *bale_scan_order(Scan *scan, guint *n);

/* recover-apply.c */
int bale_scan_apply(Scan *scan);

/* recover-checkpoint.c */
/* The state of a clean store. */
RecoverResult bale_recover_exact(BaleStore *s, GError **errp);
/*
 * Read the root and page table of @c->ref; the page table goes to the store.
 * 0, -ENOMEM, -EIO.  bale_checkpoint_close() in any case.
 */
int bale_checkpoint_open(Checkpoint *c, BaleStore *s,
                         const BaleCheckpointRef *ref, bool exact);
void bale_checkpoint_close(Checkpoint *c);
/* recover-index.c: the index, by several threads.  0, -ENOMEM, -EIO. */
int bale_checkpoint_load_index(Checkpoint *c);
/*
 * Add to *@total what @part's record takes.  No two parts have one record, so
 * that all of them fit on the device.
 */
bool bale_checkpoint_part_fits(BaleStore *s, const BalePart *part,
                               uint64_t *total);
/* Catalogue and index.  0, -ENOMEM, -EIO. */
int bale_checkpoint_load(Checkpoint *c);
/* What the checkpoint and the one before it, @previous, consist of is live. */
void bale_checkpoint_note(Checkpoint *c, const BaleCheckpointRef *previous);
/* Forget what a checkpoint that turned out damaged has loaded. */
void bale_recover_reset(BaleStore *s);
/* May a record of @len bytes lie at @address? */
bool bale_recover_extent_ok(BaleStore *s, uint64_t address, uint64_t len);
/*
 * Verify the record of the page version @version that lies at @address, and in
 * memory at @p; it is at most @len long.  *@payload points behind @p.
 */
int bale_recover_verify(BaleStore *s, uint64_t address, uint64_t version,
                        uint32_t len, BaleRecord *r, const uint8_t *p,
                        const uint8_t **payload);
/* The same, read from the device; *@out is the payload, newly allocated. */
int bale_recover_record(BaleStore *s, uint64_t address, uint64_t version,
                        uint32_t len, BaleRecord *r, uint8_t **out);

/* recover-tail.c */
RecoverResult bale_recover_tail(BaleStore *s, const BaleCheckpointRef *ref,
                                GError **errp);

#endif
