"""Every format becomes the same comparisons, and no bad row passes unnamed."""

import gzip
import json
import math
import os
import subprocess
import sys
import zlib
from collections import Counter
from datetime import datetime
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_tokenizer

from rlhf_gym.data.row_problems import SKIP_HINT
from rlhf_gym.errors import InputError
from rlhf_gym.preferences.comparison import LABELS, Comparison, write_comparisons
from rlhf_gym.preferences.comparison_rows import comparison_of
from rlhf_gym.preferences.formats import read_comparisons
from rlhf_gym.preferences.survey import has_tie, is_intransitive, survey
from rlhf_gym.utils.statistics import measured

SCRIPTS = Path(__file__).parents[1] / "scripts"
REAL_DATA = Path(__file__).parents[2] / "shared" / "data"


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def write_rows(tmp_path: Path, *rows: Any, name: str = "c.jsonl") -> Path:
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


DIALOGUE = "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: why\n\nAssistant:"
TURNS = [message("user", "hi"), message("assistant", "yes?"), message("user", "why")]

TREE = {
    "message_tree_id": "t",
    "tree_state": "ready_for_export",
    "prompt": {
        "role": "prompter",
        "text": "q",
        "replies": [
            {
                "role": "assistant",
                "text": "a",
                "rank": 1,
                "replies": [
                    {
                        "role": "prompter",
                        "text": "more",
                        "rank": 0,
                        "replies": [
                            {"role": "assistant", "text": "e", "rank": 0, "replies": []},
                            {"role": "assistant", "text": "f", "rank": 1, "replies": []},
                        ],
                    },
                    {"role": "prompter", "text": "less", "rank": 1, "replies": []},
                ],
            },
            {"role": "assistant", "text": "b", "rank": 0, "replies": []},
            {"role": "assistant", "text": "c", "rank": 1, "replies": []},
            {"role": "assistant", "text": "unranked", "rank": None, "replies": []},
        ],
    },
}


def qa_row(codes: list[int], k: int) -> dict[str, Any]:
    return {
        "question": "who?",
        "passages": [["Title", "one.", "two."], ["Other", "three."]],
        "gold": "x",
        **{f"prediction {i}": f"answer {i}" for i in range(1, k + 1)},
        "preference": codes,
    }


def qa_comparison(k: int, **label: Any) -> Comparison:
    prompt = [message("user", "Title\none.\ntwo.\n\nOther\nthree.\n\nwho?")]
    return Comparison(prompt, tuple(f"answer {i}" for i in range(1, k + 1)), **label)


def panda_row(given: str, *verdicts: int) -> dict[str, Any]:
    return {
        "idx": 0,
        "cmp_key": "x_y",
        "instruction": "rewrite",
        "input": given,
        "response1": "a",
        "response2": "b",
        **{f"annotator{i}": verdict for i, verdict in enumerate(verdicts, 1)},
    }


NATIVE = {"prompt": "p", "candidates": ["a", "b", "c"]}
GOOD = {**NATIVE, "best": 2}
ABC = ("a", "b", "c")

