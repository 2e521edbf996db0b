"""Damaged GGUF files through everything that reads one: nothing but one sentence may come out of it.

    python -m benchmarks.fuzz_gguf [--minutes 10] [--seed 0] [--keep FOLDER]

A small model and its vision part, with headers of every kind of value, are changed byte by byte, number by number,
name by name, or cut; then the small files are derived and the tensors matched with the network that they describe, and
some of them read. Reported are errors that are not `KeyeError`, sentences of more than one line, the slowest file and
the most memory that Python took for one. `damage` and `read_everything` are also what the tests use.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import struct
import tempfile
import time
import traceback
import tracemalloc
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from keye.chat.tokenizer import Tokenizer, check_tokenizer
from keye.config import load_model_config, load_processor_config
from keye.config.model import load_generation_config
from keye.errors import KeyeError
from keye.models.load import check_fit
from keye.weights.gguf.folder import small_files
from keye.weights.gguf.source import open_gguf
from tests.support.gguf import write_model
from tests.support.tiny import tiny_folder

#: Numbers that headers lie with: small, at borders of their types, huge.
_NUMBERS = (0, 1, 2, 3, 31, 33, 255, 1 << 15, 1 << 16, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 62, (1 << 63) + 1)


def damage(data: bytes, header: int, chance: random.Random) -> bytes:
    """A file with one to eight changes in the first `header` bytes, or cut short."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 8))):
        at = chance.randrange(min(header, len(changed)))
        match chance.randrange(6):
            case 0:
                changed[at] = chance.randrange(256)
            case 1:
                changed[at] ^= 1 << chance.randrange(8)
            case 2:
                changed[at : at + 8] = struct.pack("<Q", chance.choice(_NUMBERS))
            case 3:
                changed[at : at + 4] = struct.pack("<I", chance.choice(_NUMBERS) & 0xFFFFFFFF)
            case 4:
                other = chance.randrange(header)
                length = chance.choice((1, 4, 8, 40))
                changed[at : at + length] = changed[other : other + length]
            case _:
                if chance.random() < 0.3:
                    del changed[at:]
                    return bytes(changed)
                del changed[at : at + chance.choice((1, 4, 8))]
    return bytes(changed)


def read_everything(model: Path, mmproj: Path, chance: random.Random) -> None:
    """What loading does up to the numbers, and the numbers of three tensors."""
    folder = small_files(model, mmproj)
    try:
        _read(folder, model, mmproj, chance)
    finally:
        shutil.rmtree(folder)


def _read(folder: Path, model: Path, mmproj: Path, chance: random.Random) -> None:
    config = load_model_config(folder)
    load_processor_config(folder)
    load_generation_config(folder)
    check_tokenizer(Tokenizer.from_file(folder), config)
    tensors = open_gguf(model, mmproj)
    check_fit(tensors, config)
    for name in chance.sample(sorted(tensors), 3):
        tensor = tensors[name]
        if tensor.format is not None:
            tensor.quantized()
        tensor.read()


def _outcome(files: list[Path], chance: random.Random) -> tuple[str, str]:
    """What came of reading: read, refused or failed; with the error."""
    try:
        read_everything(files[0], files[1], chance)
    except KeyeError as error:
        sentence = str(error)
        return ("refused", sentence) if "\n" not in sentence and len(sentence) < 5000 else ("long", sentence)
    except Exception:  # noqa: BLE001  (what is looked for)
        return "failed", traceback.format_exc()
    return "read", ""


def fuzz(minutes: float, seed: int, keep: Path | None) -> dict[str, Any]:
    """Damages files until the time is over."""
    warnings.simplefilter("ignore")
    chance, counts, failures = random.Random(seed), Counter[str](), list[str]()
    slowest, most = 0.0, 0
    with tempfile.TemporaryDirectory(prefix="keye-fuzz-gguf-") as place:
        folder = Path(place)
        good = write_model(tiny_folder(folder / "tiny"), folder, kind="Q8_0")
        contents = [path.read_bytes() for path in good]
        headers = [content.find(b"\0" * 24, 2000) if len(content) < 4000 else 60_000 for content in contents]
        headers = [min(len(content), max(header, 2000)) for content, header in zip(contents, headers, strict=True)]
        end, tracing = time.monotonic() + minutes * 60, 0
        while time.monotonic() < end:
            for path, content in zip(good, contents, strict=True):
                path.unlink(missing_ok=True)  # file systems write a file out when it is replaced in place
                path.write_bytes(content)
            which = chance.randrange(2)
            # Most of a model's header are its tokens: what follows and precedes them is hit as often as they are.
            part = headers[which] if chance.random() < 0.5 else 2500
            good[which].unlink()
            good[which].write_bytes(damage(contents[which], part, chance))
            if tracing % 20 == 0:
                tracemalloc.start()
            begin = time.perf_counter()
            outcome, error = _outcome(list(good), chance)
            slowest = max(slowest, time.perf_counter() - begin)
            if tracing % 20 == 0:
                most = max(most, tracemalloc.get_traced_memory()[1])
                tracemalloc.stop()
            tracing += 1
            counts[outcome] += 1
            if outcome in ("failed", "long"):
                failures.append(error)
                if keep is not None:
                    keep.mkdir(parents=True, exist_ok=True)
                    (keep / f"{len(failures)}.gguf").write_bytes(good[which].read_bytes())
                    (keep / f"{len(failures)}.txt").write_text(error)
    return {"counts": dict(counts), "slowest_seconds": round(slowest, 2), "most_bytes": most, "failures": failures[:20]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = fuzz(arguments.minutes, arguments.seed, arguments.keep)
    print(
        json.dumps({"benchmark": "fuzz_gguf", "minutes": arguments.minutes, "seed": arguments.seed, **result}, indent=1)
    )


if __name__ == "__main__":
    main()
