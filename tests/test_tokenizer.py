"""Text survives the way to token ids and back, and no user can write a special token."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models

from keye.chat.tokenizer import (
    CONTROL_TOKENS,
    FRAME_TOKENS,
    MARKUP_TOKENS,
    POLYGON_TOKENS,
    StreamDecoder,
    Tokenizer,
    check_tokenizer,
)
from keye.config import KeyeConfig, load_model_config, model_config_from_dict
from keye.data.nano_tokenizer import MAX_VOCAB, build_nano_tokenizer, save_nano_tokenizer
from keye.errors import KeyeError
from keye.releases import V1_5

WORDS = ("red", "circle", "when", "is", "the", "visible", "seconds", "s", "?", "[[", "a")
ADDED = CONTROL_TOKENS + MARKUP_TOKENS + FRAME_TOKENS + POLYGON_TOKENS
NANO = Tokenizer(build_nano_tokenizer(WORDS))

# Text in which pieces of special tokens, numbers and brackets meet anything else.
awkward_text = st.lists(
    st.one_of(st.text(), st.sampled_from([*ADDED, "<|", "|>", "[[", "], [", "3.5", " red", "CAT", "\n", "日本", "é"]))
).map("".join)


def pieces(text: str) -> list[str]:
    return [NANO.decode([index]) for index in NANO.encode(text)]


def test_the_tokens_that_1_5_adds() -> None:
    """Six ids in a row after Preview's last; a config.json that says otherwise of the fast frames is refused."""
    assert sorted(V1_5.official_token_ids.values()) == list(range(151675, 151681))
    assert set(FRAME_TOKENS) | set(POLYGON_TOKENS) < set(V1_5.official_token_ids)
    backend = build_nano_tokenizer(WORDS)
    backend.add_tokens(["<|fast_video_pad|>"])
    tokenizer = Tokenizer(backend)
    fast = tokenizer.added_tokens["<|fast_video_pad|>"]
    raw = json.loads((Path(__file__).parents[1] / "configs" / "nano" / "config.json").read_text())
    for kind in ("image", "video"):
        raw[f"{kind}_token_id"] = tokenizer.added_tokens[f"<|{kind}_pad|>"]
    for place in ("start", "end"):
        raw[f"vision_{place}_token_id"] = tokenizer.added_tokens[f"<|vision_{place}|>"]
    raw |= {"eos_token_id": tokenizer.added_tokens["<|im_end|>"], "fast_video_token_id": fast}
    check_tokenizer(tokenizer, model_config_from_dict(raw))
    wrong = model_config_from_dict(raw | {"fast_video_token_id": fast - 1})
    with pytest.raises(KeyeError, match="fast_video_token_id"):
        check_tokenizer(tokenizer, wrong)


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


def config_of(tokenizer: Tokenizer, **changed: object) -> KeyeConfig:
    """keye-nano's configuration with the ids of this tokenizer."""
    config = load_model_config(Path(__file__).parents[1] / "configs/nano")
    ids = {
        "image_token_id": tokenizer.token_id("<|image_pad|>"),
        "video_token_id": tokenizer.token_id("<|video_pad|>"),
        "vision_start_token_id": tokenizer.token_id("<|vision_start|>"),
        "vision_end_token_id": tokenizer.token_id("<|vision_end|>"),
        "eos_token_ids": (tokenizer.token_id("<|im_end|>"),),
        "text": dataclasses.replace(config.text, vocab_size=tokenizer.vocab_size),
    }
    return dataclasses.replace(config, **{**ids, **changed})  # type: ignore[arg-type]


def test_a_tokenizer_and_its_model() -> None:
    check_tokenizer(NANO, config_of(NANO))
    folder = Path(__file__).parents[1] / "configs/nano"
    check_tokenizer(Tokenizer.from_file(folder), load_model_config(folder))


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"image_token_id": 5}, r"gives <\|image_pad\|> the id [0-9]+, config.json sets image_token_id to 5"),
        ({"video_token_id": 5}, "video_token_id to 5"),
        ({"vision_start_token_id": 5}, "vision_start_token_id to 5"),
        ({"vision_end_token_id": 5}, "vision_end_token_id to 5"),
        ({"eos_token_ids": (70_000,)}, "eos_token_id to 70000, the tokenizer has ids up to"),
        ({"text": "small"}, "ids up to [0-9]+, config.json sets vocab_size to [0-9]+: use the tokenizer.json"),
    ],
)
def test_a_tokenizer_of_another_model(changed: dict[str, object], sentence: str) -> None:
    config = config_of(NANO)
    if "text" in changed:
        changed = {"text": dataclasses.replace(config.text, vocab_size=NANO.vocab_size - 1)}
    with pytest.raises(KeyeError, match=sentence):
        check_tokenizer(NANO, config_of(NANO, **changed))


def test_a_tokenizer_without_tokens_for_media() -> None:
    backend = Backend.from_str(build_nano_tokenizer(WORDS).to_str().replace("<|image_pad|>", "<|picture_pad|>"))
    with pytest.raises(KeyeError, match=r"has no token <\|image_pad\|>, but config.json sets image_token_id"):
        check_tokenizer(Tokenizer(backend), config_of(NANO))


#: The added tokens of the Keye-VL family in the order of the vocabulary; the first has the id 151643.
OFFICIAL = (
             "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
             "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>",
             "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>",
             "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>",
             "</tool_response>", "<think>", "</think>", "<|point_start|>", "<|point_end|>", "<|ocr_text_start|>",
             "<|ocr_text_end|>", "<|clip_time_start|>", "<|clip_time_end|>",
)  # fmt: skip


def test_ids_of_the_official_tokenizer(shared: Callable[[str], Path]) -> None:
    folder = shared("checkpoints/keye-vl-8b-preview")
    tokenizer = Tokenizer.from_file(folder)
    assert tokenizer.added_tokens == {token: 151643 + place for place, token in enumerate(OFFICIAL)}
    assert set(tokenizer.special_tokens) == set(CONTROL_TOKENS)
    assert set(OFFICIAL) == set(CONTROL_TOKENS + MARKUP_TOKENS)
    check_tokenizer(tokenizer, load_official(folder))
    output = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert {entry["content"]: int(index) for index, entry in output.items()} == tokenizer.added_tokens


def load_official(folder: Path) -> KeyeConfig:
    """The ids of Preview's config.json in a configuration."""
    raw = json.loads((folder / "config.json").read_text())
    config = load_model_config(Path(__file__).parents[1] / "configs/nano")
    ids = {
        name: raw[name] for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    }
    text = dataclasses.replace(config.text, vocab_size=raw["vocab_size"])
    return dataclasses.replace(config, **ids, text=text, eos_token_ids=(raw["eos_token_id"],))


def test_recorded_texts_of_the_official_tokenizer(shared: Callable[[str], Path]) -> None:
    tokenizer = Tokenizer.from_file(shared("checkpoints/keye-vl-8b-preview"))
    for case in json.loads(shared("golden/processor/case-61.json").read_text())["cases"]:
        assert tokenizer.encode(case["text"], special=True) == case["input_ids"], case
        assert tokenizer.decode(case["input_ids"], skip_special=False) == case["decoded"]
        assert tokenizer.decode(case["input_ids"]) == case["decoded_skip_special"]