SAMPLES = [
    pytest.param("native", {**NATIVE, "best": 2}, [Comparison("p", ABC, best=2)], id="native best"),
    pytest.param(
        "native",
        {**NATIVE, "ranking": [[2], [0, 1]]},
        [Comparison("p", ABC, ranking=((2,), (0, 1)))],
        id="native ranking",
    ),
    pytest.param(
        "native",
        {**NATIVE, "ranking": [[2], [0]]},
        [Comparison("p", ABC, ranking=((2,), (0,)))],
        id="native partial ranking",
    ),
    pytest.param(
        "native",
        {**NATIVE, "scores": [0.5, -1, 2]},
        [Comparison("p", ABC, scores=(0.5, -1, 2))],
        id="native scores",
    ),
    pytest.param(
        "native",
        {**NATIVE, "votes": [1, 0, 2], "ties": 3},
        [Comparison("p", ABC, votes=(1, 0, 2), ties=3)],
        id="native votes",
    ),
    pytest.param(
        "native",
        {**NATIVE, "pairs": [[0, 1], [1, 2], [2, 0]]},
        [Comparison("p", ABC, pairs=((0, 1), (1, 2), (2, 0)))],
        id="native pairs",
    ),
    pytest.param(
        "native",
        {
            "prompt": TURNS,
            "candidates": ["", "b", "b"],
            "best": 1,
            "ids": {"prompt": [2, 4], "candidates": [[3], [5, 3], [5]]},
            "finish_reasons": ["stop", "stop", "length"],
        },
        [
            Comparison(
                TURNS,
                ("", "b", "b"),
                best=1,
                ids=((2, 4), ((3,), (5, 3), (5,))),
                finish_reasons=("stop", "stop", "length"),
            )
        ],
        id="native sampled",
    ),
    pytest.param(
        "hh",
        {"chosen": DIALOGUE + " because", "rejected": DIALOGUE + " no"},
        [Comparison(DIALOGUE, (" because", " no"), best=0)],
        id="hh",
    ),
    pytest.param(
        "hh",
        {"chosen": DIALOGUE + " no", "rejected": DIALOGUE + " no, never"},
        [Comparison(DIALOGUE, (" no", " no, never"), best=0)],
        id="hh where one answer begins the other",
    ),
    pytest.param(
        "hh",
        {
            "chosen": DIALOGUE + " a\n\nHuman: x\n\nAssistant: b",
            "rejected": DIALOGUE + " a\n\nHuman: y\n\nAssistant: c",
        },
        [
            Comparison(
                DIALOGUE,
                (" a\n\nHuman: x\n\nAssistant: b", " a\n\nHuman: y\n\nAssistant: c"),
                best=0,
            )
        ],
        id="hh that parts at a human turn",
    ),
    pytest.param(
        "pair",
        {"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 9.0},
        [Comparison("p", ("a", "b"), best=0)],
        id="pair of texts",
    ),
    pytest.param(
        "pair",
        {
            "prompt": TURNS,
            "chosen": [message("assistant", "a")],
            "rejected": [message("assistant", "b")],
        },
        [Comparison(TURNS, ("a", "b"), best=0)],
        id="pair of messages, prompt apart",
    ),
    pytest.param(
        "pair",
        {
            "prompt": "hi",
            "chosen": [*TURNS, message("assistant", "a")],
            "rejected": [*TURNS, message("assistant", "b")],
        },
        [Comparison(TURNS, ("a", "b"), best=0)],
        id="pair of dialogues and the first turn",
    ),
    pytest.param(
        "pair",
        {
            "chosen": [*TURNS, message("assistant", "a")],
            "rejected": [*TURNS, message("assistant", "b")],
        },
        [Comparison(TURNS, ("a", "b"), best=0)],
        id="pair of dialogues alone",
    ),
    pytest.param(
        "oasst",
        TREE,
        [
            Comparison([message("user", "q")], ABC, ranking=((1,), (0, 2))),
            Comparison(
                [message("user", "q"), message("assistant", "a"), message("user", "more")],
                ("e", "f"),
                ranking=((0,), (1,)),
            ),
        ],
        id="oasst",
    ),
    pytest.param(
        "qa_feedback",
        qa_row([1, 2, 1, 2, 2, 1], 4),
        [qa_comparison(4, ranking=((2,), (0,), (3,), (1,)))],
        id="qa_feedback without ties",
    ),
    pytest.param(
        "qa_feedback",
        qa_row([0, 1, 1, 1, 1, 0], 4),
        [qa_comparison(4, ranking=((0, 1), (2, 3)))],
        id="qa_feedback with ties",
    ),
    pytest.param(
        "qa_feedback",
        qa_row([1, 2, 1, 1, 1, 1], 4),
        [qa_comparison(4, pairs=((0, 1), (2, 0), (0, 3), (1, 2), (1, 3), (2, 3)))],
        id="qa_feedback in a circle",
    ),
    pytest.param(
        "qa_feedback",
        qa_row([0, 1, 0], 3),
        [qa_comparison(3, pairs=((0, 2),))],
        id="qa_feedback with ties that are not transitive",
    ),
    pytest.param(
        "pandalm",
        panda_row("this", 2, 0, 2),
        [Comparison([message("user", "rewrite\n\nthis")], ("a", "b"), votes=(0, 2), ties=1)],
        id="pandalm",
    ),
    pytest.param(
        "pandalm",
        panda_row("", 0, 0, 1),
        [Comparison([message("user", "rewrite")], ("a", "b"), votes=(1, 0), ties=2)],
        id="pandalm without input",
    ),
    pytest.param(
        "ziegler",
        {"query": "p", "sample0": "a", "sample1": "b", "sample2": "c", "best": 1},
        [Comparison("p", ABC, best=1)],
        id="ziegler texts",
    ),
    pytest.param(
        "ziegler",
        {"query": [4, 5], "sample1": [7, 3], "sample0": [6], "best": 1},
        [Comparison("a b", ("c", "d </s>"), best=1, ids=((4, 5), ((6,), (7, 3))))],
        id="ziegler token ids",
    ),
    pytest.param(
        "ziegler",
        {"query": "p", **{f"sample{i}": f"answer {i}" for i in (10, *range(10))}, "best": 10},
        [Comparison("p", tuple(f"answer {i}" for i in range(11)), best=10)],
        id="ziegler of eleven",
    ),
    pytest.param(
        "scored",
        {
            "source": "x",
            "instruction": "do",
            "models": ["m", "n", "o"],
            "completions": [
                {"model": "m", "response": "a", "overall_score": 6.5, "annotations": {}},
                {"model": "n", "response": "b", "overall_score": 8, "annotations": {}},
                {"model": "o", "response": "c", "overall_score": 6.5, "annotations": {}},
            ],
        },
        [Comparison([message("user", "do")], ABC, scores=(6.5, 8, 6.5))],
        id="scored",
    ),
    pytest.param(
        "llmbar",
        {"input": "do", "output_1": "a", "output_2": "b", "label": 2},
        [Comparison([message("user", "do")], ("a", "b"), best=1)],
        id="llmbar",
    ),
]


@pytest.mark.parametrize(("name", "row", "expected"), SAMPLES)
def test_each_format_is_recognised_and_read(tmp_path, name, row, expected):
    file = write_rows(tmp_path, row)
    tokenizer = make_tokenizer()
    assert read_comparisons(file, tokenizer=tokenizer) == expected
    assert read_comparisons(file, format=name, tokenizer=tokenizer) == expected


def test_a_file_may_mix_formats_and_kinds_of_files_do_not_matter(tmp_path):
    rows = [
        {**NATIVE, "best": 2},
        {"chosen": DIALOGUE + " because", "rejected": DIALOGUE + " no"},
        TREE,
    ]
    found = read_comparisons(write_rows(tmp_path, *rows))
    assert [len(c.candidates) for c in found] == [3, 2, 3, 2]
    (tmp_path / "c.json").write_text(json.dumps(rows))
    assert read_comparisons(tmp_path / "c.json") == found
    packed = gzip.compress((tmp_path / "c.jsonl").read_bytes())
    (tmp_path / "c.jsonl.gz").write_bytes(packed)
    assert read_comparisons(tmp_path / "c.jsonl.gz") == found


def test_a_dataset_is_read_like_a_file(monkeypatch):
    asked = []

    def load_dataset(name: str, **options: Any) -> list[Any]:
        asked.append((name, options))
        return [GOOD, {**GOOD, "best": 3}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    skipped: list[str] = []
    found = read_comparisons("a/b", skipped=skipped, split="test", revision="v1")
    assert asked == [("a/b", {"split": "test", "revision": "v1"})]
    assert found == [Comparison("p", ABC, best=2)]
    assert skipped == ["a/b, row 2: best is 3, but must be 0 to 2"]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        # Every row of a dataset has all columns, null where it says nothing.
        pytest.param(
            NATIVE | {"best": 2, "ties": None, "ids": None} | dict.fromkeys(LABELS[1:]),
            Comparison("p", ABC, best=2),
            id="null columns",
        ),
        pytest.param(
            {
                "prompt": TURNS[:1],
                "chosen": [*TURNS[1:], message("assistant", "a")],
                "rejected": [*TURNS[1:], message("assistant", "b")],
            },
            Comparison(TURNS, ("a", "b"), best=0),
            id="prompt apart, answers of several turns",
        ),
        # The published files are padded to one length with 50259, which GPT-2 has no token for.
        pytest.param(
            {
                "query": [50259, 4],
                "sample0": [5, 3, 50259],
                "sample1": [6, 50259, 50259],
                "best": 1,
            },
            Comparison("a", ("b </s>", "c"), best=1, ids=((4,), ((5, 3), (6,)))),
            id="padded token ids",
        ),
    ],
)
def test_published_rows_are_read_as_they_are_meant(tmp_path, row, expected):
    file = write_rows(tmp_path, row)
    assert read_comparisons(file, tokenizer=make_tokenizer()) == [expected]


