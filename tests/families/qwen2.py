from tests.tiny_family import SLIDING_WINDOW, TinyModel

TINY_MODELS = {
    "qwen2": TinyModel("qwen2", biased=True),
    "qwen2_sliding": TinyModel(
        "qwen2",
        (0, 0, 0, 3, 3, 5),
        {"use_sliding_window": True, "sliding_window": SLIDING_WINDOW, "max_window_layers": 3},
        biased=True,
    ),
}
