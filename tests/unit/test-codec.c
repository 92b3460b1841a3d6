/*
 * The codecs: round trips at every level, streams that zlib and zstd agree
 * on, and hostile input.
 *
 * Buffers whose bounds matter are allocated in their exact length, so that
 * the address sanitizer sees the first byte outside of them.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <errno.h>
#include <glib.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <zlib.h>
#include <zstd.h>

#include "extstore/codec.h"

#define LEN 65536

/* xorshift64*, so that a seed means the same everywhere. */
static uint64_t random_state;

static uint64_t random64(void)
{
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return random_state * 0x2545f4914f6cdd1dULL;
}

static void random_seed(void)
{
    const char *env = g_getenv("BALE_SEED");
    uint64_t seed = env != NULL ? g_ascii_strtoull(env, NULL, 0) :
        (uint64_t)g_get_real_time();

    random_state = seed | 1;
    g_test_message("BALE_SEED=%" G_GUINT64_FORMAT, seed);
}

typedef enum Pattern {
    ZEROES,
    RANDOM,
    TEXT,
    CODE,
    TABLE,
    HALF_RANDOM,
    PERIODIC,
    NIBBLES,
    PATTERNS
} Pattern;

/* Data that leads the mixtures down each of their ways. */
static void fill(uint8_t *buf, size_t len, Pattern pattern)
{
    static const char *const words[] = {
        "cluster ", "page ", "the ", "of ", "record ", "is ", "\n", "flush ",
        "write ", "bucket ", "layer ", "and ", "tail, ", "index. ",
    };
    size_t i = 0;

    switch (pattern) {
    case ZEROES:
        memset(buf, 0, len);
        break;
    case RANDOM:
        for (; i < len; i++) {
            buf[i] = random64() >> 56;
        }
        break;
    case TEXT:
        while (i < len) {
            const char *w = words[random64() % G_N_ELEMENTS(words)];

            for (; *w != '\0' && i < len; w++) {
                buf[i++] = *w;
            }
        }
        break;
    case CODE:
        /* Short matches among bytes that are nearly random. */
        for (; i < len; i++) {
            uint64_t r = random64();

            if (i > 4096 && r % 5 == 0) {
                size_t n = MIN(3 + r / 5 % 3, len - i);

                memmove(buf + i, buf + i - 1 - r / 16 % 4000, n);
                i += n - 1;
            } else {
                buf[i] = (r >> 32) & (r >> 40) & 0xff;
            }
        }
        break;
    case TABLE:
        for (; i < len; i++) {
            buf[i] = i % 16 < 3 ? i / 16 >> (i % 16 * 8) : i % 16;
        }
        break;
    case HALF_RANDOM:
        fill(buf, len / 2, RANDOM);
        fill(buf + len / 2, len - len / 2, TEXT);
        break;
    case PERIODIC:
        for (; i < len; i++) {
            buf[i] = i % 251;
        }
        break;
    case NIBBLES:
        for (; i < len; i++) {
            buf[i] = random64() >> 60;
        }
        break;
    default:
        g_assert_not_reached();
    }
}

/* An independent decoder: zlib, and zstd's streaming interface. */
static void check_with_reference(BaleCodec codec, const uint8_t *packed,
                                 size_t packed_len, const uint8_t *plain,
                                 size_t plain_len)
{
    g_autofree uint8_t *out = g_malloc(plain_len + 1);

    if (codec == BALE_CODEC_DEFLATE) {
        z_stream z = { 0 };

        g_assert_cmpint(inflateInit2(&z, -15), ==, Z_OK);
        z.next_in = (uint8_t *)packed;
        z.avail_in = packed_len;
        z.next_out = out;
        z.avail_out = plain_len + 1;
        g_assert_cmpint(inflate(&z, Z_FINISH), ==, Z_STREAM_END);
        g_assert_cmpuint(z.avail_in, ==, 0);
        g_assert_cmpuint(z.total_out, ==, plain_len);
        inflateEnd(&z);
    } else {
        ZSTD_DStream *z = ZSTD_createDStream();
        ZSTD_inBuffer in = { packed, packed_len, 0 };
        ZSTD_outBuffer o = { out, plain_len + 1, 0 };

        g_assert_cmpuint(ZSTD_decompressStream(z, &o, &in), ==, 0);
        g_assert_cmpuint(in.pos, ==, packed_len);
        g_assert_cmpuint(o.pos, ==, plain_len);
        ZSTD_freeDStream(z);
    }
    g_assert_cmpmem(out, plain_len, plain, plain_len);
}

