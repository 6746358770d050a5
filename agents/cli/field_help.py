"""Help texts of options: the docstrings under a dataclass's fields, each as one paragraph.

tyro keeps the line breaks of a docstring that wraps in the source, so its help would break in the
middle of sentences.
"""

import dataclasses
from typing import Annotated, Any, get_type_hints

import tyro
from docstring_parser import parse_from_object


def field_help(kind: type[Any]) -> dict[str, str]:
    """Return the docstring under each field of a dataclass, inherited ones included.

    Args:
        kind: A dataclass. A field of a class whose source is not at hand has no text.
    """
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if dataclasses.is_dataclass(base):
            for found in parse_from_object(base).params:
                if found.description:
                    texts[found.arg_name] = " ".join(found.description.split())
    return texts


def with_field_help(kind: type[Any]) -> type[Any]:
    """Return a subclass of a dataclass whose fields have their help as tyro reads it."""
    texts, hints = field_help(kind), get_type_hints(kind, include_extras=True)
    fields: list[tuple[str, Any, Any]] = []
    for each in dataclasses.fields(kind):
        if each.name in texts:
            # Any, because mypy would read an annotation that is computed as a type.
            annotated: Any = Annotated
            hint = annotated[hints[each.name], tyro.conf.arg(help=texts[each.name])]
            kept = dataclasses.field(default=each.default, default_factory=each.default_factory)
            fields.append((each.name, hint, kept))
    found = dataclasses.make_dataclass(kind.__name__, fields, bases=(kind,), frozen=True)
    found.__doc__ = kind.__doc__
    return found
