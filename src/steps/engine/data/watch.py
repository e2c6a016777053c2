"""What a chat template reads of the messages while it renders them, and how far its output had come.

A template that takes the messages one after the other, and never asks for later ones or for their number, has written
by the time it takes message i exactly what it would write for messages[:i] alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

Message = Mapping[str, Any]


class Watch:
    """The messages of one rendering, and what the template reads of them.

    boundaries:   characters written when message i was taken; [len(messages)] when there was no more to take.
    looked_ahead: whether the output so far may depend on messages that come later.
    """

    def __init__(self, messages: Sequence[Message]) -> None:
        self.messages = messages
        self.boundaries: dict[int, int] = {}
        self.written = 0
        self.looked_ahead = False
        self._last: int | None = None

    def take(self, index: int) -> None:
        """Note that the walk has come to message `index`."""
        # Taken twice, or out of order: the template walks more than once.
        if self._last is not None and index != self._last + 1:
            self.looked_ahead = True
        self._last = index
        self.boundaries[index] = self.written

    def look(self, index: int) -> None:
        """Note that message `index` was read without walking. The first one is there in every prefix."""
        if index > (self._last or 0):
            self.looked_ahead = True


class WatchedMessages(Sequence[Message]):
    """What the template gets for `messages`: from `offset` on, so that `messages[1:]` is watched as well."""

    def __init__(self, watch: Watch, offset: int = 0) -> None:
        self._watch, self._offset = watch, offset

    def __iter__(self) -> Iterator[Message]:
        for index in range(self._offset, len(self._watch.messages)):
            self._watch.take(index)
            yield self._watch.messages[index]
        self._watch.take(len(self._watch.messages))

    @overload
    def __getitem__(self, index: int) -> Message: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Message]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            if (index.start or 0) >= 0 and index.stop is None and index.step in (None, 1):
                return WatchedMessages(self._watch, self._offset + (index.start or 0))
            self._watch.looked_ahead = True
            return self._watch.messages[self._offset :][index]
        if index < 0:
            self._watch.looked_ahead = True
            return self._watch.messages[self._offset :][index]
        if self._offset + index < len(self._watch.messages):
            self._watch.look(self._offset + index)
        return self._watch.messages[self._offset + index]

    def __len__(self) -> int:
        self._watch.looked_ahead = True
        return len(self._watch.messages) - self._offset

    def __bool__(self) -> bool:
        if self._offset:  # whether anything follows the first message
            self._watch.looked_ahead = True
        return len(self._watch.messages) > self._offset
