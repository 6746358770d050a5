"""One reader for every file: the same rows from each form, and a clear refusal of the rest."""

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import gymnasium
import pytest
from datasets import Dataset, DatasetDict

from rlhf_gym.data.prompt_rows import load_texts
from rlhf_gym.data.rows import load_rows
from rlhf_gym.errors import InputError
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.training.sft_data import load_examples

TEXTS = ["Tell me about cats", 'One day, a "boy" went out', "Why is the sky blue?"]
ROWS = [{"id": str(i), "prompt": text} for i, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
QUOTED = [text.replace('"', '""') for text in TEXTS]
CSV = "id,prompt\n" + "".join(f'{i},"{text}"\n' for i, text in enumerate(QUOTED))
TSV = "id\tprompt\n" + "".join(f'{i}\t"{text}"\n' for i, text in enumerate(QUOTED))

FILES: dict[str, bytes] = {
    "a.json": json.dumps(ROWS).encode(),
    "a.JSON": json.dumps(ROWS).encode(),
    "a.jsonl": LINES.encode(),
    "a.ndjson": LINES.encode(),
    "a.JSONL": LINES.encode(),
    "a.csv": CSV.encode(),
    "a.tsv": TSV.encode(),
    "a.txt": "\n".join(TEXTS).encode(),
    "bom.txt": b"\xef\xbb\xbf" + "\n".join(TEXTS).encode(),
    "bom.csv": b"\xef\xbb\xbf" + CSV.encode(),
    "bom.jsonl": b"\xef\xbb\xbf" + LINES.encode(),
    "bom.json": b"\xef\xbb\xbf" + json.dumps(ROWS).encode(),
    "crlf.txt": "\r\n".join(TEXTS).encode(),
    "crlf.csv": CSV.replace("\n", "\r\n").encode(),
    "crlf.jsonl": LINES.replace("\n", "\r\n").encode(),
    "a.jsonl.gz": gzip.compress(LINES.encode()),
    "a.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "a.csv.bz2": bz2.compress(CSV.encode()),
    "a.txt.xz": lzma.compress("\n".join(TEXTS).encode()),
}


@pytest.mark.parametrize("name", FILES)
def test_each_form_of_a_file_has_the_same_texts(name, tmp_path):
    (tmp_path / name).write_bytes(FILES[name])
    assert load_texts(str(tmp_path / name)) == TEXTS


def test_a_folder_and_a_pattern_are_their_files_in_order(tmp_path):
    for i, text in enumerate(TEXTS):
        (tmp_path / f"part-{i}.jsonl").write_text(json.dumps({"prompt": text}))
    assert load_texts(str(tmp_path)) == TEXTS
    assert load_texts(str(tmp_path / "part-[12].jsonl")) == TEXTS[1:]
    assert [where for where, _ in load_rows(str(tmp_path))][1].endswith(", row 2")
    pattern = load_rows(str(tmp_path / "part-*.jsonl"))
    assert [where for where, _ in pattern][1].endswith("part-1.jsonl, line 1")


def test_the_files_of_a_folder_belong_to_splits(tmp_path):
    for name, text in zip(("train", "test"), TEXTS, strict=False):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": text}))
    assert load_texts(str(tmp_path)) == TEXTS[:1]
    assert load_texts(str(tmp_path), split="test") == TEXTS[1:2]


def test_what_the_datasets_library_has_saved_is_read(tmp_path):
    data = Dataset.from_list(ROWS)
    data.save_to_disk(str(tmp_path / "saved"))
    DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(str(tmp_path / "splits"))
    data.to_parquet(str(tmp_path / "a.parquet"))
    for name in ("saved", "splits", "a.parquet"):
        assert load_texts(str(tmp_path / name)) == TEXTS
    assert load_texts(str(tmp_path / "splits"), split="test") == TEXTS[1:2]
    with pytest.raises(InputError, match="has the splits train, test, not 'dev'"):
        load_texts(str(tmp_path / "splits"), split="dev")
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    assert load_texts(str(arrow)) == TEXTS


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.yaml", b"- prompt: x", r"files end in \.json, .*rename or convert"),
        ("a", b"text", r"files end in"),
        ("a.md", b"text", r"files end in"),
        ("a.parquet.gz", b"", r"files end in"),
        ("a.txt", LINES.encode(), "holds JSON, not texts; rename it to .jsonl"),
        ("a.txt", json.dumps(ROWS, indent=1).encode(), "holds JSON, not texts"),
        ("a.txt", CSV.encode(), r"holds a table with a header, not texts; rename it to \.csv"),
        ("a.txt", TSV.encode(), r"rename it to \.tsv"),
        ("a.json", LINES.encode(), "rename it to .jsonl"),
        ("a.csv", b"id,prompt\n1,x\n2\n", r"row 2 has not as many fields as the header"),
        ("a.csv", b"id,prompt\n1,x,y\n", r"row 1 has not as many fields"),
        ("a.csv", b"prompt\n\xff\n", r"line 2 is not UTF-8"),
        ("a.txt", "x".encode("utf-16"), r"line 1 is not UTF-8"),
        ("a.parquet", b"junk", r"a\.parquet cannot be read"),
        ("a.jsonl.gz", b"junk", r"cannot be read after line 0"),
    ],
)
def test_what_cannot_be_read_is_refused(name, data, said, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=said):
        load_rows(str(tmp_path / name))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("nowhere.csv", "no such file"),
        ("*.jsonl", "no file matches"),
        (".", "cannot load the dataset"),
    ],
)
def test_sources_without_a_file_are_refused(source, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=said):
        load_rows(source)


def test_texts_that_only_look_like_data_are_texts(tmp_path):
    lines: list[Any] = ["[Scene: a bar] He said:", "Well, prompt, text and all", "{name} went"]
    file = Path(tmp_path / "a.txt")
    file.write_text("\n".join(lines))
    assert load_texts(str(file)) == lines


HALF = "I like it \ud83d very much"


@pytest.mark.parametrize("row", [HALF, {"prompt": HALF}, [{"role": "user", "content": HALF}]])
def test_half_a_character_is_named_with_its_row(row, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(["fine", row]))
    with pytest.raises(InputError, match=r"a\.json, row 2: .* half a character"):
        load_texts(str(tmp_path / "a.json"))


def test_half_a_character_in_a_text_to_learn_is_named(tmp_path, save_lm):
    rows = [{"prompt": "a b", "response": "c"}, {"prompt": "a b", "response": HALF}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    lm = CausalLM.load(save_lm("llama"))
    with pytest.raises(InputError, match=r"row 2: .* half a character"):
        load_examples(str(tmp_path / "a.json"), lm.tokenizer, lm.eos_ids)


def test_half_a_character_in_a_named_prompt_is_refused():
    env = gymnasium.make("rlhf_gym/Exact-v0", device="cpu")
    with pytest.raises(InputError, match="half a character"):
        env.reset(options={"prompt": "a \udc00"})
