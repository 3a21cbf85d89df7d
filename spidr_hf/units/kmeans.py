"""K-means on features: trained by scikit-learn's mini-batch algorithm, stored as safetensors with its provenance."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..system.errors import NonFiniteError
from ..system.files import replaced_file
from ..system.messages import counted, one_line, shown
from ..system.tables import parse_table

_FORMAT = "spidr_hf k-means"
# What `extract_features.py` says beside the features about how they were made.
FEATURES_SIDECAR = "features.provenance.json"
# Frames per step of the mini-batch algorithm; HuBERT's recipe.
BATCH_FRAMES = 10_000


@dataclass
class KMeans:
    """Centroids (clusters x H, float32) of one layer's features, and what they were made from."""

    centroids: Tensor
    provenance: dict[str, Any] = field(default_factory=dict)

    def predict(self, features: Tensor) -> Tensor:
        """Nearest centroid (Euclidean) of T x H features: T units."""
        if features.shape[-1] != self.centroids.shape[1]:
            raise ValueError(
                f"The features have {features.shape[-1]} dimensions, the centroids {self.centroids.shape[1]}."
            )
        if not torch.isfinite(features).all():
            raise NonFiniteError("The features have NaN or infinity: extract them with --dtype bfloat16 or float32.")
        centroids = self.centroids.to(features.device)
        return (centroids.square().sum(-1) - 2 * features.float() @ centroids.t()).argmin(-1)

    def check_layer(self, layers: Sequence[int] | None, *, after_residual: bool = False) -> int:
        """The layer whose features these centroids cluster. Raises `ValueError` where another one is asked for."""
        layer, before = self.provenance.get("layer"), self.provenance.get("before_residual", True)
        if layers is not None and len(layers) > 1:
            raise ValueError("A k-means belongs to one layer: give one with --layers.")
        if layers is None and layer is None:
            raise ValueError("This k-means does not say which layer it belongs to: give it with --layers.")
        if layers is not None and layer is not None and layers[0] != layer:
            raise ValueError(f"This k-means was trained on features of layer {layer}, not {layers[0]}.")
        if before == after_residual:
            place, flag = ("before", "leave --after-residual out") if before else ("after", "give --after-residual")
            raise ValueError(f"This k-means was trained on features {place} the residual: {flag}.")
        return layer if layers is None else layers[0]  # type: ignore[return-value]  # one of them is known

    def other_model(self, model: Mapping[str, str | None]) -> str | None:
        """The model whose features these centroids cluster, where that is not this one (of `describe_model`)."""
        for key in ("sha256", "model"):
            there, here = self.provenance.get(key), model.get(key)
            if there and here:
                return None if there == here else str(self.provenance.get("model") or there)
        return None

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file that is complete or not there at all."""
        metadata = {"format": _FORMAT, "provenance": json.dumps(self.provenance)}
        with replaced_file(path) as partial:
            save_file({"centroids": self.centroids.contiguous().float()}, partial, metadata=metadata)


def load_kmeans(path: str | os.PathLike) -> KMeans:
    """What `KMeans.save` wrote."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such k-means file (`examples/train_kmeans.py` makes one).")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(f"{path} holds no k-means: `examples/train_kmeans.py` makes one.")
            centroids = file.get_tensor("centroids")
            if not torch.isfinite(centroids).all():
                raise NonFiniteError(f"{path} has centroids that are NaN or infinite: train the k-means again.")
            made_from = parse_table(metadata.get("provenance", "{}").encode(), f"The provenance in {shown(path)}")
    except SafetensorError as error:
        raise ValueError(f"{shown(path)} cannot be read as a safetensors file ({one_line(error)}).") from error
    return KMeans(centroids, made_from)


def load_features(path: Path) -> Tensor:
    """One utterance's features: T x H, float32, from a `.pt` or `.npy` file."""
    try:
        if path.suffix == ".npy":
            features = torch.from_numpy(np.load(path, allow_pickle=False))
        else:
            features = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and numpy raise many kinds for a broken file
        raise ValueError(f"{path} cannot be read as features ({type(error).__name__}).") from error
    if not isinstance(features, Tensor) or features.ndim != 2 or not features.is_floating_point():
        raise ValueError(f"{path} does not hold features: expected one float tensor of frames x dimensions.")
    if not torch.isfinite(features).all():
        raise NonFiniteError(
            f"{path} has non-finite values (NaN or infinity): extract it again, with --dtype bfloat16 or float32."
        )
    return features.float()


