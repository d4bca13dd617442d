"""Execute the notebooks with all their assertions.

    python -m notebooks                     # all of them; print the time of each, write nothing
    python -m notebooks --write 02 03       # those whose names begin with 02 or 03; write their outputs to the files
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from checkpoint import replace_file
from cli import Parser, exit_code

HERE = Path(__file__).resolve().parent
LIMIT = 10**6  # bytes of a notebook with its outputs


def execute(path: Path) -> Any:
    """The notebook with new outputs, and without what would be different in another run. The notebook also saves a
    figure in images/.

    Raises:
        ValueError: a cell fails; the message is its last line.
    """
    notebook: Any = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    client = NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(HERE)}},
        record_timing=False, extra_arguments=["--IPKernelApp.log_level=40"],
    )  # fmt: skip
    try:
        client.execute()
    except CellExecutionError as error:
        raise ValueError(f"{path.name}: {error.ename}: {error.evalue}") from error
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata = {"kernelspec": kernel}
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02}"
        cell.metadata = {}
    return notebook


def _write(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def run(options: argparse.Namespace) -> int:
    """Execute, and write if that is asked for."""
    beginnings = tuple(options.names)
    paths = sorted(HERE.glob("*.ipynb"))
    if beginnings:
        paths = [path for path in paths if path.name.startswith(beginnings)]
    if not paths:
        raise ValueError(f"no notebook begins with {', '.join(beginnings)}")
    for path in paths:
        start = time.perf_counter()
        figures = {figure: figure.read_bytes() for figure in HERE.glob("images/*.png")}
        notebook = execute(path)
        if not options.write:
            for figure, old in figures.items():
                figure.write_bytes(old)
        content = f"{nbformat.writes(notebook).rstrip()}\n".encode()  # type: ignore[no-untyped-call]
        size = len(content)
        if size > LIMIT:
            raise ValueError(f"{path.name} has {size:,} bytes with its outputs; allowed: {LIMIT:,}")
        if options.write:
            replace_file(path, partial(_write, content))
        print(f"{path.name}: {time.perf_counter() - start:.0f} s, {size // 1000} kB", flush=True)
    print(f"{len(paths)} passed, 0 failed")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit code."""
    parser = Parser(prog="python -m notebooks", description="Execute the notebooks.")
    parser.add_argument("names", nargs="*", metavar="01", help="only notebooks whose names begin with this")
    parser.add_argument("--write", action="store_true", help="write the outputs to the notebooks")
    options = parser.parse_args(arguments)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
