from tests.tiny_family import TinyModel

_UNKNOWN = ("num_key_value_heads", "head_dim")

TINY_MODELS = {
    "gpt_neox": TinyModel(
        "gpt_neox", fields={"use_parallel_residual": True}, unknown=_UNKNOWN, biased=True
    ),
    "gpt_neox_serial": TinyModel(
        "gpt_neox",
        fields={"use_parallel_residual": False, "attention_bias": False},
        unknown=_UNKNOWN,
    ),
}
