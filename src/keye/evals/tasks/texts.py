"""Tasks without media: following instructions (IFEval), calling functions (BFCL), writing programs (LiveCodeBench,
whose programs need a sandbox)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from keye.data.samples import BadRow
from keye.errors import KeyeError
from keye.evals.data.files import DataFolder, parse_list, read_rows
from keye.evals.tables import TableTask, text_part
from keye.evals.task import STRICT, EvalItem, ItemScore, ScoredItem, Summary, Task, TaskSettings, split_gold
from keye.scoring.official.instructions import check_instructions
from keye.scoring.official.registry import Document, find_scorer
from keye.scoring.strict.calls import find_calls, match_calls
from keye.scoring.strict.reasoning import strip_reasoning

LMMS: Final = ("lmms-eval-0.7.3", "lmms-eval-0.7.3-cli")


@dataclass(frozen=True, kw_only=True)
class IFEval(TableTask):
    """Instructions that rules can check. Score 1 where all of a prompt are followed; the rules are those of the
    benchmark, applied to the reply without its reasoning."""

    metric: str = "prompt level, strict"
    max_tokens: int = 2048

    def items(self, row: Mapping[str, Any], folder: DataFolder, settings: TaskSettings) -> Iterable[EvalItem]:
        """The prompt of a row."""
        names = parse_list(row["instruction_id_list"], "instruction_id_list")
        given_values = parse_list(row["kwargs"], "kwargs")
        document = {
            "instruction_id_list": names, "prompt": row["prompt"],
            "kwargs": [{key: value for key, value in dict(of).items() if value is not None} for of in given_values],
        }  # fmt: skip
        key = str(row.get("key", row["_row"]))
        yield EvalItem(key, key, (text_part(str(row["prompt"])),), document, {}, has_gold=bool(names))

    def score(self, document: Document, prediction: str) -> ItemScore:
        """Whether all instructions are followed."""
        return self.read_fields(check_instructions(document, strip_reasoning(prediction).answer), document)

    def read_fields(self, fields: Mapping[str, Any], document: Document) -> ItemScore:
        """`extracted` holds which instructions were followed, strictly and loosely."""
        strict = fields.get("strict") or []
        extracted = {"strict": list(strict), "loose": list(fields.get("loose") or [])}
        return ItemScore(float(bool(strict) and all(strict)), extracted, bool(fields.get("random")))

    def summarise(self, scored: Sequence[ScoredItem], scorer: str = STRICT) -> Summary:
        """Prompt level, strict; the other three rates are parts."""
        summary = super().summarise(scored, scorer)
        counted, _ = split_gold(scored)
        shares: dict[str, list[bool]] = {f"{level} level, {rule}": [] for rule in ("strict", "loose")
                                         for level in ("prompt", "instruction")}  # fmt: skip
        for entry in counted:
            count = len(entry.item.document["instruction_id_list"])
            for rule in ("strict", "loose"):
                passed = (entry.extracted or {}).get(rule) or [False] * count
                shares[f"prompt level, {rule}"].append(all(passed))
                shares[f"instruction level, {rule}"] += passed
        means = {name: 100 * sum(values) / len(values) for name, values in shares.items() if values}
        return replace(summary, parts={"rates": means})


_CATEGORY: Final = re.compile(r"BFCL_v\d+_(\w+)\.json")
#: Kinds of calls that are compared without running them, in Python.
_KINDS: Final = "simple simple_python multiple parallel parallel_multiple"
_CATEGORIES: Final = "|".join([*_KINDS.split(), *(f"live_{kind}" for kind in _KINDS.split())])


@dataclass(frozen=True, kw_only=True)
class BFCL(TableTask):
    """Calls of functions, compared with the possible answers that lie in the folder `possible_answer`; kinds that run
    programs or several turns are not read. Functions are described in the system message, calls are read from the
    reply's text. The headline is the mean over categories."""

    metric: str = "mean over categories"

    def find_tables(self, data: DataFolder) -> list[Path]:
        """Questions only."""
        paths = [path for path in data.tables(self.tables) if path.parent.name != "possible_answer"]
        if not paths:
            raise KeyeError(f"{data.root} has no table of {self.title} (BFCL_v4_multiple.json ...): download "
                            f"{self.source} and name its folder")  # fmt: skip
        return paths

    def items(self, row: Mapping[str, Any], folder: DataFolder, settings: TaskSettings) -> Iterable[EvalItem]:
        """The question of a row, with the possible answers that its table of answers has for it."""
        name = str(row["id"])
        turns = parse_list(row["question"], "question")
        messages = turns[0] if turns and isinstance(turns[0], list) else turns
        table = Path(row["_place"].rpartition(":")[0])
        answer = row.get("possible_answer", row.get("ground_truth"))
        if answer is None:
            answer = _read_answers(table.parent / "possible_answer" / table.name).get(name)
        match = _CATEGORY.fullmatch(table.name)
        category = match[1] if match else str(row.get("category", name.rpartition("_")[0]))
        functions = parse_list(row["function"], "function")
        document = {"category": category, "functions": functions, "possible_answer": answer, "tuple_args": False}
        system = [str(message["content"]) for message in messages if message["role"] == "system"]
        question = "\n".join(str(message["content"]) for message in messages if message["role"] != "system")
        yield EvalItem(
            name, name, (text_part(question),), document, {"category": category},
            "\n\n".join([*system, _SYSTEM + json.dumps(functions, ensure_ascii=False)]), has_gold=bool(answer),
        )  # fmt: skip

    def score(self, document: Document, prediction: str) -> ItemScore:
        """Whether the calls are the expected ones."""
        calls = find_calls(prediction)
        return ItemScore(float(calls is not None and match_calls(calls, document["possible_answer"])), calls)

    def score_with(self, scorer: str, document: Document, prediction: str) -> ItemScore:
        """Their checker receives calls, ours reads them from the text for it."""
        if scorer == STRICT:
            return self.score(document, prediction)
        calls = find_calls(prediction)
        fields = find_scorer(self.scored_as, self.kind, scorer)(document, calls or [])
        return ItemScore(float(fields.get("valid") is True), calls)

    def summarise(self, scored: Sequence[ScoredItem], scorer: str = STRICT) -> Summary:
        """The mean over the categories that were asked."""
        summary = super().summarise(scored, scorer)
        means = summary.parts.get("category", {})
        return replace(summary, value=sum(means.values()) / len(means) if means else None)


