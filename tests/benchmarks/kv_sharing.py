"""How much KV parallel samples save by sharing their prompt: the scheduler on a simulated device.

    python tests/benchmarks/kv_sharing.py

Prompts and outputs of the mean lengths that PagedAttention was measured with (Kwon et al., 2023:
Alpaca 19 and 58 tokens, ShareGPT 161 and 338), exponentially distributed; the samples of a prompt
are equally long. Blocks of 16 tokens. Saved: of the blocks that the samples would hold without
sharing, summed over decode windows.
"""

from __future__ import annotations

import json
import sys
from collections import deque
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from batchgen.engine.scheduler import Scheduler
from batchgen.engine.sequences import SchedulerConfig
from batchgen.engine.step_plan import StepPlan
from batchgen.records import Prompt, RowKey

LENGTHS = {"alpaca": (19, 58), "sharegpt": (161, 338)}
NUM_PROMPTS = 512
MAX_TOKENS = 1024


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


def main() -> None:
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


if __name__ == "__main__":
    main()
