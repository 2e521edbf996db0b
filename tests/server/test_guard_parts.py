"""The parts of the guard by themselves: the shape of JSON, keys and salts, rates."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keye.errors import KeyeError
from keye.server.edge.errors import ApiError
from keye.server.edge.json_shape import BadJson, check_json
from keye.server.edge.keys import LOCAL, Keyring
from keye.server.edge.limits import Buckets, Limits, client_of
from keye.server.settings import FORM_BYTES, Settings, fetch_policy, guard_settings

LIMITS = Limits(json_depth=8, json_keys=100, json_values=200)
texts = st.text(st.characters(exclude_categories=["Cs"]))
numbers = st.integers(-(10**15), 10**15) | st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner),
    max_leaves=12,
)


@given(json_values, st.booleans())
def test_what_json_writes_passes(value: object, ascii_only: bool) -> None:
    check_json(json.dumps(value, ensure_ascii=ascii_only).encode(), Limits())


@pytest.mark.parametrize(
    "body",
    [
        b'"[[[[[[[[[[[[[[[[[[[["',
        rb'{"a": "\"[[[[[[[[[[[[[[[[["}',
        rb'{"a\\": "\\\\", "b": "[[[[[[[[[[["}',
        b'{"NaN": "Infinity"}',
        rb'"\ud83d\ude00 \\ud83d \u00e9"',
        '{"é": "日本"}'.encode(),
        b"[" * 8 + b"]" * 8,
        b"  [1, -2.5e10, true, null]\r\n\t",
        b"12345678901234567890123456789012345678.0",
    ],
)
def test_bodies_that_pass(body: bytes) -> None:
    check_json(body, LIMITS)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"[" * 9 + b"]" * 9, "nested deeper than 8"),
        (b"[" * 10_000, "more than 200 values|nested deeper"),
        (b'{"a":' * 10_000, "more than 300 strings"),
        (rb'{"a": "\\"' + b', "b": ' + b"[" * 9 + b"]" * 9 + b"}", "nested deeper"),
        (b"[" + b"1," * 300 + b"1]", "more than 200 values"),
        (b"[" + b"[]," * 150 + b"1]", "more than 200 values"),
        (json.dumps({str(i): 0 for i in range(101)}).encode(), "more than 100 keys"),
        (b"[" + b'"",' * 400 + b"1]", "more than 300 strings"),
        (b"1" * 5000, "number of more than 40 digits"),
        (b"1e" + b"9" * 50, "number of more than 40 digits"),
        (b"[1e999]", "too large"),
        (b"[NaN]", "NaN or Infinity"),
        (b"[-Infinity]", "NaN or Infinity"),
        (b'{"a": 1, "a": 2}', "a key twice"),
        (rb'{"a": 1, "\u0061": 2}', "a key twice"),
        (rb'"\ud83d"', "half of a surrogate pair"),
        (rb'"\ude00"', "half of a surrogate pair"),
        (rb'"\ud83d\\\ude00"', "half of a surrogate pair"),
        (rb'"\\\ud83d"', "half of a surrogate pair"),
        (b'"\xed\xa0\x80"', "not UTF-8"),
        (b'"\xff"', "not UTF-8"),
        (b"\xef\xbb\xbf{}", "byte order mark"),
        ('{"a": 1}'.encode("utf-16-le"), "not JSON in UTF-8"),
        (b'{"a": "no end}', "a string does not end"),
        (rb'{"a": "no end\"}', "a string does not end"),
        (b'"line\nbreak"', "not valid JSON"),
        (b"{'a': 1}", "not valid JSON"),
        (b"[1, 2,]", "not valid JSON"),
        (b"{} {}", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"]" * 100, "not valid JSON"),
    ],
)
def test_bodies_that_do_not(body: bytes, sentence: str) -> None:
    with pytest.raises(BadJson, match=sentence):
        check_json(body, LIMITS)


@pytest.mark.parametrize(
    "body", [b'"' + b"\\" * 1_000_000 + b'"', b'"' + b'\\"' * 500_000 + b'"', b'"data:' + b"a" * 10**7 + b'"']
)
def test_long_strings_cost_no_recursion(body: bytes) -> None:
    check_json(body, LIMITS)


@pytest.mark.parametrize(
    "body",
    [
        b'{"content": "%b"}' % (b"x " * 5_000_000),
        b'{"content": "%b"}' % (b"\xf0\x9f\x98\x80" * 2_200_000),
        b'{"content": [%b]}' % b",".join([b'"' + b"a" * 60_000 + b'"'] * 150),
    ],
    ids=["long", "emoji", "many"],
)
def test_text_is_bounded_beside_media(body: bytes) -> None:
    with pytest.raises(BadJson, match="more than 8 MiB beside its media"):
        check_json(body, LIMITS)
    named = (b'{"data" : "%b"}', b'{"image_data":"%b"}', b'{"video_data": ["%b"]}')
    for media in (*named, b'{"url": "data:video/mp4;base64,%b"}'):
        check_json(media % (b"a" * 10**7), LIMITS)


def test_long_strings_are_passed_over_and_what_is_around_them_is_not() -> None:
    long = b'"' + b"a" * 100_000 + b'"'
    check_json(b'{"a": %b, "b": [%b, 1]}' % (long, long), LIMITS)
    for body in (b'{"a": %b, "a": 1}' % long, b"[%b" % long, b'{"a": %b "b": 1}' % long, b'{"a": %b, "b": NaN}' % long):
        with pytest.raises(BadJson):
            check_json(body, LIMITS)


@pytest.mark.parametrize("piece", [1, 2, 3, 5, 7, 16])
def test_where_a_body_is_cut_into_pieces_does_not_matter(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Private: bodies of a few bytes reach the borders of pieces.
    monkeypatch.setattr("keye.server.edge.json_shape._PIECE", piece)
    pairs = rb'{"a\\\\": "\\\"[[[[[[[[[[[[", "b": "\ud83d\ude00\ud83d\ude00", "c": "\\ud83d"}'
    for body in (pairs, b'"' + b"\\" * 64 + b'"'):
        check_json(body, LIMITS)
    for body in (rb'"\ud83d\\\ude00"', rb'"\ude00"', rb'"aaa\ud83d\u0041"', rb'{"a": "\\\\", "b": [[[[[[[[[]]]]]]]]]}'):
        with pytest.raises(BadJson, match=r"surrogate|nested"):
            check_json(body, LIMITS)


@given(st.binary(max_size=200))
def test_any_bytes_are_taken_or_refused(body: bytes) -> None:
    try:
        check_json(body, LIMITS)
    except BadJson:
        return
    json.loads(body)


def test_keys_are_known_by_their_digests_only() -> None:
    ring = Keyring.of({"ann": "a" * 20, "bob": "b" * 20})
    assert ring.owner(b"Bearer " + b"a" * 20) == "ann"
    assert ring.owner(b"bearer  " + b"b" * 20) == "bob"
    for wrong in (None, b"", b"Bearer", b"a" * 20, b"Bearer " + b"a" * 19, b"Basic " + b"a" * 20, b"Bearer \xff"):
        assert ring.owner(wrong) is None
    assert "a" * 20 not in repr(ring)
    assert b"a" * 20 not in ring.digests.values()
    assert Keyring().owner(None) == LOCAL


def test_each_comparison_goes_through_all_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    ring, compared = Keyring.of({"ann": "a" * 20, "bob": "b" * 20, "eve": "e" * 20}), []
    monkeypatch.setattr(
        "keye.server.edge.keys.hmac.compare_digest", lambda a, b: compared.append((len(a), len(b))) or a == b
    )
    for displayed in (b"a" * 20, b"e" * 20, b"x", b"y" * 1000):
        ring.owner(b"Bearer " + displayed)
    assert compared == [(32, 32)] * 12


def test_salts_differ_by_owner_and_by_run() -> None:
    ring, other = Keyring.of({"ann": "a" * 20, "bob": "b" * 20}), Keyring.of({"ann": "a" * 20})
    assert ring.salt("ann") == ring.salt("ann")
    assert len({ring.salt("ann"), ring.salt("bob"), ring.salt(LOCAL), other.salt("ann")}) == 4
    assert all(len(ring.salt(name)) == 32 for name in ("ann", "bob"))


@pytest.mark.parametrize(
    "keys", [{"ann": "short"}, {"ann": "a b" * 10}, {"ann": "é" * 20}, {"a\nb": "a" * 20}, {"": "a" * 20},
             {LOCAL: "a" * 20}, {"ann": "a" * 20, "bob": "a" * 20}],
)  # fmt: skip
def test_keys_that_are_refused(keys: dict[str, str]) -> None:
    with pytest.raises(KeyeError) as error:
        Keyring.of(keys)
    assert "a" * 20 not in str(error.value)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_bucket_fills_with_time() -> None:
    clock = Clock()
    buckets = Buckets(2.0, 4.0, 10, clock)
    assert [buckets.take("a") for _ in range(4)] == [0.0] * 4
    assert buckets.take("a") == pytest.approx(0.5)
    assert buckets.take("b") == 0.0
    clock.now += 1.0
    assert [buckets.take("a"), buckets.take("a")] == [0.0, 0.0]
    assert buckets.take("a") > 0
    clock.now += 100.0
    assert buckets.take("a", 4.0) == 0.0  # never more than the burst
    assert buckets.take("a", 1.0) > 0
    waits = [dict(ApiError(429, "busy", retry=seconds).headers)[b"retry-after"] for seconds in (0.1, 1.0, 1.2)]
    assert waits == [b"1", b"1", b"2"]


def test_buckets_are_bounded() -> None:
    buckets = Buckets(1.0, 1.0, 100, Clock())
    for i in range(10_000):
        buckets.take(str(i))
    assert len(buckets) == 100


def test_whom_an_address_stands_for() -> None:
    assert client_of("10.0.0.1") == "10.0.0.1"
    assert client_of("2001:db8:1:2:3:4:5:6") == client_of("2001:db8:1:2:ffff::1") == "2001:db8:1:2::"
    assert client_of("::ffff:10.0.0.1") == "10.0.0.1"
    assert client_of("fe80::1%eth0") == "fe80::"
    assert client_of(None) == client_of("unix:") == "unknown"


KEY = {"ann": "a" * 20}


def settings(host: str = "127.0.0.1", keys: Mapping[str, str] | None = None, **options: Any) -> Settings:
    return Settings(host, keys=keys or {}, upload_bytes=1000, body_bytes=500, pictures=7, queue=40, **options)


def test_from_settings_to_defences() -> None:
    guard = guard_settings(settings("Video.example", KEY, allowed_hosts=("BOX",)))
    assert guard.hosts == ("video.example", "box")
    assert guard.keys.owner(b"Bearer " + b"a" * 20) == "ann"
    assert (guard.limits.json_bytes, guard.limits.upload_bytes) == (500, 1000 + FORM_BYTES)
    several = settings(keys={**KEY, "bob": "b" * 20})
    assert (guard.limits.running_per_key, guard_settings(several).limits.running_per_key) == (256, 20)
    assert guard_settings(settings("0.0.0.0", KEY)).hosts == guard_settings(settings("::1", KEY)).hosts == ()
    policy = fetch_policy(settings(allow_urls=("Media.Example", "*.cdn.example")))
    assert (policy.hosts, policy.video_bytes, policy.list_frames) == (("media.example", "*.cdn.example"), 1000, 7)
    private = fetch_policy(settings(allow_urls=("a.example",), allow_media_hosts=("nas.local:8080",)))
    assert (private.hosts, private.limits.private_hosts) == (("a.example", "nas.local:8080"), ("nas.local:8080",))
    assert guard_settings(settings(allow_origins=("https://app.example",))).origins == ("https://app.example",)
    for rules in ({"allow_urls": ("http://a",)}, {"allow_media_hosts": ("http://a",)}):
        with pytest.raises(KeyeError, match="not a host that can be allowed"):
            fetch_policy(settings(**rules))
    with pytest.raises(KeyeError, match="is not safe"):
        guard_settings(settings(keys={"ann": "short"}))
