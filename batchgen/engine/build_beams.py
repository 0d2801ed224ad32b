"""What an engine of beam search has in the place of an engine of samples."""

from __future__ import annotations

import numpy as np

from batchgen.engine.beam_blocks import most_blocks
from batchgen.engine.beam_completer import BeamCompleter
from batchgen.engine.beam_runner import BeamRunner
from batchgen.engine.beam_scheduler import BeamScheduler
from batchgen.engine.beam_search import BeamSearch, BeamTables
from batchgen.engine.config import BeamOptions, DeviceDefaults
from batchgen.engine.engine import Engine
from batchgen.engine.inputs import SlotState, StepBatch
from batchgen.engine.kv_memory import KVMemory
from batchgen.engine.ops import EngineOps
from batchgen.engine.sequences import SchedulerConfig
from batchgen.errors import UsageError
from batchgen.models.config import ModelConfig
from batchgen.models.decoder import Decoder


def check_beams(
    beams: BeamOptions, model: ModelConfig, *, num_outputs: int, max_num_seqs: int
) -> None:
    """Raises UsageError for beams that this model or engine cannot have."""
    width = beams.width
    if num_outputs > width:
        raise UsageError(
            f"sampling.n is {num_outputs}, but there are only sampling.beam_width={width} "
            "hypotheses of a row; lower n, or raise beam_width"
        )
    if beams.num_candidates > model.vocab_size:
        raise UsageError(
            f"sampling.beam_width is {width}, and with {len(beams.end_token_ids)} tokens that end "
            f"an output each step looks at {beams.num_candidates} tokens, but the model's "
            f"vocabulary has {model.vocab_size}; lower beam_width"
        )
    if width > max_num_seqs:
        raise UsageError(
            f"sampling.beam_width is {width}, but engine.max_num_seqs={max_num_seqs} sequences run "
            "at once, and the beams of a row run together; raise max_num_seqs, or lower beam_width"
        )


def check_beam_room(
    beams: BeamOptions, *, num_blocks: int, max_model_len: int, max_tokens: int, block_size: int
) -> None:
    """Raises UsageError when not even one group fits, whatever its prompt's length.

    `max_tokens`: of the longest output.
    """
    prompt_lens = np.arange(1, max_model_len, dtype=np.int64)
    stop_lens = np.minimum(prompt_lens + max_tokens, max_model_len)
    needed = most_blocks(prompt_lens, stop_lens, width=beams.width, block_size=block_size)
    most = int(needed.max(initial=0))
    if num_blocks < most:
        raise UsageError(
            f"the KV cache has room for {max(num_blocks, 0) * block_size} tokens, but one row with "
            f"sampling.beam_width={beams.width}, sampling.max_tokens={max_tokens} and "
            f"model.max_model_len={max_model_len} may need {most * block_size}: lower one of "
            "them, or raise engine.num_gpu_blocks or engine.gpu_memory_utilization"
        )


def beam_engine(
    beams: BeamOptions,
    config: SchedulerConfig,
    *,
    decoder: Decoder[StepBatch],
    ops: EngineOps,
    memory: KVMemory,
    state: SlotState,
    max_tokens: int,
    use_graphs: bool,
    defaults: DeviceDefaults,
) -> Engine:
    """An engine whose rows are beams. `max_tokens`: of the longest output."""
    scheduler = BeamScheduler(config)
    num_groups, device = scheduler.num_groups, state.device
    runner = BeamRunner(
        decoder=decoder,
        ops=ops,
        memory=memory,
        state=state,
        search=BeamSearch(
            beams, num_groups=num_groups, max_output_tokens=max_tokens, device=device
        ),
        tables=BeamTables(
            width=beams.width,
            num_groups=num_groups,
            block_size=config.block_size,
            device=device,
        ),
        use_graphs=use_graphs,
        has_prefixes=config.min_prefix_saving is not None,
    )
    runner.warm_up(config.max_num_batched_tokens)
    return Engine(
        scheduler=scheduler,
        completer=BeamCompleter(
            scheduler=scheduler, runner=runner, end_token_ids=beams.end_token_ids
        ),
        lookahead=defaults.lookahead,
        prefill_lookahead=defaults.prefill_lookahead,
    )
