"""Says which copied tests apply, and writes one row for each; see `upstream_tests.py`.

It is copied next to the tests as `conftest.py`. A test applies if it, or anything of its module
that it uses, has an exchanged name, and none of what a policy over tokens cannot have.
"""

import inspect
import json
import os
import re
import signal
from typing import Any

import exchanged
import pytest
from gymnasium.envs.registration import EnvSpec

import rlhf_gym  # noqa: F401 (registers the environments)

SUITE = os.environ["UPSTREAM_SUITE"]
ROWS = os.environ["UPSTREAM_ROWS"]
SECONDS = 240
"""Time limit of a test."""
OURS = ("PPO", "A2C", "DQN", "TRPO", "MaskablePPO", "QRDQN")
OF_PARAMETERS = (
    "images",
    "another environment",
    "a time limit, which these ids do not register: they end by themselves",
)
"""Reasons that a test's parameters decide, if there are any of an exchanged name."""
OTHERS = "SAC TD3 DDPG TQC CrossQ ARS RecurrentPPO".split()
EXCHANGED = re.compile(
    r"rlhf_gym/|upstream/|CausalLMPolicy|TokenEnv|TokenVectorEnv|exact_env|exact_vector_env|"
    r"\b(PPO|A2C|DQN|TRPO|MaskablePPO|QRDQN|IdentityEnv|InvalidActionEnvDiscrete|IDS)\b"
)
REASONS: list[tuple[str, str]] = json.loads(os.environ["UPSTREAM_REASONS"])
"""Pattern in a test's id or source, and why such a test does not apply."""


def text_of(thing: Any, module: Any, seen: set[str]) -> str:
    """Source of a function or class and of what it names in its module."""
    try:
        text = inspect.getsource(thing)
    except (OSError, TypeError):
        return repr(thing)
    for name in sorted(set(re.findall(r"\b[A-Za-z_]\w+\b", text)) - seen):
        found = vars(module).get(name)
        if found is None or inspect.ismodule(found):
            continue
        if getattr(found, "__module__", None) == module.__name__:
            seen.add(name)
            text += "\n" + text_of(found, module, seen)
        elif isinstance(found, str):
            text += "\n" + repr(found)
    return text


def of(item: pytest.Item) -> tuple[str, str | None]:
    """The algorithms that a test is about, and why it does not apply, if so."""
    function = item.function  # type: ignore[attr-defined]
    params = getattr(item, "callspec", None)
    values = list(params.params.values()) if params is not None else []
    named = [v.__name__ for v in values if inspect.isclass(v) and v.__name__ in (*OURS, *OTHERS)]
    source = text_of(function, item.module, {function.__name__})  # type: ignore[attr-defined]
    own = inspect.getsource(function)
    used = named or [
        name for name in (*OURS, *OTHERS) if re.search(rf"\b{name}(\(|\.load)", source)
    ]
    algorithms = "+".join(used)
    if any(name in OTHERS for name in used):
        return algorithms, "the algorithm needs continuous actions or a policy of its own"
    texts = [v.id if isinstance(v, EnvSpec) else v for v in values]
    named = any(isinstance(text, str) and EXCHANGED.search(text) for text in texts)
    # A spec's text has the names of all its fields.
    shown = " ".join(map(repr, texts))
    for pattern, reason in REASONS:
        # Where the environment or the policy is a parameter, the source has those of all.
        text = "" if named and reason in OF_PARAMETERS else own
        if re.search(pattern, f"{item.nodeid}\n{shown}\n{text}"):
            return algorithms, reason
    if not EXCHANGED.search(source) and not EXCHANGED.search(shown):
        return algorithms, "nothing in it is exchanged: it tests the library alone"
    if exchanged.FLAGSHIP and "PPO" not in used:
        return algorithms, "not about PPO: counted with the stock algorithms"
    return algorithms, None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what does not apply."""
    for item in items:
        algorithms, reason = of(item)
        item.user_properties.append(("algorithms", algorithms))
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Any:
    """Stop a test that hangs."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"no end after {SECONDS} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        return (yield)
    finally:
        signal.alarm(0)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write the test's row: of its call, or of what failed before or after it."""
    if report.when != "call" and report.outcome == "passed":
        return
    outcome, reason = report.outcome, ""
    if outcome == "skipped":
        outcome = "not applicable"
        reason = str(report.longrepr[2]).removeprefix("Skipped: ")  # type: ignore[index]
    elif outcome == "failed":
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = str(report.longrepr)[-400:] if crash is None else crash.message
        lines = re.findall(r"^(\S+\.py:\d+): ", str(report.longrepr), re.MULTILINE)
        if "DependencyNotInstalled" in reason:
            outcome = "not applicable"
        reason = f"{reason[:400]} @ {' '.join(lines[-4:])}"
    algorithms = dict(report.user_properties)["algorithms"]
    row = {
        "suite": SUITE,
        "test": report.nodeid,
        "algorithm": algorithms,
        "outcome": outcome,
        "reason": reason,
        "seconds": round(report.duration, 1),
    }
    with open(ROWS, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
