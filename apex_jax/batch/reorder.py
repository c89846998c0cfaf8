"""Results in the order of their requests, from results in any order."""


class ReorderBuffer:
    """Holds lines until every earlier one is there.

    Tickets are 0, 1, 2 ... in input order. num_open: tickets taken whose lines are not released;
    never above `capacity` as long as none is taken while `is_full`.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._lines: dict[int, bytes] = {}
        self._next_ticket = 0
        self._next_release = 0

    @property
    def num_open(self) -> int:
        return self._next_ticket - self._next_release

    @property
    def is_full(self) -> bool:
        return self.num_open >= self._capacity

    def take_ticket(self) -> int:
        self._next_ticket += 1
        return self._next_ticket - 1

    def put(self, ticket: int, line: bytes) -> list[bytes]:
        """Hand in a line; return those that are now in order, this one among them or not."""
        self._lines[ticket] = line
        released: list[bytes] = []
        while self._next_release in self._lines:
            released.append(self._lines.pop(self._next_release))
            self._next_release += 1
        return released

    def drain(self) -> list[bytes]:
        """Return what is held, in order but with gaps: for an interrupted job to save."""
        held = [self._lines[ticket] for ticket in sorted(self._lines)]
        self._lines.clear()
        return held