static ssize_t compress_exact(BaleCodecContext *ctx, uint8_t **packed,
                              size_t limit, const uint8_t *plain, size_t len)
{
    uint8_t *buf = g_malloc(limit);
    ssize_t ret = bale_codec_compress(ctx, buf, limit, plain, len);

    g_assert_cmpint(ret, >=, 0);
    g_assert_cmpint(ret, <=, limit);
    *packed = g_memdup2(buf, ret);
    g_free(buf);
    return ret;
}

static void round_trip(BaleCodecContext *ctx, BaleCodec codec,
                       const uint8_t *plain, size_t len)
{
    g_autofree uint8_t *packed = NULL;
    g_autofree uint8_t *back = g_malloc(len);
    ssize_t ret = compress_exact(ctx, &packed, len, plain, len);

    if (ret == 0) {
        return;
    }
    g_assert_cmpint(bale_codec_decompress(ctx, codec, back, len, packed, ret),
                    ==, 0);
    g_assert_cmpmem(back, len, plain, len);
    check_with_reference(codec, packed, ret, plain, len);

    /* Not a byte more or less on either side. */
    g_assert_cmpint(bale_codec_decompress(ctx, codec, back, len, packed,
                                          ret - 1), ==, -EIO);
    if (len > 1) {
        g_assert_cmpint(bale_codec_decompress(ctx, codec, back, len - 1,
                                              packed, ret), ==, -EIO);
    }
}

static void round_trip_levels(BaleCodec codec)
{
    BaleCodecLevels levels = bale_codec_levels(codec);
    g_autofree uint8_t *plain = g_malloc(LEN);

    random_seed();
    for (int level = levels.min; level <= levels.max; level++) {
        g_autoptr(BaleCodecContext) ctx =
            bale_codec_context_new(codec, level, LEN, NULL);

        g_assert_nonnull(ctx);
        for (Pattern p = 0; p < PATTERNS; p++) {
            fill(plain, LEN, p);
            round_trip(ctx, codec, plain, LEN);
        }
    }
}

static void test_deflate_round_trips_at_every_level(void)
{
    round_trip_levels(BALE_CODEC_DEFLATE);
}

static void test_zstd_round_trips_at_every_level(void)
{
    round_trip_levels(BALE_CODEC_ZSTD);
}

static void round_trip_lengths(gconstpointer data)
{
    static const size_t lens[] = {
        1, 2, 3, 7, 8, 15, 64, 127, 128, 129, 511, 512, 4095, 4096, 4097,
        65535, 65536, 131072, 262144 + 5, (size_t)2 << 20,
    };
    BaleCodec codec = GPOINTER_TO_INT(data);
    g_autoptr(BaleCodecContext) ctx =
        bale_codec_context_new(codec, 0, (size_t)2 << 20, NULL);

    random_seed();
    for (unsigned i = 0; i < G_N_ELEMENTS(lens); i++) {
        for (Pattern p = 0; p < PATTERNS; p++) {
            g_autofree uint8_t *plain = g_malloc(lens[i]);

            fill(plain, lens[i], p);
            round_trip(ctx, codec, plain, lens[i]);
        }
    }
}

static void test_regular_data_shrinks(gconstpointer data)
{
    BaleCodec codec = GPOINTER_TO_INT(data);
    BaleCodecLevels levels = bale_codec_levels(codec);
    g_autofree uint8_t *plain = g_malloc(LEN);

    random_seed();
    for (int level = levels.min; level <= levels.max; level++) {
        g_autoptr(BaleCodecContext) ctx =
            bale_codec_context_new(codec, level, LEN, NULL);
        g_autofree uint8_t *zeroes = NULL;
        g_autofree uint8_t *text = NULL;
        ssize_t len;

        fill(plain, LEN, ZEROES);
        len = compress_exact(ctx, &zeroes, LEN, plain, LEN);
        g_assert_cmpint(len, >, 0);
        g_assert_cmpint(len, <, 1024);
        fill(plain, LEN, TEXT);
        len = compress_exact(ctx, &text, LEN, plain, LEN);
        g_assert_cmpint(len, >, 0);
        g_assert_cmpint(len, <, LEN / 2);
    }
}

