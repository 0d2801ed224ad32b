"""Fixed offline workloads of token ids, the same draws that vLLM's times were taken on.

Each is a list of (prompt token ids, output length). Outputs have a fixed length (the end of
sequence is ignored), so random weights serve. `seed` 0 is the public draw.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """How many requests, what they share, and the ranges that lengths are drawn from."""

    count: int
    shared_prefix: int
    prompt_range: tuple[int, int]
    output_range: tuple[int, int]


WORKLOADS = {
    "mixed": Workload(
        count=1024, shared_prefix=0, prompt_range=(100, 1024), output_range=(100, 1024)
    ),
    "translate": Workload(
        count=4096, shared_prefix=256, prompt_range=(32, 128), output_range=(32, 128)
    ),
    "summarize": Workload(
        count=1024, shared_prefix=64, prompt_range=(1024, 4096), output_range=(64, 192)
    ),
    "label": Workload(count=8192, shared_prefix=512, prompt_range=(64, 256), output_range=(1, 1)),
    "reason": Workload(
        count=1024, shared_prefix=0, prompt_range=(128, 128), output_range=(1024, 1024)
    ),
}


def build(
    name: str, vocab_size: int, *, seed: int = 0, scale: float = 1.0
) -> list[tuple[list[int], int]]:
    """The requests of a workload; `scale` takes a share of them."""
    workload = WORKLOADS[name]
    rng = random.Random(f"{name}-{seed}")

    def draw(count: int) -> list[int]:
        return [rng.randrange(10, vocab_size - 10) for _ in range(count)]

    prefix = draw(workload.shared_prefix)
    requests = []
    for _ in range(max(1, int(workload.count * scale))):
        length = rng.randint(*workload.prompt_range)
        requests.append((prefix + draw(length), rng.randint(*workload.output_range)))
    return requests


QWEN3_06B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 151936,
}
LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
MODELS = {"qwen3-0.6b": QWEN3_06B, "llama-8b": LLAMA_8B}
