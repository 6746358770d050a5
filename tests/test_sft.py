"""Supervised fine-tuning: what is learnt, that packing changes nothing, and the script."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
)

from rlhf_gym.errors import InputError
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.lm.loading import disable_dropout
from rlhf_gym.training import sft
from rlhf_gym.training.sft import can_pack, response_loss, response_nll, train_sft
from rlhf_gym.training.sft_data import (
    IGNORED,
    SFTData,
    SFTExample,
    collate,
    likeliest_eos,
    load_examples,
    pack,
    prepare,
)
from rlhf_gym.training.trainer_progress import RichProgress

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "train_sft.py"
SHARED = ROOT.parent / "shared"
WORDS = "a b c d e f g h i j user assistant".split()
BOS, EOS = 1, 2


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words apart by spaces; opens every text with <s>."""
    names = ["<unk>", "<s>", "</s>", *WORDS]
    tokenizer = Tokenizer(
        models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = (
        "{{ bos_token }}{% for m in messages %} {{ m['role'] }} {{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %} assistant{% endif %}"
    )
    return fast


def tiny_lm(family: str = "llama", eos: int | list[int] = EOS) -> CausalLM:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    common = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": BOS,
        "eos_token_id": eos,
        "pad_token_id": None,
    }
    config = {
        "gpt2": lambda: GPT2Config(**common),
        "llama": lambda: LlamaConfig(**common, intermediate_size=64, num_key_value_heads=1),
        "opt": lambda: OPTConfig(**common, ffn_dim=64, word_embed_proj_dim=32),
    }[family]()
    disable_dropout(config)
    model = AutoModelForCausalLM.from_config(config).eval()
    for weight in model.parameters():  # so that what a token sees matters much
        weight.data.mul_(3)
    return CausalLM.wrap(model, tokenizer)


def examples_of(*lengths: tuple[int, int], seed: int = 0) -> list[SFTExample]:
    """Random examples with (prompt, response) of these lengths."""
    draw = torch.Generator().manual_seed(seed)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 13, (n,), generator=draw).tolist())

    return [SFTExample(ids(p), ids(r)) for p, r in lengths]


def gradient(lm: CausalLM) -> Tensor:
    parts = [weight.grad.flatten() for weight in lm.model.parameters() if weight.grad is not None]
    lm.model.zero_grad()
    return torch.cat(parts)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_packing_changes_neither_loss_nor_gradient(family):
    lm = tiny_lm(family)
    examples = examples_of((3, 5), (1, 9), (4, 2), (0, 7), (6, 6))
    learnt = sum(len(e.ids) - e.start for e in examples)
    rows = pack(examples, 20)
    assert len(rows) == 3
    inputs = collate(rows)
    labels = inputs.pop("labels")
    packed = response_loss(lm, lm.model(**inputs, use_cache=False), labels)
    packed.backward()
    packed_gradient = gradient(lm)

    alone = torch.tensor(0.0)
    for e in examples:
        outputs = lm.model(input_ids=torch.tensor([e.ids]), use_cache=False)
        labels = torch.tensor([[IGNORED] * e.start + list(e.ids[e.start :])])
        loss = response_loss(lm, outputs, labels, learnt)
        loss.backward()
        alone += loss.detach()
    torch.testing.assert_close(packed.detach(), alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed_gradient, gradient(lm), atol=1e-5, rtol=1e-4)
    assert response_nll(lm, examples)["value"] == pytest.approx(float(alone), abs=1e-5)


@pytest.mark.parametrize(("family", "packs"), [("gpt2", True), ("llama", True), ("opt", False)])
def test_a_family_that_mixes_packed_examples_is_found_out(family, packs):
    assert can_pack(tiny_lm(family), examples_of((3, 5), (4, 9))) is packs


