/* The binary interface of librkllmrt.so as the stand-in speaks it: structs and functions, per ABI group.
 *
 * Compile with -DABI=110 (1.1.x), 120 (1.2.0), 1211 (1.2.1b1), 121 (1.2.1 to 1.2.3) or 130 (1.3.0).
 * Field names and order are the vendor's; layouts.h asserts every size and offset.
 */
#ifndef RKLLM_STANDIN_ABI_H
#define RKLLM_STANDIN_ABI_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#if ABI == 110
#define GROUP 'B'
#elif ABI == 120 || ABI == 1211
#define GROUP 'C'
#elif ABI == 121
#define GROUP 'D'
#elif ABI == 130
#define GROUP 'E'
#else
#error "compile with -DABI=110, 120, 1211, 121 or 130"
#endif

typedef void *LLMHandle;

typedef enum {
    RKLLM_RUN_NORMAL = 0,
    RKLLM_RUN_WAITING = 1, /* for the rest of a UTF-8 character */
    RKLLM_RUN_FINISH = 2,
    RKLLM_RUN_ERROR = 3,
#if GROUP == 'B'
    RKLLM_RUN_GET_LAST_HIDDEN_LAYER = 4, /* a state of its own up to 1.1.4, NORMAL afterwards */
#endif
} LLMCallState;

typedef enum {
    RKLLM_INPUT_PROMPT = 0,
    RKLLM_INPUT_TOKEN = 1,
    RKLLM_INPUT_EMBED = 2,
    RKLLM_INPUT_MULTIMODAL = 3,
} RKLLMInputType;

typedef enum {
    RKLLM_INFER_GENERATE = 0,
    RKLLM_INFER_GET_LAST_HIDDEN_LAYER = 1,
    RKLLM_INFER_GET_LOGITS = 2, /* not in B */
} RKLLMInferMode;

typedef struct {
    int32_t base_domain_id;
#if GROUP == 'B'
    uint8_t reserved[112];
#else
    int8_t embed_flash;
    int8_t enabled_cpus_num;
    uint32_t enabled_cpus_mask;
#if GROUP == 'C'
    uint8_t reserved[106];
#else
    uint8_t n_batch;
    int8_t use_cross_attn;
    uint8_t reserved[104];
#endif
#endif
} RKLLMExtendParam;

typedef struct {
    const char *model_path;
    int32_t max_context_len;
    int32_t max_new_tokens;
    int32_t top_k;
#if GROUP >= 'C'
    int32_t n_keep;
#endif
    float top_p;
    float temperature;
    float repeat_penalty;
    float frequency_penalty;
    float presence_penalty;
    int32_t mirostat;
    float mirostat_tau;
    float mirostat_eta;
    bool skip_special_token;
#if GROUP >= 'E'
    bool ignore_eos_token;
#endif
    bool is_async;
#if GROUP <= 'D'
    const char *img_start;
    const char *img_end;
    const char *img_content;
#endif
    RKLLMExtendParam extend_param;
} RKLLMParam;

typedef struct {
    const char *lora_adapter_path;
    const char *lora_adapter_name;
    float scale;
} RKLLMLoraAdapter;

typedef struct {
    float *embed;
    size_t n_tokens;
} RKLLMEmbedInput;

typedef struct {
    int32_t *input_ids;
    size_t n_tokens;
} RKLLMTokenInput;

/* "Model" up to 1.2.1b1, "Modal" afterwards. The stand-in takes no images: these only have the right size. */
typedef struct {
    char *prompt;
#if GROUP >= 'E'
    void *image[8];
    void *video[9];
#else
    float *image_embed;
    size_t n_image_tokens;
#if ABI == 1211 || GROUP >= 'D'
    size_t n_image;
    size_t image_width;
    size_t image_height;
#endif
#endif
#if GROUP >= 'D'
} RKLLMMultiModalInput;
#else
} RKLLMMultiModelInput;
#endif

typedef struct {
#if GROUP >= 'D'
    const char *role;
    bool enable_thinking;
#endif
    RKLLMInputType input_type;
    union {
        const char *prompt_input;
        RKLLMEmbedInput embed_input;
        RKLLMTokenInput token_input;
#if GROUP >= 'D'
        RKLLMMultiModalInput multimodal_input;
#else
        RKLLMMultiModelInput multimodal_input;
#endif
    };
} RKLLMInput;

typedef struct {
    const char *lora_adapter_name;
} RKLLMLoraParam;

typedef struct {
    int save_prompt_cache;
    const char *prompt_cache_path;
} RKLLMPromptCacheParam;