# What is written comes back


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize(
    "label",
    [
        {"best": 0},
        {"ranking": ((2,), (0, 1))},
        {"ranking": ((1,), (0,))},
        {"scores": (0.1 + 0.2, -1e-9, 3)},
        {"votes": (0, 4, 1)},
        {"votes": (0, 0, 0), "ties": 2},
        {"pairs": ((0, 1), (1, 2), (2, 0), (0, 1))},
    ],
    ids=lambda label: f"{next(iter(label))}{len(label)}",
)
def test_comparisons_survive_a_round_trip(tmp_path, label, chat):
    prompt = TURNS if chat else 'line\n\tone "two" \\ \u2028 \x85 é 🙂'
    written = [
        Comparison(prompt, ("a\n", " b", "\u2028c"), **label),
        Comparison(
            prompt,
            ("", "b", "b"),
            ids=((2, 4), ((3,), (5, 3), (5,))),
            finish_reasons=("stop", "stop", "length"),
            **label,
        ),
    ]
    write_comparisons(tmp_path / "c.jsonl", written)
    assert len((tmp_path / "c.jsonl").read_bytes().splitlines()) == 2
    assert read_comparisons(tmp_path / "c.jsonl") == written


# Bad rows


def assert_named_and_skipped(file: Path, place: str, problem: str, kept: int = 2, **options: Any):
    """The second of three rows is bad: an error names it, and on request the others are kept."""
    with pytest.raises(InputError) as raised:
        read_comparisons(file, **options)
    assert str(raised.value).startswith(f"{file}, {place}")
    assert problem in str(raised.value)
    skipped: list[str] = []
    found = read_comparisons(file, skipped=skipped, **options)
    assert [f"{said}; {SKIP_HINT}" for said in skipped] == [str(raised.value)]
    assert len(found) == kept


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({**GOOD, "candidates": ["a", "b", ["c"]]}, 'candidate 2 is not a text, but ["c"]'),
        ({**GOOD, "candidates": ["a"], "best": 0}, "at least two texts"),
        ({**GOOD, "candidates": []}, "at least two texts"),
        ({**GOOD, "candidates": "abc"}, "at least two texts"),
        ({**GOOD, "best": 3}, "best is 3, but must be 0 to 2"),
        ({**GOOD, "best": -1}, "best is -1, but must be 0 to 2"),
        ({**GOOD, "best": True}, "best is True, but must be 0 to 2"),
        ({**GOOD, "best": 1.0}, "best is 1.0, but must be 0 to 2"),
        ({**GOOD, "prompt": ""}, "prompt must be a text or chat messages, not ''"),
        ({**GOOD, "prompt": ["p"]}, "prompt must be a text or chat messages, not \"['p']\""),
        ({**GOOD, "scores": [1, 2, 3]}, "one of best, ranking, scores, votes, pairs; this one has"),
        (NATIVE, "this one has prompt, candidates"),
        ({**NATIVE, "ranking": 2}, "ranking must be a list, not 2"),
        ({**NATIVE, "ranking": [[0, 1], [0]]}, "at least two candidates, each once"),
        ({**NATIVE, "ranking": [[0]]}, "at least two candidates, each once"),
        ({**NATIVE, "ranking": []}, "at least two candidates, each once"),
        ({**NATIVE, "ranking": [[0], [3]]}, "must list groups of candidates 0 to 2"),
        ({**NATIVE, "ranking": [[0], [], [1]]}, "must list groups of candidates 0 to 2"),
        ({**NATIVE, "ranking": [2, 1, 0]}, "must list groups of candidates 0 to 2"),
        ({**NATIVE, "pairs": [[0, 1], [2, 2]]}, "pairs must be [winner, loser] each"),
        ({**NATIVE, "pairs": [[0, 1, 2]]}, "pairs must be [winner, loser] each"),
        ({**NATIVE, "pairs": []}, "pairs must be [winner, loser] each"),
        ({**NATIVE, "pairs": [[0, 3]]}, "must list groups of candidates 0 to 2"),
        ({**NATIVE, "votes": [0, 0, 0]}, "nobody voted"),
        ({**NATIVE, "votes": [1, -1, 0]}, "votes and ties must be counts"),
        ({**NATIVE, "votes": [1, 0.5, 0]}, "votes and ties must be counts"),
        ({**NATIVE, "votes": [1, 1, 1], "ties": -1}, "votes and ties must be counts"),
        ({**NATIVE, "votes": [1, 2]}, "votes must be 3 finite numbers"),
        ({**NATIVE, "scores": [1.0, 2.0]}, "scores must be 3 finite numbers"),
        ({**GOOD, "ids": {"prompt": [1], "candidates": [[1]]}}, "one list of token ids for each"),
        (
            {**GOOD, "ids": {"prompt": [1], "candidates": [[1], [], [2]]}},
            "one list of token ids for each",
        ),
        (
            {**GOOD, "ids": {"prompt": [-1], "candidates": [[1], [2], [3]]}},
            "one list of token ids for each",
        ),
        (["a", "b"], "an object is needed, not \"['a', 'b']\""),
        ({"question": "p", "answers": []}, "has no known format: it has question, answers"),
        ({"chosen": "x", "rejected": "y"}, "share no '\\n\\nAssistant:' turn"),
        ({"chosen": None, "rejected": "y"}, "has no known format: it has rejected"),
        ({"chosen": DIALOGUE + " a", "rejected": DIALOGUE + " a"}, "are the same text"),
        ({"chosen": TURNS, "rejected": TURNS}, "must differ in one last message"),
        ({"chosen": TURNS, "rejected": TURNS[:1]}, "must differ in one last message"),
        ({"prompt": "p", "chosen": "a", "rejected": 3}, "candidate 1 is not a text, but 3"),
        (
            {"message_tree_id": "t", "prompt": {"role": "narrator", "text": "q"}},
            "is not of the format 'oasst': KeyError 'narrator'",
        ),
        (qa_row([1, 1], 3), "preference must be 3 codes 0, 1 or 2, not [1, 1]"),
        (qa_row([1, 1, 3], 3), "preference must be 3 codes 0, 1 or 2, not [1, 1, 3]"),
        (panda_row("", 1, 3), "annotators must say 0, 1 or 2, not [1, 3]"),
        (panda_row(""), "annotators must say 0, 1 or 2, not []"),
        ({**panda_row("", 1), "response2": True}, "candidate 1 is not a text, but true"),
        ({"query": "p", "sample0": "a", "sample1": "b", "best": 2}, "best is 2, but must be 0 to"),
        ({"query": [4], "sample0": [5], "sample1": [6], "best": 0}, "name the tokenizer"),
        (
            {"instruction": "do", "completions": [{"response": "a"}, {"response": "b"}]},
            "is not of the format 'scored': KeyError 'overall_score'",
        ),
        (
            {"input": "do", "output_1": "a", "output_2": "b", "label": 0},
            "label must be 1 or 2, not 0",
        ),
    ],
)
def test_a_bad_row_is_named_and_can_be_skipped(tmp_path, row, problem):
    assert_named_and_skipped(write_rows(tmp_path, GOOD, row, GOOD), "line 2", problem)
    listed = tmp_path / "c.json"
    listed.write_text(json.dumps([GOOD, row, GOOD]))
    assert_named_and_skipped(listed, "row 2", problem)


