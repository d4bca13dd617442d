"""Put every mistake of the catalogue into the model and run quick tests of ours: python -m tests.mutation

Prints a line for each: the mistake and the exit code of pytest, 1 where a test turned red. Everything is imported once
and nothing computed, then each run is a fork of that, two at a time.
"""

import importlib
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import hypothesis
import pytest
import torch

from reference.mutants import MUTANTS

PARITY = ["tests/test_parity.py", "-k", "cpu and identical"]
# Where parity cannot see it, as in the whole of a text without padding, another test must.
VISION, GENERATE = (["tests/test_vision.py", "-k", "cpu and (equal or identical or image)"],
                    ["tests/test_generate.py", "-k", "alone or greedy"])  # fmt: skip
CACHE = ["tests/test_cache.py", "-k", "cpu and any_chunks"]
FP8 = ["tests/test_diff.py", "-k", "fp8_copies and ministral3"]
TESTS = {
    "merger_patch_by_patch": VISION,
    "vision_axes_swapped": VISION,
    "positions_through_padding": GENERATE,
    "query_scale_by_cache_position": GENERATE,
    "ring_slot_off_by_one": CACHE,
    "fp8_bytes_as_numbers": FP8,
    "fp8_scale_ignored": FP8,
    "fp8_scale_divided": FP8,
}
RIGHT = {"parity": PARITY, "vision": VISION, "generate": GENERATE, "cache": CACHE, "fp8": FP8}  # without a mistake
QUIET = ["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-profile=mutants"]
FORKING = threading.Lock()


def red(mutant):
    """The exit code of pytest in a forked process in which the mistake is made."""
    with FORKING:  # filelock, which huggingface_hub imports, refuses two forks at once
        child = os.fork()
    if child == 0:
        code = 70
        try:
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, 1)
            os.dup2(nothing, 2)
            if mutant in RIGHT:
                code = int(pytest.main([*RIGHT[mutant], *QUIET]))
            else:
                with MUTANTS[mutant].applied():
                    code = int(pytest.main([*TESTS.get(mutant, PARITY), *QUIET]))
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main():
    importlib.import_module("tests.conftest")
    hypothesis.settings.load_profile("mutants")  # which tests take when they are imported
    for name in ("parity", "vision", "generate", "cache", "diff"):
        importlib.import_module(f"tests.test_{name}")
    torch.set_num_threads(1)
    names = [*RIGHT, *MUTANTS]
    with ThreadPoolExecutor(2) as pool:
        for name, code in zip(names, pool.map(red, names)):
            print(name, code, flush=True)


if __name__ == "__main__":
    sys.exit(main())
