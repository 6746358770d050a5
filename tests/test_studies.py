"""The scripts behind the docs' figures run whole, at a size that says nothing but that they run."""

import csv
import json
import time
from pathlib import Path

import pytest
from test_scripts import run

from agents import ppo

pytestmark = pytest.mark.smoke

WORDS = "good bad fine poor glad sad".split()


@pytest.fixture
def choices(tmp_path) -> Path:
    """Dialogues of Anthropic HH's shape, in which the first three words are liked."""
    rows = []
    for i in range(48):
        ask = f"\n\nHuman: question number {i} of {i * 7919 % 97}, please\n\nAssistant: "
        liked, other = WORDS[i % 2 * 4], WORDS[1 + i % 2 * 2]
        rows.append({"chosen": f"{ask}it is {liked}", "rejected": f"{ask}it is {other}"})
    file = tmp_path / "choices.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_the_study_of_people_goes_on_where_it_stopped(choices, tmp_path):
    command = [
        "studies/preferences.py",
        *("--data", "mine", choices, "--k-folds", 2, "--batch-size", 8),
        *("--run-dir", tmp_path / "study", "--device", "cpu"),
    ]
    run(*command)
    lines = (tmp_path / "study" / "results.jsonl").read_text().splitlines()
    assert len(lines) == 2
    table = (tmp_path / "study" / "preferences.md").read_text()
    assert "| mine | fresh | 48 |" in table
    # Stopped while the second line was written.
    (tmp_path / "study" / "results.jsonl").write_text(lines[0] + "\n" + lines[1][:40])
    run(*command)
    again = [json.loads(x) for x in (tmp_path / "study" / "results.jsonl").read_text().splitlines()]
    assert [r["fold"] for r in again] == [0, 1]
    assert again[1]["model"] == json.loads(lines[1])["model"]
    run(*command[:-2], "--epochs", 3, code=2)


def test_the_study_of_the_labeller_makes_table_and_plot(tmp_path):
    folder = tmp_path / "study"
    command = [
        "studies/labeller.py",
        *("--sizes", 24, "--held-out", 16, "--seeds", 0, 1, "--max-new-tokens", 4),
        *("--pretraining-epochs", 1, "--epochs", 1, "--batch-size", 8),
        *("--run-dir", folder, "--device", "cpu"),
    ]
    run(*command)
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["seed"], r["loss"]) for r in rows] == [
        ("0", "listwise"),
        ("0", "pairs"),
        ("1", "listwise"),
        ("1", "pairs"),
    ]
    assert all(float(r["kl"]) > 0 and float(r["top1"]) <= float(r["bayes"]) for r in rows)
    table = json.loads((folder / "labeller.json").read_text())["rows"]
    assert {(r["loss"], r["seeds"]) for r in table} == {("listwise", 2), ("pairs", 2)}
    assert (folder / "labeller.png").stat().st_size > 5000
    # Done already: nothing is trained again.
    before = (folder / "results.csv").read_text()
    run(*command)
    assert (folder / "results.csv").read_text() == before
    # An encoder of another depth is another study.
    assert "layers" in run(*command, "--layers", 2, code=2)
    run(*command[:-4], "--layers", 2, "--run-dir", tmp_path / "deep", "--device", "cpu")
    encoder = json.loads((tmp_path / "deep" / "encoder" / "config.json").read_text())
    assert encoder["num_hidden_layers"] == 2


def test_exact_v0_can_be_made_again(tmp_path):
    said = run(
        "assets/exact.py", "--output", tmp_path / "exact", "--strings", 200, "--comparisons", 64
    )
    assert {p.name for p in (tmp_path / "exact").iterdir()} == {
        "prompts.json",
        "reference",
        "reward_plain",
        "reward_deceptive",
        "reward_long_range",
        "reward_ending",
    }
    assert said.count("best-of-16") == 4


def test_the_environments_own_work_is_measured(tmp_path):
    file = tmp_path / "env.json"
    run(
        "bench/env.py",
        *("--env", "rlhf_gym/Exact-v0", "--rows", 8, "--waves", 1, "--memory-rows", 2),
        *("--output", file, "--device", "cpu"),
    )
    found = json.loads(file.read_text())
    for way in ("step", "play"):
        assert 0 < found[way]["own_share"] <= found[way]["own_share_most"] < 1
    assert [row["tokens"] for row in found["memory"]] == [96]


