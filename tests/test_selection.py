"""DPC-KNN and the selection against loops written from the method, and what an empty result says."""

import numpy as np
import pytest
import torch

from transformers_rbl.building.clustering import dpc_knn
from transformers_rbl.building.recipe import Recipe
from transformers_rbl.building.selection import EmptyCodebookError, Probe, prototypes, select_prototypes


def literal_dpc_knn(points, clusters, k=5):
    n, d = points.shape
    dist = [[float(np.linalg.norm(points[i] - points[j]) / np.sqrt(d)) for j in range(n)] for i in range(n)]
    density = [np.exp(-np.mean([v * v for v in sorted(row)[:k]])) for row in dist]
    largest = max(max(row) for row in dist)
    denser = [[j for j in range(n) if (density[j], -j) > (density[i], -i)] for i in range(n)]
    delta = [min((dist[i][j] for j in denser[i]), default=largest) for i in range(n)]
    centres = sorted(range(n), key=lambda i: (-delta[i] * density[i], i))[:clusters]
    labels = [min(range(len(centres)), key=lambda c, i=i: (dist[i][centres[c]], c)) for i in range(n)]
    for number, centre in enumerate(centres):
        labels[centre] = number
    return labels


@pytest.mark.parametrize("memory_mib", [1024, 1e-3])
@pytest.mark.parametrize("clusters", [1, 4, 9, 80])
def test_labels_equal_the_transcription(clusters, memory_mib):
    random = np.random.default_rng(clusters)
    points = np.concatenate([random.normal(c, 0.4, (15, 6)) for c in (0, 2, 5)])
    assert dpc_knn(points, clusters, memory_mib=memory_mib).tolist() == literal_dpc_knn(points, clusters)
    single = dpc_knn(points.astype(np.float32), clusters, memory_mib=memory_mib)
    assert single.tolist() == literal_dpc_knn(points, clusters)


def test_ties_go_by_position_and_repeated_points_join_one_centre():
    points = np.array([[0.0], [0.0], [10.0], [10.0], [20.0], [20.0]], dtype=np.float32)
    labels = dpc_knn(points, 3, neighbours=2)
    assert labels[0] == labels[1] and labels[2] == labels[3] and labels[4] == labels[5] and len(set(labels)) == 3
    assert np.array_equal(labels, dpc_knn(points, 3, neighbours=2))
    assert sorted(dpc_knn(points, 6, neighbours=2)) == list(range(6))  # a centre belongs to itself
    pairs = np.array([[0.0], [1.0], [10.0], [11.0]])  # all densities equal: the earlier point leads
    assert dpc_knn(pairs, 2, neighbours=2).tolist() == [0, 0, 1, 1]
    assert dpc_knn(points[:0], 3).shape == (0,) and dpc_knn(points[:1], 3).tolist() == [0]


def test_memory_is_bounded_whatever_the_number_of_points(monkeypatch):
    from transformers_rbl.building import clustering

    largest = []
    chunked = clustering.pairwise_distances_chunked

    def watched(*args, **kwargs):
        for block in chunked(*args, **kwargs):
            largest.append(block.nbytes)
            yield block

    monkeypatch.setattr(clustering, "pairwise_distances_chunked", watched)
    points = np.random.default_rng(0).normal(size=(1500, 4)).astype(np.float32)
    labels = dpc_knn(points, 10, memory_mib=1)
    assert max(largest) <= 2**20 and len(largest) >= 2 * 1500 * 1500 * 4 / 2**20
    assert np.array_equal(labels, dpc_knn(points, 10))


def probes(images=6, tokens=20, width=8, seed=0):
    """Tokens around a few directions, with measures drawn apart from them."""
    random = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(4, width, generator=random)
    made = []
    for number in range(images):
        kind = torch.randint(0, 4, (tokens,), generator=random)
        values = [torch.rand(tokens, generator=random) for _ in range(5)]
        noise = 0.3 * torch.randn(tokens, width, generator=random)
        made.append(
            Probe(
                image=f"image {number}",
                positions=torch.arange(tokens) * 2,
                tokens=centres[kind] + noise,
                p1=values[0],
                local={"upstream": values[1] * 1e-3, "jensen_shannon": values[2] * 1e-2},
                globally={"upstream": values[3] * 1e-4, "jensen_shannon": values[4] * 1e-3},
                words=[[f"w{i}", "x", "y"] for i in range(tokens)],
            )
        )
    return made


