"""Everything a user can get wrong: one sentence on standard error, exit code 2, no traceback, nothing left behind."""

from __future__ import annotations

import functools
import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

Run = Callable


@pytest.fixture
def fails(run: Run, tmp_path: Path) -> Callable[..., str]:
    """Runs a command that must fail as a user's mistake and returns its sentence."""

    def check(*arguments: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        result = run(*arguments)
        assert (result.code, result.out) == (2, "")
        assert result.err.startswith("keye: ") and result.err.count("\n") == 1 and "Traceback" not in result.err
        assert sorted(tmp_path.rglob("*")) == before
        return result.err

    return check


def write_sound(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        stream.layout = "mono"  # type: ignore[union-attr]
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16000, 0
        container.mux([*stream.encode(frame), *stream.encode()])  # type: ignore[union-attr]


def write_absurd_png(path: Path) -> None:
    """A file of some bytes that claims to be a picture of 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )


def write_fragment(path: Path) -> Path:
    """The first part of a video of four seconds whose container declares all of it."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 112, 112, "yuvj420p"  # type: ignore[union-attr]
        for i in range(40):
            pixels = np.full((112, 112, 3), 6 * i, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))  # type: ignore[union-attr]
        container.mux(stream.encode())  # type: ignore[union-attr]
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * 0.6)])
    return path


def make_bad_file(kind: str, folder: Path, video: Path) -> Path:
    path = folder / {"absurd picture": "bad.png", "sound": "bad.m4a"}.get(kind, "bad.mp4")
    good = video.read_bytes()
    if kind == "corrupt":
        path.write_bytes(bytes(range(256)) * 40)
    elif kind == "truncated":
        path.write_bytes(good[: len(good) // 2])
    elif kind == "empty":
        path.touch()
    elif kind == "sound":
        write_sound(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "absurdly large":
        with path.open("wb") as file:
            os.truncate(file.fileno(), 65 * 2**30)  # sparse: takes no space
    elif kind == "absurd picture":
        write_absurd_png(path)
    return path


BAD_FILES = [
    ("corrupt", "not a video that can be read"),
    ("truncated", "cut short"),
    ("empty", "is empty (0 bytes)"),
    ("sound", "no video stream (it may be audio only)"),
    ("folder", "is a directory; name a file inside it"),
    ("absurdly large", "more than the limit of 64 GiB"),
    ("absurd picture", "pixels"),
    ("missing", "does not exist"),
]


@pytest.mark.parametrize(("kind", "sentence"), BAD_FILES)
def test_bad_files(
    fails: Callable[..., str], kind: str, sentence: str, tmp_path: Path, video: Path, model_folder: Path
) -> None:
    path = make_bad_file(kind, tmp_path, video)
    assert sentence in fails("ask", path, "what happens?", "--model", model_folder)
    assert sentence in fails("plan", path, "--model", model_folder)
    if kind != "absurd picture":
        assert sentence in fails("ground", path, "the circle", "--model", model_folder, "--clips", tmp_path / "clips")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "nanno"], "did you mean nano"),
        (["--model", "./gone"], "does not exist"),
        (["--max-tokens", 2000], "the context holds 1024"),
        (["--top-p", 7], "top_p is 7.0; it must be a number above 0 and at most 1"),
        (["--device", "toaster"], "device 'toaster' cannot be used here"),
        (["--device", "meta"], "device 'meta' cannot be used here"),
        (["--start", 10], "--start 10 lies after the end of the video at 4.00 s; choose an earlier time"),
        (["--start", 10, "--end", 12.5], "--start 10 lies after the end of the video"),
        (["--fps", 1, "--nframes", 2], "--fps and --nframes exclude each other"),
        (["--min-frames", 10, "--max-frames", 4], "--min-frames 10 is above --max-frames 4"),
        (["--total-pixels", 10], "raise --total-pixels"),
    ],
)
def test_bad_settings(
    fails: Callable[..., str], arguments: list[object], sentence: str, video: Path, model_folder: Path
) -> None:
    model = [] if "--model" in arguments else ["--model", model_folder]
    assert sentence in fails("ask", video, "what happens?", *model, *arguments)


def test_sentences_name_the_options_of_the_command_line(
    fails: Callable[..., str], tmp_path: Path, model_folder: Path
) -> None:
    cut = write_fragment(tmp_path / "cut.mkv")
    for command in (["plan", cut], ["ask", cut, "what?"], ["ground", cut, "the circle"]):
        assert "download it again or pass --end " in fails(*command, "--model", model_folder)
    thin = tmp_path / "thin.png"
    Image.new("RGB", (10_000, 3)).save(thin)
    for command in (["plan", thin], ["ask", thin, "what?"]):
        assert "thin.png is 10000x3 pixels, an aspect ratio above 200" in fails(*command, "--model", model_folder)


def test_bad_words(fails: Callable[..., str], video: Path, model_folder: Path) -> None:
    assert "the question is empty" in fails("ask", video, " ", "--model", model_folder)
    assert "the event is empty" in fails("ground", video, " ", "--model", model_folder)
    assert "put the question after the files" in fails("ask", video, video)
    assert "put a video or an image before the question" in fails("ask", "what happens?")