def feature_files(folder: str | os.PathLike) -> list[Path]:
    """The feature files below a folder, sorted: `.pt`, else `.npy`.

    Raises `ValueError` where there are none, and for the folder above those of several layers.
    """
    folder = Path(folder)
    if folder.is_dir() and not (folder / FEATURES_SIDECAR).exists():
        inside = (path for path in folder.iterdir() if path.name.isdigit() and path.is_dir())
        if layers := sorted((path.name for path in inside if any(path.rglob(FEATURES_SIDECAR))), key=int):
            raise ValueError(
                f"{folder} holds the features of the layers {', '.join(layers)}: give one of them, "
                f"{folder / layers[-1]} for example."
            )
    for suffix in (".pt", ".npy"):
        # Hidden ones are what a killed process left half-written.
        if files := sorted(path for path in folder.rglob(f"*{suffix}") if not path.name.startswith(".")):
            return files
    what = "no such folder" if not folder.is_dir() else "no feature files (.pt, .npy) in this folder or below it"
    raise ValueError(f"{folder}: {what} (`examples/extract_features.py` makes them).")


class FeatureFiles(Mapping[str, Tensor]):
    """Features by file id, read from `<fileid>.pt` or `.npy` below a folder when asked for.

    Raises `ValueError` where files that are needed are missing.
    """

    def __init__(self, folder: str | os.PathLike, needed: Iterable[str] = ()):
        files = feature_files(folder)
        self.suffix = files[0].suffix
        self._paths = {file.relative_to(folder).as_posix().removesuffix(self.suffix): file for file in files}
        if missing := sorted(set(needed) - set(self._paths)):
            raise ValueError(
                f"{folder} has no features for {counted(len(missing), 'file', of=len(set(needed)))}, for example "
                f"{missing[0]}{self.suffix}."
            )

    def __getitem__(self, fileid: str) -> Tensor:
        return self.load(self._paths[fileid])

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)

    @staticmethod
    def load(path: str | os.PathLike) -> Tensor:
        """Features of one file: T x D."""
        return load_features(Path(path))


def train_kmeans(
    files: Sequence[Path],
    clusters: int,
    *,
    seed: int = 0,
    max_frames: int = 5_000_000,
    max_iterations: int = 100,
    provenance: Mapping[str, Any] | None = None,
) -> KMeans:
    """
    Mini-batch k-means with k-means++ (scikit-learn), the same for the same files, seed and versions.

    Args:
        files: Feature files (T x H each).
        clusters: How many centroids.
        seed: Of the order of files, the sample, and the algorithm.
        max_frames: Features are held in memory; of more frames than this, whole files are drawn at random.
        max_iterations: Passes over the sample at most.
        provenance: What the features are, stored with the centroids.
    """
    from sklearn.cluster import MiniBatchKMeans

    if clusters < 2:
        raise ValueError(f"A k-means needs at least 2 clusters, got {clusters}.")
    features, frames, width = [], 0, None
    for i in np.random.default_rng(seed).permutation(len(files)).tolist():
        x = load_features(files[i])
        if width is not None and x.shape[1] != width:
            raise ValueError(
                f"{files[i]} has {x.shape[1]} dimensions, the files before it {width}: give one layer's folder."
            )
        width, frames = x.shape[1], frames + len(x)
        features.append(x)
        if frames >= max_frames:
            break
    sample = torch.cat(features)[:max_frames].numpy()
    if len(sample) < clusters:
        raise ValueError(f"{clusters} clusters need as many frames at least; there are {len(sample)}.")
    algorithm = MiniBatchKMeans(
        clusters,
        init="k-means++",
        n_init=5,
        batch_size=min(BATCH_FRAMES, len(sample)),
        max_iter=max_iterations,
        max_no_improvement=100,
        reassignment_ratio=0.0,
        random_state=seed,
    ).fit(sample)
    return KMeans(
        torch.from_numpy(algorithm.cluster_centers_.astype(np.float32)),
        {
            **(provenance or {}),
            "clusters": clusters,
            "seed": seed,
            "frames": len(sample),
            "files": len(features),
            "inertia_per_frame": float(algorithm.inertia_) / len(sample),
        },
    )


__all__ = ["BATCH_FRAMES", "FeatureFiles", "KMeans", "feature_files", "load_features", "load_kmeans", "train_kmeans"]
