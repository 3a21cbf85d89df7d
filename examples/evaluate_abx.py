#!/usr/bin/env python
"""ABX error of features or units, within and across speakers, in percent (chance: 50).

    python examples/write_items.py ALIGNMENTS triphones.item
    python examples/extract_features.py MODEL DATA FEATURES --layers 5 6 7
    python examples/evaluate_abx.py triphones.item FEATURES --json abx.json
    python examples/evaluate_abx.py triphones.item UNITS --units       # what extract_units.py wrote: a file, or layers

FEATURES_DIR is a layer's folder with <#file>.pt (or .npy), frames x dimensions, 50 frames per second; or the folder
above with one per layer: then every layer is scored. Frames are compared by their angle, units by whether they are
identical. Files may be named by the end of their path alone where that is unique. ITEM_FILE has the columns
#file onset offset #phone prev-phone next-phone speaker (ZeroSpeech's, or those of write_items.py).

Where fastabx is installed (Python >= 3.12) it computes the scores, else this package does, by the same definition:
dynamic time warping over angles. The two draw other tokens where groups are larger than --max-size-group; with 0 for
both limits they agree.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

if not __package__:  # run as a command: the repository, not this folder, is where imports start
    sys.path[0] = str(next(up for up in Path(__file__).resolve().parents if (up / "spidr_hf").is_dir()))
    __package__ = "spidr_hf.examples"  # what relative imports start from (PEP 366)

import numpy as np
import torch
from torch import Tensor

from spidr_hf.evaluation.abx import FREQUENCY, NoTripletsError, Token, abx, read_items
from spidr_hf.hub.card import add_results, evaluation_results, read_card
from spidr_hf.system.commands import HelpFormatter, clear_errors, output_path, picture_path, user_path
from spidr_hf.system.files import write_text
from spidr_hf.system.messages import counted
from spidr_hf.system.names import match_names
from spidr_hf.system.processes import device_of
from spidr_hf.units.kmeans import FeatureFiles
from spidr_hf.units.unit_files import read_units, unit_files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("item", type=user_path, metavar="ITEM_FILE")
    parser.add_argument(
        "features", type=user_path, metavar="FEATURES_DIR", help="folder of features, or one with layers"
    )
    parser.add_argument("--units", action="store_true", help="FEATURES_DIR holds units (units.jsonl), not features")
    parser.add_argument("--speaker", choices=("within", "across"), nargs="+", default=["within", "across"])
    parser.add_argument(
        "--context", choices=("within", "any"), default="within", help="same neighbouring phones, or any"
    )
    parser.add_argument("--max-size-group", type=int, default=10, help="tokens per phone, context and speaker; 0: all")
    parser.add_argument("--max-x-across", type=int, default=5, help="other speakers for X; 0: all")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument("--frequency", type=int, default=FREQUENCY, help="frames per second")
    parser.add_argument("--backend", choices=("auto", "fastabx", "own"), default="auto")
    parser.add_argument("--device", help="for example cpu or cuda:1 (default: a GPU where there is one)")
    parser.add_argument("--json", type=output_path, metavar="OUT", help="write the scores there")
    parser.add_argument("--plot", type=picture_path, metavar="PICTURE", help="draw curves over layers")
    parser.add_argument(
        "--card", nargs=2, metavar=("MODEL", "NAME"), help="tell MODEL's card the scores, as of data NAME"
    )
    args = parser.parse_args()
    with clear_errors():
        if args.plot:  # what is missing is told before anything is computed
            from spidr_hf.plots.figures import layer_figure, save_figure
        if args.card:
            read_card(user_path(args.card[0]))
        device = device_of(args.device)
        if args.backend == "fastabx" and not args.units and importlib.util.find_spec("fastabx") is None:
            raise ValueError("fastabx is not installed (it needs Python >= 3.12): pip install fastabx.")
        tokens = read_items(args.item, args.frequency)
        files = unit_files(args.features) if args.units else layer_folders(args.features)
        if args.plot and None in files:
            raise ValueError("--plot draws curves over layers: give the folder above the layers' folders.")
        speakers = chosen_speakers(args.speaker, tokens)
        limits = {"max_size_group": args.max_size_group or None, "max_x_across": args.max_x_across or None}
        scores: dict[int | None, dict[str, float]] = {}
        for layer, path in files.items():
            features = Units(path) if args.units else FeatureFiles(path)
            named = by_known_names(tokens, features, path)
            for speaker in tuple(speakers):
                try:
                    if use_fastabx(args, renamed=named != tokens):
                        error = by_fastabx(args, path, features, speaker, limits)
                    else:
                        error = abx(
                            named,
                            features,
                            distance="identical" if args.units else "angular",
                            speaker=speaker,
                            context=args.context,
                            seed=args.seed,
                            device=device,
                            progress=True,
                            **limits,
                        )
                except NoTripletsError as reason:
                    if speakers == [speaker]:
                        raise
                    print(reason, file=sys.stderr)
                    speakers.remove(speaker)
                    continue
                scores.setdefault(layer, {})[speaker] = 100 * error
        single = None in scores
        result = scores[None] if single else {"layers": {str(layer): values for layer, values in scores.items()}}
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            write_text(args.json, json.dumps(result, indent=2) + "\n")
        if args.card:
            model, name = args.card
            kind = "abx_units" if args.units else "abx"
            for layer, values in scores.items():
                shares = {f"{kind}_{speaker}": value / 100 for speaker, value in values.items()}
                add_results(user_path(model), evaluation_results(shares, name, layer=layer))
        if args.plot:
            save_figure(layer_figure(scores, titles=("ABX error (%)",), chance=50), args.plot)
        for layer, values in scores.items():
            name = "" if layer is None else f"layer {layer}: "
            print(f"{name}ABX error {', '.join(f'{value:.2f} % {speaker}' for speaker, value in values.items())}")


class Units(Mapping[str, Tensor]):
    """Units of a file by file id, each T x 1."""

    def __init__(self, path: Path):
        self._units = read_units(path)

    def __getitem__(self, fileid: str) -> Tensor:
        return torch.as_tensor(np.asarray(self._units[fileid], dtype=np.int64))[:, None]

    def __iter__(self) -> Iterator[str]:
        return iter(self._units)

    def __len__(self) -> int:
        return len(self._units)


def chosen_speakers(wanted: Sequence[str], tokens: Sequence[Token]) -> list[str]:
    """Within and across speakers, as far as the items have speakers to compare."""
    names = {token.speaker for token in tokens}
    if len(names) > 1 or list(wanted) == ["across"]:
        return list(wanted)
    print(f"All items are of one speaker, {min(names)!r}: there is no score across speakers.", file=sys.stderr)
    return [speaker for speaker in wanted if speaker == "within"]


def by_known_names(tokens: Sequence[Token], features: Mapping[str, Tensor], path: Path) -> list[Token]:
    """The tokens under the names that the features have. Raises `ValueError` where some have none."""
    wanted = sorted({token.fileid for token in tokens})
    matches, without = match_names(wanted, features, "entry")
    if without:
        raise ValueError(
            f"{path} has nothing for {counted(len(without), 'file', of=len(wanted))} of the items, for example "
            f"{without[0]!r}; one that it has is {next(iter(features))!r}."
        )
    return [replace(token, fileid=matches[token.fileid]) for token in tokens]


def use_fastabx(args: argparse.Namespace, *, renamed: bool) -> bool:
    """Whether fastabx computes: it is installed or asked for, and finds the features under the items' own names."""
    if args.backend == "fastabx" and (renamed or args.units):
        raise ValueError("fastabx is used for features that have the names of the items: --backend own does the rest.")
    found = args.backend == "fastabx" or (args.backend == "auto" and importlib.util.find_spec("fastabx") is not None)
    return found and not renamed and not args.units


def layer_folders(folder: Path) -> dict[int | None, Path]:
    """The folder itself, under None; or the layers' folders in it, by layer."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder of features (`examples/extract_features.py` makes them).")
    layers = {int(path.name): path for path in folder.iterdir() if path.is_dir() and path.name.isdigit()}
    return dict(sorted(layers.items())) if layers else {None: folder}


def by_fastabx(
    args: argparse.Namespace, folder: Path, files: FeatureFiles, speaker: str, limits: dict[str, int | None]
) -> float:
    """The same by fastabx."""
    import fastabx

    try:
        return fastabx.zerospeech_abx(
            args.item,
            folder,
            speaker=speaker,
            context=args.context,
            frequency=args.frequency,
            feature_maker=files.load,
            extension=files.suffix,
            seed=args.seed,
            **({"device": args.device} if args.device else {}),  # not known to all its versions
            **limits,
        )
    except getattr(fastabx, "EmptyTaskError", ()) as error:
        raise NoTripletsError(f"There are no triplets {speaker} speakers. {error}") from error


if __name__ == "__main__":
    main()
