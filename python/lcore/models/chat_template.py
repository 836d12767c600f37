"""Chat templates: Jinja programs that come with a checkpoint, run in a sandbox.

The environment is the one that transformers gives to templates, so that they print the same text: blocks are trimmed,
`break` and `continue` work, `raise_exception`, `strftime_now` and a `tojson` without HTML escapes are defined, and
`{% generation %}`, which marks the assistant's words for training, is transparent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lcore.errors import require, require_type

_OWNER = "Tokenizer.apply_chat_template"


def render(template: str, variables: Mapping[str, Any]) -> str:
    """Runs a chat template.

    Args:
        template: Jinja source.
        variables: what the template sees; JSON values only, so that no object's methods come into its reach.
    Returns: the text.
    Raises: ValueError for a template that does not parse or that stops with raise_exception or in the sandbox, with
        its message; TypeError for a variable that is not a JSON value.
    """
    plain = {name: _plain(value, name) for name, value in variables.items()}
    try:
        return _compile(template).render(**plain)
    except jinja2.TemplateError as error:
        raise ValueError(f"lcore.{_OWNER}: chat_template stopped: {error.message or error}") from error


class _Transparent(Extension):
    """{% generation %} ... {% endgeneration %} prints its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """`namespace()` for templates: names with a leading underscore, which Python's internals use, cannot be set."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"name {name!r} of a namespace is unsafe.")
        super().__setitem__(name, value)


def _dict(*args: Any, **values: Any) -> dict[Any, Any]:
    return dict(*args, **values)


def _namespace(**values: Any) -> _Namespace:
    made = _Namespace()
    for name, value in values.items():
        made[name] = value
    return made


@lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Transparent, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    # Plain functions: classes would hand their attributes to the template.
    environment.globals["dict"] = _dict
    environment.globals["namespace"] = _namespace
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def _raise_exception(text: str) -> NoReturn:
    raise jinja2.TemplateError(text)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _plain(value: Any, name: str) -> Any:
    """A copy in exact JSON types: subclasses could carry methods that the sandbox does not know."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        for key in value:
            require(isinstance(key, str), _OWNER, name, "have strings as keys", key)
        return {str(key): _plain(item, name) for key, item in value.items()}
    require_type(isinstance(value, list | tuple), _OWNER, name, "hold JSON values only", type(value).__name__)
    return [_plain(item, name) for item in value]
