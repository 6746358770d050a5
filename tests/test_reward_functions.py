"""A user's reward function is found, called in its form, and named if it misbehaves."""

import inspect
import json
import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents.doctor import Subject, examine
from agents.runs.examination import make_policy
from agents.runs.setup import with_absolute_files
from rlhf_gym.errors import InputError, RewardError
from rlhf_gym.rewards.callables import absolute_name, load_callable
from rlhf_gym.rewards.functions import load_reward, scores_of
from rlhf_gym.tasks.text import text_env, text_vector_env

PROMPTS, RESPONSES = ["a", "b"], ["x y", "z"]


def lengths(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(len(p) + 2 * len(r)) for p, r in zip(prompts, responses, strict=True)]


def trl_form(completions: list[str], **kwargs: Any) -> list[float]:
    return lengths(kwargs["prompts"], completions) if "prompts" in kwargs else [0.0] * 2


def both(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
    return lengths(prompts, completions)


def turned(completions: list[str], prompts: list[str]) -> list[float]:
    return lengths(prompts, completions)


def other_names(questions: list[str], answers: list[str], scale: float = 1.0) -> list[float]:
    return lengths(questions, answers)


def ignoring(_: list[str], responses: list[str], /) -> list[float]:
    return lengths(PROMPTS, responses)


class Scorer:
    def __call__(self, prompts: list[str], responses: list[str]) -> list[float]:
        return lengths(prompts, responses)


@pytest.mark.parametrize(
    "reward", [lengths, both, turned, trl_form, other_names, ignoring, Scorer(), Scorer().__call__]
)
def test_a_function_is_called_in_its_form(reward):
    assert scores_of(reward, PROMPTS, RESPONSES).tolist() == [7.0, 3.0]


@pytest.mark.parametrize(
    "value",
    [
        [1, 2.5],
        (1, 2.5),
        np.array([1, 2.5], np.float32),
        torch.tensor([1, 2.5], requires_grad=True),
        torch.tensor([1, 2.5], dtype=torch.bfloat16),
        [torch.tensor(1.0, requires_grad=True), np.float32(2.5)],
        np.array([1, 2.5], dtype=object),
    ],
)
def test_numbers_of_every_kind_are_taken(value):
    assert scores_of(lambda prompts, responses: value, PROMPTS, RESPONSES).tolist() == [1.0, 2.5]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, r"None \(has it a `return`\?\)"),
        (0.5, "a float: 0.5"),
        ([1.0], "1 values for 2 responses"),
        ([1.0, 2.0, 3.0], "3 values"),
        (["1.0", "2.0"], r"'1.0' \(str\) for response 0"),
        ([1.0, None], r"'None' \(NoneType\) for response 1"),
        ([[1.0], [2.0]], r"shape \(2, 1\)"),
        (np.ones((2, 1)), r"shape \(2, 1\)"),
        (torch.ones(2, 1), r"shape \(2, 1\)"),
        (np.array(["1", "2"]), r"'1' \(str_\) for response 0"),
        ({"a": 1.0, "b": 2.0}, "a dict"),
        ((x for x in (1.0, 2.0)), "a generator"),
        ("ab", "a str: ab"),
        ([1 + 2j, 1.0], "complex"),
    ],
)
def test_what_is_not_one_number_per_response_is_refused(value, said):
    def odd(prompts: list[str], responses: list[str]) -> Any:
        return value

    with pytest.raises(RewardError, match=said) as raised:
        scores_of(odd, PROMPTS, RESPONSES)
    assert "odd" in str(raised.value)
    assert "'x y'; it must return a list of one number for each" in str(raised.value)


def divides(prompts: list[str], responses: list[str]) -> list[float]:
    return [1 / (len(r) - 3) for r in responses]


def needs_a_column(completions: list[str], answer: list[str], **kwargs: Any) -> list[float]:
    return [0.0 for _ in completions]


def swapped(responses: list[str], question: list[str]) -> list[float]:
    return [0.0 for _ in responses]


def alone(texts: list[str]) -> list[float]:
    return [0.0 for _ in texts]


def test_a_function_that_raises_shows_its_own_lines():
    with pytest.raises(RewardError) as raised:
        scores_of(divides, PROMPTS, RESPONSES)
    said = str(raised.value)
    assert "the reward 'divides' failed on 2 responses, of which the first is 'x y'" in said
    assert "ZeroDivisionError: division by zero" in said
    line = inspect.getsourcelines(divides)[1] + 1
    assert f'{Path(__file__).name}", line {line}' in said
    assert "in scores_of" not in said


@pytest.mark.parametrize(
    ("function", "said"),
    [("needs_a_column", "give answer a default"), ("alone", r"takes \(texts\)")],
)
def test_other_arguments_are_refused_when_it_is_named(function, said):
    with pytest.raises(InputError, match=said):
        load_reward(f"{__name__}:{function}")


def task(
    save_lm: Callable[..., str], prompt_file: str, reward: str, make: Callable[..., Any] = text_env
) -> Any:
    return make(
        reference=save_lm(),
        reward_model=reward,
        prompts=prompt_file,
        split="all",
        max_prompt_tokens=8,
        max_new_tokens=4,
    )


