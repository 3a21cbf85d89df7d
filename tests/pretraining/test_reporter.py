"""A metric of the model is named once, where it is computed, and reaches every place that reports."""

from dataclasses import dataclass, fields

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from accelerate.utils import LoggerType
from runs import assert_same_run, pretrain_here, results, rows, write_audio, write_config
from torch import Tensor

from spidr_hf.codebooks_spidr import SpidrTrainingStatistics, StatisticsBuffer
from spidr_hf.plots import curves
from spidr_hf.pretraining.updates import StepResult


@dataclass
class MoreStatistics(SpidrTrainingStatistics):
    """With a number, and a number per codebook, that a model did not have so far."""

    surprise: Tensor
    busiest_codeword: Tensor


@pytest.fixture
def toy_metrics(monkeypatch):
    reduce = StatisticsBuffer.reduce

    def with_more(self):
        known = reduce(self)
        values = {field.name: getattr(known, field.name) for field in fields(known)}
        return MoreStatistics(**values, surprise=known.loss.exp(), busiest_codeword=self.counts.argmax(-1))

    monkeypatch.setattr(StatisticsBuffer, "reduce", with_more)


class Recorder(GeneralTracker):
    """Stands for a tracker under the name of one that accelerate knows."""

    name, requires_logging_directory = "trackio", False
    logged: list[dict]

    def __init__(self, *_, **__):
        super().__init__()

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        type(self).logged = []

    def log(self, values, step=None, **_):
        self.logged.append(values)


def test_a_metric_is_named_once(toy_metrics, tmp_path, monkeypatch):
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "trackio", Recorder)
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [LoggerType.TRACKIO])
    config = write_config(tmp_path / "tiny.toml", write_audio(tmp_path / "audio"))
    options = ["--run.tracker", "trackio", "--optimizer.max_steps", "4", "--run.log_interval", "2"]
    whole = pretrain_here(config, tmp_path / "whole", *options)
    first, second = rows(whole)
    assert first["surprise"] > 1 and len(second["busiest_codeword"]) == 2
    logged = Recorder.logged[-1]
    assert logged["surprise"] == second["surprise"]
    assert [logged[f"busiest_codeword/{k}"] for k in range(2)] == second["busiest_codeword"]
    # Averaged over the steps of a row, through a resume.
    pretrain_here(config, tmp_path / "cut", *options, "--run.save_interval", "1", "--optimizer.max_steps", "3")
    assert_same_run(pretrain_here(config, tmp_path / "cut", *options, "--run.save_interval", "1"), whole)
    single = pretrain_here(config, tmp_path / "single", *options, "--run.log_interval", "1")
    means = [(a["surprise"] + b["surprise"]) / 2 for a, b in zip(rows(single)[::2], rows(single)[1::2], strict=True)]
    assert [row["surprise"] for row in results(whole)] == pytest.approx(means)
    # A panel of its own in the picture.
    figure = curves.curves_figure(rows(single), first_layer=2, codebook_size=12)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert {"surprise", "busiest codeword"} <= set(titles) and len([title for title in titles if title]) == 6
    (panel,) = (axes for axes in figure.axes if axes.get_title(loc="left") == "busiest codeword")
    assert [line.get_label() for line in panel.lines] == ["layer 2", "layer 3"]


def test_the_usual_picture_has_four_panels():
    row = {
        "step": 1,
        "epoch": 1,
        "loss": 2.0,
        "layer_losses": [2.0, 2.1],
        "target_ppl": 8.0,
        "pred_ppl": 9.0,
        "lr": 1.0,
    }
    row |= {"active_codewords": [9, 8], "grad_norm": 1.0, "lr": 1.0, "ema_decay": 0.999, "world_size": 1}
    row["audio_seconds_per_second"] = 3.0
    figure = curves.curves_figure([row], first_layer=2, codebook_size=12)
    assert len([axes for axes in figure.axes if axes.get_title(loc="left")]) == 4
    assert figure.get_size_inches().tolist() == [14, 8.5]


def test_a_skipped_update_has_every_column(toy_metrics, tmp_path, monkeypatch):
    """Empty ones, whatever the model reports."""
    config = write_config(tmp_path / "tiny.toml", write_audio(tmp_path / "audio"))
    monkeypatch.setattr(StepResult, "finite", property(lambda self: False))
    folder = pretrain_here(config, tmp_path / "run", "--optimizer.max_steps", "1")
    (row,) = rows(folder)
    assert row["surprise"] is None and row["busiest_codeword"] is None and row["loss"] is None
