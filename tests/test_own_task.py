"""A task of a user's own is taken like one of this project: ids, keywords, splits, messages."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import torch
from conftest import text_reward
from rich.console import Console

import agents.cli
from agents.cli.command import look_in_current_folder
from agents.runs.comparison import Job, yardstick
from agents.runs.comparison_options import ComparisonOptions
from agents.runs.journey import run_journey
from agents.runs.journey_options import JourneyOptions, simulated_human
from agents.runs.labelling import SIMULATED_HUMAN
from agents.runs.setup import env_keywords, make_env
from rlhf_gym.data.prompt_dataset import PromptDataset
from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.errors import InputError, RewardError
from rlhf_gym.evaluation.record import check_prompts, evaluate_policy
from rlhf_gym.reports.terminal import table
from rlhf_gym.tasks.keywords import check_keywords, chosen_keywords, keywords_of, passes_on
from rlhf_gym.tasks.registered import find_spec
from rlhf_gym.tasks.text import text_vector_env

PROMPTS = ["a b", "c d", "g h"]
"""The hash holds out none of them at the default share."""
MODULE = """
import gymnasium

gymnasium.register(
    id="mine/Named-v0",
    entry_point="rlhf_gym.tasks.text:text_env",
    vector_entry_point="rlhf_gym.tasks.text:text_vector_env",
    kwargs={"kl_coef": 0.25},
)
"""

Register = Callable[..., str]


def failing(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    raise KeyError("no such word")


@pytest.fixture
def register(save_lm, tmp_path, monkeypatch) -> Register:
    """Registers a task with three prompts under an id, and returns the id."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps(PROMPTS))
    before = dict(gymnasium.registry)

    def add(name: str = "mine/Task-v0", *, vector: bool = True, **more: Any) -> str:
        kwargs = {
            "reference": save_lm(),
            "reward_model": "conftest:text_reward",
            "prompts": str(file),
            "max_prompt_tokens": 4,
            "max_new_tokens": 3,
            **more,
        }
        gymnasium.register(
            id=name,
            entry_point="rlhf_gym.tasks.text:text_env",
            vector_entry_point="rlhf_gym.tasks.text:text_vector_env" if vector else None,
            kwargs={k: v for k, v in kwargs.items() if v is not None},
        )
        return name

    yield add
    gymnasium.registry.clear()
    gymnasium.registry.update(before)


