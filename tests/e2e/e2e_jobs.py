"""Jobs and inputs that the end-to-end tests run, and what they should come to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import yaml
from standin import generate

from batchgen.records import row_seed

ROOT = Path(__file__).parents[2]
STAND_IN = Path(__file__).with_name("standin.py")
SYSTEM = "Answer in one word."
TIMEOUT_S = 300


def make_rows(num_rows: int, start: int = 0) -> list[dict[str, Any]]:
    """Rows of differing lengths, with text beyond ASCII."""
    return [
        {"id": i, "text": f"Row {i} says: {'the soup was cold é ' * (i % 7)}{i * i}."}
        for i in range(start, start + num_rows)
    ]


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path


def write_job(folder: Path, model: Path | str, **sections: Mapping[str, Any]) -> Path:
    """A job over data.jsonl in `folder`; `sections` are merged into its defaults."""
    job: dict[str, dict[str, Any]] = {
        "input": {"uri": str(folder / "data.jsonl")},
        "prompt": {
            "messages": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": "{{ text }}"},
            ]
        },
        "model": {"name_or_path": str(model)},
        "sampling": {"max_tokens": 12, "seed": 7},
        "output": {"uri": str(folder / "out"), "columns": {"keep": ["id"]}},
        "checkpoint": {"unit_rows": 64, "flush_interval": 0.2},
        "observability": {"progress": "none"},
    }
    for name, values in sections.items():
        job[name] = {**job.get(name, {}), **values}
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job), encoding="utf-8")
    return path


def expected_rows(
    rows: Sequence[Mapping[str, Any]],
    uri: str,
    tokenizer: Any,
    max_tokens: int = 12,
    sample: int = 0,
) -> list[dict[str, Any]]:
    """The output of the stand-in, by transformers' own chat template and decoding."""
    expected = []
    for number, row in enumerate(rows):
        messages = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": row["text"]},
        ]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        token_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        seed = row_seed(7, f"{uri}:{number}", sample)
        answer = generate(token_ids, seed, max_tokens)
        expected.append(
            {
                "id": row["id"],
                "response": tokenizer.decode(answer, skip_special_tokens=True),
                "finish_reason": "length",
                "prompt_tokens": len(token_ids),
                "output_tokens": len(answer),
                "seed": seed,
                "row_address": f"{uri}:{number}",
            }
        )
    return expected


def read_output(uri: Path | str, output_format: str = "arrow") -> list[dict[str, Any]]:
    """All rows of a published dataset, as `datasets` reads them."""
    if output_format == "arrow":
        dataset = datasets.load_from_disk(str(uri))
    else:
        cache = Path(uri).with_name("datasets-cache")
        dataset = datasets.load_dataset(str(uri), split="train", cache_dir=str(cache))
    return list(dataset)


def batchgen(
    *arguments: str | Path, environment: Mapping[str, str] | None = None, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Run the real command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "batchgen", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
        cwd=cwd,
        check=False,
    )


def start_stand_in(
    job: Path, *options: str, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start a run with the stand-in engine in a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(STAND_IN), str(job), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
    )


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Wait for a stand-in run that must succeed; what it printed."""
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, err
    printed: dict[str, Any] = json.loads(out)
    return printed
