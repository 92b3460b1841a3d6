/*
 * How our QMP events go out, and at which rate.
 *
 * QEMU limits the rate of its events by a table that has an entry for each
 * number of its own enumeration; ours are no part of it.  So they are sent
 * under a number that has no limit (the name travels in the event itself), and
 * those that could come often are limited here in the same manner: after one
 * was sent, the newest of the following second waits for its end.
 *
 * Threads: the main one.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "qemu/osdep.h"
#include "qapi/qapi-emit-events.h"
#include "qapi/qmp/qdict.h"
#include "qemu/timer.h"

#include "bale-qapi-emit-events.h"

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
