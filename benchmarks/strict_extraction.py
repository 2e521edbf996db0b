"""Shares of answers that the strict extraction finds, and of those that it invents: letters and spans of time.

Run: `python -m benchmarks.strict_extraction --golden ../shared/golden-evals`; prints JSON. Counted are

- the forms of golden files whose author noted what is meant (`input.meant`);
- forms of our own (tests/scoring/forms): half of them were read while rules were written (`tuning`), the other half
  was left out before any rule was tried (`heldout`). One author wrote both halves and the rules, so the held-out share
  is higher than on forms of others;
- a control: predictions of the golden files in shuffled order; what is "found" then is chance.

A span is found if both ends are within a second of what is meant. Golden forms whose meaning is not clear from the text
(`UNCLEAR_TAGS`: refusals, single moments, "the end", numbers of frames, times outside of the video ...) are counted
apart.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keye.scoring.strict.letters import find_letter
from keye.scoring.strict.spans import find_span

FORMS = Path(__file__).parents[1] / "tests" / "scoring" / "forms"
GOLDEN = Path(__file__).parents[1] / "tests" / "evals" / "golden"
#: Tags of golden spans of which the text does not say what its author meant, or says nothing.
UNCLEAR_TAGS = frozenset({
    "equal", "instant", "instant mmss", "one num", "neg both", "thousand", "thousand2", "leading dot", "percent",
    "frames", "two spans late gt", "inf", "start", "whole", "none", "refuse", "empty", "blank", "huge", "zeros",
    "sec 75", "big min", "3 digit min", "4 part", "hmmss far",
})  # fmt: skip


@dataclass(frozen=True)
class Form:
    """A prediction, what it was asked with (options, or the duration of the video) and what it means."""

    tag: str
    prediction: str
    question: Any
    meant: Any


def read_forms(kind: str, part: str) -> list[Form]:
    """Our own forms: `kind` letters or spans, `part` tuning or heldout."""
    key = "options" if kind == "letters" else "duration"
    rows = [json.loads(line) for line in (FORMS / f"{kind}_{part}.jsonl").read_text().splitlines()]
    return [Form(row["prediction"], row["prediction"], row[key], row["meant"]) for row in rows]


def read_golden_letters(folder: Path) -> Iterator[Form]:
    """Multiple choice of all golden files of a folder."""
    for path in sorted(folder.glob("*.jsonl")):
        for record in map(json.loads, path.read_text().splitlines()):
            document = record["input"]
            options = document.get("options") or document.get("choices") if isinstance(document, dict) else None
            if record["kind"] == "item" and options and "meant" in document:
                yield Form(record["tag"], record["prediction"], _list_options(options), document["meant"])


def _list_options(options: Any) -> list[str]:
    if isinstance(options, dict):
        return list(options.values())
    return options.split("\n") if isinstance(options, str) else options


def read_golden_spans(folder: Path) -> Iterator[Form]:
    """Items of the golden file of grounding; nothing where the folder has none."""
    path = folder / "timelens.jsonl"
    for record in map(json.loads, path.read_text().splitlines() if path.exists() else []):
        document = record["input"]
        if record["kind"] == "item" and document.get("meant"):
            yield Form(record["tag"], record["prediction"], document.get("duration"), document["meant"])


def find_form_letter(form: Form) -> str | None:
    """The letter that is found in a form."""
    return find_letter(form.prediction, form.question)


def find_form_span(form: Form) -> tuple[float, float] | None:
    """The span that is found in a form."""
    return find_span(form.prediction, duration=form.question)


def is_right(answer: Any, meant: Any) -> bool:
    """Whether an answer is the one that is meant: the same letter, or both ends within a second."""
    if isinstance(meant, list) and answer is not None:
        return all(abs(ours - theirs) <= 1 for ours, theirs in zip(answer, sorted(meant), strict=True))
    return bool(answer == meant)


def count(forms: Iterable[Form], find: Callable[[Form], Any]) -> dict[str, Any]:
    """Shares of forms that are found and of those without an answer that get one; what was missed."""
    forms = list(forms)
    answers = [(form, find(form)) for form in forms]
    meant = [(form, answer) for form, answer in answers if form.meant is not None]
    none = [(form, answer) for form, answer in answers if form.meant is None]
    missed = sorted({form.tag[:60] for form, answer in answers if not is_right(answer, form.meant)})
    return {
        "forms": len(forms),
        "found": round(sum(is_right(answer, form.meant) for form, answer in meant) / max(1, len(meant)), 4),
        "invented": round(sum(answer is not None for _, answer in none) / max(1, len(none)), 4),
        "none_meant": len(none),
        "missed": missed,
    }  # fmt: skip


def count_shuffled(forms: list[Form], find: Callable[[Form], Any]) -> float:
    """The share that is found when every document gets the prediction of another."""
    predictions = [form.prediction for form in forms]
    random.Random(0).shuffle(predictions)
    pairs = [Form(form.tag, text, form.question, form.meant) for form, text in zip(forms, predictions, strict=True)]
    return float(count([form for form in pairs if form.meant is not None], find)["found"])


def time_forms(forms: list[Form], find: Callable[[Form], Any], predictions: int = 20_000) -> float:
    """CPU seconds of 100,000 predictions on one core, from `predictions` of them."""
    begin = time.process_time()
    for index in range(predictions):
        find(forms[index % len(forms)])
    return round((time.process_time() - begin) * 100_000 / predictions, 2)


def measure(golden: Path) -> dict[str, Any]:
    """All shares, as printed."""
    letters, spans = list(read_golden_letters(golden)), list(read_golden_spans(golden))
    clear = [form for form in spans if form.tag not in UNCLEAR_TAGS]
    result: dict[str, Any] = {"letters": {"golden": count(letters, find_form_letter)}, "spans": {}}
    result["letters"]["golden_shuffled"] = count_shuffled(letters, find_form_letter)
    result["letters"]["seconds_per_100000"] = time_forms(letters, find_form_letter)
    if clear:
        result["spans"]["golden"] = count(clear, find_form_span)
        unclear = [form for form in spans if form.tag in UNCLEAR_TAGS]
        result["spans"]["golden_unclear"] = count(unclear, find_form_span)
        result["spans"]["golden_shuffled"] = count_shuffled(clear, find_form_span)
        result["spans"]["seconds_per_100000"] = time_forms(spans, find_form_span)
    for part in ("tuning", "heldout"):
        result["letters"][part] = count(read_forms("letters", part), find_form_letter)
        result["spans"][part] = count(read_forms("spans", part), find_form_span)
    for part in ("letters", "spans"):  # what held-out forms miss is not shown: rules are not to be written for them
        del result[part]["heldout"]["missed"]
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--golden", type=Path, default=GOLDEN, help="folder of golden files (default: the committed part)"
    )
    print(json.dumps(measure(parser.parse_args().golden), indent=1, ensure_ascii=False))
