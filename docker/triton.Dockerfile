# Triton with torch, which the bundled models need and Triton's own image lacks. numpy stays below 2 for its Python backend.
#   docker build -f docker/triton.Dockerfile -t servebench/triton:24.12 docker
# For GPUs: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu126 -t servebench/triton:24.12-gpu
FROM nvcr.io/nvidia/tritonserver:24.12-py3
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_BREAK_SYSTEM_PACKAGES=1
RUN python3 -m pip install --no-cache-dir --index-url "$TORCH_INDEX" torch==2.6.0 \
 && python3 -m pip install --no-cache-dir numpy==1.26.4
EXPOSE 8000 8001 8002
