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
    """What is exported: one utterance in, the last hidden state out."""

    def __init__(self, encoder: SpidrModel):
        super().__init__()
        self.encoder = encoder

    def forward(self, input_values: torch.Tensor) -> torch.Tensor:
        return self.encoder(input_values).last_hidden_state


class Units(torch.nn.Module):
    """One utterance in, the representation of layer 3 out, as units and features use it."""

    def __init__(self, encoder: SpidrModel):
        super().__init__()
        self.encoder = encoder

    def forward(self, input_values: torch.Tensor) -> torch.Tensor:
        return self.encoder.get_intermediate_outputs(input_values, num_layers=3)[-1]


def waveform(samples: int, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, samples, generator=torch.Generator().manual_seed(samples))


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
    mask = torch.arange(9000) < torch.tensor([9000, 7000])[:, None]
    inputs = {"input_values": waveform(9000, 2), "attention_mask": mask}
    with torch.no_grad():
        program = torch.export.export(encoder, (), kwargs=inputs, strict=False)
        output = program.module()(**inputs)
        expected = encoder(**inputs)
    torch.testing.assert_close(output.last_hidden_state, expected.last_hidden_state, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", [LastLayer, Units])
def test_onnx_of_any_length(encoder, wrapper, tmp_path):
    pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    module = wrapper(encoder).eval()
    path = tmp_path / "encoder.onnx"
    torch.onnx.export(
        module,
        (waveform(12_345),),
        str(path),
        input_names=["input_values"],
        output_names=["features"],
        dynamic_shapes={"input_values": {1: Dim("samples", min=400, max=480_000)}},
        dynamo=True,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for samples in SAMPLES:
        (features,) = session.run(None, {"input_values": waveform(samples).numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(features, module(waveform(samples)).numpy(), atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not torch.backends.mps.is_available(), reason="no Apple GPU")
def test_apple_gpu(encoder):
    mask = torch.arange(9000) < torch.tensor([9000, 7000])[:, None]
    inputs = {"input_values": waveform(9000, 2), "attention_mask": mask}
    with torch.no_grad():
        expected = encoder(**inputs).last_hidden_state
        output = encoder.to("mps")(**{name: value.to("mps") for name, value in inputs.items()})
    encoder.to("cpu")
    torch.testing.assert_close(output.last_hidden_state.cpu()[0], expected[0], atol=1e-3, rtol=1e-3)
