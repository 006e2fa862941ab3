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

from cuma_ds.adapters import CumaModel
from cuma_ds.identity import base_fact
from cuma_ds.inference.cache import RoomyCache, joined, layers_of, states_of

# Adds some of the prompts that were just read to the running sequences.
Add = Callable[[Sequence[int]], None]
# Logits that differ by less than this share of their spread differ by rounding, in 16-bit dtypes too.
_ROUNDING = 0.05


class Step(NamedTuple):
    """What one forward reads.

    ids_BS: token ids.  profile_BS: row of ``profiles_NP`` of each token, -1 for padding and fillers.  profiles_NP: raw
    profile embeddings, None for a model that takes none.  mask_BL: 0 for padding, None without padding.  positions_BS:
    None lets the model count.  cache: of the L - S positions before, None without.  keep: whether to return a cache.
    """

    ids_BS: Tensor
    profile_BS: Tensor
    profiles_NP: Tensor | None
    mask_BL: Tensor | None = None
    positions_BS: Tensor | None = None
    cache: Cache | None = None
    keep: bool = True


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

    @torch.no_grad()
    def __call__(self, step: Step) -> tuple[Tensor, Cache | None]:
        """Logits [B, V] of the last position, and the model's cache of all L positions."""
        inputs: dict[str, object] = {"input_ids": step.ids_BS, self._cache_name: step.cache, "use_cache": step.keep}
        if step.mask_BL is not None:
            inputs["attention_mask"] = step.mask_BL
        if step.positions_BS is not None and "position_ids" in self._names:
            inputs["position_ids"] = step.positions_BS
        if "logits_to_keep" in self._names:
            inputs["logits_to_keep"] = 1
        if self._adapted:
            inputs |= {"profile_index": step.profile_BS, "profile_embeddings": step.profiles_NP}
        if self._announce is not None:
            self._announce((step.profile_BS >= 0).sum())
        out = self._model(**inputs)
        return out.logits[:, -1], getattr(out, self._cache_name, None)

    def single(self, ids: Sequence[int], profile_1P: Tensor | None, cache: Cache | None, keep: bool) -> Step:
        """The step that reads tokens of one sequence, behind those of the cache."""
        ids_1S = torch.tensor([ids], device=self.device)
        return Step(ids_1S, torch.zeros_like(ids_1S), profile_1P, cache=cache, keep=keep)

    def fill(self) -> None:
        """One forward of a token that has no profile, for ranks whose peers still write."""
        profile_1P = torch.zeros(1, self.profile_dim, device=self.device) if self.profile_dim else None
        step = self.single([0], profile_1P, None, keep=False)
        self(step._replace(profile_BS=step.profile_BS - 1))


