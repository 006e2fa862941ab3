"""Who is asking: sentences, embeddings and the table with its cache."""

from __future__ import annotations

import json
import shutil
import warnings

import numpy as np
import pytest
import torch

from cuma_ds.config import DataSection
from cuma_ds.data import load_data
from cuma_ds.errors import ConfigError, DataError, ModelError
from cuma_ds.profiles import ProfileEncoder, ProfileTable, linearize
from cuma_ds.profiles.encoder import pool
from cuma_ds.profiles.groups import group_mask
from cuma_ds.profiles.linearize import country_of, is_missing, one_spelling, plain_profile

WVS = [
    (
        {"country": "Thailand", "age": 55, "gender": "female", "religion": "Buddhist"},
        "A 55-year-old Buddhist woman living in Thailand.",
    ),
    ({"country": "Norway"}, "A person living in Norway."),
    ({"country": "Netherlands", "Sex": "Male"}, "A man living in the Netherlands."),
    ({"age": 80, "gender": "M"}, "An 80-year-old man."),
    ({"age": 18.0, "gender": "non-binary"}, "An 18-year-old non-binary person."),
    ({"age": "30 to 44", "country": "Peru"}, "A person aged 30 to 44 living in Peru."),
    ({"age": "25-34", "gender": "Female"}, "A woman aged 25 to 34."),
    ({"age_group": "65+", "country": "Japan"}, "A person aged 65 or over living in Japan."),
    ({"age": "60 or over"}, "A person aged 60 or over."),
    ({"religion": "Orthodox (Russian/Greek/etc.)"}, "An Orthodox person."),
    (
        {"religion": "no", "degree": "yes", "country": "USA"},
        "A non-religious person living in the USA with a university degree.",
    ),
    ({"religion": "yes", "education": "no university degree"}, "A religious person without a university degree."),
    (
        {"religion": "Islam", "education_level": "Upper secondary"},
        "A Muslim person whose highest education is upper secondary.",
    ),
    ({"country": "Chile", "marital_status": "married"}, "A person living in Chile. Marital status: married."),
    ({"employment": "retired"}, "Employment: retired."),
    ({"religion": "Other", "gender": "female", "age": 34}, "A 34-year-old woman of another religion."),
    (
        {"religion": "other religion", "age": "25-34", "country": "Peru"},
        "A person of another religion aged 25 to 34 living in Peru.",
    ),
    ({"religion": "Other Christian (Evangelical/Pentecostal)", "gender": "male"}, "A Christian man."),
    ({"gender": "Other", "country": "Peru"}, "A person of another gender living in Peru."),
]


@pytest.mark.parametrize(("fields", "sentence"), WVS, ids=[sentence for _, sentence in WVS])
def test_wvs_template_reads_as_english(fields, sentence):
    assert linearize(fields, "wvs") == sentence


def test_generic_template_keeps_order_names_and_values():
    assert linearize({"country": "Norway", "age": 34}) == "Country: Norway. Age: 34."
    assert linearize({"likes_tea": True, "languages": ["Sami", "Norwegian"], "note": "quiet."}) == (
        "Likes tea: yes. Languages: Sami, Norwegian. Note: quiet."
    )


@pytest.mark.parametrize(
    "value",
    [
        *(None, float("nan"), "", "  ", "\u200b", [], [None, ""], {"a": None}),
        *("missing", "EMPTY STRING", "Prefer not to say", "NO ANSWER", "Don't know", "don’t know."),
    ],
)
@pytest.mark.parametrize("template", ["wvs", "generic"])
def test_missing_values_leave_no_trace(value, template):
    known = {"country": "Norway"}
    assert linearize({**known, "religion": value, "age": value, "hobby": value}, template) == linearize(known, template)
    assert is_missing(value)


@pytest.mark.parametrize("value", [0, False, "no", "none", "Norway"])
def test_negative_answers_are_answers(value):
    assert not is_missing(value)


def test_the_authors_sentence_has_all_their_fields_in_their_order_and_others_behind():
    assert linearize({"hobby": "chess", "age": "25-34 years", "country": "Peru", "sex": "Female"}, "authors") == (
        "You are a person from Peru, age group: 25-34 years old, gender: Female, education: Unknown, marital status: "
        "Unknown, "
        "religion: Unknown, ethnicity: Unknown, employment: Unknown, hobby: chess."
    )


def test_text_passes_through_on_one_line():
    assert linearize("A nurse\n from  Peru.", "wvs") == "A nurse from Peru."


