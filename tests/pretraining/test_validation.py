"""Validation says of every checkpoint what it would say alone, disturbs nothing, and is done once."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from accelerate.state import AcceleratorState, PartialState
from commands import fails, run_command
from huggingface_hub import ModelCard
from runs import assert_same_run, finish, launch, load_script, rows, write_audio, write_config
from safetensors.torch import load_file

from spidr_hf import SpidrForPretraining, SpidrModel
from spidr_hf.evaluation.phones import evaluate_units
from spidr_hf.feature_extraction_spidr import SpidrFeatureExtractor
from spidr_hf.pretraining import validation_run
from spidr_hf.pretraining.config import load_config
from spidr_hf.pretraining.validation import Totals, ValidationSet, open_sets
from spidr_hf.pretraining.validation_run import InlineValidation, RunFollower, ValidationFile
from spidr_hf.system.errors import ConfigError
from spidr_hf.system.processes import RunLock
from spidr_hf.training.checkpoints import Checkpoints
from spidr_hf.training.stopping import StopSignal
from spidr_hf.units.extractor import Extractor, unit_outputs


class Killed(BaseException):
    """Stands for SIGKILL where a test needs it at an exact place."""


PHONES = ("SIL", "AA", "K")


@pytest.fixture(scope="session")
def audio(tmp_path_factory) -> Path:
    folder = write_audio(tmp_path_factory.mktemp("validation") / "audio")
    held_out = folder.parent / "dev"
    held_out.mkdir()
    rng = np.random.default_rng(3)
    lines = []
    for index in range(7):
        length = 3_000 + 1_700 * index  # the last is longer than max_sample_size
        soundfile.write(held_out / f"{index}.wav", 0.2 * rng.standard_normal(length), 16_000)
        cuts = [0.0, 0.05, 0.11, length / 16_000]
        phones = [[phone, *bounds] for phone, *bounds in zip(PHONES, cuts, cuts[1:], strict=False)]
        if index != 3:
            lines.append(json.dumps({"id": str(index), "phones": phones}))
    (folder.parent / "dev.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def config(audio, tmp_path) -> Path:
    """A run with two data sets to validate on, one with phones."""
    path = write_config(tmp_path / "tiny.toml", audio)
    dev = audio.parent / "dev"
    path.write_text(
        path.read_text()
        + f'\n[validation.dev]\nmanifest = "{dev}"\nalignments_path = "{dev}.jsonl"\n'
        + f'\n[validation."other/one"]\nmanifest = "{dev}"\nmax_sample_size = 6000\nmin_sample_size = 5000\n'
    )
    return path


@pytest.fixture
def pretrain(config, tmp_path):
    """`pretrain(name, *overrides)` runs it in this process, into a folder of that name, and returns the folder."""
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)}
    script = load_script()

    def run(name: str, *overrides: str) -> Path:
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()
        script.pretrain(load_config(config, overrides), tmp_path / name)
        return tmp_path / name

    yield run
    signal.alarm(0)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, audio) -> Path:
    """A finished run of 12 steps with four checkpoints; its config has the sections of `config`."""
    folder = tmp_path_factory.mktemp("trained")
    path = write_config(folder / "tiny.toml", audio)
    dev = audio.parent / "dev"
    path.write_text(path.read_text() + f'\n[validation.dev]\nmanifest = "{dev}"\nalignments_path = "{dev}.jsonl"\n')
    finish(launch(path, folder / "run"))
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def model_of(config, seed: int = 0) -> SpidrForPretraining:
    torch.manual_seed(seed)
    return SpidrForPretraining(config.model).eval()


def only(validation: ValidationSet, *indices: int) -> ValidationSet:
    """The same with these utterances alone, in one batch."""
    validation.batches = [np.array(indices)]
    return validation


def dev(config: Path, **changes) -> ValidationSet:
    loaded = load_config(config)
    for name, value in changes.items():
        setattr(loaded.validation["dev"], name, value)
    return ValidationSet("dev", loaded.validation["dev"], loaded, progress=False)


def test_it_is_what_the_model_says(config):
    """One utterance: loss, perplexities and labels are those of a forward on its mask; units `unit_outputs`'."""
    loaded, validation = load_config(config), only(dev(config), 2)
    model = model_of(loaded)
    scores = validation.evaluate(model)
    waveform = SpidrFeatureExtractor().standardize(validation.source.read(2))
    frames = model.spidr._get_feat_extract_output_lengths(len(waveform))
    masked = validation.masked_frames("2", frames)
    assert 2 <= len(masked) < frames and masked.max() < frames
    with torch.no_grad():
        output = model(torch.from_numpy(waveform)[None], mask_time_indices=torch.from_numpy(masked)[None])
    assert scores["loss"] == pytest.approx(output.loss.item(), rel=1e-5)
    assert scores["layer_losses"] == pytest.approx([loss.item() for loss in output.layer_losses], rel=1e-5)
    assert scores["target_ppl"] == pytest.approx(output.target_ppl.item(), rel=1e-5)
    assert scores["pred_ppl"] == pytest.approx(output.pred_ppl.item(), rel=1e-5)
    assert np.mean(scores["layer_target_ppl"]) == pytest.approx(scores["target_ppl"])
    assert scores["num_masked_frames"] == len(masked) and scores["utterances"] == 1
    extractor = Extractor(model, SpidrFeatureExtractor(), unit_outputs(model))
    phones = {"2": [(phone, *bounds) for phone, *bounds in json.loads(phone_lines(config)[2])["phones"]]}
    for k, units in enumerate(extractor([waveform])[0].values()):
        expected = evaluate_units({"2": units}, phones)
        for name in ("phone_purity", "cluster_purity", "pnmi"):
            assert scores[name][k] == pytest.approx(expected[name])


