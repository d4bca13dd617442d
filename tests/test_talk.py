"""Conversations with a model: the stored cache changes no answer. The chat of the command line."""

import copy
import datetime
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st
from PIL import Image

import chat
import command
import generate
import images
import terminal
from chat import Conversation
from checkpoint import GenerationConfig
from command import choose_format, choose_sampling, parse_arguments
from ministral import KVCache, MinistralConfig, MinistralForCausalLM
from ministral3 import Ministral3ForCausalLM
from model_types import BUNDLED
from tests.cases import draw_case, draw_chunks
from tests.conftest import at_most
from tests.test_cli import COMMAND, run
from tokenizer import Tokenizer
from vision import Mistral3Config, Mistral3ForConditionalGeneration, PixtralVisionConfig, PixtralVisionModel

rngs = st.randoms(use_true_random=False)
TEMPLATE = "has a chat template (--raw continues text)"
UNKNOWN = "the model continues the prompt; neither its name nor its files tell of chats (--chat tries one)"


@pytest.fixture(scope="module")
def tokenizer():
    """The bundled vocabulary, which has the special tokens of Ministral 3, in its layout."""
    return Tokenizer.from_dir(BUNDLED)


def draw_image(rng):
    return Image.new("RGB", (rng.choice([8, 20]), 12), rng.choice(["red", "navy", "white"]))


def tiny(kind, rng):
    """A random model for the vocabulary above: "full", "window" (of 5), "vision", or "vision and window"."""
    torch.manual_seed(rng.randrange(2**31))
    sizes = dict(vocab_size=2304, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                 num_key_value_heads=1, head_dim=16, max_position_embeddings=4096, initializer_range=0.3)  # fmt: skip
    if "vision" in kind:
        vision_config = PixtralVisionConfig(16, 16, 2, 2, image_size=64, patch_size=4, initializer_range=0.3)
        text = sizes | {"model_type": "ministral3", "tie_word_embeddings": False}
        text |= {"sliding_window": 5 if "window" in kind else None}
        return Mistral3ForConditionalGeneration(Mistral3Config(vision_config, text)).double().eval()
    window = 5 if kind == "window" else None
    kinds = ["full_attention", "sliding_attention"] if window else None
    return MinistralForCausalLM(MinistralConfig(**sizes, sliding_window=window, layer_types=kinds)).double().eval()


# ------------------------------------------------------------------------------------------------ conversations


@torch.no_grad()
@at_most(100)
@given(rngs)
def test_a_cropped_cache_is_the_cache_of_the_shorter_text(rng):
    """In float64. If a window is full, cropping is refused and changes nothing."""
    case = draw_case(rng)
    model, S = case.truth(), case.ids.shape[1]
    cache, start = KVCache(model.config), 0
    for length in case.chunks:
        model(case.ids[:, start : start + length], past_key_values=cache)
        start += length
    shorter = rng.randint(0, S)
    other = torch.cat((case.ids[:, :shorter], torch.randint(1, 50, (len(case.ids), 12))), 1)
    for impossible in (-1, S + 1):
        with pytest.raises(ValueError, match=f"max_length={impossible} is impossible; allowed: 0 to {S}"):
            cache.crop(impossible)
    wrapped = any(layer.window is not None and layer.window < S for layer in cache.layers)
    if wrapped and shorter < S:
        with pytest.raises(ValueError, match="a window that is full cannot be cropped"):
            cache.crop(shorter)
        shorter, other = S, torch.cat((case.ids, other[:, -12:]), 1)
    else:
        cache.crop(shorter)
    assert cache.get_seq_length() == shorter
    logits = torch.cat([model(chunk, past_key_values=cache).logits for chunk in other[:, shorter:].split(
        draw_chunks(rng, other.shape[1] - shorter), 1)], 1)  # fmt: skip
    expected = model(other).logits[:, shorter:]
    assert (logits - expected).abs().max() < 1e-11 * expected.abs().max()


