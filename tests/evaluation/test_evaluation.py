"""Option probabilities of a model, and the report of a run folder, with a tiny random backbone."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from rich.console import Console
from run_folder import content, lively
from safetensors.torch import save_file

from cuma_ds.adapters import CumaConfig, CumaModel, inject_adapters
from cuma_ds.config import DataSection, ModelSection, RunConfig
from cuma_ds.data import prepare
from cuma_ds.data.batch import EncodedExample, encode_example
from cuma_ds.data.prepared import PreparedData
from cuma_ds.data.rendering import Renderer
from cuma_ds.errors import CheckpointError, ConfigError, CumaError, DataError
from cuma_ds.evaluation.chat import chat_losses
from cuma_ds.evaluation.choice import predict_choices
from cuma_ds.evaluation.examples import ChoiceExamples
from cuma_ds.evaluation.report.markdown import markdown
from cuma_ds.evaluation.report.model import Cell, ChoiceReport
from cuma_ds.evaluation.report.pictures import _mean_answer, expert_picture
from cuma_ds.evaluation.report.plots import (
    discriminating_routers,
    group_tree,
    plot_distributions,
    plot_expert_use,
    plot_group_emd,
)
from cuma_ds.evaluation.report.tables import terminal_tables
from cuma_ds.evaluation.run import evaluate_run
from cuma_ds.inference.forward import forward_batches
from cuma_ds.inference.open import load_trained
from cuma_ds.parallel.backbone import load_backbone, load_tokenizer
from cuma_ds.parallel.stored import read_adapters
from cuma_ds.profiles import ProfileEncoder, ProfileTable
from cuma_ds.recipe import load_config

ADAPTERS = CumaConfig(num_experts=4, top_k=2, lora_r=2, target_modules=("q_proj", "v_proj"))
COUNTRIES = ["Chile", "Ghana", "Iran", "Japan", "Kenya", "Norway", "Peru", "Spain"]
HIDDEN = "Tuvalu"
METRICS = {
    "emd", "total_variation", "similarity", "log_score", "emd_worst_group", "recovered", "emd_questions",
    "questions_median", "questions_within", "questions_auc", "emd_argmax", "argmax_median", "argmax_within",
    "argmax_auc", "accuracy", "macro_f1", "macro_f1_questions", "group_accuracy", "inequity", "entropy",
    "calibration_error",
}  # fmt: skip


@pytest.fixture(scope="module")
def section(tiny_llama: Path) -> ModelSection:
    return ModelSection(path=str(tiny_llama), dtype="float32")


@pytest.fixture(scope="module")
def model(section: ModelSection) -> CumaModel:
    return lively(inject_adapters(load_backbone(section), ADAPTERS.model_copy(update={"profile_dim": 16})))


@pytest.fixture(scope="module")
def renderer(section: ModelSection) -> Renderer:
    return Renderer(load_tokenizer(section), max_length=256)


@pytest.fixture(scope="module")
def embeddings() -> torch.Tensor:
    return torch.randn(6, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def examples(renderer: Renderer) -> list[EncodedExample]:
    asked = [
        ("Short?", ["yes", "no"]),
        ("A somewhat longer question, is it?", ["a", "b", "c", "d"]),
        ("Middle one?", ["x", "y", "z"]),
    ]
    return [
        encode_example(
            {"profile": profile, "question": question, "options": options, "counts": [1] * len(options)},
            renderer,
            [""] * 6,
            DataSection(),
        )
        for question, options in asked
        for profile in range(6)
    ]


@torch.no_grad()
def one_by_one(model: CumaModel, example: EncodedExample, profile: torch.Tensor | None) -> np.ndarray:
    """The probabilities of an example without padding, batching or logits_to_keep."""
    extra = {} if profile is None else {"profile_embeddings": profile[None]}
    logits = model(
        input_ids=torch.tensor([example.input_ids]), attention_mask=torch.ones(1, len(example.input_ids)), **extra
    ).logits[0, -1]
    weights = torch.exp(logits[example.target_token].double())
    return (weights / weights.sum()).numpy()


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_probabilities_equal_single_unpadded_forwards_at_any_batch_size(
    model, examples, embeddings, batch_size
) -> None:
    found = predict_choices(model, examples, embeddings, batch_size, pad_id=0)
    for example, probabilities in zip(examples, found.probabilities, strict=True):
        np.testing.assert_allclose(probabilities, one_by_one(model, example, embeddings[example.profile]), atol=1e-5)


def test_the_padding_token_does_not_matter(model, examples, embeddings) -> None:
    a = predict_choices(model, examples, embeddings, 8, pad_id=0).probabilities
    b = predict_choices(model, examples, embeddings, 8, pad_id=77).probabilities
    for p, q in zip(a, b, strict=True):
        np.testing.assert_allclose(p, q, atol=1e-6)


def test_probabilities_sum_to_one_over_each_questions_own_options(model, examples, embeddings) -> None:
    found = predict_choices(model, examples, embeddings, 4, pad_id=0).probabilities
    assert [len(p) for p in found] == [2] * 6 + [4] * 6 + [3] * 6
    np.testing.assert_allclose([p.sum() for p in found], 1, atol=1e-6)


@torch.no_grad()
def test_letter_mass_is_the_share_of_the_whole_vocabulary(model, examples, embeddings) -> None:
    found = predict_choices(model, examples, embeddings, 5, pad_id=0)
    assert found.letter_mass_M.dtype == np.float64
    for example, mass in zip(examples, found.letter_mass_M, strict=True):
        ids = torch.tensor([example.input_ids])
        logits = model(input_ids=ids, profile_embeddings=embeddings[example.profile][None]).logits[0, -1]
        assert mass == pytest.approx(float(torch.softmax(logits.double(), dim=0)[example.target_token].sum()), abs=1e-6)
    assert 0 < found.letter_mass_M.min() < found.letter_mass_M.max() < 1


def test_profiles_change_the_answers_and_swapping_moves_them_along(model, examples, embeddings) -> None:
    own = predict_choices(model, examples, embeddings, 4, pad_id=0).probabilities
    turned = [(example.profile + 1) % 6 for example in examples]
    swapped = predict_choices(model, examples, embeddings, 4, pad_id=0, profiles=turned).probabilities
    assert np.abs(own[0] - own[1]).max() > 1e-3
    for index in range(len(examples)):
        np.testing.assert_allclose(swapped[index], own[index // 6 * 6 + turned[index]], atol=1e-6)


def test_the_bare_backbone_is_asked_once_per_prompt_and_needs_no_profiles(model, examples, section) -> None:
    rows = []
    with model.adapters_disabled():
        hook = model.register_forward_pre_hook(
            lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
        )
        found = predict_choices(model, examples, None, 2, pad_id=0).probabilities
        hook.remove()
    assert sum(rows) == 3
    backbone = load_backbone(section)
    for example, probabilities in zip(examples, found, strict=True):
        np.testing.assert_allclose(probabilities, one_by_one(backbone, example, None), atol=1e-5)


def test_routing_is_recorded_per_example_whatever_the_batch(model, examples, embeddings) -> None:
    many = predict_choices(model, examples, embeddings, 7, pad_id=0, record=True)
    assert many.gates_MRE.shape == (18, len(model.router_names), 4)
    assert many.router_names == tuple(model.router_names)
    np.testing.assert_allclose(many.gates_MRE.sum(-1), 1, atol=1e-5)
    for index in (0, 8, 17):
        alone = predict_choices(model, examples[index : index + 1], embeddings, 1, pad_id=0, record=True)
        np.testing.assert_allclose(many.gates_MRE[index], alone.gates_MRE[0], atol=1e-5)


def test_without_routers_there_is_no_routing(section, examples) -> None:
    lora = lively(inject_adapters(load_backbone(section), CumaConfig(method="lora", lora_r=2)))
    found = predict_choices(lora, examples, None, 4, pad_id=0, record=True)
    assert found.gates_MRE is None
    assert found.router_names == ()


def test_no_examples_give_no_predictions(model, embeddings) -> None:
    assert predict_choices(model, [], embeddings, 4, pad_id=0, record=True).probabilities == []


def test_batches_are_sorted_by_length_and_progress_ends_at_the_end(model, examples, embeddings) -> None:
    told: list[tuple[int, int]] = []
    seen, widths = [], []
    for indices, batch, logits, gates in forward_batches(
        model, examples, embeddings, 4, 0, progress=lambda *at: told.append(at)
    ):
        seen += indices
        widths.append(batch.input_ids_BS.shape[1])
        assert logits.shape[:2] == (len(indices), len({len(examples[index].input_ids) for index in indices}))
        assert logits.dtype == torch.float32
        assert gates is None
    assert sorted(seen) == list(range(18))
    assert widths == sorted(widths, reverse=True)
    assert told == [(4, 18), (8, 18), (12, 18), (16, 18), (18, 18)]


def test_chat_loss_is_the_mean_over_assistant_tokens_of_single_forwards(model, renderer, embeddings) -> None:
    talks = [["Hi", "Hello!"], ["How are you today?", "Fine.", "Sure?", "Yes, quite sure."]]
    rows = [
        {
            "profile": p,
            "messages": [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(talk)],
        }
        for p, talk in enumerate(talks)
    ]
    encoded = [encode_example(row, renderer, [""] * 2, DataSection()) for row in rows]
    found = chat_losses(model, encoded, embeddings, 2, pad_id=0, record=True)
    nll, tokens = 0.0, 0
    for index, example in enumerate(encoded):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([example.input_ids]), profile_embeddings=embeddings[[index]]).logits[
                0
            ]
        own = sum(
            -torch.log_softmax(logits[p].double(), 0)[example.input_ids[p + 1]].item() for p in example.target_position
        )
        assert found.nll[index] == pytest.approx(own, rel=1e-4)
        nll, tokens = nll + own, tokens + len(example.target_position)
    assert found.loss == pytest.approx(nll / tokens, rel=1e-4)
    assert found.gates_MRE.shape == (2, len(model.router_names), 4)
    swapped = chat_losses(model, encoded, embeddings, 1, pad_id=0, profiles=[1, 0])
    assert swapped.loss != pytest.approx(found.loss, rel=1e-4)


# --- a whole run folder


def write_answers(path: Path) -> None:
    rng = np.random.default_rng(0)
    lines = []
    for number, country in enumerate([*COUNTRIES, HIDDEN]):
        taste = rng.dirichlet([0.6] * 4), rng.dirichlet([0.6] * 3)
        for person in range(80 if country != HIDDEN else 20):
            for question, options in enumerate((["all", "many", "few", "none"], ["low", "mid", "high"])):
                lines.append(
                    {
                        "profile": {"country": country},
                        "question": f"Question {question}?",
                        "question_id": f"q{question}",
                        "options": options,
                        "answer": int(rng.choice(len(options), p=taste[question])),
                        "person_id": f"{number}-{person}",
                    }
                )
    path.write_text("\n".join(map(json.dumps, lines)))


def make_run(folder: Path, llama: Path, encoder: Path, raw: Path, steps: tuple[int, ...] = (5,), **adapters) -> Path:
    """A run folder as training leaves it, with random adapters."""
    config = RunConfig.model_validate(
        {
            "run": {"name": folder.name, "output_dir": str(folder.parent)},
            "model": {"path": str(llama), "dtype": "float32"},
            "profiles": {"encoder": str(encoder)},
            "adapters": ADAPTERS.model_dump() | adapters,
            "data": {"source": "jsonl", "path": str(raw), "heldout_fraction": 0.25, "split_seed": 3},
            "evaluation": {"min_answers": 15},
        }
    )
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.to_yaml())
    data = prepare(config.data, "generic").save(folder / "data")
    table = ProfileTable.build(data.sentences, ProfileEncoder(str(encoder)), folder.parent / "cache")
    table.save(folder / "profiles.safetensors")
    width = 16 if config.adapters.uses_profiles else 0
    for step in steps:
        model = lively(
            inject_adapters(load_backbone(config.model), config.adapters.model_copy(update={"profile_dim": width})),
            seed=step,
        )
        if width:
            model.set_profile_standardisation(table.embeddings, 3.0)
        checkpoint = folder / "checkpoints" / f"step-{step}"
        checkpoint.mkdir(parents=True)
        state = {f"param/{name}": tensor.clone().contiguous() for name, tensor in model.adapter_state().items()}
        save_file(state, checkpoint / "shared.safetensors")
        files = {"shared.safetensors": (checkpoint / "shared.safetensors").stat().st_size}
        (checkpoint / "state.json").write_text(
            json.dumps({"format_version": 1, "step": step, "fingerprint": "x", "files": files})
        )
    return folder


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, tiny_llama, tiny_encoder) -> Path:
    raw = tmp_path_factory.mktemp("raw") / "answers.jsonl"
    write_answers(raw)
    return make_run(tmp_path_factory.mktemp("runs") / "survey", tiny_llama, tiny_encoder, raw, steps=(5, 9))


@pytest.fixture(scope="module")
def report(run_dir):
    return evaluate_run(run_dir)


def test_a_report_has_every_row_for_people_held_out_and_for_groups_held_out(report) -> None:
    splits = content(report)["splits"]
    assert list(splits["test"]["rows"]) == ["collapse", "oracle", "before", "trained", "swapped"]
    assert list(splits["heldout"]["rows"]) == ["collapse", "nearest", "before", "trained", "swapped"]
    for split in splits.values():
        for row in split["rows"].values():
            assert set(row) == METRICS | {"interval"}
            for metric in METRICS - {"recovered", "entropy", "log_score"}:
                low, high = row["interval"][metric]
                assert low <= row[metric] <= high
                assert 0 <= row[metric] <= 1
    assert splits["test"]["rows"]["collapse"]["recovered"] == 0
    assert splits["test"]["rows"]["oracle"]["recovered"] == 1
    assert splits["heldout"]["rows"]["trained"]["recovered"] is None


def test_recovered_follows_from_the_emds_beside_it(report) -> None:
    split = content(report)["splits"]["test"]
    for part in (split, *split["questions"].values()):
        rows = part["rows"]
        span = rows["collapse"]["emd"] - rows["oracle"]["emd"]
        for row in rows.values():
            assert row["recovered"] == pytest.approx((rows["collapse"]["emd"] - row["emd"]) / span, abs=1e-3)


def test_numbers_follow_from_the_cells_beside_them(report) -> None:
    for split in content(report)["splits"].values():
        weights = [cell["answers"] for cell in split["cells"]]
        assert (
            sum(weights)
            == split["compared"]["answers"]
            == sum(q["compared"]["answers"] for q in split["questions"].values())
        )
        assert split["answers"] == sum(weights) + split["left_out"]["answers"]
        for row, values in split["rows"].items():
            distances = []
            for cell in split["cells"]:
                p, q = np.cumsum(cell["predicted"][row]), np.cumsum(cell["observed"])
                distances.append(np.abs(p - q).sum() / (len(p) - 1))
            assert values["emd"] == pytest.approx(np.average(distances, weights=weights), abs=1e-5)


def test_predictions_in_the_report_are_the_trained_models(report, run_dir) -> None:
    config, data = load_config(run_dir / "config.yaml"), PreparedData.load(run_dir / "data")
    table = ProfileTable.load(run_dir / "profiles.safetensors")
    trained = load_trained(config, read_adapters(run_dir / "checkpoints" / "step-9"), table)
    renderer = Renderer(load_tokenizer(config.model), config.data.max_length)
    cells = {(cell["question_id"], cell["group"]): cell for cell in content(report)["splits"]["test"]["cells"]}
    for row in data.splits["test"]:
        cell = cells.get((row["question_id"], row["group"]))
        if cell is not None:
            example = encode_example(row, renderer, data.sentences, config.data)
            expected = one_by_one(trained, example, table.embeddings[row["profile"]])
            np.testing.assert_allclose(cell["predicted"]["trained"], expected, atol=1e-4)
            np.testing.assert_allclose(cell["observed"], np.array(row["counts"]) / sum(row["counts"]), atol=1e-5)


def test_the_report_says_how_much_probability_the_option_letters_have(report, run_dir) -> None:
    config, data = load_config(run_dir / "config.yaml"), PreparedData.load(run_dir / "data")
    table = ProfileTable.load(run_dir / "profiles.safetensors")
    trained = load_trained(config, read_adapters(run_dir / "checkpoints" / "step-9"), table)
    renderer = Renderer(load_tokenizer(config.model), config.data.max_length)
    masses, answers, by_cell = [], [], {}
    for row in data.splits["test"]:
        example = encode_example(row, renderer, data.sentences, config.data)
        with torch.no_grad():
            logits = trained(
                input_ids=torch.tensor([example.input_ids]), profile_embeddings=table.embeddings[[row["profile"]]]
            ).logits
        masses.append(float(logits[0, -1].double().softmax(0)[example.target_token].sum()))
        answers.append(sum(row["counts"]))
        by_cell[row["question_id"], row["group"]] = masses[-1]
    split = content(report)["splits"]["test"]
    found = split["letter_mass"]
    assert list(found) == ["before", "trained", "swapped"]
    assert found["trained"]["mean"] == pytest.approx(np.average(masses, weights=answers), abs=1e-5)
    lowest = min(((cell["question_id"], cell["group"]) for cell in split["cells"]), key=lambda cell: by_cell[cell])
    assert (found["trained"]["lowest"]["question_id"], found["trained"]["lowest"]["group"]) == lowest
    assert found["trained"]["lowest"]["mean"] == pytest.approx(by_cell[lowest], abs=1e-5)
    text = markdown(report, {})
    assert (
        f"trained {found['trained']['mean']:.3f} (lowest {found['trained']['lowest']['mean']:.3f}, {lowest[1]})" in text
    )
    # A random model says anything.
    assert found["trained"]["mean"] < 0.5
    assert "**Warning: the option letters together have a probability of" in text


def test_a_model_that_answers_with_letters_is_not_warned_about(report) -> None:
    report = report.model_copy(deep=True)
    for split in report.splits.values():
        split.letter_mass["trained"].mean = 0.5
    assert "Warning" not in markdown(report, {})


def test_questions_without_an_order_are_judged_by_total_variation(tmp_path, tiny_llama, tiny_encoder) -> None:
    """The options of one question in two orders: what does not depend on the model stays the same."""
    write_answers(tmp_path / "answers.jsonl")
    records = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    rows = {}
    for name, order in (("one", [0, 1, 2]), ("other", [2, 0, 1])):
        for record in records:
            if record["question_id"] == "q1":
                record["scale"] = "nominal"
                record["options"] = [["low", "mid", "high"][k] for k in order]
        told = [r | {"answer": order.index(r["answer"])} if r["question_id"] == "q1" else r for r in records]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, told)))
        report = evaluate_run(make_run(tmp_path / name / "run", tiny_llama, tiny_encoder, tmp_path / f"{name}.jsonl"))
        rows[name] = content(report)["splits"]["test"]["rows"]
    split = content(report)["splits"]["test"]
    assert [split["distance"], *(part["distance"] for part in split["questions"].values())] == [
        "EMD and TV",
        "EMD",
        "TV",
    ]
    for row in ("collapse", "oracle"):
        for metric in METRICS - {"macro_f1"}:  # over the letters of all questions
            assert rows["one"][row][metric] == pytest.approx(rows["other"][row][metric], abs=1e-6), metric
    for cell in split["cells"]:
        for row, value in cell["emd"].items():
            gap = np.subtract(cell["predicted"][row], cell["observed"])
            steps = np.abs(np.cumsum(gap)).sum() / (len(gap) - 1)
            assert value == pytest.approx(np.abs(gap).sum() / 2 if cell["question_id"] == "q1" else steps, abs=1e-5)
    text = (tmp_path / "other" / "run" / "evaluation" / "report.md").read_text()
    assert "| | EMD and TV | recovered | EMD and TV, questions | EMD and TV, argmax |" in text
    assert "| | TV | recovered | accuracy |" in text
    assert "both distances go into one mean" in text
    assert "![EMD and TV of each group, before and after training, worst first.](emd-by-group.png)" in text


def test_held_out_groups_are_those_of_the_heldout_split(report, run_dir) -> None:
    heldout = set(json.loads((run_dir / "data" / "manifest.json").read_text())["heldout_groups"])
    groups = {name: {cell["group"] for cell in split["cells"]} for name, split in content(report)["splits"].items()}
    assert heldout
    assert groups["heldout"] == heldout - {HIDDEN}
    assert groups["test"] == set(COUNTRIES) - heldout


def test_small_groups_are_counted_and_named_nowhere(report, run_dir) -> None:
    assert content(report)["splits"]["test"]["left_out"]["cells"] == 2
    assert 0 < content(report)["splits"]["test"]["left_out"]["answers"] < 2 * 15
    for file in (run_dir / "evaluation").iterdir():
        assert HIDDEN.encode() not in file.read_bytes()
        assert HIDDEN not in file.name
    assert "Left out there as too small: 2" in (run_dir / "evaluation" / "report.md").read_text()


def test_raising_min_answers_hides_more(run_dir) -> None:
    strict = evaluate_run(run_dir, overrides=["evaluation.min_answers=100000"])
    split = content(strict)["splits"]["test"]
    assert split["cells"] == []
    assert split["rows"]["trained"]["emd"] is None
    assert strict.pictures == []
    assert not any(country in (run_dir / "evaluation" / "report.md").read_text() for country in COUNTRIES)


def test_files_of_a_report_are_there_and_pictures_are_pictures(run_dir) -> None:
    report = evaluate_run(run_dir)
    folder = run_dir / "evaluation"
    assert json.loads((folder / "report.json").read_text()) == content(report)
    assert set(report.pictures) == {
        "distributions-1.png", "distributions-2.png", "emd-by-group.png", "reliability.png", "subgroups.png",
        "experts-by-group.png",
        "expert-load.png", "information.png", "cultural-map.png",
    }  # fmt: skip
    for name in report.pictures:
        picture = imread(folder / name)
        assert min(picture.shape[:2]) > 200
        assert picture[..., :3].std() > 0.02
    assert not list(folder.glob(".*"))


def test_markdown_holds_the_numbers_of_the_summary_and_links_that_exist(run_dir) -> None:
    report = evaluate_run(run_dir)
    text = (run_dir / "evaluation" / "report.md").read_text()
    trained = content(report)["splits"]["test"]["rows"]["trained"]
    low, high = trained["interval"]["emd"]
    assert f"| **trained** | {trained['emd']:.4f} [{low:.4f}, {high:.4f}] | {trained['recovered']:.2f}" in text
    spread = " | ".join(
        f"{trained[key]:.3f}" for key in ("macro_f1_questions", "group_accuracy", "inequity", "calibration_error")
    )
    assert f"| {spread} |" in text
    assert "zero-shot" in text
    assert "Question 0?" in text
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert sorted(links) == sorted(report.pictures)
    assert all((run_dir / "evaluation" / link).is_file() for link in links)


def test_terminal_tables_show_every_row(report) -> None:
    sink = io.StringIO()
    for table in terminal_tables(report):
        Console(width=160, file=sink).print(table)
    assert sink.getvalue().count("profiles swapped") == 2
    assert "oracle" in sink.getvalue()


def test_a_step_can_be_chosen_and_the_newest_is_the_default(report, run_dir) -> None:
    assert content(report)["checkpoint"] == "step-9"
    earlier = evaluate_run(run_dir, step=5)
    assert content(earlier)["checkpoint"] == "step-5"
    assert content(earlier)["splits"]["test"]["rows"]["before"] == content(report)["splits"]["test"]["rows"]["before"]
    assert content(earlier)["splits"]["test"]["rows"]["trained"] != content(report)["splits"]["test"]["rows"]["trained"]


def test_batch_size_does_not_change_the_report(report, run_dir) -> None:
    other = evaluate_run(run_dir, overrides=["evaluation.batch_size=3"])
    for name, row in content(report)["splits"]["test"]["rows"].items():
        for metric in METRICS:
            assert content(other)["splits"]["test"]["rows"][name][metric] == pytest.approx(row[metric], abs=1e-4)


def test_progress_names_what_runs(run_dir) -> None:
    told: dict[str, tuple[int, int]] = {}
    evaluate_run(run_dir, progress=lambda what, done, total: told.update({what: (done, total)}))
    assert list(told) == [
        f"{split}: {what}"
        for split in ("test", "heldout")
        for what in ("before training", "trained", "profiles swapped")
    ]
    assert all(done == total for done, total in told.values())


def test_a_method_without_profiles_has_nothing_to_swap(tmp_path, run_dir, tiny_llama, tiny_encoder) -> None:
    write_answers(tmp_path / "answers.jsonl")
    lora = {"method": "lora", "num_experts": 1, "top_k": 1, "balance_weight": 0.0}
    folder = make_run(tmp_path / "runs" / "lora", tiny_llama, tiny_encoder, tmp_path / "answers.jsonl", **lora)
    report = evaluate_run(folder)
    assert list(content(report)["splits"]["test"]["rows"]) == ["collapse", "oracle", "before", "trained"]
    assert "experts-by-group.png" not in report.pictures
    assert "swapped" not in (folder / "evaluation" / "report.md").read_text()


def test_chat_runs_report_loss_and_perplexity(tmp_path, tiny_llama, tiny_encoder) -> None:
    lines = [
        {
            "profile": {"country": COUNTRIES[number % 4]},
            "person_id": str(number),
            "messages": [
                {"role": "user", "content": f"Say {number}"},
                {"role": "assistant", "content": f"{number} it is."},
            ],
        }
        for number in range(320)
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, lines)))
    report = evaluate_run(make_run(tmp_path / "runs" / "chat", tiny_llama, tiny_encoder, tmp_path / "chats.jsonl"))
    assert content(report)["kind"] == "chat"
    # The only country held out has nobody to swap profiles with.
    assert [list(split["rows"]) for split in content(report)["splits"].values()] == [
        ["before", "trained", "swapped"],
        ["before", "trained"],
    ]
    for split in content(report)["splits"].values():
        for row in split["rows"].values():
            assert row["perplexity"] == pytest.approx(np.exp(row["loss"]), rel=1e-4)
            assert row["interval"]["loss"][0] < row["loss"] < row["interval"]["loss"][1]
    # A random backbone knows nothing about 128 tokens.
    assert content(report)["splits"]["test"]["rows"]["before"]["loss"] > 2
    assert set(report.pictures) == {"experts-by-group.png", "expert-load.png", "information.png", "cultural-map.png"}
    assert "perplexity" in (tmp_path / "runs" / "chat" / "evaluation" / "report.md").read_text()


# --- what can go wrong


def test_no_run_folder(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="no run folder"):
        evaluate_run(tmp_path)


def test_no_such_step(run_dir) -> None:
    with pytest.raises(CheckpointError, match=r"step 7.* 5, 9"):
        evaluate_run(run_dir, step=7)


def test_profiles_of_another_run(tmp_path, run_dir) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    table = ProfileTable.load(copy / "profiles.safetensors")
    replace(table, sentences=table.sentences[::-1]).save(copy / "profiles.safetensors")
    with pytest.raises(DataError, match="different profiles"):
        evaluate_run(copy)
    (copy / "profiles.safetensors").unlink()
    with pytest.raises(CumaError, match=r"profiles\.safetensors"):
        evaluate_run(copy)


def test_an_unknown_override(run_dir) -> None:
    with pytest.raises(ConfigError, match="min_answers"):
        evaluate_run(run_dir, overrides=["evaluation.min_answer=3"])


def test_another_shape_of_adapters_than_the_checkpoint(run_dir) -> None:
    with pytest.raises(CumaError, match=r"shape|lacks"):
        evaluate_run(run_dir, overrides=["adapters.lora_r=4"])


def launch(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[2]
    command = [sys.executable, str(root / "launchers" / "evaluate.py"), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env={**os.environ, "PYTHONPATH": str(root)}
    )


@pytest.mark.parametrize(
    ("arguments", "code", "message"), [(["--run", "nowhere"], 2, "no run folder"), ([], 2, "--run")]
)
def test_the_launcher_says_what_is_wrong_in_one_line(
    arguments: list[str], code: int, message: str, tmp_path: Path
) -> None:
    done = launch(arguments, tmp_path)
    assert done.returncode == code
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_the_launcher_prints_the_table_and_where_the_pictures_are(run_dir, tmp_path) -> None:
    done = launch(["--run", str(run_dir), "--batch-size", "32", "--set", "evaluation.min_answers=16"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "one global distribution" in done.stdout
    assert f"open {run_dir / 'evaluation' / 'report.html'}" in done.stdout
    assert "experts-by-group.png" in done.stdout
    assert json.loads((run_dir / "evaluation" / "report.json").read_text())["min_answers"] == 16


# --- pictures


def test_groups_with_equal_routing_stand_together() -> None:
    from scipy.cluster.hierarchy import leaves_list

    rng = np.random.default_rng(0)
    kinds = [0, 1, 2] * 4
    gates = np.eye(3)[kinds][:, None, :].repeat(5, axis=1) + 0.01 * rng.random((12, 5, 3))
    order = [kinds[leaf] for leaf in leaves_list(group_tree(gates))]
    assert sum(a != b for a, b in itertools.pairwise(order)) == 2


def test_the_routers_shown_are_those_that_differ_between_groups() -> None:
    gates = np.full((6, 5, 4), 0.25)
    gates[:3, 3], gates[3:, 3] = [1, 0, 0, 0], [0, 1, 0, 0]
    gates[:3, 1], gates[3:, 1] = [0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]
    assert discriminating_routers(gates, 2) == [1, 3]
    assert discriminating_routers(gates, 1) == [3]


@pytest.mark.parametrize("groups", [1, 2, 90])
def test_pictures_of_any_number_of_groups(tmp_path: Path, groups: int) -> None:
    rng = np.random.default_rng(0)
    names = [f"A rather long name of group number ${k}" for k in range(groups)]
    shares = rng.dirichlet(np.ones(5), size=groups)
    cells = [
        Cell(
            question_id="q",
            group=name,
            answers=30,
            observed=list(row),
            predicted={"trained": list(row), "collapse": list(shares[0])},
            emd={},
        )
        for name, row in zip(names[:8], shares, strict=False)
    ]
    plot_distributions(tmp_path / "d.png", "Is it $5 or \\alpha? " * 9, ["one $", *"bcde"], cells, "trained")
    plot_group_emd(tmp_path / "e.png", names, *rng.random((3, groups)))
    plot_expert_use(
        tmp_path / "x.png", names, rng.dirichlet(np.ones(4), size=(groups, 2)), ["model.layers.0.q_proj", "odd"]
    )
    for name in "dex":
        assert min(imread(tmp_path / f"{name}.png").shape[:2]) > 150


def test_experts_are_compared_on_questions_that_everybody_answered(tmp_path: Path, monkeypatch) -> None:
    drawn = SimpleNamespace()
    monkeypatch.setattr(
        "cuma_ds.evaluation.report.pictures.plot_expert_use",
        lambda path, groups, gates, names: vars(drawn).update(groups=groups, gates=gates),
    )
    gates = np.arange(10, dtype=np.float32).reshape(5, 1, 2)
    expert_picture(tmp_path, ["r"], ["q1", "q1", "q2", "q1", "q1"], ["a", "b", "a", "c", "c"], [1, 10, 9, 1, 3], gates)
    assert list(drawn.groups) == ["a", "b", "c"]
    np.testing.assert_allclose(drawn.gates[:, 0], [gates[0, 0], gates[1, 0], (gates[3, 0] + 3 * gates[4, 0]) / 4])


def test_a_map_shows_the_mean_of_answers_that_have_an_order() -> None:
    names = ["q1", "q1", "q2", "q2"]
    split = {
        "question_id": names,
        "question": names,
        "options": [["a", "b", "c"]] * 4,
        "group": ["x", "y"] * 2,
        "profile": [0, 1] * 2,
    }
    split["counts"] = [[9, 0, 0], [0, 9, 0], [2, 0, 2], [0, 0, 4]]
    title, values = _mean_answer(ChoiceExamples.of({**split, "scale": ["nominal"] * 2 + ["ordinal"] * 2}), {0: 0, 1: 1})
    assert title == "mean answer, from “a” to “c”"
    np.testing.assert_allclose(values, [0.5, 1.0])
    assert _mean_answer(ChoiceExamples.of({**split, "scale": ["nominal"] * 4}), {0: 0, 1: 1}) is None


def test_one_group_has_no_map() -> None:
    assert expert_picture(Path("unused"), ["r"], ["q"], ["a"], [1.0], np.ones((1, 1, 2), dtype=np.float32)) == {}


def test_markdown_of_an_unknown_value_is_a_dash() -> None:
    rows = {
        "trained": {
            "emd": None,
            "recovered": None,
            "accuracy": 0.5,
            "entropy": 1.0,
            "interval": {"accuracy": [0.4, 0.61]},
        }
    }
    size = {
        "people": None,
        "groups": 0,
        "answers": 7,
        "compared": {"cells": 0, "answers": 0},
        "left_out": {"cells": 3, "answers": 7},
    }
    about = {
        "run": "r",
        "checkpoint": "step-1",
        "kind": "choice",
        "main": "trained",
        "min_answers": 30,
        "min_subgroup": 5,
        "bootstrap": 10,
    }
    shown = [
        {
            "label": "old",
            "people": 40,
            "answers": 40,
            "rows": {"trained": {"emd": None, "accuracy": 0.5, "interval": {}}},
        }
    ]
    subgroups = {"age": {"shown": shown, "left_out": 2}}
    nothing = {"differences": {}, "reliability": {}, "questions": {}, "cells": []}
    split = {**size, **nothing, "distance": "TV", "rows": rows, "subgroups": subgroups}
    text = markdown(ChoiceReport.model_validate({**about, "splits": {"test": split}}), {})
    # Nobody knows how many people gave these answers.
    assert "| | answers | accuracy, trained | TV, trained |" in text
    assert "| old | 40 | 0.500 | – |" in text
    assert "2 with fewer than 30 answers are left out." in text
    assert "| **trained** | – | – | – | – | 1.000 |" in text
    assert "| **trained** | 0.500 [0.400, 0.610] | – |" in text
    assert "Left out there as too small: 3 (7 answers)" in text
    assert "single answers (the data does not say who gave them)" in text
