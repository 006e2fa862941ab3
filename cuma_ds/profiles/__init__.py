"""Profiles: each becomes one sentence, and a sentence one vector."""

from cuma_ds.profiles.encoder import ProfileEncoder
from cuma_ds.profiles.linearize import Wording, linearize
from cuma_ds.profiles.settings import encoder_of, wording_of
from cuma_ds.profiles.table import ProfileTable

__all__ = ["ProfileEncoder", "ProfileTable", "Wording", "encoder_of", "linearize", "wording_of"]
