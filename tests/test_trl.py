"""The first update of RLOO and GRPO is TRL's, on the same responses; skipped without TRL."""

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from conftest import play_rollout

from agents.runs.algorithm import load_algorithm
from agents.sb3.rollout.buffer import SequenceSamples
from rlhf_gym.lm.loading import load_causal_lm
from rlhf_gym.tokens import PAD, Sequences

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    trl = pytest.importorskip("trl", minversion="1.0")
    datasets = pytest.importorskip("datasets")

pytestmark = pytest.mark.filterwarnings("ignore")

N, K = 8, 4


def ours(make_vector_env: Any, name: str, **options: Any) -> tuple[Any, SequenceSamples]:
    """A learner after one rollout, and its one minibatch, groups in turn."""
    env = make_vector_env(N)
    env.reset(seed=0)
    module = load_algorithm(name)
    config = module.Config(samples_per_prompt=K, n_waves=1, **options)
    learner = module.make(config, env).algorithm
    play_rollout(learner)
    (minibatch,) = learner.rollout_buffer.get(None, K)
    learner.policy.set_training_mode(True)
    learner._gradient(minibatch)
    return learner, minibatch


def as_trl(batch: SequenceSamples) -> dict[str, torch.Tensor]:
    """The same responses as TRL pads them: prompts on the left, responses on the right."""
    sequences = batch.observations
    assert isinstance(sequences, Sequences)
    rows = [row[row != PAD] for row in sequences.tokens]
    starts, lengths = sequences.starts.tolist(), sequences.lengths.tolist()
    prompts = torch.zeros(len(rows), max(starts), dtype=torch.int64)
    replies = torch.zeros(len(rows), max(lengths), dtype=torch.int64)
    grids = {"old": torch.zeros(replies.shape), "ref": torch.zeros(replies.shape)}
    prompt_mask, reply_mask = torch.zeros_like(prompts), torch.zeros_like(replies)
    first = 0
    for i, (row, start, length) in enumerate(zip(rows, starts, lengths, strict=True)):
        prompts[i, -start:], prompt_mask[i, -start:] = row[:start], 1
        replies[i, :length], reply_mask[i, :length] = row[start : start + length], 1
        grids["old"][i, :length] = batch.old_log_prob[first : first + length]
        grids["ref"][i, :length] = batch.ref_log_prob[first : first + length]
        first += length
    last = torch.cumsum(sequences.lengths, 0) - 1
    return {
        "prompt_ids": prompts,
        "prompt_mask": prompt_mask,
        "completion_ids": replies,
        "completion_mask": reply_mask,
        "advantages": batch.advantages[last],
        "old_per_token_logps": grids["old"],
        "ref_per_token_logps": grids["ref"],
        "old_logps": grids["old"].sum(1),
        "num_items_in_batch": reply_mask.sum(),
    }


def theirs(
    kind: str, learner: Any, inputs: dict[str, torch.Tensor], folder: Any, **options: Any
) -> list[torch.Tensor]:
    """The gradient of TRL's trainer on these responses."""
    core = learner.policy.core
    config = getattr(trl, f"{kind}Config")(
        output_dir=str(folder),
        per_device_train_batch_size=N,
        num_generations=K,
        temperature=core.temperature,
        beta=learner.env.token_env.objective.kl_coef,
        use_cpu=True,
        report_to=[],
        bf16=False,
        **options,
    )
    trainer = getattr(trl, f"{kind}Trainer")(
        model=load_causal_lm(learner.policy.model_name),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        train_dataset=datasets.Dataset.from_dict({"prompt": ["a b"] * N}),
        processing_class=core.tokenizer,
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    trainer._compute_loss(trainer.model, inputs).backward()
    return [p.grad for p in trainer.model.parameters()]


def close(a: list[torch.Tensor], b: list[torch.Tensor], scale: float = 1.0) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, scale * y, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("mean_over", ["response", "token"])
def test_grpos_gradient_is_trls(make_vector_env, tmp_path, mean_over):
    learner, batch = ours(make_vector_env, "grpo", mean_over=mean_over)
    gradient = [p.grad.clone() for p in learner.policy.lm.parameters()]
    loss_type = "grpo" if mean_over == "response" else "bnpo"
    close(gradient, theirs("GRPO", learner, as_trl(batch), tmp_path, loss_type=loss_type))
    assert max(g.abs().max() for g in gradient) > 1e-3


def test_rloos_gradient_is_trls_but_for_the_mean_length(make_vector_env, tmp_path):
    """TRL takes a mean over responses of sums over tokens, we a mean over tokens."""
    learner, batch = ours(make_vector_env, "rloo")
    gradient = [p.grad.clone() for p in learner.policy.lm.parameters()]
    assert isinstance(batch.observations, Sequences)
    mean_length = float(batch.observations.lengths.double().mean())
    close(theirs("RLOO", learner, as_trl(batch), tmp_path), gradient, mean_length)
    # And the advantages are TRL's formula on the returns: score − β Σ k.
    returns = learner.rollout_buffer.rewards.sum(0).reshape(-1, K)
    baselines = (returns.sum(1, keepdims=True) - returns) / (K - 1)
    first = learner.rollout_buffer.advantages[0].reshape(-1, K)
    np.testing.assert_allclose(first, returns - baselines, rtol=1e-4, atol=1e-5)
    assert math.isfinite(mean_length)
