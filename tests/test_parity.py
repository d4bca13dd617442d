"""Whole sequences: every hidden state, every attention map, the logits and the loss equal Transformers' to the bit."""

import random

import pytest
import torch
from hypothesis import given, strategies as st

from ministral import MinistralConfig
from ministral3 import Ministral3Config, Ministral3ForCausalLM
from tests.cases import DTYPES, SCALES_BY_POSITION, draw_case, draw_config, pair
from tests.conftest import at_most

rngs = st.randoms(use_true_random=False)


def assert_same(ours, theirs, padding_mask=None):
    """Equal bits and no NaN wherever `padding_mask` is True."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    if padding_mask is not None:
        ours, theirs = ours[padding_mask], theirs[padding_mask]
    if ours.dtype == torch.float16 and padding_mask is not None and theirs.isnan().any():
        # In float16 Transformers' eager path overflows in rows that are all padding (score + lowest number = -inf),
        # and their NaN spreads to tokens of the text. There is nothing to compare then. Ours is finite.
        assert not padding_mask.all() and not ours.isnan().any()
        return
    assert torch.equal(ours, theirs), f"largest difference {(ours.double() - theirs.double()).abs().max():.3g}"


@torch.no_grad()
def check_case(rng, device, dtype=None, **fixed):
    case = draw_case(rng, device, dtype, **fixed)
    if device == "cuda" and case.ours.config.attn_implementation == "sdpa":
        case.ours.config.attn_implementation = case.theirs.config._attn_implementation = "eager"
    eager = case.ours.config.attn_implementation == "eager"
    labels = case.labels(rng)
    arguments = dict(attention_mask=case.mask, labels=labels, output_hidden_states=True, output_attentions=eager)
    if rng.random() < 0.3:  # as embeddings, and from another position on
        arguments["inputs_embeds"] = case.theirs.model.embed_tokens(case.ids)
        arguments["position_ids"] = torch.arange(case.ids.shape[1], device=device)[None] + rng.randrange(100)
    else:
        arguments["input_ids"] = case.ids
    a, b = case.ours(**arguments), case.theirs(**arguments)
    assert len(a.hidden_states) == len(b.hidden_states) == case.ours.config.num_hidden_layers + 1
    for x, y in zip(a.hidden_states, b.hidden_states):
        assert_same(x, y, case.padding_mask)
    assert_same(a.logits, b.logits, case.padding_mask)
    if eager:
        assert len(a.attentions) == len(b.attentions) == case.ours.config.num_hidden_layers
        for x, y in zip(a.attentions, b.attentions):
            assert_same(x.transpose(1, 2), y.transpose(1, 2), case.padding_mask)
    if (labels[:, 1:] != -100).any():
        assert b.logits.isnan().any() or torch.equal(a.loss, b.loss)
    assert not any(x.isnan().any() for x in (*a.hidden_states, a.logits, *(a.attentions or ())))


@given(rngs)
def test_every_tensor_is_bit_identical(device, rng):
    check_case(rng, device)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["ministral", "ministral3"])
def test_every_combination_is_bit_identical(device, family, dtype, attn_implementation):
    for seed in range(6):
        rng = random.Random(f"{family}{dtype}{attn_implementation}{seed}")
        check_case(rng, device, dtype, family=family, attn_implementation=attn_implementation)


def test_the_drawn_models_use_every_feature():
    """The features that the tests above are meant to cover do occur within the drawn lengths."""
    seen = set()
    for seed in range(200):
        case = draw_case(random.Random(seed))
        config, S = case.ours.config, case.ids.shape[1]
        if config.model_type == "ministral":
            seen |= {f"window wraps in {kind}" for kind in config.layer_types if config.sliding_window < S}
        elif config.rope_parameters["original_max_position_embeddings"] < S:
            seen |= {"query scale > 1"} if config.rope_parameters["llama_4_scaling_beta"] else set()
            ratio = case.ours.model.rotary_emb.inverse_frequencies(torch.float64) * config.rope_theta ** (
                torch.arange(0, config.head_dim, 2) / config.head_dim
            )  # 1 where YaRN leaves a frequency alone, 1/factor where it stretches it in full
            low = 1 / config.rope_parameters["factor"]
            zones = {"fast": (ratio > 1 - 1e-6).any(), "slow": (ratio < low + 1e-6).any()}
            zones["between"] = ((ratio < 1 - 1e-6) & (ratio > low + 1e-6)).any()
            seen |= {"three YaRN zones"} if all(zones.values()) else set()
            seen |= {f"magnitude {'1' if case.ours.model.rotary_emb.attention_factor() == 1 else 'not 1'}"}
        seen |= {"GQA"} if config.num_key_value_heads < config.num_attention_heads else set()
        seen |= {"inner size"} if config.head_dim * config.num_attention_heads != config.hidden_size else set()
        seen |= {"tied" if config.tie_word_embeddings else "untied"}
        if case.mask is not None and not case.mask.all():
            seen |= {"left padding"} if not case.mask[:, 0].all() else set()
            seen |= {"right padding"} if not case.mask[:, -1].all() else set()
        seen |= {"chunk > window"} if max(case.chunks) > (config.sliding_window or S) else set()
    assert seen == {
        *("window wraps in full_attention", "window wraps in sliding_attention", "GQA", "tied"),
        *(("query scale > 1",) if SCALES_BY_POSITION else ()),
        *("three YaRN zones", "magnitude 1", "magnitude not 1", "inner size", "untied", "left padding"),
        *("right padding", "chunk > window"),
    }


@torch.no_grad()
@at_most(100)
@given(rngs)
def test_packed_texts_are_bit_identical(rng):
    """Without mask and cache, positions that restart hide earlier texts, here as in Transformers."""
    case = draw_case(rng)
    S = case.ids.shape[1]
    if rng.random() < 0.5:  # a second text from position 0 on, in every row
        cut = rng.randint(0, S)
        positions = torch.cat((torch.arange(cut), torch.arange(S - cut)))[None]
    else:  # jumps forward and back, other ones in each row
        steps = [[1 if rng.random() < 0.8 else rng.randint(-5, 9) for _ in range(S)] for _ in case.ids]
        positions = torch.tensor(steps).cumsum(1).clamp(min=0)
    a, b = (m(case.ids, position_ids=positions, use_cache=False).logits for m in (case.ours, case.theirs))
    assert_same(a, b)


@torch.no_grad()
@at_most(60)
@given(rngs)
def test_logits_to_keep(rng):
    case = draw_case(rng)
    S = case.ids.shape[1]
    keep = rng.choice([0, 1, rng.randint(1, S), torch.tensor(sorted(rng.sample(range(S), rng.randint(1, S))))])
    a, b = (m(case.ids, case.mask, logits_to_keep=keep).logits for m in (case.ours, case.theirs))
    positions = keep if torch.is_tensor(keep) else slice(-keep, None)
    assert_same(a, b, None if case.mask is None else case.padding_mask[:, positions])


@at_most(60)
@given(rngs)
def test_dropout_draws_the_same_numbers(rng):
    """In training, with the same seed, attention dropout removes the same probabilities; in eval it removes none."""
    case = draw_case(rng, dtype=torch.float32, attention_dropout=0.4)
    outputs = []
    for model in (case.ours.train(), case.theirs.train()):
        torch.manual_seed(5)
        outputs.append(model(case.ids, case.mask).logits)
    assert_same(*outputs, case.padding_mask)
    without_dropout = [model.eval()(case.ids, case.mask).logits for model in (case.ours, case.theirs)]
    assert_same(*without_dropout, case.padding_mask)
    if case.ids.shape[1] > 9 and case.mask is None:
        assert not torch.equal(case.ours(case.ids).logits, outputs[0])


def test_fresh_weights_are_drawn_as_transformers_draws_them():
    config = draw_config(random.Random(8), family="ministral3", hidden_size=32, initializer_range=0.03)
    torch.manual_seed(0)
    fresh = dict(Ministral3ForCausalLM(config).named_parameters())
    for name, p in fresh.items():
        if p.ndim == 1:
            assert p.eq(1).all()
        elif p.numel() > 1000:
            error = 0.03 / p.numel() ** 0.5  # the standard error of the mean; that of the deviation is 0.7 of it
            assert p.mean().abs() < 5 * error and abs(p.std() - 0.03) < 5 * error, name
    assert fresh["model.embed_tokens.weight"][config.pad_token_id].eq(0).all()


@torch.no_grad()
@pytest.mark.parametrize("change", [-1, 1])
def test_a_window_off_by_one_is_detected(change):
    """The comparison detects W - 1 or W + 1 keys, in every case that is long enough."""
    for seed in range(20):
        rng = random.Random(seed)
        window = rng.choice([2, 5, 8])
        case = draw_case(rng, dtype=torch.float32, family="ministral", layer_types=None, sliding_window=window)
        ids = torch.randint(1, 50, (1, 20), generator=torch.Generator().manual_seed(seed))
        right = case.ours(ids).logits
        assert_same(right, case.theirs(ids).logits)
        case.ours.config.sliding_window += change
        assert not torch.equal(case.ours(ids).logits, right)


@torch.no_grad()
def test_casting_a_model_keeps_the_rotary_frequencies():
    """`model.to(bfloat16)` must not round them: the cast model equals one that was built in bfloat16."""
    for seed in range(10):
        rng = random.Random(seed)
        config = draw_config(rng)
        ours, theirs = pair(config, torch.float32, seed)
        cast = type(theirs)._from_config(theirs.config, dtype=torch.bfloat16).eval()
        cast.load_state_dict(theirs.state_dict())
        ids = torch.tensor([[rng.randrange(1, 50) for _ in range(40)]])
        ours(ids)  # fills whatever the model remembers about positions, in float32
        assert_same(ours.to(torch.bfloat16)(ids).logits, cast(ids).logits)


@torch.no_grad()
def test_published_shapes():
    """The published 8B and 3B configurations, with narrow layers and few of them: the published YaRN values and window,
    positions up to the end of the context."""
    small = dict(hidden_size=64, intermediate_size=32, num_hidden_layers=2, vocab_size=50)
    heads = dict(num_attention_heads=4, num_key_value_heads=1, head_dim=128)
    old = MinistralConfig(
        **small, **heads, sliding_window=32768, rope_theta=1e8, layer_types=MinistralConfig.published_layer_types(2)
    )
    new = Ministral3Config(**small, **heads)
    for config, last in ((old, 131072), (new, 262144)) if SCALES_BY_POSITION else ((old, 131072),):
        ours, theirs = pair(config, torch.float32, 0)
        ids = torch.randint(12, 50, (1, 12), generator=torch.Generator().manual_seed(0))
        for start in (0, 16380, 65530, last - 12):
            positions = torch.arange(start, start + 12)[None]
            assert_same(ours(ids, position_ids=positions).logits, theirs(ids, position_ids=positions).logits)
