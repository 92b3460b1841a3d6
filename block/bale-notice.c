/*
 * Notices of the engine: it tells of damage and failures from its own threads;
 * here each becomes a line in the log and a QMP event, in the main loop.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "qemu/osdep.h"
#include "block/aio.h"
#include "monitor/monitor.h"
#include "qapi/qapi-events-block-core.h"
#include "qemu/error-report.h"
#include "qemu/main-loop.h"

#include "bale-control-internal.h"
#include "bale-qapi-events-bale.h"

typedef enum NoticeKind {
    NOTICE_FAILED,
    NOTICE_RECOVERED,
    NOTICE_DAMAGE,
} NoticeKind;

typedef struct Notice {
    NoticeKind kind;
    char *node_name;
    char *filename;
    char *text;
    bool last;
} Notice;

static void notice_bh(void *opaque)
{
    Notice *n = opaque;
    /* To the log, and not to a monitor whose command happens to wait. */
    Monitor *monitor = monitor_set_cur(qemu_coroutine_self(), NULL);

    switch (n->kind) {
    case NOTICE_FAILED:
        error_report("bale: '%s': %s; it takes no more writes until "
                     "everything that was not flushed could be written again",
                     n->filename, n->text);
        qapi_event_send_bale_store_failed(n->node_name, n->text);
        break;
    case NOTICE_RECOVERED:
        warn_report("bale: '%s': everything that was not flushed was written "
                    "again; the store takes writes", n->filename);
        qapi_event_send_bale_store_recovered(n->node_name);
        break;
    case NOTICE_DAMAGE:
        error_report("bale: '%s': %s%s", n->filename, n->text,
                     n->last ? " (no more such reports for this node)" : "");
        qapi_event_send_block_image_corrupted("", true, n->node_name, n->text,
                                              false, 0, false, 0, false);
        break;
    }
    monitor_set_cur(qemu_coroutine_self(), monitor);
    g_free(n->node_name);
    g_free(n->filename);
    g_free(n->text);
    g_free(n);
}

static void notice_send(NoticeKind kind, const char *node_name,
                        const char *filename, const char *text, bool last)
{
    Notice *n = g_new0(Notice, 1);

    n->kind = kind;
    n->node_name = g_strdup(node_name);
    n->filename = g_strdup(filename);
    n->text = g_strdup(text);
    n->last = last;
    aio_bh_schedule_oneshot(qemu_get_aio_context(), notice_bh, n);
}

void bale_notice_failed(const char *node_name, const char *filename,
                        const char *reason)
{
    notice_send(NOTICE_FAILED, node_name, filename, reason, false);
}

void bale_notice_recovered(const char *node_name, const char *filename)
{
    notice_send(NOTICE_RECOVERED, node_name, filename, NULL, false);
}

void bale_notice_damage(const char *node_name, const char *filename,
                        const char *what, bool last)
{
    notice_send(NOTICE_DAMAGE, node_name, filename, what, last);
}
