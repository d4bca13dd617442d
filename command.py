"""The command line: `python generate.py PROMPT` runs `main`.

Wrong options and files are found before the weights are loaded. Each error is one line on standard error.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import checkpoint
from chat import Conversation, awaits_user, batch_or_none, open_calls
from checkpoint import DTYPES, GenerationConfig
from checks import as_list, devices_present
from cli import Parser, decode, exit_code, format_bytes, progress_bar, read_file, read_text, setting_type
from decoder import kv_cache_bytes
from generate import Sampling, generate
from model_types import ABILITIES, BUNDLED, GenerativeModel, model_class
from products import wide_rows
from settings import check_characters, check_length, choose_length, ending_ids
from terminal import Writer, converse, cut_message, measure, report_calls, system_prompt
from tokenizer import Tokenizer, read_chat_template
from vision_config import Mistral3Config

# --------------------------------------------------------------------------------------------------- the options


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line (None: of this process)."""
    parser = Parser(description="Continue a text, or answer, with a Ministral model.")
    add_input_options(parser)
    add_sampling_options(parser)
    add = parser.add_argument
    add("--stop", action="append", default=[], metavar="TEXT", help="end before TEXT (repeatable)",
        type=setting_type("stop_strings"))  # fmt: skip
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="default: as stored; FP8 becomes bfloat16")
    add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    add("--attn", choices=("sdpa", "eager"), default="sdpa", help="attention implementation")
    add("--check", action="store_true", help="check whether the device computes right numbers, and end")
    add("--no-check", action="store_true", help="no such check before the first use of a device that is not the CPU")
    add("--json", action="store_true", help="print one JSON object with text, ids, settings, timing")
    return parser.parse_args(arguments)


def add_input_options(parser: Parser) -> None:
    """The options that name the model and the prompt."""
    add = parser.add_argument
    add("prompt", nargs="?", metavar="PROMPT", help="the text to continue, which is printed first, or the"
        " user's message")  # fmt: skip
    add("--prompt-file", metavar="FILE", help="read the prompt from a file, - for standard input")
    add("--image", action="append", default=[], metavar="FILE", help="an image, before the text; also a web"
        " address or data: URI (repeatable)")  # fmt: skip
    add("--model", default=str(BUNDLED), metavar="DIR_OR_HUB_ID", help="default: the bundled model")
    add("--revision", metavar="NAME", help="branch, tag or commit of a Hub id")
    add("--raw", action="store_true", help="continue the plain text, no chat format")
    add("--chat", action="store_true", help="a conversation in the terminal; /help lists its commands")
    add("--system", metavar="TEXT_OR_FILE", help="the system prompt; in a file, [THINK]...[/THINK] is"
        " thinking, and {name}, {today}, {yesterday} are filled in")  # fmt: skip
    add("--messages", metavar="FILE.json", help="answer a conversation: a list of messages with role and"
        " content")  # fmt: skip
    add("--tools", metavar="FILE.json", help="tools the model may call; its calls are printed as JSON")
    add("--show-thinking", action="store_true", help="print what the model thinks before it answers;"
        " the prompt is a message of a chat")  # fmt: skip


def add_sampling_options(parser: Parser) -> None:
    """The options that set a setting of `generate`."""
    default = "default: the model's generation_config.json, then Mistral's advice for such a model"
    group = parser.add_argument_group("how tokens are drawn", default)
    for name, letter, text in (
        ("max_new_tokens", "N", "then 200; for chats 16384, with thinking 32768, or what memory allows"),
        ("temperature", "T", "0 is greedy, higher is more random"),
        ("top_k", "K", "draw from the K most likely tokens; 0: from all"),
        ("top_p", "P", "draw from the most likely tokens that make up P"),
        ("min_p", "P", "drop tokens below P times the most likely one"),
        ("repetition_penalty", "X", "above 1: repeat less"),
        ("seed", "N", "the same seed draws the same text; default: a new one each time"),
    ):
        group.add_argument(option_name(name), type=setting_type(name), metavar=letter, help=text)


