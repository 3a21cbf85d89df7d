"""What a folder of results was made with, kept beside them: the same is resumed, anything else refused by name."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..system.errors import RunFolderError
from ..system.fields import differences
from ..system.files import write_text
from ..system.messages import one_line, shown
from ..system.tables import read_table

CHANGED = "Changed since this run began: "


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
        before = read_table(path)
        before = {name: before.get(name) for name in now}
        notes = [CHANGED + change for change in setting_changes(path.parent, before, now, fixed=fixed)]
    write_text(path, json.dumps(now, indent=2) + "\n")
    return notes


def setting_changes(
    folder: Path,
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    *,
    fixed: Collection[str] | None = None,
    advice: str = "Choose another folder, or --fresh to begin anew.",
) -> list[str]:
    """What changed in the settings of a run since it began in this folder: `section.name old -> new` each.

    Raises `RunFolderError`, naming it and with the advice, for what may not change: the settings and whole sections
    that are `fixed`; None: all.
    """
    changed = differences(before, now)
    what = ", ".join(
        f"{name} is {shown(old)} there and {shown(new)} here"
        for name, (old, new) in changed.items()
        if fixed is None or any(f"{name}.".startswith(f"{one}.") for one in fixed)
    )
    if what:
        raise RunFolderError(f"{folder} holds another run: {one_line(what)}. {advice}")
    return [f"{name} {old!r} -> {new!r}" for name, (old, new) in changed.items()]


__all__ = ["CHANGED", "keep_settings", "setting_changes"]
