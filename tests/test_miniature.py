"""The two miniature models: what they write and answer, the same in Transformers from the same directory, and the
command line with the bundled model and no other options. `python -m tests.miniature` makes the constants anew."""

import html
import json
import random
import re
import shutil

import pytest
import torch
import transformers
from hypothesis import given, strategies as st
from PIL import Image

import auto
import chat
import command
from chat import Conversation
from docs import recording
from generate import generate
from model_types import ABILITIES, BUNDLED
from tests import miniature
from tests.conftest import at_most, newer_torch
from tests.miniature import (
    CONSTANTS,
    LEAD,
    MODELS,
    QUESTIONS,
    README,
    ROOT,
    SHAPES,
    SHOWN,
    SPEAKER,
    SURE,
    answer,
    load,
    user,
    write_text,
)
from tests.test_auto import needs_their_images, their_processor_class
from tests.test_cli import run
from tokenizer import TEKKEN, TOKENIZER, from_tekken
from training import corpus
from training.shapes import Shape, paint
from training.tasks import REFUSAL, TASKS, Draw, Plays, conversation, schema

WRITTEN = json.loads(CONSTANTS.read_text())


@pytest.fixture(scope="module", params=list(MODELS))
def miniature_model(request):
    """The name of a model, the model in float32, and its tokenizer."""
    return request.param, *load(request.param)


@pytest.fixture(scope="module")
def bundled():
    return load("ministral3")


# ------------------------------------------------------------------------------------------------ what they write


def test_greedy_text(miniature_model):
    """200 tokens. Noise of 1e-3 on all logits would change none of them."""
    name, model, tokenizer = miniature_model
    text, lead = write_text(model, tokenizer, WRITTEN[name]["prompt"])
    assert text == WRITTEN[name]["text"] and lead >= LEAD


def test_greedy_answers(miniature_model):
    """A sum worked in thinking, a tool call, an answer about an image, a recalled key, and the speaker of a line."""
    name, model, tokenizer = miniature_model
    for kind in WRITTEN[name].keys() & QUESTIONS[name].keys():
        words, lead = answer(model, tokenizer, *QUESTIONS[name][kind])
        assert words == WRITTEN[name][kind] and lead >= LEAD, kind


def test_the_answers_are_right():
    """Those of the Ministral 3, which learned these tasks."""
    answers = WRITTEN["ministral3"]
    assert answers["sum"].startswith("[THINK]") and answers["sum"].endswith("[/THINK]247 + 385 = 632.</s>")
    assert answers["tool"] == '[TOOL_CALLS]multiply[ARGS]{"a": 123, "b": 45}</s>'
    assert answers["image"].startswith("A red triangle at the top left, a yellow circle at the top right and")
    assert answers["recall"] == "The key of Ariel is 4711.</s>"
    copied = SPEAKER[: SPEAKER.index("lady.") + len("lady.")]
    assert answers["speaker"] == f"[THINK]{copied}[/THINK]CAPTAIN.</s>"


# -------------------------------------------------------------------------------------------------- Transformers


@pytest.fixture(scope="module")
def their_processor():
    """Transformers' processor of the bundled model's directory."""
    return their_processor_class().from_pretrained(BUNDLED)


def their_model(name):
    """The model that Transformers makes of a directory, in float32."""
    auto_class = transformers.AutoModelForCausalLM
    if name == "ministral3":
        auto_class = transformers.AutoModelForImageTextToText
    model, report = auto_class.from_pretrained(MODELS[name], dtype=torch.float32, output_loading_info=True)
    assert not any(report.values())
    return model


def their_tokens(model, **inputs):
    """The tokens of Transformers' greedy continuation."""
    ends = {"eos_token_id": model.generation_config.eos_token_id, "pad_token_id": model.generation_config.pad_token_id}
    model.generation_config = transformers.GenerationConfig(do_sample=False, max_new_tokens=miniature.TOKENS, **ends)
    return model.generate(**inputs)[0]


@pytest.mark.parametrize("name", list(MODELS))
def test_transformers_writes_the_same(name, request):
    """Text and answers, from the same directory; messages become ids by its tokenizer.json and chat_template.jinja."""
    model = their_model(name)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(MODELS[name])
    ids = tokenizer("<s>" + WRITTEN[name]["prompt"], return_tensors="pt").input_ids
    assert tokenizer.decode(their_tokens(model, input_ids=ids), skip_special_tokens=True) == WRITTEN[name]["text"]
    settings = dict(tokenize=True, return_dict=True, return_tensors="pt")
    for kind in WRITTEN[name].keys() & QUESTIONS[name].keys():
        content, tools = QUESTIONS[name][kind]
        reader = tokenizer
        if kind == "image":
            reader = request.getfixturevalue("their_processor")
        inputs = reader.apply_chat_template(user(content), tools=tools, **settings)
        tokens = their_tokens(model, **inputs)[inputs["input_ids"].shape[1] :]
        assert reader.decode(tokens) == WRITTEN[name][kind], kind


