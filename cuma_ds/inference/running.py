"""Sequences with profiles of their own, continued token by token. They join and leave between any two steps.

Shapes: B sequences, S positions of one forward, L positions so far, H key-value heads, D head width, P profile width,
V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from cuma_ds.adapters import CumaModel
from cuma_ds.errors import ModelError
from cuma_ds.identity import base_fact

# Logits that differ by less than this share of their spread differ by rounding, in 16-bit dtypes too.
_ROUNDING = 0.05


class Step(NamedTuple):
    """What one forward reads.

    ids_BS: token ids.  profiles_BP: raw profile embeddings, None for a model that takes none.  mask_BL: 0 for padding,
    None without padding.  positions_BS: None lets the model count.  cache: of the L - S positions before, None without.
    keep: whether the model keeps states of these tokens.  filler: the tokens have no profile (-1).
    """

    ids_BS: Tensor
    profiles_BP: Tensor | None = None
    mask_BL: Tensor | None = None
    positions_BS: Tensor | None = None
    cache: Cache | None = None
    keep: bool = True
    filler: bool = False


class ModelForward:
    """A causal language model as a function of a :class:`Step`.

    Args:
        model: adapted by this package or by PEFT, or as transformers loads it; in eval mode.
        announce: called before each forward with the number of its real tokens, a scalar tensor.

    Attributes:
        device: of the model.
        vocabulary: number of tokens the model knows.
        profile_dim: P, 0 for a model that takes no profiles.
    """

    def __init__(self, model: nn.Module, announce: Callable[[Tensor], None] | None = None) -> None:
        self._model, self._announce = model, announce
        self._adapted = isinstance(model, CumaModel)
        backbone = model.base_model if isinstance(model, CumaModel) else model
        get_base = getattr(backbone, "get_base_model", None)  # of PEFT
        backbone = get_base() if get_base is not None else backbone
        self._names = frozenset(inspect.signature(backbone.forward).parameters)
        self._cache_name = "cache_params" if "cache_params" in self._names else "past_key_values"
        self.device = next(model.parameters()).device
        self.vocabulary = int(base_fact(backbone.config, "vocab_size"))
        self.profile_dim = model.config.profile_dim if isinstance(model, CumaModel) else 0

    def __call__(self, step: Step) -> tuple[Tensor, Cache | None]:
        """Logits [B, V] of the last position, and the model's cache of all L positions."""
        inputs: dict[str, object] = {"input_ids": step.ids_BS, self._cache_name: step.cache, "use_cache": step.keep}
        if step.mask_BL is not None:
            inputs["attention_mask"] = step.mask_BL
        if step.positions_BS is not None and "position_ids" in self._names:
            inputs["position_ids"] = step.positions_BS
        if "logits_to_keep" in self._names:
            inputs["logits_to_keep"] = 1
        profile_BS = self._profiles(step)
        if self._adapted:
            inputs |= {"profile_index": profile_BS, "profile_embeddings": step.profiles_BP}
        if self._announce is not None:
            self._announce((profile_BS >= 0).sum())
        out = self._model(**inputs)
        return out.logits[:, -1], getattr(out, self._cache_name, None)

    @torch.no_grad()
    def fill(self) -> None:
        """One forward of a token that has no profile, for ranks whose peers still write."""
        profile_1P = torch.zeros(1, self.profile_dim, device=self.device) if self.profile_dim else None
        self(Step(torch.zeros(1, 1, dtype=torch.long, device=self.device), profile_1P, keep=False, filler=True))

    def _profiles(self, step: Step) -> Tensor:
        """[B, S] row of ``profiles_BP`` of each token, -1 for padding and fillers."""
        sequences, length = step.ids_BS.shape
        if step.filler:
            return torch.full_like(step.ids_BS, -1)
        profile_BS = torch.arange(sequences, device=self.device)[:, None].expand(-1, length)
        return profile_BS if step.mask_BL is None else profile_BS.masked_fill(step.mask_BL[:, -length:] == 0, -1)


class Newcomers(NamedTuple):
    """Prompts that were read, left-padded to one length, with their cache, mask, lengths and raw profile embeddings."""

    cache: DynamicCache
    mask_BS: Tensor
    lengths_B: Tensor
    profiles_BP: Tensor | None


