/*
 * The simulator: shows the durability contract by breaking things.
 *
 *     sim [--class NAME]... [--budget SECONDS] [--seed N] [--all]
 *         [--letters STEPS]
 *     sim --case CASE|FILE [--verbose]
 *     sim --cases DIRECTORY
 *
 * Prints TAP: one result for each class or case, with the number of states
 * that were looked at.  A failure is printed as a case, which `sim --case`
 * plays again.  A class ends when it has seen its number of states (--states),
 * or when its time is over: with --budget, which the classes that are given
 * (all of them without --class) share, there is only the time.  --all goes
 * through every sequence of up to three steps instead of a sample of them;
 * --letters makes all samples of these steps.
 *
 * Environment: BALE_SEED as --seed; BALE_LONG: a long budget, no number of
 * states, and --all; BALE_SANITIZER: smaller default budget; BALE_SIM_SAVE
 * names a file that receives the device of the first failing state.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "inline.h"
#include "sim.h"

#include <malloc.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define BUDGET_DEFAULT 120.0      /* seconds, of each class */
#define BUDGET_LONG 1800.0
#define BUDGET_SANITIZER 12.0
#define KEEP_LEN (32 << 20)        /* bytes that malloc keeps */
#define THREADS_EVERY 8           /* each so many-th case has real workers */
#define FAILURES_MAX 3            /* of a class, then it ends */

static unsigned failures_max = FAILURES_MAX;

bool verbose;

static const Class *const classes[] = {
    &class_crash, &class_recovery, &class_fault, &class_flush,
    &class_memory, &class_damage, &class_super, &class_model,
};

static unsigned results, failures;
static bool inline_wanted;

static void print_result(bool ok, const char *name, const char *more)
{
    printf("%sok %u - %s%s%s\n", ok ? "" : "not ", ++results, name,
           more ? ": " : "", more ? more : "");
    fflush(stdout);
    failures += !ok;
}

/* The engine's warnings are part of what is tested, not of the result. */
static void log_nothing(const char *domain, GLogLevelFlags level,
                        const char *message, gpointer opaque)
{
    if (level & (G_LOG_FLAG_FATAL | G_LOG_LEVEL_ERROR)) {
        g_log_default_handler(domain, level, message, opaque);
    }
}

static void print_story(const char *story)
{
    g_auto(GStrv) lines = g_strsplit(story, "\n", -1);

    for (char **line = lines; *line; line++) {
        printf("# %s\n", *line);
    }
    fflush(stdout);
}

static const Class *class_find(const char *name)
{
    for (unsigned i = 0; i < G_N_ELEMENTS(classes); i++) {
        if (!strcmp(classes[i]->name, name)) {
            return classes[i];
        }
    }
    return NULL;
}

static char *case_run(Case *c, uint64_t *count)
{
    const Class *class = class_find(c->class_name);

    return class ? class->run(c, count)
                 : g_strdup_printf("no class is called '%s'", c->class_name);
}

/* The first line of a case file that is no comment is the case. */
static char *case_from_file(const char *filename)
{
    g_autofree char *text = NULL;
    g_auto(GStrv) lines = NULL;

    if (!g_file_get_contents(filename, &text, NULL, NULL)) {
        return NULL;
    }
    lines = g_strsplit(text, "\n", -1);
    for (char **line = lines; *line; line++) {
        if (**line && **line != '#') {
            return g_strdup(*line);
        }
    }
    return NULL;
}

static void run_case(const char *name)
{
    g_autofree char *from_file = case_from_file(name);
    g_autofree char *base = g_path_get_basename(name);
    g_autofree char *error = NULL, *more = NULL;
    uint64_t count = 0;
    Case c;

    error = case_parse(&c, from_file ? from_file : name);
    inline_enabled = inline_wanted && c.seed % THREADS_EVERY;
    if (!error) {
        error = case_run(&c, &count);
    }
    more = g_strdup_printf("%" G_GUINT64_FORMAT " states", count);
    print_result(!error, from_file ? base : name, more);
    if (error) {
        print_story(error);
    }
}

