from tests.tiny_family import TinyModel

TINY_MODELS = {
    "granite": TinyModel(
        "granite",
        fields={
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.4,
            "attention_bias": True,
        },
        biased=True,
    )
}
