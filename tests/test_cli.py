"""`python generate.py`: what it prints, and that every wrong use is one line on stderr and exit code 2."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import command
import generate
import ministral
from cli import exit_code, format_bytes, progress_bar
from command import available_memory, model_words
from decoder import Decoder, kv_cache_bytes
from generate import main
from ministral import KVCache, MinistralConfig, MinistralForCausalLM
from model_types import BUNDLED, BUNDLED_2410, load_model
from reference.device import checked_once
from terminal import Writer, system_prompt
from tokenizer import Tokenizer

ROOT = Path(generate.__file__).parent
COMMAND = [sys.executable, str(ROOT / "generate.py")]


def run(capsys, *arguments, program=main):
    """Exit code, standard output and standard error of a command, run in this process."""
    try:
        code = program([str(argument) for argument in arguments])
    except SystemExit as exit:
        code = exit.code
    out = capsys.readouterr()
    return code, out.out, out.err


def test_text_is_streamed_and_then_one_line_of_figures(capsys, monkeypatch):
    monkeypatch.setattr(command, "wide_rows", lambda dtype, device: math.inf)
    code, out, err = run(capsys, "To be, or not to be", "--max-new-tokens", 20, "--seed", 1)
    kind, plan, settings, figures = err.splitlines()
    assert kind.startswith("plain text: a bundled model continues text, unless --chat")
    assert code == 0 and out.endswith("\n") and out.startswith("To be, or not to be") and len(out) > 40
    assert settings.endswith("20 new tokens at most (--max-new-tokens)")
    assert "million parameters" in plan and "of weights" in plan and "of cache for" in plan
    assert figures.startswith("20 tokens, ") and f"tokens/s, {BUNDLED}, " in figures and "bfloat16" in figures


def test_products_in_another_type_are_reported(capsys, monkeypatch):
    monkeypatch.setattr(command, "wide_rows", lambda dtype, device: 8)
    line = "8 tokens or more at once are computed in float32, faster here than bfloat16\n"
    assert line in run(capsys, "To be, or not to be, that is the question", "--max-new-tokens", 1)[2]
    assert line not in run(capsys, "To be", "--max-new-tokens", 1)[2]


def test_the_same_seed_gives_the_same_text(capsys):
    texts = {run(capsys, "Enter the", "--max-new-tokens", 30, "--seed", seed)[1] for seed in (1, 1, 2)}
    assert len(texts) == 2


def test_json(capsys):
    settings = ["--max-new-tokens", 12, "--temperature", 0, "--dtype", "float32", "--device", "cpu"]
    code, out, _ = run(capsys, "The king", *settings, "--json")
    result = json.loads(out)
    assert code == 0 and out.count("\n") == 1
    assert len(result["ids"]) == 12 and result["prompt"] == "The king" and not result["interrupted"]
    assert Tokenizer.from_dir(BUNDLED).decode(result["ids"]) == result["text"]
    assert result["settings"]["temperature"] == 0 and result["settings"]["dtype"] == "float32"
    assert 0 < result["timing"]["first_token_seconds"] <= result["timing"]["seconds"]
    # The command is the library: greedy ids are those of `generate`.
    prompt = torch.tensor([result["prompt_ids"]])
    ids = generate.generate(load_model(BUNDLED, torch.float32), prompt, temperature=0, max_new_tokens=12)
    assert ids[0, -12:].tolist() == result["ids"]


def test_a_stop_text_ends_the_output_before_it(capsys):
    arguments = ["HAMLET.\n", "--max-new-tokens", 60, "--temperature", 0]
    free = run(capsys, *arguments)[1].rstrip("\n")
    stop = free[len(free) // 2 : len(free) // 2 + 7]
    code, out, err = run(capsys, *arguments, "--stop", stop, "--stop", "\x00")
    assert code == 0 and out == free[: free.index(stop, len("HAMLET.\n"))] + "\n"
    assert int(err.splitlines()[-1].split()[0]) <= 60


def test_a_stop_text_is_held_back_until_it_is_decided(capsys):
    """Text that may be the beginning of a stop text is not printed before it is clear that it is none."""
    tokenizer = Tokenizer.from_dir(BUNDLED)
    writer, seen = Writer(tokenizer, ["abcX"], print_now=True), []
    for i in tokenizer.encode("zabcabcY", bos=False):
        writer.on_token(0, i)
        seen.append(capsys.readouterr().out)
    writer.close()
    assert "".join(seen) + capsys.readouterr().out == "zabcabcY"
    writer = Writer(tokenizer, ["abcX"], print_now=True)
    assert any(writer.on_token(0, i) for i in tokenizer.encode("zabcabcXY", bos=False))
    assert capsys.readouterr().out == "zabc" == writer.text


def test_prompt_files(capsys, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("Wherefore art thou é", encoding="utf-8")
    settings = ["--max-new-tokens", 5, "--temperature", 0, "--json"]
    a = json.loads(run(capsys, "--prompt-file", file, *settings)[1])
    b = json.loads(run(capsys, "Wherefore art thou é", *settings)[1])
    assert a["prompt"] == b["prompt"] and a["ids"] == b["ids"]
    piped = subprocess.run(
        [*COMMAND, "--prompt-file", "-", *map(str, settings)], input=file.read_bytes(), capture_output=True, check=True
    )
    assert json.loads(piped.stdout)["ids"] == b["ids"]


@pytest.fixture
def copy(tmp_path):
    """A copy of the bundled model, which tests may change."""
    others = shutil.ignore_patterns("chat_template.jinja", "tokenizer.json")  # the model continues text
    return Path(shutil.copytree(BUNDLED, tmp_path / "model", ignore=others))


def edit_config(path, **change):
    """Change fields of the whole model, or of its text model."""
    config = json.loads((path / "config.json").read_text())
    for name, value in change.items():
        part = config["text_config"]
        if name in config:
            part = config
        part[name] = value
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "no prompt; give a text to continue"),
        (["--modle", "x"], "--modle is not an option; did you mean --model?"),
        (["--xyz=3", "a"], "--xyz is not an option; a text that begins with - goes after --"),
        (["to", "be"], "'be' is one argument too many; a text with blanks needs quotes"),
        ([""], "the prompt is empty"),
        (["a", "--prompt-file", "-"], "a PROMPT and --prompt-file -; give one of the two"),
        (["--prompt-file", "/no/such/file"], "--prompt-file /no/such/file: No such file or directory; give a file"),
        (["--prompt-file", "/"], "--prompt-file /: Is a directory"),
        (["a", "--model", ""], "--model '' names no model"),
        (["a", "--model", "/"], "/config.json does not exist; a model is a directory with"),
        (["a", "--stop", ""], "--stop '' is impossible; give a text that is not empty"),
        (["a", "--seed", "1.5"], "--seed 1.5 is impossible; give a whole number"),
        (["a", "--seed"], "--seed: expected one argument"),
        (["a", "--model", "/no/such/dir"], "no model directory /no/such/dir"),
        (["a", "--model", "no-owner/no-such-model"], "could not be fetched from the Hub"),
        (["a", "--top-p", "2"], "--top-p 2 is impossible; give a number above 0, at most 1"),
        (["a", "--top-k", "-1"], "--top-k -1 is impossible; give a whole number not below 0 (0 is off)"),
        (["a", "--min-p", "-1"], "--min-p -1 is impossible; give a number from 0 to 1"),
        (["a", "--temperature", "-1"], "--temperature -1 is impossible; give a number not below 0"),
        (["a", "--temperature", "nan"], "--temperature nan is impossible"),
        (["a", "--temperature", "hot"], "--temperature hot is impossible; give a number"),
        (["a", "--repetition-penalty", "0"], "--repetition-penalty 0 is impossible"),
        (["a", "--max-new-tokens", "0"], "--max-new-tokens 0 is impossible; give a whole number not below 1"),
        (["a", "--max-new-tokens", "many"], "--max-new-tokens many is impossible"),
        (["a", "--model", str(BUNDLED_2410), "--image", "x.png"], "--image x.png: "),
        (["a", "--revision", "v1"], "--revision v1: "),
        (["a", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["a", "--attn", "flash"], "invalid choice: 'flash'"),
        (["a", "--frobnicate"], "--frobnicate is not an option"),
        (["to be " * 5000], "max_position_embeddings=4096"),
        (["a", "--repetition-penalty", "1e-300"], "from 0.01 to 100"),
        (["a\udcff"], "not UTF-8"),
        (["to be " * 20000], "the prompt has 120000 characters; allowed: 65536, 16 for each of the 4096 positions"),
        (["a", "--system", "prompts/no-such.txt", "--chat"], "--system prompts/no-such.txt: no such file"),
        (["a", "--model", "/no/\x1b[31mred"], "/no/\\x1b[31mred"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(capsys, arguments, message):
    code, out, err = run(capsys, *arguments)
    assert code == 2 and out == "" and message in err
    assert err.count("\n") == 1 and err.startswith("error: ")


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda p: (p / "model.safetensors").write_bytes(b"0" * 99), "model.safetensors is truncated or not"),
        (lambda p: os.truncate(p / "model.safetensors", 9_000_000), "model.safetensors is truncated or not"),
        (lambda p: (p / "model.safetensors").unlink(), "holds neither model.safetensors"),
        (lambda p: (p / "config.json").write_text("{oops"), "config.json is not JSON"),
        (lambda p: (p / "config.json").write_text('{"a": 1}'), "config.json has model_type None"),
        (lambda p: edit_config(p, model_type="gpt2"), "model_type 'gpt2'"),
        (lambda p: edit_config(p, num_key_value_heads=3), "num_key_value_heads=3"),
        (lambda p: edit_config(p, hidden_size=128), "tensors misshapen"),
        (lambda p: edit_config(p, num_hidden_layers=8), "tensors missing"),
        (lambda p: edit_config(p, num_hidden_layers=6), "tensors unexpected"),
        (lambda p: edit_config(p, vocab_size=1000), "tokenizer has 2304 ids, the model vocab_size=1000"),
        (lambda p: (p / "tekken.json").unlink(), "holds neither tekken.json"),
        (lambda p: (p / "tekken.json").write_text("[]"), "is not a Tekken vocabulary"),
    ],
)
def test_a_broken_model_is_one_line_and_exit_code_2(capsys, copy, damage, message):
    damage(copy)
    code, out, err = run(capsys, "To be", "--model", copy)
    assert code == 2 and out == "" and message in err
    last = err.splitlines()[-1]
    assert last.startswith("error: ") and len(err.splitlines()) <= 4  # the lines that say what will be loaded


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(capsys, monkeypatch):
    monkeypatch.setattr(command, "available_memory", lambda device: 5_000_000)
    code, out, err = run(capsys, "To be")
    assert code == 2 and "this takes " in err and "has 5.0 MB free" in err and out == ""


def test_the_planned_memory_is_that_of_the_arguments(capsys):
    """Tokens beyond the context are not counted, --dtype is, and neither needs the memory of what was asked."""
    plans = {}
    for name, arguments in {"": [], "float64": ["--dtype", "float64"], "long": ["--max-new-tokens", 10**9]}.items():
        code, _, err = run(capsys, "a", "--stop", " ", "--stop", "e", *arguments)
        plans[name] = err.splitlines()[1]
        assert code == 0
        cut = "note: --max-new-tokens 1000000000: the context of 4,096 tokens leaves room for 4,094 after the prompt"
        assert (cut in err) == (name == "long")
    assert "10.5 MB of weights and 362.0 kB of cache for 202 tokens" in plans[""]
    assert "42.1 MB of weights and 1.4 MB of cache for 202 tokens" in plans["float64"]
    assert "10.5 MB of weights and 7.3 MB of cache for 4096 tokens" in plans["long"]


def test_where_settings_come_from(capsys, copy, monkeypatch):
    """An option, then generation_config.json, then a default. The printed line names the source."""
    asked = []
    monkeypatch.setattr(command, "generate", lambda *_, **settings: asked.append(settings))
    file = {"temperature": 0.6, "top_p": 0.9, "max_new_tokens": 7, "do_sample": True, "repetition_penalty": 1.2}

    def stated(content, *arguments):
        (copy / "generation_config.json").write_text(json.dumps(content))
        code, _, err = run(capsys, "To be", "--model", copy, *arguments)
        assert code == 0, err
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens")
        line = next(line for line in err.splitlines() if line.startswith("settings: "))
        return line.removeprefix("settings: "), tuple(asked[-1][name] for name in names)

    from_file = "(generation_config.json)"
    usual = "temperature 0.8 (default), 200 new tokens at most (default)"
    assert stated({}) == (usual, (0.8, None, None, None, 1.0, 200))
    assert stated(file) == (
        f"temperature 0.6 {from_file}, top-p 0.9 {from_file}, repetition-penalty 1.2 {from_file},"
        f" 7 new tokens at most {from_file}", (0.6, None, 0.9, None, 1.2, 7)
    )  # fmt: skip
    line, values = stated(file, "--temperature", 0.3, "--max-new-tokens", 3, "--top-k", 5)
    assert "temperature 0.3 (--temperature), top-k 5 (--top-k), top-p 0.9 (gen" in line and "at most (--max-new" in line
    assert values == (0.3, 5, 0.9, None, 1.2, 3)
    assert stated(file, "--top-p", 1, "--repetition-penalty", 1)[0].startswith(f"temperature 0.6 {from_file}, 7 new")
    assert stated(file | {"do_sample": False})[1] == (0, None, None, None, 1.2, 7)
    assert stated({"do_sample": True})[0].startswith(f"temperature 1.0 {from_file}")
    assert stated({"max_length": 12})[1][-1] == 12 - 3 and stated({"max_length": 1024})[1][-1] == 200
    assert stated({"max_length": 12}, "--max-new-tokens", 50)[1][-1] == 50
    assert stated({"temperature": 0.5}, "--temperature", 0)[1][:3] == (0, None, None)


def test_a_setting_without_effect_is_named(capsys):
    err = run(capsys, "To be", "--temperature", 0, "--top-p", 0.7, "--max-new-tokens", 1)[2]
    assert "note: --top-p 0.7 changes nothing: temperature 0 (--temperature) always takes the most likely token" in err


def test_the_models_own_end_and_stop_texts(capsys, copy):
    def text(**content):
        (copy / "generation_config.json").write_text(json.dumps(content))
        arguments = ["The king", "--model", copy, "--temperature", 0, "--max-new-tokens", 12, "--json"]
        return json.loads(run(capsys, *arguments)[1])

    free = text()
    assert len(free["ids"]) == 12
    ended = text(eos_token_id=[2, free["ids"][5]])
    assert ended["ids"] == free["ids"][: free["ids"].index(free["ids"][5]) + 1]
    stopped = text(stop_strings=[free["text"][8:12]])
    assert stopped["text"] == free["text"][: free["text"].index(free["text"][8:12])]
    assert text(num_return_sequences=3)["ids"] == free["ids"]


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "generation_config.json is not JSON"),
        ("[1]", "generation_config.json must hold a JSON object; found list"),
        ('{"temperature": "hot"}', "generation_config.json: temperature='hot' is impossible; allowed: a number not"),
        ('{"top_p": 2}', "generation_config.json: top_p=2 is impossible"),
        ('{"eos_token_id": [2, "a"]}', "generation_config.json: eos_token_id=[2, 'a'] is impossible"),
        ('{"do_sample": 1}', "generation_config.json: do_sample=1 is impossible; allowed: true or false"),
        ('{"max_length": 2}', "the prompt has 2 tokens, max_length=2 (of the call, or of generation_config.json)"),
        ('{"eos_token_id": 5000}', "eos_token_id=[5000] is impossible; allowed: ids below 2304"),
    ],
)
def test_a_malformed_generation_config_is_one_line(capsys, copy, content, message):
    (copy / "generation_config.json").write_text(content)
    code, out, err = run(capsys, "A", "--model", copy)
    assert code == 2 and out == "" and message in err and err.splitlines()[-1].startswith("error: ")


def test_settings_that_are_not_supported_are_named_once(copy):
    content = {"num_beams": 4, "penalty_alpha": 0.6, "typical_p": 1.0, "no_repeat_ngram_size": 0, "use_cache": True}
    (copy / "generation_config.json").write_text(json.dumps(content))
    arguments = [*COMMAND, "To be", "--model", str(copy), "--max-new-tokens", "1"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert done.stderr.count("not supported here, and left out: num_beams=4, penalty_alpha=0.6\n") == 1
    assert "typical_p" not in done.stderr and "use_cache" not in done.stderr


def test_memory_figures():
    kinds = ["full_attention", "sliding_attention", "sliding_attention"]
    config = MinistralConfig(hidden_size=16, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3,
                             intermediate_size=8, vocab_size=9, sliding_window=64, layer_types=kinds)  # fmt: skip
    cache = KVCache(config, expected=256)
    model = MinistralForCausalLM(config)
    with torch.no_grad():
        for _ in range(2):
            model(torch.ones(1, 128, dtype=torch.long), past_key_values=cache)
    assert cache.nbytes() == kv_cache_bytes(config, 256, 4) == 2 * (256 + 64 + 64) * 2 * 4 * 4
    # Bytes per token of the published 3B model in bfloat16.
    from ministral3 import Ministral3Config

    assert kv_cache_bytes(Ministral3Config(num_hidden_layers=26), 1, 2) == 106_496
    assert format_bytes(999) == "999 B" and format_bytes(1234567) == "1.2 MB" and format_bytes(3.2e12) == "3.2 TB"
    free = available_memory(torch.device("cpu"))
    assert free is None or free > 10_000_000


def heed_ctrl_c():
    """A job in the background of a shell ignores Ctrl-C, and so do the processes that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_keeps_what_was_written():
    process = subprocess.Popen(
        [*COMMAND, "O Romeo", "--max-new-tokens", "4000", "--seed", "1"], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, preexec_fn=heed_ctrl_c,
    )  # fmt: skip
    first = process.stdout.read(10)  # the model is talking
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 130 and len(first) == 10 and out.endswith(b"\n")
    assert b"interrupted" in err.splitlines()[-1] and b"Traceback" not in err


