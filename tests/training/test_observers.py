"""Observers: four hooks, called in order; what is not overridden does nothing."""

from pathlib import Path

from runs import pretrain_here, write_audio, write_config

from spidr_hf.pretraining import observers
from spidr_hf.training.observers import Observer, Observers


class Diary(Observer):
    """Writes down the hooks it is called by."""

    def __init__(self):
        self.entries = []

    def before_step(self, step: int) -> None:
        self.entries.append(("before", step))

    def after_step(self, step: int) -> None:
        self.entries.append(("after", step))

    def saved(self, folder: Path) -> None:
        self.entries.append(("saved", folder.name, sorted(path.name for path in folder.iterdir())))

    def finish(self, final: Path | None) -> None:
        self.entries.append(("finish", final))


def test_several_are_one():
    diaries = [Diary(), Diary()]
    both = Observers([diaries[0], Observer(), diaries[1]])
    both.before_step(1)
    both.after_step(1)
    both.saved(Path(__file__).parent)
    both.finish(None)
    first, second = (diary.entries for diary in diaries)
    assert first == second and [entry[0] for entry in first] == ["before", "after", "saved", "finish"]


def test_the_hooks_of_a_run(tmp_path, monkeypatch):
    """Around every update, at every complete checkpoint, and at the end; a resumed run begins where it stands."""
    diary = Diary()
    start = observers.start_observers
    monkeypatch.setattr(
        "spidr_hf.examples.pretrain.start_observers", lambda *arguments: Observers([start(*arguments), diary])
    )
    config = write_config(tmp_path / "tiny.toml", write_audio(tmp_path / "audio"))
    folder = pretrain_here(config, tmp_path / "run", "--optimizer.max_steps", "4")
    steps = [entry for entry in diary.entries if entry[0] in ("before", "after")]
    assert steps == [("after", 0)] + [(hook, step) for step in range(1, 5) for hook in ("before", "after")]
    saved = [entry for entry in diary.entries if entry[0] == "saved"]
    assert [name for _, name, _ in saved] == ["step_3", "step_4"] and "trainer_state.json" in saved[0][2]
    assert diary.entries[-1] == ("finish", folder / "final")
    diary.entries.clear()
    pretrain_here(config, folder, "--optimizer.max_steps", "5")
    assert diary.entries[:3] == [("after", 4), ("before", 5), ("after", 5)]
