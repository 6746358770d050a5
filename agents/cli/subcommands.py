"""The commands of `rlhf-gym`: name, module and one line of help.

`rlhf-gym --help` needs only this table, so this module imports nothing slow.
"""

import sys
from pathlib import Path
from typing import NamedTuple


class Subcommand(NamedTuple):
    """A command.

    Attributes:
        module: Its module in `agents.cli`, and the name of its script in scripts/.
        help: One line that says what it does.
    """

    module: str
    help: str


SUBCOMMANDS: dict[str, Subcommand] = {
    "run": Subcommand("rlhf", "run all of RLHF: comparisons, reward model, policy, report"),
    "sft": Subcommand("train_sft", "fine-tune a language model on responses"),
    "reward-model": Subcommand("train_reward_model", "train a reward model on comparisons"),
    "policy": Subcommand("train_policy", "train a policy with any algorithm"),
    "evaluate": Subcommand("evaluate", "measure a policy on held-out prompts"),
    "evaluate-reward-model": Subcommand(
        "evaluate_reward_model", "measure a reward model on human comparisons"
    ),
    "compare": Subcommand("compare", "compare algorithms over seeds and environments"),
    "convert": Subcommand("convert_preferences", "convert comparisons to the project's format"),
    "doctor": Subcommand("doctor", "check an environment and a policy before training"),
    "report": Subcommand("report", "write the report of a run folder"),
}


def called_as(name: str) -> str:
    """Return how to call a command, in the style in which this process was called.

    Args:
        name: A key of `SUBCOMMANDS`.

    Returns:
        `python scripts/MODULE.py` if this process runs a script of a checkout, else
        `rlhf-gym NAME`.
    """
    script = Path(sys.argv[0])
    modules = [command.module for command in SUBCOMMANDS.values()]
    if script.suffix == ".py" and script.stem in modules and script.parent.name == "scripts":
        return f"python {script.with_name(SUBCOMMANDS[name].module)}.py"
    return f"rlhf-gym {name}"
