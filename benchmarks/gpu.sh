#!/usr/bin/env bash
# What a GPU has to show, by parts; each takes less than three minutes of an H100 and prints its rows as they come.
#
#   benchmarks/gpu.sh [--device cuda|cpu] [--out DIR] [PART...]      without a part: all of them, in this order
#
#   check           outputs and gradients of every kind of layer against float64 on the CPU
#   decisions       the same topologies by the same seed as on the CPU, by each rule; how often an update waits
#   kernels         layers of single weights at 90 %, beside F.linear, torch's CSR and 2:4
#   blocks          layers of blocks of 16 to 128 at 90 %, beside F.linear, torch's BSR and blksprs
#   ways            blocks by their kernels beside the dense way (reference), at the densities around the thresholds
#   step            whole steps of gpt2-small at 90 %, compiled, beside compiled dense: fixed topology
#   step-graphs     the same with CUDA graphs
#   step-search     the same with the default's updates (the share of search), and with a teacher
#   step-medium     gpt2-medium, fixed topology; step-blocks: gpt2-medium in blocks of 64
#   memory          model state and peak of gpt2-small and gpt2-medium beside dense, both with a teacher
#   data            the text and the tokenizer that the next two train with
#   train-dense, train-sparse   gpt2-small for 110 seconds each: loss by tokens and seconds, and a sample
#   largest         the largest model that trains: dense, then at 90 %
#
# LIMIT=600 in the environment lets a part take 600 seconds: where torch.compile takes longer, say.
# Rows are added to DIR/PART.jsonl (default: runs/gpu). A part that fails or runs longer than its limit is named at the
# end. --device cpu goes the same way with toys, in a few minutes: it shows that the script works, and nothing else.
set -uo pipefail
cd "$(dirname "$0")/.."
DEVICE=cuda OUT=runs/gpu INSIDE= PARTS=()
while [ $# -gt 0 ]; do
  case $1 in
    --device) DEVICE=$2; shift 2 ;;
    --out) OUT=$2; shift 2 ;;
    --inside) INSIDE=yes; shift ;;
    -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit ;;
    *) PARTS+=("$1"); shift ;;
  esac
