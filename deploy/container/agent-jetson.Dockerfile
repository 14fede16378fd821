# syntax=docker/dockerfile:1
# The agent on a Jetson. Not built where this was written, which has neither Docker nor a board;
# hadolint finds nothing wrong with it. Build it on the board, and check it there first:
#   docker run --rm --runtime nvidia sketchfleet-agent:jp72 doctor
#
# JetPack 7 (Orin and Thor; Ubuntu 24.04, Python 3.12; PyTorch's own wheels bring CUDA 13):
#   docker build -f deploy/container/agent-jetson.Dockerfile -t sketchfleet-agent:jp72 .
# JetPack 6 (Orin; Ubuntu 22.04, Python 3.10; PyTorch of NVIDIA's Jetson index, jp6/cu126, which
# needs CUDA 12.6 in the image, as NVIDIA's L4T images for R36 have it):
#   docker build -f deploy/container/agent-jetson.Dockerfile -t sketchfleet-agent:jp62 \
#     --build-arg UBUNTU_IMAGE=IMAGE_WITH_CUDA_12.6 --build-arg PYTHON=python3.10 \
#     --build-arg PLATFORM=jetpack6 --build-arg PIP_EXTRA_INDEX_URL=ADDRESS_OF_THE_INDEX .
#
#   docker run --rm -i -v sketchfleet-agent:/var/lib/sketchfleet -e SKETCHFLEET_AGENT__DATA__INCLUDE=/data \
#     sketchfleet-agent:jp72 enroll - <JOINFILE
#   docker run -d --name sketchfleet-agent --restart=always --init --runtime nvidia --shm-size 1g \
#     --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges --cpu-shares 128 \
#     --group-add "$(stat -c %g /dev/nvmap)" --memory 6g \
#     -v sketchfleet-agent:/var/lib/sketchfleet -v sketchfleet-models:/var/cache/sketchfleet \
#     -v /path/to/code:/data:ro -e SKETCHFLEET_AGENT__DATA__INCLUDE=/data sketchfleet-agent:jp72
#
# --group-add: the devices of the GPU belong to a group whose number the board chooses. --memory: GPU
# and processor share it; leave the system 2 GB. Keep Docker's data on NVMe, not on an SD card.
ARG UBUNTU_IMAGE=ubuntu:24.04

FROM ${UBUNTU_IMAGE} AS build
ARG PYTHON=python3.12
ARG PLATFORM=jetpack7
ARG EXTRAS=agent,train
ARG PIP_EXTRA_INDEX_URL=
# The distribution keeps one version of each for as long as it lives.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends "${PYTHON}" "${PYTHON}-venv" \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY . .
RUN "${PYTHON}" -m venv /opt/sketchfleet \
    && /opt/sketchfleet/bin/python -m pip install --no-cache-dir --disable-pip-version-check \
       -c "constraints/${PLATFORM}.txt" ".[${EXTRAS}]" \
    && /opt/sketchfleet/bin/python -m pip uninstall --yes --quiet pip

FROM ${UBUNTU_IMAGE}
ARG PYTHON=python3.12
LABEL org.opencontainers.image.title="Sketchfleet agent for Jetson" \
      org.opencontainers.image.licenses="Apache-2.0"
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends "${PYTHON}" ca-certificates \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 sketchfleet \
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