def test_every_example_is_packed_once():
    examples = examples_of(*((p, r) for p in range(5) for r in range(1, 9)))
    rows = pack(examples, 16)
    assert sorted(e for row in rows for e in row) == sorted(examples)
    assert max(sum(len(e.ids) for e in row) for row in rows) <= 16
    assert len(rows) == -(-sum(len(e.ids) for e in examples) // 16)


def test_only_responses_are_labelled():
    rows = [[SFTExample((1, 5), (6, 2)), SFTExample((), (7, 8, 2))], [SFTExample((1,), (9,))]]
    inputs = collate(rows)
    no = IGNORED
    assert inputs["labels"].tolist() == [[no, no, 6, 2, no, 8, 2], [no, 9, no, no, no, no, no]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2], [0, 1, 0, 1, 2, 3, 4]]
    assert inputs["input_ids"].tolist() == [[1, 5, 6, 2, 7, 8, 2], [1, 9, 0, 0, 0, 0, 0]]


def test_predictions_of_the_prompt_cannot_matter():
    lm = tiny_lm()
    labels = collate([[SFTExample((1, 5, 6), (7, 2)), SFTExample((1, 4), (8,))]])["labels"]
    logits = torch.randn(1, labels.shape[1], lm.vocab_size)
    loss = response_loss(lm, SimpleNamespace(logits=logits), labels)
    other = torch.randn_like(logits)
    predicts = [2, 3, 6]
    other[:, predicts] = logits[:, predicts]
    assert response_loss(lm, SimpleNamespace(logits=other), labels) == loss
    other[:, 6] += torch.randn(lm.vocab_size)
    assert response_loss(lm, SimpleNamespace(logits=other), labels) != loss


def test_responses_are_closed_cut_and_counted():
    lm = tiny_lm()
    given = [
        SFTExample((1, 3), (4, 5)),
        SFTExample((1, 3), (4, EOS)),  # closed already
        SFTExample((1, 3), (4, 5, 6, 7)),  # no room for the EOS
        SFTExample((1, 3, 4, 5, 6, 7), (8,)),  # no room for a response
        SFTExample((), (4,), held_out=True),
    ]
    data = prepare(lm, given, max_tokens=6)
    assert [e.response_ids for e in data.train] == [(4, 5, EOS), (4, EOS), (4, 5, 6, 7)]
    assert [e.response_ids for e in data.held_out] == [(4, EOS)]
    assert (data.cut, data.dropped, data.eos_token_id) == (1, 1, EOS)


def test_the_eos_that_the_model_uses_is_chosen():
    lm = tiny_lm(eos=[BOS, EOS])
    examples = examples_of((2, 6))
    ids = torch.tensor([examples[0].ids])
    hidden = lm.model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, -1]
    for used, other in ((BOS, EOS), (EOS, BOS)):
        with torch.no_grad():
            lm.model.get_output_embeddings().weight[used] = hidden
            lm.model.get_output_embeddings().weight[other] = -hidden
        assert likeliest_eos(lm, examples, 64) == used
    assert prepare(lm, examples, 64, eos_token_id=BOS).train[0].ids[-1] == BOS


@pytest.mark.parametrize(
    ("max_tokens", "eos", "message"),
    [(65, None, "64 positions"), (1, None, "at least 2"), (8, 5, "ends at"), (2, None, "no exam")],
)
def test_options_that_do_not_suit_the_model(max_tokens, eos, message):
    with pytest.raises(InputError, match=message):
        prepare(tiny_lm(), examples_of((4, 4)), max_tokens, eos)


def load(tmp_path: Path, *rows: object, column: str | None = None) -> list[SFTExample]:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return load_examples(str(file), tiny_tokenizer(), (EOS,), column=column, held_out=0.0)


