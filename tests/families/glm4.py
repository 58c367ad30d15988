from tests.tiny_family import TinyModel

TINY_MODELS = {"glm4": TinyModel("glm4", fields={"attention_bias": True}, biased=True)}
