"""llama.cpp through ctypes: logits of tokens, timing, and its own quantiser. Knows nothing of keye.

The structures are those of `llama.h` of release v0.5.0, whose libraries `tests/peers/install.py` fetches. Flash
attention is off and the KV cache float32 unless asked otherwise, so that float32 files are computed in float32.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import c_bool, c_char_p, c_float, c_int, c_int8, c_int32, c_size_t, c_uint32, c_void_p
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np

from tests.peers.install import FOLDER

Flash = Literal["auto", "off", "on"]
Kv = Literal["float32", "float16"]
#: `llama_ftype` of llama.h.
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "Q5_0": 8, "Q3_K_M": 12, "Q4_K_M": 15, "Q5_K_M": 17,
              "Q6_K": 18, "BF16": 32}  # fmt: skip
#: Backends of the processor and the flag of /proc/cpuinfo that each needs, best first.
_BACKENDS = {"zen4": "avx512_bf16", "skylakex": "avx512bw", "haswell": "avx2", "x64": "sse2"}
_FLASH: dict[Flash, int] = {"auto": -1, "off": 0, "on": 1}
_KV: dict[Kv, int] = {"float32": 0, "float16": 1}


class _ModelParams(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("devices", "tensor_buft_overrides")),
        ("n_gpu_layers", c_int32), *((name, c_int) for name in ("split_mode", "load_mode", "lazy_mode")),
        ("main_gpu", c_int32),
        *((name, c_void_p) for name in ("tensor_split", "progress_callback", "user_data", "kv_overrides")),
        *((name, c_bool) for name in (
            "vocab_only", "check_tensors", "use_extra_bufts", "no_host", "no_alloc", "load_mtp")),
    )  # fmt: skip


class _ContextParams(ctypes.Structure):
    _fields_ = (
        *((name, c_uint32) for name in (
            "n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq", "n_outputs_max", "n_outputs_max_per_seq")),
        *((name, c_int32) for name in (
            "n_threads", "n_threads_batch", "ctx_type", "rope_scaling_type", "pooling_type", "attention_type",
            "flash_attn_type")),
        *((name, c_float) for name in (
            "rope_freq_base", "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast",
            "yarn_beta_slow")),
        ("yarn_orig_ctx", c_uint32), ("defrag_thold", c_float),
        ("cb_eval", c_void_p), ("cb_eval_user_data", c_void_p), ("type_k", c_int), ("type_v", c_int),
        ("abort_callback", c_void_p), ("abort_callback_data", c_void_p),
        *((name, c_bool) for name in ("embeddings", "offload_kqv", "no_perf", "op_offload", "swa_full", "kv_unified")),
        ("samplers", c_void_p), ("n_samplers", c_size_t), ("ctx_other", c_void_p),
    )  # fmt: skip


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", c_int32), ("token", ctypes.POINTER(c_int32)), ("embd", c_void_p),
        ("pos", ctypes.POINTER(c_int32)), ("n_seq_id", ctypes.POINTER(c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(c_int32))), ("logits", ctypes.POINTER(c_int8)),
    )  # fmt: skip


class _QuantizeParams(ctypes.Structure):
    _fields_ = (
        *((name, c_int32) for name in ("nthread", "ftype", "output_tensor_type", "token_embedding_type")),
        *((name, c_bool) for name in (
            "allow_requantize", "quantize_output_tensor", "only_copy", "pure", "keep_split", "dry_run")),
        *((name, c_void_p) for name in ("imatrix", "kv_overrides", "tt_overrides", "prune_layers")),
        ("max_buf_size", c_size_t),
    )  # fmt: skip


_LOG = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
_messages: list[str] = []


@_LOG
def _listen(level: int, text: bytes, _: object) -> None:
    _messages.append(text.decode(errors="replace"))


@cache
def _libraries() -> tuple[ctypes.CDLL, ctypes.CDLL, ctypes.CDLL]:
    """libllama, libggml and libggml-base, with a backend for this processor."""
    folder = FOLDER / "lib"
    base, ggml, llama = (
        ctypes.CDLL(str(next(folder.glob(f"lib{name}.*so"))), mode=ctypes.RTLD_GLOBAL)
        for name in ("ggml-base", "ggml", "llama")
    )
    ggml.ggml_backend_load.argtypes, ggml.ggml_backend_load.restype = (c_char_p,), c_void_p
    llama.llama_log_set.argtypes = (_LOG, c_void_p)
    llama.llama_log_set(_listen, None)
    flags = Path("/proc/cpuinfo").read_text().split()
    name = next(backend for backend, flag in _BACKENDS.items() if flag in flags)
    assert ggml.ggml_backend_load(str(folder / f"libggml-cpu-{name}.so").encode()), f"the backend {name} does not load"
    for function, result in (
        ("llama_model_default_params", _ModelParams), ("llama_context_default_params", _ContextParams),
        ("llama_model_quantize_default_params", _QuantizeParams), ("llama_model_load_from_file", c_void_p),
        ("llama_init_from_model", c_void_p), ("llama_get_model", c_void_p), ("llama_model_get_vocab", c_void_p),
        ("llama_vocab_n_tokens", c_int32), ("llama_batch_init", _Batch), ("llama_decode", c_int32),
        ("llama_get_logits_ith", ctypes.POINTER(c_float)), ("llama_get_memory", c_void_p),
        ("llama_model_quantize", c_uint32),
    ):  # fmt: skip
        getattr(llama, function).restype = result
    return llama, ggml, base


class Context:
    """A loaded model with an empty KV cache."""

    def __init__(self, handle: int, vocabulary: int) -> None:
        self._handle, self._vocabulary, self._length = c_void_p(handle), vocabulary, 0

    def step(self, tokens: Sequence[int], *, logits: bool = True) -> np.ndarray:
        """Feeds tokens behind those before: their logits [tokens, vocabulary] float32, or only the last one's."""
        llama = _libraries()[0]
        n = len(tokens)
        batch = llama.llama_batch_init(c_int32(n), c_int32(0), c_int32(1))
        batch.n_tokens = n
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, self._length + i, 1, 0
            batch.logits[i] = logits or i == n - 1
        code = llama.llama_decode(self._handle, batch)
        llama.llama_batch_free(batch)
        assert code == 0, f"llama_decode returned {code}"
        self._length += n
        rows = range(n) if logits else range(n - 1, n)
        read = (llama.llama_get_logits_ith(self._handle, c_int32(i)) for i in rows)
        return np.stack([np.ctypeslib.as_array(row, (self._vocabulary,)).copy() for row in read])

    def clear(self) -> None:
        """Forgets all tokens."""
        llama = _libraries()[0]
        llama.llama_memory_clear(c_void_p(llama.llama_get_memory(self._handle)), c_bool(True))
        self._length = 0


