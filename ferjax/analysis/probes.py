"""Other classifiers on a network's features: what the features hold, apart from its last layer.

Each takes features float [N, D] and labels int [N] in [0, C) of images to fit on, and the features
of the images to judge. The fitting is scikit-learn's. k-nearest neighbours and k-means see
directions (each image's features have length 1), the linear ones see each feature with mean 0 and
standard deviation 1. The constants below were not tuned on any split.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn import cluster, linear_model, metrics, neighbors, svm

from ferjax.analysis import scores
from ferjax.config import UserError

NEIGHBOURS = 20
REGULARISATION = 0.01  # scikit-learn's C, of standardised features
CLUSTERS = (1, 4)  # times the number of classes

# A class's index, or the parts that a group is told apart into.
Tree = int | tuple["Tree", ...]


def nearest_neighbours(
    fitted: np.ndarray, labels: np.ndarray, judged: np.ndarray, *, count: int = NEIGHBOURS
) -> np.ndarray:
    """The most frequent label of the nearest images by cosine; the lower class of equal ones.

    Returns:
      int [M], the predictions.
    """
    model = neighbors.KNeighborsClassifier(min(count, len(fitted)), algorithm="brute")
    return model.fit(unit(fitted), labels).predict(unit(judged))


def linear_svm(fitted: np.ndarray, labels: np.ndarray, judged: np.ndarray) -> np.ndarray:
    """A linear support vector machine, one class against the rest, with the squared hinge loss.

    Returns:
      int [M], the predictions.
    """
    a, b = standard(fitted, judged)
    if len(np.unique(labels)) == 1:
        return np.full(len(judged), labels[0])
    return svm.LinearSVC(C=REGULARISATION, random_state=0).fit(a, labels).predict(b)


def hierarchical(
    fitted: np.ndarray, labels: np.ndarray, judged: np.ndarray, tree: Tree, classes: int
) -> np.ndarray:
    """Classifies step by step: first the group, then the group's parts, down to the class.

    At each group of the tree a logistic regression tells its parts apart, fitted on the images of
    that group alone. A class's probability is the product along its path.

    Args:
      tree: with each class that occurs among the labels once; see `find_tree` and `parse_tree`.
      classes: C, how many there are.

    Returns:
      Probabilities float64 [M, C].
    """
    a, b = standard(fitted, judged)
    out = np.zeros((len(judged), classes))

    def descend(node: Tree, share: np.ndarray) -> None:
        if isinstance(node, int):
            out[:, node] = share
            return
        part_of = np.full(classes, -1)
        for part, below in enumerate(node):
            part_of[leaves(below)] = part
        here = part_of[labels] >= 0
        parts = part_of[labels[here]]
        found = np.unique(parts)
        p = np.zeros((len(judged), len(node)))
        if len(found) > 1:
            model = linear_model.LogisticRegression(C=REGULARISATION, max_iter=1000)
            p[:, found] = model.fit(a[here], parts).predict_proba(b)
        elif len(found):
            p[:, found] = 1.0  # a part without images is never chosen
        for part, below in enumerate(node):
            descend(below, share * p[:, part])

    descend(tree, np.ones(len(judged)))
    return out


def find_tree(confusion: np.ndarray) -> Tree:
    """Groups the classes that are confused most, pair by pair.

    Average linkage (Sokal & Michener 1958) of the distances 1 - (P_ij + P_ji) / 2.

    Args:
      confusion: [C, C], counts or sums of probabilities, of true classes (rows) and predicted ones.
        A row is brought to the sum 1, or left as 0 where the class does not occur.
    """
    shares = np.asarray(confusion, np.float64)
    shares = shares / np.maximum(shares.sum(1, keepdims=True), 1e-300)
    distances = 1.0 - (shares + shares.T) / 2.0
    np.fill_diagonal(distances, 0.0)
    count = len(shares)
    model = cluster.AgglomerativeClustering(
        n_clusters=None, distance_threshold=0.0, metric="precomputed", linkage="average"
    ).fit(distances)
    nodes: list[Tree] = list(range(count))
    for first, second in model.children_:
        pair = sorted((nodes[first], nodes[second]), key=lambda node: min(leaves(node)))
        nodes.append(tuple(pair))
    return nodes[-1]


def parse_tree(text: str, classes: Sequence[str]) -> Tree:
    """The tree that a text describes: `((angry,disgust,fear,sad),(happy,surprise),neutral)`.

    Raises:
      UserError: a name that is no class, a class twice or not at all, or brackets that do not fit.
    """
    tokens = re.findall(r"[(),]|[^(),\s]+", text)
    wrong = UserError(
        f"--probe_tree={text}: write each of {', '.join(classes)} once, groups in brackets, such "
        "as ((a,b),(c,d),e)"
    )

    def node() -> Tree:
        token = tokens.pop(0) if tokens else ""
        if token in classes:
            return list(classes).index(token)
        if token != "(":
            raise wrong
        parts = [node()]
        while tokens and tokens[0] == ",":
            tokens.pop(0)
            parts.append(node())
        if not tokens or tokens.pop(0) != ")":
            raise wrong
        return tuple(parts)

    tree = node()
    if tokens or sorted(leaves(tree)) != list(range(len(classes))):
        raise wrong
    return tree


def leaves(tree: Tree) -> list[int]:
    """The classes of a tree, from left to right."""
    return [tree] if isinstance(tree, int) else [leaf for part in tree for leaf in leaves(part)]


def write_tree(tree: Tree, classes: Sequence[str]) -> str:
    """A tree as `parse_tree` reads it."""
    if isinstance(tree, int):
        return classes[tree]
    return f"({','.join(write_tree(part, classes) for part in tree)})"


def group_accuracy(predicted: np.ndarray, labels: np.ndarray, tree: Tree) -> float:
    """Share of images whose part of the tree's first division is right."""
    group_of = {leaf: g for g, part in enumerate(_parts(tree)) for leaf in leaves(part)}
    pairs = zip(predicted.tolist(), labels.tolist(), strict=True)
    return float(np.mean([group_of[p] == group_of[y] for p, y in pairs]))


