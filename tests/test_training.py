"""Training: a resumed run is the same run, the tasks' answers are right, and the stated results are true."""

import hashlib
import json
import lzma
import math
import os
import re
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st
from PIL import Image

from generate import generate
from images import preprocess
from model_types import BUNDLED, load_model
from tests.conftest import newer_torch
from tokenizer import Tokenizer
from training import corpus, evaluate, recipes, rows, shapes, tasks, train
from training.__main__ import main as training_command
from training.bits import bits_per_byte, model_bits, ngram_bits_per_byte
from training.optimizer import Muon, orthogonalize
from training.recipes import Recipe
from training.rows import ANSWER, IGNORED, TEXT, Rows, Stage
from training.tasks import Draw, Plays
from training.vocabulary import learn

CPU = torch.device("cpu")
STAGES = (
    Stage("text", 2, (5e-3, 2e-3), 256, row=128, text=0.5, shares={"sum": 1.0}, factor=1.0),
    Stage("tower", 1, (3e-3, 3e-4), images=4),
    Stage("vision", 2, (2e-3, 0.0), 512, row=256, text=0.5, shares={"image": 1.0}),
)
README_PROMPT = "Shall I compare thee"
TINY = Recipe("ministral3", STAGES, vocab_size=400, hidden_size=128, intermediate_size=64, num_hidden_layers=1)
SEEDS = st.integers(0, 10**6)


@contextmanager
def small_corpus():
    """A small corpus, and a vocabulary that is learned from it alone."""
    texts = corpus.load()
    small = {"train": [text[:30000] for text in texts["train"][:3]], "test": [texts["test"][0][:9000]]}
    small["validation"] = [texts["validation"][0][:600]]
    vocabulary = patch.object(train, "vocabulary", lambda texts, recipe: learn(texts, recipe.vocab_size))
    with patch.object(corpus, "load", lambda: small), vocabulary:
        yield


@pytest.fixture
def trainer(tmp_path):
    """A function that makes a trainer of a recipe with a small corpus."""
    with small_corpus():
        yield lambda recipe, name="run": train.Trainer(recipe, tmp_path / name, CPU)


@pytest.fixture(scope="module")
def plays():
    """The plays of the training, and those of the test."""
    texts = corpus.load()
    return {False: Plays.of(texts["train"][:3], texts["test"]), True: Plays.of(texts["test"], texts["train"][:3])}


def test_a_resumed_run_is_the_same_run(trainer, tmp_path, monkeypatch, capsys):
    """Three stages at once, and three that are killed after each state that is written: equal weights, to the bit."""
    trainer(TINY, "once").run()
    real_replace, saves = os.replace, []

    def die(source, target):
        real_replace(source, target)
        if str(target).endswith("state.pt"):
            saves.append(target)
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", die)
    monkeypatch.setattr(train, "SAVE_EVERY", 0)
    for _ in range(8):  # one state after each step, and one after each stage
        with pytest.raises(KeyboardInterrupt):
            trainer(TINY, "often").run()
    trainer(TINY, "often").run()
    assert len(saves) == 8 and "ministral3 text: from step 1 of 2, in " in capsys.readouterr().out
    once, often = (torch.load(tmp_path / run / "state.pt", weights_only=True) for run in ("once", "often"))
    assert once["progress"]["stage"] == often["progress"]["stage"] == 3
    for name, weight in once["model"].items():
        assert weight.equal(often["model"][name]), name
    model, tokenizer = load_model(tmp_path / "often"), Tokenizer.from_dir(tmp_path / "often")
    assert model.dtype == torch.bfloat16 and tokenizer.vocab_size == model.config.text_config.vocab_size == 400
    with pytest.raises(ValueError, match="another recipe"):
        trainer(replace(TINY, seed=1), "once").run()


def test_training_learns(trainer, monkeypatch):
    """The losses of text and of sums fall by a third."""
    monkeypatch.setattr(train, "LOG_EVERY", 10)
    stage = Stage("text", 60, (5e-3, 0.0), 512, row=128, text=0.25, shares={"sum": 1.0}, factor=1.0, dropout=0.0)
    run = trainer(replace(TINY, stages=(stage,)))
    run.run()
    first, *_, last, bits = run.progress.log
    assert last["answers"] < first["answers"] / 1.5 and last["text"] < first["text"] / 1.1
    assert bits["bits_per_byte"] < 5.5


