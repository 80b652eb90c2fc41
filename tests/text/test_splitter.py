"""Sentences: nothing is lost, nothing is too long, no word is cut."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machine import patience

from lcm_ds.config import SentencesConfig
from lcm_ds.errors import InputError
from lcm_ds.text.splitter import Splitter

WORDS = st.text("abcdefgh.,;:!?()\"'-…XYZéß中文。，ا؟ԱաԲբकि|🎉\u200d", min_size=1, max_size=12)
SPACES = st.sampled_from([" ", " ", " ", " ", "  ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u2028"])
TEXTS = st.lists(st.tuples(WORDS, SPACES), max_size=120).map(lambda parts: "".join(map("".join, parts)))


def splitter(**changes: object) -> Splitter:
    return Splitter(SentencesConfig.model_validate(changes))


SHORT = splitter(max_characters=24)
ENGLISH = splitter()
UNCUT = splitter(max_characters=10_000)


@given(TEXTS)
@settings(max_examples=150, deadline=None)
def test_no_text_is_lost_and_no_sentence_is_empty_or_too_long(text: str) -> None:
    sentences = SHORT.split(text)
    assert "".join("".join(sentences).split()) == "".join(text.split())
    for sentence in sentences:
        assert sentence == " ".join(sentence.split()) != ""
        assert len(sentence) <= 24


@given(st.lists(st.tuples(st.text('abcdXY.,;!?"()-', min_size=1, max_size=24), SPACES), max_size=80))
@settings(max_examples=150, deadline=None)
def test_no_word_is_cut(parts: list[tuple[str, str]]) -> None:
    text = "".join(map("".join, parts))
    assert " ".join(SHORT.split(text)).split() == text.split()


@given(TEXTS)
@settings(max_examples=100, deadline=None)
def test_sentences_split_again_are_the_same_sentences(text: str) -> None:
    sentences = SHORT.split(text)
    assert SHORT.split("\n\n".join(sentences)) == sentences


PARTS = """
a I U.S. a.m. Mr. 3.5 No. e.g. 12. don't 'em It's o.O :) :-( ^_^ (._.) :P C++ x.y http://a.b/c?d … ... ?! 🙂 你好
. ! ? : ; , - — * " ” ’ ' ( ) « » ¿ ¡ $ 。 । ‥
"""
PARAGRAPHS = st.lists(st.lists(st.sampled_from(PARTS.split()), min_size=1, max_size=3).map("".join), max_size=9).map(
    " ".join
)


SPACY: dict[str, Any] = {language: splitter(language=language)._engine for language in ("en", "fr", "hi", "yo", "xx")}


@pytest.mark.parametrize("language", SPACY)
@given(st.lists(PARAGRAPHS, min_size=10, max_size=20))
@settings(max_examples=25, deadline=None)
def test_sentences_begin_where_spacy_says_though_it_does_not_cut_every_word(
    language: str, paragraphs: list[str]
) -> None:
    spacy = SPACY[language]
    assert list(spacy.begins(paragraphs)) == list(map(spacy._begins_by_spacy, paragraphs))
    assert spacy._find_mark is not None


def test_few_words_of_a_text_are_cut_and_no_more_are_kept_than_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    spacy: Any = splitter()._engine
    text = " ".join(f"The mill number {n} stood still. Why?" for n in range(200))
    assert len(next(iter(spacy.begins([text])))) == 399
    assert set(spacy._tokens) == {"still.", "Why?", "The"}
    monkeypatch.setattr("lcm_ds.text.splitter._KNOWN_WORDS", 2)
    spacy._tokens.clear()
    assert list(spacy.begins([text])) == [spacy._begins_by_spacy(text)]
    assert len(spacy._tokens) <= 2


@given(st.text(max_size=300))
@settings(max_examples=100, deadline=None)
def test_any_text_at_all_can_be_split(text: str) -> None:
    assert all(sentence.strip() and len(sentence) <= 24 for sentence in SHORT.split(text))


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("", []),
        (" \n\t\u200b\x00 ", []),
        ("It rains.  Take\nan umbrella, please!", ["It rains.", "Take an umbrella, please!"]),
        ("Dr. Smith met e.g. Mr. Jones. They left.", ["Dr. Smith met e.g. Mr. Jones.", "They left."]),
        ('He left. "Go," she said. (He was gone.)', ["He left.", '"Go," she said.', "(He was gone.)"]),
        ("See os.PathLike and torch.Tensor. Done.", ["See os.PathLike and torch.Tensor.", "Done."]),
        ("A heading\nThen the text follows.", ["A heading", "Then the text follows."]),
        ("one\n\ntwo\n \nthree", ["one", "two", "three"]),
        ("To buy:\n- Apples\n- Pears", ["To buy:", "- Apples", "- Pears"]),
        ("He\x07 said\x00 no.", ["He said no."]),
        (
            "See Fig. 3 for it. See pp. 3 and 5, vol. 2. 12 came.",
            ["See Fig. 3 for it.", "See pp. 3 and 5, vol. 2.", "12 came."],
        ),
        (
            "Smith et al. (2020) and Lee et al. [5] say so. (We do.)",
            ["Smith et al. (2020) and Lee et al. [5] say so.", "(We do.)"],
        ),
        ("No. 5 is alive. I said no. Then I left.", ["No. 5 is alive.", "I said no.", "Then I left."]),
        ("On Sept. 5 Messrs. Hale and Capt. Lee left.", ["On Sept. 5 Messrs. Hale and Capt. Lee left."]),
        (
            "It was hot, dry, etc. and he left. (see vol. iv. of it.)",
            ["It was hot, dry, etc. and he left.", "(see vol. iv. of it.)"],
        ),
        (
            '"Why?" she asked. "No!" I said. "What!" Mr. Holmes cried.',
            ['"Why?" she asked.', '"No!" I said.', '"What!" Mr. Holmes cried.'],
        ),
        (
            "The answer was no. 12 men left. Open the app. (It is new.) See No. 12 and App. (B).",
            ["The answer was no.", "12 men left.", "Open the app.", "(It is new.)", "See No. 12 and App. (B)."],
        ),
        (
            '"Why?" She was gone. "Ah! it is so . . . and so." Yes.',
            ['"Why?"', "She was gone.", '"Ah! it is so . . . and so."', "Yes."],
        ),
        ("i went home. then i slept.", ["i went home.", "then i slept."]),
        ("He waited... Then he left. She thought… Nobody", ["He waited...", "Then he left.", "She thought…", "Nobody"]),
        (
            "He waited... and left. “No...” he said. “Go…” She went.",
            ["He waited... and left.", "“No...” he said.", "“Go…”", "She went."],
        ),
        ("... and then? …", ["... and then? …"]),
        ("Wait ... Then go.. Type cd .. and ls .. Now", ["Wait ...", "Then go..", "Type cd .. and ls .. Now"]),
    ],
)
def test_where_sentences_end(text: str, sentences: list[str]) -> None:
    assert ENGLISH.split(text) == sentences


def test_ends_are_found_in_books_as_a_reader_marks_them() -> None:
    """Of the ends inside of paragraphs; what they are marked by is in the file's first line."""
    lines = Path(__file__).with_name("sentence_ends.jsonl").read_text(encoding="utf-8").splitlines()
    marked = [json.loads(line) for line in lines[1:]]
    assert len(marked) == 200
    for half, least in (("dev", (0.99, 0.98)), ("test", (0.99, 0.97))):
        right = found_in_all = right_in_all = 0
        for paragraph in marked:
            if paragraph["half"] == half:
                found, ends = ends_found(paragraph["text"]), set(paragraph["ends"])
                right += len(found & ends)
                found_in_all += len(found)
                right_in_all += len(ends)
        assert right / found_in_all >= least[0]  # precision; 0.84 and 0.86 by spaCy's rules alone
        assert right / right_in_all >= least[1]  # recall


