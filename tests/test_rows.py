"""One reader for every file: the same rows from each form, and a clear refusal of the rest."""

import bz2
import gzip
import json
import logging
import lzma
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium
import pyarrow
import pytest
from datasets import Dataset, DatasetDict
from rich.console import Console

from agents.runs.examination import examine_environment
from agents.runs.journey_options import JourneyOptions
from agents.runs.stages import Journey, collect
from agents.runs.training import train
from rlhf_gym.data.bad_rows import BadRows
from rlhf_gym.data.prompt_rows import load_texts
from rlhf_gym.data.rows import load_rows
from rlhf_gym.errors import InputError
from rlhf_gym.evaluation.record import evaluate_policy
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.preferences.formats import read_comparisons
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
    "a.jsonl.zst": pyarrow.compress(LINES.encode(), codec="zstd", asbytes=True),
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
        ("a.jsonl.zst", b"junk", r"cannot be read after line 0"),
        ("a.jsonl.zst", FILES["a.jsonl.zst"][:-3], r"cannot be read after line"),
        ("a.csv", b"prompt,prompt\nx,y\n", r"header .* names a column twice"),
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


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_frames_of_a_zst_file_are_one_file_and_a_build_without_it_is_named(tmp_path, monkeypatch):
    file = tmp_path / "a.jsonl.zst"
    file.write_bytes(2 * FILES["a.jsonl.zst"])
    assert load_texts(str(file)) == 2 * TEXTS
    monkeypatch.setattr(pyarrow, "Codec", SimpleNamespace(is_available=lambda name: False))
    with pytest.raises(InputError, match=r"install the package pyarrow"):
        load_texts(str(file))


def test_tables_in_a_folder_are_texts(tmp_path):
    (tmp_path / "train.csv").write_text("id,prompt\n1,007\n2,NA\n3,1e5\n")
    (tmp_path / "test.csv").write_text("id,prompt\n4,1.50\n")
    assert load_texts(str(tmp_path)) == ["007", "NA", "1e5"]
    assert load_texts(str(tmp_path), split="test") == ["1.50"]


def test_a_file_has_no_splits(tmp_path):
    (tmp_path / "a.jsonl").write_text(LINES)
    for source in ("a.jsonl", "*.jsonl"):
        with pytest.raises(InputError, match="is a file, which has no split 'test'"):
            load_texts(str(tmp_path / source), split="test")


def test_numbers_become_texts_and_other_values_are_refused_by_row(tmp_path):
    values = [3, 0.5, 10**20, 1e5]
    Dataset.from_dict({"n": values[:2]}).to_parquet(str(tmp_path / "a.parquet"))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"n": v}) for v in values))
    assert load_texts(str(tmp_path / "a.parquet"), column="n") == ["3.0", "0.5"]
    assert load_texts(str(tmp_path / "a.jsonl"), column="n") == [
        "3",
        "0.5",
        f"1{20 * '0'}",
        "100000.0",
    ]
    for bad in (True, None, [], ["x"], {}, float("nan"), float("inf")):
        (tmp_path / "b.jsonl").write_text('{"n": 1}\n' + json.dumps({"n": bad}))
        with pytest.raises(InputError, match=r"b\.jsonl, line 2: column 'n'"):
            load_texts(str(tmp_path / "b.jsonl"), column="n")


def test_the_first_five_bad_rows_are_shown_and_all_are_counted(tmp_path):
    lines = [*5 * ['{"prompt": "x"}', '{"prompt": ""}'], "{", '{"prompt": true}', '{"wrong": "x"}']
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(lines))
    with pytest.raises(InputError) as raised:
        load_texts(str(file))
    said = str(raised.value)
    assert said.startswith(f"{file}: 8 of 13 rows cannot be used (empty: 5, ")
    for part in ("cannot be read: 1", "not a text: 1", "no such column: 1", "the first 5 of them"):
        assert part in said
    assert said.count(f"\n  {file}, line ") == 5
    assert "line 11: not valid JSON" in said
    assert "line 2: column 'prompt': a text or a list of chat messages is needed, not ''" in said
    assert said.endswith("on_bad_row='skip' (in commands --env-kwargs on_bad_row skip)")


