"""Judging a reward model: every figure is what hand and plain numpy compute, and none is lost."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import EOS, LETTERS, make_config, make_tokenizer
from scipy import stats
from test_report import Page
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_gym.errors import InputError
from rlhf_gym.evaluation.reward_model_slices import (
    accuracy_by_quartile,
    accuracy_by_size,
    lead,
    length_gaps,
    margins,
    quartiles,
    worst_mistakes,
)
from rlhf_gym.evaluation.reward_models import (
    Predictions,
    agreement,
    bag_of_words,
    baseline,
    calibration,
    clustered,
    longest,
    predictions,
    probabilities,
    prompt_numbers,
    proportion,
    uniform,
)
from rlhf_gym.preferences.comparison import Comparison
from rlhf_gym.preferences.encoded import encode_comparisons
from rlhf_gym.preferences.splits import split_comparisons
from rlhf_gym.rewards.reward_model import RewardModel

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "evaluate_reward_model.py"
EVIL = '<script>alert("x")</script> &amp; https://evil.example/?a=1&b=2'


def compare(k: int, prompt: Any = "p", **label: Any) -> Comparison:
    return Comparison(prompt, tuple("abcdefgh"[:k]), **label)


def judged(*cases: tuple[Comparison, list[float]]) -> Predictions:
    return Predictions([c for c, _ in cases], [np.array(x, dtype=np.float64) for _, x in cases])


def log_softmax(*x: float) -> np.ndarray:
    return np.array(x) - math.log(sum(map(math.exp, x)))


TWO_TOPS = {"ranking": ((0, 1), (2,))}
NO_TOP = {"scores": (1.0, 1.0)}


@pytest.mark.parametrize(
    ("comparison", "logits", "top1"),
    [
        (compare(2, best=1), [0.1, 0.2], 1.0),
        (compare(2, best=0), [0.1, 0.2], 0.0),
        (compare(3, best=0), [1.0, 1.0, 0.0], 1 / 2),
        (compare(3, best=2), [1.0, 1.0, 0.0], 0.0),
        (compare(3, **TWO_TOPS), [0.0, 2.0, 1.0], 1.0),
        (compare(3, **TWO_TOPS), [0.0, 0.0, 1.0], 0.0),
        (compare(3, **TWO_TOPS), [1.0, 1.0, 1.0], 2 / 3),
        (compare(3, votes=(1, 3, 0), ties=2), [0.0, 5.0, 0.0], 1.0),
        (compare(3, pairs=((0, 1), (2, 1))), [0.0, -1.0, 1.0], 1.0),
        (compare(2, **NO_TOP), [0.0, 1.0], math.nan),
        (compare(3, pairs=((0, 1), (1, 2), (2, 0))), [0.0, 1.0, 2.0], math.nan),
    ],
)
def test_top1_shares_ties_and_knows_when_nothing_is_preferred(comparison, logits, top1):
    np.testing.assert_allclose(judged((comparison, logits)).top1, [top1])


@pytest.mark.parametrize(
    ("comparison", "logits", "pairwise"),
    [
        (compare(3, ranking=((0,), (1,), (2,))), [2.0, 3.0, 1.0], 2 / 3),
        (compare(3, ranking=((0,), (1,), (2,))), [2.0, 2.0, 1.0], 2.5 / 3),
        (compare(3, **TWO_TOPS), [0.0, 2.0, 1.0], 1 / 2),
        (compare(4, best=3), [0.0, 1.0, 2.0, 1.5], 2 / 3),
        (compare(3, pairs=((0, 1), (1, 2), (2, 0))), [3.0, 2.0, 1.0], 2 / 3),
        (compare(2, **NO_TOP), [0.0, 1.0], math.nan),
    ],
)
def test_pairwise_is_the_share_of_implied_pairs(comparison, logits, pairwise):
    np.testing.assert_allclose(judged((comparison, logits)).pairwise, [pairwise])


def test_nll_is_that_of_each_form_of_label():
    x = [0.3, -1.2, 0.8]
    log_p = log_softmax(*x)
    said = judged(
        (compare(3, best=1), x),
        (compare(3, ranking=((2,), (0,), (1,))), x),
        (compare(3, votes=(2, 0, 1), ties=3), x),
        (compare(3, pairs=((0, 1), (2, 0))), x),
        (compare(2, best=0), [4.0, 4.0]),
    )
    expected = [
        -log_p[1],
        -log_p[2] - log_softmax(x[0], x[1])[0],
        -(3 * log_p[0] + 1 * log_p[1] + 2 * log_p[2]) / 6,
        -(log_softmax(x[0], x[1])[0] + log_softmax(x[2], x[0])[0]) / 2,
        math.log(2),
    ]
    np.testing.assert_allclose(said.nll, expected, rtol=1e-12)


def test_claims_are_the_probabilities_of_all_candidates_that_were_compared():
    said, was = judged(
        (compare(2, best=1), [0.0, math.log(3)]),
        (compare(2, **NO_TOP), [5.0, 1.0]),
        (compare(3, **TWO_TOPS), [0.0, math.log(2), math.log(5)]),
    ).claims
    np.testing.assert_allclose(said, [1 / 4, 3 / 4, 1 / 8, 2 / 8, 5 / 8])
    np.testing.assert_allclose(was, [0, 1, 1 / 2, 1 / 2, 0])


def test_intervals_are_over_prompts():
    rng = np.random.default_rng(3)
    of_prompt = rng.random(80)
    values = np.repeat(of_prompt, 5)
    prompts = np.repeat(np.arange(80), 5)
    naive = clustered(values, np.arange(400))
    found = clustered(values, prompts)
    assert found["value"] == naive["value"] == pytest.approx(of_prompt.mean())
    assert found["n"] == naive["n"] == 400
    # The bootstrap's own error is 1 / √(2 · 1000), 2 %.
    assert found["se"] == pytest.approx(of_prompt.std() / math.sqrt(80), rel=0.1)
    assert naive["se"] == pytest.approx(values.std() / math.sqrt(400), rel=0.1)
    for figure in (found, naive):
        assert figure["low"] == pytest.approx(figure["value"] - 1.96 * figure["se"], abs=0.01)
        assert figure["high"] == pytest.approx(figure["value"] + 1.96 * figure["se"], abs=0.01)
    assert clustered(values, prompts) == found
    assert clustered(values, prompts, seed=1) != found


@pytest.mark.parametrize(("right", "n"), [(3, 3), (0, 5), (7, 10), (61, 80)])
def test_shares_have_the_score_interval_of_scipy(right, n):
    values = np.array([1.0] * right + [0.0] * (n - right))
    found = proportion(values, np.arange(n))
    expected = stats.binomtest(right, n).proportion_ci(method="wilson")
    # The bootstrap's standard error may be a little above √(p (1 − p) / n), and n then below n.
    assert (found["low"], found["high"]) == pytest.approx(tuple(expected), abs=0.01)
    assert found["se"] == clustered(values, np.arange(n))["se"]


def test_a_share_over_prompts_has_a_wider_interval():
    values = np.repeat([1.0, 0.0, 1.0, 1.0, 0.0, 1.0], 20)
    apart = proportion(values, np.arange(120))
    together = proportion(values, np.repeat(np.arange(6), 20))
    alone = stats.binomtest(4, 6).proportion_ci(method="wilson")
    assert (together["low"], together["high"]) == pytest.approx(tuple(alone), abs=0.04)
    assert together["high"] - together["low"] > 2 * (apart["high"] - apart["low"])
    all_right = proportion(np.ones(120), np.repeat(np.arange(6), 20))
    assert all_right["low"] == pytest.approx(
        stats.binomtest(6, 6).proportion_ci(0.95, "wilson").low
    )
    assert (all_right["high"], all_right["se"]) == (1.0, 0.0)
    assert math.isnan(proportion(np.ones(4), np.zeros(4, dtype=np.int64))["low"])


@pytest.mark.parametrize(("share", "each"), [(0.9, 1), (0.7, 3)])
def test_the_interval_of_a_share_covers_it(share, each):
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(150):
        values = np.repeat((rng.random(40) < share).astype(float), each)
        found = proportion(values, np.repeat(np.arange(40), each))
        covered += found["low"] <= share <= found["high"]
    assert 0.91 <= covered / 150 <= 0.99


def test_what_says_nothing_is_left_out():
    values = np.array([1.0, math.nan, 0.0, math.nan, 1.0, 0.5])
    prompts = np.array([7, 7, 9, 4, 9, 5])
    known = ~np.isnan(values)
    assert clustered(values, prompts) == clustered(values[known], prompts[known])
    assert clustered(values, prompts)["n"] == 4
    nothing = clustered(values[~known], prompts[~known])
    assert nothing["n"] == 0
    assert math.isnan(nothing["value"])


def test_calibration():
    ece, curve = calibration(
        np.array([0.25] * 4 + [0.75] * 4), np.array([1, 0, 0, 0, 1, 1, 1, 0.0])
    )
    assert ece == pytest.approx(0)
    assert curve == [{"said": 0.25, "was": 0.25, "n": 4}, {"said": 0.75, "was": 0.75, "n": 4}]
    ece, curve = calibration(np.array([0.0, 1.0, 1.0]), np.array([1.0, 0.0, 0.0]))
    assert ece == 1
    assert curve == [{"said": 0, "was": 1, "n": 1}, {"said": 1, "was": 0, "n": 2}]
    # One bin: over- and underconfidence cancel; three of four answers weigh as three.
    ece, _ = calibration(np.array([0.61, 0.69, 0.65, 0.05]), np.array([1.0, 0.0, 1.0, 0.0]))
    assert ece == pytest.approx(3 / 4 * abs(0.65 - 2 / 3) + 1 / 4 * 0.05)


@pytest.mark.parametrize(
    ("votes", "ties", "chance"),
    [
        ((2, 1), 0, 1 / 3),
        ((3, 0), 0, 1.0),
        ((1, 1), 1, 0.0),
        ((2, 0), 2, 1 / 3),
        ((0, 0, 0), 2, 1.0),
        ((1, 0), 0, math.nan),
    ],
)
def test_agreement_is_the_chance_that_two_annotators_say_the_same(votes, ties, chance):
    comparison = compare(len(votes), votes=votes, ties=ties)
    np.testing.assert_allclose(agreement([comparison]), [chance])


def test_other_labels_have_no_annotators():
    assert np.isnan(agreement([compare(2, best=0), compare(2, **NO_TOP)])).all()


def reviews(n: int, words: list[str], seed: int) -> list[Comparison]:
    """Comparisons of random texts, in which people like the one with "good" in it."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(n):
        texts = [" ".join(rng.choice(words, size=6)) for _ in range(3)]
        best = int(rng.integers(3))
        texts[best] += " good"
        out.append(Comparison(f"prompt {i}", tuple(texts), best=best))
    return out