def test_a_closed_pipe_is_no_traceback():
    process = subprocess.Popen(
        [*COMMAND, "O Romeo", "--max-new-tokens", "500"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.read(5)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=600) == 141 and b"Traceback" not in err and b"Error" not in err


def test_start_up_imports_no_large_package():
    """The start-up imports neither transformers nor the Hub client. (How long it takes is printed, not asserted.)"""
    program = (
        "import sys, generate; code = generate.main(['To be', '--max-new-tokens', '1', '--device', 'cpu']);"
        "heavy = {'transformers', 'mistral_common', 'huggingface_hub', 'PIL', 'torch._dynamo'} & set(sys.modules);"
        "print(sorted(heavy), code)"
    )
    start = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    print(f"process start to end, one token: {time.perf_counter() - start:.1f} s")
    assert result.stdout.splitlines()[-1] == "[] 0"


@pytest.mark.parametrize(
    ("name", "directory", "words"),
    [
        ("base-labs/Ministral-3-3B-Instruct-2512", "/cache/x", ["ministral", "3", "3b", "instruct", "2512"]),
        (".", "models--mistralai--Ministral-3-3B-Base-2512/snapshots/0a1b", ["ministral", "3", "3b", "base", "2512"]),
        (".", "Ministral-3-8B-Reasoning-2512", ["ministral", "3", "8b", "reasoning", "2512"]),
    ],
)
def test_words_in_the_name_of_a_model(tmp_path, name, directory, words):
    """Without the owner's name. For a directory in the Hub's cache, those of the repository."""
    path = tmp_path / directory
    path.mkdir(parents=True, exist_ok=True)
    assert model_words(name if "/" in name else str(path), path) == words


@pytest.mark.parametrize("seconds", [0.0, 2.1])
def test_only_long_prompts_show_a_bar(capsys, seconds):
    show = progress_bar()
    show(512, 1536)
    time.sleep(seconds)
    show(1024, 1536)
    printed = capsys.readouterr().err
    assert ("reading:  67%" in printed) == (seconds > 2), printed
    show(1536, 1536)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs /dev/zero")
def test_files_without_an_end_and_without_text_are_refused(capsys, tmp_path):
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    for arguments, message in (
        (["--prompt-file", "/dev/zero"], "--prompt-file /dev/zero is too long; allowed: 64.0 MB"),
        (["--prompt-file", tmp_path / "latin"], "latin is not UTF-8: unexpected end of data at byte 3"),
        (["a", "--chat", "--system", tmp_path / "latin"], "latin is not UTF-8"),
        (["--chat", "--messages", "/dev/zero"], "--messages /dev/zero is too long"),
    ):
        code, _, err = run(capsys, *arguments)
        assert code == 2 and message in err and "Traceback" not in err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["a", "--image", ""], "--image '' names no image"),
        (["a", "--tools", ""], "--tools '' names no file"),
        (["--messages", ""], "--messages '' names no file"),
        (["--prompt-file", ""], "--prompt-file '' names no file"),
    ],
)
def test_an_empty_name_is_refused(capsys, arguments, message):
    code, _, err = run(capsys, *arguments)
    assert code == 2 and message in err


