"""transformers' own common suites on every class, from the source distribution of the transformers installed.

They promise what users and tools of transformers rely on: initialisation, saving and loading in every form, recorded
outputs, attention implementations, activation checkpointing, batches. `tests/fetch_transformers_tests.py` fetches them.
"""

import copy
import importlib
import inspect
import sys
import unittest
from contextlib import nullcontext
from types import ModuleType
from typing import ClassVar

import numpy as np
import pytest
import torch
from fetch_transformers_tests import FOLDER

import spidr_hf
from spidr_hf import SpidrConfig, SpidrFeatureExtractor

PACKAGE = "transformers_common_tests"
if not (FOLDER / "__init__.py").exists():
    pytest.skip(
        "transformers' common tests are not there: run `python tests/fetch_transformers_tests.py`",
        allow_module_level=True,
    )


def _import_suites() -> tuple[ModuleType, ModuleType, ModuleType]:
    """The suites as modules of one package, with stand-ins for the three modules that are not distributed."""
    stand_ins = {
        "": {"__path__": [str(FOLDER)]},
        "utils": {"__path__": []},
        # Fields that every config accepts.
        "utils.test_configuration_utils": {
            "config_common_kwargs": {
                "return_dict": False,
                "output_hidden_states": True,
                "output_attentions": True,
                "dtype": "float16",
                "chunk_size_feed_forward": 5,
                "architectures": ["BertModel"],
                "id2label": {0: "label"},
                "label2id": {"label": "0"},
                "problem_type": "regression",
            }
        },
        "exporters": {"__path__": []},
        # Tests of exporters (ExecuTorch, ONNX, OpenVINO) and of text generation.
        "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
        "generation": {"__path__": []},
        "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    }
    for name, content in stand_ins.items():
        full_name = f"{PACKAGE}.{name}".rstrip(".")
        module = sys.modules.setdefault(full_name, ModuleType(full_name))
        vars(module).update(content)
    names = ("test_modeling_common", "test_configuration_common", "test_sequence_feature_extraction_common")
    modeling, configuration, feature_extraction = (importlib.import_module(f"{PACKAGE}.{name}") for name in names)
    # The suite asks these tables which kind of model a class is; registered classes are not in them.
    for table, class_name in (
        ("MODEL_MAPPING_NAMES", "SpidrModel"),
        ("MODEL_FOR_PRETRAINING_MAPPING_NAMES", "SpidrForPretraining"),
        ("MODEL_FOR_CTC_MAPPING_NAMES", "SpidrForCTC"),
        ("MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES", "SpidrForSequenceClassification"),
        ("MODEL_FOR_AUDIO_XVECTOR_MAPPING_NAMES", "SpidrForXVector"),
    ):
        setattr(modeling, table, {**getattr(modeling, table), "spidr": class_name})
    return modeling, configuration, feature_extraction


modeling_common, configuration_common, feature_extraction_common = _import_suites()
SUITE = inspect.getsource(modeling_common.ModelTesterMixin)


class SpidrModelTester:
    """A tiny model and a batch for it, under the names that the suite knows."""

    batch_size = 3
    samples = 1024
    seq_length = encoder_seq_length = key_length = 14  # frames
    hidden_size = 16
    num_hidden_layers = 2
    num_attention_heads = 2
    is_training = True

    def __init__(self, **fields):
        self.fields = fields

    def get_config(self) -> SpidrConfig:
        return SpidrConfig(
            vocab_size=12,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=20,
            conv_dim=(32, 32, 32),
            conv_kernel=(8, 8, 8),
            conv_stride=(4, 4, 4),
            conv_pos_kernel_size=16,
            conv_pos_depth=2,
            num_conv_pos_embedding_groups=2,
            num_codebooks=2,
            codebook_size=8,
            mask_time_length=2,
            classifier_proj_size=8,
            tdnn_dim=(32, 32),
            tdnn_kernel=(5, 3),
            tdnn_dilation=(1, 2),
            xvector_output_dim=32,
            num_labels=3,
            **self.fields,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[SpidrConfig, dict[str, torch.Tensor]]:
        input_values = torch.randn(self.batch_size, self.samples)
        attention_mask = torch.ones(self.batch_size, self.samples, dtype=torch.int64)
        return self.get_config(), {"input_values": input_values, "attention_mask": attention_mask}


class SpidrSuite(modeling_common.ModelTesterMixin):
    """The suite with what it has to know about waveforms, and the tests that do not apply to them."""

    # Weights missing from a checkpoint: in the suite for newer models only.
    test_can_init_all_missing_weights_before_2023 = True
    fields: ClassVar[dict[str, object]] = {}

    def setUp(self) -> None:
        self.model_tester = SpidrModelTester(**self.fields)

    def subTest(self, msg=None, **parameters):
        # Of subtests, keep those of a class: a report for each parameter in each dtype would be thousands.
        return nullcontext() if "." in str(msg) else super().subTest(msg, **parameters)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = copy.deepcopy(inputs_dict)
        batch, frames = self.model_tester.batch_size, self.model_tester.seq_length
        if return_labels:
            shape = {
                spidr_hf.SpidrForCTC: (batch, 4),
                spidr_hf.SpidrForSequenceClassification: (batch,),
                spidr_hf.SpidrForAudioFrameClassification: (batch, frames),
                spidr_hf.SpidrForXVector: (batch,),
            }.get(model_class)
            if shape is not None:
                inputs["labels"] = torch.ones(shape, dtype=torch.int64)
            if model_class is spidr_hf.SpidrForPretraining:
                inputs["mask_time_indices"] = torch.arange(frames).expand(batch, -1) % 2 == 0
        return inputs

    @unittest.skip("reads transformers' log, which commands run in the same process may have silenced")
    def test_can_load_ignoring_mismatched_shapes(self):
        pass

    @unittest.skip("the input is a waveform: there is no table of embeddings")
    def test_model_get_set_embeddings(self):
        pass

    @unittest.skip("the input is a waveform: there are no tokens to resize for")
    def test_resize_tokens_embeddings(self):
        pass

    @unittest.skip("the input is a waveform: there are no tokens to resize for")
    def test_resize_embeddings_untied(self):
        pass


class SpidrModelTest(SpidrSuite, unittest.TestCase):
    """Every class in SpidR's form: LayerNorm in the extractor, post-norm layers."""

    all_model_classes = (
        spidr_hf.SpidrModel,
        spidr_hf.SpidrForPretraining,
        spidr_hf.SpidrForCTC,
        spidr_hf.SpidrForSequenceClassification,
        spidr_hf.SpidrForAudioFrameClassification,
        spidr_hf.SpidrForXVector,
    )

    # Early releases of the suite want a gradient for frozen parameters too: the teacher's, and an unread norm's.
    test_all_params_have_gradient = "intentionally_frozen" in SUITE

    @unittest.skipIf("integer buffers" not in SUITE, "this release of the suite expects the step counter in float16")
    def test_keep_in_fp32_modules(self):
        super().test_keep_in_fp32_modules()

    def test_config(self) -> None:
        configuration_common.ConfigTester(
            self, config_class=SpidrConfig, hidden_size=48, has_text_modality=False
        ).run_common_tests()

    def test_init_weights_can_init_buffers(self) -> None:
        """As in the suite; the sums of the codebooks are random, and are held to what they are drawn from."""
        self.all_model_classes = tuple(c for c in self.all_model_classes if c is not spidr_hf.SpidrForPretraining)
        super().test_init_weights_can_init_buffers()
        with torch.device("meta"):
            model = spidr_hf.SpidrForPretraining(self.model_tester.get_config())
        model.to_empty(device="cpu")
        model.init_weights()
        sums = model.codebooks.sums
        torch.testing.assert_close(sums.mean(1), torch.zeros_like(sums[:, 0]), atol=1e-6, rtol=0)
        torch.testing.assert_close(sums.var(1, correction=0), torch.ones_like(sums[:, 0]), atol=1e-3, rtol=0)
        assert (model.codebooks.counts == 1).all()
        assert model.current_step.tolist() == [0]


class SpidrVariantModelTest(SpidrModelTest):
    """Every class with the other options: DinoSR, GroupNorm, pre-norm layers, biases, the sum over layers."""

    fields: ClassVar[dict[str, object]] = {
        "objective": "dinosr",
        "feat_extract_norm": "group",
        "do_stable_layer_norm": True,
        "attention_bias": True,
        "conv_bias": True,
        "layerdrop": 0.1,
        "use_weighted_layer_sum": True,
        "mask_feature_prob": 0.1,
        "mask_feature_length": 2,
    }


class SpidrForAudioTokenizationTest(SpidrSuite, unittest.TestCase):
    """The tokenizer of speech. Like the audio tokenizers of transformers it returns codes and nothing else."""

    all_model_classes = (spidr_hf.SpidrForAudioTokenization,)
    has_attentions = False

    def setUp(self) -> None:
        super().setUp()
        self.model_tester.is_training = False  # there is no loss

    @unittest.skip("codes are all that it returns")
    def test_hidden_states_output(self):
        pass

    @unittest.skip("codes are all that it returns")
    def test_retain_grad_hidden_states_attentions(self):
        pass


class SpidrFeatureExtractionTester:
    """Batches of waveforms for the suite."""

    feature_size = 1
    batch_size = 7
    min_seq_length = 400
    max_seq_length = 2000
    seq_length_diff = (max_seq_length - min_seq_length) // (batch_size - 1)

    def prepare_feat_extract_dict(self) -> dict[str, object]:
        return {
            "feature_size": self.feature_size,
            "padding_value": 0.0,
            "sampling_rate": 16_000,
            "return_attention_mask": True,
            "do_normalize": True,
            "norm_eps": 1e-5,
        }

    def prepare_inputs_for_common(self, equal_length: bool = False, numpify: bool = False) -> list:
        lengths = [self.min_seq_length + i * self.seq_length_diff for i in range(self.batch_size)]
        generator = np.random.default_rng(0)
        waveforms = [
            generator.normal(size=self.max_seq_length if equal_length else length).astype(np.float32)
            for length in lengths
        ]
        return waveforms if numpify else [waveform.tolist() for waveform in waveforms]


class SpidrFeatureExtractionTest(feature_extraction_common.SequenceFeatureExtractionTestMixin, unittest.TestCase):
    """Padding, truncation, masks and saving."""

    feature_extraction_class = SpidrFeatureExtractor

    def setUp(self) -> None:
        self.feat_extract_tester = SpidrFeatureExtractionTester()
