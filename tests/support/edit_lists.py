"""Plain readers of edit lists, written apart from what writes them: frames of the source and of the sequence."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import dataclass
from fractions import Fraction
from xml.etree import ElementTree


@dataclass(frozen=True)
class Cutting:
    """A clip or marker: frames of the source, counted from timecode zero, and of the sequence, [first, end)."""

    name: str
    source: tuple[int, int]
    record: tuple[int, int]
    comment: str = ""


def count_label(label: str, base: int, drop: bool) -> int:
    """Frames from label 00:00:00:00 to this one, counted minute by minute."""
    hours, minutes, seconds, frames = map(int, re.split("[:;]", label))
    count = sum(
        60 * base - (base // 15 if drop and minute % 10 else 0) for minute in range(60 * hours + minutes)
    )  # fmt: skip
    skipped = base // 15 if drop and minutes % 10 else 0
    assert seconds or frames >= skipped, f"{label} is a label that drop-frame leaves out"
    return count + seconds * base + frames - skipped


def read_edl(text: str, base: int) -> list[Cutting]:
    drop = "\nFCM: DROP FRAME\n" in text
    cuttings = []
    for block in re.split(r"\n(?=\d{3}  )", text)[1:]:
        fields = block.splitlines()[0].split()
        assert len(fields) == 8 and fields[3] == "C" and re.fullmatch("[A-Z0-9]{1,8}", fields[1])
        assert all((";" in label) == drop for label in fields[4:])
        a, b, c, d = (count_label(label, base, drop) for label in fields[4:])
        marker = re.search(r"^(.*) \|C:\w+ \|M:(.*) \|D:(\d+)$", block, re.MULTILINE)
        if marker:
            cuttings.append(Cutting(marker[2], (a, a + int(marker[3])), (c, c + int(marker[3])), marker[1]))
        else:
            name, comment = (re.search(rf"^\* {key}: (.*)$", block, re.MULTILINE) for key in ("LOC", "COMMENT"))
            assert name is not None
            cuttings.append(Cutting(name[1].split(maxsplit=2)[2], (a, b), (c, d), comment[1] if comment else ""))
    return cuttings


def read_fcp7(text: str) -> tuple[list[Cutting], list[Cutting], ElementTree.Element]:
    """Video clips, markers (of clips by source, of the sequence by sequence), and the sequence."""
    sequence = ElementTree.fromstring(text).find("sequence")
    assert sequence is not None
    number = lambda element, path: int(element.findtext(path))  # noqa: E731
    start = number(sequence, "timecode/frame")
    files = {file.get("id"): file for file in sequence.iter("file") if len(file)}
    clips, markers = [], []
    for item in sequence.findall("media/video/track/clipitem"):
        first = number(files[item.find("file").get("id")], "timecode/frame")
        begin, end = (start + number(item, name) for name in ("start", "end"))
        source = first + number(item, "in"), first + number(item, "out")
        clips.append(
            Cutting(item.findtext("name"), source, (begin, end), item.findtext("comments/mastercomment1") or "")
        )
        markers += [
            Cutting(
                m.findtext("name"),
                (first + number(m, "in"), first + number(m, "out")),
                (0, 0),
                m.findtext("comment") or "",
            )
            for m in item.findall("marker")
        ]
    for m in sequence.findall("marker"):
        span = start + number(m, "in"), start + number(m, "out")
        markers.append(Cutting(m.findtext("name"), (0, 0), span, m.findtext("comment") or ""))
    return clips, markers, sequence


def read_fcpxml(text: str) -> tuple[list[Cutting], list[Cutting], ElementTree.Element]:
    """Clips, their markers by source, and the root; all times are frames of the first format."""
    root = ElementTree.fromstring(text)
    frame = _fraction(root.find("resources/format").get("frameDuration"))

    def frames(value: str) -> int:
        count = _fraction(value) / frame
        assert count.denominator == 1, f"{value} is not on a frame"
        return int(count)

    clips, markers = [], []
    for clip in root.iter("asset-clip"):
        offset, start, duration = (frames(clip.get(name)) for name in ("offset", "start", "duration"))
        clips.append(
            Cutting(
                clip.get("name"), (start, start + duration), (offset, offset + duration), clip.findtext("note") or ""
            )
        )
        for marker in clip.findall("marker"):
            begin, length = frames(marker.get("start")), frames(marker.get("duration"))
            markers.append(Cutting(marker.get("value"), (begin, begin + length), (0, 0), marker.get("note") or ""))
    return clips, markers, root


def _fraction(value: str) -> Fraction:
    assert re.fullmatch(r"\d+(/\d+)?s", value), value
    return Fraction(value[:-1])


def read_cues(text: str, rate: Fraction) -> list[tuple[tuple[int, int], str]]:
    """The cues of SRT or VTT: nearest frames, text."""
    cues = []
    for match in re.finditer(r"(\S+) --> (\S+)\n((?:.+\n)+)", text):
        first, end = (round(_clock_seconds(time) * rate) for time in match.groups()[:2])
        cues.append(((first, end), match[3].strip()))
    return cues


def _clock_seconds(time: str) -> Fraction:
    hours, minutes, seconds = time.replace(",", ".").split(":")
    return 3600 * int(hours) + 60 * int(minutes) + Fraction(seconds)


def read_chapters(text: str, rate: Fraction) -> list[tuple[int, int]]:
    """Frames of ffmpeg's chapters."""
    pairs = re.findall(r"\[CHAPTER\]\nTIMEBASE=1/(\d+)\nSTART=(\d+)\nEND=(\d+)\n", text)
    return [
        (round(Fraction(int(a), int(unit)) * rate), round(Fraction(int(b), int(unit)) * rate)) for unit, a, b in pairs
    ]


def read_table(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text.removeprefix("\ufeff"))))


def read_json(text: str) -> dict:
    return json.loads(text)
