"""Profiles as training sees them: some hidden, all blurred, so that a model also learns to answer strangers.

Shapes: N profiles, P profile width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cuma_ds.adapters.config import CumaConfig


def blurred(profiles_NP: Tensor, seed_N: Tensor, config: CumaConfig, rms: float) -> Tensor:
    """Standardised profiles [N, P], each hidden with probability ``profile_dropout``, or with noise added to it.

    A hidden profile is zero, which is the mean of the training profiles. Noise is normal with standard deviation
    ``profile_noise`` times ``rms``. Each profile has a generator of its own: torch's CPU generator, seeded with its
    number in ``seed_N``, draws one uniform number, and the profile is hidden if that is below ``profile_dropout``. Then
    it draws the P normal ones.

    Args:
        profiles_NP: standardised embeddings.
        seed_N: int64, as :func:`cuma_ds.data.stream.profile_seed` makes them.
        config: of the adapters.
        rms: root mean square of standardised training profiles.
    """
    result_NP = profiles_NP.clone()
    for row, seed in enumerate(seed_N.tolist()):
        generator = torch.Generator().manual_seed(seed)
        if float(torch.rand(1, generator=generator)) < config.profile_dropout:
            result_NP[row] = 0
        elif config.profile_noise:
            noise_P = torch.randn(profiles_NP.shape[1], generator=generator)
            result_NP[row] += (config.profile_noise * rms * noise_P).to(profiles_NP)
    return result_NP
