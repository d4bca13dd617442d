"""The fast path equals the readable one to 1e-12 in float64. In other types its error is no larger."""

import copy
import dataclasses
import io
import math
import pickle
import random
import re
import warnings
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, strategies as st
from safetensors.torch import save_model
from torch._subclasses import FakeTensorMode

import decoder
import fast
import ministral
import recorded_step
from decoder import why_not
from fast import FlatModel
from generate import generate
from ministral import KVCache, MinistralConfig, MinistralForCausalLM, eager_attention
from ministral3 import Ministral3ForCausalLM
from pretrained import Linear
from tests.cases import VOCAB, draw_case
from tests.conftest import at_most
from tests.errors import Errors, number_of_cases

rngs = st.randoms(use_true_random=False)


def left_padded(rng, **fixed):
    """A case on the sdpa path, padded on the left or not at all, with the positions that generation gives it."""
    case = draw_case(rng, attn_implementation="sdpa", **fixed)
    case.mask = None if case.mask is None else case.mask.sort(dim=1).values
    lengths = case.padding_mask.sum(1)
    T = case.ids.shape[1]
    first = lengths[:, None] - T
    return case, (first + torch.arange(T)).clamp(min=0), first


def truth_of(case):
    """The model in float64, on the sdpa path."""
    model = case.truth()
    model.config.attn_implementation = "sdpa"
    return model


@torch.no_grad()
def both(case, model, positions):
    """Logits after each chunk, without padding: of the readable path in one run, of the fast path chunk by chunk."""
    readable = model(case.ids, attention_mask=case.mask, position_ids=positions, use_cache=False).logits
    forward, cache, start, pairs = FlatModel(model), KVCache(model.config), 0, []
    for length in case.chunks:
        end = start + length
        padding_mask = None if case.mask is None else case.mask[:, :end].bool()
        logits = forward(case.ids[:, start:end], positions[:, start:end], cache, padding_mask)
        rows = case.padding_mask[:, end - 1]
        if rows.any():
            pairs.append((readable[rows, end - 1], logits[rows]))
        start = end
    return pairs


@given(rngs)
def test_float64_equals_the_readable_path(rng):
    """Any chunks, windows, padding, both families."""
    case, positions, _ = left_padded(rng, dtype=torch.float32)
    model = case.ours.double()
    for readable, fast_logits in both(case, model, positions):
        torch.testing.assert_close(fast_logits, readable, rtol=0, atol=1e-12 * max(readable.abs().max().item(), 1))


def draw_errors(dtype, cases):
    """Errors of the logits of many random models: the fast path's over the readable one's."""
    errors = Errors()
    for seed in range(cases):
        case, positions, _ = left_padded(random.Random(seed), dtype=dtype)
        exact, pairs = both(case, truth_of(case), positions), both(case, case.ours, positions)
        fast_logits = torch.cat([logits.flatten() for _, logits in pairs])
        readable = torch.cat([logits.flatten() for logits, _ in pairs])
        errors.add(fast_logits, readable, torch.cat([logits.flatten() for logits, _ in exact]))
    return errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_no_larger_than_that_of_the_readable_path(dtype, monkeypatch):
    """By the criterion of tests/errors.py. (Where 16-bit weights are multiplied in float32, the error is smaller.)"""
    monkeypatch.setattr(fast, "wide_rows", lambda dtype, device: math.inf)
    errors = draw_errors(dtype, number_of_cases(150))
    print(f"fast path, {dtype}: {errors}")
    assert errors.no_larger, errors


@pytest.mark.parametrize("grouped", [False, True])
@given(rngs)
def test_attention_of_one_query_equals_the_formula(grouped, device, rng):
    """With any number of heads and slots, hidden slots in every row, and each way to group the heads."""
    B, G, group_size, slots, D = rng.randint(1, 3), rng.randint(1, 3), rng.choice([1, 2, 4]), rng.randint(1, 20), 4
    g = torch.Generator().manual_seed(rng.randrange(2**31))
    q = torch.randn(B, G * group_size, 1, D, dtype=torch.float64, generator=g).to(device)
    k, v = torch.randn(2, B, G, slots, D, dtype=torch.float64, generator=g).to(device)
    mask = (torch.rand(rng.choice([1, B]), 1, 1, slots, generator=g) < 0.6).to(device)
    mask[..., rng.randrange(slots)] = True
    if rng.random() < 0.3:
        mask = None
    expected, _ = eager_attention(q, k, v, mask, D**-0.5, 0.0)
    found = fast.one_query_attention(q, k, v, mask, grouped)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("choice", "grouped"), [("MATH", False), ("EFFICIENT_ATTENTION", True), ("CUDNN_ATTENTION", True)]
)
def test_heads_are_grouped_by_a_kernel_that_can(choice, grouped):
    """Where PyTorch has no kernel for a mask and groups of heads, it would repeat all keys."""
    config, number = tiny().config, torch._C._SDPBackend.__members__[choice].value
    seen = []

    def choose(q, k, v, mask, dropout, causal, enable_gqa):
        seen.append((tuple(q.shape), tuple(k.shape), mask.dtype, enable_gqa))
        return number

    with FakeTensorMode(), patch.object(torch, "_fused_sdp_choice", choose):
        assert fast.groups_heads(config, torch.bfloat16, torch.device("cuda")) == grouped
        assert not fast.groups_heads(config, torch.bfloat16, torch.device("cpu"))
    assert seen == [((1, 4, 1, 16), (1, 2, 8, 16), torch.bool, True)]


