"""The whole journey from Python: comparisons, reward model, policy, evaluation."""

import json
import math
import re
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import torch
from conftest import PROMPTS, text_reward

from agents.ppo import Config as PPOConfig
from agents.runs import JourneyOptions, label_samples, run_journey, train
from rlhf_gym.errors import InputError
from rlhf_gym.evaluation import analyse_reward_model, evaluate_policy
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.rewards.reward_model import RewardModel
from rlhf_gym.training import RewardTraining, fine_tune, fit_reward_model, load_examples

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
(EXAMPLE,) = [
    block
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    if "label_samples" in block
]

SMALL = {
    "(task, 3072)": "(task, 128)",
    "num_envs=256": "num_envs=16",
    "total_tokens=180_000": "total_tokens=600",
    "(policy, held_out)": "(policy, held_out, episodes=16, prompts=4, reference_samples=8)",
}
"""The same at a size for a test."""


def test_the_example_takes_twelve_lines_and_runs(tmp_path, monkeypatch):
    assert len([line for line in EXAMPLE.splitlines() if line]) <= 12
    code = EXAMPLE
    for whole, small in SMALL.items():
        assert code.count(whole) == 1
        code = code.replace(whole, small)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(code, "example", "exec"), names)
    figures, accuracy = names["figures"], names["accuracy"]
    for name in ("score_before", "score_after", "gold_after", "objective_after", "kl"):
        assert math.isfinite(figures[name]["value"]), name
    assert figures["kl"]["value"] > 1e-6, "it has learned"
    assert 0 <= accuracy["accuracy"]["value"] <= 1
    assert accuracy["comparisons"] + accuracy["held_out"] == 128
    assert [path.name for path in tmp_path.iterdir()] == ["reward_model"]
    # What the environment pays is what was trained.
    paid = names["env"].objective.reward
    rows = torch.tensor([[1, 5, 6, 7]])
    torch.testing.assert_close(paid.scores(rows), names["reward_model"].scores(rows))


