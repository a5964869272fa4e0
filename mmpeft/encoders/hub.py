"""Loading from the model hub or its cache, and a hub that does not answer, which is noticed in seconds.

The hub's client asks again for 23 s for each file that its cache lacks, and a model is looked for under several file names:
without a connection it took 47 s to refuse a wrong name. So the hub is asked once before a load. If nobody answers, the
load reads the cache alone, as with HF_HUB_OFFLINE=1: what is there loads at once, and what is not is refused at once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmpeft.encoders.base import log
from mmpeft.encoders.files import load_errors

TRIES = 2
WAIT = 1.0  # seconds between them
TIMEOUT = 5.0  # seconds for an answer
KEPT = 60.0  # seconds for which the hub is not asked again: a model is loaded in several steps

_known: dict[str, tuple[float, str | None]] = {}


@contextmanager
def reading(name: str, folder: Path | None) -> Iterator[None]:
    """Around a library's load from a folder or file on disk, or, without one, from the hub or its cache.

    Args:
        name: as the user gave it.

    Raises:
        FileFormatError: the folder or file on disk is damaged or does not fit.
        NameNotFound: neither cache nor hub gave it.
    """
    if folder is not None:
        with load_errors(name, folder):
            yield
    else:
        with load_errors(name, hub_cache()), _within_reach():
            yield


def hub_cache() -> str:
    """The folder in which huggingface_hub keeps its downloads."""
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)


def silence() -> str | None:
    """Why the hub gives no answer, in its client's words; None where it gives one, be it an error of its own.

    The client's own session asks, so proxies, certificates and a mirror (HF_ENDPOINT) are as in the load that follows.
    """
    from huggingface_hub import constants

    when, said = _known.get(constants.ENDPOINT, (float("-inf"), None))
    if time.monotonic() - when > KEPT:
        said = _ask(constants.ENDPOINT)
        _known[constants.ENDPOINT] = time.monotonic(), said
    return said


def _ask(endpoint: str) -> str | None:
    from huggingface_hub import get_session

    said = None
    for again in range(TRIES):
        time.sleep(WAIT if again else 0)
        try:
            get_session().head(endpoint, timeout=TIMEOUT)
            return None
        except Exception as error:  # the client's library has changed its error types with its major versions
            said = f"{type(error).__name__}: {error}"
    return said


@contextmanager
def _within_reach() -> Iterator[None]:
    """The cache alone where the hub is silent."""
    from huggingface_hub import constants

    said = None if constants.HF_HUB_OFFLINE else silence()
    if said is None:
        yield
        return
    log.warning("%s does not answer (%s); only its cache %r is read", constants.ENDPOINT, said, hub_cache())
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False
