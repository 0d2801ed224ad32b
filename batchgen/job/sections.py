"""The sections of a job file, in its order. Keys, defaults and values are the contract."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from batchgen.job.base import (
    Auto,
    FromList,
    NonEmptyTextList,
    PositiveInt,
    PowerOfTwo,
    Section,
    Text,
    TextList,
    TokenIdList,
)

PROMPT_SOURCES = ("messages", "template", "messages_column", "prompt_column")


class InputSpec(Section):
    """Which rows the job reads."""

    uri: Text | NonEmptyTextList = Field(
        description="A path, an fsspec url, a glob, a folder, or a list of these. Relative paths "
        "start at the current directory. ${params.name} is replaced.",
    )
    format: Literal["auto", "parquet", "jsonl", "arrow", "csv", "openai-batch"] = Field(
        default="auto", description="auto goes by the file names' endings."
    )
    columns: TextList | None = Field(
        default=None, description="The columns to read; null reads those that the file has."
    )
    limit: PositiveInt | None = Field(
        default=None, description="Read only the first so many rows of the whole input."
    )
    incremental: bool = Field(
        default=False,
        description="Files that come to the input after the job began are processed by the next "
        "run; the output grows. Files that were there stay as they are.",
    )
    storage_options: dict[str, Any] = Field(
        default={}, description="Options of the input's fsspec file system, such as credentials."
    )
    on_bad_record: Literal["fail", "skip", "dead_letter"] = Field(
        default="dead_letter", description="What becomes of a record that cannot be read."
    )

    @model_validator(mode="after")
    def _grows_without_limit(self) -> Self:
        if self.incremental and self.limit is not None:
            raise ValueError(
                "incremental and limit do not go together: files that are added could come before "
                "the rows that were read; set one of the two"
            )
        return self


class MessageSpec(Section):
    """One message of a chat."""

    role: Literal["system", "user", "assistant", "tool", "developer"] = Field(
        description="Who says it, as the model's chat template names the roles."
    )
    content: str = Field(description="A jinja2 template over the row's columns: {{ text }}.")


class PromptSpec(Section):
    """How a row becomes a prompt: one of messages, template, messages_column, prompt_column."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"required": [name], "properties": {name: {"not": {"type": "null"}}}}
                for name in PROMPT_SOURCES
            ]
        }
    )

    messages: Annotated[tuple[MessageSpec, ...], Field(min_length=1), FromList] | None = Field(
        default=None, description="A chat, put into the model's chat template."
    )
    template: Text | None = Field(
        default=None, description="A jinja2 template of the whole prompt; no chat template."
    )
    messages_column: Text | None = Field(
        default=None, description="The column that holds a chat: a list of {role, content}."
    )
    prompt_column: Text | None = Field(
        default=None, description="The column that holds the whole prompt; no chat template."
    )
    chat_template: Text | None = Field(
        default=None, description="A chat template (jinja2) in the place of the model's own."
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default={}, description="Variables for the chat template, such as enable_thinking."
    )
    max_prompt_tokens: PositiveInt | None = Field(
        default=None,
        description="The longest prompt, in tokens; null is the model's length, less one token "
        "(or sampling.min_tokens) for the output.",
    )
    overflow: Literal["dead_letter", "truncate_start", "truncate_end", "fail"] = Field(
        default="dead_letter", description="What becomes of a prompt that is too long."
    )
    special_tokens_in_data: Literal["neutralize", "allow", "error"] = Field(
        default="neutralize",
        description="What becomes of text such as <|im_end|> in a row: plain text, the special "
        "token itself, or a failed row.",
    )

    @model_validator(mode="after")
    def _has_one_source(self) -> Self:
        given = [name for name in PROMPT_SOURCES if getattr(self, name) is not None]
        if len(given) != 1:
            wanted = ", ".join(PROMPT_SOURCES)
            raise ValueError(f"set exactly one of {wanted} (got {' and '.join(given) or 'none'})")
        is_raw = given[0] in ("template", "prompt_column")
        if is_raw and (self.chat_template is not None or self.chat_template_kwargs):
            raise ValueError(f"chat_template and chat_template_kwargs do nothing with {given[0]}")
        return self


class ModelSpec(Section):
    """Which model answers."""

    name_or_path: Text = Field(
        description="A hub id, a folder, a .gguf file, or pkg://package/file inside an installed "
        "Python package."
    )
    revision: Text | None = Field(default=None, description="The hub revision; null is the newest.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        default="auto", description="What weights and KV are computed in."
    )
    quantization: Text | None = Field(
        default=None,
        description="fp8: the layers' matrices, a scale for each output, and their inputs, a scale "
        "for each token, in 8 bits; embedding, norms and lm_head stay in dtype.",
    )
    trust_remote_code: bool = Field(default=False, description="Run code that comes with a model.")
    max_model_len: PositiveInt | None = Field(
        default=None, description="Prompt and output tokens of a row; null is the model's limit."
    )


