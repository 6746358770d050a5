"""Parse the command line of a command, on top of the options of a --config file."""

import dataclasses
import os
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
from agents.cli.field_help import with_field_help
from agents.runs.algorithm import load_algorithm
from agents.runs.training import DEFAULT_ALGORITHM

CONFIG_HELP = (
    "Read options from a YAML or JSON file, or from a run folder, which records the options of its "
    "run. Options on the command line win over the file; KEY VALUE options such as --env-kwargs "
    "are added to the file's. A run folder without --run-dir continues that run, so its options "
    "must stay the same; with --run-dir, a new run starts with them. None uses the defaults."
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
    """Parse the options of a command.

    Args:
        config_class: The dataclass of the options.
        doc: The description that --help shows.
        arguments: The command line without the program; None reads `sys.argv`.
        prog: The program's name in --help; None takes the script that runs.
        with_algorithm: Whether to add the options of the algorithm that --algorithm or the file
            names. The result then has them as `algorithm_options`.
        kept_as: Name of the file in a run folder that records the options of this command.

    Returns:
        An instance of `config_class`.

    Raises:
        InputError: The file or the algorithm's name is bad.
        SystemExit: --help is given, or the command line is bad.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    name = given(arguments, "config")
    file = None if name is None else read_options(Path(name), kept_as)
    if asks_for_keywords(config_class, arguments):
        try:
            print_keywords(config_class, arguments, {} if file is None else file.values)
            sys.stdout.flush()
        except BrokenPipeError:  # `… | head` has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    whole = config_class
    if with_algorithm:
        algorithm, file = _choose_algorithm(given(arguments, "algorithm"), file)
        whole = _with_options_of(algorithm, config_class)
    parse_class = _with_config(with_field_help(whole))
    defaults = vars(default_instance(whole, file))
    # A default dict that is not empty would make tyro add one option per key, and refuse other
    # keys. So tyro gets empty dicts, and the file's entries are merged in afterwards.
    mappings = {name: value for name, value in defaults.items() if isinstance(value, dict)}
    parsed = tyro.cli(
        parse_class,
        args=arguments,
        prog=prog,
        description=_described(doc, prog),
        default=parse_class(**{**defaults, **{name: {} for name in mappings}}),
    )
    options = {name: getattr(parsed, name) for name in defaults}
    if with_algorithm:  # as its module's own class, not the one with help texts
        given_options = vars(options["algorithm_options"])
        options["algorithm_options"] = load_algorithm(algorithm).Config(**given_options)
    config = whole(**{**options, **{name: {**m, **options[name]} for name, m in mappings.items()}})
    if file is not None:
        file.check_same(config)
    return config


def _choose_algorithm(
    asked: str | None, file: OptionsFile | None
) -> tuple[str, OptionsFile | None]:
    """Choose the algorithm: from the command line, else from the file, else the default.

    If the command line names another algorithm than the file, the file's algorithm options are
    dropped: a value chosen for one algorithm is no guide for an option of the same name in another.

    Returns:
        The algorithm's name, and the file without options of another algorithm.
    """
    if file is None:
        return asked or DEFAULT_ALGORITHM, None
    recorded = file.values.get("algorithm", asked or DEFAULT_ALGORITHM)
    if asked is None or asked == recorded or "algorithm_options" not in file.values:
        return asked or str(recorded), file
    print(f"{file.path}: the options of {recorded} are ignored, because --algorithm is {asked}")
    values = {k: v for k, v in file.values.items() if k != "algorithm_options"}
    return asked, dataclasses.replace(file, values=values)


def _with_options_of(algorithm: str, config_class: type[Any]) -> type[Any]:
    """Add the field `algorithm_options`; on the command line its options have no prefix."""
    options = with_field_help(load_algorithm(algorithm).Config)
    # Any, because mypy would read the index below as the parameter of a generic class.
    without_prefix: Any = tyro.conf.OmitArgPrefixes
    return make_dataclass(
        "Options",
        [("algorithm_options", without_prefix[options], field(default_factory=options))],
        bases=(config_class,),
        frozen=True,
    )


def _with_config(kind: type[Any]) -> type[Any]:
    """Add the option --config. It is kept out of `kind`, so no run folder records it."""
    hint = Annotated[Path | None, tyro.conf.arg(help=CONFIG_HELP, metavar="FILE")]
    return make_dataclass("Options", [("config", hint, None)], bases=(kind,), frozen=True)


def _described(doc: str | None, prog: str | None) -> str | None:
    """Replace the script named at the start of a description by the program that was called."""
    if doc is None or prog is None:
        return doc
    return re.sub(r"`python scripts/\w+\.py", f"`{prog}", doc, count=1)