def test_a_bag_of_words_learns_a_word_and_knows_it_elsewhere():
    seen = [f"word{i}" for i in range(20)]
    new = [f"other{i}" for i in range(20)]
    score = bag_of_words(reviews(60, seen, seed=0))
    rule = baseline(score, reviews(40, new, seed=1))
    assert rule.top1.mean() == rule.pairwise.mean() == 1
    plain, liked = score(Comparison("p", ("other1 other2", "other1 other2 good"), best=1))
    assert liked > plain
    contrary = [Comparison(c.prompt, c.candidates, pairs=((1, 0),)) for c in reviews(9, seen, 2)]
    assert bag_of_words(contrary)(contrary[0])[1] > bag_of_words(contrary)(contrary[0])[0]


def test_the_longest_and_the_uniform_rule():
    a = Comparison("p", ("aaa", "b", "ccc"), best=0)
    b = Comparison("p", ("a", "bb"), best=1)
    assert longest(a) == [3.0, 1.0, 3.0]
    rule = baseline(longest, [a, b])
    np.testing.assert_allclose(rule.top1, [1 / 2, 1])
    np.testing.assert_allclose(rule.pairwise, [3 / 4, 1])
    chance = baseline(uniform, [a, b])
    np.testing.assert_allclose(chance.top1, [1 / 3, 1 / 2])
    np.testing.assert_allclose(chance.pairwise, [1 / 2, 1 / 2])
    np.testing.assert_allclose(chance.nll, [math.log(3), math.log(2)])
    np.testing.assert_allclose(chance.claims[0], [1 / 3, 1 / 3, 1 / 3, 1 / 2, 1 / 2])


