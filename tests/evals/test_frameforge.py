"""The evaluation end to end on a tiny random model, and its prompts against those of training."""

import json
import random
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from keye.cache.slabs import KVLayout
from keye.chat.messages import Medium, Message
from keye.data.frameforge import Question, make_clip, picture_questions, render
from keye.engine.engine import Engine
from keye.engine.prompt import PromptBuilder
from keye.engine.sampling import SamplingParams
from keye.errors import KeyeError
from keye.evals.figures.summary import Scored
from keye.evals.tasks.frameforge import (
    ClipPrompt,
    EvalOptions,
    evaluate,
    exam,
    frames_of,
    frames_through_mp4,
    parse_frames,
    score,
)
from keye.media.processor import Processor
from keye.train.recipes.nano.batches import BatchMaker
from tests.support.reference import PlainSequence
from tests.support.tiny import tiny_model

SMALL = {"frames": (4, 6), "questions": 25, "max_tokens": 5}
from tests.support.training import question_spans


@pytest.fixture(scope="module")
def tiny():
    return tiny_model()


def figures(result):
    """What must be the same from run to run: everything but the clock."""
    return {name: value for name, value in result.items() if not name.startswith(("seconds", "tokens_per"))}


def clip_prompt(tiny, clip, texts):
    builder = PromptBuilder(tiny.model.config, tiny.tokenizer, Processor(tiny.processor.config))
    return ClipPrompt(builder, frames_of(clip, tiny.processor.config), texts)


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("split", "train", "split is 'train'"),
        ("frames", (8, 4), "frames is 8-4"),
        ("frames", (1, 4), "at least 2"),
        ("objects", 0, "objects is 0"),
        ("questions", 0, "n is 0"),
        ("mode", "fast", "mode is 'fast'"),
        ("select", "best", "select is 'best'"),
        ("kv", "int3", "the key-value format is 'int3'; choose one of auto, bf16"),
        ("max_tokens", 0, "max_tokens is 0"),
        ("scene", "film", "scene is 'film'; choose one of clip, window, close"),
    ],
)
def test_options_out_of_range(field, value, sentence):
    with pytest.raises(KeyeError, match=sentence):
        EvalOptions(**{field: value})


def test_windows_do_not_go_through_files():
    with pytest.raises(KeyeError, match="leave mp4 out"):
        EvalOptions(scene="window", mp4=True)


def test_windows_ask_about_presence_in_any_aspect_ratio(tiny):
    options = EvalOptions(questions=60, frames=(3, 5), scene="window", max_tokens=2)
    clips = [clip for clip, _ in exam(options)]
    assert len({clip.size for clip in clips}) > 2
    assert all(start.texture for clip in clips for start in clip.scene.backgrounds)
    result = evaluate(tiny, options)
    presence = result["presence"]
    assert presence["n"] == sum(result["tasks"][task]["n"] for task in ("presence", "presence_text")) > 15
    assert 0 <= presence["calibration_error"] <= 1
    json.dumps(result, allow_nan=False)


def test_dense_attention_selects_nothing():
    with pytest.raises(KeyeError, match="dense attention selects nothing"):
        EvalOptions(mode="dense", select="random")


def test_frame_ranges():
    assert parse_frames("16-32") == (16, 32)
    assert parse_frames("64") == (64, 64)
    with pytest.raises(KeyeError, match="16-32"):
        parse_frames("many")


def test_exam_asks_exactly_as_many_questions_and_always_the_same():
    options = EvalOptions(questions=60, frames=(4, 9))
    first, second = list(exam(options)), list(exam(options))
    assert first == second
    assert sum(len(chosen) for _, chosen in first) == 60
    assert all(4 <= clip.frames <= 9 and clip.split == "test" for clip, _ in first)
    assert max(len(chosen) for _, chosen in first) <= 12
    longer = list(exam(EvalOptions(questions=80, frames=(4, 9))))
    assert longer[: len(first) - 1] == first[:-1]
    assert list(exam(EvalOptions(questions=60, frames=(4, 9), seed=1))) != first


def test_exam_does_not_depend_on_how_the_model_runs():
    sparse, dense = EvalOptions(questions=20), EvalOptions(questions=20, mode="dense", mp4=True)
    assert list(exam(sparse)) == list(exam(dense))


