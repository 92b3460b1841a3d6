/*
 * Maps of bytes against an array of bool.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <glib.h>

#include "util/bytemap.h"

#define WORDS 5u
#define BITS  (WORDS * 64u)

typedef struct Fixture {
    uint64_t map[WORDS];
    bool model[BITS];
} Fixture;

/* Make [@from, @to) of the model @value; how many were not. */
static size_t model_make(Fixture *f, size_t from, size_t to, bool value)
{
    size_t n = 0;

    for (size_t i = from; i < to; i++) {
        n += f->model[i] != value;
        f->model[i] = value;
    }
    return n;
}

static size_t model_find(const Fixture *f, size_t from, size_t to, bool value)
{
    while (from < to && f->model[from] != value) {
        from++;
    }
    return from;
}

static void check(const Fixture *f)
{
    size_t count = 0, end = 0;

    for (size_t i = 0; i < BITS; i++) {
        g_assert_cmpint(bale_bytemap_test(f->map, i), ==, f->model[i]);
        count += f->model[i];
        end = f->model[i] ? i + 1 : end;
    }
    g_assert_cmpuint(bale_bytemap_count(f->map, WORDS), ==, count);
    g_assert_cmpuint(bale_bytemap_end(f->map, WORDS), ==, end);
}

/* Every range, on a map that is empty, full, or was changed at random. */
static void test_ranges(void)
{
    for (size_t from = 0; from < BITS; from++) {
        for (size_t to = from + 1; to <= BITS; to++) {
            Fixture f = { .map = { 0 } };

            g_assert_cmpuint(bale_bytemap_set(f.map, from, to), ==,
                             to - from);
            g_assert_cmpuint(bale_bytemap_count(f.map, WORDS), ==, to - from);
            g_assert_cmpuint(bale_bytemap_find(f.map, 0, BITS, true), ==,
                             from);
            g_assert_cmpuint(bale_bytemap_find(f.map, from, BITS, false), ==,
                             to);
            g_assert_cmpuint(bale_bytemap_end(f.map, WORDS), ==, to);
            g_assert_cmpuint(bale_bytemap_clear(f.map, from, to), ==,
                             to - from);
            g_assert_cmpuint(bale_bytemap_end(f.map, WORDS), ==, 0);
        }
    }
}

static void test_random(void)
{
    g_autoptr(GRand) rand = g_rand_new_with_seed(1);
    Fixture f = { .map = { 0 } };

    for (unsigned i = 0; i < 3000; i++) {
        size_t from = g_rand_int_range(rand, 0, BITS);
        size_t to = g_rand_int_range(rand, from + 1, BITS + 1);
        bool value = g_rand_boolean(rand);

        g_assert_cmpuint(bale_bytemap_find(f.map, from, to, value), ==,
                         model_find(&f, from, to, value));
        g_assert_cmpuint(value ? bale_bytemap_set(f.map, from, to)
                               : bale_bytemap_clear(f.map, from, to),
                         ==, model_make(&f, from, to, value));
        check(&f);
    }
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/bytemap/ranges", test_ranges);
    g_test_add_func("/bytemap/random", test_random);
    return g_test_run();
}