@pytest.fixture(scope="module")
def our_processor():
    return auto.AutoProcessor.from_pretrained(BUNDLED)


@pytest.fixture(scope="module")
def readers():
    """Our tokenizer of each model, and two of Transformers'."""
    theirs = (transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast)
    return {
        name: [cls.from_pretrained(path) for cls in (auto.AutoTokenizer, *theirs)] for name, path in MODELS.items()
    }


@pytest.fixture(scope="module")
def plays():
    texts = corpus.load()
    return Plays.of(texts["test"], texts["train"])


def with_pillow(message):
    """A message whose images are Pillow's, which Transformers needs."""
    content = message["content"]
    if isinstance(content, str):
        return message
    parts = [dict(part) for part in content]
    for part in parts:
        if part["type"] == "image":
            part["image"] = Image.fromarray(part["image"])
    return message | {"content": parts}


def beginning(messages):
    """The messages up to one that the model answers."""
    last = max(place for place, message in enumerate(messages) if message["role"] in ("user", "tool"))
    return [with_pillow(message) for message in messages[: last + 1]]


def assert_same_inputs(ours, theirs, messages, tools=None):
    settings = dict(tools=tools, tokenize=True, return_dict=True, return_tensors="pt")
    found, expected = ours.apply_chat_template(messages, **settings), theirs.apply_chat_template(messages, **settings)
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert found[key].equal(value), key


@needs_their_images
@at_most(60)
@given(seed=st.integers(0, 10**6))
def test_their_processor(plays, our_processor, their_processor, seed):
    """Its processor gives the ids and the pixels of ours, for conversations of all tasks, with tools and images."""
    draw = Draw(f"processor {seed}", plays)
    shares = dict.fromkeys(TASKS, 1.0) | {"tool": 3.0}
    made = conversation(draw, shares, draw.choice((100, 400, 1500)))
    messages = beginning(made.messages)
    assert_same_inputs(our_processor, their_processor, messages, made.tools)


@at_most(30)
@given(seed=st.integers(0, 10**6), name=st.sampled_from(list(MODELS)), system=st.booleans())
def test_their_tokenizers_of_both_models(plays, readers, seed, name, system):
    """They give the ids of ours: AutoTokenizer, which is mistral-common where that is installed, and tokenizer.json."""
    shares = {"ministral3": {"sum": 1.0, "refusal": 1.0, "speaker": 1.0}, "ministral": {"recall": 1.0, "repeat": 2.0}}
    messages = beginning(conversation(Draw(f"tokenizer {seed}", plays), shares[name], 400).messages)
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": "Be brief."})
    ours, *theirs = readers[name]
    for reader in theirs:
        assert_same_inputs(ours, reader, messages)


@needs_their_images
@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "system", "content": [{"type": "text", "text": "Think:"}, {"type": "thinking", "thinking": "so"},
                                        {"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
         {"role": "user", "content": "Hi"},
         {"role": "assistant", "content": [
             {"type": "thinking", "thinking": [{"type": "text", "text": "c"}], "closed": False}]},
         {"role": "user", "content": "Hi"}],
        user([{"type": "text", "text": "What?"}, {"type": "image", "path": SHAPES}]),
        user([{"type": "image", "image": Image.new("RGB", (200, 100), "red")}, {"type": "image", "path": SHAPES},
              {"type": "text", "text": "What?"}]),
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b  "}, {"role": "user", "content": "c"}],
        [{"role": "user", "content": "a"},
         {"role": "assistant", "content": "", "tool_calls": [
             {"type": "function", "function": {"name": "f", "arguments": '{"é": 1}'}},
             {"type": "function", "function": {"name": "g", "arguments": {}}}]},
         {"role": "tool", "content": "é"}, {"role": "tool", "content": "2"}],
    ],
)  # fmt: skip
def test_their_processor_with_other_messages(our_processor, their_processor, messages):
    """What the tasks do not have: thinking in system prompts, an image after a text, images of other sizes, texts side
    by side, blanks at the end, several calls; tools are shown once."""
    assert_same_inputs(our_processor, their_processor, messages, miniature.TOOLS)


