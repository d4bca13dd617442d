"""Compare a port with a golden trace, with NumPy and safetensors alone: which stage differs first.

    python compare.py mine.safetensors ministral/float64.safetensors --dtype float32

The port's file is .safetensors or .npz with names and shapes of the trace, or .npy with the logits; --dtype: its type.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

TOLERANCES = json.loads((Path(__file__).resolve().parent / "tolerances.json").read_text())
ORDER = list(TOLERANCES["stages"])  # of computing
NUMBER = re.compile(r"(?<=^step\.)\d+|(?<=layers\.)\d+")


def read(path: Path) -> dict[str, Any]:
    """The arrays of a file by name. Raises ValueError for a type that NumPy does not have."""
    if path.suffix == ".npy":
        return {"logits": np.load(path, allow_pickle=False)}
    if path.suffix == ".npz":
        return dict(np.load(path, allow_pickle=False))
    try:
        return load_file(path)
    except TypeError as error:
        raise ValueError(f"{path}: {error}; allowed: bfloat16 stored as float32") from error


def general(name: str) -> str:
    """The name of a stage in tolerances.json: without its step, and with N for its layer."""
    return NUMBER.sub("N", name).removeprefix("step.N.")


def place(name: str) -> list[int]:
    """The key that sorts names in the order of computing."""
    first = next(stage for stage in ORDER if stage.startswith(general(name).partition(".N.")[0]))
    numbers = list(map(int, NUMBER.findall(name)))
    numbers.insert(name.count("step."), ORDER.index(first))
    return [*numbers, ORDER.index(general(name))]


def difference(name: str, mine: Any, reference: dict[str, Any], dtype: str) -> str | None:
    """A line about the largest error of a stage, but for padding and scores of hidden keys; None if it agrees."""
    exact = reference[name].astype(np.float64)
    stage = TOLERANCES["stages"][general(name)]
    if mine.shape != exact.shape or mine.dtype.kind not in "biuf":
        raise ValueError(f"{name} is {mine.dtype} {list(mine.shape)}; allowed: real, {list(exact.shape)}")
    counted = np.ones(exact.shape, bool)
    padding_mask = reference.get("input.attention_mask")
    if padding_mask is not None and "B" in stage["dimensions"]:
        sizes = dict(zip("BS", padding_mask.shape))
        counted &= padding_mask.reshape([sizes.get(dim, 1) for dim in stage["dimensions"]]) > 0
    if name.endswith(".scores"):
        counted &= reference[name.replace("scores", "mask")][:, None]
    limit = np.full(exact.shape, TOLERANCES["margin"] * stage[dtype] * abs(exact[counted]).max())
    if name.endswith(".probabilities"):  # those of hidden keys are 0 in every type
        visible = reference[name.replace("probabilities", "mask")][:, None]
        limit = np.where(visible, limit, TOLERANCES["hidden"])
    excess = np.where(counted, abs(mine.astype(np.float64) - exact) - limit, -1.0)
    worst = np.unravel_index(np.nan_to_num(excess, nan=np.inf).argmax(), excess.shape)
    if excess[worst] <= 0:
        return None
    numbers = f"is {float(mine[worst]):.6g}, should be {exact[worst]:.6g} within {limit[worst]:.2g}"
    return f"{name} differs first, at {[int(i) for i in worst]}: {numbers}"


def main() -> int:
    """Compare two files; return 0 if all stages agree, 1 if one differs, 2 if nothing could be compared."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("mine", type=Path)
    parser.add_argument("reference", type=Path, help="a float64 trace")
    parser.add_argument("--dtype", choices=["float64", "float32", "bfloat16"], default="float32")
    options = parser.parse_args()
    try:
        mine, reference = read(options.mine), read(options.reference)
        both = mine.keys() & reference.keys()
        if any(mine[name].tolist() != reference[name].tolist() for name in both if name.startswith("input.")):
            raise ValueError(f"{options.mine} is about other inputs than {options.reference}")
        stages = sorted((name for name in both if general(name) in ORDER), key=place)
        if not stages or reference[stages[-1]].dtype not in (np.float64, bool):
            raise ValueError("nothing can be compared; allowed: stages of a float64 trace")
        lines = [difference(name, mine[name], reference, options.dtype) for name in stages]
    except (OSError, ValueError, EOFError, SafetensorError, BadZipFile) as error:
        print(error, file=sys.stderr)
        return 2
    print(next((line for line in lines if line), f"{len(stages)} stages agree in {options.dtype}"))
    return int(any(lines))


if __name__ == "__main__":
    sys.exit(main())
