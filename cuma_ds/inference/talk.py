"""Asking a model as one or several people: answers that stream, choice questions, and the experts that were used.

Shapes: B profiles, R routers, E experts, n options, P profile width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from cuma_ds.adapters import CumaModel
from cuma_ds.data.rendering import Message
from cuma_ds.errors import ConfigError, ModelError
from cuma_ds.inference.decoding import settle_generation
from cuma_ds.inference.generate import Completion, Decoder, generate
from cuma_ds.inference.modeling import Profile
from cuma_ds.inference.open import Opened
from cuma_ds.inference.sampling import Sampling
from cuma_ds.inference.text import AS_WRITTEN, TextStream
from cuma_ds.profiles import linearize, wording_of

# Called with the row of a profile and the next piece of its answer.
Write = Callable[[int, str], None]
# Profiles that are answered in one batch.
_TOGETHER = 64


class Talker:
    """One model asked as one or several people.

    Args:
        opened: the model.
        sampling: how answers are generated.

    Attributes:
        end_ids: the tokens that end an answer.
        decoder: what continues prompts.
    """

    def __init__(self, opened: Opened, sampling: Sampling) -> None:
        self.opened, self.sampling = opened, sampling
        self.renderer, self.tokenizer = opened.renderer, opened.renderer.tokenizer
        self.end_ids = settle_generation(opened.model, opened.renderer)

    @functools.cached_property
    def decoder(self) -> Decoder:
        """Made at its first use."""
        return self.opened.decoder(_TOGETHER)

    @property
    def router_names(self) -> Sequence[str]:
        """Names of the R routers; empty for a model without."""
        return self.opened.model.router_names if isinstance(self.opened.model, CumaModel) else ()

    @property
    def takes_profiles(self) -> bool:
        """Whether answers depend on a profile."""
        return self.opened.reader is not None or self.renderer.profile_in_prompt

    def answers(
        self, messages: Sequence[Message], profiles: Sequence[Profile], write: Write | None = None
    ) -> list[str]:
        """What the model says next to each of the profiles in one conversation; see :meth:`replies`."""
        return self.replies([messages] * max(1, len(profiles)), profiles, write)

    def replies(
        self,
        conversations: Sequence[Sequence[Message]],
        profiles: Sequence[Profile],
        write: Write | None = None,
        sampling: Sampling | None = None,
    ) -> list[str]:
        """What the model says next in a conversation with each of the profiles. Each answer is what it would be alone.

        Args:
            conversations: B of them so far, the last message of each from the user.
            profiles: B of them; empty for a model that takes none (then one conversation).
            write: called with each piece of text as it comes.
            sampling: how the answers are generated; None for the talker's own.
        """
        sampling = self.sampling if sampling is None else sampling
        new_tokens = sampling.max_new_tokens
        longest = self.opened.longest - new_tokens
        if longest < 1:
            raise ConfigError(f"--max-new-tokens {new_tokens} leaves no room for a prompt; lower it")
        sentences = self._sentences(profiles)
        prompts = [self.encode(said, sentence) for said, sentence in zip(conversations, sentences, strict=True)]
        if (prompt := max(map(len, prompts))) > longest:
            room = f"with --max-new-tokens {new_tokens} this model reads {longest}"
            raise ConfigError(f"the conversation has {prompt} tokens; {room}; shorten it (in a chat: /clear)")
        who_BP = self._embeddings(profiles)
        completions = [
            _Streamed(
                prompt,
                sampling,
                None if who_BP is None else who_BP[row],
                self.tokenizer,
                None if write is None else functools.partial(write, row),
            )
            for row, prompt in enumerate(prompts)
        ]
        generate(self.decoder, completions, self.opened.peers.all_done)
        return [self.tokenizer.decode(completion.tokens, **AS_WRITTEN).strip() for completion in completions]

    def choose(self, question: str, options: Sequence[str], profiles: Sequence[Profile]) -> list[list[float]]:
        """The probability of each option, [B][n]; the prompt is that of training and evaluation."""
        letters = self.renderer.letter_ids(len(options))
        sentences = self._sentences(profiles)
        prompts = [self.renderer.encode_choice(question, options, sentence) for sentence in sentences]
        logits_BV = self.decoder.read(prompts, self._embeddings(profiles))
        return logits_BV[:, letters].float().softmax(dim=-1).tolist()

    def gates(self, messages: Sequence[Message], profiles: Sequence[Profile]) -> Tensor | None:
        """Mean gate [B, R, E] over the prompt's tokens; None for a model without routers."""
        model = self.opened.model
        if not isinstance(model, CumaModel) or not self.router_names:
            return None
        prompts = [self.encode(messages, sentence) for sentence in self._sentences(profiles)]
        decoder, who_BP = self.decoder, self._embeddings(profiles)
        with model.recording_routing() as record:
            decoder.read(prompts, who_BP)
        return torch.cat(record.gates, dim=1).transpose(0, 1).cpu()

    def encode(self, messages: Sequence[Message], sentence: str) -> list[int]:
        """Token ids of a conversation that the model is to continue.

        Raises:
            CumaError: the chat template refuses it, or the model has no embedding for one of its tokens.
        """
        ids = self.renderer.encode_prompt(messages, sentence)
        if max(ids) >= self.opened.embedded_tokens:
            only = f"the model has embeddings for {self.opened.embedded_tokens} tokens only"
            raise ModelError(f"the conversation holds token {max(ids)}, but {only}; write it otherwise")
        return ids

    def sentence(self, profile: Profile) -> str:
        """A profile as the sentence that the model reads."""
        return linearize(profile, wording_of(self.opened.config.profiles))

    def _sentences(self, profiles: Sequence[Profile]) -> list[str]:
        if not profiles:
            if self.takes_profiles:
                raise ConfigError("this model answers by who is asking; give a --profile (in a chat: /profile)")
            return [""]
        if not self.takes_profiles:
            raise ModelError("a profile was given, but this model takes none")
        return [self.sentence(profile) for profile in profiles]

    def _embeddings(self, profiles: Sequence[Profile]) -> Tensor | None:
        """Raw embeddings [B, P]; None for a model that takes none."""
        return None if self.opened.reader is None else self.opened.reader(profiles)


