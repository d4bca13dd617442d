"""The recorded step equals the readable path to 1e-12 in float64, and is used again where nothing has changed.

On a CPU the same step runs, but is not recorded. Where there is a GPU, it is."""

import copy
import gc
import random
import shutil
from contextlib import contextmanager, nullcontext, suppress
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, strategies as st

import recorded_step
from decoder import Decoder
from fast import FlatModel
from generate import generate
from ministral import KVCache
from ministral3 import Ministral3ForCausalLM
from recorded_step import choose_room, compiling_pays, recording_pays
from tests.cases import VOCAB
from tests.conftest import at_most, newer_torch
from tests.test_fast import (
    CHANGES,
    adapt,
    left_padded,
    replace_forward,
    scale_in_place,
    scale_loaded,
    tiny,
)  # fmt: skip

rngs = st.randoms(use_true_random=False)
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler here"
)


@contextmanager
def recording(smallest_room=4):
    """Generate by recorded steps on a CPU, too. Yields a list of those that are made."""
    made, right = [], recorded_step.RecordedStep

    class Counted(right):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self.room)

    with (
        patch("generate.recording_pays", lambda new_tokens, device: True),
        patch.object(recorded_step, "SMALLEST_ROOM", smallest_room),
        patch.object(recorded_step, "RecordedStep", Counted),
    ):
        yield made


def draw_steps(rng, device, compile=False, **fixed):
    """Logits of some steps after a prompt: of recorded steps in rooms of any size, and of the readable path."""
    case, _, first = left_padded(rng, dtype=torch.float32, **fixed)
    model, ids = case.ours.double().to(device), case.ids.to(device)
    B, T = ids.shape
    new = rng.randint(1, 12)
    visible = torch.ones(B, T + new, dtype=torch.bool)
    if case.mask is not None:
        visible[:, :T] = case.mask.bool()
    visible = visible.to(device)
    tokens = torch.randint(VOCAB, (B, new), generator=torch.Generator().manual_seed(1)).to(device)
    cache = KVCache(model.config, expected=rng.choice([1, T, T + new, 64]))
    decoder = Decoder(FlatModel(model), cache, visible, record=True, compile=compile, expected=T + new)
    pairs = []
    with torch.inference_mode(), patch.object(recorded_step, "SMALLEST_ROOM", rng.choice([1, 8, 256])):
        decoder.prefill(ids, rng.choice([1, 3, 40]))
        for n in range(new):
            logits = decoder.step(tokens[:, n : n + 1]).clone()
            text = torch.cat((ids, tokens[:, : n + 1]), dim=1)
            places = (first.to(device) + torch.arange(T + n + 1, device=device)).clamp(min=0)
            readable = model(text, attention_mask=visible[:, : T + n + 1], position_ids=places).logits[:, -1]
            pairs.append((logits, readable))
    assert cache.get_seq_length() == T + new
    return pairs


def assert_equal(pairs):
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * max(expected.abs().max().item(), 1))


@given(rngs)
@at_most(100)
def test_a_step_computes_the_same(device, rng):
    """With padding, windows and rooms of any size: it reads slots that are hidden."""
    assert_equal(draw_steps(rng, device))


@needs_compiler
@pytest.mark.parametrize("family", [pytest.param("ministral", marks=pytest.mark.slow), "ministral3"])
def test_a_compiled_step_computes_the_same(family):
    """`torch.compile` of the whole step, without a break in its graph."""
    for seed in (0, 1):
        assert_equal(draw_steps(random.Random(seed), "cpu", compile=True, family=family))


