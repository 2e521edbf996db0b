"""Training configurations: what is read, and one sentence for each mistake."""

from pathlib import Path

import pytest

from keye.config import ConfigError
from keye.train.config import StageConfig
from keye.train.recipes import load_run
from keye.train.recipes.nano.config import Mix

HEADER = 'recipe = "nano"\nmodel = "nano"\noutput = "out"\n'
STAGE = '[[stage]]\nname = "one"\nsteps = 3\n'
MIX = "mix = [{frames = 4, clips = 2, questions = 3}]\n"
NANO = "[stage.nano]\n" + MIX
RUN = HEADER + STAGE + NANO


def read(folder, text):
    path = folder / "run.toml"
    path.write_text(text)
    return load_run(path)[0]


def test_reads_a_run(tmp_path):
    config = read(tmp_path, HEADER + "seed = 3\nsave_steps = 10\n" + STAGE + NANO)
    assert config.model == tmp_path / "nano"
    assert config.output == tmp_path / "out"
    assert (config.seed, config.save_steps, config.device, config.dtype) == (3, 10, "cpu", "bfloat16")
    (stage,) = config.stages
    assert stage.nano.mix == (Mix(frames=4, clips=2, questions=3),)
    assert (stage.nano.kind, stage.attention, stage.trains) == ("language", "dense", "decoder")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("model = ", "not valid TOML"),
        ('model = "nano"\n', "output is missing"),
        ('recipe = "nanno"\n', "recipe is 'nanno'; set recipe = \"nano\""),
        ('recipe = "other"\n', "recipe is 'other'; set recipe = \"family\""),
        (HEADER, r"run.toml: stage is missing; give it"),
        (HEADER + "stage = []", "stage is .*; it must be a list of at least 1"),
        (HEADER + "stage = 3", "stage is 3; it must be a list"),
        (RUN.replace('output = "out"\n', ""), "output is missing"),
        ("rate = 1\n" + RUN, "unknown key rate; known are recipe, model"),
        ("threds = 1\n" + RUN, r"unknown key threds; did you mean threads\?"),
        ("threads = 0\n" + RUN, "threads is 0; it must be above 0"),
        ("save_steps = 0\n" + RUN, "save_steps is 0"),
        ('device = "cuda"\nprocesses = 2\n' + RUN, "several processes train on the cpu only; set it to 1"),
        ('dtype = "int8"\n' + RUN, "dtype is 'int8'; it must be one of 'bfloat16' or 'float32'"),
        (HEADER + STAGE + "speed = 1\n" + NANO, r"stage\[0\]: unknown key speed; known are name"),
        (HEADER + STAGE + MIX, r"stage\[0\]: mix has moved: write mix under \[stage.nano\]"),
        (HEADER + STAGE + "objects = 3\n" + NANO, r"stage\[0\]: objects has moved"),
        (HEADER + STAGE, r"stage\[0\].nano is missing"),
        (RUN.replace("clips", "clip"), r"stage\[0\].nano.mix\[0\]: unknown key clip; did you mean clips"),
        (RUN.replace("clips = 2, ", ""), r"mix\[0\].clips is missing"),
        (RUN.replace("clips = 2", "clips = 0"), r"mix\[0\].clips is 0; it must be above 0"),
        (RUN.replace("questions = 3", "questions = 3, pictures = true"), "pictures are single frames; set frames = 1"),
        (RUN.replace('name = "one"\n', ""), r"stage\[0\].name is missing"),
        (RUN.replace("steps = 3\n", ""), "stage 'one' needs steps, minutes or epochs"),
        (RUN.replace("steps = 3", "steps = 0"), r"stage\[0\].steps is 0"),
        (HEADER + STAGE + "lr = -1.0\n" + NANO, r"stage\[0\].lr is -1.0; it must be above 0"),
        (HEADER + STAGE + "[stage.nano]\n", "needs a mix"),
        (RUN + 'kind = "sound"\n', "nano.kind is 'sound'; it must be one of 'vision' or 'language'"),
        (HEADER + STAGE + 'trains = "nothing"\n' + NANO, "trains: 'nothing' is not a part; choose all, vision"),
        (HEADER + STAGE + 'attention = "spares"\n' + NANO, "it must be one of 'dense', 'warmup' or 'sparse'"),
        (RUN + 'kind = "vision"\n', 'set trains = "vision"'),
        (HEADER + STAGE + 'attention = "warmup"\n' + NANO, 'set trains = "indexer"'),
        (HEADER + STAGE + 'trains = "indexer"\n' + NANO, "gives the indexer nothing to learn"),
        (RUN + "task_weights = {juggle = 1.0}\n", "unknown tasks juggle; known are ground"),
        (RUN + "task_weights = {ground = -1.0}\n", "task_weights.ground is -1.0; it must be at least 0"),
        (RUN.replace("steps = 3", 'steps = "a"'), "steps is 'a'; it must be a whole number"),
        (RUN.replace("frames = 4", "frames = 1.5"), r"mix\[0\].frames is 1.5; it must be a whole number"),
        ('renews = ["nose"]\n' + RUN, "renews: 'nose' is not a part; choose all"),
        ('seed = "x"\n' + RUN, "seed is 'x'; it must be a whole number"),
        ("fresh = 1\n" + RUN, "fresh is 1; it must be true or false"),
        (RUN + 'split = "foo"\n', "split: 'foo' is not a split; choose train, test, unseen"),
        (RUN + "objects = 100\n", "objects is 100; it must be at most 8"),
        (RUN + "text_chance = 1.5\n", "text_chance is 1.5; it must be at most 1"),
        (RUN + "events = -0.1\n", "events is -0.1; it must be at least 0"),
        (HEADER + STAGE + "lr = inf\n" + NANO, "lr is inf; it must be a finite number"),
        (RUN + STAGE + NANO, "two stages are named 'one'"),
        (RUN.replace('"out"', "5"), "output is 5; it must be a path in quotes"),
    ],
)
def test_mistakes_are_named(tmp_path, text, sentence):
    with pytest.raises(ConfigError, match=sentence):
        read(tmp_path, text)


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        load_run(tmp_path / "none.toml")


