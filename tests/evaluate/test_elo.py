"""`qlora elo`: ratings against plain references, agreement against textbooks, published forms."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import optimize, stats

from qlora_kernels import cli
from qlora_kernels.evaluate import elo, elo_agreement, elo_read, records
from qlora_kernels.evaluate.elo_ratings import (
    SCALE,
    Games,
    beats,
    bradley_terry,
    resampled_wins,
    win_matrix,
)
from qlora_kernels.evaluate.elo_ratings import elo as play
from qlora_kernels.evaluate.records import Pair, Score
from qlora_kernels.finetune.errors import BadInput


def random_games(seed=0, n=60, models=4, questions=10, spread=0.6, ties=0.2):
    """Games of models whose true log strengths are ``spread`` apart."""
    random = np.random.default_rng(seed)
    a = random.integers(0, models, n)
    b = (a + random.integers(1, models, n)) % models
    chance = 1 / (1 + np.exp(-spread * (a - b)))
    points = np.where(random.random(n) < ties, 0.5, (random.random(n) < chance).astype(float))
    names = tuple(f"m{i}" for i in range(models))
    return Games(names, a, b, points, random.integers(0, questions, n), questions)


# --- Elo ----------------------------------------------------------------------------------------


def plain_elo(games, order, start=1000.0, k=32.0):
    ratings = [start] * len(games.models)
    for i in order:
        a, b = games.a[i], games.b[i]
        expected = 1 / (1 + 10 ** ((ratings[b] - ratings[a]) / 400))
        change = k * (games.points[i] - expected)
        ratings[a] += change
        ratings[b] -= change
    return ratings


@pytest.mark.parametrize("n, start, k", [(1, 1000, 32), (37, 1000, 32), (200, 0, 64)])
def test_elo_is_the_plain_loop_over_the_same_orders(n, start, k):
    games = random_games(n=n)
    got = play(games, orders=23, seed=5, start=start, k=k)
    side = math.ceil(math.sqrt(23))
    generator = np.random.default_rng(5)
    within = generator.permuted(np.tile(np.arange(n), (side, 1)), axis=1)
    between = generator.permuted(np.tile(np.arange(n), (-(-23 // side), 1)), axis=1)
    orders = [p[q] for q in between for p in within][:23]
    assert all(sorted(order) == list(range(n)) for order in orders)
    np.testing.assert_allclose(got, [plain_elo(games, o, start, k) for o in orders], atol=0.01)


def test_elo_over_more_orders_than_are_played_at_once(monkeypatch):
    games = random_games()
    whole = play(games, orders=100)
    monkeypatch.setattr("qlora_kernels.evaluate.elo_ratings._ORDERS", 25)
    np.testing.assert_array_equal(play(games, orders=100), whole)
    assert whole.shape == (100, 4) and len({tuple(r) for r in whole.round(3).tolist()}) > 90


def test_the_mean_over_composed_orders_is_that_over_independent_ones():
    games = random_games(n=40)
    generator = np.random.default_rng(1)
    plain = np.array([plain_elo(games, generator.permutation(40)) for _ in range(1500)])
    composed = play(games, orders=10_000, seed=2)
    error = plain.std(0) * np.sqrt(1 / 1500 + 1 / 10_000)
    assert (np.abs(composed.mean(0) - plain.mean(0)) < 4 * error).all()
    np.testing.assert_allclose(composed.std(0), plain.std(0), rtol=0.08)
    # The spread of the mean itself is that of independent orders.
    means = np.array([play(games, orders=400, seed=s).mean(0) for s in range(100)])
    ratio = means.std(0) / (composed.std(0) / 20)
    assert (ratio > 0.75).all() and (ratio < 1.3).all()


def test_one_game_by_hand():
    games = Games.of([("x", "y", 1.0, 1)])
    np.testing.assert_allclose(play(games, 3), [[1016, 984]] * 3, atol=1e-3)
    tie = Games.of([("x", "y", 0.5, 1)])
    np.testing.assert_allclose(play(tie, 3), [[1000, 1000]] * 3, atol=1e-3)


# --- Bradley-Terry ------------------------------------------------------------------------------


def scipy_bradley_terry(games, prior=0.0):
    """By SciPy, from the games one by one."""
    m = len(games.models)

    def loss(theta):
        gap = theta[games.a] - theta[games.b]
        won = np.log1p(np.exp(-gap)) * games.points
        lost = np.log1p(np.exp(gap)) * (1 - games.points)
        pull = 0.5 * prior * (np.log1p(np.exp(-theta)) + np.log1p(np.exp(theta)))
        return won.sum() + lost.sum() + pull.sum() + (0 if prior else theta.mean() ** 2)

    found = optimize.minimize(loss, np.zeros(m), method="BFGS", options={"gtol": 1e-9})
    return found.x - found.x.mean()


@pytest.mark.parametrize("seed, n, models, spread", [(0, 60, 3, 0.5), (1, 400, 6, 0.8)])
@pytest.mark.parametrize("prior", [0.0, 1.0])
def test_bradley_terry_is_scipys_maximum_of_the_likelihood(seed, n, models, spread, prior):
    games = random_games(seed, n, models, spread=spread)
    got = bradley_terry(win_matrix(games), prior)
    np.testing.assert_allclose(got, scipy_bradley_terry(games, prior), atol=2e-5)


def test_two_models_have_the_odds_of_their_wins():
    wins = np.array([[0, 3.0], [1.0, 0]])
    np.testing.assert_allclose(bradley_terry(wins), [math.log(3) / 2, -math.log(3) / 2])


def test_many_fits_at_once_are_the_fits_one_by_one():
    wins = resampled_wins(random_games(n=300), 7)
    np.testing.assert_allclose(bradley_terry(wins), [bradley_terry(w) for w in wins], atol=1e-9)


def test_lopsided_wins_converge():
    wins = np.array([[0, 1e5, 10], [1, 0, 2e4], [0, 3, 0]])
    s = bradley_terry(wins)
    played, chance = wins + wins.T, 1 / (1 + np.exp(s[None, :] - s[:, None]))
    np.testing.assert_allclose((played * chance).sum(1), wins.sum(1), rtol=1e-8)


def test_without_a_maximum_it_says_so_and_a_prior_helps():
    undefeated = np.array([[0, 2.0], [0, 0]])
    with pytest.raises(ValueError, match="no maximum"):
        bradley_terry(undefeated)
    assert bradley_terry(undefeated, 1.0)[0] > 0
    assert bradley_terry(np.zeros((2, 2)), 1.0).tolist() == [0, 0]


def test_questions_are_resampled_with_all_of_their_games():
    games = random_games(n=50, questions=5)
    per_question = np.stack(
        [
            win_matrix(Games(games.models, *(x[games.question == q] for x in
                             (games.a, games.b, games.points, games.question)), 5))
            for q in range(5)
        ]
    )  # fmt: skip
    wins = resampled_wins(games, 200, seed=3)
    times = np.random.default_rng(3).integers(0, 5, (200, 5))
    want = [per_question[t].sum(0) for t in times]
    np.testing.assert_allclose(wins, want)


def test_who_reaches_whom():
    wins = np.zeros((4, 4))
    wins[0, 1] = wins[1, 2] = wins[2, 1] = 1
    assert beats(wins).astype(int).tolist() == [
        [1, 1, 1, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1],
    ]  # fmt: skip
    assert beats(np.stack([wins, wins.T]))[1].tolist() == beats(wins).T.tolist()


# --- the ladder ---------------------------------------------------------------------------------


def pairs_of(games, judge="j"):
    words = {1.0: "model_a", 0.5: "tie", 0.0: "model_b"}
    return [
        Pair(int(q), games.models[a], games.models[b], words[p], f"{judge}{i}", 0)
        for i, (a, b, p, q) in enumerate(
            zip(games.a, games.b, games.points, games.question, strict=True)
        )
    ]


def test_the_ladder_is_in_order_and_its_intervals_hold_the_truth():
    hits = []
    for seed in range(30):
        games = random_games(seed, n=240, models=4, questions=60, spread=0.5, ties=0)
        found = elo.ladder(pairs_of(games), orders=9, resamples=200, seed=seed)
        rows = {m["model"]: m for m in found["models"]}
        truth = 1000 + SCALE * 0.5 * (np.arange(4) - 1.5)
        hits += [
            rows[f"m{i}"]["bt_low"] <= t <= rows[f"m{i}"]["bt_high"] for i, t in enumerate(truth)
        ]
    assert 0.88 <= np.mean(hits) <= 0.995
    names = [m["model"] for m in found["models"]]
    assert names == ["m3", "m2", "m1", "m0"] and found["schema"] == 1
    assert [m["bt"] for m in found["models"]] == sorted(m["bt"] for m in found["models"])[::-1]
    assert found["models"][0]["above_next"] > 0.9 and found["models"][-1]["above_next"] is None
    assert found["models"][0]["rank_low"] == 1


def test_an_undefeated_model_has_no_upper_bound_and_it_is_said():
    pairs = [Pair(q, "best", other, "model_a", "j", 0) for q in range(30) for other in ("x", "y")]
    pairs += [Pair(q, "x", "y", ("model_a", "model_b")[q % 2], "j", 0) for q in range(30)]
    found = elo.ladder(pairs, orders=20, resamples=100)
    best, *others = found["models"]
    assert best["model"] == "best" and best["bt_high"] is None and best["bt_low"] is not None
    assert all(o["bt_low"] is None and o["bt_high"] is not None for o in others)
    assert any("best: undefeated" in note and "x, y" in note for note in found["notes"])
    assert any("1 tie with an average" in note for note in found["notes"])
    assert all(math.isfinite(m["bt"]) for m in found["models"])


def test_models_that_never_met_are_named():
    pairs = [
        Pair(q, a, b, winner, "j", 0)
        for q in range(20)
        for a, b in (("a", "b"), ("c", "d"))
        for winner in (("model_a", "model_b")[q % 2],)
    ]
    found = elo.ladder(pairs, orders=10, resamples=50)
    assert any(
        "2 groups of models that never met" in n and "a, b; c, d" in n for n in found["notes"]
    )
    assert not any("undefeated" in n for n in found["notes"])


def test_unread_verdicts_are_counted():
    pairs = pairs_of(random_games(n=80))
    pairs += [Pair(1000 + i, "m0", "m1", None, "j", 0) for i in range(7)]
    found = elo.ladder(pairs, orders=10, resamples=50)
    assert found["unparsed"] == 7 and found["judgments"] == 87
    assert sum(m["unparsed"] for m in found["models"]) == 14
    assert any("7 of 87 judgments hold no verdict" in n for n in found["notes"])
    same = elo.ladder(pairs[:80], orders=10, resamples=50)
    assert [m["bt"] for m in same["models"]] == [m["bt"] for m in found["models"]]
    with pytest.raises(BadInput, match="none of the 7 judgments holds a verdict"):
        elo.ladder(pairs[80:])


# --- agreement ----------------------------------------------------------------------------------

# The worked example of Fleiss' kappa that encyclopaedias give: ten items, fourteen raters, five
# verdicts; kappa 0.210 (P 0.378, chance 0.213).
FLEISS = np.array(
    [
        [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
        [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
    ]
)  # fmt: skip


def test_kappa_of_the_textbook():
    assert elo_agreement.fleiss_kappa(FLEISS) == pytest.approx(0.20993, abs=1e-5)


def test_kappa_of_two_raters_is_scotts_pi():
    """3 of 4 agreed; chance (5/8)^2 + (3/8)^2."""
    counts = [[2, 0], [2, 0], [0, 2], [1, 1]]
    chance = (5 / 8) ** 2 + (3 / 8) ** 2
    assert elo_agreement.fleiss_kappa(counts) == pytest.approx((0.75 - chance) / (1 - chance))
    assert elo_agreement.fleiss_kappa([[3, 0], [0, 2]]) == pytest.approx(1)
    assert math.isnan(elo_agreement.fleiss_kappa([[3, 0], [2, 0]]))
    with pytest.raises(ValueError, match="two raters"):
        elo_agreement.fleiss_kappa([[1, 0]])


def test_kappa_over_pairs_of_replies():
    """The judges a and b agree on questions 1 and 2; a's verdict on 3 changes with the order."""
    said = [
        ("a", 1, "x", "y", "model_a", 0), ("b", 1, "y", "x", "model_b", 0),
        ("a", 2, "x", "y", "tie", 0), ("b", 2, "x", "y", "tie", 1),
        ("a", 3, "x", "y", "model_a", 0), ("a", 3, "x", "y", "model_b", 1),
        ("b", 3, "x", "y", "model_b", 0), ("c", 4, "x", "y", "model_a", 0),
        ("a", 5, "x", "y", None, 0), ("b", 5, "x", "y", "tie", 0),
    ]  # fmt: skip
    pairs = [Pair(q, a, b, w, j, o) for j, q, a, b, w, o in said]
    got = elo_agreement.kappa_of_pairs(pairs)
    assert got.items == 3
    want = elo_agreement.fleiss_kappa([[2, 0, 0], [0, 0, 2], [0, 1, 1]])
    assert got.value == pytest.approx(want)
    assert got.interval.low <= got.value <= got.interval.high
    assert elo_agreement.kappa_of_pairs(pairs[:1]) is None


