from tests.tiny_family import ALTERNATING, TinyModel

TINY_MODELS = {
    "gemma2": TinyModel(
        "gemma2",
        (0, 1, 0, 1, 0, 5),
        # small caps, so that they bite
        {
            **ALTERNATING,
            "query_pre_attn_scalar": 7,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 4.0,
            "tie_word_embeddings": True,
        },
    )
}
