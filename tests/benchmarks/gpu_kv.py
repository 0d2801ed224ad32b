"""What sharing, samples and swapping are worth on a GPU, in seconds of the same job.

    python tests/benchmarks/gpu_kv.py                      all three
    python tests/benchmarks/gpu_kv.py prefix samples swap  some of them

Random weights of the 0.6B model. Each line is a JSON object; `wall_s` leaves the start-up out.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import random
import sys
import time
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from batchgen.engine.bench import RequestList
from batchgen.engine.build import build_engine
from batchgen.engine.completer import SampleCompleter
from batchgen.engine.config import EngineOptions, SamplingOptions
from batchgen.engine.engine import Engine
from batchgen.engine.inputs import prefill_batch, to_device
from batchgen.engine.kv_memory import KVMemory
from batchgen.engine.model_runner import ModelRunner, StepResult, padding_prefill
from batchgen.engine.scheduler import Scheduler
from batchgen.engine.step_plan import BlockCopies, StepPlan
from batchgen.engine.swap import SwapSpace
from batchgen.models.config import parse_config
from batchgen.records import Prompt, RowKey
from tests.benchmarks.workloads import MODELS, build

MODEL = "qwen3-0.6b"
CONFIG = parse_config(MODELS[MODEL], source=MODEL)


def make_engine(max_model_len: int, **options: Any) -> Engine:
    settings = {"device": "cuda", "load_format": "dummy", "merge_duplicates": False} | options
    temperature = settings.pop("temperature", 0.0)
    return build_engine(
        CONFIG,
        None,
        EngineOptions(max_model_len=max_model_len, **settings),
        SamplingOptions(temperature=temperature),
        decode=None,
    )


def free_memory() -> None:
    """An engine's parts refer to each other in circles."""
    gc.collect()
    torch.cuda.empty_cache()


def make_prompts(drawn: list[tuple[list[int], int]], num_samples: int = 1) -> list[Prompt]:
    return [
        Prompt(
            key=RowKey(unit_id=0, index=index),
            token_ids=array("i", ids),
            max_tokens=length,
            seeds=tuple(1000 * index + i for i in range(num_samples)),
            ignore_eos=True,
        )
        for index, (ids, length) in enumerate(drawn)
    ]


def run(engine: Engine, prompts: list[Prompt]) -> tuple[float, dict[int, list[list[int]]]]:
    """Wall seconds, and each prompt's outputs."""
    outputs: dict[int, list[list[int]]] = {}
    start = time.perf_counter()
    for completions in engine.run(RequestList(prompts)):
        for completion in completions:
            outputs[completion.key.index] = [list(out.token_ids) for out in completion.outputs]
    return time.perf_counter() - start, outputs


def shared_requests(
    rng: random.Random, count: int, prefix: int, own: tuple[int, int], output: tuple[int, int]
) -> list[tuple[list[int], int]]:
    """Requests that begin with the same `prefix` tokens."""
    start = [rng.randrange(10, 150_000) for _ in range(prefix)]
    owns = [[rng.randrange(10, 150_000) for _ in range(rng.randint(*own))] for _ in range(count)]
    return [(start + ids, rng.randint(*output)) for ids in owns]


def bench_prefix() -> Iterator[dict[str, object]]:
    """`translate`, `label` and shorter rows over longer prefixes; `apart`: read once a group."""
    for apart in (True, False):
        saving = EngineOptions().min_prefix_saving_bytes if apart else None
        engine = make_engine(4096 + 512, min_prefix_saving_bytes=saving)
        run(engine, make_prompts(shared_requests(random.Random(0), 256, 256, (32, 64), (2, 32))))
        for prefix in (256, 1024, 4096):
            for name, count, own, output in (
                ("translate", 4096, (32, 128), (32, 128)),
                ("label", 4096, (64, 256), (1, 1)),
                ("short", 16384, (8, 32), (1, 1)),
            ):
                requests = shared_requests(random.Random(prefix), count, prefix, own, output)
                saved_before = engine.stats().prefill_blocks_saved
                wall_s, _ = run(engine, make_prompts(requests))
                yield {
                    "bench": "prefix",
                    "workload": name,
                    "prefix": prefix,
                    "rows": count,
                    "read_apart": apart,
                    "prefill_blocks_saved": engine.stats().prefill_blocks_saved - saved_before,
                    "wall_s": round(wall_s, 2),
                }
        del engine
        free_memory()


def bench_samples() -> Iterator[dict[str, object]]:
    """n samples of a prompt, beside n requests that compute and keep their prompts themselves."""
    rng = random.Random(1)
    seconds: dict[tuple[int, int, bool], float] = {}
    cases = [(prompt_len, n) for prompt_len in (128, 1024) for n in (2, 6)]
    for is_shared in (True, False):
        engine = make_engine(2048, temperature=0.8, enable_prefix_caching=is_shared)
        for prompt_len, n in cases:
            drawn = [([rng.randrange(10, 150_000) for _ in range(prompt_len)], 128)] * 512
            prompts = make_prompts(drawn, n) if is_shared else make_prompts(drawn * n)
            seconds[prompt_len, n, is_shared], _ = run(engine, prompts)
        del engine
        free_memory()
    for prompt_len, n in cases:
        together, apart = seconds[prompt_len, n, True], seconds[prompt_len, n, False]
        yield {
            "bench": "samples",
            "prompts": 512,
            "prompt_tokens": prompt_len,
            "output_tokens": 128,
            "n": n,
            "samples_s": round(together, 2),
            "requests_s": round(apart, 2),
            "speedup": round(apart / together, 2),
        }


