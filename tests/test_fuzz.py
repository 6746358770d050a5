"""Whatever is thrown at an environment: a documented error or a step, and it stays usable.

And whatever rows a file has: each reader reads them, or refuses them by name.
"""

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_data_page import BYTES, EOS

from rlhf_gym.data.bad_rows import BadRows
from rlhf_gym.data.prompt_rows import load_texts
from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.errors import InputError
from rlhf_gym.preferences.comparison import Comparison
from rlhf_gym.preferences.formats import read_comparisons
from rlhf_gym.preferences.known_formats import FORMATS
from rlhf_gym.training.sft_data import load_examples

DOCUMENTED = (InputError, gym.error.ResetNeeded)
LOCAL = ("rlhf_gym/Exact-v0", "rlhf_gym/Reviews-v0")
ROWS, OPERATIONS = 3, 25

anything = st.one_of(
    st.none(),
    st.integers(-5, 700),
    st.floats(),
    st.text(max_size=5),
    st.booleans(),
    st.lists(st.integers(-2, 700), max_size=4),
)
prompts = st.one_of(
    st.sampled_from(["a", "i saw this film", "", "a b c d e f g h i j k l m n", "☃"]),
    st.lists(st.sampled_from(["a", "h", ""]), max_size=4),
    st.just([{"role": "user", "content": "a"}]),
    anything,
)
options = st.one_of(
    st.none(),
    st.fixed_dictionaries(
        {},
        optional={
            "prompt": prompts,
            "prompt_index": st.one_of(st.integers(-2, 2000), anything),
            "reset_mask": st.one_of(
                st.lists(st.booleans(), min_size=ROWS, max_size=ROWS), anything
            ),
            "surprise": anything,
        },
    ),
)
good = st.lists(st.integers(0, 8), min_size=ROWS, max_size=ROWS).map(np.array)
actions = st.one_of(
    good,
    good,
    st.lists(st.integers(-3, 600), min_size=ROWS, max_size=ROWS).map(np.array),
    st.lists(st.floats(0, 8), min_size=ROWS, max_size=ROWS).map(np.array),
    st.lists(st.integers(0, 8), max_size=5).map(lambda x: np.array(x, dtype=np.int64)),
    anything,
)
waves = st.lists(
    st.lists(st.integers(-1, 9), min_size=1, max_size=5), min_size=ROWS, max_size=ROWS
).map(lambda rows: np.array([(row + [-1] * 5)[:4] for row in rows]))
operations = st.one_of(
    st.tuples(st.just("step"), actions),
    st.tuples(st.just("step"), actions),
    st.tuples(st.just("reset"), options),
    st.tuples(st.just("seed"), st.one_of(st.integers(0, 9), st.just([1, None, 3]), anything)),
    st.tuples(st.just("play"), st.one_of(waves, actions)),
)


def attempt(env: TokenVectorEnv, kind: str, value: Any) -> None:
    try:
        if kind == "step":
            env.step(value)
        elif kind == "reset":
            env.reset(options=value)
        elif kind == "seed":
            env.reset(seed=value)
        else:
            env.play(value)
    except DOCUMENTED:
        pass


def is_usable(env: TokenVectorEnv) -> None:
    observations, _ = env.reset(seed=1)
    assert observations in env.observation_space
    eos = env.objective.reference.eos_ids[0]
    _, rewards, ended, truncated, _ = env.step(np.full(ROWS, eos))
    assert ended.all()
    assert not truncated.any()
    assert np.isfinite(rewards).all()


def fuzz(name: str, examples: int) -> int:
    envs = {
        mode: gym.make_vec(name, num_envs=ROWS, device="cpu", autoreset_mode=mode)
        for mode in ("SameStep", "NextStep", "Disabled")
    }
    tried = 0

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],  # shrinking would take minutes
        suppress_health_check=list(HealthCheck),
    )
    @given(
        st.sampled_from(sorted(envs)),
        st.lists(operations, min_size=OPERATIONS, max_size=OPERATIONS),
    )
    def throw(mode: str, script: list[tuple[str, Any]]) -> None:
        nonlocal tried
        for kind, value in script:
            attempt(envs[mode], kind, value)
            tried += 1
        is_usable(envs[mode])

    throw()
    return tried


@pytest.mark.parametrize("name", LOCAL)
def test_a_thousand_things_thrown_at_it(name):
    assert fuzz(name, 40) >= 1000


@pytest.mark.slow
@pytest.mark.parametrize("name", LOCAL)
def test_fifty_thousand_things_thrown_at_the_two(name):
    assert fuzz(name, 1000) >= 25_000


