"""What the playground shows: people to choose, predictions beside their own answers, experts, places on the map."""

from __future__ import annotations

import itertools
import json
import re

import numpy as np
import pytest
import torch
from run_folder import make_run
from villagers import FAITH, LEAST, OPTIONS, TRUST, own_shares, village_run, villagers

from cuma_ds.data.batch import EncodedExample
from cuma_ds.distances import emd
from cuma_ds.errors import ConfigError
from cuma_ds.evaluation.routing import cultural_map
from cuma_ds.inference.forward import forward_batches
from cuma_ds.inference.open import open_model, open_run
from cuma_ds.inference.sampling import Sampling
from cuma_ds.inference.talk import Talker, experts_of
from cuma_ds.playground.answers import Playground
from cuma_ds.playground.drawing import HEIGHT, WIDTH, drawn
from cuma_ds.playground.landscape import Places, landscape, placed
from cuma_ds.playground.survey import Field, Survey
from cuma_ds.runs import Run

NORWAY, GHANA = {"country": "Norway"}, {"country": "Ghana", "gender": "female"}
HELLO = [{"role": "user", "content": "Hello?"}]


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_llama, tiny_encoder):
    return village_run(tmp_path_factory.mktemp("runs"), tiny_llama, tiny_encoder)


@pytest.fixture(scope="module")
def playground(run) -> Playground:
    opened = open_run(run)
    return Playground(Talker(opened, Sampling(max_new_tokens=9)), Survey(Run.open(run).data(), opened.config))


@pytest.fixture(scope="module")
def survey(playground) -> Survey:
    return playground.survey


def test_people_are_chosen_by_what_enough_people_share(survey) -> None:
    country, age, gender = survey.fields
    assert country == Field("country", ("Ghana", "Norway", "Peru"), largest=("Norway", "Ghana", "Peru"))
    assert gender.values == ("female", "male")
    ages = sorted(row["profile"]["age"] for row in villagers() if row["question"] == FAITH)
    assert age == Field("age", range=(ages[LEAST - 1], ages[-LEAST]))  # nobody's age stands at an end
    assert survey.map_field == country


@pytest.mark.parametrize(
    ("texts", "person"),
    [
        (["Ghana", "", ""], {"country": "Ghana"}),
        ([" Ghana ", "30", "female"], {"country": "Ghana", "age": "30", "gender": "female"}),
        (["", "30.0", ""], {"age": "30"}),
        (["", "30.5", ""], {"age": "30.5"}),
    ],
)
def test_a_person_is_what_is_said(texts, person, playground) -> None:
    assert playground.person(texts) == person


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["", " ", ""], "say something about this person first"),
        (["Ghana", "1", ""], "age takes a number from 28 to 45"),
        (["Ghana", "old", ""], "age takes a number from 28 to 45"),
        (["Ghana", "nan", ""], "age takes a number from 28 to 45"),
    ],
)
def test_nobody_and_impossible_people_are_refused(texts, said, playground) -> None:
    with pytest.raises(ConfigError, match=f"^{said}$"):
        playground.person(texts)


def test_questions_are_those_that_enough_people_answered(survey) -> None:
    assert {(one.text, one.options) for one in survey.questions} == {
        (text, tuple(options)) for text, options in OPTIONS.items()
    }


@pytest.mark.parametrize("question", [FAITH, TRUST])
def test_own_answers_are_counted_among_the_same_people(question, survey) -> None:
    options, predicted = OPTIONS[question], [1.0, *[0.0] * (len(OPTIONS[question]) - 1)]
    own = survey.own(question, options, {"country": "Norway"}, predicted)
    assert (own.shares, own.answers, own.who) == (own_shares(question, country="Norway"), 40, ["Norway"])
    assert own.distance == pytest.approx(float(emd(predicted, own.shares)))
    # 20 men of Norway are too few: all of Norway stands for them, and is named.
    assert survey.own(question, options, {"country": "Norway", "gender": "male"}, predicted) == own
    men = survey.own(question, options, {"gender": "male"}, predicted)
    assert (men.shares, men.who) == (own_shares(question, gender="male"), ["male"])
    everybody = survey.own(question, options, {}, predicted)
    assert (everybody.shares, everybody.who) == (own_shares(question), [])


def test_nothing_is_told_of_few_people_or_of_other_questions(survey) -> None:
    told = [
        survey.own(TRUST, OPTIONS[TRUST], {"country": "Fiji"}, [1, 0]),
        survey.own(TRUST, OPTIONS[TRUST], {"age": "25"}, [1, 0]),
        survey.own(TRUST, OPTIONS[TRUST], {"country": "Norway", "planet": "Mars"}, [1, 0]),
        survey.own(TRUST, ["No", "Yes"], NORWAY, [1, 0]),
        survey.own("Can dogs be trusted?", OPTIONS[TRUST], NORWAY, [1, 0]),
    ]
    assert told == [None] * 5


