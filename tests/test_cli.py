"""`rlhf-gym`: its commands, options from files, help on keywords, and what it says comes next."""

import importlib
import inspect
import json
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import gymnasium
import pytest

import agents.cli
import rlhf_gym
from agents import rloo
from agents.cli import train_policy
from agents.cli.arguments import all_given, given
from agents.cli.field_help import field_help
from agents.cli.parsing import parse
from agents.cli.subcommands import SUBCOMMANDS, called_as
from rlhf_gym.errors import InputError
from rlhf_gym.tasks import text
from rlhf_gym.tasks.keywords import REQUIRED, check_keywords, keywords_of
from rlhf_gym.utils.nearest import did_you_mean, nearest

ROOT = Path(__file__).parents[1]
ENV_IDS = [name for name in gymnasium.registry if name.startswith("rlhf_gym/")]
EXACT = ("--env", "rlhf_gym/Exact-v0", "--device", "cpu")
TINY = (*EXACT, "--total-tokens", 64, "--num-envs", 16, "--n-minibatches", 2, "--n-epochs", 1)


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `rlhf-gym` in this process: its exit status and output."""
    monkeypatch.setattr(sys, "argv", ["rlhf-gym"])

    def run(*arguments: object, code: int = 0) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as raised:
            agents.cli.main([str(argument) for argument in arguments])
        out = capsys.readouterr()
        assert raised.value.code == code, out.out + out.err
        return out.err if code else out.out

    return run


@pytest.fixture(scope="module")
def policy_run(tmp_path_factory) -> Path:
    """A run folder of `rlhf-gym policy` on Exact-v0, with a keyword of its own."""
    run_dir = tmp_path_factory.mktemp("cli") / "a policy"
    arguments = (*TINY, "--env-kwargs", "kl_coef", 0.3, "split", "train", "--run-dir", run_dir)
    with pytest.raises(SystemExit) as raised:
        agents.cli.main(["policy", *map(str, arguments)])
    assert raised.value.code == 0
    return run_dir


def test_the_table_has_every_command_and_no_other():
    modules = {
        file.stem
        for file in (ROOT / "agents" / "cli").glob("*.py")
        if re.search(r"^def cli\(", file.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert {one.module for one in SUBCOMMANDS.values()} == modules
    assert {file.stem for file in (ROOT / "scripts").glob("*.py")} == modules


def test_the_overview_imports_nothing_slow():
    heavy = "('torch', 'gymnasium', 'tyro', 'rich', 'numpy', 'transformers')"
    for arguments in ([], ["--help"], ["help"]):
        code = (
            "import sys, agents.cli\n"
            f"try: agents.cli.main({arguments})\n"
            "except SystemExit as end: assert end.code == 0\n"
            f"print([name for name in {heavy} if name in sys.modules])"
        )
        said = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
        ).stdout.splitlines()
        assert said[-1] == "[]"
        for name, one in SUBCOMMANDS.items():
            assert sum(line.split() == [name, *one.help.split()] for line in said) == 1


def test_version_and_mistyped_commands(command):
    assert command("--version") == f"rlhf-gym {rlhf_gym.__version__}\n"
    assert "did you mean evaluate?" in command("evaluat", code=2)
    assert "--help lists all" in command("qqqq", code=2)


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_help_shows_the_name_that_was_called(name, command):
    for said in (command(name, "--help"), command("help", name)):
        assert f"usage: rlhf-gym {name} " in said
        assert f"`rlhf-gym {name}" in said
        assert "--config FILE" in said
        assert "python scripts/" not in said.split("\n\n")[1]


def test_a_script_is_called_as_a_script(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scripts/train_policy.py", "--help"])
    from agents.cli import train_policy

    with pytest.raises(SystemExit):
        train_policy.cli()
    said = capsys.readouterr().out
    assert "usage: scripts/train_policy.py " in said
    assert "`python scripts/train_policy.py" in said
    assert called_as("evaluate") == "python scripts/evaluate.py"
    monkeypatch.setattr(sys, "argv", ["/usr/bin/rlhf-gym"])
    assert called_as("evaluate") == "rlhf-gym evaluate"


def test_options_are_found_before_all_are_known():
    words = "--env A --envs=B --env_kwargs k 1 --algorithm=x --algorithm y --flag".split()
    assert given(words, "env") == "A"
    assert given(words, "envs") == "B"
    assert all_given(words, "env-kwargs") == ["k", "1"]
    assert given(words, "algorithm") == "y"
    assert given(words, "flag") is None


@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("Reviews-v0", "rlhf_gym/Reviews-v0"),
        ("reviews-v0", "rlhf_gym/Reviews-v0"),
        ("rlhf_gym/Review-v0", "rlhf_gym/Reviews-v0"),
        ("CartPole-v1", None),
    ],
)
def test_nearest_names(name, right):
    assert nearest(name, ENV_IDS) == right
    assert did_you_mean(name, ENV_IDS) == (f"; did you mean {right}?" if right else "")


# ------------------------------------------------------------------ mistyped names


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("policy", "--env", "Reviews-v0"), "rlhf_gym/Reviews-v0"),
        (("policy", "--env", "reviews-v0"), "rlhf_gym/Reviews-v0"),
        (("evaluate", "--policy", "x", "--env", "exact-v0"), "rlhf_gym/Exact-v0"),
        (("run", "--env", "rlhf_gym/reviews"), "rlhf_gym/Reviews-v0"),
        (("doctor", "--env", "Exact"), "rlhf_gym/Exact-v0"),
        (("policy", "--algorithm", "PPO"), "ppo"),
        (("run", "--algorithm", "pp0"), "ppo"),
        (("compare", "--algorithms", "ppo", "RLOO"), "rloo"),
        (("compare", "--algorithms", "ppo", "--options", "ppo.gamm_lambda", 1), "gae_lambda"),
        (("policy", *EXACT, "--env-kwargs", "max_new_token", 3), "max_new_tokens"),
        (("doctor", "--env-kwargs", "KL-coef", 3), "kl_coef"),
        (("evaluate", "--policy", "x", *EXACT, "--env-kwargs", "variantt", "plain"), "variant"),
    ],
)
def test_mistyped_names_get_the_nearest_right_one(arguments, hint, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = command(*arguments, code=2)
    assert f"did you mean {hint}?" in said
    assert said.startswith("error: ") and said.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_an_algorithm_that_lacks_a_package_is_not_called_mistyped(monkeypatch, command):
    monkeypatch.setitem(sys.modules, "agents.rloo", None)
    said = command("policy", "--algorithm", "rloo", code=2)
    assert "cannot import the algorithm 'rloo'" in said and "did you mean" not in said


# ------------------------------------------------------------------ keywords of environments


@pytest.mark.parametrize("env_id", ENV_IDS)
def test_listed_keywords_are_those_that_are_accepted(env_id, monkeypatch):
    class Accepted(Exception):
        """The keywords passed every signature on the way."""

    original = inspect.signature(text.load_parts)

    def load_parts(**keywords: Any) -> None:
        original.bind_partial(**keywords)  # a TypeError for an unknown one
        raise Accepted

    def accepts(name: str) -> bool:
        # What needs a reward model of the user's gets one; a number of rows is no keyword.
        words = {"reward_model": "a:b", name: None}
        if name == "variant":
            words["variant"] = "plain"
        if name == "rows_per_prompt":
            words[name] = 1
        try:
            gymnasium.make_vec(env_id, num_envs=1, **words)
        except Accepted:
            return True
        except TypeError:
            return False
        raise AssertionError("load_parts was not called")

    monkeypatch.setattr(text, "load_parts", load_parts)
    listed = [word.name for word in keywords_of(env_id)]
    known = {word.name for other in ENV_IDS for word in keywords_of(other)}
    assert sorted(listed) == sorted(name for name in {*known, "nonsense"} if accepts(name))
    assert accepts("render_mode"), "a keyword of Gymnasium's, which no command line sets"
    assert "render_mode" not in listed
    assert all(word.description and word.type for word in keywords_of(env_id))
    check_keywords(env_id, listed)
    with pytest.raises(InputError, match="no keyword 'nonsense'"):
        check_keywords(env_id, ["nonsense"])


def test_defaults_are_those_of_the_environment():
    def default(env_id: str, name: str) -> object:
        (found,) = [word for word in keywords_of(env_id) if word.name == name]
        return found.default

    assert default("rlhf_gym/Text-v0", "max_new_tokens") == 48
    assert default("rlhf_gym/Text-v0", "reference") is REQUIRED
    assert default("rlhf_gym/Reviews-v0", "max_new_tokens") == 40
    assert default("rlhf_gym/TLDR-v0", "temperature") == 0.7
    made = gymnasium.make_vec("rlhf_gym/Exact-v0", num_envs=1, device="cpu").unwrapped
    assert default("rlhf_gym/Exact-v0", "max_new_tokens") == made.max_new_tokens
    assert default("rlhf_gym/Exact-v0", "kl_coef") == made.objective.kl_coef


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("policy", ("--env", "rlhf_gym/Text-v0")),
        ("run", ("--env=rlhf_gym/Text-v0",)),
        ("evaluate", ("--env", "rlhf_gym/Text-v0")),
        ("doctor", ("--env", "rlhf_gym/Text-v0")),
        ("compare", ("--envs", "rlhf_gym/Text-v0", "rlhf_gym/HH-v0")),
    ],
)
def test_env_kwargs_help_prints_every_keyword(name, more, command):
    said = command(name, *more, "--env-kwargs", "help")
    for word in keywords_of("rlhf_gym/Text-v0"):
        assert f"  {word.name}  ({word.type}; " in said
    assert "kl_coef  (a number; default 0.1)" in said
    assert "reference  (a text; required)" in said
    assert ("Keywords of rlhf_gym/HH-v0" in said) == (name == "compare")


def test_env_kwargs_help_says_what_is_missing(command, policy_run):
    assert "--env ID" in command("evaluate", "--env-kwargs", "help", code=2)
    said = command("evaluate", "--policy", policy_run, "--env-kwargs", "help")
    assert "Keywords of rlhf_gym/Exact-v0" in said
    said = command("policy", "--env", "Reviews-v0", "--env-kwargs", "help", code=2)
    assert "did you mean rlhf_gym/Reviews-v0?" in said


# ------------------------------------------------------------------ options from files


@dataclass(frozen=True)
class Options:
    """Options of every kind."""

    data: str
    """Required."""
    count: int = 1
    """A whole number."""
    rate: float = 0.5
    """A number."""
    names: tuple[str, ...] = ()
    """Texts."""
    where: Path | None = None
    """A path."""
    env_kwargs: dict[str, str] = field(default_factory=dict)
    """A mapping."""
    run_dir: Path = Path("runs/x")
    """A folder."""
    resume: bool = False
    """A switch."""


def parsed(*arguments: object, **options: Any) -> Any:
    return parse(Options, None, list(map(str, arguments)), "rlhf-gym x", **options)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


YAML = """
data: here
count: 3
rate: 1e-3
names: [a, b]
where: some/where
env-kwargs: {kl_coef: 0.2, dense: true, cuts: [[a, {b: 1}]], gold: m:f}
"""


def test_a_file_fills_the_options_and_the_command_line_wins(tmp_path):
    file = write(tmp_path / "o.yaml", YAML)
    keywords = {"kl_coef": "0.2", "dense": "true", "cuts": '[["a", {"b": 1}]]', "gold": "m:f"}
    expected = Options("here", 3, 1e-3, ("a", "b"), Path("some/where"), keywords)
    assert parsed("--config", file) == expected
    said = parsed(f"--config={file}", "--count", 4, "--env-kwargs", "kl_coef", "0.1", "seed", "1")
    assert (said.count, said.data) == (4, "here")
    assert said.env_kwargs == {**keywords, "kl_coef": "0.1", "seed": "1"}
    as_json = write(tmp_path / "o.json", json.dumps({"data": "x", "rate": 2}))
    assert isinstance(parsed("--config", as_json).rate, float)
    with pytest.raises(SystemExit) as raised:
        parsed("--config", write(tmp_path / "p.yaml", "count: 2"))
    assert raised.value.code == 2, "data is still required"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "data: x\ncuont: 1", "no option 'cuont'; did you mean count?"),
        ("a.yaml", "data: x\ncount: many", "count: 'many' is not a whole number"),
        ("a.yaml", "rate: fast", "rate: 'fast' is not a number"),
        ("a.yaml", "names: a", "names: 'a' is not a list, each a text"),
        ("a.yaml", "where: 3", "where: 3 is not a path or None"),
        ("a.yaml", "env_kwargs: [a]", "env_kwargs: ['a'] is not a mapping of names to values"),
        ("a.yaml", "resume: 1", "resume: 1 is not True or False"),
        ("a.yaml", "- data", "must map names of options to values"),
        ("a.yaml", "", "must map names of options to values"),
        ("a.yaml", "data: x\nnames: [a\ncount: 1", "line 3"),
        ("a.yaml", "data: \x00", "a.yaml is not valid YAML"),
        ("a.json", '{"data": "x",\n "count" 1}', "a.json, line 2: Expecting ':'"),
    ],
)
def test_bad_files_are_named(tmp_path, name, text, message):
    file = write(tmp_path / name, text)
    with pytest.raises(InputError) as raised:
        parsed("--config", file)
    assert str(file) in str(raised.value)
    assert message in str(raised.value)


def test_files_that_cannot_be_read_are_named(tmp_path, command):
    with pytest.raises(InputError, match=r"there is no file nowhere\.yaml"):
        parsed("--config", "nowhere.yaml")
    with pytest.raises(InputError, match=r"has no config\.json"):
        parsed("--config", tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"data: caf\xe9")
    assert "latin.yaml" in command("doctor", "--config", tmp_path / "latin.yaml", code=2)


def test_a_run_folder_is_gone_on_with_only_as_it_was(tmp_path):
    run_dir = tmp_path / "runs" / "x"
    record = {"data": "d", "count": 2, "env_kwargs": {"k": "1"}, "run_dir": "runs/x"}
    record |= {"resume": True}
    file = write(run_dir / "config.json", json.dumps(record))
    for named in (run_dir, file):
        same = parsed("--config", named)
        assert same.run_dir == run_dir, "wherever the folder is now"
        assert not same.resume, "that is asked each time"
        with pytest.raises(InputError, match="count = 2, not 3; give the same options to continue"):
            parsed("--config", named, "--count", 3)
        with pytest.raises(InputError, match=r"env_kwargs\.k = 1, not 2"):
            parsed("--config", named, "--env-kwargs", "k", 2)
        new = parsed("--config", named, "--count", 3, "--run-dir", tmp_path / "y", "--resume")
        assert (new.count, new.data, new.run_dir) == (3, "d", tmp_path / "y")
        assert new.resume
    # A file that is no record of a run names its folder like any other option.
    own = write(tmp_path / "mine.yaml", "data: d\nrun_dir: elsewhere\nresume: true")
    assert parsed("--config", own, "--count", 3).run_dir == Path("elsewhere")
    assert parsed("--config", own).resume


def algorithm_options(*arguments: object) -> Any:
    from agents.cli import train_policy

    return parse(train_policy.Config, None, list(map(str, arguments)), "p", with_algorithm=True)


def test_the_file_may_name_the_algorithm_and_its_options(tmp_path, capsys):
    flat = write(tmp_path / "a.yaml", "algorithm: sb3_a2c\nuse_rms_prop: true\nseed: 4")
    config = algorithm_options("--config", flat, "--learning-rate", 1e-3)
    assert (config.algorithm, config.seed) == ("sb3_a2c", 4)
    assert config.algorithm_options.use_rms_prop
    assert config.algorithm_options.learning_rate == 1e-3
    nested = {"algorithm": "ppo", "algorithm_options": {"n_epochs": 7, "critic": "shared"}}
    file = write(tmp_path / "b.json", json.dumps(nested))
    assert algorithm_options("--config", file).algorithm_options.n_epochs == 7
    assert algorithm_options("--config", file, "--n-epochs", 2).algorithm_options.n_epochs == 2
    other = algorithm_options("--config", file, "--algorithm", "sb3_ppo")
    assert other.algorithm_options == type(other.algorithm_options)()
    assert "the options of ppo are ignored" in capsys.readouterr().out
    for bad, message in (
        ("algorithm_options: {n_epoch: 1}", "no option 'n_epoch'; did you mean n_epochs?"),
        ("algorithm_options: {critic: x}", "critic: 'x' is not one of auto, shared"),
        ("algorithm: PPO", "did you mean ppo?"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            algorithm_options("--config", write(tmp_path / "c.yaml", bad))


def test_a_run_repeats_from_its_folder(policy_run, tmp_path, command):
    assert "nothing to do" in command("policy", "--config", policy_run)
    said = command("policy", "--config", policy_run, "--seed", 1, code=2)
    assert "seed = 0, not 1; give the same options" in said
    again = tmp_path / "new"
    command("policy", "--config", policy_run, "--seed", 1, "--run-dir", again)
    old, new = (json.loads((run / "config.json").read_text()) for run in (policy_run, again))
    assert {name for name in old if old[name] != new[name]} == {"seed", "run_dir"}


# ------------------------------------------------------------------ what comes next


def next_commands(said: str) -> list[list[str]]:
    """The commands that a training says come next, each as its words."""
    lines = said[said.index("next:") :].removeprefix("next:").splitlines()
    return [shlex.split(line) for line in lines]


def test_the_next_commands_of_a_policy_run(policy_run, command):
    said = command("policy", "--config", policy_run)
    assert f"results: {policy_run}" in said
    commands = next_commands(said)
    assert [words[:2] for words in commands] == [["rlhf-gym", "evaluate"], ["rlhf-gym", "report"]]
    for words in commands:
        said = command(*words[1:])
    assert str(policy_run / "report.html") in said
    what = json.loads((policy_run / "evaluation_config.json").read_text())
    assert what["policy"] == str(policy_run / "policy")
    assert what["env"] == "rlhf_gym/Exact-v0"
    assert what["env_kwargs"] == {"kl_coef": "0.3"}, "the split is held_out again"


def test_the_next_commands_of_other_trainings_parse(tmp_path):
    from agents.cli import rlhf, train_reward_model, train_sft

    rows = tmp_path / "my rows.jsonl"
    sft = train_sft.next_steps(train_sft.Config("m", str(rows), tmp_path / "sft"))
    assert str(tmp_path / "sft" / "policy") in sft
    reward = train_reward_model.next_steps(
        train_reward_model.Config(str(rows), "m", format="hh", max_tokens=9, held_out=0.2)
    )
    evaluation, policy = next_commands(reward)
    assert evaluation[1] == "evaluate-reward-model" and policy[1] == "policy"
    for words in (evaluation, policy, *next_commands(sft)):
        module = importlib.import_module(f"agents.cli.{SUBCOMMANDS[words[1]].module}")
        config = parse(module.Config, None, words[2:], with_algorithm=words[1] == "policy")
        if words[1] == "evaluate-reward-model":
            assert (config.data, config.held_out, config.max_tokens) == (str(rows), 0.2, 9)
        elif words[1] == "policy":
            assert config.env_kwargs["prompts"] == str(rows)
            check_keywords(config.env, config.env_kwargs)
    assert f"open {tmp_path / 'report.html'}" in rlhf.next_steps(rlhf.Config(run_dir=tmp_path))


def test_the_next_policy_of_a_reward_model_reads_the_same_prompts(tmp_path, save_lm, command):
    rows = [{"mr": c, "ref1": "a b", "quality1": 2, "ref2": "b", "quality2": 1} for c in "abcdefgh"]
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in [*rows, {"mr": 7}]))
    said = command(
        *("reward-model", "--data", data, "--backbone", save_lm(), "--held-out", 0.3),
        *("--run-dir", tmp_path / "rm", "--on-bad-row", "skip", "--device", "cpu"),
    )
    _, policy = next_commands(said)
    config = parse(train_policy.Config, None, policy[2:], with_algorithm=True)
    assert config.env_kwargs["prompt_format"] == "e2e"
    assert "on_bad_row" not in config.env_kwargs, "a format leaves such rows out by itself"
    keywords = {"max_prompt_tokens": 4, "max_new_tokens": 2, "split": "all", "device": "cpu"}
    env = gymnasium.make_vec(config.env, num_envs=1, **config.env_kwargs, **keywords)
    assert len(env.prompts) == 8


def test_the_next_policy_of_a_reward_model_gets_the_split_and_skips_rows(tmp_path):
    from agents.cli.train_reward_model import Config, next_steps

    config = Config("owner/data", "m", tmp_path, data_split="test", on_bad_row="skip")
    policy = next_commands(next_steps(config))[1]
    words = iter(policy[policy.index("--env-kwargs") + 1 :])
    given = dict(zip(words, words, strict=True))
    assert (given["prompt_split"], given["on_bad_row"]) == ("test", "skip")
    assert "prompt_format" not in given, "nothing has said yet what the rows are"


# ------------------------------------------------------------------ evaluation from a run folder


SMALL = ("--episodes", 16, "--prompts", 4, "--reference-samples", 8, "--device", "cpu")


def test_evaluate_finds_the_environment_of_a_run(policy_run, tmp_path, command):
    said = command("evaluate", "--policy", policy_run, *SMALL, "--run-dir", tmp_path / "a")
    line = f"environment of {policy_run / 'config.json'}: --env rlhf_gym/Exact-v0 kl_coef 0.3\n"
    assert line in said
    more = ("--env-kwargs", "kl_coef", 0.5)
    policy = policy_run / "policy"
    command("evaluate", "--policy", policy, *SMALL, *more, "--run-dir", tmp_path / "b")
    # With --env the command line says all.
    said = command("evaluate", "--policy", policy, *EXACT, *SMALL, "--run-dir", tmp_path / "c")
    assert "environment of" not in said
    what = {
        name: json.loads((tmp_path / name / "evaluation_config.json").read_text()) for name in "abc"
    }
    assert {one["policy"] for one in what.values()} == {str(policy)}
    assert [what[name]["env_kwargs"].get("kl_coef") for name in "abc"] == ["0.3", "0.5", None]
    # The record of an evaluation repeats it.
    more = ("--seed", 1, "--run-dir", tmp_path / "d")
    command("evaluate", "--config", tmp_path / "b", *more)
    again = json.loads((tmp_path / "d" / "evaluation_config.json").read_text())
    assert again == {**what["b"], "seed": 1, "run_dir": str(tmp_path / "d")}


def test_evaluate_says_what_is_missing(tmp_path, command):
    said = command("evaluate", "--policy", tmp_path / "none", code=2)
    assert "give --env ID" in said
    write(tmp_path / "config.json", '{"model": "m"}')
    said = command("evaluate", "--policy", tmp_path / "policy", code=2)
    assert "config.json names none" in said


def test_evaluate_takes_the_reward_model_of_the_journey(tmp_path):
    from agents.cli.evaluate import Config, with_environment

    run_dir = tmp_path / "journey"
    record = {"env": "rlhf_gym/Text-v0", "env_kwargs": {"prompts": "p"}, "human": "m:f"}
    write(run_dir / "config.json", json.dumps(record))
    for folder in (run_dir, run_dir / "rounds" / "1"):
        write(folder / "policy" / "config.json", "{}")
        for named in (folder, folder / "policy"):
            found = with_environment(Config(str(named)))
            assert found.policy == str(folder / "policy")
            assert found.env_kwargs == {
                "prompts": "p", "reward_model": str(folder / "reward_model"), "gold": "m:f"
            }  # fmt: skip


def test_help_texts_are_paragraphs_of_inherited_docstrings():
    texts = field_help(rloo.Config)
    assert texts.keys() == {each.name for each in fields(rloo.Config)}
    assert not any("\n" in text or "  " in text for text in texts.values())
    assert texts["n_minibatches"].startswith("Optimiser steps per pass, at least 1. Each takes")


def test_the_options_of_the_algorithm_are_its_own_class():
    arguments = ["--algorithm", "rloo", "--n-epochs", "3"]
    config = parse(train_policy.Config, None, arguments, with_algorithm=True)
    assert type(config.algorithm_options) is rloo.Config  # so that it pickles
    assert config.algorithm_options == rloo.Config(n_epochs=3)
