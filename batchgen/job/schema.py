"""The job file's JSON Schema, for editors."""

from __future__ import annotations

from typing import Any

from batchgen.job.problems import describe_value
from batchgen.job.spec import JobSpec
from batchgen.job.unbuilt import BUILT_VALUES


def job_json_schema() -> dict[str, Any]:
    """The schema of a job file. Keys whose features are not built yet say so."""
    schema = JobSpec.model_json_schema()
    for key, built in BUILT_VALUES.items():
        *parents, name = key.split(".")
        section = schema
        for parent in parents:
            reference = section["properties"][parent]["$ref"].rpartition("/")[2]
            section = schema["$defs"][reference]
        values = ", ".join(describe_value(value) for value in built)
        section["properties"][name]["description"] += f" Not built yet but for: {values}."
    schema["title"] = "batchgen job file"
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
