"""What a training shows of itself: figures that add up, samples that are what the update saw."""

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from conftest import PLAIN, PROMPTS
from stable_baselines3.common.callbacks import BaseCallback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from agents import ppo
from agents.sb3 import PPO, build
from agents.sb3.learning.learner import SB3Learner
from agents.sb3.learning.token_samples import SampleCallback, token_texts
from agents.sb3.loss import Loss
from agents.sb3.rollout.metrics import Scale, known_scale, rollout_metrics
from agents.tracking.training_run import TrainingRun
from agents.tracking.wandb import require_wandb
from rlhf_gym.errors import InputError
from rlhf_gym.lm.causal_lm import CausalLM

N, TOTAL = 16, 320


class Seen(BaseCallback):
    """Keeps what each rollout put into the buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.rollouts: list[dict[str, np.ndarray]] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        buffer = self.model.rollout_buffer
        names = ("actions", "values", "advantages", "rewards")
        self.rollouts.append({name: getattr(buffer, name).copy() for name in names})


@pytest.fixture
def learn(make_vector_env, tmp_path) -> Callable[..., list[dict[str, float]]]:
    """Trains in `tmp_path` and returns the rows of metrics.csv."""

    def run(every: int = 2, total: int = TOTAL, **options: Any) -> list[dict[str, float]]:
        env = make_vector_env(N)
        env.reset(seed=0)
        keywords = {"n_minibatches": 2, "learning_rate": 3e-3, "seed": 0, **options}
        learner = SB3Learner(build(PPO, env, **PLAIN, **keywords), sample_every=every)
        with TrainingRun(tmp_path, total, "test") as training:
            learner.learn(total, training)
        with (tmp_path / "metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        return [{k: float(v) for k, v in row.items() if v} for row in rows]

    return run


def read_samples(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "training_samples.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def test_optimality_lies_on_the_exact_scale():
    env = gymnasium.make_vec("rlhf_gym/Exact-v0", num_envs=64, device="cpu").unwrapped
    learner = build(PPO, env, **PLAIN, seed=0, n_waves=8)
    learner.learn(1, log_interval=None)
    logged = learner.logger.name_to_value
    # The ends are those that the environment's page prints: J_ref and J*.
    shown = (logged["rollout/objective"] - 0.005) / (0.705 - 0.005)
    assert logged["rollout/optimality"] == pytest.approx(shown, abs=2e-3)
    assert abs(logged["rollout/optimality"]) < 0.25, "the reference, up to chance"
    assert known_scale(env) is known_scale(env), "listed once"


def test_optimality_is_0_at_the_reference_and_1_at_the_optimum():
    wave = {
        "score": np.array([1.0, 2.0]),
        "kl_sum": np.array([0.0, 2.0]),
        "length": np.array([2, 2]),
        "finish_reason": np.array(["stop", "length"], dtype=object),
        "log_prob_mean": -1.0,
    }
    objective = rollout_metrics([wave], 0.5, None)["objective"]
    assert objective == pytest.approx(1.0)
    for scale, expected in ((Scale(1.0, 3.0), 0.0), (Scale(0.0, 1.0), 1.0)):
        assert rollout_metrics([wave], 0.5, scale)["optimality"] == pytest.approx(expected)


def test_where_responses_cannot_be_listed_no_optimality_is_claimed(learn):
    assert not any("rollout/optimality" in row for row in learn())


def test_where_every_response_is_worth_the_same_no_optimality_is_claimed():
    same = {"reward_model": "rlhf_gym.rewards.human:compound", "max_new_tokens": 2}  # 0 for letters
    env = gymnasium.make_vec("rlhf_gym/Exact-v0", num_envs=8, device="cpu", **same).unwrapped
    learner = build(PPO, env, **PLAIN, seed=0)
    learner.learn(1, log_interval=None)
    assert learner.logger.name_to_value["rollout/score"] == 0
    assert "rollout/optimality" not in learner.logger.name_to_value


def test_each_stages_rate_is_its_tokens_by_its_seconds(learn):
    rows = learn()
    before = np.diff([0, *(row["tokens"] for row in rows)])
    for i, row in enumerate(rows):
        for stage in ("sample", "play"):
            tokens = row[f"time/{stage}_tokens_per_second"] * row[f"time/{stage}_seconds"]
            assert tokens == pytest.approx(before[i])
        if i == 0:
            continue
        # An update is over once its row is written, so the next one tells of it.
        tokens = row["time/update_tokens_per_second"] * row["time/update_seconds"]
        assert tokens == pytest.approx(before[i - 1])
        last = rows[i - 1]
        stages = sum(last[f"time/{stage}_seconds"] for stage in ("sample", "play"))
        whole = before[i - 1] / row["time/tokens_per_second"]
        assert whole > stages + row["time/update_seconds"]


def test_ratios_are_those_of_every_token_of_the_update(make_vector_env, monkeypatch):
    env = make_vector_env(N)
    options = {"n_epochs": 4, "n_minibatches": 1, "microbatch_tokens": 40}
    learner = build(PPO, env, **PLAIN, seed=0, learning_rate=1e-2, **options)
    ratios: list[torch.Tensor] = []
    terms = Loss.terms

    def spied(self: Loss, *args: Any) -> dict[str, torch.Tensor]:
        found = terms(self, *args)
        ratios.append(found["ratio"].clone())
        return found

    monkeypatch.setattr(Loss, "terms", spied)
    learner.learn(1)
    logged, every = learner.logger.name_to_value, torch.cat(ratios)
    assert len(ratios) > 4, "without several parts per minibatch, nothing is tested"
    assert logged["train/ratio_max"] == pytest.approx(float(every.max()))
    assert logged["train/ratio_min"] == pytest.approx(float(every.min()))
    assert logged["train/ratio_min"] < 0.99 < 1.01 < logged["train/ratio_max"]
    assert logged["train/ratio"] == pytest.approx(float(every.mean()))


@pytest.mark.parametrize("every", [2, 4])
def test_samples_are_of_the_first_update_every_nth_and_the_last(learn, tmp_path, every):
    rows = learn(every)
    expected = sorted({*range(1, len(rows) + 1, every), len(rows)})
    assert len(expected) > 2
    samples = read_samples(tmp_path)
    assert [s["update"] for s in samples[::4]] == expected
    assert [s["tokens"] for s in samples[::4]] == [rows[u - 1]["tokens"] for u in expected]


def test_no_samples_where_none_are_asked_for(learn, tmp_path):
    learn(0)
    assert (tmp_path / "metrics.csv").exists()
    assert not (tmp_path / "training_samples.jsonl").exists()


def test_samples_hold_what_the_update_saw(make_vector_env, tmp_path):
    env = make_vector_env(N)
    env.reset(seed=0)
    seen = Seen()
    learner = build(PPO, env, **PLAIN, seed=0, n_waves=2)
    with TrainingRun(tmp_path, TOTAL, "test") as run:
        learner.learn(TOTAL, callback=[SampleCallback(run, every=1), seen])
    samples = read_samples(tmp_path)
    assert len(samples) == 4 * len(seen.rollouts) >= 8
    for i, sample in enumerate(samples):
        rollout, row = seen.rollouts[i // 4], i % 4 * N // 4
        pieces = sample["pieces"]
        for name in ("value", "advantage"):
            column = rollout[f"{name}s"][: len(pieces), row]
            np.testing.assert_allclose([p[name] for p in pieces], column, atol=1e-5)
        taken = rollout["actions"][:5, row]
        assert len(pieces) == (taken >= 0).sum()
        assert sum(p["log_ratio"] for p in pieces) == pytest.approx(sample["kl"], abs=1e-4)
        # The token's penalty and the score are all there is to the rewards.
        paid = sample["score"] - env.objective.kl_coef * sample["kl"]
        assert rollout["rewards"][:5, row].sum() == pytest.approx(paid, abs=1e-4)
        said = [p["text"] for p in pieces if not p["text"].startswith("<")]
        assert "".join(said) == sample["response"]
        assert sample["prompt"] in PROMPTS
    assert any(abs(s["kl"]) > 1e-3 for s in samples)


def test_recording_samples_changes_no_training(learn, tmp_path):
    def numbers(rows: list[dict[str, float]]) -> list[float]:
        return [row["rollout/objective"] for row in rows]

    with_samples = numbers(learn(1))
    for file in tmp_path.glob("checkpoints/*/*"):
        file.unlink()
    for folder in tmp_path.glob("checkpoints/*"):
        folder.rmdir()
    assert numbers(learn(0)) == with_samples


def test_tensorboard_gets_the_texts(learn, tmp_path):
    learn()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (first, *_) = events.Tensors("samples/0/text_summary")
    sample = read_samples(tmp_path)[0]
    text = first.tensor_proto.string_val[0].decode()
    assert f"{sample['prompt']} ⟶ {sample['response']}" in text
    assert first.step == sample["tokens"]


class Bytes:
    """A tokenizer with one token per byte, so that a character may take several."""

    def __init__(self) -> None:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {c: i for i, c in enumerate([*alphabet, "</s>"])}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token="</s>", clean_up_tokenization_spaces=False
        )

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text).input_ids)

    texts = CausalLM.texts


@pytest.mark.parametrize("text", ["né – 🙂!", "\u2028\n ", "", "�a"])
def test_tokens_joined_are_the_response(text):
    lm = Bytes()
    eos = lm.tokenizer.eos_token_id
    pieces = token_texts(lm, lm.ids("ü"), [*lm.ids(text), eos])
    assert pieces.pop() == "</s>"
    assert "".join(pieces) == text
    assert len(pieces) == len(text.encode())


def test_a_character_cut_off_by_the_budget_shows_at_its_last_token():
    lm = Bytes()
    pieces = token_texts(lm, lm.ids("a"), lm.ids("bé")[:2])
    assert pieces == ["b", "�"]


def test_samples_with_unusual_line_breaks_survive_a_rewind(tmp_path):
    rows = [
        {"tokens": t, "prompt": "a\u2028b", "response": "\x85", "score": 0.0, "kl": 0.0}
        for t in (10, 20, 30)
    ]
    with TrainingRun(tmp_path, 100, "test") as run:
        run.add_samples(rows)
        run.rewind(20)
    assert read_samples(tmp_path) == rows[:2]


def test_a_negative_interval_is_refused(make_vector_env):
    with pytest.raises(InputError, match="sample_every"):
        ppo.make(ppo.Config(sample_every=-1), make_vector_env(2))


class FakeWandb(ModuleType):
    """Notes what Weights & Biases is told."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.begun: list[dict[str, Any]] = []
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.ends: list[int] = []

    def init(self, **options: Any) -> Any:
        self.begun.append(options)
        return SimpleNamespace(
            log=lambda metrics, step: self.rows.append((step, metrics)),
            finish=lambda exit_code: self.ends.append(exit_code),
        )


def test_wandb_gets_the_rows_and_one_id_for_a_resumed_run(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    (tmp_path / "config.json").write_text('{"seed": 3}')
    with TrainingRun(tmp_path, 100, "test") as run:
        run.record(5, {"rollout/score": 1.0})
    assert not fake.begun, "it was not asked for"
    with TrainingRun(tmp_path, 100, "test", wandb=True) as run:
        run.record(10, {"rollout/score": 0.5})
    with (
        pytest.raises(KeyboardInterrupt),
        TrainingRun(tmp_path, 100, "test", wandb=True) as run,
    ):
        run.record(20, {"rollout/score": 0.75})
        raise KeyboardInterrupt
    assert fake.rows == [(10, {"rollout/score": 0.5}), (20, {"rollout/score": 0.75})]
    assert fake.ends == [0, 1]
    first, second = fake.begun
    assert first == second
    assert first["config"] == {"seed": 3}
    assert first["resume"] == "allow"
    assert first["name"] == tmp_path.name, (
        "a run has the name of its folder, wherever the folder is"
    )


def test_wandb_that_is_not_installed_is_an_input_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="pip install wandb"):
        require_wandb()
