"""What is measured on the network of a finished run, beyond its errors."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from flax_resnet.config import Block, Experiment, ResNetConfig
from flax_resnet.data import pixels, source
from flax_resnet.data.pixels import Normalization
from flax_resnet.data.source import Split
from flax_resnet.json_files import write_json
from flax_resnet.nn.scan import Tree
from flax_resnet.parallel import sharding
from flax_resnet.resnet import Bottleneck, ResNet, abstract, param_dtype
from flax_resnet.training.evaluation import make_evaluate_by_batch_statistics
from flax_resnet.training.workdir import BATCH_STATISTICS, RESPONSES, open_run, read_config

NUM_IMAGES = 2000  # for the responses: their deviation hardly varies from image to image
BATCH_SIZE = 500


def record(directory: Path, *, batch_statistics: bool = False) -> None:
    """Writes layer_responses.json into a finished run's work directory, unless it is there.

    Args:
        batch_statistics: also batch_statistics.json, the test error and loss with BatchNorm in
            training mode, as tanjeffreyz tested.

    Raises:
        CheckpointError: the run is not finished, or its last checkpoint is gone or damaged.
    """
    wanted = (RESPONSES, BATCH_STATISTICS) if batch_statistics else (RESPONSES,)
    if all((directory / name).exists() for name in wanted):
        return
    last = read_config(directory).train.steps
    run = open_run(directory / "checkpoints" / str(last))
    config, params, batch_stats = run.config, run.state.params, run.state.batch_stats
    constants = run.data_facts().normalization
    test = source.load(config.data, ("test",))["test"]
    found = layer_responses(config, params, batch_stats, test, constants)
    write_json(directory / RESPONSES, found)
    if batch_statistics:
        mesh = sharding.data_mesh()
        evaluate = make_evaluate_by_batch_statistics(config.model, constants, mesh)
        arrays = sharding.replicate(mesh, (params, batch_stats, test))
        result = evaluate(*arrays).mean()
        tree = {"test_error": result["error"], "test_loss": result["loss"]}
        write_json(directory / BATCH_STATISTICS, tree)


def layer_responses(
    config: Experiment,
    params: Tree,
    batch_stats: Tree,
    examples: Split,
    constants: Normalization,
) -> dict[str, Any]:
    """Standard deviation of each layer's output (paper, section 4.2 and figure 7).

    Over the first 2,000 images, all positions and all channels, by the running statistics.

    Returns:
        {"images": how many, "layers": names, "std": one for each layer}.
    """
    graphdef, _, _ = abstract(config.model)

    @jax.jit
    def moments(
        params: Tree, batch_stats: Tree, image: Float[Array, "b h w c"]
    ) -> list[tuple[Array, Array]]:
        model = nnx.merge(graphdef, params, batch_stats, copy=True)
        model.eval()
        return [(y.mean(), y.var()) for y in layer_outputs(model, image)]

    images = source.first(config.data, examples, NUM_IMAGES)
    size = len(images)
    sizes, found = [], []
    for start in range(0, size, BATCH_SIZE):
        image = images[start : start + BATCH_SIZE]
        x = pixels.normalize(jnp.array(image), constants, param_dtype(config.model))
        sizes.append(len(image))
        found.append(jax.device_get(moments(params, batch_stats, x)))
    mean, var = np.moveaxis(np.array(found, np.float64), -1, 0)  # each (batches, layers)
    weights = np.array(sizes)[:, None] / size
    total = (weights * (var + np.square(mean - (weights * mean).sum(0)))).sum(0)
    return {"images": size, "layers": layer_names(config.model), "std": np.sqrt(total).tolist()}


def layer_outputs(model: ResNet, x: Float[Array, "b h w c"]) -> list[Float[Array, "b h2 w2 c2"]]:
    """Every layer's output after BatchNorm, before ReLU and addition; names: `layer_names`.

    tanjeffreyz's stem has no BatchNorm: its output is the bare convolution's.
    """
    y = model.conv1(x)
    found = [y if model.bn1 is None else model.bn1(y)]
    x = model.stem(x)
    for stage in model.stages:
        for block in stage:
            y = block.bn1(block.conv1(x))
            found += [y, y := block.bn2(block.conv2(nnx.relu(y)))]
            if isinstance(block, Bottleneck):
                found.append(block.bn3(block.conv3(nnx.relu(y))))
            x = block(x)
    return found


def layer_names(config: ResNetConfig) -> list[str]:
    """Such as "conv1", "stages.0.0.conv1", "stages.0.0.conv2", ...; from the input on."""
    blocks = [f"stages.{s}.{b}" for s, n in enumerate(config.architecture.blocks) for b in range(n)]
    layers = (1, 2, 3) if config.architecture.block is Block.BOTTLENECK else (1, 2)
    return ["conv1", *(f"{block}.conv{i}" for block in blocks for i in layers)]
