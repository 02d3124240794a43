"""Test error of a run: `python scripts/evaluate.py --checkpoint runs/resnet20`.

A work directory stands for its newest checkpoint, `WORKDIR/checkpoints/STEP` for that one. The
settings are the run's own; each can be overridden: `--config.data.dir=...`. The last line printed
is JSON: {"test_error": fraction, "test_loss": nats per example, "examples": count}.
"""

import json
from pathlib import Path

from absl import flags

from flax_resnet import cli, data, sharding, workdir
from flax_resnet.checkpoint import load_state
from flax_resnet.evaluation import make_evaluate
from flax_resnet.train import init

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "WORKDIR or WORKDIR/checkpoints/STEP")
flags.mark_flag_as_required("checkpoint")
cli.define_overrides()


def main() -> None:
    directory, step = workdir.locate(Path(CHECKPOINT.value))
    config = cli.override(workdir.read_config(directory))
    splits = data.load(config.data)
    mesh = sharding.data_mesh()
    program, state = init(config)
    state = load_state(directory, sharding.replicate(mesh, state), step)
    constants = data.make_normalization(config.data.preprocess, splits["train"].image)
    evaluate = make_evaluate(config.model, program, constants, mesh, config.train.eval_batch_size)
    test = sharding.replicate(mesh, splits["test"])
    result = evaluate(state.params, state.batch_stats, test)
    print(f"{directory}, step {state.step}")
    print(
        json.dumps(
            {
                "test_error": result["error"],
                "test_loss": result["loss"],
                "examples": len(splits["test"].label),
            }
        )
    )


if __name__ == "__main__":
    cli.run(main)