class SamplingSpec(Section):
    """How the next token is chosen. temperature 0 is greedy."""

    temperature: float = Field(default=0.0, ge=0, description="0 always takes the likeliest token.")
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="Sample from the likeliest tokens of this total."
    )
    top_k: int = Field(default=0, ge=0, description="Sample from so many tokens; 0 is all.")
    min_p: float = Field(
        default=0.0, ge=0, le=1, description="Drop tokens below this share of the likeliest one's."
    )
    max_tokens: PositiveInt = Field(default=256, description="The longest output of a row.")
    min_tokens: int = Field(default=0, ge=0, description="No stop before so many tokens.")
    n: int = Field(
        default=1, ge=1, le=64, description="Outputs for each row; above 1, needs a temperature."
    )
    stop: TextList = Field(default=(), description="Texts that end an output and are cut off it.")
    stop_token_ids: TokenIdList = Field(default=(), description="Further tokens that end it.")
    ignore_eos: bool = Field(default=False, description="Go on past the model's end token.")
    seed: int = Field(default=0, ge=0, description="With a row's address: the row's randomness.")
    logprobs: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="Log probabilities of so many tokens at each position."
    )
    presence_penalty: float = Field(
        default=0.0, ge=-2, le=2, description="Taken off the logit of each token used so far."
    )
    frequency_penalty: float = Field(
        default=0.0, ge=-2, le=2, description="The same, times how often it was used."
    )
    repetition_penalty: float = Field(
        default=1.0, gt=0, description="Divides the logit of tokens in the prompt or output."
    )
    beam_width: PositiveInt | None = Field(default=None, description="Beams of a beam search.")

    @model_validator(mode="after")
    def _min_fits_max(self) -> Self:
        if self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens should be at most max_tokens "
                f"(got min_tokens {self.min_tokens}, max_tokens {self.max_tokens})"
            )
        return self

    @model_validator(mode="after")
    def _samples_differ(self) -> Self:
        if self.n > 1 and self.temperature == 0:
            raise ValueError(
                f"n should be 1 at temperature 0, where all samples are the same "
                f"(got n {self.n}); set a temperature, or n to 1"
            )
        return self


class StructuredSpec(Section):
    """What an output must match: one of choice, regex, json_schema."""

    choice: NonEmptyTextList | None = Field(default=None, description="One of these texts.")
    regex: Text | None = Field(default=None, description="A regular expression.")
    json_schema: dict[str, Any] | None = Field(default=None, description="A JSON Schema.")
    mode: Literal["generate", "score"] = Field(
        default="generate", description="Generate the text, or score each choice."
    )

    @model_validator(mode="after")
    def _has_one_kind(self) -> Self:
        if [self.choice, self.regex, self.json_schema].count(None) != 2:
            raise ValueError("set exactly one of choice, regex, json_schema")
        return self


class EngineSpec(Section):
    """How to run; of its keys, only kv_cache_dtype changes what is computed."""

    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$",
        description="auto, cpu, cuda, or cuda:N. auto takes a GPU if there is one.",
    )
    gpu_memory_utilization: float = Field(
        default=0.92, gt=0, le=1, description="The share of the GPU's memory to use."
    )
    cpu_swap_gib: Auto | Annotated[float, Field(ge=0)] = Field(
        default="auto", description="Host memory for swapped-out sequences, in GiB."
    )
    block_size: PowerOfTwo = Field(
        default=16, ge=4, description="Tokens of a KV block: a power of two, 4 or more."
    )
    max_num_seqs: Auto | PositiveInt = Field(
        default="auto", description="The most sequences that run at once."
    )
    max_num_batched_tokens: Auto | PositiveInt = Field(
        default="auto", description="The most tokens of one step."
    )
    num_gpu_blocks: Auto | PositiveInt = Field(
        default="auto", description="KV blocks of the device pool; set it small to force swapping."
    )
    enable_prefix_caching: bool = Field(
        default=True, description="Compute a prefix that rows share once."
    )
    kv_cache_dtype: Text = Field(
        default="auto", description="What the KV is stored in: auto is model.dtype, or fp8."
    )
    tensor_parallel_size: PositiveInt = Field(default=1, description="GPUs that share the model.")