def ends_found(text: str) -> set[int]:
    """Where the sentences of a paragraph end, but the last."""
    ends, at = [], 0
    for sentence in UNCUT.split(text):
        for character in sentence.replace(" ", ""):
            at = text.index(character, at) + 1
        ends.append(at)
    return set(ends[:-1])


@pytest.mark.parametrize(
    ("language", "sentences"),
    [
        ("fr", ["« Pourquoi ? » demanda-t-il.", "Elle partit."]),
        ("de", ["„Warum?“ fragte sie.", "Nr. 5 lebt."]),
        ("ru", ["«Почему?» спросила она.", "Он ушёл."]),
        ("nl", ["Hij komt niet!", "'s Nachts slaapt hij."]),
        ("xx", ["დიახ!", "არა?", "კი!"]),  # Georgian, whose letters count as lower case
        ("xx", ["ዛሬ አየሩ ጥሩ ነው።", "ወደ አትክልት ስፍራ ሄድን።"]),
        ("en", ["ថ្ងៃនេះអាកាសធាតុល្អ។", "យើងទៅសួនច្បារ។"]),
        ("xx", ["དེ་རིང་གནམ་གཤིས་ཡག་པོ་འདུག།", "ང་ཚོ་ལྡུམ་རར་ཕྱིན་པ་ཡིན།"]),
        ("xx", ["မိုးရွာနေတယ်။", "သူလာပြီ။"]),
        ("xx", ["Անձրև է գալիս։", "Նա եկավ։"]),
        ("xx", ["ዛሬ አየሩ ጥሩ ነው፡፡", "ወደ አትክልት ስፍራ ሄድን፡፡"]),
        ("xx", ["དེ་རིང་གནམ་གཤིས་ཡག་པོ་འདུག། །", "མི་རིགས་དང༌། ཤ་མདོག་འདུག།"]),  # "and" ends no sentence
        ("xx", ["გზა გრძელია.", "სახლი პატარაა."]),
        ("xx", ["આજે વરસાદ છે.", "નદી વધે છે."]),
        ("gu", ["આજે વરસાદ છે.", "નદી વધે છે."]),
        ("ml", ["ഇന്ന് മഴയാണ്.", "പുഴ ഉയരുന്നു."]),
        ("hy", ["Անձրև է գալիս։", "Նա եկավ։"]),
        ("xx", ["இன்று மழை பெய்கிறது.", "ஆறு உயர்கிறது."]),
        ("xx", ["ఈరోజు వర్షం.", "నది పెరుగుతోంది."]),
        ("xx", ["ಇಂದು ಮಳೆ.", "ನದಿ ಏರುತ್ತಿದೆ."]),
        ("xx", ["ਅੱਜ ਮੀਂਹ ਹੈ।", "ਨਦੀ ਵਧ ਰਹੀ ਹੈ।"]),
        ("xx", ["ଆଜି ବର୍ଷା ହେଉଛି।", "ନଦୀ ବଢୁଛି।"]),
        ("xx", ["අද වැසි.", "ගඟ ඉහළ යයි."]),
        ("xx", ["ᱛᱮᱦᱮᱧ ᱫᱟᱜ ᱾", "ᱜᱟᱰᱟ ᱯᱮᱨᱮᱡ ᱾"]),
        ("xx", ["היום יורד גשם.", "הנהר עולה?", "כן."]),
        ("ur", ["آج بارش ہے۔", "دریا بڑھ رہا ہے۔"]),
        ("xx", ["오늘은 비가 온다.", "강이 불어난다.", "정말?"]),
        ("el", ["Βρέχει σήμερα;", "Ναι, βρέχει.", "Ωραία!"]),
        ("xx", ["ⴰⵙⵙⴰ ⵉⵍⵍⴰ ⵓⵏⵥⴰⵔ.", "ⴰⵙⵉⴼ ⵉⴽⴽⴻⵔ."]),
        ("xx", ["ມື້ນີ້ຝົນຕົກ.", "ແມ່ນ້ຳຂຶ້ນ."]),
        ("xx", ["หนึ่ง...", "สอง"]),
    ],
)
def test_other_languages_end_their_sentences_where_they_do(language: str, sentences: list[str]) -> None:
    assert splitter(language=language).split(" ".join(sentences)) == sentences


