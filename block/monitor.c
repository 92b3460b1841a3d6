/*
 * The module's side of the monitor and of the command line.
 *
 * A stock QEMU has its QMP commands, its enumeration of block drivers and the
 * union of their options compiled in. This file adds ours:
 *
 *  - Commands of our own schema (qapi/) join the program's list. The program
 *    fills that list at some moment of its start; register_commands() may be
 *    called early and often, and does its work once the list is there.
 *  - blockdev-add, blockdev-reopen, --blockdev and -blockdev take nodes of our
 *    drivers, also nested. What names none of our drivers goes to the
 *    program's own function untouched. Else every part that is not ours is
 *    checked by QEMU's visitor, with our parts replaced by a node name, and
 *    our parts by ours; then the tree is opened as blockdev-add would.
 *  - blockdev-create and x-blockdev-amend refuse our drivers: their unions over
 *    the enumeration end in abort() for a name they do not know.
 *  - query-qmp-schema shows our commands, types and drivers.
 *  - The enumeration of drivers gets the name "bale", so that options which
 *    name a format ("qemu-img create -b x.bale -F bale") accept it; that of
 *    types of jobs gets ours (bale-job.c).
 *
 * Threads: all of it runs in the main thread, most before main().
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "qemu/osdep.h"

#include <sys/mman.h>

#include "block/block.h"
#include "block/block_int.h"
#include "block/qdict.h"
#include "chardev/char.h"
#include "monitor/monitor.h"
#include "monitor/monitor-internal.h"
#include "qapi/error.h"
#include "qapi/qapi-commands-block-core.h"
#include "qapi/qapi-commands-char.h"
#include "qapi/qapi-types-job.h"
#include "qapi/qapi-visit-block-core.h"
#include "qapi/qmp/dispatch.h"
#include "qapi/qmp/qdict.h"
#include "qapi/qmp/qjson.h"
#include "qapi/qmp/qlist.h"
#include "qapi/qmp/qlit.h"
#include "qapi/qmp/qstring.h"
#include "qapi/qobject-input-visitor.h"
#include "qemu-main.h"
#include "qemu/error-report.h"
#include "qemu/keyval.h"
#include "qemu/main-loop.h"
#include "qemu/module.h"
#include "qemu/option.h"

#include "bale-control-internal.h"
#include "bale-internal.h"
#include "bale-qapi-init-commands.h"
#include "bale-qapi-introspect.h"
#include "bale-qapi-visit-blockdev.h"
#include "loader-internal.h"
#include "seqcache-internal.h"

/*
 * Data, and functions whose address is taken: what only some of the programs
 * export must be weak, or the module would not load into the others.
 */
#pragma weak BlockdevDriver_lookup
#pragma weak JobType_lookup
#pragma weak qemu_main
#pragma weak qmp_commands

/* The chardev class that stands in for -blockdev, see bale_module_argv() */
#define HOOK_CHARDEV "bale-blockdev"

/* Deeper nests of nodes are refused. */
#define MAX_NESTING 64

/* QEMU's JSON parser stops here, so nothing that it made is deeper. */
#define MAX_PARSED_NESTING 1024

/* --- our block drivers --- */

/* For query-qmp-schema, which needs the types, but is no command. */
#define TYPES_COMMAND "bale-blockdev-options"

typedef struct OurDriver {
    const char *name;
    const char *options_type; /* for query-qmp-schema */
    bool is_format;           /* can be named where a format is asked for */
} OurDriver;

static const OurDriver our_drivers[] = {
    { BALE_FORMAT_NAME, "BlockdevOptionsBale", true },
    { BALE_SEQCACHE_FORMAT_NAME, "BlockdevOptionsSeqcache", false },
};

/* In the order of BaleJobType. */
static const char *const job_type_names[] = {
    "bale-compact", "bale-verify", "bale-flatten",
};

