"""Hostile inputs to every surface, as a table: python -m tests.fuzz CASES

CASES are shared among the surfaces as in the tests. Faults are printed with their numbers."""

from __future__ import annotations

import resource
import sys
import time
from collections import Counter

import torch
from tqdm import tqdm

from tests.fuzz.surfaces import SURFACES, run

SLOW = 2.0  # seconds


def main(cases: int) -> int:
    """Print a table in Markdown; returns 1 if there is a fault."""
    torch.set_num_threads(1)
    faults = 0
    print("| surface | cases | accepted | refused in one line | faults | over 2 s | peak memory |")
    print("|---|---|---|---|---|---|---|")
    total = sum(share for _, share in SURFACES.values())
    for name, (_, share) in SURFACES.items():
        found: Counter[str] = Counter()
        count = cases * share // total
        for number in tqdm(range(count), name, leave=False, delay=2):
            start = time.perf_counter()
            try:
                found[run(name, number)] += 1
            except (KeyboardInterrupt, MemoryError):
                raise
            except BaseException as error:
                found["fault"] += 1
                print(f"{name} {number}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr)
            found["slow"] += time.perf_counter() - start > SLOW
        faults += found["fault"]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000  # kilobytes on Linux
        counts = " | ".join(f"{found[key]:,}" for key in ("accepted", "refused", "fault", "slow"))
        print(f"| {name} | {count:,} | {counts} | {peak:,.0f} MB |", flush=True)
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
