"""Requests about the same media meet at one replica; none is overloaded, and few move when one is gone."""

from __future__ import annotations

import math
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from keye.server.replicas.proxy import SLACK, choose, media_key, ranking

NAMES = ("a", "b", "c", "d")


@given(st.lists(st.text(max_size=5), min_size=1, max_size=60))
def test_no_replica_gets_more_than_its_share(keys: list[str]) -> None:
    loads = dict.fromkeys(NAMES, 0)
    for number, key in enumerate(keys, 1):
        chosen = choose(key, loads)
        loads[chosen] += 1
        assert loads[chosen] <= math.ceil(SLACK * number / len(NAMES))


def test_a_key_meets_its_cache_while_there_is_room() -> None:
    keys = [f"video {number}" for number in range(200)]
    idle = dict.fromkeys(NAMES, 0)
    chosen = [choose(key, idle) for key in keys]
    assert chosen == [choose(key, idle) for key in keys] == [ranking(key, NAMES)[0] for key in keys]
    assert min(Counter(chosen).values()) > 30  # spread


def test_a_replica_that_goes_moves_only_its_own_keys() -> None:
    keys = [f"video {number}" for number in range(200)]
    before = {key: ranking(key, NAMES)[0] for key in keys}
    after = {key: ranking(key, NAMES[:-1])[0] for key in keys}
    assert all(after[key] == before[key] for key in keys if before[key] != "d")


def test_without_media_the_idlest_is_chosen() -> None:
    assert choose(None, {"a": 2, "b": 1, "c": 1}) == "b"


def test_questions_about_one_video_have_one_key() -> None:
    def chat(url: str, text: str) -> dict[str, object]:
        part = {"type": "video_url", "video_url": {"url": url, "fps": 1}}
        return {"messages": [{"role": "user", "content": [part, {"type": "text", "text": text}]}]}

    assert media_key(chat("https://a/1.mp4", "who?")) == media_key(chat("https://a/1.mp4", "when?"))
    assert media_key(chat("https://a/1.mp4", "who?")) != media_key(chat("https://a/2.mp4", "who?"))
    assert media_key({"messages": [{"role": "user", "content": "hello"}]}) is None
    same = [
        chat("https://a/1.mp4", "who?"), {"video": {"url": "https://a/1.mp4"}, "event": "a door opens"},
        {"content": [{"type": "input_video", "url": "https://a/1.mp4", "fps": 2}]},
        {"content": [{"type": "video", "video": "https://a/1.mp4"}]},
    ]  # fmt: skip
    assert len({media_key(body) for body in same}) == 1


def test_metrics_of_several_replicas_are_distinguished() -> None:
    from keye.server.replicas.proxy import merged

    texts = {
        "0": '# HELP a what\n# TYPE a gauge\na 1.0\n# HELP b what\nb{le="1"} 2\n', "1": "# HELP a what\na 3.0\n",
    }  # fmt: skip
    a, b = "".join(merged(texts)).split("# HELP b what\n")
    assert a == '# HELP a what\n# TYPE a gauge\na{replica="0"} 1.0\na{replica="1"} 3.0\n'
    assert b == 'b{replica="0",le="1"} 2\n'
