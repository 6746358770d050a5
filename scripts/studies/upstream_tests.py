"""`python scripts/studies/upstream_tests.py --suite sb3 --source DIR` runs other projects' tests.

It runs the tests of Stable-Baselines3, sb3-contrib or Gymnasium on this project's environments and
policies. `--source` is the unpacked source distribution of the installed version (Gymnasium's has
few tests: give it a folder with the repository's `tests/`). The tests are copied to a temporary
folder, where environment ids and class names are exchanged (`EXCHANGES` below) and nothing else;
`upstream_names.py` next to them fills in the keywords of a policy. The script writes rows.json, one
row per test: suite, test, algorithm, outcome (passed, failed, not applicable), reason.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from agents.cli.command import run
from rlhf_gym.errors import InputError
from rlhf_gym.utils.files import write_json

HERE = Path(__file__).parent
EXACT, REVIEWS = '"rlhf_gym/Exact-v0"', '"rlhf_gym/Reviews-v0"'

LIBRARY = (
    # "module:id", so that environments in other processes know the id too.
    (r'"(CartPole|Pendulum|MountainCarContinuous|CliffWalking)-v\d"', f'"rlhf_gym:{EXACT[1:]}'),
    (r'(?<=\["env_id"\] == )"rlhf_gym:', '"'),
    # Longer than one step.
    (r'^    env_id = "rlhf_gym:[^"]*"', '    env_id = "exchanged:upstream/Exact-fixed-v0"'),
    (r'"MlpPolicy"', '"CausalLMPolicy"'),
    (r"^from (stable_baselines3|sb3_contrib) import", "from exchanged import"),
    (r"^import stable_baselines3 as sb3$", "import exchanged as sb3"),
    (
        r"^(from stable_baselines3.common.envs import (?:\([^)]*\)|.*))$",
        r"\1\nfrom exchanged import IdentityEnv, IdentityEnvBox",
    ),
    (
        r"^(from sb3_contrib.common.envs import (?:\([^)]*\)|.*))$",
        r"\1\nfrom exchanged import InvalidActionEnvDiscrete",
    ),
    (r"^import ale_py$", "from exchanged import IdentityEnv"),
    (r"^gym.register_envs\(ale_py\)$", ""),
    # Numbers that belong to the environment: the length and the return of an episode.
    (
        r"env_kwargs=dict\(max_episode_steps=max_episode_length\)",
        "env_kwargs=dict(stop_at_eos=False)",
    ),
    (r"max_episode_length = 100", "max_episode_length = 4"),
    (
        r"n_steps_per_episode, n_eval_episodes = 200, 2",
        "n_steps_per_episode, n_eval_episodes = 4, 2",
    ),
    (
        r'A2C\("CausalLMPolicy", "rlhf_gym:rlhf_gym/Exact-v0", seed=0\)\n    n_steps_per',
        'A2C("CausalLMPolicy", IdentityEnv(), seed=0)\n    n_steps_per',
    ),
    (r"reward_threshold=0\.0\)", "reward_threshold=100.0)"),
    (r"assert average_reward > 0\.0", "assert average_reward != 0.0"),
    (r"assert last_mean_reward == 100\.0", "assert last_mean_reward != 0.0"),
    (r"eval_callback.last_mean_reward == 100\.0", "eval_callback.last_mean_reward != 0.0"),
    (r"assert len\(record\) == 1\n    else:", "assert len(record) == 0\n    else:"),
    (r"assert loss > 0$", "assert loss != 0"),
    # The exception of a refused option: this project's is a ValueError.
    (r"(an error\n +with pytest.raises\()AssertionError\)", r"\1(AssertionError, ValueError))"),
    # File names, in which an id's namespace would be a folder.
    (r'name_prefix=f"agent-\{env_id\}"', 'name_prefix="agent-CartPole-v1"'),
)
GYMNASIUM = (
    (r'"CartPole-v1"', EXACT),
    (r'"MountainCar-v0"', REVIEWS),
    (
        r"^from gymnasium.envs.classic_control import CartPoleEnv$",
        "from exchanged import TokenEnv, exact_env",
    ),
    (
        r"^from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv$",
        "from exchanged import TokenVectorEnv, exact_vector_env",
    ),
    (r"vector_entry_point=CartPoleVectorEnv", "vector_entry_point=exact_vector_env"),
    (
        r'entry_point=CartPoleEnv|(?<=-v0", )CartPoleEnv(?=\))',
        lambda m: m[0].replace("CartPoleEnv", "exact_env"),
    ),
    (r"CartPoleEnv\(", "exact_env("),
    (r"\bCartPoleEnv\b", "TokenEnv"),
    (r"\bCartPoleVectorEnv\b", "TokenVectorEnv"),
    (r'"sutton_barto_reward": True', '"kl_coef": 0.3'),
    (r'"gymnasium.envs." in env_spec.entry_point', "env_spec.id in IDS"),
    (r'f"gymnasium.envs.\{ep\}" in env_spec.entry_point', "env_spec.id in IDS"),
    (
        r"^(import gymnasium as gym)$(?=\nfrom gymnasium import logger)",
        r"\1\nfrom exchanged import IDS",
    ),
)
EXCHANGES: dict[str, tuple[tuple[str, Any], ...]] = {
    "sb3": LIBRARY,
    "contrib": LIBRARY,
    "gymnasium": GYMNASIUM,
}
"""(pattern, replacement) of each suite, in order."""

FILES = {
    "sb3": "save_load callbacks deterministic predict run tensorboard vec_envs vec_monitor utils "
    "logger monitor envs identity train_eval_mode custom_policy gae vec_normalize",
    "contrib": "run save_load deterministic identity invalid_actions utils train_eval_mode",
    "gymnasium": "envs/registration envs/test_envs.py envs/test_rendering.py vector wrappers core "
    "utils/test_env_checker.py utils/test_save_video.py utils/test_performance.py",
}
"""The suites' test files (`test_NAME.py`) or folders."""

