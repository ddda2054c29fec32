"""How much work an access gives the memory: sectors of global memory, wavefronts of shared memory.

A sector is 32 bytes that a warp's access touches. A wavefront is a pass over the 32 banks of shared memory, 4 bytes
wide each: a warp needs one for every 128 bytes, and more where its threads want different words of one bank.
"""

from dataclasses import dataclass

import numpy as np

SECTOR, BANKS, BANK = 32, 32, 4


@dataclass
class Traffic:
    """What was needed so far, and what the same bytes need at least."""

    sectors: int = 0
    fewest_sectors: int = 0
    wavefronts: int = 0
    fewest_wavefronts: int = 0

    def add_global(self, address: np.ndarray, size: int, warp: np.ndarray) -> None:
        """Count an access of (lanes,) addresses, by size in bytes."""
        piece = min(size, SECTOR)
        for one in np.unique(warp):
            begins = np.unique(address[warp == one])
            self.sectors += len(np.unique((begins[:, None] + np.arange(0, size, piece)) // SECTOR))
            self.fewest_sectors += -(-len(begins) * size // SECTOR)

    def add_shared(self, address: np.ndarray, size: int, warp: np.ndarray) -> None:
        """Count an access of (lanes,) addresses, by size in bytes: 16 bytes a thread are four passes of 8 threads."""
        threads = min(BANKS * BANK // size, 32)
        for one in np.unique(warp):
            begins = address[warp == one]
            for first in range(0, len(begins), threads):
                words = np.unique((begins[first : first + threads, None] + np.arange(0, size, BANK)) // BANK)
                self.wavefronts += int(np.bincount(words % BANKS).max())
                self.fewest_wavefronts += 1
