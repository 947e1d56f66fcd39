"""Values that messages share."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=200)]
UserName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]{0,39}$")]
# No comments, lists, groups or quotes of RFC 5322: a mail server must not read two mailboxes into one address.
Email = Annotated[str, StringConstraints(pattern=r"^[^@\s,;:<>()\[\]\"\\]{1,64}@[^@\s,;:<>()\[\]\"\\]{1,255}$")]
Sku = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,60}$")]
Reason = Annotated[str, StringConstraints(max_length=500)]


class Money(BaseModel):
    """An amount of money, exact: minor units (cents) of an ISO 4217 currency."""

    model_config = ConfigDict(frozen=True)

    minor: int = Field(gt=0, le=10**12, strict=True)
    currency: str = Field(pattern=r"^[A-Z]{3}$")
