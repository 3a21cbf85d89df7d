"""What travels between host and GPU while a step runs: batches one way, the numbers of a step the other."""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ..data.batches import Batch


class BatchMover:
    """Moves batches to a device, on CUDA from page-locked memory and on a stream of its own.

    A step that never waits for the device leaves Python ahead of it by most of a step. The copies of the next batch
    then begin as soon as Python gets to them, beside the kernels of the step before, instead of queueing behind them.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: "Batch") -> "Batch":
        """The batch with its tensors on the device, for use on the current stream."""
        if self.stream is None:
            return batch.to(self.device)
        with torch.cuda.stream(self.stream):
            moved = batch.to(self.device)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.stream)  # the GPU waits, Python does not
        for tensor in moved.inputs.values():
            # Their memory belongs to the other stream, which must not reuse it while this one still reads.
            tensor.record_stream(current)
        return moved


__all__ = ["BatchMover"]
