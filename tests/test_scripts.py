"""Every script runs as a user runs it: exit 0 done, 2 bad input, and nothing half-written."""

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPTS = Path(__file__).parents[1] / "scripts"


def load_script(path: str) -> ModuleType:
    """Load a script as a module; the scripts next to it are on the path while it loads."""
    file = SCRIPTS / path
    sys.path.insert(0, str(file.parent))
    try:
        spec = importlib.util.spec_from_file_location(path.replace("/", "_")[:-3], file)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up there
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(file.parent))
    return module


def run(script: str, *arguments: object, code: int = 0, path: Path | None = None) -> str:
    """A script's output; `path` is where Python may find modules of a user's own."""
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"} | ({"PYTHONPATH": str(path)} if path else {}),
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def tiny(save_lm, tmp_path_factory) -> list[str]:
    """--env-kwargs of a tiny Text-v0 with prompts on both sides of the split."""
    path = tmp_path_factory.mktemp("scripts") / "prompts.json"
    path.write_text(json.dumps([f"{a} {b}" for a in "abcdefgh" for b in "ijklmnop"]))
    return [
        *("reference", save_lm()),
        *("prompts", str(path)),
        *("max_prompt_tokens", "4"),
        *("max_new_tokens", "5"),
        *("kl_coef", "0.2"),
        *("held_out", "0.3"),
    ]


@pytest.fixture(scope="module")
def journey(tiny, tmp_path_factory) -> tuple[Path, list[object]]:
    """A run folder of rlhf.py and the command that made it."""
    run_dir = tmp_path_factory.mktemp("journey") / "run"
    command = [
        *("--env", "rlhf_gym/Text-v0"),
        *("--env-kwargs", *tiny),
        *("--human", "conftest:text_reward"),
        *("--comparisons", 96, "--reward-epochs", 1, "--reward-batch-size", 16),
        *("--total-tokens", 400, "--num-envs", 16, "--n-minibatches", 2),
        *("--episodes", 160, "--prompts", 8, "--reference-samples", 16),
        *("--run-dir", run_dir, "--device", "cpu"),
    ]
    return run_dir, command