def test_choices_are_those_that_generate_prints(run, playground, launch, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    people = [part for fields in (NORWAY, GHANA) for part in ("--profile", json.dumps(fields))]
    done = launch("generate", "--run", str(run), *people, "--compare", "--prompt", FAITH, "--options", *OPTIONS[FAITH])
    choices = playground.choose(FAITH, OPTIONS[FAITH], [NORWAY, GHANA])
    for row, option in enumerate(OPTIONS[FAITH]):
        (line,) = [line for line in done.out.splitlines() if line.startswith(f"│ {option}")]
        assert re.findall(r"[\d.]+%", line) == [f"{choice.predicted[row]:.1%}" for choice in choices]
    assert choices[0].own.shares == own_shares(FAITH, country="Norway")
    assert choices[1].own.who == ["Ghana"]
    for name, shares in playground.experts(FAITH, [NORWAY, GHANA]):
        (line,) = [line for line in done.out.splitlines() if name in line]
        assert [cell.strip() for cell in line.split("│")[2:4]] == shares


def test_answers_grow_side_by_side_and_each_is_what_it_is_alone(playground) -> None:
    more = [*HELLO, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "And?"}]
    steps = list(playground.replies([HELLO, more], [NORWAY, GHANA], Sampling(9)))
    alone = [playground.talker.answers(said, [who])[0] for said, who in ((HELLO, NORWAY), (more, GHANA))]
    assert steps[-1] == alone
    assert alone[0] != alone[1]
    assert len(steps) > 2
    for before, after in itertools.pairwise(steps[:-1]):
        assert all(new.startswith(old) for old, new in zip(before, after, strict=True))


def test_sampling_is_that_of_the_seed(playground) -> None:
    def last(seed: int) -> list[str]:
        return list(playground.replies([HELLO], [NORWAY], Sampling(12, temperature=1.5, seed=seed)))[-1]

    assert last(1) == last(1)
    assert last(1) != last(2)


def test_who_leaves_early_stops_the_writing(playground) -> None:
    writing = playground.replies([HELLO], [NORWAY], Sampling(400, temperature=3.0))
    next(writing)
    writing.close()
    assert not playground.talker.decoder.running
    assert playground.choose(TRUST, OPTIONS[TRUST], [NORWAY])  # the model is free again


def test_the_map_is_that_of_evaluation(playground) -> None:
    talker = playground.talker
    names = ["Ghana", "Norway", "Peru"]
    people = [{"country": name} for name in names]
    prompts = [talker.renderer.encode_choice(FAITH, OPTIONS[FAITH], line) for line in playground.sentences(people)]
    examples = [EncodedExample(ids, [len(ids) - 1], [0], [1.0], row) for row, ids in enumerate(prompts)]
    gates = {}
    for rows, _, _, gates_BRE in forward_batches(
        talker.opened.model, examples, talker.opened.reader(people), 1, 0, record=True
    ):
        gates[rows[0]] = gates_BRE[0].numpy()
    gates_GRE = np.stack([gates[row] for row in range(3)])
    places = playground.places(FAITH, OPTIONS[FAITH], [NORWAY, GHANA])
    assert list(places.land.names) == names
    np.testing.assert_allclose(places.land.gates_GK, gates_GRE.reshape(3, -1), atol=1e-5)
    np.testing.assert_allclose(places.land.xy_G2, cultural_map(gates_GRE).xy_N2, atol=1e-3)
    assert places.alike[0][0] == "Norway"
    np.testing.assert_allclose(places.xy_B2[0], places.land.xy_G2[1], atol=0.05 * np.ptp(places.land.xy_G2))


def test_people_stand_where_their_distances_say() -> None:
    """Routings in a plane: the map is that plane, and every point of it is found again."""
    gates = np.random.default_rng(0).random((12, 2, 1))
    where = placed(landscape([str(row) for row in range(12)], gates), gates[[4, 7]] * 1.0)
    np.testing.assert_allclose(where.xy_B2, where.land.xy_G2[[4, 7]], atol=1e-3)
    assert [names[0] for names in where.alike] == ["4", "7"]
    (new,) = placed(where.land, np.array([[[0.5], [0.25]]])).xy_B2
    expected = np.linalg.norm(gates[:, :, 0] - [0.5, 0.25], axis=1)
    np.testing.assert_allclose(np.linalg.norm(where.land.xy_G2 - new, axis=1), expected, atol=1e-3)


