"""Training: the loss falls, a resumed run is the same run, and the stated results are true."""

import hashlib
import json
import lzma
import math
import os
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from generate import generate
from ministral3 import Ministral3ForCausalLM
from model_types import BUNDLED, load_model
from tests.conftest import newer_torch
from tokenizer import Tokenizer
from training import corpus, samples
from training.evaluate import bits_per_byte, model_bits, ngram_bits_per_byte, xz_bits_per_byte
from training.optimizer import Muon, orthogonalize
from training.train import Recipe, learning_rate, train

TINY = dict(steps=8, tokens_per_step=256, context=64, vocab_size=300, hidden_size=32, num_hidden_layers=1, warmup=2)


@pytest.fixture
def small_corpus(monkeypatch):
    texts = corpus.load()
    small = {"train": [text[:4000] for text in texts["train"][:3]], "validation": [texts["validation"][0][:600]]}
    monkeypatch.setattr(corpus, "load", lambda: small)
    return small


def test_a_resumed_run_is_the_same_run(small_corpus, tmp_path, monkeypatch):
    """Eight steps at once, and eight steps that are killed after each validation: equal weights, to the bit."""
    recipe = Recipe(**TINY, validate_every=2)
    train(recipe, tmp_path / "once", torch.device("cpu"))
    real_replace, saves = os.replace, []

    def die(source, target):
        real_replace(source, target)
        if str(target).endswith("state.pt"):
            saves.append(target)
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", die)
    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "often", torch.device("cpu"))
    assert len(saves) == 4
    once, often = (torch.load(tmp_path / run / "state.pt", weights_only=True) for run in ("once", "often"))
    assert once["step"] == often["step"] == 8 and len(once["log"]) == len(often["log"]) == 4
    for name, weight in once["model"].items():
        assert weight.equal(often["model"][name]), name
    with pytest.raises(ValueError, match="another recipe"):
        train(Recipe(**TINY | {"steps": 9}), tmp_path / "once", torch.device("cpu"))


def test_training_learns_and_writes_a_model_that_loads(small_corpus, tmp_path):
    train(Recipe(**TINY | {"steps": 60}, validate_every=20), tmp_path, torch.device("cpu"))
    log = json.loads((tmp_path / "training_log.json").read_text())["log"]
    scores = [entry["validation_bits_per_byte"] for entry in log]
    assert scores[-1] < scores[0] < 8
    model, tokenizer = load_model(tmp_path), Tokenizer.from_dir(tmp_path)
    assert model.dtype == torch.bfloat16 and tokenizer.vocab_size == model.config.vocab_size == 300
    stored = bits_per_byte(load_model(tmp_path, torch.float32), tokenizer, small_corpus["validation"], 64)
    assert stored == pytest.approx(min(scores), abs=0.02)  # rounded to bfloat16


def test_the_schedule():
    recipe = Recipe()
    rates = [learning_rate(step, recipe) for step in range(recipe.steps)]
    assert max(rates) <= recipe.learning_rate and rates[0] < rates[50] < rates[99] > rates[-1] > 0
    assert rates[-1] == pytest.approx(recipe.learning_rate / recipe.steps)


@pytest.mark.parametrize("shape", [(8, 8), (8, 30), (30, 8)])
def test_orthogonalize(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrix))
    assert values.min() > 0.6 and values.max() < 1.3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    cosine = F.cosine_similarity(orthogonalize(matrix).flatten(), (u @ v).flatten(), dim=0)
    assert cosine > 0.97


def test_muon_moves_against_the_gradient():
    p = torch.nn.Parameter(torch.zeros(6, 4))
    target = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    optimizer = Muon([p], lr=0.05, weight_decay=0.0)
    distances = []
    for _ in range(100):
        loss = (p - target).square().sum()
        distances.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert distances[-1] < 0.1 * distances[0]


# ---------------------------------------------------------------------------------------------------- figures


