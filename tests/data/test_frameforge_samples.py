"""FrameForge as files: what training reads of them is what the clips show and the questions ask."""

import json
from functools import partial
from pathlib import Path

import pytest

from keye.config import load_generation_config
from keye.data.frameforge import TRACED_TASKS
from keye.data.frameforge.samples import main, write_samples
from keye.data.sources import DataSet, open_samples
from keye.errors import KeyeError
from keye.sessions.search.questions import ground_question
from keye.train.layout import Layout
from keye.train.modes import is_well_formed, rewrite
from tests.support.tiny import NANO


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("frameforge")
    return write_samples(
        folder, clips=3, frames=(6, 9), tasks=("count", "order", "ground"), modes=("think", "no_think", "auto"),
        size=(112, 112),
    )  # fmt: skip


def samples_of(path):
    ground = partial(ground_question, load_generation_config(NANO))
    return list(open_samples([DataSet(path)], seed=0, epochs=1, ground_question=ground))


def test_every_reply_has_the_form_of_its_mode(rows_file):
    samples, modes = samples_of(rows_file), set()
    for sample in samples:
        messages = rewrite(sample.messages, sample.mode, "prefill")
        reply = messages[-1].parts[0]
        assert messages == sample.messages  # as it is learnt
        assert is_well_formed(reply, sample.mode, "prefill")
        thinks = reply.startswith("<think>\n")
        assert thinks == (sample.task in TRACED_TASKS and sample.mode != "no_think")
        modes.add((sample.mode, thinks))
    assert {("think", True), ("no_think", False), ("auto", True)} <= modes


def test_prompts_have_every_frame_of_the_clip_at_its_time(rows_file):
    layout = Layout.of_folder(NANO)
    for sample in samples_of(rows_file):
        laid_out = layout.lay_out(sample)
        (video,) = laid_out.paths[0].media
        assert len(video.grid_thw) == sample.media[0].options["nframes"] in (6, 9)
        start = sample.media[0].options.get("video_start", 0.0)
        assert video.plan.timestamps[0] == pytest.approx(start, abs=0.05)


def test_the_same_arguments_write_the_same_rows(tmp_path):
    texts = [
        write_samples(tmp_path / str(seed), clips=2, frames=(4,), seed=seed // 2, size=(112, 112)).read_text()
        for seed in (0, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_the_command_names_its_file_and_its_mistakes(tmp_path, capsys):
    assert main([str(tmp_path), "--clips", "1", "--frames", "4", "--tasks", "background", "--modes", "think"]) == 0
    row = json.loads(Path(capsys.readouterr().out.strip()).read_text(encoding="utf-8").splitlines()[0])
    assert row["mode"] == "no_think"  # a question without reasoning
    assert main([str(tmp_path), "--clips", "0"]) == 1
    assert "clips is 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [({"modes": ()}, "modes"), ({"modes": ("image",)}, "image"), ({"frames": ()}, "frames"),
     ({"frames": (1,), "tasks": ("times",)}, "no question"), ({"split": "dev"}, "split"), ({"tasks": ("x",)}, "tasks")],
)  # fmt: skip
def test_arguments_that_make_no_data_are_named(tmp_path, change, words):
    with pytest.raises(KeyeError, match=words):
        write_samples(tmp_path, **{"clips": 1, "size": (112, 112), **change})