static const OurDriver *find_driver(const QDict *options)
{
    const char *name = qdict_get_try_str(options, "driver");

    for (size_t i = 0; name && i < ARRAY_SIZE(our_drivers); i++) {
        if (!strcmp(name, our_drivers[i].name)) {
            return &our_drivers[i];
        }
    }
    return NULL;
}

/* Does @object, or anything in it, name one of our drivers? */
static bool mentions_ours(const QObject *object, unsigned depth)
{
    const QDict *dict = qobject_to(QDict, object);
    const QList *list = qobject_to(QList, object);
    const QDictEntry *entry;
    const QListEntry *element;

    /* Too deep to know: checking it will refuse it. */
    if (depth > MAX_PARSED_NESTING) {
        return true;
    }
    if (dict) {
        if (find_driver(dict)) {
            return true;
        }
        for (entry = qdict_first(dict); entry;
             entry = qdict_next(dict, entry)) {
            if (mentions_ours(qdict_entry_value(entry), depth + 1)) {
                return true;
            }
        }
    } else if (list) {
        QLIST_FOREACH_ENTRY(list, element) {
            if (mentions_ours(qlist_entry_obj(element), depth + 1)) {
                return true;
            }
        }
    }
    return false;
}

/* --- checking of options --- */

static bool check_node(QDict *options, bool from_command_line, unsigned depth,
                       Error **errp);

/*
 * What the visitors shall see for @object, a part of a node's definition: nodes
 * in it that have to do with us are checked on their own, and become the name
 * of some node. With @all, which is for parts of ours, so do all others: our
 * visitor does not know what is right for them. A new reference; NULL with
 * @errp set if such a definition is bad.
 */
static QObject *replace_nodes(QObject *object, bool all,
                              bool from_command_line, unsigned depth,
                              Error **errp)
{
    QDict *dict = qobject_to(QDict, object);
    QList *list = qobject_to(QList, object);

    if (dict && qdict_haskey(dict, "driver") &&
        (all || mentions_ours(object, depth))) {
        if (!check_node(dict, from_command_line, depth + 1, errp)) {
            return NULL;
        }
        return QOBJECT(qstring_from_str("bale-node"));
    }
    if (list) {
        QList *copy = qlist_new();
        const QListEntry *element;

        QLIST_FOREACH_ENTRY(list, element) {
            QObject *part = replace_nodes(qlist_entry_obj(element), all,
                                          from_command_line, depth + 1, errp);

            if (!part) {
                qobject_unref(copy);
                return NULL;
            }
            qlist_append_obj(copy, part);
        }
        return QOBJECT(copy);
    }
    return qobject_ref(object);
}

/*
 * What our schema cannot say of a child, 'any' to it: it is a node's name or a
 * definition, null at most for @null_ok. QEMU's reopening aborts on others.
 */
static bool check_child(const QDict *options, const char *name, bool null_ok,
                        Error **errp)
{
    QObject *child = qdict_get(options, name);
    const QDict *dict = qobject_to(QDict, child);

    if (!child || (dict && qdict_haskey(dict, "driver")) ||
        qobject_to(QString, child) ||
        (null_ok && qobject_type(child) == QTYPE_QNULL)) {
        return true;
    }
    error_setg(errp, "Invalid parameter type for '%s', expected: a node's name "
                     "or definition with a 'driver'", name);
    return false;
}

