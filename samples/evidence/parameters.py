"""Parameters that the paper's three plans remove at the shape of TinyLlama-1.1B.

    .venv/bin/python -m samples.evidence.parameters

The models are built on torch's meta device and counted.
"""

from __future__ import annotations

from samples.evidence.common import arguments, percent, publish, table
from transformers import LlamaConfig

from echoatt_exporter import SharingPlan
from echoatt_exporter.analyze.footprint import footprint_of

# EchoAtt, arXiv 2409.14595: the followers that it prints, after the sources that they imply
PLANS = (
    "2:1,3:1,4:1,5:1,7:6",
    "2:1,3:1,4:1,5:1,6:1,7:1,8:1,9:1,18:17",
    ",".join([*(f"{layer}:0" for layer in range(1, 15)), "16:15", "17:15", "18:15"]),
)
TINY_LLAMA = LlamaConfig(
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
    max_position_embeddings=2048,
)


def main() -> None:
    """Count, and write the table."""
    args = arguments(__doc__)
    rows, data = [], []
    for pairs in PLANS:
        plan = SharingPlan.from_pairs(pairs, TINY_LLAMA.num_hidden_layers)
        footprint = footprint_of(TINY_LLAMA, plan, context=2048)
        data.append({"sources": plan.sources, "removed": footprint.parameters_removed})
        cache = footprint.cache_bytes_per_token / footprint.teacher.cache_bytes_per_token
        rows.append(
            [
                f"{percent(plan.ratio)} ({len(plan.followers)} of {plan.num_layers})",
                f"{footprint.parameters:,}",
                f"{footprint.parameters_removed:,}",
                f"{100 * footprint.parameters_removed_share:.1f} %",
                f"{100 * (1 - cache):.1f} %",
            ]
        )
    header = ["followers", "parameters", "removed", "share", "cache removed"]
    heading = f"TinyLlama-1.1B has {footprint.teacher.parameters:,} parameters:\n\n"
    publish(args.results, "parameters", data, heading + table(header, rows))


if __name__ == "__main__":
    main()