def test_the_race_of_families_against_generate_is_counted_right(tmp_path):
    file = tmp_path / "runs" / "families.json"
    run(
        "bench/architectures.py",
        *("--families", "mistral", "mistral-short", "mamba2", "--rows", 4, "--prompt", 4, 8),
        *("--response", 30, "--repeats", 1, "--output", file, "--device", "cpu"),
    )
    found = json.loads(file.read_text())
    assert {"processor", "threads", "commit"} <= set(found["measured_on"])
    rows = found["families"]
    assert [row["method"] for row in rows] == ["slots", "own cache", "own cache"]
    for row in rows:
        assert len(row["generate"]["seconds"]) == 1
        assert row["ratio"] == row["generate"]["median"] / row["rlhf_gym"]["median"]
    run("bench/architectures.py", "--families", "no-such", code=2)


def test_the_race_of_reward_trainers_is_counted_right(save_lm, tmp_path):
    # A stand-in for TRL's Python: it says what `bench/system_trl_reward.py` says at its end.
    other = tmp_path / "python"
    other.write_text('#!/bin/sh\necho \'{"seconds": 2.0, "steps": 2, "versions": {"trl": "0"}}\'\n')
    other.chmod(0o755)
    file = tmp_path / "runs" / "race.json"  # in a folder that is not there yet
    run(
        "bench/reward.py",
        *("--trl-python", other, "--tokenizer", save_lm("llama"), "--shapes", "even"),
        *("--pairs", 8, "--batch-size", 4, "--width", 32, "--layers", 1, "--repeats", 1),
        *("--output", file, "--device", "cpu"),
    )
    (row,) = json.loads(file.read_text())
    assert row["tokens"] == 8 * 2 * 128
    assert row["trl"]["pairs_per_second"] == 4.0
    assert row["ratio"] == pytest.approx(2.0 / row["rlhf_gym"]["seconds"][0])


def test_the_study_of_ppo_goes_on_where_it_stopped(tmp_path):
    folder = tmp_path / "study"
    command = [
        *("studies/ppo.py", "--total-tokens", 300, "--num-envs", 16, "--seeds", 0, 1),
        *("--run-dir", folder, "--device", "cpu"),
    ]
    run(*command, "--variants", "default")
    assert len((folder / "results.csv").read_text().splitlines()) == 3
    before = (folder / "results.csv").read_text()
    run(*command, "--variants", "default", "leave one out", "--workers", 2)
    assert (folder / "results.csv").read_text().startswith(before)  # nothing was done again
    study = json.loads((folder / "study.json").read_text())
    first, other = study["rows"]
    assert (first["variant"], other["variant"]) == ("default", "leave one out")
    assert first["seeds"] == other["seeds"] == 2
    assert other["gain"] == pytest.approx(other["optimality"] - first["optimality"], abs=1e-6)
    assert first["objective"] < study["objective_optimum"]
    assert "| leave one out | `baseline=leave_one_out`" in (folder / "study.md").read_text()
    run(*command, "--variants", "no such thing", code=2)


def test_the_study_of_adam_measures_both_forms_and_goes_on(tmp_path):
    folder = tmp_path / "adam"
    command = [
        *("studies/adam.py", "--env", "rlhf_gym/Exact-v0", "--num-envs", 16),
        *("--n-epochs", 1, "--n-minibatches", 1, "--learning-rate", 1e-3),
        *("--run-dir", folder, "--device", "cpu"),
    ]
    run(*command, "--seeds", 0)
    first = (folder / "results.csv").read_text()
    run(*command, "--seeds", 0, 1)
    assert (folder / "results.csv").read_text().startswith(first), "nothing was done again"
    assert len((folder / "results.csv").read_text().splitlines()) == 3
    found = json.loads((folder / "adam.json").read_text())["mean_and_interval"]
    # The same weights and rollout: of one step, the form with the larger ε is the smaller.
    assert 0 < found["approx_kl"]["tf1"][0] < found["approx_kl"]["torch"][0]
    assert found["ratio_max"]["torch"][0] > 1 > found["ratio_min"]["torch"][0]
    assert "adam_eps = 1e-05, not 1e-08" in run(*command, "--adam-eps", 1e-8, code=2)


