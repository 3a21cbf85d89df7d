"""Converts a SpidR or DinoSR checkpoint into a folder that Transformers loads and the Hub shows.

    python conversion/convert_checkpoint.py spidr-base facebook/spidr-base
    python conversion/convert_checkpoint.py path/to/step_400000.pt my-spidr --objective spidr
    python conversion/convert_checkpoint.py https://example.org/dinosr.ckpt my-dinosr
    python conversion/convert_checkpoint.py coml/spidr-vp20 spidr-vp20 --push-to-hub me/spidr-vp20

After the first of them, `AutoModel.from_pretrained("facebook/spidr-base")` works in the folder it was run in.
The format (SpidR's own in all its forms, or the original DinoSR's of fairseq) is found out from the file. No code from
the file ever runs. The folder holds model.safetensors, config.json, preprocessor_config.json, the code files for
trust_remote_code=True and a model card.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a command: the repository, not this folder, is where imports start
    sys.path[0] = str(next(up for up in Path(__file__).resolve().parents if (up / "spidr_hf").is_dir()))
    __package__ = "spidr_hf.conversion"  # what relative imports start from (PEP 366)

import huggingface_hub
from transformers.utils import logging

from spidr_hf.hub.card import converted_card
from spidr_hf.system.commands import HelpFormatter, bars_of_downloads_alone, end
from spidr_hf.system.files import remove_abandoned
from spidr_hf.system.messages import one_line

from .checkpoints import read_config, read_pretraining_checkpoint
from .errors import ConversionError
from .model_folder import check_free, save_model, whole_folder
from .sources import MIRROR_VARIABLE, Source, find_source, published
from .tensors import ALLOW_NON_FINITE
from .verify import TOLERANCE, compare_with_spidr, require_spidr


def convert(
    source: str,
    output: str,
    *,
    config: str | None = None,
    objective: str | None = None,
    model_id: str | None = None,
    allow_non_finite: bool = False,
) -> Source:
    """Converts `source` (see `find_source`) into the new folder `output`. Returns what was found as the source.

    Args:
        config: path of a configuration in the format's own field names, in place of what comes with the checkpoint.
        objective: "spidr" or "dinosr", where nothing else tells.
        model_id: the name of the model in its card; by default `output`.
        allow_non_finite: whether tensors may hold NaN or infinite numbers.

    Raises:
        ConversionError: nothing has been written then.
    """
    check_free(Path(output))
    remove_abandoned(Path(output).absolute())
    given = read_config(config) if config else None
    found = find_source(source)
    if objective and found.objective and objective != found.objective:
        raise ConversionError(f"{source} was trained with --objective {found.objective}, not {objective}.")
    with found.reading():
        converted = read_pretraining_checkpoint(
            found.path,
            given,
            objective or found.objective,
            config_beside=found.config,
            allow_non_finite=allow_non_finite,
        )
    for note in converted.notes:
        print(f"note: {one_line(note)}", file=sys.stderr)
    if model_id is None:
        model_id = Path(output).name if Path(output).is_absolute() or ".." in Path(output).parts else str(Path(output))
    with whole_folder(output) as folder:
        save_model(converted, folder)
        step = int(converted.tensors["current_step"])
        card = converted_card(
            converted.config, model_id=model_id, origin=found.origin, update_count=step, card=found.card
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
    return found


def verify(folder: str) -> None:
    """Prints how far the converted model is from the `spidr` package.

    Raises:
        ConversionError: farther than rounding explains.
    """
    differences = compare_with_spidr(folder)
    print("Largest absolute differences to the spidr package on the same audio:")
    for name, difference in differences.items():
        print(f"  {name:40} {difference:.2e}")
    worst = max(differences, key=lambda name: differences[name])
    if not differences[worst] <= TOLERANCE:
        raise ConversionError(
            f"{worst} differs by {differences[worst]:.2e}, more than rounding ({TOLERANCE}) explains."
        )


def push(folder: str, repository: str, *, private: bool) -> None:
    """Uploads the folder to the Hub, creating the repository if need be.

    Raises:
        ConversionError: the Hub refuses.
    """
    try:
        url = huggingface_hub.create_repo(repository, exist_ok=True, private=private or None)
        huggingface_hub.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Upload the converted checkpoint"
        )
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConversionError(
            f"{folder} is complete, but uploading it to {repository} failed: {reason} (Not logged in? `hf auth login`.)"
        ) from None
    print(f"Uploaded to {url}.")


def main(arguments: Sequence[str] | None = None) -> int:
    if arguments is None:  # as a command, by whatever name
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that temporary folders go
        logging.set_verbosity_error()
        bars_of_downloads_alone()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help=f"a checkpoint file, its URL, a repository of the Hub (owner/name, or owner/name/path/to/file.pt), or one "
        f"of: {', '.join(published())}. The environment variable {MIRROR_VARIABLE} names another server for these.",
    )
    parser.add_argument("output", metavar="OUTPUT_DIR", help="the folder to write; it must not hold anything yet")
    parser.add_argument(
        "--config",
        metavar="JSON",
        help="configuration of the model, or of its whole run, in the field names of its format (default: the "
        "config.json beside the checkpoint, the settings inside it, or SpidR's defaults)",
    )
    parser.add_argument(
        "--objective",
        choices=("spidr", "dinosr"),
        help="the training objective, where neither tells (default: what file and config tell)",
    )
    parser.add_argument("--allow-non-finite", action="store_true", help=ALLOW_NON_FINITE)
    parser.add_argument(
        "--verify", action="store_true", help="run the result and the installed spidr package on the same audio"
    )
    parser.add_argument("--push-to-hub", metavar="REPO", help="upload the folder to this repository of the Hub")
    options = parser.parse_args(arguments)
    try:
        if options.verify:
            require_spidr()
        found = convert(
            options.source,
            options.output,
            config=options.config,
            objective=options.objective,
            model_id=options.push_to_hub,
            allow_non_finite=options.allow_non_finite,
        )
        print(f"Wrote {options.output}: AutoModel.from_pretrained({str(options.output)!r}) loads it.")
        if options.verify:
            verify(options.output)
        if options.push_to_hub:
            private = bool(found.card and found.card.get("private"))
            if private:
                print(f"Its authors state no licence, so {options.push_to_hub} is private if it is new.")
            push(options.output, options.push_to_hub, private=private)
    except (ConversionError, OSError, MemoryError) as error:
        print(f"error: {one_line(error) or type(error).__name__}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        end("Interrupted. The same command starts again.")
    return 0


__all__ = ["convert", "main", "push", "verify"]

if __name__ == "__main__":
    sys.exit(main())