static void test_random_data_does_not_fit(gconstpointer data)
{
    BaleCodec codec = GPOINTER_TO_INT(data);
    BaleCodecLevels levels = bale_codec_levels(codec);
    g_autofree uint8_t *plain = g_malloc(LEN);
    g_autofree uint8_t *packed = g_malloc(LEN);

    random_seed();
    fill(plain, LEN, RANDOM);
    for (int level = levels.min; level <= levels.max; level++) {
        g_autoptr(BaleCodecContext) ctx =
            bale_codec_context_new(codec, level, LEN, NULL);

        g_assert_cmpint(bale_codec_compress(ctx, packed, LEN - 1, plain, LEN),
                        ==, 0);
        g_assert_cmpint(bale_codec_compress(ctx, packed, LEN, plain, LEN), ==,
                        0);
    }
}

/* Around the exact length, and at the very small ones. */
static void test_any_limit_is_kept(gconstpointer data)
{
    BaleCodec codec = GPOINTER_TO_INT(data);
    BaleCodecLevels levels = bale_codec_levels(codec);
    const size_t len = 6000;
    g_autofree uint8_t *plain = g_malloc(len);

    random_seed();
    for (int level = levels.min; level <= levels.max; level++) {
        g_autoptr(BaleCodecContext) ctx =
            bale_codec_context_new(codec, level, len, NULL);

        for (Pattern p = 0; p < PATTERNS; p++) {
            g_autofree uint8_t *packed = NULL;
            ssize_t full;

            fill(plain, len, p);
            full = compress_exact(ctx, &packed, 2 * len, plain, len);
            g_assert_cmpint(full, >, 0);
            for (ssize_t limit = 0; limit < full + 20;
                 limit = limit < 24 ? limit + 1 :
                         limit < full - 12 ? MAX(full - 12, limit + 1) :
                         limit + 1) {
                g_autofree uint8_t *again = NULL;
                ssize_t ret = compress_exact(ctx, &again, limit, plain, len);

                if (ret > 0) {
                    check_with_reference(codec, again, ret, plain, len);
                }
            }
        }
    }
}

static void test_results_do_not_depend_on_history(gconstpointer data)
{
    BaleCodec codec = GPOINTER_TO_INT(data);
    BaleCodecLevels levels = bale_codec_levels(codec);
    g_autofree uint8_t *plain = g_malloc(PATTERNS * LEN);

    random_seed();
    for (Pattern p = 0; p < PATTERNS; p++) {
        fill(plain + p * LEN, LEN, p);
    }
    for (int level = levels.min; level <= levels.max; level++) {
        g_autoptr(BaleCodecContext) used =
            bale_codec_context_new(codec, level, LEN, NULL);

        for (int i = 0; i < 2 * PATTERNS; i++) {
            g_autoptr(BaleCodecContext) fresh =
                bale_codec_context_new(codec, level, LEN, NULL);
            const uint8_t *p = plain + random64() % PATTERNS * LEN;
            g_autofree uint8_t *a = NULL;
            g_autofree uint8_t *b = NULL;
            ssize_t a_len = compress_exact(used, &a, LEN, p, LEN);
            ssize_t b_len = compress_exact(fresh, &b, LEN, p, LEN);

            g_assert_cmpmem(a, a_len, b, b_len);
        }
    }
}

static void test_any_context_decompresses_every_codec(void)
{
    g_autofree uint8_t *plain = g_malloc(LEN);
    g_autofree uint8_t *back = g_malloc(LEN);

    random_seed();
    fill(plain, LEN, TEXT);
    for (BaleCodec from = BALE_CODEC_DEFLATE; from < BALE_CODEC__MAX; from++) {
        g_autoptr(BaleCodecContext) writer =
            bale_codec_context_new(from, 0, LEN, NULL);
        g_autofree uint8_t *packed = NULL;
        ssize_t len = compress_exact(writer, &packed, LEN, plain, LEN);

        for (BaleCodec c = 0; c < BALE_CODEC__MAX; c++) {
            g_autoptr(BaleCodecContext) reader =
                bale_codec_context_new(c, 0, LEN, NULL);

            memset(back, 0, LEN);
            g_assert_cmpint(bale_codec_decompress(reader, from, back, LEN,
                                                  packed, len), ==, 0);
            g_assert_cmpmem(back, LEN, plain, LEN);
        }
    }
}

