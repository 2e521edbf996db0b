"""Archives of benchmarks are unpacked inside their folder, within bounds, and again after an interruption."""

import io
import tarfile
import zipfile

import pytest

from keye.errors import KeyeError
from keye.evals.data.prepare import unpack_archives


def write_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def names_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_media_are_unpacked_beside_their_archive(tmp_path):
    with zipfile.ZipFile(tmp_path / "videos_01.zip", "w") as archive:
        archive.writestr("data/a.mp4", b"a" * 10)
        archive.writestr("run.sh", b"echo")
    (tmp_path / "shards").mkdir()
    write_tar(tmp_path / "shards" / "b.tar.gz", {"b.mp4": b"b" * 20}, "w:gz")
    done = unpack_archives(tmp_path)
    assert (done.unpacked, done.left, done.bytes) == (2, 1, 30)
    assert (tmp_path / "data" / "a.mp4").read_bytes() == b"a" * 10
    assert (tmp_path / "shards" / "b.mp4").is_file()
    assert unpack_archives(tmp_path).present == 2


def test_parts_are_joined(tmp_path):
    write_tar(tmp_path / "videos.tar", {"x.mp4": bytes(40_000), "y.mp4": b"y"})
    data = (tmp_path / "videos.tar").read_bytes()
    (tmp_path / "videos.tar").unlink()
    for number, part in enumerate("abc"):
        (tmp_path / f"videos.tar.part.a{part}").write_bytes(data[number * 20_000 : (number + 1) * 20_000])
    assert unpack_archives(tmp_path).unpacked == 2
    assert (tmp_path / "x.mp4").read_bytes() == bytes(40_000)


@pytest.mark.parametrize("name", ["../out.mp4", "/tmp/out.mp4", "a/../../out.mp4", "C:\\out.mp4", "..\\out.mp4"])
def test_names_that_lead_out_are_left(tmp_path, name):
    folder = tmp_path / "data"
    folder.mkdir()
    write_tar(folder / "a.tar", {name: b"x"})
    assert unpack_archives(folder).left == 1
    assert names_in(tmp_path) == ["data/a.tar"]


def test_links_are_left_and_not_followed(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as archive:
        link = tarfile.TarInfo("videos")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
        archive.addfile(link)
    (folder / "out").symlink_to(tmp_path)
    write_tar(folder / "b.tar", {"out/b.mp4": b"x"})
    assert unpack_archives(folder).left == 2
    assert names_in(tmp_path) == ["data/a.tar", "data/b.tar"]


def test_a_file_of_the_user_stays(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"mine")
    write_tar(tmp_path / "a.tar", {"a.mp4": b"theirs"})
    assert unpack_archives(tmp_path).left == 1
    assert (tmp_path / "a.mp4").read_bytes() == b"mine"


def test_archive_that_grows_too_much_is_rejected(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.mp4", bytes(2 << 20))
    with pytest.raises(KeyeError, match=r"a\.zip unpacks to more than it can hold"):
        unpack_archives(tmp_path)
    assert names_in(tmp_path) == ["a.zip"]


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: data[:40] + b"\xff" * (len(data) - 40)]
)
@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz"])
def test_damaged_archive_gets_one_sentence(tmp_path, name, damage):
    if name.endswith("zip"):
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.mp4", bytes(range(256)) * 40)
    else:
        write_tar(tmp_path / name, {"a.mp4": bytes(range(256)) * 40}, "w:gz")
    path = tmp_path / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(KeyeError, match="is damaged or of a kind that is not read"):
        unpack_archives(tmp_path)