@pytest.mark.parametrize(
    "row",
    [
        pytest.param({**GOOD, "ties": "many"}, id="ties of another label"),
        pytest.param({**GOOD, "finish_reasons": 5}, id="finish_reasons no list"),
        pytest.param({**GOOD, "finish_reasons": "stop"}, id="finish_reasons a text"),
        pytest.param({**GOOD, "finish_reasons": ["stop"]}, id="finish_reasons too few"),
        pytest.param({**GOOD, "prompt": "\ud83d"}, id="half a character as prompt"),
        pytest.param({**GOOD, "prompt": [{"role": "user", "content": None}]}, id="no content"),
        pytest.param(panda_row("", True, True, False), id="true and false as verdicts"),
    ],
)
def test_a_row_that_would_only_fail_later_is_named(tmp_path, row):
    assert_named_and_skipped(write_rows(tmp_path, GOOD, row, GOOD), "line 2", "")


@pytest.mark.parametrize("ids", [[-1], [1 << 40], ["a"], [5.5], None])
def test_token_ids_that_cannot_be_decoded_are_named(tmp_path, ids):
    rows = [{"query": [4], "sample0": [5], "sample1": last, "best": 0} for last in ([6], ids, [6])]
    file = write_rows(tmp_path, *rows)
    problem = "token ids cannot be decoded"
    assert_named_and_skipped(file, "line 2", problem, tokenizer=make_tokenizer())


