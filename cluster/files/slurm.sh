#!/bin/bash
# One training in one Slurm allocation: a Ray head on the first node, Ray workers on the others, `arae train` on top.
#
#   export ARAE_RUNS=/shared/runs          # a path that every node sees; s3://… needs MLFLOW_TRACKING_URI too
#   sbatch --nodes=2 --gpus-per-node=8 cluster/files/slurm.sh imagenet-alexnet name=mine data.train=/shared/train.beton
#
# What stands behind slurm.sh goes to `arae train`, whose workers are one to a GPU (one to a node where there are none).
# Two minutes before its time is up, or when Slurm pre-empts it, the job gets SIGTERM: training saves and ends with 75,
# and the job puts itself back into the queue, to go on from that state. Any other exit code is the job's.
#
#   ARAE_HOME        the checkout with its .venv, at a path that every node sees; default: where sbatch was called
#   ARAE_INTERFACE   the network interface by which nodes reach one another, e.g. ib0; default: that of the host's name
#   ARAE_WORKERS     workers, N or MIN:MAX; default: nodes × GPUs a node
#   ARAE_REQUEUES    how many times the job may put itself back; default 20
#
# Security: Ray listens on that interface to whoever has the token, which is made for this job, readable by you alone,
# and removed at its end. There is no dashboard. No secret is in the script or in the job's environment.
#
# Checked: shellcheck; run by tests/test_slurm.py with stand-ins for Slurm, Ray and arae (order of steps, signals,
# requeue, exit codes), and by tests/cluster/test_cluster_slurm.py with stand-ins for Slurm alone, real Ray and
# a real training. Not run: Slurm itself, and several machines under it.
#
#SBATCH --job-name=arae
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=arae-%j.log
set -euo pipefail

say() { echo "slurm.sh: $*" >&2; }
refuse() { say "$*"; exit 2; }

[ $# -gt 0 ] || refuse "name a recipe: sbatch slurm.sh RECIPE [key=value …]"
[ -n "${SLURM_JOB_ID:-}" ] || refuse "no Slurm job: start it by sbatch"
[ -n "${ARAE_RUNS:-}" ] || refuse "ARAE_RUNS is not set: name a folder that every node sees, or s3://bucket/prefix"
home=${ARAE_HOME:-$SLURM_SUBMIT_DIR}
[ -x "$home/.venv/bin/arae" ] || refuse "ARAE_HOME=$home: no .venv/bin/arae there; run \`make setup\` in the checkout"
export PATH=$home/.venv/bin:$PATH

nodes=$SLURM_JOB_NUM_NODES
gpus=${SLURM_GPUS_ON_NODE:-0}
cpus=${SLURM_CPUS_ON_NODE:-1}
workers=${ARAE_WORKERS:-$((nodes * (gpus > 0 ? gpus : 1)))}
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${hosts[0]}
port=$((20000 + SLURM_JOB_ID % 10000)) # another job on this node has another

# One token a job, in a file, for it would be seen in the environment of a process and in Slurm's records of the job.
tokens=${XDG_STATE_HOME:-$HOME/.local/state}/arae
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$tokens/ray-token-$SLURM_JOB_ID RAY_USAGE_STATS_ENABLED=0
(
  umask 077
  mkdir -p "$tokens"
  python -c 'import secrets; print(secrets.token_hex(32))' >"$RAY_AUTH_TOKEN_PATH"
)

# The address of a node on the interface, as that node sees it (loopback is of no use); gloo and NCCL talk there too.
if [ -n "${ARAE_INTERFACE:-}" ]; then
  export GLOO_SOCKET_IFNAME=$ARAE_INTERFACE NCCL_SOCKET_IFNAME=$ARAE_INTERFACE
fi
# shellcheck disable=SC2016 # expanded on the node
own_address='if [ -n "${ARAE_INTERFACE:-}" ]; then ip -4 -o addr show dev "$ARAE_INTERFACE"
else getent ahostsv4 "$(hostname)"; fi |
  grep -oE "([0-9]+\.){3}[0-9]+" | grep -v "^127\." | head -n 1'
# A step has the processors that it asks for, and no others.
step=(srun --overlap --cpus-per-task="$cpus" --cpu-bind=none --ntasks-per-node=1)
on_head=("${step[@]}" --nodes=1 --ntasks=1 --nodelist="$head")
address=$("${on_head[@]}" bash -c "$own_address")
[ -n "$address" ] || refuse "$head has no IPv4 address${ARAE_INTERFACE:+ on $ARAE_INTERFACE}: set ARAE_INTERFACE"

started=()
stop_ray() {
  if [ ${#started[@]} -gt 0 ]; then kill -TERM "${started[@]}" 2>/dev/null || true; fi
  wait || true
  rm -f "$RAY_AUTH_TOKEN_PATH"
}
trap stop_ray EXIT

training=
stopping= # asked to, at any time
signalled= # since the last look
on_term() {
  stopping=1 signalled=1
  say "asked to stop"
  if [ -n "$training" ]; then kill -TERM "$training" 2>/dev/null || true; fi
}
trap on_term TERM

resources=(--num-cpus="$cpus" --num-gpus="$gpus" --disable-usage-stats --block)
say "head on $head ($address:$port), $workers workers on $nodes nodes"
"${on_head[@]}" ray start --head --node-ip-address="$address" --port="$port" --include-dashboard=false \
  "${resources[@]}" &
started+=($!)
for ((tries = 0; ; tries++)); do
  if (exec 3<>"/dev/tcp/$address/$port") 2>/dev/null; then break; fi
  kill -0 "${started[0]}" 2>/dev/null || { say "the head did not start"; exit 1; }
  [ "$tries" -lt 600 ] || { say "the head does not answer at $address:$port"; exit 1; }
  sleep 0.2
done
if [ "$nodes" -gt 1 ] && [ -z "$stopping" ]; then
  "${step[@]}" --nodes=$((nodes - 1)) --ntasks=$((nodes - 1)) --exclude="$head" \
    bash -c "exec ray start --address=$address:$port --node-ip-address=\"\$($own_address)\" ${resources[*]}" &
  started+=($!)
fi

code=75
if [ -z "$stopping" ]; then
  arae train "$@" --workers "$workers" --address "$address:$port" &
  training=$!
  if [ -n "$stopping" ]; then on_term; fi # it came between the two lines above
  # A signal ends `wait` with more than 128, not the training, which is saving; its own code comes from the next `wait`.
  while true; do
    code=0 signalled=
    wait "$training" || code=$?
    if [ "$code" -le 128 ] || [ -z "$signalled" ]; then break; fi
  done
  if [ "$code" = 143 ] && [ -n "$stopping" ]; then code=75; fi # the signal came before arae could listen to it
fi
if [ "$code" = 75 ]; then
  # Of a job that was cancelled the state is no longer RUNNING: it must not come back.
  state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)
  if [ "$state" != RUNNING ]; then
    say "stopped with a good state; the job is ${state:-gone}, so it is not put back"
  elif [ "${SLURM_RESTART_COUNT:-0}" -ge "${ARAE_REQUEUES:-20}" ]; then
    say "stopped with a good state; put back ${SLURM_RESTART_COUNT:-0} times already: sbatch the same command again"
  else
    say "stopped with a good state; back into the queue"
    stop_ray # requeueing ends this job at once
    scontrol requeue "$SLURM_JOB_ID"
  fi
fi
exit "$code"