@contextmanager
def open_model(
    file: Path, *, context: int = 512, ubatch: int = 512, threads: int = 1, flash: Flash = "off", kv: Kv = "float32",
    check: bool = True,
) -> Iterator[Context]:  # fmt: skip
    """A GGUF file in llama.cpp, for steps of up to `context` tokens, which it computes `ubatch` at a time.
    `AssertionError` with its last messages where it rejects the file."""
    llama = _libraries()[0]
    _messages.clear()
    params = llama.llama_model_default_params()
    params.n_gpu_layers, params.check_tensors = 0, check
    model = llama.llama_model_load_from_file(str(file).encode(), params)
    assert model, "llama.cpp rejects the file: " + "".join(_messages[-4:])
    settings = llama.llama_context_default_params()
    settings.n_ctx = settings.n_batch = max(context, 64)
    settings.n_ubatch = ubatch
    settings.n_threads = settings.n_threads_batch = threads
    settings.flash_attn_type = _FLASH[flash]
    settings.type_k = settings.type_v = _KV[kv]
    handle = llama.llama_init_from_model(c_void_p(model), settings)
    assert handle, "llama.cpp makes no context: " + "".join(_messages[-4:])
    try:
        vocabulary = llama.llama_vocab_n_tokens(c_void_p(llama.llama_model_get_vocab(c_void_p(model))))
        yield Context(handle, vocabulary)
    finally:
        llama.llama_free(c_void_p(handle))
        llama.llama_model_free(c_void_p(model))


def logits(file: Path, tokens: Sequence[int]) -> np.ndarray:
    """float32 logits [tokens, vocabulary] of one sequence."""
    with open_model(file, context=len(tokens)) as model:
        return model.step(tokens)


def quantize(source: Path, target: Path, file_type: str, *, pure: bool = False, threads: int = 1) -> str:
    """Writes `target` with llama.cpp's own quantiser, and returns what it printed. `pure` takes one type for all."""
    llama = _libraries()[0]
    _messages.clear()
    params = llama.llama_model_quantize_default_params()
    params.nthread, params.ftype, params.pure = threads, FILE_TYPES[file_type], pure
    assert llama.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)) == 0, _messages
    return re.sub(r"\n+", "\n", "".join(_messages))


def quantize_rows(values: np.ndarray, type_number: int, row_bytes: int) -> np.ndarray:
    """float32 [rows, columns] by the quantiser of llama.cpp for one tensor: uint8 [rows, row_bytes]."""
    base = _libraries()[2]
    function = base.ggml_quantize_chunk
    function.restype = c_size_t
    function.argtypes = (c_int, c_void_p, c_void_p, *(ctypes.c_int64,) * 3, c_void_p)
    values = np.ascontiguousarray(values, dtype=np.float32)
    rows, columns = values.shape
    out = np.empty((rows, row_bytes), dtype=np.uint8)
    assert function(type_number, values.ctypes.data, out.ctypes.data, 0, rows, columns, None) == out.size
    return out
