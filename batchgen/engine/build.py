"""Puts an engine together for a model and a device."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from batchgen.engine.build_beams import beam_engine, check_beam_room, check_beams
from batchgen.engine.completer import SampleCompleter
from batchgen.engine.config import DEFAULTS, EngineOptions, Quantization, SamplingOptions
from batchgen.engine.cpu_ops import CpuOps
from batchgen.engine.engine import Engine
from batchgen.engine.inputs import SlotState
from batchgen.engine.kv_memory import KVMemory, block_bytes, check_room
from batchgen.engine.model_runner import ModelRunner
from batchgen.engine.ops import EngineOps
from batchgen.engine.sampler import Sampler
from batchgen.engine.scheduler import Scheduler
from batchgen.engine.sequences import SchedulerConfig
from batchgen.engine.stopping import Decode, StopStrings
from batchgen.engine.swap import SwapSpace
from batchgen.errors import UsageError
from batchgen.kernels.fp8 import FP8
from batchgen.kernels.tuning import prefill_tile
from batchgen.models.config import ModelConfig, resolve_max_model_len
from batchgen.models.decoder import Decoder
from batchgen.models.loader import dummy_weights, load_weights, resolve_dtype, weight_bytes
from batchgen.models.registry import ModelFiles
from batchgen.models.rope import cos_sin_table

_GIB = 1 << 30
_FP8_CAPABILITY = (8, 9)
_GRAPH_BYTES = 2 * _GIB  # captured graphs, cuBLAS workspaces, split-KV partial results


def resolve_device(name: str) -> torch.device:
    """`auto` is the first GPU, if there is one. Raises UsageError for a device that is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            f"engine.device is {name}, but torch {torch.__version__} sees no CUDA device here; "
            "use engine.device=cpu or auto"
        )
    if device.type == "cuda" and device.index is not None:
        if device.index >= torch.cuda.device_count():
            raise UsageError(
                f"engine.device is {name}, but there are {torch.cuda.device_count()} CUDA devices"
            )
        torch.cuda.set_device(device)  # kernels and streams go to the current device
    return device


