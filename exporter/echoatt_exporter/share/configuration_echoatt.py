"""The configuration of a student: the teacher's, and the sharing plan.

This file and `modeling_echoatt.py` import torch and transformers only, so that they can be saved
beside a checkpoint and loaded without EchoAtt.
"""

from __future__ import annotations

import copy
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


class EchoAttConfig(PreTrainedConfig):
    """Configuration of `EchoAttForCausalLM`.

    Attributes:
        text_config: The teacher's configuration, whole. The name is the one under which
            transformers looks for a composite model's decoder.
        sources: The sharing plan: for each layer the index of the layer whose attention
            probabilities it uses; a source layer names itself. Left out, every layer is a source.
        layout: What the class must know of the teacher's: by name, the path of its `layers`, in a
            layer the `attention`, in that the `output` projection and the one that projects
            `values` (and perhaps more), in `text_config` the `dropout` of attention; and a number
            for each layer of `query_heads`, `kv_heads` and `head_dims`. Sharing a teacher fills
            it in.
    """

    model_type = "echoatt"
    sub_configs_defaults = {  # noqa: RUF012 - read by transformers as it stands
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama")
    }

    text_config: PreTrainedConfig | dict[str, Any] | None = None
    sources: list[int] | None = None
    layout: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        # The dict that it may be given is the caller's and is read only
        if isinstance(self.text_config, dict):
            self.text_config = copy.deepcopy(self.text_config)
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"):
            setattr(self, name, getattr(self.text_config, name, None))
        if self.sources is None:
            self.sources = list(range(self.get_text_config().num_hidden_layers))

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, without the path that the teacher was loaded from."""
        output: dict[str, Any] = super().to_dict()
        output["text_config"].pop("_name_or_path", None)
        return output
