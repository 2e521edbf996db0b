"""A search index open for reading: the windows of a video, computed, as sequences that questions continue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from keye.cache.checksums import damage_error
from keye.cache.segments import Segment, map_segment, read_segments
from keye.cache.sequence import KVCache
from keye.cache.slabs import KVStore
from keye.engine.continuations import StoredSequence
from keye.engine.media import VideoIndex
from keye.engine.runtime import Runtime
from keye.errors import KeyeError
from keye.media.processor import Piece, VisualSpan, expand_frames
from keye.media.scenes import Scenes
from keye.media.source.fetch import Source
from keye.models.keye import visual_mask
from keye.moments import SeenSpan
from keye.ops.kv_blocks import KV_BLOCK
from keye.sessions.search.headers import IndexContents, IndexHead, StoredWindow
from keye.sessions.search.places import find_again
from keye.sessions.video_index import check_layout, check_same_model


class SearchIndex:
    """A search index, open for the model that made it. `all` are its windows, each at the place of its number;
    `windows` are those that cover the video best. The file may grow meanwhile: `extend` takes what is new. Damage found
    while rows are read is an error of what reads them."""

    def __init__(self, runtime: Runtime, path: Path, segments: Sequence[Segment]) -> None:
        self.runtime, self.path = runtime, path
        self._contents = IndexContents.read(path, segments[:1])
        check_same_model(path, self.head.model, runtime.fingerprint)
        self._version = runtime.model.weights_version
        #: The number of the first window of each segment with rows, and the sequences of those that are open.
        self._firsts: list[int] = []
        self._sequences: dict[int, list[KVCache]] = {}
        self._store: KVStore | None = None
        self._stop = segments[0].stop
        self.extend(segments[1:])

    @property
    def head(self) -> IndexHead:
        """What was written first: model, source, plan."""
        return self._contents.head

    @property
    def all(self) -> Sequence[StoredWindow]:
        """All windows, also wide ones that finer ones have taken the place of."""
        return self._contents.windows

    @property
    def scenes(self) -> Sequence[Scenes]:
        """Cuts and change scores of parts of the video, in the order of time."""
        return self._contents.scenes

    @property
    def scenes_end(self) -> float:
        """Up to which second cuts and changes are known."""
        return self._contents.scenes_end

    @property
    def levels_done(self) -> set[int]:
        """Numbers of the spacings that are complete."""
        return self._contents.levels_done

    @property
    def is_complete(self) -> bool:
        """Whether the finest spacing is complete."""
        return self._contents.is_complete

    def suits(self, media_options: Mapping[str, Any]) -> bool:
        """Whether it was made under these options of the video; those of None count as not given."""
        wanted = {name: value for name, value in media_options.items() if value is not None}
        return dict(self.head.plan["options"]) == wanted

    @property
    def duration(self) -> float:
        """Seconds of the video."""
        return float(self.head.source["duration"])

    @property
    def source_name(self) -> str:
        """The name of the video."""
        return str(self.head.source["name"])

    def find_source(self) -> Source | None:
        """The video, if it is still where it was when it was indexed, and the same."""
        return find_again(self.head.source.get("path"), str(self.head.source["identity"]))

    @property
    def cuts(self) -> list[float]:
        """Seconds at which a new shot begins."""
        return [cut for part in self.scenes for cut in part.cuts]

    @property
    def changes(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Seconds, and how much the picture has changed shortly before each, 0 to 1."""
        if not self.scenes:
            return np.empty(0), np.empty(0)
        times = [part.start + part.step * (1 + np.arange(len(part.scores))) for part in self.scenes]
        return np.concatenate(times), np.concatenate([part.scores.astype(np.float64) for part in self.scenes])

    @property
    def windows(self) -> list[StoredWindow]:
        """In the order of time the windows of the finest spacing, and wider ones where it has not come yet."""
        best = list[StoredWindow]()
        for level in sorted({window.level for window in self.all}, reverse=True):
            covered = _merge([(window.start, window.end) for window in best])
            mine = [window for window in self.all if window.level == level]
            best += [window for window in mine if not _is_inside(window.start, window.end, covered)]
        return sorted(best, key=lambda window: window.start)

    @property
    def tokens(self) -> int:
        """Tokens stored, all windows together."""
        return sum(window.tokens for window in self.all)

    @property
    def frames(self) -> int:
        """Frames of `windows`; those in two of them count once."""
        return len({time for window in self.windows for time in window.times})

    @property
    def seen(self) -> list[SeenSpan]:
        """The parts of the video that windows cover, with their spacing."""
        spans: list[SeenSpan] = []
        for window in self.windows:
            if spans and spans[-1].spacing == window.spacing and window.start <= spans[-1].end + 1e-6:
                spans[-1] = SeenSpan(spans[-1].start, max(spans[-1].end, window.end), window.spacing)
            else:
                spans.append(SeenSpan(window.start, window.end, window.spacing))
        return spans

    @property
    def unseen(self) -> list[tuple[float, float]]:
        """The parts that no window covers. Nothing is shown before the first frame."""
        covered = _merge([(window.start, window.end) for window in self.windows])
        if not covered:
            return [(0.0, self.duration)]
        ends, starts = [end for _, end in covered], [start for start, _ in covered[1:]]
        gaps = zip(ends, [*starts, self.duration], strict=True)
        first = float(self.head.source["start"])
        return [pair for pair in ((first, covered[0][0]), *gaps) if pair[1] - pair[0] > 1e-3]

    def extend(self, segments: Sequence[Segment] | None = None) -> list[int]:
        """Takes segments that were appended since; returns the numbers of their windows."""
        numbers = list[int]()
        for segment in read_segments(self.path, self._stop) if segments is None else segments:
            new = self._contents.add(segment)
            if new:
                assert segment.image is not None
                check_layout(self.path, segment.image.layout, self.runtime.config)
                self._firsts.append(new[0].number)
                for window in new:
                    self._check_tokens(window)
            numbers += [window.number for window in new]
            self._stop = segment.stop
        return numbers

    def sequence(self, number: int) -> StoredSequence:
        """What is stored of a window."""
        if self._version != self.runtime.model.weights_version:
            raise KeyeError(f"the weights were replaced since {self.path} was opened; index the video again")
        window = self.all[number]
        if window.segment not in self._sequences:
            self._sequences[window.segment] = self._open(window.segment)
        cache = self._sequences[window.segment][number - self._firsts[window.segment]]
        return StoredSequence(cache, window.next_position, torch.from_numpy(self.frame_spans(number)))

    def past(self, number: int) -> VideoIndex:
        """A window as the beginning of prompts, as an index of a video is one; times in replies are those of its own
        clock."""
        window, tokens = self.all[number], self.tokens_of(number)
        pieces = self._pieces(window)
        plan = {
            "name": self.source_name, "frames": len(window.times), "timestamps": list(window.labels),
            "duration": self.duration, "visual_tokens": len(window.times) * window.frame_tokens,
        }  # fmt: skip
        return VideoIndex(
            f"{self.source_name} at {window.start:.1f} s", tokens[0], tokens[1:], window.next_position,
            window.tokens - len(self.runtime.prompts.piece_ids(pieces)), tuple(pieces), window.labels, plan,
            self.head.attention, self.sequence(number).cache,
        )  # fmt: skip

    def tokens_of(self, number: int) -> Tensor:
        """Token ids and positions of a window, int64 [4, T]."""
        window = self.all[number]
        image = self._contents.images[window.segment].image
        assert image is not None
        first = window.block * KV_BLOCK
        return image.tokens[:, first : first + window.tokens]

    def frame_spans(self, number: int) -> NDArray[np.int64]:
        """First and one past the last position of the visual tokens of each frame of a window, int64 [frames, 2]."""
        frame_tokens = self.all[number].frame_tokens
        starts = (
            visual_mask(self.runtime.config, self.tokens_of(number)[0]).nonzero().squeeze(1).numpy()[::frame_tokens]
        )
        return np.stack((starts, starts + frame_tokens), axis=1)

    def release(self) -> None:
        """Unmaps what was opened; it is opened again when it is needed."""
        for caches in self._sequences.values():
            for cache in caches:
                cache.free()
        self._sequences.clear()

    def _check_tokens(self, window: StoredWindow) -> None:
        """Ids and positions must be possible for the model, and the visual tokens of a frame stand together."""
        config, tokens = self.runtime.config, self.tokens_of(window.number)
        places = visual_mask(config, tokens[0]).nonzero().squeeze(1).numpy()
        good = 0 <= int(tokens.min()) and int(tokens.max()) < 1 << 31
        good = good and int(tokens[0].max()) < config.text.vocab_size
        good = good and len(places) == window.frame_tokens * len(window.times)
        if good:
            spans = places.reshape(len(window.times), window.frame_tokens)
            good = bool((spans == spans[:, :1] + np.arange(window.frame_tokens)).all())
        if not good:
            raise damage_error(self.path, "the tokens of a window are none of its model")

    def _open(self, number: int) -> list[KVCache]:
        """The sequences of a segment. Scanned rows of a model on another device are copied there."""
        segment, device = self._contents.images[number], self.runtime.model.device
        image = segment.image
        assert image is not None
        mapped, check = map_segment(self.path, segment)
        if self._store is None:
            self._store = self.runtime.kv.store(image.layout, device, self.runtime.ledger)
        rows, near = dict(image.rows(mapped)), 0
        for name in image.layout.scanned if device.type != "cpu" else ():
            for layer in range(image.layout.layers):
                check.compare(name, layer)
            if check.damage is not None:
                raise check.damage
            near, rows[name] = near + rows[name].nbytes, rows[name].to(device)
        blocks, caches = self._store.adopt(rows, image.blocks, near), list[KVCache]()
        for window in self.all[self._firsts[number] :]:
            if window.segment != number:
                break
            count = -(-window.tokens // KV_BLOCK)
            mine, part = blocks[window.block : window.block + count], check.part(window.block, count)
            caches.append(KVCache.of_blocks(self._store, mine, window.tokens, part))
        return caches

    def _pieces(self, window: StoredWindow) -> list[Piece]:
        """What stands for the frames of a window in its prompt."""
        config = self.runtime.processor.config
        if config.release.whole_video:
            return [VisualSpan("video", window.frame_tokens * len(window.times))]
        return expand_frames([window.frame_tokens] * len(window.times), config, window.labels)


def open_search_index(runtime: Runtime, path: str | Path) -> SearchIndex:
    """A search index for the model that made it. `KeyeError` where the file is damaged, is none, or is another
    model's."""
    return SearchIndex(runtime, Path(path), read_segments(Path(path)))


def _merge(spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Spans that touch become one."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1] + 1e-6:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((start, end))
    return merged


def _is_inside(start: float, end: float, spans: Sequence[tuple[float, float]]) -> bool:
    return any(a - 1e-6 <= start and end <= b + 1e-6 for a, b in spans)
