"""What a folder of results was made with, kept beside them: the same is resumed, anything else refused by name."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..system.errors import RunFolderError
from ..system.fields import differences
from ..system.files import write_text
from ..system.messages import one_line, shown


def keep_settings(
    path: Path, settings: Mapping[str, Any], *, resuming: bool, fixed: Collection[str] | None = None
) -> list[str]:
    """
    Write the settings of a run, and compare them with those it began with.

    Args:
        path: a JSON file in the run's folder.
        settings: everything that the results depend on, by name.
        resuming: whether there are results of an earlier start.
        fixed: names that may not change in a folder; None: none may.

    Returns:
        What changed since the run began and may, a line each. Raises `RunFolderError`, naming it, for what may not.
    """
    now, notes = json.loads(json.dumps(dict(settings))), []
    if resuming and path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        names = now if fixed is None else fixed
        there, here = ({name: values.get(name) for name in names} for values in (before, now))
        if changed := differences(there, here):
            what = ", ".join(
                f"{name} is {shown(old)} there and {shown(new)} here" for name, (old, new) in changed.items()
            )
            raise RunFolderError(
                f"{path.parent} holds another run: {one_line(what)}. Choose another folder, or --fresh to begin anew."
            )
        notes = [
            f"Changed since this run began: {name} {before.get(name)!r} -> {now[name]!r}"
            for name in now
            if before.get(name) != now[name]
        ]
    write_text(path, json.dumps(now, indent=2) + "\n")
    return notes


__all__ = ["keep_settings"]