/* Check the definition of a node and of all nodes in it. */
static bool check_node(QDict *options, bool from_command_line, unsigned depth,
                       Error **errp)
{
    const OurDriver *driver = find_driver(options);
    g_autoptr(QDict) copy = qdict_new();
    const QDictEntry *entry;
    Visitor *v;
    bool ok;

    if (depth > MAX_NESTING) {
        error_setg(errp, "Nodes are nested too deeply");
        return false;
    }
    if (driver && (!check_child(options, "file", false, errp) ||
                   !check_child(options, "backing", true, errp))) {
        return false;
    }
    for (entry = qdict_first(options); entry;
         entry = qdict_next(options, entry)) {
        QObject *part = replace_nodes(qdict_entry_value(entry), driver != NULL,
                                      from_command_line, depth, errp);

        if (!part) {
            return false;
        }
        qdict_put_obj(copy, qdict_entry_key(entry), part);
    }
    v = from_command_line ? qobject_input_visitor_new_keyval(QOBJECT(copy))
                          : qobject_input_visitor_new(QOBJECT(copy));
    if (!driver) {
        BlockdevOptions *o = NULL;

        ok = visit_type_BlockdevOptions(v, NULL, &o, errp);
        qapi_free_BlockdevOptions(o);
    } else {
        BaleBlockdevOptions *o = NULL;

        ok = visit_type_BaleBlockdevOptions(v, NULL, &o, errp);
        qapi_free_BaleBlockdevOptions(o);
    }
    visit_free(v);
    return ok;
}

/* --- opening and reopening --- */

/* What blockdev-add does with options that were checked. */
static void add_node(const QDict *options, Error **errp)
{
    g_autoptr(QDict) flat = qdict_clone_shallow(options);
    BlockDriverState *bs;

    qdict_flatten(flat);
    if (!qdict_get_try_str(flat, "node-name")) {
        error_setg(errp, "'node-name' must be specified for the root node");
        return;
    }
    bs = bds_tree_init(g_steal_pointer(&flat), errp);
    if (bs) {
        bdrv_set_monitor_owned(bs);
    }
}

/* Find the nodes of a blockdev-reopen before anything is drained. */
static GSList *find_reopen_nodes(const QList *list, Error **errp)
{
    g_autoptr(GSList) nodes = NULL;
    const QListEntry *element;

    QLIST_FOREACH_ENTRY(list, element) {
        QDict *options = qobject_to(QDict, qlist_entry_obj(element));
        const char *name;
        BlockDriverState *bs;

        if (!options) {
            error_setg(errp, "Invalid parameter type for 'options', expected: "
                             "array of objects");
            return NULL;
        }
        if (!check_node(options, false, 0, errp)) {
            return NULL;
        }
        name = qdict_get_try_str(options, "node-name");
        if (!name) {
            error_setg(errp, "node-name not specified");
            return NULL;
        }
        bs = bdrv_find_node(name);
        if (!bs) {
            error_setg(errp, "Failed to find node with node-name='%s'", name);
            return NULL;
        }
        nodes = g_slist_append(nodes, bs);
    }
    return g_steal_pointer(&nodes);
}

static BlockDriverState *find_undrained(BlockDriverState *bs,
                                        GPtrArray *drained, GHashTable *seen)
{
    BdrvChild *c;

    if (!g_hash_table_add(seen, bs)) {
        return NULL;
    }
    if (!g_ptr_array_find(drained, bs, NULL)) {
        return bs;
    }
    QLIST_FOREACH(c, &bs->children, next) {
        BlockDriverState *found = find_undrained(c->bs, drained, seen);

        if (found) {
            return found;
        }
    }
    return NULL;
}

/*
 * Drain @top and all that is under it, node by node; @drained has them, and a
 * reference to each.  In QEMU 7.2 sections that drain a subtree, or all nodes,
 * lose count when children change inside: it aborts, or a node stays drained.
 */
static void drain_subtree(BlockDriverState *top, GPtrArray *drained)
{
    for (;;) {
        g_autoptr(GHashTable) seen = g_hash_table_new(NULL, NULL);
        BlockDriverState *bs = find_undrained(top, drained, seen);
        AioContext *ctx;

        if (!bs) {
            return;
        }
        bdrv_ref(bs);
        g_ptr_array_add(drained, bs);
        ctx = bdrv_get_aio_context(bs);
        aio_context_acquire(ctx);
        bdrv_drained_begin(bs); /* polls: what is under @top may change */
        aio_context_release(ctx);
    }
}

