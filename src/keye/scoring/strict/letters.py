"""The option that a reply chooses, by what its sentences say of letters and of the options' texts.

A reply is cut into clauses. Each clause says something of the letters in it: that a letter is the answer (`_FINAL`,
`_EXPLICIT`), that it fits (`_JUDGED`), nothing but the letter itself (`_ALONE`), that it may be (`_HEDGED`), or that it
is not. The strongest statements decide; where they name several letters, and no later one corrects the earlier, nothing
was answered. Options' texts are looked for only where no letter is named. Linear in the text's length.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from keye.scoring.strict.plain import to_ascii_forms, to_plain
from keye.scoring.strict.reasoning import find_boxed, strip_reasoning
from keye.scoring.strict.yes_no import read_yes_no

_HEDGED, _ALONE, _JUDGED, _EXPLICIT, _FINAL = 1, 2, 3, 4, 5
#: Beyond these many characters of a reply only the ends are read: an answer stands at the start or at the end.
_LONGEST = 20_000

_BARE = re.compile(r"[\W_]*([A-Za-z])[\W_]*")
_LETTER_AND_TEXT = re.compile(
    r"[\W_]*(?<![A-Za-z])([A-Za-z])(?:\s*[.):\]},\-\uff0c\u3001\u3002>]+\s*|\s+)(\S.*)", re.DOTALL
)
_W = "A-Za-z0-9_\u00c0-\u024f\u0370-\u04ff"
_LETTER = re.compile(
    rf"(?<![{_W}'.&/\\@#^-])(?<!\d )([A-Za-z])(?![{_W}&+#^\\°=]|'[A-Za-z]|[-.:][A-Za-z0-9]|\. ?[A-Za-z]\.)"
)
_CONFUSABLE = str.maketrans("\u0410\u0412\u0421\u0415\u041d\u0406\u0408\u0391\u0392\u0395\u0397\u0399", "ABCEHIJABEHI")
_ALONE_CYRILLIC = re.compile(
    rf"(?<![{_W}])[\u0410\u0412\u0421\u0415\u041d\u0406\u0408\u0391\u0392\u0395\u0397\u0399](?![{_W}])(?! [\u0400-\u04ff])"  # noqa: E501
)
_JSON = re.compile(
    r"[\"'](?:(?:final|correct|selected|chosen|predicted|best|my)[_ ]?)?(?:answer|choice|option|letter|prediction|label|response|result)"  # noqa: E501
    r"(?:[_ ]?(?:letter|choice|option|id|key))?[\"']\s{0,4}:\s{0,4}(\"[^\"\n]{0,400}\"|'[^'\n]{0,400}'|\[[^\]]{0,400}\]|[^,}\n\"'\[]{1,80})",  # noqa: E501
    re.IGNORECASE,
)
_ITEM = re.compile(r"(?:^|(?<=\s))[(\[]?([A-Za-z])[.):\]]+(?=\s|[^\x00-\x7f])", re.MULTILINE)

_BREAK = re.compile(r"\n+|[;!?\u3002]+|\.{2,}|(?<=[\w)\]}\"'%])\.(?=[\"')\]]?\s|[\"')\]]?$)")
_CLAUSE = re.compile(
    r"[,\u3001]+\s*(?:and |or |but |so )?|\s+[-\u00b7]+>?\s+|->|(?<=[\w)\]'\"])\s*\((?=[A-Za-z]{2})"
    r"|\s+(?=(?:but|so|thus|hence|therefore|because|since|while|whereas|though|although|rather than|instead of|unlike|not|yet"  # noqa: E501
    r"|which|that leaves|leaving|however|even if|even though)\b)"
    r"|(?<=[A-Za-z0-9\u4e00-\u9fff])(?=\u56e0\u4e3a|\u800c\u4e0d\u662f|\u800c\u662f|\u6240\u4ee5|\u56e0\u6b64)",
    re.IGNORECASE,
)  # fmt: skip
_SUBORDINATE = re.compile(
    r"[\s\"'(]*(?:because|since|as\b(?! (?:such|a result))|while|whereas|though|although|even if|even though|unlike|if|when|whether|which|compared"  # noqa: E501
    r"|besides|apart from|因为|由于|虽然|如果|与)",
    re.IGNORECASE,
)
_DENIAL = re.compile(
    r"\b(?:not|never|neither|nor|cannot|isn't|wasn't|aren't|doesn't|don't|didn't|can't|couldn't|won't|wouldn't|rather than"  # noqa: E501
    r"|instead of|no longer|wrong|incorrect|false|excluded?s?|excluding|eliminated?s?|eliminating|ruled? out|rules out|ruling out|impossible"  # noqa: E501
    r"|unlikely|contradict(?:s|ed)?|discard(?:ed)?|dismiss(?:ed)?|reject(?:ed)?|invalid|irrelevant|distractors?|less|worse|implausible"
    r"|fails?|lacks?|untrue|except|no)\b|不|错|排除|非|否|没有|未|✗|✘|❌|\u00d7",
    re.IGNORECASE,
)  # fmt: skip
_NOT_DENIAL = re.compile(
    r"\b(?:no doubt|not only|no question|without|no other|nothing else|cannot be anything (?:but|other than)|none other than|can't be wrong|not wrong|no problem)\b"  # noqa: E501
    r"|不仅|不难|无疑|不错|不难看出|是否",
    re.IGNORECASE,
)
_HEDGE = re.compile(
    r"\b(?:could|might|may|maybe|perhaps|possibl[ey]|either|candidates?|options are|choices are|answers are|options|choices|plausible|tempting|between"  # noqa: E501
    r"|initially|at first|first (?:guess|thought|impression)|thought|considered|seemed|looked|low confidence|one of|whether)\b"  # noqa: E501
    r"|可能|或许|也许|要么",
    re.IGNORECASE,
)  # fmt: skip
_CORRECTION = re.compile(
    r"[\s\"'(\-]*(?:(?:oh|hmm+|but|and|well|ah)[\s,]+)*(?:wait|no\b(?! (?:one|dog|man|car|other))|actually|correction|on second thoughts?|on reflection|sorry|scratch that|let me (?:re|correct)|after (?:re|checking again)|in fact|instead\b(?! of)"  # noqa: E501
    r"|i (?:was|am) wrong|i made|checking again|looking again|re-?checking|不对|等等|更正|重新|其实)",
    re.IGNORECASE,
)  # fmt: skip
_NOUN = (
    r"answers?|choice|option|selection|ans|solution|conclusion|response|result|letter|pick|guess|verdict|prediction|decision"
    r"|r\u00e9ponse|respuesta|resposta|antwort|risposta|opci\u00f3n|ответ|정답|답|答え"
    r"|正解|答案|选项|选择|答"
)
_COPULA = r"\bis|\bbe|\bwas|'s|\bare|:|=|>|\best|\bes|\bist|\b\u00e9|\b\u00e8|은|는|は|是|为|应为|应该是|应选|选"
_OPENING = r"[\s\"'(\[<{*_#>]*"
_EXPLICIT_BEFORE = re.compile(
    rf"(?:(?:{_NOUN})[^.;?!\n]{{0,48}}?(?:{_COPULA})\s*(?:(?:clearly|definitely|therefore|thus|most likely|likely|probably|simply|then|still|actually|indeed|just|now|really|hence|likely to be|to be|have to be|given by)[\s:]*)*"  # noqa: E501
    rf"(?:(?:the |an? )?(?:option|choice|letter|answer|number)[\s:]*)?|\b(?:final |correct |right |best |my )*(?:answer|ans|answer choice)\.?\s*"  # noqa: E501
    r"|\b(?:it|this|that)(?:'s| is| must be| has to be| should be| would be)\s*(?:clearly |definitely |therefore |most likely |probably |actually |then )*(?:option |choice )?"  # noqa: E501
    r"|\bi(?:'d| would| will|'ll|'m| am)?\s*(?:(?:also|still|have to|therefore|would|rather|finally|now)\s+)*(?:choose|pick|select|say|guess|answer|go(?:ing)? (?:with|for)|vote for|opt for|think|believe|chose|picked|selected)"  # noqa: E501
    r"\s*(?:(?:that )?(?:it(?:'s| is)|the answer(?:'s| is))\s*)?(?:the )?(?:option |choice |letter |answer |answer choice )*"  # noqa: E501
    r"|\b(?:choose|select|pick|choosing|selecting|picking|go(?:ing)? (?:with|for))\s*(?:the )?(?:option |choice |letter |answer )*"  # noqa: E501
    r"|\b(?:must|has to|have to|should) be\s*(?:option |choice )?|选(?:择|项)?(?:了|的是)?[\s:]*|答案[\s:]*|本题[\s:]*)"
    rf"{_OPENING}$",
    re.IGNORECASE,
)  # fmt: skip
_FINAL_WORD = re.compile(r"\b(?:final(?:ly)?|conclusion|conclude|in summary|overall)\b|最终|综上|结论", re.IGNORECASE)
_CONCLUSION = re.compile(
    r"[\s\"'(]*(?:so|thus|hence|therefore|consequently|then|accordingly|that leaves|leaving|which leaves|∴|故|所以|因此)\b",  # noqa: E501
    re.IGNORECASE,
)
_LINK_BEFORE = re.compile(
    r"(?:\b(?:so|thus|hence|therefore|then|gives|yields|is|leaves|leaving|as|to|suggests?|indicates?|supports?|favou?rs?|prefer|means|with|only|option|choice|letter|opt\.?|select|statement|answer|item|remains?|selected|chosen)|[:=>∴→✅]|故|选|项|是|为)" + _OPENING + "$",  # noqa: E501
    re.IGNORECASE,
)  # fmt: skip
_CORRECT_AFTER = re.compile(
    r"[\s\"')\]}.,:>\-]*(?:(?:is|was|would be|must be|should be|seems?|looks?|has to be|will be|being|appears?(?: to be)?|:|=|-)?\s*(?:clearly |indeed |therefore |definitely |thus |the most |most |probably |likely |also |still )*(?:the )?(?:only )?"  # noqa: E501
    r"(?:correct|right|best|true|answer|yes\b|accurate|✓|✔|✅)|it is\b|项?(?:是)?(?:正确|对|符合)|的?(?:正确))",
    re.IGNORECASE,
)  # fmt: skip
_FITS_AFTER = re.compile(
    r"[\s\"')\]}]*(?:best |clearly |most |accurately |correctly |closely |alone |also |only |still )*(?:fits?|match(?:es)?|describes?|remains?|agrees?|corresponds?|is (?:supported|consistent|shown|what|left|more likely|most likely|likely|chosen|selected)|happening|happens|seems|applies|wins|stands|works|makes (?:the most )?sense|holds|captures?|reflects?|summari[sz]es|符合)",  # noqa: E501
    re.IGNORECASE,
)  # fmt: skip
#: What may follow a capital A or I that names an option and is not the English word.
_AFTER_A = re.compile(
    r"\s*(?:$|[^\w\s]|[^\x00-\x7f]|(?:is|was|isn't|fits?|match(?:es)?|best|seems|appears|looks|describes|shows|happens|mentions|claims|says|states|contradicts|does|doesn't|remains"
    r"|has|nor|because|since|rather|instead|alone|applies|wins|works|only|makes|clearly|correctly|accurately|happening|being|while|though|as|over|it is|[B-J]\b"  # noqa: E501
    r"|and [B-J]\b|or [B-J]\b|to [B-J]\b)\b)"
)
_AFTER_A_MODAL = re.compile(r"\s*(?:would|could|might|may|can|must|should|cannot|can't|will|and|or|but|not|here|so)\b")
_LABELS = re.compile(
    r"\b(?:the|option|options|choice|choices|answer|answers|letter|letters|both|either|and|or|maybe|statement|statements|yes)\b|选项?|项|和|或|与|及",
    re.IGNORECASE,
)
_TEXT_CUE = re.compile(rf"(?:{_NOUN})[^.;?!\n]{{0,48}}?(?:{_COPULA})\s*(?:the )?", re.IGNORECASE)
_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(
    rf"[{_CJK}]|\d+(?:[.,:]\d+)*|[^\W\d_{_CJK}]+(?:'[^\W\d_{_CJK}]+)*|[-+=<>^*/%$\u20ac\u00a3\u00b0√\u00d7\u00f7\\]"
)
_NOT = ("not", "never", "不")
_REFUSAL = re.compile(
    r"\bnone of\b|\bno(?:ne)? (?:option|answer|choice|correct|single)|\bneither of\b|\b(?:can(?:not|'t)|unable to|could not|couldn't|impossible to|hard to) (?:\w+ ){0,2}(?:determine|tell|say|answer|decide|identify|know|see|view|help|be determined)|\bdo(?:n't| not) know\b|\bunknown\b|\bnot (?:sure|certain|enough)\b|\bunclear\b|\ball of\b|\bboth\b"  # noqa: E501
    r"|以上|无法|不能|不知道|不确定|都不|都对",
    re.IGNORECASE,
)  # fmt: skip


@dataclass(frozen=True)
class _Options:
    """The options of a question: letters, and the letters of texts that only one option has."""

    letters: str
    by_text: dict[str, str]
    is_yes_no: bool


@dataclass(frozen=True)
class _Claim:
    """What a clause says of a letter. `order` counts clauses; `corrects` says that it takes back what came before."""

    letter: str
    strength: int
    order: int
    corrects: bool


def find_letter(text: str, options: Sequence[str]) -> str | None:
    """The letter of the option that a reply chooses, None where it chooses none or several.

    `options` are the texts in order, without their letters (or with: "A. text"); their number bounds the letters. A
    reply that consists of reasoning alone is read for its conclusion.
    """
    choices = _read_options(tuple(options))
    stripped = strip_reasoning(text)
    if stripped.answer:
        return _read_answer(_shorten(stripped.answer), choices)
    return _read_reasoning(_shorten(stripped.reasoning), choices) if stripped.reasoning else None


def _shorten(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]}\n{text[-_LONGEST // 2 :]}"


@lru_cache(maxsize=1024)
def _read_options(options: tuple[str, ...]) -> _Options:
    options = options[:26]
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(options)]
    keys = [_key(_without_letter(str(text).strip(), letter)) for text, letter in zip(options, letters, strict=True)]
    by_text = {key: letter for key, letter in zip(keys, letters, strict=True) if key and keys.count(key) == 1}
    return _Options(letters, by_text, set(by_text) in ({"yes", "no"}, {"是", "否"}))


def _without_letter(text: str, letter: str) -> str:
    """The text of "A. text"."""
    if text[:1] == letter or text[:2] == f"({letter}":
        return text.lstrip("(")[1:].lstrip(".):\uff1a\u3001 ") if text.lstrip("(")[1:2] in ".):\uff1a\u3001" else text
    return text


def _key(text: str) -> str:
    """A text for comparison: words in lower case, numbers and signs of arithmetic, a space between any two."""
    return " ".join(_WORD.findall(to_plain(text).casefold()))


def _read_answer(text: str, options: _Options) -> str | None:
    """The letter of an answer without reasoning."""
    text = to_ascii_forms(text)
    if not text.isascii():
        text = _ALONE_CYRILLIC.sub(lambda match: match[0].translate(_CONFUSABLE), text)
    if match := _BARE.fullmatch(text):
        return _bound(match[1], options)
    if (boxed := find_boxed(text)) is not None:
        return _read_answer(boxed, options)
    if (named := list(_JSON.finditer(text))) and (value := named[-1][1]):
        return _read_value(value, options)
    text = to_plain(text)
    if match := _BARE.fullmatch(text):
        return _bound(match[1], options)
    if letter := options.by_text.get(_key(text)):
        return letter
    if match := _LETTER_AND_TEXT.fullmatch(text):
        stated = options.by_text.get(_key(match[2]))
        if stated is not None:
            return stated if stated == match[1].upper() else None
    text = _without_echo(text, options)
    claims = list(_read_claims(text, options))
    if claims:
        return _decide(claims)
    return _find_text(text, options)


def _read_reasoning(text: str, options: _Options) -> str | None:
    """The conclusion of a reply that has nothing but reasoning: what its last sentence that chooses says."""
    text = to_plain(text)
    claims = list(_read_claims(_without_echo(text, options), options))
    last = [claim for claim in claims if claim.order == claims[-1].order]
    best = _decide(claims) if any(claim.strength >= _EXPLICIT for claim in claims) else None
    return best or (_decide(last) if last else None)


def _bound(letter: str, options: _Options) -> str | None:
    return letter.upper() if letter.upper() in options.letters else None


def _read_value(value: str, options: _Options) -> str | None:
    """The letter of a value in JSON: a string, a list of one, a bare word."""
    if value.startswith("["):
        entries = [entry for entry in value[1:-1].split(",") if entry.strip()]
        return _read_value(entries[0].strip(), options) if len(entries) == 1 else None
    return _read_answer(value.strip("\"' "), options)


def _without_echo(text: str, options: _Options) -> str:
    """The text without a list of all options that repeats the question."""
    items = list(_ITEM.finditer(text))
    need = len(options.letters)
    if need < 2 or len(items) < need:
        return text
    for start in range(len(items) - need + 1):
        run = items[start : start + need]
        if "".join(item[1].upper() for item in run) != options.letters:
            continue
        end = text.find("\n", run[-1].end())
        end = len(text) if end < 0 else end
        bounds = [item.start() for item in run[1:]] + [end]
        bodies = [text[item.end() : bound] for item, bound in zip(run, bounds, strict=True)]
        own = [options.by_text.get(_key(body)) == letter for body, letter in zip(bodies, options.letters, strict=True)]
        if all(own) or not any(_DENIAL.search(body) or _CORRECT_AFTER.match(body) for body in bodies):
            return f"{text[: run[0].start()]}\n{text[end:]}"
    return text


def _read_claims(text: str, options: _Options) -> Iterator[_Claim]:
    """What the clauses of a text say of letters, in order; denied letters are no claims."""
    order = 0
    for segment in _split(text):
        denied = hedged = corrects = False
        for index, clause in enumerate(_CLAUSE.split(segment)):
            if not clause or clause.isspace():
                continue
            order += 1
            corrects = corrects or bool(_CORRECTION.match(clause))
            letters = list(_find_letters(clause, options))
            is_bare = bool(letters) and _is_bare(clause)
            if not (is_bare and index):
                denied = _is_denied(clause)
                hedged = bool(_HEDGE.search(clause)) or (bool(_SUBORDINATE.match(clause)) and ":" not in clause)
            if denied:
                continue
            for match in letters:
                strength = _HEDGED if hedged else _ALONE if is_bare else _weigh(clause, match)
                if strength:
                    yield _Claim(match[1].upper(), strength, order, corrects)


def _split(text: str) -> Iterator[str]:
    """Sentences. The full stop behind a letter that opens a sentence ("A. text") does not end it."""
    start = 0
    for mark in _BREAK.finditer(text):
        if mark[0] == "." and _BARE.fullmatch(text, start, mark.start()):
            continue
        if mark.start() > start:
            yield text[start : mark.start()]
        start = mark.end()
    if start < len(text):
        yield text[start:]


def _is_denied(clause: str) -> bool:
    if not _DENIAL.search(clause):
        return False
    return _DENIAL.search(_NOT_DENIAL.sub(" ", clause)) is not None


def _is_bare(clause: str) -> bool:
    """Whether a clause has letters and words like "option" alone."""
    return not any(len(word) > 1 for word in re.findall(r"\w+", _LABELS.sub(" ", clause)))


def _find_letters(clause: str, options: _Options) -> Iterator[re.Match[str]]:
    """Letters of options in a clause, without the words "a" and "I"."""
    for match in _LETTER.finditer(clause):
        letter = match[1]
        if letter.upper() not in options.letters:
            continue
        before, after = clause[max(0, match.start() - 24) : match.start()], clause[match.end() : match.end() + 24]
        if letter.islower() and not _is_named(before, after, letter):
            continue
        if (
            letter == "A"
            and not (_AFTER_A.match(after) or _AFTER_A_MODAL.match(after))
            and not _EXPLICIT_BEFORE.search(before)
        ):
            continue
        if letter == "I" and not _AFTER_A.match(after):
            continue
        yield match


def _is_named(before: str, after: str, letter: str) -> bool:
    """Whether a small letter is an option's: in brackets, behind "option" or "answer", or at the end behind a link."""
    if re.match(r"[)\]]", after) and (re.search(r"[(\[]$", before) or not before.strip()):
        return True
    if not before.strip(" \"'-#>") and re.match(r"[.:]|\s*$| is\b", after) and letter not in "ai":
        return True
    if not before.strip() and _CORRECT_AFTER.match(after):
        return True
    is_end = not after.strip(" .\"')")
    return (is_end or letter not in "ai") and bool(_EXPLICIT_BEFORE.search(before) or _LINK_BEFORE.search(before))


