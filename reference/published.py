"""The configuration files of the published models, as far as they are known."""

from __future__ import annotations

import copy
from typing import Any

# config.json of Ministral-8B-Instruct-2410 (Transformers 4 dialect, model_type mistral, no pad token).
MINISTRAL_8B: dict[str, Any] = dict(
    architectures=["MistralForCausalLM"], attention_dropout=0.0, bos_token_id=1, eos_token_id=2, head_dim=128,
    hidden_act="silu", hidden_size=4096, initializer_range=0.02, intermediate_size=12288,
    max_position_embeddings=32768, model_type="mistral", num_attention_heads=32, num_hidden_layers=36,
    num_key_value_heads=8, rms_norm_eps=1e-05, rope_theta=100000000.0, sliding_window=32768,
    tie_word_embeddings=False, torch_dtype="bfloat16", transformers_version="4.46.0.dev0", use_cache=True,
    vocab_size=131072,
)  # fmt: skip

# params.json of the same model.
MINISTRAL_8B_PARAMS: dict[str, Any] = dict(
    dim=4096, n_layers=36, head_dim=128, hidden_dim=12288, n_heads=32, n_kv_heads=8, norm_eps=1e-5, vocab_size=131072,
    rope_theta=1e8, max_position_embeddings=32768, sliding_window=[None, 32768, 32768, 32768],
)  # fmt: skip

# The text_config of Ministral-3-3B-Instruct-2512 (Transformers 5 dialect, with both `rope_type` and `type`).
MINISTRAL3_3B: dict[str, Any] = dict(
    attention_dropout=0.0, head_dim=128, hidden_act="silu", hidden_size=3072, initializer_range=0.02,
    intermediate_size=9216, max_position_embeddings=262144, model_type="ministral3", num_attention_heads=32,
    num_hidden_layers=26, num_key_value_heads=8, rms_norm_eps=1e-05,
    rope_parameters=dict(
        beta_fast=32.0, beta_slow=1.0, factor=16.0, llama_4_scaling_beta=0.1, mscale=1.0, mscale_all_dim=1.0,
        original_max_position_embeddings=16384, rope_theta=1000000.0, rope_type="yarn", type="yarn",
    ),
    sliding_window=None, tie_word_embeddings=True, use_cache=True, vocab_size=131072,
)  # fmt: skip


def ministral3(size: str, fp8: bool = False) -> dict[str, Any]:
    """The config.json of Ministral-3-{3B,8B,14B}-2512; `fp8` is the Instruct version, the others are BF16.

    Raises:
        ValueError: another size.
    """
    if size not in ("3B", "8B", "14B"):
        raise ValueError(f"size {size!r} is not known; allowed: 3B, 8B, 14B")
    text = copy.deepcopy(MINISTRAL3_3B)
    if size == "8B":
        text.update(hidden_size=4096, intermediate_size=14336, num_hidden_layers=34, tie_word_embeddings=False)
    elif size == "14B":
        text.update(hidden_size=5120, intermediate_size=16384, num_hidden_layers=40, tie_word_embeddings=False)
        text["rope_parameters"]["rope_theta"] = 1e9
    vision = dict(
        attention_dropout=0.0, head_dim=64, hidden_act="silu", hidden_size=1024, image_size=1540,
        initializer_range=0.02, intermediate_size=4096, model_type="pixtral", num_attention_heads=16,
        num_channels=3, num_hidden_layers=24, patch_size=14,
        rope_parameters=dict(rope_theta=10000.0, rope_type="default"),
    )  # fmt: skip
    config: dict[str, Any] = dict(
        architectures=["Mistral3ForConditionalGeneration"], dtype="bfloat16", image_token_index=10,
        model_type="mistral3", multimodal_projector_bias=False, projector_hidden_act="gelu", spatial_merge_size=2,
        text_config=text, transformers_version="5.0.0.dev0", vision_config=vision, vision_feature_layer=-1,
    )  # fmt: skip
    if fp8:
        untouched = ["model.vision_tower", "model.multi_modal_projector", "lm_head"] * 2  # twice in the files
        config["quantization_config"] = dict(
            activation_scheme="static", dequantize=False, modules_to_not_convert=untouched, quant_method="fp8",
            weight_block_size=None,
        )  # fmt: skip
    return config


# params.json of Ministral-3-8B (BF16).
MINISTRAL3_8B_PARAMS: dict[str, Any] = dict(
    dim=4096, n_layers=34, head_dim=128, hidden_dim=14336, n_heads=32, n_kv_heads=8, rope_theta=1000000.0,
    norm_eps=1e-05, vocab_size=131072, tied_embeddings=False, max_position_embeddings=262144,
    llama_4_scaling=dict(original_max_position_embeddings=16384, beta=0.1),
    q_lora_rank=None, qk_rope_head_dim=None, qk_nope_head_dim=None, kv_lora_rank=None, v_head_dim=None,
    yarn=dict(original_max_position_embeddings=16384, factor=16, apply_scale=False, beta=32, alpha=1),
    vision_encoder=dict(
        image_token_id=10, image_break_token_id=12, image_end_token_id=13, intermediate_size=4096,
        num_hidden_layers=24, num_attention_heads=16, mm_projector_id="patch_merge", spatial_merge_size=2,
        hidden_size=1024, num_channels=3, image_size=1540, max_image_size=1540, patch_size=14, rope_theta=10000.0,
        add_pre_mm_projector_layer_norm=True, adapter_bias=False,
    ),
)  # fmt: skip
