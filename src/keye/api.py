"""`Keye`: a loaded model that answers questions about media. The front that Python users and the command line share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Never

from PIL import Image

from keye.cache.slabs import KVFormat, KVOptions, Tier, free_memory
from keye.chat.messages import Medium, Message, normalize_tools
from keye.chat.template import Segment, may_bring_template, opens_reasoning, template_of
from keye.chat.times import merge_intervals
from keye.chat.tokenizer import Tokenizer, check_tokenizer
from keye.config import (
    PROCESSOR_FILE,
    KeyeConfig,
    find_frame_text,
    has_keye_fields,
    load_generation_config,
    load_model_config,
    load_processor_config,
)  # fmt: skip
from keye.config.environment import cache_folder
from keye.engine.adapters import check_name
from keye.engine.engine import Engine
from keye.engine.media import as_medium
from keye.engine.prompt import PromptCost
from keye.engine.request import GenerationRequest, Progress, check_attention
from keye.engine.runtime import Runtime
from keye.errors import KeyeError, closest, collect_warnings
from keye.hub import resolve
from keye.media.processor import Decoder, Processor
from keye.models.adapter_files import CONFIG_FILE as ADAPTER_CONFIG
from keye.models.adapter_files import LoraConfig
from keye.models.attention import AttentionMode
from keye.models.keye import KeyeModel
from keye.models.load import LoadReport, load_model, torch_dtype
from keye.models.quant_fill import quantized_weights
from keye.ops.quantized import QuantKind
from keye.process import check_device
from keye.releases import Release
from keye.sessions.answer import Answer, AnswerStream, Collector, stream_answer
from keye.sessions.scope import question_notes, warn_scope
from keye.sessions.search.questions import ground_question
from keye.units import listed, parse_bytes

#: Most pixels of the picture that a scene is titled by, and most tokens of the title.
TITLE_PIXELS, TITLE_TOKENS = 1 << 19, 48

if TYPE_CHECKING:
    from keye.chat.foreign_template import CheckpointTemplate
    from keye.engine.media import VideoIndex
    from keye.media.scenes import Scenes
    from keye.media.source.fetch import Source
    from keye.moments import FindResult
    from keye.sessions.live import Keep, LiveSession
    from keye.sessions.search.find import FindStream
    from keye.sessions.video_index import IndexInfo

# Sessions, indexes and foreign templates are imported where they are used: a question needs none of them.


class Keye:
    """A model with its tokenizer and processor, which answers. Create one with `keye.load`.

    `name`, `model`, `config`, `tokenizer` and `processor` are what was loaded, and `notes` sentences about what loading
    left out or took for granted; empty where all is as it should be. `engine` computes all requests of this model, also
    by token ids; `core` is its loop.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime, self.name, self.notes = runtime, runtime.name, runtime.notes
        self.model, self.config, self.tokenizer = runtime.model, runtime.config, runtime.tokenizer
        self.processor = runtime.processor
        self.engine = Engine(runtime)
        self.core = self.engine.core

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

    def index(
        self, video: object, path: str | Path, *, media_options: Mapping[str, Any] | None = None,
        attention: AttentionMode | None = None, adapter: str | None = None, overwrite: bool = False,
        seconds: float | None = None, on_progress: Callable[[Progress], None] | None = None,
        check: Callable[[], None] | None = None,
    ) -> IndexInfo:  # fmt: skip
        """Reads one video and writes what the model has stored of it to a file. `ask`, `ground` and `chat` take that in
        place of the video, in any process that loads the same model, and neither decode nor compute the video again.
        Options as in `stream_ask`; the file keeps them, and the formats that the model was loaded with. Questions about
        what an `adapter` has computed have to name it again. It is
        computed as a request beside others, and may take `seconds` at most; `on_progress` is called as the video is
        computed, `check` again and again while this waits, and both may raise to end the work. An index at `path` is
        replaced, another file only with `overwrite`."""
        medium = as_medium(video, media_options)
        if medium.kind != "video":
            raise KeyeError("an image was given to index; give a video")
        mode = self.runtime.resolve_attention(attention)
        from keye.cache.index_file import check_index_output
        from keye.sessions.video_index import write_video_index

        check_index_output(Path(path), overwrite=overwrite)
        return write_video_index(
            self.engine, medium, Path(path), mode, adapter=self.runtime.resolve_adapter(adapter), seconds=seconds,
            on_progress=on_progress, check=check,
        )  # fmt: skip

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
        return AnswerStream(_with_merged_intervals(self.stream_ask(medium, question, is_grounding=True, **options)))

    def ground_question(self, event: str) -> str:
        """The question by which this model is asked when `event` happens."""
        return ground_question(self.runtime.generation_config, event)

    def find(self, video: object, event: str, **options: Any) -> FindResult:
        """Finds the moments of an event in a video of any length; see `stream_find`."""
        return self.stream_find(video, event, **options).finish()

    def stream_find(
        self, video: object, event: str, *, media_options: Mapping[str, Any] | None = None,
        check: Callable[[], None] | None = None, name: str | None = None, **options: Any,
    ) -> FindStream:  # fmt: skip
        """`find`, what it finds as it is found: an iterator of `FindProgress`, `MomentsFound` and last a `FindResult`.
        `stop()` of it ends the search early, with the best so far. Mistakes in options are errors raised here.

        `video` is a path, an address or a `Source`, or a search index of one. It is read once into a search index, kept
        in the file `index` or else in the user's cache, and questions after the first go on from there. Options, all
        with a default: `budget` tokens may be spent on the question (by default an eighth of those of the index); `top`
        moments are returned; `threshold` is the probability from which on a moment counts as found; `effort` is
        "auto", "low", "medium" or "high"; `seconds` is the longest that the search may take and `most_tokens` the
        most that it may spend on the question, whatever the budget; without `scenes` borders are not put on hard cuts,
        which are looked for in every frame of the video; `subtitles` names a file or a track, or are lines, "none"
        leaves out what players show; `scorers` rank frames besides the model
        (`keye.sessions.search.coarse.FrameScorer`); `overwrite` replaces an index of another video or model.
        `media_options` as in `stream_ask`; `check` is called again and again and may raise; `name` is what moments call
        the video."""
        from keye.media.source.fetch import as_source, fetch_source
        from keye.sessions.search.find import FindStream, open_find
        from keye.sessions.search.options import FindOptions

        known = FindOptions.__dataclass_fields__
        for option in options:
            if option not in known:
                near = closest(option, known)
                raise KeyeError(f"find has no option {option}" + (f"; did you mean {near}?" if near else ""))
        if options.get("index") is not None:
            options["index"] = Path(options["index"])
        medium = as_medium(video if isinstance(video, Medium) else as_source(video), media_options)
        if medium.kind != "video":
            raise KeyeError("an image was given to find; give a video, or use ask for images")
        source = fetch_source(medium.source)  # type: ignore[arg-type]  # a video that is a file
        return FindStream(open_find(self.engine, source, event, FindOptions(**options), medium.options, check, name))

    def title_scenes(
        self, video: object, scenes: Scenes, *, track: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[str]:  # fmt: skip
        """A title for each shot of a video that `keye.find_scenes` has found, asked about the picture in its middle.
        `on_progress` is called with (titles, shots)."""
        from keye.media.scenes import middle_frames
        from keye.media.source.fetch import as_source

        titles = list[str]()
        for picture in middle_frames(as_source(video), scenes, most_pixels=TITLE_PIXELS, track=track):
            image = Image.fromarray(picture)
            titles.append(self.ask(image, self.runtime.generation_config.title_prompt, max_tokens=TITLE_TOKENS).text)
            if on_progress is not None:
                on_progress(len(titles), len(scenes.shots))
        return titles

    def render(
        self, messages: Sequence[Mapping[str, Any] | Message], *, thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] = (), add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> list[Segment]:  # fmt: skip
        """The prompt of a conversation under this model's template, its media in their places and not yet opened. With
        `continue_final_message` the last message, the assistant's, is left open for the model to go on with."""
        return self.runtime.prompts.render(
            messages, template=self.runtime.template, thinking=thinking, tools=normalize_tools(tools),
            add_generation_prompt=add_generation_prompt, continue_final_message=continue_final_message,
        )  # fmt: skip

    def measure(self, segments: Sequence[Segment], salt: bytes = b"") -> PromptCost:
        """What a rendered prompt would cost: its media are probed and not decoded."""
        return self.runtime.prompts.measure(segments, salt)

    def stream(
        self, messages: Sequence[Mapping[str, Any] | Message], *,
        on_progress: Callable[[Progress], None] | None = None, is_grounding: bool = False, **options: Any,
    ) -> AnswerStream:  # fmt: skip
        """Starts a reply. Mistakes in messages and options are errors raised here, before any medium is opened and not
        at the first token. Options, all with a default:

        `thinking` asks for or against reasoning; `attention` "dense" runs the official fallback; `tools` are functions
        (name, description, JSON schema of the parameters) that the model may ask to be called; `n` replies are written,
        the others in `Answer.alternatives`; `logprobs` gives each token's probability beside those of so many others,
        `prompt_logprobs` those of the prompt (a number of others, or true for as many as `logprobs`);
        `continue_final_message` goes on with the last message, the assistant's; `ignore_eos` goes on to `max_tokens`;
        `stop_loops` False lets a reply that repeats itself without end go on; `evidence` asks which frames the answer
        rests on; `deterministic` makes the tokens independent of whatever else is computed, at a cost; `adapter`
        is the name of one that was loaded (`load_adapter`), without it the model's default answers; one that
        `is_grounding` asks for a list of times, and a note says where none came; `on_progress` is
        called as the media are encoded and the prompt is computed. All others are fields of `SamplingParams`, the
        model's own defaults for those not given."""
        request = self.request(messages, **options)
        return stream_answer(self.engine, request, on_progress, is_grounding=is_grounding)

    def request(
        self, messages: Sequence[Mapping[str, Any] | Message], *, thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] = (), attention: AttentionMode | None = None, n: int = 1,
        logprobs: int | None = None, prompt_logprobs: bool | int | None = None, continue_final_message: bool = False,
        ignore_eos: bool = False, evidence: bool = False, deterministic: bool = False, stop_loops: bool = True,
        adapter: str | None = None, **sampling: Any,
    ) -> GenerationRequest:  # fmt: skip
        """What `stream` asks of the engine; its options are explained there."""
        params = self.runtime.sampling_params(**sampling)
        if not isinstance(thinking, bool | None):
            raise KeyeError(f"thinking is {thinking!r}; give true, false or nothing")
        if isinstance(prompt_logprobs, bool):
            prompt_logprobs = (logprobs or 0) if prompt_logprobs else None
        with collect_warnings() as notes:
            segments = self.render(
                messages, thinking=thinking, tools=tools, continue_final_message=continue_final_message
            )
            warn_scope(question_notes(self.runtime.generation_config.scope, segments))
        return GenerationRequest(
            segments, params, self.runtime.resolve_attention(attention), n=n, logprobs=logprobs,
            prompt_logprobs=prompt_logprobs, ignore_eos=ignore_eos, evidence=evidence, deterministic=deterministic,
            stop_loops=stop_loops, notes=tuple(notes), reasoning=opens_reasoning(segments),
            adapter=self.runtime.resolve_adapter(adapter),
        )  # fmt: skip

    def batch(self, conversations: Sequence[Sequence[Mapping[str, Any] | Message]], **options: Any) -> list[Answer]:
        """Continues many conversations at once, which costs far less than one after another; see `stream` for options.
        Answers are in the order of the conversations. The first mistake in any of them is raised, and ends all."""
        requests = [self.request(messages, **options) for messages in conversations]
        scope = self.runtime.generation_config.scope
        collectors = [Collector(request, self.name, scope=scope) for request in requests]
        for number, event in self.engine.run(requests):
            collectors[number].take(event)
        return [collector.answer for collector in collectors if collector.answer is not None]

    def load_adapter(self, path: str | Path, name: str) -> None:
        """Loads a LoRA adapter from a folder that PEFT wrote; requests choose it by `name`. `KeyeError` in one sentence
        for one that cannot be read, was made for another model, or does not fit in memory."""
        self.engine.load_adapter(path, name)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that are loaded."""
        return self.runtime.adapters.names

    def unload_adapter(self, name: str) -> None:
        """Forgets an adapter; requests that use it go on with it."""
        self.runtime.adapters.unload(name)

    def clear_caches(self) -> None:
        """Evicts what is kept for later requests: prompts computed before, visual tokens of media."""
        self.runtime.prefixes.clear()
        self.runtime.vision_cache.clear()

    def live(
        self, *, keep: Keep = "all", reserve: int | None = None, adapter: str | None = None, **media_options: Any
    ) -> LiveSession:
        """A session to which frames are appended while questions are asked (`keye.sessions.live`). When the context is
        full, `keep` "recent" forgets the oldest frames, "all" refuses more; `reserve` tokens stay free for question and
        answer. `adapter` computes all of it. `media_options` (max_pixels, fps of files, ...) hold for all frames."""
        from keye.sessions.live import LiveSession

        return LiveSession(self.engine, keep=keep, reserve=reserve, adapter=adapter, **media_options)


def _with_merged_intervals(stream: AnswerStream) -> Generator[str | Answer]:
    yield from stream
    answer = stream.finish()
    yield replace(answer, intervals=tuple(merge_intervals(answer.intervals)))


def load(
    name_or_path: str | Path = "nano", *, device: str = "cpu", dtype: str | None = None,
    quant: QuantKind | Literal["none"] | None = None,
    attention: AttentionMode = "sparse", kv: KVFormat = "auto", indexer_kv: KVFormat = "auto", kv_tier: Tier = "memory",
    kv_folder: str | Path | None = None, memory: str | int | None = None, template: str | Path = "auto",
    revision: str | None = None, progress: Callable[[int, int], None] | None = None, decoder: Decoder | None = None,
    adapters: Mapping[str, str | Path] | None = None, adapter: str | None = None, mmproj: str | Path | None = None,
    experts: Literal["memory", "disk"] = "memory", experts_folder: str | Path | None = None, **unknown: Never,
) -> Keye:  # fmt: skip
    """Loads a model by name ("nano", a hub name), from a folder or from a GGUF file. `mmproj` is the vision part of a
    GGUF file, by default the only `mmproj*.gguf` beside it; without one the model answers text alone.

    `revision` is a branch, tag or commit on the hub; `progress` is called with the bytes that are here and the bytes of
    all files while a model is fetched from there.

    `device` is a torch device name; `dtype` bfloat16, float16 or float32 (default: the checkpoint's own). `quant` int4,
    int8 or fp8 quantises the weights while they are read (`keye.quant.policy.make_policy` says which part how), with 2
    GiB beyond the result at most; "none" makes plain numbers of weights that a GGUF file or another tool quantised.
    Without it, and without `dtype`, a quantised checkpoint keeps its bits.

    `template` is "auto" for the chat template in the checkpoint's files where it brings one, and else keye's own of the
    model's generation; "keye" or "checkpoint" for one of the two, or a template file. Nothing in the checkpoint is
    executed; its template is rendered in a sandbox. `notes` of the result tell what the files hold that is not used,
    what they lack, and whose formats are used.

    `kv` and `indexer_kv` are the number formats of stored keys and values and of indexer keys: auto (that of the
    weights), bf16, fp8, int8 or int4. `kv_tier` says where keys and values lie: in the "memory" of the device, in
    "host" memory beside a GPU, or in a "file" in `kv_folder` that is mapped. `memory` bytes ("8GiB") may be taken for
    keys, values and visual tokens, most of what is free by default; what does not fit is refused or waits.

    Quantised `experts` lie in "memory", or on "disk": in a file in `experts_folder` (by default in keye's cache), which
    is made when a model is first loaded so. The system keeps as many in memory as it has room for, and what is chosen
    is read ahead; the tokens are the same. Keys and values then get half of what is free by default.

    `decoder` decodes video files elsewhere, to the same frames: `keye.cluster.decode_reader.ServiceDecoder`.

    `adapters` are LoRA adapters by the names that requests choose them by, each a folder that PEFT wrote; `adapter` is
    the name of the one that is used by all that choose none.
    """
    for option in unknown:
        near = closest(option, inspect.signature(load).parameters)
        raise KeyeError(f"load has no option {option}" + (f"; did you mean {near}?" if near else ""))
    check_attention(attention)
    check_device(device)
    storing = KVOptions(kv, indexer_kv, kv_tier, None if kv_folder is None else Path(kv_folder))
    limit = None if memory is None else parse_bytes(memory, "memory")
    if experts not in ("memory", "disk"):
        raise KeyeError(f"experts is {experts!r}; choose memory or disk")
    if experts == "memory" and experts_folder is not None:
        raise KeyeError("experts_folder is where experts on disk lie; set experts to disk as well")
    on_disk = Path(experts_folder or cache_folder() / "experts") if experts == "disk" else None
    name = str(name_or_path)
    for own, path in (adapters or {}).items():  # before minutes are spent on loading the model
        check_name(own)
        LoraConfig.from_file(Path(path).expanduser() / ADAPTER_CONFIG)
    if adapter is not None and adapter not in (adapters or {}):
        raise KeyeError(f"adapter is {adapter!r}, which is none of the names in adapters")
    # The small files come first: what they refuse need not be downloaded.
    folder = resolve(name, revision=revision, weights=False, progress=progress, mmproj=mmproj)
    config = load_model_config(folder)
    chosen = choose_template(template, folder, config.release)
    tokenizer = Tokenizer.from_file(folder)
    check_tokenizer(tokenizer, config)
    processor = Processor(load_processor_config(folder), decoder=decoder)
    generation_config = load_generation_config(folder)
    folder = resolve(name, revision=revision, progress=progress, mmproj=mmproj)
    chosen_dtype = torch_dtype(dtype or config.dtype)
    form = quant or (None if dtype is None else "none")
    model, report = load_model(folder, config, device=device, dtype=chosen_dtype, quant=form, experts_folder=on_disk)
    room = free_memory(device)
    if on_disk is not None and room is not None:
        room //= 2  # the rest keeps experts
    notes = [*_loading_notes(folder, config, report, chosen, is_chosen=template != "auto"), *_speed_notes(model)]
    own_name = str(config.raw.get("keye_name") or Path(name).name.removesuffix(".gguf"))
    loaded = Keye(Runtime.create(
        own_name, model, tokenizer, processor, generation_config,
        attention=attention, template=chosen, kv=replace(storing, memory=limit or room),
        notes=tuple(notes), open_index=_open_index, folder=folder,
    ))  # fmt: skip
    for own, path in (adapters or {}).items():
        loaded.load_adapter(path, own)
    if adapter is not None:
        loaded.runtime.use_by_default(adapter)
    return loaded


def choose_template(name: str | Path, folder: Path, release: Release) -> CheckpointTemplate | None:
    """The template of a checkpoint folder that `load` is asked for by `name`; None for keye's own."""
    if name == "keye" or (name == "auto" and not may_bring_template(folder)):
        _check_own_template(folder, release)
        return None
    from keye.chat.foreign_template import find_template, load_template

    if name == "auto":
        own = find_template(folder)
        if own is None:
            _check_own_template(folder, release)
            return None
        return own.for_model(template_of(release), None, fall_back=not release.needs_template)
    return load_template(folder if name == "checkpoint" else name)


def _check_own_template(folder: Path, release: Release) -> None:
    """`KeyeError` where keye has no template of its own to take the place of the checkpoint's."""
    if release.needs_template:
        raise KeyeError(f"keye has no chat template for Keye-VL {release.name}: fetch that of the checkpoint into "
                        f"{folder} (chat_template.jinja or tokenizer_config.json), or name a file")  # fmt: skip


def _open_index(runtime: Runtime, source: Source) -> VideoIndex:
    from keye.sessions.video_index import open_video_index

    return open_video_index(runtime, source)


def _speed_notes(model: KeyeModel) -> Iterator[str]:
    """Of weights in a format for which this machine has no fast product."""
    if model.device.type == "cpu" and any(w.format.kind == "fp8" for w in quantized_weights(model).values()):
        yield ("the weights are float8, which is for GPUs: on a processor quant int8, or dtype bfloat16 where memory "
               "suffices, is far faster")  # fmt: skip


def _loading_notes(
    folder: Path, config: KeyeConfig, report: LoadReport, template: CheckpointTemplate | None, *, is_chosen: bool
) -> Iterator[str]:
    """What a user should know of how a checkpoint was loaded, a sentence each; last which chat template and which text
    before frames it is used with: nothing where a template was asked for, nor of keye's own formats in checkpoints that
    keye wrote."""
    if config.unknown:
        yield f"config.json has keys without meaning to keye: {listed(config.unknown)}"
    if not (folder / PROCESSOR_FILE).exists():
        yield f"{PROCESSOR_FILE} is missing: media are prepared by the official values of Keye-VL {config.release.name}"
    if report.lacks_indexer:
        yield "the files hold no indexer weights: the model attends densely"
    if report.unused:
        yield f"the files hold tensors that this model has no place for: {listed(report.unused)}"
    if report.ignored:
        yield f"the files hold tensors that no forward pass reads: {listed(report.ignored)}"
    if is_chosen:
        return
    if template is not None:
        other = "" if config.release.needs_template else "; template keye chooses that of keye"
        yield f"prompts follow the checkpoint's own chat template{other} ({template.name})"
    if has_keye_fields(folder):
        return
    if template is None:
        yield f"the checkpoint brings no chat template: prompts follow keye's own for Keye-VL {config.release.name}"
    if not config.release.processor_is_published:
        is_labelled = find_frame_text(folder) is not None
        yield ("frames are labelled by the frame_text of the checkpoint" if is_labelled else
               "the checkpoint brings no frame_text: frames are labelled as Keye-VL 1.5 does it")  # fmt: skip