def test_rows_of_every_kind(tmp_path):
    user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    a, b, of_user, of_assistant = tiny_tokenizer()("a b user assistant")["input_ids"][1:]
    text = ((BOS, a), (b,), False, False)
    chat = ((BOS, of_user, a, of_assistant), (b,), False, True)
    assert load(tmp_path, {"prompt": "a", "response": " b"}) == [text]
    assert load(tmp_path, {"prompt": "a ", "completion": "b"}) == [text]
    assert load(tmp_path, "a b", {"text": "a b"}) == [((BOS,), (a, b), False, False)] * 2
    assert load(tmp_path, {"story": "a b"}, column="story") == [((BOS,), (a, b), False, False)]
    assert load(tmp_path, {"prompt": [user], "response": "b"}) == [chat]
    assert load(tmp_path, {"prompt": [user], "completion": [answer]}) == [chat]
    assert load(tmp_path, {"messages": [user, answer]}, column="messages") == [chat]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a"},
        {"prompt": "a", "response": ""},
        {"prompt": "a", "response": True},
        {"prompt": "a", "response": [{"role": "assistant", "content": "b"}]},
        {"text": [{"role": "assistant", "content": "b"}]},
        {"text": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]},
        {"other": "a"},
        3,
    ],
)
def test_a_bad_row_is_named(tmp_path, row):
    with pytest.raises(InputError, match="line 2"):
        load(tmp_path, "a", row)


def alphabet(lm: CausalLM, tmp_path: Path) -> SFTData:
    """Ten letters in a circle: what comes next is certain."""
    letters = WORDS[:10]
    rows = [
        " ".join(letters[(at + k) % 10] for k in range(n)) for at in range(10) for n in range(3, 15)
    ]
    file = tmp_path / "alphabet.json"
    file.write_text(json.dumps(rows))
    return prepare(lm, load_examples(str(file), lm.tokenizer, lm.eos_ids, held_out=0.2), 32)


def test_training_lowers_the_held_out_loss_and_saves_what_it_measured(tmp_path):
    lm = tiny_lm()
    lm.model.generation_config.temperature = 0.7
    data = alphabet(lm, tmp_path)
    figures = train_sft(lm, data, tmp_path / "run", epochs=20, learning_rate=1e-2, batch_tokens=256)
    before, after = figures["held_out_loss_before"], figures["held_out_loss_after"]
    assert figures["packed"]
    assert figures["rows"] < figures["examples"] / 2
    assert after["n"] == figures["held_out_examples"] > 5
    assert after["value"] < 1.0 < before["value"]
    loaded = CausalLM.load(str(tmp_path / "run" / "policy"))
    assert response_nll(loaded, data.held_out) == pytest.approx(after, abs=1e-6)
    assert loaded.eos_ids == lm.eos_ids
    assert loaded.model.config.use_cache
    # At the temperature of the training, and so of the measured loss, not at the model's own.
    assert loaded.model.generation_config.temperature == 1.0
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"policy", "checkpoints_sft"}


@pytest.mark.parametrize("updates", [1, 2])
def test_a_training_of_few_updates_learns(tmp_path, updates):
    lm = tiny_lm()
    data = alphabet(lm, tmp_path)
    tokens = sum(len(example.ids) for example in data.train)
    figures = train_sft(
        lm, data, None, epochs=updates, learning_rate=1e-2, batch_tokens=2 * tokens, progress=False
    )
    assert figures["updates"] == updates
    before, after = figures["held_out_loss_before"], figures["held_out_loss_after"]
    assert after["value"] < before["value"] - 0.05


def weights(lm: CausalLM) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in lm.model.parameters()])


def test_stopped_and_resumed_is_never_stopped(tmp_path, monkeypatch):
    options = {"epochs": 2, "learning_rate": 1e-2, "batch_tokens": 128}
    whole = tiny_lm()
    data = alphabet(whole, tmp_path)
    train_sft(whole, data, tmp_path / "whole", **options)

    def stop(self, args, state, control, **kwargs):
        if state.global_step == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RichProgress, "on_step_end", stop)
        train_sft(tiny_lm(), data, tmp_path / "stopped", **options)
    assert not (tmp_path / "stopped" / "policy").exists()
    # As if the run had been killed while it wrote a later checkpoint.
    (tmp_path / "stopped" / "checkpoints_sft" / "checkpoint-99").mkdir()
    resumed = tiny_lm()
    figures = train_sft(resumed, data, tmp_path / "stopped", resume=True, **options)
    assert figures["updates"] > 7
    assert torch.equal(weights(resumed), weights(whole))


