"""Random tiny models that use every feature within 40 tokens, here and in Transformers, with equal weights.

Everything is drawn from a `random.Random`. In Hypothesis tests it is one that can be shrunk (`st.randoms`), in
statistical tests a seeded one.
"""

from __future__ import annotations

import inspect
import random
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.ministral3 import modeling_ministral3

import heads
import ministral
import ministral3
from ministral import KVCache, MinistralConfig, MinistralForCausalLM
from ministral3 import Ministral3Config
from pretrained import PreTrainedModel

transformers.logging.disable_default_handler()  # tests/conftest.py listens instead
# Before its pull request 44860, Transformers scaled queries by their place in the cache instead of their position,
# which is wrong with padding and with explicit positions. With such a version the scale is left out of the comparison.
SCALES_BY_POSITION = "position_ids" in inspect.signature(modeling_ministral3.Ministral3Attention.forward).parameters
VOCAB = 50
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEADS = ("SequenceClassification", "TokenClassification", "QuestionAnswering")
Random = random.Random


@dataclass
class Case:
    """A model of ours, the same in Transformers, and an input."""

    ours: Any  # a MinistralForCausalLM, or another task's model
    theirs: Any
    ids: Tensor  # (B, S), pad_token_id at padding if there is one
    mask: Tensor | None  # (B, S), 0 at padding
    chunks: list[int]  # lengths that add up to S

    @property
    def padding_mask(self) -> Tensor:
        """(B, S) True where a token is not padding."""
        return torch.ones_like(self.ids, dtype=torch.bool) if self.mask is None else self.mask.bool()

    def truth(self) -> Any:
        """Our model with the same weights in float64."""
        model = type(self.ours)(replace(self.ours.config, attn_implementation="eager"))
        model.load_state_dict(self.ours.state_dict())
        return model.double().to(self.ids.device).eval()

    def labels(self, rng: Random) -> Tensor:
        """Labels for the loss: -100 at some random tokens, and wherever padding would be the input or the target."""
        labels = self.ids.clone()
        labels[:, 1:][~(self.padding_mask[:, 1:] & self.padding_mask[:, :-1])] = -100
        for _ in range(rng.randint(0, 3)):
            labels[rng.randrange(len(labels)), rng.randrange(labels.shape[1])] = -100
        return labels


def draw_config(
    rng: Random, family: str | None = None, scaled: bool = SCALES_BY_POSITION, **fixed: Any
) -> MinistralConfig:
    """A tiny configuration of a given or a random family: windows from 1 to longer than the text, all three
    YaRN zones, every rule for its magnitude, query scales above 1, head_dim * heads different from hidden_size, GQA
    with one key head and more, tied and not. `scaled`: with the query scale, which old versions of Transformers
    compute in another way."""
    groups, kv_heads = rng.choice([1, 2, 4]), rng.choice([1, 2, 3])
    layers = rng.randint(1, 3)
    common: dict[str, Any] = dict(
        vocab_size=VOCAB,
        hidden_size=rng.choice([12, 20, 32]),
        intermediate_size=rng.choice([16, 40]),
        num_hidden_layers=layers,
        num_attention_heads=groups * kv_heads,
        num_key_value_heads=kv_heads,
        head_dim=rng.choice([4, 8, 16]),
        hidden_act=rng.choice(["silu", "silu", "gelu", "gelu_pytorch_tanh", "relu"]),
        rms_norm_eps=rng.choice([1e-6, 1e-5, 1e-2]),
        tie_word_embeddings=rng.random() < 0.5,
        max_position_embeddings=256,
        attn_implementation=rng.choice(["eager", "sdpa"]),
    )
    if (family or rng.choice(["ministral", "ministral3"])) == "ministral":
        window = rng.choice([1, 2, 3, 5, 8, 16, 64])
        kinds = [rng.choice(["full_attention", "sliding_attention"]) for _ in range(layers)]
        return MinistralConfig(
            **common | dict(sliding_window=window, layer_types=kinds, rope_theta=rng.choice([100.0, 1e4, 1e8])) | fixed
        )
    rope: dict[str, Any] = dict(
        rope_type="yarn",
        rope_theta=rng.choice([100.0, 1e4]),
        factor=rng.choice([2.0, 16.0]),
        original_max_position_embeddings=rng.choice([8, 16]),
        beta_fast=rng.choice([2.0, 4.0, 32.0]),
        beta_slow=rng.choice([0.25, 1.0]),
        llama_4_scaling_beta=rng.choice([0.0, 0.1, 0.5]) if scaled else 0.0,
    )
    for key in ("beta_fast", "beta_slow"):  # 32 and 1 by default
        if rng.random() < 0.3:
            del rope[key]
    for key, values in (("mscale", [0.0, 0.7, 1.0]), ("mscale_all_dim", [0.0, 1.0]), ("attention_factor", [1.3])):
        if rng.random() < (0.2 if key == "attention_factor" else 0.7):
            rope[key] = rng.choice(values)
    if rng.random() < 0.3:
        rope["truncate"] = False
    special = dict(sliding_window=rng.choice([None, None, 5]), rope_parameters=rope, pad_token_id=0)
    return Ministral3Config(**common | special | fixed)


