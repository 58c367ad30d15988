"""ChooseTokens: a graph gives the most probable tokens, and what tells that they mean something."""

import numpy as np
import onnx_ir as ir

from echoatt_exporter.graph.lowering.cuda.choose_tokens import ChooseTokens
from echoatt_runtime.contract import CHOICES, LOGIT_SUMS, LOGITS


def test_tokens_and_sums_are_those_of_the_logits(decoder, evaluate, difference):
    model, feeds = decoder().build(), decoder().feeds()
    assert ChooseTokens()(model).modified
    found = evaluate(model, feeds)
    logits = found[LOGITS]
    np.testing.assert_array_equal(found[CHOICES], logits.argmax(-1))
    np.testing.assert_allclose(found[LOGIT_SUMS], logits.sum(-1), rtol=1e-5, atol=1e-5)
    assert difference(found, evaluate(decoder().build(), feeds)) == 0


def test_a_sum_tells_of_one_logit_that_is_no_number(decoder, evaluate):
    model, feeds = decoder().build(), decoder().feeds()
    head = model.graph.initializers["head"]
    weight = head.const_value.numpy().copy()
    for broken in (np.nan, np.inf, -np.inf):
        weight[:, 3] = broken
        head.const_value = ir.tensor(weight, name="head")
        ChooseTokens()(model)
        assert not np.isfinite(evaluate(model, feeds)[LOGIT_SUMS]).any()


def test_it_does_nothing_twice(decoder):
    model = decoder().build()
    names = [output.name for output in model.graph.outputs]
    ChooseTokens()(model)
    assert [output.name for output in model.graph.outputs] == [*names, CHOICES, LOGIT_SUMS]
    assert not ChooseTokens()(model).modified
