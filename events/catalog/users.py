"""A user signs up: the event that starts it, what is asked of others, and how it ends."""

from typing import Any
from uuid import UUID

from events.catalog.values import Email, Name, Reason, UserName
from events.message import Command, Event, upcast


class UserRegistered(Event, version=2):
    """Somebody has registered. Version 1 had a first and a last name, which not everybody has."""

    user_id: UUID
    user_name: UserName
    full_name: Name
    email: Email

    @upcast(from_version=1)
    @staticmethod
    def _join_names(data: dict[str, Any]) -> dict[str, Any]:
        names = (data.get("first_name", ""), data.get("last_name", ""))
        rest = {name: value for name, value in data.items() if name not in ("first_name", "last_name")}
        return {**rest, "full_name": " ".join(name for name in names if name)}


class AccountActivated(Event):
    """All that belongs to a new account is there."""

    user_id: UUID


class AccountRefused(Event):
    """The account was refused, and what had been done for it was undone."""

    user_id: UUID
    reason: Reason


class CreateDefaultSettings(Command):
    """Give a new user the default settings."""

    user_id: UUID
    user_name: UserName


class RemoveSettings(Command):
    """Take a user's settings away."""

    user_id: UUID


class SendWelcomeEmail(Command):
    """Welcome a new user."""

    user_id: UUID
    full_name: Name
    email: Email


class SendRefusalEmail(Command):
    """Tell somebody who was welcomed that there is no account after all: an e-mail cannot be taken back."""

    user_id: UUID
    full_name: Name
    email: Email


class SubscribeToMailingList(Command):
    """Put a user on the mailing list."""

    user_id: UUID
    email: Email


class UnsubscribeFromMailingList(Command):
    """Take a user off the mailing list."""

    user_id: UUID
    email: Email


class NotifyAdmins(Command):
    """Show a new account to the administrators, who may refuse it."""

    user_id: UUID
    user_name: UserName
    full_name: Name
