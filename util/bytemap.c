/*
 * Maps that have one bit for each byte of a cluster; see util/bytemap.h.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "util/bytemap.h"

#include <glib.h>

/* Bits @bit and up of a word; @bit is taken modulo 64. */
static uint64_t word_from(size_t bit)
{
    return ~(uint64_t)0 << (bit & 63);
}

/* The mask for the part of word @w that lies in [@from, @to). */
static uint64_t word_mask(size_t w, size_t from, size_t to)
{
    uint64_t mask = ~(uint64_t)0;

    if (w == from / 64) {
        mask &= word_from(from);
    }
    if (w == to / 64) {
        mask &= ~word_from(to);
    }
    return mask;
}

size_t bale_bytemap_set(uint64_t *map, size_t from, size_t to)
{
    size_t n = 0;

    for (size_t w = from / 64; w <= (to - 1) / 64; w++) {
        uint64_t mask = word_mask(w, from, to);

        n += __builtin_popcountll(mask & ~map[w]);
        map[w] |= mask;
    }
    return n;
}

size_t bale_bytemap_clear(uint64_t *map, size_t from, size_t to)
{
    size_t n = 0;

    for (size_t w = from / 64; w <= (to - 1) / 64; w++) {
        uint64_t mask = word_mask(w, from, to);

        n += __builtin_popcountll(mask & map[w]);
        map[w] &= ~mask;
    }
    return n;
}

size_t bale_bytemap_find(const uint64_t *map, size_t from, size_t to,
                         bool value)
{
    uint64_t flip = value ? 0 : ~(uint64_t)0;

    while (from < to) {
        uint64_t word = (map[from / 64] ^ flip) & word_from(from);

        if (word) {
            return MIN(to, (from & ~(size_t)63) + __builtin_ctzll(word));
        }
        from = (from & ~(size_t)63) + 64;
    }
    return to;
}

bool bale_bytemap_test(const uint64_t *map, size_t bit)
{
    return map[bit / 64] >> (bit & 63) & 1;
}

size_t bale_bytemap_end(const uint64_t *map, size_t words)
{
    while (words > 0 && map[words - 1] == 0) {
        words--;
    }
    return words == 0 ? 0
                      : words * 64 - __builtin_clzll(map[words - 1]);
}

size_t bale_bytemap_count(const uint64_t *map, size_t words)
{
    size_t n = 0;

    for (size_t w = 0; w < words; w++) {
        n += __builtin_popcountll(map[w]);
    }
    return n;
}