def test_the_tower_learns_what_patches_show(trainer, tmp_path, monkeypatch):
    """The loss falls by a quarter, and the projected features become as large as the embeddings."""
    monkeypatch.setattr(train, "LOG_EVERY", 5)
    stage = Stage("tower", 25, (1e-2, 1e-3), images=8)
    run = trainer(replace(TINY, stages=(stage,)))
    run.run()
    first, *_, last, _ = run.progress.log
    assert last["patches"] < 0.75 * first["patches"]
    model = load_model(tmp_path / "run", torch.float32)
    pixels = rows.pixel_values(torch.from_numpy(run.rows(stage, model)[0].images))
    with torch.no_grad():
        features = torch.cat(model.model.get_image_features(pixels))
        embeddings = model.model.language_model.embed_tokens.weight
    assert features.std().item() == pytest.approx(embeddings.std().item(), rel=0.05)


def test_the_schedule():
    stage = Stage("text", 1000, (5e-3, 1e-3))
    rates = [train.learning_rate(stage, step) for step in range(stage.steps)]
    assert rates[0] < rates[25] < rates[49] > rates[-1]
    assert rates[0] == pytest.approx(5e-3 / 50) and rates[-1] == pytest.approx(1e-3, rel=0.01)


def test_the_recipes_are_the_models_that_are_shipped():
    """The configurations in models/ are those of the recipes."""
    for recipe in (recipes.ministral3(), recipes.ministral()):
        stored = load_model(BUNDLED.parent / recipe.kind).config
        assert recipe.model(recipe.stages[-1]).config.to_dict() == stored.to_dict()


@pytest.mark.parametrize("shape", [(8, 8), (8, 30), (30, 8)])
def test_orthogonalize(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    (result,) = orthogonalize(matrix[None])
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.6 and values.max() < 1.3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    cosine = F.cosine_similarity(result.flatten(), (u @ v).flatten(), dim=0)
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


def test_muon_keeps_the_momentum_of_each_matrix():
    """Where another matrix of the same shape has no gradient in a step, as the projector has none without images."""
    gradients = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0))

    def after_three_steps(with_other):
        other, p = torch.zeros(4, 4, requires_grad=True), torch.zeros(4, 4, requires_grad=True)
        optimizer = Muon([other, p], lr=0.05)
        for gradient, has_other in zip(gradients, with_other):
            p.grad, other.grad = gradient.clone(), None
            if has_other:
                other.grad = torch.ones(4, 4)
            optimizer.step()
        return p.detach()

    alone = after_three_steps((False, False, False))
    torch.testing.assert_close(after_three_steps((True, False, True)), alone)


# ------------------------------------------------------------------------------------------------------ tasks


def texts_of(messages):
    """The words of the messages, in order."""
    return [evaluate.text_of(message) for message in messages]


@given(SEEDS, st.booleans())
def test_shakespeare_tasks_have_right_answers(plays, seed, test):
    draw = Draw(str(seed), plays[test], test)
    messages = tasks.who_speaks(draw)
    texts = texts_of(messages)
    passage = texts[0].rpartition("\n\n")[0]
    for question, answer, message in zip(texts[::2], texts[1::2], messages[1::2]):
        line = re.search('Who says "(.*)"', question)[1]
        (block,) = (block for block in passage.split("\n\n") if line in block)
        assert block.startswith(answer + "\n")
        thinking = message["content"][0]["thinking"]
        assert passage.startswith(thinking) and thinking.endswith(line)
    question, answer = texts_of(tasks.next_line(draw))
    passage, _, asked = question.rpartition("\n\n")
    line = re.search('follows "(.*)"', asked)[1]
    assert f"{line}\n{answer}" in passage and "\n\n" not in answer
    question, answer = texts_of(tasks.repeat(draw))
    assert question == f"Repeat: {answer}"


