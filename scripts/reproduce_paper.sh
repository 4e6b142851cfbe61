#!/usr/bin/env bash
# The benchmarks of arXiv 2503.20540 that lmms-eval has, at retention 100, 22, 15 and 11%:
#   scripts/reproduce_paper.sh MODEL CODEBOOK [TASKS]
#   scripts/reproduce_paper.sh llava-hf/llava-1.5-7b-hf ./codebooks-of-yours/llava-1.5-7b pope,mme
# PROCESSES (default 1) GPUs share the questions; BATCH (default 8) questions go together. Results: outputs/paper/.
set -euo pipefail
model=${1:?a model: llava-hf/llava-1.5-7b-hf, llava-hf/llama3-llava-next-8b-hf or llava-hf/llava-onevision-qwen2-7b-ov-hf}
codebook=${2:?a codebook: a folder or a Hub id}
images=pope,mme,mmbench_en_dev,seedbench,realworldqa,nocaps_val,flickr30k
several=muirbench,mantis,mvbench
captions=detailcaps
case $model in
  *onevision*) default=$images,$several,$captions ;;
  *) default=$images,$captions ;;
esac
tasks=${3:-$default}
for ratio in 1.0 0.22 0.15 0.11; do
  rule="codebook=$codebook,keep_ratio=$ratio"
  if [ "$ratio" = 1.0 ]; then rule="prune=False"; fi
  accelerate launch --num_processes "${PROCESSES:-1}" -m lmms_eval --model rbl --model_args "pretrained=$model,$rule" \
    --tasks "$tasks" --batch_size "${BATCH:-8}" --output_path "outputs/paper/$(basename "$model")-$ratio" --log_samples
done
