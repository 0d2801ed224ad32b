"""What a job file says to the engine, in the engine's own options. No torch."""

from __future__ import annotations

from typing import Literal

from batchgen.engine.config import BeamOptions, EngineOptions, SamplingOptions
from batchgen.job.spec import EngineSpec, ModelSpec, SamplingSpec
from batchgen.models.config import ModelConfig


def engine_options(engine: EngineSpec, model: ModelSpec) -> EngineOptions:
    """The engine's options of a job; `auto` becomes None, for the engine to choose."""
    swap_gib = engine.cpu_swap_gib
    return EngineOptions(
        device=engine.device,
        gpu_memory_utilization=engine.gpu_memory_utilization,
        cpu_swap_bytes=None if swap_gib == "auto" else int(swap_gib * 2**30),
        block_size=engine.block_size,
        max_num_seqs=_unless_auto(engine.max_num_seqs),
        max_num_batched_tokens=_unless_auto(engine.max_num_batched_tokens),
        num_gpu_blocks=_unless_auto(engine.num_gpu_blocks),
        enable_prefix_caching=engine.enable_prefix_caching,
        max_model_len=model.max_model_len,
        dtype=model.dtype,
        quantization="fp8" if model.quantization == "fp8" else None,
        kv_cache_dtype="fp8" if engine.kv_cache_dtype == "fp8" else "auto",
    )


def sampling_options(sampling: SamplingSpec, config: ModelConfig) -> SamplingOptions:
    """How the engine chooses tokens, with the model's own ends of output."""
    return SamplingOptions(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        min_tokens=sampling.min_tokens,
        eos_token_ids=config.eos_token_ids,
        stop_token_ids=sampling.stop_token_ids,
        stop=sampling.stop,
        n=sampling.n,
        max_tokens=sampling.max_tokens,
        beams=_beam_options(sampling, config),
    )


def _beam_options(sampling: SamplingSpec, config: ModelConfig) -> BeamOptions | None:
    if sampling.beam_width is None:
        return None
    eos_token_ids = () if sampling.ignore_eos else config.eos_token_ids
    return BeamOptions(
        width=sampling.beam_width,
        length_penalty=sampling.length_penalty,
        early_stopping=sampling.early_stopping,
        end_token_ids=sorted({*eos_token_ids, *sampling.stop_token_ids}),
    )


def _unless_auto(value: int | Literal["auto"]) -> int | None:
    return None if value == "auto" else value
