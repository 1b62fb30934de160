# ruff: noqa: RUF001
"""The score: rates that an independent count confirms, and a rule that flags hallucinations."""

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recognize import hallucination, report


def scored(pairs, flags=None, **arguments):
    """What report() says of (reference or None, hypothesis) pairs and their flags."""
    records = []
    for (reference, text), flag in zip(pairs, flags or [None] * len(pairs), strict=True):
        record = {"hypothesis": text, "flag": flag}
        records.append(record if reference is None else record | {"txt": reference})
    return report(records, **arguments)


RATES = re.compile(
    r"(WER|CER) (\d+\.\d\d)/(\d+\.\d\d|nan) % \(all/not flagged\), (\d+) in the references: "
    r"(\d+) substitutions, (\d+) deletions, (\d+) insertions"
)


def edits(reference, hypothesis):
    """Levenshtein's distance between two sequences, by the recurrence itself."""
    row = list(range(len(hypothesis) + 1))
    for i, wanted in enumerate(reference, 1):
        diagonal, row[0] = row[0], i
        for j, got in enumerate(hypothesis, 1):
            best = min(row[j] + 1, row[j - 1] + 1, diagonal + (wanted != got))
            diagonal, row[j] = row[j], best
    return row[-1]


WORDS = st.lists(st.sampled_from(["a", "b", "cat", "dog", "über", "我", "们好"]), max_size=8)
SPACES = st.sampled_from([" ", "  ", " \t "])
PAIRS = st.lists(
    st.tuples(*[st.builds(lambda space, words: space.join(words), SPACES, WORDS)] * 2),
    min_size=1,
    max_size=8,
)


@given(PAIRS, st.data(), st.sampled_from(["wer", "cer"]))
@settings(max_examples=200, deadline=None)
def test_rates_agree_with_an_independent_count(pairs, data, metric):
    """WER, CER and S + D + I are those of an own edit distance, over all and over what is sound."""
    flags = data.draw(st.lists(st.sampled_from([None, "loop"]), min_size=8, max_size=8))
    flags = flags[: len(pairs)]
    name, rate_of_all, rate_of_unflagged, n_total, *errors = RATES.match(
        scored(pairs, flags, metric=metric)
    ).groups()
    assert name == metric.upper()
    cut = str.split if metric == "wer" else (lambda text: "".join(text.split()))
    cuts = [(cut(reference), cut(text)) for reference, text in pairs]

    def rate(cuts):
        total = sum(len(reference) for reference, _ in cuts)
        distance = sum(edits(*pair) for pair in cuts)
        return distance / (total or 1), total, distance

    expected, total, distance = rate(cuts)
    assert int(n_total) == total
    assert rate_of_all == f"{100 * expected:.2f}"
    substitutions, deletions, insertions = map(int, errors)
    assert substitutions + deletions + insertions == distance
    surplus = sum(len(text) - len(reference) for reference, text in cuts)
    assert insertions - deletions == surplus
    unflagged = [pair for pair, flag in zip(cuts, flags, strict=True) if not flag]
    expected = rate(unflagged)[0] if unflagged else math.nan  # not 0, which is the best of all
    assert rate_of_unflagged == f"{100 * expected:.2f}"


def test_the_lines_of_a_report():
    """They read as in `WER 7.62/6.29`: all utterances / those not flagged; and nothing follows."""
    pairs = [("one two three", "one too three"), ("four", "four"), ("five six", "no no no")]
    assert scored(pairs, [None, None, "loop"]).splitlines() == [
        "WER 66.67/25.00 % (all/not flagged), 6 in the references: "
        "3 substitutions, 0 deletions, 1 insertions",
        "flagged: 1 loop",
    ]


def test_flags_are_counted_by_kind():
    """The last line counts the flags of each kind, or says that there are none."""
    flags = ["loop", None, "refusal", "loop", "no stop", "unreadable"]
    results = scored([("a", f"text {i}") for i in range(6)], flags)
    flagged = "flagged: 2 loop, 1 refusal, 1 no stop, 1 unreadable"
    assert results.splitlines()[1:] == [flagged]
    assert scored([("a", "a")]).splitlines()[1:] == ["flagged: none"]


@pytest.mark.parametrize(
    ("references", "metric"),
    [
        (["one two", "three"], "WER"),
        (["привет мир", "été à la plage"], "WER"),
        (["안녕하세요 여러분"], "WER"),  # Korean has spaces
        (["今天天气很好", "我们 走吧"], "CER"),
        (["こんにちは", "カタカナです"], "CER"),
        (["สวัสดีครับ"], "CER"),
        (["打开 wifi 吧今天天气很好", "好的没问题"], "CER"),  # mostly Han
        (["he said 你好 and left the room"], "WER"),
    ],
)
def test_auto_takes_characters_of_unspaced_scripts(references, metric):
    """--metric auto: CER where the references are mostly Han, kana or Thai, otherwise WER."""
    assert scored([(text, text) for text in references]).startswith(metric + " 0.00/0.00")


def test_spaces_never_count_in_cer():
    """A hypothesis that differs in its spaces alone has no CER, ideographic spaces included."""
    pairs = [("今天 天气　好", "今 天天气 好"), ("a b c", "abc")]
    assert RATES.match(scored(pairs, metric="cer")).groups()[:4] == ("CER", "0.00", "0.00", "8")