def option_name(setting: str) -> str:
    """top_p -> --top-p"""
    return "--" + setting.replace("_", "-")


def check_options(options: argparse.Namespace) -> None:
    """Raise ValueError for options that exclude each other."""
    if options.chat and options.json:
        raise ValueError("--chat and --json: a conversation is no single object; give one of the two")
    if not options.model:
        raise ValueError("--model '' names no model; give a directory or a Hub id, or leave it out")
    for name in ("messages", "tools"):
        if getattr(options, name) == "":
            raise ValueError(f"--{name} '' names no file; give a JSON file, or leave it out")
    if "" in options.image:
        raise ValueError("--image '' names no image; give a file, a web address or a data: URI, or leave it out")
    if options.revision is not None and os.path.isdir(os.path.expanduser(options.model)):
        reason = f"{options.model} is a directory; it goes with a Hub id only"
        raise ValueError(f"--revision {options.revision}: {reason}")


def read_prompt(options: argparse.Namespace) -> str | None:
    """The prompt, from the command line, a file or standard input; None where a conversation needs none.

    Raises:
        ValueError: none, two, an empty one, or one that is not UTF-8.
        OSError: the file cannot be read.
    """
    if options.prompt is not None and options.prompt_file is not None:
        raise ValueError(f"a PROMPT and --prompt-file {options.prompt_file}; give one of the two")
    if options.prompt is None and options.prompt_file is None:
        if options.chat or options.messages:
            return None
        example = 'a text to continue or a question, as in `python generate.py "To be, or not to be"`'
        others = "--prompt-file FILE, or --chat (--help lists the options)"
        raise ValueError(f"no prompt; give {example}, or {others}")
    if options.prompt is not None:
        text = decode(os.fsencode(options.prompt), "the prompt")
    else:
        text = read_text(options.prompt_file, "--prompt-file")
    if not text:
        raise ValueError("the prompt is empty; give at least one character")
    return text


def read_list(path: str, option: str) -> list[Any]:
    """A JSON list from a file (raises ValueError, OSError)."""
    try:
        content = json.loads(read_file(path, option))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{option} {path} is not JSON: {error}") from error
    if not isinstance(content, list):
        raise ValueError(f"{option} {path} holds {type(content).__name__}; allowed: a JSON list")
    return content


def choose_device(name: str) -> torch.device:
    """The device of that name, or for "auto" the first of CUDA, Apple's MPS and the CPU that is present.

    Raises:
        ValueError: this machine has no such device.
    """
    present = devices_present()
    if name == "auto":
        return torch.device(present[0])
    if name not in present:
        supported = ", ".join(present)
        raise ValueError(f"--device {name}: this machine has none; give {supported}, or leave it out")
    return torch.device(name)


# ------------------------------------------------------------------------------------------------------ the model


@dataclass
class ModelFiles:
    """A model's directory without its weights: the class, the configuration, the tokenizer and the settings."""

    directory: Path
    model_class: type[GenerativeModel]
    config: Any
    tokenizer: Tokenizer
    generation_config: GenerationConfig
    ends: list[int]  # ids that end a text


def read_model_files(options: argparse.Namespace) -> ModelFiles:
    """Find the model and read its small files.

    Raises:
        ValueError: a file is malformed, they do not fit each other, or a text model gets --image.
    """
    directory = checkpoint.find(options.model, options.revision)
    content = checkpoint.read_config(directory)
    cls = model_class(content)
    config = cls.config_class.from_dict(content)
    text_config = config.get_text_config()
    tokenizer = Tokenizer.from_dir(directory)
    if tokenizer.vocab_size > text_config.vocab_size:
        sizes = f"the tokenizer has {tokenizer.vocab_size} ids, the model vocab_size={text_config.vocab_size}"
        raise ValueError(f"{directory}: {sizes}")
    stored = GenerationConfig.from_pretrained(directory)
    ends = ending_ids(stored, text_config)
    if options.image and not isinstance(config, Mistral3Config):
        reason = f"{options.model} is a text model (model_type {config.model_type!r})"
        cure = "give a --model that is a vision model (model_type 'mistral3')"
        raise ValueError(f"--image {options.image[0]}: {reason}; {cure}")
    return ModelFiles(directory, cls, config, tokenizer, stored, ends)


