"""The check of plain English finds the dialect, and leaves plain English alone."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("plain_english", ROOT / ".ci" / "plain_english.py")
assert SPEC is not None and SPEC.loader is not None
CHECK = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(CHECK)


def found(text: str) -> list[str]:
    return [words for _, words, _ in CHECK.findings(text)]


@pytest.mark.parametrize(
    "text,words",
    [
        ("The prompt is encoded anew.", "anew"),
        ("It names the file, the row and the mend.", "mend"),
        ("What it costs beside the pass.", "beside"),
        ("The flagship is so many times as fast.", "so many"),
        ("Keep only so many first words.", "so many"),
        ("3,000 tokens a second.", "tokens a second"),
        ("KL in nats a sequence", "nats a sequence"),
        ("steps that go 0.5 nats a token.", "nats a token"),
        ("one forward pass an episode, not more", "one forward pass an episode"),
        ("as many steps an epoch as the shape has", "many steps an epoch"),
        ("One token an action.", "One token an action"),
        ("{done} steps a row", "done} steps a row"),
        ("there are four an epoch", "four an epoch"),
        ("takes 1.6 times as long an iteration", "times as long an iteration"),
        ("Families it cannot serve get full passes.", "cannot serve"),
        ("The policy's states serve where the trunk is shared.", "serve where"),
        ("a loss of one's own", "one's own"),
        ("a trunk, or one of its own", "one of its own"),
        ("Every token bears the advantage.", "bears"),
        ("Where the tokenizer lies, if not with the model.", "tokenizer lies"),
        ("The class lies in rlhf_gym.", "lies in rlhf_gym"),
        ("The last whole checkpoint stands.", "stands"),
        ("the loss in nats a\nsequence", "nats a sequence"),
        ("    # the loss in nats\n    # a token\n", "nats a token"),
    ],
)
def test_the_dialect_is_found(text, words):
    line = text.split(words)[0].count("\n") + 1 if words in text else 1
    ((at, said, plain),) = CHECK.findings(text)
    assert (at, said) == (line, words)
    assert plain


@pytest.mark.parametrize(
    "text",
    [
        "The policy samples a response, then scores a response.",
        "Each step of an update reads the responses a prompt has.",
        "How many tokens a row may take.",
        "It draws a token at a time, and reads the row a second time.",
        "The environment gives tokens a row of their own.",
        "3,000 tokens per second, and tokens/s in a table",
        "The server serves requests.",
        "Bear in mind that a policy learns.",
        "The value lies between 0 and 1.",
        "A name stands for a module; a stand-in stands in for a model. Leave it as it stands.",
        "Amend the commit. The boundary is recommended.",
        "There are so many rows that it takes hours.",
        "A critic of its own, with its own learning rate.",
        "What the policy has learnt, and one of its own samples.",
        "The last tokens.\n\nA token is an id.",
        "def run_beside(rows: int) -> None:",
    ],
)
def test_plain_english_is_left_alone(text):
    assert found(text) == []


def test_files_are_reported_with_line_and_plain_word(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("# A page\n\nIt begins anew.\n", encoding="utf-8")
    assert CHECK.main([str(page)]) == 1
    assert f'{page}:3: "anew" -> again, from scratch, re-' in capsys.readouterr().out
    page.write_text("# A page\n\nIt begins again.\n", encoding="utf-8")
    assert CHECK.main([str(page)]) == 0


def test_the_docs_are_in_plain_english():
    pages = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
    assert CHECK.main([str(page) for page in pages]) == 0
