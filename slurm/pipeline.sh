#!/bin/bash
# Caption, cache, train, generate, evaluate: five jobs, each of which starts when the one before has ended well.
#
#   slurm/pipeline.sh slurm/pipeline.example.env
#
# The file says the words of each step, as they stand after slurm/STEP.sbatch; a step without words is left out. A step that is requeued is waited for;
# one that fails ends the chain. Job ids are printed, one step per line. Submit from the folder that holds slurm/.
set -euo pipefail
[ -e slurm/job.sh ] || { echo "error: $PWD has no slurm/job.sh: call it from the folder that holds slurm/" >&2; exit 2; }
if [ $# != 1 ] || [ ! -r "$1" ]; then echo "error: slurm/pipeline.sh FILE: give a readable file such as slurm/pipeline.example.env, got ${*:-nothing}" >&2; exit 2; fi

SBATCH=() CAPTION=() CACHE=() TRAIN=() GENERATE=() EVALUATE=()
# shellcheck source=/dev/null
. "$1"
[ $((${#CAPTION[@]} + ${#CACHE[@]} + ${#TRAIN[@]} + ${#GENERATE[@]} + ${#EVALUATE[@]})) -gt 0 ] || { echo "error: $1 sets none of CAPTION, CACHE, TRAIN, GENERATE and EVALUATE" >&2; exit 2; }

before=
# submit STEP WORDS...: the step's job waits for the one before
submit() {
  local step=$1
  shift
  [ $# -gt 0 ] || return 0
  before=$(sbatch --parsable ${before:+--dependency=afterok:$before --kill-on-invalid-dep=yes} "${SBATCH[@]}" "slurm/$step.sbatch" "$@")
  before=${before%%;*}
  echo "$step $before"
}
submit caption "${CAPTION[@]}"
submit cache "${CACHE[@]}"
submit train "${TRAIN[@]}"
submit generate "${GENERATE[@]}"
submit evaluate "${EVALUATE[@]}"
