"""Record a model's intermediates, tensor by tensor, under names that do not depend on this code.

    trace = record(model, input_ids)          # {"embedding": ..., "layers.0.input_norm": ..., ..., "logits": ...}
    trace = record(model, input_ids, step_lengths=[4, 1, 3])  # {"step.0.embedding": ..., ..., "step.2.logits": ...}

The models know nothing of it: most intermediates are outputs (or inputs) of modules, and forward hooks see those. The
others pass through three functions that can be replaced for a while: the rotation, the scale of queries, and attention
itself. While nothing is recorded nothing is replaced, so it costs nothing.
"""

from __future__ import annotations

import json
import re
import sys
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

import checkpoint
import ministral
import vision
from ministral import KVCache, MinistralDecoderLayer, RMSNorm
from pretrained import ACTIVATIONS, PreTrainedModel
from vision import PixtralAttentionLayer
from vision_config import Mistral3Config

FORMAT = "1"
# What damaged files of arrays and metadata raise, beside ValueError, TypeError and OSError.
DAMAGED = (
    zipfile.BadZipFile, zlib.error, tokenize.TokenError, NotImplementedError, KeyError, MemoryError, RecursionError,
    SyntaxError,
)  # fmt: skip

# name -> (dimensions, meaning), in the order of computing. N is a layer; B texts, S tokens, T keys, E hidden size,
# H heads, G key heads, D numbers of a head, F intermediate size, V vocabulary; P patches of all images, C their size,
# M merged patches. The words are written to golden/manifest.json.
POINTS: dict[str, tuple[str, str]] = {
    "vision.patches": ("P C", "patches of the images, after the convolution"),
    "vision.ln_pre": ("P C", "normed"),
    "vision.cos": ("P D", "cosines of the two-dimensional positions"),
    "vision.sin": ("P D", "sines of the same"),
    "vision.layers.N.input_norm": ("P C", "normed input of attention"),
    "vision.layers.N.attention.q": ("H P D", "queries"),
    "vision.layers.N.attention.k": ("H P D", "keys"),
    "vision.layers.N.attention.v": ("H P D", "values"),
    "vision.layers.N.attention.q_rotated": ("H P D", "queries at their positions"),
    "vision.layers.N.attention.k_rotated": ("H P D", "keys at their positions"),
    "vision.layers.N.attention.heads": ("P C", "the results of the heads, one after the other"),
    "vision.layers.N.attention.output": ("P C", "the same, after the output matrix"),
    "vision.layers.N.attention_residual": ("P C", "added to the input"),
    "vision.layers.N.post_attention_norm": ("P C", "normed input of the feed-forward part"),
    "vision.layers.N.mlp.gate": ("P F", "before the activation"),
    "vision.layers.N.mlp.up": ("P F", "the factor of the activation"),
    "vision.layers.N.mlp.activation": ("P F", "the gate after the activation"),
    "vision.layers.N.mlp.product": ("P F", "activation times up"),
    "vision.layers.N.mlp.down": ("P C", "output of the feed-forward part, before it is added"),
    "vision.layers.N.mlp_residual": ("P C", "output of the layer"),
    "projector.norm": ("P C", "the last layer that is used, normed"),
    "projector.merged": ("M C", "neighbouring patches, merged"),
    "projector.hidden": ("M E", "after the first matrix, before the activation"),
    "projector.output": ("M E", "embeddings of the images"),
    "embedding": ("B S E", "embeddings, with those of images in their places"),
    "layers.N.input_norm": ("B S E", "normed input of attention"),
    "layers.N.attention.q": ("B H S D", "queries"),
    "layers.N.attention.k": ("B G S D", "keys"),
    "layers.N.attention.v": ("B G S D", "values"),
    "layers.N.attention.q_rotated": ("B H S D", "queries at their positions"),
    "layers.N.attention.k_rotated": ("B G S D", "keys at their positions"),
    "layers.N.attention.q_scaled": ("B H S D", "queries scaled by their positions; as q_rotated without a query scale"),
    "layers.N.attention.scores": ("B H S T", "q k / sqrt(D), also of hidden keys"),
    "layers.N.attention.mask": ("B S T", "which keys are visible"),
    "layers.N.attention.probabilities": ("B H S T", "softmax of the visible scores"),
    "layers.N.attention.heads": ("B S HD", "the results of the heads, one after the other"),
    "layers.N.attention.output": ("B S E", "the same, after the output matrix"),
    "layers.N.attention_residual": ("B S E", "added to the input"),
    "layers.N.post_attention_norm": ("B S E", "normed input of the feed-forward part"),
    "layers.N.mlp.gate": ("B S F", "before the activation"),
    "layers.N.mlp.up": ("B S F", "the factor of the activation"),
    "layers.N.mlp.activation": ("B S F", "the gate after the activation"),
    "layers.N.mlp.product": ("B S F", "activation times up"),
    "layers.N.mlp.down": ("B S E", "output of the feed-forward part, before it is added"),
    "layers.N.mlp_residual": ("B S E", "output of the layer"),
    "final_norm": ("B S E", "the last layer's output, normed"),
    "logits": ("B S V", "scores of the next token"),
}

