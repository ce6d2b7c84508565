"""Penn Treebank tokens of captions, as the caption metrics of the field count them, without Java.

Caption scores are defined on the output of the Stanford PTBTokenizer of CoreNLP 3.4.1 (``-preserveLines -lowerCase``)
without a fixed list of punctuation. The rules here were written from that program's observed output, and tests compare
them with it. They cover captions in English: words, digits, quotes, contractions, hyphens, abbreviations, decimals,
addresses, currencies, faces, and each character of other scripts; rare combinations may come out differently.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from itertools import chain

from hpc_mm.ptb_characters import LETTERS, SYMBOLS, character_class

# What is left out after tokenising. Lower-cased brackets (-lrb-) are not on the list and stay, as in the reference.
DROPPED = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
# Single characters that the reference turns into one of those: quotation marks, dashes, an ellipsis.
QUOTES_AND_DASHES = "\u2018\u2019\u201b\u201c\u201d\u00ab\u00bb\u2039\u203a\u2010\u2011\u2013\u2014\u2026"
DROPPED |= frozenset('"' + QUOTES_AND_DASHES)

# Words that keep their full stop: in any case, with a capital only, before a number only.
ABBREVIATIONS = (
    "adj|adm|adv|al|ala|alex|apr|ariz|assn|assoc|asst|atty|attys|aug|ave|bancorp|bhd|bldg|blvd|brig|bros|calif|"
    "capt|cf|cie|cmdr|co|col|colo|comdr|conn|corp|cos|cpl|ct|dak|dec|dept|det|dr|drs|elec|ens|esq|est|etc|ext|feb|"
    "fla|fri|ft|ga|gen|gov|govs|hon|inc|ind|insp|intl|invt|jan|jos|jr|jul|jun|kan|kans|ky|lieut|lt|ltd|maj|mar|md|"
    "messrs|mfg|mich|minn|mlle|mme|mo|mon|mont|mr|mrs|ms|msgr|mt|mtg|natl|neb|nev|nov|oct|okla|penn|pfc|ph|plc|"
    "ppte|pptes|ppty|pptys|pres|prof|profs|pte|ptes|pty|ptys|pvt|rd|rep|reps|rev|rt|sen|sens|sep|sept|seq|sfc|sgt|"
    "spc|sq|sr|st|ste|supt|supts|sys|tel|tenn|thu|thurs|tue|tues|univ|va|vs|vt|wed|wis|wisc|wm|wyo"
)
CAPITAL_ABBREVIATIONS = (
    "A(?i:rk)|A(?i:z)|D(?i:el)|I(?i:ll)|L(?i:a)|M(?i:ass)|M(?i:iss)|O(?i:re)|P(?i:a)|T(?i:ex)|W(?i:ash)"
)
NUMBERED_ABBREVIATIONS = "ca|fig|figs|no|nos|op|pp|prop"

# Two words written as one.
JOINED = {
    "cannot": "can not",
    "gimme": "gim me",
    "gonna": "gon na",
    "gotta": "got ta",
    "lemme": "lem me",
    "wanna": "wan na",
    "'tis": "'t is",
    "'twas": "'t was",
}

# A single initial gives its full stop up where one of these begins the next sentence ("plan B. The ...").
SENTENCE_STARTS = (
    "A|About|According|Additionally|After|An|As|At|But|Earlier|He|Her|Here|However|If|In|It|Last|Many|More|Mr\\.|"
    "Ms\\.|Now|Once|One|Other|Our|She|Since|So|Some|Such|That|The|Their|Then|There|These|They|This|We|What|When|"
    "While|Yet|You"
)

ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&apos;": "'", "&nbsp;": "-"}
WRITTEN = {
    **{"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"},
    **{
        "£": "#",
        "€": "$",
        "¤": "$",
        "\u20a0": "$",
        "¢": "cents",
        "½": "1/2",
        "¼": "1/4",
        "¾": "3/4",
        "⅓": "1/3",
        "⅔": "2/3",
    },
}

L = f"[A-Za-z{character_class(LETTERS)}]"
N = rf"[A-Za-z\d{character_class(LETTERS)}]"  # a letter or a digit
Q = r"['\u2019]"  # an apostrophe
A = r"['`\u2018\u2019\u201b]"  # what some forms take for one
HOST = f"[a-z#%&*+~{character_class(LETTERS)}]"  # of addresses without www: capitals and digits are in words
WORD = rf"{L}{N}*"
WORDS = rf"{WORD}(?:[.!?]{WORD})*"
HYPHEN = r"[-\u2010\u2011]"
HYPHENED = (
    rf"[A-Za-z0-9][A-Za-z0-9.,]*(?:{HYPHEN}(?:[A-Za-z](?:\.[A-Za-z])+\.|[dDoOlL]{A}{L}{{2,}}|[A-Za-z0-9]+))+"
    rf"|{WORD}(?:{HYPHEN}{N}+)+"
)
TAG = r"<[/!?]?[A-Za-z][^<>\n]*>"
SUFFIX = rf"{Q}(?i:(?:s|m|d)(?![A-Za-z])|(?:ll|ve|re)(?=[^A-Za-z]))"  # the longer ones not at the end of the text
SPLIT_WORDS = "|".join(word for word in JOINED if word.isalpha())
FORMS = {  # in the order in which they are tried
    "bracket": r"-(?i:[lr][crs]b)-",
    "entity": "|".join([*ENTITIES, r"&\#\d+;"]),
    "capitals": r"[A-Z]+(?:[&+][A-Z]+)+",
    "underscored": r"[A-Za-z0-9]+(?:_[A-Za-z0-9]+)+",
    "tag": TAG,
    "url": r"(?i:https?)://[^\s\"<>|()]*[^\s\"<>|.!?(){},-]",
    "email": r"[a-zA-Z0-9][^\s\"<>|(){}@]*@(?:[^\s\"<>|(){}.@]+\.)*[^\s\"<>|(){}.@]+",
    "site": r"(?:(?i:www\.(?:[^\s\"<>|.!?(){},]+\.)+[a-z]{2,4})"
    rf"|(?:{HOST}+\.)+(?:com|net|org|edu))(?!\.?[^\W_])"
    r"(?:/[^\s\"<>|()]+[^\s\"<>|.!?(){},-])?",
    "handle": rf"@[A-Za-z_][A-Za-z_0-9]*|\#{L}+",
    "face": r"\([-^x=~<>'][_.]?[-^x=~<>']\)|\([\^x=~<>']-[\^x=~<>'`]\)|[-^x=~<>']_[-^x=~<>']",
    "smiley": r"[<>]?[:;=][-o*']?[()DPdpO@|\\{}\[\]](?=[^A-Za-z0-9])",
    "phone": r"\(\d{2,3}\)[ ]?(?:\d{2,4}[- ])?\d{3,4}[- ]?\d{3,5}"
    r"|(?=[\d-]+ \d)(?:\d{2,4}[- ])?\d{2,4}[- ]\d{3,4}[- ]?\d{3,5}",
    "slashed": r"\d{1,4}[- ]\d{1,4}/\d{1,4}|[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2}",
    "stopped": rf"(?:{HYPHENED}|{WORDS}|\d+)\.(?=[,;:])",
    "hyphened": HYPHENED,
    "negated": rf"{L}{N}*?(?=[nN]{A}[tT])",
    "suffixed": rf"{WORDS}(?={SUFFIX})|[yY]{Q}(?={L})",
    "joined": rf"(?:(?i:{SPLIT_WORDS})|'(?i:tis|twas))(?!{N})",
    "suffix": rf"{SUFFIX}|\u2019(?i:s|m|d|ll|ve|re)",
    "elided": rf"(?:[dDoOlL]{A}{WORD}|[A-HJ-XZn]{A}{L}{L}+|{L}+[aeiouyAEIOUY]{A}[aeiouA-Z]{L}*)"
    rf"|(?i:c'mon|s'mores|ev'ry|li'l|nat'l|e'er|nor'easter|c{Q}est)"
    rf"|{Q}(?i:em|till?|cause)|{Q}[nN](?:{Q}|(?!{L}))|{Q}[2-9]0[sS]|{Q}\d\d(?=\s|$)"
    rf"|(?i:dunkin|somethin|ol){Q}(?!{L})|[lLdDjJ]{Q}",
    "before_curly": rf"{WORDS}(?=\u2019(?i:s|m|d|ll|ve|re))",
    "negation": rf"[nN]{A}[tT]",
    "acronym": rf"{L}(?:\.{L})+(?:\.(?!{L})|(?!{N}|\.{L}))|(?i:ph|ed)\.[dD](?:\.|(?!{N}))",
    "initial_before_sentence": rf"[A-Za-z](?=\.\s+(?:(?:{SENTENCE_STARTS}|{SENTENCE_STARTS.upper()})\s|{TAG}))",
    "initial": rf"[A-Za-z]\.(?!{L})",
    "abbreviation": rf"(?i:{ABBREVIATIONS})\.(?!{L})|(?:{CAPITAL_ABBREVIATIONS})\.(?!{L})"
    rf"|(?i:{NUMBERED_ABBREVIATIONS})\.(?=\s?\d)",
    "currency": r"[A-Z]{1,2}\$",
    "words": WORDS,
    "digits_and_letters": rf"\d+{L}{N}*",
    "number": r"[-+]?(?:\d*(?:[.:,]\d+)+|\d+)",
    "run": r"[?!]+|\#+|-+|\*+|_+|''|``|\.+",
    "newline": r"\n",
    "symbol": r"[^\s]",
}
UNREADABLE = re.compile(
    rf"[^\s\d!-~{QUOTES_AND_DASHES}{character_class(LETTERS)}{character_class(SYMBOLS)}{re.escape(''.join(WRITTEN))}]"
)  # emoji and the like vanish
APOSTROPHES = re.compile(A)
SOFT_HYPHEN = "\u00ad"
# Text between white space whose tokens depend on what stands beside it: tags, telephone numbers, fractions ("1 1/2"),
# and what ends in a letter and a full stop, save for whole words that are no abbreviation before a number.
ORDINARY_END = rf"(?!(?i:{NUMBERED_ABBREVIATIONS})\.)[A-Za-z]{{2,}}\.$"
CONTEXT = re.compile(rf"<|\(\d|^\d{{1,4}}/\d|^\d\d-?\d|^(?!{ORDINARY_END}).*[A-Za-z]\.$")


class Known(dict[str, list[str] | None]):
    """Tokens of each text between white space, found at its first use; None where they depend on what is beside it."""

    def __missing__(self, text: str) -> list[str] | None:
        if text.isascii() and text.isalpha() and text.lower() not in JOINED:
            tokens: list[str] | None = [text.lower()]
        else:
            tokens = None if CONTEXT.search(text) else _scan(f"{text} ", 0)
        self[text] = tokens
        return tokens


def tokenize(captions: Iterable[str]) -> list[list[str]]:
    """Lower-case tokens of each caption. The captions are scanned as one text, a line each, as the reference does:
    whether an initial at the end of a caption keeps its full stop depends on the next caption's first word."""
    lines = [_readable(caption.replace("\n", " ")) for caption in captions]
    text = "\n".join(lines)
    known, tokens, start = Known(), [], 0
    for line in lines:
        found = [known[part] for part in line.split()]
        parts = [part for part in found if part is not None]
        alone = len(parts) == len(found) and start + len(line) < len(text)
        tokens.append(list(chain.from_iterable(parts)) if alone else _scan(text, start))
        start += len(line) + 1
    return tokens


