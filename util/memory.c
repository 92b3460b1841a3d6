/*
 * Aligned buffers that may fail, and a fast test for zeroes.
 *
 * Invariants: what bale_memory_try_alloc() returns came from
 * posix_memalign(3), so free(3) takes it.
 * Threads and errors: as in the header.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "util/memory.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* A huge page of x86-64 and of aarch64 with 4 KiB pages, in bytes. */
#define MEMORY_HUGE_LEN (2u << 20)

/* What the inner loop looks at before it may leave, in bytes. */
#define ZERO_BLOCK_LEN 256

void *bale_memory_try_alloc(size_t align, size_t size)
{
    void *buf;

    if (!bale_is_power_of_2(align)) {
        return NULL;
    }
    /* Beyond this, pointer differences in the buffer would overflow. */
    if (size > PTRDIFF_MAX - align) {
        return NULL;
    }
    if (align < sizeof(void *)) {
        align = sizeof(void *);
    }
    if (posix_memalign(&buf, align, MAX(size, 1)) != 0) {
        return NULL;
    }
    return buf;
}

void *bale_memory_try_alloc0(size_t align, size_t size)
{
    void *buf = bale_memory_try_alloc(align, size);

    if (buf != NULL) {
        memset(buf, 0, size);
    }
    return buf;
}

void *bale_memory_try_alloc_huge(size_t size)
{
    void *buf = bale_memory_try_alloc(MEMORY_HUGE_LEN, size);

    if (buf != NULL) {
        /* Advice: without huge pages it is only slower. */
        madvise(buf, size, MADV_HUGEPAGE);
    }
    return buf;
}

void bale_memory_free(void *buf)
{
    free(buf);
}

static inline uint64_t load64(const uint8_t *p)
{
    uint64_t v;

    memcpy(&v, p, sizeof(v));
    return v;
}

/* The compiler turns the block's loop into vector instructions. */
static inline bool block_is_zero(const uint8_t *p)
{
    uint64_t acc = 0;

    for (size_t i = 0; i < ZERO_BLOCK_LEN; i += sizeof(uint64_t)) {
        acc |= load64(p + i);
    }
    return acc == 0;
}

bool bale_memory_is_zero(const void *buf, size_t len)
{
    const uint8_t *p = buf;

    if (len < sizeof(uint64_t)) {
        uint8_t acc = 0;

        for (size_t i = 0; i < len; i++) {
            acc |= p[i];
        }
        return acc == 0;
    }
    /*
     * The ends and the middle first: data that starts with zeroes, such as a
     * sparse file system block, seldom has them in all three places.
     */
    if (load64(p) != 0 || load64(p + len - sizeof(uint64_t)) != 0 ||
        load64(p + (len - sizeof(uint64_t)) / 2) != 0) {
        return false;
    }
    while (len >= ZERO_BLOCK_LEN) {
        if (!block_is_zero(p)) {
            return false;
        }
        p += ZERO_BLOCK_LEN;
        len -= ZERO_BLOCK_LEN;
    }
    while (len >= sizeof(uint64_t)) {
        if (load64(p) != 0) {
            return false;
        }
        p += sizeof(uint64_t);
        len -= sizeof(uint64_t);
    }
    /* The last few bytes are part of the last word, tested at the start. */
    return true;
}
