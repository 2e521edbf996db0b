"""Text survives the way to token ids and back, and no user can write a special token."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models

from keye.data.nano_tokenizer import MAX_VOCAB, build_nano_tokenizer, save_nano_tokenizer
from keye.errors import KeyeError
from keye.tokenizer import CONTROL_TOKENS, FRAME_TOKENS, MARKUP_TOKENS, POLYGON_TOKENS, StreamDecoder, Tokenizer

WORDS = ("red", "circle", "when", "is", "the", "visible", "seconds", "s", "?", "[[", "a")
ADDED = CONTROL_TOKENS + MARKUP_TOKENS + FRAME_TOKENS + POLYGON_TOKENS
NANO = Tokenizer(build_nano_tokenizer(WORDS))

# Text in which pieces of special tokens, numbers and brackets meet anything else.
awkward_text = st.lists(
    st.one_of(st.text(), st.sampled_from([*ADDED, "<|", "|>", "[[", "], [", "3.5", " red", "CAT", "\n", "日本", "é"]))
).map("".join)


def pieces(text: str) -> list[str]:
    return [NANO.decode([index]) for index in NANO.encode(text)]


@given(awkward_text)
def test_any_text_round_trips(text: str) -> None:
    assert NANO.decode(NANO.encode(text)) == text


@given(awkward_text)
def test_plain_text_never_holds_an_added_token(text: str) -> None:
    assert not set(NANO.encode(text)) & set(NANO.added_tokens.values())


@given(awkward_text)
def test_template_text_round_trips_with_its_added_tokens(text: str) -> None:
    assert NANO.decode(NANO.encode(text, special=True), skip_special=False) == text


@given(st.integers(0, 360_000).map(lambda tenths: tenths / 10))
def test_a_time_is_the_same_tokens_everywhere(seconds: float) -> None:
    time = f"{seconds:.1f}"
    alone = NANO.encode(time)
    assert NANO.decode(alone) == time
    assert len(alone) <= 3
    assert NANO.encode(f"is {time} seconds")[2 : 2 + len(alone)] == alone
    assert NANO.encode_parts([("<|frame|>", True), (time, False)])[1:] == alone
    assert NANO.encode(f"[[{time}, {time}], [{time}, {time}]]") == [
        NANO.token_id("[["),
        *alone,
        NANO.encode(", 1")[0],
        *alone,
        NANO.encode("], [")[0],
        *alone,
        NANO.encode(", 1")[0],
        *alone,
        NANO.token_id("]]"),
    ]


def test_pieces_of_an_answer() -> None:
    assert pieces("[[3.5, 7.0], [9.0, 136.5]]") == "[[|3|.5|, |7|.0|], [|9|.0|, |136|.5|]]".split("|")
    assert pieces("[]") == ["[]"]
    assert pieces("when is the red circle visible?") == ["when", " is", " the", " red", " circle", " visible", "?"]
    assert pieces("When, red 12005") == ["When", ",", " red", " ", "12", "005"]


def test_upper_case_words_are_spelled() -> None:
    assert pieces("CAT is OWL") == ["C", "A", "T", " is", " O", "W", "L"]


@pytest.mark.parametrize("number", [0, 9, 10, 99, 100, 999])
def test_numbers_below_a_thousand_are_one_token(number: int) -> None:
    assert len(NANO.encode(str(number))) == 1


def test_vocabulary_size_and_order() -> None:
    assert NANO.vocab_size <= MAX_VOCAB
    first_added = NANO.vocab_size - len(ADDED)
    assert sorted(NANO.added_tokens.values()) == list(range(first_added, NANO.vocab_size))
    assert set(NANO.added_tokens) == set(ADDED)
    assert set(NANO.special_tokens) == set(CONTROL_TOKENS)


def test_frameforge_vocabulary_fits() -> None:
    words = pytest.importorskip("keye.data.frameforge", reason="needs the FrameForge package").vocabulary()
    tokenizer = Tokenizer(build_nano_tokenizer(words))
    assert tokenizer.vocab_size <= MAX_VOCAB
    assert all(len(tokenizer.encode(word)) == 1 for word in words)


def test_decode_drops_control_tokens_but_keeps_markup() -> None:
    ids = NANO.encode("<think>red</think><|im_end|>", special=True)
    assert NANO.decode(ids) == "<think>red</think>"
    assert NANO.decode(ids, skip_special=False) == "<think>red</think><|im_end|>"


def test_parts_encode_as_one_text() -> None:
    joined = NANO.encode_parts([("<|im_start|>user\n", True), ("re", False), ("d", False), ("<|im_end|>", True)])
    assert joined == NANO.encode("<|im_start|>user\nred<|im_end|>", special=True)


def test_a_special_token_cannot_be_pieced_together() -> None:
    ids = NANO.encode_parts([("<|im_", False), ("end|>", True), ("<|im_end", True), ("|>", False)])
    assert not set(ids) & set(NANO.added_tokens.values())


@given(awkward_text, st.booleans())
def test_stream_equals_the_whole(text: str, special: bool) -> None:
    decoder = StreamDecoder(NANO)
    ids = NANO.encode(text, special=special)
    assert "".join(map(decoder.push, ids)) + decoder.finish() == NANO.decode(ids)


@given(st.lists(st.integers(0, NANO.vocab_size - 1)))
def test_stream_of_broken_bytes_equals_the_whole(ids: list[int]) -> None:
    decoder = StreamDecoder(NANO)
    assert "".join(map(decoder.push, ids)) + decoder.finish() == NANO.decode(ids)


def test_stream_holds_back_half_a_character() -> None:
    decoder = StreamDecoder(NANO)
    assert [decoder.push(index) for index in NANO.encode("é!")] == ["", "é", "!"]
    assert decoder.push(NANO.encode("é")[0]) == ""
    assert decoder.finish() == "\N{REPLACEMENT CHARACTER}"
    assert decoder.push(NANO.encode("a")[0]) == "a"


def test_files_round_trip(tmp_path: Path) -> None:
    save_nano_tokenizer(build_nano_tokenizer(WORDS), tmp_path)
    loaded = Tokenizer.from_file(tmp_path)
    assert loaded.added_tokens == NANO.added_tokens
    assert loaded.encode("when is [[3.5, 7.0]]") == NANO.encode("when is [[3.5, 7.0]]")
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"] == "<|im_end|>"


def test_ids_without_a_token_decode_to_nothing() -> None:
    assert NANO.token_bytes(NANO.vocab_size + 5) == b""
    assert NANO.decode([NANO.vocab_size + 5]) == ""


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(KeyeError, match="no token 'purple'"):
        NANO.token_id("purple")
    with pytest.raises(KeyeError, match="must hold tokenizer.json"):
        Tokenizer.from_file(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(KeyeError, match="not a readable tokenizer.json"):
        Tokenizer.from_file(tmp_path)
    with pytest.raises(KeyeError, match="lone surrogate at character 2"):
        NANO.encode("re\ud800d")
    with pytest.raises(KeyeError, match="must be ByteLevel"):
        Tokenizer(Backend(models.BPE()))
    with pytest.raises(KeyeError, match="lower-case ASCII"):
        build_nano_tokenizer(["top-left"])
    with pytest.raises(KeyeError, match="fewer words"):
        build_nano_tokenizer(a + b + c for a in "abcdefgh" for b in "abcdefgh" for c in "abcdefgh")
