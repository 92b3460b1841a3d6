/*
 * The preload shim: brings the module into a stock QEMU program.
 *
 * LD_PRELOAD reaches every child process, so this object references no QEMU
 * symbol and no library but libc, and it does nothing at all, silently, in a
 * program that is not QEMU. In a QEMU program it runs after the constructors
 * of all libraries, before those of the program and main(), in this order:
 *
 *   1. the build-id and the stamp of the running program must be ones that the
 *      module was compiled for (the list beside the module, the stamp here);
 *   2. nobody but root and the caller may be able to change the module;
 *   3. the module is loaded, and its constructors register the drivers.
 *
 * When 1, 2 or 3 fails, nothing has been registered, and the process ends with
 * status 1 and one line that says why. It must not go on: without the driver
 * QEMU would take a store for a raw disk, and write into it.
 *
 * Threads: everything here runs on the first thread before main(), except
 * getopt_long(), which only reads what was set then.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <dlfcn.h>
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <limits.h>
#include <link.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "loader-internal.h"

/* SHA-1 makes 20 bytes; linkers can be told to put up to this many */
#define BUILD_ID_BYTES_MAX 64
#define BUILD_ID_CHARS_MAX (2 * BUILD_ID_BYTES_MAX + 1)
#define VERSION_CHARS_MAX  128

typedef int MainFunc(int argc, char **argv, char **envp);
typedef int StartMainFunc(MainFunc *main, int argc, char **argv,
                          void (*init)(void), void (*fini)(void),
                          void (*rtld_fini)(void), void *stack_end);

/* Interposed functions: not declared by libc for us to define */
BALE_EXPORT StartMainFunc __libc_start_main;

/* Set before main(), constant afterwards */
static BaleGetoptLong *real_getopt_long;
static BaleModuleArgv *module_argv;
static BaleModuleGetoptLong *module_getopt_long;

/* What is known about the running program */
typedef struct Program {
    char build_id[BUILD_ID_CHARS_MAX];
    char version[VERSION_CHARS_MAX];
    bool has_stamp;
} Program;

static void __attribute__((noreturn, format(printf, 1, 2)))
refuse(const char *format, ...)
{
    va_list args;

    fprintf(stderr, "bale: ");
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fprintf(stderr, "\n");
    exit(1);
}

static size_t note_align(size_t bytes)
{
    return (bytes + 3) & ~(size_t)3;
}

/* Copies the build-id out of one note segment, if it is in there */
static void read_build_id(const char *note, size_t bytes, char *build_id)
{
    while (bytes >= sizeof(ElfW(Nhdr))) {
        const ElfW(Nhdr) *head = (const void *)note;
        size_t name = note_align(head->n_namesz);
        size_t desc = note_align(head->n_descsz);
        const unsigned char *id;

        note += sizeof(*head);
        bytes -= sizeof(*head);
        if (name > bytes || desc > bytes - name) {
            return;
        }
        id = (const unsigned char *)note + name;
        if (head->n_type == NT_GNU_BUILD_ID && head->n_namesz == 4 &&
            !memcmp(note, "GNU", 4) && head->n_descsz <= BUILD_ID_BYTES_MAX) {
            for (size_t i = 0; i < head->n_descsz; i++) {
                sprintf(build_id + 2 * i, "%02x", id[i]);
            }
        }
        note += name + desc;
        bytes -= name + desc;
    }
}

/*
 * Looks for the stamp and the version, which are string constants of the
 * program and not symbols, in one read-only segment.
 */
static void scan_constants(const char *data, size_t bytes, Program *program)
{
    static const char stamp[] = "qemu_stamp_" BALE_QEMU_STAMP;
    static const char mark[] = " (Debian ";
    const char *found;

    if (memmem(data, bytes, stamp, sizeof(stamp))) {
        program->has_stamp = true;
    }
    found = memmem(data, bytes, mark, strlen(mark));
    if (found && !program->version[0]) {
        const char *end;

        found += 2;
        end = memchr(found, ')', bytes - (found - data));
        if (end && (size_t)(end - found) < VERSION_CHARS_MAX) {
            memcpy(program->version, found, end - found);
            program->version[end - found] = '\0';
        }
    }
}

static int examine_program(struct dl_phdr_info *info, size_t size, void *opaque)
{
    Program *program = opaque;

    for (int i = 0; i < info->dlpi_phnum; i++) {
        const ElfW(Phdr) *segment = &info->dlpi_phdr[i];
        const char *data = (const char *)info->dlpi_addr + segment->p_vaddr;

        if (segment->p_type == PT_NOTE) {
            read_build_id(data, segment->p_memsz, program->build_id);
        } else if (segment->p_type == PT_LOAD && segment->p_flags == PF_R) {
            scan_constants(data, segment->p_filesz, program);
        }
    }
    return 1; /* The program itself comes first; libraries are not wanted */
}

/*
 * Refuses a file or directory that someone else could have changed. Owned by
 * root or by us, and not writable for group and others: the same rule as for
 * anything whose content is run.
 */
