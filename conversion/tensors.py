"""What both formats share: the tensors a configuration means, and the comparison with those of a file."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from spidr_hf import SpidrConfig, SpidrForPretraining
from spidr_hf.system.messages import shown

from .checkpoint_file import most_expanded
from .errors import ConversionError, NonFiniteError, TensorMismatchError

Shape = tuple[int, ...]
_MOST_LISTED = 12
ALLOW_NON_FINITE = "take tensors with NaN or infinite numbers as they are (else such a model is refused)"
# The largest models that are read, far beyond any that could be trained: what a configuration says is built (without
# memory, but not without time) before it is compared with the tensors.
_LARGEST = {
    "num_hidden_layers": 256,
    "conv_pos_depth": 64,
    "hidden_size": 1 << 16,
    "intermediate_size": 1 << 18,
    "codebook_size": 1 << 20,
    "conv_pos_kernel_size": 1 << 16,
}
_MOST_CONVOLUTIONS = 64
_LARGEST_CONVOLUTION = 1 << 16


def check_sizes(config: SpidrConfig) -> None:
    """Refuses a configuration of a model larger than any, before anything is made of it.

    Raises:
        ValueError: with the field's name in backticks.
    """
    for name, largest in _LARGEST.items():
        if getattr(config, name) > largest:
            raise ValueError(f"`{name}` is {shown(getattr(config, name), 40)}; models of at most {largest} are read.")
    for name in ("conv_dim", "conv_kernel", "conv_stride"):
        values = getattr(config, name)
        if len(values) > _MOST_CONVOLUTIONS or max(values) > _LARGEST_CONVOLUTION:
            raise ValueError(
                f"`{name}` is {shown(values, 100)}; at most {_MOST_CONVOLUTIONS} convolutions of at most "
                f"{_LARGEST_CONVOLUTION} each are read."
            )


def expected_tensors(config: SpidrConfig) -> dict[str, Tensor]:
    """State dict of `SpidrForPretraining(config)` on the meta device: names, shapes and dtypes without memory."""
    try:
        with torch.device("meta"):
            return dict(SpidrForPretraining(config).state_dict())
    except (ValueError, RuntimeError) as error:
        raise ConversionError(f"The configuration cannot be right: {error}") from None


def check_tensors(
    found: Mapping[str, Tensor], expected: Mapping[str, Shape], hints: Iterable[str] = (), *, what: str = "the file"
) -> None:
    """Refuses tensors that are not those of a configuration, or more than the file has bytes for.

    Args:
        found: the file's tensors by name.
        expected: names and shapes.
        hints: what may be the reason; said first.
        what: the file, for the message.

    Raises:
        TensorMismatchError: with the missing, unexpected and wrongly shaped tensors, and how many more there are.
    """
    missing = [f"missing: {shown(name)} {list(shape)}" for name, shape in expected.items() if name not in found]
    unexpected = [f"unexpected: {shown(name)} {_shape(found[name])}" for name in found if name not in expected]
    wrong = [
        f"wrong shape: {name} is {_shape(found[name])}, the configuration means {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name].shape) != tuple(shape)
    ]
    if missing or unexpected or wrong:
        counts = f"{len(missing)} missing, {len(unexpected)} unexpected, {len(wrong)} wrongly shaped"
        listed = [*hints]
        for problems in (missing, unexpected, wrong):
            more = len(problems) - _MOST_LISTED
            listed += problems[:_MOST_LISTED] + (
                [f"and {more} more {problems[0].partition(':')[0]}"] if more > 0 else []
            )
        raise TensorMismatchError(
            f"The tensors of {what} do not fit the configuration ({counts}): " + "; ".join(listed)
        )
    stored = {found[name].untyped_storage().data_ptr(): found[name].untyped_storage().nbytes() for name in expected}
    meant = sum(found[name].numel() * found[name].itemsize for name in expected)
    if meant > most_expanded(sum(stored.values())):
        raise TensorMismatchError(f"The tensors of {what} repeat {sum(stored.values())} bytes until they are {meant}.")


def _shape(tensor: Tensor) -> str:
    return shown(list(tensor.shape), 80)


def check_finite(tensors: Mapping[str, Tensor], what: str, *, allow: bool = False) -> list[str]:
    """Refuses tensors with NaN or infinite numbers, or returns a note about them.

    Args:
        tensors: of any type.
        what: the file or folder, for the message.
        allow: whether such tensors are wanted.

    Raises:
        NonFiniteError: with their names.
    """
    names = [name for name, tensor in tensors.items() if not _is_finite(tensor)]
    if not names:
        return []
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    listed = ", ".join(map(shown, names[:3])) + more
    if allow:
        return [f"{listed} hold numbers that are not finite."]
    raise NonFiniteError(
        f"{what} holds numbers that are not finite (NaN, infinite or beyond float32) in {listed}: the run that wrote "
        "it failed, or the file is damaged. Take an earlier checkpoint. (Converting and exporting take it as it is "
        "with --allow-non-finite.)"
    )


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() and not tensor.is_complex():
        return True
    if tensor.itemsize == 1:  # the 8-bit types have no arithmetic of their own
        tensor = tensor.float()
    return bool(torch.isfinite(tensor).all())


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


__all__ = ["ALLOW_NON_FINITE", "Shape", "as_stored", "check_tensors", "expected_tensors", "same_bits"]
