"""What makes a checkpoint unfit, each refused with the reason and what to do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
)

from echoatt_exporter.errors import CheckpointError, UnsupportedModelError
from echoatt_exporter.families import FAMILIES, family_of, known_families
from echoatt_exporter.share.model_directory import CONFIG
from echoatt_exporter.share.weight_files import DENSE_DTYPES, StoredTensor, few, is_weight

# What transformers calls models with another head on a decoder
_OTHER_HEADS = (
    "ForQuestionAnswering",
    "ForRewardModel",
    "ForSequenceClassification",
    "ForTokenClassification",
    "RewardModel",
)


def refuse_quantised(directory: Path, raw: dict[str, Any]) -> None:
    """Refuse a configuration that says that the weights are quantised."""
    # The last one is MLX's
    keys = ("quantization_config", "compression_config", "quantization")
    if found := next((raw[key] for key in keys if raw.get(key)), None):
        method = found.get("quant_method", "unnamed") if isinstance(found, dict) else "unnamed"
        raise UnsupportedModelError(
            f"{directory}: a quantised checkpoint (method {method}); EchoAtt needs the dense one"
            " that it was made from, and quantises on export"
        )


def refuse_foreign(
    directory: Path, raw: dict[str, Any], family: str, trust_remote_code: bool
) -> None:
    """Refuse a type that is no known family, unless trusted code might turn it into one."""
    for known in FAMILIES.values():
        if reason := known.relatives.get(family):
            raise UnsupportedModelError(f"{directory}: {reason}")
    if "auto_map" in raw:
        if trust_remote_code:
            return
        raise UnsupportedModelError(
            f"{directory}: model type {family!r} comes with its own Python code, which is not run"
            f" unless you trust it (--trust-remote-code); EchoAtt knows {known_families()}"
        )
    named = _architectures(raw)
    decoder = family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not raw.get("is_encoder_decoder")
    if not decoder or (
        named and not any(name.endswith(("CausalLM", "LMHeadModel")) for name in named)
    ):
        kind = _kind(raw, family)
        raise UnsupportedModelError(
            f"{directory}: {kind}not a decoder (model type {family!r}); EchoAtt knows"
            f" {known_families()}"
        )
    # what is left is a decoder of a family that architecture_of() refuses with its own message


def refuse_other_heads(directory: Path, raw: dict[str, Any]) -> None:
    """Refuse a decoder that was saved without its LM head, for another task."""
    if other := [name for name in _architectures(raw) if name.endswith(_OTHER_HEADS)]:
        raise UnsupportedModelError(
            f"{directory}: a {other[0]}, which has no LM head; give a checkpoint for causal LM"
        )


def _architectures(raw: dict[str, Any]) -> list[str]:
    named = raw.get("architectures")
    return [name for name in named if isinstance(name, str)] if isinstance(named, list) else []


def _kind(raw: dict[str, Any], family: str) -> str:
    """What a model that is no decoder of text is, as the beginning of a sentence."""
    if any(key.startswith(("vision", "visual", "image", "mm_")) for key in raw):
        return "a vision-language model, "
    if any(key.startswith("audio") for key in raw):
        return "a model of audio, "
    seq_to_seq = (
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    )
    if raw.get("is_encoder_decoder") or any(family in names for names in seq_to_seq):
        return "an encoder-decoder, "
    if family in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "an encoder, "
    return ""


def refuse_misfits(directory: Path, info: dict[str, Any]) -> None:
    """Refuse tensors that are absent, surplus or wrongly shaped, by transformers' report."""
    faults = []
    if missing := info["missing_keys"]:
        faults.append(f"missing {few(missing)}")
    if surplus := [name for name in info["unexpected_keys"] if is_weight(name)]:
        faults.append(f"surplus {few(surplus)}")
    if shapes := info["mismatched_keys"]:
        wrong = (f"{name} is {[*stored]}, not {[*wanted]}" for name, stored, wanted in shapes)
        faults.append(f"wrongly shaped {few(wrong)}")
    faults.extend(short(message) for message in info["error_msgs"])
    if faults:
        raise CheckpointError(f"{directory}: tensors do not fit {CONFIG}: {'; '.join(faults)}")


def refuse_other_modules(directory: Path, model: PreTrainedModel) -> None:
    """Refuse a trusted class of a known model type that is not built as transformers' own is."""
    family = family_of(model.config)
    try:
        for layer in family.layers_of(model):
            attention = family.attention_of(layer)
            attention.get_submodule(family.output)
            attention.get_submodule(family.heads.values)
    except AttributeError as error:
        raise UnsupportedModelError(
            f"{directory}: its own {type(model).__name__} is not built like transformers'"
            f" {model.config.model_type} ({short(error)}); load it without trusting its code"
        ) from error


def refuse_stored_as_integers(
    directory: Path, model: PreTrainedModel, tensors: Mapping[str, StoredTensor]
) -> None:
    """Refuse weights that were stored as integers or 8-bit floats and would be cast."""
    names = model.state_dict().keys() & tensors.keys()
    if wrong := [
        f"{n} is {tensors[n].dtype}" for n in names if tensors[n].dtype not in DENSE_DTYPES
    ]:
        raise UnsupportedModelError(
            f"{directory}: quantised weights: {few(wrong)}; EchoAtt needs a dense checkpoint"
        )


def refuse_non_finite(directory: Path, model: PreTrainedModel, own_dtype: torch.dtype) -> None:
    """Refuse weights that are NaN or infinite, as stored or as cast to the model's dtype."""
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() in seen or not tensor.is_floating_point() or not tensor.numel():
            continue
        seen.add(tensor.data_ptr())
        # The extremes take no memory, a mask would; NaN comes through as both
        low, high = torch.aminmax(tensor)
        if not (torch.isfinite(low) and torch.isfinite(high)):
            cast = f" as {str(tensor.dtype)[6:]}" if tensor.dtype != own_dtype else ""
            advice = "try another dtype" if cast else "the checkpoint is damaged or was diverging"
            raise CheckpointError(
                f"{directory}: {name} holds NaN or infinite values{cast}; {advice}"
            )


def short(error: object) -> str:
    """The first 300 characters of a message, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:299]}…"
