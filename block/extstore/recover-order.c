/*
 * Recovery: the records that were found, in order of their sequence numbers.
 *
 * There may be tens of millions, in an order that is none: copies keep the
 * sequence numbers of their originals.  So keys of 16 bytes are sorted instead
 * of the records, digit by digit from the lowest.  That keeps records with one
 * sequence number (a copy and its original) in the order in which they were
 * found; and it takes time for each record and digit in use only.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "recover-internal.h"

#include <string.h>

#include "util/planted.h"

#define DIGIT_BITS 11u
#define DIGITS (1u << DIGIT_BITS)

static uint64_t order_key(const ScanEntry *e)
{
    return BALE_PLANTED(sequence_ignored) ? e->address : e->seq;
}

/* Sort by the digit at bit @shift. */
static void order_pass(const ScanOrder *from, ScanOrder *to, guint n,
                       unsigned shift)
{
    guint at[DIGITS] = { 0 };
    guint sum = 0;

    for (guint i = 0; i < n; i++) {
        at[(from[i].key >> shift) % DIGITS]++;
    }
    for (unsigned d = 0; d < DIGITS; d++) {
        guint count = at[d];

        at[d] = sum;
        sum += count;
    }
    for (guint i = 0; i < n; i++) {
        to[at[(from[i].key >> shift) % DIGITS]++] = from[i];
    }
}

ScanOrder *bale_scan_order(Scan *scan, guint *n)
{
    g_autofree ScanOrder *order = NULL, *spare = NULL;
    uint64_t differ = 0;
    bool sorted = true;
    guint count = 0;

    order = g_try_new(ScanOrder, MAX(scan->entries->len, 1));
    if (!order) {
        return NULL;
    }
    for (guint i = 0; i < scan->entries->len; i++) {
        ScanEntry *e = &g_array_index(scan->entries, ScanEntry, i);

        if (!e->dropped) {
            order[count] = (ScanOrder){ order_key(e), e };
            differ |= order[count].key ^ order[0].key;
            sorted = sorted && (count == 0 || order[count - 1].key <=
                                                  order[count].key);
            count++;
        }
    }
    *n = count;
    if (!sorted) {
        spare = g_try_new(ScanOrder, count);
        if (!spare) {
            return NULL;
        }
    }
    for (unsigned shift = 0; !sorted && shift < 64 && differ >> shift;
         shift += DIGIT_BITS) {
        if ((differ >> shift) % DIGITS) {
            ScanOrder *result = spare;

            order_pass(order, spare, count, shift);
            spare = g_steal_pointer(&order);
            order = result;
        }
    }
    return g_steal_pointer(&order);
}
