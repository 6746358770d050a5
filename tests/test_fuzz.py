"""Whatever is thrown at an environment: a documented error or a step, and it stays usable."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.errors import InputError

DOCUMENTED = (InputError, gym.error.ResetNeeded)
LOCAL = ("rlhf_gym/Exact-v0", "rlhf_gym/Reviews-v0")
ROWS, OPERATIONS = 3, 25

anything = st.one_of(
    st.none(),
    st.integers(-5, 700),
    st.floats(),
    st.text(max_size=5),
    st.booleans(),
    st.lists(st.integers(-2, 700), max_size=4),
)
prompts = st.one_of(
    st.sampled_from(["a", "i saw this film", "", "a b c d e f g h i j k l m n", "☃"]),
    st.lists(st.sampled_from(["a", "h", ""]), max_size=4),
    st.just([{"role": "user", "content": "a"}]),
    anything,
)
options = st.one_of(
    st.none(),
    st.fixed_dictionaries(
        {},
        optional={
            "prompt": prompts,
            "prompt_index": st.one_of(st.integers(-2, 2000), anything),
            "reset_mask": st.one_of(
                st.lists(st.booleans(), min_size=ROWS, max_size=ROWS), anything
            ),
            "surprise": anything,
        },
    ),
)
good = st.lists(st.integers(0, 8), min_size=ROWS, max_size=ROWS).map(np.array)
actions = st.one_of(
    good,
    good,
    st.lists(st.integers(-3, 600), min_size=ROWS, max_size=ROWS).map(np.array),
    st.lists(st.floats(0, 8), min_size=ROWS, max_size=ROWS).map(np.array),
    st.lists(st.integers(0, 8), max_size=5).map(lambda x: np.array(x, dtype=np.int64)),
    anything,
)
waves = st.lists(
    st.lists(st.integers(-1, 9), min_size=1, max_size=5), min_size=ROWS, max_size=ROWS
).map(lambda rows: np.array([(row + [-1] * 5)[:4] for row in rows]))
operations = st.one_of(
    st.tuples(st.just("step"), actions),
    st.tuples(st.just("step"), actions),
    st.tuples(st.just("reset"), options),
    st.tuples(st.just("seed"), st.one_of(st.integers(0, 9), st.just([1, None, 3]), anything)),
    st.tuples(st.just("play"), st.one_of(waves, actions)),
)


def attempt(env: TokenVectorEnv, kind: str, value: Any) -> None:
    try:
        if kind == "step":
            env.step(value)
        elif kind == "reset":
            env.reset(options=value)
        elif kind == "seed":
            env.reset(seed=value)
        else:
            env.play(value)
    except DOCUMENTED:
        pass


def is_usable(env: TokenVectorEnv) -> None:
    observations, _ = env.reset(seed=1)
    assert observations in env.observation_space
    eos = env.objective.reference.eos_ids[0]
    _, rewards, ended, truncated, _ = env.step(np.full(ROWS, eos))
    assert ended.all()
    assert not truncated.any()
    assert np.isfinite(rewards).all()


def fuzz(name: str, examples: int) -> int:
    envs = {
        mode: gym.make_vec(name, num_envs=ROWS, device="cpu", autoreset_mode=mode)
        for mode in ("SameStep", "NextStep", "Disabled")
    }
    tried = 0

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],  # shrinking would take minutes
        suppress_health_check=list(HealthCheck),
    )
    @given(
        st.sampled_from(sorted(envs)),
        st.lists(operations, min_size=OPERATIONS, max_size=OPERATIONS),
    )
    def throw(mode: str, script: list[tuple[str, Any]]) -> None:
        nonlocal tried
        for kind, value in script:
            attempt(envs[mode], kind, value)
            tried += 1
        is_usable(envs[mode])

    throw()
    return tried


@pytest.mark.parametrize("name", LOCAL)
def test_a_thousand_things_thrown_at_it(name):
    assert fuzz(name, 40) >= 1000


@pytest.mark.slow
@pytest.mark.parametrize("name", LOCAL)
def test_ten_thousand_things_thrown_at_it(name):
    assert fuzz(name, 400) >= 10_000
