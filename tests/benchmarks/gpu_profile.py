"""Where a GPU's time goes, kernel by kernel, and how much of it the GPU waits for the host.

    python tests/benchmarks/gpu_profile.py qwen3-0.6b
    python tests/benchmarks/gpu_profile.py llama-8b --shared 512 --prompt 64 256 --output 1 1

Random weights, random requests of these lengths. `idle` is the share of the time between the first
kernel and the last in which none ran; `steady` looks at the middle half of the kernels alone.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[2]))

from batchgen.engine.bench import RequestList
from batchgen.engine.build import build_engine
from batchgen.engine.config import EngineOptions, SamplingOptions
from batchgen.models.config import parse_config
from batchgen.records import Prompt, RowKey
from tests.benchmarks.workloads import MODELS

KINDS = ("kernel", "gpu_memcpy", "gpu_memset")


def random_prompts(arguments: argparse.Namespace, vocab_size: int) -> list[Prompt]:
    rng = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(10, vocab_size - 10) for _ in range(count)]

    shared = tokens(arguments.shared)
    return [
        Prompt(
            key=RowKey(unit_id=0, index=index),
            token_ids=shared + tokens(rng.randint(*arguments.prompt)),
            max_tokens=rng.randint(*arguments.output),
            seeds=(index,),
            ignore_eos=True,
        )
        for index in range(arguments.prompts)
    ]


def idle_share(events: list[dict[str, Any]]) -> float:
    """Of the time from the first event's start to the last one's end."""
    end, idle = events[0]["ts"], 0.0
    for event in events:
        idle += max(0.0, event["ts"] - end)
        end = max(end, event["ts"] + event["dur"])
    return idle / (end - events[0]["ts"])


def trace(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    config = MODELS[arguments.model]
    prompts = random_prompts(arguments, config["vocab_size"])
    engine = build_engine(
        parse_config(config, source=arguments.model),
        None,
        EngineOptions(
            device="cuda",
            load_format="dummy",
            max_model_len=arguments.shared + arguments.prompt[1] + arguments.output[1],
        ),
        SamplingOptions(),
        decode=None,
    )
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in engine.run(RequestList(prompts)):
            pass
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return sorted((e for e in events if e.get("cat") in KINDS), key=lambda e: float(e["ts"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=list(MODELS))
    parser.add_argument("--prompts", type=int, default=1024)
    parser.add_argument("--shared", type=int, default=0)
    parser.add_argument("--prompt", type=int, nargs=2, default=(64, 64))
    parser.add_argument("--output", type=int, nargs=2, default=(256, 256))
    parser.add_argument("--top", type=int, default=16)
    arguments = parser.parse_args()
    events = trace(arguments)
    quarter = len(events) // 4
    steady = idle_share(events[quarter:-quarter])
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {vars(arguments)}")
    print(f"idle {idle_share(events):.2%}, steady {steady:.2%}")
    times: dict[str, list[float]] = collections.defaultdict(list)
    for event in events:
        times[event["name"]].append(event["dur"])
    total = sum(map(sum, times.values()))
    print("| share | ms | calls | us a call | kernel |\n|---|---|---|---|---|")
    for name, us in sorted(times.items(), key=lambda item: -sum(item[1]))[: arguments.top]:
        row = (
            f"{sum(us) / total:.1%}",
            f"{sum(us) / 1e3:.1f}",
            len(us),
            f"{sum(us) / len(us):.1f}",
        )
        print("|", " | ".join(map(str, row)), "|", name[:80], "|")


if __name__ == "__main__":
    main()
