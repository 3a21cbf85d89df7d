#!/usr/bin/env python
"""K-means on features, for units of models or layers without codebooks.

    python examples/extract_features.py MODEL DATA FEATURES --layers 6
    python examples/train_kmeans.py FEATURES/6 kmeans.safetensors --clusters 500
    python examples/extract_units.py MODEL OTHER_DATA OUT_DIR --kmeans kmeans.safetensors

FEATURES is the folder of one layer. scikit-learn's mini-batch k-means with k-means++ runs on them; the same files, seed
and versions give the same centroids. The file also says which model and layer they belong to. Features are held in
memory (1 h of a base model: 550 MB); beyond --max-frames whole files are drawn at random. An OUT of other features or
options is replaced with --overwrite only; one of the same is left as it is.
"""

import argparse
import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

if not __package__:  # run as a command: the repository, not this folder, is where imports start
    sys.path[0] = str(next(up for up in Path(__file__).resolve().parents if (up / "spidr_hf").is_dir()))
    __package__ = "spidr_hf.examples"  # what relative imports start from (PEP 366)

from spidr_hf import __version__
from spidr_hf.system.commands import HelpFormatter, clear_errors, output_path, user_path
from spidr_hf.system.messages import counted
from spidr_hf.system.processes import RunLock
from spidr_hf.system.tables import read_table
from spidr_hf.training.folder_settings import setting_changes
from spidr_hf.units.kmeans import FEATURES_SIDECAR, feature_files, load_kmeans, train_kmeans
from spidr_hf.units.stores import IDENTITY


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("features", type=user_path, metavar="FEATURES", help="folder of one layer's .pt or .npy files")
    parser.add_argument("out", type=output_path, metavar="OUT", help="file to write: .safetensors")
    parser.add_argument("--clusters", type=int, required=True, metavar="N", help="how many units")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-frames", type=int, default=5_000_000, help="default: 5 000 000 (28 h)")
    parser.add_argument("--max-iterations", type=int, default=100, help="passes over the frames")
    parser.add_argument("--overwrite", action="store_true", help="replace a k-means of other features or options")
    args = parser.parse_args()
    with clear_errors(needs=["sklearn"]), one_at_a_time(args.out):
        if args.out.suffix != ".safetensors":
            raise ValueError(f"{args.out}: a k-means is written as .safetensors.")
        files = feature_files(args.features)
        options = {name: getattr(args, name) for name in ("clusters", "seed", "max_frames", "max_iterations")}
        made_from = {**features_provenance(args.features), "features_sha256": listing_hash(args.features, files)}
        if already_there(args.out, {**made_from, **options}, overwrite=args.overwrite):
            print(f"{args.out} is there already, made from the same features with the same options.")
            return
        kmeans = train_kmeans(files, **options, provenance={**made_from, **options})
        kmeans.provenance |= {
            "features": str(args.features.resolve()),
            "spidr_hf": __version__,
            "scikit-learn": version("scikit-learn"),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        kmeans.save(args.out)
        made_from = kmeans.provenance
        print(
            f"{args.out}: {counted(args.clusters, 'cluster')} of {counted(made_from['frames'], 'frame')} from "
            f"{counted(made_from['files'], 'file')}, mean squared distance {made_from['inertia_per_frame']:.4g}"
        )


@contextmanager
def one_at_a_time(out: Path) -> Iterator[None]:
    """Keeps a second start from the same file."""
    lock = RunLock(out.parent, patience=2.0, name=f".{out.stem[:60]}.lock")
    try:
        yield
    finally:
        lock.path.unlink(missing_ok=True)
        lock.release()


def already_there(out: Path, settings: Mapping[str, Any], *, overwrite: bool) -> bool:
    """Whether the k-means is there. Raises `RunFolderError` where another one is, which is not to be replaced."""
    if overwrite or not out.exists():
        return False
    made_from = load_kmeans(out).provenance
    # A model is known by its weights, and data by its features, wherever they lie; earlier versions said less.
    known = settings.keys() & made_from.keys() - {"data", *(("model",) if "sha256" in settings else ())}
    there, here = ({name: values[name] for name in known} for values in (made_from, settings))
    setting_changes(out, there, here, advice="Choose another file, or --overwrite to replace it.")
    return True


def listing_hash(folder: Path, files: Sequence[Path]) -> str:
    """Of the names and sizes of feature files: what they hold is told by their provenance."""
    listing = "".join(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}\n" for path in files)
    return hashlib.sha256(listing.encode(errors="surrogateescape")).hexdigest()


def features_provenance(folder: Path) -> dict[str, object]:
    """What extract_features.py wrote beside the features about how they were made; nothing for other features."""
    sidecar = folder / FEATURES_SIDECAR
    if not sidecar.exists():
        return {}
    found = read_table(sidecar)
    if found.get("complete") is False:
        print(f"The extraction into {folder} has not ended: this k-means is of what is there.", file=sys.stderr)
    known = {key: found[key] for key in ("model", "revision", "data") if found.get(key) is not None}
    return known | {key: found.get(key) for key in IDENTITY if key in found}


if __name__ == "__main__":
    main()
