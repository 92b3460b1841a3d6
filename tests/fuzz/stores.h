/*
 * What the libFuzzer targets for whole stores share: see stores.c.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef TESTS_FUZZ_STORES_H
#define TESTS_FUZZ_STORES_H

#include <stddef.h>
#include <stdint.h>

/* Where the edits of an input may go: bits. */
enum {
    AIM_SUPER = 1 << 0,
    AIM_PAGE = 1 << 1,       /* headers of pages */
    AIM_CHECKPOINT = 1 << 2, /* roots, parts of page table and index */
    AIM_CATALOGUE = 1 << 3,  /* catalogue and image records */
    AIM_PATCH = 1 << 4,
    AIM_SEGMENT = 1 << 5,    /* segment records and directories */
    AIM_DATA = 1 << 6,       /* data, zero and drop records */
    AIM_BLOCK = 1 << 7,      /* anywhere */
    AIM_ANY = (1 << 8) - 1,
};

/* Make the stores to begin with. */
void stores_init(void);
/* Edit one as the input says, and use it. */
void stores_fuzz(const uint8_t *data, size_t size, unsigned aims);

#endif
