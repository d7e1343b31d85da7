#!/bin/bash
# One run on the cards of several nodes: sbatch slurm.sh RECIPE SHARED/run [KEY=VALUE ...]
# README.md beside this file says what was tried of it, and what was not.
#SBATCH --job-name=lowmem-rlhf
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-gpu=4
#SBATCH --time=24:00:00
#SBATCH --no-kill
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

if [ $# -lt 2 ]; then
  echo "usage: sbatch slurm.sh RECIPE SHARED/run [KEY=VALUE ...]" >&2
  exit 2
fi

# The first node of the job holds the rendezvous; the job's number tells apart the ports of jobs that share a node.
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${hosts%%$'\n'*}
port=$((20000 + SLURM_JOB_ID % 20000))

# What torchrun starts for each card, and starts again after a loss: it goes on where there is a run. All are started
# at once, and the run's folder is made only after the model is loaded, so that all of them decide alike.
worker='
if [ -e "$2/recipe.yaml" ]; then set -- "$@" --resume; fi
exec python -m lowmem_rlhf train "$1" --output "${@:2}"
'

# One torchrun a node. With FEWEST_NODES of them left the run goes on; a node that comes back joins it.
srun --no-kill --kill-on-bad-exit=0 --wait=0 \
  torchrun \
  --nnodes="${FEWEST_NODES:-1}:$SLURM_JOB_NUM_NODES" \
  --nproc-per-node="${PROCESSES_PER_NODE:-gpu}" \
  --max-restarts="${MAX_RESTARTS:-3}" \
  --rdzv-backend=c10d \
  --rdzv-endpoint="$head:$port" \
  --rdzv-id="$SLURM_JOB_ID" \
  --no-python bash -c "$worker" worker "$@"