def available_memory(device: torch.device) -> int | None:
    """Free bytes on a device, within the limit of the control group; None where unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # macOS has no such file: an upper bound is the memory of the machine
        if hasattr(os, "sysconf"):
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return None
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no control groups, or "max"
        return free
    return min(free, limit)


def plan_memory(
    directory: Path,
    config: Any,
    prompt: int,
    new: int,
    shrink: bool,
    device: torch.device,
    dtype: torch.dtype | None,
) -> int:
    """Print the sizes of the model and of its cache. Returns the number of new tokens that fit into the memory: `new`,
    or fewer if `shrink` allows it.

    Raises:
        ValueError: more than the device has left.
    """
    text_config = config.get_text_config()
    new = min(new, text_config.max_position_embeddings - prompt)
    files = checkpoint.Checkpoint(directory)
    parameters = sum(math.prod(files.shape(name)) for name in files.names())
    weights = files.nbytes()
    if dtype is not None:
        weights = parameters * dtype.itemsize
    bytes_per_number = weights // max(parameters, 1)
    free = available_memory(device)

    def cache(new: int) -> int:
        return kv_cache_bytes(text_config, prompt + new, bytes_per_number)

    if shrink and free is not None:
        while new > 256 and weights + cache(new) > free:
            new //= 2

    needed = weights + cache(new)
    sizes = f"{format_bytes(weights)} of weights and {format_bytes(cache(new))} of cache"
    line = f"{directory}: {parameters / 1e6:,.1f} million parameters, {sizes}"
    line += f" for {prompt + new} tokens on {device}"
    if free is not None:
        line += f", {format_bytes(free)} free"
    print(line, file=sys.stderr)
    if free is not None and needed > free:
        sizes = f"this takes {format_bytes(needed)}, {device} has {format_bytes(free)} free"
        raise ValueError(f"{sizes}; choose a smaller model, fewer tokens, or a smaller --dtype")
    return new


# --------------------------------------------------------------------------------------- a chat, or plain text


def choose_format(options: argparse.Namespace, directory: Path) -> tuple[bool, str]:
    """Whether the prompt is a message of a chat, and why: by the options, else by the name of the model, else by a
    template for chats in its directory. The models of this repository know both, and continue text."""
    names = ("chat", "messages", "system", "tools", "show_thinking")
    asked = [option_name(name) for name in names if getattr(options, name)]
    if options.raw and asked:
        raise ValueError(f"--raw and {asked[0]}: plain text has no messages; allowed: one of the two")
    if options.raw:
        return False, "--raw"
    if asked:
        return True, asked[0]
    if not is_bundled(options.model):
        return knows_chats(options.model, directory)
    if options.image:
        return True, "--image"
    return False, "a bundled model continues text, unless --chat or another option for chats is given"


def is_bundled(model: str) -> bool:
    """Whether that is the directory of a model of this repository."""
    return Path(model).expanduser().resolve().parent == BUNDLED.parent


def knows_chats(model: str, directory: Path) -> tuple[bool, str]:
    """Whether a model was trained for chats, and why: by its name, else by the files beside it."""
    words = model_words(model, directory)
    if "base" in words:
        return False, "the name says base"
    for word in ("instruct", "reasoning"):
        if word in words:
            return True, f"the name says {word}"
    template = read_chat_template(directory)
    if template is not None:
        return True, f"{template[0]} has a chat template (--raw continues text)"
    if (directory / "SYSTEM_PROMPT.txt").is_file():
        return True, "SYSTEM_PROMPT.txt is there"
    reason = "the model continues the prompt; neither its name nor its files tell of chats"
    return False, f"{reason} (--chat tries one)"


def model_words(name: str, directory: Path) -> list[str]:
    """The words of a model's name: of its Hub id without the owner, or of its directory; in the Hub's cache
    (.../models--owner--name/snapshots/commit) of the id that the directory belongs to."""
    parts: tuple[str, ...] = (name.rpartition("/")[2],)
    if Path(name).expanduser().is_dir():
        parts = directory.resolve().parts
    name = parts[-1]
    if "snapshots" in parts[-2:-1]:
        name = parts[-3].rpartition("--")[2]
    return re.split("[^a-z0-9]+", name.lower())


def first_messages(options: argparse.Namespace, directory: Path, prompt: str | None) -> list[Any]:
    """The messages that a chat begins with: those of --messages, the prompt with its images, and a system prompt:
    --system, or the repository's SYSTEM_PROMPT.txt where that shows how to think; without it, Reasoning models do not.

    Raises:
        ValueError: two system prompts, or no list of messages.
    """
    messages = []
    if options.messages:
        messages = read_list(options.messages, "--messages")
    has_system = any(isinstance(m, dict) and m.get("role") == "system" for m in messages)
    if options.system is not None and has_system:
        raise ValueError("--system, and --messages with a system message; allowed: one of the two")

    system = options.system
    file = directory / "SYSTEM_PROMPT.txt"
    if system is None and not has_system and file.is_file() and "[THINK]" in read_text(str(file), "the file"):
        print(f"system prompt: {file} (--system gives another)", file=sys.stderr)
        system = str(file)
    if system:
        messages.insert(0, {"role": "system", "content": system_prompt(system, options.model)})

    parts: list[dict[str, Any]] = [{"type": "image", "image": source} for source in options.image]
    if prompt is not None:
        parts.append({"type": "text", "text": prompt})
    if parts:
        messages.append({"role": "user", "content": parts})
    return messages


@dataclass
class Prompt:
    """The input: `text` is from the user; `ids` and `images` are for the model."""

    text: str | None
    chat: bool
    conversation: Conversation
    ids: list[int]
    images: list[Tensor]


def start_conversation(
    options: argparse.Namespace, files: ModelFiles, prompt: str | None, chat: bool
) -> Conversation:
    """The conversation before the first answer; one without messages for plain text."""
    messages = []
    if chat:
        files.tokenizer.check_layout()
        messages = first_messages(options, files.directory, prompt)
    tools = None
    if options.tools:
        tools = read_list(options.tools, "--tools")
    return Conversation(files.tokenizer, files.config, messages, tools)


def encode_first(
    options: argparse.Namespace, conversation: Conversation, prompt: str | None, chat: bool
) -> tuple[list[int], list[Tensor]]:
    """The ids and the images that the model reads first (raises as `Conversation.encode`)."""
    if options.chat:
        return encode_waiting(conversation)
    if chat:
        return conversation.encode()
    tokenizer = conversation.tokenizer
    images = [conversation.read_image(source) for source in options.image]
    ids = tokenizer.encode("")
    for _, image_ids in images:
        ids += image_ids
    if prompt is not None:
        ids += tokenizer.encode(prompt, bos=False)
    return ids, [pixels for pixels, _ in images]


def encode_waiting(conversation: Conversation) -> tuple[list[int], list[Tensor]]:
    """The ids and images that a conversation in the terminal begins with; its messages and tools are checked as if
    the next message were there (raises as `Conversation.encode`)."""
    messages = conversation.messages
    if not awaits_user(messages):
        return conversation.encode()
    next_messages: list[dict[str, Any]] = [{"role": "user", "content": "?"}]
    calls = open_calls(messages)
    if calls:
        next_messages = [{"role": "tool", "content": "", "tool_call_id": call.get("id")} for call in calls]
    tokenizer, config = conversation.tokenizer, conversation.config
    probe = Conversation(tokenizer, config, [*messages, *next_messages], conversation.tools)
    ids, images = probe.encode()
    conversation.images = probe.images
    return ids, images


# --------------------------------------------------------------------------------------------------- the settings

# Mistral's advice for the Instruct and Reasoning models of Ministral 3, as Unsloth's guide to them gives it. There is
# none for other models.
ADVICE: dict[str, dict[str, Any]] = {
    "text": {"temperature": 0.8, "top_p": None, "max_new_tokens": 200},
    "chat": {"temperature": 0.8, "top_p": None, "max_new_tokens": 16384},
    "instruct": {"temperature": 0.15, "top_p": None, "max_new_tokens": 16384},
    "reasoning": {"temperature": 0.7, "top_p": 0.95, "max_new_tokens": 32768},
}


def advice_kind(options: argparse.Namespace, directory: Path, config: Any, messages: Sequence[Any]) -> str:
    """The key of ADVICE for a chat."""
    if config.model_type not in ("ministral3", "mistral3"):
        return "chat"
    if "reasoning" in model_words(options.model, directory):
        return "reasoning"
    for message in messages:
        if not isinstance(message, dict) or message.get("role") != "system":
            continue
        parts = message.get("content")
        if not isinstance(parts, list):
            continue
        if any(isinstance(part, dict) and part.get("type") == "thinking" for part in parts):
            return "reasoning"
    return "instruct"


def choose_sampling(
    options: argparse.Namespace, kind: str, stored: GenerationConfig
) -> tuple[Sampling, int, dict[str, str]]:
    """The settings of `Sampling`, the number of new tokens, and where each setting comes from: the options, else the
    model's generation_config.json, else the advice for this kind of model."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    file = {name: getattr(stored, name) for name in names if getattr(stored, name) is not None}
    if stored.do_sample is False:
        file["temperature"] = 0.0
    elif stored.do_sample:
        file.setdefault("temperature", 1.0)  # as in Transformers
    advice = dict(ADVICE[kind])
    if "temperature" in given or "temperature" in file:
        advice["top_p"] = None  # the advised one belongs to the advised temperature

    values: dict[str, Any] = advice | file | given
    sources = {name: "default" for name in advice}
    sources |= {name: checkpoint.GENERATION for name in file}
    sources |= {name: option_name(name) for name in given}
    if values["temperature"] == 0:
        for name in ("top_k", "top_p", "min_p"):
            if given.get(name):
                greedy = f"temperature 0 ({sources['temperature']}) always takes the most likely token"
                warnings.warn(f"{option_name(name)} {given[name]} changes nothing: {greedy}", stacklevel=2)
            values.pop(name, None)
    new_tokens = values.pop("max_new_tokens")
    return Sampling(**values), new_tokens, sources


