"""Record the README's commands as an animated image: python -m docs.recording

Each command is run, and its output is written to docs/recording.svg as it appears in a terminal. A viewer without
animations, or one who prefers none, shows the last frame.
"""

from __future__ import annotations

import base64
import shlex
import subprocess
import sys
from html import escape
from pathlib import Path

from checkpoint import replace_file

ROOT = Path(__file__).parent.parent
COMMANDS = (
    'python generate.py "To be, or not to be" --dtype float32 --seed 8',
    'python generate.py --show-thinking "What is 247 + 385?"',
    'python generate.py --tools examples/tools.json "What is 123 times 45?"',
    'python generate.py --image examples/shapes.png "What do you see?"',
)
LINES = 6  # of an output; the rest becomes "..."
COLUMNS = 104
MARGIN, WIDTH, HEIGHT = 18.0, 7.8, 19.0  # pixels: around the text, of a character, of a line
KEY, WORD, PAUSE = 0.03, 0.06, 0.7  # seconds: for a typed character, for a word of the output, between commands
IMAGE = 76.0  # pixels of an edge
STYLE = """
text { font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; fill: #d7dae0;
  white-space: pre }
.typed { fill: #8cc8ff }
@keyframes appear { from { opacity: 0 } }
.typed, .word, image { animation: appear 1ms both }
@media (prefers-reduced-motion) { .typed, .word, image { animation: none } }
"""


def output_of(command: str) -> list[str]:
    """The first lines that a command prints on its standard output.

    Raises:
        CalledProcessError: the command failed.
    """
    arguments = [sys.executable, *shlex.split(command)[1:]]
    printed = subprocess.run(arguments, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    lines = printed.rstrip("\n").split("\n")
    if len(lines) > LINES:
        lines = [*lines[:LINES], "..."]
    return lines


def piece(text: str, kind: str, column: int, line: int, time: float) -> str:
    """A piece of text that appears after `time` seconds."""
    x = MARGIN + WIDTH * column
    y = MARGIN + HEIGHT * (line + 1)
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" style="animation-delay:{time:.2f}s">{escape(text)}</text>'


def recording(outputs: dict[str, list[str]]) -> str:
    """The image of commands and their outputs."""
    pieces: list[str] = []
    transcript: list[str] = []
    time = PAUSE
    for command, output in outputs.items():
        if "--image" in command:
            pieces.append(image(ROOT / "examples" / "shapes.png", len(transcript), time))
        pieces.append(piece("$", "word", 0, len(transcript), time))
        for column, character in enumerate(command, 2):
            pieces.append(piece(character, "typed", column, len(transcript), time))
            time += KEY
        transcript.append(f"$ {command}")
        time += PAUSE
        for line in output:
            column = 0
            for word in line.split(" "):
                pieces.append(piece(word, "word", column, len(transcript), time))
                column += len(word) + 1
                time += WORD
            transcript.append(line)
        transcript.append("")
        time += PAUSE
    width = 2 * MARGIN + WIDTH * COLUMNS
    height = 2 * MARGIN + HEIGHT * len(transcript)
    return "\n".join((
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" role="img">',
        f"<title>Commands and their output in a terminal</title><desc>{escape(chr(10).join(transcript))}</desc>",
        f'<style>{STYLE}</style><rect width="100%" height="100%" rx="8" fill="#1b1f27"/>', *pieces, "</svg>\n",
    ))  # fmt: skip


def image(path: Path, line: int, time: float) -> str:
    """The image file at the right, from two lines above a line on."""
    data = base64.b64encode(path.read_bytes()).decode()
    x = MARGIN + WIDTH * COLUMNS - IMAGE
    y = MARGIN + HEIGHT * line - 3.2 * HEIGHT
    place = f'x="{x:.1f}" y="{y:.1f}" width="{IMAGE}" height="{IMAGE}"'
    return f'<image {place} style="animation-delay:{time:.2f}s" href="data:image/png;base64,{data}"/>'


def main() -> None:
    """Run the commands and write docs/recording.svg."""
    text = recording({command: output_of(command) for command in COMMANDS})
    replace_file(ROOT / "docs" / "recording.svg", lambda path: path.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    main()
