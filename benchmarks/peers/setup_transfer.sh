#!/usr/bin/env bash
# Set up the peers of the messenger in a virtual environment of its own: benchmarks/peers/setup_transfer.sh DIR
# As root it also installs the Debian packages that they need: libraries of Mooncake, and Redis (whose service stays off).
set -euo pipefail
venv=${1:?usage: setup_transfer.sh DIR}
if [ "$(id -u)" = 0 ]; then
    apt-get install --yes --no-install-recommends libibverbs1 librdmacm1 redis-server
    systemctl disable --now redis-server 2>/dev/null || true
fi
python3 -m venv "$venv"
"$venv/bin/pip" install --quiet 'numpy>=1.26,<=2.2.6' 'mooncake-transfer-engine-non-cuda==0.3.13.post1'
"$venv/bin/pip" install --quiet --no-deps 'nixl==1.5.2' 'nixl-cu12==1.5.1'
# LMCache asks for CUDA's packages; its server runs without them
"$venv/bin/pip" install --quiet 'torch==2.13.0' numba sortedcontainers prometheus_client py-cpuinfo psutil cachetools PyYAML
"$venv/bin/pip" install --quiet --no-deps 'lmcache==0.5.6'
"$venv/bin/python" -c 'import mooncake.engine, nixl, lmcache.v1.server.__main__'
