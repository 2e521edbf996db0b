"""The one place that connects to a Ray cluster. Ray is an extra; what is wrong with it is said in one sentence."""

from __future__ import annotations

import logging
import re
import socket
from contextlib import suppress
from typing import Any, Final

from keye.errors import KeyeError, missing_package

#: Seconds in which the host of a cluster must answer at all.
KNOCK_SECONDS: Final = 10.0


def connect(address: str) -> tuple[Any, bool]:
    """The module `ray`, connected, and whether this call has connected it: then `ray.shutdown` is its caller's.

    `address` is "ray", the cluster that this process is connected to or this machine belongs to, "ray://host:port", or
    what else `ray.init` takes. `KeyeError` without Ray, and where no cluster answers.
    """
    try:
        import ray
    except ModuleNotFoundError:
        raise missing_package("ray", address, "ray") from None
    if ray.is_initialized():
        return ray, False
    try:
        _knock(address)
        ray.init("auto" if address == "ray" else address, log_to_driver=False, logging_level=logging.ERROR)
    except ImportError as error:  # the client for ray:// has needs of its own
        raise missing_package(error.name, address, "ray") from None
    except (OSError, RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise KeyeError(f"no Ray cluster can be reached at {address} ({reason}): start one with `ray start --head`, "
                        "or check the address") from None  # fmt: skip
    return ray, True


def _knock(address: str) -> None:
    """`OSError` where nothing listens: Ray would take minutes to find out, and could not connect elsewhere then."""
    place = re.split("[/?]", address.removeprefix("ray://"))[0]
    if address == "ray":  # where Ray would look for the cluster of this machine, which may have ended since
        with suppress(ImportError):  # not promised to be there
            from ray._private.services import canonicalize_bootstrap_address

            place = canonicalize_bootstrap_address("auto") or ""
    host, _, port = place.rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_SECONDS).close()
    elif address != "ray":
        raise ValueError("write it as ray://host:port")
