"""Answers written to held-out conversations, before and after training: how varied they are, and which a judge prefers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cuma_ds.adapters.model import CumaModel
from cuma_ds.data.rendering import Message
from cuma_ds.errors import ConfigError
from cuma_ds.evaluation.decoding import AS_WRITTEN, settle_generation
from cuma_ds.evaluation.forward import pad_id_of
from cuma_ds.evaluation.judge import JudgeSettings, Pair, compare
from cuma_ds.evaluation.metrics import distinct
from cuma_ds.evaluation.report.model import Diversity, Report, number
from cuma_ds.evaluation.report.model import Generation as GenerationSection
from cuma_ds.evaluation.run import Evaluator, Pictures, check_kind
from cuma_ds.evaluation.subject import Subject
from cuma_ds.evaluation.talk import Decoding
from cuma_ds.export.modeling import base_fact


@dataclass(frozen=True)
class Request:
    """A held-out conversation up to its last answer.

    Attributes:
        messages: the last one from the user.
        profile: row of the profile that asks.
        person: who asks.
    """

    messages: Sequence[Message]
    profile: int
    person: int


@dataclass(frozen=True)
class Generation:
    """An extra of a report: section ``generation``, from answers to a sample of the first split's conversations.

    Attributes:
        count: most conversations.
        decoding: how answers are generated.
        judge: who compares the trained model's answers with those of its backbone; None for nobody.
        seed: of the sample.
    """

    count: int
    decoding: Decoding
    judge: JudgeSettings | None = None
    seed: int = 0

    def __call__(self, evaluator: Evaluator, report: Report) -> Pictures:
        """Generate, count, ask the judge; the answers go to ``answers.jsonl`` without any profile."""
        subject = evaluator.subject
        check_kind(subject, "chat", "--generate")
        if self.judge is not None and subject.untrained is None:
            raise ConfigError(
                "--judge-url compares a trained model with its backbone; a model as it is has nothing to be compared with"
            )
        split = evaluator.splits[0]
        requests = sample_requests(subject.data.splits[split], self.count, self.seed)
        rows: dict[str, list[str]] = {}
        if subject.untrained is not None:
            with subject.untrained():
                rows["before"] = self._answers(
                    subject, requests, None, evaluator.tell(f"{split}: answers before training")
                )
        embeddings_NP = subject.embeddings_NP
        label = "answers" if subject.untrained is None else "answers, trained"
        rows[evaluator.main] = self._answers(subject, requests, embeddings_NP, evaluator.tell(f"{split}: {label}"))
        with (evaluator.folder / "answers.jsonl").open("w", encoding="utf-8") as file:
            for index, request in enumerate(requests):
                line = {"messages": list(request.messages), **{name: texts[index] for name, texts in rows.items()}}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        section = GenerationSection(
            split=split, requests=len(requests), rows={name: diversity(texts) for name, texts in rows.items()}
        )
        if self.judge is not None:
            pairs = [
                Pair(subject.data.sentences[request.profile], request.messages, ours, base, request.person)
                for request, ours, base in zip(requests, rows["trained"], rows["before"], strict=True)
            ]
            found = compare(pairs, self.judge, evaluator.tell(f"{split}: judge"))
            section.judge = found.verdicts(self.judge.model, subject.config.evaluation.bootstrap)
        report.generation = section
        return {}

    def _answers(
        self,
        subject: Subject,
        requests: Sequence[Request],
        embeddings_NP: Tensor | None,
        progress: Callable[[int, int], None] | None,
    ) -> list[str]:
        longest, sentences = longest_prompt(subject, self.decoding), subject.data.sentences
        rows = [
            subject.renderer.encode_prompt(request.messages, sentences[request.profile], longest)
            for request in requests
        ]
        profiles = [request.profile for request in requests]
        return generate(subject, rows, profiles, embeddings_NP, self.decoding, progress)


def sample_requests(split: Any, count: int, seed: int = 0) -> list[Request]:
    """Up to ``count`` conversations of a chat split, each without its last answer and what follows it."""
    chosen = sorted(np.random.default_rng(seed).permutation(len(split))[:count].tolist())
    found = []
    for index in chosen:
        row = split[index]
        last = max(place for place, message in enumerate(row["messages"]) if message["role"] == "assistant")
        messages = [{"role": message["role"], "content": message["content"]} for message in row["messages"][:last]]
        people = row.get("people")
        found.append(Request(messages, int(row["profile"]), int(people[0]) if people else index))
    return found


def longest_prompt(subject: Subject, decoding: Decoding) -> int:
    """Tokens that a prompt may have, so that the model can look back over it and a whole answer.

    Raises:
        ConfigError: none are left.
    """
    backbone = subject.model.base_model if isinstance(subject.model, CumaModel) else subject.model
    longest = int(base_fact(backbone.config, "max_position_embeddings") or 2048) - decoding.max_new_tokens
    if longest < 1:
        raise ConfigError(f"--max-new-tokens {decoding.max_new_tokens} leaves no room for a prompt; lower it")
    return longest


@torch.no_grad()
def generate(
    subject: Subject,
    rows: Sequence[Sequence[int]],
    profiles: Sequence[int],
    embeddings_NP: Tensor | None,
    decoding: Decoding,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """The model's continuation of each prompt, in batches of similar length.

    Args:
        rows: token ids, each at most :func:`longest_prompt` long.
        profiles: row of ``embeddings_NP`` that asks each.
        embeddings_NP: None for a model that takes none.
    """
    tokenizer = subject.renderer.tokenizer
    pad_id = pad_id_of(tokenizer)
    settle_generation(subject.model, subject.renderer)
    torch.manual_seed(decoding.seed)
    texts = [""] * len(rows)
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    size = subject.config.evaluation.batch_size
    for start in range(0, len(order), size):
        indices = order[start : start + size]
        asked = [list(rows[index]) for index in indices]
        width = max(map(len, asked))
        inputs = {
            "input_ids": torch.tensor([[pad_id] * (width - len(row)) + row for row in asked], device=subject.device),
            "attention_mask": torch.tensor(
                [[0] * (width - len(row)) + [1] * len(row) for row in asked], device=subject.device
            ),
        }
        if embeddings_NP is not None:
            inputs["profile_embeddings"] = embeddings_NP[[profiles[index] for index in indices]].to(subject.device)
        tokens = subject.model.generate(**inputs, **decoding.options(), pad_token_id=pad_id)
        for index, text in zip(indices, tokenizer.batch_decode(tokens[:, width:], **AS_WRITTEN), strict=True):
            texts[index] = text.strip()
        if progress is not None:
            progress(start + len(indices), len(order))
    return texts


def diversity(texts: Sequence[str]) -> Diversity:
    """Distinct-1, Distinct-2 and mean number of words of generated answers."""
    return Diversity(
        distinct_1=number(distinct(texts, 1)),
        distinct_2=number(distinct(texts, 2)),
        words=number(float(np.mean([len(text.split()) for text in texts]))),
    )
