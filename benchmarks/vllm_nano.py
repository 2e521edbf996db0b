"""keye-nano behind vLLM with the plug-in, against `keye serve`: are the answers the same?

    .venv-vllm/bin/python -m benchmarks.vllm_nano --questions 500 --json

Both servers run one after another, each in a process of its own, and are asked the same FrameForge questions about the
same video files with the official OpenAI client, greedily. Where answers differ, the first token in which they do is
looked at: `near_ties` are those that either server finds at most `TIE` nats less likely than the other's. Prints JSON.
`make test-vllm` makes the environment.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import OpenAI

from keye.data.frameforge import write_mp4
from keye.data.frameforge.questions import Question
from keye.data.frameforge.scene import Clip
from keye.evals.figures.summary import summarise
from keye.evals.tasks.frameforge import FILE_SIZE, EvalOptions, exam, score
from keye.hub import asset

PORT = 8993
#: Difference of log-probabilities up to which two tokens are a near tie: bfloat16 has 8 bits, so that logits of 16 to
#: 32 are rounded to an eighth.
TIE = 0.25
#: Tokens of which servers tell how likely they were in a place.
LIKELIEST = 5
#: Seconds until a server must answer; vLLM compiles its graph before.
START_SECONDS = 600
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
               "VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # fmt: skip


@dataclass(frozen=True)
class Reply:
    """A reply, the text of each token, and the likeliest tokens in its place with their log-probabilities."""

    text: str
    tokens: tuple[str, ...]
    likeliest: tuple[dict[str, float], ...]


def keye_command(port: int = PORT) -> list[str]:
    return [sys.executable, "-m", "keye", "serve", "--port", str(port), "--threads", "1"]


def vllm_command(port: int = PORT, *options: str) -> list[str]:
    # `vllm serve` asks for the version of a distribution named vllm, which builds for CPUs do not have.
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(asset("nano")),
            "--served-model-name", "nano", "--port", str(port), "--max-model-len", "8192", *options]  # fmt: skip


@contextmanager
def running(command: Sequence[str], log: Path, port: int = PORT) -> Iterator[OpenAI]:
    """A server, ended by SIGTERM; what it writes goes to `log`."""
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | ENVIRONMENT)
    try:
        _wait(process, f"http://127.0.0.1:{port}/health", log)
        yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=600, max_retries=0)
    finally:
        process.terminate()
        process.wait(60)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}: {log.read_text()[-2000:]}")
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    raise RuntimeError(f"the server did not start in {START_SECONDS} s: {log.read_text()[-2000:]}")


def ask(client: OpenAI, video: str, question: str, **video_options: Any) -> Reply:
    """A greedy reply about a video, given as a data URL."""
    part = {"type": "video_url", "video_url": {"url": video}, "preprocess_kwargs": video_options}
    answer = client.chat.completions.create(
        model="nano",
        messages=[{"role": "user", "content": [part, {"type": "text", "text": question}]}],  # type: ignore[misc,list-item]
        max_tokens=96, temperature=0, logprobs=True, top_logprobs=LIKELIEST,
    ).choices[0]  # fmt: skip
    steps = (answer.logprobs.content if answer.logprobs else None) or []
    return Reply(
        answer.message.content or "",
        tuple(step.token for step in steps),
        tuple({other.token: other.logprob for other in step.top_logprobs} for step in steps),
    )


def questions(count: int) -> list[tuple[int, Clip, str, list[Question]]]:
    """Clips with their number, their file as a data URL, and what is asked of each: `count` questions in all."""
    request = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (clip, own) in enumerate(exam(EvalOptions(questions=count))):
            path = Path(folder) / "clip.mp4"
            write_mp4(clip, path, FILE_SIZE)
            request.append((number, clip, data_url(path), own))
    return request


def data_url(path: Path) -> str:
    return f"data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode()}"


def sampling(clip: Clip) -> dict[str, Any]:
    """Options that take every frame of a clip's file, as the evaluation takes them: a clip that begins later has a
    lead-in frame at 0, which is left out."""
    start = clip.timestamps[0]
    return {"nframes": clip.frames} | ({"video_start": start} if start > 0 else {})


def gap(reply: Reply, other: Reply) -> float:
    """By how much the servers prefer their own token where two different replies part, in nats: the larger of both.
    Infinite where a server does not count the other's token among its `LIKELIEST`."""
    pairs = enumerate(zip(reply.tokens, other.tokens, strict=False))
    place = next((i for i, (ours, theirs) in pairs if ours != theirs), None)
    if place is None:
        return float("inf")
    ours, theirs, least = reply.tokens[place], other.tokens[place], float("-inf")
    return max(
        reply.likeliest[place][ours] - reply.likeliest[place].get(theirs, least),
        other.likeliest[place][theirs] - other.likeliest[place].get(ours, least),
    )


def compare(count: int, log: Path, *vllm_options: str) -> dict[str, Any]:
    """Asks both servers `count` questions."""
    request = questions(count)
    replies, seconds = {}, {}
    for name, command in (("keye", keye_command()), ("vllm", vllm_command(PORT, *vllm_options))):
        with running(command, log) as client:
            begin = time.perf_counter()
            replies[name] = [
                ask(client, video, item.text, **sampling(clip)) for _, clip, video, own in request for item in own
            ]
            seconds[name] = round(time.perf_counter() - begin, 1)
    pairs = list(zip(replies["keye"], replies["vllm"], strict=True))
    differing = [pair for pair in pairs if pair[0].text != pair[1].text]
    gaps = sorted(gap(*pair) for pair in differing)
    flat = [(number, clip, item) for number, clip, _, own in request for item in own]
    scored = {
        name: [score(clip, item, reply.text, number) for (number, clip, item), reply in zip(flat, own, strict=True)]
        for name, own in replies.items()
    }
    return {
        "questions": count,
        "same": len(pairs) - len(gaps),
        "near_ties": sum(size <= TIE for size in gaps),
        "other": sum(size > TIE for size in gaps),
        "gaps": [round(size, 3) for size in gaps],
        "differing": [{"keye": ours.text, "vllm": theirs.text} for ours, theirs in differing],
        "accuracy": {name: summarise(own)["accuracy"] for name, own in scored.items()},
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--log", type=Path, default=Path(tempfile.gettempdir()) / "vllm_nano.log")
    parser.add_argument("--json", action="store_true", help="(the output is always JSON)")
    options = parser.parse_args()
    print(json.dumps({"what": "vllm_nano", **compare(options.questions, options.log)}))


if __name__ == "__main__":
    main()
