/*
 * Recovery: the state of a store, by the quickest way that is open.
 *
 *   exact   the checkpoint of a clean store is all there is
 *   tail    a checkpoint, the newest or the one before it, and what was
 *           appended since
 *   scan    all pages
 *
 * Nothing is written here.  The same bytes always give the same state, so that
 * a crash after recovery, or inside it, changes nothing.  What a way has
 * reported counts only if that way leads to the end.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "recover-internal.h"

#include <inttypes.h>

#include "util/planted.h"

void bale_recover_report(BaleStore *s, const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    g_ptr_array_add(s->recover_reports, g_strdup_vprintf(fmt, ap));
    va_end(ap);
}

static RecoverResult recover_from(BaleStore *s, const BaleCheckpointRef *ref,
                                  bool clean, GError **errp)
{
    RecoverResult result;

    if (ref->address == 0) {
        return RECOVER_DAMAGED;
    }
    result = clean ? bale_recover_exact(s, errp)
                   : bale_recover_tail(s, ref, errp);
    if (result == RECOVER_DAMAGED && s->limit_exceeded) {
        return RECOVER_FAILED;
    }
    if (result == RECOVER_DAMAGED) {
        g_ptr_array_set_size(s->recover_reports, 0);
        bale_recover_report(s, "the checkpoint at address %" PRIu64
                            " cannot be read", ref->address);
        s->checkpoint_damaged = true;
        bale_recover_reset(s);
    }
    return result;
}

static bool recover_state(BaleStore *s, GError **errp)
{
    bool clean = s->super.state & BALE_STATE_CLEAN;
    RecoverResult result;

    result = recover_from(s, &s->super.checkpoint, clean, errp);
    s->was_clean = clean && result == RECOVER_OK;
    if (result == RECOVER_DAMAGED) {
        result = recover_from(s, &s->super.previous, false, errp);
        s->previous_loaded = result == RECOVER_OK;
    }
    return result == RECOVER_OK ||
           (result == RECOVER_DAMAGED && bale_recover_scan(s, errp));
}

bool bale_recover(BaleStore *s, GError **errp)
{
    bool ok;

    /* Also when not clean: between clean checkpoints a device only grows. */
    if (s->dev_info.size < s->super.device_end) {
        g_set_error(errp, BALE_STORE_ERROR, BALE_STORE_ERROR_CORRUPT,
                    "the store was truncated: it ends at %" PRIu64
                    ", but its data reaches to %" PRIu64,
                    s->dev_info.size, s->super.device_end);
        return false;
    }
    s->recover_reports = g_ptr_array_new_with_free_func(g_free);
    bale_limit_init(s);
    ok = recover_state(s, errp);
    if (!ok && s->limit_exceeded) {
        bale_limit_set_error(s, errp);
    }
    s->damaged_records = s->recover_reports->len;
    for (guint i = 0; i < s->recover_reports->len; i++) {
        if (s->options.damage && !BALE_PLANTED(damage_unreported)) {
            s->options.damage(s->options.notify_opaque,
                              g_ptr_array_index(s->recover_reports, i));
        }
    }
    g_ptr_array_free(s->recover_reports, TRUE);
    s->recover_reports = NULL;
    s->next_seq = MAX(s->next_seq, s->super.next_seq);
    if (ok) {
        bale_page_free_list_rebuild(s);
    }
    return ok;
}
