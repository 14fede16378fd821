# syntax=docker/dockerfile:1
# The coordinator: docker build -f deploy/container/coordinator.Dockerfile -t sketchfleet-coordinator .
# For builds that stay the same, name the base by its digest:
#   --build-arg PYTHON_IMAGE=python:3.12-slim-bookworm@sha256:...
ARG PYTHON_IMAGE=python:3.12-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
WORKDIR /source
COPY . .
RUN python -m venv /opt/sketchfleet \
    && /opt/sketchfleet/bin/python -m pip install --no-cache-dir --disable-pip-version-check \
       -c constraints.txt ".[coordinator]" \
    && /opt/sketchfleet/bin/python -m pip uninstall --yes --quiet pip

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="Sketchfleet coordinator" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN groupadd --gid 10001 sketchfleet \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/sketchfleet \
       --shell /usr/sbin/nologin sketchfleet \
    && install --directory --owner 10001 --group 10001 --mode 0700 \
       /var/lib/sketchfleet /var/cache/sketchfleet \
    && install --directory --mode 0755 /etc/sketchfleet
COPY --from=build /opt/sketchfleet /opt/sketchfleet

# Above whatever run.toml says: inside, nothing else can be written or reached.
ENV PATH=/opt/sketchfleet/bin:$PATH \
    HF_HOME=/var/cache/sketchfleet/huggingface \
    PYTHONDONTWRITEBYTECODE=1 \
    SKETCHFLEET_COORDINATOR__SERVER__STATE=/var/lib/sketchfleet/coordinator \
    SKETCHFLEET_COORDINATOR__SERVER__LISTEN=0.0.0.0:8470
WORKDIR /var/lib/sketchfleet
VOLUME ["/var/lib/sketchfleet", "/var/cache/sketchfleet"]
# 8470 for the fleet, 8471 for joining, 9464 for the dashboard and /metrics.
EXPOSE 8470 8471 9464
USER 10001:10001
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=10s --start-period=10m --retries=3 \
    CMD ["sketchfleet-coordinator", "healthcheck", "--config", "/etc/sketchfleet/run.toml"]
ENTRYPOINT ["sketchfleet-coordinator"]
CMD ["serve", "--config", "/etc/sketchfleet/run.toml"]