def test_nearly_equal_prompts_have_one_number():
    long = " ".join(f"word{i}" for i in range(60))
    chat = [{"role": "user", "content": "tell me"}]
    prompts = [long, "another", chat, f"{long} more", list(chat), "another one"]
    numbers = prompt_numbers([compare(2, prompt, best=0) for prompt in prompts])
    a, b, c = numbers[:3]
    assert len({a, b, c, numbers[5]}) == 4
    assert list(numbers[3:5]) == [a, c]


def test_probabilities_and_margins():
    said = judged((compare(3, best=0), [0.0, math.log(3), math.log(4)]))
    np.testing.assert_allclose(probabilities(said.logits[0]), [1 / 8, 3 / 8, 4 / 8])
    np.testing.assert_allclose(probabilities(np.array([1e4, -1e4])), [1, 0])
    np.testing.assert_allclose(margins(said), [math.log(4) - math.log(3)])
    np.testing.assert_allclose(margins(judged((compare(2, best=0), [2.0, 2.0]))), [0])


def test_length_gaps():
    texts = ("aaaa", "bb", "c")
    gaps = length_gaps(
        [
            Comparison("p", texts, best=0),
            Comparison("p", texts, best=2),
            Comparison("p", texts, ranking=((0, 1), (2,))),
            Comparison("p", texts, scores=(1.0, 1.0, 1.0)),
        ]
    )
    np.testing.assert_allclose(gaps, [4 - 1.5, 1 - 3, 3 - 1, math.nan])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([4.0, 1.0, 3.0, 2.0], [3, 0, 2, 1]),
        ([1.0, math.nan, 2.0, 3.0, 4.0], [0, -1, 1, 2, 3]),
        ([5.0, 5.0, 5.0], [0, 0, 0]),
        ([0.0, 0.0, 0.0, 1.0, 2.0], [0, 0, 0, 2, 3]),
        ([math.nan], [-1]),
        ([], []),
    ],
)
def test_equal_values_share_a_quarter(values, expected):
    assert quartiles(np.array(values)).tolist() == expected