def clustering(
    fitted: np.ndarray,
    labels: np.ndarray,
    judged: np.ndarray,
    judged_labels: np.ndarray,
    *,
    clusters: int,
    classes: int,
) -> dict[str, Any]:
    """k-means without labels (Lloyd 1982), and what its clusters say of the labels.

    The clusters are found among the fitted images; each takes the label that most of its fitted
    images have, and gives it to the judged images next to its centre.

    Returns:
      clusters (at most the fitted images); purity (share of judged images that have the most
      frequent label of their cluster) and nmi (mutual information of cluster and label over the
      mean of their entropies), in [0, 1]; and `scores.rates` of the labels that the clusters give.
    """
    model = cluster.KMeans(min(clusters, len(fitted)), n_init=4, random_state=0)
    home = model.fit_predict(unit(fitted))
    place = model.predict(unit(judged))

    def table(home: np.ndarray, labels: np.ndarray) -> np.ndarray:
        counts = np.bincount(home * classes + labels, minlength=model.n_clusters * classes)
        return counts.reshape(model.n_clusters, classes)

    named = table(home, labels).argmax(1)
    return {
        "clusters": int(model.n_clusters),
        "purity": float(table(place, judged_labels).max(1).sum() / len(judged)),
        "nmi": float(metrics.normalized_mutual_info_score(judged_labels, place)),
        **scores.rates(named[place], judged_labels, classes),
    }


def summarize_probes(
    fitted: np.ndarray,
    labels: np.ndarray,
    fitted_logits: np.ndarray,
    judged: np.ndarray,
    judged_labels: np.ndarray,
    judged_logits: np.ndarray,
    classes: Sequence[str],
    tree: Tree | None = None,
) -> dict[str, Any]:
    """All probes beside the network itself.

    Args:
      fitted: features [N, D]; labels: int [N]; fitted_logits: [N, C].
      judged: features [M, D]; judged_labels: int [M]; judged_logits: [M, C].
      classes: C names.
      tree: of the hierarchical classifier; None: found from the probabilities that the network
        gives to the fitted images, so that no label of the judged ones plays a part.

    Returns:
      fitted_images; network, knn, linear_svm and hierarchical: `scores.rates`; hierarchical also
      tree (text), tree_given and group_accuracy; kmeans: a list, see `clustering`.
    """
    count = len(classes)
    given = tree is not None
    if tree is None:
        tree = find_tree(np.eye(count)[labels].T @ scores.softmax(fitted_logits))

    def rates(predicted: np.ndarray) -> dict[str, Any]:
        return scores.rates(predicted, judged_labels, count)

    stepwise = hierarchical(fitted, labels, judged, tree, count).argmax(1)
    return {
        "fitted_images": len(fitted),
        "network": rates(np.argmax(judged_logits, -1)),
        "knn": {
            "neighbours": min(NEIGHBOURS, len(fitted)),
            **rates(nearest_neighbours(fitted, labels, judged)),
        },
        "linear_svm": rates(linear_svm(fitted, labels, judged)),
        "hierarchical": {
            "tree": write_tree(tree, classes),
            "tree_given": given,
            "group_accuracy": group_accuracy(stepwise, judged_labels, tree),
            **rates(stepwise),
        },
        "kmeans": [
            clustering(fitted, labels, judged, judged_labels, clusters=times * count, classes=count)
            for times in CLUSTERS
        ],
    }


def table(found: dict[str, Any]) -> str:
    """What `summarize_probes` found, for a terminal."""
    rows = [
        ("the network itself", found["network"]),
        (f"{found['knn']['neighbours']} nearest neighbours", found["knn"]),
        ("linear SVM", found["linear_svm"]),
        ("hierarchical", found["hierarchical"]),
        *((f"k-means, {each['clusters']} clusters", each) for each in found["kmeans"]),
    ]
    title = f"probes, fitted on {found['fitted_images']:,} images"
    lines = [f"{title:<38}{'accuracy':>10}{'balanced':>10}{'macro-F1':>10}"]
    for name, row in rows:
        values = (row["accuracy"], row["balanced_accuracy"], row["macro_f1"])
        lines.append(f"{name:<38}" + "".join(f"{100 * value:>10.2f}" for value in values))
    tree = found["hierarchical"]
    lines.append(f"tree {tree['tree']}")
    lines.append(f"first division right: {100 * tree['group_accuracy']:.2f} %")
    for each in found["kmeans"]:
        lines.append(
            f"k-means, {each['clusters']} clusters: purity {100 * each['purity']:.2f} %, "
            f"NMI {each['nmi']:.3f}"
        )
    return "\n".join(lines)


def unit(features: np.ndarray) -> np.ndarray:
    """Each row scaled to length 1, float32; rows of 0 stay."""
    x = np.asarray(features, np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.float32(1e-12))


def standard(fitted: np.ndarray, judged: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both less the fitted ones' mean, over their deviation; constant features become 0."""
    x = np.asarray(fitted, np.float64)
    mean, deviation = x.mean(0), x.std(0)
    # A feature that varies by rounding alone says nothing.
    scale = np.where(deviation > 1e-9 * (1 + np.abs(mean)), 1 / np.maximum(deviation, 1e-300), 0.0)
    return (x - mean) * scale, (np.asarray(judged, np.float64) - mean) * scale


def _parts(tree: Tree) -> tuple[Tree, ...]:
    return (tree,) if isinstance(tree, int) else tree
