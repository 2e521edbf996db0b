"""What the numbers of `checkup` say: ranges of a healthy model, and what is wrong where they are missed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

from keye.config import KeyeConfig, read_json
from keye.errors import KeyeError
from keye.evals.health.checkup import Probes
from keye.files import is_json_with, output_file
from keye.hub import asset

Cause = Literal["template", "frame text", "conversion", "quantisation", "unclear"]
Range = tuple[float, float]
#: Probes of the weights alone: keye's own template and frame text are used, or none.
_OF_WEIGHTS: Final = ("text", "pictures_own", "times_own")
#: Nats by which answers under the template or the frame text in use may be less likely than under keye's own.
GAP: Final = 1.5
#: Fewest different values in 64 numbers of a row: int4 with a scale for each 128 numbers has more.
LEAST_LEVELS: Final = 9.0
#: Ranges of the published models. They are what no healthy model can miss, and not measured on real weights.
STATED: Final[Mapping[str, Range]] = {
    "levels": (LEAST_LEVELS, 64.0), "text": (0.5, 4.5), "pictures": (0.0, 6.0), "pictures_own": (0.0, 6.0),
    "times": (0.0, 6.0), "times_own": (0.0, 6.0), "demo": (0.2, 1.0), "word": (1.0, 1.0), "box": (0.3, 1.0),
    "frameforge": (0.25, 1.0),
}  # fmt: skip
_SENTENCES: Final[Mapping[Cause, str]] = {
    "template": "the prompt format looks wrong: known answers are likely under keye's own template and not under the "
                "one in use; try --template keye, and compare the checkpoint's chat template with the original",
    "frame text": "the text before video frames looks wrong: answers about times are likely under keye's own and not "
                  "under the one in use; check frame_text in preprocessor_config.json",
    "conversion": "the weights look wrongly converted: known answers are unlikely under any prompt, though the numbers "
                  "are not coarse; compare names, order and layout of tensors with the original, and config.json, "
                  "tokenizer.json and preprocessor_config.json, which spoil answers in the same way",
    "quantisation": "the quantisation looks too coarse: the weights have few different values and answers are wrong; "
                    "take int8, or int4 with smaller groups",
    "unclear": "answers are worse than they should be, but no cause stands out: check sampling and media settings",
}  # fmt: skip


@dataclass(frozen=True)
class Ranges:
    """What each probe of a healthy model lies in; None for what the model cannot do. `measured` on its real weights,
    or only stated."""

    model: str
    measured: bool
    ranges: Mapping[str, Range | None]


@dataclass(frozen=True)
class Verdict:
    """`missed` are the probes out of range; `cause` is None for a healthy model."""

    cause: Cause | None
    missed: tuple[str, ...]
    sentence: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def ranges_of(config: KeyeConfig, file: Path | None = None) -> Ranges:
    """The ranges in a file, those measured on keye-nano for that, else the stated ones of the release."""
    if file is None and is_nano(config):
        file = asset("nano/doctor.json")
    return Ranges(f"Keye-VL {config.release.name}", False, STATED) if file is None else read_ranges(file)


def is_nano(config: KeyeConfig) -> bool:
    """Whether a model has the geometry of keye-nano: converted and quantised forms of it do."""
    nano = read_json(asset("nano/config.json"))
    names = ("hidden_size", "num_hidden_layers", "vocab_size", "num_experts", "moe_intermediate_size")
    return all(getattr(config.text, name) == nano.get(name) for name in names)


def read_ranges(file: Path) -> Ranges:
    """Ranges that `keye doctor --save-ranges` wrote; `KeyeError` for any other file."""
    raw = read_json(file)
    ranges = raw.get("ranges")
    if not isinstance(ranges, dict) or set(ranges) != set(STATED) or not all(map(_is_range, ranges.values())):
        raise KeyeError(f"{file} holds no ranges for {', '.join(STATED)}: make one with keye doctor --save-ranges")
    own = {name: None if value is None else (float(value[0]), float(value[1])) for name, value in ranges.items()}
    return Ranges(str(raw.get("model")), True, own)


def _is_range(value: object) -> bool:
    if value is None:
        return True
    if not isinstance(value, list) or len(value) != 2:
        return False
    return all(isinstance(number, int | float) and not isinstance(number, bool) for number in value)


def is_ranges_file(file: Path) -> bool:
    """Whether a file is one that may be replaced."""
    return is_json_with(file, frozenset({"model", "probes", "ranges"}))


def save_ranges(file: Path, model: str, probes: Probes) -> None:
    """Writes ranges around what a healthy model shows, wide enough for its int8 and int4 forms."""
    text = json.dumps({"model": model, "probes": probes, "ranges": widen(probes)}, indent=2)
    with output_file(file) as draft:
        draft.write_text(f"{text}\n", encoding="utf-8")


def widen(probes: Probes) -> dict[str, Range | None]:
    """Ranges around the probes of a healthy model."""
    nats = {name: (0.0, round(probes[name] + 0.5, 4)) for name in ("pictures", "pictures_own", "times", "times_own")}
    scores = {name: None if probes[name] == 0 else (round(max(0.0, probes[name] - margin), 4), 1.0)
              for name, margin in (("demo", 0.25), ("word", 0.0), ("box", 0.25), ("frameforge", 0.15))}  # fmt: skip
    text = (round(probes["text"] - 1.5, 4), round(probes["text"] + 1.5, 4))
    return {"levels": (LEAST_LEVELS, 64.0), "text": text, **nats, **scores}


def conclude(probes: Probes, ranges: Ranges) -> Verdict:
    """What the probes say. Damaged weights come first: they spoil all else."""
    missed = tuple(name for name, value in probes.items() if not _lies_in(value, ranges.ranges.get(name)))
    answers = [name for name in missed if name != "levels"]
    if not answers:
        return Verdict(None, missed, "template, frame text, conversion and quantisation look right")
    cause: Cause = "unclear"
    if "levels" in missed and probes["levels"] > 1:  # weights that are all alike are missing, not coarse
        cause = "quantisation"
    elif "levels" in missed or any(name in missed for name in _OF_WEIGHTS):
        cause = "conversion"
    elif "pictures" in missed or probes["pictures"] > probes["pictures_own"] + GAP:
        cause = "template"
    elif "times" in missed or probes["times"] > probes["times_own"] + GAP:
        cause = "frame text"
    return Verdict(cause, missed, _SENTENCES[cause])


def _lies_in(value: float, wanted: Range | None) -> bool:
    return wanted is None or wanted[0] <= value <= wanted[1]
