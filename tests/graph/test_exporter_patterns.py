"""The patterns are those that PyTorch's exporter really leaves, of transformers' own modules."""

import warnings

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, Phi3Config
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.phi3 import modeling_phi3

from echoatt_exporter.graph.canonical.fuse_rms_norm import FuseRmsNorm
from echoatt_exporter.graph.canonical.fuse_rotary import FuseRotary
from echoatt_exporter.graph.lowering.fuse_skip_rms_norm import FuseSkipRmsNorm
from echoatt_exporter.trace.simplify import simplify

HEADS, SIZE = 2, 16
FIELDS = {"hidden_size": HEADS * SIZE, "num_attention_heads": HEADS, "pad_token_id": 0}


class Everything(torch.nn.Module):
    """Every form of norm and rotation, one behind the other."""

    def __init__(self):
        super().__init__()
        self.llama = LlamaRMSNorm(HEADS * SIZE)
        self.gemma = Gemma2RMSNorm(HEADS * SIZE)
        self.olmo = Olmo2RMSNorm(HEADS * SIZE)
        self.head_norm = LlamaRMSNorm(SIZE)
        yarn = {
            "rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0,
            "original_max_position_embeddings": 64,
        }  # fmt: skip
        self.whole = LlamaRotaryEmbedding(LlamaConfig(**FIELDS, rope_parameters=yarn))
        self.part = modeling_phi3.Phi3RotaryEmbedding(
            Phi3Config(**FIELDS, partial_rotary_factor=0.5)
        )
        generator = torch.Generator().manual_seed(1)
        for parameter in self.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)

    def forward(self, x, skip, position_ids):
        x = x + skip
        h = self.olmo(self.gemma(self.llama(x)))
        heads = self.head_norm(h.view(*h.shape[:2], HEADS, SIZE)).transpose(1, 2)
        q, k = apply_rotary_pos_emb(heads, heads + 1, *self.whole(h, position_ids))
        q, k = modeling_phi3.apply_rotary_pos_emb(q, k, *self.part(h, position_ids))
        return x, q, k


@pytest.fixture(scope="module", params=[torch.float32, torch.float16], ids=["fp32", "fp16"])
def exported(request):
    """The module's graph, tidied as the tracer does it, inputs, and PyTorch's outputs."""
    module = Everything().to(request.param).eval()
    generator = torch.Generator().manual_seed(2)
    x, skip = (torch.randn(2, 3, HEADS * SIZE, generator=generator) for _ in range(2))
    inputs = (x.to(request.param), skip.to(request.param), torch.tensor([[0, 1, 2], [7, 8, 9]]))
    auto = torch.export.Dim.AUTO
    # torch's exporter warns of what it does itself
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        program = torch.onnx.export(
            module, inputs, dynamo=True, optimize=False, opset_version=24, verbose=False,
            dynamic_shapes=({0: auto, 1: auto},) * 3, input_names=["x", "skip", "positions"],
            output_names=["sum", "q", "k"],
        )  # fmt: skip
        outputs = module(*inputs)
    simplify(program.model)
    names = ("x", "skip", "positions")
    feeds = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
    return program.model, feeds, [value.numpy() for value in outputs]


def test_everything_is_fused_and_the_numbers_are_pytorchs(exported, evaluate, ops):
    model, feeds, expected = exported
    for transform in (FuseRmsNorm(), FuseRotary(), FuseSkipRmsNorm()):
        assert transform(model).modified
    counts = ops(model)
    half = expected[0].dtype == np.float16
    assert counts["SkipSimplifiedLayerNormalization"] == 1
    assert counts["RMSNormalization"] == 3
    assert counts["RotaryEmbedding"] == 4
    assert not {"ReduceMean", "Pow", "Reciprocal", "Neg", "Slice"} & set(counts)
    # Half precision steps are 2^-10 of the value, and a few roundings add up
    tolerance = 2e-2 if half else 5e-6
    for result, value in zip(evaluate(model, feeds).values(), expected, strict=True):
        np.testing.assert_allclose(result, value, rtol=tolerance, atol=tolerance)
