"""What saves memory or time changes nothing: chunks, recomputing, bfloat16, adapters."""

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BUDGET, PLAIN, V, count_forwards, play_rollout
from stable_baselines3.common.utils import set_random_seed
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from agents import nlpo, ppo
from agents.doctor import Subject, examine
from agents.sb3 import PPO, build
from agents.sb3.learning.learner import SB3Learner
from agents.tracking.training_run import TrainingRun
from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.errors import InputError
from rlhf_gym.lm import batching
from rlhf_gym.lm.causal_lm import CausalLM, kl_to
from rlhf_gym.lm.decoding.decode_cache import DecodeCache, last_hidden
from rlhf_gym.lm.decoding.sampling import sample_responses
from rlhf_gym.tokens import PAD, Sequences

N = 8

LOSSES: dict[str, dict[str, Any]] = {
    "plain": {},
    "entropy": {"ent_coef": 0.1},
    "clipped values": {"clip_range_vf": 0.1},
    "kl_old by k3": {"kl_old_coef": 0.5},
    "kl_old exact": {"kl_old_coef": 0.5, "kl_old": "exact"},
    "kl_loss exact": {"kl_loss": "exact"},
    "kl_loss k2": {"kl_loss": "k2"},
    "kl_loss k3": {"kl_loss": "k3"},
}


@pytest.fixture
def make_ppo(make_vector_env) -> Callable[..., PPO]:
    """A flagship with one rollout, and a policy that has left the one that sampled it."""

    def make(env: TokenVectorEnv | None = None, *, moved: bool = True, **options: Any) -> PPO:
        policy_options = {"optimizer_class": torch.optim.SGD, **options.pop("policy_options", {})}
        learner = build(
            PPO,
            env or make_vector_env(N, family="gpt2"),
            seed=0,
            device="cpu",
            policy_options=policy_options,
            **{**PLAIN, "n_waves": 2, "n_minibatches": 1, **options},
        )
        play_rollout(learner)
        if learner.options.kl_old == "exact":
            learner._old = learner.policy.snapshot()
        learner.policy.set_training_mode(True)
        if moved:
            move(learner.policy, 0.02)
        return learner

    return make


def move(module: torch.nn.Module, size: float) -> None:
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=size)


def minibatch(learner: PPO, dtype: torch.dtype = torch.float32) -> Any:
    np.random.seed(0)
    (batch,) = learner.rollout_buffer.get(None)
    assert isinstance(batch.observations, Sequences)
    return batch._replace(
        **{
            k: getattr(batch, k).to(dtype)
            for k in batch._fields
            if k not in ("observations", "actions")
        }
    )


def gradient(learner: PPO, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Of one minibatch, by the flagship's own code."""
    learner.policy.to(dtype=dtype)
    if learner._old is not None:
        learner._old.model.to(dtype=dtype)
    learner.get_env().get_attr("unwrapped")[0].objective.reference.model.to(dtype=dtype)
    learner._gradient(minibatch(learner, dtype))
    return {
        name: p.grad.detach().clone()
        for name, p in learner.policy.named_parameters()
        if p.requires_grad
    }


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    """Equal relative to the largest entry of each tensor."""
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        largest = float(theirs[name].abs().max())
        assert largest > 1e-6, name
        assert float((value - theirs[name]).abs().max()) <= tolerance * largest, name


@contextmanager
def kept_for_backward() -> Iterator[list[torch.Size]]:
    """Shapes of the tensors that autograd keeps."""
    shapes: list[torch.Size] = []

    def pack(x: Tensor) -> Tensor:
        shapes.append(x.shape)
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        yield shapes


# Micro-batches and chunks


@pytest.mark.parametrize("loss", LOSSES)
def test_micro_batches_of_any_size_have_one_gradient(make_ppo, loss):
    learner = make_ppo(**LOSSES[loss])
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-10)):
        learner.options = replace(learner.options, microbatch_tokens=None)
        whole = gradient(learner, dtype)
        for tokens in (1, 40):
            learner.options = replace(learner.options, microbatch_tokens=tokens)
            assert_same(gradient(learner, dtype), whole, tolerance)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("rule", [{}, {"top_k": 9, "min_new_tokens": 2}], ids=["free", "masked"])
