"""Checkpoints of named shapes with random weights, so that a bench needs no download."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from echoatt_exporter.bench.machine import available_memory
from echoatt_exporter.errors import BenchError
from echoatt_exporter.share.quiet import quiet_transformers
from echoatt_runtime.contract import SharingPlan

# The published ones hold 2,048; without this 16,384 tokens could not be measured. Random weights
# know no length, and the time does not depend on it.
CONTEXT_LENGTH: Final = 32_768
_SEED: Final = 0


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's dimensions under a name.

    Attributes:
        family: The model type.
        fields: Of its configuration.
        plans: Known sharing plans by their ratio in percent, as `follower:source` pairs.
    """

    family: str
    fields: Mapping[str, Any]
    plans: Mapping[int, str]

    def plan(self, percent: int) -> SharingPlan:
        """The known plan of that ratio, or one block of followers after layer 1.

        Raises:
            BenchError: So many followers that a block does not fit.
        """
        layers = self.fields["num_hidden_layers"]
        if percent in self.plans:
            return SharingPlan.from_pairs(self.plans[percent], layers)
        followers = round(layers * percent / 100)
        if not 0 < followers <= layers - 2:
            raise BenchError(
                f"a plan of {percent} % of {layers} layers is none of one block after layer 1;"
                " give a ratio in between, or a plan of your own with --plan or --share"
            )
        block = range(2, 2 + followers)
        return SharingPlan(tuple(1 if layer in block else layer for layer in range(layers)))


SHAPES: Final[Mapping[str, Shape]] = {
    "tinyllama-1.1b": Shape(
        "llama",
        {
            "vocab_size": 32000,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 22,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-5,
        },
        # EchoAtt's (arXiv 2409.14595); the paper prints the followers, the sources are inferred
        {
            23: "2:1,3:1,4:1,5:1,7:6",
            41: "2:1,3:1,4:1,5:1,6:1,7:1,8:1,9:1,18:17",
            77: ",".join([*(f"{n}:0" for n in range(1, 15)), "16:15,17:15,18:15"]),
        },
    ),
    "llama-7b": Shape(
        "llama",
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "rms_norm_eps": 1e-5,
        },
        {},
    ),
    "qwen3-0.6b": Shape(
        "qwen3",
        {
            "vocab_size": 151936,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "tie_word_embeddings": True,
        },
        {},
    ),
}


def make_checkpoint(shape: Shape, directory: Path) -> None:
    """Write a checkpoint with random bfloat16 weights; nothing is done where there is one.

    The directory appears whole or not at all.

    Args:
        shape: Its dimensions.
        directory: Where to.

    Raises:
        BenchError: The memory does not hold it, or the file system refuses.
    """
    if (directory / "config.json").is_file():
        return
    partial = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}.partial")
    config = _config(shape)
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(config).num_parameters()
    if (needed := 2 * parameters) > available_memory():
        raise BenchError(
            f"{needed / 1e9:.1f} GB of random weights do not fit the"
            f" {available_memory() / 1e9:.1f} GB of memory that are free; choose another shape"
        )
    try:
        partial.mkdir(parents=True)
        with quiet_transformers(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            model.save_pretrained(partial)
            _byte_tokenizer().save_pretrained(partial)
        partial.replace(directory)
    except OSError as error:
        raise BenchError(f"{directory}: cannot write the checkpoint ({error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _config(shape: Shape) -> PreTrainedConfig:
    special = {"bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": CONTEXT_LENGTH}
    config: PreTrainedConfig = AutoConfig.for_model(shape.family, **{**special, **shape.fields})
    return config


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: genai's builder and the runtime want a tokenizer, the bench none."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2}
    words |= {
        letter: len(words) + index
        for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[], unk_token="<unk>"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",  # noqa: S106
        eos_token="</s>",  # noqa: S106
        unk_token="<unk>",  # noqa: S106
    )