def test_the_picture_of_a_map_writes_no_name_over_another() -> None:
    gates = np.random.default_rng(1).random((60, 2, 1))
    land = landscape([f"Country {row}" for row in range(60)], gates)
    picture = drawn(Places(land, land.xy_G2[:2], [["Country 0"], ["Country 1"]]))
    assert all(0 < dot.x < WIDTH and 0 < dot.y < HEIGHT for dot in [*picture.groups, *picture.people])
    assert [(dot.x, dot.y) for dot in picture.people] == [(dot.x, dot.y) for dot in picture.groups[:2]]
    lines = sorted((dot.label.y, dot.label.x) for dot in picture.groups if dot.label and dot.label.anchor == "start")
    assert len(lines) > 10
    for (y, x), (other_y, other_x) in itertools.pairwise(lines):
        assert abs(y - other_y) >= 16 or abs(x - other_x) >= 70


@pytest.mark.parametrize(
    ("question", "options", "said"),
    [
        ("", ["a", "b"], "the question: nothing is written there yet"),
        ("Really?", ["a"], "a question needs at least two options"),
        ("Really?", ["a", "a"], "no two alike"),
        ("Really?", ["a", "\ud83d"], "no Unicode text"),
        ("Really? " * 3000, ["a", "b"], "24,000 characters are too many"),
        ("Really? " * 200, ["a", "b"], "tokens"),
    ],
)
def test_what_cannot_be_asked_is_said_in_one_line(question, options, said, playground) -> None:
    with pytest.raises(Exception, match=said) as error:
        playground.choose(question, options, [NORWAY])
    assert "\n" not in str(error.value)
    assert playground.choose(TRUST, OPTIONS[TRUST], [NORWAY])


def test_a_conversation_that_is_too_long_is_said_in_one_line(playground) -> None:
    with pytest.raises(ConfigError, match=r"the conversation has \d+ tokens"):
        list(playground.replies([[{"role": "user", "content": "Hi" * 300}]], [NORWAY], Sampling(9)))
    assert playground.choose(TRUST, OPTIONS[TRUST], [NORWAY])


def test_a_model_without_profiles_answers_for_everybody(tiny_llama, survey) -> None:
    playground = Playground(Talker(open_model(str(tiny_llama)), Sampling(5)), survey)
    assert not playground.takes_people
    (choice,) = playground.choose(FAITH, OPTIONS[FAITH], [])
    assert choice.own.shares == own_shares(FAITH)
    assert playground.experts(FAITH, []) == []
    assert playground.places(FAITH, OPTIONS[FAITH], []) is None
    assert list(playground.replies([HELLO], [], Sampling(5)))[-1] == playground.talker.answers(HELLO, [])


def test_people_of_conversations_are_counted_once(tmp_path, tiny_llama, tiny_encoder) -> None:
    """Forty conversations of one person are one person."""
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    rows = [{"profile": {"country": "Norway"}, "messages": turns, "person_id": f"n{row}"} for row in range(32)]
    rows += [{"profile": {"country": "Ghana"}, "messages": turns, "person_id": "one"} for _ in range(40)]
    source = tmp_path / "talks.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run, *_ = make_run(tmp_path / "talks", tiny_llama, tiny_encoder, {}, source=source, data={"heldout_fraction": 0.0})
    opened = open_run(run)
    survey = Survey(Run.open(run).data(), opened.config)
    assert survey.fields == [Field("country", ("Norway",), largest=("Norway",))]
    assert survey.questions == []
    assert survey.own("Hello", ["a", "b"], NORWAY, [1, 0]) is None


def test_profiles_that_are_sentences_have_no_fields(tmp_path, tiny_llama, tiny_encoder) -> None:
    rows = [{**row, "profile": f"Somebody of {row['profile']['country']}."} for row in villagers()]
    source = tmp_path / "told.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run, *_ = make_run(tmp_path / "told", tiny_llama, tiny_encoder, {}, source=source, data={"heldout_fraction": 0.0})
    opened = open_run(run)
    playground = Playground(Talker(opened, Sampling(5)), Survey(Run.open(run).data(), opened.config))
    assert playground.fields == []
    (choice,) = playground.choose(TRUST, OPTIONS[TRUST], ["Somebody of Ghana."])
    assert choice.own is None
    assert sum(choice.predicted) == pytest.approx(1)
    assert playground.places(TRUST, OPTIONS[TRUST], ["Somebody of Ghana."]) is None


def test_experts_are_those_of_the_talker(playground) -> None:
    gates = playground.talker.gates([{"role": "user", "content": TRUST}], [NORWAY, GHANA])
    assert not torch.equal(gates[0], gates[1])
    assert playground.experts(TRUST, [NORWAY, GHANA]) == experts_of(gates, playground.talker.router_names)
