"""What must not stand on a terminal or in a ticket by accident: passwords and the like, and what steers a terminal."""

import re
from itertools import pairwise
from typing import Any

MASK = "***"
_WORDS = frozenset(
    {"apikey", "authorization", "cookie", "credential", "credentials", "cvc", "cvv", "iban", "passphrase"}
)
_WORDS |= {"passwd", "password", "pin", "pwd", "secret", "secrets", "ssn", "token", "tokens"}
_PAIRS = frozenset({("access", "key"), ("api", "key"), ("card", "number"), ("private", "key")})
_word = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_password_in_url = re.compile(r"(://[^\s:/@]{0,200}:)[^\s/@]{1,200}(?=@)")
_assigned = re.compile(r"(?<![\w-])([\w-]{1,80}+)[\"']?\s{0,3}[=:]\s{0,3}")
_value = re.compile(r"\"[^\"\n]*\"?|'[^'\n]*'?|(?:Basic|Bearer)\s+[^\s,;]+|[^\s,;)}\]\"']+", re.IGNORECASE)


def is_secret(name: str) -> bool:
    """Say whether what is called so is nobody's business: `password`, `api_key`, `cardNumber` and so on."""
    words = [word.lower() for word in _word.findall(name)]
    return not _WORDS.isdisjoint(words) or not _PAIRS.isdisjoint(pairwise(words))


def redacted(value: Any) -> Any:
    """Return a JSON value with what is secret in it masked."""
    if isinstance(value, dict):
        return {name: MASK if each and is_secret(name) else redacted(each) for name, each in value.items()}
    if isinstance(value, list):
        return [redacted(each) for each in value]
    return redacted_text(value) if isinstance(value, str) else value


def redacted_text(text: str) -> str:
    """Return text with passwords in URLs masked, and what follows the name of a secret and a sign: `token=...`."""
    text = _password_in_url.sub(rf"\1{MASK}", text)
    shown: list[str] = []
    end = 0
    for found in _assigned.finditer(text):
        value = _value.match(text, found.end()) if found.start() >= end and is_secret(found[1]) else None
        if value is not None:
            shown += [text[end : found.end()], MASK]
            end = value.end()
    return "".join((*shown, text[end:]))


def escaped(text: str) -> str:
    """Return text from outside with what is not printable written as escapes: nothing of it is lost, or obeyed."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
