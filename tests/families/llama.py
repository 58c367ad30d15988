from tests.tiny_family import TinyModel

TINY_MODELS = {
    "llama": TinyModel("llama"),
    "llama_tied_biased": TinyModel(
        "llama",
        fields={"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
        biased=True,
    ),
}