done
ALL="check decisions kernels blocks ways step step-graphs step-search step-medium step-blocks memory data train-dense train-sparse largest"
[ ${#PARTS[@]} -gt 0 ] || read -ra PARTS <<< "$ALL"
for part in "${PARTS[@]}"; do
  [[ " $ALL " == *" $part "* ]] || { echo "benchmarks/gpu.sh: no part '$part': use ${ALL// /, }" >&2; exit 2; }
done
PYTHON=${PYTHON:-python}
SPARSAE=("$PYTHON" -m sparsae)
mkdir -p "$OUT"

if [ "$DEVICE" = cpu ]; then
  SHAPES=128x128 TOKENS=32 DTYPE=float32 ROUNDS=1 STEPS=1 SECONDS_EACH=20
  SMALL=demo MEDIUM=demo
  MODEL=(model.layers=1 model.width=64 model.heads=2 model.context=16 data.tokenizer_vocab=300 training.batch_size=2
    training.threads=1 training.accumulation=1)
  DATA=(data.source=README.md)
else
  SHAPES=768x768,3072x768,1024x1024,2048x2048,4096x4096 TOKENS=8192,32768 DTYPE=bfloat16 ROUNDS=10 STEPS=10
  SECONDS_EACH=110 SMALL=gpt2-small MEDIUM=gpt2-medium
  MODEL=(training.accumulation=1 training.batch_size=8)
  DATA=()
fi
SET=() && for setting in "${MODEL[@]}"; do SET+=(--set "$setting"); done
TEXT=() && for setting in ${DATA[@]+"${DATA[@]}"}; do TEXT+=(--set "$setting"); done

layers() { # JSONL, then options
  local file=$1 && shift
  "${SPARSAE[@]}" bench kernels --device "$DEVICE" --shapes "$SHAPES" --tokens "$TOKENS" --dtypes "$DTYPE" \
    --rounds "$ROUNDS" --json "$file" "$@"
}

steps() { # JSONL, preset, method, then options
  local file=$1 preset=$2 method=$3 && shift 3
  "${SPARSAE[@]}" bench step --device "$DEVICE" --preset "$preset" --method "$method" --steps "$STEPS" --no-memory --no-stock \
    --json "$file" "${SET[@]}" "$@"
}

train() { # name, then options: cut short by time, as Ctrl-C does, which loses nothing
  local run=$OUT/$1 && shift
  rm -rf "$run"
  timeout --signal INT "$SECONDS_EACH" "${SPARSAE[@]}" train --preset "$SMALL" --out "$run" "${SET[@]}" \
    ${TEXT[@]+"${TEXT[@]}"} --set training.device="$DEVICE" --set training.schedule=constant \
    --set training.warmup=0.01 --set training.validate_every=100 "$@"
  "$PYTHON" benchmarks/gpu.py losses "$run" "$OUT/$part.jsonl" && "${SPARSAE[@]}" generate "$run" --prompt "def " --tokens 40
}

run() {
  local file=$OUT/$1.jsonl
  case $1 in
    check) "$PYTHON" benchmarks/gpu.py check "$DEVICE" "$file" ;;
    decisions) "$PYTHON" benchmarks/decisions.py "$DEVICE" "$file" ;;
    kernels) layers "$file" --units 1x1 --sparsities 0.5,0.9 --backends auto,torch-csr,torch-2:4 ;;
    blocks) layers "$file" --units 16x16,32x32,64x64,128x128 --sparsities 0.9 --backends auto,torch-bsr,blksprs ;;
    ways)
      SHAPES=${SHAPES##*,} TOKENS=${TOKENS%%,*} layers "$file" --units 16x16,32x32,64x64,128x128 \
        --sparsities 0.4,0.6,0.8,0.9,0.95 --backends auto,reference ;;
    step) steps "$file" "$SMALL" static ;;
    step-graphs) steps "$file" "$SMALL" static --set training.compile=true --set training.compile_mode=reduce-overhead ;;
    step-search) steps "$file" "$SMALL" sparsae && steps "$file" "$SMALL" sparsae --teacher --set teacher.enabled=true ;;
    step-medium) steps "$file" "$MEDIUM" static ;;
    step-blocks)
      if [ "$DEVICE" = cpu ]; then unit=16; else unit=64; fi
      steps "$file" "$MEDIUM" static --set "sparsity.unit=[$unit, $unit]" ;;
    memory)
      for preset in "$SMALL" "$MEDIUM"; do
        "${SPARSAE[@]}" bench memory --device "$DEVICE" --preset "$preset" --json "$file" "${SET[@]}" \
          --set training.compile=false --set teacher.enabled=true || return
        [ "$DEVICE" = cpu ] && break
      done ;;
    data) SECONDS_EACH=150 train data --method static --set training.steps=1 --set training.validation_sequences=2 ;;
    train-dense) train dense --method dense ;;
    train-sparse) train sparse --method sparsae --set sparsity.sparsity=0.9 ;;
    largest) "$PYTHON" benchmarks/gpu.py largest "$DEVICE" "$file" ;;
  esac
}

if [ -n "$INSIDE" ]; then
  part=${PARTS[0]}
  run "$part"
  exit
fi
FAILED=()
for part in "${PARTS[@]}"; do
  echo "== $part: $(date +%T)"
  rm -f "$OUT/$part.jsonl"
  # timeout ends a part with all that it has started.
  timeout --signal INT --kill-after 15 "${LIMIT:-175}" "$0" --inside --device "$DEVICE" --out "$OUT" "$part" || FAILED+=("$part")
done
echo "== on $DEVICE: ${PARTS[*]}"
[ ${#FAILED[@]} -eq 0 ] || { echo "== failed, or cut short: ${FAILED[*]}"; exit 1; }
