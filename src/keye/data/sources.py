"""Sets of data as a stream of samples: weighted, shuffled, the same for the same seed, resumed at any sample.

Rows that cannot be learnt from are skipped and counted, with their place; too many of them are an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

from keye.data.files.open import open_rows
from keye.data.files.rows import RowFile
from keye.data.formats import grounding
from keye.data.formats.context import Context, GroundQuestion, Notes, Paths, default_question
from keye.data.formats.detect import convert, explain_unknown, find_format, name_fields, orient_columns, rename_fields
from keye.data.formats.events import EventRows, JoinedRows
from keye.data.formats.registry import find_registered, read_registry
from keye.data.mixing import Mixer, Order, derive_key, quota
from keye.data.samples import BadRow, Place, Sample, Skip
from keye.errors import KeyeError, is_number

#: Share of rows that may be bad, counted from the first `_LENIENT` rows on.
MAX_BAD: Final = 0.01
_LENIENT: Final = 1000
#: Skips that are kept with their reasons; the rest is counted.
MAX_SKIPS: Final = 10_000
#: Rows that are looked at to see what the others are.
_LOOKED_AT: Final = 100
_SAMPLE: Final = re.compile(r"#(\d+(?:\.\d+)?%|\d+)\Z")


@dataclass(frozen=True)
class DataSet:
    """Files of rows and how they are used.

    `path` is a file or a folder of files. Each row comes `weight` times an epoch. `sample` takes a part of the rows:
    "#2000" that many, "50%" a share; which ones follows from the seed. `columns` maps names of the files to ours.
    `root` is where relative names of media begin, by default the folder of the file. `mode` holds for rows without one.
    `subset` names a set of a `dataset_info.json` (LLaMA-Factory), which `path` or its folder is.
    """

    path: Path
    weight: float = 1.0
    sample: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    root: Path | None = None
    mode: str | None = None
    subset: str | None = None

    def __post_init__(self) -> None:
        if not is_number(self.weight) or not 0 < self.weight <= 1e6:
            raise KeyeError(f"the weight of {self.path} is {self.weight!r}; give a number above 0")
        if self.sample is not None:
            self.count(1)

    @classmethod
    def parse(cls, text: str, **options: Any) -> DataSet:
        """The set that `PATH` names, a part of it by `PATH#2000` or `PATH#50%`, one of several by `PATH:NAME`."""
        if not Path(text).exists() and (match := _SAMPLE.search(text)) is not None:
            options["sample"] = match[1] if match[1].endswith("%") else f"#{match[1]}"
            text = text[: match.start()]
        path, colon, name = text.rpartition(":")
        if colon and name and not Path(text).exists() and read_registry(Path(path)) is not None:
            text, options["subset"] = path, name
        return cls(Path(text), **options)

    def count(self, rows: int) -> int:
        """How many of `rows` are used; more than there are means that some come again."""
        if self.sample is None:
            return rows
        number = self.sample.removeprefix("#").removesuffix("%")
        try:
            value = Fraction(number)
        except (ValueError, ZeroDivisionError):
            raise KeyeError(f"the sample of {self.path} is {self.sample!r}; write #2000 or 50%") from None
        count = round(value * rows / 100) if self.sample.endswith("%") else int(value)
        if not 0 < value <= 10**12:
            raise KeyeError(f"the sample of {self.path} is {self.sample!r}; write #2000 or 50%")
        return max(count, 1)


class OpenSet:
    """A set whose files are opened: its rows by number, as samples."""

    def __init__(self, dataset: DataSet, rows: RowFile, context: Context) -> None:
        self.dataset, self.rows, self.context = dataset, rows, context
        if not len(rows):
            raise KeyeError(f"{dataset.path} has no rows")
        self.count = dataset.count(len(rows))
        self.quota = quota(self.count, dataset.weight)

    def order(self, seed: int, epoch: int) -> Order:
        """In which order the rows come in an epoch."""
        return Order(len(self.rows), self.count, seed, epoch, self.rows.blocks, self.rows.window)

    def sample(self, index: int) -> Sample:
        """The sample of a row. Raises `BadRow` for one that cannot be learnt from."""
        try:
            return convert(self.rows.read(index), self.context)
        except KeyeError:
            raise
        except (TypeError, ValueError, LookupError, AttributeError, RecursionError) as error:
            # Of a kind that no format foresees: one row must not end a run of hours.
            raise BadRow(f"the row has values that mean nothing ({type(error).__name__}: {error})") from error

    def indices(self, seed: int, number: int) -> Sequence[int]:
        """The rows that a run with this seed uses, in which it is the set `number`."""
        if self.count >= len(self.rows):
            return range(len(self.rows))
        order = self.order(derive_key(seed, "set", number), 0)
        return sorted(order[place] for place in range(self.count))

    @property
    def identity(self) -> dict[str, Any]:
        """What has to be the same when a run resumes."""
        return {
            "path": self.dataset.path.name, "rows": len(self.rows), "digest": self.rows.digest,
            "weight": self.dataset.weight, "sample": self.dataset.sample, "columns": dict(self.dataset.columns),
            "subset": self.dataset.subset,
        }  # fmt: skip


def open_set(dataset: DataSet, *, ground_question: GroundQuestion = default_question, paths: Paths | None = None,
             opens: bool = True) -> OpenSet:  # fmt: skip
    """Opens the files of a set. `KeyeError` where they cannot be read or no format fits them."""
    folder = dataset.path if dataset.path.is_dir() else dataset.path.parent
    root = (dataset.root or folder).absolute()
    if not root.is_dir():
        raise KeyeError(f"{root} is not a folder; give the folder in which the media of {dataset.path} begin")
    path, prepare = dataset.path, None
    if dataset.subset is not None or read_registry(dataset.path) is not None:
        registered = find_registered(dataset.path, dataset.subset)
        path, prepare = registered.path, registered.prepare
        if registered.count is not None and dataset.sample is None:
            dataset = replace(dataset, sample=f"#{registered.count}")
    rows = open_rows(path)
    context = Context(
        root, dataset.columns, ground_question, dataset.mode, opens, prepare, paths=Paths() if paths is None else paths
    )
    return OpenSet(dataset, *_find_rows(rows, context, dataset.path))


def _find_rows(rows: RowFile, context: Context, where: Path) -> tuple[RowFile, Context]:
    """The rows as they are learnt: those of several events parted, those of one event joined. The first rows decide."""
    looked_at, is_known, charades, events, moments = list[Mapping[str, Any]](), False, 0, 0, 0
    for index in range(min(_LOOKED_AT, len(rows))):
        with suppress(BadRow):
            fields = rows.read(index).fields
            looked_at.append(fields if context.prepare is None else context.prepare(fields))
    present = dict.fromkeys(name for fields in looked_at for name in fields)
    context = replace(context, columns=orient_columns(context.columns, present, where))
    for raw in looked_at:
        fields = rename_fields(raw, context.columns)
        known = find_format(tuple(fields))
        charades += tuple(fields) == ("text",) and bool(grounding.CHARADES.fullmatch(str(fields["text"]).strip()))
        with suppress(BadRow):
            events += grounding.events_of(fields) is not None
        moments += known is not None and known.read is grounding.read_moment and "start" in fields
        is_known = is_known or bool(events) or known is not None
    if present and not is_known:
        raise KeyeError(f"{where}: {explain_unknown(present)}")
    if charades:
        context = replace(context, charades=True)
    if events:
        rows = EventRows(rows, lambda fields: grounding.events_of(name_fields(fields, context)))
        context = replace(context, columns={}, prepare=None)
    elif moments:
        rows = JoinedRows(rows, lambda fields: grounding.event_key(name_fields(fields, context)))
    return rows, context


def open_samples(
    sets: Sequence[DataSet],
    *,
    seed: int,
    epochs: float | None,
    state: Mapping[str, Any] | None = None,
    ground_question: GroundQuestion = default_question,
) -> SampleStream:
    """The samples of all sets: the same for the same sets and seed, on from `state` where there is one.

    With `epochs` None they never end. `ground_question` words the question when an event happens
    (`functools.partial(keye.sessions.search.questions.ground_question, config)` is what `keye ground` asks). Raises
    `KeyeError` for files that cannot be read, and for a state of other sets or of files that have changed.
    """
    if not sets:
        raise KeyeError("no data was named; give at least one file of samples")
    if epochs is not None and not (is_number(epochs) and epochs > 0):
        raise KeyeError(f"epochs is {epochs!r}; give a number above 0")
    return SampleStream([open_set(dataset, ground_question=ground_question) for dataset in sets], seed, epochs, state)


def are_too_many(bad: int, rows: int) -> bool:
    """Whether so many bad ones of `rows` that were read end a run."""
    return bad > max(_LENIENT * MAX_BAD, MAX_BAD * rows)


class SampleStream(Iterator[Sample]):
    """Samples of several sets; `open_samples` makes one.

    `skipped` has the rows that were left out, each once. `epoch_samples` rows are an epoch.
    """

    def __init__(
        self, sets: Sequence[OpenSet], seed: int, epochs: float | None, state: Mapping[str, Any] | None
    ) -> None:
        self.sets, self.seed = sets, seed
        self.epoch_samples = sum(opened.quota for opened in sets)
        self._end = None if epochs is None else max(1, round(epochs * self.epoch_samples))
        self.skipped: list[Skip] = []
        self._places = set[Place]()
        self._epoch = self._read = self._bad = 0
        counts = None
        if state is not None:
            self._check(state)
            self._epoch, self._read, self._bad = (int(state[name]) for name in ("epoch", "read", "bad"))
            counts = [int(count) for count in state["counts"]]
        self._start_epoch(counts)

    @property
    def epochs_done(self) -> float:
        """Passes so far."""
        return self._read / self.epoch_samples

    @property
    def notes(self) -> dict[str, int]:
        """What was tolerated in the rows so far, and how often."""
        return dict(sum((opened.context.notes.counts for opened in self.sets), start=Notes().counts))

    def state(self) -> dict[str, Any]:
        """Where the stream is after the last sample, as data for JSON; `open_samples` goes on from it."""
        return {
            "epoch": self._epoch, "counts": list(self._mixer.counts), "read": self._read, "bad": self._bad,
            "seed": self.seed, "sets": [opened.identity for opened in self.sets],
        }  # fmt: skip

    def __next__(self) -> Sample:
        while True:
            if self._end is not None and self._read >= self._end:
                self._check_bad(at_end=True)
                raise StopIteration
            drawn = self._mixer.take()
            if drawn is None:
                self._check_bad(at_end=True)
                self._epoch += 1
                self._start_epoch(None)
                continue
            number, before = drawn
            opened, index = self.sets[number], self._orders[number][before]
            self._read += 1
            try:
                return opened.sample(index)
            except BadRow as error:
                self._skip(Skip(opened.rows.place(index), str(error)))

    def _start_epoch(self, counts: Sequence[int] | None) -> None:
        self._mixer = Mixer([opened.quota for opened in self.sets], derive_key(self.seed, "mix", self._epoch), counts)
        self._orders = [
            opened.order(derive_key(self.seed, "set", number), self._epoch) for number, opened in enumerate(self.sets)
        ]

    def _skip(self, skip: Skip) -> None:
        self._bad += 1
        if skip.place not in self._places and len(self.skipped) < MAX_SKIPS:
            self._places.add(skip.place)
            self.skipped.append(skip)
        self._check_bad(at_end=False)

    def _check_bad(self, *, at_end: bool) -> None:
        """`KeyeError` where too many rows are bad; the first thousand of an epoch decide nothing before its end."""
        last = f"; the last is {self.skipped[-1]}" if self.skipped else ""
        if at_end and self._bad >= self._read:
            if self._read == 1 and self.skipped:
                raise KeyeError(f"the only row cannot be learnt from: {self.skipped[-1]}")
            raise KeyeError(f"none of the {self._read:,} rows can be learnt from{last}")
        if (at_end or self._read >= _LENIENT) and are_too_many(self._bad, self._read):
            raise KeyeError(
                f"{self._bad:,} of {self._read:,} rows cannot be learnt from, more than {MAX_BAD:.0%}{last}"
            )

    def _check(self, state: Mapping[str, Any]) -> None:
        """`KeyeError` where the state is of other data."""
        try:
            before, seed = list(state["sets"]), state["seed"]
        except (KeyError, TypeError):
            raise KeyeError("the state of the data is damaged; start the run without it") from None
        if seed != self.seed or len(before) != len(self.sets):
            raise KeyeError(f"the run had {len(before)} sets and seed {seed}, now {len(self.sets)} and {self.seed}; "
                            "resume with the same data, or start again")  # fmt: skip
        for was, opened in zip(before, self.sets, strict=True):
            now = opened.identity
            if changed := [name for name in now if now[name] != was.get(name)]:
                what = "content" if changed[0] == "digest" else changed[0]
                raise KeyeError(f"{opened.dataset.path} has changed since the run began (its {what}); put the file "
                                "back, or start the run again")  # fmt: skip
