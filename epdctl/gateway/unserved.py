"""Fields of OpenAI's API, and of vLLM's and SGLang's extensions of it, that are not served: which of them are refused
by name, and which are taken because they change no answer. Pure."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = [
    "REFUSED",
    "REFUSED_OF_ASSISTANT",
    "REFUSED_OF_CHAT",
    "REFUSED_OF_IMAGE",
    "REFUSED_OF_MESSAGE",
    "REFUSED_OF_URL",
    "TAKEN",
    "TAKEN_OF_PART",
    "Refused",
]

Refused = Mapping[str, tuple[object, ...]]  # field → the values that ask for nothing; anything else would change more

REFUSED: Refused = {
    # OpenAI's
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "modalities": (None, [], ["text"]),
    "moderation": (None,),
    "prediction": (None,),
    "reasoning_effort": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "verbosity": (None,),
    "web_search_options": (None,),
    # vLLM's
    "add_generation_prompt": (None, True),
    "allowed_token_ids": (None, []),
    "bad_words": (None, []),
    "cache_salt": (None,),
    "chat_template": (None,),
    "chat_template_kwargs": (None, {}),
    "continue_final_message": (None, False),
    "documents": (None, []),
    "ec_transfer_params": (None,),
    "guided_choice": (None, []),
    "guided_decoding_backend": (None,),
    "guided_grammar": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_whitespace_pattern": (None,),
    "include_reasoning": (None, True, False),  # of an answer that is one text
    "include_stop_str_in_output": (None, False),
    "kv_transfer_params": (None,),
    "length_penalty": (None, 1),
    "logits_processors": (None, []),
    "logprob_token_ids": (None, []),
    "media_io_kwargs": (None, {}),
    "mm_processor_kwargs": (None, {}),
    "priority": (None, 0),
    "prompt_embeds": (None,),
    "prompt_logprobs": (None,),
    "repetition_detection": (None,),
    "return_assistant_tokens_mask": (None, False),
    "return_prompt_text": (None, False),
    "return_token_offsets": (None, False),
    "return_tokens_as_token_ids": (None, False),
    "skip_special_tokens": (None, True),
    "spaces_between_special_tokens": (None, True),
    "structured_outputs": (None,),
    "thinking_token_budget": (None,),
    "truncate_prompt_tokens": (None,),
    "truncation_side": (None, "left", "right"),  # of what is not truncated
    "use_beam_search": (None, False),
    "vllm_xargs": (None, {}),
    # SGLang's
    "bootstrap_host": (None,),
    "bootstrap_port": (None,),
    "bootstrap_room": (None,),
    "custom_logit_processor": (None,),
    "custom_params": (None, {}),
    "data_parallel_rank": (None,),
    "disagg_prefill_dp_rank": (None,),
    "ebnf": (None,),
    "images_config": (None, {}),
    "input_ids": (None,),
    "json_schema": (None,),
    "lora_path": (None,),
    "max_dynamic_patch": (None,),
    "min_dynamic_patch": (None,),
    "min_new_tokens": (None, 0),
    "ngram_corpus_id": (None,),
    "no_stop_trim": (None, False),
    "reasoning": (None,),
    "regex": (None,),
    "return_cached_tokens_details": (None, False),
    "return_hidden_states": (None, False),
    "return_meta_info": (None, False),
    "return_prompt_token_ids": (None, False),
    "return_routed_experts": (None, False),
    "routed_dp_rank": (None,),
    "routed_experts_start_len": (None, 0),
    "separate_reasoning": (None, True, False),  # of an answer that is one text
    "session_params": (None,),
    "stop_regex": (None, []),
    "stream_reasoning": (None, True, False),
    "structural_tag": (None,),
    "task": (None,),
    "use_audio_in_video": (None, False),
}
REFUSED_OF_CHAT: Refused = {**REFUSED, "add_special_tokens": (None, False)}  # the template writes them

# They name the client or the request, or steer a service around the model.
TAKEN = frozenset(
    {
        "custom_labels",
        "extra_key",
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "request_id",
        "rid",
        "safety_identifier",
        "session_id",
        "user",
    }
)

REFUSED_OF_MESSAGE: Refused = {"reasoning": (None, ""), "reasoning_content": (None, ""), "tools": (None, [])}
REFUSED_OF_ASSISTANT: Refused = {
    **REFUSED_OF_MESSAGE,
    "audio": (None,),
    "function_call": (None,),
    "refusal": (None,),
    "tool_calls": (None, []),
}
REFUSED_OF_IMAGE: Refused = {"modalities": (None, "image")}
REFUSED_OF_URL: Refused = {"max_dynamic_patch": (None,), "min_dynamic_patch": (None,)}
TAKEN_OF_PART = frozenset({"content_hash", "prompt_cache_breakpoint", "uuid"})  # what a cache may call it
