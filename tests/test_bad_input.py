"""Bad input gets a clear error that names the file, the row and the fix."""

import gzip
import json
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from conftest import prompt_dataset

import rlhf_gym  # noqa: F401
from rlhf_gym.data.prompt_dataset import PromptDataset
from rlhf_gym.data.prompt_rows import load_texts
from rlhf_gym.data.prompts import is_held_out
from rlhf_gym.errors import InputError
from rlhf_gym.preferences.collect import collect_comparisons
from rlhf_gym.rewards.callables import load_callable
from rlhf_gym.tasks.text import text_env, text_vector_env
from rlhf_gym.utils.type_hints import misfit


def write(tmp_path, name: str, text: str) -> str:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_prompts_are_read_from_every_local_format(tmp_path):
    expected = ["one two", "three"]
    rows = [{"prompt": text} for text in expected]
    lines = "\n".join(json.dumps(row) for row in rows)
    packed = tmp_path / "p.jsonl.gz"
    packed.write_bytes(gzip.compress(lines.encode()))
    files = [
        write(tmp_path, "p.txt", "one two\n\nthree\n"),
        write(tmp_path, "p.json", json.dumps(expected)),
        write(tmp_path, "q.json", json.dumps(rows)),
        write(tmp_path, "p.jsonl", lines),
        str(packed),
    ]
    for file in files:
        assert load_texts(file) == expected
    assert load_texts(write(tmp_path, "c.json", '[{"q": "x"}]'), column="q") == ["x"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{}", "a list is needed"),
        ("a.json", "[", "not valid JSON"),
        ("a.json", '["ok", 7]', "row 2"),
        ("a.json", '["ok", ""]', "row 2"),
        (
            "a.json",
            '[{"wrong": "x"}]',
            "has no column prompt, text, .*; it has wrong; .* prompt_column",
        ),
        ("a.json", "[]", "has no rows"),
        ("a.txt", "", "has no rows"),
        ("a.jsonl", '"ok"\nnot json', "not valid JSON"),
    ],
)
def test_bad_prompts_are_named(tmp_path, name, text, message):
    with pytest.raises(InputError, match=message) as raised:
        load_texts(write(tmp_path, name, text))
    assert name in str(raised.value)


def test_missing_or_garbled_prompt_files_are_named(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_texts(str(tmp_path / "none.json"))
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(InputError, match="not UTF-8"):
        load_texts(str(tmp_path / "latin.txt"))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'"x"\n' * 1000)[:-12])
    with pytest.raises(InputError, match="cannot be read"):
        load_texts(str(tmp_path / "cut.jsonl.gz"))


def test_too_long_prompts_are_dropped_and_counted(load_lm):
    lm = load_lm()
    data = PromptDataset.from_texts(["a b", "a b c d e f"], lm.tokenizer, lm.eos_ids, 4)
    assert (len(data), data.dropped) == (1, 1)
    with pytest.raises(InputError, match="raise max_prompt_tokens"):
        PromptDataset.from_texts(["a b c d e f"], lm.tokenizer, lm.eos_ids, 4)


def test_chat_prompts_without_a_template_are_refused(load_lm):
    lm = load_lm()
    with pytest.raises(InputError, match="no chat template"):
        PromptDataset.from_texts([[{"role": "user", "content": "a"}]], lm.tokenizer, (3,), 4)


def test_splits_are_disjoint_complete_and_depend_on_the_text_alone(load_lm):
    lm = load_lm()
    texts = [f"{a} {b}" for a in "abcdefgh" for b in "ijklmnop"]

    def ids(split: str) -> set[tuple[int, ...]]:
        data = PromptDataset.from_texts(
            [*texts, *texts], lm.tokenizer, lm.eos_ids, 4, split=split, held_out=0.3
        )
        assert len(set(data.ids)) == len(data)
        return set(data.ids)

    assert ids("train") & ids("held_out") == set()
    assert ids("train") | ids("held_out") == ids("all")
    assert 5 < len(ids("held_out")) < 35
    assert is_held_out("x", 1.0)
    assert not is_held_out("x", 0.0)


def nan_reward(prompts: list[str], responses: list[str]) -> list[float]:
    return [float("nan")] * len(responses)


