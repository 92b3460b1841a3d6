/*
 * Notices of the engine, and the rate of our events.
 *
 * The engine tells of damage and failures from its own threads; here each
 * becomes a line in the log and a QMP event, in the main loop.
 *
 * QEMU limits the rate of its events by a table that has an entry for each
 * number of its own enumeration; ours are no part of it.  So they are sent
 * under a number that has no limit (the name travels in the event itself), and
 * those that could come often are limited here in the same manner: after one
 * was sent, the newest of the following second waits for its end.
 *
 * Threads: notices come from any; events are emitted in the main thread.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "qemu/osdep.h"
#include "block/aio.h"
#include "monitor/monitor.h"
#include "qapi/qapi-emit-events.h"
#include "qapi/qapi-events-block-core.h"
#include "qapi/qmp/qdict.h"
#include "qemu/error-report.h"
#include "qemu/main-loop.h"
#include "qemu/timer.h"

#include "bale-control-internal.h"
#include "bale-qapi-emit-events.h"
#include "bale-qapi-events-bale.h"

/* --- rate --- */

#define EVENT_INTERVAL_MS 1000

static const bool event_is_limited[BALE_QAPI_EVENT__MAX] = {
    [BALE_QAPI_EVENT_BALE_STORE_FAILED] = true,
    [BALE_QAPI_EVENT_BALE_STORE_RECOVERED] = true,
    [BALE_QAPI_EVENT_BALE_SPACE_THRESHOLD] = true,
};

/* An event of one node that was sent less than an interval ago. */
typedef struct RecentEvent {
    char *key;      /* name and node; owned by the table */
    QDict *waiting; /* the newest since; NULL: none */
    QEMUTimer *timer;
} RecentEvent;

static GHashTable *recent_events; /* key -> RecentEvent */

static void event_send(QDict *event)
{
    /* Number 0, SHUTDOWN, has no limit. */
    qapi_event_emit(0, event);
}

static void recent_expired(void *opaque)
{
    RecentEvent *recent = opaque;

    if (recent->waiting) {
        event_send(recent->waiting);
        qobject_unref(recent->waiting);
        recent->waiting = NULL;
        timer_mod(recent->timer, qemu_clock_get_ms(QEMU_CLOCK_REALTIME) +
                  EVENT_INTERVAL_MS);
    } else {
        timer_free(recent->timer);
        g_hash_table_remove(recent_events, recent->key);
        g_free(recent);
    }
}

/* The generated code emits its events here. */
void bale_qapi_event_emit(bale_QAPIEvent event, QDict *qdict)
{
    const QDict *data = qdict_get_qdict(qdict, "data");
    const char *node = data ? qdict_get_try_str(data, "node-name") : NULL;
    g_autofree char *key = NULL;
    RecentEvent *recent;

    if (!event_is_limited[event]) {
        event_send(qdict);
        return;
    }
    if (!recent_events) {
        recent_events = g_hash_table_new_full(g_str_hash, g_str_equal, g_free,
                                              NULL);
    }
    key = g_strdup_printf("%s %s", bale_QAPIEvent_str(event), node ?: "");
    recent = g_hash_table_lookup(recent_events, key);
    if (recent) {
        qobject_unref(recent->waiting);
        recent->waiting = qobject_ref(qdict);
        return;
    }
    event_send(qdict);
    recent = g_new0(RecentEvent, 1);
    recent->key = g_steal_pointer(&key);
    recent->timer = timer_new_ms(QEMU_CLOCK_REALTIME, recent_expired, recent);
    g_hash_table_insert(recent_events, recent->key, recent);
    timer_mod(recent->timer, qemu_clock_get_ms(QEMU_CLOCK_REALTIME) +
              EVENT_INTERVAL_MS);
}

/* --- notices --- */

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
