"""Answers to held-out conversations, before and after training: how varied they are, and which a judge prefers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from cuma_ds.data.rendering import Message
from cuma_ds.data.rows import Split
from cuma_ds.errors import ConfigError
from cuma_ds.evaluation.judge import verdicts
from cuma_ds.evaluation.metrics import distinct, equal_lengths
from cuma_ds.evaluation.report.model import Diversity, Report, number
from cuma_ds.evaluation.report.model import Generation as GenerationSection
from cuma_ds.evaluation.run import Evaluator, Pictures, check_kind
from cuma_ds.evaluation.subject import Subject
from cuma_ds.inference.generate import Completion, generate
from cuma_ds.inference.sampling import Sampling, mixed_seed
from cuma_ds.inference.text import AS_WRITTEN
from cuma_ds.judge import Judge, JudgeSettings, Pair, compare

ANSWERS_FILE = "answers.jsonl"


@dataclass(frozen=True)
class Request:
    """A held-out conversation up to its last answer.

    Attributes:
        messages: the last one from the user.
        profile: row of its profile.
        person: number of the person who had the conversation.
    """

    messages: Sequence[Message]
    profile: int
    person: int


@dataclass(frozen=True)
class Generation:
    """An extra of a report: section ``generation``, from answers to a sample of the first split's conversations.

    Attributes:
        count: most conversations.
        sampling: how answers are generated.
        judge: which model compares the trained model's answers with those of its backbone; None compares nothing.
        seed: of the sample.
    """

    count: int
    sampling: Sampling
    judge: JudgeSettings | None = None
    seed: int = 0

    def __call__(self, evaluator: Evaluator, report: Report) -> Pictures:
        """Generate, count, ask the judge; the answers go to ``answers.jsonl`` without any profile."""
        subject = evaluator.subject
        check_kind(subject, "chat", "--generate")
        if self.judge is not None and subject.untrained is None:
            compared = "a model as it is has nothing to be compared with"
            raise ConfigError(f"--judge-url compares a trained model with its backbone; {compared}")
        if self.judge is not None and not subject.data.keeps_text:
            kept = "this run kept no profiles (profiles.keep_text: false), and a judge is told about the person"
            raise ConfigError(f"--judge-url: {kept}; evaluate other data with --data")
        judge = None if self.judge is None else Judge(self.judge)
        split = evaluator.splits[0]
        requests = sample_requests(subject.data.splits[split], self.count, self.seed)
        rows: dict[str, list[str]] = {}
        if subject.untrained is not None:
            with subject.untrained():
                told = evaluator.tell(f"{split}: answers before training")
                rows["before"] = self._answers(subject, requests, None, told)
        label = "answers" if subject.untrained is None else "answers, trained"
        told = evaluator.tell(f"{split}: {label}")
        rows[evaluator.main] = self._answers(subject, requests, subject.embeddings_NP, told)
        with (evaluator.folder / ANSWERS_FILE).open("w", encoding="utf-8") as file:
            for index, request in enumerate(requests):
                line = {"messages": list(request.messages), **{name: texts[index] for name, texts in rows.items()}}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        section = GenerationSection(split=split, requests=len(requests), rows=diversities(rows))
        if judge is not None:
            pairs = [
                Pair(subject.data.sentences[request.profile], request.messages, ours, base, request.person)
                for request, ours, base in zip(requests, rows["trained"], rows["before"], strict=True)
            ]
            found = compare(pairs, judge, evaluator.tell(f"{split}: judge"))
            section.judge = verdicts(found, judge.settings.model, subject.config.evaluation.bootstrap)
        report.generation = section
        return {}

    def _answers(
        self,
        subject: Subject,
        requests: Sequence[Request],
        embeddings_NP: Tensor | None,
        progress: Callable[[int, int], None] | None,
    ) -> list[str]:
        longest, sentences = longest_prompt(subject, self.sampling), subject.data.sentences
        prompts = [
            subject.renderer.encode_prompt(request.messages, sentences[request.profile], longest)
            for request in requests
        ]
        profiles = [request.profile for request in requests]
        profiles_MP = None if embeddings_NP is None else embeddings_NP[profiles]
        return answers(subject, prompts, profiles_MP, self.sampling, progress)


def sample_requests(split: Split, count: int, seed: int = 0) -> list[Request]:
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


def longest_prompt(subject: Subject, sampling: Sampling) -> int:
    """Tokens that a prompt may have, so that the model can look back over it and a whole answer.

    Raises:
        ConfigError: none are left.
    """
    longest = subject.longest - sampling.max_new_tokens
    if longest < 1:
        raise ConfigError(f"--max-new-tokens {sampling.max_new_tokens} leaves no room for a prompt; lower it")
    return longest


def answers(
    subject: Subject,
    prompts: Sequence[Sequence[int]],
    profiles_MP: Tensor | None,
    sampling: Sampling,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """The model's continuation of each of M prompts. With several ranks each writes a share of them.

    Args:
        subject: the model.
        prompts: token ids, each at most :func:`longest_prompt` long.
        profiles_MP: raw embedding for each; None for a model that takes none.
        sampling: how tokens are chosen; each prompt's seed is made of its seed and the prompt's number.
        progress: called with (answers done, in all) of this rank.
    """
    completions = []
    for place, prompt in enumerate(prompts):
        own = replace(sampling, seed=mixed_seed(sampling.seed, place))
        completions.append(Completion(prompt, own, None if profiles_MP is None else profiles_MP[place]))
    decoder, peers = subject.decoder(subject.config.evaluation.batch_size), subject.peers
    share = peers.share(completions)
    generate(decoder, share, peers.all_done, progress)
    decode = subject.renderer.tokenizer.decode
    return peers.joined([decode(completion.tokens, **AS_WRITTEN).strip() for completion in share])


def diversities(rows: Mapping[str, Sequence[str]]) -> dict[str, Diversity]:
    """:func:`diversity` of each contender's answers to the same conversations, also with equal lengths."""
    found = {name: diversity(texts) for name, texts in rows.items()}
    if len(rows) > 1:
        for name, texts in equal_lengths(rows).items():
            found[name].equal = diversity(texts)
    return found


def diversity(texts: Sequence[str]) -> Diversity:
    """Distinct-1, Distinct-2 and mean number of words of generated answers."""
    return Diversity(
        distinct_1=number(distinct(texts, 1)),
        distinct_2=number(distinct(texts, 2)),
        words=number(float(np.mean([len(text.split()) for text in texts])) if texts else None),
    )
