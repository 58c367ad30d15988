"""GLM-4: norms before and behind each block, half of each head rotated pair by pair."""

from echoatt_exporter.families.base import Family

FAMILY = Family(model_type="glm4", gated=("mlp.gate_up_proj", "mlp.down_proj"))