@torch.no_grad()
@given(rngs, st.sampled_from(["full", "window", "vision", "vision and window"]))
def test_a_stored_cache_changes_no_answer(tokenizer, rng, kind):
    """In every turn, also after messages were changed, the answer is that of a conversation without a cache. Tokens in
    the cache are not computed again."""
    model, read = tiny(kind, rng), []
    conversation = Conversation(tokenizer, model.config, [])
    model.register_forward_pre_hook(
        lambda _, __, named: read.append(named.get("input_ids", named.get("inputs_embeds")).shape[1]), with_kwargs=True
    )
    for turn in range(4):
        content = [{"type": "text", "text": rng.choice(["To be?", "Speak, speak.", "No.", "[INST]"])}]
        if "vision" in kind and rng.random() < 0.5:
            content.insert(0, {"type": "image", "image": draw_image(rng)})
        conversation.messages.append({"role": "user", "content": content})
        edit = rng.choice(["", "", "text", "image", "fail"]) if turn else ""
        if edit == "text":
            conversation.messages[0] = {"role": "user", "content": "Begin anew!"}
        for part in [part for m in conversation.messages[:-1] if m["role"] == "user" and isinstance(m["content"], list)
                     for part in m["content"] if part["type"] == "image" and edit == "image"][:1]:  # fmt: skip
            part["image"] = draw_image(rng)  # of the same size as the old one, or another
        if edit == "fail":  # broken off in the middle
            with pytest.raises(KeyboardInterrupt):
                conversation.answer(model, on_token=lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        fresh = Conversation(tokenizer, model.config, copy.deepcopy(conversation.messages))
        settings = dict(max_new_tokens=rng.randint(1, 8), eos_token_id=())
        expected, cached_ids = fresh.answer(model, **settings), list(conversation._cached_ids)
        ids, _ = conversation.encode()
        read.clear()
        assert conversation.answer(model, **settings) == expected
        assert conversation.messages == fresh.messages
        prompt = sum(read) - (settings["max_new_tokens"] - 1)
        if not edit and ids[: len(cached_ids)] == cached_ids:
            assert prompt == len(ids) - len(cached_ids)


def test_an_image_is_loaded_and_encoded_once(tokenizer, tmp_path, monkeypatch):
    Image.new("RGB", (20, 20), "red").save(tmp_path / "a.png")
    model, loaded, encoded = tiny("vision", random.Random(0)), [], []
    load, forward = images.load_image, PixtralVisionModel.forward
    monkeypatch.setattr(images, "load_image", lambda source: loaded.append(source) or load(source))
    monkeypatch.setattr(PixtralVisionModel, "forward", lambda self, pixels, *rest, **more:
                        encoded.append(len(pixels)) or forward(self, pixels, *rest, **more))  # fmt: skip
    conversation = Conversation(tokenizer, model.config, [])
    for turn in range(3):
        content = [{"type": "image", "image": str(tmp_path / "a.png")}] * (turn != 1)
        conversation.messages.append({"role": "user", "content": [*content, {"type": "text", "text": "What?"}]})
        conversation.answer(model, max_new_tokens=3, eos_token_id=())
    assert loaded == [str(tmp_path / "a.png")] and encoded == [1, 1]


def scripted(monkeypatch, *answers):
    """Let the model generate these ids, one list for each answer. KeyboardInterrupt stands for pressing Ctrl-C twice.
    Returns a list to which the images of each answer are appended."""
    remaining, seen = iter(answers), []

    def fake(model, input_ids, on_token=None, pixel_values=None, **_):
        seen.append([] if pixel_values is None else [*pixel_values])
        ids = next(remaining)
        if ids is KeyboardInterrupt:
            raise ids
        for i in ids:
            if on_token and on_token(0, i):
                break
        return torch.tensor([input_ids[0].tolist() + ids])

    monkeypatch.setattr(chat, "generate", fake)
    return seen


def test_a_prefix_becomes_the_beginning_of_the_answer(tokenizer, monkeypatch):
    encode, names = (lambda text: tokenizer.encode(text, bos=False)), tokenizer.special_tokens
    text, think = (lambda t: {"type": "text", "text": t}), (lambda t, closed: {"type": "thinking", "thinking": t,
                                                                               "closed": closed})  # fmt: skip
    model = tiny("full", random.Random(0))
    for prefix, ids, content in (
        ("To be", encode(" or not"), "To be or not"),
        ([think("a", False)], [*encode("b"), names["[/THINK]"], *encode("c")], [think("ab", True), text("c")]),
        ([think("a", True)], encode("c"), [think("a", True), text("c")]),
        ([think("a", True), text("b")], encode("c"), [think("a", True), text("bc")]),
        ([think([text("a")], False)], encode("b"), [think("ab", False)]),
    ):
        user = {"role": "user", "content": "Speak"}
        beginning = {"role": "assistant", "content": prefix, "prefix": True}
        conversation = Conversation(tokenizer, model.config, [user, beginning])
        scripted(monkeypatch, [*ids, 2])
        assert conversation.answer(model)["content"] == content
        assert conversation.messages == [user, {"role": "assistant", "content": content}]
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    prefix = {"role": "assistant", "content": None, "tool_calls": [call], "prefix": True}
    scripted(monkeypatch, [2])
    conversation = Conversation(tokenizer, model.config, [user, prefix])
    assert conversation.answer(model)["tool_calls"] == [call] and conversation.messages[-1]["tool_calls"] == [call]
    for key in ("reasoning", "reasoning_content"):
        prefix = {"role": "assistant", "content": "c", key: "t", "prefix": True}
        scripted(monkeypatch, [*encode("d"), 2])
        conversation = Conversation(tokenizer, model.config, [user, prefix])
        content = [think("t", True), text("cd")]
        assert conversation.answer(model)["content"] == content == conversation.messages[-1]["content"]
    scripted(monkeypatch, [2])
    conversation = Conversation(tokenizer, model.config, [user])
    assert conversation.answer(model)["content"] == "" and conversation.messages == [user]  # an empty answer


def test_malformed_calls_are_words_in_the_history(tokenizer, monkeypatch):
    """In an answer, and in one that continues a prefix."""
    encode, names = (lambda text: tokenizer.encode(text, bos=False)), tokenizer.special_tokens
    user = {"role": "user", "content": "Speak"}
    malformed = [names["[TOOL_CALLS]"], *encode("f{")]
    conversation = Conversation(tokenizer, tiny("full", random.Random(0)).config, [user])
    scripted(monkeypatch, [*encode("Well"), *malformed, 2], [*encode("!"), *malformed, 2])
    model = tiny("full", random.Random(0))
    assert conversation.answer(model)["malformed_calls"] == conversation.messages[-1]["malformed_calls"]
    conversation.messages.append(user)
    start = tokenizer.encode_chat([user])
    assert conversation.encode()[0] == [*start, *encode("Well"), *encode("[TOOL_CALLS]f{"), 2, *start[1:]]
    conversation.messages[1:] = [conversation.messages[1] | {"prefix": True}]
    assert [call["text"] for call in conversation.answer(model)["malformed_calls"]] == ["[TOOL_CALLS]f{"] * 2


def test_an_answer_is_a_message_whatever_generate_returns(tokenizer):
    model, user = tiny("full", random.Random(0)), {"role": "user", "content": "Speak"}
    answers = []
    for as_dict in (False, True):
        model.generation_config.return_dict_in_generate = as_dict
        answers.append(Conversation(tokenizer, model.config, [user]).answer(model, max_new_tokens=5))
    assert answers[0]["content"] and answers[0] == answers[1]


def test_an_empty_answer_is_no_message(tokenizer, monkeypatch):
    model, user = tiny("full", random.Random(0)), {"role": "user", "content": "Speak"}
    scripted(monkeypatch, [2])
    conversation = Conversation(tokenizer, model.config, [user])
    assert conversation.answer(model)["content"] == "" and conversation.messages == [user]  # an empty answer


def test_a_cache_must_leave_a_token_to_read():
    model, cache = tiny("full", random.Random(0)), KVCache(tiny("full", random.Random(0)).config)
    ids = torch.tensor([[1, 30, 31, 32]])
    whole = generate.generate(model, ids, max_new_tokens=5, eos_token_id=(), past_key_values=cache)
    assert cache.get_seq_length() == 8
    with pytest.raises(ValueError, match="past_key_values holds 8 tokens, the prompt has 4; the prompt must"):
        generate.generate(model, ids, past_key_values=cache)
    cache.crop(2)
    assert generate.generate(model, ids, max_new_tokens=5, eos_token_id=(), past_key_values=cache).equal(whole)


# ------------------------------------------------------------------------------------------------ command line


@pytest.fixture(scope="module")
def instruct(tmp_path_factory):
    """The text model of the bundled model under the name of an instruct model, with its V13 tokenizer and without
    sampling settings."""
    path = tmp_path_factory.mktemp("models") / "Tiny-Instruct"
    model = Ministral3ForCausalLM.from_pretrained(BUNDLED)
    model.generation_config = None
    model.save_pretrained(path)
    shutil.copy(BUNDLED / "tekken.json", path)
    return path


TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize(
    "name, files, arguments, chat, why",
    [
        ("Ministral-3-3B-Instruct-2512", [], [], True, "the name says instruct"),
        ("ministral-3-14b-reasoning-2512-bf16", [], [], True, "the name says reasoning"),
        ("Ministral-3-8B-Base-2512", ["chat_template.jinja"], [], False, "the name says base"),
        ("Instruct-made-from-Base", [], [], False, "the name says base"),
        ("mine", ["chat_template.jinja"], [], True, f"chat_template.jinja {TEMPLATE}"),
        ("mine", ["tokenizer_config.json"], [], True, f"tokenizer_config.json {TEMPLATE}"),
        ("mine", ["SYSTEM_PROMPT.txt"], [], True, "SYSTEM_PROMPT.txt is there"),
        ("mine", [], [], False, UNKNOWN),
        ("Instruct", [], ["--raw"], False, "--raw"),
        ("mine", [], ["--system", "x"], True, "--system"),
        ("Base", [], ["--chat"], True, "--chat"),
        ("Base", [], ["--messages", "x"], True, "--messages"),
        ("Base", [], ["--show-thinking"], True, "--show-thinking"),
    ],
)
def test_how_the_format_is_chosen(tmp_path, name, files, arguments, chat, why):
    (tmp_path / name).mkdir()
    for file in files:
        (tmp_path / name / file).write_text('{"chat_template": "[INST]"}')
    options = parse_arguments(["hello", "--model", str(tmp_path / name), *arguments])
    assert choose_format(options, tmp_path / name) == (chat, why)
    (tmp_path / "0123abc").mkdir()  # a Hub id counts by its own name
    options = parse_arguments(["hello", "--model", f"mistralai/{name}", *arguments])
    assert choose_format(options, tmp_path / "0123abc")[0] == (chat and not files)


@pytest.mark.parametrize("name", ["Tiny-Instruct", "mine"])
@pytest.mark.parametrize("arguments", [["To be?"], ["--chat"], ["To be?", "--system", "x"]])
def test_another_chat_layout_is_refused(capsys, instruct, tmp_path, name, arguments):
    """In one line with the reason and the cure. As plain text the prompt is continued."""
    shutil.copytree(instruct, path := tmp_path / name)
    (path / "chat_template.jinja").write_text("<|im_start|>{{ messages[0].content }}<|im_end|>")
    code, out, err = run(capsys, "--model", path, "--max-new-tokens", 1, *arguments)
    assert code == 2 and out == "" and err.count("\n") == 1
    file = path / "chat_template.jinja"
    assert err.startswith(f"error: the chat template in {file} has no [INST], but <|im_start|>")
    assert "Plain text works (--raw" in err
    result, err = answer(capsys, "To be?", "--model", path, "--raw")
    assert err[0] == "plain text: --raw" and result["prompt_ids"] == Tokenizer.from_dir(path).encode("To be?")


def test_advice_for_sampling():
    def chosen(kind, *arguments):
        sampling, budget, _ = choose_sampling(parse_arguments(["x", *arguments]), kind, GenerationConfig())
        return sampling.temperature, sampling.top_p, budget

    assert chosen("instruct") == (0.15, None, 16384) and chosen("reasoning") == (0.7, 0.95, 32768)
    assert chosen("text") == (0.8, None, 200) and chosen("chat") == (0.8, None, 16384)
    assert chosen("reasoning", "--temperature", "0.3") == (0.3, None, 32768)
    assert chosen("reasoning", "--top-p", "0.5", "--max-new-tokens", "7") == (0.7, 0.5, 7)


@pytest.mark.parametrize("prompt, arguments", [(None, []), ("Think:[THINK]so[/THINK]", ["--system", ""])])
def test_a_reasoning_model_is_recognised_by_its_name(capsys, instruct, tmp_path, prompt, arguments):
    """Also without the system prompt for thinking."""
    shutil.copytree(instruct, path := tmp_path / "Tiny-Reasoning")
    if prompt:
        (path / "SYSTEM_PROMPT.txt").write_text(prompt)
    result, _ = answer(capsys, "To be?", "--model", path, *arguments)
    assert result["prompt_ids"] == Tokenizer.from_dir(path).encode_chat([{"role": "user", "content": "To be?"}])
    assert (result["settings"]["temperature"], result["settings"]["top_p"]) == (0.7, 0.95)


def answer(capsys, *arguments):
    """The JSON result and the lines on standard error."""
    code, out, err = run(capsys, "--max-new-tokens", 4, "--seed", 1, "--json", *arguments)
    assert code == 0, err
    return json.loads(out), err.splitlines()


def test_an_instruct_model_is_asked_in_the_chat_format(capsys, instruct):
    result, err = answer(capsys, "To be?", "--model", instruct)
    ours = Tokenizer.from_dir(instruct)
    assert result["prompt_ids"] == ours.encode_chat([{"role": "user", "content": "To be?"}])
    assert err[0] == "chat format v13: the name says instruct"
    assert result["message"] == ours.decode_chat(result["ids"])
    assert result["settings"]["temperature"] == 0.15 and result["settings"]["top_p"] is None
    raw, err = answer(capsys, "To be?", "--model", instruct, "--raw")
    assert raw["prompt_ids"] == ours.encode("To be?") and err[0] == "plain text: --raw" and "message" not in raw
    assert raw["settings"]["temperature"] == 0.8


def test_system_messages_and_tools(capsys, instruct, tmp_path):
    ours = Tokenizer.from_dir(instruct)
    user = {"role": "user", "content": "To be?"}
    arguments = ["To be?", "--model", instruct]
    result, _ = answer(capsys, *arguments, "--system", "Be [THINK]brief[/THINK].")
    assert result["prompt_ids"] == ours.encode_chat([{"role": "system", "content": "Be [THINK]brief[/THINK]."}, user])
    assert result["settings"]["temperature"] == 0.15
    (file := tmp_path / "system.txt").write_text("You are {name}, {today} {yesterday}.[THINK]a[/THINK]{b}")
    result, _ = answer(capsys, *arguments, "--system", file)
    text = ours.decode(result["prompt_ids"], skip_special_tokens=False)
    today = datetime.date.today()
    dates = [f"{day} {day - datetime.timedelta(1)}." for day in (today, today - datetime.timedelta(1))]  # at midnight
    assert any(f"You are Tiny-Instruct, {date}[THINK]a" in text for date in dates) and "{b}[/SYSTEM_PROMPT]" in text
    assert result["prompt_ids"].count(ours.special_tokens["[THINK]"]) == 1
    assert result["settings"]["temperature"] == 0.7  # it shows how to think
    result, _ = answer(capsys, "To be?", "--model", instruct, "--system", "")
    assert result["prompt_ids"] == ours.encode_chat([user])
    (tools := tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    result, _ = answer(capsys, *arguments, "--tools", tools)
    assert result["prompt_ids"] == ours.encode_chat([user], TOOLS)
    messages = [{"role": "system", "content": "Be brief."}, user, {"role": "assistant", "content": "No."}]
    (file := tmp_path / "messages.json").write_text(json.dumps([*messages, user]))
    result, _ = answer(capsys, "--model", instruct, "--messages", file)
    assert result["prompt_ids"] == ours.encode_chat([*messages, user])
    file.write_text(json.dumps(messages))
    result, _ = answer(capsys, *arguments, "--messages", file)
    assert result["prompt_ids"] == ours.encode_chat([*messages, user])
    thought = {"role": "system", "content": [{"type": "thinking", "thinking": "so"}]}
    file.write_text(json.dumps([user, thought, user]))
    assert answer(capsys, "--model", instruct, "--messages", file)[0]["settings"]["top_p"] == 0.95
    file.write_text(json.dumps([*messages, user, {"role": "assistant", "content": "Well", "prefix": True}]))
    result, _ = answer(capsys, "--model", instruct, "--messages", file)
    assert result["message"]["content"].startswith("Well")


def test_the_system_prompt_of_a_model_that_needs_it(capsys, instruct, tmp_path):
    """A system prompt for thinking is used by default, its markers are control tokens, and the sampling advice is the
    one for thinking. Other system prompts are not used by default."""
    for text, used in (("Think:[THINK]so[/THINK]Then speak.", True), ("Be kind.", False)):
        path = tmp_path / ("a" if used else "b")
        shutil.copytree(instruct, path)
        (path / "SYSTEM_PROMPT.txt").write_text(text)
        result, err = answer(capsys, "To be?", "--model", path)
        ours = Tokenizer.from_dir(path)
        assert (ours.special_tokens["[THINK]"] in result["prompt_ids"]) == used
        assert (ours.special_tokens["[SYSTEM_PROMPT]"] in result["prompt_ids"]) == used
        assert (f"system prompt: {path / 'SYSTEM_PROMPT.txt'} (--system gives another)" in err) == used
        settings = result["settings"]["temperature"], result["settings"]["top_p"]
        assert settings == ((0.7, 0.95) if used else (0.15, None))


def test_thinking_and_calls_on_the_screen(capsys, instruct, monkeypatch, tmp_path):
    ours = Tokenizer.from_dir(instruct)
    encode, names = (lambda text: ours.encode(text, bos=False)), ours.special_tokens
    call = [names["[TOOL_CALLS]"], *encode("add"), names["[ARGS]"], *encode('{"a": 1}')]
    broken = [names["[TOOL_CALLS]"], *encode("add"), names["[ARGS]"], *encode("{a")]
    answer = [names["[THINK]"], *encode("hm"), names["[/THINK]"], *encode("I add."), *call, *broken, 2]
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    arguments = ["To be?", "--model", instruct, "--max-new-tokens", 40]
    scripted(monkeypatch, answer, answer, answer)
    code, out, err = run(capsys, *arguments)
    assert code == 0 and out.splitlines() == ["I add.", json.dumps(calls)]
    assert "malformed tool call '[TOOL_CALLS]add[ARGS]{a'" in err
    out = run(capsys, *arguments, "--show-thinking")[1]
    assert out.splitlines() == ["[THINK]hm[/THINK]", "I add.", json.dumps(calls)]
    result = json.loads(run(capsys, *arguments, "--json")[1])
    assert result["message"]["tool_calls"] == calls and result["text"] == "I add."
    scripted(monkeypatch, answer)
    result = json.loads(run(capsys, *arguments, "--json", "--stop", "dd")[1])
    words = {"type": "text", "text": "I a"}
    assert result["text"] == "I a" and result["message"]["content"][1:] == [words]  # history is what was shown
    result_ids = [*encode("go on"), names["[/THINK]"], *encode("Yes."), 2]
    thinking = [{"type": "thinking", "thinking": "Let me", "closed": False}]
    (file := tmp_path / "m.json").write_text(json.dumps(
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": thinking, "prefix": True}]))  # fmt: skip
    scripted(monkeypatch, result_ids)
    assert run(capsys, "--model", instruct, "--messages", file)[1] == "Yes.\n"  # the rest of the thought is hidden
    assert result["message"]["malformed_calls"][0]["text"] == "[TOOL_CALLS]add[ARGS]{a"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["x", "--raw", "--chat"], "--raw and --chat"),
        (["x", "--raw", "--system", "y"], "--raw and --system"),
        (["--chat", "--json"], "--chat and --json"),
        (["--messages", "/no/such.json"], "--messages /no/such.json: No such file or directory; give a file"),
        (["x", "--tools", "/"], "--tools /: Is a directory"),
        (["--messages", "{words}"], "is not JSON"),
        (["x", "--tools", "{file}"], "holds dict; allowed: a JSON list"),
        (["--messages", "{messages}", "--system", "b"], "--system, and --messages with a system message"),
        (["--messages", "{late}", "--system", "b"], "--system, and --messages with a system message"),
        (["--messages", "{bad}"], "messages[0]: role 'king' is not supported"),
        (["--chat", "--messages", "{bad}"], "messages[0]: role 'king' is not supported"),
        (["--messages", "{unknown}"], "messages[0]: 'weight': 0 is not supported in a message of role"),
        (["--chat", "--messages", "{numbers}"], "a message is 1; allowed: an object"),
        (["--chat", "--messages", "{calls}"], "a tool call is {'name': 'a'}; allowed"),
        (["--chat", "--tools", "{numbers}"], "a tool is 1; allowed: type function"),
        (["--chat", "--seed", "-1"], "--seed -1 is impossible; give a whole number from 0"),
        (["x", "--max-new-tokens", "0"], "--max-new-tokens 0"),
        (["x", "--revision", "v1"], "--revision v1: "),
        (["x", "--raw", "--show-thinking"], "--raw and --show-thinking: plain text has no messages"),
        (["--chat", "--image", "a.png"], "--image a.png: "),
    ],
)
def test_wrong_use_of_chats_is_one_line(capsys, instruct, tmp_path, arguments, message):
    contents = {"file": {"a": 1}, "bad": [{"role": "king", "content": "x"}], "numbers": [1],
                "calls": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [{"name": "a"}]}],
                "messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]}  # fmt: skip
    contents["unknown"] = [{"role": "user", "content": "a", "weight": 0}]
    contents["late"] = [{"role": "user", "content": "c"}, *contents["messages"]]
    for name, content in contents.items():
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "words").write_text("hello")
    contents["words"] = None
    arguments = [argument.format(**{name: tmp_path / name for name in contents}) for argument in arguments]
    code, out, err = run(capsys, "--model", instruct, "--max-new-tokens", 1, *arguments)
    assert code == 2 and out == "" and message in err and err.count("\n") == 1 and err.startswith("error: ")


