"""Other libraries train in the same environment; each test is skipped where its library is not."""

import gc
import importlib
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import pytest
import torch
from stable_baselines3.common.utils import set_random_seed

from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.objective.enumeration import Enumeration

PAGE = Path(__file__).parents[1] / "docs" / "libraries.md"

pytestmark = pytest.mark.filterwarnings("ignore")


def learned(name: str, folder: Path, tokens: int, **options: object) -> float:
    """Optimality on Exact-v0 of a policy that was trained, saved and loaded again."""
    library = name.split("_")[0].replace("rllib", "ray")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(library)
        module = importlib.import_module(f"agents.{name}")
    set_random_seed(0)
    env = gymnasium.make_vec("rlhf_gym/Exact-v0", num_envs=64, device="cpu").unwrapped
    assert isinstance(env, TokenVectorEnv)
    env.reset(seed=0)
    learner = module.make(module.Config(**options), env)
    learner.learn(tokens)
    learner.save(folder)
    policy = CausalLM.load(str(folder)).following(env.objective.reference)
    task = Enumeration(env.objective, env.prompts.ids, max_new_tokens=env.max_new_tokens)
    found = task.value(task.log_probs(policy)).objective
    return float(task.optimality(found))


def test_tianshou_learns_the_enumerable_task(tmp_path):
    assert 0.3 < learned("tianshou_ppo", tmp_path / "policy", 8000, learning_rate=1e-3) <= 1


def test_rllib_learns_the_enumerable_task(tmp_path):
    assert 0.2 < learned("rllib_ppo", tmp_path / "policy", 4096, learning_rate=1e-3) <= 1


def test_tianshou_is_paid_what_the_environment_pays_a_bound_actor():
    pytest.importorskip("tianshou")
    from agents import tianshou_ppo

    env = gymnasium.make_vec("rlhf_gym/Exact-v0", num_envs=16, device="cpu").unwrapped
    assert isinstance(env, TokenVectorEnv)
    learner = tianshou_ppo.make(tianshou_ppo.Config(), env)
    with torch.no_grad():
        for p in learner.policy.model.parameters():
            p.mul_(1.1)  # away from the reference, so that there is something to pay
    observations, _ = learner.env.reset()
    sums = np.zeros(16)
    episodes: list[float] = []
    for _ in range(40):
        with torch.no_grad():
            logits, _ = learner.actor(observations)
        actions = torch.distributions.Categorical(logits=logits).sample().numpy()
        observations, rewards, ended, _, _ = learner.env.step(actions)
        sums += rewards
        for i in np.flatnonzero(ended):
            episodes.append(sums[i])
            sums[i] = 0.0
        if ended.any():
            observations = observations.copy()
            observations[ended], _ = learner.env.reset(np.flatnonzero(ended))
    beta = env.objective.kl_coef
    expected = [x["score"] - beta * x["kl_sum"] for x in learner.env.finished]
    assert len(expected) > 16
    np.testing.assert_allclose(episodes, expected, atol=1e-5)
    assert max(abs(x["kl_sum"]) for x in learner.env.finished) > 1e-3


def test_rllib_is_paid_what_the_environment_pays_a_bound_actor(monkeypatch):
    pytest.importorskip("ray")
    from agents import rllib_ppo

    env = gymnasium.make_vec("rlhf_gym/Exact-v0", num_envs=16, device="cpu").unwrapped
    assert isinstance(env, TokenVectorEnv)
    step, paid, came, sums = rllib_ppo.LiveEnv.step, [], [], np.zeros(16)

    def watched(self, actions):
        out = step(self, actions)
        sums[:] += out[1]
        ended = np.flatnonzero(out[2])
        paid.extend(sums[ended])
        came.extend(self.seen.finished[len(self.seen.finished) - len(ended) :])
        sums[ended] = 0.0
        return out

    monkeypatch.setattr(rllib_ppo.LiveEnv, "step", watched)
    learner = rllib_ppo.make(rllib_ppo.Config(learning_rate=1e-2), env)
    learner.learn(1000)
    assert len(came) > 100
    expected = [score - env.objective.kl_coef * kl for score, kl in came]
    np.testing.assert_allclose(paid, expected, atol=1e-5)
    assert max(abs(kl) for _, kl in came) > 0.5


