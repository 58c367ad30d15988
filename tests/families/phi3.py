from tests.tiny_family import SLIDING_WINDOW, TinyModel

TINY_MODELS = {
    "phi3": TinyModel("phi3", fields={"sliding_window": SLIDING_WINDOW}, unknown=("head_dim",)),
    "phi3_full": TinyModel("phi3", unknown=("head_dim",)),
}