@pytest.mark.parametrize("option", [["--system", "Be brief."], ["--chat"]])
def test_a_chat_with_a_model_without_chat_training(capsys, monkeypatch, tmp_path, option):
    """There is a warning, and answers are short by default."""
    path = shutil.copytree(BUNDLED, tmp_path / "mine", ignore=shutil.ignore_patterns("chat_template.jinja"))
    monkeypatch.setattr("builtins.input", lambda *_: (_ for _ in ()).throw(EOFError))
    seen = []
    monkeypatch.setattr(chat, "generate", lambda model, ids, **settings: seen.append(settings) or ids)
    code, _, err = run(capsys, "Who are you?", "--model", path, *option)
    assert code == 0 and err.count("warning: ") == 1
    warning = f"warning: {option[0]} for {path}: neither its name nor its files tell of training for chats; expect"
    assert warning in err and seen[0]["max_new_tokens"] == 200


def test_fewer_tokens_where_memory_is_short(capsys, instruct, monkeypatch):
    """A default number is reduced until it fits, but not to a few tokens. A number that was given is refused."""
    monkeypatch.setattr(command, "available_memory", lambda device: 10_100_000)
    scripted(monkeypatch, [2])
    code, _, err = run(capsys, "x", "--model", instruct)
    assert code == 0 and "of cache for 515 tokens" in err
    code, _, err = run(capsys, "x", "--model", instruct, "--max-new-tokens", 1000)
    assert code == 2 and "this takes" in err
    monkeypatch.setattr(command, "available_memory", lambda device: 9_300_000)  # for about 80 tokens
    code, _, err = run(capsys, "x", "--model", instruct)
    assert code == 2 and "this takes" in err


