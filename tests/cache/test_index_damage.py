"""Noise in an index ends the question that would read it; it never changes an answer."""

from __future__ import annotations

import random
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import keye
from keye import Frames, Keye, KeyeError
from keye.cache.index_file import IndexFile, open_mapped, read_index_file
from keye.engine.request import Failed, Finished
from keye.ops.kv_blocks import KV_BLOCK
from tests.support.engine import Inbox
from tests.support.reference import PlainSequence
from tests.support.tiny import tiny_folder

FRAMES = Frames(np.random.default_rng(0).integers(0, 255, (200, 56, 56, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Keye]:
    folder = tiny_folder(tmp_path_factory.mktemp("models") / "tiny")
    return lambda **options: keye.load(folder, **options)


@pytest.fixture(scope="module")
def model(load: Callable[..., Keye]) -> Keye:
    return load()


@pytest.fixture(scope="module")
def index(model: Keye, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 blocks or so in two layers."""
    path = tmp_path_factory.mktemp("index") / "long.keye"
    model.index(FRAMES, path)
    return path


def ask(model: Keye, path: Path, **options: Any) -> Any:
    content = [{"type": "video", "video": str(path)}, {"type": "text", "text": "what is red?"}]
    messages = [{"role": "user", "content": content}]
    request: Any = model.request(messages, max_tokens=6, ignore_eos=True, logprobs=0, **options)
    inbox = Inbox()
    model.core.add(request, inbox)
    while not model.core.is_idle():
        if not model.core.step():
            model.core.wait_for_work()
    end = inbox.events[-1]
    if isinstance(end, Failed):
        raise end.error
    assert isinstance(end, Finished)
    return [(p.token, p.logprob) for event in inbox.events for p in getattr(event, "probs", ())]


def spoil(path: Path, file: IndexFile, kind: str, layer: int, block: int) -> None:
    """Puts noise into one KV block."""
    section = file.sections[kind]
    size = section.nbytes // (file.layout.layers * file.blocks)
    place = section.offset + (layer * file.blocks + block) * size
    data = bytearray(path.read_bytes())
    data[place : place + size] = random.Random(place).randbytes(size)
    path.write_bytes(data)


@pytest.mark.parametrize("kind", ["indexer_k", "k", "v"])
def test_noise_never_changes_an_answer(model: Keye, index: Path, tmp_path: Path, kind: str) -> None:
    own, file, plain = tmp_path / "own.keye", read_index_file(index), ask(model, index)
    message: list[str] = []
    for block in range(3, file.blocks - 1, 4):
        shutil.copyfile(index, own)
        spoil(own, file, kind, block % 2, block)
        try:
            assert ask(model, own) == plain
        except KeyeError as error:
            message.append(str(error))
    assert message and all("own.keye is damaged (KV block" in item and "with keye index" in item for item in message)


def test_dense_attention_reads_and_compares_everything(load: Callable[..., Keye], index: Path, tmp_path: Path) -> None:
    dense, own = load(attention="dense"), tmp_path / "own.keye"
    dense.index(FRAMES, own)
    file, total = read_index_file(own), own.read_bytes()
    for kind in ("k", "v"):
        own.write_bytes(total)
        spoil(own, file, kind, 1, 5)
        with pytest.raises(KeyeError, match=rf"is damaged \(KV block {file.blocks + 5} of its {kind}"):
            ask(dense, own)


def test_only_the_question_about_the_damaged_index_fails(model: Keye, index: Path, tmp_path: Path) -> None:
    own = Path(shutil.copyfile(index, tmp_path / "own.keye"))
    spoil(own, read_index_file(index), "indexer_k", 1, 7)
    good, bad = Inbox(), Inbox()
    for path, inbox in ((index, good), (own, bad)):
        content = [{"type": "video", "video": str(path)}, {"type": "text", "text": "what is red?"}]
        model.core.add(model.request([{"role": "user", "content": content}], max_tokens=3), inbox)
    while not model.core.is_idle():
        if not model.core.step():
            model.core.wait_for_work()
    assert isinstance(good.events[-1], Finished) and isinstance(bad.events[-1], Failed)


def test_one_sequence_by_itself_compares_too(model: Keye, index: Path, tmp_path: Path) -> None:
    own = Path(shutil.copyfile(index, tmp_path / "own.keye"))
    spoil(own, read_index_file(index), "indexer_k", 0, 9)
    content = [{"type": "video", "video": str(own)}, {"type": "text", "text": "what?"}]
    prompt = model.runtime.prompts.lay_out(model.request([{"role": "user", "content": content}]).prompt)  # type: ignore[arg-type]
    with pytest.raises(KeyeError, match="is damaged"):
        PlainSequence(model.model).prefill(prompt)


def test_blocks_are_compared_once_until_the_file_changes(
    model: Keye, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Path(shutil.copyfile(index, tmp_path / "own.keye"))
    compared: list[int] = []
    crc32 = zlib.crc32
    monkeypatch.setattr(zlib, "crc32", lambda data: compared.append(len(data)) or crc32(data))
    plain = ask(model, own)
    first, file = len(compared), read_index_file(own)
    assert first > 0
    assert ask(model, own) == plain and len(compared) == first
    spoil(own, file, "indexer_k", 0, 9)
    with pytest.raises(KeyeError, match="is damaged"):
        ask(model, own)


def test_the_block_that_is_copied_is_compared_on_opening(index: Path, tmp_path: Path) -> None:
    file = read_index_file(index)
    assert file.length % KV_BLOCK, "its last block is not full"
    own = tmp_path / "own.keye"
    for kind in ("indexer_k", "k", "v"):
        for layer in range(file.layout.layers):
            shutil.copyfile(index, own)
            spoil(own, file, kind, layer, file.blocks - 1)
            with pytest.raises(KeyeError, match="is damaged"):
                open_mapped(own)