@pytest.mark.parametrize("fields", [{}, {"age": None, "country": "Missing"}, " \n"])
def test_a_profile_without_answers_is_refused_without_showing_its_text(fields):
    with pytest.raises(DataError) as caught:
        linearize(fields)
    assert "\n" not in str(caught.value)


SPELLINGS = {
    "decomposed": "Co\u0302te d'Ivoire",
    "spaces": "  Côte d'Ivoire\u00a0",
    "no width": "Cô\u200bte\u2060 d'Ivoire\ufeff",
    "joiners": "Cô\u200d\u200cte d'Ivoire",
    "direction": "\u200eCôte d'Ivoire\u200f",
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_one_value_has_one_spelling(spelling):
    expected = {"country": "Côte d'Ivoire", "age": 3}
    assert country_of({"country": spelling}) == expected["country"]
    for template in ("wvs", "generic"):
        assert linearize({"\u200bcountry": spelling, "age": 3}, template) == linearize(expected, template)
    assert linearize(f"Somebody from {spelling} who cooks.") == "Somebody from Côte d'Ivoire who cooks."
    assert plain_profile({"country": spelling, "age": 3, "tea": [spelling, None]}) == {
        **expected,
        "tea": ["Côte d'Ivoire"],
    }
    profiles = [{"country": "Peru"}, {"country": "Côte d'Ivoire"}]
    mask_NE = group_mask(profiles, {"country": {spelling: [0], "*": [1]}}, 2)
    assert mask_NE.tolist() == [[0, 1], [1, 0]]


def test_joiners_stay_where_a_script_writes_with_them():
    for word in ("می\u200cخواهم", "क्\u200dष", "👩\u200d🌾"):
        assert one_spelling(word) == word


def test_a_profile_that_is_json_text_is_its_fields():
    assert linearize(' {"country": "Norway", "age": 34}', "wvs") == "A 34-year-old person living in Norway."
    for text, problem in (
        ("{'country': 'Norway'}", "starts as JSON but is broken"),
        ('{"age": 1, "age": 2}', "names 'age' twice"),
    ):
        with pytest.raises(DataError, match=problem) as caught:
            linearize(text)
        assert "Norway" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"age": True}, "profile field 'age' is true; allowed: text or a number"),
        ({"Sex": False}, "profile field 'Sex' is false"),
        ({"place": {"country": "Norway"}}, "profile field 'place' holds fields or lists of its own"),
        ({"places": [["Norway"]]}, "profile field 'places' holds fields or lists of its own"),
    ],
)
def test_a_field_of_another_kind_is_refused(fields, problem):
    with pytest.raises(DataError, match=problem):
        linearize(fields)


def test_unknown_template_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'generic'"):
        linearize({"country": "Norway"}, "genric")


def test_country_is_found_under_its_names():
    assert country_of({"Country": "Norway"}) == country_of({"age": 3, "country_of_residence": "Norway"}) == "Norway"
    assert country_of("A person living in Norway.") == country_of({"country": "missing", "city": "Oslo"}) == ""