def phone_lines(config: Path) -> list[str]:
    return Path(load_config(config).validation["dev"].alignments_path).read_text().splitlines()


def test_a_row_gives_what_it_gives_alone(config):
    """Sums over single utterances are those of one ragged batch, cropped ones and units included."""
    model = model_of(load_config(config))
    together = only(dev(config), *range(7)).evaluate(model)
    totals = Totals.empty(2, 12)
    for index in range(7):
        alone = only(dev(config), index)
        with torch.no_grad():
            totals.add(alone.totals_of(model, [alone.read(index)]))
    expected = totals.scores()
    assert together["utterances"] == 7 and together["aligned_utterances"] == 6
    assert together.keys() - expected.keys() == {"per", "f1", "r_val"}  # of all units and phones together
    for name, value in expected.items():
        assert together[name] == pytest.approx(value, rel=1e-4), name


def test_masks_and_crops_depend_on_the_utterance_alone(config, audio, tmp_path):
    whole = dev(config)
    shutil.copytree(audio.parent / "dev", tmp_path / "part")
    for index in (0, 1, 5):
        (tmp_path / "part" / f"{index}.wav").unlink()
    part = dev(config, manifest=str(tmp_path / "part"), alignments_path=None)
    position = [part.source.fileid(i) for i in range(len(part.source))].index("6")
    ours, theirs = whole.read(6), part.read(position)
    assert len(ours.crop) == 8_000 < len(ours.waveform) and theirs.waveform is None
    assert np.array_equal(ours.crop, theirs.crop)
    assert np.array_equal(whole.masked_frames("6", 24), part.masked_frames("6", 24))
    assert not np.array_equal(whole.masked_frames("6", 24), whole.masked_frames("5", 24))
    assert whole.fingerprint != part.fingerprint and whole.fingerprint == dev(config).fingerprint
    assert dev(config, rand_crop=False).read(6).crop[0] == dev(config).read(6).waveform[0]
    assert {dev(config, **change).fingerprint for change in ({"rand_crop": False}, {"normalize": False})}.isdisjoint(
        {whole.fingerprint}
    )


