"""Every cell of the tables in docs/data.md: what the page says is read is read, or refused."""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf_gym.data.compressed import COMPRESSED
from rlhf_gym.data.encoding import continued_ids
from rlhf_gym.data.prompt_rows import PROMPT_COLUMNS, load_texts
from rlhf_gym.data.row_files import ENDINGS
from rlhf_gym.errors import InputError
from rlhf_gym.preferences.formats import read_comparisons
from rlhf_gym.training.sft_data import load_examples

PAGE = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
OBJECTS = (".json", ".jsonl", ".ndjson", ".parquet", ".arrow")
TABLES = {".csv": ",", ".tsv": "\t"}


def table(name: str) -> list[list[str]]:
    """Cells of the page's table after the comment that names it."""
    after = PAGE.split(f"<!-- {name}:")[1].split("\n\n")[1]
    rows = [line.strip("| ").split(" | ") for line in after.splitlines()[2:]]
    assert rows
    return rows


def code(cell: str) -> str:
    """The text of a cell that is code, or "refused"."""
    return cell[1:-1].replace("⏎", "\n").replace("⇥", "\t") if cell[0] == "`" else cell


def content(text: str) -> Any:
    """A text in quotes, or messages as [role: content, …]."""
    if text.startswith("["):
        pairs = [part.split(": ", 1) for part in text[1:-1].split(", ")]
        return [{"role": role, "content": said} for role, said in pairs]
    return json.loads(text.replace("\n", "\\n")) if text else ""


def tokenizer() -> PreTrainedTokenizerFast:
    """Each byte is a token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*letters, "</s>"])}
    bytewise = Tokenizer(models.BPE(vocabulary, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="</s>")
    made.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return made


BYTES = tokenizer()
EOS = (BYTES.eos_token_id,)


def check(file: Path, prompts: str, examples: str, comparisons: str) -> None:
    """Read a file in the three ways and compare with the cells of the page."""
    if prompts == "refused":
        with pytest.raises(InputError, match=re.escape(file.name)):
            load_texts(str(file))
    else:
        assert load_texts(str(file)) == [content(prompts)]
    if examples == "refused":
        with pytest.raises(InputError, match=re.escape(file.name)):
            load_examples(str(file), BYTES, EOS, held_out=0.0)
    else:
        prompt, response = (content(part) for part in re.split(r" ?→ ", examples))
        start, (rest,) = continued_ids(prompt, [response], BYTES, EOS)
        (example,) = load_examples(str(file), BYTES, EOS, held_out=0.0)
        assert (example.prompt_ids, example.response_ids) == (tuple(start), tuple(rest))
    if comparisons == "refused":
        with pytest.raises(InputError, match=re.escape(file.name)):
            read_comparisons(file)
    else:
        prompt, better, worse = (content(part) for part in re.split(r" [→>] ", comparisons))
        (read,) = read_comparisons(file)
        assert (read.prompt, *read.candidates) == (prompt, better, worse)


def write(file: Path, text: str) -> None:
    """Write the content of a file that is text, compressed if its name says so."""
    kind = COMPRESSED.get(file.suffix)
    if kind is None:
        file.write_bytes(text.encode())
    elif file.suffix == ".zst":
        import pyarrow

        file.write_bytes(pyarrow.compress(text.encode(), codec="zstd", asbytes=True))
    else:
        with kind(file, "wb") as packed:
            packed.write(text.encode())


def write_dataset(folder: Path, row: Any, ending: str) -> Path:
    """Write a row as a Parquet or an Arrow file."""
    data = Dataset.from_list([row])
    if ending == ".parquet":
        data.to_parquet(str(folder / "a.parquet"))
        return folder / "a.parquet"
    data.save_to_disk(str(folder / "saved"))
    return next((folder / "saved").glob("*.arrow"))


def endings_of(cell: str) -> str:
    return re.match(r"`(\.\w+)`", cell)[1]


@pytest.mark.parametrize("cells", table("files"), ids=lambda cells: cells[0])
def test_each_file_of_the_page(cells, tmp_path):
    ending, text = endings_of(cells[0]), code(cells[1])
    expected = [code(cell) for cell in cells[2:]]
    if ending in (".parquet", ".arrow"):
        check(write_dataset(tmp_path, json.loads(text), ending), *expected)
        return
    for packed in ("", *COMPRESSED):
        file = tmp_path / f"a{ending}{packed}"
        write(file, text)
        check(file, *expected)


def files(row: Any, folder: Path) -> Iterator[Path]:
    """A row in each kind of file that can hold it."""
    kinds = OBJECTS if isinstance(row, dict) else OBJECTS[:3]
    for ending in kinds:
        file = folder / f"a{ending}"
        if ending in (".parquet", ".arrow"):
            file = write_dataset(folder, row, ending)
        else:
            write(file, json.dumps([row] if ending == ".json" else row))
        yield file
    if isinstance(row, dict) and all(isinstance(value, str) for value in row.values()):
        for ending, mark in TABLES.items():
            with (folder / f"a{ending}").open("w", newline="") as file:
                csv.writer(file, delimiter=mark).writerows([row.keys(), row.values()])
            yield folder / f"a{ending}"


@pytest.mark.parametrize("cells", table("rows"), ids=lambda cells: cells[0])
def test_each_row_of_the_page_in_each_file(cells, tmp_path):
    for file in files(json.loads(code(cells[0])), tmp_path):
        check(file, *(code(cell) for cell in cells[1:]))


def test_the_page_has_every_ending_and_column():
    assert {endings_of(cells[0]) for cells in table("files")} == {*ENDINGS, ".md"}
    assert all(f"`{packed}`" in PAGE for packed in COMPRESSED)
    rows = [json.loads(code(cells[0])) for cells in table("rows")]
    assert {name for row in rows if isinstance(row, dict) for name in row} >= {*PROMPT_COLUMNS}
    order = re.search(r"\*\*Prompts\*\*: (.*?)\.\n", PAGE, re.DOTALL)[1]
    named = [name for name in re.findall(r"`(\w+)`", order) if name != "input"]
    assert named == list(PROMPT_COLUMNS)