# Marked by hand: texts in which ":" and "|" are typed for the Armenian full stop and the danda of India.
TYPED = [
    ["Անձրև է գալիս:", "Նա եկավ տուն:"],
    ["Ժողովը սկսվեց ժամը 12:30-ին:", "Մասնակցում էր 25 հոգի:"],
    ["Երևանը մայրաքաղաքն է:", "1991 թվականին երկիրն անկախացավ:"],
    ["«Ես գալիս եմ»:", "Նա լռեց:", "Բոլորը գնացին:"],
    ["Նա գնեց երեք բան: խնձոր, տանձ և խաղող:"],
    ["Հեղինակ: Պողոս Պողոսյան"],
    ["आज बारिश हो रही है|", "नदी बढ़ रही है|"],
    ["आज बारिश हो रही है |", "नदी बढ़ रही है |", "हाँ|", "मैं आऊँगा|"],
    ['उसने कहा, "मैं आ रहा हूँ|"', "फिर वह चला गया|"],
    ["आजा वर्षा भइरहेको छ|", "नदी बढिरहेको छ|"],
    ["আজ বৃষ্টি হচ্ছে|", "নদী বাড়ছে|"],
    ["ଆଜି ବର୍ଷା ହେଉଛି|", "ନଦୀ ବଢୁଛି|"],
    ["ਅੱਜ ਮੀਂਹ ਹੈ|", "ਨਦੀ ਵਧ ਰਹੀ ਹੈ|"],
    ["ᱛᱮᱦᱮᱧ ᱫᱟᱜ|", "ᱜᱟᱰᱟ ᱯᱮᱨᱮᱡ|"],
    [
        "धर्मक्षेत्रे कुरुक्षेत्रे समवेता युयुत्सवः |",
        "मामकाः पाण्डवाश्चैव किमकुर्वत सञ्जय ||1||",
        "दृष्ट्वा तु पाण्डवानीकं व्यूढं दुर्योधनस्तदा |",
        "आचार्यमुपसङ्गम्य राजा वचनमब्रवीत् || 2 ||",
        "पश्यैतां पाण्डुपुत्राणामाचार्य महतीं चमूम् ||",
    ],
    ["होम | समाचार | खेल | मौसम | संपर्क करें"],
    ["होम|समाचार|खेल यह 10|20 है।"],
    ["Он сказал: Я приду."],
    ["He said: Go home.", "The ratio is 3: Two of them."],
    ["Home | News | About us | And so on it goes | The end"],
]


