"""What a decoder asks of the device: the seam between the model and the engine's two backends.

Legend: T tokens of a step, D hidden, I intermediate, N query heads, K kv heads, H head size,
C = (N + 2K) * H, O and D of a linear layer's output and input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from torch import Tensor

Linear = Callable[[Tensor], Tensor]
BatchT = TypeVar("BatchT", contravariant=True)


class Ops(Protocol[BatchT]):
    """The device operations of a decoder. Tensors are contiguous in their last dimension."""

    def pack_linear(self, weight_OD: Tensor, bias_O: Tensor | None) -> Linear:
        """A function x_TD -> y_TO, with the weight laid out as the device likes it."""
        ...

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """Root mean square norm, accumulated in fp32."""
        ...

    def add_rms_norm(
        self, x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float
    ) -> Tensor:
        """`residual_TD += x_TD` in place, then the norm of the sum."""
        ...

    def silu_mul(self, gate_up_T2I: Tensor) -> Tensor:
        """silu(gate) * up, of a matrix that holds gate and up side by side. Returns [T, I]."""
        ...

    def attention(
        self,
        qkv_TC: Tensor,
        layer: int,
        q_norm_H: Tensor | None,
        k_norm_H: Tensor | None,
        batch: BatchT,
    ) -> Tensor:
        """QK-norm if given, RoPE, the KV write of this step's tokens, and causal attention.

        `batch` says where each token stands and which KV it sees. Returns [T, N * H].
        """
        ...
