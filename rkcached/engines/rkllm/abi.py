"""The binary interface of librkllmrt.so by version: structures and signatures.

The vendor changes structures between versions without a new library name, and a structure of
another version is a segmentation fault (rknn-llm #509, #522). So each layout has a record of its
own, named after the first version that has it, and nothing here is guessed. Sizes and offsets are
compared by tests with those that a C compiler gives for the vendor's headers. Nothing here loads a
library; `library` does, and `engine` is the only user of the structures.

    name      versions                group   what differs
    1.1.0     1.1.0 to 1.1.4          B       no keep_history, chat template call, result figures
    1.2.0     1.2.0                   C       clear_kv_cache takes two arguments
    1.2.1b1   1.2.1b1                 C       a larger Input
    1.2.1     1.2.1, 1.2.2, 1.2.3     D       Input begins with role; callback returns int; figures
    1.3.0     1.3.0                   E       init takes a structure of callbacks; sampling per run
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from ctypes import (
    POINTER,
    c_bool,
    c_char_p,
    c_float,
    c_int,
    c_int8,
    c_int32,
    c_size_t,
    c_uint8,
    c_uint32,
    c_void_p,
)
from dataclasses import dataclass
from enum import IntEnum
from typing import Any


class CallState(IntEnum):
    """The reason of a callback (enum LLMCallState)."""

    NORMAL = 0
    WAITING = 1
    """The token ends in the middle of a UTF-8 character."""
    FINISH = 2
    ERROR = 3
    GET_LAST_HIDDEN_LAYER = 4
    """1.1 only; later versions deliver hidden layers with NORMAL."""


class InputType(IntEnum):
    PROMPT = 0
    TOKEN = 1
    EMBED = 2
    MULTIMODAL = 3


class InferMode(IntEnum):
    GENERATE = 0
    GET_LAST_HIDDEN_LAYER = 1
    GET_LOGITS = 2


class Handle(ctypes.c_void_p):
    """LLMHandle. A type of its own, so that ctypes does not turn it into a number."""


# Structures that are the same in every version


class LoraAdapter(ctypes.Structure):
    _fields_ = (
        ("lora_adapter_path", c_char_p),
        ("lora_adapter_name", c_char_p),
        ("scale", c_float),
    )


class EmbedInput(ctypes.Structure):
    _fields_ = (("embed", POINTER(c_float)), ("n_tokens", c_size_t))


class TokenInput(ctypes.Structure):
    _fields_ = (("input_ids", POINTER(c_int32)), ("n_tokens", c_size_t))


class LoraParam(ctypes.Structure):
    _fields_ = (("lora_adapter_name", c_char_p),)


class PromptCacheParam(ctypes.Structure):
    _fields_ = (("save_prompt_cache", c_int), ("prompt_cache_path", c_char_p))


class ResultLastHiddenLayer(ctypes.Structure):
    """`hidden_states` has num_tokens x embd_size values; it is valid during the callback only."""

    _fields_ = (("hidden_states", POINTER(c_float)), ("embd_size", c_int), ("num_tokens", c_int))


class ResultLogits(ctypes.Structure):
    _fields_ = (("logits", POINTER(c_float)), ("vocab_size", c_int), ("num_tokens", c_int))


class PerfStat(ctypes.Structure):
    """Valid in FINISH only. Times in ms, memory in MB."""

    _fields_ = (
        ("prefill_time_ms", c_float),
        ("prefill_tokens", c_int),
        ("generate_time_ms", c_float),
        ("generate_tokens", c_int),
        ("memory_usage_mb", c_float),
    )


class CrossAttnParam(ctypes.Structure):
    _fields_ = (
        ("encoder_k_cache", POINTER(c_float)),
        ("encoder_v_cache", POINTER(c_float)),
        ("encoder_mask", POINTER(c_float)),
        ("encoder_pos", POINTER(c_int32)),
        ("num_tokens", c_int),
    )


class SamplingParam(ctypes.Structure):
    """1.3: sampling of one run."""

    _fields_ = (
        ("top_k", c_int32),
        ("top_p", c_float),
        ("temperature", c_float),
        ("repeat_penalty", c_float),
        ("frequency_penalty", c_float),
        ("presence_penalty", c_float),
        ("mirostat", c_int32),
        ("mirostat_tau", c_float),
        ("mirostat_eta", c_float),
    )


# Extended parameters


class ExtendParam110(ctypes.Structure):
    _fields_ = (("base_domain_id", c_int32), ("reserved", c_uint8 * 112))


class ExtendParam120(ctypes.Structure):
    _fields_ = (
        ("base_domain_id", c_int32),
        ("embed_flash", c_int8),
        ("enabled_cpus_num", c_int8),
        ("enabled_cpus_mask", c_uint32),
        ("reserved", c_uint8 * 106),
    )


class ExtendParam121(ctypes.Structure):
    _fields_ = (
        ("base_domain_id", c_int32),
        ("embed_flash", c_int8),
        ("enabled_cpus_num", c_int8),
        ("enabled_cpus_mask", c_uint32),
        ("n_batch", c_uint8),
        ("use_cross_attn", c_int8),
        ("reserved", c_uint8 * 104),
    )


# Parameters of a model


class Param110(ctypes.Structure):
    _fields_ = (
        ("model_path", c_char_p),
        ("max_context_len", c_int32),
        ("max_new_tokens", c_int32),
        ("top_k", c_int32),
        ("top_p", c_float),
        ("temperature", c_float),
        ("repeat_penalty", c_float),
        ("frequency_penalty", c_float),
        ("presence_penalty", c_float),
        ("mirostat", c_int32),
        ("mirostat_tau", c_float),
        ("mirostat_eta", c_float),
        ("skip_special_token", c_bool),
        ("is_async", c_bool),
        ("img_start", c_char_p),
        ("img_end", c_char_p),
        ("img_content", c_char_p),
        ("extend_param", ExtendParam110),
    )


_PARAM_120 = (
    ("model_path", c_char_p),
    ("max_context_len", c_int32),
    ("max_new_tokens", c_int32),
    ("top_k", c_int32),
    ("n_keep", c_int32),
    ("top_p", c_float),
    ("temperature", c_float),
    ("repeat_penalty", c_float),
    ("frequency_penalty", c_float),
    ("presence_penalty", c_float),
    ("mirostat", c_int32),
    ("mirostat_tau", c_float),
    ("mirostat_eta", c_float),
    ("skip_special_token", c_bool),
)
_IMAGE_MARKS = (("img_start", c_char_p), ("img_end", c_char_p), ("img_content", c_char_p))


class Param120(ctypes.Structure):
    _fields_ = (*_PARAM_120, ("is_async", c_bool), *_IMAGE_MARKS, ("extend_param", ExtendParam120))


class Param121(ctypes.Structure):
    _fields_ = (*_PARAM_120, ("is_async", c_bool), *_IMAGE_MARKS, ("extend_param", ExtendParam121))


class Param130(ctypes.Structure):
    _fields_ = (
        *_PARAM_120,
        ("ignore_eos_token", c_bool),
        ("is_async", c_bool),
        ("extend_param", ExtendParam121),
    )


# Inputs of a run


class MultiModal110(ctypes.Structure):
    _fields_ = (
        ("prompt", c_char_p),
        ("image_embed", POINTER(c_float)),
        ("n_image_tokens", c_size_t),
    )


class MultiModal1211(ctypes.Structure):
    _fields_ = (
        ("prompt", c_char_p),
        ("image_embed", POINTER(c_float)),
        ("n_image_tokens", c_size_t),
        ("n_image", c_size_t),
        ("image_width", c_size_t),
        ("image_height", c_size_t),
    )


class MultiModal130(ctypes.Structure):
    """Images and video are opaque here: only their place and size matter to us."""

    _fields_ = (("prompt", c_char_p), ("image", c_void_p * 8), ("video", c_void_p * 9))


class InputUnion110(ctypes.Union):
    _fields_ = (
        ("prompt_input", c_char_p),
        ("embed_input", EmbedInput),
        ("token_input", TokenInput),
        ("multimodal_input", MultiModal110),
    )


class InputUnion1211(ctypes.Union):
    _fields_ = (
        ("prompt_input", c_char_p),
        ("embed_input", EmbedInput),
        ("token_input", TokenInput),
        ("multimodal_input", MultiModal1211),
    )


class InputUnion130(ctypes.Union):
    _fields_ = (
        ("prompt_input", c_char_p),
        ("embed_input", EmbedInput),
        ("token_input", TokenInput),
        ("multimodal_input", MultiModal130),
    )


class Input110(ctypes.Structure):
    _anonymous_ = ("union",)
    _fields_ = (("input_type", c_int), ("union", InputUnion110))


class Input1211(ctypes.Structure):
    _anonymous_ = ("union",)
    _fields_ = (("input_type", c_int), ("union", InputUnion1211))


class Input121(ctypes.Structure):
    _anonymous_ = ("union",)
    _fields_ = (
        ("role", c_char_p),
        ("enable_thinking", c_bool),
        ("input_type", c_int),
        ("union", InputUnion1211),
    )


class Input130(ctypes.Structure):
    _anonymous_ = ("union",)
    _fields_ = (
        ("role", c_char_p),
        ("enable_thinking", c_bool),
        ("input_type", c_int),
        ("union", InputUnion130),
    )


# Parameters of a run


class InferParam110(ctypes.Structure):
    _fields_ = (
        ("mode", c_int),
        ("lora_params", POINTER(LoraParam)),
        ("prompt_cache_params", POINTER(PromptCacheParam)),
    )


class InferParam120(ctypes.Structure):
    _fields_ = (
        ("mode", c_int),
        ("lora_params", POINTER(LoraParam)),
        ("prompt_cache_params", POINTER(PromptCacheParam)),
        ("keep_history", c_int),
    )


class InferParam130(ctypes.Structure):
    _fields_ = (
        ("mode", c_int),
        ("lora_params", POINTER(LoraParam)),
        ("prompt_cache_params", POINTER(PromptCacheParam)),
        ("sampling_params", POINTER(SamplingParam)),
        ("keep_history", c_int),
        ("max_new_tokens", c_int32),
    )


# Results and callbacks


class Result110(ctypes.Structure):
    _fields_ = (
        ("text", c_char_p),
        ("token_id", c_int32),
        ("last_hidden_layer", ResultLastHiddenLayer),
    )


class Result120(ctypes.Structure):
    _fields_ = (
        ("text", c_char_p),
        ("token_id", c_int32),
        ("last_hidden_layer", ResultLastHiddenLayer),
        ("logits", ResultLogits),
    )


class Result121(ctypes.Structure):
    _fields_ = (
        ("text", c_char_p),
        ("token_id", c_int32),
        ("last_hidden_layer", ResultLastHiddenLayer),
        ("logits", ResultLogits),
        ("perf", PerfStat),
    )


# void (*LLMResultCallback)(RKLLMResult *result, void *userdata, LLMCallState state); until 1.2.1b1
Callback110 = ctypes.CFUNCTYPE(None, POINTER(Result110), c_void_p, c_int)
Callback120 = ctypes.CFUNCTYPE(None, POINTER(Result120), c_void_p, c_int)
# int (*LLMResultCallback)(RKLLMResult *result, void *userdata, LLMCallState state); 0 goes on, 1
# pauses
Callback121 = ctypes.CFUNCTYPE(c_int, POINTER(Result121), c_void_p, c_int)


class Callbacks130(ctypes.Structure):
    """RKLLMCallback. The tokenizer's and the embedding's callback are optional; ours are NULL."""

    _fields_ = (
        ("result_callback", Callback121),
        ("result_userdata", c_void_p),
        ("tokenizer_callback", c_void_p),
        ("tokenizer_userdata", c_void_p),
        ("embed_callback", c_void_p),
        ("embed_userdata", c_void_p),
    )


@dataclass(frozen=True, slots=True)
class Signature:
    result: Any
    """ctypes type, or None for void."""
    arguments: tuple[Any, ...]
    is_status: bool = True
    """Whether the result says if the function failed: 0 is success, anything else is not."""


Signatures = Mapping[str, Signature]


def _functions_110(param: Any, run_input: Any, infer: Any, callback: Any) -> dict[str, Signature]:
    """The functions that every version since 1.1.0 has."""
    return {
        # RKLLMParam rkllm_createDefaultParam();
        "rkllm_createDefaultParam": Signature(param, (), is_status=False),
        # int rkllm_init(LLMHandle *handle, RKLLMParam *param, LLMResultCallback callback);
        "rkllm_init": Signature(c_int, (POINTER(Handle), POINTER(param), callback)),
        # int rkllm_run(LLMHandle handle, RKLLMInput *input, RKLLMInferParam *infer_params, void
        # *userdata);
        "rkllm_run": Signature(c_int, (Handle, POINTER(run_input), POINTER(infer), c_void_p)),
        # int rkllm_run_async(LLMHandle handle, RKLLMInput *input, RKLLMInferParam *infer_params,
        # void *userdata);
        "rkllm_run_async": Signature(c_int, (Handle, POINTER(run_input), POINTER(infer), c_void_p)),
        # int rkllm_abort(LLMHandle handle);
        "rkllm_abort": Signature(c_int, (Handle,)),
        # int rkllm_is_running(LLMHandle handle);  0 while a run goes on
        "rkllm_is_running": Signature(c_int, (Handle,), is_status=False),
        # int rkllm_destroy(LLMHandle handle);
        "rkllm_destroy": Signature(c_int, (Handle,)),
        # int rkllm_load_lora(LLMHandle handle, RKLLMLoraAdapter *lora_adapter);
        "rkllm_load_lora": Signature(c_int, (Handle, POINTER(LoraAdapter))),
        # int rkllm_load_prompt_cache(LLMHandle handle, const char *prompt_cache_path);
        "rkllm_load_prompt_cache": Signature(c_int, (Handle, c_char_p)),
        # int rkllm_release_prompt_cache(LLMHandle handle);
        "rkllm_release_prompt_cache": Signature(c_int, (Handle,)),
    }


# int rkllm_set_chat_template(LLMHandle handle, const char *system_prompt, const char
# *prompt_prefix,
#                             const char *prompt_postfix);
_SET_CHAT_TEMPLATE = Signature(c_int, (Handle, c_char_p, c_char_p, c_char_p))

_SINCE_120: Signatures = {
    # int rkllm_clear_kv_cache(LLMHandle handle, int keep_system_prompt);
    "rkllm_clear_kv_cache": Signature(c_int, (Handle, c_int)),
    "rkllm_set_chat_template": _SET_CHAT_TEMPLATE,
}

_SINCE_121: Signatures = {
    # int rkllm_clear_kv_cache(LLMHandle handle, int keep_system_prompt, int *start_pos, int
    # *end_pos);
    "rkllm_clear_kv_cache": Signature(c_int, (Handle, c_int, POINTER(c_int), POINTER(c_int))),
    "rkllm_set_chat_template": _SET_CHAT_TEMPLATE,
    # int rkllm_get_kv_cache_size(LLMHandle handle, int *cache_sizes);
    "rkllm_get_kv_cache_size": Signature(c_int, (Handle, POINTER(c_int))),
    # int rkllm_set_function_tools(LLMHandle handle, const char *system_prompt, const char *tools,
    #                              const char *tool_response_str);
    "rkllm_set_function_tools": Signature(c_int, (Handle, c_char_p, c_char_p, c_char_p)),
    # int rkllm_set_cross_attn_params(LLMHandle handle, RKLLMCrossAttnParam *cross_attn_params);
    "rkllm_set_cross_attn_params": Signature(c_int, (Handle, POINTER(CrossAttnParam))),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Abi:
    """One layout of the interface."""

    name: str
    """The first version that has it."""
    group: str
    """B, C, D or E: versions that behave alike."""
    versions: tuple[str, ...]
    param: Any
    input: Any
    infer_param: Any
    result: Any
    callback: Any
    """Type of the result callback."""
    callbacks: Any = None
    """Structure that `rkllm_init` takes instead of the callback alone."""
    functions: Signatures
    probe_offset: int
    """Offsets of embed_flash and enabled_cpus_num in a default parameter; 0 where this version has
    neither."""

    @property
    def structures(self) -> dict[str, Any]:
        """The vendor's names of the structures that this version has."""
        by_name = {
            "RKLLMExtendParam": dict(self.param._fields_)["extend_param"],
            "RKLLMParam": self.param,
            "RKLLMLoraAdapter": LoraAdapter,
            "RKLLMEmbedInput": EmbedInput,
            "RKLLMTokenInput": TokenInput,
            self._multimodal_name: dict(dict(self.input._fields_)["union"]._fields_)[
                "multimodal_input"
            ],
            "RKLLMInput": self.input,
            "RKLLMLoraParam": LoraParam,
            "RKLLMPromptCacheParam": PromptCacheParam,
            "RKLLMInferParam": self.infer_param,
            "RKLLMResultLastHiddenLayer": ResultLastHiddenLayer,
            "RKLLMResult": self.result,
        }
        if self.group != "B":
            by_name["RKLLMResultLogits"] = ResultLogits
        if self.group in ("D", "E"):
            by_name |= {"RKLLMPerfStat": PerfStat, "RKLLMCrossAttnParam": CrossAttnParam}
        if self.group == "E":
            by_name |= {"RKLLMSamplingParam": SamplingParam, "RKLLMCallback": self.callbacks}
        return by_name

    @property
    def _multimodal_name(self) -> str:
        return "RKLLMMultiModalInput" if self.group in ("D", "E") else "RKLLMMultiModelInput"

    @property
    def measures(self) -> bool:
        """The result has figures: `perf.prefill_tokens` counts the tokens really prefilled."""
        return self.group in ("D", "E")

    @property
    def samples_per_run(self) -> bool:
        """Sampling parameters and max_new_tokens can be given to a run."""
        return self.group == "E"

    @property
    def keeps_state(self) -> bool:
        """A run without history reuses the last prefix, until clear_kv_cache (since 1.2.0)."""
        return self.group != "B"


