"""Peak memory of encoding images with the published encoder (403 million parameters, random here, bfloat16).

    python -m benchmarks.vision_memory [--edge 1540] [--images 1] [--attn sdpa]

Prints the resident memory before the call, its peak during the call, and the size of a mask over all patches.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time

import torch

from vision import PixtralVisionModel
from vision_config import Mistral3Config


def peak() -> float:
    """The highest resident memory of this process so far, in GB."""
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform != "darwin":
        highest *= 1024  # only macOS counts in bytes
    return highest / 1e9


@torch.inference_mode()
def main() -> None:
    """Measure once."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--edge", type=int, default=1540, help="pixels, default: 1540, the largest image")
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--attn", choices=("sdpa", "eager"), default="sdpa")
    options = parser.parse_args()
    config = Mistral3Config(attn_implementation=options.attn).vision_config
    torch.set_default_dtype(torch.bfloat16)
    model = PixtralVisionModel(config).eval()
    pixels = torch.zeros(options.images, 3, options.edge, options.edge)
    before = peak()
    start = time.perf_counter()
    out = model(pixels).last_hidden_state
    seconds = time.perf_counter() - start
    patches = out.shape[1]
    size = f"{options.images} x {options.edge} x {options.edge} pixels"
    print(f"{size}, {patches} patches, {options.attn}, bfloat16:")
    print(f"{before:.2f} GB before, {peak() - before:.2f} GB more at the peak, {seconds:.0f} s")
    print(f"one mask over all patches would take {patches**2 * 2 / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
