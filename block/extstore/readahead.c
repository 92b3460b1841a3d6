/*
 * Read-ahead: tells sequential readers of an image apart, and how far before
 * each of them to read.
 *
 * A read that begins where an earlier one ended continues a stream.  The first
 * read of a stream is like any other: nothing is read ahead for reads at
 * random.  What all streams may have ahead shrinks while more of it is dropped
 * from the cache unread than used.
 *
 * Threads: any; all is under the image's stream_lock, a leaf.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "request-internal.h"

#include "util/memory.h"

/* How far read-ahead goes, bytes, or as many clusters if they are large. */
#define READAHEAD_MAX (1u << 20)
#define READAHEAD_CLUSTERS_MAX 4u
/* ... and at most this part of the cache. */
#define READAHEAD_CACHE_PART 16u
/* After so many clusters were used or wasted the length is looked at. */
#define READAHEAD_SAMPLE 32u
/* A stream that was not continued for so many reads may be replaced. */
#define STREAM_AGE_MAX 64u

/*
 * How far to be ahead at most: less while more of what is read ahead is
 * dropped unread than used.  Under stream_lock.
 */
static uint32_t streams_ahead_max(BaleImage *image)
{
    BaleStore *s = image->store;
    uint64_t limit = MAX(READAHEAD_MAX,
                         (uint64_t)READAHEAD_CLUSTERS_MAX * s->cluster_size);
    uint64_t used, wasted;

    limit = MIN(limit, bale_cache_max_bytes(s->cache) / READAHEAD_CACHE_PART);
    if (limit < s->cluster_size) {
        return 0;
    }
    bale_cache_ahead(s->cache, &used, &wasted);
    used -= image->ahead_used;
    wasted -= image->ahead_wasted;
    if (used + wasted >= READAHEAD_SAMPLE) {
        image->ahead_used += used;
        image->ahead_wasted += wasted;
        image->ahead_max = wasted > used ? image->ahead_max / 2
                                         : image->ahead_max * 2;
    }
    image->ahead_max = MIN(MAX(image->ahead_max, s->cluster_size), limit);
    return image->ahead_max;
}

/* The stream that this read continues, or NULL.  Under stream_lock. */
static BaleReadStream *stream_find(BaleImage *image, uint64_t offset,
                                   uint64_t end)
{
    BaleReadStream *oldest = &image->streams[0];
    uint64_t clock = ++image->stream_clock;

    for (unsigned i = 0; i < READ_STREAMS; i++) {
        BaleReadStream *stream = &image->streams[i];

        if (stream->next == offset && stream->used) {
            stream->next = end;
            stream->used = clock;
            stream->hits++;
            return stream;
        }
        /* What has proven to be a stream is not replaced at once. */
        if (stream->used + (stream->hits ? STREAM_AGE_MAX : 0) <
            oldest->used + (oldest->hits ? STREAM_AGE_MAX : 0)) {
            oldest = stream;
        }
    }
    *oldest = (BaleReadStream){ .next = end, .ahead = end, .used = clock };
    return NULL;
}

/*
 * A small read: what to fetch for the reader to find there next.  The window
 * doubles each time that the reader has come half-way through it.
 */
bool bale_readahead_want(BaleImage *image, uint64_t offset, uint64_t len,
                         bool *scan, uint64_t *from, uint64_t *to)
{
    BaleStore *s = image->store;
    uint64_t end = offset + len;
    BaleReadStream *stream;
    bool want = false;
    uint32_t max;

    pthread_mutex_lock(&image->stream_lock);
    stream = stream_find(image, offset, end);
    *scan = stream;
    if (stream) {
        stream->ahead = MAX(stream->ahead, end);
        if (!stream->window || stream->ahead - end <= stream->window / 2) {
            max = streams_ahead_max(image);
            stream->window =
                stream->window ? stream->window * 2
                               : MAX(2 * (uint32_t)len, s->cluster_size);
            stream->window = MIN(stream->window, max);
            *from = bale_align_up(stream->ahead, s->cluster_size);
            *to = MIN(bale_align_up(end + stream->window, s->cluster_size),
                      bale_image_size(image));
            want = max && *from < *to;
            if (want) {
                stream->ahead = *to;
            }
        }
    }
    pthread_mutex_unlock(&image->stream_lock);
    return want;
}
