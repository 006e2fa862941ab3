"""From profile fields to one sentence (METHOD, step 1); fields without an answer are left out, never guessed."""

from __future__ import annotations

import functools
import math
import re
import unicodedata
from collections.abc import Mapping
from typing import NamedTuple

from cuma_ds.errors import ConfigError, DataError, nearest
from cuma_ds.sentence_format import format_fields, parse_format
from cuma_ds.strict_json import RepeatedKeyError, read_json

TEMPLATES = ("wvs", "generic", "authors")

_MISSING = {
    "", "-", "?", "na", "n/a", "#n/a", "<na>", "nan", "null", "empty string",
    "missing", "missing value", "unknown", "refused", "not asked", "not applicable",
    "not available", "no answer", "no response", "prefer not to say", "prefer not to answer", "prefer not to disclose",
    "rather not say", "don't know", "dont know", "do not know", "i don't know",
}  # fmt: skip

# Characters that are not seen: spaces of no width, marks of direction and of byte order. Joiners count only outside
# the scripts that write with them (from Arabic on, and emoji).
_INVISIBLE = re.compile(r"[\u200b\u200e\u200f\u2060\ufeff]|(?<![\u0600-\u1fff\u2c00-\U0010ffff])[\u200c\u200d]")
_OTHER = re.compile(r"(?:an)?others?(?: (?:religion|faith|denomination|gender)s?)?(?:\s*[,:;(].*)?", re.IGNORECASE)

# Field names people use, by the one the wvs template reads.
_ALIASES = {
    "country": {"country", "country of residence", "reside country", "nationality country"},
    "age": {"age", "age group", "age band", "age range"},
    "gender": {"gender", "sex"},
    "religion": {"religion", "religious denomination", "denomination"},
    "education": {"education", "education level", "highest education", "degree", "university degree"},
}
# Fields of the authors' sentence, in its order.
AUTHORS_FIELDS = (
    "country",
    "age group",
    "gender",
    "education",
    "marital status",
    "religion",
    "ethnicity",
    "employment",
)
_MAN = {"male", "man", "m", "men"}
_WOMAN = {"female", "woman", "f", "women"}
_NOT_RELIGIOUS = {
    "no", "none", "no religion", "not religious", "non-religious", "nonreligious", "unaffiliated",
    "do not belong to a denomination", "no denomination", "no affiliation",
}  # fmt: skip
_BELIEVERS = {
    "yes": "religious", "islam": "Muslim", "christianity": "Christian", "buddhism": "Buddhist", "hinduism": "Hindu",
    "judaism": "Jewish", "jew": "Jewish", "sikhism": "Sikh", "atheism": "atheist",
}  # fmt: skip
_WITH_DEGREE = {"yes", "degree", "university degree", "university", "has a degree"}
_WITHOUT_DEGREE = {"no", "no degree", "no university degree"}
_WITH_ARTICLE = {
    "united states", "united states of america", "usa", "us", "uk", "united kingdom", "netherlands", "philippines",
    "czech republic", "dominican republic", "united arab emirates", "maldives", "bahamas", "gambia",
    "central african republic", "democratic republic of the congo", "solomon islands", "marshall islands",
}  # fmt: skip


class Wording(NamedTuple):
    """How profile fields become a sentence.

    Attributes:
        template: ``wvs`` reads country, age, gender, religion and education as one English sentence and adds other
            fields as ``generic`` does; ``generic`` lists ``Name: value.`` in the given order; ``authors`` is the
            sentence of the authors' code for survey data, where what is not known stands as ``Unknown``.
        format: a sentence with fields in it instead of a template, see :mod:`cuma_ds.sentence_format`.
        fields: the fields that are read, in this order; None reads all.
    """

    template: str = "generic"
    format: str | None = None
    fields: tuple[str, ...] | None = None

    @property
    def named(self) -> tuple[str, ...]:
        """The fields that ``format`` and ``fields`` name, each once; empty where all are read."""
        return tuple(dict.fromkeys([*(self.fields or ()), *(format_fields(self.format) if self.format else ())]))

    def reads(self, field: str) -> bool:
        """Whether a field of a profile can be part of the sentence."""
        named = format_fields(self.format) if self.format else self.fields
        return named is None or _canonical(field) in map(_canonical, named)


