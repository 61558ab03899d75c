/* The stand-in's model file, what it says on stdout, and its planned faults. Included by standin.c alone.
 *
 * First line "RKLLM-STANDIN-MODEL 1", then "key = value" lines (KEYS), last line "rkllm-toolkit version: 1.2.3".
 */
#ifndef RKLLM_STANDIN_MODEL_H
#define RKLLM_STANDIN_MODEL_H

#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct {
    char arch[256], platform[256], continued[256], fault[256], fault_file[256], fault_count_file[256], npu_file[256];
    int max_context, embd_size, prefill_tps, decode_tps, load_ms, eos_after, abort_ms;
    int saves, rewinds, callback_thread, null_text, waiting, stamps, abort_breaks, noisy, pins;
} Model;

/* Name and default. A WORD is one of two words, the first meaning 0, the second 1. */
#define TEXT(name, otherwise) {#name, offsetof(Model, name), NULL, NULL, otherwise, false}
#define NUMBER(name, otherwise) {#name, offsetof(Model, name), NULL, NULL, otherwise, true}
#define WORD(name, no, yes, otherwise) {#name, offsetof(Model, name), no, yes, otherwise, false}
static const struct {
    const char *name;
    size_t offset;
    const char *no, *yes, *otherwise;
    bool number;
} KEYS[] = {
    TEXT(arch, "qwen3"),
    TEXT(platform, "RK3588"),                           /* what the board is called in the first log line */
    NUMBER(max_context, "16384"),
    NUMBER(embd_size, "16"),
    NUMBER(prefill_tps, "0"),                           /* tokens per second, 0 = no delay */
    NUMBER(decode_tps, "0"),
    NUMBER(load_ms, "0"),
    WORD(saves, "no", "yes", "yes"),                    /* no: a save-run warns and writes nothing */
    WORD(rewinds, "no", "yes", "yes"),                  /* no: a state is reused as a whole, or not at all */
    WORD(callback_thread, "caller", "own", "caller"),   /* own: callbacks come from a second thread */
    WORD(null_text, "no", "yes", "no"),                 /* yes: special tokens come as NORMAL without text */
    WORD(waiting, "empty", "bytes", "empty"),           /* the text of WAITING callbacks */
    WORD(stamps, "no", "yes", "no"),                    /* yes: each text is the microsecond of its callback */
    NUMBER(eos_after, "0"),                             /* new tokens until a run finishes, 0 = never */
    NUMBER(abort_ms, "0"),                              /* how late an abort takes effect */
    WORD(abort_breaks, "no", "yes", "yes"),             /* yes: after an aborted save-run, run and load crash */
    TEXT(continued, "saved"),                           /* what a save-run makes of a loaded cache, see check_continued() */
    WORD(noisy, "no", "yes", "yes"),                    /* "I rkllm:" lines */
    WORD(pins, "no", "yes", "no"),                      /* yes: threads stay on the enabled_cpus */
    TEXT(npu_file, ""),                                 /* one process at a time may have a model with this key */
    TEXT(fault, ""),                                    /* PLACE:KIND, see check_fault() */
    TEXT(fault_file, ""),                               /* the fault fires only while this file exists */
    TEXT(fault_count_file, ""),                         /* grows by a byte each time it fires */
};

/* Everything the runtime says goes to stdout, at once. */
__attribute__((format(printf, 1, 2))) static void say(const char *format, ...)
{
    char line[1024];
    va_list values;
    va_start(values, format);
    vsnprintf(line, sizeof line, format, values);
    va_end(values);
    printf("%s\n", line);
#ifndef NO_FLUSH /* then it is for the host program to see to it, as nobody knows what the real one does */
    fflush(stdout);
#endif
}

__attribute__((format(printf, 1, 2))) static int fail(const char *format, ...)
{
    char reason[900];
    va_list values;
    va_start(values, format);
    vsnprintf(reason, sizeof reason, format, values);
    va_end(values);
    say("E rkllm: %s", reason);
    return -1;
}

static int set_key(Model *model, const char *name, const char *value)
{
    for (size_t i = 0; i < sizeof KEYS / sizeof *KEYS; i++) {
        void *field = (char *)model + KEYS[i].offset;
        if (strcmp(KEYS[i].name, name) != 0)
            continue;
        if (KEYS[i].number)
            *(int *)field = atoi(value);
        else if (!KEYS[i].yes)
            snprintf(field, sizeof model->arch, "%s", value);
        else if (strcmp(value, KEYS[i].yes) == 0 || strcmp(value, KEYS[i].no) == 0)
            *(int *)field = strcmp(value, KEYS[i].yes) == 0;
        else
            return fail("model key %s: %s is neither %s nor %s", name, value, KEYS[i].no, KEYS[i].yes);
        return 0;
    }
    return fail("unknown model key: %s", name);
}