def test_the_model_stays_as_it_was(config):
    model = model_of(load_config(config)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    assert dev(config).evaluate(model)["loss"] > 0
    assert model.training and not model.teacher.training and model.statistics is None
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert dev(config).evaluate(model, interrupted=lambda: True) is None and model.training


def test_processes_share_the_work(config, monkeypatch):
    """What two processes see adds up to what one sees."""
    loaded = load_config(config, ["--validation.dev.max_batch_length", "8000"])
    model, expected = model_of(loaded), None
    sets = [ValidationSet("dev", loaded.validation["dev"], loaded, progress=False) for _ in range(3)]
    assert len(sets[0].batches) > 3
    expected = sets[0].evaluate(model)
    parts: list[Totals] = []
    monkeypatch.setattr("spidr_hf.pretraining.validation.gather_all", lambda own: parts.extend(own) or list(parts))
    asked = [0, 0]
    for rank in (0, 1):
        scores = sets[rank + 1].evaluate(
            model, rank=rank, world_size=2, interrupted=lambda rank=rank: bool(asked.__setitem__(rank, asked[rank] + 1))
        )
    assert parts[0].utterances and parts[1].utterances and asked[0] == asked[1]
    assert scores.keys() == expected.keys()
    for name, value in expected.items():
        assert scores[name] == pytest.approx(value), name


def test_no_masks_and_no_phones(config):
    loaded = load_config(config, ["--masking.mask_prob", "0"])
    other = open_sets(loaded, progress=False)[1]
    scores = other.evaluate(model_of(loaded))
    assert other.masked_frames("x", 20) is None and "pnmi" not in scores
    assert other.new_notes() == ["2 of 7 utterances are too short and left out"] and not other.new_notes()
    assert scores["num_masked_frames"] == sum(
        int(model_of(loaded).spidr._get_feat_extract_output_lengths(min(3_000 + 1_700 * i, 6_000))) for i in range(2, 7)
    )


def test_what_validation_takes_over_from_data(config):
    data = load_config(config, ["--data.normalize", "false", "--data.max_batch_length", "9000"]).validation
    assert (data["dev"].normalize, data["dev"].max_batch_length, data["dev"].max_sample_size) == (False, 9_000, 8_000)
    assert data["other/one"].max_sample_size == 6_000 and data["dev"].num_buckets == 1000
    notes = load_config(config, ["--validation.dev.num_buckets", "3"]).notes
    assert any("validation.dev.num_buckets" in note for note in notes) and "alignments" not in " ".join(notes)


def test_files_that_cannot_be_read(config, tmp_path, audio):
    shutil.copytree(audio.parent / "dev", tmp_path / "bad")
    validation = dev(config, manifest=str(tmp_path / "bad"))
    for index in (1, 4):
        (tmp_path / "bad" / f"{index}.wav").write_bytes(b"RIFF")
    scores = validation.evaluate(model_of(load_config(config)))
    assert scores["utterances"] == 5 and scores["skipped"] == 2 and scores["aligned_utterances"] == 4
    assert any(note.startswith("2 utterances cannot be used; the last: ") for note in validation.new_notes())
    for index in range(7):
        (tmp_path / "bad" / f"{index}.wav").write_bytes(b"RIFF")
    with pytest.raises(ValueError, match=r"\[validation\.dev\]: 7 of 7 utterances cannot be used"):
        validation.evaluate(model_of(load_config(config)))


def test_alignments_that_do_not_fit(config, tmp_path):
    note = "1 of 7 utterances has no alignment: 3, for example"
    assert note in dev(config).new_notes()
    lines = [json.loads(line) for line in phone_lines(config)]
    lines[0]["phones"][1][1] = lines[0]["phones"][0][1]  # it begins with the one before
    lines[1]["phones"][-1][2] = 5.0
    (tmp_path / "odd.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    odd = dev(config, alignments_path=str(tmp_path / "odd.jsonl"))
    assert any("1 alignment cannot be used; 0: Phones must follow" in note for note in odd.new_notes())
    scores = odd.evaluate(model_of(load_config(config)))
    assert scores["aligned_utterances"] == 4 and scores["skipped"] == 1
    assert any("The lengths of '1' disagree" in note for note in odd.new_notes())
    (tmp_path / "other.jsonl").write_text('{"id": "elsewhere", "phones": [["K", 0.0, 1.0]]}\n')
    with pytest.raises(ConfigError, match=r"validation\.dev\.alignments_path` .* fits no utterance .*'elsewhere'.*'0'"):
        dev(config, alignments_path=str(tmp_path / "other.jsonl"))
    with pytest.raises(ConfigError, match=r"`validation\.dev\.alignments_path`: nowhere\.jsonl: no such file"):
        dev(config, alignments_path="nowhere.jsonl")


def test_data_that_cannot_be_used(config):
    with pytest.raises(ValueError, match=r"/nowhere: no such file or folder"):
        dev(config, manifest="/nowhere")
    with pytest.raises(ConfigError, match=r"0 of 7 utterances .* have the 90000 samples of `min_sample_size`"):
        dev(config, min_sample_size=90_000)


# ---- the file


def row(step: int, name: str = "dev", **values) -> dict:
    return {"step": step, "name": name, "loss": 1.0, "checkpoint": "a", "data": "d", **values}


def test_the_file_has_one_row_per_step_and_name(tmp_path):
    file = ValidationFile(tmp_path)
    assert file.rows() == []
    for step, name in ((6, "dev"), (3, "test"), (3, "dev")):
        file.write(row(step, name))
    before = file.path.read_bytes()
    file.write(row(6, loss=2.0))
    assert [(r["step"], r["name"], r["loss"]) for r in file.rows()] == [
        (3, "dev", 1.0), (3, "test", 1.0), (6, "dev", 2.0),
    ]  # fmt: skip
    assert file.path.read_bytes().splitlines()[:2] == before.splitlines()[:2]
    file.path.write_bytes(file.path.read_bytes() + b'{"step": 9, "na')
    assert len(file.rows()) == 3
    file.write(row(9, checkpoint=None))
    file.write(row(12))
    file.forget_after(6)
    assert [r["step"] for r in file.rows()] == [3, 3, 6, 12]
    assert len(file.path.read_text().splitlines()) == 4


def test_several_processes_may_write(tmp_path):
    code = (
        "import sys; from spidr_hf.pretraining.validation_run import ValidationFile\n"
        "for step in range(5): ValidationFile(sys.argv[1]).write("
        "{'step': step, 'name': sys.argv[2], 'checkpoint': 'a', 'data': 'd'})"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, tmp_path, name]) for name in ("a", "b")]
    assert [process.wait(120) for process in processes] == [0, 0]
    assert len(ValidationFile(tmp_path).rows()) == 10


