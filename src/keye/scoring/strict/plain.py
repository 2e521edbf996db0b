"""Replies as plain text: one form of every character, without mark-up of Markdown, LaTeX and HTML."""

from __future__ import annotations

import html
import re
import unicodedata


def any_of(words: str) -> str:
    """A pattern of any of the words (or patterns) that spaces divide; an underscore stands for spaces within one."""
    return "(?:" + "|".join(word.replace("_", r"\s") for word in words.split()) + ")"


#: So many characters are read at each end of a long reply.
_END = 5_000
_SPECIAL = re.compile(r"<\|[^<>|\n]{1,40}\|>|</?s>|\[/?[A-Z]{3,12}\]")
_HTML = re.compile(
    r"</?(?:b|i|u|p|em|strong|br|hr|span|div|code|pre|sub|sup|li|ul|ol|td|tr|th|h[1-6]|[a-z][a-z_]{2,24})"
    r"(?:\s[^<>\n]{0,80})?/?>"
)
_LATEX_FONT = re.compile(
    r"\\(?:text|textbf|textit|textrm|texttt|mathrm|mathbf|mathit|mathsf|mathbb|mathcal|operatorname|bm|mbox|emph"
    r"|underline)\s?\{([^{}]{0,400})\}"
)
_LATEX_SPACE = re.compile(r"\\(?:[,;:! ]|(?:quad|qquad|left|right|displaystyle)(?![A-Za-z]))")
_LATEX_MATH = re.compile(r"\\[()\[\]]|\${1,2}")
_INVISIBLE = re.compile("[\u200b-\u200f\u2060-\u2064\ufeff\u00ad\ufe0f]")
_DASHES = str.maketrans("\u2010\u2011\u2012\u2013\u2014\u2015\u2212\u2500\u301c", "--------~")
_TRADITIONAL = str.maketrans(
    "應選擇項為對錯說認綜終結論確還無與開從間時鐘這個沒屬於總約誤",
    "应选择项为对错说认综终结论确还无与开从间时钟这个没属于总约误",
)
#: Letters in filled circles and squares, which have no plain form in Unicode.
_ENCLOSED = {start + index: chr(65 + index) for start in (0x1F150, 0x1F170) for index in range(26)}
_QUOTES = str.maketrans("\u2018\u2019\u201c\u201d\u00b4\u2032", "''\"\"''")


def to_ascii_forms(text: str) -> str:
    """Full-width, circled and other compatible forms of letters, digits and signs as their plain ones; digits of any
    script as 0 to 9; dashes, quotes and spaces in one form; no invisible characters."""
    if text.isascii():
        return text
    text = text.translate(_ENCLOSED)
    text = _INVISIBLE.sub("", unicodedata.normalize("NFKC", text)).translate(_DASHES).translate(_QUOTES)
    if text.isascii():
        return text
    return "".join(str(unicodedata.decimal(c)) if c > "\u00ff" and c.isdecimal() else c for c in text)


def remove_markup(text: str) -> str:
    """The text without special tokens, HTML tags and entities, LaTeX fonts and dollar signs, emphasis of Markdown."""
    if "&" in text:
        text = html.unescape(text).replace("\u00a0", " ")
    if "<" in text or "[" in text:
        text = _HTML.sub(" ", _SPECIAL.sub(" ", text))
    if "\\" in text:
        for _ in range(3):  # fonts within fonts
            text, count = _LATEX_FONT.subn(r"\1", text)
            if not count:
                break
        text = _LATEX_SPACE.sub(" ", text)
    if "$" in text or "\\" in text:
        text = _LATEX_MATH.sub(" ", text)
    if "*" in text:
        text = text.replace("*", "")
    return text.replace("`", "") if "`" in text else text


def to_plain(text: str) -> str:
    """`to_ascii_forms` and `remove_markup`."""
    return remove_markup(to_ascii_forms(text))


def shorten(text: str) -> str:
    """Both ends of a long reply: an answer stands at its start or at its end."""
    return text if len(text) <= 2 * _END else f"{text[:_END]}\n{text[-_END:]}"


def simplify_han(text: str) -> str:
    """The text with the traditional characters of words about answers and times as simplified ones."""
    return text if text.isascii() else text.translate(_TRADITIONAL)
