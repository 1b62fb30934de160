# ruff: noqa: RUF001
"""The score: error rates that an independent count confirms, and a rule for hallucinations."""

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recognize import compression_ratio, hallucination_flag, summarize


def summary(pairs, flags=None, **options):
    """Returns summarize() of pairs (reference or None, hypothesis) with these flags."""
    records = []
    for (reference, text), flag in zip(pairs, flags or [None] * len(pairs), strict=True):
        record = {"hypothesis": text, "flag": flag}
        records.append(record if reference is None else record | {"txt": reference})
    return summarize(records, **options)


RATES = re.compile(
    r"(WER|CER) (\d+\.\d\d)/(\d+\.\d\d|nan) % \(all/not flagged\): (\d+) substitutions, "
    r"(\d+) deletions, (\d+) insertions in (\d+) reference (words|characters)"
)


def rates(*pairs, **options):
    """Returns (rate, rate of the unflagged, S, D, I, reference length) as strings."""
    return RATES.match(summary(pairs, **options)).groups()[1:-1]


def edit_distance(reference, hypothesis):
    """Returns Levenshtein's distance between two sequences, by the recurrence itself."""
    row = list(range(len(hypothesis) + 1))
    for i, wanted in enumerate(reference, 1):
        diagonal, row[0] = row[0], i
        for j, got in enumerate(hypothesis, 1):
            best = min(row[j] + 1, row[j - 1] + 1, diagonal + (wanted != got))
            diagonal, row[j] = row[j], best
    return row[-1]


WORDS = st.lists(st.sampled_from(["a", "b", "cat", "dog", "über", "我", "们好"]), max_size=8)
TEXTS = st.builds(str.join, st.sampled_from([" ", "  ", " \t "]), WORDS)


@given(
    st.lists(st.tuples(TEXTS, TEXTS, st.sampled_from([None, "loop"])), min_size=1, max_size=8),
    st.sampled_from(["wer", "cer"]),
)
@settings(max_examples=200)
def test_rates_agree_with_an_independent_count(scored, metric):
    """WER, CER and S + D + I equal those of our own edit distance, over all and over the
    unflagged utterances. If all are flagged, the second rate is nan, not a perfect 0."""
    pairs, flags = [line[:2] for line in scored], [line[2] for line in scored]
    name, rate, unflagged_rate, *counts, unit = RATES.match(
        summary(pairs, flags, metric=metric)
    ).groups()
    assert (name, unit) == {"wer": ("WER", "words"), "cer": ("CER", "characters")}[metric]
    split = str.split if metric == "wer" else (lambda text: "".join(text.split()))
    pairs = [(split(reference), split(text)) for reference, text in pairs]

    def error_rate(pairs):
        n_reference = sum(len(reference) for reference, _ in pairs)
        distance = sum(edit_distance(*pair) for pair in pairs)
        return distance / (n_reference or 1), distance, n_reference

    expected, distance, n_expected = error_rate(pairs)
    substitutions, deletions, insertions, n_reference = map(int, counts)
    assert rate == f"{100 * expected:.2f}" and n_reference == n_expected
    assert substitutions + deletions + insertions == distance
    assert insertions - deletions == sum(len(text) - len(ref) for ref, text in pairs)
    unflagged = [pair for pair, flag in zip(pairs, flags, strict=True) if not flag]
    expected = error_rate(unflagged)[0] if unflagged else math.nan
    assert unflagged_rate == f"{100 * expected:.2f}"


def test_summary_lines():
    """The first line has the rates of all and of the unflagged, and the last counts the flags."""
    pairs = [("one two three", "one too three"), ("four", "four"), ("five six", "no no no")]
    assert summary(pairs, [None, None, "loop"]).splitlines() == [
        "WER 66.67/25.00 % (all/not flagged): 3 substitutions, 0 deletions, 1 insertions "
        "in 6 reference words",
        "flagged: 1 loop",
    ]
    flags = ["loop", None, "refusal", "loop", "no stop", "unreadable"]
    flagged = "flagged: 2 loop, 1 refusal, 1 no stop, 1 unreadable"
    assert summary([("a", "a")] * 6, flags).splitlines()[1:] == [flagged]
    assert summary([("a", "a")]).splitlines()[1:] == ["flagged: none"]