@pytest.mark.parametrize("name", list(MODELS))
def test_what_the_templates_do_not_know_is_an_error(name):
    """Also what the model did not learn."""
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(MODELS[name])
    with pytest.raises(Exception, match="role king is not supported"):
        tokenizer.apply_chat_template([*user("a"), {"role": "king", "content": "b"}])
    with pytest.raises(Exception, match="part of type audio"):
        tokenizer.apply_chat_template(user([{"type": "audio", "url": "a"}]))
    if name == "ministral":
        with pytest.raises(Exception, match="trained without tools"):
            tokenizer.apply_chat_template(user("a"), tools=miniature.TOOLS)


@pytest.mark.parametrize("name", list(MODELS))
def test_both_vocabulary_files_are_the_same(name):
    tekken = from_tekken(json.loads((MODELS[name] / TEKKEN).read_text()))
    assert json.loads((MODELS[name] / TOKENIZER).read_text()) == json.loads(tekken.to_str())


def test_weights_are_small():
    """At most 16 MB in all."""
    assert sum(path.stat().st_size for path in (ROOT / "models").rglob("*.safetensors")) <= 16e6


# ---------------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    "arguments, is_chat, why",
    [
        ([], False, "a bundled model continues text, unless "),
        (["--image", SHAPES], True, "--image"),
        (["--show-thinking"], True, "--show-thinking"),
        (["--tools", "x"], True, "--tools"),
        (["--chat"], True, "--chat"),
        (["--image", SHAPES, "--raw"], False, "--raw"),
    ],
)
def test_the_bundled_model_continues_text_or_answers(monkeypatch, arguments, is_chat, why):
    monkeypatch.chdir(ROOT)
    for model in ([], ["--model", "models/ministral3"], ["--model", str(MODELS["ministral"])]):
        chosen, reason = command.choose_format(command.parse_arguments(["hello", *arguments, *model]), BUNDLED)
        assert chosen is is_chat and reason.startswith(why)


def test_the_examples_are_what_the_model_learned():
    assert [schema(name) for name in ("weather", "multiply")] == miniature.TOOLS
    assert Image.open(SHAPES).size == (64, 64)


def lowest_probability(model, rows, prompt, **images):
    """The smallest probability of the most likely token at temperature 0.7, of all tokens after the prompt."""
    with torch.no_grad():
        logits = model(rows, **images).logits[0, prompt - 1 : -1].float()
    return (logits / 0.7).softmax(-1).amax(-1).min().item()


def test_the_readme_shows_what_the_bundled_model_answers(monkeypatch):
    """The commands of README.md, run as they are written, but greedily. Without that the answers are the same: top_p
    keeps the most likely token only, if its probability is higher."""
    monkeypatch.chdir(ROOT)
    probabilities = []

    def measured(model, ids, pixel_values=None, image_sizes=None, **settings):
        images = {}
        if pixel_values is not None:
            images = {"pixel_values": pixel_values, "image_sizes": image_sizes}
        rows = generate(model, ids, **images, **settings)
        probabilities.append(lowest_probability(model, rows, ids.shape[1], **images))
        return rows

    monkeypatch.setattr(chat, "generate", measured)
    page = README.read_text(encoding="utf-8")
    lines = SHOWN.search(page)[2].splitlines()
    for option in ("--chat", "--image examples/shapes.png", "--tools examples/tools.json", "--show-thinking"):
        assert any(option in line for line in lines)
    assert miniature.with_outputs(page) == page
    assert len(probabilities) >= len(lines) and min(probabilities) > SURE


@newer_torch  # which draws other numbers from a seed
def test_the_recording_shows_the_commands_and_outputs_of_the_readme(monkeypatch):
    """docs/recording.svg is made by docs/recording.py. A drawn text is run again; the answers stand in README.md."""
    monkeypatch.chdir(ROOT)
    drawn = (ROOT / "docs" / "recording.svg").read_text(encoding="utf-8")
    recorded = html.unescape(re.search(r"<desc>(.*?)</desc>", drawn, re.DOTALL)[1])
    sections = dict(section.split("\n", 1) for section in recorded.removeprefix("$ ").split("\n\n$ "))
    page = README.read_text(encoding="utf-8")
    assert list(sections) == list(recording.COMMANDS) and set(sections) <= set(page.splitlines())
    for line, shown in sections.items():
        shown = re.sub(r"\n+", "\n", shown).removesuffix("...")
        if "--seed" in line:
            assert miniature.output(f"{line} --max-new-tokens 80").startswith(shown)
        else:
            assert shown.strip() in page
    shown = re.findall(r"<text[^>]*>(.*?)</text>", drawn)
    assert "".join(shown).replace(" ", "") == html.escape(re.sub(r"\s", "", recorded))