def test_one_bad_group_of_a_tree_leaves_the_others(tmp_path):
    tree = json.loads(json.dumps(TREE))
    tree["prompt"]["replies"][0]["replies"][0]["replies"][1]["text"] = ""
    file = write_rows(tmp_path, GOOD, tree, GOOD)
    assert_named_and_skipped(file, "line 2, group 2", "candidate 1 is empty", kept=3)


@pytest.mark.parametrize(
    ("line", "problem"),
    [(b'{"prompt": ', "not valid JSON"), (b'{"prompt": "caf\xe9"}', "is not UTF-8 text")],
)
def test_a_line_that_cannot_be_read_is_named(tmp_path, line, problem):
    good = json.dumps(GOOD).encode()
    file = tmp_path / "c.jsonl"
    file.write_bytes(b"\n".join([good, line, good]))
    assert_named_and_skipped(file, "line 2", problem)


def test_a_truncated_archive_keeps_the_rows_before_the_cut(tmp_path):
    rng = np.random.default_rng(0)
    answers = [[rng.bytes(40).hex() for _ in range(2)] for _ in range(400)]
    rows = [{"prompt": str(i), "candidates": pair, "best": 0} for i, pair in enumerate(answers)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    whole = gzip.compress(text.encode(), mtime=0)
    cut = whole[: len(whole) * 2 // 3]
    before = zlib.decompressobj(wbits=31).decompress(cut).count(b"\n")
    assert 200 < before < 300
    file = tmp_path / "c.jsonl.gz"
    file.write_bytes(cut)
    with pytest.raises(InputError, match=f"cannot be read after line {before}: ") as raised:
        read_comparisons(file)
    skipped: list[str] = []
    found = read_comparisons(file, skipped=skipped)
    assert [f"{said}; {SKIP_HINT}" for said in skipped] == [str(raised.value)]
    assert str(file) in skipped[0]
    assert [c.prompt for c in found] == [str(i) for i in range(before)]


def test_nothing_to_read_is_an_error_even_where_rows_may_be_skipped(tmp_path):
    skipped: list[str] = []
    with pytest.raises(InputError, match=r"c\.jsonl has no comparisons"):
        read_comparisons(write_rows(tmp_path, NATIVE), skipped=skipped)
    assert len(skipped) == 1
    with pytest.raises(InputError, match="has no rows"):
        read_comparisons(write_rows(tmp_path), skipped=[])
    with pytest.raises(InputError, match="no such file"):
        read_comparisons(tmp_path / "none.jsonl", skipped=[])


AB = ["a", "b"]
SYSTEM = message("system", "be kind")
ASKED = [message("user", "why"), message("assistant", "so"), message("user", "hi")]


@pytest.mark.parametrize(
    ("prompt", "shared", "expected"),
    [
        ([SYSTEM, ASKED[-1]], ASKED[-1:], [SYSTEM, ASKED[-1]]),
        ([message("user", "hi ")], ASKED[-1:], ASKED[-1:]),
        ([SYSTEM, *ASKED[:1]], ASKED, [SYSTEM, *ASKED]),
        (ASKED[:1], [SYSTEM, *ASKED], [SYSTEM, *ASKED]),
        ([SYSTEM, *ASKED], [SYSTEM, *ASKED], [SYSTEM, *ASKED]),
        (ASKED[:2], ASKED[2:], ASKED),
        ([SYSTEM], ASKED, [SYSTEM, *ASKED]),
    ],
)
@pytest.mark.parametrize("columns", [None, "prompt=prompt candidates=[chosen,rejected] winner=w"])
def test_dialogues_may_repeat_their_prompt(tmp_path, prompt, shared, expected, columns):
    sides = {side: [*shared, message("assistant", side)] for side in ("chosen", "rejected")}
    file = write_rows(tmp_path, {"prompt": prompt, **sides, "w": "chosen"})
    found = read_comparisons(file, columns=columns and columns.split())
    assert found == [Comparison(expected, ("chosen", "rejected"), best=0)]


@pytest.mark.parametrize(
    ("prompt", "shared", "problem"),
    [
        (ASKED, ASKED[-1:], "begin with another message of the user: 'hi' and 'hi'"),
        (ASKED[:1], ASKED[-1:], "begin with another message of the user: 'why' and 'hi'"),
        ([SYSTEM, ASKED[0]], [message("system", "no"), ASKED[0]], "have another one"),
        (ASKED[:2], [SYSTEM, *ASKED[2:]], "have a system message"),
    ],
)
def test_dialogues_that_do_not_fit_their_prompt_are_named(tmp_path, prompt, shared, problem):
    sides = {side: [*shared, message("assistant", side)] for side in ("chosen", "rejected")}
    with pytest.raises(InputError, match=f"line 1: .*{problem}"):
        read_comparisons(write_rows(tmp_path, {"prompt": prompt, **sides}))


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ({"votes": [2.0, 1], "ties": 1.0}, {"votes": (2, 1), "ties": 1}),
        ({"votes": [2.0, 1.0]}, {"votes": (2, 1)}),
        ({"scores": [2.0, 1]}, {"scores": (2.0, 1)}),
    ],
)
def test_counts_may_be_written_as_floats(tmp_path, given, read):
    # A column of counts becomes one of floats where a row has none.
    (found,) = read_comparisons(write_rows(tmp_path, {"prompt": "p", "candidates": AB, **given}))
    assert found == Comparison("p", ("a", "b"), **read)
    label = next(iter(given))
    assert json.dumps(getattr(found, label)) == json.dumps(read[label])


