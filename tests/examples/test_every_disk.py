"""Every command that writes: a full disk is one line and leaves nothing half-written, a kill at any moment loses
nothing, and after both the same command ends as if nothing had happened."""

import ctypes
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from tempfile import TemporaryFile

import pytest
import soundfile
from commands import run_command
from mounts import needs_mounts
from runs import forget_processes, write_audio, write_config
from tiny import tiny_model

from spidr_hf import SpidrFeatureExtractor
from spidr_hf.conversion import convert_checkpoint, export_checkpoint

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "tests" / "fixtures" / "parity" / "spidr-tiny" / "checkpoint.pt"
KILLS = 3  # of every command
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.chmod"}
# Arguments, from the folder of inputs and the place to write to.
COMMANDS: dict[str, Callable[[Path, Path], list[object]]] = {
    "write_manifest": lambda given, out: [given / "audio", out / "manifest.csv"],
    "write_items": lambda given, out: [given / "alignments.jsonl", out / "triphones.item"],
    "convert_checkpoint": lambda given, out: [CHECKPOINT, out / "model"],
    "export_checkpoint": lambda given, out: [given / "model", out / "exported.pt"],
    "extract_units": lambda given, out: [given / "model", given / "audio", out / "units", "--layers", 3, 4],
    "extract_units parquet": lambda given, out: [
        *(given / "model", given / "audio", out / "units", "--layers", 4, "--format", "parquet"),
    ],
    "extract_features": lambda given, out: [given / "model", given / "audio", out / "features", "--layers", 2],
    "extract_features npy": lambda given, out: [
        *(given / "model", given / "audio", out / "features", "--layers", 2, "--format", "npy"),
    ],
    "train_kmeans": lambda given, out: [given / "features" / "2", out / "kmeans.safetensors", "--clusters", 4],
    "evaluate_units": lambda given, out: [
        *(given / "units", given / "alignments.jsonl", "--json", out / "scores.json", "--plot", out / "plot.png"),
    ],
    "evaluate_abx": lambda given, out: [
        *(given / "triphones.item", given / "features", "--json", out / "abx.json", "--plot", out / "abx.png"),
        *("--context", "any"),
    ],
    "plot_units": lambda given, out: [given / "audio", given / "units", out / "picture.png"],
    "train_unit_lm": lambda given, out: [
        *(given / "units" / "4" / "units.jsonl", out / "lm", "--valid", given / "units" / "4" / "units.jsonl"),
        *("--steps", 4, "--save-steps", 2, "--num-layers", 1, "--hidden-size", 16, "--num-heads", 2),
        *("--max-length", 32, "--batch-size", 4),
    ],
    "score_pairs": lambda given, out: [
        *(given / "lm" / "final", given / "pairs.csv", "--units", given / "units" / "4" / "units.jsonl"),
        *("--json", out / "accuracy.json", "--scores", out / "scores.csv"),
    ],
    "finetune_classification": lambda given, out: [
        *(given / "model", given / "audio", out / "run", "--task", "utterance", "--column", "speaker"),
        *("--valid", given / "audio", "--labels", given / "alignments.jsonl", "--steps", 4, "--eval-interval", 2),
        *("--num-workers", 0, "--batch-seconds", 2),
    ],
    "finetune_ctc": lambda given, out: [
        *(given / "model", given / "audio", out / "run", "--units", "phones", "--valid", given / "audio"),
        *("--labels", given / "alignments.jsonl", "--steps", 4, "--eval-interval", 2, "--num-workers", 0),
        *("--batch-seconds", 2),
    ],
    "pretrain": lambda given, out: ["--config", given / "tiny.toml", "--output-dir", out / "run"],
    "validate": lambda given, out: [
        *("--run-dir", out / "run", "--data", given / "audio", "--alignments", given / "alignments.jsonl"),
    ],
}
# What is there before a command starts, in the place that it writes to.
BEFORE = {"validate": "run"}


@dataclass
class Ended:
    """How a command in a process of its own ended: its exit status and what it printed on stderr."""

    status: int
    err: str


def run(name: str, arguments: list[object]) -> int:
    """The command, in this process."""
    if name in ("convert_checkpoint", "export_checkpoint"):
        module = convert_checkpoint if name == "convert_checkpoint" else export_checkpoint
        return module.main([str(argument) for argument in arguments])
    forget_processes()
    done = run_command(name.partition(" ")[0], *arguments)
    print(done.err, file=sys.stderr)
    return done.status


def in_a_process(work: Callable[[], int]) -> Ended:
    """`work` in a copy of this process; 70 where it raises."""
    with TemporaryFile("w+") as log:
        child = os.fork()
        if not child:
            status = 70
            try:
                with redirect_stderr(log), redirect_stdout(StringIO()):
                    status = work()
            except BaseException:
                log.write(traceback.format_exc())
            finally:
                log.flush()
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        log.seek(0)
        return Ended(status, log.read())