REASONS = {
    "sb3": (
        (r"CnnPolicy|FakeImageEnv|Atari|Breakout", "images"),
        (r"MultiInputPolicy|Dict(Obs)?Env|make_dict_env", "observations that are dicts"),
        (
            r"use_sde=True|save_load_policy\[True-|use_sde=use_sde",
            "noise for continuous actions (gSDE)",
        ),
        (r"MultiDiscrete|MultiBinary", "several actions at once"),
        (
            r"TimeDelayEnv|CustomSubClassedSpaceEnv|CustomEnv|InfiniteHorizonEnv|BitFlippingEnv|"
            r"CustomGymEnv|StepEnv|DummyEnv|DummySuccessEnv|"
            r"DummyRewardEnv|LogHistogram",
            "an environment of its own in the test",
        ),
        (r"VecNormalize\(|test_vec_normalize", "token ids are no numbers to normalise"),
        (
            r"assert not is_masking_supported|test_masked_evaluation",
            "an environment without masks, or one whose masks leave only the right action",
        ),
        (r"reward_threshold=9\d|test_infinite_horizon", "a return of another environment"),
        (r'options=\{"ok": 1\}', "an option that the environment does not have"),
        (r"test_tensorboard\[(sac|td3)\]", "an algorithm for continuous actions"),
        (r"test_discrete_action_space_required", "continuous actions"),
        (r"test_ppo_warnings", "advice about an MLP on a GPU"),
        (r"goal_velocity|MaxAndSkip", "keywords of another environment"),
        (r"BatchNorm|batch_norm|Dropout", "layers of an MLP"),
        (r"net_arch=net_arch|test_flexible_mlp|net_arch_none|create_mlp", "layers of an MLP"),
        (r"pi_features_extractor", "weights of an older version"),
    ),
    "gymnasium": (
        (
            r"CarRacing|LunarLander|Taxi|Blackjack|ALE/|Ant-v\d|mujoco|Humanoid",
            "another environment",
        ),
        (r"continuous|ClipAction|RescaleAction|DiscretizeAction", "continuous actions"),
        (r"tests/\S*jax", "JAX"),
        (r"Pendulum|BipedalWalker|test_(create|step)_sync_vector_env", "another environment"),
        (
            r"TimeAwareObservation|range\([^)]*max_episode_steps|test_max_episode_steps|"
            r"test_env_spec_pprint|NoMaxEpisodeStepsEnv|"
            r"test_(make_with_env_spec|wrapped_env_entry_point|full_integration|pickling_env_stack)",
            "a time limit, which these ids do not register: they end by themselves",
        ),
        (
            r"no-render-mode|test_order_enforcing\.py|HumanRendering\(\s*gym.make_vec\([^)]*_list",
            "a render mode that is refused here, and not checked by the original environment",
        ),
        (r"test_pprint", "the texts of other ids"),
        (
            r"gravity|test_clip_reward|test_vectorize_dict_to_box_obs|np.zeros\(4\)|1, 2, 3, 4, 5",
            "numbers of another environment",
        ),
        (r"CliffWalking|Acrobot|FrozenLakeEnv|frozenlake", "another environment"),
    ),
}
REASONS["contrib"] = REASONS["sb3"]
OF_THE_FLAGSHIP = (
    (r"learning_rate=lambda", "a schedule: this project's options are numbers"),
    (r"test_ppo_warnings", "rollouts of single steps: this project's PPO plays whole responses"),
)
"""What does not apply to this project's PPO."""


