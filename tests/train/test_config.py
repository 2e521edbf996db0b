"""Training configurations: what is read, and one sentence for each mistake."""

from pathlib import Path

import pytest

from keye.config import ConfigError
from keye.train.config import Mix, load_train_config

HEADER = 'model = "nano"\noutput = "out"\n'
STAGE = '[[stage]]\nname = "one"\nsteps = 3\nmix = [{frames = 4, clips = 2, questions = 3}]\n'


def read(folder, text):
    path = folder / "run.toml"
    path.write_text(text)
    return load_train_config(path)


def test_reads_a_run(tmp_path):
    config = read(tmp_path, HEADER + "seed = 3\nsave_steps = 10\n" + STAGE)
    assert config.model == tmp_path / "nano"
    assert config.output == tmp_path / "out"
    assert (config.seed, config.save_steps) == (3, 10)
    (stage,) = config.stages
    assert stage.mix == (Mix(frames=4, clips=2, questions=3),)
    assert (stage.kind, stage.attention, stage.trains) == ("language", "dense", "decoder")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("model = ", "no readable TOML"),
        (HEADER, r"no \[\[stage\]\]"),
        (HEADER + "stage = 3", "stage must be a list of tables"),
        ('model = "nano"\n' + STAGE, "lacks 'output'"),
        (HEADER + "rate = 1\n" + STAGE, "unknown keys rate; known are model"),
        (HEADER + "threads = 0\n" + STAGE, "threads is 0"),
        (HEADER + "save_steps = 0\n" + STAGE, "save_steps is 0"),
        (HEADER + STAGE + "speed = 1\n", "stage 'one': unknown keys speed"),
        (HEADER + STAGE.replace("clips", "videos"), "mix: unknown keys videos"),
        (HEADER + STAGE.replace("clips = 2, ", ""), "mix: .*clips"),
        (HEADER + STAGE.replace("clips = 2", "clips = 0"), "clips is 0"),
        (HEADER + STAGE.replace('name = "one"\n', ""), "name"),
        (HEADER + STAGE.replace("steps = 3\n", ""), "needs steps or minutes"),
        (HEADER + STAGE.replace("steps = 3", "steps = 0"), "steps is 0"),
        (HEADER + STAGE + "lr = -1.0\n", "lr is -1.0"),
        (HEADER + STAGE.split("mix")[0], "needs a mix"),
        (HEADER + STAGE + 'kind = "sound"\n', "kind is 'sound'; choose vision, language"),
        (HEADER + STAGE + 'trains = "nothing"\n', "trains is 'nothing'"),
        (HEADER + STAGE + 'attention = "spares"\n', "attention is 'spares'; choose dense, warmup, sparse"),
        (HEADER + STAGE + 'kind = "vision"\n', 'set trains = "vision"'),
        (HEADER + STAGE + 'attention = "warmup"\n', 'set trains = "indexer"'),
        (HEADER + STAGE + 'trains = "indexer"\n', "gives the indexer nothing to learn"),
        (HEADER + STAGE + "task_weights = {juggle = 1.0}\n", "unknown tasks juggle; known are ground"),
        (HEADER + STAGE + "task_weights = {ground = -1.0}\n", "weight of ground in task_weights"),
        (HEADER + STAGE.replace("steps = 3", 'steps = "a"'), "steps is 'a'; it must be a whole number"),
        (HEADER + STAGE.replace("frames = 4", "frames = 1.5"), "mix: frames is 1.5; it must be a whole number"),
        (HEADER + 'seed = "x"\n' + STAGE, "seed is 'x'; it must be a whole number"),
        (HEADER + "fresh = 1\n" + STAGE, "fresh is 1; it must be true or false"),
        (HEADER + STAGE + 'split = "foo"\n', "split is 'foo'; choose train, test, unseen"),
        (HEADER + STAGE + "objects = 100\n", "objects is 100; choose 1 to 8"),
        (HEADER + STAGE + "text_chance = 1.5\n", "text_chance is 1.5; it must lie between 0 and 1"),
        (HEADER + STAGE + "events = -0.1\n", "events is -0.1; it must not be negative"),
        (HEADER + STAGE + "lr = inf\n", "lr is inf; it must be a number"),
        (HEADER + STAGE + STAGE, "two stages are named 'one'"),
        ('model = "nano"\noutput = 5\n' + STAGE, "output is 5; it must be a path in quotes"),
    ],
)
def test_mistakes_are_named(tmp_path, text, sentence):
    with pytest.raises(ConfigError, match=sentence):
        read(tmp_path, text)


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        load_train_config(tmp_path / "none.toml")


def test_the_recipe_of_nano_is_a_valid_configuration():
    config = load_train_config(Path(__file__).parents[2] / "configs" / "nano.toml")
    assert [stage.attention for stage in config.stages] == ["dense", "dense", "dense", "warmup", "sparse"]
    assert (config.model / "config.json").is_file()