@pytest.mark.parametrize("sentences", TYPED)
def test_marks_that_are_typed_for_those_of_a_script_end_sentences_in_it(sentences: list[str]) -> None:
    for language in ("en", "xx", "hy", "hi"):
        of = splitter(language=language)
        assert of.split(" ".join(sentences)) == sentences
        assert of.split("\n\n".join(sentences)) == sentences
    assert ENGLISH.split("आज बारिश हो रही है|नदी बढ़ रही है|") == ["आज बारिश हो रही है|", "नदी बढ़ रही है|"]


def test_hard_wrapped_lines_are_one_paragraph() -> None:
    wrapped = (
        "The ship that Captain Walton had hired in the summer before sailed from\n"
        "Archangel to the north, and nobody on the shore who saw it leave thought\n"
        "he would return. Did he? Oh yes, he came back in the end when all of\n"
        "us. That was not all of it.\n"
    )
    sentences = ENGLISH.split(wrapped)
    assert len(sentences) == 4
    assert sentences[0].endswith("thought he would return.")
    assert sentences[1:] == ["Did he?", "Oh yes, he came back in the end when all of us.", "That was not all of it."]


def test_a_long_sentence_is_cut_near_its_middle_behind_a_clause_mark() -> None:
    front = "so it went on for all of the long day and some of the night"
    back = "and when the morning came there was nothing at all left of what they had built up there"
    assert splitter(max_characters=100).split(f"{front}, {back}.") == [f"{front},", f"{back}."]
    pieces = splitter(max_characters=100).split(f"{front} {back}.")  # no clause mark: at a space
    assert max(map(len, pieces)) - min(map(len, pieces)) <= 20
    # A mark at the very beginning would leave a scrap: the space in the middle is better.
    scrap = splitter(max_characters=100).split(f"Well, {front} {back}.")
    assert min(map(len, scrap)) > 60