static void end_drained(gpointer node)
{
    BlockDriverState *bs = node;
    AioContext *ctx = bdrv_get_aio_context(bs);

    aio_context_acquire(ctx);
    bdrv_drained_end(bs);
    bdrv_unref(bs);
    aio_context_release(ctx);
}

/* What blockdev-reopen does. */
static void reopen_nodes(const QList *list, Error **errp)
{
    ERRP_GUARD();
    g_autoptr(GSList) nodes = find_reopen_nodes(list, errp);
    g_autoptr(GPtrArray) drained =
        g_ptr_array_new_with_free_func(end_drained);
    BlockReopenQueue *queue = NULL;
    const QListEntry *element = qlist_first(list);

    if (*errp) {
        return;
    }
    for (GSList *l = nodes; l; l = l->next) {
        bdrv_ref(l->data); /* while others are drained */
    }
    for (GSList *l = nodes; l; l = l->next) {
        drain_subtree(l->data, drained);
        bdrv_unref(l->data);
    }
    for (GSList *l = nodes; l; l = l->next, element = qlist_next(element)) {
        AioContext *ctx = bdrv_get_aio_context(l->data);
        QDict *flat = qdict_clone_shallow(
            qobject_to(QDict, qlist_entry_obj(element)));

        qdict_flatten(flat);
        aio_context_acquire(ctx);
        queue = bdrv_reopen_queue(queue, l->data, flat, false);
        aio_context_release(ctx);
    }
    bdrv_reopen_multiple(queue, errp);
}

/* --- commands taken over --- */

/* The program's own functions; set once */
static QmpCommandFunc *program_blockdev_add;
static QmpCommandFunc *program_blockdev_reopen;
static QmpCommandFunc *program_blockdev_create;
static QmpCommandFunc *program_x_blockdev_amend;
static QmpCommandFunc *program_query_qmp_schema;

static void our_blockdev_add(QDict *args, QObject **ret, Error **errp)
{
    ERRP_GUARD();

    if (!mentions_ours(QOBJECT(args), 0)) {
        program_blockdev_add(args, ret, errp);
        return;
    }
    if (check_node(args, false, 0, errp)) {
        add_node(args, errp);
    }
    if (!*errp) {
        *ret = QOBJECT(qdict_new());
    }
}

static void our_blockdev_reopen(QDict *args, QObject **ret, Error **errp)
{
    ERRP_GUARD();
    const QList *list = qobject_to(QList, qdict_get(args, "options"));

    if (list && qlist_empty(list) && qdict_size(args) == 1) {
        /* Nothing to do.  QEMU 7.2 itself would abort. */
        *ret = QOBJECT(qdict_new());
        return;
    }
    if (!mentions_ours(QOBJECT(args), 0)) {
        program_blockdev_reopen(args, ret, errp);
        return;
    }
    if (!list || qdict_size(args) != 1) {
        error_setg(errp, "blockdev-reopen takes one parameter, 'options', an "
                         "array of objects");
        return;
    }
    reopen_nodes(list, errp);
    if (!*errp) {
        *ret = QOBJECT(qdict_new());
    }
}

/* True, with @errp set, if a command whose union is closed gets our names. */
static bool refuse_ours(const char *command, QDict *args, Error **errp)
{
    QDict *options = qobject_to(QDict, qdict_get(args, "options"));
    const OurDriver *driver = options ? find_driver(options) : NULL;

    if (driver) {
        error_setg(errp, "Driver '%s' does not support %s%s", driver->name,
                   command,
                   driver->is_format ? "; use qemu-img or the command bale"
                                     : "");
        return true;
    }
    if (mentions_ours(QOBJECT(args), 0)) {
        error_setg(errp, "%s takes nodes of Bale's drivers only by node name",
                   command);
        return true;
    }
    return false;
}

static void our_blockdev_create(QDict *args, QObject **ret, Error **errp)
{
    if (!refuse_ours("blockdev-create", args, errp)) {
        program_blockdev_create(args, ret, errp);
    }
}