# ------------------------------------------------------------------------------------------------ the terminal


@pytest.fixture
def talk_to(instruct, monkeypatch, capsys):
    """A function of lines of input and options: standard output and error of `--chat`, and its exit code."""

    def talk(lines, *arguments):
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
        options = ["--model", instruct, "--chat", "--max-new-tokens", 12, "--seed", 1, *arguments]
        code, out, err = run(capsys, *options)
        return out, err, code

    return talk


def test_a_conversation_in_the_terminal(talk_to, tmp_path):
    saved = [tmp_path / f"{i}.json" for i in range(3)]
    out, err, code = talk_to([
        "Speak!", "And now?", f"/save {saved[0]}", "/image nothing.png", "/wrong", "", "/system Be brief.", "Again.",
        f"/save {saved[1]}", "/reset", f"/save {saved[2]}", "/save", "/exit", "not read",
    ])  # fmt: skip
    assert code == 0 and "Traceback" not in err
    first, second, third = (json.loads(file.read_text()) for file in saved)
    assert [m["role"] for m in first] == ["user", "assistant"] * 2
    assert [m["role"] for m in second] == ["system", *["user", "assistant"] * 3] and second[1:5] == first
    assert third == [{"role": "system", "content": "Be brief."}]
    answers = [m["content"] for m in second if m["role"] == "assistant"]
    assert out == "".join(f"{words}\n" for words in answers)
    assert err.count("tokens/s") == 3 and "error: an image, for a text model" in err
    assert "unknown command /wrong; /help lists them" in err and "/save needs an argument; /help" in err
    assert err.count("the system prompt is changed") == 1 and "4 messages in" in err and "1 messages in" in err
    # The conversation goes on from the file, and an open question in it is answered first.
    saved[0].write_text(json.dumps(first[:3]))
    out, err, code = talk_to([f"/save {saved[2]}"], "--messages", saved[0])
    assert code == 0 and len(json.loads(saved[2].read_text())) == 4 and len(out) > 5
    assert talk_to([], "Hello")[0]  # a prompt is the first message


