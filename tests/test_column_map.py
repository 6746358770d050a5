"""A map of columns reads any table as the comparisons it means, or says what it cannot know."""

import csv
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from test_preference_formats import TURNS, message, write_rows

from rlhf_gym.data.row_problems import RowReport
from rlhf_gym.errors import InputError
from rlhf_gym.preferences.column_map import ColumnMap
from rlhf_gym.preferences.comparison import Comparison
from rlhf_gym.preferences.formats import read_comparisons

AB = ("a", "b")
TIE = {"votes": (0, 0), "ties": 1}


def table(tmp_path: Path, *rows: dict[str, Any]) -> Path:
    path = tmp_path / "c.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


READ = [
    ("prompt=q chosen=x rejected=y", {"q": "p", "x": "a", "y": "b"}, Comparison("p", AB, best=0)),
    ("prompt=q chosen=x rejected=y system=s", {"q": "p", "x": "a", "y": "b", "s": "rhyme"},
     Comparison([message("system", "rhyme"), message("user", "p")], AB, best=0)),
    ("chosen=x rejected=y", {"x": [*TURNS, message("assistant", "a")],
                             "y": [*TURNS, message("assistant", "b")]},
     Comparison(TURNS, AB, best=0)),
    ("prompt=[task,more] chosen=x rejected=y", {"task": "do", "more": "this", "x": "a", "y": "b"},
     Comparison("do\n\nthis", AB, best=0)),
    ("prompt=q.text candidates=[x,y] scores=[m,n]",
     {"q": {"text": "p"}, "x": "a", "y": "b", "m": "1", "n": 2.5},
     Comparison("p", AB, scores=(1, 2.5))),
    ("prompt=q candidates=all scores=points", {"q": "p", "all": ["a", "b"], "points": "[1, 2]"},
     Comparison("p", AB, scores=(1, 2))),
    ("prompt=q candidates=answers.text rank=answers.rank",
     {"q": "p", "answers": [{"text": "a", "rank": 2}, {"text": "b", "rank": 1},
                            {"text": "c", "rank": 2}]},
     Comparison("p", ("a", "b", "c"), ranking=((1,), (0, 2)))),
    ("prompt=q candidates=[x,y,z] rank=[i,j,k]",
     {"q": "p", "x": "a", "y": "b", "z": "c", "i": 3, "j": None, "k": "1"},
     Comparison("p", ("a", "b", "c"), ranking=((2,), (0,)))),
    ("prompt=q candidates=[x,y] votes=[m,n]", {"q": "p", "x": "a", "y": "b", "m": 3, "n": 1},
     Comparison("p", AB, votes=(3, 1))),
    ("prompt=q candidates=all winner=w",
     {"q": "p", "all": [[*TURNS, message("assistant", t)] for t in "ab"], "w": "B"},
     Comparison(TURNS, AB, best=1)),
]  # fmt: skip


@pytest.mark.parametrize(("words", "row", "expected"), READ)
def test_a_map_reads_what_it_names(tmp_path, words, row, expected):
    file = write_rows(tmp_path, {**row, "unused": 1})
    report = RowReport()
    assert read_comparisons(file, columns=words.split(), report=report) == [expected]
    assert report.unused == ["unused"]
    again = ColumnMap.parse(words.split()).as_dict()
    assert json.loads(json.dumps(again)) == again
    assert read_comparisons(file, columns=again) == [expected]


@pytest.mark.parametrize(
    ("winners", "more", "expected"),
    [
        (["a", "B", "tie"], "", [0, 1, None]),
        (["model_a", "model_b", "Tie (bothbad)"], "", [0, 1, None]),
        (["x", "y"], "", [0, 1]),
        (["1", "2"], "", [0, 1]),
        ([0, 1], "", [0, 1]),
        ([1.0, 2.0], "", [0, 1]),
        (["response_1", "response_2", "tie"], "", [0, 1, None]),
        ([1, 1], "winner_first=0", [1, 1]),
        ([1, 1], "winner_first=1", [0, 0]),
        ([0, 1, 2], "winner_tie=0", [None, 0, 1]),
        ([0, 1, 2], "winner_tie=2", [0, 1, None]),
    ],
)
def test_a_winner_is_named_by_letter_column_or_number(tmp_path, winners, more, expected):
    rows = [{"q": str(i), "x": "a", "y": "b", "w": w} for i, w in enumerate(winners)]
    words = [*"prompt=q candidates=[x,y] winner=w".split(), *more.split()]
    wanted = [
        Comparison(str(i), AB, **(TIE if best is None else {"best": best}))
        for i, best in enumerate(expected)
    ]
    assert read_comparisons(write_rows(tmp_path, *rows), columns=words) == wanted
    assert read_comparisons(table(tmp_path, *rows), columns=words) == wanted