static void our_x_blockdev_amend(QDict *args, QObject **ret, Error **errp)
{
    if (!refuse_ours("x-blockdev-amend", args, errp)) {
        program_x_blockdev_amend(args, ret, errp);
    }
}

/* --- introspection --- */

static bool list_has_string(const QList *list, const char *string)
{
    const QListEntry *element;

    QLIST_FOREACH_ENTRY(list, element) {
        const QString *s = qobject_to(QString, qlist_entry_obj(element));

        if (s && !strcmp(qstring_get_str(s), string)) {
            return true;
        }
    }
    return false;
}

/* Has the list of members of an object one called @name? */
static bool members_have(const QList *members, const char *name)
{
    const QListEntry *element;

    QLIST_FOREACH_ENTRY(members, element) {
        QDict *member = qobject_to(QDict, qlist_entry_obj(element));

        if (!strcmp(qdict_get_try_str(member, "name") ?: "", name)) {
            return true;
        }
    }
    return false;
}

/*
 * Types have no names of their own in there: they are told by what they have.
 * Of the unions over the drivers, only the one for opening has detect-zeroes.
 */
static void announce_drivers(QDict *entity)
{
    QList *values = qobject_to(QList, qdict_get(entity, "values"));
    QList *members = qobject_to(QList, qdict_get(entity, "members"));
    QList *variants = qobject_to(QList, qdict_get(entity, "variants"));
    const char *tag = qdict_get_try_str(entity, "tag");

    for (size_t i = 0; i < ARRAY_SIZE(our_drivers); i++) {
        const OurDriver *d = &our_drivers[i];

        if (values && members && list_has_string(values, "qcow2") &&
            list_has_string(values, "throttle") &&
            !list_has_string(values, d->name)) {
            QDict *member = qdict_new();

            qdict_put_str(member, "name", d->name);
            qlist_append(members, member);
            qlist_append_str(values, d->name);
        }
        if (variants && members && tag && !strcmp(tag, "driver") &&
            members_have(members, "detect-zeroes")) {
            QDict *variant = qdict_new();

            qdict_put_str(variant, "case", d->name);
            qdict_put_str(variant, "type", d->options_type);
            qlist_append(variants, variant);
        }
    }
}

/* The same for the types of jobs. */
static void announce_job_types(QDict *entity)
{
    QList *values = qobject_to(QList, qdict_get(entity, "values"));
    QList *members = qobject_to(QList, qdict_get(entity, "members"));

    if (!values || !members || !list_has_string(values, "snapshot-save") ||
        !list_has_string(values, "stream")) {
        return;
    }
    for (size_t i = 0; i < ARRAY_SIZE(job_type_names); i++) {
        QDict *member = qdict_new();

        qdict_put_str(member, "name", job_type_names[i]);
        qlist_append(members, member);
        qlist_append_str(values, job_type_names[i]);
    }
}

static void our_query_qmp_schema(QDict *args, QObject **ret, Error **errp)
{
    g_autoptr(GHashTable) names = g_hash_table_new(g_str_hash, g_str_equal);
    const QListEntry *element;
    QObject *ours;
    QList *schema;

    program_query_qmp_schema(args, ret, errp);
    schema = *ret ? qobject_to(QList, *ret) : NULL;
    if (!schema) {
        return;
    }
    QLIST_FOREACH_ENTRY(schema, element) {
        QDict *entity = qobject_to(QDict, qlist_entry_obj(element));

        g_hash_table_add(names, (void *)qdict_get_str(entity, "name"));
        announce_drivers(entity);
        announce_job_types(entity);
    }
    ours = qobject_from_qlit(&bale_qmp_schema_qlit);
    QLIST_FOREACH_ENTRY(qobject_to(QList, ours), element) {
        QDict *entity = qobject_to(QDict, qlist_entry_obj(element));

        const char *name = qdict_get_str(entity, "name");

        if (!g_hash_table_contains(names, name) &&
            strcmp(name, TYPES_COMMAND) != 0) {
            qlist_append(schema, qobject_ref(entity));
        }
    }
    qobject_unref(ours);
}

