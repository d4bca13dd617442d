"""The base classes of configurations and models, apart from what a model computes.

    PreTrainedConfig    read a configuration from a config.json, fill in fields, write it back
    PreTrainedModel     load and save a model, tie weights, initialise them, gradient checkpointing
    Linear, Embedding   PyTorch's layers without their own initialisation
    ModelOutput         the results of a forward pass, and how they are read

`ministral.py` is the model.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, ValuesView
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial, wraps
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute_in_backward

import checkpoint
import checks
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
    """What all configurations have in common: they are read from a config.json and written to one.

    The fields here say what `forward` returns if its arguments of the same names do not: see `PreTrainedModel`.
    """

    return_dict: bool = field(default=True, kw_only=True)
    output_hidden_states: bool = field(default=False, kw_only=True)
    output_attentions: bool = field(default=False, kw_only=True)

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
        """The content of a config.json that Transformers 5 loads. Fields of classifiers and of outputs are in it only
        if set."""
        _, id2label, label2id = checkpoint.label_maps()
        unset = {"id2label": id2label, "label2id": label2id, "problem_type": None, "classifier_dropout": None}
        unset |= {"return_dict": True, "output_hidden_states": False, "output_attentions": False}
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


class ModelOutput:
    """A result that is read by name (`out.logits`, `out["logits"]`), by number or slice, or as a tuple (`to_tuple`).

    As in Transformers, fields that are None do not count: out[0] is the loss, or the logits if there are no labels. A
    loop goes over the names.
    """

    def _present(self: Any) -> dict[str, Any]:
        """The fields that are not None, in order."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: value for name, value in values.items() if value is not None}

    def keys(self) -> KeysView[str]:
        return self._present().keys()

    def values(self) -> ValuesView[Any]:
        return self._present().values()

    def items(self) -> ItemsView[str, Any]:
        return self._present().items()

    def get(self, name: str, default: Any = None) -> Any:
        return self._present().get(name, default)

    def to_tuple(self) -> tuple[Any, ...]:
        """The values without names."""
        return tuple(self._present().values())

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            return self._present()[key]
        return self.to_tuple()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._present())

    def __len__(self) -> int:
        return len(self._present())

    def __contains__(self, name: object) -> bool:
        return name in self._present()