@pytest.mark.parametrize(
    ("references", "metric"),
    [
        (["one two", "three"], "WER"),
        (["привет мир", "été à la plage"], "WER"),
        (["안녕하세요 여러분"], "WER"),  # Korean has spaces
        (["今天天气很好", "我们 走吧"], "CER"),
        (["こんにちは", "カタカナです"], "CER"),
        (["สวัสดีครับ"], "CER"),
        (["ສະບາຍດີ ທຸກຄົນ"], "CER"),  # Lao
        (["សួស្តី អ្នកទាំងអស់គ្នា"], "CER"),  # Khmer
        (["မင်္ဂလာပါ ခင်ဗျာ"], "CER"),  # Burmese
        (["打开 wifi 吧今天天气很好", "好的没问题"], "CER"),  # mostly Han
        (["he said 你好 and left the room"], "WER"),
        (["2026 年 12 月 31 日 , 15 : 30 !"], "CER"),  # spaces, digits, punctuation do not count
        (["12 : 30 !"], "WER"),
    ],
)
def test_auto_metric(references, metric):
    """--metric auto is CER if most letters are Han, kana, Thai, Lao, Khmer or Burmese."""
    assert summary([(text, text) for text in references]).startswith(metric + " 0.00/0.00")


def test_spaces_never_count_in_cer():
    """A hypothesis that differs in its spaces alone, ideographic ones too, has a CER of 0."""
    pairs = [("今天 天气　好", "今 天天气 好"), ("a b c", "abc")]
    assert rates(*pairs, metric="cer") == ("0.00", "0.00", "0", "0", "0", "8")


@pytest.mark.parametrize("metric", ["wer", "cer"])
def test_empty_texts(metric):
    """Empty sides are deletions or insertions; without any reference a rate is per one word."""
    assert rates(("", ""), metric=metric) == ("0.00", "0.00", "0", "0", "0", "0")
    assert rates(("a", ""), metric=metric) == ("100.00", "100.00", "0", "1", "0", "1")
    assert rates(("", "a b"), metric=metric) == ("200.00", "200.00", "0", "0", "2", "0")
    pairs = ("a b", "a b"), ("", "c")
    assert rates(*pairs, metric=metric) == ("50.00", "50.00", "0", "0", "1", "2")


def test_lines_without_reference_are_not_scored():
    """A jsonl without "txt" has no rates but its flags; single lines without it are not scored."""
    assert summary([(None, "hello"), (None, "ha")], [None, "loop"]) == "flagged: 1 loop"
    pairs = ("one two", "one"), (None, "three four five")
    assert rates(*pairs) == ("50.00", "50.00", "0", "1", "0", "2")


ENGLISH = ("Mr. Smith's colour: twenty-one, he won't!", "mister smith's color 21 he will not")
SPELLED = ("Mr. Smith, twenty-one!", "mr smith twenty one")


def test_normalize():
    """--normalize applies Whisper's normaliser for English, or for any language, to both sides."""
    german = ("Grüß Gott, Herr Müller!", "grüß gott herr müller")
    chinese = ("今天，天气很好。", "今天天气很好")
    for pair in (ENGLISH, SPELLED, german, chinese):
        assert rates(pair)[0] != "0.00"
    assert rates(ENGLISH, normalize="basic")[0] != "0.00"
    assert rates(ENGLISH, SPELLED, german, normalize="english")[0] == "0.00"
    assert rates(SPELLED, german, normalize="basic")[0] == "0.00"
    assert rates(chinese, normalize="basic")[0] == "0.00"


@pytest.mark.parametrize("odd", ["café", "it’s", "naïve “quotes”", "ﬁne", "日本"])
def test_one_reference_does_not_choose_the_normaliser(odd):
    """One é or curly apostrophe among 100 equal pairs once raised the WER from 0.00 to 49.81."""
    assert rates(*[ENGLISH] * 100, (odd, odd), normalize="english")[0] == "0.00"
    assert rates(*[SPELLED] * 100, (odd, odd), normalize="basic")[0] == "0.00"