/* --- registration --- */

static void take_over(const char *name, QmpCommandFunc *ours,
                      QmpCommandFunc **program)
{
    QmpCommand *command = (QmpCommand *)qmp_find_command(&qmp_commands, name);

    if (command) {
        *program = command->fn;
        command->fn = ours;
    }
}

/* Adds our commands once the program has its own; true if they are there. */
static bool register_commands(void)
{
    static bool done;
    QmpCommandList list;
    QmpCommand *command, *next;

    if (done) {
        return true;
    }
    if (!&qmp_commands || !qmp_commands.tqh_circ.tql_prev ||
        QTAILQ_EMPTY(&qmp_commands)) {
        return false;
    }
    /* The generated function initialises the list that it is given. */
    bale_qmp_init_marshal(&list);
    QTAILQ_FOREACH_SAFE(command, &list, node, next) {
        QTAILQ_REMOVE(&list, command, node);
        QTAILQ_INSERT_TAIL(&qmp_commands, command, node);
    }
    take_over("blockdev-add", our_blockdev_add, &program_blockdev_add);
    take_over("blockdev-reopen", our_blockdev_reopen,
              &program_blockdev_reopen);
    take_over("blockdev-create", our_blockdev_create,
              &program_blockdev_create);
    take_over("x-blockdev-amend", our_x_blockdev_amend,
              &program_x_blockdev_amend);
    take_over("query-qmp-schema", our_query_qmp_schema,
              &program_query_qmp_schema);
    done = true;
    return true;
}

static void wrap_cbw(void);

/*
 * qemu-system fills its list before it initialises the block layer, so this
 * is late enough there. qemu-storage-daemon does it the other way round, and
 * is served by bale_module_getopt_long().
 */
static void monitor_block_init(void)
{
    register_commands();
    /* Our drivers come first; what is added now, comes last. */
    register_module_init(wrap_cbw, MODULE_INIT_BLOCK);
}

block_init(monitor_block_init);

/* --- enumerations --- */

/*
 * Append @count names to an enumeration.  The table lies in memory that the
 * dynamic linker has made read-only.  False if that cannot be changed.
 */
static bool extend_enum(const QEnumLookup *table, const char *const *more,
                        size_t count)
{
    QEnumLookup *lookup = (QEnumLookup *)table;
    uintptr_t page_bytes = getpagesize();
    uintptr_t start, bytes;
    const char **names;
    unsigned char *features = NULL;

    if (!lookup) {
        return false;
    }
    names = g_new0(const char *, lookup->size + count + 1);
    memcpy(names, lookup->array, lookup->size * sizeof(names[0]));
    memcpy(names + lookup->size, more, count * sizeof(names[0]));
    if (lookup->special_features) {
        features = g_new0(unsigned char, lookup->size + count);
        memcpy(features, lookup->special_features, lookup->size);
    }

    start = (uintptr_t)lookup & -page_bytes;
    bytes = ROUND_UP((uintptr_t)(lookup + 1) - start, page_bytes);
    if (mprotect((void *)start, bytes, PROT_READ | PROT_WRITE) < 0) {
        /* Everything works but -F bale and our jobs. */
        warn_report("bale: cannot extend an enumeration: %s", strerror(errno));
        g_free(names);
        g_free(features);
        return false;
    }
    *(const char *const **)&lookup->array = names;
    *(const unsigned char **)&lookup->special_features = features;
    *(int *)&lookup->size += count;
    mprotect((void *)start, bytes, PROT_READ);
    return true;
}

static bool job_types_known;

bool bale_job_types_known(void)
{
    return job_types_known;
}

