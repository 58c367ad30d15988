from tests.tiny_family import FULL, SLIDING, SLIDING_WINDOW, TinyModel

TINY_MODELS = {
    # Layer 3 has no rotary embedding; it lends to layers that have it, layer 1 to one that has not
    "smollm3": TinyModel(
        "smollm3", (0, 1, 1, 3, 3, 1), {"no_rope_layers": [1, 1, 0, 0, 1, 1]}, exported_layers=5
    ),
    "smollm3_sliding": TinyModel(
        "smollm3",
        (0, 1, 0, 1, 4, 1),
        {
            "no_rope_layers": [1, 0, 1, 0, 1, 0],
            "use_sliding_window": True,
            "sliding_window": SLIDING_WINDOW,
            "layer_types": [FULL, SLIDING, FULL, SLIDING, FULL, SLIDING],
        },
    ),
}
