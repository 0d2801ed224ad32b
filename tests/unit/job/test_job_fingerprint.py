"""What changes a fingerprint, what does not, and the words for the difference."""

from __future__ import annotations

import json

import pytest

from batchgen.errors import JobFileError
from batchgen.job.fingerprint import fingerprint_difference, job_fingerprint
from batchgen.records import InputFile

MODEL = {"weights": "sha256:1", "tokenizer": "sha256:2", "chat_template": "sha256:3"}


def file(name: str, etag: str = "1") -> InputFile:
    return InputFile(uri=name, size_bytes=10, etag=etag)


FILES = (file("a.jsonl"), file("b.jsonl"))


def fingerprint(spec, files=FILES, model=MODEL, schema="AAAA"):
    made = job_fingerprint(spec, input_files=files, model=model, output_schema=schema)
    assert json.loads(json.dumps(made)) == made
    return made


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("sampling.temperature=0.8", "sampling.temperature: 0.0 -> 0.8"),
        ("sampling.seed=1", "sampling.seed: 0 -> 1"),
        ("sampling.stop=[x]", "sampling.stop.0: added 'x'"),
        ("prompt.template=other", "prompt.template: 'English: {{ text }}' -> 'other'"),
        (
            "prompt.special_tokens_in_data=allow",
            "prompt.special_tokens_in_data: 'neutralize' -> 'allow'",
        ),
        ("prompt.overflow=truncate_end", "prompt.overflow: 'dead_letter' -> 'truncate_end'"),
        ("model.dtype=float32", "model.dtype: 'auto' -> 'float32'"),
        ("model.quantization=fp8", "model.quantization: None -> 'fp8'"),
        ("engine.kv_cache_dtype=fp8", "engine: added {'kv_cache_dtype': 'fp8'}"),
        ("model.max_model_len=64", "model.max_model_len: None -> 64"),
        ("input.limit=5", "input.limit: None -> 5"),
        ("input.format=csv", "input.format: 'auto' -> 'csv'"),
        ("output.columns.keep=[id]", "output.columns.keep.0: added 'id'"),
        ("output.columns.response=r", "output.columns.response: 'response' -> 'r'"),
        ("output.format=jsonl", "output.format: 'arrow' -> 'jsonl'"),
    ],
)
def test_what_changes_the_output_changes_it(load_text, minimal, override, line):
    old, new = load_text(minimal), load_text(minimal, [override])
    assert fingerprint_difference(fingerprint(old), fingerprint(new)) == [line]


def test_options_of_beams_are_in_it_only_with_beams(load_text, minimal):
    """Ledgers that were begun before there were beams stay valid."""
    assert "length_penalty" not in fingerprint(load_text(minimal))["sampling"]
    beams = load_text(minimal, ["sampling.beam_width=4"])
    other = load_text(minimal, ["sampling.beam_width=4", "sampling.length_penalty=2"])
    assert fingerprint_difference(fingerprint(beams), fingerprint(other)) == [
        "sampling.length_penalty: 1.0 -> 2.0"
    ]


@pytest.mark.parametrize(
    "override",
    [
        "name=other",
        "params={date: x}",
        "engine.num_gpu_blocks=9",
        "engine.device=cpu",
        "checkpoint.unit_rows=7",
        "checkpoint.resume=always",
        "checkpoint.flush_interval=1s",
        "errors.on_error=fail",
        "errors.window=9",
        "budget.max_wall_time=8h",
        "budget.max_output_tokens=1000",
        "observability.progress=none",
        "output.compression=null",
        "output.max_shard_rows=9",
        "output.uri=elsewhere",
        "input.storage_options.key=secret",
    ],
)
def test_how_to_run_stays_out(load_text, minimal, override):
    assert fingerprint(load_text(minimal)) == fingerprint(load_text(minimal, [override]))


def test_files_are_counted_and_named(load_text, minimal):
    spec = load_text(minimal)
    old = fingerprint(spec, [file("a"), file("b"), file("gone")])
    new = fingerprint(spec, [file("a"), file("b", etag="2"), *map(file, "uvwxyz")])
    assert fingerprint_difference(old, new) == [
        "input.files: 6 added (u, v, w, 3 more), 1 removed (gone), 1 changed (b)"
    ]
    assert fingerprint_difference(old, old) == []


def test_the_model_is_what_it_was_resolved_to(load_text, minimal):
    spec = load_text(minimal)
    new = fingerprint(spec, model=MODEL | {"weights": "sha256:9"})
    assert fingerprint_difference(fingerprint(spec), new) == [
        "model.weights: 'sha256:1' -> 'sha256:9'"
    ]


def test_long_texts_differ_visibly(load_text, minimal):
    long = "word " * 50
    old = load_text(minimal, [f"prompt.template='{long}one'"])
    new = load_text(minimal, [f"prompt.template='{long}two'"])
    [line] = fingerprint_difference(fingerprint(old), fingerprint(new))
    assert line == ("prompt.template: ...'word word word one' -> ...'word word word two'")


def test_no_secret_is_in_it(load_text, minimal):
    spec = load_text(minimal, ["input.storage_options.secret=hunter2"])
    assert "hunter2" not in json.dumps(fingerprint(spec))


def test_a_chat_template_that_would_do_nothing_is_refused(load_text, minimal):
    for override in ("prompt.chat_template=x", "prompt.chat_template_kwargs.a=1"):
        with pytest.raises(JobFileError, match="do nothing with template"):
            load_text(minimal, [override])


def test_a_ledger_outside_the_output_names_its_output(load_text, minimal):
    inside = [fingerprint(load_text(minimal, [f"output.uri={u}"])) for u in ("a", "b")]
    assert fingerprint_difference(*inside) == []
    outside = [
        fingerprint(load_text(minimal, [f"output.uri={u}", "checkpoint.uri=ck"]))
        for u in ("a", "b")
    ]
    assert fingerprint_difference(*outside) == ["output.uri: 'a' -> 'b'"]