def test_errors_in_a_turn_undo_it(talk_to, tmp_path):
    saved = tmp_path / "a.json"
    lines = ["to be " * 5000, "/save /no/such/place.json", " /etc is what?", f"/save {saved}"]
    _, err, code = talk_to(lines)
    assert code == 0 and err.count("error: ") == 2
    assert "max_position_embeddings=4096; shorten it (/reset begins anew)" in err
    user, answer = json.loads(saved.read_text())
    assert user["content"][-1]["text"] == "/etc is what?" and answer["role"] == "assistant"


def test_messages_about_cut_and_empty_answers(instruct, monkeypatch, capsys, tmp_path):
    """An empty answer is removed together with the question. A message says that an answer was cut."""
    scripted(monkeypatch, [2], [10, 2], Tokenizer.from_dir(instruct).encode("No end", bos=False))
    typed(monkeypatch, "A?", "B?", "C?", f"/save {tmp_path / 'a.json'}")
    code, out, err = run(capsys, "--chat", "--model", instruct, "--max-new-tokens", 20)
    assert code == 0 and err.count("(the answer was empty; the question is taken back)") == 2
    assert "cut: --max-new-tokens or the context is used up (/reset begins anew)" in err and "No end" in out
    assert [m["content"] for m in json.loads((tmp_path / "a.json").read_text())] == [[{"type": "text", "text": "C?"}],
                                                                                     "No end"]  # fmt: skip


