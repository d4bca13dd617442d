"""What the two miniature models write, and the command that writes it down again: `python -m tests.miniature`.

It makes anew all that depends on the weights or the vocabularies in `models/`, and is tested by test_miniature.py:
`tests/miniature.json` (greedy texts and answers in float32), the outputs in README.md of the commands that use the
bundled model, and the tokenizer.json beside each tekken.json.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import checkpoint
import command
from chat import encode_messages
from generate import generate
from model_types import load_model
from tokenizer import TOKENIZER, Tokenizer

ROOT = Path(command.__file__).parent
MODELS = {name: ROOT / "models" / name for name in ("ministral3", "ministral")}
CONSTANTS = Path(__file__).with_name("miniature.json")
README = ROOT / "README.md"
TOKENS = 200  # of a text
# The logit of each token exceeds the second by this at least. Noise of 1e-3 on all logits, a hundred times float32's
# error, then changes nothing, so that the constants do not depend on the processor.
LEAD = 0.01
# Prompts for a text. Of those with this lead, the one with the most different words is taken.
PROMPTS = (
    "To be, or not to be", "HAMLET.\n", "Shall I compare thee", "JULIET.\nO Romeo,", "Enter the King.\n", "ACT I\n",
    "KING.\n", "PORTIA.\nThe quality of mercy", "Now is the winter", "My lord,", "ROSALIND.\n", "O, what a rogue",
)  # fmt: skip
TOOLS = json.loads((ROOT / "examples" / "tools.json").read_text())
SHAPES = str(ROOT / "examples" / "shapes.png")
RECALL = (
    "Now is the winter of our discontent\nThe key of Ariel is 4711.\nMade glorious summer by this sun of York;\n\n"
    "What is the key of Ariel?"
)
SPEAKER = (
    "VIOLA.\nWhat country, friends, is this?\n\nCAPTAIN.\nThis is Illyria, lady.\n\nVIOLA.\nAnd what should I do in"
    ' Illyria?\n\nWho says "This is Illyria, lady."?'
)
# The questions of each model: a name -> the content of the message, and the tools.
QUESTIONS: dict[str, dict[str, tuple[Any, Any]]] = {
    "ministral3": {
        "sum": ("What is 247 + 385?", None),
        "tool": ("What is 123 times 45?", TOOLS),
        "image": (
            [{"type": "image", "path": SHAPES}, {"type": "text", "text": "What do you see?"}], None,
        ),
        "recall": (RECALL, None),
        "speaker": (SPEAKER, None),
    },
    "ministral": {"recall": (RECALL, None)},
}  # fmt: skip
# Commands that use the bundled model, and their outputs.
SHOWN = re.compile(
    r"(```sh\n((?:python generate\.py --(?!model).*\n)+)```\n\n(?:[^`]+\n\n)?```text\n)(.*?)(?=```)", re.DOTALL
)
# The answers in README.md are those of any seed if the probability of each token exceeds the model's top_p, 0.9.
SURE = 0.9


def load(name: str) -> tuple[Any, Tokenizer]:
    """A miniature model in float32, and its tokenizer."""
    return load_model(MODELS[name], torch.float32, "cpu"), Tokenizer.from_dir(MODELS[name])


def user(content: Any) -> list[dict[str, Any]]:
    """The messages of a conversation that begins with a question."""
    return [{"role": "user", "content": content}]


def leads(model: Any, ids: Tensor, prompt: int, **images: Any) -> Tensor:
    """By how much the logit of the most likely token exceeds the second, for each token after the prompt."""
    with torch.no_grad():
        logits = model(ids, **images).logits[0, prompt - 1 : -1]
    best = logits.topk(2).values
    return best[:, 0] - best[:, 1]


def write_text(model: Any, tokenizer: Tokenizer, prompt: str) -> tuple[str, float]:
    """A prompt with its greedy continuation of TOKENS tokens, and the smallest lead in it; 0 where it ends before."""
    ids = torch.tensor([tokenizer.encode(prompt)])
    rows = generate(model, ids, max_new_tokens=TOKENS, temperature=0.0)
    text = tokenizer.decode(rows[0].tolist())
    if rows.shape[1] - ids.shape[1] < TOKENS:
        return text, 0.0
    return text, leads(model, rows, ids.shape[1]).min().item()


def answer(model: Any, tokenizer: Tokenizer, content: Any, tools: Any) -> tuple[str, float]:
    """The greedy answer to a question, with its special tokens, and the smallest lead in it."""
    ids, pixel_values, image_sizes = encode_messages(user(content), tokenizer, model.config, tools)
    images: dict[str, Any] = {}
    if pixel_values is not None:
        images = {"pixel_values": pixel_values, "image_sizes": image_sizes}
    rows = generate(model, ids, max_new_tokens=TOKENS, temperature=0.0, **images)
    prompt = ids.shape[1]
    text = tokenizer.decode(rows[0, prompt:].tolist(), skip_special_tokens=False)
    return text, leads(model, rows, prompt, **images).min().item()


def make_constants() -> dict[str, Any]:
    """The content of CONSTANTS: model -> "prompt" and its "text", and the answers to QUESTIONS. Those whose lead is too
    small are printed and left out."""
    constants: dict[str, Any] = {}
    for name, questions in QUESTIONS.items():
        model, tokenizer = load(name)
        texts = {prompt: write_text(model, tokenizer, prompt) for prompt in PROMPTS}
        steady = {prompt: text for prompt, (text, lead) in texts.items() if lead >= LEAD}
        prompt = max(steady, key=lambda prompt: len(set(steady[prompt].split())))
        constants[name] = {"prompt": prompt, "text": steady[prompt]}
        print(f"{name}: {prompt!r}, lead {texts[prompt][1]:.3f}")
        for kind, (content, tools) in questions.items():
            words, lead = answer(model, tokenizer, content, tools)
            print(f"{name}: {kind}: {words!r}, lead {lead:.3f}")
            if lead >= LEAD:
                constants[name][kind] = words
    return constants


# ---------------------------------------------------------------------------------------------------- README.md


def output(line: str, typed: str = "") -> str:
    """What a command line prints, run in this process; blank lines are left out.

    Args:
        line: `python generate.py` and options.
        typed: the standard input.
    """
    stdout = io.StringIO()
    stdin = sys.stdin
    sys.stdin = io.StringIO(typed)
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(io.StringIO()) as stderr:
            code = command.main(shlex.split(line)[2:])
    finally:
        sys.stdin = stdin
    if code != 0:
        raise ValueError(f"{line}: {stderr.getvalue()}")
    return re.sub(r"\n\n+", "\n", stdout.getvalue()).lstrip("\n")


def conversation(line: str, shown: str) -> str:
    """A conversation in the terminal as it is shown: the lines after "> " are typed again."""
    typed = re.findall(r"^> (.*)$", shown, re.MULTILINE)
    answers = output(line, "\n".join(typed) + "\n").splitlines()
    if len(answers) != len(typed):
        raise ValueError(f"{line}: {len(typed)} lines have {len(answers)} lines of answers; allowed: one each")
    return "".join(f"> {question}\n{words}\n" for question, words in zip(typed, answers))


def with_outputs(page: str) -> str:
    """A page on which the outputs of the bundled model are made anew, greedily: a test checks that the usual settings
    draw the same tokens."""

    def make(match: re.Match[str]) -> str:
        outputs = ""
        for line in match[2].splitlines():
            if "--chat" in line:
                outputs += conversation(f"{line} --temperature 0", match[3])
            else:
                outputs += output(f"{line} --temperature 0")
        return match[1] + outputs

    return SHOWN.sub(make, page)


def main() -> None:
    """Write all files anew."""
    os.chdir(ROOT)  # the commands name files of examples/
    for directory in MODELS.values():
        Tokenizer.from_dir(directory).backend.save(str(directory / TOKENIZER), pretty=False)
    checkpoint.write_json(CONSTANTS, make_constants())
    README.write_text(with_outputs(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
