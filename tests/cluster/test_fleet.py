"""The simulated fleet against what queueing theory knows, and the command that uses it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keye.cli import main
from keye.errors import KeyeError
from keye.planning.fleet import MOST_BUSY, Costs, Fleet, Load, simulate, size_fleet, throughput

ROOT = Path(__file__).parents[2]
#: Decoding costs next to nothing; the engine does one request a second however many there are.
ENGINE_ALONE = Costs(decode=1e-6, engine=((1, 1.0), (16, 1.0)))


@pytest.mark.parametrize("busy", [0.3, 0.6, 0.8])
@pytest.mark.parametrize("spread", [0.0, 0.5, 1.0])
def test_one_after_another_waits_as_pollaczek_and_khinchine_say(busy: float, spread: float) -> None:
    """Mean time in an M/G/1 queue: service + rate * E[S^2] / (2 * (1 - busy))."""
    fleet = Fleet(decoders=1, replicas=1, together=1, waiting=10**6)
    outcome = simulate(Load(busy), replace(ENGINE_ALONE, spread=spread), fleet, videos=25_000)
    assert outcome.mean == pytest.approx(1 + busy * (1 + spread**2) / (2 * (1 - busy)), rel=0.1)
    assert outcome.engines == pytest.approx(busy, rel=0.05)


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_together_they_take_as_long_as_processor_sharing_says(spread: float) -> None:
    """Mean time in M/G/1 with shared service: service / (1 - busy), whatever the spread."""
    fleet = Fleet(decoders=1, replicas=1, together=10**6, waiting=10**6)
    outcome = simulate(Load(0.6), replace(ENGINE_ALONE, spread=spread), fleet, videos=25_000)
    assert outcome.mean == pytest.approx(1 / (1 - 0.6), rel=0.1)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.floats(0.01, 2.0), st.floats(0.0, 1.0),
    st.integers(0, 99),
)  # fmt: skip
def test_whatever_comes_is_answered_and_nothing_is_busier_than_always(
    decoders: int, replicas: int, questions: int, decode: float, spread: float, seed: int
) -> None:
    costs = Costs(decode, ((1, 0.5), (8, 0.2)), later=0.1, spread=spread)
    load, fleet = Load(1.0, questions), Fleet(decoders, replicas, together=8, waiting=2)
    outcome = simulate(load, costs, fleet, videos=200, seed=seed)
    assert outcome == simulate(load, costs, fleet, videos=200, seed=seed)
    assert outcome.answers == pytest.approx(questions * outcome.videos), "every question is answered"
    assert 0 < outcome.decoders <= 1 + 1e-9 and 0 < outcome.engines <= 1 + 1e-9
    assert 0 < outcome.median <= outcome.p95


def test_when_all_are_there_at_once_the_slower_half_sets_the_pace() -> None:
    for costs in (Costs(1.0, ((1, 0.2),), spread=0.2), Costs(0.1, ((1, 2.0), (8, 0.5)), spread=0.2)):
        fleet = Fleet(decoders=2, replicas=2, together=8)
        outcome = simulate(Load(1.0), costs, fleet, videos=[0.0] * 2000)
        assert outcome.answers == pytest.approx(throughput(costs, fleet), rel=0.05)


def test_a_fleet_is_as_large_as_its_goal_wants() -> None:
    costs = Costs(4.0, ((1, 2.0), (16, 0.6)), later=0.1, spread=0.4)
    load = Load(10.0, questions=2)
    patient, outcome = size_fleet(load, costs, seconds=60)
    assert outcome.p95 <= 60 and patient.decoders >= 10 * 4.0 / MOST_BUSY - 1
    hasty, outcome = size_fleet(load, costs, seconds=20)
    assert outcome.p95 <= 20 and hasty.decoders + hasty.replicas > patient.decoders + patient.replicas
    smaller = replace(hasty, decoders=hasty.decoders // 2, replicas=hasty.replicas // 2)
    assert simulate(load, costs, smaller).p95 > 20
    with pytest.raises(KeyeError, match="one video alone takes 6 s"):
        size_fleet(load, costs, seconds=6)


@pytest.mark.parametrize(
    ("costs", "sentence"),
    [((1.0, ((2, 1.0),)), "begin with 1"), ((1.0, ()), "begin with 1"), ((0.0, ((1, 1.0),)), "not above 0"),
     ((1.0, ((1, 1.0), (1, 2.0))), "ascend")],
)  # fmt: skip
def test_times_that_cannot_be(costs: tuple[float, tuple[tuple[int, float], ...]], sentence: str) -> None:
    with pytest.raises(KeyeError, match=sentence):
        Costs(*costs)


Plan = Callable[..., tuple[int, str, str]]


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str]) -> Plan:
    """`keye plan` with a video of two minutes: its exit code, its output, and what it says on standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(["plan", "--model", "nano", *arguments])
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


