"""What a decoder asks of the device: the seam between the model and the engine's two backends.

Legend: T tokens of a step, D hidden, I intermediate, N query heads, K kv heads, H head size,
C = (N + 2K) * H, O and D of a linear layer's output and input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from torch import Tensor

from batchgen.kernels.fp8 import QuantizedRows

Activation = Tensor | QuantizedRows  # what feeds a matrix, in the form that its ops want
Linear = Callable[[Activation], Tensor]
BatchT = TypeVar("BatchT", contravariant=True)


class LayerOps(Protocol):
    """The matrices of the layers and what feeds them: the operations that quantization changes.

    Tensors are contiguous in their last dimension.
    """

    def pack_linear(self, weight_OD: Tensor, bias_O: Tensor | None) -> Linear:
        """A function x_TD -> y_TO, with the weight laid out as the device likes it.

        It takes what the operations below return, and plain tensors.
        """
        ...

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Activation:
        """Root mean square norm, accumulated in fp32."""
        ...

    def add_rms_norm(
        self, x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float
    ) -> Activation:
        """`residual_TD += x_TD` in place, then the norm of the sum."""
        ...

    def silu_mul(self, gate_up_T2I: Tensor) -> Activation:
        """silu(gate) * up, of a matrix that holds gate and up side by side: [T, I]."""
        ...


class Ops(Protocol[BatchT]):
    """The device operations of a decoder. Its own, unlike `layer_ops`, never quantize."""

    @property
    def layer_ops(self) -> LayerOps: ...

    def pack_linear(self, weight_OD: Tensor, bias_O: Tensor | None) -> Linear:
        """As in LayerOps."""
        ...

    def add_rms_norm(
        self, x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float
    ) -> Tensor:
        """As in LayerOps."""
        ...

    def attention(
        self,
        qkv_TC: Tensor,
        layer: int,
        q_norm_H: Tensor | None,
        k_norm_H: Tensor | None,
        batch: BatchT,
        wanted_T: Tensor | None,
    ) -> Tensor:
        """QK-norm if given, RoPE, the KV write of this step's tokens, and causal attention.

        `batch` says where each token stands and which KV it sees. Returns [T, N * H], or the rows
        of wanted_T alone: tokens that are each the last of their sequence in the step.
        """
        ...
