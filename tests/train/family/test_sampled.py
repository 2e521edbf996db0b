"""Stages that sample: pairs and auto labels as files that later stages read, and looping replies counted."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from keye.chat.messages import Medium, Message
from keye.chat.replies import parse_reply
from keye.data.samples import Place, Sample
from keye.errors import KeyeError
from keye.train.pairs import Grade, Judge, choose_pair, extract_answer, grade_reply, score_answer, to_row
from keye.train.recipes.family.sampled import count_loops, sample_modes, sample_pairs, samples_file
from keye.train.rollouts import Rollout, find_loop
from tests.support.family import all_steps, family_stage, learn, talk, tiny_network, write_rows
from tests.support.tiny import tiny_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tiny_folder(tmp_path_factory.mktemp("sampled") / "model", weights=False)
    rows = [talk(f"What is {n}?", ("red", "blue")[n % 2], mode="no_think") for n in range(6)]
    write_rows(folder / "data.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    """Answers red or blue, mostly."""
    model = tiny_network()
    learn(model, family_stage(folder / "data.jsonl", max_tokens=256), folder, steps=20)
    return model


def rollout(text, tokens=(1, 2, 3), complete=True):
    return Rollout(tuple(tokens), text, complete)


def sample(reply="red", mode=None):
    messages = (Message("user", ("Which?",)), Message("assistant", (reply,)))
    return Sample(messages, (False, True), Place("data.jsonl", 1), mode=mode)


@pytest.mark.parametrize(
    ("tokens", "start"),
    [([], None), ([1, 2, 3, 4] * 2, None), ([7] * 11, None), ([9, 8, *[7] * 12], 2), ([5, *[1, 2, 3] * 4], 1),
     (list(range(40)), None), ([*range(20), *[4, 6, 7, 8, 9] * 5], 20)],
)  # fmt: skip
def test_repetition_is_found_where_it_begins(tokens, start):
    assert find_loop(tokens) == start


@pytest.mark.parametrize(
    ("text", "gold", "score"),
    [("Red.", "red", 1.0), ("blue", "red", 0.0), ("[[0, 2]]", "[[1, 3]]", 1 / 3), ("3.5 s", "3.5 seconds", 1.0)],
)
def test_answers_are_scored_by_their_kind(text, gold, score):
    assert score_answer(text, gold) == pytest.approx(score)


def test_answers_are_extracted_from_any_form():
    assert extract_answer("<think>a</think><answer>It is \\boxed{\\frac{1}{2}}.</answer>") == "\\frac{1}{2}"
    assert extract_answer("<analysis>x</analysis>red") == "red"


def test_rules_rank_right_before_formed_before_looping():
    right = grade_reply(sample(), rollout("red"), "suffix")
    wrong = grade_reply(sample(), rollout("blue"), "suffix")
    cut = grade_reply(sample(), rollout("blue", complete=False), "suffix")
    loop = grade_reply(sample(), rollout("blue", [7] * 20, complete=False), "suffix")
    scores = [grade.score() for grade in (right, wrong, cut, loop)]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == 4
    assert Grade(None, True, False, 0.5).score(2.0) == pytest.approx(1.5)


def test_the_best_and_the_worst_become_a_pair():
    replies = [rollout("a"), rollout("bb", [1] * 5), rollout("c", [1] * 9), rollout("d")]
    best, worst = choose_pair(replies, [1.0, 0.0, 0.0, 1.0])
    assert worst.text == "c" and best.text in "ad"
    assert choose_pair(replies, [1.0] * 4) is None
    assert choose_pair([rollout("a"), rollout("")], [1.0, 0.0]) is None


def test_sampled_pairs_are_data_that_a_stage_reads(folder, model):
    stage = family_stage(
        folder / "data.jsonl",
        name="pairs 1",
        objective="pairs",
        sampling={"replies": 6, "max_tokens": 24, "prompts": 4},
    )
    figures = sample_pairs(stage, model, folder, seed=1)
    rows = [json.loads(line) for line in samples_file(folder, stage).read_text().splitlines()]
    assert samples_file(folder, stage).name == "pairs-1.jsonl"
    assert 1 <= len(rows) == figures["rows"] <= 4
    assert 0 <= figures["looping"] <= 1 and figures["pairs"] == len(rows) / 4
    again = samples_file(folder, stage).read_text()
    sample_pairs(stage, model, folder, seed=1)
    assert samples_file(folder, stage).read_text() == again
    steps = all_steps(family_stage(samples_file(folder, stage), name="read", max_tokens=256), folder)
    assert sum(step.figures["samples"] for step in steps) == len(rows)


def test_modes_are_labelled_by_pass_rates(folder, model):
    stage = family_stage(
        folder / "data.jsonl", name="modes", objective="modes", sampling={"replies": 2, "max_tokens": 8, "prompts": 3}
    )
    figures = sample_modes(stage, model, folder, seed=1)
    rows = [json.loads(line) for line in samples_file(folder, stage).read_text().splitlines()]
    assert len(rows) == 3 and {row["mode"] for row in rows} == {"auto"}
    assert all(parse_reply(row["messages"][-1]["content"]).text in ("red", "blue") for row in rows)
    assert 0 < figures["direct"] <= 1 and figures["thinking"] <= 1


def test_looping_replies_are_counted(folder):
    stage = family_stage(folder / "data.jsonl", sampling={"replies": 2, "max_tokens": 16, "prompts": 2})
    assert 0 <= count_loops(stage, tiny_network(), folder, 0) <= 1


class Grader(BaseHTTPRequestHandler):
    answer = "8"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["messages"][0]["role"] == "user" and self.path == "/v1/chat/completions"
        sent = json.dumps({"choices": [{"message": {"content": self.answer}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent)

    def log_message(self, *_):
        pass


@pytest.fixture
def grader():
    server = HTTPServer(("127.0.0.1", 0), Grader)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def test_a_judge_grades_through_an_endpoint(grader, monkeypatch):
    assert Judge(grader, "m").grade("Which?", "red", "red") == 0.8
    monkeypatch.setattr(Grader, "answer", "<think>10?</think>7")
    assert grade_reply(sample(), rollout("red"), "suffix", Judge(grader, "m")).judged == 0.7
    monkeypatch.setattr(Grader, "answer", "good")
    with pytest.raises(KeyeError, match="instead of a number"):
        Judge(grader, "m").grade("Which?", "red", "red")


@pytest.mark.parametrize(
    ("url", "sentence"), [("ftp://x", "judge.url is"), ("http://127.0.0.1:9/v1", "cannot be asked")]
)
def test_a_judge_that_cannot_be_asked_is_named(url, sentence):
    with pytest.raises(KeyeError, match=sentence):
        Judge(url, "m", timeout=2).grade("a", "b", "c")


def test_media_in_memory_cannot_be_named_in_rows():
    medium = Medium("image", object())
    loose = Sample((Message("user", (medium, "Which?")), Message("assistant", ("red",))), (False, True), Place("d", 1))
    with pytest.raises(KeyeError, match="not a file of its own"):
        to_row(loose, "red")
