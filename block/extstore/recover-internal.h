/*
 * The inside of recovery: what its files share.
 *
 *     recover.c             opens: a checkpoint or a scan
 *     recover-checkpoint.c  loads a checkpoint
 *     recover-scan.c        walks pages; tells torn tails from damage
 *     recover-apply.c       applies what was found, in order of sequence
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
    uint32_t page;
    uint8_t type;
    bool dropped; /* part of a torn tail */
} ScanEntry;

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
    bool header_damaged;
    bool blank;        /* the first two blocks are zeroes */
    uint64_t freed;    /* the version that its mark says is freed, or 0 */
    uint64_t end;      /* of what is accepted */
    uint64_t proven;   /* highest barrier for this version */
    GArray *segments;  /* ScanSegment */
} ScanPage;

/* A barrier, or what the checkpoint says of a page, which is as good. */
typedef struct ScanBarrier {
    BaleBarrier barrier;
    bool recent; /* not older than the checkpoint, after which no page is cut
                  * off from the device before the next one */
} ScanBarrier;

typedef struct Scan {
    BaleStore *s;
    uint64_t pages;
    ScanPage *page;
    GArray *entries;   /* ScanEntry */
    GArray *barriers;  /* ScanBarrier */
    uint8_t *buf;      /* buffer_size bytes */
    size_t buf_len;
    uint64_t window_page, window_begin, window_end; /* what buf holds */
    BaleCatalogue *catalogue; /* the newest one applied */
    const struct ScanEntry *catalogue_entry; /* its record */
    bool searching;    /* in small steps: read more at once */
    bool lost;         /* clusters were lost that cannot be named */
    int ret;
} Scan;

/* recover.c */
void bale_recover_report(BaleStore *s, const char *fmt, ...)
    G_GNUC_PRINTF(2, 3);
void bale_recover_set_error(GError **errp, int ret, const char *what);

/* recover-scan.c */
bool bale_recover_scan(BaleStore *s, GError **errp);
/*
 * Read, verify the record at @offset of @page.  *@payload points into
 * scan->buf.  0, -ENOENT, -EIO; a device error is also left in scan->ret.
 */
int bale_scan_record(Scan *scan, uint64_t page, uint64_t offset,
                     uint32_t len_max, BaleRecord *r,
                     const uint8_t **payload);

/* recover-apply.c */
int bale_scan_apply(Scan *scan);
/* Count an index value as live; a BaleIndexVisit, @opaque is the store. */
bool bale_recover_count_live(uint64_t cluster, uint64_t value, void *opaque);

/* recover-checkpoint.c */
int bale_recover_checkpoint(BaleStore *s);
/* Forget what a checkpoint that turned out damaged has loaded. */
void bale_recover_reset(BaleStore *s);
/*
 * Read and verify the record at @address of the page version @version.  On
 * success *@out is its payload, newly allocated.
 */
int bale_recover_record(BaleStore *s, uint64_t address, uint64_t version,
                        uint32_t len, BaleRecord *r, uint8_t **out);

#endif
