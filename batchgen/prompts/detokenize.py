"""Outputs as text."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from batchgen.records import SampleOutput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def detokenize(
    tokenizer: PreTrainedTokenizerFast,
    outputs: Sequence[SampleOutput],
    stop: Sequence[str] = (),
    stop_token_ids: Collection[int] = (),
) -> list[str]:
    """The text of each output, without special tokens, its stop token and its stop string.

    `stop_token_ids` are all that may end an output: the model's end tokens and the job's.
    """
    token_ids = [
        output.token_ids[:-1]
        if output.finish_reason == "stop" and output.token_ids[-1] in stop_token_ids
        else output.token_ids
        for output in outputs
    ]
    texts = _decode(tokenizer, token_ids)
    if not stop:
        return texts
    stopped = [
        index
        for index, output in enumerate(outputs)
        if output.finish_reason == "stop"
        and len(token_ids[index]) == len(output.token_ids)
        and any(string in texts[index] for string in stop)
    ]
    last_texts = _decode(tokenizer, [token_ids[index][-1:] for index in stopped])
    for index, last_text in zip(stopped, last_texts, strict=True):
        texts[index] = _cut(texts[index], stop, last_text)
    return texts


def _decode(tokenizer: PreTrainedTokenizerFast, token_ids: Sequence[Sequence[int]]) -> list[str]:
    # Below transformers' decode there is no cleaning up of spaces, and other threads run meanwhile.
    texts: list[str] = tokenizer.backend_tokenizer.decode_batch(
        [list(ids) for ids in token_ids], skip_special_tokens=True
    )
    return texts


def _cut(text: str, stop: Sequence[str], last_text: str) -> str:
    """The text before the stop string that its last token completed.

    Not simply before the first: up to `min_tokens` a stop string does not stop. One character
    of slack is for the space that a decoder leaves out before a lone token.
    """
    ends = []
    for string in stop:
        earliest = len(text) - len(last_text) - len(string) - 1
        position = text.find(string, max(earliest, 0))
        if position >= 0:
            ends.append(position)
    return text[: min(ends)] if ends else text
