"""DPC-KNN, exact and in bounded memory: density peaks with k nearest neighbours."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from sklearn.metrics import pairwise_distances, pairwise_distances_chunked


def dpc_knn(points: np.ndarray, num_clusters: int, neighbours: int = 5, memory_mib: int = 1024) -> np.ndarray:
    """Cluster labels by density peaks (Rodriguez and Laio 2014; the k-nearest-neighbour form of Du et al. 2016, as in
    upstream's code).

    With distances dist = Euclidean / sqrt(d): density_i = exp(-mean of the k smallest squared distances of i, its own
    zero included); delta_i = distance to the nearest point of higher density, for the densest point the largest
    distance of all; centres are the `num_clusters` points of highest delta * density; every point joins its nearest
    centre, and a centre itself. Equal densities, products and distances go by position, where upstream adds noise.

    Args:
        points (`np.ndarray` of shape `(n, d)`): float32 or float64.
        num_clusters (`int`): at most so many clusters; no more than n.
        neighbours (`int`): k, the point itself counted.
        memory_mib (`int`): distances held at once. Where all n * n of them fit they are computed once, else twice, in
            blocks of rows.

    Returns:
        `np.ndarray` of shape `(n,)`, int64: the cluster of each point, 0 for that of the highest centre.
    """
    count, width = points.shape
    if count == 0:
        return np.zeros(0, dtype=np.int64)
    scale = np.sqrt(width)
    nearest = min(neighbours, count)
    keep_all = count * count * points.dtype.itemsize <= memory_mib * 2**20
    blocks, spread, largest = [], np.empty(count), 0.0

    def distances() -> Iterator[np.ndarray]:
        return pairwise_distances_chunked(points, metric="euclidean", working_memory=memory_mib)

    start = 0
    for block in distances():
        block /= scale
        closest = np.partition(block, nearest - 1, axis=1)[:, :nearest].astype(np.float64)
        spread[start : start + len(block)] = (closest**2).mean(axis=1)
        largest = max(largest, float(block.max()))
        start += len(block)
        if keep_all:
            blocks.append(block)

    order = np.lexsort((np.arange(count), spread))  # densest first; ties by position
    rank = np.empty(count, dtype=np.int64)
    rank[order] = np.arange(count)
    delta, start = np.empty(count), 0
    for block in blocks or (block / scale for block in distances()):
        denser = rank[None, :] < rank[start : start + len(block), None]
        delta[start : start + len(block)] = np.where(denser, block, np.inf).min(axis=1)
        start += len(block)
    delta[order[0]] = largest

    centres = np.argsort(-(delta * np.exp(-spread)), kind="stable")[:num_clusters]
    to_centres = pairwise_distances(points, points[centres], metric="euclidean")
    labels = to_centres.argmin(axis=1)
    labels[centres] = np.arange(len(centres))
    return labels
