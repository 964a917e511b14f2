#!/usr/bin/env bash
# Speed and memory against PyTorch, side by side on this machine: ./launch/bench.sh [options]
#   --rounds=5           rounds of each case; in a round every program runs once, in turn
#   --cases="tiny small-cpu gpt2-vocab-cpu"   with a GPU: owt-small
#   --sample_steps=32    steps of the samplers' grid
#   --wait=120           seconds to wait for a quiet machine (1-minute load at most .3) before refusing to measure
# Results in runs/bench/CASE.jsonl, of this call alone; the table is python -m tools.bench --report=runs/bench.
# Exit code 3: the machine was not quiet, so that there are no figures, or they are not valid. Environment:
#   TORCH_PY      an interpreter that has torch (default: one of .venv-torch, made with torch 2.13.0)
#   LOADAVG_FILE  where the load average stands (default: /proc/loadavg)
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

torch=2.13.0 quiet=.3 results=runs/bench
load=${LOADAVG_FILE:-/proc/loadavg}
device=cpu cases="tiny small-cpu gpt2-vocab-cpu"
if nvidia-smi -L >/dev/null 2>&1; then device=gpu cases=owt-small; fi
rounds=5 sample_steps=32 wait=120
for argument in "$@"; do
  case "$argument" in
    --rounds=*) rounds=${argument#*=} ;;
    --cases=*) cases=${argument#*=} ;;
    --sample_steps=*) sample_steps=${argument#*=} ;;
    --wait=*) wait=${argument#*=} ;;
    -h | --help) sed -n '2,10s/^# //p' "$0"; exit ;;
    *) die "unknown option $argument; see $0 --help" ;;
  esac
done
for number in "$rounds" "$sample_steps" "$wait"; do
  [[ $number =~ ^[0-9]+$ ]] || die "'$number' is not a whole number; see $0 --help"
done
for name in $cases; do
  case $name in
    tiny | small-cpu | gpt2-vocab-cpu | owt-small) ;;
    *) die "--cases: no case '$name'; choose from tiny, small-cpu, gpt2-vocab-cpu, owt-small" ;;
  esac
done

refuse() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; exit 3; }
over() { awk -v x="$1" -v limit="$quiet" 'BEGIN { exit !(x > limit) }'; }
load_1m() { cut -d' ' -f1 "$load"; }
busy_ticks() { awk '/^cpu / { print $2 + $3 + $4 + $7 + $8 }' /proc/stat; }

# wait_for_load: until the 1-minute load average is low, at most --wait seconds.
wait_for_load() {
  local until=$((SECONDS + wait))
  while over "$(load_1m)"; do
    [ $SECONDS -lt $until ] || refuse "refused: 1-minute load average $(load_1m) is above $quiet after $wait s; stop what else runs here"
    sleep 1
  done
}

# wait_for_others: until all other processes together take little CPU over a second in which this script sleeps.
wait_for_others() {
  local until=$((SECONDS + wait)) before cores
  while true; do
    before=$(busy_ticks)
    sleep 1
    cores=$(awk -v a="$before" -v b="$(busy_ticks)" -v hz="$(getconf CLK_TCK)" 'BEGIN { printf "%.2f", (b - a) / hz }')
    over "$cores" || return 0
    [ $SECONDS -lt $until ] || refuse "stopped: other processes take $cores of the CPU cores between runs, above $quiet"
  done
}

# measure COMMAND...: one program, once, on the case $name; its line goes to the case's file.
measure() {
  wait_for_others
  "$@" --case="$name" | tee -a "$results/$name.jsonl"
}

# setup_torch: sets TORCH_PY, making .venv-torch with the pinned torch if need be.
setup_torch() {
  local folder=${VENV_TORCH:-.venv-torch} stamp="torch $torch $device" pip interpreter
  [ -z "${TORCH_PY:-}" ] || return 0
  TORCH_PY="$folder/bin/python"
  [ "$(cat "$folder/installed" 2>/dev/null)" != "$stamp" ] || return 0
  interpreter=$(find_python) || exit 1
  say "installing torch $torch into $folder (once)"
  "$interpreter" -m venv --clear "$folder"
  pip=("$TORCH_PY" -m pip install -qq --disable-pip-version-check --no-input)
  if [ $device = gpu ]; then
    "${pip[@]}" "torch==$torch" numpy || die "pip could not install torch==$torch (message above)"
  else  # the small build where the package index has it, else the one build it has, which runs on CPU as well
    "${pip[@]}" "torch==$torch+cpu" numpy 2>/dev/null \
      || "${pip[@]}" "torch==$torch" numpy \
      || die "pip could not install torch==$torch (message above); TORCH_PY=... names an interpreter that has it"
  fi
  echo "$stamp" >"$folder/installed"
}

[ -r "$load" ] || die "no $load: cannot tell whether the machine is quiet"
wait_for_load  # before anything is installed, and again after it
setup_venv
setup_torch
"$TORCH_PY" -c "import torch" || die "$TORCH_PY has no torch"
yardstick=("$TORCH_PY" launch/torch_peer.py --threads "$(nproc)" --sample_steps "$sample_steps")
if [ $device = gpu ]; then
  yardstick+=(--compile)
  [ "$("$PY" -c 'import jax; print(jax.default_backend())')" = gpu ] \
    || die "this machine has a GPU and the jax of $PY does not use it: $PY -m pip install \"jax[cuda13]\""
fi
wait_for_load

mkdir -p "$results"
rm -f "$results"/*.jsonl
ours=("$PY" -m tools.bench --sample_steps="$sample_steps")
for name in $cases; do
  for ((round = 1; round <= rounds; round++)); do
    say "$name, round $round of $rounds ($SECONDS s so far)"
    full=()
    if [ $round = 1 ]; then full=(--temp_bytes_full); fi  # it does not change from round to round
    measure "${yardstick[@]}"
    measure "${ours[@]}" --head=flat --process=hdlm ${full[@]+"${full[@]}"}
    measure "${ours[@]}" --head=flat --process=mdlm
    case $name in
      gpt2-vocab-cpu | owt-small) measure "${ours[@]}" --head=factorised --process=hdlm ;;
    esac
  done
done

say "results"
"$PY" -m tools.bench --report="$results"
