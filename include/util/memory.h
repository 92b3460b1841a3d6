/*
 * Aligned buffers that may fail, and a fast test for zeroes.
 *
 * Threads: all functions are reentrant.  Errors: a NULL, never an abort,
 * because the sizes come from options and from disk.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef BALE_UTIL_MEMORY_H
#define BALE_UTIL_MEMORY_H

#include <glib.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Enough for O_DIRECT on every device we know, in bytes. */
#define BALE_MEMORY_ALIGN 4096

/*
 * Allocate @size bytes, at least one, at a multiple of @align, which must be
 * a power of two (else NULL).  The content is undefined.  The caller owns the
 * buffer and frees it with bale_memory_free().
 */
void *bale_memory_try_alloc(size_t align, size_t size);

/* The same, filled with zeroes. */
void *bale_memory_try_alloc0(size_t align, size_t size);

/*
 * Of undefined content, for a large table that is looked up at random: in huge
 * pages, if the system has them.
 */
void *bale_memory_try_alloc_huge(size_t size);

/* NULL is allowed. */
void bale_memory_free(void *buf);

/*
 * For declarations: BALE_AUTO_MEMORY uint8_t *buf = NULL; the buffer is freed
 * when the variable leaves its scope.
 */
static inline void bale_memory_auto_free(void *where)
{
    bale_memory_free(*(void **)where);
}

#define BALE_AUTO_MEMORY __attribute__((cleanup(bale_memory_auto_free)))

/*
 * True when all @len bytes at @buf are zero; true for no bytes.  Any
 * alignment.  Leaves at the first nonzero block, so that it costs next to
 * nothing on data.
 */
bool bale_memory_is_zero(const void *buf, size_t len);

static inline bool bale_is_power_of_2(uint64_t n)
{
    return n != 0 && (n & (n - 1)) == 0;
}

/* @align must be a power of two, and the result must fit 64 bits. */
static inline uint64_t bale_align_down(uint64_t n, uint64_t align)
{
    return n & ~(align - 1);
}

static inline uint64_t bale_align_up(uint64_t n, uint64_t align)
{
    return (n + align - 1) & ~(align - 1);
}

static inline bool bale_is_aligned(uint64_t n, uint64_t align)
{
    return (n & (align - 1)) == 0;
}

#endif