def test_slices_cover_what_has_a_preference():
    cases = [(compare(2, best=0), [float(right), 0.5]) for right in (1, 1, 0, 1, 0, 0, 0, 1)]
    cases += [(compare(4, best=3), [0.0, 0.0, 1.0, 2.0]), (compare(2, **NO_TOP), [0.0, 9.0])]
    said = judged(*cases)
    chance = baseline(uniform, said.comparisons)
    prompts = np.arange(10)
    two, four = accuracy_by_size(said, chance, prompts)
    assert (two["k"], two["accuracy"]["value"], two["chance"]) == (2, 0.5, 0.5)
    assert (four["k"], four["accuracy"]["value"], four["chance"]) == (4, 1.0, 0.25)
    assert two["accuracy"] == proportion(said.top1[:8], prompts[:8])
    assert four["accuracy"]["n"] == 1
    values = np.array([8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, math.nan, 0.0])
    rows = accuracy_by_quartile(values, said, chance, prompts)
    assert [(row["from"], row["to"]) for row in rows] == [(1, 2), (3, 4), (5, 6), (7, 8)]
    assert [row["accuracy"]["value"] for row in rows] == [0.5, 0.0, 0.5, 1.0]
    assert [row["accuracy"]["n"] for row in rows] == [2, 2, 2, 2]
    assert accuracy_by_quartile(np.full(10, math.nan), said, chance, prompts) == []


def test_the_worst_mistakes_come_first():
    said = judged(
        (compare(2, best=0), [0.0, 1.0]),
        (compare(2, best=0), [1.0, 0.0]),
        (compare(2, best=0), [0.0, 3.0]),
        (compare(2, best=0), [0.0, 0.0]),
        (compare(2, **NO_TOP), [0.0, 9.0]),
        (compare(3, best=1), [0.0, 0.0, 2.0]),
    )
    assert worst_mistakes(said, 9) == [2, 5, 0]
    assert worst_mistakes(said, 1) == [2]


