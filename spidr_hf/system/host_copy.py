"""Numbers on their way from a device to Python, without waiting for them."""

import torch
from torch import Tensor


class HostCopy:
    """A tensor's values on their way to the host. Asking for them waits for the copy, not for what was begun since."""

    def __init__(self, tensor: Tensor):
        self._values, self._event = tensor.detach(), None
        if tensor.is_cuda:
            self._values = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._values.copy_(tensor.detach(), non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tensor.device))  # which need not be the current GPU

    def tolist(self) -> list:
        """The values, once they are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._values.tolist()


__all__ = ["HostCopy"]
