"""Asking a model as somebody: answers that stream, answers of several people at once, choice questions, and who was routed where.

Shapes: B profiles asked as, R routers, E experts, n options.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TextStreamer

from cuma_ds.data.rendering import PROMPT_KEYS, Message, Renderer
from cuma_ds.errors import ConfigError, ModelError
from cuma_ds.evaluation.decoding import AS_WRITTEN, COLDEST, settle_generation
from cuma_ds.evaluation.forward import pad_id_of
from cuma_ds.export.modeling import CumaForCausalLM, Profile, base_fact
from cuma_ds.profiles import linearize

# Where a model does not say how far it can look back.
_LONGEST = 2048


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen: the most probable one at temperature 0, else a sample of the top-p mass."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"--max-new-tokens is {self.max_new_tokens}; at least 1 is needed")
        if not 0 <= self.temperature < float("inf") or not 0 < self.top_p <= 1:
            raise ConfigError(
                f"--temperature {self.temperature} --top-p {self.top_p}: allowed are temperatures from 0 and top-p in (0, 1]"
            )

    def options(self) -> dict[str, Any]:
        """Keyword arguments of ``generate``; what greedy decoding does not read is switched off."""
        if self.temperature < COLDEST:
            return {
                "max_new_tokens": self.max_new_tokens,
                "do_sample": False,
                "temperature": None,
                "top_p": None,
                "top_k": None,
            }
        sampling = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return {"max_new_tokens": self.max_new_tokens, **sampling}


class Talker:
    """One model asked as one or several people.

    Args:
        model: from an export or a run.
        tokenizer: of its backbone.
        decoding: how answers are generated.

    Attributes:
        end_ids: the tokens that end an answer.
    """

    def __init__(self, model: CumaForCausalLM, tokenizer: Any, decoding: Decoding) -> None:
        self.model, self.tokenizer, self.decoding = model, tokenizer, decoding
        prompt = {"max_length": _LONGEST, **model.export["prompt"]}
        known = {key: prompt[key] for key in PROMPT_KEYS if prompt.get(key) is not None}
        self.renderer = Renderer(tokenizer, **known)
        self.end_ids = settle_generation(model, self.renderer)
        self.pad_id = pad_id_of(tokenizer)
        self.longest = int(base_fact(model.base_model.config, "max_position_embeddings") or _LONGEST)
        self._device = next(model.parameters()).device

    @property
    def takes_profiles(self) -> bool:
        """Whether answers depend on who is asking."""
        return bool(self.model.config.profile_dim) or self.renderer.profile_in_prompt

    def answers(
        self, messages: Sequence[Message], profiles: Sequence[Profile], write: Callable[[str], None] | None = None
    ) -> list[str]:
        """What the model says next to each of the profiles (all in one batch).

        Args:
            messages: the conversation so far, the last message from the user.
            profiles: B of them; empty for a model that takes none (then one answer).
            write: called with each piece of text as it comes; for a single profile.
        """
        longest = self.longest - self.decoding.max_new_tokens
        if longest < 1:
            raise ConfigError(f"--max-new-tokens {self.decoding.max_new_tokens} leaves no room for a prompt; lower it")
        rows = [self.encode(messages, sentence) for sentence in self._sentences(profiles)]
        if (prompt := max(map(len, rows))) > longest:
            room = f"with --max-new-tokens {self.decoding.max_new_tokens} this model reads {longest}"
            raise ConfigError(f"the conversation has {prompt} tokens; {room}; shorten it (in a chat: /clear)")
        inputs = self._batch(rows)
        streamer = None if write is None else _Writer(self.tokenizer, write)
        torch.manual_seed(self.decoding.seed)
        tokens = self.model.generate(
            **inputs, **self._who(profiles), **self.decoding.options(), pad_token_id=self.pad_id, streamer=streamer
        )
        texts = self.tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], **AS_WRITTEN)
        return [text.strip() for text in texts]

    @torch.no_grad()
    def choose(self, question: str, options: Sequence[str], profiles: Sequence[Profile]) -> list[list[float]]:
        """The probability of each option, [B][n]; the prompt is that of training and evaluation."""
        letters = self.renderer.letter_ids(len(options))
        inputs = self._batch(
            [self.renderer.encode_choice(question, options, sentence) for sentence in self._sentences(profiles)]
        )
        logits = self.model(**inputs, **self._who(profiles), logits_to_keep=1, use_cache=False).logits[:, -1, letters]
        return logits.float().softmax(dim=-1).tolist()

    @torch.no_grad()
    def gates(self, messages: Sequence[Message], profiles: Sequence[Profile]) -> Tensor | None:
        """Mean gate [B, R, E] over the prompt's tokens; None for a model without routers."""
        if not self.model.router_names:
            return None
        inputs = self._batch([self.encode(messages, sentence) for sentence in self._sentences(profiles)])
        with self.model.recording_routing() as record:
            self.model(**inputs, **self._who(profiles), logits_to_keep=1, use_cache=False)
        return record.gates[0].transpose(0, 1).cpu()

    def encode(self, messages: Sequence[Message], sentence: str) -> list[int]:
        """Token ids of a conversation that the model is to continue.

        Raises:
            CumaError: the chat template refuses it, or the model has no embedding for one of its tokens.
        """
        ids = self.renderer.encode_prompt(messages, sentence)
        rows = self.model.base_model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        if max(ids) >= rows:
            only = f"the model has embeddings for {rows} tokens only"
            raise ModelError(f"the conversation holds token {max(ids)}, but {only}; write it otherwise")
        return ids

    def _sentences(self, profiles: Sequence[Profile]) -> list[str]:
        if not profiles:
            if self.takes_profiles:
                raise ConfigError("this model answers by who is asking; give a --profile (in a chat: /profile)")
            return [""]
        if not self.takes_profiles:
            raise ModelError("a profile was given, but this model takes none")
        return [linearize(profile, self.model.export["profiles"]["template"]) for profile in profiles]

    def _who(self, profiles: Sequence[Profile]) -> dict[str, Any]:
        return {"profiles": list(profiles)} if self.model.config.profile_dim else {}

    def _batch(self, rows: Sequence[Sequence[int]]) -> dict[str, Any]:
        longest = max(len(row) for row in rows)
        padded = [[self.pad_id] * (longest - len(row)) + list(row) for row in rows]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        return {
            "input_ids": torch.tensor(padded, device=self._device),
            "attention_mask": torch.tensor(mask, device=self._device),
        }


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


class _Writer(TextStreamer):
    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, **AS_WRITTEN)
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._write(text)