def test_bad_rows_are_skipped_on_demand_and_counted(tmp_path, caplog):
    file = tmp_path / "a.jsonl"
    file.write_text('"x"\n{"prompt": null}\n{\n"y"\n""')
    bad = BadRows()
    assert load_texts(str(file), bad_rows=bad) == ["x", "y"]
    assert bad.counts == {"empty": 2, "cannot be read": 1}
    (line,) = warnings(caplog)
    assert "3 of 5 rows cannot be used (empty: 2, cannot be read: 1) and are left out" in line
    file.write_text('""\n{')
    with pytest.raises(InputError, match="2 of 2 rows cannot be used"):
        load_texts(str(file), bad_rows=BadRows())
    (tmp_path / "a.jsonl.gz").write_bytes(b"junk")
    with pytest.raises(InputError, match="cannot be read after line 0"):
        load_texts(str(tmp_path / "a.jsonl.gz"), bad_rows=BadRows())


def test_columns_that_are_not_used_are_named_once(tmp_path, caplog):
    row = {"instruction": "a", "input": "b", "output": "c", "tools": [], "id": 1}
    (tmp_path / "a.json").write_text(json.dumps(3 * [row]))
    for _ in range(2):
        assert load_texts(str(tmp_path / "a.json")) == 3 * ["a\n\nb"]
    assert warnings(caplog) == [f"{tmp_path / 'a.json'}: columns not used: id, output, tools"]
    caplog.clear()
    assert load_texts(str(tmp_path / "a.json"), column="instruction") == 3 * ["a"]
    assert warnings(caplog) == [
        f"{tmp_path / 'a.json'}: columns not used: id, input, output, tools"
    ]


def test_answers_at_the_end_of_a_prompt_are_left_out_and_said(tmp_path, caplog):
    user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    (tmp_path / "a.json").write_text(json.dumps([[user, answer], [user, answer, user], [user]]))
    assert load_texts(str(tmp_path / "a.json")) == [[user], [user, answer, user], [user]]
    assert ["1 of 3 rows: the assistant's messages" in line for line in warnings(caplog)] == [True]
    (tmp_path / "a.json").write_text(json.dumps([[answer]]))
    with pytest.raises(InputError, match="row 1: the chat has no message of the user"):
        load_texts(str(tmp_path / "a.json"))


def test_prompts_and_comparisons_know_the_same_speakers(tmp_path):
    names = ("human", "ChatGPT", "observation", "model", "User")
    roles = ("user", "assistant", "tool", "assistant", "user")
    turns = [{"from": name, "value": name} for name in names]
    expected = [{"role": r, "content": name} for r, name in zip(roles, names, strict=True)]
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps({"conversations": turns, "chosen": "a", "rejected": "b"}))
    assert load_texts(str(file)) == [expected]
    assert [row.prompt for row in read_comparisons(file)] == [expected]


def test_two_system_messages_are_refused_unless_they_are_one(tmp_path):
    chat = [{"role": "system", "content": "x"}, {"role": "user", "content": "a"}]
    file = tmp_path / "a.json"
    file.write_text(json.dumps([{"system": "x", "messages": chat}]))
    assert load_texts(str(file)) == [chat]
    file.write_text(json.dumps([{"system": "y", "messages": chat}]))
    with pytest.raises(InputError, match=r"row 1: .* two different system messages"):
        load_texts(str(file))
    file.write_text(json.dumps([{"system": "y", "dialogue": chat[1:], "story": "z"}]))
    assert load_texts(str(file), column="dialogue")[0][0] == {"role": "system", "content": "y"}
    assert load_texts(str(file), column="story") == ["z"]


@pytest.fixture
def text_env(save_lm, tmp_path):
    """Makes environments on a file of ten prompts that fit, and a number that do not."""

    def make(long: int, name: str = "p.json", **keywords: Any) -> Any:
        rows: list[Any] = [f"{a} b" for a in "abcdefghij"]
        rows += [f"a b c d e {a} {b}" for a in "abcdefg" for b in "abcd"][:long]
        (tmp_path / name).write_text(json.dumps(rows + keywords.pop("more", [])))
        options = {"max_prompt_tokens": 4, "max_new_tokens": 3, "split": "all", **keywords}
        return gymnasium.make_vec(
            "rlhf_gym/Text-v0",
            num_envs=2,
            reference=save_lm("llama"),
            reward_model="conftest:text_reward",
            prompts=str(tmp_path / name),
            device="cpu",
            **options,
        ).unwrapped

    return make


