"""Releases as objects: a new one is one class, and no other package compares names of releases."""

from __future__ import annotations

import ast
import copy
import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from keye.chat.template import template_of
from keye.config import ProcessorConfig, load_processor_config, model_config_from_dict
from keye.config.media import MediaOptions
from keye.errors import KeyeError
from keye.hub import asset
from keye.media.processor import Processor, VisualSpan
from keye.releases import RELEASES, V1_5, V2, FrameDemand, Release, find_release, register

ROOT = Path(__file__).parents[2]
#: Names of releases and of their architectures.
NAMES = {name.lower() for release in RELEASES.values() for name in (release.name, *release.architectures)}


class Keye3(Release):
    """A release that exists in this test only."""

    name = "3.0"
    architectures = {"KeyeVL3ForConditionalGeneration": ()}  # noqa: RUF012
    default_system = "Be brief."
    thinking = "suffix"
    processor_defaults = {"video_max_tokens": 16, "video_min_tokens": 4, "frame_text": "[{seconds:.2f}]"}  # noqa: RUF012
    frame_resize = "bilinear"
    fast_frame_marks = ("<fast>", "</fast>")

    def count_frames(self, demand: FrameDemand) -> int:
        return min(3, demand.total)

    def label_seconds(self, seconds: float) -> float:
        return seconds + 100


@pytest.fixture
def release() -> Iterator[Release]:
    yield register(Keye3())
    del RELEASES["3.0"]


def test_a_new_release_is_one_class(release: Release, tmp_path: Path) -> None:
    """Its configuration, frames, sizes, labels and prompts follow its own rules."""
    raw = json.loads((asset("configs/1.5") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"architectures": list(release.architectures)}))
    config = load_processor_config(tmp_path)
    assert config == ProcessorConfig.of("3.0") and config.release is release
    model = model_config_from_dict(json.loads((tmp_path / "config.json").read_text()))
    assert model.release is release and model.tokens_per_second is None and not model.vision.whole_video_attention
    frames = np.zeros((9, 280, 280, 3), dtype=np.uint8)
    item = Processor(config).frames(frames, MediaOptions(fps=2.0))
    assert item.frame_count == 3, "three of nine"
    assert item.pieces == (
        "[100.00]", VisualSpan("video", 16), "[102.00]<fast>", VisualSpan("video", 4), "</fast>[104.00]<fast>",
        VisualSpan("video", 4), "</fast>",
    )  # fmt: skip
    segments = template_of(model.release).render([{"role": "user", "content": "hi"}], thinking=False)
    assert "".join(str(segment.value) for segment in segments) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi/no_think<|im_end|>\n<|im_start|>assistant\n"
    )


def test_releases_are_found_by_name() -> None:
    assert find_release("671b") is RELEASES["671B"]
    with pytest.raises(KeyeError, match="release '4.0' is not known; known are preview, 1.5, 2.0, 671B"):
        find_release("4.0")


def test_a_copy_of_a_release_is_that_release() -> None:
    assert copy.deepcopy(V1_5) is V1_5
    assert pickle.loads(pickle.dumps(ProcessorConfig.of(V2))) == ProcessorConfig.of("2.0")  # noqa: S301


def test_old_name_of_the_field_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text('{"keye": {"generation": "1.5"}}')
    with pytest.raises(KeyeError, match=r"keye\.generation; the field is called release now"):
        load_processor_config(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"keye": {"release": "1.5"}}')
    assert load_processor_config(tmp_path).release is V1_5


# --------------------------------------------------------------------------------------------------------------------


def names_a_release(node: ast.AST) -> bool:
    """Whether an expression is the name or an architecture of a release, or a collection with one."""
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str) and node.value.lower() in NAMES
    if isinstance(node, ast.Call):
        return any(map(names_a_release, node.args))
    return isinstance(node, ast.Tuple | ast.List | ast.Set) and any(map(names_a_release, node.elts))


def decisions(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Lines where code decides by the name of a release."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and any(map(names_a_release, [node.left, *node.comparators])):
            yield node.lineno, "compares the name of a release"
        if isinstance(node, ast.Compare) and any(
            isinstance(side, ast.Attribute) and side.attr == "release" for side in [node.left, *node.comparators]
        ):
            yield node.lineno, "compares a release"
        if isinstance(node, ast.Dict) and any(key is not None and names_a_release(key) for key in node.keys):
            yield node.lineno, "is a table keyed by names of releases"
        if isinstance(node, ast.MatchValue) and names_a_release(node.value):
            yield node.lineno, "matches the name of a release"


@pytest.mark.parametrize("line", [
    'config.generation == "2.0"', 'name in ("preview", "other")', 'TABLE = {"1.5": 1}', 'config.release is V2',
    'name in frozenset({"KeyeForConditionalGeneration"})', 'match name:\n    case "671b": pass',
])  # fmt: skip
def test_a_decision_by_name_is_seen(line: str) -> None:
    assert list(decisions(ast.parse(line)))


@pytest.mark.parametrize("folder", ["src/keye", "plugins/keye-vllm/src"])
def test_no_code_decides_by_the_name_of_a_release(folder: str) -> None:
    result = [
        f"{path.relative_to(ROOT)}:{line} {what}: ask an attribute of the release (keye.releases)"
        for path in sorted((ROOT / folder).rglob("*.py"))
        if ROOT / "src/keye/releases" not in path.parents
        for line, what in decisions(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not result, "\n".join(result)