def typed(monkeypatch, *lines):
    """Let a user type these lines, then Ctrl-D. KeyboardInterrupt stands for Ctrl-C. A function is called before Enter
    is pressed on an empty line."""
    rest = iter(lines)

    def ask(prompt=""):
        line = next(rest, EOFError)
        if isinstance(line, str):
            return line
        if isinstance(line, type):
            raise line
        line()
        return ""

    monkeypatch.setattr("builtins.input", ask)


@pytest.fixture(scope="module")
def vision_directory(instruct, tmp_path_factory):
    """A directory with a tiny vision model and two images of one size."""
    path = tmp_path_factory.mktemp("models") / "Vision-Instruct"
    model = tiny("vision", random.Random(3))
    vision_part = {"vision_config": model.config.vision_config.to_dict(), "tie_word_embeddings": False}
    text = model.config.text_config.to_dict() | {"vocab_size": 2304}
    torch.manual_seed(3)
    config = Mistral3Config.from_dict(vision_part | {"text_config": text})
    Mistral3ForConditionalGeneration(config).save_pretrained(path)
    shutil.copy(instruct / "tekken.json", path)
    for colour in ("red", "white"):
        Image.new("RGB", (20, 20), colour).save(path / f"{colour}.png")
    return path


def test_images_in_the_terminal(vision_directory, monkeypatch, capsys, tmp_path):
    """Sent with the next message only. Sent again when a turn fails. Another image of the same size gives another
    answer."""
    saved, red, white = tmp_path / "a.json", vision_directory / "red.png", vision_directory / "white.png"
    arguments = ["--chat", "--model", vision_directory, "--max-new-tokens", 8, "--temperature", 0]
    monkeypatch.chdir(vision_directory)
    typed(monkeypatch, "/image red.png", "x" * 20000, "What?", "And?", f"/save {saved}")
    assert run(capsys, *arguments)[0] == 0
    messages = json.loads(saved.read_text())
    asked = [message["content"] for message in messages if message["role"] == "user"]
    assert [[part["image"] for part in parts if part["type"] == "image"] for parts in asked] == [[str(red)], []]
    typed(monkeypatch, f"/image {red}", "What?", "/image none.png", "/reset", f"/image {white}", "What?",
          f"/save {saved}")  # fmt: skip
    code, out, err = run(capsys, *arguments)
    assert code == 0 and "none.png cannot be read" in err and err.count("the next message shows the image") == 2
    typed(monkeypatch, f"/image {white}", "What?")
    fresh = run(capsys, *arguments)[1]
    assert out.endswith(fresh) and out != fresh + fresh
    assert len(json.loads(saved.read_text())) == 2


