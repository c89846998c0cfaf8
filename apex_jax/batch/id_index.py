"""What a job remembers of every line: which ids were seen, and which are finished.

Owns an open-addressing table in flat arrays, because a dict of Python integers takes about 150
bytes an id: 24 bytes a slot, 32 to 64 an id. Ids enter as 8-byte digests: among ten million the
chance that any two collide is 3e-6, and then one is refused as a duplicate, never mixed up.
"""

import hashlib
from array import array

_FINISHED, _FAILED = 1, 2
_FLAG_BITS = 2
_MAX_LOAD = 0.75  # linear probing: 2.5 probes to find an id, 8.5 to learn that it is absent


def id_key(custom_id: str) -> int:
    """Return the 64-bit key of a custom_id."""
    return _digest(b"id:" + custom_id.encode("utf-8", "surrogatepass"))


def line_key(line: int) -> int:
    """Return the 64-bit key of a line that has no custom_id of its own."""
    return _digest(b"line:%d" % line)


def _digest(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") or 1


class IdIndex:
    """Keys -> (line seen in this run, finished or failed before, request digest).

    num_finished, num_failed: of the lines in the output, failed ones counted in both.
    num_by_line: those of them that are known by their line number only.
    """

    def __init__(self, num_slots: int = 1024) -> None:
        self._keys = array("Q", bytes(8 * num_slots))  # 0: empty
        self._states = array("Q", bytes(8 * num_slots))  # line << 2 | flags
        self._requests = array("Q", bytes(8 * num_slots))  # first 8 bytes of request_sha256
        self._num_keys = 0
        self.num_finished = 0
        self.num_failed = 0
        self.num_by_line = 0

    def __len__(self) -> int:
        return self._num_keys

    @property
    def num_bytes(self) -> int:
        """Memory of the table."""
        return 24 * len(self._keys)

    def finish(self, key: int, request_sha256: str, *, failed: bool, by_line: bool = False) -> bool:
        """Note an output line; False if the output already had one of that key."""
        slot = self._insert(key)
        if self._states[slot] & _FINISHED:
            return False
        self._states[slot] |= _FINISHED | (_FAILED if failed else 0)
        self._requests[slot] = int(request_sha256[:16], 16)
        self.num_finished += 1
        self.num_failed += failed
        self.num_by_line += by_line
        return True

    def is_finished(self, key: int) -> bool:
        slot = self._find(key)
        return self._keys[slot] == key and bool(self._states[slot] & _FINISHED)

    def is_same_request(self, key: int, request_sha256: str) -> bool:
        """True if the finished line of `key` came from a request of this hash."""
        return self._requests[self._find(key)] == int(request_sha256[:16], 16)

    def see(self, key: int, line: int) -> int | None:
        """Note that `line` carries `key`; return the earlier line of this run that did, if any."""
        slot = self._insert(key)
        earlier = self._states[slot] >> _FLAG_BITS
        if earlier:
            return earlier
        self._states[slot] |= line << _FLAG_BITS
        return None

    def seen_line(self, key: int) -> int | None:
        """Return the line of this run that carries `key`, if one was seen."""
        slot = self._find(key)
        return self._states[slot] >> _FLAG_BITS or None if self._keys[slot] == key else None

    def _find(self, key: int) -> int:
        """Return the slot of `key`, or the empty one where it belongs."""
        mask = len(self._keys) - 1
        slot = key & mask
        while self._keys[slot] not in (0, key):
            slot = (slot + 1) & mask
        return slot

    def _insert(self, key: int) -> int:
        slot = self._find(key)
        if self._keys[slot] == key:
            return slot
        if self._num_keys + 1 > _MAX_LOAD * len(self._keys):
            self._grow()
            slot = self._find(key)
        self._keys[slot] = key
        self._num_keys += 1
        return slot

    def _grow(self) -> None:
        old = (self._keys, self._states, self._requests)
        empty = bytes(16 * len(self._keys))
        self._keys, self._states, self._requests = (array("Q", empty) for _ in range(3))
        for key, state, request in zip(*old, strict=True):
            if key:
                slot = self._find(key)
                self._keys[slot], self._states[slot], self._requests[slot] = key, state, request