@given(rngs)
@at_most(40)
def test_a_conversation_gives_the_same_tokens(device, rng):
    """Several calls of `generate` with one cache, which is cut back now and then."""
    case, _, _ = left_padded(rng, dtype=torch.float32)
    model, B = case.ours.double().to(device), case.ids.shape[0]
    settings = dict(eos_token_id=(), seed=3, temperature=rng.choice([0.0, 1.0]))
    settings["prefill_chunk_size"] = rng.choice([1, 3, 40])
    text, mask = case.ids.to(device), case.padding_mask.to(device)
    cache = KVCache(model.config, expected=rng.choice([1, 20, 64]))
    with recording():
        for _ in range(3):
            settings["max_new_tokens"] = rng.randint(1, 9)
            expected = generate(model, text, mask, fast=False, **settings)
            found = generate(model, text, mask, past_key_values=cache, **settings)
            assert torch.equal(found, expected)
            more = torch.randint(VOCAB, (B, rng.randint(1, 5)), generator=torch.Generator().manual_seed(1)).to(device)
            text = torch.cat((found, more), dim=1)
            mask = torch.nn.functional.pad(mask, (0, text.shape[1] - mask.shape[1]), value=True)
            with suppress(ValueError):  # a window has moved on
                cache.crop(rng.randint(1, cache.get_seq_length()))


# --------------------------------------------------------------------------------------------- when it is used again


def mixed():
    """A small model with a full and a sliding layer."""
    return tiny(layer_types=["full_attention", "sliding_attention"])


def talk(model, cache, calls, **settings):
    """Some calls of `generate` with one cache; each text goes on with that of the call before."""
    text = torch.randint(VOCAB, (1, 5), generator=torch.Generator().manual_seed(0)).to(model.device)
    for _ in range(calls):
        text = generate(model, text, past_key_values=cache, max_new_tokens=4, eos_token_id=(), **settings)
    return text


def assert_goes_on(model, cache, text):
    """The next call with this cache gives the tokens of the readable path."""
    arguments = dict(max_new_tokens=9, eos_token_id=())
    expected = generate(model, text, fast=False, past_key_values=copy.deepcopy(cache), **arguments)
    assert torch.equal(generate(model, text, past_key_values=cache, **arguments), expected)


@pytest.mark.parametrize("modes", [(False, True, False), (True, True)])
@pytest.mark.parametrize("recorded", [False, True])
def test_a_cache_is_used_in_and_outside_of_inference_mode(recorded, modes):
    """Each forward pass and each call of `generate` may be in the inference mode of the caller."""
    model, text = mixed(), torch.tensor([[1, 2, 3, 4]])
    cache = KVCache(model.config, expected=64)
    with torch.inference_mode(modes[0]), torch.no_grad():
        model(text[:, :3], past_key_values=cache)
    with recording(smallest_room=64) if recorded else nullcontext():
        for mode in modes:
            with torch.inference_mode(mode):
                found = generate(model, text, past_key_values=cache, max_new_tokens=4, eos_token_id=())
            expected = generate(model, text, max_new_tokens=4, eos_token_id=(), fast=False)
            assert torch.equal(found, expected)
            text = torch.tensor([[*found[0].tolist(), 5]])


def test_a_step_is_made_once_for_each_room():
    """And its memory ends with the cache."""
    model = mixed()
    cache = KVCache(model.config, expected=16)
    with recording(smallest_room=4) as made:
        talk(model, cache, 9)  # a text of 41 tokens
    assert made == [8, 16, 32, 64]
    assert cache in recorded_step.STEPS
    before = len(recorded_step.STEPS)
    del cache
    gc.collect()
    assert len(recorded_step.STEPS) == before - 1


@pytest.mark.parametrize("change", [None, *CHANGES], ids=lambda change: getattr(change, "__name__", "none"))
def test_a_step_is_made_anew_if_weights_have_moved(change):
    """Weights that are changed in place are read where they are. The text is that of the readable path in any case."""
    model = mixed().double()
    cache = KVCache(model.config, expected=64)
    with recording(smallest_room=64) as made:
        text = talk(model, cache, 2)
        if change is not None:
            change(model)
            model.double()
        assert_goes_on(model, cache, text)
    in_place = change in (None, scale_in_place, scale_loaded, torch.nn.Module.double)
    readable = change in (adapt, replace_forward)
    assert made == ([64] if in_place or readable else [64, 64])


SINGLE = [
    "model.embed_tokens", "model.norm", "lm_head", "model.layers.1.self_attn.k_proj", "model.layers.0.mlp.down_proj",
]  # fmt: skip


