"""What the clauses of a reply say of the letters of options.

A clause says that a letter is the answer (`EXPLICIT`, or `FINAL`), that it is right or fits (`JUDGED`), nothing but the
letter itself (`ALONE`), that it may be (`HEDGED`), or denies it and so makes no claim. Knows no options' texts.
Linear in the text's length: whatever is searched around a letter is cut to some dozen characters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from keye.scoring.strict.plain import any_of

HEDGED, ALONE, JUDGED, EXPLICIT, FINAL = 1, 2, 3, 4, 5

_W = "A-Za-z0-9_\u00c0-\u024f\u0370-\u04ff"
_LETTER = re.compile(
    rf"(?<![{_W}.&/\\@#^-])(?<![{_W}]')(?<!\d )([A-Za-z])(?![{_W}&+#^\\\u00b0]|=(?!\s?(?:true|false|yes|no"
    rf"|right|wrong)\b)|'[A-Za-z]|[-.:][A-Za-z0-9]"
    rf"|\. ?[A-Za-z]\.)"
)
_JOINED = re.compile(rf"(?<![{_W}/])(?!N/A)([A-Za-z])\s?(?:[/&+|]|->)\s?(?=[A-Za-z](?![{_W}]))")
#: "OptionB", "answer-B", and the names of the sides of a dialogue.
_GLUED = re.compile(rf"\b((?i:option|choice|answer|opt|ans))[-_#]?([A-Z])(?![{_W}])")
_DIALOGUE = re.compile(r"\bQ\d{0,3}[:.](.{0,2000}?)\bA\d{0,3}:", re.DOTALL)
_ALL_BUT = re.compile(r"\b((?i:all|anything|everything|nothing|none|every option)) but\b")
_BREAK = re.compile(r"\n+|[;!?\u3002]+|\.{2,}|(?<=[\w)\]}\"'%])\.(?=[\"')\]]?(?:\s|$))")
_OPENS_WITH_LETTER = re.compile(r"[\W_]*[A-Za-z]")

_LEADS = any_of(
    "but so thus hence therefore because since while whereas though although rather_than instead_of"
    " unlike yet which"
    " that_leaves leaving however even_if even_though"
)
_VERDICT = any_of("wrong right correct incorrect true false yes no")
_CLAUSE = re.compile(
    rf"[,、]+\s*(?:and |or )?|(?<=[\w)][\w)])\s+[-·]+>?\s+|->"
    rf"|(?<=[\w)\]'\"])\s+[(\[](?!{_VERDICT}\b)(?=[A-Za-z]{{2}}|I )"
    rf"|\s+(?={_LEADS}\b)|\s+(?=not\s+(?:option |choice )?[(\"']?[A-Za-z](?![{_W}]))"
    rf"|(?<=[A-Za-z0-9\u4e00-\u9fff])(?=因为|而不是|而是|所以|因此)",
    re.IGNORECASE,
)
_SUBORDINATE = re.compile(
    r"[\s\"'(]*(?:"
    + any_of(
        r"because since as(?!_(?:such|a_result)) while whereas though although even_if even_though unlike if when"
        r" whether which compared besides apart_from"
    )
    + r"\b|因为|由于|虽然|如果|与)",
    re.IGNORECASE,
)
_DENIAL = re.compile(
    r"\b"
    + any_of(
        r"not never neither nor cannot no no_longer \w{2,6}n't rather_than instead_of wrong incorrect false untrue"
        r" exclud(?:e[sd]?|ing) eliminat(?:e[sd]?|ing) rul(?:e[sd]?|ing)_out impossible implausible unlikely"
        r" contradict(?:s|ed)?"
        r" discard(?:ed)? dismiss(?:ed)? reject(?:ed)? invalid irrelevant distractors? less worse fails? lacks? except"
    )
    + r"\b|不|错|排除|非|否|没有|未|✗|✘|❌|\u00d7",
    re.IGNORECASE,
)
_NOT_DENIAL = re.compile(
    r"\b"
    + any_of(
        "no_doubt no_question no_other no_problem not_only not_wrong nothing_else none_other_than can't_be_wrong"
        " cannot_be_anything_(?:but|other_than)"
    )
    + r"\b|不仅|不难|无疑|不错|是否",
    re.IGNORECASE,
)
_HEDGE = re.compile(
    r"\b"
    + any_of(
        "could might may maybe perhaps possibl[ey] either candidates? options choices answers_are plausible"
        " tempting between among out_of"
        " initially at_first first_(?:guess|thought|impression) thought considered seemed looked one_of whether"
    )
    + r"\b|可能|或许|也许|要么",
    re.IGNORECASE,
)
_CORRECTION = re.compile(
    r"[\s\"'(\-]*(?:(?:oh|hmm+|but|and|well|ah|no)[\s,]+)*(?:"
    + any_of(
        r"wait actually oops my_(?:mistake|bad) i_meant correction on_second_thoughts? on_reflection sorry"
        r" scratch_that let_me_(?:re"
        r"|correct)\w* in_fact"
        r" after_re\w* after_checking instead(?!_of) i_(?:was|am)_wrong i_made checking_again looking_again"
        r" re-?checking"
    )
    + r"\b|no(?=\s*(?:[,.!:-]|$))|不对|等等|更正|重新|其实)",
    re.IGNORECASE,
)
_TURN = re.compile(
    r"[\s\"'(]*"
    + any_of("but however so thus hence therefore finally ultimately in_the_end overall")
    + r"\b|[所因]|最终",
    re.IGNORECASE,
)

ANSWER_NOUN = any_of(
    "answers? choice option selection ans solution conclusion response result letter pick guess verdict"
    " prediction decision"
    " r\u00e9ponse respuesta resposta antwort risposta opci\u00f3n op\u00e7\u00e3o option ответ"
    " jawaban\\w* cevap odpowied\u017a \u0111\u00e1p_\u00e1n lettre letra"
    " 정답 답 答え 正解 答案 选项 选择 答 \u0627\u0644\u0625\u062c\u0627\u0628\u0629"
    " \u0627\u0644\u062c\u0648\u0627\u0628 \u0909\u0924\u094d\u0924\u0930 \u0e04\u0e33\u0e15\u0e2d\u0e1a"
)
COPULA = (
    r"(?:\bis|\bbe|\bwas|'s|\bare|:|=|>|\best|\bes|\bist|\b\u00e9|\b\u00e8|은|는|は|是|为|应为|应该是|应选"
    r"|选|\badalah|\bl\u00e0|\u0647\u0648|\u0647\u064a)"
)
_ADVERB = any_of(
    "clearly definitely therefore thus most_likely likely probably simply then still actually indeed just"
    " now really hence"
    " certainly surely obviously likely_to_be to_be have_to_be given_by"
)
_NAME = (
    r"(?:(?:the |an? |la |el |die |das )?(?:option|choice|letter|answer|number|statement|opci\u00f3n|letra"
    r"|lettre)[\s:]*)"
)
_OPENING = r"[\s\"'(\[\])<{*_#>|]*"
_EXPLICIT_BEFORE = re.compile(
    r"(?:"
    rf"{ANSWER_NOUN}[^.;?!\n]{{0,48}}?{COPULA}\s*(?:{_ADVERB}[\s:]*)*(?:la |el |a |o )?{_NAME}?"
    r"|\b(?:final |correct |right |best |my )*(?:answer|ans|answer choice)\.?\s*"
    rf"|\b(?:it|this|that)(?:'s| is| must be| has to be| should be| would be)\s*(?:{_ADVERB}\s*)*{_NAME}?"
    r"|\bi(?:'d| would| will|'ll|'m| am)?\s*(?:(?:also|still|have to|therefore|would|rather|finally|now)\s+)*"
    r"(?:choose|pick|take|prefer|select|say|mean|meant|guess|answer|go(?:ing)? (?:with|for)|vote for|opt"
    r" for|think|believe|chose"
    r"|picked|selected"
    r"|lean(?:ing)? towards?|settle (?:on|for))"
    rf"\s*(?:(?:that )?(?:it(?:'s| is)|the answer(?:'s| is))\s*)?{_NAME}*"
    rf"|\b(?:choose|select|pick|prefer|choosing|selecting|picking|go(?:ing)? (?:with|for))\s*{_NAME}*"
    rf"|\b(?:must|has to|have to|should|got to) be\s*{_NAME}?"
    r"|\b(?:je choisis|ich w\u00e4hle|elijo|escolho|scelgo|выбираю)\s*|选(?:择|项)?(?:了|的是)?[\s:]*"
    r"|答案[\s:]*|本题[\s:]*"
    rf"){_OPENING}$",
    re.IGNORECASE,
)
_FINAL_WORD = re.compile(r"\b(?:final(?:ly)?|conclusion|conclude|in summary|overall)\b|最终|综上|结论", re.IGNORECASE)
_CONCLUSION = re.compile(
    r"[\s\"'(]*(?:"
    + any_of("so thus hence therefore consequently then accordingly that_leaves leaving which_leaves")
    + r"\b|∴|故|所以|因此)",
    re.IGNORECASE,
)
_LINK_BEFORE = re.compile(
    r"(?:\b"
    + any_of(
        r"so thus hence therefore then gives yields is leaves leaving as to like towards? on suggests?"
        r" indicates? supports?"
        r" favou?rs? prefer means with only option choice letter opt\.? select statement answer item remains?"
        r" selected chosen"
        r" namely be"
    )
    + rf"|[:=>∴→✅]|[故选项是为知得即应]){_OPENING}$",
    re.IGNORECASE,
)
_LIKELY_BEFORE = re.compile(
    r"\b"
    + any_of(
        "most_likely likely probably definitely certainly surely clearly obviously absolutely undoubtedly"
        " finally ultimately"
    )
    + rf"\s*{_NAME}?{_OPENING}$",
    re.IGNORECASE,
)
_LINK_VERB = (
    r"(?:is|was|are|would be|must be|should be|seems?(?: to be)?|looks?|has to be|will be|being"
    r"|appears?(?: to be)?|:|=|-+>?)?\s*"
    r"(?:(?:clearly|indeed|therefore|definitely|thus|the most|most|more|probably|likely|also|still"
    r"|actually) )*(?:the )?(?:only )?"
)
_CORRECT_AFTER = re.compile(
    rf"[\s\"'()\[\]}}.,:>\-]*(?:{_LINK_VERB}"
    + any_of(
        "correct right best better not_wrong true answer yes accurate one winner my_(?:final_)?(?:answer|choice|pick)"
    )
    + (
        r"\b|\s*(?:[✓✔✅]|it is\b)|\s+(?:is|does)\s*$|\s*(?:is|seems|looks) (?:the )?most (?:plausible|likely"
        r"|probable)\b"
        r"|\s*(?:选?项)?(?:是|才是|最|更|为)?(?:正确|对|符合|合适|合理|答案)|\s*が正)"
    ),
    re.IGNORECASE,
)
_WRONG_AFTER = re.compile(
    rf"[\s\"'()\[\]}}.,:>\-]*(?:{_LINK_VERB}(?:not\b(?! (?:wrong|incorrect|false)\b)|wrong|incorrect|false"
    rf"|no\b|untrue|excluded|out\b"
    rf"|impossible)|\s*[✗✘❌\u00d7]|\s*选?项?(?:是)?(?:错|不))",
    re.IGNORECASE,
)
_FITS_AFTER = re.compile(
    r"[\s\"')\]}]*(?:(?:best|clearly|most|accurately|correctly|closely|alone|also|only|still|better) )*"
    + any_of(
        "fits? match(?:es)? describes? remains? agrees? corresponds? happening happens seems applies wins"
        " stands works holds"
        " captures? reflects? summari[sz]es aligns? makes_(?:the_most_)?sense"
        " is_(?:supported|consistent|shown|what|left|more_likely|most_likely|likely|chosen|selected)"
    )
    + r"\b|\s*(?:最?符合)",
    re.IGNORECASE,
)
#: What may follow a capital A or I that names an option and is not the English word.
_AFTER_NAME = re.compile(
    r"\s*(?:$|[^\w\s]|[^\x00-\x7f]|"
    + any_of(
        r"is was isn't fits? match(?:es)? best seems appears looks describes shows happens mentions claims"
        r" says states contradicts"
        r" does doesn't remains has nor because since rather instead alone applies wins works only makes"
        r" clearly correctly accurately"
        r" happening being while though as over with it_is (?:and|or|to|vs)_[B-J]\b [B-J]\b true false right"
        r" wrong correct incorrect yes no"
    )
    + r"\b)"
)
_AFTER_A = re.compile(
    r"\s*" + any_of("would could might may can must should cannot can't will and or but not here so") + r"\b"
)
_START = re.compile(
    r"[\W\d_]*(?:"
    + any_of("option choice opt\\.? letter statement answer maybe then yes ok okay sure but rather so and")
    + r"[\s\W]+){0,2}",
    re.IGNORECASE,
)
_ENDS_NAME = re.compile(
    r"\s*(?:[.):\]},、(-]|[\u4e00-\u9fff]|(?:because|since|as|with|due|based|for|on the basis|over|beats|than"
    r"|instead|rather|not)\b)",
    re.IGNORECASE,
)
_ENDS_CLAUSE = re.compile(
    r"[\s.\"')\]}>*_:,」]*(?:です|だ|番|번?입니다|번|이다|\(?\d{1,3}\s?%\)?|"
    + any_of(
        "to_me here then instead for_me for_sure i_think i_guess i_believe i_would_say in_my_(?:opinion|view) indeed"
    )
    + r"[\s.]*)?$",
    re.IGNORECASE,
)
_LABELS = re.compile(
    r"\b"
    + any_of("the option options choice choices letter letters both either and or maybe statement statements to")
    + r"\b|选项|项|和|或者?|还是|以?及|与",
    re.IGNORECASE,
)
_WORDS = re.compile(r"[^\W_]{2,}|[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
_ITEM = re.compile(r"[\W_]*(?:option |choice )?[(\[]?([A-Za-z])(?:[.):\]]+|\s+-)\s+(?=\S)", re.IGNORECASE)
_SUBJECTS = re.compile(
    r"[\s(\"']*(?:option |choice )?\(?[A-Za-z]\)?(?: (?:and|or) \(?[A-Za-z]\)?){0,9}\s*(?:\s"
    + any_of("are were do don't can cannot can't never have all both none fail seem look appear contradict")
    + r"\b|都|均|错|不)"
)
_UNCHECKED = re.compile(r"\[ \]|☐")
_RIGHT = re.compile(
    r"\b" + any_of("correct yes true right match(?:es)? fits?") + r"\b|\[x\]|[✓✔✅☑对]|正确|符合", re.IGNORECASE
)
_EXCEPT = re.compile(
    rf"(?:\b(?:except|other than|apart from|besides)(?: for)?\s*{_NAME}?|除了?){_OPENING}$", re.IGNORECASE
)
#: What is said of all the others in "all except B are wrong".
_OTHERS = re.compile(
    r"\b" + any_of("none nothing no not wrong incorrect false \\w{2,6}n't excluded eliminated") + r"\b|不|错",
    re.IGNORECASE,
)
#: A letter behind these words is the one that is not chosen.
_OVER_BEFORE = re.compile(
    r"\b"
    + any_of("(?<!other\\s)than over beats instead_of as_opposed_to not unlike vs\\.? versus prefer\\w*_\\S{1,3}_to")
    + rf"\s+{_NAME}?{_OPENING}$",
    re.IGNORECASE,
)
_INTENTION = re.compile(
    (r"\b(?:was|were) (?:about|going|tempted|inclined) to\b|\balmost\b|\bwould have\b"), re.IGNORECASE
)
_MOST_LIKELY = re.compile(r"\bmost (?:plausible|likely|probable|possible)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Claim:
    """What a clause says of a letter. `order` counts clauses, `sentence` sentences; `corrects` says that it takes back
    what came before."""

    letter: str
    strength: int
    order: int
    sentence: int
    corrects: bool


@dataclass
class _Context:
    """What a clause of nothing but letters takes over from the clause before it."""

    is_denied: bool = False
    is_hedged: bool = False
    strength: int = 0


def read_claims(text: str, letters: str) -> Iterator[Claim]:
    """What the clauses of a plain text say of `letters`, in order; denied letters are no claims."""
    if "Q" in text:
        text = _DIALOGUE.sub(r" Question:\1 Answer: ", text, count=1)
    text = _ALL_BUT.sub(r"\1 except", text)
    segments = list(_split(_JOINED.sub(r"\1, ", _GLUED.sub(r"\1 \2", text))))
    items = [match[1].upper() if (match := _ITEM.match(segment)) else "" for segment, _ in segments]
    is_list = len({item for item in items if item and item in letters}) > 1
    order, corrects = 0, False
    for sentence, ((segment, is_question), item) in enumerate(zip(segments, items, strict=True)):
        if _CORRECTION.match(segment):
            corrects = True
        if not _LETTER.search(segment):
            continue
        if is_list and item and item in letters:
            order += 1
            if strength := _judge_item(segment):
                yield Claim(item, strength, order, sentence, corrects)
            continue
        context = _Context()
        clauses = _CLAUSE.split(segment)
        if len(clauses) > 1:
            clauses = _join_subjects(clauses)
        for clause in clauses:
            if not clause or clause.isspace():
                continue
            order += 1
            corrects = corrects or bool(_CORRECTION.match(clause))
            for letter, strength in _read_clause(clause, letters, context):
                if is_question:
                    strength = HEDGED
                is_turn = strength >= EXPLICIT and bool(_TURN.match(clause) or _TURN.match(segment))
                yield Claim(letter, strength, order, sentence, corrects or is_turn)
                corrects = False


def _join_subjects(clauses: list[str]) -> list[str]:
    """Clauses in which several letters that are the subject of one sentence ("A, C and D are wrong") stand together."""
    joined: list[str] = []
    for clause in reversed(clauses):
        if joined and _SUBJECTS.match(joined[-1]) and clause.strip() and not _WORDS.search(_LABELS.sub(" ", clause)):
            joined[-1] = f"{clause.rstrip()} and {joined[-1].lstrip()}"
        else:
            joined.append(clause)
    return joined[::-1]


def _judge_item(segment: str) -> int:
    """What a line of a list of options says of its own."""
    if _is_denied(segment) or _UNCHECKED.search(segment):
        return 0
    return EXPLICIT if _RIGHT.search(segment) else ALONE


def _split(text: str) -> Iterator[tuple[str, bool]]:
    """Sentences, and whether each is a question. The full stop behind a letter that opens a sentence ("A. text") does
    not end it."""
    start = 0
    for mark in _BREAK.finditer(text):
        if mark[0] == "." and mark.start() - start < 12 and _OPENS_WITH_LETTER.fullmatch(text, start, mark.start()):
            continue
        if mark.start() > start:
            yield text[start : mark.start()], "?" in mark[0]
        start = mark.end()
    if start < len(text):
        yield text[start:], False


def _read_clause(clause: str, letters: str, context: _Context) -> Iterator[tuple[str, int]]:
    """The letters that a clause does not deny, with the strength of what it says; updates the context."""
    matches = list(_find_letters(clause, letters))
    if not matches:
        if _WORDS.search(clause):
            context.strength, context.is_denied, context.is_hedged = 0, False, False
        return
    is_list = not _WORDS.search(_LABELS.sub(" ", clause))
    inherits = is_list and (context.is_denied or context.is_hedged or context.strength > 0)
    if not inherits:
        correction = _CORRECTION.match(clause)
        context.is_denied = _is_denied(clause[correction.end() :] if correction else clause)
        context.is_hedged = _is_hedged(clause)
        context.strength = 0
    strength = context.strength
    for index, match in enumerate(matches):
        end = matches[index + 1].start() if index + 1 < len(matches) else len(clause)
        previous = clause[matches[index - 1].end() : match.start()] if index else ""
        if _OVER_BEFORE.search(clause[max(0, match.start() - 32) : match.start()]):
            continue
        is_joined = bool(index) and not _WORDS.search(_LABELS.sub(" ", previous))
        if not (inherits or is_joined):
            strength = _weigh(clause, match, end, context, is_list)
        if strength:
            context.strength = strength
            yield match[1].upper(), strength
    if _WORDS.search(clause, matches[-1].end()):  # a list of letters would end with one
        context.strength, context.is_denied, context.is_hedged = 0, False, False


def _weigh(clause: str, match: re.Match[str], end: int, context: _Context, is_list: bool) -> int:
    """How strongly a clause says that a letter is the answer; 0 if it says nothing of that or denies it."""
    before, after = clause[max(0, match.start() - 96) : match.start()], clause[match.end() : min(end, match.end() + 64)]
    if context.is_denied and _EXCEPT.search(before):
        return EXPLICIT if _OTHERS.search(clause) else 0
    if _WRONG_AFTER.match(after):
        context.is_denied = True
        return 0
    if context.is_denied:
        is_verdict = _CORRECT_AFTER.match(after) and not _DENIAL.search(before[-5:])
        return EXPLICIT if is_verdict and _WRONG_AFTER.search(clause) else 0
    if context.is_hedged:
        return HEDGED
    if is_list:
        return ALONE
    if _EXPLICIT_BEFORE.search(before):
        return FINAL if _FINAL_WORD.search(before) else EXPLICIT
    if _FINAL_WORD.search(before) and before.rstrip(" \"'([").endswith(":"):
        return FINAL
    is_start = bool(_START.fullmatch(before))
    has_link = is_start or bool(_LINK_BEFORE.search(before))
    if _CORRECT_AFTER.match(after) and (has_link or len(before) < 40):
        return EXPLICIT
    if (_FITS_AFTER.match(after) and has_link) or _LIKELY_BEFORE.search(before):
        return JUDGED
    if _CONCLUSION.match(before) and has_link:
        return JUDGED
    is_end = bool(_ENDS_CLAUSE.match(after))
    is_bracketed = before.endswith("(") and after.startswith(")")
    if is_end and (has_link or is_bracketed):
        return ALONE
    return ALONE if is_start and _ENDS_NAME.match(after) else 0


def _is_hedged(clause: str) -> bool:
    if _SUBORDINATE.match(clause) and ":" not in clause:
        return True
    if _INTENTION.search(clause):
        return True
    return bool(_HEDGE.search(clause)) and _HEDGE.search(_MOST_LIKELY.sub(" ", clause)) is not None


def _is_denied(clause: str) -> bool:
    return bool(_DENIAL.search(clause)) and _DENIAL.search(_NOT_DENIAL.sub(" ", clause)) is not None


def _find_letters(clause: str, letters: str) -> Iterator[re.Match[str]]:
    """Letters of options in a clause, without the words "a" and "I"."""
    for match in _LETTER.finditer(clause):
        letter = match[1]
        if letter.upper() not in letters:
            continue
        before, after = clause[max(0, match.start() - 32) : match.start()], clause[match.end() : match.end() + 24]
        if letter.islower():
            is_name = _is_named(before, after, letter)
        elif letter == "A":
            is_name = bool(_AFTER_NAME.match(after) or _AFTER_A.match(after) or _EXPLICIT_BEFORE.search(before))
        else:
            is_name = letter != "I" or bool(_AFTER_NAME.match(after))
        if is_name:
            yield match


def _is_named(before: str, after: str, letter: str) -> bool:
    """Whether a small letter is an option's: in brackets, behind "option" or "answer", or at the end behind a link."""
    if re.match(r"[)\]]", after) and (before.endswith(("(", "[")) or not before.strip()):
        return True
    if not before.strip(" \"'-#>") and re.match(r"[.:]|\s*$| is\b", after) and letter not in "ai":
        return True
    if not before.strip() and _CORRECT_AFTER.match(after):
        return True
    is_end = not after.strip(" .\"')")
    return (is_end or letter not in "ai") and bool(_EXPLICIT_BEFORE.search(before) or _LINK_BEFORE.search(before))
