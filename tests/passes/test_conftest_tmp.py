import pytest


@pytest.mark.parametrize("layout", ["separate", "biased", "packed", "split", "heads"])
def test_x(decoder, evaluate, layout):
    d = decoder(layout=layout, **({"query_heads": 2} if layout == "heads" else {}))
    m = d.build()
    out = evaluate(m, d.feeds())
    print(out["logits"].std(), m.graph.num_nodes(), len(m.graph.initializers))