def with_output_arguments(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a `forward`: the configuration has the values of output arguments that are None, and `return_dict` is one
    of them. See `PreTrainedModel`."""

    @wraps(forward)
    def wrapped(self: PreTrainedModel, *args: Any, return_dict: bool | None = None, **kwargs: Any) -> Any:
        for name in ("output_hidden_states", "output_attentions"):
            # Where this configuration does not ask for it, that of an inner model still may.
            if kwargs.get(name) is None and getattr(self.config, name):
                kwargs[name] = True
        if return_dict is None:
            return_dict = self.config.return_dict
        out = forward(self, *args, **kwargs)
        if return_dict or isinstance(out, tuple):
            return out
        return out.to_tuple()

    return wrapped


@exportable
@dataclass
class BaseModelOutputWithPast(ModelOutput):
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
class CausalLMOutputWithPast(ModelOutput):
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


@torch.no_grad()
def resize_rows(layer: Any, count: int, fresh: type[nn.Module], std: float, mean_resizing: bool) -> None:
    """Change the number of rows of a layer's weight (rows, E) in place, see `PreTrainedModel.resize_token_embeddings`.
    `fresh` is PyTorch's class of the layer, which draws numbers on construction."""
    old = layer.weight.data
    rows, E = old.shape
    if fresh is nn.Linear:
        new = nn.Linear(E, count, bias=False, device=old.device, dtype=old.dtype).weight.data
    else:
        new = nn.Embedding(count, E, device=old.device, dtype=old.dtype).weight.data
    if count > rows and not old.is_meta:
        if mean_resizing:
            new[rows:] = draw_rows(old, count - rows)
        else:
            new.normal_(0.0, std)
    new[:rows] = old[:count]
    layer.weight.data = new
    layer.weight.grad = None


def draw_rows(old: Tensor, count: int) -> Tensor:
    """New rows (count, E) near the mean of the old ones (rows, E), so that the probabilities of the old tokens hardly
    change: from a normal distribution with 1e-9 of their covariance. Where that has no full rank, the mean itself.
    Source: https://nlp.stanford.edu/~johnhew/vocab-expansion.html.
    """
    old = old.to(at_least_float32(old.dtype))
    mean = old.mean(dim=0)
    covariance = 1e-9 * ((old - mean).T @ (old - mean) / len(old))
    _, failed = torch.linalg.cholesky_ex(covariance)
    if failed:
        return mean.expand(count, -1)
    return torch.distributions.MultivariateNormal(mean, covariance).sample((count,))


# -------------------------------------------------------------------------------------------------------- loss


def causal_lm_loss(logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Cross-entropy in nats of each token given the tokens before it.

    logits (B, S, V). labels (B, S) are the input ids, -100 where a token does not count; they are shifted by one here.
    The loss is the mean of those that count. With `num_items_in_batch` it is their sum divided by that number: a
    trainer that adds up the gradients of several batches gives the number of all their tokens.
    """
    expect_classes(labels, logits.shape[-1])
    targets = F.pad(labels.long().to(logits.device), (0, 1), value=-100)[:, 1:]
    logits = logits.to(at_least_float32(logits.dtype))
    logits, targets = logits.flatten(0, 1), targets.flatten()
    if num_items_in_batch is None:
        return F.cross_entropy(logits, targets, ignore_index=-100)
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(logits.device)
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum") / num_items_in_batch


def logits_and_loss(
    lm_head: nn.Module, out: BaseModelOutputWithPast, labels: Tensor | None, logits_to_keep: int | Tensor,
    num_items_in_batch: Tensor | int | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The head on the positions to keep of a backbone's result: logits (B, S or fewer, V), and the loss if there are
    labels."""
    keep: Any = logits_to_keep
    if isinstance(keep, int):
        keep = slice(-keep, None)
    logits = lm_head(out.last_hidden_state[:, keep])
    if labels is None:
        return logits, None
    return logits, causal_lm_loss(logits, labels, num_items_in_batch)


# ------------------------------------------------------------------------------------------------------ models


class PreTrainedModel(nn.Module):
    """A model that is read from a directory and written to one.

    Every `forward` takes `return_dict`: False returns `ModelOutput.to_tuple()`. Where `return_dict`,
    `output_hidden_states` and `output_attentions` are None, the configuration's fields of these names decide.
    """

    config_class: ClassVar[type[Any]]
    base_model_prefix: ClassVar[str] = "model"  # name of the attribute that holds the backbone
    new_layer: ClassVar[str | None] = None  # a layer that files may lack: it is initialised then
    input_embeddings: ClassVar[str] = "embed_tokens"  # the layer of the backbone that reads the input
    # {parameter: the one whose tensor it may share}
    may_tie: ClassVar[Mapping[str, str]] = MappingProxyType({})

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.generation_config = checkpoint.GenerationConfig()  # the defaults of `generate`
        self._gradient_checkpointing = False
        self.name_or_path = ""  # where the model was loaded from

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "forward" in vars(cls):
            cls.forward = with_output_arguments(cls.forward)

    # Gradient checkpointing.

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
    def is_gradient_checkpointing(self) -> bool:
        """The same, under another name of Transformers'."""
        return self._gradient_checkpointing

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:  # fmt: skip
        """Set `gradient_checkpointing`. Every layer is computed again, in the way of `use_reentrant=False`.

        Raises:
            ValueError: other settings of Transformers.
        """
        checks.check_recomputation(gradient_checkpointing_kwargs, every_n_layers, offload)
        self.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Unset `gradient_checkpointing`."""
        self.gradient_checkpointing = False

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:  # fmt: skip
        """`gradient_checkpointing_enable` under the name that newer versions of Transformers' Trainer call."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, every_n_layers, offload)

    def activation_checkpointing_disable(self) -> None:
        """`gradient_checkpointing_disable`, likewise."""
        self.gradient_checkpointing_disable()

    @property
    def recomputes(self) -> bool:
        """Whether this forward pass uses gradient checkpointing. Without gradients there is no backward pass."""
        return self._gradient_checkpointing and self.training and torch.is_grad_enabled()

    def run_layer(self, layer: nn.Module, *inputs: Any) -> Any:
        """Call a layer, and with gradient checkpointing call it again in the backward pass."""
        if self.recomputes:
            return recompute_in_backward(layer, *inputs, use_reentrant=False)
        return layer(*inputs)

    # Parts and their sizes.

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

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """How many numbers the parameters have; a tensor that two layers share counts once.

        Args:
            only_trainable: count only parameters that get gradients.
            exclude_embeddings: leave out the weights of embedding layers.
        """
        left_out = set()
        if exclude_embeddings:
            left_out = {id(part.weight) for part in self.modules() if isinstance(part, nn.Embedding)}
        counted = [p for p in self.parameters() if id(p) not in left_out]
        return sum(p.numel() for p in counted if p.requires_grad or not only_trainable)

    def _embeddings_owner(self) -> nn.Module:
        """The module that has the input embeddings: the backbone, or its language model."""
        backbone: Any = self.base_model
        return getattr(backbone, "language_model", backbone)

    def get_input_embeddings(self) -> nn.Module:
        """The layer that turns ids (pixels in a vision tower) into vectors."""
        return getattr(self._embeddings_owner(), self.input_embeddings)

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace that layer. A tied head keeps the old weights until `tie_weights`."""
        setattr(self._embeddings_owner(), self.input_embeddings, value)

    def get_output_embeddings(self) -> nn.Module | None:
        """The language model head, None if the model has none."""
        return getattr(self, "lm_head", None)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the language model head.

        Raises:
            ValueError: the model has none.
        """
        if not self.can_generate():
            raise ValueError(f"{type(self).__name__} has no language model head that could be replaced")
        self.lm_head = new_embeddings

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Module:  # fmt: skip
        """Change the number of rows V of the embeddings and of the head, and `vocab_size` in the configuration.

        The first rows stay as they are. New rows are drawn by PyTorch's global generator in the order of Transformers,
        so that they are equal for an equal seed.

        Args:
            new_num_tokens: V; None: as many rows as now.
            pad_to_multiple_of: round V up to a multiple of this.
            mean_resizing: draw new rows around the mean of the others, see `draw_rows`; False: from Normal(0,
                initializer_range), as new models are drawn.

        Returns:
            The embeddings: with neither number, unchanged.

        Raises:
            ValueError: a V that is no whole number above 0, or that leaves no row for a token that the configuration
                names, such as `pad_token_id`.
        """
        embeddings: Any = self.get_input_embeddings()
        if not isinstance(embeddings, nn.Embedding):
            raise ValueError(f"{type(self).__name__} has no token embeddings that could be resized")
        if new_num_tokens is None and pad_to_multiple_of is None:
            return embeddings
        V = checks.resized_count(new_num_tokens, pad_to_multiple_of, embeddings.num_embeddings)
        config = copy.deepcopy(self.config)
        config.get_text_config().vocab_size = V
        replace(config)  # raises if a token has no row
        text_config = self.config.get_text_config()
        head: Any = self.get_output_embeddings()
        for layer, fresh in ((embeddings, nn.Embedding), (head, nn.Linear)):
            # A tied head is resized with the embeddings.
            if layer is not None and len(layer.weight) != V:
                resize_rows(layer, V, fresh, text_config.initializer_range, mean_resizing)
        embeddings.num_embeddings = V
        if head is not None:
            head.out_features = V
        text_config.vocab_size = V
        return embeddings

    # What training and generation in other libraries (peft, Transformers' Trainer) read.

    def can_generate(self) -> bool:
        """Whether the model has a language model head."""
        return hasattr(self, "lm_head")

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether `forward` takes `num_items_in_batch`, see `causal_lm_loss`. Transformers' Trainer reads this."""
        return self.can_generate()

    @property
    def loss_type(self) -> str | None:
        """The name of the loss in Transformers, whose Trainer counts tokens by it: the first one is no target."""
        if self.can_generate():
            return "ForCausalLM"
        return None

    def enable_input_require_grads(self) -> None:
        """Let the embeddings' results require gradients even if their weights do not."""

        def require_grad(module: nn.Module, inputs: Any, output: Tensor) -> None:
            output.requires_grad_(True)

        self._require_grads_hook = self.get_input_embeddings().register_forward_hook(require_grad)

    def disable_input_require_grads(self) -> None:
        """Undo `enable_input_require_grads`."""
        self._require_grads_hook.remove()

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, past_key_values: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The arguments of the forward pass that reads `input_ids` (B, T): those that the cache does not have yet."""
        past = 0
        if past_key_values is not None:
            past = past_key_values.get_seq_length()
        return {"input_ids": input_ids[:, past:], "past_key_values": past_key_values, **kwargs}

    # Weights.

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
        revision: str | None = None, config: Any = None, token: str | bool | None = None,
        cache_dir: str | Path | None = None, local_files_only: bool = False, **changes: Any,
    ) -> Model:  # fmt: skip
        """Load a model from a directory or from the Hub ("owner/name").

        The directory holds config.json and safetensors weights, or params.json and consolidated weights. A text model
        also loads from the files of a vision model, whose vision part is left out.

        Args:
            dtype: cast the weights, to torch.bfloat16 or "bfloat16" for example; None or "auto" keeps the stored type.
                (`torch_dtype` is another name of it.)
            device: where to put the weights; None is the CPU, where weights that need no cast stay mapped to the file.
                "auto" is the first of CUDA, Apple's MPS and the CPU. (`device_map` is another name of it.)
            attn_implementation: "sdpa" or "eager"; None is the configuration's.
            config: a configuration to use instead of the one in the files.
            revision, token, cache_dir, local_files_only: of a Hub repository, see `checkpoint.find`.
            changes: fields of the configuration to set, such as `num_labels=3`. Arguments of Transformers that are not
                supported are refused (docs/usage.md has a table); `trust_remote_code` and `low_cpu_mem_usage` change
                nothing: no code of a repository is run, and memory is taken only by the weights.

        Returns:
            The model in eval mode. The head is the stored one. If none is stored, it is tied to the embeddings; a
            warning says so where config.json says otherwise. FP8 weights become `dtype` (None: the one that config.json
            names, or bfloat16), with a warning. If the files have no classification layer for a model of `heads.py`, it
            is initialised, and a warning names it. `generation_config` is the content of generation_config.json.

        Raises:
            FileNotFoundError: no such directory or repository, or a file is missing in it.
            ValueError: not a configuration of this class; tensors missing, unexpected, misshapen or unreadable; an
                argument that is not supported.
        """
        dtype = checkpoint.as_dtype(dtype, changes.pop("torch_dtype", None))
        to = as_device(device, changes.pop("device_map", None))
        changes = checks.refuse_arguments(changes, checks.LOADING_CURES)
        directory = checkpoint.find(path_or_hub_id, revision, "model", token, cache_dir, local_files_only)
        content = checkpoint.read_config(directory)
        if config is None:
            config = cls._read_config(content, changes)
        else:
            checks.check_given_config(config, cls.config_class, changes)
            config = replace(config)  # loading may change whether embeddings are tied
            changes = {"tie_word_embeddings": config.tie_word_embeddings}
        if attn_implementation is not None:
            config = replace(config, attn_implementation=attn_implementation)
        with torch.device("meta"):
            model = cls(config)
        stored_tied = checkpoint.text_config(content).get("tie_word_embeddings")
        tied = changes.get("tie_word_embeddings", stored_tied)
        text_only = "text_config" in content and config.reads_text_config
        model._load(directory, text_only, tied, dtype, to)
        model.name_or_path = str(path_or_hub_id)
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

    def save_pretrained(
        self, directory: str | Path, max_shard_size: int | str = "5GB", state_dict: Any = None,
        is_main_process: bool = True, **others: Any,
    ) -> None:  # fmt: skip
        """Write config.json, the weights, and generation_config.json if it has content.

        The files can be read here and by Transformers. Larger models are written in shards. A tied tensor is written
        once. Each file appears whole or not at all.

        Args:
            max_shard_size: bytes, or text such as "500MB" or "1GiB", that a file of weights has at most.
            state_dict: tensors to write in the place of the model's, under the same names.
            is_main_process: False writes nothing: another process does.
            others: `safe_serialization=True` changes nothing. Other arguments of Transformers are refused.

        Raises:
            NotADirectoryError: `directory` exists and is a file.
            ValueError: an argument that is not supported, or a state dict of another model.
        """
        unknown = checks.refuse_arguments(others, checks.SAVING_CURES)
        if unknown:
            raise TypeError(f"save_pretrained has no arguments {', '.join(unknown)}")
        if not is_main_process:
            return
        config = {"architectures": [type(self).__name__], **self.config.to_dict()}
        config["dtype"] = str(self.dtype).removeprefix("torch.")
        tensors = {name: tensor.detach() for name, tensor in self.named_parameters()}  # each once
        if state_dict is not None:
            tensors = checks.expect_state(state_dict, tensors)
        sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
        read = tensors.__getitem__
        checkpoint.write(directory, config, sizes, read, max_shard_size, self.generation_config)