def test_the_corpus_is_what_its_description_says():
    texts = corpus.load()
    assert {part: len(works) for part, works in texts.items()} == {"train": 39, "validation": 1, "test": 2}
    assert texts["validation"][0].startswith("THE TEMPEST\n")
    assert [text[:6] for text in texts["test"]] == ["HAMLET", "TWELFT"]
    everything = json.loads(lzma.decompress(corpus.CORPUS.read_bytes()))
    for text in everything.values():
        assert text.isascii() and "\n\n\n" not in text and " \n" not in text and "by William" not in text
    digest = hashlib.sha256(lzma.decompress(corpus.CORPUS.read_bytes())).hexdigest()
    assert digest == "5f0db795058a411de031879463f3e60dfc259808b36cbdf6a4b189c8d590bfa5"


def test_no_line_of_the_test_plays_is_trained_on():
    """Lines of 40 characters and more that occur in both: stock phrases and quotations, under one in a thousand."""
    texts = corpus.load()
    trained = {line for text in texts["train"] for line in text.splitlines() if len(line) >= 40}
    held_out = [line for text in texts["test"] for line in text.splitlines() if len(line) >= 40]
    assert len(held_out) > 3000 and sum(line in trained for line in held_out) < len(held_out) / 1000


@torch.no_grad()
def test_model_bits_is_the_sum_of_all_tokens():
    """Short texts: one window, so exactly the loss. Long ones: every token is scored once, with at least half a
    window before it."""
    model, tokenizer = load_model(BUNDLED, torch.float32), Tokenizer.from_dir(BUNDLED)
    text = corpus.load()["validation"][0][3000:3900]
    ids = torch.tensor([tokenizer.encode(text)])
    whole = model(ids, labels=ids).loss.item() * (ids.shape[1] - 1) / math.log(2)
    assert model_bits(model, tokenizer, text, 1024) == pytest.approx(whole, rel=1e-5)

    window, bits = 32, 0.0
    logp = F.log_softmax(model(ids[:, :window]).logits[0], dim=-1)
    bits -= logp[range(window - 1), ids[0, 1:window]].sum().item()
    for start in range(16, ids.shape[1] - 16, 16):
        piece = ids[:, start : start + window]
        logp = F.log_softmax(model(piece).logits[0], dim=-1)
        n = piece.shape[1]
        bits -= logp[range(15, n - 1), piece[0, 16:n]].sum().item()
    assert model_bits(model, tokenizer, text, window) == pytest.approx(bits / math.log(2), rel=1e-5)


def test_the_ngram_model_is_a_probability():
    """The probabilities of all 256 continuations add up to 1, after known and unknown histories."""
    train_text = "the cat sat on the mat. the rat sat."
    for history in ("the ", "sat ", "zzzz", "t"):
        total = sum(
            2 ** -_last_bits(train_text, history, chr(byte)) for byte in range(128)
        )  # bytes from 128 on never occur: each has the same small rest
        rest = 2 ** -_last_bits(train_text, history, "\x7f")
        assert total + 128 * rest == pytest.approx(1, abs=1e-9)


def _last_bits(train_text, history, character):
    """Bits of the last character of history + character."""
    both, first = (history + character), history
    n = len(both) * ngram_bits_per_byte(train_text, both, 3)
    return n - (len(first) * ngram_bits_per_byte(train_text, first, 3) if len(first) > 2 else _bits(train_text, first))


def _bits(train_text, text):
    return len(text) * ngram_bits_per_byte(train_text, text, min(3, len(text)))


def test_the_baselines_order_texts_as_they_should():
    texts = corpus.load()
    train_text, play = "".join(texts["train"][:8]), texts["validation"][0][:20_000]
    noise = np.random.default_rng(0).integers(33, 127, 20_000).astype(np.uint8).tobytes().decode()
    for score in (xz_bits_per_byte, ngram_bits_per_byte):
        assert score(train_text, play) < 3.5 < 6 < score(train_text, noise)
        assert score(train_text + play, play) < score(train_text, play)


