"""PPO for RLHF in one file. Read it from top to bottom, copy it, change a line, run it.

    python agents/ppo_single_file.py --env rlhf_gym/Exact-v0 --total-tokens 20000

A language model π answers prompts, one token per action. The environment pays a score at the last
token of a response, and at every token a penalty for leaving the reference model:

    r_t = 1[t is the last token] · score − β · (log π(a_t | s_t) − log π_ref(a_t | s_t))

One update: sample responses; compute log-probs, values, rewards and advantages; take a few epochs
of minibatch steps. With equal options the steps are those of the flagship (`agents/ppo.py`), up to
rounding. Compared with it, this file leaves out:

- checkpoints and --resume, records of samples, explained variance;
- bf16, LoRA, gradient checkpointing, CUDA graphs, a shared trunk for policy and critic;
- entropy bonus, value clipping, whitening, early stopping, KL(π_old ‖ π) in the loss, PPO-ptx;
- an adaptive β, the penalty in the loss, another λ for the critic, baselines without a critic;
- action masks that differ from state to state (top-k, top-p, a minimum length).

Shapes: N rows of the environment, W waves per update, B = N · W responses, b of them in one pass;
P columns of prompt, T of response; M real tokens. What belongs to a token is a grid (B, T), whose
column t is token t of the response. After its end `actions` has PAD, every other grid 0.
"""

import copy
import json
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
import tyro
from torch import Tensor, nn

from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.errors import InputError
from rlhf_gym.lm.decoding.sampling import sample_responses
from rlhf_gym.rewards import RewardModel

PAD = -1  # no token has this id, so no mask has to be guessed from the EOS


@dataclass(frozen=True)
class Config:
    """Options of PPO."""

    learning_rate: float = 1.5e-4  # of the policy at the start; annealed linearly to 0
    critic_lr_scale: float = 4.0  # learning rate of the critic's trunk: this times the policy's
    value_lr_scale: float = 14.0  # learning rate of the value head: this times the policy's
    adam_eps: float = 1e-5  # ε of Adam
    n_waves: int = 1  # W: responses per row of the environment in each update
    n_epochs: int = 2  # passes over the responses of an update
    n_minibatches: int = 8  # optimiser steps per epoch
    gae_lambda: float = 0.8  # λ of generalised advantage estimation; γ is 1
    critic_warmup: int = 2  # first updates, at most 1/5 of the training: only the critic learns
    clip_range: float = 0.2  # ε of the ratio's clip
    vf_coef: float = 0.1  # weight of the value loss
    max_grad_norm: float = 1.0  # clip of the gradient's norm
    microbatch_tokens: int = 4096  # most tokens in one pass, padding included; bounds memory


class Batch(NamedTuple):
    """The responses of an update."""

    obs: Tensor  # (B, P + T) int64: prompt, response, PAD
    starts: Tensor  # (B,) int64: length of the prompt, and so the column of the first action
    actions: Tensor  # (B, T) int64
    logprobs: Tensor  # (B, T), under the policy that sampled the actions
    advantages: Tensor  # (B, T)
    returns: Tensor  # (B, T)


