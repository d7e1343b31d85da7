"""The reward `language`: what of a text counts, and which language it is told to be."""

import importlib.util
import sys

import pytest

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.recipe.sections import RewardConfig
from lowmem_rlhf.rewards import language as module
from lowmem_rlhf.rewards import load_rewards, score
from lowmem_rlhf.rewards.language import letters, stretches

ENGLISH = "She sold half as many clips in May as in the month before."
GERMAN = "Sie verkaufte im Mai halb so viele Klammern wie im Monat davor."
SENTENCES = {
    "en": ENGLISH,
    "de": GERMAN,
    "fr": "Elle a vendu en mai la moitié des pinces du mois précédent.",
    "es": "En mayo vendió la mitad de los clips que el mes anterior.",
    "ru": "В мае она продала вдвое меньше скрепок, чем месяцем раньше.",
    "zh": "她五月份卖出的夹子是上个月的一半，所以一共是七十二个。",
    "ja": "彼女は五月に先月の半分のクリップを売りました。",
    "ar": "باعت في شهر مايو نصف عدد المشابك التي باعتها في الشهر السابق.",
}
needs_package = pytest.mark.skipif(
    importlib.util.find_spec("py3langid") is None,
    reason="the optional package py3langid is not installed",
)


def reward(**options):
    return load_rewards([RewardConfig(function="language", options=options)])[0]


def values(texts, **options):
    found = score([reward(**options)], ["p"] * len(texts), texts, [[1]] * len(texts), {})
    return found.by_name["language"]


def test_sentences_are_long_enough_to_be_told():
    assert stretches(f"{ENGLISH} {GERMAN}\nYes.") == [ENGLISH, f"{GERMAN} Yes."]
    assert stretches(f"Yes. {ENGLISH}") == [f"Yes. {ENGLISH}"]
    assert len(stretches(SENTENCES["zh"] * 3)) == 3
    assert stretches("Yes. No. 12 + 7 = 19") == stretches("") == stretches("\n\n") == []
    assert letters("ab, 12!") == 2 and letters("她") == 3


@pytest.mark.parametrize(
    "noise",
    [
        "```python\nfor x in range(9): print(x)\n```",
        "```\nnot closed",
        "`while x`",
        r"\[ x \text{ if } y \]",
        r"$\frac{a}{b}$",
        *("https://example.org/the/page", "<think>", r"\alpha", r"\( x \)", "$$ a $$", "12", "{}"),
    ],
)
def test_what_is_no_text_does_not_count(noise):
    (found,) = stretches(f"{ENGLISH[:-1]} {noise}")
    assert letters(found) == letters(ENGLISH)


def test_prices_are_no_formula():
    text = "It costs $5 and the other one costs $7 in the shop"
    assert stretches(text) == [text]


@needs_package
def test_each_language_is_told_from_the_others():
    texts = list(SENTENCES.values())
    for code in SENTENCES:
        assert values(texts, language=code) == [float(other == code) for other in SENTENCES], code
        assert values(texts, language=code, score="check", among=list(SENTENCES))[list(SENTENCES).index(code)] == 1.0


@needs_package
def test_the_fraction_is_of_letters():
    text = f"{ENGLISH}\n{GERMAN} {ENGLISH}"
    share = 2 * letters(ENGLISH) / (2 * letters(ENGLISH) + letters(GERMAN))
    assert values([text, ENGLISH, "12", ""], language="en") == [pytest.approx(share), 1.0, None, None]
    assert values([text, f"{GERMAN} {text}"], language="en", score="check", among=["en", "de"]) == [1.0, 0.0]
    odd = ["\ud800" * 40, "\0" * 40, "a" * 10_000, "ა" * 400]
    assert all(value is None or 0 <= value <= 1 for value in values(odd, language="en"))


@needs_package
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"language": "english"},
            "language: got 'english'; give a code of ISO 639-1 that py3langid knows, such as 'en'",
        ),
        ({"language": "zxx"}, "language: got 'zxx'; give a code"),
        ({"language": "en", "among": ["de", "fr"]}, "among: got ['de', 'fr']; give 'en' and the others"),
        ({"language": "en", "among": ["en"]}, "among: got ['en']; give 'en' and the others"),
        ({"language": "en", "among": ["en", "xx"]}, "among: got 'xx'; give a code"),
        ({"language": "en", "score": "all"}, "score: got 'all'; give 'fraction' or 'check'"),
    ],
)
def test_what_the_options_of_a_language_refuse(options, message):
    with pytest.raises(UserError) as caught:
        reward(**options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_without_the_package_it_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    module._identifier.cache_clear()
    with pytest.raises(UserError, match=r"language needs the package py3langid.*run: pip install py3langid$"):
        reward(language="en")
