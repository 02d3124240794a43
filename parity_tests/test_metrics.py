"""Claim: a batch's loss and errors are PyTorch's sums over its examples, and they add up.

In float64 to 1e-14 relative (measured: 3e-16); padding, whose label is -1, counts nowhere. The
log's line is their mean over the examples of all batches, which need not be equally large.
"""

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