class PPO:
    """The learner, built from its options and an environment."""

    def __init__(self, config: Config, env: TokenVectorEnv) -> None:
        self.config, self.env = config, env
        reference, reward = env.objective.reference, env.objective.reward
        if not reference.mask.is_static:
            raise InputError("ppo_single_file knows only masks that are the same in every state")
        self.device = reference.device
        # The policy starts as the reference, so the first penalty is 0, and keeps its temperature
        # and end tokens: otherwise the penalty would compare two different ways of sampling.
        self.policy = reference.trainable()
        # The critic starts from the reward model if that reads the same tokens from left to right:
        # it already knows what the score depends on (N+ details, arXiv:2403.17031).
        start = reference.model
        if isinstance(reward, RewardModel) and reward.causal and reward.model.name_or_path:
            if reward.tokenizer.get_vocab() == reference.tokenizer.get_vocab():
                start = reward.model
        self.critic = copy.deepcopy(start.base_model).requires_grad_(True)
        # V = 0 at first: a random head would put noise into the first advantages.
        self.value_head = nn.Linear(start.config.get_text_config().hidden_size, 1).to(self.device)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        # Whatever noise the policy learns costs KL, so it learns slowly; the critic must be faster.
        groups = [
            {"params": list(self.policy.model.parameters()), "scale": 1.0},
            {"params": list(self.critic.parameters()), "scale": config.critic_lr_scale},
            {"params": list(self.value_head.parameters()), "scale": config.value_lr_scale},
        ]
        self.optimizer = torch.optim.Adam(groups, lr=config.learning_rate, eps=config.adam_eps)

    def learn(self, total_tokens: int, run: Any = None) -> None:
        """Sample about `total_tokens` tokens and learn; `run` records metrics, None prints them."""
        begun, tokens, updates = time.time(), 0, 0
        obs, _ = self.env.reset()
        while tokens < total_tokens:
            remaining = 1.0 - tokens / total_tokens
            for group in self.optimizer.param_groups:
                group["lr"] = self.config.learning_rate * remaining * group["scale"]
            batch, metrics, obs = self.rollout(obs)
            tokens += int((batch.actions != PAD).sum())
            # An ignorant critic's advantages are noise, so it learns first (VC-PPO, Yuan et al.
            # 2025); but a short training must not end before the policy has moved.
            critic_only = updates < self.config.critic_warmup and tokens <= 0.2 * total_tokens
            metrics |= self.update(batch, critic_only)
            updates += 1
            if run is not None:
                run.record(tokens, metrics)
            else:
                rounded = {name: round(value, 4) for name, value in metrics.items()}
                print(f"{tokens} tokens, {time.time() - begun:.1f} s: {rounded}", flush=True)

    @torch.no_grad()
    def rollout(self, obs: Any) -> tuple[Batch, dict[str, float], Any]:
        """From prompts (N, P + T): W responses per row, mean score and KL, and the next prompts."""
        env, P, T = self.env, self.env.prompts.max_tokens, self.env.max_new_tokens
        waves, notes = [], []
        for _ in range(self.config.n_waves):
            w_obs = torch.tensor(obs, device=self.device)
            starts = (w_obs != PAD).sum(1)
            actions = sample_responses(self.policy, w_obs[:, :P], T, stop_at_eos=env.stop_at_eos)
            # Prompts differ in length: each response begins where its own prompt ends.
            rows, t = (actions != PAD).nonzero(as_tuple=True)
            w_obs[rows, starts[rows] + t] = actions[rows, t]
            # By the code of the update, so that π / π_old starts at 1: decoding rounds differently.
            logprobs, values = torch.zeros(2, *actions.shape, device=self.device)
            for part in passes((w_obs != PAD).sum(1), self.config.microbatch_tokens):
                inputs = w_obs[part], starts[part], actions[part]
                logprobs[part], values[part] = self.evaluate(*inputs)
            # The penalty needs log π, which an action does not carry.
            rewards, infos, obs = env.play(actions.cpu().numpy(), logprobs.cpu().numpy())
            w_rewards = torch.from_numpy(rewards).float().to(self.device)
            waves.append((w_obs, starts, actions, logprobs, values, w_rewards))
            notes.append(infos)
        # W times (N, …) -> (B, …), the waves of a row one after the other.
        b_obs, b_starts, b_actions, b_logprobs, b_values, b_rewards = (
            torch.stack(grids, 1).flatten(0, 1) for grids in zip(*waves, strict=True)
        )
        b_advantages = gae(b_rewards, b_values, self.config.gae_lambda)
        b_returns = b_advantages + b_values  # the TD(λ) targets of the critic
        batch = Batch(b_obs, b_starts, b_actions, b_logprobs, b_advantages, b_returns)
        score, kl = (float(np.mean([info[k] for info in notes])) for k in ("score", "kl_sum"))
        return batch, {"rollout/score": score, "rollout/kl_per_sequence": kl}, obs

    def evaluate(self, obs: Tensor, starts: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Log π of each action and V of the state before it: (b, P + T), (b,), (b, T) -> (b, T)."""
        mask = actions != PAD
        rows, t = mask.nonzero(as_tuple=True)
        columns = starts[rows] + t - 1  # a token is predicted one column before its own
        # PAD becomes any id: attention is causal, so no state sees what comes after the end.
        ids = obs[:, : int(columns.max()) + 1].clamp(min=0)
        hidden, critic_hidden = (
            trunk(input_ids=ids, use_cache=False).last_hidden_state[rows, columns]  # (M, width)
            for trunk in (self.policy.model.base_model, self.critic)
        )
        # Logits (M, V) at the temperature of sampling. For all columns they would fill memory.
        logprobs = self.policy.logits(hidden).log_softmax(-1).gather(1, actions[mask][:, None])
        values = self.value_head(critic_hidden)
        grid = torch.zeros(mask.shape, device=self.device)
        return grid.masked_scatter(mask, logprobs), grid.masked_scatter(mask, values)

    def update(self, batch: Batch, critic_only: bool) -> dict[str, float]:
        """A few epochs of minibatch steps; the means of the losses over all of them."""
        eps, losses, steps = self.config.clip_range, defaultdict[str, float](float), 0
        b_lengths = (batch.actions != PAD).sum(1).cpu()
        b_widths = (batch.obs != PAD).sum(1).cpu()
        for _ in range(self.config.n_epochs):
            for mb in minibatches(b_lengths, self.config.n_minibatches):
                mb_tokens = int(b_lengths[mb].sum())
                self.optimizer.zero_grad()
                for part in passes(b_widths[mb], self.config.microbatch_tokens):
                    old = Batch(*(each[mb[part]] for each in batch))
                    logprobs, values = self.evaluate(old.obs, old.starts, old.actions)
                    # PPO's clipped objective (arXiv:1707.06347, equation 7): a token whose ratio
                    # has left 1 ± ε in the direction of its advantage has no gradient any more.
                    # Advantages are not whitened: they vanish at the optimum, where whitening would
                    # blow up the noise that is left.
                    ratio = (logprobs - old.logprobs).exp()
                    clipped = ratio.clamp(1 - eps, 1 + eps)
                    pg_loss = -torch.minimum(ratio * old.advantages, clipped * old.advantages)
                    v_loss = (values - old.returns) ** 2
                    loss = self.config.vf_coef * v_loss
                    if not critic_only:
                        loss = loss + pg_loss
                    # A mean over the minibatch's tokens, however it is cut; PAD adds 0 to the sum.
                    (loss.sum() / mb_tokens).backward()
                    clipfrac = float(((ratio - 1).abs() > eps).sum()) / mb_tokens
                    losses["train/policy_loss"] += float(pg_loss.detach().sum()) / mb_tokens
                    losses["train/value_loss"] += float(v_loss.detach().sum()) / mb_tokens
                    losses["train/clip_fraction"] += clipfrac
                # If only the critic learns, the policy has no gradient, and Adam leaves it alone.
                every = [p for group in self.optimizer.param_groups for p in group["params"]]
                norm = nn.utils.clip_grad_norm_(every, self.config.max_grad_norm)
                losses["train/gradient_norm"] += float(norm)
                self.optimizer.step()
                steps += 1
        return {name: total / steps for name, total in losses.items()}

    def save(self, directory: Path) -> None:
        """Write the policy for transformers' `from_pretrained`, tokenizer included."""
        self.policy.save_pretrained(directory)


def passes(widths: Tensor, max_tokens: int) -> list[Tensor]:
    """Rows that go through the models together: of similar width, so that little is padding."""
    parts: list[list[int]] = [[]]
    for row in widths.argsort(stable=True).tolist():  # each row is the widest so far
        if parts[-1] and (len(parts[-1]) + 1) * int(widths[row]) > max_tokens:
            parts.append([])
        parts[-1].append(row)
    return [torch.tensor(part) for part in parts]


def gae(rewards: Tensor, values: Tensor, gae_lambda: float) -> Tensor:
    """Generalised advantage estimation (arXiv:1506.02438) at γ = 1: two (B, T) -> (B, T).

    δ_t = r_t + V(s_{t+1}) − V(s_t),  A_t = δ_t + λ A_{t+1}. There is no `dones`: after the end of a
    response rewards and values are 0, so its last token has V(s_{t+1}) = A_{t+1} = 0.
    """
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + next_value - values[:, t]
        advantages[:, t] = next_advantage = delta + gae_lambda * next_advantage
        next_value = values[:, t]
    return advantages


def minibatches(lengths: Tensor, n: int) -> list[Tensor]:
    """Shuffle B responses and cut them into n parts with about equally many tokens, not responses.

    The loss is a mean per token: in a minibatch of short responses each token would weigh more.
    """
    order = np.random.permutation(len(lengths))
    shuffled = lengths.numpy()[order]
    middles = np.cumsum(shuffled) - shuffled / 2  # of each response, in tokens from the first one
    which = (middles * n / shuffled.sum()).astype(int)
    return [torch.from_numpy(order[which == k]) for k in np.unique(which)]


make = PPO  # `scripts/train_policy.py --algorithm ppo_single_file` calls make(config, env)


@dataclass(frozen=True)
class Options:
    """Options of this file as a script."""

    env: str = "rlhf_gym/Reviews-v0"  # environment id
    # keywords of the environment, KEY VALUE …; values are parsed as JSON, else taken as text
    env_kwargs: dict[str, str] = field(default_factory=dict)
    total_tokens: int = 260_000  # response tokens to sample
    num_envs: int = 256  # N: rows of the environment
    seed: int = 0  # seed of everything
    device: str = "auto"  # auto, cpu, cuda
    output: Path = Path("runs/ppo_single_file")  # where transformers' from_pretrained finds it
    ppo: tyro.conf.OmitArgPrefixes[Config] = field(default_factory=Config)


def main(options: Options) -> None:
    """Train and save."""
    torch.manual_seed(options.seed)  # the responses
    np.random.seed(options.seed)  # the minibatches
    torch.set_flush_denormal(True)  # a CPU is ten times slower on tiny gradients than on zeros
    keywords: dict[str, Any] = {} if options.device == "auto" else {"device": options.device}
    for key, text in options.env_kwargs.items():
        try:
            keywords[key] = json.loads(text)
        except ValueError:
            keywords[key] = {"True": True, "False": False, "None": None}.get(text, text)
    env = gymnasium.make_vec(options.env, num_envs=options.num_envs, **keywords).unwrapped
    assert isinstance(env, TokenVectorEnv)
    env.reset(seed=options.seed)  # the prompts
    learner = make(options.ppo, env)
    learner.learn(options.total_tokens)
    learner.save(options.output)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except (InputError, gymnasium.error.Error) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
