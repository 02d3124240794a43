#!/usr/bin/env bash
# Runs an experiment on a Slurm cluster, many runs at once:
#
#   sbatch --array=0-9 scripts/slurm_array.sh depth --seeds=5
#
# Each task of the array does its share of the runs, one after another, on one GPU; the table and the
# figures are of all runs that are finished by then. The array must be a range. Near its time limit a
# task gets SIGTERM, saves its run and is queued again, and goes on there. The same command again goes
# on with what is left. Untested on a real cluster.
#SBATCH --job-name=flax-resnet-runs
#SBATCH --ntasks=1
#SBATCH --gpus=1
#SBATCH --cpus-per-task=4
#SBATCH --time=04:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --output=slurm-%A_%a.out
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:?submit this with sbatch}"
python=${PYTHON:-.venv/bin/python}
[[ -x $python ]] || {
  echo "error: no Python at $python; make .venv as the README says, or set PYTHON" >&2
  exit 2
}

# In the background, so that the shell hears the signal and can hand it on.
"$python" scripts/reproduce.py "$@" &
job=$!
trap 'kill -TERM "$job"; stopped=1' TERM
code=0
wait "$job" || code=$?
if [[ ${stopped-} ]]; then
  wait "$job" || true # the first wait ended at the signal
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