def test_prompts_that_are_dropped_are_said_once_with_the_fix(text_env, tmp_path, caplog):
    for split in ("all", "all", "train"):
        env = text_env(20, split=split)
    assert warnings(caplog) == [
        f"{tmp_path / 'p.json'}: 20 of 30 prompts are dropped: 20 longer than max_prompt_tokens, "
        "which is 4; raise max_prompt_tokens, or cut texts with prompt_keep='last'"
    ]
    caplog.clear()
    env = text_env(20, prompt_keep="last")
    assert env.prompts.counts == {"kept": len(env.prompts), "dropped": 0}
    assert warnings(caplog) == []


def test_skipped_prompts_are_counted_by_reason(text_env):
    with pytest.raises(InputError, match="on_bad_row='skip'"):
        text_env(1, more=[None, "", 7])
    env = text_env(1, more=[None, "", 7], on_bad_row="skip")
    reasons = {"empty": 2, "not a text": 1}
    assert env.prompts.counts == {"kept": 10, "dropped": 1, "bad_rows": reasons}
    with pytest.raises(InputError, match="on_bad_row"):
        text_env(1, on_bad_row="drop")


def test_an_environment_takes_the_split_of_a_folder(text_env, tmp_path, save_lm):
    data = tmp_path / "data"
    data.mkdir()
    for name, text in (("train", "a b"), ("test", "c d")):
        (data / f"{name}.jsonl").write_text(json.dumps({"question": text}))
    (tmp_path / "p.json").unlink(missing_ok=True)
    made = {
        split: gymnasium.make_vec(
            "rlhf_gym/Text-v0",
            reference=save_lm("llama"),
            reward_model="conftest:text_reward",
            prompts=str(data),
            prompt_split=split,
            split="all",
            max_prompt_tokens=4,
            max_new_tokens=3,
            device="cpu",
        ).unwrapped
        for split in ("train", "test")
    }
    decode = made["test"].objective.reference.tokenizer.decode
    said = {name: decode(env.prompts.ids[0][1:]) for name, env in made.items()}
    assert said == {"train": "a b", "test": "c d"}


def test_rlhf_reads_the_split_of_its_comparisons(text_env, tmp_path):
    data = tmp_path / "comparisons"
    data.mkdir()
    for name, texts in (("train", ["a", "b"]), ("test", ["c", "d"])):
        row = {"prompt": "x", "chosen": texts[0], "rejected": texts[1]}
        (data / f"{name}.jsonl").write_text(json.dumps(row))
    options = JourneyOptions(data=str(data), data_split="test", run_dir=tmp_path, human="m:f")
    journey = Journey(options, None, {}, Console(quiet=True))
    collect(journey, text_env(0), journey.rounds[0], None)
    (read,) = read_comparisons(tmp_path / "comparisons.jsonl")
    assert list(read.candidates) == ["c", "d"]


def test_dropped_prompts_are_in_the_run_folder_and_in_the_evaluation(text_env, tmp_path):
    env = text_env(20)
    train(env, "reinforce", total_tokens=12, run_dir=tmp_path / "run", progress=False)
    sizes = {"episodes": 4, "prompts": 2, "reference_samples": 2}
    evaluate_policy(
        tmp_path / "run" / "policy", env, **sizes, run_dir=tmp_path / "run", progress=False
    )
    for name in ("policy.json", "evaluation.json"):
        figures = json.loads((tmp_path / "run" / name).read_text())
        assert figures["prompts"] == {"kept": 10, "dropped": 20}, name


@pytest.mark.parametrize(("long", "problems"), [(10, []), (11, ["prompts"])])
def test_the_doctor_reports_it_if_most_prompts_are_dropped(text_env, long, problems):
    said: list[str] = []
    found = examine_environment(text_env(long), rows=4, say=said.append)
    assert [problem.check for problem in found] == problems
    assert f"prompts: 10 kept, {long} dropped" in said
