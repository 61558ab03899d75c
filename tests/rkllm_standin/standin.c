/* A stand-in for librkllmrt.so: a test tool of this project, not the vendor's library, never installed.
 *
 * It speaks the binary interface of one ABI group (abi.h) and needs no NPU. It does what is known of the runtime, and
 * where nothing is known, what is hardest on a caller: buffers are spoilt after each callback, reserved bytes come
 * dirty, calls that must not happen end the process.
 *
 * The "model" is a text file of keys (KEYS in model.h), which lets every test steer it. A "token" is a byte of UTF-8
 * plus 3. The "KV cache" is a row of positions: a position's state depends on its token and on the state before, and
 * the next token depends on the states of all positions. So an equal reply proves an equal cache.
 */
#define _GNU_SOURCE
#include "abi.h"

#include <pthread.h>
#include <fcntl.h>
#include <sched.h>
#include <sys/file.h>
#include <stdatomic.h>
#include <sys/resource.h>
#include <time.h>

/* What a binding can learn of the version: a string in the file, since C. NO_VERSION takes it out, VERSION_STRING
 * puts another one in (in B too), and then is also what the runtime says of itself. */
#ifdef VERSION_STRING
#define RUNTIME_VERSION VERSION_STRING
#elif ABI == 110
#define RUNTIME_VERSION "1.1.4"
#elif ABI == 120
#define RUNTIME_VERSION "1.2.0"
#elif ABI == 1211
#define RUNTIME_VERSION "1.2.1b1"
#elif ABI == 121
#define RUNTIME_VERSION "1.2.3"
#else
#define RUNTIME_VERSION "1.3.0"
#endif
#if !defined(NO_VERSION) && (GROUP >= 'C' || defined(VERSION_STRING))
__attribute__((used)) static const char EMBEDDED[] = "RKLLM SDK (version: " RUNTIME_VERSION " | target: standin)";
#endif

#include "model.h"

enum { BOS = 1, FIRST_BYTE = 3, SPECIAL = 259, VOCAB = 300, BOARD_CONTEXT = 16384, PADDING_WORDS = 6, SPOILT = 0xEE };

/* Handles. None is ever freed, so that a call with a destroyed one can be told from a call with a new one. */

typedef struct {
    int32_t token;
    uint64_t state; /* of this token after all before it */
    uint64_t sum;   /* of this state and all before it: what attention sees */
} Position;

typedef struct Handle {
    struct Handle *next;
    bool alive;
    int npu; /* the open npu_file, or -1 */
    pthread_mutex_t lock; /* guards running, against run, abort and destroy */
    bool running;
    atomic_llong abort_us; /* when a requested abort takes effect, 0 = none requested */
    Model model;
    RKLLMParam param;
    LLMResultCallback callback;
    void *userdata;
    char prefix[4096], postfix[4096]; /* the chat template around a prompt */
    Position *kv;
    int n_kv;
    uint64_t samples;  /* counts sampled tokens; starts with the time */
    bool cache_loaded; /* and not released */
    bool broken;       /* by an aborted save-run: the next run or load crashes */
    struct Lora {
        struct Lora *next;
        char name[256];
        uint64_t effect;
    } *loras;
    char text[16];      /* of the callback that is going on */
    RKLLMResult result; /* likewise */
} Handle;

static pthread_mutex_t handles_lock = PTHREAD_MUTEX_INITIALIZER;
static Handle *handles;

static Handle *live(LLMHandle handle)
{
    Handle *known;
    if (!handle)
        return NULL;
    pthread_mutex_lock(&handles_lock);
    for (known = handles; known && known != handle; known = known->next)
        ;
    pthread_mutex_unlock(&handles_lock);
    if (known && known->alive)
        return known;
    say("E rkllm: call with a %s handle", known ? "destroyed" : "wild");
    abort();
}

static bool begin(Handle *h)
{
    pthread_mutex_lock(&h->lock);
    bool free = !h->running;
    if (free) {
        h->running = true;
        atomic_store(&h->abort_us, 0);
    }
    pthread_mutex_unlock(&h->lock);
    if (!free)
        fail("a task is running");
    return free;
}

static void end(Handle *h)
{
    pthread_mutex_lock(&h->lock);
    h->running = false;
    pthread_mutex_unlock(&h->lock);
}

/* Time, in microseconds */

static long long now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000LL + t.tv_nsec / 1000;
}

