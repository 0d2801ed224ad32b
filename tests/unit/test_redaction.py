"""Which texts lose what: secrets go, what names a row stays."""

from __future__ import annotations

import pytest

from batchgen.dataset.storage import Storage
from batchgen.errors import JobFileError, UsageError
from batchgen.job.loading import load_job
from batchgen.job.spec import InputSpec
from batchgen.redaction import (
    environment_secrets,
    has_secret,
    redact,
    redact_message,
    secret_values,
)

SECRET = "hunter2hunter2"

URIS = [
    f"https://me:{SECRET}@x.org/a.jsonl",
    f"https://{SECRET}@x.org/a.jsonl",
    f"https://me:p@{SECRET}@x.org/a.jsonl",
    f"HTTPS://x.org/a.jsonl?sv=1&SIG={SECRET}",
    f"https://x.org/a.jsonl?X-Amz-Signature={SECRET}&X-Amz-Credential={SECRET}",
    f"az://c/a.jsonl?sv=2024&sig={SECRET}",
    f"s3://bucket/a.jsonl?AWSAccessKeyId=1&Signature={SECRET}",
    f"s3://key:{SECRET}@bucket/a",
    f"gs://b/a?access_token={SECRET}",
]


@pytest.mark.parametrize("uri", URIS)
def test_a_uri_loses_its_secrets(uri: str) -> None:
    assert SECRET not in redact(uri)
    assert SECRET not in redact_message(f"GET {uri} failed: 403")
    assert f"'{SECRET}" not in redact(f"cannot read '{uri}'")


@pytest.mark.parametrize("uri", [uri for uri in URIS if f"/{SECRET}@" not in uri])
def test_an_output_with_secrets_is_refused(uri: str) -> None:
    assert has_secret(uri)
    with pytest.raises(UsageError, match="credentials") as caught:
        Storage.open(uri)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        "data/token=5/secret=x/a.jsonl",
        "s3://bucket/password/a b@c.jsonl",
        "s3://bucket/a?.jsonl",
        "/home/me/api_key=3.parquet",
        "https://x.org:8080/a@b/tokens.jsonl",
        "hf://datasets/org/name@main/data/*.parquet",
        "memory://x/sig=1",
    ],
)
def test_a_uri_without_secrets_stays(uri: str) -> None:
    assert redact(uri) == uri
    assert not has_secret(uri)


@pytest.mark.parametrize(
    "message",
    [
        f"InvalidAccess: secret={SECRET}",
        f'{{"password": "{SECRET}", "a": 1}}',
        f"header Authorization: Bearer {SECRET}",
        f"AccountName=x;AccountKey={SECRET};EndpointSuffix=y",
        f"SharedAccessSignature={SECRET}",
        f"aws_secret_access_key = {SECRET}",
        f"x-amz-security-token: {SECRET}",
        f"{{'hf_token': '{SECRET}'}}",
        f"Cookie: {SECRET}",
    ],
)
def test_a_message_of_somebody_else_loses_named_secrets(message: str) -> None:
    assert SECRET not in redact_message(message)


def test_a_message_loses_the_values_of_the_options() -> None:
    options = {
        "key": "AKIAxyz123",
        "client_kwargs": {
            "headers": {"Authorization": "Basic abc+/=="},
            "endpoint_url": "http://x",
        },
        "token": {"refresh": "from-the-depth", "list": ["and-a-list"]},
        "secret": "x(y)[z]{2}*+?",
        "endpoint_url": "http://stays",
        "anon": False,
    }
    text = " ".join(
        ["AKIAxyz123", "Basic abc+/==", "from-the-depth", "and-a-list", "x(y)[z]{2}*+?", "stays"]
    )
    assert redact_message(text, options) == "*** *** *** *** *** stays"
    assert "http://stays" not in secret_values(options)


def test_the_environment_names_secrets_and_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PWD", "OLDPWD"):
        monkeypatch.setenv(name, "/srv/jobs")
    for name in ("DB_PWD", "HF_TOKEN"):
        monkeypatch.setenv(name, SECRET)
    text = redact_message(f"/srv/jobs/data holds no {SECRET}", environment_secrets())
    assert text == "/srv/jobs/data holds no ***"


def test_words_that_only_look_like_names_of_secrets_stay() -> None:
    text = "max_tokens: 5, stop_token_ids: [1], token_id=3, tokenizer: x, design: y, saskia=1"
    assert redact_message(text) == text


def test_a_job_shows_no_storage_options() -> None:
    spec = InputSpec(uri="x", storage_options={"secret": SECRET})
    assert SECRET not in repr(spec)
    assert SECRET not in str(spec)


@pytest.mark.parametrize(
    "override",
    [
        f"input.storage_options=[{SECRET}]",
        f"input.storage_options={SECRET}",
        f"input.storage_option.secret={SECRET}",
        f"version=https://a:{SECRET}@b",
        f"input.storage_options.secret={{a: {SECRET}",
    ],
)
def test_a_problem_with_the_job_file_quotes_no_secret(override: str, tmp_path: object) -> None:
    path = f"{tmp_path}/job.yaml"
    with open(path, "w") as file:
        file.write(
            "{input: {uri: x}, prompt: {template: x}, model: {name_or_path: x}, output: {uri: y}}"
        )
    with pytest.raises(JobFileError) as caught:
        load_job(path, [override])
    assert SECRET not in str(caught.value)
