"""How full the KV is kept, and how long the tail is: the scheduler on a simulated device.

    python tests/benchmarks/kv_forecast.py                 mixed, lengths unknown to the scheduler
    python tests/benchmarks/kv_forecast.py --known --rows 4096 --gpu-blocks 20000

No GPU: the scheduler never sees one. Rows of `mixed` end at their drawn length, of which the
scheduler knows nothing (as with stop tokens) but that max_tokens is 1,024. A step's time is that of
an 8B model on an H200: the weights or the products, whichever is longer, and the KV that is read.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from batchgen.engine.scheduler import Scheduler
from batchgen.engine.sequences import SchedulerConfig
from batchgen.engine.step_plan import StepPlan
from batchgen.records import Prompt, RowKey
from tests.benchmarks.workloads import build

WEIGHTS_S = 16e9 / 4.2e12  # read once a step
TOKEN_S = 2 * 8e9 / 665e12  # products of a token
KV_TOKEN_S = 131072 / 4.2e12  # read of a token's KV
PCIE_S = 131072 / 50e9  # copy of a token's KV, one way, beside the work
MAX_TOKENS = 1024


@dataclass
class Totals:
    """What a run comes to."""

    seconds: float = 0.0
    occupancy: float = 0.0  # of the KV, times seconds, while rows wait
    waiting_s: float = 0.0
    steady_occupancy: float = 0.0  # the same, once the KV has been full for the first time
    steady_s: float = 0.0
    peak: float = 0.0


class Device:
    """Knows how long each row is to be; answers a plan as a GPU would."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths
        self.made = np.zeros(len(lengths), dtype=np.int64)

    def launch(self, scheduler: Scheduler, plan: StepPlan) -> tuple[np.ndarray, float]:
        """Which of plan.rows have ended, and the step's seconds."""
        index = np.array([scheduler.key_of(row).index for row in plan.rows.tolist()], dtype=int)
        steps = 1 if plan.decode is None else plan.decode.num_steps
        wanted = np.array(self.lengths)[index]
        self.made[index] = np.minimum(self.made[index] + steps, wanted)
        if plan.prefill is not None:
            seconds = max(WEIGHTS_S, len(plan.prefill.token_ids) * TOKEN_S)
        else:
            tokens = float(scheduler.table.kv_len_R[plan.rows].sum())
            step = max(WEIGHTS_S, len(plan.rows) * TOKEN_S) + tokens * KV_TOKEN_S
            seconds = steps * step
        return self.made[index] >= wanted, seconds


def simulate(
    scheduler: Scheduler, prompts: list[Prompt], lengths: list[int]
) -> tuple[Totals, list[float]]:
    """Totals, and when each row ended, in order; results are read one step late."""
    device, totals = Device(lengths), Totals()
    ends: list[float] = []
    scheduler.add(prompts)
    in_flight: deque[tuple[StepPlan, np.ndarray, float]] = deque()
    while True:
        plan = scheduler.schedule(in_flight=bool(in_flight))
        if plan is not None:
            has_ended, seconds = device.launch(scheduler, plan)
            share = scheduler.kv.gpu.num_used / scheduler.config.gpu_blocks
            totals.peak = max(totals.peak, share)
            if scheduler.admission.waiting:
                totals.waiting_s += seconds
                totals.occupancy += seconds * share
                if totals.peak > 0.95:
                    totals.steady_s += seconds
                    totals.steady_occupancy += seconds * share
            totals.seconds += seconds
            in_flight.append((plan, has_ended, totals.seconds))
        elif not in_flight:
            return totals, ends
        if plan is None or len(in_flight) > 1:
            done, has_ended, at = in_flight.popleft()
            current = scheduler.table.sequence_id_R[done.rows] == done.sequence_ids
            for row in done.rows[current & has_ended].tolist():
                scheduler.finish(row, lengths[scheduler.key_of(row).index])
                ends.append(at)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--known", action="store_true", help="lengths are known (ignore_eos)")
    parser.add_argument("--gpu-blocks", type=int, default=50000, help="of 16 tokens")
    parser.add_argument("--max-num-seqs", type=int, default=2048)
    arguments = parser.parse_args()
    drawn = build("mixed", 128256, seed=arguments.seed, scale=arguments.rows / 1024)
    lengths = [length for _, length in drawn]
    prompts = [
        Prompt(
            key=RowKey(unit_id=0, index=index),
            token_ids=ids,
            max_tokens=length if arguments.known else MAX_TOKENS,
            seeds=(index,),
            ignore_eos=arguments.known,
        )
        for index, (ids, length) in enumerate(drawn)
    ]
    scheduler = Scheduler(
        SchedulerConfig(
            max_num_seqs=arguments.max_num_seqs,
            max_num_batched_tokens=16384,
            max_model_len=2048,
            decode_window=16,
            block_size=16,
            gpu_blocks=arguments.gpu_blocks,
            cpu_blocks=arguments.gpu_blocks // 4,
            enable_prefix_caching=True,
            merge_duplicates=False,
            min_prefix_saving=None,
            prefill_tile_tokens=64,
        )
    )
    totals, ends = simulate(scheduler, prompts, lengths)
    counters = scheduler.counters
    tokens = sum(len(prompt.token_ids) for prompt in prompts) + sum(lengths)
    tail = ends[-1] - ends[int(0.95 * len(ends)) - 1]
    print(
        json.dumps(
            {
                "rows": len(prompts),
                "lengths": "known" if arguments.known else "unknown",
                "simulated_s": round(totals.seconds, 1),
                "mean_occupancy_while_rows_wait": round(totals.occupancy / totals.waiting_s, 4)
                if totals.waiting_s
                else None,
                "mean_occupancy_once_full": round(totals.steady_occupancy / totals.steady_s, 4)
                if totals.steady_s
                else None,
                "peak_occupancy": round(totals.peak, 4),
                "swapped_tokens_share": round(counters.swapped_out_blocks * 16 / tokens, 4),
                "stalled": counters.stalled,
                "kv_waste": round(counters.waste_sum / max(counters.waste_samples, 1), 4),
                "last_5_percent_of_rows_share_of_time": round(tail / totals.seconds, 4),
            }
        )
    )


if __name__ == "__main__":
    main()