def linearize(fields: Mapping[str, object] | str, wording: Wording | str = "generic") -> str:
    """Turn a profile into the sentence the encoder reads.

    Args:
        fields: profile fields, or a sentence that is passed through; anything that :func:`plain_profile` takes.
        wording: how; the name of a template alone stands for :class:`Wording` of that template.

    Returns:
        One line, e.g. ``A 55-year-old Buddhist woman living in Thailand.``

    Raises:
        DataError: no field that is read has a usable value (None, NaN, empty, "prefer not to say", ... are not
            usable), or as :func:`plain_profile`.
        ConfigError: an unknown template.
    """
    wording = Wording(wording) if isinstance(wording, str) else wording
    template = wording.template
    if template not in TEMPLATES:
        raise ConfigError(
            f"unknown profile template {template!r}{nearest(template, TEMPLATES)}; allowed: {', '.join(TEMPLATES)}"
        )
    fields = plain_profile(fields)
    if isinstance(fields, str):
        if not fields:
            raise DataError("the profile is empty text; allowed: a sentence, or fields such as country, age, gender")
        return fields
    values = _read(fields, wording)
    if not values:
        given = ", ".join(str(name) for name in fields) or "none at all"
        wanted = (
            f"needed is one of {', '.join(wording.named)}" if wording.named else "at least one is needed, e.g. country"
        )
        raise DataError(f"a profile has no field with an answer (fields given: {given}); {wanted}")
    if wording.format is not None:
        said = "".join(part.filled(lambda name: value_of(values, name)) for part in parse_format(wording.format))
        if not (sentence := " ".join(said.split())):
            raise DataError("a profile answers none of the parts of profiles.format")
        return sentence
    return {"wvs": _wvs, "generic": _generic, "authors": _authors}[template](values)


def _read(fields: Mapping[str, object], wording: Wording) -> dict[str, str]:
    """The answers that the sentence is made of, by field."""
    values = {name: _text(value) for name, value in fields.items() if not is_missing(value) and wording.reads(name)}
    if wording.fields is None:
        return values
    order = list(map(_canonical, wording.fields))
    return dict(sorted(values.items(), key=lambda item: order.index(_canonical(item[0]))))


def plain_profile(profile: Mapping[str, object] | str) -> dict[str, object] | str:
    """The profile with names and texts in one spelling.

    A text that is a JSON object is read as the fields it holds; any other text is a sentence. Lists lose items without
    an answer.

    Raises:
        DataError: broken JSON, a field that holds fields, or an age, country or gender that is true or false.
    """
    if isinstance(profile, str):
        sentence = " ".join(one_spelling(profile).split())
        if not sentence.startswith("{"):
            return sentence
        try:
            profile = dict(read_json(one_spelling(profile)))
        except RepeatedKeyError as error:
            raise DataError(f"the profile names {error.key!r} twice; keep one") from None
        except ValueError:
            raise DataError(
                "the profile is a text that starts as JSON but is broken; allowed: a sentence, or fields such as age"
            ) from None
    return {one_spelling(str(name)): _plain_value(name, value) for name, value in profile.items()}


def _plain_value(name: str, value: object) -> object:
    if isinstance(value, str):
        return one_spelling(value)
    if isinstance(value, bool) and _canonical(str(name)) in ("age", "country", "gender"):
        raise DataError(f"profile field {name!r} is {str(value).lower()}; allowed: text or a number")
    if isinstance(value, list | tuple | set) and not any(
        isinstance(item, list | tuple | set | Mapping) for item in value
    ):
        return [_plain_value(name, item) for item in value if not is_missing(item)]
    if isinstance(value, list | tuple | set | Mapping) and not is_missing(value):
        raise DataError(
            f"profile field {name!r} holds fields or lists of its own; write each as a field of the profile"
        )
    return value


def one_spelling(text: str) -> str:
    """The text as all texts that look like it are spelled: composed (NFC), trimmed, without invisible characters."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", _INVISIBLE.sub("", text))
    return text.strip()


def is_missing(value: object) -> bool:
    """Whether a field's value means that nothing is known (case-insensitive)."""
    waiting = [value]
    while waiting:  # lists may lie within one another, however deep
        value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, list | tuple | set):
            waiting += value
        elif not _says_nothing(value):
            return False
    return True


def _says_nothing(value: object) -> bool:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return True
    return one_spelling(str(value)).lower().replace("’", "'").rstrip(".") in _MISSING


def country_of(fields: Mapping[str, object] | str) -> str:
    """The profile's country as written, or an empty string."""
    return value_of(fields, "country")


def value_of(fields: Mapping[str, object] | str, field: str) -> str:
    """What the profile says in one field (under any name the field goes by), or an empty string."""
    if not isinstance(fields, str):
        for name, value in fields.items():
            if _canonical(str(name)) == _canonical(field) and not is_missing(value):
                return _text(value)
    return ""


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, list | tuple | set):
        return ", ".join(_text(item) for item in value)
    return " ".join(one_spelling(str(value)).split())