static void test_none_copies(void)
{
    g_autoptr(BaleCodecContext) ctx =
        bale_codec_context_new(BALE_CODEC_NONE, 0, 16, NULL);
    uint8_t out[16];

    g_assert_cmpint(bale_codec_compress(ctx, out, 16, "sixteen bytes...", 16),
                    ==, 0);
    g_assert_cmpint(bale_codec_decompress(ctx, BALE_CODEC_NONE, out, 16,
                                          "sixteen bytes...", 16), ==, 0);
    g_assert_cmpmem(out, 16, "sixteen bytes...", 16);
    g_assert_cmpint(bale_codec_decompress(ctx, BALE_CODEC_NONE, out, 16,
                                          "fifteen bytes..", 15), ==, -EIO);
}

static void test_lengths_out_of_range_are_refused(void)
{
    g_autoptr(BaleCodecContext) ctx =
        bale_codec_context_new(BALE_CODEC_ZSTD, 0, 4096, NULL);
    g_autofree uint8_t *buf = g_malloc0(3 * 4096);
    g_autoptr(GError) err = NULL;

    g_assert_cmpint(bale_codec_compress(ctx, buf, 4096, buf + 4096, 4097), ==,
                    -EINVAL);
    g_assert_cmpint(bale_codec_compress(ctx, buf, 4096, buf + 4096, 0), ==,
                    -EINVAL);
    g_assert_cmpint(bale_codec_decompress(ctx, BALE_CODEC_ZSTD, buf, 4097,
                                          buf + 5000, 10), ==, -EINVAL);
    g_assert_cmpint(bale_codec_decompress(ctx, BALE_CODEC_ZSTD, buf, 0,
                                          buf + 5000, 10), ==, -EINVAL);
    g_assert_cmpint(bale_codec_decompress(ctx, 77, buf, 10, buf + 5000, 10),
                    ==, -EINVAL);
    g_assert_null(bale_codec_context_new(BALE_CODEC_ZSTD, 0, 0, &err));
    g_assert_error(err, G_FILE_ERROR, G_FILE_ERROR_INVAL);
    g_clear_error(&err);
    g_assert_null(bale_codec_context_new(BALE_CODEC_ZSTD, 0,
                                         BALE_CODEC_MAX_LEN + 1, &err));
    g_assert_error(err, G_FILE_ERROR, G_FILE_ERROR_INVAL);
    g_clear_error(&err);
    g_assert_null(bale_codec_context_new(9, 0, 4096, &err));
    g_assert_error(err, G_FILE_ERROR, G_FILE_ERROR_INVAL);
}

static void test_names_and_levels(void)
{
    g_autoptr(GError) err = NULL;
    BaleCodec codec = BALE_CODEC_NONE;

    for (BaleCodec c = 0; c < BALE_CODEC__MAX; c++) {
        BaleCodecLevels levels = bale_codec_levels(c);

        g_assert_true(bale_codec_valid(c));
        g_assert_true(bale_codec_from_name(bale_codec_name(c), &codec, &err));
        g_assert_no_error(err);
        g_assert_cmpint(codec, ==, c);
        g_assert_cmpint(levels.min, <=, levels.def);
        g_assert_cmpint(levels.def, <=, levels.max);
        g_assert_true(bale_codec_check_level(c, levels.min, &err));
        g_assert_true(bale_codec_check_level(c, levels.max, &err));
        g_assert_true(bale_codec_check_level(c, BALE_CODEC_LEVEL_DEFAULT,
                                             &err));
        g_assert_false(bale_codec_check_level(c, levels.max + 1, &err));
        g_assert_error(err, G_FILE_ERROR, G_FILE_ERROR_INVAL);
        g_assert_null(strchr(err->message, '\n'));
        g_clear_error(&err);
        /* Not min - 1, which may be the number of the default. */
        g_assert_false(bale_codec_check_level(c, levels.min - 2, NULL));
    }
    g_assert_true(bale_codec_from_name("zlib", &codec, &err));
    g_assert_cmpint(codec, ==, BALE_CODEC_DEFLATE);
    g_assert_false(bale_codec_from_name("lzma", &codec, &err));
    g_assert_error(err, G_FILE_ERROR, G_FILE_ERROR_INVAL);
    g_assert_cmpint(codec, ==, BALE_CODEC_DEFLATE);
    g_assert_null(bale_codec_name(3));
    g_assert_false(bale_codec_valid(3));
    g_assert_cmpstr(bale_codec_name(BALE_CODEC_DEFLATE), ==, "deflate");
}

