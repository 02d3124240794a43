#!/usr/bin/env bash
# Trains on a Google Cloud TPU VM, one host or a slice of several: thin over `gcloud`.
#
#   scripts/tpu_vm.sh [OPTIONS] create NAME                  the machines
#   scripts/tpu_vm.sh [OPTIONS] copy NAME                    the committed project, and its packages
#   scripts/tpu_vm.sh [OPTIONS] run NAME -- ARGUMENTS...     train_flax.py with them, on every host
#   scripts/tpu_vm.sh [OPTIONS] fetch NAME [DIRECTORY]       runs/ of host 0, by default to ./runs
#   scripts/tpu_vm.sh [OPTIONS] delete NAME                  the machines and all that is on them
#
#   --zone ZONE        default: gcloud's own (compute/zone)
#   --type TYPE        default: v5litepod-8, one host of 8 cores
#   --runtime VERSION  default: v2-alpha-tpuv5-lite
#   --spot             cheaper, may be taken away: `run` again goes on from what is on host 0,
#                      or, with --workdir=gs://BUCKET/NAME, from what is there
#   --dry-run          print the commands instead
#
# Untested on real machines.
set -euo pipefail

fail() {
  echo "error: $*" >&2
  exit 2
}

execute() {
  if [[ $dry_run ]]; then
    printf '%q ' "$@" | sed 's/ $//'
    echo
  else
    "$@"
  fi
}

tpu() {
  local verb=$1
  shift
  execute gcloud compute tpus tpu-vm "$verb" "$@" ${zone:+"--zone=$zone"}
}

on_every_host() {
  tpu ssh "$name" --worker=all --command="$1"
}

zone='' type=v5litepod-8 runtime=v2-alpha-tpuv5-lite spot='' dry_run=''
while [[ ${1-} == -* ]]; do
  case $1 in
    --zone | --type | --runtime)
      [[ ${2-} && $2 != -* ]] || fail "$1 needs a value"
      printf -v "${1#--}" %s "$2"
      shift 2
      ;;
    --spot) spot=--spot && shift ;;
    --dry-run) dry_run=1 && shift ;;
    --help)
      sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
      exit 0
      ;;
    *) fail "no such option: $1; there are --zone, --type, --runtime, --spot, --dry-run" ;;
  esac
done
verb=${1-} name=${2-}
case $verb in
  create | copy | run | fetch | delete) ;;
  *) fail "the first argument must be create, copy, run, fetch or delete, got '$verb'" ;;
esac
[[ $name =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]] ||
  fail "NAME must be lower-case letters, digits and hyphens, a letter first, got '$name'"
shift 2
[[ $dry_run ]] || command -v gcloud >/dev/null ||
  fail "gcloud is not installed: https://cloud.google.com/sdk/docs/install"

folder=flax-resnet # in the home directory of every host
case $verb in
  create)
    tpu create "$name" "--accelerator-type=$type" "--version=$runtime" $spot
    ;;
  copy)
    archive=${TMPDIR:-/tmp}/flax-resnet-$name.tar.gz
    root=$(git -C "$(dirname "$0")" rev-parse --show-toplevel) || fail "this is no git checkout"
    execute git -C "$root" archive --format=tar.gz "--output=$archive" HEAD
    tpu scp "$archive" "$name:$folder.tar.gz" --worker=all
    # The hosts' own Python is 3.10.
    on_every_host "mkdir -p $folder && tar -xzf $folder.tar.gz -C $folder && cd $folder \
&& python3 -m pip install --user --quiet uv && python3 -m uv venv --quiet --python 3.11 \
&& python3 -m uv pip install --quiet -c constraints.txt -e '.[tpu,gcs]'"
    execute rm -f "$archive"
    ;;
  run)
    [[ ${1-} == -- && $# -gt 1 ]] || fail "run NAME needs -- and the arguments of train_flax.py"
    shift
    on_every_host "cd $folder && .venv/bin/python scripts/train_flax.py$(printf ' %q' "$@")"
    ;;
  fetch)
    tpu scp "$name:$folder/runs" "${1:-.}" --recurse --worker=0
    ;;
  delete)
    tpu delete "$name" --quiet
    ;;
esac
