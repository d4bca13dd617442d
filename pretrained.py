"""The base classes of configurations and models: reading, writing, initialisation.

    PreTrainedConfig    read a configuration from a config.json, fill in fields, write it back
    PreTrainedModel     load and save a model, tie weights, initialise them
    Linear, Embedding   PyTorch's layers without their own initialisation
    FrequencyCache      frequencies of rotary positions, kept for each dtype and device

`ministral.py` is the model. `trainable.py` has what training code calls, `outputs.py` the results of `forward`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checkpoint
import checks
from checks import as_device, check_rope_parameters, require
from outputs import with_output_arguments
from trainable import TrainableModel

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
Model = TypeVar("Model", bound="PreTrainedModel")


# ---------------------------------------------------------------------------------------------- configuration


@dataclass
class PreTrainedConfig:
    """Base class of all configurations: they are read from a config.json and written to one.

    The fields here say what `forward` returns if its arguments of the same names do not: see `PreTrainedModel`.
    """

    return_dict: bool = field(default=True, kw_only=True)
    output_hidden_states: bool = field(default=False, kw_only=True)
    output_attentions: bool = field(default=False, kw_only=True)

    model_type: ClassVar[str]
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
        return cls(**checkpoint.config_fields(d, known, model_types))

    @classmethod
    def from_pretrained(
        cls: type[Config], pretrained_model_name_or_path: str | Path, revision: str | None = None,
        token: str | bool | None = None, cache_dir: str | Path | None = None, local_files_only: bool = False,
        **changes: Any,
    ) -> Config:  # fmt: skip
        """Read the configuration of a directory, or of a Hub repository without its weights.

        Args:
            revision, token, cache_dir, local_files_only: see `checkpoint.find`.
            changes: fields to set.

        Raises:
            FileNotFoundError: no such directory or repository, or no config.json.
            ValueError: no field of this name; as `from_dict`.
        """
        hub_arguments = (token, cache_dir, local_files_only)
        directory = checkpoint.find(pretrained_model_name_or_path, revision, "config", *hub_arguments)
        return cls.from_content(checkpoint.read_config(directory), changes)

    @classmethod
    def from_content(cls: type[Config], content: dict[str, Any], changes: dict[str, Any]) -> Config:
        """The configuration in the content of a config.json, with some fields changed. A text model reads the text part
        of a vision model's."""
        unknown = sorted(changes.keys() - {field.name for field in fields(cls)})
        if unknown:
            names = ", ".join(unknown)
            raise ValueError(f"{names}: no argument here and no field of {cls.__name__}")
        if cls.reads_text_config:
            content = checkpoint.text_config(content)
        changes = dict(changes)
        attn_implementation = changes.pop("attn_implementation", None)  # no field of a config.json
        labels = {"num_labels", "id2label", "label2id"}
        stored_labels = content.get("id2label")
        stored_count = 0
        if stored_labels:
            stored_count = len(stored_labels)
        if labels & changes.keys() and changes.get("num_labels") != stored_count:
            content = {name: value for name, value in content.items() if name not in labels}
        config: Any = cls.from_dict(content | changes)
        if attn_implementation is not None:
            config = replace(config, attn_implementation=attn_implementation)
        return config

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write config.json into a directory, which is made if it does not exist."""
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(directory / checkpoint.CONFIG, self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """The content of a config.json that Transformers 5 loads. Fields of classifiers and of outputs are in it only
        if set."""
        _, id2label, label2id = checkpoint.label_maps()
        left_out = {"id2label": id2label, "label2id": label2id, "problem_type": None, "classifier_dropout": None}
        left_out |= {"return_dict": True, "output_hidden_states": False, "output_attentions": False}
        content: dict[str, Any] = {"model_type": self.model_type}
        for name, value in asdict(self).items():
            default = name in left_out and value == left_out[name]
            if name not in self.unwritten and not default:
                content[name] = value
        return content

    def complete_layer_types(self: Any) -> None:
        """Make every layer a sliding one if `sliding_window` is set, and a full one if not. Later changes of
        `sliding_window` and `num_hidden_layers` are followed."""
        kind = "sliding_attention"
        if self.sliding_window is None:
            kind = "full_attention"
        self.layer_types = [kind] * self.num_hidden_layers
        self._layers_follow = True

    def expect_uniform_layers(self: Any, cure: str) -> None:
        """Raise ValueError unless all layers are of the kind that `sliding_window` says; they follow its changes."""
        given = self.layer_types
        self.complete_layer_types()
        kind = self.layer_types[0]
        alike = set(given) == {kind}
        self.layer_types = given
        require(self, "layer_types", alike, f"{kind} for every layer{cure}")

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        follows = name in ("num_hidden_layers", "sliding_window") and getattr(self, "_layers_follow", False)
        if follows and isinstance(self.num_hidden_layers, int):  # type: ignore[attr-defined]
            self.complete_layer_types()

    @property
    def _attn_implementation(self: Any) -> str:
        """The name in Transformers of `attn_implementation`."""
        implementation: str = self.attn_implementation
        return implementation

    @_attn_implementation.setter
    def _attn_implementation(self: Any, value: str) -> None:
        self.attn_implementation = value

    def architecture(self, class_name: str) -> str:
        """The name of a model's class that config.json has."""
        return class_name

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