/* The zstd frames that are in the library's language and not in ours. */
static void test_only_a_single_plain_zstd_frame_is_taken(void)
{
    g_autoptr(BaleCodecContext) ctx =
        bale_codec_context_new(BALE_CODEC_ZSTD, 0, LEN, NULL);
    g_autofree uint8_t *plain = g_malloc0(LEN);
    g_autofree uint8_t *back = g_malloc(LEN);
    uint8_t packed[4096];
    static const uint8_t skippable[12] = {
        0x50, 0x2a, 0x4d, 0x18, 4, 0, 0, 0, 1, 2, 3, 4
    };
    size_t one;
    size_t two;

    one = ZSTD_compress(packed, sizeof(packed), plain, LEN / 2, 3);
    g_assert_false(ZSTD_isError(one));
    two = ZSTD_compress(packed + one, sizeof(packed) - one, plain, LEN / 2, 3);
    g_assert_cmpint(bale_codec_decompress(ctx, BALE_CODEC_ZSTD, back, LEN / 2,
                                          packed, one), ==, 0);
    g_assert_cmpint(bale_codec_decompress(ctx, BALE_CODEC_ZSTD, back, LEN,
                                          packed, one + two), ==, -EIO);
    g_assert_cmpint(bale_codec_decompress(ctx, BALE_CODEC_ZSTD, back, LEN / 2,
                                          packed, one + two), ==, -EIO);
    memcpy(packed + one, skippable, sizeof(skippable));
    g_assert_cmpint(bale_codec_decompress(ctx, BALE_CODEC_ZSTD, back, LEN / 2,
                                          packed, one + sizeof(skippable)), ==,
                    -EIO);
    g_assert_cmpint(bale_codec_decompress(ctx, BALE_CODEC_ZSTD, back, LEN / 2,
                                          skippable, sizeof(skippable)), ==,
                    -EIO);
    g_assert_cmpint(bale_codec_decompress(ctx, BALE_CODEC_ZSTD, back, LEN / 2,
                                          "\x28\xb5\x2f\xfd", 4), ==, -EIO);
    /* The oldest format's magic number, which the library still knows. */
    g_assert_cmpint(bale_codec_decompress(ctx, BALE_CODEC_ZSTD, back, LEN / 2,
                                          "\x27\xb5\x2f\xfd\0\0\0\0\0\0", 10),
                    ==, -EIO);
}

static void test_deflate_without_end_or_with_a_tail_is_refused(void)
{
    g_autoptr(BaleCodecContext) ctx =
        bale_codec_context_new(BALE_CODEC_DEFLATE, 0, LEN, NULL);
    uint8_t out[4];
    /* A stored block of 4 bytes; the first bit says that it is the last. */
    uint8_t stored[] = { 1, 4, 0, 0xfb, 0xff, 'b', 'a', 'l', 'e', 0 };
    const size_t len = sizeof(stored) - 1;

    g_assert_cmpint(bale_codec_decompress(ctx, BALE_CODEC_DEFLATE, out, 4,
                                          stored, len), ==, 0);
    g_assert_cmpmem(out, 4, "bale", 4);
    g_assert_cmpint(bale_codec_decompress(ctx, BALE_CODEC_DEFLATE, out, 4,
                                          stored, len + 1), ==, -EIO);
    g_assert_cmpint(bale_codec_decompress(ctx, BALE_CODEC_DEFLATE, out, 3,
                                          stored, len), ==, -EIO);
    stored[0] = 0;
    g_assert_cmpint(bale_codec_decompress(ctx, BALE_CODEC_DEFLATE, out, 4,
                                          stored, len), ==, -EIO);
    g_assert_cmpint(bale_codec_decompress(ctx, BALE_CODEC_DEFLATE, out, 4,
                                          stored, 0), ==, -EIO);
}

