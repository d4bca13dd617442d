"""The chat template of a model directory, and whether its conversations are laid out as Mistral's."""

from __future__ import annotations

import re
from pathlib import Path

from checkpoint import read_json

# Signs of other layouts in chat templates, and tokens that only other layouts have.
OTHER_MARKERS = re.compile(r"<\|[^|<>\s]{1,40}\|>|<start_of_turn>")
OTHER_TOKENS = ("<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "<|user|>")


def read_chat_template(directory: Path) -> tuple[str, str] | None:
    """The name of the file with the chat template of a model directory, and the template, Jinja's text. None without
    one. Among named templates, "default" is read."""
    for name in ("chat_template.jinja", "chat_template.json", "tokenizer_config.json"):
        path = directory / name
        if not path.is_file():
            continue
        if path.suffix == ".jinja":
            return name, path.read_text(encoding="utf-8", errors="replace")
        template = None
        content = read_json(path)
        if isinstance(content, dict):
            template = content.get("chat_template")
        if isinstance(template, list):
            entries = [entry for entry in template if isinstance(entry, dict)]
            template = {entry.get("name"): entry.get("template") for entry in entries}
        if isinstance(template, dict):
            template = template.get("default")
        if isinstance(template, str) and template:
            return name, template
    return None


def sign_of_other_layout(directory: Path, tokens: set[str]) -> str:
    """The reason why conversations are not laid out as Mistral's models know them; "" if there is none.

    The template decides where there is one; all of Mistral's have [INST]. Otherwise the added tokens decide.
    """
    named = read_chat_template(directory)
    if named is None:
        for token in OTHER_TOKENS:
            if token in tokens:
                return f"the tokenizer of {directory} has the token {token}"
        return ""
    name, template = named
    if "[INST]" in template:
        return ""
    reason = f"the chat template in {directory / name} has no [INST]"
    marker = OTHER_MARKERS.search(template)
    if marker:
        reason += f", but {marker.group()}"
    return reason
