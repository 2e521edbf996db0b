"""Text to token ids and back, from a checkpoint's `tokenizer.json`.

Knows the special tokens of the Keye-VL family and keeps them out of the user's reach: text counts as plain unless the
caller says that it is template text. Knows no chat format and no model.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import tokenizers

from keye.config import KeyeConfig
from keye.errors import KeyeError

CONTROL_TOKENS: Final = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
"""Tokens flagged `special` in every official tokenizer: they steer the model and never belong to an answer."""

MARKUP_TOKENS: Final = (
    "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>",
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>", "<|point_start|>",
    "<|point_end|>", "<|ocr_text_start|>", "<|ocr_text_end|>", "<|clip_time_start|>", "<|clip_time_end|>",
)  # fmt: skip
"""Single tokens that are not flagged `special`: marks a model writes into its answer, kept by `decode`."""

FRAME_TOKENS: Final = ("<|frame|>", "<|fast_start|>", "<|fast_end|>")
"""Tokens the 1.5 processor writes around the frames of a video."""

POLYGON_TOKENS: Final = ("<|polygon_start|>", "<|polygon_end|>")
"""Grounding marks of the 1.5 report (table 1)."""

_MEDIA_TOKENS: Final = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
"""Fields of config.json, and the tokens whose ids they name."""

_FAST_VIDEO: Final = "<|fast_video_pad|>"


def byte_characters() -> list[str]:
    """The character that stands for each of the 256 bytes in a byte-level vocabulary (the table of GPT-2).

    Printable Latin-1 characters stand for themselves, the other bytes for U+0100 onwards in order.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


# Places at which a text may be cut so that its parts, encoded one by one, give the tokens of the whole. The regular
# expressions of known pre-tokenizers are looked up, not understood; a text for an unknown one stays whole.

#: Characters after which the next safe place is looked for.
PIECE: Final = 16_384

#: The pre-tokenizer of Qwen2 and Qwen3, from which the Keye-VL releases come.
_QWEN: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
#: The pre-tokenizer of keye-nano begins so: no piece of it holds a letter and, after that, another character.
_NANO: Final = r"\.[0-9](?![0-9])|[0-9]{1,3}(?=(?:[0-9]{3}){0,6}(?![0-9]))|"

# Letters that no normalisation changes by what stands before them. A piece of _QWEN ends behind a digit, and where
# a letter is followed by one other character and a letter, and behind line breaks. No piece looks back.
_LETTER: Final = (
    "A-Za-z\u0400-\u0481\u048a-\u052f\u05d0-\u05ea\u0620-\u064a\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"
)
_MARK: Final = ' \\t!"#$%&()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~\u3001\u3002\uff0c\uff01\uff1f\uff1a\uff1b\u201c\u201d'
_CUTS: Final = {
    "qwen": re.compile(
        rf"(?<=[0-9])(?=[0-9{_LETTER}])|(?<=[{_LETTER}])(?=[{_MARK}][{_LETTER}])|(?<=\n)(?=[0-9{_LETTER}])"
    ),
    "nano": re.compile(r"(?<=[A-Za-z])(?=[^A-Za-z])"),
}


def cuts_of(pre_tokenizer: Any, normalizer: Any) -> re.Pattern[str] | None:
    """The empty matches at which texts may be cut for a pre-tokenizer of `tokenizers`, None where that is not known."""
    if pre_tokenizer is None:
        return None
    described = json.loads(pre_tokenizer.__getstate__())
    parts = described.get("pretokenizers", [described])
    bytewise = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    if len(parts) != 2 or parts[0].get("type") != "Split" or bytewise.items() - parts[1].items():
        return None
    if parts[0].get("behavior") != "Isolated" or parts[0].get("invert"):
        return None
    if normalizer is not None and json.loads(normalizer.__getstate__()).get("type") != "NFC":
        return None
    pattern = str(parts[0].get("pattern", {}).get("Regex", ""))
    if pattern == _QWEN:
        return _CUTS["qwen"]
    return _CUTS["nano"] if normalizer is None and pattern.startswith(_NANO) else None


def pieces_of(text: str, cuts: re.Pattern[str] | None, size: int = PIECE) -> Iterator[str]:
    """The text in parts of about `size` characters, cut at safe places; a part without any is longer."""
    begin = 0
    while cuts is not None and (match := cuts.search(text, begin + size)) is not None:
        yield text[begin : match.start()]
        begin = match.start()
    yield text[begin:] if begin else text


