"""What is held out, what shares a row, and in which order rows come: pure functions of a seed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from qlora_kernels.finetune.data.types import DataError, Samples


def hold_out(groups: Sequence[str], share: float | int, seed: int) -> np.ndarray:
    """Which samples are held out: bool ``[n]``, whole groups at a time.

    Groups come in the order of a hash of their name and the seed, so neither the order of the
    file nor samples that are added to it move another sample from one side to the other (a
    ``share`` given as a number moves those at its edge).

    Raises:
        DataError: more samples are to be held out than there are.
    """
    held = np.zeros(len(groups), bool)
    if not share or not len(groups):
        return held
    if isinstance(share, int) and share >= len(groups):
        raise DataError(
            f"eval_split asks for {share:,} samples, and there are {len(groups):,}; leave some to "
            "train on"
        )
    count = share if isinstance(share, int) else max(1, round(share * len(groups)))
    members: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    if len(members) < 2:
        raise DataError(
            "all samples are alike (or of one group), so none can be held out without being "
            "trained on; set eval_split to 0 or give an eval_source"
        )

    def key(group: str) -> bytes:
        return hashlib.sha256(f"{seed}\n{group}".encode()).digest()

    left = len(members)
    for group in sorted(members, key=key):
        if held.sum() >= count or left == 1:  # one group is always left to train on
            break
        held[members[group]] = True
        left -= 1
    return held


def pack(lengths: Sequence[int] | np.ndarray, size: int, seed: int) -> list[list[int]]:
    """Samples into rows of at most ``size`` tokens: first fit, longest first.

    Samples of equal length come in an order drawn from the seed. Uses no more than 11/9 of the
    fewest possible rows, and one more (the bound of first-fit decreasing).

    Returns:
        The samples' numbers, row by row.
    """
    lengths = np.asarray(lengths, np.int64)
    if len(lengths) and int(lengths.max()) > size:
        raise ValueError(f"a sample of {int(lengths.max())} tokens in rows of {size}")
    mixed = np.random.default_rng([seed, 0x9AC2]).permutation(len(lengths))
    order = mixed[np.argsort(-lengths[mixed], kind="stable")]
    leaves = 1 << max(1, len(lengths) - 1).bit_length()
    room = [size] * (2 * leaves)  # a tree: in each node the most room of any row below it
    rows: list[list[int]] = []
    for sample in order.tolist():
        need = int(lengths[sample])
        node = 1
        while node < leaves:  # the first row with room enough
            node = 2 * node if room[2 * node] >= need else 2 * node + 1
        row = node - leaves
        if row >= len(rows):
            rows.append([])
        rows[row].append(sample)
        room[node] -= need
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return rows


def epoch_order(
    count: int,
    seed: int,
    epoch: int,
    *,
    lengths: np.ndarray | None = None,
    batch_size: int = 1,
) -> np.ndarray:
    """The order of ``count`` rows in an epoch: int64 ``[count]``.

    With ``lengths``, batches hold rows of like length: the random order is cut into stretches of
    50 batches, each sorted by length, and the batches then come in a random order again.
    """
    rng = np.random.default_rng([seed, 0x0DE2, epoch])
    order = rng.permutation(count)
    if lengths is None:
        return order
    stretch = 50 * batch_size
    for start in range(0, count, stretch):
        part = order[start : start + stretch]
        order[start : start + stretch] = part[np.argsort(-lengths[part], kind="stable")]
    whole = count // batch_size * batch_size  # a last batch that is not full stays last
    batches = order[:whole].reshape(-1, batch_size)
    order[:whole] = batches[rng.permutation(len(batches))].reshape(-1)
    return order


class EpochSampler(Sampler[int]):
    """Yields an epoch's rows in :func:`epoch_order`; ``set_epoch`` chooses the epoch.

    Args:
        data: the rows.
        seed: as given to ``epoch_order``.
        batch_size: group rows of like length into batches of this size; None: random order.
    """

    def __init__(self, data: Samples, seed: int, batch_size: int | None = None):
        self.lengths = None if batch_size is None else data.lengths
        self.count, self.seed, self.batch_size = len(data), seed, batch_size or 1
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch, from 0, that the next iteration goes through."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        order = epoch_order(
            self.count, self.seed, self.epoch, lengths=self.lengths, batch_size=self.batch_size
        )
        return iter(order.tolist())