# ---- following a run


def steps(run: Path) -> list[int]:
    return [row["step"] for row in ValidationFile(run).rows()]


def test_the_command(run, trained):
    """Every checkpoint once, with the run's lock held; metrics.jsonl and the checkpoints stay as they are, and of
    final/ all but its card, which tells the scores."""
    lock = RunLock(run)
    kept = {path: path.read_bytes() for path in run.rglob("*") if path.suffix in (".jsonl", ".json", ".safetensors")}
    done = run_command("validate", "--run-dir", run, "--device", "cpu")
    assert done.status == 0, done.err
    told = [line for line in done.out.splitlines() if not line.startswith("best/ is step")]
    assert steps(run) == [3, 6, 9, 12] and len(told) == 5
    assert "step 12, dev: loss " in done.out and "PNMI 0." in done.out and "has no alignment" in done.out
    assert len(kept) > 8 and [path for path, content in kept.items() if path.read_bytes() != content] == []
    row = ValidationFile(run).rows()[1]
    config = load_config(run / "config.toml")
    model = SpidrForPretraining(config.model)
    model.load_state_dict(load_file(run / "checkpoints" / "step_6" / "model.safetensors"))
    expected = open_sets(config, progress=False)[0].evaluate(model)
    assert {name: row[name] for name in expected} == expected
    assert len(row["layer_losses"]) == len(row["pnmi"]) == len(row["layer_target_ppl"]) == 2
    assert (run / "validation.png").stat().st_size > 10_000
    before = ValidationFile(run).path.read_bytes()
    again = run_command("validate", "--run-dir", run, "--device", "cpu")
    assert again.status == 0 and "Nothing to do: of 4 checkpoints" in again.out
    assert ValidationFile(run).path.read_bytes() == before
    lock.release()


def test_curves_go_to_tensorboard(run):
    pytest.importorskip("tensorboard", reason="the extra `train` brings tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path = run / "config.toml"
    path.write_text(path.read_text().replace('tracker = "none"', 'tracker = "tensorboard"'))
    assert run_command("validate", "--run-dir", run, "--device", "cpu").status == 0
    events = EventAccumulator(str(run / "tensorboard" / "validation"))
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("validation/dev/loss")]
    assert losses == [(row["step"], pytest.approx(row["loss"])) for row in ValidationFile(run).rows()]
    assert "validation/dev/pnmi/1" in events.Tags()["scalars"]


