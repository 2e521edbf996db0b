"""The page's files, without a browser: nothing that the content policy forbids, and pure modules do as Python."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import keye.server
from keye.chat.times import parse_intervals

STATIC = Path(keye.server.__file__).parent / "web" / "static"
FILES = sorted(path for path in STATIC.iterdir() if path.suffix != ".svg")
SCRIPTS = [file for file in FILES if file.suffix == ".js"]
NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="node is not installed")


def run_module(code: str, value: Any) -> Any:
    """What `code` makes of `value`; it may import modules from `STATIC` and sets `result`."""
    program = (
        f"const STATIC = {json.dumps(STATIC.as_uri())};\nconst value = {json.dumps(value)};\nlet result;\n{code}\n"
    )
    program += "process.stdout.write(JSON.stringify(result));"
    assert NODE is not None
    done = subprocess.run(
        [NODE, "--input-type=module", "--no-warnings"], input=program, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_no_file_names_another_host() -> None:
    for file in FILES:
        addresses = re.findall(r"(?:[a-z]+:)?//[\w.-]+\.\w+\S*", file.read_text())
        # The name of SVG's XML language looks like an address and is never fetched.
        assert [address for address in addresses if "www.w3.org/2000/svg" not in address] == [], file.name


def test_the_markup_holds_no_script_style_or_handler() -> None:
    html = (STATIC / "index.html").read_text()
    assert re.findall(r"<script(?![^>]*\bsrc=)", html) == []
    assert re.findall(r"<style|\sstyle\s*=|\son\w+\s*=|javascript:|<base|<form[^>]*\baction", html) == []


def test_scripts_insert_text_and_never_markup_or_code() -> None:
    markup = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|srcdoc\s*="
    code = r"\beval\(|new Function|setAttribute\(.(?:style|on)"
    for file in SCRIPTS:
        assert re.findall(f"{markup}|{code}", file.read_text()) == [], file.name


def test_everything_that_is_named_exists() -> None:
    named = re.findall(r'(?:href|src)="static/([^"]+)"', (STATIC / "index.html").read_text())
    for file in SCRIPTS:
        named += re.findall(r'from "\./([^"]+)"', file.read_text())
    assert set(named) == {file.name for file in STATIC.iterdir()} - {"index.html"}
    ids = set(re.findall(r'\sid="([^"]+)"', (STATIC / "index.html").read_text()))
    for file in SCRIPTS:
        assert set(re.findall(r'byId\("([^"]+)"\)', file.read_text())) <= ids, file.name


def test_the_files_are_few_and_small() -> None:
    assert sum(file.stat().st_size for file in FILES) < 350_000
    for file in FILES:
        assert len(file.read_text().splitlines()) < 500, file.name


@needs_node
def test_every_script_parses() -> None:
    program = "import vm from 'node:vm'; import fs from 'node:fs';" + (
        f"for (const file of {json.dumps([str(file) for file in SCRIPTS])})"
        "new vm.SourceTextModule(fs.readFileSync(file, 'utf8'), { identifier: file });"
    )
    assert NODE is not None
    flags = ["--experimental-vm-modules", "--no-warnings", "--input-type=module"]
    subprocess.run([NODE, *flags], input=program, text=True, check=True, capture_output=True)


@needs_node
def test_every_text_is_there_in_both_languages() -> None:
    code = 'const m = await import(STATIC + "/texts.js"); result = m.TEXTS;'
    texts = run_module(code, None)
    for key, row in texts.items():
        assert len(row) == 2 and all(text.strip() for text in row), key
        assert set(re.findall(r"{\w+}", row[0])) == set(re.findall(r"{\w+}", row[1])), f"{key}: other values in Chinese"
        counts = key.removesuffix(".one")
        assert key == counts or f"{counts}.other" in texts, f"{key} has no row for other numbers"
    used = set(re.findall(r'data-t(?:-[a-z-]+)?="([^"]+)"', (STATIC / "index.html").read_text()))
    for file in SCRIPTS:
        code = file.read_text()
        used |= set(re.findall(r'\bt\("([\w.-]+)"', code))
        used |= {f"{key}.other" for key in re.findall(r'\bplural\("([\w.-]+)"', code)}
    assert used <= set(texts)


def test_no_text_stands_in_markup_or_scripts() -> None:
    """Words between tags, and in scripts strings of several words: they belong into the table. Names of elements,
    classes and addresses have no capital letter at their start, sentences do."""
    html = re.sub(r"<!--.*?-->", "", (STATIC / "index.html").read_text(), flags=re.DOTALL)
    words = {text.strip() for text in re.findall(r">([^<>]*[A-Za-z][^<>]*)<", html)}
    assert words == {"keye"}
    for file in SCRIPTS:
        if file.name in ("texts.js", "keys.js", "request.js"):  # the last one's words are for the model
            continue
        code = re.sub(
            r"/\*.*?\*/|^\s*//.*?$|throw new Error\(.*?\)", "", file.read_text(), flags=re.DOTALL | re.MULTILINE
        )
        literals = re.findall(r'"((?:[^"\\\n]|\\.)*)"|`([^`]*)`', code)
        sentences = [
            text for pair in literals for text in pair if re.search(r"^[A-Z][a-z]+ [a-z]+ |[a-z] [a-z]+\.$", text)
        ]
        assert sentences == [], file.name


TEXTS = [
    "[[3.0, 8.5]]",
    "The circle is visible at [[3.0, 8.5], [10, 12.25]] and then [[1:05, 1:07.5]].",
    "[[2.0, 10.5], [12.5, 15.0]] cyan triangle; [[3.5, 10.5]] word 95",
    "<|clip_time_start|>[0:01:15.5, 0:01:20]<|clip_time_end|> a dog",
    "<|box_start|>[[100, 200, 300, 400]]<|box_end|> [[1, 2]] <|point_start|>[[5, 6]]<|point_end|>",
    "a list [3, 4] that is not an interval, and [[9, 2]] that ends before it starts",
    "[] never",
    "[[3.0 s, 8.5s]]",
    "<img onerror=x> [[1, 2]",
    "[" * 2000 + "1, 2" + "]" * 2000,
]


@needs_node
def test_intervals_are_read_as_in_python() -> None:
    code = 'const m = await import(STATIC + "/times.js"); result = value.map(m.parseIntervals);'
    result = run_module(code, TEXTS)
    assert result == [[list(pair) for pair in parse_intervals(text) or ()] for text in TEXTS]


@needs_node
def test_marks_carry_the_words_after_them() -> None:
    code = 'const m = await import(STATIC + "/times.js"); result = m.pieces(value).filter((p) => p.kind !== "text");'
    assert run_module(code, "[[2, 10.5]] cyan triangle; at 0:12.5 and in 7 s") == [
        {"kind": "interval", "start": 2, "end": 10.5, "label": "cyan triangle"},
        {"kind": "moment", "text": "0:12.5", "at": 12.5},
        {"kind": "moment", "text": "7 s", "at": 7},
    ]


@needs_node
def test_times_are_written_and_read() -> None:
    code = 'const m = await import(STATIC + "/times.js"); result = value.map((time) => m.clock(time));'
    output = ["0:00.0", "0:07.5", "1:00.0", "1:07.5", "1:00:07.5"]
    assert run_module(code, [0, 7.5, 59.96, 67.5, 3607.5]) == output
    code = 'const m = await import(STATIC + "/times.js"); result = m.clock(value, 0, true);'
    assert run_module(code, 67.5) == "0:01:08"
    code = 'const m = await import(STATIC + "/times.js"); result = value.map((text) => m.toSeconds(text));'
    assert run_module(code, [*output, "12", "1:xx", ""]) == [0, 7.5, 60, 67.5, 3607.5, 12, None, None]


@needs_node
def test_strange_evidence_is_bounded_and_finite() -> None:
    code = 'const m = await import(STATIC + "/data.js"); result = value.map((v) => m.evidence(v));'
    evil = {"times": [1, -5, "3", None, 2], "shares": [1e9, 0.5, 0.1, 0.2, -4], "lifts": "none", "top": [10**9, -1, 0]}
    long = {"times": [0] * 50_000, "shares": [0.1] * 50_000}
    evidence = [{"media": [evil]}, {"media": [long] * 20}, 7, {"reason": "dense", "media": []}]
    [bounded], many, [nothing], [dense] = run_module(code, evidence)
    assert bounded["frames"] == [{"time": 1, "share": 1, "lift": None}, {"time": 2, "share": 0, "lift": None}]
    assert bounded["top"] == [1]
    assert len(many) == 16 and len(many[0]["frames"]) == 20_000
    assert nothing == {"frames": [], "top": [], "reason": ""} and dense["reason"] == "dense"


@needs_node
def test_strange_moments_and_coverage_are_bounded() -> None:
    code = 'const m = await import(STATIC + "/data.js"); result = [m.moments(value[0]), m.coverage(value[1])];'
    good = {"id": "a", "rank": 2, "start": 1, "end": 2.5, "probability": 0.9, "checked": "twice", "refined": False}
    evil = [
        {"start": "1", "end": 2},
        {"start": 5, "end": 4},
        None,
        7,
        {"start": 0, "end": 1, "probability": 3, "checked": "x"},
    ]
    strange = {
        "duration": 10,
        "seen": [{"start": 0, "end": 5, "spacing": 1}, {"start": None}],
        "unseen": [[5, 10], [9, 1]],
    }
    moments, coverage = run_module(code, [[good, *evil], strange])
    assert [(moment["start"], moment["probability"], moment["checked"]) for moment in moments] == [
        (1, 0.9, "twice"),
        (0, None, None),
    ]
    assert coverage["unseen"] == [[5, 10]] and len(coverage["seen"]) == 1 and coverage["frames"] is None
    assert run_module(code, [None, {"duration": "long"}]) == [[], None]


@needs_node
def test_addresses_hold_file_question_and_moment() -> None:
    code = 'const m = await import(STATIC + "/router.js"); result = value.map((text) => m.parseRoute(text));'
    fragment = "#/desk?file=file-1&mode=find&q=a+red+folder%26&t=4351.2,4354"
    read, strange, library = run_module(code, [fragment, "#/x/../?file=../a&mode=z&t=9,1&q=", "#/library?q=x&from=0.3"])
    assert (read["file"], read["mode"], read["question"], read["range"]) == (
        "file-1", "find", "a red folder&", [4351.2, 4354]
    )  # fmt: skip
    assert strange == {
        "place": "desk", "item": "..", "file": None, "mode": None, "question": None, "range": None, "threshold": None,
        "order": "best",
    }  # fmt: skip
    assert library["place"] == "library" and library["threshold"] == 0.3
    code = 'const m = await import(STATIC + "/router.js"); result = m.formatRoute(m.parseRoute(value));'
    assert run_module(code, fragment) == fragment


@needs_node
def test_a_follow_up_holds_the_video_once_and_the_turns_before() -> None:
    code = 'const m = await import(STATIC + "/request.js"); result = m.chatRequest(value);'
    request = run_module(
        code,
        {
            "model": "keye-nano",
            "media": [{"kind": "video", "id": "file-1"}],
            "turns": [
                {"mode": "find", "question": "a dog", "answer": "[[1, 2]]"},
                {"mode": "ask", "question": "x"},
                {"mode": "ask", "question": "y", "answer": "half", "failed": "error"},
            ],
            "question": "And then?",
            "sampling": {"fps": 2, "max_frames": None, "video_start": 3, "video_end": None},
            "options": {"temperature": None, "maxTokens": 64, "thinking": "off", "evidence": True},
        },
    )
    video = {"type": "video_url", "video_url": {"url": "file-1", "fps": 2, "video_start": 3}}
    first = [video, {"type": "text", "text": "When does this happen in the video: a dog"}]
    assert request["messages"] == [
        {"role": "user", "content": first},
        {"role": "assistant", "content": "[[1, 2]]"},
        {"role": "user", "content": "And then?"},
    ]
    assert request["max_tokens"] == 64 and "temperature" not in request
    assert request["chat_template_kwargs"] == {"enable_thinking": False}


@needs_node
def test_a_command_line_holds_hostile_text_as_one_word() -> None:
    code = 'const m = await import(STATIC + "/request.js"); result = m.quote(value);'
    hostile = "it's $(touch /tmp/x) `id`\n\"; rm -rf ~ #'"
    message = subprocess.run(
        ["sh", "-c", f"printf %s {run_module(code, hostile)}"], capture_output=True, text=True, check=True
    )
    assert message.stdout == hostile
