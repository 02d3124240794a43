"""The figures and the table of finished runs: `python scripts/plot.py RUNS... [--out DIR]`.

RUNS are work directories, what reproduce.py keeps of them, or folders of either. Runs that differ
in their seeds alone are drawn as one, by their mean and standard deviation. Drawn is what the runs
suffice for, each as PNG and SVG: plain_vs_residual (or curves), side_by_side, depth and
layer_responses; or those of them that --only names. Where DIR holds runs itself, its README.md is
written too. With --index RUNS is a folder of experiments, such as results, and its README.md is
written.
"""

import sys
from pathlib import Path

from absl import flags

from flax_resnet import cli, places
from flax_resnet.errors import ConfigError, ResultsError
from flax_resnet.studies import figures, tables
from flax_resnet.studies.groups import group_runs
from flax_resnet.studies.published import read_published_curves
from flax_resnet.studies.runs import find_runs
from flax_resnet.training.mirror import fetch

OUT = cli.define_path("out", None, "directory for the figures; made if need be")
ONLY = flags.DEFINE_list("only", [], "the figures to draw, such as side_by_side; default: all")
PUBLISHED = cli.define_path(
    "published", None, "folder of tanjeffreyz's published metrics: its test curves are drawn too"
)
INDEX = flags.DEFINE_bool("index", False, "write the table of all experiments in RUNS")


def main(*runs: str) -> None:
    for flag in (OUT, PUBLISHED, ONLY):
        if INDEX.value and flag.present:
            raise ConfigError(f"--{flag.name} would change nothing beside --index")
    for flag in (PUBLISHED, ONLY):
        if flag.value and not OUT.value:
            raise ConfigError(f"--{flag.name} is drawn in --out, which is missing")
    if INDEX.value:
        for root in runs:
            tables.write_index(places.local_path(root, "RUNS"))
        return
    found = [fetch(places.place(run, "RUNS"), checkpoints=False) for run in runs]
    groups = group_runs(find_runs(found))
    print("\n".join(tables.table(groups, Path.cwd())))
    if OUT.value:
        out = OUT.value
        published = read_published_curves(PUBLISHED.value) if PUBLISHED.value else None
        drawn, failed = figures.draw_all(groups, out, published, ONLY.value)
        if missing := sorted(set(ONLY.value) - {Path(name).stem for name in (*drawn, *failed)}):
            raise ConfigError(
                f"--only must name figures that these runs suffice for, got {', '.join(missing)}"
            )
        if list(out.glob("*/summary.json")):
            tables.write_readme(out, drawn)
        print(f"written to {out}: {', '.join(drawn) or 'nothing'}", file=sys.stderr)
        if failed:
            raise ResultsError(f"not drawn: {', '.join(failed)}; the warnings above say why")


if __name__ == "__main__":
    cli.run(main, "RUNS...")
