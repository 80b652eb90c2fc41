"""Languages of SONAR: from the codes and names that corpora have to the code that its tokenizer has.

SONAR's codes are those of NLLB-200: ISO 639-3, an underscore, the script (`deu_Latn`). Corpora also have ISO 639-1
(`de`), ISO 639-3 alone (`deu`), macrolanguages (`zho`, `ara`), English names, BCP 47 (`pt-BR`), and two columns, of
language and script, as FineWeb-2 has them.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

# A language a line: SONAR's code, its English names, and other codes, "1:" before that of ISO 639-1.
_TABLE = """
ace_Arab|Acehnese
ace_Latn|Acehnese
acm_Arab|Mesopotamian Arabic
acq_Arab|Ta'izzi-Adeni Arabic
aeb_Arab|Tunisian Arabic
afr_Latn|Afrikaans|1:af
ajp_Arab|South Levantine Arabic
aka_Latn|Akan|1:ak
als_Latn|Tosk Albanian,Albanian|1:sq,sqi
amh_Ethi|Amharic|1:am
apc_Arab|North Levantine Arabic,Levantine Arabic
arb_Arab|Modern Standard Arabic,Standard Arabic,Arabic|1:ar,ara
ars_Arab|Najdi Arabic
ary_Arab|Moroccan Arabic
arz_Arab|Egyptian Arabic
asm_Beng|Assamese|1:as
ast_Latn|Asturian
awa_Deva|Awadhi
ayr_Latn|Central Aymara,Aymara|1:ay,aym
azb_Arab|South Azerbaijani
azj_Latn|North Azerbaijani,Azerbaijani|1:az,aze
bak_Cyrl|Bashkir|1:ba
bam_Latn|Bambara|1:bm
ban_Latn|Balinese
bel_Cyrl|Belarusian|1:be
bem_Latn|Bemba
ben_Beng|Bengali,Bangla|1:bn
bho_Deva|Bhojpuri
bjn_Arab|Banjar
bjn_Latn|Banjar
bod_Tibt|Standard Tibetan,Tibetan|1:bo
bos_Latn|Bosnian|1:bs
bug_Latn|Buginese
bul_Cyrl|Bulgarian|1:bg
cat_Latn|Catalan,Valencian|1:ca
ceb_Latn|Cebuano
ces_Latn|Czech|1:cs
cjk_Latn|Chokwe
ckb_Arab|Central Kurdish,Sorani
crh_Latn|Crimean Tatar
cym_Latn|Welsh|1:cy
dan_Latn|Danish|1:da
deu_Latn|German|1:de
dik_Latn|Southwestern Dinka,Dinka|din
dyu_Latn|Dyula
dzo_Tibt|Dzongkha|1:dz
ell_Grek|Greek,Modern Greek|1:el
eng_Latn|English|1:en
epo_Latn|Esperanto|1:eo
est_Latn|Estonian|1:et,ekk
eus_Latn|Basque|1:eu
ewe_Latn|Ewe|1:ee
fao_Latn|Faroese|1:fo
fij_Latn|Fijian|1:fj
fin_Latn|Finnish|1:fi
fon_Latn|Fon
fra_Latn|French|1:fr
fur_Latn|Friulian
fuv_Latn|Nigerian Fulfulde,Fulah|1:ff,ful
gaz_Latn|West Central Oromo,Oromo|1:om,orm
gla_Latn|Scottish Gaelic|1:gd
gle_Latn|Irish|1:ga
glg_Latn|Galician|1:gl
grn_Latn|Guarani|1:gn,gug
guj_Gujr|Gujarati|1:gu
hat_Latn|Haitian Creole,Haitian|1:ht
hau_Latn|Hausa|1:ha
heb_Hebr|Hebrew|1:he,iw
hin_Deva|Hindi|1:hi
hne_Deva|Chhattisgarhi
hrv_Latn|Croatian|1:hr
hun_Latn|Hungarian|1:hu
hye_Armn|Armenian|1:hy
ibo_Latn|Igbo|1:ig
ilo_Latn|Ilocano
ind_Latn|Indonesian|1:id
isl_Latn|Icelandic|1:is
ita_Latn|Italian|1:it
jav_Latn|Javanese|1:jv
jpn_Jpan|Japanese|1:ja
kab_Latn|Kabyle
kac_Latn|Jingpho,Kachin
kam_Latn|Kamba
kan_Knda|Kannada|1:kn
kas_Arab|Kashmiri|1:ks
kas_Deva|Kashmiri
kat_Geor|Georgian|1:ka
kaz_Cyrl|Kazakh|1:kk
kbp_Latn|Kabiyè,Kabiye
kea_Latn|Kabuverdianu
khk_Cyrl|Halh Mongolian,Mongolian|1:mn,mon
khm_Khmr|Khmer|1:km
kik_Latn|Kikuyu|1:ki
kin_Latn|Kinyarwanda|1:rw
kir_Cyrl|Kyrgyz|1:ky
kmb_Latn|Kimbundu
kmr_Latn|Northern Kurdish,Kurmanji,Kurdish|1:ku,kur
knc_Arab|Central Kanuri
knc_Latn|Central Kanuri,Kanuri|1:kr,kau
kon_Latn|Kikongo,Kongo|1:kg
kor_Hang|Korean|1:ko
lao_Laoo|Lao|1:lo
lij_Latn|Ligurian
lim_Latn|Limburgish|1:li
lin_Latn|Lingala|1:ln
lit_Latn|Lithuanian|1:lt
lmo_Latn|Lombard
ltg_Latn|Latgalian
ltz_Latn|Luxembourgish|1:lb
lua_Latn|Luba-Kasai
lug_Latn|Ganda,Luganda|1:lg
luo_Latn|Luo
lus_Latn|Mizo
lvs_Latn|Standard Latvian,Latvian|1:lv,lav
mag_Deva|Magahi
mai_Deva|Maithili
mal_Mlym|Malayalam|1:ml
mar_Deva|Marathi|1:mr
min_Latn|Minangkabau
mkd_Cyrl|Macedonian|1:mk
mlt_Latn|Maltese|1:mt
mni_Beng|Meitei,Manipuri
mos_Latn|Mossi
mri_Latn|Maori,Māori|1:mi
mya_Mymr|Burmese|1:my
nld_Latn|Dutch,Flemish|1:nl
nno_Latn|Norwegian Nynorsk|1:nn
nob_Latn|Norwegian Bokmål,Norwegian Bokmal,Norwegian|1:nb,no,nor
npi_Deva|Nepali|1:ne,nep
nso_Latn|Northern Sotho
nus_Latn|Nuer
nya_Latn|Nyanja,Chichewa|1:ny
oci_Latn|Occitan|1:oc
ory_Orya|Odia,Oriya|1:or,ori
pag_Latn|Pangasinan
pan_Guru|Eastern Panjabi,Punjabi,Panjabi|1:pa
pap_Latn|Papiamento
pbt_Arab|Southern Pashto,Pashto|1:ps,pus
pes_Arab|Western Persian,Persian,Farsi|1:fa,fas
plt_Latn|Plateau Malagasy,Malagasy|1:mg,mlg
pol_Latn|Polish|1:pl
por_Latn|Portuguese|1:pt
prs_Arab|Dari
quy_Latn|Ayacucho Quechua,Quechua|1:qu,que
ron_Latn|Romanian,Moldovan|1:ro,mo
run_Latn|Rundi|1:rn
rus_Cyrl|Russian|1:ru
sag_Latn|Sango|1:sg
san_Deva|Sanskrit|1:sa
sat_Beng|Santali
scn_Latn|Sicilian
shn_Mymr|Shan
sin_Sinh|Sinhala,Sinhalese|1:si
slk_Latn|Slovak|1:sk
slv_Latn|Slovenian,Slovene|1:sl
smo_Latn|Samoan|1:sm
sna_Latn|Shona|1:sn
snd_Arab|Sindhi|1:sd
som_Latn|Somali|1:so
sot_Latn|Southern Sotho|1:st
spa_Latn|Spanish,Castilian|1:es
srd_Latn|Sardinian|1:sc
srp_Cyrl|Serbian|1:sr
ssw_Latn|Swati|1:ss
sun_Latn|Sundanese|1:su
swe_Latn|Swedish|1:sv
swh_Latn|Swahili|1:sw,swa
szl_Latn|Silesian
tam_Taml|Tamil|1:ta
taq_Latn|Tamasheq
taq_Tfng|Tamasheq
tat_Cyrl|Tatar|1:tt
tel_Telu|Telugu|1:te
tgk_Cyrl|Tajik|1:tg
tgl_Latn|Tagalog,Filipino|1:tl,fil
tha_Thai|Thai|1:th
tir_Ethi|Tigrinya|1:ti
tpi_Latn|Tok Pisin
tsn_Latn|Tswana|1:tn
tso_Latn|Tsonga|1:ts
tuk_Latn|Turkmen|1:tk
tum_Latn|Tumbuka
tur_Latn|Turkish|1:tr
twi_Latn|Twi|1:tw
tzm_Tfng|Central Atlas Tamazight
uig_Arab|Uyghur|1:ug
ukr_Cyrl|Ukrainian|1:uk
umb_Latn|Umbundu
urd_Arab|Urdu|1:ur
uzn_Latn|Northern Uzbek,Uzbek|1:uz,uzb
vec_Latn|Venetian
vie_Latn|Vietnamese|1:vi
war_Latn|Waray
wol_Latn|Wolof|1:wo
xho_Latn|Xhosa|1:xh
ydd_Hebr|Eastern Yiddish,Yiddish|1:yi,yid
yor_Latn|Yoruba|1:yo
yue_Hant|Yue Chinese,Cantonese
zho_Hans|Chinese,Mandarin|1:zh,cmn
zho_Hant|Chinese
zsm_Latn|Standard Malay,Malay|1:ms,msa
zul_Latn|Zulu|1:zu
"""
# Of the languages with several scripts, the one that a code without a script means.
_USUAL = {"ace": "Latn", "bjn": "Latn", "kas": "Arab", "knc": "Latn", "taq": "Latn", "zho": "Hans"}
# Other names of scripts: SONAR calls Korean kor_Hang, corpora kor_Kore; its Santali, in Ol Chiki, sat_Beng.
_SCRIPTS = {("kor", "Kore"): "Hang", ("sat", "Olck"): "Beng", ("zho", "Hani"): "Hans", ("jpn", "Hira"): "Jpan"}
_CODE = re.compile(r"([a-z]{2,3})(?:[_-]([a-z]{4}))?(?:[_-](?:[a-z]{2}|[0-9]{3}))?", re.IGNORECASE)
_REGIONS = {"tw": "Hant", "hk": "Hant", "mo": "Hant", "cn": "Hans", "sg": "Hans"}  # of Chinese: zh-TW


@cache
def _languages() -> dict[str, tuple[list[str], str | None, list[str]]]:
    """English names, the code of ISO 639-1 and other codes, by SONAR's code."""
    table = {}
    for line in _TABLE.split("\n")[1:-1]:
        code, names, *more = line.split("|")
        codes = more[0].split(",") if more else []
        short = [each.removeprefix("1:") for each in codes if each.startswith("1:")]
        table[code] = names.split(","), short[0] if short else None, [*short, *(c for c in codes if c[:2] != "1:")]
    return table


