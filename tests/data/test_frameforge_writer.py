"""Files of FrameForge: exact timestamps, the pictures survive the codec, nothing half-written stays behind."""

import av
import numpy as np
import pytest
from PIL import Image

from keye.data.frameforge import make_clip, render, write_mp4
from keye.errors import KeyeError


def read_back(path):
    with av.open(str(path)) as container:
        frames = [
            (float(frame.pts * frame.time_base), frame.to_ndarray(format="rgb24"))
            for frame in container.decode(video=0)
        ]
    return [time for time, _ in frames], [pixels for _, pixels in frames]


@pytest.mark.parametrize(("start", "step"), [(0.0, 0.5), (0.0, 0.2), (37.4, 0.4), (412.9, 2.0)])
def test_the_clock_of_the_file_is_the_clock_of_the_clip(tmp_path, start, step):
    clip = make_clip(8, frames=7, start=start, step=step)
    write_mp4(clip, tmp_path / "clip.mp4", (224, 224))
    times, _ = read_back(tmp_path / "clip.mp4")
    lead_in = [0.0] if start else []
    assert times == pytest.approx([*lead_in, *clip.timestamps], abs=1e-9)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert container.duration / 1e6 == pytest.approx(clip.timestamps[-1] + step)


def test_pictures_survive_the_codec(tmp_path):
    clip = make_clip(9, frames=4, start=0.0, text_chance=1.0)
    write_mp4(clip, tmp_path / "clip.mp4")
    _, decoded = read_back(tmp_path / "clip.mp4")
    for pixels, original in zip(decoded, render(clip), strict=True):
        assert pixels.shape == (448, 448, 3)
        shrunk = np.asarray(Image.fromarray(pixels).resize((112, 112), Image.Resampling.BOX)).astype(int)
        assert np.abs(shrunk - original).mean() < 4


def test_the_lead_in_shows_the_bare_background(tmp_path):
    clip = make_clip(9, frames=3, start=5.0, text_chance=1.0)
    write_mp4(clip, tmp_path / "clip.mp4", (112, 112))
    _, decoded = read_back(tmp_path / "clip.mp4")
    assert np.abs(decoded[0].astype(int) - clip.scene.backgrounds[0].rgb).max() < 8


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    # Private, since no clip makes the encoder fail and nothing else of the module runs while the file is half written.
    monkeypatch.setattr("keye.data.frameforge.writer._mux", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_mp4(make_clip(1, frames=2), tmp_path / "clip.mp4")
    assert list(tmp_path.iterdir()) == []


def test_odd_sides_are_refused(tmp_path):
    with pytest.raises(KeyeError, match="even"):
        write_mp4(make_clip(1, frames=2), tmp_path / "clip.mp4", (111, 111))
