from tests.tiny_family import FULL, SLIDING, SLIDING_WINDOW, TinyModel

TINY_MODELS = {
    "gemma3_text": TinyModel(
        "gemma3_text",
        (0, 0, 2, 0, 4, 2),
        {
            "layer_types": [SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL],
            "sliding_window": SLIDING_WINDOW,
            "query_pre_attn_scalar": 7,
            "tie_word_embeddings": True,
        },
        norms="head",
    )
}
