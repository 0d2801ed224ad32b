"""A run's progress on stderr: a bar on a terminal, plain lines every ten seconds elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Self, TextIO

from tqdm import tqdm

from batchgen.records import EngineStats

ProgressMode = Literal["auto", "bar", "log", "none"]
LOG_INTERVAL_S = 10.0
BAR_INTERVAL_S = 0.5
_RATE_WINDOW_S = 20.0
_DEFAULT_COLUMNS = 100
_BAR_FORMAT = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} rows{postfix}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunProgress:
    """Where a run is. Rows that earlier runs have ended count as well; tokens are this run's."""

    total_rows: int
    ok_rows: int = 0
    failed_rows: int = 0
    skipped_rows: int = 0
    engine: EngineStats = field(default_factory=EngineStats)
    budget_share: float | None = None  # of the limit that is nearest; None without a budget

    @property
    def ended_rows(self) -> int:
        return self.ok_rows + self.failed_rows + self.skipped_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Per second, over the last seconds of a run."""

    rows: float
    prompt_tokens: float
    output_tokens: float


class RateMeter:
    """Rates over a sliding window, so that a resumed run does not count what it found done."""

    def __init__(self, window_s: float = _RATE_WINDOW_S) -> None:
        self._window_s = window_s
        self._samples: deque[tuple[float, RunProgress]] = deque()

    def add(self, progress: RunProgress, now_s: float) -> Rates:
        """Take a sample at a monotonic time; the rates since the oldest one in the window."""
        self._samples.append((now_s, progress))
        while len(self._samples) > 2 and now_s - self._samples[1][0] >= self._window_s:
            self._samples.popleft()
        start_s, first = self._samples[0]
        elapsed_s = max(now_s - start_s, 1e-9)
        engine, first_engine = progress.engine, first.engine
        return Rates(
            rows=(progress.ended_rows - first.ended_rows) / elapsed_s,
            prompt_tokens=(engine.prompt_tokens - first_engine.prompt_tokens) / elapsed_s,
            output_tokens=(engine.output_tokens - first_engine.output_tokens) / elapsed_s,
        )


def progress_text(progress: RunProgress, rates: Rates) -> str:
    """What stands beside the count of rows. The failed rows come before what a terminal cuts."""
    engine = progress.engine
    kv_used = engine.blocks_used / engine.blocks_total if engine.blocks_total else 0.0
    remaining = progress.total_rows - progress.ended_rows
    budget = "" if progress.budget_share is None else f"budget {progress.budget_share:.0%}, "
    time_left = format_duration(remaining / rates.rows) if rates.rows > 0 else "?"
    return (
        f"{_short(rates.rows)} rows/s, {_short(rates.prompt_tokens)} in/s, "
        f"{_short(rates.output_tokens)} out/s, KV {kv_used:.0%}, "
        f"{progress.failed_rows} failed, {budget}{time_left} left"
    )


def _short(number: float) -> str:
    if number < 9.95:
        return f"{number:.1f}"
    return f"{number:.0f}" if number < 1000 else tqdm.format_sizeof(number)


def format_duration(seconds: float) -> str:
    """Such as 0:07, 12:30 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Progress:
    """Shows a run while it is entered. `update` is for one thread at a time."""

    def __init__(
        self,
        mode: ProgressMode = "auto",
        stream: TextIO | None = None,
        log_interval_s: float = LOG_INTERVAL_S,
    ) -> None:
        """`stream` is stderr unless given; auto is a bar if that is a terminal."""
        self._stream = stream or sys.stderr
        self._is_shown = mode != "none"
        self._is_bar = mode == "bar" or (mode == "auto" and self._stream.isatty())
        self._interval_s = BAR_INTERVAL_S if self._is_bar else log_interval_s
        self._meter = RateMeter()
        self._bar: _Bar | None = None
        self._shown_s = time.monotonic()
        self._last: RunProgress | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Shows the last update once more, so that what stays on the screen is how it ended."""
        if self._last is not None and self._is_shown:
            self._show(self._last)
        if self._bar is not None:
            self._bar.close()

    def update(self, progress: RunProgress) -> None:
        """Cheap, to be called several times a second; shows something when it is time to."""
        is_first = self._last is None
        self._last = progress
        now_s = time.monotonic()
        if is_first:
            self._meter.add(progress, now_s)
        if self._is_shown and (
            now_s - self._shown_s >= self._interval_s or (is_first and self._is_bar)
        ):
            self._show(progress)

    def _show(self, progress: RunProgress) -> None:
        self._shown_s = time.monotonic()
        text = progress_text(progress, self._meter.add(progress, self._shown_s))
        if self._is_bar:
            self._draw(progress, text)
            return
        share = progress.ended_rows / progress.total_rows if progress.total_rows else 1.0
        self._stream.write(
            f"{time.strftime('%H:%M:%S')} {progress.ended_rows}/{progress.total_rows} rows "
            f"({share:.0%}), {text}\n"
        )
        self._stream.flush()

    def _draw(self, progress: RunProgress, text: str) -> None:
        if self._bar is None:
            self._bar = _Bar(
                total=progress.total_rows,
                initial=progress.ended_rows,
                file=self._stream,
                bar_format=_BAR_FORMAT,
                dynamic_ncols=_has_width(self._stream),
                ncols=_DEFAULT_COLUMNS,
            )
        self._bar.n = progress.ended_rows
        self._bar.set_postfix_str(text)


def _has_width(stream: TextIO) -> bool:
    # A terminal in a container may say that it is 0 columns wide, where tqdm draws nothing.
    return stream.isatty() and os.get_terminal_size(stream.fileno()).columns > 0


class _Bar(tqdm):  # type: ignore[type-arg]  # tqdm is no generic class at run time
    monitor_interval = 0  # no thread of tqdm's: every drawing is ours
