#!/usr/bin/env bash
# All of docs/results/testbed.md but its prose: trains the six models, builds their codebooks, compares rules on test
# examples and recipes on validation examples, and writes figures, pictures and the committed checkpoints. About two
# hours and a half on two cores; started again, it goes on with what is missing.
# scripts/testbeds/digits/reproduce.sh [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/../../.."
out=${1:-outputs/testbed} results=docs/results/testbed
export OMP_NUM_THREADS=1

# one NAME FAMILY SEED "KINDS" RESULTS [OPTIONS]: a model, its codebooks and RESULTS[-KIND]-seedN.json. The options are
# for the codebook of the model before its window stage.
one() {
  local name=$1 family=$2 seed=$3 kinds=$4 label=$5 run=$out/$1 images=$out/images-$2
  [ -d "$run/window" ] || python scripts/testbeds train "$run" --family "$family" --seed "$seed"
  [ -d "$images" ] || python scripts/testbeds images "$images" --family "$family" --count 48
  build() { [ -f "$run/$1/codebook.json" ] || rbl build --recipe digits --keep-ratio 0.15 --out "$run/$1" "${@:2}"; }
  build book --model "$run/window" --images "$images" --dtype float32
  build p1 --from-records "$run/book/records" --set max_divergence=1.0
  build divergence --from-records "$run/book/records" --set max_p1=1.0
  [ "$seed" -ne 0 ] || build answer-book --model "$run/answer" --images "$images" --dtype float32 "${@:6}"
  for kind in $kinds; do
    local file=$label compare="python scripts/testbeds compare-rules --kind $kind --split test --seed 2026 --count 200"
    [ "$kind" = image ] || file=$label-$kind
    $compare "$run/window" --codebook codebook="$run/book" --codebook "p1 alone"="$run/p1" \
      --codebook "divergence alone"="$run/divergence" \
      --threshold 0.98 --threshold 0.96 --threshold 0.93 --threshold 0.9 --out "$results/$file-seed$seed.json"
    [ "$seed" -ne 0 ] || $compare "$run/answer" --codebook codebook="$run/answer-book" --only "no image" \
      --only "codebook: codebook" --only "codebook: random tokens" --only random --only oracle \
      --out "$results/$file-seed$seed-answer.json"
  done
}

for seed in 0 1 2; do one "next-$seed" llava_next "$seed" image next; done
one onevision llava_onevision 0 "images video" onevision
one llava llava 0 image llava --set max_cluster_size=null  # with the cluster-size rule no prototype is left
one qwen3-vl qwen3_vl 0 image qwen3-vl
for stage in window answer; do
  book=$out/qwen3-vl/book file=$results/qwen3-vl-seed0-positions.json
  [ "$stage" = window ] || book=$out/qwen3-vl/answer-book file=$results/qwen3-vl-seed0-answer-positions.json
  python scripts/testbeds compare-positions "$out/qwen3-vl/$stage" --codebook "$book" --split test --seed 2026 \
    --count 200 --out "$file"
done
python scripts/testbeds compare-recipes "$out/next-0/window" --images "$out/images-llava_next" --out "$out/recipes"
cp "$out/recipes/results.json" "$results/recipes.json"

assemble() { python scripts/testbeds assemble "$out/$1/window" "$out/$1/book" "$out/images-$2" "codebooks/$3"; }
assemble next-0 llava_next digits-llava-next
assemble onevision llava_onevision digits-llava-onevision
assemble llava llava digits-llava-1.5
assemble qwen3-vl qwen3_vl digits-qwen3-vl
python scripts/testbeds pictures "$results"
cp "$out/next-0/book/report/candidates.png" "$results/"
report() { python scripts/testbeds report "${@:3}" --plot "$results/$1.png" --title "$2"; }
report next "LLaVA-NeXT, test questions" "$results"/next-seed?.json
report onevision-images-seed0 "LLaVA-OneVision, several images" "$results/onevision-images-seed0.json"
report onevision-video-seed0 "LLaVA-OneVision, video" "$results/onevision-video-seed0.json"
report llava-seed0 "LLaVA-1.5, test questions" "$results/llava-seed0.json"
report qwen3-vl-seed0 "Qwen3-VL, test questions" "$results/qwen3-vl-seed0.json"
