"""Functions that `keye_demo.yaml` names."""

from __future__ import annotations

from typing import Any


def doc_to_visual(doc: dict[str, Any]) -> list[str]:
    return [doc["video"]]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    return {"right": float(results[0].strip() == doc["answer"])}