# Rows of comparisons: whatever is in the columns of a format, a comparison or an InputError.

cells = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 4),
        st.floats(),
        st.text(max_size=4),
        st.sampled_from(
            ["a", "b", "tie", "model_a", "1", '["a"]', "[", "\n\nAssistant: x", "\ud83d"]
        ),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(
                "role content from value text answer rank post full_text response overall_score "
                "replies".split()
            ),
            inner,
            max_size=3,
        ),
        st.just([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]),
    ),
    max_leaves=6,
)
further = st.sampled_from("prompt system history input turn ties ids best votes extra ref2".split())
MAPS = (
    "prompt=a chosen=b rejected=c",
    "chosen=b rejected=c system=d history=e",
    "prompt=a candidates=[b,c] winner=d",
    "prompt=a candidates=b scores=c",
    "prompt=a candidates=b.text rank=b.rank",
    "group_by=a text=b score=c",
    "group_by=[a,b] prompt=d text=b rank=c",
)


@settings(max_examples=600, deadline=None, database=None, derandomize=True)
@given(st.sampled_from(sorted(FORMATS)), st.booleans(), st.booleans(), st.data())
def test_any_cells_of_a_format_are_comparisons_or_bad_input(name, named, skip, data):
    keys = [key.split("|")[0] for key in sorted(FORMATS[name].keys)]
    rows = data.draw(
        st.lists(
            st.tuples(st.fixed_dictionaries(dict.fromkeys(keys, cells)),
                      st.dictionaries(further, cells, max_size=2)).map(lambda x: x[0] | x[1]),
            min_size=1, max_size=3,
        )
    )  # fmt: skip
    read_rows(rows, skip, format=name if named else None)


@settings(max_examples=400, deadline=None, database=None, derandomize=True)
@given(st.sampled_from(MAPS), st.booleans(), st.data())
def test_any_cells_under_a_map_are_comparisons_or_bad_input(words, skip, data):
    rows = data.draw(
        st.lists(st.fixed_dictionaries(dict.fromkeys("abcde", cells)), min_size=1, max_size=3)
    )
    read_rows(rows, skip, columns=words.split())


def read_rows(rows: list[Any], skip: bool, **options: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "rlhf_gym.preferences.formats.load_rows",
            lambda source, **_: [(f"{source}, row {i}", row) for i, row in enumerate(rows, 1)],
        )
        try:
            found = read_comparisons("c.json", skipped=[] if skip else None, **options)
        except InputError as error:
            assert "c.json" in str(error)
            return
    for comparison in found:
        assert isinstance(comparison, Comparison)
        comparison.choices()
        assert len(json.dumps(comparison.row())) > 0