def test_micro_batches_change_nothing(tmp_path, monkeypatch):
    results = []
    for pass_tokens in (1 << 14, 3 * 32):  # an update is 9 rows, at once or in threes
        monkeypatch.setattr(sft, "MAX_TOKENS", pass_tokens)
        lm = tiny_lm()
        train_sft(lm, alphabet(lm, tmp_path), tmp_path / "run", batch_tokens=256)
        results.append(weights(lm))
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-4)


def script(*options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, options)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_the_script(tmp_path, monkeypatch, capsys):
    lm = tiny_lm()
    lm.model.save_pretrained(tmp_path / "model")
    lm.tokenizer.save_pretrained(tmp_path / "model")
    alphabet(lm, tmp_path)
    run_dir, data = tmp_path / "run", tmp_path / "alphabet.json"
    options = ["--model", tmp_path / "model", "--run-dir", run_dir, "--max-tokens", 32]
    done = script(*options, "--data", data, "--batch-tokens", 256)
    assert done.returncode == 0, done.stderr
    assert "held-out loss" in done.stdout
    assert "fine-tuning: " in done.stderr
    assert {path.name for path in run_dir.iterdir()} == {
        "config.json",
        "data.json",
        "policy",
        "sft.json",
    }
    assert json.loads((run_dir / "config.json").read_text())["max_tokens"] == 32
    assert json.loads((run_dir / "sft.json").read_text())["cut"] == 0

    # From here on in this process: importing torch and transformers again takes seconds.

    def status(*more: object) -> int:
        monkeypatch.setattr(sys, "argv", ["train_sft.py", *map(str, (*options, *more))])
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return exit_.value.code

    assert status("--data", data, "--batch-tokens", 256) == 0
    assert "nothing to do" in capsys.readouterr().out
    # What is done is done with one model, one file and one set of options.
    assert status("--data", tmp_path / "missing.json", "--batch-tokens", 256) == 2
    assert f"data = {data}, not {tmp_path / 'missing.json'}" in capsys.readouterr().err
    assert status("--data", data) == 2
    assert "batch_tokens = 256, not 8192" in capsys.readouterr().err

    other = tmp_path / "other"
    assert status("--run-dir", other, "--data", tmp_path / "missing.json") == 2
    assert "missing.json" in capsys.readouterr().err
    assert status("--run-dir", other, "--data", data, "--max-tokens", 65) == 2
    assert "64 positions" in capsys.readouterr().err
    assert not other.exists()

    (other / "checkpoints_sft").mkdir(parents=True)
    (other / "config.json").write_text((run_dir / "config.json").read_text())
    assert status("--run-dir", other, "--data", data, "--batch-tokens", 256, "--seed", 1) == 2
    assert "seed = 0, not 1" in capsys.readouterr().err


@pytest.fixture
def command(tmp_path, monkeypatch, capfd, caplog):
    """Runs the script in this process on a small model; returns its status and what it says."""
    lm = tiny_lm()
    lm.model.save_pretrained(tmp_path / "model")
    lm.tokenizer.save_pretrained(tmp_path / "model")

    def run(*options: object) -> tuple[int, str]:
        usual = ("--model", tmp_path / "model", "--max-tokens", 8, "--held-out", 0)
        monkeypatch.setattr(sys, "argv", ["train_sft.py", *map(str, (*usual, *options))])
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        said = capfd.readouterr()
        return exit_.value.code, said.out + said.err + caplog.text

    return run