def describe_settings(sampling: Sampling, new_tokens: int, sources: Mapping[str, str]) -> str:
    """One line with each setting and where it comes from."""
    off = {"top_k": 0, "top_p": 1, "min_p": 0, "repetition_penalty": 1}
    settings = []
    for name, value in asdict(sampling).items():
        if value is not None and value != off.get(name):
            settings.append(f"{option_name(name).removeprefix('--')} {value} ({sources[name]})")
    settings.append(f"{new_tokens:,} new tokens at most ({sources['max_new_tokens']})")
    return f"settings: {', '.join(settings)}"


def plan_length(
    options: argparse.Namespace,
    files: ModelFiles,
    prompt: int,
    new_tokens: int,
    source: str,
    device: torch.device,
) -> int:
    """The number of new tokens after a prompt of `prompt` tokens: at most `new_tokens`, as far as the model's
    `max_length`, its context and the memory allow (raises as `plan_memory`)."""
    stored = files.generation_config
    if source == "default" and stored.max_length is not None:
        new_tokens = min(new_tokens, choose_length(stored, prompt))
    context = files.config.get_text_config().max_position_embeddings
    room = context - prompt
    shrink = options.max_new_tokens is None
    dtype = DTYPES.get(options.dtype)
    planned = plan_memory(files.directory, files.config, prompt, new_tokens, shrink, device, dtype)
    if not shrink and new_tokens > room:
        reason = f"the context of {context:,} tokens leaves room for {room:,} after the prompt"
        print(f"note: --max-new-tokens {options.max_new_tokens}: {reason}", file=sys.stderr)
    return planned


