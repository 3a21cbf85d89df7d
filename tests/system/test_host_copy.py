"""Numbers on their way from a device; `tests/pretraining/test_updates.py` has them on a GPU."""

from types import SimpleNamespace

import torch

from spidr_hf.system.host_copy import HostCopy


def test_the_end_of_a_copy_is_told_by_its_own_gpu(monkeypatch):
    """`validate.py --device cuda:1` computes beside the current GPU, whose stream knows nothing of the copy."""
    recorded, empty = [], torch.empty
    event = SimpleNamespace(record=lambda *stream: recorded.append(stream), synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"stream of {device}")
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory, **options: empty(*shape, **options))
    values, device = torch.tensor([1.0, 2.0]), torch.device("cuda:1")
    tensor = SimpleNamespace(is_cuda=True, device=device, shape=values.shape, dtype=values.dtype, detach=lambda: values)
    assert HostCopy(tensor).tolist() == [1.0, 2.0] and recorded == [("stream of cuda:1",)]
