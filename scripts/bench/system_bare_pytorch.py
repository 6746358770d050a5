"""PPO on a GPT-2 in bare PyTorch: an estimate of the speed limit. bench/speed.py runs it.

`python scripts/bench/system_bare_pytorch.py FOLDER` prints a JSON line in the format of `work.say`.
It does the same mathematics as the flagship with a shared critic: sampling, log-probs and values,
reference, reward model, GAE and the clipped update. It has no environment, SB3, logs or checks. All
prompts have one length and all responses have one length, so it needs no masks. The system
limit_compiled uses torch.compile for the update's pass through the trunk.
"""

import json
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from work import begin, say

from rlhf_gym.utils.process import prepare_process

CLIP, LAMBDA, VALUE_WEIGHT = 0.2, 0.95, 0.1


class GPT2:
    """A GPT-2 as plain tensors, without modules."""

    def __init__(self, folder: Path, device: str, *, learns: bool) -> None:
        config = json.loads((folder / "config.json").read_text())
        self.heads, self.layers = config["n_head"], config["n_layer"]
        found = load_file(folder / "model.safetensors", device=device)
        self.w = {
            name.removeprefix("transformer."): w.requires_grad_(learns) for name, w in found.items()
        }

    def hidden(self, ids: Tensor) -> Tensor:
        """Return hidden states (N, L, d) of ids (N, L), with causal attention."""
        n, length = ids.shape
        x = F.embedding(ids, self.w["wte.weight"]) + self.w["wpe.weight"][:length]
        for i in range(self.layers):
            q, k, v = self._qkv(x, i)
            seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = self._rest(x, seen.transpose(1, 2).reshape(n, length, -1), i)
        return self._norm(x, "ln_f")

    def prefill(self, ids: Tensor, width: int) -> Tensor:
        """Cache keys and values of prompts (N, P); return the last hidden states (N, d)."""
        n, length = ids.shape
        x = F.embedding(ids, self.w["wte.weight"]) + self.w["wpe.weight"][:length]
        self.cache = []
        for i in range(self.layers):
            q, k, v = self._qkv(x, i)
            room = k.new_zeros(2, n, self.heads, width, k.shape[-1])
            room[0, :, :, :length], room[1, :, :, :length] = k, v
            self.cache.append(room)
            seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = self._rest(x, seen.transpose(1, 2).reshape(n, length, -1), i)
        return self._norm(x[:, -1], "ln_f")

    def step(self, tokens: Tensor, at: int) -> Tensor:
        """Append tokens (N,) at column `at` to the cache; return their hidden states (N, d)."""
        x = (F.embedding(tokens, self.w["wte.weight"]) + self.w["wpe.weight"][at])[:, None]
        for i, room in enumerate(self.cache):
            q, k, v = self._qkv(x, i)
            room[0, :, :, at], room[1, :, :, at] = k[:, :, 0], v[:, :, 0]
            keys, values = room[0, :, :, : at + 1], room[1, :, :, : at + 1]
            seen = F.scaled_dot_product_attention(q, keys, values)
            x = self._rest(x, seen.transpose(1, 2).reshape(len(x), 1, -1), i)
        return self._norm(x[:, 0], "ln_f")

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits (…, V) of hidden states (…, d); the head is tied to the embeddings."""
        return hidden @ self.w["wte.weight"].T

    def _qkv(self, x: Tensor, i: int) -> tuple[Tensor, ...]:
        y = self._conv(self._norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn")
        parts = y.split(y.shape[-1] // 3, -1)
        return tuple(p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in parts)

    def _rest(self, x: Tensor, seen: Tensor, i: int) -> Tensor:
        x = x + self._conv(seen, f"h.{i}.attn.c_proj")
        y = self._conv(self._norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        return x + self._conv(F.gelu(y, approximate="tanh"), f"h.{i}.mlp.c_proj")

    def _conv(self, x: Tensor, name: str) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y = torch.addmm(self.w[f"{name}.bias"], flat, self.w[f"{name}.weight"])
        return y.view(*x.shape[:-1], -1)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.w[f"{name}.weight"], self.w[f"{name}.bias"]
        return F.layer_norm(x, weight.shape, weight, bias)


def log_probs(model: GPT2, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Return log-probs (N, T) of tokens (N, T) in states (N, T, d)."""
    logits = model.logits(hidden.flatten(0, 1))
    return -F.cross_entropy(logits, tokens.flatten(), reduction="none").view(tokens.shape)


