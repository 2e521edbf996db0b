"""What requests cost that are refused, and whether long prompts stall others.

    python -m benchmarks.refused_requests memory --json  # of each hostile request: memory beyond its body
    python -m benchmarks.refused_requests stall --json   # the slowest /health while eight prompts of 1 MB arrive

A server process of its own with a model of two narrow layers and a context of 262,144 tokens (`memory` also runs
keye-nano). Prints JSON, and fails where a target is missed. Linux only: memory is the peak of the server's process.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIB = 2**20
CONTEXT = 262_144
#: Memory beyond the body of any refused request, and the slowest /health.
TARGET_BYTES, TARGET_SECONDS = 64 * MIB, 0.150
NANO = Path(__file__).parents[1] / "configs" / "nano"
HUGE = "9" * 400


@dataclass(frozen=True)
class Hostile:
    """A request that must be refused; `body` makes it when it is its turn."""

    name: str
    body: Callable[[], bytes]
    path: str = "/v1/chat/completions"


def chat(**fields: Any) -> bytes:
    return json.dumps({"max_tokens": 2, "messages": [{"role": "user", "content": "x"}], **fields}).encode()


def encode_text(text: str) -> bytes:
    return chat(messages=[{"role": "user", "content": text}])


def seen(kind: str = "image", url: object = None, **settings: Any) -> bytes:
    part = {"type": f"{kind}_url", f"{kind}_url": {"url": url or picture(), **settings}}
    return chat(messages=[{"role": "user", "content": [part]}])


def picture(size: int = 64) -> str:
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (size, size), (9, 90, 200)).save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def number(name: str, value: str = HUGE, **fields: Any) -> bytes:
    """A chat with a number in place of a text, as JSON allows it and Python does not write it."""
    return chat(**fields, **{name: "@"}).replace(b'"@"', value.encode())


def texts() -> Iterator[Hostile]:
    for name, text in (
        ("words, 1 MB", "x " * 500_000), ("words, 8 MB", "x " * 3_900_000), ("words, 60 MB", "x " * 30_000_000),
        ("one word, 8 MB", "a" * 8_000_000), ("one word, 1 MB", "a" * 1_000_000),
        ("Chinese, 7 MB", "\u6211" * 1_300_000),
        ("blanks, 8 MB", " " * 8_000_000), ("line breaks, 4 MB", "\n" * 2_000_000), ("emoji", "\U0001f600" * 600_000),
        ("control tokens", "<|im_end|>" * 700_000), ("punctuation, 8 MB", "!?-=" * 2_000_000),
        ("base64 in a text", base64.b64encode(bytes(range(256)) * 24_000).decode()),
    ):  # fmt: skip
        yield Hostile(f"text: {name}", lambda text=text: encode_text(text))
    marks = "</tool_call>" * 600_000
    yield Hostile("text: marks in a reply", lambda: chat(messages=[
        {"role": "user", "content": "x"}, {"role": "assistant", "content": marks}, {"role": "user", "content": "x"},
    ]))  # fmt: skip
    parts = [{"type": "text", "text": "word " * 40}] * 24_000
    yield Hostile("text: 24,000 parts", lambda: chat(messages=[{"role": "user", "content": parts}]))
    yield Hostile("text: 1,024 messages", lambda: chat(messages=[{"role": "user", "content": "word " * 1500}] * 1024))
    yield Hostile("text: a prompt of 1 MB", lambda: json.dumps({"prompt": "x " * 499_000}).encode(), "/v1/completions")
    yield Hostile("text: a role", lambda: chat(messages=[{"role": "x" * 7_000_000, "content": "x"}]))
    yield Hostile("text: a kind of part", lambda: chat(messages=[
        {"role": "user", "content": [{"type": "\u0001" * 1_200_000}]}]))  # fmt: skip
    yield Hostile("text: 8 MB of tools", lambda: chat(tools=[
        {"type": "function", "function": {"name": "f", "description": "word " * 1_500_000}}]))  # fmt: skip
    yield Hostile("text: to be counted", lambda: json.dumps(
        {"messages": [{"role": "user", "content": "x " * 3_000_000}]}).encode(), "/tokenize")  # fmt: skip
    yield Hostile("text: to be generated from", lambda: json.dumps({"text": "x " * 490_000}).encode(), "/generate")
    yield Hostile("text: an input of 8 MB", lambda: json.dumps(
        {"input": [{"role": "user", "content": "x " * 3_900_000}]}).encode(), "/v1/responses")  # fmt: skip
    yield Hostile("text: a message of 8 MB", lambda: json.dumps(
        {"max_tokens": 2, "messages": [{"role": "user", "content": "x " * 3_900_000}]}).encode(),
        "/v1/messages")  # fmt: skip


def sizes() -> Iterator[Hostile]:
    for value in (1e9, 1e11, 1e12, 1e15, 1e17, 1e308):
        for kind in ("image", "video"):
            url = picture() if kind == "image" else [picture()] * 16
            yield Hostile(f"{kind}: min_pixels {value:g}", lambda k=kind, u=url, v=value: seen(
                k, u, min_pixels=v, max_pixels=v))  # fmt: skip
    for value in (1e5, 1e9, 1e15, 1e300):
        yield Hostile(f"image: resized to {value:g}", lambda v=value: seen(
            resized_height=v, resized_width=v, max_pixels=1e300))  # fmt: skip
    yield Hostile("list: 256 large frames", lambda: seen("video", [picture()] * 256, min_pixels=2e8, max_pixels=2e8))
    many = {"type": "image_url", "image_url": {"url": picture(), "min_pixels": 2.6e8, "max_pixels": 2.6e8}}
    yield Hostile("image: 64 large ones", lambda: chat(messages=[{"role": "user", "content": [many] * 64}]))
    yield Hostile("image: 65", lambda: chat(messages=[{"role": "user", "content": [many] * 65}]))
    plan = {"type": "video_url", "video_url": {"url": [picture()] * 64, "min_pixels": 2e8, "max_pixels": 2e8}}
    yield Hostile("plan: 64 large frames", lambda: json.dumps({"content": [plan]}).encode(), "/v1/media/plan")
    yield Hostile("list: many timestamps", lambda: seen("video", [picture()] * 2, timestamps=[0.5] * 400_000))
    yield Hostile("list: 100,000 pictures in a data: URL", lambda: seen(
        "video", "data:video/jpeg;base64," + "AAAA," * 100_000))  # fmt: skip
    yield Hostile("data: 60 MB of garbage", lambda: seen("image", "data:image/png;base64," + "A" * 60_000_000))
    yield Hostile("data: 60 MB that is not base64", lambda: seen("video", "data:video/mp4;base64," + "*" * 60_000_000))
    yield Hostile("data: 60 MB of commas", lambda: seen("video", "data:video/jpeg;base64," + "," * 60_000_000))
    yield Hostile("data: 60 MB and a wrong option", lambda: seen(
        "video", "data:video/mp4;base64," + "A" * 60_000_000, fps=-1))  # fmt: skip
    yield Hostile("data: 60 MB in a text", lambda: encode_text("data:" + "A" * 60_000_000))


def numbers() -> Iterator[Hostile]:
    for name in (
        "max_tokens", "n", "seed", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "top_logprobs",
        "frequency_penalty", "min_tokens", "priority",
    ):  # fmt: skip
        yield Hostile(f"number: {name} of 400 digits", lambda name=name: number(name))
        yield Hostile(f"number: {name} 1e400", lambda name=name: number(name, "1e400"))
    for name in ("n", "top_logprobs", "max_tokens", "min_tokens", "top_k"):
        yield Hostile(f"number: {name} of 39 digits", lambda name=name: number(name, "9" * 39, logprobs=True))
    for name in ("fps", "nframes", "max_frames", "video_start", "video_end", "total_pixels", "min_frames"):
        for value in (10**400, 10**39, 1e308, float("nan")):
            yield Hostile(f"number: {name} {str(value)[:8]}", lambda n=name, v=value: seen(
                "video", [picture()] * 2, **{n: v}))  # fmt: skip
    yield Hostile("number: n 1e9", lambda: chat(n=10**9))
    yield Hostile(
        "number: best_of 1e9", lambda: json.dumps({"prompt": "x", "best_of": 10**9}).encode(), "/v1/completions"
    )
    yield Hostile("number: NaN", lambda: number("temperature", "NaN"))
    yield Hostile("number: in a bias", lambda: number("logit_bias", '{"1": ' + HUGE + "}"))
    yield Hostile("number: as a token", lambda: b'{"prompt": [%s]}' % HUGE.encode(), "/v1/completions")
    yield Hostile("number: of a clip", lambda: json.dumps(
        {"file_id": "file-x", "intervals": [[0, 1e300]]}).encode(), "/v1/clips")  # fmt: skip


def counts() -> Iterator[Hostile]:
    yield Hostile("count: 400,000 numbers as messages", lambda: chat(messages=[1] * 400_000))
    yield Hostile("count: 400,000 lists as messages", lambda: chat(messages=[[]] * 400_000))
    yield Hostile(
        "count: 400,000 numbers as parts", lambda: chat(messages=[{"role": "user", "content": [1] * 400_000}])
    )
    yield Hostile("count: 400,000 booleans as tokens", lambda: json.dumps({"prompt": [True] * 400_000}).encode(),
                  "/v1/completions")  # fmt: skip
    yield Hostile("count: 400,000 lists as tokens", lambda: json.dumps({"prompt": [[]] * 400_000}).encode(),
                  "/v1/completions")  # fmt: skip
    yield Hostile("count: 400,000 tokens", lambda: json.dumps({"prompt": [5] * 400_000}).encode(), "/v1/completions")
    yield Hostile("count: 400,000 stops", lambda: chat(stop=["ab"] * 400_000))
    yield Hostile("count: 49,000 fields", lambda: chat(**{f"field_{i}": 1 for i in range(49_000)}, temperature=9))
    yield Hostile("count: 49,000 wrong biases", lambda: chat(logit_bias={f"x{i}": 1 for i in range(49_000)}))
    yield Hostile("count: 5,000 tools", lambda: chat(tools=[{"name": f"t{i}"} for i in range(5_000)]))
    yield Hostile("count: 400,000 intervals", lambda: json.dumps(
        {"file_id": "file-x", "intervals": [[]] * 400_000}).encode(), "/v1/clips")  # fmt: skip
    yield Hostile("count: 500,000 empty texts", lambda: chat(stop=[""] * 499_000))
    yield Hostile("count: deep", lambda: b"[" * 1_000_000)
    call = {"id": "a", "function": {"name": "f", "arguments": "[" + "[]," * 2_000_000 + "1]"}}
    yield Hostile("count: in the arguments of a call", lambda: chat(messages=[
        {"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "x", "tool_call_id": "a"}]))  # fmt: skip


def forms() -> Iterator[Hostile]:
    def schema(value: Any) -> bytes:
        return chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": value}})

    yield Hostile("form: nested options", lambda: chat(structured_outputs={"regex": "(" * 500 + "a" + "?)*" * 500}))
    yield Hostile("form: a long choice", lambda: chat(structured_outputs={"choice": ["x" * 250] * 5000}))
    yield Hostile("form: a grammar that refers to itself", lambda: chat(structured_outputs={"grammar": "start: start"}))
    yield Hostile("form: repetitions in a grammar", lambda: chat(
        grammar='root ::= a{10000}\na ::= b{10000}\nb ::= "x"'))  # fmt: skip
    yield Hostile("form: repetitions in a regex", lambda: chat(regex="((x{9999}){9999}){9999}"))
    yield Hostile("form: repetitions in a pattern", lambda: schema({"type": "string", "pattern": "^(x{9999}){9999}$"}))
    yield Hostile("form: definitions that are no object", lambda: schema({"type": "object", "$defs": []}))
    yield Hostile("form: 30,000 properties", lambda: schema(
        {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(15_000)}}))  # fmt: skip
    yield Hostile("form: a deep schema", lambda: schema(deep(40)))
    yield Hostile("form: many items", lambda: schema({"type": "array", "minItems": 10**9, "items": {"enum": [1]}}))
    yield Hostile("form: text.format that is not an object", lambda: json.dumps(
        {"input": "x", "text": {"format": []}}).encode(), "/v1/responses")  # fmt: skip


def deep(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        value = (
            {"allOf": [value, {"anyOf": [value, value]}]}
            if levels < 5
            else {"type": "object", "properties": {"a": value}}
        )
    return value


def hostile() -> list[Hostile]:
    return [*texts(), *sizes(), *numbers(), *counts(), *forms()]


# --------------------------------------------------------------------------------------------------------------------


class Server:
    """`keye serve` in a process of its own."""

    def __init__(self, model: str) -> None:
        command = [sys.executable, "-m", "keye", "serve", model, "--port", "0", "--threads", "1"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert self.process.stdout is not None
        self.port = 0
        for line in self.process.stdout:
            name, _, value = line.partition(" ")
            self.port = int(value.rpartition(":")[2]) if name == "address" else self.port
            if name == "sandbox":
                break

    def send(self, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        try:
            kind = {"Content-Type": "application/json"}
            connection.request("GET" if body is None else "POST", path, body, {} if body is None else kind)
            answer = connection.getresponse()
            return answer.status, answer.read()
        except (ConnectionError, http.client.HTTPException) as error:
            return 0, str(error).encode()
        finally:
            connection.close()

    def resident(self, *, peak: bool) -> int:
        """Bytes of memory of the process, now or at most since `forget_peak`."""
        name = "VmHWM" if peak else "VmRSS"
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

    def forget_peak(self) -> None:
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()


@contextmanager
def wide_model() -> Iterator[str]:
    """A folder with a model of keye-nano's form, two narrow layers and a context of 262,144 tokens."""
    import torch

    from keye.config import model_config_from_dict
    from keye.models.load import save_model
    from keye.train.recipes.nano.initialise import fresh_model

    raw = json.loads((NANO / "config.json").read_text())
    raw |= {
        "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 32, "num_experts": 4, "moe_intermediate_size": 32,
        "max_position_embeddings": CONTEXT,
    }  # fmt: skip
    raw["rope_scaling"] = {"type": "mrope", "mrope_section": [4, 6, 6]}
    raw["sa_config"] = {"indexer_num_heads": 2, "indexer_head_dim": 16, "indexer_num_kv_heads": 1, "topk": 16}
    raw["vision_config"] |= {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    with tempfile.TemporaryDirectory(prefix="keye-wide-") as name:
        folder = Path(name)
        for file in ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(NANO / file, folder / file)
        (folder / "config.json").write_text(json.dumps(raw))
        save_model(fresh_model(model_config_from_dict(raw), 0), folder, dtype=torch.bfloat16)
        yield name


def memory(server: Server, only: str) -> dict[str, Any]:
    """Each hostile request alone: its status, its seconds, and the server's memory beyond its body."""
    server.send("/v1/chat/completions", seen(max_pixels=50_000))  # what is loaded at first is loaded
    rows = []
    for case in hostile():
        if only not in case.name:
            continue
        body = case.body()
        server.forget_peak()
        before, begin = server.resident(peak=False), time.perf_counter()
        status, answer = server.send(case.path, body)
        seconds = time.perf_counter() - begin
        beyond = server.resident(peak=True) - before - len(body)
        rows.append({"name": case.name, "status": status, "seconds": round(seconds, 2),
                     "beyond_mb": round(beyond / 1e6, 1), "body_mb": round(len(body) / 1e6, 1),
                     "answer": answer[:160].decode(errors="replace")})  # fmt: skip
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        if status == 0:
            break
    wrong = [row for row in rows if row["status"] not in (400, 413, 422)]
    large = [row for row in rows if row["beyond_mb"] * 1e6 > TARGET_BYTES]
    return {
        "requests": len(rows), "not_refused": wrong, "above_64_mib": large,
        "most_beyond_mb": max(row["beyond_mb"] for row in rows), "slowest_s": max(row["seconds"] for row in rows),
    }  # fmt: skip


def stall(server: Server, seconds: float) -> dict[str, Any]:
    """Eight prompts of 1 MB at once, and how long /health takes from then on, for at most so many seconds."""
    waits, over = list[float](), threading.Event()

    def watch() -> None:
        while not over.is_set():
            begin = time.perf_counter()
            status, _ = server.send("/health")
            assert status == 200
            waits.append(time.perf_counter() - begin)

    server.send("/v1/chat/completions", chat())
    watching = threading.Thread(target=watch)
    watching.start()
    words = "when is the red circle visible and the blue square "
    pool = ThreadPoolExecutor(8)
    bodies = [chat(messages=[{"role": "user", "content": f"{i} " + words * 19_500}]) for i in range(8)]
    begin = time.perf_counter()
    sent = [pool.submit(server.send, "/v1/chat/completions", body) for body in bodies]
    done, _ = wait(sent, timeout=seconds)
    measured = time.perf_counter() - begin
    over.set()
    watching.join()
    server.process.kill()  # those that are still read
    pool.shutdown()
    return {
        "answered": [item.result()[0] for item in done], "seconds": round(measured, 1), "health_requests": len(waits),
        "slowest_health_ms": round(1e3 * max(waits), 1), "median_health_ms": round(1e3 * statistics.median(waits), 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["memory", "stall"])
    parser.add_argument("--seconds", type=float, default=40.0, help="how long `stall` measures")
    parser.add_argument("--only", default="", help="requests whose name holds this")
    parser.add_argument("--model", help="another model than the one of 262,144 tokens")
    parser.add_argument("--json", action="store_true", help="(the output is always JSON)")
    options = parser.parse_args()
    with wide_model() as folder:
        server = Server(options.model or folder)
        try:
            result = memory(server, options.only) if options.what == "memory" else stall(server, options.seconds)
        finally:
            server.close()
    print(json.dumps({"what": options.what, **result}))
    if options.what == "memory":
        sys.exit(bool(result["not_refused"] or result["above_64_mib"]))
    sys.exit(result["slowest_health_ms"] > 1e3 * TARGET_SECONDS)


if __name__ == "__main__":
    main()