def test_kappas_interval_is_a_bootstrap_over_questions():
    """Judges that toss coins agree by chance: the interval holds 0; others are far from it."""
    random = np.random.default_rng(0)
    coins = [
        Pair(q, "x", "y", ("model_a", "model_b")[random.integers(2)], j, 0)
        for q in range(200)
        for j in "abc"
    ]
    kappa = elo_agreement.kappa_of_pairs(coins)
    assert kappa.interval.low < 0 < kappa.interval.high and abs(kappa.value) < 0.15
    alike = [replace(p, winner=coins[3 * p.question_id].winner) for p in coins]
    assert elo_agreement.kappa_of_pairs(alike).interval.low == pytest.approx(1)


def test_tau_is_scipys():
    random = np.random.default_rng(0)
    for _ in range(50):
        a, b = random.integers(0, 5, (2, 7))
        if len(set(a)) == 1 or len(set(b)) == 1:
            continue
        want = stats.kendalltau(a, b).statistic
        assert elo_agreement.kendall_tau(a.astype(float), b.astype(float)) == pytest.approx(want)
    assert np.isnan(elo_agreement.kendall_tau(np.ones(3), np.arange(3.0)))


def test_tau_between_judges():
    games = random_games(n=600, models=5, spread=1.0, questions=40)
    fair = pairs_of(games)
    one = [records.Pair(p.question_id, p.model_a, p.model_b, p.winner, "one", 0) for p in fair]
    contrary = [Pair(p.question_id, p.model_b, p.model_a, p.winner, "contrary", 0) for p in fair]
    taus = elo_agreement.tau_of_judges([*one, *contrary], resamples=50)
    (found,) = taus.values()
    assert found.value == pytest.approx(-1) and found.interval.high < -0.5 and found.items == 5
    same = [records.Pair(p.question_id, p.model_a, p.model_b, p.winner, "two", 0) for p in fair]
    (found,) = elo_agreement.tau_of_judges([*one, *same], resamples=50).values()
    # The same questions are drawn for both, so nothing varies.
    assert found.value == 1 and found.interval == (1, 1)


