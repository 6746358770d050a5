"""The review grammar: its form, its size, and how its hidden scorer sees it."""

import re

import numpy as np
import pytest
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from rlhf_gym.tasks.grammar import count_reviews_lower_bound, sample_review, vocabulary

TOKEN = re.compile(r"[a-z']+|[.,!]")
FORM = re.compile(r"[a-z']+(?:[.,!]? [a-z']+)*[.!]")
NEGATIONS = re.compile(r"\b(?:not|never|rarely|seldom) ")


@pytest.fixture(scope="module")
def reviews() -> list[str]:
    rng = np.random.default_rng(0)
    return [sample_review(rng) for _ in range(2000)]


@pytest.fixture(scope="module")
def analyzer() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()


def test_equal_generators_give_equal_reviews(reviews: list[str]) -> None:
    rng = np.random.default_rng(0)
    assert [sample_review(rng) for _ in range(100)] == reviews[:100]
    assert sample_review(np.random.default_rng(1)) != reviews[0]


def test_reviews_are_well_formed(reviews: list[str]) -> None:
    lengths = [len(TOKEN.findall(review)) for review in reviews]
    assert all(FORM.fullmatch(review) for review in reviews)
    assert all(3 <= len(re.findall(r"[.!]", review)) <= 5 for review in reviews)
    assert min(lengths) >= 24
    assert max(lengths) <= 46
    assert 31 < np.mean(lengths) < 36
    assert not any(re.search(r"\ba [aeiou]", review) for review in reviews)


def test_vocabulary_holds_every_token(reviews: list[str]) -> None:
    words = vocabulary()
    assert words == sorted(set(words))
    assert 300 <= len(words) <= 800
    seen = {token for review in reviews for token in TOKEN.findall(review)}
    assert seen <= set(words)
    assert len(seen) > 0.95 * len(words)


def test_reviews_are_many(reviews: list[str]) -> None:
    assert count_reviews_lower_bound() > 10**9
    assert len(set(reviews)) == len(reviews)
    assert len({re.split(r"[.!]", review)[0] for review in reviews}) > len(reviews) / 2


def test_scores_are_broad_and_balanced(
    reviews: list[str], analyzer: SentimentIntensityAnalyzer
) -> None:
    scores = np.array([analyzer.polarity_scores(review)["compound"] for review in reviews[:1500]])
    assert -0.1 < scores.mean() < 0.15
    assert scores.std() > 0.5
    assert np.mean(np.abs(scores) > 0.95) < 0.12
    assert np.mean(np.abs(scores) < 0.4) > 0.22


def test_word_order_decides_the_sign(analyzer: SentimentIntensityAnalyzer) -> None:
    praise = "the acting was never dull. the music was charming."
    blame = "the acting was never charming. the music was dull."
    assert sorted(TOKEN.findall(praise)) == sorted(TOKEN.findall(blame))
    assert analyzer.polarity_scores(praise)["compound"] > 0.3
    assert analyzer.polarity_scores(blame)["compound"] < -0.3


def test_negation_flips_sampled_reviews(
    reviews: list[str], analyzer: SentimentIntensityAnalyzer
) -> None:
    negated = [review for review in reviews if NEGATIONS.search(review)][:200]
    flips = sum(
        analyzer.polarity_scores(review)["compound"]
        * analyzer.polarity_scores(NEGATIONS.sub("", review))["compound"]
        < 0
        for review in negated
    )
    assert flips > 0.15 * len(negated)