def test_chunks_of_logits_have_one_gradient(make_ppo, make_vector_env, monkeypatch, loss, rule):
    learner = make_ppo(make_vector_env(N, family="gpt2", mask=rule), **LOSSES[loss])
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        monkeypatch.setattr(batching, "MAX_LOGITS", 1 << 25)
        whole = gradient(learner, dtype)
        monkeypatch.setattr(batching, "MAX_LOGITS", 7 * V)
        assert_same(gradient(learner, dtype), whole, tolerance)


@pytest.mark.parametrize("loss", LOSSES)
def test_no_logits_of_all_tokens_are_kept_for_the_backward_pass(make_ppo, monkeypatch, loss):
    learner = make_ppo(**LOSSES[loss])
    batch = minibatch(learner)
    m, chunk = len(batch.actions), 7
    for most, rows in ((1 << 25, {m}), (chunk * V, {m, chunk, m % chunk})):
        monkeypatch.setattr(batching, "MAX_LOGITS", most)
        with kept_for_backward() as shapes:
            learner._loss().terms(batch)
        assert any(shape == (n, V) for shape in shapes for n in rows) == (most > m * V)


def test_the_exact_divergence_from_the_last_iterate_is_as_by_hand(make_ppo):
    learner = make_ppo(kl_old_coef=0.5, kl_old="exact")
    batch, old, new = minibatch(learner), learner._old, learner.policy.core
    with torch.no_grad():
        log_p, log_q = (
            torch.log_softmax(lm.logits(lm.states(batch.observations)), -1) for lm in (old, new)
        )
        expected = (log_p.exp() * (log_p - log_q)).sum(-1)
    terms = learner._loss().terms(batch)
    torch.testing.assert_close(terms["kl_old"], expected, atol=1e-5, rtol=1e-4)
    assert float(expected.min()) > 1e-4
    learner.options = replace(learner.options, kl_old_coef=0.0)
    without = learner._loss().terms(batch)["objective"]
    torch.testing.assert_close(terms["objective"], without - 0.5 * expected, atol=1e-5, rtol=1e-4)


def test_at_the_last_iterate_the_exact_divergence_has_no_gradient(make_ppo):
    learner = make_ppo(kl_old_coef=1.0, kl_old="exact", moved=False)
    learner.policy.double()
    learner._old.model.double()
    sequences = minibatch(learner).observations

    def pull() -> float:
        learner.policy.zero_grad()
        core = learner.policy.core
        at_old = learner._old.states(sequences).detach()
        kl_to(at_old, learner._old, core.states(sequences), core).sum().backward()
        return max(float(p.grad.abs().max()) for p in learner.policy.lm.parameters())

    assert pull() < 1e-12
    move(learner.policy.lm, 0.02)
    assert pull() > 1e-2


def test_an_update_holds_to_the_iterate_it_began_with(make_ppo):
    """The penalty grows over the steps of an update, and restarts at 0 in the next one."""
    learner = make_ppo(kl_old="exact", kl_old_coef=0.1, moved=False, n_epochs=3, learning_rate=0.01)
    for _ in range(2):
        seen = []
        gradient_of = learner._gradient

        def note(minibatch: Any, seen: Any = seen, gradient_of: Any = gradient_of) -> Any:
            statistics = gradient_of(minibatch)
            seen.append(statistics["kl_old"])
            return statistics

        learner._gradient = note
        learner.train()
        learner._gradient = gradient_of
        assert seen[0] == pytest.approx(0, abs=1e-6)
        assert seen[0] < seen[1] < seen[2]
        assert learner._old is None, "no copy is kept between updates"


# Activations computed again


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("lora_rank", [0, 2])
def test_recomputed_activations_have_the_same_gradient(
    make_ppo, make_vector_env, family, lora_rank
):
    gradients, kept = [], []
    for recompute in (False, True):
        options = {"gradient_checkpointing": recompute, "lora_rank": lora_rank}
        learner = make_ppo(make_vector_env(N, family=family), policy_options=options)
        gradients.append(gradient(learner))
        with kept_for_backward() as shapes:
            learner._loss().terms(minibatch(learner))
        kept.append(sum(shape.numel() for shape in shapes))
    assert_same(*gradients, 1e-5)
    assert kept[1] < 0.5 * kept[0]


def test_recomputing_leaves_cached_sampling_alone(make_ppo):
    learner = make_ppo(policy_options={"gradient_checkpointing": True}, moved=False)
    with count_forwards(learner.policy.core) as shapes:
        learner.learn(1)
    assert sum(tokens == 1 for _, tokens in shapes) > 2, "decode steps of one token"
    assert learner.logger.name_to_value["train/ratio_first_max_error"] < 1e-5


