"""Every command refuses what it cannot use with status 2 and one message: file, cause and fix."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from agents.cli import doctor, evaluate, rlhf, train_policy, train_reward_model, train_sft
from agents.cli import evaluate_reward_model as judge
from rlhf_gym.errors import InputError, UnreachableError
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.utils import hub

Command = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command in this process; it must end with status 2, and its message is returned."""

    def run(command: Any, *arguments: object) -> str:
        with pytest.raises(SystemExit) as raised:
            command.cli([str(argument) for argument in arguments])
        said = capsys.readouterr().err
        assert raised.value.code == 2, said
        assert "Traceback" not in said
        return said[said.index("error: ") :]

    return run


@pytest.fixture
def files(tmp_path: Path, save_lm: Any, save_reward_model: Any, prompt_file: str) -> dict[str, Any]:
    """Files that are in order, and a file where a folder is needed."""
    letters = "a b c d e f g h i j k l".split()
    pairs = [{"prompt": a, "candidates": [f"{a} b", f"{a} c"], "best": 0} for a in letters]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    rows = [{"prompt": a, "response": f"{a} b"} for a in letters]
    (tmp_path / "sft.json").write_text(json.dumps(rows))
    (tmp_path / "file").write_text("")
    return {
        "lm": save_lm(),
        "reward": save_reward_model(),
        "prompts": prompt_file,
        "pairs": tmp_path / "pairs.json",
        "sft": tmp_path / "sft.json",
        "file": tmp_path / "file",
        "run": tmp_path / "run",
        "folder": tmp_path,
    }


def commands(files: dict[str, Any], **changed: Any) -> dict[str, tuple[Any, ...]]:
    """A command line of each command, each but for what is changed in order."""
    f = {**files, **changed}
    task = ("prompts", f["prompts"], "split", "all", "max_prompt_tokens", 8, "max_new_tokens", 4)
    text = ("--env", "rlhf_gym/Text-v0", "--env-kwargs", *task)
    return {
        "sft": (train_sft, "--model", f["lm"], "--data", f["sft"], "--run-dir", f["run"]),
        "reward-model": (
            *(train_reward_model, "--data", f["pairs"], "--backbone", f["lm"]),
            *("--run-dir", f["run"], "--held-out", "0.4"),
        ),
        "evaluate-reward-model": (
            *(judge, "--data", f["pairs"], "--reward-model", f["reward"], "--run-dir", f["run"]),
        ),
        "policy": (
            *(train_policy, *text, "reference", f["lm"], "reward_model", f["reward"]),
            *("--run-dir", f["run"], "--num-envs", 4, "--total-tokens", 8),
        ),
        "evaluate": (
            *(evaluate, *text, "reference", files["lm"], "reward_model", f["reward"]),
            *("--policy", f["lm"], "--run-dir", f["run"], "--prompts", 2, "--episodes", 2),
        ),
        "doctor": (doctor, *text, "reference", files["lm"], "reward_model", f["reward"])
        + (("--policy", f["lm"]) if f["lm"] != files["lm"] else ()),
        "rlhf": (rlhf, *text, "reference", f["lm"], "--run-dir", f["run"]),
    }


def message(refused: Command, line: tuple[Any, ...], *more: object) -> str:
    return refused(line[0], *line[1:], *more)


LOADING = ["sft", "reward-model", "evaluate", "doctor", "policy"]


@pytest.mark.parametrize("name", LOADING)
def test_a_file_where_a_models_folder_is_needed(refused, files, name):
    line = commands(files, lm=files["file"])[name]
    assert f"'{files['file']}' is a file; give the folder" in message(refused, line)


@pytest.mark.parametrize("name", LOADING)
def test_a_path_that_is_not_there(refused, files, name):
    line = commands(files, lm=files["folder"] / "none")[name]
    assert "none': there is no such folder" in message(refused, line)


