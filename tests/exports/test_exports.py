"""Exports come back exact to the frame through opentimelineio and through readers of our own."""

from __future__ import annotations

import random
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import opentimelineio as otio
import pytest

from keye.errors import KeyeError
from keye.exports import (
    FORMATS,
    ExportOptions,
    ExportRange,
    MediaReference,
    export_moments,
    find_format,
    ranges_of,
    render,
)
from keye.exports.rate import FrameRate, parse_rate, snap
from keye.moments import Moment, SubtitleLine
from tests.support import edit_lists

MEDIA = MediaReference("council meeting.mp4", "file:///films/council%20meeting.mp4", 1920, 1080, Fraction(25), 7200.0,
                       channels=2, sample_rate=48_000)  # fmt: skip
#: Rate, timecode of the first frame: 23.976, 25, 29.97 drop-frame, 59.94 drop-frame, and a file of variable rate.
FILES = {
    "23.976": replace(MEDIA, rate=Fraction(24_000, 1001), timecode="01:00:00:00"),
    "25": replace(MEDIA, rate=Fraction(25), timecode="10:00:00:00"),
    "29.97df": replace(MEDIA, rate=Fraction(30_000, 1001), timecode="09:59:30;00"),
    "29.97ndf": replace(MEDIA, rate=Fraction(30_000, 1001), timecode="09:59:30:00"),
    "59.94df": replace(MEDIA, rate=Fraction(60_000, 1001), timecode="00:58:59;58"),
    "50": replace(MEDIA, rate=Fraction(50), channels=0),
    "variable": replace(MEDIA, rate=Fraction(30), is_variable=True, offset=0.021, channels=1),
}
NAMES = list(FILES)


def make_ranges(seed: int = 0, count: int = 40) -> list[ExportRange]:
    draw = random.Random(seed)
    starts = sorted(draw.uniform(0, 7100) for _ in range(count))
    return [ExportRange(s, s + draw.uniform(0, 20), f"event {i}", round(draw.random(), 3), "checked twice")
            for i, s in enumerate(starts)]  # fmt: skip


def expected(media: MediaReference, item: ExportRange) -> tuple[int, int]:
    """The nearest frames, counted from the first picture; at least one frame."""
    first = round((item.start - media.offset) * media.rate)
    return first, max(first + 1, round((item.end - media.offset) * media.rate))


def start_of(media: MediaReference, rate: FrameRate) -> int:
    return 0 if media.timecode is None else edit_lists.count_label(media.timecode, rate.base, rate.drop_frame)


def rate_of(media: MediaReference) -> FrameRate:
    return FrameRate(media.rate, media.timecode is not None and ";" in media.timecode)


def text_of(media: MediaReference, name: str, ranges: list[ExportRange], **options: Any) -> str:
    return render(ranges, media, name, ExportOptions(**options)).data.decode()


