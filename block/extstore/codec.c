/*
 * Codecs: compress and decompress one cluster.
 *
 * The default levels are mixtures: a sample of the cluster's bytes tells in a
 * few microseconds how random they are, and that tells well enough which of
 * the libraries' methods spends its time best on them.
 *
 * Measured with tests/bench/bench-codec.c on the 7458 nonzero clusters (64 KiB
 * each, 488.8 MB) of a Debian 12 root in ext4, one core of an AMD EPYC virtual
 * machine, libdeflate 1.14, ISA-L 2.30, libzstd 1.5.4; sizes without record
 * headers; * marks the default.  zlib at level 6 with a window of 4 KiB, which
 * is what qemu-img uses for qcow2, packs them to 186.5 MB at 62 MB/s, zstd
 * at level 3 to 183.1 MB at 405 MB/s.
 *
 *     deflate  method                MB/s   size MB
 *        1     igzip 1                715    194.3
 *        2     igzip 2                579    191.6
 *        3 *   mixture by entropy     372    187.8
 *        4     libdeflate 4           169    179.0
 *        5     libdeflate 5           142    176.2
 *        6     libdeflate 6           122    175.4
 *        7     libdeflate 7            95    174.9
 *        9     libdeflate 9            37    174.3
 *
 *      zstd    method                MB/s   size MB
 *       -7     zstd -7                903    269.2
 *       -1     zstd -1                660    208.1
 *        1 *   fast, by entropy       512    184.2
 *        2     fast and dfast         467    183.1
 *        3     the same, more dfast   423    181.7
 *        4     zstd 4                 388    181.2
 *        5     zstd 5                 225    177.8
 *        6     zstd 6                 164    174.7
 *        7     zstd 7                 135    174.0
 *        9     zstd 9                 107    173.3
 *
 * On the first 67 MB of them, libdeflate 12 is 1.4 % smaller than libdeflate 6
 * at 17 MB/s, and zstd 19 is 5.4 % smaller than zstd 6 at 9 MB/s.
 *
 * Decompression: 970 MB/s for deflate (libdeflate; ISA-L's inflate 890), 1750
 * to 3000 MB/s for zstd.
 *
 * Invariants: a context's buffers and library contexts are all made with it,
 * so nothing is allocated per cluster.  The result depends on the input and
 * the level only, never on what the context did before.
 *
 * Threads and errors: as in the header.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "extstore/codec.h"

#include <assert.h>
#include <errno.h>
#include <isa-l/igzip_lib.h>
#include <libdeflate.h>
#include <stdint.h>
#include <string.h>
#include <zstd.h>
#include <zstd_errors.h>

/* What is sampled of a cluster: chunks at equal distances, in bytes. */
#define SAMPLE_CHUNK_LEN 128
#define SAMPLE_CHUNKS 32
#define SAMPLE_LEN (SAMPLE_CHUNK_LEN * SAMPLE_CHUNKS)

/* Entropy of a sampled byte, in 1/256 bit. */
#define ENTROPY_BITS(n) ((unsigned)((n) * 256))

/*
 * igzip ends a block when its token buffer is full.  With the buffer that its
 * header recommends a cluster is one block.  Smaller ones cost the building
 * of more Huffman codes and yield codes that fit better.
 */