@pytest.mark.parametrize("name", LOADING)
def test_a_weight_that_is_not_a_number(refused, files, name):
    folder = files["folder"] / "nan"
    shutil.copytree(files["lm"], folder)
    weights = load_file(folder / "model.safetensors")
    weights[min(k for k in weights if "mlp" in k)][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    said = message(refused, commands(files, lm=folder)[name])
    assert f"of '{folder}' has a NaN or an infinity" in said


RUNNING = ["sft", "reward-model", "evaluate-reward-model", "policy", "evaluate", "rlhf"]


@pytest.mark.parametrize("inside", ["", "run"])
@pytest.mark.parametrize("name", RUNNING)
def test_a_file_where_the_run_folder_should_be(refused, files, name, inside):
    line = commands(files, run=files["file"] / inside)[name]
    assert f"{files['file']} is a file, but a folder is needed" in message(refused, line)


@pytest.mark.parametrize("name", ["sft", "reward-model", "evaluate-reward-model"])
def test_more_tokens_than_the_context_has(refused, files, name):
    said = message(refused, commands(files)[name], "--max-tokens", 65)
    assert "65" in said
    assert "64" in said


DEPTHS = (900, 990, 5_000, 200_000)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("ending", [".json", ".jsonl"])
@pytest.mark.parametrize("name", ["sft", "reward-model", "evaluate-reward-model", "policy"])
def test_deeply_nested_json(refused, files, name, ending, depth):
    deep = files["folder"] / f"deep{ending}"
    row = '{"prompt": ' + "[" * depth + "]" * depth + ', "candidates": ["a", "b"], "best": 0}'
    deep.write_text(f"[{row}]" if ending == ".json" else row)
    line = commands(files, sft=deep, pairs=deep, prompts=deep)[name]
    assert str(deep) in message(refused, line)


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_config_that_is_nested_deeply(refused, files, depth):
    folder = files["folder"] / "deep"
    shutil.copytree(files["lm"], folder)
    (folder / "config.json").write_text('{"a": ' + "[" * depth + "]" * depth + "}")
    assert str(folder) in message(refused, commands(files, lm=folder)["sft"])


def edited(files: dict[str, Any], file: str, **values: Any) -> Path:
    folder: Path = files["folder"] / "edited"
    shutil.copytree(files["lm"], folder)
    found = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**found, **values}))
    return folder


@pytest.mark.parametrize(
    ("file", "values", "said"),
    [
        (
            "config.json",
            {"model_type": "own", "auto_map": {"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"}},
            "trust_remote_code is always False",
        ),
        (
            "tokenizer_config.json",
            {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["t.T", None]}},
            "trust_remote_code is always False",
        ),
        ("config.json", {"model_type": "own"}, "does not recognize this architecture"),
        ("config.json", {"hidden_size": "wide"}, "hidden_size"),
        ("config.json", {"hidden_act": "none"}, "none"),
        ("config.json", {"vocab_size": 31}, "have another shape; fix the config"),
        ("config.json", {"quantization_config": {"quant_method": "fp8"}}, "are quantized"),
    ],
)
def test_a_config_that_cannot_be_used(files, file, values, said):
    with pytest.raises(InputError, match=said):
        CausalLM.load(str(edited(files, file, **values)))


def test_a_hub_that_cannot_be_reached_is_not_waited_for(refused, files, monkeypatch):
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    line = commands(files, lm="someone/some-model")["sft"]
    assert "it is not on this machine, and HF_HUB_OFFLINE is set" in message(refused, line)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.constants, "ENDPOINT", "http://localhost:9")
    monkeypatch.setattr(hub.urllib.request, "getproxies", dict)
    with pytest.raises(UnreachableError, match="no connection to http://localhost:9"):
        CausalLM.load("someone/some-model")
    monkeypatch.setattr(hub.urllib.request, "getproxies", lambda: {"https": "http://proxy"})
    assert hub.no_hub() is None


def no_answer(prompts: list[str], responses: list[str]) -> None:
    return None


def breaks(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(len(r) / 0) for r in responses]


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        ("test_refusals:no_answer", "the reward 'no_answer' returned None"),
        ("test_refusals:breaks", "the reward 'breaks' failed on"),
        ("test_refusals.breaks", "did you mean the function test_refusals:breaks?"),
    ],
)
@pytest.mark.parametrize("name", ["policy", "evaluate", "doctor"])
def test_a_reward_function_that_fails(refused, files, name, reward, said):
    assert said in message(refused, commands(files, reward=reward)[name])