def copy_rates(num_blocks: int = 4096, rounds: int = 5) -> dict[str, object]:
    """GB/s of swapping `num_blocks` blocks out, and in."""
    memory = KVMemory(
        CONFIG,
        num_blocks=num_blocks,
        block_size=16,
        dtype=torch.bfloat16,
        device=torch.device("cuda"),
    )
    space = SwapSpace(memory, num_blocks)
    device = np.random.default_rng(0).permutation(num_blocks).astype(np.int32)
    copies = BlockCopies(source=device, target=np.arange(num_blocks, dtype=np.int32))
    back = BlockCopies(source=copies.target, target=copies.source)
    rates = {}
    for name, arguments in (("out", (copies, None)), ("in", (None, back))):
        space.run(*arguments, is_awaited=True)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(rounds):
            space.run(*arguments, is_awaited=True)
        torch.cuda.synchronize()
        elapsed = time.perf_counter() - start
        rates[f"{name}_gb_per_s"] = round(rounds * memory.block_rows.nbytes / elapsed / 1e9, 1)
    return {"bench": "swap", "blocks": num_blocks, "mib": memory.block_rows.nbytes >> 20, **rates}


def without_forecast(engine: Engine) -> None:
    """Admits all that fits at the moment: what follows has to be swapped."""
    admission = engine._scheduler.admission
    admission.forecast_peaks = lambda *arguments: np.zeros(len(arguments[2]))  # type: ignore[method-assign]


def recompute_instead(engine: Engine) -> None:
    """Copies nothing: a sequence that comes back is prefilled anew, as vLLM does.

    For times only: the ids of the tokens are not at hand here, so zeros are prefilled.
    """
    assert isinstance(engine._scheduler, Scheduler)
    assert isinstance(engine._completer, SampleCompleter)
    room, runner = engine._scheduler._room, engine._completer._runner
    arrived: list[int] = []
    bring_in, launch = room._bring_in, runner.launch

    def noting_bring_in(row: int) -> None:
        arrived.append(row)
        bring_in(row)

    @torch.inference_mode()
    def prefilling_launch(plan: StepPlan) -> StepResult:
        if arrived and plan.table is not None:
            runner.state.update_table(plan.table)
            lengths = engine._scheduler.table.kv_len_R[arrived].astype(np.int32)
            prefill_again(runner, np.array(arrived, dtype=np.int32), lengths)
            arrived.clear()
        return launch(dataclasses.replace(plan, swap_out=None, swap_in=None))

    room._bring_in, runner.launch = noting_bring_in, prefilling_launch  # type: ignore[method-assign]


def prefill_again(runner: ModelRunner, rows: np.ndarray, lengths: np.ndarray) -> None:
    """Prefills `rows`, in steps of at most 16k tokens."""
    steps = np.cumsum(lengths) // 16384
    for step in np.unique(steps):
        chosen = steps == step
        like = padding_prefill(runner.state, 16, runner._memory.block_size)
        plan = dataclasses.replace(
            like,
            token_ids=np.zeros(int(lengths[chosen].sum()), dtype=np.int32),
            rows=rows[chosen],
            query_lens=lengths[chosen],
            seq_lens=lengths[chosen],
            is_last=np.zeros(int(chosen.sum()), dtype=np.bool_),
            slot_copies=None,
        )
        batch = prefill_batch(plan, runner.state, runner._memory.block_size)
        runner._ops.begin_step(batch)
        ids = to_device(plan.token_ids, runner.state.device)
        runner._decoder.forward(ids, batch, batch.last.tokens_B)


def bench_swap() -> Iterator[dict[str, object]]:
    """`mixed` with room for all of it; with a third; with a third and no forecast, swapping, and
    computing again what was dropped."""
    yield copy_rates()
    free_memory()
    prompts = make_prompts(build("mixed", CONFIG.vocab_size, seed=0, scale=1.0))
    num_seqs = 512
    longest = max(len(p.token_ids) + p.max_tokens for p in prompts)
    demand = sum(-(-(len(p.token_ids) + p.max_tokens) // 16) for p in prompts)
    demand = demand * num_seqs // len(prompts)
    first: dict[int, list[list[int]]] = {}
    rooms = {
        "all": 2 * demand,
        "third": demand // 3,
        "third, no forecast": demand // 3,
        "third, no forecast, recomputed": demand // 3,
    }
    for name, num_blocks in rooms.items():
        engine = make_engine(
            longest, num_gpu_blocks=num_blocks, max_num_seqs=num_seqs, cpu_swap_bytes=32 << 30
        )
        if "no forecast" in name:
            without_forecast(engine)
        if "recomputed" in name:
            recompute_instead(engine)
        wall_s, outputs = run(engine, prompts)
        first = first or outputs
        stats = engine.stats()
        yield {
            "bench": "swap",
            "room": name,
            "gpu_blocks": num_blocks,
            "wall_s": round(wall_s, 2),
            "swapped_out_blocks": stats.swapped_out_blocks,
            "swapped_in_blocks": stats.swapped_in_blocks,
            "stalled": stats.stalled_sequences,
            "computed_prompt_tokens": stats.prompt_tokens - stats.cached_prompt_tokens,
            "rows_with_other_tokens": sum(first[key] != outputs[key] for key in first),
        }
        del engine
        free_memory()


BENCHES = {"prefix": bench_prefix, "samples": bench_samples, "swap": bench_swap}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("benches", nargs="*", default=list(BENCHES), help="prefix, samples, swap")
    for name in parser.parse_args().benches:
        for row in BENCHES[name]():
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