def test_closed_streams(monkeypatch):
    """`>&-` makes them None. What is for one does not go to the other."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert exit_code(lambda: print(1, sys.stdout.isatty(), file=sys.stderr) or 0) == 0


def test_a_terminal_that_is_gone_ends_a_conversation(capsys, monkeypatch):
    def fail(prompt):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("builtins.input", fail)
    code, _, err = run(capsys, "--chat")
    assert code == 2 and "error: the terminal cannot be used: [Errno 28]" in err


def test_an_error_of_the_code_has_another_exit_code_than_a_verdict(capsys):
    def fail():
        raise IndexError("found by nobody")

    assert exit_code(fail) == 2 and "Traceback" in capsys.readouterr().err


def test_the_name_of_a_directory_makes_no_thinking(tmp_path):
    """Names are filled in after the text of the file was read for [THINK]."""
    (tmp_path / "prompt.txt").write_text("You are {name}. [THINK]As {name}[/THINK]")
    directory = tmp_path / "[THINK]evil"
    directory.mkdir()
    parts = system_prompt(str(tmp_path / "prompt.txt"), str(directory))
    assert parts == [
        {"type": "text", "text": "You are [THINK]evil. "},
        {"type": "thinking", "thinking": "As [THINK]evil", "closed": True},
    ]


@pytest.mark.parametrize("dtype", ["auto", "float32", "float16"])
def test_the_device_is_checked(capsys, dtype):
    code, out, err = run(capsys, "--check", "--device", "cpu", "--dtype", dtype)
    assert code == 0 and out.count("\n") == err.count("\n") == 1
    assert err.startswith("comparing the golden models")
    assert "3 models agree with the float64 reference at every stage" in out


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("arguments, dtype", [([], torch.bfloat16), (["--dtype", "float16"], torch.float16),
                                              (["--no-check"], None)])  # fmt: skip
def test_other_devices_are_checked_before_their_first_use(monkeypatch, device, arguments, dtype):
    """In the type of the weights, and before these are loaded. The CPU is not."""
    checked = []
    monkeypatch.setattr("reference.device.checked_once", lambda *arguments: checked.append(arguments))
    monkeypatch.setattr(command, "choose_device", lambda name: torch.device(device))
    monkeypatch.setattr(command, "load", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command.run(command.parse_arguments(["HAMLET.", *arguments]))
    expected = [(torch.device(device), dtype)]
    if device == "cpu" or dtype is None:
        expected = []
    assert checked == expected


@pytest.mark.parametrize(
    "broken, found",
    [
        ("eager", "ministral, eager attention: .*layers.0.attention"),
        ("sdpa", "ministral, sdpa attention: .*logits"),
        ("step", "ministral, the steps of generate: .*logits"),
    ],
)
def test_a_device_that_computes_wrong_numbers_is_found(capsys, monkeypatch, tmp_path, broken, found):
    """A kernel that forgets the mask, as drivers have done, in one of the three ways to compute attention."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if broken == "step":
        step = Decoder.step
        monkeypatch.setattr(Decoder, "step", lambda self, ids: step(self, ids) * 1.5)
    else:
        right = ministral.ATTENTION[broken]

        def forgets_mask(q, k, v, mask, *rest):
            return right(q, k, v, torch.ones_like(mask) if isinstance(mask, torch.Tensor) else None, *rest)

        monkeypatch.setitem(ministral.ATTENTION, broken, forgets_mask)
    code, out, _ = run(capsys, "--check", "--device", "cpu", "--dtype", "float32")
    assert code == 1 and re.search(f"wrong numbers; {found}", out)
    with pytest.raises(ValueError, match=f"cpu computes wrong numbers: {found}.*--no-check goes on"):
        checked_once(torch.device("cpu"), torch.float32)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    passed = tmp_path / "ministral" / "checked-devices.json"
    passed.parent.mkdir(exist_ok=True)
    passed.write_text("5")  # damaged
    assert checked_once(torch.device("cpu"), torch.float32)
    assert not checked_once(torch.device("cpu"), torch.float32)  # it has passed before
    assert checked_once(torch.device("cpu"), torch.bfloat16)
