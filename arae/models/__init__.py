"""Encoders, decoders and discriminators."""

from arae.models.decoder import Decoder, create_decoder, mirror
from arae.models.discriminator import Discriminator, create_discriminator
from arae.models.encoder import Encoder, create_encoder

__all__ = [
    "Decoder",
    "Discriminator",
    "Encoder",
    "create_decoder",
    "create_discriminator",
    "create_encoder",
    "mirror",
]
