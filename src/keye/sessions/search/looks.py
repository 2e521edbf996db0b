"""Close looks: frames of a part of a video, decoded again, on a clock of their own, and what a model says of them.

The frames of a look are labelled half a second apart, whatever lies between them in the file, since that is what small
models tell apart best. So a time in a reply names a frame, and never a second of the file: replies are turned into
frames, and frames into the seconds at which they are shown.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from keye.chat.messages import Medium, Message
from keye.chat.replies import parse_reply
from keye.chat.template import Segment
from keye.chat.times import Interval, parse_intervals
from keye.config.media import MediaOptions, media_options
from keye.engine.engine import Engine
from keye.engine.media import Frames
from keye.engine.prompt import Prompt
from keye.engine.request import Delta, Ended, Event, Finished, GenerationRequest, TokenProb
from keye.engine.sampling import SamplingParams
from keye.errors import MediaError
from keye.media import sizes
from keye.media.info import VideoInfo
from keye.media.plan import VideoPlan
from keye.media.source.fetch import Source
from keye.media.video import VideoReader
from keye.sessions.search.questions import ground_question, presence_question, yes_log_odds
from keye.sessions.search.scoring import encode_question, thinking_of
from keye.sessions.search.search_index import SearchIndex
from keye.sessions.search.windows import SearchWindow

#: Seconds between the labels of two frames of a look.
LABEL_STEP: Final = 0.5
#: Tokens of a reply that lists intervals, at most.
_MAX_REPLY: Final = 96
#: How a list of times begins.
_BEGINNING: Final = "[["
#: Tokens of any other reply.
_MAX_TEXT: Final = 256
#: Likeliest tokens among which yes and no are sought.
_LIKELIEST: Final = 20
#: Replies that cannot be used as they are, and what is said of them.
FAULTS: Final = {
    "loop": "repeated themselves",
    "malformed": "were no list of times",
    "outside": "named times outside what was looked at",
}


@dataclass(frozen=True)
class Look:
    """Frames to look at: `indices` in the file, ascending, `times` when each is shown and `ends` when the next frame
    of the look is, or, after the last one and where frames were left out, the next frame of the file. `labels` are the
    times that the model sees. `pixels` uint8 [frames, height, width, 3] once they were read."""

    indices: tuple[int, ...]
    times: tuple[float, ...]
    ends: tuple[float, ...]
    labels: tuple[float, ...]
    pixels: NDArray[np.uint8] | None = field(default=None, repr=False, compare=False)

    @property
    def start(self) -> float:
        return self.times[0]

    @property
    def end(self) -> float:
        return self.ends[-1]

    def frames_of(self, interval: Interval) -> tuple[int, int] | None:
        """The first and last frame of the look that an interval in a reply names; None where it names none."""
        start, end = interval
        step = (self.labels[-1] - self.labels[0]) / max(len(self.labels) - 1, 1) or LABEL_STEP
        if start > end or start > self.labels[-1] + step or end < self.labels[0] - step:
            return None
        first, last = (int(np.abs(np.subtract(self.labels, seconds)).argmin()) for seconds in interval)
        return first, last

    def seconds_of(self, frames: tuple[int, int]) -> Interval:
        """From when the first of two frames is shown until the last one makes way."""
        return self.times[frames[0]], self.ends[frames[1]]


#: First and last frames of a look between which an event happens.
Spans = tuple[tuple[int, int], ...]


class LookReader:
    """Reads frames of one video, whose decode worker stays open. Use as a context manager."""

    def __init__(self, source: Source, engine: Engine, options: Mapping[str, Any] | None = None) -> None:
        self.source, self.options = source, media_options("video", dict(options or {}))
        self._processor = engine.runtime.processor
        self._reader: VideoReader | None = None
        self._info: VideoInfo | None = None

    def __enter__(self) -> LookReader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the worker."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    @property
    def info(self) -> VideoInfo:
        """Facts about the video."""
        if self._info is None:
            self._info = self._open().info
        return self._info

    def _open(self) -> VideoReader:
        if self._reader is None:
            self._reader = VideoReader(self.source, self._processor.limits, track=self.options.track)
        return self._reader

    def choose(self, start: float, end: float, frames: int) -> Look:
        """At most `frames` frames on display between two times, and in the part that is searched, evenly spread."""
        times = self.info.timestamps
        start = max(start, self.options.video_start or 0.0)
        end = end if self.options.video_end is None else min(end, self.options.video_end)
        first = max(bisect_right(times, start + 1e-6) - 1, 0)
        last = max(bisect_left(times, end - 1e-6) - 1, first)
        count = min(frames, last - first + 1)
        chosen = np.unique(np.linspace(first, last, count).round().astype(int)).tolist()
        return self.look_at(chosen)

    def look_at(self, indices: Sequence[int]) -> Look:
        """A look at given frames of the file, ascending."""
        steps = np.diff(indices)
        usual = int(np.median(steps)) if len(steps) else 1
        follows = [i + (int(step) if step <= 2 * usual else usual) for i, step in zip(indices, steps, strict=False)]
        follows.append(indices[-1] + usual)
        labels = tuple(round(LABEL_STEP * i, 1) for i in range(len(indices)))
        return Look(tuple(indices), tuple(map(self._time, indices)), tuple(map(self._time, follows)), labels)

    def _time(self, index: int) -> float:
        """When a frame of the file is shown; beyond the last one, when that ends."""
        return self.info.timestamps[index] if index < self.info.frame_count else self.info.duration

    def read(self, looks: Sequence[Look]) -> list[Look]:
        """The looks with their pixels, decoded in one pass through the file. `MediaError` where they cannot be."""
        wanted = sorted({index for look in looks for index in look.indices})
        size = self._size(max(len(look.indices) for look in looks))
        plan = VideoPlan.of(self.info, wanted, size, tokens_per_frame=0, rate=self.info.fps, options=self.options)
        try:
            read = dict(zip(wanted, self._open().frames(plan), strict=True))
        except MediaError:
            self.close()  # the worker ends with its first error
            raise
        return [replace(look, pixels=np.stack([read[index] for index in look.indices])) for look in looks]

    def count_tokens(self, frames: int, label: int = 8) -> int:
        """Tokens of a look at so many frames, about: those of their labels with them."""
        return frames * (self._processor.config.count_tokens(self._size(frames)) + label)

    def _size(self, frames: int) -> sizes.Size:
        """The largest size that a look of so many frames may have."""
        config, options = self._processor.config, MediaOptions(max_pixels=self.options.max_pixels)
        return sizes.compute_frame_sizes(self.info.height, self.info.width, frames, config, options).slow


class Asker:
    """Asks one model about an event in looks. `tokens` counts what was computed; `faults` are the replies that could
    not be used as they were: "loop", "malformed" and "outside" (times that no frame has)."""

    def __init__(self, engine: Engine, event: str, check: Callable[[], None] | None = None) -> None:
        self.engine, self.event, self.check = engine, event, check
        config = engine.runtime.generation_config
        self._presence, self._ground = presence_question(config, event), ground_question(config, event)
        self.tokens = self._replied = 0
        self.faults: list[str] = []

    def ask_presence(self, looks: Sequence[Look]) -> list[float | None]:
        """The log-odds that the event is in each of the looks; None where the model says neither yes nor no."""
        outcomes = self._run([self._request(look, self._presence, 1) for look in looks])
        return [yes_log_odds(outcome.probs) for outcome in outcomes]

    def ask_spans(self, looks: Sequence[Look], certain: Sequence[bool]) -> list[Spans | None]:
        """The first and last frames between which the event happens in each look; None where the reply does not say.
        Where it is `certain` that it happens, a reply that names no times is begun for the model, which goes on."""
        requests = [self._request(look, self._ground, _MAX_REPLY) for look in looks]
        return self._ask_times(requests, looks, certain)

    def ask_windows(self, index: SearchIndex, numbers: Sequence[int], certain: Sequence[bool]) -> list[list[Interval]]:
        """When the event happens in stored windows, in seconds of the file. `certain` as in `ask_spans`."""
        runtime, mode, before = self.engine.runtime, index.head.attention, self.tokens
        ids, pasts = encode_question(runtime, self._ground), [index.past(number) for number in numbers]
        requests = [
            GenerationRequest(runtime.prompts.extend(past, ids), self._params(_MAX_REPLY), mode) for past in pasts
        ]
        looks = [window_look(index.all[number]) for number in numbers]
        spans = self._ask_times(requests, looks, certain)
        # What the windows hold was computed when the video was indexed.
        self.tokens = before + self._replied + len(ids) * len(numbers)
        return [[look.seconds_of(frames) for frames in named or ()] for look, named in zip(looks, spans, strict=True)]

    def _ask_times(
        self, requests: Sequence[GenerationRequest], looks: Sequence[Look], certain: Sequence[bool]
    ) -> list[Spans | None]:
        self._replied = 0
        outcomes = self._run(requests)
        again = [
            i for i, outcome in enumerate(outcomes)
            if certain[i] and outcome.reason != "loop" and not parse_intervals(parse_reply(outcome.text).text)
        ]  # fmt: skip
        for i, outcome in zip(again, self._run([self._begin_reply(requests[i]) for i in again]), strict=True):
            outcomes[i] = replace(outcome, text=_BEGINNING + outcome.text)
        self._replied = sum(outcome.replied for outcome in outcomes) + len(again)
        return [self._read_spans(look, outcome) for look, outcome in zip(looks, outcomes, strict=True)]

    def _begin_reply(self, request: GenerationRequest) -> GenerationRequest:
        """The request with the reply begun: a list of times follows."""
        if isinstance(request.prompt, Prompt):
            assert request.prompt.indexed is not None
            past = request.prompt.indexed
            prompts = self.engine.runtime.prompts
            ids = [*request.prompt.token_ids[len(past.token_ids) :].tolist(),
                   *self.engine.runtime.tokenizer.encode(_BEGINNING)]  # fmt: skip
            return replace(request, prompt=prompts.extend(past, ids))
        return replace(request, prompt=[*request.prompt, Segment("template", _BEGINNING)])

    def ask_text(self, look: Look, question: str) -> str:
        """The reply to another question about a look."""
        (outcome,) = self._run([self._request(look, question, _MAX_TEXT)])
        return outcome.text

    def _params(self, most: int) -> SamplingParams:
        return self.engine.runtime.sampling_params(max_tokens=most, temperature=0.0)

    def _request(self, look: Look, question: str, most: int) -> GenerationRequest:
        runtime = self.engine.runtime
        medium = Medium("video", Frames(look.pixels, list(look.labels)))
        segments = runtime.prompts.render(
            [Message("user", (medium, question))], template=runtime.template, thinking=thinking_of(runtime)
        )
        return GenerationRequest(
            segments, self._params(most), runtime.attention, logprobs=_LIKELIEST if most == 1 else None
        )

    def _run(self, requests: Sequence[GenerationRequest]) -> list[_Outcome]:
        outcomes = [_Outcome() for _ in requests]
        with closing(self.engine.run(requests, self.check)) as events:
            for number, event in events:
                outcomes[number].take(event)
        self.tokens += sum(outcome.tokens for outcome in outcomes)
        return outcomes

    def _read_spans(self, look: Look, outcome: _Outcome) -> Spans | None:
        """The frames that a reply names. One that repeats itself counts as far as it goes."""
        intervals = parse_intervals(parse_reply(outcome.text).text)
        spans = [frames for interval in intervals or () if (frames := look.frames_of(interval)) is not None]
        if outcome.reason == "loop":
            self.faults.append("loop")
        elif intervals is None:
            self.faults.append("malformed")
        elif intervals and not spans:
            self.faults.append("outside")
        return None if intervals is None else tuple(sorted(spans))


@dataclass
class _Outcome:
    """The reply to one request: `tokens` were computed for it, `replied` of them generated."""

    text: str = ""
    probs: list[TokenProb] = field(default_factory=list)
    reason: str = "stop"
    tokens: int = 0
    replied: int = 0

    def take(self, event: Event) -> None:
        if isinstance(event, Delta):
            self.text += event.text
            self.probs += event.probs
        elif isinstance(event, Ended):
            self.reason = event.reason
        elif isinstance(event, Finished):
            self.replied = event.completion_tokens
            self.tokens = event.prompt_tokens - event.cached_tokens + event.completion_tokens


def window_look(window: SearchWindow) -> Look:
    """A window of an index as a look, by the frames that it has; the file's own numbers of them are not known."""
    return Look(tuple(range(len(window.times))), window.times, (*window.times[1:], window.end), window.labels)