@pytest.fixture
def small(make_vector_env, monkeypatch, tmp_path) -> Any:
    """An environment of a tiny model, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    env = make_vector_env(16)
    env.objective.reference.model.requires_grad_(False)
    return env


LITTLE = PPOConfig(n_minibatches=2, n_epochs=1)


def test_without_progress_and_folder_nothing_is_said_and_nothing_written(
    small, save_lm, tmp_path, capfd
):
    model, texts = save_lm(seed=5), tmp_path / "texts.json"
    texts.write_text(json.dumps([f"{a} {b} {a}" for a in "abcdef" for b in "ghijkl"]))
    lm = CausalLM.load(model)
    capfd.readouterr()
    comparisons = label_samples(small, 80, human=text_reward, progress=False)
    options = RewardTraining(epochs=1.0, batch_size=16)
    quiet: dict[str, Any] = {"held_out": 0.4, "progress": False}
    fitted = fit_reward_model(comparisons, model, options, device="cpu", **quiet)
    analysis = analyse_reward_model(fitted.reward_model, comparisons, progress=False)
    trained = train(small, "ppo", LITTLE, total_tokens=200, progress=False)
    sizes = {"episodes": 20, "prompts": len(PROMPTS), "reference_samples": 4}
    figures = evaluate_policy(trained.policy, small, **sizes, progress=False)
    examples = load_examples(str(texts), lm.tokenizer, lm.eos_ids, held_out=0.3)
    often = {"epochs": 4.0, "batch_tokens": 64, "learning_rate": 1e-3}
    losses = fine_tune(lm, examples, max_tokens=16, **often, progress=False)
    assert capfd.readouterr() == ("", "")
    assert [path.name for path in tmp_path.iterdir()] == ["texts.json"]
    assert trained.metrics[-1]["tokens"] == trained.figures["tokens"] >= 200
    assert math.isfinite(trained.metrics[0]["rollout/score"])
    assert analysis["comparisons"] == 80
    assert math.isfinite(figures["objective_after"]["value"])
    assert losses["held_out_loss_after"]["value"] < losses["held_out_loss_before"]["value"]


def test_a_folder_gets_what_the_commands_write(small, tmp_path):
    sizes = {"episodes": 20, "prompts": len(PROMPTS), "reference_samples": 4}
    trained = train(small, "ppo", LITTLE, total_tokens=200, run_dir="run")
    live = evaluate_policy(trained.policy, small, **sizes)
    saved = evaluate_policy(Path("run/policy"), small, **sizes, run_dir="run")
    assert live == saved, "the policy that was saved is the one that is returned"
    written = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert written["kl"]["value"] == live["kl"]["value"]
    for name in ("policy", "reference", "policy.json", "metrics.csv", "samples.jsonl"):
        assert (tmp_path / "run" / name).exists(), name
    assert not (tmp_path / "run" / "checkpoints").exists()
    comparisons = label_samples(small, 80, human="conftest:text_reward")
    fitted = fit_reward_model(comparisons, trained.policy, held_out=0.4, run_dir="rm")
    loaded = RewardModel.load(str(tmp_path / "rm" / "reward_model"))
    rows = torch.tensor([[2, 5, 6, 7]])
    torch.testing.assert_close(loaded.scores(rows), fitted.reward_model.scores(rows))
    assert json.loads((tmp_path / "rm" / "reward_model.json").read_text()) == fitted.figures


def test_a_backbone_that_has_learned_is_taken_as_it_is(small):
    """A model that changed since it was loaded by name starts the reward model as it is now."""
    comparisons = label_samples(small, 80, human=text_reward, progress=False)
    lm = small.objective.reference.trainable()
    with torch.no_grad():
        for parameter in lm.model.parameters():
            parameter.mul_(1.1)
    still = RewardTraining(learning_rate=1e-12, weight_decay=0.0)
    model, _ = fit_reward_model(comparisons, lm, still, held_out=0.4, progress=False)
    ours = dict(model.model.model.named_parameters())
    for name, parameter in lm.model.model.named_parameters():
        torch.testing.assert_close(ours[name], parameter, atol=1e-6, rtol=1e-6)
    assert model.model.name_or_path == lm.model.name_or_path


def test_a_wrapped_environment_is_refused(small):
    wrapped = gymnasium.wrappers.vector.RecordEpisodeStatistics(small)
    with pytest.raises(InputError, match="without wrappers"):
        train(wrapped, total_tokens=10)
    with pytest.raises(InputError, match="without wrappers"):
        evaluate_policy(small.objective.reference, wrapped)


def test_sizes_that_say_nothing_are_refused(small):
    with pytest.raises(InputError, match="prompts must be at least 2"):
        evaluate_policy(small.objective.reference, small, prompts=1)
    with pytest.raises(InputError, match="total_tokens must be at least 1"):
        train(small, total_tokens=0)


def test_the_journey_is_silent_when_asked_and_goes_on(save_lm, tmp_path, capfd):
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps([f"{a} {b}" for a in "abcdefgh" for b in "ijklmnop"]))
    options = JourneyOptions(
        env="rlhf_gym/Text-v0",
        env_kwargs={
            "reference": save_lm(),
            "prompts": str(prompts),
            "max_prompt_tokens": "4",
            "max_new_tokens": "5",
            "held_out": "0.3",
        },
        human="conftest:text_reward",
        comparisons=96,
        total_tokens=200,
        num_envs=16,
        episodes=16,
        prompts=8,
        reference_samples=4,
        run_dir=tmp_path / "run",
        device="cpu",
    )
    capfd.readouterr()
    summary = run_journey(options, LITTLE, progress=False)
    assert capfd.readouterr() == ("", "")
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert math.isfinite(summary["score_after"]["value"])
    # Again: every stage finds its outputs.
    (tmp_path / "run" / "summary.json").unlink()
    assert run_journey(options, LITTLE, progress=False) == summary
    with pytest.raises(InputError, match="n_epochs = 1, not 2"):
        run_journey(options, PPOConfig(n_minibatches=2), progress=False)