@given(SEEDS, st.booleans(), st.integers(0, 3000))
def test_recall_hides_each_key_once(plays, seed, test, size):
    draw = Draw(str(seed), plays[test], test)
    texts = texts_of(tasks.recall(draw, size))
    passage = texts[0].rpartition("\n\n")[0]
    assert abs(len(passage) - size) < 80 + 40 * (len(texts) // 2 + 1)
    for question, answer in zip(texts[::2], texts[1::2]):
        name = re.search("What is the key of (.*)[?]$", question)[1]
        assert re.findall(f"The key of {name} is .*", passage) == [answer]


@given(SEEDS, st.booleans())
def test_sums_are_worked_and_right(plays, seed, test):
    question, answer = tasks.addition(Draw(str(seed), plays[test], test))
    a, b = map(int, re.findall("[0-9]+", question["content"]))
    thinking, text = answer["content"]
    assert text["text"] == f"{a} + {b} = {a + b}."
    digits = ""
    for step in thinking["thinking"].split():
        left, total = step.split("=")
        assert sum(map(int, left.split("+"))) == int(total)
        digits = total[-1] + digits
    assert int(total[0] + digits) == a + b


@given(SEEDS, st.booleans(), st.sampled_from(sorted(tasks.TOOLS)))
def test_calls_have_the_arguments_of_the_question(plays, seed, test, name):
    made = evaluate.one_tool(name, Draw(str(seed), plays[test], test))
    question, called, result, answer = made.messages
    (function,) = evaluate.calls_of(called)
    for value in function["arguments"].values():
        assert re.search(rf"\b{value}\b", question["content"])
    (schema,) = (tool["function"] for tool in made.tools if tool["function"]["name"] == name)
    assert set(schema["parameters"]["required"]) == set(function["arguments"])
    assert name == "timer" or result["content"] in answer["content"]
    refused = tasks.call(Draw(str(seed), plays[test], test), name, ())
    assert evaluate.text_of(refused[-1]) == "I have no tool for that."


@given(SEEDS, st.sampled_from(("plain", "capitals", "word")))
def test_questions_about_images_have_right_answers(plays, seed, style):
    """Each answer follows from the shapes."""
    draw = Draw(str(seed), plays[False], style=style)
    drawn = shapes.draw_shapes(draw)
    question, answer = tasks.ask(draw, drawn)
    answer = answer.lower()
    if question.startswith("How many"):
        noun = question.removeprefix("How many ").removesuffix("s are there?")
        counted = [shape for shape in drawn if noun in ("shape", shape.kind, f"{shape.colour} shape")]
        assert tasks.NUMBERS[len(counted)] in answer.split()
    elif question.startswith("What colour"):
        (colour,) = (shape.colour for shape in drawn if f"the {shape.kind}?" in question)
        assert colour in answer
    elif question.startswith("Where"):
        (place,) = (shape.place for shape in drawn if shape.name in question)
        assert answer.endswith(f"{shapes.PLACES[place]}.")
    elif question.startswith("What is at"):
        here = [shape.kind for shape in drawn if shapes.PLACES[shape.place] in question]
        assert (here or ["nothing"])[0] in answer
    else:
        assert answer == f"{tasks.caption(drawn)}."
    if style == "word":
        assert " " not in answer


@given(SEEDS)
def test_images_show_the_shapes(plays, seed):
    """The middle of each place has the colour of its shape or the background, and so do the labels of the patches."""
    draw = Draw(str(seed), plays[False])
    drawn = shapes.draw_shapes(draw)
    image = shapes.paint(drawn, draw).astype(int)
    labels = shapes.patch_labels(drawn, image.astype(np.uint8), 16).reshape(4, 4)
    for place in range(4):
        top, left = place // 2 * 32, place % 2 * 32
        part = image[top : top + 32, left : left + 32].reshape(-1, 3)
        here = [shape for shape in drawn if shape.place == place]
        differs = np.abs(part - image[0, 0]).max(axis=1) > 60
        found = set(labels[top // 16 : top // 16 + 2, left // 16 : left // 16 + 2].flatten()) - {0}
        if not here:
            assert not differs.any() and not found
            continue
        assert 100 < differs.sum() < 800  # pixels
        middle = np.median(part[differs], axis=0)
        colours = {name: np.abs(middle - colour).max() for name, colour in shapes.COLOURS.items()}
        assert min(colours, key=colours.get) == here[0].colour and min(colours.values()) <= 16
        (label,) = found
        kind, colour = divmod(label - 1, len(shapes.COLOURS))
        assert (shapes.KINDS[kind], list(shapes.COLOURS)[colour]) == here[0][1:]


def test_training_and_test_share_no_question(plays):
    """2,000 values of each part: none is in both."""
    for make in (lambda d: d.fresh(lambda: d.randint(1000, 9999)), Draw.name, lambda d: str(d.fresh(d.free_word))):
        train_draw, test_draw = Draw("a", plays[False]), Draw("a", plays[True], test=True)
        trained = {make(train_draw) for _ in range(2000)}
        tested = {make(test_draw) for _ in range(2000)}
        assert trained and tested and not trained & tested


# ------------------------------------------------------------------------------------------------------- rows


@pytest.fixture(scope="module")
def stage_rows(plays):
    """Rows with all tasks, in the layout of the bundled model."""
    tokenizer = Tokenizer.from_dir(BUNDLED)
    stream = np.array(tokenizer.encode(plays[False].texts[0]))
    stage = Stage("vision", 20, (1e-3, 0.0), 4096, row=1024, text=0.25, shares=recipes.VISION, long_every=7)
    return Rows(stage, plays[False], stream, tokenizer, load_model(BUNDLED).config, seed=0)


def test_answers_are_what_is_learned(stage_rows):
    """The tokens of the kind ANSWER decode to the answers of the conversation, and everything else is ignored."""
    draw = Draw("a", stage_rows.plays)
    made = tasks.conversation(draw, recipes.VISION, 2000)
    messages = [*made.messages[:-1], {**made.messages[-1], "prefix": True}]
    ids, _ = rows.encode_prompt(messages, made.tools, stage_rows.tokenizer, stage_rows.config)
    tokens = np.array([*ids, stage_rows.end])
    kinds = stage_rows.kinds_of(tokens)
    learned = [[]]
    for token, kind in zip(tokens.tolist(), kinds.tolist()):
        if kind == ANSWER:
            learned[-1].append(token)
            if token == stage_rows.end:
                learned.append([])
    answers = [message for message in made.messages if message["role"] == "assistant"]
    decoded = [stage_rows.tokenizer.decode_chat(row) for row in learned[:-1]]
    assert len(answers) >= 3 and learned[-1] == []
    assert texts_of(decoded) == texts_of(answers)
    assert list(map(evaluate.calls_of, decoded)) == list(map(evaluate.calls_of, answers))


def test_rows_of_a_step(stage_rows):
    batch = stage_rows[3]
    assert batch.ids.shape == batch.kinds.shape == (4, 1024)
    assert (batch.kinds[0] == TEXT).all() and set(batch.kinds[1:].flatten()) == {IGNORED, ANSWER}
    image_token = stage_rows.tokenizer.special_tokens["[IMG]"]
    assert (batch.ids == image_token).sum() == len(batch.images) * (64 // 8 // 2) ** 2 > 0
    assert all(np.array_equal(a, b) for a, b in zip(batch, stage_rows[3]))
    assert not np.array_equal(batch.ids, stage_rows[4].ids)
    assert stage_rows[7].ids.shape == (2, 4096) and len(stage_rows[7].images) == 0


def test_an_epoch_of_text_has_each_part_once():
    stream = np.arange(1000)
    got = rows.text_rows(stream, 0, 1000 // 64 - 1, 64, "0 text")
    values = got.flatten()
    assert len(set(values.tolist())) >= 64 * 13 and (np.diff(got, axis=1) == 1).all()
    assert not np.array_equal(got, rows.text_rows(stream, 14, 14, 64, "0 text"))
    assert not np.array_equal(got, rows.text_rows(stream, 0, 1000 // 64 - 1, 64, "1 text"))


def test_pixel_values_are_those_of_preprocess():
    draw = Draw("a", Plays([], [], [], []))
    image = shapes.paint(shapes.draw_shapes(draw), draw)
    theirs = preprocess(Image.fromarray(image), load_model(BUNDLED).config)[None]
    torch.testing.assert_close(rows.pixel_values(torch.from_numpy(image)[None]), theirs, rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------------------------------- figures


def test_last_seen_copies_from_the_passage():
    passage = "HAMLET.\nTo be.\nThe key of Ann is 1.\n\nOPHELIA.\nThe key of Bob is 2.\nNo.\n\nWho says"
    item = evaluate.Item([{"role": "user", "content": passage}], None, {})
    found = {name: evaluate.last_seen(name, item) for name in ("speaker", "next line", "recall")}
    assert found == {"speaker": "OPHELIA.", "next line": "No.", "recall": "The key of Bob is 2."}


def test_answers_are_greedy_and_in_order(plays):
    """Questions of different lengths, answered together, have the answers that each has alone."""
    model, tokenizer = load_model(BUNDLED, torch.float32), Tokenizer.from_dir(BUNDLED)
    asked = [items[0] for items in evaluate.questions(plays[True], 1).values()][:6]
    together = evaluate.answers(model, tokenizer, asked)
    assert together == [evaluate.answers(model, tokenizer, [item])[0] for item in asked]
    assert evaluate.is_right(asked[0].answer, asked[0]) and not evaluate.is_right(asked[1].answer, asked[0])


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


@pytest.mark.slow
def test_the_ngram_model_orders_texts_as_it_should():
    texts = corpus.load()
    train_text, play = "".join(texts["train"][:8]), texts["validation"][0][:20_000]
    noise = np.random.default_rng(0).integers(33, 127, 20_000).astype(np.uint8).tobytes().decode()
    assert ngram_bits_per_byte(train_text, play) < 3.5 < 6 < ngram_bits_per_byte(train_text, noise)
    assert ngram_bits_per_byte(train_text + play, play) < ngram_bits_per_byte(train_text, play)


@pytest.mark.parametrize("name", ["ministral3", "ministral"])
def test_the_readme_states_what_was_measured(name):
    """The tables in models/NAME/README.md have the figures of its evaluation.json."""
    directory = BUNDLED.parent / name
    page = (directory / "README.md").read_text()
    stated = [[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in page.splitlines() if line[:1] == "|"]
    measured = json.loads((directory / "evaluation.json").read_text())
    bits = measured["bits_per_byte"]
    expected = []
    for row, kind in (("this model", "model"), ("Witten-Bell 5-gram", "5-gram")):
        expected.append([row, *(f"{bits[part][kind]:.3f}" for part in ("validation", "test"))])
    if name == "ministral":
        expected.append(["this model", *(f"{share:.2f}" for share in measured["distance"]["recall"])])
        twin = json.loads((directory / "evaluation_twin.json").read_text())
        expected.append(["twin", *(f"{share:.2f}" for share in twin["distance"]["recall"])])
    else:
        for task, figures in measured["tasks"].items():
            columns = [figures.get(column) for column in ("right", "majority", "last", "calls")]
            expected.append([task, *("" if figure is None else f"{figure:.2f}" for figure in columns)])
        for variant, curves in measured["context"].items():
            pairs = zip(curves["recall"], curves["bits_per_byte"])
            expected.append([variant, *(f"{recall:.2f} / {score:.3f}" for recall, score in pairs)])
    assert [row for row in expected if row not in stated] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ministral3", "ministral"])
def test_the_stated_bits_per_byte_are_true(name):
    """The bits per byte on the held-out plays that evaluation.json and models/NAME/README.md state, measured again."""
    directory = BUNDLED.parent / name
    stated = json.loads((directory / "evaluation.json").read_text())["bits_per_byte"]["test"]["model"]
    model, tokenizer = load_model(directory, torch.float32), Tokenizer.from_dir(directory)
    measured = bits_per_byte(model, tokenizer, corpus.load()["test"], 1024)
    assert measured == pytest.approx(stated, abs=0.001)


@pytest.mark.parametrize("name", ["sum", "recall", "image", "speaker", "tool multiply"])
def test_the_stated_results_are_true(plays, name):
    """24 questions of a task: as many right answers as evaluation.json says, within three standard errors."""
    stated = json.loads((BUNDLED / "evaluation.json").read_text())["tasks"][name]["right"]
    model, tokenizer = load_model(BUNDLED, torch.float32), Tokenizer.from_dir(BUNDLED)
    asked = evaluate.questions(plays[True], 24)[name]
    error = max(math.sqrt(stated * (1 - stated) / 24), 0.02)
    assert evaluate.share(model, tokenizer, asked) >= stated - 3 * error


def words_of(text):
    """The words of a text in lower case."""
    return re.findall(r"[a-z]+(?:'[a-z]+)*", text.lower())


def shipped_settings():
    """The sampling settings in the directory of the bundled model."""
    content = json.loads((BUNDLED / "generation_config.json").read_text())
    return {key: content[key] for key in ("temperature", "top_k", "top_p")}


def test_the_shipped_settings_are_read_by_transformers():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GenerationConfig.from_pretrained(BUNDLED)
    assert theirs.do_sample and {key: getattr(theirs, key) for key in shipped_settings()} == shipped_settings()
    config = load_model(BUNDLED).config.get_text_config()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(theirs, name) == getattr(config, name)


@pytest.mark.parametrize("name", ["ministral3", "ministral"])
def test_text_under_the_shipped_settings_does_not_loop(name):
    """Five texts of 120 tokens: no four words come three times in this order, and most words are words of the plays."""
    directory = BUNDLED.parent / name
    model, tokenizer = load_model(directory, torch.float32), Tokenizer.from_dir(directory)
    known = set(words_of("".join(corpus.load()["train"])))
    prompt = tokenizer.encode("To be, or not to be")
    texts = generate(model, torch.tensor([prompt] * 5), max_new_tokens=120, seed=[0, 1, 2, 3, 4])
    for row in texts[:, len(prompt) :].tolist():
        words = words_of(tokenizer.decode(row))
        grams = Counter(zip(words, words[1:], words[2:], words[3:]))
        assert max(grams.values()) < 3 and len(set(words)) > 0.45 * len(words)
        assert sum(word in known for word in words) > 0.93 * len(words)


@newer_torch  # which draws other numbers from a seed
def test_the_readme_shows_what_the_model_writes():
    """The output of the example in Python, drawn again in float32. (Noise of 1e-3 on all logits, a hundred times
    float32's error, changed nothing in 10 runs, so it does not depend on the processor. The recording of the commands
    is tested in test_miniature.py.)"""
    readme = (BUNDLED.parents[1] / "README.md").read_text()
    model, tokenizer = load_model(BUNDLED, torch.float32), Tokenizer.from_dir(BUNDLED)
    ((seed, text),) = re.findall(r"seed=(\d+)[^`]*```\n+```text\n(.*?)```", readme, re.DOTALL)
    ids = torch.tensor([tokenizer.encode(README_PROMPT)])
    tokens = generate(model, ids, max_new_tokens=200, seed=int(seed), **shipped_settings())
    assert text.startswith(README_PROMPT)
    assert tokenizer.decode(tokens[0].tolist()).startswith(text.rstrip("\n"))


def test_wrong_use_of_the_command_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "no.tar.gz").write_text("no archive")
    (tmp_path / "quick").mkdir()
    (tmp_path / "quick" / "state.pt").write_bytes(b"damaged")
    for arguments, message in (
        (["--device", "foo"], "device='foo' is not supported"),
        (["--output", ""], "--output '' is no directory; give one"),
        (["--output", str(tmp_path / "no.tar.gz")], "no.tar.gz' is no directory; give one"),
        (["evaluate", "--json", str(tmp_path / "none" / "x.json")], "x.json cannot be written"),
        (["--scale", "0"], "--scale 0 is not supported; supported: 1 and above"),
        (["--quick", "--scale", "2"], "--quick and --scale 2: "),
        (["evaluate", "--count", "0"], "--count 0 is not supported; supported: 1 and above"),
        (["corpus", str(tmp_path / "no.tar.gz")], "is damaged or no package"),
        (["--quick", "--output", str(tmp_path / "quick")], "state.pt is damaged (UnpicklingError); remove it"),
    ):
        monkeypatch.setattr("sys.argv", ["training", *arguments])
        assert training_command() == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