@pytest.fixture
def own_module(tmp_path, monkeypatch, register) -> Path:
    """A module in the current folder that registers mine/Named-v0, imported from there."""
    (tmp_path / "my_named.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.delitem(sys.modules, "my_named", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    look_in_current_folder()
    return tmp_path


def test_what_is_registered_wins_over_the_command_and_loses_to_the_user(register):
    def split(env_id: str, **asked: Any) -> str:
        return make_env(env_id, 1, asked, {"split": "all"}).prompts.split

    assert split(register("mine/None-v0", held_out=0.9)) == "all", "the command's own default"
    own = register("mine/Train-v0", split="train")
    assert split(own) == "train"
    assert split(own, split="all") == "all"


def test_keywords_that_a_function_declares_count_as_registered(register):
    spec = find_spec(register("mine/Kwargs-v0"))
    ours = {**spec.kwargs, "split": "all"}

    @passes_on(text_vector_env, lambda: ours)
    def own_vector_env(**keywords: Any) -> TokenVectorEnv:
        return text_vector_env(**{**ours, **keywords})

    gymnasium.register(id="mine/Function-v0", vector_entry_point=own_vector_env)
    assert chosen_keywords("mine/Function-v0") == ours.keys()
    env = make_env("mine/Function-v0", 1, {"device": "cpu"}, {"split": "held_out"})
    assert (env.prompts.split, len(env.prompts)) == ("all", 3)
    assert chosen_keywords("rlhf_gym/Exact-v0") >= {"split", "gold", "kl_coef"}
    assert not chosen_keywords("rlhf_gym/Reviews-v0") & {"split", "device"}


def test_the_device_is_the_commands_option_then_the_registered_one(register, monkeypatch):
    env_id = register(device="cpu", split="all")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert env_keywords({}, "auto") == {}
    assert make_env(env_id, 1, env_keywords({}, "auto")).objective.reference.device.type == "cpu"
    assert env_keywords({}, "cuda") == {"device": "cuda"}
    assert env_keywords({"device": "cpu"}, "cuda") == {"device": "cpu"}


def test_a_comparison_measures_on_the_registered_split(register, tmp_path):
    env_id = register(split="all")
    options = ComparisonOptions(("ppo",), (env_id,), device="cpu", run_dir=tmp_path)
    assert yardstick(options, env_id, "held_out").before.shape == (3,)
    with pytest.raises(InputError, match="no prompt is left of 3: none is held out"):
        yardstick(options, register("mine/Unsplit-v0"), "held_out")


def test_tasks_of_one_name_have_run_folders_of_their_own():
    ids = ("rlhf_gym/Exact-v0", "mine/Exact-v0", "my_module:mine/Exact-v1")
    folders = [Job(env_id, "ppo", False, 1.0, 0).folder for env_id in ids]
    assert folders == [
        "Exact-v0-ppo-seed-1-0",  # as before, so that a stopped comparison continues
        "mine_Exact-v0-ppo-seed-1-0",
        "mine_Exact-v1-ppo-seed-1-0",
    ]


def test_an_evaluation_says_which_prompts_it_used(register):
    env = make_env(register(split="all"), 1, {"device": "cpu"}, {"split": "held_out"})
    sizes = {"episodes": 6, "prompts": 3, "reference_samples": 2}
    figures = evaluate_policy(env.objective.reference, env, **sizes, progress=False)
    assert (figures["split"], figures["score_after"]["n"]) == ("all", 3)
    assert str(table(figures).title).startswith("all prompts,")
    assert str(table({**figures, "split": "held_out"}).title).startswith("held-out prompts,")
    with Console().capture():
        Console().print(table(figures))


@pytest.mark.parametrize(
    ("split", "fix"),
    [
        ("all", "give more prompts$"),
        ("train", "give more prompts, lower held_out, or use all of them with split='all'"),
        ("held_out", "give more prompts, raise held_out, or use all of them with split='all'"),
    ],
)
def test_one_prompt_is_too_few_for_an_evaluation(register, tmp_path, split, fix):
    (tmp_path / "prompts.json").write_text(json.dumps(["a b"]))
    share = {"all": 0.5, "train": 0.0, "held_out": 1.0}[split]
    env = make_env(register(split=split, held_out=share), 1, {"device": "cpu"})
    with pytest.raises(InputError, match=f"split '{split}' has only 1: {fix}"):
        check_prompts(env)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (PROMPTS, {"split": "held_out"}, "of 3: none is held out, because held_out is 0.1 .*raise"),
        (PROMPTS, {"split": "held_out", "held_out": 0.0}, "held_out is 0 .*set held_out above 0"),
        (PROMPTS, {"held_out": 1.0, "split": "train"}, "of 3: all are held out.*lower held_out"),
        (PROMPTS, {"max_tokens": 1}, r"of 3: all are longer .*is 1 \(the shortest has 3 tokens\)"),
        (PROMPTS, {"max_tokens": 1}, "raise max_prompt_tokens, or cut texts with prompt_keep"),
        ([], {}, "of 0: there are none; give some"),
        (PROMPTS, {"held_out": 1.5}, "held_out must be from 0 to 1, not 1.5"),
    ],
)
def test_when_no_prompt_is_left_the_cause_and_the_fix_are_named(load_lm, prompts, options, message):
    lm = load_lm()
    with pytest.raises(InputError, match=message) as raised:
        PromptDataset.from_texts(prompts, lm.tokenizer, lm.eos_ids, **{"max_tokens": 4, **options})
    too_long = "longer" in message or "raise max" in message
    if prompts is PROMPTS:
        assert ("max_prompt_tokens" in str(raised.value)) == too_long


def test_an_id_names_its_module_in_the_current_folder(own_module):
    assert sys.path[-1] == str(own_module), "no file here hides an installed package"
    assert find_spec("my_named:mine/Named-v0").kwargs == {"kl_coef": 0.25}
    assert find_spec("my_named:mine/Named").id == "mine/Named-v0"
    described = {word.name: word.default for word in keywords_of("my_named:mine/Named-v0") or ()}
    assert (described["kl_coef"], described["split"]) == (0.25, "train")
    with pytest.raises(InputError, match="takes no keyword 'kl_cof'; did you mean kl_coef"):
        make_env("my_named:mine/Named-v0", 1, {"kl_cof": 1})