@pytest.mark.parametrize("metric", ["wer", "cer"])
def test_empty_texts(metric):
    """Empty sides are deletions or insertions, which count as so many references of one word."""

    def rates(*pairs):
        return RATES.match(scored(pairs, metric=metric)).groups()[1:]

    assert rates(("", "")) == ("0.00", "0.00", "0", "0", "0", "0")
    assert rates(("a", "")) == ("100.00", "100.00", "1", "0", "1", "0")
    assert rates(("", "a b")) == ("200.00", "200.00", "0", "0", "0", "2")
    assert rates(("a b", "a b"), ("", "c")) == ("50.00", "50.00", "2", "0", "0", "1")


def test_without_references_there_is_no_score():
    """A jsonl without txt has no rates and still its flags; lines without it are not scored."""
    assert scored([(None, "hello"), (None, "ha")], [None, "loop"]) == "flagged: 1 loop"
    mixed = scored([("one two", "one"), (None, "three four five")])
    assert RATES.match(mixed).groups()[1:] == ("50.00", "50.00", "2", "0", "1", "0")


def test_normalize():
    """--normalize applies Whisper's normaliser for English, or for any language, to both sides."""
    english = [("Mr. Smith's colour, twenty-one!", "mister smith's color 21")]
    assert not scored(english).startswith("WER 0.00")
    assert not scored(english, normalize="basic").startswith("WER 0.00")
    assert scored(english, normalize="english").startswith("WER 0.00/0.00")
    german = [("Grüß Gott, Herr Müller!", "grüß gott herr müller")]
    assert not scored(german).startswith("WER 0.00")
    assert scored(german, normalize="basic").startswith("WER 0.00/0.00")
    chinese = [("今天，天气很好。", "今天天气很好")]
    assert scored(chinese, normalize="basic").startswith("CER 0.00/0.00")


@pytest.mark.parametrize("odd", ["café", "it’s", "naïve “quotes”", "ﬁne", "日本"])
def test_one_reference_does_not_choose_the_normaliser(odd):
    """One é or curly apostrophe among 100 equal pairs once took the WER from 0.00 to 49.81."""
    pairs = [("Mr. Smith's colour: twenty-one, he won't!", "mister smith's color 21 he will not")]
    pairs *= 100
    assert scored(pairs, normalize="english").startswith("WER 0.00/0.00")
    assert scored([*pairs, (odd, odd)], normalize="english").startswith("WER 0.00/0.00")
    spelled = [("Mr. Smith, twenty-one!", "mr smith twenty one")] * 100
    for more in [], [(odd, odd)]:  # nor does ASCII alone bring in the English one
        assert scored(spelled + more, normalize="basic").startswith("WER 0.00/0.00")


@pytest.mark.parametrize(
    ("text", "flag"),
    [
        # The LLM talks about the task
        ("I'm sorry, but I can't transcribe audio.", "refusal"),
        ("I'm sorry, but as an AI language model I cannot listen to recordings", "refusal"),
        ("Unfortunately, I am unable to transcribe the audio.", "refusal"),
        ("My apologies, I cannot transcribe this.", "refusal"),
        ("Please provide the audio file you would like me to work on.", "refusal"),
        ("抱歉，我无法转录这段音频。", "refusal"),
        ("很抱歉，音频中没有可以识别的内容", "refusal"),
        ("对不起，我无法识别语音内容。", "refusal"),
        ("作为一个人工智能语言模型，我听不到声音", "refusal"),
        # People apologise, and talk about audio, too
        ("i'm sorry", None),
        ("sorry i lost the audio book", None),
        ("i am sorry i can't come to the meeting tomorrow", None),
        ("unfortunately the audio was bad on that call", None),
        ("please open the audio file", None),
        ("please share the transcript with the team", None),
        ("he is a model of patience and there is no doubt about it", None),
        ("it seems to me that the speech was too long", None),
        ("as an aircraft it was a failure", None),
        ("对不起我来晚了", None),
        ("他没有录音设备", None),
        ("对不起我没有听清楚", None),
        ("我们没有这个模型", None),
        ("作为语音助手的开发者我很高兴", None),
        ("无法打开录音机", None),
        # Repetition
        ("the the the the the the the the", "loop"),
        ("thank you for watching " * 9, "loop"),
        ("谢谢观看" * 8, "loop"),
        ("!" * 60, "loop"),
        ("la" * 40, "loop"),
        ("no no no", None),
        ("no no no no no i said no", None),
        ("ha ha ha ha ha", None),
        ("zero zero zero zero", None),
        ("double zero seven double zero seven", None),
        ("that is 100000000 dollars", None),
        ("哈哈哈哈哈", None),
        ("yes", None),
        ("", None),
    ],
)
def test_hallucinations(text, flag):
    """The rule flags what nobody said, and leaves what people do say; no reference is asked."""
    assert hallucination(text, stopped=True) == flag


def test_no_stop_token_is_a_flag():
    """A hypothesis that ran into its limit is flagged, be it otherwise fine."""
    assert hallucination("good morning", stopped=False) == "no stop"
