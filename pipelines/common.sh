# Sourced by the pipelines: reads [--tiny] [--list] [OUT] and defines `run`, which runs one stage, and `fetch`.
#   --tiny   every stage on a two-layer model and small data made in code: seconds, no downloads, figures without a meaning
#   --list   run nothing: print what would be fetched, needed and taken (the head of the script) and every command
# A killed pipeline continues when it is run again: finished stages return at once.
set -euo pipefail
tiny='' list='' out=''
for word in "$@"; do
  case $word in
    --tiny) tiny=1 ;;
    --list) list=1 ;;
    -*) echo "usage: $0 [--tiny] [--list] [OUT]" >&2; exit 2 ;;
    *) out=$word ;;
  esac
done
here=$(cd "$(dirname "$0")" && pwd)
out=${out:-runs/$(basename "$0" .sh)${tiny:+-tiny}}
if [ -n "$list" ]; then
  # The paragraphs of the script's head that say what it costs, as comments, which `equipoise run` passes over.
  awk '/^source/ {exit} /^# [a-z]/ {on = /^# (fetches|needs|takes):/} on' "$0"
  run() { printf '%q ' "$@"; echo; }
elif [ -n "$tiny" ]; then # starting a process for each stage would take most of the time
  mkdir -p "$out"
  bash "$0" --tiny --list "$out" > "$out/commands"
  equipoise run --commands "$out/commands"
  exit
else
  run() { equipoise "$@"; }
fi

# For pipelines that take minutes as they are.
no_tiny() {
  [ -z "$tiny" ] || { echo "$0 has no --tiny: it takes minutes as it is" >&2; exit 2; }
}

# The functions named, at the same time, each on its share of the cores; their lines begin with their names.
side_by_side() {
  if [ -n "$list" ]; then
    for lane in "$@"; do "$lane"; done
    return
  fi
  local lane started=() failed=''
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( ($(nproc) + $# - 1) / $# ))}
  for lane in "$@"; do
    ("$lane" 2>&1 | sed -u "s/^/$lane: /") &
    started+=($!)
  done
  for lane in "${started[@]}"; do wait "$lane" || failed=1; done
  [ -z "$failed" ] || { echo "$0: a stage failed; run it again to continue after the last that finished" >&2; exit 1; }
}

# The model $2 of the Hub in the folder $1, with the template $3 (Safe RLHF's conversations), which its tokenizer doesn't bring.
fetch() {
  if [ -z "$list" ] && [ ! -e "$1/chat_template.jinja" ]; then
    hf download "$2" --local-dir "$1"
    cp "$here/${3:-beaver.jinja}" "$1/chat_template.jinja"
  fi
}