class RunningBatch:
    """The running sequences of one model, left-padded to one length: row b of every tensor is sequence b.

    Positions count from the first real token of each sequence, so more padding in front of it changes nothing. A
    backbone that takes no ``position_ids`` must find them by itself. :func:`measured_batch` measures whether it does.

    Args:
        forward: of a model with a key-value cache of attention layers.
        pad_id: any token; padding is masked.
    """

    def __init__(self, forward: ModelForward, pad_id: int) -> None:
        self.forward, self.pad_id, self.device = forward, pad_id, forward.device
        self._clear()

    def __len__(self) -> int:
        return self.lengths_B.shape[0]

    def _clear(self) -> None:
        self.cache = DynamicCache()  # without a configuration every layer keeps all positions; windows are masks
        self.mask_BL = torch.zeros(0, 0, dtype=torch.long, device=self.device)
        self.lengths_B = torch.zeros(0, dtype=torch.long, device=self.device)
        self.profiles_BP: Tensor | None = None

    def join(self, prompts: Sequence[Sequence[int]], profiles_BP: Tensor | None) -> Tensor:
        """:meth:`read` prompts, add them, and return the logits."""
        logits_BV, add = self.read(prompts, profiles_BP)
        add()
        return logits_BV

    @torch.no_grad()
    def read(self, prompts: Sequence[Sequence[int]], profiles_BP: Tensor | None) -> tuple[Tensor, Callable[[], None]]:
        """Read new prompts in one forward. The running sequences are as they were, whatever happens.

        Args:
            prompts: token ids of each.
            profiles_BP: one raw embedding for each; None for a model that takes none.

        Returns:
            [new B, V] logits of their first answer tokens, and a function that adds them to the running sequences.
        """
        profiles_BP = None if profiles_BP is None else profiles_BP.to(self.device)
        longest = max(len(prompt) for prompt in prompts)
        rows = [[self.pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        ids_BS = torch.tensor(rows, device=self.device)
        lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        mask_BS = (torch.arange(longest, device=self.device) >= longest - lengths_B[:, None]).long()
        positions_BS, cache = (mask_BS.cumsum(dim=1) - 1).clamp(min=0), DynamicCache()
        logits_BV, _ = self.forward(Step(ids_BS, profiles_BP, mask_BS, positions_BS, cache))
        return logits_BV, partial(self._add, Newcomers(cache, mask_BS, lengths_B, profiles_BP))

    @torch.no_grad()
    def _add(self, new: Newcomers) -> None:
        if not len(self):
            self.cache, self.mask_BL, self.lengths_B, self.profiles_BP = new
            return
        length = max(new.mask_BS.shape[1], self.mask_BL.shape[1])
        for layer, other in zip(_layers(self.cache), _layers(new.cache), strict=True):
            pairs = zip(_states(layer), _states(other), strict=True)
            layer.keys, layer.values = (torch.cat([_widened(a, length), _widened(b, length)]) for a, b in pairs)
        self.mask_BL = torch.cat([F.pad(mask, (length - mask.shape[1], 0)) for mask in (self.mask_BL, new.mask_BS)])
        self.lengths_B = torch.cat([self.lengths_B, new.lengths_B])
        if self.profiles_BP is not None and new.profiles_BP is not None:
            self.profiles_BP = torch.cat([self.profiles_BP, new.profiles_BP])

    @torch.no_grad()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append one token to every sequence and return the logits [B, V] of the next."""
        ids_B1 = torch.tensor(tokens, device=self.device)[:, None]
        self.mask_BL = F.pad(self.mask_BL, (0, 1), value=1)
        step = Step(ids_B1, self.profiles_BP, self.mask_BL, self.lengths_B[:, None], self.cache)
        logits_BV, _ = self.forward(step)
        self.lengths_B = self.lengths_B + 1
        return logits_BV

    @torch.no_grad()
    def keep(self, rows: Sequence[int]) -> None:
        """Remove all other sequences, and the padding that only they needed."""
        if not rows:
            self._clear()
            return
        index = torch.tensor(rows, device=self.device)
        self.lengths_B = self.lengths_B[index]
        first = self.mask_BL.shape[1] - int(self.lengths_B.max())
        self.mask_BL = self.mask_BL[index, first:]
        for layer in _layers(self.cache):
            layer.keys, layer.values = (state_BHLD[index, :, first:] for state_BHLD in _states(layer))
        if self.profiles_BP is not None:
            self.profiles_BP = self.profiles_BP[index]


class SingleSequence:
    """One running sequence, for models whose states cannot be padded; used like a :class:`RunningBatch`.

    Args:
        forward: of the model.
        cached: the model keeps states of its own, e.g. recurrent ones. Otherwise every step reads all tokens again.
    """

    def __init__(self, forward: ModelForward, cached: bool) -> None:
        self.forward, self._cached = forward, cached
        self._ids: list[int] = []
        self._profile_1P: Tensor | None = None
        self._cache: Cache | None = None

    def read(self, prompts: Sequence[Sequence[int]], profiles_BP: Tensor | None) -> tuple[Tensor, Callable[[], None]]:
        """Read one prompt, see :meth:`RunningBatch.read`."""
        ids = list(prompts[0])
        profile_1P = None if profiles_BP is None else profiles_BP.to(self.forward.device)
        logits_BV, cache = self._forward(ids, profile_1P, None)
        return logits_BV, partial(self._add, ids, profile_1P, cache)

    def _add(self, ids: list[int], profile_1P: Tensor | None, cache: Cache | None) -> None:
        self._ids, self._profile_1P, self._cache = ids, profile_1P, cache

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append one token and return the logits [1, V] of the next."""
        self._ids = [*self._ids, *tokens]
        logits_BV, self._cache = self._forward(tokens if self._cached else self._ids, self._profile_1P, self._cache)
        return logits_BV

    def keep(self, rows: Sequence[int]) -> None:
        """Forget the sequence unless ``rows`` names it."""
        if not rows:
            self._add([], None, None)

    @torch.no_grad()
    def _forward(
        self, ids: Sequence[int], profile_1P: Tensor | None, cache: Cache | None
    ) -> tuple[Tensor, Cache | None]:
        ids_BS = torch.tensor([ids], device=self.forward.device)
        return self.forward(Step(ids_BS, profile_1P, cache=cache if self._cached else None, keep=self._cached))


class Fit(NamedTuple):
    """Whether a model continues a made-up prompt as in one forward: token by token, and beside a longer prompt."""

    alone: bool
    beside: bool


@torch.no_grad()
def measure(batch: RunningBatch | SingleSequence, profile_1P: Tensor | None) -> Fit:
    """Continue a made-up prompt in an empty batch, which is empty again afterwards.

    Args:
        batch: of the model. Nothing runs beside another sequence in a :class:`SingleSequence`.
        profile_1P: any raw embedding; None for a model that takes none.
    """
    forward = batch.forward
    profile_1P = None if profile_1P is None else profile_1P.to(forward.device)
    long = [(7 * place + 3) % forward.vocabulary for place in range(24)]
    *short, last = long[3:8]
    whole_BV, _ = forward(Step(torch.tensor([[*short, last]], device=forward.device), profile_1P, keep=False))
    spread = (whole_BV[0].float() - whole_BV[0].float().mean()).norm()

    def same_after(*prompts: Sequence[int]) -> bool:
        """Append ``last`` to all prompts; the newest is the one that was read in one forward."""
        try:
            for prompt in prompts:
                _, add = batch.read([prompt], profile_1P)
                add()
            found_V = batch.step([last] * len(prompts))[-1].float()
            return bool((found_V - whole_BV[0].float()).norm() <= _ROUNDING * spread)
        finally:
            batch.keep([])

    return Fit(same_after(short), isinstance(batch, RunningBatch) and same_after(long, short))


def measured_batch(forward: ModelForward, pad_id: int, most: int) -> tuple[RunningBatch | SingleSequence, int]:
    """The fastest way to continue sequences whose answers equal those of whole forwards, found by trying.

    Most models run in one padded batch with a cache of attention keys and values. Others run one sequence at a time:
    those that cannot tell positions in a padded batch, those with recurrent states, and those that keep no states
    between forwards. The last read all tokens again for each new one.

    Args:
        forward: of the model.
        pad_id: padding.
        most: sequences that may run at once.

    Returns:
        An empty batch, and the number of sequences that may run at once in it.
    """
    profile_1P = torch.zeros(1, forward.profile_dim) if forward.profile_dim else None
    running = RunningBatch(forward, pad_id)
    for batch in (running, SingleSequence(forward, cached=True)):
        try:
            fit = measure(batch, profile_1P)
        except Exception:  # the model's own code met states of another kind
            continue
        if fit.alone:
            return batch, most if fit.beside else 1
    return SingleSequence(forward, cached=False), 1


def _layers(cache: DynamicCache) -> list[DynamicLayer]:
    """The layers of a cache.

    Raises:
        ModelError: some keep other states than attention keys and values.
    """
    layers = [layer for layer in cache.layers if isinstance(layer, DynamicLayer)]
    if not layers or len(layers) < len(cache.layers):
        other = "this model's layers keep other states than attention keys and values"
        raise ModelError(f"{other}; it cannot be served in batches")
    return layers


def _states(layer: DynamicLayer) -> tuple[Tensor, Tensor]:
    """Keys and values [B, H, L, D] of a layer that has run."""
    assert layer.keys is not None
    assert layer.values is not None
    return layer.keys, layer.values


def _widened(x_BHLD: Tensor, length: int) -> Tensor:
    """Empty positions in front, up to ``length``."""
    return F.pad(x_BHLD, (0, 0, length - x_BHLD.shape[2], 0))
