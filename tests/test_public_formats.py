"""Each public format becomes the right comparison, and what fits none is told what it lacks."""

import json
from pathlib import Path
from typing import Any

import pytest
from test_preference_formats import DIALOGUE, SAMPLES, TURNS, message, write_rows

from rlhf_gym.data.row_problems import RowReport
from rlhf_gym.errors import InputError
from rlhf_gym.preferences.comparison import Comparison
from rlhf_gym.preferences.formats import read_comparisons
from rlhf_gym.preferences.known_formats import FORMATS

ASKED = [message("user", "q")]
DO_THIS = [message("user", "do\n\nthis")]
BRIEF = message("system", "be brief")
AB = ("a", "b")
TIE = {"votes": (0, 0), "ties": 1}


def says(who: str, text: str) -> dict[str, str]:
    return {"from": who, "value": text}


def arena_row(winner: str, a: list[Any], b: list[Any], **more: Any) -> dict[str, Any]:
    return {"conversation_a": a, "conversation_b": b, "winner": winner, **more}


PUBLIC = [
    ("pair", {"prompt": "q", "chosen": "a", "rejected": "b", "system": "be brief"},
     [Comparison([BRIEF, *ASKED], AB, best=0)]),
    ("pair", {"prompt": "q", "chosen": "a", "rejected": "b", "history": [["hi", "yes?"]]},
     [Comparison([*TURNS[:2], *ASKED], AB, best=0)]),
    ("pair", {"prompt": "q", "chosen": "a", "rejected": "b", "system": None},
     [Comparison("q", AB, best=0)]),
    ("orca", {"system": "be brief", "question": "q", "chosen": "a", "rejected": "b"},
     [Comparison([BRIEF, *ASKED], AB, best=0)]),
    ("orca", {"system": "", "question": "q", "chosen": "a", "rejected": "b"},
     [Comparison(ASKED, AB, best=0)]),
    ("alpaca_dpo", {"instruction": "do", "input": "this", "chosen": "a", "rejected": "b",
                    "history": [["hi", "yes?"]], "system": "be brief"},
     [Comparison([BRIEF, *TURNS[:2], *DO_THIS], AB, best=0)]),
    ("sharegpt", {"conversations": [says("human", "hi"), says("gpt", "yes?"), says("human", "why")],
                  "chosen": says("gpt", "a"), "rejected": says("gpt", "b")},
     [Comparison(TURNS, AB, best=0)]),
    ("sharegpt", {"conversations": [says("human", "q")], "chosen": "a", "rejected": "b",
                  "system": "be brief"},
     [Comparison([BRIEF, *ASKED], AB, best=0)]),
    ("alpaca", {"instruction": "do", "input": "this", "output_1": "a", "output_2": "b",
                "preference": 2}, [Comparison(DO_THIS, AB, best=1)]),
    ("alpaca", {"instruction": "q", "input": "", "output_1": "a", "output_2": "b",
                "preference": "1.0"}, [Comparison(ASKED, AB, best=0)]),
    ("alpaca", {"instruction": "q", "output_1": "a", "output_2": "b", "preference": 1.5},
     [Comparison(ASKED, AB, **TIE)]),
    ("arena", arena_row("model_b", [*ASKED, message("assistant", "a")],
                        [*ASKED, message("assistant", "b")], turn=1),
     [Comparison(ASKED, AB, best=1)]),
    ("arena", arena_row("tie (bothbad)", [*TURNS, message("assistant", "a")],
                        [*TURNS, message("assistant", "b")]),
     [Comparison(TURNS, AB, **TIE)]),
    # MT-Bench writes down the second turn of a conversation of which the first was judged.
    ("arena", arena_row("model_a", [*ASKED, message("assistant", "a"), *TURNS[:2]],
                        [*ASKED, message("assistant", "b"), *TURNS[:2]], turn=1),
     [Comparison(ASKED, AB, best=0)]),
    ("arena_lists", {"prompt": '["q"]', "response_a": '["a"]', "response_b": '["b"]',
                     "winner_model_a": "0", "winner_model_b": "1", "winner_tie": "0"},
     [Comparison(ASKED, AB, best=1)]),
    ("arena_lists", {"prompt": '["hi", "why"]', "response_a": '["yes?", "a"]',
                     "response_b": '["yes?", "b"]',
                     "winner_model_a": 0, "winner_model_b": 0, "winner_tie": 1},
     [Comparison(TURNS, AB, **TIE)]),
    ("shp", {"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 1, "score_A": 3},
     [Comparison(ASKED, AB, best=0)]),
    ("shp", {"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 0},
     [Comparison(ASKED, AB, best=1)]),
    ("helpsteer2_preference", {"prompt": "q", "response_1": "a", "response_2": "b",
                               "preference_strength": -2},
     [Comparison(ASKED, AB, scores=(2, 0))]),
    ("helpsteer3", {"context": TURNS, "response1": "a", "response2": "b", "overall_preference": 3},
     [Comparison(TURNS, AB, scores=(0, 3))]),
    ("helpsteer3", {"context": TURNS, "response1": "a", "response2": "b", "overall_preference": 0},
     [Comparison(TURNS, AB, scores=(0, 0))]),
    ("webgpt", {"question": {"dataset": "eli5", "id": "1", "full_text": "q"},
                "quotes_0": {"title": [], "extract": []}, "answer_0": "a", "score_0": -0.5,
                "answer_1": "b", "score_1": 0.5},
     [Comparison(ASKED, AB, scores=(-0.5, 0.5))]),
    ("summaries", {"info": {"id": "1", "subreddit": "tifu", "title": "t", "post": "p",
                            "article": None},
                   "summaries": [{"text": " a", "policy": "x"}, {"text": " b", "policy": "y"}],
                   "choice": 1, "worker": "w"},
     [Comparison("SUBREDDIT: r/tifu\n\nTITLE: t\n\nPOST: p\n\nTL;DR:", (" a", " b"), best=1)]),
    ("summaries", {"info": {"site": "cnn", "article": "news", "post": None},
                   "summaries": [{"text": "a"}, {"text": "b"}], "choice": 0},
     [Comparison("Article:\n\nnews\n\nTL;DR:", AB, best=0)]),
    ("nectar", {"prompt": "\n\nHuman: q\n\nAssistant: ", "turns": 1,
                "answers": [{"answer": text, "rank": rank, "model": "m"}
                            for text, rank in zip("abcdefg", (3, 1, 2, 7, 5, 5, 4), strict=True)]},
     [Comparison("\n\nHuman: q\n\nAssistant: ", tuple("abcdefg"),
                 ranking=((1,), (2,), (0,), (6,), (4, 5), (3,)))]),
    ("distilabel", {"instruction": "q", "generations": ["a", "b"], "ratings": [4, 5]},
     [Comparison(ASKED, AB, scores=(4, 5))]),
    ("distilabel", {"system": "be brief", "input": "q", "generations": ["a", "b"],
                    "rating": ["9", "7.5"], "chosen": "a", "rejected": "b"},
     [Comparison([BRIEF, *ASKED], AB, scores=(9, 7.5))]),
    ("e2e", {"mr": "name[x]", "ref1": "a", "ref2": "b", "ref3": "c", "quality1": "50",
             "quality2": "100", "quality3": "50", "natur1": "1", "sys1": "s"},
     [Comparison("name[x]", ("a", "b", "c"), scores=(50, 100, 50))]),
]  # fmt: skip

GROUPED = [
    ("helpsteer",
     [{"prompt": "q", "response": "a", "helpfulness": 3, "verbosity": 4},
      {"prompt": "r", "response": "x", "helpfulness": 0},
      {"prompt": "q", "response": "b", "helpfulness": 1},
      {"prompt": "r", "response": "y", "helpfulness": 0}],
     [Comparison(ASKED, AB, scores=(3, 1)),
      Comparison([message("user", "r")], ("x", "y"), scores=(0, 0))]),
    ("kto",
     [{"prompt": "q", "completion": "a", "label": True},
      {"prompt": "q", "completion": "b", "label": False},
      {"prompt": "q", "completion": "c", "label": False}],
     [Comparison("q", ("a", "b", "c"), pairs=((0, 1), (0, 2)))]),
    ("kto",
     [{"prompt": ASKED, "completion": [message("assistant", "a")], "label": False},
      {"prompt": ASKED, "completion": [message("assistant", "b")], "label": True}],
     [Comparison(ASKED, AB, pairs=((1, 0),))]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "expected"), PUBLIC)
def test_each_public_format_is_recognised_and_read(tmp_path, name, row, expected):
    file = write_rows(tmp_path, row)
    assert read_comparisons(file) == expected
    assert read_comparisons(file, format=name) == expected


@pytest.mark.parametrize(("name", "rows", "expected"), GROUPED)
def test_rows_of_one_answer_are_grouped_by_their_prompt(tmp_path, name, rows, expected):
    file = write_rows(tmp_path, *rows)
    assert read_comparisons(file) == expected
    assert read_comparisons(file, format=name) == expected


def test_every_format_has_a_sample():
    named = {sample.values[0] for sample in SAMPLES} | {name for name, *_ in [*PUBLIC, *GROUPED]}
    assert named == FORMATS.keys()


def refused(tmp_path: Path, *rows: Any, **options: Any) -> str:
    with pytest.raises(InputError) as raised:
        read_comparisons(write_rows(tmp_path, *rows), **options)
    return str(raised.value)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"chosen": "x", "rejected": "y"},
         "turn to split at) and pair (it lacks prompt); name the columns with --columns"),
        ({"question": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 1},
         "human_ref_A, human_ref_B, labels; the nearest are shp (it lacks history)"),
        ({"instruction": "q", "generations": ["a", "b"]},
         "distilabel (it lacks ratings or rating)"),
        ({"a": 1}, "it has a; name the columns with --columns, as in --columns prompt=question"),
        ({"prompt": "q", "question": "q", "chosen": "a", "rejected": "b"},
         "the row fits the formats pair, orca; name one with --format"),
        ({"prompt": "q", "answers": ["a", "b"]}, "nectar (answers must each have answer and rank)"),
        ({**arena_row("tie", ASKED, ASKED), "winner": "nobody"}, "winner must be model_a, model_b"),
        (arena_row("tie", [*ASKED, message("assistant", "x"), *ASKED, message("assistant", "a")],
                   [*ASKED, message("assistant", "y"), *ASKED, message("assistant", "b")]),
         "the conversations must differ in one last message"),
        ({"chosen": TURNS, "rejected": [*TURNS[:2], message("user", "x")]},
         "must differ in one last message, the assistant's"),
        ({"conversations": [says("narrator", "q")], "chosen": "a", "rejected": "b"},
         "a message is from 'narrator'"),
        ({"prompt": [BRIEF, *ASKED], "chosen": "a", "rejected": "b", "system": "rhyme"},
         "the prompt has a system message, and the column system another one"),
        ({"prompt": "q", "completion": "a", "label": True}, "only one rated answer"),
        ({"prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": 4},
         "preference_strength must be between -3 and 3"),
    ],
)  # fmt: skip
def test_what_fits_no_format_is_told_what_it_lacks(tmp_path, row, problem):
    said = refused(tmp_path, row)
    assert problem in said
    assert "--on-bad-row" not in said, "no row would be left"
    said = refused(tmp_path, row, {**ABC, "best": 0})
    assert said.endswith("--on-bad-row skip (in Python: skipped=[]) leaves such rows out")


