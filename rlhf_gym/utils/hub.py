"""Whether a hub can be reached, so that a machine without a network is told at once."""

import socket
import urllib.request
from functools import lru_cache
from urllib.parse import urlsplit

from huggingface_hub import constants

SECONDS = 5.0
"""How long to wait for a connection. The hub's own client retries for half a minute."""


def no_hub() -> str | None:
    """Why no hub can be reached, in words; None if one can, as far as a connection tells."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    # Behind a proxy the hub's own name need not be known here.
    if urllib.request.getproxies().keys() & {"https", "http", "all"}:
        return None
    return _unconnected(constants.ENDPOINT)


@lru_cache
def _unconnected(endpoint: str) -> str | None:
    parts = urlsplit(endpoint)
    port = parts.port or (80 if parts.scheme == "http" else 443)
    try:
        socket.create_connection((parts.hostname or endpoint, port), timeout=SECONDS).close()
    except OSError as error:
        return f"this machine has no connection to {endpoint} ({error})"
    return None