def build_engine(
    model: ModelConfig,
    files: ModelFiles | None,
    options: EngineOptions,
    sampling: SamplingOptions,
    decode: Decode | None,
) -> Engine:
    """Loads the weights of `files` (random ones with load_format dummy) and builds an engine.

    `decode` turns batches of token ids into texts; it is needed for stop strings only.
    Raises ModelError for weights that do not fit, UsageError for limits that leave no room.
    """
    if any(token >= model.vocab_size for token in sampling.stop_token_ids):
        raise UsageError(
            f"sampling.stop_token_ids {list(sampling.stop_token_ids)}: the model's vocabulary has "
            f"{model.vocab_size} tokens"
        )
    device = resolve_device(options.device)
    defaults = DEFAULTS[device.type]
    dtype = _resolve_dtype(options, model, device)
    max_model_len = resolve_max_model_len(model, options.max_model_len)
    max_num_seqs = options.max_num_seqs or defaults.max_num_seqs
    beams, longest_output = sampling.beams, min(sampling.max_tokens or max_model_len, max_model_len)
    if beams is not None:
        check_beams(beams, model, num_outputs=sampling.n, max_num_seqs=max_num_seqs)
        max_num_seqs -= max_num_seqs % beams.width
    elif sampling.n > max_num_seqs:
        raise UsageError(
            f"sampling.n is {sampling.n}, but engine.max_num_seqs={max_num_seqs} sequences run at "
            "once, and the samples of a row begin together; raise max_num_seqs, or lower n"
        )
    max_tokens = options.max_num_batched_tokens or defaults.batched_tokens(model.hidden_size)
    decode_window = options.decode_window or defaults.decode_window
    kv_dtype = FP8 if options.kv_cache_dtype == "fp8" else dtype
    _check_fp8(options, model, dtype, device)
    per_block = block_bytes(model, options.block_size, kv_dtype)
    num_blocks = options.num_gpu_blocks
    if num_blocks is None:
        tokens = max_num_seqs * max_model_len
        usable = min(
            _memory_for_kv(model, options, device, dtype, max_num_seqs, max_tokens)
            - 3 * max_num_seqs * model.vocab_size * sampling.has_penalties,  # Sampler's tables
            per_block * -(-tokens // options.block_size),
        )
        num_blocks = usable // per_block
    if beams is None:
        check_room(num_blocks, max_model_len, options.block_size, has_samples=sampling.n > 1)
    else:
        check_beam_room(
            beams,
            num_blocks=num_blocks,
            max_model_len=max_model_len,
            max_tokens=longest_output,
            block_size=options.block_size,
        )
    with torch.inference_mode():
        state = SlotState(
            num_rows=max_num_seqs,
            max_blocks=-(-max_model_len // options.block_size),
            device=device,
        )
        memory = KVMemory(
            model,
            num_blocks=num_blocks,
            block_size=options.block_size,
            dtype=kv_dtype,
            device=device,
        )
        cos_sin_MH = cos_sin_table(model, max_model_len, device)
        ops = _ops(model, memory, state, cos_sin_MH, dtype, options.quantization)
        if options.load_format == "dummy":
            weights = dummy_weights(model, dtype=dtype, device=device)
        else:
            assert files is not None
            weights = load_weights(files, model, dtype=dtype, device=device)
        decoder = Decoder(model, weights, ops)
        del weights
        swap_bytes = options.cpu_swap_bytes
        if swap_bytes is None:
            swap_bytes = min(16 * _GIB, _host_bytes() // 4)
        swap_blocks = swap_bytes // per_block
        if options.cpu_swap_bytes and swap_blocks * options.block_size < max_model_len:
            raise UsageError(
                f"engine.cpu_swap_gib has room for {swap_blocks * options.block_size} tokens, but "
                f"one sequence of model.max_model_len={max_model_len} may have to be swapped: "
                "raise it, set it to 0, or lower model.max_model_len"
            )
        shares = options.enable_prefix_caching or sampling.n > 1 or beams is not None
        min_prefix_saving = _min_prefix_saving(options, memory, device) if shares else None
        tile = prefill_tile(dtype, model.head_dim, device)
        config = SchedulerConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_tokens,
            max_model_len=max_model_len,
            decode_window=decode_window,
            block_size=options.block_size,
            gpu_blocks=num_blocks,
            cpu_blocks=swap_blocks,
            enable_prefix_caching=options.enable_prefix_caching,
            merge_duplicates=options.merge_duplicates and sampling.temperature == 0.0,
            min_prefix_saving=min_prefix_saving,
            prefill_tile_tokens=max(1, tile.block_m * model.num_kv_heads // model.num_heads),
            beam_width=None if beams is None else beams.width,
        )
        use_graphs = options.use_cuda_graphs and device.type == "cuda"
        if beams is not None:
            return beam_engine(
                beams,
                config,
                decoder=decoder,
                ops=ops,
                memory=memory,
                state=state,
                max_tokens=longest_output,
                use_graphs=use_graphs,
                defaults=defaults,
            )
        sampler = Sampler(
            sampling, ops, num_rows=max_num_seqs, vocab_size=model.vocab_size, device=device
        )
        runner = ModelRunner(
            decoder=decoder,
            ops=ops,
            memory=memory,
            state=state,
            sampler=sampler,
            swap=SwapSpace(memory, swap_blocks),
            max_num_seqs=max_num_seqs,
            decode_window=decode_window,
            use_graphs=use_graphs,
            has_prefixes=min_prefix_saving is not None,
        )
        runner.warm_up(max_tokens)
    if sampling.stop and decode is None:
        raise UsageError("stop strings need a tokenizer, and there is none")
    scheduler = Scheduler(config)
    return Engine(
        scheduler=scheduler,
        completer=SampleCompleter(
            scheduler=scheduler,
            runner=runner,
            stop_token_ids=frozenset(sampling.stop_token_ids),
            eos_token_ids=frozenset(sampling.eos_token_ids),
            stop_strings=StopStrings(sampling.stop, decode) if sampling.stop and decode else None,
            min_tokens=sampling.min_tokens,
        ),
        lookahead=defaults.lookahead,
        prefill_lookahead=defaults.prefill_lookahead,
    )


def _resolve_dtype(options: EngineOptions, model: ModelConfig, device: torch.device) -> torch.dtype:
    """`auto` is what the model was saved in; on a CPU without bf16 instructions, fp32 instead."""
    dtype = resolve_dtype(options.dtype, model)
    has_bf16 = device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if options.dtype == "auto" and dtype != torch.float32 and not has_bf16:
        return torch.float32
    return dtype


def _check_fp8(
    options: EngineOptions, model: ModelConfig, dtype: torch.dtype, device: torch.device
) -> None:
    """Raises UsageError for an fp8 that this device or its matrix products cannot do."""
    asked = [
        *(["model.quantization=fp8"] if options.quantization == "fp8" else []),
        *(["engine.kv_cache_dtype=fp8"] if options.kv_cache_dtype == "fp8" else []),
    ]
    if device.type == "cpu" or not asked:
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < _FP8_CAPABILITY:
        raise UsageError(
            f"{' and '.join(asked)}: {torch.cuda.get_device_name(device)} has compute capability "
            f"{capability[0]}.{capability[1]}, and fp8 needs 8.9 or above; leave it out here"
        )
    if options.quantization is None:
        return
    if dtype != torch.bfloat16:
        raise UsageError(
            f"model.quantization=fp8 computes in bfloat16 on a GPU, and the model is {dtype}; set "
            "model.dtype=bfloat16, or leave the quantization out"
        )
    sizes = {
        "hidden size": model.hidden_size,
        "intermediate size": model.intermediate_size,
        "query width": model.num_heads * model.head_dim,
        "key width": model.num_kv_heads * model.head_dim,
    }
    for name, size in sizes.items():
        if size % 16:
            raise UsageError(
                f"model.quantization=fp8 needs sizes that 16 divides, and the model's {name} is "
                f"{size}; leave it out for this model"
            )


def _ops(
    model: ModelConfig,
    memory: KVMemory,
    state: SlotState,
    cos_sin_MH: Tensor,
    dtype: torch.dtype,
    quantization: Quantization,
) -> EngineOps:
    if state.device.type == "cpu":
        return CpuOps(model, memory, state, cos_sin_MH, dtype, quantization)
    from batchgen.engine.cuda_ops import CudaOps  # imports triton

    return CudaOps(model, memory, state, cos_sin_MH, quantization)


def _memory_for_kv(
    model: ModelConfig,
    options: EngineOptions,
    device: torch.device,
    dtype: torch.dtype,
    max_num_seqs: int,
    max_tokens: int,
) -> int:
    """Bytes that the KV may take, with weights and the largest step accounted for."""
    if device.type == "cpu":
        return _host_bytes() // 4
    free, total = torch.cuda.mem_get_info(device)
    weights = weight_bytes(model, dtype=dtype, is_fp8=options.quantization == "fp8")
    columns = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    per_token = 4 * model.hidden_size + 2 * columns + 3 * model.intermediate_size
    logits = 2 * max_num_seqs * model.vocab_size
    step = max_tokens * per_token + logits
    used = total - free + weights + step * dtype.itemsize + _GRAPH_BYTES
    return int(total * options.gpu_memory_utilization) - used


def _min_prefix_saving(
    options: EngineOptions, memory: KVMemory, device: torch.device
) -> int | None:
    """In blocks: see EngineOptions.min_prefix_saving_bytes."""
    if device.type == "cpu" or options.min_prefix_saving_bytes is None:
        return None
    layer_KSH = memory.kv_PL2KSH[0, 0]
    return max(1, options.min_prefix_saving_bytes // (layer_KSH.numel() * layer_KSH.element_size()))


def _host_bytes() -> int:
    """Memory of this host that is free to take."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    group = Path("/sys/fs/cgroup")
    if (group / "memory.max").exists():
        limit = (group / "memory.max").read_text(encoding="utf-8").strip()
        used = int((group / "memory.current").read_text(encoding="utf-8"))
        if limit != "max":
            free = min(free, max(0, int(limit) - used))
    return free