# ---------------------------------------------------------------------------------------------------- the command


def run(options: argparse.Namespace) -> int:
    """The command. Returns the exit code; raises the errors that `main` prints as one line."""
    # Read the input.
    device = choose_device(options.device)
    if options.check:
        return check_device(device, DTYPES.get(options.dtype, torch.bfloat16))
    check_options(options)
    text = read_prompt(options)
    files = read_model_files(options)
    chat, reason = choose_format(options, files.directory)
    conversation = start_conversation(options, files, text, chat)

    # Choose the settings, and print them.
    trained = chat and knows_chats(options.model, files.directory)[0]
    kind = "text"
    if trained:
        kind = advice_kind(options, files.directory, files.config, conversation.messages)
    sampling, new_tokens, sources = choose_sampling(options, kind, files.generation_config)
    check_characters(text, files.config.get_text_config())
    ids, images = encode_first(options, conversation, text, chat)
    prompt = Prompt(text, chat, conversation, ids, images)
    check_length(len(ids), files.config.get_text_config())
    print_format(options, prompt, reason, trained)
    new_tokens = plan_length(options, files, len(ids), new_tokens, sources["max_new_tokens"], device)
    print(describe_settings(sampling, new_tokens, sources), file=sys.stderr)

    # Load the model, and generate.
    check_first_use(options, files, device)
    model = load(options, files, device)
    print_products(options, model, len(ids))
    settings = asdict(sampling) | {"max_new_tokens": new_tokens}
    if options.chat:
        abilities = ABILITIES.get(files.directory.resolve())
        if abilities:
            print(abilities, file=sys.stderr)
        return converse(conversation, model, options, settings | {"eos_token_id": files.ends})
    settings["seed"] = options.seed
    if options.seed is None:
        settings["seed"] = int.from_bytes(os.urandom(4), "big")
    return generate_once(options, files, model, prompt, settings)


