"""Where checkpoints come from: a path, a URL, the name of a published checkpoint, or a repository of the Hub."""

import hashlib
import http.client
import json
import os
import re
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from tqdm import tqdm

from spidr_hf.hub.card import published
from spidr_hf.system.files import publish, unfinished, write_bytes
from spidr_hf.system.messages import counted, one_line, shown
from spidr_hf.system.tables import known_table

from .errors import ConversionError
from .text_files import parse_table, read_table

MIRROR_VARIABLE = "SPIDR_HF_MIRROR"
_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
_HUB_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<file>.+))?")
_DEFAULT_HUB_FILE = "final.pt"
_LARGEST_BESIDE = 1_000_000


@dataclass
class Source:
    """A checkpoint file on this machine and what is known about it."""

    path: Path
    config: dict[str, Any] | None = None  # the config.json that came with it
    objective: str | None = None
    card: dict[str, Any] | None = None  # of the published checkpoint that this is
    origin: str = ""  # as the user would find it again
    downloaded: bool = False  # by `download`

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Around reading the file: a published checkpoint that cannot be read is damaged, and is not kept.

        Raises:
            ConversionError: as what is inside, saying so.
        """
        try:
            yield
        except ConversionError as error:
            machine = isinstance(error.__context__, (MemoryError, OSError))  # at fault
            if machine or not (self.card and self.downloaded):
                raise
            with suppress(OSError):
                self.path.unlink()
            raise ConversionError(f"{error} It is removed: the same command downloads it again.") from error


def find_source(source: str) -> Source:
    """Finds SOURCE and brings it to this machine.

    A published name goes first (write `./spidr-base` for a file of that name), then what exists here, then the Hub.

    Raises:
        ConversionError: it is nowhere, or cannot be fetched.
    """
    if source in published():
        return _published(published()[source])
    if re.match(r"https?://", source):
        return _from_url(source)
    path = Path(source).expanduser()
    if path.is_file():
        return Source(path, origin=shown(path.name))
    if path.is_dir() and (files := _checkpoints_in(path)):
        chosen = path / _DEFAULT_HUB_FILE if path / _DEFAULT_HUB_FILE in files else files[0]
        if len(files) > 1 and chosen.name != _DEFAULT_HUB_FILE:
            raise ConversionError(f"{path} holds several checkpoints; name one: {', '.join(map(str, files))}.")
        return Source(chosen, origin=shown(chosen.name))
    hub_name = _HUB_NAME.fullmatch(source)
    if hub_name and not hub_name["repo"].endswith(_SUFFIXES) and not source.startswith("."):
        return _from_hub(hub_name["repo"], hub_name["file"])
    if path.is_dir():
        raise ConversionError(f"{path} is a folder without a checkpoint file ({', '.join(_SUFFIXES)}).")
    raise ConversionError(
        f"{source} does not exist. Give a file, a URL, a repository of the Hub (owner/name), or one of: "
        f"{', '.join(published())}."
    )


def _checkpoints_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES)


def _published(card: dict[str, Any]) -> Source:
    place, licence = card["source"], card["license"]
    name, link = licence.get("name", licence["id"]), licence.get("link") or place.get("publisher", "")
    where = place.get("url") or f"the Hub's {place['repo']}"
    print(f"{card['title']} is from {where}. Licence of its weights: {name} {link}".rstrip() + ".", file=sys.stderr)
    source = _from_url(place["url"]) if "url" in place else _from_hub(place["repo"], place.get("file"))
    source.objective, source.card = place["objective"], card
    return source


# ---- URLs


def _from_url(url: str) -> Source:
    card = next((card for card in published().values() if card["source"].get("url") == url), None)
    mirror = os.environ.get(MIRROR_VARIABLE)
    place = urllib.parse.urlsplit(url)
    fetched = mirror.rstrip("/") + place.path if mirror and card else url
    offline = bool(constants.HF_HUB_OFFLINE and card and not mirror)
    path = download(fetched, offline=offline)
    config = _config_beside(fetched, path.with_name(f"{path.name}.config.json"), offline=offline)
    source = Source(path, config, origin=url, card=card, downloaded=True)
    if card:
        source.objective = card["source"]["objective"]
    return source


def _config_beside(url: str, copy: Path, *, offline: bool) -> dict[str, Any] | None:
    """The config.json in the same place as `url`, if there is one; where nobody answers, its `copy` of before."""
    place = urllib.parse.urlsplit(url)
    beside = place._replace(path=place.path.rpartition("/")[0] + "/config.json").geturl()
    try:
        with _open(beside, offline=offline) as response:
            content = response.read(_LARGEST_BESIDE)
        table = parse_table(content, beside)
    except (OSError, ValueError, http.client.HTTPException) as error:
        if not isinstance(error, ValueError) and getattr(error, "code", 500) >= 500:
            return known_table(copy) or None
        with suppress(OSError):
            copy.unlink(missing_ok=True)
        return None
    with suppress(OSError):  # the cache may be one that can only be read
        write_bytes(copy, content)
    return table


def _open(url: str, headers: dict[str, str] | None = None, *, offline: bool = False) -> Any:
    """A server's answer."""
    if offline:
        raise OSError("HF_HUB_OFFLINE is set")
    request = urllib.request.Request(url, headers={"User-Agent": "spidr_hf", **(headers or {})})
    return urllib.request.urlopen(request, timeout=60)