static void check_owner(const char *path)
{
    struct stat st;

    if (stat(path, &st) < 0) {
        refuse("cannot load the module: %s: %s", path, strerror(errno));
    }
    if (st.st_uid != 0 && st.st_uid != geteuid()) {
        refuse("cannot load the module: %s belongs to user %u, who is neither "
               "root nor the caller",
               path, (unsigned)st.st_uid);
    }
    if (st.st_mode & (S_IWGRP | S_IWOTH)) {
        refuse("cannot load the module: %s is writable for others than its "
               "owner (mode %03o)",
               path, (unsigned)(st.st_mode & 0777));
    }
}

/*
 * Is @build_id the first word of a line of the list? If not, @expected is the
 * build-id that the list has for a program of the same name, or empty.
 */
static bool is_listed(const char *list, const char *build_id,
                      char expected[BUILD_ID_CHARS_MAX])
{
    char line[BUILD_ID_CHARS_MAX + NAME_MAX];
    bool found = false;
    FILE *file = fopen(list, "re");

    if (!file) {
        refuse("cannot load the module: %s: %s", list, strerror(errno));
    }
    expected[0] = '\0';
    while (!found && fgets(line, sizeof(line), file)) {
        char *rest = line;
        char *id = strsep(&rest, " \n");
        char *name = rest ? strsep(&rest, " \n") : NULL;

        found = build_id[0] && !strcmp(id, build_id);
        if (name && !strcmp(name, program_invocation_short_name) &&
            strlen(id) < BUILD_ID_CHARS_MAX) {
            strcpy(expected, id);
        }
    }
    fclose(file);
    return found;
}

static void join(char *path, const char *directory, const char *file)
{
    if (snprintf(path, PATH_MAX, "%s/%s", directory, file) >= PATH_MAX) {
        refuse("cannot load the module: %s: %s", directory,
               strerror(ENAMETOOLONG));
    }
}

static bool is_qemu(void)
{
    return dlsym(RTLD_DEFAULT, "bdrv_register") &&
           dlsym(RTLD_DEFAULT, "register_module_init");
}

static void load_module(void)
{
    char own[PATH_MAX], list[PATH_MAX], path[PATH_MAX];
    char expected[BUILD_ID_CHARS_MAX];
    const char *directory;
    BaleModuleStamp *stamp;
    Program program = { 0 };
    Dl_info info;
    void *module;

    if (!dladdr((void *)load_module, &info) ||
        !realpath(info.dli_fname, own)) {
        refuse("cannot load the module: the shim does not find itself");
    }
    directory = dirname(own);
    join(list, directory, BALE_BUILD_IDS_FILE);
    join(path, directory, BALE_MODULE_FILE);

    check_owner(directory);
    check_owner(list);
    check_owner(path);

    dl_iterate_phdr(examine_program, &program);
    if (!is_listed(list, program.build_id, expected)) {
        refuse("%s is build %s of %s, but the module was made for build %s of "
               "%s: not loaded, not started",
               program_invocation_name,
               program.build_id[0] ? program.build_id : "(none)",
               program.version[0] ? program.version : "an unknown QEMU",
               expected[0] ? expected : "(none of that name)",
               BALE_QEMU_VERSION);
    }
    if (!program.has_stamp) {
        refuse("%s is build %s of %s, but lacks the stamp %s of %s, which the "
               "module was made for: not loaded, not started",
               program_invocation_name, program.build_id,
               program.version[0] ? program.version : "an unknown QEMU",
               BALE_QEMU_STAMP, BALE_QEMU_VERSION);
    }

    module = dlopen(path, RTLD_LAZY | RTLD_LOCAL);
    if (!module) {
        refuse("cannot load the module: %s", dlerror());
    }
    stamp = (BaleModuleStamp *)dlsym(module, "bale_module_stamp");
    if (!stamp || strcmp(stamp(), BALE_QEMU_STAMP)) {
        refuse("cannot load the module: %s was made for stamp %s, and the "
               "shim beside it for %s",
               path, stamp ? stamp() : "(none)", BALE_QEMU_STAMP);
    }
    module_argv = (BaleModuleArgv *)dlsym(module, "bale_module_argv");
    module_getopt_long =
        (BaleModuleGetoptLong *)dlsym(module, "bale_module_getopt_long");
}

int __libc_start_main(MainFunc *main, int argc, char **argv,
                      void (*init)(void), void (*fini)(void),
                      void (*rtld_fini)(void), void *stack_end)
{
    StartMainFunc *real =
        (StartMainFunc *)dlsym(RTLD_NEXT, "__libc_start_main");

    real_getopt_long = (BaleGetoptLong *)dlsym(RTLD_NEXT, "getopt_long");
    if (is_qemu()) {
        load_module();
        if (module_argv) {
            module_argv(&argc, &argv);
        }
    }
    return real(main, argc, argv, init, fini, rtld_fini, stack_end);
}

BALE_EXPORT int getopt_long(int argc, char *const argv[],
                            const char *optstring,
                            const struct option *longopts, int *longindex)
{
    if (!real_getopt_long) {
        /* Called by a constructor, before the program has started */
        real_getopt_long = (BaleGetoptLong *)dlsym(RTLD_NEXT, "getopt_long");
    }
    if (module_getopt_long) {
        return module_getopt_long(real_getopt_long, argc, argv, optstring,
                                  longopts, longindex);
    }
    return real_getopt_long(argc, argv, optstring, longopts, longindex);
}
