"""aiohttp's connector with two bounds that it lacks: of idle connections, and of answers that nobody asked for."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any, cast

from aiohttp import TCPConnector
from aiohttp.abc import AbstractResolver
from aiohttp.client_proto import ResponseHandler
from aiohttp.client_reqrep import ConnectionKey

IDLE_HOSTS = 128  # hosts to which idle connections are kept
IDLE_SECONDS = 5.0
UNASKED = 16  # answers that may lie unread: 1xx ones come before the one that was asked for
NAMES, NAMES_SECONDS = 10_000, 300  # of the names whose addresses are kept


class Peer(ResponseHandler):
    """One connection. A server that speaks while nothing is asked of it, or far more than is asked, is cut off."""

    idle = False

    def set_response_params(self, **params: Any) -> None:
        self.idle = False
        super().set_response_params(**params)

    def data_received(self, data: bytes) -> None:
        unasked = self.idle and len(data) > 0  # aiohttp itself calls this without data
        if not unasked:
            super().data_received(data)  # which may end an answer, and so make this connection idle
            unasked = len(self._buffer) > (0 if self.idle else UNASKED)
        if unasked and self.transport is not None:
            self.transport.abort()


class Connector(TCPConnector):
    """Connections over all hosts; how many are busy is bounded by its user."""

    def __init__(self, resolver: AbstractResolver) -> None:
        super().__init__(
            resolver=resolver,
            limit=0,
            keepalive_timeout=IDLE_SECONDS,
            ttl_dns_cache=NAMES_SECONDS,
            dns_cache_max_size=NAMES,
        )
        self._factory = cast("partial[ResponseHandler]", partial(Peer, loop=asyncio.get_running_loop()))

    def _release(self, key: ConnectionKey, protocol: ResponseHandler, *, should_close: bool = False) -> None:
        crowded = key not in self._conns and len(self._conns) >= IDLE_HOSTS
        super()._release(key, protocol, should_close=should_close or crowded)
        if isinstance(protocol, Peer):
            protocol.idle = True
