"""What both formats share: the tensors a configuration means, and the comparison with those of a file."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from spidr_hf import SpidrConfig, SpidrForPretraining

from .errors import ConversionError, TensorMismatchError

Shape = tuple[int, ...]


def expected_tensors(config: SpidrConfig) -> dict[str, Tensor]:
    """State dict of `SpidrForPretraining(config)` on the meta device: names, shapes and dtypes without memory."""
    try:
        with torch.device("meta"):
            return dict(SpidrForPretraining(config).state_dict())
    except ValueError as error:
        raise ConversionError(f"The configuration cannot be right: {error}") from None


def check_tensors(
    found: Mapping[str, Tensor], expected: Mapping[str, Shape], hints: Iterable[str] = (), *, what: str = "the file"
) -> None:
    """Raises one `TensorMismatchError` that lists every missing, unexpected and wrongly shaped tensor."""
    missing = [f"missing: {name} {list(shape)}" for name, shape in expected.items() if name not in found]
    unexpected = [f"unexpected: {name} {list(found[name].shape)}" for name in found if name not in expected]
    wrong = [
        f"wrong shape: {name} is {list(found[name].shape)}, the configuration means {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name].shape) != tuple(shape)
    ]
    if missing or unexpected or wrong:
        counts = f"{len(missing)} missing, {len(unexpected)} unexpected, {len(wrong)} wrongly shaped"
        lines = [f"The tensors of {what} do not fit the configuration ({counts}):", *missing, *unexpected, *wrong]
        raise TensorMismatchError("\n  ".join(lines) + "".join(f"\n{hint}" for hint in hints))


def as_stored(tensors: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors as the model holds them: contiguous, each with memory of its own, other float types as float32.

    Float32 values are kept bit for bit. Returns them, in the order of `reference`, with notes for the user.
    """
    result, notes = {}, []
    changed: dict[str, list[str]] = {}
    for name, meta in reference.items():
        tensor = tensors[name].detach()
        if tensor.is_floating_point() != meta.is_floating_point() or tensor.is_sparse or tensor.is_quantized:
            raise TensorMismatchError(f"{name} has the type {tensor.dtype}; {meta.dtype} is needed.")
        if tensor.dtype != meta.dtype:
            changed.setdefault(f"{tensor.dtype} and become {meta.dtype}", []).append(name)
            tensor = tensor.to(meta.dtype)
        if not torch.isfinite(tensor).all():
            changed.setdefault("numbers that are not all finite (from a run that failed?)", []).append(name)
        # A copy always: the tensor may be a part of another one, or a window into the file on disk.
        result[name] = tensor.clone(memory_format=torch.contiguous_format)
    for what, names in changed.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        notes.append(f"{', '.join(names[:3])}{more} are stored as {what}.")
    return result, notes


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors agree in type, shape and every bit (NaN included)."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    views = [tensor.detach().contiguous().flatten().view(torch.uint8) for tensor in (left, right)]
    return torch.equal(*views)


__all__ = ["Shape", "as_stored", "check_tensors", "expected_tensors", "same_bits"]
