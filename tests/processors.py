"""Run the numerical tests as other processors would run them: python -m tests.processors

PyTorch, MKL and oneDNN choose their kernels by the instructions of the processor. The variables below hide
instructions, so one machine runs the kernels of others: without AVX-512, without AVX2, without bfloat16 products. These
settings run with one thread, one process for each core, with few examples. Before them, the tests of attention and
products run with two threads and no other process. One line for each setting shows the result. A processor without
AVX-512 leaves out the settings that hide only that.

Slow tests run with `--all`. Other arguments are passed on to pytest. This tries more examples of one file:

    python -m tests.processors --hypothesis-profile=default tests/test_cache.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

TWO_THREADS = {"OMP_NUM_THREADS": "2"}
# With one thread all of them: two processes with two threads each on two cores take four times as long.
SETTINGS: tuple[dict[str, str], ...] = (
    {"ATEN_CPU_CAPABILITY": "default"},
    {"MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    {"MKL_CBWR": "COMPATIBLE"},
    {"ONEDNN_MAX_CPU_ISA": "SSE41"},
)
WITHOUT_AVX512: tuple[dict[str, str], ...] = ({"ATEN_CPU_CAPABILITY": "avx2"}, {"ONEDNN_MAX_CPU_ISA": "AVX2"})
NUMERICAL = (
    "parity", "cache", "heads", "vision", "generate", "fast", "blockwise", "products", "reference", "diff", "explain",
)  # fmt: skip
WITH_TWO_THREADS = ("parity", "fast", "blockwise", "products")
# Not of numbers, or slow: the network, the command line, compilers.
LEFT_OUT = " and ".join(f"not {word}" for word in (
    "address", "server", "compile", "export", "command", "planted", "example"))  # fmt: skip
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MUTANT_RUNS": "1"}
ROOT = Path(__file__).resolve().parent.parent


def run(setting: dict[str, str], arguments: list[str]) -> tuple[int, str]:
    """The exit code and the output of pytest under a setting."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    environment = {key: value for key, value in os.environ.items() if key != "CI"} | ONE_THREAD | setting
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def main(arguments: list[str]) -> int:
    """Run pytest under every setting; return 1 if one fails."""
    if not any(argument.startswith("--hypothesis-profile") for argument in arguments):
        arguments = ["--hypothesis-profile=quick", *arguments]
    if "--all" not in arguments:
        arguments = [*arguments, "-m", "not slow"]
    in_two_threads = arguments
    if not any(argument.startswith("tests/") for argument in arguments):
        arguments = [*arguments, "-k", LEFT_OUT]
        in_two_threads = [*arguments, *(f"tests/test_{name}.py" for name in WITH_TWO_THREADS)]
        arguments = [*arguments, *(f"tests/test_{name}.py" for name in NUMERICAL)]
    red = report(TWO_THREADS, run(TWO_THREADS, in_two_threads))
    settings = SETTINGS
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        settings += WITHOUT_AVX512
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda setting: run(setting, arguments), settings)
        for setting, result in zip(settings, results):
            red = max(red, report(setting, result))
    return red


def report(setting: dict[str, str], result: tuple[int, str]) -> int:
    """Print a setting and the last line of its output, or all of it if a test failed; return 1 in that case."""
    code, output = result
    name = " ".join(f"{key}={value}" for key, value in setting.items())
    print(f"{name}: {output.strip().splitlines()[-1]}", flush=True)
    if code == 0:
        return 0
    print(output, flush=True)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
