"""PPO for RLHF in one file, top to bottom. ``python -m agents.ppo_single_file --env ID``.

For reading, and for changing a line to see what it does. It computes what `agents.ppo` computes by
default (a critic with a trunk of its own, which learns alone at first; whole responses; one reward
at the end and a penalty a token) and nothing else: no checkpoints, no LoRA, no bf16, no masks that
differ from state to state. It imports the environment and nothing of this folder.

Notation: N rows of the environment, W waves an update, B = N · W responses, T the token budget,
M chosen tokens over all responses. Quantities of a token are flat, (M,), response after response.
"""

import copy
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

import rlhf_gym  # noqa: F401 (registers the environments)
from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.errors import InputError
from rlhf_gym.lm.architecture import is_causal, trunk
from rlhf_gym.lm.batching import passes
from rlhf_gym.lm.decoding.sampling import sample_responses
from rlhf_gym.lm.loading import same_tokens
from rlhf_gym.rewards.reward_model import RewardModel
from rlhf_gym.tokens import PAD, Sequences, continuations
from rlhf_gym.utils.devices import resolve_device
from rlhf_gym.utils.process import prepare_process


@dataclass(frozen=True)
class Config:
    """Options of PPO."""

    learning_rate: float = 1.5e-4
    """Learning rate of the policy at the start; annealed linearly to 0."""
    critic_lr_scale: float = 4.0
    """The learning rate of the critic's trunk is so many times the policy's."""
    value_lr_scale: float = 14.0
    """And that of its head."""
    adam_eps: float = 1e-5
    """ε of Adam."""
    n_waves: int = 1
    """W."""
    n_epochs: int = 2
    """Passes over the responses of an update."""
    n_minibatches: int = 8
    """Optimiser steps a pass."""
    gae_lambda: float = 0.8
    """λ of generalised advantage estimation; γ is 1."""
    critic_warmup: int = 2
    """In the first so many updates, but at most a fifth of the training, only the critic learns."""
    clip_range: float = 0.2
    """ε of the ratio's clip."""
    vf_coef: float = 0.1
    """Weight of the value loss."""
    max_grad_norm: float = 1.0
    """Clip of the gradient's norm."""
    microbatch_tokens: int = 4096
    """Most tokens, padding included, in one backward pass; changes nothing but memory."""


@dataclass(frozen=True)
class Options:
    """Options of the script."""

    env: str = "rlhf_gym/Reviews-v0"
    """Environment id."""
    env_kwargs: dict[str, str] = field(default_factory=dict)
    """Keywords of the environment, KEY VALUE …; values are parsed as JSON, else taken as text."""
    total_tokens: int = 260_000
    """Response tokens to sample."""
    num_envs: int = 256
    """N."""
    seed: int = 0
    """Seed of everything."""
    device: str = "auto"
    """auto, cpu, cuda."""
    output: Path = Path("runs/ppo_single_file")
    """Where the policy goes, for transformers' `from_pretrained`."""
    ppo: tyro.conf.OmitArgPrefixes[Config] = field(default_factory=Config)
    """PPO itself."""


class Rollout(NamedTuple):
    """B responses and what is known of their M tokens."""

    sequences: Sequences
    log_probs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor

    def rows(self, which: Tensor) -> "Rollout":
        """Some of the responses."""
        lengths = self.sequences.lengths
        first = torch.cumsum(lengths, 0) - lengths
        some = self.sequences.rows(which)
        rows = torch.repeat_interleave(some.lengths)
        within = (
            torch.arange(len(rows), device=rows.device)
            - ((torch.cumsum(some.lengths, 0) - some.lengths)[rows])
        )
        places = first[which][rows] + within
        return Rollout(some, *(flat[places] for flat in self[1:]))


