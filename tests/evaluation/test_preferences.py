"""The report on preference data: against a loop over pairs, and on data where only the profile decides."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from preferences import (
    COUNTRIES,
    HIDDEN,
    answer_logp,
    answer_tokens,
    bootstrap_by_hand,
    by_hand,
    write_preferences,
)
from ranks import run as run_ranks
from run_folder import OPINIONS, content, make_run

from cuma_ds.data.batch import collate, encode_pair
from cuma_ds.errors import CheckpointError
from cuma_ds.evaluation.examples import swap_profiles
from cuma_ds.evaluation.predictions import read_predictions
from cuma_ds.evaluation.preference import PairLogps, pair_log_probabilities
from cuma_ds.evaluation.preference_split import pair_scores
from cuma_ds.evaluation.report.model import read_report
from cuma_ds.evaluation.report.tables import terminal_tables
from cuma_ds.evaluation.run import evaluate, evaluate_run
from cuma_ds.evaluation.subject import Subject, run_subject, subject
from cuma_ds.export.hf import read_run, write_hf
from cuma_ds.export.lora import write_lora
from cuma_ds.inference.open import load_trained, open_export, open_model, open_peft
from cuma_ds.parallel.backbone import load_backbone
from cuma_ds.profiles import ProfileTable
from cuma_ds.runs import Run

REPLICATES = 200
SETTINGS = ["evaluation.min_answers=5", f"evaluation.bootstrap={REPLICATES}"]


@pytest.fixture(scope="module")
def preferences(tmp_path_factory) -> Path:
    return write_preferences(tmp_path_factory.mktemp("data") / "preferences.jsonl")


def run_with_start(folder: Path, backbone: Path, encoder: Path, source: Path, **sections: dict) -> Path:
    """A run that started from other adapters than those of its checkpoint."""
    _, model, _ = make_run(folder.parent / "origin", backbone, encoder, {}, source=source, **sections)
    generator = torch.Generator().manual_seed(8)
    start = {
        name: 0.4 * torch.randn(tensor.shape, generator=generator) if tensor.dim() > 1 else tensor
        for name, tensor in model.adapter_state().items()
    }
    return make_run(folder, backbone, encoder, {}, source=source, start=start, **sections)[0]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, tiny_llama, tiny_encoder, preferences) -> Path:
    data = {"test_fraction": 0.5, "heldout_fraction": 0.0, "heldout_profile_fraction": 0.2}
    folder = tmp_path_factory.mktemp("runs") / "preferences"
    return run_with_start(folder, tiny_llama, tiny_encoder, preferences, data=data)


@pytest.fixture(scope="module")
def asked(run_folder) -> Subject:
    return run_subject(run_folder, overrides=SETTINGS)


@pytest.fixture(scope="module")
def report(asked, tmp_path_factory):
    return evaluate(asked, tmp_path_factory.mktemp("report"))


class Loop:
    """Every number of a split, from one forward per answer and loops over pairs."""

    def __init__(self, asked: Subject, split: str) -> None:
        self.rows = list(asked.data.splits[split])
        self.people = [row["people"][0] for row in self.rows]
        tokenizer, backbone, table = asked.renderer.tokenizer, load_backbone(asked.config.model), asked.embeddings_NP
        prompts = [json.dumps(row["prompt"]) for row in self.rows]
        swapped = swap_profiles(prompts, [row["group"] for row in self.rows], [row["profile"] for row in self.rows])

        def both(model, profiles):
            return [
                tuple(
                    answer_logp(model, tokenizer, row["prompt"], row[side], None if p is None else table[p])
                    for side in ("chosen", "rejected")
                )
                for row, p in zip(self.rows, profiles, strict=True)
            ]

        own = [row["profile"] for row in self.rows]
        self.logps = {"before": both(backbone, [None] * len(own))}
        start = load_trained(
            asked.config,
            Run(asked.config.run_dir).start_adapters(),
            ProfileTable.load(Run(asked.config.run_dir).profiles_file),
        )
        self.logps["start"] = both(start, own)
        self.logps |= {"trained": both(asked.model, own), "swapped": both(asked.model, swapped)}
        self.tokens = [
            tuple(answer_tokens(tokenizer, row[side]) for side in ("chosen", "rejected")) for row in self.rows
        ]

    def values(self, name: str, score: str) -> list[float]:
        reference = self.logps["start" if score == "accuracy_start" else "before"]
        found = []
        for (a, b), (c, d), (m, n) in zip(self.logps[name], reference, self.tokens, strict=True):
            if score in ("accuracy", "accuracy_start"):
                found.append(by_hand(a - c, b - d))
            elif score == "margin":
                found.append((a - c) - (b - d))
            else:
                found.append(by_hand(a, b) if score == "likelihood" else by_hand(a / m, b / n))
        return found


@pytest.fixture(scope="module")
def loop(asked) -> Loop:
    return Loop(asked, "test")


SCORES = ["accuracy", "margin", "likelihood", "likelihood_per_token"]


def assert_score(scores, score: str, expected: tuple[float, float, float]) -> None:
    mean, low, high = expected
    assert getattr(scores, score) == pytest.approx(mean, abs=2e-5)
    assert scores.interval[score] == pytest.approx((low, high), abs=2e-5)


@pytest.mark.parametrize("batch_size", [1, 7])
def test_log_probabilities_equal_single_unpadded_forwards(asked, loop, batch_size) -> None:
    pairs = [encode_pair(row, asked.renderer, asked.data.sentences) for row in loop.rows]
    found = pair_log_probabilities(asked.model, pairs, asked.embeddings_NP, batch_size, 0, record=True)
    np.testing.assert_allclose(found.logps_M2, loop.logps["trained"], rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(found.tokens_M2, loop.tokens)
    assert found.gates_MRE.shape == (len(pairs), len(asked.model.router_names), 4)
    np.testing.assert_allclose(found.gates_MRE.sum(-1), 1, atol=1e-5)
    alone = pair_log_probabilities(asked.model, pairs[3:4], asked.embeddings_NP, 1, 0, record=True)
    np.testing.assert_allclose(found.gates_MRE[3], alone.gates_MRE[0], atol=1e-5)


def test_equal_answers_of_equal_profiles_run_once(asked, loop) -> None:
    pairs = [encode_pair(row, asked.renderer, asked.data.sentences) for row in loop.rows] * 2
    different = {(tuple(answer.input_ids), answer.profile) for pair in pairs for answer in pair}
    told = []
    pair_log_probabilities(asked.model, pairs, asked.embeddings_NP, 16, 0, progress=lambda *at: told.append(at))
    assert told[-1] == (len(different), len(different))
    assert len(different) < 2 * len(loop.rows)


def test_every_row_and_its_interval_equal_a_loop_over_pairs_and_people(report, loop) -> None:
    split = report.splits["test"]
    assert list(split.rows) == ["before", "start", "trained", "swapped"]
    assert (split.pairs, split.people) == (len(loop.rows), len(set(loop.people)))
    assert split.people < split.pairs
    assert (split.chosen_tokens, split.rejected_tokens) == pytest.approx(np.mean(loop.tokens, axis=0), abs=1e-6)
    for name, scores in split.rows.items():
        for score in SCORES + (["accuracy_start"] if name == "trained" else []):
            expected = bootstrap_by_hand(loop.people, loop.values(name, score), REPLICATES)
            assert_score(scores, score, expected)
    assert split.rows["before"].accuracy == 0.5
    assert split.rows["before"].interval["accuracy"] == (0.5, 0.5)
    assert split.rows["before"].margin == 0
    assert split.rows["start"].accuracy_start is None
    # The numbers differ, so that none of them is compared with another by mistake.
    assert len({scores.margin for scores in split.rows.values()}) == 4


def test_differences_are_taken_over_the_same_people(report, loop) -> None:
    differences = report.splits["test"].differences
    assert list(differences) == ["before", "start", "swapped"]
    for name, scores in differences.items():
        for score in SCORES:
            pairs = zip(loop.values("trained", score), loop.values(name, score), strict=True)
            assert_score(scores, score, bootstrap_by_hand(loop.people, [a - b for a, b in pairs], REPLICATES))


def test_subgroups_equal_the_loop_over_their_pairs(report, loop) -> None:
    parts = report.splits["test"].subgroups
    assert list(parts) == ["country", "age"]
    labels = [row["group"] for row in loop.rows]
    assert [group.label for group in parts["country"].shown] == sorted(set(labels) & set(COUNTRIES))
    for group in parts["country"].shown:
        chosen = [label == group.label for label in labels]
        assert group.pairs == sum(chosen)
        assert group.people == len({person for person, own in zip(loop.people, chosen, strict=True) if own})
        for name in ("before", "start", "trained", "swapped"):
            values = [v if own else float("nan") for v, own in zip(loop.values(name, "accuracy"), chosen, strict=True)]
            assert_score(group.rows[name], "accuracy", bootstrap_by_hand(loop.people, values, REPLICATES))


def test_predictions_hold_the_log_probabilities(report, asked, loop, tmp_path) -> None:
    evaluate(asked, tmp_path)
    kept = read_predictions(tmp_path)["test"]
    np.testing.assert_array_equal(kept.counts_MN, loop.tokens)
    for name, logps in loop.logps.items():
        np.testing.assert_allclose(kept.predicted[name], logps, rtol=1e-5, atol=1e-4)
    assert len(set(kept.ids)) == len(loop.rows)
    assert content(read_report(tmp_path)) == content(report)


def test_profiles_that_were_held_out_are_a_split_of_their_own(report) -> None:
    assert list(report.splits) == ["test", "heldout_profiles"]
    assert report.splits["heldout_profiles"].pairs > 0


def test_the_model_is_itself_again_after_the_start_policy(asked) -> None:
    before = {name: tensor.clone() for name, tensor in asked.model.adapter_state().items()}
    with asked.started():
        assert any(not torch.equal(tensor, before[name]) for name, tensor in asked.model.adapter_state().items())
    for name, tensor in asked.model.adapter_state().items():
        assert torch.equal(tensor, before[name])


def test_adapters_that_do_nothing_tie_every_pair(asked, tmp_path) -> None:
    opened = dataclasses.replace(asked, started=None)
    nothing = {
        name: torch.zeros_like(tensor) if name.endswith("lora_b") else tensor.clone()
        for name, tensor in opened.model.adapter_state().items()
    }
    own = {name: tensor.clone() for name, tensor in opened.model.adapter_state().items()}
    opened.model.load_adapter_state(nothing)
    rows = evaluate(opened, tmp_path).splits["test"].rows
    opened.model.load_adapter_state(own)
    assert list(rows) == ["before", "trained", "swapped"]
    for scores in rows.values():
        assert (scores.accuracy, scores.margin) == (0.5, 0)
        assert scores.likelihood == rows["before"].likelihood != 0.5


def test_ties_count_half_and_what_is_no_number_is_no_score() -> None:
    before = PairLogps(
        np.array([[-1.0, -2.0], [-3.0, -1.0], [-1.0, -1.0]]), np.array([[1.0, 4.0], [3.0, 1.0], [1.0, 1.0]])
    )
    trained = PairLogps(np.array([[-2.0, -3.0], [-1.0, -1.0], [np.nan, -1.0]]), before.tokens_M2)
    scores = pair_scores("trained", {"before": before, "trained": trained})
    np.testing.assert_array_equal(scores["accuracy"], [0.5, 1.0, np.nan])
    np.testing.assert_array_equal(scores["margin"], [0.0, 2.0, np.nan])
    np.testing.assert_array_equal(scores["likelihood"], [1.0, 0.5, np.nan])
    np.testing.assert_array_equal(scores["likelihood_per_token"], [0.0, 1.0, np.nan])


def test_small_groups_are_counted_and_named_nowhere(asked, tmp_path, preferences) -> None:
    report = evaluate(asked, tmp_path)
    parts = report.splits["test"].subgroups
    assert parts["country"].left_out == 1
    assert HIDDEN in preferences.read_text()
    assert HIDDEN in {row["group"] for row in asked.data.splits["test"]}
    for file in tmp_path.iterdir():
        assert HIDDEN.encode() not in file.read_bytes()
        assert HIDDEN not in file.name
    assert "1 with fewer than 5 people are left out." in (tmp_path / "report.md").read_text()
    strict = asked.config.evaluation.model_copy(update={"min_answers": 10_000})
    config = asked.config.model_copy(update={"evaluation": strict})
    hidden = evaluate(dataclasses.replace(asked, config=config), tmp_path / "strict")
    assert not any(part.shown for part in hidden.splits["test"].subgroups.values())
    assert hidden.pictures == ["preferences.png"]
    assert not any(country in (tmp_path / "strict" / "report.md").read_text() for country in COUNTRIES)


def test_the_report_can_be_read_and_looked_at(report, asked, tmp_path) -> None:
    evaluate(asked, tmp_path)
    assert report.pictures[:2] == ["preferences.png", "preferences-by-group.png"]
    for name in report.pictures:
        picture = imread(tmp_path / name)
        assert min(picture.shape[:2]) > 200
        assert picture[..., :3].std() > 0.02
    text = (tmp_path / "report.md").read_text()
    trained = report.splits["test"].rows["trained"]
    low, high = trained.interval["accuracy"]
    assert f"| **trained** | {trained.accuracy:.3f} [{low:.3f}, {high:.3f}] | {trained.margin:.3f} [" in text
    less = report.splits["test"].differences["swapped"]
    assert f"| trained, profiles swapped | {less.accuracy:+.3f} [{less.interval['accuracy'][0]:+.3f}, " in text
    assert "| backbone before training | 0.500 | 0.000 |" in text
    assert "the backbone itself has 0.500 by definition" in text
    assert "Accuracy against start" in text
    assert "### Subgroups by country" in text
    assert "## Routing" in text
    (table, _) = terminal_tables(report)
    assert table.row_count == 4
    assert [column.header for column in table.columns][1:3] == ["accuracy", "margin"]


def test_a_bare_model_has_likelihoods_only(tiny_llama, preferences, tmp_path) -> None:
    opened = open_model(str(tiny_llama), [*SETTINGS, "model.dtype=float32", "data.test_fraction=0.5"])
    asked = subject(opened, preferences)
    report = evaluate(asked, tmp_path)
    assert report.main == "before"
    split = report.splits["test"]
    assert list(split.rows) == ["before"]
    assert split.differences == {}
    backbone, tokenizer = load_backbone(asked.config.model), asked.renderer.tokenizer
    values, people = [], []
    for row in asked.data.splits["test"]:
        logps = [answer_logp(backbone, tokenizer, row["prompt"], row[side], None) for side in ("chosen", "rejected")]
        tokens = [answer_tokens(tokenizer, row[side]) for side in ("chosen", "rejected")]
        values.append(by_hand(logps[0] / tokens[0], logps[1] / tokens[1]))
        people.append(row["people"][0])
    assert_score(split.rows["before"], "likelihood_per_token", bootstrap_by_hand(people, values, REPLICATES))
    assert split.rows["before"].accuracy is None
    text = (tmp_path / "report.md").read_text()
    assert "| | likelihood | likelihood per token |" in text
    assert "**the model as it is**" in text
    assert "implicit reward" not in text
    assert report.pictures == ["preferences.png", "preferences-by-group.png"]


def test_where_only_the_profile_decides_swapping_profiles_costs_what_it_must(
    tmp_path, tiny_llama, tiny_encoder
) -> None:
    """Half of the countries prefer one answer, half the other: the prompt alone tells nothing."""
    countries = [*COUNTRIES, "Kenya", "Norway", "Peru", "Spain"]
    wants = {country: ("x", "y") if place % 2 else ("y", "x") for place, country in enumerate(countries)}
    lines = [
        {"profile": {"country": countries[person % 8]}, "person_id": str(person), "prompt": "Which?",
         "chosen": wants[countries[person % 8]][0], "rejected": wants[countries[person % 8]][1]}
        for person in range(320)
    ]  # fmt: skip
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    folder, _, _ = make_run(
        tmp_path / "run", tiny_llama, tiny_encoder, {}, source=tmp_path / "pairs.jsonl", data={"heldout_fraction": 0.0}
    )
    asked = run_subject(folder, overrides=["evaluation.min_answers=5"])
    learn_pairs(asked)
    split = evaluate(asked, tmp_path / "report").splits["test"]

    rows = list(asked.data.splits["test"])
    profiles = [row["profile"] for row in rows]
    told = swap_profiles([""] * len(rows), [row["group"] for row in rows], profiles)
    country = {row["profile"]: row["group"] for row in rows}
    expected = np.mean(
        [wants[country[own]] == wants[country[other]] for own, other in zip(profiles, told, strict=True)]
    )
    assert split.rows["trained"].accuracy == 1
    assert split.rows["swapped"].accuracy == pytest.approx(expected, abs=1e-6)
    assert expected <= 0.5
    assert split.differences["swapped"].interval["accuracy"][0] > 0
    assert split.rows["trained"].margin > 0.1
    assert split.rows["before"].likelihood == pytest.approx(0.5, abs=0.1)


def learn_pairs(asked: Subject, steps: int = 60) -> None:
    """Fit the adapters to one training pair of each profile: a logistic loss of the implicit rewards."""
    by_profile = {row["profile"]: row for row in asked.data.splits["train"]}
    pairs = [encode_pair(row, asked.renderer, asked.data.sentences) for row in by_profile.values()]
    batch = collate([answer for pair in pairs for answer in pair], 0)

    def logps() -> torch.Tensor:
        logits = asked.model(**batch.inputs, profile_embeddings=asked.embeddings_NP[batch.profile_rows_N]).logits
        of_token = batch.targets.log_probabilities(logits)
        return torch.zeros(2 * len(pairs)).index_add(0, batch.targets.example_L, of_token)

    with torch.no_grad(), asked.untrained():
        reference = logps()
    optimizer = torch.optim.AdamW([parameter for _, parameter in asked.model.adapter_parameters()], lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        rewards = logps() - reference
        (-torch.nn.functional.logsigmoid(rewards[0::2] - rewards[1::2]).mean()).backward()
        optimizer.step()


def test_the_command_evaluates_a_run_on_preferences_of_somebody_else(run_folder, tmp_path, launch, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    chosen = write_preferences(tmp_path / "others.jsonl", people=60, hidden=0)
    arguments = ["--run", str(run_folder), "--data", str(chosen), "--set", *SETTINGS, "data.test_fraction=0.5"]
    done = launch("evaluate", *arguments, "--out", "report")
    assert done.code == 0, done.err
    assert "profiles swapped" in " ".join(done.out.split())
    assert "preferences.png" in done.out
    assert f"open {Path('report') / 'report.html'}" in done.out
    assert read_report(tmp_path / "report").kind == "preference"
    lines = chosen.read_text().splitlines()
    bad = json.loads(lines[2])
    lines[2] = json.dumps(bad | {"rejected": bad["chosen"]})
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    refused = launch("evaluate", "--run", str(run_folder), "--data", "bad.jsonl", "--out", "other")
    assert refused.code == 2
    assert "bad.jsonl:3: chosen and rejected are the same answer" in refused.err.splitlines()[-1]
    assert not (tmp_path / "other").exists()
    wrong = launch("evaluate", *arguments, "--out", "third", "--generate", "3")
    assert wrong.code == 2
    assert "--generate needs data of kind chat, but this is preference" in wrong.err.splitlines()[-1]


@pytest.mark.multirank
def test_several_ranks_report_what_one_process_does(tmp_path, tiny_llama, tiny_encoder, preferences) -> None:
    parallel = {"deepspeed_config": "zero2_sharded_backbone", "ep_size": 2}
    settings = {"min_answers": 5, "bootstrap": 20}
    place = tmp_path / "runs" / "ranks"
    folder = run_with_start(place, tiny_llama, tiny_encoder, preferences, parallel=parallel, evaluation=settings)
    found = {}
    for world in (1, 2):
        out = tmp_path / str(world)
        ranks = run_ranks(world, ["launchers/evaluate.py", "--run", str(folder), "--out", str(out)])
        assert [code for code, _ in ranks] == [0] * world, ranks[0][1][-3000:]
        found[world] = read_report(out).splits
    for name, split in found[1].items():
        assert "start" in split.rows
        for contender, scores in split.rows.items():
            other = found[2][name].rows[contender]
            assert other.accuracy == scores.accuracy
            assert other.margin == pytest.approx(scores.margin, abs=1e-5)


def test_a_report_on_choices_has_the_start_policy_too(tmp_path, tiny_llama, tiny_encoder) -> None:
    folder = run_with_start(tmp_path / "run", tiny_llama, tiny_encoder, OPINIONS, evaluation={"min_answers": 2})
    split = evaluate_run(folder).splits["test"]
    assert [name for name in split.rows if name not in ("collapse", "oracle", "nearest")] == [
        "before", "start", "trained", "swapped",
    ]  # fmt: skip
    assert split.rows["start"].entropy not in (split.rows["before"].entropy, split.rows["trained"].entropy)
    assert split.differences["start"].interval["emd"] is not None
    assert "Start policy: the model that this run began from." in (folder / "evaluation" / "report.md").read_text()


def test_a_start_policy_that_was_changed_is_refused(tmp_path, tiny_llama, tiny_encoder, preferences) -> None:
    folder = run_with_start(tmp_path / "run", tiny_llama, tiny_encoder, preferences, evaluation={"min_answers": 5})
    file = folder / "start" / "shared.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="start is damaged"):
        evaluate_run(folder)


def test_an_export_is_judged_as_the_run_it_was_made_of(run_folder, asked, report, tmp_path) -> None:
    evaluate(asked, Run(run_folder).report_folder)
    write_hf(read_run(run_folder), tmp_path / "exported")
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "(preferences)" in card
    assert f"| **trained** | {report.splits['test'].rows['trained'].accuracy:.3f} [" in card
    opened = open_export(tmp_path / "exported", overrides=[*SETTINGS, "model.dtype=float32"])
    split = evaluate(subject(opened, Run(run_folder).data_folder), tmp_path / "report").splits["test"]
    expected = report.splits["test"]
    # An export does not know what its run started from.
    assert list(split.rows) == ["before", "trained", "swapped"]
    for name, scores in split.rows.items():
        assert scores.accuracy == expected.rows[name].accuracy
        assert scores.margin == pytest.approx(expected.rows[name].margin, abs=1e-4)
        assert scores.accuracy_start is None


@pytest.mark.parametrize("method", ["lora", "cuma"])
def test_an_adapter_of_peft_is_judged_before_and_after(tmp_path, tiny_llama, tiny_encoder, preferences, method) -> None:
    lora = {"method": "lora", "num_experts": 1, "top_k": 1, "balance_weight": 0.0} if method == "lora" else {}
    settings = {"min_answers": 5, "bootstrap": 20}
    folder, _, _ = make_run(tmp_path / "run", tiny_llama, tiny_encoder, lora, source=preferences, evaluation=settings)
    write_lora(folder, [] if lora else [{"country": "Chile", "age": "old"}], tmp_path / "lora", prompts=4)
    opened = open_peft(tmp_path / "lora" / "profile-1", overrides=["model.dtype=float32", "evaluation.min_answers=5"])
    rows = evaluate(subject(opened, Run(folder).data_folder), tmp_path / "report").splits["test"].rows
    assert list(rows) == ["before", "trained"]
    assert rows["trained"].accuracy != 0.5
    if method == "lora":
        own = evaluate_run(folder).splits["test"].rows
        assert list(own) == ["before", "trained"]
        assert rows["trained"].accuracy == own["trained"].accuracy
        assert rows["trained"].margin == pytest.approx(own["trained"].margin, abs=1e-4)
