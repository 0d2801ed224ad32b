"""A whole job file as a type: `JobSpec`. `loading.load_job` makes one from a file.

The sections that say what is computed are in `sections`; here are those that say where it goes.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from batchgen.job.base import (
    Auto,
    FromList,
    HttpEndpoint,
    NoticeSource,
    PositiveInt,
    Seconds,
    Section,
    Text,
    TextList,
)
from batchgen.job.sections import (
    EngineSpec,
    InputSpec,
    MessageSpec,
    ModelSpec,
    PromptSpec,
    SamplingSpec,
    StructuredSpec,
)

__all__ = [
    "BudgetSpec",
    "CheckpointSpec",
    "DistributedSpec",
    "EngineSpec",
    "ErrorsSpec",
    "InputSpec",
    "JobSpec",
    "MessageSpec",
    "ModelSpec",
    "ObservabilitySpec",
    "OutputColumns",
    "OutputSpec",
    "PreemptionSpec",
    "PromptSpec",
    "SamplingSpec",
    "StructuredSpec",
]

Compression = Literal["zstd", "lz4", "snappy", "gzip"]
_COMPRESSIONS: dict[str, tuple[Compression, ...]] = {
    "arrow": ("zstd", "lz4"),
    "parquet": ("zstd", "lz4", "snappy", "gzip"),
    "jsonl": ("zstd", "gzip"),
}


class OutputColumns(Section):
    """The columns of the output."""

    keep: TextList = Field(default=(), description="Input columns to copy to the output.")
    response: Text = Field(default="response", description="The name of the answer's column.")
    meta: bool = Field(
        default=True,
        description="Add finish_reason, prompt_tokens, output_tokens, seed, row_address; with "
        "beams, beam_score, and with n_layout explode, sample_index too.",
    )


class OutputSpec(Section):
    """The dataset that the job writes."""

    uri: Text = Field(
        description="The folder of the dataset: a path or an fsspec url. A relative path starts "
        "at the current directory. ${params.name} is replaced."
    )
    format: Literal["arrow", "parquet", "jsonl"] = Field(
        default="arrow",
        description="arrow opens with datasets.load_from_disk, parquet with load_dataset.",
    )
    columns: OutputColumns = Field(
        default=OutputColumns(), description="The columns of the output."
    )
    n_layout: Literal["list", "explode"] = Field(
        default="list",
        description="With sampling.n above 1: a list in one row, or a row of output each.",
    )
    max_shard_rows: PositiveInt = Field(default=100_000, description="The most rows of one file.")
    compression: Compression | None = Field(
        default="zstd", description="null compresses nothing. Not every format has every codec."
    )
    overwrite: Text = Field(
        default="never", description="Whether a finished dataset may be replaced."
    )

    @model_validator(mode="after")
    def _format_has_codec(self) -> Self:
        codecs = _COMPRESSIONS[self.format]
        if self.compression is not None and self.compression not in codecs:
            raise ValueError(
                f"compression of {self.format} should be {', '.join(codecs)} or null "
                f"(got {self.compression!r})"
            )
        return self


class CheckpointSpec(Section):
    """The ledger: what is done, so that a run can be resumed."""

    uri: Text | None = Field(
        default=None,
        description="The ledger's folder; null is <output>/.batchgen. ${params.name} is replaced.",
    )
    unit_rows: PositiveInt = Field(default=4096, description="Rows that are committed at once.")
    flush_interval: Seconds = Field(
        default=30.0, description="The most work, as a time, that a kill may cost: 30s, 5m, 30."
    )
    resume: Literal["if_possible", "always", "never"] = Field(
        default="if_possible",
        description="always refuses to begin anew, never refuses to go on with an old run.",
    )


class ErrorsSpec(Section):
    """What becomes of rows that fail."""

    on_error: Literal["dead_letter", "record", "fail"] = Field(
        default="dead_letter", description="dead_letter sets the row aside, fail ends the run."
    )
    max_error_rate: float = Field(
        default=0.05, ge=0, le=1, description="End the run when more of the last rows failed."
    )
    window: PositiveInt = Field(default=500, description="How many last rows that rate is over.")
    watchdog: Seconds | None = Field(
        default=900.0,
        description="End a run in which nothing has happened for so long: 15m; null never does.",
    )


class PreemptionEndpoints(Section):
    """Where the metadata servers of the clouds are."""

    aws: HttpEndpoint = Field(default="http://169.254.169.254", description="EC2, by IMDSv2.")
    gcp: HttpEndpoint = Field(
        default="http://metadata.google.internal", description="Compute Engine."
    )
    azure: HttpEndpoint = Field(default="http://169.254.169.254", description="Azure's IMDS.")


class PreemptionSpec(Section):
    """The machine may go away: the run saves what it has and ends with exit code 75."""

    watch: Auto | Annotated[tuple[NoticeSource, ...], FromList] = Field(
        default="auto",
        description="Where notice of it comes from; auto is [sigterm, sigusr1].",
    )
    lead_time: Auto | Seconds = Field(
        default="auto",
        description="From the notice to the end of the machine; a margin is kept. auto is 120s for "
        "aws and 30s for the others, or what a cloud's notice says.",
    )
    endpoints: PreemptionEndpoints = Field(
        default=PreemptionEndpoints(), description="Where the metadata servers are."
    )
    drain_timeout: Auto | Seconds = Field(
        default="auto", description="The longest wait for running rows."
    )


class DistributedSpec(Section):
    """Several workers on one job."""

    backend: Text = Field(default="local", description="What starts the workers.")
    workers: PositiveInt = Field(default=1, description="How many.")


class BudgetSpec(Section):
    """Limits at which a run saves what has finished and ends with exit code 7, resumable."""

    max_wall_time: Seconds | None = Field(
        default=None,
        description="The wall time of one run, from the start of the command: 8h, 30m, 90.",
    )
    max_output_tokens: PositiveInt | None = Field(
        default=None,
        description="The output tokens of the job's finished rows, those of earlier runs as well.",
    )


class ObservabilitySpec(Section):
    """What a run shows of itself, on stderr."""

    progress: Literal["auto", "bar", "log", "none"] = Field(
        default="auto", description="auto is a bar on a terminal and log lines elsewhere."
    )
    log_format: Literal["text", "json"] = Field(default="text", description="Of log lines.")
    prometheus_port: int | None = Field(
        default=None, ge=1, le=65535, description="Serve metrics at this port."
    )


class JobSpec(Section):
    """A batchgen job: which rows, which prompt, which model, where the answers go."""

    version: Literal[1] = Field(default=1, description="Of this file's form.")
    name: Text = Field(default="job", description="The job's name, for people.")
    params: dict[str, str] = Field(
        default={},
        description="Texts for ${params.name} in uris, and their defaults: -p name=value.",
    )
    input: InputSpec = Field(description="Which rows the job reads.")
    prompt: PromptSpec = Field(description="How a row becomes a prompt.")
    model: ModelSpec = Field(description="Which model answers.")
    sampling: SamplingSpec = Field(
        default=SamplingSpec(), description="How the next token is chosen."
    )
    structured: StructuredSpec | None = Field(
        default=None, description="What an output must match."
    )
    engine: EngineSpec = Field(
        default=EngineSpec(), description="How to run; only kv_cache_dtype changes the output."
    )
    output: OutputSpec = Field(description="The dataset that the job writes.")
    checkpoint: CheckpointSpec = Field(
        default=CheckpointSpec(), description="The ledger: what is done."
    )
    errors: ErrorsSpec = Field(default=ErrorsSpec(), description="What becomes of rows that fail.")
    preemption: PreemptionSpec = Field(
        default=PreemptionSpec(), description="The machine may go away."
    )
    distributed: DistributedSpec = Field(
        default=DistributedSpec(), description="Several workers on one job."
    )
    budget: BudgetSpec = Field(default=BudgetSpec(), description="What a run may use.")
    observability: ObservabilitySpec = Field(
        default=ObservabilitySpec(), description="What a run shows of itself."
    )

    @property
    def has_beams(self) -> bool:
        """Outputs are found by beam search."""
        return self.sampling.beam_width is not None

    @property
    def output_rows_per_row(self) -> int:
        """Rows of output that a row of input which succeeds becomes."""
        return self.sampling.n if self.output.n_layout == "explode" else 1