class _Running(NamedTuple):
    """Left-padded sequences: their cache, mask, numbers of real tokens and raw profile embeddings."""

    cache: DynamicCache
    mask_BL: Tensor
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
        self._running: _Running | None = None

    def __len__(self) -> int:
        return 0 if self._running is None else self._running.mask_BL.shape[0]

    @property
    def length(self) -> int:
        """L, the positions of the longest sequence."""
        return 0 if self._running is None else self._running.mask_BL.shape[1]

    def join(self, prompts: Sequence[Sequence[int]], profiles_BP: Tensor | None) -> Tensor:
        """:meth:`read` prompts, add each once, and return the logits."""
        logits_BV, add = self.read(prompts, profiles_BP)
        add(range(len(prompts)))
        return logits_BV

    def read(self, prompts: Sequence[Sequence[int]], profiles_BP: Tensor | None) -> tuple[Tensor, Add]:
        """Read new prompts in one forward. The running sequences are as they were, whatever happens.

        Args:
            prompts: token ids of each.
            profiles_BP: one raw embedding for each; None for a model that takes none.

        Returns:
            [new B, V] logits of their first answer tokens, and a function that adds those with the given numbers to the
            running sequences, in that order and as often as they are named.
        """
        longest = max(len(prompt) for prompt in prompts)
        rows = [[self.pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        mask_BS = (torch.arange(longest, device=self.device) >= longest - lengths_B[:, None]).long()
        profiles_BP = None if profiles_BP is None else profiles_BP.to(self.device)
        new = _Running(RoomyCache(), mask_BS, lengths_B, profiles_BP)
        positions_BS = (mask_BS.cumsum(dim=1) - 1).clamp(min=0)
        return self._logits(torch.tensor(rows, device=self.device), positions_BS, new), partial(self._add, new)

    def _add(self, new: _Running, rows: Sequence[int]) -> None:
        if list(rows) != list(range(len(new.mask_BL))):
            new = _taken(new, rows)
        if self._running is None:
            self._running = new
            return
        cache, masks, length = self._running.cache, (self._running.mask_BL, new.mask_BL), self.length
        length = max(length, new.mask_BL.shape[1])
        for layer, other in zip(layers_of(cache), layers_of(new.cache), strict=True):
            layer.keys, layer.values = map(joined, states_of(layer), states_of(other))
        mask_BL = torch.cat([F.pad(mask, (length - mask.shape[1], 0)) for mask in masks])
        lengths_B, profiles_BP = torch.cat([self._running.lengths_B, new.lengths_B]), self._running.profiles_BP
        if profiles_BP is not None and new.profiles_BP is not None:
            profiles_BP = torch.cat([profiles_BP, new.profiles_BP])
        self._running = _Running(cache, mask_BL, lengths_B, profiles_BP)

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append one token to every sequence and return the logits [B, V] of the next."""
        assert self._running is not None
        cache, mask_BL, lengths_B, profiles_BP = self._running
        self._running = _Running(cache, F.pad(mask_BL, (0, 1), value=1), lengths_B + 1, profiles_BP)
        return self._logits(torch.tensor(tokens, device=self.device)[:, None], lengths_B[:, None], self._running)

    def keep(self, rows: Sequence[int]) -> None:
        """Remove all other sequences, and the padding that only they needed."""
        if not rows or self._running is None:
            self._running = None
            return
        self._running = _taken(self._running, rows)

    def _logits(self, ids_BS: Tensor, positions_BS: Tensor, running: _Running) -> Tensor:
        """Logits [B, V] after reading the last S positions of some sequences."""
        profile_BS = torch.arange(len(ids_BS), device=self.device)[:, None].expand_as(ids_BS)
        profile_BS = profile_BS.masked_fill(running.mask_BL[:, -ids_BS.shape[1] :] == 0, -1)
        step = Step(ids_BS, profile_BS, running.profiles_BP, running.mask_BL, positions_BS, running.cache)
        return self.forward(step)[0]


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

    def read(self, prompts: Sequence[Sequence[int]], profiles_BP: Tensor | None) -> tuple[Tensor, Add]:
        """Read one prompt, see :meth:`RunningBatch.read`."""
        ids, profile_1P = list(prompts[0]), None if profiles_BP is None else profiles_BP.to(self.forward.device)
        logits_BV, cache = self.forward(self.forward.single(ids, profile_1P, None, self._cached))
        return logits_BV, partial(self._add, ids, profile_1P, cache)

    def _add(self, ids: list[int], profile_1P: Tensor | None, cache: Cache | None, rows: Sequence[int] = (0,)) -> None:
        self._ids, self._profile_1P, self._cache = ids, profile_1P, cache

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append one token and return the logits [1, V] of the next."""
        self._ids = [*self._ids, *tokens]
        ids, cache = (tokens, self._cache) if self._cached else (self._ids, None)
        logits_BV, self._cache = self.forward(self.forward.single(ids, self._profile_1P, cache, self._cached))
        return logits_BV

    def keep(self, rows: Sequence[int]) -> None:
        """Forget the sequence unless ``rows`` names it."""
        if not rows:
            self._add([], None, None)


class Fit(NamedTuple):
    """Whether a model continues a made-up prompt as in one forward: token by token, and beside a longer prompt."""

    alone: bool
    beside: bool


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
    whole_BV, _ = forward(forward.single([*short, last], profile_1P, None, keep=False))
    spread = (whole_BV[0].float() - whole_BV[0].float().mean()).norm()

    def same_after(*prompts: Sequence[int]) -> bool:
        """Append ``last`` to all prompts; the newest is the one that was read in one forward."""
        try:
            for prompt in prompts:
                _, add = batch.read([prompt], profile_1P)
                add([0])
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


def _taken(running: _Running, rows: Sequence[int]) -> _Running:
    """The sequences with these numbers, with the padding that the longest of them needs. The cache is changed."""
    cache, mask_BL, lengths_B, profiles_BP = running
    index = torch.tensor(rows, device=mask_BL.device)
    lengths_B = lengths_B[index]
    first = mask_BL.shape[1] - int(lengths_B.max())
    for layer in layers_of(cache):
        layer.keys, layer.values = (state_BHLD[index, :, first:] for state_BHLD in states_of(layer))
    profiles_BP = None if profiles_BP is None else profiles_BP[index]
    return _Running(cache, mask_BL[index, first:], lengths_B, profiles_BP)
