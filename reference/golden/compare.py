"""Compare a port with a golden trace, with NumPy and safetensors alone: which stage differs first.

    python compare.py mine.safetensors ministral/float64.safetensors --dtype float32

The port's file is .safetensors or .npz with names and shapes of the trace, or .npy with the logits. `--dtype` is the
type that the port computes in. Errors up to margin * (number of tolerances.json) * (largest number of the stage) agree.
Rows of padding and scores of hidden keys are not compared. Exit code: 0 all stages agree, 1 one differs, 2 the files
cannot be compared. `python -m reference diff` (needs PyTorch) reads more layouts and names known mistakes.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, deserialize

TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "BOOL": "?"}
TOLERANCES = json.loads((Path(__file__).resolve().parent / "tolerances.json").read_text())
STAGES = TOLERANCES["stages"]  # in the order of computing
LAYER = re.compile(r"(?<=layers\.)\d+")


def read(path):
    """The arrays of a file by name. Raises ValueError for a type that is not supported."""
    if path.suffix == ".npy":
        return {"logits": np.load(path, allow_pickle=False)}
    if path.suffix == ".npz":
        return dict(np.load(path, allow_pickle=False))
    arrays = {}
    for name, tensor in deserialize(path.read_bytes()):
        if tensor["dtype"] not in TYPES:
            raise ValueError(f"{path}: {name} is {tensor['dtype']}; supported: {', '.join(TYPES)}")
        arrays[name] = np.frombuffer(tensor["data"], TYPES[tensor["dtype"]]).reshape(tensor["shape"])
        if tensor["dtype"] == "BF16":  # the upper half of a float32
            arrays[name] = (arrays[name].astype(np.uint32) << 16).view(np.float32)
    return arrays


def place(name):
    """The key that sorts names in the order of computing."""
    point, layer, order = LAYER.sub("N", name), LAYER.search(name), list(STAGES)
    if layer is None:
        return order.index(point), 0, 0
    return order.index(point.partition(".N.")[0] + ".N.input_norm"), int(layer[0]), order.index(point)


def difference(name, mine, reference, dtype):
    """A line about the largest error of a stage; None if the stage agrees."""
    exact, stage = reference[name].astype(np.float64), STAGES[LAYER.sub("N", name)]
    if mine.shape != exact.shape or mine.dtype.kind not in "biuf":
        raise ValueError(f"{name} is {mine.dtype} {list(mine.shape)}; allowed: real numbers {list(exact.shape)}")
    dimensions, counted = stage["dimensions"].split(), np.ones(exact.shape, bool)
    padding_mask = reference.get("input.attention_mask")
    if padding_mask is not None and "B" in dimensions:
        sizes = dict(zip("BS", padding_mask.shape))
        counted &= padding_mask.astype(bool).reshape([sizes.get(dimension, 1) for dimension in dimensions])
    if name.endswith(".scores"):
        counted &= reference[name.replace("scores", "mask")][:, None]
    limit = np.full(exact.shape, TOLERANCES["margin"] * stage[dtype] * np.abs(exact[counted]).max())
    if name.endswith(".probabilities"):  # those of hidden keys are 0 in every type
        limit = np.where(reference[name.replace("probabilities", "mask")][:, None], limit, TOLERANCES["hidden"])
    error = np.where(counted, np.abs(mine.astype(np.float64) - exact), 0.0)
    excess = np.nan_to_num(error - limit, nan=np.inf)
    if excess.max() <= 0:
        return None
    worst = np.unravel_index(excess.argmax(), excess.shape)
    numbers = f"is {float(mine[worst]):.6g}, should be {exact[worst]:.6g} within {limit[worst]:.2g}"
    return f"{name} differs first, at {list(map(int, worst))}: {numbers}"


def main():
    """Compare the files of the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mine", type=Path)
    parser.add_argument("reference", type=Path, help="a float64 trace")
    parser.add_argument("--dtype", choices=["float64", "float32", "bfloat16"], default="float32")
    options = parser.parse_args()
    try:
        mine, reference = read(options.mine), read(options.reference)
        names = [name for name in mine if name in reference]
        if any(mine[name].tolist() != reference[name].tolist() for name in names if name.startswith("input.")):
            raise ValueError(f"{options.mine} is about other inputs than {options.reference}")
        stages = sorted((name for name in names if not name.startswith("input.")), key=place)
        if not stages or reference[stages[-1]].dtype not in (np.float64, bool):
            raise ValueError("no stage can be compared; allowed: names of a float64 trace")
        different = [difference(name, mine[name], reference, options.dtype) for name in stages]
    except (OSError, ValueError, SafetensorError, EOFError) as error:
        print(error, file=sys.stderr)
        return 2
    print(next((line for line in different if line), f"{len(stages)} stages agree in {options.dtype}"))
    return int(any(different))


if __name__ == "__main__":
    sys.exit(main())
