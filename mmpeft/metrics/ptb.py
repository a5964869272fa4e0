"""Penn-Treebank-like tokens for caption metrics, without Java.

Caption scores (CIDEr, BLEU, ROUGE-L) are reported on the tokens of Stanford's PTBTokenizer (CoreNLP 3.4.1, lower-cased,
most punctuation dropped), which is a Java program. These rules reproduce its output on ordinary captions; tests/metrics
holds
recorded output of the program, quirks included: brackets survive as -lrb- and the like, because they are lower-cased
before the upper-case names are dropped, and so do "??" and "!!", which are not on the list of what is dropped.

Not reproduced: multi-word quantities, SGML, letters of a date, rare clitics ("jack-o'-lantern").
"""

from __future__ import annotations

import re
from functools import lru_cache

#: dropped after tokenising; a mark that is not listed (and any lower-cased bracket name) stays
PUNCTUATION = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])

_ABBREVIATIONS = """
mr mrs ms dr prof st jr sr vs etc ave blvd rd inc ltd co corp bros gen gov sen rep sgt capt lt col
jan feb mar apr jun jul aug sep sept oct nov dec mt ft al dept est fig approx
"""
_BRACKETS = dict(zip("()[]{}", ["-lrb-", "-rrb-", "-lsb-", "-rsb-", "-lcb-", "-rcb-"], strict=True))
#: words that PTB cuts in two, and where
_CUTS = {"cannot": 3, "gonna": 3, "gotta": 3, "wanna": 3, "lemme": 3, "gimme": 3, "'tis": 2, "'twas": 2}

_LETTER = r"[^\W\d_]"
_RULES: list[tuple[str, str]] = [
    ("url", r"https?://\S+|www\.[^\s)]+?(?=[.,;!?)]*(?:\s|$))"),
    ("email", r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+"),
    ("handle", rf"[@#]{_LETTER}\w*"),
    ("ellipsis", r"\.{3,}|…"),
    ("acronym", rf"(?<!\w)(?:{_LETTER}\.){{2,}}"),
    ("initial", r"(?<!\w)[A-Z]\.(?=\s+\S)"),
    ("abbreviation", rf"(?<!\w)(?:{'|'.join(_ABBREVIATIONS.split())})\.(?!\w)"),
    ("number", r"(?<!\w)no\.(?=\s*\d)"),
    ("archaic", r"(?<!\w)'(?:tis|twas)(?!\w)"),
    ("negated", rf"(?:{_LETTER})+?(?=n't(?!\w))|n't(?!\w)"),
    ("clitic", r"'(?:s|m|d|ll|ve|re|n)(?!\w)"),
    ("elided", rf"(?<!\w)(?:[dloDLO]'{_LETTER}{{2,}}|ma'am)"),
    ("signed", r"(?<![\w)])[-+]\d+(?:[.,:/]\d+)*(?!\w)"),
    ("word", r"\w+(?:[-./]\w+|,\d{3}(?!\d)|:\d+)*"),
    ("shouts", r"[?!]{2,}"),
    ("dash", r"-{2,}|[–—]"),
    ("other", r"\S"),
]
_TOKEN = re.compile("|".join(f"(?P<{name}>{rule})" for name, rule in _RULES), re.IGNORECASE)
_PLAIN = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "\u00a0": " "})
_DROPPED_KINDS = frozenset(["ellipsis", "dash"])


@lru_cache(maxsize=100_000)
def tokenize(text: str) -> tuple[str, ...]:
    """Lower-cased tokens of a caption, punctuation dropped.

    >>> tokenize("A man's riding (2) horses, isn't he?")
    ('a', 'man', "'s", 'riding', '-lrb-', '2', '-rrb-', 'horses', 'is', "n't", 'he')
    """
    tokens: list[str] = []
    for match in _TOKEN.finditer(text.translate(_PLAIN)):
        token = match.group().lower()
        if match.lastgroup in _DROPPED_KINDS or token in PUNCTUATION or token == '"':
            continue
        if token in _CUTS:
            tokens += [token[: _CUTS[token]], token[_CUTS[token] :]]
        else:
            tokens.append(_BRACKETS.get(token, token))
    return tuple(tokens)
