"""The sign-up of a user."""

from typing import Self
from uuid import UUID

from coordinator.definition import Saga
from coordinator.flow import sequence
from coordinator.steps import compensated, completed, starts_on, step
from events.catalog.users import (
    AccountActivated,
    AccountRefused,
    CreateDefaultSettings,
    NotifyAdmins,
    RemoveSettings,
    SendRefusalEmail,
    SendWelcomeEmail,
    SubscribeToMailingList,
    UnsubscribeFromMailingList,
    UserRegistered,
)


class SignUp(Saga, version=1):
    """Settings, welcome e-mail, mailing list, administrators. If anybody refuses the account, all is undone."""

    user_id: UUID
    user_name: str
    full_name: str
    email: str

    @starts_on(UserRegistered)
    @classmethod
    def registered(cls, event: UserRegistered) -> Self:
        """Begin with what the user has told."""
        return cls(user_id=event.user_id, user_name=event.user_name, full_name=event.full_name, email=event.email)

    @step(timeout=60)
    def create_settings(self) -> CreateDefaultSettings:
        """Give the user default settings."""
        return CreateDefaultSettings(user_id=self.user_id, user_name=self.user_name)

    @create_settings.compensation
    def remove_settings(self) -> RemoveSettings:
        """Take them away."""
        return RemoveSettings(user_id=self.user_id)

    @step(timeout=60)
    def send_welcome(self) -> SendWelcomeEmail:
        """Welcome the user."""
        return SendWelcomeEmail(user_id=self.user_id, full_name=self.full_name, email=self.email)

    @send_welcome.compensation
    def send_refusal(self) -> SendRefusalEmail:
        """Say that there is no account after all."""
        return SendRefusalEmail(user_id=self.user_id, full_name=self.full_name, email=self.email)

    @step(timeout=60)
    def subscribe(self) -> SubscribeToMailingList:
        """Put the user on the mailing list."""
        return SubscribeToMailingList(user_id=self.user_id, email=self.email)

    @subscribe.compensation
    def unsubscribe(self) -> UnsubscribeFromMailingList:
        """Take the user off the list."""
        return UnsubscribeFromMailingList(user_id=self.user_id, email=self.email)

    @step(timeout=60)
    def notify(self) -> NotifyAdmins:
        """Show the account to the administrators."""
        return NotifyAdmins(user_id=self.user_id, user_name=self.user_name, full_name=self.full_name)

    flow = sequence(create_settings, send_welcome, subscribe, notify)

    @completed
    def activate(self) -> AccountActivated:
        """Tell everybody that the account is there."""
        return AccountActivated(user_id=self.user_id)

    @compensated
    def refuse(self, reason: str) -> AccountRefused:
        """Tell everybody that there is no account, and why."""
        return AccountRefused(user_id=self.user_id, reason=reason[:500])