@pytest.mark.parametrize("name", SINGLE)
def test_a_single_weight_that_has_moved_is_noticed(name):
    model = mixed().double()
    cache = KVCache(model.config, expected=64)
    with recording(smallest_room=64) as made:
        text = talk(model, cache, 2)
        module = model.get_submodule(name)
        module.weight.data = module.weight.data * 0.5
        assert_goes_on(model, cache, text)
    assert made == [64, 64]


def test_a_replaced_rotation_is_noticed():
    model = mixed().double()
    cache = KVCache(model.config, expected=64)
    with recording(smallest_room=64) as made:
        text = talk(model, cache, 2)
        other = tiny(layer_types=model.config.layer_types, rope_theta=3.0).double()
        model.model.rotary_emb = other.model.rotary_emb
        assert_goes_on(model, cache, text)
    assert made == [64, 64]


def test_a_cache_that_has_grown_meanwhile_is_noticed():
    """The room is that of the step before, but the keys have moved."""
    model = mixed().double()
    cache = KVCache(model.config, expected=64)
    arguments = dict(max_new_tokens=6, eos_token_id=())
    with recording(smallest_room=64) as made:
        text = talk(model, cache, 2)
        longer = torch.cat((text, torch.ones(1, 80, dtype=torch.int64)), dim=1)
        generate(model, longer, past_key_values=cache, fast=False, **arguments)
        for layer in cache.layers:
            layer.length = 0  # `crop` refuses this, because a window has moved on: but nothing is kept here
        assert cache.layers[0].capacity > 64
        expected = generate(model, text, fast=False, **arguments)
        assert torch.equal(generate(model, text, past_key_values=cache, **arguments), expected)
    assert made == [64, 64]


def test_an_old_step_is_freed_before_the_next_one_is_made():
    """It keeps keys and values of its room in memory."""
    model, alive = mixed(), []
    cache = KVCache(model.config, expected=4)
    kind = recorded_step.RecordedStep
    right = kind.__init__

    def count(self, *arguments):
        gc.collect()
        others = [thing for thing in gc.get_objects() if issubclass(type(thing), kind) and thing is not self]
        alive.append(len(others))
        right(self, *arguments)

    with recording(smallest_room=4), patch.object(kind, "__init__", count):
        talk(model, cache, 9)
    assert set(alive) == {0} and len(alive) >= 4


class FakeStream:
    """A stream that notes what is done with it."""

    def __init__(self, log, name):
        self.log, self.name = log, name

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")


