"""`keye plan --device`: memory and time before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from keye.errors import KeyeError
from keye.planning import measure
from keye.planning import question as cost
from keye.process import Memory


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs for each timing, and a tenth of a second of reading."""
    monkeypatch.setattr(measure, "SECONDS_EACH", 0.0)
    monkeypatch.setattr(cost, "READ_SECONDS", 0.1)


def test_memory_and_time_of_a_video(run: Callable, model_folder: Path, video: Path) -> None:
    result = run("plan", video, "--model", model_folder, "--device", "cpu", "--json")
    prediction = result.data["prediction"]
    assert set(prediction["seconds"]) == {"media", "vision", "prefill", "generate"}
    assert all(value > 0 for value in prediction["seconds"].values())
    assert prediction["fits"] and prediction["what_fits"] is None and prediction["notes"] == []
    assert prediction["total_bytes"] == sum(prediction["bytes"].values())
    assert prediction["context"] == prediction["prompt_tokens"] + 128
    text = run("plan", video, "--model", model_folder, "--device", "cpu").out
    assert "tokens/s" in text and "it fits" in text


def test_the_prompt_is_counted_as_it_will_be(run: Callable, model_folder: Path, video: Path) -> None:
    """But for the words of the template and the question."""
    planned = run("plan", video, "--model", model_folder, "--device", "cpu", "--json").data["prediction"]
    requested = run("ask", video, "what?", "--max-tokens", 1, "--model", model_folder, "--json").data["usage"]
    assert abs(planned["prompt_tokens"] - requested["prompt_tokens"]) <= cost.WORDS


def test_fewer_bits_take_less_room(run: Callable, model_folder: Path, video: Path) -> None:
    reserved = [
        run("plan", video, "--model", model_folder, "--device", "cpu", "--kv", kv, "--json").data["prediction"]
        for kv in ("bf16", "int8", "int4")
    ]
    sizes = [prediction["bytes"]["kv"] for prediction in reserved]
    assert sizes[0] > sizes[1] > sizes[2]


def test_what_does_not_fit_is_said(
    run: Callable, model_folder: Path, video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("keye.process.memories", lambda: [Memory("cpu", 2**20, 2**20)])
    prediction = run("plan", video, "--model", model_folder, "--device", "cpu", "--json").data["prediction"]
    assert prediction["fits"] is False and "weights and scratch alone take" in prediction["what_fits"]
    monkeypatch.setattr("keye.process.memories", lambda: [Memory("cpu", 1000, 1000)])
    prediction = run("plan", video, "--model", model_folder, "--device", "cpu", "--json").data["prediction"]
    assert "time is not predicted" in prediction["notes"][0] and "prefill" not in prediction["seconds"]


def test_a_video_that_is_not_there(run: Callable, model_folder: Path) -> None:
    result = run("plan", "--video", "20s@640x360", "--model", model_folder, "--device", "cpu", "--json")
    (medium,) = result.data["media"]
    assert (medium["duration"], medium["source_width"], medium["frames"]) == (20.0, 640, 40)
    assert result.data["prediction"]["seconds"]["media"] > 0
    two_hours = run("plan", "--video", "2h", "--model", "2.0", "--json").data
    assert two_hours["visual_tokens"] > 100_000 and "prediction" not in two_hours


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("2h", 7200), ("1h30m", 5400), ("5min", 300), ("1:30:00", 5400), ("45", 45)]
)
def test_lengths(text: str, seconds: int) -> None:
    assert cost.imagine_video(text).duration == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "soon", "0s", "100h", "2h@big", "-3s", "2h@1x1"])
def test_lengths_that_are_none(text: str) -> None:
    with pytest.raises(KeyeError, match="write a length"):
        cost.imagine_video(text)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--video", "2h", "x.mp4"], "one of the two"),
        (["--video", "2h", "--kv", "int8"], "--kv changes memory and time, which need --device"),
        (["--video", "2h", "--device", "nowhere"], "device 'nowhere' cannot be used here"),
    ],
)
def test_mistakes(run: Callable, model_folder: Path, arguments: list[str], sentence: str) -> None:
    result = run("plan", *arguments, "--model", model_folder)
    assert result.code == 2 and sentence in result.err


def test_a_line_through_what_was_measured() -> None:
    rates = measure.LayerRates(1024, (0, 4096, 8192), (1.0, 2.0, 4.0))
    assert [rates.at(depth) for depth in (0, 2048, 4096, 6144, 16384)] == [1.0, 1.5, 2.0, 3.0, 8.0]


def test_a_question_tells_how_far_the_prediction_was_off(run: Callable, model_folder: Path, video: Path) -> None:
    words = ["ask", video, "what?", "--max-tokens", 4, "--model", model_folder, "--estimate"]
    events = run(*words, "--json").data["estimate"]
    assert events["errors"]["first_token"] < 1 and events["prompt_tokens"] > 64
    text = run(*words).out
    assert "tokens/s" in text and "against the prediction: time to the first token" in text


# Placement on other machines


def test_experts_that_do_not_fit_a_gpu_are_planned_elsewhere(run: Callable) -> None:
    result = run("plan", "--model", "2.0", "--gpu", "12GiB", "--ram", "32GiB", "--json")
    placed = result.data["placement"]
    assert (result.code, placed["weights"], placed["context"], placed["refusal"]) == (0, "int4", 8192, None)
    assert set(placed["experts"]) == {"card", "memory"} and placed["card"] <= 11 * 2**30
    text = run("plan", "--model", "2.0", "--gpu", "12GiB", "--ram", "32GiB").out
    assert "of the experts" in text and "at 504 GB/s" in text and "Planned, not run" in text


def test_experts_on_disk_are_planned_and_a_slow_disk_is_one_sentence(run: Callable) -> None:
    result = run("plan", "--model", "2.0", "--ram", "16GiB", "--json")
    assert result.code == 0 and set(result.data["placement"]["experts"]) == {"memory", "disk"}
    assert "keye serve 2.0 --quant int4 --experts disk" in run("plan", "--model", "2.0", "--ram", "16GiB").out
    slow = run("plan", "--model", "2.0", "--ram", "16GiB", "--bandwidth", "-,-,0.15")
    assert slow.code == 1 and "int4 is too slow" in slow.out and slow.out.count("\n") == 1
    assert run("plan", "--model", "2.0", "--mac", "32GiB").code == 0


def test_the_context_is_that_of_the_media(run: Callable, video: Path) -> None:
    data = run("plan", "--model", "2.0", video, "--gpu", "24GiB", "--json").data
    assert data["placement"]["context"] == data["visual_tokens"] > 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--weights", "int4"], "give --gpu, --ram or --mac"),
        (["--gpu", "12GiB", "--mac", "16GiB"], "leave --gpu and --ram out"),
        (["--gpu", "12GiB", "--bandwidth", "1,2,3,4"], "write GB/s of GPU, main memory and disk"),
        (["--gpu", "12GiB", "--bandwidth", "fast"], "write GB/s of GPU, main memory and disk"),
        (["--gpu", "12G"], "write 12GB for powers of 1000"),
    ],
)
def test_mistakes_about_machines(run: Callable, arguments: list[str], sentence: str) -> None:
    result = run("plan", "--model", "2.0", *arguments)
    assert result.code == 2 and sentence in result.err
