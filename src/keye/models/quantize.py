"""A checkpoint to a quantised one, tensor by tensor: memory holds a few matrices at a time.

Work goes on in a folder beside the result, `.NAME.part`, whose journal lists the files that are complete, so that a run
that was ended goes on where it stopped. The folder takes its final name when it is complete.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from keye.config import KeyeConfig
from keye.errors import KeyeError, Option
from keye.files import DiskFull, unwritable
from keye.models.load import check_not_quantised, plan_model, torch_dtype
from keye.models.quant_fill import Fill, Importance, plain_state, quantized_weights, weight_fills
from keye.ops.quantized import QuantTensor
from keye.quant.policy import Policy, quantised_part
from keye.quant.search import Loss
from keye.units import format_bytes
from keye.weights.names import per_expert_modules
from keye.weights.open import open_weights
from keye.weights.safetensors import WEIGHTS_FILE, ShardWriter, group_names, write_index
from keye.weights.source import TensorSource, WeightsError, copy_all

#: Bytes of a file of the result: what a run that was ended does again at most.
SHARD_BYTES: Final = 1 << 30
#: Bytes of codes and numbers that are made before they are written.
BATCH_BYTES: Final = 256 << 20
REPORT_FILE: Final = "quantization.json"
_JOURNAL, _LOCK, _IMPORTANCE = "journal.jsonl", "lock", "importance.safetensors"
#: Small files of a checkpoint that are copied: data, never code.
_COPIED: Final = (".json", ".jinja", ".txt", ".model", ".md")
_NOT_COPIED: Final = ("config.json", "model.safetensors.index.json", REPORT_FILE)


@dataclass(frozen=True)
class Row:
    """One line of the table: a part in a format. `error` is relative, the root of squared errors over that of squared
    numbers; `weighted_error` counts each input by its mean squared activation. None where nothing is lost."""

    part: str
    format: str
    tensors: int
    source_bytes: int
    bytes: int
    error: float | None = None
    weighted_error: float | None = None


@dataclass(frozen=True)
class QuantReport:
    """What became of a checkpoint. Bytes are those of tensors; `dropped` are tensors that no forward pass reads, which
    the result leaves out. `calibration` says what inputs were counted by, None where they were not."""

    kind: str
    rows: tuple[Row, ...]
    dropped: tuple[str, ...] = ()
    dropped_bytes: int = 0
    calibration: str | None = None

    @property
    def source_bytes(self) -> int:
        return sum(row.source_bytes for row in self.rows)

    @property
    def bytes(self) -> int:
        return sum(row.bytes for row in self.rows)

    @property
    def share(self) -> float:
        """The part of the bytes of the source that are quantised."""
        return sum(row.source_bytes for row in self.rows if row.error is not None) / max(1, self.source_bytes)

    def to_dict(self) -> dict[str, Any]:
        """As quantization.json has it."""
        return {"version": 1, **asdict(self), "source_bytes": self.source_bytes, "bytes": self.bytes,
                "share_quantised": round(self.share, 6)}  # fmt: skip


def read_report(folder: Path) -> QuantReport | None:
    """The table that stands in a folder; None where there is none, or another program changed it."""
    try:
        raw = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
        rows = tuple(Row(**row) for row in raw["rows"])
        names = ("kind", "dropped_bytes", "calibration")
        report = QuantReport(rows=rows, dropped=tuple(raw["dropped"]), **{name: raw[name] for name in names})
        sums = (report.bytes, report.source_bytes, report.share, sum(row.error or 0.0 for row in rows))
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None
    is_sound = all(isinstance(value, int | float) for value in sums) and raw.get("version") == 1
    return (
        report if is_sound and all(isinstance(text, str) for row in rows for text in (row.part, row.format)) else None
    )


@dataclass
class _Unit:
    """A tensor of the result's state or a quantised matrix of it, and what fills it."""

    name: str
    shape: tuple[int, ...]
    target: QuantTensor | Tensor  # on the meta device
    fills: list[Fill] = field(default_factory=list)

    def allocate(self) -> QuantTensor | Tensor:
        if isinstance(self.target, QuantTensor):
            return QuantTensor.empty(self.target.format, self.target.shape)
        return torch.empty(self.target.shape, dtype=self.target.dtype)

    def tensors(self, target: QuantTensor | Tensor) -> dict[str, Tensor]:
        """The tensors of the files by name."""
        if isinstance(target, Tensor):
            return {self.name: target}
        minima = {} if target.minima is None else {f"{self.name}.minima": target.minima}
        return {f"{self.name}.codes": target.codes, f"{self.name}.scales": target.scales, **minima}

    @property
    def nbytes(self) -> int:
        return self.target.nbytes