def test_the_recipe_of_nano_is_a_valid_configuration():
    config, _ = load_run(Path(__file__).parents[2] / "configs" / "nano.toml")
    assert [stage.attention for stage in config.stages] == ["dense"] * 3 + ["warmup"] + ["sparse"] * 4
    assert all(stage.steps and not stage.minutes for stage in config.stages), "steps decide, not the machine"
    assert (config.model / "config.json").is_file()


def test_learning_rates_warm_up_stay_and_fall():
    config = StageConfig(name="s", steps=100, warmup_steps=10, decay_fraction=0.5, final_lr=0.1)
    factors = [config.lr_factor(step, step / 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == 1.0
    assert factors[30] == factors[50] == 1.0
    assert factors[75] == pytest.approx(0.5)
    assert factors[99] == pytest.approx(0.1)
    assert factors[:11] == sorted(factors[:11])
    assert factors[50:] == sorted(factors[50:], reverse=True)


def test_a_cosine_falls_to_the_final_rate():
    config = StageConfig(name="s", steps=100, warmup_steps=0, decay="cosine", decay_fraction=1.0, final_lr=0.05)
    factors = [config.lr_factor(step, step / 100) for step in range(101)]
    assert factors[0] == 1.0
    assert factors[50] == pytest.approx((1 + 0.05) / 2)
    assert factors[100] == pytest.approx(0.05)
    assert factors == sorted(factors, reverse=True)


def test_the_first_limit_that_is_reached_ends_a_stage():
    config = StageConfig(name="s", steps=100, minutes=10, epochs=2)
    assert config.share_done(25, 1.0, 0.1) == 0.25
    assert config.share_done(25, 9.0, 0.1) == 0.9
    assert config.share_done(25, 1.0, 2.0) == 1.0
