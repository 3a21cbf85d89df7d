#!/usr/bin/env python
"""K-means on features, for units of models or layers without codebooks.

    python examples/extract_features.py MODEL DATA FEATURES --layers 6
    python examples/train_kmeans.py FEATURES/6 kmeans.safetensors --clusters 500
    python examples/extract_units.py MODEL OTHER_DATA OUT_DIR --kmeans kmeans.safetensors

FEATURES is the folder of one layer. scikit-learn's mini-batch k-means with k-means++ runs on them; the same files, seed
and versions give the same centroids. The file also says which model and layer they belong to. Features are held in
memory (1 h of a base model: 550 MB); beyond --max-frames whole files are drawn at random.
"""

import argparse
import json
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

if not __package__:  # run as a command: the repository, not this folder, is where imports start
    sys.path[0] = str(next(up for up in Path(__file__).resolve().parents if (up / "spidr_hf").is_dir()))
    __package__ = "spidr_hf.examples"  # what relative imports start from (PEP 366)

from spidr_hf import __version__
from spidr_hf.system.commands import clear_errors, user_path
from spidr_hf.units.kmeans import feature_files, train_kmeans


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("features", type=user_path, metavar="FEATURES", help="folder of one layer's .pt or .npy files")
    parser.add_argument("out", type=user_path, metavar="OUT", help="file to write: .safetensors")
    parser.add_argument("--clusters", type=int, required=True, metavar="N", help="how many units")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--max-frames", type=int, default=5_000_000, help="default: 5 000 000 (28 h)")
    parser.add_argument("--max-iterations", type=int, default=100, help="passes over the frames (default: 100)")
    args = parser.parse_args()
    with clear_errors():
        if args.out.suffix != ".safetensors":
            raise ValueError(f"{args.out}: a k-means is written as .safetensors.")
        args.out.parent.mkdir(parents=True, exist_ok=True)
        kmeans = train_kmeans(
            feature_files(args.features),
            args.clusters,
            seed=args.seed,
            max_frames=args.max_frames,
            max_iterations=args.max_iterations,
            provenance=features_provenance(args.features),
        )
        kmeans.provenance |= {
            "features": str(args.features.resolve()),
            "spidr_hf": __version__,
            "scikit-learn": version("scikit-learn"),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        kmeans.save(args.out)
        made_from = kmeans.provenance
        print(
            f"{args.out}: {args.clusters} clusters of {made_from['frames']} frames from {made_from['files']} files, "
            f"mean squared distance {made_from['inertia_per_frame']:.4g}"
        )


def features_provenance(folder: Path) -> dict[str, object]:
    """What extract_features.py wrote beside the features about model and layer; nothing for other features."""
    sidecar = folder / "features.provenance.json"
    if not sidecar.exists():
        return {}
    found = json.loads(sidecar.read_text(encoding="utf-8"))
    wanted = ("model", "sha256", "revision", "layer", "before_residual", "data")
    return {key: found[key] for key in wanted if found.get(key) is not None}


if __name__ == "__main__":
    main()
