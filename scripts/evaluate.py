"""Test error of a run or a checkpoint: `python scripts/evaluate.py --checkpoint runs/resnet20`.

A work directory stands for its newest checkpoint; `WORKDIR/checkpoints/STEP` for that one. The
settings are the run's own, and each can be overridden: `--config.data.dir=...`. The last line
printed is JSON: {"test_error": fraction, "test_loss": nats, "examples": count}.
"""
