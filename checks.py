"""Checks of configurations and arguments. Each refuses a wrong value in one line: what was found, what is supported.

Types and shapes are always checked. Values are checked only where reading them costs nothing (`may_read`).
"""

from __future__ import annotations

import reprlib
import sys
import warnings
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

LAYER_TYPES = ("full_attention", "sliding_attention")
LARGEST_INTEGER = 2**31 - 1  # of all whole numbers in a configuration
LARGEST_SIZE = 2**20  # of a dimension of a matrix; the bytes of a matrix then fit in 64 bits
MOST_LAYERS = 1000  # more take minutes to make before the weights are looked at
MOST_LABELS = 100_000
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


def may_read(tensor: Tensor) -> bool:
    """Whether a check may read the values of a tensor.

    On another device than the CPU, reading waits for all work before. While `torch.compile` or `torch.export` traces
    the model, there are no values yet.
    """
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def is_number(value: Any, kind: type, least: float, most: float | None = None) -> bool:
    """Whether `value` is a finite number from `least` to `most`, of the kind int or float (an int is a float, too).

    With `numbers.Integral` and `numbers.Real`, NumPy's numbers are accepted as well. `most=None` is `LARGEST_INTEGER`
    for int, and the largest float for the others.
    """
    if isinstance(value, bool):
        return False
    if most is None:
        most = sys.float_info.max
        if kind is int:
            most = LARGEST_INTEGER
    of_kind = isinstance(value, kind) or (kind is float and isinstance(value, int))
    return of_kind and least <= value <= most


def is_size(value: object) -> bool:
    """Whether `value` is a whole number from 1 to `LARGEST_INTEGER`."""
    return is_number(value, int, 1)


def brief(value: Any) -> str:
    """The `repr` of a value, shortened and on one line, for error messages."""
    try:
        text = " ".join(reprlib.repr(value).split())
    except ValueError:  # Python writes no numbers of more than 4300 digits
        return "a number of thousands of digits"
    if len(text) > 160:  # containers in containers
        return f"{text[:157]}..."
    return text


def is_whole(tensor: Tensor) -> bool:
    """Whether a tensor has an integer dtype."""
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


# --------------------------------------------------------------------------------------------------- configurations


def require(config: Any, name: str, valid: object, allowed: str) -> None:
    """Raise ValueError unless `valid`. The message has the field's name, its value and what is allowed."""
    if not valid:
        raise ValueError(f"{name}={brief(getattr(config, name))} is impossible; allowed: {allowed}")


def require_sizes(config: Any, *names: str, most: int = LARGEST_SIZE) -> None:
    """Raise ValueError unless the fields are whole numbers from 1 to `most`."""
    for name in names:
        require(config, name, is_number(getattr(config, name), int, 1, most), f"a whole number from 1 to {most}")


def is_fraction(value: Any) -> bool:
    """Whether a value is a number from 0 to below 1, as a dropout is."""
    return is_number(value, float, 0) and value < 1


def check_common_fields(config: Any, activations: Collection[str], implementations: Collection[str]) -> None:
    """Check the fields that text and vision have in common."""
    require(config, "hidden_act", config.hidden_act in activations, ", ".join(activations))
    valid = is_number(config.initializer_range, float, 0)
    require(config, "initializer_range", valid, "a number not below 0")
    require(config, "attention_dropout", is_fraction(config.attention_dropout), "a number from 0 to below 1")
    if config.attn_implementation not in implementations:
        found = f"attn_implementation={brief(config.attn_implementation)}"
        raise ValueError(f"{found} is not supported; supported: {', '.join(implementations)}")
    check_output_fields(config)


def check_output_fields(config: Any) -> None:
    """Check the fields that say what a forward pass returns."""
    for name in ("return_dict", "output_hidden_states", "output_attentions"):
        require(config, name, isinstance(getattr(config, name), bool), "true or false")


