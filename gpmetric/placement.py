"""Where the weights of a model are: all on the device, or mapped from their files but for the part that is at work.

What is mapped is read when a part is needed and let go behind it, so that a model may be larger than any memory.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

__all__ = ["BATCH_TOKENS", "FRONT", "HEAD", "ROOM", "Part", "Placement"]

Part = int | str  # a block's index, or what lies before the blocks or behind them
FRONT, HEAD = "front", "head"

BATCH_TOKENS = 2048
ROOM = 10**9

_DONTNEED, _WILLNEED = 4, 3  # madvise(2)


class Placement:
    """Brings the parts of a model to a device, in a dtype.

    Args:
        parts: parameters by part; one may be of several parts.
        device: where the model computes.
        dtype: that floating parameters are converted to when they get there; None leaves them as they are.
        files: that parameters may be mapped from.

    Attributes:
        resident: whether everything is on the device for good; until `settle` is called, nothing is.
        batch_tokens: tokens of a forward pass; fewer where there was no memory for more.
        room: bytes of hidden states that may be in memory on their way through the parts; None is no limit.
    """

    def __init__(
        self,
        parts: Mapping[Part, Sequence[nn.Parameter]],
        device: torch.device,
        dtype: torch.dtype | None = None,
        files: Iterable[Path] = (),
    ) -> None:
        self.device, self.dtype, self.resident = device, dtype, False
        self.room: int | None = ROOM
        self.batch_tokens = BATCH_TOKENS
        self._homes = {part: {one: one.data for one in parameters} for part, parameters in parts.items()}
        self._users: Counter[nn.Parameter] = Counter()  # open contexts
        self._files = _MappedFiles(files)
        self._pool: ThreadPoolExecutor | None = None
        self._last = -1  # block that was brought
        self._ahead: tuple[Part, Future[list[Tensor]]] | None = None

    def settle(self, told: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Brings everything to the device, where it stays; told of the parts that have come, and of all."""
        settled: dict[nn.Parameter, Tensor] = {}
        for done, home in enumerate(self._homes.values()):
            told(done, len(self._homes))
            for parameter, stored in home.items():
                if parameter not in settled:
                    parameter.data = settled[parameter] = self._placed(stored)
                    if settled[parameter] is not stored:  # a copy
                        self.let_go(stored)
                home[parameter] = settled[parameter]
        told(len(self._homes), len(self._homes))
        self.resident = True

    @contextmanager
    def at_hand(self, part: Part) -> Iterator[None]:
        """A part's parameters on the device while the context is open; contexts may be nested and share parameters."""
        if self.resident:
            yield
            return
        home = self._homes[part]
        if not all(self._users[parameter] for parameter in home):
            for parameter, tensor in zip(home, self._arrive(part), strict=True):
                if not self._users[parameter]:
                    parameter.data = tensor
        self._users.update(home.keys())
        try:
            yield
        finally:
            self._users.subtract(home.keys())
            for parameter, stored in home.items():
                if not self._users[parameter]:
                    parameter.data = stored
                    self.let_go(stored)
            self._files.trim()

    def let_go(self, stored: Tensor) -> None:
        """Frees the memory that reading a parameter at home took; one that is on the device stays."""
        if not self.resident:
            self._files.advise(stored, _DONTNEED)

    def bytes(self, part: Part) -> int:
        """Memory that a part takes on the device."""
        return sum(self._size(stored) for stored in self._homes[part].values())

    @property
    def total_bytes(self) -> int:
        """Memory that all parts take on the device, shared parameters once."""
        found = {
            id(parameter): self._size(stored) for home in self._homes.values() for parameter, stored in home.items()
        }
        return sum(found.values())

    @property
    def held_bytes(self) -> int:
        """Memory that all parts take where they are at home, on a CPU: of those that are mapped, none."""
        homes = {id(parameter): stored for home in self._homes.values() for parameter, stored in home.items()}
        return sum(stored.nbytes for stored in homes.values() if not self._files.holds(stored))

    def _size(self, stored: Tensor) -> int:
        width = self.dtype.itemsize if self.dtype and stored.is_floating_point() else stored.element_size()
        return stored.numel() * width

    def _placed(self, stored: Tensor) -> Tensor:
        dtype = self.dtype if self.dtype and stored.is_floating_point() else stored.dtype
        return stored.to(self.device, dtype, non_blocking=True)

    def _arrive(self, part: Part) -> list[Tensor]:
        """A part's tensors on the device; those of the block that is likely to be next are fetched meanwhile."""
        read = list(self._homes[part].values())
        if self._ahead is not None and self._ahead[0] == part:
            ahead, self._ahead = self._ahead, None
            read = ahead[1].result()
        if isinstance(part, int):
            self._fetch(part - 1 if 0 < part < self._last else part + 1)
            self._last = part
        placed = []
        for stored, home in zip(read, self._homes[part].values(), strict=True):
            placed.append(self._placed(stored))
            if placed[-1] is not home:  # a copy
                self.let_go(home)
        return placed

    def _fetch(self, part: Part) -> None:
        """Begins to read a part; of another one that was begun, nothing is kept."""
        if self._ahead is not None and self._ahead[0] == part:
            return
        stored = list(self._homes.get(part, {}).values())
        if self.device.type == "cuda":
            self._pool = self._pool or ThreadPoolExecutor(1, "weights")
            self._ahead = part, self._pool.submit(_pinned, stored)
        else:  # the system reads ahead
            for one in stored:
                self._files.advise(one, _WILLNEED)


def _pinned(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies that a device can fetch while it computes."""
    return [one.pin_memory() for one in tensors]


class _MappedFiles:
    """The address ranges of this process that are mapped from some files, where the system tells (Linux)."""

    def __init__(self, files: Iterable[Path]) -> None:
        names = {str(path.resolve()) for path in files}
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
        maps = Path("/proc/self/maps")
        for line in maps.read_text().splitlines() if maps.exists() else ():
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[1].endswith("p") and fields[5] in names:
                start, end = (int(bound, 16) for bound in fields[0].split("-"))
                self._starts.append(start)
                self._ends.append(end)

    def trim(self) -> None:
        """Gives memory that was freed back to the system.

        glibc keeps up to several blocks' copies: 150 MiB after pruning twelve of 26 MB each. It takes 2 to 5 ms.
        """
        if self._libc is not None and hasattr(self._libc, "malloc_trim"):
            self._libc.malloc_trim(0)

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor's pages are a file's."""
        if tensor.device.type != "cpu":
            return False
        storage = tensor.untyped_storage()
        start, size = storage.data_ptr(), storage.nbytes()
        place = bisect_right(self._starts, start) - 1
        return place >= 0 and size > 0 and start + size <= self._ends[place]

    def advise(self, tensor: Tensor, advice: int) -> None:
        """Tells the system of a tensor's pages, if they are a file's: of others, they would be lost."""
        if self._libc is not None and self.holds(tensor):
            storage = tensor.untyped_storage()
            start, size = storage.data_ptr(), storage.nbytes()
            first = start // mmap.PAGESIZE * mmap.PAGESIZE
            self._libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(start + size - first), ctypes.c_int(advice))