@pytest.mark.parametrize("file", NAMES)
def test_edit_lists_come_back_exact_to_the_frame(file: str) -> None:
    media, ranges = FILES[file], make_ranges()
    rate = rate_of(media)
    start, sources = start_of(media, rate), [expected(media, item) for item in ranges]
    hour, record, lengths = 3600 * rate.base - 108 * (rate.base // 30) * rate.drop_frame, 0, []
    for first, end in sources:
        lengths.append((hour + record, hour + record + end - first))
        record += end - first
    absolute = [(start + first, start + end) for first, end in sources]
    edl = edit_lists.read_edl(text_of(media, "edl", ranges), rate.base)
    assert [(c.source, c.record) for c in edl] == list(zip(absolute, lengths, strict=True))
    clips, markers, sequence = edit_lists.read_fcp7(text_of(media, "fcp7", ranges))
    assert [(c.source, c.record) for c in clips] == list(zip(absolute, lengths, strict=True))
    assert [m.source for m in markers] == absolute
    assert sequence.findtext("timecode/displayformat") == ("DF" if rate.drop_frame else "NDF")
    clips, markers, _ = edit_lists.read_fcpxml(text_of(media, "fcpxml", ranges))
    assert [(c.source, c.record) for c in clips] == list(zip(absolute, lengths, strict=True))
    assert [(m.source, m.name) for m in markers] == list(zip(absolute, [r.label for r in ranges], strict=True))


@pytest.mark.parametrize("file", NAMES)
def test_opentimelineio_reads_them_exact_to_the_frame(file: str) -> None:
    media, ranges = FILES[file], make_ranges(1, 12)
    rate = rate_of(media)
    start = start_of(media, rate)
    absolute = [(start + first, start + end) for first, end in (expected(media, item) for item in ranges)]
    # The adapter of FCPXML reads 29.97 as 29 frames a second: that format comes back through our reader alone.
    for name, adapter, options in (
        ("otio", "otio_json", {}), ("fcp7", "fcp_xml", {}), ("edl", "cmx_3600", {"rate": float(rate.value)}),
    ):  # fmt: skip
        read = otio.adapters.read_from_string(text_of(media, name, ranges), adapter, **options)
        timeline = read if isinstance(read, otio.schema.Timeline) else next(iter(read.find_children(
            descended_from_type=otio.schema.Timeline)))  # fmt: skip
        clips = list(timeline.video_tracks()[0].find_clips())
        spans = [clip.source_range for clip in clips]
        assert [(s.start_time.to_frames(), s.end_time_exclusive().to_frames()) for s in spans] == absolute, name
        assert abs(spans[0].start_time.rate - float(rate.value)) < 0.001
        if name != "edl":
            assert {clip.media_reference.target_url for clip in clips} <= {
                media.url,
                media.url.replace("///", "//localhost/"),
            }
            marked = [m.marked_range for clip in clips for m in clip.markers]
            if name == "otio":
                assert [(m.start_time.to_frames(), m.end_time_exclusive().to_frames()) for m in marked] == absolute


@pytest.mark.parametrize("file", NAMES)
def test_what_is_read_names_the_same_frames(file: str) -> None:
    media, ranges = FILES[file], make_ranges(2)
    rate, sources = rate_of(media), [expected(media, item) for item in ranges]
    displayed = [
        (first + round(media.offset * media.rate), end + round(media.offset * media.rate)) for first, end in sources
    ]
    for name in ("srt", "vtt"):
        assert [span for span, _ in edit_lists.read_cues(text_of(media, name, ranges), media.rate)] == displayed
    assert edit_lists.read_chapters(text_of(media, "ffmetadata", ranges), media.rate) == displayed
    rows = edit_lists.read_table(text_of(media, "csv", ranges))
    start = start_of(media, rate)
    for row, (first, end) in zip(rows, sources, strict=True):
        assert (int(row["start_frame"]), int(row["end_frame"])) == (first, end)
        label = edit_lists.count_label(row["start_timecode"], rate.base, rate.drop_frame)
        assert label == (start + first) % (24 * 3600 * rate.base)
    data = edit_lists.read_json(text_of(media, "json", ranges))
    assert [tuple(moment["frames"]) for moment in data["moments"]] == sources
    assert [(m["start"], m["end"], m["probability"]) for m in data["moments"]] == [
        (r.start, r.end, r.probability) for r in ranges
    ]


@pytest.mark.parametrize("text", ["23.976", "24", "25", "29.97df", "29.97ndf", "30", "50", "59.94df", "59.94ndf", "60"])
def test_timecode_is_that_of_opentimelineio(text: str) -> None:
    rate = parse_rate(text)
    draw = random.Random(text)
    day = 24 * 3600 * rate.base - 24 * 6 * 9 * (rate.base // 15) * rate.drop_frame
    for frame in [0, 1, rate.base * 60 - 1, rate.base * 60, *(draw.randrange(day * 23 // 24) for _ in range(500))]:
        label = rate.timecode(frame)
        assert label == otio.opentime.RationalTime(frame, float(rate.value)).to_timecode(
            float(rate.value), rate.drop_frame
        )
        assert rate.frame_of(label) == frame == edit_lists.count_label(label, rate.base, rate.drop_frame)


def test_drop_frame_keeps_to_the_clock() -> None:
    rate = parse_rate("29.97df")
    assert [rate.timecode(frame) for frame in (1799, 1800, 17_981, 17_982)] == [
        "00:00:59;29", "00:01:00;02", "00:09:59;29", "00:10:00;00"
    ]  # fmt: skip
    assert rate.timecode(rate.nearest(3600.0)) == "01:00:00;00"
    assert rate.frame_of("00:01:00;00") == rate.frame_of("00:01:00;02"), "a label that is left out is the next one"
    assert rate.timecode(24 * 6 * 17_982) == "00:00:00;00", "after a day it starts over"


@pytest.mark.parametrize(
    ("text", "value", "drop"),
    [("23.98", Fraction(24_000, 1001), False), ("29.97", Fraction(30_000, 1001), True),
     ("59.94 NDF", Fraction(60_000, 1001), False), ("30000/1001", Fraction(30_000, 1001), True),
     ("12.5", Fraction(25, 2), False)],
)  # fmt: skip
def test_rates_as_people_write_them(text: str, value: Fraction, drop: bool) -> None:
    assert parse_rate(text) == FrameRate(value, drop)


@pytest.mark.parametrize("text", ["", "fast", "0", "-25", "25df", "1/0", "1e9", "nan", "30/1001/2"])
def test_what_is_no_rate(text: str) -> None:
    with pytest.raises(KeyeError):
        parse_rate(text)


def test_measured_rates_are_standard_ones() -> None:
    assert [snap(rate) for rate in (23.97598, 24.0002, 29.9702, 59.9401, 12.5)] == [
        Fraction(24_000, 1001), 24, Fraction(30_000, 1001), Fraction(60_000, 1001), Fraction(25, 2)
    ]  # fmt: skip


@pytest.mark.parametrize("file", NAMES)
def test_moments_keep_at_least_a_frame_and_the_bound_holds(file: str) -> None:
    media = FILES[file]
    ranges = [ExportRange(t, t, "now") for t in (0.0, 1.0, 3599.99, 7199.999, 7200.0 - 1e-9)]
    for item in render(ranges, media, "json").data.decode(), render(make_ranges(3), media, "json").data.decode():
        data = edit_lists.read_json(item)
        for moment in data["moments"]:
            first, end = moment["frames"]
            assert 0 <= first < end <= round((media.duration - media.offset) * media.rate)
            times = [float(frame / media.rate) + media.offset for frame in (first, end)]
            away = [
                abs(t - max(min(m, media.duration), media.offset))
                for t, m in zip(times, (moment["start"], moment["end"]), strict=True)
            ]
            assert max(away) * 1000 - 1e-6 <= data["rounding_ms"]
    assert data["notes"][0] == f"Times fall on whole frames: at most {data['rounding_ms']} ms from the answer."
    assert data["rounding_ms"] == -(-500 // float(media.rate))


def test_files_of_a_variable_rate_say_so() -> None:
    notes = render(make_ranges(), FILES["variable"], "edl").notes
    assert any("variable frame rate: times are written at 30 frames a second" in note for note in notes)
    slow = replace(MEDIA, rate=Fraction(25, 2))
    assert any(
        "12.5 frames a second" in note and "25 frames" in note for note in render(make_ranges(), slow, "edl").notes
    )


def test_handles_are_clamped_and_the_marker_stays_on_the_moment() -> None:
    media = FILES["25"]
    ranges = [ExportRange(0.4, 1.0, "first"), ExportRange(7199.0, 7200.0, "last")]
    clips, markers, _ = edit_lists.read_fcpxml(text_of(media, "fcpxml", ranges, handles=(1.0, 2.0)))
    start = 36_000 * 25
    assert [clip.source for clip in clips] == [(start, start + 75), (start + 7198 * 25, start + 7200 * 25)]
    assert [marker.source for marker in markers] == [(start + 10, start + 25), (start + 7199 * 25, start + 7200 * 25)]


@pytest.mark.parametrize("file", NAMES)
def test_markers_lie_on_the_whole_video(file: str) -> None:
    media, ranges = FILES[file], make_ranges(4, 6)
    rate = rate_of(media)
    start, sources = start_of(media, rate), [expected(media, item) for item in ranges]
    absolute = [(start + first, start + end) for first, end in sources]
    assert [m.record for m in edit_lists.read_edl(text_of(media, "edl", ranges, mode="markers"), rate.base)] == absolute
    clips, markers, _ = edit_lists.read_fcp7(text_of(media, "fcp7", ranges, mode="markers"))
    assert len(clips) == 1 and [m.record for m in markers] == absolute
    clips, markers, _ = edit_lists.read_fcpxml(text_of(media, "fcpxml", ranges, mode="markers"))
    assert len(clips) == 1 and [m.source for m in markers] == absolute
    timeline = otio.adapters.read_from_string(text_of(media, "otio", ranges, mode="markers"), "otio_json")
    assert [m.marked_range.start_time.to_frames() for m in timeline.tracks.markers] == [first for first, _ in sources]
    assert timeline.global_start_time.to_frames() == start


def test_the_first_timecode_is_chosen() -> None:
    ranges = make_ranges(5, 3)
    for media, label in ((FILES["29.97df"], "10:00:00;00"), (FILES["25"], "00:00:00:00")):
        rate = rate_of(media)
        first = edit_lists.read_edl(text_of(media, "edl", ranges, start_timecode=label), rate.base)[0]
        assert first.record[0] == edit_lists.count_label(label, rate.base, rate.drop_frame)
    with pytest.raises(KeyeError, match="at 25 frames a second seconds have 25 frames"):
        render(ranges, FILES["25"], "edl", ExportOptions(start_timecode="01:00:00:27"))


HOSTILE = '=cmd|"/c calc"!A1 <b>&amp; "x"\n\n00:00:01,000 --> 00:00:02,000\x00\x1b[31m \u202e |M:x #;=\\ 红色文件夹'


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("mode", ["sequence", "markers"])
def test_words_cannot_break_a_format(name: str, mode: Any) -> None:
    ranges = [ExportRange(1.0, 2.0, HOSTILE, 0.5, HOSTILE), ExportRange(5.0, 6.0, "second")]
    media = replace(MEDIA, name=f"a {HOSTILE}.mp4", url="file:///a%3Cb%3E%26.mp4")
    text = text_of(media, name, ranges, mode=mode)
    assert "\x00" not in text and "\x1b" not in text
    if name == "edl":
        assert len(edit_lists.read_edl(text, 25)) == 2
    elif name in ("fcp7", "fcpxml"):
        read = edit_lists.read_fcp7 if name == "fcp7" else edit_lists.read_fcpxml
        assert len(read(text)[1]) == 2
    elif name in ("srt", "vtt"):
        assert [span for span, _ in edit_lists.read_cues(text, Fraction(25))] == [(25, 50), (125, 150)]
        assert name == "srt" or "<" not in text
    elif name == "csv":
        rows = edit_lists.read_table(text)
        assert len(rows) == 2 and rows[0]["label"].startswith("'=")
    elif name == "ffmetadata":
        assert edit_lists.read_chapters(text, Fraction(25)) == [(25, 50), (125, 150)]
    elif name == "chapters":
        assert [line.split()[0] for line in text.splitlines()] == ["0:00:00", "0:00:01", "0:00:05"]


def test_several_videos() -> None:
    media = {
        "a": replace(FILES["25"], name="Council 14 May.mov"),
        "b": replace(FILES["29.97df"], name="Council 15 May.mov", channels=0),
    }
    ranges = [
        ExportRange(9.0, 10.0, "x", file="a"),
        ExportRange(3.0, 4.0, "x", file="b"),
        ExportRange(1.0, 2.0, "x", file="a"),
    ]
    edl = edit_lists.read_edl(text_of(media, "edl", ranges), 25)
    assert [clip.source[0] for clip in edl] == [
        900_025,
        900_225,
        start_of(FILES["25"], parse_rate("25")) and 899_250 + 75,
    ]
    reels = [line.split()[1] for line in text_of(media, "edl", ranges).splitlines() if line[:3].isdigit()]
    assert reels[0] == reels[1] != reels[2], "each file has a reel of its own"
    names = ["clip.mp4", "clip3.mp4", "clip.mov", "clip4.mp4"]
    alike = {name: replace(MEDIA, name=name, url=f"file:///{number}") for number, name in enumerate(names)}
    text = text_of(alike, "edl", [ExportRange(1.0, 2.0, "x", file=name) for name in names])
    assert len({line.split()[1] for line in text.splitlines() if line[:3].isdigit()}) == len(names)
    clips, _, root = edit_lists.read_fcpxml(text_of(media, "fcpxml", ranges))
    assert len(clips) == 3 and len(root.findall("resources/asset")) == 2
    for name, sentence in (("srt", "one video"), ("chapters", "one video")):
        with pytest.raises(KeyeError, match=sentence):
            render(ranges, media, name)
    with pytest.raises(KeyeError, match="markers belong to one video"):
        render(ranges, media, "edl", ExportOptions(mode="markers"))
    with pytest.raises(KeyeError, match="none of the videos"):
        render([ExportRange(0, 1, "x", file="c")], media, "edl")


#: What the document types of both formats ask of an element: its children in this order.
FCPXML_ORDER = {
    "fcpxml": ["resources", "library"], "asset": ["media-rep"], "sequence": ["note", "spine"],
    "asset-clip": ["note", "marker"], "project": ["sequence"], "event": ["project"], "library": ["event"],
}  # fmt: skip
FCPXML_REQUIRED = {
    "format": {"id", "frameDuration", "width", "height"}, "asset": {"id", "start", "duration", "hasVideo", "format"},
    "media-rep": {"src"}, "sequence": {"format", "duration", "tcStart", "tcFormat"},
    "asset-clip": {"ref", "offset", "start", "duration"}, "marker": {"start", "duration", "value"},
}  # fmt: skip


@pytest.mark.parametrize("mode", ["sequence", "markers"])
@pytest.mark.parametrize("file", NAMES)
def test_fcpxml_has_the_structure_of_its_document_type(file: str, mode: Any) -> None:
    text = text_of(FILES[file], "fcpxml", make_ranges(6, 3), mode=mode)
    assert text.startswith('<?xml version="1.0" encoding="UTF-8"?>\n<!DOCTYPE fcpxml>\n')
    _, _, root = edit_lists.read_fcpxml(text)
    ids = {element.get("id") for element in root.find("resources")}
    for element in root.iter():
        order = FCPXML_ORDER.get(element.tag)
        tags = [child.tag for child in element]
        assert order is None or tags == sorted(tags, key=order.index), element.tag
        assert FCPXML_REQUIRED.get(element.tag, set()) <= set(element.keys())
        for name in ("ref", "format"):
            assert element.get(name) is None or element.get(name) in ids
    assert (root.find(".//asset").get("hasAudio") == "1") == bool(FILES[file].channels)


def test_premiere_gets_sound_size_and_links() -> None:
    _, _, sequence = edit_lists.read_fcp7(text_of(FILES["25"], "fcp7", make_ranges(7, 3)))
    assert len(sequence.findall("media/audio/track")) == 2
    ids = {item.get("id") for item in sequence.iter("clipitem")}
    assert len(ids) == 9 and {link.findtext("linkclipref") for link in sequence.iter("link")} == ids
    assert sequence.findtext(".//file/pathurl") == "file://localhost/films/council%20meeting.mp4"
    assert sequence.findtext("media/video/format/samplecharacteristics/width") == "1920"
    wide = replace(FILES["25"], width=1024, height=576, stored_width=720)
    _, _, sequence = edit_lists.read_fcp7(text_of(wide, "fcp7", make_ranges(7, 1)))
    shape = sequence.find(".//file/media/video/samplecharacteristics")
    assert [shape.findtext(tag) for tag in ("width", "anamorphic", "pixelaspectratio")] == ["720", "TRUE", "PAL-601"]
    assert not edit_lists.read_fcp7(text_of(FILES["50"], "fcp7", make_ranges(7, 1)))[2].findall(".//audio")


def test_nothing_found_is_an_empty_list() -> None:
    for name in FORMATS:
        data = render([], MEDIA, name).data
        assert data or name == "srt"


def test_ranges_outside_the_video_are_left_out_with_a_note() -> None:
    export = render([ExportRange(1, 2, "in"), ExportRange(8000, 8001, "out")], MEDIA, "edl")
    assert len(edit_lists.read_edl(export.data.decode(), 25)) == 1
    assert any("1 of 2 moments lie outside" in note for note in export.notes)


def test_moments_bring_their_probability_check_and_line() -> None:
    moment = Moment("m1", 1, 3.0, 4.0, 0.94, "twice", subtitle=SubtitleLine(3.1, 3.9, "In this red folder."))
    (item,) = ranges_of([moment], "a red folder")
    assert item.comment == '94%, checked twice, "In this red folder."'
    assert item.comment in edit_lists.read_edl(text_of(MEDIA, "edl", [item]), 25)[0].comment


def test_only_our_own_files_are_replaced(tmp_path: Path) -> None:
    ranges = make_ranges(8, 2)
    for name, entry in FORMATS.items():
        path = tmp_path / f"out{entry.suffix}"
        path.write_text("a letter")
        with pytest.raises(KeyeError, match="is not an earlier output"):
            export_moments(ranges, MEDIA, path)
        export_moments(ranges, MEDIA, path, overwrite=True)
        assert find_format(path).name == name
        if name in ("srt", "chapters"):  # they cannot say who wrote them
            with pytest.raises(KeyeError, match="overwrite"):
                export_moments(ranges, MEDIA, path)
        else:
            export_moments(ranges, MEDIA, path)
    with pytest.raises(KeyeError, match=r"end it in \.xml"):
        export_moments(ranges, MEDIA, tmp_path / "out.aaf")
    with pytest.raises(KeyeError, match="did you mean fcpxml"):
        find_format("fcpxm")


def test_an_edl_holds_so_many_events() -> None:
    with pytest.raises(KeyeError, match="at most 999 events"):
        render(make_ranges(9, 1000), MEDIA, "edl")
    assert render(make_ranges(9, 1000), MEDIA, "fcp7").data
