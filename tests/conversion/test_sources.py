"""Where checkpoints come from (files, URLs, published names, the Hub) and where they go, against local stand-ins."""

import base64
import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

from spidr_hf.conversion import convert_checkpoint, sources
from spidr_hf.conversion.errors import ConversionError
from spidr_hf.conversion.sources import MIRROR_VARIABLE, download, find_source, published
from spidr_hf.conversion.verify import compare_with_spidr, require_spidr

ROOT = Path(__file__).resolve().parents[2]
PARITY = ROOT / "tests" / "fixtures" / "parity"
TINY = PARITY / "spidr-tiny"
BARE = (TINY / "bare_state_dict.pt").read_bytes()
CONFIG = (TINY / "config.json").read_bytes()


class Server(ThreadingHTTPServer):
    """Serves `files` by path as a web server and as the Hub, and keeps what is sent to it."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.tags: dict[str, str] = {}
        self.log: list[str] = []
        self.created: dict = {}
        self.uploaded: dict[str, bytes] = {}
        self.cut = 0  # bytes to withhold from each answer

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_) -> None:
        pass

    def answer(self, code: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) - self.server.cut])

    def do_GET(self) -> None:
        self.server.log.append(f"{self.command} {self.path}")
        body = self.server.files.get(self.path)
        tag = self.server.tags.get(self.path, "")
        if body is None:
            self.answer(404, X_Error_Code="EntryNotFound")
        elif tag and self.headers.get("If-None-Match") == tag:
            self.answer(304)
        else:
            headers = {"X_Repo_Commit": "c" * 40} if "/resolve/" in self.path else {}
            self.answer(200, body, **({"ETag": tag} if tag else {}), **headers)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.log.append(f"{self.command} {self.path}")
        if self.path == "/api/repos/create":
            self.server.created = json.loads(body)
            self.answer(200, json.dumps({"url": f"{self.server.url}/me/tiny"}).encode())
        elif self.path == "/api/validate-yaml":
            self.answer(200, b'{"errors": [], "warnings": []}')
        elif "/preupload/" in self.path:
            files = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            self.answer(200, json.dumps({"files": files}).encode())
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.uploaded[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer(
                200, json.dumps({"commitUrl": f"{self.server.url}/me/tiny/commit/d", "commitOid": "d" * 40}).encode()
            )
        else:
            self.answer(404)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources.constants, "HF_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(MIRROR_VARIABLE, raising=False)


# ---- files


def test_a_folder_with_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "full_checkpoint.pt").write_bytes(b"x")
    assert find_source(str(tmp_path)).path.name == "full_checkpoint.pt"
    (tmp_path / "step_1.pt").write_bytes(b"x")
    with pytest.raises(ConversionError, match=r"several checkpoints; name one: .*full_checkpoint\.pt, .*step_1\.pt"):
        find_source(str(tmp_path))
    (tmp_path / "final.pt").write_bytes(b"x")
    assert find_source(str(tmp_path)).path.name == "final.pt"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConversionError, match="folder without a checkpoint"):
        find_source(str(tmp_path / "empty"))


def test_what_is_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for source in ("absent.pt", "./folder/absent", "folder/absent.pt", "spidr-bas"):
        with pytest.raises(ConversionError, match=r"does not exist\. Give .* dinosr-base, .*spidr-base"):
            find_source(source)


# ---- URLs


def test_a_url_with_its_config(server: Server, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    server.files = {"/models/a.pt": BARE, "/models/config.json": CONFIG}
    code = convert_checkpoint.main([f"{server.url}/models/a.pt", str(tmp_path / "out")])
    assert code == 0
    assert "a.pt: 100%" in capfd.readouterr().err  # the progress bar
    assert f"Converted from <{server.url}/models/a.pt>" in (tmp_path / "out" / "README.md").read_text()


def test_downloads_are_kept_and_checked(server: Server, capsys: pytest.CaptureFixture) -> None:
    url = f"{server.url}/a.pt"
    server.files["/a.pt"], server.tags["/a.pt"] = b"one", '"1"'
    path = download(url)
    assert path.read_bytes() == b"one"
    server.files["/a.pt"] = b"not sent: the tag says unchanged"
    assert download(url).read_bytes() == b"one"
    server.files["/a.pt"], server.tags["/a.pt"] = b"two", '"2"'
    assert download(url).read_bytes() == b"two"
    del server.files["/a.pt"]
    assert download(url).read_bytes() == b"two"
    assert "the server answers 404" in capsys.readouterr().err
    server.shutdown()
    server.server_close()
    assert download(url).read_bytes() == b"two"
    assert "using the copy" in capsys.readouterr().err
    assert {file.name for file in path.parent.iterdir()} == {"a.pt", "a.pt.tags.json"}


def test_a_file_whose_name_has_line_ends(tmp_path: Path) -> None:
    """Its card and its messages stay in one piece."""
    path = tmp_path / "a\n---\n\x1b[31m.pt"
    path.write_bytes(BARE)
    (tmp_path / "config.json").write_bytes(CONFIG)
    convert_checkpoint.convert(str(path), str(tmp_path / "o"))
    assert r"`a\n---\n\x1b[31m.pt`" in (tmp_path / "o" / "README.md").read_text()


def test_tags_that_were_lost_mean_fetching_again(server: Server) -> None:
    server.files["/a.pt"] = b"one"
    path = download(f"{server.url}/a.pt")
    for tags in ("", "{", "[]", '{"If-None-Match": 5}', "[" * 100_000):
        path.with_name("a.pt.tags.json").write_text(tags)
        server.files["/a.pt"] = tags.encode()[:10] or b"none"
        assert download(f"{server.url}/a.pt").read_bytes() == server.files["/a.pt"]


def test_what_a_killed_download_left_is_removed(server: Server) -> None:
    server.files["/a.pt"] = b"one"
    path = download(f"{server.url}/a.pt")
    left = path.with_name(".a.pt.abcdefgh.partial")
    left.write_bytes(bytes(100))
    download(f"{server.url}/a.pt")
    assert not left.exists()


def test_broken_downloads_leave_nothing(server: Server, tmp_path: Path) -> None:
    server.files["/a.pt"], server.cut = BARE, 1000
    with pytest.raises(ConversionError, match="the connection broke after"):
        find_source(f"{server.url}/a.pt")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    with pytest.raises(ConversionError, match="answers 404"):
        find_source(f"{server.url}/b.pt")
    server.server_close()


def test_the_config_beside_a_url_is_found_again_without_a_network(server: Server, tmp_path: Path) -> None:
    server.files = {"/a.pt": BARE, "/config.json": CONFIG}
    config = find_source(f"{server.url}/a.pt").config
    assert config == json.loads(CONFIG)
    server.shutdown()
    server.server_close()
    assert find_source(f"{server.url}/a.pt").config == config


def test_a_config_that_is_gone_is_not_found_again(server: Server) -> None:
    server.files = {"/a.pt": BARE, "/config.json": CONFIG}
    find_source(f"{server.url}/a.pt")
    del server.files["/config.json"]
    assert find_source(f"{server.url}/a.pt").config is None
    server.shutdown()
    server.server_close()
    assert find_source(f"{server.url}/a.pt").config is None


def test_what_lies_beside_a_url_need_not_be_a_config(server: Server) -> None:
    server.files = {"/a.pt": BARE, "/config.json": b"<html>"}
    assert find_source(f"{server.url}/a.pt").config is None


# ---- published names


def test_published_names(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MIRROR_VARIABLE, server.url + "/")
    server.files = {
        "/shared/devai/assets/models/spidr_base.pt": BARE,
        "/shared/devai/assets/models/config.json": CONFIG,
    }
    monkeypatch.chdir(tmp_path)
    Path("spidr-base").mkdir()  # of an earlier conversion, say: the name still means the published checkpoint
    assert convert_checkpoint.main(["spidr-base", "facebook/spidr-base"]) == 0
    card = Path("facebook/spidr-base/README.md").read_text()
    assert "license: cc-by-nc-4.0" in card
    assert 'from_pretrained("facebook/spidr-base")' in card
    assert "<https://dl.fbaipublicfiles.com/shared/devai/assets/models/spidr_base.pt>" in card
    assert find_source("spidr-base").objective == "spidr"
    assert convert_checkpoint.main(["spidr-base", "other", "--objective", "dinosr"]) == 1
    assert not Path("other").exists()
    server.files = {"/placesaudio/dinosr/dinosr.ckpt": (PARITY / "dinosr-fairseq" / "checkpoint.ckpt").read_bytes()}
    assert convert_checkpoint.main(["dinosr-original", "o"]) == 0
    assert "license: other" in Path("o/README.md").read_text()


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("spidr-adapt-ssl", "spidr_vp19lang/step_400000.pt"),
        ("spidr-adapt-ssl-reptile", "spidr_reptile_vp19lang/step_200000.pt"),
        ("spidr-adapt-ssl-foblo", "spidr_foblo_vp19lang/step_200000.pt"),
        ("spidr-adapt-sl", "spidr_sl_vp19lang/step_400000.pt"),
        ("spidr-adapt-sl-reptile", "spidr_reptile_sl_vp19lang/step_200000.pt"),
        ("spidr-adapt-sl-foblo", "spidr_foblo_sl_vp19lang/step_200000.pt"),
    ],
)
def test_published_names_of_spidr_adapt(
    name: str, place: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MIRROR_VARIABLE, server.url)
    folder = PARITY / ("spidr-adapt-sl" if "-sl" in name else "spidr-adapt-ssl")
    path = f"/shared/devai/assets/spidr-adapt/checkpoints/{place}"
    # No configuration lies beside the published files; a tiny one stands in for the default sizes.
    fields = json.loads((folder / "config.json").read_text())["model"]
    server.files = {path: (folder / "step_5.pt").read_bytes()}
    (tmp_path / "config.json").write_text(json.dumps({"model": fields}))
    given = ["--config", str(tmp_path / "config.json")]
    assert convert_checkpoint.main([name, str(tmp_path / "o"), *given]) == 0
    card = (tmp_path / "o" / "README.md").read_text()
    assert "license: cc-by-nc-4.0" in card and f"<https://dl.fbaipublicfiles.com{path}>" in card
    assert "eprint = {2512.21204}" in card


def test_the_url_of_a_published_checkpoint_has_its_card(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MIRROR_VARIABLE, server.url)
    server.files = {"/shared/devai/assets/models/dinosr_base_reproduced.pt": BARE}
    source = find_source(published()["dinosr-base"]["source"]["url"])
    assert source.card["title"] == "DinoSR base (reproduced)" and source.objective == "dinosr"


# ---- the Hub


class FakeHub:
    """`hf_hub_download` over a dict of files."""

    def __init__(self, folder: Path, **files: bytes):
        self.folder, self.files = folder, files

    def __call__(self, repo: str, file: str) -> str:
        if repo == "private/model":
            raise RepositoryNotFoundError.__new__(RepositoryNotFoundError, "404")
        if repo == "offline/model":
            raise LocalEntryNotFoundError("offline")
        if f"{repo}/{file}" not in self.files:
            raise EntryNotFoundError(file)
        path = self.folder / "hub" / repo / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.files[f"{repo}/{file}"])
        return str(path)


def test_hub_repositories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = {
        "coml/spidr-vp20/final.pt": BARE,
        "coml/spidr-vp20/config.json": CONFIG,
        "me/many/spidr/ft-deu-1h/best.pt": BARE,
        "me/many/spidr/config.json": CONFIG,
    }
    monkeypatch.setattr(sources, "hf_hub_download", FakeHub(tmp_path, **files))
    for name in ("coml/spidr-vp20", "spidr-vp20"):
        source = find_source(name)
        assert source.card["name"] == "spidr-vp20" and source.config == json.loads(CONFIG)
    Path("coml/spidr-vp20").mkdir(parents=True)  # a folder without a checkpoint does not hide the repository
    assert find_source("coml/spidr-vp20").objective == "spidr"
    source = find_source("me/many/spidr/ft-deu-1h/best.pt")
    assert source.card is None and source.config == json.loads(CONFIG)
    for name, message in {
        "me/many": "has no final.pt. Name its checkpoint file: me/many/path",
        "private/model": "no such public repository",
        "offline/model": "cannot be reached",
    }.items():
        with pytest.raises(ConversionError, match=message):
            find_source(name)


def test_from_hub_to_hub_as_a_command(server: Server, tmp_path: Path) -> None:
    """The real client of the Hub, against a server that speaks its protocol."""
    (tmp_path / "spidr").mkdir()  # nothing named spidr that could be imported
    for name, body in (("final.pt", BARE), ("config.json", CONFIG)):
        server.files[f"/coml/spidr-vp20/resolve/main/{name}"] = body
        server.tags[f"/coml/spidr-vp20/resolve/main/{name}"] = f'"{name}"'
    environment = {
        **os.environ,
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "hf_standin",
    }
    command = [sys.executable, str(ROOT / "conversion" / "convert_checkpoint.py"), "coml/spidr-vp20", "out"]
    result = subprocess.run(
        [*command, "--push-to-hub", "me/tiny"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert f"Uploaded to {server.url}/me/tiny" in result.stdout
    assert server.created["name"] == "tiny" and not server.created.get("private")
    assert server.uploaded == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert b'from_pretrained("me/tiny")' in server.uploaded["README.md"]


@pytest.mark.parametrize("private", [False, True])
def test_pushing(private: bool, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    calls = {}
    monkeypatch.setattr(convert_checkpoint.huggingface_hub, "create_repo", lambda *a, **o: calls.update(create=(a, o)))
    monkeypatch.setattr(convert_checkpoint.huggingface_hub, "upload_folder", lambda **o: calls.update(upload=o))
    monkeypatch.setenv(MIRROR_VARIABLE, server.url)
    server.files = {
        "/placesaudio/dinosr/dinosr.ckpt": (PARITY / "dinosr-fairseq" / "checkpoint.ckpt").read_bytes(),
        "/shared/devai/assets/models/spidr_base.pt": BARE,
        "/shared/devai/assets/models/config.json": CONFIG,
    }
    name = "dinosr-original" if private else "spidr-base"
    assert convert_checkpoint.main([name, str(tmp_path / "o"), "--push-to-hub", "me/x"]) == 0
    assert calls["create"] == (("me/x",), {"exist_ok": True, "private": private or None})
    assert ("no licence" in capsys.readouterr().out) == private
    assert calls["upload"]["repo_id"] == "me/x"


def test_a_refused_upload_keeps_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def refuse(*_args, **_options):
        raise OSError("401 Unauthorized\nand more")

    monkeypatch.setattr(convert_checkpoint.huggingface_hub, "create_repo", refuse)
    code = convert_checkpoint.main([str(TINY / "checkpoint.pt"), str(tmp_path / "o"), "--push-to-hub", "me/x"])
    error = capsys.readouterr().err
    assert code == 1 and "is complete, but uploading it to me/x failed: 401 Unauthorized" in error
    assert (tmp_path / "o" / "model.safetensors").exists()


# ---- beside SpidR's own package


def test_verify_without_spidr_is_refused_before_anything_happens(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "spidr", None)
    assert convert_checkpoint.main([str(TINY / "checkpoint.pt"), str(tmp_path / "o"), "--verify"]) == 1
    assert "pip install spidr" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(importlib.util.find_spec("spidr") is None, reason="compares with the released spidr package")
@pytest.mark.parametrize(
    "name", ["spidr-tiny/checkpoint.pt", "dinosr-tiny/checkpoint.pt", "dinosr-fairseq/checkpoint.ckpt"]
)
def test_verify_with_spidr(name: str, tmp_path: Path, capsys) -> None:
    require_spidr()
    objective = [] if "fairseq" in name else ["--objective", name.partition("-")[0]]
    assert convert_checkpoint.main([str(PARITY / name), str(tmp_path / "o"), "--verify", *objective]) == 0
    assert "layer 4" in capsys.readouterr().out
    assert max(compare_with_spidr(tmp_path / "o").values()) < 1e-4
