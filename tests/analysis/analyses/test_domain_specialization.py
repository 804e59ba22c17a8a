"""Domain specialization: hand-worked shares, planted specialists, a random router."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_moe.analysis.analyses.domain_specialization import (
    DomainSpecialization,
    intervals,
    permuted,
    strength_of,
)
from megatron_moe.analysis.observation import TokenBatch
from tests.analysis.planted import (
    Ids,
    PlantedModel,
    random_rule,
    random_sample,
    result_of,
    sample_of,
)


def _by_domain(batch: TokenBatch, layer: int) -> Ids:
    """Domain 0 uses experts 0 and 1, domain 1 experts 2 and 3."""
    return np.tile(np.array([[0, 1], [2, 3]])[batch.domain], (batch.size, 1))


def test_specialists_are_found(tmp_path: Path) -> None:
    """Each domain is routed to its own half: half of all choices would have to change."""
    sample = random_sample(tmp_path, tokens=1200, domains=2)
    result = result_of(DomainSpecialization(), PlantedModel(_by_domain, experts=4, topk=2), sample)
    assert result.arrays["chosen_LDE"][0].tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]
    assert result.arrays["chosen_low_LDE"][0].tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]
    assert result.arrays["first_LDE"][0].tolist() == [[1, 0, 0, 0], [0, 0, 1, 0]]
    assert result.numbers["strength, all choices"] == 0.5
    assert result.numbers["strength by chance, all choices"] < 0.1
    assert result.numbers["largest share over uniform"] == 2.0
    assert "unlike in OpenMoE" in DomainSpecialization().reading({"m": result})


def test_a_random_router_is_at_chance(tmp_path: Path) -> None:
    sample = random_sample(tmp_path, tokens=4000, domains=3)
    model = PlantedModel(random_rule(8, 2), experts=8, topk=2, layers=range(6))
    result = result_of(DomainSpecialization(), model, sample)
    strength, null = (result.arrays[f"chosen_{n}_L"] for n in ("strength", "null"))
    np.testing.assert_allclose(strength.mean(), null.mean(), rtol=0.2)
    assert (result.arrays["chosen_p_L"] < 0.05).sum() <= 1
    # 2 of 8 experts: each interval of the share contains 1/4 nearly always.
    low, high = result.arrays["chosen_low_LDE"], result.arrays["chosen_high_LDE"]
    assert ((low <= 0.25) & (high >= 0.25)).mean() > 0.85
    assert "no specialization" in DomainSpecialization().reading({"m": result})


def test_shares_and_strength_by_hand(tmp_path: Path) -> None:
    """One row of 8 tokens each; expert = last digit of the token."""
    texts = {"a": [[10, 10, 11, 11, 12, 12, 13, 13, 9]], "b": [[20] * 8 + [9]]}

    def rule(batch: TokenBatch, layer: int) -> Ids:
        return batch.tokens_BS.reshape(-1, 1) % 10

    model = PlantedModel(rule, experts=4, topk=1)
    result = result_of(DomainSpecialization(), model, sample_of(tmp_path, texts))
    assert result.arrays["chosen_LDE"][0].tolist() == [[0.25] * 4, [1, 0, 0, 0]]
    # All: 10/16, 2/16, 2/16, 2/16. Both domains are 0.375 away.
    assert result.numbers["strength, all choices"] == 0.375
    assert np.isnan(result.arrays["chosen_low_LDE"]).all()
    assert "1 full blocks of 1 rows" in result.notes[0]
    shares = result.tables[1]
    assert shares.rows[4][:4] == (0, "b", 0, 1.0)


def test_the_share_of_all_domains_counts_tokens(tmp_path: Path) -> None:
    """8 tokens of `a` at expert 0 and 24 of `b` at expert 1: a quarter of all is at 0."""

    def rule(batch: TokenBatch, layer: int) -> Ids:
        return np.full((batch.size, 1), batch.domain)

    texts = {"a": [[1] * 9], "b": [[2] * 25]}
    model = PlantedModel(rule, experts=4, topk=1)
    result = result_of(DomainSpecialization(), model, sample_of(tmp_path, texts))
    assert result.arrays["overall_LE"].tolist() == [[0.25, 0.75, 0, 0]] * 2
    assert result.numbers["largest share over the expert's share of all domains"] == 4.0


def test_one_domain_has_no_strength(tmp_path: Path) -> None:
    model = PlantedModel(random_rule(4, 2), experts=4, topk=2)
    result = result_of(DomainSpecialization(), model, random_sample(tmp_path, tokens=400))
    assert result.numbers["strength, all choices"] == 0
    assert "one domain" in result.notes[0]


def test_strength_against_loops() -> None:
    count_LDE = np.random.default_rng(0).integers(0, 9, size=(2, 3, 4)).astype(float)
    for layer in range(2):
        total = count_LDE[layer].sum(0) / count_LDE[layer].sum()
        apart = []
        for d in range(3):
            own = count_LDE[layer, d] / count_LDE[layer, d].sum()
            apart.append(sum(max(0.0, own[e] - total[e]) for e in range(4)))
        np.testing.assert_allclose(strength_of(count_LDE)[layer], np.mean(apart))


def test_intervals_and_permutations_use_whole_blocks() -> None:
    """All tokens of a block agree, so intervals are far wider than those of single tokens."""
    rng = np.random.default_rng(0)
    own = rng.integers(2, size=(1, 2, 40))
    count = np.stack([100 * own, 100 - 100 * own], -1)
    tokens = np.full((2, 40), 100)
    low, high = intervals(count, tokens, 400, rng)
    spread = np.sqrt(0.25 / 40)
    assert (np.abs((high - low) / (2 * 1.96 * spread) - 1) < 0.25).all()
    strength, null = permuted(count, tokens, 400, rng)
    # The distance of two means of 40 coin flips from their mean: half of |N(0, 2 * spread^2)|.
    np.testing.assert_allclose(
        null.mean(), 0.5 * np.sqrt(2 / np.pi) * np.sqrt(2) * spread, rtol=0.2
    )
    assert strength < np.quantile(null, 0.999)


@pytest.mark.parametrize("rows", [(64, 512), (10, 512)])
def test_domains_of_unequal_size_without_a_preference(
    rows: tuple[int, int], tmp_path: Path
) -> None:
    """Each row has an expert of its own, whatever its domain; 5% of the layers have p < 0.05."""
    layers, length = 200, 4

    def rule(batch: TokenBatch, layer: int) -> Ids:
        first_B1 = batch.tokens_BS[:, :1]
        drawn = np.random.default_rng(layer).integers(4, size=1000)
        return np.repeat(drawn[first_B1], length, axis=0)

    texts = {
        name: [[begin + i // length for i in range(number * length + 1)]]
        for name, number, begin in (("small", rows[0], 0), ("large", rows[1], rows[0]))
    }
    sample = sample_of(tmp_path, texts, seq_length=length, batch_size=64)
    model = PlantedModel(rule, experts=4, topk=1, layers=range(layers))
    result = result_of(DomainSpecialization(), model, sample, draws=99)
    assert 0.01 < (result.arrays["chosen_p_L"] < 0.05).mean() < 0.09
    strength, null = (result.arrays[f"chosen_{n}_L"] for n in ("strength", "null"))
    np.testing.assert_allclose(strength.mean(), null.mean(), rtol=0.1)


def test_a_domain_smaller_than_a_block_is_not_compared() -> None:
    """Blocks of 100 tokens; the third domain has 50 tokens, the first 30 more than two blocks."""
    tokens = np.array([[100, 100, 30], [100, 100, 0], [50, 0, 0]])
    share = np.zeros((3, 3, 2))
    share[0] = [[1, 0], [1, 0], [0, 1]]
    share[1:] = [0, 1]
    count = (share * tokens[:, :, None])[None]
    strength, null = permuted(count, tokens, 200, np.random.default_rng(0))
    assert strength.tolist() == [0.5]
    # Of the 6 ways to give each domain two blocks, 2 keep the domains apart and 4 mix them.
    assert set(null[:, 0].tolist()) == {0.0, 0.5} and 0.2 < null.mean() / 0.5 < 0.46
    strength, null = permuted(count[:, ::2], tokens[::2], 5, np.random.default_rng(0))
    assert np.isnan(strength).all() and np.isnan(null).all()


def test_figures_of_one_and_two_checkpoints(tmp_path: Path) -> None:
    sample = random_sample(tmp_path, tokens=800, domains=2)
    analysis = DomainSpecialization()
    result = result_of(analysis, PlantedModel(random_rule(4, 2), experts=4, topk=2), sample)
    keys = [figure.key for figure in analysis.figures({"m": result})]
    assert keys == ["strength", "shares-chosen", "shares-first", "radar"]
    both = analysis.figures({"m": result, "n": result})
    assert len({figure.key for figure in both}) == 7
    assert len(both[0].panels["all choices"].series) == 4  # type: ignore[union-attr]
