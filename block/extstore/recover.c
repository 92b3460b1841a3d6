/*
 * Recovery: the state of a store from its checkpoint or, without a usable one,
 * from a scan of its pages.
 *
 * Nothing is written here.  The same bytes always give the same state, so that
 * a crash after recovery, or inside it, changes nothing.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "recover-internal.h"

#include <inttypes.h>

#include "util/planted.h"

void bale_recover_report(BaleStore *s, const char *fmt, ...)
{
    g_autofree char *what = NULL;
    va_list ap;

    va_start(ap, fmt);
    what = g_strdup_vprintf(fmt, ap);
    va_end(ap);
    s->damaged_records++;
    if (s->options.damage && !BALE_PLANTED(damage_unreported)) {
        s->options.damage(s->options.notify_opaque, what);
    }
}
void bale_recover_set_error(GError **errp, int ret, const char *what)
{
    g_set_error(errp, BALE_STORE_ERROR,
                ret == -ENOMEM ? BALE_STORE_ERROR_NO_MEMORY
                               : BALE_STORE_ERROR_IO,
                "%s: %s", what, g_strerror(-ret));
}
bool bale_recover(BaleStore *s, GError **errp)
{
    bool clean = s->super.state & BALE_STATE_CLEAN;
    int ret;

    /* Also when not clean: between checkpoints a device only grows. */
    if (s->dev_info.size < s->super.device_end) {
        g_set_error(errp, BALE_STORE_ERROR, BALE_STORE_ERROR_CORRUPT,
                    "the store was truncated: it ends at %" PRIu64
                    ", but its data reaches to %" PRIu64,
                    s->dev_info.size, s->super.device_end);
        return false;
    }
    if (clean) {
        ret = bale_recover_checkpoint(s);
        if (ret == -ENOMEM) {
            bale_recover_set_error(errp, ret, "reading the checkpoint");
            return false;
        }
        if (ret < 0) {
            bale_recover_report(s,
                                "the checkpoint cannot be read: %s; the store "
                                "is scanned",
                                g_strerror(-ret));
            s->checkpoint_damaged = true;
            bale_recover_reset(s);
            clean = false;
        }
    }
    if (!clean && !bale_recover_scan(s, errp)) {
        return false;
    }
    s->was_clean = clean;
    s->next_seq = MAX(s->next_seq, s->super.next_seq);
    bale_page_free_list_rebuild(s);
    return true;
}