def _readable(name: str) -> str:
    return " ".join(one_spelling(name).replace("_", " ").split())


@functools.lru_cache(maxsize=1024)
def _canonical(name: str) -> str:
    plain = _readable(name).lower()
    return next((canonical for canonical, names in _ALIASES.items() if plain in names), plain)


def _generic(values: Mapping[str, str]) -> str:
    parts = []
    for name, value in values.items():
        label = _readable(name)
        parts.append(f"{label[:1].upper()}{label[1:]}: {value.rstrip('.')}.")
    return " ".join(parts)


def _authors(values: Mapping[str, str]) -> str:
    known: dict[str, str] = {}
    others = []
    for name, value in values.items():
        field = "age group" if _canonical(name) == "age" else _canonical(name)
        if field in AUTHORS_FIELDS and field not in known:
            known[field] = value
        else:
            others.append(f"{_readable(name)}: {value}")
    if known.get("age group", "").endswith("years"):
        known["age group"] += " old"
    parts = [f"{field}: {known.get(field, 'Unknown')}" for field in AUTHORS_FIELDS[1:]]
    return ", ".join([f"You are a person from {known.get('country', 'Unknown')}", *parts, *others]) + "."


def _wvs(values: Mapping[str, str]) -> str:
    known: dict[str, str] = {}
    others: dict[str, str] = {}
    for name, value in values.items():
        canonical = _canonical(name)
        if canonical in _ALIASES and canonical not in known:
            known[canonical] = value
        else:
            others[name] = value
    if not known:
        return _generic(others)
    age_before, age_after = _age(known.get("age"))
    religion_before, religion_after = _religion(known.get("religion"))
    words = [age_before, religion_before, _gender(known.get("gender")), religion_after, age_after]
    if "country" in known:
        words.append(f"living in {_country(known['country'])}")
    words.append(_education(known.get("education")))
    phrase = " ".join(word for word in words if word)
    sentence = f"{_article(phrase)} {phrase}."
    return f"{sentence} {_generic(others)}" if others else sentence


def _article(phrase: str) -> str:
    first = phrase.split()[0].lower()
    number = re.match(r"\d+", first)
    if number:
        return "An" if number[0].startswith("8") or number[0] in {"11", "18"} else "A"
    return "An" if first[0] in "aeiou" and not first.startswith(("uni", "eu")) else "A"


def _age(age: str | None) -> tuple[str, str]:
    """What stands before the noun ("55-year-old") and after it ("aged 30 to 44")."""
    if age is None:
        return "", ""
    plain = age.lower().removesuffix("years old").removesuffix("years").strip()
    if re.fullmatch(r"\d{1,3}", plain):
        return f"{plain}-year-old", ""
    band = re.fullmatch(r"(\d{1,3})\s*(?:-|–|to)\s*(\d{1,3})", plain)
    if band:
        return "", f"aged {band[1]} to {band[2]}"
    over = re.fullmatch(r"(\d{1,3})\s*(?:\+|(?:and|or)\s+(?:over|older|more|above))", plain)
    if over:
        return "", f"aged {over[1]} or over"
    return "", f"aged {plain}"


def _religion(religion: str | None) -> tuple[str, str]:
    """What stands before the noun ("Buddhist") and after it ("of another religion")."""
    if religion is None:
        return "", ""
    plain = re.sub(r"\s*\(.*?\)", "", religion).strip()
    if _OTHER.fullmatch(plain):
        return "", "of another religion"
    if plain.lower() in _NOT_RELIGIOUS:
        return "non-religious", ""
    # "Other Christian" is a Christian of another church.
    plain = re.sub(r"^other\s+", "", plain, flags=re.IGNORECASE)
    return _BELIEVERS.get(plain.lower(), plain), ""


def _gender(gender: str | None) -> str:
    if gender is None:
        return "person"
    plain = gender.lower()
    if plain in _MAN:
        return "man"
    if _OTHER.fullmatch(plain):
        return "person of another gender"
    return "woman" if plain in _WOMAN else f"{plain} person"


def _country(country: str) -> str:
    return f"the {country}" if country.lower() in _WITH_ARTICLE else country


def _education(education: str | None) -> str:
    if education is None:
        return ""
    plain = education.lower()
    if plain in _WITH_DEGREE:
        return "with a university degree"
    if plain in _WITHOUT_DEGREE:
        return "without a university degree"
    return f"whose highest education is {education[:1].lower()}{education[1:].rstrip('.')}"