def test_a_lead_is_measured_on_differences():
    rng = np.random.default_rng(0)
    right = rng.random(200) < 0.5
    cases = [(compare(2, best=0), [float(r), 0.5]) for r in right]
    better = [(c, [1.0, 0.5] if i < 20 else x) for i, (c, x) in enumerate(cases)]
    model, rule = judged(*better), judged(*cases)
    prompts = np.arange(200)
    found = lead(model, rule, prompts)
    assert found["value"] == pytest.approx((~right[:20]).sum() / 200)
    assert found["n"] == 200
    # Two independent samples would be this unsure; what both share cancels.
    apart = math.hypot(clustered(model.top1, prompts)["se"], clustered(rule.top1, prompts)["se"])
    assert found["se"] < apart / 2
    assert lead(model, model, prompts)["high"] == 0


@torch.no_grad()
def test_a_model_that_pays_probabilities_is_judged_by_them():
    torch.manual_seed(0)
    classifier = AutoModelForSequenceClassification.from_config(make_config("llama", num_labels=3))
    tokenizer = make_tokenizer()
    comparisons = [
        Comparison("a b", ("c d", "e", "f g h"), best=0),
        Comparison("i", ("j", "k l"), best=1),
    ]
    raw = []
    for comparison in comparisons:
        prompt, candidates = comparison.encode(tokenizer)
        rows = [classifier(torch.tensor([[*prompt, *one]])).logits[0] for one in candidates]
        raw.append(torch.stack(rows))
    for options, column in (
        ({"label": 1, "probability": True}, lambda x: x.log_softmax(-1)[:, 1]),
        ({"label": "LABEL_2"}, lambda x: x[:, 2]),
    ):
        model = RewardModel(classifier.eval(), tokenizer, **options)
        said = predictions(model, encode_comparisons(comparisons, model, None)[0])
        for ours, plain in zip(said.logits, raw, strict=True):
            np.testing.assert_allclose(ours, column(plain).numpy(), atol=1e-4)


# What follows runs the script.


