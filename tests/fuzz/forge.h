/*
 * Stores by hand, for tests: what no engine would write, with right checksums.
 *
 * Two ways lead to one.  A page can be written from a list of records, each
 * with whatever its fields are to say (forge_page).  Or a store that the engine
 * wrote is changed anywhere, and every checksum that was right before is made
 * right again (forge_list, forge_seal).
 *
 * Threads: none.  Errors: misuse is an assertion; these are tests.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef TESTS_FORGE_H
#define TESTS_FORGE_H

#include "../../block/extstore/store-internal.h"
#include "extstore/device-sim.h"

/* --- pages from records --- */

typedef struct ForgeRecord {
    BaleRecord r;          /* header_len, version and payload_sum are set */
    const void *payload;   /* borrowed; NULL: none */
    uint64_t address;      /* set by forge_page() */
    bool no_entry;         /* the directory does not list it ... */
    uint32_t entries;      /* ... or lists it so many times more */
} ForgeRecord;

/*
 * Write page @page of @super's store: its header and one segment with
 * @records and @barriers, which are @n and @barriers_n, as large as it takes.
 * Returns where the segment ends in the page.
 */
uint64_t forge_page(BaleDevice *dev, const BaleSuper *super, uint64_t page,
                    uint64_t version, BaleBucket bucket, ForgeRecord *records,
                    guint n, const BaleBarrier *barriers, guint barriers_n);
/* A segment at @offset of a page, alone.  Returns where it ends. */
uint64_t forge_segment(BaleDevice *dev, const BaleSuper *super, uint64_t page,
                       uint64_t version, uint64_t offset,
                       ForgeRecord *records, guint n,
                       const BaleBarrier *barriers, guint barriers_n);
/* All copies of the superblock.  Fields that are 0 are set to what is usual. */
void forge_supers(BaleDevice *dev, BaleSuper *super);

/* --- changing what the engine wrote --- */

typedef struct ForgePlace {
    uint64_t address;
    uint8_t type;          /* of the record */
    uint32_t header_len, payload_len;
} ForgePlace;

typedef struct Forge {
    BaleSimImage *image;   /* owned */
    BaleSuper super;
    uint64_t identity;
    GArray *blocks;        /* uint64_t: blocks that hold something */
    GArray *records;       /* ForgePlace: those that verify */
} Forge;

/* @image is transferred. */
Forge *forge_list(BaleSimImage *image);
void forge_free(Forge *f);
/* Superblocks, page headers and all that forge_list() has found. */
void forge_seal(const Forge *f, BaleDevice *dev);

G_DEFINE_AUTOPTR_CLEANUP_FUNC(Forge, forge_free)

#endif
