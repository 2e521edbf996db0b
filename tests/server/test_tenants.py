"""Who shares a server with others learns nothing of them."""

from __future__ import annotations

import base64
import threading
from pathlib import Path
from typing import Any

import httpx

import keye
from keye.media import content
from keye.server.context import MAX_DECODING
from keye.server.routes import video as video_routes
from keye.server.settings import Settings
from tests.support.serving import Running


def test_what_one_key_has_asked_costs_another_as_much_as_if_not_asked(model: keye.Keye, video: Path) -> None:
    """Neither `cached_tokens` nor the time an answer takes tells of others: all the work is done again."""
    keys = {"ann": "a-key-of-ann-0123456789", "bob": "a-key-of-bob-0123456789"}
    served = Running(model, Settings(keys=keys))
    part = {
        "type": "video_url",
        "video_url": {"url": "data:video/mp4;base64," + base64.b64encode(video.read_bytes()).decode()},
    }
    body = {"max_tokens": 1, "messages": [{"role": "user", "content": [part, {"type": "text", "text": "what?"}]}]}

    def work_of(owner: str) -> tuple[int, int, int]:
        """Cached tokens that the answer tells of, prompt tokens computed, visual tokens newly kept."""
        computed, stored = model.core.computed["prompt"], model.runtime.vision_cache.nbytes()
        headers = {"Authorization": f"Bearer {keys[owner]}"}
        answer = httpx.post(f"{served.url}/v1/chat/completions", json=body, headers=headers, timeout=60)
        assert answer.status_code == 200, answer.text
        cached = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        return cached, model.core.computed["prompt"] - computed, model.runtime.vision_cache.nbytes() - stored

    model.clear_caches()
    probes = len(content._probes)
    try:
        first, second = work_of("ann"), work_of("bob")
        assert first == second and first[0] == 0 and first[1] > 100 and first[2] > 0
        assert len(content._probes) == min(probes + 2, content.REMEMBERED_PROBES)
        again = work_of("ann")
        assert again[0] > 100 and again[1] < 100 and again[2] == 0, "one's own questions are answered from the cache"
    finally:
        served.stop()


def test_media_are_read_by_a_few_at_once(running: Running, video: Path, monkeypatch: Any) -> None:
    """However many plans are asked for, four decode workers at most are at it; all are answered."""
    inside, most, lock, enough = 0, 0, threading.Lock(), threading.Event()
    plan = video_routes._plan

    def counted(*arguments: Any) -> Any:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
            if inside == MAX_DECODING:
                enough.set()
        enough.wait(20)
        try:
            return plan(*arguments)
        finally:
            with lock:
                inside -= 1

    # Private: how many plans are made at once can be seen from inside only.
    monkeypatch.setattr(video_routes, "_plan", counted)
    url = "data:video/mp4;base64," + base64.b64encode(video.read_bytes()).decode()
    body = {"content": [{"type": "video_url", "video_url": {"url": url}}]}
    statuses: list[int] = []

    def ask() -> None:
        statuses.append(httpx.post(f"{running.url}/v1/media/plan", json=body, timeout=60).status_code)

    asking = [threading.Thread(target=ask) for _ in range(3 * MAX_DECODING)]
    for item in asking:
        item.start()
    for item in asking:
        item.join()
    assert statuses == [200] * len(asking) and most == MAX_DECODING
