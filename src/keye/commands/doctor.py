"""`keye doctor`: whether this machine and this installation can do what keye needs."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from keye.commands.shared import options
from keye.errors import KeyeError
from keye.process import available_cores, main_memory
from keye.units import format_bytes, format_count, one_line

#: Instruction sets that decide how fast matrix products are on this processor, as Linux names them.
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")


@dataclass(frozen=True)
class Check:
    """One finding. `ok` is None for a fact that is neither good nor bad."""

    name: str
    ok: bool | None
    finding: str


@click.command(context_settings=options.CONTEXT)
@options.as_json
@options.debug
def doctor(as_json: bool) -> int:
    """Check this machine and this installation. Exit code 1 when something that keye needs does not work."""
    checks = [check() for check in CHECKS]
    failed = any(check.ok is False for check in checks)
    if as_json:
        from keye.commands.shared.show import print_json

        print_json({"ok": not failed, "checks": [asdict(check) for check in checks]})
    else:
        print_checks(checks)
    return 1 if failed else 0


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