def _weigh(clause: str, match: re.Match[str]) -> int:
    """How strongly a clause that neither denies nor hedges says that the letter is the answer; 0 if it does not."""
    before, after = clause[max(0, match.start() - 96) : match.start()], clause[match.end() : match.end() + 64]
    if _EXPLICIT_BEFORE.search(before):
        return _FINAL if _FINAL_WORD.search(before) else _EXPLICIT
    if _CORRECT_AFTER.match(after):
        return _EXPLICIT
    if _FINAL_WORD.search(before) and before.rstrip(" \"'([").endswith(":"):
        return _FINAL
    is_start = not before.strip(" \t\"'([{<*_#>-✅") or bool(
        re.fullmatch(r"[\W\d_]*(?:option|choice|opt\.?)?[\W_]*", before, re.IGNORECASE)
    )
    if _FITS_AFTER.match(after) and (is_start or _LINK_BEFORE.search(before)):
        return _JUDGED
    if _CONCLUSION.match(before) and _LINK_BEFORE.search(before):
        return _JUDGED
    is_end = not after.strip(" \t.\"')]}>*_")
    if is_end and (is_start or _LINK_BEFORE.search(before)):
        return _ALONE
    return (
        _ALONE
        if (is_start and re.match(r"\s*[.):\]},\u3001-]", after))
        or (is_start and re.match(r"\s*[\u4e00-\u9fff(]", after))
        else 0
    )


