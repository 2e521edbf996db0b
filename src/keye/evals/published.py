"""Scores that the reports of Keye-VL and their tables publish: theirs, never measured here.

Plain data: knows neither tasks nor models. Sources are named as in docs/evaluation.md; cells that their own source
contradicts carry a note.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final

#: The capability dimensions by which the card of Keye-VL-2.0 compares models.
DIMENSIONS: Final = (
    "Video", "Coding", "Agent", "Math & Reasoning", "STEM", "Instruction Following", "General VQA",
)  # fmt: skip

PREVIEW, V1_5, V2 = "Keye-VL-8B-Preview (thinking)", "Keye-VL-1.5-8B (thinking)", "Keye-VL-2.0-30B-A3B"
QWEN35, QWEN3_VL = "Qwen3.5-35B-A3B", "Qwen3-VL-235B-A22B"
REPORT_1_5: Final = "arXiv 2509.01563"
REPORT_2: Final = "arXiv 2606.10651"
CARD_2: Final = "model card of Keye-VL-2.0-30B-A3B"
KC_README: Final = "README of KC-MMBench"
EXTREME_README: Final = "README of ExtremeWhenBench, arXiv 2606.12300"

_DOUBT: Final = "the text of the report calls 24.2 the best; the row says otherwise"


@dataclass(frozen=True)
class Published:
    """One published figure. `task` is the name in `keye eval list`, `value` lies on the scale of the source (0 to 100
    unless the note says otherwise), `settings` are those that the source states."""

    task: str
    model: str
    value: float
    source: str
    metric: str = "accuracy"
    settings: str = ""
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def find_published(task: str) -> list[Published]:
    """All published figures of a task, in the order of their sources; empty where there are none."""
    return [figure for figure in PUBLISHED if figure.task == task]


def _earlier() -> Iterator[Published]:
    """Preview and 1.5, table of the 1.5 report, with thinking."""
    rows = {
        "mmmu": (71.4, 71.4), "ai2d": (86.7, 89.5), "mmbench": (92.0, 92.0), "mmstar": (75.5, 80.5),
        "hallusionbench": (67.0, 62.7), "ocrbench": (85.1, 86.6), "videomme": (67.7, 73.0), "videommmu": (57.6, 66.0),
        "tempcompass": (71.5, 75.5), "longvideobench": (62.8, 66.0), "mmvu": (66.3, 68.3), "mathvista": (80.7, 81.2),
        "mathvision": (46.0, 46.8), "wemath": (60.7, 67.5),
    }  # fmt: skip
    for task, values in rows.items():
        settings = "without subtitles" if task == "videomme" else "validation" if task == "mmmu" else ""
        for model, value in zip((PREVIEW, V1_5), values, strict=True):
            yield Published(task, model, value, REPORT_1_5, settings=settings)


def _second() -> Iterator[Published]:
    """2.0 and the models it is compared with."""
    rows: dict[tuple[str, str, str], tuple[float | None, float | None, float | None]] = {
        ("longvideobench", "accuracy", "2 fps"): (74.1, 61.6, 70.5),
        ("videomme_v2", "accuracy", "64 frames"): (35.3, 32.6, 33.3),
        ("videomme_v2", "accuracy", "512 frames"): (42.4, 28.5, 36.8),
        ("videomme_v2", "Non-Lin", "64 frames"): (18.5, 15.6, 26.3),
        ("videomme_v2", "Non-Lin", "512 frames"): (24.2, 12.2, 28.1),
        ("timelens_activitynet", "mIoU", "4 fps"): (58.5, 53.2, 52.1),
        ("timelens_qvhighlights", "mIoU", "4 fps"): (70.1, 65.7, 64.6),
        ("timelens_charades", "mIoU", "4 fps"): (58.4, 49.1, 47.8),
        ("mlvu", "mean over task types", ""): (82.8, 85.6, 83.8),
        ("videomme", "accuracy", "without subtitles"): (78.3, 82.5, 79.0),
        ("videommmu", "accuracy", ""): (80.0, 80.4, 80.0),
        ("livecodebench", "pass@1", "v6"): (64.2, 62.8, None),
        ("bfcl", "overall", "V4"): (65.7, 67.3, None),
        ("mmmu", "accuracy", "validation"): (75.3, None, None),
        ("mmstar", "accuracy", ""): (75.9, None, None),
        ("mathvista", "accuracy", ""): (82.9, None, None),
        ("ocrbench", "share of 1,000", ""): (85.7, None, None),
        ("hallusionbench", "accuracy", ""): (73.5, None, None),
        ("wemath", "accuracy", ""): (75.5, None, None),
    }
    for (task, metric, settings), values in rows.items():
        for model, value in zip((V2, QWEN35, QWEN3_VL), values, strict=True):
            is_peer = model == QWEN3_VL
            stated = "2 fps" if is_peer and task.startswith("timelens") else settings
            note = _DOUBT if is_peer and (metric, settings) == ("Non-Lin", "512 frames") else ""
            if value is not None:
                yield Published(task, model, value, REPORT_2, metric, stated, note)
    for task, value in (("charades", 61.19), ("activitynet", 56.95), ("qvhighlights", 49.45)):
        yield Published(f"timelens_{task}", "Gemini-3-Flash", value, CARD_2, "mIoU")


def _kc_mmbench() -> Iterator[Published]:
    values = {"cpv": 55.13, "video_topic": 54.30, "video_order": 84.43, "porn_comment": 71.96, "high_like": 55.25,
              "spu": 87.05}  # fmt: skip
    for task, value in values.items():
        yield Published(f"kcmmbench_{task}", PREVIEW, value, KC_README)


def _extreme() -> Iterator[Published]:
    """Hour-long grounding; their scale is 0 to 1, here times 100."""
    rows = (("Gemini-3.5-flash", 11.5, "automatic frame rate"), ("Gemini-2.5-flash", 5.3, "1,000 frames"),
            ("GPT-5.4", 1.3, "64 frames"), ("Qwen3.5-9B", 11.0, "best of a sweep to 2,048 frames"),
            ("Qwen3.5-9B", 5.3, "768 frames"), ("InternVL3.5-8B", 0.3, ""), ("LLaVA-OneVision-7B", 0.3, ""),
            ("CLIP ViT-L/14-336", 26.9, "retrieval of frames alone"))  # fmt: skip
    for model, value, settings in rows:
        yield Published("extremewhenbench", model, value, EXTREME_README, "strict mIoU", settings)


#: Every published figure.
PUBLISHED: Final = (*_earlier(), *_second(), *_kc_mmbench(), *_extreme())
