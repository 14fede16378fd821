# syntax=docker/dockerfile:1
# The agent on a workstation with an NVIDIA GPU. Not built where this was written, which has neither
# Docker nor a GPU; hadolint finds nothing wrong with it. PyTorch's wheels bring CUDA with them, so
# nothing but the driver is needed, which NVIDIA's container toolkit hands in.
#
#   docker build -f deploy/container/agent-cuda.Dockerfile -t sketchfleet-agent:cuda .
#   docker run --rm -i -v sketchfleet-agent:/var/lib/sketchfleet -e SKETCHFLEET_AGENT__DATA__INCLUDE=/data \
#     sketchfleet-agent:cuda enroll - <JOINFILE
#   docker run -d --name sketchfleet-agent --restart=always --init --gpus all --shm-size 1g \
#     --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges --memory 24g --cpu-shares 128 \
#     -v sketchfleet-agent:/var/lib/sketchfleet -v sketchfleet-models:/var/cache/sketchfleet \
#     -v /path/to/code:/data:ro -e SKETCHFLEET_AGENT__DATA__INCLUDE=/data sketchfleet-agent:cuda
#
# Without a GPU, for one that trains on the processor or only serves:
#   --build-arg PLATFORM=x86-cpu [--build-arg EXTRAS=agent,serve], and no --gpus.
# In place of the variable, mount settings at /etc/sketchfleet/agent.toml. Base by digest, for builds
# that stay the same: --build-arg PYTHON_IMAGE=python:3.11-slim-bookworm@sha256:...
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG PLATFORM=x86-cuda
ARG EXTRAS=agent,train
# Of an index that has PyTorch for the processor alone, 2 GB smaller; pip reads it.
ARG PIP_EXTRA_INDEX_URL=
WORKDIR /source
COPY . .
RUN python -m venv /opt/sketchfleet \
    && /opt/sketchfleet/bin/python -m pip install --no-cache-dir --disable-pip-version-check \
       -c "constraints/${PLATFORM}.txt" ".[${EXTRAS}]" \
    && /opt/sketchfleet/bin/python -m pip uninstall --yes --quiet pip

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="Sketchfleet agent" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN groupadd --gid 10001 sketchfleet \
    && useradd --uid 10001 --gid 10001 --groups video --no-create-home \
       --home-dir /var/lib/sketchfleet --shell /usr/sbin/nologin sketchfleet \
    && install --directory --owner 10001 --group 10001 --mode 0700 \
       /var/lib/sketchfleet /var/cache/sketchfleet \
    && install --directory --mode 0755 /etc/sketchfleet
COPY --from=build /opt/sketchfleet /opt/sketchfleet

ENV PATH=/opt/sketchfleet/bin:$PATH \
    HF_HOME=/var/cache/sketchfleet/huggingface \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONDONTWRITEBYTECODE=1 \
    SKETCHFLEET_AGENT__STATE__FOLDER=/var/lib/sketchfleet/agent
WORKDIR /var/lib/sketchfleet
VOLUME ["/var/lib/sketchfleet", "/var/cache/sketchfleet"]
USER 10001:10001
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=5m --timeout=30s --start-period=10m --retries=3 \
    CMD ["sketchfleet-agent", "healthcheck"]
ENTRYPOINT ["sketchfleet-agent"]
CMD ["run"]
