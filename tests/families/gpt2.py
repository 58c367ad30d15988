from tests.tiny_family import TinyModel

TINY_MODELS = {
    "gpt2": TinyModel(
        "gpt2",
        fields={
            "n_inner": 40,
            "tie_word_embeddings": True,
            "attn_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
        },
        unknown=("num_key_value_heads", "head_dim", "intermediate_size"),
        biased=True,
    )
}