# --- published forms ----------------------------------------------------------------------------


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def winners(pairs):
    return [(p.question_id, p.model_a, p.model_b, p.winner, p.judge, p.order) for p in pairs]


def test_fastchats_judgments(tmp_path):
    row = {
        "question_id": 81, "model_1": "x", "model_2": "y", "g1_winner": "model_1",
        "g2_winner": "error", "judge": ["gpt-4", "pair-v2"], "g1_judgment": "[[A]]", "turn": 1,
    }  # fmt: skip
    pairs, _ = elo_read.read_pairs(write(tmp_path / "gpt-4_pair.jsonl", [row, row]))
    assert winners(pairs)[:2] == [
        (81, "x", "y", "model_a", "gpt-4", 0),
        (81, "x", "y", None, "gpt-4", 1),
    ]
    assert len(pairs) == 4  # what others publish twice counts twice
    with pytest.raises(BadInput, match=":2: g1_winner must be one of"):
        elo_read.read_pairs(write(tmp_path / "b.jsonl", [row, {**row, "g1_winner": "A"}]))
    with pytest.raises(BadInput, match="both models are x"):
        elo_read.read_pairs(write(tmp_path / "c.jsonl", [{**row, "model_2": "x"}]))


def test_arenas_battles_as_json_and_csv(tmp_path):
    rows = [
        {"model_a": "x", "model_b": "y", "winner": "model_b", "judge": "user_1", "anony": True},
        {"model_a": "y", "model_b": "x", "winner": "tie (bothbad)", "judge": "user_2"},
    ]
    path = tmp_path / "battles.json"
    path.write_text(json.dumps(rows))
    pairs, _ = elo_read.read_pairs(path)
    assert [w[1:] for w in winners(pairs)] == [
        ("x", "y", "model_b", "user_1", 0),
        ("y", "x", "tie", "user_2", 0),
    ]
    assert len({p.question_id for p in pairs}) == 2  # a battle is a question of its own
    table = tmp_path / "battles.csv"
    table.write_text('model_a,model_b,winner\nx,"y, the ""second""",model_a\n')
    assert winners(elo_read.read_pairs(table)[0])[0][1:4] == ("x", 'y, the "second"', "model_a")
    kaggle = tmp_path / "train.csv"
    kaggle.write_text(
        "id,model_a,model_b,prompt,winner_model_a,winner_model_b,winner_tie\n7,x,y,hm,0,0,1\n"
    )
    assert winners(elo_read.read_pairs(kaggle)[0]) == [("7", "x", "y", "tie", "people", 0)]


