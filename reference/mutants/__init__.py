"""A catalogue of the mistakes that ports of these models make, each as a switch on the models of this project.

    with MUTANTS["window_plus_1"].applied():
        model(input_ids)                            # computes what the port with that mistake computes

A switch replaces a function or a method of the models (or `checks.as_positions`) for a while; the models have no code
for it. `python -m reference mutants` lists them. `python -m reference diff` looks for the one that reproduces a
port's numbers, and the tests are checked with them: each must turn one red.

    catalogue.py    what a mistake is, and how a switch enters the catalogue
    rotary.py       the layout of rotary pairs, theta, tables and angles in 16 bits
    yarn.py         YaRN's magnitude and frequencies
    positions.py    query scale, masks, windows, positions, the ring of the cache
    layers.py       attention, norm, MLP, head, vision
    weights.py      FP8 weights
"""

from __future__ import annotations

# In the order in which mistakes are listed.
# isort: off
from . import rotary, yarn, positions, layers, weights  # noqa: F401

# isort: on
from .catalogue import MUTANTS, ROUNDING, Mutant, Namespace, mutant, replace
from .rotary import rows

__all__ = ["MUTANTS", "ROUNDING", "Mutant", "Namespace", "mutant", "replace", "rows"]