@cache
def _by_language() -> dict[str, dict[str, str]]:
    """SONAR's codes by the first part of a code, in lower case, and by script."""
    found: dict[str, dict[str, str]] = {}
    for code, (_, _, others) in _languages().items():
        language, script = code.split("_")
        for name in (language, *others):
            found.setdefault(name, {})[script] = code
    # Other codes of languages with several scripts stand at one of these.
    found["cmn"] = found["zh"] = found["zho"]
    found["ks"] = found["kas"]
    return found


@cache
def _by_name() -> dict[str, str]:
    names: dict[str, str] = {}
    for code, (own, _, _) in _languages().items():
        for name in own:
            if code.split("_")[1] == _USUAL.get(code[:3], code.split("_")[1]):
                names[name.lower()] = code
    return names


@cache
def sonar_code(language: str, script: str | None = None) -> str | None:
    """SONAR's code of a language; None if SONAR does not know it.

    >>> [sonar_code(each) for each in ("deu", "deu_Latn", "de", "German", "zh-TW", "tlh")]
    ['deu_Latn', 'deu_Latn', 'deu_Latn', 'deu_Latn', 'zho_Hant', None]

    Args:
        language: A code of ISO 639-1 or 639-3, SONAR's, that of BCP 47, or an English name, in any case.
        script: A code of ISO 15924, if the corpus has it in a column of its own.
    """
    language = language.strip()
    if (named := _by_name().get(language.lower())) is not None and script is None:
        return named
    match = _CODE.fullmatch(language)
    if match is None:
        return _with_script(named, script) if named is not None else None
    own = match.group(2)
    if script is None and own is None and match.group(1).lower() in ("zh", "zho", "cmn"):
        own = _REGIONS.get(language[-2:].lower()) if len(language) > 3 else None
    codes = _by_language().get(match.group(1).lower())
    if codes is None:
        return _with_script(named, script) if named is not None else None
    return _with_script(next(iter(codes.values())), script or own)