@pytest.mark.parametrize(
    ("env_id", "message"),
    [
        ("my_named:mine/Namd-v0", "did you mean my_named:mine/Named-v0?"),
        ("my_named:other/Thing-v0", r"my_named.py\) registers no environment .*; registered are"),
        ("my_name:mine/Named-v0", "there is no module 'my_name'; did you mean my_named?"),
        ("my_named.py:mine/Named-v0", "did you mean my_named?"),
        ("folder/my_named:mine/Named-v0", "'folder/my_named' is not the dotted name of a module"),
        ("qqqq:mine/Named-v0", "no module 'qqqq'; run this in its folder, or put that on the path"),
        ("needs_more:mine/X-v0", "cannot import 'needs_more': No module named 'not_installed'"),
        ("other/Thing-v0", "the module that registers it too: MODULE:other/Thing-v0"),
    ],
)
def test_a_wrong_module_or_id_is_answered_with_the_right_one(own_module, env_id, message):
    (own_module / "needs_more.py").write_text("import not_installed", encoding="utf-8")
    with pytest.raises(InputError, match=message):
        make_env(env_id, 1, {})


def test_a_registration_that_cannot_work_is_named(register):
    single = register("mine/Single-v0", vector=False)
    with pytest.raises(InputError, match=r"without a vector_entry_point.*text_vector_env"):
        make_env(single, 1, {})
    typo = register("mine/Typo-v0", kl_coeff=0.1)
    with pytest.raises(InputError, match=r"registered with the keyword 'kl_coeff'.*mean kl_coef"):
        check_keywords(typo, {})
    with pytest.raises(InputError, match=r"registered with num_envs.*--num-envs"):
        make_env(register("mine/Rows-v0", num_envs=8), 1, {})
    with pytest.raises(InputError, match="must return a TokenVectorEnv, not a CartPoleVectorEnv"):
        make_env("CartPole-v1", 1, {})


def test_a_reward_that_raises_is_named(register):
    env = make_env(register(reward_model="test_own_task:failing", split="all"), 1, {})
    env.reset(seed=0)
    with pytest.raises(RewardError, match="no such word") as raised:
        for _ in range(3):
            env.step(env.action_space.sample())
    assert isinstance(raised.value.__cause__, KeyError)
    assert "the reward 'failing' failed on 1 responses" in str(raised.value)


@pytest.mark.parametrize(
    ("registered", "expected"),
    [
        ({}, "conftest:text_reward"),
        ({"gold": "my_gold:score"}, "my_gold:score"),
        ({"reward_model": "/a/model"}, SIMULATED_HUMAN),
    ],
)
def test_the_human_of_a_run_is_the_registered_scorer(register, registered, expected):
    env_id = register(**registered)
    assert simulated_human(JourneyOptions(env=env_id)) == expected
    assert simulated_human(JourneyOptions(env=env_id, human="m:f")) == "m:f"


def test_a_run_with_too_few_prompts_fails_before_it_begins(register, tmp_path):
    run_dir = tmp_path / "run"
    options = JourneyOptions(env=register(), run_dir=run_dir, device="cpu")
    with pytest.raises(InputError, match="none is held out"):
        run_journey(options, progress=False)
    (tmp_path / "prompts.json").write_text(json.dumps(["a b"]))
    options = JourneyOptions(env=register("mine/One-v0", split="all"), run_dir=run_dir)
    with pytest.raises(InputError, match="needs at least two prompts"):
        run_journey(options, progress=False)
    assert not run_dir.exists()


def test_a_whole_run_of_three_prompts_uses_all_of_them(register, tmp_path, capsys, monkeypatch):
    (tmp_path / "prompts.json").write_text(json.dumps([f"{a} {b}" for a in "abcd" for b in "efgh"]))
    monkeypatch.setattr(sys, "argv", ["rlhf-gym"])
    words = (
        f"run --env {register(split='all')} --comparisons 64 --reward-epochs 1 --total-tokens 64 "
        "--num-envs 8 --n-minibatches 1 --episodes 32 --prompts 16 --reference-samples 2 "
        f"--run-dir {tmp_path / 'run'}"
    )
    with pytest.raises(SystemExit) as raised:
        agents.cli.main(words.split())
    said = capsys.readouterr()
    assert raised.value.code == 0, said.err
    assert "this run pays the reward model that it trains on the choices of conftest" in said.out
    assert "4/4 evaluation: all prompts" in said.out
    figures = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert (figures["split"], figures["score_after"]["n"]) == ("all", 16)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["human"] == (
        f"{text_reward.__module__}:text_reward"
    )
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Means on all prompts" in page and "held-out prompts" not in page
