"""Statistics of similarities between experts, and their chance levels.

Shapes: N things (experts, neurons), P = N (N - 1) / 2 pairs, D draws. All arrays are fp64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def cosines(gram_NN: Array) -> Array:
    """Cosine similarities from inner products; NaN for a vector of zeros."""
    norm_N = np.sqrt(np.diag(gram_NN))
    norm_N = np.where(norm_N > 0, norm_N, np.nan)
    found = gram_NN / norm_N[:, None] / norm_N
    # Rounding may leave 1 + 1e-16 on the diagonal.
    return np.clip(found, -1.0, 1.0)


def pairs_of(values_NN: Array) -> Array:
    """The values above the diagonal, row by row."""
    return np.asarray(values_NN[np.triu_indices(len(values_NN), 1)])


def mean_of(values: Array) -> float:
    """The mean of the values that are not NaN; NaN if there are none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else math.nan


def largest_of(values: Array) -> float:
    """The largest of the values that are not NaN; NaN if there are none."""
    known = values[~np.isnan(values)]
    return float(known.max()) if known.size else math.nan


def largest_by_chance(pairs: int, size: int) -> float:
    """Expected largest of ``pairs`` cosines of random vectors with ``size`` elements.

    Cosines are normal with standard deviation 1 / sqrt(size), and nearly independent. Their
    expected maximum is that of Blom (1958), F^-1((P - 0.375) / (P + 0.25)), F the normal
    distribution function; its error is below 1% of the standard deviation from P = 1 on.
    """
    if pairs < 1:
        return math.nan
    return NormalDist().inv_cdf((pairs - 0.375) / (pairs + 0.25)) / math.sqrt(size)


def effective_rank(gram_NN: Array) -> float:
    """Effective rank of N vectors of length 1: 1 if they are equal, N if they are orthogonal.

    exp(-sum p log p) with p the eigenvalues of their cosine matrix over N (Roy and Vetterli, 2007,
    "The effective rank", definition 1, applied to the Gram matrix).
    """
    cosine_NN = cosines(gram_NN)
    if np.isnan(cosine_NN).any():
        return math.nan
    share_N = np.linalg.eigvalsh(cosine_NN).clip(0) / len(cosine_NN)
    share_N = share_N[share_N > 0]
    return float(np.exp(-(share_N * np.log(share_N)).sum()))


def random_effective_rank(count: int, size: int) -> float:
    """Effective rank of ``count`` random vectors with ``size`` elements.

    The entropy of the eigenvalues of a random m x n Gram matrix, m <= n, is log m - m / (2 n) for
    large m (Page, 1993, "Average entropy of a subsystem"); transposed, it has the same ones.
    """
    few, many = min(count, size), max(count, size)
    return few * math.exp(-few / (2 * many))


def components(gram_NN: Array, count: int) -> tuple[Array, Array]:
    """Principal components of N vectors from their inner products, however long the vectors are.

    Returns:
        Coordinates [N, count] along the first components, and the share of the variance that each
        of the N - 1 components has, largest first; zeros if the vectors are equal.
    """
    size = len(gram_NN)
    centred_NN = gram_NN - gram_NN.mean(0) - gram_NN.mean(1)[:, None] + gram_NN.mean()
    value_N, vector_NN = np.linalg.eigh(centred_NN)
    value_N, vector_NN = value_N[::-1].clip(0), vector_NN[:, ::-1]
    place_NC = np.zeros((size, count))
    kept = min(count, size)
    # The sign of an eigenvector is arbitrary: its largest entry is made positive.
    sign_C = np.sign(vector_NN[np.abs(vector_NN).argmax(0), np.arange(size)])[:kept]
    place_NC[:, :kept] = vector_NN[:, :kept] * sign_C * np.sqrt(value_N[:kept])
    total = value_N.sum()
    # Rounding of the centring is no variance.
    noise = 1e-12 * max(float(np.trace(gram_NN)), 0.0)
    share_N = value_N / total if total > noise else np.zeros(size)
    return place_NC, share_N[: size - 1]


