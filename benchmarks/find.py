"""Searching hours of video for seconds: FrameForge films of two hours, keye-nano, and the baselines beside it.

    python -m benchmarks.find run --results find.jsonl [--films 20] [--questions 13] [--minutes 120] [--part 0/2]
    python -m benchmarks.find card find.jsonl            # the figures of benchmarks/README.md, as JSON
    python -m benchmarks.find run --results fit.jsonl --split train --minutes 30 --films 4 --dense 0
    python -m benchmarks.find fit fit.jsonl -o search.json      # the calibration of the model, from other films
    python -m benchmarks.find make -o film.mp4 [--minutes 120] [--seed 0] [--needles 13] [--event 2] [--sound]

`run` makes film after film (640x360, 12.5 frames/s, one 2 s event a question, other events that share its colour or
shape every minute), indexes it, and asks for events that happen and for as many that never do. A line is written for
each question, `--step` of each kind about one film after another, and a run that was ended goes on where it stopped;
`--part 0/2` takes every second film, so that two processes can share a file. `one_pass` is the same model on as
many evenly spaced frames as the tokens of a search allow, in one prompt. Retrieval compares methods that name 8 spans
of 12 s: the scores by which the indexer of one layer chooses keys, how often all choose a frame, the keys that dense
attention weighs most (for `--dense` questions a step), change of the picture, and chance; and the 8 windows surest of
"yes". `make` writes a film and its gold answers (film.json).
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

import keye
from benchmarks.find_evidence import dense_shares, meets, retrieve, summarise_retrieval
from keye.api import Keye
from keye.chat.messages import Medium
from keye.chat.times import Interval
from keye.data.frameforge import Film, plan_film, write_film
from keye.evals.figures.searches import SearchRow, summarise_searches
from keye.evals.tasks.needle import ask_in_one_pass, cpu_seconds, film_questions, summarise_baselines
from keye.media.source.fetch import fetch_source
from keye.moments import FindResult
from keye.scoring.calibration import LogisticFit, fit_logistic
from keye.scoring.metrics import interval_iou, mean
from keye.scoring.search import calibration_error, pick_threshold
from keye.sessions.search.build import build_search_index
from keye.sessions.search.calibration import moment_features, presence_features
from keye.sessions.search.find import MomentSearch
from keye.sessions.search.options import FindOptions
from keye.sessions.search.questions import clip_log_odds, presence_question

#: Features of the two calibrations.
MOMENT_FEATURES, PRESENCE_FEATURES = ("coarse", "close", "alone"), ("best", "coarse")
#: Weak: softened outcomes keep probabilities off the ends.
PENALTY = 0.1
#: What a line of the model without a search is called, and the tokens that it may use: an eighth of two hours.
ONE_PASS, ONE_PASS_TOKENS = "(one pass)", 17_000
Line = dict[str, Any]


def run(arguments: argparse.Namespace) -> None:
    """Films of one part, a few questions about each in turn, so that figures are fair however far it comes."""
    torch.set_num_threads(arguments.threads)
    model = keye.load(arguments.model)
    part, parts = map(int, arguments.part.split("/"))
    numbers = [n for n in range(arguments.first, arguments.first + arguments.films) if n % parts == part]
    done = {(line["film"], line["name"]) for line in read_lines(arguments.results)}
    with tempfile.TemporaryDirectory(prefix="keye-find-") as temporary:
        folder = arguments.folder or Path(temporary)
        for count in range(arguments.step, arguments.questions + arguments.step, arguments.step):
            for number in numbers:
                film = plan_film(number, minutes=arguments.minutes, split=arguments.split, event=arguments.event)
                questions = film_questions(film, min(count, arguments.questions))
                left = [(name, gold) for name, gold in questions if (number, name) not in done]
                for line in ask(model, film, number, left, folder, arguments) if left else ():
                    append(arguments.results, line)
                done |= {(number, name) for name, _ in left}
        for number in numbers[: -(-arguments.one_pass // parts)]:
            if (number, ONE_PASS) not in done:
                film = plan_film(number, minutes=arguments.minutes, split=arguments.split, event=arguments.event)
                path = film_file(film, number, folder, arguments)
                for row in ask_in_one_pass(model, film, number, path, arguments.questions, ONE_PASS_TOKENS):
                    append(
                        arguments.results, {"kind": "one_pass", **row.to_dict(), "asked": row.name, "name": ONE_PASS}
                    )


def read_lines(path: Path) -> list[Line]:
    """What a file of results holds; nothing where it does not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, line: Line) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def film_file(film: Film, number: int, folder: Path, arguments: argparse.Namespace) -> Path:
    """The file of a film, written now if it is not there."""
    path = folder / f"{arguments.split}-{arguments.minutes:g}-{arguments.event:g}-{number}.mp4"
    if not path.exists():
        write_film(film, path)
    return path


