"""The words of a PDF that Chromium printed: enough of the format to say whether something is on paper."""

from __future__ import annotations

import re
import unicodedata
import zlib


def text_of(data: bytes) -> str:
    """Return the words of a PDF without blanks, in the order in which they were drawn."""
    objects = {int(n): body for n, body in re.findall(rb"(?:^|\n)(\d+) 0 obj\b(.*?)\bendobj", data, re.DOTALL)}
    fonts = {n: _letters(objects, body) for n, body in objects.items() if b"/ToUnicode" in body}
    words = []
    for body in objects.values():
        font: dict[int, str] = {}
        for number, glyphs in re.findall(rb"/F(\d+) [\d.]+ Tf|<([0-9A-Fa-f]+)> ?Tj", _stream(body)):
            if number:
                font = fonts.get(int(number), {})
            else:
                words += [font.get(int(glyphs[i : i + 4], 16), "?") for i in range(0, len(glyphs), 4)]
    return unicodedata.normalize("NFKC", "".join(words)).replace(" ", "")  # ligatures apart, hard blanks as blanks


def _stream(body: bytes) -> bytes:
    """Its length is given: looking for its end would take a last byte that happens to be a line's end for one."""
    found = re.search(rb"/Length (\d+)\b.*?>>\s*stream\r?\n", body, re.DOTALL)
    if found is None or b"/Image" in body or b"/FontFile" in body or b"/Length1" in body:
        return b""
    data = body[found.end() : found.end() + int(found[1])]
    return zlib.decompress(data) if b"/FlateDecode" in body else data


def _letters(objects: dict[int, bytes], font: bytes) -> dict[int, str]:
    """Return a font's letters by glyph, from its ToUnicode map."""
    found = re.search(rb"/ToUnicode (\d+) 0 R", font)
    assert found is not None
    stream, letters = _stream(objects[int(found[1])]), {}
    for block in re.findall(rb"beginbfchar(.*?)endbfchar", stream, re.DOTALL):
        for glyph, letter in re.findall(rb"<(\w+)>\s*<(\w+)>", block):
            letters[int(glyph, 16)] = bytes.fromhex(letter.decode()).decode("utf-16-be")
    for block in re.findall(rb"beginbfrange(.*?)endbfrange", stream, re.DOTALL):
        for first, last, letter in re.findall(rb"<(\w+)>\s*<(\w+)>\s*<(\w+)>", block):
            for at in range(int(first, 16), int(last, 16) + 1):
                letters[at] = chr(int(letter, 16) + at - int(first, 16))
    return letters