def test_no_advice_to_skip_rows_where_no_row_is_left(tmp_path):
    bad = {"prompt": "p", "candidates": AB, "best": 2}
    for rows in ([bad], [bad, bad]):
        with pytest.raises(InputError) as raised:
            read_comparisons(write_rows(tmp_path, *rows))
        assert "best is 2" in str(raised.value)
        assert "--on-bad-row" not in str(raised.value)
    with pytest.raises(InputError, match="--on-bad-row skip"):  # which leaves out the candidate
        read_comparisons(write_rows(tmp_path, {**bad, "candidates": ["a", "", "c"]}))
    with pytest.raises(InputError, match="--on-bad-row skip"):
        read_comparisons(write_rows(tmp_path, bad, {**bad, "best": 1}))
    (tmp_path / "broken.jsonl").write_text("{")
    with pytest.raises(InputError, match=r"not valid JSON[^;]*$"):
        read_comparisons(tmp_path / "broken.jsonl")


def test_a_system_message_needs_a_prompt(tmp_path):
    file = write_rows(tmp_path, {"x": "a", "y": "b", "s": "rhyme"})
    for words in ("chosen=x rejected=y system=s", "candidates=[x,y] winner=x system=s"):
        with pytest.raises(InputError, match="prompt=COLUMN"):
            read_comparisons(file, columns=words.split())


def test_a_format_that_is_named_is_the_one_that_is_read(tmp_path):
    file = write_rows(tmp_path, GOOD)
    with pytest.raises(InputError, match=r"format must be one of native, pair, .* not 'nonsense'"):
        read_comparisons(file, format="nonsense")
    with pytest.raises(InputError, match="line 1 is not of the format 'llmbar': KeyError 'label'"):
        read_comparisons(file, format="llmbar")
    both = {"prompt": "p", "chosen": DIALOGUE + " a", "rejected": DIALOGUE + " b"}
    file = write_rows(tmp_path, both)
    assert read_comparisons(file)[0].prompt == "p"
    assert read_comparisons(file, format="hh")[0].prompt == DIALOGUE


# Published data


def real(name: str) -> Path:
    if not (REAL_DATA / name).is_file():
        pytest.skip(f"{name} is not in {REAL_DATA}")
    return REAL_DATA / name


def test_real_hh():
    file = real("hh-harmless-test.jsonl.gz")
    with gzip.open(file, "rt", encoding="utf-8") as opened:
        rows = [json.loads(line) for line in opened]
    skipped: list[str] = []
    found = read_comparisons(file, skipped=skipped)
    bad = [87, 517, 926, 1104]
    assert skipped == [f"{file}, line {i}: candidate 0 is empty" for i in bad]
    kept = [row for i, row in enumerate(rows, 1) if i not in bad]
    assert len(found) == len(kept) == 2308
    assert [c.prompt + c.candidates[0] for c in found] == [row["chosen"] for row in kept]
    assert [c.prompt + c.candidates[1] for c in found] == [row["rejected"] for row in kept]
    assert all(c.best == 0 and c.prompt.endswith("\n\nAssistant:") for c in found)


def test_real_oasst():
    found = read_comparisons(real("oasst-en-trees.jsonl"))
    sizes = Counter(len(c.candidates) for c in found)
    assert sizes == {2: 57, 3: 117, 4: 27, 5: 3, 6: 6, 8: 1, 9: 1}
    assert len(found) == sizes.total() == 212
    for c in found:
        assert sorted(i for group in c.ranking for i in group) == list(range(len(c.candidates)))
        roles = [m["role"] for m in c.prompt]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
    assert Counter(len(c.prompt) for c in found) == {1: 99, 3: 111, 5: 2}


def test_real_qa_feedback():
    file = real("qa-feedback-dev.json")
    found = read_comparisons(file)
    forms = Counter(name for c in found for name in LABELS if getattr(c, name) is not None)
    assert forms == {"ranking": 478, "pairs": 22}
    for c, row in zip(found, json.loads(file.read_text(encoding="utf-8")), strict=True):
        codes = zip(combinations(range(4), 2), row["preference"], strict=True)
        said = {pair if code == 1 else pair[::-1] for pair, code in codes if code}
        assert set(c.preferred) == said
        assert c.candidates == tuple(row[f"prediction {i}"] for i in range(1, 5))


def test_real_pandalm():
    file = real("pandalm-testset.json")
    rows = json.loads(file.read_text(encoding="utf-8"))
    assert len(rows) == 999
    with pytest.raises(InputError, match="row 19: candidate 0 is empty"):
        read_comparisons(file)
    skipped: list[str] = []
    found = read_comparisons(file, skipped=skipped)
    not_text = [message for message in skipped if "is not a text, but true" in message]
    at = [157, 158, 159, 161, 162, 164]
    assert [m.split(":")[0] for m in not_text] == [f"{file}, row {i + 1}" for i in at]
    empty = [message.split(":")[0] for message in skipped if message.endswith("is empty")]
    assert empty == [
        f"{file}, row {i}"
        for i, row in enumerate(rows, 1)
        if any(str(row[name]).strip() == "" for name in ("response1", "response2"))
    ]
    assert (len(not_text), len(empty), len(skipped), len(found)) == (6, 54, 60, 939)
    assert all(sum(c.votes) + c.ties == 3 for c in found)


def test_real_llmbar():
    found = read_comparisons(real("llmbar-natural.json"))
    assert Counter(c.best for c in found) == {0: 42, 1: 58}


# The survey