def change_weights(folder: Path, kind: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.o_proj.weight"
    if kind == "missing":
        del tensors[name]
    elif kind == "unexpected":
        tensors["model.layers.9.self_attn.o_proj.weight"] = torch.zeros(2)
    else:
        tensors[name] = torch.zeros(3, 5, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("kind", ["missing", "unexpected", "mis-shaped"])
def test_checkpoints_that_do_not_fit(fails: Callable[..., str], own_model: Path, video: Path, kind: str) -> None:
    change_weights(own_model, kind)
    sentence = fails("ask", video, "what?", "--model", own_model)
    assert f"{kind}: model.layers." in sentence and "self_attn.o_proj.weight" in sentence


def test_pickles_are_refused(fails: Callable[..., str], own_model: Path, video: Path) -> None:
    (own_model / "model.safetensors").rename(own_model / "pytorch_model.bin")
    assert "only as pickle files (pytorch_model.bin)" in fails("ask", video, "what?", "--model", own_model)


@pytest.mark.parametrize(
    ("file", "text", "sentence"),
    [
        ("config.json", "{", "cannot be read as JSON"),
        ("config.json", "{}", "architecture none is not supported"),
        ("model.safetensors", "no weights", "cannot be read as safetensors"),
        ("preprocessor_config.json", '{"patch_size": 16}', "vision_config.patch_size is 14; they must agree"),
        ("generation_config.json", '{"temperature": "hot"}', "temperature 'hot'; it must be a number"),
        ("preprocessor_config.json", '{"keye": {"fsp": 2}}', "unknown keye fields fsp"),
    ],
)
def test_broken_checkpoint_files(
    fails: Callable[..., str], own_model: Path, video: Path, file: str, text: str, sentence: str
) -> None:
    (own_model / file).write_text(text)
    assert sentence in fails("ask", video, "what?", "--model", own_model)


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def test_a_template_that_loops(
    fails: Callable[..., str], own_model: Path, video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from keye.chat.template_process import TemplateLimits

    monkeypatch.setattr(TemplateLimits, "__init__", functools.partialmethod(TemplateLimits.__init__, cpu_seconds=1))
    (own_model / "chat_template.jinja").write_text(LOOP)
    sentence = fails("ask", video, "what?", "--model", own_model, "--template", "checkpoint")
    assert "chat template" in sentence and "does not come to an end" in sentence


def test_templates_that_are_not_there(fails: Callable[..., str], own_model: Path, video: Path, tmp_path: Path) -> None:
    arguments = ["ask", video, "what?", "--model", own_model, "--template"]
    assert "holds no chat template" in fails(*arguments, "checkpoint")
    assert "gone.jinja does not exist" in fails(*arguments, tmp_path / "gone.jinja")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("{", "is not JSON"), ("3", "give a list of functions"), ('[{"name": "a b"}]', "has the name 'a b'")],
)
def test_tools(fails: Callable[..., str], text: str, sentence: str, video: Path, tmp_path: Path) -> None:
    (tmp_path / "tools.json").write_text(text)
    assert sentence in fails("ask", video, "what?", "--tools", tmp_path / "tools.json")
    assert "cannot be read" in fails("ask", video, "what?", "--tools", tmp_path / "gone.json")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("out.mp4", "that --draw can write"), ("gone/out.png", "in a folder that exists"), ("out.png", "in one image")],
)
def test_drawings(fails: Callable[..., str], name: str, sentence: str, video: Path, tmp_path: Path) -> None:
    assert sentence in fails("ask", video, "what?", "--draw", tmp_path / name)


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("image_token_id", 7, "The tokenizer gives <|image_pad|> the id"),
        ("vocab_size", 1760, "config.json sets vocab_size to 1760"),
        ("eos_token_id", 99_999, "config.json sets eos_token_id to 99999"),
    ],
)
def test_a_tokenizer_that_disagrees_with_the_config(
    fails: Callable[..., str], own_model: Path, video: Path, field: str, value: int, sentence: str
) -> None:
    config = json.loads((own_model / "config.json").read_text()) | {field: value}
    (own_model / "config.json").write_text(json.dumps(config))
    assert sentence in fails("ask", video, "what?", "--model", own_model)


def test_training_configurations(fails: Callable[..., str], tmp_path: Path) -> None:
    assert "does not exist" in fails("train", tmp_path / "gone.toml")
    assert "not valid TOML" in fails("train", tmp_path)
    head = "recipe = 'nano'\nmodel = 'm'\noutput = 'o'\n"
    unknown = head + "[[stage]]\nsteps = 3\nname = 'a'\nspeed = 2"
    bad = [("stage = 1 2", "not valid TOML"), (head, "stage is missing"), (unknown, "unknown key speed")]
    for text, sentence in bad:
        (tmp_path / "run.toml").write_text(text)
        assert sentence in fails("train", tmp_path / "run.toml")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [(["--frames", "32-16"], "frames is 32-16"), (["--n", 0], "n is 0"), (["--frames", "x"], "range such as 16-32")],
)
def test_evaluations(fails: Callable[..., str], arguments: list[object], sentence: str) -> None:
    assert sentence in fails("eval", "frameforge", *arguments)


def test_errors_leave_json_output_empty(fails: Callable[..., str], tmp_path: Path, model_folder: Path) -> None:
    assert "does not exist" in fails("ask", tmp_path / "gone.mp4", "what?", "--json", "--model", model_folder)
