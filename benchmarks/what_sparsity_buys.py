"""What sparsity buys where: bytes on disk, packed, peak memory, tokens per second, beside the dense model's.

    python benchmarks/what_sparsity_buys.py DENSE PRUNED SLIM...

Each model is measured in a process of its own, all of them in turn, so that a busy machine slows all. It prints shares
of the dense model's figures, which are the sizes and torch's columns in docs/what-sparsity-buys.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np
from results import RESULTS, append, row
from structured_speed import in_process

from gpmetric.errors import GpmetricError
from gpmetric.packing.pack import pack

UNITS = ("bytes", "bytes packed", "MiB peak", "tokens/s", "tokens/s decoded")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", type=Path, help="the directory that the others are compared with")
    parser.add_argument("others", type=Path, nargs="*", metavar="DIR", help="of pruned or slim models")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--csv", type=Path, default=RESULTS, help="rows are appended here; - for nowhere")
    options = parser.parse_args()
    folders = [options.dense, *options.others]
    try:
        found = {folder.name: measured(folder) for folder in folders}
        for _ in range(options.repeats):
            for folder in folders:
                for unit, values in in_process(folder, 1).items():
                    found[folder.name][unit] += values
    except GpmetricError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    dense = found[options.dense.name]
    print("| model | " + " | ".join(UNITS) + " |\n" + "|---" * (len(UNITS) + 1) + "|")
    for name, one in found.items():
        ratios = [np.median(one[unit]) / np.median(dense["bytes" if "packed" in unit else unit]) for unit in UNITS]
        print(f"| {name} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")
        if str(options.csv) != "-":
            base = (float(np.median(dense[unit])) for unit in UNITS)
            append([row("what sparsity buys", f"{name}, {unit}", np.array(one[unit]), next(base), unit)
                    for unit in UNITS], options.csv)  # fmt: skip
    return 0


def measured(folder: Path) -> dict[str, list[float]]:
    """What does not vary: the size of its archive."""
    with tempfile.TemporaryDirectory() as place:
        archive = Path(place) / "archive"
        pack(str(folder), output=archive)
        return defaultdict(list) | {"bytes packed": [archive.stat().st_size]}


if __name__ == "__main__":
    sys.exit(main())