def test_the_survey_counts_everything():
    q = ("a", "bb", "ccc")
    comparisons = [
        Comparison("p", ("aa", "b"), best=0),
        Comparison("p", ("aa", "b"), best=0),
        Comparison("p", ("b", "aa"), best=0),
        Comparison("q", q, ranking=((2,), (0, 1))),
        Comparison("q", q, pairs=((0, 1), (1, 2), (2, 0))),
        Comparison([message("user", "p")], ("x", "y"), scores=(1.0, 1.0)),
        Comparison("r", ("x", "y"), votes=(1, 2), ties=1),
    ]
    # p: the longer won 2 of 3; q: 3 of 5; r: equal lengths. 5/8 in all, each prompt 1/8 off it.
    assert survey(comparisons) == {
        "comparisons": 7,
        "prompts": 4,
        "candidates": {2: 5, 3: 2},
        "labels": {"best": 3, "ranking": 1, "scores": 1, "votes": 1, "pairs": 1},
        "ties": 3,
        "duplicates": 1,
        "conflicts": 2,
        "intransitive": 1,
        "longer_won": {"value": 0.625, "se": pytest.approx(1 / 32), "n": 8},
    }


@pytest.mark.parametrize(
    ("second", "duplicates", "conflicts"),
    [
        (Comparison("p", ("a", "b"), best=0), 1, 0),
        (Comparison("p", ("a", "b"), best=0, finish_reasons=("stop", "stop")), 1, 0),
        (Comparison("p", ("b", "a"), best=1), 0, 0),
        (Comparison("p", ("a", "b"), ranking=((0,), (1,))), 0, 0),
        (Comparison("p", ("a", "b"), scores=(2, 2)), 0, 0),
        (Comparison("p", ("a", "b"), best=1), 0, 1),
        (Comparison("p", ("a", "b"), pairs=((0, 1), (1, 0))), 0, 1),
        (Comparison("p", ("c", "b", "a"), ranking=((0,), (1,), (2,))), 0, 1),
        (Comparison("p", ("c", "b", "a"), best=0), 0, 0),
        (Comparison("another", ("a", "b"), best=1), 0, 0),
        (Comparison([message("user", "p")], ("a", "b"), best=1), 0, 0),
    ],
)
def test_duplicates_and_conflicts_are_told_apart(second, duplicates, conflicts):
    counts = survey([Comparison("p", ("a", "b"), best=0), second])
    assert (counts["duplicates"], counts["conflicts"]) == (duplicates, conflicts)


def test_one_comparison_alone_is_never_in_conflict():
    both_ways = Comparison("p", ("a", "b"), pairs=((0, 1), (1, 0)))
    counts = survey([both_ways])
    assert (counts["conflicts"], counts["intransitive"]) == (0, 1)
    assert survey([both_ways, both_ways])["conflicts"] == 1
    drawn_twice = Comparison("p", ("a", "a"), best=0, ids=((2,), ((4,), (4, 3))))
    assert survey([drawn_twice, drawn_twice])["conflicts"] == 0


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ({"best": 0}, False),
        ({"ranking": ((0,), (1,), (2,))}, False),
        ({"ranking": ((0,), (1, 2))}, True),
        ({"scores": (1, 2, 3)}, False),
        ({"scores": (1, 2, 1)}, True),
        ({"votes": (2, 1, 0)}, False),
        ({"votes": (3, 0, 0)}, False),
        ({"votes": (2, 2, 0)}, True),
        ({"votes": (2, 1, 0), "ties": 1}, True),
        ({"pairs": ((0, 1),)}, False),
    ],
)
def test_ties_are_those_that_someone_called(label, expected):
    assert has_tie(Comparison("p", ABC, **label)) is expected


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        (((0, 1), (1, 2), (0, 2)), False),
        (((0, 1), (1, 2)), False),
        (((0, 1), (0, 1)), False),
        (((0, 1), (1, 0)), True),
        (((0, 1), (1, 2), (2, 0)), True),
        (((3, 0), (0, 1), (1, 2), (2, 0)), True),
        (((0, 1), (1, 2), (2, 3), (3, 0)), True),
    ],
)
def test_circles_are_found(pairs, expected):
    assert is_intransitive(Comparison("p", ("a", "b", "c", "d"), pairs=pairs)) is expected


def test_one_pair_a_prompt_has_the_standard_error_of_independent_values():
    won = [1.0, 0.0, 1.0, 1.0, 0.0]
    comparisons = [
        Comparison(str(i), ("long", "s"), best=int(not longer)) for i, longer in enumerate(won)
    ]
    figure = survey(comparisons)["longer_won"]
    assert figure == pytest.approx(measured(np.array(won)))
    # The same pairs again on the same prompts tell nothing new.
    twice = survey([*comparisons, *comparisons])["longer_won"]
    assert (twice["se"], twice["n"]) == (pytest.approx(figure["se"]), 10)


def test_the_length_bias_is_unknown_without_pairs_of_unequal_length():
    figure = survey([Comparison("p", ("a", "b"), best=0)])["longer_won"]
    assert figure == {"value": pytest.approx(math.nan, nan_ok=True), "se": figure["se"], "n": 0}
    assert math.isnan(figure["se"])
    one = survey([Comparison("p", ("aa", "b"), best=0)])["longer_won"]
    assert (one["value"], one["n"]) == (1.0, 1)
    assert math.isnan(one["se"])


