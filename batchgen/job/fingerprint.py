"""What a job's output depends on, as JSON, and how two of them differ in words.

Params and names of folders are not in it: a job may be renamed, and its files are named in full.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from batchgen.job.spec import JobSpec
from batchgen.records import InputFile

_MAX_NAMED_FILES = 3
_MAX_QUOTED_CHARS = 60
_KEPT_CHARS = 15  # of what two long texts have in common, before their first difference


def job_fingerprint(
    spec: JobSpec,
    *,
    input_files: Sequence[InputFile],
    model: Mapping[str, str],
    output_schema: str,
) -> dict[str, object]:
    """Everything that changes the output, nested by the job file's keys. JSON keeps it equal.

    `model` says which weights, tokenizer, chat template and numerics the run computes with, by
    names for people; it replaces the job file's name for the model. How rows are packed into
    files (compression, max_shard_rows, unit_rows) and what ends a run (errors, budget) change no
    row, nor do the engine's keys but for kv_cache_dtype.
    """
    files = {file.uri: {"size_bytes": file.size_bytes, "etag": file.etag} for file in input_files}
    return {
        "input": {
            **spec.input.model_dump(
                mode="json", include={"format", "columns", "limit", "on_bad_record"}
            ),
            "files": files,
        },
        "prompt": spec.prompt.model_dump(mode="json"),
        "model": {
            **spec.model.model_dump(
                mode="json", include={"dtype", "quantization", "max_model_len"}
            ),
            **model,
        },
        "sampling": spec.sampling.model_dump(
            mode="json",
            # Without beams these change nothing, and ledgers are older than they.
            exclude=None if spec.sampling.beam_width else {"length_penalty", "early_stopping"},
        ),
        # Of the engine's keys, the one that changes what is computed; not where it changes nothing.
        **(
            {"engine": {"kv_cache_dtype": spec.engine.kv_cache_dtype}}
            if spec.engine.kv_cache_dtype != "auto"
            else {}
        ),
        "structured": spec.model_dump(mode="json", include={"structured"})["structured"],
        "output": {
            **spec.output.model_dump(mode="json", include={"format", "columns", "n_layout"}),
            "schema": output_schema,
            # A ledger inside the output belongs to it; one elsewhere must say whose it is.
            **({"uri": spec.output.uri} if spec.checkpoint.uri is not None else {}),
        },
    }


def fingerprint_difference(old: Mapping[str, object], new: Mapping[str, object]) -> list[str]:
    """A line for each key that differs, such as `sampling.temperature: 0.0 -> 0.8`."""
    return _differences("", old, new)


def _differences(key: str, old: object, new: object) -> list[str]:
    if old == new:
        return []
    if key == "input.files" and isinstance(old, Mapping) and isinstance(new, Mapping):
        return [f"{key}: {_file_changes(old, new)}"]
    if isinstance(old, list) and isinstance(new, list):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        lines = []
        for name in dict.fromkeys([*old, *new]):
            inner = f"{key}.{name}" if key else str(name)
            if name not in new:
                lines.append(f"{inner}: {_quoted(old[name])} -> removed")
            elif name not in old:
                lines.append(f"{inner}: added {_quoted(new[name])}")
            else:
                lines += _differences(inner, old[name], new[name])
        return lines
    if isinstance(old, str) and isinstance(new, str):
        return [f"{key}: {' -> '.join(_quoted_pair(old, new))}"]
    return [f"{key}: {_quoted(old)} -> {_quoted(new)}"]


def _file_changes(old: Mapping[str, object], new: Mapping[str, object]) -> str:
    changes = {
        "added": [uri for uri in new if uri not in old],
        "removed": [uri for uri in old if uri not in new],
        "changed": [uri for uri in new if uri in old and new[uri] != old[uri]],
    }
    return ", ".join(
        f"{len(uris)} {change} ({_named(uris)})" for change, uris in changes.items() if uris
    )


def _named(uris: Sequence[str]) -> str:
    more = len(uris) - _MAX_NAMED_FILES
    return ", ".join([*uris[:_MAX_NAMED_FILES], *([f"{more} more"] if more > 0 else [])])


def _quoted(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_QUOTED_CHARS else f"{text[:_MAX_QUOTED_CHARS]}..."


def _quoted_pair(old: str, new: str) -> tuple[str, str]:
    """Both texts; long ones from shortly before their first difference, so that it is seen."""
    pairs = enumerate(zip(old, new, strict=False))
    start = next((index for index, (a, b) in pairs if a != b), 0) - _KEPT_CHARS
    if start <= 0 or max(len(old), len(new)) <= _MAX_QUOTED_CHARS:
        return _quoted(old), _quoted(new)
    return f"...{_quoted(old[start:])}", f"...{_quoted(new[start:])}"
