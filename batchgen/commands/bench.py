"""`batchgen bench`: the engine alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from batchgen.errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    from batchgen.job.spec import JobSpec


@click.command()
@click.argument("requests", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--model-config", type=click.Path(path_type=Path), help="A config.json.")
@click.option("--model", help="A model as in model.name_or_path; its own config.json is used.")
@click.option(
    "--load-format",
    type=click.Choice(["auto", "dummy"]),
    default="auto",
    show_default=True,
    help="dummy: random weights.",
)
@click.option("--device", default="auto", show_default=True)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "bfloat16", "float16", "float32"]),
    default="auto",
    show_default=True,
)
@click.option(
    "-o",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="A key of engine, model.KEY, such as model.quantization=fp8, or a key of beams, such as "
    "sampling.beam_width=4 (repeatable).",
)
def bench(
    requests: Path,
    model_config: Path | None,
    model: str | None,
    load_format: Literal["auto", "dummy"],
    device: str,
    dtype: Literal["auto", "bfloat16", "float16", "float32"],
    overrides: tuple[str, ...],
) -> None:
    """Time the engine alone on a file of token ids. Prints one JSON object."""
    if model is not None and model_config is not None:
        raise UsageError("give one of --model and --model-config, not both")
    if model_config is not None and load_format != "dummy":
        raise UsageError("--model-config has no weights: add --load-format dummy, or give --model")
    from batchgen.engine.bench import run_bench
    from batchgen.engine.from_job import engine_options, sampling_options
    from batchgen.models.registry import load_config, read_config, resolve_model

    options = [f"device={device}", f"model.dtype={dtype}", *overrides]
    spec = bench_spec(model or "config", options)
    files = None
    if model is not None:
        files = resolve_model(spec.model)
        config = load_config(files)
    elif model_config is not None:
        config = read_config(model_config)
    else:
        raise UsageError("bench needs --model or --model-config")
    result = run_bench(
        requests,
        config,
        files,
        dataclasses.replace(engine_options(spec.engine, spec.model), load_format=load_format),
        sampling_options(spec.sampling, config),
    )
    click.echo(json.dumps(result))


def bench_spec(model: str, overrides: Sequence[str]) -> JobSpec:
    """A job with these `key=value` texts in its engine, model and beams, the values in YAML."""
    import yaml
    from pydantic import ValidationError

    from batchgen.job.problems import Problem, spec_problems
    from batchgen.job.spec import JobSpec
    from batchgen.job.unbuilt import unbuilt_problems

    def told(problems: Sequence[Problem]) -> str:
        return "\n".join(f"-o {'.'.join(map(str, each.path))}: {each.text}" for each in problems)

    of_beams = ("beam_width", "length_penalty", "early_stopping")
    sections: dict[str, dict[str, object]] = {
        "engine": {},
        "model": {"name_or_path": model},
        "sampling": {},
    }
    for text in overrides:
        key, equals, value = text.partition("=")
        section, _, name = key.rpartition(".")
        is_known = (section or "engine") in sections and (section != "sampling" or name in of_beams)
        if not equals or not is_known:
            raise UsageError(
                f"-o {text}: should be key=value with a key of engine or model, such as "
                "max_num_seqs=64 or model.quantization=fp8, or one of beams, such as "
                "sampling.beam_width=4"
            )
        sections[section or "engine"][name] = yaml.safe_load(value)
    unused = {"input": {"uri": "-"}, "prompt": {"template": "-"}, "output": {"uri": "-"}}
    try:
        spec = JobSpec.model_validate(sections | unused)
    except ValidationError as error:
        raise UsageError(told(spec_problems(error, sections))) from None
    if problems := unbuilt_problems(spec):
        raise UnsupportedError(told(problems))
    return spec
