"""Encoders that are saved as a Gemma, such as those of embedding models."""

from transformers import PreTrainedConfig

from echoatt_exporter.errors import UnsupportedModelError


def refuse_gemma_encoder(config: PreTrainedConfig) -> None:
    """Refuse a Gemma whose tokens attend to later ones.

    Raises:
        UnsupportedModelError: The configuration says so.
    """
    if config.use_bidirectional_attention:
        raise UnsupportedModelError("bidirectional attention is not supported: not a decoder")