def test_qloras_own_ratings(tmp_path):
    name = (
        "65b-guanaco-vicuna-generations-topp0.9-temp0.7-vs-answer-gpt35-gpt-4-reviewer-threeclass"
    )
    rows = [{"review_id": "r", "question_id": 1, "score": s, "text": ""} for s in (1, 2, 3, -1)]
    pairs, _ = elo_read.read_pairs(write(tmp_path / f"{name}.jsonl", rows))
    assert [p.winner for p in pairs] == ["model_a", "model_b", "tie", None]
    assert winners(pairs)[0] == (1, "65b-guanaco", "gpt35", "model_a", "gpt-4", 0)
    # The other order of the same models, under the same names.
    back = "answer-gpt35-vs-65b-guanaco-vicuna-generations-topp0.9-temp0.7-gpt4-reviewer"
    rows = [{"review_id": "r", "message_id": "m", "score": s} for s in ([9, 8.5], [7, 7])]
    pairs, _ = elo_read.read_pairs(write(tmp_path / f"{back}.jsonl", rows))
    assert winners(pairs) == [
        ("m", "65b-guanaco", "gpt35", "model_b", "gpt-4", 1),
        ("m", "65b-guanaco", "gpt35", "tie", "gpt-4", 1),
    ]
    with pytest.raises(BadInput, match="name their models in the file's name"):
        elo_read.read_pairs(write(tmp_path / "ratings.jsonl", rows))


