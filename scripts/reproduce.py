"""Every run of a named experiment, its table and its figures: `python scripts/reproduce.py depth`.

Experiments: plain-vs-residual, depth, projection-init, tanjeffreyz, paper. Runs live in
runs/EXPERIMENT/NETWORK-sSEED; what is small of a finished one goes to OUT/NETWORK-sSEED, and the
table and the figures to OUT. The same command again skips what is finished and goes on with the
rest. On a machine with several accelerators each has one run at a time.

A task of a Slurm array (scripts/slurm_array.sh) does its share of the runs, and then draws what all
tasks have finished; elsewhere --share=I/N says which share.

With --steps the learning rate falls at the same fractions of the whole as in the full recipe. Any
other setting can be overridden for all runs: `--config.train.batch_size=256`.
"""

import os
import shlex
import sys
from pathlib import Path

import filelock
from absl import flags

from flax_resnet import cli
from flax_resnet.json_files import write_json
from flax_resnet.studies import figures, recipes, sweep, tables
from flax_resnet.studies.groups import group_runs
from flax_resnet.studies.recipes import Job
from flax_resnet.studies.responses import record
from flax_resnet.studies.runs import copy_small_files, find_runs
from flax_resnet.training import workdir
from flax_resnet.training.loop import fit

SEEDS = flags.DEFINE_string("seeds", "1", "how many (5), from..to (0..4), or which (0,3)")
STEPS = flags.DEFINE_integer("steps", None, "in the place of the recipe's")
DATA_DIR = flags.DEFINE_string("data_dir", None, "of tensorflow-datasets")
OUT = cli.define_path("out", None, "default: results/EXPERIMENT, or results/EXPERIMENT-STEPS")
NETWORKS = flags.DEFINE_list("networks", None, "such as A-20,plain-20; default: the experiment's")
SHARE = flags.DEFINE_string(
    "share", None, "I/N: one of N shares of the runs, from 0; default: a Slurm array's, or all"
)
WORKER = cli.define_path("worker", None, "for reproduce.py itself: the run to train")
cli.define_overrides(
    "They hold for all runs, over what the experiment sets; the defaults are the paper's.",
    own={
        "seed": "--seeds",
        "data.dir": "--data_dir",
        "model.depth": "--networks",
        "model.shortcut": "--networks",
        "train.steps": "--steps",
    },
)
SOME_FAILED = 1  # exit code


def main(name: str) -> None:
    study = recipes.find_study(name)
    if WORKER.value:
        train(WORKER.value, study.batch_statistics)
        return
    out = OUT.value or Path(f"results/{name}{f'-{STEPS.value}' if STEPS.value else ''}")
    workdirs = Path("runs") / out.name
    jobs = make_jobs(study)
    for job in jobs:
        for directory in (workdirs / job.name, out / job.name):
            workdir.check_same(directory, job.config, "--out")
    mine = sweep.parse_share(SHARE.value) if SHARE.value else sweep.array_share(os.environ)
    share = sweep.share(jobs, *mine)
    if len(share) < len(jobs):
        print(f"share {mine[0]}/{mine[1]}: {len(share)} of {len(jobs)} runs", file=sys.stderr)
    failures = run(name, share, workdirs, out)
    workdirs.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(workdirs.parent / ".report.lock"):  # the others of an array write it too
        report(name, out)
    for job, reason in failures.items():
        print(f"failed: {job}: {reason}", file=sys.stderr)
    if failures:
        print(f"{len(failures)} of {len(share)} runs failed; run it again", file=sys.stderr)
        sys.exit(SOME_FAILED)


def make_jobs(study: recipes.Study) -> list[Job]:
    seeds = recipes.parse_seeds(SEEDS.value)
    jobs = recipes.make_jobs(study, NETWORKS.value, seeds, STEPS.value)
    for job in jobs:
        job.config.data.dir = DATA_DIR.value
        cli.override(job.config)
    cli.check_effects([job.config for job in jobs])
    return jobs


def run(name: str, jobs: list[Job], workdirs: Path, out: Path) -> dict[str, str]:
    def is_done(job: Job) -> bool:
        summary = workdir.read_summary(out / job.name)
        return summary is not None and summary["steps"] == job.config.train.steps

    def command(directory: Path) -> list[str]:
        return [sys.executable, __file__, name, f"--worker={directory}"]

    def keep(job: Job) -> None:
        copy_small_files(workdirs / job.name, out / job.name)

    missing = [job for job in jobs if not is_done(job)]
    print(f"{len(jobs) - len(missing)} of {len(jobs)} runs are finished already", file=sys.stderr)
    if not missing:
        return {}
    return sweep.run(jobs, workdirs, command, sweep.accelerators(), is_done, keep)


def train(directory: Path, batch_statistics: bool) -> None:
    sweep.stop_with_parent()
    fit(cli.checked(workdir.read_config(directory)), directory)
    record(directory, batch_statistics=batch_statistics)


def report(name: str, out: Path) -> None:
    """The table and the figures of all runs that are in `out` by now."""
    if not list(out.glob("*/summary.json")):
        return
    command = cli.as_typed(shlex.join(["python", "scripts/reproduce.py", *sys.argv[1:]]))
    write_json(out / tables.SWEEP, {"experiment": name, "command": command})
    drawn = figures.draw_all(group_runs(find_runs([out])), out).written
    tables.write_readme(out, drawn)
    if out.resolve().parent.name == "results":
        tables.write_index(out.parent)
    print(f"written: {out / 'README.md'}, {', '.join(drawn) or 'no figure'}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main, "EXPERIMENT")
