#!/usr/bin/env bash
# Every row of the table on one GPU, in order of worth; about 25 minutes on an H100 (predicted minutes in brackets).
#
#   benchmarks/session.sh [OUT]                     # OUT: folder for JSON lines and logs, default runs/bench
#   ROWS='policy|llm-1.5b$' benchmarks/session.sh   # only the rows whose names match
#   TINY=1 ROWS=vit benchmarks/session.sh /tmp/dry  # toy sizes, on CPU too
#
# A row that fails does not stop the others. MMPEFT_CACHE keeps kernel timings between the commands. Stop it at any time:
# each arm has written its line by then. Copy $OUT/h100.jsonl onto benchmarks/results/h100.jsonl (append), then
# `python -m benchmarks.table`.
set -u
OUT=${1:-runs/bench}
mkdir -p "$OUT"
export MMPEFT_CACHE="$OUT/cache" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
lines="$OUT/h100.jsonl"

row() {  # name, minutes, arguments
  local name=$1 minutes=$2
  shift 2
  [[ $name =~ ${ROWS:-.} ]] || return 0
  echo "=== $name: $* (predicted $minutes min)"
  timeout "$((minutes * 60 + 60))" python -m "$@" ${TINY:+--tiny} --out "$lines" >"$OUT/$name.log" 2>&1
  local code=$?
  grep -E '\| |gate|^on |^off|FAILED|skipped' "$OUT/$name.log" | cut -c1-300
  [ $code -eq 0 ] || { echo "--- $name ended with $code"; tail -5 "$OUT/$name.log"; }
}

# 1. does everything run on this GPU at all: kernels compiled instead of interpreted  [2]
if [[ tests =~ ${ROWS:-.} ]]; then
  timeout 240 python -m pytest -q tests/kernels -k "not benchmarks and not import" >"$OUT/tests.log" 2>&1
  tail -12 "$OUT/tests.log"
fi

# 2. the table, the largest predicted gain first
row policy-360m 2 benchmarks.policy --shape 360m
row policy-1.5b 2 benchmarks.policy --shape 1.5b
row llm-1.5b 3 benchmarks.llm --shape 1.5b
row vit 3 benchmarks.vit
row vlm 3 benchmarks.vlm
row llm-360m 2 benchmarks.llm --shape 360m
row llm-7b 3 benchmarks.llm --shape 7b --arms mmpeft peft peft+compile unsloth peft+liger
row many 1 benchmarks.many
row many-decode 1 benchmarks.many --length 1
row llm-1.5b-dropout 1 benchmarks.llm --shape 1.5b --dropout 0.05 --arms mmpeft "mmpeft engine" peft
row llm-1.5b-dora 1 benchmarks.llm --shape 1.5b --dora --arms mmpeft "mmpeft engine" "mmpeft engine+compile" peft peft+compile
row llm-1.5b-nf4 1 benchmarks.llm --shape 1.5b --base nf4 --arms mmpeft "mmpeft engine" "mmpeft engine+compile"
row llm-1.5b-packed 1 benchmarks.llm --shape 1.5b --packed --arms mmpeft "mmpeft engine" peft peft+compile
if [[ lowrank =~ ${ROWS:-.} ]]; then
  timeout 120 python -m benchmarks.lowrank --out "$OUT/lowrank.jsonl" | tee "$OUT/lowrank.log"
fi
