"""Hypothesis profiles, the devices the numerical tests run on, and options for published weights."""

import logging
import os
import sys
import warnings
from importlib import metadata

import hypothesis
import pytest
import torch

if not any(argument.startswith("--weights") for argument in sys.argv):
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing else in the tests may reach the network

# 10 examples by default, 30 with `pytest --all`. Few where the same tests run many times (tests/processors.py). More
# with `pytest --hypothesis-profile=thorough`.
for name, examples in (("default", 10), ("all", 30), ("quick", 5), ("thorough", 200)):
    hypothesis.settings.register_profile(
        name,
        max_examples=examples,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        print_blob=True,
    )
# The same examples every time: whether a mistake is found must not depend on the draw.
hypothesis.settings.register_profile("mutants", hypothesis.settings.get_profile("default"), max_examples=40,
                                     phases=[hypothesis.Phase.generate], database=None, derandomize=True)  # fmt: skip
hypothesis.settings.load_profile("default")


def at_most(examples: int) -> hypothesis.settings:
    """Fewer examples for a test that is slow: that many, or those of the profile if these are fewer."""
    return hypothesis.settings(max_examples=min(examples, hypothesis.settings().max_examples))

# `pytest -n auto` starts a process for each core. Each takes one thread, also in the commands that tests start: two
# processes with two threads each on two cores take four times as long.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
elif "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(2)


class DeprecationHandler(logging.Handler):
    """Turns what Transformers logs about deprecated names into a FutureWarning, which is an error (pyproject.toml).
    Others of its deprecations are a FutureWarning already."""

    def emit(self, record: logging.LogRecord) -> None:
        if "deprecat" in record.getMessage().lower():
            warnings.warn(record.getMessage(), FutureWarning, stacklevel=2)


logging.getLogger("transformers").addHandler(DeprecationHandler(logging.WARNING))


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of this project's tests: published weights are too large to be part of the repository."""
    more = "slow tests, too (those of a named file always run), and three times the examples"
    parser.addoption("--all", action="store_true", help=more)
    parser.addoption("--weights-8b-2410", metavar="DIR_OR_HUB_ID", help="Ministral-8B-Instruct-2410")
    parser.addoption("--weights", metavar="DIR_OR_HUB_ID", help="any published Ministral, compared with Transformers")


def pytest_configure(config: pytest.Config) -> None:
    """More examples with --all. (A profile that is given by name is loaded after this.)"""
    if config.getoption("--all"):
        hypothesis.settings.load_profile("all")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip slow tests without --all, unless files or tests are named."""
    named = [argument for argument in config.args if argument.partition("::")[0].endswith(".py")]
    if config.getoption("--all") or named:
        return
    for item in items:
        if item.get_closest_marker("slow") is not None:
            item.add_marker(pytest.mark.skip(reason="slow; --all runs it"))


def older(package: str, *version: int) -> bool:
    """Whether the installed package is older than a version of two numbers."""
    return tuple(map(int, metadata.version(package).split(".")[:2])) < version


# What these tests assert does not hold with older versions.
newer_torch = pytest.mark.skipif(older("torch", 2, 11), reason="needs torch 2.11 or later")
newer_transformers = pytest.mark.skipif(older("transformers", 5, 20), reason="needs transformers 5.20 or later")

CUDA = pytest.param(
    "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
)


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> str:
    """Run a numerical test on the CPU, and on CUDA where there is a GPU, without TF32."""
    if request.param == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        assert torch.get_float32_matmul_precision() == "highest"
    return str(request.param)
