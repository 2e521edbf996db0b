"""The files of configs/train: each is valid, and runs at toy size."""

import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from keye.config.toml import to_toml
from keye.models.load import save_model
from keye.train.loop import train
from keye.train.recipes import load_run
from keye.train.recipes.family.config import FamilyConfig
from tests.support.family import family_stage, learn, talk, tiny_network, write_rows
from tests.support.tiny import tiny_folder

CONFIGS = Path(__file__).parents[3] / "configs" / "train"
FILES = sorted(CONFIGS.glob("*.toml"))
#: What toy runs replace in every stage that has it.
SMALL = {"steps": 2, "max_tokens": 512, "context": 1024, "warmup_steps": 1, "eval_steps": 1, "lr": 1e-3}
SAMPLING = {"replies": 4, "max_tokens": 8, "prompts": 4, "temperature": 1.0}


def load_stages(path):
    config, _ = load_run(path)
    assert isinstance(config, FamilyConfig)
    return config.stages


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_is_valid_and_says_what_it_trains(path):
    jsonschema = pytest.importorskip("jsonschema")
    text = path.read_text(encoding="utf-8")
    assert text.startswith("#:schema ../../docs/schemas/train.json\n")
    schema = json.loads((CONFIGS.parents[1] / "docs" / "schemas" / "train.json").read_text())
    jsonschema.validate(tomllib.loads(text), schema)
    for stage in load_stages(path):
        assert stage.data
        assert stage.objective in ("pairs", "modes") or "trains" in stage.model_fields_set


def test_the_stages_go_on_where_others_end():
    runs = {path.stem: load_run(path)[0] for path in FILES}
    outputs = {config.output.name for config in runs.values()}
    starts = {config.model.name for config in runs.values() if config.model.parent.name == "runs"}
    assert starts <= outputs
    assert load_stages(CONFIGS / "anneal.toml")[0].rope_theta == 8e6


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with toy data under the names of the files, and a tiny model that answers red or blue."""
    root = tmp_path_factory.mktemp("recipe")
    data = root / "data"
    data.mkdir()
    colors = {"red": (200, 0, 0), "blue": (0, 0, 200)}
    for name, color in colors.items():
        Image.fromarray(np.full((56, 84, 3), color, np.uint8)).save(data / f"{name}.png")
    names = list(colors) * 4
    pictures = [talk("<image>Which color?", name, images=[f"{name}.png"]) for name in names]
    texts = [talk(f"Which color is {n}?", name) for n, name in enumerate(names)]
    thinking = [talk(f"Which color is {n}?", f"<think>It is {name}.</think>{name}") for n, name in enumerate(names)]
    videos = [
        talk("<video>Which color?", name, videos=[[f"{name}.png", "red.png", "blue.png"]], fps=1) for name in names
    ]
    tools = [tool_talk(name) for name in names]
    pairs = [talk(f"Which color is {n}?", "red", rejected_response="blue") for n in range(4)]
    files = {"captions": pictures, "interleaved": pictures, "ocr": pictures, "grounding": pictures, "videos": videos,
             "text": texts, "held-out": texts[:2], "direct": texts, "reasoning": thinking, "tools": tools,
             "videos-best": videos, "questions": texts, "pairs": pairs, "pairs-held-out": pairs[:2]}  # fmt: skip
    for name, rows in files.items():
        write_rows(data / f"{name}.jsonl", rows)
    model = tiny_network()
    learn(model, family_stage(data / "text.jsonl", max_tokens=512), tiny_folder(root / "model", weights=False), 20)
    for name in ("model", "models/teacher"):
        save_model(model, tiny_folder(root / name, weights=False), dtype=torch.float32)
    (root / "runs" / "8-pairs").mkdir(parents=True)
    write_rows(root / "runs" / "8-pairs" / "pairs.jsonl", pairs)
    return root


def tool_talk(name):
    call = {"function": {"name": "crop", "arguments": '{"box": [0, 0, 500, 500]}'}}
    messages = [
        {"role": "user", "content": "<image>Which color is the corner?"},
        {"role": "assistant", "content": "<think>I look closer.</think>", "tool_calls": [call]},
        {"role": "tool", "content": "<image>"},
        {"role": "assistant", "content": f"<think>It is {name}.</think>{name}"},
    ]
    return {"messages": messages, "images": [f"{name}.png", f"{name}.png"]}


def shrink(stage):
    """The stage at toy size."""
    small = {name: value for name, value in SMALL.items() if name in stage}
    small |= {"batch": 2} if "batch" in stage else {}
    if "siglip" in stage:
        small["siglip"] = {"width": 16, "layers": 1, "heads": 2, "tokens": 8}
    if "sampling" in stage:
        small["sampling"] = SAMPLING
    small["data"] = [entry | {"path": entry["path"].partition("#")[0]} for entry in stage["data"]]
    return {name: value for name, value in (stage | small).items() if name not in ("judge", "media")}


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_stage_runs_at_toy_size(root, path):
    raw = tomllib.loads(path.read_text(encoding="utf-8"))
    assert "renews" in raw if path.stem in ("projector", "indexer-warmup") else "renews" not in raw
    raw |= {"model": "../../model", "fused": False, "log_seconds": 0.0, "stage": [shrink(s) for s in raw["stage"]]}
    folder = root / "configs" / "train"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / path.name).write_text(to_toml(raw))
    config, recipe = load_run(folder / path.name)
    if path.stem == "pairs":
        config = config.model_copy(update={"output": root / "runs" / "pairs-here"})
    out = train(config, recipe)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in log} == {stage.name for stage in config.stages}
    assert all(value is not None for line in log for value in line.values())
    again, _ = load_run(out / "config.toml")
    assert again.stages == config.stages
    check_stage(path.stem, out, log)


def check_stage(name, out, log):
    """What a file promises beyond an end."""
    if name == "anneal":
        raw = json.loads((out / "config.json").read_text())
        assert (raw["max_position_embeddings"], raw["rope_theta"]) == (1024, 8e6)
    if name == "indexer-warmup":
        assert all("loss" not in line for line in log) and any("kl" in line for line in log)
    if name == "mpo":
        assert {"looping_before", "looping_after", "val_accuracy"} <= {key for line in log for key in line}
        assert (out / "round-1.jsonl").exists() and (out / "round-2.jsonl").exists()
    if name == "pairs":
        assert (out / "pairs.jsonl").read_text().count("rejected_response") >= 1
    if name == "sft":
        rows = [json.loads(line) for line in (out / "auto-labels.jsonl").read_text().splitlines()]
        assert len(rows) == 4 and {row["mode"] for row in rows} == {"auto"}
    if name == "distill":
        assert any("kl_to_teacher" in line for line in log)