_SYSTEM: Final = (
    "Call the functions that the question needs, and reply with nothing but a list of calls in Python syntax, as "
    "[name(argument=value, ...), ...]. These functions are there, described in JSON:\n"
)


@lru_cache(maxsize=32)
def _read_answers(path: Path) -> Mapping[str, Any]:
    """Possible answers by id."""
    rows = read_rows([path]) if path.is_file() else ()
    return {str(row["id"]): row.get("ground_truth") for _, row in rows if not isinstance(row, BadRow) and "id" in row}


@dataclass(frozen=True, kw_only=True)
class Unavailable(Task):
    """A task that is listed and cannot be run yet."""

    def read(self, folder: Path, settings: TaskSettings) -> Iterator[EvalItem]:
        """Says why not."""
        raise KeyeError(f"{self.title} cannot be run yet: {self.available}")

    def score(self, document: Document, prediction: str) -> ItemScore:
        """Says why not."""
        raise KeyeError(f"{self.title} cannot be scored yet: {self.available}")


TASKS = (
    IFEval(
        name="ifeval", title="IFEval", measures="instructions that rules can check", source="google/IFEval",
        licence="Apache-2.0", media="text", dimension="Instruction Following", official=LMMS, rows=541,
        tables=(r"[^/]*train[^/]*\.parquet", r"[^/]*ifeval[^/]*\.jsonl?", r"ifeval_input_data\.jsonl",
                r"[^/]*input_data[^/]*\.jsonl"),
        layouts=(("prompt", "instruction_id_list", "kwargs"),),
    ),
    BFCL(
        name="bfcl", title="BFCL (call matching)", measures="calling the right functions with the right arguments",
        source="gorilla-llm/Berkeley-Function-Calling-Leaderboard", licence="Apache-2.0", media="text",
        dimension="Agent", scored_as="bfcl_ast", official=("bfcl-eval-2026.3.23",),
        tables=(rf"BFCL_v\d+_(?:{_CATEGORIES})\.json",), layouts=(("id", "question", "function"),),
    ),
    Unavailable(
        name="livecodebench", title="LiveCodeBench v6", measures="programs that pass hidden tests",
        source="livecodebench/code_generation_lite", licence="not stated where we looked", media="text",
        dimension="Coding", metric="pass@1",
        available="keye has no sandbox for programs yet",
    ),
)  # fmt: skip
