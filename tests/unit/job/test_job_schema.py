"""The JSON Schema against the validator that ships with moto (jsonschema), and the first job."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest
import yaml

from batchgen.job.loading import load_job
from batchgen.job.problems import job_keys
from batchgen.job.schema import job_json_schema
from batchgen.job.starter import init_job_text
from batchgen.job.unbuilt import BUILT_VALUES


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = job_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_the_first_job_is_valid(validator, load_text):
    text = init_job_text("translate")
    validator.validate(yaml.safe_load(text))
    spec = load_text(text)
    assert spec.name == "translate"
    assert spec.output.uri == "out/translate"
    assert text.startswith("# yaml-language-server: $schema=job.schema.json\n")


def test_the_first_job_states_the_defaults(load_text, minimal):
    first = load_text(init_job_text("job")).model_dump()
    default = load_text(minimal).model_dump()
    for values in (first, default):
        for examples in ("input.uri", "prompt", "model.name_or_path", "output.uri", "params"):
            section, _, key = examples.partition(".")
            del (values[section] if key else values)[key or section]
        del values["output"]["columns"]
    assert first == default


def test_the_first_job_names_every_key():
    text = init_job_text("job")
    inside_structured = {key for key in job_keys() if key.startswith("structured.")}
    for key in set(job_keys()) - inside_structured:
        assert f"{key.rpartition('.')[2]}:" in text


@pytest.mark.parametrize("name", ["plain", 'quo"ted', "a: b # c", "é\n\t", "@OUTPUT@", "yes"])
def test_any_name_is_quoted(load_text, name):
    assert load_text(init_job_text(name)).name == name


def test_the_schema_refuses_what_loading_refuses(validator, minimal):
    good = yaml.safe_load(minimal)
    validator.validate(good)
    validator.validate(good | {"checkpoint": {"flush_interval": "5m"}})
    for wrong in (
        {"smapling": {}},
        {"sampling": {"top_p": 2}},
        {"sampling": {"seed": "1"}},
        {"checkpoint": {"flush_interval": "soon"}},
        {"prompt": {"template": "a", "prompt_column": "b"}},
        {"prompt": {"template": None}},
        {"engine": {"max_num_seqs": "lots"}},
        {"output": {}},
    ):
        assert not validator.is_valid(good | wrong)
    validator.validate(good | {"prompt": {"template": "a", "messages": None}})


def test_the_schema_says_what_is_not_built():
    schema = job_json_schema()
    sampling = schema["$defs"]["SamplingSpec"]["properties"]
    assert sampling["logprobs"]["description"].endswith("Not built yet but for: null.")
    assert str(schema).count("Not built yet") == len(BUILT_VALUES)


@pytest.mark.parametrize(
    "path", sorted(Path(__file__).parents[3].glob("jobs/*.yaml")), ids=lambda path: path.name
)
def test_shipped_jobs_are_valid(validator, path):
    load_job(path)
    text = path.read_text(encoding="utf-8")
    validator.validate(yaml.safe_load(text))
    schema = text.split("\n")[0].removeprefix("# yaml-language-server: $schema=")
    assert (path.parent / schema).is_file()