@given(rngs)
@at_most(40)
def test_devices_without_kernels_use_masks(rng):
    """As on Apple's MPS."""
    case, positions, _ = left_padded(rng, dtype=torch.float32)
    model = case.ours.double()
    attended = []
    right = fast.blockwise_attention

    def attend(q, k, v, mask, *rest):
        attended.append(mask)
        return right(q, k, v, mask, *rest)

    with patch.object(fast, "has_kernels", lambda device: False), patch.object(fast, "blockwise_attention", attend):
        for readable, fast_logits in both(case, model, positions):
            torch.testing.assert_close(fast_logits, readable, rtol=0, atol=1e-12 * max(readable.abs().max().item(), 1))
    assert all(torch.is_tensor(mask) for mask in attended)


@given(rngs)
@at_most(40)
def test_generation_gives_the_same_tokens(rng):
    """Greedy and drawn, in float64."""
    case, _, _ = left_padded(rng, dtype=torch.float32)
    model = case.ours.double()
    arguments = dict(attention_mask=case.mask, max_new_tokens=rng.randint(1, 20), eos_token_id=(), seed=3,
                     temperature=rng.choice([0.0, 1.0]), prefill_chunk_size=rng.choice([None, 1, 3, 7]))  # fmt: skip
    assert torch.equal(generate(model, case.ids, **arguments), generate(model, case.ids, fast=False, **arguments))


def tiny(cls=MinistralForCausalLM, **fixed):
    """A small random model."""
    torch.manual_seed(0)
    common = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2, head_dim=16, sliding_window=8, initializer_range=0.3)  # fmt: skip
    return cls(cls.config_class(**common | fixed)).eval()


# ----------------------------------------------------------------------------------------------------------- weights


def seen_by_a_caller(model):
    """Properties of a model's weights that are visible to a caller."""
    places = {name: (p.data_ptr(), p.storage_offset(), p.stride(), p.untyped_storage().nbytes(), p._version)
              for name, p in model.state_dict().items()}  # fmt: skip
    file = io.BytesIO()
    torch.save(model.model.layers[0].self_attn.k_proj.state_dict(), file)
    return places, [id(p) for p in model.parameters()], len(file.getvalue()), len(pickle.dumps(model))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("fast", [True, False])
def test_generation_leaves_the_model_as_it_was(tmp_path, fast, tied):
    """Names, addresses and sizes of weights, and the results of saving, copying and pickling."""
    model, ids = tiny(tie_word_embeddings=tied), torch.tensor([[1, 2, 3]])
    before, values = seen_by_a_caller(model), {name: p.clone() for name, p in model.state_dict().items()}
    generate(model, ids, max_new_tokens=3, fast=fast)
    assert seen_by_a_caller(model) == before
    save_model(model, str(tmp_path / "model.safetensors"))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for name, tensor in copied.state_dict().items():
            assert torch.equal(tensor, values[name]) and tensor.data_ptr() != model.state_dict()[name].data_ptr(), name


def scale_in_place(model):
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)


def scale_data(model):
    for p in model.parameters():
        p.data = p.data * 0.5


def scale_loaded(model):
    model.load_state_dict({name: p * 0.5 for name, p in model.state_dict().items()})


def scale_assigned(model):
    model.load_state_dict({name: p * 0.5 for name, p in model.state_dict().items()}, assign=True)


def scale_replaced(model):
    """Replace some modules by others of the same class."""
    for layer in model.model.layers:
        for name in ("q_proj", "v_proj"):
            old = getattr(layer.self_attn, name)
            new = Linear(old.in_features, old.out_features)
            new.weight.data = old.weight.data * 0.5
            setattr(layer.self_attn, name, new)


