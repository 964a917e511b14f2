#!/usr/bin/env bash
# What the TPU compiler says about the recipes of 1B and 7B parameters, without a TPU: ./launch/compile_plan.sh [flags]
#   (nothing)   all plans of docs/scale.md, for 256 chips of v5e and of v5p: about 20 minutes on 2 cores, 4 GB of memory.
#               Results in runs/plan/plans.jsonl, of this call alone; the table at the end, the exchanges on the way.
#   flags       those of python -m tools.plan (--help tells): that plan only, as in
#               --config=configs/hdlm_1b.py --topology=v5e:16x16 --mesh=16,16,1
# The environment is .venv-plan ($VENV_PLAN): requirements.txt and the libtpu that its jax asks for.
# shellcheck source=launch/common.sh
VENV=${VENV_PLAN:-.venv-plan}
source "$(dirname "$0")/common.sh"

results=runs/plan/plans.jsonl
if [ "${1:-}" = -h ]; then sed -n '2,7s/^# //p' "$0"; exit; fi

setup_venv
jax=$("$PY" -c 'import jax; print(jax.__version__)')
if [ "$(cat "$VENV/libtpu" 2>/dev/null)" != "$jax" ]; then
  say "installing the TPU compiler for jax $jax into $VENV (once)"
  "$PY" -m pip install -qq --disable-pip-version-check --no-input "jax[tpu]==$jax" \
    || die "pip could not install jax[tpu]==$jax (message above)"
  echo "$jax" >"$VENV/libtpu"
fi

# A described topology is enough: no platform but the CPU is started. Large programs need a deep stack to compile.
export JAX_PLATFORMS=cpu
ulimit -s "$(ulimit -H -s)"
plan() { "$PY" -m tools.plan "$@"; }

if [ $# -gt 0 ]; then
  plan "$@"
  exit
fi

# add CONFIG TOPOLOGY [flags]: compiles and keeps some plans.
add() {
  local config=$1 topology=$2
  shift 2
  say "$config, $topology: $* ($SECONDS s so far)"
  plan --config="configs/$config.py" --topology="$topology" --out=$results "$@" \
    || die "$config on $topology $* was not compiled (message above)"
}

mkdir -p "$(dirname $results)"
rm -f $results
for topology in v5e:16x16 v5p:8x8x4; do
  add hdlm_1b $topology --mesh=1,256,1 --mesh=4,64,1 --mesh=1,64,4
done
add hdlm_1b v5e:16x16 --mesh=1,256,1 --mesh=4,64,1 --config.optimizer.name=muon
# v5e: in parts, as 16 GiB ask for; with a tensor axis a shard has four times the sequences
add hdlm_7b v5e:16x16 --mesh=1,256,1 --mesh=4,64,1
add hdlm_7b v5e:16x16 --mesh=1,64,4 --config.train.microbatches=4
add hdlm_7b v5e:16x16 --mesh=1,64,4 --config.train.microbatches=4 --config.model.head=flat
add hdlm_7b v5p:8x8x4 --mesh=1,256,1 --mesh=4,64,1 --mesh=1,64,4 --config.train.microbatches=1

say "results"
plan --table=$results