# The programs of docs/libraries.md: each library reports J of the policy that plays.


class Returns(NamedTuple):
    """Exact means over responses of a policy, and the deviation of one response's return."""

    bound: float
    unbound: float
    score: float
    deviation: float
    reference: float


def perturb(lm: torch.nn.Module) -> None:
    """Move a policy away from the reference, so that its KL is clearly above 0."""
    weight = lm.get_output_embeddings().weight
    with torch.no_grad():
        weight.add_(0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))


@pytest.fixture(scope="module")
def exact() -> Returns:
    env = gymnasium.make_vec("rlhf_gym/Exact-v0", num_envs=1, device="cpu").unwrapped
    assert isinstance(env, TokenVectorEnv)
    task = Enumeration(env.objective, env.prompts.ids, max_new_tokens=env.max_new_tokens)
    policy = env.objective.reference.trainable()
    perturb(policy.model)
    table = task.log_probs(policy)
    value = task.value(table)
    log_p, log_ref = task.flat(table), task.flat(task.reference)
    p, beta = np.exp(log_p), env.objective.kl_coef
    returns = task.flat_scores - beta * (log_p - log_ref)
    mean = float((p * returns).sum(1).mean())
    assert mean == pytest.approx(float(value.objective.mean()))
    assert value.kl.mean() > 1
    return Returns(
        bound=mean,
        unbound=float((p * (task.flat_scores + beta * log_ref)).sum(1).mean()),
        score=float(value.score.mean()),
        deviation=float(np.sqrt((p * returns**2).sum(1).mean() - mean**2)),
        reference=float(task.value(task.reference).objective.mean()),
    )


@pytest.fixture
def program(monkeypatch, tmp_path) -> Callable[..., dict[str, Any]]:
    """Runs the blocks of a section of the page in turn, with a perturbed policy."""
    sections = re.split(r"^## (.*)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    blocks = {
        heading: re.findall(r"```python\n(.*?)```", body, re.DOTALL)
        for heading, body in zip(sections[1::2], sections[2::2], strict=True)
    }
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    set_random_seed(0)

    def run(heading: str, cuts: tuple[str, str] = ("", ""), between: Any = None) -> dict[str, Any]:
        names: dict[str, Any] = {}
        exec(compile(blocks["The language model as an actor"][0], PAGE.name, "exec"), names)
        plain = names["Actor"]

        class Perturbed(plain):
            def __init__(self, env: Any) -> None:
                super().__init__(env)
                perturb(self.lm)

        names["Actor"] = Perturbed
        for i, code in enumerate(blocks[heading]):
            assert cuts[0] in code
            exec(compile(code.replace(*cuts), PAGE.name, "exec"), names)
            if between is not None and i == 0:
                between(names)
        return names

    yield run
    torch.distributions.Distribution.set_default_validate_args(True)  # skrl turns it off


def assert_is_j(mean: float, episodes: int, exact: Returns) -> None:
    """The mean return is J within four standard errors, and no other mean is."""
    error = 4 * exact.deviation / np.sqrt(episodes)
    assert abs(mean - exact.bound) < error, (mean, exact)
    for other in (exact.unbound, exact.score, exact.reference):
        assert abs(mean - other) > error, (mean, exact)


def test_the_program_in_cleanrls_style_reports_j(program, exact):
    """Its first update alone; the episodes are many, so that few are left unfinished."""
    cuts = ("num_steps, num_updates = 64, 16, 40", "num_steps, num_updates = 64, 96, 1")
    names = program("One file in CleanRL's style", cuts)
    assert len(names["returns"]) > 1500
    assert_is_j(np.mean(names["returns"]), len(names["returns"]), exact)
    assert float(names["policy_loss"]) != 0