def test_the_example_is_planned(plan: Plan) -> None:
    code, output, _ = plan("--video", "2m", "--fleet", str(ROOT / "configs" / "fleet.toml"), "--json")
    assert code == 0
    fleet = json.loads(output)["fleet"]
    assert fleet["decode_nodes"] == -(-fleet["decode_workers"] // 16)
    assert fleet["seconds"]["p95"] <= fleet["seconds"]["goal"] == 30
    frames = json.loads(output)["media"][0]
    assert fleet["costs"]["frame_bytes"] == frames["frames"] * frames["height"] * frames["width"] * 3
    assert fleet["price_per_day"] == pytest.approx(24 * (fleet["decode_nodes"] * 0.6 + fleet["engine_nodes"] * 3))
    code, output, _ = plan("--video", "2m", "--fleet", str(ROOT / "configs" / "fleet.toml"))
    assert code == 0 and "busiest hour" in output and "a video" in output


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[load]\nvideos_per_day = 10\n", "goal is missing"),
        ("[load]\nvideos_per_day = 0\n[goal]\nseconds = 5\n", "load.videos_per_day is 0; it must be above 0"),
        (
            "[load]\nvideos_per_day = 10\ncars = 1\n[goal]\nseconds = 5\n",
            "load: unknown key cars; known are videos_per_day",
        ),
        ("[load]\nvideos_per_day = 10\n[goal]\nseconds = 5\n", "does not know the time of decode"),
        ("[load]\nvideos_per_day = 10\n[goal]\nseconds = 'x'\n", "goal.seconds is 'x'; it must be a number"),
        ("load = 3\n", "load is 3; it must be a table"),
        ("[load", "not valid TOML"),
        (
            "[load]\nvideos_per_day = 10\n[goal]\nseconds = 5\n[measured]\ndecode = 1.0\nengine = [[1]]\n",
            "measured.engine[0][1] is missing",
        ),
    ],
)
def test_files_with_mistakes_get_a_sentence(plan: Plan, tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text(text)
    code, _, message = plan("--video", "2m", "--fleet", str(path))
    assert code == 2 and sentence in message.replace("\n", " ") and "Traceback" not in message


def test_a_fleet_needs_its_file_and_one_video(plan: Plan, tmp_path: Path) -> None:
    code, _, message = plan("--video", "2m", "--fleet", str(tmp_path / "nothing.toml"))
    assert code == 2 and "configs/fleet.toml" in message
    demo = str(ROOT / "src/keye/assets/demo.mp4")
    code, _, message = plan(demo, demo, "--fleet", str(ROOT / "configs" / "fleet.toml"))
    assert code == 2 and "one video that stands for all" in message.replace("\n", " ")


@pytest.mark.parametrize("load", [Load(1e12), Load(1e300), Load(1.0, questions=10**12)])
def test_a_load_beyond_any_fleet_is_reported_at_once(load: Load) -> None:
    with pytest.raises(KeyeError, match="the load is beyond any fleet: it would take .* decode workers and .* engines"):
        size_fleet(load, Costs(10.0, ((1, 10.0),)), seconds=1000.0)


@pytest.mark.parametrize("videos", ["1e15", "1" + "0" * 400])
def test_the_command_says_that_a_load_is_beyond_any_fleet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], videos: str
) -> None:
    plan, example = tmp_path / "fleet.toml", (ROOT / "configs/fleet.toml").read_text()
    plan.write_text(example.replace("videos_per_day = ", f"videos_per_day = {videos} #"))
    code = main(["plan", "--model", "2.0", "--video", "2m", "--fleet", str(plan)])
    message = capsys.readouterr().err
    assert code == 2 and ("beyond any fleet" in message or "it must be a number" in message)
