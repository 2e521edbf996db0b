"""What the XML formats share: elements with text that XML allows, and the file with its declarations."""

from __future__ import annotations

import re
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from keye.files import MARK

#: What no XML 1.0 file may hold, escaped or not.
_FORBIDDEN = re.compile(r"[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def clean(text: object) -> str:
    """Text without characters that XML forbids."""
    return _FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", str(text))


def add(parent: Element, tag: str, text: object = None, /, **attributes: object) -> Element:
    """Adds an element with its text and attributes; attributes that are None are left out."""
    element = SubElement(parent, tag, {name: clean(value) for name, value in attributes.items() if value is not None})
    if text is not None:
        element.text = clean(text)
    return element


def document(root: Element, doctype: str) -> str:
    """The file: declaration, type, a mark that keye wrote it, the elements indented."""
    ElementTree.indent(root)
    body = ElementTree.tostring(root, encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n<!DOCTYPE {doctype}>\n<!-- {MARK} -->\n{body}\n'
