"""Rows, builders and a small tokenizer with defaults: a test states only what matters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from batchgen.job.spec import PromptSpec, SamplingSpec
from batchgen.prompts.builder import PromptBuilder
from batchgen.records import InputRow, Prompt, RowFailure, RowKey

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' "
    "+ message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"]
TEXT = [
    "Translate the text into French. The cat sat on the mat, and the dog looked at the cat.",
    "system user assistant: You are a helpful assistant. Answer with the translation only.",
    "Numbers such as 12, 345 and 6789; quotes \"like this\" and 'that'; x < y > z | im end.",
]


def make_tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Byte-level BPE with ChatML tokens, as SmolLM2's is, trained here."""
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    # Like Qwen3's: a token that is added but not special.
    backend.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        bos_token="<|im_start|>",
        chat_template=chat_template,
    )


def make_row(index: int = 0, **values: object) -> InputRow:
    return InputRow(
        key=RowKey(unit_id=0, index=index), address=f"data.jsonl:{index}", values=values
    )


def make_builder(
    tokenizer: PreTrainedTokenizerFast,
    *,
    max_model_len: int = 512,
    max_tokens: int = 16,
    sampling: dict[str, Any] | None = None,
    **prompt: Any,
) -> PromptBuilder:
    return PromptBuilder(
        PromptSpec.model_validate(prompt),
        SamplingSpec.model_validate({"max_tokens": max_tokens, **(sampling or {})}),
        tokenizer,
        max_model_len,
    )


def user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def only(results: list[Prompt | RowFailure]) -> Prompt:
    (result,) = results
    assert isinstance(result, Prompt), result
    return result


def failure(results: list[Prompt | RowFailure]) -> RowFailure:
    (result,) = results
    assert isinstance(result, RowFailure), result
    return result
