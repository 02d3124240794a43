"""Claim: the program written for GPUs and TPUs is the CPU's but for the CPU's cures.

No such device is at hand where the tests run. So the library is told that it is on one: the program
it then writes is run on the CPU, in float64 (tolerance 1e-12 of each tensor's largest value; found
1.1e-14), and lowered for CUDA and for TPU, as far as the hardware's own compiler.
"""

import re

import jax
import numpy as np
import pytest

from flax_resnet.config import DType, Experiment, ResNetConfig, Shortcut
from flax_resnet.data import digits, pixels
from flax_resnet.parallel import sharding
from flax_resnet.step import init
from flax_resnet.training.feed import draw_steps
from flax_resnet.training.loop import compile_steps

TOLERANCE = 1e-12
CURES = re.compile('inlineable = "false"')


def prepare(model: ResNetConfig, size: int) -> tuple:
    """`size` training steps in one call, and what to call them with."""
    config = Experiment(model=model)
    config.train.batch_size = 8
    examples = digits.load()["train"]
    constants = pixels.make_normalization(config.data.preprocess, examples.image)
    mesh = sharding.data_mesh()
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), mesh.axis_names)
    program, state = init(config)
    call = compile_steps(config, program, constants, mesh)
    state, examples = sharding.replicate(mesh, (state, examples))
    drawn = draw_steps(config, 0, size, len(examples.label))
    return call, (state, examples, sharding.split_batch(mesh, drawn, config.parallel, axis=1))


def test_the_accelerators_program_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ResNetConfig(8, Shortcut.B, dtype=DType.FLOAT64)
    texts, results = [], []
    for backend in ("cpu", "gpu"):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        call, arguments = prepare(model, 3)
        texts.append(call.lower(*arguments).as_text())
        results.append(jax.device_get(call(*arguments)))
    assert [bool(CURES.search(text)) for text in texts] == [True, False]
    for ours, theirs in zip(*map(jax.tree.leaves, results), strict=True):
        if np.issubdtype(ours.dtype, np.floating):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE * np.abs(theirs).max())
        else:
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("scan_blocks", [False, True])
@pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.BFLOAT16])
def test_the_program_lowers(
    platform: str, scan_blocks: bool, dtype: DType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    depth = 20 if scan_blocks else 8
    model = ResNetConfig(depth, dtype=dtype, scan_blocks=scan_blocks, remat=scan_blocks)
    call, arguments = prepare(model, 2)
    text = jax.export.export(call, platforms=[platform])(*arguments).mlir_module()
    assert not CURES.search(text)
    convolutions = re.findall(r"stablehlo\.convolution.*", text)
    in_bfloat16 = [line for line in convolutions if "xbf16" in line]
    assert convolutions
    assert len(in_bfloat16) == (len(convolutions) if dtype is DType.BFLOAT16 else 0)
