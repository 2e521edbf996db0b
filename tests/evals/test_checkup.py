"""`keye doctor --model`: each way to break a model gets the verdict that names it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import keye
from keye import Keye
from keye.cli import main
from keye.errors import KeyeError
from keye.evals.health.checkup import answer_nats, picture_questions, run_checkup
from keye.evals.health.verdict import STATED, Ranges, conclude, ranges_of, read_ranges, save_ranges
from keye.hub import asset
from keye.models.attention import Attention
from keye.models.moe import Experts
from tests.support.latent import latent_folder

#: What a healthy keye-nano showed.
HEALTHY = json.loads(asset("nano/doctor.json").read_text())["probes"]
NANO = read_ranges(asset("nano/doctor.json"))
#: A prompt format that no Keye model knows.
TEMPLATE = """{% for message in messages %}{{ message.role | upper }}: {% if message.content is string %}
{{- message.content }}{% else %}{% for part in message.content %}{% if part.type == "image" -%}
<|vision_start|><|image_pad|><|vision_end|>{% elif part.type == "video" -%}
<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}
{% endfor %}ASSISTANT:"""


def swap_gate_and_up(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, Experts):
            gate, up = module.gate_up_proj.detach().clone().chunk(2, -1)
            module.gate_up_proj.copy_(torch.cat((up, gate), -1))


def permute_rows(model: nn.Module) -> None:
    """The order of rotary pairs that llama.cpp wants of Llama, and not of Qwen."""
    for module in model.modules():
        for weight in (module.q_proj.weight, module.k_proj.weight) if isinstance(module, Attention) else ():
            rows, columns = weight.shape
            weight.copy_(weight.view(rows // 64, 2, 32, columns).transpose(1, 2).reshape(rows, columns))


def round_to_two_bits(model: nn.Module) -> None:
    for name, weight in model.named_parameters():
        if weight.dim() > 1 and weight.shape[-1] % 64 == 0 and not name.endswith("mlp.gate.weight"):
            groups = weight.float().unflatten(-1, (-1, 64))
            scale = groups.abs().amax(-1, keepdim=True)
            weight.copy_(((groups / scale).round() * scale).flatten(-2))


def change(how: Callable[[nn.Module], None]) -> Keye:
    model = keye.load("nano")
    with torch.no_grad():
        how(model.model)
    return model


def without_frame_text(folder: Path) -> Keye:
    copy = Path(shutil.copytree(asset("nano"), folder / "nano"))
    raw = json.loads((copy / "preprocessor_config.json").read_text())
    raw["keye"]["frame_text"] = " "
    (copy / "preprocessor_config.json").write_text(json.dumps(raw))
    return keye.load(copy)


def with_template(folder: Path) -> Keye:
    (folder / "wrong.jinja").write_text(TEMPLATE)
    return keye.load("nano", template=folder / "wrong.jinja")


BROKEN: dict[str, tuple[Callable[[Path], Keye], str | None]] = {
    "healthy": (lambda folder: keye.load("nano"), None),
    "int8": (lambda folder: keye.load("nano", quant="int8"), None),
    "int4": (lambda folder: keye.load("nano", quant="int4"), None),
    "template": (with_template, "template"),
    "frame text": (without_frame_text, "frame text"),
    "gate and up swapped": (lambda folder: change(swap_gate_and_up), "conversion"),
    "q and k permuted": (lambda folder: change(permute_rows), "conversion"),
    "two bits": (lambda folder: change(round_to_two_bits), "quantisation"),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::keye.errors.KeyeWarning")
@pytest.mark.parametrize("name", BROKEN)
def test_the_verdict_names_what_was_broken(name: str, tmp_path: Path) -> None:
    make, cause = BROKEN[name]
    probes = run_checkup(make(tmp_path), 24, scored=8)
    assert conclude(probes, NANO).cause == cause, probes


@pytest.mark.filterwarnings("ignore::keye.errors.KeyeWarning")
@pytest.mark.parametrize(("name", "cause"), [("healthy", None), ("q and k permuted", "conversion")])
def test_a_short_checkup(name: str, cause: str | None, tmp_path: Path) -> None:
    steps = list[tuple[int, int]]()
    probes = run_checkup(BROKEN[name][0](tmp_path), 2, lambda *step: steps.append(step), scored=2)
    assert set(probes) == set(STATED)
    two_questions = {"frameforge": HEALTHY["frameforge"]}  # say nothing of a share
    assert conclude(probes | two_questions, NANO).cause == cause, probes
    assert steps[0] == (0, 11) and steps[-1] == (11, 11) and steps == sorted(steps)


@pytest.mark.parametrize(
    ("changed", "cause"),
    [
        ({}, None),
        ({"levels": 6.0}, None),  # coarse, and nothing is lost
        ({"pictures": 10.9, "times": 2.5, "demo": 0.0, "word": 0.0, "frameforge": 0.14}, "template"),
        ({"times": 3.9, "demo": 0.09, "frameforge": 0.52}, "frame text"),
        ({"pictures": 2.1, "pictures_own": 2.1, "times": 2.7, "times_own": 2.7, "frameforge": 0.14}, "conversion"),
        ({"text": 12.0, "demo": 0.0}, "conversion"),
        ({"levels": 3.0, "pictures": 7.5, "pictures_own": 7.5, "times_own": 8.7, "times": 8.7}, "quantisation"),
        ({"levels": 1.0, "text": 7.5, "pictures": 7.5, "pictures_own": 7.5}, "conversion"),  # zeros
        ({"frameforge": 0.3}, "unclear"),
    ],
)
def test_what_probes_lead_to_which_verdict(changed: dict[str, float], cause: str | None) -> None:
    verdict = conclude({**HEALTHY, **changed}, NANO)
    assert verdict.cause == cause
    assert set(verdict.missed) == {name for name in changed if name != "levels" or changed[name] < 9}


def test_ranges_of_published_models_are_stated_and_those_of_nano_measured() -> None:
    nano = keye.load("nano")
    assert ranges_of(nano.config) == NANO and NANO.measured
    assert NANO.ranges["box"] is None and NANO.ranges["word"] == (1.0, 1.0)
    stated = Ranges("Keye-VL 2.0", False, STATED)
    assert conclude({**HEALTHY, "text": 2.6, "box": 0.8}, stated).cause is None
    assert conclude({**HEALTHY, "text": 11.9, "box": 0.8}, stated).cause == "conversion"


@pytest.mark.filterwarnings("ignore::keye.errors.KeyeWarning")
def test_the_only_template_of_a_release_is_not_compared(tmp_path: Path) -> None:
    model = keye.load(latent_folder(tmp_path / "671b"))
    questions = picture_questions(1)
    assert answer_nats(model, questions, own_template=True) == answer_nats(model, questions)


def test_ranges_are_saved_and_read(tmp_path: Path) -> None:
    file = tmp_path / "healthy.json"
    save_ranges(file, "nano", HEALTHY)
    assert read_ranges(file).ranges == NANO.ranges
    for text in ("{}", json.dumps({"ranges": {**NANO.ranges, "text": [1]}})):
        file.write_text(text)
        with pytest.raises(KeyeError, match="holds no ranges"):
            read_ranges(file)


@pytest.mark.slow
def test_the_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: Any) -> tuple[int, str, str]:
        code = main(["doctor", *map(str, arguments), "--questions", "24"])
        return (code, *capfd.readouterr())

    code, out, _ = run("--model", "nano", "--json")
    data = json.loads(out)
    assert (code, data["ok"], data["verdict"]["cause"], data["ranges"]["measured"]) == (0, True, None, True)
    code, out, err = run("--model", "nano", "--save-ranges", tmp_path / "healthy.json")
    assert code == 0 and "look right" in out and "of 33" in err
    (tmp_path / "wrong.jinja").write_text(TEMPLATE)
    code, out, _ = run("--model", "nano", "--template", tmp_path / "wrong.jinja", "--ranges", tmp_path / "healthy.json")
    assert code == 1 and "prompt format looks wrong" in " ".join(out.split())
    assert main(["doctor", "--ranges", str(tmp_path / "healthy.json")]) == 2
    (tmp_path / "other.json").write_text("[]")
    assert main(["doctor", "--model", "nano", "--save-ranges", str(tmp_path / "other.json")]) == 2


def test_tensors_are_left_as_they_are() -> None:
    """Looking at the weights changes none."""
    model = keye.load("nano")
    before: dict[str, Tensor] = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    from keye.evals.health.checkup import count_levels

    assert count_levels(model) > 32
    assert all(torch.equal(before[name], tensor) for name, tensor in model.model.state_dict().items())