def test_a_step_is_recorded_on_its_own_device_and_stream(monkeypatch):
    """Three runs on a side stream, then the recording on the same stream."""
    log = []

    @contextmanager
    def block(name):
        log.append(f"enter {name}")
        yield
        log.append(f"leave {name}")

    class FakeGraph:
        def replay(self):
            log.append("replay")

    def graph(graph, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        return block(f"graph on {stream.name}")

    main, side = FakeStream(log, "main"), FakeStream(log, "side")
    monkeypatch.setattr(torch.cuda, "device", lambda device: block(f"device {device}"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: block(f"stream {stream.name}"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    replay = recorded_step.record(lambda: log.append("step") or "logits", "cuda:1")
    assert log == [
        "enter device cuda:1", "side waits for main", "enter stream side", "step", "step", "step", "leave stream side",
        "main waits for side", "enter graph on side", "step", "leave graph on side", "leave device cuda:1",
    ]  # fmt: skip
    assert replay() == "logits" and log[-1] == "replay"


@pytest.mark.slow
def test_many_shapes_are_compiled():
    """More than the limit of 8 that PyTorch has by default. (The compiler is left out: it takes seconds a shape.)"""
    right = torch.compile
    with patch.object(torch, "compile", lambda step, **options: right(step, backend="eager", **options)):
        model = tiny().double()
        for rows in range(1, 12):
            ids = torch.ones(rows, 4, dtype=torch.int64)
            found = generate(model, ids, max_new_tokens=3, eos_token_id=(), compile=True)
            assert torch.equal(found[:1], generate(model, ids[:1], max_new_tokens=3, eos_token_id=(), fast=False))


def test_a_changed_setting_is_used():
    """The scale of queries grows from position 1 on, by a factor that is changed between two calls."""
    rope = dict(rope_type="yarn", rope_theta=1e4, factor=16.0, original_max_position_embeddings=1,
                llama_4_scaling_beta=0.1)  # fmt: skip
    model = tiny(Ministral3ForCausalLM, sliding_window=None, rope_parameters=rope, max_position_embeddings=64).double()
    cache = KVCache(model.config, expected=64)
    with recording(smallest_room=64) as made:
        text = talk(model, cache, 2)
        model.config.rope_parameters["llama_4_scaling_beta"] = 3.0
        assert_goes_on(model, cache, text)
    assert made == [64, 64]


# ------------------------------------------------------------------------------------------------------- the rules


@pytest.mark.parametrize(
    ("expected", "length", "room"),
    [
        (1000, 0, 256),  # a short text in a long memory
        (1000, 256, 512),
        (1000, 600, 1000),  # the memory that there is
        (40, 30, 40),
        (40, 40, 256),  # more memory is needed
        (1, 5000, 8192),
    ],
)
def test_the_room(expected, length, room):
    """Powers of two, or less where memory was reserved for less. A compiled step has room for the whole text."""
    cache = KVCache(mixed().config, expected)
    for layer in cache.layers:
        layer.capacity = expected if layer.window is None else min(expected, layer.window)
        layer.length = length
    assert choose_room(cache, expected, compile=False) == room
    assert choose_room(cache, 5000, compile=True) == 5120


def test_when_a_step_is_recorded_and_compiled():
    """By the numbers of new tokens from which it pays, on CUDA."""
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert [recording_pays(n, gpu) for n in (1, 7, 8, 32768)] == [False, False, True, True]
    triton, cc = patch.object(recorded_step, "find_spec", bool), patch.object(recorded_step.shutil, "which", bool)
    with triton, cc:
        assert [compiling_pays(n, gpu) for n in (8, 32767, 32768)] == [False, False, True]
    with triton, patch.object(recorded_step.shutil, "which", lambda name: None):
        assert not compiling_pays(32768, gpu)
    with cc, patch.object(recorded_step, "find_spec", lambda name: None):
        assert not compiling_pays(32768, gpu)
    assert not recording_pays(32768, cpu) and not compiling_pays(32768, cpu)


@pytest.mark.slow
@newer_torch
@needs_compiler
def test_compiled_generation():
    """The same tokens. The second call, of another length in the same room, compiles nothing."""
    model, ids = tiny().double(), torch.randint(VOCAB, (2, 11), generator=torch.Generator().manual_seed(2))
    counters = torch._dynamo.utils.counters["stats"]
    compiled = []
    for new in (12, 20):
        expected = generate(model, ids, max_new_tokens=new, eos_token_id=(), fast=False)
        before = counters["unique_graphs"]
        assert torch.equal(generate(model, ids, max_new_tokens=new, eos_token_id=(), compile=True), expected)
        compiled.append(counters["unique_graphs"] - before)
    assert compiled == [1, 0]


@needs_compiler
def test_long_texts_are_compiled():
    """Where `compiling_pays` says so, and `compile` is not given. (The end of the text comes before that.)"""
    model, ids = tiny(max_position_embeddings=2**16), torch.tensor([[1, 2]])
    right, compiled = Decoder.__init__, []

    def remember(self, forward, cache, visible, record, compile, expected):
        compiled.append((record, compile))
        right(self, forward, cache, visible, record, compile, expected)

    long_texts = patch("generate.compiling_pays", lambda new_tokens, device: new_tokens >= 32768)
    with patch.object(Decoder, "__init__", remember), long_texts:
        for settings in (dict(), dict(compile=False), dict(fast=False)):
            generate(model, ids, max_new_tokens=40000, on_token=lambda row, token: True, **settings)
        generate(model, ids, max_length=40002, on_token=lambda row, token: True)  # not the caller's number
    assert compiled == [(True, True), (False, False), (False, False), (False, False)]
