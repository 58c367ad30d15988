from tests.tiny_family import TinyModel

TINY_MODELS = {"qwen3": TinyModel("qwen3", norms="head")}