def our_class(family: str, task: str) -> type[PreTrainedModel]:
    """The class of ours for a model type and a task."""
    name = ("Ministral3" if family == "ministral3" else "Ministral") + (f"For{task}" if task else "Model")
    classes = [getattr(module, name) for module in (ministral, ministral3, heads) if hasattr(module, name)]
    return classes[0]


def pair(
    config: MinistralConfig, dtype: torch.dtype, seed: int, device: str = "cpu", task: str = "CausalLM"
) -> tuple[Any, Any]:
    """Our model and Transformers', with the same random weights."""
    cls = our_class(config.model_type, task)
    their_config = getattr(transformers, type(config).__name__)(**their_arguments(config))
    their_config._attn_implementation = config.attn_implementation
    theirs = getattr(transformers, cls.__name__)._from_config(their_config, dtype=dtype).eval()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in theirs.parameters():  # larger than a fresh model's, so that attention is far from uniform
            p.copy_(torch.randn(p.shape, generator=g) * (0.4 if p.ndim > 1 else 0.3) + (p.ndim == 1))
    ours = cls(config).to(dtype).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours.to(device), theirs.to(device)


def their_arguments(config: MinistralConfig) -> dict[str, Any]:
    """Constructor arguments for Transformers' configuration class."""
    return {key: value for key, value in config.to_dict().items() if key != "model_type"}


def draw_case(
    rng: Random, device: str = "cpu", dtype: torch.dtype | None = None, task: str = "CausalLM", **fixed: Any
) -> Case:
    """A model, and texts of unequal length with padding on either side."""
    config = draw_config(rng, **fixed)
    ours, theirs = pair(config, dtype or rng.choice(DTYPES), rng.randrange(2**31), device, task)
    B, S = rng.randint(1, 3), rng.randint(1, 40)
    ids = torch.tensor([[rng.randrange(1, VOCAB) for _ in range(S)] for _ in range(B)], device=device)
    mask = None
    if rng.random() < 0.5:
        side, mask = rng.choice(["left", "right"]), torch.ones_like(ids)
        for row in range(B):
            padding = rng.randint(0, S - 1)
            mask[row, slice(0, padding) if side == "left" else slice(S - padding, S)] = 0
        if config.pad_token_id is not None:
            ids[mask == 0] = config.pad_token_id
    return Case(ours, theirs, ids, mask, draw_chunks(rng, S))


def draw_chunks(rng: Random, total: int) -> list[int]:
    """Lengths that add up to `total`: single tokens, short and long chunks mixed."""
    chunks: list[int] = []
    while sum(chunks) < total:
        chunks.append(min(rng.choice([1, 1, 2, 5, 9, 20, 40]), total - sum(chunks)))
    return chunks


def cache_name(model: Any) -> str:
    """Name of the cache among the arguments and results of a model, ours or Transformers': "past_key_values", and
    "cache" in Transformers from 5.24 on."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


@torch.no_grad()
def run_chunked(model: Any, case: Case, cache: Any = None) -> Tensor:
    """Logits (B, S, V) of a text that is computed with a cache chunk by chunk, by a model of either side."""
    cache = KVCache(model.config) if cache is None and isinstance(model, MinistralForCausalLM) else cache
    name, start, logits = cache_name(model), 0, []
    for length in case.chunks:
        end = start + length
        mask = None if case.mask is None else case.mask[:, :end]
        out = model(case.ids[:, start:end], attention_mask=mask, use_cache=True, **{name: cache})
        cache, start = getattr(out, name), end
        logits.append(out.logits)
    return torch.cat(logits, dim=1)