def check_text_sizes(config: Any) -> None:
    """Check the sizes of a text model, from which other fields follow."""
    require_sizes(config, "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    require_sizes(config, "num_hidden_layers", most=MOST_LAYERS)
    require_sizes(config, "vocab_size", "max_position_embeddings", most=LARGEST_INTEGER)


def check_text_config(config: Any) -> None:
    """Check the fields of a text model's configuration, after the missing ones were filled in."""
    heads = config.num_attention_heads
    divides = heads % config.num_key_value_heads == 0
    require(config, "num_key_value_heads", divides, f"a divisor of {heads} attention heads")
    even = is_number(config.head_dim, int, 2, LARGEST_SIZE) and config.head_dim % 2 == 0
    require(config, "head_dim", even, f"an even number from 2 to {LARGEST_SIZE}")
    require(config, "rms_norm_eps", is_number(config.rms_norm_eps, float, 1e-30), "a number above 0")
    require(config, "use_cache", isinstance(config.use_cache, bool), "true or false")
    require(config, "tie_word_embeddings", isinstance(config.tie_word_embeddings, bool), "true or false")
    check_special_ids(config)
    check_layers(config)
    check_classifier(config)


def check_special_ids(config: Any) -> None:
    """Check the ids of the padding token and of the tokens that end a text."""
    size = config.vocab_size

    def is_id(value: Any) -> bool:
        return is_number(value, int, 0) and value < size

    pad = config.pad_token_id
    require(config, "pad_token_id", pad is None or is_id(pad), f"None or an id below {size}")
    ends = config.eos_token_id
    if ends is None:
        ends = []
    elif not isinstance(ends, list):
        ends = [ends]
    require(config, "eos_token_id", all(map(is_id, ends)), f"None, an id below {size}, or a list of such ids")


def check_layers(config: Any) -> None:
    """Check the kinds of the layers, and the window of those that have one."""
    window, layers = config.sliding_window, config.num_hidden_layers
    valid = window is None or is_number(window, int, 1)
    require(config, "sliding_window", valid, "None or a whole number not below 1")
    require(config, "layer_types", len(config.layer_types) == layers, f"num_hidden_layers={layers} names")
    known = set(config.layer_types) <= set(LAYER_TYPES)
    require(config, "layer_types", known, f"a list of the names {', '.join(LAYER_TYPES)}")
    valid = window is not None or "sliding_attention" not in config.layer_types
    require(config, "sliding_window", valid, "a number for sliding layers")


def check_classifier(config: Any) -> None:
    """Check the fields that only `heads.py` reads."""
    dropout = config.classifier_dropout
    valid = dropout is None or is_fraction(dropout)
    require(config, "classifier_dropout", valid, "None or a number from 0 to below 1")
    kind = config.problem_type
    require(config, "problem_type", kind in (None, *PROBLEM_TYPES), f"None, {', '.join(PROBLEM_TYPES)}")
    valid = kind != "single_label_classification" or config.num_labels > 1
    require(config, "problem_type", valid, "the two others, for num_labels=1")


def check_rope_parameters(config: Any, older_name: object) -> None:
    """Check `rope_parameters`, of which `older_name` is the rope_type by the key of older files, "type"."""
    rope, theta, kind = config.rope_parameters, config.rope_theta, config.rope_parameters["rope_type"]
    require(config, "rope_theta", is_number(theta, float, 1.0) and theta > 1, "a number above 1")
    require(config, "rope_parameters", older_name in (None, kind), "'type' and 'rope_type' that agree")
    supported = " or ".join(config.rope_types)
    require(config, "rope_parameters", kind in config.rope_types, f"rope_type {supported}")
    whole = rope.get("partial_rotary_factor", 1.0) == 1.0
    require(config, "rope_parameters", whole, "no partial_rotary_factor: every pair of a head is rotated")
    unknown = [key for key in rope if key not in config.rope_keys]
    if unknown:
        allowed = f"keys {', '.join(config.rope_keys)}"
        raise ValueError(f"rope_parameters has the key {brief(unknown[0])}; allowed: {allowed}")
    for key, value in rope.items():
        least = config.rope_keys[key]
        if least is not None and value is not None and not is_number(value, float, least):
            raise ValueError(f"rope_parameters[{key!r}]={brief(value)}: allowed: a number not below {least}")


def require_rope_key(config: Any, key: str) -> None:
    """Raise ValueError unless `rope_parameters` has a value for the key."""
    if config.rope_parameters.get(key) is None:
        raise ValueError(f"rope_parameters[{key!r}]=None is impossible; allowed: a number not below 1")


# -------------------------------------------------------------------------------------------- any kind of argument


def as_list(value: Any) -> list[Any]:
    """[] for None, [value] for one value, a list for several."""
    if value is None:
        return []
    if isinstance(value, (list, tuple)):
        return list(value)
    return [value]


def expect_size(name: str, value: object) -> None:
    """Raise ValueError unless the value is None or a whole number above 0."""
    if value is not None and not is_size(value):
        found = brief(value)
        raise ValueError(f"{name}={found} is impossible; allowed: a whole number above 0, or None")


def expect_kind(name: str, value: object, kind: type | tuple[type, ...], said: str) -> None:
    """Raise ValueError unless the value is None or of the kind; `said` is that kind in words."""
    if value is not None and not isinstance(value, kind):
        raise ValueError(f"{name} must be {said}; found {type(value).__name__} {str(value)[:40]!r}")


def expect_tensor(name: str, value: object) -> None:
    """Raise ValueError unless the value is a tensor."""
    if not isinstance(value, Tensor):
        found = type(value).__name__
        raise ValueError(f"{name} must be a tensor, as torch.tensor([[1, 2, 3]]) is; found {found}")


def expect(name: str, tensor: Tensor, *shapes: tuple[int, ...]) -> None:
    """Raise ValueError unless the value is a tensor of one of the shapes."""
    expect_tensor(name, tensor)
    if tensor.shape not in shapes:
        allowed = dict.fromkeys(str(tuple(shape)) for shape in shapes)  # two are equal for one text
        raise ValueError(f"{name} must be {' or '.join(allowed)}; found {tuple(tensor.shape)}")


def expect_device(name: str, tensor: Tensor, weight: Tensor) -> None:
    """Raise ValueError unless a tensor is where the weights are (those on the meta device are still to come)."""
    if tensor.device != weight.device and not weight.is_meta:
        cure = f"move one of them: {name}.to(model.device)"
        raise ValueError(f"{name} is on {tensor.device}, the model on {weight.device}; {cure}")


def devices_present() -> list[str]:
    """The kinds of devices of this machine, the one that "auto" chooses first: CUDA, Apple's MPS, the CPU."""
    present = ["cpu"]
    if torch.backends.mps.is_available():
        present.insert(0, "mps")
    if torch.cuda.is_available():
        present.insert(0, "cuda")
    return present


def as_device(device: Any, device_map: Any = None) -> torch.device:
    """The device that an argument names: text, a torch.device or the number of a GPU; "auto" is the first of
    `devices_present`, None the CPU. `device_map` is another name of the argument; there {"": device} is accepted, too.

    Raises:
        ValueError: no such device here, several devices, or both names with different values.
    """
    if device is not None and device_map not in (None, device):
        raise ValueError(f"device={device!r} and device_map={device_map!r} differ; give one of the two")
    name, wanted = "device", device
    if device_map is not None:
        name, wanted = "device_map", device_map
    supported = "'auto', or one device of this machine, such as 'cpu', 'cuda' or 'cuda:0'"
    supported += " (a type is given as dtype=)"
    if wanted is None:
        return torch.device("cpu")
    if isinstance(device_map, dict) and list(device_map) == [""]:
        wanted = device_map[""]
    if isinstance(wanted, str) and wanted == "auto":
        return torch.device(devices_present()[0])
    if not isinstance(wanted, (str, torch.device)) and not is_number(wanted, int, 0):
        found = str(wanted)[:60]
        raise ValueError(f"{name}={found} is not supported; supported: {supported}")
    try:
        found_device = torch.device(wanted)
        torch.empty(1, device=found_device)
    except Exception as error:  # of many kinds, one for each device
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{name}={wanted!r} is not supported ({reason}); supported: {supported}") from error
    return found_device


# Arguments of Transformers' functions that are not supported, and what to do instead.
LOADING_CURES = {
    "quantization_config": "weights are loaded in a floating-point type, see dtype (FP8 files become one)",
    "load_in_8bit": "weights are loaded in a floating-point type, see dtype",
    "load_in_4bit": "weights are loaded in a floating-point type, see dtype",
    "subfolder": "give the directory itself",
    "variant": "rename the files to model.safetensors",
    "ignore_mismatched_sizes": "remove the tensor of another size from the files",
    "output_loading_info": "missing or unexpected tensors are an error; a new layer gives a warning",
    "max_memory": "a model is on one device, see device_map",
    "offload_folder": "a model is on one device, see device_map",
    "tp_plan": "see examples/tensor_parallel.py",
    "tp_size": "see examples/tensor_parallel.py",
    "state_dict": "load the model, then model.load_state_dict(state_dict)",
    "force_download": "remove the repository from the cache: hf cache",
    "generation_config": "set model.generation_config afterwards",
    "gguf_file": "give a directory with safetensors weights",
    "key_mapping": "rename the tensors in the files",
}
# Those that are accepted with any value: no code is run that comes with a model, and weights are always mapped.
HARMLESS_ARGUMENTS = {"trust_remote_code", "low_cpu_mem_usage"}
SAFETENSORS_ARGUMENTS = {"use_safetensors", "safe_serialization"}
SAVING_CURES = {
    "push_to_hub": "upload the directory: hf upload",
    "variant": "the files have the usual names; rename them",
    "save_function": "leave it out: safetensors writes the files",
    "token": "upload the directory: hf upload",
    "repo_id": "upload the directory: hf upload",
}


def has_effect(value: Any, without_effect: Any = None) -> bool:
    """Whether a value of an argument is not the same as leaving the argument out.

    Without an effect are None and the value `without_effect`; False and "" if that is None.
    """
    if value is None:
        return False
    if not isinstance(value, (bool, int, float, str)):
        return True
    if without_effect is None:
        return value is not False and value != ""
    return bool(value != without_effect)


def refuse_argument(name: str, value: Any, cure: str, without_effect: Any = None) -> None:
    """Raise ValueError for an argument that is not supported, if its value has an effect (see `has_effect`)."""
    if has_effect(value, without_effect):
        raise ValueError(f"{name}={brief(value)} is not supported; {cure}")


def refuse_arguments(arguments: dict[str, Any], cures: dict[str, str]) -> dict[str, Any]:
    """The arguments without those of Transformers that ask for nothing (None, False or "") or change nothing.

    Raises:
        ValueError: one that is not supported; the message says what to do instead.
    """
    kept = {}
    for name, value in arguments.items():
        if name in SAFETENSORS_ARGUMENTS and value is False:
            raise ValueError(f"{name}=False is not supported; supported: safetensors files only, no pickles")
        if name in cures:
            refuse_argument(name, value, cures[name])
        if name not in SAFETENSORS_ARGUMENTS | HARMLESS_ARGUMENTS | cures.keys():
            kept[name] = value
    return kept


def check_given_config(config: Any, kind: type, changes: dict[str, Any]) -> None:
    """Raise ValueError unless a configuration is given that a class can load, and no changes of it."""
    if not isinstance(config, kind):
        wanted = f"a {kind.__name__} of this project"
        raise ValueError(f"config must be {wanted}, or left out; found {type(config).__name__}")
    if changes:
        names = ", ".join(sorted(changes))
        raise ValueError(f"config and {names} are given; set the fields in the configuration")


def check_recomputation(settings: dict[str, Any] | None, every_n_layers: int, offload: bool) -> None:
    """Raise ValueError unless settings of gradient checkpointing are the supported ones."""
    if settings not in (None, {}, {"use_reentrant": False}):
        found = f"gradient checkpointing with {settings}"
        raise ValueError(f"{found} is not supported; supported: use_reentrant=False")
    if every_n_layers != 1 or offload:
        found = f"every_n_layers={every_n_layers}, offload={offload}"
        raise ValueError(f"gradient checkpointing with {found} is not supported; supported: 1, False")


def expect_state(state_dict: Any, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a state dict that are written in the place of a model's parameters.

    Raises:
        ValueError: a tensor is missing, or of another shape.
    """
    for name, parameter in parameters.items():
        if name not in state_dict or state_dict[name].shape != parameter.shape:
            wanted = f"{name} of shape {tuple(parameter.shape)}"
            raise ValueError(f"state_dict needs {wanted}, as the model has it")
    return {name: state_dict[name].detach() for name in parameters}


def resized_count(new_num_tokens: int | None, pad_to_multiple_of: int | None, count: int) -> int:
    """The number of rows of embeddings of which there are `count` now, see `resize_token_embeddings`."""
    if new_num_tokens is None:
        new_num_tokens = count
    if pad_to_multiple_of is None:
        pad_to_multiple_of = 1
    expect_size("new_num_tokens", new_num_tokens)
    expect_size("pad_to_multiple_of", pad_to_multiple_of)
    return -(-new_num_tokens // pad_to_multiple_of) * pad_to_multiple_of


# --------------------------------------------------------------------------------------------- arguments of forward


def expect_ids(input_ids: Tensor, vocab_size: int) -> None:
    """Raise ValueError unless these are token ids (B, S) of the vocabulary."""
    expect_tensor("input_ids", input_ids)
    if input_ids.ndim != 2 or input_ids.numel() == 0 or input_ids.dtype not in (torch.int64, torch.int32):
        wanted = "(batch, tokens) of whole numbers (torch.int64 or torch.int32)"
        wanted += ", not empty: at least one token"
        raise ValueError(f"input_ids must be {wanted}; found {tuple(input_ids.shape)} of {input_ids.dtype}")
    last = vocab_size - 1
    if may_read(input_ids) and not 0 <= input_ids.min() <= input_ids.max() <= last:
        raise ValueError(f"input_ids from {input_ids.min()} to {input_ids.max()}; allowed: 0 to {last}")


def expect_embeds(inputs_embeds: Tensor, weight: Tensor) -> None:
    """Raise ValueError unless these are embeddings (B, S, E) of the kind that the weight (V, E) has."""
    expect_tensor("inputs_embeds", inputs_embeds)
    size = weight.shape[1]
    if inputs_embeds.ndim != 3 or inputs_embeds.numel() == 0 or inputs_embeds.shape[2] != size:
        found = tuple(inputs_embeds.shape)
        raise ValueError(f"inputs_embeds must be (batch, tokens, {size}), not empty; found {found}")
    expect_device("inputs_embeds", inputs_embeds, weight)
    converted = torch.is_autocast_enabled(weight.device.type)  # every product converts its inputs
    if inputs_embeds.dtype != weight.dtype and not converted:
        cure = f"inputs_embeds.to({weight.dtype})"
        dtypes = f"inputs_embeds of {inputs_embeds.dtype}, weights of {weight.dtype}"
        raise ValueError(f"{dtypes}; convert one: {cure}")


def check_inputs(input_ids: Tensor | None, inputs_embeds: Tensor | None, weight: Tensor) -> None:
    """Raise ValueError unless exactly one input is given, and it suits the embeddings' weight (V, E)."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    if input_ids is not None:
        expect_ids(input_ids, weight.shape[0])
        expect_device("input_ids", input_ids, weight)
    if inputs_embeds is not None:
        expect_embeds(inputs_embeds, weight)


def check_outputs(output_attentions: bool | None, config: Any) -> None:
    """Raise ValueError if probabilities are wanted of an implementation that keeps none."""
    if output_attentions and config.attn_implementation != "eager":
        raise ValueError("output_attentions needs attn_implementation='eager'; the fused kernel keeps none")


def check_start(
    input_ids: Tensor | None, attention_mask: Tensor | None, cache_position: Tensor | None, config: Any,
    past: int, new: int,
) -> None:  # fmt: skip
    """Check where new tokens begin: `cache_position` must follow the `past` cached tokens (or ValueError), and a
    warning tells of padding at the beginning of a text that no mask hides."""
    if cache_position is not None and not torch.compiler.is_compiling():
        expect_tensor("cache_position", cache_position)
        if cache_position.tolist() != list(range(past, past + new)):
            raise ValueError(f"cache_position must be {past}..{past + new - 1} after {past} cached tokens")
    if input_ids is not None and past == 0 and may_read(input_ids):
        warn_of_padding(input_ids, attention_mask, config, config.pad_token_id)


def check_cache(past_key_values: Any, cache_class: type, use_cache: bool | None, recomputes: bool) -> None:
    """Raise ValueError unless this is a cache or None, and there is none with gradient checkpointing."""
    expect_kind("past_key_values", past_key_values, cache_class, "a KVCache of ministral.py")
    if recomputes and (use_cache or past_key_values is not None):
        reason = "which a cache does not allow"
        raise ValueError(f"gradient_checkpointing runs each layer twice, {reason}; leave it out")


def visible_padding_mask(
    attention_mask: Tensor | None, batch: int, length: int, device: torch.device
) -> Tensor | None:
    """`as_padding_mask` on the device, or None if there is no mask, or none that hides a token."""
    if attention_mask is None:
        return None
    mask = as_padding_mask(attention_mask, batch, length).to(device)
    if not torch.compiler.is_compiling() and mask.all():
        return None
    return mask


def as_padding_mask(attention_mask: Tensor, batch: int, length: int) -> Tensor:
    """`attention_mask` as bool (batch, length): True at text, False at padding. Floating-point 1 and 0 are taken.

    Raises:
        ValueError: no such mask.
    """
    supported = "(batch, tokens), earlier tokens in the cache included, 1 at text and 0 at padding"
    expect_tensor("attention_mask", attention_mask)
    if attention_mask.ndim == 4:
        packed = "packed texts need no mask, see position_ids"
        found = "attention_mask of 4 dimensions"
        raise ValueError(f"{found} is not supported; supported: {supported} ({packed})")
    expect("attention_mask", attention_mask, (batch, length))
    if attention_mask.is_floating_point() and not torch.compiler.is_compiling():
        ones = attention_mask == 1
        additive = not (ones | (attention_mask == 0)).all() or not ones.any()
        if additive:  # 0 at text, -inf at padding: zeros alone would be read as nothing but padding
            found = f"attention_mask of numbers from {attention_mask.min():g} to {attention_mask.max():g}"
            raise ValueError(f"{found} is not supported; supported: {supported}")
    return attention_mask.bool()


def as_positions(position_ids: Tensor | None, positions: Tensor, batch: int) -> Tensor:
    """Rotary positions (B or 1, S): those given, or `positions` (S,).

    Raises:
        ValueError: another shape, or no whole numbers.
    """
    if position_ids is None:
        return positions[None]
    length = positions.shape[0]
    expect("position_ids", position_ids, (batch, length), (1, length))
    if not is_whole(position_ids):
        raise ValueError(f"position_ids of {position_ids.dtype} are not supported; supported: whole numbers")
    return position_ids.to(positions.device)


def warn_of_padding(
    input_ids: Tensor, attention_mask: Tensor | None, config: Any, pad: int | None, edges: Sequence[int] = (0,)
) -> None:
    """Warn if a row of a prompt begins with the id `pad` and no mask says that it is padding.

    Padding after a text changes nothing before it. It matters only to code that continues after the last token, which
    gives edges=(0, -1). An id that begins or ends texts does not count.
    """
    ending: Any = config.eos_token_id
    if not isinstance(ending, list):
        ending = [ending]
    if attention_mask is not None or pad is None or pad == config.bos_token_id or pad in ending:
        return
    if (input_ids[:, list(edges)] == pad).any():
        cure = "give attention_mask, 1 at text and 0 at padding"
        found = f"a row is padded with pad_token_id {pad}, which is read as text"
        # One text from one line, so that Python shows it once.
        warnings.warn(f"{found}; {cure}", stacklevel=1)


def warn_of_last_padding(attention_mask: Tensor | None) -> None:
    """Warn where embeddings end in padding, which a classifier reads as text."""
    if attention_mask is None or torch.compiler.is_compiling():
        return
    if not attention_mask[:, -1].all():
        message = "inputs_embeds that end in padding: it is read as text; put padding first"
        warnings.warn(message, stacklevel=5)  # the caller of the model


# ----------------------------------------------------------------------------------------------------- images


def check_pixel_values(pixel_values: Tensor, channels: int) -> None:
    """Raise ValueError unless these are pixels (N, channels, height, width) of at least one image."""
    expect_tensor("pixel_values", pixel_values)
    if not pixel_values.is_floating_point():
        dtype = pixel_values.dtype
        raise ValueError(f"pixel_values of {dtype} are not supported; supported: see `preprocess`")
    if pixel_values.ndim != 4 or pixel_values.shape[1] != channels:
        found = tuple(pixel_values.shape)
        raise ValueError(f"pixel_values must be (images, {channels}, height, width); found {found}")
    if len(pixel_values) == 0:
        raise ValueError("pixel_values hold no image; leave them out")


def check_image_sizes(sizes: Any, count: int) -> None:
    """Raise ValueError unless these are a (height, width) in whole pixels for each image."""
    valid = isinstance(sizes, Sequence) and len(sizes) == count
    for pair in sizes if valid else ():
        valid = valid and isinstance(pair, Sequence) and len(pair) == 2
        valid = valid and all(int(edge) == edge for edge in pair)
    if not valid:
        raise ValueError(f"image_sizes must be a (height, width) for each of {count} images; found {sizes}")


# ----------------------------------------------------------------------------------------------------- cache


def check_fit(stored: Tensor | None, new: Tensor) -> None:
    """Raise ValueError unless new keys or values (B, G, S, D) can be stored behind those in a cache."""
    if stored is None:
        return
    if stored.shape[0] != new.shape[0]:
        batch = new.shape[0]
        raise ValueError(f"the cache holds a batch of {stored.shape[0]}, the input is a batch of {batch}")
    if stored.dtype != new.dtype or stored.device != new.device or stored.shape[1] != new.shape[1]:
        sizes = [f"{x.shape[1]} heads of {x.dtype} on {x.device}" for x in (stored, new)]
        cure = "give each model its own cache"
        raise ValueError(f"the cache holds {sizes[0]}, the model makes {sizes[1]}; {cure}")


def check_crop(max_length: int, layers: Sequence[Any]) -> None:
    """Raise ValueError unless the layers of a cache can go back to `max_length` tokens."""
    for layer in layers:
        length, window = layer.length, layer.window
        if not is_number(max_length, int, 0) or max_length > length:
            allowed = f"0 to {length}, the tokens in the cache"
            raise ValueError(f"max_length={max_length!r} is impossible; allowed: {allowed}")
        if window is not None and max_length < length and length > window:
            cure = "a window that is full cannot be cropped"
            raise ValueError(f"keys before the last {window} have been overwritten; {cure}")


def check_same_windows(layers: Sequence[Any], wanted: Sequence[Any]) -> None:
    """Raise ValueError unless the layers of two caches have the same windows."""
    if [layer.window for layer in layers] != [layer.window for layer in wanted]:
        raise ValueError("past_key_values was made for a configuration with other layers or another window")


# ----------------------------------------------------------------------------------------------------- labels


def expect_classes(labels: Tensor, count: int) -> None:
    """Raise ValueError unless labels are whole numbers from 0 to count - 1, or -100, which the losses ignore."""
    if not is_whole(labels):
        raise ValueError(f"labels of {labels.dtype}; allowed: whole numbers, torch.int64 for example")
    if may_read(labels) and not ((labels == -100) | (labels >= 0) & (labels < count)).all():
        found = f"{labels.min()} to {labels.max()}"
        raise ValueError(f"labels from {found}; allowed: 0 to {count - 1}, or -100 to ignore one")


def expect_numbers(labels: Tensor, problem_type: str) -> None:
    """Raise ValueError unless labels are floating-point numbers."""
    if not labels.is_floating_point():
        raise ValueError(f"labels of {labels.dtype} for {problem_type}; allowed: floating-point numbers")


def expect_fractions(labels: Tensor, problem_type: str) -> None:
    """Raise ValueError unless labels are floating-point numbers from 0 to 1."""
    expect_numbers(labels, problem_type)
    if may_read(labels) and not ((labels >= 0) & (labels <= 1)).all():
        raise ValueError(f"labels from {labels.min()} to {labels.max()} for {problem_type}; allowed: 0 to 1")


def expect_labels(
    labels: Tensor | None, input_ids: Tensor | None, inputs_embeds: Tensor | None,
    logits_to_keep: int | Tensor,
) -> None:  # fmt: skip
    """Raise ValueError unless labels belong to the text, (B, S) ids or (B, S, E) embeddings, and all logits are kept
    for them."""
    text = inputs_embeds if input_ids is None else input_ids
    indices = isinstance(logits_to_keep, Tensor) and logits_to_keep.ndim == 1 and is_whole(logits_to_keep)
    if not indices and not is_number(logits_to_keep, int, 0):
        found = f"logits_to_keep={logits_to_keep!r} is impossible"
        raise ValueError(f"{found}; allowed: 0 (all), a count, or indices in a tensor of one dimension")
    if labels is not None and isinstance(text, Tensor):
        expect("labels", labels, tuple(text.shape[:2]))
        if indices or logits_to_keep:
            raise ValueError("labels need all logits; leave logits_to_keep at 0")
