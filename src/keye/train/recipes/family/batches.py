"""Batches of the family's recipe: samples of data files, laid out as prompts are, packed by tokens, divided among the
processes of a run."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from keye.chat.messages import Medium, Message
from keye.config import ConfigError, load_generation_config
from keye.data.samples import Sample, Skip
from keye.data.sources import DataSet, SampleStream, open_samples
from keye.errors import KeyeError
from keye.sessions.search.questions import ground_question
from keye.train.balance import Load, assign_packs
from keye.train.batches import StepBatch
from keye.train.features import FeatureCache
from keye.train.layout import LaidOut, Layout, LengthError
from keye.train.modes import Style, rewrite
from keye.train.packing import Pack, load, pack
from keye.train.recipes.family.config import DataConfig, FamilyConfig, FamilyStage, MediaConfig
from keye.train.recipes.family.shared_files import write_shared
from keye.train.tree import IGNORE

#: File of the output folder that names the samples that were left out, a line of JSON each.
SKIPPED_FILE: Final = "skipped.jsonl"
#: File of the output folder that says how the visual features of a stage are found.
FEATURES_FILE: Final = "features.json"
#: Samples one after another that cannot be laid out before the run ends.
MOST_SKIPPED: Final = 200


def open_stream(
    data: Sequence[DataConfig], folder: Path, *, seed: int, epochs: float | None, state: dict[str, Any] | None = None
) -> SampleStream:  # fmt: skip
    """The samples of data sets; `{output}` in their paths is `folder`."""
    sets = [data_set(config, folder) for config in data]
    ground = partial(ground_question, load_generation_config(folder))
    return open_samples(sets, seed=seed, epochs=epochs, state=state, ground_question=ground)


def data_set(config: DataConfig, folder: Path) -> DataSet:
    """What a table of the configuration names."""
    path = config.path.replace("{output}", str(folder))
    root = None if config.root is None else Path(config.root)
    return DataSet.parse(path, weight=config.weight, columns=config.columns, root=root, mode=config.mode)


def count_skipped(folder: Path) -> int:
    """Rows and samples that were left out so far."""
    path = folder / SKIPPED_FILE
    return len(set(path.read_text(encoding="utf-8").splitlines())) if path.exists() else 0


def features_folder(folder: Path) -> Path:
    """Where visual features are kept."""
    return folder / "features"


def write_features(folder: Path, cache: FeatureCache | None) -> None:
    """Tells the processes that make batches which features a stage may read."""
    fields = None if cache is None else {"digest": cache.digest, "stored": cache.stored, "limit": cache.limit}
    write_shared(folder / FEATURES_FILE, json.dumps(fields))


def read_features(folder: Path) -> FeatureCache | None:
    """The features that the stage may read."""
    try:
        fields = json.loads((folder / FEATURES_FILE).read_text())
    except FileNotFoundError:
        return None
    return None if fields is None else FeatureCache(features_folder(folder), **fields)


def check_paths(run: FamilyConfig) -> None:
    """`ConfigError` where data or a teacher of any stage are missing, before the first one begins."""
    for stage in run.stages:
        for config in (*stage.data, *stage.val_data):
            path = data_set(config, run.output).path
            if not config.path.startswith("{output}") and not path.exists():
                raise ConfigError(f"stage {stage.name!r}: {path} is missing; check the path of its data")
        if stage.distill is not None and not stage.distill.teacher.is_dir():
            raise ConfigError(
                f"stage {stage.name!r}: {stage.distill.teacher} is missing; name the folder of its teacher"
            )


class Reader:
    """Lays out one sample after another; what cannot be is left out and written down.

    `position` is the state of the stream after the last sample that was taken: `peek` looks at the next one without
    taking it.
    """

    def __init__(
        self, stage: FamilyStage, folder: Path, stream: SampleStream, *, keeps_log: bool,
        check: Callable[[LaidOut], None] = lambda sample: None,
    ) -> None:  # fmt: skip
        """`check` raises `KeyeError` for a sample that the objective cannot learn from."""
        self.stage, self.folder, self.stream, self.keeps_log, self.check = stage, folder, stream, keeps_log, check
        self.layout = Layout.of_folder(folder, max_tokens=stage.max_tokens)
        self.style = self.layout.builder.config.release.thinking
        self.position, self.skipped = stream.state(), 0
        self._next: LaidOut | None = None
        self._logged = 0

    def peek(self) -> LaidOut | None:
        """The next sample; None at the end of the data."""
        failures = 0
        while self._next is None:
            try:
                sample = next(self.stream)
            except StopIteration:
                self._log()
                return None
            try:
                laid_out = self.layout.lay_out(prepare(sample, self.stage.media, self.style))
                self.check(laid_out)
                self._next = laid_out
            except LengthError as error:
                if self.stage.too_long == "error":
                    raise
                self._skip(sample, error)
            except KeyeError as error:
                self._skip(sample, error)
                failures += 1
                if failures == MOST_SKIPPED:
                    raise KeyeError(
                        f"{failures} samples one after another cannot be learnt; the last: {error}"
                    ) from error
        self._log()
        return self._next

    def take(self) -> None:
        """Takes the sample that `peek` returned."""
        assert self._next is not None
        self._next, self.position = None, self.stream.state()

    @property
    def epochs_done(self) -> float:
        """Passes over the data up to the last sample that was taken."""
        return self.stream.epochs_done - (self._next is not None) / self.stream.epoch_samples

    def _skip(self, sample: Sample, error: KeyeError) -> None:
        self.skipped += 1
        self._write(Skip(sample.place, str(error).removeprefix(f"{sample.place}: ")))

    def _log(self) -> None:
        """Writes down the rows that the stream left out since."""
        for skip in self.stream.skipped[self._logged :]:
            self.skipped += 1
            self._write(skip)
        self._logged = len(self.stream.skipped)

    def _write(self, skip: Skip) -> None:
        if self.keeps_log:
            with (self.folder / SKIPPED_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"place": str(skip.place), "reason": skip.reason}, ensure_ascii=False) + "\n")


def prepare(sample: Sample, media: MediaConfig, style: Style | None) -> Sample:
    """A sample with the stage's options on media that set none, and with its reply in the form of its mode; as it is
    without `style`, and in a preference, whose replies are those of a model."""
    options = {name: value for name, value in media.model_dump().items() if value is not None}
    messages = tuple(_with_options(message, options) for message in sample.messages) if options else sample.messages
    if sample.rejected:
        learn = tuple(number == len(messages) - 1 for number in range(len(messages)))
        return replace(sample, messages=messages, learn=learn)
    if style is not None and not sample.plain:
        messages = rewrite(messages, sample.mode, style)
    return replace(sample, messages=messages)


def _with_options(message: Message, options: dict[str, Any]) -> Message:
    def change(part: str | Medium) -> str | Medium:
        if isinstance(part, str):
            return part
        known = {"min_pixels", "max_pixels"} if part.kind == "image" else options.keys()
        excluded = {"fps"} if "nframes" in part.options else {"nframes"} if "fps" in part.options else set()
        return replace(part, options={**{k: v for k, v in options.items() if k in known - excluded}, **part.options})

    return replace(message, parts=tuple(map(change, message.parts)))


class Batches(ABC):
    """The steps of one process: each takes `batch` samples, or as many as make `batch` packs. Every process reads all
    samples and loads the pixels of its own share."""

    def __init__(self, stage: FamilyStage, folder: Path, stream: SampleStream, rank: int, size: int) -> None:
        self.stage, self.rank, self.size = stage, rank, size
        self.reader = Reader(stage, folder, stream, keeps_log=rank == 0, check=self.check)

    def next(self) -> StepBatch | None:
        share = self.reader.epochs_done / self.stage.epochs if self.stage.epochs else 0.0
        samples = self._take()
        if not samples:
            return None
        figures = {"samples": float(len(samples)), "skipped": float(self.reader.skipped)}
        micro = self.make_micro(samples, figures)
        return StepBatch(micro, sum(map(self.weigh, samples)), self.reader.position, figures, share)

    def close(self) -> None:  # noqa: B027  # subclasses may leave it
        """Nothing is open."""

    def check(self, sample: LaidOut) -> None:  # noqa: B027  # subclasses may leave it
        """Raises `KeyeError` for a sample that cannot be learnt from."""

    @abstractmethod
    def weigh(self, sample: LaidOut) -> float:
        """What a sample adds to the denominator of the losses."""

    @abstractmethod
    def make_micro(self, samples: Sequence[LaidOut], figures: dict[str, float]) -> list[Any]:
        """The micro-batches of this process; adds to the figures of the step."""

    @property
    def is_packed(self) -> bool:
        """Whether a step holds as many samples as fit."""
        return self.stage.packing

    def _take(self) -> list[LaidOut]:
        room = self.stage.batch * (self.stage.max_tokens if self.is_packed else 1)
        samples: list[LaidOut] = []
        while (sample := self.reader.peek()) is not None:
            room -= sample.length if self.is_packed else 1
            if room < 0:
                break
            samples.append(sample)
            self.reader.take()
        return samples


class PackedBatches(Batches):
    """Packs of samples whose next tokens are learnt."""

    def __init__(self, stage: FamilyStage, folder: Path, stream: SampleStream, rank: int, size: int) -> None:
        super().__init__(stage, folder, stream, rank, size)
        self.cache = read_features(folder)

    def weigh(self, sample: LaidOut) -> float:
        return sample.learnt * sample.sample.weight

    def make_micro(self, samples: Sequence[LaidOut], figures: dict[str, float]) -> list[Any]:
        if self.is_packed:
            packs = pack(samples, self.stage.max_tokens)
        else:
            packs = [single for sample in samples for single in pack([sample], self.stage.max_tokens)]
        loads = [Load(each.length, sum(sample.visual_tokens for sample in each.samples)) for each in packs]
        own = [packs[number] for number in assign_packs(loads, self.size)[self.rank]]
        figures["tokens"] = float(sum(each.length for each in own))
        missing = -(-len(packs) // self.size) - len(own)
        return [*map(self.load, own), *(self._filler(packs[0]) for _ in range(missing))]

    def load(self, pack: Pack) -> Any:
        """The arrays of a pack."""
        return load(pack, self.cache)

    def _filler(self, pack: Pack) -> Any:
        """A micro-batch without learnt tokens, for the processes to take the same steps."""
        packed = load(pack, self.cache)
        return replace(packed, labels=np.full_like(packed.labels, IGNORE), weights=np.zeros_like(packed.weights))
