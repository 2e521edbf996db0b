"""Files whose names look like an address, a flag or a home; and untrusted users, who reach no file by any name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from keye.config import ProcessorConfig
from keye.config.media import MediaOptions
from keye.errors import MediaError
from keye.media.clips import cut_clips
from keye.media.image import plan_image, read_image
from keye.media.processor import Processor
from keye.media.source.fetch import FetchPolicy, OwnersPolicy, fetch_source, media_kind
from keye.media.video import VideoReader, iter_frames, plan_video, probe
from tests.support.clips import write_clip

CONFIG = ProcessorConfig()
NAMES = [
    "data: notes.mp4", "data:,x.mp4", "http: clip.mp4", "https:clip.mp4", "s3:clip.mp4", "file: clip.mp4",
    "rtsp:clip.mp4", "C: drive.mp4", "10:30:05.mp4", "~clip.mp4", "~", "-clip.mp4", "-", "100% of #1?.mp4", "%41.mp4",
    " clip.mp4 ",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_exists_is_opened_whatever_its_name(name: str, folder: Path) -> None:
    (folder / name).write_bytes(b"content")
    for reference in (name, Path(name), str(folder / name), (folder / name).as_uri()):
        source = fetch_source(reference)
        assert (source.name, source.head()) == (name, b"content")
    assert OwnersPolicy().fetch(name).head() == b"content"


@pytest.mark.parametrize("name", NAMES)
def test_untrusted_users_reach_no_file_by_any_name(name: str, folder: Path) -> None:
    (folder / name).write_bytes(b"content")
    for policy in (FetchPolicy(), FetchPolicy(hosts=("media.example",))):
        for reference in (name, str(folder / name), (folder / name).as_uri()):
            try:
                assert policy.fetch(reference).head() != b"content"
                assert not policy.fetch_list(reference)
            except MediaError:
                continue


def test_a_file_url_whose_marks_are_not_escaped(folder: Path) -> None:
    for name in ("a?b.mp4", "a#b.mp4", "100%.mp4", "a%20b.mp4"):
        (folder / name).write_bytes(name.encode())
        assert fetch_source(f"file://{folder}/{name}").head() == name.encode()
        assert fetch_source(f"file:{folder}/{name}").head() == name.encode()
    (folder / "a b.mp4").write_bytes(b"escaped")
    assert fetch_source(f"file://localhost{folder}/a%20b.mp4").head() == b"escaped"


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("s3://bucket/clip.mp4", "is a s3 address; download it first and pass the file"),
        ("gs://bucket/clip.mp4", "is a gs address"),
        ("~no-user-of-this-name/clip.mp4", "names the home of a user who is not known; check the path"),
        ("data: notes.mp4", "has no comma"),
        ("s3:clip.mp4", "does not exist; check the path"),
    ],
)
def test_names_of_nothing(reference: str, message: str) -> None:
    with pytest.raises(MediaError, match=message):
        fetch_source(reference)


def test_everything_takes_names(folder: Path) -> None:
    write_clip(folder / "clip.mp4", frames=12)
    path, options = Path("clip.mp4"), MediaOptions(nframes=2)
    plan = plan_video("clip.mp4", CONFIG, options)
    assert probe(path).frame_count == 12
    with VideoReader(path.read_bytes()) as reader:
        assert (
            reader.read(plan).shape
            == np.stack(list(iter_frames(plan, "clip.mp4"))).shape
            == (2, plan.height, plan.width, 3)
        )
    assert len(list(iter_frames(plan, str(path.absolute())))) == 2
    (clip,) = cut_clips("clip.mp4", [(0.0, 0.2)], Path("clips"))
    assert clip.name.startswith("clip-001")
    Image.new("RGB", (60, 40)).save("a.png")
    assert (media_kind("clip.mp4"), media_kind(Path("a.png"))) == ("video", "image")
    processor = Processor(CONFIG)
    assert processor.video("clip.mp4", options).frame_count == 2
    assert processor.image("a.png").visual_tokens == processor.image(Path("a.png")).visual_tokens > 0
    assert plan_image("a.png", CONFIG).source_width == read_image(Path("a.png")).width == 60
    with pytest.raises(MediaError, match="no-file.mp4 does not exist"):
        probe("no-file.mp4")


def test_clips_of_a_file_named_like_an_address(folder: Path) -> None:
    write_clip(folder / "http: clip.mp4", frames=12)
    (clip,) = cut_clips("http: clip.mp4", [(0.0, 0.2)], Path())
    assert clip.name.startswith("http: clip-001") and clip.is_file()