def test_completions_with_one_label_are_left_out_and_counted(tmp_path):
    rows = [{"prompt": p, "completion": c, "label": p == "q"} for p in "qr" for c in "ab"]
    rows += [{"prompt": "s", "completion": c, "label": c == "a"} for c in "ab"]
    report = RowReport()
    found = read_comparisons(write_rows(tmp_path, *rows), skipped=report.skipped, report=report)
    assert found == [Comparison("s", AB, pairs=((0, 1),))]
    assert (
        "line 1 and 1 more rows: the answers of its prompt have only one label"
        in (report.skipped[0])
    )
    assert list(report.figures()["left_out"].values()) == [2]


def test_columns_that_are_not_used_are_listed(tmp_path):
    rows = [
        {"prompt": "q", "chosen": "a", "rejected": "b", "tools": "[]", "score_chosen": 1},
        {"question": "q", "chosen": "a", "rejected": "b", "system": "x", "nothing": None},
    ]
    report = RowReport()
    read_comparisons(write_rows(tmp_path, *rows), report=report)
    assert report.unused == ["tools", "score_chosen"]


def test_the_first_five_problems_and_the_number_of_all_are_told(tmp_path):
    good = {"prompt": "q", "candidates": ["a", "b"], "best": 0}
    bad = [{**good, "best": 2 + i} for i in range(7)]
    said = refused(tmp_path, good, *bad)
    assert said.startswith("7 rows cannot be used, the first 5 are:\n")
    assert said.count("c.jsonl, line ") == 5
    assert "line 6: best is 6" in said
    said = refused(tmp_path, good, {"a": 1}, {"a": 2})
    assert "line 2: the row has no known format: it has a; name" in said
    assert "c.jsonl, line 3: the same\n" in said
    report = RowReport()
    empty = [{**good, "candidates": ["a", ""]}, {**good, "candidates": ["", "b"]}]
    read_comparisons(
        write_rows(tmp_path, good, *bad[:3], *empty), skipped=report.skipped, report=report
    )
    assert report.lines() == [
        "5 rows left out: 3 × best is …, but must be … to …, 2 × candidate … is empty"
    ]
    (tmp_path / "broken.jsonl").write_text("{\n[\n" + json.dumps({**good, "best": 3}))
    with pytest.raises(InputError, match=r"3 rows cannot be used:\n.*line 1: not valid JSON"):
        read_comparisons(tmp_path / "broken.jsonl")
    (tmp_path / "broken.jsonl").write_text("{")
    with pytest.raises(InputError, match="line 1: not valid JSON"):
        read_comparisons(tmp_path / "broken.jsonl")