def _with_script(code: str, script: str | None) -> str | None:
    """The code of the same language in this script; without one, in the usual one."""
    language = code.split("_")[0]
    codes = _by_language()[language]
    if script is None:
        return codes.get(_USUAL.get(language, ""), code)
    script = script.strip().title()
    return codes.get(_SCRIPTS.get((language, script), script))


def closest(language: str) -> str:
    """For messages: the code that may have been meant, as `; did you mean …?`, or nothing."""
    known = [*_by_name(), *_by_language(), *_languages()]
    found = difflib.get_close_matches(language.strip().lower(), [each.lower() for each in known], n=1, cutoff=0.75)
    code = sonar_code(found[0]) if found else None
    return f"; did you mean {code!r}?" if code else ""


def unknown_language(encoder: Mapping[str, Any]) -> str | None:
    """What is wrong with the language in the description of an encoder that is SONAR's; None if nothing is."""
    language = encoder.get("language")
    if encoder.get("name") != "sonar" or language is None or language in _languages():
        return None
    code = sonar_code(str(language))
    hint = closest(str(language)) if code is None else f"; did you mean {code!r}?"
    return f"encoder.language: SONAR has no language {language!r}{hint}"


def short_code(code: str) -> str | None:
    """The code of ISO 639-1 for SONAR's, which spaCy and ICU take; None if there is none."""
    language = code.split("_")[0]
    return next((short for each, (_, short, _) in _languages().items() if each[:3] == language and short), None)


def languages() -> list[str]:
    """SONAR's codes."""
    return [*_languages()]
