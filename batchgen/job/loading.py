"""A job file, with `-o` and `-p` of the command line, becomes a `JobSpec`; or says what is wrong.

All problems are told in one error, a line each: `file:line:column: key.path: problem (got VALUE)`.
For what came from the command line, `-o key` or `-p name` stands in the place of the position.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence

from pydantic import ValidationError

from batchgen.errors import JobFileError, UnsupportedError
from batchgen.job.problems import Problem, nearest_text, spec_problems
from batchgen.job.spec import JobSpec
from batchgen.job.tree import JobTree
from batchgen.job.unbuilt import unbuilt_problems
from batchgen.job.yaml_tree import KeyPath

_PARAM = re.compile(r"\$\{(params\.)?([^{}]*)\}?")


def load_job(
    path: str | os.PathLike[str], overrides: Sequence[str] = (), params: Sequence[str] = ()
) -> JobSpec:
    """Read a job file.

    `overrides` are texts `a.b=value`, the value in YAML; a list's item goes by its index, from 0.
    `params` are texts `name=value` for names that the file declares in `params`; `${params.name}`
    is replaced in input.uri, output.uri and checkpoint.uri, and nowhere else. Relative paths stay
    as they are: they start at the current directory, not at the job file's.

    Raises: JobFileError; UnsupportedError for a feature that is not built yet.
    """
    tree = JobTree(os.fspath(path))
    for override in overrides:
        tree.override(override)
    for param in params:
        tree.set_param(param)
    try:
        spec = JobSpec.model_validate(tree.values)
    except ValidationError as error:
        # Not `from error`: pydantic's own text quotes every value, secrets too.
        raise JobFileError(tree.describe(spec_problems(error, tree.values))) from None
    if problems := list(_param_problems(spec)):
        raise JobFileError(tree.describe(problems))
    if problems := unbuilt_problems(spec):
        raise UnsupportedError(tree.describe(problems))
    return _with_params(spec)


def _uris(spec: JobSpec) -> Iterator[tuple[KeyPath, str]]:
    """The uris in which params are replaced."""
    if isinstance(spec.input.uri, str):
        yield ("input", "uri"), spec.input.uri
    else:
        yield from ((("input", "uri", index), uri) for index, uri in enumerate(spec.input.uri))
    yield ("output", "uri"), spec.output.uri
    if spec.checkpoint.uri is not None:
        yield ("checkpoint", "uri"), spec.checkpoint.uri


def _param_problems(spec: JobSpec) -> Iterator[Problem]:
    for path, uri in _uris(spec):
        for match in _PARAM.finditer(uri):
            name = match[2]
            if match[1] is None or not match[0].endswith("}"):
                text = "only ${params.name} is replaced in a uri"
                yield Problem(path=path, text=f"{text} (got {match[0]!r})")
            elif name not in spec.params:
                nearest = nearest_text(name, list(spec.params))
                yield Problem(path=path, text=f"the job declares no param {name!r}; {nearest}")


def _with_params(spec: JobSpec) -> JobSpec:
    """The job with the params replaced in its uris."""

    def replaced(uri: str) -> str:
        return _PARAM.sub(lambda match: spec.params[match[2]], uri)

    uri, ledger_uri = spec.input.uri, spec.checkpoint.uri
    input_uri = replaced(uri) if isinstance(uri, str) else tuple(replaced(each) for each in uri)
    checkpoint_uri = None if ledger_uri is None else replaced(ledger_uri)
    return spec.model_copy(
        update={
            "input": spec.input.model_copy(update={"uri": input_uri}),
            "output": spec.output.model_copy(update={"uri": replaced(spec.output.uri)}),
            "checkpoint": spec.checkpoint.model_copy(update={"uri": checkpoint_uri}),
        }
    )