def ask(
    model: Keye, film: Film, number: int, questions: Sequence[tuple[str, Interval | None]], folder: Path,
    arguments: argparse.Namespace,
) -> Iterator[Line]:  # fmt: skip
    """The lines of some questions about a film."""
    path = film_file(film, number, folder, arguments)
    facts: Line = {"minutes": arguments.minutes, "event": arguments.event, "film_bytes": path.stat().st_size}
    if not path.with_suffix(".keye").exists():
        facts |= index_film(model, path, arguments.spacing)
    for place, (name, gold) in enumerate(questions):
        dense = gold is not None and place < 2 * arguments.dense
        yield {"kind": "search", **search_once(model, number, path, name, gold, with_dense=dense), **facts}


def index_film(model: Keye, path: Path, spacing: float) -> Line:
    """Indexes a film at a spacing that does not depend on how busy the machine is; what that cost. The index has its
    name when it is complete."""
    begin, cpu = time.perf_counter(), cpu_seconds()
    medium, draft = Medium("video", fetch_source(path)), path.with_suffix(".part")
    for _ in build_search_index(model.engine, medium, draft, spacing=spacing):
        pass
    draft.replace(path.with_suffix(".keye"))
    return {"index_wall": round(time.perf_counter() - begin, 1), "index_cpu": round(cpu_seconds() - cpu, 1),
            "index_bytes": path.with_suffix(".keye").stat().st_size}  # fmt: skip


def search_once(model: Keye, number: int, path: Path, name: str, gold: Interval | None, *, with_dense: bool) -> Line:
    """One question, and what the calibration and the retrieval methods need of it."""
    index_path = path.with_suffix(".keye")
    begin, cpu = time.perf_counter(), cpu_seconds()
    search = MomentSearch(model.engine, fetch_source(path), name, FindOptions(index=index_path))
    *_, result = search.run()
    costs = {"wall": round(time.perf_counter() - begin, 3), "cpu": round(cpu_seconds() - cpu, 3)}
    assert isinstance(result, FindResult) and search.index is not None
    line = SearchRow.of(number, name, gold, result, **costs, is_first=False).to_dict()
    line["candidates"] = [
        {"start": candidate.start, "end": candidate.end, "features": moment_features(candidate)}
        for candidate in search.candidates
    ]
    line["coarse"] = search.best_coarse
    if gold is not None:
        index, scores = search.index, list(search.scored.values())
        line["retrieval"] = retrieve(index, scores, gold)
        if with_dense:
            shares = dense_shares(model.engine, index, presence_question(model.runtime.generation_config, name))
            line["retrieval"]["dense"] = meets(index, scores, [shares[score.number] for score in scores], gold)
    return line


def summarise(lines: Sequence[Line]) -> dict[str, Any]:
    """All figures of a file of results."""
    rows = [as_row(line) for line in lines if line["kind"] == "search"]
    others = [as_row(line) for line in lines if line["kind"] == "one_pass"]
    first = next(line for line in lines if line["kind"] == "search")
    retrieval = [(line["film"], line["retrieval"]) for line in lines if "retrieval" in line]
    return {
        "minutes": first["minutes"], "event": first["event"], **summarise_searches(rows),
        "index": {name: sorted({line[name] for line in lines if name in line}) for name in
                  ("film_bytes", "index_cpu", "index_wall", "index_bytes")},
        "baselines": summarise_baselines(rows, others, 60 * first["minutes"]),
        "retrieval": summarise_retrieval(retrieval, first["event"], 60 * first["minutes"]),
    }  # fmt: skip


def as_row(line: Mapping[str, Any]) -> SearchRow:
    values = {name: line[name] for name in SearchRow.__dataclass_fields__}
    return SearchRow.from_dict({**values, "name": line.get("asked", line["name"])})


def card(arguments: argparse.Namespace) -> None:
    """Prints the figures."""
    print(json.dumps(summarise(read_lines(arguments.results)), indent=2))


def fit(arguments: argparse.Namespace) -> None:
    """Fits the two calibrations and the threshold, writes them, and prints how good they are on the same films."""
    lines = [line for line in read_lines(arguments.results) if line["kind"] == "search"]
    candidates = [(line, item) for line in lines for item in line["candidates"]]
    truths = [is_right(line, item) for line, item in candidates]
    features = [[item["features"][name] for name in MOMENT_FEATURES] for _, item in candidates]
    moment = fit_logistic(features, truths, PENALTY)
    rows = [presence_row(line, moment) for line in lines]
    happens = [line["gold"] is not None for line in lines]
    presence = fit_logistic(rows, happens, PENALTY)
    chances = [best_chance(line, moment) for line in lines]
    threshold = pick_threshold(
        [chance for chance, there in zip(chances, happens, strict=True) if there],
        [chance for chance, there in zip(chances, happens, strict=True) if not there], arguments.recall,
    )  # fmt: skip
    result = {"moment": as_dict(moment, MOMENT_FEATURES), "presence": as_dict(presence, PRESENCE_FEATURES),
              "threshold": round(threshold, 4)}  # fmt: skip
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    above = [chance >= threshold for chance in chances]
    print(json.dumps({
        **result, "questions": len(lines), "films": len({line["film"] for line in lines}),
        "moment_error": calibration_error([moment.probability(row) for row in features], truths),
        "presence_error": calibration_error([presence.probability(row) for row in rows], happens),
        "recall": mean([float(up) for up, there in zip(above, happens, strict=True) if there]),
        "false_alarms": mean([float(up) for up, there in zip(above, happens, strict=True) if not there]),
    }, indent=2))  # fmt: skip


