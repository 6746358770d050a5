"""What the pages name exists: files, modules, links and headings; the recipes of a page run."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest

from agents.runs.algorithm import load_algorithm
from rlhf_gym.preferences import Comparison, read_comparisons
from rlhf_gym.tokens import PAD

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))]
# Not after a dot: other libraries have a package `agents` too.
NAME = re.compile(r"(?<![\w.])(?:rlhf_gym|agents)(?:\.\w+)+")
# Environment ids look like paths.
PATH = re.compile(
    r"(?<![\w/.-])((?:rlhf_gym|agents|scripts|tests|docs|\.ci)/(?!\w+-v\d)[\w/.-]*\w)"
)
PLACEHOLDER = "NAME"


def exists(dotted: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one."""
    parts = dotted.split(".")
    for i in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:i]))
        except ImportError:
            continue
        for part in parts[i:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def anchors(page: Path) -> set[str]:
    """A page's headings, as GitHub links to them."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page):
    text = page.read_text(encoding="utf-8")
    if page.name == "CHANGELOG.md":
        text = re.sub(r"^\|[^|]*\|", "|", text, flags=re.MULTILINE)  # names as they were before
    assert [name for name in sorted({*NAME.findall(text)}) if not exists(name)] == []
    paths = {path for path in PATH.findall(text) if PLACEHOLDER not in path}
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []
    for file, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]+))?\)", text):
        target = (page.parent / file) if file else page
        assert target.exists(), file
        assert not anchor or anchor in anchors(target), f"{file}#{anchor}"


def test_every_file_and_function_of_the_journeys_exists():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    found = re.findall(r"`((?:rlhf_gym|agents)/[\w/]+)\.py`: ((?:`[\w.]+`(?:, )?)+)", text)
    names = [
        f"{path.replace('/', '.')}.{name}"
        for path, listed in found
        for name in re.findall(r"`([\w.]+)`", listed)
    ]
    assert len(names) > 30
    assert [name for name in names if not exists(name)] == []


def test_the_index_lists_every_page():
    text = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    linked = {(ROOT / "docs" / file).resolve() for file in re.findall(r"\]\(([^)#]+)", text)}
    assert {page.resolve() for page in PAGES if page != ROOT / "docs" / "README.md"} <= linked


@pytest.fixture
def recipes(tmp_path, monkeypatch) -> Path:
    """The modules of extending.md, on the path."""
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n# ([\w/]+\.py)\n(.*?)```", text, re.DOTALL)
    for name, code in blocks:
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(code, encoding="utf-8")
        monkeypatch.delitem(sys.modules, name.removesuffix(".py").replace("/", "."), raising=False)
    (prompts,) = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    (tmp_path / "prompts.json").write_text(prompts, encoding="utf-8")
    assert len(blocks) == 5
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_the_recipe_of_a_task(recipes):
    env = gymnasium.make("personal_reviews:mine/PersonalReviews-v0", device="cpu", prompt_words=4)
    assert env.reset(seed=0)[0].shape == (12 + 12,)
    envs = gymnasium.make_vec("mine/PersonalReviews-v0", num_envs=2, device="cpu")
    assert envs.reset(seed=0)[0].shape == (2, 24)
    envs = envs.unwrapped
    assert (len(envs.prompts), envs.prompts.split) == (3, "all")
    vocabulary = envs.objective.reference.tokenizer.get_vocab()
    actions = np.full((2, 12), vocabulary["▁film"])
    actions[1, 3] = vocabulary["▁my"]
    assert envs.play(actions)[1]["score"].tolist() == [0.0, 1.0]


@pytest.fixture
def rlhf_gym_command(tmp_path_factory) -> list[str]:
    """`rlhf-gym` as pip installs it: a script in a folder of its own."""
    file = tmp_path_factory.mktemp("bin") / "rlhf-gym.py"
    lines = ["from agents.cli import main", "if __name__ == '__main__':", "    main()"]
    file.write_text("\n".join(lines), encoding="utf-8")
    return [sys.executable, str(file)]


SMALLER = {
    "doctor": "--rows 4",
    "policy": "--total-tokens 96 --num-envs 8 --n-minibatches 1",
    "evaluate": "--episodes 12 --prompts 3 --reference-samples 4",
    "compare": "--algorithms ppo --total-tokens 96 --num-envs 8 --seeds 1 --reference-samples 8 "
    "--policy-samples 4",
}
"""Options that make the commands of the page take seconds; the last value of an option counts."""


def test_the_commands_of_a_task_of_ones_own(recipes, rlhf_gym_command):
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    (block,) = [b for b in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) if "doctor" in b]
    said = {}
    for line in block.splitlines():
        name, *words = shlex.split(line)[1:]
        asks = words[-1] == "help"
        done = subprocess.run(
            [*rlhf_gym_command, name, *words, *([] if asks else SMALLER[name].split())],
            cwd=recipes,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        said["help" if asks else name] = done.stdout
    assert "21 of 21 checks pass" in said["doctor"]
    assert "all prompts, ± standard error" in said["evaluate"]
    assert json.loads((recipes / "runs/personal/evaluation.json").read_text())["split"] == "all"
    files = {file.name for file in (recipes / "runs/compared").iterdir()}
    assert "reference_mine_PersonalReviews-v0_all.npz" in files
    assert "kl_coef  (a number; default 0.3)" in said["help"]
    assert "split  (a text; default all)" in said["help"]


def test_the_recipe_of_a_reward_function(recipes):
    keywords = {"device": "cpu", "reward_model": "my_rewards:score"}
    env = gymnasium.make_vec("rlhf_gym/Reviews-v0", num_envs=2, **keywords).unwrapped
    env.reset(seed=0)
    word = env.objective.reference.tokenizer.get_vocab()["▁film"]
    actions = np.full((2, 40), word)
    actions[1, 8:] = PAD
    actions[1, 7] = env.objective.reference.eos_ids[0]
    assert env.play(actions)[1]["score"].tolist() == [0.0, 1.0]


def test_the_recipe_of_a_shaping(recipes):
    actions = np.array([[0, 1, 2, 3], [1, 1, 2, 3]])  # "a b c d" and "b b c d"
    scores = []
    for shaping in ([], [["my_shaping:word_bonus", {"word": "a", "bonus": 2.0}]]):
        keywords = {"device": "cpu", "shaping": shaping}
        env = gymnasium.make_vec("rlhf_gym/Exact-v0", num_envs=2, **keywords).unwrapped
        env.reset(seed=0)
        scores.append(env.play(actions)[1]["score"])
    np.testing.assert_allclose(scores[1] - scores[0], [2.0, 0.0], atol=1e-5)


def test_the_recipe_of_a_data_format(recipes):
    row = {"task": "p", "left": "a", "right": "b", "for_left": 3, "for_right": 1}
    (recipes / "duels.jsonl").write_text(json.dumps(row), encoding="utf-8")
    target = recipes / "comparisons.jsonl"
    importlib.import_module("my_duels").convert(recipes / "duels.jsonl", target)
    assert read_comparisons(target) == [Comparison("p", ("a", "b"), votes=(3, 1))]


def test_the_recipe_of_an_algorithm(recipes):
    module = load_algorithm("mine.best_of_pairs")
    env = gymnasium.make_vec("rlhf_gym/Exact-v0", num_envs=16, device="cpu").unwrapped
    env.reset(seed=0)
    learner = module.make(module.Config(), env)
    before = learner.policy.lm.get_output_embeddings().weight.clone()
    learner.learn(64)
    assert (learner.policy.lm.get_output_embeddings().weight != before).any()
