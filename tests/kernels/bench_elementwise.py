"""Times the element-wise and sampling kernels on a GPU, beside torch and beside a copy.

    python tests/kernels/bench_elementwise.py

One row an op and shape: median time, GB/s of the bytes that the op must move, their share of the
copy's, and the median time of torch's way. Sampling is timed with flat logits (a deviation of 1)
and with peaked ones; a filter may read parts of them again: its GB/s counts one reading.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable

import torch
import triton
from torch import Tensor
from torch.nn import functional
from triton.testing import do_bench

from batchgen.kernels import cases, reference
from batchgen.kernels.cases import HeadShape
from batchgen.kernels.kv_write import kv_write
from batchgen.kernels.penalties import apply_penalties
from batchgen.kernels.reference import Filters
from batchgen.kernels.rms_norm import add_rms_norm, rms_norm
from batchgen.kernels.sample import sample
from batchgen.kernels.silu_mul import silu_mul

DTYPE = torch.bfloat16
COPY_BYTES = 2 << 30


def median_ms(run: Callable[[], object]) -> float:
    return float(do_bench(run, return_mode="median"))


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=DTYPE)


def write(line: str) -> None:
    sys.stdout.write(line + "\n")


class Report:
    """Prints rows against the copy measured at the start."""

    def __init__(self) -> None:
        source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        copy_ms = median_ms(lambda: target.copy_(source))
        self._copy_gb_per_s = 2 * COPY_BYTES / copy_ms / 1e6
        gpu, versions = torch.cuda.get_device_name(), f"torch {torch.__version__}"
        write(f"{gpu}, {versions}, triton {triton.__version__}, {DTYPE}")
        write("| op | shape | median ms | GB/s | share of copy | torch ms |")
        write("|---|---|---|---|---|---|")
        write(f"| copy | 2 GiB | {copy_ms:.4f} | {self._copy_gb_per_s:.0f} | 1.00 | |")

    def row(
        self,
        op: str,
        shape: str,
        moved_bytes: int,
        run: Callable[[], object],
        run_torch: Callable[[], object],
    ) -> None:
        ms = median_ms(run)
        gb_per_s = moved_bytes / ms / 1e6
        share = gb_per_s / self._copy_gb_per_s
        torch_ms = median_ms(run_torch)
        write(f"| {op} | {shape} | {ms:.4f} | {gb_per_s:.0f} | {share:.2f} | {torch_ms:.4f} |")


def bench_norms(report: Report) -> None:
    for num_tokens, hidden in ((16384, 4096), (16384, 1024), (1024, 4096), (1, 4096)):
        x, residual, weight = (
            normal(num_tokens, hidden),
            normal(num_tokens, hidden),
            normal(hidden),
        )
        size = x.numel() * x.element_size()
        shape = f"{num_tokens} x {hidden}"
        report.row(
            "rms_norm",
            shape,
            2 * size,
            lambda x=x, w=weight: rms_norm(x, w, 1e-6),
            lambda x=x, w=weight: functional.rms_norm(x, w.shape, w, 1e-6),
        )
        report.row(
            "add_rms_norm",
            shape,
            4 * size,
            lambda x=x, r=residual, w=weight: add_rms_norm(x, r, w, 1e-6),
            lambda x=x, r=residual, w=weight: functional.rms_norm(r.add_(x), w.shape, w, 1e-6),
        )


def bench_silu(report: Report) -> None:
    for num_tokens, intermediate in ((16384, 14336), (16384, 3072), (1024, 14336), (1, 14336)):
        gate_up = normal(num_tokens, 2 * intermediate)
        report.row(
            "silu_mul",
            f"{num_tokens} x 2*{intermediate}",
            3 * num_tokens * intermediate * gate_up.element_size(),
            lambda g=gate_up: silu_mul(g),
            lambda g=gate_up: functional.silu(g.chunk(2, -1)[0]) * g.chunk(2, -1)[1],
        )


def bench_kv_write(report: Report) -> None:
    for num_tokens in (16384, 1024, 1):
        for num_heads, num_kv_heads, has_norm in ((32, 8, False), (16, 8, True)):
            shape = HeadShape(
                num_heads=num_heads, num_kv_heads=num_kv_heads, head_size=128, block_size=16
            )
            num_blocks = num_tokens // shape.block_size + 1
            pool = cases.nan_kv_pool(
                shape, num_blocks=num_blocks, num_layers=4, dtype=DTYPE, device="cuda"
            )
            norm = normal(128) if has_norm else None
            qkv = normal(num_tokens, (num_heads + 2 * num_kv_heads) * 128)
            slots = torch.randperm(num_blocks * shape.block_size, device="cuda")[:num_tokens]
            positions = torch.arange(num_tokens, dtype=torch.int32, device="cuda")
            arguments = (qkv, cases.cos_sin_table(num_tokens, 128, "cuda"), positions, slots)

            def run(
                op: Callable[..., Tensor],
                arguments: tuple[Tensor, ...] = arguments,
                pool: Tensor = pool,
                norm: Tensor | None = norm,
                num_q_heads: int = num_heads,
            ) -> Callable[[], Tensor]:
                return lambda: op(
                    *arguments,
                    pool[:, 1, 0],
                    pool[:, 1, 1],
                    num_q_heads=num_q_heads,
                    q_norm_H=norm,
                    k_norm_H=norm,
                )

            report.row(
                "kv_write, QK-norm" if has_norm else "kv_write",
                f"{num_tokens} x ({num_heads} + 2*{num_kv_heads}) x 128",
                2 * qkv.numel() * qkv.element_size(),
                run(kv_write),
                run(reference.kv_write),
            )


def torch_draw(logits: Tensor, filters: Filters) -> Tensor:
    """Greedy, or softmax and multinomial; a filter by a full sort, as transformers does."""
    if filters.temperature == 0.0:
        return logits.argmax(-1)
    x = logits.float() / filters.temperature
    if filters.top_k > 0 or filters.top_p < 1.0:
        ordered, ids = x.sort(descending=True)
        mass = ordered.softmax(-1)
        dropped = mass.cumsum(-1) - mass >= filters.top_p
        if filters.top_k > 0:
            dropped[:, filters.top_k :] = True
        x = x.scatter(1, ids, ordered.masked_fill_(dropped, -torch.inf))
    return x.softmax(-1).multinomial(1)


def bench_sample(report: Report) -> None:
    settings = (
        Filters(temperature=0.0),
        Filters(temperature=0.8),
        Filters(temperature=0.8, top_k=50),
        Filters(temperature=0.8, top_p=0.95),
        Filters(temperature=0.8, top_k=50, top_p=0.95, min_p=0.01),
    )
    shapes = itertools.product((49152, 128256, 151936), (1, 64, 1024), (1, 4))
    for vocabulary, batch, deviation in shapes:
        logits = normal(batch, vocabulary) * deviation
        seeds = torch.arange(batch, device="cuda")
        for filters in settings:
            keywords = {
                "temperature": filters.temperature,
                "top_k": filters.top_k,
                "top_p": filters.top_p,
                "min_p": filters.min_p,
            }
            report.row(
                f"sample {tuple(keywords.values())}, deviation {deviation}",
                f"{batch} x {vocabulary}",
                logits.numel() * logits.element_size(),
                lambda x=logits, s=seeds, k=keywords: sample(x, s, s, **k),
                lambda x=logits, f=filters: torch_draw(x, f),
            )


def bench_penalties(report: Report) -> None:
    for batch in (1, 1024):
        vocabulary = 151936
        logits = normal(batch, vocabulary)
        slots = torch.randperm(batch, device="cuda")
        counts = torch.zeros(batch, vocabulary, dtype=torch.int16, device="cuda")
        counts[:, ::500] = 1
        in_prompt = torch.zeros(batch, vocabulary, dtype=torch.bool, device="cuda")
        arguments = (logits, slots, counts, in_prompt)
        keywords = {"presence": 0.1, "frequency": 0.1, "repetition": 1.1}
        report.row(
            "apply_penalties",
            f"{batch} x {vocabulary}",
            counts.nbytes + in_prompt.nbytes,
            lambda a=arguments, k=keywords: apply_penalties(*a, **k),
            lambda a=arguments, k=keywords: reference.apply_penalties(*a, **k),
        )


def main() -> None:
    report = Report()
    bench_norms(report)
    bench_silu(report)
    bench_kv_write(report)
    bench_sample(report)
    bench_penalties(report)


if __name__ == "__main__":
    main()
