#!/usr/bin/env bash
# The speed run (docs/speedrun.md): from text to a model whose exact bound on held-out textbooks is at most 5.50 nats
# per token. Prints seconds, tokens and FLOPs; --keep=NAME puts the line into docs/runs/speedrun.json, whose table is
# docs/speedrun.md's. Needs the data under $HDLM_DATA (../shared/data). Further arguments go to the training:
#   ./launch/speedrun.sh [--keep=NAME] [--config.train.steps=900 ...]
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

case "${1:-}" in
  -h | --help) sed -n '2,6s/^# //p' "$0"; exit ;;
esac

export HDLM_DATA=${HDLM_DATA:-../shared/data}
setup_venv
exec "$PY" -m tools.speedrun "$@"
