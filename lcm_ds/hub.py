"""The Hugging Face hub: whether it answers, asked once, before its libraries ask again and again for minutes."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from lcm_ds.errors import first_line

TRIES = 2


def outage(endpoint: str) -> str | None:
    """Why a hub does not answer within HF_HUB_ETAG_TIMEOUT (10 s); None if it does, even with an error."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    reason = None
    for _ in range(TRIES):
        try:
            get_session().head(endpoint, timeout=constants.HF_HUB_ETAG_TIMEOUT / TRIES, follow_redirects=False)
        except Exception as error:  # of httpx: connections, proxies, certificates, invalid URLs
            reason = f"{endpoint}: {first_line(error)}"
        else:
            return None
    return reason


def work_offline_without(name: str) -> str | None:
    """Have the hub's libraries use only their cache from now on, if `name` is not here and the hub does not answer.

    They would ask for each file seven times: 23 s if connections are refused, and minutes if packets are lost.

    Args:
        name: What is about to be loaded: a path, or on the hub.

    Returns:
        Why the hub does not answer; None if it does, or is not asked.
    """
    return None if Path(name).exists() else _work_offline()


@cache
def _work_offline() -> str | None:
    from huggingface_hub import constants

    reason = None if constants.HF_HUB_OFFLINE else outage(constants.ENDPOINT)
    constants.HF_HUB_OFFLINE |= reason is not None
    return reason
