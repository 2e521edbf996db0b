"""llm, the command line tool, with keye as a model of extra-openai-models.yaml."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import common
from common import MODEL, SCHEMA, case, check_answer

HOME = Path(tempfile.mkdtemp(prefix="keye-llm-"))
PROGRAM = str(Path(sys.executable).parent / "llm")
MODELS = f"""- model_id: keye
  model_name: {MODEL}
  api_base: {common.API}
  api_key_name: keye
  supports_schema: true
  supports_tools: true
  vision: true
"""


def run(*arguments: str, status: int = 0) -> str:
    """What `llm` prints."""
    environment = {**os.environ, "LLM_USER_PATH": str(HOME)}
    done = subprocess.run([PROGRAM, *arguments], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout if status == 0 else done.stderr


@case("chat")
def _() -> None:
    assert run("-m", "keye", "hello", "-o", "max_tokens", "24", "--no-stream").strip()
    assert run("-c", "and then?", "-o", "max_tokens", "24").strip()


@case("stream")
def _() -> None:
    options = ("-m", "keye", "hello", "-o", "max_tokens", "24", "-o", "temperature", "0")
    assert run(*options).strip() == run(*options, "--no-stream").strip() != ""


@case("image")
def _() -> None:
    (HOME / "red.png").write_bytes(common.png())
    assert run("-m", "keye", "what colour is it?", "-a", str(HOME / "red.png"), "-o", "max_tokens", "24").strip()


@case("tools")
def _() -> None:
    function = "def get_weather() -> str:\n    'The weather.'\n    return 'sunny'"
    assert run("-m", "keye", "hello", "--functions", function, "-o", "max_tokens", "60", "--chain-limit", "3")


@case("structured")
def _() -> None:
    check_answer(json.loads(run("-m", "keye", "hello", "--schema", json.dumps(SCHEMA), "-o", "max_tokens", "100")))


@case("errors")
def _() -> None:
    assert "temperature" in run("-m", "keye", "hello", "-o", "temperature", "2.5", status=1)


(HOME / "extra-openai-models.yaml").write_text(MODELS)
(HOME / "keys.json").write_text(json.dumps({"keye": common.KEY}))
try:
    common.report()
finally:
    shutil.rmtree(HOME, ignore_errors=True)