def _readable(caption: str) -> str:
    return caption if caption.isascii() else UNREADABLE.sub(" ", caption.replace(SOFT_HYPHEN, ""))


@cache
def _scanner() -> re.Pattern[str]:
    """Compiled when it is wanted: it takes a quarter of a second, and a rank that trains scores nothing."""
    return re.compile("[^\\S\n]*+(?:" + "|".join(f"(?P<{name}>{form})" for name, form in FORMS.items()) + ")")


def _scan(text: str, start: int) -> list[str]:
    """Tokens from a place in a text to the end of its line."""
    tokens: list[str] = []
    for found in _scanner().finditer(text, start):
        form = str(found.lastgroup)
        if form == "newline":
            break
        tokens += (token for token in _tokens(form, found[form]) if token not in DROPPED)
    return tokens


def _tokens(form: str, text: str) -> list[str]:
    """What one match stands for. White space inside a token separates words to the metrics, so it does here."""
    text = text.lower()
    if form == "joined":
        return JOINED[text.replace("\u2019", "'")].split()
    if form in ("entity", "symbol"):
        text = ENTITIES.get(text, text)
        return [WRITTEN.get(text, text)]
    if form == "run":
        return [text[0] if text[0] == "." or (text[0] == "-" and len(text) < 5) else text]
    if form in ("face", "smiley", "phone"):
        return "".join(WRITTEN.get(character, character) for character in text).split()
    if form in ("negation", "suffix"):
        return [APOSTROPHES.sub(lambda found: "'" if found[0] in "'\u2019" else "`", text)]
    return text.split()