@pytest.mark.parametrize(
    ("columns", "winners", "more", "expected"),
    [
        (["answer_b", "answer_a"], ["a", "model_B", "tie"], "", [1, 0, None]),
        (["answerB", "answerA"], ["a", "B"], "", [1, 0]),
        (["answer_b", "answer_a"], ["answer_b", "answer_a"], "", [0, 1]),
        (["answer_b", "answer_a"], ["1", "2"], "", [0, 1]),
        (["response_2", "response_1"], [1, 2.0], "", [1, 0]),
        (["response2", "response1"], ["1", "1"], "", [1, 1]),
        (["text_0", "text_1"], ["1", "1"], "", [1, 1]),
        (["response_2", "response_1"], [0, 1], "", [0, 1]),
        (["response_2", "response_1"], [1, 2], "winner_first=1", [0, 1]),
        (["response_2", "response_1"], ["a", "b"], "", [0, 1]),
        (["answer_b", "answer_c"], ["a", "b"], "", [0, 1]),
        (["answer_b", "answer_c"], ["b", "c"], "", [0, 1]),
        (["b_text", "a_text"], ["a", "b"], "", [0, 1]),
    ],
)
def test_the_end_of_a_column_names_a_winner_before_the_order(
    tmp_path, columns, winners, more, expected
):
    first, second = columns
    rows = [{"q": str(i), first: "a", second: "b", "w": w} for i, w in enumerate(winners)]
    words = ["prompt=q", f"candidates=[{first},{second}]", "winner=w", *more.split()]
    wanted = [
        Comparison(str(i), AB, **(TIE if best is None else {"best": best}))
        for i, best in enumerate(expected)
    ]
    assert read_comparisons(write_rows(tmp_path, *rows), columns=words) == wanted


@pytest.mark.parametrize(
    ("winners", "problem"),
    [
        ([1, 1], "the winners 1 can be counted from 0 as well as from 1; add winner_first=0"),
        ([0, 1, 2], "the winners 0, 1, 2 can be counted neither from 0 nor from 1"),
        ([True, False], "winner is True, which names none of 2 candidates"),
        (["a", "c"], "line 2: winner is 'c', which names none of 2 candidates"),
        (["a", None], "line 2: the column 'w' has no value"),
    ],
)
def test_a_winner_that_is_not_clear_is_refused(tmp_path, winners, problem):
    rows = [{"q": str(i), "x": "a", "y": "b", "w": w} for i, w in enumerate(winners)]
    with pytest.raises(InputError) as raised:
        read_comparisons(
            write_rows(tmp_path, *rows), columns="prompt=q candidates=[x,y] winner=w".split()
        )
    assert problem in str(raised.value)
    assert "c.jsonl" in str(raised.value)


def test_rows_of_one_rated_answer_are_grouped(tmp_path):
    rows = [
        {"id": 1, "q": "p", "text": "a", "stars": "3"},
        {"id": 2, "q": "p", "text": "c", "stars": "1"},
        {"id": 1, "q": "p", "text": "b", "stars": "5"},
        {"id": 1, "q": "p", "text": "a", "stars": "4"},
        {"id": 2, "q": "p", "text": "d", "stars": "1"},
    ]
    file = table(tmp_path, *rows)
    words = "group_by=id prompt=q text=text score=stars".split()
    # Two people rated a, with 3 and 4.
    assert read_comparisons(file, columns=words) == [
        Comparison("p", AB, scores=(3.5, 5)),
        Comparison("p", ("c", "d"), scores=(1, 1)),
    ]
    ranked = read_comparisons(file, columns="group_by=q text=text rank=stars".split())
    assert ranked == [Comparison("p", ("a", "c", "b", "d"), ranking=((1, 3), (0,), (2,)))]
    judged = table(tmp_path, {"q": "p", "t": "a", "ok": False}, {"q": "p", "t": "b", "ok": True})
    liked = read_comparisons(judged, columns="group_by=q text=t score=ok".split())
    assert liked == [Comparison("p", AB, pairs=((1, 0),))]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("prompt", "takes ROLE=COLUMN words, such as prompt=question, not 'prompt'"),
        ("prampt=q chosen=x rejected=y", "there is no 'prampt'; did you mean prompt?"),
        ("prompt=q chosen=x", "needs, next to prompt, chosen and rejected; or candidates"),
        ("prompt=q candidates=[x,y]", "given are candidates, prompt"),
        ("prompt=q candidates=[x,y] scores=s winner=w", "given are candidates, prompt, scores"),
        ("prompt=q chosen=[x,y] rejected=z", "chosen is one column, not x, y"),
        ("prompt=q chosen=x chosen=y rejected=z", "chosen needs one column or a list, once"),
        ("prompt=q chosen=x rejected=", "rejected needs one column"),
        ("prompt=q candidates=[x,y] winner=w winner_first=2", "winner_first must be 0 or 1"),
        ("prompt=q chosen=x rejected=w", "has no column 'w'; it has q, x, y"),
        ("prompt=q candidates=[x,y] scores=q", "the column 'q' must be a list, not 'p'"),
        ("prompt=q candidates=[x,y] scores=[x,y]", "scores must be a finite number, not 'a'"),
    ],
)
def test_a_map_that_fits_nothing_is_refused(tmp_path, words, problem):
    file = write_rows(tmp_path, {"q": "p", "x": "a", "y": "b"})
    with pytest.raises(InputError) as raised:
        read_comparisons(file, columns=words.split())
    assert problem in str(raised.value)