def _manual_embeddings(folder, sentences, how="mean", normalise=True):
    """One sentence at a time, so that there is no padding at all."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    rows = []
    for sentence in sentences:
        with torch.no_grad():
            hidden = model(**tokenizer(sentence, return_tensors="pt")).last_hidden_state[0].numpy().astype(np.float64)
        vector = {"mean": hidden.mean(0), "cls": hidden[0], "lasttoken": hidden[-1]}[how]
        rows.append(vector / np.linalg.norm(vector) if normalise else vector)
    return np.stack(rows)


SENTENCES = ["A man.", "A 55-year-old Buddhist woman living in Thailand.", "A person living in Norway.", "X"]


def _with_pooling(tiny_encoder, folder, config):
    shutil.copytree(tiny_encoder, folder)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_padding_never_influences_an_embedding(tiny_encoder, batch_size):
    encoder = ProfileEncoder(tiny_encoder, "cpu", batch_size)
    embeddings = encoder(SENTENCES)
    assert embeddings.dtype == torch.float32
    assert embeddings.shape == (4, encoder.dim) == (4, 16)
    np.testing.assert_allclose(embeddings.numpy(), _manual_embeddings(tiny_encoder, SENTENCES), atol=1e-6)


@pytest.mark.parametrize(
    ("config", "how"),
    [
        ({"pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode_lasttoken": True}, "lasttoken"),
        ({"pooling_mode": "cls"}, "cls"),
        ({}, "mean"),
    ],
)
def test_pooling_is_what_the_folder_says(tiny_encoder, tmp_path, config, how):
    folder = _with_pooling(tiny_encoder, tmp_path / "encoder", config)
    np.testing.assert_allclose(
        ProfileEncoder(folder, "cpu")(SENTENCES).numpy(), _manual_embeddings(folder, SENTENCES, how), atol=1e-6
    )


@pytest.mark.parametrize(
    ("pooling", "how"), [("mean", "mean"), ("mean-all", "mean"), ("cls", "cls"), ("last", "lasttoken")]
)
def test_pooling_scale_and_length_can_be_chosen(tiny_encoder, pooling, how):
    plain = ProfileEncoder(tiny_encoder, "cpu")
    chosen = ProfileEncoder(tiny_encoder, "cpu", pooling=pooling, normalise=False, max_tokens=12)
    expected = _manual_embeddings(tiny_encoder, [sentence[:12] for sentence in SENTENCES], how, normalise=False)
    np.testing.assert_allclose(chosen(SENTENCES).numpy(), expected, atol=1e-5)
    assert (np.linalg.norm(expected, axis=1) > 2).all()
    assert chosen.fingerprint != plain.fingerprint
    assert ProfileEncoder(tiny_encoder, "cpu", pooling="mean").fingerprint == plain.fingerprint
    with pytest.raises(ModelError, match=r"pooling is 'max'; allowed: auto, mean"):
        ProfileEncoder(tiny_encoder, pooling="max")


@pytest.mark.parametrize("side", ["left", "right"])
def test_pool_finds_the_first_and_last_real_token_on_either_padding_side(side):
    mask = torch.tensor([[0, 0, 1, 1]] if side == "left" else [[1, 1, 0, 0]])
    hidden = torch.arange(4.0).view(1, 4, 1)
    first, last = (2.0, 3.0) if side == "left" else (0.0, 1.0)
    found = [pool(hidden, mask, mode).item() for mode in ("cls", "lasttoken", "mean")]
    assert found == [first, last, (first + last) / 2]


@pytest.mark.parametrize("cached", [False, True])
def test_sentences_that_differ_behind_what_is_read_are_never_one_person(tiny_encoder, tmp_path, cached):
    """The tiny encoder reads 256 characters; release 0.1.0 gave both countries one vector."""
    encoder = ProfileEncoder(tiny_encoder)
    long, country = "Hobby: chess. " * 30, ["Country: Norway.", "Country: Peru."]
    kinds = ([long + country[0], long + country[1]], [country[0] + long, country[1] + long], country)
    data = [load_data(DataSection(path=str(rows(tmp_path, sentences)), heldout_fraction=0.0)) for sentences in kinds]
    if cached:
        ProfileTable.build(data[0].sentences, encoder, tmp_path / "cache")
    expected = (
        r"2 of 2 profile sentences have more than the 256 tokens that .* reads .*different people would get one vector"
    )
    with pytest.raises(DataError, match=expected):
        data[0].profile_table(encoder, tmp_path / "cache")
    with pytest.warns(UserWarning, match=r"2 of 2 .* \(the longest has 435\); their ends are not read"):
        table = data[1].profile_table(encoder, tmp_path / "cache")
    assert not torch.equal(*table.embeddings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data[2].profile_table(encoder, tmp_path / "cache")


def rows(folder, sentences):
    """Answers of three people for each profile sentence."""
    path = folder / f"{len(list(folder.iterdir()))}.jsonl"
    answers = [
        {
            "profile": sentence,
            "question": "Tea?",
            "options": ["Yes", "No"],
            "answer": 0,
            "person_id": f"{number}-{person}",
        }
        for number, sentence in enumerate(sentences)
        for person in range(3)
    ]
    path.write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    return path


def test_one_string_is_one_row_and_the_encoder_is_frozen(tiny_encoder):
    encoder = ProfileEncoder(tiny_encoder, "cpu")
    assert torch.equal(encoder("A man."), encoder(["A man."]))
    assert not encoder("A man.").requires_grad


def test_fingerprint_follows_content_not_place(tiny_encoder, tmp_path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(tiny_encoder, copy)
    original = ProfileEncoder(tiny_encoder).fingerprint
    assert ProfileEncoder(copy).fingerprint == original
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert ProfileEncoder(copy).fingerprint != original
    other_pooling = _with_pooling(tiny_encoder, tmp_path / "cls", {"pooling_mode_cls_token": True})
    assert ProfileEncoder(other_pooling).fingerprint != original


def test_bad_encoders_are_named(tiny_encoder, tmp_path):
    with pytest.raises(ModelError, match="no sentence encoder at"):
        ProfileEncoder(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="not a sentence encoder"):
        ProfileEncoder(tmp_path / "empty")
    with pytest.raises(ModelError, match=r"pooling max; supported: one of mean, cls, lasttoken"):
        ProfileEncoder(_with_pooling(tiny_encoder, tmp_path / "max", {"pooling_mode_max_tokens": True}))
    dense = _with_pooling(tiny_encoder, tmp_path / "dense", {})
    (dense / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}]))
    with pytest.raises(ModelError, match="Dense module"):
        ProfileEncoder(dense)
    no_weights = _with_pooling(tiny_encoder, tmp_path / "bare", {})
    (no_weights / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no encoder weights"):
        ProfileEncoder(no_weights)


class CountingEncoder:
    """Deterministic vectors from character codes; remembers what it was asked."""

    def __init__(self, fingerprint: str = "f" * 64):
        self.fingerprint, self.asked = fingerprint, []

    def __call__(self, sentences):
        self.asked.append(list(sentences))
        return torch.tensor([[float(len(s)), float(sum(map(ord, s)))] for s in sentences])


def test_each_distinct_sentence_is_embedded_once_ever(tmp_path):
    encoder = CountingEncoder()
    first = ProfileTable.build(["a", "bb", "a"], encoder, tmp_path)
    assert encoder.asked == [["a", "bb"]]
    second = ProfileTable.build(["bb", "ccc", "a"], encoder, tmp_path)
    assert encoder.asked == [["a", "bb"], ["ccc"]]
    third = ProfileTable.build(["ccc", "bb"], encoder, tmp_path)
    assert len(encoder.asked) == 2
    assert first.embeddings.tolist() == [[1, 97], [2, 196], [1, 97]]
    assert second.embeddings.tolist() == [[2, 196], [3, 297], [1, 97]]
    assert third.embeddings.tolist() == [[3, 297], [2, 196]]


def test_another_encoder_never_gets_the_vectors_of_the_first(tmp_path):
    ProfileTable.build(["a"], CountingEncoder("1" * 64), tmp_path)
    other = CountingEncoder("2" * 64)
    ProfileTable.build(["a"], other, tmp_path)
    assert other.asked == [["a"]]


def test_cache_holds_no_profile_text(tmp_path):
    secret = "A 55-year-old Zoroastrian"
    ProfileTable.build([secret], CountingEncoder(), tmp_path)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert files
    assert not any("Zoroastrian" in file.name or b"Zoroastrian" in file.read_bytes() for file in files)


def test_a_damaged_cache_only_costs_time(tmp_path):
    encoder = CountingEncoder()
    ProfileTable.build(["a"], encoder, tmp_path)
    for file in tmp_path.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:20])
    assert ProfileTable.build(["a"], encoder, tmp_path).embeddings.tolist() == [[1, 97]]
    assert len(encoder.asked) == 2


def test_table_round_trip_keeps_unicode_and_bits(tmp_path):
    table = ProfileTable(["Ein Mann aus Köln.", "日本の女性"], torch.randn(2, 3), "abc")
    table.save(tmp_path / "deep" / "table.safetensors")
    again = ProfileTable.load(tmp_path / "deep" / "table.safetensors")
    assert (again.sentences, again.fingerprint) == (table.sentences, "abc")
    assert torch.equal(again.embeddings, table.embeddings)
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["table.safetensors"]


def test_bad_tables_are_named(tmp_path):
    with pytest.raises(DataError, match=r"absent\.safetensors"):
        ProfileTable.load(tmp_path / "absent.safetensors")
    (tmp_path / "text.safetensors").write_text("hello, this is no tensor file")
    with pytest.raises(DataError, match="cannot read the table"):
        ProfileTable.load(tmp_path / "text.safetensors")
    with pytest.raises(DataError, match="no profiles to embed"):
        ProfileTable.build([], CountingEncoder(), tmp_path)


@pytest.mark.embedded
def test_real_encoder_puts_like_profiles_together(embedded_models):
    encoder = ProfileEncoder(embedded_models[1], "cpu")
    sentences = ["A person living in Norway.", "A person living in Sweden.", "The recipe needs two eggs."]
    vectors = encoder(sentences)
    assert encoder.dim == 384
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    assert vectors[0] @ vectors[1] > 0.6 > 0.3 > vectors[0] @ vectors[2]
    np.testing.assert_allclose(vectors.numpy(), _manual_embeddings(embedded_models[1], sentences), atol=1e-5)