ABIS: tuple[Abi, ...] = (
    Abi(
        name="1.1.0",
        group="B",
        versions=("1.1.0", "1.1.1", "1.1.2", "1.1.3", "1.1.4"),
        param=Param110,
        input=Input110,
        infer_param=InferParam110,
        result=Result110,
        callback=Callback110,
        functions=_functions_110(Param110, Input110, InferParam110, Callback110),
        probe_offset=0,
    ),
    Abi(
        name="1.2.0",
        group="C",
        versions=("1.2.0",),
        param=Param120,
        input=Input110,
        infer_param=InferParam120,
        result=Result120,
        callback=Callback120,
        functions={**_functions_110(Param120, Input110, InferParam120, Callback120), **_SINCE_120},
        probe_offset=92,
    ),
    Abi(
        name="1.2.1b1",
        group="C",
        versions=("1.2.1b1",),
        param=Param120,
        input=Input1211,
        infer_param=InferParam120,
        result=Result120,
        callback=Callback120,
        functions={**_functions_110(Param120, Input1211, InferParam120, Callback120), **_SINCE_120},
        probe_offset=92,
    ),
    Abi(
        name="1.2.1",
        group="D",
        versions=("1.2.1", "1.2.2", "1.2.3"),
        param=Param121,
        input=Input121,
        infer_param=InferParam120,
        result=Result121,
        callback=Callback121,
        functions={**_functions_110(Param121, Input121, InferParam120, Callback121), **_SINCE_121},
        probe_offset=92,
    ),
    Abi(
        name="1.3.0",
        group="E",
        versions=("1.3.0",),
        param=Param130,
        input=Input130,
        infer_param=InferParam130,
        result=Result121,
        callback=Callback121,
        callbacks=Callbacks130,
        # int rkllm_init(LLMHandle *handle, RKLLMParam *param, RKLLMCallback *callback);
        functions={
            **_functions_110(Param130, Input130, InferParam130, POINTER(Callbacks130)),
            **_SINCE_121,
        },
        probe_offset=64,
    ),
)
