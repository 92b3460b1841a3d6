/*
 * Aligned buffers, the test for zeroes, the checksum.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <glib.h>
#include <stdint.h>
#include <string.h>

#include "util/checksum.h"
#include "util/memory.h"

static void test_buffers_are_aligned(void)
{
    for (size_t align = 1; align <= (size_t)2 << 20; align *= 2) {
        BALE_AUTO_MEMORY void *buf = bale_memory_try_alloc(align, 100);

        g_assert_nonnull(buf);
        g_assert_cmpuint((uintptr_t)buf % align, ==, 0);
        memset(buf, 1, 100);
    }
}

static void test_zeroed_buffers_are_zero(void)
{
    for (int i = 0; i < 20; i++) {
        BALE_AUTO_MEMORY uint8_t *buf = bale_memory_try_alloc0(4096, 70000);

        g_assert_nonnull(buf);
        g_assert_true(bale_memory_is_zero(buf, 70000));
        memset(buf, 0xff, 70000);
    }
}

static void test_impossible_requests_yield_null(void)
{
    /* Not constants, or the compiler warns about what is tested here. */
    volatile size_t huge = SIZE_MAX;

    g_assert_null(bale_memory_try_alloc(4096, huge));
    g_assert_null(bale_memory_try_alloc(4096, huge - 4096));
    g_assert_null(bale_memory_try_alloc0(4096, huge / 2));
    g_assert_null(bale_memory_try_alloc(0, 1));
    g_assert_null(bale_memory_try_alloc(48, 1));
    bale_memory_free(NULL);
}

static void test_no_bytes_is_a_buffer(void)
{
    BALE_AUTO_MEMORY void *buf = bale_memory_try_alloc(512, 0);

    g_assert_nonnull(buf);
}

/* Every length and offset of interest, the one byte in every place. */
static void test_is_zero_finds_every_single_byte(void)
{
    uint8_t buf[1100];

    memset(buf, 0, sizeof(buf));
    for (size_t start = 0; start < 9; start++) {
        for (size_t len = 0; len < 1030; len += len < 40 ? 1 : 83) {
            g_assert_true(bale_memory_is_zero(buf + start, len));
            for (size_t i = 0; i < len; i++) {
                buf[start + i] = 0x80;
                g_assert_false(bale_memory_is_zero(buf + start, len));
                buf[start + i] = 0;
            }
        }
    }
}

static void test_is_zero_ignores_what_is_outside(void)
{
    uint8_t buf[600];

    for (size_t len = 0; len < 560; len++) {
        memset(buf, 0xff, sizeof(buf));
        memset(buf + 7, 0, len);
        g_assert_true(bale_memory_is_zero(buf + 7, len));
    }
}

static void test_alignment_arithmetic(void)
{
    g_assert_cmpuint(bale_align_up(0, 4096), ==, 0);
    g_assert_cmpuint(bale_align_up(1, 4096), ==, 4096);
    g_assert_cmpuint(bale_align_up(4096, 4096), ==, 4096);
    g_assert_cmpuint(bale_align_down(4095, 4096), ==, 0);
    g_assert_cmpuint(bale_align_down(1ULL << 40 | 5, 16), ==, 1ULL << 40);
    g_assert_true(bale_is_aligned(1ULL << 40, 1ULL << 21));
    g_assert_false(bale_is_aligned(8, 16));
    g_assert_false(bale_is_power_of_2(0));
    g_assert_true(bale_is_power_of_2(1ULL << 63));
    g_assert_false(bale_is_power_of_2(12));
}

/* On-disk: these values must never change. */
static void test_checksum_is_the_one_on_disk(void)
{
    static const char text[] = "a cluster of a disk, and then some more bytes";

    g_assert_cmphex(bale_checksum(text, 0, 0), ==, 0x2d06800538d394c2ULL);
    g_assert_cmphex(bale_checksum(text, sizeof(text) - 1, 0), ==,
                    0x84859d3ffa1d3333ULL);
    g_assert_cmphex(bale_checksum(text, sizeof(text) - 1, 42), ==,
                    0xacec217c65a31ff8ULL);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/memory/buffers-are-aligned", test_buffers_are_aligned);
    g_test_add_func("/memory/zeroed-buffers-are-zero",
                    test_zeroed_buffers_are_zero);
    g_test_add_func("/memory/impossible-requests-yield-null",
                    test_impossible_requests_yield_null);
    g_test_add_func("/memory/no-bytes-is-a-buffer", test_no_bytes_is_a_buffer);
    g_test_add_func("/memory/is-zero-finds-every-single-byte",
                    test_is_zero_finds_every_single_byte);
    g_test_add_func("/memory/is-zero-ignores-what-is-outside",
                    test_is_zero_ignores_what_is_outside);
    g_test_add_func("/memory/alignment-arithmetic", test_alignment_arithmetic);
    g_test_add_func("/memory/checksum-is-the-one-on-disk",
                    test_checksum_is_the_one_on_disk);
    return g_test_run();
}