def is_right(line: Line, item: Line) -> bool:
    """Whether a candidate is the event."""
    return line["gold"] is not None and interval_iou([(item["start"], item["end"])], [tuple(line["gold"])]) >= 0.5


def log_odds(item: Line, moment: LogisticFit) -> float:
    values = [item["features"][name] for name in MOMENT_FEATURES]
    return clip_log_odds(moment.bias + sum(w * v for w, v in zip(moment.weights, values, strict=True)))


def presence_row(line: Line, moment: LogisticFit) -> list[float]:
    features = presence_features([log_odds(item, moment) for item in line["candidates"]], line["coarse"])
    return [features[name] for name in PRESENCE_FEATURES]


def best_chance(line: Line, moment: LogisticFit) -> float:
    """The probability of the best candidate, by which a moment counts as found; 0 without any."""
    rows = [[item["features"][name] for name in MOMENT_FEATURES] for item in line["candidates"]]
    return max((moment.probability(row) for row in rows), default=0.0)


def as_dict(model: LogisticFit, names: Sequence[str]) -> dict[str, Any]:
    weights = {name: round(weight, 5) for name, weight in zip(names, model.weights, strict=True)}
    return {"bias": round(model.bias, 5), "weights": weights}


def make(arguments: argparse.Namespace) -> None:
    """Writes one film and its gold answers."""
    film: Film = plan_film(
        arguments.seed, minutes=arguments.minutes, split=arguments.split, needles=arguments.needles,
        event=arguments.event, near_misses=arguments.near_misses,
    )  # fmt: skip
    write_film(film, arguments.output, sound=arguments.sound)
    arguments.output.with_suffix(".json").write_text(json.dumps(film.to_dict(), indent=2) + "\n")
    print(json.dumps({"needles": [[event.name, event.start, event.end] for event in film.needles],
                      "absent": film.absent[:5], "cuts": len(film.cuts)}))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    runner = commands.add_parser("run", help="ask, and append a line for each question")
    runner.add_argument("--results", type=Path, required=True)
    runner.add_argument("--model", default="nano")
    runner.add_argument("--films", type=int, default=20)
    runner.add_argument("--first", type=int, default=0, help="seed of the first film")
    runner.add_argument("--questions", type=int, default=13, help="of each kind about a film")
    runner.add_argument("--spacing", type=float, default=1.0, help="seconds between two frames of the index")
    runner.add_argument("--step", type=int, default=5, help="questions of each kind about a film before the next film")
    runner.add_argument("--dense", type=int, default=2, help="questions a step for which dense attention is read")
    runner.add_argument("--one-pass", type=int, default=4, help="films that are also read in one pass")
    runner.add_argument("--part", default="0/1", help="which films of how many parts, as 0/2 and 1/2")
    runner.add_argument("--folder", type=Path, help="where films and indexes lie; they stay there")
    runner.add_argument("--threads", type=int, default=1)
    runner.set_defaults(run=run)
    reader = commands.add_parser("card", help="the figures of a file of results")
    reader.add_argument("results", type=Path)
    reader.set_defaults(run=card)
    fitter = commands.add_parser("fit", help="fit the calibration")
    fitter.add_argument("results", type=Path)
    fitter.add_argument("-o", "--output", type=Path, required=True)
    fitter.add_argument("--recall", type=float, default=1.0, help="events that the threshold keeps")
    fitter.set_defaults(run=fit)
    maker = commands.add_parser("make", help="write one film and its gold answers")
    maker.add_argument("-o", "--output", type=Path, required=True)
    maker.add_argument("--seed", type=int, default=0)
    maker.add_argument("--needles", type=int, default=13)
    maker.add_argument("--near-misses", type=float, default=1.0, help="other events a minute")
    maker.add_argument("--sound", action="store_true", help="with a quiet tone")
    maker.set_defaults(run=make)
    for command in (runner, maker):
        command.add_argument("--minutes", type=float, default=120.0)
        command.add_argument("--split", default="test", choices=("train", "test", "unseen"))
        command.add_argument("--event", type=float, default=2.0, help="seconds that a needle is seen")
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