# What the cache of a layer holds after a step. T is the number of slots in use.
CACHE_POINTS: dict[str, tuple[str, str]] = {
    "cache.layers.N.positions": ("T", "the place in the text of the token in each slot, counted from 0"),
    "cache.layers.N.k_rotated": ("B G T D", "keys at their positions, slot by slot"),
    "cache.layers.N.v": ("B G T D", "values, slot by slot"),
}

# Parts of the modules' names in `ministral.py` and `vision.py` -> (point that is its input, point that is its output).
MODULES: dict[str, tuple[str | None, str | None]] = {
    "layers.N.input_layernorm": (None, "layers.N.input_norm"),
    "layers.N.self_attn.q_proj": (None, "layers.N.attention.q"),
    "layers.N.self_attn.k_proj": (None, "layers.N.attention.k"),
    "layers.N.self_attn.v_proj": (None, "layers.N.attention.v"),
    "layers.N.self_attn.o_proj": ("layers.N.attention.heads", "layers.N.attention.output"),
    "layers.N.post_attention_layernorm": ("layers.N.attention_residual", "layers.N.post_attention_norm"),
    "layers.N.mlp.gate_proj": (None, "layers.N.mlp.gate"),
    "layers.N.mlp.up_proj": (None, "layers.N.mlp.up"),
    "layers.N.mlp.down_proj": ("layers.N.mlp.product", "layers.N.mlp.down"),
    "layers.N": (None, "layers.N.mlp_residual"),
    "norm": (None, "final_norm"),
    "lm_head": (None, "logits"),
    "vision_tower.ln_pre": ("vision.patches", "vision.ln_pre"),
    "vision_tower.transformer.layers.N.attention_norm": (None, "vision.layers.N.input_norm"),
    "vision_tower.transformer.layers.N.attention.q_proj": (None, "vision.layers.N.attention.q"),
    "vision_tower.transformer.layers.N.attention.k_proj": (None, "vision.layers.N.attention.k"),
    "vision_tower.transformer.layers.N.attention.v_proj": (None, "vision.layers.N.attention.v"),
    "vision_tower.transformer.layers.N.attention.o_proj": (
        "vision.layers.N.attention.heads", "vision.layers.N.attention.output"),
    "vision_tower.transformer.layers.N.ffn_norm": (
        "vision.layers.N.attention_residual", "vision.layers.N.post_attention_norm"),
    "vision_tower.transformer.layers.N.feed_forward.gate_proj": (None, "vision.layers.N.mlp.gate"),
    "vision_tower.transformer.layers.N.feed_forward.up_proj": (None, "vision.layers.N.mlp.up"),
    "vision_tower.transformer.layers.N.feed_forward.down_proj": (
        "vision.layers.N.mlp.product", "vision.layers.N.mlp.down"),
    "vision_tower.transformer.layers.N": (None, "vision.layers.N.mlp_residual"),
    "multi_modal_projector.norm": (None, "projector.norm"),
    "multi_modal_projector.patch_merger": (None, "projector.merged"),
    "multi_modal_projector.linear_1": (None, "projector.hidden"),
    "multi_modal_projector.linear_2": (None, "projector.output"),
}  # fmt: skip
LAYER = re.compile(r"(?<=layers\.)\d+")
STEP = re.compile(r"^step\.(\d+)\.")


def general_name(name: str) -> str:
    """The name of a point without its step, and with N for its layer: "step.2.layers.0.mlp.up" -> "layers.N.mlp.up"."""
    return LAYER.sub("N", STEP.sub("", name))