def returns_nothing(prompts: list[str], responses: list[str]) -> None:
    pass


def not_a_number(prompts: list[str], responses: list[str]) -> list[float]:
    return [math.nan for _ in responses]


@pytest.mark.parametrize("function", ["returns_nothing", "not_a_number"])
def test_the_doctor_blames_the_reward(save_lm, prompt_file, function):
    env = task(save_lm, prompt_file, f"{__name__}:{function}", text_vector_env)
    with pytest.raises(RewardError, match=f"the reward '{function}' returned"):
        examine(Subject(env, make_policy(env, None)))


@pytest.fixture
def own_file(tmp_path: Path) -> Path:
    file = tmp_path / "tests.py"  # a name that another module has
    file.write_text(
        "from sibling_of_rewards import FACTOR\n\n\n"
        "def exact(prompts, responses):\n    return [FACTOR * len(r) for r in responses]\n"
    )
    (tmp_path / "sibling_of_rewards.py").write_text("FACTOR = 3.0\n")
    return file


def test_a_file_may_be_named(own_file, monkeypatch, save_lm, prompt_file):
    monkeypatch.setattr(sys, "path", [*sys.path])
    whole = f"{own_file}:exact"
    reward = load_reward(whole)
    assert scores_of(reward, PROMPTS, RESPONSES).tolist() == [9.0, 3.0]
    monkeypatch.chdir(own_file.parent)
    assert absolute_name("tests.py:exact") == whole
    assert load_callable("tests.py:exact")(PROMPTS, RESPONSES) == [9.0, 3.0]
    keywords = {"reward_model": "tests.py:exact", "kl_coef": "0.1", "cuts": '["./tests.py:f"]'}
    assert with_absolute_files(keywords) == {
        "reward_model": whole,
        "kl_coef": "0.1",
        "cuts": json.dumps([f"{own_file.parent}/tests.py:f"]),
    }
    env = task(save_lm, prompt_file, "tests.py:exact")
    env.reset(seed=0)
    copied = pickle.loads(pickle.dumps(env.objective.reward))
    assert copied(PROMPTS, RESPONSES) == [9.0, 3.0]


def test_a_callable_object_of_a_file_may_have_any_attributes(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    file = tmp_path / "object_of_mine.py"
    file.write_text(
        "class Length:\n"
        "    def __init__(self):\n"
        "        self.name, self.function = 'length', len\n"
        "    def __call__(self, prompts, responses):\n"
        "        return [float(self.function(text)) for text in responses]\n"
        "length = Length()\n"
    )
    loaded = pickle.loads(pickle.dumps(load_callable(f"{file}:length")))
    assert loaded(PROMPTS[:2], ["ab", "abc"]) == [2.0, 3.0]
    assert loaded.name == f"{file}:length", "a pickle finds the file by it"


def test_a_file_may_be_called_as_the_running_program_is(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    file = tmp_path / "__main__.py"
    file.write_text("def ones(prompts, responses):\n    return [1.0 for _ in responses]\n")
    assert load_callable(f"{file}:ones")(["a"], ["b"]) == [1.0]


def test_another_process_finds_the_file(own_file, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    packed = pickle.dumps(load_reward(f"{own_file}:exact"))
    code = f"import pickle; print(pickle.loads({packed!r})(['a'], ['xx']))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/"
    )
    assert done.stdout.strip() == "[6.0]"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def exact(:\n", "SyntaxError"),
        ("import no_such_package_here\n", "No module named 'no_such_package_here'"),
        ("x = 1 / 0\n", r"ZeroDivisionError(.|\n)*mine_own.py\", line 1"),
        ("def exakt(prompts, responses): ...\n", "has no 'exact'; did you mean exakt"),
        ("exact = 3\n", "is not callable"),
    ],
)
@pytest.mark.parametrize("form", ["{folder}/mine_own.py:exact", "mine_own:exact"])
def test_a_file_that_cannot_be_used_is_told(tmp_path, monkeypatch, text, said, form):
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "mine_own", raising=False)
    (tmp_path / "mine_own.py").write_text(text)
    with pytest.raises(InputError, match=said) as raised:
        load_callable(form.format(folder=tmp_path))
    assert "mine_own" in str(raised.value)
    sys.modules.pop("mine_own", None)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mine.exact", r"did you mean the function mine:exact\?"),
        ("no.such.thing", r"did you mean the function no\.such:thing\?"),
        ("mine", "'mine' is a module: name the function in it, mine:FUNCTION"),
        ("mine.py", r"is a file of Python: name the function in it, mine\.py:FUNCTION"),
        ("none.py:exact", r"there is no file .*none\.py"),
        ("file.txt", "is a file; give the folder"),
    ],
)
def test_a_function_is_not_looked_for_on_the_hub(
    tmp_path, monkeypatch, save_lm, prompt_file, name, said
):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("def exact(prompts, responses): ...\n")
    Path("file.txt").write_text("")
    with pytest.raises(InputError, match=said):
        task(save_lm, prompt_file, name)
