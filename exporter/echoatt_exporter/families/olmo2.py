"""OLMo 2: norms behind each block, and over all heads of queries and keys at once."""

from echoatt_exporter.families.base import Family

FAMILY = Family(model_type="olmo2")
