"""Sentences of one's own: fields in a text, parts that may be left out, and which fields are read."""

from __future__ import annotations

from pathlib import Path

import pytest

from cuma_ds.errors import ConfigError, DataError
from cuma_ds.profiles import Wording, linearize
from cuma_ds.recipe import load_config

ANNA = {"Country": "Norway", "age_group": "25-34", "religion": None, "marital status": "Single"}
FORMATS = {
    "plain": ("{country}, {age}", "Norway, 25-34"),
    "an alias and other spelling": ("{country of residence}, {Age Band}", "Norway, 25-34"),
    "missing": ("From {country}, religion: {religion}.", "From Norway, religion: Unknown."),
    "left out": ("From {country}[, of religion {religion}][, {marital status}].", "From Norway, Single."),
    "all of a part": ("{country}[ ({age}, {religion})]", "Norway"),
    "brackets": ("[[{country}]] {{{age}}}", "[Norway] {25-34}"),
    "blanks": ("  {country}\n {age} ", "Norway 25-34"),
}


@pytest.mark.parametrize(("text", "sentence"), FORMATS.values(), ids=FORMATS.keys())
def test_a_format_is_filled(text, sentence) -> None:
    assert linearize(ANNA, Wording(format=text)) == sentence
    assert linearize("A nurse in Peru.", Wording(format=text)) == "A nurse in Peru."


def test_fields_are_read_in_the_order_they_are_asked_for() -> None:
    assert linearize(ANNA, Wording(fields=("marital status", "country"))) == "Marital status: Single. Country: Norway."
    assert linearize(ANNA, Wording("wvs", fields=("age",))) == "A person aged 25 to 34."
    authors = linearize(ANNA, Wording("authors", fields=("age", "country")))
    assert authors.startswith("You are a person from Norway, age group: 25-34, gender: Unknown")
    assert "Single" not in authors


@pytest.mark.parametrize(
    "wording", [Wording(fields=("religion",)), Wording(format="{religion}"), Wording(format="[{country} {religion}]")]
)
def test_a_profile_without_the_fields_has_no_sentence(wording) -> None:
    with pytest.raises(DataError, match=r"^a profile (has no field with an answer|answers none)"):
        linearize(ANNA, wording)


REFUSED = {
    "no field": ("format: A person.", r"it names no field"),
    "half a brace": ("format: 'From {country'", r"'\{' at character 6 has no other half"),
    "other half": ("format: 'From country}'", r"'\}' at character 13 has no other half"),
    "half a bracket": ("format: '{country} [x'", r"a '\[' has no other half"),
    "brackets in brackets": ("format: '[{country} [{age}]]'", r"'\[' at character 12 has no other half"),
    "nothing to leave out": ("format: '{country} [x]'", r"in brackets that ends at character 13 holds no field"),
    "no name": ("format: 'A {}'", r"'\{\}' at character 3 names no field"),
    "an attribute": ("format: '{country.x}'", r"'\{country.x\}' at character 1 names no field"),
    "a field left out": (
        "{format: '{country}, {age}', fields: [country]}", r"format names 'age', which fields leaves out",
    ),
    "no fields": ("fields: []", r"at least 1"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "problem"), REFUSED.values(), ids=REFUSED.keys())
def test_a_mistake_in_a_format_is_one_line_with_its_place(tmp_path: Path, text: str, problem: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    section = text if text.startswith("{") else f"{{{text}}}"
    recipe.write_text(f"model: {{path: m}}\nprofiles: {section}\nadapters: {{method: lora}}\n")
    with pytest.raises(ConfigError, match=rf"^{recipe}:2: profiles[.:].*{problem}") as error:
        load_config(recipe)
    assert "\n" not in str(error.value)
