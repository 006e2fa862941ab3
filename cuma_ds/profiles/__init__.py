"""Profiles: each becomes one sentence, and a sentence one vector."""

from cuma_ds.profiles.encoder import ProfileEncoder
from cuma_ds.profiles.linearize import linearize
from cuma_ds.profiles.table import ProfileTable

__all__ = ["ProfileEncoder", "ProfileTable", "linearize"]