@pytest.fixture(scope="module", autouse=True)
def importable_conftest(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        yield


def test_rlhf_makes_the_whole_run_folder_and_skips_what_is_done(journey):
    run_dir, command = journey
    run("rlhf.py", *command)
    for name in (
        "config.json comparisons.jsonl reward_model.json metrics.csv training_samples.jsonl "
        "policy.json evaluation.json samples.jsonl summary.json report.html curves.png reference "
        "reward_model policy"
    ).split():
        assert (run_dir / name).exists(), name
    assert not list(run_dir.glob(".*partial*"))
    summary = json.loads((run_dir / "summary.json").read_text())
    for key in (
        "env_id algorithm seed episodes tokens seconds tokens_per_second score_before score_after "
        "gold_before gold_after kl objective_before objective_after objective_optimum optimality "
        "hashes versions"
    ).split():
        assert key in summary, key
    assert summary["score_after"].keys() == {"value", "se", "n"}
    assert summary["tokens"] >= 150
    with (run_dir / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) >= 2
    assert abs(float(rows[0]["rollout/kl_per_sequence"])) < 1e-4
    assert "Token by token" in (run_dir / "report.html").read_text()
    stamp = (run_dir / "policy" / "model.safetensors").stat().st_mtime_ns
    again = run("rlhf.py", *command)
    assert again.count("already done") == 4
    assert (run_dir / "policy" / "model.safetensors").stat().st_mtime_ns == stamp
    run("rlhf.py", *command, "--kl-old-coef", 0.5, code=2)


def test_rounds_label_the_policy_s_own_samples_and_go_on(journey, tmp_path):
    _, command = journey
    at = command.index("--run-dir")
    command = [*command[:at], "--run-dir", tmp_path / "run", *command[at + 2 :], "--rounds", 2]
    run("rlhf.py", *command)
    first, last = tmp_path / "run" / "rounds" / "1", tmp_path / "run"
    early, late = (
        (folder / "comparisons.jsonl").read_text().splitlines() for folder in (first, last)
    )
    assert late[: len(early)] == early
    assert len(late) == 2 * len(early) > 10
    with (last / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    # It goes on from the first round's policy, and still pays for leaving the reference.
    assert abs(float(rows[0]["rollout/kl_per_sequence"])) > 1e-4
    summary = json.loads((last / "summary.json").read_text())
    parts = [json.loads((f / "policy.json").read_text()) for f in (first, last)]
    assert summary["tokens"] == sum(part["tokens"] for part in parts)
    assert "Rounds of labelling" in (last / "report.html").read_text()
    hindsight = json.loads((first / "round.json").read_text())
    assert hindsight["accuracy_on_own_samples"]["n"] <= len(early)
    assert run("rlhf.py", *command).count("already done") == 7


def test_the_saved_policy_generates_with_plain_transformers(journey):
    run_dir, _ = journey
    model = AutoModelForCausalLM.from_pretrained(run_dir / "policy")
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "policy")
    ids = tokenizer("a b", return_tensors="pt").input_ids
    torch.manual_seed(0)
    out = model.generate(ids, max_new_tokens=4)
    assert ids.shape[1] < out.shape[1] <= ids.shape[1] + 4
    assert model.generation_config.temperature == 1.0
    assert model.generation_config.do_sample


def test_train_policy_resumes_refuses_and_evaluates(tiny, tmp_path):
    common = [
        *("--env", "rlhf_gym/Text-v0"),
        *("--env-kwargs", *tiny, "reward_model", "rlhf_gym.rewards.human:compound"),
        *("--num-envs", 8, "--device", "cpu", "--run-dir", tmp_path / "run"),
    ]
    run("train_policy.py", *common, "--total-tokens", 100)
    assert "nothing to do" in run("train_policy.py", *common, "--total-tokens", 100)
    assert "total_tokens = 100, not 50" in run(
        "train_policy.py", *common, "--total-tokens", 50, code=2
    )
    folder = tmp_path / "evaluation"
    evaluation = [
        "evaluate.py",
        *("--policy", tmp_path / "run" / "policy", "--env", "rlhf_gym/Text-v0"),
        *("--env-kwargs", *tiny, "reward_model", "rlhf_gym.rewards.human:compound"),
        *("--episodes", 64, "--prompts", 8, "--reference-samples", 8),
        *("--run-dir", folder),
    ]
    assert "objective" in run(*evaluation)
    assert (folder / "samples.jsonl").exists()
    what = json.loads((folder / "evaluation_config.json").read_text())
    assert what["policy"] == str(tmp_path / "run" / "policy")
    assert (what["env"], what["seed"]) == ("rlhf_gym/Text-v0", 0)
    assert what["env_kwargs"]["reward_model"] == "rlhf_gym.rewards.human:compound"
    # A folder holds one evaluation.
    before = (folder / "evaluation.json").read_bytes()
    assert "seed = 0, not 1" in run(*evaluation, "--seed", 1, code=2)
    assert (folder / "evaluation.json").read_bytes() == before
    # That of the training may be the one; figures of another script are left alone.
    run(*evaluation, "--run-dir", tmp_path / "run")
    assert (tmp_path / "run" / "evaluation.json").exists()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["total_tokens"] == 100
    (tmp_path / "run" / "evaluation_config.json").unlink()
    assert "written by another script" in run(*evaluation, "--run-dir", tmp_path / "run", code=2)


def test_resuming_without_a_checkpoint_is_said(tmp_path):
    command = [
        *("train_policy.py", "--env", "rlhf_gym/Exact-v0", "--algorithm", "sb3_ppo"),
        *("--num-envs", 8, "--n-steps", 4, "--total-tokens", 32, "--device", "cpu"),
        *("--run-dir", tmp_path / "run", "--resume"),
    ]
    said = f"no checkpoint in {tmp_path / 'run'}: training starts from scratch"
    assert said in run(*command)
    assert said not in run(*command), "it is done"


@pytest.fixture
def policy_script(monkeypatch):
    """train_policy.py in this process, where importing costs nothing: its exit status."""
    from agents.cli import train_policy

    def status(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["train_policy.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as raised:
            train_policy.cli()
        return raised.value.code

    return status


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--total-tokens", 0), "total_tokens must be at least 1, not 0"),
        (("--algorithm", "sb3_ppo", "--n-steps", 0), "n_steps must be at least 1, not 0"),
        (("--algorithm", "sb3_ppo", "--batch-size", 0), "batch_size must be at least 1, not 0"),
        (("--env-kwargs", "kl_coef", "abc"), "kl_coef: 'abc' is not a number"),
        (("--env-kwargs", "max_new_tokens", 4.5), "max_new_tokens: 4.5 is not a whole number"),
        (("--env-kwargs", "rows_per_prompt", "abc"), "rows_per_prompt: 'abc' is not a whole"),
        (("--env-kwargs", "dense", "no"), "dense: 'no' is not True or False"),
    ],
)
def test_values_of_the_wrong_kind_are_bad_input(
    policy_script, tmp_path, capsys, arguments, message
):
    more = ("--run-dir", tmp_path / "run", "--device", "cpu", "--num-envs", 8)
    assert policy_script("--env", "rlhf_gym/Exact-v0", *more, *arguments) == 2
    assert f"error: {message}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("algorithm", ["sb3_ppo", "sb3_a2c"])
def test_stock_algorithms_train(tiny, tmp_path, algorithm):
    run(
        "train_policy.py",
        *("--algorithm", algorithm, "--env", "rlhf_gym/Text-v0", "--n-steps", 7),
        *("--env-kwargs", *tiny, "reward_model", "rlhf_gym.rewards.human:compound"),
        *("--num-envs", 4, "--total-tokens", 60, "--run-dir", tmp_path / "run"),
    )
    assert (tmp_path / "run" / "policy" / "model.safetensors").exists()


def test_help_shows_the_options_of_the_algorithm():
    assert "--kl-old-coef" in run("train_policy.py", "--help")
    assert "--use-rms-prop" in run("train_policy.py", "--algorithm", "sb3_a2c", "--help")


@pytest.mark.parametrize("script", ["train_policy.py", "rlhf.py"])
def test_wandb_asked_for_and_not_there_is_said_at_once(script, tmp_path, monkeypatch):
    (tmp_path / "wandb.py").write_text("raise ImportError('none here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    said = run(script, "--wandb", "--run-dir", tmp_path / "run", code=2)
    assert "pip install wandb" in said
    assert not (tmp_path / "run").exists()


def test_bad_input_exits_2_and_leaves_nothing(tiny, tmp_path, save_lm):
    out = tmp_path / "none"
    text = ["--env", "rlhf_gym/Text-v0", "--run-dir", out, "--env-kwargs", *tiny]
    reward = ["reward_model", "rlhf_gym.rewards.human:compound"]
    assert "error:" in run("train_policy.py", *text, "reward_model", "/nowhere", code=2)
    assert "nonsense" in run("train_policy.py", *text, *reward, "nonsense", 1, code=2)
    assert "nowhere" in run("train_policy.py", "--algorithm", "nowhere", code=2)
    assert "Nope-v0" in run("train_policy.py", "--env", "rlhf_gym/Nope-v0", code=2)
    missing = run(
        "train_reward_model.py",
        *("--data", tmp_path / "no.jsonl", "--backbone", save_lm(), "--run-dir", out),
        code=2,
    )
    assert "no such file" in missing
    run("evaluate.py", "--policy", "/nowhere", *text, *reward, code=2)
    run("bench/speed.py", "--shapes", "Z", code=2)
    assert not out.exists() or not any(out.iterdir())


def test_bench_speed_writes_its_rows(tmp_path):
    file = tmp_path / "speed.json"
    said = run(
        *("bench/speed.py", "--shapes", "E-width-64", "--iterations", 1, "--row-episodes", 1),
        *("--systems", "rlhf_gym", "generate", "limit", "sb3_rows", "--output", file, "--profile"),
    )
    rows = json.loads(file.read_text())
    stages = {row["stage"] for row in rows if row["system"] == "rlhf_gym"}
    assert stages == {"sample", "play", "update", "iteration"}
    assert all(row["tokens_per_second"] > 0 for row in rows)
    whole = {row["system"]: row for row in rows if row["stage"] == "iteration"}
    assert whole["rlhf_gym"]["work"]["optimiser_steps"] == 16
    assert whole["rlhf_gym"]["work"]["parameters"] == whole["limit"]["work"]["parameters"]
    work = whole["rlhf_gym"]["work"]
    taken = whole["rlhf_gym"]["peak_bytes"] - whole["rlhf_gym"]["base_bytes"]
    assert 0.2 < taken / work["expected_bytes"] < 5, "of so small a model libraries take their part"
    assert f"{taken / work['expected_bytes']:.2f}" in said
    assert "ratio" in said
    spent = whole["rlhf_gym"]["operations"]
    assert 0 < spent["aten::mm"] < spent["all"] and whole["generate"]["operations"] is None
    run("bench/speed.py", "--systems", "trl_ppo", code=2)
    run("bench/speed.py", "--systems", "limit", "--shapes", "B", code=2)


NO_ROUNDS = """
from dataclasses import dataclass

@dataclass(frozen=True)
class Config:
    'No options.'

class Learner:
    policy = None

def make(config, env):
    return Learner()
"""


def test_rounds_need_a_learner_that_can_go_on(tiny, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "no_rounds.py").write_text(NO_ROUNDS)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), str(tmp_path)]))
    said = run(
        "rlhf.py",
        *("--env", "rlhf_gym/Text-v0", "--env-kwargs", *tiny),
        *("--human", "conftest:text_reward", "--algorithm", "mine.no_rounds", "--rounds", 2),
        *("--comparisons", 64, "--reward-epochs", 1, "--total-tokens", 100, "--num-envs", 4),
        *("--run-dir", tmp_path / "run", "--device", "cpu"),
        code=2,
    )
    assert "which --rounds needs" in said