#if GROUP >= 'D'
typedef struct {
    float *encoder_k_cache;
    float *encoder_v_cache;
    float *encoder_mask;
    int32_t *encoder_pos;
    int num_tokens;
} RKLLMCrossAttnParam;
#endif

#if GROUP >= 'E'
typedef struct {
    int32_t top_k;
    float top_p;
    float temperature;
    float repeat_penalty;
    float frequency_penalty;
    float presence_penalty;
    int32_t mirostat;
    float mirostat_tau;
    float mirostat_eta;
} RKLLMSamplingParam;
#endif

typedef struct {
    RKLLMInferMode mode;
    RKLLMLoraParam *lora_params;
    RKLLMPromptCacheParam *prompt_cache_params;
#if GROUP >= 'E'
    RKLLMSamplingParam *sampling_params;
#endif
#if GROUP >= 'C'
    int keep_history;
#endif
#if GROUP >= 'E'
    int32_t max_new_tokens;
#endif
} RKLLMInferParam;

typedef struct {
    const float *hidden_states; /* num_tokens x embd_size */
    int embd_size;
    int num_tokens;
} RKLLMResultLastHiddenLayer;

#if GROUP >= 'C'
typedef struct {
    const float *logits; /* num_tokens x vocab_size */
    int vocab_size;
    int num_tokens;
} RKLLMResultLogits;
#endif

#if GROUP >= 'D'
typedef struct {
    float prefill_time_ms;
    int prefill_tokens;
    float generate_time_ms;
    int generate_tokens;
    float memory_usage_mb;
} RKLLMPerfStat;
#endif

typedef struct {
    const char *text;
    int32_t token_id;
    RKLLMResultLastHiddenLayer last_hidden_layer;
#if GROUP >= 'C'
    RKLLMResultLogits logits;
#endif
#if GROUP >= 'D'
    RKLLMPerfStat perf;
#endif
} RKLLMResult;

#if GROUP >= 'D'
typedef int (*LLMResultCallback)(RKLLMResult *result, void *userdata, LLMCallState state);
#else
typedef void (*LLMResultCallback)(RKLLMResult *result, void *userdata, LLMCallState state);
#endif

#if GROUP >= 'E'
typedef int (*LLMTokenizerCallback)(void *userdata, const char *text, int32_t len, int32_t *tokens, int32_t n_max);
typedef int (*LLMGetEmbedCallback)(void *userdata, int32_t *tokens, uint64_t n_tokens, void *embed, uint64_t len);

typedef struct {
    LLMResultCallback result_callback;
    void *result_userdata;
    LLMTokenizerCallback tokenizer_callback;
    void *tokenizer_userdata;
    LLMGetEmbedCallback embed_callback;
    void *embed_userdata;
} RKLLMCallback;

int rkllm_init(LLMHandle *handle, RKLLMParam *param, RKLLMCallback *callback);
#else
int rkllm_init(LLMHandle *handle, RKLLMParam *param, LLMResultCallback callback);
#endif

RKLLMParam rkllm_createDefaultParam(void);
int rkllm_run(LLMHandle handle, RKLLMInput *input, RKLLMInferParam *infer, void *userdata);
int rkllm_run_async(LLMHandle handle, RKLLMInput *input, RKLLMInferParam *infer, void *userdata);
int rkllm_abort(LLMHandle handle);
int rkllm_is_running(LLMHandle handle);
int rkllm_destroy(LLMHandle handle);
int rkllm_load_lora(LLMHandle handle, RKLLMLoraAdapter *adapter);
int rkllm_load_prompt_cache(LLMHandle handle, const char *path);
int rkllm_release_prompt_cache(LLMHandle handle);
#if GROUP >= 'C'
int rkllm_set_chat_template(LLMHandle handle, const char *system, const char *prefix, const char *postfix);
#endif
#if GROUP == 'C'
int rkllm_clear_kv_cache(LLMHandle handle, int keep_system_prompt);
#endif
#if GROUP >= 'D'
int rkllm_clear_kv_cache(LLMHandle handle, int keep_system_prompt, int *start_pos, int *end_pos);
int rkllm_get_kv_cache_size(LLMHandle handle, int *cache_sizes);
int rkllm_set_function_tools(LLMHandle handle, const char *system, const char *tools, const char *response_str);
int rkllm_set_cross_attn_params(LLMHandle handle, RKLLMCrossAttnParam *cross_attn);
#endif

#include "layouts.h"

#endif
