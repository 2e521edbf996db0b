"""A text encoded in parts has the tokens of the whole."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.decoders import ByteLevel
from tokenizers.models import BPE

from keye.chat.tokenizer import _QWEN, MAX_RUN, Tokenizer, byte_characters, cuts_of, pieces_of
from keye.data.nano_tokenizer import build_nano_tokenizer
from keye.errors import KeyeError

NANO = build_nano_tokenizer(("red", "circle", "when", "is"))
SPLIT = pre_tokenizers.Split(Regex(_QWEN), behavior="isolated")
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
QWEN = (pre_tokenizers.Sequence([SPLIT, BYTES]), normalizers.NFC())
CHINESE = "\u3002\uff0c\u3001\uff01\uff1f\u201c\u201d"
ALPHABET = [
    *CHINESE,
    *"abcXYZ019 \n\r\t'.,;:!?()[]{}<>=+-*/\"\\_`~@#$%^&|é한글ㅎ한",
    *"我们日本カか\u3099\u309aяй\u0306ىًא\u0338\u0301\u00a0\u200d½²٣Å",
    "'s", "'ll", " 'd", "\r\n", "  ", "e\u0301", "can't", ". 5", "\U0001f469\u200d\U0001f3fd",
]  # fmt: skip
texts = st.lists(st.one_of(st.sampled_from(ALPHABET), st.characters(exclude_categories=["Cs"]))).map("".join)


def pre_tokens(text: str, pre_tokenizer: Any, normalizer: Any) -> list[str]:
    normal = normalizer.normalize_str(text) if normalizer is not None else text
    return [piece for piece, _ in pre_tokenizer.pre_tokenize_str(normal)]


@pytest.mark.parametrize("parts", [QWEN, (NANO.pre_tokenizer, None)], ids=["qwen", "nano"])
@given(text=texts, size=st.integers(1, 5))
def test_parts_have_the_pieces_of_the_whole(parts: tuple[Any, Any], text: str, size: int) -> None:
    cut = list(pieces_of(text, cuts_of(*parts), size))
    assert "".join(cut) == text
    assert [pre_token for part in cut for pre_token in pre_tokens(part, *parts)] == pre_tokens(text, *parts)


def test_texts_are_cut_and_unknown_rules_are_not() -> None:
    text = "The quick brown fox; 我们\uff0c说 12 times.\n" * 50
    for parts in (QWEN, (NANO.pre_tokenizer, None)):
        assert max(map(len, pieces_of(text, cuts_of(*parts), 50))) < 80
    digits = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), behavior="isolated"), BYTES])
    assert cuts_of(digits, None) is None
    assert cuts_of(None, None) is None
    assert cuts_of(QWEN[0], normalizers.NFKC()) is None
    assert list(pieces_of(text, None, 50)) == [text]


def test_ids_are_those_of_one_call_and_end_soon_after_a_limit() -> None:
    tokenizer = Tokenizer(NANO)
    text = "when is the red circle 12.5 s\n" * 20_000
    ids = tokenizer.encode(text)
    assert ids == NANO.encode(text, add_special_tokens=False).ids
    some = tokenizer.encode_parts([(text, False)], most=1000)
    assert 1000 < len(some) < 40_000 and some == ids[: len(some)]
    assert 0 < tokenizer.least_tokens(text) <= len(ids)
    assert tokenizer.encode_parts([(text, False)], most=len(ids)) == ids


def test_a_run_without_any_cut_is_bounded_only_where_tokens_are_counted() -> None:
    backend = Backend(BPE(vocab={item: index for index, item in enumerate(byte_characters())}, merges=[]))
    backend.decoder = ByteLevel()
    backend.pre_tokenizer, backend.normalizer = QWEN
    tokenizer, run = Tokenizer(backend), "a" * (MAX_RUN + 1)
    assert len(tokenizer.encode(run)) == MAX_RUN + 1
    for text in (run, "\U0001f600" * (MAX_RUN // 4 + 1)):
        with pytest.raises(KeyeError, match="bytes in a row"):
            tokenizer.encode_parts([(text, False)], most=10**6)
    assert len(tokenizer.encode_parts([("\U0001f600" * (MAX_RUN // 4), False)], most=10**6)) == MAX_RUN


@given(text=texts)
def test_the_lower_bound_holds_with_composed_characters(text: str) -> None:
    vocab = {item: index for index, item in enumerate(byte_characters())}
    backend = Backend(BPE(vocab=vocab, merges=[]))
    backend.decoder, backend.normalizer = ByteLevel(), normalizers.NFC()
    backend.pre_tokenizer = QWEN[0]
    tokenizer = Tokenizer(backend)
    assert tokenizer.least_tokens(text) <= len(tokenizer.encode(text))
