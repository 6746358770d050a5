"""Every label is made of choices, and its likelihood is the textbook's."""

import itertools
import math

import pytest
import torch

from rlhf_gym.preferences.comparison import Comparison
from rlhf_gym.preferences.likelihood import (
    ChoiceSets,
    choice_loss,
    listwise_loss,
    plackett_luce_loss,
)

LOGITS = torch.tensor([0.3, -1.1, 2.0, 0.7, -0.4], dtype=torch.float64)


def loss_of(comparison: Comparison, logits: torch.Tensor = LOGITS, **options) -> float:
    k = len(comparison.candidates)
    sets = ChoiceSets.of([comparison.choices(**options)], [k])
    return float(choice_loss(logits[:k], sets))


def labelled(k: int = 3, **label) -> Comparison:
    return Comparison("p", tuple("abcde"[:k]), **label)


def test_a_single_choice_is_the_listwise_loss():
    expected = listwise_loss(LOGITS[:3], torch.tensor([3]), torch.tensor([1]))
    assert loss_of(labelled(best=1)) == pytest.approx(float(expected), abs=1e-12)


def test_rankings_without_ties_are_a_probability_distribution():
    """Plackett–Luce: the likelihoods of all orders of K items sum to 1."""
    orders = list(itertools.permutations(range(4)))
    rankings = [[[i] for i in order] for order in orders]
    sizes = torch.full((len(orders),), 4)
    losses = plackett_luce_loss(LOGITS[:4].repeat(len(orders)), sizes, rankings)
    assert float(torch.exp(-losses).sum()) == pytest.approx(1.0, abs=1e-12)


def test_a_ranking_is_the_product_of_its_stages():
    p = LOGITS[:4].exp()
    expected = -math.log(float(p[2] / p.sum() * p[0] / (p.sum() - p[2]) * p[3] / (p[3] + p[1])))
    assert loss_of(labelled(4, ranking=((2,), (0,), (3,), (1,)))) == pytest.approx(expected)


def test_a_top_choice_is_the_marginal_of_the_rankings_that_begin_with_it():
    orders = [(1, *rest) for rest in itertools.permutations((0, 2, 3))]
    rankings = [[[i] for i in order] for order in orders]
    sizes = torch.full((len(orders),), 4)
    losses = plackett_luce_loss(LOGITS[:4].repeat(len(orders)), sizes, rankings)
    expected = listwise_loss(LOGITS[:4], torch.tensor([4]), torch.tensor([1]))
    assert -math.log(float(torch.exp(-losses).sum())) == pytest.approx(float(expected))


def test_ties_are_breslows():
    """Tied items are each chosen from one set that still holds all of them."""
    p = LOGITS[:4].exp()
    stage = float(p[0] * p[2] / p.sum() ** 2 * p[1] / (p[1] + p[3]))
    assert loss_of(labelled(4, ranking=((0, 2), (1,), (3,)))) == pytest.approx(-math.log(stage))


def test_a_tie_alone_pulls_its_two_logits_together():
    logits = torch.tensor([1.5, -0.5], dtype=torch.float64, requires_grad=True)
    plackett_luce_loss(logits, torch.tensor([2]), [[[0, 1]]]).sum().backward()
    assert logits.grad[0] > 0 > logits.grad[1]
    at_rest = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    plackett_luce_loss(at_rest, torch.tensor([2]), [[[0, 1]]]).sum().backward()
    assert at_rest.grad.abs().max() < 1e-12


def test_a_partial_ranking_ignores_what_is_not_listed():
    partial = labelled(4, ranking=((3,), (1,)))
    moved = LOGITS.clone()
    moved[[0, 2]] += 5
    assert loss_of(partial) == pytest.approx(loss_of(partial, moved))
    pair = -torch.nn.functional.logsigmoid(LOGITS[3] - LOGITS[1])
    assert loss_of(partial) == pytest.approx(float(pair))