static int compare_names(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

static void run_cases(const char *directory)
{
    g_autoptr(GDir) dir = g_dir_open(directory, 0, NULL);
    g_autoptr(GPtrArray) names = g_ptr_array_new_with_free_func(g_free);
    const char *name;

    while (dir && (name = g_dir_read_name(dir))) {
        if (g_str_has_suffix(name, ".case")) {
            g_ptr_array_add(names, g_build_filename(directory, name, NULL));
        }
    }
    g_ptr_array_sort(names, compare_names);
    for (guint i = 0; i < names->len; i++) {
        run_case(g_ptr_array_index(names, i));
    }
}

static void run_class(const Class *class, double budget, uint64_t target,
                      uint32_t seed, bool all)
{
    g_autoptr(GRand) rand = g_rand_new_with_seed(seed);
    g_autoptr(GTimer) timer = g_timer_new();
    g_autofree char *more = NULL;
    uint64_t count = 0, cases = 0, corrupt = corrupt_states;
    uint64_t recovered = recovered_states;
    unsigned failed = 0;
    Case c;

    while (failed < failures_max && g_timer_elapsed(timer, NULL) < budget &&
           count < target && class->next(&c, cases, rand, all)) {
        g_autofree char *whole = case_text(&c, NULL);
        g_autofree char *error = NULL;

        if (verbose) {
            printf("# %s\n", whole);
            fflush(stdout);
        }
        inline_enabled = inline_wanted && c.seed % THREADS_EVERY;
        error = class->run(&c, &count);
        cases++;
        if (error) {
            g_autofree char *text = case_text(&c, c.detail);

            printf("# again: sim --case %s (in: %s)\n", text, whole);
            print_story(error);
            failed++;
        }
    }
    corrupt = corrupt_states - corrupt;
    more = g_strdup_printf("%s: %" PRIu64 " states of %" PRIu64 " cases, %"
                           PRIu64 " recoveries, %" PRIu64 " marked corrupt, "
                           "seed %" PRIu32, class->what, count, cases,
                           recovered_states - recovered, corrupt, seed);
    print_result(!failed, class->name, more);
}

int main(int argc, char **argv)
{
    const char *env_seed = g_getenv("BALE_SEED");
    bool is_long = g_getenv("BALE_LONG") != NULL;
    g_auto(GStrv) names = NULL, cases = NULL;
    g_autofree char *directory = NULL, *seed_text = NULL, *letters = NULL;
    double budget = is_long                      ? BUDGET_LONG
                    : g_getenv("BALE_SANITIZER") ? BUDGET_SANITIZER
                                                 : BUDGET_DEFAULT;
    double total = 0;
    gint64 states = 0;
    gboolean all = is_long, talk = FALSE, first = FALSE;
    GOptionEntry entries[] = {
        { "class", 0, 0, G_OPTION_ARG_STRING_ARRAY, &names, "run this class",
          "NAME" },
        { "case", 0, 0, G_OPTION_ARG_STRING_ARRAY, &cases, "run this case",
          "CASE" },
        { "cases", 0, 0, G_OPTION_ARG_FILENAME, &directory,
          "run all cases in a directory", "DIRECTORY" },
        { "seed", 0, 0, G_OPTION_ARG_STRING, &seed_text, "of the samples",
          "N" },
        { "budget", 0, 0, G_OPTION_ARG_DOUBLE, &total, "for all classes",
          "SECONDS" },
        { "states", 0, 0, G_OPTION_ARG_INT64, &states,
          "end a class after so many", "N" },
        { "all", 0, 0, G_OPTION_ARG_NONE, &all, "all short sequences", NULL },
        { "letters", 0, 0, G_OPTION_ARG_STRING, &letters,
          "make samples of these", "STEPS" },
        { "first", 0, 0, G_OPTION_ARG_NONE, &first,
          "end a class at its first failure", NULL },
        { "verbose", 0, 0, G_OPTION_ARG_NONE, &talk, "tell more", NULL },
        { 0 },
    };
    GOptionContext *context = g_option_context_new(NULL);
    g_autoptr(GError) err = NULL;
    uint32_t seed = g_random_int();
    unsigned n = 0;

    g_option_context_add_main_entries(context, entries, NULL);
    if (!g_option_context_parse(context, &argc, &argv, &err) || argc > 1) {
        fprintf(stderr, "sim: %s\n", err ? err->message : "too many words");
        return 2;
    }
    g_option_context_free(context);
    /* A store's buffers are of megabytes: keep the pages of the last one. */
    mallopt(M_MMAP_THRESHOLD, KEEP_LEN);
    mallopt(M_TRIM_THRESHOLD, 1 << 30);
    mallopt(M_TOP_PAD, 16 << 20);
    mallopt(M_ARENA_MAX, 1);
    inline_wanted = inline_enabled;
    verbose = talk;
    sequence_letters = letters;
    failures_max = first ? 1 : FAILURES_MAX;
    g_log_set_default_handler(log_nothing, NULL);
    if (seed_text || env_seed) {
        seed = g_ascii_strtoull(seed_text ? seed_text : env_seed, NULL, 0);
    }
    for (char **name = cases; name && *name; name++) {
        run_case(*name);
    }
    if (directory) {
        run_cases(directory);
    }
    for (unsigned i = 0; i < G_N_ELEMENTS(classes); i++) {
        n += names ? g_strv_contains((const char *const *)names,
                                     classes[i]->name)
                   : !cases && !directory;
    }
    for (unsigned i = 0; i < G_N_ELEMENTS(classes); i++) {
        if (names ? g_strv_contains((const char *const *)names,
                                    classes[i]->name)
                  : !cases && !directory) {
            run_class(classes[i], total > 0 ? total / n : budget,
                      states > 0    ? (uint64_t)states
                      : total > 0 || is_long ? UINT64_MAX
                                    : classes[i]->states,
                      seed, all);
        }
    }
    printf("1..%u\n", results);
    return failures ? 1 : 0;
}
