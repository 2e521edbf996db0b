"""`keye convert` of layers of Keye-VL-2.0's width from safetensors on disk to GGUF: seconds, MB of bfloat16 a second,
and peak memory of the command.

    python -m benchmarks.convert_gguf --json [--layers 2] [--type Q4_K_M]

The checkpoint (3.9 GB for two layers with embeddings, head and vision) is noise, written once into --folder and removed
at the end, as the GGUF file is.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers_llama_cpp import Noise
from benchmarks.scale import machine
from keye.config import read_json
from keye.hub import asset
from keye.models.outline import outline
from keye.weights.plain import write_plain

#: Peak memory as the kernel counts it for this program alone; `ru_maxrss` begins with that of the one that started it.
_COMMAND = """
import json, sys, time
from pathlib import Path
from keye.cli import main
code = main(["convert", *sys.argv[1:]])
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(json.dumps({"cpu_seconds": round(time.process_time(), 1), "peak_mib": int(peak.split()[1]) // 1024}))
sys.exit(code)
"""


def write_checkpoint(folder: Path, layers: int) -> int:
    """A folder of noise; returns the bytes of its weights."""
    raw = {**read_json(asset("configs/2.0") / "config.json"), "num_hidden_layers": layers}
    sources = {name: Noise(shape) for name, shape in outline(raw).shapes.items()}
    write_plain(sources, folder, torch.bfloat16)
    (folder / "config.json").write_text(json.dumps(raw))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def convert(folder: Path, file: Path, file_type: str) -> dict[str, Any]:
    """Runs the command in a process of its own, which reports what it took."""
    begin = time.monotonic()
    arguments = [str(folder), "--type", file_type, "-o", str(file)]
    done = subprocess.run([sys.executable, "-c", _COMMAND, *arguments], check=True, capture_output=True, text=True)
    took = json.loads(done.stdout)
    return {"seconds": round(time.monotonic() - begin, 1), **took, "file_bytes": file.stat().st_size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--type", default="Q4_K_M")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", action="store_true", help="print JSON; this is the only form there is")
    options = parser.parse_args()
    torch.manual_seed(0)
    folder = Path(tempfile.mkdtemp(prefix="keye-convert-", dir=options.folder))
    try:
        nbytes = write_checkpoint(folder / "model", options.layers)
        result = convert(folder / "model", folder / "model.gguf", options.type)
    finally:
        shutil.rmtree(folder)
    result |= {"bytes": nbytes, "mb_s": round(nbytes / 1e6 / result["seconds"])}
    result["mb_s_core"] = round(nbytes / 1e6 / result["cpu_seconds"])
    names = {"benchmark": "convert_gguf", "machine": machine(), "layers": options.layers, "type": options.type}
    print(json.dumps({**names, **result}))


if __name__ == "__main__":
    main()
