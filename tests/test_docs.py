"""Code in the docs runs, and does what the page says."""

import importlib
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import gymnasium
import pytest
from stable_baselines3.common.utils import set_random_seed
from test_scripts import run

import rlhf_gym  # noqa: F401 (registers the ids)
from agents.cli.subcommands import SUBCOMMANDS
from agents.runs.algorithm import load_algorithm
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.objective.enumeration import Enumeration
from rlhf_gym.tasks.published import SETTINGS

DOCS = Path(__file__).parents[1] / "docs"
PAGES = (DOCS.parent / "README.md", *sorted(DOCS.rglob("*.md")))


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)


def test_the_reinforce_loop_learns_exact_v0():
    (code,) = blocks("any-algorithm.md")
    assert len([line for line in code.splitlines() if line.strip()]) <= 60
    assert code.count("rlhf_gym") == 2, "no project code but the environment"
    names: dict[str, Any] = {}
    exec(compile(code, "any-algorithm.md", "exec"), names)
    env = names["env"].unwrapped
    task = Enumeration(env.objective, env.prompts.ids, max_new_tokens=env.max_new_tokens)
    policy = CausalLM.wrap(names["policy"], env.objective.reference.tokenizer)
    reached = task.optimality(task.value(task.log_probs(policy)).objective)
    assert 0.85 < reached <= 1, reached


@pytest.mark.filterwarnings("ignore:Evaluation environment is not wrapped")
def test_the_program_for_stable_baselines3_pays_j(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    set_random_seed(0)
    names: dict[str, Any] = {}
    for code in blocks("stable-baselines3.md"):
        exec(compile(code, "stable-baselines3.md", "exec"), names)
    found = names["watch"].evaluations
    assert found[0]["optimality"] == pytest.approx(0, abs=1e-5)
    assert found[-1]["optimality"] > 0.6
    env, policy = names["held_out"].unwrapped, names["model"].policy.core
    task = Enumeration(env.objective, env.prompts.ids, max_new_tokens=env.max_new_tokens)
    wanted = task.value(task.log_probs(policy)).objective.mean()
    assert abs(names["mean"] - wanted) < 4 * names["std"] / 1000**0.5
    assert {"best_model.zip", "model.zip"} <= {p.name for p in (tmp_path / "runs/sb3").iterdir()}


COMMAND = re.compile(r"(?:python scripts/(\w+)\.py|rlhf-gym ([\w-]+)) ([^\n#]*)")


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """Each script that a page's shell blocks run, and what follows it."""
    shell = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    return [
        (script or SUBCOMMANDS[name].module, rest.split())
        for block in shell
        for script, name, rest in COMMAND.findall(block.replace("\\\n", " "))
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_the_docs_take_options_that_there_are(page):
    for script, words in commands(page):
        known = {"config"} | {
            f.name for f in fields(importlib.import_module(f"agents.cli.{script}").Config)
        }
        if script in ("train_policy", "rlhf"):
            name = words[words.index("--algorithm") + 1] if "--algorithm" in words else "ppo"
            if "." in name:
                continue  # a module of the reader's own
            known |= {f.name for f in fields(load_algorithm(name).Config)}
        asked = {w.removeprefix("--").replace("-", "_") for w in words if w.startswith("--")}
        assert asked <= known, script


@pytest.mark.parametrize("name", [n for n, setting in SETTINGS.items() if setting.reward_model])
def test_a_page_trains_the_reward_model_as_the_error_says(name):
    page = DOCS / "envs" / f"{name.lower()}.md"
    ((_, words),) = [c for c in commands(page) if c[0] == "train_reward_model"]
    labels = re.search("LABELS=(.*)", page.read_text(encoding="utf-8"))
    said = [labels[1] if labels and word == "$LABELS" else word for word in words]
    pairs = set(zip(said[::2], said[1::2], strict=True))
    hint = SETTINGS[name].reward_model.split()
    assert pairs == {*zip(hint[::2], hint[1::2], strict=True), ("--run-dir", "runs/rm")}


HEADINGS = (
    "Description",
    "Action Space",
    "Observation Space",
    "Rewards",
    "Starting State",
    "Episode End",
    "Arguments",
    "Version History",
)


@pytest.mark.parametrize("name", [n for n in gymnasium.registry if n.startswith("rlhf_gym/")])
def test_every_environment_has_a_page_with_gymnasiums_headings(name):
    page = (DOCS / "envs" / f"{name.removeprefix('rlhf_gym/').lower()}.md").read_text()
    found = re.findall(r"^## (.*)$", page, re.MULTILINE)
    assert [heading for heading in found if heading in HEADINGS] == list(HEADINGS)
    assert page.startswith(f"# {name}\n")


def test_an_algorithm_of_ones_own_takes_one_module(tmp_path):
    (code,) = blocks("algorithms.md")
    assert len(code.splitlines()) < 60
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "my_reinforce.py").write_text(code, encoding="utf-8")
    said = run(
        *("train_policy.py", "--env", "rlhf_gym/Exact-v0", "--algorithm", "mine.my_reinforce"),
        *("--total-tokens", 12_000, "--learning-rate", 3e-3, "--num-envs", 128),
        *("--run-dir", tmp_path / "run", "--device", "cpu"),
        path=tmp_path,
    )
    assert "100 %" in said
    env = gymnasium.make_vec("rlhf_gym/Exact-v0", num_envs=1, device="cpu").unwrapped
    task = Enumeration(env.objective, env.prompts.ids, max_new_tokens=env.max_new_tokens)
    policy = CausalLM.load(str(tmp_path / "run" / "policy"))
    assert task.optimality(task.value(task.log_probs(policy)).objective) > 0.3
