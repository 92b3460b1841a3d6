/*
 * Devices from shared objects.
 *
 * The object is loaded by its full path, never by a search through library
 * directories, with all its symbols resolved at once and none of them exported
 * to others.  It stays loaded: threads or thread-local destructors of its own
 * may outlive its last device.
 *
 * Whoever may name a plug-in may run code in this process; names of plug-ins
 * come from the user only and are never read from a store.
 *
 * Threads: any.  Errors: through GError, naming the object.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>

#include "extstore/device.h"

static void plugin_error(GError **errp, GFileError code, const char *plugin,
                         const char *what)
{
    g_set_error(errp, G_FILE_ERROR, code, "Device plug-in '%s': %s", plugin,
                what);
}

/* Every function that is not optional must be there. */
static bool is_complete(const BaleDeviceOps *ops)
{
    return ops->destroy && ops->get_info && ops->allocate && ops->release &&
           ops->store && ops->get && ops->flush && ops->get_stats &&
           ops->reset_stats && ops->command;
}

static bool check_instance(BaleDevice *dev, const char *plugin, GError **errp)
{
    const BaleDeviceOps *ops = dev->ops;
    BaleDeviceInfo info = { 0 };

    if (!ops || ops->interface_version != BALE_DEVICE_INTERFACE) {
        g_autofree char *what = g_strdup_printf(
            "it implements interface version %u, not %u",
            ops ? ops->interface_version : 0, BALE_DEVICE_INTERFACE);

        /* Nothing about another version is known, not even how to end it. */
        plugin_error(errp, G_FILE_ERROR_NOSYS, plugin, what);
        return false;
    }
    if (!is_complete(ops)) {
        plugin_error(errp, G_FILE_ERROR_INVAL, plugin,
                     "it lacks functions that are not optional");
        if (ops->destroy) {
            ops->destroy(dev);
        }
        return false;
    }
    ops->get_info(dev, &info);
    if (info.block_size < 512 || info.block_size > 65536 ||
        (info.block_size & (info.block_size - 1)) != 0) {
        g_autofree char *what = g_strdup_printf(
            "its block size of %u bytes is not a power of two from 512 to "
            "65536", info.block_size);

        plugin_error(errp, G_FILE_ERROR_INVAL, plugin, what);
        ops->destroy(dev);
        return false;
    }
    return true;
}

BaleDevice *bale_device_plugin_open(const char *plugin, const char *target,
                                    unsigned flags, GError **errp)
{
    char *path = realpath(plugin, NULL); /* freed with free() */
    BaleDeviceCreateInstance *create;
    BaleDevice *dev = NULL;
    GError *err = NULL;
    void *object;

    if (!path) {
        plugin_error(errp, g_file_error_from_errno(errno), plugin,
                     g_strerror(errno));
        return NULL;
    }
    object = dlopen(path, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    free(path);
    if (!object) {
        plugin_error(errp, G_FILE_ERROR_FAILED, plugin, dlerror());
        return NULL;
    }
    *(void **)&create = dlsym(object, BALE_DEVICE_CREATE_SYMBOL);
    if (!create) {
        plugin_error(errp, G_FILE_ERROR_NOSYS, plugin,
                     "it does not export " BALE_DEVICE_CREATE_SYMBOL "()");
        goto out;
    }
    dev = create(BALE_DEVICE_INTERFACE, target, flags, &err);
    if (!dev) {
        plugin_error(errp, G_FILE_ERROR_FAILED, plugin,
                     err ? err->message : "it gives no instance and no reason");
        g_clear_error(&err);
        goto out;
    }
    g_clear_error(&err);
    if (!check_instance(dev, plugin, errp)) {
        dev = NULL;
    }

out:
    dlclose(object); /* RTLD_NODELETE: only our handle goes */
    return dev;
}