def test_the_script_takes_split_and_column(command, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for name, n in (("train", 4), ("test", 2)):
        rows = [json.dumps({"story": f"a b {WORDS[i]}", "text": 3 * "a "}) for i in range(n)]
        (data / f"{name}.jsonl").write_text("\n".join(rows))
    options = ("--data", data, "--data-split", "test", "--column", "story")
    code, said = command(*options, "--run-dir", tmp_path / "run")
    assert code == 0, said
    assert "2 examples to train on" in said
    assert f"{data}: columns not used: text" in said
    assert f"prompts {data} prompt_split test prompt_column story" in said
    code, said = command("--data", data, "--column", "tale", "--run-dir", tmp_path / "no")
    assert code == 2
    assert "has no column 'tale'; it has story, text; name the column to read with --column" in said
    data = data / "train.jsonl"
    code, said = command("--data", data, "--data-split", "test", "--run-dir", tmp_path / "no")
    assert (code, "has no split 'test'" in said) == (2, True)


def test_the_script_shows_bad_rows_or_skips_them(command, tmp_path):
    data = tmp_path / "a.jsonl"
    good, bad = {"prompt": "a", "response": "b"}, [{"prompt": "a"}, {"prompt": "", "response": "b"}]
    data.write_text("\n".join(json.dumps(row) for row in [good, good, *4 * bad]))
    code, said = command("--data", data, "--run-dir", tmp_path / "run")
    assert code == 2
    assert "8 of 10 rows cannot be used (no such column: 4, empty: 4)" in said
    assert said.count(f"{data}, line ") == 5
    assert "to leave them out: --on-bad-row skip" in said
    assert "Traceback" not in said
    options = ("--data", data, "--on-bad-row", "skip", "--run-dir", tmp_path / "run")
    code, said = command(*options)
    assert code == 0, said
    assert "8 of 10 rows cannot be used (no such column: 4, empty: 4) and are left out" in said
    figures = json.loads((tmp_path / "run" / "sft.json").read_text())
    assert figures["bad_rows"] == {"no such column": 4, "empty": 4}
    assert figures["examples"] == 2


def test_examples_that_are_cut_or_dropped_are_said(tmp_path):
    lm = tiny_lm()
    lm.model.save_pretrained(tmp_path / "model")
    lm.tokenizer.save_pretrained(tmp_path / "model")
    data = tmp_path / "a.jsonl"
    rows = [("a", "b"), ("a", 9 * "b "), (9 * "a ", "b"), (9 * "a ", "c")]
    data.write_text("\n".join(json.dumps({"prompt": p, "response": r}) for p, r in rows))
    options = ("--model", tmp_path / "model", "--max-tokens", 8, "--held-out", 0)
    done = script(*options, "--data", data, "--run-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert (
        "max_tokens is 8: 2 of 4 examples are dropped, because their prompt leaves no room for a "
        "response; 1 of 4 responses lose their end and their EOS; raise it to keep them"
    ) in done.stderr


def test_a_chat_that_the_template_refuses_is_named_with_its_row(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system') }}"
    user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    (tmp_path / "a.json").write_text(json.dumps(["a", [user, answer]]))
    with pytest.raises(InputError, match=r"row 2: the chat template .* no system"):
        load_examples(str(tmp_path / "a.json"), tokenizer, (EOS,))
    tokenizer.chat_template = None
    with pytest.raises(InputError, match=r"the tokenizer .* has no chat template"):
        load_examples(str(tmp_path / "a.json"), tokenizer, (EOS,))


@pytest.mark.slow
def test_real_stories(tmp_path):
    model, data = SHARED / "models/stories260K", SHARED / "data/tinystories-1000.json"
    if not (model.exists() and data.exists()):
        pytest.skip(f"{SHARED} is not there")
    run_dir = tmp_path / "run"
    options = ["--model", model, "--data", data, "--run-dir", run_dir, "--learning-rate", 5e-4]
    done = script(*options)
    assert done.returncode == 0, done.stderr
    figures = json.loads((run_dir / "sft.json").read_text())
    assert figures["eos_token_id"] == 1
    before, after = figures["held_out_loss_before"], figures["held_out_loss_after"]
    assert after["value"] < before["value"] - 0.05
