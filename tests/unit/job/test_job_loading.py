"""Errors that name line, column, key and the nearest key; overrides; params; secrets."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchgen.errors import BatchgenError, JobFileError, UnsupportedError
from batchgen.job.loading import load_job
from batchgen.job.problems import job_keys
from batchgen.job.spec import JobSpec
from batchgen.job.unbuilt import BUILT_VALUES

# A value that is valid for the key, and for a feature that is not built.
UNBUILT = {
    "input.format": "openai-batch",
    "model.quantization": "int8",
    "model.trust_remote_code": "true",
    "sampling.logprobs": "0",
    "structured": "{choice: [a, b]}",
    "engine.kv_cache_dtype": "int8",
    "engine.tensor_parallel_size": "2",
    "output.overwrite": "always",
    "errors.on_error": "record",
    "preemption.drain_timeout": "30s",
    "distributed.backend": "slurm",
    "distributed.workers": "2",
    "observability.log_format": "json",
    "observability.prometheus_port": "9090",
}


def error_of(load_text, *args) -> list[str]:
    with pytest.raises(JobFileError) as caught:
        load_text(*args)
    assert caught.value.exit_code == 2
    return str(caught.value).split("\n")


@pytest.mark.parametrize(
    ("added", "line"),
    [
        (
            "sampling:\n  top_p: 0.9\n  temprature: 0.5\n",
            "job.yaml:7:3: sampling.temprature: unknown key; did you mean 'temperature'?",
        ),
        ("smapling: {}\n", "job.yaml:5:1: smapling: unknown key; did you mean 'sampling'?"),
        ("seed: 1\n", "job.yaml:5:1: seed: unknown key; did you mean 'sampling.seed'?"),
        ("zzz: 1\n", "job.yaml:5:1: zzz: unknown key; the nearest valid key is 'version'"),
        (
            "sampling: {max_tokens: many}\n",
            "job.yaml:5:12: sampling.max_tokens: should be a whole number (got 'many')",
        ),
        (
            "sampling: {stop: [a, 2]}\n",
            "job.yaml:5:22: sampling.stop.1: should be text (got 2); put it in quotes",
        ),
        ("sampling: [a]\n", "job.yaml:5:1: sampling: should be a mapping (got a list)"),
        (
            "engine: {max_num_seqs: lots}\n",
            "job.yaml:5:10: engine.max_num_seqs: should be 'auto' or a whole number (got 'lots')",
        ),
        (
            "params:\n  month: 3\n",
            "job.yaml:6:3: params.month: should be text (got 3); put it in quotes",
        ),
        (
            "sampling: {min_tokens: 300}\n",
            "job.yaml:5:1: sampling: min_tokens should be at most max_tokens "
            "(got min_tokens 300, max_tokens 256)",
        ),
        (
            "sampling: {n: 4}\n",
            "job.yaml:5:1: sampling: n should be 1 at temperature 0, where all samples are the "
            "same (got n 4); set a temperature, or n to 1",
        ),
        (
            "sampling: {n: 65, temperature: 1}\n",
            "job.yaml:5:12: sampling.n: should be less than or equal to 64 (got 65)",
        ),
        ("name: a\nname: b\n", "job.yaml:6:1: name: the key is given twice, first in line 5"),
    ],
)
def test_a_problem_has_its_place(load_text, minimal, added, line):
    assert error_of(load_text, minimal + added) == [line]


def test_all_problems_are_told_in_the_order_of_the_file(load_text):
    text = "\n".join(
        [
            "input: {uri: [a, 1], fromat: jsonl}",
            "prompt: {messages: [{role: usr, content: x}]}",
            "output: {format: arrow}",
            "sampling: {top_p: 2}",
        ]
    )
    assert error_of(load_text, text, ["engine.block_size=6"]) == [
        "-o engine.block_size: engine.block_size: should be a power of two (got 6)",
        "job.yaml:1:1: model: is required",
        "job.yaml:1:18: input.uri.1: should be text (got 1); put it in quotes",
        "job.yaml:1:22: input.fromat: unknown key; did you mean 'format'?",
        "job.yaml:2:22: prompt.messages.0.role: should be 'system', 'user', 'assistant', 'tool' "
        "or 'developer' (got 'usr')",
        "job.yaml:3:1: output.uri: is required",
        "job.yaml:4:12: sampling.top_p: should be less than or equal to 1 (got 2)",
    ]


def test_exactly_one_source_of_prompts(load_text, minimal):
    names = "messages, template, messages_column, prompt_column"
    two = error_of(load_text, minimal, ["prompt.prompt_column=text"])
    assert two == [
        f"job.yaml:2:1: prompt: set exactly one of {names} (got template and prompt_column)"
    ]
    none = error_of(load_text, minimal, ["prompt.template=null"])
    assert none == [f"job.yaml:2:1: prompt: set exactly one of {names} (got none)"]
    spec = load_text(minimal, ["prompt.template=null", "prompt.messages_column=chat"])
    assert spec.prompt.messages_column == "chat"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "job.yaml:1:1: the file is empty"),
        (b"# only words\n", "job.yaml:1:1: the file is empty"),
        (b"- a\n", "job.yaml:1:1: a job file should be a mapping (got a list)"),
        (b"just text\n", "job.yaml:1:1: a job file should be a mapping (got 'just text')"),
        (b"name: x\ninput:\n\turi: a\n", "job.yaml:3:1: not readable as YAML: "),
        (b"name: x\nbad: \xe9\n", "job.yaml:2:6: is not UTF-8"),
        ("name: x\n".encode("utf-16"), "job.yaml:1:1: is not UTF-8"),
        (b"name: \x00\n", "job.yaml:1:7: the character U+0000 is not allowed"),
        (b'name: "\\ud800"\n', "job.yaml:1:7: holds an escape that is no character"),
        (b'name: "\\UFFFFFFFF"\n', "job.yaml:1:10: holds an escape"),
        (b"name: " + b"9" * 5000, "job.yaml:1:7: the number is too long"),
        (b"name: [a\n", "job.yaml:2:1: not readable as YAML: "),
        (b"name: *other\n", "job.yaml:1:7: not readable as YAML: found undefined alias"),
        (b"---\nname: a\n---\nname: b\n", "job.yaml:3:1: not readable as YAML: expected a single"),
        (b"name: !!python/name:os.system x\n", "job.yaml:1:7: the tag "),
        (b"name: !env HOME\n", "job.yaml:1:7: the tag '!env' is not allowed"),
        (b"name: !!int x\n", "job.yaml:1:7: the tag "),
        (b"1: x\n", "job.yaml:1:1: a key should be text"),
        (b"[a]: x\n", "job.yaml:1:1: a key should be text"),
        (b"name: " + b"[" * 5000, "job.yaml:1:56: not readable as YAML: nested deeper"),
        (b"name: &a [*a]\n", "its aliases expand to too much"),
        (b"x" * (1 << 20) + b"x", "is larger than 1048576 bytes"),
    ],
)
def test_what_is_no_job_file_is_said_so(load_text, data, expected):
    [line] = error_of(load_text, data)
    assert expected in line
    assert line.startswith("job.yaml")


def test_an_alias_bomb_is_refused(load_text):
    bomb = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    for level in range(1, 12):
        bomb.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]")
    [line] = error_of(load_text, "\n".join(bomb))
    assert "its aliases expand to too much" in line


def test_aliases_are_copies(load_text, minimal):
    text = minimal.replace("uri: data", "columns: &names [a, b], uri: data")
    text += "sampling: {stop: *names}\n"
    spec = load_text(text, ["input.columns.0=z"])
    assert spec.input.columns == ("z", "b")
    assert spec.sampling.stop == ("a", "b")


def test_a_file_that_cannot_be_read(tmp_path: Path):
    for path in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(JobFileError, match=f"^{path}: the job file cannot be read: "):
            load_job(path)


def test_a_byte_order_mark_is_no_part_of_the_first_key(load_text, minimal):
    assert load_text(b"\xef\xbb\xbf" + minimal.encode()).name == "job"


def test_overrides(load_text, minimal):
    spec = load_text(
        minimal,
        [
            "sampling.temperature=0.7",
            "sampling.temperature=0.8",
            "prompt={messages: [{role: user, content: a}, {role: user, content: b}]}",
            "prompt.messages.1.content='{{ text }}'",
            "input.storage_options.client_kwargs.endpoint_url=http://127.0.0.1",
        ],
    )
    assert spec.sampling.temperature == 0.8
    assert [message.content for message in spec.prompt.messages or ()] == ["a", "{{ text }}"]
    options = {"client_kwargs": {"endpoint_url": "http://127.0.0.1"}}
    assert spec.input.storage_options == options


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "sampling.temprature=1",
            "-o sampling.temprature: sampling.temprature: unknown key; did you mean 'temperature'?",
        ),
        ("smapling.seed=1", "-o smapling.seed: smapling: unknown key; did you mean 'sampling'?"),
        (
            "sampling={temperature: hot}",
            "-o sampling: sampling.temperature: should be a number (got 'hot')",
        ),
        ("sampling", "-o: should be key=value, such as -o sampling.temperature=0.7"),
        ("a..b=1", "-o: should be key=value, such as -o sampling.temperature=0.7"),
        ("=1", "-o: should be key=value, such as -o sampling.temperature=0.7"),
        ("input.uri.x=1", "-o input.uri.x: input.uri holds no keys (got 'data/*.jsonl')"),
        ("name.x.y=1", "-o name.x.y: name is a list"),
        ("name.2=1", "-o name.2: name is a list of 2; name an item by its index, from 0"),
        (
            "prompt.template={{ text }}",
            "-o prompt.template: the value is read as YAML; put it in quotes to mean text: "
            "a key should be text; put it in quotes",
        ),
    ],
)
def test_overrides_that_are_wrong(load_text, minimal, override, line):
    overrides = ["name=[1, 2]", override] if override.startswith("name.") else [override]
    [found] = error_of(load_text, minimal, overrides)
    assert found.startswith(line)


def test_params_are_replaced_in_uris_only(load_text):
    text = """\
        params: {date: "2026-01-01", lang: fr}
        input: {uri: ["in/${params.date}/*.jsonl", plain]}
        prompt: {template: "${params.date} {{ text }}"}
        model: {name_or_path: "${params.lang}"}
        output: {uri: "out/${params.lang}/${params.date}"}
        checkpoint: {uri: "ledger/${params.lang}"}
    """
    spec = load_text(text, ["params.lang=de"], ["date=2026-02-02=b"])
    assert spec.input.uri == ("in/2026-02-02=b/*.jsonl", "plain")
    assert spec.output.uri == "out/de/2026-02-02=b"
    assert spec.checkpoint.uri == "ledger/de"
    assert spec.prompt.template == "${params.date} {{ text }}"
    assert spec.model.name_or_path == "${params.lang}"


@pytest.mark.parametrize(
    ("uri", "param", "line"),
    [
        (
            "a/${params.dat}",
            "date=1",
            "-o output.uri: output.uri: the job declares no param 'dat'; did you mean 'date'?",
        ),
        (
            "a/${date}",
            "date=1",
            "-o output.uri: output.uri: only ${params.name} is replaced in a uri (got '${date}')",
        ),
        (
            "a/${params.date",
            "date=1",
            "-o output.uri: output.uri: only ${params.name} is replaced in a uri "
            "(got '${params.date')",
        ),
        ("a", "dates=1", "-p dates: the job declares no such param; did you mean 'date'?"),
        ("a", "date", "-p: should be key=value, such as -p date=2026-01-01"),
    ],
)
def test_params_that_are_wrong(load_text, minimal, uri, param, line):
    text = f"{minimal}params: {{date: ''}}\n"
    assert error_of(load_text, text, [f"output.uri={uri}"], [param]) == [line]


def test_every_unbuilt_key_has_a_case():
    assert UNBUILT.keys() == BUILT_VALUES.keys()
    assert UNBUILT.keys() <= set(job_keys())


@pytest.mark.parametrize("key", BUILT_VALUES)
def test_an_unbuilt_feature_is_refused_by_name(load_text, minimal, key):
    values = yaml.safe_load(minimal)
    *sections, last = key.split(".")
    section = values.setdefault(sections[0], {}) if sections else values
    section[last] = yaml.safe_load(UNBUILT[key])
    values["model"]["revision"] = "0a" * 20  # which trust_remote_code needs
    text = json.dumps(values, indent=1)
    line = next(n for n, line in enumerate(text.split("\n"), 1) if f'"{last}"' in line)
    with pytest.raises(UnsupportedError) as caught:
        load_text(text)
    assert caught.value.exit_code == 2
    message = str(caught.value)
    assert message.startswith(f"job.yaml:{line}:")
    assert f": {key}: not built yet (got " in message
    assert "; set it to " in message


@pytest.mark.parametrize(("key", "built"), BUILT_VALUES.items())
def test_the_first_built_value_is_the_default(load_text, minimal, key, built):
    value: object = load_text(minimal)
    for part in key.split("."):
        value = getattr(value, part)
    assert value == built[0]


def test_several_unbuilt_features_are_refused_at_once(load_text, minimal):
    with pytest.raises(UnsupportedError) as caught:
        load_text(f"{minimal}sampling: {{logprobs: 2}}\nengine: {{tensor_parallel_size: 2}}\n")
    assert str(caught.value).split("\n") == [
        "job.yaml:5:12: sampling.logprobs: not built yet (got 2); set it to null",
        "job.yaml:6:10: engine.tensor_parallel_size: not built yet (got 2); set it to 1",
    ]


@pytest.mark.parametrize(
    ("input_section", "overrides"),
    [
        ("{uri: a, storage_options: hunter2}", []),
        ("{uri: a, storage_options: [hunter2]}", []),
        ("{uri: a, storage_option: {secret: hunter2}}", []),
        ("{uri: a, secret: hunter2}", []),
        ("{uri: a, storage_options: {secret: hunter2, secret: hunter2}}", []),
        ("{uri: a, storage_options: {secret: 'hunter2}}", []),
        ("{uri: a, storage_options: {secret: !secret hunter2}}", []),
        ("{uri: a, storage_options: {secret: hunter2}, limit: 0}", []),
        ("{uri: a, limit: 0}", ["input.storage_options.secret=hunter2"]),
        ("{uri: a}", ["input.storage_options=hunter2"]),
        ("{uri: a}", ["input.storage_option.secret=hunter2"]),
        ("{uri: a}", ["input.storage_options.secret:hunter2"]),
        ("{uri: a}", ["input.storage_options.secret=[hunter2"]),
    ],
)
def test_secrets_are_not_told(load_text, minimal, input_section, overrides):
    text = minimal.replace("{uri: data/*.jsonl}", input_section)
    assert "hunter2" not in "\n".join(error_of(load_text, text, overrides))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)
job_like = st.dictionaries(
    st.sampled_from([*JobSpec.model_fields, "other"]),
    json_values
    | st.dictionaries(
        st.sampled_from([key.rpartition(".")[2] for key in job_keys()]), json_values, max_size=4
    ),
)


yaml_like = st.text(alphabet="ab:[]{}&*!?|>-'\"%@\\\n\t #,<~=u0", max_size=60)


def load_or_refuse(path: Path, overrides: list[str]) -> None:
    with suppress(BatchgenError):
        load_job(path, overrides)


FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@FUZZ
@given(
    data=st.binary()
    | st.text(alphabet="ab:[]{}&*!?|>-'\"%@\\\n\t #,<~=u0", max_size=60).map(str.encode)
)
def test_any_bytes_are_a_job_or_an_error(tmp_path, data):
    path = tmp_path / "job.yaml"
    path.write_bytes(data)
    load_or_refuse(path, [])


@FUZZ
@given(values=job_like, key=st.sampled_from(sorted(job_keys())), override=json_values)
def test_any_structure_is_a_job_or_an_error(tmp_path, values, key, override):
    path = tmp_path / "job.yaml"
    path.write_text(json.dumps(values))
    load_or_refuse(path, [f"{key}={json.dumps(override)}", f"{key}.a={override}"])
