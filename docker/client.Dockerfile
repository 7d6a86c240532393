# The client: servebench with everything to test servers over HTTP and gRPC, without torch.
#   docker build -f docker/client.Dockerfile -t servebench/client:0.1.0 .
#   mkdir -p runs       (the engine would make it root's)
#   docker run --rm --user "$(id -u):$(id -g)" --network host -v "$PWD/runs:/runs" servebench/client:0.1.0 run digits-triton-grpc \
#     --set 'server={url: "grpc://127.0.0.1:8001"}' --out /runs/first
# Without --user it is uid 1000, which can write no folder of another's.
FROM python:3.11.11-slim-bookworm AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY servebench servebench
COPY servers servers
COPY loadprofiles loadprofiles
RUN python -m venv /opt/servebench && /opt/servebench/bin/pip install --no-cache-dir '.[grpc]'

FROM python:3.11.11-slim-bookworm
COPY --from=build /opt/servebench /opt/servebench
RUN useradd --create-home --uid 1000 servebench && install --directory --owner servebench /runs
ENV PATH=/opt/servebench/bin:$PATH
USER servebench
WORKDIR /home/servebench
ENTRYPOINT ["servebench"]
CMD ["--help"]
