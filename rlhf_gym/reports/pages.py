"""HTML pages from the jinja2 templates in templates/: one file each, no script, no network.

Python prepares plain data (formatted numbers, rows of tables, charts) and calls `render`. Every
tag, the style and the fixed prose are in the templates.
"""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from rlhf_gym.reports.display import clean


def _written(value: object) -> object:
    """Clean what an expression of a template writes, except the output of a macro.

    Only macros make `Markup` here. Their own expressions were cleaned and escaped when they ran.
    """
    return value if isinstance(value, Markup) else clean(value)


ENVIRONMENT = Environment(
    loader=PackageLoader("rlhf_gym.reports"),
    # Prompts, responses and settings may contain anything, also HTML. Escaping is the only
    # protection, so no template uses `safe`. Charts (base64) and colours need no exception.
    autoescape=True,
    # Unlike `autoescape`, this applies to each expression before it is escaped.
    finalize=_written,
    # By default a name that Python forgot to pass renders as nothing, and a section would silently
    # be missing from the page. Here it is an error.
    undefined=StrictUndefined,
    # Lines with only a block tag leave no blank line in the page.
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def render(template: str, context: dict[str, Any]) -> str:
    """Return a whole page.

    Args:
        template: Name of a file in templates/ that extends base.html.
        context: A value for each name in the template, including `title`. Pass texts as they
            are: the environment cleans and escapes them.

    Raises:
        jinja2.UndefinedError: The template uses a name that `context` lacks.
    """
    return ENVIRONMENT.get_template(template).render(context)