#: Bytes without a place to cut that are encoded where the number of tokens is limited: 50 MB of memory.
MAX_RUN: Final = 262_144

_BYTE_OF: Final = {character: byte for byte, character in enumerate(byte_characters())}


class Tokenizer:
    """Byte-level BPE with added tokens that only template text can produce.

    `tokenizers` finds added tokens in any text, so a user who types `<|im_end|>` would end the turn. Here the text
    between added tokens goes to a second tokenizer that shares the model and has no added tokens.

    `added_tokens` are all added tokens with their ids, `special_tokens` those flagged `special`, which `decode` drops
    by default. `largest_id` is at least `vocab_size` - 1, more where ids are left out.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        """Wrap a loaded `tokenizers.Tokenizer`; KeyeError if it is not byte-level or strips around added tokens."""
        if not isinstance(backend.decoder, tokenizers.decoders.ByteLevel):
            raise KeyeError("tokenizer.json: `decoder` must be ByteLevel, as in every Keye-VL release.")
        self._backend = backend
        self._plain = tokenizers.Tokenizer(backend.model)
        for part in ("normalizer", "pre_tokenizer"):
            if (value := getattr(backend, part)) is not None:
                setattr(self._plain, part, value)
        added = backend.get_added_tokens_decoder()
        self.added_tokens = {token.content: index for index, token in added.items()}
        self.special_tokens = {token.content: index for index, token in added.items() if token.special}
        stripping = [token.content for token in added.values() if token.lstrip or token.rstrip or token.single_word]
        if stripping:
            raise KeyeError(
                f"tokenizer.json: added token {stripping[0]!r} sets lstrip, rstrip or single_word, which keye does not "
                "support; use a tokenizer whose added tokens match exactly."
            )
        longest_first = sorted(self.added_tokens, key=len, reverse=True)
        self._added_pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None
        self._cuts = cuts_of(backend.pre_tokenizer, backend.normalizer)
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.largest_id = max(vocabulary.values(), default=-1)
        # A token is written with a character for each of its bytes.
        self._longest = max(map(len, vocabulary), default=1)

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Load `tokenizer.json`, or the one inside the folder `path`."""
        file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        if not file.is_file():
            from keye.weights.gguf.folder import read_link

            if (link := read_link(file.parent)) is not None:
                raise KeyeError(f"{link[0]} holds no tokens, so that keye cannot read or write text with it: convert "
                                "the model again with its tokenizer.")  # fmt: skip
            raise KeyeError(f"{file} does not exist: a checkpoint folder must hold tokenizer.json.")
        try:
            return cls(tokenizers.Tokenizer.from_file(str(file)))
        except KeyeError:
            raise
        except Exception as error:  # `tokenizers` raises bare Exception for every unreadable file
            raise KeyeError(f"{file} is not a readable tokenizer.json ({error}); download it again.") from error

    @classmethod
    def blank(cls) -> Tokenizer:
        """Without a vocabulary: for an engine that is only used by token ids."""
        backend = tokenizers.Tokenizer(tokenizers.models.BPE())
        backend.decoder = tokenizers.decoders.ByteLevel()
        return cls(backend)

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def token_id(self, token: str) -> int:
        """The id of one token written as in tokenizer.json; raises KeyeError if the vocabulary lacks it."""
        index = self._backend.token_to_id(token)
        if index is None:
            raise KeyeError(f"The tokenizer has no token {token!r}; use the tokenizer.json that came with the weights.")
        return int(index)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of `text`; added tokens written in it count as such only if `special`."""
        return self.encode_parts([(text, special)])

    def encode_parts(self, parts: Iterable[tuple[str, bool]], *, most: int | None = None) -> list[int]:
        """Token ids of the concatenated texts; each comes with whether its added tokens count.

        Neighbouring plain text is encoded as one string, so the ids equal those of the whole prompt encoded at once,
        and an added token can neither be written by plain text nor be pieced together across a boundary. Other threads
        go on meanwhile. With `most`, encoding ends soon after that many ids: a longer result is a beginning only.
        """
        ids: list[int] = []
        pending: list[str] = []

        def encode_pending() -> bool:
            for piece in self._pieces("".join(pending), most is not None):
                # Unlike `encode`, a batch is encoded without Python's lock.
                ids.extend(self._plain.encode_batch_fast([piece], add_special_tokens=False)[0].ids)
                if most is not None and len(ids) > most:
                    return False
            pending.clear()
            return True

        for text, special in parts:
            pattern = self._added_pattern if special else None
            for place, piece in enumerate([text] if pattern is None else pattern.split(text)):
                if place % 2 == 0:  # the text between added tokens
                    pending.append(piece)
                    continue
                if not encode_pending():
                    return ids
                ids.append(self.added_tokens[piece])
        encode_pending()
        return ids

    def least_tokens(self, text: str) -> int:
        """A lower bound of the tokens of a text, found without reading it."""
        # NFC makes one character of at most four, and leaves ASCII alone.
        composed = 1 if self._backend.normalizer is None or text.isascii() else 4
        return -(-len(text) // (composed * self._longest))

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are no valid UTF-8 become U+FFFD."""
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one id stands for; empty for ids without a token (padding of the embedding table)."""
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        try:
            return bytes(_BYTE_OF[character] for character in token)
        except KeyError:  # an added token with characters outside the byte table is written as it stands
            return str(token).encode("utf-8")

    def _pieces(self, text: str, bounded: bool) -> Iterator[str]:
        """A text in the parts that are encoded one by one: memory does not grow with the text, but for one without any
        place to cut, which `bounded` limits."""
        check_unicode(text)
        for piece in pieces_of(text, self._cuts):
            if bounded and len(piece) * (1 if piece.isascii() else 4) > MAX_RUN < len(piece.encode()):
                raise KeyeError(
                    f"The text holds more than {MAX_RUN:,} bytes in a row without a space or a digit between "
                    "letters; break it up."
                )
            if piece:
                yield piece


_SURROGATE: Final = re.compile("[\ud800-\udfff]")


def check_unicode(text: str) -> str:
    """`text` if it is valid Unicode; `KeyeError` where it holds half of a surrogate pair."""
    if not text.isascii() and (surrogate := _SURROGATE.search(text)) is not None:
        raise KeyeError(f"The text holds a lone surrogate at character {surrogate.start()}; give valid Unicode text.")
    return text


def check_tokenizer(tokenizer: Tokenizer, config: KeyeConfig) -> None:
    """Raises KeyeError where a tokenizer cannot belong to the model of `config`: another id for a token that stands for
    media, an id that ends a reply and is none of its own, or ids beyond the embedding table."""
    fix = "use the tokenizer.json and the config.json of one release"
    for field, token in _MEDIA_TOKENS.items():
        wanted, index = getattr(config, field), tokenizer.added_tokens.get(token)
        if wanted < 0:
            continue  # a model without vision
        if index is None:
            raise KeyeError(f"The tokenizer has no token {token}, but config.json sets {field} to {wanted}: {fix}.")
        if index != wanted:
            raise KeyeError(f"The tokenizer gives {token} the id {index}, config.json sets {field} to {wanted}: {fix}.")
    fast = config.raw.get("fast_video_token_id")
    if fast is not None and tokenizer.added_tokens.get(_FAST_VIDEO, fast) != fast:
        index = tokenizer.added_tokens[_FAST_VIDEO]
        raise KeyeError(
            f"The tokenizer gives {_FAST_VIDEO} the id {index}, config.json sets fast_video_token_id to {fast}: {fix}."
        )
    largest, size = tokenizer.largest_id, config.text.vocab_size
    if largest >= size:
        raise KeyeError(f"The tokenizer has ids up to {largest}, config.json sets vocab_size to {size}: {fix}.")
    if outside := [index for index in config.eos_token_ids if not 0 <= index <= largest]:
        raise KeyeError(f"config.json sets eos_token_id to {outside[0]}, the tokenizer has ids up to {largest}: {fix}.")


class StreamDecoder:
    """Text of a growing sequence of ids, piece by piece, never with half a character.

    Bytes that cannot become a character any more come out as U+FFFD, exactly as `Tokenizer.decode` writes them, so the
    concatenation of all pieces and of `finish()` equals the decoded whole.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._dropped = frozenset(tokenizer.special_tokens.values()) if skip_special else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Add one id; returns the text that is now certain, empty in the middle of a character."""
        if token_id in self._dropped:
            return ""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """The text still held back: U+FFFD for an unfinished character, else nothing."""
        return self._utf8.decode(b"", final=True)
