"""keye as a model of lmms-eval: `lmms_eval --model keye --model_args pretrained=nano,max_frames=64 --tasks mvbench`.

lmms-eval finds `manifest` by the entry point `lmms_eval.models` of this package, and imports the class with it. Media
go to keye as files, so that seconds and frames are those of the file and not of frames that were decoded before.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages

from keye.api import Keye, load
from keye.chat.messages import Message
from keye.config.media import IMAGE_OPTIONS, VIDEO_OPTIONS
from keye.engine.media import as_medium
from keye.errors import KeyeError
from keye.sessions.answer import Answer

log: Final = logging.getLogger("keye")
#: Arguments of `--model_args` that say how the model is loaded, under the names of `keye.load`.
_LOADING: Final = ("device", "dtype", "quant", "kv")
#: Options of sampling that mean the same here, and names of those that keye has under another.
_SAMPLING: Final = ("temperature", "top_p", "top_k", "repetition_penalty", "seed")
_TOKENS: Final = ("max_new_tokens", "max_tokens", "max_gen_toks")
_MOST_TOKENS: Final = 1024


def manifest() -> ModelManifest:
    """What the entry point gives to lmms-eval."""
    return ModelManifest(model_id="keye", chat_class_path=f"{__name__}.KeyeLmms", aliases=("keye_vl", "keye-vl"))


class KeyeLmms(lmms):
    """The model. `pretrained` (or `model`) is any name that keye loads, `batch_size` how many questions are answered at
    once; `attention`, `thinking` and options of media (fps, max_frames, max_pixels, ...) hold for all of them."""

    is_simple = False

    def __init__(
        self, pretrained: str = "nano", batch_size: int | str = 1, attention: str | None = None,
        thinking: bool | str | None = None, model: str | None = None, on_error: str = "raise", **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        media = {name: value for name, value in options.items() if name in VIDEO_OPTIONS | IMAGE_OPTIONS}
        loading = {name: options[name] for name in _LOADING if options.get(name) is not None}
        # What the command line of lmms-eval adds to the arguments of every model.
        known = {*media, *_LOADING, "max_batch_size", "device_map", "system_prompt"}
        if unknown := sorted(options.keys() - known):
            raise KeyeError(
                f"{unknown[0]} is not an argument of the model keye; give {', '.join(sorted(VIDEO_OPTIONS))}"
            )
        if on_error not in ("raise", "empty"):
            raise KeyeError(f"on_error is {on_error!r}; give raise or empty")
        self._on_error = on_error
        self._media, self._attention, self._thinking = media, attention, _as_bool(thinking)
        self._slots = max(1, int(batch_size)) if str(batch_size).isdigit() else 1
        self._keye: Keye = load(model or pretrained, **loading)

    def generate_until(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """The replies in the order of the requests. Where some cannot be answered, all others are answered first and
        go to the cache of lmms-eval (`--use_cache`); then `KeyeError` says how many failed, since an empty reply would
        be scored as if the model had said nothing. `on_error=empty` makes them empty replies all the same."""
        with ThreadPoolExecutor(self._slots) as pool:
            results = list(pool.map(self._try, requests))
        failed = [error for _, error in results if error is not None]
        if failed:
            sentence = f"{len(failed):,} of {len(results):,} requests failed, the first: {failed[0]}"
            if self._on_error == "raise":
                raise KeyeError(f"{sentence}; go on with --use_cache, or count them as empty with on_error=empty")
            log.warning("%s", sentence)
        return [result for result, _ in results]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError("keye answers tasks of a single round; choose another output_type")

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError("keye answers tasks that generate; choose one with output_type generate_until")

    def _try(self, request: Any) -> tuple[GenerationResult, KeyeError | None]:
        try:
            result = self._answer(request)
        except KeyeError as error:
            return GenerationResult(""), error
        self.cache_hook.add_partial("generate_until", request.args, result.text)
        return result, None

    def _answer(self, request: Any) -> GenerationResult:
        _, make_messages, task_sampling, doc_id, task, split = request.args
        messages = list(read_messages(make_messages(self.task_dict[task][split][doc_id]), self._media))
        answer = self._keye.chat(
            messages, attention=self._attention, thinking=self._thinking, **sampling_of(task_sampling)
        )
        return GenerationResult(cut_reply(_raw_text(answer), task_sampling.get("until")), _counts(answer))


def read_messages(messages: Any, options: Mapping[str, Any]) -> Iterable[Message]:
    """Messages of lmms-eval as keye's, media under those of `options` that suit their kind."""
    for message in ChatMessages(messages=messages).messages:
        yield Message(message.role, tuple(_parts(message.content, options)))


def _parts(content: Iterable[Any], options: Mapping[str, Any]) -> Iterable[Any]:
    for part in content:
        if part.type == "text":
            yield part.text
        elif part.type in ("image", "video"):
            known = VIDEO_OPTIONS if part.type == "video" else IMAGE_OPTIONS
            own = {name: value for name, value in options.items() if name in known}
            for name, value in (("video_start", getattr(part, "start_time", None)),
                                ("video_end", getattr(part, "end_time", None))):  # fmt: skip
                if value is not None:
                    own[name] = value
            yield as_medium(part.url, own)
        else:
            raise KeyeError(f"the task has a part of type {part.type}, which keye does not take: it sees and reads")


def sampling_of(task_sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Options of sampling under keye's names; greedy unless the task samples."""
    longest = next((task_sampling[name] for name in _TOKENS if task_sampling.get(name)), _MOST_TOKENS)
    values = {name: task_sampling[name] for name in _SAMPLING if task_sampling.get(name) is not None}
    if not task_sampling.get("do_sample", bool(values.get("temperature"))):
        values = {"temperature": 0.0}
    return {**values, "max_tokens": int(longest)}


def cut_reply(text: str, until: str | Sequence[str] | None) -> str:
    """A reply up to the first of the stop texts of a task; lmms-eval's own separators of documents are not stops."""
    stops: list[str] = [until] if isinstance(until, str) else list(until or ())
    for stop in stops:
        if stop.strip():
            text = text.split(stop, 1)[0]
    return text


def _raw_text(answer: Answer) -> str:
    """The reply as a model writes it: reasoning in tags before it, which the command line of lmms-eval removes."""
    return f"<think>\n{answer.reasoning}\n</think>\n\n{answer.text}" if answer.reasoning else answer.text


def _counts(answer: Answer) -> TokenCounts:
    return TokenCounts(input_tokens=answer.usage.prompt_tokens, output_tokens=answer.usage.completion_tokens)


def _as_bool(value: bool | str | None) -> bool | None:
    if value is None or isinstance(value, bool):
        return value
    return {"true": True, "1": True, "yes": True}.get(value.strip().lower(), False)
