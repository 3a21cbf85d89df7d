"""What a message says about things that somebody else named: one line, printable, and not for ever."""

import re
import reprlib
from typing import Any

_LONGEST_NAME = 200
_LONGEST_LINE = 2000
_LINE_END = re.compile(r"[ \t]*[\r\n]\s*")
_REPR = reprlib.Repr()
_REPR.maxlevel = 3
_REPR.maxstring = _REPR.maxother = 100
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = _REPR.maxset = _REPR.maxfrozenset = _REPR.maxdeque = 8


def shown(value: Any, longest: int = _LONGEST_NAME) -> str:
    """A name, path or value out of a file as a message may show it.

    Text stays as it is where it is printable; line ends, escape sequences and bytes that are no text become escapes.
    Anything else becomes its `repr`, of which deep, wide and long parts are left out. What is longer than `longest`
    characters loses its middle.
    """
    if isinstance(value, str):
        # A name of gigabytes is cut before it is escaped, which makes it up to ten times as long.
        return _cut(_printable(_cut(value, longest)), longest)
    if hasattr(value, "__fspath__"):
        return shown(str(value), longest)
    return _cut(_printable(_short_repr(value)), longest)


def one_line(message: Any, longest: int = _LONGEST_LINE) -> str:
    """A whole message (or exception) as one printable line of at most `longest` characters.

    Line ends of the message become spaces; what else is not printable is escaped.
    """
    text = message if isinstance(message, str) else str(message)
    return _cut(_printable(_LINE_END.sub(" ", _cut(text, 10 * longest)).strip()), longest)


def _printable(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def _short_repr(value: Any) -> str:
    try:
        return _REPR.repr(value)
    except ValueError:  # integers of thousands of digits have no decimal form
        return f"<{type(value).__name__} without a short form>"


def _cut(text: str, longest: int) -> str:
    if len(text) <= longest:
        return text
    start = 2 * longest // 3
    return f"{text[:start]}... ({len(text) - longest} more characters) ...{text[start - longest :]}"


__all__ = ["one_line", "shown"]
