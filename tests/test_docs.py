"""Code in the docs runs, and does what the page says."""

import re
from pathlib import Path
from typing import Any

import gymnasium
import pytest

import rlhf_gym  # noqa: F401 (registers the ids)
from rlhf_gym.enumeration import Enumeration
from rlhf_gym.lm import CausalLM

DOCS = Path(__file__).parents[1] / "docs"


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