REFUSALS = [  # the LLM talks about the task
    "I'm sorry, but I can't transcribe audio.",
    "I'm sorry, but as an AI language model I cannot listen to recordings",
    "I apologize, but it appears that there is no speech to transcribe.",
    "There is no audio provided to transcribe.",
    "Unfortunately, I am unable to transcribe the audio.",
    "My apologies, I cannot transcribe this.",
    "Please provide the audio file you would like me to work on.",
    "抱歉，我无法转录这段音频。",
    "很抱歉，音频中没有可以识别的内容",
    "对不起，我无法识别语音内容。",
    "作为一个人工智能语言模型，我听不到声音",
]
LOOPS = ["the the the the the the the the", "thank you for watching " * 9, "谢谢观看" * 8]
LOOPS += ["!" * 60, "la" * 40]
SPOKEN = [  # people apologise, talk about audio and repeat themselves, too
    "i'm sorry",
    "sorry i lost the audio book",
    "i am sorry i can't come to the meeting tomorrow",
    "i apologize there was no speech at the wedding",
    "unfortunately the audio was bad on that call",
    "please open the audio file",
    "please share the transcript with the team",
    "he is a model of patience and there is no doubt about it",
    "it seems to me that the speech was too long",
    "as an aircraft it was a failure",
    "对不起我来晚了",
    "他没有录音设备",
    "对不起我没有听清楚",
    "我们没有这个模型",
    "作为语音助手的开发者我很高兴",
    "无法打开录音机",
    "no no no",
    "no no no no no i said no",
    "ha ha ha ha ha",
    "zero zero zero zero",
    "double zero seven double zero seven",
    "that is 100000000 dollars",
    "哈哈哈哈哈",
    "yes",
    "",
]
FLAGS = dict.fromkeys(REFUSALS, "refusal") | dict.fromkeys(LOOPS, "loop") | dict.fromkeys(SPOKEN)


@pytest.mark.parametrize("text", FLAGS)
def test_hallucination_flag(text):
    """The rule flags what nobody said and leaves what people do say. Any other hypothesis without
    an end-of-turn token is flagged "no stop"."""
    assert hallucination_flag(text, has_ended=True) == FLAGS[text]
    assert hallucination_flag(text, has_ended=False) == (FLAGS[text] or "no stop")


