"""keye: Keye-VL as a whole system - understand long video with open models, on the machine you own.

    import keye

    model = keye.load("nano")
    answer = model.ask("video.mp4", "when is the red circle visible?")
    print(answer.text, answer.intervals)

Names load on first use: importing `keye` alone does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from keye.version import __version__

if TYPE_CHECKING:
    from keye.api import Keye, load
    from keye.engine.media import Frames
    from keye.errors import KeyeError
    from keye.sessions.answer import Answer, AnswerStream

__all__ = ["Answer", "AnswerStream", "Frames", "Keye", "KeyeError", "__version__", "load"]

_HOME = {
    "Answer": "keye.sessions.answer",
    "AnswerStream": "keye.sessions.answer",
    "Keye": "keye.api",
    "load": "keye.api",
    "Frames": "keye.engine.media",
    "KeyeError": "keye.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'keye' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
