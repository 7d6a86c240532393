# TorchServe on Python 3.11: its own image has 3.9, which is too old for the bundled models.
#   docker build -f docker/torchserve.Dockerfile -t servebench/torchserve:0.12.0 docker
# For GPUs: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu126 -t servebench/torchserve:0.12.0-gpu
FROM python:3.11.11-slim-bookworm
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN apt-get update \
 && apt-get install --yes --no-install-recommends openjdk-17-jre-headless \
 && rm -rf /var/lib/apt/lists/*
RUN python -m pip install --no-cache-dir --index-url "$TORCH_INDEX" torch==2.6.0 \
 && python -m pip install --no-cache-dir torchserve==0.12.0 numpy==1.26.4 pyyaml==6.0.2
RUN useradd --create-home --uid 1000 model-server
USER model-server
WORKDIR /home/model-server
EXPOSE 8080 8081 8082 7070 7071
CMD ["torchserve", "--help"]