def quantize_checkpoint(
    folder: Path, config: KeyeConfig, out: Path, policy: Policy, *,
    calibrate: Callable[[], Importance] | None = None, calibration: str | None = None, overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> QuantReport:  # fmt: skip
    """Writes the checkpoint in `folder` quantised to the new folder `out`. `calibrate` counts inputs, described by
    `calibration`; `on_progress` is called with the bytes of the source that are done and all. `KeyeError` with one
    sentence for a source that is cut short, holds NaN or is quantised already, a full disk, and an `out` that exists.
    """
    check_new_folder(out, overwrite=overwrite)
    tensors = open_weights(folder)
    check_not_quantised(tensors, config)
    model, fills, loading = plan_model(tensors, config, strict=True, policy=policy)
    units = _units(model.to(torch_dtype(config.dtype)), fills, tensors)
    work = _Work(folder, out, tensors, units, per_expert_modules(tensors))
    try:
        with work.open(json.dumps([policy.to_dict(), calibration])) as done:
            work.check_space(done)
            counts = work.importance(calibrate)
            losses = work.run(done, counts, on_progress)
            dropped = [tensors[name] for name in loading.ignored]
            report = QuantReport(
                policy.kind, tuple(_rows(units, losses, policy, tensors)), loading.ignored,
                sum(source.nbytes for source in dropped), calibration,
            )  # fmt: skip
            work.finish(model.config, report, overwrite=overwrite)
    except OSError as error:
        raise unwritable(out, error) from None
    return report


def check_new_folder(out: Path, *, overwrite: bool = False) -> None:
    """`KeyeError` where `out` cannot become a folder, or holds something else than an earlier result."""
    if not out.absolute().parent.is_dir() or out.name in ("", ".."):
        raise KeyeError(f"{out} cannot be written: name a new folder in one that exists")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir() or not (out / REPORT_FILE).exists():
        raise KeyeError(f"{out} exists and is not an earlier result of keye quantize: name another folder")
    if not overwrite:
        raise KeyeError("{} exists: name another folder, or give {}", out, Option("overwrite"))


def _units(model: torch.nn.Module, fills: Sequence[Fill], tensors: Mapping[str, TensorSource]) -> list[_Unit]:
    """What the result holds, in the order in which the source is read fastest."""
    units = {name: _Unit(name, tuple(t.shape), t) for name, t in plain_state(model).items()}
    units |= {name: _Unit(name, w.shape, w.tensor) for name, w in quantized_weights(model).items()}
    for step in fills:
        units[step.own].fills.append(step)
    filled = [unit for unit in units.values() if unit.fills]  # a tied head has none
    return sorted(filled, key=lambda unit: min(tensors[step.name].place for step in unit.fills))


def _rows(
    units: Sequence[_Unit], losses: Mapping[str, Loss], policy: Policy, tensors: Mapping[str, TensorSource]
) -> Iterator[Row]:
    """Lines of the table, quantised parts first, each by its size."""
    groups: dict[tuple[str, str, bool], list[_Unit]] = {}
    for unit in units:
        if isinstance(unit.target, QuantTensor):
            key = quantised_part(unit.name) or "other", str(unit.target.format), True
        else:
            key = policy.place_of(unit.name)[0], str(unit.target.dtype).removeprefix("torch."), False
        groups.setdefault(key, []).append(unit)
    sizes = {key: sum(unit.nbytes for unit in members) for key, members in groups.items()}
    for key in sorted(groups, key=lambda key: (not key[2], -sizes[key])):
        loss, members = Loss(), groups[key]
        for unit in members:
            loss.add(losses.get(unit.name, Loss()))
        source = sum(tensors[step.name].nbytes for unit in members for step in unit.fills)
        error, weighted = (loss.relative, loss.weighted or None) if key[2] else (None, None)
        yield Row(key[0], key[1], len(members), source, sizes[key], error, weighted)


class _Work:
    """The folder in which a result comes to be."""

    def __init__(
        self, source: Path, out: Path, tensors: Mapping[str, TensorSource], units: Sequence[_Unit],
        per_expert: set[str],
    ) -> None:  # fmt: skip
        self.source, self.out, self.tensors, self.per_expert = source, out, tensors, per_expert
        self.partial = out.with_name(f".{out.name}.part")
        names = group_names({unit.name: unit.nbytes for unit in units}, SHARD_BYTES)
        by_name = {unit.name: unit for unit in units}
        count = len(names)
        self.shards = {
            WEIGHTS_FILE if count == 1 else f"model-{i:05}-of-{count:05}.safetensors": [by_name[name] for name in group]
            for i, group in enumerate(names, 1)
        }

    @contextmanager
    def open(self, settings: str) -> Iterator[dict[str, dict[str, Loss]]]:
        """Makes or reopens the folder and keeps others out; the losses of the shards that are complete, by name. What
        an earlier run with other settings or another source left is removed."""
        self.partial.mkdir(exist_ok=True)
        with open(self.partial / _LOCK, "wb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise KeyeError(f"another process is writing {self.out}: wait for it, or name another folder") from None
            key, done = self._key(settings), self._read_journal()
            if done is None or done.pop("", None) != key:
                for file in self.partial.iterdir():
                    if file.name != _LOCK:
                        file.unlink()
                done = {}
                self._note({"source": key})
            yield {name: {own: Loss(**loss) for own, loss in losses.items()} for name, losses in done.items()}

    def _key(self, settings: str) -> str:
        """Changes with the source's tensors and files, the plan and the settings."""
        digest = hashlib.sha256(settings.encode())
        for name, source in sorted(self.tensors.items()):
            digest.update(f"{name} {source.shape} {source.dtype} {source.place}\n".encode())
        for file in sorted({source.place[0] for source in self.tensors.values()}):
            state = os.stat(file) if os.path.exists(file) else None
            digest.update(f"{file} {state and (state.st_size, state.st_mtime_ns)}\n".encode())
        digest.update(json.dumps({name: [u.name for u in units] for name, units in self.shards.items()}).encode())
        return digest.hexdigest()

    def _read_journal(self) -> dict[str, Any] | None:
        """Losses of complete shards by name and, under "", the key; None without a journal. A torn last line counts
        for nothing."""
        try:
            lines = (self.partial / _JOURNAL).read_text(encoding="utf-8").splitlines()
        except OSError:
            return None
        done: dict[str, Any] = {}
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:
                break
            if "source" in entry:
                done[""] = entry["source"]
            elif (self.partial / entry["shard"]).exists():
                done[entry["shard"]] = entry["losses"]
        return done

    def _note(self, entry: Mapping[str, Any]) -> None:
        with open(self.partial / _JOURNAL, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def check_space(self, done: Mapping[str, object]) -> None:
        """`DiskFull` where what is left to write does not fit."""
        needed = sum(unit.nbytes for name, units in self.shards.items() if name not in done for unit in units)
        free = shutil.disk_usage(self.partial).free
        if free < needed * 1.01:
            raise DiskFull(f"{format_bytes(needed)} are needed to write {self.out}, and {format_bytes(free)} are free "
                           "there: free some, or name a place on another disk")  # fmt: skip

    def importance(self, calibrate: Callable[[], Importance] | None) -> Importance | None:
        """What inputs count for; an earlier run's where it got as far."""
        if calibrate is None:
            return None
        from safetensors.torch import load_file, save_file

        path = self.partial / _IMPORTANCE
        if not path.exists():
            draft = self.partial / f"{_IMPORTANCE}.draft"
            save_file(dict(calibrate()), draft)
            draft.replace(path)
        return load_file(path)

    def run(
        self, done: Mapping[str, dict[str, Loss]], counts: Importance | None,
        on_progress: Callable[[int, int], None] | None,
    ) -> dict[str, Loss]:  # fmt: skip
        """Writes the shards that are not complete; returns what each matrix lost."""
        losses: dict[str, Loss] = {}
        report = on_progress or (lambda done, total: None)
        sizes = {unit.name: sum(self.tensors[step.name].nbytes for step in unit.fills)
                 for units in self.shards.values() for unit in units}  # fmt: skip
        total, reached = sum(sizes.values()), 0
        for name, units in self.shards.items():
            if name in done:
                losses |= done[name]
                reached += sum(sizes[unit.name] for unit in units)
                report(reached, total)
                continue
            shapes = {own: (t.dtype, tuple(t.shape)) for unit in units for own, t in unit.tensors(unit.target).items()}
            draft = self.partial / f"{name}.draft"
            own: dict[str, Loss] = {}
            with ShardWriter(draft, shapes) as file:
                for batch in _batches(units):
                    self._write(file, batch, counts, own)
                    reached += sum(sizes[unit.name] for unit in batch)
                    report(reached, total)
            draft.replace(self.partial / name)
            self._note({"shard": name, "losses": {matrix: asdict(loss) for matrix, loss in own.items()}})
            losses |= own
        return losses

    def _write(
        self, file: ShardWriter, units: Sequence[_Unit], counts: Importance | None, losses: dict[str, Loss]
    ) -> None:
        """Reads, quantises and writes a few tensors."""
        targets = {unit.name: unit.allocate() for unit in units}
        lost: list[tuple[str, Loss]] = []  # from several threads
        work = []
        for unit in units:
            target, fills = targets[unit.name], unit.fills
            if isinstance(target, QuantTensor):
                fills = list(weight_fills(
                    unit.name, target, (), self.per_expert, counts,
                    lambda _, loss, own=unit.name: lost.append((own, loss)),  # type: ignore[misc]
                ))  # fmt: skip
            work += [piece for step in fills for piece in step.work(self.tensors[step.name], target)]
        copy_all(work)
        for own, loss in lost:
            losses.setdefault(own, Loss()).add(loss)
        for unit in units:
            target = targets[unit.name]
            if isinstance(target, Tensor) and not bool(target.isfinite().all()):
                raise WeightsError(f"{unit.name} holds NaN or infinite numbers, which cannot be quantised")
            for own, tensor in unit.tensors(target).items():
                file.write(own, tensor)

    def finish(self, config: KeyeConfig, report: QuantReport, *, overwrite: bool) -> None:
        """Adds the small files and gives the folder its name."""
        for file in sorted(self.source.iterdir()) if self.source.is_dir() else ():
            is_data = file.suffix in _COPIED or file.name.startswith(("LICENSE", "NOTICE"))
            if is_data and file.name not in _NOT_COPIED and file.is_file():
                shutil.copyfile(file, self.partial / file.name)
        _write_json(self.partial / "config.json", config.raw)
        _write_json(self.partial / REPORT_FILE, report.to_dict())
        if len(self.shards) > 1:
            names = {name: [own for u in units for own in u.tensors(u.target)] for name, units in self.shards.items()}
            write_index(self.partial, names, report.bytes)
        for name in (_JOURNAL, _IMPORTANCE):
            (self.partial / name).unlink(missing_ok=True)
        if self.out.exists() and any(self.out.iterdir()):
            assert overwrite
            old = self.out.with_name(f".{self.out.name}.{os.getpid()}.{time.time_ns()}.old")
            self.out.rename(old)
            self.partial.rename(self.out)
            shutil.rmtree(old)
        else:
            self.partial.rename(self.out)
        (self.out / _LOCK).unlink(missing_ok=True)  # until here it keeps others out


def _batches(units: Sequence[_Unit]) -> Iterator[list[_Unit]]:
    """Units behind one another, so many that together they are about `BATCH_BYTES`."""
    batch: list[_Unit] = []
    for unit in units:
        batch.append(unit)
        if sum(each.nbytes for each in batch) >= BATCH_BYTES:
            yield batch
            batch = []
    if batch:
        yield batch


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