USER, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
SHAREGPT = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]
ASKED = "\n\nHuman: Why?\n\nAssistant:"
TREE = {"role": "assistant", "text": "So.", "replies": [], "rank": 0}
GOOD_ROWS: list[Any] = [
    "Why?",
    [USER, ANSWER],
    {"prompt": "Why?", "response": "Because.", "system": "Be brief."},
    {"prompt": [USER], "completion": [ANSWER], "tools": []},
    {"messages": [{"role": "system", "content": "Be brief."}, USER, ANSWER]},
    {"conversations": SHAREGPT},
    {"instruction": "Add.", "input": "1 and 1", "output": "2"},
    {"question": "Why?", "answer": "Because.", "query": 3},
    {"text": "Once upon a time"},
    {"prompt": "Why?", "candidates": ["Because.", "No.", "So."], "ranking": [[1], [0, 2]]},
    {"prompt": "Why?", "candidates": ["Because.", "No."], "votes": [3, 1], "ties": 1},
    {"prompt": "Why?", "candidates": ["Because.", "No."], "pairs": [[0, 1]]},
    {"prompt": "Why?", "candidates": ["Because.", "No."], "scores": [0.5, 1.5]},
    {"prompt": [USER], "chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "No."}]},
    {
        "chosen": "\n\nHuman: Why?\n\nAssistant: So.",
        "rejected": "\n\nHuman: Why?\n\nAssistant: No.",
    },
    {
        "message_tree_id": "1",
        "prompt": {"role": "prompter", "text": "Why?", "replies": [TREE, {**TREE, "rank": 1}]},
    },
    {"question": "Why?", "prediction 1": "a", "prediction 2": "b", "preference": [1]},
    {"instruction": "Add.", "response1": "2", "response2": "3", "annotator1": 1},
    {"query": "Why?", "sample0": "a", "sample1": "b", "best": 1},
    {
        "instruction": "Add.",
        "completions": [
            {"response": "2", "overall_score": 5},
            {"response": "3", "overall_score": 1},
        ],
    },
    {"input": "Why?", "output_1": "a", "output_2": "b", "label": 2},
]
JUNK: list[Any] = [
    *(None, True, False, 0, -1, 3, 10**30, 0.5, float("nan"), float("inf"), 1e300),
    *("", " ", "x", "\ud800", "\x00", "{{ 1 / 0 }}", "[]", '[{"role": 1}]', "user", "</s>"),
    *([], [[]], [None], ["x"], [0, 0], {}, {"role": "user"}, {"": None}, [[[[[[]]]]]]),
    *([USER, USER], SHAREGPT, [{**USER, "content": None}], {"role": "x", "content": "y"}),
]
KEYS = sorted({key for row in GOOD_ROWS if isinstance(row, dict) for key in row})


def mutated(row: Any, chance: random.Random) -> Any:
    """A row with one change, anywhere inside it."""
    if chance.random() < 0.15 or not isinstance(row, dict | list) or not row:
        return copy.deepcopy(chance.choice(JUNK))
    row = copy.copy(row)
    keys = list(row) if isinstance(row, dict) else range(len(row))
    key, kind = chance.choice(keys), chance.random()
    if kind < 0.15:
        del row[key]
    elif kind < 0.3 and isinstance(row, dict):
        row[chance.choice(KEYS)] = row.pop(key)
    elif kind < 0.4 and isinstance(row, dict):
        row[chance.choice(KEYS)] = copy.deepcopy(chance.choice(JUNK))
    elif kind < 0.5 and isinstance(row, list):
        row.append(copy.deepcopy(chance.choice([*JUNK, row[key]])))
    else:
        row[key] = mutated(row[key], chance)
    return row


def mutated_line(chance: random.Random) -> bytes:
    """A line of a JSON Lines file with one to three changes; now and then its bytes change too."""
    row = chance.choice(GOOD_ROWS)
    for _ in range(chance.randint(1, 3)):
        row = mutated(row, chance)
    line = bytearray(json.dumps(row, ensure_ascii=chance.random() < 0.5).encode(errors="replace"))
    if chance.random() < 0.1:
        for _ in range(chance.randint(1, 3)):
            line[chance.randrange(len(line))] = chance.randrange(256)
    return bytes(line)


READERS: dict[str, Callable[[str], int]] = {
    "prompts": lambda file: len(load_texts(file, bad_rows=BadRows())),
    "examples": lambda file: len(load_examples(file, BYTES, EOS, bad_rows=BadRows())),
    "comparisons": lambda file: len(read_comparisons(file, skipped=[])),
}


def fuzz_rows(reader: str, rows: int, folder: Path, *, rows_per_file: int = 5000) -> int:
    """Read mutated rows in files of JSON Lines; returns how many could be used."""
    chance, used = random.Random(reader), 0
    for at in range(0, rows, rows_per_file):
        file = folder / f"{at}.jsonl"
        lines = [mutated_line(chance) for _ in range(min(rows_per_file, rows - at))]
        file.write_bytes(b"\n".join(lines))
        used += READERS[reader](str(file))
        file.unlink()
    return used


@pytest.mark.parametrize("reader", READERS)
def test_two_thousand_rows_thrown_at_a_reader(reader, tmp_path):
    assert 50 < fuzz_rows(reader, 2000, tmp_path) < 1900


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_a_hundred_thousand_rows_thrown_at_a_reader(reader, tmp_path):
    assert 2500 < fuzz_rows(reader, 100_000, tmp_path) < 95_000


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("ending", [".csv", ".tsv", ".txt", ".json"])
def test_broken_files_are_read_or_refused(reader, ending, tmp_path):
    whole = {
        ".csv": b'prompt,response\n"Why, then?",Because.\nHow?,So.\n',
        ".tsv": b"prompt\tchosen\trejected\nWhy?\tBecause.\tNo.\n",
        ".txt": "Why?\nHow so? \u2603\n".encode(),
        ".json": b'[{"prompt": "Why?", "candidates": ["a", "b"], "best": 0}]',
    }[ending]
    chance, file = random.Random(ending + reader), tmp_path / f"a{ending}"
    for _ in range(100):
        broken = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(broken))
            broken[at : at + chance.randint(0, 2)] = chance.choice(
                [b'"', b",", b"\t", b"\n", b"\r", b"\x00", b"\xff", b"[", b"}", b"", b"x"]
            )
        file.write_bytes(broken)
        try:
            READERS[reader](str(file))
        except InputError as error:
            assert str(file) in str(error)