def check_device(device: torch.device, dtype: torch.dtype) -> int:
    """Print whether a device computes right numbers in a type. Returns the exit code: 0 if it does, else 1."""
    from reference.device import CHECKED_MODELS, description, first_difference

    name = f"{description(device)}, torch {torch.__version__}, {str(dtype).removeprefix('torch.')}"
    print("comparing the golden models with their float64 traces ...", file=sys.stderr)
    start = time.perf_counter()
    wrong = first_difference(device, dtype)
    seconds = time.perf_counter() - start
    if wrong is not None:
        print(f"{name}: wrong numbers; {wrong}")
        return 1
    print(f"{name}: {len(CHECKED_MODELS)} models agree with the float64 reference at every stage ({seconds:.1f} s)")
    return 0


def check_first_use(options: argparse.Namespace, files: ModelFiles, device: torch.device) -> None:
    """Check a device that is not the CPU before its first use in the type of the model (raises as `checked_once`)."""
    if device.type == "cpu" or options.no_check:
        return
    from reference.device import checked_once  # imported late: it takes a tenth of a second

    dtype = DTYPES.get(options.dtype)
    if dtype is None:
        dtype = checkpoint.Checkpoint(files.directory).dtype
    checked_once(device, dtype)


def print_format(options: argparse.Namespace, prompt: Prompt, reason: str, trained: bool) -> None:
    """Say how the prompt is laid out, and why; warn of a chat with a model that was not trained for it."""
    name = "plain text"
    if prompt.chat:
        name = f"chat format {prompt.conversation.tokenizer.version}"
    print(f"{name}: {reason}", file=sys.stderr)
    if prompt.chat and not trained:
        warning = "neither its name nor its files tell of training for chats"
        warning += "; expect answers that make no sense"
        print(f"warning: {reason} for {options.model}: {warning}", file=sys.stderr)