def _decide(claims: list[_Claim]) -> str | None:
    """The letter that the strongest claims agree on; a correction takes back what was claimed before it."""
    corrections = [index for index, claim in enumerate(claims) if claim.corrects and claim.strength > _HEDGED]
    if corrections:
        order = claims[corrections[-1]].order
        claims = [claim for claim in claims if claim.order >= order]
    best = max(claim.strength for claim in claims)
    letters = {claim.letter for claim in claims if claim.strength == best}
    return letters.pop() if len(letters) == 1 else None


def _find_text(text: str, options: _Options) -> str | None:
    """The letter of the only option whose text is in a reply, None where it has several, denies it or refuses."""
    if options.is_yes_no:
        stated = read_yes_no(text)
        keys = {True: ("yes", "是"), False: ("no", "否"), None: ()}[stated]
        return next((options.by_text[key] for key in keys if key in options.by_text), None)
    words = f" {_key(text)} "
    longest_first = sorted(options.by_text, key=len, reverse=True)
    rest, named = words, []
    for key in longest_first:
        if f" {key} " in rest:
            named.append(key)
            rest = rest.replace(f" {key} ", " | ")
    if len(named) > 1:
        cue = max((match.end() for match in _TEXT_CUE.finditer(text)), default=None)
        tail = "" if cue is None else f"{_key(text[cue:])} "
        return next((options.by_text[key] for key in longest_first if tail.startswith(f"{key} ")), None)
    if not named or _REFUSAL.search(text):
        return None
    before = words[: words.index(f" {named[0]} ")].split()[-3:]
    return None if any(word in _NOT or word.endswith("n't") for word in before) else options.by_text[named[0]]
