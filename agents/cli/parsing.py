"""Parse the command line of a command, with what a file of options fills in."""

import dataclasses
import re
import sys
from collections.abc import Sequence
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from agents.cli.arguments import given
from agents.cli.config_file import OptionsFile, default_instance, read_options
from agents.cli.env_help import asks_for_keywords, print_keywords
from agents.runs.algorithm import load_algorithm
from agents.runs.training import DEFAULT_ALGORITHM

CONFIG_HELP = (
    "Options from a file: YAML, JSON, or a run folder, which keeps those of its run. What the "
    "command line gives wins; --env-kwargs and its like add to the file's. A run folder without "
    "--run-dir goes on with that very run, so its options must stay the same; with --run-dir they "
    "make a new run."
)


def parse(
    config_class: type[Any],
    doc: str | None,
    arguments: Sequence[str] | None = None,
    prog: str | None = None,
    *,
    with_algorithm: bool = False,
    kept_as: str = "config.json",
) -> Any:
    """The options of a command.

    Args:
        config_class: Their dataclass.
        doc: What --help says of the command.
        arguments: The command line without the program; by default that of the process.
        prog: The program as --help shows it; by default the script of the process.
        with_algorithm: Whether the options of the algorithm that --algorithm or the file names are
            options too. They are `algorithm_options` in the result.
        kept_as: Name of the file in which a run folder keeps the options of this command.

    Returns:
        An instance of `config_class`.

    Raises:
        InputError: The file, or the algorithm's name, is bad.
        SystemExit: Help was asked for, or the command line is bad.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    name = given(arguments, "config")
    file = None if name is None else read_options(Path(name), kept_as)
    if asks_for_keywords(config_class, arguments):
        print_keywords(config_class, arguments, {} if file is None else file.values)
        sys.exit(0)
    whole = config_class
    if with_algorithm:
        algorithm, file = _choose_algorithm(given(arguments, "algorithm"), file)
        whole = _with_options_of(algorithm, config_class)
    parse_class = _with_config(whole)
    defaults = vars(default_instance(whole, file))
    # tyro makes an option of each key of a dict that is not empty, so they are merged afterwards.
    mappings = {name: value for name, value in defaults.items() if isinstance(value, dict)}
    parsed = tyro.cli(
        parse_class,
        args=arguments,
        prog=prog,
        description=_described(doc, prog),
        default=parse_class(**{**defaults, **{name: {} for name in mappings}}),
    )
    options = {name: getattr(parsed, name) for name in defaults}
    config = whole(**{**options, **{name: {**m, **options[name]} for name, m in mappings.items()}})
    if file is not None:
        file.check_same(config)
    return config


def _choose_algorithm(
    asked: str | None, file: OptionsFile | None
) -> tuple[str, OptionsFile | None]:
    """The algorithm of the command line, else of the file; and the file without another's options.

    What an option of one algorithm is set to says nothing of another's of the same name.
    """
    if file is None:
        return asked or DEFAULT_ALGORITHM, None
    recorded = file.values.get("algorithm", DEFAULT_ALGORITHM)
    if asked is None or asked == recorded or "algorithm_options" not in file.values:
        return asked or str(recorded), file
    print(f"{file.path}: the options of {recorded} are left out, since --algorithm is {asked}")
    values = {k: v for k, v in file.values.items() if k != "algorithm_options"}
    return asked, dataclasses.replace(file, values=values)


def _with_options_of(algorithm: str, config_class: type[Any]) -> type[Any]:
    """The options with `algorithm_options`, which are named without a prefix."""
    options = load_algorithm(algorithm).Config
    # mypy takes an index for the parameter of a generic class, unless this is Any.
    without_prefix: Any = tyro.conf.OmitArgPrefixes
    return make_dataclass(
        "Options",
        [("algorithm_options", without_prefix[options], field(default_factory=options))],
        bases=(config_class,),
        frozen=True,
    )


def _with_config(kind: type[Any]) -> type[Any]:
    """The options with --config, which is none of the run's own and in no record of it."""
    hint = Annotated[Path | None, tyro.conf.arg(help=CONFIG_HELP, metavar="FILE")]
    return make_dataclass("Options", [("config", hint, None)], bases=(kind,), frozen=True)


def _described(doc: str | None, prog: str | None) -> str | None:
    """The description, which begins with a command, with the command as it was called."""
    if doc is None or prog is None:
        return doc
    return re.sub(r"`python scripts/\w+\.py", f"`{prog}", doc, count=1)