def evaluate(*arguments: object, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def script(monkeypatch) -> Any:
    from agents.cli import evaluate_reward_model

    return evaluate_reward_model


def write(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def draw_rows(n: int, seed: int) -> list[dict[str, Any]]:
    """Unlabelled comparisons of random letters, two for each prompt, K of 2 to 4."""
    rng = np.random.default_rng(seed)

    def text(low: int, high: int) -> str:
        return " ".join(rng.choice(list(LETTERS), size=int(rng.integers(low, high))))

    prompts = [text(3, 9) for _ in range(n // 2)]
    return [
        {"prompt": prompts[i // 2], "candidates": [text(2, 8) for _ in range(2 + i % 3)]}
        for i in range(n)
    ]


@torch.no_grad()
def plain_logits(path: str, rows: list[dict[str, Any]]) -> list[np.ndarray]:
    """Logits by transformers alone, a row at a time; the saved gain is 0.7."""
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    out = []
    for row in rows:
        if isinstance(row["prompt"], str):
            prompt = tokenizer(row["prompt"]).input_ids
        else:
            text = f"<s>\n\nHuman: {row['prompt'][0]['content']}\n\nAssistant: "
            prompt = tokenizer(text, add_special_tokens=False).input_ids
        ends = [tokenizer(c, add_special_tokens=False).input_ids for c in row["candidates"]]
        logits = [model(torch.tensor([[*prompt, *e, EOS]])).logits[0, 0].item() for e in ends]
        out.append(np.array(logits) / 0.7)
    return out


def expected_calibration_error(logits: list[np.ndarray], shares: list[np.ndarray]) -> float:
    p, was = np.concatenate([np.exp(log_softmax(*x)) for x in logits]), np.concatenate(shares)
    total = 0.0
    for low in np.arange(10) / 10:
        inside = (p >= low) & (p < low + 0.1)
        total += abs(p[inside].sum() - was[inside].sum()) / len(p)
    return total


def test_the_script_says_what_plain_transformers_and_numpy_say(save_reward_model, tmp_path):
    path = save_reward_model()
    rows = draw_rows(24, seed=5)
    rows[1]["candidates"] = [f"a {EVIL}", "b c", "d " + "<b>&lt;" * 100]
    rows[2]["prompt"] = [{"role": "user", "content": f"tell me {EVIL}"}]
    rows[4]["prompt"] = "e " * 100  # too long for the model's 64 positions
    logits = plain_logits(path, [*rows[:4], {**rows[4], "prompt": "e"}, *rows[5:]])
    rng = np.random.default_rng(0)
    best = [int(rng.integers(len(x))) for x in logits]
    best[1], best[2] = int(np.argmin(logits[1])), int(np.argmin(logits[2]))
    for row, b in zip(rows, best, strict=True):
        row["best"] = b
    del rows[3]["best"]
    rows[3]["votes"] = [2 * (i == best[3]) for i in range(2)]
    rows[3]["ties"] = 1
    data = write(tmp_path / "data.jsonl", [*rows, {"prompt": "a", "candidates": ["b"], "best": 0}])
    train = write(tmp_path / "train.jsonl", [{**row, "best": 0} for row in draw_rows(10, seed=6)])
    run_dir = tmp_path / "run"
    printed = evaluate(
        *("--reward-model", path, "--data", data, "--train-data", train, "--run-dir", run_dir),
        *("--on-bad-row", "skip", "--chat-template", "plain", "--device", "cpu"),
    )
    assert "line 25: candidates must be a list of at least two texts" in printed
    assert "bag of words" in printed
    assert sorted(f.name for f in run_dir.iterdir()) == [
        "reward_evaluation.json",
        "reward_report.html",
    ]
    found = json.loads((run_dir / "reward_evaluation.json").read_text(), parse_constant=pytest.fail)

    kept = [i for i in range(24) if i != 4]
    rows, logits, best = ([part[i] for i in kept] for part in (rows, logits, best))
    sizes = np.array(list(map(len, logits)))
    assert (found["comparisons"], found["prompts"]) == (23, 13)
    assert found["counts"] == {
        "skipped": 1,
        "skipped_train": 0,
        "whole": 23,
        "cut": 0,
        "dropped": 1,
        "retokenised": 0,
    }
    right = np.array([x.argmax() == b for x, b in zip(logits, best, strict=True)], dtype=float)
    pairs = [(x[b] > np.delete(x, b)).mean() for x, b in zip(logits, best, strict=True)]
    nll = [-log_softmax(*x)[b] for x, b in zip(logits, best, strict=True)]
    p = np.exp(log_softmax(*logits[3]))
    nll[3] = -(2.5 / 3 * np.log(p[best[3]]) + 0.5 / 3 * np.log(p[1 - best[3]]))
    lengths = [np.array([len(c) for c in row["candidates"]]) for row in rows]
    long = np.array(
        [(x == x.max())[b] / (x == x.max()).sum() for x, b in zip(lengths, best, strict=True)]
    )

    def close(figure: dict[str, float], values: Any) -> None:
        assert figure["value"] == pytest.approx(np.mean(values), abs=1e-5)
        assert figure["n"] == len(values)
        assert figure["low"] <= figure["value"] <= figure["high"]

    assert 0 < right.mean() < 1
    close(found["accuracy"], right)
    close(found["accuracy_pairwise"], pairs)
    close(found["nll"], nll)
    close(found["nll_uniform"], np.log(sizes))
    shares = [(np.arange(len(x)) == b) * 1.0 for x, b in zip(logits, best, strict=True)]
    # Votes are what they are: shares, not a winner.
    shares[3] = np.where(np.arange(2) == best[3], 2.5 / 3, 0.5 / 3)
    assert found["ece"] == pytest.approx(expected_calibration_error(logits, shares), abs=1e-5)
    rules = found["rules"]
    close(rules["longest"]["accuracy"], long)
    close(rules["longest"]["lead"], right - long)
    close(rules["chance"]["accuracy"], 1 / sizes)
    close(rules["chance"]["accuracy_pairwise"], np.full(23, 0.5))
    close(rules["chance"]["lead"], right - 1 / sizes)
    assert rules["bag_of_words"]["accuracy"]["n"] == 23
    assert found["bag_of_words_learnt_from"] == 10
    assert (found["annotator_agreement"]["value"], found["annotator_agreement"]["n"]) == (1 / 3, 1)
    for row in found["by_candidates"]:
        close(row["accuracy"], right[sizes == row["k"]])
    for name in ("by_margin", "by_length"):
        assert sum(row["accuracy"]["n"] for row in found[name]) == 23
    gaps = [x[b] - np.delete(x, b).mean() for x, b in zip(lengths, best, strict=True)]
    assert found["by_length"][0]["from"] == min(gaps)
    assert found["by_length"][-1]["to"] == max(gaps)
    wrong = sorted(np.flatnonzero(right == 0), key=lambda i: -nll[i])[:20]
    assert [m["prompt"] for m in found["mistakes"]] == [rows[i]["prompt"] for i in wrong]
    for one, i in zip(found["mistakes"], wrong, strict=True):
        np.testing.assert_allclose(one["probabilities"], np.exp(log_softmax(*logits[i])), atol=1e-5)

    page = Page(run_dir / "reward_report.html")
    assert "<script" not in page.source
    assert not {"script", "link", "iframe", "object", "base", "form", "a"} & set(page.tags)
    assert not any(name.startswith("on") or name == "href" for name, _ in page.attributes)
    assert len(page.images) == 1
    assert page.images[0].startswith("data:image/png;base64,")
    assert f"a {EVIL}" in page.text
    assert f"tell me {EVIL}" in page.text
    assert f"… {len(rows[1]['candidates'][2].strip())} characters" in page.text
    assert f"NLL {nll[1]:.3g} nats" in page.text
    assert f"P(best) {np.exp(-nll[2]):.3g}" in page.text


def test_a_missing_model_is_bad_input(tmp_path):
    rows = [{**row, "best": 0} for row in draw_rows(4, seed=1)]
    data = write(tmp_path / "data.jsonl", rows)
    run_dir = tmp_path / "run"
    printed = evaluate(
        *("--reward-model", tmp_path / "nowhere", "--data", data, "--run-dir", run_dir), code=2
    )
    assert "error: cannot load the model" in printed
    assert not run_dir.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 2}, "exceed max_tokens = 2"),
        ({"held_out": 0.5, "train_data": "x.jsonl"}, "give only one of them"),
        ({"format": "hh"}, "not of the format"),
        ({"label": "GOOD"}, "'GOOD' is none of them"),
    ],
)
def test_bad_options_leave_nothing_behind(script, save_reward_model, tmp_path, options, message):
    rows = [{**row, "best": 0} for row in draw_rows(20, seed=1)]
    data = write(tmp_path / "data.jsonl", rows)
    config = script.Config(save_reward_model(), str(data), tmp_path / "run", **options)
    with pytest.raises(InputError, match=message):
        script.main(config)
    assert not (tmp_path / "run").exists()


def test_the_held_out_share_is_that_of_training(script, save_reward_model, tmp_path):
    rows = [{**row, "best": 0} for row in draw_rows(60, seed=2)]
    data = write(tmp_path / "data.jsonl", rows)
    path = save_reward_model()
    config = script.Config(path, str(data), tmp_path / "run", held_out=0.3)
    found = script.main(config)
    comparisons = [Comparison(r["prompt"], tuple(r["candidates"]), best=0) for r in rows]
    train, test = split_comparisons(comparisons, 0.3)
    assert (found["bag_of_words_learnt_from"], found["comparisons"]) == (len(train), len(test))
    model = RewardModel.load(path)
    said = predictions(model, encode_comparisons(test, model, None)[0])
    assert found["accuracy"]["value"] == said.top1.mean()
    rule = baseline(bag_of_words(train), test)
    assert found["rules"]["bag_of_words"]["accuracy"]["value"] == rule.top1.mean()


def test_without_other_comparisons_or_preferences(script, save_reward_model, tmp_path):
    rows = [{**row, "scores": [1] * len(row["candidates"])} for row in draw_rows(6, seed=2)]
    data = write(tmp_path / "data.jsonl", rows)
    found = script.main(script.Config(save_reward_model(), str(data), tmp_path / "run"))
    assert found["without_preference"] == found["comparisons"] == 6
    assert found["accuracy"]["n"] == 0
    assert found["accuracy"]["value"] is found["ece"] is found["annotator_agreement"] is None
    assert "bag_of_words" not in found["rules"]
    assert not found["mistakes"]
    page = Page(tmp_path / "run" / "reward_report.html")
    assert "The bag of words is left out: it must be fitted to other comparisons" in page.text
    for absent in ("Calibration", "Between annotators", "Worst mistakes"):
        assert absent not in page.text