def test_our_own_scores_stand_in_for_pairs(tmp_path):
    path = tmp_path / "j.jsonl"
    scores = [
        Score(1, "x", "y", 8.0, 7.0, "j", 0), Score(1, "x", "y", 7.0, 7.0, "j", 1),
        Score(2, "x", "y", None, None, "j", 0),
    ]  # fmt: skip
    records.write_records(path, scores)
    pairs, notes = elo_read.read_pairs(path)
    assert [p.winner for p in pairs] == ["model_a", "tie", None] and "only points" in notes[0]
    records.write_records(path, [*scores, Pair(3, "x", "y", "tie", "j", 0)])
    pairs, notes = elo_read.read_pairs(path)
    assert len(pairs) == 1 and "3 judgments in points are left out" in notes[0]


@pytest.mark.parametrize(
    "name, text, told",
    [
        ("a.jsonl", '{"foo": 1}\n', "judgments of no known form; there is foo"),
        ("a.csv", "a,b\n1,2\n", "judgments of no known form; there is a, b"),
        ("a.csv", "model_a,model_b,winner\nx,y\n", "a.csv:2: not as many columns"),
        ("a.csv", "model_a,model_b,winner\n", "is empty"),
        ("a.csv", "model_a,model_b,winner\nx,y,z\n", "a.csv:2: winner must be one of"),
        ("a.csv", 'model_a,model_b,winner\nx,"y,z\n', "not CSV"),
        ("a.csv", "id,model_a,model_b,winner_model_a,winner_model_b,winner_tie\n1,x,y,1,1,0\n",
         "a.csv:2: one of winner_model_a"),
        ("a.jsonl", "", "is empty"),
    ],
)  # fmt: skip
def test_files_of_no_use(tmp_path, name, text, told):
    (tmp_path / name).write_text(text)
    with pytest.raises(BadInput) as caught:
        elo_read.read_pairs(tmp_path / name)
    assert told in str(caught.value)
    with pytest.raises(BadInput, match="nowhere.csv does not exist"):
        elo_read.read_pairs(tmp_path / "nowhere.csv")


