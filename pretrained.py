"""The base classes of configurations and models, apart from what a model computes.

    PreTrainedConfig    read a configuration from a config.json, fill in fields, write it back
    PreTrainedModel     load and save a model, tie weights, initialise them, gradient checkpointing
    Linear, Embedding   PyTorch's layers without their own initialisation
    ...Output...        the results of a forward pass

`ministral.py` is the model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute_in_backward

import checkpoint
from checks import as_device, check_rope_parameters, expect_classes, require

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}
# Other model types that compute the same function, each with the defaults in which it differs.
SAME_FUNCTION: dict[str, dict[str, dict[str, Any]]] = {
    "ministral": {
        "mistral": {},
        "llama": {"intermediate_size": 11008, "num_key_value_heads": None, "max_position_embeddings": 2048},
    },
}
Config = TypeVar("Config", bound="PreTrainedConfig")
Output = TypeVar("Output")
Model = TypeVar("Model", bound="PreTrainedModel")


# ---------------------------------------------------------------------------------------------- configuration


@dataclass
class PreTrainedConfig:
    """What all configurations have in common: they are read from a config.json and written to one."""

    model_type: ClassVar[str]
    source: ClassVar[str] = "config.json"
    # Whether a model of this configuration can load the text part of a vision model's files.
    reads_text_config: ClassVar[bool] = False
    # The rope_types, and the keys of rope_parameters, each with the lowest number allowed (None: not a number).
    rope_types: ClassVar[tuple[str, ...]] = ("default",)
    rope_keys: ClassVar[dict[str, float | None]] = {
        "rope_type": None, "rope_theta": 1.0, "partial_rotary_factor": 1.0,
    }  # fmt: skip
    # Fields that are not written to a config.json.
    unwritten: ClassVar[tuple[str, ...]] = ("attn_implementation", "rope_theta", "num_labels")

    def get_text_config(self) -> Any:
        """The configuration of the text model: this one, if it has no other part."""
        return self

    @classmethod
    def from_dict(cls: type[Config], d: dict[str, Any]) -> Config:
        """Build a configuration from the content of a config.json, or from a part of it.

        Both generations of Transformers are read: `rope_theta` and `rope_scaling`, or `rope_parameters`. Another
        `model_type` is accepted when it computes the same function.

        Raises:
            ValueError: another architecture, biases, quantised weights, or an impossible value.
        """
        known = {field.name for field in fields(cls)} - {"attn_implementation"}
        model_types: dict[str, dict[str, Any]] = {cls.model_type: {}} | SAME_FUNCTION.get(cls.model_type, {})
        values = checkpoint.config_fields(d, known, model_types)
        try:
            return cls(**values)
        except TypeError as error:  # a list in the place of a number, for example
            raise ValueError(f"{cls.source} holds a value of the wrong kind: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The content of a config.json that Transformers 5 loads. Fields of classifiers are in it only if set."""
        _, id2label, label2id = checkpoint.label_maps()
        unset = {"id2label": id2label, "label2id": label2id, "problem_type": None, "classifier_dropout": None}
        content: dict[str, Any] = {"model_type": self.model_type}
        for name, value in asdict(self).items():
            default = name in unset and value == unset[name]
            if name not in self.unwritten and not default:
                content[name] = value
        return content

    def complete_fields(self) -> None:
        """Fill in the fields of rotary positions and of labels that are not given."""
        self.complete_rope_parameters()
        self.complete_labels()

    def complete_labels(self: Any) -> None:
        """Fill in num_labels, id2label and label2id from those that are given, see `checkpoint.label_maps`."""
        labels = checkpoint.label_maps(self.num_labels, self.id2label, self.label2id)
        self.num_labels, self.id2label, self.label2id = labels

    def complete_rope_parameters(self: Any) -> None:
        """Fill in `rope_theta` and `rope_parameters`, each from the other where it is not given, and check both."""
        given = self.rope_parameters
        require(self, "rope_parameters", isinstance(given, (dict, type(None))), "an object, or none")
        rope: dict[str, Any] = {}
        if given is not None:
            rope.update(given)
        older_name = rope.pop("type", None)
        if "rope_type" not in rope:
            rope["rope_type"] = "default"
            if older_name:
                rope["rope_type"] = older_name
        theta = self.rope_theta
        if theta is None:
            theta = 10000.0
        theta = rope.setdefault("rope_theta", theta)
        agrees = self.rope_theta in (None, theta)
        require(self, "rope_theta", agrees, f"None, or rope_parameters' own, {theta}")
        self.rope_theta = theta
        self.rope_parameters = rope
        check_rope_parameters(self, older_name)


