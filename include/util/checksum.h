/*
 * The checksum of everything on disk: XXH3, 64 bits, seeded.
 *
 * The seed says what the bytes are and where they belong (a store's random
 * identity, an address), so that bytes which are intact but stale or misplaced
 * do not pass.  It is no protection against an attacker.
 *
 * The result is a number; whoever stores it stores it little-endian.
 *
 * Threads: pure.  Errors: none.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef BALE_UTIL_CHECKSUM_H
#define BALE_UTIL_CHECKSUM_H

#include <stddef.h>
#include <stdint.h>
#include <xxhash.h>

/* @len in bytes, may be 0; @buf may have any alignment. */
static inline uint64_t bale_checksum(const void *buf, size_t len,
                                     uint64_t seed)
{
    return XXH3_64bits_withSeed(buf, len, seed);
}

#endif