def test_survey_of_real_comparisons():
    counts = survey(read_comparisons(real("pandalm-testset.json"), skipped=[]))
    longer = counts.pop("longer_won")
    assert counts == {
        "comparisons": 939,
        "prompts": 164,
        "candidates": {2: 939},
        "labels": {"votes": 939},
        "ties": 129,
        "duplicates": 71,
        "conflicts": 0,
        "intransitive": 0,
    }
    assert (round(longer["value"], 3), longer["n"]) == (0.662, 847)


# The script


@pytest.fixture
def script(monkeypatch) -> Any:
    from agents.cli import convert_preferences

    return convert_preferences


def run(*arguments: object, code: int) -> str:
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "convert_preferences.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"},
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def cells(text: str) -> dict[str, str]:
    """The rows of a printed table."""
    rows = [line.strip("│ ").split("│") for line in text.splitlines() if line.startswith("│")]
    return {name.strip(): value.strip() for name, value in rows}


def test_the_script_converts_and_says_what_it_found(tmp_path):
    bad = {**GOOD, "candidates": ["a", "b", ""]}
    file = write_rows(
        tmp_path, {"chosen": DIALOGUE + " aa", "rejected": DIALOGUE + " b"}, bad, TREE
    )
    output = tmp_path / "new" / "o.jsonl"
    said = run("--data", file, "--output", output, "--on-bad-row", "skip", code=0)
    assert f"skipped: {file}, line 2: candidate 2 is empty" in said
    assert cells(said) == {
        "comparisons": "3",
        "unique prompts": "3",
        "of K = 2 candidates": "2",
        "of K = 3 candidates": "1",
        "labelled by best": "1",
        "labelled by ranking": "2",
        "with ties": "1",
        "exact duplicates": "0",
        "conflicting pairs of answers": "0",
        "intransitive": "0",
        "pairs of unequal length": "1",
        "of these, the longer answer won": "1.000 ± nan",
        "rows skipped": "1",
    }
    assert read_comparisons(output, format="native") == read_comparisons(file, skipped=[])
    assert [path.name for path in output.parent.iterdir()] == ["o.jsonl"]


def test_a_bad_row_exits_2_and_nothing_is_written(tmp_path):
    file = write_rows(tmp_path, GOOD, {**GOOD, "best": 3})
    output = tmp_path / "new" / "o.jsonl"
    said = run("--data", file, "--output", output, code=2)
    assert f"error: {file}, line 2: best is 3, but must be 0 to 2" in said
    assert not output.parent.exists()


def test_a_file_is_never_written_over(tmp_path, script):
    file = write_rows(tmp_path, GOOD)
    before = file.read_bytes()
    with pytest.raises(InputError, match=r"c\.jsonl already exists; give another file"):
        script.main(script.Config(data=str(file), output=file))
    assert file.read_bytes() == before
    with pytest.raises(InputError, match=r"must end in \.jsonl, unlike .*o\.json"):
        script.main(script.Config(data=str(file), output=tmp_path / "o.json"))
    assert [path.name for path in tmp_path.iterdir()] == ["c.jsonl"]


def test_nothing_half_written_stays(tmp_path, script, monkeypatch):
    def fail(path: Path, comparisons: Any) -> None:
        path.write_text('{"prompt": ')
        raise OSError("no space left")

    from agents.runs import comparison_files

    monkeypatch.setattr(comparison_files, "write_comparisons", fail)
    file = write_rows(tmp_path, GOOD)
    with pytest.raises(OSError, match="no space left"):
        script.main(script.Config(data=str(file), output=tmp_path / "o.jsonl"))
    assert [path.name for path in tmp_path.iterdir()] == ["c.jsonl"]


def test_skipped_rows_are_told_even_where_none_is_left(tmp_path, script, capsys):
    file = write_rows(tmp_path, NATIVE)
    config = script.Config(data=str(file), output=tmp_path / "o.jsonl", on_bad_row="skip")
    with pytest.raises(InputError, match="has no comparisons"):
        script.main(config)
    assert capsys.readouterr().out.startswith(f"skipped: {file}, line 1: a comparison has")


def test_token_ids_are_converted_with_the_tokenizer_that_is_named(tmp_path, script):
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    file = write_rows(tmp_path, {"query": [4], "sample0": [5], "sample1": [6, 3], "best": 1})
    output = tmp_path / "o.jsonl"
    counts = script.main(
        script.Config(
            data=str(file),
            output=output,
            format="ziegler",
            tokenizer=str(tmp_path / "tokenizer"),
        )
    )
    assert (counts["comparisons"], counts["skipped"]) == (1, 0)
    assert json.loads(output.read_text()) == {
        "prompt": "a",
        "candidates": ["b", "c </s>"],
        "best": 1,
        "ids": {"prompt": [4], "candidates": [[5], [6, 3]]},
    }
    with pytest.raises(InputError, match="cannot load a tokenizer from '/nowhere'"):
        script.main(
            script.Config(data=str(file), output=tmp_path / "n.jsonl", tokenizer="/nowhere")
        )


def test_further_columns_of_a_row_may_be_anything():
    row = {"prompt": "p", "candidates": ["a", "b"], "best": 1, "created": datetime(2026, 1, 2)}
    assert comparison_of("row 1", row).best == 1
    with pytest.raises(InputError, match="row 2: candidate 1 is not a text"):
        comparison_of("row 2", {**row, "candidates": ["a", datetime(2026, 1, 2)]})
    with pytest.raises(InputError, match="half a character"):
        comparison_of("row 3", {**row, "candidates": ["a", "\ud800"]})
