"""`--env-kwargs help`: list the keywords of an environment, with type, default and description."""

import dataclasses
import json
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import rlhf_gym  # noqa: F401 (registers the environments)
from agents.cli.arguments import all_given, given
from agents.cli.run_folder import environment_of
from rlhf_gym.errors import InputError
from rlhf_gym.tasks.keywords import REQUIRED, Keyword, keywords_of


def asks_for_keywords(config_class: type[Any], arguments: Sequence[str]) -> bool:
    """Return whether the command takes environment keywords and `--env-kwargs help` is given."""
    names = {field.name for field in dataclasses.fields(config_class)}
    return "env_kwargs" in names and all_given(arguments, "env-kwargs") == ["help"]


def print_keywords(
    config_class: type[Any], arguments: Sequence[str], from_file: Mapping[str, Any]
) -> None:
    """Print the keywords of every environment that a command line names.

    Args:
        config_class: The dataclass of the command's options; one with a field `envs` takes several
            environments.
        arguments: The command line.
        from_file: The options of the --config file.

    Raises:
        InputError: No environment is given, or it is unknown.
    """
    for env_id in _env_ids(config_class, arguments, from_file):
        keywords = keywords_of(env_id)
        if keywords is None:
            print(
                f"{env_id} does not describe its keywords: its function takes **keywords. If it "
                "passes them on, decorate it with passes_on of rlhf_gym.tasks.keywords"
            )
            continue
        print(f"Keywords of {env_id}: --env-kwargs KEY VALUE KEY VALUE …\n")
        for keyword in keywords:
            print(_entry(keyword))


def _env_ids(
    config_class: type[Any], arguments: Sequence[str], from_file: Mapping[str, Any]
) -> list[str]:
    defaults: dict[str, Any] = {
        field.name: field.default for field in dataclasses.fields(config_class)
    }
    name = "envs" if "envs" in defaults else "env"
    env_ids = all_given(arguments, name) or from_file.get(name) or defaults[name]
    if env_ids:
        return [env_ids] if isinstance(env_ids, str) else list(env_ids)
    policy = given(arguments, "policy") or from_file.get("policy")
    if policy is None:
        raise InputError("--env-kwargs help: name the environment with --env ID")
    return [environment_of(policy).env]


def _entry(keyword: Keyword) -> str:
    """Format a keyword: its name, type and default in one line, the description below it."""
    if keyword.default is REQUIRED:
        default = "required"
    elif isinstance(keyword.default, list | tuple):
        # Print JSON, because that is how the value must be written on the command line.
        default = f"default {json.dumps(keyword.default)}"
    else:
        default = f"default {keyword.default}"
    width = min(100, shutil.get_terminal_size().columns)
    about = textwrap.fill(
        keyword.description, width, initial_indent="      ", subsequent_indent="      "
    )
    return f"  {keyword.name}  ({keyword.type}; {default})\n{about}"
