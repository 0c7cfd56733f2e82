# A worker or a bootstrap peer.
#   docker build -t dtrain .                                               for NVIDIA GPUs (and CPUs)
#   docker build -t dtrain --build-arg PIP_EXTRA_INDEX_URL=ADDRESS .       for CPUs only, a gigabyte less:
#                                                                          ADDRESS as in README.md, "Less to download"
#   docker run -it --init -v dtrain:/data -p 31337:31337 dtrain join dtrain://... --port 31337
FROM python:3.12-slim AS build
ARG PIP_EXTRA_INDEX_URL=""
WORKDIR /source
COPY setup.cfg pyproject.toml constraints.txt README.md LICENSE ./
COPY compression compression
COPY dht dht
COPY trainer trainer
COPY experiments experiments
RUN python -m venv /opt/dtrain \
    && /opt/dtrain/bin/pip install --no-cache-dir --disable-pip-version-check --constraint constraints.txt '.[dashboard]'

FROM python:3.12-slim
COPY --from=build /opt/dtrain /opt/dtrain
# Everything that must outlive a container: checkpoints, identity, limits, and the codec compiled for this machine.
RUN useradd --uid 1000 --home-dir /data dtrain && install --directory --owner dtrain /data
ENV PATH=/opt/dtrain/bin:$PATH HOME=/data DTRAIN_RUNTIME_DIR=/tmp/dtrain PYTHONUNBUFFERED=1
USER 1000
WORKDIR /data
VOLUME /data
EXPOSE 31337
HEALTHCHECK --interval=60s --timeout=20s --start-period=120s CMD ["dtrain", "status"]
ENTRYPOINT ["dtrain"]
CMD ["--help"]
