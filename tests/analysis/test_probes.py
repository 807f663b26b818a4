"""Probes against the same rules written out in NumPy, and on sets whose answer is known."""

import numpy as np
import pytest

from ferjax.analysis import probes, scores
from ferjax.config import UserError

NAMES = ("angry", "happy", "sad", "fear")


def blobs(n, classes=4, dimensions=6, spread=0.3, seed=0):
    """Points about one centre a class."""
    rng = np.random.default_rng(seed)
    centres = np.eye(classes, dimensions) * 3
    labels = np.arange(n) % classes
    return centres[labels] + rng.normal(size=(n, dimensions)) * spread, labels


def test_neighbours_by_a_full_sort():
    rng = np.random.default_rng(1)
    fitted, judged = rng.normal(size=(60, 5)), rng.normal(size=(40, 5))
    labels = rng.integers(0, 4, 60)
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (fitted, judged))
    nearest = np.argsort(-(b @ a.T), axis=1)[:, :7]
    wanted = [np.bincount(labels[row], minlength=4).argmax() for row in nearest]
    found = probes.nearest_neighbours(fitted, labels, judged, count=7)
    np.testing.assert_array_equal(found, wanted)
    # The length of a feature vector plays no part; fewer images than neighbours will do.
    scaled = probes.nearest_neighbours(fitted * 9, labels, judged * 0.1, count=7)
    np.testing.assert_array_equal(scaled, found)
    few = probes.nearest_neighbours(fitted[:3], np.array([2, 2, 1]), judged)
    assert (few == 2).all()


def test_the_svm_separates_what_can_be_separated():
    fitted, labels = blobs(80)
    judged, true = blobs(40, seed=5)
    fitted, judged = (np.c_[x, np.full(len(x), 7.0)] for x in (fitted, judged))  # one is constant
    np.testing.assert_array_equal(probes.linear_svm(fitted, labels, judged), true)
    # Scale and offset of a feature play no part.
    scale, offset = np.geomspace(0.01, 100, 7), np.arange(7) * 50.0
    moved = probes.linear_svm(fitted * scale + offset, labels, judged * scale + offset)
    np.testing.assert_array_equal(moved, true)
    assert (probes.linear_svm(fitted, labels * 0 + 3, judged) == 3).all()


