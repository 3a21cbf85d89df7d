"""The own kernels on a machine without a GPU: in Triton's interpreter."""

import pytest
import torch

from spidr_hf import codebooks_spidr, kernels_spidr, layers_spidr


def run_kernels_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on every operation that would be a kernel on a GPU is one here, too, unless `use_kernels(False)`."""

    def kernels_run(x: torch.Tensor) -> bool:
        return kernels_spidr.kernels_wanted(x)

    for module in (kernels_spidr, layers_spidr, codebooks_spidr):
        monkeypatch.setattr(module, "kernels_run", kernels_run)


def need_interpreter(on_cpu: bool = False) -> None:
    """Skips where kernels can run neither on a GPU nor in the interpreter; `on_cpu`: where they cannot on a CPU."""
    triton = pytest.importorskip("triton", reason="the kernels need Triton: pip install triton")
    if on_cpu and torch.cuda.is_available() and not triton.knobs.runtime.interpret:
        pytest.skip("where there is a GPU, kernels run there")
    if not torch.cuda.is_available() and not triton.knobs.runtime.interpret:
        pytest.skip("without a GPU the kernels need TRITON_INTERPRET=1 before Triton is imported")


__all__ = ["need_interpreter", "run_kernels_anywhere"]