def order(names: Iterable[str]) -> list[str]:
    """Names of points in the order of computing: step by step, layer by layer, the encoder first. Unknown names come
    last."""
    places = {name: place for place, name in enumerate(POINTS | CACHE_POINTS)}

    def key(name: str) -> tuple[int, int, int, int, str]:
        general = general_name(name)
        layer = LAYER.search(name)
        step = STEP.match(name)
        number = 0
        if step is not None:
            number = int(step[1])
        if general not in places:
            return sys.maxsize, 0, 0, 0, name
        if layer is None:
            return number, places[general], 0, 0, name
        first = "layers.N.input_norm"
        if is_vision(general):
            first = "vision.layers.N.input_norm"
        if general in CACHE_POINTS:
            first = "cache.layers.N.positions"
        return number, places[first], int(layer[0]), places[general], name

    return sorted(names, key=key)


def is_vision(name: str) -> bool:
    """True if a point or a layer is part of the image encoder."""
    return name.startswith("vision.")


class Recorder:
    """Collects tensors while a model runs; see `record`."""

    def __init__(self, text: Any, vision: Any, keep: Callable[[str], bool]) -> None:
        self.text = text  # configuration of the language model
        self.vision = vision  # and of the encoder, if there is one
        self.keep = keep
        self.trace: dict[str, Tensor] = {}
        self.layer = ""  # the one that is running: "layers.3" or "vision.layers.3"
        self.step = ""  # the one that is running: "step.3."; empty for a whole text

    def add(self, point: str, tensor: Tensor) -> None:
        """Keep a copy under the name of a point, whose N becomes the number of the running layer."""
        name = self.step + point.replace("layers.N", self.layer.removeprefix("vision."))
        if self.keep(name):
            self.trace[name] = tensor.detach().clone()

    def add_cache(self, cache: KVCache) -> None:
        """Keep a copy of the slots that are in use."""
        for number, layer in enumerate(cache.layers):
            self.layer = f"layers.{number}"
            slots = layer.length
            if layer.window is not None:
                slots = min(slots, layer.window)
            # Slot s of a ring has the newest position p with p % window == s.
            newest = layer.length - 1
            positions = newest - (newest - torch.arange(slots)) % slots
            self.add("cache.layers.N.positions", positions.double())
            self.add("cache.layers.N.k_rotated", layer.keys[:, :, :slots])
            self.add("cache.layers.N.v", layer.values[:, :, :slots])

    def watch(self, model: PreTrainedModel) -> list[Any]:
        """Put hooks on the modules of MODULES and on the layers; returns their handles."""
        handles: list[Any] = []
        for path, module in model.named_modules():
            name = path.removeprefix("model.").removeprefix("language_model.")
            if isinstance(module, (MinistralDecoderLayer, PixtralAttentionLayer)):
                layer = name.replace("vision_tower.transformer.", "vision.")
                handles.append(module.register_forward_pre_hook(partial(self._enter, layer)))
            points = MODULES.get(LAYER.sub("N", name))
            if points is not None:
                handles.append(module.register_forward_hook(partial(self._leave, *points)))
        return handles

    def _enter(self, layer: str, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        self.layer = layer
        if layer == "layers.0":
            self.add("embedding", arguments[0])
        elif is_vision(layer):
            cos, sin = arguments[1]
            self.add("vision.cos", cos[0])
            self.add("vision.sin", sin[0])

    def _leave(self, before: str | None, after: str | None, _: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, tuple):
            output = output[0]
        if before is not None:
            self._add_of_module(before, inputs[0])
        if after is not None:
            self._add_of_module(after, output)

    def _add_of_module(self, point: str, tensor: Tensor) -> None:
        config = self.text
        if is_vision(point):
            config = self.vision
            if tensor.ndim == 3:  # (1, P, C)
                tensor = tensor[0]
        if point.endswith((".q", ".k", ".v")):
            tensor = tensor.view(*tensor.shape[:-1], -1, config.head_dim).transpose(-3, -2)
        self.add(point, tensor)
        if point.endswith(".gate"):
            activation = ACTIVATIONS[config.hidden_act](tensor)
            self.add(point.replace("gate", "activation"), activation)

    def rotate(
        self, original: Callable[..., tuple[Tensor, Tensor]], *arguments: Tensor
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Replacement of `apply_rotary_pos_emb`."""
        q, k = original(*arguments)
        if is_vision(self.layer):
            self.add("vision.layers.N.attention.q_rotated", q[0])
            self.add("vision.layers.N.attention.k_rotated", k[0])
        else:
            self.add("layers.N.attention.q_rotated", q)
            self.add("layers.N.attention.k_rotated", k)
        return q, k

    def attend(
        self, original: Callable[..., tuple[Tensor, Tensor | None]], q: Tensor, k: Tensor, v: Tensor,
        mask: Tensor | None, scaling: float, dropout: float,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Replacement of `eager_attention`."""
        out, probabilities = original(q, k, v, mask, scaling, dropout)
        assert probabilities is not None
        keys = ministral.repeat_kv(k, q.shape[1] // k.shape[1])
        scores = torch.matmul(q, keys.transpose(2, 3)) * scaling
        B, _, S, T = scores.shape
        visible = torch.ones(B, 1, S, T, dtype=torch.bool, device=q.device)
        if mask is None:
            visible = visible.tril(T - S)
        else:
            visible = visible & mask
        self.add("layers.N.attention.q_scaled", q)
        self.add("layers.N.attention.scores", scores)
        self.add("layers.N.attention.mask", visible[:, 0])
        self.add("layers.N.attention.probabilities", probabilities)
        return out, probabilities


@torch.no_grad()
def record(
    model: PreTrainedModel,
    input_ids: Tensor,
    keep: Callable[[str], bool] = lambda name: True,
    step_lengths: Tensor | Sequence[int] | None = None,
    **arguments: Any,
) -> dict[str, Tensor]:
    """Run a model over whole texts, eager and without cache, or step by step, and return its intermediates.

    They are sorted by name in the order of computing, in the model's dtype ("mask" is bool, "positions" float64).

    Args:
        model: any causal language model of this project, or the vision model.
        input_ids: (B, S).
        keep: which names are kept.
        step_lengths: how many tokens each step has, through the cache; None: whole texts. The names of step 2 begin
            with "step.2."; its keys T are those that the cache returns, in the cache's order.
        arguments: attention_mask, position_ids, pixel_values, image_sizes: see `forward` of the model.

    Raises:
        ValueError: the steps do not have S tokens together.
    """
    text_config = model.config.get_text_config()
    parts = [text_config]
    vision_config = None
    if isinstance(model.config, Mistral3Config):
        vision_config = model.config.vision_config
        parts.append(vision_config)
    recorder = Recorder(text_config, vision_config, keep)
    if arguments.get("attention_mask") is None:  # without one, jumps in position_ids would begin new texts
        arguments["attention_mask"] = torch.ones_like(input_ids)
    with ExitStack() as stack:
        for part in parts:
            stack.enter_context(patch.object(part, "attn_implementation", "eager"))
        for module in (ministral, vision):
            rotate = partial(recorder.rotate, module.apply_rotary_pos_emb)
            stack.enter_context(patch.object(module, "apply_rotary_pos_emb", rotate))
        attend = partial(recorder.attend, ministral.ATTENTION["eager"])
        stack.enter_context(patch.dict(ministral.ATTENTION, eager=attend))
        for handle in recorder.watch(model):
            stack.callback(handle.remove)
        if step_lengths is None:
            model(input_ids.to(model.device), use_cache=False, **arguments)
        else:
            lengths = torch.as_tensor(step_lengths).tolist()
            run_steps(model, recorder, input_ids.to(model.device), lengths, arguments)
    return {name: recorder.trace[name] for name in order(recorder.trace)}


def run_steps(
    model: PreTrainedModel, recorder: Recorder, input_ids: Tensor, lengths: Sequence[int], arguments: dict[str, Any]
) -> None:  # fmt: skip
    """Run a model over texts in steps of some lengths; see `record`. Images belong to the first step."""
    S = input_ids.shape[1]
    if sum(lengths) != S or min(lengths) < 1:
        raise ValueError(f"steps of {lengths} tokens are impossible; allowed: at least 1 each, together {S}")
    cache = KVCache(model.config)
    mask = arguments.pop("attention_mask")
    positions = arguments.pop("position_ids", None)
    end = 0
    for number, length in enumerate(lengths):
        start, end = end, end + length
        recorder.step = f"step.{number}."
        if positions is not None:
            arguments["position_ids"] = positions[:, start:end]
        ids = input_ids[:, start:end]
        model(ids, attention_mask=mask[:, :end], past_key_values=cache, use_cache=True, **arguments)
        recorder.add_cache(cache)
        arguments.pop("pixel_values", None)
        arguments.pop("image_sizes", None)


@contextmanager
def rounded_differently(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """Give a model the rounding errors of another right port, drawn from a seed.

    Every matrix product adds its terms in another order, which is the noise of float32. The outputs of matrices,
    norms and the convolution move by up to half a unit in the last place, which is the noise of 16-bit types: their
    sums are float32 and hardly depend on the order, but ports round at different places.
    """
    generator = torch.Generator().manual_seed(seed)

    def change(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if isinstance(module, nn.Linear):
            terms = torch.randperm(module.in_features, generator=generator).to(output.device)
            output = F.linear(inputs[0][..., terms], module.weight[:, terms], module.bias)
        half_unit = torch.finfo(output.dtype).eps / 2
        steps = 2 * torch.rand(output.shape, generator=generator, dtype=torch.float64) - 1
        moved = output.double() * (1 + half_unit * steps.to(output.device))
        return moved.to(output.dtype)

    modules = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d, RMSNorm))]
    handles = [module.register_forward_hook(change) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# -------------------------------------------------------------------------------------------------------- files


def dimensions(name: str) -> str:
    """The names of a tensor's dimensions, "B S E"; empty for an unknown tensor."""
    return (POINTS | CACHE_POINTS).get(general_name(name), ("", ""))[0]


def save(
    path: Path, trace: Mapping[str, Tensor], inputs: Mapping[str, Tensor], about: Mapping[str, Any]
) -> None:  # fmt: skip
    """Write a trace with its inputs ("input.input_ids", ...) to a safetensors file.

    The names of all dimensions and `about` (its model, type, prompt) are in the metadata: JSON under the single key
    "trace", because the library writes several keys in any order. The same trace gives the same bytes.
    """
    tensors = {name: tensor.cpu().contiguous() for name, tensor in trace.items()}
    tensors |= {f"input.{name}": tensor.cpu().contiguous() for name, tensor in inputs.items()}
    described = {STEP.sub("", name): dimensions(name) for name in trace}
    content = {**about, "dimensions": described, "torch": torch.__version__, "format": FORMAT}
    metadata = {"trace": json.dumps(content, ensure_ascii=False)}
    checkpoint.replace_file(path, lambda temporary: checkpoint.write_tensors(temporary, tensors, metadata))


def _expect_real_size(path: Path) -> None:
    """Raise ValueError if the arrays of a compressed file are more than a hundred times as large as the file, and more
    than a gigabyte."""
    with zipfile.ZipFile(path) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
    if size > max(100 * path.stat().st_size, 2**30):
        raise ValueError(f"{path.stat().st_size} bytes stand for {size}")


def take_inputs(trace: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the inputs from a trace that was loaded, and return them: "input.input_ids" is `input_ids`."""
    names = [name for name in trace if name.startswith("input.")]
    return {name.removeprefix("input."): trace.pop(name) for name in names}


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a .safetensors, .npz or .npy file, in the order of computing, and the `about` of a trace. The
    array of a .npy file, which has no name, is taken for the logits.

    Raises:
        FileNotFoundError: no such file.
        ValueError: none of these formats.
    """
    if path.is_dir():
        raise FileNotFoundError(f"{path} is a directory; give a file")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        if path.suffix == ".npy":
            return {"logits": torch.from_numpy(np.load(path, allow_pickle=False))}, {}
        if path.suffix == ".npz":
            _expect_real_size(path)
            with np.load(path, allow_pickle=False) as arrays:
                tensors = {name: torch.from_numpy(np.array(arrays[name])) for name in arrays}
            return {name: tensors[name] for name in order(tensors)}, {}
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in order(file.keys())}
            about = {}
            metadata = file.metadata()
            if metadata is not None:
                about = json.loads(metadata.get("trace", "{}"))
    except (SafetensorError, OSError, EOFError, ValueError, TypeError, *DAMAGED) as error:
        problem = " ".join(f"{type(error).__name__} {error}".split())[:100]
        raise ValueError(f"{path} is no trace ({problem}); allowed: .safetensors, .npz or .npy") from error
    if not isinstance(about, dict):
        about = {}
    return tensors, about