def test_only_a_word_longer_than_a_sentence_is_cut_in_itself() -> None:
    assert ENGLISH.split("See " + "x" * 600 + " there.") == ["See", "x" * 250, "x" * 250, "x" * 100, "there."]
    assert ENGLISH.split("x" * 250 + " y") == ["x" * 250, "y"]
    assert len(ENGLISH.split("z" * 100_000)) == 400


def test_scripts_without_spaces_end_sentences_and_clauses_at_their_own_marks() -> None:
    chinese = splitter(language="zh", max_characters=16)
    text = "今天下雨了。我们在家里看书，孩子们在窗边画画，谁也不想出门！"
    sentences = chinese.split(text)
    assert "".join(sentences) == text
    assert sentences[0] == "今天下雨了。"
    assert all(sentence[-1] in "。，！" for sentence in sentences)
    assert splitter(language="xx").split("مرحبا بالعالم؟ نعم.") == ["مرحبا بالعالم؟", "نعم."]


@pytest.mark.parametrize(
    "sentences",
    [
        ["ថ្ងៃនេះអាកាសធាតុល្អ។", "យើងទៅសួនច្បារ។"],
        ["မိုးရွာနေတယ်။", "သူလာပြီ။"],
        ["ዛሬ አየሩ ጥሩ ነው።", "ልጆች እየተጫወቱ ነው።"],
        ["आज बारिश है।", "नदी बढ़ रही है।"],
        ["价格是१।५元。", "好。"],  # no end between digits
    ],
)
def test_marks_of_scripts_need_no_space_behind_them(sentences: list[str]) -> None:
    for language in ("en", "xx"):
        assert splitter(language=language).split("".join(sentences)) == sentences


QUOTED = "我们去公园散步。“真的吗？”她问。《红楼梦》是一部小说。（这是括号。）他说：“我不知道。”然后走了。"
QUOTED_ENDS = [
    "我们去公园散步。",
    "“真的吗？”",
    "她问。",
    "《红楼梦》是一部小说。",
    "（这是括号。）",
    "他说：“我不知道。”",
    "然后走了。",
]


@pytest.mark.parametrize("language", ["en", "xx", "zh", "ja"])
def test_what_opens_a_quotation_or_a_title_belongs_to_the_sentence_behind_it(language: str) -> None:
    if language == "ja":
        pytest.importorskip("sudachipy")
    of = splitter(language=language)
    assert of.split(QUOTED) == QUOTED_ENDS
    assert of.split('他说:"好。"她走了。"真的吗？"她问。真的!“好吧?”是的。') == [
        '他说:"好。"',
        "她走了。",
        '"真的吗？"',
        "她问。",
        "真的!",
        "“好吧?”",
        "是的。",
    ]
    japanese = ["公園を散歩しました。", "「本当ですか？」", "「行く。」と言った。", "“はい。”、と彼は答えた。"]
    assert of.split("".join(japanese)) == japanese


