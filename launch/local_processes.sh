#!/usr/bin/env bash
# N processes on this machine, joined over loopback as the hosts of a pod are (tests; debugging without a cluster):
#   ./launch/local_processes.sh N COMMAND...   e.g.  2 python -m hdlm_jax.main --config=... --workdir=... --distributed
# Process 0 writes to the terminal, process i > 0 to LOGS/process_i.log; if one fails, the rest is ended and the end of
# its log shown. SIGTERM (and Ctrl-C) goes to all of them as SIGTERM; a second Ctrl-C ends them at once (130). Exit code:
# that of the first that failed; else 75 (saved, run me again) if one left so; else 0.
DEVICES=${DEVICES:-1}  # simulated CPU devices of each process
LOGS=${LOGS:-}         # folder of the logs (default: a new one under $TMPDIR)
PORT=${PORT:-}         # of the coordinator (default: a free one)
GRACE=${GRACE:-10}     # seconds from SIGTERM to SIGKILL, for those left when one has failed
set -euo pipefail

say() { printf 'local_processes: %s\n' "$*" >&2; }
if ! [[ ${1:-} =~ ^[1-9][0-9]*$ ]] || [ $# -lt 2 ]; then
  say "give a number of processes and a command: $0 2 python -m hdlm_jax.main --config=... --distributed"
  exit 2
fi
n=$1; shift
while [ -z "$PORT" ]; do  # below the ports that the system hands out itself
  PORT=$((20000 + RANDOM % 12000))
  if (exec 3<>"/dev/tcp/127.0.0.1/$PORT") 2>/dev/null; then PORT=; fi  # something answers there
done
LOGS=${LOGS:-$(mktemp -d)}
mkdir -p "$LOGS"
export JAX_COORDINATOR_ADDRESS=127.0.0.1:$PORT HDLM_NUM_PROCESSES=$n JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$DEVICES"

pids=() code=0 deadline= interrupts=0 asked=
send() { kill "-$1" "${pids[@]}" 2>/dev/null || true; }
trap 'send TERM' TERM
trap 'interrupts=$((interrupts + 1))' INT  # only counted here: bash forgets a signal that comes while its trap runs
for ((i = 0; i < n; i++)); do
  if [ "$i" = 0 ]; then
    HDLM_PROCESS_ID=0 "$@" &
  else
    HDLM_PROCESS_ID=$i "$@" >"$LOGS/process_$i.log" 2>&1 &
  fi
  pids[i]=$!
done
[ "$n" = 1 ] || say "process 0 writes here, the others to $LOGS/process_i.log"

while [ ${#pids[@]} -gt 0 ]; do
  if [ $interrupts -ge 2 ]; then send KILL; exit 130; fi
  if [ $interrupts = 1 ] && [ -z "$asked" ]; then asked=yes; send TERM; fi
  for i in "${!pids[@]}"; do
    if kill -0 "${pids[i]}" 2>/dev/null; then continue; fi
    status=0
    wait "${pids[i]}" || status=$?
    unset "pids[i]"
    if [ $status = 75 ] && [ $code = 0 ]; then code=75; fi
    if [ $status = 0 ] || [ $status = 75 ] || [ -n "$deadline" ]; then continue; fi
    code=$status deadline=$((SECONDS + GRACE))  # its peers would wait for it in the next exchange for ever
    say "process $i left with code $status; ending the others"
    if [ "$i" != 0 ]; then tail -n 20 "$LOGS/process_$i.log" >&2; fi
    [ ${#pids[@]} = 0 ] || send TERM
  done
  if [ -n "$deadline" ] && [ $SECONDS -ge "$deadline" ] && [ ${#pids[@]} -gt 0 ]; then send KILL; fi
  sleep 0.2 || true  # a Ctrl-C in a terminal ends it as well
done
exit $code