static void extend_enums(void)
{
    static const char *const format_names[] = { BALE_FORMAT_NAME };

    extend_enum(&BlockdevDriver_lookup, format_names,
                ARRAY_SIZE(format_names));
    job_types_known = extend_enum(&JobType_lookup, job_type_names,
                                  ARRAY_SIZE(job_type_names));
}

/*
 * The driver copy-before-write looks at its options, those of its children
 * among them, through the union over the drivers, which ends in abort() for the
 * name that we have added.  That must not happen, however the node is opened.
 */
static int (*program_cbw_open)(BlockDriverState *bs, QDict *options, int flags,
                               Error **errp);

static int our_cbw_open(BlockDriverState *bs, QDict *options, int flags,
                        Error **errp)
{
    const QDictEntry *entry;

    for (entry = qdict_first(options); entry;
         entry = qdict_next(options, entry)) {
        const QString *value = qobject_to(QString, qdict_entry_value(entry));

        if (value && g_str_has_suffix(qdict_entry_key(entry), ".driver") &&
            !strcmp(qstring_get_str(value), BALE_FORMAT_NAME)) {
            error_setg(errp, "copy-before-write takes nodes of the driver '%s' "
                             "only by node name", BALE_FORMAT_NAME);
            return -EINVAL;
        }
    }
    return program_cbw_open(bs, options, flags, errp);
}

/* When all drivers are registered. */
static void wrap_cbw(void)
{
    BlockDriver *drv = bdrv_find_format("copy-before-write");

    if (drv && drv->bdrv_open && drv->bdrv_open != our_cbw_open) {
        program_cbw_open = drv->bdrv_open;
        drv->bdrv_open = our_cbw_open;
    }
}

/* --- command line --- */

/* The argument of a -blockdev option; NULL if it is malformed. */
static QDict *parse_blockdev(const char *arg, bool *is_keyval, Error **errp)
{
    *is_keyval = arg[0] != '{';
    if (*is_keyval) {
        return keyval_parse(arg, "driver", NULL, errp);
    } else {
        QObject *object = qobject_from_json(arg, errp);
        QDict *dict = qobject_to(QDict, object);

        if (object && !dict) {
            qobject_unref(object);
            error_setg(errp, "Invalid parameter type, expected: object");
        }
        return dict;
    }
}

/* Does the argument name one of our drivers? */
static bool blockdev_is_ours(const char *arg)
{
    bool is_keyval;
    g_autoptr(QDict) options = parse_blockdev(arg, &is_keyval, NULL);

    return options && mentions_ours(QOBJECT(options), 0);
}

/* Do what a -blockdev option demands; the argument is one of ours. */
static void run_our_blockdev(const char *arg, Error **errp)
{
    bool is_keyval;
    g_autoptr(QDict) options = parse_blockdev(arg, &is_keyval, errp);

    if (options && check_node(options, is_keyval, 0, errp)) {
        add_node(options, errp);
    }
}

/*
 * qemu-storage-daemon parses its options twice: first for itself, then, with
 * its commands registered, for QEMU. In the second pass --blockdev options of
 * ours are done here, and the daemon does not see them.
 */
int bale_module_getopt_long(BaleGetoptLong *real, int argc, char *const argv[],
                            const char *optstring,
                            const struct option *longopts, int *longindex)
{
    int blockdev = -1;
    int c;

    if (&qmp_commands && !&qemu_main && longopts && register_commands()) {
        for (const struct option *o = longopts; o->name; o++) {
            if (!strcmp(o->name, "blockdev")) {
                blockdev = o->val;
            }
        }
    }
    for (;;) {
        Error *err = NULL;

        c = real(argc, argv, optstring, longopts, longindex);
        if (c == -1 || c != blockdev || !optarg || !blockdev_is_ours(optarg)) {
            return c;
        }
        loc_set_cmdline((char **)argv, optind - 2, 2);
        run_our_blockdev(optarg, &err);
        if (err) {
            error_report_err(err);
            exit(EXIT_FAILURE);
        }
    }
}

