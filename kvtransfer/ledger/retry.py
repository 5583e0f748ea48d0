"""How a background task of the ledger lives with a Redis that comes and goes. Knows no keys and no records."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from typing import NoReturn

from kvtransfer.ledger.records import LedgerAway

log = logging.getLogger(__name__)

_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 1.0


class Backoff:
    """Pauses that grow from 50 ms to a second, each shortened by chance so that a fleet does not come back at once."""

    def __init__(self) -> None:
        self._next_s = _FIRST_PAUSE_S

    def reset(self) -> None:
        self._next_s = _FIRST_PAUSE_S

    async def pause(self) -> None:
        pause_s = self._next_s * random.uniform(0.5, 1.0)
        self._next_s = min(2 * self._next_s, _LONGEST_PAUSE_S)
        await asyncio.sleep(pause_s)


async def keep_doing(
    what: str, step: Callable[[], Awaitable[None]], on_trouble: Callable[[str], None] = lambda why: None
) -> NoReturn:
    """Runs ``step`` over and over until cancelled. ``step`` waits for its own work, and starts over after a failure.

    An absence of Redis is logged once, at its start and at its end, and so is a lack of memory of our own. Any other
    failure is a bug, ours or a callback's: it is logged and survived, because a worker without a ledger still serves.
    ``on_trouble`` is told why each time, in words that may be shown to anybody.
    """
    backoff = Backoff()
    is_away = False
    this_task = asyncio.current_task()
    while True:
        if this_task is not None and this_task.cancelling():
            raise asyncio.CancelledError  # a library swallowed it
        try:
            await step()
        except (LedgerAway, MemoryError) as error:
            why = str(error) or "no memory"
            if not is_away:
                log.warning("%s: the ledger is away, going on without it: %s", what, why)
            is_away = True
            on_trouble(why)
            await backoff.pause()
        except Exception as error:
            log.exception("%s failed; trying again", what)
            on_trouble(f"{type(error).__name__}, a fault of this process: its log says more")
            await backoff.pause()
        else:
            if is_away:
                log.info("%s: the ledger is back", what)
            is_away = False
            backoff.reset()