# bfloat16


def test_in_bfloat16_the_first_ratio_is_one_to_its_tolerance(make_ppo):
    learner = make_ppo(policy_options={"precision": "bf16"}, moved=False, n_waves=8)
    for turn in range(3):
        error = (learner._loss().terms(minibatch(learner))["ratio"] - 1).abs().numpy()
        assert error.mean() < 1e-3, turn
        assert error.max() < 5e-2, turn
        learner.learn(1)  # an update, and the rollout before it
        assert learner.logger.name_to_value["train/ratio_first_max_error"] < 5e-2
        learner.collect_rollouts(learner.env, _silent(learner), learner.rollout_buffer, 0)
        learner.policy.set_training_mode(True)


def _silent(learner: PPO) -> Any:
    _, callback = learner._setup_learn(1)
    callback.on_training_start({}, {})
    return callback


@torch.no_grad()
def test_bfloat16_computes_in_bfloat16_and_answers_in_float32(load_lm):
    lm = load_lm("gpt2")
    half = replace(lm, precision="bf16")
    rows = torch.tensor([[2, 5, 6, PAD], [2, 9, 11, 7]])
    hidden = [last_hidden(x, rows) for x in (lm, half)]
    logits = [x.logits(h) for x, h in zip((lm, half), hidden, strict=True)]
    for plain, rounded in (hidden, logits):
        assert rounded.dtype == torch.float32
        gap = float((plain - rounded).abs().max() / plain.abs().max())
        assert 1e-6 < gap < 3e-2
    assert torch.allclose(logits[1].bfloat16().float() / lm.temperature, logits[1]), "bf16 head"