class PPO:
    """Policy, value head and optimiser; reference and reward model."""

    def __init__(self, folder: Path, options: dict[str, object]) -> None:
        self.o, device = options, str(options["device"])
        self.policy = GPT2(folder / "reference", device, learns=True)
        self.reference = GPT2(folder / "reference", device, learns=False)
        self.reward = GPT2(folder / "reward_model", device, learns=False)
        self.score_head = load_file(folder / "reward_model" / "model.safetensors", device=device)
        self.score = self.score_head["score.weight"][0]
        width = self.policy.w["wte.weight"].shape[1]
        self.value = torch.zeros(width, device=device, requires_grad=True)
        self.bias = torch.zeros((), device=device, requires_grad=True)
        self.learns = [*self.policy.w.values(), self.value, self.bias]
        self.adam = torch.optim.Adam(self.learns, lr=1.5e-4, eps=1e-5, fused=True)

    @torch.no_grad()
    def sample(self, prompts: Tensor, budget: int) -> tuple[Tensor, Tensor, Tensor]:
        """Sample responses to prompts (N, P): sequences (N, P + T), log-probs and values (N, T)."""
        start = prompts.shape[1]
        out = F.pad(prompts, (0, budget))
        old, values = torch.empty(2, len(out), budget, device=out.device)
        hidden = self.policy.prefill(prompts, start + budget)
        for at in range(start, start + budget):
            p = torch.softmax(self.policy.logits(hidden), -1)
            edges = p.cumsum(-1)
            point = torch.rand(len(out), 1, device=out.device) * edges[:, -1:]
            tokens = torch.searchsorted(edges, point, right=True).clamp_(max=edges.shape[1] - 1)
            out[:, at] = tokens.squeeze(1)
            old[:, at - start] = p.gather(1, tokens).squeeze(1).log()
            values[:, at - start] = hidden @ self.value + self.bias
            if at < start + budget - 1:
                hidden = self.policy.step(out[:, at], at)
        return out, old, values

    @torch.no_grad()
    def advantages(
        self, whole: Tensor, old: Tensor, values: Tensor, start: int
    ) -> tuple[Tensor, Tensor]:
        """Return advantages and returns (N, T) of the response tokens."""
        tokens = whole[:, start:]
        at_reference = self.reference.hidden(whole[:, :-1])[:, start - 1 :]
        rewards = -float(self.o["kl_coef"]) * (
            old - log_probs(self.reference, at_reference, tokens)
        )
        rewards[:, -1] += self.reward.hidden(whole)[:, -1] @ self.score
        gains, after = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
        following = torch.zeros_like(after)
        for t in reversed(range(rewards.shape[1])):
            delta = rewards[:, t] + following - values[:, t]
            after = delta + LAMBDA * after
            gains[:, t], following = after, values[:, t]
        return gains, gains + values

    def update(
        self, whole: Tensor, old: Tensor, gains: Tensor, returns: Tensor, start: int
    ) -> None:
        """Run all epochs of the update."""
        for _ in range(int(self.o["epochs"])):
            for rows in torch.randperm(len(whole)).chunk(int(self.o["minibatches"])):
                states = self.policy.hidden(whole[rows, :-1])[:, start - 1 :]
                new = log_probs(self.policy, states, whole[rows, start:])
                ratio = (new - old[rows]).exp()
                clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
                surrogate = torch.minimum(ratio * gains[rows], clipped * gains[rows]).mean()
                error = (states @ self.value + self.bias - returns[rows]).square().mean()
                self.adam.zero_grad()
                (VALUE_WEIGHT * error - surrogate).backward()
                torch.nn.utils.clip_grad_norm_(self.learns, 1.0)
                self.adam.step()


def now(device: str) -> float:
    """Return the time in seconds, after the device has finished its queued work."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def matrix_product_rate(device: str) -> float:
    """Return the FLOP/s of a large float32 matrix product; the best of eight."""
    a, b = (torch.randn(2048, 2048, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        begun = now(device)
        a @ b
        best = min(best, now(device) - begun)
    return 2 * 2048**3 / best


def main(folder: Path) -> None:
    """Run the timed iterations, after one as a warm-up."""
    options = json.loads((folder / "options.json").read_text())
    begin(options)
    prepare_process()
    n, budget, start = options["episodes"], options["response"], options["prompt"]
    ppo = PPO(folder, options)
    if options["system"] == "limit_compiled":
        ppo.policy.hidden = torch.compile(ppo.policy.hidden)  # type: ignore[method-assign]
    prompts = torch.tensor(
        json.loads((folder / "prompts.json").read_text()), device=options["device"]
    )
    stages: dict[str, list[float]] = {"iteration": [], "sample": [], "settle": [], "update": []}
    for i in range(options["iterations"] + 1):
        begun = now(options["device"])
        chosen = prompts[torch.arange(i * n, (i + 1) * n) % len(prompts)]
        whole, old, values = ppo.sample(chosen, budget)
        sampled = now(options["device"])
        gains, returns = ppo.advantages(whole, old, values, start)
        settled = now(options["device"])
        ppo.update(whole, old, gains, returns, start)
        ended = now(options["device"])
        if i:
            stages["iteration"].append(ended - begun)
            stages["sample"].append(sampled - begun)
            stages["settle"].append(settled - sampled)
            stages["update"].append(ended - settled)
    learned = sum(w.numel() for w in ppo.learns)
    body = learned - ppo.policy.w["wte.weight"].numel() - ppo.policy.w["wpe.weight"].numel()
    head = ppo.policy.w["wte.weight"].numel()
    # Only matrix products: 2 FLOP per weight and token forward, twice that backward.
    per_pass = 6 * n * (body * (start + budget - 1) + head * budget)
    say(
        stages,
        tokens=[n * budget] * options["iterations"],
        work={
            "episodes": n,
            "parameters": learned,
            "update_flop": per_pass * options["epochs"],
            "matrix_product_flop_per_second": int(matrix_product_rate(options["device"])),
        },
        versions={"torch": torch.__version__},
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