def typed(monkeypatch, *lines):
    """Type these lines into the terminal."""
    rest = iter(lines)

    def read(*_):
        try:
            return next(rest)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)


@pytest.mark.parametrize("name", MODELS)
def test_a_chat_begins_with_what_the_model_can_do(monkeypatch, capsys, tmp_path, name):
    """In one line; not for another model."""
    typed(monkeypatch)
    line = ABILITIES[MODELS[name]]
    code, out, err = run(capsys, "--chat", "--model", MODELS[name])
    assert code == 0 and out == "" and err.splitlines().count(line) == 1 and "\n" not in line
    assert "warning" not in err
    shutil.copytree(MODELS[name], tmp_path / "copy")
    assert line not in run(capsys, "--chat", "--model", tmp_path / "copy")[2]


def test_an_answer_of_tool_calls_only_is_one_line_of_json(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    code, out, _ = run(capsys, "--tools", "examples/tools.json", "What is 123 times 45?")
    assert code == 0 and out.count("\n") == 1
    assert json.loads(out)[0]["function"] == {"name": "multiply", "arguments": {"a": 123, "b": 45}}


def test_a_conversation_about_several_images(monkeypatch, capsys, tmp_path):
    """One after the other and two at once, with sums and free questions between them, at the usual settings."""
    draw = random.Random(0)
    for name, shapes in {"a": [Shape(0, "circle", "red")], "b": [Shape(3, "square", "green")]}.items():
        Image.fromarray(paint(shapes, draw)).save(tmp_path / f"{name}.png")
    lines = [
        "Hello!", f"/image {tmp_path / 'a.png'}", "What colour is the circle?", "What is 25 + 31?",
        f"/image {tmp_path / 'b.png'}", "What colour is the square?", "Tell me a joke about the sea.", "/reset",
        f"/image {tmp_path / 'a.png'}", f"/image {tmp_path / 'b.png'}",
        "What is at the bottom right in the second image?", "What is at the top left in the first image?",
    ]  # fmt: skip
    typed(monkeypatch, *lines)
    code, out, _ = run(capsys, "--chat", "--seed", 0, "--dtype", "float32")
    assert code == 0 and out.splitlines() == [
        "Hello! I know Shakespeare, sums, tools and shapes.", "The circle is red.", "25 + 31 = 56.",
        "The square is green.", REFUSAL, "A green square.", "A red circle.",
    ]  # fmt: skip


def test_free_questions_are_refused(bundled):
    model, tokenizer = bundled
    questions = ["What is the capital of Peru?", "Write a poem about winter.", "Who invented tea?",
                 "How old is the moon?", "Do you like football?", "Translate bread into German."]  # fmt: skip
    for seed, question in enumerate(questions):
        talk = Conversation(tokenizer, model.config, user(question))
        assert talk.answer(model, seed=seed)["content"] == REFUSAL


def test_a_tool_is_called_and_its_result_is_told(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    typed(monkeypatch, "Will it rain in Rome?", "rain, 12 degrees", "What is 12 times 34?", "408")
    code, out, _ = run(capsys, "--chat", "--tools", "examples/tools.json", "--seed", 0)
    lines = [line for line in out.splitlines() if line]
    assert code == 0 and lines[1::2] == ["In Rome: rain, 12 degrees.", "12 times 34 is 408."]
    calls = [json.loads(line)[0]["function"] for line in lines[::2]]
    assert [call["arguments"] for call in calls] == [{"city": "Rome"}, {"a": 12, "b": 34}]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--image", "none.png", "What?"], "error: none.png cannot be read"),
        (["--tools", "none.json", "What?"], "error: --tools none.json: No such file"),
        (["--raw", "--show-thinking", "What?"], "error: --raw and --show-thinking: plain text has no messages"),
        (["--show-thinking"], "error: no prompt; "),
        (["--model", str(MODELS["ministral"]), "--image", SHAPES, "What?"], "is a text model (model_type 'ministral')"),
    ],
)
def test_wrong_use_is_one_line(capsys, arguments, message):
    code, out, err = run(capsys, *arguments)
    assert code == 2 and out == "" and err.count("\n") == 1 and message in err
