"""Features of the job file that are not built yet: refused by name, never ignored."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce

from batchgen.job.problems import Problem, describe_value
from batchgen.job.spec import JobSpec

# The values of a key that are built; the first one is its default. Keys that are not here are
# built for every value that the spec allows.
BUILT_VALUES: Mapping[str, tuple[object, ...]] = {
    "input.format": ("auto", "parquet", "jsonl", "arrow", "csv"),
    "model.quantization": (None, "fp8"),
    "model.trust_remote_code": (False,),
    "sampling.logprobs": (None,),
    "structured": (None,),
    "engine.kv_cache_dtype": ("auto", "fp8"),
    "engine.tensor_parallel_size": (1,),
    "output.overwrite": ("never",),
    "errors.on_error": ("dead_letter", "fail"),
    "preemption.drain_timeout": ("auto",),
    "distributed.backend": ("local",),
    "distributed.workers": (1,),
    "observability.log_format": ("text",),
    "observability.prometheus_port": (None,),
}


def unbuilt_problems(spec: JobSpec) -> list[Problem]:
    """A problem for each key that asks for something that is not built."""
    problems = []
    for key, built in BUILT_VALUES.items():
        path = tuple(key.split("."))
        value = reduce(getattr, path, spec)
        if value not in built:
            got = describe_value(value)
            wanted = " or ".join(describe_value(each) for each in built)
            text = f"not built yet (got {got}); set it to {wanted}"
            problems.append(Problem(path=path, text=text))
    return problems