class Adapted(torch.nn.Module):
    """A linear layer with an added product of two small matrices, as in LoRA."""

    def __init__(self, base):
        super().__init__()
        self.base, size = base, base.weight.shape
        self.a, self.b = (torch.nn.Parameter(torch.randn(*shape) * 0.5) for shape in ((2, size[1]), (size[0], 2)))

    def forward(self, x):
        return self.base(x) + x @ (self.b @ self.a).T


def adapt(model):
    torch.manual_seed(1)
    for layer in model.model.layers:
        layer.self_attn.q_proj, layer.mlp.up_proj = Adapted(layer.self_attn.q_proj), Adapted(layer.mlp.up_proj)


def replace_forward(model):
    """Replace the `forward` of one module, as some libraries do instead of hooks."""
    right = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda x: right(x) * 0.5


CHANGES = [scale_in_place, scale_data, scale_loaded, scale_assigned, scale_replaced, adapt, replace_forward,
           torch.nn.Module.double]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_weights_are_used(change):
    """After any change of a model that has generated, the next text equals that of the readable path."""
    model, ids = tiny().double(), torch.tensor([[1, 2, 3]])
    first = generate(model, ids, max_new_tokens=9, eos_token_id=())
    change(model)
    if change is torch.nn.Module.double:
        model.float().bfloat16().double()
    model.double()
    expected = generate(model, ids, max_new_tokens=9, eos_token_id=(), fast=False)
    assert torch.equal(generate(model, ids, max_new_tokens=9, eos_token_id=()), expected)
    reason = why_not(model)
    if reason is None:
        with torch.no_grad():
            logits = FlatModel(model)(ids, torch.arange(3)[None], KVCache(model.config))
            torch.testing.assert_close(logits, model(ids).logits[:, -1], rtol=0, atol=1e-12 * logits.abs().max().item())
    assert (reason is not None) == (change in (adapt, replace_forward)) and first.shape == expected.shape


def test_a_model_can_train_after_it_has_generated():
    model, ids = tiny(), torch.tensor([[1, 2, 3]])
    generate(model, ids, max_new_tokens=2)
    model.train()
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def unsupported():
    """Models that only the readable path computes: reason -> model."""
    hooked = tiny()
    hooked.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    foreign = tiny()
    foreign.model.layers[0].self_attn.q_proj = torch.nn.Linear(32, 64, bias=False)
    biased = tiny()
    biased.lm_head.bias = torch.nn.Parameter(torch.zeros(VOCAB))
    changed = tiny()
    replace_forward(changed)
    adapted = tiny()
    adapt(adapted)
    norms = tiny()
    norms.model.layers[0].input_layernorm.eps = 0.5
    acts = tiny()
    acts.model.layers[1].mlp.act = torch.nn.functional.gelu
    early = tiny()
    early.model.layers[1].self_attn.register_forward_pre_hook(lambda *_: None)
    return {
        "the model is in training mode": tiny().train(),
        "attn_implementation is 'eager'": tiny(attn_implementation="eager"),
        "MinistralMLP has hooks": hooked,
        "MinistralAttention has hooks": early,
        "norms have several values of eps": norms,
        "a layer has another activation than its configuration": acts,
        "torch.nn.modules.linear.Linear is not a class of this project": foreign,
        "Linear has a bias": biased,
        "the forward of MinistralMLP is not that of this project": changed,
        "the forward of Adapted is not that of this project": adapted,
    }


def test_the_reason_for_the_readable_path_is_given(monkeypatch):
    """In a warning, once for each reason; as an error with fast=True or compile=True; not with fast=False."""
    monkeypatch.setattr(decoder, "WARNED_REASONS", set())
    ids = torch.tensor([[1, 2]])
    for reason, model in unsupported().items():
        assert why_not(model) == reason
        expected = generate(model, ids, max_new_tokens=3, fast=False)
        with pytest.warns(UserWarning, match=re.escape(f"{reason}; fast=False hides this warning")):
            assert torch.equal(generate(model, ids, max_new_tokens=3), expected)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            generate(model, ids, max_new_tokens=3)
        for arguments in (dict(fast=True), dict(compile=True)):
            with pytest.raises(ValueError, match=re.escape(f"fast=True is not supported: {reason}")):
                generate(model, ids, max_new_tokens=3, **arguments)
    with pytest.raises(ValueError, match="compile=True with fast=False"):
        generate(tiny(), ids, fast=False, compile=True)
    for wrong in ("yes", 1, None):
        with pytest.raises(ValueError, match=re.escape(f"fast={wrong!r} is impossible; allowed: True, False, 'auto'")):
            generate(tiny(), ids, fast=wrong)


