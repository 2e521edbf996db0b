"""`Keye`: a loaded model that answers questions about media. The front that Python users and the command line share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch

from keye.chat import (
    ChatTemplate,
    CheckpointTemplate,
    Message,
    Region,
    Segment,
    ToolCall,
    load_template,
    merge_intervals,
    normalize_tools,
    parse_reply,
    template_of,
)
from keye.config import (
    PROCESSOR_FILE,
    GenerationConfig,
    KeyeConfig,
    load_generation_config,
    load_model_config,
    load_processor_config,
)
from keye.engine.generate import Decoding, generate
from keye.engine.media import as_medium
from keye.engine.prompt import Measured, Prompt, PromptBuilder, Room
from keye.engine.sampling import SamplingParams, StopText
from keye.errors import KeyeError
from keye.hub import check_runs, resolve
from keye.media.processor import Processor
from keye.models.attention import AttentionMode
from keye.models.keye import KeyeModel
from keye.models.weights import LoadReport, load_model, torch_dtype
from keye.tokenizer import StreamDecoder, Tokenizer, check_tokenizer


@dataclass(frozen=True)
class Usage:
    """Tokens of a request: `media_tokens` of the `prompt_tokens` are visual."""

    prompt_tokens: int
    media_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Answer:
    """A finished reply.

    `intervals` are the (start, end) seconds written in the answer, `regions` the points, boxes, outlines and clips that
    it marks, `tool_calls` the functions that the model wants called. `plan` says for each medium what was sampled and
    what it cost. `attention` is "sparse" or "dense"; dense above the model's top-k is another function than the model
    was trained for. `finish_reason` is "stop" or "length"; `seconds` is wall time by phase.
    """

    text: str
    reasoning: str | None
    intervals: tuple[tuple[float, float], ...]
    usage: Usage
    plan: tuple[Mapping[str, Any], ...]
    model: str
    attention: str
    finish_reason: str
    seconds: Mapping[str, float]
    regions: tuple[Region, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, every field."""
        return {
            **asdict(self),
            "intervals": [list(pair) for pair in self.intervals],
            "plan": list(self.plan),
            "regions": [region.to_dict() for region in self.regions],
            "tool_calls": [asdict(call) for call in self.tool_calls],
        }


class AnswerStream(Iterator[str]):
    """Iterates over the text as it is generated; `answer` is there once the iteration has ended."""

    def __init__(self, pieces: Iterator[str | Answer]) -> None:
        self._pieces = pieces
        self.answer: Answer | None = None

    def __next__(self) -> str:
        piece = next(self._pieces)
        if isinstance(piece, Answer):  # always the last
            self.answer = piece
            raise StopIteration
        return piece

    def finish(self) -> Answer:
        """Runs to the end and returns the answer."""
        for _ in self:
            pass
        assert self.answer is not None
        return self.answer