def test_memory_is_measured_and_its_bound_kept(tmp_path):
    file = tmp_path / "memory.json"
    small = ("--vocabulary", 2000, "--episodes", 16, "--bound-gib", 0.1, "--device", "cpu")
    ways = ("plain", "critic", "all")
    said = run("bench/memory.py", "--ways", *ways, *small, "--output", file, code=1)
    assert "plain takes" in said
    plain, critic, every = json.loads(file.read_text())
    assert critic["trained_parameters"] > 1.5 * plain["trained_parameters"]
    assert every["trained_parameters"] < plain["trained_parameters"]
    for row in (plain, critic, every):
        assert 0.1 * 2**30 < row["before_bytes"] <= row["peak_bytes"] < 6 * 2**30
        assert 0 < max(row["largest_share"].values()) < 0.5
    stages = {"sample", "play", "gradient", "update"}
    assert plain["largest_share"].keys() == stages
    assert critic["largest_share"].keys() == stages | {"values"}
    assert every["largest_share"].keys() == stages | {"score"}, "in bfloat16"


def odd_job(n: int) -> dict[str, int]:
    if n == 1:
        raise ValueError("one is odd")
    time.sleep(1.0 if n == 0 else 0.0)
    return {"n": n}


def test_a_job_that_fails_takes_no_other_with_it(tmp_path, monkeypatch):
    from agents.runs.experiments import read_rows, run_jobs

    file = tmp_path / "results.csv"
    with pytest.raises(ValueError, match="one is odd"):
        run_jobs(range(40), odd_job, file, ("n",), workers=2)
    done = [int(row["n"]) for row in read_rows(file)]
    # The one that ran next to it is written; most of the others did not start.
    assert 0 in done
    assert len(done) < 30


def test_a_comparison_tunes_compares_and_goes_on(tmp_path):
    folder = tmp_path / "compare"
    small = ("--total-tokens", 600, "--num-envs", 32, "--rates", 1, 10, "--device", "cpu")
    command = ["compare.py", "--algorithms", "ppo", "rloo", *small, "--run-dir", folder]
    said = run(*command, "--seeds", 2, "--options", "rloo.n_waves", 1)
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    trials = [r for r in rows if r["tuning"] == "1"]
    assert {(r["algorithm"], r["rate"], r["seed"]) for r in trials} == {
        (a, rate, "1000") for a in ("ppo", "rloo") for rate in ("1.0", "10.0")
    }
    final = [r for r in rows if r["tuning"] == "0"]
    assert sorted((r["algorithm"], r["seed"]) for r in final) == [
        (a, s) for a in ("ppo", "rloo") for s in ("0", "1")
    ]
    for r in final:  # with the multiple that did best in tuning
        ours = [t for t in trials if t["algorithm"] == r["algorithm"]]
        assert r["rate"] == max(ours, key=lambda t: float(t["optimality"]))["rate"]
    found = json.loads((folder / "compare.json").read_text())
    ppo, rloo = found["over_environments"]
    low, high = rloo["better_interval"]
    assert 0 <= low <= rloo["better_than_first"] <= high <= 1
    assert ppo["iqm_interval"][0] <= ppo["iqm"] <= ppo["iqm_interval"][1]
    scale = found["environments"]["rlhf_gym/Exact-v0"]
    assert scale["best_deterministic_optimality"] < scale["best_of_n_optimality"]["4"] < 1
    assert "P(better than ppo)" in said
    assert (folder / "compare.png").stat().st_size > 10_000
    page = (folder / "compare.html").read_text()
    assert "rloo" in page
    assert 'src="http' not in page, "one file, no network"
    # One more seed: what is done is kept.
    before = (folder / "results.csv").read_text()
    run(*command, "--seeds", 3, "--options", "rloo.n_waves", 1)
    after = (folder / "results.csv").read_text()
    assert after.startswith(before)
    assert len(after.splitlines()) == len(before.splitlines()) + 2
    # One more rate: each algorithm tries it too, and is compared at its new best alone.
    run(*command, "--seeds", 1, "--options", "rloo.n_waves", 1, "--rates", 1, 10, 100)
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    trials = [r for r in rows if r["tuning"] == "1"]
    assert sorted(r["rate"] for r in trials) == sorted(2 * ["1.0", "10.0", "100.0"])
    found = json.loads((folder / "compare.json").read_text())
    for name, entry in zip(("ppo", "rloo"), found["over_environments"], strict=True):
        ours = [r for r in trials if r["algorithm"] == name]
        best = max(ours, key=lambda r: float(r["optimality"]))["rate"]
        row = next(r for r in rows if (r["algorithm"], r["rate"], r["seed"]) == (name, best, "0"))
        assert entry["iqm"] == pytest.approx(float(row["optimality"]))
    # Other terms would be another comparison: what differs is named, and no row is lost.
    terms = json.loads((folder / "terms.json").read_text())
    terms["options"]["ppo"]["gae_lambda"] = 0.5
    del terms["options"]["ppo"]["critic_lambda"]
    (folder / "terms.json").write_text(json.dumps(terms))
    before = (folder / "results.csv").read_text()
    said = run(*command, "--seeds", 4, "--options", "rloo.n_waves", 1, code=2)
    assert "ppo.critic_lambda = (no such option), not None, ppo.gae_lambda = 0.5, not 0.8" in said
    assert (folder / "results.csv").read_text() == before
    # A folder from before there was --tuned.
    terms = {name: terms[name] for name in ("tokens", "options")}
    terms["options"].pop("ppo")
    (folder / "terms.json").write_text(json.dumps(terms))
    other = ("--options", "rloo.n_waves", 1, "--tuned", "rloo", "max_grad_norm")
    said = run(*command, "--seeds", 4, *other, code=2)
    assert "tuned rloo = learning_rate, not max_grad_norm" in said
    assert (folder / "results.csv").read_text() == before


