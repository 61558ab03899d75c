/* Runs one stand-in through save, clear, load and run: a reply from a loaded cache must equal the reply before.
 *
 * driver live|load|abort MODEL CACHE; exits 0, 1 after naming the line that failed, 2 if init failed, 3 if the cache
 * did not load, 4 if destroy failed. Its structs are the stand-in's own, by abi.h.
 */
#include "abi.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK(truth)                                                                                                   \
    do {                                                                                                               \
        if (!(truth)) {                                                                                                \
            fprintf(stderr, "driver.c:%d: not true: %s\n", __LINE__, #truth);                                          \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

typedef struct {
    char text[4096];
    int finishes, waits, prefill_tokens, generated;
    float first_hidden;
} Reply;

#if GROUP >= 'D'
#define RETURN_0 return 0
static int
#else
#define RETURN_0 return
static void
#endif
collect(RKLLMResult *result, void *userdata, LLMCallState state)
{
    Reply *reply = userdata;
    CHECK(state != RKLLM_RUN_ERROR);
    if (result->last_hidden_layer.hidden_states)
        reply->first_hidden = result->last_hidden_layer.hidden_states[0];
    if (state == RKLLM_RUN_WAITING)
        reply->waits++;
    else if (state == RKLLM_RUN_NORMAL && result->text)
        strcat(reply->text, result->text);
#if GROUP >= 'D'
    CHECK(state == RKLLM_RUN_FINISH || result->perf.prefill_tokens == 0);
    if (state == RKLLM_RUN_FINISH) {
        reply->prefill_tokens = result->perf.prefill_tokens;
        reply->generated = result->perf.generate_tokens;
        CHECK(result->perf.memory_usage_mb > 0);
    }
#endif
    reply->finishes += state == RKLLM_RUN_FINISH;
    RETURN_0;
}

static void ask(LLMHandle handle, const char *prompt, const char *save, int mode, Reply *reply)
{
    RKLLMPromptCacheParam cache = {1, save};
    RKLLMInput input = {.input_type = RKLLM_INPUT_PROMPT, .prompt_input = prompt};
    RKLLMInferParam infer = {.mode = (RKLLMInferMode)mode, .prompt_cache_params = save ? &cache : NULL};
    memset(reply, 0, sizeof *reply);
    CHECK(rkllm_run(handle, &input, &infer, reply) == 0);
    CHECK(reply->finishes == 1);
}

static void clear(LLMHandle handle)
{
#if GROUP >= 'D'
    CHECK(rkllm_clear_kv_cache(handle, 0, NULL, NULL) == 0);
    int size = -1;
    CHECK(rkllm_get_kv_cache_size(handle, &size) == 0 && size == 0);
#elif GROUP == 'C'
    CHECK(rkllm_clear_kv_cache(handle, 0) == 0);
#else
    (void)handle; /* 1.1 keeps nothing between runs */
#endif
}

static const char PROMPT[] = "You keep a café. Was gibt es heute?";

/* Save, clear, load, run: the whole life of a cache in one process. */
static void live(LLMHandle handle, const char *path)
{
    Reply cold, warm, other, hidden;
    ask(handle, PROMPT, path, RKLLM_INFER_GENERATE, &cold);
    printf("reply %s\n", cold.text);
    CHECK(strlen(cold.text) > 40 && cold.waits > 0);
    clear(handle);
    ask(handle, "Something else", NULL, RKLLM_INFER_GENERATE, &other);
    CHECK(strcmp(cold.text, other.text) != 0);
    clear(handle);

    CHECK(rkllm_release_prompt_cache(handle) == -1);
    CHECK(rkllm_load_prompt_cache(handle, path) == 0);
    CHECK(rkllm_load_prompt_cache(handle, path) == -1); /* not without a release */
    ask(handle, PROMPT, NULL, RKLLM_INFER_GENERATE, &warm);
    CHECK(strcmp(cold.text, warm.text) == 0);
    CHECK(rkllm_release_prompt_cache(handle) == 0);
#if GROUP >= 'D'
    CHECK(cold.prefill_tokens > 30 && warm.prefill_tokens == 1 && warm.generated == 60);
#endif

    ask(handle, PROMPT, NULL, RKLLM_INFER_GET_LAST_HIDDEN_LAYER, &hidden);
    CHECK(hidden.first_hidden != 0 && hidden.first_hidden >= -1 && hidden.first_hidden <= 1);
#if GROUP >= 'C'
    Reply raw;
    CHECK(rkllm_set_chat_template(handle, "", "", "") == 0);
    ask(handle, PROMPT, NULL, RKLLM_INFER_GENERATE, &raw);
    CHECK(strcmp(cold.text, raw.text) != 0);
#endif
    CHECK(rkllm_run(NULL, NULL, NULL, NULL) == -1);
}

/* A reply from a cache that an earlier process saved. */
static void load(LLMHandle handle, const char *path)
{
    Reply warm;
    if (rkllm_load_prompt_cache(handle, path) != 0)
        exit(3);
    ask(handle, PROMPT, NULL, RKLLM_INFER_GENERATE, &warm);
    printf("reply %s\n", warm.text);
}

static void *abort_soon(void *handle)
{
    while (rkllm_is_running(handle) != 0)
        ;
    CHECK(rkllm_abort(handle) == 0);
    return NULL;
}

/* The run that follows an aborted save-run. */
static void abort_save(LLMHandle handle, const char *path)
{
    Reply reply;
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, abort_soon, handle) == 0);
    ask(handle, PROMPT, path, RKLLM_INFER_GENERATE, &reply);
    pthread_join(thread, NULL);
    printf("aborted %s\n", reply.text);
    fflush(stdout);
    ask(handle, PROMPT, NULL, RKLLM_INFER_GENERATE, &reply);
}

int main(int argc, char **argv)
{
    CHECK(argc == 4);
    LLMHandle handle = NULL;
    RKLLMParam param = rkllm_createDefaultParam();
    param.model_path = argv[2];
    param.max_new_tokens = 60;
    param.top_k = 1;
#if GROUP >= 'E'
    RKLLMCallback callbacks = {.result_callback = collect}, *callback = &callbacks;
#else
    LLMResultCallback callback = collect;
#endif
    CHECK(rkllm_init(&handle, &param, callback) == -1); /* reserved bytes are dirty */
    memset(param.extend_param.reserved, 0, sizeof param.extend_param.reserved);
    if (rkllm_init(&handle, &param, callback) != 0)
        return 2;
    CHECK(rkllm_is_running(handle) == 1);
    if (strcmp(argv[1], "live") == 0)
        live(handle, argv[3]);
    else if (strcmp(argv[1], "load") == 0)
        load(handle, argv[3]);
    else
        abort_save(handle, argv[3]);
    return rkllm_destroy(handle) == 0 ? 0 : 4;
}