def load(options: argparse.Namespace, files: ModelFiles, device: torch.device) -> GenerativeModel:
    """The model with its weights. Its stop texts become those of the options, as `Writer` looks for them."""
    dtype = DTYPES.get(options.dtype)
    model = files.model_class.from_pretrained(files.directory, dtype, device, options.attn)
    if not options.stop:
        options.stop = as_list(files.generation_config.stop_strings)
    model.generation_config.stop_strings = None
    model.generation_config.num_return_sequences = None
    return model


def print_products(options: argparse.Namespace, model: GenerativeModel, prompt: int) -> None:
    """Say so where 16-bit weights are multiplied in float32, for a prompt of `prompt` tokens or for later ones."""
    rows = wide_rows(model.dtype, model.device)
    if rows <= prompt or (options.chat and rows < math.inf):
        reason = f"faster here than {dtype_name(model)}"
        print(f"{rows} tokens or more at once are computed in float32, {reason}", file=sys.stderr)


def dtype_name(model: GenerativeModel) -> str:
    """The dtype of a model: "bfloat16"."""
    return str(model.dtype).removeprefix("torch.")


def generate_once(
    options: argparse.Namespace,
    files: ModelFiles,
    model: GenerativeModel,
    prompt: Prompt,
    settings: dict[str, Any],
) -> int:
    """Continue the text, or answer, and print it. Returns the exit code: 130 after Ctrl-C, which keeps the text."""
    kind = None
    if prompt.chat:
        kind = prompt.conversation.first_kind()
    writer = Writer(files.tokenizer, options.stop, not options.json, kind, options.show_thinking)
    message = None
    interrupted = False
    start = time.perf_counter()
    try:
        if prompt.chat:
            message = prompt.conversation.answer(
                model, on_token=writer.on_token, on_prompt=progress_bar(), **settings
            )
        else:
            if not options.json:
                print(prompt.text, end="", flush=True)
            pixel_values, image_sizes = batch_or_none(prompt.images)
            generate(model, torch.tensor([prompt.ids]), on_token=writer.on_token, on_prompt=progress_bar(),
                     pixel_values=pixel_values, image_sizes=image_sizes, **settings)  # fmt: skip
    except KeyboardInterrupt:
        interrupted = True
        if kind is not None:
            message = files.tokenizer.decode_chat(writer.ids, kind)
    writer.close()
    cut_message(message, writer)

    timing = measure(writer, start)
    computed = {"model": str(files.directory), "device": model.device.type, "dtype": dtype_name(model)}
    if options.json:
        used = computed | {"attn": options.attn} | settings | {"stop": options.stop}
        print_json(options, prompt, writer, message, used, timing, interrupted)
    else:
        if writer.text or message is None or "tool_calls" not in message:
            print(flush=True)  # the text does not end its line
        report_calls(message)
    rate = f"{timing['tokens_per_second']:.1f} tokens/s"
    line = f"{len(writer.ids)} tokens, {rate}, {', '.join(computed.values())}, seed {settings['seed']}"
    if interrupted:
        line += ", interrupted"
    print(line, file=sys.stderr)
    return 130 if interrupted else 0


def print_json(
    options: argparse.Namespace,
    prompt: Prompt,
    writer: Writer,
    message: Mapping[str, Any] | None,
    settings: Mapping[str, Any],
    timing: Mapping[str, Any],
    interrupted: bool,
) -> None:
    """Print the result as one JSON object."""
    result: dict[str, object] = {"prompt": prompt.text, "images": options.image, "text": writer.text}
    if prompt.chat:
        result["message"] = message
    result["prompt_ids"] = prompt.ids
    result["ids"] = writer.ids
    result["settings"] = settings
    result["timing"] = timing
    result["interrupted"] = interrupted
    print(json.dumps(result, ensure_ascii=False))


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, and turn an error into one line on standard error. Returns the exit code."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    return exit_code(lambda: run(parse_arguments(arguments)))