def test_partial_rankings_of_several_comparisons_keep_to_their_own_rows():
    losses = plackett_luce_loss(LOGITS, torch.tensor([3, 2]), [[[2], [0]], [[1], [0]]])
    gaps = torch.stack([LOGITS[2] - LOGITS[0], LOGITS[4] - LOGITS[3]])
    torch.testing.assert_close(losses, -torch.nn.functional.logsigmoid(gaps))


def test_votes_are_soft_labels_and_a_tied_annotator_votes_for_all():
    log_p = torch.log_softmax(LOGITS[:2], 0)
    expected = -(0.75 * log_p[0] + 0.25 * log_p[1])  # two of three, half of the undecided each
    found = loss_of(labelled(2, votes=(1, 0), ties=1))
    assert found == pytest.approx(float(expected))
    assert loss_of(labelled(2, votes=(3, 1))) == pytest.approx(float(expected))


def test_pairs_weigh_one_comparison_together():
    found = loss_of(labelled(3, pairs=((0, 1), (1, 2), (2, 0))))
    gaps = torch.stack([LOGITS[0] - LOGITS[1], LOGITS[1] - LOGITS[2], LOGITS[2] - LOGITS[0]])
    assert found == pytest.approx(float(-torch.nn.functional.logsigmoid(gaps).mean()))


def test_scores_count_by_order_unless_a_temperature_is_asked_for():
    scored = labelled(3, scores=(0.1, 9.0, 0.2))
    assert loss_of(scored) == pytest.approx(loss_of(labelled(3, ranking=((1,), (2,), (0,)))))
    weights = torch.softmax(torch.tensor([0.1, 9.0, 0.2], dtype=torch.float64) / 2.0, 0)
    expected = -(weights * torch.log_softmax(LOGITS[:3], 0)).sum()
    assert loss_of(scored, soft_temperature=2.0) == pytest.approx(float(expected))


MIXED = [
    labelled(2, best=1),
    labelled(5, ranking=((4, 0), (1,), (3,))),
    labelled(3, votes=(1, 2, 0)),
    labelled(4, pairs=((0, 3), (3, 1))),
    labelled(3, scores=(1.0, 1.0, 0.0)),
]


def test_the_loss_ignores_neighbours_candidate_order_and_shifts():
    sizes = [len(c.candidates) for c in MIXED]
    logits = torch.randn(
        sum(sizes), dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )
    together = choice_loss(logits, ChoiceSets.of([c.choices() for c in MIXED], sizes))
    for n, (comparison, own) in enumerate(zip(MIXED, logits.split(sizes), strict=True)):
        alone = choice_loss(own, ChoiceSets.of([comparison.choices()], sizes[n : n + 1]))
        assert float(alone) == pytest.approx(float(together[n]), abs=1e-12)
        order = torch.randperm(sizes[n], generator=torch.Generator().manual_seed(n)).tolist()
        place = {old: new for new, old in enumerate(order)}
        moved = [
            (tuple(place[i] for i in members), weights) for members, weights in comparison.choices()
        ]
        permuted = choice_loss(own[order] + 7.0, ChoiceSets.of([moved], sizes[n : n + 1]))
        assert float(permuted) == pytest.approx(float(together[n]), abs=1e-12)


def test_what_a_label_implies():
    implied = {
        "best": (labelled(3, best=2), {(2, 0), (2, 1)}, (2,)),
        "ranking": (labelled(4, ranking=((1,), (0, 2))), {(1, 0), (1, 2)}, (1,)),
        "votes": (labelled(3, votes=(2, 2, 0)), {(0, 2), (1, 2)}, (0, 1)),
        "tie": (labelled(2, votes=(1, 1)), set(), ()),
        "cycle": (labelled(3, pairs=((0, 1), (1, 2), (2, 0))), {(0, 1), (1, 2), (2, 0)}, ()),
        "scores": (labelled(2, scores=(0.5, 0.9)), {(1, 0)}, (1,)),
    }
    for name, (comparison, pairs, tops) in implied.items():
        assert set(comparison.preferred) == pairs, name
        assert comparison.tops == tops, name
