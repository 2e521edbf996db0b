"""A video is read once, window by window, into a search index.

Windows of a wide spacing come first where the whole takes long, so that the index can be searched soon, and are refined
afterwards. Frames are decoded once in order for each spacing; those that two windows share are encoded once. A run that
was killed goes on behind the last complete segment of the file. How long it will take is measured before it begins.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, get_args

import numpy as np
import torch

from keye.cache.index_file import check_index_disk, check_index_output
from keye.cache.segments import OpenFile, SegmentWriter, is_segmented, open_for_writing
from keye.cache.sequence import KVCache
from keye.cache.slabs import KVLayout, KVStore
from keye.chat.messages import Medium
from keye.config.media import media_options
from keye.engine.continuations import StoredSequence, continue_sequences
from keye.engine.engine import Engine
from keye.errors import KeyeError, Option
from keye.media import sizes
from keye.media.content import probe_cached
from keye.media.frame_stream import FrameShape
from keye.media.pixels.patches import VisionInput, frames_to_patches
from keye.media.processor import MediaItem
from keye.media.scenes import Scenes
from keye.media.source.fetch import Source, is_index
from keye.models.attention import AttentionMode, cache_rows
from keye.moments import FindProgress
from keye.ops.kv_blocks import KV_BLOCK
from keye.sessions.search.places import identify_source, is_default, make_room, path_of
from keye.sessions.search.scoring import YES_NO, answer_ids, encode_question, frame_shares, read_answer
from keye.sessions.search.search_index import SearchIndex, open_search_index
from keye.sessions.search.window_reader import OnFrames, WindowReader
from keye.sessions.search.windows import SearchWindow, choose_frames, count_overlap, plan_windows
from keye.version import __version__

#: How much work an index may take: "low" and "high" are the ends of `_EFFORTS`, "auto" is the most that ends in time.
Effort = Literal["auto", "low", "medium", "high"]
#: Seconds between frames and most visual tokens of a frame.
_EFFORTS: Final[Mapping[str, tuple[float, int]]] = {"high": (1.0, 64), "medium": (2.0, 64), "low": (4.0, 16)}
#: "auto" takes what is predicted to end within so many seconds; where more than `_SOON` are, wide windows come first.
_AUTO_SECONDS: Final = 1800.0
_SOON: Final = 120.0
#: How many times wider the first spacing is.
_COARSER: Final = 4
#: Most frames of a window.
MOST_WINDOW_FRAMES: Final = 256
#: Frames of a window of a model that says for how many it was made.
_SCOPED_FRAMES: Final = 32
#: Bytes of rows that a segment holds, at least one window.
_SEGMENT_BYTES: Final = 8 << 20
#: Options of a video that an index takes; the others choose frames, which is done here.
_OPTIONS: Final = frozenset(
    {"track", "deinterlace", "tone_map", "strict_media", "video_start", "video_end", "max_pixels", "min_pixels", "fps"}
)
#: Frames of the sample by which the rate is measured.
_SAMPLE_FRAMES: Final = 8


@dataclass(frozen=True)
class WindowsReady:
    """Windows `numbers` of an index that is being built can be searched from now on."""

    index: SearchIndex
    numbers: tuple[int, ...]


BuildEvent = FindProgress | WindowsReady


@dataclass(frozen=True)
class _Plan:
    """How a video becomes windows: `spacings` from the widest to the finest, the frames of a window and those that it
    shares at the finest, the size of a frame."""

    spacings: tuple[float, ...]
    frames: int
    overlap: int
    height: int
    width: int
    options: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "spacings": list(self.spacings), "options": dict(self.options)}


def build_search_index(
    engine: Engine, medium: Medium, path: Path, *, effort: Effort = "auto", spacing: float | None = None,
    window_frames: int | None = None, scenes: bool = True, overwrite: bool = False,
    check: Callable[[], None] | None = None, on_frames: OnFrames | None = None, open_file: OpenFile = open_for_writing,
) -> Generator[BuildEvent, None, SearchIndex]:  # fmt: skip
    """Reads a video into a search index at `path`, going on with what is there of the same video; the index is the
    value of the generator, and comes with each `WindowsReady`. Close it to stop: what is there stays.

    `spacing` is the seconds between two frames, `window_frames` how many are read together; `effort` chooses what is
    left open. `check` is called again and again and may raise; `on_frames` sees every frame of the finest spacing once.
    A file of another video or model is replaced only with `overwrite`. `KeyeError` for anything but a video file,
    for a disk that is full, and for a file that another process writes to.
    """
    if effort not in get_args(Effort):
        raise KeyeError(f"effort is {effort!r}; choose one of {', '.join(get_args(Effort))}")
    if spacing is not None and not 0.01 <= spacing <= 3600:
        raise KeyeError(f"spacing is {spacing:g} s; choose 0.01 to 3,600")
    source = medium.source
    if medium.kind != "video" or not isinstance(source, Source) or is_index(source):
        raise KeyeError("a search index is made of a video file; give a path or an address of one")
    builder = _Builder(engine, medium, path, scenes, check, on_frames)
    yield from builder.open(effort, spacing, window_frames, overwrite, open_file)
    try:
        yield from builder.run()
    finally:
        builder.close()
    return builder.index


class _Builder:
    """One run. The file is open for writing until `close`."""

    index: SearchIndex
    writer: SegmentWriter
    plan: _Plan

    def __init__(
        self, engine: Engine, medium: Medium, path: Path, scenes: bool, check: Callable[[], None] | None,
        on_frames: OnFrames | None,
    ) -> None:  # fmt: skip
        assert isinstance(medium.source, Source)
        self.engine, self.runtime, self.source, self.path = engine, engine.runtime, medium.source, path
        self.scenes, self.check, self.on_frames = scenes, check, on_frames
        chosen = {name: value for name, value in medium.options.items() if value is not None}
        if unknown := sorted(set(chosen) - _OPTIONS):
            raise KeyeError("{} has no effect on a search index, which chooses its frames itself; leave it out",
                            Option(unknown[0]))  # fmt: skip
        self.chosen, self.options = chosen, media_options("video", chosen)
        self.mode: AttentionMode = self.runtime.attention
        self.info = probe_cached(self.source, self.runtime.processor.limits, track=self.options.track)
        model = self.runtime.model
        text = model.config.text if self.mode == "sparse" else model.config.without_indexer().text
        self.layout = _layout(self.runtime.kv.indexer_kv, self.runtime.kv.kv, cache_rows(text), model.dtype)
        self.store: KVStore = self.runtime.kv.store(self.layout, model.device, self.runtime.ledger)
        self.head, _ = self.runtime.prompts.encode_around("?", template=self.runtime.template)
        self.rate = _Rate()

    def open(
        self, effort: Effort, spacing: float | None, window_frames: int | None, overwrite: bool, open_file: OpenFile
    ) -> Iterator[BuildEvent]:
        """Goes on with the file, or plans and begins a new one; says how long it will take."""
        spacing = 1 / self.options.fps if spacing is None and self.options.fps is not None else spacing
        check_index_output(self.path, overwrite=overwrite)
        identity = identify_source(self.source)
        known = self._open_known(identity, spacing, window_frames, overwrite)
        if known is not None:
            plan = known.head.plan
            self.index, self.writer = known, SegmentWriter(self.path, open_file)
            self.plan = _Plan(
                tuple(plan["spacings"]), plan["frames"], plan["overlap"], plan["height"], plan["width"], plan["options"]
            )
            self.rate.measure(self.engine, self.plan, self._build_item, self._prefill)
        else:
            self._choose_plan(effort, spacing, window_frames)
            question = self.runtime.generation_config.presence_prompt.format(event="object", article="an")
            about = {
                "keye": __version__, "model": asdict(self.runtime.fingerprint), "attention": self.mode,
                "null_question": question, "plan": self.plan.to_dict(),
                "source": {"name": self.source.name, "path": path_of(self.source), "identity": identity,
                           "size": self.source.size, "duration": self.info.duration,
                           "start": self.options.video_start or self.info.start_offset},
            }  # fmt: skip
            if is_default(self.path):
                make_room(self._predict_bytes(), keep=self.path)
            self.writer = SegmentWriter.create(self.path, "head", about, open_file)
            self.index = open_search_index(self.runtime, self.path)
        yield FindProgress("index", 0.0, self._total(), "s", self._seconds_left())

    def close(self) -> None:
        """Ends the run; what is complete stays."""
        self.writer.close()

    def run(self) -> Iterator[BuildEvent]:
        """Computes what is missing, the widest spacing first."""
        null_ids = encode_question(self.runtime, self.index.head.null_question)
        for level, windows in enumerate(self._windows()):
            if level in self.index.levels_done:
                continue
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
                yield FindProgress("index", self._done(), self._total(), "s", self._seconds_left())
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

    def _open_known(
        self, identity: str, spacing: float | None, frames: int | None, overwrite: bool
    ) -> SearchIndex | None:
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
        chosen = spacing in (None, plan["spacings"][-1]) and frames in (None, plan["frames"])
        if is_same and chosen and plan["options"] == self.chosen:
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

    def _choose_plan(self, effort: Effort, spacing: float | None, window_frames: int | None) -> None:
        scope = self.runtime.generation_config.scope
        frames = window_frames or (_SCOPED_FRAMES if scope is not None else MOST_WINDOW_FRAMES)
        if not 2 <= frames <= MOST_WINDOW_FRAMES:
            raise KeyeError(f"window_frames is {frames}; choose 2 to {MOST_WINDOW_FRAMES}")
        choices = [_EFFORTS["high"], _EFFORTS["medium"], (4.0, 64), _EFFORTS["low"]]
        choices = [_EFFORTS[effort]] if effort != "auto" else choices
        for step, tokens in choices:
            step = spacing or step
            size = self._frame_size(frames, tokens)
            self.plan = _Plan((step,), frames, count_overlap(step, frames), *size, dict(self.chosen))
            self.rate.measure(self.engine, self.plan, self._build_item, self._prefill)
            if (left := self._seconds_left()) is None or left <= _AUTO_SECONDS:
                break
        if (
            (left := self._seconds_left()) is not None
            and left > _SOON
            and self.info.duration > step * _COARSER * frames
        ):
            self.plan = replace(self.plan, spacings=(step * _COARSER, step))

    def _frame_size(self, frames: int, tokens: int) -> sizes.Size:
        """(height, width) of frames with at most so many visual tokens, under what the request allows."""
        config = self.runtime.processor.config
        most = min(max(tokens, config.video_min_tokens), config.video_max_tokens) * config.token_pixels
        options = self.options.replace(max_pixels=min(self.options.max_pixels or most, most), fps=None)
        least = options.min_pixels
        if least is not None and options.max_pixels is not None:
            options = options.replace(min_pixels=min(least, options.max_pixels))
        return sizes.compute_frame_sizes(self.info.height, self.info.width, frames, config, options).slow

    def _windows(self) -> Iterator[list[SearchWindow]]:
        """The windows of each spacing. Those of a finer one know what a wider one has seen change."""
        start, end = self.options.video_start or 0.0, self.options.video_end
        for level, spacing in enumerate(self.plan.spacings):
            is_known = level and self.index.scenes_end >= self.info.duration - spacing
            chosen = choose_frames(
                self.info.timestamps, spacing, start=start, end=end, changes=self.index.changes if is_known else None
            )
            stop = self.info.duration if end is None else min(end, self.info.duration)
            overlap = (
                self.plan.overlap if spacing == self.plan.spacings[-1] else count_overlap(spacing, self.plan.frames)
            )
            yield plan_windows(
                self.info.timestamps, stop, chosen, spacing=spacing, frames=self.plan.frames, overlap=overlap
            )

    def _windows_per_segment(self) -> int:
        tokens = self.plan.frames * (self._frame_tokens() + 8)
        return max(1, _SEGMENT_BYTES // (tokens * self.layout.token_bytes))

    def _predict_bytes(self) -> int:
        """About what the file will take."""
        shared = self.plan.frames / (self.plan.frames - self.plan.overlap)
        frames = sum(self.info.duration / spacing for spacing in self.plan.spacings)
        return int(frames * shared * (self._frame_tokens() + 8) * self.layout.token_bytes)

    def _frame_tokens(self) -> int:
        return self.runtime.processor.config.count_tokens((self.plan.height, self.plan.width))

    def _build_item(self, vision: VisionInput, labels: Sequence[float], key: bytes | None = None) -> MediaItem:
        return self.runtime.processor.build_item(vision, labels, key)

    def _prefill(self, items: Sequence[MediaItem]) -> tuple[Any, KVCache]:
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
        stored = [
            StoredSequence(cache, entry["next_position"]) for entry, cache in zip(entries, caches, strict=True)
        ]  # fmt: skip
        readers = [answer_ids(self.runtime, answer) for answer in YES_NO]
        results = continue_sequences(
            self.engine, lambda a, b: stored[a:b], len(stored), null_ids, attention=self.mode, count=True,
            check=self.check,
        )  # fmt: skip
        for item in results:
            entry = entries[item.number]
            entry["prior"] = round(read_answer(item.logits, readers)[0], 5)
            if item.counts is not None:
                spans = entry["spans"]
                entry["null_shares"] = [round(float(share), 6) for share in frame_shares(item, spans)]
        for entry in entries:
            del entry["spans"]

    def _total(self) -> float:
        """Seconds of video to be read, of all spacings together."""
        return self.info.duration * len(self.plan.spacings)

    def _done(self) -> float:
        done = dict.fromkeys(range(len(self.plan.spacings)), 0.0)
        for window in self.index.all:
            done[window.level] = max(done[window.level], window.end)
        return sum(done.values())

    def _seconds_left(self) -> float | None:
        """Predicted from the rate so far."""
        done = self._done() / len(self.plan.spacings) if hasattr(self, "index") else 0.0
        frames = sum(self.info.duration / spacing for spacing in self.plan.spacings)
        return self.rate.seconds_for(frames * (1 - min(1.0, done / self.info.duration)))


class _Rate:
    """Seconds of a frame: measured on a sample first, then as they were."""

    def __init__(self) -> None:
        self._sample: float | None = None
        self._seconds, self._frames = 0.0, 0

    def measure(
        self, engine: Engine, plan: _Plan, build: Callable[..., MediaItem], prefill: Callable[..., Any]
    ) -> None:
        """Computes a few frames of noise, twice: the first time is not counted."""
        picture = np.random.default_rng(0).integers(0, 256, (plan.height, plan.width, 3), dtype=np.uint8)
        frames = frames_to_patches(
            [picture] * _SAMPLE_FRAMES, [(plan.height, plan.width)] * _SAMPLE_FRAMES, engine.runtime.processor.config
        )
        for _ in range(2):
            begin = time.perf_counter()
            _, cache = prefill([build(frames, tuple(map(float, range(_SAMPLE_FRAMES))))])
            cache.free()
            self._sample = (time.perf_counter() - begin) / _SAMPLE_FRAMES

    def record(self, seconds: float, frames: int) -> None:
        """So many frames took so long, decoding included."""
        self._seconds, self._frames = self._seconds + seconds, self._frames + frames

    def seconds_for(self, frames: float) -> float | None:
        """Seconds that so many frames will take; None where nothing was measured."""
        rate = self._seconds / self._frames if self._frames else self._sample
        return None if rate is None else rate * frames


def _layout(indexer: Any, kv: Any, rows: Any, dtype: torch.dtype) -> KVLayout:
    """int4 keys and values where the shape of the heads allows it and nothing else was chosen."""
    if kv != "auto":
        return KVLayout.of(rows, dtype, kv, indexer)
    dims = {spec.dim for spec in rows.values() if not spec.scanned}
    allows = all(dim >= 8 and not dim & (dim - 1) for dim in dims)
    return KVLayout.of(rows, dtype, "int4" if allows else "int8", indexer)


def _pad_tokens(tokens: torch.Tensor) -> torch.Tensor:
    """int64 [4, T] up to whole blocks."""
    return torch.nn.functional.pad(tokens, (0, -tokens.shape[1] % KV_BLOCK))


def _entry(window: SearchWindow, level: int, prompt: Any) -> dict[str, Any]:
    """What the header says of a window, and `spans` of its frames, which are not written."""
    visual = prompt.is_visual.nonzero().squeeze(1).numpy()
    frame_tokens = len(visual) // len(window.times)
    starts = visual[::frame_tokens]
    return {
        "times": list(window.times), "labels": list(window.labels), "end": window.end, "level": level,
        "tokens": prompt.length, "frame_tokens": frame_tokens, "next_position": prompt.next_position,
        "prior": None, "null_shares": None, "spans": np.stack((starts, starts + frame_tokens), axis=1),
    }  # fmt: skip
