"""The defaults of the contract, and the ranges of values."""

from __future__ import annotations

import pytest

from batchgen.errors import JobFileError

# The contract's job file, less the keys that have no default; checkpoint times in seconds.
DEFAULTS = {
    "version": 1,
    "input": {
        "format": "auto",
        "columns": None,
        "limit": None,
        "incremental": False,
        "storage_options": {},
        "on_bad_record": "dead_letter",
    },
    "prompt": {
        "messages": None,
        "messages_column": None,
        "prompt_column": None,
        "chat_template": None,
        "chat_template_kwargs": {},
        "max_prompt_tokens": None,
        "overflow": "dead_letter",
        "special_tokens_in_data": "neutralize",
    },
    "model": {
        "revision": None,
        "dtype": "auto",
        "quantization": None,
        "trust_remote_code": False,
        "max_model_len": None,
    },
    "sampling": {
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "max_tokens": 256,
        "min_tokens": 0,
        "n": 1,
        "stop": [],
        "stop_token_ids": [],
        "ignore_eos": False,
        "seed": 0,
        "logprobs": None,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "beam_width": None,
        "length_penalty": 1.0,
        "early_stopping": False,
    },
    "structured": None,
    "engine": {
        "device": "auto",
        "gpu_memory_utilization": 0.92,
        "cpu_swap_gib": "auto",
        "block_size": 16,
        "max_num_seqs": "auto",
        "max_num_batched_tokens": "auto",
        "num_gpu_blocks": "auto",
        "enable_prefix_caching": True,
        "kv_cache_dtype": "auto",
        "tensor_parallel_size": 1,
    },
    "output": {
        "format": "arrow",
        "columns": {"keep": [], "response": "response", "meta": True},
        "n_layout": "list",
        "max_shard_rows": 100000,
        "compression": "zstd",
        "overwrite": "never",
    },
    "checkpoint": {
        "uri": None,
        "unit_rows": 4096,
        "flush_interval": 30.0,
        "resume": "if_possible",
    },
    "errors": {"on_error": "dead_letter", "max_error_rate": 0.05, "window": 500, "watchdog": 900.0},
    "preemption": {
        "watch": "auto",
        "lead_time": "auto",
        "endpoints": {
            "aws": "http://169.254.169.254",
            "gcp": "http://metadata.google.internal",
            "azure": "http://169.254.169.254",
        },
        "drain_timeout": "auto",
    },
    "distributed": {"backend": "local", "workers": 1},
    "budget": {"max_wall_time": None, "max_output_tokens": None},
    "observability": {"progress": "auto", "log_format": "text", "prometheus_port": None},
    "name": "job",
    "params": {},
}
GIVEN = {"input": "uri", "prompt": "template", "model": "name_or_path", "output": "uri"}


def test_defaults_are_the_contracts(load_text, minimal):
    values = load_text(minimal).model_dump(mode="json")
    for section, key in GIVEN.items():
        del values[section][key]
    assert values == DEFAULTS


@pytest.mark.parametrize(
    "override",
    [
        "sampling.temperature=-0.1",
        "sampling.temperature=1e999",
        "sampling.top_p=0",
        "sampling.top_p=1.01",
        "sampling.top_k=-1",
        "sampling.min_p=1.5",
        "sampling.max_tokens=0",
        "sampling.min_tokens=257",
        "sampling.n=0",
        "sampling.n=2",
        "sampling.beam_width=1",
        "sampling.beam_width=17",
        "sampling.early_stopping=always",
        "sampling.seed=-1",
        "sampling.seed=1.5",
        "sampling.seed='1'",
        "sampling.stop=text",
        "sampling.stop=['']",
        "sampling.stop_token_ids=[-1]",
        "sampling.repetition_penalty=0",
        "sampling.ignore_eos=1",
        "engine.gpu_memory_utilization=0",
        "engine.gpu_memory_utilization=1.1",
        "engine.block_size=2",
        "engine.block_size=24",
        "engine.max_num_seqs=0",
        "engine.num_gpu_blocks=automatic",
        "engine.cpu_swap_gib=-1",
        "engine.device=gpu",
        "input.uri=[]",
        "input.uri=''",
        "input.limit=0",
        "input.columns=text",
        "checkpoint.unit_rows=0",
        "checkpoint.flush_interval=0",
        "checkpoint.flush_interval=5 minutes",
        "checkpoint.flush_interval=true",
        "budget.max_wall_time=0",
        "budget.max_wall_time=-1h",
        "budget.max_wall_time=8 hours",
        "budget.max_wall_time=1h30m",
        "budget.max_wall_time=[1]",
        "budget.max_output_tokens=0",
        "budget.max_output_tokens=-5",
        "budget.max_output_tokens=1.5",
        "budget.max_output_tokens=1M",
        "budget.max_output_tokens=true",
        "errors.max_error_rate=1.5",
        "errors.window=0",
        "output.columns.response=null",
        "output.compression=brotli",
        "output.compression=snappy",
        "prompt.prompt_column=text",
        "prompt.template=null",
        "version=2",
    ],
)
def test_values_out_of_range_are_refused(load_text, minimal, override):
    key, _, _ = override.partition("=")
    with pytest.raises(JobFileError, match=rf"{key.split('.')[0]}.*should|set exactly one"):
        load_text(minimal, [override])


