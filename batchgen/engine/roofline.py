"""Lower bounds of a workload's time on a device, from its arithmetic and its bytes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from batchgen.models.config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """What the device was seen to do: bytes/s of a large copy, FLOP/s of a large product."""

    bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Floors:
    """No engine beats the larger; one that overlaps nothing takes their sum."""

    compute_s: float
    memory_s: float


def measured_ceilings(device: torch.device) -> Ceilings:
    """Measured now, in bf16, at a size that fills the device: under a second."""
    size, copy_elements = (8192, 1 << 30) if device.type == "cuda" else (1024, 1 << 24)
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    b = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    source = torch.ones(copy_elements, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    # Freed at the return, so that an engine built next finds the memory.
    product_s = _median_seconds(lambda: torch.mm(a, b), device)
    copy_s = _median_seconds(lambda: target.copy_(source), device)
    return Ceilings(bytes_per_s=2 * source.nbytes / copy_s, flops_per_s=2 * size**3 / product_s)


def _median_seconds(call: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(8):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return sorted(times[2:])[len(times[2:]) // 2]


def floor_seconds(
    model: ModelConfig, requests: Sequence[tuple[Sequence[int], Sequence[int]]], ceilings: Ceilings
) -> Floors:
    """Of (prompt token ids, output lengths of its samples) pairs, in bf16.

    compute: 2 FLOP a parameter and token, plus attention; the prefix that all prompts share once,
    and each prompt once for all of its samples.
    memory: each decode step reads the weights and the shared prefix once for the whole batch, and
    a prompt once for its samples; each decoded token reads its own KV once.
    """
    layer = (
        model.hidden_size * model.head_dim * (model.num_heads + 2 * model.num_kv_heads)
        + model.num_heads * model.head_dim * model.hidden_size
        + 3 * model.hidden_size * model.intermediate_size
    )
    head = model.hidden_size * model.vocab_size
    kv_bytes = 2 * 2 * model.num_layers * model.num_kv_heads * model.head_dim
    attention = 4 * model.num_layers * model.num_heads * model.head_dim
    shared = _shared_prefix([prompt for prompt, _ in requests])
    steps = max(max(outputs) for _, outputs in requests)
    flops = float(2 * layer * model.num_layers * shared)
    moved = float((layer * model.num_layers + head) * 2 * steps + kv_bytes * shared * (steps - 1))
    for prompt, outputs in requests:
        own = len(prompt) - shared
        flops += 2 * layer * model.num_layers * own + attention * own * (shared + own / 2)
        moved += kv_bytes * (max(outputs) - 1) * own
        for output in outputs:
            flops += 2 * layer * model.num_layers * (output - 1) + 2 * head * output
            flops += attention * (output - 1) * (len(prompt) + output / 2)
            moved += kv_bytes * (output - 1) * output / 2
    return Floors(compute_s=flops / ceilings.flops_per_s, memory_s=moved / ceilings.bytes_per_s)


def _shared_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Length of the longest prefix that all prompts share; 0 for a single one."""
    if len(prompts) < 2:
        return 0
    low, high = min(map(tuple, prompts)), max(map(tuple, prompts))
    pairs = zip(low, high, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(low), len(high)))