def test_the_stated_figure_is_true():
    """The bits per byte on the held-out plays that models/shakespeare/README.md states, measured again."""
    stated = re.search(r"bundled model \|.*\| \*\*(\d\.\d{3})\*\* \|", (BUNDLED / "README.md").read_text())
    model, tokenizer = load_model(BUNDLED, torch.float32), Tokenizer.from_dir(BUNDLED)
    measured = bits_per_byte(model, tokenizer, corpus.load()["test"], model.config.max_position_embeddings)
    assert measured == pytest.approx(float(stated[1]), abs=0.001)
    assert isinstance(model, Ministral3ForCausalLM) and measured <= 1.97


def test_figures_of_a_text():
    """Each figure of `training.samples`, on a text short enough to count by hand."""
    text = "HAMLET.\nTo be or not, to be or not.\n\nHor.\nTo be or not: blorf\n"
    grams, distinct, known, speakers, loops = samples.figures(text, {"to", "be", "or", "not"})
    words = samples.words(text)
    assert len(words) == 15 and words[0] == "hamlet" and words[-1] == "blorf"
    # 12 4-grams, of which "to be or not" comes three times
    assert (grams, distinct, known, speakers, loops) == (10 / 12, 7 / 15, 12 / 15, 2 / 4, 1.0)
    assert samples.figures("To be or not to be", set())[-1] == 0.0
    assert samples.figures("", set()) == (0.0, 0.0, 0.0, 0.0, 0.0)


def shipped_settings():
    """The sampling settings in the directory of the bundled model."""
    content = json.loads((BUNDLED / "generation_config.json").read_text())
    return {key: content[key] for key in ("temperature", "top_k", "top_p", "repetition_penalty")}


def test_the_shipped_settings_are_read_by_transformers():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GenerationConfig.from_pretrained(BUNDLED)
    assert theirs.do_sample and {key: getattr(theirs, key) for key in shipped_settings()} == shipped_settings()
    config = load_model(BUNDLED).config
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(theirs, name) == getattr(config, name)


def test_text_under_the_shipped_settings_does_not_loop(monkeypatch):
    """The bounds are wide: in the table of models/shakespeare/README.md, 100 samples have no loop, and 0.68 of their
    words are distinct (0.11 in greedy text)."""
    monkeypatch.setattr(samples, "PROMPTS", samples.PROMPTS[:1])
    monkeypatch.setattr(samples, "LENGTH", 120)
    model, tokenizer = load_model(BUNDLED, torch.float32), Tokenizer.from_dir(BUNDLED)
    known = set(samples.words("".join(corpus.load()["train"])))
    statistics = [samples.figures(text, known) for text in samples.samples(model, tokenizer, 5, shipped_settings())]
    grams, distinct, spelled, _, loops = np.mean(statistics, axis=0)
    assert len(statistics) == 5 and loops == 0 and grams > 0.97 and distinct > 0.55 and spelled > 0.95
    (greedy,) = samples.samples(model, tokenizer, 1, samples.GREEDY)
    assert samples.figures(greedy, known)[-1] == 1.0


@newer_torch  # which draws other numbers from a seed
def test_the_readme_shows_what_the_model_writes():
    """Each sample in README.md, drawn again in float32. (Noise of 1e-3 on all logits, a hundred times float32's error,
    changed none of them in 10 runs, so they do not depend on the processor.)"""
    readme = (BUNDLED.parents[1] / "README.md").read_text()
    model, tokenizer = load_model(BUNDLED, torch.float32), Tokenizer.from_dir(BUNDLED)
    shown = re.findall(r"seed[ =](\d+)[^`]*```\n+(?:[^`\n]+\n+)*```text\n(.*?)```", readme, re.DOTALL)
    prompts = {text: next(prompt for prompt in samples.PROMPTS if text.startswith(prompt)) for _, text in shown}
    assert len(prompts) >= 2
    for seed, text in shown:
        ids = torch.tensor([tokenizer.encode(prompts[text])])
        tokens = generate(model, ids, max_new_tokens=200, seed=int(seed), **shipped_settings())
        assert tokenizer.decode(tokens[0].tolist()).startswith(text.removesuffix("...\n").rstrip("\n"))
