"""The shape of a decoder."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lcore.errors import message, require
from lcore.positions import RopeConfig

# model_type and architecture in a config.json
FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_OWNER = "ModelConfig"
_COUNTS = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")


@dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes a decoder's computation; two equal configs with equal weights give equal logits.

    Fields with a shorter form: num_kv_heads 0 is num_heads; head_dim 0 is hidden_size // num_heads;
    sliding_window is a tuple with one entry a layer (a number of tokens that a token sees, itself included, or None
    for all), or empty for None everywhere; sliding_rope, for the layers with a window, is rope where it is None.

    Raises: NotImplementedError for an unknown model_type; ValueError for sizes that do not fit together, and for
        what the family cannot have (windows in llama, unequal windows, a bias in mistral, ...).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int = 0
    head_dim: int = 0
    model_type: str = "llama"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = field(default_factory=RopeConfig)
    sliding_rope: RopeConfig | None = None
    sliding_window: tuple[int | None, ...] = ()
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.model_type not in FAMILIES:
            raise NotImplementedError(
                message(_OWNER, "model_type", f"be one of {', '.join(FAMILIES)}", self.model_type)
            )
        if self.num_kv_heads == 0:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        if self.head_dim == 0:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
        for name in _COUNTS:
            value = getattr(self, name)
            require(isinstance(value, int) and value > 0, _OWNER, name, "be a positive integer", value)
        fits = self.num_heads % self.num_kv_heads == 0
        require(fits, _OWNER, "num_heads", f"be a multiple of num_kv_heads = {self.num_kv_heads}", self.num_heads)
        require(self.head_dim % 2 == 0, _OWNER, "head_dim", "be even", self.head_dim)
        object.__setattr__(self, "sliding_window", _per_layer(self.sliding_window, self.num_layers))
        if self.model_type == "qwen2":
            object.__setattr__(self, "attention_bias", True)
        self._check_family()

    def _check_family(self) -> None:
        kind, windows = self.model_type, set(self.sliding_window)
        if kind == "llama":
            require(windows == {None}, _OWNER, "sliding_window", "be None for model_type llama", self.sliding_window)
        if kind == "mistral":
            require(len(windows) == 1, _OWNER, "sliding_window", "be equal in all layers of a mistral", windows)
            require(not self.attention_bias, _OWNER, "attention_bias", "be False for model_type mistral", True)
        sizes = windows - {None}
        require(len(sizes) <= 1, _OWNER, "sliding_window", "have one size", sorted(filter(None, sizes)))
        if kind != "llama":
            require(not self.mlp_bias, _OWNER, "mlp_bias", f"be False for model_type {kind}", True)

    @property
    def qk_norm(self) -> bool:
        """Whether each head of q and k is normalised before the rotation."""
        return self.model_type == "qwen3"

    @property
    def output_bias(self) -> bool:
        """Whether the output projection of attention has a bias."""
        return self.attention_bias and self.model_type != "qwen2"

    def layer_rope(self, layer: int) -> RopeConfig:
        """The rotary settings of one layer."""
        sliding = self.sliding_window[layer] is not None and self.sliding_rope is not None
        return self.sliding_rope if sliding and self.sliding_rope is not None else self.rope

    def to_dict(self) -> dict[str, Any]:
        """The config.json that transformers 5 writes for this model, without the dtype."""
        window = next(filter(None, self.sliding_window), None)
        rope: dict[str, Any] = self.rope.to_dict()
        if self.sliding_rope is not None:
            rope = {"full_attention": rope, "sliding_attention": self.sliding_rope.to_dict()}
        written: dict[str, Any] = {
            "architectures": [FAMILIES[self.model_type]],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_parameters": rope,
            "tie_word_embeddings": self.tie_word_embeddings,
            "initializer_range": self.initializer_range,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_ids[0] if len(self.eos_token_ids) == 1 else list(self.eos_token_ids) or None,
            "pad_token_id": self.pad_token_id,
        }
        if self.model_type in ("llama", "qwen3"):
            written["attention_bias"] = self.attention_bias
        if self.model_type == "llama":
            written["mlp_bias"] = self.mlp_bias
        if self.model_type == "mistral":
            written["sliding_window"] = window
        if self.model_type in ("qwen2", "qwen3"):
            kinds = ["full_attention" if size is None else "sliding_attention" for size in self.sliding_window]
            written |= {"use_sliding_window": window is not None, "sliding_window": window, "layer_types": kinds}
        return written


def _per_layer(windows: tuple[int | None, ...], layers: int) -> tuple[int | None, ...]:
    windows = tuple(windows) or (None,) * layers
    require(len(windows) == layers, _OWNER, "sliding_window", f"have num_layers = {layers} entries", len(windows))
    for window in windows:
        positive = window is None or (isinstance(window, int) and window > 0)
        require(positive, _OWNER, "sliding_window", "be positive or None", window)
    return windows