def test_result_has_every_figure(tiny):
    calls = []
    options = EvalOptions(**SMALL)
    result = evaluate(tiny, options, lambda done, total: calls.append((done, total)))
    json.dumps(result, allow_nan=False)
    assert result["options"] == asdict(options)
    assert result["questions"] == sum(task["n"] for task in result["tasks"].values()) == 25
    assert calls[-1] == (25, 25)
    assert {"accuracy", "miou", "grounding", "whole_video_miou", "k_over_context", "seconds_by_phase"} <= set(result)
    assert 0 < result["k_over_context"] < 1
    assert result["generated_tokens"] <= 25 * 5


def test_evaluation_is_deterministic(tiny):
    for select in ("indexer", "random"):
        options = EvalOptions(**SMALL, select=select)
        assert figures(evaluate(tiny, options)) == figures(evaluate(tiny, options))


def test_keys_and_values_are_stored_as_asked(tiny, monkeypatch):
    stores = []
    of = KVLayout.of
    monkeypatch.setattr(KVLayout, "of", lambda *arguments: stores.append(of(*arguments)) or stores[-1])
    result = evaluate(tiny, EvalOptions(kv="int4", **SMALL))
    assert result["options"]["kv"] == "int4"
    assert [layout.kind for layout in stores] == ["int4"]


def test_sparse_is_dense_while_k_holds_the_context():
    roomy = tiny_model(topk=4096)
    sparse, dense = (evaluate(roomy, EvalOptions(**SMALL, mode=mode)) for mode in ("sparse", "dense"))
    for result in (sparse, dense):
        result.pop("options")
    assert figures(sparse) == figures(dense)
    assert sparse["k_over_context"] == 1.0


def test_model_without_an_indexer_cannot_be_sparse(tiny):
    config = tiny.model.config
    model = SimpleNamespace(config=replace(config, text=replace(config.text, sparse=None)))
    with pytest.raises(KeyeError, match="use mode dense"):
        evaluate(replace(tiny, model=model), EvalOptions(**SMALL))


def test_clip_too_long_for_the_context(tiny):
    with pytest.raises(KeyeError, match="the context holds 16384"):
        evaluate(tiny, EvalOptions(frames=(4, 4), questions=1, max_tokens=20000))


@pytest.mark.parametrize(
    ("start", "step"), [(0.0, 0.5), (0.5, 0.5), (0.3, 2.0), (0.1, 0.2), (12.7, 0.2), (1.6, 1.5), (599.9, 1.0)]
)
def test_mp4_gives_back_the_clip(tiny, start, step):
    clip = make_clip(3, frames=7, split="test", start=start, step=step)
    through = frames_through_mp4(clip, tiny.processor.config)
    assert through.timestamps == pytest.approx(clip.timestamps, abs=0.05)
    text = [f"{seconds:.1f}" for seconds in through.timestamps]
    assert text == [f"{seconds:.1f}" for seconds in clip.timestamps]
    original = frames_of(clip, tiny.processor.config).frames
    assert through.frames.shape == original.shape
    assert np.abs(through.frames.astype(int) - original).mean() < 12


def test_mp4_evaluation_asks_the_same(tiny):
    options = {"frames": (4, 4), "questions": 10, "max_tokens": 3}
    through, direct = (evaluate(tiny, EvalOptions(**options, mp4=mp4)) for mp4 in (True, False))
    assert through["prompt_tokens"] == direct["prompt_tokens"]
    assert {t: row["n"] for t, row in through["tasks"].items()} == {t: row["n"] for t, row in direct["tasks"].items()}


def test_prompts_are_those_of_training(tiny):
    maker = BatchMaker(tiny.tokenizer, tiny.processor.config)
    clip, chosen = next(exam(EvalOptions(frames=(5, 5), seed=3)))
    batch = maker.pack([clip], [chosen])
    prompt = clip_prompt(tiny, clip, [question.text for question in chosen])
    shared = prompt.trunk.token_ids.shape[0]
    for number, answer in enumerate(batch.answers):
        begin = question_spans(batch, 0)[number][0]
        head = slice(begin, answer.start + 1)
        trained = [*batch.trunk_ids[0], *batch.tail_ids[0, head]]
        assert [*prompt.trunk.token_ids.tolist(), *prompt.branches[number]] == trained
        in_trunk, in_tail = np.split(batch.positions[0], [batch.trunk_ids.shape[1]], axis=1)
        trained_positions = np.concatenate([in_trunk, in_tail[:, head]], axis=1)
        counted = prompt.trunk.next_position + np.arange(len(prompt.branches[number]))
        assert (prompt.trunk.position_ids.numpy() == trained_positions[:, :shared]).all()
        assert (trained_positions[:, shared:] == counted).all()


