"""Tells the owners of slots that an item has landed: one link per inbox, the least recently used are closed."""

from __future__ import annotations

import logging
from collections import OrderedDict

from epdctl.wire.encode import ENCODER_TO_LANGUAGE, EmbeddingLanded, EncoderToLanguage
from epdctl.wire.sockets import Link

__all__ = ["Notices"]

log = logging.getLogger(__name__)

MAX_LINKS = 64


def _unexpected(message: EncoderToLanguage, _: list[memoryview]) -> None:
    log.warning("an answer where none belongs: %s", message)


class Notices:
    """The inboxes come with the items; those of ranks that vanish are closed by ``withdraw``."""

    def __init__(self) -> None:
        self._links: OrderedDict[str, Link[EncoderToLanguage, EncoderToLanguage]] = OrderedDict()

    def send(self, endpoint: str, message: EmbeddingLanded) -> None:
        """Raises PeerGone."""
        link = self._links.get(endpoint)
        if link is None:
            link = self._links[endpoint] = Link(endpoint, ENCODER_TO_LANGUAGE, ENCODER_TO_LANGUAGE, _unexpected)
        self._links.move_to_end(endpoint)
        link.send(message)
        if len(self._links) > MAX_LINKS:
            self._links.popitem(last=False)[1].close()

    def withdraw(self, endpoint: str) -> None:
        if (link := self._links.pop(endpoint, None)) is not None:
            link.close()

    def close(self) -> None:
        for endpoint in list(self._links):
            self.withdraw(endpoint)
