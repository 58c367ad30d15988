from tests.tiny_family import TinyModel

TINY_MODELS = {"olmo2": TinyModel("olmo2", norms="all")}