def test_standard_features():
    rng = np.random.default_rng(0)
    x = np.c_[rng.normal(5, 3, (50, 2)), np.full(50, 0.1)]
    a, b = probes.standard(x, x[:4] + 1)
    np.testing.assert_allclose(a[:, :2].mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(a[:, :2].std(0), 1)
    np.testing.assert_allclose(b[:, :2], (x[:4, :2] + 1 - x[:, :2].mean(0)) / x[:, :2].std(0))
    np.testing.assert_array_equal(np.c_[a[:4, 2], b[:, 2]], 0)


def test_the_classes_confused_most_come_together():
    confusion = np.array([[70, 0, 28, 2], [1, 90, 2, 7], [30, 2, 68, 0], [5, 15, 0, 80]])
    # 0 and 2: 1 - .29; then 1 and 3: 1 - .11; then both pairs.
    assert probes.find_tree(confusion) == ((0, 2), (1, 3))
    # A class that does not occur, and counts of any size.
    confusion[3] = 0
    assert sorted(probes.leaves(probes.find_tree(confusion * 9))) == [0, 1, 2, 3]


def test_average_linkage_by_hand():
    rng = np.random.default_rng(3)
    confusion = rng.random((6, 6)) + 3 * np.eye(6)
    shares = confusion / confusion.sum(1, keepdims=True)
    near = (shares + shares.T) / 2
    groups = [(i,) for i in range(6)]
    seen = set()
    while len(groups) > 1:
        pairs = [(a, b) for a in groups for b in groups if a < b]
        a, b = max(pairs, key=lambda p: np.mean([near[i, j] for i in p[0] for j in p[1]]))
        groups = [g for g in groups if g not in (a, b)] + [tuple(sorted(a + b))]
        seen.add(frozenset(a + b))

    def inner(tree):
        if isinstance(tree, int):
            return set()
        return {frozenset(probes.leaves(tree))}.union(*map(inner, tree))

    assert inner(probes.find_tree(confusion)) == seen


def test_trees_as_text():
    tree = probes.parse_tree(" ((angry, sad),(happy),fear) ", NAMES)
    assert tree == ((0, 2), (1,), 3)
    assert probes.write_tree(tree, NAMES) == "((angry,sad),(happy),fear)"
    for wrong in (
        "(angry,sad)",
        "((angry,sad),happy,fear",
        "(angry,sad,happy,fear,fear)",
        "",
        "()",
    ):
        with pytest.raises(UserError, match="each of angry, happy, sad, fear once"):
            probes.parse_tree(wrong, NAMES)
    with pytest.raises(UserError, match="each of"):
        probes.parse_tree("(angry,sad,happy,fear))", NAMES)


def test_probabilities_are_products_along_the_path():
    fitted, labels = blobs(80, spread=1.5)
    judged, _ = blobs(20, spread=1.5, seed=2)
    p = probes.hierarchical(fitted, labels, judged, ((0, 2), (1, 3)), 4)
    np.testing.assert_allclose(p.sum(1), 1)
    # Each division is a two-class problem of its own.
    first = probes.hierarchical(fitted, (labels % 2), judged, (0, 1), 2)
    np.testing.assert_allclose(p[:, [0, 2]].sum(1), first[:, 0])
    even = labels % 2 == 0
    mean, std = fitted.mean(0), fitted.std(0)
    part = probes.linear_model.LogisticRegression(C=probes.REGULARISATION, max_iter=1000)
    part.fit(((fitted - mean) / std)[even], labels[even])
    inner = part.predict_proba((judged - mean) / std)
    np.testing.assert_allclose(p[:, [0, 2]], first[:, :1] * inner, rtol=1e-6)
    # Any tree tells apart what can be told apart; a class without images is never chosen.
    easy, true = blobs(40)
    for tree in (((0, 2), (1, 3)), (0, (1, (2, 3))), (0, 1, 2, 3)):
        found = probes.hierarchical(easy, true, easy, tree, 4)
        np.testing.assert_array_equal(found.argmax(1), true)
    without = probes.hierarchical(easy[true != 3], true[true != 3], easy, ((0, 3), (1, 2)), 4)
    assert (without[:, 3] == 0).all()


def test_group_accuracy():
    tree = ((0, 2), (1, 3))
    found = probes.group_accuracy(np.array([0, 2, 1, 3]), np.array([2, 1, 3, 3]), tree)
    assert found == 3 / 4


def test_clusters_against_sums_written_out():
    fitted, labels = blobs(80, spread=2.0)
    judged, true = blobs(60, spread=2.0, seed=4)
    found = probes.clustering(fitted, labels, judged, true, clusters=5, classes=4)
    model = probes.cluster.KMeans(5, n_init=4, random_state=0).fit(probes.unit(fitted))
    near = ((probes.unit(judged)[:, None] - model.cluster_centers_) ** 2).sum(-1).argmin(1)
    joint = np.array([[np.sum((near == k) & (true == c)) for c in range(4)] for k in range(5)]) / 60
    assert found["purity"] == pytest.approx(joint.max(1).sum())
    a, b = joint.sum(1), joint.sum(0)
    inside = joint > 0
    shared = np.sum(joint[inside] * np.log(joint[inside] / np.outer(a, b)[inside]))
    entropies = [-np.sum(q[q > 0] * np.log(q[q > 0])) for q in (a, b)]
    assert found["nmi"] == pytest.approx(shared / np.mean(entropies))
    names = [np.bincount(labels[model.labels_ == k], minlength=4).argmax() for k in range(5)]
    assert found["accuracy"] == pytest.approx(np.mean(np.array(names)[near] == true))
    few = probes.clustering(fitted[:3], labels[:3], judged, true, clusters=5, classes=4)
    assert few["clusters"] == 3


def test_all_probes_beside_the_network():
    fitted, labels = blobs(60)
    judged, true = blobs(41, seed=1)
    logits = np.eye(4)[(true + (np.arange(41) < 10)) % 4] * 3
    found = probes.summarize_probes(
        fitted, labels, np.eye(4)[labels] * 5, judged, true, logits, NAMES
    )
    assert found["network"]["accuracy"] == pytest.approx(31 / 41)
    assert found["network"]["macro_f1"] == scores.summarize(logits, true, NAMES)["macro_f1"]
    for name in ("knn", "linear_svm", "hierarchical"):
        assert found[name]["accuracy"] == 1
    assert [each["clusters"] for each in found["kmeans"]] == [4, 16]
    assert not found["hierarchical"]["tree_given"]
    text = probes.table(found)
    for part in ("the network itself", "75.61", "20 nearest neighbours", "NMI 1.000"):
        assert part in text
    assert max(map(len, text.splitlines())) <= 72
