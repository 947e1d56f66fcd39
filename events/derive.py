"""Ids that follow from other ids: pure, so that a decision taken twice names the same things twice."""

import re
from hashlib import blake2b
from uuid import UUID

_VERSION_8 = 0x8 << 76
_VARIANT = 0x2 << 62
_canonical = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII)
_CLEAR_VERSION_AND_VARIANT = ~((0xF << 76) | (0x3 << 62))


def derive_id(parent: UUID, *parts: str | int) -> UUID:
    """Return the id that `parts` have below `parent`.

    UUID version 8 (RFC 9562, section 5.8): the 48 bits of time of a version 7 parent are kept, so that
    derived ids stay close to their parent in an index; the rest is a BLAKE2b hash of parent and parts.
    """
    digest = blake2b(parent.bytes, digest_size=10)
    for part in parts:
        digest.update(b"\0")
        digest.update(str(part).encode())
    number = int.from_bytes(parent.bytes[:6] + digest.digest())
    return UUID(int=number & _CLEAR_VERSION_AND_VARIANT | _VERSION_8 | _VARIANT)


def identify(source: str, name: str) -> UUID:
    """Return a key for a foreign event: its own id where that is a UUID, else one made of source and id.

    CloudEvents promises only that source and id together are unique (specification 1.0.2, section 3.1.1).
    """
    if _canonical.fullmatch(name):
        return UUID(name)
    digest = blake2b(source.encode() + b"\0" + name.encode(), digest_size=16).digest()
    return UUID(int=int.from_bytes(digest) & _CLEAR_VERSION_AND_VARIANT | _VERSION_8 | _VARIANT)
