"""StarCoder2: biases everywhere, norms that centre, and a sliding window in every layer or none."""

from echoatt_exporter.families.attention_kinds import BY_WINDOW
from echoatt_exporter.families.base import Family

FAMILY = Family(model_type="starcoder2", attention_kinds=BY_WINDOW, gated=None)
