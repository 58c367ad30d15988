from tests.tiny_family import SLIDING_WINDOW, TinyModel

TINY_MODELS = {"mistral": TinyModel("mistral", fields={"sliding_window": SLIDING_WINDOW})}
