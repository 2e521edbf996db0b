"""`--export` and `--record`: checked before the model, exact to the frame, no foreign file replaced."""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.support import edit_lists


@pytest.fixture
def reply(monkeypatch: pytest.MonkeyPatch) -> str:
    """Every model here answers with two intervals."""
    from keye.sessions import answer

    of = answer.Answer.of.__func__  # type: ignore[attr-defined]
    text = "[[0.52, 1.48], [3.0, 3.01]]"
    monkeypatch.setattr(answer.Answer, "of", classmethod(lambda cls, _, *args, **named: of(cls, text, *args, **named)))
    return text


def test_ground_exports_what_it_found(
    run: Callable, model_folder: Path, video: Path, tmp_path: Path, reply: str
) -> None:
    names = ["cut.edl", "cut.xml", "cut.fcpxml", "cut.csv", "cut.srt", "cut.json", "fcp7:other.txt"]
    files = [tmp_path / name.rpartition(":")[2] for name in names]
    flags = [part for name, file in zip(names, files, strict=True)
             for part in ("--export", f"fcp7:{file}" if ":" in name else file)]  # fmt: skip
    words = ["ground", video, "the circle", "--model", model_folder, "--max-tokens", 1]
    result = run(*words, *flags, "--export-rate", "25", "--handles", "0,0.2", "--start-timecode", "02:00:00:00")
    assert result.code == 0, result.err
    assert all(f"wrote {file}" in result.out for file in files)
    assert result.err.count("Times fall on whole frames: at most 30 ms from the answer.") == 1, "a moment of no length"
    hour = 2 * 3600 * 25
    edl = edit_lists.read_edl(files[0].read_text(), 25)
    assert [(clip.source, clip.record) for clip in edl] == [
        ((13, 42), (hour, hour + 29)), ((75, 81), (hour + 29, hour + 35))
    ]  # fmt: skip
    assert [m.source for m in edit_lists.read_fcp7(files[1].read_text())[1]] == [(13, 37), (75, 76)]
    assert files[6].read_text() == files[1].read_text()
    assert video.absolute().as_uri() in files[2].read_text()
    rows = list(csv.DictReader(io.StringIO(files[3].read_text("utf-8-sig"))))
    assert [row["label"] for row in rows] == ["the circle"] * 2
    again = run(*words, *flags[:6], "--json")
    assert again.data["exports"] == [str(file) for file in files[:3]]


def test_json_is_printed_though_a_file_cannot_be_written(
    run: Callable, model_folder: Path, video: Path, tmp_path: Path, reply: str
) -> None:
    (tmp_path / f"{video.stem}-001-0.5s-1.5s.mp4").write_bytes(b"another file")
    words = ["ground", video, "the circle", "--model", model_folder, "--max-tokens", 1, "--json"]
    result = run(*words, "--clips", tmp_path)
    assert result.code != 0 and result.err
    assert result.data["intervals"][0] == [0.52, 1.48] and result.data["clips"] == []


def test_ask_exports_markers_and_writes_a_record(
    run: Callable, model_folder: Path, video: Path, tmp_path: Path, reply: str
) -> None:
    marks, record = tmp_path / "marks.edl", tmp_path / "record.html"
    question = "when? <script>alert(1)</script>"
    words = ["ask", video, question, "--model", model_folder, "--max-tokens", 1, "--seed", 7, "--end", 3.5]
    result = run(*words, "--export", marks, "--markers", "--record", record)
    assert result.code == 0, result.err
    assert [m.record[0] for m in edit_lists.read_edl(marks.read_text(), 24)] == [12, 72]
    text = record.read_text()
    check_record(text)
    assert "alert(1)" in text and "<script" not in text
    digest = hashlib.sha256(video.read_bytes()).hexdigest()
    for part in (digest, "seed", "frames looked at", "0:00:03.500 to 0:00:04.000", "0:00:00.520", reply, "weights"):
        assert part in text, part
    assert text.count("<img ") >= 4
    assert run(*words, "--record", record).code == 0, "our own record is replaced"
    record.write_text("a letter")
    result = run(*words, "--record", record)
    assert result.code == 2 and "give --overwrite" in result.err and record.read_text() == "a letter"


def check_record(text: str) -> None:
    """Nothing is loaded from elsewhere, tags are closed, pictures have words, tables captions."""
    assert "default-src 'none'" in text
    sources = re.findall(r'(?:src|href|action|url\()="?([^"#)]*)', text)
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources if source)

    class Checker(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.open: list[str] = []
            self.seen: list[str] = []

        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            self.seen.append(tag)
            if tag == "img":
                assert dict(attributes).get("alt")
            if tag not in ("meta", "img", "rect", "path"):
                self.open.append(tag)

        def handle_endtag(self, tag: str) -> None:
            if tag not in ("rect", "path"):
                assert self.open.pop() == tag

    checker = Checker()
    checker.feed(text)
    assert not checker.open and checker.seen.count("table") == checker.seen.count("caption")
    assert '<html lang="en">' in text and checker.seen.count("h1") == 1 and 'role="img" aria-label=' in text


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--export", "cut.aaf"], "cut.aaf is not a file name that can be exported to: end it in .xml"),
        (["--export", "cut.edl", "--export", "cut.edl"], "--export names a file twice"),
        (["--export", "cut.edl", "--export-rate", "fast"], "'fast' is not a frame rate"),
        (["--export", "cut.edl", "--start-timecode", "ten"], "'ten' is not a timecode"),
        (["--export", "cut.edl", "--export-rate", "25", "--start-timecode", "01:00:00:26"], "no such frame"),
        (["--export", "cut.edl", "--handles", "-1"], "'-1' is not a number of seconds"),
        (["--handles", "1"], "--handles belongs to --export"),
        (["--markers"], "--markers belongs to --export"),
        (["--export", "no/folder/cut.edl"], "name a file in a folder that exists"),
        (["--export", "letter.edl"], "exists and is not an earlier output of this kind"),
        (["--record", "record.pdf"], "end it in .html"),
    ],
)
def test_mistakes_are_found_before_a_model_is_loaded(
    run: Callable, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "letter.edl").write_text("Dear editor")
    for words in (["ground", video, "the circle"], ["ask", video, "when?"]):
        result = run(*words, *flags, "--model", tmp_path)  # holds no model: loading would fail otherwise
        assert result.code == 2 and sentence in result.err, result.err
    assert (tmp_path / "letter.edl").read_text() == "Dear editor"


def test_exports_are_of_one_video(run: Callable, video: Path, tmp_path: Path) -> None:
    result = run("ask", video, video, "when?", "--export", tmp_path / "cut.edl", "--model", tmp_path)
    assert result.code == 2 and "--export writes the moments of one video" in result.err
    copy = tmp_path / "copy.srt"
    copy.write_bytes(video.read_bytes())
    result = run("ground", copy, "it", "--export", copy, "--overwrite", "--model", tmp_path)
    assert result.code == 2 and "is the input itself" in result.err


def test_nothing_found_is_an_empty_export(run: Callable, model_folder: Path, video: Path, tmp_path: Path) -> None:
    words = ["ground", video, "the circle", "--model", model_folder, "--max-tokens", 1]
    assert run(*words, "--export", tmp_path / "cut.csv", "--record", tmp_path / "r.html").code == 0
    assert len((tmp_path / "cut.csv").read_text().splitlines()) == 1
    assert "None was found." in (tmp_path / "r.html").read_text()
