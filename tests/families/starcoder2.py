from tests.tiny_family import SLIDING_WINDOW, TinyModel

TINY_MODELS = {
    "starcoder2": TinyModel(
        "starcoder2",
        fields={"sliding_window": SLIDING_WINDOW, "tie_word_embeddings": True},
        unknown=("head_dim",),
        biased=True,
    )
}