def test_other_data_and_a_run_without_sections(run, audio):
    path = run / "config.toml"
    text = path.read_text()
    path.write_text(text[: text.index("[validation.dev]")])
    fails(run_command("validate", "--run-dir", run), "nothing to validate on", "[validation.dev]", "--data DATA")
    data = audio.parent / "dev"
    done = run_command("validate", "--run-dir", run, "--device", "cpu", "--data", data, "--alignments", f"{data}.jsonl")
    assert done.status == 0, done.err
    assert steps(run) == [3, 6, 9, 12] and {"dev"} == {row["name"] for row in ValidationFile(run).rows()}
    # Another data set of the same name is not what was validated.
    done = run_command("validate", "--run-dir", run, "--device", "cpu", "--data", data)
    assert "PNMI" not in done.out and steps(run) == [3, 6, 9, 12]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--run-dir", "/nowhere"], ["/nowhere is no run's folder", "config.toml"]),
        (["--run-dir", "RUN", "--alignments", "x.jsonl"], ["--alignments are those of --data"]),
        (["--run-dir", "RUN", "--poll", "0"], ["--poll must be positive"]),
        (["--run-dir", "RUN", "--data", "/nowhere.csv"], ["/nowhere.csv: no such file"]),
        (["--run-dir", "RUN", "--device", "tpu9"], ["'tpu9' is no device"]),
    ],
)
def test_bad_input(run, arguments, words):
    fails(run_command("validate", *(str(run) if text == "RUN" else text for text in arguments)), *words)
    assert not ValidationFile(run).path.exists()


def test_a_checkpoint_that_is_deleted_or_damaged_is_passed_over(run, monkeypatch):
    said: list[str] = []
    (run / "checkpoints" / "step_9" / "model.safetensors").write_bytes(b"half a file")
    (run / "checkpoints" / "step_3" / "trainer_state.json").unlink()  # on its way out
    load = RunFollower.load

    def deleted(self, folder):
        if folder.name == "step_6":
            shutil.rmtree(folder)
        load(self, folder)

    monkeypatch.setattr(RunFollower, "load", deleted)
    follower = RunFollower(run, say=said.append)
    assert follower.catch_up() == 3 and steps(run) == [12] and follower.catch_up() == 0
    assert any("step_6 was deleted while it was read" in line for line in said)
    assert any("step_9 is damaged" in line for line in said)


def told(folder: Path) -> dict[tuple[str, str], float] | None:
    """What the Hub is told of a model's scores."""
    results = ModelCard.load(folder / "README.md").data.eval_results
    return results and {(result.dataset_name, result.metric_name): result.metric_value for result in results}


def test_best_is_kept(run, monkeypatch):
    """`best/` is the model of the best checkpoint by the score that is named, also when that one is gone."""
    said: list[str] = []

    def follow(select: str) -> dict:
        RunFollower(run, say=said.append, select=select).catch_up()
        return json.loads((run / "best" / "selection.json").read_text())

    choice = follow("loss")
    rows = [row for row in ValidationFile(run).rows() if row["name"] == "dev"]
    best = min(rows, key=lambda row: row["loss"])
    assert choice == {"select": "dev/loss", "data": best["data"], "step": best["step"], "value": best["loss"]}
    weights = load_file(run / "best" / "model.safetensors")
    expected = load_file(run / "checkpoints" / f"step_{best['step']}" / "model.safetensors")
    assert weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in weights)
    assert "the best by loss" in (run / "best" / "README.md").read_text()
    SpidrModel.from_pretrained(run / "best")
    for folder, row in (("best", best), ("final", rows[-1])):
        assert told(run / folder)["dev", "PNMI, layer 3"] == pytest.approx(row["pnmi"][0], abs=1e-4)
    # It stays when its checkpoint is deleted, and is not written again.
    shutil.rmtree(run / "checkpoints" / f"step_{best['step']}")
    if best["step"] == 12:
        shutil.rmtree(run / "final")
    said.clear()
    assert follow("dev/loss") == choice and not said
    # By another score it is another's; of scores per layer the best layer counts.
    for score in ("pnmi", "per", "f1", "r_val"):
        assert all(len(row[score]) == 2 for row in rows)
    left = [row for row in rows if row["step"] in {int(p.name[5:]) for p in (run / "checkpoints").glob("step_*")}]
    assert follow("dev/per")["value"] == min(min(row["per"]) for row in left)
    assert follow("r_val")["value"] == max(max(row["r_val"]) for row in left)
    # What an earlier version has validated has no such score.
    old = [row if row == left[-1] else {**row, "per": None} for row in ValidationFile(run).rows()]
    lines = (json.dumps({name: value for name, value in row.items() if value is not None}) + "\n" for row in old)
    (run / "validation.jsonl").write_text("".join(lines))
    assert follow("per")["step"] == left[-1]["step"]


