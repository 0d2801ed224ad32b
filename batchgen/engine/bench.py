"""`batchgen bench`: times the engine alone on requests of token ids."""

from __future__ import annotations

import dataclasses
import json
import time
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from batchgen.engine.build import build_engine, resolve_device
from batchgen.engine.config import EngineOptions, SamplingOptions
from batchgen.engine.roofline import floor_seconds, measured_ceilings
from batchgen.errors import UsageError
from batchgen.models.config import ModelConfig
from batchgen.models.registry import ModelFiles
from batchgen.records import Prompt, PromptSource, RowKey, row_seed


class RequestList(PromptSource):
    """All prompts at once, as an offline run has them."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self._prompts = list(prompts)

    def take(self, max_prompts: int, *, wait: bool) -> list[Prompt]:
        taken, self._prompts = self._prompts[:max_prompts], self._prompts[max_prompts:]
        return taken


def read_requests(path: Path) -> list[Prompt]:
    """Lines of {"prompt_token_ids": [...], "max_tokens": N, "ignore_eos": bool, "n": samples}."""
    prompts = []
    with path.open(encoding="utf-8") as lines:
        for index, line in enumerate(lines):
            prompts.append(_parse_request(path, index, line))
    if not prompts:
        raise UsageError(f"{path}: no requests")
    return prompts


def _parse_request(path: Path, index: int, line: str) -> Prompt:
    where = f"{path}:{index + 1}"
    try:
        request = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"{where}: not JSON: {error}") from error
    known = {"prompt_token_ids", "max_tokens", "ignore_eos", "n"}
    if not isinstance(request, dict) or not request.keys() <= known:
        raise UsageError(f"{where}: expected an object with the keys {sorted(known)}")
    ids, max_tokens = request.get("prompt_token_ids"), request.get("max_tokens")
    if not ids or not isinstance(ids, list) or not all(isinstance(i, int) for i in ids):
        raise UsageError(f"{where}: prompt_token_ids must be a list of at least one token id")
    if not all(0 <= i < 1 << 31 for i in ids):
        raise UsageError(f"{where}: a token id is negative or over 2^31")
    if not isinstance(max_tokens, int) or max_tokens < 1:
        raise UsageError(f"{where}: max_tokens must be at least 1, got {max_tokens!r}")
    num_samples = request.get("n", 1)
    if not isinstance(num_samples, int) or num_samples < 1:
        raise UsageError(f"{where}: n must be at least 1, got {num_samples!r}")
    return Prompt(
        key=RowKey(unit_id=0, index=index),
        token_ids=array("i", ids),
        max_tokens=max_tokens,
        seeds=tuple(row_seed(0, f"request:{index}", i) for i in range(num_samples)),
        ignore_eos=bool(request.get("ignore_eos", False)),
    )


def _sampling_for(prompts: Sequence[Prompt], sampling: SamplingOptions) -> SamplingOptions:
    """With the limits of these requests. Raises UsageError for beams of which only some end early:
    they have the same ends in all requests."""
    beams = sampling.beams
    if beams is not None and prompts[0].ignore_eos:
        beams = dataclasses.replace(beams, end_token_ids=sampling.stop_token_ids)
    if beams is not None and len({prompt.ignore_eos for prompt in prompts}) > 1:
        raise UsageError("with beams, ignore_eos must be the same in all requests")
    return dataclasses.replace(
        sampling,
        n=max(len(prompt.seeds) for prompt in prompts),
        max_tokens=max(prompt.max_tokens for prompt in prompts),
        beams=beams,
    )


def run_bench(
    requests: Path,
    model: ModelConfig,
    files: ModelFiles | None,
    options: EngineOptions,
    sampling: SamplingOptions,
) -> Mapping[str, object]:
    """Start-up and wall time of the engine on these requests, and what they amount to."""
    prompts = read_requests(requests)
    longest = max(len(prompt.token_ids) + prompt.max_tokens for prompt in prompts)
    limit = options.max_model_len or model.max_position_embeddings
    if longest > limit:
        raise UsageError(
            f"{requests}: a request of {longest} tokens, prompt and output together, exceeds "
            f"the model's {limit}"
        )
    options = dataclasses.replace(
        options,
        max_model_len=options.max_model_len or longest,
        merge_duplicates=False,  # every request is worked for
    )
    out_of_vocabulary = next(
        (i for p in prompts for i in p.token_ids if not 0 <= i < model.vocab_size), None
    )
    if out_of_vocabulary is not None:
        raise UsageError(f"{requests}: token id {out_of_vocabulary} is not in the vocabulary")
    device = resolve_device(options.device)
    ceilings = measured_ceilings(device)  # before the engine takes the memory
    start = time.perf_counter()
    sampling = _sampling_for(prompts, sampling)
    engine = build_engine(model, files, options, sampling, decode=None)
    ready = time.perf_counter()
    generated: dict[int, list[int]] = {}  # lengths of a prompt's samples
    for completions in engine.run(RequestList(prompts)):
        for completion in completions:
            generated[completion.key.index] = [len(out.token_ids) for out in completion.outputs]
    done = time.perf_counter()
    assert len(generated) == len(prompts), "requests are missing"
    stats = engine.stats()
    wall_s = done - ready
    output_tokens = sum(sum(lengths) for lengths in generated.values())
    if sampling.beams is not None:  # all of a request's beams are worked for
        width = sampling.beams.width
        generated = {index: [max(lengths)] * width for index, lengths in generated.items()}
    floors = floor_seconds(
        model, [(p.token_ids, generated[p.key.index]) for p in prompts], ceilings
    )
    return {
        "requests": len(prompts),
        "samples": sum(len(prompt.seeds) for prompt in prompts),
        "prompt_tokens": sum(len(prompt.token_ids) for prompt in prompts),
        "output_tokens": output_tokens,
        "startup_s": round(ready - start, 3),
        "wall_s": round(wall_s, 3),
        "output_tokens_per_s": round(output_tokens / wall_s, 1),
        "requests_per_s": round(len(prompts) / wall_s, 2),
        "cached_prompt_tokens": stats.cached_prompt_tokens,
        "prefill_steps": stats.prefill_steps,
        "decode_steps": stats.decode_steps,
        "kv_blocks": stats.blocks_total,
        "kv_waste": round(stats.kv_waste, 4),
        "kv_saved": round(stats.kv_saved, 4),
        "peak_saved_blocks": stats.peak_saved_blocks,
        "copied_blocks": stats.copied_blocks,
        "prefix_blocks_saved": stats.prefix_blocks_saved,
        "prefill_blocks_saved": stats.prefill_blocks_saved,
        "swapped_out_blocks": stats.swapped_out_blocks,
        "swapped_in_blocks": stats.swapped_in_blocks,
        "stalled_sequences": stats.stalled_sequences,
        "floor_compute_s": round(floors.compute_s, 3),
        "floor_memory_s": round(floors.memory_s, 3),
        "roofline_share": round(max(floors.compute_s, floors.memory_s) / wall_s, 4),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }
