"""Stop strings: found by the host after each window, because they cross token borders.

Stop tokens, eos, min_tokens and length limits are checked on the device (sampler, model_runner).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from batchgen.engine.step_plan import Int32

Decode = Callable[[Sequence[Sequence[int]]], list[str]]  # batched, special tokens kept


class StopStrings:
    """Looks for any of `stop` in the text of a row's newest tokens."""

    def __init__(self, stop: Sequence[str], decode: Decode) -> None:
        self.stop = tuple(stop)
        self._decode = decode
        # A token has at least one byte, but the bytes of one character may be several tokens.
        self._overlap = max(len(text.encode()) for text in stop) + 4

    def find(
        self, token_ids: Sequence[Int32], num_new: Sequence[int], min_tokens: int
    ) -> list[int | None]:
        """For each row, how many tokens it keeps if a stop string ends in its new tokens.

        The count includes the token in which the stop string is completed. A stop string that is
        complete before `min_tokens` tokens does not count.
        """
        tails = [
            ids[max(0, len(ids) - new - self._overlap) :].tolist()
            for ids, new in zip(token_ids, num_new, strict=True)
        ]
        found: list[int | None] = []
        for ids, new, tail, text in zip(
            token_ids, num_new, tails, self._decode(tails), strict=True
        ):
            hit = any(stop in text for stop in self.stop)
            found.append(self._first(ids, new, tail, min_tokens) if hit else None)
        return found

    def _first(self, ids: Int32, new: int, tail: list[int], min_tokens: int) -> int | None:
        """The shortest prefix whose last token, a new one, completes a stop string."""
        ends = range(len(tail) - new, len(tail) + 1)
        texts = self._decode([tail[:end] for end in ends])
        counts = [sum(text.count(stop) for stop in self.stop) for text in texts]
        for end, before, after in zip(ends[1:], counts, counts[1:], strict=False):
            num_tokens = len(ids) - len(tail) + end
            if num_tokens >= min_tokens and after > before:
                return num_tokens
        return None
