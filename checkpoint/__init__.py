"""Model directories: configuration and safetensors weights, from files to tensors and back. Computes no model.

A published model comes in one or both of two layouts:

    Transformers'   config.json   model.safetensors, or shards of it and an index   rotary pairs: two halves
    Mistral's own   params.json   consolidated.safetensors                          rotary pairs: neighbours

`Checkpoint` reads one of them, never both. Either way it returns tensors under Transformers' names and in Transformers'
order of rows (`NAMES`, `half_split`), and FP8 weights as plain numbers (`dequantize`).

    files.py              names of files, which layout a directory has
    hf.py                 config.json
    mistral.py            params.json
    mistral_tensors.py    consolidated.safetensors: names of tensors, order of rows
    fp8.py                FP8 weights and their scales
    generation_config.py  generation_config.json
    hub.py                directories and Hub ids
    reader.py, load.py    from files to tensors, to the parameters of a module
    writer.py             from tensors to files
    expected.py           the parameters that a configuration asks for
    conversion.py         from one layout to the other
    adapter.py, merge.py  LoRA adapters, and merging them into a model

    python -m checkpoint info DIR_OR_HUB_ID
    python -m checkpoint convert SOURCE DESTINATION [--format hf|mistral] [--dtype bfloat16]
    python -m checkpoint merge ADAPTER BASE DESTINATION [--dtype bfloat16]
"""

from .adapter import Adapter
from .conversion import convert
from .expected import count_parameters, empty_model
from .files import CONFIG, FORMATS, GENERATION, WEIGHTS, layout, read_json
from .fp8 import dequantize
from .generation_config import SETTINGS, GenerationConfig, check_setting
from .hf import VISION_PREFIXES, config_fields, label_maps, text_config, text_name
from .hub import find
from .load import load_weights
from .merge import merge
from .mistral import from_params, to_params
from .mistral_tensors import NAMES, from_mistral, half_split, interleave, to_mistral
from .reader import DTYPES, Checkpoint, as_dtype, read_config
from .writer import expect_writable, replace_file, replace_files, write, write_json, write_tensors

__all__ = [
    "CONFIG",
    "DTYPES",
    "FORMATS",
    "GENERATION",
    "NAMES",
    "SETTINGS",
    "VISION_PREFIXES",
    "WEIGHTS",
    "Adapter",
    "Checkpoint",
    "GenerationConfig",
    "as_dtype",
    "check_setting",
    "config_fields",
    "convert",
    "count_parameters",
    "dequantize",
    "empty_model",
    "expect_writable",
    "find",
    "from_mistral",
    "from_params",
    "half_split",
    "interleave",
    "label_maps",
    "layout",
    "load_weights",
    "merge",
    "read_config",
    "read_json",
    "replace_file",
    "replace_files",
    "text_config",
    "text_name",
    "to_mistral",
    "to_params",
    "write",
    "write_json",
    "write_tensors",
]