#define IGZIP_BUF_LEN(level, tokens) \
    (ISAL_DEF_LVL##level##_REQ + ISAL_DEF_LVL##level##_TOKEN_SIZE * (tokens))
#define IGZIP1_BUF_LEN ISAL_DEF_LVL1_DEFAULT
#define IGZIP2_BUF_LEN IGZIP_BUF_LEN(2, 8192)
#define IGZIP3_BUF_LEN IGZIP_BUF_LEN(3, 5120)
#define IGZIP3_LONG_BUF_LEN IGZIP_BUF_LEN(3, 11264)
#define IGZIP_BUF_MAX_LEN \
    MAX(MAX(IGZIP1_BUF_LEN, IGZIP2_BUF_LEN), \
        MAX(IGZIP3_BUF_LEN, IGZIP3_LONG_BUF_LEN))

/*
 * The default deflate level in order of entropy. Very regular and random
 * clusters: igzip's lower levels find as much there. Those in between: where
 * a microsecond of its level 3 saves most bytes. From MIX_SPARSE to MIX_TEXT
 * (tables, debug information) libdeflate finds long matches that igzip's
 * small hash table has forgotten, at little more time than level 3. A result
 * in the range of the two percentages is mostly of code with short matches,
 * which libdeflate can use and igzip cannot.
 */
#define MIX_REGULAR ENTROPY_BITS(2.0)
#define MIX_SPARSE ENTROPY_BITS(3.1)
#define MIX_TEXT ENTROPY_BITS(4.0)
#define MIX_CODE ENTROPY_BITS(6.0)
#define MIX_PACKED ENTROPY_BITS(6.5)
#define MIX_RANDOM ENTROPY_BITS(7.4)
#define MIX_RETRY_MIN_PERCENT 70
#define MIX_RETRY_MAX_PERCENT 82
#define MIX_LIBDEFLATE_LEVEL 2

/* Above this entropy matches of 4 bytes pay, below it those of 5. */
#define ZSTD_SHORT_MATCHES ENTROPY_BITS(5.75)

/* From where to where level 2 and level 3 use the stronger matcher. */
#define ZSTD_DFAST_MIN ENTROPY_BITS(2.5)
#define ZSTD_DFAST_MAX_2 ENTROPY_BITS(4.75)
#define ZSTD_DFAST_MAX_3 ENTROPY_BITS(6.0)

/* 512 KiB: fewer collisions cost less than the cache misses. */
#define ZSTD_HASH_LOG 17

/* The smallest window that the format can express. */
#define ZSTD_MIN_WINDOW_LOG 10

typedef enum DeflateMethod {
    DEFLATE_IGZIP1,
    DEFLATE_IGZIP2,
    DEFLATE_MIX,
    DEFLATE_LIBDEFLATE,
} DeflateMethod;

struct BaleCodecContext {
    BaleCodec codec;
    int level;
    size_t max_len;

    DeflateMethod deflate_method;
    struct libdeflate_compressor *libdeflate;
    struct libdeflate_decompressor *inflate;
    struct isal_zstream *igzip;
    uint8_t *igzip_buf;

    /*
     * At the first few levels, zstd clusters of an entropy from ZSTD_DFAST_MIN
     * to dfast_max go to the slower and stronger of two matchers.
     */
    bool zstd_mix;
    unsigned dfast_max;
    ZSTD_CCtx *zstd;
    ZSTD_CCtx *zstd_dfast;
    ZSTD_DCtx *unzstd;
};

static const struct {
    const char *name;
    BaleCodecLevels levels;
} codecs[BALE_CODEC__MAX] = {
    [BALE_CODEC_NONE] = { "none", { 0, 0, 0 } },
    [BALE_CODEC_DEFLATE] = { "deflate", { 1, 3, 12 } },
    [BALE_CODEC_ZSTD] = { "zstd", { -7, 1, 19 } },
};

bool bale_codec_valid(unsigned codec)
{
    return codec < BALE_CODEC__MAX;
}

const char *bale_codec_name(BaleCodec codec)
{
    return bale_codec_valid(codec) ? codecs[codec].name : NULL;
}

bool bale_codec_from_name(const char *name, BaleCodec *codec, GError **errp)
{
    if (strcmp(name, "zlib") == 0) {
        *codec = BALE_CODEC_DEFLATE;
        return true;
    }
    for (unsigned i = 0; i < BALE_CODEC__MAX; i++) {
        if (strcmp(name, codecs[i].name) == 0) {
            *codec = i;
            return true;
        }
    }
    g_set_error(errp, G_FILE_ERROR, G_FILE_ERROR_INVAL,
                "unknown compression type '%s': use none, deflate or zstd",
                name);
    return false;
}

BaleCodecLevels bale_codec_levels(BaleCodec codec)
{
    assert(bale_codec_valid(codec));
    return codecs[codec].levels;
}

bool bale_codec_check_level(BaleCodec codec, int level, GError **errp)
{
    const BaleCodecLevels *levels;

    assert(bale_codec_valid(codec));
    levels = &codecs[codec].levels;
    if (level == BALE_CODEC_LEVEL_DEFAULT ||
        (level >= levels->min && level <= levels->max)) {
        return true;
    }
    if (levels->min == levels->max) {
        g_set_error(errp, G_FILE_ERROR, G_FILE_ERROR_INVAL,
                    "compression level %d: compression type %s has no levels",
                    level, codecs[codec].name);
    } else {
        g_set_error(errp, G_FILE_ERROR, G_FILE_ERROR_INVAL,
                    "compression level %d is out of range for %s: use %d "
                    "to %d, or %d for the default", level,
                    codecs[codec].name, levels->min, levels->max,
                    BALE_CODEC_LEVEL_DEFAULT);
    }
    return false;
}

/*
 * log2 of @n (not 0) in 1/256.  The fraction f is f + 0.344 f (1 - f), which is
 * off by less than 0.01.
 */
static inline unsigned rough_log2(unsigned n)
{
    unsigned whole = 31 - __builtin_clz(n);
    unsigned f = ((uint64_t)n << 8 >> whole) - 256;

    return (whole << 8) + f + (f * (256 - f) * 88 >> 16);
}

/* Estimate the entropy of a byte of @src in 1/256 bit. */
static unsigned sample_entropy(const uint8_t *src, size_t src_len)
{
    /* Several tables, lest equal neighbours wait for each other's store. */
    uint16_t count[4][256];
    size_t chunks = SAMPLE_CHUNKS;
    size_t step = 0;
    uint64_t sum = 0;

    memset(count, 0, sizeof(count));
    if (src_len < SAMPLE_LEN) {
        chunks = src_len / SAMPLE_CHUNK_LEN;
        if (chunks == 0) {
            return 0;
        }
        step = SAMPLE_CHUNK_LEN;
    } else {
        step = (src_len - SAMPLE_CHUNK_LEN) / (SAMPLE_CHUNKS - 1);
    }
    for (size_t i = 0; i < chunks; i++) {
        const uint8_t *p = src + i * step;

        for (size_t j = 0; j < SAMPLE_CHUNK_LEN; j += 4) {
            count[0][p[j]]++;
            count[1][p[j + 1]]++;
            count[2][p[j + 2]]++;
            count[3][p[j + 3]]++;
        }
    }
    for (unsigned i = 0; i < 256; i++) {
        unsigned n = count[0][i] + count[1][i] + count[2][i] + count[3][i];

        if (n > 1) {
            sum += (uint64_t)n * rough_log2(n);
        }
    }
    return rough_log2(chunks * SAMPLE_CHUNK_LEN) -
        sum / (chunks * SAMPLE_CHUNK_LEN);
}

static size_t igzip_compress(BaleCodecContext *ctx, int level, size_t buf_len,
                             void *dst, size_t dst_len, const void *src,
                             size_t src_len)
{
    struct isal_zstream *z = ctx->igzip;

    assert(buf_len <= IGZIP_BUF_MAX_LEN);
    isal_deflate_init(z);
    z->level = level;
    z->level_buf = ctx->igzip_buf;
    z->level_buf_size = buf_len;
    z->end_of_stream = 1;
    z->flush = NO_FLUSH;
    z->gzip_flag = IGZIP_DEFLATE;
    z->next_in = (uint8_t *)src;
    z->avail_in = src_len;
    z->next_out = dst;
    z->avail_out = dst_len;
    if (isal_deflate(z) != COMP_OK ||
        z->internal_state.state != ZSTATE_END || z->avail_in != 0) {
        return 0;
    }
    return dst_len - z->avail_out;
}

static size_t igzip_by_entropy(BaleCodecContext *ctx, unsigned entropy,
                               void *dst, size_t dst_len, const void *src,
                               size_t src_len)
{
    int level;
    size_t buf_len;

    if (entropy < MIX_REGULAR || entropy >= MIX_RANDOM) {
        level = 1;
        buf_len = IGZIP1_BUF_LEN;
    } else if (entropy < MIX_TEXT || entropy >= MIX_PACKED) {
        level = 2;
        buf_len = IGZIP2_BUF_LEN;
    } else if (entropy < MIX_CODE) {
        level = 3;
        buf_len = IGZIP3_BUF_LEN;
    } else {
        level = 3;
        buf_len = IGZIP3_LONG_BUF_LEN;
    }
    return igzip_compress(ctx, level, buf_len, dst, dst_len, src, src_len);
}

static size_t deflate_mix(BaleCodecContext *ctx, void *dst, size_t dst_len,
                          const void *src, size_t src_len)
{
    unsigned entropy = sample_entropy(src, src_len);
    size_t len;

    if (entropy >= MIX_SPARSE && entropy < MIX_TEXT) {
        return libdeflate_deflate_compress(ctx->libdeflate, src, src_len, dst,
                                           dst_len);
    }
    len = igzip_by_entropy(ctx, entropy, dst, dst_len, src, src_len);
    if (len >= src_len * MIX_RETRY_MIN_PERCENT / 100 &&
        len < src_len * MIX_RETRY_MAX_PERCENT / 100) {
        size_t shorter =
            libdeflate_deflate_compress(ctx->libdeflate, src, src_len, dst,
                                        len);

        if (shorter != 0) {
            return shorter;
        }
        /* Rare: the first result is overwritten, so make it again. */
        len = igzip_by_entropy(ctx, entropy, dst, dst_len, src, src_len);
    }
    return len;
}

static ssize_t deflate_compress(BaleCodecContext *ctx, void *dst,
                                size_t dst_len, const void *src,
                                size_t src_len)
{
    switch (ctx->deflate_method) {
    case DEFLATE_IGZIP1:
        return igzip_compress(ctx, 1, IGZIP1_BUF_LEN, dst, dst_len, src,
                              src_len);
    case DEFLATE_IGZIP2:
        return igzip_compress(ctx, 2, IGZIP2_BUF_LEN, dst, dst_len, src,
                              src_len);
    case DEFLATE_MIX:
        return deflate_mix(ctx, dst, dst_len, src, src_len);
    case DEFLATE_LIBDEFLATE:
        return libdeflate_deflate_compress(ctx->libdeflate, src, src_len,
                                           dst, dst_len);
    }
    g_assert_not_reached();
}

static ssize_t zstd_compress(BaleCodecContext *ctx, void *dst, size_t dst_len,
                             const void *src, size_t src_len)
{
    ZSTD_CCtx *zstd = ctx->zstd;
    size_t ret;

    if (ctx->zstd_mix) {
        unsigned entropy = sample_entropy(src, src_len);

        if (entropy >= ZSTD_DFAST_MIN && entropy < ctx->dfast_max) {
            zstd = ctx->zstd_dfast;
        } else {
            int match = entropy < ZSTD_SHORT_MATCHES ? 5 : 4;

            ret = ZSTD_CCtx_setParameter(zstd, ZSTD_c_minMatch, match);
            assert(!ZSTD_isError(ret));
        }
    }
    ret = ZSTD_compress2(zstd, dst, dst_len, src, src_len);
    if (!ZSTD_isError(ret)) {
        return ret;
    }
    switch (ZSTD_getErrorCode(ret)) {
    case ZSTD_error_dstSize_tooSmall:
        return 0;
    case ZSTD_error_memory_allocation:
        return -ENOMEM;
    default:
        return -EIO;
    }
}

ssize_t bale_codec_compress(BaleCodecContext *ctx, void *dst, size_t dst_len,
                            const void *src, size_t src_len)
{
    ssize_t ret = 0;

    if (src_len == 0 || src_len > ctx->max_len) {
        return -EINVAL;
    }
    /* No library writes more than a few times its input. */
    dst_len = MIN(dst_len, 2 * src_len + 1024);
    if (dst_len == 0) {
        return 0;
    }
    switch (ctx->codec) {
    case BALE_CODEC_DEFLATE:
        ret = deflate_compress(ctx, dst, dst_len, src, src_len);
        break;
    case BALE_CODEC_ZSTD:
        ret = zstd_compress(ctx, dst, dst_len, src, src_len);
        break;
    default:
        break;
    }
    assert(ret <= (ssize_t)dst_len);
    return ret;
}

static int inflate(BaleCodecContext *ctx, void *dst, size_t dst_len,
                   const void *src, size_t src_len)
{
    size_t used;
    size_t made;

    if (libdeflate_deflate_decompress_ex(ctx->inflate, src, src_len, dst,
                                         dst_len, &used, &made)
        != LIBDEFLATE_SUCCESS) {
        return -EIO;
    }
    return used == src_len && made == dst_len ? 0 : -EIO;
}

/*
 * The library would also take several frames, skippable frames, and frames of
 * its old formats, whose decoders nobody looks at any more.
 */
static bool is_one_zstd_frame(const void *src, size_t src_len)
{
    static const uint8_t magic[4] = { 0x28, 0xb5, 0x2f, 0xfd };

    return src_len > sizeof(magic) &&
        memcmp(src, magic, sizeof(magic)) == 0 &&
        ZSTD_findFrameCompressedSize(src, src_len) == src_len;
}

static int unzstd(BaleCodecContext *ctx, void *dst, size_t dst_len,
                  const void *src, size_t src_len)
{
    if (!is_one_zstd_frame(src, src_len)) {
        return -EIO;
    }
    /*
     * One call straight into @dst: the frame's window is not allocated,
     * however large it claims to be.
     */
    return ZSTD_decompressDCtx(ctx->unzstd, dst, dst_len, src, src_len) ==
        dst_len ? 0 : -EIO;
}

int bale_codec_decompress(BaleCodecContext *ctx, BaleCodec codec, void *dst,
                          size_t dst_len, const void *src, size_t src_len)
{
    if (dst_len == 0 || dst_len > ctx->max_len) {
        return -EINVAL;
    }
    switch (codec) {
    case BALE_CODEC_NONE:
        if (src_len != dst_len) {
            return -EIO;
        }
        memcpy(dst, src, dst_len);
        return 0;
    case BALE_CODEC_DEFLATE:
        return inflate(ctx, dst, dst_len, src, src_len);
    case BALE_CODEC_ZSTD:
        return unzstd(ctx, dst, dst_len, src, src_len);
    default:
        return -EINVAL;
    }
}

static bool deflate_init(BaleCodecContext *ctx)
{
    int level = 0;

    switch (ctx->level) {
    case 1:
        ctx->deflate_method = DEFLATE_IGZIP1;
        break;
    case 2:
        ctx->deflate_method = DEFLATE_IGZIP2;
        break;
    case 3:
        ctx->deflate_method = DEFLATE_MIX;
        level = MIX_LIBDEFLATE_LEVEL;
        break;
    default:
        ctx->deflate_method = DEFLATE_LIBDEFLATE;
        level = ctx->level;
        break;
    }
    if (ctx->deflate_method != DEFLATE_LIBDEFLATE) {
        ctx->igzip = g_try_new0(struct isal_zstream, 1);
        ctx->igzip_buf = g_try_malloc0(IGZIP_BUF_MAX_LEN);
        if (ctx->igzip == NULL || ctx->igzip_buf == NULL) {
            return false;
        }
    }
    if (level != 0) {
        ctx->libdeflate = libdeflate_alloc_compressor(level);
        if (ctx->libdeflate == NULL) {
            return false;
        }
    }
    return true;
}

/*
 * The parameters are in the range of every version of the library, so that
 * setting them cannot fail.
 */
static ZSTD_CCtx *zstd_new(int level, size_t max_len)
{
    ZSTD_CCtx *zstd = ZSTD_createCCtx();
    int window_log = ZSTD_MIN_WINDOW_LOG;

    if (zstd == NULL) {
        return NULL;
    }
    while (((size_t)1 << window_log) < max_len) {
        window_log++;
    }
    ZSTD_CCtx_setParameter(zstd, ZSTD_c_compressionLevel, level);
    ZSTD_CCtx_setParameter(zstd, ZSTD_c_windowLog, window_log);
    ZSTD_CCtx_setParameter(zstd, ZSTD_c_contentSizeFlag, 0);
    ZSTD_CCtx_setParameter(zstd, ZSTD_c_checksumFlag, 0);
    ZSTD_CCtx_setParameter(zstd, ZSTD_c_dictIDFlag, 0);
    return zstd;
}

/* Let the library allocate what it is going to need. */
static bool zstd_warm_up(ZSTD_CCtx *zstd, size_t max_len)
{
    g_autofree void *src = g_try_malloc0(max_len);
    g_autofree void *dst = g_try_malloc(ZSTD_compressBound(max_len));

    return src != NULL && dst != NULL &&
        !ZSTD_isError(ZSTD_compress2(zstd, dst, ZSTD_compressBound(max_len),
                                     src, max_len));
}

static bool zstd_init(BaleCodecContext *ctx)
{
    ctx->zstd = zstd_new(ctx->level, ctx->max_len);
    if (ctx->zstd == NULL) {
        return false;
    }
    if (ctx->level >= 1 && ctx->level <= 3) {
        ctx->zstd_mix = true;
        ctx->dfast_max = ctx->level == 1 ? 0 :
            ctx->level == 2 ? ZSTD_DFAST_MAX_2 : ZSTD_DFAST_MAX_3;
        /* Level 1 brings the rest that belongs to this strategy. */
        ZSTD_CCtx_setParameter(ctx->zstd, ZSTD_c_compressionLevel, 1);
        ZSTD_CCtx_setParameter(ctx->zstd, ZSTD_c_strategy, ZSTD_fast);
        ZSTD_CCtx_setParameter(ctx->zstd, ZSTD_c_hashLog, ZSTD_HASH_LOG);
        ZSTD_CCtx_setParameter(ctx->zstd, ZSTD_c_minMatch, 4);
    }
    if (ctx->dfast_max > 0) {
        ctx->zstd_dfast = zstd_new(ctx->level, ctx->max_len);
        if (ctx->zstd_dfast == NULL) {
            return false;
        }
        ZSTD_CCtx_setParameter(ctx->zstd_dfast, ZSTD_c_strategy, ZSTD_dfast);
        ZSTD_CCtx_setParameter(ctx->zstd_dfast, ZSTD_c_hashLog,
                               ZSTD_HASH_LOG);
        ZSTD_CCtx_setParameter(ctx->zstd_dfast, ZSTD_c_chainLog,
                               ZSTD_HASH_LOG);
        ZSTD_CCtx_setParameter(ctx->zstd_dfast, ZSTD_c_minMatch, 4);
        if (!zstd_warm_up(ctx->zstd_dfast, ctx->max_len)) {
            return false;
        }
    }
    return zstd_warm_up(ctx->zstd, ctx->max_len);
}

BaleCodecContext *bale_codec_context_new(BaleCodec codec, int level,
                                         size_t max_len, GError **errp)
{
    g_autoptr(BaleCodecContext) ctx = NULL;
    bool ok = true;

    if (!bale_codec_valid(codec)) {
        g_set_error(errp, G_FILE_ERROR, G_FILE_ERROR_INVAL,
                    "unknown compression type %u", (unsigned)codec);
        return NULL;
    }
    if (max_len == 0 || max_len > BALE_CODEC_MAX_LEN) {
        g_set_error(errp, G_FILE_ERROR, G_FILE_ERROR_INVAL,
                    "cannot compress clusters of %zu bytes, the limit is %zu",
                    max_len, BALE_CODEC_MAX_LEN);
        return NULL;
    }
    if (!bale_codec_check_level(codec, level, errp)) {
        return NULL;
    }

    ctx = g_new0(BaleCodecContext, 1);
    ctx->codec = codec;
    ctx->level = level == BALE_CODEC_LEVEL_DEFAULT ?
        codecs[codec].levels.def : level;
    ctx->max_len = max_len;
    ctx->inflate = libdeflate_alloc_decompressor();
    ctx->unzstd = ZSTD_createDCtx();
    if (codec == BALE_CODEC_DEFLATE) {
        ok = deflate_init(ctx);
    } else if (codec == BALE_CODEC_ZSTD) {
        ok = zstd_init(ctx);
    }
    if (!ok || ctx->inflate == NULL || ctx->unzstd == NULL) {
        g_set_error(errp, G_FILE_ERROR, G_FILE_ERROR_NOMEM,
                    "not enough memory to compress with %s, level %d",
                    codecs[codec].name, ctx->level);
        return NULL;
    }
    return g_steal_pointer(&ctx);
}

void bale_codec_context_free(BaleCodecContext *ctx)
{
    if (ctx == NULL) {
        return;
    }
    libdeflate_free_compressor(ctx->libdeflate);
    libdeflate_free_decompressor(ctx->inflate);
    g_free(ctx->igzip);
    g_free(ctx->igzip_buf);
    ZSTD_freeCCtx(ctx->zstd);
    ZSTD_freeCCtx(ctx->zstd_dfast);
    ZSTD_freeDCtx(ctx->unzstd);
    g_free(ctx);
}
