/*
 * Segments in a write buffer: where records are put into it, and what goes
 * around them when it is written.  log.c says when.
 *
 * Threads: an append puts its record into room that it has reserved; a segment
 * is finished by whoever submits it, when nobody else uses the buffer's bytes.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "log-internal.h"

#include <string.h>

#include "util/checksum.h"
#include "util/memory.h"

uint64_t bale_log_segment_len(uint64_t used, uint64_t records)
{
    return bale_align_up(used + bale_room_directory(records),
                         BALE_BLOCK_SIZE);
}

uint64_t bale_log_segment_padding(BaleWriteBuffer *wb)
{
    return wb->len - wb->used - BALE_RECORD_HEADER_LEN -
           (uint64_t)wb->records * BALE_DIRECTORY_ENTRY_LEN;
}

static uint64_t segment_seed(BaleStore *s, BaleWriteBuffer *wb, uint32_t at)
{
    return bale_place(s->identity, wb->page, wb->version, wb->offset + at);
}

void bale_log_put_record(BaleWriteBuffer *wb, BaleRecord *r, uint32_t at)
{
    BaleStore *s = wb->store;
    uint64_t seed = segment_seed(s, wb, at);
    uint8_t *payload = wb->buf + at + BALE_RECORD_HEADER_LEN;
    uint32_t end = BALE_RECORD_HEADER_LEN + r->payload_len;

    r->header_len = BALE_RECORD_HEADER_LEN;
    r->version = wb->version;
    /*
     * The sum is taken of our copy: the caller's memory may be a guest's,
     * which can change while we look.
     */
    r->payload_sum = bale_checksum(payload, r->payload_len, seed);
    bale_record_encode(r, seed, wb->buf + at);
    memset(wb->buf + at + end, 0, bale_record_size(r) - end);
}

/*
 * Repeat the headers of @wb's records, as the entries of its directory, at @p;
 * the sequence number of the last one.  That they are verified costs little,
 * and nothing is written that was hurt in memory since it was appended.
 */
static uint64_t segment_put_entries(BaleWriteBuffer *wb, uint8_t *p)
{
    BaleStore *s = wb->store;
    uint64_t seq = wb->last_seq;
    uint32_t at = wb->first;

    for (uint32_t i = 0; i < wb->records; i++) {
        BaleDirectoryEntry entry = { .offset = wb->offset + at };
        int ret = bale_record_decode(&entry.record, segment_seed(s, wb, at),
                                     s->cluster_size, wb->buf + at,
                                     wb->used - at);

        g_assert(ret == 0);
        bale_directory_entry_encode(&entry, p);
        p += BALE_DIRECTORY_ENTRY_LEN;
        at += bale_record_size(&entry.record);
        seq = entry.record.seq;
    }
    g_assert(at == wb->used);
    return seq;
}

void bale_log_finish_segment(BaleWriteBuffer *wb)
{
    uint32_t n = wb->records;
    BaleRecord r = {
        .type = BALE_RECORD_DIRECTORY,
        .header_len = BALE_RECORD_HEADER_LEN,
        .payload_len = n * BALE_DIRECTORY_ENTRY_LEN,
    };
    /* At the very end, away from the headers that it repeats. */
    uint32_t at = wb->len - bale_record_size(&r);
    BaleSegment segment;

    g_assert(at >= wb->used);
    memset(wb->buf + wb->used, 0, at - wb->used);
    r.seq = segment_put_entries(wb, wb->buf + at + BALE_RECORD_HEADER_LEN);
    bale_log_put_record(wb, &r, at);

    segment.segment_len = wb->len - wb->segment;
    segment.directory_offset = wb->offset + at;
    segment.records = n;
    segment.barriers = wb->barriers;
    memcpy(segment.barrier, wb->barrier,
           wb->barriers * sizeof(wb->barrier[0]));
    r.type = BALE_RECORD_SEGMENT;
    r.payload_len = bale_segment_payload_len(wb->barriers);
    bale_segment_encode(&segment,
                        wb->buf + wb->segment + BALE_RECORD_HEADER_LEN);
    bale_log_put_record(wb, &r, wb->segment);
}