def test_a_map_takes_the_place_of_a_format(tmp_path):
    file = write_rows(tmp_path, {"q": "p", "x": "a", "y": "b"})
    with pytest.raises(InputError, match="columns take the place of a format"):
        read_comparisons(file, format="pair", columns={"prompt": "q", "chosen": "x"})


def test_the_command_converts_with_a_map_and_says_what_it_did(tmp_path, capsys):
    from agents.cli.convert_preferences import Config, main

    rows = [
        {"q": "p", "x": "a", "y": "b", "z": "c", "s": [1, 2, 3], "id": 7},
        {"q": "r", "x": "a", "y": "", "z": "c", "s": [1, 2, 3], "id": 8},
        {"q": "", "x": "a", "y": "b", "z": "c", "s": [1, 2, 3], "id": 9},
    ]
    file = write_rows(tmp_path, *rows)
    config = Config(
        data=str(file),
        output=tmp_path / "o.jsonl",
        columns=("prompt=q", "candidates=[x,y,z]", "scores=s"),
        on_bad_row="skip",
    )
    counts = main(config)
    said = capsys.readouterr().out
    assert f"{file}: columns not used: id\n" in said
    assert f"repaired: {file}, line 2: candidate 1 is empty\n" in said
    assert "1 row left out: 1 × prompt must be a text or chat messages, not …\n" in said
    assert (counts["comparisons"], counts["skipped"]) == (2, 1)
    assert counts["rows"]["repaired"] == {"candidate … is empty": 1}
    assert [c.scores for c in read_comparisons(tmp_path / "o.jsonl")] == [(1, 2, 3), (1, 3)]


def test_the_next_steps_carry_the_map():
    from agents.cli.train_reward_model import Config, next_steps
    from agents.runs.setup import parse_values

    words = ("prompt=q", "candidates=[x,y]", "winner=w", "winner_first=1")
    said = next_steps(Config(data="d.csv", backbone="m", columns=words))
    assert "--columns prompt=q 'candidates=[x,y]' winner=w winner_first=1" in said
    keywords = said.splitlines()[-1].split("--env-kwargs ")[1]
    given = iter(shlex.split(keywords))
    found = parse_values(dict(zip(given, given, strict=True)))["prompt_columns"]
    assert ColumnMap.parse(found) == ColumnMap.parse(words), "--env-kwargs reads it back"
    assert (
        'prompt_columns \'{"prompt": "q", "candidates": ["x", "y"], "winner": "w", '
        '"winner_first": "1"}\''
    ) in said


def test_an_environment_takes_its_prompts_from_a_mapped_file(tmp_path, save_lm, save_reward_model):
    import gymnasium as gym

    rows = [{"q": letter, "x": "a", "y": "b"} for letter in "abcdefgh"]
    env = gym.make_vec(
        "rlhf_gym/Text-v0",
        num_envs=1,
        device="cpu",
        reference=save_lm("llama"),
        reward_model=save_reward_model(),
        prompts=str(write_rows(tmp_path, *rows)),
        prompt_columns={"prompt": "q", "chosen": "x", "rejected": "y"},
        max_prompt_tokens=4,
        max_new_tokens=2,
        split="all",
    )
    assert len(env.prompts) == 8
