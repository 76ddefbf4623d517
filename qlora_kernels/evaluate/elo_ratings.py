"""Ratings from games between pairs: Elo over random orders, and Bradley-Terry with its bootstrap.

*Elo* updates two ratings after each game, so its result depends on the order of the games; the
paper (arXiv 2305.14314, §5) takes the mean over many random orders. *Bradley-Terry* is the model
behind it, fitted to all games at once: P(i beats j) = 1 / (1 + 10^((r_j - r_i) / 400)), a tie
counted as half a win for each. Orders say nothing about how ratings would change with other
questions; a bootstrap over questions does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = [
    "SCALE",
    "Games",
    "beats",
    "bradley_terry",
    "elo",
    "resampled_wins",
    "win_matrix",
]

SCALE = 400 / np.log(10)
"""Rating points a unit of log odds."""

_ORDERS = 2048  # orders played side by side: their ratings and indices stay in the cache


@dataclass(frozen=True)
class Games:
    """What was played.

    Attributes:
        models: their names, ``M`` of them.
        a, b: who played, indices into ``models``, int64 ``[n]``.
        points: of ``a``: 1 won, 0.5 tied, 0 lost; float64 ``[n]``.
        question: which question the game was about, int64 ``[n]``; resampled as a whole.
        questions: how many questions there are; those without games are drawn as well.
    """

    models: tuple[str, ...]
    a: np.ndarray
    b: np.ndarray
    points: np.ndarray
    question: np.ndarray
    questions: int

    def __len__(self) -> int:
        return len(self.a)

    @classmethod
    def of(
        cls,
        games: Sequence[tuple[str, str, float, object]],
        models: Sequence[str] | None = None,
    ) -> Games:
        """From ``(name of a, name of b, points of a, question)``; models sorted if not given."""
        names = tuple(sorted({n for g in games for n in g[:2]}) if models is None else models)
        index = {name: i for i, name in enumerate(names)}
        questions: dict[object, int] = {}
        return cls(
            names,
            np.array([index[g[0]] for g in games], np.int64),
            np.array([index[g[1]] for g in games], np.int64),
            np.array([g[2] for g in games], np.float64),
            np.array([questions.setdefault(g[3], len(questions)) for g in games], np.int64),
            len(questions),
        )


def elo(
    games: Games, orders: int = 10_000, seed: int = 0, start: float = 1000.0, k: float = 32.0
) -> np.ndarray:
    """Final Elo ratings after each of ``orders`` random orders of the games.

    All orders are played side by side, game by game: what is vectorised is the orders. They are the
    compositions ``p_i after q_j`` of two sets of independent random permutations. Each is uniform,
    and any two are independent, so their mean varies as that of as many drawn one by one (only
    three and more are dependent), while a hundred and a hundred permutations make ten thousand.
    Ratings are held in fp32, in units of log odds around ``start``: after 40,000 games the rounding
    is below 0.01 points.

    Args:
        games: at least one.
        orders: how many.
        start, k: what a model begins with, and the most that one game moves.

    Returns:
        float64 ``[orders, models]``.
    """
    n, models = len(games), len(games.models)
    generator = np.random.default_rng(seed)
    side = int(np.ceil(np.sqrt(orders)))
    within = _permutations(generator, n, side)  # [n, side], a permutation a column
    between = _permutations(generator, n, -(-orders // side))
    # Row t has game t of every permutation: what a composition plays next is one whole row.
    a, b, points = games.a[within], games.b[within], games.points.astype(np.float32)[within]
    at_once = max(1, _ORDERS // side)  # columns of `between`
    step = np.float32(k / SCALE)
    result = []
    for first in range(0, between.shape[1], at_once):
        part = between[:, first : first + at_once]
        count = part.shape[1] * side
        ratings = np.zeros(count * models, np.float32)
        rows = np.arange(count).reshape(-1, side) * models
        ra, rb, move = (np.empty((part.shape[1], side), np.float32) for _ in range(3))
        ia, ib = np.empty_like(rows), np.empty_like(rows)
        with np.errstate(over="ignore"):  # an expectation of 0
            for game in part:
                np.add(a[game], rows, out=ia)
                np.add(b[game], rows, out=ib)
                ratings.take(ia, out=ra, mode="clip")
                ratings.take(ib, out=rb, mode="clip")
                np.subtract(rb, ra, out=move)
                np.exp(move, out=move)
                move += 1
                np.divide(1, move, out=move)
                np.subtract(points[game], move, out=move)
                move *= step
                ra += move
                rb -= move
                ratings[ia] = ra
                ratings[ib] = rb
        result.append(ratings.reshape(count, models))
    return start + SCALE * np.concatenate(result)[:orders].astype(np.float64)


def _permutations(generator: np.random.Generator, n: int, count: int) -> np.ndarray:
    rows = np.tile(np.arange(n), (count, 1))
    return np.ascontiguousarray(generator.permuted(rows, axis=1).T)


def win_matrix(games: Games) -> np.ndarray:
    """Wins of row over column, ties half to each: float64 ``[M, M]``."""
    size = len(games.models)
    cells = np.concatenate([games.a * size + games.b, games.b * size + games.a])
    weights = np.concatenate([games.points, 1 - games.points])
    return np.bincount(cells, weights, size * size).reshape(size, size)


def resampled_wins(games: Games, resamples: int, seed: int = 0) -> np.ndarray:
    """Win matrices of resampled lists of questions, each with all of its games.

    Returns:
        float64 ``[resamples, M, M]``.
    """
    from scipy import sparse

    size, total = len(games.models), games.questions
    cells = np.concatenate([games.a * size + games.b, games.b * size + games.a])
    weights = np.concatenate([games.points, 1 - games.points])
    of_question = sparse.csr_matrix(
        (weights, (np.concatenate([games.question] * 2), cells)), shape=(total, size * size)
    )
    generator = np.random.default_rng(seed)
    wins = np.empty((resamples, size * size))
    rows = max(1, (1 << 22) // total)
    for first in range(0, resamples, rows):
        count = min(rows, resamples - first)
        drawn = generator.integers(0, total, (count, total)) + np.arange(count)[:, None] * total
        times = np.bincount(drawn.ravel(), minlength=count * total).reshape(count, total)
        wins[first : first + count] = (of_question.T @ times.T.astype(np.float64)).T
    return wins.reshape(resamples, size, size)


def beats(wins: np.ndarray) -> np.ndarray:
    """Whether a chain of wins (or ties) leads from row to column, itself included: bool, shape of
    ``wins``, ``[..., M, M]``.

    Where every chain exists, the likelihood has a maximum. A model that nobody reaches has no upper
    bound, one that reaches nobody no lower bound, and two that neither reach each other cannot be
    compared.
    """
    reach = (wins > 0) | np.eye(wins.shape[-1], dtype=bool)
    for middle in range(wins.shape[-1]):
        reach |= reach[..., :, middle, None] & reach[..., None, middle, :]
    return reach


def bradley_terry(wins: np.ndarray, prior: float | np.ndarray = 0.0) -> np.ndarray:
    """Log strengths of largest (penalised) likelihood, centred; many fits at once.

    Newton's method, its steps no longer than 2. The likelihood is concave; without a prior its one
    free direction, all strengths together, is fixed by their mean of zero.

    Args:
        wins: ``[..., M, M]``, of row over column, ties half to each.
        prior: games that each model is taken to have tied with one of average strength; a number,
            or one a fit ``[...]``. Above 0 the maximum exists whatever the wins.

    Returns:
        ``[..., M]``; times :data:`SCALE` they are rating points.

    Raises:
        ValueError: no maximum was found: ``prior`` is 0 and a chain of :func:`beats` is missing.
    """
    wins = np.asarray(wins, np.float64)
    size = wins.shape[-1]
    shape = wins.shape[:-2]
    wins = wins.reshape(-1, size, size)
    extra = np.broadcast_to(np.asarray(prior, np.float64), shape).reshape(-1, 1)
    played = wins + wins.transpose(0, 2, 1)
    won = wins.sum(2)
    total = played.sum((1, 2))[:, None] + extra * size
    strength = np.zeros((len(wins), size))
    diagonal = np.arange(size)
    open_ = np.flatnonzero(total[:, 0] > 0)
    for _ in range(200):
        s, x = strength[open_], extra[open_]
        chance = _logistic(s[:, :, None] - s[:, None, :])
        alone = _logistic(s)
        slope = won[open_] - (played[open_] * chance).sum(2) + x * (0.5 - alone)
        bend = played[open_] * chance * chance.transpose(0, 2, 1)
        matrix = -bend
        matrix[:, diagonal, diagonal] += bend.sum(2) + x * alone * (1 - alone)
        # The free direction gets a stiffness like that of the others. With a prior it has its own.
        matrix += np.where(x > 0, 0.0, total[open_] / size**2)[:, :, None]
        try:
            move = np.linalg.solve(matrix, slope[:, :, None])[:, :, 0]
        except np.linalg.LinAlgError:
            break
        move *= np.minimum(1, 2 / np.maximum(np.abs(move).max(1, keepdims=True), 1e-300))
        strength[open_] = s + move
        open_ = open_[np.abs(move).max(1) > 1e-10]
        if not len(open_):
            strength -= strength.mean(1, keepdims=True)
            return strength.reshape(*shape, size)
    raise ValueError(
        "the ratings have no maximum: a model has won, or lost, all of its games, or two groups "
        "never met; give a prior above 0"
    )


def _logistic(x: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.tanh(x / 2)
