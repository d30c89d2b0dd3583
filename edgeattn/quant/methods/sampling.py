"""NFDS of QuantVGGT (arXiv 2509.21302): calibration samples without outliers, drawn from every cluster."""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import torch
from scipy.cluster import vq
from torch import Tensor
from torch.nn import functional

from edgeattn.errors import DataError

_ITERATIONS = 50


def pool_tokens(tokens: Tensor, special: int = 5) -> Tensor:
    """Tokens (..., tokens, channels) averaged in pairs along the channels, patch tokens also along the positions.

    An odd last patch token or channel is left out.
    """
    tokens = functional.avg_pool1d(tokens.flatten(0, -3), 2).unflatten(0, tokens.shape[:-2])
    head, patches = tokens[..., :special, :], tokens[..., special:, :]
    pairs = patches[..., : patches.shape[-2] // 2 * 2, :].unflatten(-2, (-1, 2)).mean(-2)
    return torch.cat([head, pairs], -2)


def frame_similarity(tokens: Tensor) -> Tensor:
    """Feature of each sample, (samples, views - 1): mean over tokens of cos(view t, view 0).

    tokens is (samples, views, tokens, channels).
    """
    return functional.cosine_similarity(tokens[:, 1:], tokens[:, :1], dim=-1).mean(-1)


def noise_score(mean: Tensor, deviation: Tensor) -> Tensor:
    """The paper's score (samples,): L2 norm over layers of the z-scores of mean and variance.

    mean and deviation are (samples, layers); z-scores take the population's standard deviation.
    """
    squared = [_z_scores(mean).square().sum(1), _z_scores(deviation.square()).square().sum(1)]
    return (squared[0] + squared[1]).sqrt()


def _z_scores(x: Tensor) -> Tensor:
    spread = x.std(0, correction=0)
    return (x - x.mean(0)) / torch.where(spread > 0, spread, 1.0)


def iqr_outliers(mean: Tensor, deviation: Tensor, category: Tensor, factor: float = 1.5, least: int = 4) -> Tensor:
    """Mask (samples,) of what lies outside [Q1 - factor IQR, Q3 + factor IQR] of its category in any layer.

    mean and deviation are (samples, layers), category (samples,). Categories of fewer than `least` samples stay.
    """
    values = torch.cat([mean, deviation], 1)
    removed = torch.zeros(len(values), dtype=torch.bool)
    for one in category.unique():
        members = (category == one).nonzero().flatten()
        if len(members) < least:
            continue
        part = values[members]
        low, high = torch.quantile(part, 0.25, 0), torch.quantile(part, 0.75, 0)
        margin = factor * (high - low)
        removed[members] = ((part < low - margin) | (part > high + margin)).any(1)
    return removed


def k_means(features: Tensor, clusters: int, seed: int = 42, n_init: int = 50) -> tuple[Tensor, Tensor]:
    """(labels, centroids) of the best of `n_init` runs from k-means++ starts; clusters are numbered as they appear.

    features is (samples, dimensions).

    Raises:
        DataError: fewer distinct samples than clusters.
    """
    data = features.detach().double().numpy()
    distinct = len(np.unique(data, axis=0))
    if distinct < clusters:
        raise DataError(f"{distinct} distinct samples for {clusters} clusters: give more samples or fewer clusters.")
    random = np.random.default_rng(seed)
    best, labels = np.inf, np.zeros(len(data), int)
    for _ in range(n_init):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an empty cluster: the run is judged by its inertia like the others
            centres, found = vq.kmeans2(data, clusters, iter=_ITERATIONS, minit="++", rng=random)
        inertia = float(((data - centres[found]) ** 2).sum()) if len(set(found)) == clusters else np.inf
        if inertia < best:
            best, labels = inertia, found
    if not np.isfinite(best):
        raise DataError(f"no run of k-means filled {clusters} clusters of {len(data)} samples: ask for fewer clusters.")
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    numbered = torch.from_numpy(np.argsort(np.argsort(first))[inverse])
    return numbered, torch.stack([features[numbered == c].mean(0) for c in range(clusters)])


def select(
    features: Tensor, labels: Tensor, centroids: Tensor, per_cluster: int, random_seed: int | None = None
) -> Tensor:
    """Sorted indices of `per_cluster` samples of each cluster: the nearest to its centroid, ties by index.

    With `random_seed` they are drawn at random, as the release does. Small clusters are filled up from the rest of
    all clusters, by the same rule. A label of -1 is never selected.
    """
    kept = (labels >= 0).nonzero().flatten()
    if random_seed is None:
        distance = (features[kept] - centroids[labels[kept]]).norm(dim=1)
        ranked = kept[torch.argsort(distance, stable=True)]
    else:
        ranked = kept[torch.randperm(len(kept), generator=torch.Generator().manual_seed(random_seed))]
    chosen = [ranked[labels[ranked] == c][:per_cluster] for c in range(len(centroids))]
    first = torch.cat(chosen)
    rest = ranked[~torch.isin(ranked, first)]
    return torch.cat([first, rest[: per_cluster * len(centroids) - len(first)]]).sort().values


@dataclasses.dataclass(frozen=True)
class Sampling:
    """What NFDS chose: masks and labels (samples,), -1 where removed; centroids (clusters, dimensions); indices."""

    removed: Tensor
    partition: Tensor
    centroids: Tensor
    selected: Tensor


def noise_filtered_samples(
    features: Tensor, removed: Tensor, clusters: int = 5, per_cluster: int = 4, seed: int = 42, at_random: bool = False
) -> Sampling:
    """Cluster the samples that the filter kept and select from every cluster.

    features is (samples, dimensions): `frame_similarity` for views, or any pooled feature; removed (samples,) is the
    filter's mask, of `iqr_outliers` or a threshold of `noise_score`. The release clusters the removed ones as well.

    Raises:
        DataError: fewer kept samples than clusters.
    """
    kept = (~removed).nonzero().flatten()
    if len(kept) < clusters:
        raise DataError(f"the filter kept {len(kept)} of {len(removed)} samples: too few for {clusters} clusters.")
    partition = torch.full((len(features),), -1)
    partition[kept], centroids = k_means(features[kept], clusters, seed)
    chosen = select(features, partition, centroids, per_cluster, seed if at_random else None)
    return Sampling(removed, partition, centroids, chosen)