class _Streamed(Completion):
    """A completion whose text is handed on while it is written."""

    def __init__(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        profile_P: Tensor | None,
        tokenizer: PreTrainedTokenizerFast,
        write: Callable[[str], None] | None,
    ) -> None:
        super().__init__(prompt, sampling, profile_P)
        self._write, self._text = write, TextStream(tokenizer)

    def add(self, token: int, ends: bool) -> None:
        super().add(token, ends)
        if self._write is not None:
            piece = self._text.add(token) + (self._text.finish() if self.done else "")
            if piece:
                self._write(piece)


def experts_of(gates_BRE: Tensor, names: Sequence[str], rows: int = 3) -> list[tuple[str, list[str]]]:
    """Where B profiles are routed most differently: router name, and each profile's experts there with their shares.

    The last row, "same routing as the first", is the mean over all routers of sum_i min(g_i, g_i of the first profile).
    """
    spread_R = (
        gates_BRE.var(dim=0, unbiased=False).sum(dim=-1) if len(gates_BRE) > 1 else gates_BRE[0].max(dim=-1).values
    )
    found = []
    for router in spread_R.argsort(descending=True)[:rows].tolist():
        shares = []
        for gate_E in gates_BRE[:, router]:
            top = gate_E.argsort(descending=True)[:2].tolist()
            shares.append(
                ", ".join(f"{expert} ({float(gate_E[expert]):.0%})" for expert in top if gate_E[expert] >= 0.005)
            )
        found.append((names[router], shares))
    if len(gates_BRE) > 1:
        same_B = torch.minimum(gates_BRE, gates_BRE[:1]).sum(dim=-1).mean(dim=1)
        found.append(("same routing as the first", [f"{float(share):.0%}" for share in same_B]))
    return found
