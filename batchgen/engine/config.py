"""What an engine runs with, once every `auto` has a value. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Quantization = Literal["fp8"] | None
KVCacheDtype = Literal["auto", "fp8"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How to run. `None` means: chosen by the engine for its device."""

    device: str = "auto"  # auto | cpu | cuda | cuda:N
    gpu_memory_utilization: float = 0.92
    cpu_swap_bytes: int | None = None
    block_size: int = 16
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    num_gpu_blocks: int | None = None
    enable_prefix_caching: bool = True
    merge_duplicates: bool = True  # compute equal prompts once, at temperature 0
    # KV of a layer whose reading a step on a GPU must save, for shared prefixes to be read once a
    # group, by two more kernels (measured on an H200 for decode steps); None: never
    min_prefix_saving_bytes: int | None = 256 << 20
    max_model_len: int | None = None
    decode_window: int | None = None
    load_format: Literal["auto", "dummy"] = "auto"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    quantization: Quantization = None  # of the layers' matrices and what feeds them
    kv_cache_dtype: KVCacheDtype = "auto"  # auto: the model's
    use_cuda_graphs: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamOptions:
    """Beam search, the same for every row of a job; transformers' meaning of each field."""

    width: int  # at least 2
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    end_token_ids: Sequence[int] = ()  # distinct; a hypothesis ends with any of these

    @property
    def num_candidates(self) -> int:
        """Tokens looked at in a step: so many that the width is left when all ends are taken."""
        return max(2, 1 + len(self.end_token_ids)) * self.width


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """How tokens are chosen, the same for every row of a job."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    eos_token_ids: Sequence[int] = ()  # end a row unless it ignores them
    stop_token_ids: Sequence[int] = ()  # end a row always
    stop: Sequence[str] = ()
    n: int = 1  # samples of a prompt, at most
    max_tokens: int | None = None  # of the longest output, where it is known
    beams: BeamOptions | None = None  # in the place of sampling: only n and max_tokens hold then

    @property
    def has_penalties(self) -> bool:
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0, 0, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceDefaults:
    """What `auto` means on a kind of device."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_batched_tokens_small: int  # for a hidden size up to SMALL_HIDDEN_SIZE
    decode_window: int
    lookahead: int  # launches whose results the host has not read yet
    prefill_lookahead: int  # the same while all of them are prefill steps

    def batched_tokens(self, hidden_size: int) -> int:
        if hidden_size <= SMALL_HIDDEN_SIZE:
            return self.max_num_batched_tokens_small
        return self.max_num_batched_tokens


SMALL_HIDDEN_SIZE = 2048

# On a CPU every step is read at once: there is nothing to overlap, and a row that has ended would
# cost its share of each further step of a window. On a GPU a step of a small model must be large,
# or it is over before the host has planned and launched the next one.
DEFAULTS = {
    "cpu": DeviceDefaults(
        max_num_seqs=256,
        max_num_batched_tokens=2048,
        max_num_batched_tokens_small=2048,
        decode_window=1,
        lookahead=0,
        prefill_lookahead=0,
    ),
    "cuda": DeviceDefaults(
        max_num_seqs=2048,
        max_num_batched_tokens=16384,
        max_num_batched_tokens_small=32768,
        decode_window=16,
        lookahead=1,
        prefill_lookahead=4,
    ),
}