PROSE = {  # the same in ten languages: this morning we went to the market and bought vegetables ...
    "Georgian": "დღეს დილით ჩვენ ბაზარში წავედით და ახალი ბოსტნეული ვიყიდეთ. შემდეგ ჩემმა ძმამ "
    "თქვა რომ საღამოს შეიძლება წვიმა წამოვიდეს და ამიტომ სახლში მალე დავბრუნდით. გზაში ძველ "
    "მეგობარს შევხვდით რომელიც ახლა თბილისში მასწავლებლად მუშაობს",
    "Tamil": "இன்று காலை நாங்கள் சந்தைக்குச் சென்று புதிய காய்கறிகளை வாங்கினோம். பிறகு மாலையில் மழை "
    "பெய்யலாம் என்று என் தம்பி சொன்னதால் விரைவில் வீட்டிற்குத் திரும்பினோம். வழியில் ஒரு பழைய நண்பரைச் "
    "சந்தித்தோம், அவர் இப்போது சென்னையில் ஆசிரியராக வேலை செய்கிறார்",
    "Burmese": "ဒီနေ့မနက် ကျွန်တော်တို့ ဈေးကိုသွားပြီး ဟင်းသီးဟင်းရွက်အသစ်တွေ ဝယ်ခဲ့ကြတယ်။ ညနေမှာ "
    "မိုးရွာနိုင်တယ်လို့ ညီလေးကပြောတဲ့အတွက် အိမ်ကို စောစောပြန်လာခဲ့ကြတယ်။ လမ်းမှာ သူငယ်ချင်းဟောင်းတစ်ယောက်နဲ့ "
    "တွေ့ခဲ့ပြီး သူဟာ အခု ရန်ကုန်မှာ ဆရာအဖြစ် အလုပ်လုပ်နေတယ်",
    "Thai": "เช้าวันนี้เราไปตลาดและซื้อผักสดมาหลายอย่าง หลังจากนั้นน้องชายของฉันบอกว่าตอนเย็นฝนอาจจะตก "
    "เราจึงรีบกลับบ้าน ระหว่างทางเราพบเพื่อนเก่าคนหนึ่งซึ่งตอนนี้ทำงานเป็นครูอยู่ที่เชียงใหม่ เขาเล่าให้เราฟัง"
    "เรื่องนักเรียนของเขาและชวนเราไปเที่ยวที่โรงเรียนในสัปดาห์หน้า",
    "Khmer": "ព្រឹកនេះយើងបានទៅផ្សារហើយទិញបន្លែស្រស់ៗជាច្រើន។ បន្ទាប់មកប្អូនប្រុសរបស់ខ្ញុំបាននិយាយថាល្ងាចនេះអាចមានភ្លៀង "
    "ដូច្នេះយើងក៏ប្រញាប់ត្រឡប់មកផ្ទះវិញ។ នៅតាមផ្លូវយើងបានជួបមិត្តចាស់ម្នាក់ដែលឥឡូវធ្វើការជាគ្រូបង្រៀននៅទីក្រុងភ្នំពេញ "
    "ហើយគាត់បានអញ្ជើញយើងទៅលេងសាលារបស់គាត់",
    "Malayalam": "ഇന്ന് രാവിലെ ഞങ്ങൾ ചന്തയിൽ പോയി പുതിയ പച്ചക്കറികൾ വാങ്ങി. വൈകുന്നേരം മഴ പെയ്തേക്കാം എന്ന് "
    "എന്റെ സഹോദരൻ പറഞ്ഞതുകൊണ്ട് ഞങ്ങൾ വേഗം വീട്ടിലേക്ക് മടങ്ങി. വഴിയിൽ ഒരു പഴയ സുഹൃത്തിനെ കണ്ടു, അദ്ദേഹം ഇപ്പോൾ "
    "കൊച്ചിയിൽ അധ്യാപകനായി ജോലി ചെയ്യുന്നു. അടുത്ത ആഴ്ച സ്കൂൾ കാണാൻ വരണമെന്ന് അദ്ദേഹം ഞങ്ങളെ ക്ഷണിച്ചു",
    "Hindi": "आज सुबह हम बाज़ार गए और ताज़ी सब्ज़ियाँ ख़रीदीं। फिर मेरे भाई ने कहा कि शाम को बारिश हो सकती है "
    "इसलिए हम जल्दी घर लौट आए। रास्ते में हमें एक पुराना दोस्त मिला जो अब दिल्ली में अध्यापक है। उसने अपने "
    "विद्यार्थियों के बारे में बहुत सी बातें बताईं और हमें अगले हफ़्ते अपना विद्यालय देखने के लिए बुलाया। घर पहुँचकर "
    "माँ ने चाय बनाई और हम सबने मिलकर पकौड़े खाए",
    "Russian": "Сегодня утром мы пошли на рынок и купили свежие овощи. Потом мой брат сказал, что "
    "вечером может пойти дождь, поэтому мы быстро вернулись домой. По дороге мы встретили старого "
    "друга, который теперь работает учителем в Казани, и он пригласил нас в свою школу",
    "Chinese": "今天早上我们去市场买了一些新鲜的蔬菜，后来弟弟说晚上可能会下雨，所以我们很快就回"
    "家了。路上遇到一位老朋友，他现在在成都当老师，给我们讲了许多学生的故事，还请我们下个星期去参观",
    "English": "this morning we went to the market and bought fresh vegetables then my brother "
    "said that it might rain in the evening so we soon returned home on the way we met an old "
    "friend who now works as a teacher in bristol and he asked us to visit his school next week",
}


@pytest.mark.parametrize("language", PROSE)
def test_loops_in_any_script(language):
    """Prose is never a loop, and a loop is one in any script, however long its phrase is.

    In UTF-8, zlib shortens correct prose of the first seven languages by more than 2.4, too."""
    text = PROSE[language]
    assert compression_ratio(text) < 1.8
    assert summary([(text, text)], [hallucination_flag(text, True)]).endswith("flagged: none")
    for loop in (text[5:25] * 8, text[:60] + text[30:60] * 6, text[:70] * 4):
        assert compression_ratio(loop) > 2.4
        assert hallucination_flag(loop, has_ended=True) == "loop"