def short_reward(prompts: list[str], responses: list[str]) -> list[float]:
    return [0.0]


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"reference": "/nowhere"}, "cannot load the model"),
        ({"reward_model": "nowhere:function"}, "cannot import"),
        ({"reward_model": "rlhf_gym.rewards.human:nothing"}, "cannot import"),
        ({"prompts": "/nowhere.txt"}, "no such file"),
        ({"prompt_column": "x", "prompts": "/nowhere.json"}, "no such file"),
        ({"max_new_tokens": 100}, "context of 64"),
        ({"kl_coef": -1}, "kl_coef must be at least 0"),
        ({"temperature": 0}, "temperature must be positive"),
        ({"split": "test"}, "split must be one of"),
        ({"max_prompt_tokens": 1}, "no prompt is left"),
        ({"kl_coef": "abc"}, "kl_coef: 'abc' is not a number"),
        ({"max_new_tokens": 4.5}, "max_new_tokens: 4.5 is not a whole number"),
        ({"stop_at_eos": 1}, "stop_at_eos: 1 is not True or False"),
        ({"top_k": True}, "top_k: True is not a whole number or None"),
        ({"reward_model": ["a", 3]}, "is not a text or a list, each a text"),
        ({"cuts": "stop_token"}, "cuts: 'stop_token' is not a list"),
        ({"pooling": "most"}, "pooling: 'most' is not one of mean, min, uncertainty"),
    ],
)
def test_bad_environment_keywords(save_lm, prompt_file, keywords, message):
    good = {
        "reference": save_lm(),
        "reward_model": "rlhf_gym.rewards.human:compound",
        "prompts": prompt_file,
        "max_prompt_tokens": 8,
        "max_new_tokens": 4,
        "split": "all",
    }
    text_env(**good)
    with pytest.raises(InputError, match=message):
        text_env(**{**good, **keywords})


@pytest.mark.parametrize(
    ("reward", "message"),
    [("nan_reward", "must be finite"), ("short_reward", "one number for each")],
)
def test_bad_rewards_are_named_when_they_are_paid(save_lm, prompt_file, reward, message):
    env = text_vector_env(
        reference=save_lm(),
        reward_model=f"{__name__}:{reward}",
        prompts=prompt_file,
        max_new_tokens=1,
        split="all",
        max_prompt_tokens=8,
        num_envs=2,
    )
    env.reset(seed=0)
    with pytest.raises(InputError, match=message) as raised:
        env.step(env.action_space.sample())
    assert reward in str(raised.value)


@pytest.mark.parametrize(
    ("value", "hint", "problem"),
    [
        (1, float, None),
        (np.float32(0.5), float, None),
        (np.int64(3), int, None),
        (True, float, "True is not a number"),
        (1, Literal[True], "1 is not one of True"),
        ([1, "a"], tuple[int, str], None),
        ([1, 2], tuple[int, ...], None),
        ([1], tuple[int, int], "[1] is not a list of 2"),
        ([1, "a"], tuple[int, ...], "[1, 'a'] is not a list, each a whole number"),
        ("b", Literal["a"] | None, "'b' is not one of a or None"),
        (None, Literal["a"] | None, None),
        ("runs", Path, None),
    ],
)
def test_values_are_held_against_hints(value, hint, problem):
    assert misfit(value, hint) == problem


def test_callables_are_named_by_module_and_function():
    assert load_callable("json:dumps") is json.dumps
    for name in ("json", "json:__doc__", "no.such.module:f"):
        with pytest.raises(InputError) as raised:
            load_callable(name)
        # A file that is there but not on the path is the usual case.
        assert ("PYTHONPATH=. python" in str(raised.value)) == (name == "no.such.module:f")


def test_a_reward_model_must_reach_as_far_as_the_episode(save_lm, save_reward_model, prompt_file):
    short = save_reward_model(max_position_embeddings=8)
    keywords = {"reference": save_lm(), "prompts": prompt_file, "max_prompt_tokens": 6}
    text_env(**keywords, reward_model=short, max_new_tokens=2)
    with pytest.raises(InputError, match="has a context of 8 tokens"):
        text_env(**keywords, reward_model=short, max_new_tokens=3)


@pytest.mark.parametrize(
    ("scorer", "message"), [(nan_reward, "must be finite"), (short_reward, "one number for each")]
)
def test_a_human_who_is_no_scorer_is_named(load_lm, scorer, message):
    lm = load_lm()
    prompts = prompt_dataset(lm)
    with pytest.raises(InputError, match=message):
        collect_comparisons(lm, prompts, scorer, 3, max_new_tokens=3)
