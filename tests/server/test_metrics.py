"""The page for Prometheus, of one server and of several together, has the form that its tools ask for."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter

import pytest

from keye.engine.request import Delta
from keye.server.metrics import Metrics, RequestWatch
from keye.server.replicas.proxy import merged

GAUGES = {
    "requests_waiting": 1.0, "computed_prompt_tokens_total": 4.0, "kv_bytes": 100.0, "decode_workers": 2.0,
    "prefix_cache_hits_total": 3.0,
}  # fmt: skip


def page() -> str:
    metrics = Metrics(lambda: GAUGES)
    watch = RequestWatch(metrics)
    watch.see(Delta(0, "a", (1,)))
    watch.see(Delta(0, "b", (2,)))
    RequestWatch(metrics).end("refused")
    return metrics.text().decode()


PAGES = [page(), "".join(merged({"0": page(), "1": page()}))]


@pytest.mark.parametrize("text", PAGES, ids=["one server", "replicas"])
def test_families_are_declared_once_and_their_samples_follow(text: str) -> None:
    declared = [line.split()[1:4] for line in text.splitlines() if line.startswith("# TYPE")]
    assert max(Counter(name for _, name, _ in declared).values()) == 1
    helped = [line.split()[2] for line in text.splitlines() if line.startswith("# HELP")]
    assert sorted(helped) == sorted(name for _, name, _ in declared)
    kinds, family = {name: kind for _, name, kind in declared}, ""
    for line in text.splitlines():
        family = line.split()[2] if line.startswith("#") else family
        if not line.startswith("#"):
            assert re.fullmatch(rf"{family}(_bucket|_sum|_count)?(\{{[^}}]*\}})? \S+", line)
    assert all(re.fullmatch("keye_[a-z0-9_]+", name) for name in kinds)
    assert all((kind == "counter") == name.endswith("_total") for name, kind in kinds.items())
    assert {"keye_computed_prompt_tokens_total", "keye_prompt_tokens_total"} <= kinds.keys()


@pytest.mark.parametrize("text", PAGES, ids=["one server", "replicas"])
def test_promtool_has_nothing_to_say(text: str) -> None:
    if (promtool := shutil.which("promtool")) is None:
        pytest.skip("promtool is not installed (package prometheus)")
    checked = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")
