"""A video is read once, window by window, into a search index.

Windows of a wide spacing come first where the whole takes long, so that the index can be searched soon, and are refined
afterwards. Frames are decoded once in order for each spacing; those that two windows share are encoded once. A run that
was killed goes on behind the last complete segment of the file. How long it will take is measured before it begins.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from keye.cache.index_file import check_index_disk, check_index_output
from keye.cache.segments import OpenFile, SegmentWriter, is_segmented, open_for_writing
from keye.cache.sequence import KVCache
from keye.cache.slabs import KVLayout, KVOptions, KVStore
from keye.chat.messages import Medium
from keye.config import KeyeConfig
from keye.config.media import media_options
from keye.engine.continuations import StoredSequence, continue_sequences
from keye.engine.engine import Engine
from keye.engine.prompt import Prompt
from keye.errors import KeyeError, Option
from keye.media.content import probe_cached
from keye.media.frame_stream import FrameShape
from keye.media.info import VideoInfo
from keye.media.pixels.patches import frames_to_patches
from keye.media.processor import MediaItem
from keye.media.sampling import SAME_TIME
from keye.media.scenes import Scenes
from keye.media.source.fetch import Source, is_index
from keye.models.attention import AttentionMode, cache_rows
from keye.moments import FindProgress
from keye.ops.kv_blocks import KV_BLOCK, RowSpec
from keye.sessions.search.headers import encode_shares
from keye.sessions.search.places import identify_source, is_default, make_room, path_of
from keye.sessions.search.plans import Choices, FrameRate, IndexPlan
from keye.sessions.search.plans import Effort as Effort
from keye.sessions.search.scoring import YES_NO, answer_ids, encode_question, frame_shares, read_answer
from keye.sessions.search.search_index import SearchIndex, open_search_index
from keye.sessions.search.window_reader import OnFrames, WindowReader
from keye.sessions.search.windows import SearchWindow, choose_frames, choose_step, plan_windows
from keye.version import __version__

#: Bytes of rows that a segment holds, at least one window.
_SEGMENT_BYTES: Final = 8 << 20
#: Options of a video that an index takes; the others choose frames, which is done here.
_OPTIONS: Final = frozenset(
    {"track", "deinterlace", "tone_map", "strict_media", "video_start", "video_end", "max_pixels", "min_pixels", "fps"}
)
#: Frames of the sample by which the rate is measured, and tokens of a frame that are not visual, about.
_SAMPLE_FRAMES: Final = 8
_LABEL_TOKENS: Final = 8


@dataclass(frozen=True)
class WindowsReady:
    """Windows `numbers` of an index that is being built can be searched from now on."""

    index: SearchIndex
    numbers: tuple[int, ...]


BuildEvent = FindProgress | WindowsReady


def build_search_index(
    engine: Engine, medium: Medium, path: Path, *, effort: Effort = "auto", spacing: float | None = None,
    window_frames: int | None = None, wide_first: bool | None = None, scenes: bool = True, overwrite: bool = False,
    check: Callable[[], None] | None = None, on_frames: OnFrames | None = None, open_file: OpenFile = open_for_writing,
) -> Generator[BuildEvent, None, SearchIndex]:  # fmt: skip
    """Reads a video into a search index at `path`, going on with what is there of the same video; the index is the
    value of the generator, and comes with each `WindowsReady`. Close it to stop: what is there stays.

    `spacing` is the seconds between two frames, `window_frames` how many are read together; `effort` chooses what is
    left open. `wide_first` reads windows of a wider spacing first; by default where the whole takes long. `check` is
    called again and again and may raise; `on_frames` sees the frames of the finest spacing, each once. A file of
    another video or model is replaced only with `overwrite`. `KeyeError` for anything but a video file, for a disk that
    is full, and for a file that another process writes to.
    """
    source = medium.source
    if medium.kind != "video" or not isinstance(source, Source) or is_index(source):
        raise KeyeError("a search index is made of a video file; give a path or an address of one")
    choices = Choices(effort, spacing, window_frames, wide_first)
    with closing(_Builder(engine, medium, path, scenes, check, on_frames)) as builder:
        yield from builder.open(choices, overwrite, open_file)
        yield from builder.run()
        return builder.index


class _Builder:
    """One run. The file is open for writing until `close`."""

    index: SearchIndex
    plan: IndexPlan
    writer: SegmentWriter

    def __init__(
        self, engine: Engine, medium: Medium, path: Path, scenes: bool, check: Callable[[], None] | None,
        on_frames: OnFrames | None,
    ) -> None:  # fmt: skip
        assert isinstance(medium.source, Source)
        self.engine, self.runtime, self.source, self.path = engine, engine.runtime, medium.source, path
        self.scenes, self.check, self.on_frames = scenes, check, on_frames
        self.chosen = {name: value for name, value in medium.options.items() if value is not None}
        if unknown := sorted(set(self.chosen) - _OPTIONS):
            sentence = "{} has no effect on a search index, which chooses its frames itself; leave it out"
            raise KeyeError(sentence, Option(unknown[0]))
        self.options, self.mode = media_options("video", self.chosen), self.runtime.attention
        model = self.runtime.model
        self.layout = choose_layout(self.runtime.kv, self.mode, model.config, model.dtype)
        self.store: KVStore = self.runtime.kv.store(self.layout, model.device, self.runtime.ledger)
        self.head, _ = self.runtime.prompts.encode_around("?", template=self.runtime.template)
        self.rate, self.stack, self.version = FrameRate(), ExitStack(), model.weights_version

    @cached_property
    def info(self) -> VideoInfo:
        """The video, probed."""
        return probe_cached(self.source, self.runtime.processor.limits, track=self.options.track)

    @cached_property
    def _part(self) -> tuple[float, float]:
        """Where the part that was chosen begins and ends, in seconds; never empty."""
        start, end = max(self.options.video_start or 0.0, 0.0), self.info.duration
        if self.options.video_end is not None:
            end = min(self.options.video_end, end)
        return start, max(end, start + SAME_TIME)

    def open(self, choices: Choices, overwrite: bool, open_file: OpenFile) -> Iterator[BuildEvent]:
        """Goes on with the file, or plans and begins a new one; says how long it will take."""
        if choices.spacing is None and self.options.fps is not None:
            choices = replace(choices, spacing=1 / self.options.fps)
        check_index_output(self.path, overwrite=overwrite)
        identity = identify_source(self.source)
        known = self._open_known(identity, choices, overwrite)
        if known is not None:
            self.index, self.plan = known, IndexPlan.of(known.head.plan)
            self._take_writer(SegmentWriter(self.path, open_file))
            self.index.extend()  # what another process has written meanwhile
            if not self.index.is_complete:
                self._predict(self.plan)
        else:
            is_scoped = self.runtime.generation_config.scope is not None
            self.plan = choices.make_plan(
                self.info, self.runtime.processor.config, self.options, self.chosen, self._predict,
                seconds=self._part[1] - self._part[0], is_scoped=is_scoped,
            )  # fmt: skip
            if is_default(self.path):
                make_room(self._predict_bytes(), keep=self.path)
            self._windows(0)  # says what is wrong with the part before anything is written
            self._take_writer(SegmentWriter.create(self.path, "head", self._head(identity), open_file))
            self.index = open_search_index(self.runtime, self.path)
        yield self._progress()

    def close(self) -> None:
        """Ends the run; what is complete stays."""
        self.stack.close()

    def run(self) -> Iterator[BuildEvent]:
        """Computes what is missing, the widest spacing first."""
        null_ids = encode_question(self.runtime, self.index.head.null_question)
        for level in range(len(self.plan.spacings)):
            if level in self.index.levels_done:
                continue
            windows = self._windows(level)
            stored = [window for window in self.index.all if window.level == level]
            if [window.times for window in stored] != [window.times for window in windows[: len(stored)]]:
                raise KeyeError(f"{self.path} has windows of other frames than the video has; index it again")
            yield from self._run_level(level, windows, len(stored), null_ids)
            self.index.extend([self.writer.append("level", {"level": level})])

    def _run_level(
        self, level: int, windows: Sequence[SearchWindow], done: int, null_ids: Sequence[int]
    ) -> Iterator[BuildEvent]:
        """The windows of one spacing from number `done` on, and the scenes that are found meanwhile."""
        count = self._windows_per_segment()
        with closing(self._open_reader(level, windows, done)) as reader:
            while done < len(windows):
                group, begin = windows[done : done - done % count + count], time.perf_counter()
                numbers = self._add_windows(level, group, reader, null_ids)
                done += len(group)
                self._add_scenes(reader.take_scenes(is_last=False))
                self.rate.record(time.perf_counter() - begin, sum(len(window.times) for window in group))
                yield WindowsReady(self.index, tuple(numbers))
                yield self._progress()
            self._add_scenes(reader.take_scenes(is_last=True))

    def _add_windows(
        self, level: int, windows: Sequence[SearchWindow], reader: WindowReader, null_ids: Sequence[int]
    ) -> list[int]:
        """Computes windows and writes them as a segment; returns their numbers in the index."""
        entries, caches, tokens = list[dict[str, Any]](), list[KVCache](), list[torch.Tensor]()
        try:
            for window in windows:
                prompt, cache = self._prefill(reader.read(window, self.check))
                caches.append(cache)
                tokens.append(_pad_tokens(torch.cat((prompt.token_ids[None], prompt.position_ids))))
                entries.append(_entry(window, level, prompt))
            self._add_priors(entries, caches, null_ids)
            if self.version != self.runtime.model.weights_version:
                raise KeyeError(f"the weights were replaced while {self.path} was written; index the video again")
            check_index_disk(self.path, self.layout, sum(part.shape[1] for part in tokens))
            segment = self.writer.append(
                "windows", {"windows": entries}, caches, self.layout, torch.cat(tokens, dim=1)
            )  # fmt: skip
            return self.index.extend([segment])
        finally:
            for cache in caches:
                cache.free()

    def _add_scenes(self, scenes: Sequence[Scenes]) -> None:
        for part in scenes:
            self.index.extend([self.writer.append("scenes", part.to_dict())])

    def _open_reader(self, level: int, windows: Sequence[SearchWindow], done: int) -> WindowReader:
        config, is_finest = self.runtime.processor.config, level == len(self.plan.spacings) - 1
        shape = FrameShape([(self.plan.height, self.plan.width)], config)
        return WindowReader(
            self.source, self.info, self.runtime.processor, self.options, shape, windows, done,
            scenes_from=self.index.scenes_end if self.scenes else None,
            on_frames=self.on_frames if is_finest else None,
        )  # fmt: skip

    def _take_writer(self, writer: SegmentWriter) -> None:
        self.writer = writer
        self.stack.callback(writer.close)

    def _head(self, identity: str) -> dict[str, Any]:
        """The head of a new file."""
        return {
            "keye": __version__, "model": asdict(self.runtime.fingerprint), "attention": self.mode,
            "null_question": self.runtime.generation_config.presence_prompt.format(event="object", article="an"),
            "plan": self.plan.to_dict(),
            "source": {
                "name": self.source.name, "path": path_of(self.source), "identity": identity, "size": self.source.size,
                "duration": self.info.duration, "start": self.info.timestamps[0],
            },
        }  # fmt: skip

    def _open_known(self, identity: str, choices: Choices, overwrite: bool) -> SearchIndex | None:
        """The index at the path, if it is one of this video and model under the choices of the user; None where a new
        one takes its place."""
        if not is_segmented(self.path):
            return None
        try:
            index = open_search_index(self.runtime, self.path)
        except KeyeError:
            if overwrite:
                return None
            raise
        head, plan = index.head, index.head.plan
        is_same = head.source["identity"] == identity and head.attention == self.mode
        if is_same and choices.suit(plan) and plan["options"] == self.chosen:
            return index
        if overwrite:
            return None
        if not is_same:
            raise KeyeError("{} is a search index of {}: name another file, or give {}", self.path, index.source_name,
                            Option("overwrite"))  # fmt: skip
        raise KeyeError(
            "{} was made with a frame every {:g} s in windows of {} and its own options: leave others out, or give {}",
            self.path, plan["spacings"][-1], plan["frames"], Option("overwrite"),
        )  # fmt: skip

    def _windows(self, level: int) -> list[SearchWindow]:
        """The windows of a spacing. Those of a finer one know what a wider one has seen change."""
        start, end = self.options.video_start, self.options.video_end
        times, duration, spacing = self.info.timestamps, self.info.duration, self.plan.spacings[level]
        is_known = level > 0 and self.index.scenes_end >= duration - spacing
        changes = self.index.changes if is_known else None
        chosen = choose_frames(times, duration, spacing, start=start, end=end, changes=changes)
        stop = duration if end is None else min(end, duration)
        return plan_windows(
            times, stop, chosen, spacing=spacing, frames=self.plan.frames, overlap=self.plan.overlap_at(spacing)
        )

    @property
    def _frame_tokens(self) -> int:
        """Tokens of a frame with its label, about."""
        return self.runtime.processor.config.count_tokens((self.plan.height, self.plan.width)) + _LABEL_TOKENS

    def _windows_per_segment(self) -> int:
        return max(1, _SEGMENT_BYTES // (self.plan.frames * self._frame_tokens * self.layout.token_bytes))

    def _prefill(self, items: Sequence[MediaItem]) -> tuple[Prompt, KVCache]:
        """The prompt of a window up to the end of its frames, and what is stored of it."""
        builder = self.runtime.prompts
        ids = [*self.head, *(token for item in items for token in builder.piece_ids(item.pieces))]
        prompt = builder.of_tokens(ids, items, reply=1)
        empty = KVCache(self.layout.layers, self.store)
        cache, _ = self.engine.prefill(replace(prompt, past=empty), attention=self.mode, check=self.check)
        return prompt, cache

    def _add_priors(
        self, entries: Sequence[dict[str, Any]], caches: Sequence[KVCache], null_ids: Sequence[int]
    ) -> None:
        """What the null question scores on each window."""
        stored = [StoredSequence(cache, entry["next_position"]) for entry, cache in zip(entries, caches, strict=True)]
        readers = [answer_ids(self.runtime, answer) for answer in YES_NO]
        results = continue_sequences(
            self.engine, lambda a, b: stored[a:b], len(stored), null_ids, attention=self.mode, count=True,
            check=self.check,
        )  # fmt: skip
        for item in results:
            entry = entries[item.number]
            entry["prior"] = round(read_answer(item.logits, readers)[0], 5)
            if item.counts is not None:
                entry["null_shares"] = encode_shares(frame_shares(item, entry["spans"]))
        for entry in entries:
            del entry["spans"]

    # How long it takes

    def _progress(self) -> FindProgress:
        """Seconds of video that were read, of all spacings together, and how long the rest will take."""
        start, stop = self._part
        ends = dict.fromkeys(range(len(self.plan.spacings)), start)
        for window in self.index.all:
            ends[window.level] = max(ends[window.level], window.end)
        done, total = sum(end - start for end in ends.values()), (stop - start) * len(ends)
        left = (
            0.0 if self.index.is_complete else self.rate.seconds_for(self._count_frames(self.plan) * (1 - done / total))
        )
        return FindProgress("index", done, total, "s", left)

    def _predict(self, plan: IndexPlan) -> float:
        """Seconds that a plan will take, from the time of a few frames of noise; decoding is not counted."""
        picture = np.random.default_rng(0).integers(0, 256, (plan.height, plan.width, 3), dtype=np.uint8)
        sizes, config = [(plan.height, plan.width)] * _SAMPLE_FRAMES, self.runtime.processor.config
        patches = frames_to_patches([picture] * _SAMPLE_FRAMES, sizes, config)
        item = self.runtime.processor.build_item(patches, tuple(map(float, range(_SAMPLE_FRAMES))))
        self.rate.measure(lambda: self._prefill([item])[1].free(), _SAMPLE_FRAMES)
        return self.rate.seconds_for(self._count_frames(plan))

    def _count_frames(self, plan: IndexPlan) -> float:
        """Frames of all windows, those in two counted twice."""
        repeats = (plan.frames / (plan.frames - plan.overlap_at(spacing)) / spacing for spacing in plan.spacings)
        return (self._part[1] - self._part[0]) * sum(repeats)

    def _predict_bytes(self) -> int:
        """About what the file will take."""
        return int(self._count_frames(self.plan) * self._frame_tokens * self.layout.token_bytes)


def choose_layout(kv: KVOptions, mode: AttentionMode, config: KeyeConfig, dtype: torch.dtype) -> KVLayout:
    """How windows are stored: int4 keys and values where the heads allow it and the model was not loaded with another
    format."""
    rows = cache_rows(config.text if mode == "sparse" else config.without_indexer().text)
    kind = kv.kv
    if kind == "auto":
        kind = "int4" if all(_allows_int4(spec) for spec in rows.values() if not spec.scanned) else "int8"
    return KVLayout.of(rows, dtype, kind, kv.indexer_kv)


def _allows_int4(spec: RowSpec) -> bool:
    return spec.dim >= 8 and not spec.dim & (spec.dim - 1)


def _pad_tokens(tokens: torch.Tensor) -> torch.Tensor:
    """int64 [4, T] up to whole blocks."""
    return torch.nn.functional.pad(tokens, (0, -tokens.shape[1] % KV_BLOCK))


def _entry(window: SearchWindow, level: int, prompt: Prompt) -> dict[str, Any]:
    """What the header says of a window, and `spans` of its frames, which are not written."""
    visual = prompt.is_visual.nonzero().squeeze(1).numpy()
    frame_tokens = len(visual) // len(window.times)
    starts = visual[::frame_tokens]
    return {
        "times": list(window.times), "step": choose_step(window.times), "end": window.end, "level": level,
        "tokens": prompt.length, "frame_tokens": frame_tokens, "next_position": prompt.next_position,
        "prior": None, "null_shares": None, "spans": np.stack((starts, starts + frame_tokens), axis=1),
    }  # fmt: skip