def test_a_package_that_phones_need_is_told_first(config, monkeypatch):
    """Not after the first checkpoint, or in the middle of a run."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "rapidfuzz" else find_spec(name))
    with pytest.raises(ConfigError, match=r"alignments_path` needs the package rapidfuzz: pip install"):
        dev(config)
    assert dev(config, alignments_path=None)


@pytest.mark.parametrize(
    ("select", "said"),
    [
        ("los", "there is no score 'los', only loss, .*, pnmi, .*, r_val"),
        ("name", "there is no score 'name'"),
        ("test/loss", "there is no data set 'test', only dev"),
    ],
)
def test_what_best_is_chosen_by_is_checked_first(run, select, said):
    with pytest.raises(ConfigError, match=said):
        RunFollower(run, select=select)


def test_scores_to_choose_by_are_those_of_the_rows(run):
    follower = RunFollower(run, say=lambda _: None)
    follower.catch_up()
    names = {name for name, value in ValidationFile(run).rows()[0].items() if isinstance(value, (float, list))}
    assert set(follower.sets[0].score_names) == names - {"audio_seconds"}
    data = str(follower.config.validation["dev"].manifest)
    with pytest.raises(ConfigError, match=r"no score 'pnmi', only loss, .*phones are not known: alignments_path"):
        RunFollower(run, data=(data, None), select="pnmi")


def test_final_stands_for_a_checkpoint_that_is_gone(run):
    shutil.rmtree(run / "checkpoints")
    follower = RunFollower(run, say=lambda _: None)
    assert follower.catch_up() == 1 and steps(run) == [12] and follower.finished()
    assert ValidationFile(run).rows()[0]["checkpoint"] == "final"
    assert follower.catch_up() == 0
    shutil.rmtree(run / "final")
    assert RunFollower(run, say=lambda _: None).state().endswith("has no checkpoint yet.")


def test_a_checkpoint_that_a_resumed_run_wrote_anew_is_validated_anew(run):
    RunFollower(run, say=lambda _: None).catch_up()
    before = ValidationFile(run).rows()
    for name in ("model.safetensors", "trainer_state.json"):  # step 12 now is what step 3 was
        shutil.copy(run / "checkpoints" / "step_3" / name, run / "checkpoints" / "step_12" / name)
    assert RunFollower(run, say=lambda _: None).catch_up() == 1
    after = ValidationFile(run).rows()
    assert after[:3] == before[:3] and after[3]["loss"] == before[0]["loss"] != before[3]["loss"]


def test_watching(run, config):
    """It waits for a run that has not begun, continues over an interruption and a longer config, and ends with it."""
    later = run.with_name("later")
    said: list[str] = []

    def watch() -> None:
        follower = RunFollower(later, say=said.append, wait=0.02)
        follower.follow(0.02)
        follower.close()

    def wait_for(count: int) -> None:
        deadline = time.monotonic() + 60
        while len(steps(later)) < count and thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(steps(later)) == count, said

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    time.sleep(0.1)
    (later / "checkpoints").mkdir(parents=True)
    text = (run / "config.toml").read_text()
    # A run of 6 steps has finished; it was told to continue to 12 before this was seen.
    shutil.copytree(run / "checkpoints" / "step_3", later / "checkpoints" / "step_3")
    (later / "config.toml").write_text(text)
    wait_for(1)
    shutil.copytree(run / "checkpoints" / "step_6", later / "checkpoints" / "step_6")
    shutil.copytree(run / "checkpoints" / "step_6", later / "final", ignore=lambda *_: ["trainer_state.json"])
    wait_for(2)
    time.sleep(0.2)
    assert thread.is_alive()
    shutil.copytree(run / "checkpoints" / "step_12", later / "checkpoints" / "step_12")
    wait_for(3)
    assert thread.is_alive()
    shutil.rmtree(later / "final")
    shutil.copytree(run / "final", later / "final")
    thread.join(60)
    assert not thread.is_alive() and steps(later) == [3, 6, 12]


# ---- by the training processes


@pytest.mark.parametrize(
    "options",
    [
        [],
        pytest.param(["--optimizer.dtype", "bfloat16", "--data.num_workers", "1"], id="bf16", marks=pytest.mark.slow),
    ],
)
def test_inline_validation_disturbs_nothing(pretrain, options):
    """Every loss and every tensor is that of a run without it, through a resume in the middle of a validation."""
    plain = pretrain("plain", *options)
    assert not (plain / "validation.jsonl").exists()
    inline = ["--run.validate_interval", "4", *options]
    folder = pretrain("inline", *inline)
    assert_same_run(folder, plain)
    file = ValidationFile(folder)
    assert [(row["step"], row["name"]) for row in file.rows()] == [
        (step, name) for step in (0, 4, 8, 12) for name in ("dev", "other/one")
    ]
    assert file.rows()[-2]["checkpoint"] is None and file.rows()[0]["loss"] > file.rows()[-2]["loss"]
    # Those who follow the run find it done, and their numbers are the same.
    follower = RunFollower(folder, say=lambda _: None)
    assert [step for step, *_ in follower.folders()] == [3, 6, 9, 12]
    assert follower.catch_up() == 3
    model = model_of(load_config(folder / "config.toml"))
    model.load_state_dict(load_file(folder / "final" / "model.safetensors"))
    again = follower.sets[0].evaluate(model, follower.precision())
    assert file.rows()[-2]["loss"] == pytest.approx(again["loss"], rel=1e-6)
    assert told(folder / "final")["dev", "PNMI, layer 3"] == pytest.approx(again["pnmi"][0], abs=1e-4)


def test_every_inline_validation_is_in_the_curves(pretrain):
    """That before the first update, too."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = pretrain("run", "--run.validate_interval", "4", "--run.tracker", "tensorboard")
    curves = event_accumulator.EventAccumulator(str(next(folder.rglob("events.out.tfevents*")).parent))
    curves.Reload()
    assert [event.step for event in curves.Scalars("validation/dev/loss")] == [0, 4, 8, 12]
    assert [event.step for event in curves.Scalars("loss")] == list(range(1, 13))