# ---------------------------------------------------------------------------------------------------- results


def exportable(cls: type[Output]) -> type[Output]:
    """Register a dataclass with `torch.export`, so that an exported model can return it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.6 calls a deprecated function of its own
        torch.export.register_dataclass(cls, serialized_type_name=f"{cls.__module__}.{cls.__name__}")
    return cls


@exportable
@dataclass
class BaseModelOutputWithPast:
    """The result of a backbone.

    Attributes:
        last_hidden_state: (B, S, E), normed.
        past_key_values: the `KVCache`, which holds the new tokens too; None without a cache.
        hidden_states: num_hidden_layers + 1 tensors (B, S, E): the embeddings, then the output of each layer. The last
            one is normed, so it equals `last_hidden_state`.
        attentions: one (B, H, S, K) tensor of probabilities for each layer, keys in order of position.
    """

    last_hidden_state: Tensor
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@exportable
@dataclass
class CausalLMOutputWithPast:
    """The result of a language model: `logits` (B, S or fewer, V), and `loss`, a scalar, if labels were given. The
    others are those of `BaseModelOutputWithPast`."""

    loss: Tensor | None
    logits: Tensor
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


# ----------------------------------------------------------------------------------------------------- weights


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype of norms, rotary tables and softmax: float32 for 16-bit types; float64 stays float64."""
    return torch.promote_types(dtype, torch.float32)


class Linear(nn.Linear):
    """`nn.Linear`, by default without bias. It does not initialise itself: `init_weights` or a checkpoint does."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias)

    def reset_parameters(self) -> None:
        pass


class Embedding(nn.Embedding):
    """`nn.Embedding` without its own initialisation, which costs 1 s of imports on the meta device."""

    def reset_parameters(self) -> None:
        pass


class FrequencyCache(nn.Module):
    """Keep the result of `inverse_frequencies` for each dtype and device. Copies and pickles compute it again."""

    def __init__(self) -> None:
        super().__init__()
        self._frequencies: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_frequencies": {}}

    def inverse_frequencies(self, dtype: torch.dtype) -> Tensor:
        """The angle per position of each pair, in radians, on the CPU."""
        raise NotImplementedError

    def frequencies(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The inverse frequencies on a device."""
        cached = self._frequencies.get((dtype, device))
        if cached is not None:
            return cached
        frequencies = self.inverse_frequencies(dtype).to(device)
        if not torch.compiler.is_compiling():  # a traced tensor has no values to keep
            self._frequencies[dtype, device] = frequencies
        return frequencies


@torch.no_grad()
def init_weights(module: nn.Module, std: float) -> None:
    """Initialise as Transformers does: every matrix in `module` from Normal(0, std), biases and the embedding of the
    padding token with zeros. Norms start at one. Tensors on the meta device have no values and are left alone."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Embedding, nn.Conv2d)) and not part.weight.is_meta:
            part.weight.normal_(0.0, std)
            if isinstance(part, nn.Linear) and part.bias is not None:
                part.bias.zero_()
            if isinstance(part, nn.Embedding) and part.padding_idx is not None:
                part.weight[part.padding_idx].zero_()


# -------------------------------------------------------------------------------------------------------- loss


def causal_lm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in nats of each token given the tokens before it.

    logits (B, S, V). labels (B, S) are the input ids, -100 where a token does not count; they are shifted by one here.
    """
    expect_classes(labels, logits.shape[-1])
    targets = F.pad(labels.long().to(logits.device), (0, 1), value=-100)[:, 1:]
    logits = logits.to(at_least_float32(logits.dtype))
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)


def logits_and_loss(
    lm_head: nn.Module, hidden_states: Tensor, labels: Tensor | None, logits_to_keep: int | Tensor
) -> tuple[Tensor, Tensor | None]:
    """The head on the positions to keep of (B, S, E): logits (B, S or fewer, V), and the loss if there are labels."""
    keep: Any = logits_to_keep
    if isinstance(keep, int):
        keep = slice(-keep, None)
    logits = lm_head(hidden_states[:, keep])
    if labels is None:
        return logits, None
    return logits, causal_lm_loss(logits, labels)


# ------------------------------------------------------------------------------------------------------ models


