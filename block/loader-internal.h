/*
 * What the preload shim and the module agree on.
 *
 * The shim (shim.c) looks these functions up in the module with dlsym(); all
 * are optional. They are the only symbols that the module exports. Both sides
 * include this file, so that a changed signature breaks the build and not a
 * run. No QEMU header is needed, or allowed, here.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef BALE_BLOCK_LOADER_INTERNAL_H
#define BALE_BLOCK_LOADER_INTERNAL_H

#include <getopt.h>

/* Names of files that lie beside each other in one directory */
#define BALE_MODULE_FILE    "bale-module.so"
#define BALE_BUILD_IDS_FILE "bale.build-ids"

#define BALE_EXPORT __attribute__((visibility("default")))

typedef int BaleGetoptLong(int argc, char *const argv[], const char *optstring,
                           const struct option *longopts, int *longindex);

/*
 * The stamp of the QEMU build that the module was compiled for, 40 hexadecimal
 * digits. The shim refuses a module with another stamp than its own.
 */
typedef const char *BaleModuleStamp(void);
BALE_EXPORT BaleModuleStamp bale_module_stamp;

/*
 * Called once before main() and before QEMU's first line, on the only thread;
 * may replace the program's arguments. New strings and arrays must live as
 * long as the process.
 */
typedef void BaleModuleArgv(int *argc, char ***argv);
BALE_EXPORT BaleModuleArgv bale_module_argv;

/*
 * Called in place of getopt_long(), with libc's own function as @real. Returns
 * what getopt_long() would.
 */
typedef int BaleModuleGetoptLong(BaleGetoptLong *real, int argc,
                                 char *const argv[], const char *optstring,
                                 const struct option *longopts,
                                 int *longindex);
BALE_EXPORT BaleModuleGetoptLong bale_module_getopt_long;

#endif
