"""E-mails to new users, over SMTP."""

from email.headerregistry import Address
from email.message import EmailMessage

import aiosmtplib

from events.catalog.users import SendRefusalEmail, SendWelcomeEmail
from handlers.catalog.resources import ThirdParties, ThirdPartyError, breaker_of
from handlers.context import Context, Declined
from handlers.definition import handles

_BREAKER = breaker_of("the mail server")
_PERMANENT = 500  # RFC 5321, section 4.2.1: 5yz is a permanent negative answer


async def _send(parties: ThirdParties, key: str, recipient: str, subject: str, text: str) -> None:
    """Hand one e-mail to the mail server. The same key gives the same Message-ID, so that a repeat can be told."""
    message = EmailMessage()
    message["From"] = parties.sender
    message["To"] = Address(addr_spec=recipient)
    message["Subject"] = subject
    message["Message-ID"] = f"<{key}@{parties.sender.rpartition('@')[2]}>"
    message.set_content(text)
    try:
        await aiosmtplib.send(
            message,
            recipients=[recipient],
            hostname=parties.smtp_host,
            port=parties.smtp_port,
            timeout=10,
            start_tls=None,
        )
    except aiosmtplib.SMTPRecipientsRefused as error:
        if all(refusal.code >= _PERMANENT for refusal in error.recipients):
            raise Declined("the mailbox does not exist") from error
        raise ThirdPartyError("the mail server does not take the message now") from error
    except aiosmtplib.SMTPDataError as error:
        if error.code >= _PERMANENT:
            raise Declined("the mail server refuses the message") from error
        raise ThirdPartyError("the mail server does not take the message now") from error
    except (aiosmtplib.SMTPException, OSError) as error:
        raise ThirdPartyError(f"the mail server did not take the message: {type(error).__name__}") from error


@handles(SendWelcomeEmail, timeout=15, breaker=_BREAKER)
async def send_welcome_email(command: SendWelcomeEmail, parties: ThirdParties, context: Context) -> None:
    """Welcome a new user; decline if the mailbox does not exist."""
    text = f"Hello {command.full_name},\n\nyour account is being prepared.\n"
    await _send(parties, context.idempotency_key, command.email, "Welcome", text)


@handles(SendRefusalEmail, timeout=15, breaker=_BREAKER)
async def send_refusal_email(command: SendRefusalEmail, parties: ThirdParties, context: Context) -> None:
    """Say that there is no account after all. A mailbox that does not exist was not welcomed either."""
    text = f"Hello {command.full_name},\n\nwe are sorry: your account could not be opened.\n"
    try:
        await _send(parties, context.idempotency_key, command.email, "Your account", text)
    except Declined:
        return
