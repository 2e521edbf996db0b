"""What the environment sets. Besides `keye.cli` this is the only module that reads it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from keye.config.files import ConfigError


@dataclass(frozen=True)
class HubConfig:
    """Where checkpoints come from by name: the hub's address, the folder that keeps them, and whether to ask the hub at
    all. `timeout` is for answers of the hub, in seconds."""

    endpoint: str = "https://huggingface.co"
    cache: Path = Path("~/.cache/huggingface/hub")
    offline: bool = False
    timeout: float = 20.0


def worker_environment() -> dict[str, str]:
    """What a process that reads untrusted files gets of the environment: where the system's loader finds libraries, if
    they lie in unusual places. Everything else may hold secrets."""
    return {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH") if name in os.environ}


def hub_config() -> HubConfig:
    """The settings in the environment, under the names that other programs for the hub use: HF_ENDPOINT, HF_HUB_CACHE,
    HF_HOME, XDG_CACHE_HOME and HF_HUB_OFFLINE."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    cache = os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")
    return HubConfig(
        endpoint=(os.environ.get("HF_ENDPOINT") or HubConfig.endpoint).rstrip("/"),
        cache=Path(cache).expanduser(),
        offline=os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"),
    )


def launched_place() -> tuple[int, int, int] | None:
    """What `torchrun` says to a process that it has started: its number, how many there are, and its number on this
    machine (RANK, WORLD_SIZE, LOCAL_RANK). None where it has not started this one."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if any(name not in os.environ for name in names):
        return None
    rank, size, local_rank = (int(os.environ[name]) for name in names[:3])
    return rank, size, local_rank


def api_key() -> str | None:
    """KEYE_API_KEY, the key that clients of `keye serve` must show where no file of keys is given."""
    return os.environ.get("KEYE_API_KEY") or None


def named_key(name: str) -> str:
    """The key in the environment variable of this name, which the user gives instead of the key itself."""
    if not (value := os.environ.get(name)):
        raise ConfigError(f"the environment variable {name!r} is not set: set it to the key of the server")
    return value


def transcribe_key() -> str | None:
    """KEYE_TRANSCRIBE_KEY, the key that the transcription service asks for."""
    return os.environ.get("KEYE_TRANSCRIBE_KEY") or None


def preferred_language() -> str:
    """The language in which people read messages, such as "zh_CN.UTF-8": LC_ALL, LC_MESSAGES or LANG, as the first of
    them that is set says; empty where none is."""
    return next((value for name in ("LC_ALL", "LC_MESSAGES", "LANG") if (value := os.environ.get(name))), "")


def preview_video_max_pixels() -> int | None:
    """VIDEO_MAX_PIXELS, with which keye-vl-utils 1.0.0 lets the environment set the pixels of all frames of a video."""
    value = os.environ.get("VIDEO_MAX_PIXELS")
    if value is None:
        return None
    try:
        return int(float(value))
    except (ValueError, OverflowError):
        raise ConfigError(f"VIDEO_MAX_PIXELS is {value!r}; it must be a number of pixels") from None


@dataclass(frozen=True)
class KernelConfig:
    """Which kernels compute attention: `kernels` is auto, reference, cpu or triton (KEYE_KERNELS); `cpu_variant`, if
    given, the only variant of the compiled core that may be used (KEYE_CPU_VARIANT). `cache` is where it is kept, and
    `compiler` the C++ compiler that builds it, if CXX names one."""

    kernels: str = "auto"
    cpu_variant: str | None = None
    cache: Path = Path("~/.cache/keye")
    compiler: str | None = None


def cache_folder() -> Path:
    """Where keye keeps what it can make again: `keye` in XDG_CACHE_HOME."""
    return Path(os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "keye")).expanduser()


def kernel_config() -> KernelConfig:
    """The settings in the environment: KEYE_KERNELS, KEYE_CPU_VARIANT, XDG_CACHE_HOME and CXX."""
    return KernelConfig(
        kernels=os.environ.get("KEYE_KERNELS") or KernelConfig.kernels,
        cpu_variant=os.environ.get("KEYE_CPU_VARIANT") or None,
        cache=cache_folder(),
        compiler=os.environ.get("CXX") or None,
    )


def library_folder() -> Path:
    """Where a user's library is: KEYE_LIBRARY, or `keye/library` in XDG_DATA_HOME."""
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(os.environ.get("KEYE_LIBRARY") or os.path.join(data, "keye", "library")).expanduser()


def eval_folder() -> Path:
    """Where the data of benchmarks are looked for: KEYE_EVAL_DATA, or `keye/evals` in XDG_DATA_HOME."""
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(os.environ.get("KEYE_EVAL_DATA") or os.path.join(data, "keye", "evals")).expanduser()
