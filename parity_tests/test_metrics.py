"""Claim: a batch's loss and errors are PyTorch's sums over its examples, and they add up.

In float64 to 1e-14 relative (measured: 3e-16); padding, whose label is -1, counts nowhere. The
log's line is their mean over the examples of all batches, which need not be equally large.

With label smoothing, and with the two classes of mixed images, the loss and its gradient are those
of `torch.nn.CrossEntropyLoss`, whose targets are then probabilities: to 1e-14 of the largest value
(measured: 2.1e-16). The mildest mutant is 4.5e-2 away.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_resnet.step import Metrics, measure
from parity_tests.pair import torch
from torch_ref import step as twin

LABELS = {"whole": [0, 1, 2, 0], "padded": [2, 0, -1, -1], "padding": [-1, -1, -1, -1]}


def logits(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(4, 3))


@pytest.mark.parametrize("name", LABELS)
def test_loss_and_errors_are_pytorchs_without_the_padding(name: str) -> None:
    for seed in range(8):
        ours = measure(jnp.asarray(logits(seed)), jnp.array(LABELS[name]))
        theirs, label = torch.tensor(logits(seed)), torch.tensor(LABELS[name])
        valid = label >= 0
        theirs = twin.measure(theirs[valid], label[valid])
        np.testing.assert_allclose(ours.loss, theirs.loss, rtol=1e-14)
        assert (int(ours.errors), int(ours.examples)) == (int(theirs.errors), theirs.examples)


SMOOTHINGS = [0.0, 0.1]
MIXED = {"label": [0, 1, 2, 0], "other": [0, 2, 1, 1], "share": [0.3, 1.0, 0.5, 0.8]}


def loss_and_gradient(label_smoothing: float, mixed: dict[str, Any]) -> list[np.ndarray]:
    """Ours: of the sum over four examples, by the logits."""

    def loss_fn(x: jax.Array) -> jax.Array:
        arrays = {name: jnp.asarray(value) for name, value in mixed.items()}
        return measure(x, **arrays, label_smoothing=label_smoothing).loss

    return [np.asarray(x) for x in jax.value_and_grad(loss_fn)(jnp.asarray(logits(0)))]


def pytorchs_own(label_smoothing: float, mixed: dict[str, Any]) -> list[np.ndarray]:
    """The same from torch.nn.CrossEntropyLoss, its targets being probabilities where it is given
    two classes.
    """
    loss_fn = torch.nn.CrossEntropyLoss(reduction="sum", label_smoothing=label_smoothing)
    x, target = torch.tensor(logits(0), requires_grad=True), torch.tensor(mixed["label"])
    if "share" in mixed:
        target = torch.zeros(4, 3, dtype=torch.float64)
        for row, a, b, share in zip(target, *mixed.values(), strict=True):
            row[a] += share
            row[b] += 1 - share
    loss = loss_fn(x, target)
    loss.backward()
    return [loss.detach().numpy(), x.grad.numpy()]


def distance(ours: list[np.ndarray], theirs: list[np.ndarray]) -> float:
    pairs = zip(ours, theirs, strict=True)
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


@pytest.mark.parametrize("label_smoothing", SMOOTHINGS)
@pytest.mark.parametrize("names", [["label"], list(MIXED)], ids=["labels", "mixed"])
def test_smoothed_and_mixed_labels_have_pytorchs_loss_and_gradient(
    names: list[str], label_smoothing: float
) -> None:
    mixed = {name: MIXED[name] for name in names}
    theirs = pytorchs_own(label_smoothing, mixed)
    assert distance(loss_and_gradient(label_smoothing, mixed), theirs) <= 1e-14
    tensors = {name: torch.tensor(np.array(value)) for name, value in mixed.items()}
    loss = twin.measure(torch.tensor(logits(0)), **tensors, label_smoothing=label_smoothing).loss
    assert distance([loss.numpy()], theirs[:1]) <= 1e-14


def test_a_mutant_of_them_fails() -> None:
    right = pytorchs_own(0.1, MIXED)
    for mutant in (
        {"label_smoothing": 0.1 * 3 / 2, "mixed": MIXED},  # spread over the other classes alone
        {"label_smoothing": 0.0, "mixed": MIXED},
        {"label_smoothing": 0.1, "mixed": MIXED | {"share": [0.7, 0.0, 0.5, 0.2]}},
        {"label_smoothing": 0.1, "mixed": {"label": MIXED["label"]}},
    ):
        assert distance(loss_and_gradient(**mutant), right) > 4e-2


def test_a_mixed_image_is_right_in_the_class_of_its_larger_share() -> None:
    """Of two halves in its own; smoothing changes nothing of it."""
    x = jnp.eye(3)[jnp.array([0, 0, 2, 1])]  # a sure answer for each
    label, other = jnp.array([0, 1, 2, 1]), jnp.array([1, 0, 1, 0])
    for shares, wrong in {
        (1.0,) * 4: 1,
        (0.5,) * 4: 1,
        (0.4,) * 4: 3,
        (0.9, 0.1, 0.9, 0.9): 0,
    }.items():
        arrays = x, label, other, jnp.array(shares)
        assert measure(*arrays, label_smoothing=0.9).errors == wrong
        assert twin.measure(*(torch.tensor(np.array(x)) for x in arrays)).errors == wrong


def test_the_mean_of_a_sum_is_over_all_examples() -> None:
    batches = [measure(jnp.asarray(logits(i)), jnp.array(LABELS[x])) for i, x in enumerate(LABELS)]
    total = Metrics.zeros()
    for batch in batches:
        total = total.plus(batch)
    assert [x.dtype.name for x in total] == ["float32", "int32", "int32"]
    assert total.examples == 6
    mean = total.mean()
    assert mean["loss"] == pytest.approx(sum(float(batch.loss) for batch in batches) / 6, rel=1e-6)
    assert mean["error"] == pytest.approx(sum(int(batch.errors) for batch in batches) / 6, rel=1e-6)
