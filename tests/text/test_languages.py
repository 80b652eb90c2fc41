"""Codes and names of languages → the codes of SONAR."""

from __future__ import annotations

import pytest
from transformers.models.nllb.tokenization_nllb import FAIRSEQ_LANGUAGE_CODES

from lcm_ds.languages import closest, languages, short_code, sonar_code


def test_the_table_has_the_languages_of_sonar_s_tokenizer() -> None:
    assert sorted(languages()) == sorted(FAIRSEQ_LANGUAGE_CODES)
    for code in FAIRSEQ_LANGUAGE_CODES:
        assert sonar_code(code) == sonar_code(*code.split("_")) == sonar_code(code.lower()) == code


@pytest.mark.parametrize(
    ("given", "code"),
    [
        (("deu",), "deu_Latn"),
        (("DE",), "deu_Latn"),
        (("German",), "deu_Latn"),
        (("pt-BR",), "por_Latn"),
        (("en_US",), "eng_Latn"),
        (("zh",), "zho_Hans"),
        (("zh-TW",), "zho_Hant"),
        (("zh-Hant-TW",), "zho_Hant"),
        (("cmn", "Hani"), "zho_Hans"),  # as FineWeb-2 has it
        (("cmn_Hani",), "zho_Hans"),
        (("Chinese", "Hant"), "zho_Hant"),
        (("ara",), "arb_Arab"),
        (("kor", "Kore"), "kor_Hang"),
        (("sat_Olck",), "sat_Beng"),
        (("swa",), "swh_Latn"),
        (("no",), "nob_Latn"),
        (("ks",), "kas_Arab"),
        (("tlh",), None),
        (("arb", "Latn"), None),
        (("xx",), None),
        (("",), None),
        (("not a language",), None),
    ],
)
def test_codes_and_names(given: tuple[str, ...], code: str | None) -> None:
    assert sonar_code(*given) == code


def test_no_other_code_of_a_language_is_that_of_another() -> None:
    short = [short_code(code) for code in languages()]
    own = {code.split("_")[0] for code in languages()}
    assert not own & {each for each in short if each}
    for code in languages():
        if (two := short_code(code)) is not None:
            assert str(sonar_code(two)).split("_")[0] == code.split("_")[0]


def test_a_misspelt_one_is_guessed() -> None:
    assert closest("germn") == "; did you mean 'deu_Latn'?"
    assert closest("###") == ""
