"""DPC-KNN on many candidates: seconds and the most memory that the process took.

python scripts/benchmark_clustering.py --count 50000 --width 4096
"""

from __future__ import annotations

import resource
import time
from typing import Annotated

import numpy as np
import typer

from transformers_rbl.building.clustering import dpc_knn


def main(
    count: Annotated[int, typer.Option(min=1)] = 50_000,
    width: Annotated[int, typer.Option(min=1)] = 4096,
    clusters: Annotated[int, typer.Option(min=1)] = 64,
    memory_mib: Annotated[int, typer.Option(min=1, help="Distances held at once.")] = 1024,
) -> None:
    """Cluster random points around as many centres."""
    random = np.random.default_rng(0)
    centres = random.standard_normal((clusters, width), dtype=np.float32)
    points = random.standard_normal((count, width), dtype=np.float32)
    points *= 0.5
    points += centres[random.integers(0, clusters, count)]
    start = time.perf_counter()
    labels = dpc_knn(points, clusters, memory_mib=memory_mib)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{count} x {width}: {seconds:.0f} s, {len(np.unique(labels))} clusters, at most {peak:.2f} GiB")


if __name__ == "__main__":
    typer.run(main)