class PreTrainedModel(nn.Module):
    """A model that is read from a directory and written to one."""

    config_class: ClassVar[type[Any]]
    base_model_prefix: ClassVar[str] = "model"  # name of the attribute that holds the backbone
    new_layer: ClassVar[str | None] = None  # a layer that files may lack: it is initialised then
    # {parameter: the one whose tensor it may share}
    may_tie: ClassVar[Mapping[str, str]] = MappingProxyType({})

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.generation_config = checkpoint.GenerationConfig()  # the defaults of `generate`
        self._gradient_checkpointing = False

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether training stores only the input of each layer and computes the rest again in the backward pass.

        This takes less memory and one more forward pass. The results have the bits of `use_cache=False`. It is off
        until it is set. Source: https://arxiv.org/abs/1604.06174.
        """
        return self._gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        for module in self.modules():
            if isinstance(module, PreTrainedModel):
                module._gradient_checkpointing = on

    @property
    def recomputes(self) -> bool:
        """Whether this forward pass uses gradient checkpointing. Without gradients there is no backward pass."""
        return self._gradient_checkpointing and self.training and torch.is_grad_enabled()

    def run_layer(self, layer: nn.Module, *inputs: Any) -> Any:
        """Call a layer, and with gradient checkpointing call it again in the backward pass."""
        if self.recomputes:
            return recompute_in_backward(layer, *inputs, use_reentrant=False)
        return layer(*inputs)

    @property
    def base_model(self) -> PreTrainedModel:
        """The backbone: the part without a head, or this model itself if it has no head."""
        return getattr(self, self.base_model_prefix, self)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(self.parameters()).dtype

    def tie_weights(self) -> None:
        """Make each tied parameter and the other one the same tensor. Needed again after tensors were replaced."""
        if not self.may_tie or not self.config.tie_word_embeddings:
            return
        for name, other in self.may_tie.items():
            module, _, attribute = name.rpartition(".")
            setattr(self.get_submodule(module), attribute, self.get_parameter(other))

    def init_weights(self) -> None:
        """Initialise all weights, see the function of the same name."""
        init_weights(self, self.config.initializer_range)

    def init_head(self: Any) -> None:
        """Tie the head of a new language model to the embeddings, or initialise it."""
        if self.config.tie_word_embeddings:
            self.tie_weights()
        else:
            init_weights(self.lm_head, self.config.get_text_config().initializer_range)

    # Loading.

    @classmethod
    def from_pretrained(
        cls: type[Model], path_or_hub_id: str | Path, dtype: torch.dtype | str | None = None,
        device: str | torch.device | None = None, attn_implementation: str | None = None,
        revision: str | None = None, **changes: Any,
    ) -> Model:  # fmt: skip
        """Load a model from a directory or from the Hub ("owner/name").

        The directory holds config.json and safetensors weights, or params.json and consolidated weights. A text model
        also loads from the files of a vision model, whose vision part is left out.

        Args:
            dtype: cast the weights, to torch.bfloat16 or "bfloat16" for example; None or "auto" keeps the stored type.
                (`torch_dtype` is another name of it.)
            device: where to put the weights; None is the CPU, where weights that need no cast stay mapped to the file.
                (`device_map` is another name of it.)
            attn_implementation: "sdpa" or "eager"; None is the configuration's.
            revision: branch, tag or commit of a Hub repository.
            changes: fields of the configuration to set, such as `num_labels=3`.

        Returns:
            The model in eval mode. The head is the stored one. If none is stored, it is tied to the embeddings; a
            warning says so where config.json says otherwise. FP8 weights become `dtype` (None: the one that config.json
            names, or bfloat16), with a warning. If the files have no classification layer for a model of `heads.py`, it
            is initialised, and a warning names it. `generation_config` is the content of generation_config.json.

        Raises:
            FileNotFoundError: no such directory or repository, or a file is missing in it.
            ValueError: not a configuration of this class; tensors missing, unexpected, misshapen or unreadable.
        """
        dtype = checkpoint.as_dtype(dtype, changes.pop("torch_dtype", None))
        to = as_device(device, changes.pop("device_map", None))
        directory = checkpoint.find(path_or_hub_id, revision)
        content = checkpoint.read_config(directory)
        config = cls._read_config(content, changes)
        if attn_implementation is not None:
            config = replace(config, attn_implementation=attn_implementation)
        with torch.device("meta"):
            model = cls(config)
        stored_tied = checkpoint.text_config(content).get("tie_word_embeddings")
        tied = changes.get("tie_word_embeddings", stored_tied)
        text_only = "text_config" in content and config.reads_text_config
        model._load(directory, text_only, tied, dtype, to)
        return model.eval()

    @classmethod
    def _read_config(cls, content: dict[str, Any], changes: dict[str, Any]) -> Any:
        """The configuration for this class from the content of a config.json, with some fields changed."""
        unknown = sorted(changes.keys() - {field.name for field in fields(cls.config_class)})
        if unknown:
            names, kind = ", ".join(unknown), cls.config_class.__name__
            raise ValueError(f"{names}: no argument here and no field of {kind}")
        if cls.config_class.reads_text_config:
            content = checkpoint.text_config(content)
        labels = {"num_labels", "id2label", "label2id"}
        stored_count = len(content.get("id2label") or ())
        if labels & changes.keys() and changes.get("num_labels") != stored_count:
            content = {name: value for name, value in content.items() if name not in labels}
        return cls.config_class.from_dict(content | changes)

    def _load(
        self, directory: Path, text_only: bool, tied: bool | None, dtype: torch.dtype | None,
        device: torch.device,
    ) -> None:  # fmt: skip
        """Replace all parameters, which are on the meta device, by those in the files of a directory.

        Args:
            text_only: the files are those of a vision model, of which this model takes the text part.
            tied: what the configuration says about tied embeddings.
            dtype, device: see `from_pretrained`.
        """

        def own_name(stored: str) -> str | None:
            if not text_only:
                return self.own_name(stored)
            name = checkpoint.text_name(stored)
            if name is None:
                return None
            return self.own_name(name)

        files = checkpoint.Checkpoint(directory)
        new = {name for name, _ in self.named_parameters() if name.partition(".")[0] == self.new_layer}
        if new & {own_name(name) for name in files.names()}:
            new = set()
        tie = checkpoint.load_weights(self, files, own_name, self.may_tie, tied, new, dtype, device)
        if self.may_tie:
            self.config.tie_word_embeddings = tie
            self.generation_config = checkpoint.GenerationConfig.from_pretrained(directory)
        self.tie_weights()
        if self.new_layer is not None and new:
            names = ", ".join(sorted(new))
            warnings.warn(f"{directory} has no {names}: initialised, to be trained", stacklevel=3)
            layer = self.get_submodule(self.new_layer).to_empty(device=self.device).to(self.dtype)
            init_weights(layer, self.config.initializer_range)

    def own_name(self, stored: str) -> str | None:
        """The name in this model of a stored tensor, or None for one that this model does not have.

        A backbone has no head, and a classifier has no language model head. (Other heads are not left out without a
        message.) The files of a backbone lack the prefix under which heads keep it.
        """
        if stored.endswith("rotary_emb.inv_freq"):
            return None  # written by old versions of Transformers, computed here
        is_backbone = self.base_model is self
        layer, _, rest = stored.partition(".")
        if layer in ("lm_head", "score", "qa_outputs"):
            left_out = not hasattr(self, layer) and (is_backbone or layer == "lm_head")
            return None if left_out else stored
        if layer in ("model", "transformer"):
            stored = rest
        if is_backbone:
            return stored
        return f"{self.base_model_prefix}.{stored}"

    # Saving.

    def save_pretrained(self, directory: str | Path, max_shard_bytes: int = 5 * 10**9) -> None:
        """Write config.json, the weights, and generation_config.json if it has content.

        The files can be read here and by Transformers. Larger models are written in shards. A tied tensor is written
        once. Each file appears whole or not at all.

        Raises:
            NotADirectoryError: `directory` exists and is a file.
        """
        config = {"architectures": [type(self).__name__], **self.config.to_dict()}
        config["dtype"] = str(self.dtype).removeprefix("torch.")
        tensors = {name: tensor.detach() for name, tensor in self.named_parameters()}  # each once
        sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
        read = tensors.__getitem__
        checkpoint.write(directory, config, sizes, read, max_shard_bytes, self.generation_config)

    # Generating.

    def generate(self, inputs: Any = None, **arguments: Any) -> Any:
        """Continue texts, with the arguments and the defaults of Transformers: `generate.generate` has the arguments,
        `settings.transformers_call` the defaults, docs/transformers.md a table of both.

        Args:
            inputs: ids (B, T), or the mapping that a tokenizer returns; None: give `input_ids`.

        Raises:
            ValueError: this is no language model; as `generate.generate`.
        """
        from generate import expect_model, generate  # imported late: it imports the models
        from settings import transformers_call

        expect_model(self)
        return generate(self, **transformers_call(self, inputs, arguments))  # type: ignore[arg-type]
