"""What the section ``profiles`` of a recipe asks for: the wording of sentences, and the encoder."""

from __future__ import annotations

from cuma_ds.config import ProfilesSection
from cuma_ds.profiles.encoder import ProfileEncoder
from cuma_ds.profiles.linearize import Wording


def wording_of(profiles: ProfilesSection) -> Wording:
    """How profile fields become a sentence."""
    return Wording(profiles.template, profiles.format, profiles.fields)


def encoder_of(profiles: ProfilesSection) -> ProfileEncoder:
    """The sentence encoder, whose weights are loaded when it is first called.

    Raises:
        ModelError: there is no such encoder.
    """
    return ProfileEncoder(
        str(profiles.encoder),
        batch_size=profiles.batch_size,
        pooling=profiles.pooling,
        normalise=profiles.normalise,
        max_tokens=profiles.max_tokens,
    )
