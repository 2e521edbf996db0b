"""`keye doctor`: whether this machine and this installation can do what keye needs, and whether a model is healthy."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from keye.commands.shared import options
from keye.errors import KeyeError
from keye.process import available_cores, main_memory
from keye.units import format_bytes, format_count, one_line

if TYPE_CHECKING:
    from keye.evals.health.verdict import Ranges

#: Instruction sets that decide how fast matrix products are on this processor, as Linux names them.
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")

#: Questions about generated clips that a model is asked unless --questions says otherwise.
QUESTIONS = 50


@dataclass(frozen=True)
class Check:
    """One finding. `ok` is None for a fact that is neither good nor bad."""

    name: str
    ok: bool | None
    finding: str


@click.command(context_settings=options.CONTEXT)
@click.option("--model", metavar="MODEL", help="Also ask this model questions whose answers are known.")
@options.running_device
@options.template
@click.option("--questions", type=options.COUNT, metavar="N", help="Questions about generated clips.  [default: 50]")
@click.option("--ranges", type=options.PATH, metavar="FILE",
              help="Compare with the ranges in this file.  [default: those of the release]")  # fmt: skip
@click.option("--save-ranges", type=options.PATH, metavar="FILE",
              help="Write ranges around what this model shows, to compare its other forms with.")  # fmt: skip
@options.overwrite
@options.as_json
@options.debug
def doctor(
    model: str | None, questions: int | None, ranges: Path | None, save_ranges: Path | None, overwrite: bool,
    as_json: bool, **arguments: Any,
) -> int:  # fmt: skip
    """Check this machine and this installation, or a model. Exit code 1 when something does not work.

    With --model, the bundled clip, generated clips, a drawn word, a box and a stretch of text are asked and compared
    with what a healthy model answers. Where that is missed, the verdict says which of template, frame text, conversion
    or quantisation looks wrong. The ranges of keye-nano are measured, those of other models are stated and not measured
    on real weights: save ranges of the original to compare a converted model with.

    \b
    keye doctor
    keye doctor --model 1.5 --quant int4
    keye doctor --model original --save-ranges healthy.json
    keye doctor --model converted.gguf --ranges healthy.json --json
    """
    if model is not None:
        return check_model(model, questions or QUESTIONS, ranges, save_ranges, overwrite, as_json, arguments)
    if questions is not None or ranges is not None or save_ranges is not None:
        raise KeyeError("--questions, --ranges and --save-ranges are about a model: name it with --model")
    checks = [check() for check in CHECKS]
    failed = any(check.ok is False for check in checks)
    if as_json:
        from keye.commands.shared.show import print_json

        print_json({"ok": not failed, "checks": [asdict(check) for check in checks]})
    else:
        print_checks(checks)
    return 1 if failed else 0


def check_model(
    name: str, questions: int, ranges: Path | None, output: Path | None, overwrite: bool, as_json: bool,
    arguments: Mapping[str, Any],
) -> int:  # fmt: skip
    """Asks the model and prints what that says. 1 where the model looks wrong."""
    import warnings

    from keye.commands.shared import inputs, show
    from keye.errors import KeyeWarning
    from keye.evals.health.checkup import run_checkup
    from keye.evals.health.verdict import conclude, is_ranges_file, ranges_of, read_ranges, save_ranges
    from keye.files import check_output

    if output is not None:
        check_output(output, is_ranges_file, overwrite=overwrite)
    chosen = None if ranges is None else read_ranges(ranges)
    model = inputs.load_model({**arguments, "model": name})
    with show.progress_bar("asking", notes=True) as advance, warnings.catch_warnings():
        warnings.simplefilter("ignore", KeyeWarning)  # of single replies
        probes = run_checkup(model, questions, advance)
    if output is not None:
        save_ranges(output, model.name, probes)
        chosen = chosen or read_ranges(output)
    wanted = chosen or ranges_of(model.config)
    verdict = conclude(probes, wanted)
    if as_json:
        show.print_json({
            "ok": verdict.cause is None, "model": model.name, "verdict": verdict.to_dict(), "probes": probes,
            "ranges": {"model": wanted.model, "measured": wanted.measured, **wanted.ranges},
        })  # fmt: skip
    else:
        print_checks([*probe_checks(probes, wanted, verdict.missed),
                      Check("verdict", verdict.cause is None, verdict.sentence)])  # fmt: skip
        if not wanted.measured:
            inputs.note(f"the ranges of {wanted.model} are stated, not measured on its real weights")
    return 0 if verdict.cause is None else 1


#: What the probes are called for people.
_PROBES = {
    "levels": "values in 64 weights", "text": "ordinary text, nats a token", "pictures": "answers about pictures",
    "pictures_own": "  with keye's template", "times": "answers about times", "times_own": "  with keye's frame text",
    "demo": "demo clip, overlap", "word": "drawn word", "box": "box, overlap",
    "frameforge": "generated clips, share right",
}  # fmt: skip


def probe_checks(probes: Mapping[str, float], wanted: Ranges, missed: Sequence[str]) -> list[Check]:
    """A line for each probe."""
    checks = []
    for name, title in _PROBES.items():
        allowed = wanted.ranges[name]
        if allowed is None:
            checks.append(Check(title, None, "beyond this model"))
            continue
        finding = f"{probes[name]:.3g} (healthy: {allowed[0]:g} to {allowed[1]:g})"
        checks.append(Check(title, name not in missed, finding))
    return checks


def print_checks(checks: list[Check]) -> None:
    """One line for each check."""
    from rich.table import Table

    from keye.commands.shared.show import stdout

    table = Table(box=None, show_header=False, pad_edge=False)
    marks = {True: "ok", False: "FAILED", None: ""}
    for check in checks:
        table.add_row(check.name, marks[check.ok], check.finding, style="bold red" if check.ok is False else None)
    stdout().print(table)


def check_python() -> Check:
    return Check("python", sys.version_info >= (3, 11), f"{platform.python_version()} on {platform.platform()}")


def check_torch() -> Check:
    import torch

    return Check("torch", True, f"{torch.__version__}, {torch.get_num_threads()} threads")


def check_video() -> Check:
    import av

    return Check("video", "libx264" in av.codecs_available, f"PyAV {av.__version__}, FFmpeg {av.ffmpeg_version_info}")


def check_images() -> Check:
    import PIL
    from PIL import features

    from keye.media.decode.image_reader import heif_version

    missing = [name for name in ("webp", "avif") if not features.check(name)]
    heif = heif_version()
    missing += [] if heif else ["heif"]
    finding = f"Pillow {PIL.__version__}, pillow-heif {heif or 'missing'}"
    return Check("images", not missing, finding + (f"; not read: {', '.join(missing)}" if missing else ""))


def check_processor() -> Check:
    """Model name and the instruction sets that matter; both are read from Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return Check("processor", None, platform.processor() or "unknown")
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {name.strip(): value.strip() for name, value in facts.items()}
    flags = set(facts.get("flags", facts.get("Features", "")).split())
    supported = ", ".join(flag for flag in CPU_FLAGS if flag in flags) or "none of " + ", ".join(CPU_FLAGS)
    name = facts.get("model name", platform.machine())
    return Check("processor", None, f"{name}, {available_cores()} cores; {supported}")