def literal_selection(made, recipe):
    kept = []
    for number, probe in enumerate(made):
        labels = literal_dpc_knn(probe.tokens.double().numpy(), recipe.image_clusters, recipe.nearest_neighbours)
        for i in range(len(labels)):
            change = recipe.local_weight * float(probe.local[recipe.divergence][i])
            change += recipe.global_weight * float(probe.globally[recipe.divergence][i])
            small = recipe.max_cluster_size is None or labels.count(labels[i]) <= recipe.max_cluster_size
            if float(probe.p1[i]) < recipe.max_p1 and change < recipe.max_divergence and small:
                kept.append((number, i))
    points = np.stack([made[n].tokens[i].double().numpy() for n, i in kept])
    labels = literal_dpc_knn(points, recipe.prototype_clusters, recipe.nearest_neighbours)
    unique = {label: len({n for (n, _), other in zip(kept, labels) if other == label}) for label in labels}
    return [pair for pair, label in zip(kept, labels) if unique[label] > recipe.min_unique_images]


RULES = {
    "max_p1": 0.8,
    "max_divergence": 1.6e-3,
    "prototype_clusters": 5,
    "min_unique_images": 3,
    "max_cluster_size": 6,
}


@pytest.mark.parametrize(
    "changes",
    [{}, {"max_cluster_size": None}, {"divergence": "jensen_shannon", "max_divergence": 0.02}, {"global_weight": 0}],
    ids=str,
)
def test_the_selected_set_equals_the_transcription(changes):
    recipe, made = Recipe(**{**RULES, **changes}), probes()
    selection = select_prototypes(made, recipe)
    chosen = list(zip(selection.image.tolist(), selection.row.tolist()))
    assert chosen == literal_selection(made, recipe) and 0 < len(chosen) < 120
    assert torch.equal(prototypes(made, selection), torch.stack([made[n].tokens[i] for n, i in chosen]))
    assert [count for _, count in selection.funnel] == sorted((c for _, c in selection.funnel), reverse=True)
    assert selection.funnel[0][1] == 120 and selection.funnel[-1][1] == len(chosen)


def test_quantile_thresholds_cut_shares():
    recipe = Recipe(**{**RULES, "thresholds": "quantile", "max_p1": 0.5, "max_divergence": 1.0})
    selection = select_prototypes(probes(), recipe)
    assert selection.funnel[1][1] == 60 and 0 < selection.max_p1 < 1
    absolute = Recipe(**{**RULES, "max_p1": selection.max_p1, "max_divergence": selection.max_divergence})
    assert np.array_equal(select_prototypes(probes(), absolute).image, selection.image)


def test_some_tokens_of_each_cluster_drawn_by_seed():
    few = [select_prototypes(probes(), Recipe(**RULES, tokens_per_cluster=3, seed=seed)) for seed in (0, 0, 1)]
    full = select_prototypes(probes(), Recipe(**RULES))
    assert np.array_equal(few[0].row, few[1].row) and not np.array_equal(few[0].row, few[2].row)
    for label in set(full.cluster.tolist()):
        size = int((full.cluster == label).sum())
        assert (few[0].cluster == label).sum() == min(3, size)


def test_tokens_near_a_threshold_are_listed():
    made = probes()
    made[2].p1[7] = 0.8 + 5e-6
    made[3].local["upstream"][4], made[3].globally["upstream"][4] = 1.6e-3 - 4e-6, 0.0
    near = select_prototypes(made, Recipe(**RULES)).borderline
    assert ("image 2", 14, "p1") in [item[:3] for item in near]
    assert ("image 3", 8, "divergence") in [item[:3] for item in near]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_p1": 1e-6}, r"120 probed -> 0 p1 below 1e-06\. The lowest p1 is .* raise max_p1"),
        (
            {"max_divergence": 1e-9},
            r"120 probed -> \d+ p1 below 0.8 -> 0 divergence below 1e-09\. Of these, the lowest",
        ),
        ({"image_clusters": 1}, "-> 0 in clusters of at most 6 in their image. The smallest cluster .* has 20 members"),
        ({"min_unique_images": 6}, "-> 0 in clusters from more than 6 images. The widest cluster comes from . of 6"),
    ],
)
def test_an_empty_result_says_which_condition_and_what_would_leave_some(changes, words):
    with pytest.raises(EmptyCodebookError, match=words):
        select_prototypes(probes(), Recipe(**{**RULES, **changes}))


def test_the_advice_leaves_some():
    """Following each message's figure gives prototypes."""
    made = probes()
    lowest = float(min(probe.p1.min() for probe in made))
    with pytest.raises(EmptyCodebookError, match=f"{lowest:.4g}"):
        select_prototypes(made, Recipe(max_p1=lowest))
    loose = {"max_divergence": 1, "max_cluster_size": None, "min_unique_images": 0}
    assert len(select_prototypes(made, Recipe(max_p1=lowest + 1e-6, **loose)).row) == 1
