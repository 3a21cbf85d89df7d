"""What a message says about things that somebody else named: one line, printable, and not for ever."""

import logging
import re
import reprlib
import sys
from typing import Any

from tqdm import tqdm

logger = logging.getLogger(__name__)

_LONGEST_NAME = 200
_LONGEST_LINE = 2000
_LINE_END = re.compile(r"[ \t]*[\r\n]\s*")
WARNED: set[str] = set()
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


def counted(number: int, noun: str, one: str = "", many: str = "", *, of: int | None = None) -> str:
    """A number of things as a message says it: "1 update", "2 batches", "1 of 7 files is", "3 of 7 files are".

    Args:
        noun: What is counted, in the singular; its plural has -s, -es after a hiss, -ries for -ry.
        one, many: The verb after one thing, and after any other number of them.
        of: How many there are in all.
    """
    things = number if of is None else of
    if things != 1 and noun.endswith("ry"):
        noun = f"{noun[:-1]}ies"
    elif things != 1:
        noun += "es" if noun.endswith(("s", "x", "ch", "sh")) and noun != "epoch" else "s"
    verb = one if number == 1 else many
    return f"{number}{'' if of is None else f' of {of}'} {noun}{verb and ' '}{verb}"


def duration(seconds: float, *, days: bool = False) -> str:
    """A length of audio or time in the unit that suits it: "0.40 s", "36 s", "2.5 min", "40 min", "3.2 h", "960 h".

    `days`: from 72 hours on it is one of days.
    """
    seconds = float(seconds)  # numpy's truth values do not add up to two
    if days and seconds >= 72 * 3600:
        return f"{seconds / 86400:.1f} days"
    if seconds < 120:
        return f"{seconds:.{(seconds < 10) + (seconds < 1)}f} s"
    size, unit = (seconds / 60, "min") if seconds < 7200 else (seconds / 3600, "h")
    return f"{size:.{int(size < 10)}f} {unit}"


def warn_once(kind: str, message: str) -> None:
    """A warning, of which this process needs one of its kind."""
    if kind not in WARNED:
        WARNED.add(kind)
        logger.warning("%s", message)


def end_bars() -> None:
    """End all progress bars, so that what is said next begins on a line of its own."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


def log_above_bars() -> None:
    """Warnings go to stderr as bare lines, above the progress bars; where logging is set up already, as it says."""
    if not logging.getLogger().handlers:
        logging.getLogger().addHandler(_AboveBars())


class _AboveBars(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


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


__all__ = ["counted", "duration", "end_bars", "log_above_bars", "one_line", "shown", "warn_once"]