def test_branches_answer_as_each_question_alone(tiny):
    clip, chosen = next(exam(EvalOptions(frames=(5, 5), seed=4)))
    prompt = clip_prompt(tiny, clip, [question.text for question in chosen])
    engine, params = Engine(tiny), SamplingParams(max_tokens=6)
    trunk, _ = engine.prefill(prompt.trunk)
    together = engine.generate([prompt.continue_trunk(branch, trunk) for branch in prompt.branches], params)
    assert trunk.length(0) == prompt.trunk.length, "the trunk stays as it was"
    for branch, result in zip(prompt.branches, together, strict=True):
        alone = PlainSequence(tiny.model).prefill(prompt.trunk).append(branch)
        assert alone.greedy(6, tiny.config.eos_token_ids) == [
            token for token in result.completions[0].token_ids if token not in tiny.config.eos_token_ids
        ]


def test_scores_of_replies():
    clip = make_clip(1, frames=4, start=10.0, step=1.0)
    ground = Question("ground", "?", "[[10.0, 12.0]]", ((10.0, 12.0),))
    assert score(clip, ground, "[[11.0, 12.0]]", 5) == Scored(
        5, "ground", "?", ground.answer, "[[11.0, 12.0]]", exact=False, iou=0.5, whole_video_iou=pytest.approx(2 / 3)
    )
    assert score(clip, ground, "[[10.0, 11.0], [11.0, 12.0]]", 0).exact
    assert score(clip, ground, "[[10.0, 12.0]", 0).iou == 0.0
    never = Question("ground_none", "?", "[]", ())
    assert score(clip, never, "[]", 0).iou == 1.0
    assert score(clip, never, "[[10.0, 12.0]]", 0).iou == 0.0
    assert score(clip, Question("start", "?", "10.0 seconds"), "10.0 s", 0).correct
    assert not score(clip, Question("read", "?", "JAZZ"), "JAZ", 0).correct


def test_prompts_about_pictures_are_those_of_training(tiny):
    maker = BatchMaker(tiny.tokenizer, tiny.processor.config)
    clip = make_clip(3, frames=1)
    chosen = picture_questions(clip, random.Random(0), 4)
    batch = maker.pack([clip], [chosen], pictures=True)
    builder = PromptBuilder(tiny.model.config, tiny.tokenizer, Processor(tiny.processor.config))
    for number, answer in enumerate(batch.answers):
        picture = Medium("image", Image.fromarray(render(clip)[0]))
        prompt = builder.build([Message("user", (picture, chosen[number].text))])
        begin = question_spans(batch, 0)[number][0]
        head = slice(begin, answer.start + 1)
        assert prompt.token_ids.tolist() == [*batch.trunk_ids[0], *batch.tail_ids[0, head]]
        trunk = batch.trunk_ids.shape[1]
        trained = np.concatenate([batch.positions[0, :, :trunk], batch.positions[0, :, trunk:][:, head]], axis=1)
        assert (prompt.position_ids.numpy() == trained).all()


def test_an_exam_of_chosen_tasks_asks_about_nothing_else():
    options = EvalOptions(questions=30, frames=(8, 10), tasks=("place", "times"))
    assert {question.task for _, chosen in exam(options) for question in chosen} == {"place", "times"}
    assert sum(len(chosen) for _, chosen in exam(options)) == 30
    with pytest.raises(KeyeError, match="tasks holds 'colour'"):
        EvalOptions(tasks=("colour",))
    for field in ({"tasks": ("place",)}, {"clock": (0.0, 0.5)}):
        with pytest.raises(KeyeError, match="chosen for clips, but scene is 'close'"):
            EvalOptions(**field, scene="close")


def test_an_exam_with_a_clock_shows_the_same_scenes_at_those_times():
    options = {"questions": 20, "frames": (4, 6)}
    drawn, plain = (list(exam(EvalOptions(**options, clock=clock))) for clock in (None, (3.0, 0.5)))
    assert [clip.scene for clip, _ in plain] == [clip.scene for clip, _ in drawn[: len(plain)]]
    assert all(clip.timestamps[:2] == (3.0, 3.5) for clip, _ in plain)
