"""Tiny random models and a tiny tokenizer, made by transformers and tokenizers themselves.

    save_tiny_model("llama", tmp_path / "model")     a folder that any engine can load
    tiny_model("qwen3", num_key_value_heads=1)       the same model in memory, fp32

The weights are wide enough (std 0.1, norms and biases random too) that a wrong RoPE, mask, norm
or bias moves the logits by far more than rounding does.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

Family = Literal["llama", "mistral", "qwen2", "qwen3", "smollm"]
FAMILIES: tuple[Family, ...] = ("llama", "mistral", "qwen2", "qwen3", "smollm")

VOCAB_SIZE = 384
PAD_TOKEN, START_TOKEN, END_TOKEN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"  # ids 0, 1, 2
END_TOKEN_ID = 2

CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_DIMENSIONS: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": END_TOKEN_ID,
    "pad_token_id": 0,
}

# What differs: transformers' config class, and the GQA groups (1, 3 and 4 are covered).
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"num_key_value_heads": 1}),
    "mistral": ("MistralConfig", {"num_key_value_heads": 4, "sliding_window": None}),
    "qwen2": ("Qwen2Config", {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3Config", {"num_key_value_heads": 2, "head_dim": 32}),
    "smollm": (
        "LlamaConfig",
        {
            "hidden_size": 48,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
        },
    ),
}

_CORPUS = (
    "The quick brown fox jumps over the lazy dog while the committee reads the weather report.",
    "Translate the sentence into French. Summarize the article in one sentence.",
    "system user assistant You are a helpful assistant that answers with the translation only.",
    "A review of the restaurant: the soup was cold, the bread was warm, the waiter was kind.",
    "In 2024 the city opened 12 new libraries, 3 bridges and a park of 450 hectares.",
)


def tiny_config(family: Family, **overrides: Any) -> PreTrainedConfig:
    """The transformers config of a tiny model; `overrides` are config fields."""
    import transformers

    class_name, changes = _FAMILIES[family]
    config: PreTrainedConfig = getattr(transformers, class_name)(
        **{**_DIMENSIONS, **changes, **overrides}
    )
    return config


def tiny_model(family: Family, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A tiny random model in fp32 on the CPU, ready for inference."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            tiny_config(family, **overrides), dtype=torch.float32, attn_implementation="eager"
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.uniform_(0.5, 1.5)
                elif name.endswith(".bias"):
                    parameter.normal_(std=0.3)
    model.generation_config.do_sample = False
    return model.eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most VOCAB_SIZE tokens with the ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD_TOKEN, START_TOKEN, END_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    fast: PreTrainedTokenizerFast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=START_TOKEN,
        eos_token=END_TOKEN,
        pad_token=PAD_TOKEN,
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )
    return fast


def save_tiny_model(
    family: Family,
    folder: Path,
    *,
    seed: int = 0,
    tokenizer: bool = True,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "1GB",
    **overrides: Any,
) -> PreTrainedModel:
    """Saves `tiny_model(family, seed=seed, **overrides)` as a model folder and returns it.

    `dtype` (default fp32) is what the weights are rounded to before they are saved and returned.
    `max_shard_size`, such as "20KB", makes a sharded folder. Without `tokenizer` the folder holds
    no tokenizer files.
    """
    model = tiny_model(family, seed=seed, **overrides)
    if dtype is not None:
        model = model.to(dtype)
        model.config.dtype = dtype
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if tokenizer:
        tiny_tokenizer().save_pretrained(folder)
    return model
