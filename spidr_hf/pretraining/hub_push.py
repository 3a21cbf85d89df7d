"""Models of a run on the Hub while it trains: the newest checkpoint, and at the end the final model.

Uploads happen in a thread and never hold up training: a checkpoint that comes while one is under way waits, and a newer
one takes its place. What fails is said, and the run continues.
"""

import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from huggingface_hub import HfApi

from ..configuration_spidr import SpidrConfig
from ..feature_extraction_spidr import SpidrFeatureExtractor
from ..hub.card import trained_card
from ..hub_spidr import AUTO_MAP, save_code_files
from ..system.errors import ConfigError
from ..system.messages import counted
from ..training.observers import Observer
from ..training.planning import Line
from .config import PretrainingConfig

logger = logging.getLogger(__name__)

_WEIGHTS = "model.safetensors"
_STAGED = ".push-"
_FINAL = "The final model"


class HubPush(Observer):
    """Uploads to one repository, which is made (private) where there is none.

    Args:
        repo: "user/name".
        config: the run's configuration, for the model cards.
        output_dir: the run's folder, where uploads are put together (mostly links).
        say: takes a line for the user, once the final model is there.

    Each upload replaces the model at the repository's root and is a commit of its own, named for its step.
    """

    def __init__(
        self,
        repo: str,
        config: PretrainingConfig,
        output_dir: str | Path,
        say: Callable[[str | None], None] = print,
    ):
        self.repo = repo
        self._say = say
        self._config = config
        self._output_dir = Path(output_dir)
        self._pushed = ""
        for left in self._output_dir.glob(f"{_STAGED}*"):  # of a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        self.waiting: Path | None = None  # a folder in wait, ours to remove
        self._message = ""
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="push to the Hub", daemon=True)
        self._thread.start()

    def saved(self, folder: Path) -> None:
        """Upload the model of a complete checkpoint, as soon as there is time. Returns at once."""
        step = int(folder.name.removeprefix("step_"))
        try:
            self._enqueue(self._model_folder(folder, f"A checkpoint after {counted(step, 'update')}."), f"Step {step}")
        except OSError as error:
            logger.warning("%s is not pushed to %s: %s", folder, self.repo, error)

    def finish(self, final: Path | None, patience: float = 900.0) -> None:
        """Upload a finished model folder, if there is one; returns when all is uploaded, or after `patience` seconds.

        There may be no other upload after it.
        """
        if final is not None and self._upload_last(final, patience):
            self._say(f"Pushed to https://huggingface.co/{self.repo}")

    def _upload_last(self, folder: Path, patience: float) -> bool:
        try:
            staged = self._new_folder()
            for path in folder.iterdir():
                _link(path, staged / path.name)
            self._enqueue(staged, _FINAL)
        except OSError as error:
            logger.warning("%s is not pushed to %s: %s", folder, self.repo, error)
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(patience)
        if self._thread.is_alive():
            logger.warning("Pushing to %s is not done after %.0f s and is given up.", self.repo, patience)
        return self._pushed == _FINAL

    def _new_folder(self) -> Path:
        return Path(tempfile.mkdtemp(prefix=_STAGED, dir=self._output_dir))

    def _model_folder(self, checkpoint: Path, summary: str) -> Path:
        """What `from_pretrained` and the Hub need of a checkpoint, without its optimizer."""
        staged = self._new_folder()
        # As a link it stays whole when the run removes the checkpoint meanwhile.
        _link(checkpoint / _WEIGHTS, staged / _WEIGHTS)
        model = SpidrConfig.from_dict(self._config.model.to_dict())
        model.architectures, model.auto_map = ["SpidrForPretraining"], dict(AUTO_MAP)
        model.save_pretrained(staged)
        SpidrFeatureExtractor(do_normalize=self._config.data.normalize).save_pretrained(staged)
        save_code_files(staged)
        start = self._config.run.init_ckpt
        card = trained_card(model, summary, self._config.to_toml(), model_id=self.repo, start=start)
        (staged / "README.md").write_text(card, encoding="utf-8")
        return staged

    def _enqueue(self, folder: Path, message: str) -> None:
        with self._changed:
            if self.waiting is not None:
                shutil.rmtree(self.waiting, ignore_errors=True)
            self.waiting, self._message = folder, message
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self.waiting is not None or self._closing)
                if self.waiting is None:
                    return
                folder, message, self.waiting = self.waiting, self._message, None
            try:
                api = HfApi()
                api.create_repo(self.repo, private=True, exist_ok=True)
                api.upload_folder(repo_id=self.repo, folder_path=str(folder), commit_message=message)
                self._pushed = message
            except Exception as error:  # whatever a network does must not end a run of days
                logger.warning("Pushing %r to %s failed: %s", message, self.repo, error)
            finally:
                shutil.rmtree(folder, ignore_errors=True)


def check_push(repo: str, *, make: bool) -> None:
    """Raises `ConfigError` where nothing can be uploaded: no (valid) token, no right to write, no network.

    Args:
        repo: "user/name".
        make: make the repository (private) where there is none; otherwise nothing is changed on the Hub.
    """
    try:
        if make:
            HfApi().create_repo(repo, private=True, exist_ok=True)
        else:
            HfApi().whoami()
    except Exception as error:  # whatever a network does
        reason = (str(error).strip().splitlines() or [repr(error)])[0]
        raise ConfigError(
            f"`run.push_to_hub` {repo}: nothing can be pushed there ({reason}). Log in with `hf auth login`, or leave "
            "it out."
        ) from error


def start_push(config: PretrainingConfig, output_dir: Path, say: Callable[[str | None], None]) -> Observer:
    """The uploads that a run's config asks for; to be made on the first process."""
    repo = config.run.push_to_hub
    return HubPush(repo, config, output_dir, say) if repo else Observer()


def _link(path: Path, target: Path) -> None:
    try:
        os.link(path, target)
    except OSError:  # another file system
        shutil.copy2(path, target)


def plan(repo: str | None) -> Iterator[Line]:
    """Where models go on the Hub. Raises `ConfigError` where nothing can be uploaded."""
    if repo:
        check_push(repo, make=False)
        yield Line("hub", f"every checkpoint's model and the final one to https://huggingface.co/{repo}")


__all__ = ["HubPush", "check_push", "plan", "start_push"]
