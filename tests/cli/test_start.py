"""What must be there before a model is: help, version, errors of usage, and none of it slow."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from keye.cli import LazyGroup
from keye.cli import run as run_command
from keye.errors import KeyeError
from keye.hub import asset

LIGHT = """
import sys
from keye.cli import main
code = main(sys.argv[1:])
heavy = {"torch", "pydantic", "numpy", "av", "rich", "huggingface_hub", "keye.chat"} & set(sys.modules)
sys.exit(f"{code=} {heavy=}" if code or heavy else 0)
"""


@pytest.mark.parametrize(
    "arguments", [["-h"], ["--version"], ["ask", "-h"], ["plan", "--help"], ["eval", "frameforge", "-h"]]
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "keye" in done.stdout


def test_plan_imports_neither_torch_nor_pydantic(model_folder: object, video: object) -> None:
    code = LIGHT.replace(', "numpy", "av", "rich", "huggingface_hub", "keye.chat"', "")
    arguments = ["plan", str(video), "--model", str(model_folder)]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_version(run: Callable) -> None:
    import keye

    assert run("--version").out == f"keye, version {keye.__version__}\n"


def test_help_lists_every_verb(run: Callable) -> None:
    out = run("-h").out
    assert all(verb in out for verb in ("ask", "ground", "plan", "train", "eval", "doctor"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["grond"], "did you mean ground?"),
        (["xyz"], "Commands are ask, ground"),
        (["ask", "--max-frame", "3", "v.mp4", "q"], "--max-frames"),
        (["ask", "--fps", "0", "v.mp4", "q"], "must be above 0"),
        (["ask", "--fps", "nan", "v.mp4", "q"], "must be above 0"),
        (["ask", "--start", "soon", "v.mp4", "q"], "write seconds, mm:ss or hh:mm:ss"),
        (["ask", "--attention", "full", "v.mp4", "q"], "'sparse', 'dense'"),
        (["ground", "v.mp4"], "EVENT"),
        (["plan"], "FILES"),
        (["eval", "framforge"], "framforge"),
        (["ask"], "give a file and a question"),
        (["ask", "what happens?"], "put a video or an image before the question"),
    ],
)
def test_errors_of_usage_are_one_line(run: Callable, arguments: list[str], sentence: str) -> None:
    result = run(*arguments)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("keye: ") and result.err.count("\n") == 1
    assert sentence in result.err


def failing(error: BaseException) -> click.Command:
    @click.command()
    @click.option("--debug", is_flag=True)
    def fail(debug: bool) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (KeyeError("the file is odd\nand long; change it"), 2, "keye: the file is odd and long; change it\n"),
        (KeyeError("\x1b[31mred"), 2, "keye: \N{REPLACEMENT CHARACTER}[31mred\n"),
        (RuntimeError("a\nb"), 1, "keye: unexpected RuntimeError: a b; run again with --debug to see where\n"),
        (ValueError(), 1, "keye: unexpected ValueError: no message; run again with --debug to see where\n"),
        (KeyboardInterrupt(), 130, "\n"),
    ],
)
def test_what_goes_wrong_is_one_sentence(
    error: BaseException, code: int, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(failing(error), []) == code
    assert capsys.readouterr().err == sentence


@pytest.mark.parametrize(("error", "code"), [(KeyeError("odd"), 2), (RuntimeError("odd"), 1)])
def test_debug_shows_the_traceback(error: Exception, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(failing(error), ["--debug"]) == code
    displayed = capsys.readouterr().err
    assert "Traceback" in displayed and displayed.splitlines()[-1].startswith("keye: ") and "run again" not in displayed


def test_a_closed_pipe_is_quiet() -> None:
    code = "import sys; from keye.cli import main; sys.exit(main(['-h']))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.wait()
    process.stderr.close()


def test_verbs_are_imported_when_used() -> None:
    group = LazyGroup("tool", verbs={"gone": ("keye.no_such_module:verb", "does nothing")})
    context = click.Context(group)
    assert "does nothing" in group.get_help(context)
    with pytest.raises(ModuleNotFoundError):
        group.get_command(context, "gone")


def test_commands_set_their_environment_unless_the_user_did(monkeypatch: pytest.MonkeyPatch, run: Callable) -> None:
    import os

    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    assert run("train", "-h").code == 0
    assert (os.environ["OMP_WAIT_POLICY"], os.environ["LRU_CACHE_CAPACITY"]) == ("PASSIVE", "7")
    monkeypatch.delenv("OMP_WAIT_POLICY")


@pytest.mark.parametrize("verb", ["serve", "batch"])
def test_a_missing_extra_is_named_before_any_work(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, verb: str
) -> None:
    for module in ("keye.server.run", "keye.server.app", "keye.server.batch_engine"):
        monkeypatch.setitem(sys.modules, module, None)
    question = {"id": "one", "video": str(asset("demo.mp4")), "question": "when is the red circle visible?"}
    (tmp_path / "questions.jsonl").write_text(json.dumps(question))
    batch = [tmp_path / "questions.jsonl", "-o", tmp_path / "answers.jsonl"]
    result = run(verb, *(batch if verb == "batch" else []))
    assert result.code == 2
    sentence = f"keye {verb} needs; pip install 'keye[serve]', or in a clone pip install -e '.[serve]', brings it"
    assert sentence in " ".join(result.err.split())
