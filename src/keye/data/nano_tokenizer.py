"""The tokenizer of keye-nano: every byte, every number up to 999, and the words of FrameForge as single tokens.

Ids in order: 256 bytes, numbers, fractions, letters after a space, punctuation, words; the added tokens come last, as
in the official vocabulary. There are no merges: a piece that the pre-tokenizer finds is one token if the vocabulary
holds it and is spelled in bytes otherwise. So a time is the same tokens wherever it stands, and an upper-case word is
read and written letter by letter, known or not.

    python -m keye.data.nano_tokenizer OUT_DIR
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from keye.chat.tokenizer import CONTROL_TOKENS, FRAME_TOKENS, MARKUP_TOKENS, POLYGON_TOKENS, byte_characters
from keye.errors import KeyeError

MAX_VOCAB: Final = 2048

_CLUSTERS: Final = ("], [", "[[", "]]", "[]", ", ", "; ")

_PIECES: Final = "|".join(
    (
        r"\.[0-9](?![0-9])",  # the one decimal of a time
        r"[0-9]{1,3}(?=(?:[0-9]{3}){0,6}(?![0-9]))",  # groups of three from the right: 36000 is 36, 000
        r"\], \[|\[\[|\]\]|\[\]|[,;] (?=[0-9\[])",  # in prose the space belongs to the word that follows
        r" ?[A-Z][a-z]+| ?[A-Z]| ?[a-z]+",
    )
)


def build_nano_tokenizer(words: Iterable[str]) -> Tokenizer:
    """A byte-level tokenizer with `words`, each bare, capitalised and after a space, as single tokens.

    Entries of `words` without a letter, and single letters, are ignored: bytes and the fixed pieces cover them. Raises
    KeyeError if an entry is not made of lower-case ASCII letters, or if more than MAX_VOCAB ids are needed.
    """
    characters = byte_characters()
    vocab = {character: index for index, character in enumerate(characters)}
    for piece in [*_fixed_pieces(), *_word_pieces(words)]:
        vocab.setdefault("".join(characters[byte] for byte in piece.encode()), len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([_added(token, special=True) for token in CONTROL_TOKENS])
    tokenizer.add_tokens([_added(token, special=False) for token in (*MARKUP_TOKENS, *FRAME_TOKENS, *POLYGON_TOKENS)])
    if (size := tokenizer.get_vocab_size()) > MAX_VOCAB:
        raise KeyeError(f"words: the vocabulary would hold {size} ids, more than {MAX_VOCAB}; give fewer words.")
    return tokenizer


def save_nano_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json into `folder`, which is made if needed."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": None, "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>", "unk_token": None, "add_prefix_space": False,
        "clean_up_tokenization_spaces": False, "split_special_tokens": False,
        "additional_special_tokens": [token for token in CONTROL_TOKENS if token != "<|endoftext|>"],
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _fixed_pieces() -> Iterator[str]:
    yield from (str(number) for number in range(1000))
    yield from (f"{number:03d}" for number in range(100))  # the last group of 12,005
    yield from (f".{digit}" for digit in range(10))
    yield from (f" {chr(letter)}" for letter in range(ord("A"), ord("Z") + 1))
    yield from _CLUSTERS


def _word_pieces(words: Iterable[str]) -> Iterator[str]:
    for word in sorted({word for word in words if len(word) > 1 and any(map(str.isalpha, word))}):
        if not re.fullmatch("[a-z]+", word):
            raise KeyeError(f"words: {word!r} is not made of lower-case ASCII letters; split or lower it.")
        yield from (word, f" {word}", word.capitalize(), f" {word.capitalize()}")
    yield from (" a", " i")


def _added(token: str, *, special: bool) -> AddedToken:
    return AddedToken(token, special=special, normalized=False)


def main(arguments: list[str]) -> int:
    """Write the tokenizer for FrameForge's vocabulary into the folder named by the only argument."""
    from keye.data.frameforge import vocabulary  # here, so that building a tokenizer needs no video library

    if len(arguments) != 1:
        print("usage: python -m keye.data.nano_tokenizer OUT_DIR", file=sys.stderr)
        return 2
    tokenizer = build_nano_tokenizer(vocabulary())
    save_nano_tokenizer(tokenizer, Path(arguments[0]))
    print(f"{arguments[0]}: {tokenizer.get_vocab_size()} ids")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