def test_inline_validation_resumes_where_it_was_killed(pretrain, monkeypatch):
    inline = ["--run.validate_interval", "4", "--run.save_interval", "2"]
    expected = pretrain("whole", *inline)
    evaluate, save, count = ValidationSet.evaluate, Checkpoints.save, iter(range(100))

    def killed(self, *arguments, **options):
        if next(count) == 3:  # at step 4, after the first data set
            raise Killed
        return evaluate(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ValidationSet, "evaluate", killed)
        patch.setattr(Checkpoints, "save", lambda *args: save(*args, wait=True))  # what is dead writes nothing later
        with pytest.raises(Killed):
            pretrain("killed", *inline)
    folder = expected.with_name("killed")
    assert steps(folder) == [0, 0, 4]

    told, count = StopSignal.agreed, iter(range(100))
    stopping = []

    def signalled(self, *arguments, **options):
        if next(count) == 2:  # it resumes from step 2, validates 4 and begins with 8
            stopping.append(True)
        return evaluate(self, *arguments, **options)

    def asked(self) -> bool:
        self.received = "SIGTERM" if stopping else None
        return told(self)

    with monkeypatch.context() as patch:
        patch.setattr(ValidationSet, "evaluate", signalled)
        patch.setattr(StopSignal, "agreed", asked)
        pretrain("killed", *inline)
    assert not (folder / "final").exists() and steps(folder) == [0, 0, 4, 4] and len(rows(folder)) == 8
    pretrain("killed", *inline)
    assert_same_run(folder, expected)
    assert ValidationFile(folder).rows() == ValidationFile(expected).rows()


def test_stopped_during_the_validation_before_the_first_step(pretrain, monkeypatch):
    """It is seen at the next batch of it, and everything is made up for by the next start."""
    inline = ["--run.validate_interval", "4"]
    expected = pretrain("whole", *inline)
    asked = []

    def signalled(self) -> bool:
        asked.append(self)
        self.received = "SIGTERM" if len(asked) > 1 else None
        return self.received is not None

    with monkeypatch.context() as patch:
        patch.setattr(StopSignal, "agreed", signalled)
        folder = pretrain("told", *inline)
    assert steps(folder) == [] and rows(folder) == [] and len(asked) == 3
    assert_same_run(pretrain("told", *inline), expected)
    assert ValidationFile(folder).rows() == ValidationFile(expected).rows()


