"""Finds how much of a text can stay in a prompt whose length only encoding it tells."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from batchgen.prompts.row_error import RowError

_MAX_GUESSES = 4
_SLACK_TOKENS = 2


def longest_fitting(
    encode_with: Callable[[int], Sequence[int] | RowError],
    num_parts: int,
    num_tokens: int,
    max_tokens: int,
) -> Sequence[int] | RowError | None:
    """The ids of the longest prompt (or nearly so) of at most `max_tokens`.

    `encode_with(k)` encodes the prompt with k of the text's `num_parts` tokens; with all of them
    it has `num_tokens`. None where not even one token of the text has room. Tokens merge
    differently once a text is cut, hence guesses at first, and halving if they do not settle.
    """
    fits, fails = 0, num_parts
    best: Sequence[int] | None = None
    guess = num_parts - (num_tokens - max_tokens)
    num_guesses = 0
    while fails - fits > 1:
        if num_guesses >= _MAX_GUESSES:
            guess = (fits + fails) // 2
        guess = min(max(guess, fits + 1), fails - 1)
        num_guesses += 1
        token_ids = encode_with(guess)
        if isinstance(token_ids, RowError):
            return token_ids
        room = max_tokens - len(token_ids)
        if room < 0:
            fails = guess
        else:
            fits, best = guess, token_ids
            if room <= _SLACK_TOKENS:
                break
        guess += room
    return best