def test_bfloat16_never_meets_an_old_copy_of_a_weight(make_ppo):
    """Not even where somebody's own autocast, whose copies outlive ours, lies around it all."""
    learner = make_ppo(policy_options={"precision": "bf16"}, moved=False)
    sequences = minibatch(learner).observations
    prompts = sequences.tokens[:, : int(sequences.starts.min())]
    core = learner.policy.core
    fresh = copy.deepcopy(learner.policy)
    move(fresh, 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(0)
        before = learner.policy.sample(prompts, BUDGET)
        learner.policy.evaluate_actions(sequences, sequences.chosen())
        move(learner.policy, 0.5)
        with torch.no_grad():
            scored = core.log_probs(sequences)
        torch.manual_seed(0)
        after = learner.policy.sample(prompts, BUDGET)
    torch.manual_seed(0)
    assert torch.equal(after, fresh.sample(prompts, BUDGET))
    assert not torch.equal(after, before)
    torch.testing.assert_close(scored, fresh.core.log_probs(sequences), atol=1e-6, rtol=1e-6)


def test_sampling_in_bfloat16_casts_each_weight_once(load_lm, monkeypatch):
    lm = replace(load_lm("gpt2"), precision="bf16")
    weights = {p.shape for p in lm.model.parameters() if p.dim() == 2}

    class Casts(TorchDispatchMode):
        n = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            if "_to_copy" in str(func) and out.dtype == torch.bfloat16 and out.shape in weights:
                self.n += 1
            return out

    counts = []
    for budget in (2, 8):
        with Casts() as casts:
            sample_responses(lm, torch.tensor([[2, 5, 6]]), budget, stop_at_eos=False)
        counts.append(casts.n)
    assert counts[0] == counts[1] > 0


@torch.no_grad()
def test_cached_decoding_in_bfloat16_is_the_full_forward_to_its_tolerance(load_lm):
    lm = replace(load_lm("llama"), precision="bf16")
    cache = DecodeCache(lm)
    rows = torch.tensor([[2, 5, 6, 7, 8], [2, 9, 11, 7, 4]])
    for width in (2, 3, 4, 5):
        part = torch.nn.functional.pad(rows[:, :width], (0, 5 - width), value=PAD)
        with count_forwards(lm) as shapes:
            cached = cache.last_hidden(part)
        assert shapes == [(2, 2 if width == 2 else 1)]
        full = last_hidden(lm, part)
        assert float((cached - full).abs().max() / full.abs().max()) < 3e-2


# Adapters


ADAPTED: dict[str, Any] = {"lora_rank": 4}


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_adapters_learn_on_the_references_own_weights(make_vector_env, family):
    env = make_vector_env(N, family=family)
    reference = env.objective.reference
    learner = build(
        PPO,
        env,
        **PLAIN,
        seed=0,
        device="cpu",
        learning_rate=1e-2,
        n_waves=2,
        n_minibatches=2,
        policy_options=ADAPTED,
    )
    policy = learner.policy
    base = {p.data_ptr() for p in reference.model.parameters()}
    own = sum(p.numel() for p in policy.lm.parameters() if p.data_ptr() not in base)
    trained = sum(p.numel() for p in policy.lm.parameters() if p.requires_grad)
    assert 0 < own == trained < sum(p.numel() for p in reference.model.parameters())
    assert base <= {p.data_ptr() for p in policy.lm.parameters()}, "one model in memory"
    assert not any(p.requires_grad for p in reference.model.parameters())

    before = weights(reference.model)
    kls: list[Tensor] = []

    def play_and_learn() -> Sequences:
        learner.learn(1, reset_num_timesteps=False)
        (batch,) = learner.rollout_buffer.get(None)
        kls.append(batch.old_log_prob - reference.log_probs(batch.observations))
        assert learner.logger.name_to_value["train/ratio_first_max_error"] < 1e-5
        return batch.observations

    sequences = play_and_learn()
    log_probs = reference.log_probs(sequences)
    play_and_learn()
    assert float(kls[0].abs().max()) < 1e-5, "KL = 0 before the first update"
    assert float(kls[1].abs().max()) > 1e-2
    assert_equal(weights(reference.model), before)
    assert torch.equal(reference.log_probs(sequences), log_probs)


def test_adapters_of_two_policies_on_one_reference_do_not_meet(make_vector_env):
    env = make_vector_env(N)
    one, two = (
        build(PPO, env, **PLAIN, seed=0, device="cpu", policy_options=ADAPTED).policy
        for _ in range(2)
    )
    prompts = torch.from_numpy(env.reset(seed=0)[0])
    with torch.no_grad():
        before = two.get_distribution(prompts).log_p
        plain = env.objective.reference.logits(last_hidden(env.objective.reference, prompts))
        move(one, 0.1)
        assert float((one.get_distribution(prompts).log_p - before).abs().max()) > 1e-2
        assert torch.equal(two.get_distribution(prompts).log_p, before)
        torch.testing.assert_close(before, torch.log_softmax(plain, -1), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_cached_decoding_follows_the_adapters(make_vector_env):
    env = make_vector_env(N)
    policy = build(PPO, env, **PLAIN, seed=0, device="cpu", policy_options=ADAPTED).policy
    policy.set_training_mode(False)
    prompts = torch.from_numpy(env.reset(seed=0)[0])
    for _ in range(3):
        full = policy.core.logits(last_hidden(policy.core, prompts))
        cached = policy.get_distribution(prompts).log_p
        torch.testing.assert_close(cached, torch.log_softmax(full, -1), atol=1e-5, rtol=1e-5)
        move(policy, 0.1)


def test_a_lagged_policy_of_adapters_keeps_nothing_of_the_reference(make_vector_env):
    env = make_vector_env(N)
    env.reset(seed=0)
    learner = nlpo.make(nlpo.Config(lora_rank=2, critic_warmup=0), env)
    states = []
    learner.algorithm._finish_update = lambda: states.append(learner.algorithm.extra_state())
    learner.learn(1)
    (state,) = states
    kept = {name: tensor for name, tensor in state.items() if name != nlpo.ROLLOUTS}
    learn = {name: p for name, p in learner.policy.lm.named_parameters() if p.requires_grad}
    assert kept.keys() == learn.keys()
    before = weights(env.objective.reference.model)
    altered = {name: tensor + 1 for name, tensor in kept.items()}
    learner.algorithm.set_extra_state({**altered, nlpo.ROLLOUTS: state[nlpo.ROLLOUTS]})
    assert_equal(weights(env.objective.reference.model), before)
    lagged = dict(learner.algorithm._lagged.model.named_parameters())
    assert all(torch.equal(lagged[name], tensor) for name, tensor in altered.items())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_adapters_are_merged_into_what_is_saved(make_vector_env, tmp_path, family):
    env = make_vector_env(N, family=family)
    before = weights(env.objective.reference.model)
    learner = ppo.make(ppo.Config(lora_rank=4), env)
    move(learner.policy, 0.1)
    learner.save(tmp_path / "policy")
    assert_equal(weights(env.objective.reference.model), before)
    plain = CausalLM.load(str(tmp_path / "policy"), temperature=0.8)
    assert type(plain.model) is type(env.objective.reference.model)
    rows = torch.from_numpy(env.reset(seed=0)[0])
    with torch.no_grad():
        ours = learner.policy.get_distribution(rows).log_p
        theirs = torch.log_softmax(plain.logits(last_hidden(plain, rows)), -1)
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)

    other = ppo.make(ppo.Config(lora_rank=4), make_vector_env(N, family=family))
    other.start_from(tmp_path / "policy")
    with torch.no_grad():
        assert torch.equal(other.policy.get_distribution(rows).log_p, ours)
    third = ppo.make(ppo.Config(lora_rank=2), make_vector_env(N, family=family))
    with pytest.raises(InputError, match="another model or rank"):
        third.start_from(tmp_path / "policy")
    (tmp_path / "policy" / "adapters.safetensors").unlink()
    with pytest.raises(InputError, match="had no adapters"):
        other.start_from(tmp_path / "policy")


def test_a_loaded_adapted_policy_is_the_saved_one(make_vector_env, tmp_path):
    env = make_vector_env(N)
    learner = build(PPO, env, **PLAIN, seed=0, device="cpu", policy_options=ADAPTED)
    move(learner.policy, 0.1)
    learner.save(tmp_path / "learner")
    loaded = PPO.load(tmp_path / "learner", device="cpu")
    rows = torch.from_numpy(env.reset(seed=0)[0])
    with torch.no_grad():
        ours, theirs = (x.policy.get_distribution(rows).log_p for x in (learner, loaded))
    assert torch.equal(ours, theirs)
    assert (tmp_path / "learner.zip").stat().st_size < 200_000


def finish(env: TokenVectorEnv, folder: Path, total: int) -> dict[str, Tensor]:
    set_random_seed(3)
    env.reset(seed=3)
    algorithm = build(
        PPO,
        env,
        **PLAIN,
        device="cpu",
        n_epochs=2,
        n_minibatches=2,
        learning_rate=1e-2,
        anneal=False,  # a schedule would depend on the total
        kl_old="exact",
        kl_old_coef=0.1,
        policy_options={**ADAPTED, "gradient_checkpointing": True, "precision": "bf16"},
    )
    folder.mkdir(exist_ok=True)
    learner = SB3Learner(algorithm, checkpoint_seconds=0.0)
    with TrainingRun(folder, total, "test") as run:
        learner.learn(total, run)
    return weights(learner.policy)


def test_stopped_and_resumed_is_never_stopped_with_every_saving_on(make_vector_env, tmp_path):
    whole = finish(make_vector_env(16), tmp_path / "whole", 300)
    finish(make_vector_env(16), tmp_path / "resumed", 120)
    torch.manual_seed(99)
    assert_equal(finish(make_vector_env(16), tmp_path / "resumed", 300), whole)
    assert all("lora" in name or name.startswith("critic.head") for name in whole), (
        "only what is trained"
    )
    (last,) = (tmp_path / "resumed" / "checkpoints").glob("*3*/policy.safetensors")
    assert last.stat().st_size < 100_000


def test_adapters_refuse_what_they_cannot_do(make_vector_env, save_lm, monkeypatch):
    env = make_vector_env(2)
    with pytest.raises(InputError, match="critic=shared"):
        ppo.make(ppo.Config(lora_rank=2, critic="separate"), env)
    with pytest.raises(InputError, match="lora_rank"):
        ppo.make(ppo.Config(lora_rank=-1), env)
    with pytest.raises(InputError, match="precision"):
        ppo.make(ppo.Config(precision="fp16"), env)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="kl_old"):
        ppo.make(ppo.Config(kl_old="k1"), env)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"pip install 'rlhf-gym\[lora\]'"):
        ppo.make(ppo.Config(lora_rank=2), env)


@pytest.mark.parametrize("options", [ADAPTED, {"precision": "bf16"}, {"kl_old": "exact"}])
def test_the_doctor_lets_them_train(make_vector_env, options):
    env = make_vector_env(N)
    env.objective.reference.model.requires_grad_(False)
    learner = ppo.make(ppo.Config(**options), env)
    assert [str(problem) for problem in examine(Subject(env, learner.policy))] == []