@pytest.mark.parametrize(
    "override",
    [
        "temperature=0.5",
        "top_p=0.9",
        "top_k=5",
        "min_p=0.1",
        "min_tokens=1",
        "stop=[x]",
        "seed=3",
        "presence_penalty=0.1",
        "frequency_penalty=0.1",
        "repetition_penalty=1.1",
    ],
)
def test_what_does_not_combine_with_beams(load_text, minimal, override):
    key, _, _ = override.partition("=")
    with pytest.raises(JobFileError, match=f"and {key} does not combine with it"):
        load_text(minimal, ["sampling.beam_width=4", f"sampling.{override}"])


def test_beams_and_their_options(load_text, minimal):
    beams = ["sampling.beam_width=4", "sampling.early_stopping=never", "sampling.n=4"]
    sampling = load_text(minimal, [*beams, "sampling.length_penalty=0.5"]).sampling
    assert (sampling.beam_width, sampling.n, sampling.length_penalty) == (4, 4, 0.5)
    assert sampling.early_stopping == "never"
    with pytest.raises(JobFileError, match=r"n should be at most beam_width \(got n 5"):
        load_text(minimal, [*beams[:2], "sampling.n=5"])
    for lone in ("length_penalty=2", "early_stopping=true"):
        with pytest.raises(JobFileError, match="does nothing without beam_width"):
            load_text(minimal, [f"sampling.{lone}"])


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("checkpoint.flush_interval=5m", "checkpoint", "flush_interval", 300.0),
        ("checkpoint.flush_interval=1.5h", "checkpoint", "flush_interval", 5400.0),
        ("checkpoint.flush_interval=30", "checkpoint", "flush_interval", 30.0),
        ("budget.max_wall_time=8h", "budget", "max_wall_time", 28800.0),
        ("budget.max_wall_time=30m", "budget", "max_wall_time", 1800.0),
        ("budget.max_wall_time=2d", "budget", "max_wall_time", 172800.0),
        ("budget.max_wall_time=90", "budget", "max_wall_time", 90.0),
        ("budget.max_wall_time=null", "budget", "max_wall_time", None),
        ("budget.max_output_tokens=1000", "budget", "max_output_tokens", 1000),
        ("budget.max_output_tokens=null", "budget", "max_output_tokens", None),
        ("engine.cpu_swap_gib=0", "engine", "cpu_swap_gib", 0.0),
        ("engine.device=cuda:1", "engine", "device", "cuda:1"),
        ("input.uri=[a, b]", "input", "uri", ("a", "b")),
        ("sampling.temperature=1", "sampling", "temperature", 1.0),
        ("sampling.temperature=1e-3", "sampling", "temperature", 0.001),
        ("sampling.stop=[no, '\\n']", "sampling", "stop", ("no", "\\n")),
        ("model.revision=", "model", "revision", None),
        ("output.compression=null", "output", "compression", None),
    ],
)
def test_values_are_read(load_text, minimal, override, section, key, value):
    spec = load_text(minimal, [override])
    assert getattr(getattr(spec, section), key) == value


def test_a_spec_is_frozen(load_text, minimal):
    spec = load_text(minimal)
    with pytest.raises(ValueError, match="frozen"):
        spec.sampling.temperature = 1.0