def conversation_after(tokenizer, monkeypatch, *lines):
    """A conversation with a vision model after these lines of input."""
    conversation = Conversation(tokenizer, tiny("vision", random.Random(0)).config, [])
    typed(monkeypatch, *lines)
    assert terminal.converse(conversation, None, parse_arguments(["--chat"]), {}) == 0
    return conversation


def test_the_file_of_an_image_may_change(tokenizer, vision_directory, monkeypatch, tmp_path):
    """/image reads the file again."""
    file, hello = shutil.copy(vision_directory / "red.png", tmp_path / "a.png"), tokenizer.encode("Hello.", bos=False)
    seen = scripted(monkeypatch, hello, hello)
    conversation = conversation_after(
        tokenizer, monkeypatch, f"/image {file}", "What?",
        lambda: shutil.copy(vision_directory / "white.png", file), f"/image {file}", "And now?",
    )  # fmt: skip
    white = images.read_image(vision_directory / "white.png", conversation.config, tokenizer)[0]
    assert seen[1][-1].equal(white) and not seen[0][0].equal(white)


def test_reset_removes_the_images(tokenizer, vision_directory, monkeypatch):
    red = str(vision_directory / "red.png")
    assert conversation_after(tokenizer, monkeypatch, f"/image {red}").images.keys() == {red}
    assert not conversation_after(tokenizer, monkeypatch, f"/image {red}", "/reset").images


def test_an_image_is_kept_after_ctrl_c(tokenizer, vision_directory, monkeypatch):
    """It is sent with the next question, as when a turn fails."""
    seen = scripted(monkeypatch, KeyboardInterrupt, tokenizer.encode("Red.", bos=False))
    image = vision_directory / "red.png"
    conversation = conversation_after(tokenizer, monkeypatch, f"/image {image}", "What?", "Well?")
    assert [len(images) for images in seen] == [1, 1]
    assert [part["type"] for part in conversation.messages[0]["content"]] == ["image", "text"]
    assert len(conversation.messages) == 2


def test_a_second_ctrl_c_stops_at_once(tokenizer, monkeypatch):
    """Even while the model computes a token. Afterwards Ctrl-C has its former handler."""
    before, ended = signal.getsignal(signal.SIGINT), []

    def busy(*_, on_token, **__):
        signal.raise_signal(signal.SIGINT)
        ended.append(on_token(0, 100))
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("still running")

    monkeypatch.setattr(chat, "generate", busy)
    question = {"role": "user", "content": "Speak!"}
    conversation = Conversation(tokenizer, tiny("full", random.Random(0)).config, [question])
    with pytest.raises(KeyboardInterrupt):
        terminal.reply(conversation, None, parse_arguments(["--chat"]), {})
    assert ended == [True] and signal.getsignal(signal.SIGINT) is before


def test_the_system_prompt_is_replaced(instruct, monkeypatch, capsys, tmp_path):
    (tmp_path / "s.txt").write_text("I am {name}.[THINK]a[/THINK]")
    typed(monkeypatch, "/system One.", f"/system {tmp_path / 's.txt'}", "Hello", f"/save {tmp_path / 'a.json'}")
    assert run(capsys, "--chat", "--model", instruct, "--max-new-tokens", 3)[0] == 0
    system, *_ = json.loads((tmp_path / "a.json").read_text())
    assert [part["type"] for part in system["content"]] == ["text", "thinking"]
    assert system["content"][0]["text"] == "I am Tiny-Instruct."


