"""A third party goes away under steady load, and comes back."""

from collections import Counter

import pytest

from benchmarks.outage import outage

pytestmark = pytest.mark.acceptance


async def test_an_outage_costs_hardly_any_attempts_and_the_backlog_drains_without_a_storm(
    amqp_url: str, pg_url: str
) -> None:
    """The breaker opens, single messages ask whether the third party is back, and then everything is handled once."""
    outcome = await outage(amqp_url, pg_url, rate=40, before=2, away=6, patience=60, every=0.25)
    sent = outcome.samples[-1].sent
    phases = Counter(sample.breaker for sample in outcome.samples)
    assert phases["open"] > 0
    assert outcome.samples[-1].breaker == "closed"
    assert len(outcome.attempts) == sent
    assert outcome.asked == Counter({str(number): 1 for number in range(sent)})
    assert outcome.dead == 0
    assert sum(attempt - 1 for attempt in outcome.attempts) < 20, "attempts that were lost to the outage"
    tries_in_vain = outcome.samples[-1].tries - sent
    assert tries_in_vain < 40, "what was under way when it began, and single tries"
