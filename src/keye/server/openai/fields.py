"""Fields of a request that a server must expect from programs: those without an effect here, names that other servers
use, and unknown names. What is left out is said in a note; what is probably a typing error is an error."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any, Final

from keye.errors import closest
from keye.server.edge.errors import ApiError
from keye.server.errors import add_note, count_unknown

#: Fields that other servers and clients know and that change nothing here.
_HARMLESS: Final = frozenset(
    "user metadata service_tier safety_identifier prompt_cache_key prompt_cache_retention prompt_cache_options "
    "verbosity client_metadata include request_id rid priority cache_salt extra_key session_id session_params "
    "prediction moderation store truncation best_of stream_reasoning return_cached_tokens_details return_hidden_states "
    "return_routed_experts guided_decoding_backend guided_whitespace_pattern lora_path data_parallel_rank "
    "routed_dp_rank disaggregated_params kv_transfer_params vllm_xargs custom_params custom_logit_processor "
    "bootstrap_host bootstrap_port bootstrap_room add_special_tokens spaces_between_special_tokens top_n_tokens "
    "length_penalty early_stopping use_audio_in_video max_dynamic_patch min_dynamic_patch max_tool_calls "
    "prompt_embeds_format logprob_start_len return_tokens inference_geo context_management container betas speed "
    "cache_control effort task_budget display log_metrics no_logs token_ids_logprob return_bytes http_worker_ipc "
    "custom_labels return_token_strs models route provider transforms plugins usage top_a tfs "
    "safe_prompt cache_prompt id_slot samplers keep_alive watermark".split()
)
#: Fields that would change the answer in a way that keye does not know, the values under which they do not, and why.
_UNMET: Final[Mapping[str, tuple[tuple[Any, ...], str]]] = {
    "audio": ((None,), "keye writes text only"),
    "modalities": ((None, ["text"]), "keye writes text only"),
    "functions": ((None, []), "it is out of date; use tools"),
    "function_call": ((None, "none", "auto"), "it is out of date; use tool_choice"),
    "web_search_options": ((None,), "keye does not search the web"),
    "suffix": ((None, ""), "a text is continued at its end only"),
    "background": ((None, False), "requests run while the client waits"),
    "conversation": ((None,), "conversations are not stored; send the whole conversation as input"),
    "prompt": ((None,), "stored prompts are not supported"),
    "use_beam_search": ((None, False), "replies are drawn one token at a time; leave it out"),
    "stop_regex": ((None, "", []), "it is not supported; use stop, or regex for the form of the whole reply"),
    "chat_template": ((None,), "the model's own template is used; choose another when the server is started"),
    "documents": ((None, []), "it is not supported; write them into a message"),
    "prompt_embeds": ((None,), "it is not supported"),
    "input_ids": ((None,), "it is not supported here; send token ids as prompt to /v1/completions"),
    "audio_data": ((None, []), "keye reads pictures and videos only"),
    "input_embeds": ((None, []), "it is not supported; send text or input_ids"),
    "truncate_prompt_tokens": ((None,), "it cuts prompts of /v1/completions only"),
}
#: Names under which other interfaces know a field.
_OTHER_NAMES: Final[Mapping[str, tuple[str, ...]]] = {
    "max_new_tokens": ("max_tokens", "max_output_tokens"),
    "max_output_tokens": ("max_tokens",),
    "max_tokens": ("max_output_tokens",),
    "max_completion_tokens": ("max_tokens", "max_output_tokens"),
    "content": ("prompt",),
    "stop_sequences": ("stop",),
    "stop_strings": ("stop",),
    "min_new_tokens": ("min_tokens",),
    "random_seed": ("seed",),
    "sampling_seed": ("seed",),
    "num_return_sequences": ("n",),
    "repeat_penalty": ("repetition_penalty",),
    "n_predict": ("max_tokens", "max_output_tokens"),
    "thinking_budget": ("thinking_token_budget",),
    "reasoning_budget": ("thinking_token_budget",),
}
#: Names of a request that a note lists, and characters of each.
_LISTED, _NAME_CHARACTERS = 16, 60
#: Different unknown names of a request.
_MOST_UNKNOWN: Final = 64


def read_fields(data: Mapping[Any, Any], known: Collection[str], *, where: str = "") -> dict[str, Any]:
    """The fields of `data` that are `known`; `where` stands before names in sentences, such as `stream_options.`.
    `ApiError` for a field that cannot be met, and for one that is nearly the name of another."""
    fields: dict[str, Any] = {}
    ignored: list[str] = []
    for name, value in data.items():
        if not isinstance(name, str) or name in known:
            if value is not None or name not in fields:
                fields[name] = value
            continue
        others = _OTHER_NAMES.get(name, ()) if not where and value is not None else ()
        if (other := next((other for other in others if other in known and data.get(other) is None), None)) is not None:
            fields[other] = value
            add_note(f"{where}{name} is called {other} here, and was read as that")
        elif not where and name in _UNMET:
            allowed, reason = _UNMET[name]
            if value not in allowed:
                raise ApiError(400, f"{where}{name} cannot be used: {reason}", param=f"{where}{name}")
        elif value is not None:
            if name not in _HARMLESS and name not in _OTHER_NAMES:
                # Comparing names takes time, so a request has few different unknown ones.
                if count_unknown(name) > _MOST_UNKNOWN:
                    sentence = f"more than {_MOST_UNKNOWN} names of fields are unknown; leave them out"
                    raise ApiError(400, sentence, code="unknown_field")
                if (meant := _closest(name, frozenset(known))) is not None:
                    raise unknown_field(f"{where}{name}", f"{where}{meant}")
            ignored.append(name)
    if ignored:
        note_ignored([f"{where}{name}" for name in ignored])
    return fields


_closest: Final = lru_cache(4096)(closest)


def unknown_field(name: str, meant: str) -> ApiError:
    """The answer to a field whose name is probably a typing error."""
    text = name[: 2 * _NAME_CHARACTERS]
    return ApiError(400, f"{text} is not a field; {meant} is probably meant", param=text, code="unknown_field")


def note_ignored(names: Collection[str]) -> None:
    """A note of fields that were left out."""
    unique_names = sorted({re.sub(r"\[\d+\]", "[]", name) for name in names})
    text = ", ".join(name[:_NAME_CHARACTERS] for name in unique_names[:_LISTED])
    more = f" and {len(unique_names) - _LISTED:,} more" if len(unique_names) > _LISTED else ""
    add_note(f"without effect here, and ignored: {text}{more}")
