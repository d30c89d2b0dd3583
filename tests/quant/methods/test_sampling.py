import pytest
import torch

from edgeattn.errors import DataError
from edgeattn.quant.methods.sampling import (
    frame_similarity,
    iqr_outliers,
    k_means,
    noise_filtered_samples,
    noise_score,
    pool_tokens,
    select,
)

CENTRES = torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0]])


def blobs(per=8, seed=0):
    noise = torch.randn(3 * per, 2, generator=torch.Generator().manual_seed(seed)) * 0.2
    return CENTRES.repeat(per, 1) + noise


def test_clusters_are_found_whatever_the_seed():
    features = blobs()
    for seed in (0, 1, 42):
        labels, centroids = k_means(features, 3, seed, n_init=10)
        assert labels.tolist() == [0, 1, 2] * 8
        torch.testing.assert_close(centroids, torch.stack([features[i::3].mean(0) for i in range(3)]))


def test_removed_samples_neither_shape_clusters_nor_are_selected():
    features = torch.cat([blobs(), torch.tensor([[40.0, 40.0], [-40.0, 40.0]])])
    removed = torch.zeros(26, dtype=torch.bool)
    removed[24:] = True
    found = noise_filtered_samples(features, removed, 3, 2)
    clean = noise_filtered_samples(features[:24], removed[:24], 3, 2)
    assert torch.equal(found.centroids, clean.centroids) and torch.equal(found.selected, clean.selected)
    assert found.partition[24:].tolist() == [-1, -1] and len(found.selected) == 6
    unfiltered = noise_filtered_samples(features, torch.zeros(26, dtype=torch.bool), 3, 2)
    assert not torch.equal(unfiltered.selected, found.selected)


def test_nearest_and_random_selection():
    features = blobs()
    labels, centroids = k_means(features, 3, 0, n_init=5)
    distance = (features - centroids[labels]).norm(dim=1)
    chosen = select(features, labels, centroids, 2)
    for cluster in range(3):
        members = (labels == cluster).nonzero().flatten()
        assert set(members[distance[members].argsort()[:2]].tolist()) <= set(chosen.tolist())
    at_random = select(features, labels, centroids, 2, random_seed=1)
    assert torch.equal(at_random, select(features, labels, centroids, 2, random_seed=1))
    assert labels[at_random].bincount().tolist() == [2, 2, 2] and not torch.equal(at_random, chosen)


def test_small_clusters_are_filled_up_and_ties_go_by_index():
    features, labels = torch.zeros(6, 1), torch.tensor([0, 1, 1, 1, 1, -1])
    assert select(features, labels, torch.zeros(2, 1), 2).tolist() == [0, 1, 2, 3]
    assert select(features, labels, torch.zeros(2, 1), 9).tolist() == [0, 1, 2, 3, 4]


def test_filter_is_per_category_and_leaves_small_ones():
    mean = torch.tensor([[0.0], [0.1], [-0.1], [0.05], [9.0], [9.0], [9.1], [8.9], [8.95], [100.0]])
    category = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1, 2])
    removed = iqr_outliers(mean, torch.ones(10, 1), category)
    assert removed.nonzero().flatten().tolist() == [4]
    assert iqr_outliers(torch.ones(10, 1), mean, category).nonzero().flatten().tolist() == [4]


def test_noise_score_ignores_layers_that_do_not_vary():
    mean = torch.tensor([[0.0, 1.0], [0.0, 1.0], [3.0, 1.0]])
    score = noise_score(mean, torch.ones(3, 2))
    assert score.argmax() == 2 and torch.isfinite(score).all()


def test_similarity_of_equal_views_is_one():
    tokens = torch.randn(2, 1, 7, 4).expand(2, 3, 7, 4)
    torch.testing.assert_close(frame_similarity(tokens), torch.ones(2, 2))


def test_pooling():
    tokens = torch.arange(2 * 11 * 6, dtype=torch.float32).reshape(1, 2, 11, 6)
    pooled = pool_tokens(tokens)
    assert pooled.shape == (1, 2, 8, 3)
    assert pooled[0, 0, 0, 0] == tokens[0, 0, 0, :2].mean() and pooled[0, 1, 5, 2] == tokens[0, 1, 5:7, 4:].mean()


def test_errors():
    with pytest.raises(DataError, match="1 distinct samples for 2 clusters"):
        k_means(torch.ones(5, 2), 2)
    with pytest.raises(DataError, match="kept 1 of 3 samples: too few for 2"):
        noise_filtered_samples(torch.ones(3, 2), torch.tensor([True, True, False]), 2)