class SingleFilePPO:
    """The learner.

    Args:
        config: The options.
        env: The environment; its mask, if any, is the same in every state.
    """

    def __init__(self, config: Config, env: TokenVectorEnv) -> None:
        self.config, self.env = config, env
        reference = env.objective.reference
        if not reference.mask.is_static:
            raise InputError("ppo_single_file knows only masks that are the same in every state")
        self.device = reference.device
        # The policy starts as the reference: the same weights, temperature, ends and mask.
        self.policy = reference.trainable()
        # The critic starts from the reward model, which knows what a score hangs on; its head at 0.
        reward = env.objective.reward
        start = reference.model
        if isinstance(reward, RewardModel) and reward.model.name_or_path:
            same = same_tokens(reward.tokenizer, reference.tokenizer)
            start = reward.model if same and is_causal(reward.model) else start
        body: Any = copy.deepcopy(trunk(start)).requires_grad_(True)
        self.critic = replace(reference, model=body)
        self.value_head = nn.Linear(body.config.get_text_config().hidden_size, 1).to(self.device)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        modules = (self.policy.model, body, self.value_head)
        self.groups = [list(module.parameters()) for module in modules]
        self.scales = (1.0, config.critic_lr_scale, config.value_lr_scale)
        self.optimizer = torch.optim.Adam(
            [{"params": group} for group in self.groups],
            lr=config.learning_rate,
            eps=config.adam_eps,
        )

    def learn(self, total_tokens: int, run: Any = None) -> None:
        """Sample about `total_tokens` tokens and learn from them.

        Args:
            total_tokens: How many.
            run: Records a row an update; its signature is `run.record(tokens, metrics)`.
        """
        prompts, _ = self.env.reset()
        tokens = updates = 0
        while tokens < total_tokens:
            remaining = 1.0 - tokens / total_tokens
            rollout, figures, prompts = self.collect(prompts)
            tokens += len(rollout.log_probs)
            waits = updates < self.config.critic_warmup and tokens <= 0.2 * total_tokens
            figures |= self.update(rollout, remaining, waits)
            updates += 1
            if run is not None:
                run.record(tokens, figures)

    @torch.no_grad()
    def collect(self, prompts: Any) -> tuple[Rollout, dict[str, float], Any]:
        """Play W waves of whole responses from the prompts (N, L) on."""
        env, config = self.env, self.config
        waves: list[Sequences] = []
        grids: dict[str, list[Tensor]] = {"log_probs": [], "values": [], "rewards": []}
        scores, kls = [], []
        for _ in range(config.n_waves):
            starts = torch.from_numpy(prompts[:, : env.prompts.max_tokens]).to(self.device)
            responses = sample_responses(
                self.policy, starts, env.max_new_tokens, stop_at_eos=env.stop_at_eos
            )
            waves.append(continuations(starts, responses))
            mask = (responses != PAD).cpu()
            # By the code of the update, so that its first ratio is 1.
            for name, flat in self.per_token(waves[-1]).items():
                grids[name].append(torch.zeros(mask.shape).masked_scatter(mask, flat.cpu()))
            actions, log_prob_grid = responses.cpu().numpy(), grids["log_probs"][-1].numpy()
            paid, infos, prompts = env.play(actions, log_prob_grid)
            grids["rewards"].append(torch.from_numpy(paid).float())
            scores.append(infos["score"])
            kls.append(infos["kl_sum"])
        # Row by row of the environment, the waves of each in turn.
        order = torch.arange(env.num_envs * config.n_waves).view(config.n_waves, -1).T.flatten()
        width = max(wave.tokens.shape[1] for wave in waves)
        tokens = [F.pad(w.tokens, (0, width - w.tokens.shape[1]), value=PAD) for w in waves]
        parts = (tokens, [w.starts for w in waves], [w.lengths for w in waves])
        sequences = Sequences(*(torch.cat(part).cpu()[order].to(self.device) for part in parts))
        rewards, values, log_probs = (
            torch.cat(grids[name])[order] for name in ("rewards", "values", "log_probs")
        )
        mask = torch.arange(env.max_new_tokens) < sequences.lengths.cpu()[:, None]
        advantages = gae(rewards, values, mask, config.gae_lambda)
        flats = (
            grid[mask].to(self.device)
            for grid in (log_probs, values, advantages, advantages + values)
        )
        figures = {
            "rollout/score": float(np.concatenate(scores).mean()),
            "rollout/kl_per_sequence": float(np.concatenate(kls).mean()),
        }
        return Rollout(sequences, *flats), figures, prompts

    def update(self, rollout: Rollout, remaining: float, waits: bool) -> dict[str, float]:
        """`n_epochs` passes over a rollout.

        Args:
            rollout: The responses.
            remaining: Share of the training that was left before the rollout, for the schedule.
            waits: Whether only the critic learns.
        """
        config = self.config
        for group, scale in zip(self.optimizer.param_groups, self.scales, strict=True):
            group["lr"] = config.learning_rate * remaining * scale
        logged: list[dict[str, float]] = []
        for _ in range(config.n_epochs):
            for rows in self.minibatches(rollout.sequences.lengths.cpu().numpy()):
                logged.append(self.step(rollout.rows(rows.to(self.device)), waits))
        return {
            f"train/{name}": float(np.mean([row[name] for row in logged])) for name in logged[0]
        }

    def minibatches(self, lengths: Any) -> Iterator[Tensor]:
        """Shuffled rows, cut where the running count of tokens passes k/n of all."""
        parts, order = self.config.n_minibatches, np.random.permutation(len(lengths))
        running = np.cumsum(lengths[order]) - lengths[order] / 2
        group = np.minimum((running * parts / lengths.sum()).astype(int), parts - 1)
        for k in range(parts):
            if (group == k).any():
                yield torch.from_numpy(order[group == k])

    def step(self, batch: Rollout, waits: bool) -> dict[str, float]:
        """One optimiser step; the gradient is accumulated over micro-batches."""
        self.optimizer.zero_grad()
        total = len(batch.log_probs)
        sums: dict[str, float] = {}
        for part, places in passes(
            self.policy.model, batch.sequences, self.config.microbatch_tokens
        ):
            value_loss = (self.values(part) - batch.returns[places]) ** 2
            objective = -self.config.vf_coef * value_loss
            terms = {"value_loss": value_loss}
            if not waits:
                ratio = (self.log_probs(part) - batch.log_probs[places]).exp()
                clipped = ratio.clamp(1 - self.config.clip_range, 1 + self.config.clip_range)
                advantages = batch.advantages[places]
                surrogate = torch.minimum(ratio * advantages, clipped * advantages)
                objective = objective + surrogate
                terms["policy_loss"] = -surrogate
                terms["clip_fraction"] = ((ratio - 1).abs() > self.config.clip_range).float()
            # A mean over the minibatch's tokens, however it is cut.
            (objective.sum() / -total).backward()
            for name, term in terms.items():
                sums[name] = sums.get(name, 0.0) + float(term.detach().sum()) / total
        every = [p for group in self.groups for p in group]
        sums["gradient_norm"] = float(nn.utils.clip_grad_norm_(every, self.config.max_grad_norm))
        self.optimizer.step()
        return sums

    def log_probs(self, sequences: Sequences) -> Tensor:
        """Log π of each chosen token, (M,)."""
        return self.policy.log_probs_of(self.policy.states(sequences), sequences.chosen())

    def values(self, sequences: Sequences) -> Tensor:
        """The value of the state in which each token was chosen, (M,)."""
        values: Tensor = self.value_head(self.critic.states(sequences)).flatten()
        return values

    def per_token(self, sequences: Sequences) -> dict[str, Tensor]:
        """Log-probs and values of all M tokens, in passes that fit a cache."""
        out = {n: torch.zeros(int(sequences.lengths.sum())) for n in ("log_probs", "values")}
        for part, places in passes(self.policy.model, sequences):
            out["log_probs"][places.cpu()] = self.log_probs(part).cpu()
            out["values"][places.cpu()] = self.values(part).cpu()
        return out

    def save(self, directory: Path) -> None:
        """Write the policy for transformers' `from_pretrained`."""
        self.policy.save_pretrained(directory)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gae_lambda: float) -> Tensor:
    """Generalised advantage estimation on grids (B, T), 0 behind each response's end."""
    advantages = torch.zeros_like(rewards)
    following = next_value = torch.zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + next_value - values[:, t]
        following = torch.where(mask[:, t], delta + gae_lambda * following, 0.0)
        next_value = torch.where(mask[:, t], values[:, t], 0.0)
        advantages[:, t] = following
    return advantages