def check_memory() -> Check:
    memory = main_memory()
    if memory is None:
        return Check("memory", None, "unknown")
    return Check("memory", None, f"{format_bytes(memory.total)}, {format_bytes(memory.free)} free")


def check_gpu() -> Check:
    import torch

    if not torch.cuda.is_available():
        return Check("gpu", None, "none that torch can use")
    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return Check("gpu", None, ", ".join(f"{card.name} {format_bytes(card.total_memory)}" for card in cards))


def check_attention() -> Check:
    from keye.ops.cpu import backend as cpu

    try:
        return Check("sparse attention", True, one_line(cpu.status()))
    except KeyeError as error:
        return Check("sparse attention", False, one_line(str(error)))


def check_limits() -> Check:
    """Starts a process like the decode workers and lets it try what they must not be able to do."""
    from keye.media.decode.confinement import measure_confinement

    try:
        limits = measure_confinement()
    except RuntimeError as error:
        return Check("decode limits", False, f"the decode worker cannot start: {one_line(str(error))[-200:]}")
    return Check("decode limits", True if limits.complete else None, limits.sentence())


def check_demo() -> Check:
    """Decodes two frames of the bundled video."""
    from keye.config import ProcessorConfig
    from keye.config.media import MediaOptions
    from keye.hub import asset
    from keye.media.source.fetch import fetch_source
    from keye.media.video import VideoReader

    try:
        with VideoReader(fetch_source(asset("demo.mp4"))) as reader:
            frames = reader.read(reader.plan(ProcessorConfig(), MediaOptions(nframes=2)))
    except KeyeError as error:
        return Check("decoding", False, one_line(str(error)))
    info = reader.info
    return Check("decoding", True, f"{info.codec} {info.width}x{info.height}, {len(frames)} frames read")


def check_nano() -> Check:
    """Loads the model that ships with the package."""
    import keye

    begin = time.perf_counter()
    try:
        model = keye.load("nano")
    except KeyeError as error:
        return Check("nano", False, one_line(str(error)))
    size = sum(parameter.numel() for parameter in model.model.parameters())
    return Check("nano", True, f"{format_count(size)} parameters, loaded in {time.perf_counter() - begin:.1f} s")


def check_hub() -> Check:
    """Which published checkpoints are in the hub's cache; the network is not used."""
    from keye.config import hub_config
    from keye.hub import PUBLISHED

    cache = hub_config().cache
    here = [short for short, name in PUBLISHED.items() if (cache / f"models--{name.replace('/', '--')}").is_dir()]
    return Check("hub cache", None, f"{cache}: " + (", ".join(here) if here else "no published Keye checkpoint"))


CHECKS: tuple[Callable[[], Check], ...] = (
    check_python, check_torch, check_video, check_images, check_processor, check_memory, check_gpu, check_attention,
    check_limits, check_demo, check_nano, check_hub,
)  # fmt: skip
