"""The CPU backend's bf16 operations in C (`native.c`), compiled once for this machine.

As Triton does for its launchers, the compiler of the machine builds a shared library the first
time, into the cache folder. It is linked with the OpenMP runtime that torch has loaded, so that
both share one pool of threads: two pools would spin against each other. Without a compiler there
is no library, and the CPU backend runs on torch ops alone.

Legend: see `reference.py`, where each operation is defined.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

_SOURCE = Path(__file__).with_name("native.c")
_FLAGS = ("-O3", "-march=native", "-ffast-math", "-fPIC", "-fopenmp", "-std=gnu11")
_MAX_GROUP, _MAX_HEAD, _LANES = 16, 256, 16

log = logging.getLogger(__name__)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled operations, or None where there is no C compiler (said once, as a warning)."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    openmp = _loaded_openmp()
    if compiler is None or openmp is None:
        log.warning("no C compiler or OpenMP runtime here: the CPU runs on torch ops, slower")
        return None
    key = hashlib.sha256(_SOURCE.read_bytes() + f"{compiler}{openmp}{_cpu()}".encode())
    target = _cache_folder() / f"native-{key.hexdigest()[:24]}.so"
    if not target.exists():
        try:
            _compile(compiler, openmp, target)
        except (OSError, subprocess.CalledProcessError) as error:
            detail = getattr(error, "stderr", b"") or b""
            log.warning("the CPU runs on torch ops, slower: %s %s", error, detail.decode()[-500:])
            return None
    try:
        return ctypes.CDLL(str(target))
    except OSError as error:  # such as a cache on a file system that forbids programs
        log.warning("the CPU runs on torch ops, slower: %s", error)
        return None


def supports(dtype: torch.dtype, *, num_heads: int, num_kv_heads: int, head_size: int) -> bool:
    """Whether these operations cover a model of this shape."""
    group = num_heads // num_kv_heads
    fits = group <= _MAX_GROUP and head_size <= _MAX_HEAD and head_size % _LANES == 0
    return dtype == torch.bfloat16 and fits


def rms_norm(
    x_TD: Tensor, weight_D: Tensor, eps: float, residual_TD: Tensor | None = None
) -> Tensor:
    """reference.rms_norm, or reference.add_rms_norm with a residual."""
    x_TD = x_TD.contiguous()
    out_TD = torch.empty_like(x_TD)
    residual = residual_TD.data_ptr() if residual_TD is not None else None
    _call(
        "rms_norm",
        *_pointers(x_TD),
        ctypes.c_void_p(residual),
        *_pointers(weight_D, out_TD),
        *_sizes(*x_TD.shape),
        ctypes.c_float(eps),
    )
    return out_TD


def silu_mul(gate_up_T2I: Tensor) -> Tensor:
    """reference.silu_mul."""
    rows, columns = gate_up_T2I.shape
    out_TI = gate_up_T2I.new_empty(rows, columns // 2)
    _call("silu_mul", *_pointers(gate_up_T2I, out_TI), *_sizes(rows, columns // 2))
    return out_TI


def kv_write(
    qkv_TC: Tensor,
    cos_sin_MH: Tensor,
    positions_T: Tensor,
    slot_mapping_T: Tensor,
    k_cache_PKSH: Tensor,
    v_cache_PKSH: Tensor,
    *,
    num_q_heads: int,
    q_norm_H: Tensor | None,
    k_norm_H: Tensor | None,
    eps: float,
) -> Tensor:
    """reference.kv_write. positions int32, slots int64."""
    num_tokens = len(qkv_TC)
    _, num_kv_heads, block_size, head_size = k_cache_PKSH.shape
    q_TNH = qkv_TC.new_empty(num_tokens, num_q_heads, head_size)
    norms = [norm.data_ptr() if norm is not None else None for norm in (q_norm_H, k_norm_H)]
    _call(
        "kv_write",
        *_pointers(qkv_TC, cos_sin_MH, positions_T, slot_mapping_T),
        ctypes.c_void_p(k_cache_PKSH.data_ptr()),
        ctypes.c_void_p(v_cache_PKSH.data_ptr()),
        *_pointers(q_TNH),
        *(ctypes.c_void_p(norm) for norm in norms),
        *_sizes(num_tokens, num_q_heads, num_kv_heads, head_size, block_size),
        *_sizes(k_cache_PKSH.stride(0)),
        ctypes.c_float(eps),
    )
    return q_TNH


def paged_decode(
    q_BNH: Tensor,
    k_cache_PKSH: Tensor,
    v_cache_PKSH: Tensor,
    block_table_RX: Tensor,
    slot_ids_B: Tensor,
    seq_lens_B: Tensor,
    *,
    scale: float,
) -> Tensor:
    """reference.paged_decode, without the lse. Index tensors int32."""
    batch, num_q_heads, head_size = q_BNH.shape
    _, num_kv_heads, block_size, _ = k_cache_PKSH.shape
    out_BNH = torch.empty_like(q_BNH)
    _call(
        "paged_decode",
        *_pointers(q_BNH),
        ctypes.c_void_p(k_cache_PKSH.data_ptr()),
        ctypes.c_void_p(v_cache_PKSH.data_ptr()),
        *_pointers(block_table_RX, slot_ids_B, seq_lens_B, out_BNH),
        *_sizes(batch, num_q_heads, num_kv_heads, head_size, block_size),
        *_sizes(k_cache_PKSH.stride(0), block_table_RX.stride(0)),
        ctypes.c_float(scale),
    )
    return out_BNH


def argmax(logits_BV: Tensor) -> Tensor:
    """int64 tokens_B: the index of the largest logit, the lowest of a tie."""
    tokens_B = torch.empty(len(logits_BV), dtype=torch.int64)
    _call("argmax", *_pointers(logits_BV, tokens_B), *_sizes(*logits_BV.shape))
    return tokens_B


def _call(name: str, *arguments: ctypes.c_void_p | ctypes.c_int64 | ctypes.c_float) -> None:
    loaded = library()
    assert loaded is not None
    getattr(loaded, f"batchgen_{name}")(*arguments)


def _pointers(*tensors: Tensor) -> list[ctypes.c_void_p]:
    for tensor in tensors:
        assert tensor.is_contiguous(), "a tensor is not contiguous"
    return [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]


def _sizes(*sizes: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(size) for size in sizes]


def _loaded_openmp() -> str | None:
    """The path of the OpenMP runtime that this process has loaded (Linux)."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    except OSError:
        return None
    paths = (line.split()[-1] for line in maps.splitlines() if "libgomp" in line)
    return next(paths, None)


def _cpu() -> str:
    """What -march=native depends on."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    lines = [line for line in info.splitlines() if line.startswith(("model name", "flags"))]
    return "".join(lines[:2])


def _cache_folder() -> Path:
    base = os.environ.get("BATCHGEN_CACHE")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "batchgen"


def _compile(compiler: str, openmp: str, target: Path) -> None:
    """Compiles into a temporary folder and moves the library into place at once."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        built, shared = Path(folder) / "native.o", Path(folder) / "native.so"
        for command in (
            [compiler, *_FLAGS, "-c", str(_SOURCE), "-o", str(built)],
            [compiler, "-shared", str(built), "-o", str(shared), openmp, "-lm"],
        ):
            subprocess.run(command, check=True, capture_output=True)
        shared.replace(target)