def test_each_turn_draws_anew_and_the_seed_repeats_them_all(talk_to):
    lines = ["Speak!", "/reset", "Speak!"]
    (first, _, _), (again, _, _) = (talk_to(lines, "--temperature", "9") for _ in range(2))
    one, other = first[: len(first) // 2], first[len(first) // 2 :]
    assert first == again and one != other


def test_a_call_is_removed(instruct, monkeypatch, capsys, tmp_path):
    """By Ctrl-C while its result is asked for, or if the layout has no results for such calls."""
    ours = Tokenizer.from_dir(instruct)
    encode, names = (lambda text: ours.encode(text, bos=False)), ours.special_tokens
    calls = [[names["[TOOL_CALLS]"], *encode(name), names["[ARGS]"], *encode("{}")] for name in ("f", "g")]
    scripted(monkeypatch, [*calls[0], *calls[1], 2], [*calls[0], *calls[1], 2], [*encode("Five."), 2])
    saved = [tmp_path / f"{i}.json" for i in range(2)]
    typed(monkeypatch, "A?", "1", KeyboardInterrupt, f"/save {saved[0]}", "B?", f"/save {saved[1]}", "1", "2",
          f"/save {tmp_path / 'end.json'}")  # fmt: skip
    code, _, err = run(capsys, "--chat", "--model", instruct, "--max-new-tokens", 20)
    assert code == 0 and "error" not in err
    assert json.loads(saved[0].read_text()) == [] and len(json.loads(saved[1].read_text())) == 2
    end = json.loads((tmp_path / "end.json").read_text())
    assert [(m.get("name"), m["content"]) for m in end[2:4]] == [("f", "1"), ("g", "2")]
    assert end[4]["content"] == "Five."
    # V7 numbers its calls; the ids of results are theirs.
    old = tmp_path / "Old-Instruct"
    shutil.copytree(BUNDLED, old)
    v7 = Tokenizer.from_dir(old)
    call = v7.encode('[{"name": "f", "arguments": {}, "id": "abcdefghi"}]', bos=False)
    scripted(monkeypatch, [v7.special_tokens["[TOOL_CALLS]"], *call, 2], [*v7.encode("Six.", bos=False), 2])
    typed(monkeypatch, "A?", "1", f"/save {saved[0]}")
    assert run(capsys, "--chat", "--model", old, "--max-new-tokens", 90)[0] == 0
    assert json.loads(saved[0].read_text())[2]["tool_call_id"] == "abcdefghi"


def test_results_of_tools_are_asked_for(instruct, monkeypatch, capsys, tmp_path):
    ours = Tokenizer.from_dir(instruct)
    encode, names = (lambda text: ours.encode(text, bos=False)), ours.special_tokens
    call = [names["[TOOL_CALLS]"], *encode("add"), names["[ARGS]"], *encode('{"a": 1}')]
    scripted(monkeypatch, [*call, *call, 2], [*encode("Five."), 2])
    typed(monkeypatch, "What is it?", "2", "3", f"/save {tmp_path / 'a.json'}")
    (tools := tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    assert run(capsys, "--chat", "--model", instruct, "--tools", tools, "--max-new-tokens", 20)[0] == 0
    messages = json.loads((tmp_path / "a.json").read_text())
    assert [m["role"] for m in messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert [m["content"] for m in messages[2:]] == ["2", "3", "Five."] and len(messages[1]["tool_calls"]) == 2
    assert ours.encode_chat([*messages, {"role": "user", "content": "Why?"}], TOOLS)


def test_ctrl_c_stops_the_answer_and_not_the_program(instruct, tmp_path):
    saved = tmp_path / "a.json"
    process = subprocess.Popen(
        [*COMMAND, "--model", str(instruct), "--chat", "--max-new-tokens", "900", "--seed", "1", "--temperature", "2"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    process.stdin.write(b"Speak!\n")
    process.stdin.flush()
    assert len(process.stdout.read(10)) == 10  # the model generates
    process.send_signal(signal.SIGINT)
    while b"tokens/s" not in (line := process.stderr.readline()):
        assert line
    assert int(line.split()[0]) < 800
    process.send_signal(signal.SIGINT)  # at the prompt it does not end the program, either
    time.sleep(0.2)
    _, err = process.communicate(f"/save {saved}\n".encode(), timeout=600)
    assert process.returncode == 0 and b"Traceback" not in err, err
    assert [m["role"] for m in json.loads(saved.read_text())] == ["user", "assistant"]


def test_start_up_of_a_chat_imports_no_large_package(instruct):
    program = (
        "import sys, generate; code = generate.main(sys.argv[1:]);"
        "heavy = {'transformers', 'mistral_common', 'huggingface_hub', 'PIL', 'jinja2'} & set(sys.modules);"
        "print(sorted(heavy), code)"
    )
    arguments = ["Speak", "--model", str(instruct), "--max-new-tokens", "1"]
    result = subprocess.run([sys.executable, "-c", program, *arguments], cwd=Path(generate.__file__).parent,
                            capture_output=True, text=True, check=True, env=os.environ)  # fmt: skip
    assert result.stdout.splitlines()[-1] == "[] 0"