def succeeds(work: Callable[[], int]) -> None:
    ended = in_a_process(work)
    assert ended.status == 0, ended.err


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """What the commands read."""
    folder = tmp_path_factory.mktemp("given")
    audio = write_audio(folder / "audio")
    tiny_model().save_pretrained(folder / "model")
    SpidrFeatureExtractor().save_pretrained(folder / "model")
    write_config(folder / "tiny.toml", audio)
    rows = []
    for index, path in enumerate(sorted(audio.iterdir())):
        phones = [["SIL", 0, 0.1], ["A", 0.1, 0.2], ["B", 0.2, soundfile.info(path).duration]]
        rows.append({"id": path.stem, "speaker": f"s{index % 2}", "phones": phones})
    (folder / "alignments.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    items = [f"{row['id']} {times} SIL SIL {row['speaker']}\n" for row in rows for times in ("0.1 0.2 A", "0.2 0.28 B")]
    (folder / "triphones.item").write_text("#file onset offset #phone prev-phone next-phone speaker\n" + "".join(items))
    (folder / "pairs.csv").write_text("positive,negative\n00,01\n02,03\n")
    for name, layer in (("extract_units", 4), ("extract_features", 2)):
        arguments = [folder / "model", audio, folder / name.partition("_")[2], "--layers", layer]
        succeeds(partial(run, name, arguments))
    succeeds(partial(run, "train_unit_lm", COMMANDS["train_unit_lm"](folder, folder)))
    succeeds(partial(run, "pretrain", [*COMMANDS["pretrain"](folder, folder), "--run.save_interval", 6]))
    return folder


@dataclass
class Command:
    """A command that writes to `place`, what it leaves there, and which of these files hold the time or the like.

    `before` is the folder whose copy is there when it starts.
    """

    name: str
    arguments: list[object]
    place: Path
    before: Path | None
    left: dict[str, bytes]
    changing: set[str]

    def run(self) -> int:
        return run(self.name, self.arguments)

    def prepare(self) -> None:
        """What there is before it starts, and nothing else."""
        for path in self.place.iterdir() if self.place.exists() else ():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.place.mkdir(exist_ok=True)
        if self.before:
            shutil.copytree(self.before, self.place / self.before.name)

    def check(self, ended: Ended) -> None:
        """It has ended well, or says that it had already; what it always leaves is there."""
        assert ended.status == 0 or "exists already" in ended.err, ended.err
        now = files(self.place)
        assert now.keys() == self.left.keys()
        assert not [path for path in now if now[path] != self.left[path] and path not in self.changing]


@pytest.fixture(scope="module", params=COMMANDS)
def command(request, given, tmp_path_factory) -> Command:
    place = tmp_path_factory.mktemp("place") / "disk"
    name, before = request.param, BEFORE.get(request.param)
    command = Command(name, COMMANDS[name](given, place), place, given / before if before else None, {}, set())
    results = []
    for _ in range(2):
        command.prepare()
        succeeds(command.run)
        results.append(files(place))
    command.left = results[0]
    assert command.left and command.left.keys() == results[1].keys()
    command.changing = {path for path in results[0] if results[0][path] != results[1][path]}
    return command


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@needs_mounts
@pytest.mark.parametrize("share", [0.0, 0.6])
def test_a_full_disk(command, share):
    """A disk that is full from the start, and one that becomes so in the middle."""
    command.prepare()
    before = files(command.place)
    written = [content for path, content in command.left.items() if content != before.get(path)]
    most = sum(-(-len(content) // 4096) * 4 for content in written)  # in kilobytes
    if share and most < 40:
        pytest.skip("it writes too little for a disk to fill up in the middle")

    def on_a_small_disk() -> int:
        if ctypes.CDLL(None, use_errno=True).unshare(0x00020000):  # CLONE_NEWNS
            raise OSError(ctypes.get_errno(), "unshare")
        mount = partial(subprocess.run, check=True)
        mount(["mount", "--make-rprivate", "/"])
        mount(["mount", "-t", "tmpfs", "-o", "size=1g", "tmpfs", command.place])
        command.prepare()
        used = shutil.disk_usage(command.place).used // 1024
        mount(["mount", "-o", f"remount,size={used + max(8, int(most * share))}k", command.place])
        if not share:  # not a byte, but the names of folders
            (command.place / "filler").write_bytes(bytes(8192))
        ended = in_a_process(command.run)
        assert ended.status not in (0, 70), ended.err
        lines = [line for line in ended.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and str(command.place) in lines[0], ended.err
        assert "disk is full" in lines[0] or "disk full" in lines[0] or "No space left" in lines[0], ended.err
        # ".partial" alone is the folder of what an extraction has computed so far.
        assert not [path for path in command.place.rglob("*partial*") if path.name != ".partial"]
        mount(["mount", "-o", "remount,size=1g", command.place])
        (command.place / "filler").unlink(missing_ok=True)
        command.check(in_a_process(command.run))
        return 0

    ended = in_a_process(on_a_small_disk)
    assert ended.status == 0, ended.err


def test_kills(command):
    """SIGKILL at moments of all that is written, each followed by a start that ends well."""
    command.prepare()
    count = in_a_process(partial(counted, command, None))
    moments = int(count.err.split("events: ")[1])
    for moment in random.Random(0).sample(range(moments), min(KILLS, moments)):
        command.prepare()
        killed = in_a_process(partial(counted, command, moment))
        assert killed.status == -signal.SIGKILL, killed.err
        command.check(in_a_process(command.run))


def counted(command: Command, last: int | None) -> int:
    """Run the command up to the `last` of what it does to files below its place; None: count them."""
    numbers = iter(range(10**6))
    place = str(command.place)

    def watch(event: str, arguments: tuple) -> None:
        if event not in EVENTS or not any(
            str(a).startswith(place) for a in arguments[:2] if isinstance(a, (str, Path))
        ):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        if next(numbers) == last:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    status = command.run()
    print(f"events: {next(numbers)}", file=sys.stderr)
    return status
