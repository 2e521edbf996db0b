"""A video that is still going on: frames are appended while questions are asked about what was seen so far.

Every frame is computed once. A question is answered on a fork of the stored past, so it does not disturb the stream.
Tokens, times and positions are those of one video of all frames; knows prompts and caches, not files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Final, Literal, get_args

import numpy as np
from PIL import Image

from keye.config.media import MediaOptions, media_options
from keye.engine.engine import Engine
from keye.engine.media import VideoIndex
from keye.engine.prompt import ContextBudget
from keye.engine.request import GenerationRequest
from keye.errors import KeyeError, Option
from keye.media import sizes
from keye.media.image import open_frames
from keye.media.pixels.patches import Pixels, VisionInput, as_frames
from keye.media.processor import MediaItem, Piece, VisualSpan, count_visual_tokens
from keye.media.source.fetch import as_source
from keye.media.video import VideoReader
from keye.sessions.answer import Answer, AnswerStream, stream_answer

#: What happens when the context is full: `all` refuses more frames, `recent` forgets the oldest half.
Keep = Literal["all", "recent"]
#: Tokens of the context that are kept free for a question and its answer.
RESERVE: Final = 1024
#: Frames that are made into patches at once.
_SLICE: Final = 32


@dataclass(frozen=True)
class _Frame:
    """One frame of the stream: its time, its label and placeholders, and its patches if they are kept."""

    time: float
    pieces: tuple[Piece, ...]
    token_ids: tuple[int, ...]
    vision: VisionInput | None


def seconds_of(values: Sequence[float], name: str = "timestamps") -> list[float]:
    """Times in seconds as floats; `KeyeError` for anything else."""
    try:
        times = [float(value) for value in values]
    except (TypeError, ValueError, OverflowError):
        times = [math.nan]
    if not all(map(math.isfinite, times)):
        raise KeyeError("{} must be finite numbers of seconds", Option(name))
    return times


class LiveSession:
    """Made by `Keye.live`; its past lies in the store of the model, under its budgets, and one `adapter` computes all
    of it. Not for several threads at once.

    `frames` and `tokens` count what is remembered; `dropped` frames were forgotten.
    """

    def __init__(
        self, engine: Engine, *, keep: Keep = "all", reserve: int | None = None, adapter: str | None = None,
        **options: Any,
    ) -> None:  # fmt: skip
        if keep not in get_args(Keep):
            raise KeyeError(f"keep is {keep!r}; choose one of {', '.join(get_args(Keep))}")
        runtime = engine.runtime
        release = runtime.processor.config.release
        if not release.reads_frames_alone:
            raise KeyeError(
                f"{runtime.name} is of release {release.name}, which needs all frames of a video at once; live "
                "sessions need a model of Keye-VL 2.0"
            )
        self._engine, self._runtime, self._keep = engine, runtime, keep
        self._adapter = runtime.resolve_adapter(adapter)
        self._limit = runtime.config.text.max_position_embeddings
        self._reserve = min(RESERVE, self._limit // 4) if reserve is None else reserve
        if not 0 < self._reserve < self._limit:
            raise KeyeError(f"reserve is {reserve}; keep 1 to {self._limit - 1} tokens free for question and answer")
        self._options = media_options("video", options)
        self._size: sizes.Size | None = None
        self._frames: list[_Frame] = []
        self.dropped, self._closed = 0, False
        self._head, _ = self._around("?")
        self._version = runtime.model.weights_version
        #: What is stored of the stream; None before the first frame.
        self._stream: VideoIndex | None = None

    @property
    def frames(self) -> int:
        """Frames that a question can see."""
        return len(self._frames)

    @property
    def tokens(self) -> int:
        """Tokens of the stream, without any question."""
        return len(self._head) if self._stream is None else len(self._stream.token_ids)

    @property
    def times(self) -> tuple[float, ...]:
        """Seconds of the frames that a question can see."""
        return tuple(frame.time for frame in self._frames)

    def append(self, frames: Any, timestamps: Sequence[float]) -> None:
        """Adds frames: an array or tensor with four axes or a list of pictures, and the second of each, later than all
        before. All frames get the size that the first frame got; nothing is added where `KeyeError` is raised, but for
        a context that fills up halfway (`keep="all"`)."""
        self._check_open()
        times = seconds_of(timestamps)
        pictures = as_frames(open_frames(frames))
        if len(pictures) != len(times):
            raise KeyeError(f"{len(pictures)} frames have {len(times)} timestamps; give one for each frame")
        before = [self._frames[-1].time] if self._frames else []
        if any(not a < b for a, b in zip([*before, *times], [*before, *times][1:], strict=False)):
            raise KeyeError("timestamps must ascend, each after that of the frame before; frames cannot be added later")
        for start in range(0, len(pictures), _SLICE):
            part = slice(start, start + _SLICE)
            self._append(pictures[part], times[part])

    def append_video(self, video: object, *, offset: float = 0.0) -> None:
        """Adds the frames of a video file, sampled by the session's options, its first second being `offset`."""
        self._check_open()
        (offset,) = seconds_of([offset], "offset")
        pairs = self.frames_of(video)
        while part := list(islice(pairs, _SLICE)):
            self.append([Image.fromarray(frame) for frame, _ in part], [offset + time for _, time in part])

    def frames_of(self, video: object) -> Iterator[tuple[Pixels, float]]:
        """Frames of a video file, uint8 RGB [H, W, 3] at the file's own size, and their seconds, sampled by the
        session's options; decoded as they are asked for."""
        source, processor = as_source(video), self._runtime.processor
        with VideoReader(source, processor.limits, track=self._options.track) as reader:
            plan = reader.plan(processor.config, self._options)
            yield from zip(reader.frames(plan, native=True), plan.timestamps, strict=True)

    def request(
        self, question: str, *, attention: Any = None, thinking: bool | None = None, evidence: bool = False,
        **sampling: Any,
    ) -> GenerationRequest:  # fmt: skip
        """A question about all that was seen so far, for the engine; the stream stays as it is, and frames may be
        appended before it is answered. Options are those of `Keye.stream`; the mode of attention is the model's, since
        the past was computed in it."""
        self._check_open()
        if not isinstance(question, str) or not question.strip():
            raise KeyeError("the question is empty; ask something about the video")
        if self._stream is None:
            raise KeyeError("no frame was appended yet; append frames before asking")
        params = self._runtime.sampling_params(**sampling)
        # Its own fork: frames may be appended before the engine begins with the question.
        stream = replace(self._stream, cache=self._stream.cache.fork())
        prompt = self._runtime.prompts.extend(stream, self._around(question, thinking)[1])
        ContextBudget(self._limit, params.max_tokens).check(prompt.length, prompt.visual_tokens)
        return GenerationRequest(prompt, params, stream.attention, evidence=evidence, adapter=self._adapter)

    def stream_ask(self, question: str, **options: Any) -> AnswerStream:
        """Asks a question, with the options of `request`; the engine writes the reply."""
        return stream_answer(self._engine, self.request(question, **options))

    def ask(self, question: str, **options: Any) -> Answer:
        """The whole answer; see `stream_ask`."""
        return self.stream_ask(question, **options).finish()

    def close(self) -> None:
        """Frees what is stored. Whatever is appended or asked afterwards is an error."""
        self._closed = True
        if self._stream is not None:
            self._stream.cache.free()
        self._stream, self._frames = None, []

    def _check_open(self) -> None:
        if self._closed:
            raise KeyeError("the live session is closed; open a new one")
        if self._version != self._runtime.model.weights_version:
            raise KeyeError("the weights were replaced since the live session was opened; open a new one")

    def _around(self, question: str, thinking: bool | None = None) -> tuple[list[int], list[int]]:
        """Token ids before the video, and those after it with the question."""
        return self._runtime.prompts.encode_around(question, template=self._runtime.template, thinking=thinking)

    def _append(self, frames: Any, times: list[float]) -> None:
        config = self._runtime.processor.config
        if self._size is None:  # of all frames: that of a video of two frames like the first
            first = frames[0]
            height, width = first.shape[:2] if isinstance(first, np.ndarray) else (first.height, first.width)
            self._size = sizes.compute_frame_sizes(height, width, 2, config, self._options).slow
        least = len(frames) * self._size[0] * self._size[1] // config.token_pixels
        if len(self._head) + least + self._reserve > self._limit:
            raise _too_many(least, self._limit)
        item = self._runtime.processor.frames(frames, MediaOptions(timestamps=tuple(times)), size=self._size)
        added = self._split(item)
        grown = sum(len(frame.token_ids) for frame in added)
        if self.tokens + grown + self._reserve <= self._limit:
            stream, frames = self._compute(added, self._stream), [*self._frames, *added]
        else:
            frames = [*self._recent(grown), *added]
            self.dropped += len(self._frames)
            if self._stream is not None:  # released first: both streams together would need twice the memory
                self._stream.cache.free()
            self._stream, self._frames = None, []
            stream = self._compute(frames, None)
            self.dropped -= len(frames) - len(added)
        if self._keep == "all":  # patches are needed for computing a shorter stream
            frames = [replace(frame, vision=None) for frame in frames]
        if self._stream is not None:
            self._stream.cache.free()
        self._stream, self._frames = stream, frames

    def _split(self, item: MediaItem) -> list[_Frame]:
        """Frames of a medium whose pieces are a label and a span for each."""
        frames, pieces, reader = list[_Frame](), list[Piece](), item.pixels.open()
        for piece in item.pieces:
            pieces.append(piece)
            if isinstance(piece, VisualSpan):
                ids = tuple(self._runtime.prompts.piece_ids(pieces))
                frames.append(_Frame(item.timestamps[len(frames)], tuple(pieces), ids, reader.take(1)))
                pieces = []
        assert not pieces and len(frames) == len(item.timestamps), "a frame is a label and a span"
        return frames

    def _compute(self, frames: Sequence[_Frame], past: VideoIndex | None) -> VideoIndex:
        """The stream with frames behind its past, or from its beginning."""
        vision = VisionInput.concatenate([frame.vision for frame in frames if frame.vision is not None])
        pieces, times = tuple(piece for frame in frames for piece in frame.pieces), tuple(f.time for f in frames)
        item, ids = MediaItem("video", vision, pieces, times), [token for f in frames for token in f.token_ids]
        builder, mode = self._runtime.prompts, self._runtime.attention
        if past is None:
            prompt = builder.of_tokens([*self._head, *ids], [item], reply=0)
        else:
            prompt = builder.extend(past, ids, [item])
            pieces, times = (*past.pieces, *pieces), (*past.timestamps, *times)
        cache, _ = self._engine.prefill(prompt, attention=mode, adapter=self._adapter)
        plan = {"frames": len(times), "timestamps": list(times), "visual_tokens": count_visual_tokens(pieces)}
        return VideoIndex(
            "<memory>", prompt.token_ids, prompt.position_ids, prompt.next_position, len(self._head), pieces, times,
            plan, mode, cache,
        )  # fmt: skip

    def _recent(self, tokens: int) -> list[_Frame]:
        """`recent`: the newest frames that leave half the context, when so many tokens are added. They are computed
        again, at the positions of a video that begins with them: stored keys hold their position and what they saw
        before."""
        size = f"{self.frames} frames in {self.tokens} of {self._limit} tokens"
        if self._keep == "all":
            raise KeyeError(
                f"the context is full: it holds {size}, and {self._reserve} are kept for question and answer; "
                'start a new session, append fewer or smaller frames, or open it with keep="recent"'
            )
        used, target = len(self._head) + tokens, (self._limit - self._reserve) // 2
        if used + self._reserve > self._limit:
            raise _too_many(tokens, self._limit)
        start = len(self._frames)
        while start and used + len(self._frames[start - 1].token_ids) <= target:
            start -= 1
            used += len(self._frames[start].token_ids)
        return self._frames[start:]


def _too_many(tokens: int, limit: int) -> KeyeError:
    return KeyeError(f"{tokens} tokens of new frames do not fit the context of {limit}; append fewer or smaller frames")
