#!/usr/bin/env bash
# One command on every worker of a TPU VM slice, from its creation over preemptions to the end:
#   ZONE=us-west4-a TYPE=v5litepod-16 SETUP='mountpoint -q /mnt/shared || sudo mount ... /mnt/shared' \
#     ./launch/tpu_pod.sh --config=configs/hdlm_base.py --workdir=/mnt/shared/runs/base
# Needs gcloud, logged in, with a project; ships the last commit. Leave it running (tmux); started again, it takes over:
# what still trains is asked to save and leave first. UNTESTED on a TPU: run with a stand-in for gcloud alone.
TPU_NAME=${TPU_NAME:-hdlm}               # of the slice
ZONE=${ZONE:?is not set: the zone of the slice, as in us-west4-a}
TYPE=${TYPE:-v5litepod-16}
VERSION=${VERSION:-v2-alpha-tpuv5-lite}  # of the TPU VM's software
SPOT=${SPOT:-yes}                        # yes: cheaper, preemptible
SETUP=${SETUP:-true}                     # on every worker before anything else, repeatable: mounts the shared storage
MODE=${MODE:-train}                      # of hdlm_jax.main
KEEP=${KEEP:-no}                         # yes: the slice is not deleted after success
WAIT=${WAIT:-60}                         # seconds between attempts
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf '[tpu_pod %(%T)T] %s\n' -1 "$*"; }
tpu() { gcloud compute tpus tpu-vm "$@" --zone="$ZONE"; }
everywhere() { tpu ssh "$TPU_NAME" --worker=all --command="$1"; }
state() { tpu describe "$TPU_NAME" --format='value(state)' 2>/dev/null || echo NONE; }

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
git archive --format=tar.gz -o "$folder/hdlm_jax.tar.gz" HEAD
if [ "$SPOT" = yes ]; then market=(--spot); fi
install='pkill -TERM -f "hdlm_jax[.]main"; while pgrep -f "hdlm_jax[.]main" >/dev/null; do sleep 1; done; set -e
  mkdir -p hdlm_jax; tar -xzf hdlm_jax.tar.gz -C hdlm_jax; cd hdlm_jax; python3 -m pip install -q --user uv
  test -x .venv/bin/python || ~/.local/bin/uv venv -q --python 3.12 .venv
  ~/.local/bin/uv pip install -q -r requirements.txt -e ".[tpu,safetensors]"'
printf -v run '%q ' .venv/bin/python -m hdlm_jax.main --distributed --mode="$MODE" "$@"

failures=0  # in a row, on this slice
while true; do
  case $(state) in
    READY) ;;
    NONE)
      say "creating $TPU_NAME ($TYPE in $ZONE)"
      failures=0
      tpu create "$TPU_NAME" --accelerator-type="$TYPE" --version="$VERSION" ${market+"${market[@]}"} || sleep "$WAIT"
      continue ;;
    CREATING | STARTING | RESTARTING | REPAIRING | DELETING) sleep "$WAIT" && continue ;;
    *)
      say "the slice was taken away; deleting what is left of it"
      tpu delete "$TPU_NAME" --quiet || sleep "$WAIT"
      continue ;;
  esac
  code=0  # all of it every time: little to do where it is done
  { tpu scp "$folder/hdlm_jax.tar.gz" "$TPU_NAME:" --worker=all && everywhere "$SETUP" && everywhere "$install" \
    && everywhere "cd hdlm_jax && $run"; } || code=$?
  [ $code != 0 ] || break
  if [ $code = 75 ]; then failures=0; else failures=$((failures + 1)); fi  # 75: saved, run the same again
  say "left with code $code"
  [ $failures -lt 3 ] || { say "three failures in a row: stopping; $TPU_NAME is kept, and costs"; exit $code; }
  sleep "$WAIT"  # a preemption shows in the state by then
done
[ "$KEEP" = yes ] || tpu delete "$TPU_NAME" --quiet
say "done"
