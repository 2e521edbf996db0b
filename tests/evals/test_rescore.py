"""Predictions that others made: every layout is read, rows are matched with data, and unknown files get a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from keye.errors import KeyeError
from keye.evals.results.predictions import read_predictions
from keye.evals.results.rescore import rescore
from keye.evals.run import ModelFacts, RunOptions, export_predictions, run_task
from keye.evals.settings import RunSettings
from tests.evals.fake_task import OPTIONS, TASK, FakeWorker, number_of, reply, right, write_data

GOLDS = ["A", "B", "C", "D"]
TEXTS = ["A", "B", "D", "none of them"]
PAIRS = list(enumerate(zip(GOLDS, TEXTS, strict=True)))


def lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def table(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".xlsx":
        openpyxl = pytest.importorskip("openpyxl")
        book = openpyxl.Workbook()
        for cells in [list(rows[0]), *(list(row.values()) for row in rows)]:
            book.active.append(cells)
        book.save(path)
        return path
    quoted = [[f'"{value}"' for value in row.values()] for row in rows]
    path.write_text("\n".join("\t".join(cells) for cells in [list(rows[0]), *quoted]) + "\n", encoding="utf-8")
    return path


def vlmevalkit_rows() -> list[dict]:
    letters = dict(zip("ABCD", ("red", "green", "blue", "grey"), strict=True))
    pairs = zip(GOLDS, TEXTS, strict=True)
    return [
        {"index": number, "question": "Which?", **letters, "answer": gold, "prediction": text}
        for number, (gold, text) in enumerate(pairs)
    ]


LAYOUTS = {
    "lmms-eval.jsonl": lambda path: lines(path, [
        {"doc_id": n, "doc": {"id": f"x{n}", "answer": gold, "options": OPTIONS}, "target": gold, "resps": [[text]],
         "filtered_resps": [text.lower()], "doc_hash": "h"}
        for n, (gold, text) in PAIRS
    ]),
    "lmms-eval-new.jsonl": lambda path: lines(path, [
        {"doc_id": n, "target": gold, "filtered_resps": text, "input": "Which?", "letters_score": {"video": "v"}}
        for n, (gold, text) in PAIRS
    ]),
    "vlmevalkit.tsv": lambda path: table(path, vlmevalkit_rows()),
    "vlmevalkit.xlsx": lambda path: table(path, vlmevalkit_rows()),
    "plain.jsonl": lambda path: lines(path, [
        {"id": f"x{n}", "prediction": text, "answer": gold} for n, (gold, text) in PAIRS
    ]),
    "responses.jsonl": lambda path: lines(path, [
        {"question_id": n, "response": text, "gt": gold} for n, (gold, text) in PAIRS
    ]),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_score(name: str, tmp_path: Path) -> None:
    result = rescore(LAYOUTS[name](tmp_path / name), TASK, ["strict"])
    strict = result["scorers"]["strict"]
    assert (strict["value"], strict["n"], strict["unparsed"]) == (50.0, 4, 0.25)
    assert result["source"]["layout"] == {"lm": "lmms-eval", "vl": "vlmevalkit"}.get(name[:2], "lines")


def test_raw_text_counts_and_not_what_filters_left(tmp_path: Path) -> None:
    path = LAYOUTS["lmms-eval.jsonl"](tmp_path / "a.jsonl")
    _, rows = read_predictions(path)
    assert [row.text for row in rows] == TEXTS


def test_our_own_predictions_give_the_score_of_the_run(tmp_path: Path) -> None:
    data, out = write_data(tmp_path / "data", 12), tmp_path / "out"
    worker = FakeWorker(lambda item: right(item) if number_of(item) % 3 else reply("A"))
    first = run_task(TASK, data, RunSettings(), out, RunOptions(lambda: [worker], ModelFacts("m")))
    again = rescore(out / "letters" / "predictions.jsonl", TASK, ["strict"], output=tmp_path / "again")
    assert again["scorers"] == first["scorers"] and again["clusters"] == first["clusters"]
    assert (tmp_path / "again" / "result.json").is_file()


def test_items_without_gold_stay_uncounted(tmp_path: Path) -> None:
    rows = [
        {"line_digest": "x", "id": str(n), "prediction": "A", "error": None, "has_gold": n < 2,
         "document": {"answer": "A", "options": list("wxyz")}}
        for n in range(5)
    ]  # fmt: skip
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures = rescore(path, TASK, ["strict"])["scorers"]["strict"]
    assert figures["n"] == 2 and figures["value"] == 100


@pytest.mark.parametrize("form", ["lmms-eval", "vlmevalkit"])
def test_exports_are_read_back(form: str, tmp_path: Path) -> None:
    data, out = write_data(tmp_path / "data", 12), tmp_path / "out"
    worker = FakeWorker(lambda item: right(item) if number_of(item) % 3 else reply('"A"\tor\nB'))
    first = run_task(TASK, data, RunSettings(), out, RunOptions(lambda: [worker], ModelFacts("m")))
    path = export_predictions(out / "letters", form)
    for folder in (None, data):
        again = rescore(path, TASK, ["strict"], folder=folder)
        assert again["scorers"]["strict"]["value"] == first["scorers"]["strict"]["value"]
        assert again["source"]["layout"] == form and again["clusters"] == first["clusters"]


def test_data_fill_in_what_rows_lack(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", 4)
    by_id = lines(tmp_path / "ids.jsonl", [{"id": f"q{n}", "prediction": "ABCD"[n]} for n in (3, 1, 0)])
    result = rescore(by_id, TASK, ["strict"], folder=data)
    assert result["source"]["matched_by"] == "id"
    assert result["shares"]["missing"] == 0.25 and result["scorers"]["strict"]["value"] is None
    assert result["scorers"]["strict"]["lower_bound"] == 75.0 and "1 have no reply yet" in result["withheld"]
    by_place = lines(
        tmp_path / "places.jsonl", [{"doc_id": n, "filtered_resps": ["ABCD"[n]], "target": "ABCD"[n]} for n in range(4)]
    )
    result = rescore(by_place, TASK, ["strict"], folder=data)
    assert result["scorers"]["strict"]["value"] == 100.0 and result["source"]["matched_by"] == "place in the data"


def test_rows_that_count_from_one_are_matched_by_their_golds(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", 4)
    rows = [{**row, "index": row["index"] + 1} for row in vlmevalkit_rows()]
    assert rescore(table(tmp_path / "a.tsv", rows), TASK, ["strict"], folder=data)["scorers"]["strict"]["value"] == 50.0


def test_predictions_of_other_data_are_rejected(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", 4)
    shuffled = [{"doc_id": n, "filtered_resps": ["A"], "target": "DCBA"[n]} for n in range(4)]
    with pytest.raises(KeyeError, match="agree in 0% of the rows"):
        rescore(lines(tmp_path / "a.jsonl", shuffled), TASK, ["strict"], folder=data)
    many = [{"id": f"q{n}", "prediction": "A"} for n in range(6)]
    with pytest.raises(KeyeError, match="2 of 6 rows of .* belong to no item"):
        rescore(lines(tmp_path / "b.jsonl", many), TASK, ["strict"], folder=data)
    foreign = [{"id": name, "prediction": "A"} for name in ("zz", "yy", "xx", "ww")]
    with pytest.raises(KeyeError, match="4 of 4 rows of .* have ids that no item of the data has"):
        rescore(lines(tmp_path / "c.jsonl", foreign), TASK, ["strict"], folder=data)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", '{"question": "Which?", "gold": "A"}\n', "lacks filtered_resps .* prediction .* question, gold"),
        ("a.tsv", "index\tanswer\n0\tA\n", "lacks the column prediction.*this one has index, answer"),
        ("a.jsonl", '{"filtered_resps": ["A"]}\n', "lacks doc and doc_id"),
        ("a.jsonl", '{"id": "a", "prediction": "A"}\n', "rows of .* lack 'answer'.*name the task's data with --data"),
        ("a.jsonl", '{"prediction": "A", "answer": "A"}\n{"pred\n', "line 2 of .* is not JSON"),
        ("a.jsonl", "[1, 2]\n", "line 1 of .* is not a JSON object"),
        ("a.jsonl", "", "has no rows"),
        ("a.xlsx", "no table", "is not a table in .xlsx"),
        ("a.jsonl", '{"id": 1, "prediction": "A", "answer": "A"}\n' * 2, "has 1 ids twice, such as '1'"),
    ],
)  # fmt: skip
def test_bad_files_get_one_sentence(name: str, content: str, sentence: str, tmp_path: Path) -> None:
    if name.endswith("xlsx"):
        pytest.importorskip("openpyxl")
    (tmp_path / name).write_text(content)
    with pytest.raises(KeyeError, match=sentence):
        rescore(tmp_path / name, TASK, ["strict"])


def test_an_unknown_scorer_names_those_of_the_task(tmp_path: Path) -> None:
    path = LAYOUTS["plain.jsonl"](tmp_path / "a.jsonl")
    with pytest.raises(KeyeError, match="'vlm' does not score letters: scorers are strict"):
        rescore(path, TASK, ["vlm"])


def test_rows_without_a_prediction_count_as_failed(tmp_path: Path) -> None:
    rows = [{"id": str(n), "prediction": "A" if n else None, "answer": "A"} for n in range(30)]
    result = rescore(lines(tmp_path / "a.jsonl", rows), TASK, ["strict"])
    assert result["shares"]["failed"] == pytest.approx(1 / 30, abs=1e-6) and not result["complete"]
    assert result["scorers"]["strict"]["value"] == pytest.approx(100 * 29 / 30)
