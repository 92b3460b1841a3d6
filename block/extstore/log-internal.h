/*
 * The room of an open write buffer in one word, so that appending needs no
 * lock: whoever swaps the word for one with less room has reserved a place, the
 * number of its record, and its place in the segment's directory.
 *
 * The word has all that the decision needs: it says which buffer, too, so a
 * swap that succeeds is right even if that buffer was written and opened again
 * since the word was read.  What else is in the buffer (page, offset, version)
 * does not change from when the word is set until all who have reserved room
 * are done, and must only be read after the swap.
 *
 * The word is set and taken away under log_lock; everything else is done by
 * anybody.
 *
 * Idea: the tail address of FASTER's hybrid log, which is advanced with
 * fetch-and-add; here one word also counts what a flush must wait for.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef BALE_EXTSTORE_LOG_INTERNAL_H
#define BALE_EXTSTORE_LOG_INTERNAL_H

#include "store-internal.h"

/* What a word says; a word of 0: there is no open buffer. */
typedef struct BaleRoom {
    unsigned buffer;  /* 0 to BALE_ROOM_BUFFERS_MAX - 1 */
    uint32_t bytes;   /* left for records and directory */
    uint32_t records; /* in the buffer */
    uint32_t numbers; /* sequence numbers given out since it was opened */
} BaleRoom;

#define BALE_ROOM_BUFFERS_MAX 15u
/* In units of BALE_RECORD_ALIGN: at most 8 MiB. */
#define BALE_ROOM_UNITS_BITS   19
#define BALE_ROOM_RECORDS_BITS 17
#define BALE_ROOM_NUMBERS_BITS 24
#define BALE_ROOM_NUMBERS_MAX  ((1u << BALE_ROOM_NUMBERS_BITS) - 1)

/* Bytes of the directory of a segment with @records of them. */
static inline uint64_t bale_room_directory(uint64_t records)
{
    return (BALE_RECORD_HEADER_LEN + records * BALE_DIRECTORY_ENTRY_LEN +
            BALE_RECORD_ALIGN - 1) & ~(uint64_t)(BALE_RECORD_ALIGN - 1);
}

static inline uint64_t bale_room_encode(BaleRoom r)
{
    uint64_t word = r.buffer + 1;

    word = word << BALE_ROOM_UNITS_BITS | r.bytes / BALE_RECORD_ALIGN;
    word = word << BALE_ROOM_RECORDS_BITS | r.records;
    return word << BALE_ROOM_NUMBERS_BITS | r.numbers;
}

/* @word is not 0. */
static inline BaleRoom bale_room_decode(uint64_t word)
{
    BaleRoom r;

    r.numbers = word & BALE_ROOM_NUMBERS_MAX;
    word >>= BALE_ROOM_NUMBERS_BITS;
    r.records = word & ((1u << BALE_ROOM_RECORDS_BITS) - 1);
    word >>= BALE_ROOM_RECORDS_BITS;
    r.bytes = (word & ((1u << BALE_ROOM_UNITS_BITS) - 1)) * BALE_RECORD_ALIGN;
    r.buffer = (word >> BALE_ROOM_UNITS_BITS) - 1;
    return r;
}

/* Does a record of @size bytes, a multiple of BALE_RECORD_ALIGN, fit? */
static inline bool bale_room_fits(BaleRoom r, uint32_t size)
{
    return size + bale_room_directory(r.records + 1) <= r.bytes &&
           r.numbers < BALE_ROOM_NUMBERS_MAX;
}

/*
 * Reserve room for @records (0 or 1) of @size bytes together, and @numbers (0
 * or 1) sequence numbers.  False: there is no open buffer, or not so much room.
 * *@before: what the word said just before.
 */
static inline bool bale_room_take(uint64_t *word, uint32_t records,
                                  uint32_t size, uint32_t numbers,
                                  BaleRoom *before)
{
    uint64_t old = __atomic_load_n(word, __ATOMIC_ACQUIRE), new;

    do {
        BaleRoom r;

        if (!old) {
            return false;
        }
        *before = r = bale_room_decode(old);
        if (records ? !bale_room_fits(r, size)
                    : r.numbers == BALE_ROOM_NUMBERS_MAX) {
            return false;
        }
        r.bytes -= size;
        r.records += records;
        r.numbers += numbers;
        new = bale_room_encode(r);
    } while (!__atomic_compare_exchange_n(word, &old, new, true,
                                          __ATOMIC_ACQ_REL,
                                          __ATOMIC_ACQUIRE));
    return true;
}

/* --- log-segment.c --- */

/* Bytes of a segment with @used bytes of records and @records of them. */
uint64_t bale_log_segment_len(uint64_t used, uint64_t records);
/* Bytes of a sealed segment that hold nothing. */
uint64_t bale_log_segment_padding(BaleWriteBuffer *wb);
/* Write @r and its payload, which is in place already, at @at. */
void bale_log_put_record(BaleWriteBuffer *wb, BaleRecord *r, uint32_t at);
/* Close the segment in @wb; nobody else uses the buffer's bytes now. */
void bale_log_finish_segment(BaleWriteBuffer *wb);

#endif
