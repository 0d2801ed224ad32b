"""One GPU: `batchgen bench` on every workload, beside vLLM's times on an H200.

    python tests/benchmarks/gpu_rows.py                     all nine rows
    python tests/benchmarks/gpu_rows.py qwen3-0.6b/mixed    some of them
    python tests/benchmarks/gpu_rows.py --seed 1 --scale 0.25 -o engine.max_num_seqs=2048

Random weights in bf16; the engine's start-up is not in the wall time, as for vLLM.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks.workloads import MODELS, build

# vLLM 0.26.0 on one H200, seed 0: the best of its default and tuned settings, seconds.
VLLM_S = {
    "qwen3-0.6b/mixed": 20.5,
    "qwen3-0.6b/translate": 15.9,
    "qwen3-0.6b/label": 5.3,
    "qwen3-0.6b/reason": 30.4,
    "llama-8b/mixed": 45.2,
    "llama-8b/translate": 21.3,
    "llama-8b/label": 33.0,
    "llama-8b/reason": 59.8,
    "llama-8b/summarize": 80.7,
}


def run_row(name: str, seed: int, scale: float, overrides: list[str]) -> dict[str, Any]:
    model, workload = name.split("/")
    with tempfile.TemporaryDirectory() as folder:
        config, requests = Path(folder) / "config.json", Path(folder) / "requests.jsonl"
        config.write_text(json.dumps(MODELS[model]))
        with requests.open("w") as file:
            for ids, length in build(workload, MODELS[model]["vocab_size"], seed=seed, scale=scale):
                line = {"prompt_token_ids": ids, "max_tokens": length, "ignore_eos": True}
                file.write(json.dumps(line) + "\n")
        command = [sys.executable, "-m", "batchgen", "bench", str(requests)]
        command += ["--model-config", str(config), "--load-format", "dummy"]
        command += [argument for override in overrides for argument in ("-o", override)]
        made = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    result: dict[str, Any] = json.loads(made.stdout)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", default=list(VLLM_S), help="model/workload")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("-o", dest="overrides", action="append", default=[])
    arguments = parser.parse_args()
    print("| row | wall s | vLLM s | floor compute s | floor memory s | tokens/s | start-up s |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for name in arguments.rows:
        row = run_row(name, arguments.seed, arguments.scale, arguments.overrides)
        print(
            f"| {name} | {row['wall_s']:.1f} | {VLLM_S.get(name, '')} | "
            f"{row['floor_compute_s']:.1f} | {row['floor_memory_s']:.1f} | "
            f"{row['output_tokens_per_s']:.0f} | {row['startup_s']:.1f} |",
            flush=True,
        )
        print(json.dumps({"row": name, **row}), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