@pytest.mark.slow
def test_the_program_in_cleanrls_style_learns(program):
    names = program("One file in CleanRL's style")
    env = names["envs"].unwrapped
    task = Enumeration(env.objective, env.prompts.ids, max_new_tokens=env.max_new_tokens)
    policy = CausalLM.wrap(names["actor"].lm, env.objective.reference.tokenizer)
    assert 0.7 < task.optimality(task.value(task.log_probs(policy)).objective) <= 1


def test_torchrl_reports_j(program, exact):
    pytest.importorskip("torchrl")
    names = program("TorchRL")
    assert_is_j(names["returns"].mean(), len(names["returns"]), exact)
    # The numbers of the last info of an episode are where TorchRL has the ended rows.
    batch = names["batch"]
    done = batch["next", "done"][..., 0]
    assert (batch["next", "score"][done] != 0).all()
    assert (batch["next", "score"][~done] == 0).all()


def test_torchrl_takes_infos_whatever_ends_in_its_first_steps():
    """It reads the keys of all infos off a few random steps, in which episodes may end or not."""
    pytest.importorskip("torchrl")
    from torchrl.envs import GymEnv, GymWrapper, default_info_dict_reader

    ended = set()
    for seed in range(12):
        torch.manual_seed(seed)
        env = GymWrapper(gymnasium.make_vec("rlhf_gym/Exact-v0", num_envs=2, device="cpu"))
        taken = env.rollout(6, break_when_any_done=False)
        assert {"score", "kl", "ref_log_prob"} <= set(taken["next"].keys())
        ended.add(bool(taken["next", "done"][:, 0].any()))
    assert ended == {True, False}
    single = GymEnv("rlhf_gym/Exact-v0", device="cpu")
    single.set_info_dict_reader(default_info_dict_reader(["score", "kl_sum"]))
    taken = single.rollout(6, break_when_any_done=False)
    assert ((taken["next", "score"] != 0) == taken["next", "done"][..., 0]).all()


def test_skrl_reports_j(program, exact):
    pytest.importorskip("skrl")
    names = program("skrl")
    # Its mean is one of means over the last 100 returns, which weighs all but the ends alike.
    assert_is_j(names["mean_return"], 2500, exact)


def test_tianshou_reports_j(program, exact):
    pytest.importorskip("tianshou")
    names = program("Tianshou")
    assert names["collected"].returns_stat.mean == pytest.approx(names["returns"].mean())
    assert_is_j(names["collected"].returns_stat.mean, len(names["returns"]), exact)


def test_rllib_reports_j(program, exact):
    pytest.importorskip("ray")
    names = program("RLlib", between=lambda names: perturb(names["learner"].module.lm))
    # RLlib's own mean is over the last 100 episodes.
    assert_is_j(names["mean_return"], 100, exact)
    score, kl = np.mean(names["learner"].seen.finished, axis=0)
    assert_is_j(score - 0.4 * kl, len(names["learner"].seen.finished), exact)


def test_minari_records_and_recovers(program, exact):
    pytest.importorskip("minari")
    names = program("Minari")
    assert_is_j(names["returns"].mean(), len(names["returns"]), exact)
    dataset, recovered = names["dataset"], names["recovered"]
    kl = [episode.infos["kl_sum"][-1] for episode in dataset.iterate_episodes()]
    np.testing.assert_allclose(names["returns"], names["scores"] - 0.4 * np.array(kl), atol=1e-5)
    # The recovered environment has the recorded prompts, scores and texts.
    for episode in list(dataset.iterate_episodes())[:20]:
        observation, _ = recovered.reset(seed=int(episode.id))
        np.testing.assert_array_equal(observation, episode.observations[0])
        for action in episode.actions:
            *_, info = recovered.step(action)
        assert info["score"] == pytest.approx(episode.infos["score"][-1], abs=1e-5)
        for key in ("prompt", "response", "finish_reason"):
            assert info[key] == episode.infos[key][-1].decode()
    names.clear()
    gc.collect()  # now, because Minari's temporary folder warns when it is collected