/* Whether zlib takes all of @src as one stream of exactly @dst_len bytes. */
static bool zlib_accepts(const uint8_t *src, size_t src_len, uint8_t *dst,
                         size_t dst_len)
{
    z_stream z = { 0 };
    bool ok;

    g_assert_cmpint(inflateInit2(&z, -15), ==, Z_OK);
    z.next_in = (uint8_t *)src;
    z.avail_in = src_len;
    z.next_out = dst;
    z.avail_out = dst_len;
    ok = inflate(&z, Z_FINISH) == Z_STREAM_END && z.avail_in == 0 &&
        z.avail_out == 0;
    inflateEnd(&z);
    return ok;
}

/*
 * Flip bits, cut, splice and append.  What zlib takes must decompress to the
 * same bytes; nothing may crash or leave its buffers.
 */
static void test_damaged_streams_are_survived(gconstpointer data)
{
    BaleCodec codec = GPOINTER_TO_INT(data);
    const size_t len = 8192;
    g_autoptr(BaleCodecContext) ctx =
        bale_codec_context_new(codec, 0, LEN, NULL);
    g_autofree uint8_t *plain = g_malloc(len);
    g_autofree uint8_t *reference = g_malloc(len);
    int accepted = 0;

    random_seed();
    for (int i = 0; i < 6000; i++) {
        g_autofree uint8_t *packed = NULL;
        g_autofree uint8_t *bad = NULL;
        g_autofree uint8_t *back = g_malloc(len);
        ssize_t n;
        size_t bad_len;
        int ret;

        fill(plain, len, random64() % PATTERNS);
        n = compress_exact(ctx, &packed, 2 * len, plain, len);
        g_assert_cmpint(n, >, 0);
        bad_len = n;
        if (random64() % 4 == 0) {
            bad_len = random64() % (n + 1);
        } else if (random64() % 8 == 0) {
            bad_len = n + 1 + random64() % 16;
        }
        bad = g_malloc0(MAX(bad_len, 1));
        memcpy(bad, packed, MIN(bad_len, (size_t)n));
        for (int flips = random64() % 4; flips > 0 && bad_len > 0; flips--) {
            /* Headers are where the interesting bits are. */
            size_t at = random64() % (random64() % 2 ? MIN(bad_len, 80) :
                                      bad_len);

            bad[at] ^= 1 << random64() % 8;
        }
        ret = bale_codec_decompress(ctx, codec, back, len, bad, bad_len);
        g_assert_true(ret == 0 || ret == -EIO);
        accepted += ret == 0;
        if (codec == BALE_CODEC_DEFLATE) {
            bool ok = zlib_accepts(bad, bad_len, reference, len);

            /* Stricter than zlib in nothing, laxer never on the result. */
            g_assert_true(!ok || ret == 0);
            if (ok) {
                g_assert_cmpmem(back, len, reference, len);
            }
        }
    }
    g_assert_cmpint(accepted, >, 0);
}

static void test_noise_is_survived(gconstpointer data)
{
    BaleCodec codec = GPOINTER_TO_INT(data);
    g_autoptr(BaleCodecContext) ctx =
        bale_codec_context_new(codec, 0, LEN, NULL);

    random_seed();
    for (int i = 0; i < 20000; i++) {
        size_t src_len = random64() % 300;
        size_t dst_len = 1 + random64() % 5000;
        g_autofree uint8_t *src = g_malloc(MAX(src_len, 1));
        g_autofree uint8_t *dst = g_malloc(dst_len);
        int ret;

        fill(src, src_len, RANDOM);
        if (codec == BALE_CODEC_ZSTD && src_len > 6) {
            memcpy(src, "\x28\xb5\x2f\xfd", 4);
            src[4] &= 0xe4;
        }
        ret = bale_codec_decompress(ctx, codec, dst, dst_len, src, src_len);
        g_assert_true(ret == 0 || ret == -EIO);
    }
}

/* A few bytes that claim a window of gigabytes. */
static void test_a_huge_zstd_window_costs_nothing(void)
{
    static const uint8_t frame[] = {
        0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xf8,
        /* The last block, one byte 'x' repeated 4096 times. */
        0x03, 0x80, 0x00, 'x',
    };
    g_autoptr(BaleCodecContext) ctx =
        bale_codec_context_new(BALE_CODEC_ZSTD, 0, LEN, NULL);
    uint8_t out[4096];

    /* Taken or refused, but neither crashed nor out of memory. */
    int ret = bale_codec_decompress(ctx, BALE_CODEC_ZSTD, out, sizeof(out),
                                    frame, sizeof(frame));

    g_assert_true(ret == 0 || ret == -EIO);
}

