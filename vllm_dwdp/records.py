"""Records: the convoy's record as bytes, for a page of shared memory."""

import mmap
import struct

from vllm_dwdp.convoy import Record, Round, State


class Format:
    """64-bit words: the last round's number; then by rank state, tokens, number of the round due, its members as bits; then by
    rank that round's tokens.
    """

    def __init__(self, size: int):
        self._size, self._words = size, struct.Struct("<" + "q" * (1 + size * (4 + size)))
        self.nbytes = self._words.size

    def pack(self, record: Record) -> bytes:
        due = [made or Round(0, (), (0,) * self._size) for made in record.due]
        numbers, masks = [made.number for made in due], [made.mask for made in due]
        tokens = [count for made in due for count in made.tokens]
        return self._words.pack(record.number, *record.states, *record.tokens, *numbers, *masks, *tokens)

    def unpack(self, page: mmap.mmap, offset: int) -> Record:
        size = self._size
        number, *row = self._words.unpack_from(page, offset)
        states, tokens, numbers, members, *counts = (tuple(row[at : at + size]) for at in range(0, len(row), size))
        due = tuple(
            Round(numbers[r], tuple(m for m in range(size) if members[r] >> m & 1), counts[r]) if numbers[r] else None
            for r in range(size)
        )
        return Record(number, tuple(map(State, states)), tokens, due)