class Keye:
    """A model with its tokenizer and processor. Make one with `keye.load`.

    `notes` are sentences about what loading left out or took for granted; empty where all is as it should be.
    """

    def __init__(
        self,
        name: str,
        model: KeyeModel,
        tokenizer: Tokenizer,
        processor: Processor,
        generation: GenerationConfig | None = None,
        *,
        attention: AttentionMode = "sparse",
        template: ChatTemplate | CheckpointTemplate | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        check_attention(attention)
        self.notes = tuple(notes)
        self.name, self.model, self.tokenizer, self.processor = name, model, tokenizer, processor
        self.generation = generation or GenerationConfig()
        self.attention: AttentionMode = attention if model.config.text.sparse is not None else "dense"
        own = template_of(model.config.architecture, self.generation.default_system)
        self.template: ChatTemplate | CheckpointTemplate = own if template is None else template
        if isinstance(self.template, CheckpointTemplate):
            self.template = replace(self.template, thinking=own.thinking, default_system=self.generation.default_system)
        self._builder = PromptBuilder(self.config, tokenizer, processor)

    @property
    def config(self) -> KeyeConfig:
        return self.model.config

    @property
    def processor_config(self) -> Any:
        return self.processor.config

    def ask(self, media: object, question: str, **options: Any) -> Answer:
        """Answers a question about one medium or a list of them; see `stream_ask`."""
        return self.stream_ask(media, question, **options).finish()

    def stream_ask(
        self, media: object, question: str, *, media_options: Mapping[str, Any] | None = None, **options: Any
    ) -> AnswerStream:
        """`media`: a path, data URL, bytes, PIL image or `Frames`, or a list of these. `media_options` (fps,
        max_frames, max_pixels, video_start, ...) hold for each. `options` are those of `stream`."""
        if not isinstance(question, str) or not question.strip():
            raise KeyeError("the question is empty; ask something about the media")
        listed = media if isinstance(media, list | tuple) else [media]
        if not listed:
            raise KeyeError("no medium was given; pass a video or an image to ask about")
        parts = tuple(as_medium(item, media_options) for item in listed)
        return self.stream([Message("user", (*parts, question))], **options)

    def chat(self, messages: Sequence[Mapping[str, Any] | Message], **options: Any) -> Answer:
        """Continues a conversation in the OpenAI message format; see `stream` for options."""
        return self.stream(messages, **options).finish()

    def ground(self, video: object, event: str, **options: Any) -> Answer:
        """Asks when an event happens; `intervals` of the answer are sorted and do not overlap. See `stream_ground`."""
        return self.stream_ground(video, event, **options).finish()

    def stream_ground(
        self, video: object, event: str, *, media_options: Mapping[str, Any] | None = None, **options: Any
    ) -> AnswerStream:
        """`ground`, its text as it is generated. `video` is one video in any form that `stream_ask` takes."""
        question = self.ground_question(event)
        listed = video if isinstance(video, list | tuple) else [video]
        if len(listed) != 1:
            raise KeyeError(f"{len(listed)} media were given to ground; give one video")
        medium = as_medium(listed[0], media_options)
        if medium.kind != "video":
            raise KeyeError("an image was given to ground; give a video, or use ask for images")
        return AnswerStream(_with_merged_intervals(self.stream_ask(medium, question, **options)))

    def ground_question(self, event: str) -> str:
        """The question by which this model is asked when `event` happens."""
        subject = event.strip() if isinstance(event, str) else ""
        if not subject:
            raise KeyeError("the event is empty; say what to look for, e.g. 'the red circle'")
        if "{article}" in self.generation.ground_prompt and subject.lower().startswith(("the ", "a ", "an ")):
            subject = subject.split(" ", 1)[1]
        return self.generation.ground_prompt.format(event=subject, article="the")

    def render(
        self,
        messages: Sequence[Mapping[str, Any] | Message],
        *,
        thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> list[Segment]:
        """The prompt of a conversation under this model's template, its media in their places and not yet opened."""
        return self._builder.render(messages, template=self.template, thinking=thinking, tools=normalize_tools(tools))

    def measure(self, segments: Sequence[Segment]) -> Measured:
        """What a rendered prompt would cost: its media are probed and not decoded."""
        return self._builder.measure(segments)

    def stream(
        self,
        messages: Sequence[Mapping[str, Any] | Message],
        *,
        thinking: bool | None = None,
        attention: AttentionMode | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        **sampling: Any,
    ) -> AnswerStream:
        """Starts a reply. `thinking` asks for or against reasoning; `attention` "dense" runs the official fallback;
        `tools` are functions (name, description, JSON schema of the parameters) that the model may ask to be called;
        `sampling` are the fields of `SamplingParams`, the model's own defaults for those not given. Mistakes in
        messages and options are errors raised here, before any medium is opened and not at the first token."""
        params = self.sampling_params(**sampling)
        mode = self._attention_mode(attention)
        if not isinstance(thinking, bool | None):
            raise KeyeError(f"thinking is {thinking!r}; give true, false or nothing")
        segments = self.render(messages, thinking=thinking, tools=tools)
        return AnswerStream(self._reply(segments, params, mode))

    def sampling_params(self, **given: Any) -> SamplingParams:
        """The model's defaults with the given fields in their place; `None` means not given."""
        known = SamplingParams.fields()
        if unknown := sorted(set(given) - set(known)):
            raise KeyeError(f"unknown option {', '.join(unknown)}; known are {', '.join(known)}")
        defaults = self.generation.sampling_defaults()
        chosen = {**defaults, **{k: v for k, v in given.items() if v is not None}}
        if isinstance(chosen.get("stop"), str):
            chosen["stop"] = (chosen["stop"],)
        return SamplingParams(**chosen)

    def _attention_mode(self, attention: AttentionMode | None) -> AttentionMode:
        if attention is None:
            return self.attention
        check_attention(attention)
        if attention == "sparse" and self.config.text.sparse is None:
            raise KeyeError(f"{self.name} has no sparse-attention indexer; leave attention out or set it to dense")
        return attention

    def _reply(
        self, segments: Sequence[Segment], params: SamplingParams, mode: AttentionMode
    ) -> Iterator[str | Answer]:
        begin = time.perf_counter()
        room = Room(self.config.text.max_position_embeddings, params.max_tokens)
        prompt = self._builder.lay_out(segments, room=room)
        prepared = time.perf_counter()
        decoding = Decoding(self.model, mode=mode)
        decoding.prefill(prompt)
        prefilled = time.perf_counter()
        decoder, stop, shown, count = StreamDecoder(self.tokenizer), StopText(params.stop), "", 0
        for token in generate(decoding, params, self.generation.eos_token_ids or self.config.eos_token_ids):
            count += 1
            if piece := stop.push(decoder.push(token)):
                shown += piece
                yield piece
            if stop.stopped:
                break
        if not stop.stopped and (rest := stop.push(decoder.finish()) + stop.finish()):
            shown += rest
            yield rest
        done = time.perf_counter()
        seconds = {"media": prepared - begin, "prefill": prefilled - prepared, "decode": done - prefilled}
        finished = "length" if count >= params.max_tokens and not stop.stopped else "stop"
        yield self._answer(shown, prompt, count, mode, finished, seconds)

    def _answer(
        self, text: str, prompt: Prompt, count: int, mode: str, finished: str, seconds: Mapping[str, float]
    ) -> Answer:
        reply = parse_reply(text)
        plans = tuple(item.plan_dict() for item in prompt.media)
        return Answer(
            text=reply.text,
            reasoning=reply.reasoning,
            intervals=reply.intervals,
            usage=Usage(prompt.token_ids.shape[0], prompt.media_tokens, count),
            plan=plans,
            model=self.name,
            attention=mode,
            finish_reason=finished,
            seconds={name: round(value, 4) for name, value in seconds.items()},
            regions=reply.regions,
            tool_calls=reply.tool_calls,
        )


def _with_merged_intervals(stream: AnswerStream) -> Iterator[str | Answer]:
    yield from stream
    answer = stream.finish()
    yield replace(answer, intervals=tuple(merge_intervals(answer.intervals)))


def check_attention(attention: object) -> None:
    """`KeyeError` for anything but "sparse" and "dense"."""
    if attention not in get_args(AttentionMode):
        raise KeyeError(f"attention is {attention!r}; choose sparse or dense")


def check_device(device: str) -> None:
    """`KeyeError` for a device that a model cannot run on here."""
    try:
        kind = torch.empty(0, device=device).device.type
    except (RuntimeError, AssertionError, TypeError) as error:
        raise KeyeError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from None
    if kind == "meta":
        raise KeyeError("device 'meta' cannot be used here: it holds shapes without numbers; choose cpu or cuda")


def load(
    name_or_path: str | Path = "nano",
    *,
    device: str = "cpu",
    dtype: str | None = None,
    attention: AttentionMode = "sparse",
    template: str | Path = "keye",
    revision: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Keye:
    """Loads a model by name ("nano", a hub name) or from a folder.

    `revision` is a branch, tag or commit on the hub; `progress` is called with the bytes that are here and the bytes of
    all files while a model is fetched from there.

    `device` is a torch device name; `dtype` bfloat16, float16 or float32 (default: the
    checkpoint's own). `template` is "keye" for our own chat format of the model's generation, "checkpoint" for the
    template in the checkpoint's files, or a template file. Nothing in the checkpoint is executed; its template is
    rendered in a sandbox. `notes` of the result tell what the files hold that is not used, and what they lack.
    """
    check_attention(attention)
    check_device(device)
    name = str(name_or_path)
    check_runs(name)
    # The small files come first: what they refuse need not be downloaded.
    folder = resolve(name, revision=revision, weights=False, progress=progress)
    config = load_model_config(folder)
    chosen = None if template == "keye" else load_template(folder if template == "checkpoint" else template)
    tokenizer = Tokenizer.from_file(folder)
    check_tokenizer(tokenizer, config)
    processor, generation = Processor(load_processor_config(folder)), load_generation_config(folder)
    folder = resolve(name, revision=revision, progress=progress)
    model, report = load_model(folder, config, device=device, dtype=torch_dtype(dtype or config.dtype))
    return Keye(
        str(config.raw.get("keye_name") or Path(name).name),
        model,
        tokenizer,
        processor,
        generation,
        attention=attention,
        template=chosen,
        notes=tuple(load_notes(folder, config, report)),
    )


def load_notes(folder: Path, config: KeyeConfig, report: LoadReport) -> Iterator[str]:
    """What a user should know of how a checkpoint was loaded, a sentence each."""
    if config.unknown:
        yield f"config.json has keys without meaning to keye: {_listed(config.unknown)}"
    if not (folder / PROCESSOR_FILE).exists():
        yield f"{PROCESSOR_FILE} is missing: media are prepared by the official values of Keye-VL {config.generation}"
    if report.lacks_indexer:
        yield "the files hold no indexer weights: the model attends densely"
    if report.unused:
        yield f"the files hold tensors that this model has no place for: {_listed(report.unused)}"
    if report.ignored:
        yield f"the files hold tensors that no forward pass reads: {_listed(report.ignored)}"


def _listed(names: Sequence[str], most: int = 3) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
