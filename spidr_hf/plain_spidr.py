"""Modules that are read instead of called: when that may be, and how any other is called.

A layer that reads its modules' weights computes several of them in one pass, and in its own layout. It also goes past
everything that may hang on a module: hooks of probing tools, offloading (whose weights lie elsewhere until the module
is called), adapters, quantisation. So only PyTorch's own module with its weights in place and nothing on it is read
(`is_plain`). Everything else is called, with the layer's own form of the operation inside (`call`): a hook that only
looks, or weights that come from a disk, change no digit.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules import module as of_all
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _get_current_dispatch_mode

_TYPES = (nn.Linear, nn.Conv1d, nn.LayerNorm, nn.GroupNorm)


def plain_mode() -> bool:
    """Whether operations may be chosen by what is fastest here: nothing records or rewrites them for elsewhere."""
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing() or _get_current_dispatch_mode() is not None)


def is_plain(module: nn.Module) -> bool:
    """Whether the weights of `module` may be read: PyTorch's own class, its weights in place, nothing on it."""
    return type(module) in _TYPES and is_untouched(module) and _in_place(module)


def is_untouched(*modules: nn.Module) -> bool:
    """Whether nothing hangs on the modules that a call would run: hooks of any kind, or another `forward`."""
    if (
        of_all._global_forward_hooks
        or of_all._global_forward_pre_hooks
        or of_all._global_backward_hooks
        or of_all._global_backward_pre_hooks
    ):
        return False
    return not any(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or module._compiled_call_impl is not None
        for module in modules
    )


def _in_place(module: nn.Module) -> bool:
    return all(
        parameter is None or (type(parameter) is nn.Parameter and not parameter.is_meta)
        for parameter in module._parameters.values()
    )


def are_ordinary(*tensors: Tensor | None) -> bool:
    """Whether the tensors (or None) are PyTorch's own, neither quantised nor sharded."""
    return all(tensor is None or type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)


def call(module: nn.Module, x: Tensor, operation: Callable, form: Callable) -> Tensor:
    """`module(x)`, in which `form` stands for PyTorch's `operation` (`F.linear`, say) where its tensors are ordinary.

    `form` takes what `operation` takes.
    """
    with _Instead(operation, form):
        return module(x)


class _Instead(TorchFunctionMode):
    def __init__(self, operation: Callable, form: Callable):
        super().__init__()
        self.operation, self.form = operation, form

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        ours = func is self.operation and are_ordinary(
            *(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        )
        return (self.form if ours else func)(*args, **kwargs)


__all__ = ["are_ordinary", "call", "is_plain", "is_untouched", "plain_mode"]
