"""The tokens that begin, end and pad a text, as a checkpoint names them.

Configurations on the Hub name tokens that their vocabulary lacks, `pad_token_id: -1` for one. Such
a token is as if it were absent.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from echoatt_exporter.errors import CheckpointError
from echoatt_exporter.share.model_directory import CONFIG
from echoatt_exporter.share.weight_files import read_json_object

_GENERATION_CONFIG = "generation_config.json"
_EOS = "eos_token_id"
_NAMES = ("bos_token_id", _EOS, "pad_token_id")


def forget_absent_tokens(config: PreTrainedConfig | GenerationConfig, vocab_size: int) -> None:
    """Take from a configuration, in place, the special tokens outside the vocabulary."""
    for name in _NAMES:
        value = getattr(config, name, None)
        if value is not None:
            setattr(config, name, _present(value, vocab_size))


def special_tokens(directory: Path, config: PreTrainedConfig, vocab_size: int) -> dict[str, Any]:
    """The special tokens of a checkpoint, as a bundle's specification has them.

    Args:
        directory: The checkpoint's.
        config: The decoder's configuration.
        vocab_size: The model's tokens.

    Raises:
        CheckpointError: `generation_config.json` cannot be read, or a token is no number.
    """
    path = directory / _GENERATION_CONFIG
    generation = read_json_object(path) if path.is_file() else {}

    def token(name: str) -> Any:
        # What generate() would use comes first, as in transformers
        for value in (generation.get(name), getattr(config, name, None)):
            many = value if isinstance(value, list) and name == _EOS else [value]
            for one in many:
                if one is not None and type(one) is not int:
                    raise CheckpointError(
                        f"{directory}: its configuration names the special token {one!r}, which is"
                        f" no token number; correct {_GENERATION_CONFIG} or {CONFIG}"
                    )
            if (present := _present(value, vocab_size)) is not None:
                return present
        return None

    bos, eos, pad = map(token, _NAMES)
    all_eos = eos if isinstance(eos, list) else [] if eos is None else [eos]
    return {"bos_token_id": bos, "eos_token_ids": tuple(all_eos), "pad_token_id": pad}


def _present(value: Any, vocab_size: int) -> Any:
    """A token, or the list of those that are in the vocabulary; None where there is none."""
    if isinstance(value, list):
        return [one for one in value if _present(one, vocab_size) is not None] or None
    within = not isinstance(value, int) or 0 <= value < vocab_size
    return value if within else None
