"""What an iteration costs, counted and not timed: forward passes, prefills, reads by the host."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import PLAIN, count_forwards
from torch.utils._python_dispatch import TorchDispatchMode

from agents import ppo
from agents.sb3 import PPO, build
from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.lm.decoding import sampling
from rlhf_gym.lm.decoding.sampling import sample_responses, sample_with_log_probs
from rlhf_gym.rewards.reward_model import RewardModel

N = 8
READS = ("aten::_local_scalar_dense", "aten::nonzero")
"""Operations whose answer the host waits for, on a GPU."""


class HostReads(TorchDispatchMode):
    """Counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += func.name().split(".")[0] in READS
        return func(*args, **(kwargs or {}))


@contextmanager
def counted(work: Any) -> Iterator[list[int]]:
    """How many rows each call of a bound method got."""
    owner, name, method = work.__self__, work.__name__, work
    rows: list[int] = []

    def watched(tokens: torch.Tensor, *rest: Any, **options: Any) -> Any:
        rows.append(len(tokens))
        return method(tokens, *rest, **options)

    setattr(owner, name, watched)
    try:
        yield rows
    finally:
        delattr(owner, name)


@pytest.fixture
def scored_env(
    make_vector_env: Callable[..., TokenVectorEnv], save_reward_model: Callable[[], str]
) -> TokenVectorEnv:
    env = make_vector_env(N, reward=RewardModel.load(save_reward_model()))
    env.reset(seed=0)
    return env


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_iteration_takes_so_many_passes_and_no_more(scored_env, precision):
    env, objective = scored_env, scored_env.objective
    assert isinstance(objective.reward, RewardModel)
    learner = build(
        PPO,
        env,
        **PLAIN,
        n_epochs=3,
        n_minibatches=1,
        policy_options={"critic": objective.reference.model.name_or_path, "precision": precision},
        device="cpu",
        seed=0,
    )
    policy = learner.policy
    assert not policy.critic.shared
    learner.learn(1)  # probes and the known scale, once
    with (
        count_forwards(policy.core) as ours,
        count_forwards(policy.critic.lm) as critic,
        count_forwards(objective.reference) as reference,
        counted(objective.reward.member_scores) as reward,
    ):
        learner.learn(1, reset_num_timesteps=False)
    lengths = (learner.rollout_buffer.actions >= 0).sum(0)
    whole = [rows for rows, tokens in ours if tokens > 1]
    scoring = int(precision == "bf16")  # in float32 decoding knows the log-probs
    assert len(whole) == 1 + scoring + 3, "a prefill, a pass that scores, one for each epoch"
    assert len(ours) - len(whole) == lengths.max() - 1, "decoding steps"
    assert len(critic) == 1 + 3, "the critic does not decode"
    assert len(reference) == 1, "one pass over whole sequences"
    assert reward == [N], "one call"


def test_the_host_reads_nothing_for_each_token(load_lm):
    lm = load_lm("llama")
    prompts = torch.tensor([[2, 5, 6], [2, 7, 8], [2, 5, 6]])
    counts = []
    for budget in (4, 12):
        sample_responses(lm, prompts, budget, stop_at_eos=False)
        with HostReads() as reads:
            sample_responses(lm, prompts, budget, stop_at_eos=False)
        counts.append(reads.count)
    assert counts[0] == counts[1] > 0


def test_where_rows_end_it_reads_one_number_a_token(load_lm):
    lm = load_lm("llama")
    prompts = torch.tensor([[2, 5, 6], [2, 7, 8]])
    torch.manual_seed(0)
    counts = []
    for budget in (2, 12):
        with HostReads() as reads:
            tokens = sample_responses(lm, prompts, budget)
        counts.append((reads.count, int((tokens >= 0).sum(1).max())))
    (few, _), (many, steps) = counts
    assert many - few <= steps + 2 * len(prompts), (
        "and two more for each time that rows are dropped"
    )


def test_on_a_gpu_it_reads_one_number_in_eight_tokens(load_lm, monkeypatch):
    assert sampling.look_every(torch.device("cuda")) == 8
    lm = load_lm("llama")
    prompts = torch.tensor([[2, 5, 6], [2, 7, 8], [3, 4, 9], [2, 9, 9]])
    at_once = sample_with_log_probs(lm, prompts, 24, deterministic=True)
    assert len(set((at_once.responses >= 0).sum(1).tolist())) > 1, "rows end at different tokens"
    reads = []
    for every in (1, 8):
        monkeypatch.setattr(sampling, "look_every", lambda device, every=every: every)
        with HostReads() as counted_reads:
            found = sample_with_log_probs(lm, prompts, 24, deterministic=True)
        assert torch.equal(found.responses, at_once.responses)
        torch.testing.assert_close(found.log_probs, at_once.log_probs, atol=1e-5, rtol=0)
        reads.append(counted_reads.count)
    assert reads[1] < reads[0]


def test_a_reward_model_starts_a_critic_that_costs_no_more(scored_env):
    learner = ppo.make(ppo.Config(n_minibatches=1), scored_env).algorithm
    learner.learn(1)
    assert not learner.policy.critic.shared
    with count_forwards(learner.policy.critic.lm) as critic:
        learner.learn(1, reset_num_timesteps=False)
    assert len(critic) == 1 + 2