/* What a save-run makes of a loaded prompt cache, which nobody documents: it continues and saves it; it reads the whole
 * prompt all the same; the state that it continues is wrong; it crashes. */
static int check_continued(const char *continued)
{
    static const char *const KNOWN[] = {"saved", "ignored", "spoilt", "crash"};
    for (size_t i = 0; i < sizeof KNOWN / sizeof *KNOWN; i++)
        if (strcmp(continued, KNOWN[i]) == 0)
            return 0;
    return fail("unknown value of model key continued: %s", continued);
}

/* A fault that never fires because of a typing error would make a test pass for nothing. */
static int check_fault(const char *fault)
{
    char place[16] = " ", kind[16] = " "; /* between spaces: whole words */
    if (!*fault)
        return 0;
    sscanf(fault, "%13[^:]:%13s", place + 1, kind + 1);
    if (!strstr(" init token3 load destroy run save ", strcat(place, " ")))
        return fail("unknown place in model key fault: %s", fault);
    if (!strstr(" segv abort ill hang error oom platform ", strcat(kind, " ")))
        return fail("unknown kind in model key fault: %s", fault);
    return 0;
}

static long version_number(const char *text)
{
    int x = 0, y = 0, z = 0;
    sscanf(text, "%d.%d.%d", &x, &y, &z);
    return x * 1000000L + y * 1000L + z;
}

static int read_model(Model *model, const char *path)
{
    static const char TOOLKIT[] = "rkllm-toolkit version: ";
    char line[1024], toolkit[64] = "";
    int status = 0, x, y, z;
    for (size_t i = 0; i < sizeof KEYS / sizeof *KEYS; i++)
        set_key(model, KEYS[i].name, KEYS[i].otherwise);
    FILE *file = path ? fopen(path, "r") : NULL;
    if (!file)
        return fail("failed to open model %s: %s", path ? path : "(null)", strerror(errno));
    if (!fgets(line, sizeof line, file))
        status = fail("model file is empty");
    else if (strcmp(line, "RKLLM-STANDIN-MODEL 1\n") != 0)
        status = fail("not an RKLLM model: %s", path);
    while (status == 0 && fgets(line, sizeof line, file)) {
        char name[64], value[256] = "";
        line[strcspn(line, "\r\n")] = '\0';
        *toolkit = '\0'; /* only the last line counts */
        if (strncmp(line, TOOLKIT, sizeof TOOLKIT - 1) == 0)
            snprintf(toolkit, sizeof toolkit, "%.60s", line + sizeof TOOLKIT - 1);
        else if (sscanf(line, " %63[a-z_] = %255[^\n]", name, value) >= 1 && strchr(line, '='))
            status = set_key(model, name, value);
    }
    fclose(file);
    if (status == 0 && sscanf(toolkit, "%d.%d.%d", &x, &y, &z) != 3)
        status = fail("model file is truncated");
    if (status == 0 && version_number(toolkit) > version_number(RUNTIME_VERSION))
        status = fail("model was converted with rkllm-toolkit %s, newer than this runtime %s", toolkit,
                      RUNTIME_VERSION);
    if (status == 0)
        status = check_continued(model->continued);
    return status ? status : check_fault(model->fault);
}

/* The fault planned for `place`, if any: -1 if it is an error, 0 if nothing is to happen here. */
static int fault(const Model *model, const char *place)
{
    size_t n = strlen(place);
    if (strncmp(model->fault, place, n) != 0 || model->fault[n] != ':')
        return 0;
    if (*model->fault_file && access(model->fault_file, F_OK) != 0)
        return 0;
    FILE *count = *model->fault_count_file ? fopen(model->fault_count_file, "a") : NULL;
    if (count) {
        fputc('x', count);
        fclose(count);
    }
    const char *kind = model->fault + n + 1;
    if (strcmp(kind, "segv") == 0)
        raise(SIGSEGV);
    else if (strcmp(kind, "abort") == 0)
        abort();
    else if (strcmp(kind, "ill") == 0)
        raise(SIGILL);
    else if (strcmp(kind, "hang") == 0)
        for (;;)
            pause();
    else if (strcmp(kind, "oom") == 0)
        say("E RKNN: failed to allocate memory");
    else if (strcmp(kind, "platform") == 0)
        say("E rkllm: target platform RK3576 does not match RK3588");
    else
        say("E rkllm: %s failed", place);
    return -1;
}

#endif
