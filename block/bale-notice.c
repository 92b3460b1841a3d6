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
    char **node_names;
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
        for (char **node = n->node_names; *node; node++) {
            qapi_event_send_bale_store_failed(*node, n->text);
        }
        break;
    case NOTICE_RECOVERED:
        warn_report("bale: '%s': everything that was not flushed was written "
                    "again; the store takes writes", n->filename);
        for (char **node = n->node_names; *node; node++) {
            qapi_event_send_bale_store_recovered(*node);
        }
        break;
    case NOTICE_DAMAGE:
        error_report("bale: '%s': %s%s", n->filename, n->text,
                     n->last ? " (no more such reports for this store)" : "");
        for (char **node = n->node_names; *node; node++) {
            qapi_event_send_block_image_corrupted("", true, *node, n->text,
                                                  false, 0, false, 0, false);
        }
        break;
    }
    monitor_set_cur(qemu_coroutine_self(), monitor);
    g_strfreev(n->node_names);
    g_free(n->filename);
    g_free(n->text);
    g_free(n);
}

static void notice_send(NoticeKind kind, char **node_names,
                        const char *filename, const char *text, bool last)
{
    Notice *n = g_new0(Notice, 1);

    n->kind = kind;
    n->node_names = node_names;
    n->filename = g_strdup(filename);
    n->text = g_strdup(text);
    n->last = last;
    aio_bh_schedule_oneshot(qemu_get_aio_context(), notice_bh, n);
}

void bale_notice_failed(char **node_names, const char *filename,
                        const char *reason)
{
    notice_send(NOTICE_FAILED, node_names, filename, reason, false);
}

void bale_notice_recovered(char **node_names, const char *filename)
{
    notice_send(NOTICE_RECOVERED, node_names, filename, NULL, false);
}

void bale_notice_damage(char **node_names, const char *filename,
                        const char *what, bool last)
{
    notice_send(NOTICE_DAMAGE, node_names, filename, what, last);
}