def test_killed_before_the_scores_are_in_the_card(pretrain, monkeypatch):
    """The same command ends what was begun, and then there is nothing left to do."""
    inline = ["--run.validate_interval", "4"]
    expected = pretrain("whole", *inline)
    with monkeypatch.context() as patch:
        patch.setattr(InlineValidation, "finish", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            pretrain("killed", *inline)
    folder = expected.with_name("killed")
    assert told(folder / "final") is None
    pretrain("killed", *inline)
    assert told(folder / "final") == told(expected / "final") is not None
    assert_same_run(folder, expected)
    before = (folder / "final" / "README.md").stat()
    pretrain("killed", *inline)
    assert (folder / "final" / "README.md").stat() == before


def test_a_follower_killed_before_the_scores_are_in_the_cards(run, monkeypatch):
    """The next start writes them, and a third leaves the cards alone."""
    with monkeypatch.context() as patch:
        patch.setattr(validation_run, "write_scores", lambda *_: None)
        RunFollower(run, say=lambda _: None).catch_up()
    cards = [run / name / "README.md" for name in ("final", "best")]
    assert not any(told(card.parent) for card in cards)
    RunFollower(run, say=lambda _: None).catch_up()
    assert all(told(card.parent) for card in cards)
    before = [card.stat() for card in cards]
    RunFollower(run, say=lambda _: None).catch_up()
    assert [card.stat() for card in cards] == before


def test_a_complete_run_whose_last_validation_is_missing_makes_up_for_it(pretrain):
    inline = ["--run.validate_interval", "4"]
    folder = pretrain("run", *inline)
    file, expected = ValidationFile(folder), ValidationFile(folder).rows()
    file.path.write_text("".join(json.dumps(row) + "\n" for row in expected[:-1]))
    pretrain("run", *inline)
    assert file.rows() == expected


def test_rows_of_a_future_that_did_not_happen_are_forgotten(pretrain):
    inline = ["--run.validate_interval", "4"]
    folder = pretrain("run", *inline)
    before = ValidationFile(folder).path.read_bytes().splitlines()
    for step in (9, 12):
        shutil.rmtree(folder / "checkpoints" / f"step_{step}")
    pretrain("run", "--run.validate_interval", "0", "--optimizer.lr", "1e-3")
    assert steps(folder) == [0, 0, 4, 4] and ValidationFile(folder).path.read_bytes().splitlines() == before[:4]


def test_inline_validation_without_data(pretrain, config):
    text = config.read_text()
    config.write_text(text[: text.index("[validation.dev]")])
    with pytest.raises(ConfigError, match=r"`run\.validate_interval` is 4, and there is nothing to validate on"):
        pretrain("run", "--run.validate_interval", "4")


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_validate_as_one(config, tmp_path, sharded):
    """They share the work (or, with shards, do it together), and what they train is the same with and without."""
    options = ["--optimizer.max_steps", "6", "--validation.dev.max_batch_length", "8000"]
    finish(launch(config, tmp_path / "plain", *options, processes=2, sharded=sharded))
    inline = [*options, "--run.validate_interval", "3"]
    finish(launch(config, tmp_path / "inline", *inline, processes=2, sharded=sharded))
    assert_same_run(tmp_path / "inline", tmp_path / "plain")
    inline_rows = ValidationFile(tmp_path / "inline").rows()
    assert [row["step"] for row in inline_rows] == [0, 0, 3, 3, 6, 6]
    RunFollower(tmp_path / "plain", say=lambda _: None).catch_up()
    followed = ValidationFile(tmp_path / "plain").rows()
    for ours, theirs in zip(inline_rows[2:], followed, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"checkpoint"}:
            assert ours[name] == (theirs[name] if name in ("name", "data") else pytest.approx(theirs[name], rel=1e-5))


@pytest.mark.slow
def test_beside_a_real_run(config, tmp_path):
    """`--watch` beside training that keeps one checkpoint: it ends with the run, and disturbs nothing."""
    options = ["--optimizer.max_steps", "40", "--run.save_interval", "2", "--run.keep_latest", "1"]
    finish(launch(config, tmp_path / "plain", *options))
    script = Path(__file__).resolve().parents[2] / "examples" / "validate.py"
    watcher = subprocess.Popen(
        [
            sys.executable,
            str(script),
            "--run-dir",
            str(tmp_path / "run"),
            "--watch",
            "--poll",
            "0.1",
            "--device",
            "cpu",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    finish(launch(config, tmp_path / "run", *options))
    printed = finish(watcher)
    assert_same_run(tmp_path / "run", tmp_path / "plain")
    assert 40 in steps(tmp_path / "run") and "Traceback" not in printed
    assert set(steps(tmp_path / "run")) <= set(range(2, 42, 2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(run):
    RunFollower(run, device="cuda", say=lambda _: None).catch_up()
    on_gpu = ValidationFile(run).rows()
    ValidationFile(run).path.unlink()
    RunFollower(run, device="cpu", say=lambda _: None).catch_up()
    for ours, theirs in zip(on_gpu, ValidationFile(run).rows(), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
