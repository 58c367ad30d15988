"""Keys in a configuration that its family's code does not read: as transformers computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_family import FULL, SLIDING, SLIDING_WINDOW
from tests.tiny_models import TINY_MODELS, build_tiny_model
from transformers import AutoModelForCausalLM

from echoatt_exporter import load_shared
from echoatt_exporter.architecture import architecture_of
from echoatt_exporter.errors import UnsupportedModelError
from echoatt_exporter.families import FAMILIES, family_of
from echoatt_exporter.share.outline import read_outline

# The ends of twelve positions: what a window of five hides, and a full layer shows
TOKENS = torch.arange(3, 15)[None]
WINDOW: dict[str, Any] = {
    "sliding_window": SLIDING_WINDOW,
    "use_sliding_window": True,
    "max_window_layers": 2,
    "attention_chunk_size": 4,
}
LAYERS = {"layer_types": [FULL, SLIDING, SLIDING, FULL]}
# Two families make their heads of the hidden size, whatever these say
HEADLESS = ("gpt2", "gpt_neox")
HEADS = {"head_dim": 12, "num_key_value_heads": 2}


def _save(family: str, directory: Path, keys: dict[str, Any]) -> None:
    """Save a tiny model of four layers, with keys in its file that it was not made with."""
    fields = {
        name: value[:4]
        for name, value in TINY_MODELS[family].fields.items()
        if isinstance(value, list)
    }
    build_tiny_model(family, num_hidden_layers=4, **fields).save_pretrained(directory)
    path = directory / "config.json"
    known = json.loads(path.read_text())
    heads = HEADS if family in HEADLESS else {}
    path.write_text(json.dumps(known | heads | keys))


# A Mistral with layer_types is Ministral, of another class
CASES = [(name, WINDOW) for name in FAMILIES]
CASES += [(name, WINDOW | LAYERS) for name in FAMILIES if name != "mistral"]


@pytest.mark.parametrize(("family", "keys"), CASES)
@torch.no_grad()
def test_layers_attend_as_transformers_computes_them(
    family: str, keys: dict[str, Any], tmp_path: Path
) -> None:
    _save(family, tmp_path, keys)
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    output = teacher(TOKENS, use_cache=False, output_attentions=True)
    seen = [bool((maps[..., -1, 0] > 0).all()) for maps in output.attentions]
    architecture = read_outline(tmp_path, None).architecture
    assert architecture_of(teacher.config) == architecture
    assert [kind == "full" for kind in architecture.layer_kinds] == seen
    assert architecture.sliding_window == (SLIDING_WINDOW if not all(seen) else None)
    for layer, modules in enumerate(family_of(teacher.config).layers_of(teacher)):
        attention = family_of(teacher.config).attention_of(modules)
        output_weight = family_of(teacher.config).output_of(attention).weight
        heads, size = architecture.query_heads[layer], architecture.head_dims[layer]
        assert heads * size * 32 == output_weight.numel()
    # With a cache too, which transformers would let slide by any such key
    student = load_shared(tmp_path, None)
    torch.testing.assert_close(student(TOKENS).logits, output.logits, rtol=0, atol=2e-5)
    chosen = student.generate(
        TOKENS, max_new_tokens=3, do_sample=False, output_logits=True, eos_token_id=None,
        return_dict_in_generate=True,
    )  # fmt: skip
    whole = teacher(chosen.sequences, use_cache=False).logits[:, -4:-1]
    torch.testing.assert_close(torch.stack(chosen.logits, 1), whole, rtol=0, atol=2e-5)


def test_a_mistral_with_layer_types_is_refused_by_its_name(tmp_path: Path) -> None:
    _save("mistral", tmp_path, WINDOW | LAYERS)
    with pytest.raises(UnsupportedModelError, match="model type 'ministral' is not supported"):
        load_shared(tmp_path, None)


def test_a_sliding_layer_without_a_window_is_refused() -> None:
    config = build_tiny_model("qwen2").config
    config.layer_types = [SLIDING] * 6
    with pytest.raises(UnsupportedModelError, match="no sliding_window is in use"):
        architecture_of(config)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_an_encoder_made_of_a_decoders_layers_is_refused(family: str) -> None:
    config = build_tiny_model(family).config
    config.is_causal = False
    with pytest.raises(UnsupportedModelError, match="bidirectional attention"):
        architecture_of(config)
