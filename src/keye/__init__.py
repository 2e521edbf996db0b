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
    from keye.engine.async_engine import AsyncEngine
    from keye.engine.engine import Completion, Engine, GenerationResult, ScoreResult, TokenPrompt
    from keye.engine.media import Frames
    from keye.engine.runtime import Runtime
    from keye.engine.sampling import SamplingParams
    from keye.errors import KeyeError, KeyeWarning
    from keye.media.scenes import Scenes, find_scenes
    from keye.moments import Coverage, FindNote, FindProgress, FindResult, Moment, MomentsFound
    from keye.sessions.answer import Answer, AnswerStream
    from keye.sessions.search.find import FindStream

__all__ = [
    "Answer",
    "AnswerStream",
    "AsyncEngine",
    "Completion",
    "Coverage",
    "Engine",
    "FindNote",
    "FindProgress",
    "FindResult",
    "FindStream",
    "Frames",
    "GenerationResult",
    "Keye",
    "KeyeError",
    "KeyeWarning",
    "Moment",
    "MomentsFound",
    "Runtime",
    "SamplingParams",
    "Scenes",
    "ScoreResult",
    "TokenPrompt",
    "__version__",
    "find_scenes",
    "load",
]  # fmt: skip

#: Modules by the names that they define, which are imported when a name is first used.
_HOMES = {
    "keye.api": ("Keye", "load"),
    "keye.engine.async_engine": ("AsyncEngine",),
    "keye.engine.engine": ("Engine", "Completion", "GenerationResult", "ScoreResult", "TokenPrompt"),
    "keye.engine.media": ("Frames",),
    "keye.engine.runtime": ("Runtime",),
    "keye.engine.sampling": ("SamplingParams",),
    "keye.errors": ("KeyeError", "KeyeWarning"),
    "keye.media.scenes": ("Scenes", "find_scenes"),
    "keye.moments": ("Coverage", "FindNote", "FindProgress", "FindResult", "Moment", "MomentsFound"),
    "keye.sessions.answer": ("Answer", "AnswerStream"),
    "keye.sessions.search.find": ("FindStream",),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            from importlib import import_module

            return getattr(import_module(module), name)
    raise AttributeError(f"module 'keye' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