ABC = {"prompt": "q", "candidates": ["a", "b", "c"]}


@pytest.mark.parametrize(
    ("row", "strict", "expected"),
    [
        ({**ABC, "candidates": ["a", "", "c"], "best": 2}, "candidate 1 is empty",
         Comparison("q", ("a", "c"), best=1)),
        ({**ABC, "candidates": ["a", None, "c"], "best": 2}, "candidate 1 is not a text, but null",
         Comparison("q", ("a", "c"), best=1)),
        ({**ABC, "candidates": ["a\ud83d", "b", "c"], "best": 2}, "half a character",
         Comparison("q", ("b", "c"), best=1)),
        ({**ABC, "candidates": ["a", "", "c"], "best": 1}, "candidate 1 is empty", None),
        ({**ABC, "candidates": ["a", "", "c"], "scores": [3, 9, 1]}, "candidate 1 is empty",
         Comparison("q", ("a", "c"), scores=(3, 1))),
        ({**ABC, "scores": [3, None, 1]}, "3 finite numbers",
         Comparison("q", ("a", "c"), scores=(3, 1))),
        ({**ABC, "scores": [3, float("nan"), 1]}, "3 finite numbers",
         Comparison("q", ("a", "c"), scores=(3, 1))),
        ({**ABC, "scores": [10**400, 2, 1]}, "3 finite numbers",
         Comparison("q", ("b", "c"), scores=(2, 1))),
        ({**ABC, "candidates": ["a", " ", "c"], "votes": [1, 2, 0], "ties": 1}, "is empty",
         Comparison("q", ("a", "c"), votes=(1, 0), ties=1)),
        ({**ABC, "candidates": ["a", " ", "c"], "votes": [1, 2, 0], "ties": None}, "is empty",
         Comparison("q", ("a", "c"), votes=(1, 0))),
        ({**ABC, "candidates": ["a", " ", "c"], "votes": [1.0, 2.0, 0.0], "ties": 1.0}, "is empty",
         Comparison("q", ("a", "c"), votes=(1, 0), ties=1)),
        ({**ABC, "candidates": ["a", " ", "c"], "votes": [0, 2, 0]}, "is empty", None),
        ({**ABC, "candidates": ["a", " ", "c"], "ranking": [[1], [2], [0]]}, "is empty",
         Comparison("q", ("a", "c"), ranking=((1,), (0,)))),
        ({**ABC, "candidates": ["a", " ", "c"], "ranking": [[1], [2]]}, "is empty", None),
        ({**ABC, "candidates": ["a", " ", "c"], "pairs": [[1, 0], [2, 0]]}, "is empty",
         Comparison("q", ("a", "c"), pairs=((1, 0),))),
        # Equal texts with equal labels are one candidate.
        ({**ABC, "candidates": ["a", "b", "a"], "best": 2}, "are the same text",
         Comparison("q", ("a", "b"), best=0)),
        ({**ABC, "candidates": ["a", "b", "a"], "votes": [1, 1, 2]}, "are the same text",
         Comparison("q", ("a", "b"), votes=(3, 1))),
        ({**ABC, "candidates": ["a", "b", "a"], "scores": [1, 2, 1]}, "are the same text",
         Comparison("q", ("a", "b"), scores=(1, 2))),
        ({**ABC, "candidates": ["a", "b", "a"], "ranking": [[2], [1]]}, "are the same text",
         Comparison("q", ("a", "b"), ranking=((0,), (1,)))),
        # Equal texts with different labels say nothing about this text.
        ({**ABC, "candidates": ["a", "b", "a"], "scores": [1, 2, 3]}, "are the same text", None),
        ({"prompt": "q", "candidates": ["a", "b", "a", "c"], "scores": [1, 2, 3, 4]},
         "are the same text", Comparison("q", ("b", "c"), scores=(2, 4))),
        ({"prompt": "q", "candidates": ["a", "b", "a", "c"], "pairs": [[0, 2], [3, 1]]},
         "are the same text", Comparison("q", ("b", "c"), pairs=((1, 0),))),
        ({"prompt": "q", "candidates": ["a", "a"], "best": 0}, "are the same text", None),
    ],
)  # fmt: skip
def test_a_bad_candidate_costs_the_candidate_and_not_the_list(tmp_path, row, strict, expected):
    good = {**ABC, "best": 0}
    assert strict in refused(tmp_path, row)
    report = RowReport()
    found = read_comparisons(write_rows(tmp_path, good, row), skipped=report.skipped, report=report)
    assert found[1:] == ([] if expected is None else [expected])
    assert (len(report.skipped), len(report.repaired)) == ((1, 0) if expected is None else (0, 1))


def test_null_columns_do_not_move_the_answers(tmp_path):
    row = {"query": "p", "sample0": "a", "sample1": None, "sample2": "c", "best": 2}
    assert "candidate 1 is not a text" in refused(tmp_path, row)
    skipped: list[str] = []
    found = read_comparisons(write_rows(tmp_path, row), skipped=skipped)
    assert found == [Comparison("p", ("a", "c"), best=1)]


def test_hh_needs_a_shared_turn_and_a_prompt_makes_a_pair(tmp_path):
    dialogues = {"chosen": DIALOGUE + " a", "rejected": DIALOGUE + " b"}
    assert read_comparisons(write_rows(tmp_path, dialogues))[0].prompt == DIALOGUE
    file = write_rows(tmp_path, {"prompt": "p", **dialogues})
    assert read_comparisons(file)[0].prompt == "p"
