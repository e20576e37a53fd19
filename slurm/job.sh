# Shared by the batch scripts, which source it in the folder they were submitted from.
# shellcheck shell=bash

set -uo pipefail
cluster=${SDCOURSE_CLUSTER:-slurm/cluster.env}
# shellcheck source=/dev/null
if [ -e "$cluster" ]; then . "$cluster"; fi
PYTHON=${PYTHON:-.venv/bin/python}
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}

# log_to FOLDER: everything from here on goes to FOLDER/slurm-JOB.log, also after a restart
log_to() {
  mkdir -p "$1" || exit 2
  echo "the log is $1/slurm-$job.log"
  exec >>"$1/slurm-$job.log" 2>&1
  echo "== job $job, start $((1 + ${SLURM_RESTART_COUNT:-0})), on $SLURM_JOB_NODELIST, $(date '+%F %T')"
}

# run_ranks MODULE OPTIONS...: one process per task of the job; returns their exit code
run_ranks() {
  local ranks code cancelled=
  export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
  if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi # srun does not take it over by itself
  if [ -z "${SLURM_JOB_END_TIME:-}" ]; then # older SLURMs do not say when the job ends
    SLURM_JOB_END_TIME=$(date -d "$(squeue -h -j "$SLURM_JOB_ID" -o %e)" +%s 2>/dev/null) && export SLURM_JOB_END_TIME
  fi
  trap 'cancelled=yes' TERM # scancel and the time limit; the ranks get it too, save and leave, and we wait for them
  # A rank is deaf until Python has opened its flag: in its first moments a signal would kill it, and nothing would be saved or requeued.
  # shellcheck disable=SC2016,SC2086
  srun --label --kill-on-bad-exit=1 bash -c 'trap "" USR1 TERM; exec "$@"' rank $PYTHON -m "$@" &
  ranks=$!
  while kill -0 $ranks 2>/dev/null; do wait $ranks; done
  wait $ranks
  code=$?
  trap - TERM
  if [ $code = 75 ]; then requeue "$cancelled"; fi
  echo "== job $job ends with code $code, $(date '+%F %T')"
  return $code
}

# requeue CANCELLED: the ranks have saved and want to go on (code 75)
requeue() {
  if [ -n "$1" ] && [ "$(squeue -h -j "$SLURM_JOB_ID" -o %r)" != TimeLimit ]; then
    echo "== job $job was cancelled, or SLURM requeues it by itself: the same sbatch command goes on"
  elif [ "${SLURM_RESTART_COUNT:-0}" -ge "${MAX_RESTARTS:-200}" ]; then
    echo "== job $job has been restarted $SLURM_RESTART_COUNT times: not again; the same sbatch command goes on"
  elif scontrol requeue "$job"; then
    echo "== job $job is requeued"
  else
    echo "== job $job cannot be requeued here: the same sbatch command goes on"
  fi
}