static bool aborted(Handle *h)
{
    long long when = atomic_load(&h->abort_us);
    return when && now_us() >= when;
}

static void wait_until(Handle *h, long long when)
{
    for (long long left; !aborted(h) && (left = when - now_us()) > 0;)
        nanosleep(&(struct timespec){.tv_nsec = (left < 1000 ? left : 1000) * 1000}, NULL);
}

/* Arithmetic of the model */

static uint64_t mix(uint64_t x) /* splitmix64 */
{
    x += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

static uint64_t hash_text(uint64_t hash, const char *text)
{
    while (*text)
        hash = mix(hash ^ (unsigned char)*text++);
    return hash;
}

static uint64_t first_state(const Handle *h)
{
    return mix(hash_text(0, h->model.arch) ^ (uint64_t)h->model.embd_size);
}

static void set_position(Handle *h, int i, int32_t token, uint64_t state)
{
    h->kv[i] = (Position){token, state, mix((i ? h->kv[i - 1].sum : 0) ^ state)};
}

static void append(Handle *h, int32_t token, uint64_t lora)
{
    uint64_t before = h->n_kv ? h->kv[h->n_kv - 1].state : first_state(h);
    set_position(h, h->n_kv, token, mix(mix(before ^ lora) + (uint32_t)token));
    h->n_kv++;
}

/* The next character after what the cache holds: short lowercase words, digits, now and then more than one byte.
 * NULL is a special token. */
static const char *next_character(const Handle *h, uint64_t chance)
{
    static const char *const RARE[] = {"é", "ж", "🎉"}, *const DIGITS[] = {"0", "1", "2", "3", "5", "8"};
    static const char *const LETTERS[] = {"e", "t", "a", "o", "i", "n", "s", "h", "r", "d", "l", "u"};
    bool after_space = h->kv[h->n_kv - 1].token == FIRST_BYTE + ' ';
    unsigned which = chance % 100, pick = (unsigned)(chance >> 32);
    if (h->model.null_text && which >= 92)
        return NULL;
    if (which < 10)
        return RARE[pick % 3];
    if (which < 28 && !after_space)
        return " ";
    if (which < 34)
        return DIGITS[pick % 6];
    return LETTERS[pick % 12];
}

/* Cache files: u32 magic, u32 8, u32 n, i32 tokens[n], u64 size of the file, per position a u64 state and padding,
 * u64 checksum. The checksum covers the size and the magic only: a flipped state goes unnoticed. */

static uint32_t magic(const Handle *h)
{
    if (GROUP <= 'C')
        return 0x6767736e;
    return strcmp(h->model.arch, "qwen3") == 0 ? 7 : 8 + hash_text(0, h->model.arch) % 56;
}

static bool good_magic(uint32_t value)
{
    return GROUP <= 'C' ? value == 0x6767736e : value >= 7 && value < 64;
}

static uint64_t cache_size(uint64_t n)
{
    return 12 + 4 * n + 8 + 8 * (1 + PADDING_WORDS) * n + 8;
}

/* -1 only for the fault, which leaves half a file behind; a file that cannot be written is a line in the log. */
static int save_cache(const Handle *h, const char *path)
{
    uint32_t head[3] = {magic(h), 8, (uint32_t)h->n_kv};
    uint64_t size = cache_size(head[2]), check = mix(size ^ head[0]);
    if (!h->model.saves) {
        say("W rkllm: this model does not support saving prompt cache");
        return 0;
    }
    FILE *file = fopen(path, "wb");
    bool good = file && fwrite(head, sizeof head, 1, file) == 1;
    for (int i = 0; good && i < h->n_kv; i++)
        good = fwrite(&h->kv[i].token, sizeof(int32_t), 1, file) == 1;
    good = good && fwrite(&size, sizeof size, 1, file) == 1;
    for (int i = 0; good && i < h->n_kv; i++) {
        uint64_t words[1 + PADDING_WORDS] = {h->kv[i].state};
        for (uint64_t j = 1; j <= PADDING_WORDS; j++)
            words[j] = mix(words[0] + j);
        good = fwrite(words, sizeof words, 1, file) == 1;
        if (i == h->n_kv / 2) {
            fflush(file);
            if (fault(&h->model, "save") != 0) {
                fclose(file);
                return -1;
            }
        }
    }
    good = good && fwrite(&check, sizeof check, 1, file) == 1;
    if (file && fclose(file) != 0)
        good = false;
    if (!good)
        fail("cannot write %s: %s", path, strerror(errno));
    return 0;
}

static int read_cache(Handle *h, FILE *file)
{
    uint32_t head[3];
    uint64_t size, check, words[1 + PADDING_WORDS];
    fseek(file, 0, SEEK_END);
    uint64_t actual = (uint64_t)ftell(file);
    rewind(file);
    if (fread(head, sizeof head, 1, file) != 1)
        return fail("prompt cache is truncated");
    if (!good_magic(head[0]) || head[1] != 8)
        return fail("prompt cache has a wrong magic");
    if (actual != cache_size(head[2]))
        return fail("prompt cache is truncated");
    if (head[2] > (uint32_t)h->param.max_context_len)
        return fail("prompt cache has %u tokens, context %d", head[2], h->param.max_context_len);
    fseek(file, -8, SEEK_END);
    bool good = fread(&check, sizeof check, 1, file) == 1;
    fseek(file, 12 + 4 * (long)head[2], SEEK_SET);
    good = good && fread(&size, sizeof size, 1, file) == 1;
    if (!good || size != actual || check != mix(size ^ head[0]))
        return fail("prompt cache has a wrong checksum");
    h->n_kv = 0;
    for (uint32_t i = 0; i < head[2]; i++) {
        int32_t token = 0;
        fseek(file, 12 + 4 * (long)i, SEEK_SET);
        good = fread(&token, sizeof token, 1, file) == 1;
        fseek(file, 20 + 4 * (long)head[2] + (long)(sizeof words * i), SEEK_SET);
        if (!good || fread(words, sizeof words, 1, file) != 1)
            return fail("prompt cache cannot be read");
        /* Padding stands for the rest of a position's state: a byte flipped there must count too. */
        uint64_t state = words[0];
        for (uint64_t j = 1; j <= PADDING_WORDS; j++)
            state ^= words[j] ^ mix(words[0] + j);
        set_position(h, (int)i, token, state);
        h->n_kv = (int)i + 1;
    }
    return 0;
}

/* Runs */

typedef struct {
    Handle *h;
    RKLLMInput input;
    RKLLMInferParam infer;
    void *userdata;
    uint64_t lora;       /* its effect on every state, 0 = none */
    long long start, prefilled, finished;
    int n_prefilled, n_generated;
    int status;
} Run;

/* Calls back with the result in the handle, and spoils everything that the callback saw. */
static int call_back(Run *run, const char *text, int32_t token, LLMCallState state)
{
    Handle *h = run->h;
    int answer = 0;
    if (text)
        snprintf(h->text, sizeof h->text, "%s", text);
    h->result.text = text ? h->text : NULL;
    h->result.token_id = token;
    void *userdata = run->userdata ? run->userdata : h->userdata;
#if GROUP >= 'D'
    answer = h->callback(&h->result, userdata, state);
#else
    h->callback(&h->result, userdata, state);
#endif
    memset(&h->result, SPOILT, sizeof h->result);
    memset(h->text, SPOILT, sizeof h->text - 1);
    return answer;
}

static void finish(Run *run)
{
    run->finished = now_us();
    double prefill_ms = (double)(run->prefilled - run->start) / 1e3;
    double generate_ms = (double)(run->finished - run->prefilled) / 1e3;
#if GROUP >= 'D'
    if (run->h->model.noisy && run->input.enable_thinking)
        say("D rkllm: thinking");
#endif
    if (run->h->model.noisy)
        say("I rkllm: prefill %d tokens in %.2f ms, generate %d tokens in %.2f ms", run->n_prefilled, prefill_ms,
            run->n_generated, generate_ms);
    memset(&run->h->result, 0, sizeof run->h->result);
#if GROUP >= 'D'
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    run->h->result.perf = (RKLLMPerfStat){(float)prefill_ms, run->n_prefilled, (float)generate_ms, run->n_generated,
                                          (float)usage.ru_maxrss / 1024};
#endif
    call_back(run, NULL, 0, RKLLM_RUN_FINISH);
}

/* The input's tokens, to be freed; NULL after saying why not. */
static int32_t *tokenize(const Run *run, size_t *n)
{
    const Handle *h = run->h;
    const RKLLMInput *input = &run->input;
    int32_t *tokens;
#if GROUP >= 'D'
    const char *role = input->role;
    if (role && *role && strcmp(role, "user") != 0 && strcmp(role, "tool") != 0) {
        fail("unknown role: %.40s", role);
        return NULL;
    }
#endif
    if (input->input_type == RKLLM_INPUT_TOKEN && input->token_input.n_tokens > 0) {
        *n = input->token_input.n_tokens;
        tokens = malloc(*n * sizeof *tokens);
        memcpy(tokens, input->token_input.input_ids, *n * sizeof *tokens);
        for (size_t i = 0; i < *n; i++)
            if (tokens[i] < 0) {
                fail("token %zu is negative", i);
                free(tokens);
                return NULL;
            }
        return tokens;
    }
    if (input->input_type == RKLLM_INPUT_PROMPT && input->prompt_input) {
        const char *parts[] = {h->prefix, input->prompt_input, h->postfix};
        tokens = malloc((1 + strlen(parts[0]) + strlen(parts[1]) + strlen(parts[2])) * sizeof *tokens);
        tokens[0] = BOS;
        *n = 1;
        for (int i = 0; i < 3; i++)
            for (const char *byte = parts[i]; *byte; byte++)
                tokens[(*n)++] = FIRST_BYTE + (unsigned char)*byte;
        return tokens;
    }
    fail("empty or unsupported input of type %d", (int)input->input_type);
    return NULL;
}

/* Puts the tokens into the cache, as many as an abort allows. */
static void prefill(Run *run, const int32_t *tokens, int n)
{
    Handle *h = run->h;
    int reused = 0;
#if GROUP >= 'C'
    bool keep_history = run->infer.keep_history != 0;
#else
    bool keep_history = false;
#endif
    if (!keep_history) {
        while (reused < h->n_kv && reused < n - 1 && h->kv[reused].token == tokens[reused])
            reused++;
        if (reused < h->n_kv && !h->model.rewinds)
            reused = 0;
        h->n_kv = reused;
    }
    for (int i = reused; i < n && !aborted(h); i++) {
        append(h, tokens[i], run->lora);
        run->n_prefilled++;
        if (h->model.prefill_tps > 0)
            wait_until(h, run->start + run->n_prefilled * 1000000LL / h->model.prefill_tps);
    }
    run->prefilled = now_us();
}

/* A run that saves begins on a loaded cache: what becomes of that is the model file's to say. */
static void continue_cache(Handle *h)
{
    const char *how = h->model.continued;
    if (strcmp(how, "ignored") == 0)
        h->n_kv = 0;
    else if (strcmp(how, "spoilt") == 0)
        for (int i = 0; i < h->n_kv; i++)
            set_position(h, i, h->kv[i].token, mix(h->kv[i].state));
    else if (strcmp(how, "crash") == 0)
        raise(SIGSEGV);
}

/* The modes that return numbers: one callback with a row of `width` floats for each of the last n positions. */
static void give_numbers(Run *run, int n, int width)
{
    Handle *h = run->h;
    size_t size = (size_t)n * (size_t)width * sizeof(float);
    float *numbers = malloc(size);
    LLMCallState state = RKLLM_RUN_NORMAL;
    for (int i = 0; i < n; i++)
        for (int j = 0; j < width; j++)
            numbers[i * width + j] = (float)(mix(h->kv[h->n_kv - n + i].sum + (uint64_t)j) >> 40) / (1 << 23) - 1;
    memset(&h->result, 0, sizeof h->result);
#if GROUP >= 'C'
    if (run->infer.mode == RKLLM_INFER_GET_LOGITS)
        h->result.logits = (RKLLMResultLogits){numbers, width, n};
    else
        h->result.last_hidden_layer = (RKLLMResultLastHiddenLayer){numbers, width, n};
#else
    h->result.last_hidden_layer = (RKLLMResultLastHiddenLayer){numbers, width, n};
    state = RKLLM_RUN_GET_LAST_HIDDEN_LAYER;
#endif
    call_back(run, NULL, 0, state);
    memset(numbers, SPOILT, size);
    free(numbers);
}

/* True if the run ends with FINISH, false if a callback paused it or a fault ended it with ERROR. */
static bool generate(Run *run, int limit, bool greedy)
{
    Handle *h = run->h;
    const char *rest = ""; /* bytes to come of a character that has begun */
    char begun[8] = "";    /* bytes of it that have come */
    char stamp[24];
    while (!aborted(h) && h->n_kv < h->param.max_context_len) {
        int made = run->n_generated;
        bool eos = h->model.eos_after > 0 && made >= h->model.eos_after;
#if GROUP >= 'E'
        eos = eos && !h->param.ignore_eos_token;
#endif
        if ((limit > 0 && made >= limit) || eos)
            break;
        if (h->model.decode_tps > 0)
            wait_until(h, run->prefilled + (made + 1) * 1000000LL / h->model.decode_tps);
        if (aborted(h))
            break;
        int32_t token = SPECIAL;
        if (!*rest) {
            uint64_t chance = mix(h->kv[h->n_kv - 1].sum);
            rest = next_character(h, greedy ? chance : mix(chance ^ mix(h->samples++)));
            memset(begun, 0, sizeof begun);
        }
        if (rest) {
            token = FIRST_BYTE + (unsigned char)*rest;
            begun[strlen(begun)] = *rest++;
        }
        append(h, token, run->lora);
        run->n_generated++;
        memset(&h->result, 0, sizeof h->result);
        bool waiting = rest && *rest;
        const char *text = !rest || (waiting && !h->model.waiting) ? NULL : begun;
        rest = rest ? rest : "";
        if (text && h->model.stamps) {
            snprintf(stamp, sizeof stamp, "%lld", now_us());
            text = stamp;
        }
        if (call_back(run, text, token, waiting ? RKLLM_RUN_WAITING : RKLLM_RUN_NORMAL) == 1)
            return false;
        if (run->n_generated == 3 && fault(&h->model, "token3") != 0) {
            memset(&h->result, 0, sizeof h->result);
            call_back(run, NULL, 0, RKLLM_RUN_ERROR);
            return false;
        }
    }
    return true;
}

static int perform(Run *run)
{
    Handle *h = run->h;
    RKLLMPromptCacheParam *cache = run->infer.prompt_cache_params;
    bool save = cache && cache->save_prompt_cache;
    int mode = (int)run->infer.mode, limit = h->param.max_new_tokens, top_k = h->param.top_k;
    float temperature = h->param.temperature;
    if (h->broken)
        raise(SIGSEGV);
    if (fault(&h->model, "run") != 0)
        return -1;
#if GROUP >= 'E'
    if (run->infer.max_new_tokens > 0)
        limit = run->infer.max_new_tokens;
    if (run->infer.sampling_params) {
        top_k = run->infer.sampling_params->top_k;
        temperature = run->infer.sampling_params->temperature;
    }
#endif
    if (mode < 0 || mode > (GROUP == 'B' ? 1 : 2))
        return fail("unknown mode %d", mode);
    if (run->infer.lora_params) {
        const char *name = run->infer.lora_params->lora_adapter_name;
        struct Lora *lora = h->loras;
        while (lora && name && strcmp(lora->name, name) != 0)
            lora = lora->next;
        if (!lora || !name)
            return fail("LoRA adapter %s is not loaded", name ? name : "(null)");
        run->lora = lora->effect;
    }
    size_t n = 0;
    int32_t *tokens = tokenize(run, &n);
    if (!tokens)
        return -1;
    size_t before = 0;
#if GROUP >= 'C'
    before = run->infer.keep_history ? (size_t)h->n_kv : 0;
#endif
    if (before + n >= (size_t)h->param.max_context_len) {
        free(tokens);
        return fail("prompt is too long: %zu tokens, context %d", before + n, h->param.max_context_len);
    }
    run->start = now_us();
    if (save && h->cache_loaded)
        continue_cache(h);
    prefill(run, tokens, (int)n);
    free(tokens);
    const char *path = save && cache->prompt_cache_path ? cache->prompt_cache_path : "./prompt_cache.bin";
    if (save && !aborted(h) && save_cache(h, path) != 0)
        return -1;
    bool finishes = true;
    if (mode != RKLLM_INFER_GENERATE && !aborted(h))
        give_numbers(run, (int)n, mode == RKLLM_INFER_GET_LOGITS ? VOCAB : h->model.embd_size);
    else if (!aborted(h))
        finishes = generate(run, limit, temperature <= 0 || top_k == 1);
    if (save && aborted(h) && h->model.abort_breaks)
        h->broken = true;
    if (finishes)
        finish(run);
    return 0; /* after ERROR too: no return value of the runtime is to be believed */
}

static void *perform_in_thread(void *argument)
{
    Run *run = argument;
    run->status = perform(run);
#if GROUP == 'B'
    run->h->n_kv = 0; /* 1.1 keeps nothing from run to run, not even a loaded cache */
#endif
    return NULL;
}

static void *perform_detached(void *argument)
{
    Run *run = argument;
    perform_in_thread(run);
    end(run->h);
    free(run);
    return NULL;
}

int rkllm_run(LLMHandle handle, RKLLMInput *input, RKLLMInferParam *infer, void *userdata)
{
    Handle *h = live(handle);
    if (!h || !input || !infer || !begin(h))
        return -1;
    Run run = {.h = h, .input = *input, .infer = *infer, .userdata = userdata, .status = -1};
    pthread_t thread;
    if (!h->model.callback_thread)
        perform_in_thread(&run);
    else if (pthread_create(&thread, NULL, perform_in_thread, &run) == 0)
        pthread_join(thread, NULL);
    end(h);
    return run.status;
}

int rkllm_run_async(LLMHandle handle, RKLLMInput *input, RKLLMInferParam *infer, void *userdata)
{
    Handle *h = live(handle);
    Run *run = h && input && infer && begin(h) ? calloc(1, sizeof *run) : NULL;
    pthread_t thread;
    if (!run)
        return -1;
    *run = (Run){.h = h, .input = *input, .infer = *infer, .userdata = userdata};
    if (pthread_create(&thread, NULL, perform_detached, run) != 0) {
        end(h);
        free(run);
        return -1;
    }
    pthread_detach(thread);
    return 0;
}

int rkllm_abort(LLMHandle handle)
{
    Handle *h = live(handle);
    if (!h)
        return -1;
    pthread_mutex_lock(&h->lock);
    if (h->running && !atomic_load(&h->abort_us))
        atomic_store(&h->abort_us, now_us() + h->model.abort_ms * 1000LL);
    pthread_mutex_unlock(&h->lock);
    return 0;
}

int rkllm_is_running(LLMHandle handle) /* 0 if a task is running: the vendor's words */
{
    Handle *h = live(handle);
    if (!h)
        return -1;
    pthread_mutex_lock(&h->lock);
    int answer = h->running ? 0 : 1;
    pthread_mutex_unlock(&h->lock);
    return answer;
}

/* Life */

RKLLMParam rkllm_createDefaultParam(void)
{
    RKLLMParam p;
    memset(&p, 0xA5, sizeof p); /* the vendor does not zero the reserved bytes; a binding has to */
    p.model_path = NULL;
    p.max_context_len = 512;
    p.max_new_tokens = -1;
    p.top_k = 40;
    p.top_p = 0.9F;
    p.temperature = 0.8F;
    p.repeat_penalty = 1.1F;
    p.frequency_penalty = p.presence_penalty = 0;
    p.mirostat = 0;
    p.mirostat_tau = 5.0F;
    p.mirostat_eta = 0.1F;
    p.skip_special_token = true;
    p.is_async = false;
    p.extend_param.base_domain_id = 0;
#if GROUP <= 'D'
    p.img_start = p.img_end = p.img_content = "";
#endif
#if GROUP >= 'C'
    p.n_keep = -1;
    p.extend_param.embed_flash = 1;
    p.extend_param.enabled_cpus_num = 4;
    p.extend_param.enabled_cpus_mask = 0x0F;
#endif
#if GROUP >= 'D'
    p.extend_param.n_batch = 1;
    p.extend_param.use_cross_attn = 0;
#endif
#if GROUP >= 'E'
    p.ignore_eos_token = false;
#endif
    return p;
}

static int check_param(const Model *model, const RKLLMParam *param)
{
    int context = param->max_context_len, domain = param->extend_param.base_domain_id;
    for (size_t i = 0; i < sizeof param->extend_param.reserved; i++)
        if (param->extend_param.reserved[i] != 0)
            return fail("reserved byte %zu of the extend_param is not zero", i);
    if (context <= 0 || context % 32 != 0 || context > BOARD_CONTEXT || context > model->max_context)
        return fail("max_context_len %d is not a multiple of 32 up to the model's %d", context, model->max_context);
    if (domain < 0 || domain > 15)
        return fail("base_domain_id %d is not in 0 to 15", domain);
#if GROUP >= 'D'
    if (param->extend_param.n_batch > 1)
        return fail("n_batch %d: this runtime asserts on more than 1", param->extend_param.n_batch);
#endif
    return 0;
}

/* Keep this thread, and those that it starts, on the CPUs of the mask, as enabled_cpus asks. */
static int pin(const Model *model, const RKLLMParam *param)
{
#if GROUP >= 'C'
    unsigned mask = param->extend_param.enabled_cpus_mask;
    cpu_set_t cpus;
    CPU_ZERO(&cpus);
    for (int cpu = 0; cpu < 32; cpu++)
        if (mask >> cpu & 1)
            CPU_SET(cpu, &cpus);
    if (model->pins && sched_setaffinity(0, sizeof cpus, &cpus) != 0)
        return fail("cannot pin threads to the cpus 0x%x: %s", mask, strerror(errno));
#else
    (void)model, (void)param;
#endif
    return 0;
}

/* With the key npu_file, one process at a time has the NPU; whoever comes second is refused. */
static int take_npu(Handle *h)
{
    h->npu = -1;
    if (!*h->model.npu_file)
        return 0;
    h->npu = open(h->model.npu_file, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    return h->npu >= 0 && flock(h->npu, LOCK_EX | LOCK_NB) == 0 ? 0 : fail("the NPU is in use by another process");
}

static int initialize(LLMHandle *handle, RKLLMParam *param, LLMResultCallback callback, void *userdata)
{
    Handle *h = calloc(1, sizeof *h);
    if (!h || read_model(&h->model, param->model_path) || check_param(&h->model, param) || pin(&h->model, param) ||
        take_npu(h) || fault(&h->model, "init")) {
        if (h && h->npu > 0)
            close(h->npu);
        free(h);
        return -1;
    }
    if (h->model.noisy)
        say("I rkllm: rkllm-runtime version: %s, rknpu driver version: 0.9.8, platform: %s", RUNTIME_VERSION,
            h->model.platform);
#if GROUP >= 'C'
    if (h->model.noisy) /* what a test can see of the hardware options: they change no text */
        say("D rkllm: n_keep %d, embed_flash %d, base_domain_id %d, %d cpus, mask 0x%x", param->n_keep,
            param->extend_param.embed_flash, param->extend_param.base_domain_id,
            param->extend_param.enabled_cpus_num, param->extend_param.enabled_cpus_mask);
#endif
    wait_until(h, now_us() + h->model.load_ms * 1000LL);
    pthread_mutex_init(&h->lock, NULL);
    h->alive = true;
    h->param = *param; /* model_path is not used again */
    h->callback = callback;
    h->userdata = userdata;
    h->samples = (uint64_t)time(NULL) ^ (uint64_t)now_us();
    h->kv = calloc((size_t)param->max_context_len, sizeof *h->kv);
#if GROUP >= 'C'
    strcpy(h->prefix, "<|tpl|>"); /* the model's own template: only set_chat_template takes it away */
    strcpy(h->postfix, "<|end|>");
#endif
    pthread_mutex_lock(&handles_lock);
    h->next = handles;
    handles = h;
    pthread_mutex_unlock(&handles_lock);
    *handle = h;
    return 0;
}

#if GROUP >= 'E'
int rkllm_init(LLMHandle *handle, RKLLMParam *param, RKLLMCallback *callback)
{
    if (!handle || !param || !callback || !callback->result_callback)
        return fail("rkllm_init needs a handle, parameters and a callback");
    if (callback->tokenizer_callback || callback->embed_callback)
        return fail("tokenizer and embed callbacks are not supported");
    return initialize(handle, param, callback->result_callback, callback->result_userdata);
}
#else
int rkllm_init(LLMHandle *handle, RKLLMParam *param, LLMResultCallback callback)
{
    if (!handle || !param || !callback)
        return fail("rkllm_init needs a handle, parameters and a callback");
    return initialize(handle, param, callback, NULL);
}
#endif

int rkllm_destroy(LLMHandle handle)
{
    Handle *h = live(handle);
    if (!h)
        return -1;
    pthread_mutex_lock(&h->lock);
    if (h->running) {
        say("E rkllm: destroy during run");
        abort();
    }
    pthread_mutex_unlock(&h->lock);
    int status = fault(&h->model, "destroy");
    h->alive = false;
    if (h->npu > 0)
        close(h->npu);
    free(h->kv);
    for (struct Lora *lora = h->loras, *next; lora; lora = next) {
        next = lora->next;
        free(lora);
    }
    return status;
}

/* What a handle holds between runs. Each refuses while a task is running. */

int rkllm_load_prompt_cache(LLMHandle handle, const char *path)
{
    Handle *h = live(handle);
    int status = -1;
    if (!h || !begin(h))
        return -1;
    if (h->broken)
        raise(SIGSEGV);
    FILE *file = path ? fopen(path, "rb") : NULL;
    if (h->cache_loaded)
        fail("a prompt cache is loaded already, release it first");
    else if (!file)
        fail("failed to open prompt cache %s: %s", path ? path : "(null)", strerror(errno));
    else if (fault(&h->model, "load") == 0)
        status = read_cache(h, file);
    if (file)
        fclose(file);
    if (status == 0)
        h->cache_loaded = true;
    end(h);
    return status;
}

int rkllm_release_prompt_cache(LLMHandle handle)
{
    Handle *h = live(handle);
    int status = 0;
    if (!h || !begin(h))
        return -1;
    if (h->cache_loaded)
        h->n_kv = 0;
    else
        status = fail("no prompt cache is loaded");
    h->cache_loaded = false;
    end(h);
    return status;
}

int rkllm_load_lora(LLMHandle handle, RKLLMLoraAdapter *adapter)
{
    Handle *h = live(handle);
    if (!h || !adapter || !adapter->lora_adapter_path || !adapter->lora_adapter_name || !begin(h))
        return -1;
    FILE *file = fopen(adapter->lora_adapter_path, "rb");
    struct Lora *lora = file ? calloc(1, sizeof *lora) : NULL;
    if (lora) {
        lora->effect = mix((uint64_t)(int64_t)(adapter->scale * 65536));
        for (int byte; (byte = fgetc(file)) != EOF;)
            lora->effect = mix(lora->effect ^ (uint64_t)byte);
        snprintf(lora->name, sizeof lora->name, "%s", adapter->lora_adapter_name);
        lora->next = h->loras; /* a later adapter of the same name hides the earlier one */
        h->loras = lora;
    } else {
        fail("failed to open LoRA adapter %s", adapter->lora_adapter_path);
    }
    if (file)
        fclose(file);
    end(h);
    return lora ? 0 : -1;
}

#if GROUP >= 'C'
int rkllm_set_chat_template(LLMHandle handle, const char *system, const char *prefix, const char *postfix)
{
    Handle *h = live(handle);
    if (!h || !system || !prefix || !postfix || !begin(h))
        return -1;
    snprintf(h->prefix, sizeof h->prefix, "%s%s", system, prefix);
    snprintf(h->postfix, sizeof h->postfix, "%s", postfix);
    end(h);
    return 0;
}

/* There is no system prompt to keep: the stand-in forgets everything whatever keep_system_prompt says. */
static int forget(LLMHandle handle)
{
    Handle *h = live(handle);
    if (!h || !begin(h))
        return -1;
    h->n_kv = 0; /* that a cache is loaded remains true */
    end(h);
    return 0;
}
#endif

#if GROUP == 'C'
int rkllm_clear_kv_cache(LLMHandle handle, int keep_system_prompt)
{
    (void)keep_system_prompt;
    return forget(handle);
}
#endif

#if GROUP >= 'D'
int rkllm_clear_kv_cache(LLMHandle handle, int keep_system_prompt, int *start_pos, int *end_pos)
{
    (void)keep_system_prompt;
    if (start_pos && end_pos && *start_pos < *end_pos)
        return fail("ranges can be cleared only while a generation is paused");
    return forget(handle);
}

int rkllm_get_kv_cache_size(LLMHandle handle, int *cache_sizes)
{
    Handle *h = live(handle);
    if (!h || !cache_sizes)
        return -1;
    cache_sizes[0] = h->n_kv;
    return 0;
}

int rkllm_set_function_tools(LLMHandle handle, const char *system, const char *tools, const char *response_str)
{
    return live(handle) && system && tools && response_str ? 0 : -1;
}

int rkllm_set_cross_attn_params(LLMHandle handle, RKLLMCrossAttnParam *cross_attn)
{
    Handle *h = live(handle);
    return h && cross_attn && h->param.extend_param.use_cross_attn ? 0 : -1;
}
#endif
