#!/usr/bin/env bash
# Trains on a Slurm cluster, one process per GPU: sbatch scripts/slurm.sh --config=configs/resnet110.py
#
# The processes find each other by what Slurm tells them. Change the numbers to your machines'; the
# batch size must be divisible by all GPUs together. Near its time limit the job gets SIGTERM, saves
# its step and is queued again, and goes on there. Untested on a real cluster.
#SBATCH --job-name=flax-resnet
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=4
#SBATCH --time=04:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --output=slurm-%j.out
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:?submit this with sbatch}"
python=${PYTHON:-.venv/bin/python}
[[ -x $python ]] || {
  echo "error: no Python at $python; make .venv as the README says, or set PYTHON" >&2
  exit 2
}

# In the background, so that the shell hears the signal and can hand it on.
srun --kill-on-bad-exit=1 "$python" scripts/train_flax.py "$@" &
job=$!
trap 'kill -TERM "$job"; stopped=1' TERM
code=0
wait "$job" || code=$?
if [[ ${stopped-} ]]; then
  wait "$job" || true # the first wait ended at the signal
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
