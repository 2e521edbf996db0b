"""The container files name what exists, and commands that `keye serve` understands."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from keye.commands.serve import serve

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cuda"])
def test_images_copy_what_exists_and_run_what_parses(name: str) -> None:
    text = (ROOT / name).read_text()
    for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE):
        *sources, _ = line.split()
        assert all((ROOT / source).exists() for source in sources)
    assert json.loads(re.search(r"^ENTRYPOINT (.+)$", text, re.MULTILINE)[1]) == ["keye", "serve"]  # type: ignore[index]
    command = json.loads(re.search(r"^CMD (\[.+\])$", text, re.MULTILINE)[1])  # type: ignore[index]
    context = serve.make_context("keye serve", command)
    assert context.params["host"] == "0.0.0.0" and context.params["model"] == "nano"
    assert text.index("USER keye") < text.index("ENTRYPOINT"), "it does not run as root"


def test_compose_runs_what_parses_and_mounts_what_exists() -> None:
    text = (ROOT / "compose.yaml").read_text()
    command = json.loads(re.search(r"build: \.\n    command: (\[.+\])", text)[1])  # type: ignore[index]
    assert serve.make_context("keye serve", command).params["port"] == 8000
    assert all((ROOT / path).exists() for path in re.findall(r"file: (\S+)", text))
    assert "KEYE_API_KEY:?" in text, "it does not start without a key"
    assert 'ports: ["127.0.0.1:8000:8000"]' in text