/* Streams of other compressors, with their other block and table choices. */
static void test_streams_of_zlib_and_zstd_are_read(void)
{
    g_autoptr(BaleCodecContext) ctx =
        bale_codec_context_new(BALE_CODEC_DEFLATE, 0, LEN, NULL);
    g_autofree uint8_t *plain = g_malloc(LEN);
    g_autofree uint8_t *back = g_malloc(LEN);
    g_autofree uint8_t *packed = g_malloc(2 * LEN);

    random_seed();
    for (Pattern p = 0; p < PATTERNS; p++) {
        fill(plain, LEN, p);
        for (int level = 0; level <= 9; level++) {
            for (int strategy = Z_DEFAULT_STRATEGY; strategy <= Z_FIXED;
                 strategy++) {
                z_stream z = { 0 };

                g_assert_cmpint(deflateInit2(&z, level, Z_DEFLATED, -12, 8,
                                             strategy), ==, Z_OK);
                z.next_in = plain;
                z.avail_in = LEN;
                z.next_out = packed;
                z.avail_out = 2 * LEN;
                g_assert_cmpint(deflate(&z, Z_FINISH), ==, Z_STREAM_END);
                memset(back, 0, LEN);
                g_assert_cmpint(bale_codec_decompress(ctx, BALE_CODEC_DEFLATE,
                                                      back, LEN, packed,
                                                      z.total_out), ==, 0);
                g_assert_cmpmem(back, LEN, plain, LEN);
                deflateEnd(&z);
            }
        }
        for (int level = -7; level <= 22; level++) {
            size_t n = ZSTD_compress(packed, 2 * LEN, plain, LEN, level);

            memset(back, 0, LEN);
            g_assert_cmpint(bale_codec_decompress(ctx, BALE_CODEC_ZSTD, back,
                                                  LEN, packed, n), ==, 0);
            g_assert_cmpmem(back, LEN, plain, LEN);
        }
    }
}

static void add_for_both(const char *name, GTestDataFunc fn)
{
    for (BaleCodec c = BALE_CODEC_DEFLATE; c <= BALE_CODEC_ZSTD; c++) {
        g_autofree char *path =
            g_strdup_printf("/codec/%s/%s", bale_codec_name(c), name);

        g_test_add_data_func(path, GINT_TO_POINTER(c), fn);
    }
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/codec/deflate/round-trips-at-every-level",
                    test_deflate_round_trips_at_every_level);
    g_test_add_func("/codec/zstd/round-trips-at-every-level",
                    test_zstd_round_trips_at_every_level);
    add_for_both("round-trips-at-every-length", round_trip_lengths);
    add_for_both("regular-data-shrinks", test_regular_data_shrinks);
    add_for_both("random-data-does-not-fit", test_random_data_does_not_fit);
    add_for_both("any-limit-is-kept", test_any_limit_is_kept);
    add_for_both("results-do-not-depend-on-history",
                 test_results_do_not_depend_on_history);
    add_for_both("damaged-streams-are-survived",
                 test_damaged_streams_are_survived);
    add_for_both("noise-is-survived", test_noise_is_survived);
    g_test_add_func("/codec/any-context-decompresses-every-codec",
                    test_any_context_decompresses_every_codec);
    g_test_add_func("/codec/none-copies", test_none_copies);
    g_test_add_func("/codec/lengths-out-of-range-are-refused",
                    test_lengths_out_of_range_are_refused);
    g_test_add_func("/codec/names-and-levels", test_names_and_levels);
    g_test_add_func("/codec/only-a-single-plain-zstd-frame-is-taken",
                    test_only_a_single_plain_zstd_frame_is_taken);
    g_test_add_func("/codec/deflate-without-end-or-with-a-tail-is-refused",
                    test_deflate_without_end_or_with_a_tail_is_refused);
    g_test_add_func("/codec/a-huge-zstd-window-costs-nothing",
                    test_a_huge_zstd_window_costs_nothing);
    g_test_add_func("/codec/streams-of-zlib-and-zstd-are-read",
                    test_streams_of_zlib_and_zstd_are_read);
    return g_test_run();
}
