"""Labels and options that stand for no answer ("Don't know", "Refused"), in the languages of the usual surveys."""

from __future__ import annotations

import re

from cuma_ds.profiles.linearize import is_missing, one_spelling

_WORDS = (
    "dk", "na", "nr", "dk/na", "don't know", "dont know", "do not know", "can't choose", "cannot choose", "can't say",
    "no answer", "not answered", "no response", "refused", "refusal", "declined", "missing", "not asked",
    "not asked in survey", "not asked in the survey", "not asked in this country", "not applicable", "inapplicable",
    "iap", "not available", "unknown", "skipped", "prefer not to say", "prefer not to answer", "rather not say",
    "weiß nicht", "weiss nicht", "keine angabe", "keine antwort", "trifft nicht zu", "verweigert",
    "ne sait pas", "nsp", "sans réponse", "pas de réponse", "non réponse", "refus", "sans objet", "non concerné",
    "no sabe", "no contesta", "no responde", "ns", "nc", "ns/nc", "ns/nr", "no aplica",
    "não sabe", "não responde", "não respondeu", "não se aplica", "non so", "non sa", "non risponde",
    "bilmiyorum", "cevap yok", "nie wiem", "brak odpowiedzi", "odmowa odpowiedzi",
    "не знаю", "нет ответа", "затрудняюсь ответить", "отказ", "отказ от ответа", "не применимо",
    "لا أعرف", "لا اعرف", "لا إجابة", "لا اجابة", "رفض", "لا ينطبق", "पता नहीं", "मालूम नहीं", "कोई उत्तर नहीं", "उत्तर नहीं",
    "不知道", "无回答", "無回答", "未回答", "拒绝回答", "拒答", "不适用",
    "わからない", "答えたくない", "非該当", "모름", "무응답",
)  # fmt: skip
_LABEL = re.compile(rf"(?:{'|'.join(sorted(map(re.escape, _WORDS), key=len, reverse=True))})(?:\s*[^\w\s].*)?")


def means_no_answer(label: str) -> bool:
    """Whether a label, or the part of it before the first punctuation mark, is a word for no answer."""
    plain = re.sub("[’´`]", "'", " ".join(one_spelling(label).casefold().split()))
    return is_missing(plain) or _LABEL.fullmatch(plain) is not None
