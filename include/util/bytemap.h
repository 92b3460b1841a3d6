/*
 * Maps that have one bit for each byte of a cluster: which bytes are there.
 *
 * A map is an array of 64-bit words, the first byte's bit the lowest of the
 * first word; the caller owns it and knows its length.  Ranges are [from, to),
 * in bits.
 *
 * Threads: callers serialise.  Errors: none.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef BALE_UTIL_BYTEMAP_H
#define BALE_UTIL_BYTEMAP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Set [@from, @to), which is not empty; how many were clear. */
size_t bale_bytemap_set(uint64_t *map, size_t from, size_t to);

/* Clear [@from, @to), which is not empty; how many were set. */
size_t bale_bytemap_clear(uint64_t *map, size_t from, size_t to);

/* The first bit in [@from, @to) that equals @value, or @to. */
size_t bale_bytemap_find(const uint64_t *map, size_t from, size_t to,
                         bool value);

bool bale_bytemap_test(const uint64_t *map, size_t bit);

/* One past the last set bit of a map of @words words; 0 if none is set. */
size_t bale_bytemap_end(const uint64_t *map, size_t words);

/* How many bits of a map of @words words are set. */
size_t bale_bytemap_count(const uint64_t *map, size_t words);

#endif