def download(url: str, folder: Path | None = None, *, offline: bool = False) -> Path:
    """Fetches `url` into a cache and returns the file, complete or not at all. What is there and unchanged is reused.

    Args:
        url: http or https.
        folder: the cache; by default `spidr_hf` in the Hugging Face home (`HF_HOME`).
        offline: nobody is asked; what is there counts as unchanged.
    """
    folder = folder or Path(constants.HF_HOME) / "spidr_hf"
    name = urllib.parse.unquote(urllib.parse.urlsplit(url).path.rpartition("/")[2]) or "checkpoint"
    path = folder / hashlib.sha256(url.encode()).hexdigest()[:16] / re.sub(r"[^\w.-]", "_", name)
    tags = path.with_name(path.name + ".tags.json")
    stored = _tags(tags) if path.is_file() else {}
    try:
        with _open(url, stored, offline=offline) as response:
            path.parent.mkdir(parents=True, exist_ok=True)
            if length := response.headers.get("Content-Length"):
                print(f"Downloading {url}, {int(length) / 1e6:.0f} MB, once.", file=sys.stderr)
            _save(response, path, name)
            validators = (("ETag", "If-None-Match"), ("Last-Modified", "If-Modified-Since"))
            new = {ask: response.headers[tell] for tell, ask in validators if response.headers[tell]}
            tags.write_text(json.dumps(new))
    except (OSError, http.client.HTTPException) as error:
        code, reason = getattr(error, "code", None), getattr(error, "reason", error)
        if code == 304:
            return path
        why = f"the server answers {code} {reason}" if code else one_line(reason)
        if path.is_file():
            print(f"{url} cannot be fetched ({why}); using the copy in {shown(path)}.", file=sys.stderr)
            return path
        raise ConversionError(f"{url} cannot be fetched: {why}.") from None
    return path


def _tags(path: Path) -> dict[str, str]:
    """What the server called the file when it was fetched; nothing where that is lost."""
    stored = known_table(path)
    return stored if all(isinstance(tag, str) for tag in stored.values()) else {}


def _save(response: Any, path: Path, name: str) -> None:
    announced = response.headers.get("Content-Length") or ""
    length = int(announced) if announced.isdecimal() else 0
    with unfinished(path) as partial:
        with (
            partial.open("wb") as file,
            tqdm(total=length or None, unit="B", unit_scale=True, unit_divisor=1024, desc=shown(name)) as bar,
        ):
            while block := response.read(1 << 20):
                file.write(block)
                bar.update(len(block))
            received = file.tell()
        if length and received != length:
            raise OSError(f"the connection broke after {counted(received, 'byte', of=length)}; start the command again")
        publish(partial)
        partial.rename(path)


# ---- the Hub


def _from_hub(repo: str, file: str | None) -> Source:
    file = file or _DEFAULT_HUB_FILE
    path = _hub_file(repo, file)
    if path is None:
        raise ConversionError(
            f"The Hub repository {repo} has no {file}. Name its checkpoint file: {repo}/path/to/checkpoint.pt."
        )
    folders = file.split("/")[:-1]
    config = None
    for depth in range(len(folders), -1, -1):  # beside the file, then in the folders above it
        found = _hub_file(repo, "/".join([*folders[:depth], "config.json"]))
        if found is not None:
            config = read_table(found)
            break
    card = None
    if file == _DEFAULT_HUB_FILE:
        card = next((card for card in published().values() if card["source"].get("repo") == repo), None)
    objective = card["source"]["objective"] if card else None
    return Source(path, config, objective, card, f"{constants.ENDPOINT}/{repo}/blob/main/{file}")


def _hub_file(repo: str, file: str) -> Path | None:
    """A file of a Hub repository in the local cache, None if the repository has no such file."""
    try:
        return Path(hf_hub_download(repo, file))
    except EntryNotFoundError as error:
        if not isinstance(error, LocalEntryNotFoundError):
            return None
        problem = "the Hub cannot be reached, and the file is not in the local cache"
    except GatedRepoError:
        problem = "the repository is gated; accept its terms on the Hub and log in (`hf auth login`)"
    except RepositoryNotFoundError:
        problem = "there is no such public repository (for a private one: `hf auth login`)"
    except (OSError, ValueError) as error:
        problem = one_line(error)
    raise ConversionError(f"{repo} does not exist here, and fetching {file} from the Hub failed: {problem}.")


__all__ = ["MIRROR_VARIABLE", "Source", "download", "find_source", "published"]