@pytest.mark.parametrize("language", ["zh", "en"])
def test_a_long_paragraph_is_handed_on_in_parts_that_every_tokenizer_takes(
    language: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SudachiPy takes at most 49,149 bytes."""
    of, sizes = splitter(language=language), []
    begins = of._engine.begins
    monkeypatch.setattr(
        of._engine, "begins", lambda texts: sizes.extend(len(t.encode()) for t in texts) or begins(texts)
    )
    text = "今日は天気がいいです。公園を散歩しました。明日は雨かもしれません。"
    assert of.split(text * 1200) == [f"{one}。" for one in text.split("。")[:-1]] * 1200
    assert len(of.split("𠀀。" * 30_000)) == 30_000
    assert 20_000 < max(sizes) <= 49_149


def test_phrases_of_thai_and_lao_are_gathered_at_spaces() -> None:
    thai = (
        "โดยที่การยอมรับนับถือเกียรติศักดิ์ประจำตัว และสิทธิเท่าเทียมกัน ของสมาชิกทั้งหลายแห่งครอบครัวมนุษย์ "
        "เป็นหลักมูลเหตุแห่งอิสรภาพ เมื่อวันที่ 10 ธันวาคม ความยุติธรรมและสันติภาพในโลก"
    )
    assert len(thai) > 150
    for language in ("en", "xx"):
        sentences = splitter(language=language).split(thai)
        assert " ".join(sentences) == thai
        assert len(sentences) == 2
        assert all(30 < len(sentence) <= 120 for sentence in sentences)
        assert any("วันที่ 10 ธันวาคม" in sentence for sentence in sentences)
        assert splitter(language=language).split("\n\n".join(sentences)) == sentences
    assert ENGLISH.split(f"{thai.split()[0]} {thai.split()[1]}") == [" ".join(thai.split()[:2])]  # short ones stay


def test_long_words_of_scripts_without_spaces_are_cut_between_letters() -> None:
    for word in ("ก็เป็นที่รู้กันว่า", "สิทธิ", "ក្រុង", "မြန်မာ"):
        for piece in ENGLISH.split(word * 60):
            assert len(piece) <= 250
            assert piece[0] not in "\u0e31\u0e34\u0e35\u0e47\u0e49\u17d2\u103a\u1039"
            assert piece[-1] not in "เแโใไ\u17d2\u1039"
    tibetan = "དེ་རིང་གནམ་གཤིས་" * 40
    assert all(piece.endswith("་") for piece in ENGLISH.split(tibetan))
    assert all(piece.endswith("፡") for piece in ENGLISH.split("ስለሰብአዊ፡መብቶች፡" * 40))


def test_with_none_each_line_is_a_sentence() -> None:
    of = splitter(splitter="none", max_characters=40)
    assert of.split("One. Two.\n\n three\x07\nand four") == ["One. Two.", "three", "and four"]
    assert of.split("a word and another, and still one more of them") == [
        "a word and another,",
        "and still one more of them",
    ]
    with pytest.raises(ValueError, match="pipeline en_core_web_sm is of spaCy, the splitter is none"):
        splitter(splitter="none", pipeline="en_core_web_sm")


def icu(language: str = "en", **more: object) -> Splitter:
    pytest.importorskip("icu4py")
    return splitter(splitter="icu", language=language, **more)


def test_icu_finds_the_same_ends_in_every_script() -> None:
    for language in ("en", "und", "zh"):
        of = icu(language)
        assert of.split(QUOTED) == QUOTED_ENDS
        assert of.split("Anna 🎉🎉 came. “Go!” 𝒳 said. (He did.) Yes.") == [
            "Anna 🎉🎉 came.",
            "“Go!”",
            "𝒳 said.",
            "(He did.)",
            "Yes.",
        ]
        for sentences in TYPED:
            assert of.split(" ".join(sentences)) == sentences
        assert len(of.split("ዛሬ ነው። ወደ ሄድን። Βρέχει σήμερα; Ναι. གནམ་འདུག། ང་ཡིན།")) == 6
    assert icu().split("Dr. Smith met Mr. Jones. They left... Then") == [
        "Dr. Smith met Mr. Jones.",
        "They left...",
        "Then",
    ]
    assert icu().split("First. Second.\n\nThird. Fourth.") == ["First.", "Second.", "Third.", "Fourth."]
    settings = icu().settings()
    assert settings["splitter"] == "icu"
    assert settings["library"].startswith("icu4py 1.")
    assert Splitter.from_settings(settings, None, "x").config.splitter == "icu"


@given(TEXTS)
@settings(max_examples=100, deadline=None)
def test_icu_loses_nothing_and_splits_its_sentences_the_same_way(text: str) -> None:
    of = icu(max_characters=24)
    sentences = of.split(text)
    assert "".join("".join(sentences).split()) == "".join(text.split())
    assert of.split("\n\n".join(sentences)) == sentences


def test_settings_lead_back_to_a_splitter() -> None:
    given = {"splitter": "none", "split_by": "SaT sat-12l-sm", "language": "de"}
    assert Splitter.from_settings(given, None, "x").config == SentencesConfig(language="de")  # type: ignore[call-arg]
    several = {**ENGLISH.settings(), "language": "by document"}
    assert Splitter.from_settings(several, None, "x").config.language == "xx"
    assert Splitter.from_settings(several, "fr", "x").config.language == "fr"


@pytest.mark.parametrize(
    "sentences",
    [
        ["今天下雨了。", "河水上涨了！", "人们走了吗？", "是的。"],
        ["他说：“下雨了。”", "然后走了。"],
        ["雨が降る。", "「本当か？」", "はい。"],
    ],
)
@pytest.mark.parametrize("language", ["en", "fr", "xx"])
def test_they_do_so_in_a_pipeline_of_another_language(language: str, sentences: list[str]) -> None:
    assert splitter(language=language).split("".join(sentences)) == sentences


def test_sentences_of_scripts_with_spaces_end_in_any_pipeline() -> None:
    for sentences in (["هل تمطر اليوم؟", "نعم، تمطر."], ["आज बारिश हो रही है।", "नदी बढ़ रही है।"]):
        assert ENGLISH.split(" ".join(sentences)) == sentences


def test_five_megabytes_in_one_line_take_seconds() -> None:
    text = "Hello world, this is a test. And (so it seems) one more! " * 90_000
    start = time.monotonic()
    sentences = ENGLISH.split(text)
    assert " ".join(sentences) == text.strip()
    assert len(sentences) == 180_000
    assert len(ENGLISH.split("word " * 300_000)) == 6000  # nor is there any end mark where spaCy's limit falls
    assert time.monotonic() - start < patience(60)


def test_settings_say_what_determines_the_sentences() -> None:
    said = splitter(max_characters=99).settings()
    assert said["max_characters"] == 99
    assert said["language"] == "en"
    assert said["rules"] == 4  # another number where a text gets other sentences
    assert said["library"].startswith("spacy 3.")
    assert "Thai and Lao: at spaces" in said["phrases"]
    assert splitter(splitter="none").settings() == {"splitter": "none", "language": "en", "max_characters": 250}


def test_what_is_not_installed_is_a_mistake_with_its_remedy() -> None:
    with pytest.raises(InputError, match="python -m spacy download xx_no_such"):
        splitter(pipeline="xx_no_such")
    with pytest.raises(InputError, match=r"sentences\.language: spaCy has no pipeline for 'qq'"):
        splitter(language="qq")


def test_a_named_pipeline_is_used_and_given_a_sentencizer_if_it_finds_no_sentences(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    import spacy

    folder = tmp_path_factory.mktemp("pipeline")
    nlp = spacy.blank("en")
    nlp.add_pipe("sentencizer", config={"punct_chars": [";"]})
    nlp.to_disk(folder / "semicolons")
    spacy.blank("de").to_disk(folder / "nothing")
    assert splitter(pipeline=str(folder / "semicolons")).split("One; two. Three.") == ["One;", "two. Three."]
    assert splitter(pipeline=str(folder / "nothing")).split("Eins. Zwei.") == ["Eins.", "Zwei."]