# ----------------------------------------------------------------------------------------------------- weights


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
    """Keep the result of `inverse_frequencies` for each dtype and device. Copies and pickles compute it again, and so
    does the next call after a change of `config.rope_parameters`."""

    config: Any  # with rope_theta and rope_parameters

    def __init__(self) -> None:
        super().__init__()
        self._frequencies: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._settings: tuple[Any, ...] = ()  # the values that these frequencies were computed from

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_frequencies": {}, "_settings": ()}

    def inverse_frequencies(self, dtype: torch.dtype) -> Tensor:
        """The angle per position of each pair, in radians, on the CPU."""
        raise NotImplementedError

    def frequencies(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The inverse frequencies on a device.

        Raises:
            ValueError: the configuration was changed and now has two values of `rope_theta`.
        """
        theta, rope = self.config.rope_theta, self.config.rope_parameters
        if theta != rope["rope_theta"]:
            two = f"config.rope_theta={theta} and config.rope_parameters['rope_theta']={rope['rope_theta']}"
            raise ValueError(f"{two} differ; change both")
        settings = (theta, *rope.items())
        if settings != self._settings:
            self._frequencies, self._settings = {}, settings
        cached = self._frequencies.get((dtype, device))
        if cached is not None:
            return cached
        if torch.compiler.is_compiling():  # a traced tensor has no values to keep
            return self.inverse_frequencies(dtype).to(device)
        with torch.inference_mode(False):  # training may follow, and may save this tensor for backward
            frequencies = self.inverse_frequencies(dtype).to(device)
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


# ------------------------------------------------------------------------------------------------------ models


class PreTrainedModel(TrainableModel):
    """A model that is read from a directory and written to one.

    Every `forward` takes `return_dict`: False returns `ModelOutput.to_tuple()`. Where `return_dict`,
    `output_hidden_states` and `output_attentions` are None, the configuration's fields of these names decide.
    """

    config_class: ClassVar[type[Any]]
    base_model_prefix: ClassVar[str] = "model"  # name of the attribute that holds the backbone
    new_layer: ClassVar[str | None] = None  # a layer that files may lack: it is initialised then
    # {parameter: the one whose tensor it may share}
    may_tie: ClassVar[Mapping[str, str]] = MappingProxyType({})

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.generation_config = checkpoint.GenerationConfig()  # the defaults of `generate`
        self.name_or_path = ""  # where the model was loaded from

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "forward" in vars(cls):
            cls.forward = with_output_arguments(cls.forward)

    # Parts.

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
        cls: type[Model], pretrained_model_name_or_path: str | Path, dtype: torch.dtype | str | None = None,
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
            attn_implementation: "sdpa", "eager" or "blockwise"; None is the configuration's.
            config: a configuration to use instead of the one in the files.
            revision, token, cache_dir, local_files_only: of a Hub repository, see `checkpoint.find`.
            changes: fields of the configuration to set, such as `num_labels=3`. Unsupported arguments of Transformers
                are refused (docs/transformers.md has a table). `trust_remote_code` and `low_cpu_mem_usage` change
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
        target_device = as_device(device, changes.pop("device_map", None))
        changes = checks.refuse_arguments(changes, checks.LOADING_CURES)
        hub_arguments = (token, cache_dir, local_files_only)
        directory = checkpoint.find(pretrained_model_name_or_path, revision, "model", *hub_arguments)
        content = checkpoint.read_config(directory)
        tied = checkpoint.text_config(content).get("tie_word_embeddings")
        if config is None:
            config = cls.config_class.from_content(content, changes)
            tied = changes.get("tie_word_embeddings", tied)
        else:
            checks.check_given_config(config, cls.config_class, changes)
            config = replace(config)  # loading may change whether embeddings are tied
            tied = config.tie_word_embeddings
        if attn_implementation is not None:
            config = replace(config, attn_implementation=attn_implementation)
        with torch.device("meta"):
            model = cls(config)
        text_only = "text_config" in content and config.reads_text_config
        model._load(directory, text_only, tied, dtype, target_device)
        model.name_or_path = str(pretrained_model_name_or_path)
        return model.eval()

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
        missing = {name for name, _ in self.named_parameters() if name.partition(".")[0] == self.new_layer}
        if missing & {own_name(name) for name in files.names()}:
            missing = set()  # the files have the layer
        tie = checkpoint.load_weights(self, files, own_name, self.may_tie, tied, missing, dtype, device)
        if self.may_tie:
            self.config.tie_word_embeddings = tie
            self.generation_config = checkpoint.GenerationConfig.from_pretrained(directory)
        self.tie_weights()
        if self.new_layer is not None and missing:
            names = ", ".join(sorted(missing))
            warnings.warn(f"{directory} has no {names}: initialised, to be trained", stacklevel=3)
            layer = self.get_submodule(self.new_layer).to_empty(device=self.device).to(self.dtype)
            init_weights(layer, self.config.initializer_range)

    def own_name(self, stored: str) -> str | None:
        """The name in this model of a stored tensor, or None for one that this model does not have.

        A backbone leaves out every head. A model with a head leaves out another one's `lm_head`; any other head keeps
        its name, and is reported as unexpected. The files of a backbone lack the prefix under which heads keep it.
        """
        if stored.endswith("rotary_emb.inv_freq"):
            return None  # written by old versions of Transformers, computed here
        is_backbone = self.base_model is self
        layer, _, rest = stored.partition(".")
        if layer in ("lm_head", "score", "qa_outputs"):
            if not hasattr(self, layer) and (is_backbone or layer == "lm_head"):
                return None
            return stored
        if layer in ("model", "transformer"):
            stored = rest
        if is_backbone:
            return stored
        return f"{self.base_model_prefix}.{stored}"

    # Saving.

    def save_pretrained(
        self, save_directory: str | Path, max_shard_size: int | str = "5GB", state_dict: Any = None,
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
            NotADirectoryError: `save_directory` exists and is a file.
            ValueError: an argument that is not supported, or a state dict of another model.
        """
        unknown = checks.refuse_arguments(others, checks.SAVING_CURES)
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: no argument of save_pretrained")
        if not is_main_process:
            return
        architecture = self.config.architecture(type(self).__name__)
        config = {"architectures": [architecture], **self.config.to_dict()}
        config["dtype"] = str(self.dtype).removeprefix("torch.")
        tensors = {name: tensor.detach() for name, tensor in self.named_parameters()}  # each once
        if state_dict is not None:
            tensors = checks.expect_state(state_dict, tensors)
        sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
        read = tensors.__getitem__
        checkpoint.write(save_directory, config, sizes, read, max_shard_size, self.generation_config)

    # Generating.

    def generate(self, inputs: Any = None, generation_config: Any = None, **arguments: Any) -> Any:
        """Continue texts, with the arguments and the defaults of Transformers: `generate.generate` has the arguments,
        `settings.transformers_call` the defaults, docs/transformers.md a table of both.

        Args:
            inputs: ids (B, T), or the mapping that a tokenizer returns; None: give `input_ids`.
            generation_config, arguments: see `generate.generate`. None switches a setting of the model's files off.

        Raises:
            ValueError: this is no language model; as `generate.generate`.
        """
        from generate import generate  # imported late: it imports the models
        from settings import transformers_call

        arguments["generation_config"] = generation_config
        return generate(self, **transformers_call(self, inputs, arguments))  # type: ignore[arg-type]