def random_first_share(count: int, size: int) -> float:
    """Share of the variance of the first component of ``count`` random vectors.

    The largest eigenvalue of a covariance matrix of white noise is (1 + sqrt(size / count))^2
    times the variance for large sizes (Marchenko and Pastur, 1967; Johnstone, 2001).

    Args:
        count: vectors.
        size: elements of each.
    """
    freedom = count - 1  # the mean takes one
    if freedom < 1:
        return math.nan
    return min(1.0, (1 + math.sqrt(size / freedom)) ** 2 / size)


def pearson(x_P: Array, y_P: Array) -> float:
    """Pearson correlation; NaN for fewer than three pairs or without variance."""
    if len(x_P) < 3:
        return math.nan
    x_P, y_P = x_P - x_P.mean(), y_P - y_P.mean()
    scale = math.sqrt(float((x_P**2).sum() * (y_P**2).sum()))
    if not scale > 0:
        return math.nan
    return float((x_P * y_P).sum()) / scale


def mantel(
    x_NN: Array, y_NN: Array, draws: int, generator: np.random.Generator
) -> tuple[float, float, float]:
    """Whether two similarity matrices of the same things agree (Mantel, 1967).

    The entries of a similarity matrix are not independent, so the chance level is found by giving
    the things of one matrix new names.

    Args:
        x_NN: symmetric; the diagonal is not read.
        y_NN: likewise.
        draws: D.
        generator: of the permutations.

    Returns:
        Pearson's r of the entries above the diagonal; the share of permutations, the original
        among them, with an |r| at least as large; and the mean of r^2 over the permutations. All
        NaN where r is undefined.
    """
    rows, columns = np.triu_indices(len(x_NN), 1)
    found = pearson(x_NN[rows, columns], y_NN[rows, columns])
    if math.isnan(found):
        return math.nan, math.nan, math.nan
    order_DN = generator.permuted(np.tile(np.arange(len(x_NN)), (draws, 1)), axis=1)
    drawn_D = np.array(
        [pearson(x_NN[rows, columns], y_NN[order[rows], order[columns]]) for order in order_DN]
    )
    as_large = int((np.abs(drawn_D) >= abs(found) - 1e-12).sum())
    return found, (1 + as_large) / (1 + draws), float((drawn_D**2).mean())


def combined_p_value(p_L: Array) -> float:
    """One p-value for several independent tests of the same statement (Fisher, 1925).

    -2 sum log p has a chi-squared distribution with 2 L degrees of freedom if none is true, of
    which the tail at x is exp(-x / 2) sum_{i < L} (x / 2)^i / i!. NaN values are left out.
    """
    known = p_L[~np.isnan(p_L)]
    if not known.size:
        return math.nan
    half = float(-np.log(known).sum())
    terms = [
        i * math.log(half) - math.lgamma(i + 1) - half if half else 0.0 for i in range(len(known))
    ]
    return min(1.0, sum(map(math.exp, terms))) if half else 1.0


def kendall(order_N: npt.NDArray[np.int64]) -> float:
    """Kendall's tau between a sequence of different numbers and its ascending order.

    1 if they ascend, -1 if they descend, 0 on average for a random order.
    """
    size = len(order_N)
    if size < 2:
        return math.nan
    ascending = int((order_N[:, None] < order_N[None, :])[np.triu_indices(size, 1)].sum())
    return 4.0 * ascending / (size * (size - 1)) - 1.0


def kendall_deviation(size: int) -> float:
    """Standard deviation of tau for a random order of ``size`` things (Kendall, 1938)."""
    if size < 2:
        return math.nan
    return math.sqrt(2 * (2 * size + 5) / (9 * size * (size - 1)))


def over_pairs(values_LPNN: Array, statistic: Callable[[Array], float]) -> Array:
    """A statistic of the values above the diagonal, for each layer and projection: [L, P]."""
    return np.array([[statistic(pairs_of(each)) for each in layer] for layer in values_LPNN])


def rank_correlation(x_N: Array, y_N: Array) -> float:
    """Spearman's rank correlation; NaN for fewer than three, or if all are equal."""
    return pearson(_ranks(x_N), _ranks(y_N))


def _ranks(x_N: Array) -> Array:
    """Equal values share the mean of their ranks."""
    below, equal = x_N[:, None] > x_N, x_N[:, None] == x_N
    return np.asarray(below.sum(1) + (equal.sum(1) - 1) / 2, dtype=np.float64)
