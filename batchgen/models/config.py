"""The model's config: read from a transformers config.json, and refused where it is not built.

Both forms of the RoPE keys are read: `rope_theta` with `rope_scaling`, and `rope_parameters` of
transformers 5.

Legend: N query heads, K kv heads, H head size, D hidden, I intermediate, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from batchgen.errors import ModelError, UnsupportedError, UsageError
from batchgen.models.families import FAMILIES, Family

RopeType = Literal["default", "linear", "llama3", "yarn"]
DtypeName = Literal["bfloat16", "float16", "float32"]

_ROPE_TYPES: Final[tuple[RopeType, ...]] = ("default", "linear", "llama3", "yarn")
_DTYPES: Final[tuple[DtypeName, ...]] = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding. The fields after `theta` matter to the scaled types only."""

    rope_type: RopeType
    theta: float
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    attention_factor: float | None = None  # yarn; None: follows from the factor
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What the decoder, the KV and the sampler have to know of a model."""

    family: str
    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # I
    num_layers: int
    num_heads: int  # N
    num_kv_heads: int  # K
    head_dim: int  # H
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    attention_bias: bool  # of q, k and v
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    max_position_embeddings: int
    sliding_window: int | None  # tokens that any layer is limited to; None: full attention
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]  # any of them ends a row
    dtype: DtypeName  # of the weights as they were saved


def parse_config(
    values: Mapping[str, object],
    *,
    source: str,
    generation: Mapping[str, object] | None = None,
) -> ModelConfig:
    """Builds the config from the values of a config.json (and of a generation_config.json).

    `source` names the file in messages. Raises `UnsupportedError` for what is not built and
    `ModelError` for what is missing or makes no sense.
    """
    family = _family(values, source)
    read = _Reader({**family.defaults, **values}, source)
    _refuse_unsupported(read)
    num_heads = read.size("num_attention_heads")
    hidden_size = read.size("hidden_size")
    head_dim = read.integer("head_dim") or hidden_size // num_heads
    num_kv_heads = read.integer("num_key_value_heads") or num_heads
    if num_heads % num_kv_heads or head_dim % 2 or head_dim == 0:
        raise UnsupportedError(
            f"{source}: {num_heads} query heads over {num_kv_heads} kv heads of size {head_dim} "
            "are not supported: the query heads must be a multiple of the kv heads, and the head "
            "size even"
        )
    attention_bias = read.flag("attention_bias", False)
    max_position_embeddings = read.size("max_position_embeddings")
    return ModelConfig(
        family=family.name,
        vocab_size=read.size("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=read.size("intermediate_size"),
        num_layers=read.size("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=read.number("rms_norm_eps") or 1e-6,
        rope=_rope(read, max_position_embeddings),
        tie_word_embeddings=read.flag("tie_word_embeddings", False),
        attention_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        output_bias=attention_bias if family.output_bias is None else family.output_bias,
        mlp_bias=read.flag("mlp_bias", False) if family.mlp_bias is None else family.mlp_bias,
        qk_norm=family.qk_norm,
        max_position_embeddings=max_position_embeddings,
        sliding_window=_sliding_window(read),
        bos_token_id=read.integer("bos_token_id"),
        eos_token_ids=_eos_token_ids(read, generation or {}),
        dtype=_dtype(read),
    )


def resolve_max_model_len(config: ModelConfig, requested: int | None) -> int:
    """The most tokens a row may have, prompt and output together: `requested`, or all there is.

    Raises `UsageError` beyond what the model was made for, and `UnsupportedError` where a sliding
    window would come into play.
    """
    limit = config.max_position_embeddings
    if config.rope.rope_type == "linear":
        limit = int(limit * config.rope.factor)
    if config.rope.rope_type == "yarn":
        limit = max(limit, int(config.rope.original_max_position_embeddings * config.rope.factor))
    max_model_len = limit if requested is None else requested
    if max_model_len > limit:
        raise UsageError(
            f"model.max_model_len: {max_model_len} is more than the {limit} positions of the "
            f"model; set it to {limit} or less"
        )
    if config.sliding_window is not None and max_model_len > config.sliding_window:
        raise UnsupportedError(
            f"sliding window attention is not built: the model's layers see "
            f"{config.sliding_window} tokens and model.max_model_len is {max_model_len}; "
            f"set model.max_model_len to {config.sliding_window} or less"
        )
    return max_model_len


class _Reader:
    """Typed look-ups in a config's values, with errors that name the file and the key."""

    def __init__(self, values: Mapping[str, object], source: str) -> None:
        self.values = values
        self.source = source

    def number(self, key: str) -> float | None:
        value = self.values.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ModelError(f"{self.source}: {key} is {value!r}, expected a number")
        return value

    def integer(self, key: str) -> int | None:
        value = self.number(key)
        if value is None:
            return None
        if value != int(value):
            raise ModelError(f"{self.source}: {key} is {value!r}, expected a whole number")
        return int(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ModelError(f"{self.source}: {key} is {value!r}, expected true or false")
        return value

    def size(self, key: str) -> int:
        """A whole number of at least 1 that has to be there."""
        value = self.integer(key)
        if value is None or value < 1:
            raise ModelError(f"{self.source}: {key} is {value!r}, expected a size of at least 1")
        return value

    def scale(self, key: str) -> float:
        """A number above 0 that has to be there."""
        value = self.number(key)
        if value is None or value <= 0:
            raise ModelError(f"{self.source}: {key} is {value!r}, expected a number above 0")
        return value


def _family(values: Mapping[str, object], source: str) -> Family:
    architectures = values.get("architectures")
    names = architectures if isinstance(architectures, list) else []
    for family in FAMILIES:
        if family.architecture in names or (not names and family.name == values.get("model_type")):
            return family
    found = ", ".join(map(str, names)) or f"model_type {values.get('model_type')!r}"
    supported = ", ".join(family.architecture for family in FAMILIES)
    raise UnsupportedError(
        f"{source}: the architecture {found} is not supported; supported are {supported}"
    )


def _refuse_unsupported(read: _Reader) -> None:
    """Refuses by name what would change the numbers and is not built.

    Dropouts play no part in inference, and keys that transformers itself ignores do not either.
    """
    accepted: dict[str, tuple[object, ...]] = {
        "hidden_act": (None, "silu", "swish"),
        "quantization_config": (None,),
        "partial_rotary_factor": (None, 1),
        "pretraining_tp": (None, 1),
        "num_experts": (None, 0),
        "num_local_experts": (None, 0),
        "n_routed_experts": (None, 0),
        "is_encoder_decoder": (None, False),
    }
    for key, values in accepted.items():
        if read.values.get(key) not in values:
            raise UnsupportedError(
                f"{read.source}: {key} = {read.values[key]!r} is not supported; "
                f"supported is {values[-1]!r}" + (" or no such key" if values[0] is None else "")
            )
    layer_types = read.values.get("layer_types")
    for layer_type in layer_types if isinstance(layer_types, list) else []:
        if layer_type not in ("full_attention", "sliding_attention"):
            raise UnsupportedError(
                f"{read.source}: layers of type {layer_type!r} are not supported; "
                "supported is 'full_attention'"
            )


def _sliding_window(read: _Reader) -> int | None:
    """The window that some layer is limited to, by transformers' rules."""
    window = read.integer("sliding_window")
    if window is None or not read.flag("use_sliding_window", True):
        return None
    layer_types = read.values.get("layer_types")
    if isinstance(layer_types, list):
        return window if "sliding_attention" in layer_types else None
    first_sliding_layer = read.integer("max_window_layers") or 0
    return window if first_sliding_layer < read.size("num_hidden_layers") else None


def _rope(read: _Reader, max_position_embeddings: int) -> RopeConfig:
    raw = read.values.get("rope_parameters") or read.values.get("rope_scaling") or {}
    if not isinstance(raw, Mapping) or any(isinstance(value, Mapping) for value in raw.values()):
        raise UnsupportedError(
            f"{read.source}: RoPE parameters that differ by layer are not supported"
        )
    rope = _Reader(raw, f"{read.source}: RoPE")
    name = raw.get("rope_type") or raw.get("type") or "default"
    rope_type = next((known for known in _ROPE_TYPES if known == name), None)
    if rope_type is None:
        raise UnsupportedError(
            f"{read.source}: RoPE of type {name!r} is not supported; "
            f"supported are {', '.join(_ROPE_TYPES)}"
        )
    if raw.get("partial_rotary_factor") not in (None, 1):
        raise UnsupportedError(f"{read.source}: a partial_rotary_factor is not supported")
    theta = rope.number("rope_theta") or read.number("rope_theta") or 10_000.0
    if rope_type == "default":
        return RopeConfig(rope_type=rope_type, theta=theta)
    original = (
        read.integer("original_max_position_embeddings")
        or rope.integer("original_max_position_embeddings")
        or max_position_embeddings
    )
    if rope_type == "yarn":
        return _yarn(rope, theta, original, max_position_embeddings)
    llama3 = rope_type == "llama3"
    return RopeConfig(
        rope_type=rope_type,
        theta=theta,
        factor=rope.scale("factor"),
        original_max_position_embeddings=original,
        low_freq_factor=rope.scale("low_freq_factor") if llama3 else 1.0,
        high_freq_factor=rope.scale("high_freq_factor") if llama3 else 4.0,
    )


def _yarn(rope: _Reader, theta: float, original: int, max_position_embeddings: int) -> RopeConfig:
    factor = rope.number("factor")
    return RopeConfig(
        rope_type="yarn",
        theta=theta,
        factor=max_position_embeddings / original if factor is None else factor,
        original_max_position_embeddings=original,
        attention_factor=rope.number("attention_factor"),
        mscale=rope.number("mscale"),
        mscale_all_dim=rope.number("mscale_all_dim"),
        beta_fast=rope.number("beta_fast") or 32.0,
        beta_slow=rope.number("beta_slow") or 1.0,
        truncate=rope.flag("truncate", True),
    )


def _eos_token_ids(read: _Reader, generation: Mapping[str, object]) -> tuple[int, ...]:
    """generation_config.json has the last word: it lists the ends of turn of chat models."""
    found = generation.get("eos_token_id")
    if found is None:
        found = read.values.get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(isinstance(token_id, int) for token_id in ids):
        raise ModelError(f"{read.source}: eos_token_id is {found!r}, expected token ids")
    return tuple(ids)


def _dtype(read: _Reader) -> DtypeName:
    name = read.values.get("dtype") or read.values.get("torch_dtype") or "bfloat16"
    for known in _DTYPES:
        if name == known:
            return known
    raise UnsupportedError(
        f"{read.source}: weights of dtype {name!r} are not supported; "
        f"supported are {', '.join(_DTYPES)}"
    )