make = SingleFilePPO  # --algorithm ppo_single_file


class Printer:
    """Prints a row an update."""

    def __init__(self) -> None:
        self.begun = time.time()

    def record(self, tokens: int, metrics: dict[str, float]) -> None:
        """Print it."""
        figures = "  ".join(f"{k.split('/')[1]} {v:.4g}" for k, v in metrics.items())
        print(f"{tokens:8d} tokens {time.time() - self.begun:7.1f} s  {figures}", flush=True)


def parsed(text: str) -> Any:
    """A value of the command line."""
    try:
        return json.loads({"True": "true", "False": "false", "None": "null"}.get(text, text))
    except ValueError:
        return text


def main(options: Options) -> None:
    """Train and save."""
    torch.manual_seed(options.seed)
    np.random.seed(options.seed)
    prepare_process()
    keywords = {key: parsed(text) for key, text in options.env_kwargs.items()}
    keywords["device"] = resolve_device(options.device)
    env = gymnasium.make_vec(options.env, num_envs=options.num_envs, **keywords).unwrapped
    assert isinstance(env, TokenVectorEnv)
    env.reset(seed=options.seed)
    learner = SingleFilePPO(options.ppo, env)
    learner.learn(options.total_tokens, Printer())
    learner.save(options.output)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except (InputError, gymnasium.error.Error) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