@dataclass(frozen=True)
class Config:
    """Options of the script."""

    source: Path
    """Unpacked source of the library; its `tests` folder is copied."""
    suite: Literal["sb3", "contrib", "gymnasium"] = "sb3"
    """Which library's tests these are."""
    ppo: Literal["stock", "flagship"] = "stock"
    """Whose PPO stands for PPO."""
    env: str = "rlhf_gym/Exact-v0"
    """Gymnasium: the id that its tests get (Reviews-v0 has the episodes that some tests need)."""
    convert: bool = False
    """Give the flagship each environment as a `TokenSB3VecEnv`."""
    select: str = ""
    """Run only the tests that match this (pytest's -k)."""
    original: bool = False
    """Exchange nothing: which tests pass with the library's own names?"""
    run_dir: Path = Path("runs/upstream_tests")
    """Folder to write to."""


def main(config: Config) -> None:
    """Copy, exchange, run; write the rows and print a table."""
    tests = config.source / "tests"
    if not tests.is_dir():
        raise InputError(f"{tests} is not a folder: --source is the unpacked source of the library")
    config.run_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_tests(config, tests, folder / "tests")
        rows = run_tests(config, folder)
    write_json(config.run_dir / "rows.json", rows)
    counts = Counter((row["algorithm"], row["outcome"]) for row in rows)
    for (algorithm, outcome), count in sorted(counts.items()):
        print(f"{config.suite:10} {algorithm or '-':24} {outcome:16} {count}")
    for row in rows:
        if row["outcome"] == "failed":
            print(f"FAILED {row['test']}: {row['reason']}")


def copy_tests(config: Config, tests: Path, target: Path) -> None:
    """Copy the suite's tests with the names exchanged, and the modules that they need."""
    shutil.copytree(tests, target)
    (target / "__init__.py").touch()
    settings = config.source / "pyproject.toml"
    if settings.exists():
        shutil.copy(settings, target.parent)
    if config.original:
        return
    for file in target.rglob("*.py"):
        text = file.read_text()
        for pattern, replacement in EXCHANGES[config.suite]:
            text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
        if config.suite == "gymnasium":
            text = text.replace(EXACT, f'"{config.env}"')
        file.write_text(text)
    shutil.copy(HERE / "upstream_conftest.py", target.parent / "conftest.py")
    shutil.copy(HERE / "upstream_names.py", target.parent / "exchanged.py")


def run_tests(config: Config, folder: Path) -> list[dict[str, Any]]:
    """Run pytest on the copies; return the rows."""
    rows = folder / "rows.jsonl"
    reasons = (*(OF_THE_FLAGSHIP if config.ppo == "flagship" else ()), *REASONS[config.suite])
    names = FILES[config.suite].split()
    found = [folder / "tests" / part for x in names for part in (x, f"test_{x}.py")]
    found = [path for path in found if path.exists()]
    command = [
        *(sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"),
        *("--rootdir", str(folder), "-o", "addopts=", "-m", "not expensive"),
        "--continue-on-collection-errors",
        *(["-k", config.select] if config.select else []),
        *map(str, found),
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": "1",
        "UPSTREAM_SUITE": config.suite,
        "UPSTREAM_ROWS": str(rows),
        "UPSTREAM_REASONS": json.dumps(reasons),
        "UPSTREAM_PPO": config.ppo,
        "UPSTREAM_CONVERT": "1" if config.convert else "0",
        "UPSTREAM_MODELS": str(folder / "models"),
    }
    with (config.run_dir / "pytest.log").open("w") as log:
        subprocess.run(command, cwd=folder, env=environment, stdout=log, stderr=log, check=False)
    if not rows.exists():
        raise InputError(f"no test ran; see {config.run_dir / 'pytest.log'}")
    return [json.loads(line) for line in rows.read_text().splitlines()]


if __name__ == "__main__":
    run(main, Config, __doc__)