/*
 * qemu-system reads -blockdev options with its closed union while it parses
 * its arguments, and opens the nodes later, right after it has made the
 * character devices. So, if one of them is ours, each becomes a -chardev of a
 * class whose parser opens the node: all of them, to keep their order. The
 * character devices themselves go away when the main loop starts.
 */
static char **hooked_args; /* of -blockdev options */
static unsigned hooked_args_count;

static void remove_hook_chardevs(void *opaque)
{
    for (unsigned i = 0; i < hooked_args_count; i++) {
        g_autofree char *id = g_strdup_printf(HOOK_CHARDEV "-%u", i);

        qmp_chardev_remove(id, NULL);
    }
}

static void hook_chardev_parse(QemuOpts *opts, ChardevBackend *backend,
                               Error **errp)
{
    const char *path = qemu_opt_get(opts, "path");
    unsigned n = path ? strtoul(path, NULL, 10) : hooked_args_count;
    Error *err = NULL;

    backend->type = CHARDEV_BACKEND_KIND_NULL;
    backend->u.null.data = g_new0(ChardevCommon, 1);
    if (n >= hooked_args_count) {
        error_setg(errp, "'" HOOK_CHARDEV "' is not for use by hand");
        return;
    }
    if (blockdev_is_ours(hooked_args[n])) {
        run_our_blockdev(hooked_args[n], &err);
    } else {
        BlockdevOptions *o = NULL;
        Visitor *v = qobject_input_visitor_new_str(hooked_args[n], "driver",
                                                   &err);

        if (v && visit_type_BlockdevOptions(v, NULL, &o, &err)) {
            qmp_blockdev_add(o, &err);
        }
        qapi_free_BlockdevOptions(o);
        visit_free(v);
    }
    if (err) {
        loc_set_none();
        error_reportf_err(err, "-blockdev %s: ", hooked_args[n]);
        exit(EXIT_FAILURE);
    }
    if (n + 1 == hooked_args_count) {
        aio_bh_schedule_oneshot(qemu_get_aio_context(), remove_hook_chardevs,
                                NULL);
    }
}

static void hook_chardev_class_init(ObjectClass *oc, void *data)
{
    CHARDEV_CLASS(oc)->parse = hook_chardev_parse;
}

static const TypeInfo hook_chardev_info = {
    .name = "chardev-" HOOK_CHARDEV,
    .parent = "chardev-null",
    .class_init = hook_chardev_class_init,
};

static void register_hook_chardev(void)
{
    if (&qemu_main) {
        type_register_static(&hook_chardev_info);
    }
}

type_init(register_hook_chardev);

static bool is_blockdev_option(const char *arg)
{
    return g_str_equal(arg, "-blockdev") || g_str_equal(arg, "--blockdev");
}

void bale_module_argv(int *argc, char ***argv)
{
    bool ours = false;
    char **copy;

    extend_enums();
    if (!&qemu_main) {
        return;
    }
    for (int i = 1; i + 1 < *argc; i++) {
        ours |= is_blockdev_option((*argv)[i]) &&
                blockdev_is_ours((*argv)[i + 1]);
    }
    if (!ours) {
        return;
    }
    /* A copy: the originals are what ps shows. */
    copy = g_memdup2(*argv, (*argc + 1) * sizeof(copy[0]));
    hooked_args = g_new0(char *, *argc);
    for (int i = 1; i + 1 < *argc; i++) {
        if (is_blockdev_option(copy[i])) {
            hooked_args[hooked_args_count] = copy[i + 1];
            copy[i] = g_strdup("-chardev");
            copy[i + 1] = g_strdup_printf(HOOK_CHARDEV ",id=" HOOK_CHARDEV
                                          "-%u,path=%u",
                                          hooked_args_count,
                                          hooked_args_count);
            hooked_args_count++;
            i++;
        }
    }
    *argv = copy;
}
