"""llama.cpp's own tests of its server, run against `keye serve`.

    python -m benchmarks.llama_cpp_tests            # its tests of chats, responses and tools, against keye-nano
    python -m benchmarks.llama_cpp_tests -k stream  # further words are pytest's

They come with the source distribution of llama_cpp_python, which pip fetches into a cache. They are changed in four
ways: a server that runs is asked instead of one that they start; `/v1` stands before paths that lack it; no model is
downloaded; and where they ask for the words, lengths and token counts of their own tiny model, any will do. What is
left out of this and fails is named in docs/serving.md. Prints a closing line of JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "llama_cpp_python==0.3.36"
CACHE = Path.home() / ".cache/keye-benchmarks"
FILES = ("test_chat_completion.py", "test_compat_oai_responses.py", "test_tool_call.py")
#: The name that one of the tests gives its server.
NAME = "llama-test-model"
#: What the tests expect of the words of their model; forms of replies are not among it.
_WORDS = ("But she", "(Suddenly)", "^ blue", "(Aside|", "Whillicter")
_REPLACED = (
    ('["prompt_tokens"] == n_prompt', '["prompt_tokens"] > 0'),
    ('["completion_tokens"] == n_predicted', '["completion_tokens"] <= n_predicted'),
    ('["finish_reason"] == finish_reason', '["finish_reason"] in ("stop", "length")'),
    ('["finish_reason"] == "length"', '["finish_reason"] in ("stop", "length")'),
    ('.finish_reason == "length"', '.finish_reason in ("stop", "length")'),
)  # fmt: skip
#: Its own paths, which stand before `/v1`.
_NATIVE = ("/health", "/tokenize", "/detokenize", "/metrics", "/apply-template", "/props")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="(the last line is always JSON)")
    _, further = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        tests = Path(folder) / "tests"
        with tarfile.open(archive()) as source:
            unpack(source, tests)
        adapt(tests)
        process = subprocess.Popen(
            [sys.executable, "-m", "keye", "serve", "nano", "--port", "0", "--name", NAME], stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        try:
            address = next(line.split()[1] for line in process.stdout if line.startswith("address"))
            output = run(tests, address.rpartition(":")[2], further)
        finally:
            process.terminate()
            process.wait(60)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error)", output.splitlines()[-1])}
    print(json.dumps({"what": "llama.cpp's tests", **counts}))


def archive() -> Path:
    """The source distribution, fetched once."""
    result = next(CACHE.glob("llama_cpp_python-*.tar.gz"), None)
    if result is None:
        CACHE.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", PACKAGE, "--dest",
             str(CACHE)], check=True,
        )  # fmt: skip
        result = next(CACHE.glob("llama_cpp_python-*.tar.gz"))
    return result


def unpack(source: tarfile.TarFile, tests: Path) -> None:
    """The tests of the server out of the archive."""
    for member in source.getmembers():
        _, marked, name = member.name.partition("/vendor/llama.cpp/tools/server/tests/")
        if marked and member.isfile() and name.endswith((".py", ".ini")):
            target = tests / name
            target.parent.mkdir(parents=True, exist_ok=True)
            opened = source.extractfile(member)
            assert opened is not None
            with target.open("wb") as file:
                shutil.copyfileobj(opened, file)


def adapt(tests: Path) -> None:
    """Changes the tests as the head of this file says."""
    # Its own one starts by downloading models.
    (tests / "conftest.py").write_text("")
    utils = tests / "utils.py"
    text = utils.read_text().replace("import wget\n", "")
    address = 'return f"http://{host}:{self.server_port}{path}"'
    versioned = f'path = path if path.startswith("/v1") or path in {_NATIVE!r} else "/v1" + path'
    match = "def match_regex(regex: str, text: str) -> bool:\n"
    assert address in text and match in text, "the tests are not those that this was written for"
    text = text.replace(address, f"{versioned}\n        {address}")
    text = text.replace(match, f"{match}    if regex.startswith({_WORDS!r}):\n        return isinstance(text, str)\n")
    utils.write_text(text)
    for name in FILES:
        path = tests / "unit" / name
        changed = path.read_text()
        for theirs, ours in _REPLACED:
            changed = changed.replace(theirs, ours)
        path.write_text(changed)


def run(tests: Path, port: str, further: list[str]) -> str:
    """What pytest prints."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", "--tb=line", *FILES,
               *further]  # fmt: skip
    environment = {"DEBUG_EXTERNAL": "1", "PORT": port, "PATH": "/usr/bin:/bin", "HOME": str(tests)}
    done = subprocess.run(command, cwd=tests / "unit", env=environment, stdout=subprocess.PIPE, text=True)
    print(done.stdout)
    return done.stdout.strip()


if __name__ == "__main__":
    main()
