"""What a run says at its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from batchgen.monitor.progress import format_duration
from batchgen.records import EngineStats


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """How a run ended."""

    uri: str  # of the dataset
    total_rows: int
    ok_rows: int
    failed_rows: int
    skipped_rows: int
    earlier_rows: int = 0  # of these, the ones that earlier runs had ended
    wall_s: float
    engine: EngineStats | None = None  # None where no model was loaded
    tokens: tuple[int, int] | None = None  # of prompts and outputs, where not only this engine's
    dead_letters: Mapping[str, int] = field(default_factory=dict)  # failed rows by kind
    dead_letters_uri: str = ""
    budget: str = ""  # what is used of it; empty without one

    def __post_init__(self) -> None:
        ended = self.ok_rows + self.failed_rows + self.skipped_rows
        assert ended == self.total_rows, f"{ended} rows ended of {self.total_rows}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedWork:
    """What of a run is safe when it is stopped."""

    finished_rows: int  # that ended in this run
    unfinished_rows: int  # that go on where they were
    unfinished_tokens: int  # of their outputs


def stopped_text(what: str, why: str, notice_s: float, saved: SavedWork) -> str:
    """How a run ends that was stopped `notice_s` seconds ago."""
    return (
        f"{what} ({why}), {notice_s:.1f} s after the notice; saved: {saved.finished_rows:,} rows "
        f"that this run finished, and {saved.unfinished_tokens:,} output tokens of "
        f"{saved.unfinished_rows:,} rows that it did not; run the same command again to go on"
    )


def summary_text(run: RunSummary) -> str:
    """The summary, a few lines."""
    lines = [
        f"rows: {run.total_rows:,} = {run.ok_rows:,} ok + {run.failed_rows:,} failed "
        f"+ {run.skipped_rows:,} skipped" + _earlier(run)
    ]
    if run.engine is not None:
        since = "" if run.tokens is None else "since the last start, "
        lines += [_speed(run, run.engine), since + kv_text(run.engine)]
    if run.budget:
        lines.append(f"budget: {run.budget}")
    if run.failed_rows:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(run.dead_letters.items()))
        lines.append(f"dead letters: {kinds}, in {run.dead_letters_uri}")
    lines.append(f"dataset: {run.uri}")
    return "\n".join(lines)


def _earlier(run: RunSummary) -> str:
    if run.earlier_rows == 0:
        return ""
    what = "all" if run.earlier_rows == run.total_rows else f"{run.earlier_rows:,}"
    return f" ({what} done before this run)"


def _speed(run: RunSummary, engine: EngineStats) -> str:
    wall_s = max(run.wall_s, 1e-9)
    rows = run.total_rows - run.earlier_rows
    prompt_tokens, output_tokens = run.tokens or (engine.prompt_tokens, engine.output_tokens)
    return (
        f"time: {format_duration(run.wall_s)}, {rows / wall_s:,.1f} rows/s, "
        f"{prompt_tokens:,} prompt tokens ({prompt_tokens / wall_s:,.0f}/s), "
        f"{output_tokens:,} output tokens ({output_tokens / wall_s:,.0f}/s)"
        + (f", {engine.resumed_tokens:,} more of stopped runs" if engine.resumed_tokens else "")
    )


def kv_text(engine: EngineStats) -> str:
    """What became of the KV: waste, prefixes, sharing, swapping."""
    hits = engine.cached_prompt_tokens / engine.prompt_tokens if engine.prompt_tokens else 0.0
    merged = (
        f"{engine.merged_prompts:,} duplicates computed once, " if engine.merged_prompts else ""
    )
    saved = (
        f"{engine.kv_saved:.1%} saved by sharing ({engine.peak_saved_blocks:,} blocks at the peak, "
        f"{engine.copied_blocks:,} copied), "
        if engine.peak_saved_blocks
        else ""
    )
    read_once = (
        f"{engine.prefix_blocks_saved:,} reads of shared prefix blocks saved, "
        if engine.prefix_blocks_saved
        else ""
    )
    return (
        f"KV: {engine.kv_waste:.1%} wasted, {hits:.0%} of prompt tokens from the prefix cache, "
        f"{saved}{read_once}{merged}"
        f"{engine.swapped_out_blocks:,} blocks swapped out and {engine.swapped_in_blocks:,} in"
    )