# --- the command --------------------------------------------------------------------------------


@pytest.fixture
def judgments(tmp_path):
    path = tmp_path / "judgments.jsonl"
    records.write_records(path, pairs_of(random_games(n=200), judge="rater-"))
    return path


def test_the_command(judgments, tmp_path, capsys):
    words = ["elo", str(judgments), "--orders", "50", "--resamples", "50"]
    out, plot = tmp_path / "elo.json", tmp_path / "ladder.png"
    assert cli.main([*words, "--output", str(out), "--plot", str(plot)]) == 0
    found = json.loads(out.read_text())
    text = capsys.readouterr().out
    assert found["schema"] == elo.SCHEMA and found["settings"]["orders"] == 50
    assert all(m["model"] in text and f"{m['bt']:.0f}" in text for m in found["models"])
    assert plot.read_bytes().startswith(b"\x89PNG") and len(plot.read_bytes()) > 5000
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "elo.json", "judgments.jsonl", "ladder.png",
    ]  # fmt: skip
    before = out.read_text()
    assert cli.main([*words, "--output", str(out)]) == 0
    assert out.read_text() == before  # the seed says it all


def test_open_ends_and_markup_are_drawn(tmp_path, capsys):
    path = tmp_path / "j.jsonl"
    records.write_records(path, [Pair(q, "$x_1$ [/b]", "y", "model_a", "j", 0) for q in range(3)])
    assert cli.main(["elo", str(path), "--orders", "4", "--resamples", "9",
                     "--plot", str(tmp_path / "p.png")]) == 0  # fmt: skip
    text = capsys.readouterr().out
    assert "+inf" in text and "-inf" in text and "$x_1$ [/b]" in text and "3 questions are" in text


def test_judges_can_be_chosen_and_grouped(tmp_path, capsys):
    path = tmp_path / "j.jsonl"
    games = random_games(n=400, spread=1.0, questions=400)
    people = pairs_of(games, judge="rater-")
    model = [
        Pair(p.question_id, p.model_a, p.model_b, p.winner, "model", 0)
        for p in {(p.question_id, *sorted((p.model_a, p.model_b))): p for p in people}.values()
    ]
    records.write_records(path, [*people, *model])
    out = tmp_path / "elo.json"
    words = ["elo", str(path), "--orders", "9", "--resamples", "20", "--output", str(out)]
    assert cli.main([*words, "--group", "people=rater-*"]) == 0
    (tau,) = json.loads(out.read_text())["agreement"]["kendall_tau"]
    assert sorted(tau["judges"]) == ["model", "people"] and tau["value"] == 1
    assert cli.main([*words, "--judge", "model"]) == 0
    assert json.loads(out.read_text())["judges"] == {"model": len(model)}


@pytest.mark.parametrize(
    "words, told",
    [
        (["--orders", "0"], "orders is 0"),
        (["--resamples", "1"], "resamples is 1"),
        (["--level", "1"], "level is 1"),
        (["--k", "0"], "k is 0"),
        (["--judge", "nobody"], "no judgment is by nobody"),
        (["--group", "people"], "expected NAME=PATTERN"),
        (["--output", "/nowhere/at/all/elo.json"], "does not exist"),
    ],
)
def test_words_that_cannot_be(judgments, capsys, words, told):
    assert cli.main(["elo", str(judgments), *words]) == 2
    out, err = capsys.readouterr()
    assert told in err and out == "" and len(err.splitlines()) == 1


@pytest.mark.full
def test_forty_thousand_judgments():
    """All 10,000 orders; the mean is where Bradley-Terry's ratings are."""
    games = random_games(n=40_000, models=8, questions=80, spread=0.3)
    played = play(games)
    assert played.shape == (10_000, 8)
    order = np.random.default_rng(7).permutation(40_000)
    np.testing.assert_allclose(played.mean(1), 1000, atol=0.02)
    expected = 1000 + SCALE * bradley_terry(win_matrix(games))
    np.testing.assert_allclose(played.mean(0), expected, atol=10)
    spread = played.std(0)
    assert (np.abs(plain_elo(games, order) - played.mean(0)) < 6 * spread).all()
