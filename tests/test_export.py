"""The encoder outside of PyTorch's eager mode: torch.export, ONNX, Apple's GPUs, each where it runs."""

import numpy as np
import pytest
import torch
from tiny import tiny_model
from torch.export import Dim

from spidr_hf import SpidrModel

SAMPLES = (16_000, 7321)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> SpidrModel:
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    return SpidrModel.from_pretrained(folder).eval()


class LastLayer(torch.nn.Module):
    """What is exported: waveforms in, the last hidden state out."""

    def __init__(self, encoder: SpidrModel):
        super().__init__()
        self.encoder = encoder

    def forward(self, input_values: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.encoder(input_values, attention_mask).last_hidden_state


class Units(torch.nn.Module):
    """Waveforms in, the representation of layer 3 out, as units and features use it."""

    def __init__(self, encoder: SpidrModel):
        super().__init__()
        self.encoder = encoder

    def forward(self, input_values: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.encoder.get_intermediate_outputs(input_values, attention_mask, num_layers=3)[-1]


def waveform(samples: int, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, samples, generator=torch.Generator().manual_seed(samples))


def padded_batch(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Waveforms of these lengths, padded to the first's, and their mask."""
    mask = torch.arange(lengths[0]) < torch.tensor(lengths)[:, None]
    return waveform(lengths[0], len(lengths)) * mask, mask


@pytest.mark.parametrize("wrapper", [LastLayer, Units])
def test_torch_export_of_any_length(encoder, wrapper):
    module = wrapper(encoder).eval()
    with torch.no_grad():
        program = torch.export.export(module, (waveform(12_345),), dynamic_shapes={"input_values": {1: Dim.DYNAMIC}})
        for samples in SAMPLES:
            torch.testing.assert_close(
                program.module()(waveform(samples)), module(waveform(samples)), atol=1e-5, rtol=1e-5
            )


def test_torch_export_of_padded_batches(encoder):
    inputs = dict(zip(("input_values", "attention_mask"), padded_batch(9000, 7000), strict=True))
    with torch.no_grad():
        program = torch.export.export(encoder, (), kwargs=inputs, strict=False)
        output = program.module()(**inputs)
        expected = encoder(**inputs)
    torch.testing.assert_close(output.last_hidden_state, expected.last_hidden_state, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", [LastLayer, Units])
def test_onnx_of_padded_batches_of_any_size_and_length(encoder, wrapper, tmp_path):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    module = wrapper(encoder).eval()
    path = tmp_path / "encoder.onnx"
    shape = {0: Dim("batch", min=1, max=64), 1: Dim("samples", min=400, max=480_000)}
    torch.onnx.export(
        module,
        padded_batch(12_345, 9000, 400),
        str(path),
        input_names=["input_values", "attention_mask"],
        output_names=["features"],
        dynamic_shapes={"input_values": shape, "attention_mask": shape},
        dynamo=True,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for lengths in ((16_000, 7000), (7321,), (9000, 8999, 5000, 401)):
        inputs = padded_batch(*lengths)
        (features,) = session.run(None, {"input_values": inputs[0].numpy(), "attention_mask": inputs[1].numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(features, module(*inputs).numpy(), atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not torch.backends.mps.is_available(), reason="no Apple GPU")
def test_apple_gpu(encoder):
    inputs = dict(zip(("input_values", "attention_mask"), padded_batch(9000, 7000), strict=True))
    with torch.no_grad():
        expected = encoder(**inputs).last_hidden_state
        output = encoder.to("mps")(**{name: value.to("mps") for name, value in inputs.items()})
    encoder.to("cpu")
    torch.testing.assert_close(output.last_hidden_state.cpu()[0], expected[0], atol=1e-3, rtol=1e-3)
