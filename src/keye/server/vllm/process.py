"""vLLM's own server as a child that listens on a private socket and ends with this process.

    python -m keye.server.vllm.process DESCRIPTOR

is what `keye.process.ChildProcess` starts: it reads the command line of vLLM from standard input, starts it, reports
the socket when vLLM is ready, and ends it when standard input ends. What vLLM prints goes to standard error.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import httpx

from keye.errors import KeyeError
from keye.process import report_ready, watch_stdin

#: Seconds between two questions whether vLLM is ready.
_PAUSE: Final = 0.25
#: A name that no host has: vLLM fetches nothing, since keye sends every medium along.
_NO_HOST: Final = "nothing.invalid"
#: Options of vLLM that name models: requests for others than those of `--name` would get the answers of the first one.
_NAMING: Final = ("--lora-modules", "--served-model-name")


def vllm_command(model: Path, names: Sequence[str], ranks: int, options: Sequence[str] = ()) -> list[str]:
    """The command line of vLLM's server, without its socket; `KeyeError` where vLLM is not installed, and for options
    of it that keye sets or that add models."""
    for option in options:
        if (own := option.partition("=")[0].replace("_", "-")) in _NAMING:
            raise KeyeError(f"{own} gives vLLM names that keye does not know: name the model with --name, and serve "
                            "adapters without --engine vllm")  # fmt: skip
    arguments = ["--served-model-name", *names, "--tensor-parallel-size", str(ranks)]
    arguments += ["--allowed-media-domains", _NO_HOST, *options]
    if importlib.util.find_spec("vllm") is not None:
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), *arguments]
    if (program := shutil.which("vllm")) is not None:
        return [program, "serve", str(model), *arguments]
    raise KeyeError("--engine vllm needs vLLM with keye's plug-in, which is not installed: "
                    "pip install -e . -e 'plugins/keye-vllm[vllm]' in a checkout of keye")  # fmt: skip


def main(descriptor: int) -> int:
    command = json.loads(sys.stdin.readline())["command"]
    with tempfile.TemporaryDirectory(prefix="keye-vllm-") as folder:
        path = str(Path(folder) / "socket")
        vllm = subprocess.Popen([*command, "--uds", path], stdin=subprocess.DEVNULL, stdout=sys.stderr.fileno())
        signal.signal(signal.SIGTERM, lambda number, frame: vllm.terminate())
        watch_stdin(vllm.terminate)
        with httpx.Client(transport=httpx.HTTPTransport(uds=path), base_url="http://vllm") as http:
            while vllm.poll() is None and not _is_ready(http):
                time.sleep(_PAUSE)
        if vllm.poll() is None:
            report_ready(descriptor, {"address": "http://vllm", "socket": path})
        return vllm.wait()


def _is_ready(http: httpx.Client) -> bool:
    try:
        return http.get("/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[-1])))