def test_rates_multiply_the_option_that_is_tuned(monkeypatch, tmp_path):
    from agents.runs import comparison
    from agents.runs.comparison_options import ComparisonOptions

    seen = []

    def measured(ruler, algorithm, options, *others, **keywords):
        seen.append(options)
        return {}

    monkeypatch.setattr(comparison, "train_and_measure", measured)
    config = ComparisonOptions(
        algorithms=("ppo", "sb3_trpo"), rates=(3.0,), tuned={"sb3_trpo": "target_kl"},
        options={"sb3_trpo.target_kl": "0.02"}, num_envs=2, run_dir=tmp_path, device="cpu",
    )  # fmt: skip
    for algorithm in config.algorithms:
        comparison.trained(config, comparison.Job("rlhf_gym/Exact-v0", algorithm, True, 3.0, 1000))
    assert seen == [{"learning_rate": 3 * ppo.Config().learning_rate}, {"target_kl": 0.06}]


def test_a_comparison_says_what_is_wrong_before_hours_are_spent(tmp_path):
    command = ["compare.py", "--algorithms", "ppo", "--run-dir", tmp_path, "--device", "cpu"]
    assert "ppo has no option 'gamme'" in run(*command, "--options", "ppo.gamme", 1, code=2)
    assert "give ALGORITHM.NAME" in run(*command, "--options", "gamma", 1, code=2)
    assert "must be at least 1" in run(*command, "--total-tokens", 0, code=2)
    assert "one for each" in run(*command, "--total-tokens", 1, 2, code=2)
    assert "must be one of ['ppo']" in run(
        *command, "--rates", 1, "--tuned", "rloo", "gamma", code=2
    )
    wrong = ("--rates", 1, "--tuned", "ppo", "critic")
    assert "ppo has no option critic that is a number" in run(*command, *wrong, code=2)
    assert "give --rates too" in run(*command, "--tuned", "ppo", "clip_range", code=2)


def test_other_projects_tests_run_with_names_exchanged(tmp_path):
    tests = tmp_path / "source" / "tests"
    tests.mkdir(parents=True)
    (tests / "test_run.py").write_text(
        "import pytest\n"
        "from stable_baselines3 import A2C, PPO, SAC\n\n"
        "@pytest.mark.parametrize('algorithm', [A2C, SAC])\n"
        "def test_learns(algorithm):\n"
        '    model = algorithm("MlpPolicy", "CartPole-v1", policy_kwargs=dict(net_arch=[8]))\n'
        "    model.learn(5)\n"
        "    assert type(model.policy).__name__ == 'CausalLMPolicy'\n\n"
        "def test_fails():\n"
        '    assert PPO("MlpPolicy", "CartPole-v1").gamma == 0.5\n\n'
        "def test_alone():\n"
        "    pass\n"
    )
    folder = tmp_path / "run"
    said = run("studies/upstream_tests.py", "--source", tmp_path / "source", "--run-dir", folder)
    rows = json.loads((folder / "rows.json").read_text())
    found = {row["test"].split("::")[1]: (row["algorithm"], row["outcome"]) for row in rows}
    assert found == {
        "test_learns[A2C]": ("A2C", "passed"),
        "test_learns[SAC]": ("SAC", "not applicable"),
        "test_fails": ("PPO", "failed"),
        "test_alone": ("", "not applicable"),
    }
    (reason,) = (row["reason"] for row in rows if row["outcome"] == "failed")
    assert "assert 0.99 == 0.5" in reason
    assert "FAILED tests/test_run.py::test_fails" in said
    assert (tests / "test_run.py").read_text().count("CartPole") == 2, "only a copy is changed"
    run("studies/upstream_tests.py", "--source", tmp_path, code=2)