def test_a_model_with_blockwise_attention_is_supported():
    assert why_not(tiny(attn_implementation="blockwise")) is None


def test_changes_that_act_on_all_models_are_noticed():
    """Hooks of all modules, and another attention function."""
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert why_not(tiny()) == "all modules have hooks"
    finally:
        handle.remove()
    with patch.dict(ministral.ATTENTION, sdpa=eager_attention):
        assert why_not(tiny()) == "an entry of ministral.ATTENTION is not that of this project"
    assert why_not(tiny()) is None


@pytest.mark.parametrize("compile", ["yes", 1, 0])
def test_another_value_of_compile_is_refused(compile):
    with pytest.raises(ValueError, match=re.escape(f"compile={compile!r} is impossible; allowed: True, False, None")):
        generate(tiny(), torch.tensor([[1]]), compile=compile)


def test_a_subclass_with_its_own_forward_is_used():
    """Here the one whose logits are negated, and the same function put into our class."""

    class Negated(MinistralForCausalLM):
        def forward(self, *arguments, **named):
            out = super().forward(*arguments, **named)
            return dataclasses.replace(out, logits=-out.logits)

    model = tiny()
    negated = Negated(model.config).eval()
    negated.load_state_dict(model.state_dict())
    ids = torch.tensor([[1, 2, 3]])
    expected = generate(negated, ids, max_new_tokens=4, fast=False)
    assert why_not(negated) == "the forward of Negated is not that of this project"
    assert torch.equal(generate(negated, ids, max_new_tokens=4), expected)
    with patch.object(ministral.RMSNorm, "forward", lambda self, x: x):
        assert why_not(model) == "the forward of RMSNorm is not that of this project"


# ------------------------------------------------------------------------------------------------------ 16-bit weights


def test_products_in_float32_are_closer_to_float64(monkeypatch):
    """On processors on which float32 is faster. (Measured: 0.64 of the readable path's error. Both round logits and
    cache.)"""
    monkeypatch.setattr(fast, "wide_rows", lambda dtype, device: 8)
    errors = draw_errors(torch.bfloat16, 60)
    print(f"fast path with float32 products: {errors}")
    assert errors.smaller, errors


@pytest.mark.parametrize("recorded", [False, True])
def test_a_wide_batch_of_single_tokens(recorded, monkeypatch):
    """Nine rows are enough to compute in float32; the cache stays in 16 bits."""
    monkeypatch.setattr(fast, "wide_rows", lambda dtype, device: 8)
    model = tiny(initializer_range=0.1)
    exact = model(ids := torch.randint(VOCAB, (9, 12), generator=torch.Generator().manual_seed(0))).logits[:, -1]
    model, positions = model.bfloat16(), torch.arange(12)[None]
    forward, cache = FlatModel(model), KVCache(model.config)
    with torch.inference_mode():
        forward(ids[:, :-1], positions[:, :-1], cache)
        if recorded:
            visible = torch.ones(9, 12, dtype=torch.bool)
            logits = recorded_step.recorded_step(forward, cache, visible, 12)(ids[:, -1:])
        else:
            logits = forward(ids[:, -1:], positions[:, -1:], cache)
    assert {layer.keys.dtype for layer in cache.layers} == {logits.dtype} == {torch.bfloat16}
    torch.testing.assert_close(logits.float(), exact, rtol=0, atol=0.02 * exact.abs().max().item())


@pytest.mark.parametrize("fast", [True, False])
def test_wrong_input_is_refused_on_both_paths(fast):
    model = tiny()
    for ids in ([[1, VOCAB]], [[-1, 1]]):
        with pytest.raises(ValueError, match=f"allowed: 0 to {VOCAB - 1}"):
            generate(model, torch.tensor(ids), fast=fast)
    with pytest.raises(ValueError, match="other layers or another window"):
        generate(model, torch.tensor([[1, 2]]), fast=fast, past_key_values=KVCache(tiny(sliding_window=7).config))


def test_published_shapes_are_taken():
    """Ministral 3 with query scales and tied embeddings."""
    model = tiny(Ministral3ForCausalLM, sliding_window=None, tie_word_embeddings=True)
    assert why_not(model) is None and isinstance(model.config, MinistralConfig)
